"""Sequential Monte Carlo over sequences under a constraint: particles, their weights, and resampling (arXiv 2504.05410, section 4).

Choosing allowed tokens one by one favours beginnings that are easy to allow and hard to finish. The particles' weights, products
of what each token's draw returned, correct this: weighted particles stand for the model's distribution over all complete texts, and
the mean weight estimates, without bias, how probable it is that the model writes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from assay import checks
from assay.methods.inference.awrs.sampling import VARIANTS, Floats, Variant, draw, log_sum, vector
from assay.methods.inference.awrs.tokens import Position, Rules

Resampling = Literal["multinomial", "systematic"]
Finish = Literal["stop", "length", "dead"]


class Rows(Protocol):
    """A model running several sequences side by side. At first there is one row, behind the prompt."""

    @property
    def logits(self) -> Tensor:
        """(rows, vocab), of the next token of each row."""

    def advance(self, parents: list[int], tokens: list[int]) -> None:
        """The new rows are the old rows `parents`, in this order (some of them repeated, some gone), each followed by its token."""


@dataclass(frozen=True)
class Particle:
    """A particle in the end. `finish` is "stop" where an end token was drawn, "length" where it was forced at the limit (and
    weighed), "dead" where the weight is zero: no token was allowed, or the limit met an incomplete text."""

    tokens: tuple[int, ...]
    text: bytes
    log_weight: float
    finish: Finish


@dataclass(frozen=True)
class Particles:
    """Weighted sequences. exp(`log_marginal`) estimates, without bias, how probable it is that the model writes a complete text.

    `calls` counts evaluations of the constraint, `steps` passes of the model, `rows` sequences computed in all of them, `resampled`
    how often particles were resampled.
    """

    sequences: tuple[Particle, ...]
    log_marginal: float
    calls: int
    steps: int
    rows: int
    resampled: int

    @property
    def weights(self) -> Floats:
        """Normalised weights; all zero where no particle is left."""
        return normalised(np.array([one.log_weight for one in self.sequences]))

    @property
    def effective(self) -> float:
        """The effective number of particles, from 0 to their number."""
        return effective_number(np.array([one.log_weight for one in self.sequences]))

    @property
    def best(self) -> Particle | None:
        """The sequence with the most weight, over all particles that hold it; None where none is complete."""
        totals: dict[tuple[int, ...], float] = {}
        for one, weight in zip(self.sequences, self.weights.tolist(), strict=True):
            totals[one.tokens] = totals.get(one.tokens, 0.0) + weight
        most = max(self.sequences, key=lambda one: totals[one.tokens] if one.log_weight > -math.inf else -1.0)
        return most if most.log_weight > -math.inf else None


@dataclass
class _Walker:
    position: Position
    row: int = 0
    tokens: tuple[int, ...] = ()
    log_weight: float = 0.0
    finish: Finish | None = None
    critic: float = 0.0  # the critic's log potential of the text so far


def smc(
    model: Rows,
    rules: Rules,
    rng: np.random.Generator,
    *,
    particles: int,
    max_new_tokens: int,
    variant: Variant = "paper",
    accepts: int = 2,
    max_rejections: int | None = None,
    ess_threshold: float = 0.5,
    resampling: Resampling = "multinomial",
    temperature: float = 1.0,
    critic: Callable[[bytes], float] | None = None,
) -> Particles:
    """Run `particles` sequences to their ends, at most `max_new_tokens` tokens, and return them weighted.

    Each step draws every open particle's next token (see `draw` for `variant`, `accepts` and `max_rejections`) and multiplies its
    weight; where the effective number of particles falls below `ess_threshold` of their number they are resampled (0: never). At
    the limit the end token is forced, with its own probability as weight, or zero where the text is incomplete. `critic` gives a log
    potential of the text so far (-inf forbids it): the weights then stand for the model times its exponential. Particles with the same
    history share a row of the model, and all particles in the same state what is known of the constraint.

    The target is the model at `temperature`, without the tokens that spell nothing; their mass counts as forbidden.
    Raises TypeError or ValueError naming the argument.
    """
    particles = checks.whole("particles", particles, low=1)
    max_new_tokens = checks.whole("max_new_tokens", max_new_tokens, low=1)
    ess_threshold = checks.number("ess_threshold", ess_threshold, low=0, high=1)
    temperature = checks.number("temperature", temperature, above=0)
    checks.choice("variant", variant, VARIANTS)
    checks.choice("resampling", resampling, ("multinomial", "systematic"))
    begin = rules.start()
    shared = {begin.state: begin}
    calls = steps = resampled = 0
    first = _critic(critic, b"", rules)
    rows = 1
    alive: Finish | None = None if first > -math.inf else "dead"
    cloud = [_Walker(begin, log_weight=first, critic=first, finish=alive) for _ in range(particles)]
    while True:
        length = steps
        opened = [one for one in cloud if one.finish is None]
        if not opened:
            break
        log_p = {row: _log_probabilities(model.logits[row], rules, temperature) for row in {one.row for one in opened}}
        for one in opened:
            if length == max_new_tokens:
                _end(one, log_p[one.row], rules)
                continue
            found = draw(
                log_p[one.row],
                one.position.allows,
                rng,
                variant=variant,
                accepts=accepts,
                max_rejections=max_rejections,
            )
            one.log_weight += found.log_weight
            if found.token is None or one.log_weight == -math.inf:  # a weight may be too small for a float
                one.finish = "dead"
            elif found.token in rules.ends:
                one.finish = "stop"
            else:
                after = one.position.behind(found.token)
                one.position = shared.setdefault(after.state, after)
                one.tokens += (found.token,)
                potential = _critic(critic, rules.token_bytes.text(one.tokens), rules)
                one.log_weight += potential - one.critic
                one.critic = potential
                if one.log_weight == -math.inf:
                    one.finish = "dead"
        calls += sum(position.calls for position in shared.values())
        log_weights = np.array([one.log_weight for one in cloud])
        if length < max_new_tokens and 0 < effective_number(log_weights) < ess_threshold * particles:
            mean = log_sum(log_weights) - math.log(particles)
            chosen = resampled_indices(normalised(log_weights), rng, resampling)
            cloud = [replace(cloud[i], log_weight=mean) for i in chosen]
            resampled += 1
        opened = [one for one in cloud if one.finish is None]
        if not opened:
            break
        places: dict[tuple[int, int], int] = {}
        for one in opened:
            one.row = places.setdefault((one.row, one.tokens[-1]), len(places))
        model.advance([row for row, _ in places], [token for _, token in places])
        steps += 1
        rows += len(places)
        shared = {one.position.state: one.position for one in opened}
        for position in shared.values():
            position.calls = 0
    sequences = tuple(
        Particle(one.tokens, rules.token_bytes.text(one.tokens), one.log_weight, one.finish or "dead") for one in cloud
    )
    mean = log_sum(np.array([one.log_weight for one in cloud])) - math.log(particles)
    return Particles(sequences, mean, calls, steps, rows, resampled)


def _log_probabilities(logits: Tensor, rules: Rules, temperature: float) -> Floats:
    """Log-probabilities at a temperature, in which tokens that spell nothing are ruled out; their mass is not given to the others."""
    scores = vector("logits", logits) / temperature
    scores -= log_sum(scores)
    scores[rules.barred(len(scores))] = -np.inf
    return scores


def _end(one: _Walker, log_p: Floats, rules: Rules) -> None:
    """Force the end: its weight is its probability, where the text is complete."""
    ends = log_p[[token for token in rules.ends if token < len(log_p)]]
    one.log_weight += log_sum(ends) if one.position.complete else -math.inf
    one.finish = "length" if one.log_weight > -math.inf else "dead"


def _critic(critic: Callable[[bytes], float] | None, text: bytes, rules: Rules) -> float:
    if critic is None:
        return 0.0
    value = critic(text)
    if value == -math.inf:
        return value
    return checks.number("what critic returns", value)


def effective_number(log_weights: Floats) -> float:
    """(sum w)^2 / sum w^2: the number of equal weights that would vary as much; 0 where all are zero."""
    total = log_sum(log_weights)
    return math.exp(2 * total - log_sum(2 * log_weights)) if total > -math.inf else 0.0


def normalised(log_weights: Floats) -> Floats:
    """Weights that add up to one; zeros where there is nothing to add up."""
    total = log_sum(log_weights)
    weights: Floats = np.exp(log_weights - total) if total > -math.inf else np.zeros(len(log_weights))
    return weights


def resampled_indices(weights: Floats, rng: np.random.Generator, method: Resampling) -> list[int]:
    """As many indices as weights, each as often as its weight says in the mean; "systematic" varies least."""
    count = len(weights)
    if method == "multinomial":
        places = np.sort(rng.random(count))
    else:
        places = (rng.random() + np.arange(count)) / count
    edges = np.cumsum(weights)
    found: list[int] = np.searchsorted(edges, places * edges[-1], side="right").clip(max=count - 1).tolist()
    return found
