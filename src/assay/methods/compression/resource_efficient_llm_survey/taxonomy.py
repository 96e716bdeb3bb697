"""Which method touches which resource, at which stage: the survey's two-way order as data that can be asked.

What a transform of this package does, it says itself (its goals, its slot, whether it is exact): `entry_of` reads that, so that there is no
list to keep. Methods that are no transforms are entered by whoever has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from assay import checks

RESOURCES = ("computation", "memory", "energy", "money", "network")
STAGES = ("architecture", "pre-training", "finetuning", "inference", "system")
OF_GOAL = {
    "ttft": "computation",
    "throughput": "computation",
    "decode": "computation",  # time, though it is the reading of weights: a fast token may take more memory, as speculation does
    "memory": "memory",
    "energy": "energy",
}
"""The resource that a goal of the tuner saves."""
SYSTEM = ("batching", "compile", "settings")
"""Slots of a transform that leave the model's computation as it is and change how it is run."""


@dataclass(frozen=True)
class Entry:
    """A method in the survey's order. `slot` is what it takes the place of: methods of different slots compose, "" composes with all.

    Raises ValueError for a resource or stage that the survey does not have, and for an entry without a resource.
    """

    name: str
    resources: frozenset[str]
    stage: str
    exact: bool
    trains: bool = False
    needs: str = ""
    slot: str = ""

    def __post_init__(self) -> None:
        if not self.resources:
            raise ValueError(f"resources of {self.name!r} must name at least one of {', '.join(RESOURCES)}, got none")
        for resource in self.resources:
            checks.choice("a resource", resource, RESOURCES)
        checks.choice("stage", self.stage, STAGES)
        checks.flag("exact", self.exact)
        checks.flag("trains", self.trains)

    def composes_with(self, other: Entry) -> bool:
        """Whether both can be had at once."""
        return self.name != other.name and (not self.slot or not other.slot or self.slot != other.slot)


def entry_of(transform: Any) -> Entry:
    """The entry of a transform (`methods.transform`). None of them trains; what they calibrate on is a few texts."""
    goals = frozenset(OF_GOAL[goal] for goal in transform.goals if goal in OF_GOAL)
    stage = "system" if transform.slot in SYSTEM else "inference"
    return Entry(transform.name, goals, stage, bool(transform.exact), slot=transform.slot)


def query(
    entries: Iterable[Entry],
    *,
    resource: str | None = None,
    stage: str | None = None,
    exact: bool | None = None,
    trains: bool | None = None,
    beside: Entry | None = None,
    measured: Collection[str] = (),
) -> list[Entry]:
    """The entries that fit all that is asked; those whose names are among `measured` first, then by name.

    >>> cache = Entry("a smaller cache", frozenset({"memory"}), "inference", exact=False)
    >>> tuned = Entry("adapters", frozenset({"memory"}), "finetuning", exact=False, trains=True)
    >>> [found.name for found in query([tuned, cache], resource="memory", trains=False)]
    ['a smaller cache']
    """
    if resource is not None:
        checks.choice("resource", resource, RESOURCES)
    if stage is not None:
        checks.choice("stage", stage, STAGES)
    found = [
        entry
        for entry in entries
        if (resource is None or resource in entry.resources)
        and (stage is None or stage == entry.stage)
        and (exact is None or exact == entry.exact)
        and (trains is None or trains == entry.trains)
        and (beside is None or entry.composes_with(beside))
    ]
    return sorted(found, key=lambda entry: (entry.name not in measured, entry.name))
