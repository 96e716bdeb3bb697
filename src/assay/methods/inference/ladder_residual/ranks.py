"""Real processes for tensor parallelism on one machine: started once, asked to run functions, always ended.

    with Ranks(2) as ranks:
        tokens = ranks.run(generate, model, ids)        # generate(here, model, ids) in both processes; the results in order of rank

They are started afresh ("spawn"), find one another through a file, and talk over the loopback interface (gloo), so that no port has to
be chosen. On several machines, start the processes as you do (torchrun) and use `GroupLink` and `tensor_parallel` alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from assay import checks

STARTING, ENDING = 120.0, 5.0  # seconds that processes have to start, and one to end by itself


@dataclass
class Rank:
    """What a function that runs on a rank is given: which one it is, and a place to keep things between calls."""

    rank: int
    world: int
    kept: dict[str, Any] = field(default_factory=dict)


class Ranks:
    """`world` processes of one group, each with `threads` threads for torch. Use it in a `with` statement, or call `close`.

    A call that takes longer than `timeout` seconds, a rank that raises, and one that dies end all of them. They also end with this
    process, however it ends. Raises ValueError for counts below 1; RuntimeError when a process fails to start or to join the group, and
    TimeoutError when one is not ready within two minutes, or `timeout` seconds if that is longer; both after all processes were ended.

    When NOT to use it: at the top level of a script without `if __name__ == "__main__"`, which "spawn" would run again.
    """

    def __init__(self, world: int, *, threads: int = 1, timeout: float = 120.0) -> None:
        self.world = checks.whole("world", world, low=1)
        threads = checks.whole("threads", threads, low=1)
        self.timeout = checks.number("timeout", timeout, above=0)
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp(prefix="assay-ranks-")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._finalizer = weakref.finalize(self, _end, self._processes, self._connections, folder)
        try:
            for rank in range(self.world):
                ours, theirs = context.Pipe()
                given = (theirs, rank, self.world, os.path.join(folder, "store"), threads, self.timeout)
                process = context.Process(target=_serve, args=given, daemon=True, name=f"assay-rank-{rank}")
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            self._answers(max(STARTING, self.timeout))
        except BaseException:
            self.close(at_once=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes; empty when they were ended."""
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(here, *args, **kwargs)` on every rank at once, `here` a `Rank`; the results in order of rank.

        The function must be importable, arguments and results picklable: each rank has its own copy of them. Raises RuntimeError with
        the traceback when a rank raised or died, TimeoutError after `timeout` seconds, both after all processes were ended, and
        ValueError once they are.
        """
        if not self._processes:
            raise ValueError("the ranks were ended: make new ones")
        call = pickle.dumps((function, args, kwargs))
        try:
            for connection in self._connections:
                connection.send_bytes(call)
            return self._answers(self.timeout)
        except BaseException:
            self.close(at_once=True)
            raise

    def close(self, *, at_once: bool = False) -> None:
        """End the processes; `at_once` without waiting for what they are doing. Nothing happens a second time."""
        if at_once:
            for process in self._processes:
                process.terminate()
        self._finalizer()

    def _answers(self, seconds: float) -> list[Any]:
        """One answer of each rank."""
        end = time.monotonic() + seconds
        missing = dict(enumerate(self._connections))
        found: dict[int, Any] = {}
        while missing:
            sentinels = {self._processes[rank].sentinel: rank for rank in missing}
            ready = wait([*missing.values(), *sentinels], timeout=max(end - time.monotonic(), 0.0))
            if not ready:
                raise TimeoutError(f"rank {min(missing)} gave no answer within {seconds:g} s")
            for rank, connection in list(missing.items()):
                if connection in ready or self._processes[rank].sentinel in ready:
                    try:
                        status, value = pickle.loads(connection.recv_bytes())  # noqa: S301  # from a process we started
                    except (EOFError, OSError):
                        self._processes[rank].join(ENDING)
                        code = self._processes[rank].exitcode
                        raise RuntimeError(f"rank {rank} died (exit code {code})") from None
                    if status != "ok":
                        raise RuntimeError(f"rank {rank} failed:\n{value}")
                    found[rank] = value
                    del missing[rank]
        return [found[rank] for rank in range(self.world)]


def _end(processes: list[Any], connections: list[Connection], folder: str) -> None:
    """Ask the processes to end, then make them."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send_bytes(pickle.dumps(None))
    last = time.monotonic() + ENDING
    for process in processes:
        process.join(max(last - time.monotonic(), 0.0))
    for process in processes:
        if process.is_alive():
            process.terminate()
            process.join(ENDING)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
    for connection in connections:
        connection.close()
    processes.clear()
    connections.clear()
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    os.rmdir(folder)


def _serve(connection: Connection, rank: int, world: int, store: str, threads: int, timeout: float) -> None:
    """A rank's life: join the group, then answer calls until there are none."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    try:
        _use_loopback()
        meeting = dist.FileStore(store, world)  # type: ignore[attr-defined]
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=limit)
    except Exception:
        connection.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
        return
    connection.send_bytes(pickle.dumps(("ok", None)))
    here = Rank(rank, world)
    while True:
        try:
            call = pickle.loads(connection.recv_bytes())  # noqa: S301  # from the process that started this one
        except EOFError:
            break
        except Exception:  # a function that cannot be imported here
            connection.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
            continue
        if call is None:
            break
        function, args, kwargs = call
        try:
            answer = pickle.dumps(("ok", function(here, *args, **kwargs)))
        except Exception:
            answer = pickle.dumps(("failed", traceback.format_exc()))
        connection.send_bytes(answer)
    dist.destroy_process_group()


def _use_loopback() -> None:
    """Ranks of one machine need no other interface, and some machines cannot look up their own name."""
    names = {name for _, name in socket.if_nameindex()}
    for name in ("lo", "lo0"):
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _end_with_parent() -> None:
    """Exit when the process that started this one is gone, even in the middle of a sum that nobody will finish."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
