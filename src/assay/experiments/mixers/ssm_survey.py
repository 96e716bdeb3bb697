"""State space models: does the cost of a selective scan grow linearly where attention's grows quadratically, and is it as good?

Times are of causal sequence mixers of one width on random tokens (the speed of neither depends on the values). Quality is
segmentation of a stained tissue by U-shaped models that differ only in their mixers and have about as many parameters, trained on
the left half of the image and judged on the right half.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Quality, experiment
from assay.experiments.mixers.training import train
from assay.measure.clock import compare_many
from assay.measure.cost import count_cost
from assay.measure.stats import Interval, bootstrap, median_interval
from assay.methods.core import kernels
from assay.methods.core.mixers.attention import SoftmaxAttention
from assay.methods.mixers.ssm_survey import Mamba, UNet, dice, dice_loss, hausdorff_distance, match_width
from assay.workloads.images import crops, stained_tissue

ARMS: dict[str, dict[str, Any]] = {
    "convolution": {"mixer": "conv"},
    "window attention": {"mixer": "window"},
    "full attention": {"mixer": "attention"},
    "scan, raster": {"mixer": "s6", "order": "raster"},
    "scan, bidirectional": {"mixer": "s6", "order": "bidirectional"},
    "scan, 4-way": {"mixer": "s6", "order": "cross"},
}
OURS, RIVAL = "scan, 4-way", "full attention"  # of the quality: the survey's usual scan, and the baseline of its claim


def exponent(seconds: dict[Any, list[float]], tokens: list[int]) -> Interval:
    """The slope of log time over log tokens: the median over the rounds, each of which timed all lengths."""
    rounds = np.log([[seconds[n][i] for n in tokens] for i in range(len(seconds[tokens[0]]))])
    slopes = np.polyfit(np.log(tokens), rounds.T, 1)[0]
    return median_interval(slopes)


@torch.no_grad()
def times_of_mixers(tokens: list[int], dim: int, rounds: int) -> tuple[dict[str, Interval], dict[str, Any]]:
    """Exponents of the S6 mixer and of attention, and what was measured and counted on the way."""
    torch.manual_seed(0)
    mixers: dict[str, Any] = {"scan": Mamba(dim).eval(), "attention": SoftmaxAttention(dim).eval()}
    inputs = {n: torch.randn(1, n, dim) for n in tokens}
    runs = {(name, n): functools.partial(mixer, inputs[n]) for name, mixer in mixers.items() for n in tokens}
    with torch.inference_mode():
        found = compare_many({f"{name} {n}": run for (name, n), run in runs.items()}, rounds=rounds)
    seconds = {name: {n: found.seconds[f"{name} {n}"] for n in tokens} for name in mixers}
    median = {name: {n: float(np.median(seconds[name][n])) for n in tokens} for name in mixers}
    faster = [n for n in tokens if median["scan"][n] < median["attention"][n]]
    details = {
        "seconds": {name: {str(n): median[name][n] for n in tokens} for name in mixers},
        "scan_is_faster_from_tokens": faster[0] if faster else None,
        "state_bytes": {name: {str(n): mixer.state_bytes(n) for n in tokens} for name, mixer in mixers.items()},
        "flops": {name: {str(n): count_cost(mixer, inputs[n]).flops for n in tokens} for name, mixer in mixers.items()},
        "compiled_scan": kernels.load("scan"),
    }
    return {name: exponent(seconds[name], tokens) for name in mixers}, details


def segmentation_model(arm: str, parameters: int) -> UNet:
    options: dict[str, Any] = {"in_chans": 1, "num_classes": 1, "depths": (2, 2, 2), "patch": 2, **ARMS[arm]}
    torch.manual_seed(0)
    return UNet(dim=match_width(parameters, step=2, **options), **options)


def halves() -> tuple[Tensor, Tensor]:
    """(2, 512, 256) each: grey and stain of the left half, for training, and of the right half."""
    grey, stain = stained_tissue()
    both = torch.cat([grey - grey.mean(), stain[None].float()])
    return both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]


def batches(half: Tensor, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops, each in a random one of the square's eight symmetries."""
    step = 0
    while True:
        found = crops(half, size, batch, seed=step).rot90(step % 4, (2, 3))
        found = found.flip(3) if step % 8 >= 4 else found
        yield found[:, :1], found[:, 1:]
        step += 1


def loss(model: nn.Module, image: Tensor, stain: Tensor) -> Tensor:
    logits = model(image)
    return F.binary_cross_entropy_with_logits(logits, stain) + dice_loss(logits, stain)


@torch.no_grad()
def judged(model: nn.Module, half: Tensor, size: int) -> tuple[Interval, float]:
    """Dice on all crops of a half that have stain (with its interval), and their median HD95 in pixels."""
    tiles = half.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).transpose(0, 1)
    predicted = torch.cat([model(part[:, :1]) for part in tiles.split(8)]) > 0
    scores = dice(predicted, tiles[:, 1:])[:, 0]
    distances = hausdorff_distance(predicted, tiles[:, 1:])[:, 0]
    known = ~scores.isnan()
    found = bootstrap(scores[known].double().numpy(), lambda x, axis: x.mean(axis=axis))
    return found, float(distances[known].median())


@experiment(
    "ssm_survey/linear-complexity",
    points={
        "smoke": [
            {
                "tokens": [128, 256, 512],
                "dim": 16,
                "rounds": 6,
                "arms": [RIVAL, OURS],
                "parameters": 30_000,
                "crop": 32,
                "steps": 3,
                "sizes": [32],
            }
        ],
        "small": [
            {
                "tokens": [512, 1024, 2048, 4096, 8192],
                "dim": 64,
                "rounds": 10,
                "arms": list(ARMS),
                "parameters": 300_000,
                "crop": 64,
                "steps": 120,
                "sizes": [32, 64, 128, 256],
            }
        ],
        "full": [
            {
                "tokens": [512, 1024, 2048, 4096, 8192, 16384, 32768],
                "dim": dim,
                "rounds": 20,
                "arms": list(ARMS),
                "parameters": 300_000,
                "crop": 128,
                "steps": 3000,
                "sizes": [32, 64, 128, 256, 512],
            }
            for dim in (64, 512)
        ],
    },
    minutes=40,
)
def linear_complexity(
    tokens: list[int],
    dim: int,
    rounds: int,
    arms: list[str],
    parameters: int,
    crop: int,
    steps: int,
    sizes: list[int],
    batch: int = 8,
) -> Figure:
    """The exponent of the S6 mixer's time over tokens, full attention's as the baseline; Dice of both as vision mixers.

    Details: times, counted FLOPs and state bytes at every length; Dice, HD95, parameters and ms a crop of all arms.
    """
    exponents, details = times_of_mixers(tokens, dim, rounds)
    training, held_out = halves()
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, Interval] = {}
    models: dict[str, UNet] = {}
    for arm in arms:
        model = models[arm] = segmentation_model(arm, parameters)
        train(model, batches(training, crop, batch), steps=steps, lr=2e-3, weight_decay=0.05, loss=loss)
        model.eval()
        scores[arm], distance = judged(model, held_out, crop)
        results[arm] = {
            "dice": [scores[arm].median, scores[arm].low, scores[arm].high],
            "hd95_pixels": distance if math.isfinite(distance) else None,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    with torch.inference_mode():
        runs = {
            f"{arm} {size}": functools.partial(models[arm], torch.randn(1, 1, size, size))
            for arm in arms
            for size in sizes
        }
        timings = compare_many(runs, rounds=3)
    for arm in arms:
        results[arm]["ms_a_crop"] = {str(n): 1000 * float(np.median(timings.seconds[f"{arm} {n}"])) for n in sizes}
    quality = Quality(
        "Dice on held-out tissue", scores[OURS].median, scores[RIVAL].median, scores[OURS].low, scores[OURS].high
    )
    scan, attention = exponents["scan"], exponents["attention"]
    details |= {"attention_exponent": [attention.median, attention.low, attention.high], "segmentation": results}
    return Figure(
        scan.median, "", low=scan.low, high=scan.high, baseline=attention.median, quality=quality, details=details
    )
