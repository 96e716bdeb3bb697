"""What training and serving a decoder takes of each resource, by formulas: memory, network, time, energy, carbon, money.

These are engineering identities, written out by us. All of it is modelled. Memory and network are bytes of one device; time is the
roofline's least time over the share of it that is reached (`utilisation`), which must be measured and differs between phases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from assay import checks
from assay.methods.compression.resource_efficient_llm_survey.decoder import Decoder, element_bytes
from assay.methods.compression.resource_efficient_llm_survey.report import ResourceReport
from assay.methods.core.fleet.hardware import Device

Kept = Literal["all", "flash", "inputs"]
KEPT: tuple[Kept, ...] = ("all", "flash", "inputs")
"""What is kept of the forward pass for the backward one: all of it; all but the scores, which flash attention makes again; the inputs of
the blocks, from which all else is computed again."""
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Range:
    """A figure that is a guess: between `low` and `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        checks.number("low", self.low, low=0)
        checks.number("high", self.high, low=self.low)


PUE = Range(1.1, 1.6)
"""A data centre's energy over its computers'; recalled, from good to usual."""
CARBON = Range(50.0, 700.0)
"""Grams of CO2 a kWh of electricity; recalled, from hydropower to coal."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one device, part by part."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimiser + self.activations


def training_memory(
    decoder: Decoder,
    tokens: int,
    *,
    batch: int = 1,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    zero: int = 0,
    mixed: bool = True,
    kept: Kept = "all",
) -> TrainingMemory:
    """What one of dp x tp x pp devices holds in a step of Adam over `batch` sequences of `tokens` each (of one data-parallel part).

    `mixed`: weights and gradients in 16 bits, with a master copy and Adam's two moments in float32, 16 bytes a parameter; else all in
    float32, 16 bytes too. `zero` 1 divides the optimiser's part by dp, 2 the gradients as well, 3 the weights as well. `kept` says which
    activations stay (`KEPT`): n B d (34 + 5 h n / d) bytes a block at 16 bits, 34 n B d, or 2 n B d, divided by tp and pp; twice that in
    float32. That holds for blocks that keep what GPT's do, and is about right for others: check it against an allocator. Logits are left
    out. Raises ValueError for numbers below 1, another stage, or another `kept`.
    """
    tokens, batch = checks.whole("tokens", tokens, low=1), checks.whole("batch", batch, low=1)
    dp, split = checks.whole("dp", dp, low=1), checks.whole("tp", tp, low=1) * checks.whole("pp", pp, low=1)
    zero = checks.whole("zero", zero, low=0, high=3)
    checks.choice("kept", kept, KEPT)
    size = 2 if checks.flag("mixed", mixed) else 4
    held = decoder.parameters / split
    optimiser = held * (12 if mixed else 8)
    a_block = {
        "all": 34 + 5 * decoder.heads * tokens / decoder.width,
        "flash": 34.0,
        "inputs": 2.0,
    }[kept]
    activations = decoder.layers * tokens * batch * decoder.width * a_block * (size / 2) / split
    return TrainingMemory(
        weights=held * size / (dp if zero == 3 else 1),
        gradients=held * size / (dp if zero >= 2 else 1),
        optimiser=optimiser / (dp if zero >= 1 else 1),
        activations=activations,
    )


def network_bytes(
    decoder: Decoder, tokens: int, *, batch: int = 1, dp: int = 1, tp: int = 1, pp: int = 1, element_bytes: float = 2.0
) -> dict[str, float]:
    """Bytes that a device sends in one training step, by kind of parallelism.

    Data: a ring's all-reduce of the gradients, 2 (dp - 1) / dp of them. Tensor: four all-reduces a block of its activations. Pipeline: the
    activations of one boundary forward and their gradients back.
    """
    tokens, batch = checks.whole("tokens", tokens, low=1), checks.whole("batch", batch, low=1)
    dp, tp, pp = (checks.whole(name, n, low=1) for name, n in (("dp", dp), ("tp", tp), ("pp", pp)))
    size = checks.number("element_bytes", element_bytes, above=0)
    activations = batch * tokens * decoder.width * size
    return {
        "data": 2 * (dp - 1) / dp * decoder.parameters / (tp * pp) * size,
        "tensor": 4 * 2 * (tp - 1) / tp * activations * decoder.layers / pp,
        "pipeline": 2 * activations if pp > 1 else 0.0,
    }


def activation_bytes(decoder: Decoder, tokens: int, format: str, *, batch: int = 1) -> float:
    """Bytes that a prompt's forward pass holds at its fullest besides weights and cache, as transformers' blocks run on a processor.

    That is in the feed-forward, four of the model's width and three of the inner one a token; or where the heads together are wider than
    that, when their queries are turned: four of theirs (five in 16 bits, whose norms are taken in float32), three of the model's width and
    two of the keys'. A layer whose window is shorter than the prompt needs a mask, a byte for each pair of tokens, and when it attends
    another and a number, and copies of the keys and values that heads share. Attention that is `unfused` has two numbers for each pair and
    head, 10 bytes where they are of 16 bits, and masks. Our count, tested within a fifth; logits are one token's and left out.
    """
    rows = checks.whole("tokens", tokens, low=1) * checks.whole("batch", batch, low=1)
    size, pairs = element_bytes(format), rows * tokens
    heads, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    masks = pairs if any(0 < window < tokens for window in decoder.windows) and not decoder.unfused else 0
    forward = rows * (4 * decoder.width + 3 * decoder.feed_forward + 2 * decoder.head_dim) * size + masks
    turned = rows * (3 * decoder.width + 2 * keys + (4 if size == 4 else 5) * heads) * size + masks
    attended = 0
    if decoder.unfused:
        attended = rows * (3 * decoder.width + 2 * keys + 4 * heads) * size
        attended += pairs * (decoder.heads * (8 if size == 4 else 10) + 2 * size)
    elif masks:
        copies = 2 * heads if 1 < decoder.kv_heads < decoder.heads else 0
        attended = rows * (3 * decoder.width + 2 * keys + 2 * heads + copies) * size + pairs * (2 + size)
    return float(max(forward, turned, attended))


def prompt_bytes(decoder: Decoder, tokens: int, format: str, *, batch: int = 1) -> float:
    """Bytes that a prompt takes at its fullest besides the weights: its activations, and the cache before windows let go of any."""
    cache = decoder.prompt_cache_bytes(tokens, batch=batch, element_bytes=element_bytes(format))
    return cache + activation_bytes(decoder, tokens, format, batch=batch)


def least_seconds(
    decoder: Decoder, device: Device, format: str, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """The roofline of one answer: seconds of the "prefill" of its prompt, and of one "token" in the middle of it."""
    prompt, new = checks.whole("prompt_tokens", prompt_tokens, low=1), checks.whole("new_tokens", new_tokens, low=1)
    context = prompt + (new + 1) // 2
    return {
        "prefill": device.seconds(decoder.prefill_flops(prompt), decoder.step_weight_bytes(format)),
        "token": device.seconds(decoder.step_flops(context), decoder.step_bytes(context, format)),
    }


def estimate(
    decoder: Decoder,
    device: Device,
    *,
    format: str,
    prompt_tokens: int,
    new_tokens: int,
    utilisation: Mapping[str, float] | None = None,
    pue: Range = PUE,
    carbon: Range = CARBON,
) -> ResourceReport:
    """What one answer of a decoder takes of each resource on a device, modelled; one prompt at a time.

    `utilisation` has the shares of the roofline that "prefill" and "token" reach, in (0, 1]; 1, the bound itself, where it is not given.
    Energy is the device's `peak_watts` for as long as it takes, times a PUE: an upper figure, and 0 where no watts are stated. Of energy
    and carbon, whose factors are guesses, both ends are reported.

    >>> from assay.methods.core.fleet.hardware import Device
    >>> small = Decoder(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, feed_forward=96, gated=True, vocabulary=100, tied=True)
    >>> found = estimate(small, Device("d", 1e12, 1e10, 1e9), format="fp32", prompt_tokens=8, new_tokens=4)
    >>> found.source, found.amounts["weight_bytes"]
    ('modelled', 271360.0)
    """
    reached = {"prefill": 1.0, "token": 1.0, **(utilisation or {})}
    for name, share in reached.items():
        checks.choice("a phase of utilisation", name, ("prefill", "token"))
        checks.number(f"utilisation of {name}", share, above=0, high=1)
    bound = least_seconds(decoder, device, format, prompt_tokens, new_tokens)
    prefill, token = bound["prefill"] / reached["prefill"], bound["token"] / reached["token"]
    seconds = prefill + (new_tokens - 1) * token
    held = prompt_tokens + new_tokens - 1
    cache = decoder.cache_bytes(held, element_bytes=element_bytes(format))
    weights, prompt = decoder.weight_bytes(format), prompt_bytes(decoder, prompt_tokens, format)
    joules = [device.peak_watts * seconds * factor for factor in (pue.low, pue.high)]
    middle = prompt_tokens + (new_tokens + 1) // 2
    return ResourceReport(
        "modelled",
        {
            "parameters": float(decoder.parameters),
            "parameters_without_tables": float(decoder.parameters_without_tables),
            "weight_bytes": weights,
            "cache_bytes": cache,
            "peak_bytes": weights + max(prompt, cache),
            "flops": decoder.prefill_flops(prompt_tokens) + (new_tokens - 1) * decoder.step_flops(middle),
            "prefill_seconds": prefill,
            "token_seconds": token,
            "seconds": seconds,
            "tokens_per_second": new_tokens / seconds,
            "joules_low": joules[0],
            "joules_high": joules[1],
            "grams_co2_low": joules[0] / JOULES_PER_KWH * carbon.low,
            "grams_co2_high": joules[1] / JOULES_PER_KWH * carbon.high,
            "price": device.price * seconds / 3600,
        },
        batch=1,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        format=format,
        device=device.name,
    )
