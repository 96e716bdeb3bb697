"""Prototypes in transformers' Mask2Former: what is computed in a layer, what stays as it was, and how it comes off again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.methods.vision.pem import apply_pem, nearest_pixels_reference, remove_pem


def mask2former(**settings):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 1,
        "decoder_layers": 4, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 5, "num_labels": 3,
        "train_num_points": 64,
    }  # fmt: skip
    config = Mask2FormerConfig(backbone_config=backbone, **{**sizes, **settings})
    return Mask2FormerForUniversalSegmentation(config).eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def layers(model):
    return model.model.transformer_module.decoder.layers


def expected_update(inner, query, key, seen, size):
    """PEM's update from its formula, of sequences: (Q, B, d) and (N, B, d) to (B, Q, d)."""
    x = inner.local(inner.norm(key.permute(1, 2, 0).reshape(query.shape[1], -1, *size))).flatten(2).transpose(1, 2)
    m = F.normalize(inner.memory_proj(x), dim=2)
    t = F.normalize(inner.query_proj(inner.query_norm(query.transpose(0, 1))), dim=2)
    split = [each.unflatten(2, (inner.heads, -1)).transpose(1, 2) for each in (t, m)]
    where = nearest_pixels_reference(*split, seen=seen)
    p = split[1].gather(2, where[..., None].expand(-1, -1, -1, split[1].shape[-1])).transpose(1, 2).flatten(2)
    return inner.out(F.normalize(inner.mix(p * t), dim=1) * inner.alpha + p)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_computes_prototypes_from_what_masked_attention_was_given(pre_norm):
    model = apply_pem(mask2former(pre_norm=pre_norm))
    calls = []
    for layer in layers(model):
        nn.init.normal_(layer.cross_attn.inner.norm.running_mean, std=0.3)
        layer.cross_attn.register_forward_hook(
            lambda module, args, kwargs, out: calls.append((module, kwargs, out)), with_kwargs=True
        )
    with torch.no_grad():
        out = model(images(64, 96), output_attentions=True)
        assert out.masks_queries_logits.shape == (2, 5, 16, 24)
        assert out.class_queries_logits.shape == (2, 5, 4)
        assert [tuple(kwargs["key"].shape) for _, kwargs, _ in calls] == [(6, 2, 32), (24, 2, 32), (96, 2, 32)]
        for (module, kwargs, found), size in zip(calls, [(2, 3), (4, 6), (8, 12)], strict=True):
            hidden = kwargs["attn_mask"].view(2, 2, 5, -1)
            assert torch.equal(hidden[:, 0], hidden[:, 1])
            expected = expected_update(module.inner, kwargs["query"], kwargs["key"], ~hidden[:, 0], size)
            assert torch.allclose(found[0].transpose(0, 1), expected, atol=1e-5)
    assert isinstance(layers(model)[0].cross_attn_layer_norm, nn.Identity) == pre_norm


@pytest.mark.parametrize("pre_norm", [False, True])
def test_it_comes_off_again(pre_norm):
    model, x = mask2former(pre_norm=pre_norm), images(64, 64)
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(x).masks_queries_logits
        assert apply_pem(model) is model
        assert not torch.allclose(model(x).masks_queries_logits, before)
        assert remove_pem(model) is model
        assert torch.equal(model(x).masks_queries_logits, before)
    assert list(model.state_dict()) == names
    assert not model.model.transformer_module.decoder._forward_pre_hooks
    apply_pem(model)  # and goes on again


def test_only_the_cross_attention_is_another():
    model = mask2former()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apply_pem(model)
    after = model.state_dict()
    assert {key for key in before if key not in after} == {key for key in before if ".cross_attn." in key}
    assert all(".cross_attn.inner." in key for key in after if key not in before)
    assert all(torch.equal(before[key], value) for key, value in after.items() if key in before)


def test_maps_of_equal_size_and_another_shape():
    model = apply_pem(mask2former())
    with torch.no_grad():
        wide, high = model(images(32, 128)), model(images(128, 32))
        again = model(images(32, 128))
    assert wide.masks_queries_logits.shape[2:] == (8, 32)
    assert high.masks_queries_logits.shape[2:] == (32, 8)
    assert torch.equal(wide.masks_queries_logits, again.masks_queries_logits)


def test_a_copy_stands_alone_and_weights_are_saved():
    model = apply_pem(mask2former())
    other, loaded = copy.deepcopy(model), apply_pem(mask2former())
    with torch.no_grad():
        for value in layers(other).parameters():
            value.add_(0.1)
        expected = model(images(64, 64)).masks_queries_logits
        assert not torch.allclose(other(images(64, 64)).masks_queries_logits, expected)
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(images(64, 64)).masks_queries_logits, expected)
        remove_pem(other)
        assert torch.equal(model(images(64, 64)).masks_queries_logits, expected)


def test_it_trains_and_runs_in_half_precision():
    model = apply_pem(mask2former()).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    truth = {
        "mask_labels": [torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)],
        "class_labels": [torch.tensor([0]), torch.tensor([1])],
    }
    truth["mask_labels"][0][:, :32] = 1
    truth["mask_labels"][1][:, :, :32] = 1
    losses = []
    for _ in range(6):
        loss = model(images(64, 64), **truth).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(layer.cross_attn.inner.memory_proj.weight.grad.any()) for layer in layers(model))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().bfloat16()
    with torch.no_grad():
        out = model(images(64, 64).bfloat16())
    assert bool(out.masks_queries_logits.isfinite().all())
    remove_pem(model)  # what comes back follows the model
    assert layers(model)[0].cross_attn.out_proj.weight.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="model must be a Mask2Former of transformers.*got Linear"):
        apply_pem(nn.Linear(2, 2))
    model = mask2former()
    with pytest.raises(ValueError, match="model must have prototypes"):
        remove_pem(model)
    apply_pem(model)
    with pytest.raises(ValueError, match="model must not have prototypes already"):
        apply_pem(model)
    with pytest.raises(ValueError, match="norm_axis must be one of"):
        apply_pem(remove_pem(model), norm_axis="rows")
    assert isinstance(layers(model)[0].cross_attn, nn.MultiheadAttention)
