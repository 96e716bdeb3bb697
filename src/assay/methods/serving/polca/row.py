"""A row of servers under one power budget: its requests, its draw, and the controller that watches it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from assay import checks
from assay.methods.core.fleet.simulator import Running, Server, Simulated, StepTimes, Turn, simulate
from assay.methods.core.fleet.traces import Request, Served
from assay.methods.serving.polca.policy import BRAKE, FULL, HIGH, LOW, MARGIN, Policy, Setting
from assay.methods.serving.polca.power import Phase, ServerSpec

NAMES = {LOW: "low", HIGH: "high"}


@dataclass(frozen=True)
class RowSpec:
    """A row: `base` servers that its power was provisioned for, `added` ones beyond, and what can be seen and done.

    `budget` is `base` times what a server is provisioned for, or `budget_watts`; all thresholds are shares of it. The draw is seen as the
    mean of each `telemetry` seconds, so that shorter peaks are hidden. A cap acts `cap_delay` seconds after it is asked for, the brake
    `brake_delay` seconds; both at the next telemetry. Above the budget the brake slows everybody to `brake_mhz` (None: no brake), and is
    released when the draw is 5 % below the budget and no cap is under way. `limit_delay` is how long a power limit lets a prompt draw
    what it likes. The delays are recalled.
    Of `low_share` of the servers, evenly mixed, the priority is low.
    """

    base: int = 40
    added: int = 0
    spec: ServerSpec = field(default_factory=ServerSpec)
    budget_watts: float | None = None
    low_share: float = 0.5
    telemetry: float = 2.0
    cap_delay: float = 40.0
    brake_delay: float = 5.0
    brake_mhz: float | None = BRAKE
    limit_delay: float = 0.2

    def __post_init__(self) -> None:
        checks.whole("base", self.base, low=1)
        checks.whole("added", self.added, low=0)
        checks.number("low_share", self.low_share, low=0, high=1)
        checks.number("telemetry", self.telemetry, above=0)
        for name in ("cap_delay", "brake_delay", "limit_delay"):
            checks.number(name, getattr(self, name), low=0)
        for name in ("budget_watts", "brake_mhz"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), above=0)

    @property
    def servers(self) -> int:
        """All servers."""
        return self.base + self.added

    @property
    def budget(self) -> float:
        """Watts of the whole row."""
        return self.base * self.spec.provisioned if self.budget_watts is None else self.budget_watts

    def group(self, number: int) -> int:
        """The priority of a server, `LOW` or `HIGH`."""
        return LOW if int((number + 1) * self.low_share) > int(number * self.low_share) else HIGH


@dataclass(frozen=True)
class Action:
    """Something that was `asked` for and came into effect (`acted`, seconds): "cap" to a level, "brake" or "release"."""

    asked: float
    acted: float
    kind: str
    level: int = 0


@dataclass(frozen=True, eq=False)
class RowResult:
    """What came out: the requests, the mean draw of each telemetry interval in watts, and what the controller did.

    `by_server` has the draw of each server, shape (servers, intervals), `watts` their sum.
    `brakes` counts how often the brake was asked for. `peak_watts` is the highest draw of any moment, `joules` all energy.
    `capped_seconds`: how long each level was in effect. `sampling`: seconds of an interval of `watts`.
    """

    row: RowSpec
    simulated: Simulated
    by_server: np.ndarray
    brakes: int
    actions: tuple[Action, ...]
    levels: tuple[tuple[float, int], ...]  # since when each level was in effect
    peak_watts: float
    source: str = ""

    @cached_property
    def watts(self) -> np.ndarray:
        return np.asarray(self.by_server.sum(axis=0))

    @property
    def served(self) -> tuple[Served, ...]:
        return self.simulated.served

    @property
    def sampling(self) -> float:
        return self.row.telemetry

    @property
    def share(self) -> np.ndarray:
        """The draw as a share of the budget."""
        return self.watts / self.row.budget

    @property
    def joules(self) -> float:
        return float(self.watts.sum() * self.sampling)

    @property
    def seconds_above(self) -> float:
        """Seconds above the budget."""
        return float((self.watts > self.row.budget).sum() * self.sampling)

    @property
    def capped_seconds(self) -> dict[int, float]:
        end = len(self.watts) * self.sampling
        found: dict[int, float] = {}
        for (since, level), (until, _) in zip(self.levels, [*self.levels[1:], (end, 0)], strict=True):
            found[level] = found.get(level, 0.0) + max(until - since, 0.0)
        return found


def simulate_row(
    requests: Sequence[Request],
    row: RowSpec,
    policy: Policy,
    *,
    seconds: float = 0.0,
    groups: Sequence[int] | None = None,
    source: str = "",
) -> RowResult:
    """Run requests, whose tenant is their server's number, through a row under a policy.

    `groups` says for each server which of the policy's settings it gets; None: those of its priority. `seconds` is how long the draw is
    recorded at least. A changed clock counts from a server's next turn on: after at most a prompt and `steps` steps.
    Raises ValueError for a request whose tenant is no server, and for groups of another length.
    """
    names = {str(number) for number in range(row.servers)}
    if strange := next((one.tenant for one in requests if one.tenant not in names), None):
        raise ValueError(
            f"tenant of requests must be a server's number below {row.servers}, got {strange!r}: deal a recorded trace out (dealt)"
        )
    groups = [row.group(number) for number in range(row.servers)] if groups is None else list(groups)
    if len(groups) != row.servers:
        raise ValueError(f"groups must have one entry a server, {row.servers}, got {len(groups)}")
    checks.number("seconds", seconds, low=0)
    control = _Control(row, policy)
    throttles = _Throttles(row.spec)
    told = {str(number): throttles.of(policy.setting(0, group)) for number, group in enumerate(groups)}
    spec = row.spec
    servers = [
        Server(name, told[name].times, spec.max_running, spec.kv_tokens, spec.chunk, (name,), spec.steps)
        for name in map(str, range(row.servers))
    ]
    meter = _Meter(row)
    seen = 0

    def read(turns: Sequence[Turn]) -> None:
        nonlocal seen
        for turn in turns[seen:]:
            meter.add(turn, told[turn.server])
        seen = len(turns)

    def watch(now: float, fleet: Sequence[Running], turns: Sequence[Turn]) -> None:
        read(turns)
        if control.look(now, meter.before(now) / row.budget):
            for running, group in zip(fleet, groups, strict=True):
                one = throttles.of(control.setting(group))
                told[running.server.name], running.times = one, one.times

    found = simulate(requests, servers, watch=watch, every=row.telemetry)
    read(found.turns)
    end = max([seconds, *(turn.end for turn in found.turns)])
    done = (control.brakes, tuple(control.actions), tuple(control.levels), meter.peak(), source)
    return RowResult(row, found, meter.watts(end), *done)


class _Control:
    """The controller's memory: what acts, what is under way."""

    def __init__(self, row: RowSpec, policy: Policy) -> None:
        self.row, self.policy = row, policy
        self.acting = self.asked = 0
        self.braking = False
        self.brakes = 0
        self.under_way: list[tuple[float, float, str, int]] = []  # due, asked, what, level
        self.actions: list[Action] = []
        self.levels: list[tuple[float, int]] = [(0.0, 0)]

    def look(self, now: float, share: float) -> bool:
        """Let what is due come into effect, and ask for what the draw calls for. Whether something changed."""
        due = [one for one in self.under_way if one[0] <= now + 1e-9]
        self.under_way = [one for one in self.under_way if one[0] > now + 1e-9]
        for _, asked, kind, level in due:
            self.actions.append(Action(asked, now, kind, level))
            if kind == "cap":
                self.acting = level
                self.levels.append((now, level))
            else:
                self.braking = kind == "brake"
        waiting = {kind for _, _, kind, _ in self.under_way}
        if self.row.brake_mhz is not None and not waiting & {"brake", "release"}:
            if not self.braking and share > 1:
                self.brakes += 1
                self._ask(now, self.row.brake_delay, "brake")
            elif self.braking and share < 1 - MARGIN and "cap" not in waiting:
                self._ask(now, self.row.brake_delay, "release")
        wanted = self.policy.level(now, share, self.acting, self.asked)
        if self.braking or {"brake", "release"} & {kind for _, _, kind, _ in self.under_way}:
            wanted = max(wanted, self.asked)  # what is drawn under the brake says nothing about the time after it
        if wanted != self.asked:
            self.asked = wanted
            self._ask(now, self.row.cap_delay, "cap", wanted)
        return bool(due)

    def _ask(self, now: float, delay: float, kind: str, level: int = 0) -> None:
        self.under_way.append((now + delay, now, kind, level))

    def setting(self, group: int) -> Setting:
        return Setting(mhz=self.row.brake_mhz) if self.braking else self.policy.setting(self.acting, group)


class _Throttle:
    """A server under one setting: its clock in each phase, its times, and its draw above idle."""

    def __init__(self, spec: ServerSpec, setting: Setting) -> None:
        self.spec, self.setting = spec, setting
        self.tokens = [self._token(rows) for rows in range(1, spec.max_running + 1)]
        times = spec.times
        plain = (times.prefill, times.step, times.row, times.context, times.turn)
        self.times = times if setting == FULL else _Slowed(*plain, throttle=self)

    def _token(self, rows: int) -> tuple[float, float]:
        """How much slower, and watts above idle, with so many rows."""
        spec = self.spec
        clock = self._clock(spec.token, spec.token_watts(rows))
        return spec.token.slowdown(clock), spec.watts("token", rows, clock) - spec.idle

    def prompt(self, tokens: int) -> tuple[float, float]:
        """How much slower, and watts above idle, with so many tokens of prompts."""
        spec = self.spec
        clock = self._clock(spec.prompt, spec.prompt_watts(tokens))
        return spec.prompt.slowdown(clock), spec.watts("prompt", tokens, clock) - spec.idle

    def _clock(self, phase: Phase, watts: float) -> float:
        if self.setting.watts is not None:
            return phase.clock_for(self.setting.watts, self.spec.idle_watts, watts)
        return 1.0 if self.setting.mhz is None else min(self.setting.mhz / self.spec.full_mhz, 1.0)


@dataclass(frozen=True)
class _Slowed(StepTimes):
    """Times at a lowered clock."""

    throttle: _Throttle | None = None

    def prompting(self, prompt: int, seen: int) -> float:
        if not prompt:
            return self.turn
        assert self.throttle is not None
        return self.turn + (self.prefill * prompt + self.context * seen) * self.throttle.prompt(prompt)[0]

    def stepping(self, rows: int, context: int, steps: int = 1) -> float:
        if not rows:
            return 0.0
        assert self.throttle is not None
        return super().stepping(rows, context, steps) * self.throttle.tokens[rows - 1][0]


class _Throttles:
    """One throttle a setting."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.known: dict[Setting, _Throttle] = {}

    def of(self, setting: Setting) -> _Throttle:
        if setting not in self.known:
            self.known[setting] = _Throttle(self.spec, setting)
        return self.known[setting]


class _Meter:
    """The row's draw: joules above idle of each telemetry interval, and every stretch of constant draw of a server."""

    def __init__(self, row: RowSpec) -> None:
        self.row, self.every = row, row.telemetry
        self.idle = row.servers * row.spec.idle
        self.joules: dict[str, list[float]] = {str(number): [] for number in range(row.servers)}
        self.stretches: list[tuple[float, float, float]] = []

    def add(self, turn: Turn, throttle: _Throttle) -> None:
        begin = turn.start
        if turn.prompt:
            watts = throttle.prompt(turn.prompt)[1]
            if throttle.setting.watts is not None:
                late = min(turn.start + self.row.limit_delay, turn.middle)
                full = self.row.spec.watts("prompt", turn.prompt) - self.row.spec.idle
                self._spread(turn.server, begin, late, full)
                begin = late
            self._spread(turn.server, begin, turn.middle, watts)
            begin = turn.middle
        if turn.rows:
            self._spread(turn.server, begin, turn.end, throttle.tokens[turn.rows - 1][1])

    def _spread(self, server: str, start: float, end: float, watts: float) -> None:
        if not end > start:
            return
        self.stretches.append((start, end, watts))
        joules, first, last = self.joules[server], int(start / self.every), int(end / self.every)
        if last >= len(joules):
            joules.extend([0.0] * (last + 1 - len(joules)))
        if first == last:
            joules[first] += watts * (end - start)
            return
        joules[first] += watts * ((first + 1) * self.every - start)
        for middle in range(first + 1, last):
            joules[middle] += watts * self.every
        joules[last] += watts * (end - last * self.every)

    def before(self, now: float) -> float:
        """The mean watts of the row in the interval that ends at `now`."""
        number = round(now / self.every) - 1
        return self.idle + sum(one[number] for one in self.joules.values() if number < len(one)) / self.every

    def watts(self, end: float) -> np.ndarray:
        """Each server's in all intervals up to `end`."""
        intervals = max(math.ceil(end / self.every - 1e-9), 0)
        found = np.zeros((len(self.joules), intervals))
        for place, joules in enumerate(self.joules.values()):
            known = joules[:intervals]
            found[place, : len(known)] = known
        return found / self.every + self.row.spec.idle

    def peak(self) -> float:
        """The highest draw of any moment."""
        if not self.stretches:
            return self.idle
        starts, ends, watts = np.array(self.stretches).T
        at = np.concatenate([ends, starts])  # at one moment what ends comes first
        change = np.concatenate([-watts, watts])
        return self.idle + float(np.cumsum(change[np.argsort(at, kind="stable")]).max())


GATES = {(HIGH, 0.5): 0.01, (HIGH, 0.99): 0.05, (LOW, 0.5): 0.05, (LOW, 0.99): 0.5}
"""How much longer answers may take, by priority and quantile; recalled."""


def losses(result: RowResult, reference: RowResult) -> dict[tuple[int, float], float]:
    """How much longer answers took than in `reference` (the same requests uncapped), by priority and quantile: 0.02 is 2 %.

    Of the reference only the requests of `result` count: it may be a larger row, as servers do not touch each other while none is capped.
    Raises ValueError where a priority was not served in both.
    """
    found = {}
    wanted = {one.request for one in result.served}
    for group, quantile in GATES:
        ours, theirs = (
            [one.e2e for one in run.served if one.request.priority == group and one.request in wanted]
            for run in (result, reference)
        )
        if not ours or not theirs:
            raise ValueError(f"result and reference must both have answers of {NAMES[group]} priority")
        found[group, quantile] = float(np.quantile(ours, quantile) / np.quantile(theirs, quantile)) - 1
    return found


def gates_used(result: RowResult, reference: RowResult, gates: Mapping[tuple[int, float], float] = GATES) -> float:
    """How much of its allowance a policy uses, of the gate that is used most: 1 is all of it.

    With brakes it is at least 1, and their number more: so "minimal loss and no brake" is at most 1.
    """
    seen = losses(result, reference)
    used = max(0.0, *(seen[gate] / allowed for gate, allowed in gates.items()))
    return max(used, 1.0) + result.brakes if result.brakes else used


def goodput(result: RowResult, reference: RowResult, *, high: float = 0.05, low: float = 0.5) -> float:
    """Good answers a second, until the last one of `reference` to the same requests: those that took at most 5 % (low priority: 50 %)
    longer than there."""
    wanted = {one.request for one in result.served}
    alike: dict[Request, deque[float]] = {}
    for one in sorted(reference.served, key=lambda one: one.end):
        if one.request in wanted:
            alike.setdefault(one.request, deque()).append(one.e2e)
    good = 0
    for one in sorted(result.served, key=lambda one: one.end):
        allowed = 1 + (high if one.request.priority == HIGH else low)
        good += one.e2e <= allowed * alike[one.request].popleft() + 1e-9
    end = max((one.end for one in reference.served if one.request in alike), default=0.0)
    return good / end if good else 0.0
