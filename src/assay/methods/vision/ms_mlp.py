"""MS-MLP: channel groups are shifted by different distances and mixed over windows that grow with the distance. No attention.

    model = build("ms_mlp_tiny", num_classes=10)            # any size of input
    fast = fuse_mixing(model.eval())                        # the same outputs, fewer and larger calls
    mix = MixShift(96, kernels=(1, 1, 3, 5, 7))             # the operator alone, (B, 96, H, W) to the same shape

A block splits its channels into five groups. Group g is shifted by s_g = -2, -1, 0, 1, 2 positions and convolved depth by depth with a
kernel of k_g x k_g, once with the shift along the width and once along the height; the two are added, and an MLP on every position
follows: x + gamma * MLP(LN(mixed x)). Group 0 keeps single positions far away (k = 1), later groups mix wider (k up to 7).

Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs" (2022), and the released code: the shift is
cyclic there, before the convolution, and the published configurations (kernels, depths) are those of its configuration files; the
defaults in its code are others.

When not to use it: where a single depthwise 7 x 7 convolution does (ConvNeXt): that has as many multiply-accumulates within 3 % and is one
call in place of ten. The cyclic shift lets the left border see the right one; `edge="zero"` does not, and is another model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier
from assay.methods.core.vision.blocks import DropPath, drop_path_rates, init_transformer
from assay.methods.core.vision.pyramid import PatchEmbed, Pyramid
from assay.methods.core.vision.registry import backbones
from assay.methods.core.vision.windows import ShiftedWindowAttention

Edge = Literal["cyclic", "zero"]
EDGES: tuple[Edge, ...] = ("cyclic", "zero")
SHIFTS = (-2, -1, 0, 1, 2)
KERNELS = ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7))
"""Of each stage and group, in all published models."""
CONFIGS: dict[str, dict[str, Any]] = {
    "ms_mlp_tiny": {"embed_dim": 96, "depths": (3, 3, 9, 3), "drop_path_rate": 0.1},
    "ms_mlp_small": {"embed_dim": 96, "depths": (3, 3, 27, 3), "drop_path_rate": 0.4},
    "ms_mlp_base": {"embed_dim": 128, "depths": (3, 3, 27, 3), "drop_path_rate": 0.5},
}
SWIN_CONFIGS: dict[str, dict[str, Any]] = {
    "swin_ms_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "swin_ms_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3},
    "swin_ms_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
}


def shifted(x: Tensor, steps: int, dim: int, edge: Edge = "cyclic") -> Tensor:
    """x moved by `steps` along `dim`: what was at i is at i + steps. What leaves comes in at the other end, or zeros do.

    >>> shifted(torch.tensor([1, 2, 3]), 1, 0), shifted(torch.tensor([1, 2, 3]), -1, 0, "zero")
    (tensor([3, 1, 2]), tensor([2, 3, 0]))
    """
    if steps == 0:
        return x
    if edge == "cyclic":
        return x.roll(steps, dim)
    size = x.shape[dim]
    gone = min(abs(steps), size)
    kept = x.narrow(dim, 0 if steps > 0 else gone, size - gone)
    zeros = x.new_zeros([gone if axis == dim % x.ndim else length for axis, length in enumerate(x.shape)])
    return torch.cat((zeros, kept) if steps > 0 else (kept, zeros), dim)


class MixShift(nn.Module):
    """Shifts and mixes maps (B, C, H, W) group by group, along the width (`dwconv_lr`) and along the height (`dwconv_td`), and adds up.

    Groups are those of `torch.chunk`: all as large but for the last. `kernels` (odd) and `shifts` have one entry a group; every
    convolution is depthwise, has a bias and is padded with zeros after the shift. Work: 2 * sum of C_g k_g^2 a position.
    Raises ValueError for settings that do not fit, such as a C that cannot be cut into as many groups.

    >>> MixShift(6, kernels=(1, 3, 5), shifts=(-1, 0, 1))(torch.zeros(1, 6, 9, 7)).shape
    torch.Size([1, 6, 9, 7])
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int] = KERNELS[0],
        shifts: Sequence[int] = SHIFTS,
        *,
        edge: Edge = "cyclic",
    ) -> None:
        super().__init__()
        checks.whole("channels", channels, low=1)
        self.kernels = tuple(checks.whole("kernels", kernel, low=1) for kernel in kernels)
        self.shifts = tuple(checks.whole("shifts", steps) for steps in shifts)
        self.edge = checks.choice("edge", edge, EDGES)
        if not self.kernels:
            raise ValueError("kernels must have at least one entry, got ()")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels must be odd, got {self.kernels}")
        if len(self.shifts) != len(self.kernels):
            raise ValueError(f"shifts must have one entry a kernel ({len(self.kernels)}), got {self.shifts}")
        size = -(-channels // len(self.kernels))
        self.groups = tuple(len(range(channels)[first : first + size]) for first in range(0, channels, size))
        if len(self.groups) != len(self.kernels):
            raise ValueError(
                f"channels must make {len(self.kernels)} groups of ceil(channels / {len(self.kernels)}), the last one smaller, "
                f"got {channels}, which makes {len(self.groups)}"
            )
        self.dwconv_lr, self.dwconv_td = self._convolutions(), self._convolutions()

    def _convolutions(self) -> nn.ModuleList:
        return nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
            for width, kernel in zip(self.groups, self.kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(zip(x.split(self.groups, 1), self.shifts, strict=True))
        across = [
            conv(shifted(part, steps, 3, self.edge)) for conv, (part, steps) in zip(self.dwconv_lr, parts, strict=True)
        ]
        down = [
            conv(shifted(part, steps, 2, self.edge)) for conv, (part, steps) in zip(self.dwconv_td, parts, strict=True)
        ]
        return torch.cat(across, 1) + torch.cat(down, 1)

    def extra_repr(self) -> str:
        return f"kernels={self.kernels}, shifts={self.shifts}, edge={self.edge!r}"


class MixShiftBlock(nn.Module):
    """x + gamma * pwconv2(GELU(pwconv1(LN(mix(x))))) on maps (B, C, H, W): one residual branch, mixing and MLP in series."""

    def __init__(
        self, width: int, mix: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0, scale: float = 1e-6
    ) -> None:
        super().__init__()
        self.mix, self.norm = mix, nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.act = nn.Linear(width, int(mlp_ratio * width)), nn.GELU()
        self.pwconv2 = nn.Linear(int(mlp_ratio * width), width)
        self.gamma = nn.Parameter(torch.full((width,), scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        out: Tensor = x + self.drop_path(y.permute(0, 3, 1, 2))
        return out


class MsMlpStage(nn.Module):
    """`blocks` at one resolution, then `downsample`: a convolution of 2 x 2 and a norm (None after the last stage)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.Sequential(*blocks), downsample


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released code's layout, where the convolutions are the block's own."""
    return {key.replace(".dwconv_", ".mix.dwconv_"): value for key, value in state.items()}


@backbones(CONFIGS, layouts={"official": from_official})
class MsMlp(Backbone):
    """MS-MLP: images (B, in_chans, H, W) to logits (B, num_classes). No settings: MS-MLP-T.

    `kernels` has a tuple for each stage. `forward_features` gives the last map (B, 8C, H/32, W/32); the norm comes after pooling. Any size
    of image works; where it is no multiple of 4, or a map has an odd side, zeros are added at the bottom and right.
    Layer scale begins at 1e-6 (`layer_scale`), so that every block is all but the identity at first.

    >>> model = MsMlp(num_classes=5, embed_dim=10, depths=(1, 1))
    >>> model(torch.zeros(2, 3, 30, 44)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (3, 3, 9, 3),
        kernels: Sequence[Sequence[int]] = KERNELS,
        shifts: Sequence[int] = SHIFTS,
        edge: Edge = "cyclic",
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        layer_scale: float = 1e-6,
        input_size: int = 224,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        checks.whole("embed_dim", embed_dim, low=1)
        checks.whole("patch_size", patch_size, low=1)
        checks.number("mlp_ratio", mlp_ratio, above=0)
        depths = tuple(checks.whole("depths", depth, low=1) for depth in depths)
        if not depths:
            raise ValueError("depths must have at least one stage, got ()")
        kernels = _kernels_of(kernels, len(depths))
        self.channels = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.strides = tuple(patch_size * 2**stage for stage in range(len(depths)))
        self.num_features = self.channels[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, eps=1e-6)
        rates = drop_path_rates(checks.number("drop_path_rate", drop_path_rate, low=0, below=1), depths)
        scale = checks.number("layer_scale", layer_scale)
        self.layers = nn.ModuleList(
            MsMlpStage(
                [
                    MixShiftBlock(
                        width,
                        MixShift(width, kernels[stage], shifts, edge=edge),
                        mlp_ratio=mlp_ratio,
                        drop_path=rate,
                        scale=scale,
                    )
                    for rate in rates[stage]
                ],
                PatchEmbed(width, 2 * width, 2, eps=1e-6) if stage + 1 < len(depths) else None,
            )
            for stage, width in enumerate(self.channels)
        )
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head = classifier(self.num_features, num_classes)
        self.apply(init_transformer)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.patch_embed(x).permute(0, 3, 1, 2)
        for stride, stage in zip(self.strides, self.layers, strict=True):
            x = stage.blocks(x)  # type: ignore[operator]
            yield stride, x
            x = x if stage.downsample is None else stage.downsample(x).permute(0, 3, 1, 2)  # type: ignore[operator]

    def forward_features(self, x: Tensor) -> Tensor:
        return list(self.stages(x))[-1][1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.head(x)


class MixShiftTokens(MixShift):
    """`MixShift` on maps (B, H, W, C), as Swin's blocks have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@backbones(SWIN_CONFIGS)
class MsSwin(Pyramid):
    """Swin with `MixShift` in place of the attention of every even block; the odd blocks keep theirs, in shifted windows.

    The abstract reports Swin combined with MS-MLP at three sizes but neither it nor the released code says where: the placement is
    our choice, so that half of a network's mixers are of each kind. Settings and shapes as Swin's, with those of `MixShift`.

    >>> model = MsSwin(num_classes=5, embed_dim=10, depths=(2, 2), num_heads=(2, 4), window_size=4)
    >>> model(torch.zeros(2, 3, 30, 44)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        kernels: Sequence[Sequence[int]] = KERNELS,
        shifts: Sequence[int] = SHIFTS,
        edge: Edge = "cyclic",
        **settings: Any,
    ) -> None:
        kernels = _kernels_of(kernels, len(depths))
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry a stage ({len(depths)}), got {tuple(num_heads)}")

        def mixer(stage: int, place: int, width: int) -> nn.Module:
            if place % 2 == 0:
                return MixShiftTokens(width, kernels[stage], shifts, edge=edge)
            return ShiftedWindowAttention(width, window_size, num_heads[stage], shift=window_size // 2)

        super().__init__(
            mixer, num_classes=num_classes, in_chans=in_chans, embed_dim=embed_dim, depths=depths, **settings
        )


def _kernels_of(kernels: Sequence[Sequence[int]], stages: int) -> tuple[tuple[int, ...], ...]:
    """The kernels of each stage. Raises ValueError where there are fewer; a network of fewer stages takes the first ones."""
    found = tuple(tuple(some) for some in kernels)
    if len(found) < stages:
        raise ValueError(f"kernels must have one tuple a stage ({stages}), got {found}")
    return found[:stages]


class FusedMixShift(nn.Module):
    """What a `MixShift` computes, in one depthwise call for neighbouring groups of one kernel size, both branches together.

    Exact up to rounding, for both edges. A group that is not shifted needs one kernel, the sum of its two; kernels of 1 x 1 are
    scales. The shift itself is not folded into larger kernels: that is the same only where the zeros around the shifted map and its
    edge are out of reach, and at 7 x 7 positions they nowhere are.
    """

    def __init__(self, mix: MixShift) -> None:
        super().__init__()
        self.groups, self.shifts, self.edge = mix.groups, mix.shifts, mix.edge
        order = range(len(mix.groups))
        self.runs = [list(run) for _, run in groupby(order, key=lambda group: mix.kernels[group])]
        self.calls = nn.ModuleList(self._call(mix, run) for run in self.runs)

    def _call(self, mix: MixShift, run: list[int]) -> nn.Conv2d:
        """The convolution of some groups: along the width, and then, of those that are shifted at all, along the height."""
        weights, biases = [], []
        for group in run:
            (across, bias), (down, other) = _held(mix.dwconv_lr[group]), _held(mix.dwconv_td[group])
            weights.append(across if self.shifts[group] else across + down)
            biases.append(bias + other)
        for group in self._moved(run):
            weight, bias = _held(mix.dwconv_td[group])
            weights.append(weight)
            biases.append(torch.zeros_like(bias))
        weight, bias = torch.cat(weights).detach(), torch.cat(biases).detach()
        call = nn.Conv2d(len(weight), len(weight), weight.shape[-1], groups=len(weight), device="meta")
        call.weight, call.bias = nn.Parameter(weight), nn.Parameter(bias)
        return call.requires_grad_(False)

    def _moved(self, run: list[int]) -> list[int]:
        return [group for group in run if self.shifts[group]]

    def forward(self, x: Tensor) -> Tensor:
        parts, out = x.split(self.groups, 1), []
        for run, call in zip(self.runs, self.calls, strict=True):
            moved = self._moved(run)
            given = [shifted(parts[group], self.shifts[group], 3, self.edge) for group in run]
            given += [shifted(parts[group], self.shifts[group], 2, self.edge) for group in moved]
            joined, (weight, bias) = torch.cat(given, 1), _held(call)
            if weight.shape[-1] == 1:
                joined = torch.addcmul(bias.view(1, -1, 1, 1), joined, weight.view(1, -1, 1, 1))
            else:
                joined = F.conv2d(joined, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
            done = joined.split([self.groups[group] for group in run + moved], 1)
            down = dict(zip(moved, done[len(run) :], strict=True))
            out += [piece + down[group] if group in down else piece for group, piece in zip(run, done, strict=False)]
        return torch.cat(out, 1)


def _held(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    return convolution.weight, convolution.bias


class FusedMixShiftTokens(FusedMixShift):
    """`FusedMixShift` on maps (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fuse_mixing(model: nn.Module) -> nn.Module:
    """A copy of `model` (in eval mode) for inference, every `MixShift` in it fused, itself where it is one.

    Later changes of the weights of `model` do not reach the copy. Raises ValueError in training mode, and without a `MixShift`.

    >>> model = MsMlp(num_classes=5, embed_dim=10, depths=(1, 1)).eval()
    >>> fuse_mixing(model)(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 5])
    """
    if model.training:
        raise ValueError("model must be in eval mode: what is fused does not train")
    fused = copy.deepcopy(model)
    places = [
        (name, module)
        for name, module in fused.named_modules(remove_duplicate=False)  # one that is used twice has two places
        if isinstance(module, MixShift)
    ]
    if not places:
        raise ValueError(f"model must have a MixShift inside, got a {type(model).__name__} without one")
    made: dict[MixShift, FusedMixShift] = {}
    for name, module in places:
        if module not in made:
            made[module] = (FusedMixShiftTokens if isinstance(module, MixShiftTokens) else FusedMixShift)(module).eval()
        if not name:
            return made[module]
        fused.set_submodule(name, made[module])
    return fused
