"""Where the time of an answer goes inside `assay serve`: a life for every group of tokens, from its request or the group before it.

Nothing of the server is changed: its parts are watched from outside, by the calls between them. The first tokens of an answer have
the stages receive (the body, and waiting for the reading thread), tokenise (with checking the request), hand over (to the scheduler),
queue (until a place and memory are there), prefill (steps of other answers between its pieces included), choose, wake (until the event
loop takes them), detokenise, and send (until the last byte was handed to the system). Those after it begin when the
ones before were chosen: wait (other answers' prompts, mostly), step (shared by all rows of the batch), choose, wake, detokenise, send. The
last three run beside the next step, so that lives overlap: they add up to more than the answer took.

    dissection = Dissection()
    app = dissection.around(create_app(models))
    dissection.watch(models.load("m", folder))

How long first and later tokens took in all, without stages, `/metrics` counts always. Marking costs some microseconds a token; who does not
ask for it pays nothing.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.methods.serving.dnn_server_overheads import Lifetime, StageProfiler, write_spans
from assay.methods.serving.dnn_server_overheads.profiler import clock
from assay.server.engine import Engine

FIRST, NEXT = "first", "next"
"""What the names of lives end with."""
MOST = 50_000  # lives kept, the newest: some 100 MB of memory, and a file that `read_spans` takes


@dataclass(eq=False)
class _Journey:
    """A request under way, and the lives of its answers' tokens that were not sent yet."""

    began: float
    unsent: list[Lifetime] = field(default_factory=list)


@dataclass(frozen=True)
class _Told:
    """What the scheduler's thread knew when it told of tokens."""

    at: float
    admitted: float  # the row whose prompt was run last
    start: float  # and end of the backend's last call
    end: float
    rows: int


_JOURNEY: contextvars.ContextVar[_Journey | None] = contextvars.ContextVar("journey", default=None)


class Dissection:
    """Watches engines and an application; `profiler` keeps the newest `MOST` lives.

    A request that was being read when its engine came to be watched has none, and neither have those of models that nobody asked to be
    watched (what clients load).
    """

    def __init__(self) -> None:
        self.profiler = StageProfiler(most=MOST)

    def around(self, app: Any) -> Any:
        """The application, with the bytes of its answers watched."""

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            journey = _Journey(clock())
            token = _JOURNEY.set(journey)

            async def send_on(message: Any) -> None:
                await send(message)
                if message["type"] == "http.response.body":
                    for life in journey.unsent:
                        _border(life, "send", clock())
                        self.profiler.end(life)
                    journey.unsent.clear()

            try:
                await app(scope, receive, send_on)
            finally:
                _JOURNEY.reset(token)

        return watched

    def watch(self, engine: Engine) -> None:
        """Note when an engine's parts are called. Before its first request."""
        watch: Any = _Watch(engine, self.profiler)
        engine.prepare = watch.prepare  # type: ignore[method-assign]
        engine.start = watch.start  # type: ignore[method-assign]
        engine.scheduler.submit = watch.submit  # type: ignore[method-assign]
        engine.scheduler.backend = watch.backend

    def write(self, path: Path | str) -> None:
        """Write what was seen as a Chrome trace, which `dnn_server_overheads.read_spans` reads too."""
        write_spans(self.profiler.lifetimes(), path)


def _border(life: Lifetime, stage: str, at: float, batch: int = 1) -> None:
    """A border, never before the last one: a twin's prompt may have been run before it was submitted."""
    life.mark(stage, at=max(at, life.last), batch=batch)


class _Backend:
    """A backend whose calls are timed, all in the scheduler's thread."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._admitted: dict[int, float] = {}
        self.latest = (0.0, 0.0, 0.0, 1)  # admitted, start, end and rows of the last call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def begin(self, *given: Any) -> Any:
        at = clock()
        sequence = self._real.begin(*given)
        self._admitted[id(sequence)] = at
        return sequence

    def end(self, sequence: Any) -> None:
        self._admitted.pop(id(sequence), None)
        self._real.end(sequence)

    def prefill(self, sequence: Any, *given: Any) -> Any:
        start = clock()
        logits = self._real.prefill(sequence, *given)
        self.latest = (self._admitted.get(id(sequence), start), start, clock(), 1)
        return logits

    def verify(self, *given: Any) -> Any:
        start = clock()
        logits = self._real.verify(*given)
        self.latest = (start, start, clock(), 1)
        return logits

    def run(self, sequences: Any, *given: Any, **named: Any) -> Any:
        start, rows = clock(), len(sequences)
        answers = self._real.run(sequences, *given, **named)
        self.latest = (start, start, clock(), rows)
        return answers


class _Watch:
    """The watched calls of an engine."""

    def __init__(self, engine: Engine, profiler: StageProfiler) -> None:
        self.profiler = profiler
        self._prepare, self._start, self._submit = engine.prepare, engine.start, engine.scheduler.submit
        self.backend = _Backend(engine.scheduler.backend)
        self._told: list[tuple[float, deque[_Told]]] | None = None  # of the answers being submitted, in the event loop

    def prepare(self, *given: Any) -> Any:
        start = clock()
        job = self._prepare(*given)
        vars(job)["prepared"] = (start, clock())
        return job

    def start(self, job: Any) -> Any:
        journey = _JOURNEY.get()
        if journey is None or "prepared" not in vars(job):  # it came before anybody watched
            return self._start(job)
        told: list[tuple[float, deque[_Told]]] = []
        self._told = told
        try:
            running = self._start(job)
        finally:
            self._told = None
        for answer, (submitted, pending) in zip(running._answers, told, strict=True):
            watched = _taking(answer.take, journey, vars(job)["prepared"], submitted, pending, self.profiler)
            vars(answer)["take"] = watched
        return running

    def submit(self, ids: Any, settings: Any, on_event: Callable[[Any], None]) -> Any:
        pending: deque[_Told] = deque()

        def tell(event: Any) -> None:
            pending.append(_Told(clock(), *self.backend.latest))
            on_event(event)

        if self._told is None:
            return self._submit(ids, settings, on_event)
        self._told.append((clock(), pending))
        return self._submit(ids, settings, tell)


def _taking(
    take: Callable[[Any], Any],
    journey: _Journey,
    prepared: tuple[float, float],
    submitted: float,
    pending: deque[_Told],
    profiler: StageProfiler,
) -> Callable[[Any], Any]:
    """An answer's `take`, which makes text of tokens, with the lives of those tokens."""
    before = 0.0

    def watched(events: Any) -> Any:
        nonlocal before
        taken = clock()
        piece = take(events)
        made = clock()
        for event in events:
            told = pending.popleft()
            if not event.tokens:
                continue
            if not before:
                life = profiler.begin(FIRST, at=journey.began)
                _border(life, "receive", prepared[0])
                _border(life, "tokenise", prepared[1])
                _border(life, "hand over", submitted)
                _border(life, "queue", told.admitted)
                _border(life, "prefill", told.end)
            else:
                life = profiler.begin(f"{NEXT} {len(event.tokens)}", at=before)
                _border(life, "wait", told.start)
                _border(life, "step", told.end, told.rows)
            _border(life, "choose", told.at)
            _border(life, "wake", taken)
            _border(life, "detokenise", made)
            before = told.at
            journey.unsent.append(life)
        return piece

    return watched
