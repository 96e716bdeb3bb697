"""Processes that decode, resize and normalise: what Pillow and NumPy do there holds up no thread of the server."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.dnn_server_overheads.preprocess import Preprocess
from assay.methods.serving.dnn_server_overheads.profiler import Lifetime, clock
from assay.methods.serving.dnn_server_overheads.wire import GUARD, Message, packed, unpacked

STARTING, ENDING = 60.0, 5.0  # seconds


class WorkerLost(RuntimeError):
    """A worker's process ended while it had a request. The request is answered with this, and another process takes the place."""


class Workers:
    """`count` processes that prepare images, each for one request at a time.

    A request goes to whichever is free. `submit` returns at once; the answer is the input, or what was wrong with the image. The borders
    of a request are "wait for a worker", "transfer" (until it is there), "decode", "resize", "normalise", and "transfer" once more (until
    it is back here). A script that makes them needs the guard `if __name__ == "__main__":`, as for all processes that are spawned.
    """

    def __init__(self, preprocess: Preprocess, count: int) -> None:
        self.preprocess, self.count = preprocess, checks.whole("count", count, low=1, high=256)
        self._jobs: queue.SimpleQueue[tuple[bytes, Lifetime, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        try:
            self._workers = [_Worker(preprocess) for _ in range(self.count)]
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            for worker in self._workers:
                worker.end()
            raise
        self._threads = [
            threading.Thread(target=self._loop, args=(number,), name=f"assay-worker-{number}", daemon=True)
            for number in range(self.count)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [worker.process.pid for worker in self._workers]

    def submit(
        self, data: bytes, life: Lifetime, done: Callable[[Future[np.ndarray]], Any] | None = None
    ) -> Future[np.ndarray]:
        """Have an image prepared; `done` is called with the answer in another thread. Raises RuntimeError after `close`."""
        answer: Future[np.ndarray] = Future()
        if done is not None:
            answer.add_done_callback(done)
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers were ended")
            self._jobs.put((data, life, answer))
        return answer

    def close(self) -> None:
        """Answer what waits, and end the processes."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.end()

    def _loop(self, number: int) -> None:
        while (job := self._jobs.get()) is not None:
            data, life, answer = job
            if not answer.set_running_or_notify_cancel():
                continue
            life.mark("wait for a worker")
            try:
                answer.set_result(self._workers[number].prepared(data, life))
            except WorkerLost as error:
                with contextlib.suppress(Exception):  # then the next request finds it lost, and tries again
                    self._workers[number].end()
                    self._workers[number] = _Worker(self.preprocess)
                    self._workers[number].wait_until_ready()
                answer.set_exception(error)
            except BaseException as error:
                answer.set_exception(error)


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, preprocess: Preprocess) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: Any = context.Process(
            target=_work, args=(theirs, asdict(preprocess)), daemon=True, name="assay-decoder"
        )
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        if not self.pipe.poll(STARTING):
            raise TimeoutError(f"a worker did not start within {STARTING:g} s")
        try:
            self._received()
        except WorkerLost:
            raise WorkerLost(f"a worker's process ended while it started: {GUARD}") from None

    def prepared(self, data: bytes, life: Lifetime) -> np.ndarray:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be a JPEG's bytes, got {type(data).__name__}")
        try:
            self.pipe.send_bytes(data)
        except OSError:
            raise WorkerLost("the worker's process ended") from None
        message = self._received()
        for stage, at in message.meta["borders"]:
            life.mark(stage, at=max(at, life.last))
        life.mark("transfer")
        if "error" in message.meta:
            raise ValueError(message.meta["error"])
        assert isinstance(message.data, np.ndarray)
        return message.data

    def _received(self) -> Message:
        try:
            return unpacked(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerLost("the worker's process ended") from None

    def end(self) -> None:
        self.pipe.close()
        self.process.join(ENDING)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe: Any, settings: dict[str, Any]) -> None:
    """A worker's life: prepare images until the other end of the pipe is closed. Ctrl-C is for its parent, who closes that end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preprocess = Preprocess(**settings)
    pipe.send_bytes(packed(Message({"borders": []})))
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        life = Lifetime(at=clock())
        told: dict[str, Any] = {}
        found: np.ndarray | bytes = b""
        try:
            found = preprocess(data, life)
        except Exception as error:
            told = {"error": str(error)[:1000]}
        told["borders"] = [["transfer", life.start], *([span.stage, span.end] for span in life.spans)]
        with contextlib.suppress(OSError):
            pipe.send_bytes(packed(Message(told, found)))
