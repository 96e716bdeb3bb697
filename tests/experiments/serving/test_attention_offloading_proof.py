"""The experiments of attention_offloading notice a formula that is wrong, a merge that is not exact, and an overlap that is none.

The overlap's processes, clock and model are imitated: memory devices in this process, on a clock that slices, messages and attention
move on, so that what is measured is exact. All else is what really runs.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import tiny_model, token_ids

from assay import catalogue
from assay.evidence.jobs import Job, Outcome
from assay.evidence.place import here
from assay.evidence.point import _judged
from assay.evidence.runner import _evidence
from assay.evidence.types import AGAIN, Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import attention_offloading as room
from assay.methods.core.generation.merging import merged
from assay.methods.serving.attention_offloading import LocalPool, SplitDecoder, costs, decoder, slicing, traffic
from assay.methods.serving.attention_offloading.holder import Holder

CLAIMS = {found.claim.split("/")[1]: found for found in experiments_of("attention_offloading")}
OVERLAP = "attention_offloading/overlap-saving"
POINT = {"rows": 4, "context": 12, "layers": 3, "tokens": 2}
WORK, WAY, ATTENTION, ALONE = (
    1.0,
    0.5,
    2.0,
    500.0,
)  # seconds of a part of a slice, a message, a layer's attention, all in one process


def smoke(what):
    return dict(CLAIMS[what].points["smoke"][0])


def test_the_experiments_are_those_of_the_catalogue():
    claims = {claim.id.split("/")[1] for claim in catalogue.get("attention_offloading").claims}
    assert (
        set(CLAIMS)
        == claims
        == {"throughput-similar-cost", "throughput-per-dollar", "required-bandwidth", "overlap-saving"}
    )
    assert all(set(found.decides) == {"smoke", "small", "full"} for found in CLAIMS.values())
    assert all(CLAIMS[what].computed for what in claims - {"overlap-saving"})
    assert not CLAIMS["overlap-saving"].computed


def on_one_device(shape, device, count, *rest):
    """A formula that forgets that memory devices share the cache."""
    return real_attention(shape, device, 1, *rest)


real_attention = costs.attention_seconds


@pytest.mark.parametrize("what", ["throughput-similar-cost", "throughput-per-dollar"])
def test_what_is_gained_follows_from_the_pool_of_memory_devices(monkeypatch, what):
    claim = f"attention_offloading/{what}"
    honest = record_of(claim, smoke(what))
    assert judge(honest).verdict is Verdict.COMPUTED
    ratio = (
        (lambda record: 1 + record.measured.median / 100)
        if what == "throughput-similar-cost"
        else (lambda record: record.measured.median)
    )
    assert ratio(honest) > 1.05
    monkeypatch.setattr(costs, "attention_seconds", on_one_device)
    broken = record_of(claim, smoke(what))
    assert abs(ratio(broken) / ratio(honest) - 1) > 0.2


def test_the_other_fleets_stand_beside_it():
    record = record_of("attention_offloading/throughput-similar-cost", smoke("throughput-similar-cost"))
    same = "two batches of the split, H100s in both pools"
    assert record.arms[same] < 0 < record.measured.median
    cell = record.details["cells"]["llama-33b, azure-code"]
    assert abs(cell["gain"] - cell["foreseen"]) < 10  # the simulation and the closed form
    assert cell["price"] <= cell["price_of_baseline"]
    assert record.free is not None
    dollars = record_of("attention_offloading/throughput-per-dollar", smoke("throughput-per-dollar"))
    assert dollars.arms["a split over devices of one kind"] < dollars.measured.median


def test_bandwidth_follows_from_what_is_sent(monkeypatch):
    claim, point = "attention_offloading/required-bandwidth", smoke("required-bandwidth")
    honest = record_of(claim, point)
    assert judge(honest).verdict is Verdict.COMPUTED
    assert honest.measured.median == pytest.approx(30.97, abs=0.01)
    monkeypatch.setattr(traffic.Shape, "sent", lambda shape: traffic.Sent(shape.heads * shape.head_dim, 0, 0))
    assert record_of(claim, point).measured.median == pytest.approx(honest.measured.median / 2.25)


# ----------------------------------------------------------------------------------------------------------------- the overlap


class Clock:
    now, merge = 0.0, staticmethod(merged)

    def perf_counter(self):
        return self.now


@pytest.fixture
def imitated(monkeypatch):
    """A tiny model and a memory device in this process."""
    clock = Clock()

    class Imitated(LocalPool):
        def __init__(self, count, *, slots, timeout):
            super().__init__(count, slots=slots, merge=clock.merge)
            self.done = {}

        def set_link(self, link):
            pass

        def paths(self):
            return {}

        def close(self):
            pass

        def _ask(self, device, slot, *rest):
            super()._ask(device, slot, *rest)
            self.done[slot] = clock.now + WAY + ATTENTION

        def _give(self, device, slot, *rest):
            super()._give(device, slot, *rest)
            self.done[slot] = max(self.done[slot], clock.now + WAY)

        def _whole(self, device, slot, *rest):
            super()._whole(device, slot, *rest)
            self.done[slot] = clock.now + WAY + ATTENTION

        def _take(self, device, slot, layer):
            clock.now = max(clock.now, self.done[slot] + WAY)
            if self.timeline is not None:  # what the details look for
                for lane in ("memory 0", "link 0 out"):
                    self.timeline.add(lane, clock.now - WAY, clock.now, slot, layer)
            return super()._take(device, slot, layer)

    real_run, real_whole, real_alone = slicing.Part.run, room.Sides.whole, room.Sides.alone

    def run(part, values):
        clock.now += WORK
        real_run(part, values)

    def whole(sides, threads):
        clock.now += ALONE
        return real_whole(sides, threads)

    def alone(sides):
        clock.now += ALONE
        return real_alone(sides)

    loaded = SimpleNamespace(model=tiny_model(num_hidden_layers=4, num_key_value_heads=2), tokenizer=None)
    monkeypatch.setattr(room, "load_model", lambda name: loaded)
    monkeypatch.setattr(room, "heldout_windows", lambda tokenizer, window, n: token_ids(n, window))
    monkeypatch.setattr(room, "AttentionWorkers", Imitated)
    monkeypatch.setattr(room, "count_children_as_ours", lambda: None)
    monkeypatch.setattr(decoder, "time", clock)
    monkeypatch.setattr(slicing.Part, "run", run)
    monkeypatch.setattr(room.Sides, "whole", whole)
    monkeypatch.setattr(room.Sides, "alone", alone)
    threads = torch.get_num_threads()
    yield clock
    torch.set_num_threads(threads)


def timed_record(clock):
    """The record of the overlap with the times that the clock shows."""
    found = CLAIMS["overlap-saving"]
    trial = found.run(**POINT)
    arms = {name: getattr(trial, name) for name in ("baseline", "candidate", "free", "exact")} | {
        AGAIN: trial.candidate
    }
    seconds = {}
    for arm, run in {**arms, **trial.arms}.items():
        start = clock.now
        run()
        seconds[arm] = clock.now - start
    ratios = {
        arm: dict.fromkeys(("median", "low", "high"), value / seconds["candidate"])
        for arm, value in seconds.items()
        if arm != "candidate"
    }
    seen = {"kind": "trial", "ratios": ratios, **_judged(trial, found)}
    job = Job(OVERLAP, found.run.__module__, POINT, 0, "small", 0, (), 1.0, 1, decides=True)
    record = _evidence(job, catalogue.get_claim(OVERLAP), found, Outcome(here(), "ok", "", seen), "")
    assert record.status == "ok", record.error
    return record, seconds


def test_an_overlap_that_is_none_is_noticed(monkeypatch, imitated):
    record, seconds = timed_record(imitated)
    model = tiny_model(num_hidden_layers=3, num_key_value_heads=2)
    slices = slicing.sliced(slicing.trace(model, 4), 4).slices[:-1]
    rest = sum(one.rest is not None for one in slices)  # what neither query nor key nor value need
    usual = 2 * (3 * (2 * WORK + WAY + ATTENTION + WAY) + (rest + 1) * WORK)
    early = 2 * (3 * (WORK + WAY + ATTENTION + WAY) + WORK)  # key, value and the rest are made meanwhile
    assert seconds["baseline"] == pytest.approx(usual)
    assert seconds["candidate"] == pytest.approx(early)
    assert record.measured.median == pytest.approx(100 * (1 - early / usual))
    assert judge(record).verdict in PAYS
    assert seconds["two halves of the batch in turn"] < 2 * early
    assert record.details["traffic_is_the_closed_form"] is True
    assert record.details["runs"]["overlapped"]["bytes_a_token"] == record.details["closed_form_bytes_a_token"]

    monkeypatch.setattr(SplitDecoder, "overlap", property(lambda self: False, lambda self, value: None), raising=False)
    broken, _ = timed_record(imitated)
    assert broken.measured.median == pytest.approx(0, abs=1e-9)
    assert judge(broken).verdict is Verdict.DOES_NOT_PAY


@pytest.mark.parametrize("merge", [
    room.averaged, pytest.param(room.newest_left_out, marks=pytest.mark.slow), pytest.param(room.by_chance, marks=pytest.mark.slow)
])  # fmt: skip
def test_a_merge_that_is_not_exact_is_noticed(monkeypatch, imitated, merge):
    honest = record_of(OVERLAP, POINT)
    assert judge(honest).verdict in PAYS
    assert honest.quality.candidate < 1e-2 * room.GUARD.margin
    assert min(honest.quality.controls.values()) > 5 * room.GUARD.margin
    imitated.merge = merge
    assert verdict_of(OVERLAP, POINT) not in PAYS
    real = Holder.give

    def give(holder, *rest):
        holder.merge = merge
        return real(holder, *rest)

    monkeypatch.setattr(Holder, "give", give)  # everywhere: then no decoder is made
    with pytest.raises(ValueError, match="give other logits than the model"):
        verdict_of(OVERLAP, POINT)


@pytest.mark.parametrize("arm", ["free", "exact"])
def test_one_process_that_is_faster_is_what_is_free(imitated, monkeypatch, arm):
    def run(sides, threads=None):
        imitated.now += ALONE / 1000
        return sides.logits

    monkeypatch.setattr(room.Sides, {"free": "whole", "exact": "alone"}[arm], run)
    record, seconds = timed_record(imitated)
    assert seconds[arm] == pytest.approx(ALONE / 1000)
    assert judge(record).verdict is Verdict.DOES_NOT_PAY
    assert getattr(room.DECODING, arm) in judge(record).reason


def test_the_exact_arm_is_the_model_and_appends_in_place(imitated):
    sides = room.Sides(**POINT)
    assert sides.error(sides.alone()) < 1e-2 * room.GUARD.margin
    held = sides.local.pool.holders[0]._layers[sides.local.slot][0]
    assert held.keys.shape[2] >= POINT["context"] + POINT["tokens"]  # room for what is decoded
    before = held.keys.data_ptr()
    sides.alone()
    assert held.keys.data_ptr() == before
    assert sides.local.length == POINT["context"]


def test_a_slice_is_that_of_a_layer_between_two():
    """The first has no layer before it, and behind the last one there is the head."""
    sides = object.__new__(room.Sides)
    sides.shape, sides.tokens = SimpleNamespace(layers=3), 2
    line = room.Timeline()
    for start, layer in ((0.0, 0), (20.0, 1), (40.0, 2), (60.0, 3), (80.0, 0), (100.0, 1), (120.0, 2), (140.0, 3)):
        line.add("model", start, start + {0: 5.0, 1: 2.0, 2: 2.0, 3: 9.0}[layer], 0, layer)
        line.add("wait", start + 10, start + 15, 0, layer)
    sides.timeline, sides.split = (lambda run: line), None
    assert sides.calibrate() == (2.0, (5 + 2 + 2 + 9) - 3 * 2.0)


def test_what_can_run_meanwhile_is_a_share_of_a_layer(imitated):
    """However large the vocabulary is."""
    sides = room.Sides(**POINT)
    sides.link, sides.slice_seconds, sides.head_seconds = room.Link(1e30, 0.0), 1.0, 0.0
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    whole, early = (room.foretold_seconds(sides, 1.0, overlap) for overlap in (False, True))
    assert whole - early == pytest.approx(3 * 2 * 64 * 32 / layer)


def test_the_details_show_it_without_an_imitated_link_too(imitated, monkeypatch):
    links = []
    monkeypatch.setattr(room.AttentionWorkers, "set_link", lambda pool, link: links.append(link))
    sides = room.Sides(**POINT)
    links.clear()
    found = room.described(sides)
    assert links == [*[sides.link] * 3, None, None, sides.link]
    assert {"one after the other, no link imitated", "overlapped, no link imitated"} < set(found["runs"])
    assert set(found["errors"]) == {"one after the other", "two halves in turn", "in one process"}
    assert "sleep" in CLAIMS["overlap-saving"].measured_here


def test_messages_are_as_long_by_a_slice_as_the_papers():
    shape = room.LLAMA3_70B
    one, two = (room.paper_link(shape, 8, seconds) for seconds in (1e-3, 2e-3))
    assert two.latency == pytest.approx(2 * one.latency)
    assert two.bandwidth == pytest.approx(one.bandwidth / 2)
    theirs = room.PAPER_SPLIT
    rows = theirs.room(room.PAPER_CONTEXT)
    work = room.model_seconds(theirs.shape, room.H100, 2, rows, theirs.setup) / theirs.shape.layers
    link = room.paper_link(theirs.shape, rows, work)
    assert (link.bandwidth, link.latency) == (
        pytest.approx(room.NETWORK.bandwidth),
        pytest.approx(room.NETWORK.latency),
    )


def test_requests_are_the_same_for_every_system():
    first, again = (room.requests("kimi-ta", 400, 3) for _ in range(2))
    assert first == again != room.requests("kimi-ta", 400, 4)
    means = [sum(getattr(one, name) for one in first) / 400 for name in ("prompt_tokens", "new_tokens")]
    assert means[0] == pytest.approx(8560, rel=0.15)
    assert means[1] == pytest.approx(182, rel=0.15)
    rates = [room.tokens_per_second(room.Whole(room.LLAMA_33B, room.H100, 2), "azure-code", 200, 0) for _ in range(2)]
    assert rates[0] == rates[1]
    assert len(set(itertools.islice((one.at for one in first), 9))) == 1
