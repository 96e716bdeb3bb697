"""Putting load on servers: so many requests at a time, or at given times whether or not earlier ones are done.

In a closed loop each of a number of clients sends its next request when the last one is answered. In an open loop requests come at
their times, and what a request took counts from when it should have been sent: a generator that waited for slow answers would leave
out just the requests that had to wait (coordinated omission). How late requests were really sent is kept beside it.

Two servers are loaded in turn, a block of requests each (A B, B A, B A, A B, ...), so that what else happens on the machine meets
both, and never at the same time. All times are the event loop's.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from assay.errors import InputError, MissingError
from assay.loadtest.answers import Answer, Malformed
from assay.loadtest.client import Connect, Server, ask, found, tcp
from assay.loadtest.traces import CHARACTERS, Lengths, Line, Prompts, Request, alike, arrivals, made_up

WARMUP = 2  # requests to each server before those that count
GONE = 20  # requests that fail one after another, at least, before no more are sent: the server is gone
PROBE = 512  # tokens of the prompt by which the tokenizer's characters to a token are found

Send = Callable[[Request], Awaitable[Answer]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """What became of one request. Times are seconds of the event loop's clock."""

    request: Request
    intended: float  # when it should have been sent; in a closed loop, when it was
    sent: float
    end: float  # when its answer was complete, or had failed
    answer: Answer | None = None
    error: str = ""  # the kind of error, "" for none
    message: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds from when it should have been sent to the first text."""
        return None if self.answer is None else self.answer.times[0] - self.intended

    @property
    def itl(self) -> float | None:
        """Seconds between two tokens, on average from the first text to the last; None where all came at once."""
        answer = self.answer
        if answer is None or len(answer.times) < 2 or answer.tokens < 2:
            return None
        return (answer.times[-1] - answer.times[0]) / (answer.tokens - 1)

    @property
    def gap(self) -> float | None:
        """The longest time in seconds without new text after the first; None where all came at once."""
        times = () if self.answer is None else self.answer.times
        return max((b - a for a, b in itertools.pairwise(times)), default=None)

    @property
    def e2e(self) -> float | None:
        """Seconds from when it should have been sent to the end of the answer."""
        return None if self.answer is None else self.answer.end - self.intended


@dataclass(frozen=True)
class Block:
    """Requests sent to one server in one go."""

    samples: list[Sample]
    begin: float
    end: float
    cpu: float = 0.0  # processor seconds of this process meanwhile
    gone: bool = False  # so many failed one after another that no more were sent

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Load:
    """How much load: exactly one of `concurrency` (closed loop), `rate` (open loop, requests a second) and `replay` (a trace's times).

    It ends after `requests` a server, or starts none after `seconds`; two servers get it in `blocks` parts.
    """

    concurrency: int | None = None
    rate: float | None = None
    replay: bool = False
    requests: int | None = None
    seconds: float | None = None
    prompt_tokens: Lengths = Lengths(64, 512)
    new_tokens: Lengths = Lengths(128, 256)
    trace: tuple[Line, ...] = ()
    blocks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError, naming the options, for a load that cannot be."""
        if [self.concurrency is not None, self.rate is not None, self.replay].count(True) != 1:
            raise InputError("give either --concurrency or --rate, or a --trace whose lines have times")
        if self.replay and (not self.trace or self.trace[0].at is None):
            raise InputError("a --trace without times (at) needs --concurrency or --rate")
        if self.trace and self.requests is not None and self.requests > len(self.trace):
            raise InputError(
                f"--requests must be at most {len(self.trace)}, the lines of the trace, got {self.requests}"
            )
        if self.count is None and self.seconds is None:
            raise InputError("give --requests or --seconds")
        least = self.blocks * (self.concurrency or 1)
        if self.count is not None and self.count < least:
            raise InputError(
                f"--requests must be at least {least}, as many as run at a time in each of {self.blocks} blocks, got {self.count}"
            )

    @property
    def count(self) -> int | None:
        """Requests to each server; None: as many as there is time for."""
        return self.requests if self.requests is not None else len(self.trace) or None


@dataclass(frozen=True)
class Measured:
    """One server's blocks, in the order they ran, and its requests before those."""

    server: Server
    blocks: list[Block]
    warmup: list[Sample]


async def drive(
    requests: Iterator[Request], send: Send, *, concurrency: int | None = None, seconds: float | None = None
) -> Block:
    """Send requests and wait for all answers: `concurrency` at a time, or each at its own time (`Request.at`).

    None starts after `seconds`, and none after twenty (or two for each client) have failed one after another.
    """
    loop = asyncio.get_running_loop()
    begin, cpu = loop.time(), time.process_time()
    patience = _Patience(max(GONE, 2 * (concurrency or 0)))
    samples: list[Sample] = []

    async def one(request: Request, intended: float) -> None:
        samples.append(await _sample(request, intended, send))
        patience.see(samples[-1])

    async def client() -> None:
        while not patience.over and (seconds is None or loop.time() - begin < seconds):
            request = next(requests, None)
            if request is None:
                return
            await one(request, loop.time())

    async with asyncio.TaskGroup() as group:
        if concurrency is not None:
            for _ in range(concurrency):
                group.create_task(client())
        else:
            for request in requests:
                if patience.over or (seconds is not None and request.at >= seconds):
                    break
                wait = begin + request.at - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(request, begin + request.at))
    return Block(samples, begin, loop.time(), time.process_time() - cpu, patience.over)


class _Patience:
    """Counts requests that fail one after another."""

    def __init__(self, most: int) -> None:
        self.most, self.failed = most, 0

    def see(self, sample: Sample) -> None:
        self.failed = self.failed + 1 if sample.error else 0

    @property
    def over(self) -> bool:
        return self.failed >= self.most


async def _sample(request: Request, intended: float, send: Send) -> Sample:
    loop = asyncio.get_running_loop()
    sent = loop.time()
    try:
        answer = await send(request)
    except Malformed as error:
        return Sample(request, intended, sent, loop.time(), error=error.kind, message=str(error))
    return Sample(request, intended, sent, loop.time(), answer)


def order(blocks: int, servers: int) -> Iterator[tuple[int, int]]:
    """Which server's turn it is, and in which block: A B, B A, B A, A B and again.

    >>> "".join("AB"[server] for _, server in order(4, 2))
    'ABBABAAB'
    """
    for block in range(blocks):
        turns = range(servers) if block % 4 in (0, 3) else reversed(range(servers))
        for server in turns:
            yield block, server


async def measure(
    servers: Sequence[Server], load: Load, *, say: Say = lambda _: None, connect: Connect = tcp
) -> list[Measured]:
    """Put the load on each server, in turn when there are two.

    First each server is asked for its models and gets a few requests that do not count; the first of them tells how long text must
    be for a number of tokens. Raises MissingError when a server does not answer those.
    """
    ready: list[Server] = []
    warmups: list[list[Sample]] = []
    characters = CHARACTERS
    for server in servers:
        say(f"looking at {server.url}")
        prompts = Prompts(load.seed + 1 + len(ready), characters)  # none that counts
        server, samples = await _warm_up(server, load, prompts, connect)
        if not ready:  # both servers get the same text
            characters = _characters(samples)
        ready.append(server)
        warmups.append(samples)
    plan = _plan(load, Prompts(load.seed, characters), len(ready))
    tested = [Measured(server, [], samples) for server, samples in zip(ready, warmups, strict=True)]
    begun = -1
    for block, which in order(load.blocks, len(ready)):
        if block > begun:
            begun, same = block, itertools.tee(next(plan), len(ready))
        server = ready[which]
        say(f"block {block + 1} of {load.blocks}, {server.url}")
        found_out = await drive(
            map(operator.itemgetter(which), same[which]),
            functools.partial(ask, server, connect=connect),
            concurrency=load.concurrency,
            seconds=None if load.seconds is None else load.seconds / load.blocks,
        )
        tested[which].blocks.append(found_out)
    return tested


async def _warm_up(server: Server, load: Load, prompts: Prompts, connect: Connect) -> tuple[Server, list[Sample]]:
    """The server with its model's name and address, and what it answered first."""
    try:
        server = await found(server, connect)
    except Malformed as error:
        raise MissingError(f"{server.url} does not answer: {error.kind}: {error}") from None

    send = functools.partial(ask, server, connect=connect)
    longest = load.prompt_tokens.high if not load.trace else max(line.prompt_tokens or 1 for line in load.trace)
    tokens = min(PROBE, longest)
    new = load.new_tokens.low if not load.trace else load.trace[0].new_tokens
    requests = [Request(text, new) for text in prompts.alike(tokens, WARMUP)]
    samples = [await _sample(request, asyncio.get_running_loop().time(), send) for request in requests]
    if all(sample.error for sample in samples):
        api = "chat completions (or try --completions)" if server.chat else "completions (or try --chat)"
        raise MissingError(f"{server.url} does not answer {api}: {samples[0].error}: {samples[0].message}")
    return server, samples


def _characters(samples: list[Sample]) -> float:
    """Characters of a token, from the first prompt whose tokens the server has counted."""
    for sample in samples:
        if sample.answer is not None and sample.answer.prompt_tokens:
            return len(sample.request.prompt) / sample.answer.prompt_tokens
    return CHARACTERS


def _plan(load: Load, prompts: Prompts, servers: int) -> Iterator[Iterator[tuple[Request, ...]]]:
    """The requests of each block, one for each server at a time."""
    lines = iter(load.trace) if load.trace else made_up(load.prompt_tokens, load.new_tokens, load.seed)
    chance = random.Random(f"arrivals {load.seed}")
    whole = load.count
    for block in range(load.blocks):
        count = None if whole is None else whole * (block + 1) // load.blocks - whole * block // load.blocks
        yield alike(_timed(itertools.islice(lines, count), load, chance), prompts, servers)


def _timed(lines: Iterator[Line], load: Load, chance: random.Random) -> Iterator[Line]:
    """Lines with their times from the start of a block on."""
    seconds = None if load.seconds is None else load.seconds / load.blocks
    if load.rate is not None:
        times = arrivals(load.rate, chance)
        for at in times:
            if seconds is not None and at >= seconds:
                return
            line = next(lines, None)
            if line is None:
                return
            yield replace(line, at=at)
        return
    start = None
    for line in lines:
        start = line.at if start is None else start
        yield replace(line, at=(line.at or 0.0) - (start or 0.0)) if load.replay else line
