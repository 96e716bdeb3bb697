"""The digits that the experiments on efficient networks train on and judge by, and how small networks are trained on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.workloads.images import digits_split

Data = tuple[Tensor, Tensor]

PARTS = {"weights": slice(0, 800), "theta": slice(800, 1000), "choose": slice(1000, None)}
"""Of the digits for training: for weights and theta 80 and 20 %, as in the paper, and the rest for choosing learning rates."""


@cache
def digits_of(part: str) -> Data:
    """The digits of a part of `PARTS`, or of "test": images (n, 1, 8, 8), labels (n,)."""
    images, labels, test_images, test_labels = digits_split(seed=0)
    if part == "test":
        return test_images, test_labels
    return images[PARTS[part]], labels[PARTS[part]]


def batches(data: Data, batch: int, generator: torch.Generator) -> Iterator[Data]:
    """One pass over the data in a random order, without a last batch that is smaller."""
    images, labels = data
    order = torch.randperm(len(images), generator=generator)
    for picks in order[: len(order) // batch * batch].split(batch):
        yield images[picks], labels[picks]


def train(net: nn.Module, data: Data, rate: float, epochs: int, seed: int, batch: int = 64) -> int:
    """SGD with momentum 0.9, the rate falling to 0 on half a cosine; returns the number of images passed.

    Raises ValueError for a loss that is not finite.
    """
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(data[0]) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for images, labels in batches(data, batch, generator):
            loss = F.cross_entropy(net(images), labels)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"the loss is not finite at rate {rate:g}")
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
            schedule.step()
    return steps * batch


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    """What the network says in inference, (n, classes)."""
    net.eval()
    return torch.cat([net(part) for part in images.split(256)])


def forward(net: Any, images: Tensor) -> Tensor:
    """One pass in inference: what is timed."""
    with torch.inference_mode():
        out: Tensor = net(images)
    return out


def accuracy(net: nn.Module, data: Data) -> float:
    """The share of the images that are told right."""
    return float((logits_of(net, data[0]).argmax(1) == data[1]).double().mean())


def nearest_mean(data: Data, test: Data) -> float:
    """The accuracy of the trivial rule: the class whose average image is the nearest."""
    (images, labels), (unseen, wanted) = data, test
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in labels.unique()])
    found = labels.unique()[torch.cdist(unseen.flatten(1), means).argmin(1)]
    return float((found == wanted).double().mean())
