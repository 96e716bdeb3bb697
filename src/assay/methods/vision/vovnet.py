"""VoVNet: features of a block are joined once, at its end, instead of in every layer; and what joining them costs in memory access.

Lee et al., "An Energy and GPU-Computation Efficient Backbone Network for Real-Time Object Detection" (2019). In DenseNet each layer reads
all features before it, so its input grows, and with it the memory that is read. One-shot aggregation (OSA) runs a plain chain of equal
convolutions and joins all their outputs in one 1x1 convolution.

    maps = build("vovnet39a", features_only=True)(images)
    costs = memory_access(build("vovnet39a").eval(), images)

`memory_access_cost` is the paper's cost model in elements moved. (The paper abbreviates it like the multiply-accumulate; here MACs are
always multiply-accumulates.)

Names are timm's. Its `vovnet39a` and `vovnet57a` have no identity path, as in the paper; the authors' code adds one to all modules of a
stage but the first (`vovnet27_slim`, `vovnet39`, `vovnet57` here, with as many parameters). The `ese_` models are VoVNetV2 (Lee
and Park, "CenterMask", 2020): a gate on channels in the last module of each stage (timm) or in every one (`ese="every"`: the authors'
detectron2 code and its weights). After the stem nothing is pooled, as in all three codes; the paper's figure has a pool there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier
from assay.methods.core.vision.blocks import ConvNormAct, DropPath, drop_path_rates
from assay.methods.core.vision.registry import backbones
from assay.methods.core.vision.running import layers_run

Ese = Literal["none", "last", "every"]
STEM, STEM_DW = (64, 64, 128), (64, 64, 64)
LARGE: dict[str, Any] = {"stem": STEM, "widths": (128, 160, 192, 224), "channels": (256, 512, 768, 1024)}
SLIM: dict[str, Any] = {"stem": STEM, "widths": (64, 80, 96, 112), "channels": (112, 256, 384, 512)}
LEAST_SIZE = 29  # pixels a side, of which one is left after the last pool
V2: dict[str, Any] = {"identity": True, "ese": "last"}
CONFIGS: dict[str, dict[str, Any]] = {
    "vovnet39a": {**LARGE, "depths": (1, 1, 2, 2)},
    "vovnet57a": {**LARGE, "depths": (1, 1, 4, 3)},
    "vovnet27_slim": {**SLIM, "channels": (128, 256, 384, 512), "depths": (1, 1, 1, 1), "identity": True},
    "vovnet39": {**LARGE, "depths": (1, 1, 2, 2), "identity": True},
    "vovnet57": {**LARGE, "depths": (1, 1, 4, 3), "identity": True},
    "ese_vovnet19b_slim_dw": {**SLIM, **V2, "depths": (1, 1, 1, 1), "layers": 3, "stem": STEM_DW, "depthwise": True},
    "ese_vovnet19b_dw": {**LARGE, **V2, "depths": (1, 1, 1, 1), "layers": 3, "stem": STEM_DW, "depthwise": True},
    "ese_vovnet19b_slim": {**SLIM, **V2, "depths": (1, 1, 1, 1), "layers": 3},
    "ese_vovnet19b": {**LARGE, **V2, "depths": (1, 1, 1, 1), "layers": 3},
    "ese_vovnet39b": {**LARGE, **V2, "depths": (1, 1, 2, 2)},
    "ese_vovnet57b": {**LARGE, **V2, "depths": (1, 1, 4, 3)},
    "ese_vovnet99b": {**LARGE, **V2, "depths": (1, 3, 9, 3)},
}


class SeparableConv(nn.Sequential):
    """`conv_dw` 3x3 depthwise, `conv_pw` 1x1, both without bias; `norm` (BatchNorm), `act` (ReLU)."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False)
        self.conv_pw = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU()


class EffectiveSE(nn.Module):
    """VoVNetV2's gate: x * hardsigmoid(fc(mean of x over positions)), one convolution without a bottleneck. (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class OsaBlock(nn.Module):
    """One-shot aggregation: a chain of `layers` 3x3 convolutions of `width` channels, and a 1x1 convolution of all of them and the input.

    (B, channels_in, H, W) to (B, channels_out, H, W). With `identity` the input is added to the output. With `depthwise` the chain is of
    separable convolutions, after a 1x1 convolution to `width` where the input is not as wide already; what is joined is the input itself.
    Raises ValueError for an identity between different widths.
    """

    def __init__(
        self, channels_in: int, width: int, channels_out: int, layers: int = 5, *, identity: bool = False, ese: bool = False,
        depthwise: bool = False, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (
            ("channels_in", channels_in),
            ("width", width),
            ("channels_out", channels_out),
            ("layers", layers),
        ):
            checks.whole(name, value, low=1)
        if identity and channels_in != channels_out:
            raise ValueError(f"channels_out must equal channels_in {channels_in} for an identity, got {channels_out}")
        self.identity = identity
        reduced = depthwise and channels_in != width
        self.conv_reduction = ConvNormAct(channels_in, width, 1) if reduced else None
        first = width if reduced else channels_in
        self.conv_mid = nn.ModuleList(
            _conv(depthwise)(first if layer == 0 else width, width) for layer in range(layers)
        )
        self.conv_concat = ConvNormAct(channels_in + layers * width, channels_out, 1)
        self.attn = EffectiveSE(channels_out) if ese else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        joined = [x]
        y = x if self.conv_reduction is None else self.conv_reduction(x)
        for layer in self.conv_mid:
            y = layer(y)
            joined.append(y)
        out: Tensor = self.conv_concat(torch.cat(joined, 1))
        if self.attn is not None:
            out = self.attn(out)
        out = self.drop_path(out)
        return out + x if self.identity else out


class DenseBlock(nn.Module):
    """The baseline: each of `layers` 3x3 convolutions reads the input and all outputs before it; then a 1x1 convolution of all.

    DenseNet's aggregation (Huang et al., 2017) with the same kinds of convolutions as `OsaBlock`, for comparing the two.
    """

    def __init__(self, channels_in: int, width: int, channels_out: int, layers: int = 5) -> None:
        super().__init__()
        for name, value in (
            ("channels_in", channels_in),
            ("width", width),
            ("channels_out", channels_out),
            ("layers", layers),
        ):
            checks.whole(name, value, low=1)
        self.conv_mid = nn.ModuleList(ConvNormAct(channels_in + layer * width, width) for layer in range(layers))
        self.conv_concat = ConvNormAct(channels_in + layers * width, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = x
        for layer in self.conv_mid:
            joined = torch.cat([joined, layer(joined)], 1)
        out: Tensor = self.conv_concat(joined)
        return out


class Stage(nn.Module):
    """`pool` (3x3, stride 2, in ceil mode: side s to s // 2) where the resolution falls, then `blocks`."""

    def __init__(self, blocks: Sequence[nn.Module], *, pool: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True) if pool else None
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x if self.pool is None else self.pool(x))
        return out


class Head(nn.Module):
    """Dropout of the mean features, then the classifier, `fc`."""

    def __init__(self, features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop, self.fc = nn.Dropout(drop_rate), classifier(features, num_classes)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of timm's VovNet: its batch norms are `bn`, its stages `stages`."""
    return {re.sub(r"^stages\.", "levels.", key).replace(".bn.", ".norm."): tensor for key, tensor in state.items()}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the authors' code: VoVNet.pytorch's, and vovnet-detectron2's (`ese="every"`, and no classes)."""
    leaves = {"conv": "conv", "norm": "norm", "dw_conv3x3": "conv_dw", "pw_conv1x1": "conv_pw", "pw_norm": "norm"}
    found = {}
    for key, tensor in state.items():
        name = re.sub(r"^classifier\.", "head.fc.", key)
        name = re.sub(r"^stage(\d)\.OSA\d_(\d+)\.", lambda m: f"levels.{int(m[1]) - 2}.blocks.{int(m[2]) - 1}.", name)
        name = re.sub(r"^stem\.stem_(\d)/", lambda m: f"stem.{int(m[1]) - 1}./", name)
        name = re.sub(r"\.layers\.(\d+)\.\w+/", r".conv_mid.\1./", name)
        name = re.sub(r"\.concat\.\w+/", ".conv_concat./", name)
        name = re.sub(r"\.conv_reduction\.\w+/", ".conv_reduction./", name)
        name = re.sub(r"\./(\w+)\.", lambda m: f".{leaves[m[1]]}.", name)
        found[name.replace(".ese.fc.", ".attn.fc.")] = tensor
    return found


@backbones(CONFIGS, layouts={"timm": from_timm, "official": from_official})
class VoVNet(Backbone):
    """Three 3x3 convolutions to a quarter of the resolution, four stages of `OsaBlock`, mean, linear: (B, in_chans, H, W) to logits.

    `stem` are the widths of the first three, `widths` and `channels` those inside and at the end of a stage's blocks, `depths` the
    blocks of each. Maps have strides 2, 4, 8, 16, 32: odd sizes are rounded up by the stem and down by the pools, and H and W must be at
    least 29. Kaiming initialisation, as in the authors' code. When not to use it: at equal parameters small blocks (up to some five layers)
    run no faster than dense ones where concatenation is cheap, as on processors.

    >>> model = VoVNet(stem=(4, 4, 8), widths=(4, 4, 4, 4), channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=10)
    >>> model.strides, model.channels
    ((2, 4, 8, 16, 32), (4, 8, 8, 8, 8))
    """

    classifier_name = "head.fc"
    strides = (2, 4, 8, 16, 32)

    def __init__(
        self, *, stem: Sequence[int], widths: Sequence[int], channels: Sequence[int], depths: Sequence[int], layers: int = 5,
        identity: bool = False, ese: Ese = "none", depthwise: bool = False, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        num_classes: int = 1000, in_chans: int = 3, input_size: int = 224,
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        if len(stem) != 3 or not len(widths) == len(channels) == len(depths) == 4:
            raise ValueError(
                f"stem must have 3 widths, widths, channels and depths 4, got {stem}, {widths}, {channels}, {depths}"
            )
        for each in stem:
            checks.whole("a width of stem", each, low=1)
        identity, depthwise = checks.flag("identity", identity), checks.flag("depthwise", depthwise)
        checks.choice("ese", ese, ("none", "last", "every"))
        drop_rate = checks.number("drop_rate", drop_rate, low=0, below=1)
        rates = drop_path_rates(checks.number("drop_path_rate", drop_path_rate, low=0, below=1), tuple(depths))
        conv = _conv(depthwise)
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, stem[0], stride=2), conv(stem[0], stem[1]), conv(stem[1], stem[2], stride=2)
        )
        self.levels = nn.ModuleList()
        given = stem[2]
        for stage, (width, out, depth) in enumerate(zip(widths, channels, depths, strict=True)):
            blocks = [
                OsaBlock(
                    out if block else given,
                    width,
                    out,
                    layers,
                    identity=identity and block > 0,
                    ese=ese == "every" or (ese == "last" and block == depth - 1),
                    depthwise=depthwise,
                    drop_path=rates[stage][block],
                )
                for block in range(checks.whole("depths", depth, low=1))
            ]
            self.levels.append(Stage(blocks, pool=stage > 0))
            given = out
        self.channels = (stem[1], *channels)
        self.num_features = given
        self.head = Head(given, self.num_classes, drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.stem[1](self.stem[0](x))
        yield 2, x
        x = self.stem[2](x)
        for stride, level in zip(self.strides[1:], self.levels, strict=True):
            x = level(x)
            yield stride, x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map (B, num_features, H/32, W/32)."""
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head.drop(x.mean((2, 3)))
        return x if pre_logits else self.head.fc(x)

    @property
    def default_cfg(self) -> dict[str, Any]:
        return {**super().default_cfg, "crop_pct": 0.875}

    def check_images(self, x: Any) -> None:
        super().check_images(x)
        if min(x.shape[2:]) < LEAST_SIZE:
            raise ValueError(f"x must be at least {LEAST_SIZE} pixels a side, got {tuple(x.shape[2:])}")


def _conv(depthwise: bool) -> type[ConvNormAct] | type[SeparableConv]:
    return SeparableConv if depthwise else ConvNormAct


# ------------------------------------------------------------------------------------------------------- what it costs to move


def conv_macs(height: int, width: int, channels_in: int, channels_out: int, kernel: int = 1) -> int:
    """B: the multiply-accumulates of a convolution with an output of height x width."""
    _check_convolution(channels_in, channels_out, kernel)
    return _sizes(height, width) * kernel**2 * channels_in * channels_out


def memory_access_cost(height: int, width: int, channels_in: int, channels_out: int, kernel: int = 1) -> int:
    """h w (c_i + c_o) + k^2 c_i c_o: the elements that a convolution reads, writes and has as weights (equation 1 of the paper).

    >>> memory_access_cost(56, 56, 64, 64, 3) == least_memory_access_cost(conv_macs(56, 56, 64, 64, 3), 56, 56, 3)
    True
    """
    _check_convolution(channels_in, channels_out, kernel)
    return _sizes(height, width) * (channels_in + channels_out) + kernel**2 * channels_in * channels_out


def least_memory_access_cost(macs: int, height: int, width: int, kernel: int = 1) -> float:
    """2 sqrt(h w B / k^2) + B / (h w): the least of any convolution with B `macs`, reached just where it has as many inputs as outputs."""
    checks.whole("macs", macs, low=0)
    checks.whole("kernel", kernel, low=1)
    return _least(macs, _sizes(height, width), kernel**2)


def _least(macs: int, area: int, window: int) -> float:
    """The bound for maps of `area` positions and kernels of `window`."""
    inside, rest = divmod(area * macs, window)
    root = math.isqrt(inside)
    exact = rest == 0 and root * root == inside  # so that the bound is met exactly, not up to rounding
    return 2 * (root if exact else math.sqrt(area * macs / window)) + macs / area


def inner_inputs(channels_in: int, width: int, layers: int, *, dense: bool) -> int:
    """Channels that the inner layers of a block read together: c + (n - 1) m in OSA, n c + m n (n - 1) / 2 in a dense block."""
    for name, value in (("channels_in", channels_in), ("width", width), ("layers", layers)):
        checks.whole(name, value, low=1)
    if dense:
        return layers * channels_in + width * layers * (layers - 1) // 2
    return channels_in + (layers - 1) * width


@dataclass(frozen=True)
class Access:
    """A convolution's MACs, the elements it moves by the paper's model, and the least that as many MACs need."""

    name: str
    macs: int
    elements: int
    least: float


def memory_access(model: nn.Module, example: Tensor) -> list[Access]:
    """The cost of every convolution of `model` on `example`, by image, in the order they run.

    Convolutions with groups or strides move h_i w_i c_i + h_o w_o c_o + weights; their bound is that of a dense one with as many MACs,
    which they may undercut. Joins, norms and activations are not in the model: `assay.measure.cost.count_cost` has what operators move.
    Raises ValueError for an example without images.
    """
    checks.tensor("example", example)
    found = []
    for ran in layers_run(model, example):
        if isinstance(ran.module, nn.Conv2d):
            batch, _, height, width = ran.gave
            elements = (math.prod(ran.given) + math.prod(ran.gave)) // batch + ran.module.weight.numel()
            macs = ran.macs // batch
            found.append(
                Access(ran.name, macs, elements, _least(macs, height * width, math.prod(ran.module.kernel_size)))
            )
    return found


def computation_efficiency(macs: float, seconds: float) -> float:
    """The paper's GPU computation efficiency: operations per second that were reached, two for each MAC."""
    return 2 * checks.number("macs", macs, low=0) / checks.number("seconds", seconds, above=0)


def energy_per_image(joules: float, images: int) -> float:
    """Joules for each image; the paper measures mean power over images per second, which is the same."""
    return checks.number("joules", joules, low=0) / checks.whole("images", images, low=1)


def _check_convolution(channels_in: int, channels_out: int, kernel: int) -> None:
    for name, value in (("channels_in", channels_in), ("channels_out", channels_out), ("kernel", kernel)):
        checks.whole(name, value, low=1)


def _sizes(height: int, width: int) -> int:
    return checks.whole("height", height, low=1) * checks.whole("width", width, low=1)
