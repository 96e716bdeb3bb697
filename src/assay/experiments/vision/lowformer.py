"""LowFormer: is a fused MBConv faster than a depthwise one of as many MACs, and the backbone faster than a MobileNetV3 of as many?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Guard, Operator, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.rivals import (
    CLASSES,
    MARGIN,
    METRIC,
    Pixels,
    frozen,
    macs,
    parameters,
    quality,
    resnet,
    trained,
    widest,
)
from assay.experiments.vision.training import SIZE, Judged, error_for_choice, judged
from assay.methods.core.vision.blocks import SqueezeExcite
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.vision import build
from assay.methods.vision.lowformer import (
    FusedMBConv,
    MBConv,
    bench_modules,
    equal_macs,
    fused_and_not,
    rank_correlation,
)
from assay.methods.vision.lowformer.model import Conv, Residual

STEPS = 120
ALIGNED = 8  # widths of rivals that are timed are multiples of it: a MobileNetV3 of width 34 is slower a MAC than of 32, by a quarter
MOBILENETV3 = (  # kernel, expansion, width, gate, hardswish, stride: MobileNetV3-Large
    (3, 1, 16, False, False, 1),
    (3, 4, 24, False, False, 2),
    (3, 3, 24, False, False, 1),
    (5, 3, 40, True, False, 2),
    (5, 3, 40, True, False, 1),
    (5, 3, 40, True, False, 1),
    (3, 6, 80, False, True, 2),
    (3, 2.5, 80, False, True, 1),
    (3, 2.3, 80, False, True, 1),
    (3, 2.3, 80, False, True, 1),
    (3, 6, 112, True, True, 1),
    (3, 6, 112, True, True, 1),
    (5, 6, 160, True, True, 2),
    (5, 6, 160, True, True, 1),
    (5, 6, 160, True, True, 1),
)


class Inverted(nn.Sequential):
    """A block of MobileNetV3: expand, depthwise, gate, project, each convolution with a norm; added to its input where that fits."""

    def __init__(
        self, given: int, out: int, kernel: int, expansion: float, gate: bool, hard: bool, stride: int
    ) -> None:
        hidden, act = round(expansion * given), nn.Hardswish if hard else nn.ReLU
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [Conv(given, hidden, 1, act=False), act()]
        layers += [Conv(hidden, hidden, kernel, stride=stride, groups=hidden, act=False), act()]
        if gate:
            layers.append(SqueezeExcite(hidden, max(hidden // 4, 1), gate=nn.Hardsigmoid))
        super().__init__(*layers, Conv(hidden, out, 1, act=False))
        self.added = stride == 1 and given == out

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.added else y


def mobilenetv3(width: int = 16, *, classes: int = 1000, channels: int = 3) -> nn.Sequential:
    """MobileNetV3-Large, its first width given and the others in proportion."""
    share = width / 16
    layers: list[nn.Module] = [Conv(channels, width, stride=2)]
    given = width
    for kernel, expansion, out, gate, hard, stride in MOBILENETV3:
        out = max(round(share * out), 1)
        layers.append(Inverted(given, out, kernel, expansion, gate, hard, stride))
        given = out
    last, hidden = round(share * 960), round(share * 1280)
    layers += [Conv(given, last, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, hidden), nn.Hardswish()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


Block = Callable[[int, int], nn.Module]


def pyramid(block: Block, width: int, *, classes: int = 1000, channels: int = 3) -> nn.Sequential:
    """Three stages of two residual blocks of one kind, between convolutions with stride 2: what the kinds are compared in."""
    layers: list[nn.Module] = []
    for stage in range(3):
        out = width << stage
        layers.append(Conv(channels, out, stride=2))
        layers += [Residual(block(out, out), 0.0) for _ in range(2)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def as_many(make: Callable[[int], nn.Module], model: Callable[[], nn.Module], size: int, of: int = 1) -> nn.Module:
    """The widest network of `make` with at most the MACs of `model` on an image of `size` pixels a side; its width a multiple of `of`."""
    return make(width_as_many(make, model, size, of))


@cache
def width_as_many(make: Callable[[int], nn.Module], model: Callable[[], nn.Module], size: int, of: int = 1) -> int:
    """Its width. Looked for once for the same two functions."""
    with torch.device("meta"):
        wanted = macs(model(), size)
    return of * widest(lambda part: make(of * part), wanted, lambda candidate: macs(candidate, size))


def basic(width: int, **settings: Any) -> nn.Module:
    """A ResNet of one basic block a stage."""
    return resnet((width, 2 * width, 4 * width, 8 * width), (1, 1, 1, 1), **settings)


SMALL: dict[str, Any] = {"classes": CLASSES, "channels": 1}
LOWFORMER: dict[str, Any] = {"width": 8, "head": (96, 96), "num_classes": CLASSES, "in_chans": 1}
little = partial(build, "lowformer_b0", **LOWFORMER)
fused = partial(pyramid, FusedMBConv, 8, **SMALL)
depthwise_of, basic_of, mobile_of = (
    partial(pyramid, MBConv, **SMALL),
    partial(basic, **SMALL),
    partial(mobilenetv3, **SMALL),
)
ARMS: dict[str, Callable[[], nn.Module]] = {
    "fused": fused,
    "depthwise": partial(as_many, depthwise_of, fused, SIZE),
    "resnet": partial(as_many, basic_of, fused, SIZE),
    "lowformer": little,
    "no attention": partial(little, attention=False),
    "mobilenetv3": partial(as_many, mobile_of, little, SIZE),
    "resnet, as lowformer": partial(as_many, basic_of, little, SIZE),
    "random features": lambda: frozen(fused()),
    "random lowformer": lambda: frozen(little()),
    "pixels": Pixels,
}
RATES = "lowformer/accuracy"


@searched(RATES, arms=tuple(ARMS), grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1))
def rate_score(arm: str, rate: float) -> float:
    """The share of wrong crops of the part for choices."""
    return error_for_choice(ARMS[arm], rate, STEPS)


def shown(arm: str, steps: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(ARMS[arm], chosen(RATES, arm), steps)


def all_shown(arms: Iterable[str], steps: int, names: Mapping[str, str]) -> dict[str, Judged]:
    """Several arms, under the names that the record has for them."""
    return {names.get(arm, arm): shown(arm, steps) for arm in arms}


def timed(made: Mapping[str, nn.Module], size: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Runs of networks with random weights on random images: batch norms folded, channels-last, without gradients."""
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def run(model: nn.Module) -> Callable[[], Tensor]:
        folded = fold_batch_norm(model.eval(), x).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        @torch.inference_mode()
        def once() -> Tensor:
            out: Tensor = folded(x)
            return out

        return once

    return {name: run(model) for name, model in made.items()}


def counts(made: Mapping[str, nn.Module], size: int) -> dict[str, dict[str, int]]:
    """Parameters, and MACs of an image."""
    return {
        "parameters": {name: parameters(model) for name, model in made.items()},
        "macs of an image": {name: macs(model.to("meta"), size) for name, model in made.items()},
    }


GUARD = Guard(METRIC, MARGIN, higher_is_better=True, relative=False)
DEPARTURES = {
    "device": "this machine's processor, channels-last, batch norms folded into the convolutions in all networks",
    "data": "accuracy is that of narrow networks of equal MACs on crops of twelve photographs: no ImageNet here",
    "training": "120 steps of 48 crops (600 at full scale), mirror images only, for all arms alike",
    "macs": "rivals that are timed have the most channels, in multiples of eight, at which they do no more; the details have both counts",
}


@experiment(
    "lowformer/fused-at-equal-macs",
    points={
        "smoke": [{"size": 64, "batch": 2, "width": 8, "steps": 20}],
        "small": [{"size": 224, "batch": 8, "width": 16, "steps": STEPS}],
        "full": [{"size": 224, "batch": batch, "width": 32, "steps": 5 * STEPS} for batch in (1, 8, 64)],
    },
    decides={"full": {"size": 224, "batch": 8, "width": 32, "steps": 5 * STEPS}},
    operator=Operator(
        "a stack of residual convolution blocks of a given number of MACs",
        free="basic blocks (a ResNet of transformers)",
    ),
    guard=GUARD,
    paper={"what": "single modules", "device": "GPUs, a mobile GPU and an ARM processor", "data": "ImageNet-1K"},
    departures={
        **DEPARTURES,
        "what": "small networks of one kind of block, so that accuracy can stand beside time; single modules are in the details",
    },
    refuted_if="the whole interval of the depthwise network's time over the fused one's lies below 1",
    minutes=15,
)
def fused_at_equal_macs(size: int, batch: int, width: int, steps: int) -> Trial:
    """A network of fused MBConv over one of depthwise MBConv with (at most) as many MACs, which is wider.

    The details have the study: modules of equal MACs with their rates, how well MACs order modules by time, and the fused block over the
    depthwise one of the same widths.
    """
    torch.manual_seed(0)
    make = partial(pyramid, FusedMBConv, width)
    made = {
        "fused": make(),
        "depthwise": as_many(partial(pyramid, MBConv), make, size, ALIGNED),
        "resnet": as_many(basic, make, size, ALIGNED),
    }
    runs = timed(made, size, batch)
    found: dict[str, Judged] = {}

    def kept() -> Any:
        found.update(all_shown(("fused", "depthwise", "resnet", "random features", "pixels"), steps, {}))
        return quality(found, "fused", "depthwise", "resnet", "basic blocks of as many MACs")

    return Trial(
        runs["depthwise"],
        runs["fused"],
        free=runs["resnet"],
        quality=kept,
        trained=lambda: trained(found),
        details=lambda: {
            **counts(made, size),
            "accuracy": {name: arm.accuracy for name, arm in found.items()},
            "study": study(batch),
        },
    )


def study(batch: int) -> dict[str, Any]:
    """Modules of equal MACs, and fused and depthwise blocks of the same widths, with the rank correlation of MACs with times."""
    same = bench_modules(equal_macs(28, 16), batch=batch, rounds=6, max_seconds=5)
    pairs = [fused_and_not(28, channels) for channels in (16, 32, 64, 128)]
    blocks = bench_modules([case for pair in pairs for case in pair], batch=batch, rounds=6, max_seconds=8)
    return {
        "GMAC/s at equal MACs": {row.name: row.gmacs_per_second for row in same.rows},
        "milliseconds of blocks": {row.name: 1e3 * row.seconds for row in blocks.rows},
        "rank correlation of MACs with times": rank_correlation(
            [row.macs for row in same.rows + blocks.rows], [row.seconds for row in same.rows + blocks.rows]
        ),
        "seconds of depthwise over fused, same widths": {
            pair[0].channels: blocks.speedup(pair[1].name, pair[0].name).median for pair in pairs
        },
        "noisy": same.noisy or blocks.noisy,
    }


@experiment(
    "lowformer/backbone-speedup",
    points={
        "smoke": [{"size": 64, "batch": 1, "steps": 20}],
        "small": [{"size": 224, "batch": 1, "steps": STEPS}],
        "full": [{"size": 224, "batch": batch, "steps": 5 * STEPS} for batch in (1, 16)],
    },
    decides={"full": {"size": 224, "batch": 1, "steps": 5 * STEPS}},
    operator=Operator(
        "an image classifier of a given number of MACs", free="a ResNet of transformers with as many MACs"
    ),
    guard=GUARD,
    paper={
        "rivals": "EfficientViT, FastViT, MobileOne, EfficientNet and others of similar accuracy",
        "device": "GPUs, a mobile GPU and an ARM processor",
        "data": "ImageNet-1K",
        "network": "LowFormer-B0 to -B3",
        "batch": 1,
        "training": "300 epochs of 128 to 224 pixels, mixup, cutmix, averaged weights",
    },
    departures={
        **DEPARTURES,
        "rivals": "MobileNetV3-Large, made wider until it has as many MACs: what is said about MACs must hold at equal ones",
        "network": "LowFormer-B0",
    },
    refuted_if="the whole interval of MobileNetV3's time over LowFormer's lies below 1",
    measured_here="speed-up over a MobileNetV3 of as many MACs",
    minutes=15,
)
def backbone_speedup(size: int, batch: int, steps: int) -> Trial:
    """Images a second of LowFormer-B0 over those of a MobileNetV3-Large with (at most) as many MACs.

    An arm: LowFormer without attention and MLP, as the journal version's networks for edge GPUs.
    """
    torch.manual_seed(0)
    make = partial(build, "lowformer_b0")
    made = {
        "lowformer": make(),
        "mobilenetv3": as_many(mobilenetv3, make, size, ALIGNED),
        "resnet": as_many(basic, make, size, ALIGNED),
        "no attention": build("lowformer_b0", attention=False),
    }
    runs = timed(made, size, batch)
    found: dict[str, Judged] = {}
    names = {"random lowformer": "random features", "resnet, as lowformer": "resnet"}

    def kept() -> Any:
        wanted = ("lowformer", "no attention", "mobilenetv3", "resnet, as lowformer", "random lowformer", "pixels")
        found.update(all_shown(wanted, steps, names))
        return quality(found, "lowformer", "mobilenetv3", "resnet", "a ResNet of as many MACs")

    return Trial(
        runs["mobilenetv3"],
        runs["lowformer"],
        free=runs["resnet"],
        arms={"LowFormer without attention and MLP": runs["no attention"]},
        quality=kept,
        trained=lambda: trained(found),
        details=lambda: {**counts(made, size), "accuracy": {name: arm.accuracy for name, arm in found.items()}},
    )
