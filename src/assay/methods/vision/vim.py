"""Vim: patches of an image as one sequence, scanned forwards and backwards by selective state spaces instead of attention.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (ICML 2024), algorithm 1.

    model = build("vim_tiny_patch16_224")
    layer = BiMamba(192)                      # the token mixer by itself: (batch, tokens, 192), same shape out

Time and memory are linear in the number of patches. When not to use it: below a few thousand patches, or beside an attention kernel
that does not store its scores. There a transformer of equal size is faster, and it keeps no more memory.

Where text and released code differ, the code is followed: the sum of the two directions is halved (`halve=False` for weights
that were released before), and the class token stands in the middle of the sequence. `our choice`: other sizes of image by bicubic
interpolation of the positions, and zeros at the right and the bottom where patches do not fill an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.mixers.protocol import check_positive, wide_dtype
from assay.methods.core.mixers.scan import Backend
from assay.methods.core.mixers.ssm import SelectiveSSM
from assay.methods.core.vision.backbone import Backbone, classifier, map_to_tokens, resized_positions, tokens_to_map
from assay.methods.core.vision.blocks import DropPath, drop_path_rates
from assay.methods.core.vision.registry import backbones

__all__ = ["CONFIGS", "BiMamba", "Block", "Direction", "Vim", "from_official"]

CONFIGS: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": {"embed_dim": 192},
    "vim_tiny_patch16_stride8_224": {"embed_dim": 192, "stride": 8},  # "Vim-Ti+": fine-tuned with patches that overlap
    "vim_small_patch16_224": {"embed_dim": 384, "drop_path_rate": 0.05},
    "vim_small_patch16_stride8_224": {"embed_dim": 384, "stride": 8},
    "vim_base_patch16_224": {"embed_dim": 768},
}


class Direction(nn.Module):
    """One direction of a bidirectional block: causal depthwise convolution, SiLU, S6. (batch, tokens, width), same shape out.

    Token t depends on tokens up to t only. Parameters: `conv1d`, and `ssm` (see `SelectiveSSM`), whose dynamics stay float32.
    """

    def __init__(self, width: int, *, states: int, dt_rank: int, conv: int = 4, backend: Backend = "auto") -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(width, width, conv, groups=width)
        self.ssm = SelectiveSSM(width, states=states, dt_rank=dt_rank, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ssm(F.silu(self.convolved(x)))[0]
        return y

    def convolved(self, x: Tensor) -> Tensor:
        """The causal convolution alone: one over an image of a single row, in channels-last memory."""
        taps = self.conv1d.weight
        row = F.pad(x, (0, 0, taps.shape[2] - 1, 0)).transpose(1, 2).unsqueeze(2)
        return F.conv2d(row, taps.unsqueeze(2), self.conv1d.bias, groups=len(taps)).squeeze(2).transpose(1, 2)


class BiMamba(nn.Module):
    """The mixer of a Vim block: project to x and z, scan x in both directions, times SiLU(z), project back.

    `forward(x)`: (batch, tokens, dim), same shape out, in the dtype of the weights. Each direction has its own convolution and S6;
    the projections are shared. `expand` widens the inner channels, `conv` taps of the convolution, `states` numbers of state a channel,
    `dt_rank` (None: dim / 16, rounded up) the rank of the step sizes. `halve`: the mean of the directions instead of their sum.
    `bidirectional` False leaves the backward direction out: Mamba's block, the paper's ablation. `backend` is that of `selective_scan`.
    Raises ValueError for sizes below 1 and for x of another shape, TypeError for x of whole or complex numbers.

    >>> BiMamba(32)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: int = 2,
        conv: int = 4,
        dt_rank: int | None = None,
        halve: bool = True,
        bidirectional: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        check_positive(dim=dim, states=states, expand=expand, conv=conv, dt_rank=dt_rank)
        self.dim, self.halve = dim, checks.flag("halve", halve)
        width = expand * dim

        def direction() -> Direction:
            return Direction(width, states=states, dt_rank=dt_rank, conv=conv, backend=backend)

        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        self.ahead = direction()
        self.back = direction() if checks.flag("bidirectional", bidirectional) else None
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", "tokens", self.dim), empty=True)
        if not x.numel():
            return x
        u, z = self.in_proj(x).chunk(2, -1)
        y = self.ahead(u)
        if self.back is not None:
            y = y + self.back(u.flip(1)).flip(1)
            y = y / 2 if self.halve else y
        out: Tensor = self.out_proj(
            y * F.silu(z)
        )  # z gates both directions alike: one product for the two of the algorithm
        return out


class Block(nn.Module):
    """x + drop_path(mixer(norm(x))): RMS norm, no MLP. The residual x stays float32 (float64 in a float64 model) throughout."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop_path(self.mixer(rms_normed(x, self.norm)))
        return x + y


class PatchEmbed(nn.Module):
    """`proj`: a convolution as wide as a patch; patches overlap where the stride is below that."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code (parameters of the backward direction end in `_b`) under our names."""
    names = {}
    for theirs, ours in (
        ("A_log", "ssm.dynamics.A_log"),
        ("D", "ssm.dynamics.D"),
        ("dt_proj.weight", "ssm.dt_weight"),
        ("dt_proj.bias", "ssm.dynamics.dt_bias"),
        ("x_proj.weight", "ssm.x_proj.weight"),
        ("conv1d.weight", "conv1d.weight"),
        ("conv1d.bias", "conv1d.bias"),
    ):
        first, dot, last = theirs.partition(".")
        names[theirs] = f"ahead.{ours}"
        names["A_b_log" if first == "A_log" else f"{first}_b{dot}{last}"] = f"back.{ours}"

    def renamed(key: str) -> str:
        block, inside, name = key.partition(".mixer.")
        return f"{block}{inside}{names.get(name, name)}"

    return {renamed(key): value for key, value in state.items()}


@backbones(CONFIGS, layouts={"official": from_official})
class Vim(Backbone):
    """A plain backbone: patches, a class token in the middle, learned positions, `depth` blocks, RMS norm, a linear head.

    Images are (B, in_chans, H, W) of any size; `img_size` is the side that the positions are learned for. `forward_features` gives all
    tokens (B, M + 1, embed_dim) after the last norm, the class token at M // 2; there is one map, of stride `stride` (None: `patch_size`).
    `bidirectional`, `halve`, `states`, `expand` and `backend` are those of `BiMamba`. `torch.export` wants `backend="chunked"`. Raises
    ValueError for sizes below 1.

    >>> model = Vim(embed_dim=32, depth=2, img_size=64, num_classes=10)
    >>> model(torch.zeros(1, 3, 80, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        *,
        embed_dim: int = 192,
        depth: int = 24,
        patch_size: int = 16,
        stride: int | None = None,
        img_size: int = 224,
        states: int = 16,
        expand: int = 2,
        halve: bool = True,
        bidirectional: bool = True,
        drop_path_rate: float = 0.0,
        backend: Backend = "auto",
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=img_size)
        stride = patch_size if stride is None else stride
        check_positive(embed_dim=embed_dim, depth=depth, patch_size=patch_size, stride=stride)
        self.patch_size, self.num_features = patch_size, embed_dim
        self.strides, self.channels = (stride,), (embed_dim,)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, stride)
        self.grid = self.grid_of(img_size, img_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1] + 1, embed_dim))
        self.layers = nn.ModuleList(
            Block(
                embed_dim,
                BiMamba(
                    embed_dim, states=states, expand=expand, halve=halve, bidirectional=bidirectional, backend=backend
                ),
                rate,
            )
            for rate in drop_path_rates(drop_path_rate, (depth,))[0]
        )
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.head = classifier(embed_dim, num_classes)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Patches LeCun normal; positions and class token of deviation 0.02; the mixers as Mamba's, their output over sqrt(depth)."""
        patches = self.patch_embed.proj
        deviation = patches.weight[0].numel() ** -0.5 / 0.8796  # of a normal that is cut at two deviations
        nn.init.trunc_normal_(patches.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for name, weight in self.layers.named_parameters():
            if name.endswith("out_proj.weight"):
                weight.div_(len(self.layers) ** 0.5)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image: as many as are needed to see every pixel."""
        rows, columns = (1 + max(0, -(-(side - self.patch_size) // self.strides[0])) for side in (height, width))
        return rows, columns

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions (1, M + 1, embed_dim) of another grid: those of the patches interpolated, the class token's back in the middle."""
        if grid == self.grid:
            return self.pos_embed
        old, new = self.grid[0] * self.grid[1] // 2, grid[0] * grid[1] // 2
        patches = torch.cat([self.pos_embed[:, :old], self.pos_embed[:, old + 1 :]], 1)
        patches = resized_positions(patches, grid, self.grid)
        return torch.cat([patches[:, :new], self.pos_embed[:, old : old + 1], patches[:, new:]], 1)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """All tokens after the last norm, and the grid of the patches among them."""
        height, width = x.shape[2:]
        grid = self.grid_of(height, width)
        rows, columns = (self.patch_size + (count - 1) * self.strides[0] for count in grid)
        if (rows, columns) != (height, width):
            x = F.pad(x, (0, columns - width, 0, rows - height))
        patches = map_to_tokens(self.patch_embed.proj(x))
        middle = patches.shape[1] // 2
        between = [patches[:, :middle], self.cls_token.expand(len(x), -1, -1).to(patches.dtype), patches[:, middle:]]
        y = torch.cat(between, 1) + self.positions(grid)
        y = y.to(wide_dtype(y.dtype))
        for layer in self.layers:
            y = layer(y)
        return rms_normed(y, self.norm_f), grid

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        y, grid = self.tokens(x)
        middle = (y.shape[1] - 1) // 2
        yield self.strides[0], tokens_to_map(torch.cat([y[:, :middle], y[:, middle + 1 :]], 1), *grid)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = x[:, (x.shape[1] - 1) // 2]
        logits: Tensor = features if pre_logits else self.head(features)
        return logits

    def no_weight_decay(self) -> set[str]:
        """Parameters that get no weight decay, as timm asks for them: positions, class token, and the dynamics of the scans."""
        return {"pos_embed", "cls_token"} | {name for name, _ in self.named_parameters() if ".dynamics." in name}


def rms_normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """The norm computed in the dtype of x, which is wide, and given in that of the weights."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps).to(norm.weight.dtype)
