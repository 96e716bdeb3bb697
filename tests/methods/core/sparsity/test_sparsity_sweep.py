"""Masks and removal over unrelated architectures: a few always, all of them in `make sweep`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_model, save_model
from tests.properties.architectures import ARCHITECTURES, build, inputs, output

from assay.methods.core.sparsity.masks import bake, masks_of, matrix, matrix_of, prunable, put_masks, reach
from assay.methods.core.sparsity.projections import follows, n_m, per_row, structured
from assay.methods.core.sparsity.removal import remove
from assay.methods.core.sparsity.units import groups

SMALL = ("llama-tied", "gpt2", "phi3", "bert", "vit")
EVERY = [name if name in SMALL else pytest.param(name, marks=pytest.mark.sweep) for name in ARCHITECTURES]
NO_NEURONS = ("mixtral", "gpt_oss", "mamba")  # fused experts, or no MLP
NO_HEADS = ("mamba", "t5")


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", EVERY)
def test_masks_count_are_saved_and_baked(name, tmp_path):
    model = build(name)
    layers = prunable(model)
    share, rest = reach(model, layers)
    assert (share == 1.0) == (rest == "")
    assert share > 0.9 or name in ("mixtral", "gpt_oss", "mamba")
    masks = {}
    for layer, module in layers.items():
        weight = matrix(module).detach()
        masks[layer] = n_m(weight.abs(), 2, 4) if weight.shape[1] % 4 == 0 else per_row(weight.abs(), 0.5)
    dense = output(model, name)
    put_masks(model, masks)
    sparse = output(model, name)
    assert distance(sparse, dense) > 1e-3
    assert all(torch.equal(masks_of(model)[layer], mask) for layer, mask in masks.items())
    save_model(model, str(tmp_path / "model.safetensors"))
    again = put_masks(build(name), {layer: torch.ones_like(mask) for layer, mask in masks.items()})
    load_model(again, str(tmp_path / "model.safetensors"))
    assert torch.equal(output(again, name), sparse)
    bake(model)
    assert torch.equal(output(model, name), sparse)
    assert all(follows(matrix_of(model, layer), 2, 4) for layer, mask in masks.items() if mask.shape[1] % 4 == 0)
    half = output(model.to(torch.bfloat16), name)
    assert torch.isfinite(half).all()


@pytest.mark.parametrize("name", EVERY)
def test_units_are_taken_out_or_refused_by_name(name, tmp_path):
    model = build(name)
    found = groups(model)
    assert (name in NO_NEURONS) == all(group.kind != "neurons" for group in found.values())
    assert (name in NO_HEADS) == all(group.kind != "heads" for group in found.values())
    keep = {}
    for unit, group in found.items():
        if group.kind == "heads":
            keep[unit] = torch.arange(group.units) < group.units // 2
        else:
            weight = matrix_of(model, group.consumers[0].layer).detach()
            keep[unit] = structured(weight, 0.5, axis=1)[0]
    if not keep:
        with pytest.raises(ValueError, match="keep must name groups of units that can be followed"):
            remove(model, {"model.layers.0.mlp": torch.ones(4).bool()}, probe=inputs(name))
        return
    whole = output(model, name)
    with torch.no_grad():
        masked = build(name)
        for unit, group in found.items():
            width = group.consumers[0].segments[0][1]
            matrix(masked.get_submodule(group.consumers[0].layer))[:, ~keep[unit].repeat_interleave(width)] = 0
    expected = output(masked, name)
    report = remove(model, keep, probe=inputs(name, seed=3))
    assert report.after.params < report.before.params
    assert report.after.macs < report.before.macs
    assert distance(output(model, name), expected) < 1e-4 < distance(whole, expected)
    if report.loadable:
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert distance(output(again, name), expected) < 1e-4
    else:
        with pytest.raises(ValueError, match="model must not be saved"):
            model.save_pretrained(tmp_path)
