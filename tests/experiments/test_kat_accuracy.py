"""KAT's tiles of photographs and its drawn digits: what is trained on and what is judged share no pixel."""

from __future__ import annotations

import itertools

import pytest
import torch

from assay.experiments.layers import kat


def test_every_picture_has_cells_of_all_parts_and_none_twice():
    for picture in kat.pictures():
        found = {part: kat.cells(picture, part) for part in kat.PARTS}
        assert len(found["train"]) >= 1.5 * len(found["heldout"]) > 0
        for one, other in itertools.combinations(found.values(), 2):
            assert one
            assert other
            assert not set(one) & set(other)
        assert max(c[0] for part in found.values() for c in part) + kat.CELL <= picture.shape[0]
        assert max(c[1] for part in found.values() for c in part) + kat.CELL <= picture.shape[1]


@pytest.mark.parametrize("part", ["train", "choose", "heldout"])
def test_a_tile_lies_in_a_cell_of_its_part(monkeypatch, part):
    marked = [torch.full((256, 320), 0.5)]
    for top, left in kat.cells(marked[0], part):
        inside = (
            slice(top + kat.INNER, top + kat.CELL - kat.INNER),
            slice(left + kat.INNER, left + kat.CELL - kat.INNER),
        )
        marked[0][inside] = 0.75
    monkeypatch.setattr(kat, "pictures", lambda: marked)
    found, labels = kat.tiles(200, part, seed=0)
    assert found.shape == (200, 1, kat.TILE, kat.TILE)
    assert (found == 1).all()  # 0.75 as it is scaled
    assert (labels == 0).all()


def test_tiles_repeat_with_the_seed_and_come_from_every_picture():
    first, labels = kat.tiles(400, "train", seed=1)
    again, other = kat.tiles(400, "train", seed=1)[0], kat.tiles(400, "train", seed=2)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(labels.unique().tolist()) == list(range(len(kat.pictures())))


def test_the_networks_are_of_equal_size():
    count = {arm: sum(p.numel() for p in kat.transformer(arm, 64, 2, 8, 0).parameters()) for arm in kat.ARMS}
    for arm in kat.ARMS:
        assert abs(count[arm] - count["gelu"]) < 0.01 * count["gelu"]


def test_the_digits_of_one_part_are_not_among_those_of_another(monkeypatch):
    """Each digit is drawn in its own grey, so that a drawn one tells where it comes from."""
    grey = torch.linspace(0.1, 1, 1797)
    images = grey[:, None, None, None].expand(-1, 1, 8, 8)
    monkeypatch.setattr("assay.workloads.images.digits", lambda: (images, torch.arange(1797) % 10))
    kat.mnist_like.cache_clear()
    try:
        seen = {}
        for choosing in (False, True):
            train, _, test, _ = kat.mnist_like(2000, choosing)
            seen[choosing] = [set(part.amax(1).mul(1e4).round().int().tolist()) for part in (train, test)]
        assert not seen[False][0] & seen[False][1]
        assert not seen[True][0] & seen[True][1]
        assert not (seen[True][0] | seen[True][1]) & seen[False][1], "no digit that is judged was seen in the search"
    finally:
        kat.mnist_like.cache_clear()


def test_a_drawn_digit_lies_whole_on_the_canvas():
    images, labels = kat.drawn(torch.ones(1, 1, 8, 8), torch.tensor([7]), 50, 0)
    assert images.shape == (50, 784)
    assert (((images > 0.99).sum(1) == 400) & (labels == 7)).all()
    assert len({tuple(image.tolist()) for image in images}) > 20, "places differ"
