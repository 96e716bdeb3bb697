"""Where a tuning run measures: in child processes on this machine, or on the machines of a Ray cluster.

A machine measures one thing at a time. Only machines of a cluster that are alike take part: same hardware fingerprint, same
version of assay, same model. Things that are compared with each other are always measured on the same machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from assay.errors import InputError
from assay.evidence.cluster import RayCluster
from assay.evidence.place import Place, here
from assay.measure.isolate import ChildResult, run_isolated
from assay.tuner.journal import identity
from assay.tuner.work import Settings


@dataclass(frozen=True)
class Call:
    """A function of `assay.tuner.child`, with its arguments and limits."""

    function: str
    arguments: dict[str, Any]
    seconds: float
    memory_bytes: int

    def run(self) -> ChildResult:
        """On this machine, in a child process."""
        return run_isolated(
            f"assay.tuner.child:{self.function}",
            self.arguments,
            timeout_s=max(self.seconds, 1.0),
            memory_bytes=self.memory_bytes,
        )


class Nodes(Protocol):
    """The machines: how many measure at a time, and which were left out and why. `run` yields (number, result) as results arrive."""

    local: bool  # they are this machine, and see its files
    place: Place
    left_out: list[dict[str, Any]]

    @property
    def count(self) -> int: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *_: object) -> None: ...
    def run(self, calls: list[Call]) -> Iterator[tuple[int, ChildResult]]: ...


class Here:
    """This machine alone."""

    count, local = 1, True

    def __init__(self) -> None:
        self.place = here()
        self.left_out: list[dict[str, Any]] = []

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, calls: list[Call]) -> Iterator[tuple[int, ChildResult]]:
        for number, call in enumerate(calls):
            yield number, call.run()


class RayNodes(RayCluster):
    """The largest group of identical machines in a Ray cluster; among groups of equal size, the one like this machine.

    Raises InputError and MissingError as `RayCluster` does, and InputError when no machine can take part.
    """

    local = False

    def __init__(self, address: str, settings: Settings) -> None:
        super().__init__(address)
        try:
            self.group, self.left_out = self._alike(settings)
        except BaseException:
            self.__exit__()
            raise
        self.place = self.places[self.group[0]]

    @property
    def count(self) -> int:
        return len(self.group)

    def run(self, calls: list[Call]) -> Iterator[tuple[int, ChildResult]]:  # type: ignore[override]
        """The results as they arrive; if a machine is lost, its call "failed" and it measures no more."""
        waiting, free = list(enumerate(calls)), list(self.group)
        running: dict[Any, tuple[int, int]] = {}
        threads = os.environ.get("OMP_NUM_THREADS")
        while waiting or running:
            while waiting and free:
                number, call = waiting.pop(0)
                node = free.pop(0)
                running[self._task(self._nodes[node], _call).remote(call, threads)] = (node, number)
            if not running:
                raise InputError("all machines of the Ray cluster were lost; what was measured is kept, see --resume")
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            node, number = running.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayError as error:
                first = str(error).strip().splitlines()[0]
                result = ChildResult("failed", None, f"the machine or its worker was lost: {first}", 0.0, 0, 0.0)
            if self._is_alive(node):
                free.append(node)
            else:
                self.group.remove(node)
            yield number, result

    def _alike(self, settings: Settings) -> tuple[list[int], list[dict[str, Any]]]:
        """The machines that take part, and the others with the reason why not."""
        tasks = [self._task(node, _identity).remote(settings) for node in self._nodes]
        found: list[dict[str, Any]] = self._ray.get(tasks)
        return alike(self.places, found, here())


def alike(places: list[Place], found: list[dict[str, Any]], mine: Place) -> tuple[list[int], list[dict[str, Any]]]:
    """The numbers of the machines that may be compared, and the others with the reason why not.

    `found` is each machine's identity of the run (`journal.identity`), or {"error": why it has none}. The largest group of
    equal ones is chosen; among groups of equal size, the one like `mine`. Raises InputError when no machine is left.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, (place, own) in enumerate(zip(places, found, strict=True)):
        if "error" not in own and (place.assay_version, place.commit) == (mine.assay_version, mine.commit):
            groups.setdefault(
                (place.fingerprint, own["model"], own["workload"], own["eval"], own["machine"]), []
            ).append(number)
    if not groups:
        raise InputError(f"no machine of the Ray cluster can take part: {_reason(places[0], found[0], mine)}")
    key, chosen = max(groups.items(), key=lambda item: (len(item[1]), item[0][0] == mine.fingerprint))
    others = []
    for number, place in enumerate(places):
        if number not in chosen:
            why = _reason(place, found[number], mine)
            if not why:
                why = (
                    "another kind of machine" if place.fingerprint != key[0] else "other files of the model or workload"
                )
            others.append({"fingerprint": place.fingerprint, "reason": why})
    return chosen, others


def _reason(place: Place, own: dict[str, Any], mine: Place) -> str:
    if "error" in own:
        return str(own["error"])
    if (place.assay_version, place.commit) != (mine.assay_version, mine.commit):
        return f"it has assay {place.assay_version} {place.commit}".rstrip() + ", this machine another"
    return ""


def _identity(settings: Settings) -> dict[str, Any]:
    try:
        return identity(settings)
    except Exception as error:  # whatever it lacks, the others go on without it
        return {"error": " ".join(str(error).split())[:300]}


def _call(call: Call, threads: str | None) -> ChildResult:
    """`call.run()` with the caller's thread setting (Ray sets its own)."""
    os.environ.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    return call.run()
