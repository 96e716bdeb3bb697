"""Memory devices that are processes of this machine: payloads lie in shared memory, a few bytes through a pipe say that they are there.

    with AttentionWorkers(2) as pool:
        decoder = SplitDecoder(model, pool)
        ...

That is the shape of the paper's network path (payloads are written where the other side reads them, and a doorbell is rung), over this
machine's memory. A slower link is imitated by sleeping, which takes no processor time: what lies in shared memory counts as arrived no
earlier than latency + bytes / bandwidth after it was sent, one message after the other, each way by itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import struct
import time
import traceback
import weakref
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Self

import torch
import torch.multiprocessing
from torch import Tensor

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.fleet.hardware import Link
from assay.methods.serving.attention_offloading.costs import Partition
from assay.methods.serving.attention_offloading.holder import Holder, Spec
from assay.methods.serving.attention_offloading.pool import Pool

STARTING, ENDING = 120.0, 5.0  # seconds that a worker has to start, and to end by itself
SLOT_BYTES = 8 << 20
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPEN, FILL, ASK, GIVE, WHOLE, REWIND, CLOSE, PATHS, STOP = range(9)
HEADER = struct.Struct("<BBHBIIIIIIqdd")
"""Kind, slot, layer, dtype; rows, heads, key-value heads, tokens, dim, value dim; a number; scale; when it has arrived."""
DONE = struct.Struct("<BBHddddddd")
"""Status, slot, layer; when the query had arrived, earlier tokens were begun and done, key and value had arrived, the newest was begun and
done, and the output arrives."""
ACK, ANSWER, FAILED = range(3)


class WorkerLost(RuntimeError):
    """A memory device is gone, and with it the keys and values it held; `SplitDecoder.restore` computes them again elsewhere."""


class _Wire:
    """One way of a link: when a message that is sent now has arrived."""

    def __init__(self, link: Link | None) -> None:
        self.link, self._free = link, 0.0

    def arrival(self, size: int) -> float:
        now = time.perf_counter()
        if self.link is None:
            return now
        start = max(now, self._free)
        self._free = start + size / self.link.bandwidth
        return self._free + self.link.latency


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


class _Slots:
    """Where in the shared memory a slot's query, keys, values and output lie: a quarter of the slot each."""

    def __init__(self, memory: Tensor, slots: int) -> None:
        self.memory, self.quarter = memory, memory.numel() // slots // 4

    def view(self, slot: int, part: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > self.quarter:
            raise ValueError(
                f"slot_bytes must be at least {4 * size} for messages of {size} bytes, got {4 * self.quarter}"
            )
        start = (4 * slot + part) * self.quarter
        return self.memory[start : start + size].view(dtype).view(shape)


QUERY, KEYS, VALUES, OUTPUT = range(4)


class AttentionWorkers(Pool):
    """`count` processes that hold keys and values and attend, each with `threads` threads. Use it in a `with` statement, or call `close`.

    `slots` batches can be open at once; `slot_bytes` holds a batch's messages (query, keys, values and output have a quarter each; prompts
    are handed over in pieces). `link` imitates a slower link to each worker. A worker that raises, one that gives no answer within
    `timeout` seconds and one that dies end all of them, with RuntimeError, TimeoutError and `WorkerLost`. They also end with this process.

    When NOT to use it: at the top level of a script without `if __name__ == "__main__"`, which starting processes would run again.
    """

    def __init__(
        self,
        count: int = 1,
        *,
        partition: Partition = "heads",
        threads: int = 1,
        slots: int = 2,
        slot_bytes: int = SLOT_BYTES,
        link: Link | None = None,
        timeout: float = 120.0,
    ) -> None:
        super().__init__(count, partition, slots)
        checks.whole("slots", slots, high=255)
        threads = checks.whole("threads", threads, low=1)
        room = checks.whole("slot_bytes", slot_bytes, low=1024) // 256 * 256
        self.timeout = checks.number("timeout", timeout, above=0)
        context = torch.multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._pollers: list[Any] = []
        self._slots: list[_Slots] = []
        self._wires: list[_Wire] = []
        self._done: dict[tuple[int, int, int], tuple[float, ...]] = {}
        self._sent: dict[
            tuple[int, int], tuple[float, float]
        ] = {}  # (device, slot): when query, and key and value, were sent
        self._shapes: dict[tuple[int, int], tuple[int, int, int, torch.dtype]] = {}  # of the output
        self._finalizer = weakref.finalize(self, _end, self._processes, self._connections)
        try:
            for number in range(self.count):
                memory = torch.zeros(room * self.slots, dtype=torch.uint8).share_memory_()
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=serve, args=(theirs, memory, self.slots, threads), daemon=True, name=f"assay-memory-{number}"
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
                poller = select.poll()
                poller.register(ours.fileno(), select.POLLIN)
                self._pollers.append(poller)
                self._slots.append(_Slots(memory, self.slots))
            self.set_link(link)
            for number in range(self.count):
                self._receive(number, max(STARTING, self.timeout))
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

    def set_link(self, link: Link | None) -> None:
        """Imitate another link from now on; None: none."""
        self.link, self._wires = link, [_Wire(link) for _ in range(self.count)]

    def paths(self) -> dict[str, int]:
        """Which path the workers' attention took, and how often."""
        found: dict[str, int] = {}
        for device in range(self.count):
            self._send(device, HEADER.pack(PATHS, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0))
            message = self._expect(device, ACK)
            for name, times in json.loads(message[1:]).items():
                found[name] = found.get(name, 0) + times
        return found

    def close(self, *, at_once: bool = False) -> None:
        """End the processes; `at_once` without waiting for what they are doing. Nothing happens a second time."""
        if at_once:
            for process in self._processes:
                process.terminate()
        self._batches.clear()
        self._finalizer()

    # ----------------------------------------------------------------------------------------------------------- messages

    def _open(self, device: int, slot: int, spec: Spec) -> None:
        text = json.dumps({"starts": spec.starts, "windows": spec.windows, "tokens": spec.tokens}).encode()
        self._send(device, HEADER.pack(OPEN, slot, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0) + text)

    def _fill(self, device: int, slot: int, layer: int, keys: Tensor, values: Tensor, dropped: int) -> None:
        place = self._slots[device]
        column = max(math.prod(x.shape[:2]) * x.shape[3] * x.element_size() for x in (keys, values))
        step = place.quarter // column
        if not step:
            raise ValueError(f"slot_bytes must be at least {4 * column} for keys of {column} bytes a token")
        for first in range(0, keys.shape[2], step):
            piece = keys[:, :, first : first + step], values[:, :, first : first + step]
            self._put(device, FILL, slot, layer, None, *piece, number=dropped, scale=0.0)
            self._expect(device, ACK)

    def _ask(self, device: int, slot: int, layer: int, query: Tensor, scale: float) -> None:
        sent = time.perf_counter()
        self._put(device, ASK, slot, layer, query, None, None, number=0, scale=scale)
        self._sent[device, slot] = (sent, sent)

    def _give(self, device: int, slot: int, layer: int, key: Tensor, value: Tensor) -> None:
        sent = time.perf_counter()
        self._put(device, GIVE, slot, layer, None, key, value, number=0, scale=0.0)
        self._sent[device, slot] = (self._sent[device, slot][0], sent)

    def _whole(
        self, device: int, slot: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> None:
        sent = time.perf_counter()
        self._put(device, WHOLE, slot, layer, query, key, value, number=0, scale=scale)
        self._sent[device, slot] = (sent, sent)

    def _take(self, device: int, slot: int, layer: int) -> Tensor:
        key = (device, slot, layer)
        if (device, slot) not in self._sent:
            raise ValueError(f"nothing was asked of layer {layer} in slot {slot}")
        while key not in self._done:
            self._expect(device, ANSWER)
        times, (asked, given) = self._done.pop(key), self._sent.pop((device, slot))
        rows, heads, dim, dtype = self._shapes[device, slot]
        _sleep_until(times[-1])
        found = self._slots[device].view(slot, OUTPUT, (rows, heads, 1, dim), dtype).clone()
        if self.timeline is not None:
            query_there, first, second, given_there, third, last, arrived = times
            for lane, start, end in (
                (f"link {device} out", asked, query_there),
                (f"link {device} out", given, given_there),
                (f"memory {device}", first, second),
                (f"memory {device}", third, last),
                (f"link {device} back", last, max(arrived, last)),
            ):
                if end > start:
                    self.timeline.add(lane, start, end, slot, layer)
        return found

    def _rewind(self, device: int, slot: int, tokens: int) -> None:
        self._send(device, HEADER.pack(REWIND, slot, 0, 0, 0, 0, 0, 0, 0, 0, tokens, 0.0, 0.0))
        self._expect(device, ACK)

    def _close(self, device: int, slot: int) -> None:
        self._send(device, HEADER.pack(CLOSE, slot, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0))
        self._expect(device, ACK)
        self._sent.pop((device, slot), None)
        for key in [key for key in self._done if key[:2] == (device, slot)]:  # answers that nobody took
            del self._done[key]

    def _put(
        self,
        device: int,
        kind: int,
        slot: int,
        layer: int,
        query: Tensor | None,
        keys: Tensor | None,
        values: Tensor | None,
        *,
        number: int,
        scale: float,
    ) -> None:
        """Write the tensors that there are into the slot and say so."""
        place, size = self._slots[device], 0
        rows = heads = shared = tokens = dim = value_dim = 0
        dtype = torch.float32
        for part, tensor in ((QUERY, query), (KEYS, keys), (VALUES, values)):
            if tensor is not None:
                place.view(slot, part, tuple(tensor.shape), tensor.dtype).copy_(tensor)
                size, dtype = size + tensor.nbytes, tensor.dtype
                if part == QUERY:
                    rows, heads, _, dim = tensor.shape
                else:
                    rows, shared, tokens, width = tensor.shape
                    dim, value_dim = (width, value_dim) if part == KEYS else (dim, width)
        if dtype not in DTYPES:
            raise TypeError(f"messages must hold {', '.join(map(str, DTYPES))}, got {dtype}")
        if kind in (ASK, WHOLE):
            self._shapes[device, slot] = (rows, heads, dim, dtype)
        if kind in (GIVE, WHOLE):
            known = self._shapes[device, slot]
            self._shapes[device, slot] = (*known[:2], value_dim, known[3])
        arrival = time.perf_counter() if kind == FILL else self._wires[device].arrival(size)
        code = DTYPES.index(dtype)
        header = (kind, slot, layer, code, rows, heads, shared, tokens, dim, value_dim, number, scale, arrival)
        self._send(device, HEADER.pack(*header) + self._way_back(kind))

    def _way_back(self, kind: int) -> bytes:
        """What a worker has to know to imitate the link for its output."""
        if kind not in (GIVE, WHOLE) or self.link is None:
            return b""
        return struct.pack("<dd", self.link.bandwidth, self.link.latency)

    # ----------------------------------------------------------------------------------------------------------- the pipe

    def _send(self, device: int, message: bytes) -> None:
        if not self._connections:
            raise ValueError("the workers were ended: make new ones")
        try:
            self._connections[device].send_bytes(message)
        except OSError:
            self._lost(device)

    def _receive(self, device: int, seconds: float) -> bytes:
        if not self._pollers[device].poll(1e3 * seconds):
            self.close(at_once=True)
            raise TimeoutError(f"memory worker {device} gave no answer within {seconds:g} s")
        try:
            message = self._connections[device].recv_bytes()
        except (EOFError, OSError):
            self._lost(device)
        if message[0] == FAILED:
            self.close(at_once=True)
            raise RuntimeError(f"memory worker {device} failed:\n{message[1:].decode()}")
        return message

    def _expect(self, device: int, status: int) -> bytes:
        """The next message of that kind; answers that come before it are kept."""
        while True:
            message = self._receive(device, self.timeout)
            if message[0] == ANSWER:
                _, slot, layer, *times = DONE.unpack(message)
                self._done[device, slot, layer] = tuple(times)
            if message[0] == status:
                return message

    def _lost(self, device: int) -> NoReturn:
        process = self._processes[device]
        process.join(ENDING)
        code = process.exitcode
        self.close(at_once=True)
        raise WorkerLost(f"memory worker {device} died (exit code {code}), and with it the keys and values it held")


def _end(processes: list[Any], connections: list[Connection]) -> None:
    """Ask the processes to end, then make them."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send_bytes(HEADER.pack(STOP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0))
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


# ------------------------------------------------------------------------------------------------------------------ a worker


def serve(connection: Connection, memory: Tensor, slots: int, threads: int) -> None:
    """A worker's life: answer messages until there are none, or nobody is there to send any."""
    torch.set_num_threads(threads)
    place, holder = _Slots(memory, slots), Holder()
    asked: dict[tuple[int, int], tuple[float, float, float]] = {}
    wire: _Wire | None = None
    connection.send_bytes(bytes([ACK]))
    with torch.inference_mode():
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                return
            head = HEADER.unpack_from(message)
            if head[0] == STOP:
                return
            if head[0] in (GIVE, WHOLE) and len(message) > HEADER.size:
                link = Link(*struct.unpack_from("<dd", message, HEADER.size))
                if wire is None or wire.link != link:
                    wire = _Wire(link)
            elif head[0] in (GIVE, WHOLE):
                wire = None
            try:
                answer = _answer(holder, place, head, message[HEADER.size :], asked, wire)
            except Exception:
                answer = bytes([FAILED]) + traceback.format_exc().encode()
            if answer:
                try:
                    connection.send_bytes(answer)
                except OSError:
                    return


def _answer(
    holder: Holder,
    place: _Slots,
    head: tuple[Any, ...],
    rest: bytes,
    asked: dict[tuple[int, int], tuple[float, float, float]],
    wire: _Wire | None,
) -> bytes:
    """What a worker does with a message, and what it says; nothing where nobody waits for it."""
    kind, slot, layer, code, rows, heads, shared, tokens, dim, value_dim, number, scale, arrival = head
    dtype = DTYPES[code]
    if kind == OPEN:
        told = json.loads(rest)
        holder.open(slot, Spec(tuple(told["starts"]), tuple(told["windows"]), told["tokens"]))
        return b""
    if kind == CLOSE:
        holder.close(slot)
        return bytes([ACK])
    if kind == REWIND:
        holder.rewind(slot, number)
        return bytes([ACK])
    if kind == PATHS:
        return bytes([ACK]) + json.dumps(kernels.paths()).encode()
    query = place.view(slot, QUERY, (rows, heads, 1, dim), dtype) if heads else None
    keys = values = None
    if shared:
        keys = place.view(slot, KEYS, (rows, shared, tokens, dim), dtype)
        values = place.view(slot, VALUES, (rows, shared, tokens, value_dim), dtype)
    if kind == FILL:
        assert keys is not None
        assert values is not None
        holder.fill(slot, layer, keys, values, number)
        return bytes([ACK])
    _sleep_until(arrival)
    begun = time.perf_counter()
    there = min(arrival, begun)
    if kind == ASK:
        assert query is not None
        holder.ask(slot, layer, query, scale)
        asked[slot, layer] = (there, begun, time.perf_counter())
        return b""
    assert keys is not None
    assert values is not None
    if kind == GIVE:
        output = holder.give(slot, layer, keys, values)
        times = asked.pop((slot, layer))
    else:
        assert query is not None
        output = holder.whole(slot, layer, query, keys, values, scale)
        times = (there, begun, begun)
    place.view(slot, OUTPUT, tuple(output.shape), output.dtype).copy_(output)
    done = time.perf_counter()
    arrived = done if wire is None else wire.arrival(output.nbytes)
    return DONE.pack(ANSWER, slot, layer, *times, there, begun, done, arrived)
