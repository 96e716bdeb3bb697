"""Attention on a device: regime, tile, intensity, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from assay import checks
from assay.methods.attention.attention_io.counts import Algorithm, Regime, Tile, check_sizes, choose
from assay.methods.core.attention.integration import can_register, is_causal, windows


@dataclass(frozen=True)
class DeviceSheet:
    """What a device offers to one of its `units` (a multiprocessor, a core), and to all of them together.

    `fast_bytes` is the fast memory of a unit that tiles may fill; `bandwidth_bytes_per_s` that of the slow memory and `flops_per_s`
    the matrix products' rate, both of the whole device; `element_bytes` of the type the rate is for.
    """

    name: str
    fast_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    units: int
    element_bytes: int

    def __post_init__(self) -> None:
        for name in ("fast_bytes", "units", "element_bytes"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("bandwidth_bytes_per_s", "flops_per_s"):
            checks.number(name, getattr(self, name), above=0)

    @property
    def capacity(self) -> int:
        """M: words of the fast memory of a unit."""
        return self.fast_bytes // self.element_bytes

    @property
    def ridge(self) -> float:
        """FLOPs per byte (1 MAC = 2 FLOPs) above which arithmetic, not memory, is the limit."""
        return self.flops_per_s / self.bandwidth_bytes_per_s


# from the vendors' data sheets: shared memory of a multiprocessor, dense bfloat16 products
H100 = DeviceSheet("H100 SXM, bfloat16", 228 << 10, 3.35e12, 989e12, 132, 2)
A100 = DeviceSheet("A100 SXM 80 GB, bfloat16", 164 << 10, 2.039e12, 312e12, 108, 2)
DEVICES = {"h100": H100, "a100": A100}


def this_machine(level: int = 2) -> DeviceSheet:
    """This processor in float32: a core's cache of the given level and the calibrated, attainable rates.

    Raises OSError where the system does not say how large that cache is.
    """
    from assay.measure.machine import calibrate, machine

    with open(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size") as file:
        size = file.read().strip()
    fast = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    rates, here = calibrate(quick=True, device="cpu"), machine()
    name = f"{here.cpu}, level {level} cache, float32"
    return DeviceSheet(name, fast, rates.memory_bandwidth, rates.peak("float32"), here.threads, 4)


@dataclass(frozen=True)
class Advice:
    """Where attention stands on a device: bytes and FLOPs (1 MAC = 2 FLOPs) of all heads, seconds each would take alone."""

    device: str
    regime: Regime
    algorithm: Algorithm
    tile: Tile
    words: int
    bytes: int
    flops: int
    intensity: float  # FLOPs per byte of slow memory
    ridge: float
    memory_seconds: float
    compute_seconds: float

    @property
    def limited_by(self) -> Literal["memory", "compute"]:
        """What bounds the time: "memory" below the ridge, "compute" from there on."""
        return "memory" if self.intensity < self.ridge else "compute"


def advise(n: int, d: int, device: DeviceSheet, *, heads: int = 1, causal: bool = False) -> Advice:
    """Regime, algorithm, best tile and roofline of `heads` heads of attention over n tokens; each head on one unit's memory.

    Count the heads of all batch rows. Seconds are lower bounds from the sheet, not predictions.

    >>> advice = advise(4096, 128, H100, heads=32)
    >>> advice.regime, advice.limited_by
    ('large cache', 'compute')
    """
    check_sizes(heads=heads)
    choice = choose(n, d, device.capacity, causal=causal)
    words = heads * choice.traffic.words
    moved = words * device.element_bytes
    flops = 4 * d * heads * (n * (n + 1) // 2 if causal else n * n)
    return Advice(
        device=device.name,
        regime=choice.bound.regime,
        algorithm=choice.algorithm,
        tile=choice.tile,
        words=words,
        bytes=moved,
        flops=flops,
        intensity=flops / moved,
        ridge=device.ridge,
        memory_seconds=moved / device.bandwidth_bytes_per_s,
        compute_seconds=flops / device.flops_per_s,
    )


def advise_model(model: nn.Module, tokens: int, device: DeviceSheet, *, batch: int = 1) -> list[Advice | None]:
    """`advise` for each attention layer of a transformers model that reads prompts of `tokens` tokens, `batch` at a time.

    Causal if the model is; keys and values count once per query head, as in the paper's bounds. None for layers with a
    sliding window shorter than the prompt, which the bounds do not cover. Raises ValueError for a model without attention of the
    common form.
    """
    checks.whole("tokens", tokens, low=1)
    checks.whole("batch", batch, low=1)
    if reason := can_register(model):
        raise ValueError(f"model must have attention of the common form: {reason}")
    config = cast(Any, model).config.get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = advise(tokens, dim, device, heads=batch * heads, causal=is_causal(model))
    return [None if size is not None and size < tokens else found for size in windows(model)]
