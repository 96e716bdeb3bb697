"""Several fine-tuned variants of one model behind one scheduler: the backend whose batches cross models, and each model's door to it.

Variants come and go while it runs: `Variants.join` and `Variants.leave` make the shared model anew around the tensors that are there, and
hand it to the backend between two passes. The memory of who leaves is freed, but for what others share.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from assay.methods.core.generation.paged import Sequence
from assay.methods.serving.blockllm import SharedModel, Zoo
from assay.server.backends import TorchBackend
from assay.server.rows import Event, Settings
from assay.server.scheduler import Scheduler, Stats, Stopped, Ticket


class ZooBackend(TorchBackend):
    """`TorchBackend` over a `SharedModel`: the rows of a batch may be of any of its models.

    A row is of the model that its settings name (`Settings.tenant`). Beginnings of prompts are not shared between rows.
    """

    name = "zoo"

    def __init__(self, shared: SharedModel, *, kv_gib: float | None = None, positions: int | None = None) -> None:
        self.shared, self._pass = shared, threading.Lock()
        shared.use([shared.names[0]])  # for the passes that look at what the model is
        super().__init__(shared.model, kv_gib=kv_gib, positions=positions, reason=_reason(shared))

    def exchange(self, shared: SharedModel) -> None:
        """Serve these models from the next pass on; those that a row under way is of must be among them."""
        with self._pass:
            self.reason = self.reason.replace(_reason(self.shared), _reason(shared), 1)
            self.shared, self.model = shared, shared.model

    def begin(self, pages: list[int], length: int = 0, tenant: str = "") -> Sequence:
        sequence: Any = super().begin(pages, length)
        sequence.tenant = tenant or self.shared.names[0]
        made: Sequence = sequence
        return made

    def _use(self, sequences: list[Any]) -> None:
        """Whose the rows are. One whose model has left was cancelled, and takes part in the pass that is about to begin for nothing."""
        known = self.shared.chains
        self.shared.use([one.tenant if one.tenant in known else self.shared.names[0] for one in sequences])

    def _alone(self, sequence: Any, ids: Any, keep: int) -> Any:
        with self._pass:
            self._use([sequence])
            return super()._alone(sequence, ids, keep)

    def _together(self, sequences: list[Any], tokens: list[int]) -> Any:
        with self._pass:
            self._use(sequences)
            return super()._together(sequences, tokens)


def _reason(shared: SharedModel) -> str:
    count = len(shared.names)
    return f"{count} model{'s' * (count > 1)} share{'s' * (count == 1)} {'their' if count > 1 else 'its'} blocks"


class Variants:
    """The models of a zoo, one scheduler for all of them (`options` are its), and a door for each.

    `closed` once the last door is: then nothing can join. Raises what `SharedModel` and `ZooBackend` raise.
    """

    def __init__(self, zoo: Zoo, *, kv_gib: float | None = None, positions: int | None = None, **options: Any) -> None:
        self.zoo, self.closed = zoo, False
        self.backend = ZooBackend(SharedModel(zoo), kv_gib=kv_gib, positions=positions)
        self.scheduler = Scheduler(self.backend, **options)
        self._lock = threading.Lock()
        self._open = {name: Door(self, name) for name in zoo.chains}

    def doors(self) -> dict[str, Door]:
        """Those that are open, by model."""
        return dict(self._open)

    def join(self, name: str, add: Callable[[Zoo], Any]) -> Door:
        """Let a model in that `add` puts into the zoo under this name. Raises what `add` raises, ValueError for a model that is not in
        the zoo's form, and Stopped when all others have left. The zoo is as it was then.
        """
        with self._lock:
            if self.closed:
                raise Stopped("the models that shared blocks have been unloaded")
            add(self.zoo)
            try:
                self.backend.exchange(SharedModel(self.zoo))
            except BaseException:
                self.zoo.remove(name)
                raise
            door = self._open[name] = Door(self, name)
            return door

    def closing(self, door: Door) -> bool:
        """Whether this was the last open door."""
        with self._lock:
            self._open.pop(door.tenant, None)
            self.closed = self.closed or not self._open
            return self.closed

    def leave(self, tenant: str) -> None:
        """Forget a model whose rows have ended."""
        with self._lock:
            if not self.closed and tenant in self.zoo.chains:
                self.zoo.remove(tenant)
                self.backend.exchange(SharedModel(self.zoo))


class _Ticket:
    """A row of one door."""

    def __init__(self, door: Door, tell: Callable[[Event], None]) -> None:
        self.door, self.tell = door, tell
        self.told = self.over = False
        self.row: Ticket | None = None

    def cancel(self) -> None:
        """As the scheduler's ticket."""
        if self.row is not None:
            self.row.cancel()
        self.door._ended(self, "cancelled")


class Door:
    """One model's side of a scheduler that several share: what an engine asks of a scheduler.

    Closing a door ends its own rows; the last that is closed stops the scheduler.
    """

    def __init__(self, variants: Variants, tenant: str) -> None:
        self.variants, self.tenant = variants, tenant
        self.scheduler, self.backend = variants.scheduler, variants.backend
        self._rows: set[_Ticket] = set()
        self._counts: Counter[str] = Counter()
        self._closed = False
        self._change = threading.Condition()

    def submit(self, ids: list[int], settings: Settings, on_event: Callable[[Event], None]) -> _Ticket:
        """As the scheduler's, for a row of this door's model. Raises what that raises, and Stopped once the door is closed."""
        ticket = _Ticket(self, on_event)

        def tell(event: Event) -> None:
            with self._change:  # nobody is told anything after the end
                if ticket.over:
                    return
                if not ticket.told and event.error is None:
                    ticket.told = True
                    self._counts["prompt_tokens"] += len(ids)
                self._counts["generated_tokens"] += len(event.tokens)
                if event.finish is not None or event.error is not None:
                    self._ended(ticket, "failed" if event.error is not None else "finished")
                on_event(event)

        with self._change:  # or the door might be closed between the question and the answer
            if self._closed:
                raise Stopped("the model is being unloaded")
            ticket.row = self.scheduler.submit(ids, replace(settings, tenant=self.tenant), tell)
            self._rows.add(ticket)
            self._counts["submitted"] += 1
        return ticket

    def _ended(self, ticket: _Ticket, how: str) -> None:
        with self._change:
            if not ticket.over:
                ticket.over = True
                self._rows.discard(ticket)
                self._counts[how] += 1
                self._change.notify_all()

    def stop(self, *, drain_s: float = 0.0) -> None:
        """Take nothing more, let this model's rows end within `drain_s` seconds, end the rest with Stopped, and leave the zoo."""
        with self._change:
            again, self._closed = self._closed, True
        if again:
            return
        if self.variants.closing(self):
            self.scheduler.stop(drain_s=drain_s)
            return
        with self._change:
            self._change.wait_for(lambda: not self._rows, timeout=drain_s)
            for ticket in list(self._rows):
                assert ticket.row is not None
                ticket.row.cancel()
                self._ended(ticket, "failed")
                ticket.tell(Event(error=Stopped("the model was unloaded")))
        self.variants.leave(self.tenant)

    def stats(self) -> Stats:
        """What this model's rows are and have come to. What has no owner (room, steps, batches, preemptions) is of all models together."""
        with self._change:
            counts, rows = dict(self._counts), [ticket.row for ticket in self._rows if ticket.row is not None]
        running = sum(row.running for row in rows)
        names = ("submitted", "finished", "cancelled", "failed", "prompt_tokens", "generated_tokens")
        own: dict[str, Any] = {name: counts.get(name, 0) for name in names}
        return replace(self.scheduler.stats(), waiting=len(rows) - running, running=running, **own)
