"""The contract of the command line: exit codes, one-line errors, one JSON document."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from assay.cli.main import main


def run(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_papers_lists_all_and_says_how_many_work(capsys):
    code, out, err = run(capsys, "papers")
    assert code == 0
    assert len(out.splitlines()) == 138
    assert "138 papers" in err


def test_papers_json_is_the_contract(capsys):
    code, out, _ = run(capsys, "papers", "--json", "--family", "attention")
    rows = json.loads(out)
    assert code == 0
    assert {row["family"] for row in rows} == {"attention"}
    assert all(set(row) == {"slug", "title", "family", "status"} for row in rows)
    assert {"xattention", "sageattention2"} <= {row["slug"] for row in rows}


def test_paper_card(capsys):
    code, out, _ = run(capsys, "paper", "xattention")
    assert code == 0
    for part in ("XAttention", "xattention/attention-speedup", "from assay.methods.attention import xattention"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["paper", "xatention"], 2, "did you mean xattention"),
        (["papers", "--family", "nothing"], 2, "--family must be one of"),
        (["papers", "--status", "half"], 2, "works or planned"),
        (["tune", "smollm2-135m", "--goal", "speed"], 2, "--goal must be one of"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--max-drop", "1"], 2, "--max-drop must lie in [0, 1)"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--max-drop", "-0.1"], 2, "--max-drop must lie in [0, 1)"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--minutes", "0"], 2, "--minutes must be positive"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--prompt-tokens", "0"], 2, "--prompt-tokens must be at least 1"),
        (["verify", "nothing-of-the-kind"], 2, "no paper is called"),
        (["search", ""], 2, "empty"),
    ],
)
def test_bad_usage_is_one_line_with_its_code(capsys, tmp_path, arguments, code, says):
    os.chdir(tmp_path)
    found, out, err = run(capsys, *arguments)
    assert found == code
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert out == ""


def test_errors_with_json_are_a_document_too(capsys):
    code, out, _ = run(capsys, "paper", "xatention", "--json")
    document = json.loads(out)
    assert code == 2
    assert document["exit_code"] == 2
    assert "xattention" in document["error"]


def test_unknown_option_is_bad_usage(capsys):
    assert run(capsys, "papers", "--nonsense")[0] == 2
    assert run(capsys, "nonsense")[0] == 2


def test_debug_shows_the_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "assay", "paper", "nope", "--debug"], capture_output=True, text=True, check=False
    )
    assert "Traceback" in done.stderr
    assert "InputError" in done.stderr


def test_version(capsys):
    import assay

    code, out, _ = run(capsys, "--version")
    assert (code, out.strip()) == (0, assay.__version__)
