"""The pathfinder's pictures: what is drawn, that the label is what it says, and that nothing gives it away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from assay.workloads import sequences
from assay.workloads.sequences import pathfinder, pathfinder_sizes

SIDES = (16, 32, 64)


def scenes(side: int, n: int, seed: int = 0):
    """(joined, paths, dots) of n scenes."""
    generator = np.random.default_rng(seed)
    sizes = pathfinder_sizes(side)
    for i in range(n):
        joined = bool(i % 2)
        yield joined, *sequences._scene(side, int(sizes["dashes"]), int(sizes["distractors"]), joined, generator)


@pytest.mark.parametrize("side", SIDES)
def test_pictures_repeat_with_the_seed_and_hold_both_answers(side):
    images, labels = pathfinder(12, side, seed=3)
    assert images.shape == (12, side, side)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert set(labels.tolist()) == {0, 1}
    again, other = pathfinder(12, side, seed=3), pathfinder(12, side, seed=4)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(images, other[0])


@pytest.mark.parametrize("side", SIDES)
def test_dots_are_ends_of_one_long_path_or_of_both(side):
    for joined, paths, dots in scenes(side, 8):
        owners = [{k for k in (0, 1) if (paths[k] == dot).all(-1).any()} for dot in dots]
        assert all(len(owner) == 1 for owner in owners)
        assert (owners[0] == owners[1]) == joined
        assert len(paths[0]) == len(paths[1]) == pathfinder_sizes(side)["dashes"]
        for dot, owner in zip(dots, owners, strict=True):
            path = paths[owner.pop()]
            assert (dot == path[0, 0]).all() or (dot == path[-1, 1]).all()


@pytest.mark.parametrize("side", SIDES)
def test_paths_keep_their_distance_and_stay_inside(side):
    for _, paths, _ in scenes(side, 6):
        points = [sequences._points(path) for path in paths]
        for i in range(len(points)):
            assert points[i].min() >= 0
            assert points[i].max() <= side
            for j in range(i):
                assert sequences._distances(points[i], points[j]).min() >= pathfinder_sizes(side)["space"]
        for path in paths:
            joints = np.linalg.norm(path[1:, 0] - path[:-1, 1], axis=-1)
            assert (joints < pathfinder_sizes(side)["space"]).all()  # dashes of one path lie nearer than two paths


def test_the_distance_of_the_dots_does_not_give_the_answer_away():
    away = {False: [], True: []}
    for joined, _, dots in scenes(32, 200):
        away[joined].append(np.linalg.norm(dots[0] - dots[1]))
    assert abs(np.mean(away[True]) - np.mean(away[False])) < 0.05 * np.mean(away[True])


def test_brightness_does_not_give_the_answer_away():
    images, labels = pathfinder(300, 16, seed=5)
    light = images.mean((1, 2))
    error = light.std() * (1 / (labels == 1).sum() + 1 / (labels == 0).sum()) ** 0.5
    assert abs(light[labels == 1].mean() - light[labels == 0].mean()) < 4 * error


def test_dots_are_the_brightest_spots():
    _, paths, dots = next(scenes(64, 1))
    image = sequences._drawn(64, paths, dots)
    whole = torch.nn.functional.avg_pool2d(torch.from_numpy(image)[None, None], 3, 1, 1)[0, 0].numpy()
    spots = [whole[int(y), int(x)] for y, x in dots]
    middles = [whole[int(y), int(x)] for y, x in paths[2].mean(1)]
    assert min(spots) > max(middles)


def test_a_drawn_dash_is_where_it_should_be():
    image = sequences._drawn(16, [np.array([[[8.0, 2.0], [8.0, 14.0]]])], np.array([[4.0, 4.0], [12.0, 12.0]]))
    assert image[7, 8] == image[8, 8] == pytest.approx(0.5)  # half a pixel either side of the line
    assert image[2, 9] == image[13, 4] == 0
    assert image[4, 4] == image[3, 3] == 1


def test_more_dashes_and_no_distractors():
    plain, _ = pathfinder(3, 32, seed=0, distractors=0)
    full, _ = pathfinder(3, 32, seed=0, distractors=4)
    assert plain.sum() < full.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 8}, "side"),
        ({"n": 0}, "n must"),
        ({"dashes": 1}, "dashes"),
        ({"distractors": -1}, "distractors"),
        ({"side": 16, "distractors": 60}, "take fewer"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pathfinder(**{"n": 1, "side": 32, **options})
