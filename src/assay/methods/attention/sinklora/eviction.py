"""A cache with a budget: heavy hitters and recent tokens (H2O), sinks and recent tokens, or recent tokens alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from assay import checks
from assay.methods.attention.sinklora.tuning import refuses
from assay.methods.core import kernels
from assay.methods.core.attention.integration import by_sdpa, causal_mask, limits_of, set_attention

Policy = Literal["h2o", "sinks", "local"]
NAME = "assay_eviction"  # as attn_implementation
CHUNK = 1 << 24  # scores held at a time


class EvictionLayer(CacheLayerMixin):
    """One layer of an `EvictionCache`. Entries lie in slots, in no order: rotary positions are in the keys already.

    `keys`, `values` (batch, key heads, n, d), `positions` int64 (batch, key heads, n), -1 on padding, and `scores` float32 alike:
    the attention each entry got so far, summed over queries and the query heads that share it.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    STATE = ("_keys", "_values", "_positions", "_scores")

    def __init__(self, budget: int | float, policy: Policy = "h2o", sinks: int = 4):
        super().__init__()
        self.budget, self.policy, self.sinks = budget, policy, sinks
        self.seen = 0  # tokens that went by
        self.used = 0  # slots that are filled
        self.limit = 0  # the budget in entries; a share is one of the prompt so far
        self.padded = False
        self._observed, self._decoding = True, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        self._keys, self._values = (x.new_empty(batch, heads, 0, x.shape[3]) for x in (key_states, value_states))
        self._positions = torch.empty(batch, heads, 0, dtype=torch.int64, device=key_states.device)
        self._scores = torch.empty(batch, heads, 0, device=key_states.device)
        self._first = torch.zeros(batch, dtype=torch.int64, device=key_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def recent(self) -> int:
        """How many entries of the budget are reserved for the newest tokens."""
        return self.limit - {"h2o": self.limit // 2, "sinks": self.sinks, "local": 0}[self.policy]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens; returns everything held for the attention function, new tokens last as long as the budget is not used up."""
        if not self._observed:
            raise RuntimeError(f"an EvictionCache needs attn_implementation={NAME!r}: call use_eviction(model) first")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, new, _ = key_states.shape
        if new > 1 or not self.limit:
            self.set_limit(self.seen + new, more=isinstance(self.budget, float))
        elif not self._decoding:
            self.set_limit(self.seen)
        self._decoding = new == 1
        positions = torch.arange(self.seen, self.seen + new, device=key_states.device).expand(batch, heads, -1)
        self.seen += new
        if new == 1 and self.used >= self.limit:
            slot = self._priority().argmin(-1, keepdim=True)  # the one to go
            wide = slot[..., None]
            self._keys[:, :, : self.used].scatter_(2, wide.expand(-1, -1, -1, key_states.shape[3]), key_states)
            self._values[:, :, : self.used].scatter_(2, wide.expand(-1, -1, -1, value_states.shape[3]), value_states)
            self._positions[:, :, : self.used].scatter_(2, slot, positions)
            self._scores[:, :, : self.used].scatter_(2, slot, 0.0)
        else:
            self._append(key_states, value_states, positions)
        self._observed = False
        keys: Any = self._keys[:, :, : self.used]
        keys.evicting = self  # the attention function finds its way back by it
        return keys, self._values[:, :, : self.used]

    def set_limit(self, tokens: int, *, more: bool = False) -> None:
        """Fix the budget in entries, a share being one of `tokens` less the padding that all rows have.

        Raises ValueError where the sinks would fill it, unless `more` of the prompt may come.
        """
        if self.padded:
            tokens = max(1, tokens - int(self._first.min()))
        self.limit = max(2, math.ceil(self.budget * tokens)) if isinstance(self.budget, float) else self.budget
        if self.policy == "sinks" and self.limit <= self.sinks:
            if not more:
                raise ValueError(f"budget must exceed the {self.sinks} sinks, got {self.limit} entries")
            self.limit = self.sinks + 1  # a larger share will be due when the rest of the prompt has come

    def _append(self, *new: Tensor) -> None:
        room = self._keys.shape[2]
        total = self.used + new[0].shape[2]
        if total > room:  # in larger steps, as a list grows; never beyond the budget for single tokens
            room = total if total > self.limit else min(self.limit, total + total // 4 + 64)
            for name in self.STATE:
                old = getattr(self, name)
                grown = old.new_zeros(*old.shape[:2], room, *old.shape[3:])
                grown[:, :, : self.used] = old[:, :, : self.used]
                setattr(self, name, grown)
        for name, x in zip(self.STATE, new, strict=False):
            getattr(self, name)[:, :, self.used : total] = x
        self._scores[:, :, self.used : total] = 0.0
        self._hold(total)

    def _hold(self, count: int) -> None:
        self.used = count
        self.keys, self.values = self._keys[:, :, :count], self._values[:, :, :count]

    @property
    def positions(self) -> Tensor:
        """Where the entries stood in the text, int64 (batch, key heads, n), -1 on padding; a view, not a copy."""
        return self._positions[:, :, : self.used]

    @property
    def scores(self) -> Tensor:
        """The attention each entry got so far, float32 (batch, key heads, n); a view, not a copy."""
        return self._scores[:, :, : self.used]

    def _priority(self) -> Tensor:
        """(batch, key heads, n) float32: the lowest is evicted first. Padding always goes, protected entries never."""
        position = self.positions.float()
        priority = self.scores if self.policy == "h2o" else position
        keep = self.positions > self.seen - 1 - self.recent
        if self.policy == "sinks":
            real = self.positions.masked_fill(self.positions < 0, self.seen)
            keep = keep | (real - self._first[:, None, None] < self.sinks)
        return priority.masked_fill(keep, math.inf).masked_fill(self.positions < 0, -math.inf)

    def observe(self, weights: Tensor | None) -> None:
        """Add the attention (batch, key heads, n) that the entries got, if the policy uses it, then evict down to the budget."""
        if weights is not None:
            self.scores.add_(weights)
        self._observed = True
        if self.used > self.limit:
            kept = self._priority().topk(self.limit, dim=-1).indices.sort(-1).values
            for name in self.STATE:
                old = getattr(self, name)[:, :, : self.used]
                index = kept if old.ndim == 3 else kept[..., None].expand(-1, -1, -1, old.shape[3])
                setattr(self, name, old.gather(2, index))
            self._hold(self.limit)

    def knows(self, starts: Tensor) -> bool:
        """Whether these are the first tokens of the rows already, and nothing is to be marked."""
        return self.padded and torch.equal(self._first, starts)

    def mark_padding(self, starts: Tensor, new: int) -> None:
        """Tokens before starts (batch,) are padding: they are evicted first, and a share of the prompt does not count them."""
        self._first, self.padded = starts, True
        self.positions.masked_fill_(self.positions < starts[:, None, None], -1)
        if new > 1:
            self.set_limit(self.seen, more=isinstance(self.budget, float))

    def smaller(self, budget: int | float, policy: Policy, sinks: int) -> EvictionLayer:
        """A copy cut down to another budget now, by the scores gathered so far; a share refers to all tokens seen."""
        other = EvictionLayer(budget, policy, sinks)
        other.lazy_initialization(self._keys, self._values)
        for name in self.STATE:
            setattr(other, name, getattr(self, name)[:, :, : self.used].clone())
        other.seen, other._first, other.padded = self.seen, self._first, self.padded
        other._hold(self.used)
        other.set_limit(self.seen)
        other.observe(None)
        return other

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, self.seen - self.used

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "an EvictionCache cannot go back, because what it has evicted is gone: start from an empty one"
        )

    def reset(self) -> None:
        self.__init__(self.budget, self.policy, self.sinks)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for name in (*self.STATE, "_first"):
                setattr(self, name, function(getattr(self, name)))
            self._hold(self.used)


class EvictionCache(Cache):
    """A transformers cache that never holds more than `budget` entries in each layer and key head.

    `budget` counts entries, or, a float in (0, 1], is a share of the prompt (the longest of a batch). Policies: "h2o" keeps half
    recent tokens and half those with the most attention so far; "sinks" the first `sinks` tokens and the recent ones; "local" the
    recent ones. The prompt is attended in full; then, and at every token, what the budget does not hold is gone for good. A prompt
    that comes in chunks (all that come several tokens at a time) is cut down after each, to the share of what has come so far. A
    budget that holds everything is exact. Give it to `generate(..., cache=EvictionCache(0.5))` of a model prepared by
    `use_eviction`. Left padding, beams and several tokens a step work; going back (assisted decoding) and gradients do not.
    Raises TypeError and ValueError for other arguments.

    >>> EvictionCache(0.5, policy="sinks", sinks=2).entries
    []
    """

    def __init__(self, budget: int | float, *, policy: Policy = "h2o", sinks: int = 4):
        _check_budget(budget, policy, sinks)
        self.budget, self.policy, self.sinks = budget, policy, sinks
        make: Any = functools.partial(EvictionLayer, budget, policy, sinks)
        super().__init__(layer_class_to_replicate=make)

    def smaller(self, budget: int | float, *, policy: Policy = "h2o", sinks: int = 4) -> EvictionCache:
        """A copy with another budget (a float: a share of all tokens seen) and policy, as if the prompt had been run with it.

        This holds as long as this cache has evicted nothing; "h2o" needs the scores of a cache that is "h2o" itself.
        Raises ValueError otherwise.
        """
        if policy == "h2o" and self.policy != "h2o":
            raise ValueError(f"policy 'h2o' needs the scores of a cache of that policy, this one is {self.policy!r}")
        layers: Any = self.layers
        if any(layer.used < layer.seen for layer in layers):
            raise ValueError(
                "this cache has evicted entries already; start from one whose budget held the whole prompt"
            )
        other = EvictionCache(budget, policy=policy, sinks=sinks)
        other.layers = [layer.smaller(budget, policy, sinks) for layer in layers]
        return other

    @property
    def entries(self) -> list[int]:
        """Entries held in each layer (a key head)."""
        layers: Any = self.layers
        return [layer.used for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        layers: Any = self.layers
        return sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))


def _check_budget(budget: int | float, policy: str, sinks: int) -> None:
    if isinstance(budget, float):
        checks.number("budget", budget, above=0, high=1)
    else:
        checks.whole("budget", budget, low=2)
    checks.choice("policy", policy, get_args(Policy))
    checks.whole("sinks", sinks, low=0)
    if policy == "sinks" and not isinstance(budget, float) and budget <= sinks:
        raise ValueError(f"budget must exceed the {sinks} sinks, got {budget} entries")


def use_eviction(model: nn.Module) -> nn.Module:
    """Change a transformers model, in place, so that an `EvictionCache` learns how much attention its entries get.

    Without such a cache it attends by SDPA. Raises ValueError for a model whose attention cannot be replaced, is not causal, or has
    sinks or sliding windows of its own.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if reason := refuses(model):
        raise ValueError(f"the model's attention cannot be replaced: {reason}")
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    return set_attention(model, NAME)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """`causal_mask`, in which the first tokens of the rows count from the text's beginning, whatever was evicted since."""
    if allow_is_causal_skip and attention_mask is not None and not isinstance(q_offset, Tensor):
        tokens = attention_mask[:, : q_offset + q_length].bool()
        starts = tokens.shape[1] - tokens.sum(-1)
        if (tokens == (torch.arange(tokens.shape[1], device=tokens.device) >= starts[:, None])).all():
            return starts[:, None, None, None] if starts.any() else None
        allow_is_causal_skip = False  # right padding, which a cache would take for tokens
    return causal_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    limits = limits_of(attention_mask)
    layer: EvictionLayer | None = getattr(key, "evicting", None)
    if layer is None:
        return by_sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    new = query.shape[2]
    if limits is None:
        raise ValueError("an EvictionCache takes plain or left-padded prompts, not other masks")
    if limits.start is not None and not layer.knows(
        limits.start
    ):  # padding may go on where a prompt comes token by token
        layer.mark_padding(limits.start, new)
    scored = layer.policy == "h2o"
    if layer.seen == new > 1 and not scored and not layer.padded:
        layer.observe(None)
        return by_sdpa(module, query, key, value, None, 0.0, scaling, is_causal, kwargs)
    kernels.ran("attention", "scored")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, weights = scored_attention(query, key, value, scale, layer.positions if layer.padded else None)
    layer.observe(weights if scored else None)
    return out.transpose(1, 2).contiguous(), None


def scored_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens, and what each key got: (batch, heads, new, d) and float32 (batch, key heads, n).

    q (batch, heads, new, d) belongs to the last `new` of k, v (batch, key heads, n, d), causally; keys before them are all seen. The
    second is summed over queries and over the query heads that share a key. `positions` (batch, key heads, n) is -1 on padding.
    """
    batch, heads, new, _ = q.shape
    shared, n = k.shape[1], k.shape[2]
    got = torch.zeros(batch, shared, n, device=q.device)
    outputs = []
    step = max(1, CHUNK // max(1, batch * heads * n))
    for start in range(0, new, step):
        part = q[:, :, start : start + step]
        rows = part.shape[2]
        scores = (part.reshape(batch, shared, -1, q.shape[3]) @ k.transpose(-1, -2)).float() * scale
        scores = scores.view(batch, shared, -1, rows, n)
        seen = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool, device=q.device)
        if new > 1:
            place = torch.arange(n, device=q.device) - (n - new)
            seen = seen & (place <= torch.arange(start, start + rows, device=q.device)[:, None])
        if positions is not None:
            seen = (
                seen
                & (positions >= 0)[:, :, None, None]
                & (positions[:, :, None, n - new + start :][..., :rows, None] >= 0)
            )
        if new > 1 or positions is not None:
            some = seen.any(-1, keepdim=True)
            scores = scores.masked_fill(~(seen | ~some), -math.inf).softmax(-1).masked_fill(~some, 0.0)
        else:
            scores = scores.softmax(-1)
        got += scores.sum((2, 3))
        outputs.append((scores.to(v.dtype).flatten(2, 3) @ v).view(batch, heads, rows, -1))
    return torch.cat(outputs, 2), got
