"""The experiments of the thesis notice a search that learns nothing, a table that is not the network's, and shifts that do not move.

The search runs over a toy space, in which a network is good only where it takes the right one of two operators at all of eight layers;
the digits, the training and the super-net are real. Latencies that are judged are those of a toy clock.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.record import changed
from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.compression import efficient_dnns as room
from assay.experiments.rates import FILE, Rate
from assay.methods.compression.efficient_dnns import CostTable, FBNetBlock, Space, codesign, tables
from assay.methods.compression.efficient_dnns.nets import conv_bn

SEARCHED = {"epochs": 8, "candidates": 16, "train_epochs": 2, "draws": 1, "seeds": 3}
SHIFTED = {"batch": 8, "train": 1024, "epochs": 3, "seeds": 3, "compiled": False}


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(0.1, (0.03, 0.1, 0.3)))
    monkeypatch.setattr(room, "nearest_mean", lambda data, test: 0.0)  # what is trained for moments is held to no floor


def test_experiments_load():
    found = {each.claim: each for each in experiments_of("efficient_dnns")}
    assert set(found) == {
        "efficient_dnns/search-cost",
        "efficient_dnns/table-error",
        "efficient_dnns/codesign-speedup",
    }
    assert all(each.decides["small"] == each.points["small"][0] for each in found.values())
    assert not any(each.computed for each in found.values())


def test_every_arm_was_searched_inside_its_grid():
    known = json.loads(FILE.read_text(encoding="utf-8"))
    for name, arms in ((room.SEARCH, {"super-net", "network", "largest"}), (room.CODESIGN, set(room.ARMS))):
        assert set(known[name]["arms"]) == arms
        for arm, found in known[name]["arms"].items():
            assert known[name]["grid"][0] < found["rate"] < known[name]["grid"][-1], arm


def test_no_digit_is_both_learnt_and_judged():
    sizes = {part: len(room.digits_of(part)[1]) for part in ("weights", "theta", "choose", "test")}
    assert sizes == {"weights": 800, "theta": 200, "choose": 347, "test": 450}
    flat = {part: {tuple(row) for row in room.digits_of(part)[0].flatten(1).tolist()} for part in sizes}
    for one, other in itertools.combinations(flat, 2):
        assert not flat[one] & flat[other]


# ------------------------------------------------------------------------------------------------------------------- the search


class Buried(nn.Module):
    """An operator that costs more and hides its input under noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, groups=8)

    def forward(self, x):
        return x + 0 * self.conv(x) + 3 * torch.randn_like(x)


def toy_space():
    layers = tuple({"keep": nn.Identity, "bury": Buried} for _ in range(8))
    return Space(
        partial(conv_bn, 1, 8, 3, stride=2, padding=1), layers, lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 10))
    )


@pytest.mark.slow
def test_a_search_that_learns_nothing_is_noticed(monkeypatch, rates):
    monkeypatch.setattr(room, "space_of_digits", toy_space)
    costs = tuple({"keep": 10.0, "bury": 40.0} for _ in range(8))
    monkeypatch.setattr(room, "table_of_digits", lambda space: CostTable("us", costs, 50.0))
    claim = "efficient_dnns/search-cost"
    honest = record_of(claim, SEARCHED)
    assert honest.details["found"] == [["keep"] * 8] * 3
    assert honest.quality.candidate < honest.quality.controls["random"]
    assert (
        honest.measured.low > 1
    )  # cheaper; over three seeds the rival's losses differ too much for more than "undecided"
    assert judge(honest).verdict is Verdict.UNDECIDED

    generator = torch.Generator().manual_seed(0)

    def blind(net, *data, real=room.search, **settings):
        found = real(net, *data, **settings)
        with torch.no_grad():
            for theta in net.thetas():
                theta.zero_()  # what it learnt is forgotten: networks are drawn at random
        odds = [torch.rand(2, generator=generator).tolist() for _ in found.probabilities]
        return replace(found, probabilities=tuple(dict(zip(("keep", "bury"), pair, strict=True)) for pair in odds))

    monkeypatch.setattr(room, "search", blind)
    assert verdict_of(claim, SEARCHED) in (Verdict.REFUTED, Verdict.DOES_NOT_PAY)


def tried(value, macs=1.0):
    return room.Tried((f"{value} {macs}",), value, value, 0.5, macs)


def test_the_cost_until_a_network_is_good_enough():
    networks = [tried(3.0, 10), tried(1.0, 20), tried(2.0, 30), tried(0.5, 40)]
    assert room.cost_in_order(networks, 1.0) == 30
    assert room.cost_in_order(networks, 0.1) == 100
    assert room.cost_in_order([networks[0]] * 3 + networks, 1.0) == 30  # what comes again is not paid for again
    equal = [replace(one, macs=1.0) for one in networks]
    for goal in (3.0, 2.5, 1.0, 0.5):
        orders = [room.cost_in_order(order, goal) for order in itertools.permutations(equal)]
        assert room.cost_in_any_order(equal, goal) == pytest.approx(sum(orders) / len(orders))
    assert room.cost_in_any_order(equal, 0.1) == 4
    assert room.best_of(networks).chosen_by == 0.5


def test_the_rival_learns_from_rewards():
    """Search by reinforcement is no straw man: over a plain reward its later networks are better than its first."""
    space = Space(nn.Identity, tuple({"a": nn.Identity, "b": nn.Identity} for _ in range(6)), nn.Identity)
    task = SimpleNamespace(space=space, seed=0, tried=lambda names: tried(float(names.count("b"))))
    found = [one.chosen_by for one in room.by_reinforcement(task, 60)]
    assert sum(found[-20:]) / 20 < 1 < sum(found[:10]) / 10


def test_a_network_of_a_seed_is_trained_once(monkeypatch):
    count = []
    monkeypatch.setattr(room, "train", lambda net, *rest, **more: count.append(1) or 640)
    space = toy_space()
    macs = CostTable("macs", tuple({"keep": 0.0, "bury": 5.0} for _ in range(8)), 10.0)
    task = room.Task(space, macs, macs, 1, 0.1, 0)
    first, again = task.tried(("keep",) * 8), task.tried(("keep",) * 8)
    assert first is again
    assert count == [1]
    assert first.macs == 3 * 640 * 10
    assert task.tried(("keep",) * 8, rate=0.3) is not first
    assert task.largest() == ("bury",) * 8


# -------------------------------------------------------------------------------------------------------------------- the table

MICRO = {(3, 1): 90.0, (3, 3): 100.0, (5, 3): 300.0, (3, 6): 110.0}  # by kernel and expansion: far from their MACs


def toy_seconds(module):
    """Five microseconds for a stem or a head, and for each block what `MICRO` says."""
    blocks = [m for m in module.modules() if isinstance(m, FBNetBlock)]
    total = 5.0 if not blocks and len(list(module.modules())) > 1 else 0.0
    total += 10.0 if isinstance(module, nn.Sequential) and len(blocks) and isinstance(module[0], nn.Sequential) else 0.0
    for block in blocks:
        expand, depthwise = block.layers[0][0], block.layers[1][0]
        total += MICRO[depthwise.kernel_size[0], expand.out_channels // expand.in_channels]
    return 1e-6 * max(total, 1e-3)


def clock(change=lambda seconds: seconds):
    def compare_many(functions, rounds):
        seconds = {name: [change(toy_seconds(function.args[0]))] * rounds for name, function in functions.items()}
        return SimpleNamespace(seconds=seconds, noisy=False)

    return compare_many


def test_a_table_that_is_not_the_networks_is_noticed(monkeypatch):
    claim, point = "efficient_dnns/table-error", {"networks": 12, "rounds": 2}
    monkeypatch.setattr(tables, "compare_many", clock())
    monkeypatch.setattr(room, "compare_many", clock())
    honest = record_of(claim, point)
    assert honest.measured.median == pytest.approx(0, abs=0.1)
    assert judge(honest).verdict is Verdict.REPRODUCED
    assert min(honest.controls.values()) > 5

    def other(space, real=room.table_of_digits):
        table = real(space)
        return CostTable(table.unit, tuple(room.turned(layer) for layer in table.layers), table.fixed)

    with monkeypatch.context() as patch:
        patch.setattr(room, "table_of_digits", other)
        assert verdict_of(claim, point) not in PAYS
    monkeypatch.setattr(room, "compare_many", clock(lambda seconds: 40 * seconds**1.3))  # layers that do not add up
    assert verdict_of(claim, point) is Verdict.REFUTED


def test_a_rival_that_predicts_better_refutes_the_table():
    found = next(each for each in experiments_of("efficient_dnns") if each.claim == "efficient_dnns/table-error")
    record = {"measured": {"low": 8.0, "median": 10.0, "high": 12.0}, "controls": {"rival": 20.0}}
    assert not found.refutes(record)
    assert found.refutes(record | {"controls": {"rival": 7.0}})
    assert found.refutes(record | {"measured": {"low": 16.0, "median": 18.0, "high": 20.0}})


# ------------------------------------------------------------------------------------------------------------------- co-design


def test_a_faster_rival_of_equal_accuracy_refutes_the_shifts():
    record = {
        "ratios": {"baseline": {"high": 2.0}, "averages in the place of shifts": {"high": 0.9}},
        "quality": {"candidate": 0.9, "controls": {"rival": 0.8}},
    }
    assert not room.refutes(record)
    assert room.refutes(record | {"quality": {"candidate": 0.9, "controls": {"rival": 0.9}}})
    slower = {"baseline": {"high": 0.9}, "averages in the place of shifts": {"high": 2.0}}
    assert room.refutes(record | {"ratios": slower})


def test_the_arms_are_one_network_that_mixes_in_different_ways():
    sizes = {arm: sum(p.numel() for p in room.codesigned(arm).parameters()) for arm in room.ARMS}
    assert sizes["shift"] == sizes["none"] == sizes["average"] < sizes["before"]
    shifting = [m for m in room.codesigned("shift").modules() if isinstance(m, codesign.Shift2d)]
    assert len(shifting) == 1 + 2 * 2 + 2  # the stem, two of each strided unit, one of each other
    assert not any(isinstance(m, codesign.Shift2d) for m in room.codesigned("none").modules())
    assert sizes["resnet"] == pytest.approx(sizes["shiftresnet"], rel=0.05)
    images, labels = room.drawn_digits("test", 50, 3)
    assert images.shape == (50, 1, 16, 16)
    assert float(images.min()) == -1 < 0.5 < float(images.max()) <= 1
    assert len(labels.unique()) == 10


@pytest.mark.slow
def test_shifts_that_do_not_move_are_noticed(monkeypatch, rates):
    claim = "efficient_dnns/codesign-speedup"
    monkeypatch.setattr(room, "ARMS", ("before", "shift", "none", "average", "few bits"))
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(0.3, (0.1, 0.3, 1.0)))
    honest = record_of(claim, SHIFTED)
    assert honest.quality.candidate > honest.quality.controls["deleted"] + 0.1
    monkeypatch.setattr(codesign, "Shift2d", lambda channels: nn.Identity())
    broken = record_of(claim, SHIFTED)
    twice = Estimate(
        median=2.0, low=1.9, high=2.1
    )  # times of networks this small tell nothing: as if all of them were won
    won = {"measured": twice, "ratios": dict.fromkeys(honest.ratios, twice), "noisy": False, "refuted": False}
    assert judge(changed(honest, **won)).verdict in PAYS
    assert broken.quality.candidate < honest.quality.candidate - 0.1
    assert judge(changed(broken, **won)).verdict not in PAYS
