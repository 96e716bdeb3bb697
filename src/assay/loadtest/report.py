"""From what became of each request to figures with their intervals.

Requests are what is resampled, never tokens: those of one answer share its luck. Percentiles have the interval of order statistics,
rates a bootstrap over requests, shares the exact binomial one; all are for 95 %. They take requests to be independent of each other,
which those that share a server are only roughly: the ratio of two servers, from blocks that ran in turn, does not need that.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay import checks
from assay.errors import InputError
from assay.loadtest.generator import Block, Load, Measured, Sample
from assay.loadtest.traces import repeats
from assay.measure.stats import Interval, bootstrap, paired_ratio, share_interval

PERCENTILES = (50, 95, 99)
LATENCIES = ("ttft", "itl", "gap", "e2e")
DRAWS = 4_000_000  # requests drawn by a bootstrap at most
BUSY = 0.10  # share of a core that the generator may take before it disturbs what it measures
LATE = 0.010  # seconds that requests of an open loop may be sent late
REUSED = 0.01  # share of prompt tokens that a server may have known before
APART = 0.05  # by which two servers' answers may differ in length
MET = 0.95  # share of requests that must be within the SLO for it to count as met


@dataclass(frozen=True)
class Slo:
    """The most that a request may take, in seconds: to its first text, between two tokens on average, to its end."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def met(self, sample: Sample) -> bool:
        """Whether a request was answered within all limits. One that failed was not; one whose tokens came at once has no ITL to keep."""
        if sample.answer is None:
            return False
        limits = ((self.ttft, sample.ttft), (self.itl, sample.itl), (self.e2e, sample.e2e))
        return all(limit is None or value is None or value <= limit for limit, value in limits)


def slo_of(text: str) -> Slo:
    """The limits in "ttft=500,itl=50", in milliseconds. Raises InputError for anything else.

    >>> slo_of("ttft=500,itl=50")
    Slo(ttft=0.5, itl=0.05, e2e=None)
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, found, value = part.strip().partition("=")
        if name not in ("ttft", "itl", "e2e") or not found or name in limits:
            raise InputError(f"--slo must be like ttft=500,itl=50 (ms; ttft, itl, e2e, each once), got {text[:100]!r}")
        try:
            limits[name] = checks.number(f"--slo {name}", float(value), above=0) / 1e3
        except ValueError:
            raise InputError(f"--slo {name} must be a positive number of milliseconds, got {value[:40]!r}") from None
    return Slo(**limits)


def percentile(samples: Sequence[float], share: float, *, level: float = 0.95) -> Interval:
    """A quantile with the interval of order statistics: exact for independent samples, whatever their distribution.

    With n samples sorted as x1..xn it is [x(l), x(u)] with the largest l and the smallest u for which the quantile lies below x(l), and
    above x(u), with a probability of at most (1 - level) / 2 each. Where there is no such sample the bound is minus or plus infinity: of
    the 99th percentile there is an upper one from 368 samples on. Raises ValueError for no samples and for a share outside (0, 1).

    >>> percentile(range(1, 101), 0.5)
    Interval(median=50.5, low=40.0, high=61.0, n=100)
    """
    checks.number("share", share, above=0, below=1)
    values = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(values)
    if not n or not np.isfinite(values).all():
        raise ValueError(f"samples must be finite, and at least one, got {n}")
    counts = np.arange(1, n + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - counts + 1) / counts))])
    logs += np.arange(n + 1) * math.log(share) + np.arange(n, -1, -1) * math.log1p(-share)
    below = np.cumsum(np.exp(logs))  # P(at most k of the samples lie below the quantile), k = 0..n
    miss = (1 - level) / 2
    low = int(np.count_nonzero(below <= miss))  # P(fewer than l below) <= miss
    high = int(np.count_nonzero(below < 1 - miss)) + 1  # P(at least u below) <= miss
    return Interval(
        float(np.quantile(values, share)),
        float(values[low - 1]) if low else -math.inf,
        float(values[high - 1]) if high <= n else math.inf,
        n,
    )


def rate(amounts: Sequence[float], shares: Sequence[float], seconds: float) -> Interval:
    """`amounts` a second, with a bootstrap over requests, each with its `share` of the time (in any unit).

    A request's share is what it kept a client busy for in a closed loop, and the time to the next arrival in an open one. A single
    request has no interval.
    """
    rows = np.stack([np.asarray(amounts, dtype=np.float64), np.asarray(shares, dtype=np.float64)], axis=1)
    value, n = float(rows[:, 0].sum()) / seconds, len(rows)
    if n < 2 or not rows[:, 1].all():
        return Interval(value, 0.0, math.inf, n)
    scale = float(rows[:, 1].sum()) / seconds

    def a_second(draws: np.ndarray, axis: int) -> np.ndarray:
        sums = draws.sum(axis=axis)
        return np.asarray(sums[..., 0] / sums[..., 1] * scale)

    return bootstrap(rows, a_second, resamples=int(min(max(DRAWS // n, 200), 2000)))


def figures(tested: Measured, load: Load, slo: Slo | None) -> dict[str, Any]:
    """All that is known of one server, as JSON; times in milliseconds."""
    samples = [sample for block in tested.blocks for sample in block.samples]
    answers = [sample.answer for sample in samples if sample.answer is not None]
    seconds = sum(block.seconds for block in tested.blocks)
    busy = sum(sample.end - sample.intended for sample in samples)
    found: dict[str, Any] = {
        "url": tested.server.url,
        "model": tested.server.model,
        "api": "chat/completions" if tested.server.chat else "completions",
        "requests": len(samples),
        "answered": len(answers),
        "errors": dict(Counter(sample.error for sample in samples if sample.error).most_common()),
        "messages": {sample.error: sample.message for sample in reversed(samples) if sample.error},
        "seconds": seconds,
        "in_flight": busy / seconds if seconds else 0.0,
        "gone": any(block.gone for block in tested.blocks),
    }
    for name in LATENCIES:
        values = _values(samples, name)
        found[name] = {f"p{p}": _shown(percentile(values, p / 100), 1e3) for p in PERCENTILES} if values else None
    for name, amount in _amounts(slo).items():
        found[name] = _shown(_rate(tested.blocks, load, amount)) if samples and seconds else None
    met = sum(map(slo.met, samples)) if slo is not None else 0
    found["within_slo"] = _shown(share_interval(met, len(samples))) if slo is not None and samples else None
    counted = sum(answer.counted for answer in answers)
    found["tokens"] = {
        "generated": sum(answer.tokens for answer in answers),
        "prompt": sum(answer.prompt_tokens or 0 for answer in answers),
        "cached": sum(answer.cached_tokens for answer in answers),
        "counted_by_server": counted,
        "counted_by_pieces": len(answers) - counted,
        "short": sum(
            sample.answer is not None and sample.answer.tokens < sample.request.new_tokens for sample in samples
        ),
    }
    if load.concurrency is None and samples:
        late = [sample.sent - sample.intended for sample in samples]
        found["lateness"] = {f"p{p}": 1e3 * float(np.quantile(late, p / 100)) for p in (50, 95)} | {
            "most": 1e3 * max(late)
        }
    return found


def comparison(first: Measured, second: Measured, slo: Slo | None) -> dict[str, Any]:
    """Each figure of the second server over that of the first, with the interval of its median over the blocks.

    None where not every block has one: nothing was answered, or nothing within the SLO.
    """
    found: dict[str, Any] = {"pairs": min(len(first.blocks), len(second.blocks))}
    measures: dict[str, Callable[[Block], float | None]] = {
        name: functools.partial(_latency, name, 0.5) for name in ("ttft", "itl", "e2e")
    }
    measures["ttft_p95"] = functools.partial(_latency, "ttft", 0.95)
    measures |= {name: functools.partial(_mean_rate, amount) for name, amount in _amounts(slo).items()}
    for name, measure in measures.items():
        ours, theirs = ([measure(block) for block in tested.blocks] for tested in (second, first))
        whole = ours and len(ours) == len(theirs) and all(value is not None and value > 0 for value in (*ours, *theirs))
        found[name] = _shown(paired_ratio(ours, theirs)) if whole else None  # type: ignore[arg-type]
    return found


def document(tested: Sequence[Measured], load: Load, slo: Slo | None) -> dict[str, Any]:
    """The whole result, as JSON."""
    servers = [figures(one, load, slo) for one in tested]
    seconds = sum(block.seconds for one in tested for block in one.blocks)
    share = sum(block.cpu for one in tested for block in one.blocks) / seconds if seconds else 0.0
    found: dict[str, Any] = {
        "load": _load(load),
        "slo": None if slo is None else {name: 1e3 * limit for name, limit in vars(slo).items() if limit is not None},
        "servers": servers,
        "comparison": comparison(tested[0], tested[1], slo) if len(tested) == 2 else None,
        "generator": {"core_share": share},
    }
    found["warnings"] = [*_warnings(found, load)]
    return found


def samples_text(tested: Measured) -> str:
    """What became of each request that was answered, a JSON line each: what `assay simulate` reads as a measured trace.

    `at` is in seconds after the first request, `ttft` and `e2e` are in seconds; prompts that the server did not count, and answers
    without text, have no line.
    """
    samples = [sample for block in tested.blocks for sample in block.samples]
    start = min((sample.intended for sample in samples), default=0.0)
    lines = []
    for sample in sorted(samples, key=lambda sample: sample.intended):
        answer = sample.answer
        if answer is None or sample.ttft is None or not answer.prompt_tokens or not answer.tokens:
            continue
        line = {
            "at": round(sample.intended - start, 6),
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.tokens,
            "ttft": round(sample.ttft, 6),
            "e2e": round(sample.end - sample.intended, 6),
        }
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def met(found: dict[str, Any]) -> bool:
    """Whether each server kept the SLO for 95 % of the requests; where there is none, whether it answered all."""
    if found["slo"] is None:
        return all(server["requests"] and not server["errors"] for server in found["servers"])
    return all(server["within_slo"] is not None and server["within_slo"]["value"] >= MET for server in found["servers"])


def _amounts(slo: Slo | None) -> dict[str, Callable[[Sample], float]]:
    """What there is a rate of, and how much of it a request gave."""
    found: dict[str, Callable[[Sample], float]] = {
        "tokens_per_second": lambda sample: 0 if sample.answer is None else sample.answer.tokens,
        "requests_per_second": lambda sample: sample.answer is not None,
    }
    if slo is not None:
        found["goodput_per_second"] = slo.met
    return found


def _rate(blocks: Iterable[Block], load: Load, amount: Callable[[Sample], float]) -> Interval:
    """What requests gave, a second of the blocks they were in."""
    blocks = [block for block in blocks if block.samples]
    amounts = [float(amount(sample)) for block in blocks for sample in block.samples]
    shares = [share for block in blocks for share in _shares(block, load)]
    return rate(amounts, shares, sum(block.seconds for block in blocks))


def _latency(name: str, share: float, block: Block) -> float | None:
    values = _values(block.samples, name)
    return float(np.quantile(values, share)) if values else None


def _mean_rate(amount: Callable[[Sample], float], block: Block) -> float | None:
    return sum(map(amount, block.samples)) / block.seconds if block.seconds else None


def _shares(block: Block, load: Load) -> list[float]:
    """The time each request stands for: its own in a closed loop, that to the next arrival in an open one."""
    if load.concurrency is not None:
        return [sample.end - sample.intended for sample in block.samples]
    times = sorted(sample.intended for sample in block.samples)
    if len(times) < 2 or times[-1] == times[0]:
        return [1.0] * len(times)
    gaps = np.diff(times)
    after = dict(zip(times, [*gaps, float(gaps.mean())], strict=True))
    return [max(float(after[sample.intended]), 1e-9) for sample in block.samples]


def _values(samples: Iterable[Sample], name: str) -> list[float]:
    return [value for sample in samples if (value := getattr(sample, name)) is not None]


def _shown(interval: Interval, scale: float = 1.0) -> dict[str, float | None]:
    """An interval as JSON; a bound that there is none of is None."""

    def finite(value: float) -> float | None:
        return scale * value if math.isfinite(value) else None

    return {"value": scale * interval.median, "low": finite(interval.low), "high": finite(interval.high)}


def _load(load: Load) -> dict[str, Any]:
    kind = "closed" if load.concurrency is not None else "open"
    made = not load.trace
    return {
        "loop": kind,
        "concurrency": load.concurrency,
        "rate": load.rate,
        "requests": load.count,
        "seconds": load.seconds,
        "blocks": load.blocks,
        "trace_lines": len(load.trace) or None,
        "prompt_tokens": [load.prompt_tokens.low, load.prompt_tokens.high] if made else None,
        "new_tokens": [load.new_tokens.low, load.new_tokens.high] if made else None,
        "seed": load.seed,
    }


def _warnings(found: dict[str, Any], load: Load) -> Iterable[str]:
    """What a reader must know to trust the figures."""
    share = found["generator"]["core_share"]
    if share > BUSY:
        yield f"the load generator used {100 * share:.0f} % of a core: it may have held up what it measures"
    if count := repeats(list(load.trace)):
        yield f"{count} prompts of the trace occur more than once: a prefix cache answers those faster"
    for server in found["servers"]:
        yield from (f"{server['url']}: {text}" for text in _server_warnings(server))
    lengths = [server["tokens"]["generated"] / server["answered"] for server in found["servers"] if server["answered"]]
    if len(lengths) == 2 and not min(lengths) >= (1 - APART) * max(lengths):
        yield f"the servers' answers have {lengths[0]:.0f} and {lengths[1]:.0f} tokens on average: they did not do the same work"


def _server_warnings(server: dict[str, Any]) -> Iterable[str]:
    tokens, answered = server["tokens"], server["answered"]
    if server["gone"]:
        yield "so many requests failed one after another that no more were sent"
    if tokens["counted_by_pieces"]:
        yield (
            f"{tokens['counted_by_pieces']} of {answered} answers came without usage: their tokens are the pieces they were streamed in"
        )
    if tokens["cached"] > REUSED * tokens["prompt"]:
        yield f"{100 * tokens['cached'] / max(tokens['prompt'], 1):.0f} % of the prompts' tokens came from its cache"
    if tokens["short"]:
        yield f"{tokens['short']} of {answered} answers have fewer tokens than asked for (--ignore-eos, where the server knows it)"
    late = server.get("lateness")
    if late is not None and late["p95"] > 1e3 * LATE:
        yield f"requests were sent up to {late['most']:.0f} ms late (p95 {late['p95']:.0f} ms), which counts as time they took"
