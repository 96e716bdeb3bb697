"""`assay verify`: what it prints, what it writes, and its exit codes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))  # the toy experiments of the runner's tests

import toy_experiments

import assay.cli.verify
from assay.errors import InputError, MissingError
from assay.evidence import place
from assay.evidence.record import changed
from assay.evidence.store import Store, StoreError, read_jsonl

app = typer.Typer()
app.command()(assay.cli.verify.verify)


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    toy_experiments.install(monkeypatch)
    yield
    place.here.cache_clear()


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_one_paper_as_json_and_in_files(tmp_path):
    page, lines = tmp_path / "page.html", tmp_path / "e.jsonl"
    result = run("toy", "--scale", "small", "--json", "--html", page, "--jsonl", lines)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["scale"] == "small"
    (record,) = document["evidence"]
    assert record["claim"] == "toy/speedup"
    assert record["paper_value"] == 5.0
    assert record["measured"]["low"] <= record["measured"]["median"] <= record["measured"]["high"]
    assert record["unit"] == "x"
    assert record["seconds_of"]["baseline"] > 0
    assert record["quality"]["metric"] == "accuracy"
    assert record["verdict"] == ("undecided" if record["noisy"] else "reproduced")  # this machine may be busy
    assert record["scale"] == "small"
    assert document["unavailable"] == {"toy/loss": "no points at scale small; it has smoke"}
    (claim,) = document["claims"]
    assert (claim["verdict"], claim["failed"], claim["decided_by"]) == (record["verdict"], 0, record["id"])
    assert "toy/loss (no points at scale small; it has smoke)" in result.stderr
    assert f"toy/speedup n=3: {record['verdict']}" in result.stderr
    assert [kept.id for kept in read_jsonl(lines)] == [record["id"]]
    assert "toy/speedup" in page.read_text()
    with Store() as store:
        assert store.get(record["id"]).id == record["id"]

    first = run("toy/loss", "--scale", "smoke", "--json")
    again = run("toy/loss", "--scale", "smoke", "--resume", "--json", "--into", tmp_path / "into")
    assert json.loads(again.stdout)["evidence"] == json.loads(first.stdout)["evidence"]
    assert "(recorded before)" in again.stderr
    assert len(read_jsonl(tmp_path / "into" / "claims" / "toy.jsonl")) == 1
    assert (tmp_path / "into" / "machines.json").is_file()


def test_a_plain_log_says_what_came_of_each_point_and_how_long_the_rest_takes(tmp_path, monkeypatch):
    result = run("toyslow", "--scale", "smoke")
    assert result.exit_code == 0
    first, *lines = result.stderr.splitlines()
    assert first == "assay: loading the experiments"
    for number, line in enumerate(lines):
        point, begins = number // 2, number % 2 == 0
        where = rf"\[{point + 1}/3\] toyslow/points n={point}: "
        if begins:
            assert re.fullmatch(where + "measuring, at most 60 s", line)
        else:
            left = "; about \\d+ s left" if point < 2 else ""
            assert re.fullmatch(where + rf"(reproduced|direction holds)( \*)?, {4 + point}x, took \d+ s" + left, line)
    assert len(lines) == 6
    assert "%|" not in result.output  # no library's progress bar
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5340, "89 min"), (5400, "1 h 30 min")]
)
def test_durations(seconds, text):
    assert assay.cli.verify.duration(seconds) == text


def test_resume_tries_again_what_failed_and_keeps_the_rest(tmp_path, monkeypatch):
    """Yesterday's out-of-memory says nothing about today's limit."""
    real = assay.experiments.experiments_of

    def with_limit(gib):
        def found(slug):
            chosen = [e for e in real(slug) if e.claim in ("toybroken/memory", "toyneeds/gpu")]
            return [dataclasses.replace(e, memory_gib=gib, minutes=1) for e in chosen]

        monkeypatch.setattr("assay.experiments.experiments_of", found)

    with_limit(0.4)
    first = json.loads(run("toybroken", "toyneeds", "--scale", "smoke", "--json").stdout)["evidence"]
    assert [record["status"] for record in first] == ["out of memory", "ok", "ok"]
    again = run("toybroken", "toyneeds", "--scale", "smoke", "--json", "--resume")
    records = json.loads(again.stdout)["evidence"]
    assert records[1:] == first[1:]
    assert records[0]["id"] != first[0]["id"]
    assert again.stderr.count("(recorded before)") == 2
    with Store() as store:  # a success stays one, whatever was tried after it
        good = changed(store.get(first[1]["id"]), status="failed", error="later")
        store.append(changed(good, created=good.created + timedelta(hours=1)))
    third = json.loads(run("toyneeds", "--scale", "smoke", "--json", "--resume").stdout)["evidence"]
    assert third == first[1:]


def test_a_folder_of_other_things_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "machines.json").write_text("[]")
    result = run("toyslow", "--scale", "smoke", "--into", tmp_path)
    assert isinstance(result.exception, InputError)
    assert "must be a JSON object" in str(result.exception)
    (tmp_path / "file").write_text("")
    assert "--into must name a folder" in str(run("toyslow", "--scale", "smoke", "--into", tmp_path / "file").exception)


@pytest.mark.parametrize("option", ["--html", "--jsonl"])
def test_output_paths_are_checked_before_anything_is_measured(tmp_path, monkeypatch, option):
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "runs"))
    (tmp_path / "file").write_text("this is no evidence\n")
    for path, says in (
        (tmp_path, "must name a file"),
        (tmp_path / "file" / "below", "is not a folder"),
        ("/dev/full", "must name a regular file"),
        ("/proc/x", "cannot write into"),
        *([(tmp_path / "file", "line 1: not JSON")] if option == "--jsonl" else []),
    ):
        result = run("toyslow", "--scale", "smoke", option, path)
        assert isinstance(result.exception, InputError)
        assert says in str(result.exception)
    assert not (tmp_path / "runs").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import toy_experiments
toy_experiments.install()
from assay.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("as_json", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ctrl_c_says_what_is_kept_and_the_command_that_goes_on(as_json):
    words = ["verify", "toyslow", "--scale", "smoke", *["--json"] * as_json]
    path = os.pathsep.join([str(Path(toy_experiments.__file__).parent), *filter(None, sys.path)])
    sweep = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in sweep.stderr:
        if "[2/3] toyslow/points n=1: measuring" in line:
            break
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    told = f"interrupted; 1 of 3 points are recorded; go on with: assay {' '.join(words)} --resume"
    assert err.strip() == f"assay: {told}"  # what stood before is read above
    assert (json.loads(out) if as_json else out) == ({"error": told, "exit_code": 130} if as_json else "")
    with Store() as store:
        assert [record.point for record in store.records()] == [{"n": 0}]


def test_the_table_and_the_check():
    result = run("toyneeds", "--scale", "smoke", "--check")
    assert result.exit_code == 0
    assert "toyneeds/gpu" in result.stdout
    assert "needs other hardware" in result.stdout
    refuted = run("toyrefuted", "--scale", "smoke", "--check", "--json")
    assert refuted.exit_code == 1
    (record,) = json.loads(refuted.stdout)["evidence"]
    assert record["verdict"] == ("undecided" if record["noisy"] else "refuted here")
    assert "not met: toyrefuted/speedup" in refuted.stderr
    assert run("toyrefuted", "--scale", "smoke", "--resume").exit_code == 0


def test_lines_in_a_pipe_are_not_broken():
    lines = run("toyneeds", "--scale", "smoke").stdout.splitlines()
    assert lines[1] == "needs other hardware: needs no_such_flag, which this machine does not have"
    assert lines[2:4] == ["    n=1: -; needs other hardware", "    n=2: -; needs other hardware"]


def test_a_failed_point_is_not_met(monkeypatch):
    monkeypatch.setattr(
        "assay.experiments.experiments_of",
        lambda slug, real=assay.experiments.experiments_of: [e for e in real(slug) if e.claim == "toybroken/raises"],
    )
    result = run("toybroken", "--scale", "smoke", "--check")
    assert result.exit_code == 1
    assert "ValueError: the stars are wrong" in result.stdout


def test_planned_papers():
    alone = run("toyplanned")
    assert isinstance(alone.exception, MissingError)
    assert "toyplanned (planned: it has no experiment yet)" in str(alone.exception)
    beside = run("toyplanned", "toyneeds", "--scale", "smoke", "--json")
    assert beside.exit_code == 3
    assert len(json.loads(beside.stdout)["evidence"]) == 2
    assert "nothing was measured for toyplanned" in beside.stderr


def test_families_and_all(monkeypatch):
    monkeypatch.setattr(
        toy_experiments, "PAPERS", {slug: toy_experiments.PAPERS[slug] for slug in ("toyneeds", "toyplanned")}
    )
    for words in (("--family", "toys"), ("--all",)):
        result = run(*words, "--scale", "smoke", "--json")
        assert result.exit_code == 0  # a planned paper that nobody named is no error
        assert {record["slug"] for record in json.loads(result.stdout)["evidence"]} == {"toyneeds"}
    assert isinstance(run("--family", "empty").exception, MissingError)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "one of the three"),
        (("toy", "--all"), "one of the three"),
        (("--family", "toys", "--all"), "one of the three"),
        (("--family", "painting"), "--family must be one of toys, empty; got 'painting'"),
        (("toy", "--scale", "tiny"), "scale must be one of smoke, small, full, got 'tiny'"),
        (("nothing",), "no paper is called 'nothing'"),
    ],
)
def test_bad_usage(words, told):
    result = run(*words)
    assert isinstance(result.exception, InputError)
    assert told in str(result.exception)


def test_results_are_shown_even_when_the_store_takes_no_more(monkeypatch):
    def full(self, records):
        raise StoreError("cannot write to the evidence store: disk full")

    monkeypatch.setattr(Store, "add", full)
    result = run("toyneeds", "--scale", "smoke", "--json")
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["evidence"]) == 2
    assert "disk full; the record is kept in" in result.stderr
