"""What a sequence mixer is: one function of a sequence that can be computed at once, in chunks, or token by token.

The three must agree, which `tests/properties/mixers.py` checks for every mixer. Tensors are (batch, tokens, dim); a state is a
plain dictionary of tensors whose first dimension is the batch.

Padding stands on the left only, told by `mask`, bool (batch, tokens), False on padding. A mixer must compute for the tokens
behind the padding what it would compute without it; what it returns at padding is unspecified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Mixer(nn.Module):
    """Base class. A mixer implements `forward`, `init_state` and `advance`; the rest follows.

    `forward` is what training uses and must be causal and have gradients. `advance` is what generation uses.
    """

    dim: int

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The whole sequence at once, from an empty state: (batch, tokens, dim) to the same shape."""
        raise NotImplementedError

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token, in the dtype of the parameters unless given (sums may stay in float32)."""
        raise NotImplementedError

    def advance(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """The next tokens (batch, tokens, dim) behind `state`: their outputs, and the state after them.

        `state` is used up: its tensors may be written to. `clone_state` it to go on from the same point twice.
        """
        raise NotImplementedError

    def chunked(
        self, x: Tensor, state: State | None = None, *, chunk: int = 64, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The sequence in chunks of `chunk` tokens, carrying the state: memory does not grow with the length."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        outputs = []
        for start in range(0, x.shape[1], chunk):
            part = None if mask is None else mask[:, start : start + chunk]
            y, state = self.advance(x[:, start : start + chunk], state, part)
            outputs.append(y)
        return torch.cat(outputs, 1) if outputs else x, state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token (batch, dim): its output and the new state."""
        y, state = self.advance(x[:, None], state)
        return y[:, 0], state

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state after `tokens` tokens. The default is for states that do not grow."""
        state = self.init_state(batch, device="meta", dtype=dtype)
        return sum(x.numel() * x.element_size() for x in state.values())


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
    """The same for what mixes channels, token by token: `MixerConfig.channel_mixer`, built as `cls(dim, hidden, **options)`."""
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
    """
    width = weight.shape[1]
    if before is None:
        before = x.new_zeros(len(x), width - 1, x.shape[2])
    padded = torch.cat([before, x], 1).transpose(1, 2)
    y: Tensor = nn.functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])
    return y.transpose(1, 2)


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
