"""The processor's own counter of instructions, read for one process by another: most virtual machines lend none.

if available():
    with Counter(pid) as counter:
        ...
        counter.read()
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Literal

Event = Literal["instructions", "task_clock"]
SYSCALLS = {"x86_64": 298, "aarch64": 241}
"""The number of the call `perf_event_open` by kind of processor."""
EVENTS: dict[Event, tuple[int, int]] = {"instructions": (0, 1), "task_clock": (1, 1)}
"""Type and number of an event. `task_clock`, nanoseconds on a processor, is the system's own and is there without a counter."""
SIZE = 64
"""Of the first form of the description, which every Linux understands."""
TIMES = 1 | 2
"""Read with how long the event was wanted, and how long it was counted."""
INHERIT, NO_KERNEL, NO_HYPERVISOR = 1 << 1, 1 << 5, 1 << 6
CLOSED_ON_EXEC = 1 << 3


class Counter:
    """Counts in a process and in all threads that it starts, in user mode, from when it is made.

    Raises OSError where the system has no such event or does not let us look at the process.
    """

    def __init__(self, pid: int, event: Event = "instructions") -> None:
        kind, number = EVENTS[event]
        flags = INHERIT | NO_HYPERVISOR | (NO_KERNEL if event == "instructions" else 0)
        told = struct.pack("<IIQQQQQIIQ", kind, SIZE, number, 0, 0, TIMES, flags, 0, 0, 0)
        call = SYSCALLS.get(platform.machine())
        if call is None or os.name != "posix":
            raise OSError(f"counters are not read on {platform.machine()}")
        libc = ctypes.CDLL(None, use_errno=True)
        file = libc.syscall(ctypes.c_long(call), told, pid, -1, -1, ctypes.c_ulong(CLOSED_ON_EXEC))
        if file < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"no counter of {event}: {os.strerror(code)}")
        self._file: int | None = file

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Count no longer."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def read(self) -> float | None:
        """What was counted so far; None where the processor's counters were lent to somebody else meanwhile."""
        if self._file is None:
            raise ValueError("the counter is closed")
        count, wanted, counted = struct.unpack("<QQQ", os.read(self._file, 24))
        return float(count) if counted == wanted else None


def available() -> bool:
    """Whether this machine lends a counter of instructions: tried, not just looked for."""
    try:
        with Counter(0) as counter:
            sum(range(1000))
            return (counter.read() or 0) > 0
    except OSError:
        return False
