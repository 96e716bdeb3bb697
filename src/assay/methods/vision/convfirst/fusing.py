"""Tiled execution: a residual block computed one tile at a time, and replacing the blocks of a model by it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.machine import calibrate, last_cache_bytes
from assay.measure.roofline import (
    DeviceSpec,
    device_of,
)
from assay.methods.vision.convfirst.blocks import ConvFirst, ConvNeXt, FusedMBConv, MBConv
from assay.methods.vision.convfirst.planner import TILES, BlockKind, at_least_one, plan_tile, tile_plan

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


BLOCKS = ConvFirst.__module__
_FUSERS: dict[str, Callable[[Any], DepthFirst]] = {
    f"{BLOCKS}.ConvFirst": _convfirst,
    f"{BLOCKS}.MBConv": _mbconv,
    f"{BLOCKS}.FusedMBConv": _fused_mbconv,
    f"{BLOCKS}.ConvNeXt": _convnext,
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
        at_least_one(tile=tile)
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
