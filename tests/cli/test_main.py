"""The contract of the command line: exit codes, one-line errors, one JSON document."""

from __future__ import annotations

import errno
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
        (["papers", "--status", "half"], 2, "measured, code or planned"),
        (["tune", "smollm2-135m", "--goal", "speed"], 2, "--goal must be one of"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--max-drop", "1"], 2, "--max-drop must lie in [0, 1)"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--max-drop", "-0.1"], 2, "--max-drop must lie in [0, 1)"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--minutes", "0"], 2, "--minutes must be positive"),
        (["tune", "smollm2-135m", "--goal", "ttft", "--prompt-tokens", "0"], 2, "--prompt-tokens must be at least 1"),
        (["verify", "nothing-of-the-kind"], 2, "no paper is called"),
        (["search", ""], 2, "empty"),
    ],
)
def test_bad_usage_is_one_line_with_its_code(capsys, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *arguments)
    assert found == code
    *progress, last = err.strip().splitlines()
    assert says in last
    signs = (
        "assay: searching the catalogue",
        "assay: loading the experiments",
        "tuning smollm2-135m for ",
    )  # of life, where it takes long
    assert all(line.startswith(signs) for line in progress)
    assert out == ""


def test_errors_with_json_are_a_document_too(capsys):
    code, out, _ = run(capsys, "paper", "xatention", "--json")
    document = json.loads(out)
    assert code == 2
    assert document["exit_code"] == 2
    assert "xattention" in document["error"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["papers", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        (["paper"], "Missing argument 'slug'"),
        (["evidence", "list", "--last", "0"], "Invalid value for '--last'"),
        (["search", "x", "--limit", "many"], "Invalid value for '--limit'"),
    ],
)
def test_wrong_usage_is_one_line_and_one_document(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1
    code, out, err = run(capsys, *arguments, "--json")
    assert json.loads(out) == {"error": err.removeprefix("assay: ").strip(), "exit_code": 2}


def test_two_forms_of_one_answer_are_refused(capsys):
    assert run(capsys, "papers", "--markdown", "--json")[0] == 2


def test_without_a_command_the_help_is_shown(capsys):
    for words in ([], ["evidence"]):
        code, out, err = run(capsys, *words)
        assert code == 2
        assert "Usage: assay" in out + err
        assert "this is a bug" not in out + err


def test_the_help_names_debug_and_completion(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for option in ("--debug", "--version", "--install-completion", "--show-completion"):
        assert option in out


def test_the_shell_completes_commands_and_options_without_loading_torch():
    code = """
import sys
from assay.cli.main import main
try:
    main()
finally:
    assert not {"torch", "sqlalchemy", "transformers", "rich.progress"} & set(sys.modules), "completion must be quick"
"""

    def completed(line):
        more = {"_ASSAY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **more}, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("assay pap") == ["papers", "paper"]
    assert completed("assay papers --sta") == ["--status"]


BREAKS = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "the disk is full (/x/y): make room"),
    "a full disk, by a library": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        2,
        "the disk is full:",
    ),
    "an unknown user": (RuntimeError("Could not determine home directory."), 2, "no home folder is known for the user"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied: /x"),
    "a missing package": (ModuleNotFoundError("No module named 'x'", name="x"), 3, "pip install x"),
    "a bug": (KeyError("what"), 70, "this is a bug in assay"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted; nothing was left half written"),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("what", BREAKS)
def test_whatever_breaks_is_one_line(capsys, monkeypatch, what, as_json):
    error, code, says = BREAKS[what]

    def broken():
        raise error

    monkeypatch.setattr("assay.catalogue.papers", broken)
    found, out, err = run(capsys, "papers", *["--json"] * as_json)
    assert found == code
    assert says in err
    assert len(err.strip().splitlines()) == 1
    if as_json:
        assert json.loads(out) == {"error": err.removeprefix("assay: ").strip(), "exit_code": code}
    else:
        assert out == ""


@pytest.mark.parametrize("words", [["papers"], ["papers", "--json"], ["nonsense", "--json"]], ids=" ".join)
def test_a_full_disk_under_stdout(words):
    code = "import sys; from assay.cli.main import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "~nosuchuser/model"],
        ["profile", "model", "--html", "~nosuchuser/x"],
        ["verify", "functional_hashing", "--html", "~nosuchuser/x"],
        ["verify", "functional_hashing", "--jsonl", "~nosuchuser/x"],
        ["evidence", "export", "~nosuchuser/x"],
        ["evidence", "import", "~nosuchuser/x"],
    ],
    ids=" ".join,
)
def test_an_unknown_users_home(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "no home folder is known for" in err


def test_stores_that_are_none(capsys, tmp_path, monkeypatch):
    (tmp_path / "evidence.db").write_bytes(b"not a database" * 1000)
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path))
    for words in (["evidence", "list"], ["paper", "xattention"], ["verify", "functional_hashing", "--scale", "smoke"]):
        code, _, err = run(capsys, *words)
        assert code == 2
        assert "is not an SQLite database, or is damaged" in err
    (tmp_path / "evidence.db").unlink()
    (tmp_path / "evidence.db").mkdir()
    code, _, err = run(capsys, "evidence", "list")
    assert code == 2
    assert "cannot open the evidence store" in err
    monkeypatch.setenv("ASSAY_DATABASE_URL", "mysql://x/y")
    assert "must begin with sqlite:// or postgresql://" in run(capsys, "evidence", "list")[2]


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
