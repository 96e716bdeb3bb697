"""A vision server without a network: JPEGs in, answers out, every stage's borders noted.

with Pipeline(network, Preprocess(precision="uint8"), size=8, tau=0.002, workers=2) as pipeline:
    answers = [pipeline.submit(image) for image in images]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.dnn_server_overheads.batcher import Batcher
from assay.methods.serving.dnn_server_overheads.preprocess import Preprocess
from assay.methods.serving.dnn_server_overheads.profiler import Lifetime, StageProfiler
from assay.methods.serving.dnn_server_overheads.workers import Workers

INFERENCE = "inference"


class Busy(RuntimeError):
    """As many requests are in flight as the pipeline takes: come again later, or go to another one."""


class Refused(ValueError):
    """An image that cannot be prepared: no JPEG, too large, an array of another shape. What the network raises is never this."""


class Pipeline:
    """Prepares images, batches them and has the network answer: `network(batch) -> answers`, one for each row of the batch.

    `workers` processes prepare images; with 0 it is done in the thread that submits. `size` and `tau` are the batcher's; at most
    `in_flight` requests are there at a time. `finish` makes of the network's answer what is returned. `submit` takes a JPEG's bytes,
    or an array that was prepared before (of `preprocess.shape` and precision), which goes to the batcher at once.
    Raises ValueError or TypeError for numbers out of range. `profiler` keeps the lives of what was answered without an error.

    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (80, 60), "white").save(file, "JPEG")
    >>> with Pipeline(lambda batch: batch.mean((1, 2, 3)).tolist(), Preprocess(8, precision="uint8")) as pipeline:
    ...     pipeline.submit(file.getvalue()).result()
    255.0
    >>> [span.stage for span in pipeline.profiler.lifetimes()[0].spans]
    ['decode', 'resize', 'normalise', 'queue', 'inference', 'post-process']
    """

    def __init__(
        self,
        network: Callable[[np.ndarray], Sequence[Any]],
        preprocess: Preprocess,
        *,
        size: int = 8,
        tau: float = 0.002,
        workers: int = 0,
        in_flight: int = 256,
        finish: Callable[[Any], Any] | None = None,
        profiler: StageProfiler | None = None,
    ) -> None:
        checks.whole("workers", workers, low=0)
        self.network, self.preprocess, self.finish = network, preprocess, finish
        self.profiler = StageProfiler() if profiler is None else profiler
        self.in_flight = checks.whole("in_flight", in_flight, low=1)
        self._places = threading.BoundedSemaphore(self.in_flight)
        self.workers = Workers(preprocess, workers) if workers else None
        try:
            self.batcher = Batcher(self._infer, size=size, tau=tau)
        except BaseException:
            if self.workers is not None:
                self.workers.close()
            raise

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End workers and batcher; what they had not begun is answered with an error."""
        if self.workers is not None:
            self.workers.close()
        self.batcher.close()

    def submit(self, image: bytes | np.ndarray, life: Lifetime | None = None) -> Future[Any]:
        """Answer an image. Everything wrong with it is the answer's error: Refused, TypeError for what is neither bytes nor array, or what
        the network raises. Raises Busy where too many are in flight, and KeyboardInterrupt where Ctrl-C comes while it is prepared in
        this thread.

        `life`, where given, was begun by the caller, who ends it too.
        """
        if not self._places.acquire(blocking=False):
            raise Busy(f"{self.in_flight} requests are in flight")
        own, answer = life is None, Future[Any]()
        lived = self.profiler.begin() if life is None else life
        answer.set_running_or_notify_cancel()  # it cannot be taken back: its place is free when it is answered

        def end(result: Any, error: BaseException | None) -> None:
            if own and error is None:
                self.profiler.end(lived)
            self._places.release()
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        def inferred(done: Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                end(None, error)
                return
            try:
                found = done.result() if self.finish is None else self.finish(done.result())
                lived.mark("post-process")
            except BaseException as failed:
                end(None, failed)
                return
            end(found, None)

        def prepared(done: Future[np.ndarray]) -> None:
            error = done.exception()
            if isinstance(error, ValueError):
                error = Refused(str(error))
            try:
                if error is None:
                    self.batcher.submit(done.result(), lived).add_done_callback(inferred)
            except BaseException as failed:
                error = failed
            if error is not None:
                end(None, error)

        if self.workers is not None and not isinstance(image, np.ndarray):
            try:
                self.workers.submit(image, lived, prepared)
            except BaseException as failed:
                end(None, failed)
            return answer
        ready: Future[np.ndarray] = Future()
        try:
            ready.set_result(self._checked(image) if isinstance(image, np.ndarray) else self.preprocess(image, lived))
        except Exception as failed:
            ready.set_exception(failed)
        except BaseException as stopped:
            end(None, stopped)
            raise
        prepared(ready)
        return answer

    def _checked(self, image: np.ndarray) -> np.ndarray:
        wanted, dtype = self.preprocess.shape, np.dtype(self.preprocess.precision)
        if image.shape != wanted or image.dtype != dtype:
            raise ValueError(f"image must be {dtype} of shape {wanted}, got {image.dtype} of {image.shape}")
        return image

    def _infer(self, images: list[np.ndarray]) -> Sequence[Any]:
        return self.network(images[0][None] if len(images) == 1 else np.stack(images))
