"""Swin: what shifting the windows gains in accuracy, what the cyclic shift saves over padding, and what windows save over the whole map.

Accuracy is that of small networks which tell from a crop which of twelve photographs it is from (`training`). All of them are the
same pyramid; what mixes positions differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import CONTROLS, Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.training import Judged, difference, error_for_choice, guarded, judged
from assay.methods.core.vision.pyramid import Pyramid
from assay.methods.core.vision.windows import (
    MASKED,
    ShiftedWindowAttention,
    WindowAttention,
    cached,
    window_partition,
    window_reverse,
)
from assay.methods.vision.swin import attention_macs, from_transformers
from assay.workloads.pictures import PICTURES, picture

ACCURACY = "swin/accuracy"
WIDTH, DEPTHS, HEADS, PATCH, WINDOW, STEPS = 32, (2, 2), (2, 4), 4, 3, 100


# ------------------------------------------------------------------------------------------------------- the networks compared


class Scattered(WindowAttention):
    """Attention among positions that lie apart, as many at a time as a window has: a grid over the map, or random ones (fixed)."""

    def __init__(self, width: int, window: int, heads: int, *, random: bool) -> None:
        super().__init__(width, window, heads)
        self.random = random

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        height, width, channels = x.shape[1:]
        order = cached(_random_order if self.random else _grid_order, height, width, self.window, like=x)
        groups = x.flatten(1, 2)[:, order].reshape(-1, self.window**2, channels)
        mixed = super().forward(groups).view(len(x), height * width, channels)
        return mixed[:, order.argsort()].view(x.shape)


def _grid_order(height: int, width: int, window: int) -> Tensor:
    places = torch.arange(height * width).view(window, height // window, window, width // window)
    return places.permute(1, 3, 0, 2).flatten()


def _random_order(height: int, width: int, window: int) -> Tensor:
    return torch.randperm(height * width, generator=torch.Generator().manual_seed(height * width))


def mixer_of(arm: str, place: int, width: int, window: int, heads: int) -> nn.Module:
    """What mixes positions in a block of an arm. The arms differ in the odd blocks, but for "global"."""
    odd = place % 2 == 1
    if arm == "global":
        return ShiftedWindowAttention(width, 4 * window, heads)  # as large as the first map
    if arm in ("random", "grid") and odd:
        return Scattered(width, window, heads, random=arm == "random")
    return ShiftedWindowAttention(width, window, heads, shift=window // 2 if odd and arm == "shift" else 0)


ARMS = ("shift", "none", "random", "grid", "global")


def network(arm: str) -> Pyramid:
    """An untrained network of an arm for grey crops and twelve classes."""
    return Pyramid(
        lambda stage, place, width: mixer_of(arm, place, width, WINDOW, HEADS[stage]),
        num_classes=len(PICTURES),
        in_chans=1,
        embed_dim=WIDTH,
        depths=DEPTHS,
        patch_size=PATCH,
    )


@searched(ACCURACY, arms=ARMS, grid=(1e-3, 3e-3, 1e-2, 3e-2))
def score(arm: str, rate: float) -> float:
    return error_for_choice(lambda: network(arm), rate, STEPS)


@cache
def learned(arm: str, steps: int, seeds: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(lambda: network(arm), chosen(ACCURACY, arm), steps, seeds=tuple(range(1, seeds + 1)))


TASK: dict[str, Any] = {"data": "ImageNet-1K", "net": "Swin-T", "window": 7, "seeds": 1}
TASK_HERE = {
    "data": "crops of 48 pixels of twelve photographs, told apart by the photograph they are from: ImageNet comes with no package",
    "net": f"two stages of two blocks, {WIDTH} and {2 * WIDTH} channels, patches of {PATCH} pixels: trained in seconds",
    "window": f"{WINDOW}, so that the maps of 12 and 6 positions a side have 16 and 4 windows",
    "seeds": "3 (5 at full), and photographs and seeds are resampled for the interval",
    "steps": f"{STEPS} batches of 48 crops, the rates searched at the same budget; eight times as many at full, at the same rates",
}
SCALES = {
    "smoke": [{"steps": 4, "seeds": 3}],
    "small": [{"steps": STEPS, "seeds": 3}],
    "full": [{"steps": 8 * STEPS, "seeds": 5}],
}


# ------------------------------------------------------------------------------------------------------------ what shifting gains


@experiment(
    "swin/shift-accuracy",
    points=SCALES,
    operator=Operator(
        "attention in windows of which every second block's connects the windows before",
        free="the same windows in every block",
    ),
    paper=TASK,
    departures=TASK_HERE,
    refuted_if="the whole interval of the gain over windows that are not shifted lies below 0 points",
    measured_here="accuracy on held-out crops of twelve photographs",
    minutes=60,
)
def shift_accuracy(steps: int, seeds: int) -> Figure:
    """Points of accuracy that shifting the windows of odd blocks gains, a stand-in for ImageNet, where Swin-T has 81.3 and 80.2 %.

    All arms see the same crops in the same order. The baseline is the method deleted: the same windows in every block. Controls,
    as gains over it too: in odd blocks windows of random positions (the same ones always), and as the rival, which needs no mask,
    windows of positions that form a grid over the map.
    """
    found = {arm: learned(arm, steps, seeds) for arm in ("shift", "none", "random", "grid")}
    gains = {arm: difference(each, found["none"]) for arm, each in found.items()}
    value, low, high = gains["shift"]
    return Figure(
        value,
        "points",
        low,
        high,
        baseline=0.0,
        controls={"deleted": 0.0, "random": gains["random"][0], "rival": gains["grid"][0]},
        trained={arm: each.trained for arm, each in found.items()},
        details={
            "accuracy": {arm: each.accuracy for arm, each in found.items()},
            "by photograph": {
                arm: dict(zip(PICTURES, each.right.mean(0).tolist(), strict=True)) for arm, each in found.items()
            },
            "gains": gains,
        },
    )


# --------------------------------------------------------------------------------------------------- windows against the whole map


@experiment(
    "swin/window-attention-speedup",
    points={
        "smoke": [{"side": 28, "channels": 32, "heads": 1, "window": 7, "batch": 1, "steps": 4, "seeds": 3}],
        "small": [{"side": 56, "channels": 96, "heads": 3, "window": 7, "batch": 4, "steps": STEPS, "seeds": 3}],
        "full": [
            {"side": side, "channels": 96, "heads": 3, "window": 7, "batch": 4, "steps": 8 * STEPS, "seeds": 5}
            for side in (28, 56, 112)
        ],
    },
    decides={"full": {"side": 56, "channels": 96, "heads": 3, "window": 7, "batch": 4, "steps": 8 * STEPS, "seeds": 5}},
    operator=Operator("an attention layer over a map", free="torch's fused attention over the whole map"),
    guard=Guard(
        "accuracy on held-out crops of twelve photographs",
        2.0,
        higher_is_better=True,
        relative=False,
    ),
    paper={"side": 56, "channels": 96, "heads": 3, "window": 7, "device": "not said: multiply-adds are counted"},
    departures={
        "device": "this machine's processor, float32; maps of 4 photographs",
        "quality": f"of small networks on crops of twelve photographs, with windows of {WINDOW}: no ImageNet here",
        "steps": TASK_HERE["steps"],
    },
    refuted_if="the whole interval of the speed-up over attention to the whole map lies below 1",
    measured_here="one layer of Swin-T's first stage on a map of a photograph",
    minutes=60,
)
def window_attention_speedup(
    side: int, channels: int, heads: int, window: int, batch: int, steps: int, seeds: int
) -> Trial:
    """A layer of attention in shifted windows against torch's fused attention over the whole map, both with their projections.

    The map is that of photographs after a random patch embedding; over the whole map there is no bias of positions, which would
    cost a table of scores. The guard: networks with windows in every block, shifted in the odd ones, may lose two points of accuracy to
    networks that attend to the whole map in every block (with the bias, without which they would know of no positions). Deleted:
    windows that are not shifted; random: odd blocks attend among random positions, as many at a time as a window has (the same ones
    always); rival: among positions that form a grid over the map.
    """
    torch.manual_seed(0)
    x = first_map(batch, side, channels)
    shifted = ShiftedWindowAttention(channels, window, heads, shift=window // 2)
    plain = ShiftedWindowAttention(channels, window, heads)

    @torch.inference_mode()
    def whole_map() -> Tensor:
        q, k, v = shifted.qkv(x.flatten(1, 2)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = shifted.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    @torch.inference_mode()
    def windows(layer: nn.Module = shifted) -> Tensor:
        out: Tensor = layer(x)
        return out

    arms = {"shift": "shift", "global": "global", "deleted": "none", "random": "random", "rival": "grid"}

    def quality() -> Quality:
        found = {name: learned(arm, steps, seeds) for name, arm in arms.items()}
        controls = {name: found[name] for name in CONTROLS}
        return guarded(found["shift"], found["global"], controls, "windows of a grid")

    def trained() -> dict[str, Trained]:
        return {arm: learned(arm, steps, seeds).trained for arm in arms.values()}

    return Trial(
        whole_map,
        windows,
        arms={"windows that are not shifted": lambda: windows(plain)},
        quality=quality,
        trained=trained,
        details={
            "macs": {
                "windows": batch * attention_macs(side, side, channels, window),
                "whole map": batch * attention_macs(side, side, channels),
            }
        },
        pairs=12,
    )


def photographs(batch: int, size: int) -> Tensor:
    """Photographs of the set, scaled to `size` pixels a side: (batch, 3, size, size), mean 0 and deviation 1."""
    found = [
        F.interpolate(picture(PICTURES[i % len(PICTURES)])[None], (size, size), mode="bilinear", antialias=True)
        for i in range(batch)
    ]
    images = torch.cat(found)
    return (images - images.mean()) / images.std()


def first_map(batch: int, side: int, channels: int) -> Tensor:
    """Photographs after a random embedding of patches of 4 x 4 pixels, normed: (batch, side, side, channels)."""
    embedded = F.conv2d(photographs(batch, 4 * side), torch.randn(channels, 3, 4, 4) / 7, stride=4).permute(0, 2, 3, 1)
    return F.layer_norm(embedded, (channels,))


# -------------------------------------------------------------------------------------------------------- the cyclic shift itself


class PaddedShift(ShiftedWindowAttention):
    """The same layer by padding, which the paper calls naive: windows that the edge cuts are filled up, so there are more of them."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a map, as its parent
        height, width = x.shape[1:3]
        before = self.window - self.shift
        if not self.shift or min(height, width) <= self.window:
            return super().forward(x)
        padded = F.pad(x, (0, 0, before, self.shift, before, self.shift))
        mask = cached(_padding_mask, height, width, self.window, self.shift, like=x)
        windows = WindowAttention.forward(self, window_partition(padded, self.window), mask)
        joined = window_reverse(windows, self.window, *padded.shape[1:3])
        return joined[:, before : before + height, before : before + width]


def _padding_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """-100 for what is padding in each window: (windows, N, N)."""
    before = window - shift
    real = F.pad(torch.ones(1, height, width, 1), (0, 0, before, shift, before, shift))
    padding = window_partition(real, window)[..., 0] == 0
    return padding[:, None].expand(-1, window**2, -1).float() * MASKED


CYCLIC = [
    {"embed_dim": 24, "depths": [2, 2], "size": 112, "batch": 1},
    {"embed_dim": 96, "depths": [2, 2, 6, 2], "size": 224, "batch": 4},
    {"embed_dim": 96, "depths": [2, 2, 6, 2], "size": 224, "batch": 64},
]


@experiment(
    "swin/cyclic-shift-speedup",
    points={scale: [point] for scale, point in zip(("smoke", "small", "full"), CYCLIC, strict=True)},
    operator=Operator("attention in shifted windows", free="transformers' Swin with torch's fused attention"),
    guard=Guard(
        "largest difference of the logits from padded windows', over the largest logit",
        1e-3,
        relative=False,
        without={"rival": "padding computes the same: it is the baseline"},
    ),
    paper={"embed_dim": 96, "depths": [2, 2, 6, 2], "size": 224, "device": "a V100"},
    departures={"device": "this machine's processor, float32; batches of 4 photographs (64 at full)"},
    refuted_if="the whole interval of the speed-up over padded windows lies below 1",
    minutes=60,
)
def cyclic_shift_speedup(embed_dim: int, depths: list[int], size: int, batch: int) -> Trial:
    """A whole network that shifts by rolling the map against the same with padded windows; weights are random, logits equal.

    Maps of 56, 28 and 14 positions a side have 64, 16 and 4 windows when rolled, and 81, 25 and 9 when padded. The paper's naive padding
    is taken as it says: the padding is projected too. Free is transformers' model with the same weights, which rolls as well.
    Deleted: the same weights without a shift. Random: windows moved by one position, not by half a window.
    """
    from transformers import SwinConfig, SwinForImageClassification

    heads = [embed_dim * 2**stage // (32 if embed_dim % 32 == 0 else 24) for stage in range(len(depths))]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": size, "embed_dim": embed_dim, "depths": depths, "num_heads": heads}
    config = SwinConfig(window_size=7, num_labels=1000, attn_implementation="sdpa", **sizes)
    theirs = SwinForImageClassification(config).eval()
    for name, value in theirs.named_parameters():
        if "bias_table" in name:
            nn.init.normal_(value, std=1.0)
    weights = from_transformers(theirs.state_dict())
    images = photographs(batch, size)

    def with_shift(layer: type[ShiftedWindowAttention], shift: int) -> Pyramid:
        model = Pyramid(
            lambda stage, place, width: layer(width, 7, heads[stage], shift=shift * (place % 2)),
            num_classes=1000,
            in_chans=3,
            embed_dim=embed_dim,
            depths=depths,
        ).eval()
        model.load_state_dict(weights)
        return model

    def run(model: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                out: Any = model(images)
            return out if isinstance(out, Tensor) else out.logits

        return call

    padded, cyclic = run(with_shift(PaddedShift, 3)), run(with_shift(ShiftedWindowAttention, 3))
    free = run(theirs)

    def quality() -> Quality:
        expected = padded()

        def apart(logits: Tensor) -> float:
            return float((logits - expected).abs().max() / expected.abs().max())

        controls = {"deleted": apart(run(with_shift(ShiftedWindowAttention, 0))())}
        controls["random"] = apart(run(with_shift(ShiftedWindowAttention, 1))())
        return Quality(max(apart(cyclic()), apart(free())), 0.0, controls=controls)

    return Trial(padded, cyclic, free=free, quality=quality, details={"heads": heads}, pairs=12)
