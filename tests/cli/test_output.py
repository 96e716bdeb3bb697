"""What stands on the terminal: words stay whole at 80 columns, and something is said before anything slow begins."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))

from evidence_maker import estimate, make
from tests.tiny import calibration

from assay.cli import doctor, output
from assay.cli.main import main
from assay.evidence.store import Store

LONG = make(
    claim="pie_positional_integrity/exact-match-loss",
    point={"language": "typescript", "tokens": 4096, "kind": "insertion"},
    measured=estimate(1.234, 2.345, 3.456),
    free_label="computing it anew from the edit on",
    vs_free=estimate(1.1, 1.2, 1.3),
)


def at_80_columns(*words: str) -> str:
    """What a command writes to a real terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    code = "import sys; from assay.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm"}, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait(60) == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def whole_words(narrow: str, wide: str) -> None:
    """No line is too long but where a single word is, and no word was broken."""
    assert set(narrow.split()) - {"..."} <= set(wide.split())
    for line in narrow.splitlines():
        assert len(line) <= 80 or len(line.split()) == 1, line


def plain(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_on_a_real_terminal_of_80_columns(capsys):
    with Store() as store:
        store.add([LONG])
    for words in (["papers"], ["evidence", "list"], ["paper", "pie_positional_integrity"]):
        wide, narrow = plain(capsys, *words), at_80_columns(*words)
        whole_words(narrow, wide)
        assert max(map(len, wide.splitlines())) > 80  # else this would prove nothing
        if words != ["papers"]:
            assert narrow.split() == wide.split()
    assert len(at_80_columns("papers").splitlines()) == 138


@pytest.fixture
def narrow(monkeypatch):
    def switch(columns):
        monkeypatch.setattr(output, "width", lambda: columns)

    return switch


def test_search_and_doctor_at_80_columns(capsys, monkeypatch, narrow):
    monkeypatch.setattr("assay.catalogue.search.model_folder", lambda: None)
    rows = {"machine": {"SIMD": "avx avx2 avx512_bf16 " * 8, "memory": "23 GiB"}, "folders": {"cache": "/x" * 60}}
    monkeypatch.setattr(doctor, "examine", lambda again, say: rows)
    for words in (["search", "long prompts slow on CPU"], ["doctor"]):
        wide = plain(capsys, *words)
        narrow(80)
        text = plain(capsys, *words)
        narrow(None)
        whole_words(text, wide)
        assert text.split() == wide.split()
        assert max(map(len, wide.splitlines())) > 80


@pytest.mark.parametrize("words", [["search", "long prompts"], ["doctor"], ["profile", "x"], ["verify", "xattention"]])
def test_something_is_said_before_torch_is_loaded(words, tmp_path):
    """Loading torch takes seconds; here it fails instead, so that what was said before it is all there is."""
    code = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is loaded", file=sys.stderr, flush=True)
            raise ImportError("torch is not wanted in this test")
sys.meta_path.insert(0, Stop())
from assay.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("assay: ")
    assert "torch is loaded" in lines[1:]


def test_doctor_says_each_step_and_prints_one_document(capsys, monkeypatch):
    monkeypatch.setattr("assay.measure.machine.calibrate", _calibrated)
    monkeypatch.setattr("assay.measure.clock.self_test", lambda: {"passed": True})
    monkeypatch.setattr("assay.methods.core.kernels.names", lambda: ["good", "bad"])
    monkeypatch.setattr("assay.methods.core.kernels.load", _loaded)
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kernels"] == {"good": "ready", "bad": "broken: bad.cpp: no such thing"}
    assert err.splitlines() == [
        "assay: loading torch",
        "assay: calibrating the machine: round 1 of 8",
        "assay: loading the kernel good (built on first use)",
        "assay: loading the kernel bad (built on first use)",
        "assay: testing the clock",
    ]


def _calibrated(force, say):

    say("calibrating the machine: round 1 of 8")
    return calibration()


def _loaded(name):
    if name == "bad":
        raise RuntimeError("bad.cpp:\nno such thing")
    return True
