"""`assay evidence list|show|export|import`."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))

from evidence_maker import estimate, make
from tuned_maker import image_line, image_run
from tuned_maker import run as tuned_run

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


# Runs of `assay tune` --------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_runs(filled):
    runs = [tuned_run(minutes=-10), image_run(minutes=9)]
    with Store() as store:
        store.add_runs(runs)
    return runs


def test_runs_are_listed_after_the_records(with_runs):
    found = json.loads(run("list", "--json").stdout)
    assert [(one["id"], one["kind"], one["word"]) for one in found["runs"]] == [
        (with_runs[0].id, "language", "proven"),
        (with_runs[1].id, "images", "proven"),
    ]
    assert len(found["evidence"]) == 3
    text = run("list").stdout
    assert "assay tune, my-classifier, latency: proven" in text
    assert "2x [1.9, 2.1] what is free; accuracy 79.6 % of 400 pictures" in text
    assert "perplexity (prefill) +0.50 % [0.30, 0.70]" in text
    for words in (("--slug", "toy"), ("--status", "timeout")):
        assert json.loads(run("list", "--json", *words).stdout)["runs"] == []


def test_the_newest_are_of_both(with_runs):
    found = json.loads(run("list", "--json", "--last", "2").stdout)
    assert [one["id"] for one in found["evidence"]] == [RECORDS[2].id]
    assert [one["id"] for one in found["runs"]] == [with_runs[1].id]


def test_a_run_is_shown_whole(with_runs):
    language, images = with_runs
    text = run("show", images.id[:10]).stdout
    for words in (
        "my-classifier (resnet)",
        "latency; 670 pictures of my-pictures, 400 of them for the proof",
        "2 ms a picture [1.8, 2.2]",
        "1 point allowed: holds",
        "Run CPU, 2 threads (mine)",
    ):
        assert words in text
    assert "prompts of 4,096 tokens, 32 generated" in run("show", language.id).stdout
    shown = json.loads(run("show", images.id, "--json").stdout)
    assert (shown["pictures"]["total"], len(shown["rows"]), shown["changed"]) == (670, 5, [])


def test_runs_are_exported_and_imported_with_the_records(with_runs, tmp_path, monkeypatch):
    file = tmp_path / "e.jsonl"
    assert json.loads(run("export", file, "--json").stdout) == {"exported": 3, "file": str(file), "runs": 2}
    assert run("export", "-").stdout == file.read_text()
    assert "3 records and 2 runs of assay tune written" in run("export", file).stdout
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "another"))
    assert json.loads(run("import", file, "--json").stdout)["added"] == 5
    assert [one["id"] for one in json.loads(run("list", "--json").stdout)["runs"]] == [one.id for one in with_runs]
    folder = tmp_path / "mlruns"
    assert json.loads(run("export", folder, "--to", "mlflow", "--json").stdout) == {"exported": 3, "file": str(folder)}


def test_the_evidence_of_an_image_artefact_is_imported(tmp_path):
    file = tmp_path / "evidence.jsonl"
    file.write_text(json.dumps(image_line()) + "\n")
    assert run("import", file).stdout == "1 record added, 0 known already\n"
    assert "my-classifier" in run("list").stdout
