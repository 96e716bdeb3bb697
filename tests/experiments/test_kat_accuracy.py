"""KAT's accuracy on tiles of photographs: train and test tiles share no pixel, and the gain is that of paired runs."""

from __future__ import annotations

import pytest
import torch

from assay.experiments.layers import kat


def test_every_picture_has_cells_of_both_parts_and_none_twice():
    for picture in kat.pictures():
        train, held_out = kat.cells(picture, False), kat.cells(picture, True)
        assert len(train) >= 2 * len(held_out) > 0
        assert not set(train) & set(held_out)
        assert max(c[0] for c in train + held_out) + kat.CELL <= picture.shape[0]
        assert max(c[1] for c in train + held_out) + kat.CELL <= picture.shape[1]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_tile_lies_in_a_cell_of_its_part(monkeypatch, held_out):
    marked = [torch.full((256, 320), 0.5)]
    for top, left in kat.cells(marked[0], held_out):
        inside = (
            slice(top + kat.MARGIN, top + kat.CELL - kat.MARGIN),
            slice(left + kat.MARGIN, left + kat.CELL - kat.MARGIN),
        )
        marked[0][inside] = 0.75
    monkeypatch.setattr(kat, "pictures", lambda: marked)
    found, labels = kat.tiles(200, held_out=held_out, seed=0)
    assert found.shape == (200, 1, kat.TILE, kat.TILE)
    assert (found == 1).all()  # 0.75 as it is scaled
    assert (labels == 0).all()


def test_tiles_repeat_with_the_seed_and_come_from_every_picture():
    first, labels = kat.tiles(400, held_out=False, seed=1)
    again, other = kat.tiles(400, held_out=False, seed=1)[0], kat.tiles(400, held_out=False, seed=2)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(labels.unique().tolist()) == list(range(len(kat.pictures())))


def test_the_networks_are_of_equal_size():
    sizes = {"img_size": kat.TILE, "patch_size": 8, "num_classes": 17}
    count = {mlp: sum(p.numel() for p in kat.model_of(mlp, 64, 4, 0, **sizes).parameters()) for mlp in ("kat", "gelu")}
    assert 0 < count["kat"] - count["gelu"] < 0.01 * count["gelu"]


def test_the_difference_of_pairs():
    gain, reach = kat.paired([3.0, 5.0, 7.0], [2.0, 3.0, 6.0])
    assert gain == pytest.approx(4 / 3)
    assert reach == pytest.approx(4.303 * (1 / 3) ** 0.5 / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="seeds"):
        kat.paired([1.0], [2.0])


def test_a_small_run_gives_the_gain_of_its_accuracies():
    figure = kat.accuracy_gain(width=16, depth=1, patch=16, train=64, epochs=1, seeds=2)
    found = figure.details["accuracy"]
    assert figure.unit == "points"
    assert figure.value == pytest.approx((sum(found["kat"]) - sum(found["gelu"])) / 2)
    assert figure.low <= figure.value <= figure.high
    assert figure.quality.candidate - figure.quality.baseline == pytest.approx(figure.value)
