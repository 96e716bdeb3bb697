"""What a decoding step costs on one kind of device, and on two: roofline figures from sizes and rates. Every figure is modelled.

    whole = Whole(LLAMA3_70B, H100, 4)                     # every device holds a share of the weights and of the cache
    split = Split(LLAMA3_70B, H100, 2, H20, 4)             # two devices for the weights, four for the attention
    split.step(rows=128, cached=128 * 4096.0).seconds

Device descriptions and models below are those of the paper's second version as we remember them, prices of its time (2025, the H20's an
estimate of the paper's own): defaults to be replaced by yours, and no measurement. What the devices reach of their peaks is our choice,
the same for every system.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from assay import checks
from assay.methods.core.fleet.hardware import Device, Link
from assay.methods.core.fleet.simulator import Server, StepTimes
from assay.methods.core.fleet.traces import MOST_TOKENS
from assay.methods.serving.attention_offloading.traffic import Shape, bytes_a_step, required_bandwidth

PRICES_OF = "2025, recalled from the paper's second version; the H20's is the paper's estimate"
H100 = Device("H100", flops=989e12, bandwidth=3.35e12, memory=80e9, price=11.06)
H20 = Device("H20", flops=148e12, bandwidth=4.0e12, memory=96e9, price=4.63)
DEVICES = (H100, H20)

LLAMA_33B = Shape(60, 6656, 52, 52, 128, 32_300_000_000)
LLAMA_65B = Shape(80, 8192, 64, 64, 128, 65_000_000_000)
LLAMA3_70B = Shape(80, 8192, 64, 8, 128, 69_500_000_000)

NETWORK = Link(bandwidth=45.7e9, latency=16.5e-6)
"""The paper's own network path: 33.0 us for the round trip, 45.7 GB/s of a 400 Gb/s card."""
USUAL_NETWORK = Link(bandwidth=45.7e9, latency=33.3e-6)
"""Its usual library: 66.6 us for the round trip."""
INTERCONNECT = Link(bandwidth=450e9, latency=5e-6)
"""Between devices that share the weights (NVLink); the latency is our choice."""

Partition = Literal["heads", "rows"]


@dataclass(frozen=True)
class Reached:
    """What devices reach: shares of peak arithmetic and bandwidth, and the share of memory that weights and cache may take."""

    arithmetic: float = 0.6
    bandwidth: float = 0.8
    memory: float = 0.9

    def __post_init__(self) -> None:
        for name in ("arithmetic", "bandwidth", "memory"):
            checks.number(name, getattr(self, name), above=0, high=1)


@dataclass(frozen=True)
class Setup:
    """What all systems of a comparison have in common: what devices reach, the interconnect within a pool (None: free), the network
    between pools (None: free), and whether attention begins before the new key and value are there."""

    reached: Reached = field(default_factory=Reached)
    interconnect: Link | None = INTERCONNECT
    network: Link | None = NETWORK
    overlap: bool = True


IDEAL = Setup(Reached(1.0, 1.0, 1.0), None, None, True)
"""Peak rates, all memory, and links that cost nothing."""


def model_seconds(shape: Shape, device: Device, count: int, rows: float, setup: Setup = IDEAL) -> float:
    """Seconds of everything but attention in a step: 2 N B operations on e (N + 2 B d) bytes, shared among `count` devices, whichever takes
    longer; two sums over the devices a layer are added, a ring's 2 (count - 1) / count of the stream's bytes each.

    Raises ValueError for a count below 1 and rows below 0.
    """
    count, rows = checks.whole("count", count, low=1), checks.number("rows", rows, low=0)
    flops = 2.0 * shape.parameters * rows
    moved = shape.parameters * shape.weight_bytes + 2 * rows * shape.width * shape.kv_bytes
    reached = setup.reached
    seconds = device.seconds(flops / (count * reached.arithmetic), moved / (count * reached.bandwidth))
    if count > 1 and setup.interconnect is not None:
        message = 2 * (count - 1) / count * rows * shape.width * shape.kv_bytes
        seconds += 2 * shape.layers * setup.interconnect.seconds(message)
    return seconds


def attention_seconds(
    shape: Shape, device: Device, count: int, rows: float, cached: float, setup: Setup = IDEAL, busiest: float = 0.0
) -> float:
    """Seconds of the attention in a step over `rows` rows with `cached` tokens behind them together, shared among `count` devices.

    The cache is read once; its arithmetic is looked at too, though it never counts unless many heads share a key. `busiest` is the
    share of the work on the device that has most (0: an even share).
    """
    count, rows = checks.whole("count", count, low=1), checks.number("rows", rows, low=0)
    if not rows:
        return 0.0
    share = busiest or 1 / count
    each = checks.number("cached", cached, low=0) / rows
    moved = rows * shape.cache_bytes(each)
    pairs = moved / (shape.numbers_kept() * shape.kv_bytes)  # tokens seen, over all layers
    sent = shape.sent()
    flops = 2.0 * pairs * (sent.query + sent.output)
    reached = setup.reached
    return device.seconds(share * flops / reached.arithmetic, share * moved / reached.bandwidth)


@dataclass(frozen=True)
class Step:
    """One token of every row: seconds of the whole and of its parts, and the share of the time that each pool works."""

    seconds: float
    model: float  # everything but attention, of all batches
    attention: float
    network: float  # of one batch, hidden or not
    compute_busy: float
    memory_busy: float


@dataclass(frozen=True)
class Whole:
    """`count` devices of one kind that share weights, cache and all work: tensor parallelism, the paper's baseline.

    Raises ValueError for a count that does not divide the key-value heads.
    """

    shape: Shape
    device: Device
    count: int
    setup: Setup = field(default_factory=Setup)

    def __post_init__(self) -> None:
        checks.whole("count", self.count, low=1)
        if self.shape.kv_heads % self.count:
            raise ValueError(f"count must divide the {self.shape.kv_heads} key-value heads, got {self.count}")

    @property
    def price(self) -> float:
        """An hour."""
        return self.count * self.device.price

    @property
    def cache_room(self) -> float:
        """Bytes for keys and values, below 0 where not even the weights fit."""
        weights = self.shape.parameters * self.shape.weight_bytes
        return self.count * self.device.memory * self.setup.reached.memory - weights

    def room(self, context: int) -> int:
        """The most requests of `context` tokens that fit."""
        return max(0, math.floor(self.cache_room / self.shape.cache_bytes(checks.whole("context", context, low=1))))

    def step(self, rows: int, cached: float) -> Step:
        """A step of `rows` rows with `cached` tokens behind them together: attention after the rest, nothing overlaps."""
        model = model_seconds(self.shape, self.device, self.count, rows, self.setup)
        attention = attention_seconds(self.shape, self.device, self.count, rows, cached, self.setup)
        return Step(model + attention, model, attention, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Split:
    """`compute_count` devices for everything but attention (a replica), `memory_count` for keys, values and attention.

    `batches` are under way in turn: one leaves each pool idle while the other works, n of them share n - 1 replicas. Memory devices share
    the cache by key-value heads where their number divides these, else by requests, unevenly. Raises ValueError for counts below 1.
    """

    shape: Shape
    compute: Device
    compute_count: int
    memory: Device
    memory_count: int
    batches: int = 2
    setup: Setup = field(default_factory=Setup)

    def __post_init__(self) -> None:
        for name in ("compute_count", "memory_count", "batches"):
            checks.whole(name, getattr(self, name), low=1)

    @property
    def replicas(self) -> int:
        return max(1, self.batches - 1)

    @property
    def partition(self) -> Partition:
        return "rows" if self.shape.kv_heads % self.memory_count else "heads"

    @property
    def price(self) -> float:
        """An hour, of all replicas."""
        return self.replicas * self.compute_count * self.compute.price + self.memory_count * self.memory.price

    @property
    def cache_room(self) -> float:
        """Bytes for keys and values, below 0 where a replica does not hold the weights."""
        share = self.setup.reached.memory
        weights = self.shape.parameters * self.shape.weight_bytes
        if self.compute_count * self.compute.memory * share < weights:
            return -1.0
        return self.memory_count * self.memory.memory * share

    def room(self, context: int) -> int:
        """The most requests of `context` tokens that fit, all batches together."""
        each = self.shape.cache_bytes(checks.whole("context", context, low=1))
        if self.cache_room < 0:
            return 0
        if self.partition == "heads":
            return math.floor(self.cache_room / each)
        return self.memory_count * math.floor(self.cache_room / self.memory_count / each)

    def step(self, rows: int, cached: float) -> Step:
        """A step of `rows` rows of all batches with `cached` tokens behind them together.

        A batch goes through its layers one after the other: the slice of the model, the query to the memory devices, attention, the
        output back. With `overlap`, keys and values are projected and sent while attention looks at the earlier tokens. No token comes
        faster than that chain, than all batches' slices on the replicas, their attention on the memory devices, and their bytes on the
        network. What is no layer's (the head) counts as spread evenly over the layers: a small part of large models, not of small ones.
        """
        rows = checks.whole("rows", rows, low=0)
        share = math.ceil(rows / self.batches)  # of the largest batch
        layers, network = self.shape.layers, self.setup.network
        model = model_seconds(self.shape, self.compute, self.compute_count, share, self.setup) / layers
        busiest = 0.0
        if self.partition == "rows" and share:
            busiest = math.ceil(share / self.memory_count) / share
        behind = cached * share / rows if rows else 0.0
        attention = (
            attention_seconds(self.shape, self.memory, self.memory_count, share, behind, self.setup, busiest) / layers
        )
        query = late = output = delay = 0.0
        if network is not None:
            sent = self.shape.sent()
            query, late, output = (n * self.shape.kv_bytes * share / network.bandwidth for n in sent)
            delay = 2 * network.latency
        wire = query + late + output
        if self.setup.overlap:
            projected = self.shape.keys_values_share() * model
            hidden = max(attention, max(projected - query, 0.0) + late)
            chain = model - projected + query + hidden + output + delay
        else:
            chain = model + query + late + attention + output + delay
        n = self.batches
        layer = max(chain, n * attention, n * model / self.replicas, n * wire)
        if not layer:
            return Step(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return Step(
            seconds=layers * layer,
            model=layers * n * model,
            attention=layers * n * attention,
            network=layers * (wire + delay),
            compute_busy=n * model / self.replicas / layer,
            memory_busy=n * attention / layer,
        )

    def overlap_saving(self, rows: int, cached: float) -> float:
        """The share of a token's time that beginning attention early saves, one batch at a time: the paper's figure of overlap."""
        times = {}
        for overlap in (False, True):
            setup = Setup(self.setup.reached, self.setup.interconnect, self.setup.network, overlap)
            alone = Split(self.shape, self.compute, self.compute_count, self.memory, self.memory_count, 1, setup)
            times[overlap] = alone.step(rows, cached).seconds
        return 1 - times[True] / times[False] if times[False] else 0.0

    def required_bandwidth(self, rows: int, cached: float, slowdown: float = 0.2) -> float:
        """`traffic.required_bandwidth` of a step of one batch of `rows` rows."""
        model = model_seconds(self.shape, self.compute, self.compute_count, rows, self.setup)
        attention = attention_seconds(self.shape, self.memory, self.memory_count, rows, cached, self.setup)
        return required_bandwidth(self.shape, rows, model, attention, slowdown)

    def bytes_a_step(self, rows: int) -> float:
        """Bytes between the pools in a step of `rows` rows."""
        return bytes_a_step(self.shape, rows)


System = Whole | Split


@dataclass(frozen=True)
class DecodingTimes(StepTimes):
    """A system's times for the simulator of servers: prompts come with their keys and values (prefill runs elsewhere), steps take what
    `system.step` says."""

    prefill: float = 0.0
    step: float = 1.0
    system: System | None = None

    def prompting(self, prompt: int, seen: int) -> float:
        """None: prompts are run elsewhere."""
        return 0.0

    def stepping(self, rows: int, context: int, steps: int = 1) -> float:
        """Seconds of so many steps, each at the mean of their contexts."""
        assert self.system is not None
        return steps * self.system.step(rows, context / steps).seconds if rows else 0.0


def server(name: str, system: System, *, most_rows: int = 4096) -> Server:
    """A system as a server of `core.fleet.simulator.simulate`: as many requests run as their keys and values leave room for.

    Windows are not accounted for in the room: such a model holds more. Raises ValueError for a system on which the model does not fit.
    """
    tokens = math.floor(system.cache_room / (system.shape.numbers_kept() * system.shape.kv_bytes * system.shape.layers))
    if tokens < 1:
        raise ValueError(f"system must have room for the weights and a token, got {name} with {tokens} tokens of room")
    times = DecodingTimes(system=system)
    return Server(name, times, max_running=most_rows, kv_tokens=tokens, chunk=MOST_TOKENS)
