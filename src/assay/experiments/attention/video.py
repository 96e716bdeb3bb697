"""What the video diffusion experiments share: clips of real pixels, training a small denoiser on them, and judging samples.

No package contains a trained video model, so each experiment builds a small one from a diffusers class and trains it here on
moving crops of photographs. Clips and samples are (batch, 3, frames, height, width), with pixels in [-1, 1].

A sample is judged by its squared distance to the dense sample from the same noise, as a share of the distance at which the sample
lies that is made with attention deleted: 0 is the dense sample, 1 is no better than without attention. Decibels alone show
nothing: samples of a small model lie above 30 dB from each other whatever its attention does.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Quality
from assay.measure.stats import student_t
from assay.paths import atomic_file, cache_dir
from assay.workloads import images
from assay.workloads.images import PHOTOGRAPHS, clip, photograph

PATCH = 4  # pixels
GRID = (8, 8, 8)  # frames and patches of a training clip
SHARPNESS = 1.6
"""Gain of the norms of queries and keys before training; our choice. The attention of a small model after minutes of training is nearly
flat, and anything approximates that: the mean of the values, or random keys. That of a large video model is concentrated. With this
gain a tenth of the pairs hold nine tenths of the mass, and clusters that are asked for 0.9 of it recall 0.85. Three gains were looked at
(1, 1.6 and 2.5), and the margin of the guard in `svg2` was settled with this one: that the quality passes is weak evidence, that SVG2 lies
two to six times nearer to the dense sample than its controls is the finding."""

Noised = tuple[Tensor, Tensor, Tensor]  # noised clips, their times, and what the model shall say of them


@dataclass(frozen=True)
class Fit:
    """Mean squared error over the last tenth of the training; `floor` is that of the best multiple of each noised clip itself."""

    loss: float
    floor: float


@functools.cache
def small_photograph(label: int) -> Tensor:
    """A photograph reduced in size, so that a crop of a few dozen pixels shows something."""
    image = photograph(PHOTOGRAPHS[label])[None]
    return F.interpolate(image, size=(160, 200), mode="bilinear", antialias=True)[0]


def sharpen(model: nn.Module, gain: float = SHARPNESS) -> None:
    """Multiply the norms of queries and keys of a diffusers transformer's self-attentions by `gain`, before it is trained."""
    for name, parameter in model.named_parameters():
        norm = re.search(r"\.norm_[qk]\.weight$", name)
        if norm and ".attn2." not in name and "refiner" not in name:
            parameter.data *= gain


def train_on_clips(model: nn.Module, noise: Callable[[Tensor], Noised], updates: int, *, batch: int = 2) -> Fit:
    """Train `model(x, times, labels)` on `updates` batches of clips, and leave it in eval mode without gradients.

    `noise(clips)` draws the times and the noise. Draws from torch's global generator.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(update: int) -> float:  # warm-up, then a cosine
        return min((update + 1) / 20, 1.0) * (0.5 + 0.5 * math.cos(math.pi * update / updates))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses, floors = [], []
    for update in range(updates):
        labels = torch.randint(len(PHOTOGRAPHS), (batch,))
        clips = [
            clip(small_photograph(int(i)), GRID[0], GRID[1] * PATCH, seed=update * batch + n)
            for n, i in enumerate(labels)
        ]
        x, times, target = noise(torch.stack(clips).transpose(1, 2) * 2 - 1)
        loss = F.mse_loss(model(x, times, labels), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        floors.append(float((target - _multiple(x, target)).square().mean()))
    model.eval().requires_grad_(False)
    last = max(1, updates // 10)
    return Fit(sum(losses[-last:]) / last, sum(floors[-last:]) / last)


def _multiple(x: Tensor, target: Tensor) -> Tensor:
    """The multiple of each clip of x that is nearest to its target."""
    over = tuple(range(1, x.ndim))
    return x * ((x * target).sum(over, keepdim=True) / x.square().sum(over, keepdim=True).clamp(min=1e-12))


def kept(model: nn.Module, train: Callable[[nn.Module], Fit], name: str, *sources: ModuleType) -> Fit:
    """Train `model`, or load what the same training made before, from assay's cache.

    A measurement takes several processes, which need not all train. The cache's key is `name`, the source of this module and of
    `sources`, of the images, and torch's and diffusers' versions.
    """
    import diffusers
    from safetensors.torch import load_file, save_file

    code = "".join(inspect.getsource(module) for module in (inspect.getmodule(kept), images, *sources) if module)
    key = hashlib.sha256(f"{code} {torch.__version__} {diffusers.__version__}".encode()).hexdigest()[:16]
    path = cache_dir() / "denoisers" / f"{name}-{key}.safetensors"
    told = path.with_suffix(".json")
    if path.exists() and told.exists():
        model.load_state_dict(load_file(path))
        model.eval().requires_grad_(False)
        return Fit(**json.loads(told.read_text(encoding="utf-8")))
    fit = train(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    with atomic_file(told) as temporary:
        temporary.write_text(json.dumps({"loss": fit.loss, "floor": fit.floor}), encoding="utf-8")
    return fit


# -------------------------------------------------------------------------------------------------------------- judging


def psnr(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (found - expected).square().mean().clamp(min=1e-12)))


def mean_of_values(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None, text: int
) -> Tensor:
    """Attention deleted, in the form of diffusers' processors: each query gets the mean of the values that the mask lets it see."""
    if mask is None:
        return v.mean(2, keepdim=True).expand_as(v).contiguous()
    weight = mask.to(v.dtype).expand(v.shape[0], 1, -1, -1)[:, :, :1].mT  # of each key, the same for all queries
    return ((v * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)).expand_as(v).contiguous()


Sampler = Callable[[int], Tensor]  # the sample from the noise and the prompt of a number


def shares(
    arms: Mapping[str, Sampler], reference: Sampler, clips: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Squared distances of each arm's samples to the reference's, as shares of those of the arm "deleted", and in decibels.

    Both are by clip. Raises ValueError when the sample without attention is the reference itself: then there is nothing to judge.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    decibels: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(clips):
        expected = reference(number)
        off = {}
        for name, sampler in arms.items():
            sample = sampler(number)
            off[name] = float((sample - expected).square().mean())
            decibels[name].append(float(f"{psnr(sample, expected):.5g}"))
        if not off["deleted"] > 0:
            raise ValueError("the sample without attention equals the dense one: attention does nothing in this model")
        for name, value in off.items():
            found[name].append(float(f"{value / off['deleted']:.5g}"))
    return found, decibels


def clip_quality(found: Mapping[str, Sequence[float]], method: str, controls: Sequence[str], *, rival: str) -> Quality:
    """The mean share of `method` over clips with its 95 % interval (Student's t), against 0 of the dense sample, beside its controls.

    `controls` are the arms of equal budget.
    """
    values = torch.tensor(found[method], dtype=torch.float64)
    mean, count = float(values.mean()), len(values)
    half = student_t(0.95, count - 1) * float(values.std()) / count**0.5 if count > 1 else math.inf
    low, high = (None, None) if count < 2 else (mean - half, mean + half)
    return Quality(mean, 0.0, low, high, {name: sum(found[name]) / count for name in controls}, rival)
