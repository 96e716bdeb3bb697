"""8-bit keys and values, against a cache that rounds the same way and keeps floating-point numbers."""

from __future__ import annotations

import math

import pytest
import torch
from tests.properties.architectures import VOCABULARY, build
from transformers import MambaConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from assay.methods.core.generation import kv8
from assay.methods.core.generation.cache import keys_and_values, left_pad, position_ids
from assay.methods.core.generation.eviction import evicted, kept, random_scores
from assay.methods.core.generation.kv8 import Int8Cache, Int8Layer, quality, restored, rounded
from assay.methods.core.generation.rotary import moved
from assay.methods.core.generation.slices import (
    cache_of,
    concatenated,
    held_bytes,
    selected,
    sliced,
    split,
    stacked,
)

LENGTHS = (20, 7, 13, 1, 18, 20, 3, 16)
FULL = ("llama", "llama-tied", "qwen2", "phi3", "gpt2", "mixtral", "opt", "biogpt", "gemma3", "gpt_oss")


class RoundedLayer(DynamicLayer):
    """The oracle: numbers rounded to 8 bits on arrival and kept as they are."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(*(fake(x) for x in (key_states, value_states)))


def fake(x):
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    up = scale.half()
    up = torch.where(up.float() < scale, (up.view(torch.int16) + 1).view(torch.float16), up).float()
    return (torch.where(up > 0, (x.float() / up).round(), 0.0) * up).to(x.dtype)


def oracle(model):
    layers = [
        RoundedLayer() if type(layer) is DynamicLayer else layer for layer in DynamicCache(config=model.config).layers
    ]
    return Cache(layers=layers)


@torch.no_grad()
def run(model, ids, cache, mask=None, places=None):
    return model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True).logits


def some_ids(rows=2, tokens=20, seed=0):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def filled(rows=2, tokens=9, seed=0, dtype=torch.float32):
    """Two layers of different heads and head dims, in 8 bits, and the numbers they were given."""
    random = torch.Generator().manual_seed(seed)
    pairs = [
        tuple(torch.randn(rows, h, tokens, d, generator=random).to(dtype) for _ in range(2))
        for h, d in ((3, 8), (1, 16))
    ]
    cache = Cache(layers=[Int8Layer(), Int8Layer()])
    for index, (k, v) in enumerate(pairs):
        cache.update(k, v, index)
    return cache


def as_floats(cache):
    """The same cache with what its layers stand for."""
    return cache_of([layer.restored() for layer in cache.layers])


# -------------------------------------------------------------------------------------------------------------- rounding


def test_numbers_are_off_by_half_a_scale_at_most_and_no_code_is_cut_off():
    random = torch.Generator().manual_seed(0)
    x = (
        torch.randn(400, 64, generator=random, dtype=torch.float64)
        * torch.logspace(-12, 6, 400, dtype=torch.float64)[:, None]
    )
    x[7], x[8, 1:], x[9] = 0.0, 0.0, 3.0
    codes, scales = rounded(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert (codes.shape, scales.shape) == (x.shape, (400, 1))
    exact = x.abs().amax(-1, keepdim=True) / 127
    assert (scales.double() >= exact * (1 - 1e-6)).all()
    assert (scales.double() <= exact * (1 + 2**-10) + 2**-24).all()
    assert int(codes.abs().max()) == 127
    error = (codes.double() * scales.double() - x).abs()
    assert (error <= scales.double() * 0.5001).all()
    assert not codes[7].any()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert restored(codes, scales, dtype).dtype == dtype
    assert torch.equal(restored(codes, scales, torch.float32), codes.float() * scales.float())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 9e6])
def test_what_has_no_8_bit_form_does_not_pass_for_a_number(wrong):
    x = torch.ones(3, 8)
    x[1, 4] = wrong
    found = restored(*rounded(x), torch.float32)
    assert not found[1].isfinite().all()
    assert torch.allclose(found[[0, 2]], torch.ones(2, 8), atol=0.01)
    assert not found[1, 4].isfinite()


def test_tokens_are_rounded_once_and_stored_as_bytes():
    layer, whole = Int8Layer(), torch.randn(2, 3, 9, 8)
    for part in whole.split([4, 1, 1, 3], 2):
        before = {name: getattr(layer, name) for name in Int8Layer.TENSORS} if layer.is_initialized else {}
        keys, values = layer.update(part, -part)
        for name, x in before.items():
            assert torch.equal(getattr(layer, name)[:, :, : x.shape[2]], x)
    assert torch.equal(keys, restored(*rounded(whole), torch.float32))
    assert torch.equal(values, -keys)
    stored = [x for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    assert sorted(x.dtype.itemsize for x in stored) == [1, 1, 2, 2]
    assert held_bytes(Cache(layers=[layer])) == 2 * 2 * 3 * 9 * (8 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_against_those_of_a_plain_cache(dtype):
    model, ids = build("llama").to(dtype), some_ids(8, 40)
    plain, small = DynamicCache(config=model.config), Int8Cache(model.config)
    run(model, ids, plain)
    run(model, ids, small)
    assert held_bytes(small) == 2 * 2 * 8 * 2 * 40 * (32 + 2)  # layers, keys and values, rows, heads, tokens, a head
    assert held_bytes(small) / held_bytes(plain) == 34 / (32 * dtype.itemsize)
    assert small.layers[0].restored()[0].dtype == dtype


# ---------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", FULL)
def test_a_prompt_at_once_in_chunks_and_token_by_token_see_the_same_and_generate_runs(name):
    model, ids = build(name, experts_implementation="eager").double(), some_ids()  # 1e-7 may round a code the other way
    whole = run(model, ids, Int8Cache(model.config))
    limit = 1e-6 * float(whole.abs().max())
    cache = Int8Cache(model.config)
    parts = [run(model, part, cache) for part in ids.split([11, 7, 1, 1], 1)]
    assert float((torch.cat(parts, 1) - whole).abs().max()) < limit
    assert torch.equal(run(model, ids, oracle(model)), whole)
    plain = run(model, ids, DynamicCache(config=model.config))
    assert limit < float((whole - plain).abs().max()) < 0.1 * float(plain.abs().max())
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, cache=Int8Cache(model.config), **settings)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, cache=oracle(model), **settings))
    assert found.shape == (2, 25)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padded_rows_see_what_they_would_alone(name, dtype):
    model = build(name).to(dtype)
    prompts = [some_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]
    ids, mask = left_pad(prompts, 0)
    cache = Int8Cache(model.config)
    found = run(model, ids, cache, mask, position_ids(mask))[:, -1]
    for row, prompt in enumerate(prompts):
        wanted = run(model, torch.tensor([prompt]), Int8Cache(model.config))[0, -1]
        near = {torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]  # a code may round the other way
        assert float((found[row] - wanted).abs().max()) < near * float(wanted.abs().max())


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_assisted_decoding(options):
    model = build("llama", initializer_range=0.3)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, cache=Int8Cache(model.config), **settings, **options)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, cache=oracle(model), **settings, **options))
    if "num_beams" not in options:  # the drafts change nothing
        plain = model.generate(ids, attention_mask=mask, cache=Int8Cache(model.config), **settings)
        assert torch.equal(found, plain)


def test_other_layers_stay_what_they_are():
    config = build("gemma3").config
    assert [type(layer) for layer in Int8Cache(config).layers] == [DynamicSlidingWindowLayer, Int8Layer]
    with pytest.raises(ValueError, match="a full-attention layer to keep in 8 bits, got DynamicSlidingWindowLayer"):
        Int8Cache(build("mistral").config)
    with pytest.raises(ValueError, match="got LinearAttentionLayer"):
        Int8Cache(MambaConfig(num_hidden_layers=1))
    with pytest.raises(TypeError, match="config must be a transformers config, got NoneType None"):
        Int8Cache(None)


# ----------------------------------------------------------------------------------------------- the layer and the toolbox


def test_the_layers_own_methods():
    def both(change):
        cache = filled()
        plain = as_floats(cache)
        for one in (cache, plain):
            change(one)
        for (k, v), layer in zip(keys_and_values(plain), cache.layers, strict=True):
            assert torch.equal(layer.restored()[0], k)
            assert torch.equal(layer.restored()[1], v)
        assert cache.get_seq_length() == plain.get_seq_length()
        assert cache.get_mask_sizes(2, 0) == plain.get_mask_sizes(2, 0)

    both(lambda cache: cache.crop(-4))
    both(lambda cache: cache.crop(0))
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    both(lambda cache: cache.batch_select_indices(torch.tensor([1])))
    both(lambda cache: cache.batch_repeat_interleave(3))
    cache = filled()
    with pytest.raises(ValueError, match="tokens_to_remove must be at most 0"):
        cache.crop(3)
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    cache.reset()
    assert cache.get_seq_length() == 0
    assert held_bytes(cache) == 0
    with pytest.raises(ValueError, match="holds no tokens"):
        cache.layers[0].restored()
    cache.reorder_cache(torch.tensor([0]))
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_eviction_work_on_codes(dtype):
    cache = filled(dtype=dtype)
    keep = [kept(random_scores((2, heads, 9), heads), 4) for heads in (3, 1)]
    changes = {
        "sliced": lambda one: sliced(one, 2, 7),
        "selected": lambda one: selected(one, [1, 0, 1]),
        "concatenated": lambda one: concatenated([one, sliced(one, 3)]),
        "stacked": lambda one: stacked(split(one, [9, 4])).cache,
        "evicted": lambda one: evicted(one, keep).cache,
    }
    for change in changes.values():
        found, wanted = change(cache), change(as_floats(cache))
        assert [type(layer) for layer in found.layers] == [Int8Layer, Int8Layer]
        for layer, (k, v) in zip(found.layers, keys_and_values(wanted), strict=True):
            assert layer.restored()[0].dtype == dtype
            assert torch.equal(layer.restored()[0], k)
            assert torch.equal(layer.restored()[1], v)
        found.update(torch.ones(len(k), 3, 1, 8, dtype=dtype), torch.ones(len(k), 3, 1, 8, dtype=dtype), 0)
        assert found.get_seq_length() == wanted.get_seq_length() + 1
    assert cache.get_seq_length() == 9


def test_what_needs_the_keys_themselves_says_so():
    cache = filled()
    with pytest.raises(TypeError, match=r"layer 0 of the cache \(Int8Layer\) holds no keys and values"):
        keys_and_values(cache)
    with pytest.raises(TypeError, match="keys as computed, layer 0 is a Int8Layer"):
        moved(cache, [None, None], 3)
    with pytest.raises(TypeError, match="layer 0 is DynamicLayer and Int8Layer"):
        concatenated([as_floats(cache), cache])


# --------------------------------------------------------------------------------------------------------------- quality


def test_quality_is_what_it_says():
    model = build("llama", initializer_range=0.2)
    prompts = [some_ids(1, n, seed=n)[0].tolist() for n in (9, 30, 2)]
    found = quality(model, prompts)
    logs, rough, wanted = [], [], []
    sizes = [0, 0]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for place, (cache, into) in enumerate(((DynamicCache(), logs), (Int8Cache(model.config), rough))):
            into.append(run(model, ids, cache)[0].double().log_softmax(-1))
            sizes[place] += held_bytes(cache)
        wanted.append(ids[0, 1:])
    p, q = torch.cat(logs), torch.cat(rough)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for loss, one in ((found.loss, logs), (found.loss_8bit, rough)):
        exact = torch.cat([log[:-1].gather(1, tokens[:, None]) for log, tokens in zip(one, wanted, strict=True)])
        assert loss == pytest.approx(-float(exact.mean()), rel=1e-5)
    assert [found.bytes_plain, found.bytes_8bit] == sizes


def test_quality_notices_fewer_levels(monkeypatch):
    model, prompts = build("llama", initializer_range=0.2), some_ids(2, 30).tolist()
    good = quality(model, prompts)
    monkeypatch.setattr(kv8, "LEVELS", 3)
    bad = quality(model, prompts)
    assert bad.divergence > 50 * good.divergence
    assert bad.agreement < good.agreement
    assert good.divergence > 0


@pytest.mark.model
def test_eight_bits_cost_little_on_real_weights(smollm2_slice):
    text = (
        "The licence of a program says what may be done with it. A cache keeps what was computed, to save doing it again. "
        * 3
    )
    found = quality(smollm2_slice.model, [smollm2_slice.tokenizer(text)["input_ids"]])
    assert found.divergence < 2e-3
    assert found.agreement > 0.97
    assert abs(found.loss_8bit - found.loss) < 2e-3 * found.loss
    assert found.bytes_8bit < 0.27 * found.bytes_plain  # float32


def test_arguments_are_checked():
    model = build("llama")
    with pytest.raises(ValueError, match="at least 2 tokens each, got one of 1"):
        quality(model, [[5, 6], [7]])
    with pytest.raises(ValueError, match="prompts"):
        quality(model, [])
    with pytest.raises(TypeError, match="prompts"):
        quality(model, [[0.5, 1.0]])
    with pytest.raises(TypeError, match="x must hold floating"):
        rounded(torch.ones(3, dtype=torch.int64))
    for wrong in (torch.tensor(1.0), torch.ones(3, 0)):
        with pytest.raises(ValueError, match="x must have a last dimension"):
            rounded(wrong)
