"""Idealized and denoised runtime: a two-part model of what one request costs, from a small grid of measurements.

After "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive Transformer APIs" (NeurIPS 2023). A request with p prompt
tokens and o output tokens takes T(p, o) = overhead + T_prompt(p) + (o - 1) beta. `profile` measures a grid and fits it:

- idealized, on your own system: T_prompt(p) is the measured T(p, 1);
- denoised, for an API reached through a network and shared with others: the fastest of several runs represents a cell, and
  T_prompt(p) is the value at o = 1 of a line through the cells of p. `probe_endpoint` does this for an OpenAI-compatible server.

The profile costs the same however many requests it then prices: total runtime, dollars and energy of a workload are sums of
T(p_i, o_i) (`RuntimeModel.predict`, `dollars`, `joules`, `idealized_saving`, `denoised_saving`).

Not for engines whose time per token is not a function of the length (speculative decoding, chunked batching with other users'
requests, prompt caches); the reported errors show that. Long contexts need `slope="context"`.
Our choices, where the paper is silent, are marked as such below.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from assay import checks
from assay.paths import atomic_file

Run = tuple[int, int, float]  # prompt tokens, output tokens, seconds of one request
MethodName = Literal["idealized", "denoised"]
Slope = Literal["constant", "context"]
Variant = Literal["paper", "as_released"]

# fmt: off
PAPER_PROMPT_TOKENS = (1, 16, 32, 64, 128, 192, 256, 320, 384, 428, 472, 512, 576, 640, 704, 768, 832, 896, 960, 1024,
                       1152, 1280, 1408, 1536, 1664, 1792, 1920)
PAPER_OUTPUT_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_WORDS = ("the", "of", "and", "to", "in", "is", "for", "on", "that", "with", "as", "at", "by", "from", "it", "be", "are", "was",
          "this", "have", "not", "or", "an", "which", "one", "all", "but", "they")
# fmt: on


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
        _require(self.method, ("idealized", "denoised"), "method")
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


# Fitting


def fastest(runs: Iterable[Run]) -> dict[tuple[int, int], float]:
    """The fastest run of each cell (p, o): noise only ever adds.

    Raises ValueError for a time that is not positive and finite or a length below 1, TypeError for a length that is not whole.
    """
    cells: dict[tuple[int, int], float] = {}
    for p, o, seconds in runs:
        cell = checks.whole("prompt tokens", p, low=1), checks.whole("output tokens", o, low=1)
        cells[cell] = min(_positive(seconds, *cell), cells.get(cell, np.inf))
    return cells


def _positive(seconds: float, p: int, o: int) -> float:
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
    _require(method, ("idealized", "denoised"), "method")
    _require(slope, ("constant", "context"), "slope")
    _require(variant, ("paper", "as_released"), "variant")
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


def _require(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


# Measuring


def profile(
    run: Callable[[int, int], Any],
    *,
    prompt_tokens: Sequence[int] = PAPER_PROMPT_TOKENS,
    output_tokens: Sequence[int] = PAPER_OUTPUT_TOKENS,
    repeats: int = 3,
    warmup: int = 1,
    held_out: Sequence[tuple[int, int]] | None = None,
    method: MethodName = "idealized",
    slope: Slope = "constant",
    isotonic: bool = False,
    seed: int = 0,
) -> RuntimeModel:
    """Measure every cell of the grid `repeats` times, in an order shuffled anew each time, and `fit` the runtime model.

    `run(p, o)` makes one request. If it returns a float, that is the time in seconds; otherwise its wall time is taken (a run on
    an accelerator must wait for the device). `warmup` runs of each prompt length are thrown away first. The weights may be
    random, since only the architecture counts; the prompt should differ from run to run, or a prompt cache would make it free.
    `held_out` are pairs of lengths inside the grid that are measured too, but not fitted, for `RuntimeModel.held_out`; by default
    up to three pairs halfway between grid points (our choice), () for none.

    Raises ValueError for lengths below 1, `repeats` below 1, a held-out pair outside the grid, an unknown method or slope, or a grid
    that determines no model, and TypeError for what is no number or flag; all before the first run.
    """
    _require(method, ("idealized", "denoised"), "method")
    _require(slope, ("constant", "context"), "slope")
    checks.flag("isotonic", isotonic)
    prompts, outputs = _lengths("prompt_tokens", prompt_tokens), _lengths("output_tokens", output_tokens)
    repeats, warmup = checks.whole("repeats", repeats, low=1), checks.whole("warmup", warmup, low=0)
    apart = middle_cells(prompts, outputs) if held_out is None else list(dict.fromkeys(held_out))
    fit([(p, o, 1.0) for p in prompts for o in outputs], method=method, slope=slope)  # or there would be nothing to fit
    for p, o in apart:
        checks.whole("held_out", p), checks.whole("held_out", o)
        if not (prompts[0] <= p <= prompts[-1] and 1 <= o <= outputs[-1]):
            raise ValueError(f"held_out must lie inside the grid, got {(p, o)}")
        if p in prompts and o in outputs:
            raise ValueError(f"held_out must not be a cell of the grid, got {(p, o)}")
    start = time.perf_counter()
    for p in prompts:
        for _ in range(warmup):
            _timed(run, p, outputs[0])
    grid = [(p, o) for p in prompts for o in outputs]
    order = [*grid, *apart]
    shuffle = random.Random(seed)
    runs: list[Run] = []
    for _ in range(repeats):
        shuffle.shuffle(order)
        runs += [(p, o, _timed(run, p, o)) for p, o in order]
    inside = set(grid)
    fitted = fit([entry for entry in runs if entry[:2] in inside], method=method, slope=slope, isotonic=isotonic)
    errors = fitted.errors(entry for entry in runs if entry[:2] not in inside) if apart else None
    return replace(fitted, held_out=errors, profiling_seconds=time.perf_counter() - start)


def middle_cells(prompts: Sequence[int], outputs: Sequence[int]) -> list[tuple[int, int]]:
    """Up to three cells halfway between grid points, spread over the grid; none where a grid has no room between its points."""
    gaps_p = [(a + b) // 2 for a, b in zip(prompts, prompts[1:], strict=False) if b - a > 1]
    gaps_o = [(a + b) // 2 for a, b in zip(outputs, outputs[1:], strict=False) if b - a > 1]
    if not gaps_p or not gaps_o:
        return []
    picks = [
        (gaps_p[round(share * (len(gaps_p) - 1))], gaps_o[round(share * (len(gaps_o) - 1))]) for share in (0, 0.5, 1)
    ]
    return list(dict.fromkeys(picks))


def _timed(run: Callable[[int, int], Any], p: int, o: int) -> float:
    start = time.perf_counter()
    result = run(p, o)
    if isinstance(result, float | np.floating):
        return _positive(float(result), p, o)  # now, not after the whole grid was paid for
    return time.perf_counter() - start


def _lengths(name: str, lengths: Sequence[int]) -> list[int]:
    """Different lengths in ascending order."""
    found = sorted({checks.whole(name, length, low=1) for length in lengths})
    if not found:
        raise ValueError(f"{name} must hold at least one length, got none")
    return found


def transformers_runner(
    model: nn.Module,
    *,
    make_prompt: Callable[[int], torch.Tensor] | None = None,
    static_cache: bool = False,
    seed: int = 0,
) -> Callable[[int, int], float]:
    """A `run(p, o)` for a transformers causal language model: `p` tokens in, exactly `o` out, batch 1, greedy; seconds.

    `make_prompt(p)` gives int64 ids of shape (1, p); by default random ones, anew for every run. The end token is suppressed.
    Raises RuntimeError if generation stops short all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    options: dict[str, Any] = {"cache_implementation": "static"} if static_cache else {}
    device = next(model.parameters()).device

    def run(p: int, o: int) -> float:
        ids = make_prompt(p) if make_prompt else torch.randint(config.vocab_size, (1, p), generator=generator)
        ids = ids.to(device)
        _synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=o,
                max_new_tokens=o,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        _synchronise(device)
        seconds = time.perf_counter() - start
        if out.shape[1] != p + o:
            raise RuntimeError(f"asked for {o} tokens, got {out.shape[1] - p}")
        return seconds

    return run


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# An endpoint


@dataclass(frozen=True)
class Streamed:
    """One streamed request: when the pieces of the answer arrived, in seconds after the request was sent."""

    asked_prompt_tokens: int
    prompt_tokens: int  # as the server counts them, else as asked
    output_tokens: int
    arrivals: tuple[float, ...]  # of every piece with text
    seconds: float  # until the end of the stream

    @property
    def ttft(self) -> float:
        """Time to the first piece."""
        return self.arrivals[0]


@dataclass(frozen=True)
class EndpointProfile:
    """The result of probing an endpoint. `raw_mean_seconds` per (p, o) is the naive figure that the model denoises."""

    model: RuntimeModel
    requests: tuple[Streamed, ...]
    dropped: int  # answers of another length than asked for, and requests that failed
    missing: tuple[
        tuple[int, int], ...
    ]  # cells (p, o) as asked that no answer came for: the model is fitted without them
    ttft: dict[int, float]  # fastest, by prompt tokens
    inter_token_seconds: float  # median gap between pieces; servers may send several tokens in one piece
    raw_mean_seconds: dict[tuple[int, int], float]


class ProbeError(RuntimeError):
    """A probe whose answers do not determine a model. `requests` are those that were paid for, for `fit` with other settings."""

    def __init__(self, message: str, requests: tuple[Streamed, ...]) -> None:
        super().__init__(message)
        self.requests = requests


def probe_endpoint(
    base_url: str,
    model: str,
    *,
    prompt_tokens: Sequence[int] = (16, 128, 512),
    output_tokens: Sequence[int] = (1, 16, 64),
    repeats: int = 5,
    concurrency: int = 1,
    chat: bool = False,
    api_key: str | None = None,
    timeout: float = 120.0,
    overhead_seconds: float | None = None,
    make_prompt: Callable[[int, random.Random], str] | None = None,
    slope: Slope = "constant",
    isotonic: bool = False,
    seed: int = 0,
) -> EndpointProfile:
    """Denoised runtime model of an OpenAI-compatible server at `base_url` (".../v1"), through streamed requests.

    Every cell is asked `repeats` times, shuffled, `concurrency` requests at a time. The model is fitted to whole-request times,
    since streams come in bursts. The overhead, unless given, is the fastest of several requests for the list of models, which
    generate nothing (our choice).
    The server is asked to ignore the end token (`ignore_eos`, `min_tokens`); an answer of another length than asked for is
    dropped, and so is a request that fails. Cells left without an answer are `missing` and the rest is fitted. Prompts are random
    common words; `make_prompt(p, rng)` makes others. Prompt lengths are those the server reports.

    Raises ValueError or TypeError for bad arguments before the first request, ConnectionError when the server cannot
    be reached or refuses every request, ProbeError, which holds the answers, when they do not determine a model.
    """
    import httpx

    repeats, concurrency = checks.whole("repeats", repeats, low=1), checks.whole("concurrency", concurrency, low=1)
    timeout = checks.number("timeout", timeout, above=0)
    _require(slope, ("constant", "context"), "slope")
    checks.flag("isotonic", isotonic), checks.flag("chat", chat)
    if overhead_seconds is not None:
        overhead_seconds = checks.number("overhead_seconds", overhead_seconds, low=0)
    prompts, outputs = _lengths("prompt_tokens", prompt_tokens), _lengths("output_tokens", output_tokens)
    rng = random.Random(seed)
    prompt_of = make_prompt or random_words
    orders: list[tuple[int, int, str]] = []
    for _ in range(repeats):
        cells = [(p, o) for p in prompts for o in outputs]
        rng.shuffle(cells)
        orders += [(p, o, prompt_of(p, rng)) for p, o in cells]
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    start = time.perf_counter()
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    with httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout, limits=limits) as client:
        try:
            if overhead_seconds is None:
                overhead_seconds = min(_list_models(client) for _ in range(max(5, repeats)))
        except httpx.HTTPError as error:
            raise _unreachable(base_url, error) from error
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda order: _answer(client, model, order, chat), orders))
    seconds = time.perf_counter() - start
    came = [answer for answer in answers if isinstance(answer, Streamed)]
    if not came:
        failure = next(answer for answer in answers if not isinstance(answer, Streamed))
        raise _unreachable(base_url, failure) from failure
    pairs = zip(orders, answers, strict=True)
    kept = [a for (_, o, _), a in pairs if isinstance(a, Streamed) and a.output_tokens == o]
    wanted = {(p, o) for p in prompts for o in outputs}
    missing = sorted(wanted - {(answer.asked_prompt_tokens, answer.output_tokens) for answer in kept})
    counted = {
        p: int(np.median([answer.prompt_tokens for answer in kept if answer.asked_prompt_tokens == p]))
        for p in {answer.asked_prompt_tokens for answer in kept}
    }
    runs = [(counted[answer.asked_prompt_tokens], answer.output_tokens, answer.seconds) for answer in kept]
    if runs and overhead_seconds >= min(seconds for _, _, seconds in runs):
        raise ProbeError(
            f"the list of models takes {overhead_seconds:.3g} s, longer than an answer; pass overhead_seconds",
            tuple(came),
        )
    enough = {p for p, _, _ in runs if len({o for q, o, _ in runs if q == p}) > 1}  # a line needs two output lengths
    try:
        fitted = fit(
            [run for run in runs if run[0] in enough],
            method="denoised",
            slope=slope,
            isotonic=isotonic,
            overhead_seconds=overhead_seconds,
        )
    except ValueError as error:
        raise ProbeError(
            f"no answer had the asked length for (prompt, output) tokens {missing}, and the others do not do: {error}",
            tuple(came),
        ) from error
    gaps = [gap for answer in kept for gap in np.diff(answer.arrivals)]
    means = {cell: float(np.mean([run[2] for run in runs if run[:2] == cell])) for cell in sorted(fastest(runs))}
    return EndpointProfile(
        model=replace(fitted, profiling_seconds=seconds),
        requests=tuple(kept),
        dropped=len(answers) - len(kept),
        missing=tuple(missing),
        ttft={counted[p]: min(a.ttft for a in kept if a.asked_prompt_tokens == p) for p in sorted(counted)},
        inter_token_seconds=float(np.median(gaps)) if gaps else float("nan"),
        raw_mean_seconds=means,
    )


def _unreachable(base_url: str, error: Exception) -> ConnectionError:
    response = getattr(error, "response", None)
    if response is not None:
        return ConnectionError(f"{base_url} answered {response.status_code} to {response.request.url}")
    return ConnectionError(f"{base_url} cannot be reached: {error or type(error).__name__}")


def _answer(client: Any, model: str, order: tuple[int, int, str], chat: bool) -> Streamed | Exception:
    """The answer, or why there is none, so that a failed request does not cost the others."""
    import httpx

    try:
        return _stream(client, model, order, chat)
    except (httpx.HTTPError, ValueError) as error:  # also a stream that is no JSON
        return error


def random_words(tokens: int, rng: random.Random) -> str:
    """`tokens` common words in random order: about one token each, and no two prompts alike, so that no cache has them."""
    return " ".join(rng.choices(_WORDS, k=tokens))


def _list_models(client: Any) -> float:
    start = time.perf_counter()
    client.get("models").raise_for_status()
    return time.perf_counter() - start


def _stream(client: Any, model: str, order: tuple[int, int, str], chat: bool) -> Streamed:
    p, o, prompt = order
    body: dict[str, Any] = {"model": model, "max_tokens": o, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True, "min_tokens": o}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    usage: dict[str, int] = {}
    arrivals: list[float] = []
    finished = ""
    start = time.perf_counter()
    with client.stream("POST", "chat/completions" if chat else "completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
                continue
            event = json.loads(line.removeprefix("data:"))
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                finished = choice.get("finish_reason") or finished
                if choice.get("text") or choice.get("delta", {}).get("content"):
                    arrivals.append(time.perf_counter() - start)
    seconds = time.perf_counter() - start
    made = usage.get("completion_tokens", o if finished == "length" else -1)
    return Streamed(p, usage.get("prompt_tokens", p), made, tuple(arrivals) or (seconds,), seconds)


# What the model is for


def dollars(seconds: Any, *, accelerators: int, dollars_per_hour: float) -> Any:
    """Idealized cost: time x number of accelerators x price of one for an hour.

    >>> dollars(1800, accelerators=2, dollars_per_hour=3.0)
    3.0
    """
    accelerators = checks.whole("accelerators", accelerators, low=1)
    dollars_per_hour = checks.number("dollars_per_hour", dollars_per_hour, low=0)
    return seconds * accelerators * dollars_per_hour / 3600


def joules(seconds: Any, *, accelerators: int, watts: float) -> Any:
    """Idealized energy: time x number of accelerators x power of one."""
    accelerators, watts = checks.whole("accelerators", accelerators, low=1), checks.number("watts", watts, low=0)
    return seconds * accelerators * watts


def flops_proxy(parameters: int, prompt_tokens: Any, output_tokens: Any) -> Any:
    """The usual proxy 2 N (p + o) FLOPs (1 MAC = 2 FLOPs), blind to what a system does: the baseline runtime models beat."""
    return 2 * checks.whole("parameters", parameters, low=1) * (np.asarray(prompt_tokens) + np.asarray(output_tokens))


def share_below(model: RuntimeModel, runs: Iterable[Run]) -> float:
    """Share of raw runs that were faster than their denoised runtime: should be small, since denoising takes away."""
    runs = list(runs)
    if not runs:
        raise ValueError("runs must hold at least one measurement, got none")
    runs = [(p, o, _positive(seconds, p, o)) for p, o, seconds in runs]
    return float(np.mean([seconds < model.predict(p, o) for p, o, seconds in runs]))


def add_runtimes(
    rows: Iterable[Mapping[str, Any]],
    models: Mapping[str, RuntimeModel],
    *,
    prompt: str = "prompt_tokens",
    output: str = "output_tokens",
    extrapolate: bool = False,
) -> list[dict[str, Any]]:
    """Per-instance log rows of a benchmark harness, each with a column of predicted seconds per model.

    >>> line = RuntimeModel((1, 101), (0.1, 0.2), 0.05, largest_output=64, fit=Errors(0.0, 0.0, 0), r2=1.0)
    >>> add_runtimes([{"id": 7, "prompt_tokens": 1, "output_tokens": 1}], {"idealized_seconds": line})
    [{'id': 7, 'prompt_tokens': 1, 'output_tokens': 1, 'idealized_seconds': 0.1}]
    """
    return [
        {
            **row,
            **{
                name: model.predict(row[prompt], row[output], extrapolate=extrapolate) for name, model in models.items()
            },
        }
        for row in rows
    ]


def pareto_front(costs: Sequence[float], capabilities: Sequence[float]) -> list[int]:
    """Indices of the systems that no other beats: none is at most as costly and at least as capable, and better in one.

    Raises ValueError for sequences of other lengths, and for NaN or infinity, which no comparison could place.

    >>> pareto_front([1.0, 2.0, 3.0], [0.5, 0.9, 0.8])
    [0, 1]
    """
    systems = [
        (checks.number("costs", cost), checks.number("capabilities", skill))
        for cost, skill in zip(costs, capabilities, strict=True)
    ]
    return [
        i
        for i, (cost, skill) in enumerate(systems)
        if not any(c <= cost and s >= skill and (c < cost or s > skill) for c, s in systems)
    ]


def idealized_saving(
    model: RuntimeModel,
    requests: Sequence[tuple[int, int]],
    grid: Sequence[tuple[int, int]],
    *,
    trials: int = 50,
    dollars_per_hour: float = 0.0,
    api_dollars_in: float = 0.0,
    api_dollars_out: float = 0.0,
) -> float:
    """How many times cheaper profiling `grid` is than running every request `trials` times on one's own hardware.

    As in the released analysis: both sides run each cell or request `trials` times and, if API prices are given (dollars per
    1000 prompt and output tokens), ask the API once for every request. Without prices the ratio is one of seconds.
    The paper's 57.42x: $40.96 an hour, $0.0015 and $0.002 per 1000 tokens, 50 trials.
    Raises ValueError for no requests, no grid, or lengths below 1.
    """
    trials = checks.whole("trials", trials, low=1)
    hourly = checks.number("dollars_per_hour", dollars_per_hour, low=0) or 3600.0
    api = _api_dollars("requests", requests, api_dollars_in, api_dollars_out)
    _api_dollars("grid", grid, api_dollars_in, api_dollars_out)
    brute_force = trials * model.total(requests) * hourly / 3600 + api
    return brute_force / (trials * model.total(grid) * hourly / 3600 + api)


def denoised_saving(
    requests: Sequence[tuple[int, int]],
    grid: Sequence[tuple[int, int]],
    *,
    trials: int = 10,
    api_dollars_in: float = 0.0015,
    api_dollars_out: float = 0.002,
) -> float:
    """How many times cheaper denoising is than asking an API every request `trials` times: the grid `trials` times, each request once.

    Prices are dollars per 1000 tokens; the defaults are those of the released analysis, which finds 9.93x. Never above `trials`.
    Raises ValueError for no requests, no grid, lengths below 1, or prices that are all 0.
    """
    trials = checks.whole("trials", trials, low=1)
    once = _api_dollars("requests", requests, api_dollars_in, api_dollars_out)
    profiling = trials * _api_dollars("grid", grid, api_dollars_in, api_dollars_out)
    if not once:
        raise ValueError("api_dollars_in and api_dollars_out must not both be 0: there would be nothing to save")
    return trials * once / (profiling + once)


def _api_dollars(name: str, requests: Sequence[tuple[int, int]], dollars_in: float, dollars_out: float) -> float:
    if not len(requests):
        raise ValueError(f"{name} must hold at least one pair of lengths, got none")
    requests = [(checks.number(name, p, low=1), checks.number(name, o, low=1)) for p, o in requests]  # type: ignore[misc]
    dollars_in = checks.number("api_dollars_in", dollars_in, low=0)
    dollars_out = checks.number("api_dollars_out", dollars_out, low=0)
    return sum(p * dollars_in + o * dollars_out for p, o in requests) / 1000
