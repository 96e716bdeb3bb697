"""What changes the linear layers of a model, called as a library user calls it, over unrelated architectures.

Each either refuses and leaves the model as it was, or gives the output of a reference of its own: the same model in float with
the weights the layers stand for. A few architectures run always, all of them with `-m slow`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from tests.properties.architectures import ARCHITECTURES, CAUSAL, build, inputs, output
from torch import nn

from assay.methods.builtin import decode_loop, dtype, weight_only
from assay.methods.compression import fp8_vs_int8
from assay.methods.core.layers.linears import linears, open_, share
from assay.methods.core.layers.surgery import CONVOLUTIONS, linear_kinds
from assay.methods.core.quantize.int8_linear import quantize_linears
from assay.methods.layers import greenformers
from assay.methods.transform import LEAST_SHARE, TuneContext

SMALL = ("llama-tied", "gpt2", "mixtral", "t5", "biogpt")
EVERY = [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


def context(name):
    text = [inputs(name, 1, seed=5)["input_ids"]] if name in CAUSAL else []
    return TuneContext("decode", prompt_tokens=16, new_tokens=8, calibration=text)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [type(m) for m in model.modules()]


def unchanged(model, before):
    now, kinds = state(model)
    return kinds == before[1] and now.keys() == before[0].keys() and all(torch.equal(now[k], before[0][k]) for k in now)


def reference(model, changed):
    """`model` in float with the weights that the layers of `changed` stand for."""
    plain = open_(copy.deepcopy(model))
    units = dict(changed.named_modules())
    convolutions = {name: layer for name, layer in plain.named_modules() if type(layer) in CONVOLUTIONS}
    for name, layer in {**linears(plain), **convolutions}.items():
        unit = units.get(name)
        if unit is not None and type(unit) not in (*linear_kinds(), *CONVOLUTIONS):
            weight = unit.weight * 1
            transposed = type(getattr(unit, "layer", None)) is linear_kinds()[1]
            layer.weight = nn.Parameter((weight.T if transposed else weight).to(layer.weight.dtype))
    return plain


APPLY = {
    "weight_only-4": lambda model, name: weight_only.transform.apply(model, {"bits": 4, "head_bits": 8}, context(name)),
    "weight_only-8": lambda model, name: weight_only.transform.apply(
        model, {"bits": 8, "head_bits": None}, context(name)
    ),
    "int8": lambda model, name: quantize_linears(model, head=True, fuse=False),
    "fake": lambda model, name: fp8_vs_int8.fake_quantize(model, "INT8", [], activations="none"),
    "low_rank": lambda model, name: greenformers.apply_low_rank(model, rank=0.5) and model,
    "low_rank-untied": lambda model, name: greenformers.apply_low_rank(model, rank=0.5, untie_head=True) and model,
}


@pytest.mark.parametrize("how", APPLY)
@pytest.mark.parametrize("name", EVERY)
def test_output_is_that_of_the_weights_it_stands_for(name, how, tmp_path):
    model = build(name)
    before = state(model)
    try:
        changed = APPLY[how](copy.deepcopy(model), name)
    except ValueError:
        assert how == "fake"
        assert name in ("mixtral", "gpt_oss")
        return
    assert unchanged(model, before)  # the copy shares nothing
    expected, seen = output(reference(model, changed), name, 8), output(changed, name, 8)
    routed = name in ("mixtral", "gpt_oss")  # a rounded input may choose another expert
    rounds_inputs = how in ("weight_only-4", "weight_only-8", "int8")
    assert distance(seen, expected) < ((0.1 if routed else 0.03) if rounds_inputs else 1e-4)
    if "low_rank" not in how:  # random weights have no low rank
        assert distance(seen, output(model, name, 8)) < 0.3
    alone = torch.cat([output(changed, name, 8)[row : row + 1] for row in range(2)])
    assert torch.equal(seen[:2], alone)

    save_model(changed, str(tmp_path / "weights.safetensors"))
    other = APPLY[how](build(name), name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    load_model(other, str(tmp_path / "weights.safetensors"))
    assert torch.equal(output(other, name, 8), seen)

    half = changed.to(torch.bfloat16)
    assert distance(output(half, name, 8), seen) < 0.1


@pytest.mark.parametrize("how", ["low_rank", "low_rank-untied"])
@pytest.mark.parametrize("name", EVERY)
def test_a_factored_model_is_saved_by_transformers(name, how, tmp_path):
    changed = APPLY[how](build(name), name)
    seen = output(changed, name, 2)
    changed.save_pretrained(tmp_path)
    assert torch.equal(output(changed, name, 2), seen)
    names = {key for file in tmp_path.glob("*.safetensors") for key in _keys(file)}
    assert any("encoder.weight" in key for key in names)


def _keys(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_from_the_start(name):
    for how in APPLY:
        model = dtype.cast(build(name), torch.bfloat16)
        exact = output(model, name, 8)
        try:
            changed = APPLY[how](model, name)
        except ValueError:
            assert name in ("mixtral", "gpt_oss")
            continue
        seen = output(changed, name, 8)
        assert seen.isfinite().all()
        assert "low_rank" in how or distance(seen, exact) < 0.3


@pytest.mark.parametrize("name", EVERY)
def test_transforms_fit_or_refuse_and_change_nothing_by_looking(name):
    model, situation = build(name), context(name)
    before = state(model)
    for transform in (weight_only.transform, fp8_vs_int8.transform, greenformers.transform, decode_loop.transform):
        fit = transform.applies_to(model, situation)
        assert unchanged(model, before)
        if not fit.applies:
            assert fit.reason
            with_refusal = copy.deepcopy(model)
            if transform is not greenformers.transform or name in ("mixtral", "gpt_oss"):
                with pytest.raises(ValueError, match=r"."):
                    transform.apply(with_refusal, {}, situation)
                assert unchanged(with_refusal, before)
            continue
        assert LEAST_SHARE <= fit.share <= 1
        assert (
            (fit.share == 1) == (not fit.reached)
            or transform is decode_loop.transform
            or name in ("mixtral", "gpt_oss")
        )


WRONG = [
    (weight_only.transform, {"bits": True}),
    (weight_only.transform, {"bits": 4.0}),
    (weight_only.transform, {"bits": "4"}),
    (weight_only.transform, {"head_bits": "no"}),
    (fp8_vs_int8.transform, {"head": "no"}),
    (fp8_vs_int8.transform, {"head": 0}),
    (fp8_vs_int8.transform, {"rotation": 16.0}),
    (fp8_vs_int8.transform, {"rotation": True}),
    (fp8_vs_int8.transform, {"smooth": "0.5"}),
    (fp8_vs_int8.transform, {"smooth": float("nan")}),
    (fp8_vs_int8.transform, {"skip": "down_proj"}),
    (fp8_vs_int8.transform, {"skip": [3]}),
    (greenformers.transform, {"rank": 1e308}),
    (greenformers.transform, {"rank": "half"}),
    (greenformers.transform, {"rank": True}),
    (greenformers.transform, {"energy": 1.0}),
    (greenformers.transform, {"budget": float("nan")}),
    (greenformers.transform, {"solver": "svd", "rank": 0.5}),
    (decode_loop.transform, {"weights": 4}),
    (decode_loop.transform, {"weights": "int4", "keep_prefill_weights": "no"}),
    (decode_loop.transform, {"cache": "bf16"}),
    (dtype.transform, {"dtype": 16}),
    (dtype.transform, {"dtype": "float16"}),
    (weight_only.transform, ["bits"]),
    (decode_loop.transform, {"window": 4}),
]


@pytest.mark.parametrize(("transform", "config"), WRONG)
def test_a_configuration_of_the_wrong_kind_is_refused_before_anything_is_changed(transform, config):
    model = build("llama")
    before = state(model)
    with pytest.raises((TypeError, ValueError)) as refusal:
        transform.apply(model, config, context("llama"))
    assert unchanged(model, before)
    assert any(str(key) in str(refusal.value) for key in config) or "config" in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_changed(value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    kinds = [type(module) for module in model.modules()]
    for how in ("weight_only-4", "int8"):
        with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj must be finite"):
            APPLY[how](model, "llama")
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2"])
def test_experts_and_conv1d_are_reached(name):
    model = build(name)
    for transform in (weight_only.transform, fp8_vs_int8.transform):
        fit = transform.applies_to(model, context(name))
        assert fit.applies
        assert fit.share > 0.99
    blocks = sum(p.numel() for n, p in model.named_parameters() if ("layers." in n or ".h." in n) and p.dim() > 1)
    changed = APPLY["int8"](copy.deepcopy(model), name)
    left = sum(p.numel() for n, p in changed.named_parameters() if ("layers." in n or ".h." in n) and p.dim() > 1)
    assert left < 0.01 * blocks


def test_low_rank_says_that_it_leaves_experts_alone():
    fit = greenformers.transform.applies_to(build("mixtral"), context("mixtral"))
    assert not fit.applies
    assert fit.share < LEAST_SHARE
    assert "the experts of 2 layers" in fit.reason
    model = build("mixtral")
    attention = 2 * (2 * 128 * 128 + 2 * 64 * 128)
    experts = 2 * 4 * 3 * 128 * 192
    routers = 2 * 4 * 128
    names = [name for name in linears(model) if "self_attn" in name]
    assert share(model, names) == attention / (attention + experts + routers)


@pytest.mark.parametrize("how", ["int8", "low_rank"])
def test_transformer_encoder_of_torch(how):
    """Its fused path would pass by what stands in place of linear1 and linear2."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, activation=nn.GELU())
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 7, 64)
    changed = APPLY[how](copy.deepcopy(model), "none")
    with torch.no_grad():
        seen = changed(x)
        expected = reference(model, changed)(x)
        assert distance(seen, expected) < 0.03
        assert not torch.equal(seen, model(x))
