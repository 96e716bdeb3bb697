"""eff@1's verdict changes when what makes the score is broken: the expert, the levels, the cuts, the answers."""

import sys
from types import SimpleNamespace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.verdict import Verdict, judge
from assay.experiments import experiments_of
from assay.experiments.code import enamel as room
from assay.methods.code import enamel
from assay.methods.core.programs.workers import Outcome
from assay.workloads.programs.task import bank

CLAIM = "enamel/eff-at-1"
POINT = {"problems": "bank", **room.SETTINGS, "repeats": 2}
SIZES = (1, 10, 100, 1000)
GROWTH = {
    "expert": lambda n: 0.001 * n, "quick": lambda n: 0.00101 * n, "naive": lambda n: 0.0001 * n * n, "wordy": lambda n: 0.0018 * n,
    "false": lambda n: 0.0001 * n, "slower": lambda n: 0.0016 * n, "deep": lambda n: 0.001 * n,
}  # fmt: skip


def toy(number, canonical):
    """A task whose programs are names: an expert, three right ones, a wrong one, and a canonical one of that growth."""
    return SimpleNamespace(
        id=f"Toy/{number}",
        entry_point="f",
        programs={"canonical": canonical, "expert": "expert", "a": "quick", "b": "naive", "c": "naive"},
        wrong={"a guess": "false"},
        compare=lambda expected, got: expected == got,
        arguments=lambda level, case, seed=0: (SIZES[level], case, seed),
    )


class Machine:
    """Stands for workers: what a program costs follows from its name."""

    def __init__(self, meter):
        self.meter = SimpleNamespace(name=meter, unit="s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, program, entry_point, cases, *, repeats=1, limits=None, keywords=None):
        ((size, *_),) = cases
        if program == "deep" and size > 10:
            return [[Outcome("raised", error="RecursionError: maximum recursion depth exceeded")]]
        cost = GROWTH[program](size)
        if limits is not None and cost > limits.cpu_seconds:
            return [[Outcome("time", error="too long")]]
        return [[Outcome("returned", 0 if program == "false" else size, cost=cost)]]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Of nine canonical solutions six are quadratic, two wordy, and one is as good as the expert."""
    kinds = ["naive"] * 6 + ["wordy"] * 2 + ["quick"]
    monkeypatch.setattr(room, "Workers", Machine)
    monkeypatch.setattr(room, "bank", lambda: {f"Toy/{n}": toy(n, kind) for n, kind in enumerate(kinds)})


def all_of(kind):
    return lambda: {f"Toy/{n}": toy(n, kind) for n in range(9)}


def test_the_figure_is_the_mean_over_tasks_of_the_canonical_solutions():
    record = record_of(CLAIM, POINT)
    naive = (3 * (2.0 - 0.01) / (2.0 - 0.01) + 3 * (2.0 - 1.0) / (2.0 - 0.1)) / 10
    wordy = (3 * (2.0 - 0.018) / 1.99 + 3 * (2.0 - 0.18) / 1.9 + 4 * 0.2) / 10
    quick = (3 * (2.0 - 0.0101) / 1.99 + 3 * (2.0 - 0.101) / 1.9 + 4 * 0.99) / 10
    assert record.measured.median == pytest.approx((6 * naive + 2 * wordy + quick) / 9)
    assert record.measured.low < record.measured.median < record.measured.high
    assert record.baseline == 1
    assert record.details["tasks"] == 9
    assert set(record.details["cut or wrong"].values()) == {"cut on level 3"}
    assert record.details["expert against itself"]["mean"] == pytest.approx(1)
    assert record.details["highest score of a wrong program"] == 0
    assert set(record.details["eff@k of assay's other right programs"]) == {"1", "2", "3"}
    assert record.controls["deleted"] == pytest.approx(1)
    assert record.controls["rival"] == pytest.approx((6 * 0.5 + 2 / 1.8 + 1 / 1.01) / 9)
    assert record.arms["scores clipped at 1"] <= record.measured.median
    assert 0 < record.details["variance of eff@2 from 5 samples over that of one pair, at most 0.4"] <= 0.41


def test_honest_it_pays():
    assert verdict_of(CLAIM, POINT) in PAYS


def test_solutions_as_good_as_the_expert_refute_it(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("quick"))
    assert judge(record_of(CLAIM, POINT)).verdict is Verdict.REFUTED


def test_solutions_somewhat_slower_are_no_proof(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("slower"))
    record = record_of(CLAIM, POINT)
    assert 0.5 < record.measured.median < 0.8
    assert not record.refuted


def test_without_the_expert_nothing_is_shown(monkeypatch):
    """Each solution held against itself, as a benchmark does that trusts its canonical solutions."""
    monkeypatch.setattr(room, "bank", lambda: {f"Toy/{n}": with_expert(toy(n, "naive"), "naive") for n in range(9)})
    assert verdict_of(CLAIM, POINT) not in PAYS


def test_a_random_reference_in_the_experts_place_shows_nothing(monkeypatch):
    monkeypatch.setattr(
        room, "bank", lambda: {f"Toy/{n}": with_expert(toy(n, "naive"), ("naive", "wordy")[n % 2]) for n in range(9)}
    )
    assert verdict_of(CLAIM, POINT) not in PAYS


def with_expert(task, program):
    task.programs["expert"] = program
    return task


def test_where_what_is_cut_counts_as_fast_it_is_refuted(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("naive"))
    assert verdict_of(CLAIM, POINT) in PAYS
    real = enamel.sample_score

    def generous(runs, found, settings=enamel.PAPER):
        """Levels that were cut count as if they had come in as the reference does."""
        score = real(runs, found, settings)
        levels = [1.0 if not f and h else f for f, h in zip(score.levels, settings.hardness, strict=True)]
        value = sum(h * f for h, f in zip(settings.hardness, levels, strict=True)) / sum(settings.hardness)
        return enamel.Score(value, tuple(levels), score.right, score.ended) if score.right else score

    monkeypatch.setattr(enamel, "sample_score", generous)
    assert verdict_of(CLAIM, POINT) is Verdict.REFUTED


def test_scores_of_right_or_wrong_only_are_pass_at_1_and_refute_it(monkeypatch):
    monkeypatch.setattr(enamel, "level_score", lambda *_, **__: 1.0)
    monkeypatch.setattr(room, "bank", all_of("wordy"))
    record = record_of(CLAIM, POINT)
    assert record.measured.median == record.baseline
    assert judge(record).verdict is Verdict.REFUTED


def test_inputs_that_do_not_grow_show_less(monkeypatch):
    honest = record_of(CLAIM, POINT).measured.median
    monkeypatch.setattr(sys.modules[__name__], "SIZES", (1, 2, 3, 4))
    small = record_of(CLAIM, POINT)
    assert small.measured.median > honest
    assert judge(small).verdict not in PAYS


def test_wrong_programs_count_in_neither_figure(monkeypatch):
    tasks = {f"Toy/{n}": toy(n, "naive" if n < 6 else "false") for n in range(9)}
    monkeypatch.setattr(room, "bank", lambda: tasks)
    record = record_of(CLAIM, POINT)
    assert record.baseline == pytest.approx(6 / 9)
    assert {name for name, why in record.details["cut or wrong"].items() if "wrong" in why} == {
        "Toy/6",
        "Toy/7",
        "Toy/8",
    }


def test_a_canonical_solution_that_cannot_be_a_reference_is_a_sample_all_the_same(monkeypatch):
    tasks = {f"Toy/{n}": toy(n, "naive" if n < 8 else "deep") for n in range(9)}
    monkeypatch.setattr(room, "bank", lambda: tasks)
    record = record_of(CLAIM, POINT)
    assert record.details["of them, with a canonical solution that can be its own reference"] == 8
    assert record.controls["deleted"] == pytest.approx(1)
    assert record.details["tasks"] == 9
    assert record.baseline == pytest.approx(8 / 9)


def test_the_deciding_points_and_the_bank_they_are_taken_from(monkeypatch):
    (found,) = experiments_of("enamel")
    for scale in ("small", "full"):
        point = found.decides[scale]
        assert {name: point[name] for name in room.SETTINGS} == room.SETTINGS
        assert point["problems"] == "bank"
    assert all({"canonical", "expert"} <= set(task.programs) for task in bank().values())
