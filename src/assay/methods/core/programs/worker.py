"""What runs inside of the sandbox: a warm Python that makes a fresh copy of itself for every run. Standard library only.

One that never runs a program itself (`serve`) reads a job, forks, and waits. The copy loads the program, reads the arguments, calls, and
sends what came out, in steps that the other side of the border starts and times: L (loaded), A (arguments are there), D (done), V (value),
or E (the program raised), X (ended). Every message carries the number of its job, and nothing that the programs of two jobs share can be
written, so that nothing is remembered from one run to the next.

`once` is the same without a copy, for counting a whole process: everything lies in files, the value goes to stdout. `timed` starts a whole
program and says what processor time it took, with all the processes that it waited for.
"""

from __future__ import annotations

import contextlib
import gc
import marshal
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

HEAD = struct.Struct("<I16sc")
WARM = (
    "array", "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq", "itertools", "json",
    "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
HIDDEN = (
    "sys.settrace", "sys.setprofile", "sys._getframe", "sys._current_frames", "gc.get_objects", "gc.get_referrers", "gc.get_referents",
    "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "ctypes.dlopen",
)  # fmt: skip
"""What a program has no reason to do while its operations are counted, and could change or leave the count by."""


def serve(*, alone: bool) -> NoReturn:
    """Read jobs from stdin and fork for each, until stdin ends. `alone`: no process here is anybody else's, so that all may be ended."""
    receive, send = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for name in WARM:
        __import__(name)
    _undumpable()
    gc.collect()
    gc.freeze()
    _write(send, bytes(16), b"H")
    while True:
        mark, _, job = _read(receive)
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                _run(receive, send, mark, marshal.loads(job))
            finally:
                os._exit(70)
        _, status = os.waitpid(child, 0)
        _end_others(-1 if alone else -child)
        _write(send, mark, b"X", str(os.waitstatus_to_exitcode(status)).encode())


def _undumpable() -> None:
    """Copies of this process must not be able to look into it or change it."""
    import ctypes

    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


def _end_others(whom: int) -> None:
    """Whatever a program started and left behind."""
    with contextlib.suppress(OSError):
        os.kill(whom, signal.SIGKILL)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _run(receive: int, send: int, mark: bytes, job: dict[str, Any]) -> NoReturn:
    _limit(job["memory"], job["seconds"])
    try:
        function = _load(job["program"], job["entry"])
        _write(send, mark, b"L")
        arguments, keywords = marshal.loads(_read(receive)[2])
        _write(send, mark, b"A")
        _read(receive)
        operations = None
        if job["operations"]:
            resource.setrlimit(
                resource.RLIMIT_NPROC, (0, 0)
            )  # what other threads and processes do would not be counted
            value, operations = _counted(function, arguments, keywords, lambda why: _void(send, mark, why))
        else:
            value = function(*arguments, **keywords)
        _write(send, mark, b"D")
        _read(receive)  # its clock is right only while it waits
        _write(send, mark, b"V", struct.pack("<q", -1 if operations is None else operations) + encode(value))
    except BaseException as error:  # a program may raise what it likes, SystemExit too; it is told, not handled
        _write(send, mark, b"E", _told(error))
    _read(receive)  # its clock is read before it ends
    os._exit(0)


def once(program: str, arguments: str, entry: str, log: str) -> None:
    """Run one program on one set of arguments, both files, in this process; `log`, which tells what it cost, is closed before."""
    os.close(int(log))
    send = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    with open(program, encoding="utf-8") as file:
        source = file.read()
    with open(arguments, "rb") as data:
        given, keywords = marshal.loads(data.read())
    try:
        kind, said = b"V", struct.pack("<q", -1) + encode(_load(source, entry)(*given, **keywords))
    except BaseException as error:  # as above
        kind, said = b"E", _told(error)
    _write(send, bytes(16), kind, said)


def timed(pipe: int, command: list[str]) -> NoReturn:
    """Run a command, write its processor seconds to `pipe`, which it does not get, and end as it ended."""
    _undumpable()
    child = os.fork()
    if child == 0:
        os.close(pipe)
        try:
            os.execvp(command[0], command)
        finally:
            os._exit(127)
    _, status, used = os.wait4(child, 0)
    os.write(pipe, struct.pack("<d", used.ru_utime + used.ru_stime))
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _limit(memory: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))


def _load(source: str, entry: str) -> Callable[..., Any]:
    module = type(sys)("program")
    sys.modules["program"] = module
    exec(compile(source, "<program>", "exec"), module.__dict__)
    function = module.__dict__.get(entry)
    if not callable(function):
        raise NameError(f"the program defines no function {entry!r}")
    found: Callable[..., Any] = function
    return found


def _told(error: BaseException) -> bytes:
    try:
        text = str(error)
    except BaseException:  # the program's own exception may raise in its text
        text = ""
    return f"{type(error).__name__}: {text[:500]}".encode("utf-8", "replace")


def _counted(
    function: Callable[..., Any], arguments: Any, keywords: Any, void: Callable[[str], None]
) -> tuple[Any, int]:
    """The call, and how many operations the interpreter was given by it."""
    count, armed = 0, False

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if armed and (event in HIDDEN or (event == "object.__getattr__" and given[1] in ("tb_frame", "f_code"))):
            void(f"it used {event} while its operations were counted")

    def step(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if event == "opcode":
            count += 1
        else:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    sys.addaudithook(watch)
    sys.settrace(step)
    armed = True
    try:
        value = function(*arguments, **keywords)
    finally:
        armed = False
        sys.settrace(None)
    return value, count


def _void(send: int, mark: bytes, why: str) -> None:
    _write(send, mark, b"F", why.encode())
    os._exit(71)


def _read(pipe: int) -> tuple[bytes, bytes, bytes]:
    length, mark, kind = HEAD.unpack(_exactly(pipe, HEAD.size))
    return mark, kind, _exactly(pipe, length)


def _exactly(pipe: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = os.read(pipe, min(length - len(found), 1 << 20))
        if not part:
            os._exit(0)  # who asks is gone
        found += part
    return bytes(found)


def _write(pipe: int, mark: bytes, kind: bytes, data: bytes = b"") -> None:
    rest = memoryview(HEAD.pack(len(data), mark, kind) + data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


if __name__ == "__main__":
    if sys.argv[1] == "timed":
        timed(int(sys.argv[2]), sys.argv[3:])
    sys.path.insert(0, os.getcwd())
    from values import encode

    sys.path.pop(0)
    if sys.argv[1] == "once":
        once(*sys.argv[2:])
    else:
        serve(alone=sys.argv[1] == "alone")
