"""What ParScale's experiments train: one stream in three sizes and for more steps, streams, and streams with a part replaced.

All are byte-level models on the same text in the same order, each at the learning rate that suits it best. Parameters are counted
as the paper counts them, without embedding and head and with what streams add to a model (prefixes as they are after training, and
the aggregator). At these sizes that is a tenth and more of the model, where the paper adds 0.2 % a stream: so the streams are held
against one stream of as many parameters as they have with it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Trained
from assay.experiments.inference import language
from assay.experiments.mixers.training import in_parallel, token_loss
from assay.experiments.rates import Rate, chosen, searched
from assay.measure.cost import counting
from assay.measure.stats import Interval, student_t
from assay.methods.inference.parscale import ParScaleForCausalLM
from assay.methods.inference.parscale import model as model_module
from assay.methods.inference.parscale import streams as streams_module
from assay.methods.inference.parscale.cost import Shape, added_parameters
from assay.methods.inference.parscale.published import PREFIX_TOKENS, REPORTED
from assay.workloads.sequences import byte_batches

SEEDS = (0, 1, 2, 3)
CHOOSING = 100  # the seed under which learning rates are chosen: none of those that are judged
BATCH = 8
WINDOWS = 128  # of held-out text
PAPER_K = REPORTED["stack"]["k"]
SEARCH = "parscale/loss"
GRID = (4e-3, 8e-3, 1.6e-2, 3.2e-2)

STREAMS = ("streams", "random prefixes", "identical prefixes", "even weights")
ARMS = ("streams", "random prefixes", "more steps", "identical prefixes", "larger", "as many parameters", "one stream")
"""The dearest come first, so that processes that share them end together."""
SIZES = ("one stream", "as many parameters", "larger")

Task = Mapping[str, int]
SMALL: dict[str, int] = {"width": 32, "layers": 3, "length": 64, "steps": 320, "streams": 4, "prefix": 4}
SMOKE = {"width": 16, "layers": 1, "length": 32, "steps": 60, "streams": 2, "prefix": 4}
FULL = {"width": 64, "layers": 6, "length": 128, "steps": 1000, "streams": 8, "prefix": 4}


# ------------------------------------------------------------------------------------------------------------------------ sizes


def equal_loss(shape: Shape, streams: int, *, k: float = PAPER_K, prefix: int = PREFIX_TOKENS) -> float:
    """How many times the parameters of `shape` one stream needs for the loss of its `streams`: (k ln P + 1) times all that they have.

    The law's N holds prefixes and aggregator too, as the paper's own table does.
    """
    return (k * math.log(streams) + 1) * (1 + added_parameters(shape, streams, prefix) / shape.body)


def shape_of(task: Task) -> Shape:
    """The sizes of the model that the streams share."""
    with torch.device("meta"):
        return Shape.of(language.small_llama(width=task["width"], layers=task["layers"]).config)


def wanted_parameters(arm: str, task: Task) -> float:
    """The parameters without embedding and head that an arm of one stream is to have."""
    shape = shape_of(task)
    if arm == "as many parameters":
        return shape.body + added_parameters(shape, task["streams"], task["prefix"])
    if arm == "larger":
        return shape.body * equal_loss(shape, task["streams"], prefix=task["prefix"])
    return shape.body


def sizes_for(parameters: float, layers: int) -> dict[str, int]:
    """Width and inner width of a Llama with four heads and about so many parameters in its layers, its MLP about 8 / 3 as wide.

    >>> sizes_for(150976, 3)
    {'width': 64, 'intermediate_size': 176}
    """
    found = []
    for width in range(16, 2049, 8):  # rotary heads have an even width
        rest = parameters - width - layers * (4 * width**2 + 2 * width)
        inner = round(rest / (3 * layers * width))
        if inner > 0:
            found.append((abs(math.log(inner / width * 3 / 8)), width, inner))
    _, width, inner = min(found)
    return {"width": width, "intermediate_size": inner}


def parameters_of(arm: str, task: Task) -> float:
    """Parameters without embedding and head of an arm of one stream, counted."""
    with torch.device("meta"):
        return Shape.of(new_model(arm, task, 0).config).body


# ------------------------------------------------------------------------------------------------------------------------- arms


class SamePrefixes(nn.Module):
    """Prefixes of which all streams have the first: the method deleted, since equal streams are one stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return [(keys[:1].expand_as(keys), values[:1].expand_as(values)) for keys, values in self.inner()]


def new_model(arm: str, task: Task, seed: int) -> Any:
    """An untrained model of one arm.

    - "one stream" of the given width, "as many parameters" as the streams have with all they add, and "larger", of which the paper's
      law says that it reaches the streams' loss; "more steps" is "one stream" before it is trained for longer.
    - "streams", their prefixes reparameterised, as the paper trains them; "random prefixes": drawn and left as they are, all else
      trained; "identical prefixes": every stream has the same, trained; "even weights": a plain mean in the aggregator's place.
    """
    sizes = {"width": task["width"]}
    if arm in ("as many parameters", "larger"):
        sizes = sizes_for(wanted_parameters(arm, task), task["layers"])
    base = language.small_llama(layers=task["layers"], seed=seed, **sizes)
    if arm not in STREAMS:
        return base
    same = arm == "identical prefixes"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ParScaleForCausalLM.from_base(
            base,
            parscale_n=2 if same else task["streams"],  # equal streams compute the same however many they are
            parscale_n_tokens=task["prefix"],
            parscale_attn_smooth=1.0 if arm == "even weights" else 0.1,
            parscale_prefix_hidden=task["width"],
        )
    if same:
        made.prefixes = SamePrefixes(made.prefixes)
    if arm == "random prefixes":
        made.prefixes.requires_grad_(False)
    return made


def steps_of(arm: str, task: Task) -> int:
    """Steps of training: the task's, or for "more steps" as many as take the operations of the streams' training."""
    if arm != "more steps":
        return task["steps"]
    return round(task["steps"] * training_macs("streams", task) / training_macs(arm, task))


def training_macs(arm: str, task: Task) -> int:
    """MACs of one training step, forward and backward, counted as it runs."""
    return _training_macs(arm, tuple(sorted(task.items())))


@cache
def _training_macs(arm: str, sizes: tuple[tuple[str, int], ...]) -> int:
    task = dict(sizes)
    model = new_model(arm, task, 0)
    inputs, targets = next(iter(byte_batches(task["length"], BATCH, seed=0)))
    with counting(model) as counter:
        token_loss(model, inputs, targets).backward()
    cost = counter.cost()
    if cost.uncounted:
        raise ValueError(f"operators must all be counted, got {cost.uncounted}")
    return cost.macs


def trained_model(arm: str, task: Task, seed: int, rate: float) -> Any:
    """The model of an arm, trained, or found where trained models are kept."""
    return language.trained(
        {"arm": arm, "task": dict(task), "seed": seed, "batch": BATCH},
        lambda: new_model(arm, task, seed),
        lambda: byte_batches(task["length"], BATCH, seed=seed),
        steps=steps_of(arm, task),
        rate=rate,
        sources=[model_module, streams_module, sys.modules[__name__]],
    )


# ------------------------------------------------------------------------------------------------------------------------ rates


@searched(SEARCH, arms=ARMS, grid=GRID)
def small_loss(arm: str, rate: float) -> float:
    """Nats a byte on documents kept for the choice, at the sizes and for the steps of `small`."""
    torch.set_num_threads(1)
    return validation_loss(arm, SMALL, rate)


def validation_loss(arm: str, task: Task, rate: float) -> float:
    """Nats a byte on documents kept for the choice, after training under a seed kept for it."""
    inputs, targets = language.validation(task["length"], WINDOWS)
    return float(language.nll(trained_model(arm, task, CHOOSING, rate), inputs, targets).mean())


def _tried(arm: str, task: Task, rate: float) -> float:
    try:
        return validation_loss(arm, task, rate)
    except ValueError:  # the trainer says so when a loss is not finite
        return math.inf


def rates_of(arms: Sequence[str], task: Task) -> dict[str, Rate]:
    """The learning rate of each arm: at the sizes of `full` searched on the spot, otherwise the one of `small` that is checked in.

    At `smoke` all have that of one stream: so few steps by rates of their own would not even tell larger models from small ones.
    """
    if dict(task) != FULL:
        return {arm: chosen(SEARCH, "one stream" if dict(task) == SMOKE else arm) for arm in arms}
    runs = [(arm, dict(task), rate) for arm in arms for rate in GRID]
    losses = dict(zip([(arm, rate) for arm, _, rate in runs], in_parallel(_tried, runs), strict=True))
    return {arm: Rate(min(GRID, key=lambda rate: losses[arm, rate]), GRID) for arm in arms}


# ----------------------------------------------------------------------------------------------------------------------- losses


def arm_loss(arm: str, task: Task, seed: int, rate: float) -> float:
    """One training: nats a byte on held-out text."""
    torch.set_num_threads(1)
    inputs, targets = language.heldout(task["length"], WINDOWS)
    return float(language.nll(trained_model(arm, task, seed, rate), inputs, targets).mean())


def losses_of(rates: Mapping[str, Rate], task: Task) -> dict[str, list[float]]:
    """`arm_loss` of each arm that has a rate, under each of `SEEDS`."""
    runs = [(arm, dict(task), seed, rate.rate) for arm, rate in rates.items() for seed in SEEDS]
    found: dict[str, list[float]] = {arm: [] for arm in rates}
    for (arm, *_), loss in zip(runs, in_parallel(arm_loss, runs), strict=True):
        found[arm].append(loss)
    return found


@torch.no_grad()
def averaged_loss(task: Task, rate: float) -> float:
    """Nats a byte of the mean prediction of as many models of one stream as there are streams, trained apart."""
    inputs, targets = language.heldout(task["length"], WINDOWS)
    total = torch.zeros(1)
    for seed in range(task["streams"]):
        made = trained_model("one stream", task, seed, rate)
        logits = torch.cat([made(part).logits for part in inputs.split(16)])
        total = total + logits.float().softmax(-1)
    mean = (total / task["streams"]).gather(-1, targets[..., None])
    return float(-mean.log().mean())


def trained_arms(losses: Mapping[str, list[float]], rates: Mapping[str, Rate], task: Task) -> dict[str, Trained]:
    """All arms, with the floor of a table of pairs of bytes."""
    floor = language.bigram_floor(*language.heldout(task["length"], WINDOWS))
    return {
        arm: Trained(found, floor, "a table of pairs of bytes", rates[arm].rate, rates[arm].rates)
        for arm, found in losses.items()
    }


def told_apart(losses: Mapping[str, list[float]], rates: Mapping[str, Rate]) -> dict[str, Trained]:
    """The nats that different prefixes gain over the same one for all streams, seed by seed, on the way to what the law promises: the gain
    of the larger model over one of as many parameters. Where they hardly gain, streams do not act, and no figure says what they are worth.
    """
    gains = [same - apart for same, apart in zip(losses["identical prefixes"], losses["streams"], strict=True)]
    promised = max(sum(losses["as many parameters"]) - sum(losses["larger"]), 0.0) / len(gains)
    rate = rates["streams"]
    return {
        "what different prefixes gain": Trained(
            gains, 0.0, "the same prefix for all", rate.rate, rate.rates, higher_is_better=True, best=promised
        )
    }


# ----------------------------------------------------------------------------------------------------------- losses as parameters


def slopes_of(losses: Mapping[str, list[float]], task: Task) -> list[float]:
    """Nats that e times the parameters save one stream, seed by seed: the line through its losses at three sizes."""
    sizes = np.log([parameters_of(arm, task) for arm in SIZES])
    return [-float(np.polyfit(sizes, found, 1)[0]) for found in zip(*(losses[arm] for arm in SIZES), strict=True)]


def ratio_over_seeds(gains: Sequence[float], slopes: Sequence[float]) -> Interval:
    """mean(gains) / mean(slopes) over paired seeds, with the 95 % interval of Fieller.

    It holds the ratios r for which Student's t of gain - r slope, seed by seed, finds no difference from 0: the noise of both and
    what they have in common is in it. Raises ValueError where the slopes are not above 0 by the same test: no loss can be told then.

    >>> found = ratio_over_seeds([0.9, 1.0, 1.1], [2.0, 2.0, 2.0])
    >>> found.median, round(found.low, 3), round(found.high, 3)
    (0.5, 0.376, 0.624)
    """
    g, s = np.asarray(gains, dtype=np.float64), np.asarray(slopes, dtype=np.float64)
    noise = np.cov(g, s) / len(g) * student_t(0.95, len(g) - 1) ** 2
    a, b, c = s.mean() ** 2 - noise[1, 1], g.mean() * s.mean() - noise[0, 1], g.mean() ** 2 - noise[0, 0]
    if not (s.mean() > 0 and a > 0):
        raise ValueError(f"larger models must have lower losses beyond the noise of seeds, got slopes {s.tolist()}")
    half = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(g.mean() / s.mean()), float((b - half) / a), float((b + half) / a), len(g))


def as_eight(log_times: float, count: int) -> float:
    """exp(`log_times`) times the parameters that `count` streams are worth, as those of eight by the law's k ln P + 1.

    >>> round(as_eight(math.log(1 + 0.39 * math.log(4)), 4), 3) == round(1 + 0.39 * math.log(8), 3)
    True
    """
    return 1 + (math.exp(log_times) - 1) * math.log(8) / math.log(count)
