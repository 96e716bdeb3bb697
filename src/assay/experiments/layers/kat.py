"""KAT: what group-rational activations cost in training time on real handwritten digits, and what they gain in accuracy.

The accuracy is that of small networks trained from scratch to tell which photograph a tile comes from.
"""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.stats import student_t
from assay.methods.core.layers.surgery import cost
from assay.methods.layers.kat import VisionTransformer, convert
from assay.workloads.images import PHOTOGRAPHS, digits_split, photograph

Mlp = Literal["kat", "gelu"]
RATIONAL_OPERATIONS = 20  # of one number, forward: two Horner schemes, an absolute value, a sum and a division

# scikit-image's bundled images of some 300 pixels, in addition to the colour pictures of workloads.images
GREY = ("brick", "camera", "cell", "clock", "coins", "grass", "gravel", "moon")
COLOUR = ("hubble_deep_field", "immunohistochemistry", "retina")
CELL, TILE = 64, 32  # pixels a side: of the grid that train and test tiles share out, and of a tile
MARGIN = 4  # pixels left free inside a cell's edge


def model_of(mlp: Mlp, width: int, depth: int, seed: int, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "num_heads": 4}
    return VisionTransformer(mlp=mlp, embed_dim=width, depth=depth, **{**sizes, **options})


class Training:
    """One model, its optimizer, and `epochs` over the images in an order that the seed repeats.

    The paper's rates: a warm-up (a tenth of the steps), then a cosine down to 0. At a constant rate the accuracy of both networks
    still jumps by several points from one epoch to the next, and what is compared is where it stood last. AdamW is the fused one,
    or else what the coefficients' many small tensors cost in Python counts as the method's time.
    """

    def __init__(self, model: VisionTransformer, split: tuple[Tensor, ...], seed: int, epochs: int, batch: int = 64):
        self.model, self.split, self.batch = model, split, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
        self.steps = epochs * math.ceil(len(split[0]) / batch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.generator = torch.Generator().manual_seed(seed)

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step; past the last one it stays at 0."""
        return min(1.0, 10 * (step + 1) / self.steps) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2

    def epoch(self) -> None:
        images, labels = self.split[:2]
        for chosen in torch.randperm(len(images), generator=self.generator).split(self.batch):
            loss = F.cross_entropy(self.model(images[chosen]), labels[chosen], label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        images, labels = self.split[2:]
        return float((self.model(images).argmax(-1) == labels).double().mean())


@cache
def pictures() -> list[Tensor]:
    """The photographs as grey images (height, width) in [0, 1]; the place in the list is the class."""
    shared = [photograph(name).mean(0) for name in PHOTOGRAPHS]  # says how to get scikit-image where it is missing
    from skimage import data

    grey = [torch.from_numpy(getattr(data, name)().copy()).float() / 255 for name in GREY]
    colour = [torch.from_numpy(getattr(data, name)().copy()).float().mean(-1) / 255 for name in COLOUR]
    return grey + colour + shared


def cells(picture: Tensor, held_out: bool) -> list[tuple[int, int]]:
    """Top left corners of the cells of one part: every fourth cell, evenly spread, is held out."""
    rows, columns = (size // CELL for size in picture.shape)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    return [(CELL * r, CELL * c) for r, c in places if ((r + 2 * c) % 4 == 3) == held_out]


def tiles(n: int, *, held_out: bool, seed: int) -> tuple[Tensor, Tensor]:
    """`n` tiles (n, 1, TILE, TILE), half of them mirrored, and the picture each comes from (n,), all pictures being equally likely.

    No tile leaves its cell, less a margin: train and test tiles never share a pixel, nor do they touch.
    """
    generator = torch.Generator().manual_seed(seed)
    found, labels = [], torch.randint(len(pictures()), (n,), generator=generator)
    corners = [cells(picture, held_out) for picture in pictures()]
    for label in labels.tolist():
        top, left = corners[label][int(torch.randint(len(corners[label]), (1,), generator=generator))]
        down, right = (MARGIN + torch.randint(CELL - TILE - 2 * MARGIN + 1, (2,), generator=generator)).tolist()
        tile = pictures()[label][top + down : top + down + TILE, left + right : left + right + TILE]
        found.append(tile.flip(1) if torch.rand(1, generator=generator) < 0.5 else tile)
    return (torch.stack(found)[:, None] - 0.5) / 0.25, labels


@experiment(
    "kat/mnist-time",
    points={
        "smoke": [{"width": 32, "depth": 1, "epochs": 2, "seeds": 1}],
        "small": [{"width": 96, "depth": 4, "epochs": 40, "seeds": 5}],
        "full": [
            {"width": 96, "depth": 4, "epochs": 100, "seeds": 5},
            {"width": 384, "depth": 6, "epochs": 40, "seeds": 5},
        ],
    },
    minutes=30,
)
def training_time(width: int, depth: int, epochs: int, seeds: int) -> Trial:
    """An epoch of a small ViT with GELU MLPs against one with group-rational layers; accuracy on held-out digits beside it.

    The details hold the same with the released code's weights in place of the variance-preserving ones, and a GELU network
    converted after training, before and after three epochs more.
    """
    split = digits_split(seed=0)
    timed = {mlp: Training(model_of(mlp, width, depth, 0), split, 0, epochs) for mlp in ("gelu", "kat")}
    costs = {mlp: cost(run.model.blocks[0].mlp) for mlp, run in timed.items()}  # type: ignore[arg-type]
    details: dict[str, Any] = {
        "parameters": {mlp: sum(p.numel() for p in run.model.parameters()) for mlp, run in timed.items()},
        "mlp_parameters": {mlp: found.params for mlp, found in costs.items()},
        "mlp_weight_bytes": {mlp: 4 * found.params for mlp, found in costs.items()},
        "mlp_macs_per_token": {mlp: found.macs for mlp, found in costs.items()},
        "activation_operations_per_token": RATIONAL_OPERATIONS
        * 5
        * width,  # on width and 4 width numbers; of GELU not counted
    }

    def quality() -> Quality:
        found: dict[str, list[float]] = {
            "gelu": [],
            "kat": [],
            "kat, as released": [],
            "converted": [],
            "converted, tuned": [],
        }
        for seed in range(seeds):
            for arm in ("gelu", "kat", "kat, as released"):
                options = {"variant": "as_released"} if arm == "kat, as released" else {}
                model = model_of("gelu" if arm == "gelu" else "kat", width, depth, seed, **options)
                run = Training(model, split, seed, epochs)
                for _ in range(epochs):
                    run.epoch()
                found[arm].append(run.accuracy())
                if arm == "gelu":
                    convert(model)
                    run = Training(model, split, seed, 3)
                    found["converted"].append(run.accuracy())
                    for _ in range(3):
                        run.epoch()
                    found["converted, tuned"].append(run.accuracy())
        details["accuracy"] = found
        mean = {arm: sum(values) / len(values) for arm, values in found.items()}
        return Quality(
            "accuracy on held-out digits",
            mean["kat"],
            mean["gelu"],
            min(found["kat"]),
            max(found["kat"]),
            higher_is_better=True,
        )

    return Trial(timed["gelu"].epoch, timed["kat"].epoch, quality=quality, details=lambda: details, pairs=25)


@experiment(
    "kat/imagenet-accuracy-base",
    points={
        "smoke": [{"width": 32, "depth": 1, "patch": 8, "train": 128, "epochs": 2, "seeds": 2}],
        "small": [{"width": 64, "depth": 4, "patch": 8, "train": 4096, "epochs": 16, "seeds": 5}],
        "full": [
            {"width": 64, "depth": 4, "patch": 8, "train": 16384, "epochs": 60, "seeds": 10},
            {"width": 192, "depth": 12, "patch": 4, "train": 16384, "epochs": 100, "seeds": 5},
        ],
    },
    minutes=480,
)
def accuracy_gain(width: int, depth: int, patch: int, train: int, epochs: int, seeds: int) -> Figure:
    """Points of accuracy that KAT gains on the ViT with GELU MLPs, both trained from scratch with the same rates and batches.

    A stand-in for ImageNet, where KAT-B has 82.3 %, DeiT-B 81.8 % and ViT-B 79.1 % (the paper's Table 5): tiles of photographs,
    told apart by the picture they come from. Of the paper's recipe there are AdamW at 1e-3 with weight decay 0.05, warm-up and cosine,
    label smoothing, random crops and mirroring; mixup, CutMix, RandAugment, random erasing, stochastic depth and averaged
    weights are left out. Both arms of a seed see the same tiles in the same order; the interval is Student's t over the seeds'
    differences, the held-out tiles staying the same. The details hold the released code's first weights too.
    """
    test = tiles(2000, held_out=True, seed=1_000_000)
    arms: dict[str, dict[str, Any]] = {"gelu": {}, "kat": {}, "kat, as released": {"variant": "as_released"}}
    accuracy: dict[str, list[float]] = {arm: [] for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    parameters = {}
    for seed in range(seeds):
        split = (*tiles(train, held_out=False, seed=seed), *test)
        for arm, options in arms.items():
            options = {**options, "img_size": TILE, "patch_size": patch, "num_classes": len(pictures())}
            model = model_of("gelu" if arm == "gelu" else "kat", width, depth, seed, **options)
            parameters[arm] = sum(p.numel() for p in model.parameters())
            run, begin = Training(model, split, seed, epochs), time.perf_counter()
            for _ in range(epochs):
                run.epoch()
            seconds[arm].append(time.perf_counter() - begin)
            accuracy[arm].append(100 * run.accuracy())
    gain, reach = paired(accuracy["kat"], accuracy["gelu"])
    mean = {arm: sum(values) / len(values) for arm, values in accuracy.items()}
    return Figure(
        value=gain,
        unit="points",
        low=gain - reach,
        high=gain + reach,
        quality=Quality(
            "accuracy on held-out tiles, %", mean["kat"], mean["gelu"], mean["kat"] - reach, mean["kat"] + reach
        ),
        details={
            "classes": len(pictures()),
            "accuracy": accuracy,
            "gain_as_released": paired(accuracy["kat, as released"], accuracy["gelu"]),
            "parameters": parameters,
            "training_seconds": seconds,
        },
    )


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean of the differences, and half its 95 % interval by Student's t. Raises ValueError for fewer than two pairs."""
    if len(ours) < 2:
        raise ValueError(f"seeds must be at least 2, got {len(ours)}")
    difference = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    error = float(difference.std()) / len(ours) ** 0.5
    return float(difference.mean()), student_t(0.95, len(ours) - 1) * error
