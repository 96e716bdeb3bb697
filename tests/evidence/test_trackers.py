"""Evidence as folders of MLflow and of Trackio: the files are those that the libraries document; the libraries read them (slow)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from evidence_maker import estimate, make

from assay.cli.main import main
from assay.errors import InputError
from assay.evidence import trackers
from assay.evidence.reading import Reading
from assay.evidence.store import Store

FAST = make(
    claim="xattention/attention-speedup",
    vs_free=estimate(1.5, 1.6, 1.7),
    point={"tokens": 1024, "tau": 0.9, "kinds": ["a"]},
)
SLOW = make(claim="xattention/attention-speedup", measured=estimate(0.4, 0.5, 0.6), minutes=1)
FAILED = make(claim="svg2/wan-speedup", status="timeout", error="killed after 600 s", minutes=2)
FIGURE = make(
    claim="fit/size",
    kind="figure",
    unit="MB",
    baseline=3.0,
    free=2.5,
    arms={"a b": 1.0, "A B": 2.0},
    controls={"deleted": 9.0},
    minutes=3,
)
EVIL = make(
    claim="../../etc/x\x00/../../y",
    point={"../../../up": "\u202e\x1b[31m", "": 1, ".": 2, "..": 3, "a/b": 4, "x" * 500: "y" * 9000, "é" * 100: None},
    command="line\nbreak: - {yaml} \x85\u2028",
    arms={"/etc/passwd": 1.0},
    seconds=1e308,
    created="0001-01-01T00:00:00Z",
)
RECORDS = (FAST, SLOW, FAILED, FIGURE, EVIL)
FOUND = Reading(RECORDS, imported=frozenset([SLOW.id]))
SAFE = re.compile(r"^[/\w.\- ]*$")  # MLflow's rule for names


def runs_of(folder):
    """An MLflow folder as MLflow reads it: name of the experiment -> id of the run -> its parts."""
    found = {}
    for place in folder.iterdir():
        if not place.is_dir() or place.name == ".trash":
            continue
        facts = yaml.safe_load((place / "meta.yaml").read_text(encoding="utf-8"))
        assert facts["experiment_id"] == place.name
        assert facts["lifecycle_stage"] == "active"
        assert facts["artifact_location"] == place.as_uri()
        runs = found.setdefault(facts["name"], {})
        for run in place.iterdir():
            if not run.is_dir():
                continue
            facts = yaml.safe_load((run / "meta.yaml").read_text(encoding="utf-8"))
            assert (facts["run_id"], facts["run_uuid"], facts["experiment_id"]) == (run.name, run.name, place.name)
            assert facts["start_time"] <= facts["end_time"]
            parts = {"meta": facts}
            for part in ("params", "metrics", "tags"):
                files = [file for file in (run / part).rglob("*") if file.is_file()]
                names = [str(file.relative_to(run / part)) for file in files]
                assert all(SAFE.match(name) and not set(name.split("/")) & {"", ".", ".."} for name in names)
                parts[part] = dict(zip(names, (file.read_bytes().decode() for file in files), strict=True))
            artifacts = Path(unquote(urlsplit(facts["artifact_uri"]).path))
            parts["record"] = (artifacts / "record.json").read_text(encoding="utf-8")
            runs[run.name] = parts
    return found


def value(line):
    at, number, step = line.split()
    assert int(at) >= 0
    assert step == "0"
    return float(number)


def test_a_folder_of_mlflow(tmp_path):
    target = tmp_path / "a b" / "ümläut"
    trackers.export(FOUND, target, "mlflow")
    found = runs_of(target)
    assert set(found) == {"xattention", "svg2", "fit", "_"}
    assert {id for runs in found.values() for id in runs} == {record.id for record in RECORDS}
    run = found["xattention"][FAST.id]
    metrics = {name: value(line) for name, line in run["metrics"].items()}
    assert metrics["attention-speedup/measured"] == 2.0
    assert metrics["attention-speedup/measured low"] == 1.9
    assert metrics["attention-speedup/ratio free"] == 1.6
    assert metrics["attention-speedup/paper"] == 2.0
    assert metrics["attention-speedup/quality deleted"] == 0.5
    assert run["params"]["point.tokens"] == "1024"
    assert run["params"]["point.kinds"] == '["a"]'
    assert run["params"]["claim"] == FAST.claim
    assert run["tags"]["assay.verdict"] == "reproduced"
    assert run["tags"]["assay.by"] == "you"
    assert run["tags"]["mlflow.runName"] == run["meta"]["run_name"]
    assert run["tags"]["mlflow.note.content"].startswith("2x [1.9, 2.1]")
    assert run["meta"]["status"] == 3
    assert run["meta"]["end_time"] - run["meta"]["start_time"] == 1500
    assert run["record"] == FAST.to_json() + "\n"
    assert found["xattention"][SLOW.id]["tags"]["assay.by"] == "imported"
    assert found["xattention"][SLOW.id]["tags"]["assay.verdict"] == "refuted here"
    failed = found["svg2"][FAILED.id]
    assert (failed["meta"]["status"], failed["tags"]["assay.status"]) == (4, "timeout")
    assert failed["tags"]["assay.reason"] == "killed after 600 s"
    figures = {name: value(line) for name, line in found["fit"][FIGURE.id]["metrics"].items()}
    assert (figures["size/arm a b"], figures["size/arm A B 2"]) == (1.0, 2.0)  # on disks that know no case too


def test_nothing_in_a_record_leads_out_of_the_folder(tmp_path):
    for to in trackers.WRITERS:
        trackers.export(Reading((EVIL,)), tmp_path / "in" / to, to)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"mlflow", "trackio"}
    [run] = runs_of(tmp_path / "in" / "mlflow")["_"].values()
    assert len(run["params"][f"point.{'x' * 54}"]) == trackers.LONGEST
    assert run["tags"]["mlflow.source.name"] == EVIL.command
    assert run["meta"]["run_name"].isprintable()
    assert run["meta"]["start_time"] == run["meta"]["end_time"] == 0
    assert all(len(part.encode()) < 255 for name in [*run["params"], *run["metrics"]] for part in name.split("/"))


def test_databases_of_trackio(tmp_path):
    trackers.export(FOUND, tmp_path / "t", "trackio")
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert names == {trackers.SIGN, "xattention.db", "svg2.db", "fit.db", "_.db"}
    with contextlib.closing(sqlite3.connect(tmp_path / "t" / "xattention.db")) as connection:
        rows = connection.execute("SELECT run_name, step, timestamp, metrics FROM metrics ORDER BY id").fetchall()
        configs = dict(connection.execute("SELECT run_name, config FROM configs").fetchall())
    assert [row[1] for row in rows] == [0, 0]
    assert rows[0][0] == f"attention-speedup tokens=1024, tau=0.9, kinds=['a'] small {FAST.id[:8]}"
    assert rows[0][2] == FAST.created.isoformat()
    assert json.loads(rows[0][3])["attention-speedup/measured"] == 2.0
    config = json.loads(configs[rows[0][0]])
    assert config["point.tokens"] == 1024
    assert config["assay.verdict"] == "reproduced"
    assert (config["_Group"], config["_Created"]) == ("attention-speedup", FAST.created.isoformat())
    assert json.loads(configs[rows[1][0]])["assay.by"] == "imported"


@pytest.mark.parametrize("to", trackers.WRITERS)
def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path, to):
    target = tmp_path / "out"
    target.mkdir()
    trackers.export(FOUND, target, to)
    (target / ".trash").mkdir(exist_ok=True)  # MLflow makes it
    trackers.export(Reading((FAST,)), target, to)
    held = [path.name for path in target.iterdir() if path.name not in trackers.BESIDE]
    assert len(held) == 1
    (target / f"{held[0]}-wal").write_text("")
    trackers.export(FOUND, target, to)
    (target / "of mine").mkdir()
    for other in (target, tmp_path):
        with pytest.raises(InputError, match="holds what assay has not written|no earlier export"):
            trackers.export(FOUND, other, to)
    assert (target / "of mine").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="must name a folder"):
        trackers.export(FOUND, tmp_path / "file", to)


@pytest.mark.parametrize("to", trackers.WRITERS)
def test_a_failed_export_leaves_the_old_one(tmp_path, to, monkeypatch):
    trackers.export(FOUND, tmp_path / "out", to)
    before = sorted(str(path) for path in (tmp_path / "out").rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(trackers.WRITERS, to, full)
    with pytest.raises(OSError, match="No space"):
        trackers.export(Reading((FAST,)), tmp_path / "out", to)
    assert sorted(str(path) for path in (tmp_path / "out").rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(tmp_path, capsys):
    with Store() as store:
        store.add([FAST, FAILED])
        store.add([SLOW], imported=True)
    assert main(["evidence", "export", str(tmp_path / "m"), "--to", "mlflow"]) == 0
    said = capsys.readouterr().out
    assert "3 records written" in said
    assert f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {tmp_path / 'm'}" in said
    assert runs_of(tmp_path / "m")["xattention"][SLOW.id]["tags"]["assay.by"] == "imported"
    assert main(["evidence", "export", str(tmp_path / "t"), "--to", "trackio", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"exported": 3, "file": str(tmp_path / "t")}
    for words in (["m", "--to", "wandb"], ["-", "--to", "mlflow"], ["t", "--to", "jsonl"]):
        name = words[0] if words[0] == "-" else str(tmp_path / words[0])
        assert main(["evidence", "export", name, *words[1:]]) == 2


def test_no_record_is_a_folder_too(tmp_path):
    for to in trackers.WRITERS:
        trackers.export(Reading(), tmp_path / to, to)
        assert (tmp_path / to / trackers.SIGN).is_file()


# The libraries themselves, where they are installed: ASSAY_TEST_PACKAGES may name a folder that holds them

BEGIN = """
import json, os, sys
sys.path += filter(None, [os.environ.get("ASSAY_TEST_PACKAGES")])
try:
    import {library}
except ImportError:
    sys.exit(77)
folder = sys.argv[1]
"""


def by_the_library(library, code, folder, **environment):
    call = [sys.executable, "-c", BEGIN.format(library=library) + code, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **environment}, timeout=250)
    if done.returncode == 77:
        pytest.skip(f"{library} is not installed")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_mlflow_reads_it(tmp_path):
    trackers.export(FOUND, tmp_path / "m", "mlflow")
    code = """
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=folder)
found = {}
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        with open(client.download_artifacts(run.info.run_id, "record.json")) as file:
            record = json.load(file)
        info, data = run.info, run.data
        found[info.run_id] = [experiment.name, info.run_name, info.status, data.metrics, data.params, data.tags, record]
print(json.dumps(found))
"""
    found = by_the_library("mlflow", code, tmp_path / "m", MLFLOW_ALLOW_FILE_STORE="true")
    assert set(found) == {record.id for record in RECORDS}
    experiment, name, status, metrics, params, tags, record = found[FAST.id]
    assert (experiment, status) == ("xattention", "FINISHED")
    assert name.startswith("attention-speedup tokens=1024")
    assert metrics["attention-speedup/measured"] == 2.0
    assert params["point.tokens"] == "1024"
    assert tags["assay.verdict"] == "reproduced"
    assert record == json.loads(FAST.to_json())
    assert found[FAILED.id][2] == "FAILED"
    trackers.export(FOUND, tmp_path / "m", "mlflow")  # what MLflow has put there is no hindrance


@pytest.mark.slow
def test_trackio_reads_it(tmp_path):
    trackers.export(FOUND, tmp_path / "t", "trackio")
    code = """
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
found = {}
for project in SQLiteStorage.get_projects():
    for run in Api().runs(project):
        found[run.name] = [project, run.config, SQLiteStorage.get_logs(project, run.name)]
print(json.dumps(found, default=str))
"""
    found = by_the_library("trackio", code, tmp_path / "t", TRACKIO_DIR=str(tmp_path / "t"))
    assert len(found) == len(RECORDS)
    [name] = [name for name in found if name.endswith(FAST.id[:8])]
    project, config, logs = found[name]
    assert project == "xattention"
    assert config["point.tokens"] == 1024
    assert config["assay.verdict"] == "reproduced"
    assert logs[0]["attention-speedup/measured"] == 2.0
    trackers.export(FOUND, tmp_path / "t", "trackio")
