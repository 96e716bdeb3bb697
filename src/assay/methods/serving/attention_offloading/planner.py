"""Which devices, how many of each, and how many requests at once: the cheapest tokens of a price table, within a latency bound.

    plans = plan(LLAMA3_70B, DEVICES, context=8192, latency=0.1)
    best_split(plans), best_whole(plans)

Everything is modelled (`costs`); `simulated` replays requests of different lengths through a plan, event by event.
When NOT to use it: for models whose steps are not those of a dense decoder, or to choose between engines: what devices reach is an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from assay import checks
from assay.methods.core.fleet.hardware import Device
from assay.methods.core.fleet.simulator import Simulated, simulate
from assay.methods.core.fleet.traces import Request
from assay.methods.serving.attention_offloading.costs import Setup, Split, System, Whole, server
from assay.methods.serving.attention_offloading.traffic import Shape

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """A system at its best number of requests within the bound: seconds a token, tokens a second, dollars an hour."""

    system: System
    requests: int
    seconds: float
    price: float

    @property
    def tokens_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def tokens_per_dollar(self) -> float:
        """Infinite where devices cost nothing."""
        return 3600 * self.tokens_per_second / self.price if self.price else float("inf")

    @property
    def name(self) -> str:
        """How it is written in reports: "2 H100 + 4 H20, 2 batches"."""
        system = self.system
        if isinstance(system, Whole):
            return f"{system.count} {system.device.name}"
        compute = f"{system.replicas * system.compute_count} {system.compute.name}"
        return f"{compute} + {system.memory_count} {system.memory.name}, {system.batches} batch{'es' * (system.batches > 1)}"


def at_best(system: System, context: int, *, latency: float | None = None) -> Plan | None:
    """The system with as many requests of `context` tokens as fit and keep a token within `latency` seconds; None if none do.

    More requests never make fewer tokens a second but for the last, unevenly shared ones, so that the largest even number is tried too.
    """
    context = checks.whole("context", context, low=1)
    bound = checks.number("latency", latency, above=0) if latency is not None else float("inf")
    low, high = 0, system.room(context)
    while low < high:  # the most requests within the bound
        middle = (low + high + 1) // 2
        if system.step(middle, float(middle) * context).seconds <= bound:
            low = middle
        else:
            high = middle - 1
    even = (
        system.batches * (system.memory_count if system.partition == "rows" else 1) if isinstance(system, Split) else 1
    )
    plans = []
    for requests in {low, low - low % even} - {0}:
        seconds = system.step(requests, float(requests) * context).seconds
        plans.append(Plan(system, requests, seconds, system.price))
    return max(plans, key=lambda found: found.tokens_per_second, default=None)


def systems(
    shape: Shape,
    devices: Iterable[Device],
    *,
    counts: Sequence[int] = COUNTS,
    batches: Sequence[int] = (1, 2, 3),
    setup: Setup | None = None,
) -> Iterator[System]:
    """Every system of these devices: each kind alone, and each pair of kinds, a kind with itself included."""
    setup, known = setup or Setup(), tuple(devices)
    for device in known:
        for count in counts:
            if shape.kv_heads % count == 0:
                yield Whole(shape, device, count, setup)
    for compute in known:
        for memory in known:
            for a in counts:
                if shape.heads % a == 0:
                    for b in counts:
                        for n in batches:
                            yield Split(shape, compute, a, memory, b, n, setup)


def plan(
    shape: Shape,
    devices: Iterable[Device],
    context: int,
    *,
    latency: float | None = None,
    price: float | None = None,
    counts: Sequence[int] = COUNTS,
    batches: Sequence[int] = (1, 2, 3),
    setup: Setup | None = None,
) -> list[Plan]:
    """All systems that hold the model and a request of `context` tokens, each at its best, the most tokens for a dollar first.

    `latency` bounds the seconds a token takes, `price` the dollars an hour. An empty list says that nothing fits. Raises ValueError for
    numbers out of range.

    >>> from assay.methods.serving.attention_offloading.costs import DEVICES, LLAMA3_70B
    >>> found = plan(LLAMA3_70B, DEVICES, context=8192, price=45.0)
    >>> found[0].tokens_per_dollar >= found[-1].tokens_per_dollar
    True
    """
    most = checks.number("price", price, above=0) if price is not None else float("inf")
    for count in counts:
        checks.whole("counts", count, low=1)
    found = [
        best
        for system in systems(shape, devices, counts=counts, batches=batches, setup=setup)
        if system.price <= most and (best := at_best(system, context, latency=latency)) is not None
    ]
    return sorted(found, key=lambda one: -one.tokens_per_dollar)


def best_whole(plans: Iterable[Plan], device: Device | None = None) -> Plan | None:
    """The first plan of devices of one kind that do all work (`device`: of that kind)."""
    whole = ((one, one.system) for one in plans if isinstance(one.system, Whole))
    return next((one for one, system in whole if device is None or system.device == device), None)


def best_split(plans: Iterable[Plan], *, same: bool = False) -> Plan | None:
    """The first plan of two pools of different kinds of devices; with `same`, of one kind: what splitting alone is worth."""
    split = ((one, one.system) for one in plans if isinstance(one.system, Split))
    return next((one for one, system in split if (system.compute == system.memory) == same), None)


def simulated(system: System, requests: Sequence[Request], *, clients: int | None = None) -> Simulated:
    """The requests through the system, event by event; `clients` as in `core.fleet.simulator.simulate`.

    Their prompts' keys and values are there when they come: prefill is not part of it. Raises ValueError for a system without room.
    """
    return simulate(requests, [server("system", system)], clients=clients)
