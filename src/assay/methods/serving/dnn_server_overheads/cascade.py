"""Two models behind each other: what the first finds in an image, 0 to k things, goes over a broker to the second.

with Cascade(detect, classify, QueueBroker(), size=16, tau=0.002) as cascade:
    labels = cascade.submit(image).result()     # one for each thing found, in the order of `detect`; [] for none
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.dnn_server_overheads.brokers import POLL, Broker, Closed, Delivery, drain
from assay.methods.serving.dnn_server_overheads.profiler import Lifetime, StageProfiler
from assay.methods.serving.dnn_server_overheads.wire import Message, size_of

PENDING = ...  # an answer that is not there yet


@dataclass(eq=False)
class _Request:
    answers: list[Any]
    missing: int
    life: Lifetime
    done: Future[list[Any]]


class Cascade:
    """`detect(image) -> arrays` in the thread that submits, `classify(arrays) -> answers` in a thread of its own, a broker between.

    Up to `size` things, of whatever images, are classified together, the first waiting `tau` seconds at most. A thing that a broker
    delivers twice is answered once; one of a request that nobody waits for (of an earlier run, where the broker is durable) is acknowledged
    and left. Where a batch fails, its things are classified alone; an image one of whose things fails is answered with the error. If the
    broker is lost, so are all images under way, and `submit` raises from then on. `sent` counts bytes of things handed over.
    The borders of an image are "detect", "hand over" (until all its things but the last are with the broker), and "broker and classify"
    (giving the last to the broker, and until all are answered). The broker is the caller's to close, after this.
    """

    def __init__(
        self,
        detect: Callable[[Any], Sequence[np.ndarray]],
        classify: Callable[[list[np.ndarray]], Sequence[Any]],
        broker: Broker,
        *,
        size: int = 16,
        tau: float = 0.002,
        profiler: StageProfiler | None = None,
    ) -> None:
        self.detect, self.classify, self.broker = detect, classify, broker
        self.size, self.tau = checks.whole("size", size, low=1), checks.number("tau", tau, low=0)
        self.profiler = StageProfiler() if profiler is None else profiler
        self.sent = self.things = 0
        self._requests: dict[int, _Request] = {}
        self._lock = threading.Lock()
        self._next, self._closed = 0, False
        self._lost: BaseException | None = None
        self._run = int(np.random.default_rng().integers(1 << 62))  # tells this run's things from an earlier one's
        self._thread = threading.Thread(target=self._loop, name="assay-classifier", daemon=True)
        self._thread.start()

    def __enter__(self) -> Cascade:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, image: Any) -> Future[list[Any]]:
        """Answer an image: the list of its things' answers. What `detect` raises is the answer's error, but for Ctrl-C. Raises Closed after
        `close`."""
        if self._closed or self._lost is not None:
            raise Closed("the cascade was closed" if self._closed else f"the broker was lost: {self._lost}")
        life, done = self.profiler.begin(), Future[list[Any]]()
        done.set_running_or_notify_cancel()
        try:
            things = self.detect(image)
            life.mark("detect")
        except Exception as error:
            done.set_exception(error)
            return done
        if not len(things):
            self.profiler.end(life)
            done.set_result([])
            return done
        request = _Request([PENDING] * len(things), len(things), life, done)
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._requests[number] = request
            self.things += len(things)
            self.sent += sum(size_of(thing) for thing in things)
        try:
            for index, thing in enumerate(things):
                if index == len(things) - 1:
                    with self._lock:  # the border is noted before the other thread can note the next
                        life.mark("hand over")
                self.broker.put(Message({"run": self._run, "request": number, "thing": index}, thing))
        except Exception as error:
            self._fail(number, error)
        except BaseException as stopped:  # Ctrl-C
            self._fail(number, stopped)
            raise
        if self._closed or self._lost is not None:  # meanwhile: nobody else will answer
            self._fail(number, Closed("the cascade was closed, or its broker lost"))
        return done

    def close(self) -> None:
        """End the thread; images that are not answered yet are answered with Closed."""
        self._closed = True
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._fail_all(Closed("the cascade was closed"))

    def _loop(self) -> None:
        try:
            while not self._closed:
                first = self.broker.get(POLL)
                if first is not None:
                    self._classify(drain(self.broker, first, self.size, self.tau, lambda: self._closed))
        except BaseException as error:
            self._lost = error
            self._fail_all(error)

    def _classify(self, deliveries: list[Delivery]) -> None:
        ours = [one for one in deliveries if self._wanted(one)]
        if ours:
            self._answer(ours)
        for one in deliveries:
            self.broker.ack(one)

    def _wanted(self, delivery: Delivery) -> bool:
        """Whether somebody waits for a thing. What is no thing of a cascade is refused by leaving it."""
        meta = delivery.message.meta
        request = self._requests.get(meta.get("request", -1)) if meta.get("run") == self._run else None
        return request is not None and request.answers[meta["thing"]] is PENDING

    def _answer(self, deliveries: list[Delivery]) -> None:
        try:
            answers = self.classify([np.asarray(one.message.data) for one in deliveries])
            if len(answers) != len(deliveries):
                raise ValueError(f"classify must give {len(deliveries)} answers, got {len(answers)}")
        except BaseException as error:
            if len(deliveries) == 1:
                self._fail(deliveries[0].message.meta["request"], error)
                return
            for one in deliveries:
                self._answer([one])
            return
        for one, answer in zip(deliveries, answers, strict=True):
            self._give(one.message.meta["request"], one.message.meta["thing"], answer)

    def _give(self, number: int, index: int, answer: Any) -> None:
        with self._lock:
            request = self._requests.get(number)
            if request is None or request.answers[index] is not PENDING:
                return
            request.answers[index] = answer
            request.missing -= 1
            if request.missing:
                return
            del self._requests[number]
            request.life.mark("broker and classify")
        self.profiler.end(request.life)
        request.done.set_result(request.answers)

    def _fail(self, number: int, error: BaseException) -> None:
        with self._lock:
            request = self._requests.pop(number, None)
        if request is not None:
            with contextlib.suppress(Exception):
                request.done.set_exception(error)

    def _fail_all(self, error: BaseException) -> None:
        for number in list(self._requests):
            self._fail(number, error)
