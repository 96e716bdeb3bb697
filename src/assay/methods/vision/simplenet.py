"""SimpleNet: a plain stack of thirteen 3x3 convolutions, and its rules of design as a report on any convolutional network.

Hasanpour et al., "Lets keep it simple, Using simple architectures to outperform deeper and more complex architectures" (2016). Every
layer is a convolution with bias, a batch norm and a ReLU; no skip paths, no bottlenecks. Resolution falls by 2x2 max pooling, in the models
for ImageNet (released in 2022 and 2023) first by strides. The head is a global *max* pool and a linear layer.

    model = build("simplenetv1_5m_m2", num_classes=10)
    print(design_card(model.eval(), images).table())

Widths, strides and the two 1x1 layers are those of the released code, whose models keep the names. `_extra_pool` is the arrangement that
the first PyTorch weights for CIFAR were trained in, by mistake; weights from before 2023 want `pointwise_padding=1`, since the 1x1 layers
were padded then. Dropout after a pool is the same as before it, of whole channels, so `drop_rates` counts convolutions only (the released
code counts pools too).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier
from assay.methods.core.vision.registry import backbones
from assay.methods.core.vision.running import Ran, layers_run

POOL: Literal["pool"] = "pool"
Entry = int | tuple[int, int] | Literal["pool"]
"""Channels of a 3x3 convolution, (channels, kernel) of another one, or the pooling before the next one."""

CIFAR_310K: tuple[Entry, ...] = (
    64, 32, 32, 32, POOL, 32, 32, 64, POOL, 64, 64, POOL, 128, (256, 1), (64, 1), POOL, 64,
)  # fmt: skip
CIFAR_460K: tuple[Entry, ...] = (
    32, 32, 32, 64, POOL, 64, 64, 64, POOL, 64, 64, POOL, 96, (96, 1), (96, 1), POOL, 100,
)  # fmt: skip
CIFAR_5M: tuple[Entry, ...] = (
    64, 128, 128, 128, POOL, 128, 128, 256, POOL, 256, 256, POOL, 512, (2048, 1), (256, 1), POOL, 256,
)  # fmt: skip
CIFAR_5M_EXTRA: tuple[Entry, ...] = (*CIFAR_5M[:13], POOL, *CIFAR_5M[13:])
IMAGENET_5M: tuple[Entry, ...] = (
    64, 128, 128, 128, 128, 128, POOL, 256, 256, 256, 512, POOL, (2048, 1), (256, 1), 256,
)  # fmt: skip
IMAGENET_9M: tuple[Entry, ...] = (
    128, 192, 192, 192, 192, 192, POOL, 320, 320, 320, 640, POOL, (2560, 1), (320, 1), 320,
)  # fmt: skip
STRIDES: dict[int, tuple[int, ...]] = {0: (), 1: (2, 2, 2), 2: (2, 2, 1, 2), 3: (2, 2, 1, 1, 2), 4: (2, 1, 2, 1, 2)}
"""Strides of the first layers by stride mode: the later they come, the more operations at equal parameters. The rest are 1."""

CONFIGS: dict[str, dict[str, Any]] = {
    "simplenet_cifar_310k": {"plan": CIFAR_310K, "input_size": 32},
    "simplenet_cifar_460k": {"plan": CIFAR_460K, "input_size": 32},
    "simplenet_cifar_5m": {"plan": CIFAR_5M, "input_size": 32},
    "simplenet_cifar_5m_extra_pool": {"plan": CIFAR_5M_EXTRA, "input_size": 32},
    **{
        f"simplenetv1_{name}": {"plan": plan, "scale": scale, "stride_mode": mode}
        for name, plan, scale, mode in (
            ("small_m1_05", IMAGENET_5M, 0.5, 1),
            ("small_m2_05", IMAGENET_5M, 0.5, 2),
            ("small_m1_075", IMAGENET_5M, 0.75, 1),
            ("small_m2_075", IMAGENET_5M, 0.75, 2),
            ("5m_m1", IMAGENET_5M, 1.0, 1),
            ("5m_m2", IMAGENET_5M, 1.0, 2),
            ("9m_m1", IMAGENET_9M, 1.0, 1),
            ("9m_m2", IMAGENET_9M, 1.0, 2),
        )
    },
}


class Layer(nn.Sequential):
    """`pool` where it comes first, `conv` with bias, `norm`, `act`, and `drop` (whole channels) where its rate is above 0."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, *, stride: int, padding: int, pool: bool, drop: float
    ) -> None:
        super().__init__()
        if pool:
            self.pool = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding)
        self.norm = nn.BatchNorm2d(channels_out, momentum=0.05)
        self.act = nn.ReLU()
        if drop:
            self.drop = nn.Dropout2d(drop)
        nn.init.xavier_uniform_(self.conv.weight, nn.init.calculate_gain("relu"))

    @property
    def step(self) -> int:
        """How many times coarser the map becomes."""
        return self.conv.stride[0] * (2 if hasattr(self, "pool") else 1)

    def least(self, out: int) -> int:
        """The least side of a map that gives one of side `out`."""
        reach = self.conv.kernel_size[0] - 2 * int(self.conv.padding[0])
        side = max((out - 1) * self.conv.stride[0] + reach, 1)
        return 2 * side if hasattr(self, "pool") else side


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the released code: a flat sequence of all layers, dropout and pooling among them. Ours are numbered by convolution."""
    places = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
    convolutions = [place for place in places if state[f"features.{place}.weight"].ndim == 4]
    numbers = {place: number for number, place in enumerate(convolutions)}
    found = {}
    for key, tensor in state.items():
        part, place, *rest = key.split(".")
        if part == "features":
            which = int(place)
            layer = f"{numbers[which]}.conv" if which in numbers else f"{numbers[which - 1]}.norm"
            key = ".".join(["features", layer, *rest])
        found[key] = tensor
    return found


@backbones(CONFIGS, layouts={"official": from_official})
class SimpleNet(Backbone):
    """The network of a plan (a sequence of `Entry`): images (B, in_chans, H, W) to logits (B, num_classes), any H and W from `least_size`.

    Each width is `round(scale * channels)`. `stride_mode` 0 to 4 is a row of `STRIDES`. `drop_rates` gives dropout rates of convolutions by
    their number, from 0, and `drop_rate` that of the pooled features; both leave out whole channels, and without rates nothing is done.
    `stages` yields the last map of each resolution.

    Raises ValueError for an empty plan, an entry that is none, a rate of a convolution that is not there, or images too small to be pooled.
    When not to use it: where parameters or operations are the limit. Networks of depthwise convolutions need a fraction of them at equal
    accuracy; this one is for hardware on which dense 3x3 convolutions run several times faster per operation.

    >>> model = SimpleNet(CIFAR_310K, num_classes=10)
    >>> model.strides, model.channels
    ((1, 2, 4, 8, 16), (32, 64, 64, 64, 64))
    """

    classifier_name = "classifier"

    def __init__(
        self, plan: Sequence[Entry], *, scale: float = 1.0, stride_mode: int = 0, drop_rates: Mapping[int, float] | None = None,
        drop_rate: float = 0.0, pointwise_padding: int = 0, num_classes: int = 1000, in_chans: int = 3, input_size: int = 224,
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        scale, strides = (
            checks.number("scale", scale, above=0),
            STRIDES[checks.choice("stride_mode", stride_mode, STRIDES)],
        )
        pointwise_padding = checks.whole("pointwise_padding", pointwise_padding, low=0, high=1)
        self.drop_rate = checks.number("drop_rate", drop_rate, low=0, below=1)
        shapes = [_shape(entry) for entry in plan if entry != POOL]
        pooled = [entry == POOL for entry in plan]
        if not shapes or pooled[0] or pooled[-1] or any(a and b for a, b in zip(pooled, pooled[1:], strict=False)):
            raise ValueError(
                f"plan must begin and end with a convolution, with one pool at a time between, got {list(plan)}"
            )
        drops = {
            checks.whole("a convolution of drop_rates", number, low=0, high=len(shapes) - 1): checks.number(
                f"drop_rates[{number}]", rate, low=0, below=1
            )
            for number, rate in (drop_rates or {}).items()
        }
        before = [place > 0 and pooled[place - 1] for place, pool in enumerate(pooled) if not pool]
        self.features = nn.Sequential()
        width = self.in_chans
        for number, ((channels, kernel), pool) in enumerate(zip(shapes, before, strict=True)):
            out = checks.whole("round(scale * channels)", round(scale * channels), low=1)
            self.features.append(
                Layer(
                    width,
                    out,
                    kernel,
                    stride=strides[number] if number < len(strides) else 1,
                    padding=pointwise_padding if kernel == 1 else kernel // 2,
                    pool=pool,
                    drop=drops.get(number, 0.0),
                )
            )
            width = out
        self.num_features = width
        self.classifier = classifier(width, self.num_classes)
        stride, maps = 1, {}
        for layer in self.layers:
            stride *= layer.step
            maps[stride] = layer.conv.out_channels
        self.strides, self.channels = tuple(maps), tuple(maps.values())
        self.least_size = 1
        for layer in reversed(self.layers):
            self.least_size = layer.least(self.least_size)

    @property
    def layers(self) -> list[Layer]:
        """Of `features`, in order."""
        return [layer for layer in self.features if isinstance(layer, Layer)]

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        stride = 1
        for number, layer in enumerate(self.layers):
            if number and layer.step > 1:
                yield stride, x
            x, stride = layer(x), stride * layer.step
        yield stride, x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (B, num_features, H/32, W/32) in the models for ImageNet."""
        out: Tensor = self.features(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(F.adaptive_max_pool2d(x, 1).flatten(1), self.drop_rate, self.training and self.drop_rate > 0)
        return x if pre_logits else self.classifier(x)

    @property
    def default_cfg(self) -> dict[str, Any]:
        return {**super().default_cfg, "crop_pct": 0.875}

    def check_images(self, x: Any) -> None:
        super().check_images(x)
        if min(x.shape[2:]) < self.least_size:
            raise ValueError(f"x must be at least {self.least_size} pixels a side, got {tuple(x.shape[2:])}")


def _shape(entry: Any) -> tuple[int, int]:
    """(channels, kernel) of an entry that is no pool."""
    channels, kernel = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 3)
    checks.whole("kernel of a plan's entry", kernel, low=1)
    if kernel % 2 == 0:
        raise ValueError(f"kernel of a plan's entry must be odd, got {kernel}")
    return checks.whole("channels of a plan's entry", channels, low=1), kernel


# ------------------------------------------------------------------------------------------------------------- the rules of design

GROWTH, RUN, EARLY, LARGEST = 2.0, 1.5, 3, 0.35
"""Our choice, so that the paper's own models for CIFAR keep all rules: the most a layer may widen; the mean length of a group of equal
layers; convolutions before the first down-sampling; the largest share of the parameters that one layer may hold."""


@dataclass(frozen=True)
class Rule:
    """A rule of design, whether the network keeps it, and what was found."""

    name: str
    kept: bool
    found: str


@dataclass(frozen=True)
class DesignCard:
    """What `design_card` found: the rules, and the layers they were read from."""

    rules: tuple[Rule, ...]
    layers: tuple[Ran, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the rules that are not kept."""
        return tuple(rule.name for rule in self.rules if not rule.kept)

    def table(self) -> str:
        """One line a rule."""
        return "\n".join(f"{'kept' if rule.kept else 'BROKEN':7} {rule.name:28} {rule.found}" for rule in self.rules)


def design_card(model: nn.Module, example: Tensor) -> DesignCard:
    """The paper's rules of design held against any convolutional network, by running it once on `example` (section 3 of the paper).

    Read from convolutions and linear layers in the order they run, so branches are read one after the other; 1x1 convolutions of
    pooled features (gates) count for the parameters only. The rules: widths grow gradually; equal layers stand in groups; 1x1
    convolutions, which see no neighbours, come late; so does down-sampling; no layer holds most of the parameters; kernels are those that
    hardware runs fast, dense 3x3; maps are pooled, not strided over. "Regularise last" is a rule
    about the order of work and cannot be read from a network. The paper gives no limits; ours are `GROWTH`, `RUN`, `EARLY` and `LARGEST`.
    Raises ValueError for a model that runs no convolution. A broken rule is a question, not a fault: the paper's models for ImageNet
    break two of them for speed.

    >>> import torch
    >>> model = SimpleNet(IMAGENET_5M, scale=0.125, stride_mode=1).eval()
    >>> design_card(model, torch.zeros(1, 3, 64, 64)).broken
    ('late down-sampling', 'pooling, no strides')
    """
    layers = layers_run(model, example)
    convolutions = [
        layer
        for layer in layers
        if isinstance(layer.module, nn.Conv2d) and (layer.kernel > 1 or layer.given[2:] != (1, 1))
    ]
    if not convolutions:
        raise ValueError(f"model must run a convolution, {type(model).__name__} ran none")
    rules = (
        _growth([layer for layer in convolutions if layer.kernel > 1]),
        _groups(convolutions),
        _local(convolutions),
        _late(convolutions),
        _balance(layers),
        _kernels(convolutions),
        _pooled(convolutions),
    )
    return DesignCard(rules, tuple(layers))


def _growth(spatial: Sequence[Ran]) -> Rule:
    widths = [layer.gave[1] for layer in spatial]
    ratios = [b / a for a, b in zip(widths, widths[1:], strict=False)]
    most = max(ratios, default=1.0)
    where = f" at {spatial[ratios.index(most) + 1].name}" if ratios else ""
    return Rule(
        "gradual growth", most <= GROWTH, f"at most {most:.3g} times wider from one spatial layer to the next{where}"
    )


def _groups(convolutions: Sequence[Ran]) -> Rule:
    kinds = [(layer.kernel, layer.gave[1], getattr(layer.module, "groups", 1)) for layer in convolutions]
    mean = len(kinds) / len(list(groupby(kinds)))
    return Rule("homogeneous groups", mean >= RUN, f"{mean:.3g} equal layers stand together on average")


def _local(convolutions: Sequence[Ran]) -> Rule:
    first = next((place for place, layer in enumerate(convolutions) if layer.kernel == 1), None)
    name = "1x1 convolutions late"
    if first is None:
        return Rule(name, True, "there are none")
    return Rule(name, 2 * first >= len(convolutions), f"the first is number {first + 1} of {len(convolutions)}")


def _late(convolutions: Sequence[Ran]) -> Rule:
    sides = [(min(layer.given[2:]), min(layer.gave[2:])) for layer in convolutions]
    for place, (layer, (given, _)) in enumerate(zip(convolutions, sides, strict=True)):
        if _stride(layer) > 1 or place and given < sides[place - 1][1]:
            return Rule("late down-sampling", place >= EARLY, f"{place} convolutions come before the first")
    return Rule("late down-sampling", True, "there is none")


def _balance(layers: Sequence[Ran]) -> Rule:
    own = {layer.name: layer.params for layer in layers}  # a shared layer counts once
    name = max(own, key=lambda name: own[name])
    share = own[name] / max(sum(own.values()), 1)
    return Rule("balanced parameters", share <= LARGEST, f"{name} holds {share:.0%} of those of all layers")


def _kernels(convolutions: Sequence[Ran]) -> Rule:
    odd = [layer.name for layer in convolutions if layer.kernel > 1 and not _dense3(layer.module)]
    found = f"{len(odd)} of {len(convolutions)} layers are neither 1x1 nor dense 3x3"
    return Rule("fast kernels", not odd, f"{found} ({', '.join(odd[:3])})" if odd else found)


def _dense3(module: nn.Conv2d | nn.Linear) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.groups == 1
        and module.dilation == (1, 1)
    )


def _pooled(convolutions: Sequence[Ran]) -> Rule:
    strided = sum(_stride(layer) > 1 for layer in convolutions)
    return Rule("pooling, no strides", not strided, f"{strided} convolutions have strides")


def _stride(layer: Ran) -> int:
    return max(layer.module.stride) if isinstance(layer.module, nn.Conv2d) else 1
