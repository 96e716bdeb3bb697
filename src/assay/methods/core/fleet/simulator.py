"""Requests through a fleet of servers, event by event: when each gets its tokens, without running any model.

A server is simulated as `assay serve` runs: in turns. A turn runs prompts up to a chunk of tokens (all of them while nobody decodes), then
one decoding step of all running rows (or several: `Server.steps`); a row is let in when there is a place and its keys and values fit. How
long a turn takes is said by `StepTimes`, whose four numbers are measured (`calibrated` finds them in what a server was seen to do).
A `watch` sees the fleet at even times and may change its servers' times, as a power controller does.

    found = simulate(trace.requests, [Server("a", times), Server("b", times)])
    report = summary(found)

Two runs over the same requests differ by what was changed and nothing else: nothing here draws random numbers.
When NOT to use it: for what a single request costs on an idle machine, which `assay verify idealized_runtime` fits directly.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay import checks
from assay.methods.core.fleet.traces import Request, Served

QUANTILES = (0.5, 0.95, 0.99)
FITTED = ("prefill", "step", "row", "context")
TURNS = 20_000_000  # of a simulation at most; then something does not end


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a server's work: `prefill` a token of a prompt, `step` a decoding step, `row` each row of it, `context` each cached token
    that a step or a prompt's token sees, and `turn` that goes by in each turn whatever it does.

    >>> StepTimes(prefill=1e-3, step=0.01, row=0.002).seconds(prompt=100, rows=2, context=500)
    0.114
    """

    prefill: float
    step: float
    row: float = 0.0
    context: float = 0.0
    turn: float = 0.0

    def __post_init__(self) -> None:
        for name in (*FITTED, "turn"):
            checks.number(name, getattr(self, name), low=0)
        if not self.prefill + self.step + self.row > 0:
            raise ValueError("prefill, step and row must not all be 0: nothing would take any time")

    def seconds(self, prompt: int, rows: int, context: int) -> float:
        """Seconds of a turn over `prompt` tokens of prompts and a step of `rows` rows that see `context` tokens together."""
        return self.prompting(prompt, 0 if rows else context) + self.stepping(rows, context if rows else 0)

    def prompting(self, prompt: int, seen: int) -> float:
        """Seconds until the step of a turn begins, with `prompt` tokens of prompts that see `seen` cached ones together."""
        return self.turn + self.prefill * prompt + self.context * seen

    def stepping(self, rows: int, context: int, steps: int = 1) -> float:
        """Seconds of `steps` decoding steps of `rows` rows that see `context` tokens together, all the steps added."""
        return (self.step + self.row * rows) * steps + self.context * context if rows else 0.0


@dataclass(frozen=True)
class Server:
    """A server of a fleet: its times, how many rows run at once, how many tokens of keys and values it holds, its chunk of prompts.

    `tenants` are those it serves; none means all. `steps` is how many decoding steps a turn may take together, until a row ends and while
    no prompt is half run: who comes meanwhile waits for all of them (engines schedule so, and a long trace is simulated so many times as
    fast).
    """

    name: str
    times: StepTimes
    max_running: int = 64
    kv_tokens: int = 1 << 30
    chunk: int = 256
    tenants: tuple[str, ...] = ()
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ("max_running", "kv_tokens", "chunk", "steps"):
            checks.whole(name, getattr(self, name), low=1)


@dataclass(eq=False)
class _Row:
    request: Request
    done: int = 0  # tokens of the prompt
    made: int = 0
    first: float = 0.0

    @property
    def context(self) -> int:
        return self.done + self.made

    @property
    def most(self) -> int:
        return self.request.prompt_tokens + self.request.new_tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a server: from `start` to `middle` it runs `prompt` tokens of prompts, which see `seen` cached ones together, and
    from there to `end` `steps` steps of `rows` rows, which see `context`, all the steps added."""

    server: str
    start: float
    middle: float
    end: float
    prompt: int
    seen: int
    rows: int
    context: int
    steps: int = 1


@dataclass(eq=False)
class Running:
    """A server while it is simulated; a router may read it, and a watch may set the `times` of the turns that begin after it."""

    server: Server
    times: StepTimes = field(init=False)
    waiting: list[tuple[int, int, _Row]] = field(
        default_factory=list
    )  # a heap: the highest priority first, then who came first
    filling: deque[_Row] = field(default_factory=deque)
    rows: list[_Row] = field(default_factory=list)
    held: int = 0  # tokens of keys and values that rows may come to hold

    load: int = 0  # tokens that are still to be run or made here
    come: int = 0  # requests so far

    def __post_init__(self) -> None:
        self.times = self.server.times

    def take(self, request: Request) -> None:
        """Queue a request."""
        row = _Row(request)
        heapq.heappush(self.waiting, (-request.priority, self.come, row))
        self.come, self.load = self.come + 1, self.load + row.most

    def admit(self) -> None:
        """Let waiting rows in, the first of the highest priority first, while there is a place and room for all they may hold."""
        while self.waiting and len(self.filling) + len(self.rows) < self.server.max_running:
            row = self.waiting[0][2]
            if self.held + row.most > self.server.kv_tokens and self.held:
                return
            heapq.heappop(self.waiting)
            self.filling.append(row)
            self.held += row.most

    def turn(self, now: float) -> tuple[Turn, list[Served]]:
        """One turn from `now` on, and what was finished in it."""
        self.admit()
        prompt = seen = started = 0
        while self.filling:
            row = self.filling[0]
            piece = min(row.request.prompt_tokens - row.done, self.server.chunk - row.done % self.server.chunk)
            if self.rows and prompt and prompt + piece > self.server.chunk:
                break
            seen += piece * row.done
            prompt, row.done = prompt + piece, row.done + piece
            if row.done == row.request.prompt_tokens:
                self.rows.append(self.filling.popleft())
                started += 1
                row.made, row.first = 1, now + self.times.prompting(prompt, seen)
        middle = now + self.times.prompting(prompt, seen)
        stepping = [row for row in self.rows if row.made < row.request.new_tokens]
        most = 1 if self.filling else self.server.steps  # a prompt that is being run waits for one step, not for all
        steps = min([most, *(row.request.new_tokens - row.made for row in stepping)])
        context = steps * sum(row.context for row in stepping) + len(stepping) * steps * (steps - 1) // 2
        end = middle + self.times.stepping(len(stepping), context, steps)
        for row in stepping:
            row.made += steps
        self.load -= prompt + started + len(stepping) * steps
        served = []
        for row in [row for row in self.rows if row.made >= row.request.new_tokens]:
            self.rows.remove(row)
            self.held -= row.most
            last = end if row in stepping else row.first
            served.append(Served(row.request, row.first, last, self.server.name))
        return Turn(self.server.name, now, middle, end, prompt, seen, len(stepping), context, steps), served

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.filling or self.rows)


Router = Callable[[Request, Sequence[Running]], Running]
Watch = Callable[[float, Sequence[Running], Sequence[Turn]], None]
"""Called with the time, the servers, and all turns begun so far (their ends may still lie ahead)."""


def least_loaded(request: Request, servers: Sequence[Running]) -> Running:
    """The server with the fewest tokens to do; the first of several."""
    return min(servers, key=lambda one: one.load)


@dataclass(frozen=True)
class Simulated:
    """What came out: requests in the order they were finished, those that no server can ever hold, and every turn that was taken."""

    served: tuple[Served, ...]
    refused: tuple[Request, ...]
    turns: tuple[Turn, ...]

    @property
    def seconds(self) -> float:
        """From the start to the last answer."""
        return max((one.end for one in self.served), default=0.0)

    def busy(self, server: str) -> float:
        """The share of the time in which a server worked."""
        worked = sum(turn.end - turn.start for turn in self.turns if turn.server == server)
        return min(worked / self.seconds, 1.0) if self.seconds else 0.0  # sums of floats may pass the end

    def rows(self, server: str) -> float:
        """Rows a decoding step of a server, on average."""
        turns = [turn for turn in self.turns if turn.server == server and turn.rows]
        return sum(turn.rows * turn.steps for turn in turns) / sum(turn.steps for turn in turns) if turns else 0.0


def simulate(
    requests: Sequence[Request],
    servers: Sequence[Server],
    *,
    router: Router = least_loaded,
    clients: int | None = None,
    watch: Watch | None = None,
    every: float = 1.0,
) -> Simulated:
    """Run all requests through the servers until the last is answered.

    `watch` is called every `every` seconds, the first time at `every`, as long as anything is still to come.
    `router` chooses a server when a request comes, among those that serve its tenant.
    With `clients` the loop is closed: so many clients send the requests in order, each its next when it has its answer, whatever
    their times say. Raises ValueError for no servers, for two of one name, and for more than 20 million turns.
    """
    if not servers:
        raise ValueError("servers must hold at least one server")
    if len({server.name for server in servers}) < len(servers):
        raise ValueError("servers must have names of their own")
    fleet = [Running(server) for server in servers]
    queue = deque(sorted(requests, key=lambda request: request.at))
    events: list[tuple[float, int, str, Any]] = []
    counted = 0

    def push(at: float, kind: str, what: Any) -> None:
        nonlocal counted
        counted += 1
        heapq.heappush(events, (at, counted, kind, what))

    def send(now: float) -> None:
        request = queue.popleft()
        push(now, "request", Request(now, request.prompt_tokens, request.new_tokens, request.tenant, request.priority))

    if clients is None:
        for request in queue:
            push(request.at, "request", request)
    else:
        for _ in range(min(checks.whole("clients", clients, low=1), len(queue))):
            send(0.0)
    if watch is not None:
        push(checks.number("every", every, above=0), "watch", 1)
    done: list[Served] = []
    refused: list[Request] = []
    awake: set[int] = set()
    turns: list[Turn] = []
    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "watch":
            assert watch is not None
            if events:
                watch(now, fleet, turns)
                push((what + 1) * every, "watch", what + 1)
            continue
        if kind == "request":
            able = [
                one
                for one in fleet
                if (not one.server.tenants or what.tenant in one.server.tenants)
                and what.prompt_tokens + what.new_tokens <= one.server.kv_tokens
            ]
            if not able:
                refused.append(what)
                if clients is not None and queue:
                    send(now)
                continue
            chosen = able[0] if len(able) == 1 else router(what, able)
            chosen.take(what)
            if id(chosen) not in awake:
                awake.add(id(chosen))
                push(now, "turn", chosen)
            continue
        if what.idle:
            awake.discard(id(what))
            continue
        turn, served = what.turn(now)
        turns.append(turn)
        if len(turns) > TURNS:
            raise ValueError(f"requests must end within {TURNS:,} turns, {len(done)} of {len(requests)} did")
        done += served
        for one in served:
            if clients is not None and queue:
                send(one.end)
        push(turn.end, "turn", what)
    return Simulated(tuple(done), tuple(refused), tuple(turns))


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Quantiles of the times in seconds, and tokens and requests a second, of a simulation or a measurement."""
    if not served:
        return {"requests": 0}
    begin, end = min(one.request.at for one in served), max(one.end for one in served)
    seconds = max(end - begin, 1e-9)
    found: dict[str, Any] = {"requests": len(served), "seconds": seconds}
    for name in ("ttft", "itl", "e2e"):
        values = [value for one in served if (value := getattr(one, name)) is not None]
        found[name] = {f"p{100 * q:g}": float(np.quantile(values, q)) for q in QUANTILES} if values else None
    found["tokens_per_second"] = sum(one.request.new_tokens for one in served) / seconds
    found["requests_per_second"] = len(served) / seconds
    return found


def errors(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured minus one, for each figure that both have: 0.1 is ten per cent too much.

    >>> errors({"tokens_per_second": 110.0, "itl": None}, {"tokens_per_second": 100.0, "itl": None})
    {'tokens_per_second': 0.1}
    """
    found: dict[str, float] = {}
    for name, value in measured.items():
        other = predicted.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            found |= {f"{name} {key}": error for key, error in errors(other, value).items()}
        elif isinstance(value, float) and isinstance(other, float) and value > 0 and name != "seconds":
            found[name] = round(other / value - 1, 12)
    return found


def calibrated(
    measured: Sequence[Served],
    *,
    start: StepTimes | None = None,
    max_running: int = 64,
    chunk: int = 256,
    clients: int | None = None,
    trials: int = 400,
) -> StepTimes:
    """The times of one server from what it was seen to do with a trace.

    They begin with least squares over the decoding of each answer, whose steps are known, or with `start`. From there a simplex
    search lets the simulated times to the first and to the last token come as near the measured ones as it can (mean size of the
    logarithm of their ratio, so that a request predicted half as long counts as much as one predicted twice as long), in `trials`
    simulations at most. `clients`: see `simulate`. Take a load that the server bears: one that is never idle hides
    how its time divides among the four. Raises ValueError for fewer than four requests.
    """
    if len(measured) < len(FITTED):
        raise ValueError(f"measured must hold at least {len(FITTED)} requests, got {len(measured)}")
    if not all(one.end >= one.first > one.request.at for one in measured):
        raise ValueError("measured must have times to the first token above 0, and none to the last below them")
    measured = sorted(measured, key=lambda one: one.request.at)
    requests = [one.request for one in measured]
    seen = np.log(np.maximum([(one.ttft, one.e2e) for one in measured], 1e-9))
    guess = start or _first_guess(measured)
    first = np.array([getattr(guess, name) for name in FITTED])
    floor = np.array([1e-9, 1e-9, 1e-9, 1e-12])  # a search in logarithms does not leave 0
    first = np.maximum(first, floor)
    first[2] = max(first[2], 0.03 * first[1])

    def off(logs: np.ndarray) -> float:
        times = StepTimes(*(float(x) for x in np.exp(logs)))
        found = simulate(requests, [Server("measured", times, max_running, chunk=chunk)], clients=clients)
        alike: dict[tuple[int, int], deque[Served]] = {}  # in a closed loop they come at other times than was measured
        for one in sorted(found.served, key=lambda one: one.request.at):
            alike.setdefault((one.request.prompt_tokens, one.request.new_tokens), deque()).append(one)
        ours = [alike[request.prompt_tokens, request.new_tokens].popleft() for request in requests]
        predicted = np.log(np.maximum([(one.ttft, one.e2e) for one in ours], 1e-9))
        return float(np.abs(predicted - seen).mean())

    found = np.log(first)
    for size in (
        0.35,
        -0.35,
        0.2,
        -0.1,
    ):  # again from where it ended, the other way round: a simplex that fell flat sees nothing new
        found = _simplex(off, found, size, trials // 4)
    best = np.exp(found)
    return StepTimes(*(float(x) if x > 2 * low else 0.0 for x, low in zip(best, floor, strict=True)))


def _simplex(off: Callable[[np.ndarray], float], first: np.ndarray, size: float, trials: int) -> np.ndarray:
    """Where `off` is least, by Nelder and Mead's search from `first` with first steps of `size`."""
    points = [first] + [first + size * row for row in np.eye(len(first))]
    values = [off(point) for point in points]
    used = len(points)
    while used < trials:
        order = np.argsort(values)
        points, values = [points[i] for i in order], [values[i] for i in order]
        if values[-1] - values[0] < 1e-5 and max(np.abs(p - points[0]).max() for p in points) < 1e-3:
            break
        middle, worst = np.mean(points[:-1], axis=0), points[-1]
        reflected = middle + (middle - worst)
        value, used = off(reflected), used + 1
        if value < values[0]:
            further = middle + 2 * (middle - worst)
            more, used = off(further), used + 1
            points[-1], values[-1] = (further, more) if more < value else (reflected, value)
        elif value < values[-2]:
            points[-1], values[-1] = reflected, value
        else:
            nearer = middle + 0.5 * ((reflected if value < values[-1] else worst) - middle)
            less, used = off(nearer), used + 1
            if less < min(value, values[-1]):
                points[-1], values[-1] = nearer, less
            else:
                points = [points[0], *(points[0] + 0.5 * (p - points[0]) for p in points[1:])]
                values = [values[0], *(off(p) for p in points[1:])]
                used += len(points) - 1
    return points[int(np.argmin(values))]


def _first_guess(measured: Sequence[Served]) -> StepTimes:
    """The same least squares over the work that the measured times show by themselves.

    From its first token to its last a row takes part in every step, one a token; other rows make tokens at an even pace; prompts are
    run just before their first tokens. The time to a first token says something only where nothing else was there.
    """
    first, end = (np.array([getattr(one, name) for one in measured]) for name in ("first", "end"))
    at, prompt, new = (
        np.array([getattr(one.request, name) for one in measured]) for name in ("at", "prompt_tokens", "new_tokens")
    )
    pace = (new - 1) / np.maximum(end - first, 1e-9)
    rows, wanted = [], []
    for i in range(len(measured)):
        if first[i] > at[i] and not ((at < first[i]) & (end > at[i])).sum() > 1:
            rows.append([prompt[i], 0.0, 0.0, 0.0])
            wanted.append(first[i] - at[i])
        if new[i] > 1 and end[i] > first[i]:
            made = np.clip(np.minimum(end, end[i]) - np.maximum(first, first[i]), 0, None) * pace
            behind = prompt + np.clip(first[i] - first, 0, None) * pace + made / 2
            run = prompt[(first > first[i]) & (first <= end[i])].sum()
            rows.append([run, new[i] - 1, made.sum(), (made * behind).sum()])
            wanted.append(end[i] - first[i])
    solved = np.zeros(len(FITTED))
    if rows:
        solved = _not_negative(np.array(rows) / np.array(wanted)[:, None], np.ones(len(wanted)))
    if not (solved[:3] > 0).any():
        solved = np.array([1e-9, 1e-9, 0.0, 0.0])
    return StepTimes(*(float(x) for x in solved))


def _not_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with no solution below 0: of all sets of unknowns held at 0, the best whose others are not negative."""
    unknowns = matrix.shape[1]
    best, least = np.zeros(unknowns), np.inf
    for chosen in range(1, 1 << unknowns):
        columns = [i for i in range(unknowns) if chosen >> i & 1]
        scale = np.linalg.norm(matrix[:, columns], axis=0)
        if not scale.all():
            continue
        solved = np.linalg.lstsq(matrix[:, columns] / scale, wanted, rcond=None)[0] / scale
        if (solved < 0).any():
            continue
        residual = float(np.linalg.norm(matrix[:, columns] @ solved - wanted))
        if residual < least - 1e-12:
            best, least = np.zeros(unknowns), residual
            best[columns] = solved
    return best
