"""LeYOLO: how many multiply-accumulates it saves at equal accuracy against YOLOv8n's shape, and its accuracy at as many.

COCO comes with no package: accuracy is the average precision of networks of half the published widths on held-out scenes of digits.
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
from assay.experiments.vision.rivals import frozen, macs, parameters
from assay.experiments.vision.scenes import Scored, error_for_choice, gap, guarded, pixels, scored
from assay.measure.clock import compare_many
from assay.measure.detection import Match, Objects, average_precision, match
from assay.methods.core.vision.folding import fold_batch_norm
from assay.methods.vision.leyolo import (
    MODULES,
    ConvNorm,
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
from assay.workloads.digit_scenes import CLASSES, Scene

SIZE, STEPS = 96, 300  # pixels a side, steps: our choice, what two cores train in minutes
RATES = "leyolo/ap"
MARGIN = 3.0  # points of AP that may be lost: about what an interval over sixty scenes and three seeds can tell
FLOOR = "no box at all"

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


YOLO = {**MODULES, "C2f": _c2f, "Detect": head_of(DenseHead)}


def yolov8(width: float = 0.25, *, num_classes: int = 80) -> LeYOLO:
    """YOLOv8n's shape, its width given: C2f blocks of dense 3x3 convolutions all through. Under our detector, so under the same loss."""

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
    return LeYOLO(Graph(nodes, num_classes, 0.33, width, 1024, 10), modules=YOLO)


# --------------------------------------------------------------------------------------------------------------------- arms

HALF_SMALL, HALF_YOLO, NARROW_YOLO = 0.665, 0.125, 0.05
"""Half the widths of LeYOLO-Small and of YOLOv8n, and the width at which YOLOv8n's shape has as many MACs as the former (0.4 % fewer)."""


def patches() -> LeYOLO:
    """The network left out: LeYOLO's head on embedded patches of 8, 16 and 32 pixels."""
    stem = Node("mn_conv", (32, 8, 8, "SI"))
    coarser = (Node("mn_conv", (64, 2, 2, "SI")), Node("mn_conv", (96, 2, 2, "SI")))
    return LeYOLO(Graph((stem, *coarser, Node("Detect", ("nc",), (0, 1, 2))), CLASSES))


def half_small() -> LeYOLO:
    """LeYOLO-Small at half its widths."""
    return LeYOLO(published("small", num_classes=CLASSES, width=HALF_SMALL))


ARMS: dict[str, Callable[[], nn.Module]] = {
    "leyolo": half_small,
    "yolov8": partial(yolov8, HALF_YOLO, num_classes=CLASSES),
    "narrow yolov8": partial(yolov8, NARROW_YOLO, num_classes=CLASSES),
    "random features": lambda: frozen_but_head(half_small()),
    "patches": patches,
}
UNTRAINED = ("random features", "patches")  # controls that cannot learn much: held to no floor


def frozen_but_head(model: LeYOLO) -> LeYOLO:
    """Convolutions of backbone and neck stay as they were drawn; norms and the head learn."""
    for layer in model.layers[:-1]:
        frozen(layer)
    return model


def make(arm: str, size: int) -> LeYOLO:
    """An untrained detector that expects as many objects as stand in a scene of `size` pixels, and boxes as small as digits.

    Bins begin with weights that fall by exp(-1/2) each: distances of about 1.5 strides. Equal weights are 7.5: boxes wider than a scene.
    """
    model = ARMS[arm]()
    assert isinstance(model, LeYOLO)
    model.head.set_prior(size)
    with torch.no_grad():
        for branch in model.head.box:
            branch[-1].bias.copy_(-0.5 * model.head.bins.repeat(4))  # type: ignore[index]
    return model


def loss(model: nn.Module, some: Sequence[Scene]) -> Tensor:
    """Of a batch of scenes."""
    assert isinstance(model, LeYOLO)
    return losses(model, model(pixels(some)), [scene.boxes for scene in some], [scene.labels for scene in some]).total


def outcome(model: nn.Module, some: Sequence[Scene]) -> list[dict[int, Match]]:
    """What was found in some scenes, matched with what is there."""
    assert isinstance(model, LeYOLO)
    found = []
    for scene, boxes, scores in zip(some, *model.decode(model(pixels(some))), strict=True):
        kept = select(boxes, scores, threshold=0.01, most=100)
        guesses = Objects(kept.boxes.numpy(), kept.labels.numpy(), kept.scores.numpy())
        found.append(match(guesses, Objects(scene.boxes.numpy(), scene.labels.numpy())))
    return found


@searched(RATES, arms=tuple(ARMS), grid=(1e-3, 3e-3, 1e-2))
def rate_score(arm: str, rate: float) -> float:
    """1 less the AP on the scenes for choices."""
    return error_for_choice(partial(make, arm, SIZE), loss, outcome, average_precision, rate, STEPS, size=SIZE)


@cache
def shown(arm: str, steps: int, size: int) -> Scored:
    """An arm trained at its rate under each seed."""
    return scored(partial(make, arm, size), loss, outcome, average_precision, chosen(RATES, arm), steps, size=size)


def all_shown(arms: Iterable[str], steps: int, size: int) -> dict[str, Scored]:
    """Several arms."""
    return {arm: shown(arm, steps, size) for arm in arms}


def trained(arms: dict[str, Scored]) -> dict[str, Trained]:
    """For the record."""
    return {name: arm.trained(0.0, FLOOR) for name, arm in arms.items() if name not in UNTRAINED}


def precision_at_half(arm: Scored) -> float:
    """AP at an IoU of 0.5, in per cent, the mean over seeds."""
    return 100 * sum(average_precision(each, iou=0.5) for each in arm.found) / len(arm.found)


def counts(arms: Iterable[str], size: int) -> dict[str, dict[str, int]]:
    """Parameters, and MACs of a scene, by arm."""
    made = {arm: make(arm, size).to("meta") for arm in arms}
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
PAPER: dict[str, Any] = {"data": "COCO", "net": "LeYOLO-Small at 640 pixels", "training": "the recipe of YOLOv8"}
DEPARTURES = {
    "data": "scenes of digits on textures, 96 pixels a side: COCO comes with no package",
    "net": "half the published widths, and so are those of YOLOv8n's shape: they train in minutes",
    "training": f"{STEPS} steps of 8 scenes, AdamW, rates searched; all arms begin with a scene's number of objects and small boxes",
}


@experiment(
    "leyolo/computation-reduction",
    points={
        "smoke": [{"size": 64, "steps": 2, "time_at": 64}],
        "small": [{"size": SIZE, "steps": STEPS, "time_at": 320}],
        "full": [{"size": 128, "steps": 5 * STEPS, "time_at": 640}],
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
def computation_reduction(size: int, steps: int, time_at: int) -> Figure:
    """Multiply-accumulates that LeYOLO does without, per cent of YOLOv8n's shape, and whether its AP is worth it.

    Free: narrowing YOLOv8n's shape to as many saves as much, where its AP stays within the margin. Deleted: the head on embedded patches,
    without backbone and neck. Random: backbone and neck as they were drawn. An arm: the time that the published networks save.
    """
    arms = all_shown(ARMS, steps, size)
    found = counts(ARMS, size)
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
        trained=trained(arms),
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
        "smoke": [{"size": 64, "steps": 2}],
        "small": [{"size": SIZE, "steps": STEPS}],
        "full": [{"size": 128, "steps": 5 * STEPS}],
    },
    operator=DETECTOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of LeYOLO's AP lies below that of YOLOv8n's shape of as many multiply-accumulates",
    measured_here="AP on held-out scenes of digits, over that of YOLOv8n's shape of as many multiply-accumulates",
    minutes=240,
)
def ap_small(size: int, steps: int) -> Figure:
    """AP of LeYOLO, in per cent, over that of YOLOv8n's shape of as many multiply-accumulates, which is free.

    The interval is that of the difference: scenes and seeds are resampled in pairs. Controls as in the other claim; the rival is the
    baseline.
    """
    arms = all_shown(("leyolo", "narrow yolov8", "random features", "patches"), steps, size)
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
        trained=trained(arms),
        details={
            "AP at an IoU of 0.5": {name: precision_at_half(arm) for name, arm in arms.items()},
            **counts(arms, size),
        },
    )
