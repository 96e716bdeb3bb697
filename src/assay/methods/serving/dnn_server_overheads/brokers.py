"""Brokers between two models: a queue in the process, a process with a socket, a log on disk. What each promises is said in its class.

All have `put`, `get`, `ack` and `close`. A message that was got and not acknowledged is somebody's work in progress.
"""

from __future__ import annotations

import contextlib
import hmac
import multiprocessing
import os
import secrets
import signal
import socket
import socketserver
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from assay import checks
from assay.methods.serving.dnn_server_overheads.wire import GUARD, Broken, CutOff, Message, packed, read

STARTING, ENDING = 60.0, 5.0  # seconds a process has to start in, and to end in
LONGEST = 3600.0  # seconds that a get may wait
POLL = 0.1  # seconds between two looks at whether a reader is to end


class Closed(RuntimeError):
    """The broker was closed, or is gone."""


@dataclass(frozen=True)
class Delivery:
    """A message, and the number by which it is acknowledged."""

    message: Message
    number: int


class Broker(Protocol):
    """What the two sides of a broker use. Threads may share one; `get` waits for `timeout` seconds and gives None if nothing came."""

    def put(self, message: Message) -> None: ...

    def get(self, timeout: float) -> Delivery | None: ...

    def ack(self, delivery: Delivery) -> None: ...

    def close(self) -> None: ...


class _Line:
    """Messages in order, those under way, and who waits for some."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Any]] = deque()
        self.under_way: dict[int, Any] = {}
        self.changed = threading.Condition()
        self.count, self.closed = 0, False

    def put(self, item: Any) -> None:
        with self.changed:
            if self.closed:
                raise Closed("the broker was closed")
            self.waiting.append((self.count, item))
            self.count += 1
            self.changed.notify()

    def get(self, timeout: float) -> tuple[int, Any] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed, timeout)
            if self.waiting:
                number, item = self.waiting.popleft()
                self.under_way[number] = item
                return number, item
            if self.closed:
                raise Closed("the broker was closed")
            return None

    def ack(self, number: int) -> None:
        with self.changed:
            self.under_way.pop(number, None)

    def back(self, numbers: set[int]) -> None:
        """What was under way waits again, in its old order, before all that waits."""
        with self.changed:
            again = sorted(number for number in numbers if number in self.under_way)
            self.waiting.extendleft((number, self.under_way.pop(number)) for number in reversed(again))
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class QueueBroker:
    """A queue in this process. Messages are handed over as they are, without a copy.

    Exactly once: each message is got once, in the order of `put`. What was got and not acknowledged is not got again, and all is lost
    with the process.
    """

    def __init__(self) -> None:
        self._line = _Line()

    def put(self, message: Message) -> None:
        self._line.put(message)

    def get(self, timeout: float) -> Delivery | None:
        found = self._line.get(_seconds(timeout))
        return None if found is None else Delivery(found[1], found[0])

    def ack(self, delivery: Delivery) -> None:
        self._line.ack(delivery.number)

    def close(self) -> None:
        self._line.close()


# ------------------------------------------------------------------------------------------------------------------ over a socket

PUT, GET, ACK, TAKEN, NOTHING = b"P", b"G", b"A", b"T", b"N"
_NUMBER, _TIMEOUT = struct.Struct("<Q"), struct.Struct("<d")
KEY = 32  # bytes by which a broker's process knows its own clients


class SocketBroker:
    """A process of its own that keeps messages in memory; clients talk to it over a socket of 127.0.0.1.

    At least once: what a client got and did not acknowledge before its connection ended is got again, before all that waits;
    exactly once while no client is lost. Everything is lost with the broker's process. `put` returns when the broker has the message.
    Each thread has a connection of its own, which ends some time after the thread: a thread that ends is a client that is lost.
    `connect()` gives a second client of the same process. A script that makes one needs the guard `if __name__ == "__main__":`, as for all
    processes that are spawned.
    """

    def __init__(self, address: tuple[str, int] | None = None, key: bytes = b"") -> None:
        self._local, self._lock = threading.local(), threading.Lock()
        self._sockets: list[tuple[threading.Thread, socket.socket]] = []
        self._process: Any = None
        self._closed = False
        if address is not None:
            self.address, self._key = address, key
            return
        self._key = secrets.token_bytes(KEY)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._key), daemon=True, name="assay-broker")
        self._alive = ours  # it ends when this end is closed, also by our death
        self._process.start()
        theirs.close()
        try:
            if not ours.poll(STARTING):
                raise TimeoutError(f"the broker did not start within {STARTING:g} s")
            self.address = ("127.0.0.1", struct.unpack("<H", ours.recv_bytes())[0])
        except (EOFError, OSError):
            self.close()
            raise Closed(f"the broker's process ended while it started: {GUARD}") from None
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The number of the process; None where it is not ours."""
        return None if self._process is None else self._process.pid

    def connect(self) -> SocketBroker:
        """Another client, which does not end the process when it is closed."""
        return SocketBroker(self.address, self._key)

    def put(self, message: Message) -> None:
        link = self._link()
        with _gone():
            link.sendall(PUT + packed(message))
            _exactly(link, 1)

    def get(self, timeout: float) -> Delivery | None:
        link = self._link()
        with _gone():
            link.sendall(GET + _TIMEOUT.pack(_seconds(timeout)))
            if _exactly(link, 1) == NOTHING:
                return None
            (number,) = _NUMBER.unpack(_exactly(link, _NUMBER.size))
            return Delivery(read(lambda count: _exactly(link, count)), number)

    def ack(self, delivery: Delivery) -> None:
        with _gone():
            self._link().sendall(ACK + _NUMBER.pack(delivery.number))

    def close(self) -> None:
        """End this client's connections, and the process if it was started by this one. What is got by nobody is lost."""
        with self._lock:
            self._closed = True
            sockets, self._sockets = self._sockets, []
        for _, one in sockets:
            _hang_up(one)
        if self._process is not None:
            self._alive.close()
            self._process.join(ENDING)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _link(self) -> socket.socket:
        with self._lock:
            if self._closed:
                raise Closed("the broker was closed")
        link: socket.socket | None = getattr(self._local, "link", None)
        if link is None:
            with _gone():
                link = socket.create_connection(self.address, STARTING)
                link.settimeout(None)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link.sendall(self._key)
            with self._lock:
                if self._closed:  # meanwhile: nobody else would close it
                    _hang_up(link)
                    raise Closed("the broker was closed")
                ended = [one for one in self._sockets if not one[0].is_alive()]
                for one in ended:
                    _hang_up(one[1])
                    self._sockets.remove(one)
                self._sockets.append((threading.current_thread(), link))
            self._local.link = link
        return link


def _hang_up(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, Broken) as error:
        raise Closed(f"the broker is gone ({type(error).__name__})") from None


def _exactly(link: socket.socket, count: int) -> bytes:
    found = bytearray(count)
    view, place = memoryview(found), 0
    while place < count:
        taken = link.recv_into(view[place:])
        if not taken:
            raise EOFError("the connection ended")
        place += taken
    return bytes(found)


def _seconds(timeout: float) -> float:
    return checks.number("timeout", timeout, low=0, high=LONGEST)


class _Client(socketserver.BaseRequestHandler):
    """A connection of the broker's process. The bytes of a message are kept as they came; nothing of them is interpreted."""

    def handle(self) -> None:
        link: socket.socket = self.request
        line, key = self.server.line, self.server.key  # type: ignore[attr-defined]
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine: set[int] = set()
        try:
            if not hmac.compare_digest(_exactly(link, KEY), key):
                return
            while True:
                kind = _exactly(link, 1)
                if kind == PUT:
                    line.put(packed(read(lambda count: _exactly(link, count))))
                    link.sendall(TAKEN)
                elif kind == ACK:
                    (number,) = _NUMBER.unpack(_exactly(link, _NUMBER.size))
                    mine.discard(number)
                    line.ack(number)
                elif kind == GET:
                    (timeout,) = _TIMEOUT.unpack(_exactly(link, _TIMEOUT.size))
                    found = line.get(min(max(timeout, 0.0), LONGEST))
                    if found is None:
                        link.sendall(NOTHING)
                        continue
                    mine.add(found[0])
                    link.sendall(TAKEN + _NUMBER.pack(found[0]) + found[1])
                else:
                    return
        except (OSError, EOFError, Broken, Closed):
            return
        finally:
            line.back(mine)


class _Listening(socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size = True, 64

    def __init__(self, key: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Client)
        self.line, self.key = _Line(), key


def _serve(alive: Any, key: bytes) -> None:
    """The broker's process: serve until the other end of `alive` is closed. Ctrl-C is for its parent, who closes that end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _Listening(key) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        alive.send_bytes(struct.pack("<H", server.server_address[1]))
        with contextlib.suppress(EOFError, OSError):
            alive.recv_bytes()
        server.line.close()
        server.shutdown()


# ------------------------------------------------------------------------------------------------------------------ a log on disk


class LogBroker:
    """A file that is only appended to, and a second one that says how much of it was done: what is durable, at a price.

    At least once: `put` returns when the message is on disk (fsync), and after a crash everything behind the last message up to which
    all were acknowledged is got again, in order. A message whose end was not written is cut off when the log is opened again.
    `fsync=False` leaves writing to the operating system: a crash of the process then loses nothing, one of the machine may. One
    process has a log at a time, of which nothing is ever deleted. What cannot be written, on a full disk, raises OSError and leaves both
    files as they were: the message is not there, and the broker goes on. Raises Broken for a file that is no log, or damaged elsewhere than
    at its end, and ValueError for a folder whose log is open already.
    """

    def __init__(self, folder: Path | str, *, fsync: bool = True) -> None:
        self.folder, self.fsync = Path(folder), checks.flag("fsync", fsync)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._owner = FileLock(self.folder / "lock", thread_local=False)
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"folder must hold a log that nobody has open, got {self.folder}") from None
        self._lock = threading.Lock()
        self._line = _Line()
        self._log = open(self.folder / "log", "a+b", buffering=0)  # noqa: SIM115  closed in close()
        self._done = open(self.folder / "done", "a+b", buffering=0)  # noqa: SIM115
        try:
            self.committed = self._read_done()
            self._acked: set[int] = set()
            self._recover()
        except BaseException:
            self._log.close()
            self._done.close()
            self._owner.release()
            raise

    def put(self, message: Message) -> None:
        data = packed(message)
        with self._lock:
            if self._log.closed:
                raise Closed("the broker was closed")
            self._append(self._log, data)
            self._line.put(message)

    def get(self, timeout: float) -> Delivery | None:
        found = self._line.get(_seconds(timeout))
        return None if found is None else Delivery(found[1], found[0])

    def ack(self, delivery: Delivery) -> None:
        """Note on disk how many messages from the beginning are done, if this one makes that more."""
        with self._lock:
            if self._done.closed:
                raise Closed("the broker was closed")
            self._line.ack(delivery.number)
            if delivery.number >= self.committed:
                self._acked.add(delivery.number)
            done = self.committed
            while done in self._acked:
                done += 1
            if done > self.committed:
                self._append(self._done, _NUMBER.pack(done))
                self._acked.difference_update(range(self.committed, done))
                self.committed = done

    def close(self) -> None:
        self._line.close()
        with self._lock:
            self._log.close()
            self._done.close()
            self._owner.release()

    def _append(self, file: Any, data: bytes) -> None:
        """All of it, on disk, or nothing."""
        place = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            if self.fsync:
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(place)
            raise

    def _read_done(self) -> int:
        size = self._done.seek(0, os.SEEK_END) // _NUMBER.size * _NUMBER.size
        self._done.truncate(size)  # half a number is none
        if not size:
            return 0
        self._done.seek(size - _NUMBER.size)
        return int(_NUMBER.unpack(self._done.read(_NUMBER.size))[0])

    def _recover(self) -> None:
        place = 0
        with open(self.folder / "log", "rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(0)
            while place < end:
                try:
                    message = read(log.read)
                except CutOff:  # the last message was being written
                    break
                except Broken as error:
                    raise Broken(f"{self.folder / 'log'}, byte {place}: {error}") from None
                place = log.tell()
                if self._line.count < self.committed:
                    self._line.count += 1  # done: it is not kept
                else:
                    self._line.put(message)
        if self.committed > self._line.count:
            raise Broken(f"{self.folder / 'done'}: {self.committed} messages were done of {self._line.count}")
        if place < end:
            self._log.truncate(place)


def drain(
    broker: Broker, first: Delivery, size: int, tau: float, stop: Callable[[], bool] = lambda: False
) -> list[Delivery]:
    """`first` and what follows it, until there are `size`, `tau` seconds have passed, or `stop()` says so."""
    found, last = [first], time.monotonic() + tau
    while len(found) < size:
        left = last - time.monotonic()
        more = broker.get(min(max(left, 0.0), POLL))
        if more is not None:
            found.append(more)
        elif left <= POLL or stop():
            break
    return found
