"""Swin Transformer: attention in windows that shift every second block, linear in pixels, on a pyramid of maps. And Swin-MLP.

    model = build("swin_tiny_patch4_window7_224", num_classes=10)      # any size of input
    load_weights(model, state)                                         # official, timm's and transformers' layouts

A block adds to its map x (B, H, W, C) first attention inside of windows of M x M positions, then an MLP on every position:

    x = x + W-MSA(LN(x)),    x = x + MLP(LN(x))                         even blocks
    x = x + SW-MSA(LN(x)),   x = x + MLP(LN(x))                         odd blocks: the windows lie M // 2 further down and right

Shifting the windows connects neighbours that the block before kept apart. It is done by rolling the map, so that there are no more
windows than before, with a mask where the roll has joined two ends of the map (`core.vision.windows.ShiftedWindowAttention`).
Between stages 2 x 2 neighbours are merged: half the resolution, twice the channels (`core.vision.blocks.PatchMerging`). The
skeleton is `core.vision.pyramid.Pyramid`.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021), sections 3.1 to 3.3. Swin-MLP is in
the authors' released code only.

When not to use it: on maps of one window's size or little more, where attention over the whole map costs about the same; and on a
processor for speed alone, where windows of 49 positions use the kernels less well than a convolution does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.pyramid import Pyramid
from assay.methods.core.vision.registry import backbones
from assay.methods.core.vision.windows import (
    ShiftedWindowAttention,
    resized_bias_table,
    window_partition,
    window_reverse,
)

TINY, SMALL = (2, 2, 6, 2), (2, 2, 18, 2)
CONFIGS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 96,
        "depths": TINY,
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.2,
    },
    "swin_small_patch4_window7_224": {
        "embed_dim": 96,
        "depths": SMALL,
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.3,
    },
    "swin_base_patch4_window7_224": {
        "embed_dim": 128,
        "depths": SMALL,
        "num_heads": (4, 8, 16, 32),
        "drop_path_rate": 0.5,
    },
    "swin_large_patch4_window7_224": {
        "embed_dim": 192,
        "depths": SMALL,
        "num_heads": (6, 12, 24, 48),
        "drop_path_rate": 0.2,
    },
}
CONFIGS |= {
    f"swin_{size}_patch4_window12_384": {
        **CONFIGS[f"swin_{size}_patch4_window7_224"],
        "window_size": 12,
        "input_size": 384,
    }
    for size in ("base", "large")
}
CONFIGS["swin_tiny_c24_patch4_window8_256"] = {
    **CONFIGS["swin_tiny_patch4_window7_224"],
    "num_heads": (4, 8, 16, 32),
    "window_size": 8,
    "input_size": 256,
}
"""The published models. c24: 24 channels a head, for comparison with Swin-MLP."""

MLP_CONFIGS: dict[str, dict[str, Any]] = {
    f"swin_mlp_tiny_c{channels}_patch4_window8_256": {
        "embed_dim": 96,
        "depths": TINY,
        "num_heads": tuple(96 // channels * 2**stage for stage in range(4)),
        "window_size": 8,
        "drop_path_rate": 0.2,
        "input_size": 256,
    }
    for channels in (24, 12, 6)
}
MLP_CONFIGS["swin_mlp_base_patch4_window7_224"] = CONFIGS["swin_base_patch4_window7_224"]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released code's layout, of Swin and Swin-MLP: its tables of indices and masks are left out, which follow from sizes."""
    kept = {key: value for key, value in state.items() if not key.endswith(("relative_position_index", "attn_mask"))}
    return {key.replace(".spatial_mlp.", ".attn.spatial_mlp."): value for key, value in kept.items()}


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's layout since 0.7: merging begins a stage there, where it ends one here, and the classifier is `head.fc`."""
    found = {}
    for key, value in from_official(state).items():
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
        found[key.replace("head.fc.", "head.")] = value
    return found


_TRANSFORMERS = (
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)  # fmt: skip


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layout of transformers' SwinForImageClassification (or SwinModel), as its files have it and as its models have it since 5.

    Raises KeyError where one of a block's query, key and value is missing.
    """
    found = {}
    for key, value in from_official(state).items():
        for pattern, ours in _TRANSFORMERS:
            key = re.sub(pattern, ours, key)
        found[key] = value
    for key in [key for key in found if ".attn.q." in key]:
        parts = [found.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        found[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return found


def to_window(state: Mapping[str, Tensor], window: int) -> dict[str, Tensor]:
    """A state dict (ours, the official or timm's) for windows of `window` positions a side: bias tables are interpolated, bicubically.

    What is done before fine-tuning at 384 pixels. The other tensors stay as they are.

    >>> to_window({"attn.relative_position_bias_table": torch.zeros(13 * 13, 3)}, 12)["attn.relative_position_bias_table"].shape
    torch.Size([529, 3])
    """
    checks.whole("window", window, low=1)
    found = dict(from_official(state))
    for key, value in found.items():
        if key.endswith("relative_position_bias_table"):
            found[key] = resized_bias_table(value, (math.isqrt(len(value)) + 1) // 2, window)
    return found


def attention_macs(height: int, width: int, channels: int, window: int | None = None) -> int:
    """Multiply-accumulates of an attention layer on a map: equations 1 (None: over the whole map) and 2 (in windows).

    >>> round(attention_macs(56, 56, 96) / attention_macs(56, 56, 96, 7), 1)
    13.8
    """
    for name, value in (("height", height), ("width", width), ("channels", channels)):
        checks.whole(name, value, low=1)
    positions = height * width
    seen = positions if window is None else checks.whole("window", window, low=1) ** 2
    return 4 * positions * channels**2 + 2 * seen * positions * channels


class _Windowed(Pyramid):
    """What Swin and Swin-MLP share: windows of `window_size`, moved by `shift_size` in every second block."""

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = TINY,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        shift_size: int | None = None,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        input_size: int = 224,
        **settings: Any,
    ) -> None:
        checks.whole("window_size", window_size, low=1)
        shift = (
            window_size // 2
            if shift_size is None
            else checks.whole("shift_size", shift_size, low=0, high=window_size - 1)
        )
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry a stage ({len(depths)}), got {tuple(num_heads)}")
        super().__init__(
            lambda stage, place, width: self.mixer(
                width, window_size, num_heads[stage], shift * (place % 2), **settings
            ),
            num_classes=num_classes,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            input_size=input_size,
        )

    @staticmethod
    def mixer(width: int, window: int, heads: int, shift: int) -> nn.Module:
        raise NotImplementedError


@backbones(CONFIGS, layouts={"official": from_official, "timm": from_timm, "transformers": from_transformers})
class Swin(_Windowed):
    """Swin Transformer: images (B, in_chans, H, W) to logits (B, num_classes). No settings: Swin-T.

    `shift_size`: how far the windows of odd blocks are moved; None is floor(window_size / 2), 0 leaves them where they are.

    Any size of image works, odd ones too. Images are padded to whole patches, maps to even sizes before merging and to whole
    windows (`mask_padding`: the padding is not attended to; the published code for detection attends to it, so that is the default),
    all with zeros at the bottom and right. A side of a map that is no longer than the window is one window and is not shifted: the
    published rule, here for each side by itself, so that a map of 7 x 14 is still shifted along its longer side. Where there is both
    padding and a shift, timm's logits differ a little: it rolls before it pads, the published code for detection and transformers after.

    Raises ValueError for sizes that do not fit together: heads that do not divide a width, a shift not below the window.

    >>> model = Swin(num_classes=5, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4)
    >>> model(torch.zeros(2, 3, 50, 64)).shape
    torch.Size([2, 5])
    """

    def __init__(self, *, qkv_bias: bool = True, mask_padding: bool = False, **settings: Any) -> None:
        super().__init__(qkv_bias=qkv_bias, mask_padding=mask_padding, **settings)

    @staticmethod
    def mixer(width: int, window: int, heads: int, shift: int, **settings: Any) -> nn.Module:
        return ShiftedWindowAttention(width, window, heads, shift=shift, **settings)


class WindowMlp(nn.Module):
    """Swin-MLP's mixer, (B, H, W, C) to the same shape: in every window, one M^2 x M^2 matrix and a bias for the channels of each head.

    Windows are moved by padding with M - shift zeros at the top and left, so there is one row and one column of windows more, and those at
    the border see zeros. Along a side no longer than M nothing is moved. Other sizes are padded at the bottom and right. Parameters:
    `spatial_mlp`, a convolution over the heads * M^2 positions in as many groups as heads, as in the released code; it is run as
    one batched matrix product. Work: M^2 C multiply-accumulates a position.

    >>> WindowMlp(8, 4, 2, shift=2)(torch.zeros(1, 8, 12, 8)).shape
    torch.Size([1, 8, 12, 8])
    """

    def __init__(self, width: int, window: int, heads: int, *, shift: int = 0) -> None:
        super().__init__()
        checks.whole("window", window, low=1)
        checks.whole("heads", heads, low=1)
        if width % heads:
            raise ValueError(f"width must be divisible by heads={heads}, got {width}")
        self.window, self.heads = window, heads
        self.shift = checks.whole("shift", shift, low=0, high=window - 1)
        self.spatial_mlp = nn.Conv1d(heads * window**2, heads * window**2, 1, groups=heads)

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        (top, bottom), (left, right) = self.along(height), self.along(width)
        x = F.pad(x, (0, 0, left, right, top, bottom)) if top or bottom or left or right else x
        padded = x.shape[1:3]
        windows = window_partition(x, self.window)  # (count, N, C)
        count, positions, _ = windows.shape
        columns = windows.view(count, positions, self.heads, channels // self.heads).permute(2, 1, 0, 3).flatten(2)
        bias = self.spatial_mlp.bias
        assert bias is not None
        mixed = torch.baddbmm(
            bias.view(self.heads, -1, 1), self.spatial_mlp.weight.view(self.heads, -1, positions), columns
        )
        mixed = mixed.view(self.heads, positions, count, channels // self.heads).permute(2, 1, 0, 3).flatten(2)
        return window_reverse(mixed, self.window, *padded)[:, top : top + height, left : left + width]

    def along(self, side: int) -> tuple[int, int]:
        """Zeros before and after a side of the map of that length."""
        before = self.window - self.shift if self.shift and side > self.window else 0
        return before, -(before + side) % self.window

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}, shift={self.shift}"


@backbones(MLP_CONFIGS, layouts={"official": from_official})
class SwinMlp(_Windowed):
    """Swin with `WindowMlp` in place of attention: as in the authors' released code (`swin_mlp`). Settings and shapes as `Swin`.

    >>> model = SwinMlp(num_classes=5, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4)
    >>> model(torch.zeros(2, 3, 50, 64)).shape
    torch.Size([2, 5])
    """

    @staticmethod
    def mixer(width: int, window: int, heads: int, shift: int) -> nn.Module:
        return WindowMlp(width, window, heads, shift=shift)
