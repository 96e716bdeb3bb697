"""Sending points to a Ray cluster: a real one, started on this machine."""

import os
import sys
from pathlib import Path

import pytest
import toy_experiments

from assay.errors import InputError, MissingError
from assay.evidence import place
from assay.evidence.runner import verify
from assay.evidence.store import Store
from assay.evidence.types import Verdict

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


def test_a_local_cluster(tmp_path, monkeypatch):
    """Points are measured on the cluster, a crash among them; what is recorded is not measured again."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, sys.path)]))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # no commit, whatever is being edited meanwhile
    before = Path.cwd(), [os.environ["PYTHONPATH"], os.environ.get("PYTHONSAFEPATH")]
    records = verify(["toy", "toybroken", "toyneeds"], scale="smoke", ray_address="local")
    told = {(record.claim, tuple(record.point.values())): (record.status, record.verdict) for record in records}
    assert told == {
        ("toy/speedup", (1,)): ("ok", Verdict.REPRODUCED),
        ("toy/speedup", (2,)): ("ok", Verdict.REPRODUCED),
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
    assert records[0].machine["threads"] == place.here().machine["threads"]  # not the one thread that Ray gives a task
    assert len((tmp_path / "runs").read_text().splitlines()) == 2
    assert (Path.cwd(), [os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")]) == before
    with Store() as store:
        assert store.count() == len(records)
    again = verify(["toy"], scale="smoke", ray_address="local", resume=True)
    assert len((tmp_path / "runs").read_text().splitlines()) == 2
    assert again == records[:3]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_nobody_at_the_address(address):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    with pytest.raises(InputError, match=f"--ray {address}: cannot reach a Ray cluster there"):
        verify(["toyneeds"], scale="smoke", ray_address=address)
