"""The sandbox: what a program is shown, and how it is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Literal

from assay import checks
from assay.methods.core.sandbox import watch

Ended = Literal["exit", "signal", "wall time", "cpu time", "memory", "processes", "output", "files"]
"""How a program ended: by itself, by a signal (a crash), or by one of the limits."""
USERS = range(200_000_000, 300_000_000)
"""Users that nobody has: where assay runs as root, a program runs as one of them, so that nothing of root's is its own."""
INSIDE = "/scratch"
MIB = 2**20


class SandboxMissing(RuntimeError):
    """This system has no namespaces to run programs in; the text says how to get them."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Raises ValueError and TypeError for what is no number above 0.

    `cpu_seconds`, `memory_mib` (resident; what processes share counts once where that can be told) and `processes` (threads count) are of
    all its processes together. `files_mib` is what it may keep in its scratch folder, `tmp_mib` in /tmp (memory too), `output_bytes` what
    is kept of stdout and stderr together; more ends it.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 5.0
    memory_mib: int = 512
    processes: int = 64
    output_bytes: int = MIB
    files_mib: int = 64
    tmp_mib: int = 64

    def __post_init__(self) -> None:
        for name in ("wall_seconds", "cpu_seconds"):
            checks.number(name, getattr(self, name), above=0)
        for name in ("memory_mib", "processes", "output_bytes", "files_mib", "tmp_mib"):
            checks.whole(name, getattr(self, name), low=1)


@dataclass(frozen=True)
class Ran:
    """How a program ran. `returncode` is that of the program, negative for a signal; None where a limit ended it.

    `seconds` is wall time and `cpu_seconds` processor time of all its processes, both seen from outside, with the start of the sandbox (a
    few hundredths of a second); `peak_bytes` the most memory seen, looked at every hundredth of a second.
    """

    ended: Ended
    returncode: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with 0."""
        return self.ended == "exit" and self.returncode == 0

    @property
    def text(self) -> str:
        """stdout as text; bytes that are none are shown as such."""
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class Protections:
    """What holds on this system, and what does not, each a sentence."""

    holds: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def full(self) -> bool:
        """Whether programs can be run protected."""
        return not self.missing


@cache
def protections() -> Protections:
    """What a program is kept from on this system; it is tried once, by running one.

    >>> bool(protections().holds or protections().missing)
    True
    """
    always = (
        "wall time, processor time, memory, output and files are limited, by looking at them a hundred times a second",
        "the environment holds nothing of ours",
    )
    by_namespaces = (
        "it writes to its scratch folder and /tmp only",
        "it has no network but its own loopback",
        "it sees and signals its own processes only",
        "it has no capabilities and makes no namespaces",
    )
    if reason := _why_no_namespaces():
        return Protections(always, (reason, *(f"not so here: {text}" for text in by_namespaces)))
    return Protections((*always, *by_namespaces), ())


def _why_no_namespaces() -> str:
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's, and this is not Linux"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian: apt install bubblewrap)"
    with tempfile.TemporaryDirectory(prefix="assay-sandbox-") as folder:
        user = _nobody()
        if user is not None:
            _hand_over(Path(folder), user)
        command = [*_around(Path(folder), (), Limits(), user), "/usr/bin/true"]
        try:
            tried = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return f"bubblewrap does not start: {error}"
    return "" if not tried.returncode else f"bubblewrap makes no namespaces here: {tried.stderr.strip()[:200]}"


def _nobody() -> int | None:
    """A user that nobody has, where assay runs as root; None where it runs as somebody else, who runs the program too."""
    return random.SystemRandom().choice(USERS) if os.geteuid() == 0 else None


def _around(
    scratch: Path, readable: Sequence[Path], limits: Limits, user: int | None, *, writes: bool = True
) -> list[str]:
    """What a program is started by. A user who is nobody does not reach a folder below /root, say: root shows it to it elsewhere first."""
    if user is None:
        return _bubblewrap(scratch, {path: path for path in readable}, limits, writes=writes)
    shown = {Path(f"/mnt/{n}"): path for n, path in enumerate(readable)}
    outer = [
        str(shutil.which("bwrap")),
        "--cap-add",
        "ALL",
        "--die-with-parent",
        "--dev-bind",
        "/",
        "/",
        "--tmpfs",
        "/mnt",
    ]
    for here, path in shown.items():
        outer += ["--ro-bind", str(path), str(here)]
    outer += [
        "--bind",
        str(scratch),
        "/mnt/scratch",
        "--",
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
    ]
    return [*outer, "--", *_bubblewrap(Path("/mnt/scratch"), shown, limits, writes=writes)]


def _bubblewrap(scratch: Path, readable: Mapping[Path, Path], limits: Limits, *, writes: bool) -> list[str]:
    """The sandbox itself, of folders that are here and what they are called inside."""
    own = ["--size", str(limits.tmp_mib * MIB)]  # of memory: a file system without a size would hold half of it
    shm = [*own, "--tmpfs", "/dev/shm"]
    command = [
        str(shutil.which("bwrap")), "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
        "--unshare-cgroup-try", "--disable-userns", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
        "--proc", "/proc", "--dev", "/dev", *shm, "--remount-ro", "/dev", *own, "--tmpfs", "/tmp",
    ]  # fmt: skip
    for folder in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    for folder in ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime"):
        command += ["--ro-bind-try", folder, folder]
    for here, path in readable.items():
        command += ["--ro-bind", str(here), str(path)]
    command += ["--bind" if writes else "--ro-bind", str(scratch), INSIDE, "--chdir", INSIDE, "--remount-ro", "/"]
    if not writes:
        command += ["--remount-ro", "/tmp", "--remount-ro", "/dev/shm", "--remount-ro", "/proc"]
    for name, value in _environment().items():
        command += ["--setenv", name, value]
    return [*command, "--"]


def _environment() -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": INSIDE, "TMPDIR": "/tmp", "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip


class Sandbox:
    """Runs programs, each in a scratch folder and in namespaces of its own. Several threads may run programs in one sandbox.

    `readable` are folders that programs may read besides the system's /usr: by default those of the running Python. With
    `unprotected=True` programs are run also where there are no namespaces, with limits and a clean environment only: they can then read
    and write whatever we can. Raises SandboxMissing without namespaces otherwise, ValueError for a folder that is not there.

    >>> sandbox = Sandbox(Limits(wall_seconds=20))  # doctest: +SKIP
    >>> sandbox.python("import os; print(os.listdir('/scratch'))").text  # doctest: +SKIP
    "['main.py']\\n"
    """

    def __init__(
        self, limits: Limits | None = None, *, readable: Sequence[Path | str] | None = None, unprotected: bool = False
    ) -> None:
        self.limits = limits or Limits()
        given = {sys.prefix, sys.base_prefix, sys.exec_prefix} if readable is None else set(map(str, readable))
        self.readable = tuple(sorted(Path(path).resolve() for path in given))
        for path in self.readable:
            if not path.exists():
                raise ValueError(f"readable must name what is there, got {path}")
        self.protected = protections().full
        if not self.protected and not checks.flag("unprotected", unprotected):
            raise SandboxMissing(
                f"programs cannot be run safely here: {protections().missing[0]}. "
                "Install it, or say unprotected=True to run them with your own rights"
            )

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left of a program when its run ends, so that there is nothing to close."""

    def python(self, source: str, *, files: Mapping[str, bytes | str] | None = None, **more: object) -> Ran:
        """Run Python source as `main.py`, isolated (-I: no user site, no PYTHON variables, nothing beside it imported). See `run`."""
        return self.run([sys.executable, "-I", "-B", "main.py"], files={**(files or {}), "main.py": source}, **more)  # type: ignore[arg-type]

    def run(
        self,
        command: Sequence[str],
        *,
        files: Mapping[str, bytes | str] | None = None,
        stdin: bytes = b"",
        collect: Sequence[str] = (),
        limits: Limits | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Ran:
        """Run a command in a scratch folder that holds `files`, give it `stdin`, and read the files named in `collect` afterwards.

        Names are relative, without ".."; of a file that the program made only a regular one is read, never what a link points to, and
        not more than `files_mib`. `pass_fds` are open files that the command gets beside its three. Raises ValueError for other names and
        an empty command, OSError where the program cannot be started. A program that ends badly raises nothing: see `Ran.ended`.
        """
        limits = limits or self.limits
        for name in collect:
            _check_name(name)
        with self._prepared(command, files or {}, limits) as (started, scratch):
            ran = _watched(started, scratch, stdin, limits, protected=self.protected, pass_fds=pass_fds)
            found = {name: data for name in collect if (data := _collected(scratch, name, limits)) is not None}
        return Ran(**{**ran.__dict__, "files": found})

    @contextlib.contextmanager
    def start(
        self, command: Sequence[str], *, files: Mapping[str, bytes | str] | None = None, limits: Limits | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a command that answers questions on its stdin and stdout until the `with` ends, which ends all its processes.

        It writes nowhere, so that nothing is kept from one question to the next; its scratch folder can be read. Of `limits` only those
        that the system keeps by itself hold (processor time of each process, number of processes): who asks watches the rest.
        """
        limits = limits or self.limits
        with self._prepared(command, files or {}, limits, writes=False) as (started, scratch):
            process = subprocess.Popen(
                started,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=scratch,
                env=_environment_of(scratch, protected=self.protected),
                start_new_session=True,
            )
            watcher = watch.Watcher(process.pid, scratch)
            try:
                yield process
            finally:
                watcher.look()
                watcher.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):
                        pipe.close()  # type: ignore[union-attr]

    @contextlib.contextmanager
    def _prepared(
        self, command: Sequence[str], files: Mapping[str, bytes | str], limits: Limits, *, writes: bool = True
    ) -> Iterator[tuple[list[str], Path]]:
        """The whole command line, and the scratch folder with its files."""
        command = [str(part) for part in command]
        if not command or "\0" in "".join(command):
            raise ValueError(f"command must hold a program and its arguments, got {checks.shown(command)}")
        for name in files:
            _check_name(name)
        with tempfile.TemporaryDirectory(prefix="assay-sandbox-", ignore_cleanup_errors=True) as folder:
            user = _nobody() if self.protected else None
            scratch = Path(folder) / "scratch"
            scratch.mkdir()
            for name, content in files.items():
                path = scratch / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            if user is not None:
                _hand_over(scratch, user)
            around = _around(scratch, self.readable, limits, user, writes=writes) if self.protected else []
            yield [*around, *_own_limits(limits, user), *command], scratch


def _check_name(name: str) -> None:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(f"files must have relative names inside of the scratch folder, got {checks.shown(name)}")


def _hand_over(folder: Path, user: int) -> None:
    """Give a folder and what is in it to the user who will run there."""
    for root, _, names in os.walk(folder):
        for path in (root, *(os.path.join(root, name) for name in names)):
            os.chown(path, user, user, follow_symlinks=False)


def _collected(scratch: Path, name: str, limits: Limits) -> bytes | None:
    """A regular file of the scratch folder, no link on the way to it; None where there is none, or one that is too large."""
    at = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        parts = Path(name).parts
        for n, part in enumerate(parts):
            kind = os.O_DIRECTORY if n + 1 < len(parts) else os.O_NONBLOCK
            below = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=at)
            os.close(at)
            at = below
        seen = os.fstat(at)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size > limits.files_mib * MIB:
            return None
        with os.fdopen(os.dup(at), "rb") as file:
            return file.read(limits.files_mib * MIB)
    except OSError:
        return None
    finally:
        os.close(at)


def _own_limits(limits: Limits, user: int | None) -> list[str]:
    """A program that sets limits which hold between two looks, and becomes the one behind it.

    The system counts processes by user: where assay's own user runs them its other processes would be counted too, so that there only
    looking counts them.
    """
    if (program := shutil.which("prlimit")) is None:
        return []
    seconds = int(limits.cpu_seconds) + 1
    counted = [] if user is None else [f"--nproc={limits.processes + 2}"]
    return [program, f"--cpu={seconds}:{seconds + 1}", f"--fsize={limits.files_mib * MIB}", "--core=0", *counted, "--"]


def _environment_of(scratch: Path, *, protected: bool) -> dict[str, str]:
    """What bubblewrap is started with, or the program itself; bubblewrap clears it and sets `_environment`."""
    return {} if protected else _environment() | {"HOME": str(scratch), "TMPDIR": str(scratch)}


def _watched(
    command: list[str], scratch: Path, stdin: bytes, limits: Limits, *, protected: bool, pass_fds: Sequence[int] = ()
) -> Ran:
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=scratch,
        env=_environment_of(scratch, protected=protected),
        start_new_session=True,
        pass_fds=tuple(pass_fds),
    )
    streams = _Streams(process, stdin, limits.output_bytes)
    watcher = watch.Watcher(process.pid, scratch)
    ended: Ended | None = None
    pause, used = 0.001, None
    try:
        while used is None:
            ended = _over(watcher, streams, limits, time.perf_counter() - began)
            if ended is not None:
                break
            time.sleep(pause)
            pause = min(pause * 1.5, 0.01)
            used = _waited(process, os.WNOHANG)
    finally:
        watcher.kill()
        used = used or _waited(process, 0)
    assert used is not None
    seconds = time.perf_counter() - began
    streams.close()
    cpu = max(used.ru_utime + used.ru_stime, watcher.cpu_seconds)
    ended = ended or _afterwards(streams, limits, cpu, watcher)
    code = None
    if ended is None:
        ended, code = _own_end(int(process.returncode), protected)
    return Ran(ended, code, *streams.kept(), seconds, cpu, watcher.peak_bytes)


def _own_end(code: int, protected: bool) -> tuple[Ended, int | None]:
    """How a program ended that we did not end."""
    if protected and code - 128 in signal.valid_signals():  # bubblewrap's way of saying that it met a signal
        code = 128 - code
    if code == -signal.SIGXCPU:
        return "cpu time", None
    if code == -signal.SIGXFSZ:
        return "files", None
    return ("signal" if code < 0 else "exit"), code


def _waited(process: subprocess.Popen[bytes], flags: int) -> resource.struct_rusage | None:
    """What an ended process and all below it used; None while it runs."""
    pid, status, used = os.wait4(process.pid, flags)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return used


def _over(watcher: watch.Watcher, streams: _Streams, limits: Limits, seconds: float) -> Ended | None:
    """Which limit is passed, if any."""
    watcher.look()
    if seconds > limits.wall_seconds:
        return "wall time"
    if watcher.cpu_seconds > limits.cpu_seconds:
        return "cpu time"
    if watcher.held_bytes > limits.memory_mib * MIB and watcher.shared_once() > limits.memory_mib * MIB:
        return "memory"
    if watcher.processes > limits.processes:
        return "processes"
    if streams.over:
        return "output"
    return "files" if watcher.files_bytes > limits.files_mib * MIB else None


def _afterwards(streams: _Streams, limits: Limits, cpu: float, watcher: watch.Watcher) -> Ended | None:
    """A limit that was passed between the last look and the end."""
    watcher.look_at_files()
    if streams.over:
        return "output"
    if cpu > limits.cpu_seconds:
        return "cpu time"
    return "files" if watcher.files_bytes > limits.files_mib * MIB else None


class _Streams:
    """What a program reads and writes, by a thread each: at most so much is kept, and more is not read."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes, most: int) -> None:
        self.most = most
        self.over = False
        self._kept: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
        self._lock = threading.Lock()
        self._pipes = [pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe is not None]
        read, said, complained = self._pipes
        jobs = [
            threading.Thread(target=self._write, args=(read, stdin), daemon=True),
            threading.Thread(target=self._read, args=(said, "out"), daemon=True),
            threading.Thread(target=self._read, args=(complained, "err"), daemon=True),
        ]
        for job in jobs:
            job.start()
        self._jobs = jobs

    def _write(self, pipe: IO[bytes], data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it does not read, or has ended
            pipe.write(data)
            pipe.close()

    def _read(self, pipe: IO[bytes], name: str) -> None:
        try:
            while data := os.read(pipe.fileno(), 65536):
                with self._lock:
                    free = self.most - sum(map(len, self._kept.values()))
                    self._kept[name] += data[:free]
                    if len(data) > free:
                        self.over = True
                        return
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        """Wait for what is still in the pipes: nobody holds their other ends any more."""
        for job in self._jobs:
            job.join(2)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()

    def kept(self) -> tuple[bytes, bytes]:
        """stdout and stderr."""
        return bytes(self._kept["out"]), bytes(self._kept["err"])
