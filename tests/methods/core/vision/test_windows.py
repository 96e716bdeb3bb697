"""Windows: partition, bias, mask, attention over shifted windows against a loop over the irregular ones, and patch merging."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from assay.methods.core.vision import windows as room
from assay.methods.core.vision.blocks import PatchMerging
from assay.methods.core.vision.windows import (
    ShiftedWindowAttention,
    WindowAttention,
    cached,
    relative_position_index,
    resized_bias_table,
    shift_mask,
    shift_regions,
    window_partition,
    window_reverse,
)


def attended(layer: WindowAttention, x: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """Attention among some positions of one picture (H, W, C), straight from the formula, in float64: (positions, C)."""
    weight = {name: value.double() for name, value in layer.named_parameters()}
    heads, size = layer.heads, layer.window
    rows = torch.stack([x[place].double() for place in places])
    q, k, v = (rows @ weight["qkv.weight"].T + weight.get("qkv.bias", 0)).chunk(3, 1)
    dim = q.shape[1] // heads
    out = []
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        scores = q[:, part] @ k[:, part].T / math.sqrt(dim)
        for i, j in itertools.product(range(len(places)), repeat=2):
            dy, dx = places[i][0] - places[j][0], places[i][1] - places[j][1]
            index = (dy + size - 1) * (2 * size - 1) + dx + size - 1
            scores[i, j] += weight["relative_position_bias_table"][index, head]
        out.append(scores.softmax(1) @ v[:, part])
    return torch.cat(out, 1) @ weight["proj.weight"].T + weight["proj.bias"]


def by_loop(layer: WindowAttention, x: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """Attention in each cell of a grid of cuts, of every picture of (B, H, W, C)."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for picture, (top, below), (left, right) in itertools.product(
        range(len(x)), itertools.pairwise(rows), itertools.pairwise(columns)
    ):
        places = [(y, z) for y in range(top, below) for z in range(left, right)]
        for place, row in zip(places, attended(layer, x[picture], places), strict=True):
            out[picture][place] = row
    return out


def made(width=8, window=4, heads=2, **settings) -> ShiftedWindowAttention:
    torch.manual_seed(0)
    layer = ShiftedWindowAttention(width, window, heads, **settings)
    for name, value in layer.named_parameters():
        nn.init.normal_(value, std=1.0 if "table" in name else 0.3)
    return layer.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ partition and tables


@pytest.mark.parametrize("window", [3, (3, 4), (6, 2)])
def test_partition_and_back(window):
    x = torch.randn(2, 6, 12, 5)
    parts = window_partition(x, window)
    rows, columns = (window, window) if isinstance(window, int) else window
    assert torch.equal(parts[1].view(rows, columns, 5), x[0, :rows, columns : 2 * columns])  # row by row
    assert torch.equal(window_reverse(parts, window, 6, 12), x)


def test_partition_refuses_a_window_that_does_not_divide_the_map():
    with pytest.raises(ValueError, match="window must divide the map of 6 x 12, got 4 x 4"):
        window_partition(torch.zeros(1, 6, 12, 1), 4)


@pytest.mark.parametrize(("rows", "columns", "window"), [(3, 3, None), (3, 3, 3), (2, 3, 4), (1, 4, 4)])
def test_index_of_relative_positions(rows, columns, window):
    found = relative_position_index(rows, columns, window)
    size = window or rows
    places = list(itertools.product(range(rows), range(columns)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        assert found[i, j] == (query[0] - key[0] + size - 1) * (2 * size - 1) + query[1] - key[1] + size - 1


def test_a_smaller_window_takes_the_part_of_the_table_that_a_full_one_has_for_the_same_pairs():
    whole = relative_position_index(4, 4).view(4, 4, 4, 4)
    assert torch.equal(relative_position_index(2, 3, 4).view(2, 3, 2, 3), whole[:2, :3, :2, :3])


def test_resizing_a_table_interpolates_each_head_by_itself():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 13), torch.linspace(-1, 1, 13), indexing="ij")
    table = torch.stack([y.flatten(), 2 * x.flatten(), torch.ones(169)], 1)
    grown = resized_bias_table(table, 7, 12).view(23, 23, 3)
    assert torch.allclose(grown[..., 2], torch.ones(23, 23), atol=1e-5)
    assert (grown[1:, :, 0] > grown[:-1, :, 0]).float().mean() > 0.95  # rises with y
    assert torch.allclose(grown[..., 0], grown[:, :1, 0].expand(23, 23), atol=1e-5)  # and does not change with x
    assert torch.allclose(grown[..., 1], 2 * grown[..., 0].T, atol=1e-5)
    assert torch.allclose(resized_bias_table(table, 7, 7), table, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- the mask


def test_masked_pairs_of_the_published_setting():
    mask = shift_mask(14, 14, (7, 7), (3, 3))
    assert mask.shape == (4, 49, 49)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    assert [(window < 0).any().item() for window in mask] == [False, True, True, True]
    assert int((mask < 0).sum()) == 4128


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(12, 8, (4, 4), (2, 2)), (6, 9, (3, 3), (1, 1)), (4, 8, (4, 4), (0, 3)), (8, 3, (4, 3), (2, 0))],
)
def test_the_mask_parts_what_only_the_roll_has_joined(height, width, window, shift):
    """In a rolled window, the first rows and columns of the picture see each other, and the last ones do."""
    mask = shift_mask(height, width, window, shift)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([y, x], -1).roll((-shift[0], -shift[1]), (0, 1))[None]
    for rolled, allowed in zip(window_partition(places, window), mask == 0, strict=True):
        came_round = rolled < torch.tensor(shift)
        assert torch.equal(allowed, (came_round[:, None] == came_round[None]).all(-1))


def test_padding_is_a_region_of_its_own():
    regions = shift_regions(8, 8, (4, 4), (2, 2), (3, 1)).roll((2, 2), (0, 1))
    assert bool((regions[5:] == 9).all())
    assert bool((regions[:, 7:] == 9).all())
    assert torch.equal(regions[:5, :7], shift_regions(8, 8, (4, 4), (2, 2)).roll((2, 2), (0, 1))[:5, :7])


# -------------------------------------------------------------------------------------------------------------- the attention


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_shifted_attention_is_attention_in_irregular_windows(shift):
    layer, x = made(shift=shift), torch.randn(2, 8, 12, 8)

    def cuts(side):
        return sorted({0, *range(shift, side, 4), side})

    expected = by_loop(layer, x, cuts(8), cuts(12))
    assert (layer(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (2, 2), (1, 3), (1, 1)])
def test_a_map_no_larger_than_the_window_has_plain_attention_over_all_of_it(size):
    x = torch.randn(2, *size, 8)
    expected = by_loop(made(), x, [0, size[0]], [0, size[1]])
    for shift in (0, 2):
        assert (made(shift=shift)(x) - expected).abs().max() < 1e-5


def test_a_long_side_shifts_although_the_other_is_one_window():
    x = torch.randn(1, 3, 8, 8)
    expected = by_loop(made(), x, [0, 3], [0, 2, 6, 8])
    assert (made(shift=2)(x) - expected).abs().max() < 1e-5


def test_masked_padding_leaves_smaller_windows_at_the_border():
    x = torch.randn(1, 6, 7, 8)
    assert (made(mask_padding=True)(x) - by_loop(made(), x, [0, 4, 6], [0, 4, 7])).abs().max() < 1e-5
    shifted = made(mask_padding=True, shift=1)(x)
    assert (shifted - by_loop(made(), x, [0, 1, 5, 6], [0, 1, 5, 7])).abs().max() < 1e-5


def test_padding_is_zeros_at_the_end_that_are_attended_to_unless_masked():
    x = torch.randn(1, 6, 7, 8)
    padded = torch.zeros(1, 8, 8, 8)
    padded[:, :6, :7] = x
    for shift in (0, 1):
        layer = made(shift=shift)
        assert torch.allclose(layer(x), layer(padded)[:, :6, :7], atol=1e-6)
        assert not torch.allclose(layer(x), made(shift=shift, mask_padding=True)(x), atol=1e-3)


def test_rolling_the_picture_by_a_window_rolls_what_an_unshifted_layer_gives():
    layer, x = made(), torch.randn(1, 12, 8, 8)
    assert torch.allclose(layer(x.roll((4, -4), (1, 2))), layer(x).roll((4, -4), (1, 2)), atol=1e-6)
    assert not torch.allclose(layer(x.roll(1, 1)), layer(x).roll(1, 1), atol=1e-3)


def test_a_shifted_layer_connects_neighbouring_windows():
    """Where the gradient of a corner pixel of a window reaches: its window alone, then with a shifted layer the windows around."""
    x = torch.randn(1, 12, 12, 8, requires_grad=True)

    def reach(*layers):
        y = x
        for layer in layers:
            y = layer(y)
        (gradient,) = torch.autograd.grad(y[0, 4, 4].sum(), x)
        return gradient.abs().sum(-1)[0] > 0

    alone = torch.zeros(12, 12, dtype=torch.bool)
    alone[4:8, 4:8] = True
    assert torch.equal(reach(made()), alone)
    assert torch.equal(reach(made(), made()), alone)
    around = torch.zeros(12, 12, dtype=torch.bool)
    around[:8, :8] = True
    assert torch.equal(reach(made(), made(shift=2)), around)


def test_windows_are_as_many_as_without_a_shift(monkeypatch):
    seen = []
    real = WindowAttention.forward
    monkeypatch.setattr(WindowAttention, "forward", lambda self, x, *rest: seen.append(x.shape) or real(self, x, *rest))
    for shift in (0, 2):
        made(shift=shift)(torch.randn(2, 8, 12, 8))
    assert seen == [(12, 16, 8), (12, 16, 8)]


def test_half_precision_gradients_and_no_pictures():
    layer, x = made(shift=2), torch.randn(2, 8, 8, 8)
    half = made(shift=2).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - layer(x)).abs().max() < 0.05 * layer(x).abs().max()
    assert layer(x[:0]).shape == (0, 8, 8, 8)
    layer.requires_grad_(True)
    layer(x).square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in layer.parameters())


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="shift must be a whole number at least 0 and at most 3, got 4"):
        ShiftedWindowAttention(8, 4, 2, shift=4)
    with pytest.raises(ValueError, match="width must be divisible by heads=3, got 8"):
        ShiftedWindowAttention(8, 4, 3)
    with pytest.raises(TypeError, match="mask_padding must be True or False, got 1"):
        ShiftedWindowAttention(8, 4, 2, mask_padding=1)


# ---------------------------------------------------------------------------------------------------------------- what is kept


def test_tables_first_made_without_gradients_or_storage_serve_training_afterwards():
    layer, x = made(shift=2), torch.randn(1, 8, 12, 8)
    room._CACHE.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    layer.to("meta")(x.to("meta"))
    assert not room._CACHE
    torch.export.export(made(shift=2), (x,), strict=False)
    assert not room._CACHE
    with torch.inference_mode():
        made(shift=2)(x)
    assert len(room._CACHE) == 2
    trained = made(shift=2).requires_grad_(True)
    trained(x).sum().backward()
    assert len(room._CACHE) == 2
    assert not any(kept.is_inference() for kept in room._CACHE.values())


def test_what_is_kept_is_bounded():
    like = torch.zeros(())
    for side in range(1, 2 * room.CACHED):
        cached(relative_position_index, 1, side, like=like)
    assert len(room._CACHE) <= room.CACHED


def test_what_another_thread_has_just_dropped_is_made_again(monkeypatch):
    class Dropped(dict):
        def __contains__(self, key):
            return True

    monkeypatch.setattr(room, "_CACHE", Dropped())
    found = cached(relative_position_index, 2, 3, like=torch.zeros(()))
    assert torch.equal(found, relative_position_index(2, 3))


# -------------------------------------------------------------------------------------------------------------- patch merging


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 6), (5, 7), (1, 1)])
def test_merging_joins_neighbours_in_the_published_order(height, width):
    torch.manual_seed(0)
    layer, x = PatchMerging(3), torch.randn(2, height, width, 3)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    found = layer(x)
    assert found.shape == (2, math.ceil(height / 2), math.ceil(width / 2), 6)

    def at(row, column):
        return x[:, row, column] if row < height and column < width else torch.zeros(2, 3)

    for row, column in itertools.product(range(found.shape[1]), range(found.shape[2])):
        order = [at(2 * row + dy, 2 * column + dx) for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
        joined = torch.cat(order, 1).double()
        centred = joined - joined.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        expected = (normed * layer.norm.weight + layer.norm.bias) @ layer.reduction.weight.double().T
        assert (found[:, row, column] - expected).abs().max() < 1e-5
