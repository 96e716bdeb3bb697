"""A scheduler with the interface of `assay.server.scheduler`, small enough to be seen through: one thread, a row at a time.

Every row takes its turn and gets one token by the model's own forward pass over its own cache, so that an answer does not depend
on what runs beside it. Settings are honoured as the real scheduler honours them. Nothing here is fast.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from assay.server.scheduler import Stopped


@dataclass(frozen=True)
class Settings:
    max_tokens: int
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    choose: Callable[[Tensor, list[int]], int] | None = None


@dataclass(frozen=True)
class TokenInfo:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    tokens: tuple[int, ...] = ()
    infos: tuple[TokenInfo, ...] = ()
    prompt_infos: tuple[TokenInfo | None, ...] | None = None
    finish: str | None = None
    error: Exception | None = None
    cached_tokens: int = 0


@dataclass
class Stats:
    waiting: int = 0
    running: int = 0
    kv_used: int = 0
    kv_total: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    close_choices: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)


class Ticket:
    def __init__(self, row: Row) -> None:
        self._row = row

    def cancel(self) -> None:
        self._row.cancelled = True


class Row:
    def __init__(self, ids: list[int], settings: Settings, tell: Callable[[Event], None]) -> None:
        self.ids, self.settings, self.tell = ids, settings, tell
        self.made: list[int] = []
        self.cache: Any = None
        self.cancelled = self.over = False
        self.random = torch.Generator().manual_seed(settings.seed)

    def over_with(self, event: Event) -> None:
        self.over, self.cache = True, None
        self.tell(event)


def backend_for(model: Any, tokenizer: Any, *, kv_gib: float = 1.0) -> Any:
    return SimpleNamespace(model=model, name="stand-in", reason="for tests")


class Scheduler:
    def __init__(self, backend: Any, *, max_running: int = 64, prefill_chunk: int = 256) -> None:
        self.backend, self.max_running = backend, max_running
        self._rows: list[Row] = []
        self._changed = threading.Condition()
        self._stopped = self._draining = False
        self._counts: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stand-in-scheduler")
        self._thread.start()

    def submit(self, ids: list[int], settings: Settings, on_event: Callable[[Event], None]) -> Ticket:
        row = Row(list(ids), settings, on_event)
        with self._changed:
            if self._stopped or self._draining:
                raise Stopped("the scheduler has stopped")
            self._rows.append(row)
            self._counts["prompt_tokens"] += len(ids)
            self._changed.notify()
        return Ticket(row)

    def stop(self, *, drain_s: float) -> None:
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._rows, drain_s)
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(20)

    def stats(self) -> Stats:
        with self._changed:
            rows = [row for row in self._rows if not row.cancelled]
            running = rows[: self.max_running]
            return Stats(
                waiting=len(rows) - len(running),
                running=len(running),
                kv_used=sum(len(row.ids) + len(row.made) for row in running),
                kv_total=1 << 20,
                batch_sizes=dict(self._sizes),
                **self._counts,
            )

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._rows = [row for row in self._rows if not (row.cancelled or row.over)]
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._rows or self._stopped)
                if self._stopped:
                    return
                rows = self._rows[: self.max_running]
                self._sizes[len(rows)] += 1
                self._counts["steps"] += 1
            for row in rows:
                if not (row.cancelled or self._stopped):
                    self._step(row)

    @torch.inference_mode()
    def _step(self, row: Row) -> None:
        try:
            event = self._next(row)
        except Exception as error:
            row.over_with(Event(error=error))
            return
        self._counts["generated_tokens"] += len(event.tokens)
        if event.finish:
            row.over_with(event)
        else:
            row.tell(event)

    def _next(self, row: Row) -> Event:
        from transformers.cache_utils import DynamicCache

        model, settings = self.backend.model, row.settings
        first = row.cache is None
        if first:
            row.cache = DynamicCache(config=model.config)
        fed = torch.tensor([row.ids if first else row.made[-1:]])
        logits = model(input_ids=fed, cache=row.cache, use_cache=True).logits[0].float()
        own = logits[-1].log_softmax(-1)
        before = None
        if first and settings.prompt_logprobs:
            shares = logits[:-1].log_softmax(-1)
            told = [_info(one, token, settings) for one, token in zip(shares, row.ids[1:], strict=True)]
            before = (None, *told)
        if not settings.max_tokens:
            return Event(prompt_infos=before, finish="length")
        token = self._choose(logits[-1].clone(), row)
        row.made.append(token)
        over = "stop" if token in settings.ends else "length" if len(row.made) >= settings.max_tokens else None
        infos = () if settings.logprobs is None else (_info(own, token, settings),)
        return Event(tokens=(token,), infos=infos, prompt_infos=before, finish=over)

    def _choose(self, logits: Tensor, row: Row) -> int:
        settings = row.settings
        for token, bias in settings.logit_bias.items():
            logits[token] += bias
        for token, count in Counter(row.made).items():
            logits[token] -= settings.presence_penalty + settings.frequency_penalty * count
        if len(row.made) < settings.min_tokens:
            logits[list(settings.ends)] = -torch.inf
        if settings.choose is not None:
            return settings.choose(logits, list(row.made))
        if settings.temperature == 0:
            return int(logits.argmax())
        shares = (logits.double() / settings.temperature).softmax(-1)
        order = shares.sort(descending=True, stable=True)
        kept = order.values.cumsum(0) - order.values < settings.top_p
        if settings.top_k:
            kept[settings.top_k :] = False
        kept[0] = True
        return int(order.indices[kept][torch.multinomial(order.values[kept], 1, generator=row.random)])


def _info(shares: Tensor, token: int, settings: Settings) -> TokenInfo:
    best = shares.topk(settings.logprobs or 0)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenInfo(token, float(shares[token]), top)
