"""Clients: closed loops, whose next request waits for the last answer, and open ones, whose requests come when they come.

A closed loop shows what a server can do; how long its users wait only an open one shows, since a slow answer does not hold up the next
arrival. Latency is from when a request was meant to be sent, so that a late generator cannot hide it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay import checks


@dataclass(frozen=True)
class Sample:
    """A request: when it was meant to be sent, when it was, when it was answered, and the error instead of an answer."""

    intended: float
    sent: float
    end: float
    error: str = ""

    @property
    def latency(self) -> float:
        return self.end - self.intended


@dataclass(frozen=True)
class Load:
    """What became of the requests, in the order they were meant to be sent."""

    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        return max(one.end for one in self.samples) - min(one.intended for one in self.samples)

    @property
    def throughput(self) -> float:
        """Answers a second, errors left out."""
        return sum(not one.error for one in self.samples) / self.seconds

    @property
    def late(self) -> float:
        """The longest that a request was sent after it was meant to be."""
        return max(one.sent - one.intended for one in self.samples)

    def latency(self, share: float) -> float:
        """That within which this share of the answered requests were. Raises ValueError where none was."""
        checks.number("share", share, low=0, high=1)
        answered = [one.latency for one in self.samples if not one.error]
        if not answered:
            raise ValueError("no request was answered")
        return float(np.quantile(answered, share))


Client = Callable[[Any], Any]


def closed_loop(make: Callable[[], Client], requests: Sequence[Any], concurrency: int) -> Load:
    """All requests by so many clients, each made by `make` and in a thread of its own; each sends when its last was answered."""
    checks.whole("concurrency", concurrency, low=1)
    return _drive(make, requests, [None] * len(requests), concurrency)


def open_loop(
    make: Callable[[], Client], requests: Sequence[Any], rate: float, *, seed: int = 0, clients: int = 32
) -> Load:
    """All requests at random times, `rate` a second on average (a Poisson process). Where all `clients` wait, the next is sent late, which
    counts: `late` shows it."""
    checks.number("rate", rate, above=0)
    chance = np.random.default_rng(checks.whole("seed", seed, low=0))
    times = np.cumsum(chance.exponential(1 / rate, len(requests))) if requests else np.zeros(0)
    return _drive(make, requests, [float(at) for at in times], checks.whole("clients", clients, low=1))


def _drive(make: Callable[[], Client], requests: Sequence[Any], times: Sequence[float | None], count: int) -> Load:
    if not requests:
        raise ValueError("requests must hold at least one")
    found: list[Sample | None] = [None] * len(requests)
    lock, place = threading.Lock(), 0
    clients = [make() for _ in range(min(count, len(requests)))]
    failed: list[BaseException] = []
    start = time.monotonic() + 0.01

    def run(client: Client) -> None:
        nonlocal place
        try:
            time.sleep(max(start - time.monotonic(), 0.0))
            while True:
                with lock:
                    number, place = place, place + 1
                if number >= len(requests):
                    return
                at = times[number]
                intended = time.monotonic() if at is None else start + at
                time.sleep(max(intended - time.monotonic(), 0.0))
                sent, error = time.monotonic(), ""
                try:
                    client(requests[number])
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"[:200]
                found[number] = Sample(intended, sent, time.monotonic(), error)
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return Load(tuple(sample for sample in found if sample is not None))
