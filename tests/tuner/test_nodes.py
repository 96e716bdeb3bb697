"""Candidates judged on several machines: side by side, each beside the base on its own, and never on unlike ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.evidence.fake_ray import FakeRay
from tuner_world import Children

from assay.errors import InputError, MissingError
from assay.evidence.place import Place, here
from assay.measure.isolate import ChildResult
from assay.tuner import nodes
from assay.tuner import tune as tuning
from assay.tuner.nodes import Call, RayNodes, alike
from assay.tuner.tune import tune
from assay.tuner.work import Settings

OWN = {"model": "m", "workload": "", "eval": "", "machine": "a with 2 threads"}


def place(fingerprint, version="1", commit="c"):
    return Place(fingerprint, {"ram_bytes": 2**34, "threads": 2}, version, commit)


def test_the_largest_group_of_like_machines_takes_part_and_the_others_are_named():
    places = [place("a"), place("b"), place("a"), place("a", version="2"), place("a"), place("a")]
    found = [OWN, OWN, OWN, OWN, {"error": "no model 'x'"}, OWN | {"model": "other"}]
    chosen, others = alike(places, found, place("b"))
    assert chosen == [0, 2]
    assert [other["reason"].split()[0] for other in others] == ["another", "it", "no", "other"]
    assert alike(places[:2], found[:2], place("b"))[0] == [1]  # of equal groups the one like this machine
    with pytest.raises(InputError, match=r"no machine of the Ray cluster can take part: no model 'x'"):
        alike(places[4:5], found[4:5], place("a"))


class Three(nodes.Here):
    """A cluster of three like machines, that answer in another order than they were asked."""

    count, local = 3, False
    batches: list[list[str]] = []

    def __init__(self, address, settings):
        super().__init__()
        self.batches.clear()
        self.left_out = [{"fingerprint": "x", "reason": "another kind of machine"}]

    def run(self, calls):
        self.batches.append([call.function for call in calls])
        for number in reversed(range(len(calls))):
            yield number, calls[number].run()


class OnNodes(Children):
    """Each machine is as fast as the number of recipes it has measured: only what is measured beside the base can be compared."""

    paired: list[bool] = []

    def calibration(self, settings, quick):
        from assay.measure.machine import calibrate

        return {"limits": calibrate(quick=True).as_dict(), "machine": {"processor": "of the node"}}

    def assess(self, settings, recipe, known, seconds, text, least, base=None, **more):
        found = super().assess(settings, recipe, known, seconds, text, least, **more)
        self.paired.append(base is not None)
        if base is not None:
            speed = 1 + len(self.calls) % 3
            found["samples"] = [speed * sample for sample in found["samples"]]
            found["paired"] = [speed * self.outcome(base)[0]] * len(found["samples"])
        return found


def test_candidates_are_judged_side_by_side_each_beside_the_base(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "RayNodes", Three)
    children = world(OnNodes(takes={"calibration": 1.0}))
    OnNodes.paired.clear()
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=8, ray="auto")
    assert ["assess"] * 3 in Three.batches
    assert ["prove"] in Three.batches  # on one machine
    assert OnNodes.paired[:1] == [False]
    assert all(OnNodes.paired[1:])
    assert outcome.helped
    judged = [row for row in outcome.rows if row.kind == "candidate" and row.cost is not None]
    assert len(judged) >= 3
    for row in judged:  # not the cost on the machine it happened to be on
        assert row.cost == pytest.approx(children.outcome(row.recipe.model_dump(mode="json"))[0])
    document = outcome.document()
    assert document["nodes"][0]["count"] == 3
    assert any("left out: another kind of machine" in note for note in document["notes"])
    assert document["machine"] == {"processor": "of the node"}


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of machines that are only names; what they run only says which it was."""
    monkeypatch.setattr(nodes, "identity", lambda settings: OWN)
    monkeypatch.setattr(
        nodes, "run_isolated", lambda target, arguments, **limits: ChildResult("ok", arguments["n"], "", 1.0, 0, 0.0)
    )
    return lambda *names: FakeRay(dict.fromkeys(names, 0)).install(monkeypatch)


def calls(count):
    return [Call("assess", {"n": n}, 60.0, 2**30) for n in range(count)]


def test_every_call_is_answered_once_whichever_machine_is_free(cluster, model):
    ray = cluster("a", "b")
    with RayNodes("auto", Settings(str(model), "ttft", 64, 4)) as machines:
        assert machines.count == 2
        found = list(machines.run(calls(5)))
        assert [number for number, _ in found] != sorted(number for number, _ in found)  # as they arrive
        assert sorted((number, result.value) for number, result in found) == [(n, n) for n in range(5)]
        assert [(number, result.value) for number, result in machines.run(calls(1))] == [(0, 0)]
    assert not ray.up


def test_a_lost_machine_fails_its_call_and_measures_no_more(cluster, model):
    ray = cluster("a", "b")
    with RayNodes("auto", Settings(str(model), "ttft", 64, 4)) as machines:
        ray.lost.add("b")
        found = dict(machines.run(calls(4)))
        assert [found[n].status for n in range(4)] == ["ok", "failed", "ok", "ok"]
        assert found[1].error == "the machine or its worker was lost: b does not answer"
        assert machines.count == 1
        ray.shaken.add("a")  # loses its worker once, and goes on
        found = dict(machines.run(calls(2)))
        assert [found[n].status for n in range(2)] == ["failed", "ok"]
        ray.lost.add("a")
        with pytest.raises(InputError, match="all machines of the Ray cluster were lost; what was measured is kept"):
            list(machines.run(calls(2)))


def test_ray_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"pip install 'assay\[ray\]'"):
        tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", ray="local")


@pytest.mark.slow
def test_a_local_cluster(model, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # no commit, whatever is being edited meanwhile
    here.cache_clear()
    try:
        settings = Settings(str(model), "ttft", 256, 4)
        outcome = tune(settings, Path(tmp_path / "out"), max_drop=0.5, minutes=6, ray="local")
    finally:
        here.cache_clear()
    assert outcome.document()["judged"] >= 1
    assert (tmp_path / "out" / "recipe.toml").is_file()
