"""The pending-output form: a rank runs its share of every module by a schedule while the sums of earlier modules are under way."""

from __future__ import annotations

import time
from contextlib import nullcontext

from torch import Tensor

from assay.methods.core.models.decoder import Parts, Pass
from assay.methods.inference.ladder_residual.links import Handle, Link
from assay.methods.inference.ladder_residual.orders import Step
from assay.methods.inference.ladder_residual.timeline import Timeline


def run(parts: Parts, over: Pass, steps: list[Step], link: Link, timeline: Timeline | None = None) -> Tensor:
    """The stream after the last layer, before the last norm, (batch, tokens, width): the same on every rank.

    `parts` are those of this rank's share (`sharding.shard`), `over` the pass (`Parts.begin`), `steps` what `orders.schedule` gave. What
    a step sent is added to the stream before the first step that needs it, and at the end, oldest first. In a schedule with modules that
    are not summed (desync), each rank goes on with a stream of its own, and what is summed is the output and this rank's part of the
    stream.

    `timeline` takes the times of computing, messages and waiting.
    """
    stream, pending = over.hidden, dict[int, Handle]()
    desync = not all(step.reduced for step in steps)

    def settled(number: int) -> Tensor:
        handle = pending.pop(number)
        start = time.perf_counter()
        value = handle.wait()
        if timeline is not None:
            name = steps[number].name
            timeline.add("wait", name, start, time.perf_counter())
            timeline.add("link", name, handle.start, handle.end)
        return value if desync else stream + value

    for number, step in enumerate(steps):
        for earlier in step.needs:
            stream = settled(earlier)
        with nullcontext() if timeline is None else timeline.noting("compute", step.name):
            output = outputs(parts, over, step, stream)
            if desync:
                output = output + (stream / link.world if step.reduced else stream)
        if step.reduced:
            with (
                nullcontext() if timeline is None else timeline.noting("wait", step.name)
            ):  # handing over is no computing
                pending[number] = link.all_reduce(output)
        else:
            stream = output
    for number in sorted(pending):
        stream = settled(number)
    return stream


def outputs(parts: Parts, over: Pass, step: Step, stream: Tensor, slot: int | None = None) -> Tensor:
    """What the step's modules add to `stream`, together; keys and values go to `slot` of the cache (None: the layer's own)."""
    found: Tensor | None = None
    for module in step.modules:
        if module == "attention":
            added = parts.attention(step.layer, stream, over, slot=slot)
        else:
            added = parts.feed_forward(step.layer, stream)
        found = added if found is None else found + added
    assert found is not None
    return found
