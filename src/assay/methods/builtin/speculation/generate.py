"""Speculation inside transformers' `generate`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.builtin import attention_backend
from assay.methods.builtin.decode_loop import DecodeLoopMixin, Sampling
from assay.methods.builtin.decode_loop.decoder import sample
from assay.methods.builtin.decode_loop.generate import with_loop
from assay.methods.builtin.speculation.drafts import NGRAM, Drafter, DraftModel, Lookup
from assay.methods.builtin.speculation.engines import Engine, ModelEngine, PagedEngine, cannot_crop, forget_past
from assay.methods.builtin.speculation.loop import Counts, speculate
from assay.methods.core import kernels
from assay.methods.core.generation import loop

logger = logging.getLogger(__name__)

DRAFT = 8  # tokens to a draft at most; our choice


@dataclass
class Speculation:
    """How a model speculates, its attribute `speculation`: `counts` says what its last `generate` did."""

    ngram: int = NGRAM
    draft: int = DRAFT
    draft_model: nn.Module | None = field(default=None, repr=False)
    counts: Counts = field(default_factory=Counts, repr=False, compare=False)

    def drafter(self, model: nn.Module, tokens: list[int]) -> Drafter:
        """A drafter that knows the tokens of a prompt."""
        if self.draft_model is None:
            return Lookup(tokens, ngram=self.ngram)
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (self.draft_model, model)]
        return DraftModel(self.draft_model, tokens, cost=sizes[0] / max(sizes[1], 1))


def why_not(model: nn.Module) -> str:
    """Why drafts cannot be verified by this model, or an empty string. Changes nothing and runs nothing."""
    from transformers import DynamicCache

    if reason := loop.why_not(model):
        return reason
    module: Any = model
    name = type(model).__name__
    if not hasattr(model, "_sample") or not hasattr(model, "_supports_default_dynamic_cache"):
        return f"{name} generates in a loop of its own"
    if getattr(model, "_is_stateful", False) or not module._supports_default_dynamic_cache():
        return f"{name} keeps a state from which tokens cannot be taken back"
    if isinstance(model, DecodeLoopMixin):
        return ""
    if reason := cannot_crop(DynamicCache(config=module.config.get_text_config(decoder=True))):
        return f"tokens cannot be taken back from its cache: {reason}"
    attention = str(getattr(module.config.get_text_config(decoder=True), "_attn_implementation", ""))
    if attention.startswith("assay_") and attention != attention_backend.NAME:
        return f"attention {attention!r} attends to several tokens otherwise than to one, so it would verify something else"
    return ""


class SpeculationMixin:
    """A mixin in front of a transformers model class: its greedy and sampling loop runs drafts (see the package's docstring)."""

    speculation: Speculation

    def __reduce_ex__(self, protocol: Any) -> Any:
        below = type(self).__mro__[2]
        looped = issubclass(below, DecodeLoopMixin)
        return _rebuild, (below.__mro__[2] if looped else below, looped), self.__dict__

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
        asked = _asked(
            self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, model_kwargs
        )
        self.speculation.counts = Counts()
        if isinstance(asked, str):
            logger.info("generate does not speculate: %s", asked)
            kernels.ran("speculation", "original loop")
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        engine, logits = _prefilled(self, input_ids, generation_config, model_kwargs, asked.new_tokens)
        kernels.ran("speculation", "pages" if isinstance(engine, PagedEngine) else "cache")
        prompt = input_ids.shape[1]
        ids = torch.cat([input_ids, input_ids.new_zeros(1, asked.new_tokens)], 1)

        def put(token: int) -> None:
            streamer.put(torch.tensor([token]))

        def stop(made: list[int]) -> bool:
            end = prompt + len(made)
            ids[0, end - 1] = made[-1]
            return bool(asked.criteria(ids[:, :end], None).all())

        with self._optimize_model_for_decode():
            made = speculate(
                engine,
                logits,
                self.speculation.drafter(self, input_ids[0].tolist()),
                asked.new_tokens,
                most=self.speculation.draft,
                sampling=asked.sampling,
                ends=asked.ends,
                no_end=asked.no_end,
                put=None if streamer is None else put,
                stop=stop if asked.criteria else None,
                counts=self.speculation.counts,
            )
        past = model_kwargs["cache"]
        if getattr(past, "_is_user_defined", False):
            if isinstance(engine, PagedEngine):
                engine.give_back(past)
            forget_past(past)
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, input_ids.new_tensor([made])], 1)


@functools.cache
def with_speculation(base: type) -> type:
    """The class of a transformers model with speculation in front; the same class at every call."""
    return type(
        base.__name__, (SpeculationMixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )


def _rebuild(base: type, looped: bool) -> Any:
    return object.__new__(with_speculation(with_loop(base) if looped else base))


@dataclass(frozen=True)
class _Asked:
    """What `generate` was asked for, where it can be done with drafts; `criteria` are those beside ends and length."""

    new_tokens: int
    sampling: Sampling | None
    ends: list[int]
    no_end: int
    criteria: Any


def _asked(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    synced_gpus: bool,
    kwargs: Mapping[str, Any],
) -> _Asked | str:
    """What was asked for, or why it is left to the original loop."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

    if reason := why_not(model):
        return reason
    if len(input_ids) != 1:
        return f"a batch of {len(input_ids)} rows, of which each would accept another number of tokens"
    if config.return_dict_in_generate:
        return "return_dict_in_generate"
    if synced_gpus or config.is_assistant:
        return "several devices or an assistant"
    past: Any = kwargs.get("cache")
    if not kwargs.get("use_cache") or past is None:
        return "no cache"
    if reason := cannot_crop(past):
        return f"tokens cannot be taken back from the cache: {reason}"
    known = {"attention_mask", "position_ids", "cache", "use_cache", "logits_to_keep", "tokenizer"}
    if extra := {name for name, value in kwargs.items() if name not in known and value is not None}:
        return f"further inputs {sorted(extra)}"
    if kwargs.get("attention_mask") is not None:  # one that leaves nothing out is dropped by `generate`
        return "attention_mask leaves tokens out"
    columns = getattr(config, "_mask_length", input_ids.shape[1])
    if past.get_seq_length() >= columns:
        return "the cache holds the whole prompt already"
    positions = kwargs.get("position_ids")
    if positions is not None and positions.tolist() != [list(range(columns - positions.shape[-1], columns))]:
        return "position_ids do not count up to the end of the prompt"
    if not criteria.max_length:
        return "no max_new_tokens or max_length"
    new_tokens = criteria.max_length - input_ids.shape[1]
    if isinstance(model, DecodeLoopMixin) and (reason := _why_not_in_pages(model, past, columns + new_tokens)):
        return reason
    ends = [token for each in criteria if type(each) is EosTokenCriteria for token in each.eos_token_id.tolist()]
    others = [each for each in criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)]
    chosen = _choice(processors, config.do_sample, input_ids.shape[1], ends)
    if isinstance(chosen, str):
        return chosen
    sampling, no_end = chosen
    return _Asked(new_tokens, sampling, ends, no_end, StoppingCriteriaList(others))


def _why_not_in_pages(model: Any, past: Any, positions: int) -> str:
    """Why the compiled decoder cannot take over from the prefill."""
    if not torch.equal(model.decode_loop.seen, sample(model)):
        return "the weights have changed since they were packed"  # which the loop beneath refuses in its own words
    if positions > model.decode_loop.max_positions:
        return f"{positions} positions, more than the model has"
    if past.get_seq_length() and any(layer.is_sliding for layer in past.layers):
        return "the cache that was passed in has dropped what left its window"
    return ""


def _choice(processors: Any, do_sample: bool, prompt_tokens: int, ends: list[int]) -> tuple[Sampling | None, int] | str:
    """The sampling (None: greedy) and the number of first tokens without an end that these processors amount to, or why not."""
    from transformers.generation import logits_process as lp

    lengths = (lp.MinLengthLogitsProcessor, lp.MinNewTokensLengthLogitsProcessor)
    order: list[type] = [lp.TemperatureLogitsWarper, lp.TopKLogitsWarper, lp.TopPLogitsWarper] if do_sample else []
    values: dict[str, Any] = {}
    no_end = 0
    for processor in processors:
        kind = type(processor)
        if kind in lengths and not values and set(processor.eos_token_id.tolist()) == set(ends):
            new = getattr(processor, "min_new_tokens", None)
            no_end = max(no_end, processor.min_length - prompt_tokens if new is None else new)
            continue
        plain = getattr(processor, "min_tokens_to_keep", 1) == 1
        if kind not in order or not plain or getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            return f"tokens are chosen by a {kind.__name__}"
        order = order[order.index(kind) + 1 :]
        names = ("temperature", "top_k", "top_p")
        values |= {name: getattr(processor, name) for name in names if hasattr(processor, name)}
    return Sampling(**values) if do_sample else None, no_end


def _prefilled(
    model: Any, input_ids: Tensor, config: Any, kwargs: dict[str, Any], new_tokens: int
) -> tuple[Engine, Tensor]:
    """The engine that holds the prompt, and the logits (vocabulary,) after it."""
    paged = isinstance(model, DecodeLoopMixin)
    if paged:
        kwargs["cache"].activate_past_recording()  # all keys are wanted, those that left a window too
    outputs = model._prefill(input_ids, config, kwargs)
    logits: Tensor = outputs.logits[0, -1]
    if paged:
        return PagedEngine.of_cache(model.decode_loop, outputs.cache, new_tokens), logits
    return ModelEngine(model, outputs.cache), logits
