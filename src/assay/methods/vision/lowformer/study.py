"""The paper's execution-time study as a tool: how long modules take for the multiply-accumulates they do, on this machine.

    study = bench_modules(equal_macs(28, 16), batch=8)      # or your own list of `Case`s
    print(study.table())
    rank_correlation([row.macs for row in study.rows], [row.seconds for row in study.rows])

Modules are timed as `assay.measure.clock` does, in interleaved rounds after a warm-up. MACs and bytes are modelled, times are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from assay import checks
from assay.measure.clock import Timings, compare_many
from assay.measure.cost import count_cost
from assay.measure.stats import Interval
from assay.methods.vision.lowformer.model import FusedMBConv, MBConv


@dataclass(frozen=True)
class Case:
    """A module for the study, and its input: `channels` maps of `size` x `size`. `make` is called once, without arguments."""

    name: str
    make: Callable[[], nn.Module]
    channels: int
    size: int


@dataclass(frozen=True)
class Row:
    """What was seen of a case: MACs and bytes of a whole batch (modelled), the median seconds of a run (measured)."""

    name: str
    macs: int
    bytes: int
    seconds: float

    @property
    def gmacs_per_second(self) -> float:
        """10^9 multiply-accumulates a second."""
        return self.macs / self.seconds / 1e9


@dataclass(frozen=True)
class Study:
    """The rows in the order of the cases, and the times they come from. `noisy`: the machine was busy with other things."""

    rows: tuple[Row, ...]
    timings: Timings
    batch: int
    device: str
    dtype: str
    threads: int

    @property
    def noisy(self) -> bool:
        return self.timings.noisy

    def speedup(self, slow: str, fast: str) -> Interval:
        """Seconds of the case `slow` over those of `fast`: the median over rounds with its 95 % interval."""
        return self.timings.speedup(slow, fast)

    def table(self) -> str:
        """One line a case."""
        head = f"{'module':40} {'MMACs':>10} {'MB':>9} {'ms':>9} {'GMAC/s':>9}"
        lines = [
            f"{row.name[-40:]:40} {row.macs / 1e6:10.2f} {row.bytes / 1e6:9.3f} {1e3 * row.seconds:9.3f} {row.gmacs_per_second:9.2f}"
            for row in self.rows
        ]
        where = (
            f"batch {self.batch}, {self.dtype}, {self.device}, {self.threads} threads{', noisy' if self.noisy else ''}"
        )
        return "\n".join([head, *lines, where])


def bench_modules(
    grid: Sequence[Case],
    *,
    batch: int = 8,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 12,
    max_seconds: float | None = None,
) -> Study:
    """Time every case of the grid on random maps (batch, channels, size, size), channels-last, in evaluation mode without gradients.

    Throughput is a large batch, latency a batch of 1. `max_seconds` ends the rounds early (two are run at least). Raises ValueError for an
    empty grid, a name used twice, a batch below 1 or a device that is not there.
    Random inputs do for modules whose time does not depend on them, as all of the paper's; do not time early exits or routing this way.

    >>> study = bench_modules([Case("conv", lambda: nn.Conv2d(8, 8, 3), 8, 16)], batch=1, rounds=2)
    >>> study.rows[0].macs
    112896
    """
    names = [case.name for case in grid]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"grid must hold at least one case, each with a name of its own, got {names}")
    batch = checks.whole("batch", batch, low=1)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one of this machine's, got {device!r} without CUDA")
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    costs = {}
    for case in grid:
        x = torch.randn(batch, case.channels, case.size, case.size, device=device, dtype=dtype)
        module = case.make().eval().to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
        costs[case.name] = count_cost(module, x)
        runs[case.name] = partial(_run, module, x)
    timings = compare_many(runs, rounds=rounds, max_seconds=max_seconds)
    rows = tuple(
        Row(name, costs[name].macs, costs[name].bytes, float(np.median(timings.seconds[name]))) for name in names
    )
    return Study(rows, timings, batch, device, str(dtype).removeprefix("torch."), torch.get_num_threads())


@torch.inference_mode()
def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module(x)
    return out


def equal_macs(size: int, channels: int) -> list[Case]:
    """3x3 convolutions of equal MACs, 9 (size * channels)^2 an image: more groups at more channels, and lower resolution at more channels.

    Groups g stand at sqrt(g) times the channels, up to the depthwise one of channels^2; half the resolution stands at twice the channels.
    Raises ValueError unless `size` is a multiple of 4 and `channels` a power of two from 2.
    """
    if checks.whole("size", size, low=4) % 4:
        raise ValueError(f"size must be a multiple of 4, got {size}")
    checks.choice("channels", channels, [2**power for power in range(1, 9)])
    found = [_conv(channels << step, 4**step, size) for step in range(channels.bit_length())]
    return found + [_conv(channels << step, 1, size >> step) for step in (1, 2)]


def _conv(channels: int, groups: int, size: int) -> Case:
    kind = "dense" if groups == 1 else "depthwise" if groups == channels else f"{groups} groups"
    make = partial(nn.Conv2d, channels, channels, 3, padding=1, groups=groups, bias=False)
    return Case(f"{kind}, {channels} channels, {size} x {size}", make, channels, size)


def fused_and_not(size: int, channels: int, *, expansion: float = 4) -> list[Case]:
    """The fused and the depthwise MBConv of the same widths; the fused one does up to five times the MACs."""
    make = {"fused MBConv": FusedMBConv, "MBConv": MBConv}
    return [
        Case(
            f"{name}, {channels} channels, {size} x {size}",
            partial(kind, channels, channels, expansion=expansion),
            channels,
            size,
        )
        for name, kind in make.items()
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank: of MACs with seconds, 1 where MACs order modules as times do.

    Raises ValueError for lists of other lengths, of fewer than two, all equal, or not finite.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a and b must have the same length of at least 2, got {len(a)} and {len(b)}")
    if not all(np.isfinite(values).all() for values in (a, b)):
        raise ValueError("a and b must be finite, got NaN or infinity: it has no rank")
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (a, b)]
    if min(float(rank.std()) for rank in ranks) == 0:
        raise ValueError("a and b must not be all equal: there is no order to compare")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return np.asarray(below + (same - 1) / 2)
