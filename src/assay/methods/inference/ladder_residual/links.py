"""How ranks add up what each of them computed: over `torch.distributed`, with a slower link imitated if asked, or not at all.

A link has `rank`, `world` and `all_reduce(x)`, which starts the sum of `x` over all ranks and returns a handle at once; `handle.wait()`
gives the sum. The tensor belongs to the link from the call to the end of the wait: it is overwritten in place, and nobody else may read
or write it meanwhile.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from assay import checks

SPIN = 3e-4
"""Seconds before a moment at which `wait_until` stops sleeping: sleeps end late, on Linux by a tenth of a millisecond (our choice)."""


def wait_until(due: float) -> None:
    """Return at the moment `due` of `time.perf_counter`, or at once if it is past: sleep until shortly before it, then look at the clock.

    A sleep alone ends late by what waking takes, and only whoever waits would pay for that: an order of modules that waits for every
    message would seem slower than the link makes it, beside one whose messages have arrived before they are asked for.
    """
    while (left := due - time.perf_counter()) > 0:
        if left > SPIN:
            time.sleep(left - SPIN)


class Handle(Protocol):
    """A sum under way, from `start` to `end` by `time.perf_counter`; `end` is known after `wait`."""

    start: float
    end: float

    def wait(self) -> Tensor:
        """The sum, once it is there."""
        ...


class Link(Protocol):
    """What the ranks of a model share; see the module."""

    rank: int
    world: int

    def all_reduce(self, x: Tensor) -> Handle:
        """Start summing `x` over all ranks; all of them call it in the same order, with equal shapes."""
        ...


class Arrived:
    """A handle of something that is there already."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self.start = self.end = time.perf_counter()

    def wait(self) -> Tensor:
        return self._x


class Alone:
    """The link of a single rank: there is nobody to wait for."""

    rank, world = 0, 1

    def all_reduce(self, x: Tensor) -> Arrived:
        return Arrived(x)


class Silent:
    """A link over which nothing is sent, in place of `link`: the time of a model without communication, whose results are wrong."""

    def __init__(self, link: Link) -> None:
        self.rank, self.world = link.rank, link.world

    def all_reduce(self, x: Tensor) -> Arrived:
        return Arrived(x)


class GroupLink:
    """The ranks of a process group of `torch.distributed` (None: the default one), each an all-reduce that does not block.

    `latency` (seconds) and `bandwidth` (bytes a second, None: unlimited) imitate a slower link: a message's wait returns no earlier
    than latency + bytes / bandwidth after its start on this rank. The difference is slept, which takes no processor time, but for the last
    moment (`wait_until`). A message starts when it is sent and the imitated one before it has arrived, as the collectives of one
    communicator do. What the group itself needs is not added but covered. Only tensors on the processor travel over an imitated link: an
    accelerator does not wait where the processor sleeps. Raises RuntimeError when no group was set up, ValueError for times below 0, and
    for tensors elsewhere if something is imitated.
    """

    def __init__(self, group: Any = None, *, latency: float = 0.0, bandwidth: float | None = None) -> None:
        self.latency = checks.number("latency", latency, low=0)
        self.bandwidth = None if bandwidth is None else checks.number("bandwidth", bandwidth, above=0)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch.distributed must be set up first: init_process_group, or `Ranks`")
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self._free = 0.0  # when the last imitated message has arrived

    def all_reduce(self, x: Tensor) -> _Message:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("sums over ranks have no gradient: run the model under torch.no_grad()")
        imitated = bool(self.latency) or self.bandwidth is not None
        if imitated and x.device.type != "cpu":
            raise ValueError(f"x must be on the CPU where a slower link is imitated, got a tensor on {x.device}")
        message = x.contiguous()
        seconds = self.latency + (message.nbytes / self.bandwidth if self.bandwidth else 0.0)
        start = time.perf_counter()
        if seconds:
            start = max(start, self._free)
            self._free = start + seconds
        return _Message(dist.all_reduce(message, group=self.group, async_op=True), message, start, seconds)


class _Message:
    def __init__(self, work: Any, x: Tensor, start: float, seconds: float) -> None:
        self._work, self._x, self._due = work, x, start + seconds
        self.start, self.end = start, start

    def wait(self) -> Tensor:
        """The sum. `end` is when it arrived, at the earliest the imitated arrival; of one that lay there unseen, the moment it was seen
        if nothing is imitated.
        """
        early = self._work.is_completed() and self._due > self.start
        self._work.wait()
        now = time.perf_counter()
        wait_until(self._due)
        self.end = self._due if early else max(now, self._due)
        return self._x
