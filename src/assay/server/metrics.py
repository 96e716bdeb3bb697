"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Labels = Mapping[str, Any]


class Histogram:
    """How many values lie at or below each bound, their number and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def samples(self, name: str, labels: Labels) -> Iterable[str]:
        """The lines of this histogram."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield _line(f"{name}_bucket", {**labels, "le": bound}, total)
        yield _line(f"{name}_sum", labels, self.sum)
        yield _line(f"{name}_count", labels, total)


class Latencies:
    """Times to the first token and between tokens, of one model."""

    def __init__(self) -> None:
        self.first, self.between = Histogram(SECONDS), Histogram(SECONDS)

    def observe(self, began: float, last: float, now: float, tokens: int) -> None:
        """Count `tokens` that came together at `now`, for a request that `began`; `last` is when others came, 0 for never."""
        if tokens and not last:
            self.first.observe(now - began)
        elif tokens:
            self.between.observe((now - last) / tokens, tokens)


class Requests:
    """Answered requests by path and status, and how long they took."""

    def __init__(self) -> None:
        self._answered: Counter[tuple[str, int]] = Counter()
        self._seconds = Histogram(SECONDS)
        self._routed: Counter[str] = Counter()
        self._router_tokens, self._router_seconds = 0, 0.0
        self._lock = threading.Lock()

    def chosen(self, model: str, tokens: int, seconds: float) -> None:
        """Count a request that the router sent to a model, and what that took."""
        with self._lock:
            self._routed[model] += 1
            self._router_tokens += tokens
            self._router_seconds += seconds

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        with self._lock:
            self._answered[path, status] += 1
            self._seconds.observe(seconds)

    def lines(self, asking: int) -> Iterable[str]:
        """The lines about requests."""
        yield from _head("assay_requests_total", "counter", "Answered requests; status 499: the client left.")
        for (path, status), count in sorted(self._answered.items()):
            yield _line("assay_requests_total", {"path": path, "status": status}, count)
        yield from _head("assay_request_seconds", "histogram", "From a request's first byte to its answer's last.")
        yield from self._seconds.samples("assay_request_seconds", {})
        yield from _head("assay_requests_in_progress", "gauge", "Requests that are read, wait or are answered.")
        yield _line("assay_requests_in_progress", {}, asking)
        yield from _head("assay_routed_total", "counter", 'Requests for "auto" by the model that the router chose.')
        for model, count in sorted(self._routed.items()):
            yield _line("assay_routed_total", {"model": model}, count)
        yield from _head("assay_router_tokens_total", "counter", "Tokens that the router took.")
        yield _line("assay_router_tokens_total", {}, self._router_tokens)
        yield from _head("assay_router_seconds_total", "counter", "Seconds that the router took.")
        yield _line("assay_router_seconds_total", {}, self._router_seconds)


# of a scheduler's `stats()`: attribute, metric, kind, meaning
_STATS = (
    ("waiting", "assay_rows_waiting", "gauge", "Answers that wait for a place in the batch."),
    ("running", "assay_rows_running", "gauge", "Answers in the batch."),
    ("kv_used", "assay_kv_tokens_used", "gauge", "Tokens whose keys and values are held."),
    ("kv_total", "assay_kv_tokens", "gauge", "Tokens whose keys and values there is room for."),
    ("prompt_tokens", "assay_prompt_tokens_total", "counter", "Tokens of prompts."),
    ("cached_tokens", "assay_cached_tokens_total", "counter", "Tokens of prompts that were not computed again."),
    ("generated_tokens", "assay_generated_tokens_total", "counter", "Tokens generated."),
    ("preemptions", "assay_preemptions_total", "counter", "Answers that made room for others and were taken up again."),
    ("steps", "assay_steps_total", "counter", "Steps of the batch."),
    ("drafted_tokens", "assay_drafted_tokens_total", "counter", "Tokens guessed, where the recipe speculates."),
    ("accepted_tokens", "assay_accepted_tokens_total", "counter", "Of those, the ones that the model made its own."),
    (
        "close_choices",
        "assay_close_choices_total",
        "counter",
        "Choices that rounding in another batch might turn; torch only.",
    ),
)


def render(requests: Requests, asking: int, engines: Sequence[Any]) -> str:
    """All metrics in Prometheus' text format."""
    lines = [*requests.lines(asking)]
    stats = [({"model": engine.name}, engine.scheduler.stats(), engine) for engine in engines]
    for attribute, name, kind, meaning in _STATS:
        lines += _head(name, kind, meaning)
        lines += [_line(name, labels, getattr(one, attribute)) for labels, one, _ in stats]
    lines += _head("assay_batch_rows", "histogram", "Answers in the batch, by step.")
    for labels, one, _ in stats:
        rows = Histogram(ROWS)
        for size, steps in one.batch_sizes.items():
            rows.observe(size, steps)
        lines += rows.samples("assay_batch_rows", labels)
    for name, meaning, which in (
        ("assay_time_to_first_token_seconds", "From a request's arrival to its answer's first token.", "first"),
        ("assay_inter_token_seconds", "Between two tokens of an answer.", "between"),
    ):
        lines += _head(name, "histogram", meaning)
        for labels, _, engine in stats:
            lines += getattr(engine.latencies, which).samples(name, labels)
    lines += _head("assay_model_info", "gauge", "The models here, and what runs them.")
    for labels, _, engine in stats:
        lines.append(_line("assay_model_info", {**labels, "backend": engine.backend}, 1))
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"


def _line(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(str(item))}"' for key, item in labels.items())
    return f"{name}{{{shown}}} {value}" if shown else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
