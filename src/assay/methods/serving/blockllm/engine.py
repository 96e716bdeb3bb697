"""Answers of several models made together: rows come and go between steps, and a step is one pass over all of them.

    engine = Engine(SharedModel(zoo))
    answers = engine.generate([("sql", ids), ("german", others)], new_tokens=32)

`assay serve --share-blocks` does the same behind the OpenAI API. When NOT to use it: for one model alone, where the compiled decode loop is
faster; this runs transformers' own forward pass.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from assay import checks
from assay.methods.core.generation.cache import left_padded_mask
from assay.methods.core.generation.slices import split, stacked
from assay.methods.serving.blockllm.shared import SharedModel


@dataclass(eq=False)
class Answer:
    """A prompt of one model's, and the tokens made so far. `first` and `end` are when its first and last token came (`perf_counter`).

    `error` says why it ended before its time.
    """

    tenant: str
    ids: list[int]
    new_tokens: int
    ends: frozenset[int] = frozenset()
    made: list[int] = field(default_factory=list)
    cache: Any = None  # until it joins the batch
    logits: Tensor | None = None  # (vocab,) float32, of its next token
    first: float = 0.0
    end: float = 0.0
    error: str = ""

    @property
    def length(self) -> int:
        """Tokens in its cache: all but the last that was made."""
        return len(self.ids) + max(0, len(self.made) - 1)

    @property
    def finished(self) -> bool:
        return bool(self.error) or len(self.made) >= self.new_tokens or bool(self.made and self.made[-1] in self.ends)


class Pass(NamedTuple):
    """What was run: whose rows, how many tokens, how many cached tokens they saw together, and how long it took."""

    tenants: tuple[str, ...]
    tokens: int
    seen: int
    seconds: float


class Batch:
    """Rows over one left-padded cache. `model` is a SharedModel, or a transformers model that serves whoever asks."""

    def __init__(self, model: Any) -> None:
        self.shared = model if isinstance(model, SharedModel) else None
        self.model: Any = model.model if isinstance(model, SharedModel) else model
        self.members: list[Answer] = []
        self._cache: Any = None

    def _use(self, rows: Sequence[Answer]) -> None:
        if self.shared is not None:
            self.shared.use([row.tenant for row in rows])

    @torch.inference_mode()
    def prefill(self, row: Answer) -> Tensor:
        """Run a row's prompt, alone: the logits (vocab,) float32 of its next token."""
        self._use([row])
        row.cache = DynamicCache()
        out = self.model(input_ids=torch.tensor([row.ids]), cache=row.cache, use_cache=True, logits_to_keep=1)
        if not row.cache.get_seq_length() == len(row.ids):
            raise ValueError(
                f"model must keep keys and values in a DynamicCache, which {type(self.model).__name__} does not"
            )
        row.logits = out.logits[0, -1].float()
        return row.logits

    @torch.inference_mode()
    def advance(self, rows: Sequence[Answer], tokens: Sequence[int]) -> Tensor:
        """Feed each row a token, all in one pass: logits (rows, vocab) float32. `made` is the caller's to extend, once a call."""
        self._assemble(rows)
        lengths = [len(row.ids) + len(row.made) - 1 for row in rows]
        mask = None if len(set(lengths)) == 1 else left_padded_mask([length + 1 for length in lengths])
        self._use(rows)
        out = self.model(
            input_ids=torch.tensor(tokens)[:, None],
            attention_mask=mask,
            position_ids=torch.tensor(lengths)[:, None],
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _assemble(self, rows: Sequence[Answer]) -> None:
        """Make the batch one of exactly these rows, in this order; those that leave lose their cache."""
        if len(rows) == len(self.members) and all(a is b for a, b in zip(rows, self.members, strict=True)):
            return
        if self.members:
            kept = split(self._cache, [len(row.ids) + len(row.made) - 1 for row in self.members])
            for row, cache in zip(self.members, kept, strict=True):
                row.cache = cache
        caches = [row.cache for row in rows]
        self._cache = caches[0] if len(caches) == 1 else stacked(caches).cache
        for row in (*self.members, *rows):
            row.cache = None
        self.members = list(rows)


class Engine:
    """Continuous batching over a `SharedModel`, greedy: `submit`, then `step` until nothing is `busy`.

    A step runs at most one waiting prompt, alone, then one token of every row under way, in one pass. At most `most` rows are under way.
    `passes` notes what was run. Who comes first is let in first, whatever model it is for. A row whose logits are not finite ends with an
    `error`, and the others go on.
    """

    def __init__(self, model: Any, *, most: int = 32) -> None:
        self.batch = Batch(model)
        self.most = checks.whole("most", most, low=1)
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.passes: list[Pass] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, tenant: str, ids: Sequence[int], new_tokens: int, *, ends: Sequence[int] = ()) -> Answer:
        """Queue a prompt for a model. Raises ValueError for a model that is not here, an empty prompt, no token to make, and a prompt and
        answer that exceed the model's positions."""
        if self.batch.shared is not None:
            self.batch.shared.number(tenant)
        if not ids:
            raise ValueError("ids must hold at least one token, got none")
        config = self.batch.model.config.get_text_config()
        plain = [checks.whole("ids", token, low=0, high=config.vocab_size - 1) for token in ids]
        row = Answer(tenant, plain, checks.whole("new_tokens", new_tokens, low=1), frozenset(ends))
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and len(plain) + row.new_tokens > positions:
            raise ValueError(
                f"ids and new_tokens must fit {positions} positions, got {len(plain)} and {row.new_tokens}"
            )
        self.waiting.append(row)
        return row

    def step(self) -> list[Answer]:
        """One step; the answers that ended in it. Where it raises, the rows under way are given up, and those that wait stay."""
        try:
            return self._step()
        except BaseException:
            self.running, self.batch = [], Batch(self.batch.shared or self.batch.model)
            raise

    def _step(self) -> list[Answer]:
        done: list[Answer] = []
        if self.waiting and len(self.running) < self.most:
            row = self.waiting.popleft()
            began = time.perf_counter()
            self._take([row], self.batch.prefill(row)[None])
            row.first = time.perf_counter()
            self.passes.append(Pass((row.tenant,), len(row.ids), 0, row.first - began))
            self._ended(row, done) if row.finished else self.running.append(row)
        if self.running:
            shared = self.batch.shared
            if shared is not None:
                self.running.sort(key=lambda row: shared.number(row.tenant))  # rows of one chain lie side by side
            rows = list(self.running)
            seen = sum(row.length for row in rows)
            began = time.perf_counter()
            self._take(rows, self.batch.advance(rows, [row.made[-1] for row in rows]))
            self.passes.append(Pass(tuple(row.tenant for row in rows), len(rows), seen, time.perf_counter() - began))
            for row in rows:
                if row.finished:
                    self._ended(row, done)
            self.running = [row for row in rows if not row.finished]
        return done

    def _take(self, rows: Sequence[Answer], logits: Tensor) -> None:
        best = logits.max(-1)
        for row, value, token in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            if math.isfinite(value):
                row.made.append(token)
            else:
                row.error = "its logits are not finite"

    def _ended(self, row: Answer, done: list[Answer]) -> None:
        row.end, row.logits = time.perf_counter(), None
        done.append(row)

    def generate(
        self, prompts: Sequence[tuple[str, Sequence[int]]], new_tokens: int, *, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy answers to prompts of several models, (name, token ids) each, in their order.

        Raises as `submit`, before anything runs, and FloatingPointError where logits are not finite, when the other answers have ended.
        """
        if self.busy:
            raise ValueError("generate must be called while nothing else is under way")
        try:
            rows = [self.submit(tenant, ids, new_tokens, ends=ends) for tenant, ids in prompts]
        except (TypeError, ValueError):
            self.waiting.clear()
            raise
        while self.busy:
            self.step()
        if failed := [row for row in rows if row.error]:
            raise FloatingPointError(f"{failed[0].tenant!r} cannot answer: {failed[0].error}")
        return [row.made for row in rows]
