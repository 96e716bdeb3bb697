"""What machines, links and models are to a simulator: numbers with units, and the least times that follow from them.

All are plain descriptors, written in a fleet file or measured by `assay doctor`; none of them knows a vendor's product.
"""

from __future__ import annotations

from dataclasses import dataclass

from assay import checks


@dataclass(frozen=True)
class Device:
    """A processor with its memory: peak operations a second, bytes a second and bytes of memory, watts, and a price an hour."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    idle_watts: float = 0.0
    peak_watts: float = 0.0
    price: float = 0.0

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "memory"):
            checks.number(field, getattr(self, field), above=0)
        for field in ("idle_watts", "peak_watts", "price"):
            checks.number(field, getattr(self, field), low=0)
        if self.peak_watts < self.idle_watts:
            raise ValueError(f"peak_watts must be at least idle_watts ({self.idle_watts:g}), got {self.peak_watts:g}")

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """The least time of so many operations on so many bytes: the roofline.

        >>> Device("d", flops=1e12, bandwidth=1e11, memory=1e9).seconds(2e12, 1e11)
        2.0
        """
        return max(flops / self.flops, bytes_moved / self.bandwidth)

    def watts(self, utilisation: float, frequency: float = 1.0, *, exponent: float = 3.0) -> float:
        """Power at a share of its peak work, clocked at a share `frequency`: idle + (peak - idle) * utilisation * frequency ** exponent.

        The cubic law is the textbook's (voltage goes with frequency); calibrate `exponent`, 2 to 3 on real parts. Raises ValueError
        for shares outside 0 to 1.
        """
        checks.number("utilisation", utilisation, low=0, high=1)
        checks.number("frequency", frequency, low=0, high=1)
        checks.number("exponent", exponent, low=0)
        return self.idle_watts + (self.peak_watts - self.idle_watts) * utilisation * frequency**exponent


@dataclass(frozen=True)
class Link:
    """A connection: bytes a second and the seconds that any message takes besides.

    >>> Link(bandwidth=1e9, latency=0.001).seconds(1e9)
    1.001
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        checks.number("bandwidth", self.bandwidth, above=0)
        checks.number("latency", self.latency, low=0)

    def seconds(self, bytes_moved: float) -> float:
        """Seconds until a message of so many bytes is there."""
        return self.latency + checks.number("bytes_moved", bytes_moved, low=0) / self.bandwidth


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes, as far as costs follow from them. `window` bounds what a layer's cache holds; 0 is no bound."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int  # those that a token is multiplied by: embeddings that are only looked up are left out
    weight_bytes: float = 2.0  # a parameter
    kv_bytes: float = 2.0  # a number of the cache
    window: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "width", "heads", "kv_heads", "head_dim", "parameters"):
            checks.whole(field, getattr(self, field), low=1)
        checks.number("weight_bytes", self.weight_bytes, above=0)
        checks.number("kv_bytes", self.kv_bytes, above=0)
        checks.whole("window", self.window, low=0)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({self.heads}), got {self.kv_heads}")

    def cache_bytes(self, tokens: int) -> float:
        """Bytes of keys and values behind `tokens` tokens."""
        held = min(tokens, self.window) if self.window else tokens
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes * held

    def prefill_flops(self, tokens: int, behind: int = 0) -> float:
        """Operations (two a multiply-add) of a prompt's `tokens` behind `behind` earlier ones, causal attention included."""
        pairs = tokens * behind + tokens * (tokens + 1) / 2
        return 2.0 * self.parameters * tokens + 4.0 * self.layers * self.heads * self.head_dim * pairs

    def step_bytes(self, contexts: list[int]) -> float:
        """Bytes that a decoding step over rows of these contexts has to read: the weights once, and every row's cache."""
        return self.parameters * self.weight_bytes + sum(self.cache_bytes(context) for context in contexts)

    def step_flops(self, contexts: list[int]) -> float:
        """Operations of a decoding step over rows of these contexts."""
        return sum(2.0 * self.parameters + 4.0 * self.layers * self.heads * self.head_dim * c for c in contexts)
