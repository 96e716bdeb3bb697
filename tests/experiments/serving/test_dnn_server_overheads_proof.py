"""The vision server's experiments notice when marks are broken, when inference is dear, and when the smaller images cannot be read."""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import dnn_server_overheads as room
from assay.experiments.serving import dnn_server_overheads_data as data
from assay.methods.serving.dnn_server_overheads import INFERENCE, Lifetime

SHARE = "dnn_server_overheads/non-inference-share"
POINT = {"image": "medium", "network": "compact", "blocks": 4, "requests": 2, "answers": 0}
TWO = "dnn_server_overheads/throughput"
SCENES = {"scenes": 2, "judged": 27}
network = functools.cache(functools.partial(data.digits_network, 0))


class Waiting(torch.nn.Module):
    """A network that takes so long, and nothing of the processor."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.parts = [[SimpleNamespace(out_channels=1)]]

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
        monkeypatch.setattr(room, "under_load", lambda one, count: {})

    return takes


def test_with_quick_inference_most_is_outside_and_with_slow_inference_it_is_not(inference):
    inference(0.0005)
    record = record_of(SHARE, POINT)
    assert record.measured.median > 42
    assert judge(record).verdict is not Verdict.REFUTED
    assert record.quality.controls["deleted"] > 0.3
    assert record.details["ways"]["plain"]["milliseconds"]["decode"] > 0
    outside = record.details["percent_outside"]
    assert outside["in process, image prepared before"] < outside["plain"]
    inference(0.15)
    assert verdict_of(SHARE, {**POINT, "blocks": 3}) is Verdict.REFUTED


def test_marks_without_the_preparing_stages_change_the_verdict(inference, monkeypatch):
    inference(0.05)
    honest = record_of(SHARE, POINT)
    assert honest.quality.candidate < 0.3  # the marks agree with the network alone
    inference(0.001)
    real = Lifetime.mark

    def broken(self, stage, **options):
        if stage not in (*room.PREPARING, "queue"):
            real(self, stage, **options)

    monkeypatch.setattr(Lifetime, "mark", broken)
    found = record_of(SHARE, POINT)
    assert judge(found).verdict is Verdict.REFUTED  # all of it counts as inference
    assert found.quality.candidate > 0.3


def test_random_borders_are_nothing_like_the_network(inference):
    inference(0.02)
    found = record_of(SHARE, POINT)
    assert found.quality.controls["random"] > found.quality.candidate


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
    monkeypatch.setattr(room, "BROKERS", dict.fromkeys(room.BROKERS, room.BROKERS["queue"]))
    monkeypatch.setattr(room, "described", lambda reading, way: {})
    monkeypatch.setattr(room, "_message_seconds", lambda *given: 0.0)


def test_scenes_are_read_as_well_from_the_smaller_image(easy):
    record = record_of(TWO, SCENES)
    assert judge(record).verdict in PAYS
    assert record.quality.candidate > 0.75
    assert record.quality.low >= record.quality.baseline - 0.02
    assert max(record.quality.controls[name] for name in ("deleted", "random")) < 0.4
    assert set(record.ratios) >= {"free", "exact", *room.ARMS}


def test_finds_at_random_places_change_the_verdict(easy, monkeypatch):
    real, chance = room.finds, np.random.default_rng(0)

    def lost(jpeg, *, scale=1, places=None):
        return real(jpeg, scale=scale, places=chance if scale == 2 else places)

    monkeypatch.setattr(room, "finds", lost)
    assert verdict_of(TWO, SCENES) is Verdict.DOES_NOT_PAY


def test_a_broker_that_mixes_up_its_things_changes_the_verdict(easy, monkeypatch):
    real = room.Cascade._give

    def mixed(self, number, index, answer):
        real(self, number, index, (answer + 1) % 10 if self.size > 1 else answer)

    monkeypatch.setattr(room.Cascade, "_give", mixed)
    assert verdict_of(TWO, SCENES) is Verdict.DOES_NOT_PAY


def test_every_way_gives_what_the_ten_lines_give(easy):
    reading = room.Reading(5)
    try:
        wanted = {scale: reading.fused(scale, 1) for scale in (1, 2)}
        assert wanted[2] == reading.fused(2, 2)
        for way in (room.PRIOR, room.OPTIMISED, *room.ARMS.values()):
            assert reading.read(way) == wanted[way.scale]
        assert sum(map(len, wanted[1])) == sum(len(scene.digits) for scene in reading.scenes)
    finally:
        reading.close()


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


def test_multiply_adds_are_those_counted():
    from assay.measure.cost import count_cost

    network = data.Network(8, 6).eval()
    assert data.macs(8, 96) == count_cost(network, torch.zeros(1, 3, 96, 96)).macs
    assert 0.25e9 < data.macs(data.WIDTHS["compact"], data.SERVED) < 0.35e9


def test_folding_keeps_the_answers():
    torch.manual_seed(0)
    network = data.Network(8, 6)
    network(torch.randn(8, 3, 64, 64))
    network.eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.allclose(network(x), data.folded(network)(x), atol=1e-4)


def test_the_deciding_points_are_named():
    found = {one.claim: one for one in experiments_of("dnn_server_overheads")}
    assert set(found) == {SHARE, TWO}
    for scale in ("small", "full"):
        assert found[SHARE].decides[scale]["image"] == "medium"
        assert found[SHARE].decides[scale]["network"] == "compact"
    assert INFERENCE not in room.PREPARING
