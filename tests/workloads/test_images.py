from __future__ import annotations

import sys

import pytest
import torch

from assay.errors import MissingError
from assay.workloads import images as module
from assay.workloads.images import PHOTOGRAPHS, clip, crops, digits, digits_split, photograph, stained_tissue


def test_digits_are_split_without_overlap():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert sorted(labels.unique().tolist()) == list(range(10))
    train, _, test, test_labels = digits_split(seed=1)
    assert len(train) + len(test) == 1797
    assert len(test) == len(test_labels)
    assert torch.equal(digits_split(seed=1)[2], test)
    assert not torch.equal(digits_split(seed=2)[2], test)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_real_pictures(name):
    picture = photograph(name)
    assert picture.shape[0] == 3
    assert min(picture.shape[1:]) >= 300
    assert 0 <= picture.min() < picture.max() <= 1
    assert picture.std() > 0.1


def test_the_stain_is_some_of_the_tissue():
    grey, stain = stained_tissue()
    assert grey.shape[1:] == stain.shape
    assert 0.05 < stain.float().mean() < 0.6


def test_crops_come_from_the_picture_and_repeat():
    picture = photograph("china")
    found = crops(picture, 32, 5, seed=3)
    assert found.shape == (5, 3, 32, 32)
    assert torch.equal(found, crops(picture, 32, 5, seed=3))
    with pytest.raises(ValueError, match="size"):
        crops(picture, 10_000, 1)
    for value in (8.0, float("nan"), True):
        with pytest.raises(TypeError, match="size must be a whole number"):
            crops(picture, value, 1)
        with pytest.raises(TypeError, match="n must be a whole number"):
            crops(picture, 8, value)
        with pytest.raises(TypeError, match="frames must be a whole number"):
            clip(picture, value, 8)
    with pytest.raises(ValueError, match="image must have shape"):
        crops(picture[0], 8, 1)
    with pytest.raises(TypeError, match="image must hold floating-point numbers"):
        clip(picture.to(torch.uint8), 2, 8)


def test_a_clip_moves_smoothly():
    frames = clip(photograph("coffee"), 8, 48, seed=2)
    assert frames.shape == (8, 3, 48, 48)
    near = (frames[1:] - frames[:-1]).abs().mean()
    far = (frames[-1] - frames[0]).abs().mean()
    assert 0 < near < far


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    module.digits.cache_clear()
    with pytest.raises(MissingError, match="vision"):
        digits()
    with pytest.raises(ValueError, match="china"):
        photograph("moon landing")
