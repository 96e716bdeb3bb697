"""Lowtention, the blocks around it, and the backbone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier
from assay.methods.core.vision.blocks import DropPath, drop_path_rates
from assay.methods.core.vision.registry import backbones

FUSED_BELOW = 256  # channels: blocks of fewer have a fused MBConv, of more a depthwise one
SMALL_HEAD, LARGE_HEAD = (1536, 1600), (2304, 2560)

_B3: dict[str, Any] = {"width": 32, "stem_expansion": 4, "expansion": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "lowformer_b0": {"width": 16, "depths": (0, 1, 1, 3, 4)},
    "lowformer_b1": {"width": 16, "depths": (0, 1, 1, 5, 5), "expansion": 6},
    "lowformer_b15": {"width": 20, "depths": (0, 1, 1, 6, 6), "expansion": 6, "head": LARGE_HEAD},
    "lowformer_b3": {**_B3, "depths": (1, 2, 3, 6, 6)},
    "lowformer_e1": {
        "width": 20, "depths": (0, 1, 1, 4, 4), "expansion": 6, "head": LARGE_HEAD, "attention": False, "mlp": False,
    },
    "lowformer_e2": {**_B3, "depths": (1, 2, 3, 4, 4), "attention": False, "mlp": False},
    "lowformer_e3": {**_B3, "depths": (1, 2, 3, 6, 6), "mlp": False},
}  # fmt: skip


class Conv(nn.Sequential):
    """`conv`, `norm` (BatchNorm) unless left out, `act` (Hardswish) unless left out. Padding keeps the size at stride 1."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False,
        norm: bool = True, act: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        if norm:
            self.norm = nn.BatchNorm2d(channels_out)
        if act:
            self.act = nn.Hardswish()


class FusedMBConv(nn.Sequential):
    """`spatial_conv` 3x3 to round(expansion * channels_in) channels, `point_conv` 1x1 back: MACs a pixel 9 e c^2 + e c^2 for c to c."""

    def __init__(
        self, channels_in: int, channels_out: int, *, stride: int = 1, expansion: float = 4, bias: bool = False
    ) -> None:
        super().__init__()
        hidden = round(checks.number("expansion", expansion, above=0) * channels_in)
        self.spatial_conv = Conv(channels_in, hidden, stride=stride, bias=bias)
        self.point_conv = Conv(hidden, channels_out, 1, act=False)


class MBConv(nn.Sequential):
    """`inverted_conv` 1x1, `depth_conv` 3x3 depthwise (both with bias and no norm), `point_conv` 1x1: MACs a pixel 2 e c^2 + 9 e c."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, expansion: float = 4) -> None:
        super().__init__()
        hidden = round(checks.number("expansion", expansion, above=0) * channels_in)
        self.inverted_conv = Conv(channels_in, hidden, 1, bias=True, norm=False)
        self.depth_conv = Conv(hidden, hidden, stride=stride, groups=hidden, bias=True, norm=False)
        self.point_conv = Conv(hidden, channels_out, 1, act=False)


def lowtention_heads(channels: int) -> tuple[int, int]:
    """Heads and the width of each: half of the channels in heads of about 30, rounded as the released code does.

    >>> lowtention_heads(128), lowtention_heads(160), lowtention_heads(256)
    ((2, 32), (2, 40), (4, 32))
    """
    heads = max(1, int(0.5 * checks.whole("channels", channels, low=2) // 30))
    return heads, int(0.5 * (channels // heads))


class Lowtention(nn.Module):
    """Attention over a map at 1/stride of its resolution and half of its channels: (B, C, H, W) to the same, any H and W.

    A depthwise convolution with stride and a norm, one 1x1 convolution to queries, keys and values (each head has its own q, k, v in one
    chunk), softmax(q k^T / sqrt(d)) v over all positions, and one transposed convolution that projects back to C channels and to the
    resolution. Attention itself does 2 (H W / stride^2)^2 t MACs for t = heads * head_dim. "Lowtention" is the journal version's name; the
    released code calls it ConvAttention. `heads` and `head_dim` are `lowtention_heads(channels)` unless given.

    It has no norm before it and no residual path: `LowFormerBlock` adds them. When not to use it: at stride 1 it saves only channels, and
    its dense 3x3 transposed convolution does more MACs than an output projection would.

    >>> import torch
    >>> Lowtention(64, stride=2)(torch.zeros(1, 64, 7, 10)).shape
    torch.Size([1, 64, 7, 10])
    """

    def __init__(
        self, channels: int, stride: int = 1, *, heads: int | None = None, head_dim: int | None = None
    ) -> None:
        super().__init__()
        stride = checks.whole("stride", stride, low=1)
        usual = lowtention_heads(channels)
        self.heads = usual[0] if heads is None else checks.whole("heads", heads, low=1)
        self.head_dim = usual[1] if head_dim is None else checks.whole("head_dim", head_dim, low=1)
        width, kernel = self.heads * self.head_dim, 5 if stride > 1 else 3
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.qkv = nn.Conv2d(channels, 3 * width, 1, bias=False)
        self.project = nn.ConvTranspose2d(
            width, channels, 2 * stride if stride > 1 else 3, stride, stride // 2 if stride > 1 else 1
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(self.norm(self.depthwise(x)))
        rows, columns = qkv.shape[2:]
        q, k, v = qkv.reshape(batch, self.heads, 3 * self.head_dim, rows * columns).transpose(2, 3).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, -1, rows, columns)
        out = self.project(out)
        return out[:, :, :height, :width]


class LowFormerBlock(nn.Module):
    """Attention, an MLP of 1x1 convolutions, and a convolution block, each added to its input; GroupNorms of one group before two of them.

    (B, C, H, W) to the same. The last is a fused MBConv below 256 channels and a depthwise one from there. Without `mlp` the norm before
    attention goes too, as in the released E3; without `attention` the MLP goes too.
    """

    def __init__(
        self, channels: int, *, stride: int = 1, attention: bool = True, mlp: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        both = attention and mlp
        self.attention_norm = nn.GroupNorm(1, channels) if both else nn.Identity()
        self.attention = Lowtention(channels, stride) if attention else None
        self.mlp = (
            nn.Sequential(
                nn.GroupNorm(1, channels),
                nn.Conv2d(channels, 4 * channels, 1),
                nn.GELU(),
                nn.Conv2d(4 * channels, channels, 1),
            )
            if both
            else None
        )
        self.local = (
            FusedMBConv(channels, channels, bias=True) if channels < FUSED_BELOW else MBConv(channels, channels)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            x = x + self.drop_path(self.attention(self.attention_norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(x))
        return x + self.drop_path(self.local(x))


class Residual(nn.Module):
    """`block(x) + x`."""

    def __init__(self, block: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.block, self.drop_path = block, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.block(x))


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the released code, its older `head.opseq` too."""
    rules = (
        (r"^head\.opseq\.", "head."),
        (r"^head\.op_list\.0\.", "head_conv."),
        (r"^head\.op_list\.2\.linear\.", "head_hidden.0."),
        (r"^head\.op_list\.2\.norm\.", "head_hidden.1."),
        (r"^head\.op_list\.3\.linear\.", "head."),
        (r"^backbone\.input_stem\.op_list\.0\.", "stem.0."),
        (r"^backbone\.input_stem\.op_list\.(\d+)\.main\.", r"stem.\1.block."),
        (r"^backbone\.stages\.(\d+)\.op_list\.(\d+)\.", r"levels.\1.\2."),
        (r"\.total\.0\.0\.main\.0\.", ".attention_norm."),
        (r"\.total\.0\.(0\.main\.1|main)\.", ".attention."),
        (r"\.total\.0\.1\.main\.(\d)\.", r".mlp.\1."),
        (r"\.total\.1\.main\.", ".local."),
        (r"\.attention\.conv_proj\.0\.", ".attention.depthwise."),
        (r"\.attention\.conv_proj\.1\.", ".attention.norm."),
        (r"\.attention\.pwise\.0\.", ".attention.qkv."),
        (r"\.attention\.upsampling\.", ".attention.project."),
        (r"^(levels\.\d+\.0)\.main\.", r"\1."),  # the first of a stage has no residual path
        (r"^(levels\.\d+\.\d+)\.main\.", r"\1.block."),
    )
    found = {}
    for key, tensor in state.items():
        for pattern, ours in rules:
            key = re.sub(pattern, ours, key)
        found[key] = tensor
    return found


@backbones(CONFIGS, layouts={"official": from_official})
class LowFormer(Backbone):
    """Images (B, in_chans, H, W) to logits. Maps have strides 2, 4, 8, 16, 32 and channels w, 2w, 4w, 8w, 16w for `width` w.

    A stem and two stages of fused MBConv, two stages that begin with one and go on with `LowFormerBlock`s: attention at stride 2 in the
    first of them, at 1 in the second, so over 7 x 7 positions at 224 pixels in both. `depths` are the blocks of stem and stages, in the
    last two without the first. `expansion` is that of the blocks with stride, `stem_expansion` that of the stem's; all others have 4.
    `head` are the widths of the head's convolution and hidden layer.

    The paper's B2 is left out: its released configuration has stages without blocks, which then skip their down-sampling. Drop path is of
    each residual branch, rising linearly over blocks (our choice: the released one skips some). When not to use it: for few MACs or
    parameters, which is what it pays with.

    >>> model = LowFormer(8, depths=(0, 1, 1, 1, 1), head=(16, 24), num_classes=10)
    >>> model.channels
    (8, 16, 32, 64, 128)
    """

    strides = (2, 4, 8, 16, 32)

    def __init__(
        self, width: int, *, depths: Sequence[int], expansion: float = 4, stem_expansion: float = 2,
        head: tuple[int, int] = SMALL_HEAD, attention: bool = True, mlp: bool = True, drop_rate: float = 0.0,
        drop_path_rate: float = 0.0, num_classes: int = 1000, in_chans: int = 3, input_size: int = 224,
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        checks.whole("width", width, low=1)
        attention, mlp = checks.flag("attention", attention), checks.flag("mlp", mlp)
        drop_rate = checks.number("drop_rate", drop_rate, low=0, below=1)
        drop_path_rate = checks.number("drop_path_rate", drop_path_rate, low=0, below=1)
        if len(depths) != 5 or min(depths[1:3]) < 1:
            raise ValueError(f"depths must have 5 entries, the second and third of at least 1, got {tuple(depths)}")
        depths = tuple(checks.whole("depths", depth, low=0) for depth in depths)
        rates = drop_path_rates(drop_path_rate, depths)
        self.channels = tuple(width << stage for stage in range(5))
        self.stem = nn.Sequential(Conv(in_chans, width, stride=2))
        for rate in rates[0]:
            self.stem.append(Residual(FusedMBConv(width, width, expansion=stem_expansion), rate))
        self.levels = nn.ModuleList()
        for stage in range(1, 5):
            given, out = self.channels[stage - 1 : stage + 1]
            level = nn.Sequential(FusedMBConv(given, out, stride=2, expansion=expansion))
            for rate in rates[stage][1 if stage < 3 else 0 :]:
                if stage < 3:
                    level.append(Residual(FusedMBConv(out, out), rate))
                else:
                    level.append(
                        LowFormerBlock(out, stride=2 if stage == 3 else 1, attention=attention, mlp=mlp, drop_path=rate)
                    )
            self.levels.append(level)
        self.num_features = head[1]
        self.head_conv = Conv(self.channels[-1], head[0], 1)
        self.head_hidden = nn.Sequential(nn.Linear(head[0], head[1], bias=False), nn.LayerNorm(head[1]), nn.Hardswish())
        self.head_drop = nn.Dropout(drop_rate)
        self.head = classifier(head[1], self.num_classes)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.stem(x)
        yield 2, x
        for stride, level in zip(self.strides[1:], self.levels, strict=True):
            x = level(x)
            yield stride, x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map (B, 16 w, H/32, W/32)."""
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.head_hidden(self.head_conv(x).mean((2, 3))))
        return x if pre_logits else self.head(x)
