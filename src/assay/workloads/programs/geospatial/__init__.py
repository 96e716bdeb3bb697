"""Tasks on maps and geometry in JavaScript: a function to write with Turf, JSTS, Leaflet or Geolib, right programs, and cases.

    for task in tasks().values():
        print(task.id, task.prompt, task.programs["reference"])

They are assay's own, written for what libraries are asked for every day: none is from a published set. `libraries.node_modules` fetches
the libraries. OpenLayers is not among them: it comes as ECMAScript modules only, which a program in the sandbox cannot load.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from assay.workloads.programs.geospatial import with_geolib, with_jsts, with_leaflet, with_turf, without
from assay.workloads.programs.geospatial.task import LIBRARIES, Case, Library, Task

__all__ = ["LIBRARIES", "Case", "Library", "Task", "equals", "plain_tasks", "tasks"]


@cache
def tasks() -> dict[str, Task]:
    """All tasks by id, library by library.

    >>> tasks()["turf/bbox"].header
    'function extent(features)'
    """
    every = [*with_turf.TASKS, *with_jsts.TASKS, *with_leaflet.TASKS, *with_geolib.TASKS]
    return {task.id: task for task in every}


@cache
def plain_tasks() -> dict[str, Task]:
    """Tasks without maps and without a library (`Task.library` is "none"), to tell what a model cannot do in JavaScript at all.

    >>> plain_tasks()["none/gcd"].header
    'function gcd(a, b)'
    """
    return {task.id: task for task in without.TASKS}


@cache
def equals() -> dict[str, dict[str, str]]:
    """Mutants that are as right as the reference they were made of, by task: what was changed, and why nothing can be seen of it."""
    found: dict[str, dict[str, str]] = tomllib.loads(
        Path(__file__).with_name("equals.toml").read_text(encoding="utf-8")
    )
    return found
