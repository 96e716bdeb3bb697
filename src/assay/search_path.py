"""Which folders modules are imported from. The current folder is never one: a `random.py` beside somebody's model would be run.

Python puts the current folder first on the path for `python -m` and `python -c`, and an empty entry in PYTHONPATH means the
current folder too. Every process assay starts gets a path without it, and the command line removes it from its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

HOME = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir))


def without_current_folder(entries: Iterable[str]) -> list[str]:
    """`entries` of a search path as absolute paths, in their order, less the current folder.

    It is kept only if assay itself was imported from it, since its code is running already.
    """
    try:
        current = os.getcwd()
    except FileNotFoundError:  # deleted meanwhile: a relative entry means nothing any more
        return [entry for entry in entries if os.path.isabs(entry)]
    absolute = [os.path.normpath(os.path.join(current, entry)) for entry in entries]
    here = os.path.realpath(current)
    return [entry for entry in absolute if here == HOME or os.path.realpath(entry) != here]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment `given`, changed so that no Python started with it imports from the current folder."""
    safe = {**given, "PYTHONSAFEPATH": "1"}
    if "PYTHONPATH" in given:
        safe["PYTHONPATH"] = os.pathsep.join(without_current_folder(given["PYTHONPATH"].split(os.pathsep)))
    return safe


def leave_current_folder() -> None:
    """Import nothing from the current folder from now on, neither in this process nor in those it starts."""
    sys.path[:] = without_current_folder(sys.path)
    os.environ.update(environment(os.environ))
