"""Sleeping while nobody waits: contexts in a queue, taken up one at a time when the server says that it has nothing to do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from assay import checks
from assay.methods.serving.sleep_time_compute.agent import SleepTimeAgent
from assay.methods.serving.sleep_time_compute.chat import address

ASKING = "assay_requests_in_progress"
"""The server's gauge of requests that are read, wait or are answered."""


class IdleSleeper:
    """Prepares contexts with an agent whenever `idle()` is true: the hook for a serving loop.

    Call `step` from where the loop has nothing to do, or `run` in a thread of its own. A sleep that has begun is not broken off when
    a request comes. Contexts are taken in the order they came, each once; one that fails, of whatever error, is kept in `failed` with
    it and not tried again unless it is added again. After Ctrl-C the context that was slept over waits again. With `warm`, the server
    then reads what the questions will begin with. What `idle` raises goes through.
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
        except Exception as error:  # a full disk, a server that is gone: the others are slept over all the same
            self.failed[context] = error
        except BaseException:
            with self._lock:
                self._waiting[context] = None
                self._waiting.move_to_end(context, last=False)
            raise
        else:
            self.failed.pop(context, None)
        return True

    def run(self, stop: threading.Event, *, every: float = 0.05) -> None:
        """Step until `stop` is set, looking every so many seconds whether there is something to do."""
        every = checks.number("every", every, above=0)
        while not stop.is_set():
            if not self.step():
                stop.wait(every)


def server_idle(base_url: str, *, api_key: str | None = None, timeout: float = 5.0) -> Callable[[], bool]:
    """An `idle` for `assay serve` at `base_url` (".../v1"): whether its metrics say that no request is being answered.

    A server that cannot be reached, or says that it cannot answer (status 5xx), is not idle. Raises ValueError for an address that is
    none and for a timeout that is not above 0; what it returns raises ConnectionError for a server that refuses (a wrong or missing
    key), and for one whose metrics do not tell: it would never be idle, and nobody would know why.
    """
    import httpx

    timeout = checks.number("timeout", timeout, above=0)
    url = address(base_url).removesuffix("/v1") + "/metrics"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def idle() -> bool:
        try:
            response = httpx.get(url, headers=headers, timeout=timeout)
        except httpx.HTTPError:
            return False
        if response.is_server_error:
            return False
        if response.status_code != 200:
            raise ConnectionError(f"{url} answered {response.status_code}: {response.text[:300]}")
        found = [line.split(" ")[1:] for line in response.text.splitlines() if line.startswith(ASKING + " ")]
        if len(found) != 1 or not found[0][0].isdecimal():
            raise ConnectionError(f"{url} does not tell {ASKING}: sleeping in idle time needs assay serve")
        return int(found[0][0]) == 0

    return idle
