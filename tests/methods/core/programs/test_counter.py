import contextlib
import os
import subprocess
import sys
import time

import pytest

from assay.errors import MissingError
from assay.methods.core.programs import counter, workers
from assay.methods.core.programs.counter import Counter, available
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits

BUSY = """import sys, time
sys.stdin.readline()
end = time.process_time() + 0.2
while time.process_time() < end: pass
print(flush=True)
sys.stdin.readline()"""


def test_another_process_is_counted_while_it_works_and_not_while_it_waits():
    """By the system's own event, which needs no counter of the processor: the way there is the same."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=-1, stdout=-1, text=True) as process:
        try:
            clock = Counter(process.pid, "task_clock")
        except PermissionError:
            process.kill()
            pytest.skip("this system lets nobody look at events")
        with clock:
            time.sleep(0.3)  # it starts
            before = clock.read()
            time.sleep(0.05)
            assert clock.read() == before
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            assert 0.19e9 < clock.read() - before < 0.6e9
        process.communicate("\n")
        with pytest.raises(ValueError, match="closed"):
            clock.read()


def test_without_a_counter_it_says_which_meter_to_take(monkeypatch):
    monkeypatch.setattr(counter, "available", lambda: False)
    with pytest.raises(MissingError, match="valgrind"):
        Workers("hardware_instructions")
    monkeypatch.setattr(counter, "SYSCALLS", {})
    assert not available()


def test_the_call_alone_is_counted_where_there_is_a_counter(monkeypatch):
    """Where there is none, the system's clock stands for it: a unit of time instead of instructions, taken in the same way."""
    if not available():
        with contextlib.suppress(PermissionError):
            Counter(0, "task_clock").close()
            monkeypatch.setattr(counter, "available", lambda: True)
            monkeypatch.setattr(workers.counter, "Counter", lambda pid: Counter(pid, "task_clock"))
    program = "x = sum(range(3_000_000))\ndef f(n): return sum(range(n))"
    with Workers("hardware_instructions", limits=Limits(cpu_seconds=10), packages=False) as bench:
        [[little], [much]] = bench.run(program, "f", [(1_000,), (3_000_000,)])
    assert little.state == much.state == "returned", (little, much)
    assert 0 < little.cost < 0.2 * much.cost  # what it did while it was loaded is none of it


def test_a_counter_that_was_lent_to_somebody_else_gives_no_cost(monkeypatch):
    class Lent:
        def __init__(self, pid):
            assert os.path.exists(f"/proc/{pid}")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return None

    monkeypatch.setattr(counter, "available", lambda: True)
    monkeypatch.setattr(workers.counter, "Counter", Lent)
    with Workers("hardware_instructions", packages=False) as bench:
        [[outcome]] = bench.run("def f(n): return n", "f", [(1,)])
    assert (outcome.state, outcome.cost) == ("void", None)
