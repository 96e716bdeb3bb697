"""The compiled loop inside transformers' `generate`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.methods.builtin.decode_loop.choosing import Sampling, draw
from assay.methods.builtin.decode_loop.decoder import Decoder, sample
from assay.methods.core.generation.paged import PagePool, Sequence, pages_for

logger = logging.getLogger(__name__)

CALL = 32  # steps to a compiled call: between two calls Ctrl-C is heard
PREFILL_TOKENS = 64  # the fixed cost of a forward pass, expressed in tokens; our choice


class DecodeLoopMixin:
    """A mixin in front of a transformers model class: its sampling and greedy loop becomes the compiled one (see the module docstring)."""

    decode_loop: Decoder

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    generate.calls_prefill = True  # type: ignore[attr-defined]  # says that the settings of inference.loop are heeded

    def _sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        decoder: Decoder = self.decode_loop
        if not torch.equal(decoder.seen, sample(self)):
            raise ValueError("model has other weights than when the decode loop packed them: apply the transform again")
        mask = model_kwargs.get("attention_mask")
        if reason := _why_original(decoder, input_ids, generation_config, synced_gpus, model_kwargs):
            logger.info("generate takes the original loop: %s", reason)
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        past = model_kwargs["cache"]
        columns = input_ids.shape[1] if mask is None else mask.shape[1]
        if mask is None and past.get_seq_length():  # only the new tokens may have been passed
            columns = max(columns, getattr(generation_config, "_mask_length", columns))
        lengths = [columns] * len(input_ids) if mask is None else mask.sum(1).tolist()
        new_tokens = stopping_criteria.max_length - input_ids.shape[1] if stopping_criteria.max_length else None
        if new_tokens is None:
            raise ValueError("max_new_tokens (or max_length) must be given")
        if max(lengths) + new_tokens > decoder.max_positions:
            raise ValueError(
                f"max_new_tokens {new_tokens} after a prompt of {max(lengths)} tokens passes the model's "
                f"{decoder.max_positions} positions (max_position_embeddings)"
            )
        needed = [pages_for(length + new_tokens) for length in lengths]
        pool = decoder.new_pool(sum(needed))
        rows = [Sequence(pool.take(count)) for count in needed]
        logits = _prefill(self, pool, rows, input_ids, lengths, generation_config, model_kwargs)
        eos, pad = _eos(stopping_criteria), generation_config._pad_token_tensor
        choice = _plain_choice(logits_processor, generation_config, input_ids.shape[1], eos)
        ends = _Ends(eos, 0 if pad is None else int(pad), streamer)
        if choice is not None and _plain_stopping(stopping_criteria):
            made = _compiled_loop(decoder, pool, rows, input_ids, logits, new_tokens, choice, ends)
        else:
            do_sample = generation_config.do_sample
            made = _stepwise_loop(
                decoder, pool, rows, input_ids, logits, logits_processor, stopping_criteria, do_sample, ends
            )
        if getattr(past, "_is_user_defined", False):
            _give_back(pool, rows, past, lengths, columns + made.shape[1] - input_ids.shape[1] - 1)
        if streamer is not None:
            streamer.end()
        return made


@functools.cache
def with_loop(base: type) -> type:
    """The class of a transformers model with the compiled loop in front; the same class at every call."""
    return type(
        base.__name__, (DecodeLoopMixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )


def _rebuild(base: type) -> Any:
    return object.__new__(with_loop(base))


def _why_original(
    decoder: Decoder, input_ids: Tensor, config: Any, synced_gpus: bool, kwargs: Mapping[str, Any]
) -> str:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if config.return_dict_in_generate:
        return "return_dict_in_generate"
    if synced_gpus or config.is_assistant:
        return "several devices or an assistant"
    past: Any = kwargs.get("cache")
    if not kwargs.get("use_cache") or type(past) is not DynamicCache:
        return f"cache is {type(past).__name__}"
    if past.offloading or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers):
        return "cache is offloaded or of another kind"
    if any(getattr(layer, "record_past", False) for layer in past.layers):
        return "cache keeps what has left the windows"
    known = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep"}
    if extra := {name for name, value in kwargs.items() if name not in known and value is not None}:
        return f"further inputs {sorted(extra)}"
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    columns = input_ids.shape[1]
    if mask is not None:
        columns = mask.shape[1]
        if mask.dim() != 2 or not bool((mask.diff(dim=1) >= 0).all()) or not bool((mask[:, -1] == 1).all()):
            return "attention_mask is not left padding"
    if past.get_seq_length() and columns <= past.get_seq_length() and mask is not None:
        return "attention_mask does not cover the cache"
    if positions is not None and mask is not None:
        expected = mask.sum(1) - 1
        if positions.shape[0] not in (1, len(input_ids)) or not bool((positions[:, -1] == expected).all()):
            return "position_ids do not follow the attention mask"
    return ""


@dataclass(frozen=True)
class _Choice:
    """What the compiled loop can choose itself: greedy (no sampling) or sampled tokens, without an end in the first tokens."""

    sampling: Sampling | None
    min_new_tokens: int = 0


@dataclass(frozen=True)
class _Ends:
    """The tokens that end a sequence, the token that follows them, and the streamer."""

    eos: list[int]
    pad: int
    streamer: Any


def _plain_choice(processors: Any, config: Any, prompt_tokens: int, eos: list[int]) -> _Choice | None:
    """How the compiled loop chooses tokens for these processors, or None if it cannot."""
    from transformers.generation import logits_process as lp

    values: dict[str, Any] = {}
    least = 0
    order: list[type] = (
        [lp.TemperatureLogitsWarper, lp.TopKLogitsWarper, lp.TopPLogitsWarper] if config.do_sample else []
    )
    for processor in processors:
        if type(processor) in (lp.MinLengthLogitsProcessor, lp.MinNewTokensLengthLogitsProcessor) and not values:
            if set(processor.eos_token_id.tolist()) != set(eos):
                return None
            new = getattr(processor, "min_new_tokens", None)
            least = max(least, processor.min_length - prompt_tokens if new is None else new)
            continue
        if type(processor) not in order:
            return None
        order = order[order.index(type(processor)) + 1 :]
        if (
            getattr(processor, "min_tokens_to_keep", 1) != 1
            or getattr(processor, "filter_value", -torch.inf) != -torch.inf
        ):
            return None
        values |= {
            name: getattr(processor, name) for name in ("temperature", "top_k", "top_p") if hasattr(processor, name)
        }
    return _Choice(Sampling(**values) if config.do_sample else None, least)


def _plain_stopping(criteria: Any) -> bool:
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    return all(type(criterion) in (EosTokenCriteria, MaxLengthCriteria) for criterion in criteria)


def _eos(criteria: Any) -> list[int]:
    return [
        token
        for criterion in criteria
        if hasattr(criterion, "eos_token_id")
        for token in criterion.eos_token_id.tolist()
    ]


def _prefill(
    model: Any,
    pool: PagePool,
    sequences: list[Sequence],
    input_ids: Tensor,
    lengths: list[int],
    config: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """Run the prompts through the model, fill their pages, return the logits (rows, vocabulary) float32 after each prompt.

    Prompts of different lengths are packed if the model's settings say so, else they go in groups of similar length.
    """
    from assay.methods.core.generation import loop

    rows, past, mask = list(range(len(lengths))), kwargs["cache"], kwargs.get("attention_mask")
    untouched = (
        not past.get_seq_length() and not getattr(past, "_is_user_defined", False) and config.prefill_chunk_size is None
    )
    groups = length_groups(lengths) if untouched else []
    packs = loop.settings(model)["prefill"] is not None and mask is not None
    if not untouched or (len(groups) == 1 and not packs):
        outputs = model._prefill(input_ids, config, kwargs)
        _fill(pool, sequences, outputs.cache, lengths)
        first: Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
        return first
    if packs:
        groups = [rows]
    logits = torch.empty(len(lengths), model.config.vocab_size)
    for group in groups:
        longest = max(lengths[row] for row in group)
        part = None if mask is None or min(lengths[row] for row in group) == longest else mask[group, -longest:]
        done = loop.prefill(model, input_ids[group, -longest:], part)
        assert done.logits is not None
        _fill(pool, [sequences[row] for row in group], done.cache, [lengths[row] for row in group])
        logits[group] = done.logits.float()
    return logits


def length_groups(lengths: Listed[int], overhead: int = PREFILL_TOKENS) -> list[list[int]]:
    """Rows in groups of similar length that minimise padded tokens plus `overhead` tokens per group."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best = [0.0] + [float("inf")] * len(order)  # of the first n rows
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        for start in range(end):
            cost = best[start] + overhead + (end - start) * lengths[order[end - 1]]
            if cost < best[end]:
                best[end], cut[end] = cost, start
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def _fill(pool: PagePool, sequences: list[Sequence], past: Any, lengths: list[int]) -> None:
    """Copy the rows of a left-padded cache into the pages. A layer that sees a window only has lost what lies before it: zeros."""

    def held(tensor: Tensor, length: int) -> Tensor:
        part = tensor[:, max(0, tensor.shape[1] - length) :].to(pool.keys.dtype)
        return F.pad(part, (0, 0, length - part.shape[1], 0))

    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        keys = torch.stack([held(layer.keys[row], length) for layer in past.layers])
        values = torch.stack([held(layer.values[row], length) for layer in past.layers])
        pool.write(sequence.pages, 0, keys, values)
        sequence.length = length


def _give_back(pool: PagePool, sequences: list[Sequence], past: Any, lengths: list[int], columns: int) -> None:
    """Append what was decoded, up to `columns`, to the cache that the caller passed in; a row that ended early is filled with zeros."""
    missing = columns - past.get_seq_length()
    if missing < 1:
        return
    pieces = []
    for sequence, length in zip(sequences, lengths, strict=True):
        short = missing - (sequence.length - length)
        pieces.append([F.pad(t, (0, 0, 0, short)) for t in pool.read(sequence.pages, length, sequence.length)])
    keys, values = (torch.stack(column, 1) for column in zip(*pieces, strict=True))
    for number, layer in enumerate(past.layers):
        layer.update(keys[number].to(layer.keys.dtype), values[number].to(layer.values.dtype))


def _compiled_loop(
    decoder: Decoder,
    pool: PagePool,
    sequences: list[Sequence],
    input_ids: Tensor,
    logits: Tensor,
    new_tokens: int,
    choice: _Choice,
    ends: _Ends,
) -> Tensor:
    out = torch.full((len(input_ids), new_tokens), ends.pad, dtype=torch.int64)
    if choice.min_new_tokens > 0:
        logits[:, ends.eos] = -torch.inf
    out[:, 0] = logits.argmax(-1) if choice.sampling is None else draw(logits, choice.sampling)
    if ends.streamer is not None:
        ends.streamer.put(out[:, 0].clone())
    done, going = 1, [row for row in range(len(out)) if int(out[row, 0]) not in ends.eos]
    while going and done < new_tokens:
        steps = 1 if ends.streamer is not None else min(CALL, new_tokens - done)
        no_end = max(0, min(steps, choice.min_new_tokens - done))
        fed, rows = out[going, done - 1].tolist(), [sequences[row] for row in going]
        tokens, _ = decoder.run(pool, rows, fed, steps, eos=ends.eos, no_end=no_end, sampling=choice.sampling)
        out[going, done : done + steps] = torch.where(tokens < 0, ends.pad, tokens)
        going = [
            row for row, last in zip(going, tokens[:, -1].tolist(), strict=True) if last >= 0 and last not in ends.eos
        ]
        # all rows may have ended before the last step of the call
        done += steps if going else int((tokens >= 0).sum(1).max())
        if ends.streamer is not None:
            ends.streamer.put(out[:, done - 1].clone())
    return torch.cat([input_ids, out[:, :done].to(input_ids.dtype)], 1)


def _stepwise_loop(
    decoder: Decoder,
    pool: PagePool,
    sequences: list[Sequence],
    input_ids: Tensor,
    logits: Tensor,
    processors: Any,
    criteria: Any,
    do_sample: bool,
    ends: _Ends,
) -> Tensor:
    """Compiled steps, but transformers' own processors, choice and stopping: one step at a time."""
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    while True:
        scores = processors(input_ids, logits.clone())
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if do_sample else scores.argmax(-1)
        if ends.eos:
            chosen = torch.where(unfinished, chosen, ends.pad)
        input_ids = torch.cat([input_ids, chosen[:, None].to(input_ids.dtype)], 1)
        if ends.streamer is not None:
            ends.streamer.put(chosen)
        unfinished &= ~criteria(input_ids, None)
        if not bool(unfinished.any()):
            return input_ids
        going = unfinished.nonzero().flatten().tolist() if ends.eos else list(range(len(input_ids)))
        rows = [sequences[row] for row in going]
        _, logits[going] = decoder.run(pool, rows, chosen[going].tolist(), 1, want_logits=True)
