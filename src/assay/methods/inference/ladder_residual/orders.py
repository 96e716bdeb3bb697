"""Which module runs when, and whose messages it needs: the orders that tensor parallelism can run a transformer in, as data.

A schedule is a list of steps. Each computes one module (or two) from the stream as it is then, and sends the outcome to the other
ranks; `needs` names the earlier steps whose messages must have arrived before. A blocking schedule needs the step just before it, the
ladder the one before that, which is the whole idea: a message has the time of one module to travel.

The same list drives the real run (`pending.run`) and the model of it (`simulate`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from assay import checks
from assay.methods.inference.ladder_residual.timeline import Timeline

Block = Literal["ladder", "parallel", "desync"]
BLOCKS: tuple[Block, ...] = get_args(Block)
Module = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Step:
    """Modules of one layer that run on the same stream, and the earlier steps (numbers) whose output that stream must hold.

    `reduced` is whether the outcome is summed over the ranks, which takes a message.
    """

    layer: int
    modules: tuple[Module, ...]
    needs: tuple[int, ...]
    reduced: bool = True

    @property
    def name(self) -> str:
        return f"{'+'.join(self.modules)} {self.layer}"


def schedule(
    layers: int, block: Block = "ladder", chosen: Collection[int] | None = None, *, reduce_every: int = 2
) -> list[Step]:
    """The steps of `layers` layers, of which those in `chosen` (None: all) are built as `block` says and the rest as usual.

    - "ladder": attention, then MLP, each on a stream that lacks the output of the module just before it (arXiv 2501.06589).
    - "parallel": attention and MLP on the same stream, one message for both.
    - "desync": as usual, but only every `reduce_every`-th module is summed over the ranks, and the last (all layers; `chosen` plays no
      part). 2, the released setting, leaves the MLPs; 4 every second MLP.

    An empty `chosen` is the standard transformer. Raises ValueError for counts below 1, another block and layers that do not exist.

    >>> [(step.name, step.needs) for step in schedule(2)]
    [('attention 0', ()), ('mlp 0', ()), ('attention 1', (0,)), ('mlp 1', (1,))]
    >>> [(step.name, step.needs) for step in schedule(1, chosen=())]
    [('attention 0', ()), ('mlp 0', (0,))]
    """
    layers, reduce_every = checks.whole("layers", layers, low=1), checks.whole("reduce_every", reduce_every, low=1)
    checks.choice("block", block, BLOCKS)
    taken = set(range(layers) if chosen is None else chosen)
    if strange := taken - set(range(layers)):
        raise ValueError(f"chosen must hold layers from 0 to {layers - 1}, got {sorted(strange)}")
    steps: list[Step] = []
    pending: list[int] = []  # steps whose output is not in the stream yet
    both: tuple[Module, ...] = ("attention", "mlp")
    apart: list[tuple[Module, ...]] = [("attention",), ("mlp",)]
    for layer in range(layers):
        for modules in [both] if block == "parallel" and layer in taken else apart:
            number = len(steps)
            late = block == "ladder" and layer in taken
            ready = pending[:-1] if late else list(pending)
            reduced = block != "desync" or (number + 1) % reduce_every == 0 or number == 2 * layers - 1
            steps.append(Step(layer, modules, tuple(ready), reduced))
            pending = pending[len(ready) :] + ([number] if reduced else [])
    return steps


def simulate(steps: list[Step], compute: Mapping[str, float], message: float) -> Timeline:
    """What a rank would do if every module took `compute[module]` seconds and every message `message` seconds.

    Messages travel one after another, as the collectives of a communicator do: each starts when its step has ended and the one before it
    has arrived. In the steady state a standard module costs the sum of both, a ladder's the larger one, so that the gain is at most 2 and
    at most 1 + communication / computation. Raises ValueError for times below 0 or a module without one.

    >>> usual, ladder = (simulate(schedule(8, chosen=c), {"attention": 1.0, "mlp": 1.0}, 1.0) for c in ((), None))
    >>> usual.seconds, ladder.seconds
    (32.0, 17.0)
    """
    message = checks.number("message", message, low=0)
    seconds: dict[str, float] = {}
    for module in ("attention", "mlp"):
        if module not in compute:
            raise ValueError(f"compute must have the seconds of {module!r}, got {checks.shown(dict(compute))}")
        seconds[module] = checks.number(f"compute[{module!r}]", compute[module], low=0)
    line, now, free = Timeline(), 0.0, 0.0  # free: from when the link is
    arrival: dict[int, float] = {}

    def wait_for(number: int) -> float:
        due = arrival.pop(number)
        if due > now:
            line.add("wait", steps[number].name, now, due)
        return max(now, due)

    for number, step in enumerate(steps):
        for earlier in step.needs:
            now = wait_for(earlier)
        end = now + sum(seconds[module] for module in step.modules)
        line.add("compute", step.name, now, end)
        now = end
        if step.reduced:
            begin = max(now, free)
            free = arrival[number] = begin + message
            line.add("link", step.name, begin, free)
    for number in sorted(arrival):
        now = wait_for(number)
    return line
