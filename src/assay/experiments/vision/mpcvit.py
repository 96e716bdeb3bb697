"""MPCViT: the latency of private inference, from counted rounds and bytes; and the accuracy that a search over heads keeps.

Latency is computed: seconds of the messages that two parties send for the paper's own network on a wide-area network, by
`methods.vision.mpcvit.cost`, whose counts are those of a simulator that evaluates networks on shares. It is no time that was taken: it
follows from sizes, protocol and network, all chosen beforehand. What the parties compute themselves is not in it.

Accuracy is measured: small networks on crops of twelve photographs, with the shares of ReLU softmax heads that the latencies are for.
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

from assay.experiments.core import Figure, Operator, experiment
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

LESS = "times less modelled latency than the baseline"
SPREAD, PACKED, ADDED = "in as many layers as there are", "in as few layers as can be", "added up head by head"

PAPER_SECONDS = {
    "CIFAR-10": {"softmax": 112.23, "relu_softmax": 71.82, "two_quad": 66.98, "scaling": 44.63, "0.1": 48.03, "0.3": 52.88},
    "Tiny-ImageNet": {"softmax": 1370.61, "relu_softmax": 1128.39, "two_quad": 903.57, "scaling": 121.57, "0.1": 220.69,
                      "0.3": 316.77},
}  # fmt: skip
"""What the authors measured, from the tables of the release and the programs of its figures. On Tiny-ImageNet their seconds for 0.1, 0.5
and 0.7 are sums by share of those of scaling and ReLU softmax; those for 0.3 are what such a sum gives for 0.2."""
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


def figure(found: Mapping[str, Shown], baseline: str, rival: str) -> Figure:
    """Points of accuracy of the searched network over the baseline, with those of the controls; and what each would take in private."""
    base, ours = found[baseline], found["searched"]
    gain, low, high = difference(ours.judged, base.judged)

    def over(arm: str) -> float:
        return difference(found[arm].judged, base.judged)[0]

    def less(arm: str, on: MPCCostModel = WAN) -> float:
        return float(np.mean(np.divide(base.seconds(on), found[arm].seconds(on))))

    # scaling attention is always cheaper; the others are where the heads of the search lie in many layers, or were not spared
    cheap = [kind for kind in UNIFORM if kind != baseline and less(kind) >= less("searched")]
    free = max(cheap, key=over)
    controls = {
        "deleted": "scaling",
        "random": "random",
        "rival": rival,
        "softmax, distilled alike": "softmax, distilled",
    }
    return Figure(
        gain,
        "points",
        low,
        high,
        baseline=0.0,
        free=over(free),
        controls={name: over(arm) for name, arm in controls.items()},
        arms={f"{kind} in all heads": over(kind) for kind in UNIFORM if kind != baseline},
        trained={name: shown.judged.trained for name, shown in found.items() if name != "random"},
        details={
            "free": free,
            LESS: {name: less(name) for name in found},
            f"{LESS}, on a local network": {name: less(name, LAN) for name in found},
            "accuracy": {name: (100 * shown.judged.right.mean(1)).tolist() for name, shown in found.items()},
            "heads with ReLU softmax": [[its.count("relu_softmax") for its in heads] for heads in ours.heads],
            "rounds and bytes": {name: [(t.rounds, t.bytes) for t in shown.traffic] for name, shown in found.items()},
            "points over random heads": difference(ours.judged, found["random"].judged),
            "points over scaling in all heads": difference(ours.judged, found["scaling"].judged),
        },
    )


def added_up(heads: Sequence[tuple[Kind, ...]], model: MPCViT, on: MPCCostModel) -> float:
    """The latency that the paper estimates by: a head costs its share of a layer in which all are of its kind, whatever the others are."""
    layers, width = len(heads), len(heads[0])
    alike = {kind: on.latency(model, heads=[(kind,) * width] * layers) for kind in KINDS}
    return sum(alike[kind] for its in heads for kind in its) / (layers * width)


def published(name: str, share: float, on: MPCCostModel = WAN) -> dict[str, float]:
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
        **{kind: on.latency(model, heads=[(kind,) * width] * layers) for kind in KINDS},
        SPREAD: on.latency(model, heads=spread),
        PACKED: on.latency(model, heads=packed),
        ADDED: added_up(packed, model, on),
    }


# ---------------------------------------------------------------------------------------------------------------------- claims

PRIVATE = Operator(
    "the private inference of a vision transformer by two parties",
    free="one kind in all heads alike, distilled: the most accurate that takes no more modelled time",
)
PAPER: dict[str, Any] = {"data": "Tiny-ImageNet", "net": "9 layers of 12 heads, 192 channels, 257 tokens"}
SECONDS = {
    "seconds": "modelled from counted rounds and bytes of a protocol with a dealer, at 40 ms and 44 MB/s; local work is left out",
    "heads": "spread over all layers, since what the paper's search chose is not published; packed into few layers, an arm",
}
TRAINING = {
    "data": "crops of twelve photographs, 48 pixels a side and grey: Tiny-ImageNet comes with no package",
    "net": "3 layers of 4 heads, 48 channels, 37 tokens",
    "steps": "100 of 48 crops to search and as many to train, for all arms alike",
    "augmentation": "mirror images only",
    "search": "alphas have a rate of their own, 0.05, no decay, and stay in [0, 1]",
    "drop": "no dropout in attention and no drop path; the paper's, 0.1 each, are for hundreds of epochs",
}
PAPERS_TRAINING = {
    **PAPER,
    "steps": "300 epochs to search, 600 to train",
    "augmentation": "mixup, cutmix, RandAugment, random erasing",
}


def latency(baseline: Kind, share: float) -> Figure:
    """Modelled seconds of the paper's network with heads all of one kind over those with a share of ReLU softmax heads, the rest scaling.

    A first head of a kind brings its layer all the rounds of that kind, so it counts in how many layers the kept heads lie. The paper adds
    latencies up head by head instead, an arm here; another is the paper's own seconds, added up so.
    """
    seconds, local = (published("Tiny-ImageNet", share, on) for on in (WAN, LAN))
    theirs = PAPER_SECONDS["Tiny-ImageNet"]
    added = theirs["scaling"] + share * (theirs["relu_softmax"] - theirs["scaling"])
    return Figure(
        seconds[baseline] / seconds[SPREAD],
        "x",
        baseline=1.0,
        free=seconds[baseline] / seconds["scaling"],
        arms={
            f"kept heads {PACKED}": seconds[baseline] / seconds[PACKED],
            ADDED: seconds[baseline] / seconds[ADDED],
            "on a local network": local[baseline] / local[SPREAD],
            f"the paper's own seconds, {ADDED}": theirs[baseline] / added,
        },
        details={
            "free": "scaling",
            "seconds": {name: published(name, share) for name in PUBLISHED},
            "seconds in the paper": PAPER_SECONDS,
        },
    )


COMPUTED = "the seconds follow from the network's sizes, the protocol and the line, all chosen beforehand"


@experiment(
    "mpcvit/latency-vs-vit",
    points={scale: [{"share": 0.1}] for scale in ("smoke", "small", "full")},
    operator=PRIVATE,
    paper={
        **PAPER,
        "share": 0.1,
        "seconds": "measured with a semi-honest protocol of two parties on a wide-area network",
    },
    departures=SECONDS,
    refuted_if="a network with a tenth of its heads ReLU softmax takes no less modelled time than the softmax network",
    measured_here="modelled seconds of counted rounds and bytes",
    computed=COMPUTED,
)
def latency_vs_vit(share: float) -> Figure:
    """See `latency`; the baseline is softmax in all heads."""
    return latency("softmax", share)


@experiment(
    "mpcvit/latency-vs-mpcformer",
    points={scale: [{"share": 0.3}] for scale in ("smoke", "small", "full")},
    operator=PRIVATE,
    paper={
        **PAPER,
        "share": 0.3,
        "seconds": "measured with a semi-honest protocol of two parties on a wide-area network",
    },
    departures={**SECONDS, "baseline": "2Quad as in the released code (A^2 over its sum), and the same GELU in both"},
    refuted_if="a network with three tenths of its heads ReLU softmax takes no less modelled time than 2Quad in all heads",
    measured_here="modelled seconds of counted rounds and bytes",
    computed=COMPUTED,
)
def latency_vs_mpcformer(share: float) -> Figure:
    """See `latency`; the baseline is 2Quad in all heads."""
    return latency("two_quad", share)


HERE = "points of accuracy on held-out crops of twelve photographs, small networks"


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


def refuted(record: Mapping[str, Any]) -> bool:
    """No more accurate for certain, or no cheaper."""
    return bool(record["measured"]["high"] < 0 or record["details"][LESS]["searched"] <= 1)


@experiment(
    "mpcvit/accuracy-vs-vit",
    points=points(0.1),
    operator=PRIVATE,
    paper={**PAPERS_TRAINING, "share": 0.1},
    departures=TRAINING,
    refuted_if="the whole interval of the gain lies below 0 points, or the searched network takes no less modelled time",
    refutes=refuted,
    measured_here=HERE,
    minutes=60,
)
def accuracy_vs_vit(share: float, steps: int, seeds: int) -> Figure:
    """Points of a network with a tenth of its heads ReLU softmax, the rest scaling attention, over the softmax network.

    The baseline is trained on labels, as in the paper, and teaches all others, which have as many steps. Controls: scaling attention in all
    heads (the search deleted), as many random heads in as many layers, 2Quad in all heads, and softmax that is distilled alike.
    """
    return figure(compared(share, steps, seeds_of(seeds)), "softmax", "two_quad")


@experiment(
    "mpcvit/accuracy-vs-mpcformer",
    points=points(0.3),
    operator=PRIVATE,
    paper={**PAPERS_TRAINING, "share": 0.3},
    departures={
        **TRAINING,
        "baseline": "2Quad as in the released code (A^2 over its sum), and the same GELU in all arms",
    },
    refuted_if="the whole interval of the gain lies below 0 points, or the searched network takes no less modelled time",
    refutes=refuted,
    measured_here=HERE,
    minutes=60,
)
def accuracy_vs_mpcformer(share: float, steps: int, seeds: int) -> Figure:
    """Points of a searched network, three tenths of whose heads are ReLU softmax, over 2Quad in all heads; both are distilled alike.

    Controls as in `accuracy_vs_vit`; the rival is ReLU softmax in all heads.
    """
    return figure(compared(share, steps, seeds_of(seeds)), "two_quad", "relu_softmax")
