"""Goodput: how a model should be served so that the most requests a second are answered within limits (an SLO).

Goodput cannot be measured on few layers or predicted by kind of work, as the other goals are: it is what a whole server does under
load. So the recipe is found, and its quality proven, for throughput, as `assay.tuner.tune` does; then servers decide. `assay serve` is
started with the model as loaded and with the tuned one, and with one of its settings after the other changed. Each gets a block of
requests from a number of clients, which only chooses. What was chosen is proven against the model as loaded with default settings
(`prove`): both run at once, one stopped while the other is loaded, a block each in turn, and the ratio has the interval of those pairs.

A journal beside that of tuning (`journal_of`) keeps what was tuned and each look, so that an interrupted run goes on from there; the
proof is made anew, since its pairs belong together.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import AssayError, InputError
from assay.loadtest.client import ask
from assay.loadtest.generator import Block, Load, Measured, drive, order
from assay.loadtest.process import ServerProcess, free_port
from assay.loadtest.report import Slo, comparison, figures
from assay.loadtest.traces import Lengths, Prompts, Request, alike, made_up
from assay.tuner.journal import Journal, file_hash, identity, model_hash
from assay.tuner.names import RECIPE
from assay.tuner.work import Settings

START_SECONDS = 300.0  # that a server has to load its model
LOOKING = 0.5  # share of the time that choosing may take
PAIRS = 12  # of blocks in the proof, if there is time
LEAST_PAIRS = 4  # and if there is none
ROUNDS = 2  # requests of each client in a block
SETTINGS: dict[str, tuple[int, ...]] = {"prefill_chunk": (64, 128, 512, 1024), "max_running": (4, 8, 16, 32)}
"""Settings of `assay serve` that are tried, beside their defaults."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """What is served, and with which of `assay serve`'s settings (none: the defaults)."""

    name: str
    model: str
    settings: Mapping[str, int] = field(default_factory=dict)

    def label(self) -> str:
        """In words, for people."""
        return ", ".join([self.name, *(f"{name} {value}" for name, value in self.settings.items())])

    def options(self) -> list[str]:
        """The words of the command line that say so."""
        return [word for name, value in self.settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


Start = Callable[[Candidate], ServerProcess]
Look = Callable[[Candidate], dict[str, Any]]


@dataclass(frozen=True)
class Clients:
    """The load: so many clients, each of which waits for its answer, and what they ask."""

    count: int
    prompt_tokens: int
    new_tokens: int
    seed: int = 0

    def requests(self, block: int, servers: int) -> list[tuple[Request, ...]]:
        """The requests of a block for each server: lengths from half of those asked for to one and a half, prompts that never repeat."""
        prompt, new = (Lengths(max(1, n // 2), n + n // 2) for n in (self.prompt_tokens, self.new_tokens))
        own = self.seed * 1_000_003 + block
        made = alike(made_up(prompt, new, own), Prompts(own), servers)
        return [next(made) for _ in range(ROUNDS * self.count)]


def serve_command(candidate: Candidate, port: int) -> list[str]:
    """The command that serves a candidate."""
    return [sys.executable, "-m", "assay", "serve", candidate.model, "--port", str(port), *candidate.options()]


def starter(folder: Path) -> Start:
    """What starts `assay serve` for a candidate, with its log in `folder`."""

    def start(candidate: Candidate) -> ServerProcess:
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if name != "ASSAY_API_KEY"}
        log = folder / f"serve-{port}.log"
        return ServerProcess(
            serve_command(candidate, port),
            port,
            log=log,
            environment=environment,
            chat=False,
            extra={"ignore_eos": True},
        )

    return start


def journal_of(output: Path, settings: Settings, slo: Slo, clients: int, resume: bool, say: Say) -> Journal:
    """The journal of a run for goodput, whose recipe is tuned with `settings`. Raises as `Journal` and `identity`."""
    head = identity(settings)
    head["settings"] |= {"slo": vars(slo), "clients": clients}
    return Journal(output.parent / f".{output.name}.goodput.jsonl", head, resume, 0.0, say)


def tuned(journal: Journal, output: Path, tune: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The document of tuning: that of the interrupted run, if what it saved in `output` is there as it was, else that of `tune()`."""
    known = journal.old.get("tuned")
    if known is None or known["artefact"] != _contents(str(output)):
        document = json.loads(json.dumps(tune(), default=str))
        known = {"document": document, "artefact": _contents(str(output))}
        journal.add("tuned", known)
    found: dict[str, Any] = known["document"]
    return found


def _contents(model: str) -> str:
    """What a model is known by: the hashes of its files and its recipe, or its name where it is no folder."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    recipe = folder / RECIPE
    return f"{model_hash(folder)} {file_hash(recipe) if recipe.is_file() else ''}".strip()


def best_served(
    models: Mapping[str, str],
    slo: Slo,
    clients: Clients,
    *,
    start: Start,
    settings: Mapping[str, tuple[int, ...]] = SETTINGS,
    minutes: float = 10.0,
    say: Say = lambda _: None,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """The settings, and which of the `models` (names and what to serve, the first as loaded), that give the best goodput; as JSON.

    `best` is what was chosen, `helped` whether it is better than the first model with default settings for certain (the low end of
    the ratio's interval is above 1), `ratio` that interval, None where not every block had a request within the limits; `looked` holds all
    that was tried. Looks that are in the `journal` are not taken again. Raises InputError when there are no models, and AssayError
    when the first one cannot be served.
    """
    if not models:
        raise InputError("there must be a model to serve")
    begin = time.monotonic()
    baseline, *others = (Candidate(name, model) for name, model in models.items())
    looked: list[dict[str, Any]] = []
    look = functools.partial(_looked, clients=clients, slo=slo, start=start, looked=looked, say=say, journal=journal)
    best = look(baseline)
    if best["error"]:
        raise AssayError(f"{baseline.model} cannot be served: {best['error']}")
    best = max([best, *map(look, others)], key=_score)
    chosen = _with_settings(best, settings, look, begin + 60 * LOOKING * minutes, say)
    pair = [baseline] if chosen == baseline else [baseline, chosen]
    tested = prove(pair, clients, start, begin + 60 * minutes, say)
    rows = [figures(one, Load(concurrency=clients.count, requests=clients.count), slo) for one in tested]
    ratios = comparison(tested[0], tested[1], slo) if len(tested) == 2 else None
    ratio = None if ratios is None else ratios["goodput_per_second"]
    helped = ratio is not None and ratio["low"] is not None and ratio["low"] > 1
    return {
        "best": {
            "name": chosen.name,
            "model": chosen.model,
            "settings": dict(chosen.settings),
            "options": chosen.options(),
        },
        "helped": helped,
        "ratio": ratio,
        "ratios": ratios,
        "baseline": rows[0],
        "proven": rows[-1],
        "looked": looked,
        "clients": {"count": clients.count, "prompt_tokens": clients.prompt_tokens, "new_tokens": clients.new_tokens},
        "seconds": time.monotonic() - begin,
    }


def _with_settings(
    best: dict[str, Any], settings: Mapping[str, tuple[int, ...]], look: Look, deadline: float, say: Say
) -> Candidate:
    """The best candidate with one setting after the other changed to the value that is best for it, while there is time."""
    for name, values in settings.items():
        so_far: Candidate = best["candidate"]
        for value in values:
            if time.monotonic() >= deadline:
                say("no time is left to look at further settings")
                return _chosen(best)
            one = Candidate(so_far.name, so_far.model, {**so_far.settings, name: value})
            best = max(best, look(one), key=_score)
    return _chosen(best)


def _chosen(best: dict[str, Any]) -> Candidate:
    candidate: Candidate = best["candidate"]
    return candidate


def _score(found: dict[str, Any]) -> tuple[float, float]:
    """Goodput first; where that is equal (none, or all requests within the limits) tokens a second; one that failed is last."""
    return (found["goodput"], found["tokens_per_second"])


def _looked(
    candidate: Candidate,
    *,
    clients: Clients,
    slo: Slo,
    start: Start,
    looked: list[dict[str, Any]],
    say: Say,
    journal: Journal | None,
) -> dict[str, Any]:
    """A look at a candidate, noted in `looked`: one block, or why there is none."""

    def row() -> dict[str, Any]:
        requests = (each[0] for each in clients.requests(len(looked), 1))
        say(f"serving {candidate.label()}")
        try:
            with _serving(candidate, start) as process:
                block = _load(process, requests, clients)
        except AssayError as error:
            return {"goodput": -1.0, "tokens_per_second": -1.0, "error": str(error), "status": "failed"}
        goodput = sum(map(slo.met, block.samples)) / block.seconds
        tokens = sum(s.answer.tokens for s in block.samples if s.answer is not None)
        return {"goodput": goodput, "tokens_per_second": tokens / block.seconds, "error": "", "status": "ok"}

    key = f"look at {candidate.label()} of {_contents(candidate.model)}"
    found = {"label": candidate.label()} | (row() if journal is None else journal.get(key, row))
    said = found["error"] or (
        f"{found['goodput']:.2f} requests/s within the limits, {found['tokens_per_second']:.0f} tokens/s"
    )
    say(f"{candidate.label()}: {said}")
    looked.append(found)
    return {**found, "candidate": candidate}


def prove(candidates: list[Candidate], clients: Clients, start: Start, deadline: float, say: Say) -> list[Measured]:
    """Blocks of each candidate, in turn, until the deadline: at least four of each, at most twelve."""
    with contextlib.ExitStack() as all_of_them:
        processes = [all_of_them.enter_context(_serving(candidate, start)) for candidate in candidates]
        tested = [Measured(process.server, [], []) for process in processes]
        requests: list[tuple[Request, ...]] = []
        slowest, begun = 0.0, time.monotonic()
        for number, which in order(PAIRS, len(candidates)):
            if len(tested[0].blocks) == len(tested[-1].blocks):  # a new pair
                now = time.monotonic()
                slowest, begun = (max(slowest, now - begun) if number else 0.0), now
                if number >= LEAST_PAIRS and now + slowest > deadline:
                    break
                requests = clients.requests(1_000 + number, len(candidates))
            say(f"proof: block {number + 1}, {candidates[which].label()}")
            tested[which].blocks.append(_load(processes[which], (each[which] for each in requests), clients))
    return tested


@contextlib.contextmanager
def _serving(candidate: Candidate, start: Start) -> Iterator[ServerProcess]:
    """A server that answers, stopped; it is ended afterwards."""
    process = start(candidate)
    try:
        process.wait_until_ready(START_SECONDS)
        process.pause()
        yield process
    finally:
        process.end()


def _load(process: ServerProcess, requests: Iterable[Request], clients: Clients) -> Block:
    with process.in_use() as server:
        return asyncio.run(drive(iter(requests), functools.partial(ask, server), concurrency=clients.count))
