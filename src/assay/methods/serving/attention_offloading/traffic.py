"""What crosses the link when attention runs elsewhere: bytes a token, the bandwidth they need, and a meter that counts them.

Per layer and token a query goes out (q), the new key and value follow (k, v), and the attention's output comes back. With heads times
head dim equal to the width d, and G query heads sharing a key-value head, that is (2 + 2 / G) d numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from assay import checks
from assay.methods.core.fleet.hardware import ModelShape

Kind = Literal["query", "keys and values", "output", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Sent(NamedTuple):
    """Numbers that cross the link for one token of one layer."""

    query: int
    keys_values: int
    output: int

    @property
    def all(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Shape(ModelShape):
    """A decoder whose attention may run elsewhere: `ModelShape` with the `windows` of its layers, one a layer, 0 where there is none.

    `kv_bytes` is the size of a number of the cache and of the messages. Raises ValueError as `ModelShape`, for both kinds of windows at
    once, and for windows that are not one a layer.

    >>> shape = Shape(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, parameters=1000, windows=(0, 8))
    >>> shape.cache_bytes(10), shape.sent().all
    (2304.0, 192)
    """

    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for window in self.windows:
            checks.whole("windows", window, low=0)
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows must be one for each of the {self.layers} layers, got {len(self.windows)}")
        if self.windows and self.window:
            raise ValueError("window must be 0 where windows are given")

    def cache_bytes(self, tokens: float) -> float:
        """Bytes of keys and values behind `tokens` tokens; a mean over requests may be no whole number."""
        windows = self.windows or (self.window,) * self.layers
        held = sum(min(tokens, window) if window else tokens for window in windows)
        return self.numbers_kept() * self.kv_bytes * held

    def numbers_kept(self) -> int:
        """Numbers that a layer keeps of a token."""
        return 2 * self.kv_heads * self.head_dim

    def sent(self) -> Sent:
        """Numbers that cross the link for one token of one layer."""
        return Sent(self.heads * self.head_dim, self.numbers_kept(), self.heads * self.head_dim)

    def keys_values_share(self) -> float:
        """The share of all parameters that projects keys and values, and can run while the query is on its way.

        It is a layer's share too where embeddings and head are a small part of the model, as in large ones; not in a model of a few hundred
        million parameters, whose layers have a larger share.
        """
        return min(1.0, self.numbers_kept() * self.width * self.layers / self.parameters)


@dataclass(frozen=True)
class LatentShape(Shape):
    """A decoder with latent attention (MLA), computed in the latent space: a layer keeps one vector of `latent` + `rotary` numbers a token,
    which all heads share; queries are as wide, outputs `latent` wide for each head. `kv_heads` is 1."""

    latent: int = 512
    rotary: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("latent", self.latent, low=1)
        checks.whole("rotary", self.rotary, low=0)
        if self.kv_heads != 1:
            raise ValueError(f"kv_heads must be 1 where all heads share a latent vector, got {self.kv_heads}")

    def numbers_kept(self) -> int:
        return self.latent + self.rotary

    def sent(self) -> Sent:
        wide = self.latent + self.rotary
        return Sent(self.heads * wide, wide, self.heads * self.latent)


def shape_of(model: Any) -> Shape:
    """The shape of a decoder of transformers, sizes of numbers included. Nothing is run.

    For dense decoders: of experts all parameters count, though a token needs few.
    """
    from assay.methods.core.attention.integration import windows

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if head is not None and head.weight is not embedding:
        parameters -= embedding.numel()
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        parameters=parameters,
        weight_bytes=float(embedding.dtype.itemsize),
        kv_bytes=float(embedding.dtype.itemsize),
        windows=tuple(window or 0 for window in windows(model)),
    )


def bytes_a_step(shape: Shape, rows: int) -> float:
    """Bytes that cross the link in one decoding step of `rows` rows, both ways together, by the closed form.

    >>> bytes_a_step(Shape(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, parameters=1000), rows=3)  # (2 + 2/2) e d B L
    2304.0
    """
    return shape.sent().all * shape.kv_bytes * shape.layers * checks.whole("rows", rows, low=0)


def required_bandwidth(
    shape: Shape, rows: int, model_seconds: float, attention_seconds: float, slowdown: float = 0.2
) -> float:
    """The least bytes a second at which sending, hidden behind nothing, makes a step no more than `slowdown` (0.2: 20 %) longer.

    `model_seconds` and `attention_seconds` are those of a step without any sending. Raises ValueError for times and slowdowns that are
    not above 0.
    """
    seconds = checks.number("model_seconds", model_seconds, above=0)
    seconds += checks.number("attention_seconds", attention_seconds, above=0)
    return bytes_a_step(shape, rows) / (checks.number("slowdown", slowdown, above=0) * seconds)


@dataclass
class Meter:
    """Payload bytes that really crossed, by kind, and the messages they came in; "prompt" is the cache that prefill hands over."""

    bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def count(self, kind: Kind, size: int) -> None:
        self.bytes[kind] += size
        self.messages[kind] += 1

    @property
    def decoding(self) -> int:
        """Bytes of all kinds but the prompts'."""
        return sum(size for kind, size in self.bytes.items() if kind != "prompt")

    def clear(self) -> None:
        self.bytes.clear()
        self.messages.clear()
