"""Chains of blocks on several devices, event by event: who runs a block next, for which requests together, and who owns their caches.

    nodes = cluster(4, 3, memory=80e9)
    placement = place(models, rates, sizes, nodes)
    found = simulate_blocks(requests, models, placement, sizes, nodes, times)

A request's pass over its prompt, and each token after it, visits the blocks of its chain in order. A device runs one batch at a time: of
its queues (one a block) the one that is least far along its chains goes first, so that who is behind catches up and shares the next
block; only requests that wait for the same block are merged. Nothing here runs a model and nothing is drawn at random.
Per-model provisioning is the same simulation over chains that share no block (`apart`), each placed whole.
The cost rule and the placement are the dossier's form of the paper's; order within a device is our choice. Pipelining of a prompt's pieces,
speculation on a surrogate block and a limit of cache memory are left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from assay import checks
from assay.methods.core.fleet.hardware import Link
from assay.methods.core.fleet.traces import Request, Served

LOCAL = Link(bandwidth=2e11, latency=1e-5)
"""Between devices of one server: recalled from a server of A100s, a default to be replaced."""
REMOTE = Link(bandwidth=1.25e10, latency=5e-5)
"""Between servers: the 100 Gb/s of the paper's test bed (secondary source), the latency our choice."""
MOST_EVENTS = 20_000_000


@dataclass(frozen=True)
class Node:
    """A device: the server it is in, and bytes of memory for blocks."""

    name: str
    server: str
    memory: float

    def __post_init__(self) -> None:
        checks.number("memory", self.memory, above=0)


def cluster(servers: int, devices: int, *, memory: float) -> list[Node]:
    """`servers` servers of `devices` devices each.

    >>> [node.name for node in cluster(2, 1, memory=1e9)]
    ['0.0', '1.0']
    """
    return [
        Node(f"{s}.{d}", str(s), memory)
        for s in range(checks.whole("servers", servers, low=1))
        for d in range(checks.whole("devices", devices, low=1))
    ]


@dataclass(frozen=True)
class Model:
    """A model's blocks in order, by digest, which of them keep keys and values, and the bytes of a token that go between two of them."""

    blocks: tuple[str, ...]
    attention: tuple[bool, ...]
    hidden_bytes: float
    kv_bytes: float  # of a token in one of its attention blocks

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.attention):
            raise ValueError("blocks must be as many as attention says, at least one")
        checks.number("hidden_bytes", self.hidden_bytes, low=0)
        checks.number("kv_bytes", self.kv_bytes, low=0)


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that a batch takes in a block: `start` for any, `read` a byte of the block, and `work` a byte of it and token.

    >>> round(BlockTimes(start=1e-4, read=1e-9, work=1e-10).seconds(1e6, 10), 6)
    0.0021
    """

    start: float
    read: float
    work: float

    def __post_init__(self) -> None:
        for name in ("start", "read", "work"):
            checks.number(name, getattr(self, name), low=0)

    def seconds(self, size: float, tokens: int) -> float:
        return self.start + self.read * size + self.work * size * tokens


def fitted(passes: Sequence[tuple[float, float, float, float]]) -> BlockTimes:
    """The times that come nearest to measured passes, by least squares of the relative errors, none below 0.

    Each pass is (blocks run, their bytes, bytes times tokens, seconds). Raises ValueError for no passes.
    """
    if not passes:
        raise ValueError("passes must hold at least one measured pass")
    table = np.array(passes, dtype=float)
    if not (np.isfinite(table).all() and (table[:, 3] > 0).all()):
        raise ValueError("passes must be finite numbers with seconds above 0")
    scaled, best, least = table[:, :3] / table[:, 3:], np.zeros(3), np.inf
    for used in range(1, 8):  # every set of the three, the others 0
        columns = [i for i in range(3) if used >> i & 1]
        size = np.maximum(np.linalg.norm(scaled[:, columns], axis=0), 1e-300)
        solved = np.linalg.lstsq(scaled[:, columns] / size, np.ones(len(table)), rcond=None)[0] / size
        off = float(np.linalg.norm(scaled[:, columns] @ solved - 1))
        if (solved >= 0).all() and off < least - 1e-12:
            best, least = np.zeros(3), off
            best[columns] = solved
    return BlockTimes(*(float(x) for x in best))


# ------------------------------------------------------------------------------------------------------------- dispatching


@dataclass(frozen=True)
class Option:
    """What running a block on one device would cost a request, in seconds. `owner`: whether its keys and values lie there."""

    node: str
    owner: bool
    wait: float
    transfer: float
    move: float  # of its keys and values
    recompute: float  # the same made again there
    run: float

    @property
    def cache(self) -> float:
        return 0.0 if self.owner else min(self.move, self.recompute)

    @property
    def seconds(self) -> float:
        """wait + transfer + (0 for the owner, else the cheaper of moving and recomputing the cache) + run."""
        return self.wait + self.transfer + self.cache + self.run


def cheapest(options: Sequence[Option]) -> Option:
    """The option of the least cost; at equal cost the owner, then the first. Raises ValueError for none.

    >>> here = Option("a", True, 1.0, 0.0, 0.0, 0.0, 1.0)
    >>> cheapest([Option("b", False, 0.0, 0.0, 1.0, 9.0, 1.0), here]).node
    'a'
    """
    if not options:
        raise ValueError("options must hold at least one device")
    return min(options, key=lambda one: (one.seconds, not one.owner))


# --------------------------------------------------------------------------------------------------------------- placement

Placement = Mapping[str, Sequence[str]]
"""The devices that hold a block, by its digest."""


def apart(models: Mapping[str, Model]) -> dict[str, Model]:
    """The same models with no block in common: what per-model provisioning loads."""
    return {
        name: Model(
            tuple(f"{name}/{i}/{b}" for i, b in enumerate(one.blocks)), one.attention, one.hidden_bytes, one.kv_bytes
        )
        for name, one in models.items()
    }


def place(
    models: Mapping[str, Model],
    rates: Mapping[str, float],
    sizes: Mapping[str, float],
    nodes: Sequence[Node],
    *,
    whole: bool = False,
) -> dict[str, list[str]]:
    """Where blocks go, greedily. `rates` are requests a second of each model.

    First every block gets one device: models by rate, the busiest first, each block on the device of the one before it while there is
    room, else on the freest device of that server, else on the freest of all; so the heaviest edges of the graph stay short. Then the
    busiest device's load is shared: what it holds is copied to the least busy one with room, until nothing gets better. With `whole` a
    model's blocks stay together, as where whole models are provisioned. Load is rate times bytes. Raises ValueError where they do not
    fit, for a block without a size, devices of one name, and a rate below 0.
    """
    _require_sizes(models, sizes, nodes)
    for name, rate in rates.items():
        checks.number(f"rates[{name[:80]!r}]", rate, low=0)
    free = {node.name: node.memory for node in nodes}
    server = {node.name: node.server for node in nodes}
    held: dict[str, list[str]] = {}
    for name in sorted(models, key=lambda one: -rates.get(one, 0.0)):
        blocks = dict.fromkeys(models[name].blocks)
        new = [block for block in blocks if block not in held]
        if whole:
            need = sum(sizes[block] for block in new)
            at = max(free, key=lambda node: free[node])
            if free[at] < need:
                raise ValueError(f"nodes must have room for {name!r}, {need:.4g} bytes, the freest has {free[at]:.4g}")
            for block in new:
                held[block] = [at]
            free[at] -= need
            continue
        before = max(free, key=lambda node: free[node])
        for block in blocks:
            if block in held:
                before = held[block][0]
                continue
            at = before
            if free[at] < sizes[block]:
                near = [node for node in free if server[node] == server[before] and free[node] >= sizes[block]]
                at = max(near or free, key=lambda node: free[node])
            if free[at] < sizes[block]:
                raise ValueError(f"nodes must have room for every block, {sizes[block]:.4g} bytes are missing")
            held[block], before = [at], at
            free[at] -= sizes[block]
    _replicate(models, rates, sizes, free, held, whole)
    return held


def _replicate(
    models: Mapping[str, Model],
    rates: Mapping[str, float],
    sizes: Mapping[str, float],
    free: dict[str, float],
    held: dict[str, list[str]],
    whole: bool,
) -> None:
    """Copy blocks (whole models with `whole`) from the busiest device to the least busy one with room, while the busiest gets less busy."""
    flow: dict[str, float] = {}
    for name, one in models.items():
        for block in one.blocks:
            flow[block] = flow.get(block, 0.0) + rates.get(name, 0.0)
    units = [tuple(dict.fromkeys(one.blocks)) for one in models.values()] if whole else [(block,) for block in held]

    def load() -> dict[str, float]:
        found = dict.fromkeys(free, 0.0)
        for block, where in held.items():
            for node in where:
                found[node] += flow[block] * sizes[block] / len(where)
        return found

    while True:
        now = load()
        busiest = max(now, key=lambda node: now[node])
        best: tuple[float, tuple[str, ...], str] | None = None
        for unit in units:
            if busiest not in held[unit[0]]:
                continue
            need = sum(sizes[block] for block in unit)
            able = [node for node in free if free[node] >= need and node not in held[unit[0]]]
            if not able:
                continue
            to, count = min(able, key=lambda node: now[node]), len(held[unit[0]])
            share = sum(flow[block] * sizes[block] for block in unit)
            off, on = share / count - share / (count + 1), share / (count + 1)
            gain = off if now[to] + on < now[busiest] else 0.0
            if gain > (best[0] if best else 0.0):
                best = (gain, unit, to)
        if best is None:
            return
        for block in best[1]:
            held[block].append(best[2])
            free[best[2]] -= sizes[block]


def _require_sizes(models: Mapping[str, Model], sizes: Mapping[str, float], nodes: Sequence[Node]) -> None:
    if len({node.name for node in nodes}) != len(nodes) or not nodes:
        raise ValueError("nodes must be at least one, each with a name of its own")
    for block in dict.fromkeys(block for one in models.values() for block in one.blocks):
        if block not in sizes:
            raise ValueError(f"sizes must have every block, {block[:40]!r} is missing")
        checks.number(f"sizes[{block[:40]!r}]", sizes[block], low=0)


# -------------------------------------------------------------------------------------------------------------- simulation


@dataclass(eq=False)
class _Job:
    """One pass of a request, over its prompt or over one token."""

    request: Request
    number: int
    tokens: int
    context: int  # cached tokens before it
    made: int
    node: str = ""
    place: int = 0
    since: float = 0.0
    extra: float = 0.0  # seconds of recomputing its cache in the block it waits for
    first: float = 0.0
    owner: dict[int, str] = field(default_factory=dict)  # of its cache, by place


@dataclass(frozen=True)
class Visit:
    """A batch: the block, where and when it ran, and the numbers of its requests."""

    block: str
    node: str
    start: float
    end: float
    requests: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class BlockRun:
    """What came out. `owners` are those of each request's caches at its end, by place; `moves` are caches that changed hands, `recomputed`
    those of them that were made again."""

    served: tuple[Served, ...]
    visits: tuple[Visit, ...]
    owners: Mapping[int, Mapping[int, str]]
    moves: int
    recomputed: int

    @property
    def seconds(self) -> float:
        return max((one.end for one in self.served), default=0.0)

    def busy(self, node: str) -> float:
        """The share of the time in which a device worked."""
        worked = sum(visit.end - visit.start for visit in self.visits if visit.node == node)
        return min(worked / self.seconds, 1.0) if self.seconds else 0.0

    def quantile(self, q: float) -> float:
        """Of the seconds from a request to the end of its answer. Raises ValueError where no request was made."""
        if not self.served:
            raise ValueError("requests must hold at least one, got none")
        return float(np.quantile([one.e2e for one in self.served], q))

    def rows(self) -> float:
        """Requests a batch, on average."""
        return float(np.mean([len(visit.requests) for visit in self.visits])) if self.visits else 0.0


def idle_seconds(request: Request, model: Model, sizes: Mapping[str, float], times: BlockTimes) -> float:
    """A request's seconds on an idle device: its blocks one after the other, for the prompt and for every further token."""
    prompt = sum(times.seconds(sizes[block], request.prompt_tokens) for block in model.blocks)
    token = sum(times.seconds(sizes[block], 1) for block in model.blocks)
    return prompt + (request.new_tokens - 1) * token


def simulate_blocks(
    requests: Sequence[Request],
    models: Mapping[str, Model],
    placement: Placement,
    sizes: Mapping[str, float],
    nodes: Sequence[Node],
    times: BlockTimes,
    *,
    most: int = 64,
    local: Link = LOCAL,
    remote: Link = REMOTE,
) -> BlockRun:
    """Run all requests, whose `tenant` names their model, until the last is answered. `most` requests share a batch at most.

    Raises ValueError for a tenant without a model, a block without a device or a size, devices of one name, and more than 20 million
    events.
    """
    most = checks.whole("most", most, low=1)
    _require_sizes(models, sizes, nodes)
    server = {node.name: node.server for node in nodes}
    for request in requests:
        if request.tenant not in models:
            raise ValueError(f"tenant must be one of {', '.join(models)}, got {request.tenant!r}")
    for one in models.values():
        for block in one.blocks:
            if not placement.get(block) or any(node not in server for node in placement[block]):
                raise ValueError(
                    f"placement must name devices for every block, got {placement.get(block)} for {block[:40]!r}"
                )
    queues: dict[str, dict[str, list[_Job]]] = {node.name: {} for node in nodes}
    free_at = dict.fromkeys(server, 0.0)
    queued = dict.fromkeys(
        server, 0.0
    )  # seconds of work that waits there, without those that a batch takes for any tokens
    working: set[str] = set()
    events: list[tuple[float, int, str, object]] = []
    visits: list[Visit] = []
    served: list[Served] = []
    owners: dict[int, Mapping[int, str]] = {}
    counted = moves = recomputed = 0

    def push(at: float, kind: str, what: object) -> None:
        nonlocal counted
        counted += 1
        if counted > MOST_EVENTS:
            raise ValueError(f"requests must end within {MOST_EVENTS:,} events")
        heapq.heappush(events, (at, counted, kind, what))

    def link(a: str, b: str, size: float) -> float:
        if not a or a == b:
            return 0.0
        return (local if server[a] == server[b] else remote).seconds(size)

    def alone(job: _Job, block: str) -> float:
        return times.work * sizes[block] * job.tokens + job.extra

    def route(job: _Job, now: float) -> None:
        """To a device for the block at its place, by the cost rule."""
        nonlocal moves, recomputed
        one = models[job.request.tenant]
        block, size = one.blocks[job.place], sizes[one.blocks[job.place]]
        cached = one.attention[job.place] and job.context > 0
        owner = job.owner.get(job.place)
        options = []
        for node in placement[block]:
            mine = not cached or owner == node
            options.append(
                Option(
                    node,
                    mine,
                    wait=max(free_at[node] - now, 0.0) + queued[node],
                    transfer=link(job.node, node, one.hidden_bytes * job.tokens),
                    move=0.0 if mine else link(owner or "", node, one.kv_bytes * job.context),
                    recompute=0.0 if mine else times.work * size * job.context,
                    run=times.seconds(size, job.tokens),
                )
            )
        chosen = cheapest(options)
        delay, job.extra = chosen.transfer, 0.0
        if not chosen.owner:
            moves += 1
            if chosen.recompute < chosen.move:
                recomputed += 1
                job.extra = chosen.recompute
            else:
                delay += chosen.move
        if one.attention[job.place]:
            job.owner[job.place] = chosen.node
        job.node = chosen.node
        queued[chosen.node] += alone(job, block)
        push(now + delay, "queue", job)

    def start(node: str, now: float) -> None:
        """The next batch of an idle device: of the queue that is least far along, its oldest jobs."""
        waiting = {block: jobs for block, jobs in queues[node].items() if jobs}
        if not waiting:
            return
        block = min(waiting, key=lambda b: min((job.place, job.since, job.number) for job in waiting[b]))
        jobs = sorted(waiting[block], key=lambda job: (job.since, job.number))
        batch, queues[node][block] = jobs[:most], jobs[most:]
        tokens = sum(job.tokens for job in batch)
        seconds = times.seconds(sizes[block], tokens) + sum(job.extra for job in batch)
        for job in batch:
            queued[node] = max(0.0, queued[node] - alone(job, block))
        working.add(node)
        free_at[node] = now + seconds
        visits.append(Visit(block, node, now, now + seconds, tuple(job.number for job in batch), tokens))
        push(now + seconds, "done", (node, batch))

    for number, request in enumerate(requests):
        push(request.at, "request", _Job(request, number, request.prompt_tokens, 0, 0))
    while events:
        now = events[0][0]
        touched: dict[str, None] = {}
        while events and events[0][0] == now:  # all of one moment, before any device chooses
            _, _, kind, what = heapq.heappop(events)
            if kind == "request":
                assert isinstance(what, _Job)
                route(what, now)
            elif kind == "queue":
                assert isinstance(what, _Job)
                what.since = now
                block = models[what.request.tenant].blocks[what.place]
                queues[what.node].setdefault(block, []).append(what)
                touched[what.node] = None
            else:
                assert isinstance(what, tuple)
                node, batch = what
                working.discard(node)
                touched[node] = None
                for job in batch:
                    job.place += 1
                    if job.place < len(models[job.request.tenant].blocks):
                        route(job, now)
                        continue
                    job.made += 1
                    job.first = now if job.made == 1 else job.first
                    if job.made == job.request.new_tokens:
                        served.append(Served(job.request, job.first, now, job.node))
                        owners[job.number] = dict(job.owner)
                        continue
                    job.context, job.tokens, job.place = job.context + job.tokens, 1, 0
                    route(job, now)
        for node in touched:
            if node not in working:
                start(node, now)
    return BlockRun(tuple(served), tuple(visits), owners, moves, recomputed)
