"""A server as a process of its own: started, waited for, stopped while others are measured, and ended with whatever it started."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay.errors import MissingError
from assay.loadtest.answers import Malformed
from assay.loadtest.client import Server, ask, found, server_at
from assay.loadtest.traces import Request

TERM_SECONDS = 15.0  # that a server has to end by itself
POLL_SECONDS = 0.5
FIRST = Request("Once upon a time", 4)


class ServerProcess:
    """A process group that serves on a port of 127.0.0.1; on Linux it is killed when this process ends, however that is.

    `environment` is all that the process gets, `log` takes what it prints, `options` are those of `server_at`.
    """

    def __init__(
        self, command: Sequence[str], port: int, *, log: Path, environment: Mapping[str, str], **options: Any
    ) -> None:
        self.command, self.log = list(command), log
        self.server: Server = server_at(f"http://127.0.0.1:{port}", **options)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until it answers a request. Raises MissingError, with the last line it printed, when it ends or takes too long."""

        async def answered() -> Server:
            ready = await found(replace(self.server, timeout=seconds))
            await ask(ready, FIRST)
            return replace(ready, timeout=self.server.timeout)

        deadline, failed = time.monotonic() + seconds, "it was not asked"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise MissingError(f"the server ended with {self.process.returncode}: {self.last_words()}")
            try:
                self.server = asyncio.run(answered())
                return
            except Malformed as error:
                failed = f"{error.kind}: {error}"
            time.sleep(POLL_SECONDS)
        raise MissingError(f"the server did not answer within {seconds:.0f} s: {failed}; {self.last_words()}")

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Server]:
        """Let it run meanwhile, and stop it (SIGSTOP) afterwards, so that it takes no processor time from others."""
        self._signal(signal.SIGCONT)
        try:
            yield self.server
        finally:
            self.pause()

    def pause(self) -> None:
        """Stop it, until it is `in_use`."""
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """End it: with a signal it may act on, then without."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TERM_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """The last line it printed."""
        return last_line(self.log.read_text(encoding="utf-8", errors="replace"))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def last_line(text: str) -> str:
    """The last line that says something, cut short.

    >>> last_line("one\\n two \\n\\n")
    'two'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
