"""More pairs from a model's own programs: those that do the same are dropped, the rest optimised, and real gains kept."""

from __future__ import annotations

from collections.abc import Sequence

from assay import checks
from assay.methods.code.pie_code_edits.pairs import THRESHOLD, Pair
from assay.methods.code.pie_code_edits.scores import Edits


def distinct(outputs: Sequence[Sequence[str] | None]) -> list[int]:
    """Which programs to keep, by what each wrote on the same inputs: the first of those that wrote the same.

    None stands for a program that failed on an input; it is not kept. White space at the ends of lines and of the output says nothing.
    As good as its inputs: programs that differ elsewhere only count as the same. Raises ValueError for no outputs, or another number
    of them than the others have.

    >>> distinct([["1", "4"], ["1\\n", "4\\n"], None, ["1", "8"]])
    [0, 3]
    """
    kept: dict[tuple[str, ...], int] = {}
    inputs = {len(wrote) for wrote in outputs if wrote is not None}
    if len(inputs) > 1 or 0 in inputs:
        raise ValueError(f"outputs must be of the same inputs, one or more, got {sorted(inputs)} of them")
    for at, wrote in enumerate(outputs):
        if wrote is not None:
            kept.setdefault(tuple("\n".join(map(str.rstrip, text.rstrip().split("\n"))) for text in wrote), at)
    return list(kept.values())


def self_play_pairs(
    programs: Sequence[str],
    samples: Sequence[Sequence[str]],
    edits: Sequence[Edits],
    *,
    threshold: float = THRESHOLD,
) -> list[Pair]:
    """A pair for each program of which a right sample is faster by more than `threshold`: the program and its fastest right sample.

    `samples[n]` are the rewritten forms of `programs[n]`, `edits[n]` their costs. Each program is a problem of its own. Raises
    ValueError where numbers of programs, samples and costs do not fit.
    """
    checks.number("threshold", threshold, low=0, below=1)
    if not len(programs) == len(samples) == len(edits):
        raise ValueError(
            f"programs, samples and edits must be as many, got {len(programs)}, {len(samples)} and {len(edits)}"
        )
    found = []
    for number, (program, forms, costs) in enumerate(zip(programs, samples, edits, strict=True)):
        if len(forms) != len(costs.costs):
            raise ValueError(f"edits[{number}] must have {len(forms)} costs, got {len(costs.costs)}")
        right = [(cost, form) for form, cost in zip(forms, costs.costs, strict=True) if cost is not None]
        best = min(right, default=None, key=lambda item: item[0])
        if best is not None and best[0] < (1 - threshold) * costs.source:
            found.append(Pair(program, best[1], f"self-play/{number}", "self-play", costs.source, best[0]))
    return found
