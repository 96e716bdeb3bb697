"""What a stream remembers between two frames: explicit, batched, and made of plain tensors.

A state belongs to no module, so one net serves any number of streams. Every tensor in it has the streams of the batch in dimension
0: rows can be taken out (`select`) and put together again (`join`), as long as they are equally far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay import checks


class StreamState(NamedTuple):
    """The memory of a module: how many frames it has seen, its own tensors, and the states of the modules in it.

    `seen` stops growing once it makes no difference any more. States are never changed in place: a step returns a new one, and the
    old one stays good.

    >>> state = StreamState(3, (torch.zeros(2, 4),))
    >>> state.nbytes, StreamState.of_tensors(state.tensors()).seen
    (32, 3)
    """

    seen: int = 0
    buffers: tuple[Tensor, ...] = ()
    parts: tuple[StreamState, ...] = ()

    def part(self, index: int) -> StreamState:
        """The state of the module of that number; the empty one before the first frame."""
        return self.parts[index] if self.parts else EMPTY

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(b.numel() * b.element_size() for b in self.buffers) + sum(part.nbytes for part in self.parts)

    def select(self, rows: Sequence[int]) -> StreamState:
        """The streams of these rows of the batch, as copies. Raises ValueError for a row below 0, IndexError for one that is not there."""
        wanted = [checks.whole("rows", row, low=0) for row in rows]
        return StreamState(
            self.seen, tuple(b[wanted] for b in self.buffers), tuple(p.select(wanted) for p in self.parts)
        )

    def detach(self) -> StreamState:
        """The same numbers without their history: gradients stop here, and what they would need is let go."""
        return StreamState(self.seen, tuple(b.detach() for b in self.buffers), tuple(p.detach() for p in self.parts))

    def tensors(self) -> dict[str, Tensor]:
        """Everything as a flat dictionary of tensors that share no memory, for safetensors, say."""
        return self._tensors("")

    def _tensors(self, path: str) -> dict[str, Tensor]:
        found = {f"{path}seen": torch.tensor(self.seen)}
        for i, buffer in enumerate(self.buffers):
            found[f"{path}buffer.{i}"] = buffer.detach().clone(memory_format=torch.contiguous_format)
        for i, part in enumerate(self.parts):
            found |= part._tensors(f"{path}part.{i}.")
        return found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> StreamState:
        """The state that `tensors` was made of.

        Raises ValueError for names that no state has and counts below 0, TypeError for values that are no tensors or no counts.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(f"tensors must be a dictionary of tensors, got {type(tensors).__name__}")
        for name, value in tensors.items():
            checks.tensor(name, value, dtype="any", empty=True)
        return _read(dict(tensors), "")


def _read(tensors: dict[str, Tensor], path: str) -> StreamState:
    if "seen" not in tensors:
        raise ValueError(f"tensors must have an entry {path + 'seen'!r}, got {sorted(tensors)[:5]}")
    buffers: list[Tensor] = []
    while (name := f"buffer.{len(buffers)}") in tensors:
        buffers.append(tensors[name])
    parts: list[StreamState] = []
    taken = 1 + len(buffers)
    while inner := {key: value for key, value in tensors.items() if key.startswith(f"part.{len(parts)}.")}:
        taken += len(inner)
        prefix = f"part.{len(parts)}."
        parts.append(_read({key.removeprefix(prefix): value for key, value in inner.items()}, path + prefix))
    if taken != len(tensors):
        raise ValueError(f"tensors must be those of one state, got {sorted(tensors)[:5]} under {path!r}")
    seen = checks.whole(f"{path}seen", tensors["seen"], low=0)
    return StreamState(seen, tuple(buffers), tuple(parts))


EMPTY = StreamState()


def join(states: Sequence[StreamState]) -> StreamState:
    """The streams of several states as one batch, in order.

    Raises ValueError for no states, for those of different networks, and where they are not equally far: their next frames would not
    need the same work.
    """
    if not states:
        raise ValueError("states must hold at least one, got none")
    first = states[0]
    for other in states[1:]:
        if other.seen != first.seen or (other == EMPTY) != (first == EMPTY):
            raise ValueError(f"states must be equally far, got {_far(first)} and {_far(other)}")
        shapes = [[(b.dtype, b.shape[1:]) for b in state.buffers] for state in (first, other)]
        if shapes[0] != shapes[1] or len(other.parts) != len(first.parts):
            raise ValueError(
                f"states must be equally far and of one network, got buffers {_sizes(first)} and {_sizes(other)}"
            )
    buffers = tuple(torch.cat(found) for found in zip(*(state.buffers for state in states), strict=True))
    parts = tuple(join(found) for found in zip(*(state.parts for state in states), strict=True))
    return StreamState(first.seen, buffers, parts)


def _far(state: StreamState) -> str:
    return "an empty one" if state == EMPTY else f"one after {state.seen} frames"


def _sizes(state: StreamState) -> list[tuple[int, ...]]:
    return [tuple(b.shape) for b in state.buffers]


def matching(state: StreamState, x: Tensor) -> None:
    """Raise ValueError unless a state is empty or has as many streams as `x` has in dimension 0: it would be repeated silently."""
    if state.buffers and state.buffers[0].shape[0] != x.shape[0]:
        raise ValueError(f"state must be that of {x.shape[0]} streams, got one of {state.buffers[0].shape[0]}")
