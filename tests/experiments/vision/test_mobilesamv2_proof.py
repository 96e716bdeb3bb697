"""MobileSAMv2's experiments notice when the boxes are not the detector's, and when the grid is as good. The truth stands in for SAM."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.rates import Rate
from assay.experiments.vision import mobilesamv2 as room
from assay.experiments.vision import scenes as scenes_
from assay.experiments.vision import small_sam as nets
from assay.methods.core.vision.boxes import area, iou
from assay.methods.vision.mobilesamv2 import DetectorBoxes, SegmentEverything
from assay.workloads.digit_scenes import digit_scenes

POINT = {"steps": 4, "seeds": 3, "grid": 8, "judged": 5}
SPEED, RECALL = "mobilesamv2/decoder-speedup", "mobilesamv2/mask-recall"


class Known(nn.Module):
    """A detector that knows the boxes of the held-out scenes, nearly."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def detect(self, image):
        scene = next(scene for scene in every() if torch.equal(scene.image, image))
        generator = torch.Generator().manual_seed(self.seed)
        boxes = scene.boxes + torch.randn(scene.boxes.shape, generator=generator)
        return boxes, torch.ones(len(boxes))


CACHED = (room.shown, room.filters, room.floor)
FEW = {"train": 4, "choose": 2, "heldout": 5}


@cache
def scenes(part, size):
    return tuple(digit_scenes(part, FEW[part], size=size, seed=scenes_.SEED_OF[part]))


def every():
    return (*scenes("heldout", nets.SIDE), *scenes("choose", nets.SIDE))


def forget():
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture(scope="module")
def sam():
    return nets.small_sam().eval()


@pytest.fixture
def stood_in(monkeypatch, sam):
    """A SAM that draws the object of a box well and that of a point with a broad pen, unless told otherwise."""
    monkeypatch.setattr(room, "scenes", scenes)
    monkeypatch.setattr(room, "COARSE", 4)
    monkeypatch.setattr(scenes_, "DRAWS", 40)
    forget()
    settings = {"pen": 5}

    def decoded(self, embedding, prompts, *, several):
        scene, masks = every()[int(embedding)], 3 if several else 1
        for some in prompts.split(self.batch):
            if some.shape[1] == 4:
                sure, which = iou(some[:, None], scene.boxes).max(1)
            else:
                inside = (some[:, None] >= scene.boxes[:, :2]).all(2) & (some[:, None] < scene.boxes[:, 2:]).all(2)
                sure, which = inside.any(1).float(), torch.where(inside, area(scene.boxes), torch.inf).argmin(1)
            drawn = scene.masks.float()[which][:, None]
            if some.shape[1] == 2:
                drawn = F.max_pool2d(drawn, settings["pen"], 1, settings["pen"] // 2)
            logits = 20 * (drawn * (sure > 0.5)[:, None, None, None]) - 10
            yield logits.expand(-1, masks, -1, -1), sure[:, None].expand(-1, masks)

    monkeypatch.setattr(room, "sam_of", lambda steps: sam)
    monkeypatch.setattr(room, "detector_of", lambda seed, steps: Known(seed))
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(3e-3, (1e-3, 3e-3, 1e-2)))
    monkeypatch.setattr(
        room, "embedded", lambda sam, scene: torch.tensor(float([each is scene for each in every()].index(True)))
    )
    monkeypatch.setattr(room, "count_cost", lambda function: type("Cost", (), {"macs": 0}))
    monkeypatch.setattr(SegmentEverything, "decoded", decoded)
    yield settings
    forget()


@pytest.fixture
def broken(monkeypatch):
    """Boxes that are not the detector's, but as many and as large."""

    def call():
        room.shown.cache_clear()
        real = DetectorBoxes.__call__

        def anywhere(self, image):
            return room.scattered(lambda given: real(self, given))(image)

        monkeypatch.setattr(DetectorBoxes, "__call__", anywhere)

    return call


def beside_the_level():
    """What the speed-up's record says but for its level, which follows from our scenes: whether its quality and what was trained hold."""
    honest = record_of(SPEED, POINT)
    assert judge(honest).verdict == Verdict.COMPUTED
    return honest, judge(honest.model_copy(update={"computed": ""})).verdict


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("mobilesamv2")}
    assert set(found) == {SPEED, RECALL}
    assert all(each.decides[scale]["grid"] == 32 for each in found.values() for scale in ("small", "full"))


def test_the_speed_up_needs_the_detectors_boxes(stood_in, broken):
    honest, verdict = beside_the_level()
    assert verdict in PAYS
    decoded = honest.details["masks decoded for a scene"]
    assert decoded["boxes"] == decoded["random boxes"] < 10 < 3 * 8**2 == decoded["grid"]
    broken()
    assert beside_the_level()[1] not in PAYS


def test_the_recall_needs_the_detectors_boxes(stood_in, broken):
    assert verdict_of(RECALL, POINT) in PAYS
    broken()
    record = record_of(RECALL, POINT)
    assert judge(record).verdict not in PAYS
    assert record.measured.median < record.baseline


def test_a_grid_that_draws_as_well_leaves_no_gain(stood_in):
    stood_in["pen"] = 1
    assert verdict_of(RECALL, POINT) not in PAYS


def test_all_ways_ask_the_same_sam(stood_in):
    assert room.filters(4) in room.FILTERS
    found = room.shown(*POINT.values())
    arms = {way: arm.value for way, arm in found.arms.items()}
    assert arms["boxes, filled"] < arms["grid"] < arms["boxes"] <= arms["true boxes"] == 100
    assert max(arms["random boxes"], arms["whole image"]) < 10 < arms["ink boxes"]
    assert arms["ink, without SAM"] > 20  # the rival knows how scenes are made
    for way, arm in found.arms.items():
        assert room.recall_of_few(arm) <= arms[way]
        one = len(set(arm.by_seed())) == 1
        assert one or way in ("boxes", "random boxes", "boxes, filled")


def test_a_sam_that_learned_nothing_makes_the_comparison_void(stood_in, monkeypatch):
    real = room.masks_found
    monkeypatch.setattr(room, "masks_found", lambda found, scene: real(room.filled(scene.boxes, scene), scene))
    assert verdict_of(RECALL, POINT) == Verdict.UNDECIDED


def test_a_detector_that_learned_nothing_makes_the_comparison_void(stood_in, monkeypatch):
    monkeypatch.setattr(room, "floor", lambda judged: 0.99)
    assert beside_the_level()[1] == Verdict.UNDECIDED


def test_as_many_boxes_as_are_decoded_at_once():
    scene = digit_scenes("choose", 1, size=nets.SIDE)[0]
    boxes = room.up_to_the_cap(room.always(scene.boxes))(scene.image)
    assert boxes.shape == (room.CAP, 4)
    assert torch.equal(boxes[: len(scene.boxes)], scene.boxes)


def test_ink_knows_how_scenes_are_made():
    scene = digit_scenes("choose", 1, size=nets.SIDE, most=1, seed=2)[0]
    [mask], [own] = room.ink(scene.image), scene.masks
    assert (mask & own).sum() > 0.95 * (mask | own).sum()
    assert (room.ink_boxes(scene.image) - scene.boxes).abs().max() <= 1
    assert room.ink_boxes(scene.image.mean(0).expand(3, -1, -1)).shape == (0, 4)


def test_losses_are_least_for_the_truth():
    scene = digit_scenes("train", 1, size=nets.SIDE, seed=3)[0]
    truth = F.avg_pool2d(scene.masks.float(), nets.HALF)[None]
    good, bad = (sign * (20 * (truth[:, :, None] >= 0.5) - 10.0) for sign in (1, -1))
    assert nets.mask_loss(good, truth).max() < 0.5 * nets.mask_loss(bad, truth).min()
    assert torch.equal(nets.mask_iou(good, truth), torch.ones(1, len(scene.boxes), 1))
    assert nets.mask_iou(bad, truth).max() == 0
    torch.manual_seed(0)
    masks, points, boxes = nets.prompts_of([scene, scene])
    ours = F.avg_pool2d(scene.masks.float(), nets.HALF)
    for mask, places, around in zip(masks, points.long().tolist(), boxes, strict=True):
        for i, (x, y) in enumerate(places[: nets.PROMPTS]):
            which = next(j for j, each in enumerate(ours) if torch.equal(each, mask[i]))
            assert scene.masks[which, y, x]
            assert iou(around[i], scene.boxes[which]) > 0.4
    assert not any(scene.masks[:, y, x].any() for x, y in points[:, nets.PROMPTS :].flatten(0, 1).long().tolist())


def test_the_sam_is_taught_at_the_size_it_draws(sam):
    scene = digit_scenes("train", 1, size=nets.SIDE)
    _, points, boxes = nets.prompts_of(scene)
    embedding = sam.vision_encoder(scenes_.pixels(scene))[0]
    drawn = sam(image_embeddings=embedding, input_boxes=boxes, multimask_output=False).pred_masks
    assert drawn.shape[3:] == (nets.SIDE // nets.HALF,) * 2
    losses = room.loss_on_scenes(sam, scene)
    assert losses == room.loss_on_scenes(sam, scene)  # the same prompts for every rate
    nets.sam_loss(sam.train(), scene).backward()
    unused = {name for name, value in sam.named_parameters() if value.requires_grad and value.grad is None}
    assert all("mask_embed" in name or "point_embed.0" in name for name in unused), unused
    sam.zero_grad()
    sam.eval()


def test_a_detector_that_is_right_has_no_loss_of_boxes():
    scene = digit_scenes("train", 1, size=nets.SIDE, seed=3)[0]
    near, whose = nets.responsible(scene)
    assert set(whose[near].tolist()) == set(range(len(scene.boxes)))

    def told(sure):
        logits = torch.where(near, sure, -sure)
        return lambda images: (logits[None], scene.boxes[whose][None])

    assert nets.detector_loss(told(20.0), [scene]) < 1e-3
    assert nets.detector_loss(told(-20.0), [scene]) > 1


@pytest.mark.slow
def test_both_networks_learn():
    assert room.score_sam("sam", 2e-3) < 1
    assert room.score_detector("detector", 3e-3) < 0.75
