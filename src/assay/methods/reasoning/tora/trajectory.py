"""A trajectory as it was written: the model's segments, the outputs between them, and what all of it took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from assay import checks
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.reasoning.tora.text import LIMIT_NOTE, answer_of, output_block
from assay.methods.reasoning.tora.tools import Output

Ended = Literal["stop", "length", "calls", "context"]
"""By the model, at its new tokens, at the last call allowed without an answer, or because an output did not fit into the context."""


@dataclass(frozen=True)
class Trajectory:
    """What was written behind a prompt.

    `segments` are the model's samples. The `spent.prompt` of each is the whole context it continues, `spent.cached` what of that was not
    read for it. `outputs` are the tool's; behind each but a last one at the limit of calls stands another segment.
    """

    prompt: str
    segments: tuple[Sample, ...]
    outputs: tuple[Output, ...] = ()
    ended: Ended = "stop"

    @property
    def text(self) -> str:
        """What stands behind the prompt, outputs included."""
        text = ""
        for number, segment in enumerate(self.segments):
            text += segment.text
            if number < len(self.outputs):
                text += output_block(text, self.outputs[number].shown)
        return text + (LIMIT_NOTE if self.ended == "calls" else "")

    @property
    def answer(self) -> str:
        """Its answer, canonical, "" for none. Where the limit of calls ended it, that is what its last program printed.

        An output counts in full, whatever the model was shown of it, and one of a program that failed not at all.
        """
        if self.ended == "calls":
            return self.value
        said = [replace(output, shown="" if output.failed else output.printed) for output in self.outputs]
        return answer_of(replace(self, outputs=tuple(said)).text)

    @property
    def value(self) -> str:
        """The last line that its last program printed, canonical: the answer of a program alone (PAL). "" where it failed or none ran."""
        if not self.outputs or self.outputs[-1].failed:
            return ""
        return answer_of(f"```output\n{self.outputs[-1].printed}\n```\n")

    @property
    def completion(self) -> int:
        """Tokens that the model wrote."""
        return sum(segment.spent.completion for segment in self.segments)

    @property
    def tool_tokens(self) -> int:
        """Tokens of outputs that the model read: what each context has beyond the one before and what was written there."""
        return sum(self._read_of_tool())

    def _read_of_tool(self) -> list[int]:
        pairs = zip(self.segments, self.segments[1:], strict=False)
        return [max(after.spent.prompt - before.spent.prompt - before.spent.completion, 0) for before, after in pairs]

    def charge(self, budget: Budget, *, kept: bool | None = None) -> None:
        """Book every segment under "solve", and every output under "tool": its seconds, its reading, and whether the program failed.

        `kept` True charges what has to be read where caches are kept between segments, False what a restart reads (the whole context
        again for each segment), None what was really read.
        """
        read = [0, *self._read_of_tool()]
        for number, segment in enumerate(self.segments):
            spent, tool = segment.spent, read[number]
            if number < len(self.outputs):
                output = self.outputs[number]
                of_output = read[number + 1] if number + 1 < len(read) else 0
                ran = Spent(prompt=of_output, calls=1, seconds=output.seconds)
                budget.book("tool", ran, failed=output.failed)
            before = spent.prompt - tool
            cached = min(spent.cached, before)
            if number and kept is not None:
                cached = before if kept else 0
            budget.book("solve", replace(spent, prompt=before, cached=cached))


def total(trajectory: Trajectory, *, kept: bool | None = True) -> Spent:
    """All that a trajectory took, as `charge` books it."""
    budget = Budget()
    trajectory.charge(budget, kept=kept)
    return budget.spent()


def checked_calls(calls: int) -> int:
    """A limit of tool calls, 0 for none at all."""
    return checks.whole("calls", calls, low=0)
