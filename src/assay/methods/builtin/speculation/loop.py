"""The loop: draft, run, verify, take back; with drafts as long as they pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay import checks
from assay.methods.builtin.decode_loop import Sampling
from assay.methods.builtin.speculation.drafts import Drafter
from assay.methods.builtin.speculation.engines import Engine
from assay.methods.builtin.speculation.verification import verify

START = (
    0.5  # the share of a draft that is expected to be accepted before anything was seen; all of these are our choice
)
WEIGHT = 0.15  # of each further token in the exponential average
PAUSE, LONGEST_PAUSE = (
    8,
    128,
)  # passes without a draft before one is tried again: at first, and when trying keeps failing


@dataclass
class Counts:
    """What a run did: tokens made, passes (the prompt's not counted), tokens drafted and accepted."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def accept_rate(self) -> float:
        """Accepted over drafted; NaN if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class DraftLength:
    """How many tokens to draft next: what brings the most tokens for the time, by the acceptance seen so far.

    If a token is accepted with probability a, independently, a draft of k brings 1 + a + ... + a^k tokens for 1 + k `more` of a pass.
    a is an exponential average over the tokens that were decided about, so the best k may be 0: plain decoding. Then a single token is
    drafted after 8 passes, after 16 if it was wrong again, and so on up to 128; when it was right the pause is 8 again. All of this is
    our choice; it changes the time that is taken, never the distribution of the tokens.

    >>> length = DraftLength(8, more=0.1)
    >>> length.next()
    2
    >>> for _ in range(20):
    ...     length.seen(4, 4)
    >>> length.next()
    8
    """

    def __init__(self, most: int, *, more: float) -> None:
        self.most = checks.whole("most", most, low=0)
        self.more = checks.number("more", more, low=0)
        self.rate = START
        self._waited, self._pause = 0, PAUSE

    def next(self) -> int:
        """The length of the next draft. Asked once a pass."""
        best = max(range(self.most + 1), key=self._gain)
        if best or not self.most:
            return best
        self._waited += 1
        return int(self._waited > self._pause)

    def seen(self, drafted: int, accepted: int) -> None:
        """Take in what became of a draft; one of no tokens says nothing."""
        if not drafted:
            return
        for hit in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.rate += WEIGHT * (hit - self.rate)
        if self._waited:
            self._waited = 0
            self._pause = PAUSE if accepted else min(2 * self._pause, LONGEST_PAUSE)

    def _gain(self, count: int) -> float:
        return sum(self.rate**place for place in range(count + 1)) / (1 + count * self.more)


def speculate(
    engine: Engine,
    logits: Tensor,
    drafter: Drafter,
    new_tokens: int,
    *,
    most: int = 8,
    sampling: Sampling | None = None,
    ends: Sequence[int] = (),
    no_end: int = 0,
    put: Callable[[int], None] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    counts: Counts | None = None,
) -> list[int]:
    """Up to `new_tokens` tokens after the sequence that `engine` holds and `drafter` knows; `logits` (vocabulary,) are those after it.

    Drafts have up to `most` tokens. Greedy without `sampling`. A token in `ends` is the last one; among the first `no_end` tokens
    there is none. For each token in turn, `stop(tokens so far)` is asked, which ends the answer by True, then `put(token)` is called;
    tokens that were made beyond the end are dropped. Afterwards the engine holds all but the last token. Random numbers come from torch's
    generator, one for each token, in order: a drafter that draws nothing itself leaves the answer what it is without drafts.
    Raises ValueError or TypeError for what `verify` does, and for new_tokens < 1.
    """
    new_tokens = checks.whole("new_tokens", new_tokens, low=1)
    counts = Counts() if counts is None else counts
    length = DraftLength(most, more=engine.more + drafter.cost)
    final, forbidden = set(ends), list(ends)
    made: list[int] = []
    unused = torch.empty(0, dtype=torch.float64)

    def decide(scores: Tensor, draft: list[int], q: Tensor | None) -> list[int]:
        nonlocal unused
        if forbidden and len(made) < no_end:
            scores[: no_end - len(made), forbidden] = -torch.inf
        if sampling is None:
            return verify(scores, draft, q, None, None)
        fresh = len(scores) - len(unused)
        if fresh > 0:
            unused = torch.cat([unused, torch.rand(fresh, dtype=torch.float64)])
        found = verify(scores, draft, q, sampling, unused[: len(scores)])
        unused = unused[len(found) :]
        return found

    def take(found: list[int]) -> tuple[int, bool]:
        """Hand the tokens on one by one; how many belong to the answer, and whether it is over."""
        for number, token in enumerate(found, 1):
            made.append(token)
            stopped = stop is not None and stop(made)  # asked for every token, even one that ends the answer anyway
            if put is not None:
                put(token)
            if stopped or token in final or len(made) == new_tokens:
                return number, True
        return len(found), False

    kept, over = take(decide(logits[None].to(torch.float32, copy=True), [], None))
    while not over:
        drafter.add(made[-kept:])
        wanted = min(length.next(), new_tokens - len(made) - 1)
        draft, q = drafter.draft(wanted, sampling) if wanted > 0 else ([], None)
        if end := next((place + 1 for place, token in enumerate(draft) if token in final), 0):
            draft, q = draft[:end], None if q is None else q[:end]  # nothing follows an end
        before = engine.length
        found = decide(engine.extend([made[-1], *draft]), draft, q)
        engine.crop(before + len(found))  # before anything is handed on: whoever gets a token may raise
        counts.passes += 1
        counts.drafted += len(draft)
        counts.accepted += len(found) - 1
        length.seen(len(draft), len(found) - 1)
        kept, over = take(found)
        if kept < len(found):
            engine.crop(before + kept)
    counts.tokens += len(made)
    return made
