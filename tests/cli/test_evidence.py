"""`assay evidence list|show|export|import`."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))

from evidence_maker import estimate, make

from assay.cli.evidence import app
from assay.cli.main import main
from assay.errors import InputError
from assay.evidence.store import Store, write_jsonl
from assay.evidence.verdict import judge

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
    shown = json.loads(run("show", record.id, "--json").stdout)
    assert shown == record.model_dump(mode="json") | {"verdict": "reproduced", "reason": judge(record).reason}
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


DEEP = "[" * 5000 + "]" * 5000
LONG = "9" * 6000


def with_field(name, text):
    """A record's line with `text` in the place of a field's value."""
    record = RECORDS[0].model_dump(mode="json", exclude={"id"}) | {name: "@"}
    return json.dumps(record).replace('"@"', text)


NO_RECORDS = {
    "a list": "[]",
    "a number": "1",
    "a long number": LONG,
    "deep nesting": DEEP,
    "deep nesting in an object": f'{{"a": {DEEP}}}',
    "NaN": "NaN",
    "a NUL": "\x00",
    "no UTF-8": b"\xff\xfe",
    "half of a pair": '"\\ud800"',
    "another object": '{"claim": "toy/speedup"}',
    "another version": with_field("schema_version", "99"),
    "a version of another type": with_field("schema_version", '"1"'),
    **{
        f"{name}: {text[:12]}": with_field(name, text)
        for name in (
            "details",
            "machine",
            "point",
            "claim",
            "measured",
            "created",
            "seed",
            "seconds",
            "needs",
            "verdict",
        )
        for text in (DEEP, LONG, "NaN", "1e999", '"\\ud800"', f'{{"a": {DEEP}}}', f'{{"a": {LONG}}}')
    },
}


@pytest.mark.parametrize("what", NO_RECORDS)
def test_import_of_what_is_no_record_is_one_line_and_adds_nothing(tmp_path, capsys, what):
    line = NO_RECORDS[what]
    file = tmp_path / "e.jsonl"
    write_jsonl(RECORDS[:1], file)
    file.write_bytes(file.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    code = main(["evidence", "import", str(file)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"assay: {file}, line 2: ")
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 1000
    assert listed() == []


def test_import_of_what_is_no_file(tmp_path, capsys):
    for path, says in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        assert main(["evidence", "import", str(path)]) == 2
        assert says in capsys.readouterr().err


def test_an_imported_record_cannot_steer_the_terminal():
    with Store() as store:
        store.add([make(point={"x": "\x1b[31mred\n"})])
    assert "x=?[31mred?" in run("list").stdout


def test_export_over_a_folder_is_refused_before_the_store_is_read(tmp_path):
    result = run("export", tmp_path)
    assert isinstance(result.exception, InputError)
    assert "FILE must name a file" in str(result.exception)


def test_import_of_something_else(tmp_path):
    file = tmp_path / "e.jsonl"
    write_jsonl(RECORDS[:1], file)
    file.write_text(file.read_text() + "oops\n")
    result = run("import", file)
    assert isinstance(result.exception, InputError)
    assert "e.jsonl, line 2: not JSON" in str(result.exception)
    assert listed() == []


def test_stale_lists_what_to_measure_again(tmp_path, monkeypatch):
    from assay.evidence import shipped

    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    elsewhere = make(
        claim="other/thing", hashes={}, fingerprint="another machine"
    )  # history: the claim has a fresh record
    shipped.add([make(hashes={}), make(claim="other/thing"), elsewhere], tmp_path)
    (row,) = json.loads(run("stale", "--json").stdout)["stale"]
    assert row["claim"] == "toy/speedup"
    assert row["command"] == "assay verify toy --scale small --into evidence"
    text = run("stale")
    assert "it was made before records held hashes" in text.stdout
    assert "1 of the shipped claims are stale" in text.stderr
