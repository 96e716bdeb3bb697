"""FIT's experiments notice when groups no longer learn from each other, and when latents are not few."""

import pytest
import torch
from tests.properties.sabotage import record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import PAYS, judge
from assay.experiments import experiments_of
from assay.experiments.attention import fit as room
from assay.measure.isolate import ChildResult

GLOBAL, MEMORY = "fit/global-complexity", "fit/tokens-in-16gb"
SHAPE = {"groups": [3, 4, 6], "sizes": [], "arms": [], "patch": 8}
MEMORY_POINT = {
    "patch": 8, "dim": 32, "tile": 4, "latents": 4, "dtype": "float32", "gigabytes": 1.0, "steps": 2, "seconds": 60,
    "sides": {"fit": [256], room.PLAIN: [128], room.FREE: [128]},
}  # fmt: skip


def test_the_experiments_load_and_their_deciding_points_are_the_papers():
    assert {found.claim for found in experiments_of("fit")} == {GLOBAL, MEMORY}
    memory = next(found for found in experiments_of("fit") if found.claim == MEMORY)
    assert memory.decides["full"]["gigabytes"] == memory.paper["gigabytes"] == 16.0


def test_the_exponent_is_arithmetic_and_right():
    record = record_of(GLOBAL, SHAPE)
    assert judge(record).verdict is Verdict.COMPUTED
    assert record.measured.median == pytest.approx(4 / 3, abs=record.tolerance)
    assert record.baseline == pytest.approx(2)


def test_latents_in_proportion_to_the_group_give_another_exponent(monkeypatch):
    right = room.FIT
    monkeypatch.setattr(room, "FIT", lambda *a, **sizes: right(*a, **(sizes | {"latents": sizes["group_size"]})))
    record = record_of(GLOBAL, SHAPE)
    assert abs(record.measured.median - 4 / 3) > record.tolerance


@pytest.fixture
def _children(monkeypatch):
    """Processes in which every image runs."""

    def run_isolated(target, sizes, **limits):
        value = {"tokens": sizes["side"] ** 2 // 64, "losses": [1.0, 0.5], "seconds_a_step": 0.1, "parameters": 1}
        return ChildResult("ok", value, "", 1.0, 5 * 10**8, 1.0)

    monkeypatch.setattr(room, "run_isolated", run_isolated)


@pytest.mark.usefixtures("_children")
def test_latents_that_reach_nothing_change_the_verdict(monkeypatch):
    assert verdict_of(MEMORY, MEMORY_POINT) in PAYS

    class Nothing(nn.Module):
        def __init__(self, dim, *sizes):
            super().__init__()

        def forward(self, x, *more):
            return x

    right = room.FIT

    def without_global_layers(layers, **sizes):
        model = right(layers, **sizes)
        for stage in model.body.stages:
            stage.global_layers = nn.ModuleList(Nothing(0) for _ in stage.global_layers)
        return model

    monkeypatch.setattr(room, "FIT", without_global_layers)
    assert verdict_of(MEMORY, MEMORY_POINT) is Verdict.DOES_NOT_PAY


@pytest.mark.usefixtures("_children")
def test_a_plain_transformer_of_as_many_tokens_takes_the_gain_away():
    more = MEMORY_POINT | {"sides": MEMORY_POINT["sides"] | {room.FREE: [512]}}
    record = record_of(MEMORY, more)
    assert record.free > record.measured.high
    assert judge(record).verdict is Verdict.DOES_NOT_PAY
    assert verdict_of(MEMORY, MEMORY_POINT | {"sides": MEMORY_POINT["sides"] | {room.PLAIN: [512]}}) is Verdict.REFUTED


def test_reach_is_what_a_change_moves():
    found = room.reached({"fit": "(1)1(1)", "plain transformer": "(2)", "local only": "(2)"}, 16, 4, 2)
    assert (found.candidate, found.baseline, found.controls["deleted"]) == (1.0, 1.0, 4 / 64)
    assert found.controls["deleted"] <= found.controls["rival"] < 1


@pytest.mark.parametrize("arm", [room.FREE, "fit" + room.KEPT])
def test_running_blocks_twice_changes_no_step(arm):
    sizes = {"side": 32, "patch": 4, "dim": 16, "tile": 4, "latents": 2, "dtype": "float32", "steps": 2}
    once, twice = (room.steps_on_an_image(name, **sizes) for name in (arm.removesuffix(room.KEPT), arm))
    assert twice["losses"] == pytest.approx(once["losses"], rel=1e-5)
    assert torch.isfinite(torch.tensor(twice["losses"])).all()
