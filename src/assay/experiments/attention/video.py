"""What the video diffusion experiments share: clips of real pixels, training a small denoiser on them, and comparing samples.

No package contains a trained video model, so each experiment builds a small one from a diffusers class and trains it here on
moving crops of photographs. Clips and samples are (batch, 3, frames, height, width), with pixels in [-1, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.workloads.images import PHOTOGRAPHS, clip, photograph

PATCH = 4  # pixels
GRID = (8, 8, 8)  # frames and patches of a training clip

Noised = tuple[Tensor, Tensor, Tensor]  # noised clips, their times, and what the model shall say of them


@functools.cache
def small_photograph(label: int) -> Tensor:
    """A photograph reduced in size, so that a crop of a few dozen pixels shows something."""
    image = photograph(PHOTOGRAPHS[label])[None]
    return F.interpolate(image, size=(160, 200), mode="bilinear", antialias=True)[0]


def train_on_clips(model: nn.Module, noise: Callable[[Tensor], Noised], updates: int, *, batch: int = 2) -> float:
    """Train `model(x, times, labels)` on `updates` batches of clips, and leave it in eval mode without gradients.

    `noise(clips)` draws the times and the noise. Draws from torch's global generator. Returns the loss over the last tenth.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(update: int) -> float:  # warm-up, then a cosine
        return min((update + 1) / 20, 1.0) * (0.5 + 0.5 * math.cos(math.pi * update / updates))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses = []
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
    model.eval().requires_grad_(False)
    last = losses[-max(1, updates // 10) :]
    return sum(last) / len(last)


def psnr(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (found - expected).square().mean().clamp(min=1e-12)))
