"""ParScale's experiments notice streams that are broken, rivals that do better, and count what they say they count."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of, rates
from assay.experiments.core import FLOOR_MARGIN
from assay.experiments.inference import language
from assay.experiments.inference import parscale as room
from assay.experiments.inference.parscale import arms
from assay.experiments.rates import Rate
from assay.measure.stats import student_t
from assay.methods.inference.parscale import cost as cost_module
from assay.methods.inference.parscale import model as model_module
from assay.methods.inference.parscale.cost import Shape, added_parameters
from assay.methods.inference.parscale.model import Aggregator
from assay.workloads.sequences import byte_windows

TINY = {"width": 16, "layers": 1, "length": 32, "steps": 60, "streams": 2, "prefix": 4}
RATE = Rate(1e-2, (5e-3, 1e-2, 2e-2))
WORTH, LATENCY = "parscale/parameter-equivalent", "parscale/latency-increase"
ANSWER = room.latency_point(TINY, model="tiny", dtype="float32", new=2)
TIMES = {"one stream": [1.0, 1.01, 0.99], "streams": [1.1, 1.12, 1.09], "larger": [1.8, 1.82, 1.79]}


def judged_once(real):
    """One stream is what it was, whatever is broken of several."""
    known = {}

    def arm_loss(arm, task, seed, rate):
        key = (arm, tuple(task.items()), seed, rate)
        if arm in arms.STREAMS or key not in known:
            known[key] = real(arm, task, seed, rate)
        return known[key]

    return arm_loss


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory):
    """All arms really train, once for all tests, in this process, and are kept apart from the user's; nothing is timed."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "cache_dir", lambda: folder)
        patch.setattr(arms, "SEEDS", (0, 1, 2))
        patch.setattr(arms, "chosen", lambda name, arm: RATE)  # the searched ones are of another size
        patch.setattr(arms, "arm_loss", judged_once(arms.arm_loss))
        patch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
        patch.setattr(language, "bigram_floor", lambda *windows: 4.5)  # models so small do not beat the real one
        patch.setattr(room, "published_fits", lambda: {"stack": {"k": arms.PAPER_K}})
        patch.setattr(room, "compare_many", lambda *runs, **options: SimpleNamespace(seconds=TIMES))
        yield


@pytest.fixture(scope="module")
def honest(_tiny):
    """The records of both claims with nothing broken."""
    torch.set_num_threads(1)
    return {WORTH: record_of(WORTH, TINY), LATENCY: record_of(LATENCY, ANSWER)}


class NoiseFirst(nn.Module):
    """Prefixes of which the first stream's are so wide that it hears nothing else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self):
        draw = torch.Generator().manual_seed(0)
        return [
            tuple(torch.cat([100 * torch.randn(x[:1].shape, generator=draw), x[1:]]) for x in pair)
            for pair in self.inner()
        ]


@pytest.fixture
def planted(monkeypatch, honest):
    """The trained streams, the first of which hears nothing, as the aggregator knows: here it matters which streams there are.

    Streams as small as these, and trained for so short, hardly differ, as the control of identical prefixes says.
    """
    real = arms.trained_model

    def trained_model(arm, task, seed, rate):
        made = real(arm, task, seed, rate)
        if arm == "streams":
            made.prefixes = NoiseFirst(made.prefixes)
            made.aggregator.second.bias.data = torch.tensor([-9.0, 9.0])
        return made

    monkeypatch.setattr(arms, "trained_model", trained_model)
    return monkeypatch


def first_stream_alone(patch):
    patch.setattr(Aggregator, "forward", lambda self, streams: streams[0])


def equal_streams(patch):
    real = NoiseFirst.forward
    patch.setattr(NoiseFirst, "forward", lambda self: [tuple(x[:1].expand_as(x) for x in pair) for pair in real(self)])


def test_experiments_load():
    found = {each.claim: each for each in experiments_of("parscale")}
    assert set(found) == {"parscale/memory-increase", LATENCY, WORTH}
    assert {each.operator for each in found.values()} == {room.OPERATOR}  # one thing, and one rival for all
    for points in found[LATENCY].points.values():
        for point in points:
            assert point["streams"] == point["task"]["streams"]  # what is timed is what is judged


@pytest.mark.parametrize("broken", [pytest.param(first_stream_alone, marks=pytest.mark.slow), equal_streams])
def test_streams_that_do_not_differ_are_worth_less_than_any_control(planted, broken):
    whole, loss = record_of(WORTH, TINY), record_of(LATENCY, ANSWER).quality
    broken(planted)
    parts, lost = record_of(WORTH, TINY), record_of(LATENCY, ANSWER).quality
    assert parts.measured.median < 0.5 * whole.measured.median
    assert parts.measured.median < min(parts.controls["deleted"], parts.controls["random"])
    assert lost.candidate > max(loss.candidate + 0.3, lost.controls["deleted"], lost.controls["random"])
    assert (lost.baseline, lost.controls["rival"]) == (loss.baseline, loss.controls["rival"])


def test_streams_that_read_each_others_text_are_noticed(honest, monkeypatch):
    """Rows put together in the wrong order: finite, of the right shape and cost."""
    assert judge(honest[LATENCY]).verdict is Verdict.UNDECIDED
    monkeypatch.setattr(model_module, "repeated", lambda tensor, streams: tensor.repeat_interleave(streams, 0))
    assert record_of(WORTH, TINY).measured.high < min(1.0, honest[WORTH].measured.low)
    assert verdict_of(LATENCY, ANSWER) is Verdict.DOES_NOT_PAY


def worth_with(patch, **known):
    """The verdict on losses that are given, around each arm's own, the same for each seed but for a small wave."""
    losses = {
        "one stream": 2.10, "as many parameters": 2.05, "larger": 1.97, "more steps": 2.04, "random prefixes": 2.05,
        **{name.replace("_", " "): loss for name, loss in known.items()},
    }  # fmt: skip
    found = {
        arm: [loss + 0.002 * math.sin(7 * place + 3 * seed) for seed in arms.SEEDS]
        for place, (arm, loss) in enumerate(losses.items())
    }
    patch.setattr(room, "losses_of", lambda rates, task: found)
    patch.setattr(room, "averaged_loss", lambda task, rate: 2.0)
    return judge(record_of(WORTH, TINY))


def test_streams_that_do_not_act_refute_nothing(monkeypatch):
    """The paper speaks of streams that differ: whether they are worth parameters is asked where they gain by that."""
    for same in (2.06, 2.055, 2.065):  # better, or hardly worse, than streams of their own prefixes
        found = worth_with(monkeypatch, streams=2.06, identical_prefixes=same)
        assert found.verdict is Verdict.UNDECIDED
        assert "what different prefixes gain" in found.reason
        assert "hardly beats the same prefix for all" in found.reason


def test_streams_that_act_are_judged(monkeypatch):
    assert worth_with(monkeypatch, streams=2.07, identical_prefixes=2.09).verdict is Verdict.REFUTED
    assert worth_with(monkeypatch, streams=1.96, identical_prefixes=2.05).verdict is Verdict.REPRODUCED
    assert worth_with(monkeypatch, streams=2.02, identical_prefixes=2.05).verdict is Verdict.DIRECTION_HOLDS
    dear = worth_with(monkeypatch, streams=2.02, identical_prefixes=2.05, more_steps=1.9)
    assert dear.verdict is Verdict.DOES_NOT_PAY
    assert "trained for as many operations" in dear.reason


def test_what_different_prefixes_gain_is_held_against_what_the_law_promises():
    losses = {
        "streams": [2.0, 2.1, 2.2],
        "identical prefixes": [2.1, 2.1, 2.5],
        "as many parameters": [2.2, 2.3, 2.4],
        "larger": [2.0, 2.2, 2.1],
    }
    (found,) = arms.told_apart(losses, {"streams": RATE}).values()
    assert found.scores == pytest.approx([0.1, 0.0, 0.3])
    assert (found.floor, found.best, found.rates) == (0.0, pytest.approx(0.2), RATE.rates)
    (found,) = arms.told_apart({**losses, "larger": [3.0] * 3}, {"streams": RATE}).values()
    assert found.best == 0.0  # nothing is promised: void, whatever the gains


def test_bytes_that_are_forgotten_change_the_figure(monkeypatch):
    point = {"streams": 8, "batch": 1, "prompt": 64, "new": 64}
    record = record_of("parscale/memory-increase", point)
    assert record.measured is not None
    real = cost_module.cost

    def without_streams(shape, *, streams=1, **options):
        return dataclasses.replace(real(shape, streams=streams, **options), cache=real(shape, **options).cache)

    monkeypatch.setattr(cost_module, "cost", without_streams)
    other = record_of("parscale/memory-increase", point)
    assert judge(other).verdict is Verdict.COMPUTED
    assert abs(math.log(other.measured.median / record.measured.median)) > math.log(1.25)


# ---------------------------------------------------------------------------------------------------------------- the arms


@pytest.mark.parametrize("task", [TINY, arms.SMALL, arms.FULL])
def test_rivals_have_the_parameters_they_are_said_to_have(task):
    with torch.device("meta"):
        streams, one, many, larger = (
            sum(p.numel() for name, p in arms.new_model(arm, task, 0).named_parameters() if not outside(name))
            for arm in ("streams", "one stream", "as many parameters", "larger")
        )
    shape = arms.shape_of(task)
    mlp = task["width"]  # of the reparameterisation, which is gone after training
    pairs = 2 * task["layers"] * task["width"]
    streams -= task["streams"] * task["prefix"] * mlp + mlp * mlp + mlp + pairs * mlp + pairs
    streams += pairs * task["streams"] * task["prefix"]
    assert one == shape.body
    assert streams == shape.body + added_parameters(shape, task["streams"], task["prefix"])
    assert many == pytest.approx(streams, rel=0.01)
    assert larger == pytest.approx((arms.PAPER_K * math.log(task["streams"]) + 1) * streams, rel=0.01)


def outside(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


def test_more_steps_are_as_many_operations():
    streams = TINY["steps"] * arms.training_macs("streams", TINY)
    more = arms.steps_of("more steps", TINY) * arms.training_macs("more steps", TINY)
    assert more == pytest.approx(streams, rel=0.02)
    assert arms.steps_of("more steps", TINY) > 1.5 * TINY["steps"]
    assert arms.steps_of("larger", TINY) == TINY["steps"]


def test_equal_streams_are_one_stream():
    made = arms.new_model("identical prefixes", TINY, 0).eval()
    with torch.no_grad():
        states = made.stream_states(byte_windows(16, 2)[0], use_cache=False).states
        torch.testing.assert_close(made.aggregator(states), states[0])
    other = arms.new_model("streams", TINY, 0)
    assert torch.equal(other.base.lm_head.weight, made.base.lm_head.weight)
    assert not torch.equal(*other.prefixes()[0][0])


def test_random_prefixes_stay_and_the_rest_trains():
    before = arms.new_model("random prefixes", TINY, 0).state_dict()
    after = arms.trained_model("random prefixes", {**TINY, "steps": 2}, 0, 1e-2).state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("prefixes."), name


def test_learning_rates_of_the_largest_scale_are_searched_at_its_sizes(monkeypatch):
    seen = []

    def tried(arm, task, rate):
        seen.append((arm, task, rate))
        return abs(math.log(rate / arms.GRID[1])) if arm == "streams" else math.inf if rate < arms.GRID[2] else rate

    monkeypatch.setattr(arms, "_tried", tried)
    found = arms.rates_of(("streams", "larger"), room.FULL)
    assert found == {"streams": Rate(arms.GRID[1], arms.GRID), "larger": Rate(arms.GRID[2], arms.GRID)}
    assert [entry[0] for entry in seen] == ["streams"] * len(arms.GRID) + ["larger"] * len(arms.GRID)
    assert all(task == room.FULL for _, task, _ in seen)
    monkeypatch.setattr(arms, "chosen", lambda name, arm: f"{name}: {arm}")
    assert arms.rates_of(("streams", "larger"), arms.SMALL) == {
        arm: f"{arms.SEARCH}: {arm}" for arm in ("streams", "larger")
    }
    assert set(arms.rates_of(("streams", "larger"), arms.SMOKE).values()) == {f"{arms.SEARCH}: one stream"}


def test_in_the_search_a_larger_model_is_better_than_any_streams_and_they_are_alike():
    """Its losses tell sizes apart beyond the margin, but not trained streams from those that cannot differ or were drawn."""
    known = json.loads(rates.FILE.read_text(encoding="utf-8"))[arms.SEARCH]
    assert set(known["arms"]) == set(arms.ARMS)
    assert tuple(known["grid"]) == arms.GRID
    best = {arm: min(loss for loss in found["losses"].values() if loss) for arm, found in known["arms"].items()}
    for arm, found in known["arms"].items():
        assert min(arms.GRID) < found["rate"] < max(arms.GRID), arm
        assert found["losses"][f"{found['rate']:g}"] == best[arm]
    for arm in ("streams", "identical prefixes", "random prefixes"):
        assert best[arm] - best["larger"] > room.LOSS.margin
        assert abs(best[arm] - best["streams"]) < room.LOSS.margin / 2
        assert best[arm] > best["as many parameters"]
    gain = best["identical prefixes"] - best["streams"]
    assert gain < FLOOR_MARGIN * (best["as many parameters"] - best["larger"])  # they do not act: nothing is decided
    assert best["as many parameters"] > best["larger"]


def test_averaged_predictions(monkeypatch):
    """The mean of two models' probabilities, by hand."""
    models = [arms.new_model("one stream", TINY, seed).eval() for seed in (0, 1)]
    monkeypatch.setattr(arms, "trained_model", lambda arm, task, seed, rate: models[seed])
    inputs, targets = language.heldout(TINY["length"], arms.WINDOWS)
    with torch.no_grad():
        mean = sum(made(inputs).logits.softmax(-1) for made in models) / 2
    wanted = -mean.gather(-1, targets[..., None]).log().mean()
    assert arms.averaged_loss(TINY, 1e-2) == pytest.approx(float(wanted), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- losses as parameters


def test_a_loss_told_in_parameters():
    sizes = [arms.parameters_of(arm, TINY) for arm in arms.SIZES]
    losses = {arm: [5 - 0.1 * math.log(size), 6 - 0.3 * math.log(size)] for arm, size in zip(arms.SIZES, sizes, strict=True)}  # fmt: skip
    assert arms.slopes_of(losses, TINY) == pytest.approx([0.1, 0.3])
    assert arms.as_eight(math.log(1 + 0.39 * math.log(4)), 4) == pytest.approx(1 + 0.39 * math.log(8))
    assert arms.as_eight(0.0, 2) == 1.0


def test_the_interval_of_a_ratio_covers_it():
    """95 % of the time, with noise in numerator and denominator that have some of it in common."""
    random, covered, narrow = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        slopes = 1 + 0.2 * random.standard_normal(4)
        gains = 0.5 + 0.1 * random.standard_normal(4) + 0.5 * (slopes - 1)
        try:
            found = arms.ratio_over_seeds(gains, slopes)
        except ValueError:  # too noisy to be told: promises nothing
            covered, narrow = covered + 1, narrow + 1
            continue
        covered += found.contains(0.5)
        half = student_t(0.95, 3) * gains.std(ddof=1) / 2 / slopes.mean()
        narrow += abs(found.median - 0.5) <= half
    assert 0.93 < covered / 2000 < 0.97
    assert narrow / 2000 != pytest.approx(0.95, abs=0.01)


def test_the_noise_of_the_slope_is_in_the_interval():
    exact = arms.ratio_over_seeds([1.0, 1.1, 0.9], [2.0, 2.0, 2.0])
    noisy = arms.ratio_over_seeds([1.0, 1.1, 0.9], [2.0, 1.6, 2.4])
    assert exact.median == noisy.median == 0.5
    assert noisy.high - noisy.low > 1.5 * (exact.high - exact.low)
    for slopes in ([2.0, -1.0, 0.5], [-1.0, -1.1, -0.9], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="larger models"):
            arms.ratio_over_seeds([1.0, 1.1, 0.9], slopes)


# ------------------------------------------------------------------------------------------------------------------- timing


def test_the_ratio_of_increases():
    value, low, high = room.increase_ratio(TIMES)
    assert low <= value <= high
    assert value == pytest.approx(8.0)
    none = room.increase_ratio({**TIMES, "streams": TIMES["one stream"]})
    assert none[0] == pytest.approx(800.0)
    assert np.isfinite(none).all()


def test_what_is_timed_generates():
    models = room.contestants("tiny", "float32", 2)
    assert set(models) == {"one stream", "streams", "larger"}
    assert {room.answering(made, 2, 4, 3).shape for made in models.values()} == {(2, 7)}
    one, larger = (Shape.of(models[name].config).body for name in ("one stream", "larger"))
    own = sum(p.numel() for name, p in models["streams"].named_parameters() if not name.startswith("base."))
    assert larger == pytest.approx((arms.PAPER_K * math.log(2) + 1) * (one + own), rel=0.05)


def test_one_stream_is_free_only_where_it_keeps_the_loss(honest):
    losses = honest[LATENCY].details["losses"]
    better = {**losses, "more steps": [loss - 0.1 for loss in losses["streams"]]}
    worse = {**losses, "more steps": [loss + 0.1 for loss in losses["streams"]]}
    assert room.keeps_the_loss(better)
    assert not room.keeps_the_loss(worse)
    kept = honest[LATENCY].details["one_stream_for_as_many_operations_keeps_the_loss"]
    assert kept == room.keeps_the_loss(losses)
    assert ("free" in honest[LATENCY].ratios) == kept
    assert ("one stream" in honest[LATENCY].ratios) != kept
