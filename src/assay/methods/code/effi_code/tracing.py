"""What runs inside of the sandbox to see the lines of a program: standard library only, no import of ours.

The interpreter's own tracing tells of every line that is run, in whatever function it stands: nested, asynchronous, a generator, a method.
Time is the thread's processor time between one event and the next, without what the tracing itself takes in Python, and belongs to the
line that ran, not to those that called it. A call into a library or a built-in function belongs to the line of the program that made it.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

NAME = "<profiled>"


def lines_of(program: str, entry: str, calls: Sequence[Sequence[Any]], memory: bool) -> list[list[Any]]:
    """Rows (line, times reached, seconds, bytes kept, most bytes held) of all calls together; the last two are 0 without `memory`."""
    module = type(sys)("profiled")
    sys.modules["profiled"] = module
    exec(compile(program, NAME, "exec", dont_inherit=True), module.__dict__)
    function = module.__dict__.get(entry)
    if not callable(function):
        raise NameError(f"the program defines no function {entry!r}")
    seen = _Seen(memory)
    trace = _tracer(seen)
    for arguments in calls:
        if memory:
            tracemalloc.start()
        seen.begin()
        sys.settrace(trace)
        try:
            if inspect.iscoroutinefunction(function):
                asyncio.run(function(*arguments))
            else:
                function(*arguments)
        finally:
            sys.settrace(None)
            seen.add(time.thread_time())
            if memory:
                tracemalloc.stop()
    return [[line, *row] for line, row in sorted(seen.rows.items()) if line]


class _Seen:
    """Sums by line. Line 0 is whatever is not the program's."""

    def __init__(self, memory: bool) -> None:
        self.rows: dict[int, list[Any]] = {0: [0, 0.0, 0, 0]}
        self.row = self.rows[0]
        self.memory = memory
        self.last, self.held, self.start = 0.0, 0, 0

    def begin(self) -> None:
        self.row = self.rows[0]
        if self.memory:
            self.start = self.held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
        self.last = time.thread_time()

    def add(self, now: float) -> None:
        """What passed since the last event belongs to the line that ran."""
        row = self.row
        row[1] += now - self.last
        if self.memory:
            held, peak = tracemalloc.get_traced_memory()
            row[2] += held - self.held
            row[3] = max(row[3], peak - self.start)

    def go_on(self, line: int) -> None:
        """From here on this line runs."""
        self.row = self.rows.setdefault(line, [0, 0.0, 0, 0])
        if self.memory:
            self.held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
        self.last = time.thread_time()


def _tracer(seen: _Seen) -> Callable[..., Any]:
    clock = time.thread_time

    def local(frame: FrameType, event: str, _: Any) -> Any:
        seen.add(clock())
        if event == "line":
            seen.go_on(frame.f_lineno)
            seen.row[0] += 1
        elif event == "return":  # also where it raises, waits or yields
            caller = frame.f_back
            while caller is not None and caller.f_code.co_filename != NAME:
                caller = caller.f_back
            seen.go_on(caller.f_lineno if caller is not None else 0)
        else:
            seen.go_on(frame.f_lineno)
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local(frame, event, _) if frame.f_code.co_filename == NAME else None

    return trace
