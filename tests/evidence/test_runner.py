"""Running experiments for real, in child processes: whatever a point does, it becomes a record and the sweep goes on."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import toy_experiments
from evidence_maker import make

from assay.errors import InputError, MissingError
from assay.evidence import hashes, place, point, runner
from assay.evidence.jobs import Outcome, combined
from assay.evidence.record import changed
from assay.evidence.runner import Here, _problem, _recorded, in_claims_unit, plan, verify
from assay.evidence.store import Store, StoreError
from assay.evidence.types import AGAIN, Estimate, Verdict
from assay.evidence.verdict import judge
from assay.experiments import Experiment, Figure, Guard, Operator, Quality, Trained, Trial, experiments_of

HERE = Path(__file__).parent
real_commit = place.commit


@pytest.fixture(autouse=True)
def _toys(monkeypatch, tmp_path):
    toy_experiments.install(monkeypatch)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "runs"))
    yield
    place.here.cache_clear()


def runs(tmp_path):
    """What the experiments have noted: one line a run."""
    file = tmp_path / "runs"
    return file.read_text().splitlines() if file.exists() else []


def test_a_trial_and_a_figure(tmp_path):
    steps = []
    with Store() as store:
        records = verify(["toy"], scale="smoke", store=store, progress=steps.append)
        assert store.records() == records
    first, second, third = records
    assert [(r.claim, r.point, r.index) for r in records] == [
        ("toy/speedup", {"n": 1}, 0),
        ("toy/speedup", {"n": 2}, 1),
        ("toy/loss", {}, 0),
    ]
    assert all(r.status == "ok" for r in records), [r.error for r in records]

    assert first.kind == "trial"
    assert first.unit == "x"
    assert judge(changed(second, noisy=False)).verdict is Verdict.REPRODUCED  # the tests' own machine may be busy
    assert [r.decides for r in records] == [False, True, True]
    assert first.measured.low <= first.measured.median <= first.measured.high
    assert first.seconds_of["baseline"] > first.seconds_of["free"] > first.seconds_of["candidate"] > 0
    assert first.ratios["baseline"] == first.measured
    assert first.ratios["free"].median < first.measured.median
    assert first.ratios["candidate again"].low <= 1 <= first.ratios["candidate again"].high
    assert first.processes == 3
    assert first.hashes["package torch"]
    assert first.departures == {"n": "five would take too long"}
    assert first.refuted_if == "it takes longer than the baseline"
    assert first.quality.margin == 0.05
    assert first.quality.controls == {"deleted": 0.1, "random": 0.5, "rival": 0.7}
    assert first.free_label == "a shorter sleep"
    assert first.quality.candidate == 0.9
    assert first.details["n"] == 1
    assert first.details["shape"] == [1, 1]
    assert first.details["bad"] == "NaN"
    assert first.details["timing"]["rounds"] == [4, 4, 4]
    assert len(first.details["timing"]["medians_by_process"]["baseline"]) == 3
    assert first.details["process"]["peak_rss_bytes"] > 2**20
    assert (first.paper_value, first.paper_unit, first.metric) == (5.0, "x", "speed-up")

    assert third.kind == "figure"
    assert (third.measured.low, third.measured.median, third.measured.high) == (2.05, 2.1, 2.15)
    assert third.baseline == 2.5
    assert third.unit == "nats"
    assert judge(third).verdict is Verdict.REPRODUCED
    assert third.controls == {"deleted": 3.0, "random": 2.9}

    for record in records:
        assert record.fingerprint == place.here().fingerprint
        assert record.machine["cpu"]
        assert record.machine["versions"]["torch"]
        assert record.machine["threads"] >= 1
        assert "governor" in record.machine
        assert record.commit == "toycommit"
        assert record.command == "assay verify toy --scale smoke"
        assert record.seconds > 0
        assert record.created.utcoffset().total_seconds() == 0
        assert record.load_before >= 0
    assert [(step.done, step.record is None) for step in steps] == [
        (0, True), (1, False), (1, True), (2, False), (2, True), (3, False),
    ]  # fmt: skip
    assert runs(tmp_path) == ["speedup 1"] * 3 + ["speedup 2"] * 3  # three fresh processes each


def test_what_raises_and_what_crashes_becomes_a_record(monkeypatch):
    chosen = [one for one in experiments_of("toybroken") if one.claim in ("toybroken/raises", "toybroken/crash")]
    monkeypatch.setattr("assay.experiments.experiments_of", lambda slug: chosen)
    records = verify(["toybroken"], scale="smoke")
    assert [(record.status, record.error) for record in records] == [
        ("failed", "ValueError: the stars are wrong"),
        ("failed", "crashed: SIGABRT"),
    ]
    assert "toy_experiments.py" in records[0].details["process"]["traceback"]
    assert all(record.measured is None for record in records)
    with Store() as store:
        assert store.count() == 2


def test_a_result_that_cannot_be_judged_has_failed(monkeypatch):
    monkeypatch.setattr(runner, "misfit", lambda record: f"no verdict can be computed from {record.measured.median}")
    (record,) = verify(["toy/loss"], scale="smoke")
    assert record.status == "failed"
    assert "the experiment's result is not valid: no verdict can be computed from" in record.error
    assert record.measured is None


@pytest.mark.slow
def test_whatever_breaks_becomes_a_record():
    records = {record.claim.split("/")[1]: record for record in verify(["toybroken"], scale="smoke")}
    told = {what: (record.status, record.error) for what, record in records.items()}
    assert told["raises"] == ("failed", "ValueError: the stars are wrong")
    assert "toy_experiments.py" in records["raises"].details["process"]["traceback"]
    assert told["crash"] == ("failed", "crashed: SIGABRT")
    assert told["hang"][0] == "timeout"
    assert told["memory"][0] == "out of memory"
    assert told["unit"] == ("failed", "the experiment reports a figure in 'bytes', but the claim is in 'x'")
    assert all(record.measured is None for record in records.values())
    with Store() as store:
        assert store.count() == len(records) == 5


def test_what_the_machine_lacks_is_not_run(tmp_path):
    record, _ = verify(["toyneeds"], scale="smoke")
    assert judge(record).verdict is Verdict.NEEDS_HARDWARE
    assert record.needs == ("no_such_flag",)
    assert runs(tmp_path) == []


def test_needs_know_flags_and_cuda(monkeypatch):
    flag = place.here().machine["flags"][0]
    assert place.lacking([flag]) == []
    assert place.lacking([flag, "no_such_flag"]) == ["no_such_flag"]
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place.lacking(["cuda"]) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place.lacking(["cuda"]) == ["cuda"]


def test_resume_measures_only_what_is_not_recorded(tmp_path, monkeypatch):
    first = verify(["toyneeds", "toy/loss"], scale="smoke")
    steps = []
    assert verify(["toy/loss", "toyneeds"], scale="smoke", resume=True, progress=steps.append) == [
        *first[2:],
        *first[:2],
    ]
    assert [step.resumed for step in steps] == [True] * 3

    def changed_place(**changes):
        fields = {name: getattr(here, name) for name in ("fingerprint", "machine", "assay_version", "commit")} | changes
        return lambda: place.Place(**fields)

    here = place.here()
    known = {record.id for record in first}
    monkeypatch.setattr(runner, "here", changed_place(commit="another"))  # the code that ran is the same
    assert verify(["toyneeds", "toy/loss"], scale="smoke", resume=True) == first
    monkeypatch.setattr(hashes, "is_stale", lambda record: not record.needs)
    changed_code = verify(["toyneeds", "toy/loss"], scale="smoke", resume=True)
    assert changed_code[:2] == first[:2]
    assert changed_code[2].id != first[2].id
    monkeypatch.setattr(runner, "here", changed_place(fingerprint="another"))
    assert not known & {record.id for record in verify(["toyneeds"], scale="smoke", resume=True)}
    assert not known & {record.id for record in verify(["toyneeds"], scale="smoke", resume=True, seed=1)}


def test_resume_measures_a_noisy_timing_again_but_no_noisy_figure():
    todo = plan(["toy"], "smoke")
    shared = {"scale": "smoke", "point": {"n": 2}, "fingerprint": place.here().fingerprint}
    with Store() as store:
        quiet = make(**shared)
        store.add([quiet, make(**shared, noisy=True, minutes=1)])
        figure = make(**shared | {"point": {}}, claim="toy/loss", kind="figure", noisy=True)
        store.append(figure)
        assert set(_recorded(todo, store).values()) == {quiet, figure}


def test_without_resume_points_are_measured_again(tmp_path):
    verify(["toyneeds"], scale="smoke")
    verify(["toyneeds"], scale="smoke")
    with Store() as store:
        assert store.count() == 4


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    code = """
import toy_experiments
toy_experiments.install()
from assay.evidence.runner import verify
verify(["toyslow"], scale="smoke", resume=True)
"""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    sweep = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    with Store() as store:
        deadline = time.monotonic() + 90
        while store.count() < 1 and time.monotonic() < deadline:
            assert sweep.poll() is None
            time.sleep(0.05)
        sweep.send_signal(signal.SIGKILL)
        sweep.wait(30)
        kept = store.records()
    assert 1 <= len(kept) < 3
    started = len(runs(tmp_path))
    records = verify(["toyslow"], scale="smoke", resume=True)
    assert [record.point["n"] for record in records] == [0, 1, 2]
    assert all(record in records for record in kept)
    assert len(runs(tmp_path)) == started + 3 - len(kept)


class Backwards(Here):
    """A cluster whose last point is done first."""

    def run(self, jobs, started):
        for number, job in reversed(jobs):
            started(job)
            yield number, job, Outcome(place.here(), "ok", needs=("cuda",))


def test_the_evidence_comes_in_the_order_of_the_plan_in_whichever_order_points_are_done(monkeypatch):
    monkeypatch.setattr(runner, "Here", Backwards)
    done = []
    with Store() as store:
        found = verify(["toyslow", "toyneeds"], scale="smoke", store=store, progress=done.append)
        order = [(job.claim, job.point) for job in plan(["toyslow", "toyneeds"], "smoke").jobs]
        assert len(order) == 5
        assert [(record.claim, record.point) for record in found] == order
        newest = [step.record for step in done if step.record]
        assert newest == found[::-1]
        assert store.records() == newest  # which keeps them in the order in which they came
        more = ["toy", "toyslow", "toyneeds"]
        found = verify(more, scale="smoke", store=store, resume=True)  # what is recorded comes back in its place
    assert [(r.claim, r.point) for r in found] == [(job.claim, job.point) for job in plan(more, "smoke").jobs]


def test_an_interrupt_keeps_what_is_there(tmp_path):
    def interrupt(step):
        if step.done == 1 and step.record is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(["toyslow"], scale="smoke", progress=interrupt)
    with Store() as store:
        assert [record.point["n"] for record in store.records()] == [0]


def test_a_store_that_fails_midway_does_not_end_the_sweep(tmp_path, monkeypatch):
    steps = []
    with Store() as store:
        calls = []

        def full(records):
            calls.append(records)
            if len(calls) == 1:
                raise StoreError("cannot write to the evidence store: disk full")
            return type(store).add(store, records)

        monkeypatch.setattr(store, "add", full)
        with pytest.raises(StoreError, match=r"disk full; the record is kept in .*evidence-unsaved\.jsonl"):
            verify(["toyneeds"], scale="smoke", store=store, progress=steps.append)
        assert len([step for step in steps if step.record is not None]) == 2
        assert store.count() == 1
        monkeypatch.undo()
        assert store.import_jsonl(store.fallback_paths()[0]).added == 1


def test_a_store_that_cannot_be_written_is_told_before_anything_runs(tmp_path, monkeypatch):
    def refuse(self):
        raise StoreError("cannot write to the evidence store: read-only")

    monkeypatch.setattr(Store, "check_writable", refuse)
    with pytest.raises(StoreError, match="read-only"):
        verify(["toyslow"], scale="smoke")
    assert runs(tmp_path) == []


def test_the_plan():
    todo = plan(["toyslow", "toy", "toyplanned", "toy"], "small")
    assert [(job.claim, job.point) for job in todo.jobs] == [("toy/speedup", {"n": 3})]
    assert todo.unavailable == {
        "toyslow/points": "no points at scale small; it has smoke",
        "toy/loss": "no points at scale small; it has smoke",
        "toyplanned": "planned: it has no experiment yet",
    }
    with pytest.raises(InputError, match="scale must be one of smoke, small, full, got 'tiny'"):
        plan(["toy"], "tiny")
    with pytest.raises(InputError, match="no paper is called 'nothing'"):
        plan(["nothing"], "small")


def test_single_claims_can_be_named():
    def planned(*names):
        return [job.claim for job in plan(names, "smoke").jobs]

    assert planned("toy/loss") == ["toy/loss"]
    assert planned("toy/loss", "toy/loss") == ["toy/loss"]
    assert planned("toy/loss", "toy") == planned("toy")
    assert set(planned("toy")) > {"toy/loss"}
    with pytest.raises(InputError, match="no claim is called 'toy/lost'; toy has: .*toy/loss"):
        plan(["toy/lost"], "smoke")
    with pytest.raises(InputError, match="no paper is called 'nothing'"):
        plan(["nothing/loss"], "smoke")


def test_an_experiment_without_its_claim_is_named(monkeypatch):
    monkeypatch.setitem(toy_experiments.PAPERS, "toyneeds", toy_experiments.Paper("toyneeds", ()))
    with pytest.raises(InputError, match="no claim 'toyneeds/gpu', for which toy_experiments has an experiment"):
        plan(["toyneeds"], "smoke")


def test_an_experiment_that_cannot_be_imported_does_not_end_the_sweep(monkeypatch):
    import assay.experiments

    def broken(slug):
        if slug == "toy":
            raise ModuleNotFoundError("No module named 'timm'")
        return experiments_of(slug)

    monkeypatch.setattr(assay.experiments, "experiments_of", broken)
    todo = plan(["toy", "toyneeds"], "smoke")
    assert len(todo.jobs) == 2
    assert todo.unavailable == {"toy": "its experiments cannot be loaded: ModuleNotFoundError: No module named 'timm'"}


def test_nothing_to_verify():
    with pytest.raises(MissingError, match="toyplanned: planned"):
        verify(["toyplanned"], scale="smoke")
    with pytest.raises(MissingError, match="no paper was named"):
        verify([], scale="smoke")


TOY = Operator("toys", free="nothing")
GUARD = Guard("accuracy", 0.05, higher_is_better=True)
CONTROLS = {"deleted": 0.1, "random": 0.2, "rival": 0.3}


def run_here(monkeypatch, function, *, seed=0, seconds=60.0, operator=TOY, guard=None, **more):
    """A point in this process, of an experiment that is one function."""
    found = Experiment("toy/loss", function, {"smoke": [{}]}, operator, "pigs fly", {}, {}, {"smoke": {}}, guard)
    monkeypatch.setattr(point, "experiments_of", lambda slug: [found])
    return point.run_point("toy_experiments", "toy/loss", {}, seed, seconds, **more)


def test_a_scale_bounds_how_long_is_timed(monkeypatch):
    given, real = [], point.compare_many

    def noted(arms, *, rounds, max_seconds):
        given.append(max_seconds)
        return real(arms, rounds=2)

    monkeypatch.setattr(point, "compare_many", noted)
    monkeypatch.setattr(point, "LONGEST", {"small": 5.0})
    for scale in ("small", "full"):
        run_here(monkeypatch, lambda: Trial(lambda: sum(range(99)), lambda: sum(range(99))), scale=scale, seconds=60.0)
    assert given[0] == 5.0
    assert 30.0 < given[1] <= 36.0


def test_a_point_is_repeatable(monkeypatch):
    """The seed is set before the experiment is built."""
    values = []

    def draws():
        import random

        import numpy as np
        import torch

        values.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
        return Figure(2.0, "nats")

    for seed in (0, 0, 1):
        run_here(monkeypatch, draws, seed=seed)
    assert values[0] == values[1] != values[2]


def test_timing_stays_within_the_time_limit(monkeypatch):
    long = Trial(baseline=lambda: time.sleep(0.2), candidate=lambda: time.sleep(0.1), pairs=1000)
    seen = run_here(monkeypatch, lambda: long, seconds=3.0)
    assert 2 <= len(seen["samples"]["candidate"]) < 20


def test_quality_and_details_come_after_the_timing_and_once(monkeypatch):
    order = []
    trial = Trial(
        baseline=lambda: order.append("a"),
        candidate=lambda: order.append("b"),
        quality=lambda: order.append("quality") or Quality(0.5, 0.5, controls=CONTROLS),
        details=lambda: order.append("details") or {"k": 1},
        pairs=6,
    )
    seen = run_here(monkeypatch, lambda: trial, guard=GUARD)
    assert order[-2:] == ["quality", "details"]
    assert order.count("quality") == 1
    assert len(seen["samples"]["candidate"]) == len(seen["samples"][AGAIN]) == 4  # the least in each process
    assert "free" not in seen["samples"]
    order.clear()
    assert "quality" not in run_here(monkeypatch, lambda: trial, guard=GUARD, first=False, rounds=2)
    assert set(order) == {"a", "b"}


def test_a_record_says_which_path_its_operators_took(monkeypatch):
    from assay.methods.core import kernels

    monkeypatch.setattr(kernels, "_ran", Counter())
    assert "paths" not in run_here(monkeypatch, lambda: Figure(2.0, "nats"))["details"]

    def attends():
        kernels.ran("some attention", "kernel")
        return Trial(baseline=lambda: kernels.ran("some attention", "torch"), candidate=int, details={"k": 1}, pairs=2)

    details = run_here(monkeypatch, attends)["details"]
    assert details["paths"]["some attention: kernel"] == 1
    assert details["paths"]["some attention: torch"] >= 4
    assert details["k"] == 1


def test_what_was_declared_must_be_run(monkeypatch):
    exact = Operator("toys", free="nothing", exact="our best")
    with pytest.raises(ValueError, match="does not run the exact baseline"):
        run_here(monkeypatch, lambda: Trial(int, int, pairs=2), operator=exact)
    with pytest.raises(ValueError, match="declares a guard for accuracy and measures no quality"):
        run_here(monkeypatch, lambda: Figure(2.0, "nats"), guard=GUARD)
    with pytest.raises(ValueError, match="measures a quality without having declared a guard"):
        run_here(monkeypatch, lambda: Figure(2.0, "nats", quality=Quality(0.9, 0.9)))
    with pytest.raises(ValueError, match="has no control 'rival'"):
        quality = Quality(0.9, 0.9, controls={"deleted": 0.1, "random": 0.2})
        run_here(monkeypatch, lambda: Figure(2.0, "nats", quality=quality), guard=GUARD)


def test_trained_arms_are_kept(monkeypatch):
    arm = Trained([0.9, 0.8, 0.7], 0.5, "chance", 1e-3, [1e-3, 1e-2], higher_is_better=True)
    seen = run_here(monkeypatch, lambda: Figure(2.0, "nats", trained={"based": arm}))
    assert seen["trained"]["based"]["best"] == 1.0
    assert seen["trained"]["based"]["scores"] == [0.9, 0.8, 0.7]


CLAIM = toy_experiments.Claim


@pytest.mark.parametrize(
    ("claim", "seen", "words"),
    [
        (CLAIM("toy/a", quantity="quality"), {"kind": "trial"}, "times something, but the claim is about quality"),
        (CLAIM("toy/a", form="points"), {"kind": "trial"}, "has the form 'points'"),
        (CLAIM("toy/a"), {"kind": "figure"}, "must return a Trial"),
        (
            CLAIM("toy/a", unit="%", quantity="memory"),
            {"kind": "figure", "unit": "x"},
            "in 'x', but the claim is in '%'",
        ),
        (
            CLAIM("toy/a", quantity="quality"),
            {"kind": "figure", "unit": "x", "controls": {}, "quality": None},
            "no controls",
        ),
        (CLAIM("toy/a", quantity="memory"), {"kind": "figure", "unit": "x", "controls": {}, "quality": None}, ""),
        (CLAIM("toy/a"), {"kind": "trial"}, ""),
    ],
)
def test_a_record_measures_what_its_claim_says(claim, seen, words):
    found = _problem(seen, claim)
    assert words in found
    assert bool(words) == bool(found)


@pytest.mark.parametrize(
    ("form", "higher", "low", "median", "high"),
    [
        ("ratio", True, 1.6, 2.0, 2.5),
        ("ratio", False, 0.4, 0.5, 0.625),
        ("bound", False, 0.4, 0.5, 0.625),
        ("saved", True, 37.5, 50.0, 60.0),
        ("added", True, 60.0, 100.0, 150.0),
    ],
)
def test_a_ratio_of_times_in_the_claims_own_unit(form, higher, low, median, high):
    found = in_claims_unit(Estimate(low=1.6, median=2.0, high=2.5), CLAIM("toy/a", form=form, higher_is_better=higher))
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high))


def test_a_refutation_said_beforehand_is_kept(monkeypatch):
    real = experiments_of("toy")[-1]
    for answer in (True, False):
        chosen = dataclasses.replace(real, refutes=lambda record, answer=answer: answer and record["unit"] == "nats")
        monkeypatch.setattr("assay.experiments.experiments_of", lambda slug, chosen=chosen: [chosen])
        (record,) = verify(["toy/loss"], scale="smoke")
        assert record.refuted is answer
        assert (judge(record).verdict is Verdict.REFUTED) is answer


def combined_of(*processes, noisy=False, trends=(False, False, False)):
    shared = {"cpu": {}, "noisy": noisy, "load_after": 0.0, "warmup": {}}
    return combined(
        [shared | {"samples": p, "trend": t, "details": {}} for p, t in zip(processes, trends, strict=True)]
    )


def test_processes_are_combined_and_the_candidate_is_held_against_itself():
    quiet = {"baseline": [2.0, 2.02, 1.98, 2.0], "candidate": [1.0] * 4, AGAIN: [1.0, 1.01, 0.99, 1.0]}
    seen = combined_of(quiet, quiet, quiet)
    assert seen["ratios"]["baseline"]["median"] == pytest.approx(2.0)
    assert (seen["noisy"], seen["noise"], seen["processes"]) == (False, "", 3)
    assert combined_of(quiet, quiet, quiet, noisy=True)["noise"] == "the machine was busy with other things"
    assert not combined_of(quiet, quiet, quiet, trends=(True, False, False))["noisy"]
    assert "drifted" in combined_of(quiet, quiet, quiet, trends=(True, True, False))["noise"]
    off = quiet | {AGAIN: [1.5, 1.5, 1.5, 1.5]}
    seen = combined_of(off, off, off)
    assert (seen["noisy"], seen["noise"]) == (True, "the candidate differed from itself")


def test_what_is_no_result_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="must return a Trial or a Figure, toy/loss returned float"):
        run_here(monkeypatch, lambda: 3.0)
    with pytest.raises(ValueError, match="the figure must be finite, got nan"):
        run_here(monkeypatch, lambda: Figure(float("nan"), "x"))


def test_a_quality_that_is_not_finite_is_refused(monkeypatch):
    made = Trial(baseline=int, candidate=int, quality=lambda: Quality(float("inf"), 1.0, controls=CONTROLS), pairs=2)
    with pytest.raises(ValueError, match="the quality's candidate must be finite, got inf"):
        run_here(monkeypatch, lambda: made, guard=GUARD)


def git(folder, *arguments):
    call = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_its_dirt(tmp_path):
    package = tmp_path / "src" / "assay"
    package.mkdir(parents=True)
    assert real_commit(package) == ""  # no checkout at all
    (package / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert real_commit(package) == head
    (tmp_path / "notes").write_text("outside of the package")
    assert real_commit(package) == head
    (package / "a.py").write_text("2")
    dirty = real_commit(package)
    assert dirty.startswith(f"{head}-dirty-")
    (package / "b.py").write_text("new")
    assert real_commit(package) not in (dirty, head)
    elsewhere = tmp_path / "venv" / "assay"  # installed inside somebody else's checkout
    elsewhere.mkdir(parents=True)
    assert real_commit(elsewhere) == ""
