"""A detector as a list of layers, each with the layers it reads: the published ones, and those of files in the YOLO family's form.

    graph = read_graph("leyolonano.yaml")            # rows of [from, repeats, module, args]; the file is data and runs nothing
    graph = published("small", wiring="as_released")

A module is looked up in a closed table, `MODULES`; whoever wants more hands a larger one to the detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from assay import checks
from assay.methods.vision.leyolo.blocks import (
    ACTIVATIONS,
    Concat,
    ConvNorm,
    Head,
    InvertedBottleneck,
    PooledPyramid,
)

Wiring = Literal["intended", "as_released"]
WIRINGS: tuple[Wiring, ...] = ("intended", "as_released")
MOST_BYTES, MOST_ROWS, MOST_REPEATS, MOST_CHANNELS, MOST_KERNEL, MOST_PARAMETERS = 2**18, 512, 64, 16384, 31, 2**30
MOST_DEPTH = 16  # of lists in lists
MOST_LAYERS, MOST_STRIDE = 1024, 4096  # with their repeats; of a map
"""Limits, which no detector reaches, so that a file from anywhere cannot fill the memory."""


@dataclass(frozen=True)
class Node:
    """One layer: the numbers of the layers it reads (-1 is the one before, in the first layer the image), its name in the table, its
    arguments as they stand in a file, and how many times it stands in a row."""

    module: str
    args: tuple[Any, ...] = ()
    sources: tuple[int, ...] = (-1,)
    repeats: int = 1


@dataclass(frozen=True)
class Graph:
    """The layers, the last of which is the head, and their scale: channels are min(channels, most_channels) * width, up to a multiple of
    8; repeats above 1 are multiplied by depth and rounded. `backbone` layers come first; that they are told apart says nothing."""

    nodes: tuple[Node, ...]
    num_classes: int = 80
    depth: float = 1.0
    width: float = 1.0
    most_channels: int = 576
    backbone: int = 0

    def channels(self, wanted: int) -> int:
        """As many as the scale makes of them. Always rounded up, unlike in MobileNets.

        >>> Graph((), width=1.33).channels(32)
        48
        """
        return math.ceil(min(wanted, self.most_channels) * self.width / 8) * 8

    def times(self, repeats: int) -> int:
        """Repeats by the scale's depth."""
        return max(round(repeats * self.depth), 1) if repeats > 1 else repeats

    def as_mapping(self) -> dict[str, Any]:
        """What a YAML file of it holds; `graph_of` gives the graph again."""
        rows = [
            [
                node.sources[0] if len(node.sources) == 1 else list(node.sources),
                node.repeats,
                node.module,
                list(node.args),
            ]
            for node in self.nodes
        ]
        return {
            "nc": self.num_classes,
            "scales": {"n": [self.depth, self.width, self.most_channels]},
            "backbone": rows[: self.backbone],
            "head": rows[self.backbone :],
        }


@dataclass(frozen=True)
class Place:
    """What a module is built from: the channels and strides of the maps it reads, its node, and the graph."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    node: Node
    graph: Graph

    @property
    def one(self) -> int:
        """The channels of its only map. Raises ValueError where there are several."""
        if len(self.channels) != 1:
            raise ValueError(f"{self.node.module} must read one layer, got {list(self.node.sources)}")
        return self.channels[0]

    def arguments(self, low: int, most: int) -> list[Any]:
        """The node's. Raises ValueError for fewer than `low` or more than `most`."""
        if not low <= len(self.node.args) <= most:
            raise ValueError(f"{self.node.module} must have {low} to {most} arguments, got {list(self.node.args)}")
        return list(self.node.args)

    def width(self, value: Any) -> int:
        """Channels by the scale."""
        return self.graph.channels(checks.whole("channels", value, low=1, high=MOST_CHANNELS))

    @property
    def repeats(self) -> int:
        return self.graph.times(self.node.repeats)


@dataclass(frozen=True)
class Made:
    """A module, the channels that it gives, and the stride of its map."""

    module: nn.Module
    channels: int
    stride: int


Builder = Callable[[Place], Made]


def in_a_row(place: Place, out: int, stride: int, make: Callable[[int], nn.Module]) -> Made:
    """`make(channels_in)` as often as the node says; the stride is taken each time."""
    count = place.repeats
    whole = place.strides[0] * stride**count
    if whole > MOST_STRIDE:
        raise ValueError(
            f"a map must have a stride of at most {MOST_STRIDE}, got {place.strides[0]} * {stride}**{count}"
        )
    layers = [make(place.one if at == 0 else out) for at in range(count)]
    module = layers[0] if count == 1 else nn.Sequential(*layers)
    return Made(module, out, whole)


def _conv(place: Place, bias: bool) -> Made:
    args = place.arguments(1, 4)
    out, kernel, stride = place.width(args[0]), _kernel(args[1:2]), _stride(args[2:3])
    if kernel % 2 == 0 and kernel != stride:
        raise ValueError(f"kernel must be odd or the stride, {stride}, for maps of a whole size, got {kernel}")
    act = _activation(args[3]) if len(args) > 3 else nn.SiLU
    return in_a_row(place, out, stride, lambda c: ConvNorm(c, out, kernel, stride, bias=bias, act=act))


def _bottleneck(place: Place) -> Made:
    """Arguments: channels, kernel, expansion, an entry that is not read, activation, stride, pointwise."""
    args = place.arguments(3, 7)
    out, kernel = place.width(args[0]), _kernel(args[1:2])
    expansion = None if args[2] is None or args[2] == "None" else place.width(args[2])
    act, stride = _activation(args[4]) if len(args) > 4 else nn.ReLU6, _stride(args[5:6])
    pointwise = checks.flag("pointwise", args[6]) if len(args) > 6 else True

    def make(channels: int) -> nn.Module:
        return InvertedBottleneck(channels, out, kernel, expansion, stride, pointwise, act)

    return in_a_row(place, out, stride, make)


def _pooled(place: Place) -> Made:
    args = place.arguments(1, 2)
    out, kernel = place.width(args[0]), _kernel(args[1:2] or [5])
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}")
    if place.one < 2:
        raise ValueError("SPPF must read at least 2 channels, got 1")
    return in_a_row(place, out, 1, lambda c: PooledPyramid(c, out, kernel))


def _upsample(place: Place) -> Made:
    args = place.arguments(3, 3)
    if args[0] not in (None, "None") or args[2] != "nearest":
        raise ValueError(f"nn.Upsample must have the arguments None, a factor and 'nearest', got {args}")
    factor = checks.whole("the factor of nn.Upsample", args[1], low=1, high=8)
    if place.strides[0] % factor:
        raise ValueError(f"nn.Upsample cannot enlarge a map of stride {place.strides[0]} {factor} times")
    return Made(nn.Upsample(scale_factor=factor, mode="nearest"), place.one, place.strides[0] // factor)


def _concat(place: Place) -> Made:
    if place.arguments(0, 1) not in ([], [1]):
        raise ValueError(f"Concat must join channels, dimension 1, got {list(place.node.args)}")
    if len(set(place.strides)) > 1:
        raise ValueError(f"Concat must join maps of one stride, got strides {list(place.strides)}")
    return Made(Concat(), sum(place.channels), place.strides[0])


def head_of(make: type[Head]) -> Builder:
    """The builder of a head."""

    def build(place: Place) -> Made:
        if place.arguments(0, 1) not in ([], ["nc"], [place.graph.num_classes]):
            raise ValueError(f"{place.node.module} must have the argument nc, got {list(place.node.args)}")
        return Made(make(place.graph.num_classes, place.channels, place.strides), 0, place.strides[0])

    return build


def _kernel(given: Sequence[Any]) -> int:
    return checks.whole("kernel", given[0], low=1, high=MOST_KERNEL) if given else 1


def _stride(given: Sequence[Any]) -> int:
    return checks.whole("stride", given[0], low=1, high=32) if given else 1


def _activation(name: Any) -> type[nn.Module]:
    return ACTIVATIONS[checks.choice("activation", name, tuple(ACTIVATIONS))]


MODULES: Mapping[str, Builder] = {
    "mn_conv": lambda place: _conv(place, True),
    "Conv": lambda place: _conv(place, False),
    "MobileNetV3_BLOCK": _bottleneck,
    "InvertedBottleneck": _bottleneck,
    "SPPF": _pooled,
    "nn.Upsample": _upsample,
    "Concat": _concat,
    "Detect": head_of(Head),
}
"""The names that stand in released files, and what each builds."""


def built(graph: Graph, in_chans: int, modules: Mapping[str, Builder] = MODULES) -> list[Made]:
    """`made`, after it was tried without memory. Raises ValueError for more than 2**30 parameters."""
    with torch.device("meta"):
        count = sum(p.numel() for each in made(graph, in_chans, modules) for p in each.module.parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"a graph must have at most {MOST_PARAMETERS} parameters, got {count}")
    return made(graph, in_chans, modules)


def made(graph: Graph, in_chans: int, modules: Mapping[str, Builder] = MODULES) -> list[Made]:
    """Every layer of the graph. Raises ValueError or TypeError that names the layer for what cannot be built or joined."""
    found: list[Made] = []
    layers = 0
    checks.whole("num_classes", graph.num_classes, low=1, high=MOST_CHANNELS)
    if not 1 <= len(graph.nodes) <= MOST_ROWS:
        raise ValueError(f"a graph must have 1 to {MOST_ROWS} layers, got {len(graph.nodes)}")
    for number, node in enumerate(graph.nodes):
        try:
            checks.choice("module", node.module, tuple(modules))
            layers += graph.times(checks.whole("repeats", node.repeats, low=1, high=MOST_REPEATS))
            if layers > MOST_LAYERS:
                raise ValueError(
                    f"a graph must have at most {MOST_LAYERS} layers with their repeats, got {layers} so far"
                )
            read = [found[at] if at >= 0 else Made(nn.Identity(), in_chans, 1) for at in places(number, node)]
            place = Place(tuple(each.channels for each in read), tuple(each.stride for each in read), node, graph)
            found.append(modules[node.module](place))
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {number} ({checks.shown(node.module)}): {error}") from None
        if isinstance(found[-1].module, Head) != (number + 1 == len(graph.nodes)):
            raise ValueError(f"layer {number} ({node.module}): the last layer, and no other, must be a head")
    return found


def places(number: int, node: Node) -> list[int]:
    """The layers that layer `number` reads, counted from 0; -1 is the image. Raises ValueError for one that comes later."""
    found = []
    for source in node.sources:
        at = number + source if source < 0 else source
        if not (0 <= at < number or number == 0 and source == -1):
            raise ValueError(f"it must read layers before it, got {source}")
        found.append(at)
    if not found:
        raise ValueError("it must read a layer")
    return found


# ------------------------------------------------------------------------------------------------------------------- files


def read_graph(path: str | Path, *, scale: str = "") -> Graph:
    """The graph in a YAML file of the YOLO family; see `graph_of`. Raises ValueError for a file that is none, or has more than 256 KiB.

    The file is data: tags that make objects are refused, and so are references to other parts of it.
    """
    path = Path(path)
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path}: must have at most {MOST_BYTES} bytes")
    return graph_of(_parsed(text, path), scale=scale)


def _parsed(text: bytes, path: Path) -> Any:
    import yaml

    nested = False
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # one by one: what is nested deeply takes the reader for ever
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH or isinstance(event, yaml.AliasEvent):
                nested = True
                break
        if not nested:
            return yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # the last three: no value of its own tag
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is no YAML that can be read as data ({said})") from None
    raise ValueError(f"{path}: must not refer to other parts of itself, nor nest deeper than {MOST_DEPTH}")


def graph_of(given: Any, *, scale: str = "") -> Graph:
    """The graph of a mapping with nc, backbone and head, and with scales (name: [depth, width, most channels]) where it has any.

    `backbone` and `head` are rows of [from, repeats, module, args]. `scale` names one of the scales, "" is the first. Other keys are not
    read but for `activation`, `depth_multiple` and `width_multiple`, which are refused: they would change the layers. The scale applies to
    all channels, also where a row has as many as there are classes; the released reader leaves those as they are.
    Raises ValueError, naming the row, for anything else.
    """
    if not isinstance(given, Mapping) or not {"nc", "backbone", "head"} <= set(given):
        raise ValueError(f"a graph must be a mapping with nc, backbone and head, got {type(given).__name__}")
    if refused := sorted({"activation", "depth_multiple", "width_multiple"} & set(given)):
        raise ValueError(f"a graph must not have {', '.join(refused)}")
    scales = given.get("scales") or {"": [1.0, 1.0, MOST_CHANNELS]}
    if not isinstance(scales, Mapping):
        raise ValueError(f"scales must be a mapping of names, got {checks.shown(scales)}")
    name = checks.choice("scale", scale, list(scales)) if scale else next(iter(scales))
    numbers = scales[name]
    if not isinstance(numbers, list) or len(numbers) != 3:
        raise ValueError(f"a scale must be [depth, width, most channels], got {checks.shown(numbers)}")
    backbone, head = (_rows(given[part], part) for part in ("backbone", "head"))
    return Graph(
        (*backbone, *head),
        checks.whole("nc", given["nc"], low=1, high=MOST_CHANNELS),
        checks.number("depth", numbers[0], above=0, high=16),
        checks.number("width", numbers[1], above=0, high=16),
        checks.whole("most channels", numbers[2], low=1, high=MOST_CHANNELS),
        len(backbone),
    )


def _rows(given: Any, part: str) -> list[Node]:
    if not isinstance(given, list) or len(given) > MOST_ROWS:
        raise ValueError(f"{part} must be a list of at most {MOST_ROWS} rows, got {checks.shown(given)}")
    found = []
    for number, row in enumerate(given):
        where = f"{part}[{number}]"
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[3], list) or not isinstance(row[2], str):
            raise ValueError(f"{where} must be [from, repeats, module, args], got {checks.shown(row)}")
        sources = row[0] if isinstance(row[0], list) else [row[0]]
        plain = (str, int, float, bool, type(None))
        if not all(isinstance(each, plain) for each in row[3]):
            raise ValueError(f"{where}: arguments must be plain values, got {checks.shown(row[3])}")
        found.append(
            Node(
                row[2],
                tuple(row[3]),
                tuple(checks.whole(f"{where}: from", each) for each in sources),
                checks.whole(f"{where}: repeats", row[1], low=1, high=MOST_REPEATS),
            )
        )
    return found


# --------------------------------------------------------------------------------------------------------- published graphs

SIZES: dict[str, tuple[float, bool, int]] = {
    "nano": (1.0, False, 640),
    "small": (1.33, False, 640),
    "medium": (1.33, True, 640),
    "large": (1.33, True, 768),
}
"""By name: the width, whether every stage has one block more, and the side of the largest images that figures are published for."""


def published(name: str, *, num_classes: int = 80, wiring: Wiring = "intended", width: float | None = None) -> Graph:
    """LeYOLO "nano", "small", "medium" or "large". Large is Medium, on larger images.

    The released files of Medium and Large were made from those of Small without renumbering what the head reads: P3 before the last
    two of its blocks, P4 after the first of four, P5 straight from a join, so that four blocks serve nothing. `wiring="as_released"` is
    that, which the published operations belong to; "intended" reads the last block of each stage. Nano and Small have one wiring.
    `width` replaces the name's own. Raises ValueError for another name or wiring.
    """
    own, more, _ = SIZES[checks.choice("name", name, tuple(SIZES))]
    checks.choice("wiring", wiring, WIRINGS)
    nodes = [
        _mc(16, 3, 2), _mc(16, 1, 1), _ib(16, 3, 16, 2, False),
        _ib(32, 3, 96, 2), *(1 + more) * [_ib(32, 3, 96)],
    ]  # fmt: skip
    fine = len(nodes) - 1
    nodes += [_ib(64, 5, 96, 2), *(4 + more) * [_ib(64, 5, 192)]]
    middle = len(nodes) - 1
    nodes += [_ib(96, 5, 576, 2), *(3 + more) * [_ib(96, 5, 576)], Node("SPPF", (96, 5))]
    backbone = len(nodes)
    extra = more * [_ib(64, 5, 128)]
    nodes += [_UP, Node("Concat", (1,), (-1, middle)), *3 * [_ib(64, 5, 128)], *extra]
    downward = len(nodes) - 1
    nodes += [_UP, Node("Concat", (1,), (-1, fine)), _ib(32, 3, None, 1, False), *2 * [_ib(32, 3, 64)], *extra]
    heads = [len(nodes) - 1]
    nodes += [_mc(64, 3, 2), Node("Concat", (1,), (-1, downward)), *3 * [_ib(64, 5, 128)], *extra]
    heads += [len(nodes) - 1]
    nodes += [_mc(96, 3, 2), Node("Concat", (1,), (-1, backbone - 1)), *3 * [_ib(96, 5, 192)], *extra]
    heads += [len(nodes) - 1]
    if more and wiring == "as_released":
        heads = [heads[0] - 2, heads[1] - 3, heads[2] - 4]
    nodes += [Node("Detect", ("nc",), tuple(heads))]
    wide = own if width is None else checks.number("width", width, above=0, high=16)
    classes = checks.whole("num_classes", num_classes, low=1, high=MOST_CHANNELS)
    return Graph(tuple(nodes), classes, width=wide, backbone=backbone)


def _mc(channels: int, kernel: int, stride: int) -> Node:
    return Node("mn_conv", (channels, kernel, stride, "SI"))


def _ib(channels: int, kernel: int, expansion: int | None, stride: int = 1, pointwise: bool = True) -> Node:
    return Node("MobileNetV3_BLOCK", (channels, kernel, expansion, False, "SI", stride, pointwise))


_UP = Node("nn.Upsample", (None, 2, "nearest"))
