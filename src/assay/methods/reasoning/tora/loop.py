"""The loop on a local model that keeps its cache: a row that calls the tool waits, and reads the output alone when it comes.

While programs run the other rows go on. A row that comes back reads the tokens of its output behind the keys and values that it had, and
joins those that are being written once as many have come back: to join copies the caches of all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.generation.cache import left_pad, left_padded_mask, position_ids
from assay.methods.core.generation.loop import padding_token, prefill, why_not
from assay.methods.core.generation.slices import layers_of, selected, split, stacked, tensors_of
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Growing, Sample, Sampling, choose, end_tokens, seed_of
from assay.methods.reasoning.tora.restart import CALLS
from assay.methods.reasoning.tora.text import OUTPUT, output_block, waiting
from assay.methods.reasoning.tora.tools import Output, Tool
from assay.methods.reasoning.tora.trajectory import Ended, Trajectory, checked_calls


@dataclass
class _Row:
    """A trajectory as it grows: its tokens, how many of them lie in `cache`, and what it has written."""

    prompt: str
    number: int
    ids: list[int]
    cache: Any = None  # of one row, without padding
    cached: int = 0
    logits: Tensor | None = None
    stream: Any = None
    growing: Any = None
    context: int = 0  # tokens of what the segment continues
    read_before: int = 0  # of them, those that were there already
    seconds: float = 0.0
    segments: list[Sample] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    ended: Ended = "stop"

    @property
    def text(self) -> str:
        return Trajectory(self.prompt, tuple(self.segments), tuple(self.outputs)).text

    def finished(self) -> Trajectory:
        return Trajectory(self.prompt, tuple(self.segments), tuple(self.outputs), self.ended)


class ToolLoop:
    """Trajectories of a causal model of transformers and its tokenizer, in groups of `batch` rows, `workers` programs at once.

    The tokens that a row has are kept as they are, and those of an output are encoded by themselves and appended: nothing is encoded
    again. Samples have the streams that `TransformersGenerator` gives them, so that `with_tools` writes the same, up to rounding and
    where the text encodes to the tokens that were written. `reuse` False reads the whole row again after each output: the
    baseline, equal token for token. Prompts that begin alike (with the same examples) have that part read once.

    Raises ValueError for a model that does not continue prompts, an empty prompt, and one that does not fit into the context with its new
    tokens; TypeError, at the first call, for a model whose cache is not one of keys and values token by token.

    When NOT to use it: with a server, which keeps prefixes itself (`with_tools`); for a model with a recurrent state.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch: int = 64,
        workers: int = 2,
        reuse: bool = True,
        special: bool = True,
    ) -> None:
        if reason := why_not(model):
            raise ValueError(f"model must continue prompts: {reason}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.batch = checks.whole("batch", batch, low=1)
        self.workers = checks.whole("workers", workers, low=1)
        self.reuse = checks.flag("reuse", reuse)
        self.special = checks.flag("special", special)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        tool: Tool,
        *,
        calls: int = CALLS,
        n: int = 1,
        first: int = 0,
        seed: int = 0,
    ) -> list[list[Trajectory]]:
        """As `with_tools` has it. What an output leaves no room for in the context is not written: that row ends with "context"."""
        calls, n = checked_calls(calls), checks.whole("n", n, low=1)
        first, seed = checks.whole("first", first, low=0), checks.whole("seed", seed)
        asked = replace(sampling, stop=(*sampling.stop, OUTPUT)) if calls and OUTPUT not in sampling.stop else sampling
        rows = [
            _Row(prompt, number, self._encode(prompt, asked))
            for prompt in prompts
            for number in range(first, first + n)
        ]
        for start in range(0, len(rows), self.batch):
            self._run(rows[start : start + self.batch], asked, tool, calls, seed)
        done = [row.finished() for row in rows]
        return [done[at : at + n] for at in range(0, len(done), n)]

    # ------------------------------------------------------------------------------------------------------------- the loop

    def _run(self, rows: list[_Row], sampling: Sampling, tool: Tool, calls: int, seed: int) -> None:
        self._read_prompts(rows)
        batch = _Batch(self.model)
        running: dict[Future[Output], _Row] = {}
        joining = rows
        with ThreadPoolExecutor(self.workers) as pool:
            while joining or running or batch.rows:
                if running and not joining and not batch.rows:
                    wait(running, return_when=FIRST_COMPLETED)
                back = [running.pop(future) for future in list(running) if self._came(future, running[future], calls)]
                joining += [row for row in back if row.ended == "stop" and self._fits(row, sampling)]
                if len(joining) >= len(batch.rows):  # joining copies the caches of all rows, so few wait for more
                    self._read([row for row in joining if row.logits is None])
                    for row in joining:
                        row.growing = Growing(self.tokenizer, sampling.stop)
                        row.stream = torch.Generator().manual_seed(seed_of(seed, row.prompt + row.text, row.number))
                    batch.add(joining)
                    joining = []
                if not batch.rows:
                    continue
                for row in batch.step(sampling, end_tokens(self.model)):
                    if (program := self._paused(row, calls)) is not None:
                        running[pool.submit(tool, program)] = row

    def _paused(self, row: _Row, calls: int) -> str | None:
        """Close the segment of a row, and give the program that it waits for, if any."""
        growing = row.growing
        spent = Spent(row.context, len(growing.tokens), row.read_before, 1, row.seconds)
        row.seconds = 0.0
        row.segments.append(
            Sample(growing.text, tuple(growing.tokens), tuple(growing.logprobs), growing.ended, spent, growing.matched)
        )
        row.ended = "length" if growing.ended == "length" else "stop"
        program = waiting(row.text) if calls and row.ended == "stop" else None
        if program is None:
            row.cache = row.logits = None
        return program

    def _came(self, future: Future[Output], row: _Row, calls: int) -> bool:
        """Whether an output is there; it is appended to its row."""
        if not future.done():
            return False
        segment = row.segments[-1]
        before = row.text
        row.outputs.append(future.result())
        if len(row.outputs) == calls:
            row.ended, row.cache = "calls", None
            return True
        own_line = segment.matched == OUTPUT and (not before or before.endswith("\n"))
        matched = OUTPUT if own_line else ""  # elsewhere it opens no block, and is left out as in the text
        whole = segment.text + matched
        kept = list(segment.tokens)
        if self.tokenizer.decode(kept) != whole:  # the last token reaches beyond what counts: it was not run yet
            kept = kept[:-1]
        said = self.tokenizer.decode(kept)
        if not whole.startswith(said):  # a letter was torn: read all of it again
            kept, said, row.cache, row.cached = [], "", None, 0
        tail = whole[len(said) :] + output_block(before + matched, row.outputs[-1].shown)
        row.ids += kept + list(self.tokenizer(tail, add_special_tokens=False)["input_ids"])
        return True

    def _fits(self, row: _Row, sampling: Sampling) -> bool:
        context = self._context()
        if context is not None and len(row.ids) + sampling.max_new_tokens > context:
            row.ended, row.cache = "context", None
            return False
        return True

    def _context(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _encode(self, prompt: str, sampling: Sampling) -> list[int]:
        ids: list[int] = list(self.tokenizer(prompt, add_special_tokens=self.special)["input_ids"])
        if not ids:
            raise ValueError(f"prompts must hold at least one token each, got {checks.shown(prompt)}")
        context = self._context()
        if context is not None and len(ids) + sampling.max_new_tokens > context:
            raise ValueError(
                f"prompts must fit into {context} tokens with {sampling.max_new_tokens} new ones, got {len(ids)} in "
                f"{checks.shown(prompt)}"
            )
        return ids

    # -------------------------------------------------------------------------------------------------------------- reading

    def _read_prompts(self, rows: list[_Row]) -> None:
        """Read each different prompt once, and what all of them begin with once for all."""
        different: dict[tuple[int, ...], list[_Row]] = {}
        for row in rows:
            different.setdefault(tuple(row.ids), []).append(row)
        ones = [group[0] for group in different.values()]
        common = _common([row.ids for row in ones]) if len(ones) > 1 else 0
        began = time.perf_counter()
        if common:
            ids = torch.tensor([ones[0].ids[:common]], device=self.model.device)
            cache = prefill(self.model, ids, torch.ones_like(ids)).cache
            for row in ones:
                row.cache, row.cached = cache, common
        self._read(ones, restart=False)
        ones[0].read_before = 0
        seconds = (time.perf_counter() - began) / len(rows)
        for group in different.values():
            for row in group:
                row.seconds = seconds
                if row is not group[0]:
                    row.cache, row.cached, row.logits = group[0].cache, group[0].cached, group[0].logits
                    row.context = row.read_before = len(row.ids)

    def _read(self, rows: list[_Row], *, restart: bool | None = None) -> None:
        """Run what the caches of these rows lack, and keep the logits of their last tokens."""
        if not rows:
            return
        began = time.perf_counter()
        if (not self.reuse) if restart is None else restart:
            for row in rows:
                row.cache, row.cached = None, 0
        for row in rows:
            row.context, row.read_before = len(row.ids), row.cached
        if fresh := [row for row in rows if row.cache is None]:
            ids, mask = left_pad([row.ids for row in fresh], padding_token(self.model), self.model.device)
            read = prefill(self.model, ids, mask)
            assert read.logits is not None
            for index, layer in enumerate(layers_of(read.cache)):
                tensors_of(layer, index)  # raises for a cache that cannot be taken apart
            for row, cache, logits in zip(fresh, split(read.cache, read.lengths), read.logits, strict=True):
                row.cache, row.cached, row.logits = cache, len(row.ids), logits
        self._extend([row for row in rows if row.cached < len(row.ids)])
        for row in rows:
            row.seconds += (time.perf_counter() - began) / len(rows)

    def _extend(self, rows: list[_Row]) -> None:
        """Read behind caches. Rows go together as far as the shortest of them reaches, so that no padding comes between their tokens."""
        while rows:
            width = min(len(row.ids) - row.cached for row in rows)
            ids = torch.tensor([row.ids[row.cached : row.cached + width] for row in rows], device=self.model.device)
            mask = left_padded_mask([row.cached + width for row in rows], self.model.device)
            cache = rows[0].cache if len(rows) == 1 else stacked([row.cache for row in rows]).cache
            if len(rows) == 1:
                cache = selected(cache, [0])  # it may be shared
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(mask)[:, -width:],
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            parts = split(out.cache, [row.cached + width for row in rows])
            for row, part, logits in zip(rows, parts, out.logits[:, -1], strict=True):
                row.cache, row.cached, row.logits = part, row.cached + width, logits
            rows = [row for row in rows if row.cached < len(row.ids)]


class _Batch:
    """The rows that are being written, in one left-padded cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[_Row] = []
        self.cache: Any = None
        self.logits: Any = None

    def add(self, rows: list[_Row]) -> None:
        """Take rows in that have been read."""
        if not rows:
            return
        own = split(self.cache, [row.cached for row in self.rows]) if self.rows else []
        self.cache = stacked([*own, *(row.cache for row in rows)]).cache
        logits = [row.logits.float() for row in rows if row.logits is not None]
        self.logits = torch.stack([*self.logits, *logits] if self.rows else logits)
        self.rows = [*self.rows, *rows]
        for row in rows:
            row.cache = row.logits = None

    def step(self, sampling: Sampling, ends: set[int]) -> list[_Row]:
        """Write one token a row. Rows whose segment ended leave, with their own cache, and are returned."""
        began = time.perf_counter()
        tokens = choose(self.logits, sampling, [row.stream for row in self.rows])
        scored = self.logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        for row, token, value in zip(self.rows, tokens.tolist(), scored, strict=True):
            row.growing.add(token, value, ends, sampling.max_new_tokens)
        writing = self.rows
        over = [place for place, row in enumerate(writing) if row.growing.ended]
        kept = [place for place, row in enumerate(writing) if not row.growing.ended]
        for place in over:
            row = writing[place]
            (row.cache,) = split(selected(self.cache, [place]), [row.cached])
        if over and kept:
            self.cache = selected(self.cache, kept)
        self.rows = [writing[place] for place in kept]
        if kept:
            width = self.cache.get_seq_length() + 1  # more than any row has, where the longest has left
            lengths = torch.tensor([[row.cached + 1] for row in self.rows])
            mask = (torch.arange(width - 1, -1, -1) < lengths).long().to(tokens.device)
            out = self.model(
                input_ids=tokens[kept][:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                cache=self.cache,
                use_cache=True,
            )
            self.cache, self.logits = out.cache, out.logits[:, -1].float()
        for row in self.rows:
            row.cached += 1
        for row in writing:
            row.seconds += (time.perf_counter() - began) / len(writing)
        return [writing[place] for place in over]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, less one of the shortest: each has something left to read."""
    most = min(map(len, rows)) - 1
    return next((at for at in range(most) if len({row[at] for row in rows}) > 1), most)
