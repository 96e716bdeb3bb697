"""The matrix: every model, format, engine and site, each cell run in processes of its own, cold and warm apart."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from assay import checks
from assay.measure.energy import EnergyMeter
from assay.measure.isolate import run_isolated
from assay.methods.core.fleet.hardware import Link
from assay.methods.serving.mobile_llm_measurement.asking import Answer, LocalSession, Session, hosted
from assay.methods.serving.mobile_llm_measurement.engines import ALWAYS, PEERS, EngineKind, opened
from assay.methods.serving.mobile_llm_measurement.predictor import Figures
from assay.methods.serving.mobile_llm_measurement.questions import Question, scored

SiteKind = Literal["device", "edge", "cloud"]
SITE_KINDS = ("device", "edge", "cloud")
ACCOUNTED = 0.02
"""Parts must add up to the whole within this share."""


@dataclass(frozen=True)
class Site:
    """Where an application's model runs.

    On a "device" it runs where it is asked, in the asker's process if it can; at the "edge" and in the "cloud" in a server process, behind
    `link` if there is one. `memory_bytes` ends what takes more (resident, polled, with the asker's own where there is a server).
    `price` is an hour's, `offline` the share of the time in which the site cannot be reached; both are the user's figures.
    """

    name: str
    kind: SiteKind = "device"
    threads: int = 1
    memory_bytes: int | None = None
    link: Link | None = None
    price: float = 0.0
    offline: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, SITE_KINDS)
        checks.whole("threads", self.threads, low=1)
        if self.memory_bytes is not None:
            checks.whole("memory_bytes", self.memory_bytes, low=1)
        checks.number("price", self.price, low=0)
        checks.number("offline", self.offline, low=0, high=1)
        if self.kind == "device" and (self.link is not None or self.offline):
            raise ValueError("a device is reached by no link and is never offline: link must be None and offline 0")


@dataclass(frozen=True)
class Model:
    """A model's folder (safetensors and tokenizer), and its GGUF file where engines shall read one."""

    name: str
    folder: str
    gguf: str | None = None


@dataclass(frozen=True)
class Cell:
    """One place of the matrix. `clients` ask at the same time; a device has one."""

    model: Model
    format: str
    engine: EngineKind
    site: Site
    clients: int = 1

    def __post_init__(self) -> None:
        checks.choice("format", self.format, self.engine.formats)
        if checks.whole("clients", self.clients, low=1) > 1 and self.site.kind == "device":
            raise ValueError(f"a device has one client, got clients {self.clients}")

    @property
    def name(self) -> str:
        """In words."""
        more = f", {self.clients} clients" if self.clients > 1 else ""
        return f"{self.model.name} {self.format}, {self.engine.name}, {self.site.name}{more}"


@dataclass(frozen=True)
class Row:
    """A cell's results. Where `status` is not "ok" there is nothing but the `reason`: "missing" (an engine that is not installed),
    "out of memory", "timeout", "failed".

    `cold` is the first answer of a fresh process, with its start and the loading of the model in it; `warm` are the others, in the order
    they came, without. Each has its parts and `unaccounted`, the share of its seconds that they leave. `peak_bytes` is the resident memory
    of the model's process at its highest, loading included, `held_bytes` what it holds behind the last answer. `texts` are the answers of
    the first run, `same` says whether the first prompt, asked again in the end, had the same answer as in the beginning. `slowdown` is the
    last run's time over the first's, question by question (median): above 1 where a device throttles. `joules` of an answer, None where
    no counter can be read.
    """

    cell: str
    model: str
    format: str
    engine: str
    site: str
    kind: str
    threads: int
    clients: int
    status: str
    reason: str = ""
    cold: dict[str, Any] | None = None
    warm: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    accuracy: float | None = None
    parse_failures: float | None = None
    f1: float | None = None
    right: list[bool] = field(default_factory=list)
    same: bool | None = None
    peak_bytes: int = 0
    held_bytes: int = 0
    slowdown: float | None = None
    joules: float | None = None
    price: float = 0.0
    available: float = 1.0

    @property
    def ok(self) -> bool:
        """Whether it ran."""
        return self.status == "ok"

    def quantile(self, q: float, what: str = "seconds") -> float:
        """Of the warm answers: of their seconds, or of another figure they have."""
        return float(np.quantile([answer[what] for answer in self.warm], q))

    def part(self, name: str) -> float:
        """Median seconds of a part of the warm answers; 0 where they have none of it."""
        return statistics.median(answer["parts"].get(name, 0.0) for answer in self.warm)

    @property
    def unaccounted(self) -> float:
        """The largest share that the parts of an answer leave or claim twice, cold or warm."""
        answers = [*self.warm, *([self.cold] if self.cold is not None else [])]
        return max((abs(answer["unaccounted"]) for answer in answers), default=0.0)

    @property
    def adds_up(self) -> bool:
        """Whether the parts make the whole within 2 %."""
        return self.unaccounted <= ACCOUNTED

    @property
    def figures(self) -> Figures:
        """Medians of the time to the first token without network and waiting and of the time a token, and the memory."""
        tokens = [answer["parts"]["decode"] / max(answer["new_tokens"] - 1, 1) for answer in self.warm]
        return Figures(self.part("prefill"), statistics.median(tokens), float(self.peak_bytes))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def cells(
    models: Sequence[Model],
    sites: Sequence[Site],
    *,
    engines: Sequence[EngineKind] = (*ALWAYS, *PEERS),
    formats: Sequence[str] = (),
) -> list[Cell]:
    """All cells of a matrix, engines and formats as they go together.

    Of engines that have some of `formats` the others are left out; one that has none of them (a server that takes a model as it is stored)
    stays as it is. Raises ValueError for a format that no engine has.
    """
    if unknown := sorted(set(formats) - {name for engine in engines for name in engine.formats}):
        raise ValueError(f"formats must be of the engines' own, none has {unknown[0]!r}")
    found = []
    for model in models:
        for site in sites:
            for engine in engines:
                wanted = [name for name in engine.formats if name in formats] or list(engine.formats)
                found += [Cell(model, name, engine, site) for name in wanted]
    return found


def deployment_matrix(
    matrix: Sequence[Cell],
    questions: Sequence[Question],
    *,
    new_tokens: int = 8,
    repeats: int = 2,
    timeout: float = 600.0,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Run every cell: `questions` asked `repeats` times, each answer `new_tokens` long; a row a cell, whatever becomes of it.

    Each cell has a fresh process (a server's has one more), which a failure, a time limit (seconds) or the site's memory limit
    ends alone. Cells run one after the other; nothing else should run meanwhile. Every prompt begins with a number of its own, so that no
    engine answers from what it kept of another. Raises ValueError or TypeError for arguments out of range, and for a cell that is no JSON
    (an engine's options travel to its process as such), before anything runs.

    When NOT to use it: to compare two settings of one engine closely; `assay tune` times them in turns.
    """
    new_tokens, repeats = checks.whole("new_tokens", new_tokens, low=2), checks.whole("repeats", repeats, low=1)
    timeout = checks.number("timeout", timeout, above=0)
    if not matrix or not questions:
        raise ValueError(
            f"matrix and questions must not be empty, got {len(matrix)} cells and {len(questions)} questions"
        )
    if len({cell.name for cell in matrix}) < len(matrix):
        raise ValueError("matrix must hold every cell once")
    for cell in matrix:
        if not Path(cell.model.folder).is_dir():
            raise ValueError(f"folder of {cell.model.name!r} must be a folder, got {cell.model.folder!r}")
        try:
            json.dumps(asdict(cell))
        except (TypeError, ValueError) as error:
            raise TypeError(f"matrix must hold cells of plain values, {cell.name!r} has others: {error}") from None
    rows = []
    for cell in matrix:
        if say is not None:
            say(cell.name)
        rows.append(_row(cell, list(questions), new_tokens, repeats, timeout))
    return rows


def _row(cell: Cell, questions: list[Question], new_tokens: int, repeats: int, timeout: float) -> Row:
    facts: dict[str, Any] = {
        "cell": cell.name, "model": cell.model.name, "format": cell.format, "engine": cell.engine.name, "site": cell.site.name,
        "kind": cell.site.kind, "threads": cell.site.threads, "clients": cell.clients, "available": 1 - cell.site.offline,
    }  # fmt: skip
    if why := cell.engine.missing(cell.model.gguf):
        return Row(**facts, status="missing", reason=why)
    child = run_isolated(
        f"{__name__}:run_cell",
        {
            "cell": asdict(cell),
            "prompts": [question.prompt for question in questions],
            "new_tokens": new_tokens,
            "repeats": repeats,
            "timeout": timeout,
            "spawned": time.perf_counter(),  # of all processes of this machine alike, and nobody sets it
        },
        timeout_s=timeout,
        memory_bytes=cell.site.memory_bytes,
        environment={
            "OMP_NUM_THREADS": str(cell.site.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        },
    )
    if not child.ok:
        return Row(**facts, status=child.status, reason=child.error, peak_bytes=child.peak_rss_bytes)
    seen = child.value
    scores = scored(questions, seen["texts"])
    typical = statistics.median(answer["seconds"] for answer in seen["warm"])
    return Row(
        **facts,
        **seen,
        status="ok",
        accuracy=scores.accuracy,
        parse_failures=scores.parse_failures,
        f1=scores.f1,
        right=list(scores.right),
        price=cell.site.price * typical / 3600,
    )


# ------------------------------------------------------------------------------------------------------------ in the cell's process


def run_cell(
    cell: dict[str, Any], prompts: list[str], new_tokens: int, repeats: int, timeout: float, spawned: float
) -> dict[str, Any]:
    """One cell, in its own process: its cold answer, its warm ones, and what it took, as JSON."""
    begin = time.perf_counter()
    start = begin - spawned
    with _placed(cell, timeout) as (session, parts, local):
        if local:  # this process is the one that had to start
            begin, parts = begin - start, {"start": start, **parts}
        first = numbered(prompts[0], 0)
        answer = session.ask(first, new_tokens)
        seconds = time.perf_counter() - begin
        cold = _told(answer, seconds, {**parts, **answer.parts}, question=0, run=-1)
        asked = [(run, number) for run in range(repeats) for number in range(len(prompts))]
        with EnergyMeter() as meter:
            warm = list(_answers(session, prompts, asked, new_tokens, cell["clients"]))
        same = session.ask(first, new_tokens).text == answer.text
        peak, held = session.peak_bytes(), session.held_bytes()
    count = len(prompts)
    return {
        "cold": cold,
        "warm": [
            _told(one, one.seconds, one.parts, question=n, run=run) for (run, n), one in zip(asked, warm, strict=True)
        ],
        "texts": [one.text for one in warm[:count]],
        "same": same,
        "peak_bytes": peak,
        "held_bytes": held,
        "slowdown": _slowdown(warm, count, repeats),
        "joules": None if meter.joules is None else meter.joules / len(warm),
    }


def numbered(prompt: str, number: int) -> str:
    """A prompt that begins as no other does. The number has four digits, so that lengths stay alike.

    >>> numbered("Who?", 7)
    '[0007]\\nWho?'
    """
    return f"[{number % 10_000:04d}]\n{prompt}"


@contextlib.contextmanager
def _placed(cell: dict[str, Any], timeout: float) -> Iterator[tuple[Session, dict[str, float], bool]]:
    """The engine where its site is, what starting took, and whether it runs in this process; ended in any case."""
    site, given = cell["site"], cell["engine"]
    kind = EngineKind(
        **{
            **given,
            "formats": tuple(given["formats"]),
            "command": tuple(given["command"]),
            "needs": tuple(given["needs"]),
        }
    )
    where = {
        "folder": cell["model"]["folder"],
        "gguf": cell["model"]["gguf"],
        "format": cell["format"],
        "threads": site["threads"],
    }
    if site["kind"] == "device" and kind.opener:
        begin = time.perf_counter()
        session = LocalSession(opened(kind, **where))
        yield session, {"load": time.perf_counter() - begin}, True
        return
    link = None if site["link"] is None else Link(**site["link"])
    started = hosted(kind, **where, link=link, timeout=timeout)
    try:
        yield started.session, dict(started.parts), False
    finally:
        started.session.close()


def _answers(
    session: Session, prompts: list[str], asked: list[tuple[int, int]], new_tokens: int, clients: int
) -> Iterator[Answer]:
    """The answers in the order of `asked`, `clients` of them made at a time."""

    def one(place: int) -> Answer:
        return session.ask(numbered(prompts[asked[place][1]], place + 1), new_tokens)

    if clients == 1:
        yield from map(one, range(len(asked)))
        return
    with ThreadPoolExecutor(clients) as pool:
        yield from pool.map(one, range(len(asked)))


def _told(answer: Answer, seconds: float, parts: Any, *, question: int, run: int) -> dict[str, Any]:
    return {
        "question": question,
        "run": run,
        "seconds": seconds,
        "first": answer.first,
        "parts": dict(parts),
        "unaccounted": 1 - sum(parts.values()) / seconds,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "sent": answer.sent,
        "received": answer.received,
        "cached": answer.cached,
    }


def _slowdown(warm: Sequence[Answer], count: int, repeats: int) -> float | None:
    if repeats < 2:
        return None
    return statistics.median(warm[n - count].seconds / warm[n].seconds for n in range(count))
