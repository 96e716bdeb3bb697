"""Inputs large enough to show what programs cost: scales doubled until something gives up, and the dearest input that all finish."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from assay import checks
from assay.methods.code.evalperf.clustering import valid_cost

INT64 = range(-(2**63), 2**63)
Args = tuple[Any, ...]


class SynthesiserError(Exception):
    """What a synthesiser raises where it is wrong, as one that a model wrote may be."""


class Synthesiser(Protocol):
    """Makes the arguments of one call, the larger the scale the more work; the same ones for the same scale.

    Raises TimeoutError or MemoryError where it takes too much, and SynthesiserError where it fails otherwise. Text that a model wrote
    (`perf_input_gen(scale)` in the paper) runs in a sandbox, and whoever wraps it says so with these.
    """

    def __call__(self, scale: int) -> Any: ...


@dataclass(frozen=True)
class Stops:
    """Where exponential sampling ends at the latest: the last power of two, and the bytes of an input in memory."""

    last_power: int = 26
    input_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class Sampled:
    """The last input with which the reference finished (None: there was none), its scale, and what ended the sampling.

    `sound` is False where the synthesiser or the reference failed otherwise than by taking too much. `synthesise` makes the input of any
    scale again.
    """

    args: Args | None
    scale: int | None
    stop: str
    sound: bool
    synthesise: Synthesiser

    def smaller(self) -> list[int]:
        """The scales before the last one, largest first; the reference finished with them too."""
        return [] if self.scale is None else [2**power for power in range(self.scale.bit_length() - 2, 0, -1)]


def from_generator(generate: Callable[[int, random.Random], Args], *, seed: int | str = 0) -> Synthesiser:
    """A synthesiser of a generator `generate(size, rng)`: the scale is the size, and every scale has its own stream of numbers.

    >>> from_generator(lambda size, rng: ([rng.random() for _ in range(size)],))(4) == from_generator(
    ...     lambda size, rng: ([rng.random() for _ in range(size)],))(4)
    True
    """
    return lambda scale: generate(scale, random.Random(f"{seed}/{scale}"))


def timed(synthesise: Synthesiser, seconds: float) -> Synthesiser:
    """The same synthesiser, which raises TimeoutError after it took more processor time than that. It is not interrupted: for own ones."""
    seconds = checks.number("seconds", seconds, above=0)

    def within(scale: int) -> Any:
        began = time.process_time()
        made = synthesise(scale)
        if (took := time.process_time() - began) > seconds:
            raise TimeoutError(f"scale {scale} took {took:.3g} s, allowed are {seconds:g}")
        return made

    return within


def sample_input(
    synthesise: Synthesiser,
    reference: Callable[[Args], str],
    valid: Callable[[Args], bool] = lambda args: True,
    stops: Stops = Stops(),
) -> Sampled:
    """Double the scale from 2 on until something gives up, and keep the last input with which the reference finished.

    `reference` runs the reference program on the arguments under the limits of time and memory, and says how it ended (`Outcome.state`);
    `valid` says whether they fulfil the task's contract. Sampling ends soundly when the synthesiser or the reference takes too long or too
    much memory, when an integer anywhere in the input leaves 64 bits (the released code looks at the arguments and the elements of the
    first one only), when the input is larger than `stops.input_bytes`, and at the last power; not soundly at anything else.

    >>> found = sample_input(lambda scale: [0] * scale, lambda args: "returned" if len(args[0]) < 100 else "time")
    >>> found.scale, found.stop, found.sound
    (64, 'reference: time', True)
    """
    kept: Args | None = None
    last: int | None = None

    def ended(stop: str, sound: bool = True) -> Sampled:
        return Sampled(kept, last, stop, sound, synthesise)

    for power in range(1, checks.whole("stops.last_power", stops.last_power, low=1) + 1):
        try:
            made = synthesise(2**power)
        except TimeoutError:
            return ended("synthesiser: time")
        except MemoryError:
            return ended("synthesiser: memory")
        except SynthesiserError as failure:
            return ended(f"synthesiser: {failure}", sound=False)
        args = as_args(made)
        if not within_64_bits(args):
            return ended("an integer beyond 64 bits")
        if deep_size(args, most=stops.input_bytes) > stops.input_bytes:
            return ended("size of the input")
        if not valid(args):
            return ended("contract", sound=False)
        state = reference(args)
        if state != "returned":
            return ended(f"reference: {state}", sound=state in ("time", "memory"))
        kept, last = args, 2**power
    return ended("last scale")


def sample_inputs(
    synthesisers: Iterable[Synthesiser],
    reference: Callable[[Args], str],
    valid: Callable[[Args], bool] = lambda args: True,
    stops: Stops = Stops(),
) -> list[Sampled]:
    """One synthesiser after the other, up to the first that ends soundly; each with the last input that it brought (see `sample_input`)."""
    found = []
    for synthesise in synthesisers:
        found.append(sample_input(synthesise, reference, valid, stops))
        if found[-1].sound:
            break
    return found


def choose_input(costs: Sequence[float | None], all_finish: Callable[[int], bool]) -> int | None:
    """The index of the dearest candidate on which every right program finishes; None if there is none.

    `costs` are the canonical program's (None where it did not finish), `all_finish(index)` runs the others; it is asked from the dearest
    candidate on, and no further than to the first that does.

    >>> choose_input([10.0, None, 30.0, 20.0], lambda index: index != 2)
    3
    """
    order = sorted((i for i, cost in enumerate(costs) if cost is not None), key=lambda i: -valid_cost(costs[i]))
    return next((index for index in order if all_finish(index)), None)


def as_args(made: Any) -> Args:
    """What a synthesiser returned as the arguments of a call: a tuple is those, anything else is one."""
    return made if isinstance(made, tuple) else (made,)


def within_64_bits(value: Any) -> bool:
    """Whether every integer in nested lists, tuples, sets and dictionaries fits into 64 bits with a sign."""
    return all(not isinstance(one, int) or one in INT64 for one in _inside(value))


def deep_size(value: Any, *, most: int | None = None) -> int:
    """Bytes of a value with all that it holds, each object once. With `most` it stops counting as soon as that is passed.

    >>> deep_size([1, 1]) == sys.getsizeof([1, 1]) + sys.getsizeof(1)
    True
    """
    total = 0
    for one in _inside(value):
        total += sys.getsizeof(one)
        if most is not None and total > most:
            break
    return total


def _inside(value: Any) -> Iterable[Any]:
    """A value and everything in it, each object once: lists may share parts, and hold themselves."""
    left, seen = [value], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, (list, tuple, set, frozenset)):
            left.extend(one)
