"""The extrema of an 8-bit image, in C, with NumPy and in Python alone: the paper's own place, with candidates of our own.

The reference in C does what pillow's code does: rows lie anywhere in memory, and a table says where; a byte is looked at once, first
whether it is below all before it, else whether it is above; and after a row in which both 0 and 255 are known it is done. The paper's
candidates are not used, and were not looked at.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.methods.code.llm_library_optimization.backends import Binding, CHere, CInterface, PythonHere, shared_library
from assay.methods.code.llm_library_optimization.case import Args, Candidate, Case, Input
from assay.methods.code.llm_library_optimization.loci import text

Image = NDArray[np.uint8]
FLAGS = ("-O3",)
"""What the deciding comparison is compiled with: optimised, for any processor of its kind, as packages are."""
NATIVE = ("-O3", "-march=native")
CONTRACT = (
    "extrema(rows, width, height, low, high) stores the smallest and the largest byte of an image of `height` rows of `width` bytes, "
    "both at least 1. Rows lie anywhere; nothing beyond them is read, and nothing but the two results is written."
)
NAMES = {
    "branch_free": "two choices without a branch, every row",
    "two_pass": "two passes",
    "histogram": "which of 256 values occur",
    "early_exit": "two choices without a branch, done when 0 and 255 are known",
}
REFERENCE = Candidate("if lower, else if higher", text("extrema/reference.c"))
SAMPLED = Candidate("every fourth row", text("extrema/sampled.c"), "tool")
BEYOND = Candidate("blocks of sixteen, beyond the end of a row", text("extrema/beyond.c"), "tool")
CANDIDATES = {
    name: Candidate(
        said,
        text(f"extrema/{name}.c"),
        "tool",
        parent=Candidate("", text("extrema/branch_free.c")).digest if name == "early_exit" else "",
    )
    for name, said in NAMES.items()
}
"""In the order they are tried: one of them is made of another."""


class Rows:
    """A table of where the rows of an image lie. It keeps the image, and is good for as long as the image is not moved."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.height, self.width = image.shape
        self._table = np.arange(self.height, dtype=np.uintp) * np.uintp(image.strides[0]) + np.uintp(image.ctypes.data)
        self.address = ctypes.c_void_p(self._table.ctypes.data)


@cache
def _loop() -> Any:
    found = ctypes.CDLL(str(shared_library(text("extrema/loop.c"), ("-O2",)))).repeat
    found.restype = ctypes.c_double
    return found


def bind(library: ctypes.CDLL) -> Binding:
    """The calls of a library that defines `extrema`. Raises AttributeError for one that does not."""
    function = library.extrema
    function.restype = None
    address = ctypes.cast(function, ctypes.c_void_p)

    def answer(image: Image) -> tuple[int, int]:
        rows = Rows(image)
        found = (ctypes.c_uint8 * 2)()
        function(rows.address, rows.width, rows.height, found, ctypes.byref(found, 1))
        return found[0], found[1]

    def repeat(args: Args, calls: int) -> float:
        rows = Rows(args[0])
        found = (ctypes.c_uint8 * 2)()
        return float(_loop()(address, rows.address, rows.width, rows.height, ctypes.c_long(calls), found))

    return Binding(answer, repeat)


def _encode(cases: Sequence[Args], calls: int) -> bytes:
    parts = [struct.pack("<qq", calls, len(cases))]
    for (image,) in cases:
        parts += [struct.pack("<ii", image.shape[1], image.shape[0]), image.tobytes()]
    return b"".join(parts)


INTERFACE = CInterface(bind, text("extrema/driver.c"), _encode, lambda line: tuple(int(part) for part in line.split()))


def backend(flags: tuple[str, ...] = FLAGS) -> CHere:
    """C compiled with these flags."""
    return CHere(INTERFACE, flags)


def made_images(height: int = 427, width: int = 640, seed: int = 0) -> dict[str, tuple[str, Image]]:
    """Images that no camera took, by name with their kind: constant, random, sorted, with both ends in the first row, tiny."""
    rng = np.random.default_rng(seed)
    sloped = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width)
    noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
    ends = np.full((height, width), 100, dtype=np.uint8)
    ends[0, 0], ends[0, -1] = 0, 255
    last = np.full((height, width), 100, dtype=np.uint8)
    last[-1, -1], last[-1, -2 % width] = 255, 0
    return {
        "all 0": ("constant", np.zeros((height, width), np.uint8)),
        "all 255": ("constant", np.full((height, width), 255, np.uint8)),
        "random bytes": ("random", noise),
        "rising": ("sorted", sloped),
        "falling": ("sorted", sloped[::-1, ::-1].copy()),
        "0 and 255 in the first row": ("ends first", ends),
        "0 and 255 in the last two bytes": ("ends last", last),
        "one byte": ("tiny", np.full((1, 1), 7, np.uint8)),
        "17 in a row": ("tiny", rng.integers(0, 256, (1, 17), dtype=np.uint8)),
        "31 rows of one": ("tiny", rng.integers(0, 256, (31, 1), dtype=np.uint8)),
    }


def _random(rng: random.Random) -> Args:
    """A small image with gaps between its rows, of few or many values, sometimes with one byte that stands out."""
    width, height, gap = rng.randint(1, 70), rng.randint(1, 9), rng.randint(0, 5)
    low = rng.randint(0, 255)
    high = rng.randint(low, 255)
    image = np.array([[rng.randint(low, high) for _ in range(width + gap)] for _ in range(height)], dtype=np.uint8)
    if rng.random() < 0.5:
        image[rng.randrange(height), rng.randrange(width)] = rng.choice((0, 255))
    return image, width


def _view(args: Args) -> Args:
    image, width = args
    return (image[:, :width],)


def _inputs(photographs: Mapping[str, Image], height: int, width: int) -> tuple[Input, ...]:
    real = [Input(name, "photograph", (image, image.shape[1])) for name, image in photographs.items()]
    made = [Input(name, kind, (image, image.shape[1])) for name, (kind, image) in made_images(height, width).items()]
    first = next(iter(photographs.values()))
    gaps = Input("a photograph's left part", "rows with gaps", (first, max(1, first.shape[1] - 13)))
    return (*real, gaps, *made)


def in_c(photographs: Mapping[str, Image], *, height: int = 427, width: int = 640, draws: int = 200) -> Case:
    """The case in C. `photographs` decide; the other images are of the given size."""
    inputs = _inputs(photographs, height, width)
    return Case("extrema in C", CONTRACT, REFERENCE, inputs, "photograph", random=_random, draws=draws, prepare=_view)


# ---------------------------------------------------------------------------------------------------------------------- NumPy

WITH_NUMPY = Candidate("min, then max", "def extrema(image):\n    return int(image.min()), int(image.max())\n")
NUMPY_CANDIDATES = (
    Candidate(
        "counts of 256 values",
        "import numpy as np\n\n"
        "def extrema(image):\n"
        "    seen = np.flatnonzero(np.bincount(image.ravel(), minlength=256))\n"
        "    return int(seen[0]), int(seen[-1])\n",
        "tool",
    ),
    Candidate(
        "band after band, done when 0 and 255 are known",
        "def extrema(image):\n"
        "    low, high = 255, 0\n"
        "    for top in range(0, len(image), 32):\n"
        "        band = image[top:top + 32]\n"
        "        low, high = min(low, int(band.min())), max(high, int(band.max()))\n"
        "        if low == 0 and high == 255:\n"
        "            break\n"
        "    return low, high\n",
        "tool",
    ),
    Candidate(
        "rows together first",
        "import numpy as np\n\n"
        "def extrema(image):\n"
        "    return int(np.minimum.reduce(image, axis=0).min()), int(np.maximum.reduce(image, axis=0).max())\n",
        "tool",
    ),
)


def with_numpy(photographs: Mapping[str, Image], *, height: int = 427, width: int = 640, draws: int = 200) -> Case:
    """The case with NumPy, whose reductions are vectorised as they are."""
    inputs = _inputs(photographs, height, width)
    contract = (
        "extrema(image) is the smallest and the largest value of a two-dimensional array of bytes, as whole numbers."
    )
    return Case(
        "extrema with NumPy", contract, WITH_NUMPY, inputs, "photograph", random=_random, draws=draws, prepare=_view
    )


# --------------------------------------------------------------------------------------------------------------------- Python

IN_PYTHON = Candidate(
    "if lower, elif higher",
    "def extrema(rows):\n"
    "    low = high = rows[0][0]\n"
    "    for row in rows:\n"
    "        for value in row:\n"
    "            if value < low:\n"
    "                low = value\n"
    "            elif value > high:\n"
    "                high = value\n"
    "    return low, high\n",
)
PYTHON_CANDIDATES = (
    Candidate(
        "min and max of every row",
        "def extrema(rows):\n    return min(map(min, rows)), max(map(max, rows))\n",
        "tool",
    ),
    Candidate(
        "which values occur",
        "def extrema(rows):\n    seen = set().union(*rows)\n    return min(seen), max(seen)\n",
        "tool",
    ),
    Candidate(
        "looking for each value from both ends",
        "def extrema(rows):\n"
        "    data = b''.join(rows)\n"
        "    low, high = 0, 255\n"
        "    while low not in data:\n"
        "        low += 1\n"
        "    while high not in data:\n"
        "        high -= 1\n"
        "    return low, high\n",
        "tool",
    ),
)


def _bytes(args: Args) -> Args:
    (image,) = _view(args)
    return ([row.tobytes() for row in image],)


def in_python(photographs: Mapping[str, Image], *, every: int = 4, draws: int = 200) -> Case:
    """The case in Python alone, on every so many-th pixel of the photographs both ways: a whole one takes long."""
    small = {name: image[::every, ::every].copy() for name, image in photographs.items()}
    height, width = next(iter(small.values())).shape
    contract = "extrema(rows) is the smallest and the largest byte of a list of rows, each of them bytes and none of them empty."
    return Case(
        "extrema in Python", contract, IN_PYTHON, _inputs(small, height, width), "photograph", random=_random, draws=draws, prepare=_bytes
    )  # fmt: skip


def python_backend() -> PythonHere:
    """Where the two cases above run."""
    return PythonHere("extrema")
