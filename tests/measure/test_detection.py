"""Average precision against pycocotools, panoptic quality and mean IoU against torchmetrics, and by hand."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import PanopticQuality

from assay.measure.detection import (
    Objects,
    average_precision,
    average_recall,
    confusion,
    match,
    mean_iou,
    overlap,
    panoptic,
    panoptic_quality,
)

SIDE = 160


def scenes(seed, *, images=12, crowds=True, ties=False):
    """True objects and found ones that are nearly right, wrong in class, double, or nowhere; masks are the boxes less a corner."""
    rng = np.random.default_rng(seed)
    truths, founds = [], []
    for _ in range(images):
        n = int(rng.integers(0, 7))
        corners = rng.uniform(0, SIDE - 60, (n, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(6, 130, (n, 2))], 1).clip(0, SIDE).round()
        labels = rng.integers(0, 3, n)
        crowd = rng.random(n) < 0.15 if crowds else np.zeros(n, bool)
        picks = rng.integers(0, max(n, 1), 9 if n else 0)
        near = (boxes[picks] + rng.normal(0, 5, (len(picks), 4))).round()
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 2)
        near = np.concatenate([near, np.array([[5.0, 5, 40, 30], [60, 60, 70, 75]])]).clip(0, SIDE + 20)
        found_labels = np.concatenate(
            [np.where(rng.random(len(picks)) < 0.8, labels[picks], 1) if n else [], [0, 2]]
        ).astype(int)
        scores = rng.random(len(near))
        if ties:
            scores = (4 * scores).round() / 4
        truths.append(Objects(boxes, labels, masks=cut(boxes), crowd=crowd))
        founds.append(Objects(near, found_labels, scores, masks=cut(near)))
    return founds, truths


def cut(boxes):
    masks = np.zeros((len(boxes), SIDE, SIDE), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = True
        mask[top : top + (bottom - top) // 3, left : left + (right - left) // 3] = False
    return masks


def coco(founds, truths, by):
    """The twelve figures of pycocotools."""
    rle = lambda mask: coco_mask.encode(np.asfortranarray(mask))  # noqa: E731
    box = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]  # noqa: E731
    data = {
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in range(len(truths))],
        "categories": [{"id": k} for k in range(3)],
        "annotations": [],
        "info": {},
    }
    found = []
    for i, (f, t) in enumerate(zip(founds, truths, strict=True)):
        areas = t.size if by == "masks" else (t.boxes[:, 2:] - t.boxes[:, :2]).prod(1)
        for j in range(len(t.labels)):
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": i,
                    "category_id": int(t.labels[j]),
                    "bbox": box(t.boxes[j]),
                    "area": float(areas[j]),
                    "iscrowd": int(t.crowd[j]),
                    "segmentation": rle(t.masks[j]),
                }
            )
        for j in range(len(f.labels)):
            where = {"segmentation": rle(f.masks[j])} if by == "masks" else {"bbox": box(f.boxes[j])}
            found.append({"image_id": i, "category_id": int(f.labels[j]), "score": float(f.scores[j]), **where})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(found), "segm" if by == "masks" else "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats


def bare(objects, by):
    """For boxes alone sizes go by the boxes."""
    return objects if by == "masks" else Objects(objects.boxes, objects.labels, objects.scores, crowd=objects.crowd)


@pytest.mark.parametrize(("by", "seed", "ties"), [("boxes", 0, False), ("boxes", 1, True), ("masks", 2, False)])
def test_figures_are_those_of_pycocotools(by, seed, ties):
    founds, truths = scenes(seed, ties=ties)
    wanted = coco(founds, truths, by)

    def matches(**settings):
        return [match(bare(f, by), bare(t, by), by=by, **settings) for f, t in zip(founds, truths, strict=True)]

    every = matches()
    ours = [average_precision(every), average_precision(every, iou=0.5), average_precision(every, iou=0.75)]
    ours += [average_precision(matches(size=size)) for size in ("small", "medium", "large")]
    ours += [average_recall(matches(most=most)) for most in (1, 10, 100)]
    ours += [average_recall(matches(size=size)) for size in ("small", "medium", "large")]
    assert 0.05 < wanted[0] < 0.95
    assert ours == pytest.approx(np.where(wanted < 0, np.nan, wanted), abs=1e-12, nan_ok=True)


def test_overlaps_are_those_of_pycocotools():
    founds, truths = scenes(3)
    for found, truth in zip(founds, truths, strict=True):
        if len(truth.labels):
            xywh = [np.concatenate([o.boxes[:, :2], o.boxes[:, 2:] - o.boxes[:, :2]], 1) for o in (found, truth)]
            assert overlap(found, truth) == pytest.approx(coco_mask.iou(*xywh, truth.crowd.astype(np.uint8).tolist()))


def test_by_hand():
    truth = Objects(np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]]), np.array([0, 0]))
    right = Objects(truth.boxes, truth.labels, np.array([0.9, 0.8]))
    assert average_precision([match(right, truth)]) == pytest.approx(1)
    half = Objects(truth.boxes[:1], truth.labels[:1], np.array([0.9]))
    assert average_precision([match(half, truth)]) == pytest.approx(51 / 101)  # recalls 0, 0.01, ... 0.5
    assert average_recall([match(half, truth)]) == 0.5
    double = Objects(truth.boxes[[0, 0, 1]], np.array([0, 0, 0]), np.array([0.9, 0.8, 0.7]))
    assert average_precision([match(double, truth)]) == pytest.approx((51 + 50 * 2 / 3) / 101)
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert average_precision([match(nothing, truth)]) == average_recall([match(nothing, truth)]) == 0
    assert np.isnan(average_precision([match(right, Objects(np.zeros((0, 4)), np.zeros(0, int)))]))
    assert np.isnan(average_precision([]))


def test_an_image_that_is_drawn_twice_counts_twice():
    founds, truths = scenes(4, crowds=False)
    matches = [match(f, t) for f, t in zip(founds, truths, strict=True)]
    picks = [0, 3, 3, 7, 7, 7]
    wanted = coco([founds[i] for i in picks], [truths[i] for i in picks], "boxes")
    assert average_precision([matches[i] for i in picks]) == pytest.approx(wanted[0])


def test_what_is_refused():
    good = Objects(np.zeros((1, 4)), np.zeros(1, int), np.ones(1))
    with pytest.raises(ValueError, match="found must have scores"):
        match(Objects(good.boxes, good.labels), good)
    with pytest.raises(ValueError, match="must have masks"):
        match(good, good, by="masks")
    with pytest.raises(ValueError, match="size must be one of all, small"):
        match(good, good, size="tiny")
    with pytest.raises(ValueError, match=r"iou must be one of 0\.5, .*, got 0\.51"):
        average_precision([match(good, good)], iou=0.51)
    with pytest.raises(ValueError, match=r"boxes must be \(n, 4\)"):
        Objects(np.zeros((1, 5)), np.zeros(1, int))
    with pytest.raises(ValueError, match="scores must have one entry"):
        Objects(np.zeros((1, 4)), np.zeros(1, int), np.ones(2))


def segments(seed, images=6):
    """Maps of class and instance: blocks of a few classes, the found ones moved and some renamed."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((images, 40, 40, 2), int)
    truth[..., 0] = 3
    for each in truth:
        for instance in range(1, 6):
            y, x = rng.integers(0, 30, 2)
            each[y : y + rng.integers(4, 14), x : x + rng.integers(4, 14)] = (rng.integers(0, 5), instance)
    found = np.roll(truth, (1, 1), (1, 2))
    found[found[..., 0] == 1] = (2, 9)
    return found, truth


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_quality_is_that_of_torchmetrics(seed):
    found, truth = segments(seed)
    theirs = PanopticQuality(things={0, 1, 2}, stuffs={3, 4})
    wanted = float(theirs(torch.from_numpy(found), torch.from_numpy(truth)))
    tables = [panoptic(f, t, things=[0, 1, 2], stuff=[3, 4]) for f, t in zip(found, truth, strict=True)]
    assert 0.2 < wanted < 0.95
    assert panoptic_quality(tables) == pytest.approx(wanted, abs=1e-6)


def test_void_counts_for_nothing():
    truth = np.zeros((4, 4, 2), int)
    truth[:, 2:, 0] = -1
    found = np.zeros((4, 4, 2), int)
    table = panoptic(found, truth, things=[], stuff=[0, 1])
    assert table.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]  # the found pixels in the void are not held against it
    found[:, 2:, 0] = 1
    assert panoptic(found, truth, things=[], stuff=[0, 1]).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    found[:, 1:, 0] = 1
    assert panoptic(found, truth, things=[], stuff=[0, 1]).tolist()[1] == [
        0,
        0,
        0,
        0,
    ]  # two thirds of it lie in the void
    assert panoptic_quality([panoptic(found, truth, things=[], stuff=[0, 1])]) == 0
    assert np.isnan(panoptic_quality([np.zeros((2, 4))]))


def test_mean_iou_is_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (5, 20, 20))
    found = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape))
    truth[:, :3] = -1
    theirs = MulticlassJaccardIndex(4, average=None, ignore_index=-1)
    wanted = theirs(torch.from_numpy(found), torch.from_numpy(truth)).mean()
    tables = [confusion(f, t, 4) for f, t in zip(found, truth, strict=True)]
    assert mean_iou(tables) == pytest.approx(float(wanted), abs=1e-6)
    only = [confusion(np.zeros((2, 2), int), np.zeros((2, 2), int), 4)]
    assert mean_iou(only) == 1  # classes that are nowhere do not count


def test_classes_outside_are_refused():
    with pytest.raises(ValueError, match="classes must be 0 to 3"):
        confusion(np.full((2, 2), 4), np.zeros((2, 2), int), 4)
    with pytest.raises(ValueError, match="one shape"):
        confusion(np.zeros((2, 2), int), np.zeros((2, 3), int), 4)
    with pytest.raises(ValueError, match=r"among things, stuff and void=-1, got \[7\]"):
        panoptic(np.full((2, 2, 2), 7), np.zeros((2, 2, 2), int), things=[0], stuff=[])
    with pytest.raises(ValueError, match=r"must both be \(height, width, 2\)"):
        panoptic(np.zeros((2, 2), int), np.zeros((2, 2), int), things=[0], stuff=[])
