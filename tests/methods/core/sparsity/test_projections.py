"""Masks have exact counts, the best scores, and one answer for ties; references are brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from assay.methods.core.sparsity import projections
from assay.methods.core.sparsity.projections import (
    blocks,
    density,
    emptied,
    expand,
    follows,
    global_,
    kept_count,
    n_m,
    per_layer,
    per_row,
    structured,
    top,
    transposable,
)


def best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """By definition: sort, the first of equal ones first."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.5, -1.0, float("inf"), float("-inf")]), min_size=1, max_size=24),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_top_keeps_exactly_as_many_and_the_first_of_equal_ones(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    found = top(scores, keep)
    assert int(found.sum()) == keep
    assert torch.equal(found, best(scores, keep))
    assert torch.equal(top(torch.stack([scores, scores.flip(0)]), keep)[1], best(scores.flip(0), keep))


@pytest.mark.parametrize(
    ("total", "share", "kept"),
    [(10, 0.9, 9), (10, 0.1, 1), (1000, 0.7, 700), (3, 0.5, 2), (7, 0.0, 0), (7, 1.0, 7), (0, 0.3, 0), (9, 1e-9, 1)],
)
def test_counts_are_decimal(total, share, kept):
    assert kept_count(total, share) == kept


def test_global_masks_are_those_of_torch_prune_at_the_same_count():
    model = nn.Sequential(nn.Linear(7, 11), nn.Conv2d(3, 5, 3), nn.Linear(13, 2))
    scores = {name: layer.weight.detach().abs() for name, layer in model.named_children()}
    total = sum(x.numel() for x in scores.values())
    masks = global_(scores, density=0.17)
    kept = kept_count(total, 0.17)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    assert density(masks) == kept / total
    prune.global_unstructured([(layer, "weight") for layer in model], prune.L1Unstructured, amount=total - kept)
    for name, layer in model.named_children():
        assert torch.equal(masks[name], layer.weight_mask.bool())
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), global_(scores, keep=kept).values(), strict=True))


def test_a_constant_score_still_gives_the_exact_count():
    scores = {"a": torch.ones(5, 5), "b": torch.ones(3)}
    masks = global_(scores, keep=26)
    assert bool(masks["a"].all())
    assert masks["b"].tolist() == [True, False, False]
    assert emptied(global_(scores, keep=25)) == ["b"]
    assert int(per_row(scores["a"], 0.5).sum(1).unique()) == 3
    assert int(n_m(torch.zeros(4, 8), 2, 4).sum()) == 16


def test_layers_and_rows_have_their_own_thresholds():
    scores = {"a": torch.randn(6, 10).abs(), "b": 100 * torch.randn(4, 5).abs()}
    masks = per_layer(scores, 0.3)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 18, "b": 6}
    assert torch.equal(masks["b"].flatten(), best(scores["b"].flatten(), 6))
    mixed = per_layer(scores, {"a": 0.1, "b": 1.0})
    assert {name: int(mask.sum()) for name, mask in mixed.items()} == {"a": 6, "b": 20}
    rows = per_row(scores["a"], keep=4)
    for row, mask in zip(scores["a"], rows, strict=True):
        assert torch.equal(mask, best(row, 4))
    kernel = torch.randn(5, 2, 3, 3)
    assert per_row(kernel, 0.5).flatten(1).sum(1).tolist() == [9] * 5


def test_structured_masks_are_all_or_nothing():
    scores = torch.randn(8, 6, 3, 3)
    filters = structured(scores, 0.3)
    assert int(filters.flatten(1).all(1).sum()) == int(filters.flatten(1).any(1).sum()) == kept_count(8, 0.3) == 3
    channels = structured(scores, keep=2, axis=1, norm="l1").movedim(1, 0).flatten(1)
    assert torch.equal(channels.all(1), best(scores.abs().sum((0, 2, 3)), 2))
    heads = structured(scores.flatten(1), keep=1, size=4)
    assert heads.view(2, -1).all(1).sum() == heads.view(2, -1).any(1).sum() == 1
    assert torch.equal(
        expand(torch.tensor([True, False]), torch.Size((2, 4)), axis=1, size=2)[0],
        torch.tensor([True, True, False, False]),
    )


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (2, 3), (8, 6)])
def test_blocks_are_all_or_nothing(block):
    scores = torch.randn(8, 6)
    mask = blocks(scores, block, 0.5)
    tiles = [(i, j) for i in range(0, 8, block[0]) for j in range(0, 6, block[1])]
    cells = [mask[i : i + block[0], j : j + block[1]] for i, j in tiles]
    norms = torch.tensor([float(scores[i : i + block[0], j : j + block[1]].norm()) for i, j in tiles])
    assert all(bool(cell.all()) == bool(cell.any()) for cell in cells)
    assert torch.equal(torch.stack([cell.any() for cell in cells]), best(norms, kept_count(len(tiles), 0.5)))
    kernel = torch.randn(4, 3, 3, 3)
    assert torch.equal(blocks(kernel, (2, 1), keep=20), blocks(kernel.flatten(1), (2, 1), keep=20).view_as(kernel))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (2, 8), (4, 4)])
def test_n_m_keeps_the_largest_of_each_group_along_either_axis(n, m):
    scores = torch.randn(16, 24).abs()
    inputs, outputs = n_m(scores, n, m), n_m(scores, n, m, axis=0)
    assert int(inputs.sum()) == int(outputs.sum()) == scores.numel() * n // m
    for group, mask in zip(scores.reshape(-1, m), inputs.reshape(-1, m), strict=True):
        assert torch.equal(mask, best(group, n))
    assert torch.equal(outputs, n_m(scores.T.contiguous(), n, m).T)
    assert follows(scores * inputs, n, m)
    assert follows(scores * outputs, n, m, axis=0)
    if n < m:
        assert not follows(scores, n, m)
        assert not follows(scores[:, :-1], n, m)
    kernel = torch.randn(4, 8, 3, 3).abs()  # groups are channels at one place of the kernel
    assert torch.equal(n_m(kernel, n, m)[:, :, 1, 2], n_m(kernel[:, :, 1, 2], n, m))


def brute(tile: torch.Tensor, n: int) -> float:
    """The best sum over all masks with n a row and n a column, float64."""
    m = len(tile)
    rows = list(itertools.combinations(range(m), n))
    sums = [
        sum(float(tile[i, j]) for i, row in enumerate(chosen) for j in row)
        for chosen in itertools.product(rows, repeat=m)
        if all(sum(j in row for row in chosen) == n for j in range(m))
    ]
    return max(sums)


@pytest.mark.parametrize("solver", [projections._enumerate, projections._flow])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_transposable_masks_are_the_best_there_are(n, m, solver):
    tiles = torch.cat(
        [torch.randn(3, m, m).double(), torch.randn(2, m, m).abs().double(), torch.randint(0, 3, (2, m, m)).double()]
    )
    masks = solver(tiles, n)
    assert bool((masks.sum(1) == n).all())
    assert bool((masks.sum(2) == n).all())
    for tile, mask in zip(tiles, masks, strict=True):
        assert float(tile[mask].sum()) == pytest.approx(brute(tile, n), abs=1e-9)


def test_there_are_ninety_patterns_of_2_4_and_flows_find_the_best_of_larger_blocks():
    assert len(projections._patterns(2, 4)) == 90
    scores = torch.randn(16, 16).double()
    from scipy.optimize import linear_sum_assignment

    masks = transposable(scores, 1, 8)  # with one a row, an assignment
    for i, j in itertools.product(range(2), repeat=2):
        tile = scores[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        chosen = linear_sum_assignment(tile.numpy(), maximize=True)
        assert float(tile[masks[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]].sum()) == pytest.approx(
            float(tile.numpy()[chosen].sum())
        )
    masks = transposable(scores.abs(), 4, 8)
    assert follows(masks.double(), 4, 8)
    assert follows(masks.double(), 4, 8, axis=0)
    assert int(masks.sum()) == 128
    greedy = transposable(scores.abs(), 4, 8, search="greedy")
    assert float(scores.abs()[masks].sum()) >= float(scores.abs()[greedy].sum())


def test_a_transposable_mask_serves_both_products_and_greedy_gets_half_the_best():
    scores = torch.randn(12, 16).abs()
    mask = transposable(scores, 2, 4)
    assert torch.equal(mask.T, transposable(scores.T.contiguous(), 2, 4))
    for axis in (0, 1):
        assert follows(mask.float(), 2, 4, axis=axis)
    greedy = transposable(scores, 2, 4, search="greedy")
    for axis in (0, 1):
        assert follows(greedy.float(), 2, 4, axis=axis)
    assert float(scores[mask].sum()) >= float(scores[greedy].sum()) >= 0.5 * float(scores[mask].sum())
    kernel = torch.randn(4, 8, 3, 3)
    assert torch.equal(transposable(kernel, 2, 4)[:, :, 0, 1], transposable(kernel[:, :, 0, 1], 2, 4))
    assert int(transposable(torch.zeros(8, 8), 2, 4).sum()) == 32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: top(x, 7), ValueError, "keep must be a whole number at least 0 and at most 6, got 7"),
        (lambda x: top(x.fill_(torch.nan), 1), ValueError, "scores must be numbers, got NaN"),
        (lambda x: global_({"a": x}), ValueError, "density or keep must be given, and not both"),
        (lambda x: global_({"a": x}, 0.5, keep=1), ValueError, "density or keep must be given, and not both"),
        (
            lambda x: global_({"a": x}, 1.5),
            ValueError,
            "density must be a finite number at least 0 and at most 1, got 1.5",
        ),
        (lambda x: global_({"a": x}, float("nan")), ValueError, "density must be a finite number"),
        (lambda x: global_({}, 0.5), ValueError, "scores must hold at least one layer"),
        (lambda x: global_([x], 0.5), TypeError, "scores must be a mapping of names to tensors, got list"),
        (lambda x: global_({"a": x.long()}, 0.5), TypeError, r"scores\['a'\] must hold floating-point numbers"),
        (lambda x: per_layer({"a": x}, {"b": 0.5}), ValueError, "density must have the layers of scores"),
        (lambda x: n_m(x, 2, 4), ValueError, "m must divide the 6 places of axis 1, got 4"),
        (lambda x: n_m(x, 5, 4), ValueError, "n must be a whole number at least 1 and at most 4, got 5"),
        (lambda x: n_m(x, 0, 2), ValueError, "n must be a whole number at least 1"),
        (lambda x: transposable(x, 1, 4), ValueError, r"m must divide axes 0 and 1 of the scores \(4, 6\), got 4"),
        (lambda x: transposable(x.fill_(torch.inf), 1, 2), ValueError, "scores must be finite"),
        (
            lambda x: transposable(x, 1, 2, search="best"),
            ValueError,
            "search must be one of 'exact', 'greedy', got 'best'",
        ),
        (lambda x: blocks(x, (3, 1), 0.5), ValueError, r"block must tile the weight \(4, 6\), got \(3, 1\)"),
        (lambda x: structured(x, 0.5, size=3), ValueError, "size must divide the 4 places of axis 0, got 3"),
        (
            lambda x: expand(x[0] > 0, torch.Size((4, 6))),
            ValueError,
            "groups of 1 must fill the 4 places of axis 0, got 6 groups",
        ),
        (lambda x: density({"a": x}), TypeError, r"masks\['a'\] must hold bools"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6))
