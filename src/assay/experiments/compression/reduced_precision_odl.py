"""Training in 16-bit floats on a microcontroller: does it learn as well as in float32, and how much faster would a step be?

The first question is measured: real networks learn real digits (and a real language model real text) one sample at a time, with every
operation rounded as the device would. The second is modelled: no such chip is here.

Several seeds are trained in one network: the channels of a seed are groups of their own, so that no number of one reaches another, and
each output is summed by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.rates import Rate, chosen, searched
from assay.experiments.seeds import paired
from assay.methods.compression.reduced_precision_odl import (
    Microcontroller,
    NumericsPolicy,
    ReducedAdamW,
    ReducedSGD,
    StepCost,
    emulate,
    layer_shapes,
    training_memory,
    training_step,
)
from assay.methods.compression.reduced_precision_odl.numerics import Format
from assay.workloads.images import digits_split
from assay.workloads.models import load_model
from assay.workloads.text import calibration_windows, document_windows

Task = Literal["whole", "continual", "language"]
FIRST = 200  # the first seed that is judged: sizes and passes were settled on seeds from 0, rates are chosen on 100
CLASSES, NEW = 10, 8  # training begins with networks that know the digits below NEW
BLOCKS, WIDTH = 2, 32
LAST_BLOCK, HEAD = 4 * BLOCKS - 2, 4 * BLOCKS + 3  # where they begin in the network's list of modules
FORMATS: tuple[Format, ...] = ("float32", "float16")
LOW = 1e-3  # a rate at which bfloat16 is expected to stall
EXACT = NumericsPolicy("float32", accumulate="float32")


@dataclass(frozen=True)
class Arm:
    """How a network is trained: under a policy (None: by torch in float32), the last layer alone, along shuffled gradients, by AdamW."""

    policy: NumericsPolicy | None = None
    last_only: bool = False
    shuffled: bool = False
    adamw: bool = False


WHOLE, PAPER, LAST, RANDOM = "float32", "float16", "float16, last layer only", "float16, gradients shuffled"
DELETED = "not learning"
ARMS = {
    WHOLE: Arm(),
    PAPER: Arm(NumericsPolicy("float16")),
    LAST: Arm(NumericsPolicy("float16"), last_only=True),
    RANDOM: Arm(NumericsPolicy("float16"), shuffled=True),
    "float16, stochastic": Arm(NumericsPolicy("float16", update="stochastic")),
    "bfloat16": Arm(NumericsPolicy("bfloat16")),
    "bfloat16, stochastic": Arm(NumericsPolicy("bfloat16", update="stochastic")),
    "bfloat16, sums in float32": Arm(NumericsPolicy("bfloat16", accumulate="float32")),
    "bfloat16, float32 copy": Arm(NumericsPolicy("bfloat16", update="master")),
}
SPOKEN = {  # of the language model; AdamW as such models are tuned in bfloat16 today, products summed in float32
    WHOLE: Arm(),
    PAPER: Arm(NumericsPolicy("float16")),
    RANDOM: Arm(NumericsPolicy("float16"), shuffled=True),
    "float32, AdamW": Arm(adamw=True),
    "bfloat16, AdamW": Arm(NumericsPolicy("bfloat16", accumulate="float32"), adamw=True),
    "bfloat16, AdamW, stochastic": Arm(
        NumericsPolicy("bfloat16", accumulate="float32", update="stochastic"), adamw=True
    ),
}
ARMS_OF: dict[str, tuple[str, ...]] = {  # by the search that chose their rates
    "whole": tuple(ARMS),
    "continual": tuple(name for name in ARMS if name != LAST),
    "language": tuple(name for name, arm in SPOKEN.items() if not arm.adamw),
    "adamw": tuple(name for name, arm in SPOKEN.items() if arm.adamw),
}


@dataclass(frozen=True)
class Learned:
    """What a training came to: the accuracy of every seed on what was held out, their mean loss, and the share of updates lost."""

    scores: tuple[float, ...]
    loss: float
    stalled: float


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operators this small run fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ds_cnn(seeds: Sequence[int], width: int = WIDTH) -> nn.Sequential:
    """Depthwise-separable convolutions for pictures of 8 x 8, one network a seed beside the other: the shape of DS-CNN, without norms.

    Input (batch, seeds, 8, 8), output (batch, seeds * 10). Batch norms mean nothing for one sample and would be folded on a device.
    """
    n, generators = len(seeds), [torch.Generator().manual_seed(seed) for seed in seeds]
    modules: list[nn.Module] = [nn.Conv2d(n, n * width, 3, stride=2, padding=1, groups=n), nn.ReLU()]
    for _ in range(BLOCKS):
        modules += [nn.Conv2d(n * width, n * width, 3, padding=1, groups=n * width), nn.ReLU()]
        modules += [nn.Conv2d(n * width, n * width, 1, groups=n), nn.ReLU()]
    modules += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(n * width, n * CLASSES, 1, groups=n), nn.Flatten()]
    with torch.no_grad():
        for module in modules:
            if isinstance(module, nn.Conv2d):
                shape = (len(module.weight) // n, *module.weight.shape[1:])
                drawn = [torch.randn(shape, generator=generator) for generator in generators]
                module.weight.copy_(torch.cat(drawn) * (2 / module.weight[0].numel()) ** 0.5)
                assert module.bias is not None
                module.bias.zero_()
    return nn.Sequential(*modules)


Split = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels to learn, images and labels to judge


def _split(choosing: bool) -> Split:
    """The digits; a rate is chosen on a fifth of the training pictures, which are not learnt from then."""
    images, labels, questions, answers = digits_split(seed=1)  # sizes and passes were settled on the split of seed 0
    if choosing:
        cut = len(images) // 5
        return images[cut:], labels[cut:], images[:cut], labels[:cut]
    return images, labels, questions, answers


@cache
def _knows_eight(seeds: tuple[int, ...], choosing: bool) -> nn.Sequential:
    """Networks that know the digits 0 to 7: what training begins with. Copy before training."""
    images, labels, *_ = _split(choosing)
    images, labels = images[labels < NEW], labels[labels < NEW]
    model = ds_cnn(seeds)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for picks in torch.randperm(len(images), generator=generator).split(32):
            logits = model(images[picks].expand(-1, len(seeds), -1, -1)).unflatten(1, (-1, CLASSES)).flatten(0, 1)
            loss = F.cross_entropy(logits, labels[picks].repeat_interleave(len(seeds)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model


def _judged(model: nn.Module, split: Split, seeds: int) -> tuple[tuple[float, ...], float]:
    """The accuracy of every seed's network on the held-out digits, and their mean loss."""
    _, _, questions, answers = split
    with torch.no_grad():
        logits = model(questions.expand(-1, seeds, -1, -1)).float().unflatten(1, (seeds, CLASSES))
        right = (logits.argmax(-1) == answers[:, None]).double().mean(0)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.repeat_interleave(seeds))
    return tuple(right.tolist()), float(loss)


def _update(
    loss: Tensor, optimiser: ReducedSGD | ReducedAdamW, arm: Arm, generator: torch.Generator, seeds: int
) -> None:
    optimiser.zero_grad()
    (loss * optimiser.policy.loss_scale).backward()
    if arm.shuffled:  # within each seed's own weights
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                apart = parameter.grad.reshape(seeds, -1)
                order = torch.randperm(apart.shape[1], generator=generator)
                parameter.grad = apart[:, order].view_as(parameter)
    optimiser.step()


def learned(
    task: Task, name: str, rate: float, seeds: tuple[int, ...], samples: int, passes: int, *, choosing: bool = False
) -> Learned:
    """Teach the networks of all seeds the new digits, one picture at a time, each seed in its own order; the rate falls to zero."""
    arm, n = ARMS[name], len(seeds)
    images, labels, questions, answers = _split(choosing)
    model, first = copy.deepcopy(_knows_eight(seeds, choosing)), 0 if task == "whole" else LAST_BLOCK
    a_class = samples // CLASSES  # new digits, and old ones again, so that they are not forgotten
    kept = torch.cat([(labels == digit).nonzero()[:a_class, 0] for digit in range(CLASSES)])
    for layer in list(model)[: HEAD if arm.last_only else first]:
        layer.requires_grad_(False)
    if arm.policy is not None:
        emulate(model, arm.policy)
    generator = torch.Generator().manual_seed(seeds[0])
    own_order = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = ReducedSGD(learning, lr=rate, policy=arm.policy or EXACT, generator=generator)
    orders = [torch.cat([kept[torch.randperm(len(kept), generator=own)] for _ in range(passes)]) for own in own_order]
    for step, picks in enumerate(torch.stack(orders, 1)):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / len(orders[0]))
        logits = model(images[picks].transpose(0, 1)).float().view(n, CLASSES)
        _update(F.cross_entropy(logits, labels[picks], reduction="sum"), optimiser, arm, generator, n)
    scores, loss = _judged(model, (images, labels, questions, answers), n)
    return Learned(scores, loss, optimiser.stalled_share)


Captured = tuple[Tensor, Tensor, Tensor]  # what the MLP is given, what is added to its output, the ids


class Tail:
    """The end of a language model behind its last block's attention: the last MLP, which learns, the norm and the output layer.

    What stands before does not change, so that it is computed once for each text (`captured`).
    """

    def __init__(self, model: Any):
        self.model = model.requires_grad_(False)
        self.mlp: nn.Module = model.model.layers[-1].mlp

    def captured(self, texts: Tensor) -> list[Captured]:
        """What is wanted of each text, a row of ids."""
        seen: dict[str, Tensor] = {}

        def around(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            seen["given"], seen["out"] = given[0][0].clone(), out[0].clone()

        def behind(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen["sum"] = given[0][0].clone()

        handles = [self.mlp.register_forward_hook(around), self.model.model.norm.register_forward_pre_hook(behind)]
        found: list[Captured] = []
        try:
            for text in texts:
                with torch.no_grad():
                    self.model(text[None], logits_to_keep=1)
                found.append((seen["given"], seen["sum"] - seen["out"], text))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def logits(self, mlp: nn.Module, given: Tensor, rest: Tensor) -> Tensor:
        """Of every token but the first, whose id is known: (tokens - 1, vocabulary)."""
        return self.model.lm_head(self.model.model.norm((rest + mlp(given))[:-1]))

    def judged(self, mlp: nn.Module, texts: list[Captured]) -> tuple[float, float]:
        """The share of next tokens that are the likeliest one, and the mean loss."""
        with torch.no_grad():
            found = [(self.logits(mlp, given, rest), ids[1:]) for given, rest, ids in texts]
        logits, answers = torch.cat([one for one, _ in found]), torch.cat([ids for _, ids in found])
        return float((logits.argmax(-1) == answers).double().mean()), float(F.cross_entropy(logits, answers))


def spoken(tail: Tail, name: str, rate: float, texts: Sequence[list[Captured]], held_out: list[Captured]) -> Learned:
    """The last MLP of a language model learns one text at a time; each seed has texts of its own."""
    arm = SPOKEN[name]
    scores: list[float] = []
    losses: list[float] = []
    lost: list[float] = []
    for seed, own in enumerate(texts):
        mlp = copy.deepcopy(tail.mlp).requires_grad_(True)
        if arm.policy is not None:
            emulate(mlp, arm.policy)
        generator = torch.Generator().manual_seed(seed)
        make: type[ReducedSGD] | type[ReducedAdamW] = ReducedAdamW if arm.adamw else ReducedSGD
        optimiser = make(mlp.parameters(), lr=rate, policy=arm.policy or EXACT, weight_decay=0.0, generator=generator)
        for given, rest, ids in own:
            _update(F.cross_entropy(tail.logits(mlp, given, rest), ids[1:]), optimiser, arm, generator, 1)
        score, loss = tail.judged(mlp, held_out)
        scores.append(score)
        losses.append(loss)
        lost.append(optimiser.stalled_share)
    return Learned(tuple(scores), sum(losses) / len(losses), sum(lost) / len(lost))


SEARCHED = {"whole": (100,), "continual": (100,)}  # other seeds than those that are judged
SAMPLES = {"whole": (300, 2), "continual": (160, 3)}
WINDOW = 64


@searched("reduced_precision_odl/whole", arms=ARMS_OF["whole"], grid=(0.01, 0.03, 0.1))
def whole_rate(arm: str, rate: float) -> float:
    """The loss on digits kept for the choice."""
    with _one_thread():
        return learned("whole", arm, rate, SEARCHED["whole"], *SAMPLES["whole"], choosing=True).loss


@searched("reduced_precision_odl/continual", arms=ARMS_OF["continual"], grid=(0.01, 0.03, 0.1))
def continual_rate(arm: str, rate: float) -> float:
    """The loss on digits kept for the choice."""
    with _one_thread():
        return learned("continual", arm, rate, SEARCHED["continual"], *SAMPLES["continual"], choosing=True).loss


@searched("reduced_precision_odl/language", arms=ARMS_OF["language"], grid=(0.01, 0.03, 0.1))
def language_rate(arm: str, rate: float) -> float:
    """The loss on documents kept for the choice, after texts that the judged seeds do not see."""
    tail, texts, held_out = _searching()
    return spoken(tail, arm, rate, texts, held_out).loss


@searched("reduced_precision_odl/adamw", arms=ARMS_OF["adamw"], grid=(1e-4, 3e-4, 1e-3))
def adamw_rate(arm: str, rate: float) -> float:
    """The loss on documents kept for the choice, as `language_rate` has it."""
    return language_rate(arm, rate)


@cache
def _searching() -> tuple[Tail, list[list[Captured]], list[Captured]]:
    loaded = load_model("smollm2-135m")
    tail = Tail(loaded.model)
    texts = calibration_windows(loaded.tokenizer, window=WINDOW, n=80)[-4:]
    return tail, [tail.captured(texts)], tail.captured(document_windows(loaded.tokenizer, "search", window=WINDOW, n=8))


@experiment(
    "reduced_precision_odl/training-accuracy",
    points={
        "smoke": [{"task": "whole", "samples": 240, "passes": 1, "seeds": 3}],
        "small": [
            {"task": "whole", "samples": 300, "passes": 2, "seeds": 12},
            {"task": "continual", "samples": 160, "passes": 3, "seeds": 12},
        ],
        "full": [
            {"task": "whole", "samples": 1000, "passes": 5, "seeds": 10},
            {"task": "continual", "samples": 160, "passes": 10, "seeds": 10},
            {"task": "language", "samples": 15, "passes": 1, "seeds": 5},
        ],
    },
    decides={
        "small": {"task": "whole", "samples": 300, "passes": 2, "seeds": 12},
        "full": {"task": "whole", "samples": 1000, "passes": 5, "seeds": 10},
    },
    operator=Operator("learning from one sample at a time", free="the same in float32, by torch"),
    paper={
        "networks": "ResNet8 on pictures and DS-CNN on spoken words",
        "format": "float16",
        "sums": "float16",
        "update": "nearest",
        "batch": 1,
        "loss": "with exp approximated in 16 bits",
    },
    departures={
        "loss": "of the rounded logits in float32, and its gradient rounded",
        "networks": "a network of DS-CNN's shape, two blocks of 32 channels, on handwritten digits: neither data set is to be had offline",
    },
    tolerance=2.0,
    measured_here="accuracy on held-out digits, with the device's arithmetic emulated operation by operation",
    refuted_if="training in float16 throughout loses more than two points of accuracy against float32, each at its own best rate",
    minutes=60,
)
def training_accuracy(task: Task, samples: int, passes: int, seeds: int) -> Figure:
    """Points of accuracy that training in float16 throughout loses against float32; each arm at the rate found best for it.

    Two points may be lost (our choice): about 1.5 times the standard error that 450 held-out digits leave at 92 % right. The interval
    is over seeds, paired. Networks that know the digits 0 to 7 are taught 8 and 9, with a few samples of every digit, at a rate that
    falls to zero: "whole" trains all layers and decides, "continual" the last block alone. No network is trained from nothing: one
    sample at a time that takes more steps than an emulation has minutes for. "language" tunes the last MLP of SmolLM2-135M, real
    weights, on real text, `samples` windows a seed.

    Deleted: nothing is learnt. Random: gradients shuffled within each weight; it sees as many samples as the rest, at a rate of its
    own. "whole" has the last layer alone beside it, "language" AdamW, in float32 and in bfloat16 with sums in float32. Details have
    the share of updates that were lost, and what becomes of three arms at a rate of 0.001.
    """
    if task == "language":
        return _speaking(samples, passes, seeds)
    numbers = tuple(range(FIRST, FIRST + seeds))
    with _one_thread():
        rates = {name: chosen(f"reduced_precision_odl/{task}", name) for name in ARMS_OF[task]}
        runs = {name: learned(task, name, rate.rate, numbers, samples, passes) for name, rate in rates.items()}
        low = {
            name: learned(task, name, LOW, numbers, samples, passes)
            for name in (WHOLE, "bfloat16", "bfloat16, stochastic")
            if name in runs and seeds > 3
        }
        shapes = layer_shapes(ds_cnn((0,)), torch.zeros(1, 1, 8, 8))
        runs[DELETED] = Learned(*_judged(_knows_eight(numbers, False), _split(False), seeds), stalled=0.0)
    details: dict[str, Any] = {
        f"at a rate of {LOW}": {
            n: {"accuracy": _mean(run.scores), "updates lost": run.stalled} for n, run in low.items()
        },
        "modelled ms a step": {f: 1e3 * training_step(shapes, f).seconds for f in FORMATS},
        "bytes a step": {
            name: training_memory(shapes, ARMS[name].policy or EXACT).total
            for name in ARMS_OF[task]
            if not ARMS[name].shuffled and not ARMS[name].last_only
        },
    }
    answers = _split(False)[3]
    return _lost(runs, rates, float(answers.bincount().max() / len(answers)), "the most frequent digit", details)


def _speaking(samples: int, passes: int, seeds: int) -> Figure:
    loaded = load_model("smollm2-135m")
    tail = Tail(loaded.model)
    rows = tail.captured(calibration_windows(loaded.tokenizer, window=WINDOW, n=80)[: samples * seeds])
    held_out = tail.captured(document_windows(loaded.tokenizer, "proof", window=WINDOW, n=8))
    texts = [rows[samples * seed : samples * (seed + 1)] * passes for seed in range(seeds)]
    searches = {arm: "adamw" if SPOKEN[arm].adamw else "language" for arm in SPOKEN}
    rates = {arm: chosen(f"reduced_precision_odl/{search}", arm) for arm, search in searches.items()}
    runs = {arm: spoken(tail, arm, rates[arm].rate, texts, held_out) for arm in SPOKEN}
    before = tail.judged(tail.mlp, held_out)
    runs[DELETED] = Learned((before[0],) * seeds, before[1], 0.0)
    answers = torch.cat([ids[1:] for _, _, ids in held_out])
    details = {
        "loss": {arm: run.loss for arm, run in runs.items()},
        "weights": sum(parameter.numel() for parameter in tail.mlp.parameters()),
    }
    floor = float(answers.bincount().max() / len(answers))
    return _lost(runs, rates, floor, "the most frequent token", details)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _lost(
    runs: dict[str, Learned], rates: dict[str, Rate], floor: float, floor_name: str, details: dict[str, Any]
) -> Figure:
    """The points that each arm loses against float32; what was trained to be judged has its scores beside it.

    Training in float32 must beat the networks before they learn, or nothing was taught and nothing is compared. The other arms may
    fall below them: then they lose, which is what the claim is about.
    """
    points = {name: 100 * (_mean(runs[WHOLE].scores) - _mean(run.scores)) for name, run in runs.items()}
    seen = paired([100 * score for score in runs[WHOLE].scores], [100 * score for score in runs[PAPER].scores])
    judged = [name for name in runs if name not in (DELETED, RANDOM)]
    return Figure(
        value=seen.median,
        unit="points",
        low=seen.low,
        high=seen.high,
        controls={"deleted": points[DELETED], "random": points[RANDOM]},
        arms={name: points[name] for name in judged if name not in (WHOLE, PAPER)},
        trained={
            name: Trained(
                runs[name].scores,
                *((_mean(runs[DELETED].scores), "before learning") if name == WHOLE else (floor, floor_name)),
                rates[name].rate,
                rates[name].rates,
                higher_is_better=True,
            )
            for name in judged
        },
        details={
            "accuracy": {name: _mean(run.scores) for name, run in runs.items()},
            "share of updates lost": {name: run.stalled for name, run in runs.items()},
            **details,
        },
    )


# What a step would cost on the chip ----------------------------------------------------------------------------------------------


def resnet8() -> tuple[nn.Module, Tensor]:
    """ResNet8 of the MLPerf Tiny suite without norms, and a picture of its size."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
            self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
            self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.second(F.relu(self.first(x))) + self.short(x))

    stem = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*stem, Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), *head), torch.zeros(1, 3, 32, 32)


def keyword_net() -> tuple[nn.Module, Tensor]:
    """DS-CNN of the MLPerf Tiny suite without norms, and a second of sound as 49 x 10 coefficients."""
    modules: list[nn.Module] = [nn.Conv2d(1, 64, (10, 4), 2, (5, 1)), nn.ReLU()]
    for _ in range(4):
        modules += [nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU()]
    modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12)]
    return nn.Sequential(*modules), torch.zeros(1, 1, 49, 10)


NETS = {"resnet8": resnet8, "ds-cnn": keyword_net}
REPORTED = {"resnet8": 3.11, "ds-cnn": 0.81}  # MACs a cycle, by the paper


@experiment(
    "reduced_precision_odl/training-step",
    points={
        "smoke": [{"net": "resnet8"}],
        "small": [{"net": "resnet8"}, {"net": "ds-cnn"}],
        "full": [{"net": "resnet8"}, {"net": "ds-cnn"}],
    },
    decides={"small": {"net": "resnet8"}, "full": {"net": "resnet8"}},
    operator=Operator("a convolution's training step", free="the same in float32 on the same chip"),
    paper={"layer": "the convolution that gains most", "cores": 8, "format": "float16", "chip": "measured"},
    departures={
        "layer": "the best 3 x 3 one of ResNet8 by the model; which layer the 1.72 belongs to is not known here",
        "chip": "modelled: its instructions are counted",
    },
    computed="counted from the instructions of the kernels' inner loops, for eight cores that share four units; no such chip is here",
    measured_here="modelled cycles in float32 over those in float16, of the 3 x 3 convolution that gains most",
    refuted_if="no 3 x 3 convolution of ResNet8 needs fewer cycles in float16 than in float32",
)
def training_step_gain(net: str) -> Figure:
    """How much faster a convolution's training step would be in float16: the best 3 x 3 layer of a network, the paper's "up to".

    Nothing is fitted to the paper's numbers for the value. The details hold the paper's MACs a cycle beside the model's; the
    share of the modelled speed that its ResNet8 reached is taken for the efficiency of the chip, and the other network is then
    predicted with it: how far that is off tells what the model is worth.
    """
    steps = {name: _steps(name) for name in NETS}
    wide, narrow = steps[net]["float32"], steps[net]["float16"]
    gains = {name: wide.layers[name] / narrow.layers[name] for name in wide.layers}
    model, x = NETS[net]()
    shapes = layer_shapes(model, x)
    best = max(gains[shape.name] for shape in shapes if shape.kernel == 9)
    modelled = {name: steps[name]["float16"].macs_a_cycle for name in NETS}
    efficiency = REPORTED["resnet8"] / modelled["resnet8"]
    chip = Microcontroller(efficiency=min(1.0, efficiency))
    return Figure(
        value=best,
        unit="x",
        arms={"the whole network": wide.cycles / narrow.cycles},
        details={
            "gain by layer": gains,
            "MACs a step": narrow.macs,
            "MACs a cycle": {"modelled": modelled, "by the paper": REPORTED},
            "efficiency that ResNet8 reached": efficiency,
            "DS-CNN with that efficiency, MACs a cycle": modelled["ds-cnn"] * chip.efficiency,
            "ms a step with that efficiency, at an assumed clock": {
                name: 1e3 * steps[name]["float16"].seconds / chip.efficiency for name in NETS
            },
            "bytes a step": {f: training_memory(shapes, NumericsPolicy(f)).total for f in FORMATS},
        },
    )


def _steps(net: str) -> dict[str, StepCost]:
    model, x = NETS[net]()
    shapes = layer_shapes(model, x)
    return {f: training_step(shapes, f) for f in FORMATS}
