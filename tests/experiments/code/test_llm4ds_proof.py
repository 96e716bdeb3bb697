"""Does the verdict on the published rates change when the tests are broken? And what does the protocol say of contestants that run here?"""

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.record import changed
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.code import llm4ds as experiments
from assay.methods.code import llm4ds as room
from assay.methods.core.programs import hypotheses
from assay.workloads.programs.datascience import load

CLAIM = "llm4ds/above-baseline"
POINT = {"p0": 0.5, "correction": "holm", "repetitions": 300, "contestants_here": False}


def verdict(record):
    """The verdict, were it not said that the figure is computed."""
    return judge(changed(record, computed="")).verdict


def test_all_four_are_above_50_percent_by_the_exact_test_after_holm_and_that_is_computed():
    record = record_of(CLAIM, POINT)
    assert record.measured.median == 4
    assert judge(record).verdict is Verdict.COMPUTED
    assert verdict(record) in PAYS
    assert record.measured.low <= 3  # at 60 of 100 the fourth is not sure to be found again
    assert 0.3 < record.details["all four again, if repeated"] < 0.8
    assert record.details["any above by chance, all at the threshold"] < 0.08


def test_at_60_percent_one_of_the_two_does_not_stand_the_adjustment():
    tests = record_of(CLAIM, POINT).details["tests"]
    assert (tests["above 60%"]["significant"], tests["above 60%"]["significant after Holm"]) == (2, 1)
    assert tests["above 70%"]["significant"] == 0
    assert 140 < tests["tasks to tell 70 from 60 %"] < 165


@pytest.mark.parametrize("broken", ["the other tail", "another threshold", "Bonferroni over a hundred", "no test"])
def test_broken_tests_change_the_verdict(monkeypatch, broken):
    honest = hypotheses.binomial
    if broken == "the other tail":
        monkeypatch.setattr(hypotheses, "binomial", lambda k, n, p0, **more: honest(n - k, n, p0, **more))
    elif broken == "another threshold":
        monkeypatch.setattr(hypotheses, "binomial", lambda k, n, p0, **more: honest(k, n, min(p0 + 0.1, 0.99), **more))
    elif broken == "Bonferroni over a hundred":
        monkeypatch.setattr(hypotheses, "holm", lambda p: [min(100 * each, 1.0) for each in p])
    else:
        monkeypatch.setattr(experiments, "above", lambda counts, *_, **__: [False] * len(counts))
    record = record_of(CLAIM, POINT)
    assert record.refuted
    assert verdict(record) not in PAYS


def test_a_test_that_always_says_yes_is_not_believed(monkeypatch):
    monkeypatch.setattr(experiments, "above", lambda counts, *_, **__: [True] * len(counts))
    assert verdict(record_of(CLAIM, POINT)) not in PAYS


def test_without_the_adjustment_it_says_yes_too_often():
    counts, n = [50] * 4, 100
    share = [float(np.mean(experiments.again(counts, n, 0.5, 1500, correction=way) > 0)) for way in ("none", "holm")]
    assert share[0] > 0.12
    assert share[1] <= 0.06


def test_the_deciding_point_is_named():
    (found,) = experiments_of("llm4ds")
    assert found.claim == CLAIM
    assert set(found.departures) == {"correction", "assistants"}
    assert found.measured_here


def test_contestants_that_run_here_are_asked_judged_and_reported(monkeypatch):
    """A model that writes nonsense: nobody is above 50 %, and the report says so."""
    bank = [task for task in load() if not task.needs]
    monkeypatch.setattr(experiments, "load", lambda installed: bank)
    monkeypatch.setattr(experiments, "reply", lambda asked: ["x = 1"] * len(asked))

    def ran(jobs):
        passed = {task.id: task.solution == program for task, program, _ in jobs}
        return [room.Ran(None, "" if passed[task.id] else "wrong", 0.1) for task, _, _ in jobs]

    monkeypatch.setattr(room, "Sandboxed", lambda text: ran)
    report = experiments.run_here()
    assert set(report.rates) == {"nearest solution", "table rules", experiments.MODEL}
    assert not any(answer.significant for answer in report.asked("success"))
    figure = experiments.above_baseline(**{**POINT, "contestants_here": True})
    assert figure.arms == {"contestants that run here": 0.0}
    assert "models on" in figure.details["contestants here, in words"]


def test_what_the_model_said_to_every_task_is_checked_in(monkeypatch):
    """So that it is judged without the model; a prompt that changes has to be asked anew (`draw`)."""

    def asked(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(experiments.samples._Model, "__call__", asked)
    experiments.samples.generator.cache_clear()
    said = experiments.reply([room.prompt_of(task) for task in load()])
    experiments.samples.generator.cache_clear()
    assert len(said) == len(load())
    assert sum("def " in text for text in said) > 50
