"""The networks of the co-design: one network that mixes neighbours by convolutions, by shifts, by averages or not at all."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from assay.experiments.compression.efficient_dnns_digits import Data, accuracy, digits_of, forward, logits_of, train
from assay.experiments.rates import searched
from assay.measure.clock import compare_many
from assay.methods.compression.efficient_dnns import Net, dirac_net, resnet, shiftresnet, squeezenext_23, with_bits
from assay.workloads.images import photograph

CODESIGN = "efficient_dnns/codesign"
CANVAS, DIGIT = 16, 12  # pixels a side: of the image, and of the digit on it
ARMS = ("before", "shift", "none", "average", "few bits", "resnet", "shiftresnet")
COMPILED = ("before", "shift", "average")
TIMED = (*COMPILED, "resnet", "shiftresnet")


def codesigned(arm: str) -> Net:
    """The network of an arm. All but the residual ones are one network that mixes neighbours in another way."""
    if arm == "resnet":
        return resnet(depths=(1, 1, 1), widths=(8, 16, 32), in_chans=1)
    if arm == "shiftresnet":
        return shiftresnet((1, 1, 1), (8, 16, 32), expansion=9, in_chans=1)
    sizes: dict[str, Any] = {"last": 96, "pool_stem": False, "num_classes": 10, "in_chans": 1}
    mix: Any = {"before": "depthwise", "few bits": "shift"}.get(arm, arm)
    net = dirac_net((2, 2), (24, 48, 96), mix=mix, **sizes)
    if arm == "few bits":
        with_bits(net, weights=1, activations=4)
    return net


@cache
def drawn_digits(part: str, n: int, seed: int) -> Data:
    """`n` of a part's digits, enlarged to 12 pixels a side, each at a random place of a canvas of 16: (n, 1, 16, 16) in [-1, 1].

    "train" is the part for weights and that for theta.
    """
    parts = ("weights", "theta") if part == "train" else (part,)
    images, labels = (torch.cat(tensors) for tensors in zip(*map(digits_of, parts), strict=True))
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(images), (n,), generator=generator)
    places = torch.randint(CANVAS - DIGIT + 1, (n, 2), generator=generator).tolist()
    large = F.interpolate(images, (DIGIT, DIGIT), mode="bilinear")[picks, 0]
    canvas = torch.zeros(n, 1, CANVAS, CANVAS)
    for image, digit, (top, left) in zip(canvas, large, places, strict=True):
        image[0, top : top + DIGIT, left : left + DIGIT] = digit
    return 2 * canvas - 1, labels[picks]


def fresh(arm: str) -> Any:
    """The arm's network with its first weights, as it is timed: in inference, batch norms folded into convolutions, channels last."""
    torch.manual_seed(0)
    net: Any = codesigned(arm).eval()
    for unit in [m for m in net.modules() if isinstance(m, nn.Sequential) and len(m) > 1]:
        if isinstance(unit[0], nn.Conv2d) and isinstance(unit[1], nn.BatchNorm2d):
            unit[0], unit[1] = fuse_conv_bn_eval(unit[0], unit[1]), nn.Identity()
    return net.to(memory_format=torch.channels_last)


def trained_net(arm: str, n: int, epochs: int, rate: float, seed: int) -> Net:
    """The arm's network after its training; all arms of a seed see the same images in the same order."""
    torch.manual_seed(seed)
    net = codesigned(arm)
    train(net, drawn_digits("train", n, seed), rate, epochs, seed, batch=64)
    return net


def judged(arm: str, n: int, epochs: int, rate: float, seed: int) -> float:
    """The accuracy of the trained network on 2000 test digits at random places."""
    return accuracy(trained_net(arm, n, epochs, rate, seed), drawn_digits("test", 2000, 1_000_001))


@searched(CODESIGN, arms=ARMS, grid=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
def codesign_rate(arm: str, rate: float) -> float:
    """The cross entropy on digits kept for the choice."""
    net = trained_net(arm, 1024, 6, rate, 100)
    images, labels = drawn_digits("choose", 1000, 1_000_000)
    return float(F.cross_entropy(logits_of(net, images), labels))


def whole_networks() -> dict[str, dict[str, float]]:
    """Parameters, MACs and milliseconds of the papers' networks for large images, on one photograph, with first weights, not compiled."""
    from assay.measure.cost import count_cost

    built = {
        "SqueezeNext-23": (squeezenext_23(), 227),
        "ShuffleNetV2's units": (dirac_net(mix="depthwise"), 224),
        "DiracDeltaNet": (dirac_net(), 224),
        "DiracDeltaNet without shifts": (dirac_net(mix="none"), 224),
    }
    picture = photograph("china")[None]
    inputs = {name: F.interpolate(picture, (side, side), mode="bilinear") for name, (_, side) in built.items()}
    runs = {name: partial(forward, net.eval(), inputs[name]) for name, (net, _) in built.items()}
    timings = compare_many(runs, rounds=6, max_seconds=10.0)
    found = {}
    for name, (net, _) in built.items():
        cost = count_cost(net, inputs[name])
        milliseconds = 1e3 * float(np.median(timings.seconds[name]))
        found[name] = {"parameters": cost.params, "macs": cost.macs, "bytes": cost.bytes, "milliseconds": milliseconds}
    return found
