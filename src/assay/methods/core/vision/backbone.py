"""What every backbone offers, under the names that timm's users know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from assay import checks

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """An image model: `forward(x)` is `forward_head(forward_features(x))`, logits (B, num_classes) of images (B, in_chans, H, W).

    A subclass sets `strides` and `channels` (of the maps that `stages` yields, in order), `num_features` (the width the classifier
    sees) and keeps its classifier in the attribute that `classifier_name` names; it writes `stages`, `forward_features` and
    `forward_head`. `input_size` is the side of the images it was published for; other sizes work unless its docstring says otherwise.
    """

    classifier_name: ClassVar[str] = "head"
    layouts: ClassVar[Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]] = {}
    """By name, what turns a state dict in somebody's layout into ours (`weights.load_weights`)."""
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    num_features: int
    input_size: int

    def __init__(self, *, num_classes: int, in_chans: int, input_size: int = 224) -> None:
        super().__init__()
        self.num_classes = checks.whole("num_classes", num_classes, low=0)
        self.in_chans = checks.whole("in_chans", in_chans, low=1)
        self.input_size = checks.whole("input_size", input_size, low=1)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(stride, map) of each resolution, fine to coarse, map (B, channels, H/stride, W/stride); a stage runs when it is asked for."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """What the head is given: maps or tokens, as the paper has them, after the last norm where it has one."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, num_features) where `pre_logits`, else logits (B, num_classes)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.check_images(x)
        return self.forward_head(self.forward_features(x))

    def feature_maps(self, x: Tensor) -> dict[int, Tensor]:
        """The maps of all stages by stride, each (B, channels, height, width): what detectors and segmenters are built on."""
        self.check_images(x)
        return dict(self.stages(x))

    def get_classifier(self) -> nn.Module:
        """The last layer: an `nn.Linear`, or an `nn.Identity` without classes."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Another last layer for `num_classes` classes, with new weights; 0 takes it away, and pooled features come out."""
        self.num_classes = checks.whole("num_classes", num_classes, low=0)
        like = next(self.parameters())
        self.set_submodule(
            self.classifier_name, classifier(self.num_features, num_classes).to(device=like.device, dtype=like.dtype)
        )

    def check_images(self, x: Any) -> None:
        """Raises TypeError or ValueError, naming x, for what are no images of this model: (B, in_chans, H, W) in its dtype."""
        checks.tensor(
            "x", x, shape=("batch", self.in_chans, "height", "width"), dtype=next(self.parameters()).dtype, empty=True
        )

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Under timm's names: what the published weights want of images. No weights come with assay."""
        return {
            "input_size": (self.in_chans, self.input_size, self.input_size),
            "num_classes": self.num_classes,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "classifier": self.classifier_name,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        }


class FeatureInfo:
    """`channels()` and `reduction()` of the maps that come out, as timm's models with `features_only` have them."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        self._channels, self._strides = list(channels), list(strides)

    def channels(self) -> list[int]:
        return list(self._channels)

    def reduction(self) -> list[int]:
        return list(self._strides)


class FeaturesOnly(nn.Module):
    """A backbone whose `forward` gives the list of its maps at `out_indices` (places in `model.strides`; None is all of them).

    Stages after the last one asked for are not run. Raises ValueError for a place that is not there.
    """

    def __init__(self, model: Backbone, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(model.strides)
        wanted = list(range(count)) if out_indices is None else [int(index) for index in out_indices]
        if not wanted or any(not -count <= index < count for index in wanted):
            raise ValueError(
                f"out_indices must be places of {count} maps ({-count} to {count - 1}), got {out_indices!r}"
            )
        self.out_indices = tuple(sorted({index % count for index in wanted}))
        model.reset_classifier(0)
        self.model = model
        self.feature_info = FeatureInfo(
            [model.channels[index] for index in self.out_indices], [model.strides[index] for index in self.out_indices]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        self.model.check_images(x)
        found = []
        for index, (_, stage) in enumerate(self.model.stages(x)):
            if index in self.out_indices:
                found.append(stage)
            if index == self.out_indices[-1]:
                break
        return found


def classifier(features: int, num_classes: int) -> nn.Module:
    """A linear layer with weights of standard deviation 0.02 and no bias at first, or nothing for no classes."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(features, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C) in row-major order to (B, C, height, width), in channels-last memory: a view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H * W, C), row by row."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def resized_positions(positions: Tensor, size: tuple[int, int], old: tuple[int, int]) -> Tensor:
    """Positions (1, old height * old width, C) for a grid of another size, by bicubic interpolation; the same tensor for the same size."""
    if size == old:
        return positions
    grid = positions.float().unflatten(1, old).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
