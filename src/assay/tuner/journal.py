"""The journal of a tuning run: one line per finished measurement, so that `--resume` continues where a run stopped.

The first line says what the measurements belong to: the settings, the contents of the model's, the workload's and the evaluation's
files, the machine, and the version of assay. Failed measurements are recorded for people to read, and measured again on resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.errors import InputError
from assay.paths import atomic_file, cache_dir
from assay.tuner.work import Settings

CONTENT = (".safetensors", ".json", ".model", ".txt", ".jinja", ".gguf")  # the files that make a model what it is

Say = Callable[[str], None]


class Journal:
    """One JSON line per finished measurement, synced to disk before the next one starts.

    With `resume`, lines of an earlier run are reused if they belong to the same thing. If the model, the workload, the machine or
    assay has changed since, the journal starts anew, and `say` is told why. Raises InputError when the journal was started with
    other settings, which only the user can put right.
    """

    def __init__(self, path: Path, head: dict[str, Any], resume: bool, max_drop: float, say: Say) -> None:
        self.path = path
        self.old: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _read(path) if resume else []
        if lines and (reason := _changed(path, lines[0], head)):
            say(f"{reason} since the journal was begun: beginning anew")
            lines = []
        kept = [line for line in lines[1:] if "key" in line and _holds(line["value"], max_drop)]
        with atomic_file(path) as temporary:  # without what failed, and without a line cut short by a crash
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [head, *kept]), encoding="utf-8")
        self.old = {line["key"]: line["value"] for line in kept}
        self.taken = len(self.old)

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The recorded value of `key`; if there is none, `make()`, which is then recorded."""
        if key not in self.old:
            self.add(key, make())
        return self.old[key]

    def add(self, key: str, value: dict[str, Any]) -> None:
        """Record a measurement."""
        append(self.path, key, value)
        self.old[key] = value

    def read_again(self) -> None:
        """Take over what a child appended to the file (`append`)."""
        self.old |= self.seen()

    def seen(self) -> dict[str, dict[str, Any]]:
        """What the file holds now."""
        return {line["key"]: line["value"] for line in _read(self.path)[1:] if "key" in line}

    def count(self) -> int:
        """How many finished measurements `--resume` would reuse."""
        return sum(_holds(value, -1.0) for value in self.old.values())


def append(path: Path | str, key: str, value: dict[str, Any]) -> None:
    """Write one line and sync it to disk."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, "value": value}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def identity(settings: Settings) -> dict[str, Any]:
    """What a run's measurements belong to: the journal's first line. Raises as `find_model` and `read_workload` do."""
    from assay.evidence.place import here
    from assay.workloads.models import find_model

    workload = Path(settings.workload) if settings.workload else None
    if workload is not None and not workload.is_file():
        raise InputError(f"{workload}: no such workload file")
    own = Path(settings.eval) if settings.eval and not settings.eval.startswith("lm_eval:") else None
    place = here()
    return {
        "settings": dataclasses.asdict(settings),
        "model": model_hash(find_model(settings.model, settings.allow_download)),
        "workload": file_hash(workload) if workload else "",
        "eval": file_hash(own) if own else "",
        "machine": f"{place.fingerprint} with {place.machine['threads']} threads",
        "assay": f"{place.assay_version} {place.commit}".strip(),
    }


def model_hash(source: Path) -> str:
    """SHA-256 over the names and contents of the files that make up a model, be it a folder or one file."""
    files = sorted(f for f in source.iterdir() if f.suffix in CONTENT and f.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name if source.is_dir() else ''}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content.

    The first reading costs about a second per GB; after that the hash is cached under the file's inode, size and change times.
    The inode's own change time (ctime) is among them, because a tool that rewrites a file and restores its date cannot restore
    that one.
    """
    found = path.stat()
    if found.st_size < 1 << 20:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    stamp = [str(path.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    known = cache_dir() / "hashes" / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    if known.is_file() and len(kept := known.read_text().strip()) == 64:
        return kept
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    with atomic_file(known) as temporary:
        temporary.write_text(content)
    return content


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; a line cut short by a crash is skipped."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _changed(path: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why the lines of a journal are no longer valid, or ""."""
    if old.get("settings") != new["settings"]:
        raise InputError(f"{path} was begun with other settings; leave out --resume to start anew")
    names = {
        "model": "the model's files have",
        "workload": "the workload's file has",
        "eval": "the evaluation's file has",
        "machine": "the machine has",
        "assay": "assay itself has",
    }
    changed = [text for name, text in names.items() if old.get(name) != new[name]]
    return f"{' and '.join(changed)} changed" if changed else ""


def _holds(value: dict[str, Any], max_drop: float) -> bool:
    """Whether a measurement can be reused: it succeeded, and did not stop early because a smaller loss was allowed then."""
    return (
        value.get("status", "ok") == "ok"  # not "failed", nor "begun"
        and value.get("complete", True)
        and not value.get("hopeless_at", max_drop) < max_drop
    )
