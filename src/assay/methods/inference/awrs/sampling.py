"""One token under a constraint: adaptive rejection, and weights whose mean is the allowed mass (arXiv 2504.05410, section 3).

A language model gives log-probabilities over V tokens, a test says which of them may follow. A draw returns a token x and a weight
w with E[w 1{x = t}] = p(t) for every allowed t and 0 for the others, so that E[w] is the mass of the allowed tokens. Locally the
tokens follow the model's distribution over the allowed ones; the weights are what a particle filter needs to correct that this is
decided token by token. Everything is computed in log space, and a weight of zero is -inf, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay import checks

Floats = NDArray[np.float64]
Test = Callable[[int], bool]
Variant = Literal["paper", "recursive", "geometric", "as_released", "masking", "twisted"]
VARIANTS: tuple[Variant, ...] = ("paper", "recursive", "geometric", "as_released", "masking", "twisted")
GEOMETRIC_FROM = (
    2 / 3
)  # `as_released`: with a token at least this probable the geometric form needs fewer than two calls


@dataclass(frozen=True)
class Draw:
    """A token with its log weight; None and -inf where none was accepted. `calls` counts evaluations of the test."""

    token: int | None
    log_weight: float
    calls: int
    rejected: tuple[int, ...] = ()


def draw(
    log_p: Tensor | Floats,
    test: Test,
    rng: np.random.Generator,
    *,
    variant: Variant = "paper",
    accepts: int = 2,
    max_rejections: int | None = None,
) -> Draw:
    """Draw a token x that `test` accepts, with a weight w for which E[w 1{x = t}] = exp(log_p[t]) over the accepted tokens t.

    `log_p` (V,) holds log-probabilities in nats; -inf rules a token out untested. They need not add up to one: the weights are in the
    same mass, so that tokens pruned beforehand need no correction. `test` must always say the same of a token; it is never
    asked twice about one in a draw, so there are at most V calls.

    - "paper": tokens in the order of Gumbel keys until one is accepted (rejected: R1), then a second round over all that is not
      rejected until a second acceptance; w = (1 - p(R1)) / (n + 1) with n the rejections of both rounds.
    - "recursive": one more token is tested behind the first accepted one; w = 1 - p(R1) if that is accepted too, else p(x). Varies
      less where little is allowed, a little more where nearly everything is.
    - "geometric": draws with replacement, of which those that meet a rejected token again are only counted, until `accepts` are
      accepted; w = (accepts - 1) / (draws - 1). Cheap where one token is very probable.
    - "as_released": the choice of the authors' library between the last two.
    - "masking": every token is tested; w is exactly the allowed mass. The baseline.
    - "twisted": one token is drawn and tested, w is 1 or 0. The cheapest, with the largest variance.

    `max_rejections` bounds the rejections of "recursive", "geometric" and "as_released". They stay unbiased, with more weights of zero.

    Raises TypeError or ValueError for log-probabilities that are no vector of floats or hold NaN or +inf, a test that is no function, an
    unknown variant, `accepts` below 2 and a bound that the variant does not take.

    When NOT to use it: where every token's verdict is cheap to have at once (a compiled grammar's mask).

    >>> rng = np.random.default_rng(0)
    >>> found = draw(np.log([0.5, 0.3, 0.2]), lambda token: token != 0, rng)
    >>> found.token in (1, 2), 0 < math.exp(found.log_weight) <= 1
    (True, True)
    """
    checks.choice("variant", variant, VARIANTS)
    accepts = checks.whole("accepts", accepts, low=2)
    if not callable(test):
        raise TypeError(f"test must be a function of a token, got {checks.shown(test)}")
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {checks.shown(rng)}")
    if max_rejections is not None:
        max_rejections = checks.whole("max_rejections", max_rejections, low=1)
        if variant in ("paper", "masking", "twisted"):
            raise ValueError(f"max_rejections must be None for variant {variant!r}, got {max_rejections}")
    proposals = Proposals(vector("log_p", log_p), rng)
    if proposals.log_total == -math.inf:
        return Draw(None, -math.inf, 0)
    tested = _Tested(test)
    token, log_weight, rejected = estimate(proposals, tested, variant, accepts, max_rejections)
    return Draw(token, log_weight + proposals.log_total, tested.calls, tuple(rejected))


class Source(Protocol):
    """What the estimators ask of a distribution; `Proposals` is one."""

    @property
    def log_p(self) -> Floats: ...
    def walk(self, without: Sequence[int] = ()) -> Iterator[int]: ...
    def log_rest(self, without: Sequence[int]) -> float: ...
    def rest(self) -> Rest: ...
    def failures(self, log_success: float) -> float: ...


class Rest:
    """The mass that is left of a distribution while tokens are taken out of it one by one."""

    def __init__(self, log_p: Floats) -> None:
        self._left, self._summed, self._share = log_p.copy(), 0.0, 1.0

    def take(self, token: int) -> None:
        self._share -= math.exp(self._left[token] - self._summed)
        self._left[token] = -np.inf
        if self._share < 0.5:  # summed anew whenever it has halved, so that no difference loses its digits
            self._summed, self._share = log_sum(self._left), 1.0

    @property
    def log(self) -> float:
        return self._summed + math.log(self._share)


class Proposals:
    """A distribution over tokens that is drawn from without replacement. `log_total` is the mass it had before it was normalised."""

    def __init__(self, log_p: Floats, rng: np.random.Generator) -> None:
        self.log_total = log_sum(log_p)
        self.log_p = log_p - self.log_total if self.log_total > -math.inf else log_p
        self._rng = rng

    def walk(self, without: Sequence[int] = ()) -> Iterator[int]:
        """The tokens in a fresh random order: each is drawn from the distribution without those before it and without `without`."""
        keys = gumbel_keys(self.log_p, self._rng)
        keys[list(without)] = -np.inf
        return descending(keys)

    def log_rest(self, without: Sequence[int]) -> float:
        """log(1 - p(without)), accurate also where hardly anything is left."""
        taken = np.asarray(without, dtype=np.int64)
        log_mass = log_sum(self.log_p[taken])
        if log_mass < -math.log(2):
            return log1mexp(log_mass)
        left = self.log_p.copy()
        left[taken] = -np.inf
        return log_sum(left)

    def rest(self) -> Rest:
        """The same, token by token."""
        return Rest(self.log_p)

    def failures(self, log_success: float) -> float:
        """How often something of that log-probability fails before it succeeds, at random."""
        rate = -math.log1p(-math.exp(log_success)) if log_success < 0 else math.inf
        return float(np.floor(self._rng.standard_exponential() / rate)) if rate > 0 else math.inf


class _Tested:
    """A test that remembers what it said, and counts how often it was asked."""

    def __init__(self, test: Test) -> None:
        self._test, self._known = test, dict[int, bool]()

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = checks.flag("what test returns", self._test(token))
        return self._known[token]

    @property
    def calls(self) -> int:
        return len(self._known)


Estimate = tuple[int | None, float, list[int]]  # token, log weight, rejected


def estimate(p: Source, test: Test, variant: Variant, accepts: int, budget: int | None) -> Estimate:
    """One draw from a normalised distribution by `variant` (see `draw`)."""
    if variant == "as_released":
        geometric = accepts > 2 or float(p.log_p.max()) >= math.log(GEOMETRIC_FROM)
        variant = "geometric" if geometric else "recursive"
    if variant == "paper":
        return two_rounds(p, test)
    if variant == "recursive":
        return recursive(p, test, budget)
    if variant == "geometric":
        return geometric_runs(p, test, accepts, budget)
    if variant == "masking":
        return masked(p, test)
    token = next(p.walk())
    return (token, 0.0, []) if test(token) else (None, -math.inf, [token])


def two_rounds(p: Source, test: Test) -> Estimate:
    """The paper's estimator."""
    rejected: list[int] = []
    token = _first_accepted(p.walk(), test, rejected)
    if token is None:
        return None, -math.inf, rejected
    log_rest = p.log_rest(rejected)
    _first_accepted(p.walk(rejected), test, rejected)  # `token` may come again: known, so without a call
    return token, log_rest - math.log(len(rejected) + 1), rejected


def recursive(p: Source, test: Test, budget: int | None = None) -> Estimate:
    """Z = q + (1 - q) Z', where q is the next token's probability among those left and Z' the allowed mass behind it.

    Along the rejections of one pass the factors 1 - q multiply to 1 - p(R1). At the first acceptance Z' is estimated by one more token.
    With one rejection left that token is not tested: the weight would be zero without it, and is 1 - p(R1) with it.
    """
    rejected: list[int] = []
    walk = p.walk()
    for token in walk:
        if test(token):
            log_rest = p.log_rest(rejected)
            following = None if len(rejected) + 1 == budget else next(walk, None)
            if following is None or test(following):
                return token, log_rest, rejected
            return token, float(p.log_p[token]), [*rejected, following]
        rejected.append(token)
        if len(rejected) == budget:
            break
    return None, -math.inf, rejected


def geometric_runs(p: Source, test: Test, accepts: int = 2, budget: int | None = None) -> Estimate:
    """With replacement, as if rejected tokens could come again: how often they would have is a geometric number.

    The first acceptance is as likely to have been any of the draws but the last, whatever ended the run: so the weight is the
    share of acceptances among those.
    """
    rejected: list[int] = []
    token, accepted, refused = None, 0, 0.0
    walk, rest = p.walk(), p.rest()
    while accepted < accepts:
        if rejected:
            if rest.log == -math.inf:
                return None, -math.inf, rejected
            refused += p.failures(rest.log)
            if budget is not None and refused >= budget:
                refused = budget
                break
        following = next(walk, None)
        if following is None:
            return None, -math.inf, rejected
        if test(following):
            token = following if token is None else token
            accepted += 1
            walk = p.walk(rejected)
        else:
            rejected.append(following)
            rest.take(following)
            refused += 1
            if refused == budget:
                break
    if token is None:
        return None, -math.inf, rejected
    return token, math.log(min(accepts - 1, accepted)) - math.log(accepted + refused - 1), rejected


def masked(p: Source, test: Test) -> Estimate:
    """The baseline: every token is tested, and the weight is what they have in all."""
    support = np.flatnonzero(p.log_p > -np.inf)
    verdicts = np.fromiter((test(int(token)) for token in support), dtype=bool, count=len(support))
    rejected = support[~verdicts].tolist()
    token = next(p.walk(rejected), None)
    if token is None:
        return None, -math.inf, rejected
    return token, log_sum(p.log_p[support[verdicts]]), rejected


def _first_accepted(walk: Iterator[int], test: Test, rejected: list[int]) -> int | None:
    """The first accepted token of a walk; those before it are added to `rejected`."""
    for token in walk:
        if test(token):
            return token
        rejected.append(token)
    return None


# ------------------------------------------------------------------------------------------------------------ numbers


def gumbel_keys(log_p: Floats, rng: np.random.Generator) -> Floats:
    """log p plus Gumbel noise: in decreasing order they are draws without replacement. -inf stays -inf."""
    noise = np.maximum(rng.standard_exponential(len(log_p)), np.finfo(np.float64).tiny)
    keys: Floats = log_p - np.log(noise)
    return keys


def descending(keys: Floats) -> Iterator[int]:
    """Positions from the largest key to the smallest, those of -inf left out. No more is sorted than is walked.

    >>> list(descending(np.array([0.5, -np.inf, 2.0, 1.0])))
    [2, 3, 0]
    """
    first = int(keys.argmax())
    if keys[first] == -np.inf:
        return
    yield first
    keys = keys.copy()
    keys[first] = -np.inf
    for size in (16, 512, len(keys)):
        top = np.arange(len(keys)) if size >= len(keys) else np.sort(np.argpartition(keys, -size)[-size:])
        for place in top[np.argsort(-keys[top], kind="stable")]:
            if keys[place] == -np.inf:
                return
            yield int(place)
        keys[top] = -np.inf


def log_sum(values: Floats) -> float:
    """log of the sum of exp(values); -inf for none."""
    most = float(values.max()) if len(values) else -math.inf
    return most if most == -math.inf else most + math.log(float(np.exp(values - most).sum()))


def log1mexp(x: float) -> float:
    """log(1 - exp(x)) for x <= 0; -inf at 0, and for what rounding has put just above it.

    >>> round(log1mexp(-1e-3), 4), log1mexp(0.0)
    (-6.9083, -inf)
    """
    if x >= 0:
        return -math.inf
    return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))


def vector(name: str, value: Any) -> Floats:
    """A copy of a vector of log-probabilities or logits, as float64: not empty, no NaN, no +inf. Raises TypeError or ValueError."""
    if isinstance(value, Tensor):
        checks.tensor(name, value, ndim=1)
        found = value.detach().to("cpu", torch.float64, copy=True).numpy()
    else:
        found = np.asarray(value)
        if found.dtype.kind != "f":
            raise TypeError(f"{name} must hold floating-point numbers, got {checks.shown(value)}")
        if found.ndim != 1 or not found.size:
            raise ValueError(f"{name} must be a vector of at least one number, got shape {found.shape}")
        found = found.astype(np.float64)
    if not (found < np.inf).all():  # NaN is below nothing
        raise ValueError(f"{name} must be below +inf and no NaN, got {int((~(found < np.inf)).sum())} such values")
    return found
