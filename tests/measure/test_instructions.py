"""Counting instructions with what the machine has."""

from __future__ import annotations

import shutil
import subprocess
import sys

import psutil
import pytest

from assay.errors import MissingError
from assay.measure import instructions
from assay.measure.instructions import available_tools, count_instructions

valgrind = pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")


@valgrind
def test_callgrind_repeats_and_grows_with_the_work():
    def count(n):
        return count_instructions(["seq", str(n)], tool="callgrind", timeout_s=60).count

    one, again, more = count(1000), count(1000), count(50_000)
    assert abs(one - again) / one < 0.01
    assert more > one + 49_000 * 10


@valgrind
def test_output_exit_code_and_input_are_the_commands():
    found = count_instructions(["cat"], tool="callgrind", stdin="hello", timeout_s=60)
    assert (found.stdout, found.returncode, found.tool) == ("hello", 0, "callgrind")
    assert count_instructions(["false"], tool="callgrind", timeout_s=60).returncode != 0


@valgrind
def test_callgrind_serves_where_perf_cannot_count(monkeypatch):
    monkeypatch.setattr(instructions, "_perf", lambda command, run: None)
    assert count_instructions(["true"], timeout_s=60).tool == "callgrind"


def test_perf_report_is_read(monkeypatch):
    def run(command, options):
        with open(command[command.index("-o") + 1], "w") as report:
            report.write("# started on ...\n\n123456,,instructions:u,99,100.00,,\n")
        return subprocess.CompletedProcess(command, 0, "out", "")

    monkeypatch.setattr(instructions, "_run", run)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    found = count_instructions(["anything"])
    assert (found.count, found.tool, found.stdout) == (123456, "perf", "out")


def test_perf_without_a_counter_is_missing(monkeypatch):
    def run(command, options):
        with open(command[command.index("-o") + 1], "w") as report:
            report.write("<not supported>,,instructions:u,0,100.00,,\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(instructions, "_run", run)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    with pytest.raises(MissingError, match="perf cannot count"):
        count_instructions(["anything"], tool="perf")


def test_nothing_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None if name in ("perf", "valgrind") else name)
    with pytest.raises(MissingError, match="install valgrind"):
        count_instructions(["true"])
    assert available_tools() == []


@valgrind
def test_tools_found_do_count():
    assert "callgrind" in available_tools()


@valgrind
def test_timeout_kills_the_command_too(tmp_path):
    script = f"echo $$ > {tmp_path}/pid; exec sleep 30"
    with pytest.raises(subprocess.TimeoutExpired):
        count_instructions(["sh", "-c", script], tool="callgrind", timeout_s=2.0)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="command"):
        count_instructions([])
    with pytest.raises(ValueError, match="tool"):
        count_instructions([sys.executable], tool="gdb")
    with pytest.raises(MissingError, match="no-such-command"):
        count_instructions(["no-such-command"])
