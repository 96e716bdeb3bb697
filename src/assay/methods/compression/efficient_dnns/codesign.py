"""Co-design of network and accelerator: only 1x1 convolutions, shifts, pooling and concatenation, one-bit weights, four-bit activations.

Yang et al., "Synetgy" (arXiv 1811.08634), a chapter of the thesis: a ShuffleNetV2 whose depthwise convolutions are replaced until an
accelerator needs one kind of unit only. On a processor few-bit numbers save memory and no time: here they are rounded and stay floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from assay import checks
from assay.methods.compression.efficient_dnns.nets import Net, conv_bn
from assay.methods.compression.efficient_dnns.shift import Shift2d
from assay.methods.compression.efficient_dnns.tables import CostTable
from assay.methods.core.sparsity.straight_through import straight_through

Mixer = Literal["shift", "depthwise", "average", "none"]
"""What mixes neighbouring pixels: the paper's shift, a depthwise 3x3 convolution, a mean over 3x3 pixels, or nothing."""


def mixer(kind: Mixer, channels: int, stride: int = 1) -> nn.Module:
    """A layer that mixes neighbours within each channel; at stride 2 all but "depthwise" are followed by 2x2 max pooling."""
    checks.choice("kind", kind, get_args(Mixer))
    if kind == "depthwise":
        return conv_bn(channels, channels, 3, stride=stride, padding=1, groups=channels, relu=False)
    mix: nn.Module = nn.Identity()
    if kind == "shift":
        mix = Shift2d(channels)
    elif kind == "average":
        mix = nn.AvgPool2d(3, 1, padding=1)
    return mix if stride == 1 else nn.Sequential(mix, nn.MaxPool2d(stride))


class DiracUnit(nn.Module):
    """A unit of DiracDeltaNet. At stride 1 half of the channels pass, and half go through 1x1, BN, ReLU, shift, 1x1, BN, ReLU.

    At stride 2 all channels go both ways, and what passes is pooled and brought to half of the outputs by a 1x1 convolution. Both
    halves are concatenated, and channels from both sides come to stand next to each other. Raises ValueError for an odd number of
    outputs, and at stride 1 unless inputs equal outputs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, mix: Mixer = "shift") -> None:
        super().__init__()
        checks.choice("stride", stride, (1, 2))
        if checks.whole("outputs", outputs, low=2) % 2 or (stride == 1 and inputs != outputs):
            raise ValueError(f"outputs must be even, and at stride 1 as many as inputs ({inputs}), got {outputs}")
        half = outputs // 2
        self.stride = stride
        taken = half if stride == 1 else inputs
        self.branch = nn.Sequential(conv_bn(taken, half), mixer(mix, half, stride), conv_bn(half, half))
        self.passed = nn.Identity() if stride == 1 else nn.Sequential(mixer(mix, inputs, stride), conv_bn(inputs, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, taken = x.chunk(2, 1) if self.stride == 1 else (x, x)
        out = torch.stack([self.passed(kept), self.branch(taken)], 2)  # (B, half, 2, h, w): side by side
        return out.flatten(1, 2)


def dirac_net(
    depths: Sequence[int] = (4, 8, 4),
    widths: Sequence[int] = (24, 128, 256, 512),
    *,
    last: int = 1024,
    mix: Mixer = "shift",
    pool_stem: bool = True,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Net:
    """A DiracDeltaNet: a stem of 1x1, `mix`, 1x1, then stages of units of which the first halves the map, a 1x1 to `last`, a classifier.

    `widths` has the stem's and one a stage. `pool_stem` halves the map twice in the stem, as for large images. With `mix="depthwise"`
    it is the network before the co-design, ShuffleNetV2's units. Depths and widths are those of ShuffleNetV2 1.0x but for widths
    that are round numbers (our choice). Raises ValueError unless there is one width more than depths.
    """
    if len(widths) != len(depths) + 1 or not depths:
        raise ValueError(f"widths must be one more than depths, got {list(widths)} and {list(depths)}")
    stem = checks.whole("widths", widths[0], low=1)
    stride = 2 if checks.flag("pool_stem", pool_stem) else 1
    layers: list[nn.Module] = [
        conv_bn(checks.whole("in_chans", in_chans, low=1), stem),
        mixer(mix, stem, stride),
        conv_bn(stem, stem),
        *([nn.MaxPool2d(2)] if pool_stem else []),
    ]
    for depth, inputs, outputs in zip(depths, widths, widths[1:], strict=False):
        layers.append(DiracUnit(inputs, outputs, 2, mix=mix))
        layers += [DiracUnit(outputs, outputs, mix=mix) for _ in range(checks.whole("depths", depth, low=1) - 1)]
    return Net([*layers, conv_bn(widths[-1], checks.whole("last", last, low=1))], last, num_classes)


# ------------------------------------------------------------------------------------------------------------------ few bits


class FewBits(nn.Module):
    """A weight in `bits` bits, one scale a row (output), as a parametrisation: gradients reach the weight as if nothing was rounded.

    One bit: the sign times the mean magnitude of the row (0 counts as positive). More: the nearest of 2^bits - 1 steps that are
    symmetric about 0 and reach the row's largest magnitude.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = checks.whole("bits", bits, low=1, high=16)

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.detach().flatten(1)
        shape = (-1, *[1] * (weight.ndim - 1))
        if self.bits == 1:
            scale = rows.abs().mean(1).view(shape)
            return straight_through(weight, torch.where(weight >= 0, scale, -scale))
        levels = 2 ** (self.bits - 1) - 1
        step = (rows.abs().amax(1) / levels).view(shape)
        step = torch.where(step > 0, step, torch.ones_like(step))
        return straight_through(weight, (weight / step).round() * step)


class RoundedReLU(nn.Module):
    """ReLU cut at a learnt limit and rounded to 2^bits values (PACT): max(0, min(x, limit)) in equal steps, straight-through.

    The limit starts at `limit`, gets the gradient of all that it cuts, and is held above 1e-3.
    """

    def __init__(self, bits: int = 4, limit: float = 4.0) -> None:
        super().__init__()
        self.bits = checks.whole("bits", bits, low=1, high=16)
        self.limit = nn.Parameter(torch.tensor(checks.number("limit", limit, above=0)))

    def forward(self, x: Tensor) -> Tensor:
        limit = self.limit.clamp(min=1e-3)
        cut = torch.minimum(torch.relu(x), limit)
        step = limit.detach() / (2**self.bits - 1)
        return straight_through(cut, (cut / step).round() * step)


def with_bits(model: nn.Module, *, weights: int = 1, activations: int | None = 4) -> nn.Module:
    """`model` itself, its 1x1 convolutions' weights in `weights` bits, its `nn.ReLU` modules rounded to `activations` bits (None: left).

    In place. The first convolution keeps its weights, as is usual for the one that sees the image; the classifier is a linear layer
    and keeps them too. A ReLU that is no module (`F.relu`) is not reached. What remains to be trained is the model's own parameters and a
    limit a ReLU. Raises ValueError for a model without other 1x1 convolutions or without the modules to be rounded, and for one that
    has few bits already.
    """
    rounding = FewBits(weights)
    if activations is not None:
        checks.whole("activations", activations, low=1, high=16)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    chosen = [module for module in convolutions[1:] if module.kernel_size == (1, 1)]
    if not chosen:
        raise ValueError("model must have 1x1 convolutions behind its first one, found none")
    if any(parametrize.is_parametrized(module, "weight") for module in chosen):
        raise ValueError("model must not have parametrised weights: it has few bits already")
    if activations is not None and not any(type(module) is nn.ReLU for module in model.modules()):
        raise ValueError("model must have nn.ReLU modules where activations are to be rounded, found none")
    for module in chosen:
        parametrize.register_parametrization(module, "weight", rounding)
        module.get_submodule("parametrizations").train(module.training)
    if activations is not None:
        like = chosen[0].weight
        _replace(model, nn.ReLU, lambda: RoundedReLU(activations).to(like))
    return model


def _replace(model: nn.Module, kind: type[nn.Module], make: Callable[[], nn.Module]) -> None:
    for name, child in list(model.named_children()):
        if type(child) is kind:
            setattr(model, name, make().train(child.training))
        else:
            _replace(child, kind, make)


def bits_table(params: Sequence[int], bits: Sequence[int] = (2, 4, 8), *, unit: str = "bytes") -> CostTable:
    """The cost table of a choice of bit widths: a layer of so many parameters takes params * bits, in "bytes" or "bits".

    >>> bits_table([800, 80], (4, 8)).cost(("4", "8"))
    480.0
    """
    checks.choice("unit", unit, ("bytes", "bits"))
    each = 8 if unit == "bytes" else 1
    sizes = [checks.whole("params", size, low=1) for size in params]
    widths = [checks.whole("bits", width, low=1) for width in bits]
    return CostTable(unit, tuple({str(width): size * width / each for width in widths} for size in sizes))
