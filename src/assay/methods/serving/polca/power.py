"""What a server draws and how long it takes at a lowered clock: two phases, prompts and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from assay import checks
from assay.methods.core.fleet.hardware import Device, ModelShape
from assay.methods.core.fleet.simulator import StepTimes

Kind = Literal["prompt", "token"]


@dataclass(frozen=True)
class Phase:
    """An accelerator in one phase of its work.

    `watts` it draws at its full clock. Of what that is above the idle draw, the share `scaled` goes with the clock to the power of
    `exponent`, the rest (memory, leakage) does not: p(x) = idle + (watts - idle) (1 - scaled + scaled x ** exponent), at the share x of the
    full clock. The time goes with `beta` / x + 1 - `beta`: `beta` is 1 where arithmetic limits, near 0 where memory does.

    >>> phase = Phase(watts=400, beta=1.0, scaled=0.8, exponent=2)
    >>> phase.slowdown(0.5), phase.draws(1.0, idle=50), phase.draws(0.5, idle=50)
    (2.0, 400.0, 190.0)
    """

    watts: float
    beta: float
    scaled: float
    exponent: float = 2.0

    def __post_init__(self) -> None:
        checks.number("watts", self.watts, above=0)
        checks.number("beta", self.beta, low=0, high=1)
        checks.number("scaled", self.scaled, low=0, high=1)
        checks.number("exponent", self.exponent, low=1, high=4)

    def slowdown(self, clock: float) -> float:
        """How many times as long the phase takes at a share `clock` of the full clock."""
        return self.beta / clock + 1 - self.beta

    def draws(self, clock: float, idle: float, watts: float | None = None) -> float:
        """Watts at a share `clock` of the full clock; `watts` instead of the phase's own at the full one."""
        above = (self.watts if watts is None else watts) - idle
        return idle + above * (1 - self.scaled + self.scaled * clock**self.exponent)

    def clock_for(self, limit: float, idle: float, watts: float | None = None) -> float:
        """The highest share of the clock at which no more than `limit` watts are drawn, in 0.05 to 1: no part runs slower than that."""
        above = (self.watts if watts is None else watts) - idle
        if not self.draws(1.0, idle, watts) > limit:
            return 1.0
        power = ((limit - idle) / above - 1 + self.scaled) / self.scaled if self.scaled else 0.0
        return max(power, 0.05**self.exponent) ** (1 / self.exponent)


A100: Device = Device(
    "A100 80 GB (data sheet)", flops=312e12, bandwidth=2.0e12, memory=80e9, idle_watts=50, peak_watts=400
)
BLOOM_176B: ModelShape = ModelShape(
    layers=70, width=14336, heads=112, kv_heads=112, head_dim=128, parameters=176_000_000_000
)

PROMPT = Phase(watts=400, beta=1.0, scaled=0.8)
TOKEN = Phase(watts=260, beta=0.25, scaled=0.6)


@dataclass(frozen=True)
class ServerSpec:
    """A server of `accelerators`: what it draws, its clocks, and how long its work takes at the full clock.

    Watts are of the whole server for `host_idle` and `host_busy` (fans, processors, network; without and with work), of one accelerator for
    all others. A turn over fewer prompt tokens than `saturates` lies between the two phases; each further row of a batch adds `row_watts`,
    up to the phases' `peak`. `provisioned`, what a row reserves for a server, is the most this model can draw: host busy, all accelerators
    at their peak.

    The defaults are eight 400 W accelerators of 2020 and a model of 176 billion parameters: recalled from the literature or chosen by us,
    calibrated by no measurement of ours; the exponent of 2 is the cautious end of 2 to 3 (a higher one makes capping save more).
    """

    accelerators: int = 8
    idle_watts: float = 50.0
    host_idle: float = 1000.0
    host_busy: float = 1600.0
    prompt: Phase = PROMPT
    token: Phase = TOKEN
    row_watts: float = 4.0
    saturates: int = 1024
    full_mhz: float = 1410.0
    times: StepTimes = field(default_factory=lambda: roofline_times(BLOOM_176B, A100, 8))
    max_running: int = 8
    kv_tokens: int = 70_000
    chunk: int = 8192
    steps: int = 32

    def __post_init__(self) -> None:
        for name in ("accelerators", "max_running", "kv_tokens", "chunk", "steps", "saturates"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("idle_watts", "host_idle", "host_busy", "row_watts"):
            checks.number(name, getattr(self, name), low=0)
        checks.number("full_mhz", self.full_mhz, above=0)
        if self.host_busy < self.host_idle:
            raise ValueError(f"host_busy must be at least host_idle ({self.host_idle:g}), got {self.host_busy:g}")
        if self.idle_watts > min(self.prompt.watts, self.token.watts):
            raise ValueError(f"idle_watts must be at most what the phases draw, got {self.idle_watts:g}")

    @property
    def peak(self) -> float:
        """The most watts of an accelerator."""
        return max(self.prompt.watts, self.token.watts)

    @property
    def idle(self) -> float:
        """Watts of the server that does nothing."""
        return self.host_idle + self.accelerators * self.idle_watts

    @property
    def provisioned(self) -> float:
        """Watts that are reserved for the server where nothing is oversubscribed."""
        return self.host_busy + self.accelerators * self.peak

    def prompt_watts(self, tokens: int) -> float:
        """Watts of an accelerator that runs `tokens` tokens of prompts in a turn at the full clock."""
        share = min(tokens / self.saturates, 1.0)
        return self.token.watts + (self.prompt.watts - self.token.watts) * share

    def token_watts(self, rows: int) -> float:
        """Watts of an accelerator that makes tokens for `rows` rows at the full clock."""
        return min(self.token.watts + self.row_watts * (rows - 1), self.peak)

    def watts(self, kind: Kind, amount: int, clock: float = 1.0) -> float:
        """Watts of the server in a phase: "prompt" with `amount` tokens in a turn, or "token" with `amount` rows."""
        if kind == "prompt":
            one = self.prompt.draws(clock, self.idle_watts, self.prompt_watts(amount))
        else:
            one = self.token.draws(clock, self.idle_watts, self.token_watts(amount))
        return self.host_busy + self.accelerators * one


def roofline_times(shape: ModelShape, device: Device, accelerators: int, *, reached: float = 0.5) -> StepTimes:
    """A server's times from sizes alone: `accelerators` devices that share a model evenly and get `reached` of their peaks (our choice).

    Prompts are bound by arithmetic, steps by reading the weights and the rows' keys and values. Fitted times (`core.fleet.simulator`) are
    better where a server can be measured. Raises ValueError for a share outside 0 to 1.
    """
    reached = checks.number("reached", reached, above=0, high=1) * checks.whole("accelerators", accelerators, low=1)
    flops, bandwidth = device.flops * reached, device.bandwidth * reached
    return StepTimes(
        prefill=2.0 * shape.parameters / flops,
        step=shape.step_bytes([]) / bandwidth,
        row=2.0 * shape.parameters / flops,
        context=(shape.cache_bytes(1) - shape.cache_bytes(0)) / bandwidth,
    )


def fit_sensitivity(clocks: Sequence[float], seconds: Sequence[float]) -> float:
    """`beta` of a phase, 0 to 1, from its times at several shares of the clock: least squares of t = t(1) (beta / x + 1 - beta).

    >>> round(fit_sensitivity([1.0, 0.5], [2.0, 2.5]), 6)
    0.25

    Raises ValueError for other clocks than above 0 and up to 1, for times that are not positive, and where not two clocks differ.
    """
    x = np.array([checks.number("clocks", clock, above=0, high=1) for clock in clocks])
    t = np.array([checks.number("seconds", one, above=0) for one in seconds])
    if len(x) != len(t) or len(set(x.tolist())) < 2:
        raise ValueError(f"clocks and seconds must pair up at two clocks at least, got {len(x)} and {len(t)}")
    slope, base = np.linalg.lstsq(np.stack([1 / x - 1, np.ones_like(x)], axis=1), t, rcond=None)[0]
    if base <= 0:
        return 1.0
    return float(min(max(slope / base, 0.0), 1.0))


def fit_power(clocks: Sequence[float], watts: Sequence[float], *, idle: float) -> Phase:
    """A phase's power from its draw at several shares of the clock (`beta` is left at 1): for machines whose clock can be set.

    Least squares over `watts`, `scaled` for each exponent from 1 to 4 by tenths. Raises ValueError where not three clocks differ.
    """
    x = np.array([checks.number("clocks", clock, above=0, high=1) for clock in clocks])
    p = np.array([checks.number("watts", one, above=idle) for one in watts])
    if len(x) != len(p) or len(set(x.tolist())) < 3:
        raise ValueError(f"clocks and watts must pair up at three clocks at least, got {len(x)} and {len(p)}")
    best: tuple[float, Phase] | None = None
    for exponent in np.arange(1.0, 4.05, 0.1):
        fixed, moving = np.linalg.lstsq(np.stack([np.ones_like(x), x**exponent], axis=1), p - idle, rcond=None)[0]
        if fixed + moving <= 0 or moving < 0:
            continue
        phase = Phase(idle + fixed + moving, 1.0, min(moving / (fixed + moving), 1.0), round(float(exponent), 1))
        off = float(np.square([phase.draws(c, idle) - w for c, w in zip(x, p, strict=True)]).sum())
        if best is None or off < best[0]:
            best = off, phase
    if best is None:
        raise ValueError("watts must rise with the clock")
    return best[1]
