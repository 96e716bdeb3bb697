"""Stress inputs: Python expressions that make a program work hard, accepted only if they keep its contracts."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from assay import checks
from assay.methods.code.coffe.programs import Args, Run, Unusable

WANTED = 5
"""Stress inputs a problem."""
SHOWN = {"function": 5, "file": 10}
"""Inputs of the pool that a generator is shown, by the level of the problem."""
AT_ONCE = 10
"""Inputs that one call may give."""
CALLS_EACH = 3
"""Calls for every input wanted."""
SCALE = 10_000
"""The largest size and number that an input should have."""
SEED = 1024
"""What chance starts from where an input is evaluated."""
SECONDS = 50.0
"""The paper's limit for one run of the program with its contracts; the limits of whoever runs it decide."""
Accepts = Callable[[Sequence["StressInput"]], Sequence[str]]
"""Why each input is not accepted; "" where it is."""


@dataclass(frozen=True)
class StressInput:
    """An input as text, so that a huge one is short.

    An "expression" evaluates to the tuple of arguments, with `random`, `math` and `string` at hand; a "program" (file-level problems)
    defines `generate_input()`, whose text is the one argument. Chance starts from `seed` every time: text and seed are the input.
    """

    text: str
    seed: int = SEED
    form: Literal["expression", "program"] = "expression"


class StressGenerator(Protocol):
    """Proposes stress inputs."""

    def inputs(self, code: str, seeds: Sequence[StressInput], number: int) -> Sequence[StressInput]:
        """Up to `number` inputs, large and costly, for `code` (the program with its contracts); `seeds` are valid ones.

        Raises Unusable for a text that holds none.
        """
        ...


@dataclass(frozen=True)
class StressTests:
    """`inputs` in the order of their acceptance; `proposed` counts all different ones, `refused` the reasons of those not taken."""

    inputs: tuple[StressInput, ...]
    proposed: int
    refused: Mapping[str, int]
    calls: int


def observed(args: Args) -> StressInput:
    """An input that a test gave, as an expression.

    >>> observed(([1.5, float("inf")], "a"))
    StressInput(text="([1.5, inf], 'a')", seed=1024, form='expression')
    """
    return StressInput(repr(tuple(args)))


def stress(
    generator: StressGenerator,
    code: str,
    seeds: Sequence[StressInput],
    accepts: Accepts,
    *,
    wanted: int = WANTED,
    calls: int | None = None,
    shown: int = SHOWN["function"],
    seed: int = SEED,
) -> StressTests:
    """Ask `generator` for inputs until `wanted` are accepted or `calls` (three for each that is wanted) are spent.

    `code` is the program with its contracts, `seeds` the pool to begin with: the inputs of the correctness tests. Each call sees `shown`
    of the pool by chance, and gives up to ten; accepted ones join the pool, a text that was seen before is passed over. `accepts`:
    `accepting`, or another rule.
    Raises ValueError without seeds. Fewer inputs than wanted are no error: `StressTests.inputs` says how many there are.
    When NOT to use it: as a test of correctness. Expected outputs come from the same program that filters.
    """
    wanted, shown = checks.whole("wanted", wanted, low=1), checks.whole("shown", shown, low=1)
    calls = CALLS_EACH * wanted if calls is None else checks.whole("calls", calls, low=1)
    if not seeds:
        raise ValueError("seeds must hold one input at least, got none")
    chance = random.Random(seed)
    pool = list(dict.fromkeys(seeds))
    known = set(pool)
    taken: list[StressInput] = []
    refused: Counter[str] = Counter()
    proposed = spent = 0
    while spent < calls and len(taken) < wanted:
        spent += 1
        try:
            given = generator.inputs(code, chance.sample(pool, min(shown, len(pool))), AT_ONCE)
        except Unusable:
            refused["no input in the answer"] += 1
            continue
        new = [one for one in dict.fromkeys(given) if one not in known][:AT_ONCE]
        known.update(new)
        proposed += len(new)
        for one, reason in zip(new, accepts(new), strict=True):
            if reason:
                refused[reason] += 1
            elif len(taken) < wanted:
                taken.append(one)
                pool.append(one)
    return StressTests(tuple(taken), proposed, dict(refused), spent)


# ------------------------------------------------------------------------------------------------------------------ evaluation

_EVALUATOR = """
import math, random, string

def value_of(text, seed, form):
    random.seed(seed)
    if form == "program":
        scope = {"__name__": "generated"}
        exec(text, scope)
        random.seed(seed)
        return (scope["generate_input"](),)
    names = {"math": math, "random": random, "string": string, "inf": math.inf, "nan": math.nan}
    return tuple(eval(text, names))
"""


def evaluated(run: Run, inputs: Sequence[StressInput]) -> list[Args | None]:
    """The arguments that each input stands for, evaluated by `run`: in a sandbox, for a model may have written it. None where it fails."""
    ended = run(_EVALUATOR, "value_of", [(one.text, one.seed, one.form) for one in inputs])
    return [tuple(one.value) if one.state == "returned" else None for one in ended]


def value_here(given: StressInput) -> Args:
    """The same in this process. ONLY for expressions that this package wrote (`Doubling`, `observed`): text is executed.

    >>> value_here(StressInput("(sorted(random.choices('ab', k=4)), 2)"))
    (['a', 'a', 'b', 'b'], 2)
    """
    if given.form != "expression":
        raise ValueError("given must be an expression: programs are evaluated in a sandbox")
    names: dict[str, Any] = {"math": math, "random": random.Random(given.seed), "inf": math.inf, "nan": math.nan}
    return tuple(eval(given.text, names))  # noqa: S307 - our own text


def accepting(
    run: Run,
    code: str,
    entry_point: str,
    *,
    cost: Callable[[Args], float] | None = None,
    least: float = 0.0,
) -> Accepts:
    """The paper's rule: an input is accepted when `code`, the right program with its contracts, runs on it to the end.

    An assert that fails, any other exception, and a limit of `run` (the paper's is 50 s) refuse it. With `cost` and `least` it must cost
    that much besides (our choice: what the median correctness test costs); measure the cost on the program WITHOUT contracts, which cost
    themselves.
    """

    def accepts(inputs: Sequence[StressInput]) -> list[str]:
        values = evaluated(run, inputs)
        known = [args for args in values if args is not None]
        ended = iter(run(code, entry_point, known) if known else ())
        reasons = []
        for args in values:
            if args is None:
                reasons.append("the text has no value")
                continue
            state = next(ended).state
            if state != "returned":
                reasons.append("a contract or the program refused it" if state == "raised" else state)
            elif cost is not None and not cost(args) >= least:
                reasons.append("too cheap")
            else:
                reasons.append("")
        return reasons

    return accepts
