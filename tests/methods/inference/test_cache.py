"""The KV toolbox: padding, cutting, stacking."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from assay.methods.inference.cache import Span, cut, keys_and_values, left_pad, left_padded_mask, position_ids, unpack


def filled(layers: int = 2, rows: int = 2, tokens: int = 6) -> DynamicCache:
    cache = DynamicCache()
    for index in range(layers):
        keys = torch.arange(rows * 3 * tokens * 4, dtype=torch.float32).reshape(rows, 3, tokens, 4) + 1000 * (index + 1)
        cache.update(keys, -keys, index)
    return cache


def test_left_padding():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_token_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(mask, left_padded_mask([3, 1]))
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_unpack_stacks_spans_to_the_left_padded_batch_in_the_order_asked():
    spans = [Span(1, 0, 2), Span(0, 1, 5), Span(1, 3, 3)]
    before = [(keys.clone(), values.clone()) for keys, values in keys_and_values(filled())]
    packed = filled()
    unpacked = unpack(packed, spans)
    assert unpacked.get_seq_length() == 4
    for (keys, values), (k, v) in zip(keys_and_values(unpacked), before, strict=True):
        assert keys.shape == values.shape == (3, 3, 4, 4)
        for i, span in enumerate(spans):
            assert torch.equal(keys[i, :, 4 - span.length :], k[span.row, :, span.start : span.stop])
            assert torch.equal(values[i, :, 4 - span.length :], v[span.row, :, span.start : span.stop])
            assert not keys[i, :, : 4 - span.length].any()
            assert not values[i, :, : 4 - span.length].any()


def test_unpack_consumes_the_packed_cache():
    packed = filled()
    unpack(packed, [Span(0, 0, 3)])
    assert packed.get_seq_length() == 0


def test_cut_is_a_view_of_one_prompt():
    cache = filled()
    keys, values = cut(cache, Span(1, 2, 5))[1]
    assert keys.shape == (1, 3, 3, 4)
    assert torch.equal(keys[0], cache.layers[1].keys[1, :, 2:5])
    assert torch.equal(values, -keys)
    assert keys.untyped_storage().data_ptr() == cache.layers[1].keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("span", [Span(2, 0, 1), Span(0, 0, 7), Span(0, 4, 3), Span(0, -1, 2)])
def test_unpack_refuses_spans_outside_the_cache(span):
    with pytest.raises(ValueError, match="within 2 rows of 6 tokens"):
        unpack(filled(), [span])


def test_layers_without_keys_are_named():
    cache = filled()
    cache.layers[1].reset()
    with pytest.raises(TypeError, match="layer 1 of the cache"):
        keys_and_values(cache)
