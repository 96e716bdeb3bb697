"""Models by name: building, maps only, another classifier, weights whole or refused, and what timm is told."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor, nn

from assay.methods.core.vision import registry
from assay.methods.core.vision.backbone import (
    Backbone,
    FeaturesOnly,
    map_to_tokens,
    resized_positions,
    tokens_to_map,
)
from assay.methods.core.vision.registry import backbones, build, list_models, register_in_timm, registered
from assay.methods.core.vision.weights import load_weights


class Toy(Backbone):
    """Two stages; what has run is in `ran`."""

    strides = (2, 4)
    classifier_name = "top.fc"

    def __init__(self, width=4, *, num_classes=1000, in_chans=3, input_size=8) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        from assay.methods.core.vision.backbone import classifier

        self.channels, self.num_features = (width, 2 * width), 2 * width
        self.one, self.two = nn.Conv2d(in_chans, width, 2, 2), nn.Conv2d(width, 2 * width, 2, 2)
        self.top = nn.Module()
        self.top.fc = classifier(2 * width, num_classes)
        self.ran: list[str] = []

    def stages(self, x):
        self.ran.append("one")
        x = self.one(x)
        yield 2, x
        self.ran.append("two")
        yield 4, self.two(x)

    def forward_features(self, x):
        return self.feature_maps(x)[4]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.top.fc(x)


def renamed(state):
    return {key.removeprefix("module."): tensor for key, tensor in state.items() if key.startswith("module.")}


@pytest.fixture
def toys(monkeypatch):
    """A registry of its own with two models."""
    monkeypatch.setattr(registry, "_MODELS", {})
    backbones({"toy_small": {"width": 4}, "toy_large": {"width": 8}}, layouts={"parallel": renamed})(Toy)


@pytest.fixture
def timm(monkeypatch):
    """A module that stands for timm's registry, with one model in it already."""
    package, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    package.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("timm", None)
    known = {"toy_large": lambda pretrained=False: "timm's own"}
    models.is_model = lambda name: name in known
    models.register_model = lambda function: known.setdefault(function.__name__, function)
    package.models = models
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    return known


# --- by name


def test_a_name_gives_the_settings_of_its_table(toys):
    assert list_models() == ["toy_large", "toy_small"]
    assert list_models("*small") == ["toy_small"]
    model = build("toy_large", num_classes=5, in_chans=1)
    assert model.channels == (8, 16)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert build("toy_large", width=2).channels == (2, 4)
    assert model.default_cfg["input_size"] == (1, 8, 8)
    assert model.default_cfg["classifier"] == "top.fc"


def test_unknown_names_and_settings_are_refused(toys):
    with pytest.raises(ValueError, match="no image model is called 'toy_smal'; near it: toy_small"):
        build("toy_smal")
    with pytest.raises(ValueError, match="toy_large"):
        registered("swin")
    with pytest.raises(TypeError, match="depth"):
        build("toy_small", depth=3)
    with pytest.raises(ValueError, match="num_classes"):
        build("toy_small", num_classes=-1)
    with pytest.raises(TypeError, match="in_chans"):
        build("toy_small", in_chans=1.5)


def test_a_name_belongs_to_one_class(toys):
    class Other(Toy):
        pass

    with pytest.raises(ValueError, match="'toy_small' is registered already"):
        backbones({"toy_small": {}})(Other)
    backbones({"toy_small": {"width": 6}})(Toy)  # the same class again, as after a reload
    assert build("toy_small").channels == (6, 12)


# --- the classifier, and maps only


def test_another_classifier_or_none(toys):
    model = build("toy_small", num_classes=3).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model.get_classifier() is model.top.fc
    assert model.top.fc.weight.dtype == torch.float64
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), pooled)
    assert model.num_classes == 0
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


def test_maps_only(toys):
    model = build("toy_small", features_only=True)
    x = torch.randn(1, 3, 8, 12)
    maps = model(x)
    assert [tuple(each.shape) for each in maps] == [(1, 4, 4, 6), (1, 8, 2, 3)]
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([4, 8], [2, 4])
    assert isinstance(model.model.get_classifier(), nn.Identity)
    assert torch.equal(maps[1], model.model.feature_maps(x)[4])


def test_stages_after_the_last_one_asked_for_do_not_run(toys):
    model = build("toy_small", features_only=True, out_indices=(0,))
    assert len(model(torch.randn(1, 3, 8, 8))) == 1
    assert model.model.ran == ["one"]
    assert model.feature_info.channels() == [4]


def test_places_count_from_the_end_too_and_come_in_order(toys):
    model = build("toy_small", features_only=True, out_indices=(-1, 0, 1))
    assert model.out_indices == (0, 1)
    for bad in ((2,), (-3,), ()):
        with pytest.raises(ValueError, match="out_indices must be places of 2 maps"):
            FeaturesOnly(build("toy_small"), bad)


def test_images_of_another_kind_are_refused(toys):
    model, maps = build("toy_small"), build("toy_small", features_only=True)
    for call in (model, maps, model.feature_maps):
        for x in (torch.zeros(1, 3, 8, 8).double(), torch.ones(1, 3, 8, 8, dtype=torch.int64), None):
            with pytest.raises(TypeError, match="^x must"):
                call(x)
        for shape in ((3, 8, 8), (1, 1, 8, 8)):
            with pytest.raises(ValueError, match="^x must have shape"):
                call(torch.zeros(shape))


# --- weights


def test_weights_are_taken_whole_or_refused(toys, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source, model = build("toy_small", num_classes=3), build("toy_small", num_classes=3)
    x = torch.randn(1, 3, 8, 8)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = source.state_dict()
    for bad, message in [
        ({**state, "extra": torch.zeros(1)}, "1 keys are not ours .extra."),
        ({key: tensor for key, tensor in state.items() if key != "one.bias"}, "1 keys are missing .one.bias."),
        ({**state, "one.bias": torch.zeros(5)}, r"1 shapes differ .one.bias \(5,\) for \(4,\)."),
        (build("toy_small", num_classes=4).state_dict(), "2 shapes differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(model, bad)
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert load_weights(model, state) == "assay"
    assert torch.equal(model(x), source(x))
    model.load_state_dict(before)
    assert load_weights(model, {f"module.{key}": tensor for key, tensor in state.items()}) == "parallel"
    assert torch.equal(model(x), source(x))
    model.load_state_dict(before)
    save_file(state, tmp_path / "weights.safetensors")
    assert load_weights(model, tmp_path / "weights.safetensors") == "assay"
    assert torch.equal(model(x), source(x))


def test_layouts_are_named(toys, tmp_path):
    model = build("toy_small")
    with pytest.raises(ValueError, match="layout must be auto, assay, parallel, got 'timm'"):
        load_weights(model, model.state_dict(), layout="timm")
    with pytest.raises(ValueError, match="as parallel, "):
        load_weights(model, model.state_dict(), layout="parallel")
    with pytest.raises(ValueError, match=r"must be a .safetensors file"):
        load_weights(model, tmp_path / "weights.pt")


# --- timm


def test_timm_builds_our_models_and_keeps_its_own(toys, timm):
    assert register_in_timm() == ["toy_small"]
    assert register_in_timm() == []
    model = timm["toy_small"](
        num_classes=4, in_chans=1, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None
    )
    assert isinstance(model, Toy)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    maps = timm["toy_small"](features_only=True, out_indices=(1,))
    assert isinstance(maps, FeaturesOnly)
    assert timm["toy_large"]() == "timm's own"
    assert timm["toy_small"].__name__ == "toy_small"
    with pytest.raises(ValueError, match="pretrained must be False"):
        timm["toy_small"](pretrained=True)


def test_without_timm_nothing_is_registered(toys, monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert register_in_timm() == []


# --- tokens and maps


def test_tokens_and_maps_are_inverse_views():
    tokens = torch.randn(2, 6, 5)
    found = tokens_to_map(tokens, 2, 3)
    assert found.shape == (2, 5, 2, 3)
    assert found.data_ptr() == tokens.data_ptr()
    assert torch.equal(found[:, :, 1, 2], tokens[:, 5])
    assert torch.equal(map_to_tokens(found), tokens)


def test_positions_of_the_same_size_stay_and_others_are_interpolated():
    positions = torch.randn(1, 12, 4)
    assert resized_positions(positions, (3, 4), (3, 4)) is positions
    assert resized_positions(positions, (6, 5), (3, 4)).shape == (1, 30, 4)
    level = torch.ones(1, 12, 4, dtype=torch.bfloat16)
    found = resized_positions(level, (5, 5), (3, 4))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), torch.ones(1, 25, 4))
