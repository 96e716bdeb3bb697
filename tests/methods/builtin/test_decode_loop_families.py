"""The families that the compiled loop knows, against transformers' own forward pass and `generate`, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.methods.builtin.test_decode_loop import CONTEXT, EXACT, compiled, filled, greedy, looped, ragged, tiny
from tests.properties.architectures import build
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from assay.methods.builtin import decode_loop as dl
from assay.methods.builtin import weight_only
from assay.methods.builtin.decode_loop import Decoder, transform, why_not
from assay.methods.core import kernels
from assay.methods.core.generation.paged import Sequence, pages_for

LLAMA, MISTRAL = (LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig)
QWEN2, QWEN3 = (Qwen2ForCausalLM, Qwen2Config), (Qwen3ForCausalLM, Qwen3Config)
PHI3, GEMMA3 = (Phi3ForCausalLM, Phi3Config), (Gemma3ForCausalLM, Gemma3TextConfig)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
GEMMA = {
    "head_dim": 32,
    "sliding_window": 12,
    "layer_types": MIXED,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    },
}
CASES = {
    "llama": (*LLAMA, {"head_dim": 32, "num_key_value_heads": 1}),
    "llama, tied": (*LLAMA, {"tie_word_embeddings": True}),
    "llama, gelu": (*LLAMA, {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, linear rope": (*LLAMA, rope("linear", factor=4.0)),
    "llama, llama3 rope": (*LLAMA, LLAMA3),
    "llama, yarn rope": (*LLAMA, rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama, proportional rope": (*LLAMA, rope("proportional", partial_rotary_factor=0.5)),
    "mistral, windows": (*MISTRAL, {"sliding_window": 12}),
    "qwen2": (*QWEN2, {}),
    "qwen2, windows": (*QWEN2, {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": (*QWEN3, {"head_dim": 32}),
    "qwen3, windows": (
        *QWEN3,
        {"use_sliding_window": True, "sliding_window": 12, "layer_types": MIXED, "head_dim": 16},
    ),
    "phi3": (*PHI3, {}),
    "phi3, part of each head": (*PHI3, rope("default", partial_rotary_factor=0.5)),
    "phi3, windows": (*PHI3, {"sliding_window": 12}),
    "phi3, uneven parts": (*PHI3, {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma3": (*GEMMA3, GEMMA),
    "gemma3, wide heads": (*GEMMA3, {**GEMMA, "head_dim": 256, "num_key_value_heads": 1}),
}


@pytest.fixture(scope="module", params=list(CASES))
def model(request):
    model_class, config_class, changes = CASES[request.param]
    return tiny(model_class, config_class, **changes)


@torch.no_grad()
def prefilled(model, decoder, tokens):
    """A sequence whose prompt went through the model itself, its pages, and the logits after it."""
    past = DynamicCache()  # without a configuration: every layer keeps everything
    logits = model(input_ids=torch.tensor([tokens]), cache=past, use_cache=True).logits[0, -1]
    count = pages_for(len(tokens) + 50)
    pool = decoder.new_pool(count)
    sequence = Sequence(pool.take(count), len(tokens))
    keys, values = (torch.stack([getattr(layer, name)[0] for layer in past.layers]) for name in ("keys", "values"))
    pool.write(sequence.pages, 0, keys, values)
    return pool, sequence, logits


def prompt_of(n):
    return torch.randint(1, 101, (n,), generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize(
    ("prompt", "steps", "load"),
    [(1, 40, kernels.load), (20, 40, kernels.load), (70, 40, kernels.load), (20, 2, lambda name: False)],
)
def test_logits_are_those_of_transformers(model, prompt, steps, load, monkeypatch):
    """After the prompt, tokens one by one, and the whole text again in one pass from its first token on."""
    monkeypatch.setattr(kernels, "load", load)
    decoder, tokens = Decoder(model, **EXACT), prompt_of(prompt)
    pool, sequence, logits = prefilled(model, decoder, tokens)
    found = []
    for _ in range(steps):
        tokens.append(int(logits.argmax()))
        _, made = decoder.run(pool, [sequence], [tokens[-1]], 1, want_logits=True)
        logits = made[0]
        found.append(logits)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    expected = whole[prompt:]
    scale = float(expected.abs().max())
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-4 * scale, rtol=0)
    count = pages_for(len(tokens))
    pool = decoder.new_pool(count)
    fresh = Sequence(pool.take(count))
    again = decoder.extend(pool, [(fresh, tokens)], logits="all")
    torch.testing.assert_close(again, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


def test_greedy_tokens_are_those_of_generate(model):
    fast = looped(model)
    ids, mask = ragged((30, 3, 17))
    assert torch.equal(greedy(fast, ids, mask, max_new_tokens=40), greedy(model, ids, mask, max_new_tokens=40))
    alone = ids[1:2, -3:]
    assert torch.equal(greedy(fast, alone, max_new_tokens=40), greedy(model, alone, max_new_tokens=40))


@compiled
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_kernel_agrees_with_the_oracle(model, weights):
    decoder = Decoder(model, weights=weights, cache="float32")
    lengths, tokens = (15, 16, 300, 1), [7, 8, 9, 10]
    (pool, ours), (other, theirs) = filled(decoder, lengths), filled(decoder, lengths)
    _, found = decoder.run(pool, ours, tokens, 1, want_logits=True)
    expected = torch.stack([decoder.step_in_torch(other, s, t) for s, t in zip(theirs, tokens, strict=True)])
    tolerance = 1e-4 if weights in ("fp32", "bf16") else 0.05  # an int8 input may flip by one
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)
    for row in range(4):
        pool, alone = filled(decoder, lengths)
        assert torch.equal(decoder.run(pool, [alone[row]], [tokens[row]], 1, want_logits=True)[1][0], found[row])


def test_a_cache_with_windows_that_was_passed_in():
    """It goes in, comes back longer by what was decoded, holds no more than the windows, and goes on."""
    made = tiny(*GEMMA3, **GEMMA)
    fast = looped(made)
    ids, mask = ragged((20, 5))
    ours, theirs = DynamicCache(config=made.config), DynamicCache(config=made.config)
    for turn in range(3):
        a = greedy(fast, ids, mask, cache=ours, max_new_tokens=9)
        b = greedy(made, ids, mask, cache=theirs, max_new_tokens=9)
        assert torch.equal(a, b), turn
        for mine, his in zip(ours.layers, theirs.layers, strict=True):
            assert mine.get_seq_length() == his.get_seq_length() == a.shape[1] - 1
            assert mine.keys.shape == his.keys.shape
            columns = mine.keys.shape[2]
            valid = torch.cat([mask, mask.new_ones(2, a.shape[1] - 1 - mask.shape[1])], 1)[:, None, -columns:, None]
            torch.testing.assert_close(mine.keys * valid, his.keys * valid, atol=1e-4, rtol=1e-4)
        ids = torch.cat([b, torch.randint(1, 101, (2, 4), generator=torch.Generator().manual_seed(turn))], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)


# ---- packed layers of the other shapes


def two_layers(name):
    return tiny(*QWEN3, num_hidden_layers=2, head_dim=32) if name == "qwen3" else build(name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["phi3", "gemma3", "qwen3", "mistral"])
def test_sharing_the_weights_with_the_prefill(name, bits):
    model = two_layers(name)
    made = transform.apply(copy.deepcopy(model), {"weights": f"int{bits}", "keep_prefill_weights": False}, CONTEXT)
    quantised = weight_only.transform.apply(copy.deepcopy(model), {"bits": bits, "head_bits": 8}, CONTEXT)
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(made(ids).logits, quantised(ids).logits)
    memory = [weight.data_ptr() for weight in made.decode_loop.weights]
    linears = [module for module in made.modules() if isinstance(module, weight_only.WeightOnlyLinear)]
    assert len(linears) == (9 if name == "phi3" else 15)
    assert {linear.packed.data_ptr() for linear in linears} <= set(memory)
    assert made.lm_head.packed.data_ptr() == memory[-1]
    assert made.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape == (1, 62)


def test_fused_layers_that_are_packed_already_are_shared():
    made = weight_only.transform.apply(build("phi3"), {"bits": 4, "head_bits": 8}, CONTEXT)
    ids = torch.arange(3, 60)[None]
    before = made(ids).logits
    made = transform.apply(made, {"weights": "int4"}, CONTEXT)
    weights = made.decode_loop.weights
    for number, layer in enumerate(made.model.layers):
        for parent, name, first, count in (
            ("self_attn", "qkv_proj", 0, 3),
            ("self_attn", "o_proj", 3, 1),
            ("mlp", "gate_up_proj", 4, 2),
        ):
            packed = getattr(layer.get_submodule(parent), name).packed
            parts = weights[7 * number + first : 7 * number + first + count]
            assert packed.data_ptr() == parts[0].data_ptr()
            assert torch.equal(packed, torch.cat(parts))
    assert torch.equal(made(ids).logits, before)
    copied = copy.deepcopy(made)
    assert copied.model.layers[0].mlp.gate_up_proj.packed.data_ptr() == copied.decode_loop.weights[4].data_ptr()


def test_fused_parts_that_cannot_be_shared():
    model_class, config_class, changes = CASES["phi3, uneven parts"]
    made = tiny(model_class, config_class, **changes)
    with pytest.raises(ValueError, match="parts of its fused projections must be multiples of 32 wide, not 48"):
        transform.apply(copy.deepcopy(made), {"weights": "int4", "keep_prefill_weights": False}, CONTEXT)
    packed = weight_only.transform.apply(copy.deepcopy(made), {"bits": 4, "head_bits": 8}, CONTEXT)
    ids = torch.arange(1, 40)[None]
    before = packed(ids).logits
    fast = transform.apply(packed, {"weights": "int4"}, CONTEXT)
    assert torch.equal(fast(ids).logits, before)
    assert fast.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 42)


@pytest.mark.parametrize("name", ["phi3", "gemma3", "qwen3"])
def test_on_top_of_an_int8_prefill(name):
    from assay.methods.core.quantize.int8_linear import quantize_linears

    model = two_layers(name)
    made = transform.apply(quantize_linears(copy.deepcopy(model)), EXACT, CONTEXT)
    original = Decoder(model, **EXACT)
    (pool, ours), (other, theirs) = filled(original, (20,)), filled(original, (20,))
    _, logits = made.decode_loop.run(pool, ours, [5], 1, want_logits=True)
    _, expected = original.run(other, theirs, [5], 1, want_logits=True)
    assert float((logits - expected).square().mean() / expected.square().mean()) < 5e-3


# ---- what it must not serve


def test_every_field_of_the_configurations_is_known():
    for _, config in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA3):
        assert set(vars(config())) <= dl.fit.FIELDS


LONG = rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (LLAMA, LONG, "rope of type 'longrope' changes with the length"),
        (PHI3, LONG, "rope of type 'longrope' changes with the length"),
        (LLAMA, rope("dynamic", factor=2.0), "rope of type 'dynamic' changes with the length"),
        (
            GEMMA3,
            {**GEMMA, "final_logit_softcapping": 30.0},
            "soft caps are not supported: final_logit_softcapping is 30.0",
        ),
        (
            GEMMA3,
            {**GEMMA, "attn_logit_softcapping": 50.0},
            "soft caps are not supported: attn_logit_softcapping is 50.0",
        ),
        (GEMMA3, {**GEMMA, "use_bidirectional_attention": True}, "looks ahead"),
        (GEMMA3, {**GEMMA, "hidden_activation": "gelu"}, "activation must be silu or gelu_pytorch_tanh, not gelu"),
        (QWEN3, {"attention_bias": True}, "biases of q, k and v only"),
    ],
)
def test_configurations_that_are_refused(family, changes, reason):
    assert reason in why_not(tiny(*family, **changes))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "mixtral, a mixture of experts"),
        ("gpt_oss", "a mixture of experts"),
        ("gemma2", "not gemma2"),
        ("opt", "families"),
    ],
)
def test_families_that_are_refused(name, reason):
    assert reason in why_not(build(name))


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        (
            QWEN3,
            lambda m: setattr(m.model.layers[1].self_attn, "q_norm", torch.nn.Identity()),
            "layers.1 is not a plain qwen3",
        ),
        (QWEN3, lambda m: setattr(m.model.layers[1].self_attn.k_norm, "variance_epsilon", 1e-3), "epsilon"),
        (GEMMA3, lambda m: setattr(m.model.layers[0].pre_feedforward_layernorm, "eps", 1e-3), "epsilon"),
        (GEMMA3, lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.25), "scales by query_pre_attn_scalar"),
        (
            GEMMA3,
            lambda m: setattr(m.model, "embed_tokens", torch.nn.Embedding(101, 64)),
            "embedding must be transformers' own",
        ),
        (GEMMA3, lambda m: setattr(m.model.layers[0], "forward", lambda x: x), "forward pass was replaced"),
        (MISTRAL, lambda m: setattr(m.config, "sliding_window", 0), "at least 1 position"),
        (QWEN2, lambda m: m.config.layer_types.__setitem__(1, "chunked_attention"), "layers of type chunked_attention"),
        (QWEN2, lambda m: m.config.layer_types.__setitem__(1, "sliding_attention"), "sliding-window attention"),
        (
            PHI3,
            lambda m: setattr(m.model.layers[1].mlp, "gate_up_proj", torch.nn.Linear(64, 160, False)),
            "must be 192 x 64",
        ),
        (LLAMA, lambda m: setattr(m.model, "rotary_emb", torch.nn.Identity()), "LlamaRotaryEmbedding"),
    ],
)
def test_models_that_were_changed_are_refused(family, change, reason):
    made = tiny(*family, **(GEMMA if family is GEMMA3 else {}))
    change(made)
    assert reason in why_not(made)
    with pytest.raises(ValueError, match="model does not fit the decode loop"):
        Decoder(made)
