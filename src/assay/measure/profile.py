"""Where a model's time and bytes go: for every module its measured time, its cost, and the least time the machine allows for it.

Cost and time come from separate runs, so that counting does not slow the clock. A module's time excludes the modules inside it:
the time of an attention module is that of its scores, weights and cache, not of its projections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from assay.measure.clock import OthersWatch, synchronize
from assay.measure.cost import KINDS, Cost, Kind, ModuleCost, counting, uncompiled
from assay.measure.machine import Calibration, Machine, calibrate, machine
from assay.measure.modules import module_names, watch_modules
from assay.measure.roofline import bound_share, intensity, lower_bound

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass
class Row:
    """What one module (or, grouped, the same module of every layer) did in one phase, over all its calls.

    Modelled: `macs` (1 MAC = 2 FLOPs), `bytes` moved, `attainable_seconds` (the bound of `assay.measure.roofline.lower_bound`).
    Measured: `seconds`, the median over the repeats, and `fastest`, their minimum. `peak` is the calibrated rate of `dtype` in
    operations a second.
    """

    name: str
    phase: Phase
    kind: Kind
    dtype: str
    calls: int
    params: int
    macs: int
    bytes: int
    seconds: float
    attainable_seconds: float
    peak: float
    fastest: float = 0.0
    modules: int = 1

    @property
    def efficiency(self) -> float | None:
        """Computational efficiency: the share of the peak rate that was reached; None if it was above it (`bound_share`)."""
        return bound_share(2 * self.macs / self.peak, self.seconds) if self.seconds > 0 else 0.0

    @property
    def gap(self) -> float | None:
        """1 / efficiency: how many times longer than at the peak rate; None for work without MACs or above the peak rate."""
        return 1 / self.efficiency if self.efficiency else None

    @property
    def roofline_share(self) -> float | None:
        """Attainable over measured time: 1 is as fast as this machine can do this work, None is void (`bound_share`)."""
        return bound_share(self.attainable_seconds, self.seconds) if self.seconds > 0 else 0.0

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return intensity(2 * self.macs, self.bytes)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the derived figures."""
        found = dataclasses.asdict(self)
        for name in ("efficiency", "gap", "roofline_share"):
            found[name] = getattr(self, name)
        return found | {"intensity": self.intensity if self.bytes else None}


@dataclass
class Profile:
    """The profile of one model on one input. `rows` are by phase and module, in the order in which modules first ran.

    `seconds` is the time of each phase without hooks (median over the repeats), `hooked_seconds` the time with them, to which the
    rows add up. `uncounted` has the calls of operators whose MACs are unknown (`assay.measure.cost`): those of their modules are too low.
    """

    rows: list[Row]
    seconds: dict[Phase, float]
    hooked_seconds: dict[Phase, float]
    prompt_tokens: int
    new_tokens: int
    machine: Machine
    calibration: Calibration
    uncounted: dict[str, int]
    noisy: bool

    def grouped(self, phase: Phase | None = None) -> list[Row]:
        """Rows with the numbers in module paths as "*": the layers of a model are added up, the two phases kept apart."""
        groups: dict[tuple[str, Phase], Row] = {}
        for row in self.rows:
            if phase not in (None, row.phase):
                continue
            name = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
            known = groups.get((name, row.phase))
            if known is None:
                groups[name, row.phase] = dataclasses.replace(row, name=name)
                continue
            for field in ("calls", "params", "macs", "bytes", "seconds", "fastest", "attainable_seconds", "modules"):
                setattr(known, field, getattr(known, field) + getattr(row, field))
        return list(groups.values())

    def kinds(self, phase: Phase | None = None) -> dict[str, dict[str, float]]:
        """For "linear", "attention" and "other", of one phase or both: seconds, attainable_seconds, macs, bytes, share of time."""
        rows = [row for row in self.rows if phase in (None, row.phase)]
        whole = sum(row.seconds for row in rows)
        found: dict[str, dict[str, float]] = {}
        for kind in KINDS:
            own = [row for row in rows if row.kind == kind]
            fields = ("seconds", "attainable_seconds", "macs", "bytes")
            found[kind] = {field: sum(getattr(row, field) for row in own) for field in fields}
            found[kind]["share"] = found[kind]["seconds"] / whole if whole > 0 else 0.0
        return found

    def waterline(self, phase: Phase | None = None) -> list[dict[str, Any]]:
        """One bar for each group of modules: its share of the time, its intensity (operations per byte) and its dtype.

        A bar that ends below the machine's ridge for its dtype waits for memory. Groups that moved nothing are left out, so the shares
        add up to at most 1.
        """
        rows = self.grouped(phase)
        whole = sum(row.seconds for row in rows)
        return [
            {"name": row.name, "share": row.seconds / whole, "intensity": row.intensity, "dtype": row.dtype}
            for row in rows
            if row.bytes and row.seconds > 0
        ]

    @property
    def void(self) -> str:
        """Why no share of the calibrated limits holds, or "": a module was faster than they allow (`bound_share`)."""
        beaten = [row for row in self.grouped() if row.roofline_share is None]
        if not beaten:
            return ""
        worst = min(beaten, key=lambda row: row.seconds / row.attainable_seconds)
        return (
            f"{worst.name or 'the model'} ({worst.phase}) took {100 * worst.seconds / worst.attainable_seconds:.0f} % of the least time "
            "the calibrated limits allow. They are too low, and shares of them are void; calibrate again on a quiet machine "
            "(assay doctor --calibrate)."
        )

    @property
    def roofline_share(self) -> float | None:
        """Attainable over measured time of the whole run, each module taken by itself: savings by fusion are not included.

        A compiled model, which makes those savings, may so reach more than 1. None if the calibration is `void`.
        """
        whole = sum(self.seconds.values())
        if self.void:
            return None
        return sum(row.attainable_seconds for row in self.rows) / whole if whole > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able. Where the calibration is `void`, all shares of it are None."""
        void = self.void
        shares: dict[str, None] = dict.fromkeys(("efficiency", "gap", "roofline_share")) if void else {}
        return {
            "machine": self.machine.as_dict(),
            "calibration": self.calibration.as_dict(),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": dict(self.seconds),
            "hooked_seconds": dict(self.hooked_seconds),
            "roofline_share": self.roofline_share,
            "void": void,
            "noisy": self.noisy,
            "uncounted": self.uncounted,
            "modules": [row.as_dict() | shares for row in self.rows],
            "groups": [row.as_dict() | shares for row in self.grouped()],
            "kinds": self.kinds(),
            "phases": {phase: self.kinds(phase) for phase in self.seconds},
        }


@torch.inference_mode()
def profile_model(
    model: nn.Module,
    inputs: torch.Tensor,
    new_tokens: int = 1,
    *,
    repeats: int = 3,
    calibration: Calibration | None = None,
) -> Profile:
    """Profile a forward pass over `inputs` (phase "prefill") and the `new_tokens` - 1 greedy steps that follow it ("decode").

    A causal language model of transformers takes token ids (batch, tokens) and runs as in generation: with a cache, and logits of
    the last position only. Any other module is called with `inputs` as they are, and `new_tokens` must be 1. The model is run
    1 + 2 * `repeats` times, after one warm-up. `calibration` None takes the machine's stored one (measured if there is none).
    On a GPU every module waits for the device, so small modules look slower than they are.

    Raises ValueError for new_tokens or repeats < 1, empty inputs, or new_tokens > 1 with a model that returns no cache.
    """
    if new_tokens < 1 or repeats < 1:
        raise ValueError(f"new_tokens and repeats must be at least 1, got {new_tokens} and {repeats}")
    if inputs.numel() == 0:
        raise ValueError(f"inputs must hold something, got shape {tuple(inputs.shape)}")
    device = "cuda" if inputs.is_cuda else "cpu"
    calibration = calibration or calibrate(device=device)
    training = model.training
    model.eval()
    try:
        watch = OthersWatch()
        _run(model, inputs, new_tokens, _nothing)  # warm-up
        rows, uncounted = _costs(model, inputs, new_tokens, calibration)
        plain: dict[Phase, list[float]] = {}
        hooked: dict[Phase, list[float]] = {}
        own: dict[tuple[Phase, str], list[float]] = {}
        for _ in range(repeats):
            for phase, seconds in _plain_times(model, inputs, new_tokens).items():
                plain.setdefault(phase, []).append(seconds)
            times = _module_times(model, inputs, new_tokens)
            for key, seconds in times.items():
                own.setdefault(key, []).append(seconds)
            for phase in plain:
                hooked.setdefault(phase, []).append(sum(s for (p, _), s in times.items() if p == phase))
    finally:
        model.train(training)
    for (phase, name), samples in own.items():
        if (phase, name) in rows:
            rows[phase, name].seconds, rows[phase, name].fastest = statistics.median(samples), min(samples)
    return Profile(
        rows=list(rows.values()),
        seconds={phase: statistics.median(samples) for phase, samples in plain.items()},
        hooked_seconds={phase: statistics.median(samples) for phase, samples in hooked.items()},
        prompt_tokens=inputs.shape[1] if inputs.dim() == 2 else 0,
        new_tokens=new_tokens,
        machine=machine(),
        calibration=calibration,
        uncounted=uncounted,
        noisy=watch.stop()[1],
    )


Around = Callable[[Phase], contextlib.AbstractContextManager[Any]]


def _nothing(phase: Phase) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _run(model: nn.Module, inputs: torch.Tensor, new_tokens: int, around: Around) -> None:
    """Prefill and decode steps, with each phase's model calls inside `around(phase)`."""
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        if new_tokens > 1:
            raise ValueError(
                f"new_tokens must be 1 for {type(model).__name__}, which takes no input_ids; got {new_tokens}"
            )
        with around("prefill"):
            model(inputs)
        return
    settings: dict[str, Any] = {"use_cache": True} if "use_cache" in accepted else {}
    if "logits_to_keep" in accepted:
        settings["logits_to_keep"] = 1
    with around("prefill"):
        out = model(input_ids=inputs, **settings)
    if new_tokens == 1:
        return
    if getattr(out, "cache", None) is None:
        raise ValueError(f"new_tokens must be 1 for {type(model).__name__}, which returns no cache; got {new_tokens}")
    with around("decode"):
        for _ in range(new_tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, cache=out.cache, **settings)


def _costs(
    model: nn.Module, inputs: torch.Tensor, new_tokens: int, calibration: Calibration
) -> tuple[dict[tuple[Phase, str], Row], dict[str, int]]:
    """A row for every module that ran, still without times, and the calls of operators that could not be counted."""
    costs: dict[Phase, Cost] = {}

    @contextlib.contextmanager
    def counted(phase: Phase) -> Iterator[None]:
        with counting(model) as counter:
            yield
        costs[phase] = counter.cost()

    _run(model, inputs, new_tokens, counted)
    # weights that do not fit into the last cache have to come from main memory every time; here a tied one counts at each user
    weights = {name: sum(t.nbytes for t in _own_tensors(module)) for name, module in model.named_modules()}
    whole = sum(found.weight_bytes for found in costs["prefill"].modules)
    if whole < max(calibration.cache_bandwidth, default=0):
        weights = {}
    rows = {
        (phase, found.name): _row(phase, found, calibration, weights.get(found.name, 0))
        for phase, cost in costs.items()
        for found in cost.modules
    }
    uncounted: dict[str, int] = {}
    for cost in costs.values():
        for name, calls in cost.uncounted.items():
            uncounted[name] = uncounted.get(name, 0) + calls
    return {key: row for key, row in rows.items() if row.calls}, uncounted


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _row(phase: Phase, found: ModuleCost, calibration: Calibration, cold_bytes: int) -> Row:
    dtype = found.dtype if found.dtype in calibration.peak_flops else "float32"
    calls = max(found.calls, 1)
    bound = lower_bound(found.macs / calls, found.bytes / calls, dtype, calibration, cold_bytes=cold_bytes)
    return Row(
        name=found.name,
        phase=phase,
        kind=found.kind,
        dtype=dtype,
        calls=found.calls,
        params=found.params,
        macs=found.macs,
        bytes=found.bytes,
        seconds=0.0,
        attainable_seconds=calls * bound,
        peak=calibration.peak(dtype),
    )


def _plain_times(model: nn.Module, inputs: torch.Tensor, new_tokens: int) -> dict[Phase, float]:
    found: dict[Phase, float] = {}

    @contextlib.contextmanager
    def timed(phase: Phase) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        found[phase] = time.perf_counter() - start

    _run(model, inputs, new_tokens, timed)
    return found


def _module_times(model: nn.Module, inputs: torch.Tensor, new_tokens: int) -> dict[tuple[Phase, str], float]:
    """Own seconds of every module by phase; a compiled model runs uncompiled here."""
    names = module_names(model)
    found: dict[tuple[Phase, str], float] = {}

    @contextlib.contextmanager
    def timed(phase: Phase) -> Iterator[None]:
        timer = _Timer(names, inputs.is_cuda)
        with uncompiled(), watch_modules(timer.enter, timer.leave):
            yield
        found.update({(phase, name): spent / 1e9 for name, spent in timer.own.items()})

    _run(model, inputs, new_tokens, timed)
    return found


class _Timer:
    """Each moment belongs to the innermost running module; time outside all modules belongs to none."""

    def __init__(self, names: dict[int, str], wait: bool) -> None:
        self.own: dict[str, int] = {}
        self._names = names
        self._wait = wait
        self._stack: list[str] = []
        self._mark = 0

    def enter(self, module: nn.Module) -> None:
        self._book()
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def leave(self, module: nn.Module) -> None:
        self._book()
        self._stack.pop()

    def _book(self) -> None:
        if self._wait:
            torch.cuda.synchronize()
        now = time.perf_counter_ns()
        if self._stack:
            self.own[self._stack[-1]] = self.own.get(self._stack[-1], 0) + now - self._mark
        self._mark = now
