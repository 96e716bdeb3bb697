"""What a tensor-parallel step costs, computed from a model's sizes and a machine's rates: is there communication worth hiding?

Per module, a rank computes its share of the weights (read once) and of the cache, and the outcome is summed over the ranks. Other
methods that overlap computing and communicating can start from the same `module_costs` and `all_reduce_seconds`. Every figure is modelled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.inference.ladder_residual.orders import Block, schedule, simulate
from assay.methods.inference.ladder_residual.sharding import sizes_of
from assay.methods.inference.ladder_residual.timeline import Timeline


@dataclass(frozen=True)
class Device:
    """What one rank can do: operations a second (1 MAC = 2), bytes a second of memory, and seconds that every module costs besides.

    Raises ValueError for rates that are not above 0 and an overhead below 0.
    """

    operations: float
    bandwidth: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        checks.number("operations", self.operations, above=0)
        checks.number("bandwidth", self.bandwidth, above=0)
        checks.number("overhead", self.overhead, low=0)


@dataclass(frozen=True)
class Wire:
    """What a rank's connection can do: seconds until a message arrives, and bytes a second (in and out at once).

    Raises ValueError for a latency below 0 and a bandwidth that is not above 0.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        checks.number("latency", self.latency, low=0)
        checks.number("bandwidth", self.bandwidth, above=0)


@dataclass(frozen=True)
class ModuleCost:
    """One module on one rank: MACs, bytes read (weights and cache), and bytes of the output that is summed."""

    macs: float
    bytes_read: float
    message_bytes: float


@dataclass(frozen=True)
class StepCost:
    """A pass through the layers. `seconds` is that of the chosen block, `standard` and `upper_bound` (no communication) for comparison."""

    seconds: float
    standard: float
    upper_bound: float
    message_seconds: float
    compute_seconds: dict[str, float]  # of an attention and of an MLP
    timeline: Timeline

    @property
    def speedup(self) -> float:
        """Over the standard transformer."""
        return self.standard / self.seconds


def module_costs(
    config: Any, ranks: int, *, batch: int = 1, tokens: int = 1, context: int = 0, dtype_bytes: int = 2
) -> dict[str, ModuleCost]:
    """The cost of one layer's "attention" and "mlp" (gated) on one of `ranks` ranks, for `tokens` new tokens of each of `batch` rows.

    `config` is that of a Llama-type model; `context` tokens are in the cache already. Norms and rotary embeddings are left out. Raises
    ValueError for counts below 1 (`context`: 0) and for `ranks` among which `shard` could not divide the heads and the MLP units.

    >>> from transformers import LlamaConfig
    >>> cost = module_costs(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4), ranks=2)
    >>> cost["mlp"].macs, cost["mlp"].bytes_read, cost["mlp"].message_bytes
    (12288.0, 24576.0, 128.0)
    """
    ranks, batch = checks.whole("ranks", ranks, low=1), checks.whole("batch", batch, low=1)
    tokens, context = checks.whole("tokens", tokens, low=1), checks.whole("context", context, low=0)
    size = checks.whole("dtype_bytes", dtype_bytes, low=1)
    sizes = sizes_of(config, ranks, called="ranks")
    width, dim, rows = config.hidden_size, sizes["dim"], batch * tokens
    own_heads, own_kv = sizes["heads"] / ranks, max(sizes["kv"] / ranks, 1.0)
    attention = width * dim * (2 * own_heads + 2 * own_kv)
    mlp = 3 * width * sizes["units"] / ranks
    pairs = batch * tokens * (context + (tokens + 1) / 2)  # a token attends to those before it and to itself
    cached = batch * (context + tokens) * 2 * own_kv * dim
    message = rows * width * size
    return {
        "attention": ModuleCost(
            rows * attention + 2 * pairs * own_heads * dim, (attention + cached) * size, float(message)
        ),
        "mlp": ModuleCost(rows * mlp, mlp * size, float(message)),
    }


def all_reduce_seconds(message_bytes: float, ranks: int, wire: Wire) -> float:
    """Seconds of one sum over `ranks` ranks, by whichever of two ways is faster (our choice of a model).

    A ring takes 2 (ranks - 1) messages of 1 / ranks of the bytes; sending everything to everybody takes one latency and ranks - 1 times the
    bytes. Raises ValueError for counts below 1 or bytes below 0.

    >>> all_reduce_seconds(1000, 2, Wire(latency=1e-3, bandwidth=1e6))
    0.002
    """
    ranks = checks.whole("ranks", ranks, low=1)
    size = checks.number("message_bytes", message_bytes, low=0)
    others = ranks - 1
    if not others:
        return 0.0
    ring = 2 * others * (wire.latency + size / ranks / wire.bandwidth)
    return min(ring, wire.latency + others * size / wire.bandwidth)


def step_cost(
    config: Any,
    ranks: int,
    device: Device,
    wire: Wire,
    *,
    batch: int = 1,
    tokens: int = 1,
    context: int = 0,
    dtype_bytes: int = 2,
    block: Block = "ladder",
    layers: Collection[int] | None = None,
    reduce_every: int = 2,
) -> StepCost:
    """The time of one pass of a model of that configuration through its layers (no embedding, no head) on `ranks` ranks.

    A module takes the longer of its operations and its bytes at the device's rates, plus the device's overhead; its message takes
    `all_reduce_seconds`. `block`, `layers` and `reduce_every` are those of `schedule`. Raises what `module_costs` and `schedule` raise.

    >>> from transformers import LlamaConfig
    >>> big = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    >>> cost = step_cost(big, 8, Device(5e14, 2e12, 1e-5), Wire(2e-5, 3e11), context=1024)
    >>> 1 < cost.speedup < 2 and cost.upper_bound <= cost.seconds <= cost.standard
    True
    """
    costs = module_costs(config, ranks, batch=batch, tokens=tokens, context=context, dtype_bytes=dtype_bytes)
    compute = {
        name: device.overhead + max(2 * cost.macs / device.operations, cost.bytes_read / device.bandwidth)
        for name, cost in costs.items()
    }
    message = all_reduce_seconds(costs["mlp"].message_bytes, ranks, wire)
    count = config.num_hidden_layers
    line = simulate(schedule(count, block, layers, reduce_every=reduce_every), compute, message)
    usual = schedule(count, chosen=())
    return StepCost(
        seconds=line.seconds,
        standard=simulate(usual, compute, message).seconds,
        upper_bound=simulate(usual, compute, 0.0).seconds,
        message_seconds=message,
        compute_seconds=compute,
        timeline=line,
    )
