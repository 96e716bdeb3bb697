"""The ladder's experiments notice when its messages are awaited at once, and when its modules read a stream that says nothing.

Ranks, clock and link are imitated: one rank in this process, on a clock that modules and messages move on, so that what is measured is
exact. All else is what really runs, and every loss is of a model that was trained: tiny ones here, those of the search of learning rates
(`rates.json`), and in the slow tests those of `small`.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import record_of

from assay import catalogue
from assay.evidence.jobs import Job, Outcome
from assay.evidence.place import here
from assay.evidence.runner import _evidence
from assay.evidence.types import AGAIN, Verdict
from assay.evidence.verdict import judge, judge_quality, remarks
from assay.experiments import experiments_of, rates
from assay.experiments.inference import ladder_residual as room
from assay.experiments.inference import ladder_residual_models as models
from assay.measure.stats import Interval
from assay.methods.inference.ladder_residual import (
    LadderForCausalLM,
    Rank,
    links,
    pending,
    schedule,
    timeline,
    to_ladder,
)

CLAIMS = ("ladder_residual/decode-speedup", "ladder_residual/decode-speedup-no-p2p")
POINTS = {
    claim: {
        **next(found for found in experiments_of("ladder_residual") if found.claim == claim).points["small"][0],
        "width": 32, "layers": 4, "heads": 2, "prompt": 4, "tokens": 2,
    }
    for claim in CLAIMS
}  # fmt: skip
TINY = {"width": 32, "layers": 3, "heads": 2, "length": 32, "steps": 60}


def found_experiment(claim):
    return next(found for found in experiments_of("ladder_residual") if found.claim == claim)


# ------------------------------------------------------------------------------------------------------------------- times


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now

    def once(self, run):
        run()  # fills its cache
        start = self.now
        run()
        return self.now - start


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
    """A rank in this process; an attention and an MLP take 1 second each. So do the whole model's: they are as many times larger as their
    process has more threads than a rank."""
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
                                module.register_forward_hook(self.tick)
            return found

        def tick(self, *_):
            clock.now += 1.0

    def compare(baseline, candidate, pairs):
        ratio = clock.once(baseline) / clock.once(candidate)
        return SimpleNamespace(speedup=Interval(ratio, ratio, ratio, pairs), noisy=False)

    monkeypatch.setattr(room, "Ranks", InProcess)
    monkeypatch.setattr(room, "GroupLink", lambda latency: VirtualLink(latency, clock))
    monkeypatch.setattr(room, "dist", SimpleNamespace(barrier=lambda: None))
    monkeypatch.setattr(room, "count_children_as_ours", lambda: None)
    monkeypatch.setattr(room, "compare", compare)
    for module in (room, links, pending, timeline):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def untrained(monkeypatch):
    """No model is trained and no loss stands in the record: it is about times alone."""
    monkeypatch.setattr(room, "losses", lambda arms, task: {})
    monkeypatch.setattr(room, "conversion", lambda task: {})


def timed_record(claim, clock):
    """The record of a claim with the times that the clock shows, and no quality."""
    found = found_experiment(claim)
    trial = found.run(**POINTS[claim])
    arms = {"baseline": trial.baseline, "candidate": trial.candidate, "free": trial.free, AGAIN: trial.candidate}
    seconds = {arm: clock.once(run) for arm, run in {**arms, **trial.arms}.items()}
    exact = {arm: round(value / seconds["candidate"], 9) for arm, value in seconds.items() if arm != "candidate"}
    ratios = {arm: {"median": ratio, "low": ratio, "high": ratio} for arm, ratio in exact.items()}
    seen = {"kind": "trial", "ratios": ratios, "seconds_of": seconds, "details": trial.details()}
    job = Job(claim, found.run.__module__, POINTS[claim], 0, "small", 0, (), 1.0, 1, decides=True)
    record = _evidence(job, catalogue.get_claim(claim), found, Outcome(here(), "ok", "", seen), "")
    assert record.status == "ok", record.error
    return record


def judged_where_no_process_holds_the_model(record):
    """The judgement without what is free for models that one process holds, which is no choice for the paper's."""
    return judge(record.model_copy(update={"ratios": {arm: x for arm, x in record.ratios.items() if arm != "free"}}))


def test_the_experiments_are_those_of_the_catalogue():
    found = {e.claim: e for e in experiments_of("ladder_residual")}
    assert set(found) == set(CLAIMS)
    assert [e.paper["communication"] for e in found.values()] == [0.43, 1.14]
    for each in found.values():
        assert str(each.paper["communication"]) in each.measured_here
        assert "injected latency at the paper's own share" in each.measured_here
        assert "simulation" in each.measured_here


@pytest.mark.parametrize("claim", CLAIMS)
def test_messages_that_are_awaited_at_once_are_noticed(monkeypatch, imitated, untrained, claim):
    record = timed_record(claim, imitated)
    share = room.SHARE if claim == CLAIMS[0] else room.SHARE_WITHOUT_LINKS
    modules = 2 * POINTS[claim]["layers"]
    ladder = modules + share if share < 1 else 1 + modules * share
    assert record.measured.median == pytest.approx(modules * (1 + share) / ladder)
    assert record.details["predicted"]["ladder"] == pytest.approx(record.measured.median)
    assert record.details["hidden"]["ladder"] > 0.7
    assert record.details["hidden"]["standard"] == pytest.approx(0)
    assert record.ratios["free"].median == pytest.approx(modules / ladder)
    assert judge(record).verdict is Verdict.DOES_NOT_PAY  # one process with as many threads waits for nobody
    assert room.OPERATOR.free in judge(record).reason
    honest = judged_where_no_process_holds_the_model(record)
    assert honest.verdict is Verdict.QUALITY_NOT_SHOWN  # the times alone would do
    assert "no quality was measured" in honest.reason
    assert any("no communication" in remark for remark in remarks(record))

    blocking = property(lambda self: schedule(4, self.config.block, () if self.config.block == "ladder" else None))
    monkeypatch.setattr(LadderForCausalLM, "steps", blocking)
    broken = timed_record(claim, imitated)
    assert broken.measured.median == pytest.approx(1.0)
    assert broken.details["hidden"]["ladder"] == pytest.approx(0)
    found = judged_where_no_process_holds_the_model(broken)
    assert found.verdict is Verdict.DOES_NOT_PAY
    assert "no difference from the paper's baseline" in found.reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_gained_without_added_latency_stands_in_the_row(imitated, untrained, claim):
    """On a link that takes no time, both orders take what computing takes: nothing is gained, and the row shows it."""
    record = timed_record(claim, imitated)
    usual, ladder = room.BARE
    passes = 2 * POINTS[claim]["layers"] * POINTS[claim]["tokens"]
    assert record.seconds_of[usual] == pytest.approx(passes)
    assert record.seconds_of[ladder] == pytest.approx(passes)
    assert record.details["no_latency_added"]["gain"]["median"] == pytest.approx(1)
    assert record.details["no_latency_added"]["message_seconds"] == pytest.approx(0)
    assert record.details["no_latency_added"]["predicted"] == pytest.approx(1)
    assert any(remark.startswith(f"{usual} is faster") for remark in remarks(record))
    assert set(record.details["timeline"]) == set(room.DRAWN)
    assert record.details["waiting_share"]["standard"] > record.details["waiting_share"]["ladder"]


def test_the_whole_model_has_a_thread_for_every_rank(monkeypatch):
    """Two ranks have two cores together: so has what they are compared with, and nothing else."""
    monkeypatch.setattr(room, "dist", SimpleNamespace(barrier=lambda: None))
    seen = []

    class Model:
        def __call__(self, token, **_):
            seen.append(torch.get_num_threads())
            return SimpleNamespace(logits=torch.zeros(1, 1, 4), cache=SimpleNamespace(crop=lambda _tokens: None))

    rank = Rank(
        0, 2, {"arms": {"ladder": Model(), room.WHOLE: Model()}, "caches": {}, "prompt": torch.zeros(1, 3).long()}
    )
    room.decode(rank, room.WHOLE, 2)
    assert seen == [2, 2, 2]  # the prompt and two steps
    seen.clear()
    room.decode(rank, "ladder", 2)
    assert seen == [1, 1, 1]


@pytest.mark.slow
def test_real_processes_are_timed(monkeypatch, untrained):
    monkeypatch.setattr(room, "count_children_as_ours", lambda: None)
    found = found_experiment(CLAIMS[0])
    trial = found.run(**found.points["smoke"][0])
    for run in (trial.baseline, trial.candidate, trial.free, *trial.arms.values()):
        assert max(run()) > 0
    details = trial.details()
    assert details["latency_seconds"] == pytest.approx(0.43 * details["module_seconds"])
    assert details["rank_paths"]["ladder_residual: pending outputs"] > 0
    assert set(details["timeline"]) == set(room.DRAWN)
    assert details["no_latency_added"]["message_seconds"] > 0


# ------------------------------------------------------------------------------------------------------------------ quality


def serial(function, runs):
    return [function(*run) for run in runs]


def search(name):
    """A search of `rates.json`, and the least loss of each arm: real ones, of the size at which `small` trains."""
    found = json.loads(rates.FILE.read_text(encoding="utf-8"))[name]
    return found, {arm: min(one["losses"].values()) for arm, one in found["arms"].items()}


def test_the_margin_is_what_the_paper_calls_comparable():
    """Its 3.5B models: the perplexity of 14.48 becomes 14.90, and the loss is the perplexity's logarithm."""
    assert pytest.approx(math.log(14.90) - math.log(14.48), rel=1e-3) == room.MARGIN * math.log(14.48)
    assert pytest.approx(0.0107) == room.GUARD.margin
    assert room.GUARD.relative


def test_the_searched_losses_tell_the_arms_apart():
    """What was really lost in the search: by leaving messages out, and by reading at random, more than the margin."""
    _, least = search(models.RATES)
    lost = {arm: loss / least["standard"] - 1 for arm, loss in least.items()}
    assert lost["no communication"] > room.GUARD.margin
    assert lost["random reads"] > room.GUARD.margin
    assert lost["random reads"] > lost["ladder"]


@pytest.mark.parametrize("name", [models.RATES, models.CONVERSION])
def test_no_arm_is_best_at_an_edge_of_its_grid(name):
    found, _ = search(name)
    assert set(found["arms"]) == set(models.ARMS if name == models.RATES else models.KINDS)
    for one in found["arms"].values():
        assert found["grid"][0] < one["rate"] < found["grid"][-1]


def test_reading_at_random_loses_what_was_learned():
    """With real models: the ladder's weights, trained, run with every module's read point drawn anew, the shape and the cost the same."""
    model = models.trained_model("ladder", 0, 1e-2, TINY)
    honest = models.judged_on(models.heldout, model, TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LadderForCausalLM, "_streams", models.RandomReads._streams)
        broken = models.judged_on(models.heldout, model, TINY)
    assert broken > (1 + 2 * room.GUARD.margin) * honest
    assert honest < models.bigram_floor(*models.heldout(TINY["length"], 64)) * 1.5


def test_models_that_hardly_learned_void_the_comparison(monkeypatch, imitated):
    """`smoke`, all its models really trained, for ten steps: nothing follows from losses at the floor."""
    monkeypatch.setattr(models, "in_parallel", serial)
    monkeypatch.setattr(models, "WINDOWS", 32)
    record = record_of(CLAIMS[0], {**found_experiment(CLAIMS[0]).points["smoke"][0], "ranks": 1})
    found = judge(record)
    assert found.verdict is Verdict.UNDECIDED
    assert "hardly beats a table of pairs of bytes" in found.reason
    assert [len(record.trained[arm].scores) for arm in models.ARMS] == [5, 5, 3, 3, 3, 3]
    assert record.quality.controls.keys() >= {"deleted", "random", "rival"}
    conversion = record.details["conversion"]
    assert set(conversion["losses"]) == {"standard", "converted", "standard, trained on", "converted, trained on"}
    assert mean_of(conversion, "standard, trained on") < mean_of(conversion, "standard")
    assert conversion["lost_percent"]["low"] <= conversion["lost_percent"]["mean"] <= conversion["lost_percent"]["high"]


def mean_of(conversion, arm):
    return models.mean(conversion["losses"][arm])


def test_the_controls_are_compared_over_their_own_seeds():
    """An arm of fewer seeds is held against the standard under the same ones."""
    found = {arm: [2.0, 2.0, 2.0] for arm in models.ARMS}
    found |= {"standard": [2.0, 2.0, 2.0, 4.0, 4.0], "ladder": [2.1, 2.1, 2.1, 4.1, 4.1]}
    seen = models.quality(found)
    assert seen.baseline == pytest.approx(2.8)
    assert seen.candidate == pytest.approx(2.9)
    assert seen.controls == {name: pytest.approx(2.8) for name in seen.controls}


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_fast_model_that_reads_at_random_is_noticed(monkeypatch, imitated, claim):
    """The losses of `small`, trained here or found kept; then those of the same ladders, whose modules read at random."""
    found = models.losses(models.ARMS, models.TASK)
    monkeypatch.setattr(room, "conversion", lambda task: {})
    monkeypatch.setattr(room, "losses", lambda arms, task: found)
    honest = judge_quality(record_of(claim, POINTS[claim]))
    with pytest.MonkeyPatch.context() as patch:  # the ladders are kept by now: nothing is trained
        patch.setattr(LadderForCausalLM, "_streams", models.RandomReads._streams)
        reads = serial(models.loss_of, [("ladder", seed, models.TASK) for seed in models.MORE_SEEDS])
    broken = {**found, "ladder": reads}
    monkeypatch.setattr(room, "losses", lambda arms, task: broken)
    sabotaged = judge_quality(record_of(claim, POINTS[claim]))
    assert honest is None or honest.verdict is not Verdict.DOES_NOT_PAY  # not shown to be worse
    assert sabotaged is not None
    assert sabotaged.verdict is Verdict.DOES_NOT_PAY


def test_random_reads_leave_a_message_at_least_as_long():
    """Every module of the control reads a stream that lacks the newest output, as the ladder's do, and some lack more."""
    torch.manual_seed(0)
    model = models.language_model("random reads", 0, {**TINY, "layers": 6})
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
    made = [models.language_model(arm, 1, TINY) for arm in ("standard", "ladder", "parallel", "desync")]
    states = [getattr(model, "base", model).state_dict() for model in made]
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def test_a_rank_that_hears_of_no_other_writes_as_much_to_its_stream():
    """A share by itself: its heads and units, and outputs as large as the whole model's, not as a part of them."""
    alone, whole = (models.language_model(arm, 1, {**TINY, "width": 64}) for arm in ("no communication", "standard"))
    assert alone.config.num_attention_heads == 1
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (model.model.layers[0].mlp(x).std() for model in (alone, whole))
    assert 0.8 * theirs < ours < 1.25 * theirs


def test_both_models_are_trained_on_alike(monkeypatch, tmp_path):
    """What is trained on unconverted gets as many steps on the same windows as what is converted; with nothing converted, they are one."""
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    task = {**TINY, "layers": 2, "steps": 4}
    base = models.from_trained("standard", 0, task)
    usual, converted = (models.trained_on(kind, 0, 5e-3, task) for kind in models.KINDS)
    assert not torch.equal(usual.parts.layers[0].mlp.down_proj.weight, base.parts.layers[0].mlp.down_proj.weight)
    assert not torch.equal(usual.parts.layers[0].mlp.down_proj.weight, converted.parts.layers[0].mlp.down_proj.weight)
    assert (usual.config.ladder_layers, converted.config.ladder_layers) == ([], [1])
    monkeypatch.setattr(models, "upper_layers", lambda task: 0)
    nothing = models.trained_on("converted", 0, 5e-3, task)
    assert all(torch.equal(x, nothing.state_dict()[name]) for name, x in usual.state_dict().items())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(usual(ids).logits, to_ladder(usual.base, [])(ids).logits)
