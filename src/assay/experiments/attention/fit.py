"""FIT: how global attention grows with the tokens, and what that does to time, memory and the picture, on real photographs.

Pairs are counted in runs of the model, not taken from the formula. Beside them: a training step of FIT, of a plain transformer over
all patches and of one whose attention stays inside tiles, of about the same parameters, on crops of growing size; and how well
each fills in hidden patches of photographs it has not seen after the same short training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from assay.errors import AssayError
from assay.experiments.core import Figure, Quality, experiment
from assay.measure.cost import count_cost
from assay.measure.isolate import run_isolated
from assay.measure.stats import bootstrap
from assay.methods.attention.fit import FIT, group_image
from assay.methods.mixers.training import train
from assay.workloads.images import crops, photograph

TRAINING, HELD_OUT = ("china", "flower", "astronaut", "coffee"), ("chelsea", "rocket")
ARMS = ("fit", "plain transformer", "local only")
LAYERS = {"fit": "(2)2(2)", "plain transformer": "(7)", "local only": "(7)"}  # about the same parameters
DIM, TILE, LATENTS = 64, 4, 4


class FillIn(nn.Module):
    """Images (batch, 3, size, size) with hidden patches to the pixels of every patch, (batch, patches, 3 patch^2)."""

    def __init__(self, arm: str, size: int, patch: int):
        super().__init__()
        patches = (size // patch) ** 2
        self.whole, self.patch = arm == "plain transformer", patch
        n = patches if self.whole else TILE**2
        self.fit = FIT(
            LAYERS[arm],
            inputs=3 * patch**2 + 1,
            groups=patches // n,
            group_size=n,
            latents=LATENTS,
            dim=DIM,
            latent_dim=DIM,
            positions="sincos",
        )
        self.head = nn.Linear(DIM, 3 * patch**2)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        x, _ = group_image(images, self.patch, TILE)
        flag = hidden.view(*x.shape[:3], 1)
        x = torch.cat([(x - 0.5).masked_fill(flag, 0.0), flag.to(x.dtype)], -1)
        if self.whole:
            x = x.flatten(1, 2)[:, None]
        out: Tensor = self.head(self.fit(x)[0]).flatten(1, 2)
        return out + 0.5


def squared_error(model: nn.Module, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of the pixels of hidden patches, one for each image."""
    patch = int(model.patch)  # type: ignore[arg-type]
    wanted = group_image(images, patch, TILE)[0].flatten(1, 2)
    off = (model(images, hidden) - wanted).square().mean(-1) * hidden
    return off.sum(1) / hidden.sum(1)


def batches_of_crops(size: int, patch: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops of the training photographs, and which half of their patches to hide."""
    generator = torch.Generator().manual_seed(0)
    patches, step = (size // patch) ** 2, 0
    while True:
        images = [crops(photograph(TRAINING[i % 4]), size, 1, seed=step * batch + i) for i in range(batch)]
        yield torch.cat(images), torch.rand(batch, patches, generator=generator).argsort(1) < patches // 2
        step += 1


def psnr_after_training(arm: str, size: int, patch: int, steps: int) -> Tensor:
    """Decibels of each held-out crop's hidden patches, by a model trained for `steps` steps."""
    torch.manual_seed(0)
    model = FillIn(arm, size, patch)

    def loss(model: nn.Module, images: Tensor, hidden: Tensor) -> Tensor:
        return squared_error(model, images, hidden).mean()

    train(model, batches_of_crops(size, patch, 8), steps=steps, lr=2e-3, weight_decay=0.01, loss=loss)
    test = torch.cat([crops(photograph(name), size, 16, seed=1) for name in HELD_OUT])
    patches = (size // patch) ** 2
    hidden = torch.rand(len(test), patches, generator=torch.Generator().manual_seed(1)).argsort(1) < patches // 2
    with torch.no_grad():
        return -10 * squared_error(model.eval(), test, hidden).double().log10()


def training_step(arm: str, size: int, patch: int, repeats: int = 3) -> float:
    """Seconds of the fastest training step on one crop; run in a process of its own, whose memory is measured."""
    torch.manual_seed(0)
    model = FillIn(arm, size, patch)
    optimizer = torch.optim.AdamW(model.parameters())
    images = crops(photograph("astronaut"), size, 1)
    hidden = torch.rand(1, (size // patch) ** 2) < 0.5
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        optimizer.zero_grad()
        squared_error(model, images, hidden).mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def measured_step(arm: str, size: int, patch: int) -> dict[str, float]:
    found = run_isolated(
        "assay.experiments.attention.fit:training_step", {"arm": arm, "size": size, "patch": patch}, timeout_s=240
    )
    if not found.ok:
        raise AssayError(f"a training step of {arm!r} at {size} pixels: {found.status}, {found.error}")
    return {"seconds": found.value, "extra_bytes": max(0, found.peak_rss_bytes - found.start_rss_bytes)}


def counted_pairs(arm: str, n: int) -> dict[str, int]:
    """Query-key pairs of one run over n^3 tokens in n^2 groups of n: of global layers, or of a layer over all tokens at once."""
    whole = arm == "plain transformer"
    groups, size = (1, n**3) if whole else (n**2, n)
    model = FIT(
        "(1)" if whole else "(1)1(1)",
        inputs=4,
        groups=groups,
        group_size=size,
        latents=LATENTS,
        dim=16,
        latent_dim=16,
        heads=1,
        latent_heads=1,
    )
    rows = count_cost(model, torch.zeros(1, groups, size, 4)).modules
    pairs = {
        kind: sum(row.macs for row in rows if f"{kind}_layers" in row.name and row.name.endswith(".attention")) // 32
        for kind in ("local", "global")
    }
    return {"tokens": n**3, "global": pairs["local"] if whole else pairs["global"], "local": pairs["local"]}


def exponent(rows: list[dict[str, int]], kind: str) -> float:
    """Slope of log pairs over log tokens, by least squares."""
    tokens, pairs = ([math.log(row[name]) for row in rows] for name in ("tokens", kind))
    return float(np.polyfit(tokens, pairs, 1)[0])


@experiment(
    "fit/global-complexity",
    points={
        "smoke": [{"groups": [3, 4, 6], "sizes": [64], "arms": ["fit"], "patch": 8, "size": 64, "steps": 10}],
        "small": [
            {
                "groups": [4, 6, 8, 12, 16],
                "sizes": [64, 128, 256, 512],
                "arms": list(ARMS),
                "patch": 8,
                "size": 128,
                "steps": 200,
            }
        ],
        "full": [
            {
                "groups": [4, 8, 16, 24],
                "sizes": [64, 128, 256, 512],
                "arms": list(ARMS),
                "patch": 4,
                "size": 256,
                "steps": 5000,
            }
        ],
    },
    minutes=30,
)
def global_complexity(
    groups: list[int], sizes: list[int], arms: list[str], patch: int, size: int, steps: int
) -> Figure:
    """Exponent of the counted pairs of global attention in the tokens, groups of the cube root of them, 4 latents each.

    The baseline is the same figure of attention over all tokens. Quality: decibels of hidden patches against the plain transformer,
    with the interval of the difference.
    """
    rows = [counted_pairs("fit", n) for n in groups]
    plain = exponent([counted_pairs("plain transformer", n) for n in groups], "global")
    psnr = {arm: psnr_after_training(arm, size, patch, steps) for arm in ARMS}
    dense = float(psnr["plain transformer"].mean())
    found = bootstrap((psnr["fit"] - psnr["plain transformer"]).numpy(), lambda x, axis: x.mean(axis=axis))
    gain = bootstrap((psnr["fit"] - psnr["local only"]).numpy(), lambda x, axis: x.mean(axis=axis))
    value = exponent(rows, "global")
    return Figure(
        value,
        "",
        low=value,
        high=value,
        baseline=plain,
        quality=Quality(
            "PSNR of hidden patches, dB", dense + found.median, dense, dense + found.low, dense + found.high
        ),
        details={
            "counted": rows,
            "local_exponent": exponent(rows, "local"),
            "psnr_db": {arm: float(each.mean()) for arm, each in psnr.items()},
            "psnr_db_over_local_only": {"median": gain.median, "low": gain.low, "high": gain.high},
            "parameters": {arm: sum(p.numel() for p in FillIn(arm, size, patch).parameters()) for arm in ARMS},
            "training_step": {
                arm: {str((side // patch) ** 2): measured_step(arm, side, patch) for side in sizes} for arm in arms
            },
        },
    )
