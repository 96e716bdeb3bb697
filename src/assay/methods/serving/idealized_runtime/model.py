"""The runtime model and its fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from assay import checks
from assay.paths import atomic_file

Run = tuple[int, int, float]  # prompt tokens, output tokens, seconds of one request
MethodName = Literal["idealized", "denoised"]
Slope = Literal["constant", "context"]
Variant = Literal["paper", "as_released"]


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted - measured| / measured over `cells` pairs of lengths (the fastest run of each)."""

    mean: float
    maximum: float
    cells: int


@dataclass(frozen=True)
class RuntimeModel:
    """T(p, o) in seconds, with the errors of its fit.

    Between the profiled prompt lengths T_prompt is linear. `seconds_per_context_token` is 0 unless `slope="context"` was
    fitted. `r2` belongs to the paper's pooled regression of T - T_prompt on o - 1; `fit` are the errors on the cells fitted,
    `held_out` those on cells that were measured but not fitted. `profiling_seconds` is the time the measurements took.
    """

    prompt_tokens: tuple[int, ...]
    prompt_seconds: tuple[float, ...]
    seconds_per_token: float
    largest_output: int
    fit: Errors
    r2: float
    method: MethodName = "idealized"
    seconds_per_context_token: float = 0.0
    overhead_seconds: float = 0.0
    held_out: Errors | None = None
    profiling_seconds: float = 0.0

    def __post_init__(self) -> None:
        lengths = [checks.whole("prompt_tokens", p, low=1) for p in self.prompt_tokens]
        if not lengths or lengths != sorted(set(lengths)) or len(lengths) != len(self.prompt_seconds):
            raise ValueError(
                "prompt_tokens must ascend, with as many prompt_seconds, "
                f"got {checks.shown(self.prompt_tokens)} and {checks.shown(self.prompt_seconds)}"
            )
        checks.whole("largest_output", self.largest_output, low=1)
        for seconds in self.prompt_seconds:
            checks.number("prompt_seconds", seconds)
        for name in ("seconds_per_token", "seconds_per_context_token", "overhead_seconds", "profiling_seconds", "r2"):
            checks.number(name, getattr(self, name))
        require(self.method, ("idealized", "denoised"), "method")
        for name, errors in (("fit", self.fit), ("held_out", self.held_out)):
            if not isinstance(errors, Errors) and (name, errors) != ("held_out", None):
                raise TypeError(f"{name} must be Errors, got {checks.shown(errors)}")

    def predict(self, prompt_tokens: Any, output_tokens: Any, *, extrapolate: bool = False) -> Any:
        """Seconds of a request, or an array of them for arrays of lengths (broadcast against each other; means may be fractions).

        >>> line = RuntimeModel((1, 101), (0.1, 0.2), 0.05, largest_output=64, fit=Errors(0.0, 0.0, 0), r2=1.0)
        >>> round(line.predict(51, 3), 3)
        0.25

        Raises ValueError for lengths below 1, and for lengths outside the profiled ones unless `extrapolate=True`, which
        continues the first or last segment (one profiled prompt length: a constant).
        """
        p, o = np.broadcast_arrays(np.asarray(prompt_tokens, dtype=float), np.asarray(output_tokens, dtype=float))
        for name, lengths in (("prompt_tokens", p), ("output_tokens", o)):
            if not ((lengths >= 1) & (lengths < np.inf)).all():
                raise ValueError(f"{name} must be finite and at least 1, got {checks.shown(lengths.tolist())}")
        if not extrapolate:
            self._require_inside(p, o)
        seconds = self.overhead_seconds + self._prompt(p) + (o - 1) * self.seconds_per_token
        seconds = seconds + self.seconds_per_context_token * _context_sum(p, o)
        return float(seconds) if seconds.ndim == 0 else seconds

    def total(self, requests: Iterable[tuple[int, int]], *, extrapolate: bool = False) -> float:
        """Seconds of all requests, one after the other; 0 for none."""
        lengths = np.array(list(requests), dtype=float).reshape(-1, 2)
        return float(np.sum(self.predict(lengths[:, 0], lengths[:, 1], extrapolate=extrapolate)))

    def errors(self, runs: Iterable[Run], *, extrapolate: bool = False) -> Errors:
        """How far the model is from the fastest of `runs` in each cell. Raises ValueError for none."""
        cells = fastest(runs)
        if not cells:
            raise ValueError("runs must hold at least one measurement, got none")
        relative = [abs(self.predict(p, o, extrapolate=extrapolate) - t) / t for (p, o), t in cells.items()]
        return Errors(float(np.mean(relative)), float(max(relative)), len(cells))

    def scaled(self, factor: float) -> RuntimeModel:
        """The model with all times but the overhead multiplied by `factor`: the paper takes 3 after profiling a third of the layers."""
        factor = checks.number("factor", factor, above=0)
        return replace(
            self,
            prompt_seconds=tuple(factor * seconds for seconds in self.prompt_seconds),
            seconds_per_token=factor * self.seconds_per_token,
            seconds_per_context_token=factor * self.seconds_per_context_token,
        )

    def to_json(self) -> str:
        """The model as a JSON document; `from_json` gives an equal one."""
        return json.dumps({"format": "runtime model 1", **asdict(self)}, indent=1, default=lambda number: number.item())

    @classmethod
    def from_json(cls, text: str) -> RuntimeModel:
        """Raises ValueError when `text` is not what `to_json` writes."""
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.pop("format", None) != "runtime model 1":
                raise ValueError("no 'runtime model 1' document")
            fields |= {name: tuple(fields[name]) for name in ("prompt_tokens", "prompt_seconds")}
            fields |= {name: fields[name] and Errors(**fields[name]) for name in ("fit", "held_out")}
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"text is not a runtime model: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> RuntimeModel:
        """Read what `save` wrote."""
        return cls.from_json(Path(path).read_text())

    def _prompt(self, p: np.ndarray) -> np.ndarray:
        knots, values = np.array(self.prompt_tokens, dtype=float), np.array(self.prompt_seconds)
        seconds: np.ndarray = np.interp(p, knots, values)
        if len(knots) > 1:
            first, last = np.diff(values)[[0, -1]] / np.diff(knots)[[0, -1]]
            seconds = np.where(p < knots[0], values[0] + (p - knots[0]) * first, seconds)
            seconds = np.where(p > knots[-1], values[-1] + (p - knots[-1]) * last, seconds)
        return seconds

    def _require_inside(self, p: np.ndarray, o: np.ndarray) -> None:
        low, high = self.prompt_tokens[0], self.prompt_tokens[-1]
        if (p < low).any() or (p > high).any():
            raise ValueError(
                f"prompt_tokens must lie in the profiled {low} to {high}, got {p.min():g} to {p.max():g}; "
                "pass extrapolate=True to go beyond"
            )
        if (o > self.largest_output).any():
            raise ValueError(
                f"output_tokens must be at most the profiled {self.largest_output}, got {o.max():g}; "
                "pass extrapolate=True to go beyond"
            )


def fastest(runs: Iterable[Run]) -> dict[tuple[int, int], float]:
    """The fastest run of each cell (p, o): noise only ever adds.

    Raises ValueError for a time that is not positive and finite or a length below 1, TypeError for a length that is not whole.
    """
    cells: dict[tuple[int, int], float] = {}
    for p, o, seconds in runs:
        cell = checks.whole("prompt tokens", p, low=1), checks.whole("output tokens", o, low=1)
        cells[cell] = min(positive(seconds, *cell), cells.get(cell, np.inf))
    return cells


def positive(seconds: float, p: int, o: int) -> float:
    """The seconds of a cell as a float; ValueError with the cell if they are not a number above 0."""
    try:
        return checks.number("seconds", seconds, above=0)
    except ValueError as error:
        raise ValueError(f"{error} for {p} prompt and {o} output tokens") from None


def fit(
    runs: Iterable[Run],
    *,
    method: MethodName = "idealized",
    slope: Slope = "constant",
    isotonic: bool = False,
    overhead_seconds: float = 0.0,
    variant: Variant = "paper",
) -> RuntimeModel:
    """Fit T(p, o) to measured runs (p, o, seconds); the fastest run of each cell counts.

    T_prompt(p): "idealized", the cell (p, 1), which every p must have; "denoised", slope plus intercept of a least-squares line
    through the cells of p (two output lengths at least), and no less than that of the smallest p.
    beta: slope of the least-squares line, with an intercept that is then dropped, of T - T_prompt over o - 1, all p pooled.
    `slope="context"` lets a token's time grow with the number of tokens before it, as reading a key-value cache does (our choice).
    `isotonic` makes T_prompt non-decreasing in p, by least squares (our choice, for noisy shared hardware).
    `overhead_seconds`, measured apart, is taken off every run and added to every prediction.
    `variant="as_released"` rounds T_prompt and beta to milliseconds, as the released code does; ruinous for small models.

    Raises ValueError when the cells do not determine the model, or the overhead exceeds a run.
    """
    require(method, ("idealized", "denoised"), "method")
    require(slope, ("constant", "context"), "slope")
    require(variant, ("paper", "as_released"), "variant")
    checks.flag("isotonic", isotonic)
    overhead_seconds = checks.number("overhead_seconds", overhead_seconds, low=0)
    cells = {lengths: seconds - overhead_seconds for lengths, seconds in fastest(runs).items()}
    if not cells:
        raise ValueError("runs must hold at least one measurement, got none")
    if min(cells.values()) <= 0:
        raise ValueError(f"overhead_seconds must be below every run, got {overhead_seconds}")
    knots = sorted({p for p, _ in cells})
    rows = [(p, sorted((o, t) for (q, o), t in cells.items() if q == p)) for p in knots]
    at_prompt = [_prompt_seconds(p, row, method) for p, row in rows]
    if method == "denoised":
        at_prompt = [at_prompt[0]] + [max(seconds, at_prompt[0]) for seconds in at_prompt[1:]]
    if variant == "as_released":
        at_prompt = [round(seconds, 3) for seconds in at_prompt]
    if isotonic:
        at_prompt = non_decreasing(at_prompt)

    of_prompt = dict(zip(knots, at_prompt, strict=True))
    p, o = np.array(list(cells), dtype=float).T
    rest = np.array([seconds - of_prompt[lengths[0]] for lengths, seconds in cells.items()])
    if len(set(o.tolist())) < 2:
        raise ValueError("runs must have at least two different output lengths, to tell the time per token")
    columns = np.stack([np.ones_like(o), o - 1, _context_sum(p, o)], axis=1)[:, : 2 if slope == "constant" else 3]
    scale = np.abs(columns).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(columns / scale, rest, rcond=None)
    if rank < columns.shape[1]:
        raise ValueError("runs must have more different lengths to fit slope='context'")
    coefficients = solution / scale
    missed = rest - columns @ coefficients
    spread = float(((rest - rest.mean()) ** 2).sum())
    fitted = RuntimeModel(
        prompt_tokens=tuple(knots),
        prompt_seconds=tuple(float(seconds) for seconds in at_prompt),
        seconds_per_token=round(float(coefficients[1]), 3) if variant == "as_released" else float(coefficients[1]),
        seconds_per_context_token=float(coefficients[2]) if slope == "context" else 0.0,
        largest_output=int(o.max()),
        overhead_seconds=overhead_seconds,
        method=method,
        r2=1 - float((missed**2).sum()) / spread if spread > 0 else 1.0,
        fit=Errors(0.0, 0.0, 0),
    )
    return replace(fitted, fit=fitted.errors((p, o, t + overhead_seconds) for (p, o), t in cells.items()))


def non_decreasing(values: Sequence[float]) -> list[float]:
    """The closest non-decreasing sequence in the least-squares sense: neighbours that fall are pooled to their mean.

    Raises ValueError for NaN and infinity, TypeError for what is no number.
    """
    blocks: list[tuple[float, int]] = []  # mean, length
    for value in values:
        mean, length = checks.number("values", value), 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, length = (before * count + mean * length) / (count + length), count + length
        blocks.append((mean, length))
    return [mean for mean, length in blocks for _ in range(length)]


def _prompt_seconds(p: int, row: list[tuple[int, float]], method: MethodName) -> float:
    if method == "idealized":
        if row[0][0] != 1:
            raise ValueError(
                f"runs must have one output token for every prompt length, none for {p}; or fit 'denoised'"
            )
        return row[0][1]
    if len(row) < 2:
        raise ValueError(f"runs must have at least two output lengths for {p} prompt tokens to be denoised")
    slope, intercept = np.polyfit([o for o, _ in row], [seconds for _, seconds in row], 1)
    return float(slope + intercept)


def _context_sum(p: Any, o: Any) -> Any:
    """Tokens before each of the output tokens 2 .. o, summed: (o - 1) p + (o - 1) o / 2."""
    return (o - 1) * (p + o / 2)


def require(value: str, allowed: tuple[str, ...], name: str) -> None:
    """ValueError unless `value` is among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
