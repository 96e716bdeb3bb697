"""The survey's field as data: models with their task, modality, design and scan order."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal


@dataclass(frozen=True)
class Entry:
    """One model of the survey's field. `builder` holds the options of `UNet` (or `Classifier`) that come nearest to it."""

    method: str
    arxiv: str
    task: str  # segmentation, classification, registration, reconstruction, restoration, synthesis, backbone
    modality: tuple[str, ...]
    dimension: tuple[str, ...]  # 2d, 3d, video
    design: Literal["pure", "hybrid"]
    order: str  # a name in `orders.ORDERS`, or in words
    code: bool
    builder: Mapping[str, Any]

    @property
    def year(self) -> int:
        """Year of its first arXiv version."""
        return 2000 + int(self.arxiv[:2])


@functools.cache
def _entries() -> tuple[Entry, ...]:
    text = (resources.files(__package__) / "taxonomy.toml").read_text()
    rows: list[dict[str, Any]] = tomllib.loads(text)["model"]
    lists = ("modality", "dimension")
    return tuple(Entry(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in rows)


def taxonomy(**filters: Any) -> list[Entry]:
    """The rows whose fields equal all filters (`modality="mri"`: contain it), such as task="segmentation", dimension="3d".

    Raises ValueError for a field that rows do not have.

    >>> [row.method for row in taxonomy(task="registration")]
    ['MambaMorph', 'VMambaMorph']
    """
    fields = (*Entry.__dataclass_fields__, "year")
    if unknown := set(filters) - set(fields):
        raise ValueError(f"filters must be among {', '.join(fields)}, got {', '.join(sorted(unknown))}")

    def fits(row: Entry) -> bool:
        found = {name: getattr(row, name) for name in filters}
        return all(want in found[k] if isinstance(found[k], tuple) else found[k] == want for k, want in filters.items())

    return [row for row in _entries() if fits(row)]
