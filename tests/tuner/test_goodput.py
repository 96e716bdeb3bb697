"""Serving for goodput: what is looked at, what is chosen, and that it is proven in pairs; on servers that are scripted."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from assay.errors import AssayError, InputError, MissingError
from assay.loadtest.answers import Answer
from assay.loadtest.client import Server
from assay.loadtest.generator import Block, Sample
from assay.loadtest.report import Slo
from assay.tuner import goodput
from assay.tuner.goodput import Candidate, Clients, best_served, serve_command

SLO = Slo(ttft=1.0)
CLIENTS = Clients(2, 100, 40, seed=1)
MODELS = {"as loaded": "m", "tuned": "t"}


class World:
    """Servers that are as fast as the test says, and a clock that only their blocks move on.

    `seconds` says for a candidate how long its requests take to their first text, in turn.
    """

    def __init__(self, monkeypatch, seconds, broken=lambda candidate: False):
        self.seconds, self.broken = seconds, broken
        self.running, self.most, self.now = 0, 0, 0.0
        self.loads, self.requests = [], []
        monkeypatch.setattr(goodput, "_load", self.load)
        monkeypatch.setattr(goodput, "_serving", self.serving)
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)

    @contextlib.contextmanager
    def serving(self, candidate, start):
        if self.broken(candidate):
            raise MissingError("out of memory")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield World.Process(candidate)
        finally:
            self.running -= 1

    class Process:
        def __init__(self, candidate):
            self.candidate, self.server = candidate, Server("h", 1, "/v1")

    def load(self, process, requests, clients):
        requests = list(requests)
        self.requests += requests
        self.loads.append(process.candidate.label())
        firsts = self.seconds(process.candidate)
        begin, took = self.now, max(10.0, 9.0 + max(firsts))  # what is slow has fewer tokens a second too
        self.now += took
        samples = []
        for request, first in zip(requests, itertools.cycle(firsts), strict=False):
            answer = Answer((begin + first, begin + took), begin + took, 40, True, "length")
            samples.append(Sample(request, begin, begin, begin + took, answer))
        return Block(samples, begin, begin + took)


def served(minutes=60.0, settings=None, models=MODELS):
    settings = {"prefill_chunk": (128, 512), "max_running": (4, 8)} if settings is None else settings
    return best_served(models, SLO, CLIENTS, start=None, settings=settings, minutes=minutes)


def test_the_settings_that_keep_the_limits_are_found_one_after_the_other(monkeypatch):
    def seconds(candidate):
        wanted = {"prefill_chunk": 512, "max_running": 4}
        right = sum(candidate.settings.get(name) == value for name, value in wanted.items())
        return [4.0 if candidate.model == "m" else (2.0, 1.4, 0.6)[right]]  # within the limit with both alone

    world = World(monkeypatch, seconds)
    found = served()
    assert found["best"] == {
        "name": "tuned", "model": "t", "settings": {"prefill_chunk": 512, "max_running": 4},
        "options": ["--prefill-chunk", "512", "--max-running", "4"],
    }  # fmt: skip
    assert [row["label"] for row in found["looked"]] == [
        "as loaded",
        "tuned",
        "tuned, prefill_chunk 128",
        "tuned, prefill_chunk 512",
        "tuned, prefill_chunk 512, max_running 4",
        "tuned, prefill_chunk 512, max_running 8",
    ]
    assert world.running == 0


def slower_at_first(first, later):
    """What the model as loaded does: `first` when it is looked at, `later` in the proof."""
    calls = itertools.count()
    return lambda candidate: [0.5] if candidate.model == "t" else first if next(calls) == 0 else later


def test_the_choice_is_proven_in_pairs_on_other_prompts(monkeypatch):
    world = World(monkeypatch, slower_at_first([1.5], [0.5]))
    found = served(settings={})
    proof = world.loads[2:]
    assert len(proof) == 2 * goodput.PAIRS
    assert proof[:8] == ["as loaded", "tuned", "tuned", "as loaded", "tuned", "as loaded", "as loaded", "tuned"]
    assert world.most == 2
    prompts = [request.prompt for request in world.requests]
    assert len(set(prompts)) == len(prompts)
    assert found["best"]["name"] == "tuned"
    assert found["ratios"]["pairs"] == goodput.PAIRS
    # it only looked better at first
    assert found["ratio"]["value"] == pytest.approx(1)
    assert not found["helped"]


def test_what_is_better_for_certain_has_helped(monkeypatch):
    World(monkeypatch, lambda candidate: [0.5] if candidate.model == "t" else [0.5, 1.0001])
    found = served(settings={})
    assert found["ratio"]["value"] == pytest.approx(2, rel=0.01)
    assert found["helped"]
    assert found["baseline"]["within_slo"]["value"] == 0.5
    assert found["proven"]["within_slo"]["value"] == 1


def test_nothing_within_the_limits_is_no_ratio(monkeypatch):
    World(monkeypatch, lambda candidate: [5.0])
    found = served(settings={})
    assert found["ratio"] is None
    assert not found["helped"]
    assert found["baseline"]["within_slo"]["value"] == 0


def test_one_that_cannot_be_served_is_left_out_with_its_reason(monkeypatch):
    def broken(candidate):
        return candidate.settings.get("max_running") == 8 or candidate.model == "t"

    World(monkeypatch, lambda candidate: [0.5], broken)
    found = served()
    errors = {row["label"]: row["error"] for row in found["looked"]}
    assert errors["tuned"] == errors["as loaded, max_running 8"] == "out of memory"
    assert found["best"]["name"] == "as loaded"
    assert found["ratio"] is None  # it is the baseline itself


def test_nothing_can_be_served(monkeypatch):
    World(monkeypatch, lambda candidate: [0.5], broken=lambda candidate: True)
    with pytest.raises(AssayError, match="m cannot be served: out of memory"):
        served()
    with pytest.raises(InputError):
        served(models={})


def test_the_time_is_kept(monkeypatch):
    slo = Slo(ttft=0.9)
    monkeypatch.setattr(f"{__name__}.SLO", slo)  # which the model as loaded keeps half the time, in blocks of 10 s
    world = World(monkeypatch, lambda candidate: [0.5] if candidate.model == "t" else [0.5, 1.0])
    served(minutes=1.5)  # 90 s: 45 for looking
    assert len(world.loads) == 5 + 2 * goodput.LEAST_PAIRS
    world = World(monkeypatch, lambda candidate: [0.5] if candidate.model == "t" else [0.5, 1.0])
    served(minutes=3.0, settings={})  # 20 s for looking, then pairs of 20 s
    assert len(world.loads) == 2 + 2 * 8


# ---- going on where a run was interrupted


@pytest.fixture
def journal_in(tmp_path, monkeypatch):
    """Makes the journal of a run that writes to a folder."""
    head = {"settings": {}, "model": "1", "workload": "", "eval": "", "machine": "here", "assay": "0"}
    monkeypatch.setattr(goodput, "identity", lambda settings: {**head, "settings": {}})

    def make(resume=False, slo=SLO):
        return goodput.journal_of(tmp_path / "out", None, slo, 2, resume, lambda text: None)

    return make


def test_looks_of_an_interrupted_run_are_not_taken_again(monkeypatch, journal_in):
    broken = {"tuned"}
    world = World(monkeypatch, lambda candidate: [0.5], broken=lambda candidate: candidate.name in broken)
    load, most = world.load, [2]

    def interrupted(process, requests, clients):
        if len(world.loads) == most[0]:
            raise KeyboardInterrupt
        return load(process, requests, clients)

    monkeypatch.setattr(goodput, "_load", interrupted)

    def go_on(resume):
        settings = {"max_running": (4, 8)}
        return best_served(MODELS, SLO, CLIENTS, start=None, settings=settings, journal=journal_in(resume))

    with pytest.raises(KeyboardInterrupt):
        go_on(False)
    assert world.loads == ["as loaded", "as loaded, max_running 4"]
    world.loads.clear()
    broken.clear()
    most[0] = 10**6
    found = go_on(True)
    looked, proof = world.loads[:2], world.loads[2:]
    assert looked == ["tuned", "as loaded, max_running 8"]  # what failed is tried again
    assert "as loaded" in proof  # the proof's pairs belong together
    assert [row["label"] for row in found["looked"]] == ["as loaded", "tuned", "as loaded, max_running 4", *looked[1:]]
    assert [row["error"] for row in found["looked"]] == [""] * 4
    with pytest.raises(InputError, match="other settings"):
        journal_in(True, Slo(ttft=2.0))
    assert not journal_in(False).old


def test_what_was_tuned_is_tuned_once_as_long_as_it_is_there(tmp_path, journal_in):
    calls, out = [], tmp_path / "out"

    def tune():
        out.mkdir(exist_ok=True)
        (out / "recipe.toml").write_text(f"# {len(calls)}")
        calls.append(1)
        return {"goal": "throughput", "path": out}

    def document(resume):
        return goodput.tuned(journal_in(resume), out, tune)

    assert document(False) == document(True) == {"goal": "throughput", "path": str(out)}
    assert len(calls) == 1
    (out / "recipe.toml").write_text("# another one's")
    document(True)
    assert len(calls) == 2
    document(False)
    assert len(calls) == 3


def test_the_command_that_serves():
    command = serve_command(Candidate("tuned", "dir", {"max_running": 8}), 8123)
    assert command[1:] == ["-m", "assay", "serve", "dir", "--port", "8123", "--max-running", "8"]


def test_requests_are_as_long_as_asked_for_and_never_the_same():
    blocks = [CLIENTS.requests(block, 2) for block in range(3)]
    assert blocks == [CLIENTS.requests(block, 2) for block in range(3)]
    every = [request for block in blocks for pair in block for request in pair]
    assert len({request.prompt for request in every}) == len(every) == 3 * 2 * 2 * 2
    assert all(20 <= request.new_tokens <= 60 for request in every)
