"""The split inside `model.generate`: a cache whose keys and values lie in a pool, and an attention that ships queries there.

    with offloaded(model, pool) as cache:
        model.generate(input_ids, attention_mask=mask, cache=cache, max_new_tokens=32)

Any decoder of transformers that calls its `AttentionInterface` will do. The prompt is attended to here, in one piece, and its keys and
values leave layer by layer. A token's query, key and value come out of a model's own code together, so that
nothing overlaps: `SplitDecoder` is the fast way, this one reaches more models and all of `generate` but beams and assistants.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from assay.methods.serving.attention_offloading.pool import Pool
from assay.methods.serving.attention_offloading.slicing import attention_named, refuse_odd

NAME = "assay_attention_offloading"
_current = threading.local()  # the layer whose `update` the next attention of this thread belongs to


@contextmanager
def offloaded(model: nn.Module, pool: Pool) -> Iterator[Any]:
    """The model's attention in `pool`: gives the cache to generate with, one call of `generate` a cache. After it the model is as before.

    Raises ValueError for a model whose attention cannot be offloaded, before anything is changed.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from assay.methods.core.attention.integration import can_register, causal_mask, has_sinks

    if why := can_register(model):
        raise ValueError(f"model must be one whose attention can be offloaded: {why}")
    if has_sinks(model):
        raise ValueError(
            f"model must be one whose attention can be offloaded: that of {type(model).__name__} has sinks"
        )
    AttentionInterface.register(NAME, _entry)
    AttentionMaskInterface.register(NAME, causal_mask)
    cache = _cache(model, pool)
    with attention_named(model, NAME):
        try:
            yield cache
        finally:
            cache.reset()


def _cache(model: nn.Module, pool: Pool) -> Any:
    """A cache of transformers whose layers keep nothing."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    from assay.methods.core.attention.integration import windows

    found: Any = model
    config = found.config.get_text_config()
    heads = config.num_attention_heads
    sizes = [window or 0 for window in windows(model)]
    slots: list[int] = []  # the batch's, once the prompt is there

    class Layer(CacheLayerMixin):
        """Counts the tokens of a layer, and hands what is new to the attention that follows."""

        is_sliding = False
        is_croppable = False

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.pool, self.window = number, pool, sizes[number]
            self.seen = 0

        @property
        def slot(self) -> int:
            return slots[0]

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.seen and key_states.shape[2] != 1:
                raise ValueError(
                    f"tokens must come one by one behind the prompt, which comes in one piece, got {key_states.shape[2]}"
                )
            self.is_initialized = True
            self.seen += key_states.shape[2]
            _current.layer = self
            return key_states, value_states

        def begin(self, rows: int, kv_heads: int, starts: Tensor | None) -> None:
            """Open the batch, which the first layer that runs does for all."""
            if not slots:
                firsts = [0] * rows if starts is None else starts.tolist()
                slots.append(pool.free_slot())
                pool.open(slots[0], heads=heads, kv_heads=kv_heads, starts=firsts, windows=sizes)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.seen + query_length, 0

        def get_seq_length(self) -> int:
            return self.seen

        def get_max_length(self) -> int:
            return -1

        def reset(self) -> None:
            self.seen, self.is_initialized = 0, False
            while slots:
                pool.close_batch(slots.pop())

        def _refuse(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("an offloaded cache is not reordered, cropped or repeated: no beams, no assistants")

        crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse

    return Cache(layers=[Layer(number) for number in range(len(sizes))])


def _entry(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer: here for a prompt, in the pool for a token behind it."""
    from assay.methods.core.attention.integration import limits_of
    from assay.methods.core.attention.plan import AttentionPlan, execute

    layer = getattr(_current, "layer", None)
    if layer is None:
        raise ValueError(f"cache must be the one that `offloaded` gave, which {type(module).__name__} did not use")
    _current.layer = None
    limits = limits_of(attention_mask)
    refuse_odd(module, attention_mask if limits is None else None, dropout, kwargs)
    assert limits is not None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    tokens = query.shape[2]
    if layer.seen == tokens:  # the prompt
        plan = AttentionPlan(tokens, tokens, key_start=limits.start, window=limits.window)
        output = execute(plan, query, key, value, scale=scale)
        layer.begin(query.shape[0], key.shape[1], limits.start)
        gone = max(0, tokens - (layer.window - 1)) if layer.window else 0
        layer.pool.fill(layer.slot, layer.number, key[:, :, gone:], value[:, :, gone:], dropped=gone)
    else:
        layer.pool.whole(layer.slot, layer.number, query, key, value, scale)
        output = layer.pool.take(layer.slot, layer.number).to(query.device)
    return output.transpose(1, 2).contiguous(), None
