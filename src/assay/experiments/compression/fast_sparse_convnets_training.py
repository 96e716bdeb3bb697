"""Small MobileNets of six arms that are trained on tiles of photographs, and how they are run afterwards."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from assay.experiments.rates import searched
from assay.methods.compression.fast_sparse_convnets import (
    GradualPruner,
    MobileNet,
    SparseConv1x1,
    channels_first_,
    mobilenet_macs,
    sparsify_,
)
from assay.methods.core.layers.surgery import swap
from assay.methods.core.sparsity.masks import hold
from assay.methods.core.sparsity.projections import per_layer
from assay.methods.core.sparsity.schedules import Gradual, OneShot, Schedule
from assay.workloads.images import PHOTOGRAPHS, photograph

RATES = "fast_sparse_convnets/tiles"
RIVAL = "as many multiply-adds"
ARMS = ("dense", "pruned", "pruned at once", "random places", "groups", RIVAL)
GREY = ("brick", "camera", "cell", "clock", "coins", "grass", "gravel", "moon")  # scikit-image's own
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))
STEM = (32, 2)
TILE, CELL = 32, 56  # pixels a side of a tile, and of the cell it lies in
EDGE = 4  # pixels that stay free at the edge of a cell
PARTS = {"train": (0, 1, 2), "choose": (3,), "heldout": (4,)}  # of every five cells
JUDGED = 2000  # tiles
BATCH = 64

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tiles and labels to train on, tiles and labels to judge by."""


@cache
def pictures() -> tuple[Tensor, ...]:
    """The photographs in grey (height, width); the place in the list is the class."""
    colour = [photograph(name).mean(0) for name in PHOTOGRAPHS]  # says how to get scikit-image where it is missing
    from skimage import data

    return (*colour, *(torch.from_numpy(getattr(data, name)().copy()).float() / 255 for name in GREY))


def tiles(n: int, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """`n` tiles (n, 1, TILE, TILE) of mean 0 and deviation 1, half of them mirrored, and the picture each is from (n,).

    Tiles of two parts lie in different cells of the pictures and never share a pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(pictures()), (n,), generator=generator)
    found = []
    for label in labels.tolist():
        picture = pictures()[label]
        rows, columns = (side // CELL for side in picture.shape)
        cells = [(r, c) for r in range(rows) for c in range(columns) if (r + 2 * c) % 5 in PARTS[part]]
        row, column = cells[int(torch.randint(len(cells), (1,), generator=generator))]
        down, right = (EDGE + torch.randint(CELL - TILE - 2 * EDGE + 1, (2,), generator=generator)).tolist()
        top, left = CELL * row + down, CELL * column + right
        tile = picture[top : top + TILE, left : left + TILE]
        found.append(tile.flip(1) if float(torch.rand(1, generator=generator)) < 0.5 else tile)
    x = torch.stack(found)[:, None]
    return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.02), labels


@cache
def split(train: int, judged: str) -> Split:
    """Tiles to train on, and tiles of the part to be judged by."""
    return (*tiles(train, "train", 1), *tiles(JUDGED, judged, 2))


def floor(data: Split) -> float:
    """The accuracy of the trivial rule: the class whose average tile is the nearest; at least that of the commonest class."""
    x, labels, judged, wanted = data
    kinds = labels.unique()
    means = torch.stack([x[labels == kind].flatten(1).mean(0) for kind in kinds])
    found = kinds[torch.cdist(judged.flatten(1), means).argmin(1)]
    commonest = float(torch.bincount(wanted).max()) / len(wanted)
    return max(commonest, float((found == wanted).double().mean()))


class Trainer:
    """Trains the arms, all on the same tiles for as many steps; see `network_speedup` for what they are."""

    def __init__(self, width: float, narrow: float, sparsity: float, epochs: int, data: Split):
        self.width, self.narrow, self.sparsity, self.epochs, self.data = width, narrow, sparsity, epochs, data
        self.shape: dict[str, Any] = {"blocks": BLOCKS, "stem": STEM, "inputs": 1, "classes": len(pictures())}
        self.steps = epochs * math.ceil(len(data[0]) / BATCH)

    @property
    def density(self) -> float:
        """The share of pointwise weights that stays."""
        return round(1 - self.sparsity, 12)

    @property
    def equal(self) -> float:
        """The width of the dense network of as many multiply-adds as the pruned one: the least that is not below it."""
        wanted = mobilenet_macs(TILE, width=self.width, density=self.density, **self.shape)
        widths = [self.width * step / 100 for step in range(1, 101)]
        return next(w for w in widths if mobilenet_macs(TILE, width=w, **self.shape) >= wanted)

    def model(self, arm: str, seed: int) -> MobileNet:
        """An untrained network of one arm; arms of one width begin with the same weights."""
        torch.manual_seed(seed)
        widths = {"dense": self.narrow, RIVAL: self.equal}
        return MobileNet(width=widths.get(arm, self.width), **self.shape)

    def prune(self, arm: str, model: MobileNet, optimizer: torch.optim.Optimizer, seed: int) -> None:
        """Hang on the optimiser what makes and keeps the zeros of an arm, if it has any."""
        every, updates = max(1, self.steps // 40), max(1, min(20, self.steps // 2))
        schedules: dict[str, Schedule] = {
            "pruned": Gradual(self.sparsity, self.steps // 8, every, updates),
            "pruned at once": OneShot(self.sparsity, at=self.steps // 2),
        }
        if arm in schedules:
            GradualPruner(model, model.pointwise(), schedules[arm]).attach(optimizer)
        if arm in ("random places", "groups"):
            weights = {name: cast(nn.Conv2d, model.get_submodule(name)).weight for name in model.pointwise()}
            generator = torch.Generator().manual_seed(seed)
            scores = {
                name: torch.rand(weight.shape, generator=generator) if arm == "random places" else self.grouped(weight)
                for name, weight in weights.items()
            }
            masks = per_layer(scores, self.density)
            hold(optimizer, [(weights[name], mask) for name, mask in masks.items()])

    def grouped(self, weight: Tensor) -> Tensor:
        """1 where output and input lie in the same group of channels, of as many groups as one over the density."""
        outputs, inputs = weight.shape[:2]
        groups = max(1, round(1 / self.density))
        of_output, of_input = (torch.arange(size) * groups // size for size in (outputs, inputs))
        return (of_output[:, None] == of_input).float()[:, :, None, None]

    def run(self, arm: str, rate: float, seed: int) -> MobileNet:
        """A trained network in evaluation mode.

        AdamW, a tenth of the steps to warm up, then a cosine down to 0. Raises ValueError where the loss is not finite.
        """
        x, labels = self.data[:2]
        model = self.model(arm, seed)
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)

        def share(step: int) -> float:
            return min(1.0, 10 * (step + 1) / self.steps) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        self.prune(arm, model, optimizer, seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            for picks in torch.randperm(len(x), generator=generator).split(BATCH):
                loss = F.cross_entropy(model(x[picks]), labels[picks])
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"the loss of {arm} must be finite, got {float(loss)}")
                optimizer.zero_grad()
                torch.autograd.backward([loss])
                optimizer.step()
                schedule.step()
        return model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The share of the tiles to judge by that a network tells right."""
        judged, wanted = self.data[2:]
        right = torch.cat([model(part).argmax(1) for part in judged.split(500)]) == wanted
        return float(right.double().mean())


@searched(RATES, arms=ARMS, grid=(3e-3, 1e-2, 3e-2, 1e-1))
def rate_of(arm: str, rate: float) -> float:
    """The error on tiles of the cells kept for the choice, at the sizes of `small`."""
    trainer = Trainer(1.0, 0.5, 0.9, 5, split(2048, "choose"))
    return 1 - trainer.accuracy(trainer.run(arm, rate, 100))


# ---- what runs afterwards --------------------------------------------------------------------------------------------------------


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode in which every BatchNorm2d right after a convolution is folded into it."""
    model = copy.deepcopy(model).eval()
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential):
            continue
        for i in range(len(parent) - 1):
            conv, norm = parent[i], parent[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent[i], parent[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model


class CsrConv1x1(nn.Module):
    """A pointwise convolution by torch's CSR product with bias and clamp: what an expert writes with the pruned weights."""

    def __init__(self, layer: SparseConv1x1):
        super().__init__()
        self.csr, self.bias, self.low, self.high = layer.matrix.csr(), layer.bias, layer.low, layer.high

    def forward(self, x: Tensor) -> Tensor:
        batch, inputs, height, width = x.shape
        columns = x.transpose(0, 1).reshape(inputs, -1)
        y = self.csr @ columns
        if self.bias is not None:
            y.add_(self.bias[:, None])
        return y.clamp_(self.low, self.high).view(-1, batch, height, width).transpose(0, 1)


def sparse_network(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """A copy with sparse layers and our depthwise ones, the first norm folded; and the share of zeros of each sparse layer."""
    model = copy.deepcopy(model).eval()
    shares = sparsify_(model, least=0.5)
    channels_first_(model)
    return folded(model), shares


def torchs_depthwise(model: nn.Module) -> nn.Module:
    """A copy with sparse layers whose depthwise convolutions are torch's, norms folded."""
    model = copy.deepcopy(model).eval()
    sparsify_(model, least=0.5)
    return folded(model)


def our_depthwise(model: nn.Module) -> nn.Module:
    """A dense copy with our depthwise convolutions, norms folded."""
    model = copy.deepcopy(model).eval()
    channels_first_(model)
    return folded(model)


def csr_network(model: nn.Module) -> nn.Module:
    """Without anything of ours that runs: torch's CSR products in the place of the sparse layers."""
    model = torchs_depthwise(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseConv1x1)}
    swap(model, {name: CsrConv1x1(layer) for name, layer in layers.items()})
    return model
