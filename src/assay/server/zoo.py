"""Several fine-tuned variants of one model behind one scheduler: the backend whose batches cross models, and each model's door to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from assay.methods.core.generation.paged import Sequence
from assay.methods.serving.blockllm import SharedModel
from assay.server.backends import TorchBackend
from assay.server.rows import Event, Settings
from assay.server.scheduler import Scheduler, Stats, Stopped, Ticket


class ZooBackend(TorchBackend):
    """`TorchBackend` over a `SharedModel`: the rows of a batch may be of any of its models.

    A row is of the model that its settings name (`Settings.tenant`). Beginnings of prompts are not shared between rows.
    """

    name = "zoo"

    def __init__(self, shared: SharedModel, *, kv_gib: float | None = None, positions: int | None = None) -> None:
        self.shared = shared
        shared.use([shared.names[0]])  # for the passes that look at what the model is
        super().__init__(
            shared.model, kv_gib=kv_gib, positions=positions, reason=f"{len(shared.names)} models share their blocks"
        )

    def begin(self, pages: list[int], length: int = 0, tenant: str = "") -> Sequence:
        sequence: Any = super().begin(pages, length)
        sequence.tenant = tenant or self.shared.names[0]
        made: Sequence = sequence
        return made

    def _alone(self, sequence: Any, ids: Any, keep: int) -> Any:
        self.shared.use([sequence.tenant])
        return super()._alone(sequence, ids, keep)

    def _together(self, sequences: list[Any], tokens: list[int]) -> Any:
        self.shared.use([sequence.tenant for sequence in sequences])
        return super()._together(sequences, tokens)


class _Ticket:
    """A row of one door."""

    def __init__(self, door: Door) -> None:
        self.door, self.over = door, False
        self.row: Ticket | None = None

    def cancel(self) -> None:
        """As the scheduler's ticket."""
        if self.row is not None:
            self.row.cancel()
        self.door._forget(self)


class Door:
    """One model's side of a scheduler that several share: what an engine asks of a scheduler.

    Closing a door ends its own rows; the last that is closed stops the scheduler.
    """

    def __init__(self, scheduler: Scheduler, tenant: str, doors: set[Door]) -> None:
        self.scheduler, self.tenant, self.backend = scheduler, tenant, scheduler.backend
        self._doors, self._lock = doors, threading.Lock()
        self._open: set[_Ticket] = set()
        self._closed = False
        self._ended = threading.Condition(self._lock)
        doors.add(self)

    def submit(self, ids: list[int], settings: Settings, on_event: Callable[[Event], None]) -> _Ticket:
        """As the scheduler's, for a row of this door's model. Raises what that raises, and Stopped once the door is closed."""
        with self._lock:
            if self._closed:
                raise Stopped("the model is being unloaded")
        ticket = _Ticket(self)

        def tell(event: Event) -> None:
            if event.finish is not None or event.error is not None:
                self._forget(ticket)
            on_event(event)

        row = self.scheduler.submit(ids, replace(settings, tenant=self.tenant), tell)
        with self._lock:
            ticket.row = row
            if not ticket.over:
                self._open.add(ticket)
        return ticket

    def _forget(self, ticket: _Ticket) -> None:
        with self._ended:
            ticket.over = True
            self._open.discard(ticket)
            self._ended.notify_all()

    def stop(self, *, drain_s: float = 0.0) -> None:
        """Take nothing more, let this model's rows end within `drain_s` seconds, cancel the rest."""
        with self._ended:
            self._closed = True
            self._doors.discard(self)
            last = not self._doors
            if not last:
                self._ended.wait_for(lambda: not self._open, timeout=drain_s)
                left = list(self._open)
        if last:
            self.scheduler.stop(drain_s=drain_s)
            return
        for ticket in left:
            ticket.cancel()

    def stats(self) -> Stats:
        """Those of the scheduler, which counts the rows of all its models together."""
        return self.scheduler.stats()
