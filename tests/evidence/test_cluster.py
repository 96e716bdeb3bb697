"""Sending points to a Ray cluster: machines that are only names, and a real one, started on this machine."""

import os
import sys
from pathlib import Path

import pytest
import toy_experiments
from fake_ray import FakeRay, RayError

from assay.errors import InputError, MissingError
from assay.evidence import cluster, place
from assay.evidence.cluster import RayCluster
from assay.evidence.jobs import Job, Outcome
from assay.evidence.runner import verify
from assay.evidence.store import Store
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toys(monkeypatch, tmp_path):
    toy_experiments.install(monkeypatch)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "runs"))
    yield
    place.here.cache_clear()


def test_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"pip install 'assay\[ray\]'"):
        verify(["toy"], scale="smoke", ray_address="local")


def jobs(*needs):
    return [
        (number, Job(f"toy/{number}", "toys", {"n": number}, number, "smoke", 0, need, 60, 2**30))
        for number, need in enumerate(needs)
    ]


@pytest.fixture
def fake(monkeypatch):
    """A cluster of machines that are only names, at which a point costs nothing."""
    monkeypatch.setattr(cluster, "measure", lambda job: Outcome(place.here(), "ok", seen={"n": job.point["n"]}))
    return lambda machines, **trouble: FakeRay(machines, **trouble).install(monkeypatch)


def test_every_point_is_measured_once_and_machines_take_the_next_when_they_are_free(fake):
    ray, begun = fake({"a": 0, "b": 0}), []
    with RayCluster("auto") as machines:
        assert machines.places == [place.here()] * 2
        found = list(machines.run(jobs(*[()] * 5), begun.append))
    assert not ray.up
    assert sorted(number for number, *_ in found) == list(range(5))
    assert all((outcome.status, outcome.seen) == ("ok", {"n": number}) for number, _, outcome in found)
    assert [job.index for job in begun] == list(range(5))
    assert [name for name, _ in ray.asked] == [
        "a",
        "b",
        "b",
        "b",
        "b",
    ]  # the newest is done first, and a stays at its own


def test_a_cluster_that_runs_already_goes_on_running(fake):
    ray = fake({"a": 0})
    ray.init()
    with RayCluster("auto") as machines:
        assert len(list(machines.run(jobs(()), lambda job: None))) == 1
    assert ray.up


def test_what_needs_a_gpu_waits_for_the_machine_that_has_one(fake):
    ray = fake({"plain": 0, "fast": 1})
    with RayCluster("auto") as machines:
        found = list(machines.run(jobs(("cuda",), (), ("cuda",), ("cuda",)), lambda job: None))
    assert len(found) == 4
    assert sorted((name, job.index) for name, job in ray.asked) == [("fast", 0), ("fast", 2), ("fast", 3), ("plain", 1)]
    ray = fake({"plain": 0})  # nobody has one: the point says itself what it lacks
    with RayCluster("auto") as machines:
        assert len(list(machines.run(jobs(("cuda",)), lambda job: None))) == 1


def test_a_lost_machine_fails_its_point_and_the_others_go_on(fake):
    ray = fake({"a": 0, "b": 0}, lost=["b"])
    with RayCluster("auto") as machines:
        found = {number: outcome for number, _, outcome in machines.run(jobs(*[()] * 4), lambda job: None)}
    assert found[1].status == "failed"
    assert found[1].error == "the machine or its worker was lost: b does not answer"
    assert [found[number].status for number in (0, 2, 3)] == ["ok"] * 3
    assert [name for name, _ in ray.asked] == ["a", "b", "a", "a"]


def test_a_lost_worker_does_not_cost_its_machine(fake):
    ray = fake({"a": 0}, shaken=["a"])
    with RayCluster("auto") as machines:
        found = [outcome.status for _, _, outcome in machines.run(jobs((), ()), lambda job: None)]
    assert found == ["failed", "ok"]
    assert [name for name, _ in ray.asked] == ["a", "a"]


def test_nobody_is_left(fake):
    fake({"a": 0, "b": 0}, lost=["a", "b"])
    found = []
    with pytest.raises(InputError, match="all machines of the Ray cluster were lost"), RayCluster("auto") as machines:
        found.extend(outcome for *_, outcome in machines.run(jobs((), (), ()), lambda job: None))
    assert [outcome.status for outcome in found] == ["failed", "failed"]


def test_machines_without_assay(fake, monkeypatch):
    def missing():
        raise RayError("No module named 'assay'")

    ray = fake({"a": 0})
    monkeypatch.setattr(cluster, "_where", missing)
    with pytest.raises(InputError, match="--ray auto: assay does not run on its machines: No module named 'assay'"):
        RayCluster("auto")
    assert not ray.up


def test_verify_records_what_a_cluster_measured_and_does_not_measure_it_again(fake, monkeypatch):
    monkeypatch.setattr(cluster, "measure", lambda job: Outcome(place.here(), "ok", needs=("cuda",)))
    ray, before = fake({"a": 0, "b": 0}), (Path.cwd(), os.environ.get("PYTHONPATH"))
    records = verify(["toyneeds"], scale="smoke", ray_address="local")
    assert [judge(record).verdict for record in records] == [Verdict.NEEDS_HARDWARE] * 2
    assert [tuple(record.point.values()) for record in records] == [(1,), (2,)]
    assert {record.fingerprint for record in records} == {place.here().fingerprint}
    assert verify(["toyneeds"], scale="smoke", ray_address="local", resume=True) == records
    assert len(ray.asked) == 2
    assert (Path.cwd(), os.environ.get("PYTHONPATH")) == before


@pytest.mark.slow
def test_a_local_cluster(tmp_path, monkeypatch):
    """Points are measured on the cluster, a crash among them; what is recorded is not measured again."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, sys.path)]))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # no commit, whatever is being edited meanwhile
    before = Path.cwd(), [os.environ["PYTHONPATH"], os.environ.get("PYTHONSAFEPATH")]
    records = verify(["toy", "toybroken", "toyneeds"], scale="smoke", ray_address="local")
    told = {
        (record.claim, tuple(record.point.values())): (
            record.status,
            # the verdict on a time says how busy this machine is, nothing about the cluster
            judge(record).verdict if record.status == "ok" and record.claim != "toy/speedup" else None,
        )
        for record in records
    }
    assert told == {
        ("toy/speedup", (1,)): ("ok", None),
        ("toy/speedup", (2,)): ("ok", None),
        ("toy/loss", ()): ("ok", Verdict.REPRODUCED),
        ("toybroken/raises", ()): ("failed", None),
        ("toybroken/crash", ()): ("failed", None),
        ("toybroken/hang", ()): ("timeout", None),
        ("toybroken/memory", ()): ("out of memory", None),
        ("toybroken/unit", ()): ("failed", None),
        ("toyneeds/gpu", (1,)): ("ok", Verdict.NEEDS_HARDWARE),
        ("toyneeds/gpu", (2,)): ("ok", Verdict.NEEDS_HARDWARE),
    }
    assert list(told) == [(record.claim, tuple(record.point.values())) for record in records]
    assert {record.fingerprint for record in records} == {place.here().fingerprint}
    assert records[0].machine["threads"] == int(
        os.environ["OMP_NUM_THREADS"]
    )  # not the one thread that Ray gives a task
    assert len((tmp_path / "runs").read_text().splitlines()) == 6
    assert (Path.cwd(), [os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")]) == before
    with Store() as store:
        assert store.count() == len(records)
    again = verify(["toy"], scale="smoke", ray_address="local", resume=True)
    busy = [record.noisy for record in records[:3]]  # a time taken on a busy machine decides nothing: it is taken again
    assert len((tmp_path / "runs").read_text().splitlines()) == 6 + 3 * sum(busy)
    assert [record for record, noisy in zip(again, busy, strict=True) if not noisy] == [
        record for record, noisy in zip(records, busy, strict=False) if not noisy
    ]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_nobody_at_the_address(address):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    with pytest.raises(InputError, match=f"--ray {address}: cannot reach a Ray cluster there"):
        verify(["toyneeds"], scale="smoke", ray_address=address)
