"""The protocol of sequence mixers: one function of a sequence that can be computed at once, in chunks, or token by token.

The three must agree, which `tests/properties/mixers.py` checks for every mixer. Tensors are (batch, tokens, dim); a state is a
plain dictionary of tensors whose first dimension is the batch.

Padding is on the left only, given by `mask`, bool (batch, tokens), False on padding. A mixer must compute for the tokens
after the padding what it would compute without it; what it returns at padding is unspecified.

No tokens, or no sequences in the batch, are not an error: the outputs are empty and the state is unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks

State = dict[str, Tensor]


class Mixer(nn.Module):
    """Base class. A mixer implements `forward`, `init_state` and `advance`; the rest follows.

    `forward` is what training uses and must be causal and have gradients. `advance` is what generation uses. Both are entered
    through `check_sequence`: what a class defines sees inputs of the right kind and shape, and never an empty one.
    """

    dim: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _checked_forward(cls.__dict__["forward"])  # type: ignore[method-assign]
        if "advance" in cls.__dict__:
            cls.advance = _checked_advance(cls.__dict__["advance"])  # type: ignore[method-assign]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The whole sequence at once, from an empty state: (batch, tokens, dim), same shape out."""
        raise NotImplementedError

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token, in the dtype of the parameters unless given (sums may stay in float32)."""
        raise NotImplementedError

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """The next tokens (batch, tokens, dim) after `state`: their outputs, and the new state.

        `state` is consumed: its tensors may be overwritten. Use `clone_state` to continue from the same point twice.
        """
        raise NotImplementedError

    def chunked(
        self, x: Tensor, state: State | None = None, *, chunk: int = 64, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The sequence in chunks of `chunk` tokens, carrying the state: memory does not grow with the length.

        Raises ValueError for a chunk below 1 and for shapes that do not fit.
        """
        chunk = checks.whole("chunk", chunk, low=1)
        check_sequence(x, self.dim, mask)
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        outputs = []
        for start in range(0, max(1, x.shape[1]), chunk):
            part = None if mask is None else mask[:, start : start + chunk]
            y, state = self.advance(x[:, start : start + chunk], state, part)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token (batch, dim): its output and the new state."""
        checks.tensor("x", x, shape=("batch", self.dim), empty=True)
        y, state = self.advance(x[:, None], state)
        return y[:, 0], state

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state after `tokens` tokens. The default is for states that do not grow."""
        checks.whole("tokens", tokens, low=0)
        state = self.init_state(checks.whole("batch", batch, low=0), device="meta", dtype=dtype)
        return sum(x.numel() * x.element_size() for x in state.values())


def check_sequence(x: Tensor, dim: int, mask: Tensor | None = None) -> None:
    """Check a mixer's input: x (batch, tokens, dim) floating point, mask (batch, tokens) bool.

    Raises TypeError for another type or dtype, ValueError for another shape. Empty ones are allowed.
    """
    checks.tensor("x", x, shape=("batch", "tokens", dim), empty=True)
    if mask is not None:
        checks.tensor("mask", mask, shape=tuple(x.shape[:2]), dtype="bool", device=x.device, empty=True)


def _checked_forward(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def forward(self: Mixer, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_sequence(x, self.dim, mask)
        return method(self, x, mask) if x.numel() else x

    return forward


def _checked_advance(method: Callable[..., tuple[Tensor, State]]) -> Callable[..., tuple[Tensor, State]]:
    @functools.wraps(method)
    def advance(self: Mixer, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        check_sequence(x, self.dim, mask)
        for name, value in state.items():
            if len(value) != len(x):
                raise ValueError(f"state must be of {len(x)} sequences, as x, got {len(value)} in {name!r}")
        return method(self, x, state, mask) if x.numel() else (x, state)

    return advance


def check_positive(**sizes: int) -> None:
    """Raise ValueError naming the first argument below 1, TypeError for one that is not a whole number."""
    for name, value in sizes.items():
        checks.whole(name, value, low=1)


def clone_state(state: State) -> State:
    """A copy that shares no memory with `state`."""
    return {name: x.clone() for name, x in state.items()}


MIXERS: dict[str, Callable[..., Mixer]] = {}
CHANNEL_MIXERS: dict[str, Callable[..., nn.Module]] = {}


def mixer(name: str) -> Callable[[Any], Any]:
    """Class decorator: `MixerConfig.layers` can name the mixer. It is built as `cls(dim, layer=index, layers=count, **options)`.

    Raises ValueError for a name another class has.
    """
    return _registering(MIXERS, name)


def channel_mixer(name: str) -> Callable[[Any], Any]:
    """The same for layers that mix channels, token by token: `MixerConfig.channel_mixer`, built as `cls(dim, hidden, **options)`."""
    return _registering(CHANNEL_MIXERS, name)


def _registering(registry: dict[str, Any], name: str) -> Callable[[Any], Any]:
    def register(cls: Any) -> Any:
        known: Any = registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"mixer {name!r} is already {known.__qualname__} of {known.__module__}")
        registry[name] = cls
        return cls

    return register


def left_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution of (batch, tokens, channels) with weight (channels, width).

    `before` (batch, width - 1, channels) are the tokens in front, zeros when None; the last tap is the token itself.
    Raises TypeError for whole or complex numbers, ValueError for shapes that do not fit.

    >>> left_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]]))[0, :, 0].tolist()
    [1.0, 12.0, 23.0]
    """
    checks.tensor("weight", weight, shape=("channels", "width"))
    channels, width = weight.shape
    checks.tensor("x", x, shape=("batch", "tokens", channels), empty=True)
    if bias is not None:
        checks.tensor("bias", bias, shape=(channels,))
    if before is not None:
        checks.tensor("before", before, shape=(len(x), width - 1, channels), empty=True)
    if not x.numel():
        return x
    if before is None:
        before = x.new_zeros(len(x), width - 1, x.shape[2])
    padded = torch.cat([before, x], 1).transpose(1, 2)
    y: Tensor = nn.functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])
    return y.transpose(1, 2)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: float64 for float64 and complex128, else float32. Half precision overflows or drowns in long sums."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def fast_length(n: int) -> int:
    """The smallest even number at least n with no prime factors but 2, 3 and 5: lengths for which FFTs are fast."""
    n = max(2, n + n % 2)
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2
