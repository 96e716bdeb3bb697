"""Step by step: traces that grow, how they are expanded, and beam search over them.

A step is the text up to a delimiter (a line, say). A search keeps traces, asks a generator for next steps, asks a verifier what they are
worth, and books both. Other searches of the papers stand in their rooms, on the same `Trace` and `expand`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
    finished. A number as `delimiter` makes every step of so many tokens: a trace is then finished by the step that reaches `sampling`'s
    limit.

    The prefix is charged as read for the first step of each trace and as kept for its siblings (a server with a prefix cache; a
    generator that holds no cache reads it again: its samples say what was read). Raises ValueError for a finished trace.
    """
    counts = [checks.whole("counts", count, low=0) for count in counts]
    if len(counts) != len(traces):
        raise ValueError(f"counts must be as many as traces, {len(traces)}, got {len(counts)}")
    if wrong := [trace for trace, count in zip(traces, counts, strict=True) if trace.finished and count]:
        raise ValueError(f"traces must not be finished where steps are asked for, got {checks.shown(wrong[0].text)}")
    if isinstance(delimiter, str):
        asked = replace(sampling, stop=(delimiter, *(text for text in sampling.stop if text != delimiter)))
    else:
        asked = replace(sampling, max_new_tokens=checks.whole("delimiter", delimiter, low=1))
    seen: dict[str, int] = {}  # so many samples behind this prefix are taken
    asking: list[tuple[int, int, int]] = []  # place, count and first number
    for i, (trace, count) in enumerate(zip(traces, counts, strict=True)):
        if count:
            prefix = trace.prompt + trace.text
            asking.append((i, count, seen.get(prefix, 0)))
            seen[prefix] = seen.get(prefix, 0) + count
    found: list[list[Trace]] = [[] for _ in traces]
    for (i, _, _), samples in zip(asking, _drawn(generator, traces, asking, asked, seed), strict=True):
        if budget is not None:
            for sample in samples:
                budget.book("solve", sample.spent)
        found[i] = [_grown(traces[i], sample, delimiter, finished, sampling) for sample in samples]
    return found


def _drawn(
    generator: Generator, traces: Sequence[Trace], asking: Sequence[tuple[int, int, int]], sampling: Sampling, seed: int
) -> list[list[Sample]]:
    """Samples of each (place, count, first number): in one call if the generator can, else one for each count and first number."""
    prefixes = [traces[i].prompt + traces[i].text for i, _, _ in asking]
    if isinstance(generator, UnevenGenerator):
        counts, firsts = [count for _, count, _ in asking], [first for _, _, first in asking]
        return generator.uneven(prefixes, sampling, counts, firsts, seed=seed)
    by_size: dict[tuple[int, int], list[int]] = {}
    for k, (_, count, first) in enumerate(asking):
        by_size.setdefault((count, first), []).append(k)
    found: list[list[Sample]] = [[] for _ in asking]
    for (count, first), members in by_size.items():
        drawn = generator([prefixes[k] for k in members], sampling, n=count, first=first, seed=seed)
        for k, samples in zip(members, drawn, strict=True):
            found[k] = samples
    return found


def _grown(trace: Trace, sample: Sample, delimiter: str | int, finished: Finished | None, sampling: Sampling) -> Trace:
    if isinstance(delimiter, str):
        goes_on, end = sample.ended == "stop" and sample.matched == delimiter, delimiter
    else:
        most = sampling.max_new_tokens - trace.completion
        goes_on, end = sample.ended == "length" and sample.spent.completion < most, ""
    grown = replace(
        trace,
        steps=(*trace.steps, sample.text + (end if goes_on else "")),
        samples=(*trace.samples, sample),
        finished=not goes_on,
    )
    return replace(grown, finished=True) if finished is not None and finished(grown.text) else grown


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
