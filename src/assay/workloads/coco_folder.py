"""A user's own annotated pictures: a folder of images and a COCO file of their objects.

    pictures/1.jpg ...   annotations.json        {"images": [...], "annotations": [...], "categories": [...]}

Both are untrusted: the JSON is read as data and checked, file names may not leave the folder, links are not followed, and pictures are
opened by the rules of `picture_folder`. Masks come from polygons (drawn by Pillow, so their border pixels may differ from pycocotools')
and from run lengths, plain or packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import InputError
from assay.workloads.picture_folder import MOST_PIXELS, SUFFIXES

MOST_BYTES = 1 << 30  # of the annotations
FINER = 5  # polygons are drawn so many times as large, and a pixel is what its middle is


@dataclass(frozen=True)
class CocoImage:
    """A picture and its n objects: boxes (n, 4) left, top, right, bottom in pixels, labels (n,) as places in `CocoFolder.classes`,
    crowd bool (n,), areas (n,) as annotated."""

    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    segmentations: tuple[Any, ...]

    @cached_property
    def masks(self) -> np.ndarray:
        """bool (n, height, width). Raises InputError for an object without a segmentation."""
        found = [_mask(each, self.height, self.width, self.path) for each in self.segmentations]
        return np.stack(found) if found else np.zeros((0, self.height, self.width), bool)


@dataclass(frozen=True)
class CocoFolder:
    """The pictures of a COCO file, in its order, and the names of its classes."""

    images: tuple[CocoImage, ...]
    classes: tuple[str, ...]


def coco_folder(folder: Path | str, annotations: Path | str) -> CocoFolder:
    """The pictures of `folder` that a COCO file describes, those without objects too.

    Raises InputError that names what is wrong: a file that is none, JSON of another form, an object of an unknown image or category, a
    box that is not four numbers, a name that leaves the folder, a picture that is not there.
    """
    folder, file = Path(folder), Path(annotations)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise InputError(f"{file}: more than {MOST_BYTES >> 20} MiB of annotations")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not a COCO file: {error}") from None
    lists = {name: _list(data, name, file) for name in ("images", "annotations", "categories")}
    places = {_whole(each, "id", file): place for place, each in enumerate(lists["categories"])}
    classes = tuple(str(each.get("name", place)) for place, each in enumerate(lists["categories"]))
    objects: dict[int, list[Mapping[str, Any]]] = {_whole(each, "id", file): [] for each in lists["images"]}
    if len(objects) < len(lists["images"]) or len(places) < len(classes):
        raise InputError(f"{file}: two images or two categories have one id")
    for each in lists["annotations"]:
        image, category = _whole(each, "image_id", file), _whole(each, "category_id", file)
        if image not in objects or category not in places:
            raise InputError(
                f"{file}: an annotation is of image {image} and category {category}, which are not both there"
            )
        objects[image].append(each)
    images = tuple(_image(folder, file, each, objects[each["id"]], places) for each in lists["images"])
    return CocoFolder(images, classes)


def _list(data: Any, name: str, file: Path) -> list[Mapping[str, Any]]:
    found = data.get(name) if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InputError(f"{file}: {name!r} must be a list of objects")
    return found


def _whole(each: Mapping[str, Any], name: str, file: Path) -> int:
    value = each.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{file}: {name!r} must be a whole number, got {value!r}")
    return value


def _image(
    folder: Path, file: Path, image: Mapping[str, Any], objects: Sequence[Mapping[str, Any]], places: Mapping[int, int]
) -> CocoImage:
    width, height = _whole(image, "width", file), _whole(image, "height", file)
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise InputError(f"{file}: an image of {width} x {height} pixels")
    name = image.get("file_name")
    path = folder / str(name)
    if not isinstance(name, str) or path.suffix.lower() not in SUFFIXES or not _inside(path, folder):
        raise InputError(f"{file}: file_name must name a picture inside of {folder}, got {name!r}")
    boxes = [_box(each, file) for each in objects]
    sizes = [
        float(each.get("area", (box[2] - box[0]) * (box[3] - box[1]))) for each, box in zip(objects, boxes, strict=True)
    ]
    return CocoImage(
        path,
        width,
        height,
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array([places[each["category_id"]] for each in objects], dtype=np.int64),
        np.array([bool(each.get("iscrowd", 0)) for each in objects], dtype=bool),
        np.array(sizes, dtype=np.float64),
        tuple(each.get("segmentation") for each in objects),
    )


def _inside(path: Path, folder: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.resolve().is_relative_to(folder.resolve())


def _box(each: Mapping[str, Any], file: Path) -> list[float]:
    box = each.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(x, int | float) and np.isfinite(x) for x in box)
    ):
        raise InputError(f"{file}: bbox must be four numbers (x, y, width, height), got {box!r}")
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _mask(segmentation: Any, height: int, width: int, path: Path) -> np.ndarray:
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width] or not isinstance(counts, list | str):
            raise InputError(f"{path}: run lengths must be of {height} x {width} pixels, got {size!r}")
        return unpacked(run_lengths(counts) if isinstance(counts, str) else counts, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise InputError(f"{path}: an object has no segmentation")
    from PIL import Image, ImageDraw

    canvas = Image.new("1", (FINER * width, FINER * height))
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise InputError(f"{path}: a polygon must have at least three corners, x and y in turn")
        ImageDraw.Draw(canvas).polygon([FINER * float(x) for x in polygon], fill=1)
    return np.array(canvas, dtype=bool)[FINER // 2 :: FINER, FINER // 2 :: FINER]


def unpacked(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """The mask of run lengths, bool (height, width): pixels outside and inside in turn, column by column. Raises InputError unless they
    fill it."""
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts) or sum(counts) != height * width:
        raise InputError(f"counts must be whole numbers that add up to {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def run_lengths(packed: str) -> list[int]:
    """Run lengths of COCO's packed text: five bits a character from "0" on, the sixth says that more follow; from the fourth run on they
    are differences to the run two before. Raises InputError for text that ends within a number."""
    counts: list[int] = []
    value = shift = 0
    for character in packed:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise InputError(f"packed run lengths hold the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise InputError("packed run lengths end within a number")
    return counts
