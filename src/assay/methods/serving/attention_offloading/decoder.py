"""Decoding with the attention elsewhere: a model's slices here, keys and values in a pool of memory devices.

    decoder = SplitDecoder(model, pool)
    batch = decoder.open(input_ids, attention_mask)      # runs the prompt here and hands its keys and values over, layer by layer
    tokens = decoder.generate([batch], 32)[0]            # several batches are under way in turn: one here while others' attention runs

This side keeps weights and the tokens so far, and no cache. When a memory device is lost, `restore` computes what it held from the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.serving.attention_offloading.pool import LocalPool, Pool
from assay.methods.serving.attention_offloading.slicing import Part, Slice, Sliced, sliced, trace
from assay.methods.serving.attention_offloading.timeline import Timeline

PROBE = 4  # tokens
CLOSED = -1  # the slot of a batch that was closed
KINDS = {"full_attention", "sliding_attention"}


@dataclass(eq=False)
class Batch:
    """Rows that are decoded together: `tokens` (rows, columns) that have been run, padded on the left, `starts` the first of each row.

    `logits` (rows, vocabulary) are those of the newest token.
    """

    pool: Pool
    slot: int
    tokens: Tensor
    starts: Tensor
    logits: Tensor

    @property
    def rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        """Columns in the cache, padding included."""
        return int(self.tokens.shape[1])


class SplitDecoder:
    """`model`, a decoder of transformers in eval mode, with its attention in `pool`; see the module.

    `overlap` lets attention begin at the earlier tokens when the query is there; without it, query, key and value are sent together.
    `timeline`, when set, takes what happens here (lanes "model" and "wait") and in the pool.
    The model is run on a few tokens both ways: what does not give the same is refused, and so are soft caps, sinks and chunks, with
    ValueError. Weights that change in place take effect at once; where parameters were exchanged, or have another dtype, the slices are
    made anew. What open batches hold stays as it was: after `model.bfloat16()` `restore` them.
    """

    def __init__(self, model: nn.Module, pool: Pool, *, overlap: bool = True) -> None:
        # here: workers import this package, and need none of it
        from assay.methods.core.attention.integration import windows

        given: Any = model
        self.model = given
        self.pool, self.overlap = pool, checks.flag("overlap", overlap)
        self.timeline: Timeline | None = None
        if why := why_not(model):
            raise ValueError(f"model must be a decoder whose attention can be offloaded: {why}")
        config = self.model.config.get_text_config()
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads
        self._windows = [window or 0 for window in windows(model)]
        self._sliced: dict[int, Sliced] = {}
        self._parameters: list[tuple[Tensor, torch.dtype]] = []
        self._check()

    # ------------------------------------------------------------------------------------------------------------- batches

    @torch.no_grad()
    def open(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, tokens: int = 0) -> Batch:
        """Run prompts, int64 (rows, tokens), padded on the left where the mask is 0, and hand their keys and values over.

        `tokens` is how many columns there will be in the end, if that is known: memory devices then make room once. Raises ValueError
        when the pool has no free slot, for padding elsewhere than on the left, and for a row without a token.
        """
        ids, starts = _prompts(input_ids, attention_mask)
        batch = Batch(self.pool, self.pool.free_slot(), ids, starts, torch.empty(0))
        self._slices(batch.rows)
        self._fill(batch, tokens)
        return batch

    def adopt(
        self,
        cache: Any,
        input_ids: Tensor,
        logits: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tokens: int = 0,
    ) -> Batch:
        """Go on from a prompt that was run elsewhere: its cache (transformers' own, which stays as it is), its tokens, and the logits of
        the last, (rows, vocabulary). Raises as `open`, and ValueError for a cache of other sizes.
        """
        ids, starts = _prompts(input_ids, attention_mask)
        checks.tensor("logits", logits, shape=(ids.shape[0], "vocabulary"))
        batch = Batch(self.pool, self.pool.free_slot(), ids, starts, logits)
        self._hand_over(batch, cache, tokens, free=False)
        return batch

    def close(self, batch: Batch) -> None:
        """Forget a batch's keys and values. It cannot be decoded any more, but `restore` opens it again."""
        batch.pool.close_batch(batch.slot)
        batch.slot = CLOSED  # its slot may be another's next

    @torch.no_grad()
    def restore(self, batch: Batch, pool: Pool | None = None) -> None:
        """Compute keys and values of all tokens so far again, after a memory device was lost, and go on in `pool` (None: the one we have).

        Nothing but the tokens is needed for that. Raises ValueError when the pool has no free slot.
        """
        if pool is not None:
            self.pool = pool
        if batch.pool is self.pool:
            self.pool.close_batch(batch.slot)
        batch.pool, batch.slot = self.pool, self.pool.free_slot()
        self._fill(batch, batch.length)

    def rewind(self, batch: Batch, tokens: int) -> None:
        """Forget the last tokens of a batch; its `logits` are then those of none. Each row keeps its first token.

        Raises ValueError for more than that, and where a window has let tokens go.
        """
        tokens = checks.whole("tokens", tokens, low=0, high=batch.length - 1 - int(batch.starts.max()))
        batch.pool.rewind(batch.slot, tokens)
        batch.tokens = batch.tokens[:, : batch.length - tokens]

    def _fill(self, batch: Batch, tokens: int) -> None:
        """Run all tokens of a batch and hand over what comes of them, which is freed here layer by layer."""
        from transformers.cache_utils import DynamicCache

        from assay.methods.core.generation.cache import position_ids

        cache = DynamicCache(config=self.model.config)
        options: dict[str, Any] = {}
        if bool((batch.starts > 0).any()):
            mask = (torch.arange(batch.length) >= batch.starts[:, None]).long()
            options = {"attention_mask": mask, "position_ids": position_ids(mask)}
        out = self.model(input_ids=batch.tokens, cache=cache, use_cache=True, logits_to_keep=1, **options)
        batch.logits = out.logits[:, -1]
        self._hand_over(batch, cache, tokens, free=True)

    def _hand_over(self, batch: Batch, cache: Any, tokens: int, *, free: bool) -> None:
        from assay.methods.core.generation.cache import keys_and_values

        layers, wanted = keys_and_values(cache), (batch.rows, self._kv_heads)
        sizes = [(tuple(keys.shape[:2]), keys.shape[2]) for keys, _ in layers]
        fits = len(layers) == len(self._windows) and all(
            of == wanted and (length == batch.length if not window else length <= batch.length)
            for (of, length), window in zip(sizes, self._windows, strict=True)
        )
        if not fits:
            raise ValueError(
                f"cache must have {len(self._windows)} layers of keys and values of {wanted[0]} rows, {wanted[1]} heads and "
                f"{batch.length} tokens, got {len(layers)}, the first of {sizes[:1]}"
            )
        batch.pool.open(
            batch.slot,
            heads=self._heads,
            kv_heads=self._kv_heads,
            starts=batch.starts.tolist(),
            windows=self._windows,
            tokens=max(tokens, batch.length),
        )
        try:
            while layers:
                number = len(self._windows) - len(layers)
                keys, values = layers.pop(0)
                batch.pool.fill(batch.slot, number, keys, values, dropped=batch.length - keys.shape[2])
                if free:
                    cache.layers[number].reset()
        except BaseException:
            batch.pool.close_batch(batch.slot)
            raise

    # --------------------------------------------------------------------------------------------------------------- steps

    def step(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Run a token of each row, int64 (rows,): the logits of the next one, (rows, vocabulary)."""
        return self.step_together([batch], [tokens])[0]

    def step_together(self, batches: Sequence[Batch], tokens: Sequence[Tensor]) -> list[Tensor]:
        """A step of several batches in turn: while one's attention is under way the others' slices run. Their logits, in order.

        Raises ValueError unless there is one tensor of tokens a batch, for a token outside the vocabulary, and for a batch that is closed
        or given twice; no batch has then gone on.
        """
        if len(batches) != len(tokens):
            raise ValueError(f"tokens must be given for each of the {len(batches)} batches, got {len(tokens)}")
        self._ready(batches)
        known = self.model.get_input_embeddings().weight.shape[0]
        for batch, ids in zip(batches, tokens, strict=True):
            checks.tensor("tokens", ids, shape=(batch.rows,), dtype="integer")
            if not bool(((ids >= 0) & (ids < known)).all()):
                raise ValueError(f"tokens must be at least 0 and below the vocabulary's {known}, got {ids.tolist()}")
        _in_turn([self._advance(batch, ids) for batch, ids in zip(batches, tokens, strict=True)])
        return [batch.logits for batch in batches]

    def generate(self, batches: Sequence[Batch], new_tokens: int) -> list[Tensor]:
        """The `new_tokens` most likely tokens of each row, int64 (rows, new_tokens) a batch; batches run in turn.

        The last one has been chosen and not been run, as in transformers. End tokens are not looked for. Raises ValueError for a batch that
        is closed or given twice, before anything runs.
        """
        count = checks.whole("new_tokens", new_tokens, low=1)
        self._ready(batches)
        found: list[list[Tensor]] = [[] for _ in batches]

        def run(batch: Batch, into: list[Tensor]) -> Iterator[None]:
            for number in range(count):
                into.append(batch.logits.argmax(-1))
                if number + 1 < count:
                    yield from self._advance(batch, into[-1])

        _in_turn([run(batch, into) for batch, into in zip(batches, found, strict=True)])
        return [torch.stack(tokens, 1) for tokens in found]

    def _ready(self, batches: Sequence[Batch]) -> None:
        """Refuse what would stop half-way, with some batches a layer further than others."""
        if len({id(batch) for batch in batches}) < len(batches):
            raise ValueError("batches must each be given once")
        for batch in batches:
            if not batch.pool.is_open(batch.slot):
                raise ValueError("batches must be open: one was closed, or its pool was")
            self._slices(batch.rows)

    @torch.no_grad()
    def _advance(self, batch: Batch, tokens: Tensor) -> Iterator[None]:
        """One token of a batch; yields whenever its attention is under way."""
        cuts = self._slices(batch.rows)
        places = batch.length - batch.starts
        values = {cuts.inputs[0]: tokens[:, None], cuts.inputs[1]: places[:, None]}
        pool, slot = batch.pool, batch.slot
        for number, one in enumerate(cuts.slices):
            if one.layer < 0:
                self._run(one.rest, values, slot, number)
                continue
            if self.overlap:
                self._run(one.ask, values, slot, number)
                pool.ask(slot, one.layer, values[one.query], one.scale)
                self._run(one.give, values, slot, number)
                pool.give(slot, one.layer, values[one.key], values[one.value])
                self._run(one.rest, values, slot, number)
            else:
                for part in one.parts:
                    self._run(part, values, slot, number)
                pool.whole(slot, one.layer, values[one.query], values[one.key], values[one.value], one.scale)
            yield
            start = time.perf_counter()
            output = pool.take(slot, one.layer)
            if self.timeline is not None:
                self.timeline.add("wait", start, time.perf_counter(), slot, number)
            values[one.output] = output
            for name in one.done:
                values.pop(name, None)
        batch.logits = values[cuts.logits][:, -1]
        batch.tokens = torch.cat([batch.tokens, tokens[:, None]], 1)

    def _run(self, part: Part | None, values: dict[str, Tensor], slot: int, layer: int) -> None:
        if part is None:
            return
        if self.timeline is None:
            part.run(values)
            return
        start = time.perf_counter()
        part.run(values)
        self.timeline.add("model", start, time.perf_counter(), slot, layer)

    # -------------------------------------------------------------------------------------------------------------- slices

    @property
    def slices(self) -> list[Slice]:
        """The slices of a step of the rows that were last decoded; for looking at."""
        if not self._sliced:
            return []
        return list(self._sliced.values())[-1].slices

    def _slices(self, rows: int) -> Sliced:
        """The slices for so many rows, made once and again when parameters were exchanged or have another dtype."""
        found = [(parameter, parameter.dtype) for parameter in self.model.parameters()]
        if len(found) != len(self._parameters) or any(
            one is not other or dtype != before
            for (one, dtype), (other, before) in zip(found, self._parameters, strict=True)
        ):
            self._sliced.clear()
            self._parameters = found
        if rows not in self._sliced:
            made = sliced(trace(self.model, rows), rows)
            layers = [one.layer for one in made.slices[:-1]]
            if layers != list(range(len(self._windows))):
                raise ValueError(
                    f"model must have attention in layers 0 to {len(self._windows) - 1}, in order, got {layers}"
                )
            self._sliced[rows] = made
        return self._sliced[rows]

    @torch.no_grad()
    def _check(self) -> None:
        """Run a few tokens both ways. Raises ValueError if they differ."""
        from transformers.cache_utils import DynamicCache

        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(2 * PROBE).view(2, PROBE) % vocabulary
        cache = DynamicCache(config=self.model.config)
        for tokens in ids.split(1, 1):
            own = self.model(input_ids=tokens, cache=cache, use_cache=True).logits[:, -1]
        pool, self.pool = self.pool, LocalPool()
        try:
            batch = self.open(ids[:, :1])
            for tokens in ids.T[1:]:
                found = self.step(batch, tokens)
        except ValueError as error:
            raise ValueError(f"model must be a decoder whose attention can be offloaded: {error}") from None
        finally:
            self.pool = pool
        precise = own.dtype in (torch.float32, torch.float64)
        off, size = (found - own).abs().max().item(), own.abs().max().item()
        if not off <= (1e-3 if precise else 0.1) * size:
            raise ValueError(
                f"model must be a decoder whose attention can be offloaded: the slices of {type(self.model).__name__} give "
                f"other logits than the model, by {off:.2g} of {size:.2g}"
            )


def why_not(model: nn.Module) -> str:
    """Why a model's attention cannot be offloaded, as far as can be seen without running it; empty if it can."""
    from assay.methods.core.attention.integration import can_register, has_sinks

    if why := can_register(model):
        return why
    found: Any = model
    name, config = type(model).__name__, found.config.get_text_config()
    if has_sinks(model):
        return f"the attention of {name} has sinks"
    if odd := sorted(set(getattr(config, "layer_types", None) or ()) - KINDS):
        return f"{name} has layers of {odd[0]}"
    if found.get_output_embeddings() is None:
        return f"{name} makes no logits"
    if model.training:
        return f"{name} is in training mode: call eval()"
    if next(model.parameters()).device.type != "cpu":
        return (
            f"{name} lies on {next(model.parameters()).device}: memory workers of this machine hold what the CPU does"
        )
    return ""


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checked prompts, and the first token of each row."""
    ids = checks.tensor("input_ids", input_ids, ndim=2, dtype="integer")
    if attention_mask is None:
        return ids, torch.zeros(ids.shape[0], dtype=torch.int64)
    mask = checks.tensor("attention_mask", attention_mask, shape=tuple(ids.shape), dtype="any").bool()
    starts = ids.shape[1] - mask.long().sum(-1)
    if not torch.equal(mask, torch.arange(ids.shape[1]) >= starts[:, None]):
        raise ValueError("attention_mask must pad on the left only: zeros first, then ones, in each row")
    if not bool((starts < ids.shape[1]).all()):
        raise ValueError("attention_mask must leave a token in each row")
    return ids, starts


def _in_turn(runs: Sequence[Iterator[None]]) -> None:
    """Let each run go on to its next wait, one after the other, until all have ended."""
    left = list(runs)
    while left:
        left = [run for run in left if next(run, run) is not run]
