"""The survey's experiment notices a mixer of quadratic cost and one that mixes nothing, and hides no local exponent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.core import Quality
from assay.experiments.mixers import ssm_survey as room
from assay.measure.clock import Timings
from assay.measure.cost import count_cost
from assay.methods.core.mixers.attention import SoftmaxAttention

CLAIM = "ssm_survey/linear-complexity"
POINT = {"tokens": [512, 1024, 2048, 4096], "dim": 16, "rounds": 6, "lesson": "tiny"}


def counted(functions, *, rounds):
    """A clock that takes a nanosecond a FLOP."""
    flops = {name: count_cost(run.func, *run.args).flops for name, run in functions.items()}
    return Timings({name: [1e-9 * n] * rounds for name, n in flops.items()}, {}, 0.0, 0.0, 0.0, False)


@pytest.fixture
def _counted(monkeypatch):
    monkeypatch.setattr(room, "compare_many", counted)
    fine = Quality(0.9, 0.9, 0.88, 0.92, {"deleted": 0.2, "random": 0.1, "rival": 0.7})
    monkeypatch.setattr(room, "mixing", lambda lesson: (fine, {}, {}))


def test_experiments_load():
    assert [e.claim for e in experiments_of("ssm_survey")] == [CLAIM]


@pytest.mark.usefixtures("_counted")
def test_a_quadratic_mixer_is_noticed(monkeypatch):
    assert verdict_of(CLAIM, POINT) in PAYS
    monkeypatch.setattr(room, "Mamba", SoftmaxAttention)
    assert verdict_of(CLAIM, POINT) is Verdict.REFUTED


@pytest.mark.slow
@pytest.mark.usefixtures("_counted")
def test_a_scan_that_mixes_nothing_is_noticed(monkeypatch):
    """The scan and its convolution are left out; the pictures are really learned, under one seed."""
    mixes = room.lesson_at("scan", 1e-2, 0, "digits")["accuracy"]

    def pointwise(self, x, mask=None):
        u, z = self.in_proj(x).chunk(2, -1)
        return self.out_proj(u * F.silu(z))

    monkeypatch.setattr(room.Mamba, "forward", pointwise)
    alone = room.lesson_at("scan", 1e-2, 0, "digits")["accuracy"]
    controls = {"deleted": 0.2, "random": 0.1, "rival": 0.7}

    def verdict(accuracy):
        base = mixes - 0.01
        quality = Quality(accuracy, base, accuracy - 0.02, accuracy + 0.02, controls)
        monkeypatch.setattr(room, "mixing", lambda lesson: (quality, {}, {}))
        return verdict_of(CLAIM, POINT)

    assert verdict(mixes) in PAYS
    assert verdict(alone) is Verdict.DOES_NOT_PAY


@pytest.mark.usefixtures("_counted")
def test_local_exponents_that_scatter_leave_the_claim_undecided(monkeypatch):
    """0.45 and 1.66 with a slope of 0.96: what one exponent hid."""

    def scattered(functions, *, rounds):
        found = counted(functions, rounds=rounds)
        times = np.cumprod([1.0, 2**0.45, 2**0.8, 2**1.66])
        for n, time in zip(POINT["tokens"], times, strict=True):
            found.seconds[f"scan {n}"] = [float(time)] * rounds
        return found

    monkeypatch.setattr(room, "compare_many", scattered)
    record = record_of(CLAIM, POINT)
    assert 0.8 < record.measured.median < 1.2
    assert (record.measured.low, record.measured.high) == pytest.approx((0.45, 1.66))
    assert judge(record).verdict is Verdict.UNDECIDED
    assert [each[0] for each in record.details["local_exponents"]["scan"]] == pytest.approx([0.45, 0.8, 1.66])
    assert record.details["trend"]["scan"]["exponent"] == "rises with the length"


def test_a_straight_line_shows_no_trend():
    rng = np.random.default_rng(0)
    seconds = {n: list(n * np.exp(0.05 * rng.standard_normal(12))) for n in (512, 1024, 2048, 4096)}
    assert not room.trend(seconds)["outside_noise"]
    assert room.exponent(seconds).contains(1.0)
    bent = {n: [s * n**0.3 if n > 1024 else s for s in each] for n, each in seconds.items()}
    assert max(found.median for found in room.local_exponents(bent)) <= room.exponent(bent).high


def test_tokens_in_random_order_change_a_scan_and_spare_attention():
    torch.manual_seed(0)
    scan, attention = room.network("scan", 16, 10, 8, 1).eval(), room.network("attention", 16, 10, 8, 1).eval()
    x = torch.randn(2, 16, 1)
    before = [model(x) for model in (scan, attention)]
    for model in (scan, attention):
        room.scan_at_random(model)
    assert (scan(x) - before[0]).abs().max() > 1e-5
    assert torch.equal(attention(x), before[1])
