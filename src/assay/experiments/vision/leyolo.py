"""LeYOLO: how many multiply-accumulates it saves at equal accuracy against YOLOv8n's shape, and its accuracy at as many.

COCO comes with no package: accuracy is the average precision of networks of half the published widths on held-out scenes of digits.
At small scale every digit is one class, "digit": finding them is learnt in hundreds of steps, telling ten of them apart is not.
Operations saved are not time saved, so times of the published networks stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Trained, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.rivals import macs, parameters
from assay.experiments.vision.scenes import Scored, error_for_choice, gap, guarded, pixels, scenes, scored
from assay.measure.clock import compare_many
from assay.measure.detection import Match, Objects, average_precision, match
from assay.methods.core.vision.boxes import iou
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.vision.leyolo import (
    MODULES,
    ConvNorm,
    Found,
    Graph,
    Head,
    LeYOLO,
    Made,
    Node,
    Place,
    head_of,
    losses,
    published,
    select,
)
from assay.workloads.digit_scenes import Scene

SIZE, STEPS, BATCH = 64, 500, 8  # pixels a side, steps, scenes of one: our choice, what two cores train in minutes
SEARCHED = 200  # steps of the search for rates
RATES = "leyolo/ap"
MARGIN = 3.0  # points of AP that may be lost: about what an interval over sixty scenes and three seeds can tell

# ------------------------------------------------------------------------------------------------------------- YOLOv8n's shape


class Bottleneck(nn.Module):
    """Two dense 3x3 convolutions, added to what comes in where `added`."""

    def __init__(self, channels: int, added: bool) -> None:
        super().__init__()
        self.first, self.second = (ConvNorm(channels, channels, 3, bias=False) for _ in range(2))
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return x + y if self.added else y


class C2f(nn.Module):
    """A split, bottlenecks in a row on one half, and all that they gave joined, between 1x1 convolutions."""

    def __init__(self, channels_in: int, channels_out: int, repeats: int, added: bool) -> None:
        super().__init__()
        self.part = channels_out // 2
        self.reduce = ConvNorm(channels_in, 2 * self.part, bias=False)
        self.blocks = nn.ModuleList(Bottleneck(self.part, added) for _ in range(repeats))
        self.project = ConvNorm((2 + repeats) * self.part, channels_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found = list(self.reduce(x).split(self.part, 1))
        for block in self.blocks:
            found.append(block(found[-1]))
        y: Tensor = self.project(torch.cat(found, 1))
        return y


class DenseHead(Head):
    """YOLOv8's head: in each branch two dense 3x3 convolutions, and a 1x1 that predicts."""

    def branch(self, channels_in: int, width: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            ConvNorm(channels_in, width, 3, bias=False),
            ConvNorm(width, width, 3, bias=False),
            nn.Conv2d(width, out, 1),
        )


def _c2f(place: Place) -> Made:
    args = place.arguments(1, 2)
    out = place.width(args[0])
    return Made(C2f(place.one, out, place.repeats, args[1:] == [True]), out, place.strides[0])


class NarrowHead(DenseHead):
    """The same, no branch wider than the map it reads: what narrows a network must narrow its head, which is half of its work."""

    def branch(self, channels_in: int, width: int, out: int) -> nn.Sequential:
        return super().branch(channels_in, min(width, channels_in), out)


YOLO = {**MODULES, "C2f": _c2f}


def yolov8(width: float = 0.25, *, most: int = 1024, head: type[Head] = DenseHead, num_classes: int = 80) -> LeYOLO:
    """YOLOv8n's shape, its width given: C2f blocks of dense 3x3 convolutions all through. Under our detector, so under the same loss.

    `most`: channels, before they are multiplied by `width`, that no layer has more of.
    """

    def conv(channels: int) -> Node:
        return Node("Conv", (channels, 3, 2))

    def block(channels: int, repeats: int = 3, added: bool = False) -> Node:
        return Node("C2f", (channels, added), repeats=repeats)

    def join(*sources: int) -> Node:
        return Node("Concat", (1,), sources)

    up = Node("nn.Upsample", (None, 2, "nearest"))
    nodes = (
        conv(64), conv(128), block(128, 3, True), conv(256), block(256, 6, True), conv(512), block(512, 6, True),
        conv(1024), block(1024, 3, True), Node("SPPF", (1024, 5)),
        up, join(-1, 6), block(512), up, join(-1, 4), block(256),
        conv(256), join(-1, 12), block(512), conv(512), join(-1, 9), block(1024), Node("Detect", ("nc",), (15, 18, 21)),
    )  # fmt: skip
    return LeYOLO(Graph(nodes, num_classes, 0.33, width, most, 10), modules={**YOLO, "Detect": head_of(head)})


# --------------------------------------------------------------------------------------------------------------------- arms

HALF_SMALL, HALF_YOLO = 0.665, 0.125  # half the widths of LeYOLO-Small and of YOLOv8n


def narrow_yolov8(classes: int) -> LeYOLO:
    """YOLOv8n's shape narrowed, head and all, until it has as many MACs as LeYOLO (1.4 % fewer).

    With the published head, which is never narrower than 64 channels, three quarters of them would be spent there.
    """
    return yolov8(0.079, most=900, head=NarrowHead, num_classes=classes)


def half_small(classes: int) -> LeYOLO:
    """LeYOLO-Small at half its widths."""
    return LeYOLO(published("small", num_classes=classes, width=HALF_SMALL))


def patches(classes: int) -> LeYOLO:
    """The network left out: LeYOLO's head on embedded patches of 8, 16 and 32 pixels."""
    stem = Node("mn_conv", (32, 8, 8, "SI"))
    coarser = (Node("mn_conv", (64, 2, 2, "SI")), Node("mn_conv", (96, 2, 2, "SI")))
    return LeYOLO(Graph((stem, *coarser, Node("Detect", ("nc",), (0, 1, 2))), classes))


def random_features(classes: int) -> LeYOLO:
    """Backbone and neck stay as they were drawn, but for the statistics of their norms; the head learns."""
    model = half_small(classes)
    for layer in model.layers[:-1]:
        layer.requires_grad_(False)
    return model


ARMS: dict[str, Callable[[int], LeYOLO]] = {
    "leyolo": half_small,
    "yolov8": lambda classes: yolov8(HALF_YOLO, num_classes=classes),
    "narrow yolov8": narrow_yolov8,
    "random features": random_features,
    "patches": patches,
}
UNTRAINED = ("random features", "patches")  # controls that cannot learn much: held to no floor


def make(arm: str, size: int, classes: int = 1) -> LeYOLO:
    """An untrained detector that expects about as many objects as stand in a scene of `size` pixels, and boxes as small as digits.

    Bins begin with weights that fall by exp(-1/2) each: distances of about 1.5 strides. Equal weights are 7.5: boxes wider than a scene.
    """
    model = ARMS[arm](classes)
    model.head.set_prior(size)
    with torch.no_grad():
        for branch in model.head.box:
            branch[-1].bias.copy_(-0.5 * model.head.bins.repeat(4))  # type: ignore[index]
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def maps_of(model: LeYOLO, some: Sequence[Scene]) -> list[Tensor]:
    """What it says of some scenes; channels last, where depthwise convolutions take a fifth less time."""
    maps: list[Tensor] = model(pixels(some).contiguous(memory_format=torch.channels_last))
    return maps


def loss(model: nn.Module, some: Sequence[Scene]) -> Tensor:
    """Of a batch of scenes. A model of one class takes every digit for one."""
    assert isinstance(model, LeYOLO)
    labels = [scene.labels % model.num_classes for scene in some]
    return losses(model, maps_of(model, some), [scene.boxes for scene in some], labels).total


def outcome(model: nn.Module, some: Sequence[Scene]) -> list[dict[int, Match]]:
    """What was found in some scenes, matched with what is there."""
    assert isinstance(model, LeYOLO)
    found = []
    for scene, boxes, scores in zip(some, *model.decode(maps_of(model, some)), strict=True):
        found.append(matched(select(boxes, scores, threshold=0.001, most=100), scene, model.num_classes))
    return found


def matched(found: Found, scene: Scene, classes: int) -> dict[int, Match]:
    """Boxes held against those of a scene."""
    guesses = Objects(found.boxes.numpy(), found.labels.numpy(), found.scores.numpy())
    return match(guesses, Objects(scene.boxes.numpy(), (scene.labels % classes).numpy()))


@cache
def floor(size: int, classes: int) -> float:
    """AP of what looks at no image: the boxes that overlap most of the training scenes' digits by a half, the same in every scene."""
    seen = scenes("train", size)
    boxes, labels = torch.cat([scene.boxes for scene in seen]), torch.cat([scene.labels for scene in seen]) % classes
    alike = (iou(boxes[:, None], boxes) > 0.5) & (labels[:, None] == labels)
    worth = torch.zeros(len(boxes), classes).scatter_(1, labels[:, None], alike.float().mean(1, keepdim=True))
    found = select(boxes, worth, threshold=0.0, most=100)
    return average_precision([matched(found, scene, classes) for scene in scenes("heldout", size)])


@searched(RATES, arms=tuple(ARMS), grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def rate_score(arm: str, rate: float) -> float:
    """1 less the AP on the scenes for choices, after fewer steps."""
    build = partial(make, arm, SIZE)
    return error_for_choice(build, loss, outcome, average_precision, rate, SEARCHED, size=SIZE, batch=BATCH)


@cache
def shown(arm: str, steps: int, size: int, classes: int) -> Scored:
    """An arm trained at its rate under each seed."""
    build = partial(make, arm, size, classes)
    return scored(build, loss, outcome, average_precision, chosen(RATES, arm), steps, size=size, batch=BATCH)


def all_shown(arms: Iterable[str], steps: int, size: int, classes: int) -> dict[str, Scored]:
    """Several arms."""
    return {arm: shown(arm, steps, size, classes) for arm in arms}


def trained(arms: dict[str, Scored], size: int, classes: int) -> dict[str, Trained]:
    """For the record: networks must beat boxes that look at no image, and the head without a network, or the steps were too few."""
    least = max(
        (floor(size, classes), "the same boxes in every scene"), (arms["patches"].value / 100, "the head on patches")
    )
    return {name: arm.trained(*least) for name, arm in arms.items() if name not in UNTRAINED}


def precision_at_half(arm: Scored) -> float:
    """AP at an IoU of 0.5, in per cent, the mean over seeds."""
    return 100 * sum(average_precision(each, iou=0.5) for each in arm.found) / len(arm.found)


def counts(arms: Iterable[str], size: int, classes: int) -> dict[str, dict[str, int]]:
    """Parameters, and MACs of a scene, by arm."""
    with torch.device("meta"):
        made = {arm: ARMS[arm](classes) for arm in arms}
    return {
        "parameters": {arm: parameters(model) for arm, model in made.items()},
        "macs": {arm: macs(model, size) for arm, model in made.items()},
    }


def times(size: int) -> dict[str, Any]:
    """Milliseconds of LeYOLO-Small and YOLOv8n as published (80 classes) on one image, with one thread and with all; norms folded."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, size, size)
    models = {"leyolo small": LeYOLO(published("small")), "yolov8n": yolov8()}
    folded = {name: fold_batch_norm(model.eval(), image) for name, model in models.items()}

    def run(model: nn.Module) -> Callable[[], Any]:
        @torch.inference_mode()
        def once() -> Any:
            return model(image)

        return once

    runs, threads, found = {name: run(model) for name, model in folded.items()}, torch.get_num_threads(), {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        seen = compare_many(runs, rounds=12, max_seconds=20)
        pair = seen.paired("yolov8n", "leyolo small")
        found[f"{count} threads"] = {
            "ms": {"yolov8n": 1e3 * pair.baseline_time.median, "leyolo small": 1e3 * pair.candidate_time.median},
            "speed-up": [pair.speedup.median, pair.speedup.low, pair.speedup.high],
            "noisy": seen.noisy,
        }
    torch.set_num_threads(threads)
    return found


DETECTOR = Operator("an object detector", free="YOLOv8n's shape, narrowed until it has as many multiply-accumulates")
PAPER: dict[str, Any] = {
    "data": "COCO",
    "classes": 80,
    "net": "LeYOLO-Small at 640 pixels",
    "training": "the recipe of YOLOv8",
}
DEPARTURES = {
    "data": f"scenes of digits on textures, {SIZE} pixels a side: COCO comes with no package",
    "classes": "one, a digit, and ten at full scale: to tell digits apart is not learnt in minutes",
    "net": "half the published widths, and so are those of YOLOv8n's shape: they train in minutes",
    "training": f"{STEPS} steps of {BATCH} scenes, AdamW, rates searched at {SEARCHED} steps, nothing mirrored or mixed; all arms begin "
    "with about a scene's number of objects and with small boxes",
}


@experiment(
    "leyolo/computation-reduction",
    points={
        "smoke": [{"size": 64, "steps": 2, "classes": 1, "time_at": 64}],
        "small": [{"size": SIZE, "steps": STEPS, "classes": 1, "time_at": 320}],
        "full": [{"size": 128, "steps": 5 * STEPS, "classes": 10, "time_at": 640}],
    },
    operator=DETECTOR,
    guard=Guard("AP on held-out scenes of digits, per cent", MARGIN, higher_is_better=True, relative=False),
    paper={**PAPER, "rival": "YOLOv9-tiny"},
    departures={
        **DEPARTURES,
        "rival": "YOLOv8n's shape, dense 3x3 convolutions all through: on COCO it takes 8.7 GFLOP for 37.3 AP, YOLOv9-tiny 7.7 for 38.3",
    },
    refuted_if="the whole interval of LeYOLO's AP over YOLOv8n's shape lies below minus the margin",
    refutes=lambda record: record["details"]["gain in points"]["high"] < -MARGIN,
    measured_here="multiply-accumulates of networks of half the published widths, whose AP on scenes of digits is within the margin",
    minutes=240,
)
def computation_reduction(size: int, steps: int, classes: int, time_at: int) -> Figure:
    """Multiply-accumulates that LeYOLO does without, per cent of YOLOv8n's shape, and whether its AP is worth it.

    Free: narrowing YOLOv8n's shape to as many saves as much, where its AP stays within the margin. Deleted: the head on embedded patches,
    without backbone and neck. Random: backbone and neck as they were drawn. An arm: the time that the published networks save.
    """
    arms = all_shown(ARMS, steps, size, classes)
    found = counts(ARMS, size, classes)
    saved = {arm: 100 * (1 - count / found["macs"]["yolov8"]) for arm, count in found["macs"].items()}
    gain, low, high = gap(arms["leyolo"], arms["yolov8"])
    controls = {"deleted": "patches", "random": "random features", "rival": "narrow yolov8"}
    lost = arms["yolov8"].value - arms["narrow yolov8"].value
    clock = times(time_at)
    every = clock[f"{torch.get_num_threads()} threads"]["ms"]
    return Figure(
        saved["leyolo"],
        "%",
        baseline=0.0,
        free=saved["narrow yolov8"] if lost <= MARGIN else 0.0,
        arms={"the time of a forward pass, published networks": 100 * (1 - every["leyolo small"] / every["yolov8n"])},
        quality=guarded(
            arms["leyolo"],
            arms["yolov8"],
            {role: arms[arm] for role, arm in controls.items()},
            "YOLOv8n's shape of as many multiply-accumulates",
        ),
        trained=trained(arms, size, classes),
        details={
            "gain in points": {"median": gain, "low": low, "high": high},
            "AP": {name: arm.value for name, arm in arms.items()},
            "AP at an IoU of 0.5": {name: precision_at_half(arm) for name, arm in arms.items()},
            **found,
            "times": clock,
        },
    )


@experiment(
    "leyolo/ap-small",
    points={
        "smoke": [{"size": 64, "steps": 2, "classes": 1}],
        "small": [{"size": SIZE, "steps": STEPS, "classes": 1}],
        "full": [{"size": 128, "steps": 5 * STEPS, "classes": 10}],
    },
    operator=DETECTOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of LeYOLO's AP lies below that of YOLOv8n's shape of as many multiply-accumulates",
    measured_here="AP on held-out scenes of digits, over that of YOLOv8n's shape of as many multiply-accumulates",
    minutes=240,
)
def ap_small(size: int, steps: int, classes: int) -> Figure:
    """AP of LeYOLO, in per cent, over that of YOLOv8n's shape of as many multiply-accumulates, which is free.

    The interval is that of the difference: scenes and seeds are resampled in pairs. Controls as in the other claim; the rival is the
    baseline.
    """
    arms = all_shown(("leyolo", "narrow yolov8", "random features", "patches"), steps, size, classes)
    _, low, high = gap(arms["leyolo"], arms["narrow yolov8"])
    start, value = arms["narrow yolov8"].value, arms["leyolo"].value
    return Figure(
        value,
        "AP",
        start + low,
        start + high,
        baseline=start,
        free=start,
        controls={"deleted": arms["patches"].value, "random": arms["random features"].value, "rival": start},
        trained=trained(arms, size, classes),
        details={
            "AP at an IoU of 0.5": {name: precision_at_half(arm) for name, arm in arms.items()},
            **counts(arms, size, classes),
        },
    )
