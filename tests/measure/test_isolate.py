"""A child process may do anything; the parent always gets an answer, and nothing is left behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from assay.measure import isolate
from assay.measure.isolate import run_isolated

MIB = 2**20
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the child gets our search path


def run(name, kwargs=None, **limits):
    return run_isolated(f"child_targets:{name}", kwargs, **{"timeout_s": 30, **limits})


def gone(pid: int, seconds: float = 5.0) -> bool:
    """True once the process has ended (a zombie has ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def wait_for(file: Path, seconds: float = 20.0) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{file} did not appear")


def test_result_comes_back_and_is_not_what_was_printed():
    found = run("add", {"a": 1, "b": 2.5})
    assert (found.status, found.value, found.error, found.ok) == ("ok", 3.5, "", True)
    assert found.output == "this is not the result\n"
    assert 0 < found.work_seconds < found.seconds


def test_not_a_number_survives_the_journey():
    assert math.isnan(run("add", {"a": math.nan, "b": 1}).value)


def test_exception_is_one_line_and_a_traceback():
    found = run("fails")
    assert (found.status, found.value) == ("failed", None)
    assert found.error == "KeyError: 'the missing thing'"
    assert 'raise KeyError("the missing thing")' in found.traceback


def test_result_that_is_not_json_fails():
    found = run("not_json")
    assert found.status == "failed"
    assert "JSON" in found.error


def test_missing_module_and_function_fail():
    assert "no_such_module" in run_isolated("no_such_module:f", timeout_s=30).error
    assert "no_such_function" in run("no_such_function").error


def test_early_exit_fails():
    found = run("leaves")
    assert found.status == "failed"
    assert found.error  # SystemExit is no result


def test_crash_is_named_and_its_stack_kept():
    found = run("segfaults")
    assert (found.status, found.error) == ("failed", "crashed: SIGSEGV")
    assert "segfaults" in found.traceback


def test_timeout_kills():
    start = time.monotonic()
    found = run("sleeps", timeout_s=1.0)
    assert found.status == "timeout"
    assert "1." in found.error
    assert time.monotonic() - start < 10


def test_memory_limit_kills():
    found = run("eats", {"mebibytes": 600, "pause": 30}, memory_bytes=200 * MIB)
    assert found.status == "out of memory"
    assert found.peak_rss_bytes > 200 * MIB
    assert found.seconds < 20


def test_memory_of_grandchildren_counts_and_they_are_killed_too(tmp_path):
    file = tmp_path / "pid"
    found = run("has_child_that_eats", {"mebibytes": 600, "file": str(file)}, memory_bytes=300 * MIB)
    assert found.status == "out of memory"
    assert gone(int(file.read_text()))


@pytest.mark.parametrize("own_session", [False, True])
def test_nothing_is_left_behind(tmp_path, own_session):
    file = tmp_path / "pid"
    found = run("leaves_a_child_behind", {"file": str(file), "own_session": own_session})
    assert found.ok
    assert gone(int(file.read_text()))


@pytest.mark.parametrize("name", ["memory_error", "torch_allocation"])
def test_failed_allocations_are_out_of_memory(name):
    assert run(name).status == "out of memory"


def test_kill_by_the_kernel_is_recognised(monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr(isolate, "_kernel_kills", lambda: next(counts))
    found = run("killed")
    assert found.status == "out of memory"
    assert "kernel" in found.error


def test_kill_by_somebody_else_is_a_failure(monkeypatch):
    monkeypatch.setattr(isolate, "_kernel_kills", lambda: 3)
    assert run("killed").error == "crashed: SIGKILL"


def test_peak_memory_is_seen_even_if_short():
    """Faster than any polling: the child reads its own high-water mark."""
    small, large = run("eats", {"mebibytes": 1}), run("eats", {"mebibytes": 300})
    assert 290 * MIB < large.peak_rss_bytes - small.peak_rss_bytes < 330 * MIB
    assert 5 * MIB < small.start_rss_bytes <= small.peak_rss_bytes


def test_peak_memory_is_not_the_parents():
    block = bytearray(b"x") * (400 * MIB)
    assert run("eats", {"mebibytes": 1}).peak_rss_bytes < 200 * MIB
    del block


def test_the_peak_is_the_childs_own_where_nobody_looked(monkeypatch):
    monkeypatch.setattr(isolate, "POLL_SECONDS", 25.0)
    found = run("eats", {"mebibytes": 300})
    assert 300 * MIB < found.peak_rss_bytes < 400 * MIB
    assert found.start_rss_bytes < 100 * MIB


def test_the_peak_is_the_familys_where_that_is_higher():
    """What a grandchild holds is in no figure of the child's own."""
    found = run("has_child_that_holds", {"mebibytes": 200, "seconds": 2.0})
    assert found.ok
    assert found.value < 100 * MIB
    assert found.peak_rss_bytes > 200 * MIB


def test_what_was_used_until_the_child_was_killed_is_known(monkeypatch):
    found = run("spins", {"seconds": 60.0}, timeout_s=2.0)
    assert found.status == "timeout"
    assert found.cpu_seconds > 0.1
    assert found.peak_rss_bytes > 5 * MIB


def test_of_a_crash_that_nobody_saw_nothing_is_known(monkeypatch):
    monkeypatch.setattr(isolate, "POLL_SECONDS", 25.0)
    found = run("killed")
    assert not found.ok
    assert (found.peak_rss_bytes, found.start_rss_bytes, found.cpu_seconds, found.work_seconds) == (0, 0, 0.0, 0.0)


def test_processor_seconds_are_the_childs_own_where_nobody_looked(monkeypatch):
    monkeypatch.setattr(isolate, "POLL_SECONDS", 25.0)
    assert 0.3 <= run("spins", {"seconds": 0.3}).cpu_seconds < 5


def test_processor_seconds():
    found = run("spins", {"seconds": 0.3})
    assert 0.3 <= found.cpu_seconds < 5


def test_environment_is_passed_on():
    assert run("environment", {"name": "ASSAY_TEST"}, environment={"ASSAY_TEST": "yes"}).value == "yes"


# a shell's background job ignores SIGINT, and so would what it starts
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {here!r})
from assay.measure.isolate import run_isolated
run_isolated("child_targets:writes_pid_and_sleeps", {{"file": {file!r}}}, timeout_s=60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_child_ends_with_its_parent(tmp_path, number):
    if number != signal.SIGINT and not sys.platform.startswith("linux"):
        pytest.skip("the kernel tells of a parent's death on Linux only")
    file = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(here=str(HERE), file=str(file))], stderr=subprocess.DEVNULL
    )
    pid = wait_for(file)
    os.kill(parent.pid, number)
    parent.wait(20)
    assert gone(pid)


@pytest.mark.parametrize(
    ("target", "limits", "error", "message"),
    [
        ("no colon", {}, ValueError, "target"),
        ("module:", {}, ValueError, "target"),
        ("a:b", {"timeout_s": 0}, ValueError, "timeout_s"),
        ("a:b", {"memory_bytes": -1}, ValueError, "memory_bytes"),
    ],
)
def test_bad_arguments_are_named(target, limits, error, message):
    with pytest.raises(error, match=message):
        run_isolated(target, **limits)
    with pytest.raises(TypeError, match="kwargs"):
        run_isolated("a:b", {"x": object()})


def test_a_killed_runs_folder_goes_at_the_next_start_and_a_living_runs_stays(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def start(name):
        file = tmp_path / name
        code = PARENT.format(here=str(HERE), file=str(file))
        parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        wait_for(file)
        return parent

    killed = start("killed")
    (left,) = scratch.glob("assay-child-*")
    living = start("living")
    (kept,) = set(scratch.glob("assay-child-*")) - {left}
    killed.kill()
    killed.wait(20)
    assert left.is_dir()
    assert run("add", {"a": 1, "b": 2}).ok
    assert list(scratch.glob("assay-child-*")) == [kept]
    living.send_signal(signal.SIGINT)
    living.wait(20)
    assert list(scratch.glob("assay-child-*")) == []
