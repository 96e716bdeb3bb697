"""A user's own pictures: a folder of image files, in subfolders by class where their classes are known.

    pictures/cats/1.jpg  pictures/dogs/2.png  ...        the classes are the subfolders
    pictures/1.jpg  pictures/2.png  ...                  no classes: a model is compared with itself as it was

The files are untrusted: only JPEG, PNG, WebP, BMP and GIF are opened, links are not followed, and no picture of more pixels than
`MOST_PIXELS` is decoded. Nothing but pixels is read from them.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assay import checks
from assay.errors import InputError

Part = Literal["calibrate", "search", "proof"]
PARTS: dict[str, tuple[float, float]] = {"calibrate": (0.0, 0.1), "search": (0.1, 0.4), "proof": (0.4, 1.0)}
"""Shares of the pictures, in the order of the hashes of their contents: the proof needs the most."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MOST_PIXELS = 64 << 20
MOST_BYTES = 64 << 20  # of one file
MOST_FILES = 1 << 20
FEWEST = 20  # pictures in all: below, no part has enough of them


@dataclass(frozen=True)
class PictureFolder:
    """The files of a folder, each with the name of its class ("" where the folder has none)."""

    folder: Path
    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    digest: str = ""  # of the contents and classes of all of them

    @property
    def labelled(self) -> bool:
        """Whether the pictures' classes are known."""
        return all(self.classes)

    def part(self, part: Part) -> PictureFolder:
        """The pictures of a part: the three parts share none, and the same folder always gives the same ones."""
        low, high = (round(share * len(self.paths)) for share in PARTS[checks.choice("part", part, PARTS)])
        return PictureFolder(self.folder, self.paths[low:high], self.classes[low:high])

    def spread(self, n: int) -> PictureFolder:
        """`n` of them at even distances, or all of them where there are no more."""
        count = len(self.paths)
        places = range(count) if n >= count else [place * count // n for place in range(n)]
        return PictureFolder(self.folder, tuple(self.paths[i] for i in places), tuple(self.classes[i] for i in places))

    def read(self) -> list[bytes]:
        """The files' contents. Raises InputError that names a file that cannot be read, or is too large."""
        return [read_file(path) for path in self.paths]


def picture_folder(folder: Path | str) -> PictureFolder:
    """The pictures of a folder: those of its subfolders by class, or, without subfolders, those in it.

    They come in the order of the hashes of their contents, so that a part of them is a fair sample, whatever they are called; a picture
    that is there twice counts once. Raises InputError for a folder that is none, or has fewer than 20 pictures, or has some in
    subfolders and some outside.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    found = [(path, "") for path in _pictures(folder)]
    by_class = [(path, entry.name) for entry in inner for path in _pictures(entry)]
    if found and by_class:
        raise InputError(
            f"{folder}: {len(found)} pictures lie beside the subfolders; put all of them in subfolders, or none"
        )
    found = found or by_class
    if len(found) > MOST_FILES:
        raise InputError(f"{folder}: {len(found):,} pictures are more than {MOST_FILES:,}, the most that is read")
    hashed: dict[str, tuple[Path, str]] = {}
    for path, name in found:
        hashed.setdefault(hashlib.sha256(read_file(path)).hexdigest(), (path, name))
    if len(hashed) < FEWEST:
        raise InputError(
            f"{folder}: {len(hashed)} different pictures ({', '.join(SUFFIXES)}) are too few; at least {FEWEST} are needed, and some "
            "hundreds to show that little is lost"
        )
    ordered = [hashed[digest] for digest in sorted(hashed)]
    whole = hashlib.sha256("\n".join(f"{digest} {hashed[digest][1]}" for digest in sorted(hashed)).encode()).hexdigest()
    return PictureFolder(folder, tuple(path for path, _ in ordered), tuple(name for _, name in ordered), whole)


def decoded(data: bytes, name: str = "a picture") -> Any:
    """The picture of a file's bytes as an RGB `PIL.Image`. Raises InputError, naming it, for what is no picture or has too many pixels."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large pictures: the limit below is ours
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MOST_PIXELS:
                raise InputError(f"{name}: {picture.width} x {picture.height} pixels are more than {MOST_PIXELS:,}")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not a picture that can be read ({error})") from None


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises InputError where it cannot be read or is larger than `MOST_BYTES`."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: larger than {MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def class_numbers(names: Sequence[str], labels: dict[int, str]) -> list[int] | None:
    """The model's number of each picture's class, or None where the folder's names are not the model's.

    A name is one of the model's labels (case and the difference of spaces, `-` and `_` do not count), or a number. Where the folder has as
    many classes as the model and none of their names is a label (as with `LABEL_0`), they count in alphabetical order.

    >>> class_numbers(["cat", "dog", "cat"], {0: "Dog", 1: "Cat"}), class_numbers(["cat", "dog"], {0: "LABEL_0", 1: "LABEL_1"})
    ([1, 0, 1], [0, 1])
    """

    def plain(name: str) -> str:
        return name.casefold().replace("-", " ").replace("_", " ").strip()

    known = {plain(label): number for number, label in labels.items()}
    distinct = sorted(set(names))
    if all(plain(name) in known for name in distinct):
        return [known[plain(name)] for name in names]
    if all(name.isdecimal() and int(name) in labels for name in distinct):
        return [int(name) for name in names]
    if len(distinct) == len(labels) and not any(plain(name) in known for name in distinct):
        return [distinct.index(name) for name in names]
    return None


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink()
    )
