"""May the last tokens be taken back from a cache? Not where a window has let go of what would come into it again."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from assay import checks


def croppable(cache: Cache, tokens_to_remove: int, length: int) -> int:
    """`tokens_to_remove` of `Cache.crop`, a number below zero, checked for all layers before one of them is cut.

    `length` is how many tokens may be taken back at most. Raises ValueError for more, and where a layer's window no longer holds what it
    would see again (transformers' `activate_past_recording` keeps that); TypeError for what is no whole number.

    >>> from transformers import DynamicCache
    >>> croppable(DynamicCache(), 0, 5)
    0
    """
    count = -checks.whole("tokens_to_remove", tokens_to_remove, low=-length, high=0)
    for layer in cache.layers:
        if count and isinstance(layer, DynamicSlidingWindowLayer):
            keys: Any = layer.keys
            if keys.shape[-2] < min(layer.sliding_window - 1, layer.get_seq_length() - count) + count:
                raise ValueError(
                    f"tokens_to_remove must be 0: a window of {layer.sliding_window} has left tokens behind that would come into it "
                    f"again, got {tokens_to_remove}; call activate_past_recording before the tokens are read"
                )
    return -count
