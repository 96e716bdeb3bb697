"""`assay audit`: from a file or stdin to a verdict, its exit code and its one JSON document."""

from __future__ import annotations

import io
import json
import sys

import pytest

from assay.cli.main import main

FASTER = "before,after\n" + "".join(f"{2 + i / 50},{1 + i / 70}\n" for i in range(8))
NOISE = "before,after\n1.0,1.02\n1.03,1.01\n1.01,0.99\n0.98,1.0\n1.02,1.03\n0.99,0.98\n1.04,1.05\n"
FEW = "before,after\n2,1\n2.1,1\n"


@pytest.fixture
def run(tmp_path, capsys):
    def call(text, *options):
        file = tmp_path / "samples.csv"
        file.write_text(text)
        code = main(["audit", str(file), *options])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "verdict", "code"), [(FASTER, "a difference", 0), (NOISE, "noise", 1), (FEW, "too few to say", 1)]
)
def test_the_exit_code_is_the_verdict_only_with_check(run, text, verdict, code):
    assert run(text)[0] == 0
    got, out, err = run(text, "--check")
    assert (got, err) == (code, "")
    assert f"verdict    {verdict}:" in out
    got, out, _ = run(text, "--check", "--json")
    assert (got, json.loads(out)["verdict"]) == (code, verdict)


def test_the_json_is_the_contract(run):
    _, out, _ = run(NOISE, "--json", "--paired")
    document = json.loads(out)
    assert set(document) == {
        "format", "paired", "before", "after", "ratio", "verdict", "words", "broken", "unseen", "believable",
    }  # fmt: skip
    assert document["paired"] is True
    assert document["before"] == {"name": "before", "n": 7, "median": 1.01}
    assert set(document["ratio"]) == {"median", "low", "high", "n"}


def test_the_text_names_rules_and_what_to_do(run):
    _, out, _ = run("label,value\n" + "old,2\n" * 10 + "new,1\n" * 9)
    assert "read as    CSV, label and value, unpaired" in out
    assert "- interleaved: all samples of one were taken before" in out
    assert "To do: run the two in turn" in out
    assert "- a fine timer" in out
    assert "not visible here: threads" in out


def test_names_choose(run):
    text = "p,q,r\n" + "".join(f"{i},{2 * i},x\n" for i in range(3, 9))
    code, out, err = run(text, "--before", "q", "--after", "p")
    assert code == 0
    assert "baseline   q: median" in out
    code, _, err = run(text)
    assert code == 2
    assert "'x' is no number" in err


def test_stdin_may_hold_the_files_of_two_runs(monkeypatch, capsys):
    def one(values):
        return json.dumps({"results": [{"command": "sleep 1", "times": values, "exit_codes": [0] * len(values)}]})

    text = one([1.0, 1.1, 1.2, 1.05]) + "\n" + one([0.5, 0.6, 0.55, 0.52])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["audit", "-", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["after"]["name"]) == ("hyperfine JSON", "sleep 1 (2)")


def test_bad_input_is_one_line(run, capsys, tmp_path):
    code, out, err = run("before,after\n1,0\n", "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2
    assert err.startswith("assay: 'after', value 1 is 0")
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_names_from_elsewhere_do_not_reach_the_terminal_raw(run):
    _, out, _ = run("\x1b[31mred,after\n" + "1,2\n" * 12)
    assert "\x1b" not in out
