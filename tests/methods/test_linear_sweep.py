"""What changes the linear layers of a model, called as a library user calls it, over unrelated architectures.

Each either refuses and leaves the model as it was, or gives the output of a reference of its own: the same model in float with
the weights the layers stand for. A few architectures run always, all of them in `make sweep`. Refusals and
configurations are in `tests/sweep/test_transforms.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from tests.properties.architectures import ARCHITECTURES, CAUSAL, build, inputs, output
from tests.properties.dense_weights import reference
from torch import nn

from assay.methods.builtin import dtype, weight_only
from assay.methods.compression import fp8_vs_int8
from assay.methods.core.layers.linears import linears, share
from assay.methods.core.quantize.int8_linear import quantize_linears
from assay.methods.layers import greenformers
from assay.methods.transform import LEAST_SHARE, TuneContext

SMALL = ("llama-tied", "gpt2", "mixtral", "biogpt")
EVERY = [name if name in SMALL else pytest.param(name, marks=pytest.mark.sweep) for name in ARCHITECTURES]


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
    alone = torch.cat([output(changed, name, 8, rows=slice(row, row + 1)) for row in (0, 5)])
    assert distance(alone, seen[[0, 5]]) < (
        0.05 if routed else 0.02
    )  # sums in another order may round to the next code

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


ODD = {
    "a weight": "model.layers.1.mlp.up_proj.weight",
    "the head": "lm_head.weight",
    "a norm": "model.layers.0.input_layernorm.weight",
}
REFUSING = {  # what each must look at before it changes anything: weights it rounds, norms it takes in, inputs it calibrates on
    "weight_only-4": ("a weight", "the head"),
    "int8": ("a weight", "the head"),
    "int8 smooth": ("a weight", "a norm"),
    "int8 fused": ("a weight", "a norm"),
    "low_rank": ("a weight", "the head"),
    "low_rank-data": ("a weight", "the head", "a norm"),
}
MORE = {
    "int8 smooth": lambda model, name: quantize_linears(
        model, smooth=0.5, fuse=False, calibration=context(name).calibration
    ),
    "int8 fused": lambda model, name: quantize_linears(model),
    "low_rank-data": lambda model, name: greenformers.transform.apply(model, {"energy": 0.9}, context(name)),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("how", "odd"), [(how, odd) for how, places in REFUSING.items() for odd in places])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_changed(how, odd, value):
    model = build("llama")
    with torch.no_grad():
        model.get_parameter(ODD[odd]).view(-1)[5] = value
    parts = [(type(module), sorted(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=r"finite") as error:
        {**APPLY, **MORE}[how](model, "llama")
    assert "layers." in str(error.value) or "lm_head" in str(error.value)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == parts


def test_inputs_that_overflow_are_refused_before_anything_is_changed():
    """A finite weight can make the calibration's activations infinite: no smoothing comes out of them."""
    for how in ("int8 smooth", "low_rank-data"):
        model = build("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = 3e38
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"calibration must give model.layers.1.mlp.*finite inputs"):
            MORE[how](model, "llama")
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("level", [0.0, 1e-42, 1e-30, 1e6])
@pytest.mark.parametrize("how", ["weight_only-4", "weight_only-8", "int8"])
def test_rows_of_any_size_are_kept(how, level):
    """Zeros, numbers that float32 holds in part only, and an outlier beyond float16: the other rows lose nothing by them."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = level
    changed = APPLY[how](copy.deepcopy(model), "llama")
    row = (changed.model.layers[1].mlp.up_proj.weight * 1)[3]
    assert (row - level).abs().max() <= max(0.01 * level, 1e-38)  # below that W8A8 makes zeros of them
    rows = [i for i in range(192) if i != 3]
    kept, same = (m.model.layers[1].mlp.up_proj.weight * 1 for m in (changed, APPLY[how](build("llama"), "llama")))
    torch.testing.assert_close(kept[rows], same[rows])


def test_what_a_model_reads_instead_of_calling_it_is_left_alone():
    """Mamba multiplies by the weight of dt_proj itself: a layer in its place would be made dense at every look."""
    model = build("mamba")
    assert not any(name.endswith("dt_proj") for name in linears(model))
    for transform in (weight_only.transform, fp8_vs_int8.transform, greenformers.transform):
        fit = transform.applies_to(model, context("mamba"))
        assert fit.applies
        assert 0.9 < fit.share < 1
        assert "mixer.dt_proj" in fit.reached
        changed = transform.apply(build("mamba"), transform.configs(model, context("mamba"))[0], context("mamba"))
        assert type(changed.backbone.layers[0].mixer.dt_proj) is nn.Linear


def test_only_models_of_token_ids_are_calibrated_on_token_ids():
    text = TuneContext("ttft", 64, 8, calibration=[inputs("llama", 1)["input_ids"]])
    for name in ("vit", "whisper", "t5"):
        model = build(name)
        before = state(model)
        assert fp8_vs_int8.transform.configs(model, text) == [
            {"smooth": None, "rotation": 16, "skip": [], "head": False}
        ]
        assert "token ids" in greenformers.transform.applies_to(model, text).reason
        for transform, config in ((fp8_vs_int8.transform, {"smooth": 0.5}), (greenformers.transform, {"energy": 0.9})):
            with pytest.raises(ValueError, match="calibrated on token ids, got "):
                transform.apply(model, config, text)
        assert unchanged(model, before)
    assert all("skip" not in c or not c["skip"] for c in fp8_vs_int8.transform.configs(build("gpt2"), text))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2"])
def test_experts_and_conv1d_are_reached(name):
    model = build(name)
    for transform in (weight_only.transform, fp8_vs_int8.transform):
        fit = transform.applies_to(model, context(name))
        assert fit.applies
        assert fit.share > 0.99
        chosen = {"smooth": None} if transform is fp8_vs_int8.transform else {}
        tuned = transform.apply(build(name), chosen, context(name))
        every = {n: p for n, p in model.named_parameters() if p.dim() > 1 and ("layers." in n or ".h." in n)}
        every = {n: p for n, p in every.items() if not n.endswith("bias")}
        left = every.keys() & dict(tuned.named_parameters()).keys()  # counted apart from `share`
        assert fit.share == 1 - sum(every[n].numel() for n in left) / sum(p.numel() for p in every.values())
        assert all(n.rpartition(".")[0].split(".layers.")[-1][2:] in fit.reached for n in left)
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
