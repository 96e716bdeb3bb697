"""The loop through any `Generator`, a server behind HTTP too: after each output the whole text is sent again as a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from assay import checks
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling
from assay.methods.reasoning.tora.text import OUTPUT, waiting
from assay.methods.reasoning.tora.tools import Output, Tool
from assay.methods.reasoning.tora.trajectory import Ended, Trajectory, checked_calls

CALLS = 4
"""Tool calls of a trajectory at most, as released: the output of the last is appended and read by nobody. 1 makes it a program-aided
model (PAL), whose answer is what its program printed; 0 is plain text."""


def with_tools(
    generator: Generator,
    prompts: Sequence[str],
    sampling: Sampling,
    tool: Tool,
    *,
    calls: int = CALLS,
    n: int = 1,
    first: int = 0,
    seed: int = 0,
    workers: int = 2,
) -> list[list[Trajectory]]:
    r"""`n` trajectories for each prompt, numbers `first` to `first + n - 1` of those that `seed` stands for.

    A segment ends where the model opens an output block, or as `sampling` says (its limit of new tokens holds for each
    segment). Where a closed program then waits, it is run, its output appended to the text, and the next segment written
    behind it; what was written is never changed. The output of call number `calls` is appended with a note that the limit is
    reached, and nothing is written behind it. With `calls` 0 nothing is run and nothing stops at an output block: it is plain
    sampling. `workers` programs run at once.

    A call of the generator reads the whole text so far: a server with a prefix cache says what it kept (`spent.cached`),
    others read it again. A local model that keeps its cache instead: `ToolLoop`. Raises what the generator raises;
    ValueError and TypeError for numbers out of range.

    >>> from assay.methods.core.reasoning.budget import Spent
    >>> def scripted(prompts, sampling, *, n=1, first=0, seed=0):
    ...     said = lambda p: " 42." if p.endswith("```\n") else "\n```python\nprint(6 * 7)\n```\n"
    ...     return [[Sample(said(p), (), (), "stop", Spent(len(p), 1, 0, 1))] * n for p in prompts]
    >>> ((one,),) = with_tools(scripted, ["6 times 7?"], Sampling(), lambda program: Output("42", "42"))
    >>> one.text, one.answer, len(one.outputs)
    ('\n```python\nprint(6 * 7)\n```\n```output\n42\n```\n 42.', '42', 1)
    """
    calls, n = checked_calls(calls), checks.whole("n", n, low=1)
    first, seed = checks.whole("first", first, low=0), checks.whole("seed", seed)
    workers = checks.whole("workers", workers, low=1)
    asked = replace(sampling, stop=(*sampling.stop, OUTPUT)) if calls and OUTPUT not in sampling.stop else sampling
    drawn = generator(prompts, asked, n=n, first=first, seed=seed)
    rows = [
        _Row(prompt, first + k, _read_before(sample, samples[0]) if k else sample)
        for prompt, samples in zip(prompts, drawn, strict=True)
        for k, sample in enumerate(samples)
    ]
    with ThreadPoolExecutor(workers) as pool:
        while programs := [(row, program) for row in rows if (program := row.program(calls)) is not None]:
            for (row, _), output in zip(programs, pool.map(tool, [program for _, program in programs]), strict=True):
                row.outputs.append(output)
            reading = [row for row, _ in programs if len(row.outputs) < calls]
            for number in sorted({row.number for row in reading}):
                own = [row for row in reading if row.number == number]
                found = generator([row.prompt + row.text for row in own], asked, n=1, first=number, seed=seed)
                for row, (sample,) in zip(own, found, strict=True):
                    row.segments.append(sample)
    done = [row.finished() for row in rows]
    return [done[at : at + n] for at in range(0, len(done), n)]


def _read_before(sample: Sample, before: Sample) -> Sample:
    """A sample of a prompt that was read for the one before it."""
    return replace(sample, spent=replace(sample.spent, prompt=before.spent.prompt, cached=before.spent.prompt))


class _Row:
    """A trajectory as it grows."""

    def __init__(self, prompt: str, number: int, sample: Sample) -> None:
        self.prompt, self.number = prompt, number
        self.segments, self.outputs = [sample], list[Output]()

    @property
    def text(self) -> str:
        return Trajectory(self.prompt, tuple(self.segments), tuple(self.outputs)).text

    def program(self, calls: int) -> str | None:
        """The program that waits; None also where its segment was cut off by its limit, and behind the last output allowed."""
        if not calls or len(self.outputs) == len(self.segments) or self.segments[-1].ended == "length":
            return None
        return waiting(self.text)

    def finished(self) -> Trajectory:
        ended: Ended = "length" if self.segments[-1].ended == "length" else "stop"
        if len(self.outputs) == len(self.segments):
            ended = "calls"
        return Trajectory(self.prompt, tuple(self.segments), tuple(self.outputs), ended)
