"""Image models by name: each paper's file has a table of configurations, and a decorator that makes them known.

    CONFIGS = {"swin_tiny_patch4_window7_224": {"embed_dim": 96, "depths": (2, 2, 6, 2)}, ...}

    @backbones(CONFIGS, layouts={"official": from_official})
    class Swin(Backbone): ...

    model = build("swin_tiny_patch4_window7_224", num_classes=10)
    maps = build("swin_tiny_patch4_window7_224", features_only=True)(images)     # a list, fine to coarse

No weights come with it: they are random, or the user's own (`weights.load_weights`).
"""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import Tensor, nn

from assay.methods.core.vision.backbone import Backbone, FeaturesOnly

Layout = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A function that renames (and where needed reshapes) the tensors of somebody's state dict into ours."""
B = TypeVar("B", bound=type[Backbone])


@dataclass(frozen=True)
class Registered:
    """A model that can be built: its class and its settings."""

    make: type[Backbone]
    settings: Mapping[str, Any]


_MODELS: dict[str, Registered] = {}


def backbones(
    configs: Mapping[str, Mapping[str, Any]], *, layouts: Mapping[str, Layout] | None = None
) -> Callable[[B], B]:
    """Class decorator: every name of `configs` can be built with those settings. Raises ValueError for a name of another class."""

    def register(cls: B) -> B:
        for name, settings in configs.items():
            known = _MODELS.get(name)
            if known is not None and known.make.__qualname__ != cls.__qualname__:
                raise ValueError(f"model {name!r} is registered already, by {known.make.__module__}")
            _MODELS[name] = Registered(cls, settings)
        cls.layouts = dict(layouts or {})
        return cls

    return register


def build(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> Any:
    """The model `name` with random weights: a `Backbone`, or, where `features_only`, a `FeaturesOnly` around one.

    `overrides` replace settings of its table (depths, widths, drop_path_rate, ...). Raises ValueError for a name that is not known,
    TypeError for a setting that its class does not have.
    """
    found = registered(name)
    model = found.make(num_classes=num_classes, in_chans=in_chans, **{**found.settings, **overrides})
    return FeaturesOnly(model, out_indices) if features_only else model


def registered(name: str) -> Registered:
    """What is known of the model `name`. Raises ValueError, with the names most like it, for another one."""
    if name not in _MODELS:
        near = get_close_matches(str(name), _MODELS, 3, 0.4) or sorted(_MODELS)[:3]
        raise ValueError(f"no image model is called {name!r}; near it: {', '.join(near)}")
    return _MODELS[name]


def list_models(pattern: str = "*") -> list[str]:
    """The names that can be built and match the pattern ("swin*"), sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def register_in_timm() -> list[str]:
    """Make the models known to timm (`timm.create_model("t2t_vit_14")`); the names that were added, none where timm is not installed.

    Names that timm has already stay timm's.
    """
    if importlib.util.find_spec("timm") is None:
        return []
    timm = importlib.import_module("timm.models")
    added = []
    for name in list_models():
        if not timm.is_model(name):
            timm.register_model(_entry_point(name))
            added.append(name)
    return added


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """A function as timm registers them: its name is the model's."""

    def make(pretrained: bool = False, **settings: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"no weights come with {name!r}: pretrained must be False")
        for timms_own in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            settings.pop(timms_own, None)
        model: nn.Module = build(name, **settings)
        return model

    make.__name__ = make.__qualname__ = name
    return make
