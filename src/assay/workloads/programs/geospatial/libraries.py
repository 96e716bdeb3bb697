"""The JavaScript libraries of the tasks: which versions, and where they are once npm has fetched them.

    folder = node_modules()  # the first time: `npm ci` into assay's cache, by the lock file beside this one; needs the network once

The lock file is made by `npm install --package-lock-only --omit-lockfile-registry-resolved`: it names versions and their digests, and no
place to get them from, which is npm's own setting. No script of a package is run. Programs read the folder from inside of the sandbox,
where there is no network.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from assay.errors import MissingError
from assay.paths import atomic_dir, cache_dir
from assay.workloads.programs.geospatial.task import Library

HERE = Path(__file__).with_name("node")
LEAST_NODE = (20, 18)
SCRIPTS = ("jsts/dist/jsts.min.js",)
"""Files that are scripts in a package of ECMAScript modules: they lie beside our own too, where Node takes them for what they are."""
MINUTES = 10
"""How long npm may take."""


def versions() -> dict[str, str]:
    """The libraries and their versions.

    >>> sorted(versions())
    ['@turf/turf', 'geolib', 'jsdom', 'jsts', 'leaflet']
    """
    found: dict[str, str] = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    return found


def module_of(library: Library) -> str:
    """What a program loads before it begins, so that the library is there under its usual global name.

    >>> module_of("turf")
    'assay-globals/turf.js'
    """
    return f"assay-globals/{library}.js"


@cache
def node_modules() -> Path:
    """The folder with the libraries, fetched by npm if it is not there yet.

    It lies in assay's cache under a name that says what is in it, and is whole or not there. Raises MissingError where Node or npm is
    missing or too old, or the packages cannot be fetched, and says what to do.
    """
    place = _place()
    if not place.is_dir():
        import filelock

        _check_tools()
        place.parent.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{place.parent}.lock"):
            if not place.is_dir():
                _install(place.parent)
    return place


def _place() -> Path:
    digest = hashlib.sha256()
    for path in sorted(path for path in HERE.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes() + b"\0")
    return cache_dir() / "javascript" / f"geospatial-{digest.hexdigest()[:16]}" / "node_modules"


def _check_tools() -> None:
    for tool, package in (("node", "nodejs"), ("npm", "npm")):
        if shutil.which(tool) is None:
            raise MissingError(f"{tool} is not installed (Debian: apt install {package}): the JavaScript tasks need it")
    told = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.match(r"v(\d+)\.(\d+)", told)
    if found is None or (int(found[1]), int(found[2])) < LEAST_NODE:
        raise MissingError(
            f"Node {told.strip() or '?'} is too old: the JavaScript tasks need {'.'.join(map(str, LEAST_NODE))}"
        )


def _install(folder: Path) -> None:
    """`npm ci` in a folder that takes its name when all is there."""
    with atomic_dir(folder) as made:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, made / name)
        command = [
            "npm",
            "ci",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--no-update-notifier",
            "--loglevel=error",
        ]
        try:
            ran = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
        except subprocess.TimeoutExpired:
            raise MissingError(f"npm did not fetch {_named()} in {MINUTES} minutes: try again with a network") from None
        if ran.returncode:
            last = " ".join(ran.stderr.split())[-300:]
            raise MissingError(f"npm cannot fetch {_named()} (it needs the network once): {last}")
        own = made / "node_modules" / "assay-globals"
        shutil.copytree(HERE / "globals", own)
        for name in SCRIPTS:
            shutil.copy(made / "node_modules" / name, own)


def _named() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())
