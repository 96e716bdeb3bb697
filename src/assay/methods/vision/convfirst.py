"""ConvFirst blocks, their operational intensity, and block fusion: computing a residual block one tile at a time.

Lavin, "On the Efficiency of Convolutional Neural Networks" (2024). Degenerate convolutions (depthwise, grouped, bottleneck)
move many bytes for few operations, so when run layer by layer they wait for memory. ConvFirst puts the spatial convolution (group
width 8) first, like ConvNeXt, so that a whole block can be computed tile by tile without redoing work: the wide hidden tensor then
lives in a cache and never reaches memory.

    model = fuse_blocks(model.eval())          # ConvFirst, FusedMBConv, MBConv, ConvNeXt blocks (also transformers' ConvNext)
    report = efficiency_report(model, image, device)

The general efficiency arithmetic (efficiency, gap, roofline, waterline) is in `assay.measure.roofline`. 1 MAC = 2 operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.cost import count_cost
from assay.measure.machine import calibrate, last_cache_bytes
from assay.measure.roofline import (
    Bar,
    DeviceSpec,
    Layer,
    attainable_network_efficiency,
    attainable_seconds,
    device_of,
    network_efficiency,
    waterline,
)

BlockKind = Literal["convfirst", "fused_mbconv", "mbconv", "convnext"]
TILES = (8, 16, 24, 32, 48, 64, 96, 128)


# --- operational intensity (operations per byte; weights negligible, each tensor moved once) -------------------------------


def grouped_conv_intensity(kernel: int, group_width: int, *, element_bytes: int = 2) -> float:
    """k x k grouped convolution with as many outputs as inputs: k^2 g / element_bytes (fp16: k^2 g / 2; depthwise: g = 1)."""
    _at_least_one(kernel=kernel, group_width=group_width, element_bytes=element_bytes)
    return kernel * kernel * group_width / element_bytes


def conv_intensity(channels_in: int, channels_out: int, kernel: int = 1, *, element_bytes: int = 2) -> float:
    """Full k x k convolution C -> K: 2 k^2 C K / ((C + K) element_bytes) (fp16: k^2 C K / (C + K)); pointwise for k = 1."""
    _at_least_one(channels_in=channels_in, channels_out=channels_out, kernel=kernel, element_bytes=element_bytes)
    return 2 * kernel**2 * channels_in * channels_out / ((channels_in + channels_out) * element_bytes)


def block_macs_per_pixel(channels: int, expand: int, kernel: int = 3, group_width: int = 8) -> int:
    """MACs of a ConvFirst block for each pixel: k^2 g C + 2 e C^2."""
    _at_least_one(channels=channels, expand=expand, kernel=kernel, group_width=group_width)
    return kernel**2 * group_width * channels + 2 * expand * channels**2


def block_traffic_per_pixel(channels: int, expand: int, *, fused: bool, element_bytes: int = 2) -> int:
    """Bytes a ConvFirst block moves for each pixel (activations folded into the convolutions).

    Layer by layer: 2C for the grouped convolution, C + eC to expand, eC + 2C to project and add. Fused: read once, write once.
    """
    _at_least_one(channels=channels, expand=expand, element_bytes=element_bytes)
    elements = 2 * channels if fused else 5 * channels + 2 * expand * channels
    return elements * element_bytes


def block_intensity(
    channels: int, expand: int, kernel: int = 3, group_width: int = 8, *, fused: bool, element_bytes: int = 2
) -> float:
    """Operational intensity of a ConvFirst block; fused and in fp16 it is k^2 g / 2 + e C, halos aside.

    >>> layerwise, fused = (block_intensity(64, 6, fused=f) for f in (False, True))
    >>> fused > 3 * layerwise
    True
    """
    macs = block_macs_per_pixel(channels, expand, kernel, group_width)
    return 2 * macs / block_traffic_per_pixel(channels, expand, fused=fused, element_bytes=element_bytes)


# --- the planner (the paper's "tensor machine"; its details are not published, this form is ours) --------------------------


@dataclass(frozen=True)
class TilePlan:
    """How to compute a block tile by tile. Bytes and operations are per output pixel unless said otherwise.

    `workspace_bytes`: what must stay on the chip for one tile. `halo`: ((t + k - 1) / t)^2, the input read for each pixel of
    output; `recompute`: operations done over operations needed (above 1 only for work before the spatial convolution).
    `intensity`: operations done per byte moved. `attainable`: share of the peak rate that useful operations can reach.
    """

    tile: int
    slice_channels: int
    workspace_bytes: int
    halo: float
    recompute: float
    intensity: float
    attainable: float


def plan_tile(
    channels: int,
    expand: int,
    device: DeviceSpec,
    *,
    kernel: int = 3,
    group_width: int = 8,
    element_bytes: int = 2,
    block: BlockKind = "convfirst",
    slice_channels: int | None = None,
    tiles: Sequence[int] = TILES,
) -> TilePlan:
    """The tile with the highest attainable share of the peak whose workspace fits `device.sram_bytes`; the largest of equals.

    `slice_channels`: hidden channels expanded at a time (None: all e C at once); only ConvFirst and ConvNeXt, whose hidden
    tensor is not convolved, can be sliced. Raises ValueError for arguments below 1, slices of another block, or when even the
    smallest tile does not fit.
    """
    if not len(tiles):
        raise ValueError("tiles must hold at least one size, got none")
    plans = [
        tile_plan(tile, channels, expand, device, kernel, group_width, element_bytes, block, slice_channels)
        for tile in sorted(tiles)
    ]
    fitting = [plan for plan in plans if plan.workspace_bytes <= device.sram_bytes]
    if not fitting:
        least = min(plan.workspace_bytes for plan in plans)
        raise ValueError(
            f"device.sram_bytes must hold a tile: the smallest needs {least} bytes, got {device.sram_bytes}"
        )
    return max(fitting, key=lambda plan: (round(plan.attainable, 6), plan.tile))


def tile_plan(
    tile: int,
    channels: int,
    expand: int,
    device: DeviceSpec,
    kernel: int = 3,
    group_width: int = 8,
    element_bytes: int = 2,
    block: BlockKind = "convfirst",
    slice_channels: int | None = None,
) -> TilePlan:
    """Workspace, overheads and intensity of one tile size; arguments and errors as for `plan_tile`."""
    _at_least_one(
        tile=tile, channels=channels, expand=expand, kernel=kernel, group_width=group_width, element_bytes=element_bytes
    )
    hidden = expand * channels
    width = hidden if slice_channels is None else checks.whole("slice_channels", slice_channels)
    if block not in ("convfirst", "fused_mbconv", "mbconv", "convnext"):
        raise ValueError(f"block must be convfirst, fused_mbconv, mbconv or convnext, got {block!r}")
    if not 1 <= width <= hidden or (width != hidden and block not in ("convfirst", "convnext")):
        raise ValueError(f"slice_channels must lie in 1..{hidden} (and be {hidden} for {block}), got {slice_channels}")
    halo = ((tile + kernel - 1) / tile) ** 2
    padded, inner = (tile + kernel - 1) ** 2, tile**2
    group = 1 if block == "convnext" else group_width
    spatial = kernel**2 * {"mbconv": group * hidden, "fused_mbconv": channels * hidden}.get(block, group * channels)
    pointwise = {"mbconv": channels * hidden, "fused_mbconv": channels * hidden}.get(block, 2 * channels * hidden)
    before = channels * hidden if block == "mbconv" else 0  # done on the halo too
    needed = 2 * (spatial + pointwise + before)
    done = 2 * (spatial + pointwise + before * halo)
    # input tile, output tile and the hidden tensor between them (for MBConv before and after its convolution)
    between = {"mbconv": (padded + inner) * hidden, "fused_mbconv": inner * hidden}.get(
        block, inner * (channels + width)
    )
    workspace = (padded * channels + inner * channels + between) * element_bytes
    moved = (halo * channels + channels) * element_bytes
    reach = needed / device.peak / attainable_seconds(done, moved, device)
    return TilePlan(tile, width, workspace, halo, done / needed, done / moved, reach)


# --- blocks ----------------------------------------------------------------------------------------------------------------


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        checks.whole(name, value, low=1)


def _grouped(channels: int, group_width: int) -> int:
    if channels % group_width:
        raise ValueError(f"channels must be a multiple of group_width {group_width}, got {channels}")
    return channels // group_width


def _kernel(kernel: int) -> int:
    if checks.whole("kernel", kernel, low=1) % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, got {kernel}")
    return kernel


class ConvFirst(nn.Module):
    """The paper's block: grouped conv, BN, expand 1x1, BN, SiLU, project 1x1, BN, plus the input. (B, C, H, W) to the same.

    No convolution has a bias. Parameters: k^2 g C + 2C + 2 e C^2 + 2 e C + 2C. Raises ValueError when `channels` is not a multiple of
    `group_width` (8: the accumulation depth of half-precision tensor-core instructions) or `kernel` is even.
    """

    def __init__(self, channels: int, expand: int = 6, kernel: int = 3, group_width: int = 8) -> None:
        super().__init__()
        _at_least_one(channels=channels, expand=expand, group_width=group_width)
        groups, hidden = _grouped(channels, group_width), expand * channels
        self.conv = nn.Conv2d(channels, channels, _kernel(kernel), padding=kernel // 2, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm2(self.expand(self.norm1(self.conv(x)))))
        out: Tensor = x + self.norm3(self.project(hidden))
        return out


class MBConv(nn.Module):
    """The inverted bottleneck: expand 1x1, BN, SiLU, grouped conv, BN, SiLU, project 1x1, BN, plus the input. For comparison.

    `group_width` 1 is the usual depthwise form. No squeeze-and-excitation: its global mean would forbid fusing the block.
    """

    def __init__(self, channels: int, expand: int = 4, kernel: int = 3, group_width: int = 1) -> None:
        super().__init__()
        _at_least_one(channels=channels, expand=expand, group_width=group_width)
        hidden = expand * channels
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv = nn.Conv2d(
            hidden, hidden, _kernel(kernel), padding=kernel // 2, groups=_grouped(hidden, group_width), bias=False
        )
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm2(self.conv(self.act(self.norm1(self.expand(x))))))
        out: Tensor = x + self.norm3(self.project(hidden))
        return out


class FusedMBConv(nn.Module):
    """Full k x k conv to the hidden channels, BN, SiLU, project 1x1, BN, plus the input."""

    def __init__(self, channels: int, expand: int = 4, kernel: int = 3) -> None:
        super().__init__()
        _at_least_one(channels=channels, expand=expand)
        self.conv = nn.Conv2d(channels, expand * channels, _kernel(kernel), padding=kernel // 2, bias=False)
        self.norm1 = nn.BatchNorm2d(expand * channels)
        self.act = nn.SiLU()
        self.project = nn.Conv2d(expand * channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm2(self.project(self.act(self.norm1(self.conv(x)))))
        return out


class ConvNeXt(nn.Module):
    """The baseline: depthwise k x k conv, LayerNorm over channels, expand, GELU, project, layer scale, plus the input."""

    def __init__(self, channels: int, expand: int = 4, kernel: int = 7, layer_scale: float = 1e-6) -> None:
        super().__init__()
        _at_least_one(channels=channels, expand=expand)
        self.conv = nn.Conv2d(channels, channels, _kernel(kernel), padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, expand * channels)
        self.act = nn.GELU()
        self.project = nn.Linear(expand * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), checks.number("layer_scale", layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(self.act(self.expand(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class ConvNet(nn.Sequential):
    """A plain pyramid of one kind of block: 4 x 4 patch stem, stages joined by 2 x 2 strided convolutions, mean, linear head.

    `block(channels)` makes a block. The paper's own network is not published; this layout is ours, for comparing blocks.
    Raises ValueError unless `channels`, of at least 1, and `depths`, of at least 0, pair up.
    """

    def __init__(
        self, block: Callable[[int], nn.Module], channels: Sequence[int], depths: Sequence[int], classes: int = 1000
    ) -> None:
        if not channels or len(channels) != len(depths):
            raise ValueError(f"channels and depths must pair up, got {list(channels)} and {list(depths)}")
        channels = [checks.whole("channels", width, low=1) for width in channels]
        depths = [checks.whole("depths", depth, low=0) for depth in depths]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=4)]
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if stage:
                layers += [nn.BatchNorm2d(channels[stage - 1]), nn.Conv2d(channels[stage - 1], width, 2, stride=2)]
            layers += [block(width) for _ in range(depth)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


# --- tiled execution -------------------------------------------------------------------------------------------------------


Stage = Callable[[Tensor], Tensor]  # on rows: (pixels, channels in) to (pixels, channels out)
_ANY = DeviceSpec("any", 1.0, 1.0)  # for a workspace, which depends on no device


class DepthFirst(nn.Module):
    """A residual block computed tile by tile: `after(conv(before(x))) + x`, with only one tile of the middle alive at a time.

    `before` and `after` map pixels, given as rows: (pixels, channels in) to (pixels, channels out). Pixels outside the image are
    never given to `before`: the halo there is zero after it, which is what the block's own padding gives (a bias would otherwise
    leak in). For inference. `hidden` is the width of the middle, for the planner. Weights may change between calls.
    """

    def __init__(
        self, kind: BlockKind, before: nn.Module | None, conv: nn.Conv2d, after: nn.Module, hidden: int
    ) -> None:
        super().__init__()
        self.kind, self.before, self.conv, self.after, self.hidden = kind, before, conv, after, hidden
        self.tile = TILES[0]
        self.sram_bytes = 0  # for one tile of as many images as it holds; 0: of one image

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and memory format. Extra memory depends neither on B nor on H and W.

        Raises ValueError for an x of other than four dimensions or another number of channels, TypeError for another dtype than
        the block's, RuntimeError where gradients are wanted.
        """
        width = _width(self.after)
        checks.tensor("x", x, shape=("batch", width, "height", "width"), dtype=self.conv.weight.dtype, empty=True)
        if torch.is_grad_enabled() and (x.requires_grad or self.conv.weight.requires_grad):
            raise RuntimeError("a fused block is for inference: run it under torch.no_grad() or torch.inference_mode()")
        out = torch.empty_like(x)
        if not x.numel():
            return out
        before = None if self.before is None else _packed(self.before)
        after = _packed(self.after)
        together = self.images_together(x)
        for first in range(0, x.shape[0], together):
            images, done = x[first : first + together], out[first : first + together]
            self._run(images, done, before, after)
        return out

    def _run(self, x: Tensor, out: Tensor, before: Stage | None, after: Stage) -> None:
        reach = self.conv.kernel_size[0] // 2
        weight, bias, groups = self.conv.weight, self.conv.bias, self.conv.groups
        for rows, padded_rows, pad_rows in _spans(x.shape[2], self.tile, reach):
            for columns, padded_columns, pad_columns in _spans(x.shape[3], self.tile, reach):
                part = x[:, :, padded_rows, padded_columns].contiguous(memory_format=torch.channels_last)
                if before is not None:
                    part = _by_pixel(before, part)
                if any(pad_rows + pad_columns):
                    part = F.pad(part, pad_columns + pad_rows)
                part = _by_pixel(after, F.conv2d(part, weight, bias, groups=groups))
                torch.add(part, x[:, :, rows, columns], out=out[:, :, rows, columns])

    def images_together(self, x: Tensor) -> int:
        """How many images of (B, C, H, W) share a tile: as many as fit the memory the tile was planned for, at least one."""
        side = max(min(self.tile, x.shape[2]), min(self.tile, x.shape[3]))
        workspace = tile_plan(side, **self._shape(), device=_ANY).workspace_bytes
        return min(max(self.sram_bytes // workspace, 1), x.shape[0])

    def fit(self, device: DeviceSpec) -> None:
        """Use the planner's tile for the chip's memory, or the smallest one if none fits (it spills least)."""
        self.sram_bytes = device.sram_bytes
        try:
            self.tile = plan_tile(**self._shape(), device=device).tile
        except ValueError:
            self.tile = TILES[0]

    def _shape(self) -> dict[str, Any]:
        """This block as arguments of the planner."""
        channels = _width(self.after)
        return {
            "channels": channels,
            "expand": max(self.hidden // channels, 1),
            "kernel": self.conv.kernel_size[0],
            "group_width": self.conv.in_channels // self.conv.groups,
            "element_bytes": self.conv.weight.element_size(),
            "block": self.kind,
        }

    def extra_repr(self) -> str:
        return f"{self.kind}, tile={self.tile}"


def _spans(size: int, tile: int, reach: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Output span, input span inside the image, and the missing halo on both sides; as few spans as `tile` allows, of similar size."""
    tile = -(-size // -(-size // tile))
    for start in range(0, size, tile):
        end = min(start + tile, size)
        first, last = max(start - reach, 0), min(end + reach, size)
        yield slice(start, end), slice(first, last), (first - (start - reach), end + reach - last)


def _by_pixel(stage: Stage, part: Tensor) -> Tensor:
    """`stage` on the pixels of a channels-last tile as rows: views both ways, no copies."""
    batch, _, height, width = part.shape
    rows: Tensor = stage(part.permute(0, 2, 3, 1).reshape(batch * height * width, -1))
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


class PackedLinear(nn.Module):
    """`act(x W^T + b)` on (rows, in) for inference, with the weight packed for oneDNN on the CPU and the activation fused.

    oneDNN uses the widest instructions of the processor; torch's own product of unpacked float32 weights does not always
    (twice as slow on an AVX-512 AMD processor). `pack` returns a layer with the current weights packed: code that runs many tiles
    packs once before the first one, and the next run sees weights that have changed since. `act`: "none", "swish" or "gelu".
    Elsewhere (GPU, other dtypes, no oneDNN, inside torch.compile, which packs by itself) and on empty input the plain product
    runs. Rounding may differ from it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, act: Literal["none", "swish", "gelu"] = "none") -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().reshape(weight.shape[0], -1).contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.act = checks.choice("act", act, ("none", "swish", "gelu"))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        return self.pack()(x)

    def pack(self) -> Stage:
        """This layer with its weights as they are now, for many calls."""
        if torch.compiler.is_compiling() or not self._packs():
            return self._plain
        with torch.no_grad():
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)

        def product(x: Tensor) -> Tensor:
            if not x.numel():
                return self._plain(x)
            done: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, self.act, [], "none")
            return done

        return product

    def _plain(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return F.silu(out, inplace=True) if self.act == "swish" else F.gelu(out) if self.act == "gelu" else out

    def _packs(self) -> bool:
        dtype = self.weight.dtype
        wide = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and wide

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, act={self.act}"


def _packed(stage: nn.Module) -> Stage:
    """`stage` with all its weights packed as they are now."""
    parts = [_packed(part) for part in stage] if isinstance(stage, nn.Sequential) else []
    if isinstance(stage, PackedLinear):
        return stage.pack()
    if not parts:
        return stage
    return lambda rows: functools.reduce(lambda x, part: part(x), parts, rows)


class _SiLU(nn.Module):
    """SiLU in place, on a tensor that nothing else holds."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=True)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that computes `conv` followed by `norm` in eval mode. Raises ValueError while `norm` is training."""
    if norm.training or norm.running_mean is None:
        raise ValueError("norm must be in eval mode with running statistics: batch statistics need the whole tensor")
    return nn.utils.fuse_conv_bn_eval(conv, norm)


def _pointwise(conv: nn.Conv2d, norm: nn.BatchNorm2d, act: Literal["none", "swish"] = "none") -> PackedLinear:
    """A 1 x 1 convolution with its norm and activation, on rows."""
    folded = fold(conv, norm)
    return PackedLinear(folded.weight, folded.bias, act)


def _width(after: nn.Module) -> int:
    """Channels a sequence of stages gives out."""
    return [m for m in after.modules() if isinstance(m, PackedLinear)][-1].weight.shape[0]


def _convfirst(block: ConvFirst) -> DepthFirst:
    expand = _pointwise(block.expand, block.norm2, "swish")
    after = nn.Sequential(expand, _pointwise(block.project, block.norm3))
    return DepthFirst("convfirst", None, fold(block.conv, block.norm1), after, block.expand.out_channels)


def _mbconv(block: MBConv) -> DepthFirst:
    after = nn.Sequential(_SiLU(), _pointwise(block.project, block.norm3))
    before = _pointwise(block.expand, block.norm1, "swish")
    return DepthFirst("mbconv", before, fold(block.conv, block.norm2), after, block.expand.out_channels)


def _fused_mbconv(block: FusedMBConv) -> DepthFirst:
    after = nn.Sequential(_SiLU(), _pointwise(block.project, block.norm2))
    return DepthFirst("fused_mbconv", None, fold(block.conv, block.norm1), after, block.conv.out_channels)


def _convnext(block: ConvNeXt) -> DepthFirst:
    expand = PackedLinear(block.expand.weight, block.expand.bias, "gelu")
    after = nn.Sequential(block.norm, expand, _scaled(block.project, block.scale))
    return DepthFirst("convnext", None, block.conv, after, block.expand.out_features)


def _transformers_convnext(block: Any) -> DepthFirst:
    """`ConvNextLayer` of transformers; its stochastic depth does nothing in eval mode."""
    expand = PackedLinear(block.pwconv1.weight, block.pwconv1.bias)
    after = nn.Sequential(block.layernorm, expand, block.act, _scaled(block.pwconv2, block.layer_scale_parameter))
    return DepthFirst("convnext", None, block.dwconv, after, block.pwconv1.out_features)


def _scaled(project: nn.Linear, scale: Tensor | None) -> PackedLinear:
    """`scale * project(x)` as one product."""
    if scale is None:
        return PackedLinear(project.weight, project.bias)
    return PackedLinear(project.weight * scale[:, None], project.bias * scale)


_FUSERS: dict[str, Callable[[Any], DepthFirst]] = {
    f"{__name__}.ConvFirst": _convfirst,
    f"{__name__}.MBConv": _mbconv,
    f"{__name__}.FusedMBConv": _fused_mbconv,
    f"{__name__}.ConvNeXt": _convnext,
    "transformers.models.convnext.modeling_convnext.ConvNextLayer": _transformers_convnext,
}

_PARTS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.SiLU, nn.GELU)


def fuse_blocks(
    model: nn.Module, *, tile: int | Literal["auto"] = "auto", device: DeviceSpec | None = None
) -> nn.Module:
    """Replace every block of a known kind by its tiled execution, in place; a model that is such a block itself is returned new.

    Known: `ConvFirst`, `MBConv`, `FusedMBConv`, `ConvNeXt` of this module and `ConvNextLayer` of transformers. Other modules
    stay, and so do blocks with hooks, another activation, a convolution of another kind, or other parts exchanged. "auto"
    takes the planner's tile for `device` (None: `this_machine`). Outputs differ from layer by layer by rounding only.
    Pays where a block's hidden tensor exceeds the caches; feature maps of about a tile gain nothing from the tiling.

    Raises ValueError when the model is in training mode (folded norms need running statistics), holds no known block, or
    `tile` is below 1.

    >>> block = ConvFirst(16).eval()
    >>> image = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    >>> with torch.no_grad():
    ...     before = block(image)
    ...     after = fuse_blocks(block)(image)
    >>> bool((before - after).abs().max() < 1e-4)
    True
    """
    if tile != "auto":
        _at_least_one(tile=tile)
    if model.training:
        raise ValueError("model must be in eval mode: norms are folded into the convolutions")
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if _type_name(module) in _FUSERS and _as_made(module)
    }
    if not found:
        raise ValueError(f"model must hold at least one fusable block, got {type(model).__name__} with none")
    made: dict[int, DepthFirst] = {}  # a block may stand in several places
    for name, block in found.items():
        if id(block) not in made:
            made[id(block)] = _FUSERS[_type_name(block)](block).eval()
        fused = made[id(block)]
        if tile == "auto":
            device = device or this_machine(str(fused.conv.weight.dtype).removeprefix("torch."))
            fused.fit(device)
        else:
            fused.tile = tile
        if name == "":
            return fused
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fused)
    return model


def _as_made(block: Any) -> bool:
    """Whether a block of a known type still computes what its class does: parts can be exchanged, and hooks hung on them."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        return False
    theirs = hasattr(block, "dwconv")  # transformers', whose activation is run as it is
    conv = block.dwconv if theirs else block.conv
    if not all(type(part) in _PARTS for part in ((conv, block.pwconv1, block.pwconv2) if theirs else block.children())):
        return False
    if not theirs:
        wanted = nn.GELU if isinstance(block, ConvNeXt) else nn.SiLU
        if type(block.act) is not wanted or getattr(block.act, "approximate", "none") != "none":
            return False
    same = (conv.kernel_size[0] // 2,) * 2
    return bool(conv.stride == conv.dilation == (1, 1) and conv.padding == same and conv.padding_mode == "zeros")


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def this_machine(dtype: str = "float32") -> DeviceSpec:
    """The calibrated machine; its on-chip memory is half of the last cache.

    Not the second-level cache, although hidden tensors that fit it are faster to reach: each tile costs five operator calls of
    some ten microseconds, and for those the tiles must be larger (our choice, by measurement).
    """
    return device_of(calibrate(device="cpu"), dtype, sram_bytes=last_cache_bytes() // 2)


# --- report ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EfficiencyReport:
    """Every layer's operations, bytes and (if measured) seconds against a device."""

    layers: list[Layer]
    device: DeviceSpec

    @property
    def attainable(self) -> float:
        """Share of the peak the network can reach layer by layer."""
        return attainable_network_efficiency(
            [layer.operations for layer in self.layers], [layer.bytes_moved for layer in self.layers], self.device
        )

    @property
    def measured(self) -> float | None:
        """Share of the peak it reached; None if it was not measured."""
        if any(layer.seconds is None for layer in self.layers):
            return None
        seconds = [layer.seconds or 0.0 for layer in self.layers]
        return network_efficiency([layer.operations for layer in self.layers], seconds, self.device.peak)

    def bars(self) -> list[Bar]:
        """The waterline."""
        return waterline(self.layers, self.device.ridge)

    def table(self) -> str:
        """One line a layer: operations, bytes, intensity, attainable and measured efficiency."""
        lines = [f"{'layer':40} {'MOP':>10} {'MB':>9} {'op/byte':>9} {'attainable':>10} {'measured':>9}"]
        for layer in self.layers:
            ideal = layer.operations / self.device.peak
            bound = attainable_seconds(layer.operations, layer.bytes_moved, self.device)
            work = f"{layer.operations / 1e6:10.2f} {layer.bytes_moved / 1e6:9.3f} {layer.intensity:9.2f}"
            seen = f"{ideal / layer.seconds:9.3f}" if layer.seconds else ""
            lines.append(f"{layer.name[-40:]:40} {work} {ideal / bound:10.3f} {seen:>9}")
        return "\n".join(lines)

    def svg(self) -> str:
        """The waterline as an <svg> element: width = share of operations, height = intensity on a log axis, line = ridge."""
        from matplotlib.figure import Figure

        from assay.measure.plots import DRY, WATER, WET, svg

        figure = Figure(figsize=(8, 3), layout="constrained")
        axes, left = figure.add_subplot(), 0.0
        for bar in self.bars():
            axes.bar(
                left,
                bar.height,
                bar.width,
                align="edge",
                color=WET if bar.depth > 0 else DRY,
                edgecolor="white",
                lw=0.3,
            )
            left += bar.width
        axes.axhline(self.device.ridge, color=WATER)
        axes.set(yscale="log", xlim=(0, 1), xlabel="share of operations", ylabel="operations per byte")
        axes.set_title(f"{self.device.name}: attainable {self.attainable:.2f} of peak", fontsize=9)
        return svg(figure)


def efficiency_report(
    model: nn.Module, inputs: Tensor, device: DeviceSpec, *, measure: bool = False
) -> EfficiencyReport:
    """Layers of `model(inputs)` with their modelled operations and bytes; `measure` adds seconds, measured on this machine.

    Layers that neither compute nor move anything are left out. Do not set `measure` with the specification of another device.
    """
    if measure:
        from assay.measure.profile import profile_model

        rows = profile_model(model, inputs).rows
        layers = [Layer(row.name or "(model)", 2 * row.macs, row.bytes, row.seconds) for row in rows if row.bytes]
    else:
        with torch.inference_mode():
            costs = count_cost(model, inputs).modules
        layers = [Layer(cost.name or "(model)", cost.flops, cost.bytes) for cost in costs if cost.bytes]
    return EfficiencyReport(layers, device)
