"""Step by step: traces that grow, how they are expanded, and beam search over them.

A step is the text up to a delimiter (a line, say). A search keeps traces, asks a generator for next steps, asks a verifier what they are
worth, and books both. Other searches of the papers stand in their rooms, on the same `Trace` and `expand`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from assay import checks
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Verifier

Finished = Callable[[str], bool]
"""Whether a text (all steps of a trace, without the prompt) holds a final answer."""


@runtime_checkable
class UnevenGenerator(Protocol):
    """A generator that draws another number of samples of each prompt in one batch."""

    def uneven(
        self, prompts: Sequence[str], sampling: Sampling, counts: Sequence[int], firsts: Sequence[int], *, seed: int = 0
    ) -> list[list[Sample]]:
        """`counts[i]` samples of prompt i, numbers `firsts[i]` on, as `Generator` has them."""
        ...


def expand(
    generator: Generator,
    traces: Sequence[Trace],
    counts: Sequence[int],
    sampling: Sampling,
    *,
    delimiter: str | int = "\n",
    finished: Finished | None = None,
    budget: Budget | None = None,
    seed: int = 0,
) -> list[list[Trace]]:
    """`counts[i]` next steps behind `traces[i]`, each a trace of its own; equal traces given twice get different steps.

    A step ends with `delimiter`, which is kept in it, so that the text reads on; at the model's end or `sampling`'s limit the trace is
    finished. With a number as `delimiter` every step has so many tokens. `sampling`'s limit and its stop texts then hold for the whole
    trace: its last step is shorter where the limit is near, and a stop text that two steps share ends it, too.

    The prefix is charged as read for the first step of each trace and as kept for its siblings (a server with a prefix cache; a
    generator that holds no cache reads it again: its samples say what was read). Raises ValueError for a finished trace.
    """
    counts = [checks.whole("counts", count, low=0) for count in counts]
    if len(counts) != len(traces):
        raise ValueError(f"counts must be as many as traces, {len(traces)}, got {len(counts)}")
    if wrong := [trace for trace, count in zip(traces, counts, strict=True) if trace.finished and count]:
        raise ValueError(f"traces must not be finished where steps are asked for, got {checks.shown(wrong[0].text)}")
    if isinstance(delimiter, str):
        sampling = replace(sampling, stop=(delimiter, *(text for text in sampling.stop if text != delimiter)))
    else:
        checks.whole("delimiter", delimiter, low=1)
    seen: dict[str, int] = {}  # so many samples behind this prefix are taken
    asking: list[_Asked] = []
    for i, (trace, count) in enumerate(zip(traces, counts, strict=True)):
        if count:
            prefix = trace.prompt + trace.text
            left = sampling.max_new_tokens
            if not isinstance(delimiter, str):
                left = max(1, min(delimiter, left - trace.completion))
            asking.append(_Asked(i, prefix, count, seen.get(prefix, 0), left))
            seen[prefix] = seen.get(prefix, 0) + count
    found: list[list[Trace]] = [[] for _ in traces]
    for one, samples in zip(asking, _drawn(generator, asking, sampling, seed), strict=True):
        if budget is not None:
            for sample in samples:
                budget.book("solve", sample.spent)
        found[one.place] = [_grown(traces[one.place], sample, delimiter, finished, sampling) for sample in samples]
    return found


@dataclass(frozen=True)
class _Asked:
    """Next steps of one trace: its place, its text, how many, the number of the first, and how long they may be."""

    place: int
    prefix: str
    count: int
    first: int
    limit: int


def _drawn(generator: Generator, asking: Sequence[_Asked], sampling: Sampling, seed: int) -> list[list[Sample]]:
    """The samples asked for: in one call if the generator can and all may be equally long, else in a call for each shape."""
    if isinstance(generator, UnevenGenerator) and len({one.limit for one in asking}) == 1:
        counts, firsts = [one.count for one in asking], [one.first for one in asking]
        asked = replace(sampling, max_new_tokens=asking[0].limit)
        return generator.uneven([one.prefix for one in asking], asked, counts, firsts, seed=seed)
    by_shape: dict[tuple[int, int, int], list[int]] = {}
    for k, one in enumerate(asking):
        by_shape.setdefault((one.count, one.first, one.limit), []).append(k)
    found: list[list[Sample]] = [[] for _ in asking]
    for (count, first, limit), members in by_shape.items():
        asked = replace(sampling, max_new_tokens=limit)
        drawn = generator([asking[k].prefix for k in members], asked, n=count, first=first, seed=seed)
        for k, samples in zip(members, drawn, strict=True):
            found[k] = samples
    return found


def _grown(trace: Trace, sample: Sample, delimiter: str | int, finished: Finished | None, sampling: Sampling) -> Trace:
    if isinstance(delimiter, str):
        goes_on = sample.ended == "stop" and sample.matched == delimiter
        steps = (*trace.steps, sample.text + (delimiter if goes_on else ""))
    else:
        goes_on = sample.ended == "length" and trace.completion + sample.spent.completion < sampling.max_new_tokens
        steps = (*trace.steps, sample.text)
        met = [at for text in sampling.stop if (at := "".join(steps).find(text)) >= 0]
        if met:
            steps, goes_on = _cut(steps, min(met)), False
    grown = replace(trace, steps=steps, samples=(*trace.samples, sample), finished=not goes_on)
    return replace(grown, finished=True) if finished is not None and finished(grown.text) else grown


def _cut(steps: Sequence[str], length: int) -> tuple[str, ...]:
    """Steps whose texts together are no longer than `length`."""
    found = []
    for text in steps:
        found.append(text[:length])
        length -= len(found[-1])
    return tuple(found)


def judged(verifier: Verifier, traces: Sequence[Trace], *, budget: Budget | None = None) -> list[Trace]:
    """The traces with a score for every step. What judging took is booked as "verify"."""
    if not traces:
        return []
    scores, spent = verifier.score(traces)
    if budget is not None:
        budget.book("verify", spent)
    if len(scores) != len(traces):
        raise ValueError(f"a verifier must give as many lists of scores as traces, {len(traces)}, got {len(scores)}")
    return [_scored(trace, own) for trace, own in zip(traces, scores, strict=True)]


def _scored(trace: Trace, scores: Sequence[float]) -> Trace:
    if len(scores) != len(trace.steps):
        raise ValueError(f"a verifier must give a score for each of {len(trace.steps)} steps, got {len(scores)}")
    return replace(trace, scores=tuple(checks.number("scores", score) for score in scores))


def beam_search(
    generator: Generator,
    verifier: Verifier,
    prompt: str,
    sampling: Sampling,
    *,
    n: int,
    width: int,
    rounds: int = 40,
    delimiter: str | int = "\n",
    finished: Finished | None = None,
    budget: Budget | None = None,
    seed: int = 0,
) -> list[Trace]:
    """`n` beams: of n first steps the n / width best are kept and continued `width` times each, until all are finished or `rounds` passed.

    A finished beam stays and counts as one of the n, so that never more than n steps are drawn a round. Returns the n beams (unfinished
    ones too, after the last round), with the verifier's scores; which answer to give is `selectors`' matter. With width = n and
    one round it is n samples of one step. Raises ValueError unless width divides n.
    """
    n, width = checks.whole("n", n, low=1), checks.whole("width", width, low=1)
    rounds = checks.whole("rounds", rounds, low=1)
    if n % width:
        raise ValueError(f"width must divide n, {n}, got {width}")
    (beams,) = expand(
        generator, [Trace(prompt)], [n], sampling, delimiter=delimiter, finished=finished, budget=budget, seed=seed
    )
    beams = judged(verifier, beams, budget=budget)
    for _ in range(rounds - 1):
        done = [beam for beam in beams if beam.finished]
        open_beams = sorted((beam for beam in beams if not beam.finished), key=lambda beam: -beam.score)
        if not open_beams or len(done) >= n or (budget is not None and budget.over):
            break
        room = n - len(done)
        kept = open_beams[: max(1, room // width)]
        counts = [room // len(kept) + (i < room % len(kept)) for i in range(len(kept))]
        grown = expand(
            generator, kept, counts, sampling, delimiter=delimiter, finished=finished, budget=budget, seed=seed
        )
        beams = done + judged(verifier, [trace for own in grown for trace in own], budget=budget)
    return beams


def spent_of(traces: Sequence[Trace]) -> Spent:
    """What the steps of the traces took, a step that several of them share once."""
    seen = {id(sample): sample for trace in traces for sample in trace.samples}
    return sum((sample.spent for sample in seen.values()), Spent())
