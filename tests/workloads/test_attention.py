from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from assay.workloads.attention import attended_by, captured_qkv
from assay.workloads.text import long_prompt


@pytest.fixture(scope="module")
def ids(tokenizer):
    return long_prompt(tokenizer, 50)


def by_hand(model, ids, layer):
    """Queries, keys and values of a layer, computed from the hidden states that enter it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    seen = []
    block = model.model.layers[layer]
    hook = block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(ids)
        hook.remove()
        (hidden, *_), kwargs = seen[0]
        attention, normal = block.self_attn, block.input_layernorm(hidden)
        q, k, v = (
            project(normal).view(*ids.shape, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return *apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"]), v


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_captured_is_what_the_layers_attend_with(tiny, ids, implementation):
    model = copy.deepcopy(tiny.model)
    model.set_attn_implementation(implementation)
    captured = captured_qkv(model, ids)
    assert len(captured) == 2
    for layer, found in enumerate(captured):
        for ours, expected in zip(found, by_hand(model, ids, layer), strict=True):
            torch.testing.assert_close(ours, expected)
        assert [tuple(x.shape) for x in found] == [(1, 4, 50, 16), (1, 2, 50, 16), (1, 2, 50, 16)]
        assert all(x.is_contiguous() and not x.requires_grad for x in found)


def test_attending_with_them_gives_the_layers_output(tiny, ids):
    outputs = []
    attention = tiny.model.model.layers[1].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with torch.no_grad():
        tiny.model(ids)
    hook.remove()
    (q, k, v) = captured_qkv(tiny.model, ids, layers=[1])[0]
    ours = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=attention.scaling)
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), outputs[0])


def test_layers_come_in_the_order_asked_for_and_later_ones_are_not_run(tiny, ids):
    everything = captured_qkv(tiny.model, ids)
    backwards = captured_qkv(tiny.model, ids, layers=[1, 0])
    assert torch.equal(backwards[0][0], everything[1][0])
    assert torch.equal(backwards[1][0], everything[0][0])
    ran = []
    hook = tiny.model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    captured_qkv(tiny.model, ids, layers=[0])
    hook.remove()
    assert not ran


def test_the_model_and_transformers_are_left_as_they_were(tiny, ids):
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    model = copy.deepcopy(tiny.model).train()
    model.set_attn_implementation("eager")
    before = model(ids).logits
    registered = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    captured_qkv(model, ids, layers=[0])
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == registered
    assert torch.equal(model(ids).logits, before)


def test_an_error_on_the_way_restores_too(tiny, ids):
    from transformers.modeling_utils import AttentionInterface

    registered = set(AttentionInterface._global_mapping)
    with pytest.raises(IndexError):
        captured_qkv(tiny.model, torch.full((1, 4), 10**6))
    assert tiny.model.config._attn_implementation == "sdpa"
    assert set(AttentionInterface._global_mapping) == registered


def test_dtype_and_batch_are_kept(tiny, ids):
    model = copy.deepcopy(tiny.model).bfloat16()
    ((q, k, v),) = captured_qkv(model, ids.expand(3, -1), layers=[0])
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert q.shape == (3, 4, 50, 16)


@pytest.mark.parametrize(
    ("layers", "wrong"),
    [
        ([2], "at least 0 and at most 1, got 2"),
        ([-1], "got -1"),
        (["0"], "got '0'"),
        ([True], "got True"),
        ([float("nan")], "got nan"),
        ([], "at least one layer"),
    ],
)
def test_wrong_layers(tiny, ids, layers, wrong):
    with pytest.raises((TypeError, ValueError), match=wrong):
        captured_qkv(tiny.model, ids, layers=layers)


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(1, 0, dtype=torch.int64)]
)
def test_wrong_input_ids(tiny, bad):
    with pytest.raises((TypeError, ValueError), match="input_ids must"):
        captured_qkv(tiny.model, bad)


# ---------------------------------------------------------------------------------------------- attention by a function


def test_attended_by_a_function_is_the_model(tiny, ids):
    """Exact attention changes nothing, another function does, each layer is asked once, and the model is put back."""
    calls = []

    def exact(layer, q, k, v):
        calls.append((layer, q.shape[1], k.shape[1]))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        before, expected = tiny.model.config._attn_implementation, tiny.model(ids).logits
        with attended_by(tiny.model, exact):
            torch.testing.assert_close(tiny.model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
        assert calls == [(0, 4, 2), (1, 4, 2)]
        with attended_by(tiny.model, lambda layer, q, k, v: torch.zeros_like(q)):
            assert (tiny.model(ids, use_cache=False).logits - expected).abs().max() > 1e-2
        assert tiny.model.config._attn_implementation == before
        torch.testing.assert_close(tiny.model(ids).logits, expected)


def test_attended_by_refuses(tiny, ids):
    with pytest.raises(TypeError, match="attend must be a function"), attended_by(tiny.model, None):
        pass
    padding = torch.ones_like(ids)
    padding[:, :3] = 0
    with (
        pytest.raises(ValueError, match="takes causal attention"),
        attended_by(tiny.model, lambda layer, q, k, v: q),
        torch.no_grad(),
    ):
        tiny.model(ids, attention_mask=padding, use_cache=False)
