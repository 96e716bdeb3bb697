"""FIT: how global attention grows with the tokens, and how many tokens fit into memory.

The exponent follows from the sizes of the groups, so it is arithmetic, and its verdict says so; pairs are counted in runs of the model
all the same, not taken from the formula. Beside it stand training steps of FIT, of a plain transformer over all patches and of one
whose attention stays inside tiles, with about the same number of parameters, on crops of growing size.

Tokens in memory are those of images on which training steps really ran. Each size runs in its own process, which is ended when its
resident memory (interpreter, image, weights, optimizer: everything) exceeds the limit.

What must not be lost is that a token can learn from every other one: tiles alone are cheaper still. It is measured as reach: the
share of tokens that change when one does. Filling in hidden patches after a short training cannot tell the three apart (FIT is
within 0.3 dB of tiles alone and of the plain transformer), so it is not used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.errors import AssayError
from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.measure.cost import count_cost
from assay.measure.isolate import run_isolated
from assay.methods.attention.fit import FIT, group_image
from assay.workloads.images import crops, photograph

TRAINING = ("china", "flower", "astronaut", "coffee")
ARMS = ("fit", "plain transformer", "local only")
KEPT = ", blocks run twice"  # suffix of an arm: activations are computed again on the way back instead of kept
LAYERS = {"fit": "(2)2(2)", "plain transformer": "(7)", "local only": "(7)"}  # about the same parameters
DEEPER = {"fit": "(2)4(2)", "plain transformer": "(9)", "local only": "(9)"}  # about the same parameters
DIM, TILE, LATENTS = 64, 4, 4

ALL_TOKENS = Operator(
    "attention over all tokens of an image in training",
    free="a plain transformer whose blocks are checkpointed (torch.utils.checkpoint)",
)
REACH = Guard(
    "share of tokens that a change in one of them reaches",
    margin=0.01,
    higher_is_better=True,
    without={"random": "FIT chooses nothing: all latents attend to all"},
)


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
        again: bool = False,
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
        if again:
            stages: Any = self.fit.body.stages
            for stage in stages:
                stage.local_layers = nn.ModuleList(map(Again, stage.local_layers))
                stage.global_layers = nn.ModuleList(map(Again, stage.global_layers))

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        x, _ = group_image(images, self.patch, self.tile)
        flag = hidden.view(*x.shape[:3], 1)
        x = torch.cat([(x - 0.5).masked_fill(flag, 0.0), flag.to(x.dtype)], -1)
        if self.whole:
            x = x.flatten(1, 2)[:, None]
        out: Tensor = self.head(self.fit(x)[0]).flatten(1, 2)
        return out + 0.5


class Again(nn.Module):
    """A block whose activations are computed a second time on the way back."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any) -> Tensor:
        y: Tensor = checkpoint(self.block, *inputs, use_reentrant=False)
        return y


def fill_in(arm: str, size: int, patch: int) -> FillIn:
    """The model of an arm for the sizes of `global_complexity`."""
    return FillIn(LAYERS[arm], size, patch, whole=arm == "plain transformer")


def squared_error(model: nn.Module, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of the pixels of hidden patches, one for each image."""
    patch, tile = int(model.patch), int(model.tile)  # type: ignore[arg-type]
    wanted = group_image(images, patch, tile)[0].flatten(1, 2)
    off = (model(images, hidden) - wanted).square().mean(-1) * hidden
    return off.sum(1) / hidden.sum(1)


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
    """`training_step` in a process of its own: its seconds, and the bytes it took beyond those the process began with."""
    found = run_isolated(
        "assay.experiments.attention.fit:training_step", {"arm": arm, "size": size, "patch": patch}, timeout_s=240
    )
    if not found.ok:
        raise AssayError(f"a training step of {arm!r} at {size} pixels: {found.status}, {found.error}")
    return {"seconds": found.value, "extra_bytes": max(0, found.peak_rss_bytes - found.start_rss_bytes)}


def counted_pairs(arm: str, n: int, latents: int = LATENTS) -> dict[str, int]:
    """Query-key pairs of one run over n^3 tokens in n^2 groups of n: of global layers, or of a layer over all tokens at once."""
    whole = arm == "plain transformer"
    groups, size = (1, n**3) if whole else (n**2, n)
    model = FIT(
        "(1)" if whole else "(1)1(1)",
        inputs=4,
        groups=groups,
        group_size=size,
        latents=latents,
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


def reach(model: FIT) -> float:
    """Share of the tokens that change when the first one does."""
    torch.manual_seed(0)
    model = model.double().eval()
    x = torch.randn(1, model.groups, model.group_size, model.stem.in_features, dtype=torch.float64)
    other = x.clone()
    other[0, 0, 0] += 1.0
    with torch.no_grad():
        moved = (model(x)[0] - model(other)[0]).abs().amax(-1)
    return float((moved > 0).double().mean())


def reached(layers: Mapping[str, str], groups: int, size: int, latents: int) -> Quality:
    """Reach of a FIT of so many groups of so many tokens, of the plain transformer, and of tiles alone, the latents deleted.

    The rival is tiles alone again, as large as FIT's attention pairs pay for.
    """
    tokens = groups * size

    def built(arm: str, count: int) -> FIT:
        return FIT(
            layers[arm], inputs=4, groups=count, group_size=tokens // count, latents=latents, dim=16, latent_dim=16,
            heads=1, latent_heads=1,
        )  # fmt: skip

    def pairs(model: FIT) -> int:
        rows = count_cost(model, torch.zeros(1, model.groups, model.group_size, 4)).modules
        found = [row.macs for row in rows if row.name.endswith(".attention")]
        return sum(found) // 32

    fit, local = built("fit", groups), built("local only", groups)
    most = pairs(fit)
    fewest = next(
        count for count in range(1, tokens) if tokens % count == 0 and pairs(built("local only", count)) <= most
    )
    return Quality(
        reach(fit),
        reach(built("plain transformer", 1)),
        controls={"deleted": reach(local), "rival": reach(built("local only", fewest))},
        rival="tiles alone, as large as FIT's attention pairs pay for",
    )


def exponent(rows: list[dict[str, int]], kind: str) -> float:
    """Slope of log pairs over log tokens, by least squares."""
    tokens, pairs = ([math.log(row[name]) for row in rows] for name in ("tokens", kind))
    return float(np.polyfit(tokens, pairs, 1)[0])


SHAPE = {"groups": [4, 6, 8, 12, 16], "patch": 8, "arms": list(ARMS)}


@experiment(
    "fit/global-complexity",
    points={
        "smoke": [SHAPE | {"groups": [3, 4, 6], "sizes": [64], "arms": ["fit"]}],
        "small": [SHAPE | {"sizes": [128, 512]}],
        "full": [SHAPE | {"groups": [4, 8, 16, 24], "patch": 4, "sizes": [64, 128, 256, 512]}],
    },
    operator=ALL_TOKENS,
    guard=REACH,
    paper={"group size": "the cube root of the tokens", "latents a group": "constant"},
    refuted_if="counted in runs of the model, the pairs of global attention grow by another power of the tokens than 4/3",
    tolerance=0.01,
    computed="the pairs follow from groups of the cube root of the tokens, with a constant number of latents each",
    minutes=30,
)
def global_complexity(groups: list[int], sizes: list[int], arms: list[str], patch: int) -> Figure:
    """Exponent of the counted pairs of global attention in the tokens, groups of the cube root of them, 4 latents each.

    The baseline is the same figure of attention over all tokens, which is what a checkpointed one has too. Tolerance 0.01 (our choice):
    counts have no noise, and the exponent of local attention is the same, so only the arithmetic is tested. Arms: twice the latents
    (no other exponent), and latents in proportion to the group, the design that the claim excludes.
    """
    rows = [counted_pairs("fit", n) for n in groups]
    whole = [counted_pairs("plain transformer", n) for n in groups]
    value, plain = exponent(rows, "global"), exponent(whole, "global")
    shares = [counted_pairs("fit", n, latents=n) for n in groups]
    return Figure(
        value,
        "",
        baseline=plain,
        free=plain,
        arms={
            "twice the latents": exponent([counted_pairs("fit", n, latents=2 * LATENTS) for n in groups], "global"),
            "as many latents as tokens": exponent(shares, "global"),
        },
        quality=reached(
            {"fit": "(1)1(1)", "plain transformer": "(2)", "local only": "(2)"}, groups[-1] ** 2, groups[-1], LATENTS
        ),
        details={
            "counted": rows,
            "local exponents": [exponent(rows[i : i + 2], "global") for i in range(len(rows) - 1)],
            "exponent of local layers": exponent(rows, "local"),
            "parameters": {arm: sum(p.numel() for p in fill_in(arm, 128, patch).parameters()) for arm in ARMS},
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
    kind = arm.removesuffix(KEPT)
    model = FillIn(
        DEEPER[kind], side, patch, whole=kind == "plain transformer", dim=dim, tile=tile, latents=latents,
        again=kind != arm,
    )  # fmt: skip
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
PLAIN, FREE = "plain transformer", "plain transformer" + KEPT
WHOLE = {arm: [800, 1120, 1600, 2240, *LARGE] for arm in (*ARMS, FREE, "fit" + KEPT)}
FULL = [
    BASE | {"dim": dim, "dtype": dtype, "seconds": 900, "sides": WHOLE}
    for dim in (128, 256, 512)
    for dtype in ("bfloat16", "float32")
]


@experiment(
    "fit/tokens-in-16gb",
    points={
        "smoke": [
            BASE
            | {
                "patch": 8,
                "dim": 32,
                "tile": 4,
                "latents": 4,
                "gigabytes": 8.0,
                "seconds": 60,
                "sides": {"fit": [256], PLAIN: [128]},
            }
        ],
        "small": [
            BASE
            | {
                "patch": 8,
                "dim": 64,
                "gigabytes": 0.8,
                "seconds": 120,
                "sides": {"fit": [560, 800], PLAIN: [400, 560], FREE: [800], "local only": [720], "fit" + KEPT: [960]},
            }
        ],
        "full": FULL,
    },
    operator=ALL_TOKENS,
    guard=REACH,
    paper={"gigabytes": 16.0, "optimisation": "none", "patch": 16, "dim": "not said", "side": 6400},
    departures={
        "gigabytes": "0.8 at `small`, of which the interpreter has over half: attention over the tokens of 16 GB takes hours here",
        "patch": "8 at `small`, so that the few photographs have enough patches",
        "dim": "the paper does not say which model its 16 GB held: 256 wide is the encoder's default, 64 at `small`",
        "side": "grows until the memory ends",
    },
    decides={"full": BASE | {"seconds": 900, "sides": WHOLE}},
    refuted_if="a plain transformer of as many parameters trains on as many tokens in the same memory",
    measured_here="tokens trained end to end in the memory that the point names (0.8 GB at `small`)",
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

    The model is the encoder with the layers it has by default, "(2)4(2)", and a head that fills in hidden patches; groups of 10 x 10
    patches with 8 latents (`our choice`). Nothing is checkpointed. The baseline is a plain transformer over all tokens (SDPA, which
    keeps no attention matrix), the free one that with its blocks checkpointed, which loses nothing; arms are local layers alone and
    FIT checkpointed, all of about the same parameters. They are tried on the sides that the point names, so that a number is
    "at least"; 0 where not even the smallest image ran.
    """
    rows = {
        arm: upwards(
            arm, found, gigabytes=gigabytes, seconds=seconds, patch=patch, dim=dim, tile=tile, latents=latents,
            dtype=dtype, steps=steps,
        )
        for arm, found in sides.items()
    }  # fmt: skip
    most = {arm: float(max((row.get("tokens", 0) for row in found), default=0)) for arm, found in rows.items()}
    return Figure(
        most["fit"],
        "tokens",
        baseline=most.get(PLAIN),
        free=most.get(FREE),
        arms={arm: found for arm, found in most.items() if arm not in ("fit", PLAIN, FREE)},
        quality=reached(DEEPER, 4, tile**2, latents),
        details={"most_tokens": most, "runs": rows},
    )
