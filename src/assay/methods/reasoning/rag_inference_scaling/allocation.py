"""How a budget of context is spent best: a model of accuracy over (documents, demonstrations, iterations), fitted on a
few runs.

The model of section 5 of the paper: logit(P) = (a + b * i)^T log(theta) + c, with theta = (documents, shots,
iterations) and a task's informativeness i = (i_doc, i_shot, 0), what one document and one demonstration add there to
nothing. Fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from assay import checks

Shift = Literal["add", "log1p"]


@dataclass(frozen=True, order=True)
class Allocation:
    """So many documents for each question, demonstrations, and rounds of retrieval and reading: the paper's theta.

    Raises ValueError for numbers below 0 and for no iteration.
    """

    documents: int
    shots: int = 0
    iterations: int = 1

    def __post_init__(self) -> None:
        checks.whole("documents", self.documents, low=0)
        checks.whole("shots", self.shots, low=0)
        checks.whole("iterations", self.iterations, low=1)


def feasible(lengths: Mapping[Allocation, float], limit: float) -> list[Allocation]:
    """The allocations whose effective context length is at most `limit`, in order. Raises ValueError where there is
    none.

    >>> feasible({Allocation(1): 50.0, Allocation(8): 400.0}, 100)
    [Allocation(documents=1, shots=0, iterations=1)]
    """
    limit = checks.number("limit", limit, low=0)
    found = sorted(allocation for allocation, length in lengths.items() if length <= limit)
    if not found:
        raise ValueError(f"limit must be at least {min(lengths.values(), default=0):g}, the shortest, got {limit:g}")
    return found


def optimum(scores: Mapping[Allocation, float], lengths: Mapping[Allocation, float], limit: float) -> Allocation:
    """The best of the allocations within `limit`, of equal ones the shortest: its score is P*(limit), which never falls
    with the limit.

    >>> optimum({Allocation(1): 0.4, Allocation(8): 0.6}, {Allocation(1): 50.0, Allocation(8): 400.0}, 100).documents
    1
    """
    return max(feasible(lengths, limit), key=lambda allocation: (scores[allocation], -lengths[allocation]))


def informativeness(scores: Mapping[Allocation, float]) -> tuple[float, float]:
    """What one document and one demonstration add to nothing on a task, (i_doc, i_shot). Raises ValueError where one
    was not tried.

    >>> informativeness({Allocation(0): 0.1, Allocation(1): 0.5, Allocation(0, 1): 0.2})
    (0.4, 0.1)
    """
    nothing, document, shot = Allocation(0), Allocation(1), Allocation(0, 1)
    if missing := [each for each in (nothing, document, shot) if each not in scores]:
        raise ValueError(f"scores must hold no, one document and one demonstration alone, got none for {missing[0]}")
    return scores[document] - scores[nothing], scores[shot] - scores[nothing]


class AllocationModel:
    """Accuracy by (documents, shots, iterations, i_doc, i_shot), one row each: a regressor in scikit-learn's form.

    `shift` keeps the logarithm of 0 finite: "add" adds `small` to theta as the paper does (the amount is our choice),
    "log1p" takes log(1 + theta). The choice weighs heavily on rows without documents or shots. `informed` False leaves
    b out. Accuracies are held within [`floor`, 1 - `floor`] before the logit, which is part of the model.

    After `fit`, `a_` and `b_` hold a number for each of documents, shots and iterations (b's last is always 0), `c_`
    the constant, and `identified_` says whether the rows determine them: with tasks of one informativeness only a + b *
    i is, and the smallest such numbers are given. When NOT to use it: for an accuracy that first rises and then falls
    with the documents; it is monotone in each part of theta.

    >>> rows = [[1, 0, 1, 0.3, 0.0], [4, 0, 1, 0.3, 0.0], [1, 2, 1, 0.3, 0.0], [4, 2, 2, 0.1, 0.2]]
    >>> model = AllocationModel().fit(rows, [0.2, 0.4, 0.3, 0.5])
    >>> model.predict(rows).round(2).tolist(), model.identified_
    ([0.2, 0.4, 0.3, 0.5], False)
    """

    def __init__(self, shift: Shift = "add", small: float = 1e-3, floor: float = 0.005, informed: bool = True) -> None:
        self.shift, self.small, self.floor, self.informed = shift, small, floor, informed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings, as scikit-learn asks for them."""
        return {name: getattr(self, name) for name in ("shift", "small", "floor", "informed")}

    def set_params(self, **values: Any) -> AllocationModel:
        """Change settings. Raises ValueError for an unknown one."""
        for name, value in values.items():
            setattr(self, checks.choice("the setting", name, list(self.get_params())), value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags("regressor", TargetTags(required=True), regressor_tags=RegressorTags(), input_tags=InputTags())

    def fit(self, X: Any, y: Any) -> AllocationModel:
        """Least squares of the logits. Raises ValueError for rows of another form and accuracies outside [0, 1]."""
        checks.choice("shift", self.shift, ("add", "log1p"))
        floor = checks.number("floor", self.floor, above=0, below=0.5)
        checks.number("small", self.small, above=0)
        rows, observed = _rows(X), np.asarray(y, dtype=float)
        if observed.shape != (len(rows),) or not ((observed >= 0) & (observed <= 1)).all():
            raise ValueError(f"y must be an accuracy in [0, 1] for each of {len(rows)} rows, got {checks.shown(y)}")
        within = observed.clip(floor, 1 - floor)
        design = self._design(rows)
        # a column that never varies (one round throughout) says nothing, and is not held against the fit
        used = [i for i in range(design.shape[1]) if i == design.shape[1] - 1 or np.ptp(design[:, i]) > 0]
        weights = np.zeros(design.shape[1])
        found, _, rank, _ = np.linalg.lstsq(design[:, used], np.log(within / (1 - within)), rcond=None)
        weights[used] = found
        self.a_ = weights[:3]
        self.b_ = np.array([weights[3], weights[4], 0.0]) if self.informed else np.zeros(3)
        self.c_ = float(weights[-1])
        self.identified_ = bool(rank == len(used))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The accuracy of each row. Raises ValueError before `fit`, and for rows of another form."""
        if not hasattr(self, "a_"):
            raise ValueError("fit must be called before predict")
        design = self._design(_rows(X))
        weights = [*self.a_, *(self.b_[:2] if self.informed else ()), self.c_]
        return 1 / (1 + np.exp(-(design @ np.array(weights))))

    def score(self, X: Any, y: Any) -> float:
        """The coefficient of determination of the predicted accuracies."""
        return determination(np.asarray(y, dtype=float), self.predict(X))

    def best(
        self, lengths: Mapping[Allocation, float], limit: float, informativeness: tuple[float, float]
    ) -> Allocation:
        """The allocation within `limit` of which most is expected on a task of that informativeness; of equal ones the
        shortest.
        """
        known = sorted(lengths)
        expected = self.predict([[*as_row(allocation), *informativeness] for allocation in known])
        return optimum(dict(zip(known, expected.tolist(), strict=True)), lengths, limit)

    def _design(self, rows: np.ndarray) -> np.ndarray:
        logs = np.log1p(rows[:, :3]) if self.shift == "log1p" else np.log(rows[:, :3] + self.small)
        informed = [logs[:, :2] * rows[:, 3:]] if self.informed else []
        return np.hstack([logs, *informed, np.ones((len(rows), 1))])


def as_row(allocation: Allocation) -> list[int]:
    """Documents, shots and iterations."""
    return [allocation.documents, allocation.shots, allocation.iterations]


def rows_of(allocations: Sequence[Allocation], informativeness: tuple[float, float]) -> list[list[float]]:
    """The rows of a task for `AllocationModel`."""
    return [[*as_row(allocation), *informativeness] for allocation in allocations]


def determination(observed: np.ndarray, predicted: np.ndarray) -> float:
    """R^2: 1 for a perfect prediction, 0 for one as good as the observed mean, below 0 for a worse one.

    Raises ValueError where the observed values do not differ.

    >>> determination(np.array([0.0, 1.0]), np.array([0.5, 0.5]))
    0.0
    """
    spread = float(((observed - observed.mean()) ** 2).sum())
    if not spread > 0:
        raise ValueError("observed must hold values that differ, got one value throughout")
    return 1 - float(((observed - predicted) ** 2).sum()) / spread


def _rows(X: Any) -> np.ndarray:
    rows = np.asarray(X, dtype=float)
    if rows.ndim != 2 or rows.shape[1] != 5 or not len(rows) or not np.isfinite(rows).all() or (rows[:, :3] < 0).any():
        raise ValueError(
            "X must have rows of documents, shots, iterations (none below 0), i_doc and i_shot, got shape "
            f"{np.shape(X)}"
        )
    return rows
