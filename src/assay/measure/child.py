"""The child process of `assay.measure.isolate`: reads call.json from the folder it is given and writes reply.json there.

It is run as a file. Until it has its search path, it imports only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Make the call; the reply is written completely or not at all."""
    faulthandler.enable()
    call = json.loads((folder / "call.json").read_text())
    die_with(call["parent"])
    sys.path[:] = call["path"] + [entry for entry in sys.path if entry not in call["path"]]
    if call["folder"] is not None:
        os.chdir(call["folder"])  # relative paths mean what they mean to the caller; modules are never looked for here
    reply: dict[str, Any] = {"status": "ok", "value": None, "error": "", "traceback": ""}
    try:
        module, name = call["target"].split(":")
        function = getattr(importlib.import_module(module), name)
        reply["start_rss_bytes"] = resident()
        start = time.perf_counter()
        reply["value"] = function(**call["kwargs"])
        reply["work_seconds"] = time.perf_counter() - start
        json.dumps(reply["value"])  # here, so that a result that is not JSON is reported like any other error
    except Exception as error:
        reply["value"] = None
        reply["status"] = "out of memory" if is_memory_error(error) else "failed"
        reply["error"] = one_line(error)
        reply["traceback"] = traceback.format_exc()
    reply["peak_rss_bytes"] = peak_resident()
    used = os.times()
    reply["cpu_seconds"] = used.user + used.system + used.children_user + used.children_system
    temporary = folder / "reply.tmp"
    temporary.write_text(json.dumps(reply))
    os.replace(temporary, folder / "reply.json")


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the parent dies; exit at once if it already has. Linux only, a no-op elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def is_memory_error(error: BaseException) -> bool:
    """Whether it is Python's own error, CUDA's (a RuntimeError of that name), or the message of torch's CPU allocator."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text))
    )


def one_line(error: BaseException) -> str:
    """Type and first line of the message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def resident() -> int:
    """Resident bytes of this process now."""
    return _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """The peak resident bytes of this process. Not from getrusage on Linux, which remembers the parent's size."""
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
