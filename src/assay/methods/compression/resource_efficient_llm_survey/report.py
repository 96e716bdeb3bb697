"""One table for all resources: reports that are modelled or measured, never both, and which configurations none beats.

A speed without its batch, lengths, number format and device says nothing, so that a report cannot be made without them; a measured one
says on how many threads and with which version besides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal

from assay import checks
from assay.measure.energy import EnergyMeter

Source = Literal["modelled", "measured"]
SOURCES: tuple[Source, ...] = ("modelled", "measured")
UNITS = {
    "parameters": "",
    "parameters_without_tables": "",
    "weight_bytes": "B",
    "cache_bytes": "B",
    "peak_bytes": "B",
    "network_bytes": "B",
    "flops": "FLOP",
    "prefill_seconds": "s",
    "token_seconds": "s",
    "seconds": "s",
    "tokens_per_second": "1/s",
    "joules": "J",
    "joules_low": "J",
    "joules_high": "J",
    "grams_co2_low": "g",
    "grams_co2_high": "g",
    "price": "price",
    "quality": "",
}
"""What a report may hold, and its unit: a FLOP is one operation, a multiply-add two; a byte is eight bits; GB is 1e9 bytes."""
MORE_IS_BETTER = ("tokens_per_second", "quality")
SAME = ("batch", "prompt_tokens", "new_tokens", "device", "threads")


@dataclass(frozen=True)
class ResourceReport:
    """Amounts of resources (`UNITS`) that one workload takes, all modelled or all measured.

    Raises ValueError for a name that has no unit, an amount that is negative or not finite, and a measured report that does not say its
    threads and its version.
    """

    source: Source
    amounts: Mapping[str, float]
    batch: int
    prompt_tokens: int
    new_tokens: int
    format: str
    device: str
    threads: int = 0
    version: str = ""

    def __post_init__(self) -> None:
        checks.choice("source", self.source, SOURCES)
        if not isinstance(self.amounts, Mapping):
            raise TypeError(f"amounts must map names to numbers, got {self.amounts!r}")
        for name in ("format", "device", "version"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}")
        for name, amount in self.amounts.items():
            checks.choice("an amount's name", name, tuple(UNITS))
            checks.number(name, amount, low=0)
        for name in ("batch", "prompt_tokens", "new_tokens"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("format", "device"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be said, got {getattr(self, name)!r}")
        measured = self.source == "measured"
        checks.whole("threads", self.threads, low=1 if measured else 0)
        if measured and not self.version:
            raise ValueError("version must be said of what was measured, got ''")

    def to_json(self) -> str:
        """The report as JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ResourceReport:
        """The report that `to_json` wrote. Raises ValueError for anything else."""
        found = json.loads(text)
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"text must hold a report: {error}") from None

    def codecarbon(self) -> dict[str, float]:
        """The amounts under CodeCarbon's names: seconds, kWh and kg. Where there are two ends, the upper one."""
        joules = self.amounts.get("joules", self.amounts.get("joules_high", 0.0))
        return {
            "duration": self.amounts.get("seconds", 0.0),
            "energy_consumed": joules / 3.6e6,
            "emissions": self.amounts.get("grams_co2_high", 0.0) / 1e3,
        }


def markdown(reports: Mapping[str, ResourceReport]) -> str:
    """Reports by name as one table, a row for each amount; modelled and measured figures stand in columns of their own.

    Raises ValueError without reports.
    """
    if not reports:
        raise ValueError("reports must hold at least one, got none")
    names = [name for name in UNITS if any(name in one.amounts for one in reports.values())]
    head = ["resource", *(f"{label} ({one.source}, {one.format})" for label, one in reports.items())]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in names:
        unit = f" [{UNITS[name]}]" if UNITS[name] else ""
        cells = [f"{one.amounts[name]:.4g}" if name in one.amounts else "" for one in reports.values()]
        lines.append("| " + " | ".join([name + unit, *cells]) + " |")
    return "\n".join(lines)


def compared(reference: ResourceReport, other: ResourceReport) -> dict[str, float]:
    """How many times less of each amount that both have `other` takes (of what is better more: how many times more it gives).

    Raises ValueError where one is modelled and the other measured, or they differ in batch, lengths, device or threads: such a ratio
    would be void. Amounts that are 0 on either side are left out.
    """
    if reference.source != other.source:
        raise ValueError(f"other must be {reference.source} as the reference is, got {other.source}")
    for name in SAME:
        if getattr(reference, name) != getattr(other, name):
            raise ValueError(
                f"{name} of other must be the reference's, {getattr(reference, name)!r}, got {getattr(other, name)!r}"
            )
    found = {}
    for name, amount in reference.amounts.items():
        another = other.amounts.get(name, 0.0)
        if amount > 0 and another > 0:
            found[name] = another / amount if name in MORE_IS_BETTER else amount / another
    return found


def pareto(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[int]:
    """Which rows no other beats: none is as good in all of `names` and better in one. Numbers of rows, in their order.

    Rows that are alike in all names stay together. Raises ValueError without names or for a row that lacks one.

    >>> rows = [{"seconds": 1, "peak_bytes": 9}, {"seconds": 2, "peak_bytes": 3}, {"seconds": 2, "peak_bytes": 9}]
    >>> pareto(rows, ["seconds", "peak_bytes"])
    [0, 1]
    """
    if not names:
        raise ValueError("names must hold at least one amount, got none")
    points = []
    for number, row in enumerate(rows):
        if lacking := [name for name in names if name not in row]:
            raise ValueError(f"rows[{number}] must have {lacking[0]}")
        signs = [-1 if name in MORE_IS_BETTER else 1 for name in names]
        points.append([sign * checks.number(name, row[name]) for sign, name in zip(signs, names, strict=True)])

    def beaten(one: list[float]) -> bool:
        return any(other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in points)

    return [number for number, point in enumerate(points) if not beaten(point)]


@dataclass
class Seen:
    """What `measure` fills in when its block ends. `joules` is None where no counter is, and includes what else the machine did."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    joules: float | None = None
    threads: int = 0
    version: str = field(default_factory=lambda: metadata.version("torch"))

    def report(
        self, *, batch: int, prompt_tokens: int, new_tokens: int, format: str, device: str, **amounts: float
    ) -> ResourceReport:
        """A measured report of the block, with further amounts that were measured in it (`UNITS`)."""
        own: dict[str, float] = {"seconds": self.seconds, "tokens_per_second": new_tokens / self.seconds}
        if self.peak_bytes is not None:
            own["peak_bytes"] = float(self.peak_bytes)
        if self.joules is not None:
            own["joules"] = self.joules
        return ResourceReport(
            "measured", {**own, **amounts}, batch, prompt_tokens, new_tokens, format, device, self.threads, self.version
        )


@contextmanager
def measure() -> Iterator[Seen]:
    """Measure what a block takes: wall seconds, joules where the hardware counts them, and the process's peak resident bytes so far.

    The peak is that of the process since it began, not of the block alone: for that, take a fresh process.
    """
    import torch

    from assay.measure.child import peak_resident

    seen = Seen(threads=torch.get_num_threads())
    with EnergyMeter() as meter:
        start = time.perf_counter()
        yield seen
        seen.seconds = time.perf_counter() - start
    seen.peak_bytes, seen.joules = peak_resident(), meter.joules


def fidelity(reference: Any, logits: Any) -> dict[str, float]:
    """How near logits (..., vocabulary) are to a reference's: mean KL divergence of the reference's distribution, in nats, and the share of
    places where the likeliest token is the same. Raises ValueError for another shape, NaN or infinity."""
    checks.tensor("reference", reference, finite=True)
    checks.tensor("logits", logits, shape=tuple(reference.shape), finite=True)
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }
