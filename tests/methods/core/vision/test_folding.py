"""Norms are folded where that changes nothing, and only there: shared layers, outputs used twice, nets of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.methods.core.vision.folding import NORMS, fold_batch_norm


def worn(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with the norms as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


@torch.no_grad()
def assert_same(model: nn.Module, folded: nn.Module, x: torch.Tensor) -> None:
    """On another input than the one it was folded with."""
    expected, found = model(x), folded(x)
    expected, found = (out.logits if hasattr(out, "logits") else out for out in (expected, found))
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda bias: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=bias), lambda: nn.BatchNorm2d(6), (2, 4, 9, 7)),
        (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
        (lambda bias: nn.Conv3d(4, 6, 2, bias=bias), lambda: nn.BatchNorm3d(6), (2, 4, 3, 4, 5)),
        (lambda bias: nn.Linear(4, 6, bias=bias), lambda: nn.BatchNorm1d(6), (5, 4)),
        (lambda bias: nn.Conv2d(4, 6, 3, bias=bias), lambda: nn.BatchNorm2d(6, affine=False), (2, 4, 9, 7)),
    ],
)
def test_a_pair_becomes_one_layer(layer, norm, shape, bias):
    model = worn(nn.Sequential(layer(bias), norm(), nn.ReLU()))
    folded = fold_batch_norm(model, torch.randn(shape))
    assert folded.folded == (1, 1)
    assert norms_of(folded) == 0
    assert norms_of(model) == 1  # the model itself stays as it was
    assert_same(model, folded, torch.randn(shape))


class Uses(nn.Module):
    """What the convolution gives is normalised, and used as it is too (or only shown to be there)."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.other, self.last = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )
        self.added = added

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(self.norm(y))
        return self.last(self.other(z + y if self.added else z))


def test_an_output_that_is_used_elsewhere_too_stays():
    """The pair beside it is folded all the same."""
    model = worn(Uses(added=True))
    folded = fold_batch_norm(model, torch.randn(2, 3, 8, 8))
    assert folded.folded == (1, 2)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert isinstance(folded.last, nn.Identity)
    assert_same(model, folded, torch.randn(2, 3, 8, 8))
    assert fold_batch_norm(worn(Uses(added=False)), torch.randn(2, 3, 8, 8)).folded == (2, 2)


class Shared(nn.Module):
    """One layer before two norms, or one norm behind two layers, or a pair that is called twice."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.m, self.n = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        if self.what == "layer":
            y = self.a(x)
            return self.m(y) * self.n(y)
        if self.what == "norm":
            return self.m(self.a(x)) * self.m(self.b(x))
        return self.m(self.a(self.m(self.a(x))))


@pytest.mark.parametrize("what", ["layer", "norm", "pair"])
def test_what_is_shared_is_left_alone(what):
    model = worn(Shared(what))
    folded = fold_batch_norm(model, torch.randn(1, 4, 5, 5))
    assert folded.folded == (0, 2)
    assert norms_of(folded) == 2
    assert_same(model, folded, torch.randn(1, 4, 5, 5))


def test_a_module_that_stands_in_two_places_is_left_alone_or_stays_shared():
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = worn(nn.Sequential(conv, norm, nn.ReLU(), conv, norm))
    folded = fold_batch_norm(model, torch.randn(1, 4, 5, 5))
    assert_same(model, folded, torch.randn(1, 4, 5, 5))


def test_norms_that_follow_something_else_stay():
    model = worn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    folded = fold_batch_norm(model, torch.randn(1, 3, 8, 8))
    assert folded.folded == (1, 2)
    assert isinstance(folded[2], nn.BatchNorm2d)
    assert_same(model, folded, torch.randn(3, 3, 9, 8))


def test_norms_without_running_statistics_and_transposed_convolutions_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)
    )
    folded = fold_batch_norm(worn(model), torch.randn(2, 3, 8, 8))
    assert folded.folded == (0, 2)
    assert_same(model, folded, torch.randn(2, 3, 8, 8))


def test_a_training_model_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="model must be in eval mode"):
        fold_batch_norm(model.train(), torch.randn(2, 3, 8, 8))
    model.eval()[1].train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        fold_batch_norm(model, torch.randn(2, 3, 8, 8))


def test_linear_on_tokens_before_a_norm_over_channels_is_not_folded():
    """BatchNorm1d takes (B, C, L) for channels first: the linear layer's features are its last dimension, not its channels."""
    for features in (5, 7):
        model = worn(nn.Sequential(nn.Linear(6, features), nn.BatchNorm1d(5)))
        folded = fold_batch_norm(model, torch.randn(2, 5, 6))
        assert folded.folded == (0, 1)
        assert_same(model, folded, torch.randn(2, 5, 6))


def test_half_precision_folds_within_its_rounding():
    model = worn(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).to(torch.bfloat16)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    folded = fold_batch_norm(model, x)
    assert folded(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert (folded(x) - model(x)).abs().max() <= 0.03 * model(x).abs().max()


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def bottlenecks():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=3)
    return ResNetForImageClassification(config)


def regnet():
    from transformers import RegNetConfig, RegNetForImageClassification

    config = RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, num_labels=3)
    return RegNetForImageClassification(config)


def mobilenet():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.1, min_depth=4, num_labels=3))


@pytest.mark.parametrize("make", [resnet, bottlenecks, regnet, mobilenet])
def test_nets_of_transformers_lose_all_their_norms(make):
    torch.manual_seed(0)
    model = worn(make())
    norms = norms_of(model)
    folded = fold_batch_norm(model, torch.randn(1, 3, 32, 32))
    assert folded.folded == (norms, norms)
    assert norms_of(folded) == 0
    assert_same(model, folded, torch.randn(2, 3, 64, 48))
