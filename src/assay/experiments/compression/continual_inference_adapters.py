"""Structured pruning adapters: what a task stores, and how well a pruned network learns another task with them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.compression.continual_inference_nets import resnet50_layers
from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.mixers.training import over_seeds, train
from assay.experiments.rates import chosen, searched
from assay.methods.compression.continual_inference import SPLoRA, adapt, prune_chain, pruned
from assay.methods.core.sparsity.projections import top
from assay.methods.core.sparsity.scores import grouped, magnitude
from assay.workloads.images import digits_split

ADAPTING = Operator("learning another task on a pruned network", free="training the weights that pruning leaves")
SEARCH = "continual_inference/adapters"
ARMS = ("SPLoRA", "fine-tuning", "biases only", "random channels", "fewer channels")
SEEDS, CHOICE_SEED, CLASSES = (0, 1, 2), 100, 10
LESSONS: dict[str, dict[str, int]] = {
    # hidden channels, those kept, those of the rival with as many learned numbers as SPLoRA, its rank; steps of both trainings;
    # pictures of each class of the other task: with a thousand in all every arm reads nearly all digits, and nothing can be gained
    "tiny": {
        "hidden": 64,
        "keep": 20,
        "fewer": 8,
        "rank": 4,
        "first_steps": 150,
        "steps": 80,
        "batch": 32,
        "pictures": 10,
    },
    "digits": {
        "hidden": 256,
        "keep": 62,
        "fewer": 36,
        "rank": 12,
        "first_steps": 600,
        "steps": 400,
        "batch": 32,
        "pictures": 10,
    },
}
FIRST_RATE = 3e-3  # of the network that is there before; the same for all arms


def batches(x: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in an order fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for picked in torch.randperm(len(x), generator=generator).split(size):
            yield x[picked], labels[picked]


def classified(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a classifier."""
    return F.cross_entropy(model(x), y)


def task(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits for training and for judging; a fifth of the training pictures judge the choice of a rate and are used for nothing else."""
    images, labels, questions, answers = digits_split(seed=0)
    cut = len(images) // 5
    if seed == CHOICE_SEED:
        questions, answers = images[:cut], labels[:cut]
    return images[cut:], labels[cut:], questions, answers


def few(labels: Tensor, count: int, seed: int) -> Tensor:
    """Where `count` random pictures of each class are."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == number][:count] for number in range(CLASSES)])


@functools.cache
def first_network(seed: int, lesson: str) -> nn.Sequential:
    """The big network: a perceptron of two hidden layers that reads upright digits."""
    sizes = LESSONS[lesson]
    hidden = sizes["hidden"]
    images, labels, _, _ = task(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )
    pixels = batches(images.flatten(1), labels, sizes["batch"], seed)
    train(model, pixels, steps=sizes["first_steps"], lr=FIRST_RATE, weight_decay=0.0, loss=classified)
    return model.eval()


def kept_channels(model: nn.Sequential, keep: int, seed: int | None = None) -> list[Tensor]:
    """A mask of the hidden channels of each layer: those with the largest weights, or with `seed` random ones."""
    masks = []
    for layer in [part for part in model if isinstance(part, nn.Linear)][:-1]:
        scores = grouped(magnitude(layer.weight), 0)
        if seed is not None:
            scores = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed))
        masks.append(top(scores, keep))
    return masks


def pruned_arm(model: nn.Sequential, arm: str, seed: int, lesson: str) -> nn.Sequential:
    """The big network, pruned, in the form in which an arm trains it."""
    sizes = LESSONS[lesson]
    keep = sizes["fewer"] if arm == "fewer channels" else sizes["keep"]
    masks = kept_channels(model, keep, seed if arm == "random channels" else None)
    torch.manual_seed(seed)
    adapted = adapt(copy.deepcopy(model), sizes["rank"])
    prune_chain(adapted, masks)
    if arm in ("SPLoRA", "random channels"):
        return adapted
    for part in adapted:
        if isinstance(part, SPLoRA):
            nn.init.zeros_(part.up)
            part.up.requires_grad_(False)
            part.down.requires_grad_(False)
    return adapted if arm == "biases only" else pruned(adapted)


def learned(arm: str, rate: float, seed: int, lesson: str) -> dict[str, float]:
    """Train an arm on a few digits turned by a quarter: how many of the held-out ones does it name?"""
    sizes = LESSONS[lesson]
    images, labels, questions, answers = task(seed)
    picked = few(labels, sizes["pictures"], seed)
    turned, asked = (x.rot90(1, (2, 3)).flatten(1) for x in (images[picked], questions))
    model = pruned_arm(first_network(seed, lesson), arm, seed, lesson)
    drawn = batches(turned, labels[picked], sizes["batch"], seed)
    train(model, drawn, steps=sizes["steps"], lr=rate, weight_decay=0.0, loss=classified)
    model.eval()
    parts = [part for part in model if isinstance(part, SPLoRA)]
    if arm == "biases only":
        counted = sum(int(part.output_mask.sum()) for part in parts)
    else:
        counted = sum(part.learned for part in parts) or sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        return {
            "accuracy": float((model(asked).argmax(-1) == answers).double().mean()),
            "loss": float(classified(model, asked, answers)),
            "majority": float(answers.bincount().max() / len(answers)),
            "held_out": float(len(answers)),
            "learned": float(counted),
        }


@searched(SEARCH, arms=list(ARMS), grid=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def adapters_loss(arm: str, rate: float) -> float:
    """Nats a picture on pictures that nothing else uses."""
    loss = learned(arm, rate, CHOICE_SEED, "digits")["loss"]
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: the learning rate ({rate}) may be too high")
    return loss


def not_above_the_rival(record: Any) -> bool:
    """Whether SPLoRA is certainly less accurate than fine-tuning, or than fine-tuning as many numbers as it learns."""
    return bool(record["measured"]["high"] < max(0.0, record["controls"]["rival"]))


@experiment(
    "continual_inference/splora-parameters",
    points={
        "smoke": [{"layers": 12, "pruned": 0.7, "rank": 16}],
        "small": [{"layers": 54, "pruned": 0.7, "rank": 16}],
        "full": [{"layers": 54, "pruned": 0.7, "rank": 16}],
    },
    operator=ADAPTING,
    paper={"layers": 54, "pruned": 0.7, "channels": "those that four criteria choose, layer by layer more or fewer"},
    departures={
        "channels": "the same share of every layer's, whichever they are: the count is a matter of how many stay"
    },
    refuted_if="a task's adapters hold as many numbers as the weights that are left",
    computed="both counts follow from the layers' sizes and the rank; that accuracy keeps up is not shown by them",
)
def splora_parameters(layers: int, pruned: float, rank: int) -> Figure:
    """The weights that pruning leaves in ResNet-50 over the numbers that SPLoRA's adapters store for a task.

    Layers are counted one by one with the adapter itself, the classifier with CIFAR-10's ten classes; the norms count for neither.
    Rank 16 is the released library's default; other ranks are arms.
    """
    left, stored, whole = 0, dict.fromkeys((rank, rank // 2, 2 * rank), 0), 0
    share = math.sqrt(1 - pruned)  # of the channels, on both sides of a layer
    shapes = resnet50_layers(CLASSES)[:layers]
    for i, (inputs, outputs, kernel) in enumerate(shapes):
        layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2, bias=i == len(shapes) - 1)
        masks = [torch.arange(count) < round(share * count) for count in (inputs, outputs)]
        if i == 0:
            masks[0][:] = True  # colours
        if i == len(shapes) - 1:
            masks[1][:] = True  # classes
        for size in stored:
            adapter = SPLoRA(layer, size)
            adapter.prune(inputs=masks[0], outputs=masks[1])
            stored[size] += adapter.learned
        whole += layer.weight.numel()
        left += sum(p.numel() for p in adapter.pruned_layer().parameters())
    return Figure(
        left / stored[rank],
        "x",
        arms={f"rank {size}": left / count for size, count in stored.items() if size != rank},
        details={
            "weights": whole,
            "left_by_pruning": left,
            "stored": {f"rank {size}": count for size, count in stored.items()},
        },
    )


@experiment(
    "continual_inference/splora-accuracy",
    points={
        "smoke": [{"lesson": "tiny"}],
        "small": [{"lesson": "digits"}],
        "full": [{"lesson": "digits"}],
    },
    operator=ADAPTING,
    paper={
        "lesson": "CIFAR-10, Oxford Flowers, Cats and Dogs",
        "net": "ResNet-50",
        "pruned": 0.9,
        "rank": 32,
        "pruning": "on the way, by four criteria",
    },
    departures={
        "lesson": "ten pictures a class, as of Oxford Flowers, of digits turned by a quarter, on a network trained on a thousand "
        "upright ones: ImageNet's weights are not to be had offline, and less of what such a network knows is of use here",
        "net": "a perceptron with two hidden layers of 256, of which 62 stay: 90 % of the weights go",
        "rank": "12, which learns half as many numbers as fine-tuning, as in the paper",
        "pruning": "once, before the training, by magnitude alone, of SPLoRA and of fine-tuning alike",
    },
    measured_here="accuracy on turned digits, three seeds",
    refuted_if="SPLoRA is less accurate than fine-tuning, or than fine-tuning fewer channels with as many learned numbers",
    refutes=not_above_the_rival,
)
def splora_accuracy(lesson: str) -> Figure:
    """Accuracy with SPLoRA less that with fine-tuning, in points, on the same channels, after as many steps at each one's best rate.

    Controls are differences from fine-tuning too: "deleted" trains the biases alone, "random" keeps random channels, the rival
    fine-tunes fewer channels, with as many learned numbers as SPLoRA (and less to compute). The interval is Student's t over the
    seeds, each with pictures, an order and a big network of its own. "deleted" need not beat the most frequent class: biases
    alone may well learn nothing.
    """
    found = {arm: [learned(arm, chosen(SEARCH, arm).rate, seed, lesson) for seed in SEEDS] for arm in ARMS}
    fine = [score["accuracy"] for score in found["fine-tuning"]]
    held_out = found["fine-tuning"][0]["held_out"]

    def differences(arm: str) -> list[float]:
        return [100 * (score["accuracy"] - other) for score, other in zip(found[arm], fine, strict=True)]

    def mean(arm: str) -> float:
        return sum(differences(arm)) / len(SEEDS)

    gain = over_seeds(differences("SPLoRA"), resolution=100 / held_out)
    return Figure(
        gain.median,
        "points",
        gain.low,
        gain.high,
        controls={"deleted": mean("biases only"), "random": mean("random channels"), "rival": mean("fewer channels")},
        trained={
            arm: Trained(
                [score["accuracy"] for score in found[arm]],
                found[arm][0]["majority"],
                "the most frequent class",
                chosen(SEARCH, arm).rate,
                chosen(SEARCH, arm).rates,
                higher_is_better=True,
            )
            for arm in ARMS
            if arm != "biases only"
        },
        details={
            "learned_numbers": {arm: found[arm][0]["learned"] for arm in ARMS},
            "accuracy": {arm: [score["accuracy"] for score in found[arm]] for arm in ARMS},
            "lesson": LESSONS[lesson],
        },
    )
