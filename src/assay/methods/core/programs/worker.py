"""What runs inside of the sandbox: a warm Python that makes a fresh copy of itself for every run. Standard library only.

One that never runs a program itself (`serve`) reads a job, forks, and waits. The copy loads the program, reads the arguments, calls, and
sends what came out, in steps that the other side of the border starts and times: L (loaded), A (arguments are there), D (done), V (value),
or E (the program raised), X (ended). Every message carries the number of its job, and nothing that the programs of two jobs share can be
written, so that nothing is remembered from one run to the next. A copy can start no process and become no other program, for the system
does not add up what those cost; threads it may start, which share its clock.

A program shares the interpreter with what is written here. What is needed once it is loaded is therefore bound before, and not looked up
where a program can put something else.

`once` is the same without a copy, for counting a whole process: everything lies in files, the value goes to stdout. `timed` starts a whole
program and says what processor time it took, with all the processes that it waited for.

No feature of `__future__` is turned on here: programs that are compiled here would have it too.
"""

import builtins
import contextlib
import gc
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from marshal import loads
from os import _exit, read, write
from sys import addaudithook, gettrace, settrace
from typing import Any, NoReturn

globals()["__builtins__"] = dict(vars(builtins))  # of our own, for the functions below

HEAD = struct.Struct("<I16sc")
COUNTS = struct.Struct("<qq")
"""Operations of the call and of loading, -1 where they are not counted."""
WARM = (
    "array", "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq", "itertools", "json",
    "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
TRACING = ("sys.settrace", "sys.setprofile", "sys.addaudithook")
HIDDEN = (
    *TRACING, "sys._getframe", "sys._current_frames", "gc.get_objects", "gc.get_referrers", "gc.get_referents",
    "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "ctypes.dlopen", "ctypes.dlsym",
)  # fmt: skip
"""What a program has no reason to do while its operations are counted, and could change or leave the count by."""
FRAMES = ("tb_frame", "f_code", "gi_frame", "cr_frame", "ag_frame")
CALL, LOADING = 0, 1
IMPORT = sys.modules["_frozen_importlib"]._find_and_load.__code__

REFUSED = {  # by machine: its name for filters, and the numbers of the calls below
    "x86_64": (0xC000003E, (59, 322, 57, 58, 319, 447, 29, 425), 56),
    "aarch64": (0xC00000B7, (221, 281, 279, 447, 194, 425), 220),
}
"""execve, execveat, fork, vfork; and memory that is in no process's own: memfd_create, memfd_secret, shmget, io_uring_setup. Then clone."""
CLONE3, CLONE_THREAD = 435, 0x10000


def serve(*, alone: bool) -> NoReturn:
    """Read jobs from stdin and fork for each, until stdin ends. `alone`: no process here is anybody else's, so that all may be ended."""
    receive, send = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for name in WARM:
        __import__(name)
    _undumpable()
    confine = _confinement()
    gc.collect()
    gc.freeze()
    _write(send, bytes(16), b"H")
    while True:
        mark, _, job = _read(receive)
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                _run(receive, send, mark, loads(job), confine)
            finally:
                _exit(70)
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


def _confinement() -> Callable[[], bool]:
    """What keeps a copy from starting a process, once it is called there; whether it did."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    machine = os.uname().machine
    if machine not in REFUSED:
        return lambda: False
    name, numbers, clone = REFUSED[machine]
    load, equal, least, bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent = (
        0x7FFF0000,
        0x00050001,
        0x00050026,
    )  # no, with EPERM or with ENOSYS, after which clone is tried
    lines = [(load, 0, 0, 4), (equal, 1, 0, name), (end, 0, 0, refuse), (load, 0, 0, 0)]
    lines += [(least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # numbers of another kind of process
    for number in numbers:
        lines += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    lines += [(equal, 0, 1, CLONE3), (end, 0, 0, absent), (equal, 1, 0, clone), (end, 0, 0, allow)]
    lines += [(load, 0, 0, 16), (bits, 0, 1, CLONE_THREAD), (end, 0, 0, allow), (end, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(lines), ctypes.addressof(code)))
    program._code = code  # type: ignore[attr-defined]  # it must live as long
    no_new_privileges, seccomp, by_filter = 38, 22, 2

    def confine() -> bool:
        return not prctl(no_new_privileges, 1, 0, 0, 0) and not prctl(seccomp, by_filter, program, 0, 0)

    return confine


def _run(receive: int, send: int, mark: bytes, job: dict[str, Any], confine: Callable[[], bool]) -> NoReturn:
    _limit(job["memory"], job["seconds"])
    if not confine() or job["operations"]:  # no threads either: what they do is not counted
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    counter = _Counter(lambda why: _void(send, mark, why)) if job["operations"] else None
    try:
        if counter:
            function = counter.run(LOADING, _load, (job["program"], job["entry"]), {})
        else:
            function = _load(job["program"], job["entry"])
        _write(send, mark, b"L")
        arguments, keywords = loads(_read(receive)[2])
        _write(send, mark, b"A")
        _read(receive)
        if counter:
            value = counter.run(CALL, function, arguments, keywords)
        else:
            value = function(*arguments, **keywords)
        _write(send, mark, b"D")
        _read(receive)  # its clock is right only while it waits
        counts = COUNTS.pack(*(counter.counts if counter else (-1, -1)))
        _write(send, mark, b"V", counts + encode(value))
    except BaseException as error:  # a program may raise what it likes, SystemExit too; it is told, not handled
        _write(send, mark, b"E", _told(error))
    _read(receive)  # its clock is read before it ends
    _exit(0)


def once(program: str, arguments: str, entry: str, log: str) -> None:
    """Run one program on one set of arguments, both files, in this process; `log`, which tells what it cost, is closed before."""
    os.close(int(log))
    send = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    with open(program, encoding="utf-8") as file:
        source = file.read()
    with open(arguments, "rb") as data:
        given, keywords = loads(data.read())
    try:
        kind, said = b"V", COUNTS.pack(-1, -1) + encode(_load(source, entry)(*given, **keywords))
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
            _exit(127)
    _, status, used = os.wait4(child, 0)
    write(pipe, struct.pack("<d", used.ru_utime + used.ru_stime))
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    _exit(code if code >= 0 else 128 - code)


def _limit(memory: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))


def _load(source: str, entry: str) -> Callable[..., Any]:
    module = type(sys)("program")
    module.__dict__["__builtins__"] = builtins
    sys.modules["program"] = sys.modules["__main__"] = module  # what is written here is not for it to change
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


class _Counter:
    """How many operations the interpreter is given while a program loads, but for what it imports, and during the call."""

    def __init__(self, void: Callable[[str], None]) -> None:
        self.counts = [0, 0]
        self._watched: tuple[str, ...] = ()
        self._void = void
        addaudithook(self._watch)

    def _watch(self, event: str, given: tuple[Any, ...]) -> None:
        watched = self._watched
        if event in watched or (watched is HIDDEN and event == "object.__getattr__" and given[1] in FRAMES):
            self._void(f"it used {event} while its operations were counted")

    def run(self, part: int, function: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        """Call a function and count its operations as those of a part, `CALL` or `LOADING`."""
        count = 0

        def step(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if event == "opcode":
                count += 1
            elif part == LOADING and event == "call" and frame.f_code is IMPORT:
                frame.f_trace_lines = False
                set_to(passed)
                return imported
            else:
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return step

        def passed(*_: Any) -> None:
            """While something is imported."""

        def imported(_frame: Any, event: str, _: Any) -> Any:
            if event == "return":
                set_to(step)
            return imported

        def set_to(what: Any) -> None:
            self._watched = ()
            settrace(what)
            self._watched = HIDDEN if part == CALL else TRACING

        set_to(step)
        try:
            value = function(*arguments, **keywords)
            if gettrace() is not step:  # as where counting itself raised
                self._void("counting its operations ended before it did")
        finally:
            self._watched = ()
            settrace(None)
        self.counts[part] = count
        return value


def _void(send: int, mark: bytes, why: str) -> None:
    _write(send, mark, b"F", why.encode())
    _exit(71)


def _read(pipe: int) -> tuple[bytes, bytes, bytes]:
    length, mark, kind = HEAD.unpack(_exactly(pipe, HEAD.size))
    return mark, kind, _exactly(pipe, length)


def _exactly(pipe: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = read(pipe, min(length - len(found), 1 << 20))
        if not part:
            _exit(0)  # who asks is gone
        found += part
    return bytes(found)


def _write(pipe: int, mark: bytes, kind: bytes, data: bytes = b"") -> None:
    rest = memoryview(HEAD.pack(len(data), mark, kind) + data)
    while rest:
        rest = rest[write(pipe, rest) :]


if __name__ == "__main__":
    if sys.argv[1] == "timed":
        timed(int(sys.argv[2]), sys.argv[3:])
    sys.path.insert(0, os.getcwd())
    encode = __import__("values").encode

    sys.path.pop(0)
    del sys.modules["values"]
    if sys.argv[1] == "once":
        once(*sys.argv[2:])
    else:
        serve(alone=sys.argv[1] == "alone")
