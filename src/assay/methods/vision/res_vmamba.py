"""Res-VMamba: VMamba (selective scans of a map along four directions) with a skip path around each of its first three stages.

Chen et al., "Res-VMamba: Fine-Grained Food Category Visual Classification Using Selective State Space Models with Deep Residual Learning"
(2024); the backbone is the first published generation of VMamba (Liu et al., 2024).

    model = build("res_vmamba_tiny", num_classes=241)
    plain = build("vssm_tiny")                # the same without skip paths: VMamba
    layer = SS2D(96)                          # the mixer by itself: (batch, height, width, 96), same shape out

Stage i gives downsample(blocks(x)) + P_i(max_pool_2x2(x)) with a 1 x 1 convolution P_i. In the released code P_i is made anew in
every call, in training and in use: random weights that are never trained nor saved. Here `residual="learned"` (the default) trains them,
as the text has it; "redrawn" is the released code (no two runs give the same logits), "frozen_random" draws them once and keeps them,
"none" is VMamba. When not to use it: where time counts. Four scans a block make this generation several times slower than window
attention of as many operations. `our choice`: odd sizes are padded in both paths, where the released code fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.orders import scan, scan_order, unscan
from assay.methods.core.mixers.protocol import check_positive, wide_dtype
from assay.methods.core.mixers.scan import Backend
from assay.methods.core.mixers.ssm import SelectiveSSM
from assay.methods.core.vision.backbone import Backbone, classifier
from assay.methods.core.vision.blocks import DropPath, PatchMerging, drop_path_rates, init_transformer
from assay.methods.core.vision.registry import backbones

__all__ = ["CONFIGS", "SS2D", "ResVMamba", "Residual", "VSSBlock", "cross_merge", "cross_scan", "from_official"]

Residual = Literal["learned", "frozen_random", "redrawn", "none"]
DIRECTIONS = 4
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 9, 2), "drop_path_rate": 0.2},
    "small": {"embed_dim": 96, "depths": (2, 2, 27, 2), "drop_path_rate": 0.3},
    "base": {"embed_dim": 128, "depths": (2, 2, 27, 2), "drop_path_rate": 0.5},
}
CONFIGS: dict[str, dict[str, Any]] = {f"res_vmamba_{size}": settings for size, settings in _SIZES.items()} | {
    f"vssm_{size}": {**settings, "residual": "none"} for size, settings in _SIZES.items()
}


def cross_scan(x: Tensor) -> Tensor:
    """A map (batch, height, width, channels) as four sequences (batch, 4, height * width, channels).

    Rows forwards and backwards, columns forwards and backwards. Raises ValueError for another shape.
    """
    checks.tensor("x", x, ndim=4, dtype="any", empty=True)
    return scan(x.flatten(1, 2), scan_order("cross", *x.shape[1:3]))


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """The four sequences put back in their places and summed: (batch, height, width, channels).

    >>> x = torch.randn(2, 3, 5, 4)
    >>> torch.allclose(cross_merge(cross_scan(x), 3, 5), 4 * x)
    True
    """
    return unscan(y, scan_order("cross", height, width)).sum(1).unflatten(1, (height, width))


class SS2D(nn.Module):
    """The mixer of a VSS block: project to u and z, depthwise 3 x 3 convolution and SiLU on u, four selective scans, norm, times SiLU(z).

    `forward(x)`: (batch, height, width, dim), same shape out. Each direction has an S6 of its own (`directions`, in the order of
    `cross_scan`), whose dynamics stay float32. `states` numbers of state a channel, `expand` widens the inner channels, the steps have rank
    `dt_rank` (None: dim / 16, rounded up). `backend` is that of `selective_scan`.
    Raises ValueError for sizes below 1 and for x of another shape, TypeError for x of whole or complex numbers.

    >>> SS2D(32)(torch.randn(2, 4, 6, 32)).shape
    torch.Size([2, 4, 6, 32])
    """

    def __init__(
        self, dim: int, *, states: int = 16, expand: int = 2, dt_rank: int | None = None, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        check_positive(dim=dim, states=states, expand=expand, dt_rank=dt_rank)
        self.dim, width = dim, expand * dim
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.directions = nn.ModuleList(
            SelectiveSSM(width, states=states, dt_rank=dt_rank, backend=backend) for _ in range(DIRECTIONS)
        )
        self.out_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", "height", "width", self.dim), empty=True)
        if not x.numel():
            return x
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        out: Tensor = self.out_proj(self.out_norm(self.scanned(u)) * F.silu(z))
        return out

    def scanned(self, u: Tensor) -> Tensor:
        """The scans alone, summed: (batch, height, width, expand * dim), same shape out. One direction is held at a time."""
        height, width = u.shape[1:3]
        cells, order = u.flatten(1, 2), scan_order("cross", height, width)
        y = torch.zeros_like(cells, dtype=wide_dtype(cells.dtype))
        for along, ssm in zip(order.split(1), self.directions, strict=True):
            y = y + unscan(ssm(scan(cells, along)[:, 0])[0][:, None], along)[:, 0]
        return y.to(u.dtype).unflatten(1, (height, width))


class VSSBlock(nn.Module):
    """x + drop_path(SS2D(norm(x))), without an MLP: (batch, height, width, dim), same shape out."""

    def __init__(self, dim: int, drop_path: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop_path(self.op(self.norm(x)))
        return x + y


class Stage(nn.Module):
    """`blocks`, and `downsample` to half the resolution and twice the channels (in the last stage nothing)."""

    def __init__(self, dim: int, rates: list[float], last: bool, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(dim, rate, **options) for rate in rates))
        self.downsample = nn.Identity() if last else PatchMerging(dim)


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to a map (B, H / patch, W / patch, dim): a convolution without overlap, and a layer norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.kernel_size[0]
        if x.shape[2] % patch or x.shape[3] % patch:
            x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
        y: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return y


class Shortcut(nn.Module):
    """P(max_pool_2x2(x)) of a map (batch, height, width, dim): (batch, height / 2, width / 2, 2 dim), rounded up. P is a 1 x 1 convolution.

    `residual` says where P comes from (see the module): "learned", "frozen_random" or "redrawn", which draws from torch's generator in
    every call and has no parameters.
    """

    def __init__(self, dim: int, residual: Residual) -> None:
        super().__init__()
        self.dim = dim
        self.proj = None if residual == "redrawn" else nn.Conv2d(dim, 2 * dim, 1)
        if self.proj is not None and residual == "frozen_random":
            self.proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True)
        if self.proj is not None:
            y: Tensor = self.proj(pooled)
        else:  # as a convolution begins
            bound = self.dim**-0.5
            weight = torch.empty(2 * self.dim, self.dim, 1, 1, dtype=x.dtype, device=x.device).uniform_(-bound, bound)
            y = F.conv2d(pooled, weight, weight.new_empty(2 * self.dim).uniform_(-bound, bound))
        return y.permute(0, 2, 3, 1)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of VMamba's or Res-VMamba's released code, of either naming, under our names; the four scans are stacked there.

    Released weights of Res-VMamba hold no P: load them with `residual="none"` or "redrawn".
    """
    renames = (
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"^classifier\.", ""),
        (r"\.ln_1\.", ".norm."),
        (r"\.self_attention\.", ".op."),
    )
    stacked = {
        "x_proj_weight": "x_proj.weight",
        "dt_projs_weight": "dt_weight",
        "dt_projs_bias": "dynamics.dt_bias",
        "A_logs": "dynamics.A_log",
        "Ds": "dynamics.D",
    }
    found = {}
    for key, value in state.items():
        for pattern, ours in renames:
            key = re.sub(pattern, ours, key)
        block, _, name = key.rpartition(".")
        if name not in stacked:
            found[key] = value
            continue
        parts = value.flatten(0, 1) if name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias") else value
        rows, columns, rows_back, columns_back = parts.chunk(DIRECTIONS)
        for index, part in enumerate((rows, rows_back, columns, columns_back)):
            found[f"{block}.directions.{index}.{stacked[name]}"] = part.clone()
    return found


@backbones(CONFIGS, layouts={"official": from_official})
class ResVMamba(Backbone):
    """Four stages of VSS blocks with skip paths around the first three, layer norm, the mean over the map, a linear head.

    Images are (B, in_chans, H, W) of any size. `forward_features` gives the last map (B, H / 32, W / 32, 8 embed_dim) after the norm.
    The maps of `stages` are those after the blocks of each stage, before its skip path. `residual` is described in the module; `states`,
    `expand` and `backend` are those of `SS2D`. `torch.export` wants `backend="chunked"`. Raises ValueError for sizes below 1, no stages,
    and another `residual`.

    >>> model = ResVMamba(embed_dim=8, depths=(1, 1), num_classes=10)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 9, 2),
        patch_size: int = 4,
        residual: Residual = "learned",
        states: int = 16,
        expand: int = 2,
        drop_path_rate: float = 0.0,
        backend: Backend = "auto",
        img_size: int = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=img_size)
        check_positive(embed_dim=embed_dim, patch_size=patch_size, depths=len(depths))
        check_positive(**{f"depths[{stage}]": depth for stage, depth in enumerate(depths)})
        checks.choice("residual", residual, get_args(Residual))
        count = len(depths)
        self.strides = tuple(patch_size * 2**stage for stage in range(count))
        self.channels = tuple(embed_dim * 2**stage for stage in range(count))
        self.num_features = self.channels[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        options: dict[str, Any] = {"states": states, "expand": expand, "backend": backend}
        self.layers = nn.ModuleList(
            Stage(width, rates, stage == count - 1, **options)
            for stage, (width, rates) in enumerate(
                zip(self.channels, drop_path_rates(drop_path_rate, depths), strict=True)
            )
        )
        self.shortcuts = nn.ModuleList(
            Shortcut(width, residual) for width in (self.channels[:-1] if residual != "none" else ())
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.head = classifier(self.num_features, num_classes)
        self.apply(init_transformer)
        for module in self.modules():
            if isinstance(module, SelectiveSSM):  # the projections of the scans begin as in Mamba
                module.reset_parameters()

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.patch_embed(x)
        layer: Any
        for place, (stride, layer) in enumerate(zip(self.strides, self.layers, strict=True)):
            y = layer.blocks(x)
            yield stride, y.permute(0, 3, 1, 2)
            y = layer.downsample(y)
            x = y + self.shortcuts[place](x) if place < len(self.shortcuts) else y

    def forward_features(self, x: Tensor) -> Tensor:
        for _, stage in self.stages(x):
            last = stage
        y: Tensor = self.norm(last.permute(0, 2, 3, 1))
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = x.mean((1, 2))
        logits: Tensor = features if pre_logits else self.head(features)
        return logits

    def no_weight_decay(self) -> set[str]:
        """Parameters that get no weight decay, as timm asks for them: the dynamics of the scans."""
        return {name for name, _ in self.named_parameters() if ".dynamics." in name}
