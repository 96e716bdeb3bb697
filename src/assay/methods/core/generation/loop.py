"""How assay runs many prompts: batches, their order, their prefill, and the settings that a model carries.

`model.assay_settings`, a plain dict on the model, holds the defaults: transforms set it (`set_settings`), and
`generate_batch` and `prefill` read it, so that a tuned model runs the way it was tuned wherever it is used.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from assay import checks
from assay.methods.core.generation.cache import Prefilled, left_pad, position_ids
from assay.methods.core.layers.surgery import takes_token_ids

DEFAULTS: dict[str, Any] = {"batch_size": 8, "sort_by_length": False, "prefill": None, "threads": None}
MOST_THREADS = 1024  # more than any machine of today has: what asks for a million would end the process


class Prefill(Protocol):
    """A way to fill the cache of prompts that start together. With `last_token` False, each prompt's last token is left to `generate`."""

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Prefilled: ...


class PrefillFactory(Protocol):
    """The value of the setting `prefill`: called with the model, it returns a `Prefill`; None stands for `padded_prefill`."""

    def __call__(self, model: nn.Module, *, last_token: bool = True, pad_token_id: int | None = None) -> Prefill: ...


def settings(model: nn.Module) -> dict[str, Any]:
    """The settings of `model`, on top of the defaults."""
    return {**DEFAULTS, **getattr(model, "assay_settings", {})}


def set_settings(model: nn.Module, **values: Any) -> None:
    """Attach settings to `model`, keeping its others. Raises what `check_settings` does."""
    object.__setattr__(model, "assay_settings", {**getattr(model, "assay_settings", {}), **check_settings(values)})


def check_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in plain Python numbers. Raises ValueError or TypeError for an unknown name or a bad value.

    `threads` and `prefill` may be None.
    """
    if unknown := set(values) - set(DEFAULTS):
        raise ValueError(f"settings must be among {', '.join(DEFAULTS)}, got {', '.join(sorted(map(str, unknown)))}")
    plain = dict(values)
    if "batch_size" in values:
        plain["batch_size"] = checks.whole("batch_size", values["batch_size"], low=1)
    if values.get("threads") is not None:
        plain["threads"] = checks.whole("threads", values["threads"], low=1, high=MOST_THREADS)
    if "sort_by_length" in values:
        plain["sort_by_length"] = checks.flag("sort_by_length", values["sort_by_length"])
    if not (values.get("prefill") is None or callable(values["prefill"])):
        raise TypeError(f"prefill must be a prefill's class or None, got {checks.shown(values['prefill'])}")
    return plain


def why_not(model: nn.Module) -> str:
    """Why `generate_batch` cannot run this model; empty when it can: it continues prompts, so it needs a decoder that generates."""
    name = type(model).__name__
    if not hasattr(model, "generate"):
        return f"{name} does not generate"
    return "" if takes_token_ids(model) else f"{name} does not continue prompts of token ids"


def prefill(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Prefilled:
    """Run a left-padded batch of prompts, (B, S) int64 ids and mask, the way the model's settings say; padded by default.

    The result holds the left-padded cache, the logits (B, vocab) of each prompt's last token, and the lengths. Everything that
    generates goes through here, so that a custom decoding loop keeps the packed prefill.
    """
    make: PrefillFactory | None = settings(model)["prefill"]
    if make is None or attention_mask is None or bool(attention_mask.all()):
        return padded_prefill(model, input_ids, attention_mask)
    lengths = attention_mask.sum(-1).tolist()
    prompts = [row[len(row) - length :] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
    return make(model)(prompts)


@torch.no_grad()
def padded_prefill(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, last_token: bool = True
) -> Prefilled:
    """The baseline: one forward pass over a left-padded batch, (B, S) ids and mask; padding is computed like any other token."""
    module: Any = model
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    width = input_ids.shape[1] if last_token else input_ids.shape[1] - 1
    out = module(
        input_ids=input_ids[:, :width],
        attention_mask=mask[:, :width],
        position_ids=position_ids(mask)[:, :width],
        cache=DynamicCache(config=module.config),
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1] if last_token else None
    return Prefilled(out.cache, input_ids, mask, mask.sum(-1).tolist(), logits)


def checked_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of ints. Raises ValueError for no prompts or an empty one, TypeError for a token that is not a whole number."""
    try:
        listed = [[_token(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise TypeError(f"prompts must be lists of token ids, which are whole numbers: {error}") from None
    if not listed:
        raise ValueError("prompts must hold at least one prompt, got none")
    if empty := [i for i, prompt in enumerate(listed) if not prompt]:
        raise ValueError(f"prompts must hold at least one token each, got an empty prompt at {empty[0]}")
    return listed


def _token(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{value} is a truth value")
    return operator.index(value)


def padding_token(model: nn.Module, pad_token_id: int | None = None) -> int:
    """A token id to pad with: the given one, else the model's own, its end of sequence, or 0 (it is masked: any will do).

    An id of the configuration outside the vocabulary is passed over: some name tokens that never had a row in the embedding.
    Raises ValueError for a given one that the model does not know, TypeError for one that is no whole number.
    """
    module: Any = model
    if pad_token_id is not None:
        return checks.whole("pad_token_id", pad_token_id, low=0, high=module.get_input_embeddings().num_embeddings - 1)
    config = module.config.get_text_config()
    for token in (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None and 0 <= token < config.vocab_size:
            return int(token)
    return 0


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int | None = None,
    sort_by_length: bool | None = None,
    pad_token_id: int | None = None,
    ignore_eos: bool = True,
    cache_implementation: str | None = None,
) -> list[list[int]]:
    """Continue every prompt greedily by `new_tokens` tokens; returns the new tokens, in the order of the prompts.

    Greedy means greedy: whatever else the model's `generation_config` asks for (penalties, beams, forced tokens) is left out.
    Prompts run in batches of `batch_size`, in arrival order, or with `sort_by_length` longest first, which wastes little on
    padding and meets the largest batch at once. With `ignore_eos` (for measuring: equal work for every prompt) the end token
    is never chosen; without it a prompt's tokens end with it. `cache_implementation` is that of `generate` ("static", say). What
    is None comes from the model's settings.
    Raises ValueError for no prompts, an empty one, new_tokens < 1, batch_size < 1 or a padding token that the model does not
    know, and for a model that does not continue prompts; TypeError for a number that is not whole and a flag that is none.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    >>> [len(tokens) for tokens in generate_batch(model, [[1, 2, 3], [4]], new_tokens=5)]
    [5, 5]
    """
    prompts = checked_prompts(prompts)
    chosen = settings(model)
    new_tokens = checks.whole("new_tokens", new_tokens, low=1)
    size = checks.whole("batch_size", chosen["batch_size"] if batch_size is None else batch_size, low=1)
    ordered = checks.flag("sort_by_length", chosen["sort_by_length"] if sort_by_length is None else sort_by_length)
    ignore_eos = checks.flag("ignore_eos", ignore_eos)
    if reason := why_not(model):
        raise ValueError(f"model must continue prompts: {reason}")
    pad = padding_token(model, pad_token_id)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if ordered else list(range(len(prompts)))
    results: list[list[int]] = [[] for _ in prompts]
    with _threads(chosen["threads"]):
        for first in range(0, len(order), size):
            members = order[first : first + size]
            new = _generate(model, [prompts[i] for i in members], new_tokens, pad, ignore_eos, cache_implementation)
            for i, tokens in zip(members, new, strict=True):
                results[i] = tokens if ignore_eos else _until_end(tokens, model)
    return results


def _generate(
    model: Any, prompts: list[list[int]], new_tokens: int, pad: int, ignore_eos: bool, cache: str | None
) -> list[list[int]]:
    ids, mask = left_pad(prompts, pad, model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    make: PrefillFactory | None = settings(model)["prefill"]
    if make is not None and not getattr(model.generate, "calls_prefill", False):
        # The last token is left to `generate`: its own rule for the end token then holds for every new token.
        inputs = make(model, last_token=False, pad_token_id=pad)(prompts).generate_inputs()
    if ignore_eos:
        inputs["min_new_tokens"] = new_tokens
    if cache is not None:
        inputs["cache_implementation"] = cache
    with plain_generation(model):
        out: Tensor = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    new: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return new


def _until_end(tokens: list[int], model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@contextlib.contextmanager
def plain_generation(model: nn.Module, *, ends: bool = True) -> Iterator[None]:
    """Within this context `generate` does what its caller asks for and nothing else; with `ends` False, no token ends a sequence.

    A model's `generation_config` holds its makers' preferences: penalties, temperatures, beams, forced and suppressed tokens,
    limits of length and time, kinds of caches. `generate` takes from there whatever the caller leaves out, so only the special
    tokens are kept here. Afterwards the model's own configuration is put back, the same object as before.
    """
    from transformers import GenerationConfig

    module: Any = model
    own = getattr(module, "generation_config", None)
    if own is None:
        yield
        return
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    module.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in tokens})
    if not ends:
        module.generation_config.eos_token_id = None
    try:
        yield
    finally:
        module.generation_config = own


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with `count` intra-op threads; None keeps the current number."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
