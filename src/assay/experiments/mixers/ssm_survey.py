"""The survey's claim that state-space models cost time linear in the tokens: measured length by length, with attention beside it.

One exponent over all lengths can hide that the cost grows slower than linearly while fixed costs fade, and faster where the data
leave a cache. So the local exponents are kept, and the interval that is judged contains them all. That the mixer of linear cost still
mixes is the guard: classifiers of digits read pixel by pixel, which fail without it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, experiment
from assay.experiments.mixers.pixels import CHOICE_SEED, SEEDS, Pointwise, learned
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen, searched
from assay.measure.clock import compare_many
from assay.measure.cost import count_cost
from assay.measure.stats import Interval, median_interval
from assay.methods.core import kernels
from assay.methods.core.mixers.attention import SoftmaxAttention
from assay.methods.core.mixers.protocol import left_conv
from assay.methods.mixers.long_convs import LongConvClassifier
from assay.methods.mixers.ssm_survey import Mamba

MIXING = Operator("mixing the tokens of a sequence", free="softmax attention by torch's kernel")
TOLERANCE = 0.25
"""How far "about 1" reaches: a quarter of the way from linear to quadratic. n log n would have 1.1 at these lengths, so the claim is not
told apart from it; the spread of local exponents from caches and fixed costs is larger anyway."""
TAPS = 4  # of the rival, a short convolution


# ---- what it costs ---------------------------------------------------------------------------------------------------------------


def local_exponents(seconds: dict[int, list[float]]) -> list[Interval]:
    """The exponent between each length and the next: the median over the rounds, each of which timed all lengths."""
    lengths = sorted(seconds)
    return [
        median_interval(np.log(np.divide(seconds[b], seconds[a])) / np.log(b / a))
        for a, b in zip(lengths, lengths[1:], strict=False)
    ]


def exponent(seconds: dict[int, list[float]]) -> Interval:
    """The slope of log time over log tokens, in the median over the rounds, with an interval that holds every local exponent."""
    lengths = sorted(seconds)
    rounds = np.log([[seconds[n][i] for n in lengths] for i in range(len(seconds[lengths[0]]))])
    slope = median_interval(np.polyfit(np.log(lengths), rounds.T, 1)[0])
    local = [found.median for found in local_exponents(seconds)]
    return Interval(slope.median, min(slope.low, *local), max(slope.high, *local), slope.n)


def trend(seconds: dict[int, list[float]]) -> dict[str, Any]:
    """How much the local exponent changes with every doubling of the length, and whether that is more than noise."""
    lengths = sorted(seconds)
    rounds = np.log([[seconds[n][i] for n in lengths] for i in range(len(seconds[lengths[0]]))])
    doublings = np.log2(lengths)
    curvature = median_interval(2 * np.polyfit(doublings, rounds.T / np.log(2), 2)[0])
    rising, falling = curvature.low > 0, curvature.high < 0
    said = "rises with the length" if rising else "falls with the length" if falling else "shows no trend"
    return {
        "exponent": said,
        "change_a_doubling": [curvature.median, curvature.low, curvature.high],
        "outside_noise": rising or falling,
    }


def timed(tokens: list[int], dim: int, rounds: int) -> tuple[dict[str, dict[int, list[float]]], dict[str, Any]]:
    """Seconds of the S6 mixer and of attention at every length, round by round, and what was counted beside them."""
    torch.manual_seed(0)
    mixers: dict[str, Any] = {"scan": Mamba(dim).eval(), "attention": SoftmaxAttention(dim).eval()}
    inputs = {n: torch.randn(1, n, dim) for n in tokens}
    runs = {f"{name} {n}": functools.partial(mixer, inputs[n]) for name, mixer in mixers.items() for n in tokens}
    with torch.inference_mode():
        found = compare_many(runs, rounds=rounds)
        flops = {name: {str(n): count_cost(mixer, inputs[n]).flops for n in tokens} for name, mixer in mixers.items()}
    seconds = {name: {n: found.seconds[f"{name} {n}"] for n in tokens} for name in mixers}
    median = {name: {n: float(np.median(seconds[name][n])) for n in tokens} for name in mixers}
    faster = [n for n in tokens if median["scan"][n] < median["attention"][n]]
    return seconds, {
        "seconds": {name: {str(n): median[name][n] for n in tokens} for name in mixers},
        "scan_is_faster_from_tokens": faster[0] if faster else None,
        "state_bytes": {name: {str(n): mixer.state_bytes(n) for n in tokens} for name, mixer in mixers.items()},
        "flops": flops,
        "compiled_scan": kernels.load("scan"),
        "busy_machine": found.noisy,
    }


# ---- whether it mixes ------------------------------------------------------------------------------------------------------------


class Placed(nn.Module):
    """A mixer behind learned positions, which attention needs and the others do not mind."""

    def __init__(self, dim: int, tokens: int, mixer: nn.Module):
        super().__init__()
        self.place, self.mixer = nn.Parameter(0.7 * torch.randn(tokens, dim)), mixer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mixer(x + self.place)
        return out


class ShortConvolution(nn.Module):
    """The rival: a causal convolution of four taps, then `Pointwise`."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(dim, TAPS) / TAPS**0.5), Pointwise(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(left_conv(x, self.weight))
        return out


LAYERS: dict[str, Any] = {
    "scan": lambda dim, tokens: Mamba(dim),
    "attention": lambda dim, tokens: Placed(dim, tokens, SoftmaxAttention(dim)),
    "short convolution": lambda dim, tokens: ShortConvolution(dim),
    "no mixing": lambda dim, tokens: Pointwise(dim),
}


def network(arm: str, tokens: int, classes: int, dim: int, depth: int) -> nn.Module:
    """Pixels to logits through `depth` residual layers of one kind."""
    return LongConvClassifier(1, classes, tokens, dim=dim, depth=depth, layer=lambda: LAYERS[arm](dim, tokens))


def scan_at_random(model: nn.Module) -> None:
    """From now on every mixer scans the tokens in a random order."""
    generator = torch.Generator().manual_seed(0)

    def shuffled(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        return (x[:, torch.randperm(x.shape[1], generator=generator)],)

    for module in model.modules():
        if isinstance(module, Mamba):
            module.register_forward_pre_hook(shuffled)


def lesson_at(arm: str, rate: float, seed: int, lesson: str) -> dict[str, Any]:
    """What an arm learns from a lesson at one rate, and what it knows with its scan at random."""
    return learned(lambda *sizes: network(arm, *sizes), rate, seed, lesson, scan_at_random)


def lesson_of(arm: str, seed: int, lesson: str) -> dict[str, Any]:
    """`lesson_at` with the searched rate."""
    return lesson_at(arm, chosen("ssm_survey/pixels", arm).rate, seed, lesson)


@searched("ssm_survey/pixels", arms=list(LAYERS), grid=(3e-3, 1e-2, 3e-2, 1e-1))
def pixels_loss(arm: str, rate: float) -> float:
    """Nats a picture on pictures that nothing else uses."""
    return float(lesson_at(arm, rate, CHOICE_SEED, "digits")["loss"])


def mixing(lesson: str) -> tuple[Quality, dict[str, Trained], dict[str, Any]]:
    """The accuracy of the scan beside attention's, the controls, and all that was learned."""
    runs = [(arm, seed, lesson) for arm in LAYERS for seed in SEEDS]
    each = dict(zip([run[:2] for run in runs], in_parallel(lesson_of, runs), strict=True))
    found = {arm: [each[arm, seed] for seed in SEEDS] for arm in LAYERS}

    def mean(arm: str, name: str = "accuracy") -> float:
        return float(np.mean([score[name] for score in found[arm]]))

    gains = [a["accuracy"] - b["accuracy"] for a, b in zip(found["scan"], found["attention"], strict=True)]
    gain, base = over_seeds(gains, resolution=1 / found["scan"][0]["held_out"]), mean("attention")
    controls = {
        "deleted": mean("no mixing"),
        "random": mean("scan", "disturbed"),
        "rival": mean("short convolution"),
    }
    quality = Quality(
        base + gain.median, base, base + gain.low, base + gain.high, controls, "a convolution of four taps"
    )
    trained = {
        arm: Trained(
            [score["accuracy"] for score in found[arm]],
            found[arm][0]["majority"],
            "the most frequent class",
            chosen("ssm_survey/pixels", arm).rate,
            chosen("ssm_survey/pixels", arm).rates,
            higher_is_better=True,
        )
        for arm in ("scan", "attention")
    }
    return quality, trained, found


@experiment(
    "ssm_survey/linear-complexity",
    points={
        "smoke": [{"tokens": [256, 512, 1024], "dim": 16, "rounds": 6, "lesson": "tiny"}],
        "small": [{"tokens": [1024, 2048, 4096, 8192, 16384], "dim": 64, "rounds": 12, "lesson": "digits"}],
        "full": [
            {"tokens": [1024, 2048, 4096, 8192, 16384, 32768, 65536], "dim": dim, "rounds": 20, "lesson": "digits"}
            for dim in (64, 512)
        ],
    },
    decides={
        "full": {
            "tokens": [1024, 2048, 4096, 8192, 16384, 32768, 65536],
            "dim": 64,
            "rounds": 20,
            "lesson": "digits",
        }
    },
    operator=MIXING,
    paper={"mixer": "S6", "states": 16, "expand": 2, "conv": 4, "lesson": "medical images"},
    departures={
        "lesson": "digits of 64 pixels, which are learned in seconds, and which no model can name that mixes nothing"
    },
    guard=Guard("accuracy on held-out digits read pixel by pixel", 0.05, higher_is_better=True, relative=False),
    tolerance=TOLERANCE,
    measured_here="wall time of one forward pass of the S6 mixer",
    refuted_if="every local exponent of the scan's time lies above 1.25",
    minutes=40,
)
def linear_complexity(tokens: list[int], dim: int, rounds: int, lesson: str) -> Figure:
    """The exponent of the S6 mixer's time over tokens, with attention's as the baseline.

    The interval contains every local exponent (from one length to the next), which the details list with their trend. The guard
    allows five points of accuracy to be lost to attention after equal training; deleted mixes nothing, random scans in a random
    order, the rival sees four neighbours.
    """
    seconds, details = timed(tokens, dim, rounds)
    scan, attention = exponent(seconds["scan"]), exponent(seconds["attention"])
    quality, trained, found = mixing(lesson)
    details |= {
        "exponents": {name: [f.median, f.low, f.high] for name, f in (("scan", scan), ("attention", attention))},
        "local_exponents": {
            name: [[f.median, f.low, f.high] for f in local_exponents(seconds[name])] for name in seconds
        },
        "trend": {name: trend(seconds[name]) for name in seconds},
        "learned": found,
    }
    return Figure(
        scan.median,
        "",
        low=scan.low,
        high=scan.high,
        baseline=attention.median,
        free=attention.median,
        quality=quality,
        trained=trained,
        details=details,
    )
