"""Requests over time: what a simulator replays and what a server was seen to do with them.

`read_trace` reads the public traces people plan with and assay's own:

- Azure's LLM inference traces: CSV with `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`;
- BurstGPT: CSV with `Timestamp` (seconds), `Request tokens`, `Response tokens`, and `Model`;
- assay's: JSON lines with `at` (seconds), `prompt_tokens`, `new_tokens`, and if they are known `tenant`, `priority`, `ttft` and `e2e`
  (seconds), which `assay loadtest --samples` writes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from assay import checks
from assay.errors import InputError

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST = ("Timestamp", "Request tokens", "Response tokens")
OURS = ("at", "prompt_tokens", "new_tokens", "tenant", "priority", "ttft", "e2e", "prompt")
MOST_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of `prompt_tokens` that comes `at` seconds after the start and asks for `new_tokens`; a higher `priority` goes first."""

    at: float
    prompt_tokens: int
    new_tokens: int
    tenant: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        checks.number("at", self.at, low=0)
        checks.whole("prompt_tokens", self.prompt_tokens, low=1, high=MOST_TOKENS)
        checks.whole("new_tokens", self.new_tokens, low=1, high=MOST_TOKENS)
        checks.whole("priority", self.priority)


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request: when its first token and its last came, in seconds after the start of the trace.

    >>> seen = Served(Request(1.0, 100, 11), first=1.5, end=2.5)
    >>> seen.ttft, seen.itl, seen.e2e
    (0.5, 0.1, 1.5)
    """

    request: Request
    first: float
    end: float
    server: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.request.at

    @property
    def itl(self) -> float | None:
        """Seconds between two tokens on average; None where there is one token only."""
        gaps = self.request.new_tokens - 1
        return (self.end - self.first) / gaps if gaps else None

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.end - self.request.at


@dataclass(frozen=True)
class Trace:
    """Requests in the order they come, and `measured`, what a server did with each of them where the file says so."""

    requests: tuple[Request, ...]
    measured: tuple[Served, ...] = ()
    source: str = ""


def read_trace(path: Path | str, *, limit: int | None = None) -> Trace:
    """The trace in a file, of one of the three forms above, its first request at 0 seconds; `limit` keeps the first so many.

    Requests without an answer (BurstGPT has some) are left out. Raises InputError, naming the file and the line, for anything else.
    """
    file = Path(path).expanduser()
    found: list[tuple[Request, float | None, float | None]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            rows = _json_lines(stream) if first.lstrip().startswith("{") else _csv(stream)
            for number, row in rows:
                try:
                    line = row()
                except (
                    ValueError,
                    TypeError,
                    KeyError,
                    OverflowError,
                    AttributeError,
                ) as error:  # a short line gives None
                    raise InputError(f"{file}, line {number}: {_said(error)}") from None
                if line is not None:
                    found.append(line)
                if limit is not None and len(found) >= limit:
                    break
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise InputError(f"{file} has no requests")
    found.sort(key=lambda line: line[0].at)
    start = found[0][0].at
    requests = [replace(request, at=request.at - start) for request, _, _ in found]
    measured: list[Served] = []
    for request, (_, ttft, e2e) in zip(requests, found, strict=True):
        if ttft is not None and e2e is not None:
            measured.append(Served(request, request.at + ttft, request.at + e2e))
    return Trace(tuple(requests), tuple(measured) if len(measured) == len(requests) else (), str(file))


Line = tuple[Request, float | None, float | None]


def _csv(stream: Any) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(stream)
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    if set(AZURE) <= set(columns):
        read = _azure
    elif set(BURST) <= set(columns):
        read = _burst
    else:
        raise InputError(
            f"a trace has the columns {', '.join(AZURE)} (Azure) or {', '.join(BURST)} (BurstGPT), or is JSON lines; "
            f"got the columns {', '.join(columns)[:200] or 'of an empty file'}"
        )
    for row in reader:
        yield reader.line_num, (lambda row=row: read(row))


def _azure(row: dict[str, Any]) -> Line | None:
    text = row["TIMESTAMP"].strip().rstrip("Z").split("+")[0]
    whole, _, part = text.partition(".")  # Azure writes seven decimals, one more than datetime reads
    at = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{part or 0}")
    return _counted(at, row["ContextTokens"], row["GeneratedTokens"])


def _burst(row: dict[str, Any]) -> Line | None:
    return _counted(float(row["Timestamp"]), row["Request tokens"], row["Response tokens"], str(row.get("Model") or ""))


def _counted(at: float, prompt: str, new: str, tenant: str = "") -> Line | None:
    prompt_tokens, new_tokens = _whole(prompt), _whole(new)
    if prompt_tokens < 1 or new_tokens < 1:
        return None
    return Request(at, prompt_tokens, new_tokens, tenant), None, None


def _whole(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"tokens must be whole numbers, got {text!r}")
    return int(value)


def _json_lines(stream: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, (lambda line=line: _ours(line))


def _ours(line: str) -> Line:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TypeError(f"must be a JSON object, got {checks.shown(fields)}")
    if unknown := sorted(set(fields) - set(OURS)):
        raise ValueError(f"may have {', '.join(OURS)}; got {', '.join(unknown)[:100]}")
    if "prompt_tokens" not in fields:
        raise ValueError("must have prompt_tokens: a simulator does not read prompts")
    if not isinstance(fields.get("tenant", ""), str):
        raise TypeError(f"tenant must be a text, got {checks.shown(fields['tenant'])}")
    request = Request(
        checks.number("at", fields["at"], low=0),
        fields["prompt_tokens"],
        fields["new_tokens"],
        fields.get("tenant", ""),
        fields.get("priority", 0),
    )
    seen = [checks.number(name, fields[name], low=0) if name in fields else None for name in ("ttft", "e2e")]
    if seen[0] is not None and seen[1] is not None and seen[1] < seen[0]:
        raise ValueError(f"e2e must not be less than ttft, got {seen[1]:g} and {seen[0]:g}")
    return request, seen[0], seen[1]


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"must have {error.args[0]}"
    return str(error)[:200]


class Streams:
    """Random numbers by name: two policies that draw from the same names see the same numbers, whatever else each of them draws.

    >>> Streams(3).of("arrivals").random() == Streams(3).of("arrivals").random() != Streams(3).of("lengths").random()
    True
    """

    def __init__(self, seed: int) -> None:
        self.seed = checks.whole("seed", seed, low=0)

    def of(self, name: str) -> np.random.Generator:
        """A new generator at the beginning of the stream `name`."""
        return np.random.default_rng([self.seed, *name.encode()])


def poisson(
    rate: float,
    seconds: float,
    lengths: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    tenant: str = "",
    priority: int = 0,
) -> list[Request]:
    """Arrivals at random, `rate` a second, for `seconds`, each with a pair of `lengths` (prompt and new tokens) drawn from those given.

    Raises ValueError or TypeError for numbers out of range and an empty list.
    """
    rate, seconds = checks.number("rate", rate, above=0), checks.number("seconds", seconds, above=0)
    if not lengths:
        raise ValueError("lengths must hold at least one pair of prompt and new tokens")
    streams = Streams(seed)
    gaps, drawn = streams.of(f"arrivals {tenant}"), streams.of(f"lengths {tenant}")
    found, at = [], float(gaps.exponential(1 / rate))
    while at < seconds:
        prompt, new = lengths[int(drawn.integers(len(lengths)))]
        found.append(Request(at, int(prompt), int(new), tenant, priority))
        at += float(gaps.exponential(1 / rate))
    return found


def merged(traces: Iterable[Iterable[Request]]) -> list[Request]:
    """Several traces as one, in the order of their times."""
    return sorted((request for trace in traces for request in trace), key=lambda request: request.at)


def span(requests: Sequence[Request]) -> float:
    """Seconds from the first request to the last; at least a nanosecond, so that rates are finite."""
    return max(requests[-1].at - requests[0].at, 1e-9) if requests else math.nan
