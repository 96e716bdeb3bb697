"""A slower link in front of a server on this machine: a proxy on loopback that passes bytes on when they would have arrived.

The delays are ours: no network is measured, one is imitated. They are awaited, so that they take no processor time and messages that are
under way at the same time overlap; of a link's bandwidth all its connections have a share, each way by itself. Connecting costs nothing: an
application is taken to keep its connection open.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Self

from assay.methods.core.fleet.hardware import Link

CHUNK = 1 << 14
KEPT = 1024  # crossings that are remembered
STARTING = 30.0


@dataclass
class Crossing:
    """What one connection sent and received: when each piece came to the link, when it left it, and its bytes."""

    up: list[tuple[float, float, int]] = field(default_factory=list)
    down: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def up_seconds(self) -> float:
        """Seconds that the request was under way, from its first byte to its last."""
        return self.up[-1][1] - self.up[0][0] if self.up else 0.0

    @property
    def down_seconds(self) -> float:
        """Seconds that the last piece of the answer was under way: earlier pieces were while later ones were made."""
        return self.down[-1][1] - self.down[-1][0] if self.down else 0.0

    def left_before(self, moment: float) -> float | None:
        """When the server had sent the piece that arrived last by a moment of `time.perf_counter`; None if nothing had arrived."""
        return next((came for came, left, _ in reversed(self.down) if left <= moment), None)

    @property
    def bytes_up(self) -> int:
        return sum(size for _, _, size in self.up)

    @property
    def bytes_down(self) -> int:
        return sum(size for _, _, size in self.down)


class LinkProxy:
    """Listens on a free port of 127.0.0.1 (`port`) and passes on to another of this machine as `link` would. To be closed: `with` does.

    Each way takes `link.latency` (half of a round trip) and bytes over `link.bandwidth`.
    """

    def __init__(self, port: int, link: Link) -> None:
        self.target, self.link = port, link
        self._free = {"up": 0.0, "down": 0.0}
        self._known: OrderedDict[int, Crossing] = OrderedDict()
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="assay-link", daemon=True)
        self._thread.start()
        if not self._ready.wait(STARTING) or self._failed is not None:
            raise RuntimeError(f"the link cannot listen: {self._failed or 'it did not start'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it and all that is under way. Nothing happens a second time."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended meanwhile
                self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(STARTING)

    def crossing(self, client_port: int) -> Crossing:
        """What the connection from that port of the client did; of the last thousand or so."""
        return self._known[client_port]

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failed = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connection(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = Crossing()
        port = int(writer.get_extra_info("peername")[1])
        self._known.pop(port, None)  # an earlier connection's: this one is the newest
        self._known[port] = found
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        other: asyncio.StreamWriter | None = None
        try:
            back, other = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._way(reader, other, "up", found.up), self._way(back, writer, "down", found.down))
        except OSError:  # one side is gone: so is the other
            pass
        finally:
            for one in (writer, other):
                if one is not None:
                    one.close()

    async def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str, seen: list[tuple[float, float, int]]
    ) -> None:
        waiting: asyncio.Queue[tuple[float, float, bytes] | None] = asyncio.Queue()

        async def take() -> None:
            try:
                while data := await reader.read(CHUNK):
                    now = time.perf_counter()
                    self._free[way] = max(now, self._free[way]) + len(data) / self.link.bandwidth
                    waiting.put_nowait((now, self._free[way] + self.link.latency, data))
            finally:
                waiting.put_nowait(None)

        async def give() -> None:
            while (item := await waiting.get()) is not None:
                came, due, data = item
                if (left := due - time.perf_counter()) > 0:
                    await asyncio.sleep(left)
                seen.append((came, time.perf_counter(), len(data)))  # before the other side can have read it
                writer.write(data)
                await writer.drain()
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

        await asyncio.gather(take(), give())
