"""MobileSAMv2: what prompting at detected boxes saves over a grid of points, and what it finds of what is there.

One SAM is trained for scenes of digits (`small_sam`), with points and boxes alike, before anything is compared: the paper has its SAM
given too. All ways of prompting ask this one, and a scene is embedded once for all of them; only what is asked differs. What the method
adds, a detector, is trained under several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision import scenes as scenes_
from assay.experiments.vision.scenes import MEAN, STD, Loss, Make, Scored, error_for_choice, gap, guarded, scenes
from assay.experiments.vision.small_sam import (
    SIDE,
    WIDTH,
    Detector,
    detector_loss,
    sam_loss,
    small_sam,
)
from assay.measure.cost import count_cost
from assay.measure.detection import Objects, average_recall, match
from assay.methods.core.vision.boxes import masks_to_boxes
from assay.methods.vision.mobilesamv2 import (
    DetectorBoxes,
    Found,
    GradientBoxes,
    PointGrid,
    SegmentEverything,
    components,
)
from assay.workloads.digit_scenes import Scene

SAM, DETECTOR = "mobilesamv2/sam", "mobilesamv2/detector"  # searches of rates
STEPS, BATCH, SAM_SEED = 800, 4, 1
MOST, FEW = 100, 10  # masks of a scene that count
COARSE = 16  # points a side of the coarse grid
FILTERS = ((0.88, 0.95), (0.6, 0.85), (0.4, 0.7), (0.2, 0.4))  # of the grid: least IoU and stability; SAM's first
CHOOSING = 10  # scenes that filters are chosen on
TIMED = 2  # scenes whose time is taken
CAP = 320  # boxes that the released code decodes at once
INK, LEAST = 0.02, 12  # that a coloured pixel's channels differ by at least; pixels of a component


# ---------------------------------------------------------------------------------------------------- what was found of a scene


def masks_found(found: Found, scene: Scene) -> Any:
    """Found masks assigned to the digits, the highest predicted IoU first, whatever the digit."""
    n = len(found.masks)
    ours = Objects(np.zeros((n, 4)), np.zeros(n, int), found.scores.numpy(), found.masks.numpy())
    return match(ours, _truth(scene), by="masks", most=MOST)


def boxes_found(boxes: Tensor, scene: Scene) -> Any:
    """Found boxes assigned to the digits, in their order."""
    n = len(boxes)
    return match(Objects(boxes.numpy(), np.zeros(n, int), -np.arange(n, dtype=float)), _truth(scene), most=MOST)


def _truth(scene: Scene) -> Objects:
    n = len(scene.boxes)
    return Objects(scene.boxes.numpy(), np.zeros(n, int), masks=scene.masks.numpy())


def filled(boxes: Tensor, scene: Scene) -> Found:
    """Boxes as masks: what a SAM must do better than."""
    rows, columns = torch.arange(scene.image.shape[1])[:, None], torch.arange(scene.image.shape[2])
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    masks = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    return Found(masks, -torch.arange(len(masks)).float(), boxes)


# -------------------------------------------------------------------------------------------------------------- what is trained


@torch.no_grad()
def loss_on_scenes(sam: nn.Module, some: Sequence[Scene]) -> list[float]:
    """What the SAM's rate is chosen by: its loss with points and boxes, which favours no way of prompting."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [float(sam_loss(sam, [scene])) for scene in some]


def outcome_of_detector(detector: Any, some: Sequence[Scene]) -> list[Any]:
    """The boxes that the detector finds."""
    proposer = DetectorBoxes(detector.detect)
    return [boxes_found(proposer(scene.image), scene) for scene in some]


MAKE: dict[str, tuple[Make, Loss]] = {"sam": (small_sam, sam_loss), "detector": (Detector, detector_loss)}


@searched(SAM, arms=["sam"], grid=(3e-4, 1e-3, 3e-3, 1e-2))
def score_sam(arm: str, rate: float) -> float:
    return error_for_choice(
        *MAKE[arm], loss_on_scenes, lambda losses: 1 - float(np.mean(losses)), rate, STEPS, size=SIDE, batch=BATCH
    )


@searched(DETECTOR, arms=["detector"], grid=(1e-3, 3e-3, 1e-2, 3e-2))
def score_detector(arm: str, rate: float) -> float:
    return error_for_choice(*MAKE[arm], outcome_of_detector, average_recall, rate, STEPS, size=SIDE, batch=BATCH)


@cache
def sam_of(steps: int) -> nn.Module:
    """The SAM that all are asked, trained once a process."""
    return scenes_.train(*MAKE["sam"], chosen(SAM, "sam").rate, steps, SAM_SEED, size=SIDE, batch=BATCH)


@cache
def detector_of(seed: int, steps: int) -> Any:
    return scenes_.train(*MAKE["detector"], chosen(DETECTOR, "detector").rate, steps, seed, size=SIDE, batch=BATCH)


def everything(sam: nn.Module, proposer: Any, *, batch: int = CAP, share: bool = True) -> SegmentEverything:
    """`SegmentEverything` that prepares images as `scenes.pixels` does."""
    return SegmentEverything(sam, proposer, batch=batch, share=share, mean=[MEAN] * 3, std=[STD] * 3)


def embedded(sam: nn.Module, scene: Scene) -> Tensor:
    """What the small SAM makes of a scene."""
    return everything(sam, PointGrid()).embed(scene.image)


@cache
def filters(steps: int) -> tuple[float, float]:
    """The grid's least predicted IoU and stability, of `FILTERS` the best on scenes for choices: SAM's own suit SAM's predictions."""
    sam, some = sam_of(steps), scenes("choose", SIDE)[:CHOOSING]
    known = [embedded(sam, scene) for scene in some]

    def recall(pair: tuple[float, float]) -> float:
        grid = everything(sam, PointGrid(COARSE, *pair))
        return average_recall(
            [masks_found(grid.find(scene.image, at), scene) for scene, at in zip(some, known, strict=True)]
        )

    return max(FILTERS, key=recall)


# -------------------------------------------------------------------------------------------------- the other ways of prompting


def scattered(like: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Random boxes: as many as `like` finds in an image, of the same sizes, anywhere."""
    generator = torch.Generator().manual_seed(0)

    def proposer(image: Tensor) -> Tensor:
        boxes = like(image)
        edges = torch.tensor([image.shape[2], image.shape[1]]).float()
        sides = torch.minimum(boxes[:, 2:] - boxes[:, :2], edges)
        corners = (edges - sides) * torch.rand(len(boxes), 2, generator=generator)
        return torch.cat([corners, corners + sides], 1)

    return proposer


def whole_image(image: Tensor) -> Tensor:
    """The method deleted: nothing was found, so the image is prompted as one box."""
    return torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]])


def ink(image: Tensor) -> Tensor:
    """The cheapest rival, which knows that the textures are grey and the digits are not: the connected components of coloured pixels,
    each down to half of its strongest colour. Masks (n, H, W)."""
    colour = image.amax(0) - image.amin(0)
    labels = components(colour > INK)
    masks = labels == torch.arange(1, int(labels.max()) + 1)[:, None, None]
    masks = masks[masks.sum((1, 2)) >= LEAST]
    return masks & (colour > (masks * colour).amax((1, 2), keepdim=True) / 2)


def ink_boxes(image: Tensor) -> Tensor:
    """Boxes (n, 4) around the components of ink."""
    return masks_to_boxes(ink(image))


def always(boxes: Tensor) -> Callable[[Tensor], Tensor]:
    """These boxes, whatever the image."""
    return lambda image: boxes


def up_to_the_cap(like: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `like` finds, and random boxes of a quarter of a side: as many as are decoded at once."""
    fill = scattered(always(torch.tensor([[0.0, 0, SIDE / 4, SIDE / 4]]).expand(CAP, 4)))
    return lambda image: torch.cat([like(image), fill(image)])[:CAP]


@dataclass(frozen=True)
class Shown:
    """What came of the held-out scenes: masks by arm, the detectors' boxes, what was trained, masks decoded for a scene on average."""

    arms: Mapping[str, Scored]
    boxes: Scored
    trained: Mapping[str, Trained]
    decoded: Mapping[str, float]


@cache
def shown(steps: int, seeds: int, grid: int, judged: int) -> Shown:
    """All ways of prompting the same SAM on `judged` held-out scenes; what has no detector is the same under every seed."""
    some, sam, settings = scenes("heldout", SIDE)[:judged], sam_of(steps), filters(steps)
    known = [embedded(sam, scene) for scene in some]
    detectors = [DetectorBoxes(detector_of(seed, steps).detect) for seed in range(1, seeds + 1)]
    ways: dict[str, list[Any]] = {
        "boxes": list(detectors),
        "random boxes": [scattered(each) for each in detectors],
        "whole image": [whole_image] * seeds,
        "ink boxes": [ink_boxes] * seeds,
        "gradient boxes": [GradientBoxes()] * seeds,
        "grid": [PointGrid(grid, *settings)] * seeds,
        "coarse grid": [PointGrid(COARSE, *settings)] * seeds,
        "true boxes": [None] * seeds,
    }
    done: dict[int, tuple[tuple[Any, ...], list[Tensor], float]] = {}

    def ask(proposer: Any) -> tuple[tuple[Any, ...], list[Tensor], float]:
        """Matches, prompts, and masks decoded on average; once a proposer."""
        if id(proposer) not in done:
            matches, prompts, counts = [], [], []
            for scene, at in zip(some, known, strict=True):
                found = everything(sam, proposer or always(scene.boxes)).find(scene.image, at)
                matches.append(masks_found(found, scene))
                prompts.append(found.prompts)
                counts.append(3 * proposer.side**2 if isinstance(proposer, PointGrid) else len(found.masks))
            done[id(proposer)] = tuple(matches), prompts, float(np.mean(counts))
        return done[id(proposer)]

    asked = {way: [ask(proposer) for proposer in proposers] for way, proposers in ways.items()}

    def scored(found: Sequence[tuple[Any, ...]]) -> Scored:
        return Scored(tuple(found), average_recall, chosen(DETECTOR, "detector"))

    def of_masks(draw: Callable[[Tensor, Scene], Found], way: str) -> Scored:
        """Masks made without the SAM, of the prompts of a way."""
        return scored(
            [
                tuple(masks_found(draw(boxes, scene), scene) for boxes, scene in zip(each[1], some, strict=True))
                for each in asked[way]
            ]
        )

    arms = {way: scored([each[0] for each in found]) for way, found in asked.items()}
    arms["ink, without SAM"] = of_masks(lambda boxes, scene: _inked(scene), "ink boxes")
    arms["boxes, filled"] = of_masks(filled, "boxes")
    boxes = scored(
        [
            tuple(boxes_found(given, scene) for given, scene in zip(each[1], some, strict=True))
            for each in asked["boxes"]
        ]
    )
    trained = {
        "detector": boxes.trained(floor(judged), "the mean box everywhere"),
        "SAM by the detector's boxes": arms["boxes"].trained(
            arms["boxes, filled"].value / 100, "the same boxes, filled"
        ),
    }
    return Shown(
        arms, boxes, trained, {way: float(np.mean([each[2] for each in found])) for way, found in asked.items()}
    )


def _inked(scene: Scene) -> Found:
    masks = ink(scene.image)
    return Found(masks, masks.sum((1, 2)).float(), masks_to_boxes(masks))


@cache
def floor(judged: int) -> float:
    """Average recall of the mean digit's box at every second position of a detector."""
    sides = torch.cat([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in scenes("train", SIDE)]).mean(0)
    at = torch.arange(8, SIDE, 16)
    centres = torch.cartesian_prod(at, at).float()
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], 1)
    return average_recall([boxes_found(boxes, scene) for scene in scenes("heldout", SIDE)[:judged]])


def recall_of_few(arm: Scored) -> float:
    """Average recall in per cent where fewer masks of a scene count: those with the highest predicted IoUs."""
    cut = [
        [
            {
                label: replace(one, scores=one.scores[:FEW], hits=one.hits[:, :FEW], ignored=one.ignored[:, :FEW])
                for label, one in each.items()
            }
            for each in seed
        ]
        for seed in arm.found
    ]
    return 100 * float(np.mean([average_recall(seed) for seed in cut]))


def said(steps: int, seeds: int, grid: int, judged: int) -> dict[str, Any]:
    """For the record of both claims."""
    found = shown(steps, seeds, grid, judged)
    rate = chosen(SAM, "sam")
    return {
        "masks decoded for a scene": dict(found.decoded),
        "recall": {way: arm.value for way, arm in found.arms.items()},
        f"recall of {FEW} masks": {way: recall_of_few(arm) for way, arm in found.arms.items()},
        "digits that the detector finds": 100 * float(np.mean([average_recall(e, iou=0.5) for e in found.boxes.found])),
        "the grid's filters": filters(steps),
        "SAM": {"rate": rate.rate, "rates": list(rate.rates), "steps": steps, "seed": SAM_SEED},
    }


# ------------------------------------------------------------------------------------------------------------------- claims

METRIC = f"average recall of masks (IoU 0.5 to 0.95, at most {MOST} a scene), in per cent"
PAPER: dict[str, Any] = {
    "model": "SAM ViT-H, 1024 pixels",
    "detector": "YOLOv8",
    "data": "LVIS",
    "grid": 32,
    "seeds": 1,
}
HERE = {
    "model": f"a SAM of {WIDTH} channels for scenes of {SIDE} pixels, trained here once, before and outside of the arms, with points and "
    "boxes alike: SAM's weights come with no package",
    "detector": "seven convolutions, class-agnostic, trained on the scenes; the paper's confidence of 0.4 and suppression at 0.9",
    "data": "DigitScenes: handwritten digits on photographs of textures",
    "objects": "1 to 8 digits a scene, so a few boxes where a photograph has dozens: the ratio of prompts is the scenes'; an arm decodes "
    f"{CAP} boxes, as many as the released code at once, for what that saves at least",
    "seeds": "3 of the detector (5 at full), one of the SAM; scenes and seeds are resampled for the interval",
    "filters": "the grid's least IoU and stability are chosen on other scenes: SAM's 0.88 and 0.95 suit its own predictions",
}
POINTS = {
    "smoke": [{"steps": 3, "seeds": 3, "grid": 8, "judged": 3}],
    "small": [{"steps": STEPS, "seeds": 3, "grid": 32, "judged": 40}],
    "full": [{"steps": 10 * STEPS, "seeds": 5, "grid": 32, "judged": 60}],
}
OPERATOR = Operator(
    "all masks of an image by SAM",
    free=f"SAM's grid with {COARSE} points a side",
    exact="the same grid with the products of the image computed once",
)
RIVAL = "boxes around the components of coloured pixels, which need no training"


@experiment(
    "mobilesamv2/decoder-speedup",
    points=POINTS,
    operator=OPERATOR,
    guard=Guard(METRIC, 2.0, higher_is_better=True, relative=False),
    paper=PAPER | {"device": "a GPU"},
    departures=HERE
    | {
        "device": "this machine's processor, float32",
        "batch": f"64 points, SAM's own; {CAP} boxes, the released code's",
    },
    refuted_if="the whole interval of the speed-up over the grid lies below 1",
    computed="the ratio of prompts follows from how many digits a scene has, our choice; models decide whether few boxes find as much",
    minutes=60,
)
def decoder_speedup(steps: int, seeds: int, grid: int, judged: int) -> Trial:
    """Embedded scenes to masks: the grid with its filters, against the detector and the boxes it finds. The detector's time counts.

    The baseline decodes as transformers does, which repeats the image for every point; the candidate's decoder computes the products
    of the image once, "boxes, image repeated" is without that. The embedding, which both need, is there beforehand.
    Deleted: the whole image as the only box. Random: as many boxes of the same sizes, anywhere.
    """
    sam, detector, settings = sam_of(steps), detector_of(1, steps), filters(steps)
    known = [(scene.image, embedded(sam, scene)) for scene in scenes("heldout", SIDE)[:TIMED]]

    def run(proposer: Any, *, batch: int = CAP, share: bool = True) -> Callable[[], list[Found]]:
        way = everything(sam, proposer, batch=batch, share=share)
        return lambda: [way.find(image, at) for image, at in known]

    detected, dense = DetectorBoxes(detector.detect), PointGrid(grid, *settings)

    def quality() -> Quality:
        arms = shown(steps, seeds, grid, judged).arms
        controls = {"deleted": arms["whole image"], "random": arms["random boxes"], "rival": arms["ink boxes"]}
        return guarded(arms["boxes"], arms["grid"], controls, RIVAL)

    def details() -> dict[str, Any]:
        image, at = known[0]
        ways = {"grid": everything(sam, dense, share=False), "boxes": everything(sam, detected)}
        macs = {name: count_cost(lambda way=way: way.find(image, at)).macs for name, way in ways.items()}
        timed = [len(detected(image)) for image, _ in known]
        return said(steps, seeds, grid, judged) | {"boxes of the scenes timed": timed, "MACs of the first": macs}

    return Trial(
        run(dense, batch=64, share=False),
        run(detected),
        free=run(PointGrid(COARSE, *settings), batch=64, share=False),
        exact=run(dense, batch=64),
        arms={
            "boxes, image repeated": run(detected, share=False),
            f"{CAP} boxes": run(up_to_the_cap(detected)),
            "ink boxes": run(ink_boxes),
            "boxes that are there already": run(_given(known, detected)),
        },
        quality=quality,
        trained=lambda: shown(steps, seeds, grid, judged).trained,
        details=details,
        pairs=8,
    )


def _given(known: Sequence[tuple[Tensor, Tensor]], proposer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Boxes found beforehand."""
    boxes = [(image, proposer(image)) for image, _ in known]
    return lambda image: next(found for known_image, found in boxes if known_image is image)


@experiment(
    "mobilesamv2/mask-recall",
    points=POINTS,
    operator=OPERATOR,
    paper=PAPER | {"most": 1000},
    departures=HERE | {"most": f"{MOST} masks of a scene: it has at most eight digits"},
    refuted_if="the whole interval of the recall lies below the grid's",
    measured_here="average recall of masks of digits in scenes, at most 100 a scene",
    minutes=60,
)
def mask_recall(steps: int, seeds: int, grid: int, judged: int) -> Figure:
    """The share of digits that are found, over IoUs from 0.5 to 0.95, by boxes against the grid; the interval is of their difference.

    The detector was trained on digits, the paper's on other data than it was judged on: this is no zero-shot figure.
    "true boxes" is what no detector could surpass; the coarse grid (`free`) has a quarter of the points. "ink, without SAM" is a threshold
    of colour that knows how the scenes are made.
    """
    found = shown(steps, seeds, grid, judged)
    gain, low, high = gap(found.arms["boxes"], found.arms["grid"])
    recall = {way: arm.value for way, arm in found.arms.items()}
    base = recall["grid"]
    return Figure(
        base + gain, "%", base + low, base + high,
        baseline=base,
        free=recall["coarse grid"],
        exact=base,
        controls={"deleted": recall["whole image"], "random": recall["random boxes"], "rival": recall["ink boxes"]},
        arms={way: recall[way] for way in ("true boxes", "boxes, filled", "gradient boxes", "ink, without SAM")},
        trained=found.trained,
        details=said(steps, seeds, grid, judged) | {"gain": [gain, low, high]},
    )  # fmt: skip
