"""VoVNet: are features that are joined once cheaper than features joined in every layer, and no less accurate?

What is timed are published networks that the authors found equally accurate: VoVNet-39, DenseNet-201 and ResNet-50. An arm beside them is
VoVNet-39 itself with `DenseBlock`s in the place of its blocks, each with as many parameters: then nothing but the joins differs. What is
trained is VoVNet-27-slim at an eighth of its widths, and the same with dense blocks. The detectors around the backbones are the same in
the paper, and are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.rivals import (
    CLASSES,
    MARGIN,
    METRIC,
    Logits,
    Pixels,
    frozen,
    parameters,
    resnet,
    trained,
    widest,
)
from assay.experiments.vision.training import Judged, error_for_choice, guarded, judged
from assay.measure.cost import count_cost
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.vision import build
from assay.methods.vision.vovnet import (
    CONFIGS,
    DenseBlock,
    OsaBlock,
    VoVNet,
    energy_per_image,
    inner_inputs,
    memory_access,
    memory_access_cost,
)

TIMED, TRAINED, STEPS = "vovnet39a", "vovnet27_slim", 120
SHARE = 0.125  # of the widths, in what is trained


class LastOnly(OsaBlock):
    """OSA with nothing joined: the 1x1 convolution reads the last layer of the chain."""

    def __init__(self, channels_in: int, width: int, channels_out: int, layers: int) -> None:
        super().__init__(channels_in, width, channels_out, layers)
        old = self.conv_concat.conv
        self.conv_concat.conv = nn.Conv2d(width, old.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.conv_mid:
            x = layer(x)
        out: Tensor = self.conv_concat(x)
        return out


Block = Callable[[int, int, int, int], nn.Module]
BLOCKS: dict[str, Block] = {"osa": OsaBlock, "dense": DenseBlock, "last only": LastOnly}


def network(
    kind: str = "osa", name: str = TRAINED, *, share: float = 1.0, classes: int = 1000, channels: int = 3
) -> VoVNet:
    """A VoVNet, widths times `share`; its blocks replaced by those of a kind, as wide as their parameters allow."""
    settings: dict[str, Any] = {
        field: tuple(round(share * width) for width in CONFIGS[name][field]) for field in ("stem", "widths", "channels")
    }
    model: VoVNet = build(name, **settings, num_classes=classes, in_chans=channels)
    if kind != "osa":
        for level in model.levels.children():
            blocks: Any = level.blocks
            for place, block in enumerate(list(blocks)):
                blocks[place] = equal(block, BLOCKS[kind])
    return model


def equal(block: Any, kind: Block) -> nn.Module:
    """A block of another kind with the ends of an `OsaBlock` and at most as many parameters."""
    given, out = block.conv_mid[0].conv.in_channels, block.conv_concat.conv.out_channels
    layers = len(block.conv_mid)

    def make(width: int) -> nn.Module:
        return kind(given, width, out, layers)

    return make(widest(make, parameters(block)))


def residual(share: float = 1.0, *, classes: int = 1000, channels: int = 3) -> nn.Module:
    """A ResNet of one basic block a stage, with as many parameters as VoVNet has, or a few less."""
    wanted = parameters(network(share=share, classes=classes, channels=channels))

    def make(width: int) -> nn.Module:
        return resnet((width, 2 * width, 4 * width, 8 * width), (1, 1, 1, 1), classes=classes, channels=channels)

    return make(widest(make, wanted))


class DenseLayer(nn.Module):
    """DenseNet's own layer: norm, ReLU, 1x1 to four times `growth`, norm, ReLU, 3x3 to `growth`; the output joins the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet(depths: tuple[int, ...] = (6, 12, 48, 32), growth: int = 32) -> nn.Sequential:
    """DenseNet-201 unless told otherwise: bottlenecks, and half the channels between its blocks."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, depth in enumerate(depths):
        layers += [DenseLayer(width + layer * growth, growth) for layer in range(depth)]
        width += depth * growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if stage + 1 < len(depths):
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def resnet50() -> nn.Module:
    """That of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    settings: dict[str, Any] = {"num_labels": 1000}
    return Logits(ResNetForImageClassification(ResNetConfig(**settings)))


SMALL: dict[str, Any] = {"share": SHARE, "classes": CLASSES, "channels": 1}
ARMS: dict[str, Callable[[], nn.Module]] = {
    "osa": partial(network, "osa", **SMALL),
    "dense": partial(network, "dense", **SMALL),
    "last only": partial(network, "last only", **SMALL),
    "resnet": partial(residual, **SMALL),
    "random features": lambda: frozen(network("osa", **SMALL)),
    "pixels": Pixels,
}
RATES = "vovnet/accuracy"


@searched(RATES, arms=tuple(ARMS), grid=(3e-3, 1e-2, 3e-2, 1e-1))
def rate_score(arm: str, rate: float) -> float:
    """The share of wrong crops of the part for choices."""
    return error_for_choice(ARMS[arm], rate, STEPS)


def shown(arm: str, steps: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(ARMS[arm], chosen(RATES, arm), steps)


BACKBONE = Operator(
    "a backbone of a given accuracy",
    free="ResNet-50 of transformers: 23.9 % error on ImageNet where VoVNet-39 has 23.2 % and DenseNet-201 22.8 %, the authors say",
)
GUARD = Guard(METRIC, MARGIN, higher_is_better=True, relative=False)
PAPER: dict[str, Any] = {
    "network": "VoVNet-27-slim, -39 and -57 against DenseNet-67, -161 and -201",
    "what": "whole detectors on COCO",
    "device": "a GPU",
}
DEPARTURES = {
    "network": "VoVNet-39 against DenseNet-201 alone: 22.6 and 20.0 million parameters",
    "what": "the backbone alone, with its classifier; accuracy is that of VoVNet-27-slim at an eighth of the widths against the same with "
    "dense blocks of as many parameters, on crops of photographs: no COCO here",
    "device": "this machine's processor, channels-last, every batch norm folded into the convolution before it (DenseNet's "
    "norms of what was joined have none)",
}


def networks() -> dict[str, nn.Module]:
    """What is timed, with random weights."""
    torch.manual_seed(0)
    return {
        "vovnet": network("osa", TIMED),
        "dense blocks": network("dense", TIMED),
        "densenet": densenet(),
        "resnet": resnet50(),
    }


def accuracies(steps: int, found: dict[str, Judged]) -> Quality:
    """All arms trained, into `found`; OSA's accuracy against dense blocks'. The method deleted is the chain that joins nothing."""
    for arm in ARMS:
        found[arm] = shown(arm, steps)
    controls = {
        "deleted": found["last only"],
        "random": found["random features"],
        "rival": found["resnet"],
        "no network": found["pixels"],
    }
    return guarded(found["osa"], found["dense"], controls, "a ResNet of as many parameters")


@experiment(
    "vovnet/detector-speedup",
    points={
        "smoke": [{"size": 64, "batch": 1, "steps": 20}],
        "small": [{"size": 224, "batch": 1, "steps": STEPS}],
        "full": [{"size": 224, "batch": batch, "steps": 5 * STEPS} for batch in (1, 16)],
    },
    decides={"full": {"size": 224, "batch": 1, "steps": 5 * STEPS}},
    operator=BACKBONE,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of DenseNet-201's time over VoVNet-39's lies below 1",
    measured_here="speed-up of VoVNet-39 over DenseNet-201, without detectors",
    minutes=15,
)
def detector_speedup(size: int, batch: int, steps: int) -> Trial:
    """Images a second of VoVNet-39 over DenseNet-201's; beside them, VoVNet-39 with dense blocks.

    Arms of the accuracy: the chain without joining ("last only"), a ResNet, random features, and no network at all.
    """
    made = networks()
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    folded: dict[str, Any] = {name: fold_batch_norm(model.eval(), x) for name, model in made.items()}
    for model in folded.values():
        model.to(memory_format=torch.channels_last)
    found: dict[str, Judged] = {}

    def run(name: str) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def once() -> Tensor:
            out: Tensor = folded[name](x)
            return out

        return once

    def details() -> dict[str, Any]:
        costs = {name: count_cost(model, x) for name, model in made.items()}
        return {
            "parameters": {name: parameters(model) for name, model in made.items()},
            "macs of an image": {name: cost.macs / batch for name, cost in costs.items()},
            "norms folded, of how many": {name: model.folded for name, model in folded.items()},
            "bytes of all operators": {name: cost.bytes for name, cost in costs.items()},
            "elements by the paper's model": {
                name: sum(layer.elements for layer in memory_access(model, x)) for name, model in made.items()
            },
            "accuracy": {name: arm.accuracy for name, arm in found.items()},
        }

    return Trial(
        run("densenet"),
        run("vovnet"),
        free=run("resnet"),
        arms={"VoVNet-39 with dense blocks of as many parameters": run("dense blocks")},
        quality=lambda: accuracies(steps, found),
        trained=lambda: trained(found),
        details=details,
    )


@experiment(
    "vovnet/energy",
    points={
        "smoke": [{"size": 64, "batch": 16, "images": 64, "steps": 20}],
        "small": [{"size": 224, "batch": 64, "images": 6400, "steps": STEPS}],
        "full": [{"size": 224, "batch": 64, "images": 64000, "steps": 5 * STEPS}],
    },
    operator=BACKBONE,
    guard=GUARD,
    paper=PAPER,
    departures={**DEPARTURES, "device": "a GPU that counts its energy; nothing is estimated from power ratings"},
    refuted_if="VoVNet-39 takes more joules an image than DenseNet-201 in every round",
    measured_here="joules an image of DenseNet-201 over VoVNet-39's, without detectors",
    needs=("cuda",),
    minutes=30,
)
def energy(size: int, batch: int, images: int, steps: int) -> Figure:
    """Joules an image (the whole board, idle power included) of DenseNet-201 over VoVNet-39's; six rounds, in turn.

    Raises MissingError where the GPU has no counter.
    """
    from assay.errors import MissingError
    from assay.measure.energy import why_not
    from assay.measure.stats import median_interval

    if missing := why_not():
        raise MissingError(missing)
    made = {name: model.eval().cuda().to(memory_format=torch.channels_last) for name, model in networks().items()}  # type: ignore[call-overload]
    x = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    joules: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(6):
        for name in list(made)[:: 1 if turn % 2 else -1]:
            joules[name].append(joules_per_image(made[name], x, images))
    found: dict[str, Judged] = {}
    kept = accuracies(steps, found)
    over = {
        name: median_interval([dense / other for dense, other in zip(joules["densenet"], taken, strict=True)])
        for name, taken in joules.items()
    }
    ratio = over["vovnet"]
    return Figure(
        ratio.median,
        "x",
        ratio.low,
        ratio.high,
        baseline=1.0,
        free=over["resnet"].median,
        arms={"VoVNet-39 with dense blocks of as many parameters": over["dense blocks"].median},
        quality=kept,
        trained=trained(found),
        details={"joules an image": joules, "accuracy": {name: arm.accuracy for name, arm in found.items()}},
    )


@torch.inference_mode()
def joules_per_image(model: nn.Module, x: Tensor, images: int) -> float:
    """Of as many images, after one batch that does not count."""
    from assay.measure.clock import synchronize
    from assay.measure.energy import EnergyMeter

    model(x)
    synchronize()
    batches = -(-images // len(x))
    with EnergyMeter() as meter:
        for _ in range(batches):
            model(x)
        synchronize()
    assert meter.joules is not None
    return energy_per_image(meter.joules, batches * len(x))


@experiment(
    "vovnet/memory-access",
    points={scale: [{"width": 43, "layers": 5}] for scale in ("smoke", "small", "full")},
    operator=Operator("the features of a block", free="a narrower dense network"),
    paper={"width": 43, "layers": 5, "network": "DenseNet-40, growth 12, on CIFAR-10"},
    refuted_if="by the paper's own model the blocks that join once move as many elements as the dense ones",
    computed="it follows from the widths of both networks by the paper's equation 1",
)
def memory_access_saved(width: int, layers: int) -> Figure:
    """Elements that DenseNet-40 moves at 32 pixels over the same with OSA blocks, by `memory_access_cost`.

    The paper gives 3.7 M and 2.5 M and not the arrangement. Here: three dense blocks of twelve layers of 12 channels, or three OSA
    blocks that end as wide, with the same transitions between.
    """
    ends, sides = (16, 160, 304, 448), (32, 16, 8)
    dense = osa = memory_access_cost(32, 32, 3, ends[0], 3)
    for stage, side in enumerate(sides):
        given, out = ends[stage : stage + 2]
        dense += sum(memory_access_cost(side, side, given + 12 * layer, 12, 3) for layer in range(12))
        chain = [given, *[width] * (layers - 1)]
        osa += sum(memory_access_cost(side, side, channels, width, 3) for channels in chain)
        osa += memory_access_cost(side, side, given + layers * width, out)
        if stage < 2:
            transition = memory_access_cost(side, side, out, out)
            dense, osa = dense + transition, osa + transition
    return Figure(
        dense / osa,
        "x",
        baseline=1.0,
        details={
            "elements": {"dense": dense, "osa": osa},
            "inputs of the first block's layers": {
                "dense": inner_inputs(16, 12, 12, dense=True),
                "osa": inner_inputs(16, width, layers, dense=False),
            },
        },
    )
