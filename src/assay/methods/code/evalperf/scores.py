"""Samples among references: DPS and DPS_norm of a program, of a task, of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from assay import checks
from assay.methods.code.evalperf.clustering import Reference, valid_cost


@dataclass(frozen=True)
class Place:
    """Where a program stands: the reference it is no slower than (its index; None: slower than all), and both scores, 0 to 100."""

    reference: int | None
    dps: float
    dps_norm: float


def place(cost: float | None, found: Sequence[Reference]) -> Place:
    """The fastest reference that costs at least as much as the program; DPS is its score, DPS_norm 100 (j + 1) / references.

    0 for a program slower than all, and for one that did not finish (cost None).

    >>> from assay.methods.code.evalperf import references
    >>> levels = references([1e6, 4e6, 1.05e6, 7e5])
    >>> place(1.05e6, levels).dps, place(1e3, levels).dps, place(5e6, levels).dps, place(None, levels).dps
    (75.0, 100.0, 0.0, 0.0)
    """
    if not found:
        raise ValueError("found must have at least one reference, got none")
    if cost is not None:
        value = valid_cost(cost)
        for j in reversed(range(len(found))):
            if value <= found[j].cost:
                return Place(j, found[j].score, 100 * (j + 1) / len(found))
    return Place(None, 0.0, 0.0)


@dataclass(frozen=True)
class ScoringProtocol:
    """Which samples count: a task is scored from so many right ones on, and so many of them at most are measured."""

    least_right: int
    most_measured: int


ProtocolName = Literal["paper", "as_released"]
PROTOCOLS: dict[ProtocolName, ScoringProtocol] = {
    "paper": ScoringProtocol(1, 10),
    "as_released": ScoringProtocol(10, 20),
}


@dataclass(frozen=True)
class TaskScore:
    """A model's scores on one task: means over the samples that were measured. None where too few samples are right: not scored, not 0."""

    dps: float | None
    dps_norm: float | None
    right: int
    samples: int
    places: tuple[Place, ...]

    @property
    def pass_at_1(self) -> float:
        """The share of right samples, in per cent."""
        return 100 * self.right / self.samples


def score_task(
    samples: Sequence[str],
    right: Sequence[bool],
    cost_of: Callable[[str], float | None],
    found: Sequence[Reference],
    *,
    protocol: ProtocolName | ScoringProtocol = "paper",
) -> TaskScore:
    """Score a model's samples (program texts) of one task. `right` says which give the right answers: the others are never measured.

    `cost_of` measures a program on the task's input, in the meter and on the machine of the references; None where it does not finish. It
    is called once for each text, for the first right samples in their order.

    >>> from assay.methods.code.evalperf import references
    >>> levels = references([1e6, 4e6, 1.05e6, 7e5])
    >>> costs = {"slow": 3e6, "fast": 6e5, "wrong": 1.0}
    >>> score = score_task(["slow", "wrong", "fast"], [True, False, True], costs.get, levels)
    >>> score.dps, round(score.pass_at_1)
    (62.5, 67)
    """
    if isinstance(protocol, str):
        protocol = PROTOCOLS[checks.choice("protocol", protocol, tuple(PROTOCOLS))]
    least = checks.whole("protocol.least_right", protocol.least_right, low=1)
    most = checks.whole("protocol.most_measured", protocol.most_measured, low=1)
    if not samples or len(samples) != len(right):
        raise ValueError(
            f"right must say of each sample (at least one) whether it is, got {len(samples)} and {len(right)}"
        )
    fine = [text for text, ok in zip(samples, right, strict=True) if ok]
    if len(fine) < least:
        return TaskScore(None, None, len(fine), len(samples), ())
    known: dict[str, Place] = {}
    for text in fine[:most]:
        if text not in known:
            known[text] = place(cost_of(text), found)
    places = tuple(known[text] for text in fine[:most])
    return TaskScore(
        fmean(one.dps for one in places), fmean(one.dps_norm for one in places), len(fine), len(samples), places
    )


@dataclass(frozen=True)
class ModelScore:
    """A model's scores: means over the `scored` tasks (None if there is none); `pass_at_1` over all of them, in per cent."""

    dps: float | None
    dps_norm: float | None
    pass_at_1: float
    scored: int
    tasks: int


def score_model(scores: Sequence[TaskScore]) -> ModelScore:
    """The scores of a model on all tasks. Models compare only where they were scored on the same tasks: see `common_tasks`."""
    if not scores:
        raise ValueError("scores must have at least one task, got none")
    dps = [one.dps for one in scores if one.dps is not None]
    norms = [one.dps_norm for one in scores if one.dps_norm is not None]
    passed = fmean(one.pass_at_1 for one in scores)
    if not dps:
        return ModelScore(None, None, passed, 0, len(scores))
    return ModelScore(fmean(dps), fmean(norms), passed, len(dps), len(scores))


def common_tasks(models: Mapping[str, Mapping[str, TaskScore]]) -> dict[str, ModelScore]:
    """The scores of several models on the tasks that all of them were scored on, by model; fair, where each has its own set otherwise."""
    if not models:
        raise ValueError("models must have at least one, got none")
    shared = set.intersection(*({name for name, one in of.items() if one.dps is not None} for of in models.values()))
    if not shared:
        raise ValueError(f"models must have a task that all were scored on, got none for {', '.join(models)}")
    return {model: score_model([of[name] for name in sorted(shared)]) for model, of in models.items()}
