"""What solving costs in equivalent FLOPs: arithmetic, plus the reading of keys and values weighted by what a byte costs
on the hardware.

    C = 2 N P L + r N D (2 A L + L^2) + I D (2 A L + N L^2)

for N trials of L generated tokens each behind a prompt of A tokens, with P the parameters that a token is multiplied
with, D the elements of keys and values of a token, r the query heads that share a key head, and I the hardware's FLOP/s
over its bytes/s. The terms are linear layers, attention's arithmetic, and its reads of 2-byte keys and values. The
prompt's are read once for all trials. They add up because at large batch the linear layers are bound by arithmetic and
attention by memory; reading weights is shared by the batch and left out. With I = 0 it is the law that counts FLOPs
alone.

A layer that sees no more than some tokens (a sparse one its budget, a sliding one its window) has its area under the
context, integral of min(reach, A + t) over t from 0 to L, in the place of A L + L^2 / 2.

When NOT to use it: as a time. It is a model; `fitted` says how well measured times follow it on a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
from torch import nn

from assay import checks
from assay.methods.core.attention.integration import windows
from assay.methods.reasoning.kinetics.selection import BlockTopK

Variant = Literal["paper", "as_released"]


@dataclass(frozen=True)
class Hardware:
    """What a device does at most in a second: floating-point operations (two a multiply-add) and bytes read from
    memory.

    >>> round(HARDWARE["B200"].intensity, 1), round(HARDWARE["H100"].intensity)
    (562.5, 295)
    """

    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        checks.number("flops", self.flops, above=0)
        checks.number("bandwidth", self.bandwidth, above=0)

    @property
    def intensity(self) -> float:
        """Operations in the time of a byte."""
        return self.flops / self.bandwidth


HARDWARE = {"B200": Hardware(4.5e15, 8e12), "H100": Hardware(989e12, 3.35e12)}
"""By data sheet: B200 with the numbers that the paper divides, H100 SXM dense in bfloat16."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its cost depends on.

    `parameters` are those that a token is multiplied with (active ones in a mixture of experts). `windows` has what
    each layer sees at most, None for everything; empty where no layer is limited. Raises ValueError and TypeError for
    sizes that are no such numbers.

    >>> Shape(parameters=1e9, layers=4, heads=8, key_heads=2, head_dim=64).kv_elements
    1024
    """

    parameters: float
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        checks.number("parameters", self.parameters, above=0)
        for name in ("layers", "heads", "key_heads", "head_dim"):
            checks.whole(name, getattr(self, name), low=1)
        if self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, {self.key_heads}, got {self.heads}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows must be of {self.layers} layers, got {len(self.windows)}")
        for window in self.windows:
            if window is not None:
                checks.whole("windows", window, low=1)

    @property
    def kv_elements(self) -> int:
        """D: elements of keys and values of a token, over all layers."""
        return 2 * self.layers * self.key_heads * self.head_dim

    @property
    def reaches(self) -> tuple[int | None, ...]:
        """What each layer sees at most."""
        return self.windows or (None,) * self.layers


def shape_of(model: nn.Module) -> Shape:
    """The shape of a transformers decoder: sizes from its configuration, parameters counted from its modules.

    Look-up tables count where they are the output layer too, and stacked experts with the share that a token is sent
    to. Raises ValueError for a model without the usual names in its configuration.
    """
    found: Any = model
    config: Any = found.config.get_text_config() if hasattr(found, "config") else None
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"model must be a transformers decoder with attention heads, got {type(model).__name__}")
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active: Any = getattr(config, "num_experts_per_tok", None)
    output = found.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = 0.0
    for parameter in model.parameters():
        if id(parameter) in tables and not (output is not None and parameter is output.weight):
            continue
        stacked = experts and active and parameter.ndim == 3 and parameter.shape[0] == experts
        parameters += parameter.numel() * (active / experts if stacked else 1)
    sees = tuple(windows(model))
    return Shape(
        parameters=parameters,
        layers=config.num_hidden_layers,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=sees if any(window is not None for window in sees) else (),
    )


@dataclass(frozen=True)
class Work:
    """What is asked for: a prompt of tokens, tokens generated behind it by each trial, and how many trials. Raises as
    `Shape`."""

    prompt: int
    generated: int
    trials: int = 1

    def __post_init__(self) -> None:
        checks.whole("prompt", self.prompt, low=0)
        checks.whole("generated", self.generated, low=0)
        checks.whole("trials", self.trials, low=1)


@dataclass(frozen=True)
class Cost:
    """FLOPs (two a multiply-add) and bytes, by what they are for. Costs add up."""

    linear: float = 0.0
    attention: float = 0.0
    search: float = 0.0  # choosing blocks
    kv_bytes: float = 0.0
    search_bytes: float = 0.0
    weight_bytes: float = 0.0  # 0 unless asked for

    @property
    def flops(self) -> float:
        """All arithmetic: what the law that counts FLOPs alone looks at."""
        return self.linear + self.attention + self.search

    @property
    def bytes(self) -> float:
        """All bytes that are counted."""
        return self.kv_bytes + self.search_bytes + self.weight_bytes

    def eflops(self, intensity: float) -> float:
        """FLOPs, and bytes weighted by a hardware's intensity. Raises ValueError for one below 0."""
        return self.flops + checks.number("intensity", intensity, low=0) * self.bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> Cost:
        return Cost(**{name: value * times for name, value in vars(self).items()})


def area(prompt: float, generated: float, reach: float | None = None) -> float:
    """The tokens attended to while generating, summed over steps as an integral: of min(reach, prompt + t), t from 0 to
    `generated`.

    At most half of `reach` (all tokens, where it is None) away from the sum over whole steps.

    >>> area(100, 10), area(100, 10, 50), area(0, 10, 4)
    (1050.0, 500.0, 32.0)
    """
    whole = prompt * generated + generated**2 / 2
    if reach is None or reach >= prompt + generated:
        return float(whole)
    return float(reach * generated - max(0.0, reach - prompt) ** 2 / 2)


def cost(
    shape: Shape,
    work: Work,
    attention: BlockTopK | None = None,
    *,
    element_bytes: float = 2.0,
    shared_prompt: bool = True,
    weights_read_with: int | None = None,
    variant: Variant = "paper",
) -> Cost:
    """What some work costs a model of a shape, with dense attention (None) or block top-k.

    `element_bytes` is the size of a key's element. `shared_prompt` False has every trial read a copy of the prompt's
    keys and values, as ordinary batched attention does; sparse attention always does. `weights_read_with`, a batch,
    adds the reading of the weights that it shares, which counts where it is small. Choosing reads one mean key a block
    (with blocks of one token: the keys), once the context is longer than the budget; the group's mean query is scored.
    `dense_layers` cost what they cost.

    "as_released" has the formulae of the official cost model: all layers sparse; blocks of one token are searched for
    nothing, and their area has half the square of budget less prompt added where it is to be taken off; other blocks
    are searched by every query head, in whole blocks, without the factor 2 of a multiply-add, and the reading of mean
    keys counts elements in the place of bytes. It has no shorter windows: raises ValueError for a shape with some.
    Raises ValueError and TypeError for other arguments out of range.

    >>> smol = Shape(parameters=135e6, layers=30, heads=9, key_heads=3, head_dim=64)
    >>> found = cost(smol, Work(prompt=0, generated=1000))
    >>> found.linear, found.attention, found.kv_bytes
    (270000000000.0, 34560000000.0, 11520000000.0)
    """
    for name, value, kind in (("shape", shape, Shape), ("work", work, Work)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {checks.shown(value)}")
    if attention is not None and not isinstance(attention, BlockTopK):
        raise TypeError(f"attention must be a BlockTopK or None, got {checks.shown(attention)}")
    size = checks.number("element_bytes", element_bytes, above=0)
    checks.flag("shared_prompt", shared_prompt)
    prompt, generated, trials = work.prompt, work.generated, work.trials
    linear = 2 * trials * shape.parameters * generated
    weights = 0.0
    if weights_read_with is not None:
        batch = checks.whole("weights_read_with", weights_read_with, low=1)
        weights = shape.parameters * size * generated * trials / batch
    if checks.choice("variant", variant, get_args(Variant)) == "as_released":
        return Cost(linear, weight_bytes=weights) + _released(shape, work, attention, size)
    keys = shape.key_heads * shape.head_dim  # elements of a token's keys in a layer, and of its values
    queries = shape.heads * shape.head_dim
    total = Cost(linear, weight_bytes=weights)
    for layer, window in enumerate(shape.reaches):
        sparse = attention is not None and window is None and layer not in attention.dense_layers
        if not sparse or attention is None:
            whole, own = area(prompt, generated, window), area(0, generated, window)
            read = (whole - own) * (1 if shared_prompt else trials) + own * trials
            total += Cost(attention=4 * queries * whole * trials, kv_bytes=2 * keys * size * read)
            continue
        whole = area(prompt, generated, attention.budget)
        beyond = min(generated, max(0, prompt + generated - attention.budget))  # steps that choose
        blocks = area(prompt + generated - beyond, beyond) / attention.block * trials
        values_only = attention.block == 1  # the keys are read by the search
        dense = area(prompt, generated - beyond)
        read = keys * size * trials * (whole + (dense if values_only else whole))
        total += Cost(
            attention=4 * queries * whole * trials,
            search=2 * keys * blocks,
            kv_bytes=read,
            search_bytes=keys * blocks * size,
        )
    return total


def _released(shape: Shape, work: Work, attention: BlockTopK | None, size: float) -> Cost:
    if shape.windows:
        raise ValueError("variant must be 'paper' for a shape with windows, got 'as_released'")
    prompt, generated, trials = work.prompt, work.generated, work.trials
    keys, queries = (heads * shape.head_dim * shape.layers for heads in (shape.key_heads, shape.heads))
    if attention is None:
        return Cost(
            attention=2 * (2 * prompt + generated) * generated * queries * trials,
            kv_bytes=size * (2 * prompt + generated * trials) * generated * keys,
        )
    off = max(0, attention.budget - prompt) ** 2 / 2
    whole = attention.budget * generated + (off if attention.block == 1 else -off)
    found = Cost(attention=4 * whole * queries * trials, kv_bytes=2 * size * whole * keys * trials)
    if attention.block == 1:
        return found
    blocks = (2 * prompt + generated) // attention.block * generated
    shared = (2 * prompt + generated * trials) // attention.block * generated
    return found + Cost(search=blocks * queries * trials, search_bytes=shared * keys)


def mean_cost(shape: Shape, prompt: int, lengths: Sequence[int], trials: int = 1, **options: Any) -> Cost:
    """The mean of `cost` over trials that generated these many tokens each; `options` as there. Raises ValueError
    without a length."""
    if not len(lengths):
        raise ValueError("lengths must hold at least one number of tokens, got none")
    found = Cost()
    for length in lengths:
        found += cost(shape, Work(prompt, length, trials), **options)
    return found * (1 / len(lengths))


@dataclass(frozen=True)
class Fitted:
    """Seconds as they follow from a cost: `per_flop` and `per_byte`, and the share of the measured variance they
    explain."""

    per_flop: float
    per_byte: float
    explained: float
    residuals: tuple[float, ...] = field(
        default=(), repr=False
    )  # measured less fitted, as a share of what was measured

    @property
    def intensity(self) -> float:
        """The intensity that the machine shows: FLOPs in the time of a byte; infinite where FLOPs took no time."""
        return self.per_byte / self.per_flop if self.per_flop else float("inf")

    def seconds(self, found: Cost) -> float:
        """What a cost takes by this fit."""
        return self.per_flop * found.flops + self.per_byte * found.bytes


def fitted(costs: Sequence[Cost], seconds: Sequence[float], *, flops_only: bool = False) -> Fitted:
    """Fit seconds = a * FLOPs + b * bytes, neither negative, to the relative errors of measured times; `flops_only`
    leaves the bytes out.

    Raises ValueError for fewer than three measurements, or as many costs as there are not seconds.

    >>> costs = [Cost(linear=f, kv_bytes=b) for f, b in ((1, 0), (1, 4), (2, 2))]
    >>> found = fitted(costs, [1.0, 9.0, 6.0])
    >>> round(found.intensity, 6), round(found.explained, 6)
    (2.0, 1.0)
    """
    from scipy.optimize import nnls

    if len(costs) != len(seconds) or len(seconds) < 3:
        raise ValueError(f"seconds must be three or more, one a cost, got {len(seconds)} and {len(costs)} costs")
    times = np.array([checks.number("seconds", value, above=0) for value in seconds])
    columns = np.array([[one.flops, 0.0 if flops_only else one.bytes] for one in costs], float)
    scale = columns.max(0)
    scale[scale == 0] = 1.0
    found, _ = nnls(columns / scale / times[:, None], np.ones(len(times)))
    said = (columns / scale) @ found
    spread = float(((times - times.mean()) ** 2).sum())
    explained = 1 - float(((times - said) ** 2).sum()) / spread if spread else float("nan")
    a, b = cast(list[float], (found / scale).tolist())
    return Fitted(a, b, explained, tuple(((times - said) / times).tolist()))
