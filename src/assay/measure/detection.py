"""How good found boxes, masks and segments are: average precision and recall as COCO counts them, panoptic quality, mean IoU.

Every figure is made in two steps, so that images can be resampled for an interval: something for each image (`match`, `panoptic`,
`confusion`), and the figure over any list of those. Checked against pycocotools and torchmetrics.

    matches = [match(found, truth) for found, truth in zip(detections, truths)]
    average_precision(matches), average_precision(matches, iou=0.5), average_recall(matches)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}  # pixels
LEAST = np.spacing(1)


@dataclass(frozen=True)
class Objects:
    """The objects of an image, true or found: boxes (n, 4) of left, top, right, bottom; labels (n,); scores (n,) of found ones.

    `masks` bool (n, height, width), where there are any. `crowd` bool (n,): regions in which any number of found objects is neither
    right nor wrong. `areas` (n,): what sizes go by; None: of the masks, or else of the boxes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None
    crowd: np.ndarray | None = None
    areas: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.boxes.shape != (n, 4):
            raise ValueError(f"boxes must be (n, 4) for labels (n,), got {self.boxes.shape} and {self.labels.shape}")
        for name in ("scores", "masks", "crowd", "areas"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} must have one entry for each of {n} labels, got {len(value)}")

    @property
    def size(self) -> np.ndarray:
        """Pixels of each."""
        if self.areas is not None:
            return np.asarray(self.areas, dtype=np.float64)
        if self.masks is not None:
            return self.masks.sum((1, 2)).astype(np.float64)
        return np.asarray(np.clip(self.boxes[:, 2:] - self.boxes[:, :2], 0, None).prod(1), dtype=np.float64)

    def of(self, label: int) -> Objects:
        """Those with a label."""
        at = self.labels == label
        rest = {
            name: None if value is None else np.asarray(value)[at]
            for name in ("scores", "masks", "crowd", "areas")
            for value in [getattr(self, name)]
        }
        return Objects(self.boxes[at], self.labels[at], **rest)


@dataclass(frozen=True)
class Match:
    """What was right in an image, for one label: scores (n,) falling; `hits`, `ignored` bool (10, n) at the IoUs of `IOUS`; how many
    objects there were to find."""

    scores: np.ndarray
    hits: np.ndarray
    ignored: np.ndarray
    positives: int


def match(
    found: Objects, truth: Objects, *, by: Literal["boxes", "masks"] = "boxes", size: str = "all", most: int = 100
) -> dict[int, Match]:
    """Found objects of an image assigned to true ones, for each label: the best first, each true object once.

    `by` is what overlaps, `size` a key of `SIZES`: true objects of other sizes, and crowds, are not to be found, and what is assigned
    to them is neither right nor wrong. `most`: found objects of a label that count, those of the highest scores.
    Raises ValueError where scores, or the masks that `by` asks for, are missing.
    """
    if found.scores is None:
        raise ValueError("found must have scores")
    if by == "masks" and (found.masks is None or truth.masks is None):
        raise ValueError("found and truth must have masks, where by is 'masks'")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    labels = np.union1d(found.labels, truth.labels).astype(int).tolist()
    return {label: _matched(found.of(label), truth.of(label), by, SIZES[size], most) for label in labels}


def _matched(found: Objects, truth: Objects, by: str, limits: tuple[float, float], most: int) -> Match:
    assert found.scores is not None
    order = np.argsort(-found.scores, kind="stable")[:most]
    overlaps = overlap(found, truth, by)[order]
    crowd = np.zeros(len(truth.labels), bool) if truth.crowd is None else np.asarray(truth.crowd, bool)
    leave = crowd | (truth.size < limits[0]) | (truth.size > limits[1])
    places = np.argsort(leave, kind="stable")  # those that are to be found first
    hits, ignored = np.zeros((2, len(IOUS), len(order)), bool)
    for level, least in enumerate(IOUS):
        taken = np.zeros(len(truth.labels), bool)
        for row in range(len(order)):
            best, at = min(least, 1 - 1e-10), -1
            for place in places:
                if taken[place] and not crowd[place]:
                    continue
                if at >= 0 and not leave[at] and leave[place]:
                    break  # something that is to be found fits
                if overlaps[row, place] >= best:
                    best, at = overlaps[row, place], place
            if at >= 0:
                taken[at] = True
                hits[level, row], ignored[level, row] = not leave[at], leave[at]
    outside = (found.size[order] < limits[0]) | (found.size[order] > limits[1])
    ignored |= ~hits & ~ignored & outside
    return Match(found.scores[order], hits, ignored, int((~leave).sum()))


def overlap(found: Objects, truth: Objects, by: str = "boxes") -> np.ndarray:
    """IoU (found, true); with a crowd the share of the found object that lies in it."""
    if by == "masks":
        assert found.masks is not None
        assert truth.masks is not None
        one, other = (each.reshape(len(each), each[:1].size).astype(np.float64) for each in (found.masks, truth.masks))
        if not len(one) or not len(other):
            return np.zeros((len(one), len(other)))
        shared, sizes, others = one @ other.T, one.sum(1), other.sum(1)
    else:
        a, b = found.boxes[:, None].astype(np.float64), truth.boxes[None].astype(np.float64)
        shared = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(2)
        sizes, others = ((each[..., 2:] - each[..., :2]).prod(-1).ravel() for each in (a, b))
    whole = sizes[:, None] + others - shared
    if truth.crowd is not None:
        whole = np.where(np.asarray(truth.crowd, bool), sizes[:, None], whole)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def average_precision(matches: Sequence[dict[int, Match]], *, iou: float | None = None) -> float:
    """COCO's AP, from 0 to 1: the mean over labels and over the IoUs 0.5 to 0.95 of the precision at 101 recalls.

    `iou`: at this one alone, one of `IOUS`. NaN where there is nothing to find.
    """
    levels = _levels(iou)
    found = [_precisions(each, levels).mean() for each in _by_label(matches) if _positives(each)]
    return float(np.mean(found)) if found else float("nan")


def average_recall(matches: Sequence[dict[int, Match]], *, iou: float | None = None) -> float:
    """COCO's AR, from 0 to 1: the share of objects that were found, over labels and over IoUs. NaN where there is nothing to find.

    For AR@K give `most=K` to `match`.
    """
    levels, found = _levels(iou), []
    for each in _by_label(matches):
        if positives := _positives(each):
            found.append(np.mean(sum(one.hits[levels].sum(1) for one in each) / positives))
    return float(np.mean(found)) if found else float("nan")


def _levels(iou: float | None) -> np.ndarray:
    if iou is None:
        return np.arange(len(IOUS))
    at = np.flatnonzero(np.isclose(IOUS, iou))
    if not len(at):
        raise ValueError(f"iou must be one of {', '.join(f'{each:g}' for each in IOUS)}, got {iou}")
    return at


def _by_label(matches: Sequence[dict[int, Match]]) -> list[list[Match]]:
    labels = sorted({label for each in matches for label in each})
    return [[each[label] for each in matches if label in each] for label in labels]


def _positives(matches: Sequence[Match]) -> int:
    return sum(each.positives for each in matches)


def _precisions(matches: Sequence[Match], levels: np.ndarray) -> np.ndarray:
    """(levels, 101): at each recall the best precision that reaches it, or 0."""
    order = np.argsort(-np.concatenate([each.scores for each in matches]), kind="stable")
    hits = np.concatenate([each.hits[levels] for each in matches], 1)[:, order]
    wrong = ~hits & ~np.concatenate([each.ignored[levels] for each in matches], 1)[:, order]
    right, false = hits.cumsum(1), wrong.cumsum(1)
    recall = right / _positives(matches)
    precision = right / (right + false + LEAST)
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    found = np.zeros((len(levels), len(RECALLS)))
    for row in range(len(levels)):
        at = np.searchsorted(recall[row], RECALLS, side="left")
        inside = at < precision.shape[1]
        found[row, inside] = precision[row, at[inside]]
    return found


# -------------------------------------------------------------------------------------------------------------------- segments


def panoptic(
    found: np.ndarray, truth: np.ndarray, *, things: Sequence[int], stuff: Sequence[int], void: int = -1
) -> np.ndarray:
    """Of one image, for each class of `things` and then of `stuff`: sum of IoU, right, wrong and missed segments, (classes, 4).

    `found`, `truth`: whole numbers (height, width, 2) of class and instance; the instance of stuff does not matter. Segments of equal
    class match at an IoU above 0.5. Pixels whose true class is `void` count for nothing, nor does a found segment that lies in them by
    more than half. Raises ValueError for a class in neither list, and for other shapes.
    """
    classes = [*things, *stuff]
    if found.shape != truth.shape or found.ndim != 3 or found.shape[2] != 2:
        raise ValueError(f"found and truth must both be (height, width, 2), got {found.shape} and {truth.shape}")
    given = set(np.unique(np.concatenate([found[..., 0].ravel(), truth[..., 0].ravel()])).tolist())
    if strange := given - {*classes, void}:
        raise ValueError(f"classes must be among things, stuff and void={void}, got {sorted(strange)}")
    ours, theirs = (_segments(each, set(stuff)) for each in (found, truth))
    nowhere = truth[..., 0] == void
    table = np.zeros((len(classes), 4))
    matched_ours: set[tuple[int, int]] = set()
    matched_theirs: set[tuple[int, int]] = set()
    pairs, counts = np.unique(np.concatenate([ours, theirs], 2).reshape(-1, 4), axis=0, return_counts=True)
    sizes = {
        tuple(key): int(n) for key, n in zip(*np.unique(ours.reshape(-1, 2), axis=0, return_counts=True), strict=True)
    }
    others = {
        tuple(key): int(n) for key, n in zip(*np.unique(theirs.reshape(-1, 2), axis=0, return_counts=True), strict=True)
    }
    lost = {tuple(key): int(n) for key, n in zip(*np.unique(ours[nowhere], axis=0, return_counts=True), strict=True)}
    for (a, i, b, j), shared in zip(pairs.tolist(), counts.tolist(), strict=True):
        if a != b or a == void:
            continue
        share = shared / (sizes[a, i] - lost.get((a, i), 0) + others[b, j] - shared)
        if share > 0.5:
            table[classes.index(a)] += (share, 1, 0, 0)
            matched_ours.add((a, i))
            matched_theirs.add((b, j))
    for key, size in sizes.items():
        if key[0] != void and key not in matched_ours and lost.get(key, 0) <= 0.5 * size:
            table[classes.index(key[0]), 2] += 1
    for key in others:
        if key[0] != void and key not in matched_theirs:
            table[classes.index(key[0]), 3] += 1
    return table


def _segments(image: np.ndarray, stuff: set[int]) -> np.ndarray:
    """The same with one instance for each class of stuff."""
    out = image.copy()
    out[np.isin(image[..., 0], list(stuff)), 1] = 0
    return out


def panoptic_quality(tables: Sequence[np.ndarray]) -> float:
    """PQ, from 0 to 1: over classes that are found or there to be found, sum of IoU / (right + wrong / 2 + missed / 2)."""
    total = np.sum(tables, axis=0)
    whole = total[:, 1] + total[:, 2] / 2 + total[:, 3] / 2
    there = whole > 0
    return float((total[there, 0] / whole[there]).mean()) if there.any() else float("nan")


def confusion(found: np.ndarray, truth: np.ndarray, classes: int, *, void: int = -1) -> np.ndarray:
    """Pixels of one image by true class (rows) and found class, (classes, classes); pixels whose true class is `void` are left out."""
    if found.shape != truth.shape:
        raise ValueError(f"found and truth must have one shape, got {found.shape} and {truth.shape}")
    at = truth != void
    pairs = truth[at].astype(np.int64) * classes + found[at]
    if len(pairs) and (truth[at].min() < 0 or found[at].min() < 0 or max(truth[at].max(), found[at].max()) >= classes):
        raise ValueError(f"classes must be 0 to {classes - 1}")
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def mean_iou(tables: Sequence[np.ndarray]) -> float:
    """mIoU over all images together, from 0 to 1, over classes that are found or there to be found."""
    total = np.sum(tables, axis=0)
    right = np.diag(total)
    whole = total.sum(0) + total.sum(1) - right
    there = whole > 0
    return float((right[there] / whole[there]).mean()) if there.any() else float("nan")
