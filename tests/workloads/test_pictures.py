"""PhotoCrops, and a user's own folder of pictures."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from assay.errors import InputError
from assay.workloads.picture_folder import class_numbers, decoded, picture_folder
from assay.workloads.pictures import LARGEST, PARTS, PICTURES, bundled_pictures, photo_crops, picture


def test_parts_of_a_photograph_share_no_pixel():
    ends = [PARTS[part] for part in ("train", "choose", "heldout")]
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False))
    narrowest = min(picture(name).shape[2] for name in PICTURES)
    assert int(PARTS["choose"][1] * narrowest) - int(PARTS["choose"][0] * narrowest) >= LARGEST
    assert len({tuple(picture(name).shape[1:]) + (float(picture(name).mean()),) for name in PICTURES}) == 12


def test_crops_come_from_their_part_and_tell_nothing_by_brightness():
    images, labels = photo_crops("train", 3, size=32, seed=1)
    assert images.shape == (36, 1, 32, 32)
    assert labels.tolist() == [label for label in range(12) for _ in range(3)]
    assert images.mean((1, 2, 3)).abs().max() < 1e-4
    assert (images.std((1, 2, 3)) - 1).abs().max() < 1e-2
    assert torch.equal(images, photo_crops("train", 3, size=32, seed=1)[0])
    assert not torch.equal(images, photo_crops("train", 3, size=32, seed=2)[0])
    whole = picture("coins").mean(0)
    left, right = (int(share * whole.shape[1]) for share in PARTS["heldout"])
    crop = photo_crops("heldout", 1, size=LARGEST)[0][PICTURES.index("coins"), 0]
    places = whole[:, left:right].unfold(0, LARGEST, 1).unfold(1, LARGEST, 1).flatten(0, 1)
    scaled = (places - places.mean((1, 2), keepdim=True)) / places.std((1, 2), keepdim=True)
    assert (scaled - crop).abs().amax((1, 2)).min() < 1e-3
    assert photo_crops("choose", 1, size=8, colour=True)[0].shape == (12, 3, 8, 8)


@pytest.mark.parametrize(("settings", "said"), [
    ({"part": "all"}, "part must be one of"), ({"n": 0}, "n must be"), ({"size": 61}, "size must be"),
])  # fmt: skip
def test_what_crops_cannot_be_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        photo_crops(**{"part": "train", "n": 1, **settings})


def test_the_bundled_folder_is_written_once_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    folder = bundled_pictures()
    assert bundled_pictures() == folder
    found = picture_folder(folder)
    assert found.labelled
    assert sorted(set(found.classes)) == sorted(PICTURES)
    assert len(found.paths) == 720
    parts = [set(found.part(part).paths) for part in ("calibrate", "search", "proof")]
    assert sum(map(len, parts)) == 720
    assert len(set.union(*parts)) == 720
    assert len(set(found.part("search").classes)) == 12  # in the order of hashes, so every part has all of them


def make(folder, name, colour=(1, 2, 3), size=(4, 4)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_folder_is_the_same_under_other_names_and_counts_twins_once(tmp_path):
    for number in range(22):
        make(tmp_path / "a", f"{number}.png", (number, 0, 0))
        make(tmp_path / "b", f"x{21 - number}.PNG", (number, 0, 0))
    make(tmp_path / "b", "twin.png", (0, 0, 0))
    first, second = picture_folder(tmp_path / "a"), picture_folder(tmp_path / "b")
    assert first.digest == second.digest
    assert not first.labelled
    assert first.read() == second.read()
    make(tmp_path / "a", "new.png", (0, 9, 0))
    assert picture_folder(tmp_path / "a").digest != first.digest


def test_what_is_no_folder_of_pictures_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        picture_folder(tmp_path / "none")
    make(tmp_path / "few", "1.png")
    with pytest.raises(InputError, match="1 different pictures"):
        picture_folder(tmp_path / "few")
    make(tmp_path / "few", "cats/2.png")
    with pytest.raises(InputError, match="beside the subfolders"):
        picture_folder(tmp_path / "few")


def test_links_are_not_followed_and_other_files_are_no_pictures(tmp_path):
    for number in range(20):
        make(tmp_path / "a", f"{number}.png", (number, 0, 0))
    other = make(tmp_path, "outside.png", (99, 0, 0))
    (tmp_path / "a" / "link.png").symlink_to(other)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert len(picture_folder(tmp_path / "a").paths) == 20
    with pytest.raises(InputError, match="not a picture"):
        decoded(b"no picture", "notes.txt")
    with pytest.raises(InputError, match="not a picture"):
        decoded((tmp_path / "a" / "1.png").read_bytes()[:40], "cut.png")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.workloads.picture_folder.MOST_PIXELS", 15)
    with pytest.raises(InputError, match="4 x 4 pixels"):
        decoded(make(tmp_path, "1.png").read_bytes(), "1.png")


def test_classes_are_found_by_label_number_or_order():
    assert class_numbers(["golden_retriever", "Tabby-cat"], {5: "Golden retriever", 7: "tabby cat"}) == [5, 7]
    assert class_numbers(["0", "3"], {0: "a", 3: "b", 4: "c"}) == [0, 3]
    assert class_numbers(["x", "y", "x"], {0: "LABEL_0", 1: "LABEL_1"}) == [0, 1, 0]
    assert class_numbers(["x", "y"], {0: "a", 1: "b", 2: "c"}) is None
    assert class_numbers(["a", "y"], {0: "a", 1: "b"}) is None
