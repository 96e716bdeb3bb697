"""The detector: maps out of a graph of layers, boxes and scores out of maps, what is found out of those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.boxes import batched_nms
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.vision.leyolo.blocks import BINS, Concat, Head
from assay.methods.vision.leyolo.graph import MODULES, Builder, Graph, Wiring, built, places, published

GREY = 114 / 255  # what images are filled up with, of values in [0, 1]


@dataclass(frozen=True)
class Found:
    """What was found in an image, the best first: boxes (n, 4) left, top, right, bottom in pixels; scores (n,) in (0, 1); labels (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class LeYOLO(nn.Module):
    """The detector of a graph: images (B, in_chans, H, W), values in [0, 1], to a raw map for each level, fine to coarse.

    A map is (B, 64 + num_classes, H/stride, W/stride): 16 logits for each of four distances, and the logits of the classes. `strides` and
    `num_classes` are attributes. H and W must be multiples of `multiple`, the coarsest stride; `detect` takes any size. Layers that
    no head reads, as there are in the released Medium, keep their weights and are not run.

    `modules` is the table in which the graph's names are looked up. A layer that reads several maps is given them as a list.
    Raises ValueError for a graph that cannot be built.
    When not to use it: for speed on hardware that runs dense convolutions well. Depthwise layers move as many bytes for far fewer
    operations, and a detector of dense ones can be faster in spite of several times the operations: measure both.

    >>> model = LeYOLO(published("nano", num_classes=10)).eval()
    >>> [tuple(each.shape) for each in model(torch.zeros(1, 3, 64, 96))]
    [(1, 74, 8, 12), (1, 74, 4, 6), (1, 74, 2, 3)]
    """

    layouts: ClassVar[Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]] = {}
    """By name, what turns a state dict in somebody's layout into ours, for `core.vision.weights.load_weights`."""

    def __init__(self, graph: Graph, *, in_chans: int = 3, modules: Mapping[str, Builder] = MODULES) -> None:
        super().__init__()
        self.graph, self.in_chans = graph, checks.whole("in_chans", in_chans, low=1)
        made = built(graph, self.in_chans, modules)
        self.layers = nn.ModuleList(each.module for each in made)
        self.reads = [places(number, node) for number, node in enumerate(graph.nodes)]
        needed = {len(made) - 1}
        for number in reversed(range(len(made))):
            if number in needed:
                needed.update(self.reads[number])
        self.runs = sorted(needed - {-1})
        self.last = {at: number for number in self.runs for at in self.reads[number]}  # who reads each map last
        self.channels = tuple(made[at].channels for at in self.reads[-1])
        self.strides = tuple(made[at].stride for at in self.reads[-1])
        self.num_classes, self.multiple = graph.num_classes, max(each.stride for each in made)

    @property
    def head(self) -> Head:
        """The last layer."""
        head = self.layers[-1]
        assert isinstance(head, Head)
        return head

    def levels(self, x: Tensor) -> list[Tensor]:
        """What the head reads, in its order. A map is let go when the last layer that reads it has run."""
        self.check_images(x)
        kept = {-1: x}
        for number in self.runs[:-1]:
            layer, given = self.layers[number], [kept[at] for at in self.reads[number]]
            kept[number] = layer(given) if len(given) > 1 or isinstance(layer, Concat) else layer(given[0])
            for at in set(self.reads[number]):
                if self.last.get(at) == number:
                    del kept[at]
        return [kept[at] for at in self.reads[-1]]

    def feature_maps(self, x: Tensor) -> dict[int, Tensor]:
        """What the head reads by stride, (B, channels, H/stride, W/stride) each: for other heads on this backbone and neck."""
        return dict(zip(self.strides, self.levels(x), strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.head(self.levels(x))

    def check_images(self, x: Tensor) -> None:
        """Raises TypeError or ValueError, naming x, for what are no images of this model."""
        shape = ("batch", self.in_chans, "height", "width")
        checks.tensor("x", x, shape=shape, dtype=next(self.parameters()).dtype)
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"x must have sides that are multiples of {self.multiple}, got {tuple(x.shape[2:])}")

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) in pixels and scores (B, N, num_classes) of all N cells, level by level, in float32.

        A distance is the mean of the 16 bins under the softmax of its logits, 0 to 15 strides; a box reaches that far from the centre
        of its cell to the left, top, right and bottom, also over the edge of the image.
        """
        distances, labels = self.raw(maps)
        points, strides = self.cells(maps)
        reach = distances.softmax(-1) @ self.head.bins.float()
        return corners(reach, points, strides), labels.sigmoid()

    def raw(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of bins (B, N, 4, 16) and of classes (B, N, num_classes), of all cells, in float32."""
        checks.whole("maps: their number", len(maps), low=len(self.strides), high=len(self.strides))
        shape = ("batch", 4 * BINS + self.num_classes, "height", "width")
        flat = torch.cat([checks.tensor("a map", each, shape=shape).flatten(2) for each in maps], 2).mT.float()
        return flat[..., : 4 * BINS].unflatten(2, (4, BINS)), flat[..., 4 * BINS :]

    def cells(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The centres of all cells (N, 2), x and y in pixels, and the stride of each (N, 1)."""
        points, strides = [], []
        for stride, each in zip(self.strides, maps, strict=True):
            height, width = each.shape[2:]
            y, x = (torch.arange(side, device=each.device, dtype=torch.float) for side in (height, width))
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
            points.append((grid + 0.5) * stride)
            strides.append(grid.new_full((height * width, 1), stride))
        return torch.cat(points), torch.cat(strides)

    @torch.no_grad()
    def detect(self, images: Tensor, *, threshold: float = 0.25, overlap: float = 0.7, most: int = 300) -> list[Found]:
        """What is found in each of some images, which may be of any size.

        Images are filled up with grey to the right and below, and boxes end at the image's edge. See `select` for the settings.
        Raises ValueError for those outside of [0, 1], for no `most`, and for a model that is training.
        """
        if self.training:
            raise ValueError("model must be in eval mode: a BatchNorm that is training depends on the batch")
        checks.tensor("images", images, shape=("batch", self.in_chans, "height", "width"))
        height, width = images.shape[2:]
        pad = (0, -width % self.multiple, 0, -height % self.multiple)
        boxes, scores = self.decode(self(F.pad(images, pad, value=GREY)))
        limits = boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        return [
            select(one, each, threshold=threshold, overlap=overlap, most=most)
            for one, each in zip(boxes, scores, strict=True)
        ]


def corners(reach: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Boxes (..., N, 4) that reach (..., N, 4) strides to the left, top, right and bottom of points (N, 2)."""
    far = reach * strides
    return torch.cat([points - far[..., :2], points + far[..., 2:]], -1)


def select(
    boxes: Tensor,
    scores: Tensor,
    *,
    threshold: float = 0.25,
    overlap: float = 0.7,
    most: int = 300,
    candidates: int = 3000,
) -> Found:
    """What stays of an image's boxes (N, 4) with scores (N, classes): each box with its best class, where that reaches `threshold`.

    Of the `candidates` best ones, a box goes that overlaps a better one of its class by more than `overlap` (IoU); `most` stay at most.
    """
    threshold = checks.number("threshold", threshold, low=0, high=1)
    overlap = checks.number("overlap", overlap, low=0, high=1)
    most, candidates = checks.whole("most", most, low=1), checks.whole("candidates", candidates, low=1)
    best, labels = scores.max(1)
    kept = (best >= threshold).nonzero()[:, 0]
    kept = kept[best[kept].argsort(descending=True, stable=True)[:candidates]]
    kept = kept[batched_nms(boxes[kept], best[kept], labels[kept], overlap)[:most]]
    return Found(boxes[kept], best[kept], labels[kept])


def leyolo(
    name: str = "nano",
    *,
    num_classes: int = 80,
    in_chans: int = 3,
    wiring: Wiring = "intended",
    width: float | None = None,
) -> LeYOLO:
    """LeYOLO "nano", "small", "medium" or "large" with random weights; see `graph.published` for `wiring` and `width`.

    >>> sum(p.numel() for p in leyolo("nano").parameters())
    1120480
    """
    return LeYOLO(published(name, num_classes=num_classes, wiring=wiring, width=width), in_chans=in_chans)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code, or of its kin, with our keys; `load_weights(model, state)` finds out by itself.

    Published weights are pickled models, which run code when they are loaded: somebody has to save their state dict on its own.
    Raises ValueError for a key that is none of that code's.
    """
    expand = {key.split(".layers.")[0] for key in state if ".layers.3." in key}  # blocks of three convolutions
    found = {}
    for key, tensor in state.items():
        root, number, *rest = key.split(".")
        if root != "model" or not number.isdigit() or not rest or rest[0] == "layers" and len(rest) < 3:
            raise ValueError(f"state must have keys model.NUMBER.NAME, got {key!r}")
        name = _renamed(rest, f"model.{number}" in expand)
        found[f"layers.{number}.{name}"] = tensor.flatten() if name == "bins" else tensor
    return found


LeYOLO.layouts = {"official": from_official}
_PARTS = {"c": "conv", "bn": "norm", "cv1": "reduce", "cv2": "project"}
_BRANCHES = {"cv2": "box", "cv3": "label"}
_BLOCK = ("expand", "depthwise", "project.conv", "project.norm")


def _renamed(rest: list[str], expands: bool) -> str:
    if rest == ["dfl", "conv", "weight"]:
        return "bins"
    if rest[0] == "layers" and rest[1] in ("0", "1", "2", "3"):
        rest = [_BLOCK[(int(rest[1]) + (not expands)) % 4], *rest[2:]]
    elif rest[0] in _BRANCHES and len(rest) > 1 and rest[1].isdigit():
        rest = [_BRANCHES[rest[0]], *rest[1:]]
    return ".".join(_PARTS.get(each, each) for each in rest)


class Deployed(nn.Module):
    """The detector as one function of images: boxes (B, N, 4) in pixels and scores (B, N, classes). Its norms are folded away."""

    def __init__(self, model: LeYOLO, example: Tensor) -> None:
        super().__init__()
        self.model = fold_batch_norm(model, example)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.model, LeYOLO)
        return self.model.decode(self.model(images))


def deployed(model: LeYOLO, example: Tensor) -> Deployed:
    """A copy of a model in eval mode for inference: every norm folded into the convolution before it, which the released code does only in
    the head and the pooled pyramid. `example` are images to find the pairs by. Raises ValueError for a model that is training."""
    model.check_images(example)
    return Deployed(model, example)


def export_onnx(model: LeYOLO, path: str | Path, example: Tensor) -> None:
    """Write `deployed(model, example)` as an ONNX file, whole or not at all: `images`, of the example's size in any batch, to `boxes` and
    `scores`. What overlaps is still in it (`select`). Raises MissingError without onnx and onnxscript (`assay[onnx]`)."""
    import importlib.util

    from assay.errors import MissingError
    from assay.paths import atomic_file

    if absent := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise MissingError(f"an ONNX file needs {', '.join(absent)}: pip install 'assay[onnx]'")
    whole = deployed(model, example)
    sample = example if len(example) > 1 else example.repeat(2, 1, 1, 1)
    program = torch.onnx.export(
        whole.eval(), (sample,), dynamo=True, input_names=["images"], output_names=["boxes", "scores"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False,
    )  # fmt: skip
    assert program is not None
    with atomic_file(Path(path)) as temporary:
        program.save(str(temporary), external_data=False)
