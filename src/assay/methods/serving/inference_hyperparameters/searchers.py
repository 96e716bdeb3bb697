"""Proposing settings (grid, random, TPE, halving), running them, and remembering what failed."""

from __future__ import annotations

import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from assay import checks
from assay.errors import MissingError
from assay.methods.serving.inference_hyperparameters.space import Categorical, Int, Parameter, Params, Space, key_of
from assay.methods.serving.inference_hyperparameters.trials import (
    Objective,
    Outcome,
    SearchResult,
    Status,
    Trial,
    finite,
    mean_of,
)
from assay.paths import atomic_file

Search = Literal["tpe", "random", "grid", "halving"]


class Searcher(Protocol):
    """Proposes settings and learns their values; None as a value means failed, None as a proposal means there are no more."""

    def ask(self) -> Params | None: ...
    def tell(self, params: Params, value: float | None) -> None: ...


class GridSearcher:
    """Every setting of the grid once, in an order shuffled by the seed, so that drift does not look like a slope."""

    def __init__(self, space: Space, *, seed: int = 0, levels: int = 5):
        self._waiting = list(space.grid(levels))
        random.Random(seed).shuffle(self._waiting)

    def ask(self) -> Params | None:
        return self._waiting.pop() if self._waiting else None

    def tell(self, params: Params, value: float | None) -> None:
        pass


class RandomSearcher:
    """Random settings; the search makes sure that none is tried twice."""

    def __init__(self, space: Space, *, seed: int = 0):
        self._space, self._rng = space, random.Random(seed)

    def ask(self) -> Params | None:
        return self._space.sample(self._rng)

    def tell(self, params: Params, value: float | None) -> None:
        pass


class TpeSearcher:
    """Tree-structured Parzen estimator, by Optuna. A failure is reported as half the worst value seen, so that it is avoided.

    After `startup` settings every second proposal is a neighbour of the best one, one parameter changed (our choice): on a few
    dozen trials that finds sharp peaks far more often than the estimator alone.
    Raises MissingError without Optuna.
    """

    def __init__(self, space: Space, *, seed: int = 0, startup: int = 8):
        try:
            import optuna
        except ImportError:
            raise MissingError("TPE search needs Optuna: pip install 'assay[search]'; or search by 'halving'") from None
        self._optuna, self._space = optuna, space
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        optuna.logging.set_verbosity(level)
        self._asked: dict[str, Any] = {}
        self._worst = math.inf
        self._best: tuple[float, Params] | None = None
        self._told: set[str] = set()
        self._startup, self._rng = startup, random.Random(seed)

    def ask(self) -> Params | None:
        if self._best is not None and len(self._told) >= self._startup and len(self._told) % 2:
            near = [params for params in self._space.neighbours(self._best[1]) if key_of(params) not in self._told]
            if near:
                return self._rng.choice(near)
        trial = self._study.ask()
        params = self._space.build(lambda parameter: self._suggest(trial, parameter))
        self._asked[key_of(params)] = trial
        return params

    def tell(self, params: Params, value: float | None) -> None:
        self._told.add(key_of(params))
        if value is not None:
            self._worst = min(self._worst, value)
            if self._best is None or value > self._best[0]:
                self._best = (value, params)
        told = value if value is not None else 0.0 if self._worst is math.inf else self._worst - abs(self._worst) / 2
        trial = self._asked.pop(key_of(params), None)
        if trial is None:  # proposed by somebody else
            self._study.enqueue_trial(self._encoded(params))
            trial = self._study.ask()
            self._space.build(lambda parameter: self._suggest(trial, parameter))
        self._study.tell(trial, told)

    def _suggest(self, trial: Any, parameter: Parameter) -> Any:
        if isinstance(parameter, Categorical):
            return parameter.choices[trial.suggest_categorical(parameter.name, list(range(len(parameter.choices))))]
        suggest = trial.suggest_int if isinstance(parameter, Int) else trial.suggest_float
        return suggest(parameter.name, parameter.low, parameter.high, log=parameter.log)

    def _encoded(self, params: Params) -> Params:
        kinds = {parameter.name: parameter for parameter in self._space.parameters}
        return {
            name: kind.choices.index(value) if isinstance(kind := kinds[name], Categorical) else value
            for name, value in params.items()
        }


def search(
    space: Space,
    objective: Objective,
    *,
    method: Search = "tpe",
    trials: int = 30,
    seed: int = 0,
    confirm: int = 3,
    levels: int = 5,
    limits: Mapping[str, float] | None = None,
    max_mismatch: float = 0.0,
    journal: str | Path | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Find the setting of largest value. Deterministic for a deterministic objective and a seed.

    Trial 0 is the default setting. "grid" tries the whole grid (`levels` values a range) whatever `trials` says; "tpe" and
    "random" try `trials` settings in all; "halving" starts `trials` random settings on a small share of the workload and
    keeps the best third for three times as much. Then the three best, the default, and whatever comes to lead are measured again
    until each has `confirm` measurements on the whole workload; the largest mean wins, so nothing evaluated was better. What is
    reported of it is measured after that: `confirm` fresh measurements of it and of the default, in turns.

    A setting is rejected when a metric exceeds its entry in `limits` ({"p95_seconds": 2.0}: throughput subject to latency) or
    its `mismatch_rate` exceeds `max_mismatch` (another batch size or dtype changes the rounding, and with it a few outputs).
    If the objective raises, the trial fails; out of memory also rules out all settings that differ only in having at least as much
    of every `more_memory` parameter.
    With a `journal` file every trial is kept; the same search continues from it where it was killed.

    Raises ValueError or TypeError for bad arguments, before anything is measured, ValueError for a journal of another search,
    RuntimeError when no setting was accepted.

    >>> space = Space([Int("batch_size", 1, 8, default=1, grid=(1, 4, 8))])
    >>> search(space, lambda params, **how: 10.0 - abs(params["batch_size"] - 4), method="grid").best_params
    {'batch_size': 4}
    """
    checks.choice("method", method, ("tpe", "random", "grid", "halving"))
    trials, confirm = checks.whole("trials", trials, low=1), checks.whole("confirm", confirm, low=1)
    levels, seed = checks.whole("levels", levels, low=2), checks.whole("seed", seed)
    max_mismatch = checks.number("max_mismatch", max_mismatch, low=0, high=1)
    limits = {name: checks.number(f"limit of {name}", limit) for name, limit in (limits or {}).items()}
    run = _Run(space, objective, seed, limits, max_mismatch, _Journal(journal), progress)
    default = space.default()
    first = run.evaluate(default)
    if method == "halving":
        _halve(space, run, trials, seed)
    else:
        searcher: Searcher
        if method == "grid":
            searcher = GridSearcher(space, seed=seed, levels=levels)
        else:
            searcher = (TpeSearcher if method == "tpe" else RandomSearcher)(space, seed=seed)
        searcher.tell(default, first.value if first.status == "ok" else None)
        _explore(run, searcher, None if method == "grid" else trials)
    _confirm(run, default, confirm)
    best = _measured_again(run, default, confirm)
    final = [[t.value for t in run.trials if t.final and t.params == params] for params in (best, default)]
    return SearchResult(
        trials=tuple(run.trials),
        best_params=best,
        best=mean_of(_numbers(final[0])),
        default_params=default,
        default=mean_of(_numbers(final[1])) if key_of(default) in run.accepted() else None,
    )


def _numbers(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _measured_again(run: _Run, default: Params, times: int) -> Params:
    """Choose the setting of the largest mean and measure it and the default freshly, in turns; one that then fails is not chosen."""
    while True:
        accepted = run.accepted()
        if not accepted:
            problems = "; ".join(dict.fromkeys(trial.error for trial in run.trials if trial.error))
            raise RuntimeError(f"no setting was accepted: {problems}")
        best = max(accepted.values(), key=lambda entry: np.mean(entry[1]))[0]
        pair = [best] if best == default or key_of(default) not in accepted else [default, best]
        for turn in range(times):
            for params in pair if turn % 2 == 0 else reversed(pair):
                run.evaluate(params, final=True)
        if all(key_of(params) in run.accepted() for params in pair):
            return best
        run.trials = [replace(t, final=False) if t.final and t.status == "ok" else t for t in run.trials]


@dataclass
class _Run:
    """The trials so far, and what they taught."""

    space: Space
    objective: Objective
    seed: int
    limits: dict[str, float]
    max_mismatch: float
    journal: _Journal
    progress: Callable[[Trial], None] | None
    trials: list[Trial] = field(default_factory=list)

    def evaluate(self, params: Params, fidelity: float = 1.0, *, final: bool = False) -> Trial:
        number = len(self.trials)
        trial = self.journal.replay(number, params, fidelity) or self._measured(number, params, fidelity)
        return self._record(replace(trial, final=final))

    def skip(self, params: Params, reason: str) -> None:
        self._record(Trial(len(self.trials), params, "skipped", error=reason))

    def known(self, params: Params) -> Trial | None:
        """The first trial of exactly this setting on the whole workload."""
        return next((t for t in self.trials if t.params == params and t.fidelity == 1.0), None)

    def why_not(self, params: Params) -> str:
        """Why `params` should not be run: a constraint, or a failure that it would repeat."""
        if reason := self.space.infeasible(params):
            return reason
        growing = {parameter.name for parameter in self.space.parameters if parameter.more_memory}
        for trial in self.trials:
            if trial.status == "out of memory" and trial.params.keys() == params.keys():
                rest_equal = all(params[n] == v for n, v in trial.params.items() if n not in growing)
                if rest_equal and all(params[n] >= trial.params[n] for n in growing & params.keys()):
                    return f"would need at least as much memory as trial {trial.number}, which ran out of it"
            if trial.status == "failed" and trial.params == params:
                return f"failed as trial {trial.number}"
        return ""

    def accepted(self) -> dict[str, tuple[Params, list[float]]]:
        """Settings and the values they are chosen by, on the whole workload; a setting with any failed or rejected trial is out."""
        found: dict[str, tuple[Params, list[float]]] = {}
        out = {key_of(t.params) for t in self.trials if t.status in ("rejected", "failed", "out of memory")}
        for trial in self.trials:
            if trial.status == "ok" and not trial.final and trial.fidelity == 1.0 and key_of(trial.params) not in out:
                assert trial.value is not None
                found.setdefault(key_of(trial.params), (trial.params, []))[1].append(trial.value)
        return found

    def _record(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        self.journal.keep(trial)
        if self.progress is not None:
            self.progress(trial)
        return trial

    def _measured(self, number: int, params: Params, fidelity: float) -> Trial:
        start = time.perf_counter()
        try:
            found = self.objective(dict(params), fidelity=fidelity, seed=self.seed * 1_000_003 + number)
            outcome = _checked(found)  # here: what cannot be understood fails this trial, not the search
        except Exception as error:
            status: Status = "out of memory" if is_out_of_memory(error) else "failed"
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            return Trial(number, params, status, None, {}, text, time.perf_counter() - start, fidelity)
        seconds = time.perf_counter() - start
        if not math.isfinite(outcome.value):
            return Trial(number, params, "failed", None, {}, f"value {outcome.value}", seconds, fidelity)
        if (absent := sorted(set(self.limits) - set(outcome.metrics))) and number == 0:
            raise ValueError(
                f"limits name {absent[0]!r}, which the objective does not report; it has {', '.join(outcome.metrics)}"
            )
        reason = self._broken(outcome.metrics)
        status = "rejected" if reason else "ok"
        return Trial(number, params, status, outcome.value, dict(outcome.metrics), reason, seconds, fidelity)

    def _broken(self, metrics: Mapping[str, Any]) -> str:
        for name, limit in {**self.limits, "mismatch_rate": self.max_mismatch}.items():
            if name not in metrics:
                if name in self.limits:
                    return f"{name} was not reported"
                continue
            value = metrics[name]
            if not isinstance(value, int | float) or not value <= limit:  # NaN is within no limit
                return f"{name} {value:.4g} exceeds {limit:.4g}" if isinstance(value, float) else f"{name} is {value!r}"
        return ""


def _checked(found: Any) -> Outcome:
    """What an objective returned, in plain Python numbers. Raises TypeError for anything else than a number or an Outcome."""
    value, metrics = (found.value, found.metrics) if isinstance(found, Outcome) else (found, {})
    value = (
        value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
    )  # NumPy's, torch's
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"the objective must return a number or an Outcome of one, got {checks.shown(found)}")
    plain = {name: item.item() if hasattr(item, "item") else item for name, item in metrics.items()}
    json.dumps(plain)  # the journal keeps them
    return Outcome(float(value), plain)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, CUDA's error of that name, and the messages of torch's allocators."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("out of memory", "not enough memory", "t allocate"))
    )


def _explore(run: _Run, searcher: Searcher, wanted: int | None) -> None:
    """Let the searcher propose until `wanted` settings have been tried, nothing is left, or it only repeats itself."""
    misses = 0
    while (wanted is None or sum(t.status != "skipped" for t in run.trials) < wanted) and misses < 200:
        params = searcher.ask()
        if params is None:
            return
        known = run.known(params)
        reason = "" if known else run.why_not(params)
        if known is None and not reason:
            trial = run.evaluate(params)
            searcher.tell(params, trial.value if trial.status == "ok" else None)
            misses = 0
            continue
        misses += wanted is not None
        if reason and not any(t.status == "skipped" and t.params == params for t in run.trials):
            run.skip(params, reason)
        searcher.tell(params, known.value if known and known.status == "ok" else None)


def _halve(space: Space, run: _Run, starters: int, seed: int, eta: int = 3) -> None:
    """Successive halving: fewer and fewer settings on more and more of the workload, the last ones on all of it."""
    rng = random.Random(seed)
    settings: list[Params] = []
    for _ in range(200 * starters):
        if len(settings) == starters:
            break
        params = space.sample(rng)
        if params not in settings and params != space.default() and not run.why_not(params):
            settings.append(params)
    rungs = max(0, math.ceil(math.log(max(len(settings), 1), eta) - 1e-9))
    for rung in range(rungs, -1, -1):
        results = []
        for params in settings:
            if reason := run.why_not(params):
                run.skip(params, reason)
                continue
            results.append(run.evaluate(params, float(eta) ** -rung))
        ranked = sorted((t for t in results if t.status == "ok"), key=lambda t: -(t.value or 0.0))
        settings = [trial.params for trial in ranked[: math.ceil(len(ranked) / eta)]]


def _confirm(run: _Run, default: Params, confirm: int) -> None:
    """Measure the three best and the default again, and go on until the leader has been measured often enough."""
    while True:
        accepted = run.accepted()
        ranked = sorted(accepted.values(), key=lambda entry: -np.mean(entry[1]))
        wanted = [*ranked[:3], *([accepted[key_of(default)]] if key_of(default) in accepted else [])]
        short = [params for params, values in wanted if len(values) < confirm]
        if not short:
            return
        for params in {key_of(params): params for params in short}.values():
            run.evaluate(params)


class _Journal:
    """Trials as JSON lines, one flushed to the disk after each; a torn last line is forgotten."""

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._kept: list[Trial] = []
        if self._path is not None and self._path.exists():
            whole = self._path.read_text().rpartition("\n")[0]
            try:
                self._kept = [Trial(**json.loads(line)) for line in whole.splitlines()]
            except (TypeError, ValueError) as error:
                raise ValueError(f"journal {str(path)!r} is not one of a search: {error}") from error
            with atomic_file(self._path) as temporary:
                temporary.write_text(whole + "\n" if whole else "")

    def replay(self, number: int, params: Params, fidelity: float) -> Trial | None:
        if number >= len(self._kept):
            return None
        kept = self._kept[number]
        if kept.params != params or kept.fidelity != fidelity:
            raise ValueError(f"journal {str(self._path)!r} belongs to another search: trial {number} was {kept.params}")
        return kept

    def keep(self, trial: Trial) -> None:
        if self._path is None or trial.number < len(self._kept):
            return
        with self._path.open("a") as file:
            file.write(json.dumps(finite(asdict(trial)), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
