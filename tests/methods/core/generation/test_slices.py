"""Caches taken apart and put together, against layers that were filled in one piece and models that go on from them."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.properties.architectures import CAUSAL, VOCABULARY, build
from transformers import EncoderDecoderCache, MambaConfig, StaticCache
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from assay.methods.core.generation.cache import keys_and_values, left_pad, left_padded_mask, position_ids
from assay.methods.core.generation.rotary import moved
from assay.methods.core.generation.slices import (
    cache_of,
    concatenated,
    held_bytes,
    selected,
    sliced,
    split,
    stacked,
    tensors_of,
)

ATTENDING = tuple(name for name in CAUSAL if name != "mamba")
model_of = functools.cache(build)
LENGTHS = (20, 7, 13, 1, 18, 20, 3, 16)  # windows are 16


def pair(rows, heads, tokens, dim, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, tokens, dim, generator=random, dtype=dtype) for _ in range(2))


def ragged(rows=1, tokens=(6, 3, 9), seed=0):
    """Three layers of different lengths, heads and head dims."""
    shapes = zip(tokens, (3, 1, 4), (8, 16, 6), strict=True)
    return cache_of([pair(rows, heads, n, dim, seed + n) for n, heads, dim in shapes])


def windowed(keys, values, window=4):
    """A sliding layer that was given all these tokens."""
    layer = DynamicSlidingWindowLayer(sliding_window=window)
    layer.update(keys, values)
    return layer


def sliding(tokens, rows=1, seed=0):
    cache = DynamicCache()
    cache.layers = [windowed(*pair(rows, 2, tokens, 8, seed + 100 * tokens))]
    return cache


def same(cache, other):
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in other.layers]
    for index, (layer, wanted) in enumerate(zip(cache.layers, other.layers, strict=True)):
        found, expected = tensors_of(layer, index), tensors_of(wanted, index)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert torch.equal(x, expected[name])
        if found:
            assert layer.get_seq_length() == wanted.get_seq_length()
            assert layer.get_mask_sizes(3) == wanted.get_mask_sizes(3)
    return True


@torch.no_grad()
def run(model, ids, mask=None, cache=None, places=None):
    """Logits after each of `ids`, behind what `cache` holds."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out = model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True)
    return out.logits, cache


def batch(dtype=torch.float32, name="llama"):
    """Eight left-padded prompts, their cache, and the next token of each."""
    model = model_of(name) if dtype == torch.float32 else build(name).to(dtype)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in LENGTHS]
    ids, mask = left_pad(prompts, 0)
    _, cache = run(model, ids, mask, places=position_ids(mask))
    return model, cache, mask, torch.randint(3, VOCABULARY, (8, 1), generator=random)


def step(model, cache, mask, token):
    """Logits after one more token of each row."""
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return run(model, token, mask, cache, position_ids(mask)[:, -1:])[0][:, -1]


def near(found, wanted, tolerance=1e-5):
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    return True


# ------------------------------------------------------------------------------------------------------- models that go on


@pytest.mark.parametrize("name", ATTENDING)
def test_rows_taken_apart_and_put_together_in_another_order_go_on_as_before(name):
    model, cache, mask, token = batch(name=name)
    order = [7, 3, 6, 1]  # without the longest
    parts = split(cache, mask.sum(-1))
    assert [part.get_seq_length() for part in parts] == list(LENGTHS)
    together = stacked([parts[row] for row in order])
    assert together.lengths == [[LENGTHS[row] for row in order]] * 2
    mask_of = left_padded_mask(together.lengths[0])
    picked = selected(cache, [3, 3, 0])
    alone = step(model, parts[6], mask.new_ones(1, 3), token[6:7])
    wanted = step(model, cache, mask, token)
    assert near(step(model, together.cache, mask_of, token[order]), wanted[order])
    assert near(step(model, picked, mask[[3, 3, 0]], token[[3, 3, 0]]), wanted[[3, 3, 0]])
    assert near(alone, wanted[6:7])


@pytest.mark.parametrize("name", ATTENDING)
def test_a_slice_from_the_start_goes_on_from_there_and_slices_join_to_the_whole(name):
    model = model_of(name)
    ids = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(2))
    logits, cache = run(model, ids)
    again, _ = run(model, ids[:, 8:], cache=sliced(cache, 0, 8))
    assert near(again, logits[:, 8:])
    whole = concatenated([sliced(cache, 0, 5), sliced(cache, 5, 6), sliced(cache, 6)])
    assert same(whole, cache)
    one = concatenated([sliced(selected(cache, [0]), 0, 5), sliced(cache, 5)])  # one row in front of both
    assert torch.equal(one.layers[0].keys[1, :, :5], cache.layers[0].keys[0, :, :5])
    assert torch.equal(one.layers[0].keys[1, :, 5:], cache.layers[0].keys[1, :, 5:])


def test_a_text_behind_another_is_moved_to_its_place_first():
    model = model_of("llama")
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(3))
    _, whole = run(model, ids)
    (_, first), (_, second) = run(model, ids[:, :12]), run(model, ids[:, 12:])
    joined = concatenated([first, moved(second, model, 12)])
    assert near(joined.layers[0].keys, whole.layers[0].keys)
    assert near(joined.layers[0].values, whole.layers[0].values)
    assert not torch.allclose(concatenated([first, second]).layers[0].keys, whole.layers[0].keys, atol=1e-3)


def test_in_bfloat16_nothing_is_rounded_again():
    _, cache, mask, _ = batch(torch.bfloat16, "qwen2")
    parts = split(cache, mask.sum(-1))
    again = stacked(parts)
    for (k, v), (wanted_k, wanted_v) in zip(*map(keys_and_values, (again.cache, cache)), strict=True):
        real = mask[:, None, :, None].bool()
        assert k.dtype == v.dtype == torch.bfloat16
        assert torch.equal(k * real, wanted_k * real)
        assert torch.equal(v * real, wanted_v * real)
        assert not (k * ~real).any()


# -------------------------------------------------------------------------------------------------------- layers that differ


def test_layers_of_different_lengths_and_shapes_come_apart_as_they_were_put_together():
    caches = [ragged(tokens=(6, 3, 9)), ragged(tokens=(2, 8, 1), seed=40), ragged(tokens=(4, 4, 4), seed=80)]
    together = stacked(caches)
    assert together.lengths == [[6, 2, 4], [3, 8, 4], [9, 1, 4]]
    assert [tuple(k.shape) for k, _ in keys_and_values(together.cache)] == [(3, 3, 6, 8), (3, 1, 8, 16), (3, 4, 9, 6)]
    assert all(same(part, own) for part, own in zip(split(together.cache, together.lengths), caches, strict=True))
    for (k, v), lengths in zip(keys_and_values(together.cache), together.lengths, strict=True):
        padding = left_padded_mask(lengths)[:, None, :, None] == 0
        assert not (k * padding).any()
        assert not (v * padding).any()
    ends = sliced(caches[0], 2)
    assert [ends.get_seq_length(i) for i in range(3)] == [4, 1, 7]
    assert torch.equal(ends.layers[2].values, caches[0].layers[2].values[:, :, 2:])
    longer = concatenated(caches)
    assert [longer.get_seq_length(i) for i in range(3)] == [12, 15, 14]
    assert torch.equal(longer.layers[1].keys[:, :, 3:11], caches[1].layers[1].keys)


@pytest.mark.parametrize(("a", "b"), [(2, 1), (3, 9), (9, 3), (9, 9), (9, 1), (1, 0), (0, 5)])
def test_sliding_layers_behind_each_other_hold_what_one_filled_at_once_would(a, b):
    (k, v), (k2, v2) = pair(2, 2, a, 8, 1), pair(2, 2, b, 8, 2)
    first, second, whole = DynamicCache(), DynamicCache(), DynamicCache()
    first.layers, second.layers = [windowed(k, v)], [windowed(k2, v2)]
    whole.layers = [windowed(torch.cat([k, k2], 2), torch.cat([v, v2], 2))]
    assert same(concatenated([first, second]), whole)


def test_sliding_layers_side_by_side_hold_the_end_of_each_row():
    caches = [sliding(n) for n in (2, 9, 3)]
    together = stacked(caches)
    assert together.lengths == [[2, 9, 3]]
    layer = together.cache.layers[0]
    assert (layer.get_seq_length(), layer.keys.shape[2], layer.get_mask_sizes(1)) == (9, 3, (4, 6))
    assert not layer.keys[0, :, :1].any()
    assert all(same(part, own) for part, own in zip(split(together.cache, [2, 9, 3]), caches, strict=True))


def test_what_has_left_a_window_is_not_made_up():
    cache = sliding(9)  # holds tokens 6 to 8, the window being 4
    assert same(sliced(cache), cache)
    tail = sliced(cache, 7)
    assert (tail.layers[0].keys.shape[2], tail.get_seq_length()) == (2, 2)
    assert torch.equal(tail.layers[0].keys, cache.layers[0].keys[:, :, 1:])
    with pytest.raises(ValueError, match="layer 0 still holds, the tokens from 6 on: 0 and 8 need those from 5 on"):
        sliced(cache, 0, 8)
    recorded = windowed(*pair(1, 2, 3, 8), window=4)
    recorded.activate_past_recording()
    recorded.update(*pair(1, 2, 6, 8, 5))
    cache.layers = [recorded]
    shorter = sliced(cache, 0, 8).layers[0]
    assert torch.equal(shorter.keys, recorded.keys[:, :, 5:8])
    assert (shorter.get_seq_length(), shorter.get_mask_sizes(1)) == (8, (4, 5))


def test_layers_that_hold_nothing_stay_as_they_are():
    cache = cache_of([pair(2, 2, 5, 8)])
    cache.layers += [DummyLayer(), DynamicLayer()]
    results = [sliced(cache, 1), selected(cache, [1]), concatenated([cache, cache]), *split(cache, [5, 3])]
    results.append(stacked(split(cache, [5, 3])).cache)
    for found in results:
        assert [type(layer) for layer in found.layers] == [DynamicLayer, DummyLayer, DynamicLayer]
        assert not found.layers[2].is_initialized
        found.update(*pair(1, 4, 2, 6), 2)
        assert found.get_seq_length(2) == 2
    assert not cache.layers[2].is_initialized


def test_what_is_given_stays_as_it_is_and_what_comes_out_can_grow_apart():
    cache = ragged(2)
    before = [(k.clone(), v.clone()) for k, v in keys_and_values(cache)]
    results = [sliced(cache, 1, 3), selected(cache, [1, 0, 1]), concatenated([cache, cache]), *split(cache, [3, 1])]
    results.append(stacked(split(cache, [3, 1])).cache)
    for found in results:
        k, v = found.layers[0].keys, found.layers[0].values
        found.update(torch.ones_like(k), torch.ones_like(v), 0)
    for (k, v), (own_k, own_v) in zip(keys_and_values(cache), before, strict=True):
        assert torch.equal(k, own_k)
        assert torch.equal(v, own_v)


def test_a_cache_made_of_tensors_holds_them_without_a_copy_and_knows_the_models_windows():
    k, v = pair(2, 2, 20, 32, dtype=torch.float32)
    cache = cache_of([(k, v), (k, v)], config=model_of("gemma3").config)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    assert torch.equal(cache.layers[0].keys, k[:, :, 5:])  # the last window - 1
    assert cache.layers[1].values.data_ptr() == v.data_ptr()
    assert [layer.get_seq_length() for layer in cache.layers] == [20, 20]
    model = model_of("gemma3")
    ids = torch.randint(3, VOCABULARY, (2, 21))
    logits, _ = run(model, ids)
    plain = DynamicCache()
    run(model, ids[:, :20], cache=plain)
    found, _ = run(model, ids[:, 20:], cache=cache_of(keys_and_values(plain), config=model.config))
    assert near(found, logits[:, 20:])


def test_bytes_are_those_kept_alive():
    cache = ragged()
    assert held_bytes(cache) == 8 * 2 * (3 * 6 * 8 + 3 * 16 + 4 * 9 * 6)
    assert held_bytes(sliced(cache, 0, 1)) == held_bytes(cache)  # views
    small = selected(sliced(cache, 0, 1), [0])  # a copy of the part
    assert held_bytes(small) == 8 * 2 * (3 * 8 + 16 + 4 * 6)
    k, _ = pair(1, 2, 5, 8)
    assert held_bytes(cache_of([(k, k), (k, k)])) == k.nbytes


# -------------------------------------------------------------------------------------------------------------- refusals

DOING = {
    "sliced": sliced,
    "selected": lambda cache: selected(cache, [0]),
    "concatenated": lambda cache: concatenated([cache, cache]),
    "stacked": lambda cache: stacked([cache]),
    "split": lambda cache: split(cache, [1]),
    "held_bytes": held_bytes,
}


@pytest.mark.parametrize("doing", DOING)
def test_other_caches_are_refused_by_name(doing):
    recurrent = DynamicCache(config=MambaConfig(num_hidden_layers=1))
    with pytest.raises(TypeError, match="layer 0 is a LinearAttentionLayer, which keeps a recurrent state"):
        DOING[doing](recurrent)
    static = StaticCache(config=model_of("llama").config, max_cache_len=8)
    with pytest.raises(TypeError, match="layer 0 is a StaticLayer"):
        DOING[doing](static)
    with pytest.raises(TypeError, match="EncoderDecoderCache"):
        DOING[doing](EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(TypeError, match="must be a Cache"):
        DOING[doing]([1])


def test_arguments_are_checked():
    cache = ragged(2)
    for start, stop in ((0, 4), (4, None), (-1, 2), (2, 1)):
        with pytest.raises(ValueError, match="start|stop"):
            sliced(cache, start, stop)
    with pytest.raises(TypeError, match="start"):
        sliced(cache, 0.5)
    for rows in ([2], [-1], [], torch.tensor([5])):
        with pytest.raises(ValueError, match="rows"):
            selected(cache, rows)
    for rows in ([0.5], [True], torch.tensor([0.0])):
        with pytest.raises(TypeError, match="rows"):
            selected(cache, rows)
    for function in (concatenated, stacked):
        with pytest.raises(ValueError, match="caches must hold at least one"):
            function([])
        with pytest.raises(TypeError, match="caches must be a list"):
            function(cache)
        with pytest.raises(ValueError, match="as many layers"):
            function([ragged(), sliding(3)])
        with pytest.raises(TypeError, match="layer 0 is DynamicLayer and DynamicSlidingWindowLayer 4"):
            function([cache_of([pair(1, 2, 3, 8)]), sliding(3)])
        with pytest.raises(ValueError, match="same heads and head dims, layer 0"):
            function([cache_of([pair(1, 2, 3, 8)]), cache_of([pair(1, 2, 3, 6)])])
        with pytest.raises(TypeError, match="dtype"):
            function([cache_of([pair(1, 2, 3, 8)]), cache_of([pair(1, 2, 3, 8, dtype=torch.float32)])])
        other = DynamicCache()
        other.layers = [windowed(*pair(1, 2, 3, 8), window=5)]
        with pytest.raises(ValueError, match="layer 0 is DynamicSlidingWindowLayer 4 and DynamicSlidingWindowLayer 5"):
            function([sliding(3), other])
    with pytest.raises(ValueError, match="caches must have 3 rows or one, got 2"):
        concatenated([ragged(2), ragged(3)])
    with pytest.raises(ValueError, match="one row each, got one of 2"):
        stacked([ragged(2)])
    for lengths in ([3], [4, 4], [[6, 6], [3, 3]], [[6, 6], [3, 3], [9]], [-1, 2]):
        with pytest.raises(ValueError, match="lengths"):
            split(cache, lengths)
    for layers in ([], [(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))], [pair(1, 2, 3, 8), pair(2, 2, 3, 8)]):
        with pytest.raises(ValueError, match="layers|keys"):
            cache_of(layers)
    k, v = pair(1, 2, 3, 8)
    with pytest.raises(ValueError, match="values"):
        cache_of([(k, v[:, :, :2])])
    with pytest.raises(ValueError, match="as many as the config has, 2, got 1"):
        cache_of([(k, v)], config=model_of("llama").config)
    with pytest.raises(TypeError, match="layer 0 is a LinearAttentionLayer"):
        cache_of([(k, v)], config=MambaConfig(num_hidden_layers=1))
