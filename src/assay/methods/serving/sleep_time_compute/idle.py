"""Sleeping while nobody waits: contexts in a queue, taken up one at a time when the server says that it has nothing to do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from assay import checks
from assay.methods.serving.sleep_time_compute.agent import SleepError, SleepTimeAgent

ASKING = "assay_requests_in_progress"
"""The server's gauge of requests that are read, wait or are answered."""


class IdleSleeper:
    """Prepares contexts with an agent whenever `idle()` is true: the hook for a serving loop.

    Call `step` from where the loop has nothing to do, or `run` in a thread of its own. A sleep that has begun is not broken off when
    a request comes. Contexts are taken in the order they came, each once; one that fails is kept in `failed` with its error and not
    tried again. With `warm`, the server then reads what the questions will begin with.
    Raises TypeError for what is no agent and no function.
    """

    def __init__(self, agent: SleepTimeAgent, idle: Callable[[], bool], *, warm: bool = False) -> None:
        if not isinstance(agent, SleepTimeAgent):
            raise TypeError(f"agent must be a SleepTimeAgent, got {checks.shown(agent)}")
        if not callable(idle):
            raise TypeError(f"idle must be a function, got {checks.shown(idle)}")
        self.agent, self.idle, self.warm = agent, idle, checks.flag("warm", warm)
        self.failed: dict[str, Exception] = {}
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many contexts wait."""
        with self._lock:
            return len(self._waiting)

    def add(self, context: str) -> None:
        """Put a context at the end of the queue, unless it waits there already."""
        if not isinstance(context, str):
            raise TypeError(f"context must be text, got {checks.shown(context)}")
        with self._lock:
            self._waiting[context] = None

    def step(self) -> bool:
        """Sleep over the next context if nobody needs the server; whether it did."""
        if not self.idle():
            return False
        with self._lock:
            if not self._waiting:
                return False
            context, _ = self._waiting.popitem(last=False)
        try:
            self.agent.prepare(context)
            if self.warm:
                self.agent.warm(context)
        except (SleepError, ConnectionError, ValueError) as error:
            self.failed[context] = error
        return True

    def run(self, stop: threading.Event, *, every: float = 0.05) -> None:
        """Step until `stop` is set, looking every so many seconds whether there is something to do."""
        every = checks.number("every", every, above=0)
        while not stop.is_set():
            if not self.step():
                stop.wait(every)


def server_idle(base_url: str, *, timeout: float = 5.0) -> Callable[[], bool]:
    """An `idle` for `assay serve` at `base_url` (".../v1"): whether its metrics say that no request is being answered.

    A server that cannot be reached is not idle. Raises ValueError for a timeout that is not above 0.
    """
    import httpx

    timeout = checks.number("timeout", timeout, above=0)
    url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"

    def idle() -> bool:
        try:
            response = httpx.get(url, timeout=timeout)
            response.raise_for_status()
        except httpx.HTTPError:
            return False
        busy = [line.rpartition(" ")[2] for line in response.text.splitlines() if line.startswith(ASKING)]
        return bool(busy) and all(float(value) == 0 for value in busy)

    return idle
