"""speedup's verdict changes when the gate, the candidate or the protocol's turns are broken; places where nothing pays are told."""

import importlib.util

import numpy as np
import pytest
from tests.methods.code.llm_library_optimization_here import Machine, Simulated, program, sums
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tools import needs

from assay.evidence.verdict import Verdict, judge
from assay.experiments import experiments_of
from assay.experiments.code import llm_library_optimization as room
from assay.methods.code import llm_library_optimization as method
from assay.methods.code.llm_library_optimization import Bench, Candidate, Gate, Rules, bench
from assay.methods.code.llm_library_optimization.loci import extrema

CLAIM = "llm_library_optimization/speedup"
POINT = {"images": "photographs", "pairs": 6, "places": []}
RULES = Rules(pairs=30)


@pytest.fixture(autouse=True)
def small_photographs(monkeypatch):
    """Parts of two real ones, and few images beside them."""
    needs("gcc")
    needs("bwrap")
    if not all(map(importlib.util.find_spec, ("sklearn", "skimage"))):
        pytest.skip("the photographs come with scikit-learn and scikit-image")
    room.grey_photographs.cache_clear()
    parts = {name: image[:64, :80].copy() for name, image in list(room.grey_photographs().items())[1:3]}
    monkeypatch.setattr(room, "grey_photographs", lambda: parts)
    whole = extrema.in_c
    monkeypatch.setattr(room.extrema, "in_c", lambda images: whole(images, height=37, width=53, draws=60))


def deciding(monkeypatch, candidate):
    monkeypatch.setitem(extrema.CANDIDATES, room.DECIDING, candidate)


def test_honest_it_pays():
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict in PAYS
    assert record.details["accepted"]
    assert record.details["sanitizers"] == "address, undefined"
    assert record.quality.candidate == record.quality.baseline == 1
    assert record.quality.controls["deleted"] < 0.9
    assert {"reference", "candidate", "inputs", "environment"} <= set(record.details)


def test_a_wrong_candidate_is_not_accepted_and_refutes_it(monkeypatch):
    deciding(monkeypatch, extrema.SAMPLED)
    record = record_of(CLAIM, POINT)
    assert not record.details["accepted"]
    assert judge(record).verdict is Verdict.REFUTED


def test_one_that_reads_beyond_its_rows_is_not_accepted_though_its_answers_are_right(monkeypatch):
    deciding(monkeypatch, extrema.BEYOND)
    record = record_of(CLAIM, POINT)
    assert "sanitizers" in record.details["why not"]
    assert judge(record).verdict is Verdict.REFUTED


def test_without_the_gate_what_is_fast_and_wrong_shows_no_quality(monkeypatch):
    deciding(monkeypatch, extrema.SAMPLED)
    monkeypatch.setattr(Bench, "gate", lambda self, _: Gate(True, 1))
    assert verdict_of(CLAIM, POINT) not in PAYS


def test_a_slower_candidate_refutes_it():
    (found,) = experiments_of("llm_library_optimization")
    seen = {"details": {"accepted": True}, "measured": {"low": 0.7, "median": 0.8, "high": 0.9}}
    assert found.refutes(seen)
    assert not found.refutes(seen | {"measured": {"low": 5.0, "median": 6.0, "high": 7.0}})


def place(monkeypatch, candidates, machine=None):
    """One simulated place through the experiment's own protocol."""
    monkeypatch.setattr(room, "places", lambda: {"sums": lambda: (sums(), Simulated(machine), candidates)})
    return room.tried(["sums"], RULES)["sums"]


def test_a_place_where_nothing_pays_is_told_as_such(monkeypatch):
    slower, wrong = program(2.5, name="slower"), program(0.1, "0", name="wrong")
    found = place(monkeypatch, [slower, wrong], Machine(0.05))
    assert found["reference against itself"] == "no change"
    assert [one["state"] for one in found["attempts"]] == ["slower", "wrong"]
    assert found["best"] == "none was accepted"
    told = room.summary({"sums": found, "elsewhere": {"not here": "another Python"}})
    assert told == {"places": 1, "improved": 0, "an improvement in every place": False}
    better = place(monkeypatch, [slower, program(0.5, name="better")], Machine(0.05))
    assert (better["best"], round(better["speed-up of the best"])) == ("better", 4)
    assert room.summary({"a": found, "b": better})["an improvement in every place"] is False
    assert room.summary({"b": better})["an improvement in every place"] is True


def test_without_turns_the_reference_beats_itself_on_a_machine_that_drifts(monkeypatch):
    same = [Candidate("again", program(2.0).source + "# the same")]
    drifting = lambda now: 1 + 0.5 * now  # noqa: E731
    assert place(monkeypatch, same, Machine(0.02, drifting))["attempts"][0]["state"] == "no change"

    def all_then_all(reference, candidate, rules):
        calls = 1
        return calls, [reference(calls) for _ in range(rules.pairs)], [candidate(calls) for _ in range(rules.pairs)]

    monkeypatch.setattr(bench, "in_turns", all_then_all)
    assert place(monkeypatch, same, Machine(0.02, lambda now: 1 + 4 * now))["attempts"][0]["state"] == "slower"


def test_the_deciding_point_is_the_photographs():
    (found,) = experiments_of("llm_library_optimization")
    assert {scale: found.decides[scale]["images"] for scale in ("small", "full")} == dict.fromkeys(
        ("small", "full"), "photographs"
    )
    assert set(room.PLACES) == set(found.decides["small"]["places"])
    assert len(found.points["small"]) == 4


def test_what_is_timed_is_what_was_judged():
    image = next(iter(room.grey_photographs().values()))
    expected = int(image.min()), int(image.max())
    trial = room.speedup(**POINT)
    last = list(room.grey_photographs().values())[-1]
    wanted = int(last.min()), int(last.max())
    assert trial.baseline() == trial.candidate() == trial.free() == wanted
    assert all(arm() == wanted for arm in trial.arms.values())
    assert room.by_pillow(image)() == expected
    for kind in ("constant", "random"):
        assert all(isinstance(one, np.ndarray) for one in room.images_of(kind))
    assert method.PROTOCOL.pairs == 30
