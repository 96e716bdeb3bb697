"""MPCViT: the latency of private inference, from counted rounds and bytes, beside the accuracy of the networks that were counted.

Small networks on crops of twelve photographs. Latency is modelled: seconds of the messages that two parties send, on a wide-area network,
by `methods.vision.mpcvit.cost`, whose counts are those of a simulator that evaluates the network on shares. It is no time that was taken.
What the parties compute themselves is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.experiments.rates import Rate, chosen, searched
from assay.experiments.vision.training import (
    CHOICE_SEED,
    CLIP,
    DECAY,
    SEEDS,
    SIZE,
    Judged,
    batches,
    difference,
    error_for_choice,
    rate_share,
    right_by_photograph,
    train,
)
from assay.measure.stats import student_interval
from assay.methods.vision.mpcvit import (
    KINDS,
    LAMBDA,
    LAN,
    WAN,
    Kind,
    MPCCostModel,
    MPCViT,
    Traffic,
    clamp,
    distillation_loss,
    harden,
    kept_count,
    mixtures,
    penalty,
    select,
)
from assay.workloads.pictures import PICTURES

STUDENTS = ("softmax, distilled", "relu_softmax", "scaling", "two_quad", "searched", "random")
UNIFORM: tuple[Kind, ...] = ("relu_softmax", "scaling", "two_quad")
TEACHER, RATES = "mpcvit/teacher", "mpcvit/students"
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
PATCH, DEPTH, HEADS, WIDTH = 8, 3, 4, 48  # pixels a side of a patch; layers, heads of a layer, channels
STEPS, CHOICE_SHARE = 100, 0.3
ALPHA_RATE = 0.05  # how far AdamW moves an alpha in a step at first, so that it can cross [0, 1] in a search this short
MARGIN = 2.0  # points of accuracy

PAPER_SECONDS = {
    "CIFAR-10": {"softmax": 112.23, "relu_softmax": 71.82, "two_quad": 66.98, "scaling": 44.63, "0.1": 48.03, "0.3": 52.88},
    "Tiny-ImageNet": {"softmax": 1370.61, "relu_softmax": 1128.39, "two_quad": 903.57, "scaling": 121.57, "0.1": 220.69,
                      "0.3": 316.77},
}  # fmt: skip
"""What the authors measured, from the tables of the release and the programs of its figures."""
PUBLISHED: dict[str, dict[str, int]] = {
    "CIFAR-10": {"input_size": 32, "depth": 7, "num_heads": 4, "embed_dim": 256, "num_classes": 10},
    "Tiny-ImageNet": {"input_size": 64, "depth": 9, "num_heads": 12, "embed_dim": 192, "num_classes": 200},
}


# ------------------------------------------------------------------------------------------------------------------ the networks


def network(attention: Any = "search") -> MPCViT:
    """Three layers of four heads, 37 tokens, twelve classes."""
    return MPCViT(
        num_classes=len(PICTURES), in_chans=1, input_size=SIZE, patch_size=PATCH, depth=DEPTH, num_heads=HEADS, embed_dim=WIDTH,
        attention=attention, attn_drop_rate=0.0, drop_path_rate=0.0,
    )  # fmt: skip


def fit(
    model: MPCViT,
    loss: Callable[[MPCViT, Tensor, Tensor], Tensor],
    rate: float,
    steps: int,
    seed: int,
) -> MPCViT:
    """`training.train` with another loss: the same optimiser, schedule, batches, clipping. Alphas have a rate of their own and no decay."""
    alphas = [mixture.alpha for mixture in mixtures(model) if mixture.alpha is not None and mixture.alpha.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is alpha for alpha in alphas)]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate, "weight_decay": DECAY}]
    if alphas:
        groups.append({"params": alphas, "lr": ALPHA_RATE, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    stream = batches(seed, SIZE)
    model.train()
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        loss(model, images, labels).backward()
        nn.utils.clip_grad_norm_(others, CLIP)
        optimizer.step()
        schedule.step()
        clamp(model)
    return model.eval()


@cache
def teacher(seed: int, steps: int, rate: float) -> nn.Module:
    """The softmax network of a seed, trained on labels alone: the paper's baseline, and the teacher of everything else."""
    return train(lambda: network("softmax"), rate, steps, seed)


def student(heads: Sequence[tuple[Kind, ...]], seed: int, steps: int, rate: float, of: nn.Module) -> MPCViT:
    """A network whose heads are of these kinds, trained from the start with a teacher. The same first weights for all kinds."""
    torch.manual_seed(seed)
    model = network(heads)

    def loss(model: MPCViT, images: Tensor, labels: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        with torch.no_grad():
            theirs = of.forward_features(images)  # type: ignore[operator]
            logits = of.forward_head(theirs)  # type: ignore[operator]
        return distillation_loss(model.forward_head(tokens), tokens, logits, theirs, labels)

    return fit(model, loss, rate, steps, seed)


@cache
def search(seed: int, steps: int, rate: float) -> list[Tensor]:
    """The alphas of every layer after a search on labels, with the released code's weight of |alpha|."""
    torch.manual_seed(seed)

    def loss(model: MPCViT, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels) + LAMBDA * penalty(model)

    found = fit(network(), loss, rate, steps, seed)
    return [mixture.alpha.detach().clone() for mixture in mixtures(found) if mixture.alpha is not None]


def heads_of(arm: str, seed: int, steps: int, rate: float, share: float) -> list[tuple[Kind, ...]]:
    """The kind of every head of an arm, layer by layer. "random" has as many heads in as many layers as "searched", and costs the same."""
    if arm not in ("searched", "random"):
        return alike(cast(Kind, arm.split(",")[0]))
    picked = select(search(seed, steps, rate), share)
    if arm == "random":
        picked = shuffled(picked, seed)
    probe = network()
    harden(probe, picked)
    return [mixture.kinds or () for mixture in mixtures(probe)]


def alike(kind: Kind) -> list[tuple[Kind, ...]]:
    """All heads of one kind."""
    return [(kind,) * HEADS] * DEPTH


def shuffled(picked: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The same numbers of heads, in layers and at places drawn at random; never the same heads where there is another way."""
    generator = torch.Generator().manual_seed(seed)
    found = list(picked)
    for _ in range(20):
        layers = torch.randperm(len(picked), generator=generator).tolist()
        found = [picked[layer][torch.randperm(len(picked[layer]), generator=generator)] for layer in layers]
        if not all(torch.equal(a, b) for a, b in zip(found, picked, strict=True)):
            break
    return found


# --------------------------------------------------------------------------------------------------------------------- rates


@searched(TEACHER, arms=("softmax",), grid=GRID)
def teachers_rate(arm: str, rate: float) -> float:
    """The share of wrong crops of the part for choices."""
    return error_for_choice(lambda: network(arm), rate, STEPS)


@searched(RATES, arms=[arm for arm in STUDENTS if arm != "random"], grid=GRID)
def students_rate(arm: str, rate: float) -> float:
    """The same, distilled; where heads are searched, the search runs at the rate too."""
    of = teacher(CHOICE_SEED, STEPS, rate_of(TEACHER, "softmax").rate)
    heads = heads_of(arm, CHOICE_SEED, STEPS, rate, CHOICE_SHARE)
    model = student(heads, CHOICE_SEED, STEPS, rate, of)
    return 1 - float(np.mean(right_by_photograph(model, "choose")))


def rate_of(search_name: str, arm: str) -> Rate:
    """The rate that was found."""
    return chosen(search_name, arm)


# ------------------------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Shown:
    """An arm under every seed: how it was judged, its heads, and the traffic of one image."""

    judged: Judged
    heads: tuple[tuple[tuple[Kind, ...], ...], ...]
    traffic: tuple[Traffic, ...]

    def seconds(self, on: MPCCostModel = WAN) -> list[float]:
        return [on.seconds(traffic) for traffic in self.traffic]


def right(model: nn.Module) -> list[float]:
    """The share of held-out crops that are told right, for each photograph."""
    return right_by_photograph(model)


def traffic_of(heads: Sequence[tuple[Kind, ...]]) -> Traffic:
    """Rounds and bytes of the network with these heads, for one image."""
    return sum(WAN.network(network(), heads=heads).values(), Traffic())


def compared(share: float, steps: int, seeds: Sequence[int]) -> dict[str, Shown]:
    """Every arm, trained for as many steps under each seed; the teacher is "softmax". Random heads have the rate of searched ones."""
    rate = rate_of(TEACHER, "softmax")
    teachers = {seed: teacher(seed, steps, rate.rate) for seed in seeds}
    plain = tuple(alike("softmax"))
    found = {"softmax": Shown(
        Judged(np.array([right(teachers[seed]) for seed in seeds]), rate), (plain,) * len(seeds),
        (traffic_of(plain),) * len(seeds),
    )}  # fmt: skip
    for arm in STUDENTS:
        rate = rate_of(RATES, "searched" if arm == "random" else arm)
        heads = [tuple(heads_of(arm, seed, steps, rate_of(RATES, "searched").rate, share)) for seed in seeds]
        rights = [
            right(student(its, seed, steps, rate.rate, teachers[seed])) for its, seed in zip(heads, seeds, strict=True)
        ]
        found[arm] = Shown(Judged(np.array(rights), rate), tuple(heads), tuple(map(traffic_of, heads)))
    return found


def figure(found: Mapping[str, Shown], baseline: str, rival: str, share: float) -> Figure:
    """How many times less the searched network takes than the baseline's, with the accuracies of both and of the controls."""
    base, ours = found[baseline], found["searched"]

    def ratio(other: str, on: MPCCostModel = WAN) -> float:
        return float(np.mean(np.divide(base.seconds(on), found[other].seconds(on))))

    per_seed = student_interval(np.divide(base.seconds(), ours.seconds()))
    gap = difference(ours.judged, base.judged)
    level = base.judged.accuracy
    as_good = [kind for kind in UNIFORM if kind != baseline and found[kind].judged.accuracy >= level - MARGIN]
    free = max(as_good, key=ratio, default=None)
    controls = {"deleted": "scaling", "random": "random", "rival": rival, "ReLU softmax in all heads": "relu_softmax",
                "softmax, distilled alike": "softmax, distilled"}  # fmt: skip
    return Figure(
        per_seed.median,
        "x",
        per_seed.low,
        per_seed.high,
        baseline=1.0,
        free=None if free is None else ratio(free),
        arms={
            **{f"{kind} in all heads": ratio(kind) for kind in UNIFORM if kind != baseline},
            "on a local network": ratio("searched", LAN),
            "latency added up head by head, as the paper does": float(np.mean([
                added_up(base_heads) / added_up(our_heads)
                for base_heads, our_heads in zip(base.heads, ours.heads, strict=True)
            ])),
        },
        quality=Quality(
            level + gap[0], level, level + gap[1], level + gap[2],
            controls={name: found[arm].judged.accuracy for name, arm in controls.items()},
            rival=f"{rival} in all heads, distilled alike",
        ),
        trained={name: shown.judged.trained for name, shown in found.items() if name != "random"},
        details={
            "free": free or "no kind in all heads alike is as accurate",
            "accuracy": {name: (100 * shown.judged.right.mean(1)).tolist() for name, shown in found.items()},
            "heads with ReLU softmax": [[its.count("relu_softmax") for its in heads] for heads in ours.heads],
            "rounds and bytes": {name: [(t.rounds, t.bytes) for t in shown.traffic] for name, shown in found.items()},
            "seconds": {name: shown.seconds() for name, shown in found.items()},
            "points over random heads": difference(ours.judged, found["random"].judged),
            "points over scaling in all heads": difference(ours.judged, found["scaling"].judged),
            "the published networks": {name: published(name, share) for name in PUBLISHED},
            "seconds in the paper": PAPER_SECONDS,
        },
    )  # fmt: skip


def added_up(heads: Sequence[tuple[Kind, ...]], model: MPCViT | None = None) -> float:
    """The latency that the paper estimates by: a head costs its share of a layer in which all are of its kind, whatever the others are."""
    model = network() if model is None else model
    layers, width = len(heads), len(heads[0])
    alike = {kind: WAN.latency(model, heads=[(kind,) * width] * layers) for kind in KINDS}
    return sum(alike[kind] for its in heads for kind in its) / (layers * width)


def published(name: str, share: float) -> dict[str, float]:
    """Modelled seconds of a published network: heads all alike, and a share of ReLU softmax heads spread out, packed, or added up."""
    with torch.device("meta"):
        model = MPCViT(**PUBLISHED[name])  # type: ignore[arg-type]
    layers, width = PUBLISHED[name]["depth"], PUBLISHED[name]["num_heads"]
    kept = kept_count(layers * width, share)
    flat = torch.zeros(layers * width, dtype=torch.bool)
    flat[:kept] = True

    def heads(picked: Tensor) -> list[tuple[Kind, ...]]:
        return [tuple("relu_softmax" if relu else "scaling" for relu in its) for its in picked.tolist()]

    spread, packed = heads(flat.view(width, layers).T), heads(flat.view(layers, width))
    return {
        **{kind: WAN.latency(model, heads=[(kind,) * width] * layers) for kind in KINDS},
        f"{share:g}, in as many layers as there are": WAN.latency(model, heads=spread),
        f"{share:g}, in as few layers as can be": WAN.latency(model, heads=packed),
        f"{share:g}, added up": added_up(packed, model),
    }


# ---------------------------------------------------------------------------------------------------------------------- claims

PRIVATE = Operator(
    "the private inference of a vision transformer by two parties",
    free="ReLU softmax, 2Quad or scaling attention in all heads alike, distilled: the cheapest that is as accurate",
)
PAPER: dict[str, Any] = {
    "data": "Tiny-ImageNet",
    "net": "9 layers of 12 heads, 192 channels, 257 tokens",
    "steps": "300 epochs to search, 600 to train",
    "seconds": "measured with a semi-honest protocol of two parties on a wide-area network",
    "augmentation": "mixup, cutmix, RandAugment, random erasing",
}
DEPARTURES = {
    "data": "crops of twelve photographs, 48 pixels a side and grey: Tiny-ImageNet comes with no package",
    "net": "3 layers of 4 heads, 48 channels, 37 tokens; the modelled seconds of the published networks are in the details",
    "steps": "100 of 48 crops to search and as many to train, for all arms alike",
    "seconds": "modelled from counted rounds and bytes of a protocol with a dealer, at 40 ms and 44 MB/s; local work is left out",
    "augmentation": "mirror images only",
    "search": "alphas have a rate of their own, 0.05, no decay, and stay in [0, 1]",
}
HERE = "modelled seconds of counted rounds and bytes; accuracy on crops of twelve photographs"


def points(share: float) -> dict[str, list[dict[str, Any]]]:
    """The points of each scale."""
    return {
        "smoke": [{"share": share, "steps": 4, "seeds": 3}],
        "small": [{"share": share, "steps": STEPS, "seeds": 3}],
        "full": [{"share": share, "steps": 10 * STEPS, "seeds": 5}],
    }


def seeds_of(count: int) -> tuple[int, ...]:
    """The seeds that are judged."""
    return SEEDS[:count] if count <= len(SEEDS) else tuple(range(1, count + 1))


@experiment(
    "mpcvit/latency-vs-vit",
    points=points(0.1),
    operator=PRIVATE,
    paper={**PAPER, "share": 0.1},
    departures=DEPARTURES,
    guard=Guard("accuracy on held-out crops, per cent", MARGIN, higher_is_better=True, relative=False),
    refuted_if="the searched network takes no less modelled time than the softmax network",
    measured_here=HERE,
    minutes=60,
)
def latency_vs_vit(share: float, steps: int, seeds: int) -> Figure:
    """Modelled seconds of the softmax network over those of a network with a tenth of its heads ReLU softmax, the rest scaling attention.

    The baseline is trained on labels, as in the paper, and teaches all others, which have as many steps. The guard's margin is two points
    against it. Controls: scaling attention in all heads (the search deleted), as many random heads in as many layers, 2Quad in all heads.
    """
    return figure(compared(share, steps, seeds_of(seeds)), "softmax", "two_quad", share)


@experiment(
    "mpcvit/latency-vs-mpcformer",
    points=points(0.3),
    operator=PRIVATE,
    paper={**PAPER, "share": 0.3},
    departures={
        **DEPARTURES,
        "baseline": "2Quad as in the released code (A^2 over its sum), and the same GELU in all arms",
    },
    guard=Guard("accuracy on held-out crops, per cent", MARGIN, higher_is_better=True, relative=False),
    refuted_if="the searched network takes no less modelled time than the network with 2Quad in all heads",
    measured_here=HERE,
    minutes=60,
)
def latency_vs_mpcformer(share: float, steps: int, seeds: int) -> Figure:
    """Modelled seconds of a network with 2Quad in all heads over those of a searched one, three tenths of whose heads are ReLU softmax.

    Both are distilled alike. The guard's margin is two points. Controls as in `latency_vs_vit`; the rival is ReLU softmax in all heads.
    """
    return figure(compared(share, steps, seeds_of(seeds)), "two_quad", "relu_softmax", share)
