"""What a training step costs a microcontroller, counted from the instructions of its kernels. Modelled, never measured here.

A core issues one instruction a cycle; loops and addresses cost nothing inside (hardware loops, loads that move their pointer). What
the model leaves out: conflicts over memory banks, values that are waited for, transfers from slow memory, activations, pooling,
the loss, the update. It says what an idea can save at best; `efficiency` of a `Microcontroller` stands for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.reduced_precision_odl.layers import ReducedConv2d, ReducedLinear
from assay.methods.compression.reduced_precision_odl.numerics import DTYPES, Format, NumericsPolicy

Step = Literal["forward", "weight", "input"]
STEPS: tuple[Step, ...] = ("forward", "weight", "input")
UNROLLED = ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8))
"""Rows and columns of outputs that a kernel keeps in registers."""
REGISTERS = 28
"""Of 32, what a kernel has for sums and operands; our choice."""
AROUND_TILE = 6
"""Instructions a tile of outputs costs besides its sums and stores: pointers, setting the loop up; our choice."""


@dataclass(frozen=True)
class Microcontroller:
    """A cluster of small cores. The defaults are a RISC-V chip with eight workers; clock, power and `efficiency` are assumptions.

    `units`: floating-point units that the cores share; a register holds two 16-bit numbers. `fast_bytes`: the memory the cores work in.
    `efficiency`: the share of the modelled speed that is reached.
    """

    cores: int = 8
    units: int = 4
    hertz: float = 370e6
    watts: float = 0.05
    fast_bytes: int = 128 * 1024
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cores", "units", "fast_bytes"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("hertz", "watts"):
            checks.number(name, getattr(self, name), above=0)
        checks.number("efficiency", self.efficiency, above=0, high=1)


@dataclass(frozen=True)
class LayerShape:
    """A convolution (a linear layer is one of a 1 x 1 kernel on one place) and the sizes it met for one sample."""

    name: str
    inputs: int
    outputs: int
    groups: int
    kernel: int  # values of a channel's kernel: height times width
    places_in: int
    places: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass; 1 MAC = 2 operations."""
        return self.places * self.outputs * (self.inputs // self.groups) * self.kernel

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs // self.groups) * self.kernel

    def product(self, step: Step) -> tuple[int, int, int]:
        """Rows, columns and terms of the matrix product of one group."""
        inputs, outputs = self.inputs // self.groups, self.outputs // self.groups
        if step == "forward":
            return outputs, self.places, inputs * self.kernel
        if step == "weight":
            return outputs, inputs * self.kernel, self.places
        return inputs, self.places_in, outputs * self.kernel

    def copied(self, step: Step) -> int:
        """Values that im2col and the block transpose of the weights copy."""
        if self.kernel == 1 and self.places_in == self.places:
            return 0
        if step == "input":
            return self.outputs * self.kernel * self.places_in + self.weights
        return self.inputs * self.kernel * self.places


def layer_shapes(model: nn.Module, x: Tensor) -> list[LayerShape]:
    """The linear layers and convolutions of `model` in the order in which `x` (a batch of one) meets them.

    Raises ValueError for another batch, and for a model that meets none.

    >>> [shape.macs for shape in layer_shapes(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4))]
    [144, 32]
    """
    checks.tensor("x", x)
    if x.ndim < 2 or len(x) != 1:
        raise ValueError(f"x must be a batch of one sample, got shape {tuple(x.shape)}")
    found: list[LayerShape] = []

    def hook(name: str) -> Any:
        def look(layer: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            weight = layer.weight
            groups = layer.groups if weight.ndim == 4 else 1
            before, after = (math.prod(t.shape[2:] if weight.ndim == 4 else t.shape[:-1]) for t in (given[0], out))
            kernel = math.prod(weight.shape[2:])  # 1 for a linear layer
            found.append(LayerShape(name, weight.shape[1] * groups, weight.shape[0], groups, kernel, before, after))

        return look

    kinds = (nn.Linear, nn.Conv2d, ReducedLinear, ReducedConv2d)
    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"model must meet a linear layer or a convolution, got {type(model).__name__} without one")
    return found


def training_macs(shapes: Sequence[LayerShape]) -> int:
    """MACs of a step: forward, weight gradient and input gradient alike, but for the first layer's input gradient, which nobody needs.

    >>> training_macs([LayerShape("a", 2, 3, 1, 1, 1, 1), LayerShape("b", 3, 4, 1, 1, 1, 1)])  # 3 * (6 + 12) - 6
    48
    """
    return 3 * sum(shape.macs for shape in shapes) - shapes[0].macs


def _tile(rows: int, columns: int, terms: int, sixteen: bool, pairs: bool) -> tuple[int, int] | None:
    """Instructions, and those of them on the floating-point unit, of a tile of outputs; None where it lacks registers."""
    outputs = rows * columns
    if not sixteen:
        sums, iterations, loads, shuffles, products, ending = outputs, terms, rows + columns, 0, outputs, 0
        stores = outputs
    elif pairs:  # two terms at a time into two partial sums an output
        sums, iterations, loads, shuffles, products = outputs, -(-terms // 2), rows + columns, 0, outputs
        ending, stores = outputs, -(-outputs // 2)  # the two halves are added
    else:  # two outputs at a time; two terms of the first operand are loaded together and spread
        vectors = -(-columns // 2)
        sums, iterations, loads = rows * vectors, -(-terms // 2), rows + 2 * vectors
        shuffles, products, ending, stores = 2 * rows, 2 * rows * vectors, 0, rows * vectors
    if sums + rows + columns > REGISTERS:
        return None
    floating = iterations * products + ending
    return iterations * (loads + shuffles + products) + ending + stores + AROUND_TILE, floating


def _spreads(rows: int, columns: int, groups: int, cores: int) -> Iterator[tuple[int, int, int, int]]:
    """Ways to share a product among cores: rows, columns and groups of the busiest core, and how many cores work."""
    for which, size in enumerate((rows, columns, groups)):
        each = -(-size // cores)
        own = [rows, columns, groups]
        own[which] = each
        yield own[0], own[1], own[2], -(-size // each)


def product_cycles(
    rows: int, columns: int, terms: int, groups: int, format: Format, chip: Microcontroller
) -> tuple[float, str]:
    """Cycles of `groups` products by the fastest kernel, and its name, e.g. "pairs 2x4": the choice that the paper makes by trying.

    A 16-bit kernel does two multiplications an instruction; which of them is chosen decides the order of the sums too.
    """
    checks.choice("format", format, DTYPES)
    sixteen = format != "float32"
    kernels = [("sequence", False), ("pairs", True)] if sixteen else [("sequence", False)]
    found: list[tuple[float, str]] = []
    for own_rows, own_columns, own_groups, working in _spreads(rows, columns, groups, chip.cores):
        for name, pairs in kernels:
            for high, wide in UNROLLED:
                tile = _tile(high, wide, terms, sixteen, pairs)
                if tile is None:
                    continue
                tiles = -(-own_rows // high) * -(-own_columns // wide) * own_groups
                shared = max(1.0, working / chip.units)  # cores that wait for one unit
                found.append((tiles * max(tile[0], tile[1] * shared), f"{name} {high}x{wide}"))
    return min(found)


def step_cycles(shape: LayerShape, step: Step, format: Format, chip: Microcontroller) -> float:
    """Cycles of one layer's part of a training step: the products, and the copies before them (a load and a store a value, our choice).

    The input gradient of a strided convolution multiplies the zeros between as well, as the library does.
    """
    checks.choice("step", step, STEPS)
    products, _ = product_cycles(*shape.product(step), shape.groups, format, chip)
    return (products + 2 * -(-shape.copied(step) // chip.cores)) / chip.efficiency


@dataclass(frozen=True)
class StepCost:
    """A training step of one sample: useful MACs, modelled cycles, seconds and joules, and the cycles of every layer."""

    macs: int
    cycles: float
    seconds: float
    joules: float
    layers: dict[str, float]

    @property
    def macs_a_cycle(self) -> float:
        return self.macs / self.cycles


def training_step(shapes: Sequence[LayerShape], format: Format, chip: Microcontroller | None = None) -> StepCost:
    """What a step of a network costs; the first layer's input gradient is left out.

    >>> shapes = [LayerShape("conv", 16, 16, 1, 9, 256, 256)]
    >>> training_step(shapes, "float16").cycles < training_step(shapes, "float32").cycles
    True
    """
    chip = chip or Microcontroller()
    layers: dict[str, float] = {}
    for i, shape in enumerate(shapes):
        steps = STEPS if i else STEPS[:2]
        layers[shape.name] = layers.get(shape.name, 0.0) + sum(step_cycles(shape, s, format, chip) for s in steps)
    cycles = sum(layers.values())
    seconds = cycles / chip.hertz
    return StepCost(training_macs(shapes), cycles, seconds, seconds * chip.watts, layers)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step: weights with what the update keeps, their gradients, all layers' inputs, two gradients of activations
    (one is read, one written), and the largest im2col buffer, which is used again and again."""

    weights: int
    gradients: int
    activations: int
    passed_back: int
    buffer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.activations + self.passed_back + self.buffer


def training_memory(shapes: Sequence[LayerShape], policy: NumericsPolicy) -> StepMemory:
    """The memory of a step at batch 1, without biases. In 16 bits it is half of float32's, unless the update keeps more.

    >>> shapes = [LayerShape("conv", 16, 16, 1, 9, 256, 256)]
    >>> halved, whole = (training_memory(shapes, NumericsPolicy(f)).total for f in ("float16", "float32"))
    >>> whole / halved
    2.0
    """
    size, weights = policy.dtype.itemsize, sum(shape.weights for shape in shapes)
    activations = sum(shape.inputs * shape.places_in for shape in shapes)
    return StepMemory(
        weights * policy.weight_bytes,
        weights * size,
        activations * size,
        size * max(shape.inputs * shape.places_in + shape.outputs * shape.places for shape in shapes),
        size * max(shape.copied(step) for shape in shapes for step in STEPS),
    )


def fits(shapes: Sequence[LayerShape], policy: NumericsPolicy, chip: Microcontroller | None = None) -> bool:
    """Whether a whole step lies in the fast memory at once."""
    return training_memory(shapes, policy).total <= (chip or Microcontroller()).fast_bytes
