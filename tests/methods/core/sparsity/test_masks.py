"""Masks on models: torch.nn.utils.prune's form, ties, training, saving, and refusals before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from tests.properties.architectures import build, output
from tests.tiny import tiny_model, token_ids
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from assay.methods.core.layers.linears import open_
from assay.methods.core.sparsity.masks import (
    bake,
    hold,
    masks_of,
    matrix,
    matrix_of,
    prunable,
    put_masks,
    reach,
    take_masks,
)
from assay.methods.core.sparsity.projections import global_, n_m, per_row


def magnitude_masks(model, share=0.5):
    return global_({name: matrix(layer).detach().abs() for name, layer in prunable(model).items()}, share)


def small():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def test_masks_are_in_the_form_of_torch_prune_and_read_back():
    model, theirs = small(), None
    masks = magnitude_masks(model)
    theirs = copy.deepcopy(model)
    put_masks(model, masks)
    prune.custom_from_mask(theirs[0], "weight", masks["0"])
    prune.custom_from_mask(theirs[3], "weight", masks["3"])
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert prune.is_pruned(model)
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(model(x), theirs(x))
    for either in (model, theirs):
        found = masks_of(either)
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[name], masks[name]) for name in masks)
        assert torch.equal(matrix_of(either, "3"), either[3].weight_orig * masks["3"])


def test_a_second_mask_adds_to_the_first_and_taking_off_gives_the_weights_back():
    model = nn.Sequential(nn.Linear(8, 4))
    weight = model[0].weight.detach().clone()
    first, second = torch.rand(4, 8) > 0.3, torch.rand(4, 8) > 0.3
    put_masks(put_masks(model, {"0": first}), {"0": second})
    assert torch.equal(masks_of(model)["0"], first & second)
    assert torch.equal(take_masks(model)[0].weight, weight)
    assert masks_of(model) == {}
    assert list(dict(model.named_parameters())) == ["0.bias", "0.weight"]


def test_conv1d_masks_are_out_in_like_all_others():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=11, n_positions=16)).eval()
    name = "transformer.h.0.mlp.c_fc"
    layer = model.get_submodule(name)
    assert matrix(layer).shape == (128, 32)
    mask = n_m(matrix(layer).detach().abs(), 2, 4)
    expected = layer.weight.detach() * mask.T
    put_masks(model, {name: mask})
    assert torch.equal(layer.weight, expected)
    assert torch.equal(masks_of(model)[name], mask)
    assert torch.equal(matrix_of(model, name), expected.T)
    assert "lm_head" not in prunable(model)
    assert "lm_head" in prunable(model, head=True)


def test_masked_weights_stay_zero_in_training_and_others_move():
    model = small()
    masks = magnitude_masks(model, 0.3)
    put_masks(model, masks)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    x = torch.randn(8, 2, 4, 4)
    before = {name: matrix_of(model, name).detach().clone() for name in masks}
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    bake(model)
    for name, mask in masks.items():
        weight = matrix_of(model, name)
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight, before[name])


def test_a_held_optimiser_keeps_plain_weights_and_its_own_state_at_zero():
    model = nn.Sequential(nn.Linear(8, 4))
    mask = per_row(model[0].weight.detach().abs(), 0.5)
    x = torch.randn(16, 8)
    loose = copy.deepcopy(model)
    for net, held in ((model, True), (loose, False)):
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        with torch.no_grad():
            net[0].weight *= mask
        handle = hold(optimiser, [(net[0].weight, mask)]) if held else None
        for _ in range(3):
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()
        gone = net[0].weight[~mask]
        state = optimiser.state[net[0].weight]
        assert bool((gone == 0).all()) == held
        assert bool((state["exp_avg"][~mask] == 0).all()) == held
        if handle is not None:
            handle.remove()
            optimiser.step()
    with pytest.raises(ValueError, match="masks must be of the optimiser's parameters"):
        hold(torch.optim.SGD(model.parameters(), lr=1), [(nn.Parameter(torch.zeros(2)), torch.ones(2).bool())])
    with pytest.raises(ValueError, match=r"masks must have the shape of the parameter, \(4, 8\), got \(8, 4\)"):
        hold(torch.optim.SGD(model.parameters(), lr=1), [(model[0].weight, mask.T)])


def test_state_travels_in_safetensors_and_baked_models_are_saved_as_usual(tmp_path):
    model, ids = tiny_model(tie_word_embeddings=True), token_ids(2, 9)
    masks = magnitude_masks(model, 0.4)
    put_masks(model, masks)
    with torch.no_grad():
        expected = model(ids).logits
    save_model(model, str(tmp_path / "masked.safetensors"))
    again = put_masks(
        tiny_model(seed=1, tie_word_embeddings=True), {name: torch.ones_like(mask) for name, mask in masks.items()}
    )
    load_model(again, str(tmp_path / "masked.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    assert all(torch.equal(masks_of(again)[name], mask) for name, mask in masks.items())
    with pytest.raises(ValueError, match="model must not be saved with masks on it"):
        model.save_pretrained(tmp_path / "no")
    copied = copy.deepcopy(model)
    bake(model).save_pretrained(tmp_path / "baked")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(copied(ids).logits, expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shared_weights_need_one_mask_for_all_who_hold_them():
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(shared, nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = shared.weight
    mask = torch.rand(4, 4) > 0.5
    with pytest.raises(ValueError, match="masks must reach all that share a weight: '0' has that of '2'"):
        put_masks(model, {"0": mask})
    with pytest.raises(ValueError, match="masks must be the same where a weight is shared, got two for '0' and '2'"):
        put_masks(model, {"0": mask, "2": ~mask})
    assert masks_of(model) == {}
    put_masks(model, {"0": mask, "2": mask})
    assert model[0].weight_orig is model[2].weight_orig
    bake(model)
    assert model[0].weight is model[2].weight
    assert bool((model[0].weight[~mask] == 0).all())
    tied = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head' has that of 'model.embed_tokens'"):
        put_masks(tied, {"lm_head": torch.ones(97, 64).bool()})


def test_what_is_not_reached_is_said():
    model = build("mixtral")
    share, rest = reach(model, prunable(model))
    assert 0 < share < 0.5
    assert rest == "the fused experts of 2 layers (model.layers.0.mlp.experts ...) stay as they are"
    with pytest.raises(ValueError, match="got the fused experts 'model.layers.0.mlp.experts': open them first"):
        put_masks(model, {"model.layers.0.mlp.experts": torch.ones(1).bool()})
    opened = open_(copy.deepcopy(model))
    share, rest = reach(opened, prunable(opened))
    assert (share, rest) == (1.0, "")
    masks = {name: n_m(matrix(layer).detach().abs(), 2, 4) for name, layer in prunable(opened).items()}
    put_masks(opened, masks)
    assert torch.isfinite(output(opened, "mixtral")).all()
    half = list(prunable(build("llama")))[::2]
    share, rest = reach(build("llama"), half)
    assert 0 < share < 1
    assert rest.endswith("stay as they are")


def test_what_a_model_reads_without_calling_it_is_left_alone():
    model = build("mamba")
    names = {name.rsplit(".", 1)[-1] for name in prunable(model)}
    assert names == {"in_proj", "x_proj", "out_proj"}
    for name in ("conv1d", "dt_proj"):
        path = f"backbone.layers.0.mixer.{name}"
        mask = torch.ones(model.get_submodule(path).weight.shape, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"that the model calls, got '{path}'"):
            put_masks(model, {path: mask})
    called = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))
    assert list(prunable(called)) == ["0"]


def test_bad_masks_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 2), nn.MultiheadAttention(4, 2), nn.Embedding(3, 3))
    good = torch.ones(2, 4, dtype=torch.bool)
    before = list(model.state_dict())
    for masks, error, message in (
        (
            {"0": good, "1.out_proj": torch.ones(4, 4).bool()},
            ValueError,
            "masks must name linear layers or convolutions",
        ),
        ({"0": good, "2": torch.ones(3, 3).bool()}, ValueError, "that the model calls, got '2'"),
        ({"0": good, "9": good}, ValueError, "got '9'"),
        ({"0": good.T}, ValueError, r"masks\['0'\] must have shape \(2, 4\), got \(4, 2\)"),
        ({"0": good.float()}, TypeError, r"masks\['0'\] must hold bools, got torch.float32"),
        ([good], TypeError, "masks must be a mapping of layers to tensors, got list"),
    ):
        with pytest.raises(error, match=message):
            put_masks(model, masks)
        assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="model must hold its layers, got a single Linear"):
        prunable(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="which matches no module"):
        prunable(model, include=["nothing.*"])
