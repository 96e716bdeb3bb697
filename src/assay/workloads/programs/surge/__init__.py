"""Programs whose output is to be predicted, in eight components and five languages. They are run elsewhere: nothing here is executed.

    for source in sources():
        print(source.id, source.component, source.language, source.given)

The programs are our own, written for this; beside them stand the bank of HumanEval tasks and the C++ problems. A `group` is one program
with its inputs and mutations: it is learned from or judged, never both. What a program prints is found by running it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from assay.workloads.programs.surge import buggy, competition, flags, proofs, repositories, science, simple, slow
from assay.workloads.programs.surge.source import Source

__all__ = ["PARTS", "Source", "sources"]

PARTS = {
    "ML": simple.made,
    "CL": competition.made,
    "RL": repositories.made,
    "SC": science.made,
    "TC": slow.made,
    "BG": buggy.made,
    "DR": flags.made,
    "FL": proofs.made,
}
"""What makes the programs of a component."""


@cache
def sources(components: Sequence[str] = tuple(PARTS)) -> tuple[Source, ...]:
    """All programs of these components, the same ones on any machine. Raises KeyError for a component that there is not.

    >>> found = sources(("SC", "FL"))
    >>> sorted({source.component for source in found}), len({source.id for source in found}) == len(found)
    (['FL', 'SC'], True)
    """
    return tuple(source for component in components for source in PARTS[component]())
