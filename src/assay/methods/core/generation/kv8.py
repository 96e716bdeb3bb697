"""Keys and values in 8 bits: a cache of half the bytes of a bfloat16 one, a quarter of a float32 one, and what that costs in quality.

Each token's key (and value) of each head is 8-bit integers and one scale, symmetric about zero: scale = max |x| / 127, rounded up
to float16, code = round(x / scale). A head dim of d takes d + 2 bytes. That is appendable (a token's codes never change), needs no
calibration and no outlier handling at 8 bits. Codes are what is stored; a layer is turned back to floating point when it is used, so
only one layer at a time is there in full.

transformers' QuantizedCache needs optimum-quanto (2 or 4 bits) or hqq (1 to 8 bits), neither of which assay installs, or float8 with
one scale a layer, frozen at the first tokens; it refuses models with sliding layers. It returns a prompt's own keys unrounded
in the pass that fills the cache; here they are rounded at once (`our choice`), so that a prompt in chunks, a prompt in one pass and
decoding all see the same keys, and one forward pass measures the quality of decoding (`quality`).

When NOT to use it: for speed alone on short contexts (rounding and its inverse take time, and keys are a small part of what is read
there), and with models all of whose layers slide, which hold little anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from assay import checks
from assay.methods.core.generation.loop import checked_prompts
from assay.methods.core.generation.slices import held_bytes

LEVELS = 127  # codes on either side of zero


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of the shape of x (..., dim), and their float16 scales (..., 1): x is codes * scales, off by half a scale at most.

    Scales are rounded up, so no code is cut off. A vector that is not finite, or whose largest number is above 8.3e6 (float16's end times
    127), comes back as NaN or infinity. Raises TypeError for what holds no floating-point numbers, ValueError for no dimension.

    >>> codes, scales = rounded(torch.tensor([[0.0, -1.0, 2.0]]))
    >>> codes.tolist(), round(float(scales), 4)
    ([[0, -63, 127]], 0.0158)
    """
    checks.tensor("x", x, empty=True)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    wide = x.float()
    exact = wide.abs().amax(-1, keepdim=True) / LEVELS
    scales = exact.half()
    up = (scales.view(torch.int16) + 1).view(torch.float16)  # the next larger number
    scales = torch.where(scales.float() < exact, up, scales)
    codes = (wide / scales.float().masked_fill(scales == 0, 1.0)).round()
    return codes.to(torch.int8), scales


def restored(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rounded` gave back as numbers of `dtype`, computed in float32."""
    return codes.float().mul_(scales.float()).to(dtype)


class Int8Layer(CacheLayerMixin):
    """One layer of an `Int8Cache`; `TENSORS` are (rows, heads, tokens, head dim) codes and (rows, heads, tokens, 1) scales."""

    TENSORS = ("key_codes", "key_scales", "value_codes", "value_scales")
    is_sliding = False
    is_croppable = True
    supports_early_init = False
    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        nothing = (*rounded(key_states[:, :, :0]), *rounded(value_states[:, :, :0]))
        for name, x in zip(self.TENSORS, nothing, strict=True):
            setattr(self, name, x)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens; returns all keys and values, of these tokens too, as they are after rounding."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (*rounded(key_states), *rounded(value_states))
        for name, x in zip(self.TENSORS, new, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), x], 2))
        return self.restored()

    def restored(self) -> tuple[Tensor, Tensor]:
        """The keys and values held, in the dtype they came in. Raises ValueError while there are none."""
        if not self.is_initialized:
            raise ValueError("the layer holds no tokens yet")
        key_codes, key_scales, value_codes, value_scales = (getattr(self, name) for name in self.TENSORS)
        return restored(key_codes, key_scales, self.dtype), restored(value_codes, value_scales, self.dtype)

    def get_seq_length(self) -> int:
        return int(self.key_codes.shape[2]) if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be at most 0: minus the tokens to take off, got {tokens_to_remove}"
            )
        self._each(lambda x: x[:, :, : max(0, x.shape[2] + tokens_to_remove)])

    def reset(self) -> None:
        for name in self.TENSORS if self.is_initialized else ():
            delattr(self, name)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self.TENSORS if self.is_initialized else ():
            setattr(self, name, function(getattr(self, name)))


class Int8Cache(Cache):
    """A cache whose full-attention layers are kept in 8 bits: `model.generate(..., cache=Int8Cache(model.config))`.

    Layers of other kinds (sliding, recurrent, shared) are what they are in a DynamicCache. Left padding, beams, going back (assisted
    decoding) and `slices` work. `slices.held_bytes` counts what it takes. Raises TypeError for what is no transformers config, ValueError
    for models without a full-attention layer.

    >>> from transformers import LlamaConfig
    >>> Int8Cache(LlamaConfig(num_hidden_layers=2)).layers
    [Int8Layer, Int8Layer]
    """

    def __init__(self, config: Any):
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a transformers config, got {type(config).__name__} {checks.shown(config)}")
        layers: list[Any] = list(DynamicCache(config=config).layers)
        if not any(type(layer) is DynamicLayer for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise ValueError(f"config must have a full-attention layer to keep in 8 bits, got {kinds}")
        super().__init__(layers=[Int8Layer() if type(layer) is DynamicLayer else layer for layer in layers])


# --------------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class CacheQuality:
    """What 8-bit keys and values change, over all tokens of the prompts, and what they save.

    `divergence` is KL(plain || 8 bits) in nats a token, `agreement` the share of tokens after which the most likely next one is the same,
    `loss` the plain cross-entropy of the prompts' own next tokens, `loss_8bit` that with the cache; `bytes_plain` and `bytes_8bit` are what
    the caches held in the end.
    """

    divergence: float
    agreement: float
    loss: float
    loss_8bit: float
    bytes_plain: int
    bytes_8bit: int


@torch.no_grad()
def quality(model: nn.Module, prompts: Sequence[Sequence[int]]) -> CacheQuality:
    """Run every prompt by itself through `model` with a DynamicCache and with an `Int8Cache`, and compare what comes out.

    One pass a prompt is enough, since an `Int8Cache` shows a pass what decoding would see. Prompts of two tokens and more.
    Raises ValueError for shorter ones and as `Int8Cache`, TypeError for tokens that are no whole numbers.
    """
    listed = checked_prompts(prompts)
    if short := [len(prompt) for prompt in listed if len(prompt) < 2]:
        raise ValueError(f"prompts must have at least 2 tokens each, got one of {short[0]}")
    module: Any = model
    divergence = agreement = loss = loss_8bit = 0.0
    sizes = [0, 0]
    for prompt in listed:
        ids = torch.tensor([prompt], device=module.device)
        logs = []
        for place, cache in enumerate((DynamicCache(config=module.config), Int8Cache(module.config))):
            out = module(input_ids=ids, cache=cache, use_cache=True)
            logs.append(out.logits[0].float().log_softmax(-1))
            sizes[place] += held_bytes(cache)
        plain, rough = logs
        change = rough - plain
        divergence += float(
            (plain.exp() * (change.expm1() - change)).sum(dtype=torch.float64)
        )  # small terms, none below 0
        agreement += float((plain.argmax(-1) == rough.argmax(-1)).sum())
        following = ids[0, 1:, None]
        loss -= float(plain[:-1].gather(1, following).sum(dtype=torch.float64))
        loss_8bit -= float(rough[:-1].gather(1, following).sum(dtype=torch.float64))
    tokens = sum(len(prompt) for prompt in listed)
    inner = tokens - len(listed)
    return CacheQuality(divergence / tokens, agreement / tokens, loss / inner, loss_8bit / inner, *sizes)
