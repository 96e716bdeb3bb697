"""What models are called."""

from __future__ import annotations

import os


def served_name(model: str) -> str:
    """The model's name for clients: the name of its folder or file, with `.` and `..` resolved, or the last part of its id.

    >>> served_name("someone/smollm2")
    'smollm2'
    """
    path = os.path.abspath(os.path.expanduser(model))
    name = os.path.basename(path) if os.path.exists(path) else model.rstrip("/").rpartition("/")[2]
    return name.encode("utf-8", "replace").decode() or "model"
