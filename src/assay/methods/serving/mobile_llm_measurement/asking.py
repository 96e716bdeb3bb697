"""Asking an engine and timing the parts of its answer: in this process, or behind HTTP on this machine, with or without a slower link.

The parts are timed by marks of their own, and the whole by whoever asked: `Answer.unaccounted` is what they leave of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, Self

import psutil

from assay.methods.core.fleet.hardware import Link
from assay.methods.serving.mobile_llm_measurement.engines import Engine, EngineKind, command_of
from assay.methods.serving.mobile_llm_measurement.link import LinkProxy
from assay.search_path import environment as safe_environment
from assay.search_path import without_current_folder

PARTS = ("start", "load", "network", "queue", "prefill", "decode")
"""Until our code runs in the new process; libraries and weights; the link; waiting for others; to the first token; from it to the last."""
TERM_SECONDS = 5.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Answer:
    """An answer with its seconds: `parts` by their own marks, `first` (until its first text was there) and `seconds` by the asker's clock.

    `sent` and `received` are bytes over the link, 0 without one. `cached` tokens of the prompt were not computed again.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    first: float
    parts: Mapping[str, float]
    sent: int = 0
    received: int = 0
    cached: int = 0

    @property
    def unaccounted(self) -> float:
        """The share of the seconds that no part claims; negative where parts overlap."""
        return 1 - sum(self.parts.values()) / self.seconds


class Session(Protocol):
    """An engine that is loaded and answers."""

    def ask(self, prompt: str, new_tokens: int) -> Answer: ...

    def peak_bytes(self) -> int: ...

    def held_bytes(self) -> int: ...

    def close(self) -> None: ...


class LocalSession:
    """An engine in this process. What it takes is between the marks; there is no network and nobody else to wait for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, prompt: str, new_tokens: int) -> Answer:
        """Raises whatever the engine raises, and RuntimeError when it made another number of tokens."""
        begin = time.perf_counter()
        timed = Marks(self.engine, prompt, new_tokens)
        seconds = time.perf_counter() - begin
        parts = {"prefill": timed.prefill, "decode": timed.decode}
        return Answer(timed.text, timed.prompt_tokens, new_tokens, seconds, timed.first - begin, parts)

    def peak_bytes(self) -> int:
        """The most resident memory that this process ever had."""
        from assay.measure.child import peak_resident

        return peak_resident()

    def held_bytes(self) -> int:
        """The resident memory of this process now."""
        from assay.measure.child import resident

        return resident()

    def close(self) -> None:
        pass


class Marks:
    """One run of an engine: `prefill` until its first token, `decode` from there to the last. Raises RuntimeError for a wrong count."""

    def __init__(self, engine: Engine, prompt: str, new_tokens: int, on_text: Any = None) -> None:
        pieces: list[str] = []
        came: list[float] = []

        def take(text: str) -> None:
            came.append(time.perf_counter())
            pieces.append(text)
            if on_text is not None:
                on_text(text)

        start = time.perf_counter()
        self.prompt_tokens, made = engine.generate(prompt, new_tokens, take)
        end = time.perf_counter()
        if made != new_tokens:
            raise RuntimeError(f"the engine made {made} tokens where {new_tokens} were asked for")
        self.first = came[0] if came else end
        self.text, self.prefill, self.decode = "".join(pieces), self.first - start, end - self.first


# ------------------------------------------------------------------------------------------------------------------- over HTTP


class HttpSession:
    """A server of this machine that speaks /v1/completions, behind `link` if there is one.

    Servers of ours (`host`) say how long an answer queued, prefilled and decoded. Of others the time from the request's arrival to the
    first piece of the answer counts as prefill, queueing included, and what follows as decoding; without a link the loopback is in them.
    `network` is what the link took: of the request, and of the last piece of the answer. Ended with `close`, which ends `process` too.
    """

    def __init__(
        self,
        port: int,
        *,
        link: Link | None = None,
        process: Process | None = None,
        extra: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.port, self.process, self.extra, self.timeout = port, process, dict(extra or {}), timeout
        self.model = ""
        self.proxy = None if link is None else LinkProxy(port, link)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing happens a second time."""
        if self.proxy is not None:
            self.proxy.close()
        if self.process is not None:
            self.process.end()

    def peak_bytes(self) -> int:
        """The most resident memory that the server's process ever had, with those it started; 0 for a server that was there before."""
        return 0 if self.process is None else self.process.peak_bytes()

    def held_bytes(self) -> int:
        """The resident memory of the server's process and of those it started, now; 0 for a server that was there before."""
        return 0 if self.process is None else self.process.held_bytes()

    def ask(self, prompt: str, new_tokens: int) -> Answer:
        """Raises RuntimeError for an error of the server's or an answer of another length, OSError when it is gone."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **self.extra}
        to = self.port if self.proxy is None else self.proxy.port
        connection = http.client.HTTPConnection("127.0.0.1", to, timeout=self.timeout)
        connection.connect()
        try:
            ours = int(connection.sock.getsockname()[1])
            begin = time.perf_counter()
            connection.request(
                "POST", "/v1/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json", "Connection": "close"},
            )  # fmt: skip
            seen = _read(connection.getresponse())
            end = time.perf_counter()
        finally:
            connection.close()
        if seen.usage.get("completion_tokens") != new_tokens:
            made = seen.usage.get("completion_tokens")
            raise RuntimeError(f"the server made {made} tokens where {new_tokens} were asked for")
        first = seen.first or end
        crossing = None if self.proxy is None else self.proxy.crossing(ours)
        up, down = (0.0, 0.0) if crossing is None else (crossing.up_seconds, crossing.down_seconds)
        if seen.marks:
            parts = {name: float(seen.marks[name]) for name in ("queue", "prefill", "decode")}
        elif crossing is None:
            parts = {"prefill": first - begin, "decode": end - first}
        else:
            sent = crossing.left_before(first) or first
            parts = {"prefill": sent - crossing.up[-1][1], "decode": crossing.down[-1][0] - sent}
        cached = (seen.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(
            seen.text,
            int(seen.usage["prompt_tokens"]),
            new_tokens,
            end - begin,
            first - begin,
            parts if crossing is None else {"network": up + down, **parts},
            sent=0 if crossing is None else crossing.bytes_up,
            received=0 if crossing is None else crossing.bytes_down,
            cached=int(cached),
        )


@dataclass
class _Seen:
    text: str = ""
    first: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)


def _read(response: http.client.HTTPResponse) -> _Seen:
    """A streamed answer, to its end."""
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {response.read(300).decode(errors='replace')}")
    seen = _Seen()
    for line in response:
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        now, event = time.perf_counter(), json.loads(line[5:])
        if "error" in event:
            raise RuntimeError(f"the server failed: {str(event['error'])[:300]}")
        seen.usage, seen.marks = event.get("usage") or seen.usage, event.get("marks") or seen.marks
        for choice in event.get("choices", []):
            if choice.get("text") and seen.first is None:
                seen.first = now
            seen.text += choice.get("text") or ""
    return seen


# ------------------------------------------------------------------------------------------------------------------- processes


class Process:
    """A server's process, ended by `end`, and on Linux when this process ends. What it prints goes to a nameless temporary file; its
    standard output too, unless `piped`."""

    def __init__(self, command: Sequence[str], *, threads: int, piped: bool = False) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        extra = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join(without_current_folder(sys.path))
        self._popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else self._log,
            stderr=self._log,
            cwd=tempfile.gettempdir(),
            env=safe_environment({**os.environ, **extra, "PYTHONPATH": path}),
            preexec_fn=_die_with_parent,
        )
        self._peak = 0

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def output(self) -> IO[bytes]:
        """Its standard output, where it is `piped`."""
        assert self._popen.stdout is not None
        return self._popen.stdout

    def last_words(self) -> str:
        """The last line that it printed."""
        if self._log.closed:
            return "it said nothing"
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def peak_bytes(self) -> int:
        """The most resident memory it ever had, and what its children have now; what was known last once it has ended."""
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            own = _high_water(self.pid) or process.memory_info().rss
            children = sum(child.memory_info().rss for child in process.children(recursive=True))
            self._peak = max(self._peak, own + children)
        return self._peak

    def held_bytes(self) -> int:
        """The resident memory that it and its children have now; 0 once it has ended."""
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            return int(sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))
        return 0

    def end(self) -> None:
        """End it and what it started: with a signal it may act on, then without. Nothing happens a second time."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.pid).children(recursive=True) if self.running else []
        if self.running:
            self.peak_bytes()
            self._popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(TERM_SECONDS)
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, TERM_SECONDS)
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        self._log.close()


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass(frozen=True)
class Started:
    """A session whose server was started for it, and what starting took: `parts` "start" and "load", by the server's own marks where it
    is ours; a foreign one's, from its start until it first answered, is all "load"."""

    session: HttpSession
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Starting:
    """A server of ours that is starting, for whoever has something else to do meanwhile. `ready` waits for it, `end` ends it."""

    name: str
    process: Process
    link: Link | None
    timeout: float

    def end(self) -> None:
        """Nothing happens a second time."""
        self.process.end()

    def ready(self) -> Started:
        """Raises RuntimeError, with the last line it printed, when it ends or does not answer in time; it is then ended."""
        try:
            there, _, _ = select.select([self.process.output], [], [], self.timeout)
            line = self.process.output.readline() if there else b""
            if not line:
                why = "ended" if there else f"did not start within {self.timeout:g} s"
                raise RuntimeError(f"the server of {self.name} {why}: {self.process.last_words()}")
            told = json.loads(line)
            session = HttpSession(int(told["port"]), link=self.link, process=self.process, timeout=self.timeout)
        except BaseException:
            self.process.end()
            raise
        return Started(session, {"start": float(told["start"]), "load": float(told["load"])})


def starting(
    kind: EngineKind,
    *,
    folder: str,
    gguf: str | None,
    format: str,
    threads: int,
    link: Link | None = None,
    timeout: float = 600.0,
) -> Starting:
    """Start an engine that has an opener in a server process of its own. It ends with the thread that calls this."""
    asked = {
        "kind": {
            "name": kind.name,
            "formats": list(kind.formats),
            "opener": kind.opener,
            "options": dict(kind.options),
        },
        "model": {"folder": folder, "gguf": gguf, "format": format, "threads": threads},
        "parent": os.getpid(),
        "spawned": time.perf_counter(),  # of all processes of this machine alike, and nobody sets it
    }
    command = [sys.executable, "-P", "-m", f"{__package__}.host", json.dumps(asked)]
    return Starting(kind.name, Process(command, threads=threads, piped=True), link, timeout)


def hosted(
    kind: EngineKind,
    *,
    folder: str,
    gguf: str | None,
    format: str,
    threads: int,
    link: Link | None = None,
    timeout: float = 600.0,
) -> Started:
    """An engine in a server process of its own, ready to answer. It ends with the thread that calls this, or by `close`.

    Raises RuntimeError, with the last line it printed, when it ends or does not answer within `timeout` seconds; it is then ended.
    """
    if kind.command:
        return _foreign(kind, folder=folder, gguf=gguf, threads=threads, link=link, timeout=timeout)
    where: dict[str, Any] = {"folder": folder, "gguf": gguf, "format": format, "threads": threads}
    return starting(kind, **where, link=link, timeout=timeout).ready()


def _foreign(
    kind: EngineKind, *, folder: str, gguf: str | None, threads: int, link: Link | None, timeout: float
) -> Started:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    begin = time.perf_counter()
    process = Process(command_of(kind, folder=folder, gguf=gguf, port=port, threads=threads), threads=threads)
    session = None
    try:
        direct = HttpSession(port, extra=kind.extra, timeout=timeout)
        while True:
            if not process.running:
                raise RuntimeError(f"{kind.name} ended by itself: {process.last_words()}")
            if time.perf_counter() - begin > timeout:
                raise RuntimeError(f"{kind.name} did not answer within {timeout:g} s: {process.last_words()}")
            with contextlib.suppress(OSError, RuntimeError, ValueError, http.client.HTTPException):
                direct.model = _first_model(port, timeout)
                direct.ask("Hello", 1)
                break
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - begin
        session = HttpSession(port, link=link, process=process, extra=kind.extra, timeout=timeout)
        session.model = direct.model
    except BaseException:
        process.end()
        raise
    return Started(session, {"load": seconds})


def _first_model(port: int, timeout: float) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", "/v1/models")
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}")
        return str(json.loads(response.read())["data"][0]["id"])
    except (KeyError, IndexError) as error:
        raise RuntimeError("the server lists no model") from error
    finally:
        connection.close()
