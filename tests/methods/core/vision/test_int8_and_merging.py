"""8-bit convolutions against the same in float64, and merging of tokens against a loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from assay.methods.core.vision import int8_conv
from assay.methods.core.vision.int8_conv import Int8Conv2d, quantize_convolutions
from assay.methods.core.vision.token_merging import merge, merge_tokens, why_not


@pytest.mark.parametrize("settings", [
    {"padding": 1}, {"padding": 2, "dilation": 2}, {"stride": 2, "padding": 1}, {"groups": 4}, {"groups": 8, "padding": 1, "bias": False},
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 8])
def test_products_are_those_of_the_codes(settings, batch):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, **settings)
    x = 3 * torch.randn(batch, 8, 9, 11) + 1
    layer = Int8Conv2d(conv, float(x.min()), float(x.max()))
    with torch.no_grad():
        y, expected, exact = layer(x), layer.reference(x), conv(x)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert (y - exact).norm() / exact.norm() < 0.04
    assert (y - exact).norm() > 0  # it is rounded


def test_half_precision_other_sizes_copies_and_saved_weights():
    torch.manual_seed(0)
    layer = Int8Conv2d(nn.Conv2d(4, 6, 3, padding=1), -2.0, 3.0)
    x = torch.randn(2, 4, 7, 5)
    with torch.no_grad():
        y = layer(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert layer(torch.randn(1, 4, 20, 30)).shape == (1, 6, 20, 30)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        other = Int8Conv2d(nn.Conv2d(4, 6, 3, padding=1), -2.0, 3.0)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), y)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(x.requires_grad_())


def test_inputs_beyond_the_range_end_at_its_ends_and_padding_is_zero():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        layer = Int8Conv2d(conv, 0.5, 1.0)  # zero lies outside of what was seen, and must be exact all the same
        assert layer(torch.zeros(1, 1, 4, 4)).abs().max() == 0
        assert torch.allclose(layer(torch.full((1, 1, 1, 1), 100.0)), torch.ones(1), atol=0.01)


def test_a_dead_channel_and_an_empty_range_stay_finite():
    conv = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        conv.weight[0] = 0
        y = Int8Conv2d(conv, 0.0, 0.0)(torch.zeros(1, 2, 3, 3))
    assert torch.allclose(y, conv.bias.view(1, 2, 1, 1).expand_as(y), atol=1e-6)


def test_whole_models_follow_their_float_selves():
    """A residual net, and one that reads the stride and padding of its convolutions (MobileNetV2)."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    for model in (
        ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5)
        ),
        MobileNetV2ForImageClassification(
            MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=5, tf_padding=True)
        ),
    ):
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = 1.0
        with torch.no_grad():
            model(x)  # norms that have seen something: at first every block shrinks what it is given
            expected = model.eval()(x).logits
            rounded = quantize_convolutions(copy.deepcopy(model), [x])
            found = rounded(x).logits
        assert not int8_conv.convolutions(rounded)
        assert found.isfinite().all()
        assert (
            torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.5
        )  # 53 layers of random weights double every error
    assert rounded.mobilenet_v2.conv_stem.first_conv.convolution.stride == (2, 2)


def test_what_cannot_be_quantised_is_said():
    conv = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    with pytest.raises(ValueError, match="eval mode"):
        quantize_convolutions(nn.Sequential(nn.Conv2d(1, 1, 1)), [torch.ones(1, 1, 2, 2)])
    with pytest.raises(ValueError, match="at least one batch"):
        quantize_convolutions(conv, [])
    with pytest.raises(ValueError, match="no plain"):
        quantize_convolutions(nn.Sequential(nn.Linear(1, 1)).eval(), [torch.ones(1)])
    same = nn.Sequential(nn.Conv2d(1, 1, 3, padding="same")).eval()
    assert not int8_conv.convolutions(same)
    unseen = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "b": nn.Conv2d(1, 1, 1)}).eval()
    unseen.forward = lambda x: unseen["a"](x)
    quantize_convolutions(unseen, [torch.ones(1, 1, 2, 2)])
    assert isinstance(unseen["a"], Int8Conv2d)
    assert isinstance(unseen["b"], nn.Conv2d)  # it never ran: its range is not known


# ------------------------------------------------------------------------------------------------------------------- merging


def by_hand(x, size, tokens, special):
    """One sequence, as the paper words it."""
    rest, weight = x[special:], size[special:]
    first, second = list(range(0, len(rest), 2)), list(range(1, len(rest), 2))
    ties = []
    for i in first:
        alike = [float(torch.cosine_similarity(rest[i], rest[j], dim=0)) for j in second]
        best = max(range(len(second)), key=lambda j: alike[j])
        ties.append((alike[best], i, second[best]))
    gone = {i: j for _, i, j in sorted(ties, reverse=True)[:tokens]}
    groups = {j: [j, *(i for i, to in gone.items() if to == j)] for j in second}
    kept = [(rest[i], weight[i]) for i in first if i not in gone]
    merged = [((rest[g] * weight[g]).sum(0) / weight[g].sum(), weight[g].sum(0)) for g in groups.values()]
    rows = [*zip(x[:special], size[:special], strict=True), *kept, *merged]
    return torch.stack([row for row, _ in rows]), torch.stack([w.reshape(1) for _, w in rows])


@pytest.mark.parametrize(("count", "tokens", "special"), [(17, 4, 1), (18, 8, 2), (9, 3, 1), (6, 1, 0)])
def test_merging_is_the_loop(count, tokens, special):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(3, count, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (3, count, 1), generator=generator).double()
    y, sizes = merge(x, size, tokens, special)
    assert y.shape == (3, count - tokens, 5)
    for row in range(3):
        expected, expected_size = by_hand(x[row], size[row], tokens, special)
        assert torch.allclose(y[row], expected, atol=1e-6)
        assert torch.equal(sizes[row], expected_size)
    assert torch.equal(sizes.sum(1), size.sum(1))  # every patch is still counted once


def test_at_most_half_of_the_tokens_go_and_none_of_too_few():
    x, size = torch.randn(1, 5, 2), torch.ones(1, 5, 1)
    assert merge(x, size, 100, 1)[0].shape == (1, 3, 2)
    assert merge(x[:, :2], size[:, :2], 4, 1)[0].shape == (1, 2, 2)


def test_blocks_of_a_vit_are_given_fewer_tokens():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    model = ViTForImageClassification(config).eval()
    lengths = []
    for block in model.vit.layers:
        block.register_forward_hook(lambda module, given, out: lengths.append(given[0].shape[1]))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = model(x).logits
        merged = merge_tokens(model, 8)
        lengths.clear()
        found = merged(x).logits
        assert lengths == [65, 57, 49, 41]
        assert torch.equal(found[:1], merged(x[:1]).logits) or torch.allclose(
            found[:1], merged(x[:1]).logits, atol=1e-5
        )
        assert copy.deepcopy(merged)(x).logits.equal(found)
    assert not torch.allclose(found, whole)
    assert "this is Conv2d" in why_not(nn.Conv2d(1, 1, 1))
    assert "merged already" in why_not(model)
    with pytest.raises(ValueError, match="tokens must be"):
        merge_tokens(model, 0)
