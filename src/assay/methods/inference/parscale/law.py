"""The parallel scaling law as a scikit-learn estimator: L(N, P) = E + (A / (N (k ln P + 1))) ** alpha.

    from assay.methods.inference.parscale.law import ParallelScalingLaw
    from assay.methods.inference.parscale.published import table

    law = ParallelScalingLaw().fit(*table("stack"))
    law.k_, law.equivalent(8)            # eight streams act like so many times the parameters

One stream gives the Chinchilla form E + (A / N) ** alpha. Needs scikit-learn and SciPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from assay import checks
from assay.errors import MissingError

try:
    from scipy.optimize import minimize
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data
except ImportError:  # pragma: no cover - both come with the extra
    raise MissingError("the scaling law needs scikit-learn and scipy: pip install scikit-learn scipy") from None

BILLION = 1e9
LEAST_ALPHA = 1e-4


class ParallelScalingLaw(RegressorMixin, BaseEstimator):
    """Predicts a loss from the number of parameters and of parallel streams (arXiv 2505.10475).

    X is (models, 2): parameters (a count, without the embedding) and streams, at least 1. y is the loss, above 0. `fit` minimises the
    Huber loss of the logarithms' differences (`delta`, 1e-3 in the paper) with L-BFGS-B, from the `starts` best points of a grid
    of 480 (None: from all of them), and keeps the best end. What the paper leaves open is our choice: E and A are searched on a
    logarithmic scale, with exact gradients.

    Fitted: `E_`, `A_` (in billions of parameters), `alpha_`, `k_`, `objective_` (the sum of Huber losses), `n_features_in_`. `score` is R².
    Raises ValueError for fewer than four models, parameters or losses that are not above 0, streams below 1, other numbers of columns,
    NaN or infinity, one number of streams throughout (k would be anything), and settings out of range; NotFittedError before `fit`.

    When NOT to use it: to extrapolate. Four numbers are fitted to a few dozen losses, E and alpha make up for each other, and nothing in
    the data says that the logarithm of P goes on.

    >>> X = np.array([[billions * 1e9, streams] for billions in (0.2, 0.4, 0.8, 1.6) for streams in (1, 2, 4)])
    >>> y = 0.5 + (0.01 / (X[:, 0] / 1e9 * (0.4 * np.log(X[:, 1]) + 1))) ** 0.3
    >>> law = ParallelScalingLaw().fit(X, y)
    >>> round(law.k_, 2), round(law.equivalent(8), 2)
    (0.4, 1.83)
    """

    def __init__(self, *, delta: float = 1e-3, starts: int | None = 40):
        self.delta = delta
        self.starts = starts

    def fit(self, X: Any, y: Any) -> ParallelScalingLaw:
        delta = checks.number("delta", self.delta, above=0)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=4)
        size, streams = _columns(X)
        y = np.asarray(y, dtype=np.float64)
        if not (y > 0).all():
            raise ValueError(f"y must be above 0: losses are compared by their logarithms, got {y.min():g}")
        if len(np.unique(streams)) < 2:
            raise ValueError("X must hold more than one number of streams, or k could be anything")
        ln_size, ln_streams, wanted = np.log(size / BILLION), np.log(streams), np.log(y)

        def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
            return huber_objective(point, ln_size, ln_streams, wanted, delta)

        grid = starting_points(y.min())
        values = np.array([objective(point)[0] for point in grid])
        order = np.argsort(values, kind="stable")
        if self.starts is not None:
            order = order[: checks.whole("starts", self.starts, low=1)]
        most = float(np.log(y.min()))  # the floor lies below all losses
        bounds = [(most - 30, most), (-60.0, 60.0), (LEAST_ALPHA, 20.0), (0.0, None)]
        options = {"maxiter": 2000, "maxfun": 20000, "ftol": 1e-12, "gtol": 1e-9}
        ends = [
            minimize(objective, grid[i], jac=True, method="L-BFGS-B", bounds=bounds, options=options) for i in order
        ]
        best = min(ends, key=lambda end: end.fun)
        self.E_, self.A_ = float(np.exp(best.x[0])), float(np.exp(best.x[1]))
        self.alpha_, self.k_ = float(best.x[2]), float(best.x[3])
        self.objective_ = float(best.fun) * delta**2
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The losses (models,) of models (parameters, streams)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        size, streams = _columns(X)
        effective = size / BILLION * (self.k_ * np.log(streams) + 1)
        return self.E_ + (self.A_ / effective) ** self.alpha_

    def equivalent(self, streams: float) -> float:
        """How many times the parameters a model of one stream needs for the same loss: k ln P + 1."""
        check_is_fitted(self)
        return self.k_ * float(np.log(checks.number("streams", streams, low=1))) + 1

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.target_tags.positive_only = True
        tags.regressor_tags.poor_score = True  # of anything that is no scaling law
        return tags


def huber_objective(
    point: np.ndarray, ln_size: np.ndarray, ln_streams: np.ndarray, wanted: np.ndarray, delta: float
) -> tuple[float, np.ndarray]:
    """The sum of Huber losses over delta², and its gradient, at `point` = (ln E, ln A, alpha, k).

    Without the division L-BFGS-B would stop at once: the sum is of the order of 1e-5.
    """
    ln_e, ln_a, alpha, k = point
    gain = np.log1p(k * ln_streams)
    reach = ln_a - ln_size - gain
    power = np.exp(np.minimum(alpha * reach, 50.0))
    floor = np.exp(ln_e)
    loss = floor + power
    error = (np.log(loss) - wanted) / delta
    small = np.abs(error) <= 1
    value = np.where(small, error**2 / 2, np.abs(error) - 0.5).sum()
    slope = np.clip(error, -1, 1) / (delta * loss)  # d value / d loss
    gradient = np.array(
        [
            (slope * floor).sum(),
            (slope * power * alpha).sum(),
            (slope * power * reach).sum(),
            -(slope * power * alpha * ln_streams / (1 + k * ln_streams)).sum(),
        ]
    )
    return float(value), gradient


def starting_points(least: float) -> np.ndarray:
    """The grid (480, 4) of (ln E, ln A, alpha, k), for losses of `least` and more."""
    floors = np.log(least) + np.log([0.2, 0.5, 0.8, 0.95])
    grid = np.meshgrid(floors, [-12.0, -8.0, -4.0, -2.0, 0.0, 2.0], [0.1, 0.2, 0.5, 1.0, 1.5], [0.1, 0.3, 0.5, 0.8])
    return np.stack([axis.ravel() for axis in grid], 1)


def _columns(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and streams, checked."""
    if X.shape[1] != 2:
        raise ValueError(f"X must have 2 columns, parameters and streams, got n_features={X.shape[1]}")
    check_non_negative(X, "ParallelScalingLaw")
    size, streams = X[:, 0], X[:, 1]
    if not (size > 0).all():
        raise ValueError(f"X must hold numbers of parameters above 0 in its first column, got {size.min():g}")
    if not (streams >= 1).all():
        raise ValueError(f"X must hold at least one stream in its second column, got {streams.min():g}")
    return size, streams


def averaged_excess(streams: float, correlation: float) -> float:
    """What is left of a model's excess loss when `streams` predictions are averaged whose errors correlate by `correlation`.

    ((P - 1) rho + 1) / P: nothing is gained at rho 1, and 1 / P is left at rho 0. The paper's reason to expect a law in P.
    Raises ValueError for streams below 1 and a correlation outside [-1 / (P - 1), 1], which P errors cannot have.

    >>> averaged_excess(4, 1.0), averaged_excess(4, 0.0)
    (1.0, 0.25)
    """
    streams = checks.number("streams", streams, low=1)
    least = -1.0 if streams <= 2 else -1 / (streams - 1)
    correlation = checks.number("correlation", correlation, low=least, high=1)
    return ((streams - 1) * correlation + 1) / streams
