"""Boxes, non-maximum suppression, and work on some tokens: against the definitions, on random and degenerate input."""

import math

import pytest
import torch

from assay.methods.core.vision.boxes import (
    area,
    batched_nms,
    complete_iou,
    generalized_iou,
    iou,
    masks_to_boxes,
    nms,
    to_centres,
    to_corners,
)
from assay.methods.core.vision.tokens import best_tokens, gather_tokens, kept_of, scatter_tokens


def boxes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 50
    return torch.cat([corners, corners + 1 + torch.rand(n, 2, generator=generator, dtype=torch.float64) * 40], 1)


def painted(box, side=120):
    """Pixels of a box of whole numbers."""
    left, top, right, bottom = (int(x) for x in box)
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_formats_are_inverse():
    found = boxes(20)
    assert to_corners(to_centres(found)).allclose(found)
    assert to_centres(torch.tensor([2.0, 4, 6, 10])).tolist() == [4, 7, 4, 6]


def test_overlaps_are_shares_of_pixels():
    one, other = boxes(12, 1).round(), boxes(12, 2).round()
    for a, b in zip(one, other, strict=True):
        p, q = painted(a), painted(b)
        hull = painted(torch.cat([torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:])]))
        share = (p & q).sum() / (p | q).sum()
        assert float(iou(a, b)) == pytest.approx(float(share))
        assert float(generalized_iou(a, b)) == pytest.approx(float(share - (hull.sum() - (p | q).sum()) / hull.sum()))
    assert iou(one[:, None], other).shape == (12, 12)


def test_complete_iou_by_its_formula():
    for a, b in zip(boxes(10, 3).tolist(), boxes(10, 4).tolist(), strict=True):
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        overlap = shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
        apart = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
        hull = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
        v = 4 / math.pi**2 * (math.atan((b[2] - b[0]) / (b[3] - b[1])) - math.atan((a[2] - a[0]) / (a[3] - a[1]))) ** 2
        wanted = overlap - apart / hull - v * v / (1 - overlap + v)
        assert float(
            complete_iou(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        ) == pytest.approx(wanted, abs=1e-6)


def test_empty_boxes_overlap_nothing_and_have_gradients():
    empty = torch.tensor([3.0, 3, 3, 3], requires_grad=True)
    full = torch.tensor([0.0, 0, 10, 10])
    assert iou(empty, empty).item() == 0
    assert float(area(torch.tensor([5.0, 5, 1, 9]))) == 0
    for overlap in (iou, generalized_iou, complete_iou):
        (gradient,) = torch.autograd.grad(overlap(empty, full).sum(), empty)
        assert gradient.isfinite().all(), overlap


def slow_nms(found, scores, threshold):
    left = sorted(range(len(found)), key=lambda i: (-float(scores[i]), i))
    kept = []
    for i in left:
        if all(float(iou(found[i], found[j])) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppression_is_greedy(threshold):
    found = boxes(60, 5)
    scores = (torch.rand(60, generator=torch.Generator().manual_seed(6)) * 8).round() / 8  # many are equal
    assert nms(found, scores, threshold).tolist() == slow_nms(found, scores, threshold)


def test_suppression_within_groups():
    found, scores = boxes(40, 7), torch.rand(40, generator=torch.Generator().manual_seed(8))
    groups = torch.arange(40) % 3
    wanted = sorted(
        (
            i
            for g in range(3)
            for i in (groups == g).nonzero()[:, 0][nms(found[groups == g], scores[groups == g], 0.3)].tolist()
        ),
        key=lambda i: -float(scores[i]),
    )
    assert batched_nms(found, scores, groups, 0.3).tolist() == wanted
    assert batched_nms(found[:0], scores[:0], groups[:0], 0.3).tolist() == []
    with pytest.raises(ValueError, match="threshold"):
        nms(found, scores, 1.5)
    with pytest.raises(ValueError, match=r"boxes must be \(n, 4\)"):
        nms(found, scores[:-1], 0.5)


def test_boxes_of_masks():
    wanted = boxes(8, 9).round()
    masks = torch.stack([painted(box) for box in wanted] + [torch.zeros(120, 120, dtype=torch.bool)])
    assert masks_to_boxes(masks).tolist() == [*wanted.tolist(), [0, 0, 0, 0]]


# ---- tokens ----


def test_the_best_tokens_in_order_and_the_earlier_of_equal_ones():
    scores = torch.tensor([[1.0, 3, 3, 2], [-1, -2, -3, -4]])
    assert best_tokens(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_invalid_tokens_come_last_whatever_their_score():
    scores = torch.tensor([[9.0, 1, 5, -torch.inf]])
    valid = torch.tensor([[False, True, False, True]])
    assert best_tokens(scores, 4, valid=valid).tolist() == [[1, 3, 0, 2]]


def test_sets_are_nested():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    many = best_tokens(scores, 30)
    assert (best_tokens(scores, 12) == many[:, :12]).all()


def test_the_others_stay_as_they_are():
    tokens = torch.randn(2, 7, 3)
    picked = torch.tensor([[4, 0], [6, 2]])
    some = gather_tokens(tokens, picked)
    assert some[0, 0].equal(tokens[0, 4])
    found = scatter_tokens(tokens, picked, some + 1)
    changed = (found != tokens).any(2)
    assert changed.nonzero().tolist() == [[0, 0], [0, 4], [1, 2], [1, 6]]
    assert gather_tokens(found, picked).equal(some + 1)
    assert scatter_tokens(tokens, picked, some).equal(tokens)


def test_images_may_keep_different_numbers():
    tokens, picked = torch.zeros(2, 5, 1), torch.tensor([[0, 1, 2], [3, 4, 0]])
    kept = kept_of(torch.tensor([1, 3]), 3)
    found = scatter_tokens(tokens, picked, torch.ones(2, 3, 1, dtype=torch.float64), kept=kept)
    assert found.dtype == tokens.dtype
    assert found[..., 0].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]


def test_what_tokens_refuse():
    scores = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="k must be"):
        best_tokens(scores, 5)
    with pytest.raises(ValueError, match="NaN"):
        best_tokens(scores * torch.nan, 2)
    with pytest.raises(ValueError, match="valid must be bool"):
        best_tokens(scores, 2, valid=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scores must be \(batch, tokens\)"):
        best_tokens(scores[0], 2)
