"""Keys at other positions, against models that were run there."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from tests.properties.architectures import CAUSAL, DECODER, GROUPED, VOCABULARY, build
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from assay.methods.core.generation.cache import keys_and_values, left_pad, position_ids
from assay.methods.core.generation.rotary import Rotary, moved, repositioned, rotaries_of

FREQUENCY = 10000.0 ** (-torch.arange(4) / 4)
OTHERS = {  # what the sweep's models leave out
    "gptj": (
        "GPTJ",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 16},
    ),  # neighbours, a part
    "gpt_neox": ("GPTNeoX", {**DECODER, "rotary_pct": 0.25}),  # halves, a part
    "cohere": ("Cohere", DECODER),  # neighbours, all
    "glm": ("Glm", {**GROUPED, "partial_rotary_factor": 0.5}),  # neighbours, a part
    "smollm3": ("SmolLM3", {**DECODER, "no_rope_layers": [1, 0]}),  # a layer that does not turn
}
ROTARY = (*(name for name in CAUSAL if name not in ("gpt2", "opt", "biogpt", "mamba")), *OTHERS)


@functools.cache
def model_of(name):
    if name not in OTHERS:
        return build(name)
    kind, settings = OTHERS[name]
    config = getattr(transformers, f"{kind}Config")(
        **{**settings, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def llama(**rope):
    torch.manual_seed(0)
    sizes = {**DECODER, "max_position_embeddings": 8192, **({"rope_parameters": rope} if rope else {})}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@torch.no_grad()
def run(model, ids, places, mask=None):
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True)
    return cache


def some_ids(rows=8, tokens=24, seed=0):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def off(found, wanted):
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# ------------------------------------------------------------------------------------------------------------ a rotation


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_undoing_a_rotation_is_exact_in_float64(interleaved, scaling, shape):
    rotary = Rotary(FREQUENCY, scaling, interleaved)
    keys = torch.randn(2, 3, 7, 12, dtype=torch.float64)  # 8 of 12 dimensions turn
    old, new = (torch.randint(0, 4000, shape) for _ in range(2))
    assert off(rotary.rotate(rotary.unrotate(keys, old), old), keys) < 1e-14
    assert off(rotary.unrotate(rotary.rotate(keys, old), old), keys) < 1e-14
    there = rotary.moved(keys, old, new)
    assert off(there, rotary.rotate(rotary.unrotate(keys, old), new)) < 1e-14
    assert off(rotary.moved(there, new, old), keys) < 1e-14
    assert torch.equal(there[..., 8:], keys[..., 8:])
    assert off(there[..., :8], keys[..., :8]) > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_a_product_with_a_complex_number_for_each_pair(interleaved):
    keys = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    places = torch.randint(0, 100, (2, 7))
    pairs = keys.unflatten(-1, (4, 2)) if interleaved else keys.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.full((2, 1, 7, 4), 1.3, dtype=torch.float64), (places[:, None, :, None] * FREQUENCY).double()
    )
    pairs = torch.view_as_real(turned)
    wanted = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    assert off(Rotary(FREQUENCY, 1.3, interleaved).rotate(keys, places), wanted) < 1e-6  # the angles are float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sines_are_rounded_as_the_model_rounds_them(dtype):
    model = llama().to(dtype)
    keys = (torch.rand(2, 3, 50, 32, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    keys[..., 16:] = 0  # one product a number: nothing else is rounded
    places = torch.randint(0, 8000, (2, 50), generator=torch.Generator().manual_seed(1))
    cos, sin = model.model.rotary_emb(keys, places)
    wanted = apply_rotary_pos_emb(keys, keys, cos, sin)[0]
    assert torch.equal(rotaries_of(model)[0].rotate(keys, places), wanted)


def test_gradients_pass_to_the_keys():
    rotary, keys = Rotary(FREQUENCY[:1]), torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    old, new = torch.arange(3), torch.arange(3) + 9
    assert torch.autograd.gradcheck(lambda x: rotary.moved(x, old, new), keys)


# --------------------------------------------------------------------------------------------------------------- a model


@pytest.mark.parametrize("name", ROTARY)
def test_a_moved_cache_is_that_of_a_model_run_at_the_other_positions(name):
    model, ids, places = model_of(name), some_ids(), torch.arange(24).expand(8, -1)
    rotaries = rotaries_of(model)
    here, there = run(model, ids, places), run(model, ids, places + 37)
    for cache in (moved(here, model, 37), moved(here, rotaries, 37, positions=places)):
        assert cache.get_seq_length() == 24
        for (k, v), (wanted_k, wanted_v), (_, own) in zip(*map(keys_and_values, (cache, there, here)), strict=True):
            assert k.shape == wanted_k.shape
            assert off(k, wanted_k) < 1e-5
            assert off(v, wanted_v) < 1e-5
            assert v.data_ptr() == own.data_ptr()
    back = moved(moved(here, rotaries, 37), rotaries, -37, positions=places + 37)
    for (k, _), (own, _), rotary in zip(keys_and_values(back), keys_and_values(here), rotaries, strict=True):
        assert off(k, own) < 2e-6
        assert (
            rotary is None
            or off(rotary.moved(own, places[:, -own.shape[2] :], places[:, -own.shape[2] :] + 37), own) > 0.1
        )


def test_layers_that_do_not_turn_and_those_of_other_frequencies_are_told_apart():
    turning, still = rotaries_of(model_of("smollm3"))
    assert turning is not None
    assert still is None
    local, whole = rotaries_of(model_of("gemma3"))
    assert not torch.equal(local.inv_freq, whole.inv_freq)
    assert [len(rotaries_of(model_of(name))[0].inv_freq) for name in ("gptj", "gpt_neox", "glm", "cohere")] == [
        8,
        4,
        8,
        16,
    ]
    assert [rotaries_of(model_of(name))[0].interleaved for name in ("gptj", "gpt_neox", "glm", "cohere")] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unrotated_keys_are_what_the_projection_gave_and_far_moves_are_as_near_as_close_ones(rope, dtype):
    model = llama(**rope).to(dtype)
    found = []
    projection = model.model.layers[0].self_attn.k_proj
    hook = projection.register_forward_hook(
        lambda module, given, out: found.append(out.view(2, 9, -1, 32).transpose(1, 2))
    )
    ids, places = some_ids(2, 9), torch.arange(9).expand(2, -1)
    keys = run(model, ids, places).layers[0].keys
    raw = found[0]
    far = run(model, ids, places + 8000).layers[0].keys
    hook.remove()
    rotary = rotaries_of(model)[0]
    assert (rotary.scaling != 1) == (rope.get("rope_type") == "yarn")
    near = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    assert off(rotary.unrotate(keys, places), raw) < near
    assert off(rotary.rotate(raw, places + 8000), far) < near
    assert off(rotary.moved(keys, places, places + 8000), far) < near
    assert rotary.moved(keys, places, places).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padded_rows_move_by_offsets_of_their_own(dtype):
    model = llama().to(dtype)
    ids, mask = left_pad([list(range(3, 3 + n)) for n in (12, 5, 9, 1, 12, 3, 7, 8)], 0)
    places, offset = position_ids(mask), torch.tensor([0, 3, 100, 2000, 7, 1, 50, 4])
    here, there = run(model, ids, places, mask), run(model, ids, places + offset[:, None], mask)
    cache = moved(here, model, offset, positions=places)
    near = 1e-5 if dtype == torch.float32 else 2**-6
    for layer, ((k, _), (wanted, _)) in enumerate(zip(*map(keys_and_values, (cache, there)), strict=True)):
        real = mask[:, None, :, None].bool().expand_as(k)
        if layer:  # deeper keys see the rounding of far angles, and of bfloat16, in attention
            real = real & (offset < 1000)[:, None, None, None]
        if not layer or dtype == torch.float32:
            assert off(k[real], wanted[real]) < near


def test_a_moved_cache_goes_on_as_if_it_had_been_there_all_the_time():
    model, ids, places = llama(), some_ids(2, 20), torch.arange(20).expand(2, -1)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[:, -1]
        cache = moved(run(model, ids[:, :-1], places[:, :-1]), model, 64)
        found = model(input_ids=ids[:, -1:], position_ids=places[:, -1:] + 64, cache=cache, use_cache=True).logits[
            :, -1
        ]
    assert off(found, wanted) < 2e-5


def test_positions_may_differ_from_layer_to_layer_and_from_head_to_head():
    model, ids = llama(), some_ids(1, 6)
    cache, rotaries = run(model, ids, torch.arange(6)[None]), rotaries_of(model)
    new = [torch.tensor([[[0, 2, 4, 6, 8, 10], [5, 4, 3, 2, 1, 0]]]), torch.arange(6) + 1]
    found = repositioned(cache, rotaries, torch.arange(6), new)
    for index, places in enumerate(new):
        wanted = rotaries[index].moved(cache.layers[index].keys, torch.arange(6), places)
        assert torch.equal(found.layers[index].keys, wanted)
        assert off(found.layers[index].keys, cache.layers[index].keys) > 0.01


def test_a_sliding_layer_takes_the_last_positions():
    model, places = model_of("mistral"), torch.arange(24)
    cache, rotary = run(model, some_ids(2), places.expand(2, -1)), rotaries_of(model)[0]
    found = repositioned(cache, model, places, places**2).layers[0]
    assert found.keys.shape[2] == 15
    assert torch.equal(found.keys, rotary.moved(cache.layers[0].keys, places[9:], places[9:] ** 2))
    assert found.get_seq_length() == 24


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "no rotary"),
        ("opt", "no rotary"),
        ("biogpt", "no rotary"),
        ("mamba", "position_ids"),
        ("bert", "position_ids|no rotary"),
    ],
)
def test_models_without_a_rotary_embedding_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        rotaries_of(build(name))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 2.0,
        },
    ],
)  # fmt: skip
def test_frequencies_that_change_with_the_length_are_refused(rope):
    with pytest.raises(ValueError, match=f"change with the length .rope_type '{rope['rope_type']}'"):
        rotaries_of(llama(**rope))


def test_a_model_that_turns_otherwise_than_its_frequencies_say_is_refused():
    model = llama()
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: own(x, 2 * position_ids)
    with pytest.raises(ValueError, match="keys of layer 0 of LlamaForCausalLM do not turn"):
        rotaries_of(model)


def test_arguments_are_checked():
    rotary, keys = Rotary(FREQUENCY), torch.zeros(2, 3, 7, 8)
    with pytest.raises(ValueError, match=r"positions must have shape \(7,\), \(2, 7\) or \(2, 3, 7\)"):
        rotary.rotate(keys, torch.arange(6))
    with pytest.raises(TypeError, match="positions must hold whole"):
        rotary.unrotate(keys, torch.zeros(7))
    with pytest.raises(TypeError, match="keys must hold floating"):
        rotary.rotate(keys.long(), torch.arange(7))
    with pytest.raises(ValueError, match="keys must have at least 8 dimensions"):
        rotary.rotate(keys[..., :6], torch.arange(7))
    with pytest.raises(ValueError, match="scaling must be"):
        Rotary(FREQUENCY, float("nan"))
    with pytest.raises(ValueError, match="inv_freq must have 1"):
        Rotary(FREQUENCY[None])
    model = llama()
    cache = run(model, some_ids(2, 6), torch.arange(6).expand(2, -1))
    rotaries = rotaries_of(model)
    before = [k.clone() for k, _ in keys_and_values(cache)]
    with pytest.raises(ValueError, match="as many layers as the cache, 2, got 1"):
        moved(cache, rotaries[:1], 3)
    with pytest.raises(TypeError, match="offset must be a whole number"):
        moved(cache, rotaries, 1.5)
    with pytest.raises(TypeError, match="offset must hold whole numbers"):
        moved(cache, rotaries, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="positions must have shape"):
        moved(cache, rotaries, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="old must have the 6 tokens of layer 0"):
        moved(cache, rotaries, 1, positions=torch.arange(5))
    with pytest.raises(ValueError, match="new must be one tensor or one for each of 2 layers"):
        repositioned(cache, rotaries, torch.arange(6), [torch.arange(6)])
    assert all(torch.equal(k, own) for (k, _), own in zip(keys_and_values(cache), before, strict=True))
