"""The dynamic batcher: requests wait until there are enough of them, or the oldest has waited long enough."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from assay import checks
from assay.methods.serving.dnn_server_overheads.profiler import UNSEEN, Lifetime


class Stopped(RuntimeError):
    """The batcher was closed: it takes nothing more, and what it had not begun ends with this."""


@dataclass(eq=False)
class _Waiting:
    item: Any
    life: Lifetime
    answer: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs `run(items) -> answers` over at most `size` items at a time, in a thread of its own.

    A batch begins when there are `size` items, or the oldest has waited `tau` seconds, or when the batch before it ends, if that is
    later. So none waits longer than `tau` and the time of one batch, while no more come than are run. Items are run and
    answered in the order in which they were submitted. Where a batch of several fails, its items are run alone, so that only those are
    answered with an error that fail by themselves; `run` is then called more than once for an item, whose life has the borders "queue" and
    "inference" once more. A `run` that gives too few or too many answers has failed. `sizes` counts the batches that ran to their end, and
    the items that failed alone, by size.

    >>> with Batcher(lambda items: [2 * item for item in items], size=4, tau=0.01) as batcher:
    ...     [answer.result() for answer in [batcher.submit(i) for i in range(6)]]
    [0, 2, 4, 6, 8, 10]
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], *, size: int, tau: float) -> None:
        self.run = run
        self.size = checks.whole("size", size, low=1)
        self.tau = checks.number("tau", tau, low=0)
        self.sizes: dict[int, int] = {}
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="assay-batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, item: Any, life: Lifetime = UNSEEN) -> Future[Any]:
        """Queue an item. Its life gets the borders "queue" (until its batch begins) and "inference". Raises Stopped after `close`."""
        waiting = _Waiting(item, life)
        with self._changed:
            if self._closed:
                raise Stopped("the batcher was closed")
            self._queue.append(waiting)
            if len(self._queue) in (1, self.size):  # only then is there anything to decide
                self._changed.notify()
        return waiting.answer

    def close(self) -> None:
        """Take nothing more, end the batch that runs, answer the others with Stopped, and return."""
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for waiting in left:
            if waiting.answer.set_running_or_notify_cancel():
                waiting.answer.set_exception(Stopped("the batcher was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        while (batch := self._next()) is not None:
            wanted = [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]
            if wanted:
                self._run(wanted)

    def _next(self) -> list[_Waiting] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            last = self._queue[0].since + self.tau
            while len(self._queue) < self.size and not self._closed and (left := last - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                return None
            return [self._queue.popleft() for _ in range(min(self.size, len(self._queue)))]

    def _run(self, batch: list[_Waiting]) -> None:
        for waiting in batch:
            waiting.life.mark("queue")
        try:
            answers = self._answers([waiting.item for waiting in batch])
        except BaseException as error:
            self._mark(batch)
            if len(batch) == 1:
                self._count(batch)
                batch[0].answer.set_exception(error)
                return
            for waiting in batch:
                self._run([waiting])
            return
        self._mark(batch)
        self._count(batch)
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.answer.set_result(answer)

    def _answers(self, items: list[Any]) -> Sequence[Any]:
        answers = self.run(items)
        if len(answers) != len(items):
            raise ValueError(f"run must give an answer for each of {len(items)} items, got {len(answers)}")
        return answers

    def _count(self, batch: list[_Waiting]) -> None:
        self.sizes[len(batch)] = self.sizes.get(len(batch), 0) + 1

    def _mark(self, batch: list[_Waiting]) -> None:
        now = time.monotonic()
        for waiting in batch:
            waiting.life.mark("inference", at=max(now, waiting.life.last), batch=len(batch))
