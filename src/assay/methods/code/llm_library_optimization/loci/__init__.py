"""Places to make faster, each with its contract, its inputs and candidates: `extrema` of an image, and two in Python's own library."""

from __future__ import annotations

from importlib import resources

DIGEST = "fc61d62a404d75e0"
"""Of all texts here, so that a measurement, which knows modules by their code, is out of date when one of them changes."""


def text(name: str) -> str:
    """The text of a file of this package: a candidate in C, a change as a diff."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
