"""SimpleNet: does it run faster than a ResNet-18, and is it as good as a VGG of many times its parameters?

What is timed is the published SimpleNet against the published ResNet-18. What is trained, on crops of twelve photographs, has an eighth
of their widths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.rivals import (
    CLASSES,
    MARGIN,
    METRIC,
    Pixels,
    frozen,
    mobilenet,
    parameters,
    quality,
    resnet,
    trained,
    widest,
)
from assay.experiments.vision.training import Judged, difference, error_for_choice, judged
from assay.measure.cost import count_cost
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.vision import build

STEPS = 120
SHARE = 0.125  # of the published widths, in what is trained
SIMPLENET = "simplenetv1_5m_m1"
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16(
    share: float = 1.0, *, classes: int = 1000, channels: int = 3, side: int = 7, hidden: bool = True
) -> nn.Sequential:
    """VGG16 with batch norms; its two hidden linear layers, if any, read a last map of `side` x `side` positions."""
    layers: list[nn.Module] = []
    for entry in VGG16:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
            continue
        width = max(round(share * entry), 1)
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers.append(nn.Flatten())
    features = channels * side * side
    if hidden:
        width = max(round(share * 4096), 1)
        layers += [nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def simplenet(share: float = SHARE, **settings: Any) -> nn.Module:
    """The model that is timed, at the widths that are trained."""
    model: nn.Module = build(SIMPLENET, scale=share, num_classes=CLASSES, in_chans=1, **settings)
    return model


def bare_vgg() -> nn.Sequential:
    """The VGG without its hidden layers, which hold most of its parameters, with as many as SimpleNet has, or a few less."""
    return vgg16(_bare_width() / 512, hidden=False, **SMALL)


@cache
def _bare_width() -> int:
    with torch.device("meta"):
        wanted = parameters(simplenet())
    return widest(lambda width: vgg16(width / 512, hidden=False, **SMALL), wanted)


SMALL: dict[str, Any] = {"classes": CLASSES, "channels": 1, "side": 1}
ARMS: dict[str, Callable[[], nn.Module]] = {
    "simplenet": simplenet,
    "vgg": partial(vgg16, SHARE, **SMALL),
    "bare vgg": bare_vgg,
    "resnet": partial(resnet, (8, 16, 32, 64), classes=CLASSES, channels=1),
    "mobilenet": partial(mobilenet, 2 * SHARE, classes=CLASSES, channels=1),
    "random features": lambda: frozen(simplenet()),
    "pixels": Pixels,
}
RATES = "simplenet/accuracy"


@searched(RATES, arms=tuple(ARMS), grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def rate_score(arm: str, rate: float) -> float:
    """The share of wrong crops of the part for choices."""
    return error_for_choice(ARMS[arm], rate, STEPS)


def shown(arm: str, steps: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(ARMS[arm], chosen(RATES, arm), steps)


def networks() -> dict[str, nn.Module]:
    """What is timed, as published, with random weights."""
    torch.manual_seed(0)
    return {
        "simplenet": build(SIMPLENET),
        "simplenet, later strides (m2)": build("simplenetv1_5m_m2"),
        "resnet": resnet(),
        "mobilenet": mobilenet(),
    }


@cache
def published_macs() -> dict[str, int]:
    """Of an image of 32 pixels, by the models for CIFAR."""
    with torch.device("meta"):
        made = {"simplenet": build("simplenet_cifar_5m", num_classes=10), "vgg": vgg16(classes=10, side=1)}
        return {name: count_cost(model.eval(), torch.zeros(1, 3, 32, 32)).macs for name, model in made.items()}


NETWORK = Operator(
    "an image classifier",
    free="MobileNetV2 of transformers: 73.0 % on ImageNet where SimpleNet has 71.5 % and ResNet-18 69.7 %, in SimpleNet's own table",
)


@experiment(
    "simplenet/throughput-5m",
    points={
        "smoke": [{"size": 64, "batch": 2, "steps": 20}],
        "small": [{"size": 224, "batch": 8, "steps": STEPS}],
        "full": [{"size": 224, "batch": batch, "steps": 5 * STEPS} for batch in (1, 8, 64)],
    },
    decides={"full": {"size": 224, "batch": 8, "steps": 5 * STEPS}},
    operator=NETWORK,
    paper={"size": 224, "batch": 256, "device": "GTX 1080", "dtype": "float32", "data": "ImageNet-1K"},
    departures={
        "batch": "8: a processor runs no faster with more, and 256 take minutes",
        "device": "this machine's processor, channels-last, batch norms folded into the convolutions in all networks",
        "data": "accuracy is that of the networks at an eighth of their widths (MobileNetV2: a quarter) on photographs: no ImageNet here",
    },
    guard=Guard(METRIC, MARGIN, higher_is_better=True, relative=False),
    refuted_if="the whole interval of ResNet-18's time over SimpleNet's lies below 1",
    minutes=15,
)
def throughput(size: int, batch: int, steps: int) -> Trial:
    """Images a second of `simplenetv1_5m_m1` over ResNet-18's, with random weights; the accuracy of both at an eighth of the widths.

    MobileNetV2 is free: another network of equal published accuracy, with a quarter of SimpleNet's operations.
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

    def kept() -> Quality:
        for arm in ("simplenet", "resnet", "mobilenet", "random features", "pixels"):
            found[arm] = shown(arm, steps)
        return quality(found, "simplenet", "resnet", "mobilenet", "MobileNetV2")

    return Trial(
        run("resnet"),
        run("simplenet"),
        free=run("mobilenet"),
        arms={"SimpleNet with later strides (m2)": run("simplenet, later strides (m2)")},
        quality=kept,
        trained=lambda: trained(found),
        details=lambda: {
            "parameters": {name: parameters(model) for name, model in made.items()},
            "macs of an image": {name: count_cost(model, x).macs / batch for name, model in made.items()},
            "norms folded, of how many": {name: model.folded for name, model in folded.items()},
            "accuracy": {name: arm.accuracy for name, arm in found.items()},
        },
    )


@experiment(
    "simplenet/fewer-parameters",
    points={"smoke": [{"steps": 20}], "small": [{"steps": STEPS}], "full": [{"steps": 5 * STEPS}]},
    operator=Operator(
        "a classifier of few parameters", free="a VGG without hidden layers, narrowed until it has as few"
    ),
    paper={"data": "CIFAR-10", "rivals": "VGG16, ResNet-152, GoogLeNet and others", "width": 1.0},
    departures={
        "data": "crops of twelve photographs: no CIFAR here, and so the ImageNet models with early strides, which take crops of 48 pixels",
        "rivals": "VGG16, the largest: it is what the number 25 stands for",
        "width": "an eighth, for all; VGG's last map is 1 x 1 at 48 pixels, so its linear layers have a smaller share than at 224",
    },
    guard=Guard(METRIC, MARGIN, higher_is_better=True, relative=False),
    refuted_if="the whole interval of SimpleNet's accuracy over the VGG's lies below minus the margin",
    refutes=lambda record: record["details"]["gain in points"]["high"] < -MARGIN,
    measured_here="parameters of networks an eighth as wide, whose accuracy on photographs is within the margin",
    minutes=30,
)
def fewer_parameters(steps: int) -> Figure:
    """How many times SimpleNet's parameters a VGG16 of the same share of its widths has, and whether its accuracy is worth them.

    The paper's other number, operations, compares SimpleNet at 32 pixels with the others at 224 and more; at equal resolution the ratio is
    in the details. Free: the VGG without its hidden layers, narrowed to as few parameters; it saves as much where its accuracy stays within
    the margin.
    """
    arms = {name: shown(name, steps) for name in ("simplenet", "vgg", "bare vgg", "random features", "pixels")}
    count = {name: parameters(ARMS[name]()) for name in arms}
    here = {
        name: count_cost(ARMS[name]().eval(), torch.zeros(1, 1, 48, 48)).macs
        for name in ("simplenet", "vgg", "bare vgg")
    }
    macs = published_macs()
    loss = arms["vgg"].accuracy - arms["bare vgg"].accuracy
    gain, low, high = difference(arms["simplenet"], arms["vgg"])
    return Figure(
        count["vgg"] / count["simplenet"],
        "x",
        baseline=1.0,
        free=count["vgg"] / count["bare vgg"] if loss <= MARGIN else 1.0,
        quality=quality(arms, "simplenet", "vgg", "bare vgg", "a VGG without hidden layers of as many parameters"),
        trained=trained(arms),
        details={
            "gain in points": {"median": gain, "low": low, "high": high},
            "accuracy": {name: arm.accuracy for name, arm in arms.items()},
            "parameters": count,
            "macs of an image of 48 pixels": here,
            "published, VGG16 over SimpleNet": {
                "parameters": 138_357_544 / 5_498_378,
                "operations as the paper compares them (224 pixels and 32)": 154.7e9 / 652e6,
                "operations at 32 pixels each": macs["vgg"] / macs["simplenet"],
            },
        },
    )
