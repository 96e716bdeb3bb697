"""FIT: how global attention grows with the tokens, how many tokens fit into memory, and what that does to time and image quality.

Everything runs on real photographs. Pairs are counted in runs of the model, not taken from the formula. Also measured: a training
step of FIT, of a plain transformer over all patches and of one whose attention stays inside tiles, with about the same number of
parameters, on crops of growing size; and how well each fills in hidden patches of unseen photographs after the same short training.

Tokens in memory are those of images on which training steps really ran. Each size runs in its own process, which is ended when its
resident memory (interpreter, image, weights, optimizer: everything) exceeds the limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.errors import AssayError
from assay.experiments.core import Figure, Quality, experiment
from assay.experiments.mixers.training import train
from assay.measure.cost import count_cost
from assay.measure.isolate import run_isolated
from assay.measure.stats import bootstrap
from assay.methods.attention.fit import FIT, group_image
from assay.workloads.images import crops, photograph

TRAINING, HELD_OUT = ("china", "flower", "astronaut", "coffee"), ("chelsea", "rocket")
ARMS = ("fit", "plain transformer", "local only")
LAYERS = {"fit": "(2)2(2)", "plain transformer": "(7)", "local only": "(7)"}  # about the same parameters
DEEPER = {"fit": "(2)4(2)", "plain transformer": "(9)", "local only": "(9)"}  # about the same parameters
DIM, TILE, LATENTS = 64, 4, 4


class FillIn(nn.Module):
    """Images (batch, 3, size, size) with hidden patches to the pixels of every patch, (batch, patches, 3 patch^2)."""

    def __init__(
        self,
        layers: str,
        size: int,
        patch: int,
        *,
        whole: bool,
        dim: int = DIM,
        tile: int = TILE,
        latents: int = LATENTS,
    ):
        super().__init__()
        if size % (patch * tile):
            raise ValueError(f"size must be a multiple of {patch * tile}, got {size}")
        patches = (size // patch) ** 2
        self.whole, self.patch, self.tile = whole, patch, tile
        n = patches if whole else tile**2
        self.fit = FIT(
            layers,
            inputs=3 * patch**2 + 1,
            groups=patches // n,
            group_size=n,
            latents=latents,
            dim=dim,
            latent_dim=dim,
            positions="sincos",
        )
        self.head = nn.Linear(dim, 3 * patch**2)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        x, _ = group_image(images, self.patch, self.tile)
        flag = hidden.view(*x.shape[:3], 1)
        x = torch.cat([(x - 0.5).masked_fill(flag, 0.0), flag.to(x.dtype)], -1)
        if self.whole:
            x = x.flatten(1, 2)[:, None]
        out: Tensor = self.head(self.fit(x)[0]).flatten(1, 2)
        return out + 0.5


def fill_in(arm: str, size: int, patch: int) -> FillIn:
    """The model of an arm for the sizes of `global_complexity`."""
    return FillIn(LAYERS[arm], size, patch, whole=arm == "plain transformer")


def squared_error(model: nn.Module, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of the pixels of hidden patches, one for each image."""
    patch, tile = int(model.patch), int(model.tile)  # type: ignore[arg-type]
    wanted = group_image(images, patch, tile)[0].flatten(1, 2)
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
    model = fill_in(arm, size, patch)

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
    model = fill_in(arm, size, patch)
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
            "parameters": {arm: sum(p.numel() for p in fill_in(arm, size, patch).parameters()) for arm in ARMS},
            "training_step": {
                arm: {str((side // patch) ** 2): measured_step(arm, side, patch) for side in sizes} for arm in arms
            },
        },
    )


# ---------------------------------------------------------------------------------------------------------- tokens in memory


def mosaic(side: int, cell: int = 300) -> Tensor:
    """A square image (1, 3, side, side) of crops of the training photographs side by side, at their own resolution."""
    image = torch.empty(1, 3, side, side)
    across = -(-side // cell)
    for number in range(across**2):
        top, left = number // across * cell, number % across * cell
        room = image[0, :, top : top + cell, left : left + cell]
        piece = crops(photograph(TRAINING[number % len(TRAINING)]), cell, 1, seed=number)[0]
        room.copy_(piece[:, : room.shape[1], : room.shape[2]])
    return image


def steps_on_an_image(
    arm: str, side: int, patch: int, dim: int, tile: int, latents: int, dtype: str, steps: int
) -> dict[str, Any]:
    """Whole training steps on one image of side x side pixels; run in a process of its own, whose memory is measured.

    `tokens` are counted where they enter the model. Weights and optimizer are float32; "bfloat16" is autocast.
    """
    torch.manual_seed(0)
    model = FillIn(DEEPER[arm], side, patch, whole=arm == "plain transformer", dim=dim, tile=tile, latents=latents)
    tokens: list[int] = []
    model.fit.register_forward_hook(lambda _, inputs, out: tokens.append(inputs[0].shape[1] * inputs[0].shape[2]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    image, hidden = mosaic(side), torch.rand(1, (side // patch) ** 2) < 0.5
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = squared_error(model, image, hidden).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return {
        "tokens": min(tokens),
        "losses": losses,
        "seconds_a_step": min(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def upwards(
    arm: str, sides: list[int], *, gigabytes: float, seconds: float, **sizes: int | str
) -> list[dict[str, Any]]:
    """Training steps on growing images until one does not finish within the memory or the time: one row each, with its outcome.

    Where memory ended it, images between the last that ran and the first that did not are tried, until one has at most 1.25 times
    the other's patches. Raises AssayError when a process ends for another reason.
    """
    rows = []
    for side in sides:
        rows.append(one_size(arm, side, gigabytes, seconds, sizes))
        if rows[-1]["status"] != "ok":
            break
    ran = max((row["side"] for row in rows if row["status"] == "ok"), default=0)
    failed, unit = rows[-1]["side"], int(sizes["patch"]) * int(sizes["tile"])
    while rows[-1]["status"] != "timeout" and 0 < 1.25 * ran**2 < failed**2:
        middle = (ran + failed) // 2 // unit * unit
        if middle <= ran:
            break
        rows.append(one_size(arm, middle, gigabytes, seconds, sizes))
        ran, failed = (middle, failed) if rows[-1]["status"] == "ok" else (ran, middle)
    return rows


def one_size(arm: str, side: int, gigabytes: float, seconds: float, sizes: dict[str, int | str]) -> dict[str, Any]:
    """Has `tokens` only if the steps finished and the whole process never held more than `gigabytes` (10^9 bytes)."""
    limit = int(gigabytes * 1e9)
    found = run_isolated(
        "assay.experiments.attention.fit:steps_on_an_image",
        {"arm": arm, "side": side, **sizes},
        timeout_s=seconds,
        memory_bytes=limit,
    )
    if found.status == "failed":
        raise AssayError(f"training {arm!r} on {side} x {side} pixels failed: {found.error}")
    over = found.ok and found.peak_rss_bytes > limit  # between two looks at it
    row = {"side": side, "status": "out of memory" if over else found.status, "peak_bytes": found.peak_rss_bytes}
    if row["status"] != "ok":
        return row | {"why": found.error or "was above its memory limit for a moment"}
    extra = found.peak_rss_bytes - found.start_rss_bytes
    return row | found.value | {"bytes_a_token": extra / found.value["tokens"]}


BASE = {"patch": 16, "dim": 256, "tile": 10, "latents": 8, "dtype": "float32", "gigabytes": 16.0, "steps": 2}
LARGE = [3200, 4480, 6400, 8960]  # 40,000 tokens of 16 x 16 pixels, doubled; 6400 is the paper's image


@experiment(
    "fit/tokens-in-16gb",
    points={
        "smoke": [BASE | {"patch": 8, "dim": 32, "tile": 4, "latents": 4, "seconds": 60, "sides": {"fit": [256, 512]}}],
        "small": [
            BASE | {"dtype": "bfloat16", "seconds": 400, "sides": {"fit": LARGE}},
            BASE | {"seconds": 400, "sides": {"fit": LARGE, "plain transformer": [800, 1600]}},
        ],
        "full": [
            BASE
            | {
                "dim": dim,
                "dtype": dtype,
                "seconds": 900,
                "sides": {arm: [800, 1120, 1600, 2240, *LARGE] for arm in ARMS},
            }
            for dim in (128, 512, 256)
            for dtype in ("bfloat16", "float32")
        ],
    },
    minutes=180,
    memory_gib=18,
)
def tokens_in_memory(
    sides: dict[str, list[int]],
    patch: int,
    dim: int,
    tile: int,
    latents: int,
    dtype: str,
    gigabytes: float,
    seconds: float,
    steps: int,
) -> Figure:
    """The most tokens of one image on which whole training steps (forward, backward, AdamW) ran within `gigabytes`.

    The model is the encoder with the sizes it has by default, "(2)4(2)" and 256 wide, and a head that fills in hidden patches; groups
    of 10 x 10 patches with 8 latents (`our choice`: the paper does not say which model its 16 GB held). Nothing is checkpointed.
    Details: the same for a plain transformer over all tokens (SDPA, which keeps no attention matrix, so that time ends its
    growth rather than memory) and for local layers alone, of about the same parameters, on the sizes the point names for them; 0
    where not even the smallest image ran.
    """
    rows = {
        arm: upwards(
            arm, found, gigabytes=gigabytes, seconds=seconds, patch=patch, dim=dim, tile=tile, latents=latents,
            dtype=dtype, steps=steps,
        )
        for arm, found in sides.items()
    }  # fmt: skip
    most = {arm: max((row.get("tokens", 0) for row in found), default=0) for arm, found in rows.items()}
    return Figure(most["fit"], "tokens", details={"most_tokens": most, "runs": rows})
