"""Costs and answers of programs, honest ones and ones that cheat."""

import os
import tempfile
import threading

import pytest
from tests.tools import needs

from assay.methods.core.programs import workers as room
from assay.methods.core.programs.workers import METERS, Workers
from assay.methods.core.sandbox import Limits, protections

LIMITS = Limits(wall_seconds=20, cpu_seconds=5, memory_mib=300)
BUSY = "sum(i * i for i in range(300_000))"


@pytest.fixture(scope="module")
def timed():
    with Workers("cpu_seconds", limits=LIMITS) as workers:
        yield workers


@pytest.fixture(scope="module")
def counted():
    with Workers("operations", limits=LIMITS) as workers:
        yield workers


def one(workers, program, *args, limits=None, entry="f"):
    [[outcome]] = workers.run(program, entry, [args], limits=limits)
    return outcome


def test_a_function_is_called_and_costs_something(timed):
    few, many = timed.run(
        "def f(n, *, by=1):\n    return sum(range(0, n, by))",
        "f",
        [(10,), (10**6,)],
        keywords=[{}, {"by": 2}],
        repeats=3,
    )
    assert [outcome.value for outcome in few] == [45] * 3
    assert [outcome.value for outcome in many] == [sum(range(0, 10**6, 2))] * 3
    assert all(0 < outcome.cost < 0.02 for outcome in few)
    assert all(outcome.cost > 10 * few[0].cost for outcome in many) or min(o.cost for o in many) > 0.002
    assert not any(outcome.charged for outcome in (*few, *many))


def test_how_programs_end(timed):
    assert one(timed, "def f(): raise OverflowError('big')").error == "OverflowError: big"
    assert one(timed, "def f(): raise SystemExit(0)").state == "raised"
    assert one(timed, "def g(): pass").error.startswith("NameError")
    assert one(timed, "def f(:").error.startswith("SyntaxError")
    assert one(timed, "def f(): return 'a' * 10**9").state == "memory"
    assert one(timed, "import os\ndef f(): os._exit(0)").state == "crashed"
    assert one(timed, "import os\ndef f(): os.kill(os.getpid(), 11)").state == "crashed"
    assert one(timed, "def f(): return object()").error.startswith("TypeError")
    assert one(timed, "while True: pass\ndef f(): pass", limits=Limits(cpu_seconds=0.2)).state == "time"
    assert one(timed, "import time\ndef f(): time.sleep(60)", limits=Limits(wall_seconds=0.3)).state == "time"
    loops = "def f():\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass"
    assert one(timed, loops, limits=Limits(cpu_seconds=0.2)).state == "time"
    assert one(timed, "class E(Exception):\n    def __str__(self): raise E\ndef f(): raise E").error == "E: "
    assert one(timed, "def f():\n    print('x' * 10**6)\n    return input").state == "raised"
    assert all(one(timed, "def f(): return 1").cost is not None for _ in range(2))


def test_a_program_means_what_it_means_outside(timed):
    """No feature of `__future__` is its own that it did not ask for: an annotation that names nothing raises."""
    program = "def f(x: int): return str(f.__annotations__['x'])"
    assert one(timed, program, 1).value == "<class 'int'>"
    assert one(timed, f"from __future__ import annotations\n{program}", 1).value == "int"


def test_a_case_that_failed_is_not_repeated(timed):
    [bad, good] = timed.run("def f(n): return 1 // n", "f", [(0,), (1,)], repeats=3)
    assert [len(bad), len(good)] == [1, 3]


def test_nothing_is_left_for_the_next_run(timed):
    """By what a program could remember: its own globals, the warm process, files, its folder, processes left behind."""
    keeps = """
import os, functools, builtins
@functools.cache
def f(n):
    seen = [hasattr(builtins, "kept"), os.path.exists("/tmp/kept"), os.path.exists("/dev/shm/kept"), os.path.exists("kept")]
    builtins.kept = True
    for name in ("/tmp/kept", "/dev/shm/kept", "kept"):
        try:
            os.mkdir(name)
        except OSError:
            pass
    return seen
"""
    for outcome in timed.run(keeps, "f", [(1,), (1,)], repeats=2):
        assert [o.value for o in outcome] == [[False] * 4] * 2
    leaves = "import os, time\ndef f():\n    if not os.fork():\n        time.sleep(100)\n    return 1"
    assert one(timed, leaves).error.startswith("PermissionError")
    seen = one(timed, "import os\ndef f(): return [p for p in os.listdir('/proc') if p.isdigit()]").value
    assert len(seen) <= 4, seen


def test_a_program_cannot_hide_work_from_its_clock(timed):
    """Wherever it is done: while loading, while answering, in a thread, with the clock changed."""
    honest = one(timed, f"def f(): return {BUSY}")
    assert honest.cost > 0.005
    tricks = {
        "while loading": f"X = {BUSY}\ndef f(): return X",
        "while answering": f"""
import os
old = os.getpid
def slow(frame, event, arg):
    if event == "c_call" and not done:
        done.append({BUSY})
done = []
def f():
    import sys
    sys.setprofile(slow)
    return 1
""",
        "in a thread": f"""
import threading
out = []
def work(): out.append({BUSY})
def f():
    t = threading.Thread(target=work)
    t.start()
    t.join()
    return out[0]
""",
        "with another clock": f"import time\ntime.perf_counter = time.process_time = lambda: 0.0\ndef f(): return {BUSY}",
    }
    for name, program in tricks.items():
        outcome = one(timed, program)
        assert outcome.state == "returned", (name, outcome)
        assert outcome.cost > 0.4 * honest.cost, (name, outcome.cost, honest.cost)
    assert one(timed, tricks["while loading"]).charged


def test_a_program_cannot_reach_the_process_that_starts_it(timed):
    kills = "import os, signal\ndef f():\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 1"
    one(timed, kills)
    assert one(timed, "def f(): return 2").value == 2
    peeks = """
import os
def f():
    try:
        open(f'/proc/{os.getppid()}/mem', 'r+b')
    except OSError:
        return 'no'
    return 'yes'
"""
    assert one(timed, peeks).value == "no"


def test_an_answer_cannot_be_slipped_in_for_another_run(timed):
    """What a program writes to the pipe is its own run's end; the next run's answer is its own."""
    junk = """
import os
def f():
    for pipe in range(3, 64):
        try:
            os.write(pipe, b'\\xff' * 64)
        except OSError: pass
    return 1
"""
    assert one(timed, junk).state in ("crashed", "void", "time")
    assert one(timed, "def f(): return 2").value == 2


def test_operations_are_exact_and_grow_with_the_work(counted):
    [few, many] = counted.run(
        "def f(n):\n    t = 0\n    for i in range(n):\n        t += i\n    return t", "f", [(10,), (1000,)], repeats=3
    )
    assert len({outcome.cost for outcome in few}) == 1
    assert len({outcome.cost for outcome in many}) == 1
    per_turn = (many[0].cost - few[0].cost) / 990
    assert per_turn == int(per_turn) > 0
    blind = one(counted, "def f(): return sorted(range(100000))[0]")
    assert blind.cost < 20


def test_operations_cannot_be_turned_off(counted):
    for trick in (
        "sys.settrace(None)",
        "sys._getframe()",
        "threading.Thread(target=print).start()",
        "gc.get_objects()",
        "next((g := (g.gi_frame for _ in [1])))",
        "sys.addaudithook(print)",
    ):
        outcome = one(counted, f"import sys, threading, gc, os\ndef f():\n    {trick}\n    return 1")
        # a thread does not start at all, which the program meets as an error
        assert outcome.state == ("raised" if "Thread" in trick else "void"), (trick, outcome)
        assert outcome.cost is None
    frames = """
def f():
    try:
        1 // 0
    except ZeroDivisionError as e:
        return e.__traceback__.tb_frame.f_back is None
"""
    assert one(counted, frames).state == "void"


def test_operations_are_counted_by_nothing_that_a_program_can_put_elsewhere(counted):
    """Its own tracing, its own counting, other built-ins, values that work while they are written: each costs what the work costs."""
    work = "sum(i for i in range(3000))"
    honest = one(counted, f"def f(): return {work}")
    assert honest.cost > 3000
    for trick in (
        "import sys\nsys.settrace = lambda *_: None",
        "import __main__\n__main__._Counter = None\n__main__.settrace = lambda *_: None",
        "import struct, os\nos.write = struct.pack = lambda *_: b''",
    ):
        outcome = one(counted, f"{trick}\ndef f(): return {work}")
        assert (outcome.state, outcome.cost) == ("returned", honest.cost), (trick, outcome)
    ran = "ran = []\ndef work(*_):\n    ran.append(1)\n    raise OSError('it ran')\n"
    for lies in (
        "class X(complex):\n    real = property(work)\ndef f(): return X(1)",
        "class X(list):\n    __class__ = property(work)\n    __iter__ = work\ndef f(): return X([1])",
        "import builtins, base64, json\nbuiltins.issubclass = json.encoder.JSONEncoder.encode = work\ndef f(): return 1",
    ):
        outcome = one(counted, ran + lies)
        assert outcome.state == "returned", (lies, outcome)
    assert one(counted, ran + "class X:\n    __class__ = property(work)\ndef f(): return X()").error.startswith(
        "TypeError"
    )


def test_operations_of_loading_count_where_they_are_many(counted):
    table = one(counted, "T = [i * i for i in range(3000)]\ndef f(n): return T[n]", 7)
    assert table.charged
    assert table.cost > 15_000
    outcome = one(counted, "import csv, pprint\nT = [i for i in range(100)]\ndef f(n): return T[n]", 7)
    assert not outcome.charged
    assert outcome.cost < 10
    assert one(counted, "import sys\nsys.settrace(None)\ndef f(): return 1").state == "void"
    starts = "import threading\nthreading.Thread(target=print).start()\ndef f(): return 1"
    assert "can't start new thread" in one(counted, starts).error


@pytest.mark.parametrize("call", ["os.fork()", "os.execv('/bin/true', ['true'])", "os.memfd_create('x')", "clone(17)"])
def test_nothing_is_done_where_no_meter_sees_it(timed, call):
    """The system adds up neither a child that nobody waits for nor what a program was before it became another."""
    start = "import os, ctypes\ndef clone(flags):\n    if ctypes.CDLL(None, use_errno=True).syscall(NUMBER, flags, 0, 0, 0, 0) < 0:"
    start += "\n        raise PermissionError"
    number = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine, 0)
    outcome = one(timed, f"{start}\ndef f():\n    {call}\n    return 1".replace("NUMBER", str(number)))
    assert (outcome.state, outcome.error.split(":")[0]) == ("raised", "PermissionError")


def test_memory_is_what_the_call_held():
    with Workers("peak_bytes", limits=LIMITS) as workers:
        little, much = workers.run(
            "def f(n):\n    return len(bytearray(n)) and sum([0] * (n // 8))", "f", [(1000,), (64 << 20,)]
        )
        forgets = """
import ctypes
def f(n):
    held = bytearray(n)
    del held
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    open('/proc/self/clear_refs', 'w').write('5')
"""
        assert "Read-only" in one(workers, forgets, 64 << 20).error
    assert little[0].cost < 2 << 20
    assert 60 << 20 < much[0].cost < 160 << 20


def test_instructions_are_those_of_the_call_and_no_trick_hides_them():
    needs("valgrind")
    with Workers("instructions", limits=LIMITS, packages=False) as workers:
        honest = one(workers, "def f(n):\n    return sum(i * i for i in range(n))", 20_000)
        again = one(workers, "def f(n):\n    return sum(i * i for i in range(n))", 20_000)
        assert honest.value == sum(i * i for i in range(20_000))
        assert 1e6 < honest.cost < 1e8
        assert abs(honest.cost - again.cost) < 0.02 * honest.cost
        writes = """
import os
def f(n):
    for p in range(3, 2000):
        try: os.write(p, b'==1== Collected : 5\\n==1== Collected : -99999999\\n')
        except OSError: pass
    return sum(i * i for i in range(n))
"""
        lying = one(workers, writes, 20_000)  # it also writes into its own answer, which is then none
        assert lying.cost is None or lying.cost > honest.cost
        assert one(workers, "def f(n): return 1 // n", 0).state == "raised"
        assert one(workers, "import os\ndef f(n): os._exit(0)", 0).state == "crashed"
        assert one(workers, "x = '\ud800'\ndef f(n): return n", 0).state == "raised"


def test_a_long_answer_costs_no_more_than_the_call():
    needs("valgrind")
    with Workers("instructions", limits=LIMITS, packages=False) as workers:
        outcome = one(workers, "def f(n):\n    return [i * i for i in range(n)]", 2000)
        assert 20_000 < outcome.cost < 5e6


def test_the_warm_process_outlives_the_limit_of_a_run(timed):
    """Forking costs processor time too: that of all runs together is no run's."""
    limits = Limits(wall_seconds=20, cpu_seconds=0.05, memory_mib=300)
    with Workers("operations", limits=limits) as workers:
        outcomes = [one(workers, "def f(n): return n", n, limits=limits) for n in range(400)]
        assert {outcome.state for outcome in outcomes} == {"returned"}
        process = workers._idle.get()
        workers._idle.put(process)
        with open(f"/proc/{process._zygote}/limits") as file:
            assert "86401" in next(line for line in file if "cpu time" in line)


def test_several_threads_share_the_processes():
    with Workers("cpu_seconds", limits=LIMITS, count=2) as workers:
        found = {}
        jobs = [
            threading.Thread(target=lambda n=n: found.update({n: one(workers, "def f(n): return n * n", n).value}))
            for n in range(6)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert found == {n: n * n for n in range(6)}
    with pytest.raises(ValueError, match="closed"):
        workers.run("def f(): pass", "f", [()])
    with pytest.raises(ValueError, match="closed"), workers._process():  # one that saw them open and then had to wait
        pass


FORGES = """
import os, struct, sys, time
def own():
    frame = sys._getframe()
    while "mark" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals
def put(kind, data=b""):
    os.write(own()["send"], struct.pack("<I16sc", len(data), own()["mark"], kind) + data)
"""


def test_no_message_of_a_program_harms_who_reads_it(timed):
    value = (
        FORGES
        + "def f():\n    put(b'D')\n    put(b'V', bytes(16) + b'{\"f\":1' + b'0' * 400 + b'}')\n    time.sleep(9)"
    )
    assert one(timed, value).state == "void"
    assert one(timed, "def f(): return 1").value == 1  # of which it left a message unread
    other = FORGES + "def f():\n    put(b'L')\n    time.sleep(9)"
    assert one(timed, other).state == "void"
    assert one(timed, FORGES + "def f():\n    put(b'D')\n    put(b'X', b'0')\n    time.sleep(9)").state == "crashed"
    assert one(timed, "def f(): return 1").value == 1
    ends = "import os, threading, time\ndef f():\n    threading.Thread(target=lambda: (time.sleep(0.0015), os._exit(0))).start()"
    for _ in range(6):
        assert one(timed, ends).state in ("returned", "crashed")


def test_time_passes_also_while_a_program_writes_without_an_end_or_does_not_read(timed):
    short = Limits(wall_seconds=0.4, cpu_seconds=5, memory_mib=300)
    floods = FORGES + "while True:\n    os.write(own()['send'], bytes(21))\n    time.sleep(0.0002)\ndef f(): pass"
    assert one(timed, floods, limits=short).state == "time"
    deaf = FORGES + "put(b'L')\ntime.sleep(60)\ndef f(x): pass"
    assert one(timed, deaf, "x" * 10**6, limits=short).state == "time"
    assert one(timed, "def f(): return 1").value == 1


def test_what_is_interrupted_leaves_nothing_behind(monkeypatch, tmp_path):
    def left():
        return len(os.listdir("/proc/self/fd")), list(tmp_path.iterdir())

    protections()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = left()
    monkeypatch.setattr(room._Process, "_message", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with Workers() as workers, pytest.raises(KeyboardInterrupt) as caught:
        one(workers, "def f(): return 1")
    assert left() == before, caught  # the traceback keeps what was not closed


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="meter must be one of 'cpu_seconds'"):
        Workers("seconds")
    with Workers() as workers:
        with pytest.raises(ValueError, match="plain values"):
            workers.run("def f(x): pass", "f", [(object(),)])
        with pytest.raises(ValueError, match="repeats"):
            workers.run("def f(x): pass", "f", [(1,)], repeats=0)
        with pytest.raises(ValueError, match="keywords"):
            workers.run("def f(x): pass", "f", [(1,)], keywords=[])


def test_a_count_is_that_of_whole_lines():
    assert room.counted(b"==1== Collected : 120\n==2== Collected : 3\n") == 123
    assert room.counted(b"==1== Collected : -5\n==2== Collected : 120\n") == 120
    assert room.counted(b"==1== Collected : 5==2== Collected : 120\n") is None
    assert room.counted(b"") is None


def test_every_meter_says_what_it_does_not_see():
    assert set(METERS) == {"cpu_seconds", "hardware_instructions", "instructions", "operations", "peak_bytes"}
    assert all(meter.how and meter.blind and meter.unit for meter in METERS.values())
    assert "operations" in room.available_meters()
