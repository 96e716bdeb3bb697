"""COCO files: boxes, classes and masks as pycocotools reads them; files of another form are refused by what is wrong in them."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from assay.errors import InputError
from assay.workloads.coco_folder import coco_folder, run_lengths, unpacked


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / "pictures" / name)
    return tmp_path


def data():
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": 1, "image_id": 3, "category_id": 1, "bbox": [2, 3, 10, 20], "area": 150.5,
                "segmentation": [[2, 3, 12, 3, 12, 23, 2, 23]],
            },
            {
                "id": 2, "image_id": 3, "category_id": 18, "bbox": [0, 0, 40, 30], "iscrowd": 1,
                "segmentation": {"size": [30, 40], "counts": [600, 600]},
            },
        ],
    }  # fmt: skip


def read(folder, content):
    file = folder / "annotations.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return coco_folder(folder / "pictures", file)


def test_what_is_read(folder):
    found = read(folder, data())
    assert found.classes == ("dog", "person")
    empty, full = found.images
    assert (empty.path.name, empty.boxes.shape, empty.masks.shape) == ("a.png", (0, 4), (0, 30, 40))
    assert full.boxes.tolist() == [[2, 3, 12, 23], [0, 0, 40, 30]]
    assert full.labels.tolist() == [1, 0]
    assert full.crowd.tolist() == [False, True]
    assert full.areas.tolist() == [150.5, 1200]
    assert full.masks[1].sum() == 600
    assert full.masks[1][:, 20:].all()  # run lengths go column by column


def test_polygons_are_nearly_those_of_pycocotools(folder):
    rng = np.random.default_rng(0)
    for _ in range(10):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 8))
        corners = np.stack([20 + rng.uniform(6, 14) * np.cos(angles), 15 + rng.uniform(6, 12) * np.sin(angles)], 1)
        content = data()
        content["annotations"] = [content["annotations"][0] | {"segmentation": [corners.ravel().tolist()]}]
        ours = read(folder, content).images[1].masks[0]
        theirs = coco_mask.decode(coco_mask.frPyObjects([corners.ravel().tolist()], 30, 40))[..., 0].astype(bool)
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9


def test_packed_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(1)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((37, 53)) < share
        mask[:, 20:45] = share > 0.4
        packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert (unpacked(run_lengths(packed), 37, 53) == mask).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("categories"), "'categories' must be a list"),
        (lambda d: d["annotations"][0].update(image_id=9), "image 9 and category 1, which are not both there"),
        (lambda d: d["annotations"][0].update(category_id="1"), "'category_id' must be a whole number, got '1'"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "bbox must be four numbers"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "bbox must be four numbers"),
        (lambda d: d["images"][0].update(file_name="../pictures/../secret.png"), "inside of"),
        (lambda d: d["images"][0].update(file_name="missing.png"), "inside of"),
        (lambda d: d["images"][0].update(file_name="link.png"), "inside of"),
        (lambda d: d["images"][0].update(width=10**6, height=10**6), "1000000 x 1000000 pixels"),
        (lambda d: d["images"][0].update(id=3), "have one id"),
    ],
)
def test_what_is_wrong_is_named(folder, change, said):
    (folder / "secret.png").write_bytes(b"")
    (folder / "pictures" / "link.png").symlink_to(folder / "secret.png")
    content = data()
    change(content)
    with pytest.raises(InputError, match=said):
        read(folder, content)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"images": 1}'])
def test_other_files_are_refused(folder, content):
    with pytest.raises(InputError, match=r"annotations\.json"):
        read(folder, content)


def test_masks_that_do_not_fit_are_refused(folder):
    for segmentation, said in (
        ({"size": [30, 40], "counts": [600, 601]}, "add up to 30 x 40"),
        ({"size": [40, 30], "counts": [1200]}, "must be of 30 x 40"),
        ([[1, 2, 3, 4]], "three corners"),
        (None, "no segmentation"),
        ({"size": [30, 40], "counts": "o"}, "within a number"),
        ({"size": [30, 40], "counts": " "}, "hold the character"),
    ):
        content = data()
        content["annotations"][0]["segmentation"] = segmentation
        image = read(folder, content).images[1]
        with pytest.raises(InputError, match=said):
            _ = image.masks
    with pytest.raises(InputError, match="no such folder"):
        coco_folder(folder / "nowhere", folder / "annotations.json")
