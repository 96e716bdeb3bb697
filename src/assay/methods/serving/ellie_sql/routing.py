"""Routing a task to the cheapest tier that will do: labels, routers with scikit-learn's interface, thresholds by cost, and what it saves.

Nothing here knows of SQL: a tier may be a model's size, a search's width or a depth of retrieval. `results[i, t]` is how well tier t did on
task i (1 for right, 0 for wrong, or a quality), `costs[i, t]` what that took (tokens, seconds); tiers stand in the order of their price.

    labels(results)                                     # the first tier that solves each task
    router = TierRouter(LogisticRegression(), how="cascade").fit(features, results)
    tiers = router.predict(features)                    # one tier a task
    routed(tiers, results, costs, router_costs=...)     # accuracy and mean cost, the router's own included
    threshold, curve = tuned_threshold(router, features, results, costs, most_lost=0.01)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay import checks
from assay.errors import MissingError

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, clone
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError:  # pragma: no cover - it comes with the extra
    raise MissingError("routers need scikit-learn: pip install scikit-learn") from None

SOLVED = 0.5  # a quality from which on a task counts as solved
HOW = ("label", "cascade", "cost")


def labels(results: Any, *, solved: float = SOLVED, hopeless: str = "last") -> np.ndarray:
    """The first tier that solves each task, (n,).

    Where none does it is the last one, as in the paper, or with `hopeless="first"` the first one, which loses nothing and costs least.

    >>> labels([[1, 1, 1], [0, 0, 1], [0, 0, 0]]), labels([[0, 0]], hopeless="first")
    (array([0, 2, 2]), array([0]))
    """
    checks.choice("hopeless", hopeless, ("first", "last"))
    right = _results(results) >= checks.number("solved", solved)
    none = right.shape[1] - 1 if hopeless == "last" else 0
    return np.where(right.any(axis=1), right.argmax(axis=1), none)


def _results(results: Any, name: str = "results") -> np.ndarray:
    found = check_array(results, dtype=np.float64, input_name=name)
    return np.asarray(found)


@dataclass(frozen=True)
class Routed:
    """What routing gave: the share solved, the mean cost a task with the router's own, and the share of tasks by tier."""

    accuracy: float
    cost: float
    shares: tuple[float, ...]


def routed(tiers: Any, results: Any, costs: Any, *, router_costs: Any = 0.0) -> Routed:
    """Accuracy and mean cost of tasks that went to `tiers` (n,). `router_costs` (one number, or one a task) is added to every task.

    Raises ValueError for tiers that are not there, shapes that differ, and costs that are negative or not finite.
    """
    results = _results(results)
    costs, own = _costs(costs, results.shape), np.asarray(router_costs, dtype=np.float64)
    if own.shape not in ((), (len(results),)) or not (np.isfinite(own) & (own >= 0)).all():
        raise ValueError(
            f"router_costs must be one finite number of at least 0, or one a task, got {checks.shown(router_costs)}"
        )
    chosen = _tiers(tiers, results.shape)
    rows = np.arange(len(chosen))
    shares = np.bincount(chosen, minlength=results.shape[1]) / len(chosen)
    return Routed(
        float(results[rows, chosen].mean()), float((costs[rows, chosen] + own).mean()), tuple(float(s) for s in shares)
    )


def _costs(costs: Any, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(costs, dtype=np.float64)
    if found.ndim == 1 and len(found) == shape[1]:  # the same for every task
        found = np.broadcast_to(found, shape)
    if found.shape != shape or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(
            f"costs must be finite numbers of at least 0 of shape {shape} or ({shape[1]},), got shape {found.shape}"
        )
    return found


def _tiers(tiers: Any, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(tiers)
    if found.shape != (shape[0],) or found.dtype.kind not in "iu" or not ((found >= 0) & (found < shape[1])).all():
        raise ValueError(f"tiers must be {shape[0]} whole numbers in 0..{shape[1] - 1}, got {checks.shown(tiers)}")
    return found


def by_chance(shares: Sequence[float], results: Any, costs: Any) -> Routed:
    """What a router that sends these shares of the tasks to the tiers by chance is expected to give: no draw, hence no luck."""
    results = _results(results)
    costs = _costs(costs, results.shape)
    weights = np.asarray(shares, dtype=np.float64)
    if weights.shape != (results.shape[1],) or not (weights >= 0).all() or not abs(weights.sum() - 1) < 1e-9:
        raise ValueError(
            f"shares must be {results.shape[1]} numbers of at least 0 with the sum 1, got {checks.shown(shares)}"
        )
    return Routed(float(results.mean(0) @ weights), float(costs.mean(0) @ weights), tuple(float(w) for w in weights))


def tep(accuracy: float, cost: float, base_accuracy: float, base_cost: float) -> float:
    """Token elasticity of performance: the relative gain of accuracy over the basic tier by the relative growth of tokens.

    NaN where it is undefined: equal cost, or a basic tier that solves nothing or costs nothing. It is free of units and explodes for a
    tiny growth of tokens: show accuracy and tokens beside it.

    >>> round(tep(0.6, 300, 0.5, 100), 3), tep(0.6, 100, 0.5, 100)
    (0.1, nan)
    """
    values = [checks.number(name, value, low=0) for name, value in (
        ("accuracy", accuracy), ("cost", cost), ("base_accuracy", base_accuracy), ("base_cost", base_cost))]  # fmt: skip
    accuracy, cost, base_accuracy, base_cost = values
    if cost == base_cost or base_accuracy == 0 or base_cost == 0:
        return math.nan
    return ((accuracy - base_accuracy) / base_accuracy) / ((cost - base_cost) / base_cost)


class TierRouter(BaseEstimator):
    """A router around any scikit-learn classifier with `predict_proba`.

    `how` says what is learnt and decided:

    - "label": the classifier learns `labels(results)`, and its most probable one is taken (the paper's classifier);
    - "cascade": one classifier a tier learns whether that tier solves a task; the first whose probability reaches `threshold` is taken,
      else the last tier (the paper's cascade, at 0.5). None is learnt for the last;
    - "cost": one classifier a tier, the last one too; the tier with the most probability minus `threshold` times its price is taken. A task
      that no tier is likely to solve goes to a cheap one. Prices are the tiers' mean costs as shares of the dearest, from `costs` (T,).

    Ties go to the cheaper tier. `fit(X, results)` takes features (n, d) and results (n, T) (see `labels`; what reaches `solved` counts as
    solved). A tier that solved all, or none, of the tasks needs no classifier: its probability is 1 or 0. After `fit`: `tiers_`,
    `classifiers_`, `n_features_in_`. `predict` gives tiers (n,), `predict_proba` (n, T) the probabilities that it decides by, those of
    "label" of the labels, those of the others of being solved (1 for the last tier of a cascade).
    Raises ValueError for settings out of range, results that do not fit X, and "cost" without costs.

    When NOT to use it: with a few dozen tasks that no longer look like tomorrow's; the labels of one noisy run are noisy themselves.

    >>> from sklearn.linear_model import LogisticRegression
    >>> X = np.array([[0.0], [0.1], [0.9], [1.0]])
    >>> router = TierRouter(LogisticRegression(C=100.0), how="cascade").fit(X, [[1, 1], [1, 1], [0, 1], [0, 1]])
    >>> router.predict([[0.05], [0.95]])
    array([0, 1])
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        how: str = "label",
        threshold: float = 0.5,
        costs: Sequence[float] | None = None,
        solved: float = SOLVED,
    ) -> None:
        self.estimator = estimator
        self.how = how
        self.threshold = threshold
        self.costs = costs
        self.solved = solved

    def fit(self, X: Any, y: Any) -> TierRouter:
        """Learn from the features and results of tasks."""
        checks.choice("how", self.how, HOW)
        checks.number("threshold", self.threshold)
        X, results = validate_data(self, X, y, multi_output=True, dtype=np.float64, y_numeric=True)
        results = np.asarray(results, dtype=np.float64).reshape(len(X), -1)
        self.tiers_ = results.shape[1]
        if self.how == "cost":
            if self.costs is None:
                raise ValueError("costs must be given to decide by cost, got None")
            self.prices_ = _prices(self.costs, self.tiers_)
        if self.how == "label":
            self.classifiers_ = [self._learnt(X, labels(results, solved=self.solved))]
        else:
            count = self.tiers_ - (self.how == "cascade")
            self.classifiers_ = [self._learnt(X, (results[:, t] >= self.solved).astype(int)) for t in range(count)]
        return self

    def _learnt(self, X: np.ndarray, wanted: np.ndarray) -> Any:
        """A fitted classifier, or the only class there is."""
        if len(np.unique(wanted)) == 1:
            return int(wanted[0])
        if self.estimator is None:
            from sklearn.linear_model import LogisticRegression

            return LogisticRegression(max_iter=1000).fit(X, wanted)
        return clone(self.estimator).fit(X, wanted)

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities that `predict` decides by, (n, T)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        found = np.ones((len(X), self.tiers_))
        if self.how == "label":
            return _of_classes(self.classifiers_[0], X, self.tiers_)
        for tier, classifier in enumerate(self.classifiers_):
            found[:, tier] = _of_classes(classifier, X, 2)[:, 1]
        return found

    def predict(self, X: Any) -> np.ndarray:
        """A tier for each task, (n,)."""
        return self.decide(self.predict_proba(X))

    def decide(self, probabilities: np.ndarray, threshold: float | None = None) -> np.ndarray:
        """Tiers from probabilities by this router's rule, at its own threshold or another one."""
        limit = self.threshold if threshold is None else checks.number("threshold", threshold)
        if self.how == "label":
            return _first_best(probabilities)
        if self.how == "cascade":
            enough = probabilities[:, :-1] >= limit
            return np.where(
                enough.any(axis=1), enough.argmax(axis=1) if enough.shape[1] else 0, probabilities.shape[1] - 1
            )
        return _first_best(probabilities - limit * self.prices_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags


def _first_best(values: np.ndarray) -> np.ndarray:
    """The column of the largest value in each row, the first of equal ones; what rounding parts counts as equal."""
    return (values >= values.max(axis=1, keepdims=True) - 1e-12).argmax(axis=1)


def _prices(costs: Any, tiers: int) -> np.ndarray:
    found = np.asarray(costs, dtype=np.float64)
    if found.shape != (tiers,) or not (np.isfinite(found) & (found >= 0)).all() or not found.max() > 0:
        raise ValueError(f"costs must be {tiers} finite numbers of at least 0, not all 0, got {checks.shown(costs)}")
    return found / found.max()


def _of_classes(classifier: Any, X: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities of the classes 0..classes-1; those never seen have none."""
    found = np.zeros((len(X), classes))
    if isinstance(classifier, int):
        found[:, classifier] = 1
        return found
    found[:, classifier.classes_.astype(int)] = classifier.predict_proba(X)
    return found


class LinearScores(ClassifierMixin, BaseEstimator):
    """What linear classifiers of tiers have in common once `classes_` and `coef_` (features and a constant, classes) are learnt."""

    classes_: np.ndarray
    coef_: np.ndarray

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores by class, (n, classes); of two classes the difference, as scikit-learn has it."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return X @ self.coef_[:-1] + self.coef_[-1]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The softmax of the scores."""
        scores = self._scores(X)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The class with the highest score, the first of equal ones."""
        scores = self._scores(X)
        return self.classes_[_first_best(scores)]


class PairwiseClassifier(LinearScores):
    """Linear scores learnt from pairs: the hinge loss max(0, 1 - z_right + z_other), summed over all other classes, plus `alpha` |W|^2.

    The paper's pairwise router when it stands in `TierRouter(PairwiseClassifier())`. Minimised by L-BFGS on the squared hinge's smooth
    neighbour: the hinge is rounded over `smooth` around its corner (our choice). `predict_proba` is the softmax of the scores, which is not
    calibrated.
    Raises ValueError for fewer than two classes, and settings that are not above 0.
    """

    def __init__(self, *, alpha: float = 1e-2, smooth: float = 0.1, max_iter: int = 200) -> None:
        self.alpha = alpha
        self.smooth = smooth
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> PairwiseClassifier:
        """Learn the scores."""
        from scipy.optimize import minimize
        from sklearn.utils.multiclass import check_classification_targets

        alpha = checks.number("alpha", self.alpha, above=0)
        smooth = checks.number("smooth", self.smooth, above=0)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, wanted = np.unique(y, return_inverse=True)
        n, d, k = len(X), X.shape[1], len(self.classes_)
        if k < 2:
            raise ValueError(f"y must have at least 2 classes, got {k} class")
        inputs = np.hstack([X, np.ones((n, 1))])
        rows = np.arange(n)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(d + 1, k)
            scores = inputs @ weights
            short = 1 - scores[rows, wanted][:, None] + scores
            short[rows, wanted] = -1.0
            rounded = np.where(short > smooth, short - smooth / 2, np.where(short > 0, short**2 / (2 * smooth), 0.0))
            slope = np.clip(short / smooth, 0, 1)
            slope[rows, wanted] = -slope.sum(axis=1)
            gradient = inputs.T @ slope / n
            gradient[:-1] += 2 * alpha * weights[:-1]
            return float(rounded.sum() / n + alpha * (weights[:-1] ** 2).sum()), gradient.ravel()

        found = minimize(loss, np.zeros((d + 1) * k), jac=True, method="L-BFGS-B", options={"maxiter": self.max_iter})
        self.n_iter_ = int(found.nit)
        self.coef_ = found.x.reshape(d + 1, k)
        return self


class ConstantRouter(BaseEstimator):
    """Everything to one tier: the baselines that always take basic, intermediate or advanced."""

    def __init__(self, tier: int = 0) -> None:
        self.tier = tier

    def fit(self, X: Any, y: Any = None) -> ConstantRouter:
        """Nothing is learnt."""
        X = validate_data(self, X)
        self.tier_ = checks.whole("tier", self.tier, low=0)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The tier, once a task."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return np.full(len(X), self.tier_)


class CountRouter(BaseEstimator):
    """The paper's rule by a count in a column of X, of linked tables: below the first of `bounds` basic, below the second intermediate,
    else advanced.

    The paper's own description and its code disagree; this is the code's: fewer than 2, 2 to 3, more than 3.
    """

    def __init__(self, bounds: Sequence[float] = (2, 4), column: int = 0) -> None:
        self.bounds = bounds
        self.column = column

    def fit(self, X: Any, y: Any = None) -> CountRouter:
        """Nothing is learnt."""
        X = validate_data(self, X)
        self.column_ = checks.whole("column", self.column, low=0, high=X.shape[1] - 1)
        self.bounds_ = np.asarray([checks.number("bounds", one) for one in self.bounds])
        if (np.diff(self.bounds_) <= 0).any():
            raise ValueError(f"bounds must rise, got {list(self.bounds)}")
        return self

    def predict(self, X: Any) -> np.ndarray:
        """A tier for each task: how many bounds its count reaches."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return (X[:, [self.column_]] >= self.bounds_).sum(axis=1)


def nearest_neighbours(count: int = 5) -> TierRouter:
    """The paper's k-nearest-neighbours router, for features (number of tables, number of columns)."""
    from sklearn.neighbors import KNeighborsClassifier

    return TierRouter(KNeighborsClassifier(count))


def oracle(results: Any, *, hopeless: str = "first") -> np.ndarray:
    """Where a router that knows every result would send each task: to its label. As accurate as any router can be, and with
    `hopeless="first"` at the least cost that accuracy can have, if costs rise with the tiers; the paper's sends what nobody solves to the
    last tier."""
    return labels(results, hopeless=hopeless)


def tuned_threshold(
    router: TierRouter,
    X: Any,
    results: Any,
    costs: Any,
    *,
    groups: Any = None,
    most_lost: float = 0.01,
    folds: int = 5,
    thresholds: Sequence[float] | None = None,
) -> tuple[float, list[tuple[float, float, float]]]:
    """The threshold of a cascade, or of deciding by cost, that is cheapest within `most_lost` accuracy of always taking the last tier.

    Probabilities are predicted for tasks that were not learnt from, in `folds` that keep `groups` (None: every task its own) together.
    Returns the threshold and (threshold, accuracy, mean cost) of all of them, by rising threshold. Where none is within, the most accurate
    one is taken. Raises ValueError for a router without a threshold, or fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold

    if router.how == "label":
        raise ValueError("router must decide by a threshold (how='cascade' or 'cost'), got how='label'")
    checks.number("most_lost", most_lost, low=0)
    results = _results(results)
    X = np.asarray(X, dtype=np.float64)
    groups = np.arange(len(X)) if groups is None else np.asarray(groups)
    probabilities = np.ones(results.shape)
    last = router
    for learn, keep in GroupKFold(checks.whole("folds", folds, low=2)).split(X, groups=groups):
        last = clone(router).fit(X[learn], results[learn])
        probabilities[keep] = last.predict_proba(X[keep])
    grid = sorted(np.linspace(0, 1, 21) if thresholds is None else thresholds)
    costs, rows = _costs(costs, results.shape), np.arange(len(results))
    curve = []
    for threshold in grid:
        chosen = last.decide(probabilities, threshold)
        curve.append((float(threshold), float(results[rows, chosen].mean()), float(costs[rows, chosen].mean())))
    least = float(results[:, -1].mean()) - most_lost
    fine = [one for one in curve if one[1] >= least - 1e-12]
    best = min(fine, key=lambda one: one[2]) if fine else max(curve, key=lambda one: one[1])
    return best[0], curve


def cascade_by_failure(failed: Any, results: Any, costs: Any) -> tuple[np.ndarray, np.ndarray]:
    """What trying in turn would do: basic first, and on to the next tier while `failed[i, t]` (an error, an empty result, a doubt).

    Returns the result (n,) and cost (n,) of each task; every tier that was tried is paid for. The rival of a router: ten lines.

    >>> cascade_by_failure([[True, False]], [[0, 1]], [[10, 30]])
    (array([1.]), array([40.]))
    """
    results = _results(results)
    costs = _costs(costs, results.shape)
    failed = np.asarray(failed, dtype=bool)
    if failed.shape != results.shape:
        raise ValueError(f"failed must have shape {results.shape}, got {failed.shape}")
    stays = ~failed
    stays[:, -1] = True
    last = stays.argmax(axis=1)
    rows = np.arange(len(last))
    return results[rows, last], np.cumsum(costs, axis=1)[rows, last]


def hashed_words(texts: Sequence[Sequence[str]], *, width: int = 256) -> np.ndarray:
    """Words and pairs of words of each text, hashed into `width` columns with a sign, rows of length 1; (n, width). Free of tokens.

    The hash is SHA-256's, so that a saved router reads the same on any machine.
    """
    import hashlib
    import itertools

    width = checks.whole("width", width, low=1)
    made = np.zeros((len(texts), width))
    for row, words in enumerate(texts):
        for gram in [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]:
            number = int.from_bytes(hashlib.sha256(gram.encode()).digest()[:8], "little")
            made[row, number % width] += 1 if (number >> 62) & 1 else -1
        norm = math.sqrt(float((made[row] ** 2).sum()))
        made[row] /= norm or 1.0
    return made
