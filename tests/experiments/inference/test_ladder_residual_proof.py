"""The ladder's experiments notice when its messages are awaited at once, and when its modules read a stream that says nothing.

Ranks, clock and link are imitated: one rank in this process, on a clock that modules and messages move on, so that what is measured is
exact. All else is what really runs.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, verdict_of

from assay import catalogue
from assay.evidence.jobs import Job, Outcome
from assay.evidence.place import here
from assay.evidence.point import _judged
from assay.evidence.runner import _evidence
from assay.evidence.types import AGAIN, Verdict
from assay.evidence.verdict import judge, remarks
from assay.experiments import experiments_of
from assay.experiments.inference import ladder_residual as room
from assay.experiments.rates import Rate
from assay.measure.clock import OthersWatch
from assay.methods.inference.ladder_residual import LadderForCausalLM, Rank, links, pending, schedule, timeline

CLAIMS = ("ladder_residual/decode-speedup", "ladder_residual/decode-speedup-no-p2p")
POINTS = {
    claim: {
        **next(found for found in experiments_of("ladder_residual") if found.claim == claim).points["small"][0],
        "width": 32, "layers": 4, "heads": 2, "prompt": 4, "tokens": 2,
    }
    for claim in CLAIMS
}  # fmt: skip
SCORES = {
    "standard": [1.60, 1.61, 1.59],
    "ladder": [1.605, 1.616, 1.594],
    "parallel": [1.61, 1.62, 1.60],
    "desync": [1.63, 1.64, 1.62],
    "random reads": [1.70, 1.71, 1.69],
    "no communication": [1.69, 1.70, 1.68],
}
TINY = {"width": 32, "layers": 3, "heads": 2, "length": 32, "steps": 60}


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class VirtualLink:
    """One message after another on the clock."""

    rank, world = 0, 1

    def __init__(self, latency, clock):
        self.latency, self.clock, self.free = latency, clock, 0.0

    def all_reduce(self, x):
        begin = max(self.clock.now, self.free)
        self.free = begin + self.latency
        return VirtualMessage(x, begin, self.free, self.clock)


class VirtualMessage:
    def __init__(self, x, start, end, clock):
        self.x, self.start, self.end, self.clock = x, start, end, clock

    def wait(self):
        self.clock.now = max(self.clock.now, self.end)
        return self.x


@pytest.fixture
def imitated(monkeypatch):
    """A rank in this process; an attention and an MLP take 1 second each, on the rank that holds the whole model 2."""
    clock = Clock()

    class InProcess:
        def __init__(self, world, timeout):
            self.here = Rank(0, 1)

        def close(self):
            pass

        def run(self, function, *args):
            found = [function(self.here, *args)]
            if function is room.prepare:
                for arm, model in self.here.kept["arms"].items():
                    if arm in ("standard", room.WHOLE):  # the others share the standard's modules
                        for layer in model.parts.layers if arm != room.WHOLE else model.model.layers:
                            for module in (layer.self_attn, layer.mlp):
                                module.register_forward_hook(self.tick(2.0 if arm == room.WHOLE else 1.0))
            return found

        def tick(self, seconds):
            def hook(*_):
                clock.now += seconds

            return hook

    monkeypatch.setattr(room, "Ranks", InProcess)
    monkeypatch.setattr(room, "GroupLink", lambda latency: VirtualLink(latency, clock))
    monkeypatch.setattr(room, "dist", SimpleNamespace(barrier=lambda: None))
    monkeypatch.setattr(room, "count_ranks_as_ours", lambda: None)
    for module in (room, links, pending, timeline):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(room, "converted", lambda task: {})
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(5e-3, (2e-3, 5e-3, 1e-2)))
    return clock


def given(monkeypatch, **changes):
    scores = {**SCORES, **changes}
    monkeypatch.setattr(room, "losses", lambda arms, task: {arm: scores[arm] for arm in arms})


def test_the_experiments_are_those_of_the_catalogue():
    found = {e.claim: e for e in experiments_of("ladder_residual")}
    assert set(found) == set(CLAIMS)
    assert [e.paper["communication"] for e in found.values()] == [0.43, 1.14]


def timed_record(claim, clock):
    """The record of a claim with the times that the clock shows."""
    found = next(found for found in experiments_of("ladder_residual") if found.claim == claim)
    trial = found.run(**POINTS[claim])
    arms = {"baseline": trial.baseline, "candidate": trial.candidate, "free": trial.free, AGAIN: trial.candidate}
    seconds = {}
    for arm, run in {**arms, **trial.arms}.items():
        run()  # fills its cache
        start = clock.now
        run()
        seconds[arm] = clock.now - start
    exact = {arm: value / seconds["candidate"] for arm, value in seconds.items() if arm != "candidate"}
    ratios = {arm: {"median": ratio, "low": ratio, "high": ratio} for arm, ratio in exact.items()}
    seen = {"kind": "trial", "ratios": ratios, **_judged(trial, found)}
    job = Job(claim, found.run.__module__, POINTS[claim], 0, "small", 0, (), 1.0, 1, decides=True)
    record = _evidence(job, catalogue.get_claim(claim), found, Outcome(here(), "ok", "", seen), "")
    assert record.status == "ok", record.error
    return record


@pytest.mark.parametrize("claim", CLAIMS)
def test_messages_that_are_awaited_at_once_are_noticed(monkeypatch, imitated, claim):
    given(monkeypatch)
    record = timed_record(claim, imitated)
    share = room.SHARE if claim == CLAIMS[0] else room.SHARE_WITHOUT_LINKS
    modules = 2 * POINTS[claim]["layers"]
    ladder = modules + share if share < 1 else 1 + modules * share
    assert record.measured.median == pytest.approx(modules * (1 + share) / ladder)
    assert record.details["predicted"]["ladder"] == pytest.approx(record.measured.median)
    assert record.details["hidden"]["ladder"] > 0.7
    assert record.details["hidden"]["standard"] == pytest.approx(0)
    assert judge(record).verdict is Verdict.REPRODUCED
    assert any("no communication" in remark for remark in remarks(record))

    blocking = property(lambda self: schedule(4, self.config.block, () if self.config.block == "ladder" else None))
    monkeypatch.setattr(LadderForCausalLM, "steps", blocking)
    broken = timed_record(claim, imitated)
    assert broken.measured.median == pytest.approx(1.0)
    assert broken.details["hidden"]["ladder"] == pytest.approx(0)
    assert judge(broken).verdict is Verdict.DOES_NOT_PAY


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_fast_model_that_reads_at_random_is_noticed(monkeypatch, imitated, claim):
    given(monkeypatch)
    assert verdict_of(claim, POINTS[claim]) in PAYS
    given(monkeypatch, ladder=SCORES["random reads"])
    assert verdict_of(claim, POINTS[claim]) is Verdict.DOES_NOT_PAY


def test_reading_at_random_loses_what_was_learned():
    """With real models: the ladder's weights, trained, run with every module's read point drawn anew, the shape and the cost the same."""
    rate, test = 1e-2, room.heldout(TINY["length"], 64)
    model = room.trained_model("ladder", 0, rate, TINY)
    honest = float(room.nll(model, *test).mean())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LadderForCausalLM, "_streams", room.RandomReads._streams)
        broken = float(room.nll(model, *test).mean())
    assert broken > (1 + 2 * room.GUARD.margin) * honest
    assert honest < room.bigram_floor(*test) * 1.5


def test_ranks_are_not_others():
    """What a living child computes is of this measurement."""
    code = "import sys\nfor line in sys.stdin:\n    sum(range(10**7))\n    print(1, flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        before = [watch._now()[2] for watch in (OthersWatch, room.RanksWatch)]
        child.stdin.write("go\n")
        child.stdin.flush()
        child.stdout.readline()
        plain, ranks = (
            watch._now()[2] - then for watch, then in zip((OthersWatch, room.RanksWatch), before, strict=True)
        )
    finally:
        child.kill()
        child.communicate()
    assert ranks > plain + 0.02
    assert isinstance(room.RanksWatch().stop()[0], float)


def test_an_arm_at_its_floor_voids_the_comparison(monkeypatch, imitated):
    given(monkeypatch, parallel=[5.0, 5.0, 5.0])
    assert verdict_of(CLAIMS[0], POINTS[CLAIMS[0]]) is Verdict.UNDECIDED


def test_random_reads_leave_a_message_at_least_as_long():
    """Every module of the control reads a stream that lacks the newest output, as the ladder's do, and some lack more."""
    torch.manual_seed(0)
    model = room.language_model("random reads", 0, {**TINY, "layers": 6})
    ids, seen, made = torch.arange(5)[None], [], []
    for layer in model.parts.layers:
        for norm, block in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
            norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
            block.register_forward_hook(lambda _m, _i, out: made.append(out[0] if isinstance(out, tuple) else out))
    model(ids)
    missing = []
    for j in range(1, len(seen)):
        gradients = torch.autograd.grad(seen[j].pow(2).sum(), made[:j], retain_graph=True, allow_unused=True)
        missing.append(sum(gradient is None for gradient in gradients))
        assert gradients[-1] is None
    assert max(missing) > 1


def test_all_arms_of_a_seed_start_from_the_same_weights():
    models = [room.language_model(arm, 1, TINY) for arm in ("standard", "ladder", "parallel", "desync")]
    states = [getattr(model, "base", model).state_dict() for model in models]
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])
    assert room.language_model("no communication", 1, TINY).config.num_attention_heads == 1


@pytest.mark.slow
def test_real_processes_are_timed(monkeypatch):
    monkeypatch.setattr(room, "converted", lambda task: {})
    monkeypatch.setattr(room, "count_ranks_as_ours", lambda: None)
    given(monkeypatch)
    found = next(found for found in experiments_of("ladder_residual") if found.claim == CLAIMS[0])
    trial = found.run(**found.points["smoke"][0])
    for run in (trial.baseline, trial.candidate, trial.free, *trial.arms.values()):
        assert max(run()) > 0
    details = trial.details()
    assert details["latency_seconds"] == pytest.approx(0.43 * details["module_seconds"])
    assert details["rank_paths"]["ladder_residual: pending outputs"] > 0
    assert set(details["timeline"]) == {"standard", "ladder", "parallel", "no communication"}
