"""The KV toolbox: padding, cutting, stacking."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from assay.methods.core.generation.cache import (
    Span,
    cut,
    keys_and_values,
    left_pad,
    left_padded_mask,
    position_ids,
    unpack,
)


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
    assert left_pad([[], []], pad_token_id=9)[0].dtype == torch.int64
    with pytest.raises(ValueError, match="prompts must hold"):
        left_pad([], pad_token_id=9)


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
@pytest.mark.parametrize("take", [lambda cache, span: unpack(cache, [Span(0, 0, 1), span]), cut])
def test_spans_outside_the_cache_are_refused_and_it_stays_whole(span, take):
    cache = filled()
    with pytest.raises(ValueError, match="within 2 rows of 6 tokens"):
        take(cache, span)
    assert cache.get_seq_length() == 6
    with pytest.raises(ValueError, match="spans must hold"):
        unpack(cache, [])


def test_layers_that_hold_less_than_others_are_named():
    cache = filled()
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=4)
    keys = torch.randn(2, 3, 6, 4)
    cache.layers[1].update(keys, keys)
    with pytest.raises(ValueError, match="2 rows of 3 tokens, which layer 1 holds"):
        unpack(cache, [Span(0, 0, 6)])


def test_sliding_layers_of_a_model_get_the_end_of_each_prompt():
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    wanted = unpack(filled(), [Span(0, 0, 6), Span(1, 1, 4)])
    found = unpack(filled(), [Span(0, 0, 6), Span(1, 1, 4)], config=config)
    assert [type(layer) for layer in found.layers] == [DynamicSlidingWindowLayer] * 2
    assert found.get_seq_length() == 6
    for (keys, values), (k, v) in zip(keys_and_values(found), keys_and_values(wanted), strict=True):
        assert torch.equal(keys, k[:, :, -3:])
        assert torch.equal(values, v[:, :, -3:])


def test_layers_without_keys_are_named():
    cache = filled()
    cache.layers[1].reset()
    with pytest.raises(TypeError, match="layer 1 of the cache"):
        keys_and_values(cache)


def test_padding_takes_whole_numbers_and_masks_of_0_and_1():
    for wrong in ([[1.5]], [["a"]]):
        with pytest.raises(TypeError, match="prompts must be lists of token ids"):
            left_pad(wrong, 0)
    with pytest.raises(TypeError, match="pad_token_id"):
        left_pad([[1]], 0.5)
    with pytest.raises(ValueError, match="lengths must hold at least one"):
        left_padded_mask([])
    with pytest.raises(ValueError, match="lengths must be"):
        left_padded_mask([2, -1])
    with pytest.raises(ValueError, match="attention_mask must hold 0 and 1"):
        position_ids(torch.tensor([[0, 2]]))
