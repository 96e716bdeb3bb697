"""What the tests run in child processes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def add(a: float, b: float) -> float:
    print("this is not the result")
    return a + b


def fails() -> None:
    raise KeyError("the missing thing")


def not_json() -> Any:
    return object()


def leaves() -> None:
    sys.exit(3)


def sleeps(seconds: float = 60.0) -> None:
    time.sleep(seconds)


def segfaults() -> None:
    ctypes.string_at(0)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def memory_error() -> None:
    raise MemoryError


def torch_allocation() -> None:
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def eats(mebibytes: int, pause: float = 0.0) -> int:
    block = bytearray(b"x") * (mebibytes * 2**20)
    time.sleep(pause)
    return len(block)


def spins(seconds: float) -> int:
    end, count = time.process_time() + seconds, 0
    while time.process_time() < end:
        count += 1
    return count


def has_child_that_eats(mebibytes: int, file: str) -> None:
    code = f"import os, time; open({file!r}, 'w').write(str(os.getpid())); x = bytearray(b'x') * ({mebibytes} << 20); time.sleep(60)"
    subprocess.run([sys.executable, "-c", code])


def has_child_that_holds(mebibytes: int, seconds: float) -> int:
    """A grandchild holds so much for a while; returns the most this process itself held."""
    code = f"import time; x = bytearray(b'x') * ({mebibytes} << 20); time.sleep({seconds})"
    subprocess.run([sys.executable, "-c", code])
    from assay.measure.child import peak_resident

    return peak_resident()


def leaves_a_child_behind(file: str, own_session: bool) -> None:
    """A grandchild that outlives its parent unless it is killed."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=own_session)
    Path(file).write_text(str(child.pid))
    time.sleep(1.0)  # long enough to be seen


def writes_pid_and_sleeps(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def environment(name: str) -> str | None:
    return os.environ.get(name)
