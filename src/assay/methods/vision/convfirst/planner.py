"""Operational intensity of convolutions and blocks, and the tile that fits a chip.

Intensities are operations per byte, with negligible weights and each tensor moved once. The planner is the paper's "tensor machine";
its details are not published, and this form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from assay import checks
from assay.measure.roofline import (
    DeviceSpec,
    attainable_seconds,
)

BlockKind = Literal["convfirst", "fused_mbconv", "mbconv", "convnext"]
TILES = (8, 16, 24, 32, 48, 64, 96, 128)


def at_least_one(**values: int) -> None:
    """ValueError or TypeError, naming the argument, unless each value is a whole number from 1."""
    for name, value in values.items():
        checks.whole(name, value, low=1)


def grouped_conv_intensity(kernel: int, group_width: int, *, element_bytes: int = 2) -> float:
    """k x k grouped convolution with as many outputs as inputs: k^2 g / element_bytes (fp16: k^2 g / 2; depthwise: g = 1)."""
    at_least_one(kernel=kernel, group_width=group_width, element_bytes=element_bytes)
    return kernel * kernel * group_width / element_bytes


def conv_intensity(channels_in: int, channels_out: int, kernel: int = 1, *, element_bytes: int = 2) -> float:
    """Full k x k convolution C -> K: 2 k^2 C K / ((C + K) element_bytes) (fp16: k^2 C K / (C + K)); pointwise for k = 1."""
    at_least_one(channels_in=channels_in, channels_out=channels_out, kernel=kernel, element_bytes=element_bytes)
    return 2 * kernel**2 * channels_in * channels_out / ((channels_in + channels_out) * element_bytes)


def block_macs_per_pixel(channels: int, expand: int, kernel: int = 3, group_width: int = 8) -> int:
    """MACs of a ConvFirst block for each pixel: k^2 g C + 2 e C^2."""
    at_least_one(channels=channels, expand=expand, kernel=kernel, group_width=group_width)
    return kernel**2 * group_width * channels + 2 * expand * channels**2


def block_traffic_per_pixel(channels: int, expand: int, *, fused: bool, element_bytes: int = 2) -> int:
    """Bytes a ConvFirst block moves for each pixel (activations folded into the convolutions).

    Layer by layer: 2C for the grouped convolution, C + eC to expand, eC + 2C to project and add. Fused: read once, write once.
    """
    at_least_one(channels=channels, expand=expand, element_bytes=element_bytes)
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
    at_least_one(
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
