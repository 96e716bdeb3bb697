"""Continuous batching: token ids and settings go in, tokens come out, many answers at a time on one model.

One thread does everything. A turn of it: (a) rows whose client left are dropped; (b) the first of the queue is let in when its prompt
and a reserve fit the budget of pages; (c) prompts are run, one piece between two decode steps while rows are decoding, so that
their tokens keep coming at an even pace, and without pause while none is; (d) one decode step for all running rows.

Who comes first is served first. When decoding needs a page and none is free, prefixes that nobody uses are given up, then the row that
was let in last is preempted: its pages are freed, it goes back to the front of the queue, and its prompt and the tokens it had made
are put back later. The i-th token of a row is drawn by the i-th number of the row's own stream (Philox, keyed by its seed; our choice),
so neither preemption nor other rows change an answer. Rows that are submitted with a prompt whose keys and values are there already
share its pages; so do the n answers of one request, since a prompt is run before the next row is looked at.

Greedy rows and rows that sample with temperature, top-k and top-p are the backend's to choose; rows with log-probabilities, penalties,
a bias, a least length or a constraint are chosen here, from logits (`choosing`). A greedy row that runs alone is guessed for where the
recipe speculates (`guessing`).
"""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assay import checks
from assay.methods.builtin.speculation import verify
from assay.methods.core.generation.paged import PAGE, pages_for
from assay.methods.core.generation.prefixes import Prefixes
from assay.server.backends import Backend
from assay.server.choosing import choose, infos_of, not_finite, uniforms_of
from assay.server.guessing import Guesses
from assay.server.rows import Event, Row, Settings, TokenInfo

logger = logging.getLogger(__name__)

MOST_STEPS = 4  # steps to a call of the backend, at most: nobody is let in or leaves meanwhile
BURST = 0.025  # seconds that such a call may take, about: what comes at once then still reads as a steady stream; our choice


@dataclass(frozen=True)
class Stats:
    """Where the scheduler stands, and what it has done since it began.

    `kv_used` and `kv_total` are tokens of the budget; `kv_kept`, part of `kv_used`, are prefixes kept for later. Each row submitted is
    waiting, running (its prompt may still be run), finished, cancelled or failed. `generated_tokens` are those made, `recomputed_tokens`
    those that preempted rows had to run when they came back, `accepted_tokens` those of `drafted_tokens` that the model made its own.
    `batch_sizes` counts decode steps by their rows.
    """

    waiting: int
    running: int
    kv_used: int
    kv_total: int
    kv_kept: int
    submitted: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    recomputed_tokens: int
    preemptions: int
    steps: int
    drafted_tokens: int
    accepted_tokens: int
    close_choices: int
    batch_sizes: Mapping[int, int]


class Stopped(RuntimeError):
    """The scheduler is stopping: it takes nothing more, and what it could not finish ends with this."""


class Ticket:
    """A row that was submitted."""

    def __init__(self, scheduler: Scheduler, row: Row) -> None:
        self._scheduler, self._row = scheduler, row

    @property
    def running(self) -> bool:
        """Whether it was let in."""
        return self._row.sequence is not None

    def cancel(self) -> None:
        """Nobody wants the answer any more: the row is dropped and its pages are freed before the next step, without a last event."""
        self._row.left = True
        self._scheduler._notice()


class Scheduler:
    """Runs rows on a backend in a thread of its own, until `stop`.

    At most `max_running` rows at a time. Prompts are run in pieces of `prefill_chunk` tokens, a multiple of the page, cut at multiples
    of it from the prompt's start; that many tokens, one piece at least, go between two decode steps. `steps` (1 to 4) lets the
    backend take so many steps a call while nobody waits, it chooses all tokens, and the call takes about 25 ms at most by the pace of the
    last one: fewer calls, but tokens come in bursts. With
    `start=False` there is no thread: call `turn`.
    Raises ValueError or TypeError for numbers out of range.
    """

    def __init__(
        self, backend: Backend, *, max_running: int = 64, prefill_chunk: int = 256, steps: int = 1, start: bool = True
    ) -> None:
        most = checks.whole("max_running", max_running, low=1)
        self.backend = backend
        self.max_running = most if backend.rows is None else min(most, backend.rows)
        self.chunk = checks.whole("prefill_chunk", prefill_chunk, low=PAGE)
        if self.chunk % PAGE:
            raise ValueError(f"prefill_chunk must be a multiple of {PAGE}, the page, got {prefill_chunk}")
        self.steps = checks.whole("steps", steps, low=1, high=MOST_STEPS)
        self._pace = 0.0  # seconds a step, by the last call
        self._prefixes = Prefixes(backend.pool) if backend.shares else None
        self._inbox: deque[Row] = deque()  # what other threads submit
        self._queue: deque[Row] = deque()
        self._filling: Row | None = None  # its prompt is being run
        self._running: list[Row] = []  # in the order they were let in
        self._blocked: Row | None = None  # the first of the queue, when it did not fit and no page was freed since
        self._counts: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._wake = threading.Condition()
        self._stopping = False
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name="assay-scheduler", daemon=True) if start else None
        if self._thread is not None:
            self._thread.start()

    # ---- for other threads

    def submit(self, ids: list[int], settings: Settings, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a prompt. `on_event` is called in the scheduler's thread and must be quick; the last event has `finish` or `error`.

        A callback that raises cancels its row. Raises ValueError for an empty prompt, tokens the model does not know, a prompt and
        answer that exceed the model's positions or can never fit the KV budget, TypeError for tokens that are no whole numbers, and
        Stopped when the scheduler is stopping.
        """
        try:
            if bool in set(map(type, ids)):
                raise TypeError("a truth value is none")
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise TypeError(f"ids must be token ids, which are whole numbers: {error}") from None
        if not ids:
            raise ValueError("ids must hold at least one token, got none")
        vocab, positions = self.backend.vocab, self.backend.positions
        if min(ids) < 0 or max(ids) >= vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise ValueError(f"ids must lie in 0..{vocab - 1}, got {wrong}")
        for name, tokens in (("ends", settings.ends), ("logit_bias", settings.logit_bias)):
            if unknown := [token for token in tokens if token >= vocab]:
                raise ValueError(f"{name} must lie in 0..{vocab - 1}, got {unknown[0]}")
        if settings.logprobs is not None and settings.logprobs > vocab:
            raise ValueError(f"logprobs must be at most {vocab}, the vocabulary, got {settings.logprobs}")
        total = len(ids) + settings.max_tokens
        if positions is not None and total > positions:
            asked = f"{len(ids)} of the prompt and max_tokens {settings.max_tokens}"
            raise ValueError(f"ids and max_tokens must fit the model's {positions} positions, got {asked}")
        row = Row.of(ids, settings, on_event)
        if row.pages() > self.backend.pool.pages:
            budget = f"{self.backend.pool.pages} pages of {PAGE} tokens"
            raise ValueError(
                f"ids and max_tokens must fit the KV budget of {budget}, got {len(ids)} tokens of the prompt and max_tokens "
                f"{settings.max_tokens}, which need {row.pages()} pages"
            )
        with self._wake:
            if self._stopping:
                raise Stopped("the scheduler is stopping")
            self._counts["submitted"] += 1
            self._inbox.append(row)
            self._wake.notify()
        return Ticket(self, row)

    def stop(self, *, drain_s: float = 0.0) -> None:
        """Take nothing more, finish what is there within `drain_s` seconds, end the rest with Stopped, and return when all is done."""
        drain_s = checks.number("drain_s", drain_s, low=0)
        with self._wake:
            self._deadline = time.monotonic() + drain_s  # first: the thread reads both without the lock
            self._stopping = True
            self._wake.notify()
        if self._thread is None:
            while time.monotonic() < self._deadline and self.turn():
                pass
            self._end_all(Stopped("the scheduler is stopping"))
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> Stats:
        """A snapshot; its numbers are of one moment up to the step that may be going on."""
        pool, counts = self.backend.pool, self._counts
        names = "submitted finished cancelled failed prompt_tokens cached_tokens generated_tokens recomputed_tokens preemptions steps "
        names += "drafted_tokens accepted_tokens"
        return Stats(
            waiting=len(self._inbox) + len(self._queue),
            running=len(self._running) + (self._filling is not None),
            kv_used=(pool.pages - pool.free) * PAGE,
            kv_total=pool.pages * PAGE,
            kv_kept=0 if self._prefixes is None else len(self._prefixes) * PAGE,
            close_choices=self.backend.close_choices,
            batch_sizes=dict(self._batch_sizes),
            **{name: counts[name] for name in names.split()},
        )

    def _notice(self) -> None:
        with self._wake:
            self._wake.notify()

    # ---- in the thread

    def _run(self) -> None:
        if self.backend.threads is not None:
            torch.set_num_threads(self.backend.threads)
        going = False
        while True:
            with self._wake:
                while not (going or self._inbox or self._stopping):
                    self._wake.wait()
            if self._over() or (self._stopping and not (going or self._inbox)):
                break
            going = self.turn()
        self._end_all(Stopped("the scheduler is stopping"))

    def _over(self) -> bool:
        """Whether nothing more is to be done, finished or not."""
        return self._stopping and time.monotonic() >= self._deadline

    @torch.inference_mode()
    def turn(self) -> bool:
        """One turn, for who runs the scheduler without a thread; returns whether there is more to do."""
        try:
            self._clear()
            self._fill()
            self._clear()  # who left on hearing its first token takes no part in the step
            if self._running:
                self._step()
        except Exception as error:  # a fault of ours, or of the backend outside its own work: nobody is left waiting
            logger.exception("a turn failed")
            self._fail(self._let_in() or list(self._queue)[:1], error)
        return bool(self._running or self._filling or self._queue or self._inbox)

    def _clear(self) -> None:
        """Rows in, and cancelled rows out."""
        while self._inbox:
            self._queue.append(self._inbox.popleft())
        for row in [*self._let_in(), *self._queue]:
            if row.left:
                self._drop(row)
                self._counts["cancelled"] += 1

    def _let_in(self) -> list[Row]:
        return self._running + ([self._filling] if self._filling is not None else [])

    def _drop(self, row: Row) -> None:
        """Out of wherever it is, and its pages free."""
        if row is self._filling:
            self._filling = None
        elif row in self._running:
            self._running.remove(row)
        elif row in self._queue:
            self._queue.remove(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        if row.sequence is not None:
            self.backend.end(row.sequence)
            self.backend.pool.release(row.sequence.pages)
        row.sequence = row.first = None
        self._blocked = None

    def _fail(self, rows: list[Row], error: Exception) -> None:
        for row in rows:
            self._drop(row)
            self._counts["failed"] += 1
        for row in rows:
            self._tell(row, Event(error=error, cached_tokens=row.cached))

    def _end_all(self, error: Exception) -> None:
        self._clear()
        self._fail([*self._let_in(), *self._queue], error)
        if self._prefixes is not None:
            self._prefixes.clear()

    def _tell(self, row: Row, event: Event) -> None:
        try:
            row.on_event(event)
        except Exception:
            logger.warning("a callback raised; its row is cancelled", exc_info=True)
            row.left = True

    # ---- letting in

    def _admit(self) -> bool:
        """Let the first of the queue in, if its prompt and a reserve fit.

        The reserve is a page for each running row and one more, so that who is let in is not preempted by the next step.
        """
        if not self._queue or self._filling is not None or len(self._running) >= self.max_running:
            return False
        row, pool = self._queue[0], self.backend.pool
        if row is self._blocked:
            return False
        twin, shared, start = self._found(row)
        need = pages_for(row.tokens()) - len(shared)
        reserve = min(len(self._running) + 1, row.pages() - pages_for(row.tokens())) if self._running else 0
        if shared:
            pool.hold(shared)
        if not self._make_free(need + reserve):
            if shared:
                pool.release(shared)
            self._blocked = row
            return False
        of = {"tenant": row.settings.tenant} if row.settings.tenant else {}  # only a backend of several models is told
        row.sequence = self.backend.begin(list(shared), start, **of)
        self._filling = self._queue.popleft()
        pages = row.sequence.pages
        if twin is not None and len(row.ids) % PAGE:  # the prompt's last page, which both go on writing
            assert twin.sequence is not None
            pages.append(pool.copy(twin.sequence.pages[len(shared)]))
        pages += pool.take(pages_for(row.tokens()) - len(pages))
        row.prompt_infos = [None] if row.wants_prompt() else None
        row.first = None if twin is None else twin.first
        if not row.known:
            row.known, row.cached = True, start
            self._counts["prompt_tokens"] += len(row.ids)
            self._counts["cached_tokens"] += start
        else:
            self._counts["recomputed_tokens"] += row.tokens() - start
        return True

    def _found(self, row: Row) -> tuple[Row | None, list[int], int]:
        """Pages that hold the beginning of a row's prompt, how many tokens that is, and the row that has the same prompt, if any.

        The beginning ends at a multiple of the chunk, so that what is computed after it is the same as without it, and before the last
        token, whose logits are needed. Of a running row with the same prompt everything is there, its logits included.
        """
        if self._prefixes is None or row.wants_prompt():
            return None, [], 0
        for twin in self._running:
            if twin.first is not None and twin.ids == row.ids:
                assert twin.sequence is not None
                return twin, twin.sequence.pages[: len(row.ids) // PAGE], len(row.ids)
        pages, tokens = self._prefixes.match(row.ids)
        tokens = min(tokens, len(row.ids) - 1) // self.chunk * self.chunk
        return None, pages[: tokens // PAGE], tokens

    def _make_free(self, pages: int) -> bool:
        """Whether so many pages are free, after giving up prefixes that nobody uses."""
        missing = pages - self.backend.pool.free
        if missing > 0 and self._prefixes is not None:
            missing -= self._prefixes.evict(missing)
        return missing <= 0

    # ---- prompts

    def _fill(self) -> None:
        """Run prompts: a chunk of tokens while rows are decoding, else until one is."""
        spent = 0
        while not self._over():
            if self._filling is None and not self._admit():
                return
            row = self._filling
            assert row is not None
            if row.sequence is not None and row.sequence.length < row.tokens():
                piece = self._piece(row)
                if self._running and spent and spent + len(piece) > self.chunk:
                    return
                spent += len(piece)
                if not self._run_piece(row, piece):
                    continue
            if row.sequence is not None and row.sequence.length >= row.tokens():
                self._filled(row)
            elif not self._running:
                self._clear()

    def _piece(self, row: Row) -> list[int]:
        """The next tokens of a row's prompt, or of what it had made before it was preempted."""
        assert row.sequence is not None
        length, prompt = row.sequence.length, len(row.ids)
        if length >= prompt:
            return row.made[length - prompt : -1][: self.chunk]
        return row.ids[length : (length // self.chunk + 1) * self.chunk] if self.backend.pieces else row.ids[length:]

    def _run_piece(self, row: Row, piece: list[int]) -> bool:
        """Run a piece; False when that failed, which ends the row."""
        assert row.sequence is not None
        length, prompt = row.sequence.length, len(row.ids)
        try:
            if length >= prompt:
                self.backend.extend(row.sequence, piece)
                return True
            last = length + len(piece) == prompt
            logits = self.backend.prefill(
                row.sequence, piece, "all" if row.prompt_infos is not None else "last" if last else "none"
            )
            if row.prompt_infos is not None:
                following = row.ids[length + 1 : length + len(piece) + 1]
                row.prompt_infos += infos_of(logits[: len(following)], following, row.settings.logprobs or 0)
            if last:
                row.first = logits[-1:].clone()
        except Exception as error:
            logger.warning("a prompt failed", exc_info=True)
            self._fail([row], error)
            return False
        return True

    def _filled(self, row: Row) -> None:
        """A prompt is there: it is kept for others, those with the same prompt that come next join it, and all make their first token."""
        assert row.sequence is not None
        self._filling = None
        self._running.append(row)
        if self._prefixes is not None and row.prompt_infos is None:
            keep = len(row.ids) // self.chunk * self.chunk
            self._prefixes.insert(row.ids[:keep], row.sequence.pages[: keep // PAGE])
        new = [row]
        while not row.made and self._queue and self._twins(row, self._queue[0]) and self._admit():
            twin, self._filling = self._filling, None
            assert twin is not None
            self._running.append(twin)
            new.append(twin)
        new = [row for row in new if not row.made]  # the others are back, and go on with the next step
        for row in new:
            if not row.settings.max_tokens:
                self._give(row, [], [])
        if starting := [row for row in new if row.settings.max_tokens]:
            self._choose(starting, torch.cat([row.first for row in starting if row.first is not None]))

    def _twins(self, row: Row, other: Row) -> bool:
        return (
            self._prefixes is not None
            and not (other.made or other.left or other.wants_prompt())
            and row.ids == other.ids
        )

    # ---- decoding

    def _step(self) -> None:
        if (draft := self._guess()) and self._verify(self._running[0], draft):
            return
        steps = self._steps_now()
        self._make_room(steps)
        rows = list(self._running)
        if not rows:
            return
        ours = [row.special or row.held_back() for row in rows]  # whose tokens are chosen here
        sampling = [None if own else row.sampling for row, own in zip(rows, ours, strict=True)]
        drawn = any(how is not None for how in sampling)
        began = time.monotonic()
        try:
            answers, logits = self.backend.run(
                [row.sequence for row in rows if row.sequence is not None],
                [row.made[-1] for row in rows],
                steps,
                sampling=sampling if drawn else None,
                uniforms=uniforms_of(rows, steps) if drawn else None,
                want_logits=any(ours),
            )
            tokens = answers.tolist()
        except Exception as error:
            logger.warning("a step failed; its rows end", exc_info=True)
            self._fail(rows, error)
            return
        self._pace = (time.monotonic() - began) / steps
        self._counts["steps"] += steps
        self._batch_sizes[len(rows)] += steps
        for row, mine, made in zip(rows, ours, tokens, strict=True):
            if not mine:
                self._take(row, made)
        if own := [i for i, mine in enumerate(ours) if mine]:
            self._choose([rows[i] for i in own], logits[own])

    def _steps_now(self) -> int:
        """Steps of the next call: more than one only where nobody waits, the backend chooses all tokens, and pages and time allow it."""
        most = min(self.steps, int(BURST / max(self._pace, 1e-9)))
        if most <= 1 or self._queue or self._inbox or self._filling is not None:
            return 1
        if any(row.special or row.held_back() for row in self._running):
            return 1
        steps = min(most, *(row.settings.max_tokens - len(row.made) for row in self._running))
        return steps if self._lacking(steps) <= self.backend.pool.free else 1

    def _guess(self) -> list[int]:
        """A draft for the only row that runs, if the recipe speculates, the row is greedy, and there are pages for it."""
        if self.backend.speculation is None or len(self._running) != 1:
            return []
        (row,) = self._running
        if row.sampling is not None or row.special or row.held_back():
            return []
        if row.guesses is None:
            row.guesses = Guesses(self.backend.speculation)
        draft: list[int] = row.guesses.next(row)
        return draft if draft and self._make_free(row.lacks(1 + len(draft))) else []

    def _verify(self, row: Row, draft: list[int]) -> bool:
        """Let the model decide about a draft: a pass over all of it, of which what it would have made itself is kept.

        False, and nothing has changed, where the logits are not finite: that may be the draft's fault.
        """
        assert row.sequence is not None
        self._make_room(1 + len(draft))
        before = row.sequence.length
        try:
            logits = self.backend.verify(row.sequence, [row.made[-1], *draft])
        except FloatingPointError:
            row.guesses.seen(len(draft), 0)
            return False
        except Exception as error:
            logger.warning("a draft failed; its row ends", exc_info=True)
            self._fail([row], error)
            return True
        made = verify(logits, draft, None, None, None)
        row.sequence.length = before + len(made)
        row.guesses.seen(len(draft), len(made) - 1)
        self._counts["steps"] += 1
        self._batch_sizes[1] += 1
        self._counts["drafted_tokens"] += len(draft)
        self._counts["accepted_tokens"] += len(made) - 1
        self._take(row, made)
        return True

    def _lacking(self, steps: int) -> int:
        """Pages that running rows lack for so many steps."""
        return sum(row.lacks(steps) for row in self._running)

    def _make_room(self, steps: int) -> None:
        """Give every running row the pages for the next steps, at the cost of unused prefixes, then of the row let in last."""
        while not self._make_free(self._lacking(steps)):
            self._preempt()
        for row in self._running:
            assert row.sequence is not None
            row.sequence.pages += self.backend.pool.take(row.lacks(steps))

    def _preempt(self) -> None:
        row = self._filling if self._filling is not None else self._running[-1]
        self._drop(row)
        self._queue.appendleft(row)
        self._counts["preemptions"] += 1

    # ---- tokens

    def _take(self, row: Row, tokens: list[int]) -> None:
        """What the backend chose for a row, which may end before the last of it; -1 where its logits were not finite."""
        for i, token in enumerate(tokens):
            if token < 0:
                if i:
                    self._give(row, tokens[:i], [])
                self._fail([row], not_finite())
                return
            if token in row.settings.ends:
                tokens = tokens[: i + 1]
                break
        self._give(row, tokens, [])

    def _choose(self, rows: list[Row], logits: Tensor) -> None:
        """Choose a token for each row from the model's logits (rows, vocab)."""
        for row, found in zip(rows, choose(rows, logits), strict=True):
            if isinstance(found, Exception):
                self._fail([row], found)
            else:
                token, told = found
                self._give(row, [token], told)

    def _give(self, row: Row, tokens: list[int], infos: list[TokenInfo]) -> None:
        """Hand new tokens to a row's client; the row leaves when they were its last."""
        row.made += tokens
        self._counts["generated_tokens"] += len(tokens)
        finish: Literal["stop", "length"] | None = None
        if tokens and tokens[-1] in row.settings.ends:
            finish = "stop"
        elif len(row.made) >= row.settings.max_tokens:
            finish = "length"
        prompt = None if row.prompt_infos is None else tuple(row.prompt_infos)
        row.prompt_infos = None
        if finish is not None:
            self._drop(row)
            self._counts["finished"] += 1
        self._tell(row, Event(tuple(tokens), tuple(infos), prompt, finish, None, row.cached))
