"""One task from its right programs and its synthesisers to the references that samples are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, Protocol

from assay import checks
from assay.methods.code.evalperf.clustering import (
    REFERENCE_SPLIT,
    Filters,
    Reference,
    Suitability,
    percentile,
    references,
    suitability,
)
from assay.methods.code.evalperf.inputs import (
    Args,
    Sampled,
    Stops,
    Synthesiser,
    SynthesiserError,
    as_args,
    choose_input,
    sample_inputs,
)


class Outcome(Protocol):
    """One run of a program: `state` is "returned", "time" and "memory" where it gave up, or anything else; `cost`, above 0, None unless it
    returned."""

    @property
    def state(self) -> str: ...
    @property
    def cost(self) -> float | None: ...


Run = Callable[[str, Args], Sequence[Outcome]]
"""Runs a program on the arguments: one outcome a repeat."""


@dataclass(frozen=True)
class Curated:
    """What became of a task: every synthesiser's sampling, the input that was chosen, the profiles on it, and whether it passes.

    `profiles` are the costs of each right program, one a repeat, in the order of `programs`; without an input there are no `references`.
    """

    programs: tuple[str, ...]
    sampled: tuple[Sampled, ...]
    chosen: Sampled | None
    profiles: tuple[tuple[float, ...], ...] | None
    suitability: Suitability
    references: tuple[Reference, ...]


def curate(
    programs: Mapping[str, str],
    synthesisers: Iterable[Synthesiser],
    run: Run,
    *,
    canonical: str = "canonical",
    valid: Callable[[Args], bool] = lambda args: True,
    stops: Stops = Stops(),
    keep: Literal["all", "last"] = "all",
    filters: Filters = Filters(),
    split: float = REFERENCE_SPLIT,
) -> Curated:
    """Sample inputs, choose one, filter the task, and cluster its right programs (texts by name, one of them `canonical`).

    `run(program, args)` runs a text and returns an outcome for each repeat; all of them must return for the program to have finished, and
    a candidate's cost is the median of the canonical program's. Every input with which the reference finished is a candidate; with
    `keep="last"`, as released, only the last one of each synthesiser: a task with a right program that is much slower than the canonical
    one has no input then.
    """
    checks.choice("keep", keep, ("all", "last"))
    if canonical not in programs:
        raise ValueError(f"canonical must be one of {', '.join(programs)}, got {canonical!r}")
    sampled = sample_inputs(synthesisers, lambda args: _ended(run(programs[canonical], args)), valid, stops)
    candidates = [one for one in sampled if one.args is not None]
    if keep == "all":
        candidates += [again for one in candidates for scale in one.smaller() if (again := _at(one, scale)) is not None]
    costs = [_median(_profile(run(programs[canonical], one.args))) for one in candidates if one.args is not None]
    profiled: dict[int, tuple[tuple[float, ...], ...]] = {}
    asked = list(programs)

    def all_finish(index: int) -> bool:
        found = profiles_on({name: programs[name] for name in asked}, candidates[index].args or (), run)
        if isinstance(found, str):  # what does not finish here is asked first on the next candidate
            asked.insert(0, asked.pop(asked.index(found)))
            return False
        profiled[index] = tuple(found[name] for name in programs)
        return True

    best = choose_input(costs, all_finish)
    profiles = None if best is None else profiled[best]
    levels = () if profiles is None else references([fmean(p) for p in profiles], split=split, noise=filters.noise)
    chosen = None if best is None else candidates[best]
    return Curated(tuple(programs), tuple(sampled), chosen, profiles, suitability(profiles, filters), levels)


def profiles_on(programs: Mapping[str, str], args: Args, run: Run) -> dict[str, tuple[float, ...]] | str:
    """The costs of each program on an input, one a repeat; the name of the first that does not finish, if there is one."""
    found = {}
    for name, text in programs.items():
        profile = _profile(run(text, args))
        if profile is None:
            return name
        found[name] = profile
    return found


def _at(one: Sampled, scale: int) -> Sampled | None:
    """The same sampling with the input of a smaller scale; None where the synthesiser, which made it once, gives up now."""
    try:
        return replace(one, args=as_args(one.synthesise(scale)), scale=scale)
    except (TimeoutError, MemoryError, SynthesiserError):
        return None


def _ended(outcomes: Sequence[Outcome]) -> str:
    """How the repeats ended: "returned", or how the first that did not."""
    return next((one.state for one in outcomes if one.state != "returned"), "returned")


def _profile(outcomes: Sequence[Outcome]) -> tuple[float, ...] | None:
    """The costs of the repeats; None where one of them has none."""
    costs = [one.cost for one in outcomes if one.state == "returned" and one.cost is not None]
    return tuple(costs) if costs and len(costs) == len(outcomes) else None


def _median(profile: tuple[float, ...] | None) -> float | None:
    return None if profile is None else percentile(profile, 50)
