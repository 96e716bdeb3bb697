"""More servers under one power budget: how many do two thresholds carry, and what do none, one, chance and a plain power limit?

Everything is simulated, as the paper's own result is: a row of servers answers made-up requests (classes of the paper, lengths of real
documents), and a trace is run again for each policy and each number of servers, so that two runs differ in nothing else. The point
that decides takes the recalled A100s; beside it stand one whose phases bear a lower clock as this machine's bear fewer threads (and
draw what its energy counter says, if it has one), and two worlds where the claim should break.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.measure.stats import student_interval
from assay.methods.core.fleet.traces import Request, Streams
from assay.methods.serving.polca import (
    CLASSES,
    GATES,
    MeasuredPhases,
    Policy,
    PowerLimit,
    PowerTrace,
    Replay,
    RowResult,
    RowSpec,
    ServerSpec,
    Workload,
    calibrated_spec,
    gates_used,
    goodput,
    losses,
    measure_phases,
    no_capping,
    one_threshold,
    simulate_row,
    synthetic,
    thresholds,
    two_thresholds,
)
from assay.workloads.models import load_model, model_folder
from assay.workloads.text import docstrings

MODEL = "smollm2-135m"
PAPER_ADDED = 30  # per cent

OF_2023 = "of 2023"
RECALLED, MEASURED = "of A100s, recalled", "of this machine, measured"
WORLDS: dict[str, tuple[Workload, dict[str, Any]]] = {
    OF_2023: (Workload(), {}),
    "bursts of all servers together": (Workload(correlation=1.0, burst=3.0), {}),
    "larger batches": (Workload(rows=8.0), {"max_running": 24, "kv_tokens": 300_000, "chunk": 2048}),
}
"""Requests and what differs in the servers. The last two are where the claim should break."""

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"base": 8, "seconds": 240, "seeds": 2, "step": 2, "rounds": 1},
    "small": {"base": 40, "seconds": 1500, "seeds": 5, "step": 2, "rounds": 5},
    "full": {"base": 40, "seconds": 43200, "seeds": 10, "step": 1, "rounds": 20},
}
FEWER = {"smoke": 2, "small": 3, "full": 10}  # traces of the points that do not decide
POINTS: dict[str, list[dict[str, Any]]] = {
    scale: [
        {"world": OF_2023, "response": RECALLED, **size},
        {"world": OF_2023, "response": MEASURED, **size, "seeds": FEWER[scale]},
        *(
            {"world": world, "response": RECALLED, **size, "seeds": FEWER[scale]}
            for world in WORLDS
            if world != OF_2023
        ),
    ]
    for scale, size in SIZES.items()
}
POINTS["smoke"] = POINTS["smoke"][:1]
MOST = 0.75  # servers added at most, as a share of those provisioned for
WARM = 120.0  # seconds until a row that starts empty is as busy as its requests make it


@experiment(
    "polca/more-servers",
    points=POINTS,
    operator=Operator(
        "servers under one power budget",
        free="no capping within the trace's own peak, or a power limit on every accelerator within the allowances, whichever carries more",
    ),
    paper={"base": 40, "world": OF_2023, "thresholds": "80 % and 89 %, left again 5 % below", "response": RECALLED},
    departures={
        "world": "made-up requests: the recalled classes with lengths of real documents, in a day of 25 minutes at small scale",
    },
    decides={scale: points[0] for scale, points in POINTS.items()},
    guard=Guard(
        "used share of the latency allowances (P50 and P99 of both priorities) in the row of the figure, 1 and more with a brake",
        1.0,
        relative=False,
    ),
    refuted_if="certainly less than half of the paper's 30 % more servers run without a brake and within the latency allowances",
    refutes=lambda record: record["measured"]["high"] < PAPER_ADDED / 2,
    measured_here="servers added in our simulation, with draws, clocks and latency allowances recalled or assumed",
    minutes=240,
)
def more_servers(world: str, response: str, base: int, seconds: int, seeds: int, step: int, rounds: int) -> Figure:
    """The most servers, in per cent of those that peak provisioning allows, at which two thresholds need no brake and answers stay within
    their latency allowances.

    Searched in each of `seeds` traces by halving, in steps of `step` servers; the interval is Student's over the traces. So it is what a
    trace would have borne, for every policy alike: nobody knows a trace beforehand. The guard is what answers lose in each trace's own row
    of that size: the recalled allowances are the margin, which the search keeps, and the first two controls must not keep it. Controls, in
    the same row on the same requests: no thresholds; the policy's own levels at random times on random servers; and, cheapest of all, a
    power limit on every accelerator that the budget covers in any case. The details hold the same at the paper's 30 %. Arms are the same
    search for other policies, and without the allowances: no brake, and that is all.
    """
    workload, changes = WORLDS[world]
    workload = replace(workload, seconds=float(seconds), day=float(seconds))
    spec = ServerSpec(**changes)
    phases = measured_phases(rounds) if response == MEASURED else None
    if phases is not None:
        spec = calibrated_spec(phases, spec)
    lengths = document_lengths()
    decides = world == OF_2023 and response == RECALLED

    sources: list[str] = []
    shown: dict[str, Any] = {}
    found: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    at_paper: dict[str, list[float]] = {}
    for seed in range(seeds):
        trace = _Trace.of(workload, base, seed, spec, lengths)  # one at a time: its runs go with it
        sources.append(trace.source)
        searched = {
            TWO: trace.most(TWO, step, kept=True),
            f"{TWO}{ONLY}": trace.most(TWO, step),
            NONE: trace.most(NONE, step),
            LIMIT: trace.most(LIMIT, step, kept=True),
        }
        searched["free"] = max(searched[NONE], searched[LIMIT])
        if decides:
            searched |= {name: trace.most(name, step, kept=True) for name in (EVERYBODY, LOW_ONLY)}
            searched[f"{LIMIT}{ONLY}"] = trace.most(LIMIT, step)
        for name, value in searched.items():
            found.setdefault(name, []).append(value)
        for where, added, more in ((used, trace.servers(searched[TWO]), False), (at_paper, trace.paper, decides)):
            for name, value in trace.controls(added, all_of_them=more).items():
                where.setdefault(name, []).append(value)
        shown = shown or trace.shown(goodputs=decides)
    interval = student_interval(found[TWO])
    kept = student_interval(used[TWO])
    within = max(used.pop(TWO)) <= 1  # then no trace passes 1, nor does their mean: the search sees to that
    return Figure(
        interval.median,
        "%",
        low=interval.low,
        high=interval.high,
        baseline=0.0,
        free=float(np.mean(found["free"])),
        arms={name: float(np.mean(values)) for name, values in found.items() if name not in (TWO, "free")},
        quality=Quality(
            kept.median,
            0.0,
            max(kept.low, 0.0),
            min(kept.high, 1.0) if within else kept.high,
            controls={name: float(np.mean(values)) for name, values in used.items()},
            rival=LIMIT,
        ),
        details={
            "traces": sources,
            "added_percent": found,
            "used_at_30_percent": at_paper,
            "phases": _phases(phases, spec),
            "provisioned_watts_a_server": spec.provisioned,
            **shown,
        },
    )


def power_limit(base: int, added: int, spec: ServerSpec) -> PowerLimit:
    """What the budget leaves each accelerator of a row with so many servers added, all hosts busy."""
    return PowerLimit((base * spec.provisioned / (base + added) - spec.host_busy) / spec.accelerators)


TWO, NONE, LIMIT = "two thresholds", "no capping", "a power limit on every accelerator"
EVERYBODY, LOW_ONLY = "one threshold, everybody", "one threshold, low priority only"
ONLY = ", no brake only"
"""Of an arm for which no brake is enough, whatever answers lose."""
POLICIES: dict[str, Callable[[int, int, ServerSpec], Policy]] = {
    TWO: lambda base, added, spec: two_thresholds(),
    NONE: lambda base, added, spec: no_capping(),
    EVERYBODY: lambda base, added, spec: one_threshold(),
    LOW_ONLY: lambda base, added, spec: one_threshold(high=None),
    LIMIT: power_limit,
}
"""The policy for a row of `base` servers with so many added."""


@dataclass(eq=False)
class _Trace:
    """The requests of a row with three quarters as many servers again, their uncapped run, which every other one is held against, and the
    runs so far."""

    base: int
    seed: int
    spec: ServerSpec
    requests: tuple[Request, ...]
    source: str
    uncapped: RowResult
    known: dict[tuple[str, int], RowResult] = field(default_factory=dict)

    @classmethod
    def of(cls, workload: Workload, base: int, seed: int, spec: ServerSpec, lengths: Any) -> _Trace:
        row = RowSpec(base, int(MOST * base), spec, brake_mhz=None)
        made = synthetic(workload, row, seed=seed, lengths=lengths)
        uncapped = simulate_row(made.requests, row, no_capping(), seconds=workload.seconds, source=made.source)
        return cls(base, seed, spec, made.requests, made.source, uncapped)

    def run(self, added: int, policy: Policy, groups: list[int] | None = None) -> RowResult:
        """The row with so many servers added, each with the requests it always has. Its turns, of which there are many, are not kept."""
        row = RowSpec(self.base, added, self.spec)
        ours = [one for one in self.requests if int(one.tenant) < row.servers]
        found = simulate_row(ours, row, policy, groups=groups, source=self.source)
        return replace(found, simulated=replace(found.simulated, turns=()))

    def policy(self, name: str, added: int) -> Policy:
        return POLICIES[name](self.base, added, self.spec)

    def result(self, name: str, added: int) -> RowResult:
        """The row under a policy, run once."""
        if (name, added) not in self.known:
            self.known[name, added] = self.run(added, self.policy(name, added))
        return self.known[name, added]

    def used(self, name: str, added: int) -> float:
        """The share of the allowances that a policy uses."""
        return gates_used(self.result(name, added), self.uncapped)

    def most(self, name: str, step: int, *, kept: bool = False) -> float:
        """The most servers added without a brake, in per cent, and with `kept` within the allowances.

        By halving: where more servers pass, fewer are taken to.
        """
        budget = self.base * self.spec.provisioned
        if (
            name == NONE
        ):  # servers do not touch each other: the first ones of the uncapped row are a row that loses nothing
            peaks = np.cumsum(self.uncapped.by_server, axis=0).max(axis=1)
            within = int((peaks <= budget).sum()) - self.base
            return 100 * (max(within, 0) // step * step) / self.base
        low, high = 0, int(MOST * self.base) // step + 1  # nothing added passes by definition
        while high - low > 1:
            middle = (low + high) // 2
            added = middle * step
            if not self.result(name, added).brakes and (not kept or self.used(name, added) <= 1):
                low = middle
            else:
                high = middle
        return 100 * low * step / self.base

    def servers(self, percent: float) -> int:
        """So many per cent of the servers provisioned for, in servers."""
        return round(percent / 100 * self.base)

    @property
    def paper(self) -> int:
        return self.servers(PAPER_ADDED)

    def controls(self, added: int, *, all_of_them: bool) -> dict[str, float]:
        """Shares used with so many servers added."""
        chance = Streams(self.seed).of("controls")
        row = RowSpec(self.base, added, self.spec)
        shuffled = [row.group(int(number)) for number in chance.permutation(row.servers)]
        honest = self.result(TWO, added)
        length = len(honest.watts) * honest.sampling
        blind = Replay(turned(honest.levels, length, float(chance.uniform(0.25, 0.75)) * length))
        found = {
            TWO: self.used(TWO, added),
            "deleted": self.used(NONE, added),
            "random": gates_used(self.run(added, blind, shuffled), self.uncapped),
            "rival": self.used(LIMIT, added),
        }
        if all_of_them:
            policy = self.policy(TWO, added)
            found["random servers at the policy's times"] = gates_used(self.run(added, policy, shuffled), self.uncapped)
            found[EVERYBODY] = self.used(EVERYBODY, added)
        return found

    def shown(self, *, goodputs: bool) -> dict[str, Any]:
        """Of one trace: what the row draws, and what the policies do with it."""
        sampling = self.uncapped.sampling
        base = PowerTrace(self.uncapped.by_server[: self.base, int(WARM / sampling) :].sum(axis=0), sampling)
        budget = self.base * self.spec.provisioned
        honest, deleted = (self.result(name, self.paper) for name in (TWO, NONE))
        scale = 1 + self.paper / self.base
        try:
            found = thresholds(base, budget=budget, scale=scale)
            own: dict[str, Any] = {"t1": found.t1, "t2": found.t2, "largest_rise_in_40_s": found.largest_rise}
        except ValueError as error:
            own = {"no": str(error)}
        shown: dict[str, Any] = {
            "peak_of_the_base_row": float(base.watts.max() / budget),
            "sampling_seconds": base.interval,
            "thresholds_of_the_trace_itself": own,
            "sampling_hides": self.uncapped.peak_watts / float(self.uncapped.watts.max()),
            "brakes_at_30_percent": {TWO: honest.brakes, NONE: deleted.brakes},
            "seconds_at_each_level": {str(level): s for level, s in honest.capped_seconds.items()},
            "latency_added": {
                f"{'high' if g else 'low'} P{100 * q:g}": v for (g, q), v in losses(honest, self.uncapped).items()
            },
            "latency_allowed": {f"{'high' if g else 'low'} P{100 * q:g}": v for (g, q), v in GATES.items()},
            "joules_above_idle_over_uncapped": above_idle(honest, honest.row.servers)
            / above_idle(self.uncapped, honest.row.servers),
        }
        if goodputs:
            shown["goodput_per_second"] = {
                name: {f"{percent} %": self._goodput(name, self.servers(percent)) for percent in range(0, 60, 10)}
                for name in (TWO, EVERYBODY, NONE)
            }
        return shown

    def _goodput(self, name: str, added: int) -> float:
        return goodput(self.result(name, added), self.uncapped)


def above_idle(result: RowResult, servers: int) -> float:
    """Joules of the first so many servers above what they draw idle: how long the row was looked at does not count."""
    return float((result.by_server[:servers] - result.row.spec.idle).sum() * result.sampling)


def turned(levels: tuple[tuple[float, int], ...], length: float, by: float) -> list[tuple[float, int]]:
    """A schedule of levels moved by so many seconds, what passes the end coming in at the start."""
    moved = sorted(((at + by) % length, level) for at, level in levels)
    return [(0.0, moved[-1][1]), *moved]


def measured_phases(rounds: int) -> MeasuredPhases:
    """How the bundled model's phases bear half of this machine's threads.

    Raises RuntimeError where a prompt is no faster on all of them: the machine is busy or has one processor, and nothing can be learnt.
    """
    here = os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    threads = max(torch.get_num_threads(), min(here or 1, 2))
    if threads > 1:
        model = load_model(MODEL).model
        found = measure_phases(model, threads=(threads // 2, threads), prompt_tokens=256, new_tokens=8, rounds=rounds)
        if found.prompt_seconds[-1] < 0.9 * found.prompt_seconds[0]:
            return found
    raise RuntimeError(
        "a prompt is no faster on all threads than on half of them: the machine is busy, or has one processor"
    )


def _phases(found: MeasuredPhases | None, spec: ServerSpec) -> dict[str, Any]:
    shown: dict[str, Any] = {"prompt_beta": spec.prompt.beta, "token_beta": spec.token.beta}
    if found is not None:
        shown |= {
            "threads": found.threads,
            "prompt_seconds": found.prompt_seconds,
            "token_seconds": found.token_seconds,
            "watts": None if found.idle_watts is None else [found.idle_watts, found.prompt_watts, found.token_watts],
        }
    return shown


def document_lengths() -> dict[str, list[tuple[int, int]]]:
    """For each class of requests, pairs of lengths in tokens that real documents have: Python's docstrings and language reference."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(MODEL), local_files_only=True)
    ids = tokenizer([*docstrings(), *topics.values()], add_special_tokens=False, verbose=False)["input_ids"]
    known = np.array([len(one) for one in ids])
    chance = np.random.default_rng(0)
    found = {}
    for one in CLASSES:
        within = [known[(known >= low) & (known <= high)] for low, high in (one.prompt, one.new)]
        if not all(map(len, within)):
            raise ValueError(f"no document has the length of the {one.name} class")
        prompts, news = (chance.choice(values, 500) for values in within)
        found[one.name] = [(int(p), int(n)) for p, n in zip(prompts, news, strict=True)]
    return found
