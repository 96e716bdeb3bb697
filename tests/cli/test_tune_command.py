"""What `assay tune` says before the heavy imports, and the command it gives to go on with."""

from __future__ import annotations

import shlex
import sys
import time
import types

import pytest

from assay.cli.main import main


def test_something_is_said_before_torch_is_imported(capsys, monkeypatch):
    said = []

    def tune(*_, **__):
        raise KeyboardInterrupt("3 measurements are kept in .x.journal.jsonl")

    def heavy(name):
        """Importing takes a while."""
        if name != "tune":
            raise AttributeError(name)
        shown = ""
        while "tuning" not in shown:
            time.sleep(0.01)
            shown += capsys.readouterr().err
        said.append(shown)
        return tune

    monkeypatch.setattr("assay.cli.tune.SOON", 0.0)
    stub = types.ModuleType("assay.tuner.tune")
    stub.__getattr__ = heavy
    monkeypatch.setitem(sys.modules, "assay.tuner.tune", stub)
    code = main(["tune", "smollm2-135m", "--goal", "ttft", "--ray", "auto"])
    assert "tuning smollm2-135m for ttft in 10 minutes" in said[0]
    assert code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "assay: interrupted; 3 measurements are kept in .x.journal.jsonl; go on with: assay tune smollm2-135m "
    )
    words = shlex.split(last.split("go on with: ")[1])
    assert words[-3:] == ["--ray", "auto", "--resume"]


@pytest.mark.parametrize("value", ["-4", "nan", "inf", "0"])
def test_a_memory_limit_that_makes_no_sense_is_one_line(capsys, value):
    assert main(["tune", "smollm2-135m", "--goal", "ttft", "--memory-gib", value]) == 2
    assert "assay: --memory-gib must be a finite number above 0" in capsys.readouterr().err


def test_an_evaluation_that_cannot_be_is_one_line_before_anything_is_measured(capsys, tmp_path):
    command = ["tune", "smollm2-135m", "--goal", "ttft", "-o", str(tmp_path / "out"), "--eval"]
    assert main([*command, str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file; a task of lm-eval is named lm_eval:TASK" in capsys.readouterr().err
    assert main([*command, "lm_eval:../x"]) == 2
    assert "the name of a task is letters" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
