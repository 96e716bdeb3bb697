"""Scenes of digits: exact boxes and masks, parts that share nothing, the same scenes for the same seed."""

import pytest
import torch

import assay.workloads.digit_scenes as digit_scenes_module
from assay.methods.core.vision.boxes import masks_to_boxes
from assay.workloads.digit_scenes import CLASSES, MOST, _digits_of, _ground, digit_scenes
from assay.workloads.pictures import PARTS


@pytest.fixture(scope="module")
def scenes():
    return digit_scenes("train", 40, size=96)


def test_boxes_are_tight_around_the_masks_and_masks_share_no_pixel(scenes):
    for scene in scenes:
        assert scene.boxes.equal(masks_to_boxes(scene.masks))
        assert scene.masks.sum(0).max() == 1
        assert 1 <= len(scene.labels) <= MOST
        assert scene.labels.min() >= 0
        assert scene.labels.max() < CLASSES
        assert scene.image.shape == (3, 96, 96)
        assert 0 <= scene.image.min() <= scene.image.max() <= 1


def test_the_maps_say_what_the_masks_say(scenes):
    for scene in scenes[:5]:
        for number, (mask, label) in enumerate(zip(scene.masks, scene.labels, strict=True), start=1):
            assert (scene.semantic[mask] == label + 1).all()
            assert (scene.panoptic[mask] == torch.tensor([label + 1, number])).all()
        assert (scene.panoptic[~scene.masks.any(0)] == 0).all()


def test_a_digit_stands_out_from_its_ground(scenes):
    gaps = []
    for scene in scenes:
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes.int().tolist(), strict=True):
            inside = scene.image[:, mask].mean()
            around = scene.image[:, top:bottom, left:right][:, ~mask[top:bottom, left:right]].mean()
            gaps.append(float((inside - around).abs()))
    assert sum(gap > 0.1 for gap in gaps) > 0.9 * len(gaps)


def test_every_number_and_size_of_digits_is_there():
    found = digit_scenes("train", 200, size=128)
    counts = [len(scene.labels) for scene in found]
    assert {1, 2, 3} <= set(counts)
    assert max(counts) >= 6
    assert set(torch.cat([scene.labels for scene in found]).tolist()) == set(range(CLASSES))
    heights = torch.cat([scene.boxes[:, 3] - scene.boxes[:, 1] for scene in found])
    assert heights.min() < 18
    assert heights.max() > 40


def test_parts_share_no_digit():
    parts = [_digits_of(part)[0].flatten(1) for part in PARTS]
    assert sum(map(len, parts)) == 1797
    seen = [{tuple(digit.tolist()) for digit in part} for part in parts]
    assert all(len(a & b) <= 1 for i, a in enumerate(seen) for b in seen[i + 1 :])  # as good as none was written twice


def test_parts_share_no_column_of_a_texture(monkeypatch):
    monkeypatch.setattr(digit_scenes_module, "picture", lambda name: torch.arange(512.0).expand(3, 512, 512))
    generator = torch.Generator().manual_seed(0)
    for part, (low, high) in PARTS.items():
        for size in (64, 160):
            ground = torch.stack([_ground(part, "grass", size, generator) for _ in range(20)])
            assert int(low * 512) <= ground.min() <= ground.max() < int(high * 512), part


def test_a_seed_is_a_scene(scenes):
    again = digit_scenes("train", 3, size=96)
    assert all(a.image.equal(b.image) and a.labels.equal(b.labels) for a, b in zip(scenes, again, strict=False))
    assert not digit_scenes("train", 1, size=96, seed=1)[0].image.equal(again[0].image)
    assert digit_scenes("choose", 1, size=160)[0].image.shape == (3, 160, 160)  # wider than its part of the texture


def test_what_is_refused():
    for name, arguments in {
        "part": {"part": "test", "n": 1},
        "n": {"part": "train", "n": 0},
        "size": {"part": "train", "n": 1, "size": 32},
        "most": {"part": "train", "n": 1, "most": 9},
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            digit_scenes(**arguments)
