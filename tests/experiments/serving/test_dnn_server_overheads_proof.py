"""The vision server's experiments notice when marks are broken, when inference is dear, and when the smaller images cannot be read."""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import dnn_server_overheads as room
from assay.experiments.serving import dnn_server_overheads_data as data
from assay.experiments.serving import dnn_server_overheads_pair as pair
from assay.methods.serving.dnn_server_overheads import INFERENCE, Lifetime

SHARE = "dnn_server_overheads/non-inference-share"
POINT = room._point("medium", "ResNet-50", 4, 2, quick=True)
TWO = "dnn_server_overheads/throughput"
SCENES = {"scenes": 2, "judged": 27}
network = functools.cache(functools.partial(data.digits_network, 0))


class Waiting(torch.nn.Module):
    """A network that takes so long, and nothing of the processor."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x.mean((2, 3))


@pytest.fixture
def inference(monkeypatch):
    """Makes inference take so many seconds."""

    def takes(seconds):
        network = Waiting(seconds)
        monkeypatch.setattr(room, "_network", lambda name, trained: network)
        monkeypatch.setattr(data, "engines", lambda network: {"float32": network})

    return takes


def test_with_quick_inference_most_is_outside(inference):
    inference(0.0005)
    record = record_of(SHARE, POINT)
    assert record.measured.median > 42
    assert judge(record).verdict is not Verdict.REFUTED
    assert record.quality.controls["deleted"] > 0.3
    assert record.details["ways"]["plain"]["milliseconds"]["decode"] > 0
    outside = record.details["percent_outside"]
    assert outside["in process, image prepared before"] < outside["plain"]


def without(monkeypatch, *stages):
    """Marks that leave out these stages' borders: their time counts with the stage after them."""
    real = Lifetime.mark
    monkeypatch.setattr(
        Lifetime, "mark", lambda self, stage, **options: None if stage in stages else real(self, stage, **options)
    )


def test_marks_without_the_preparing_stages_change_the_verdict(inference, monkeypatch):
    inference(0.001)
    without(monkeypatch, *room.PREPARING, "queue")
    found = record_of(SHARE, POINT)
    assert judge(found).verdict is Verdict.REFUTED  # all of it counts as inference
    assert found.quality.candidate >= 1


def test_marks_without_inference_change_the_verdict(inference, monkeypatch):
    inference(0.2)
    point = {**POINT, "requests": 1}
    assert verdict_of(SHARE, point) is Verdict.REFUTED
    without(monkeypatch, INFERENCE)  # it counts as post-processing: all of it lies outside
    found = record_of(SHARE, point)
    assert found.measured.low > 99
    assert found.quality.candidate >= 1
    assert judge(found).verdict not in (*PAYS, Verdict.REFUTED)  # the share alone would agree; the guard says no


def test_errors_of_marks_are_those_of_the_worse_of_inference_and_preparing():
    lives = []
    for number in range(3):
        life, at = Lifetime(at=float(number)), float(number)
        for stage, seconds in (
            ("receive", 0.001), ("decode", 0.002), ("resize", 0.001), ("normalise", 0.001), ("queue", 0.001), (INFERENCE, 0.02),
            ("respond", 0.001),
        ):  # fmt: skip
            at += seconds
            life.mark(stage, at=at)
        lives.append(life)
    found = room.marking_errors(lives, {INFERENCE: 0.02, "preparing": 0.005}, 0)
    assert found["marks"] == pytest.approx(0.2)  # preparing took 4 ms by the marks
    assert found["deleted"] == pytest.approx(1)  # whatever the network
    assert found["random"] > 0.3
    assert room.marking_errors(lives, {INFERENCE: 0.01, "preparing": 0.004}, 0)["marks"] == pytest.approx(1)


def test_what_becomes_of_many_requests_at_once(inference):
    inference(0.001)
    with room.bench("medium", "ResNet-50", 2, quick=True) as one:
        sizes, real = [], one.engine
        one.engine = lambda x: sizes.append(len(x)) or real(x)
        found = room.under_load(one, 12)
    assert sizes[:8] == list(range(1, 9))  # every size once before anything is timed
    assert set(found) == {"plain", "quick", "quick, prepared in processes"}
    for told in found.values():
        assert told["open_loop"]["errors"] == 0
        assert set(told["throughput_of_closed_loops"]) == {1, 2, 4, 8}
        assert min(told["throughput_of_closed_loops"].values()) > 0
        assert 0 < told["throughput_foretold"] <= 1000  # the network's millisecond
        assert "requests a second" in told["advice"]


def test_an_experts_ten_lines_can_refute_it():
    (found,) = [one for one in experiments_of("dnn_server_overheads") if one.claim == SHARE]
    record = {"measured": {"high": 60.0, "low": 55.0}, "free": 50.0}
    assert not found.refutes(record)
    assert found.refutes({**record, "free": 20.0})
    assert found.refutes({**record, "measured": {"high": 41.0}})


@pytest.fixture
def easy(monkeypatch):
    """Brokers without processes or disks, one training, and no accounts: what is judged are the answers."""
    monkeypatch.setattr(data, "digits_network", lambda seed: network())
    monkeypatch.setattr(pair, "BROKERS", dict.fromkeys(pair.BROKERS, pair.BROKERS["queue"]))
    monkeypatch.setattr(pair, "described", lambda reading, way: {})
    monkeypatch.setattr(pair, "_message_seconds", lambda *given: 0.0)


def test_scenes_are_read_as_well_from_the_smaller_image(easy):
    record = record_of(TWO, SCENES)
    assert judge(record).verdict in PAYS
    assert record.quality.candidate > 0.75
    assert record.quality.low >= record.quality.baseline - 0.02
    assert max(record.quality.controls[name] for name in ("deleted", "random")) < 0.4
    assert set(record.ratios) >= {"free", "exact", *pair.ARMS}


def test_finds_at_random_places_change_the_verdict(easy, monkeypatch):
    real, chance = pair.finds, np.random.default_rng(0)

    def lost(jpeg, *, scale=1, places=None):
        return real(jpeg, scale=scale, places=chance if scale == 2 else places)

    monkeypatch.setattr(pair, "finds", lost)
    assert verdict_of(TWO, SCENES) is Verdict.DOES_NOT_PAY


def test_a_broker_that_mixes_up_its_things_changes_the_verdict(easy, monkeypatch):
    real = pair.Cascade._give

    def mixed(self, number, index, answer):
        real(self, number, index, (answer + 1) % 10 if self.size > 1 else answer)

    monkeypatch.setattr(pair.Cascade, "_give", mixed)
    assert verdict_of(TWO, SCENES) is Verdict.DOES_NOT_PAY


def test_every_way_gives_what_the_ten_lines_give(easy):
    reading = pair.Reading(5)
    try:
        wanted = {scale: reading.fused(scale, 1) for scale in (1, 2)}
        assert wanted[2] == reading.fused(2, 2)
        for way in (pair.PRIOR, pair.OPTIMISED, *pair.ARMS.values()):
            assert reading.read(way) == wanted[way.scale]
        assert sum(map(len, wanted[1])) == sum(len(scene.digits) for scene in reading.scenes)
    finally:
        reading.close()


def test_the_prior_work_has_as_many_workers_and_the_ten_lines_the_best_number_of_threads(easy, monkeypatch):
    assert pair.PRIOR.workers == pair.OPTIMISED.workers
    monkeypatch.setattr(pair, "CORES", 3)
    seconds = iter([3.0] * 3 + [9.0, 1.0, 9.0] + [2.0] * 3)  # with 1, 2 and 3 threads
    clock, asked = [0.0], []

    def fused(self, scale, threads):
        asked.append(threads)
        clock[0] += next(seconds)

    monkeypatch.setattr(pair.Reading, "fused", fused)
    monkeypatch.setattr(pair.time, "perf_counter", lambda: clock[0])
    reading = pair.Reading(1)
    reading.close()
    assert asked == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert reading.threads == 2


def test_scores_count_what_is_missed_wrong_or_too_much():
    scene = data.Scene(b"", ((3, 100.0, 100.0), (5, 200.0, 100.0)))
    crop = np.zeros((1, 1))
    both = [data.Find(101, 99, crop), data.Find(199, 102, crop)]
    assert data.score(scene, both, [3, 5]) == 1
    assert data.score(scene, both, [3, 4]) == 0.5
    assert data.score(scene, both[:1], [3]) == 0.5
    assert data.score(scene, [*both, data.Find(400, 300, crop), both[0]], [3, 5, 1, 3]) == 0.5
    assert data.score(data.Scene(b"", ()), [], []) == 1
    assert data.score(data.Scene(b"", ()), both, [1, 2]) == 0


def test_what_is_trained_on_is_not_tested_on():
    train, choice, test = (data.digit_crops(part)[0] for part in ("train", "choice", "test"))
    assert len(train) + len(choice) + len(test) == 1797
    whole = data._scaled("china")
    border = int(data.TRAINED_ON * whole.shape[-1])
    for part, inside in (("train", whole[..., :border]), ("test", whole[..., whole.shape[1] // 2 :, border:])):
        images, labels = data.patches(part, 6)
        patch = images[labels == 0][0]
        windows = inside.unfold(2, data.PATCH, 1)  # (3, height, places, PATCH)
        for row in (0, data.PATCH - 1):
            assert bool((windows == patch[:, row, None, None]).all(3).all(0).any())


def test_the_networks_are_as_large_as_is_said():
    from assay.measure.cost import count_cost

    x = torch.zeros(1, 3, data.SERVED, data.SERVED)
    known = count_cost(data.ResNet50().eval(), x)
    assert known.params == 25_557_032  # of the ResNet-50 that everybody serves
    assert 4.05e9 < known.macs < 4.15e9
    assert 0.25e9 < count_cost(data.Network(data.COMPACT, data.CLASSES).eval(), x).macs < 0.35e9


@pytest.mark.parametrize(
    "make",
    [lambda: data.Network(8, 6), lambda: torch.nn.Sequential(data.Bottleneck(3, 8, 2), data.Bottleneck(32, 8, 1))],
    ids=["compact", "bottlenecks"],
)
def test_folding_keeps_the_answers(make):
    torch.manual_seed(0)
    network = make()
    network(torch.randn(8, 3, 64, 64))
    network.eval()
    folded, x = data.folded(network), torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.allclose(network(x), folded(x), atol=1e-4)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())


def test_the_deciding_points_are_named():
    found = {one.claim: one for one in experiments_of("dnn_server_overheads")}
    assert set(found) == {SHARE, TWO}
    for scale in ("small", "full"):
        assert found[SHARE].decides[scale]["image"] == "medium"
        assert found[SHARE].decides[scale]["network"] == "ResNet-50" == found[SHARE].paper["network"]
    assert INFERENCE not in room.PREPARING
