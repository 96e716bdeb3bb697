"""`assay evidence list|show|export|import`."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))

from evidence_maker import estimate, make

from assay.cli.evidence import app
from assay.errors import InputError
from assay.evidence.store import Store, write_jsonl

RECORDS = [
    make(details={"density": 0.25}),
    make(claim="other/thing", scale="smoke", measured=estimate(0.5, 0.6, 0.7), minutes=1, point={"x": "[red]"}),
    make(status="timeout", error="killed after 1.0 s", minutes=2),
]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def filled():
    with Store() as store:
        store.add(RECORDS)


def listed(*words):
    result = run("list", "--json", *words)
    assert result.exit_code == 0, result.output
    return [record["id"] for record in json.loads(result.stdout)["evidence"]]


@pytest.mark.usefixtures("filled")
def test_list():
    ids = [record.id for record in RECORDS]
    assert listed() == ids
    assert listed("--slug", "toy") == [ids[0], ids[2]]
    assert listed("--claim", "other/thing") == [ids[1]]
    assert listed("--scale", "smoke") == [ids[1]]
    assert listed("--verdict", "refuted here") == [ids[1]]
    assert listed("--status", "timeout") == [ids[2]]
    assert listed("--last", "2") == ids[1:]
    text = run("list").stdout
    assert "refuted" in text
    assert "[red]" in text
    assert ids[0][:8] in text
    for option in ("--scale", "--verdict", "--status"):
        assert isinstance(run("list", option, "odd").exception, InputError)


def test_list_of_nothing():
    result = run("list")
    assert result.exit_code == 0
    assert "no evidence" in result.stderr
    assert listed() == []


@pytest.mark.usefixtures("filled")
def test_show():
    record = RECORDS[0]
    assert json.loads(run("show", record.id, "--json").stdout) == record.model_dump(mode="json")
    text = run("show", record.id[:8]).stdout
    for words in (
        "toy/speedup (speed-up)",
        "2x [1.9, 2.1]",
        "reproduced",
        "Test CPU, 2 threads",
        "density        0.25",
    ):
        assert words in text
    assert "killed after 1.0 s" in run("show", RECORDS[2].id).stdout
    assert isinstance(run("show", "zzz").exception, InputError)


@pytest.mark.usefixtures("filled")
def test_export_and_import(tmp_path, monkeypatch):
    file = tmp_path / "e.jsonl"
    assert json.loads(run("export", file, "--json").stdout) == {"exported": 3, "file": str(file)}
    assert run("export", "-").stdout == file.read_text()
    assert isinstance(run("export", "-", "--json").exception, InputError)
    assert "3 records written" in run("export", file).stdout
    assert json.loads(run("import", file, "--json").stdout) == {"added": 0, "known": 3, "file": str(file)}
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "another"))
    assert run("import", file).stdout == "3 records added, 0 known already\n"
    assert listed() == [record.id for record in RECORDS]


def test_import_of_something_else(tmp_path):
    file = tmp_path / "e.jsonl"
    write_jsonl(RECORDS[:1], file)
    file.write_text(file.read_text() + "oops\n")
    result = run("import", file)
    assert isinstance(result.exception, InputError)
    assert "e.jsonl, line 2: not JSON" in str(result.exception)
    assert listed() == []
