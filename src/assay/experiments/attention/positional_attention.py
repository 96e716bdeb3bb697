"""Positional attention: error on values beyond the training range, against the same network with content-based attention.

What decides at ten times the range is whether the network scales with its input, and routing by position is one way to that among
others: dividing each row by its largest value before a content-based network, and multiplying its output by it, is two lines. That is
the free baseline here. The rival beside the controls is a linear map fitted to the same samples, which is exact for sums, because
they are linear; it says that the task is easy, not that a network would not be needed for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.mixers.training import train
from assay.experiments.rates import chosen, searched
from assay.measure.stats import Interval, median_interval
from assay.methods.attention.positional_attention import AlgorithmicTransformer, PositionalAttention, Routing, task_data

SCALES = (1, 2, 5, 10)
ARMS: dict[str, Routing] = {
    "position": "position",
    "content": "content",
    "content, rows divided by their largest value": "content",
    "no routing": "position",  # every position gets the mean of all
    "random routing": "position",  # weights drawn once and kept
}
FREE = "content, rows divided by their largest value"
SEARCH = "positional_attention/sum"
TEST, CHOICE = 10_000, 20_000  # seeds of the samples that are judged, and of those that choose a rate

SUMS = Operator("cumulative sums of values beyond the training range", free=f"{FREE} (two lines)")


class Fixed(PositionalAttention):
    """Positional attention whose weights are not learnt: uniform, or drawn once, as far from uniform as learnt ones are."""

    logits: Tensor

    def __init__(self, dim: int, positions: int, *, heads: int = 2, uniform: bool):
        super().__init__(dim, positions, heads=heads)
        del self.q_proj, self.k_proj
        shape = (heads, positions, positions)
        self.register_buffer("logits", torch.zeros(shape) if uniform else 3 * torch.randn(shape))

    def weights(self, n: int | None = None) -> Tensor:
        if n not in (None, self.positions):
            raise ValueError(f"n must be {self.positions}, got {n}")
        return self.logits.softmax(-1)


class Scaled(nn.Module):
    """A network on rows divided by their largest value; what it gives is multiplied by that again."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(1, keepdim=True).clamp(min=1e-12)
        y: Tensor = self.model(x / largest) * largest
        return y


def network(arm: str, n: int, dim: int) -> nn.Module:
    """The transformer of an arm; the control arms' attention is fixed: uniform, or drawn at random."""
    model = AlgorithmicTransformer(n, routing=ARMS[arm], dim=dim, hidden=dim)
    if arm in ("no routing", "random routing"):
        layers: Any = model.layers
        for layer in layers:
            layer.attention = Fixed(dim, n + 1, uniform=arm == "no routing")
    return Scaled(model) if arm == FREE else model


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over all samples and outputs."""
    return (model(x) - y).square().mean()


def trained(
    arm: str, task: str, *, n: int, dim: int, samples: int, steps: int, batch: int, seed: int, rate: float
) -> nn.Module:
    """Mean squared error on random batches of `samples` samples; the rate rises and falls once."""
    torch.manual_seed(seed)
    model = network(arm, n, dim)
    x, y = task_data(task, samples, n, seed=seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            picked = torch.randint(len(x), (batch,))
            yield x[picked], y[picked]

    train(model, batches(), steps=steps, lr=rate, weight_decay=0.0, clip=1e9, loss=squared_error)
    return model.eval()


@torch.no_grad()
def error(model: Any, task: str, n: int, scale: float, seed: int = TEST) -> float:
    """Mean squared error over 1000 samples at a scale."""
    x, y = task_data(task, 1000, n, scale=scale, seed=seed)
    return float((model(x).double() - y).square().mean())


def linear_map(task: str, n: int, samples: int, seed: int) -> Any:
    """The affine map of the values that fits the training samples best."""
    x, y = (part.double() for part in task_data(task, samples, n, seed=seed))
    weights = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    return lambda values: torch.cat([values.double(), torch.ones(len(values), 1)], 1) @ weights


def each_value_alone(task: str, n: int, samples: int) -> float:
    """In-range error of a trivial guess: every output from the value at its own place, by linear regression."""
    x, y = (part.double() for part in task_data(task, samples, n, seed=0))
    slope = (x * y).sum(0) / x.square().sum(0)
    return error(lambda values: values.double() * slope, task, n, 1)


@searched(SEARCH, arms=list(ARMS), grid=[1e-3, 3e-3, 1e-2])
def rate_score(arm: str, rate: float) -> float:
    """In-range error on samples that are judged nowhere: nobody who trains knows the values that will come."""
    found = trained(arm, "sum", n=8, dim=64, samples=30_000, steps=600, batch=50, seed=100, rate=rate)
    return error(found, "sum", 8, 1, CHOICE)


def _learns_nothing(record: Mapping[str, Any]) -> bool:
    middle: float = record["measured"]["median"]
    return middle >= min(1.0, record["controls"]["deleted"], record["controls"]["random"])


PAPER = {"task": "sum", "n": 8, "dim": 64, "samples": 30_000, "steps": 60_000, "batch": 1000, "seeds": 10}
SMALL = PAPER | {"steps": 600, "batch": 50, "seeds": 5}


@experiment(
    "positional_attention/cumsum-ood",
    points={
        "smoke": [SMALL | {"samples": 2000, "steps": 60, "seeds": 3}],
        "small": [SMALL],
        "full": [PAPER | {"task": task} for task in ("sum", "median", "maxsub", "sort", "min")],
    },
    operator=SUMS,
    paper=PAPER | {"rate": 5e-4, "schedule": "lowered on plateaus"},
    departures={
        "steps": "600 instead of 60,000, all arms alike: the whole paper has five minutes; all arms are then far from converged",
        "batch": "50 instead of 1000, for the same reason",
        "seeds": "5 instead of 10, for the same reason; the interval is Student's t over them",
        "rate": "searched for each arm over one grid, by its error within the training range",
        "schedule": "one rise and fall over the steps, which suits short training",
    },
    decides={"full": PAPER},
    refuted_if="at ten times the range positional attention is no better than standard attention, or than routing that is random or absent",
    refutes=_learns_nothing,
    minutes=600,
)
def out_of_distribution(task: str, n: int, dim: int, samples: int, steps: int, batch: int, seeds: int) -> Figure:
    """Mean squared error of positional over content-based routing at ten times the training range: the median of the seeds' ratios.

    Bounds from the seeds' ratios, paired and in logarithms (Student's t below six seeds). Controls and the free baseline are ratios
    to content-based routing too, all trained alike: routing left out (every position gets the mean), weights drawn at random and
    kept, and a linear map as the rival. Rates are those found for `small`.
    """
    errors: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    errors["a linear map"] = []
    parameters: dict[str, int] = {}
    for seed in range(seeds):
        for arm in ARMS:
            model = trained(
                arm, task, n=n, dim=dim, samples=samples, steps=steps, batch=batch, seed=seed,
                rate=chosen(SEARCH, arm).rate,
            )  # fmt: skip
            errors[arm].append({str(scale): error(model, task, n, scale) for scale in SCALES})
            parameters[arm] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        fitted = linear_map(task, n, samples, seed)
        errors["a linear map"].append({str(scale): error(fitted, task, n, scale) for scale in SCALES})
    ratios = {
        arm: [ours["10"] / theirs["10"] for ours, theirs in zip(found, errors["content"], strict=True)]
        for arm, found in errors.items()
    }
    over = {arm: _middle(found) for arm, found in ratios.items()}
    floor = each_value_alone(task, n, samples)
    return Figure(
        over["position"].median,
        "x",
        low=over["position"].low,
        high=over["position"].high,
        baseline=1.0,
        free=over[FREE].median,
        controls={
            "deleted": over["no routing"].median,
            "random": over["random routing"].median,
            "rival": over["a linear map"].median,
        },
        trained={
            arm: Trained(
                [found["1"] for found in errors[arm]],
                floor,
                "each value alone, by linear regression",
                chosen(SEARCH, arm).rate,
                chosen(SEARCH, arm).rates,
            )
            for arm in ("position", "content", FREE)
        },
        details={"mean squared error": errors, "ratios": ratios, "trained parameters": parameters},
    )


def _middle(ratios: list[float]) -> Interval:
    found = median_interval(np.log(np.maximum(ratios, 1e-300)))
    return Interval(float(np.exp(found.median)), float(np.exp(found.low)), float(np.exp(found.high)), found.n)
