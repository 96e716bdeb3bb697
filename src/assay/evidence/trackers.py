"""Evidence as a folder that an experiment tracker shows: MLflow's file store, or Trackio's databases. Neither library is needed.

A paper is an experiment (Trackio: a project), a record a run. Its point and its conditions are parameters, its figures metrics under the
name of the claim, its verdict as of now and where it comes from are tags; MLflow's runs hold the whole record as an artifact. The layouts
are those that the libraries document and read: https://mlflow.org/docs/latest/self-hosting/migrate-from-file-store and
https://huggingface.co/docs/trackio/storage_schema. MLflow no longer develops its file store: it wants to be told that one may be read
(`command` does), and `mlflow migrate-filestore` turns one into a database.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from assay.errors import InputError
from assay.evidence.reading import Reading
from assay.evidence.record import Evidence
from assay.evidence.report import point_text, reason_text, verdict_text
from assay.evidence.types import Estimate
from assay.paths import atomic_dir

T = TypeVar("T")
SIGN = "assay-evidence.json"  # a folder is written over none but an earlier export
BESIDE = (SIGN, ".trash", "models")  # what MLflow puts there itself
LONGEST = 5000  # characters of a parameter or a tag, MLflow's limit
LONGEST_NAME = 60  # characters of a name that becomes a file's; four bytes each fit
FINISHED, FAILED = 3, 4  # MLflow's states of a run
TABLES = """
CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT NOT NULL, run_id TEXT NOT NULL, run_name TEXT NOT NULL,
  step INTEGER NOT NULL, metrics TEXT NOT NULL, log_id TEXT, space_id TEXT);
CREATE INDEX idx_metrics_run_step ON metrics(run_name, step);
CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, run_name TEXT NOT NULL, config TEXT NOT NULL,
  created_at TEXT NOT NULL, UNIQUE(run_id));
CREATE INDEX idx_configs_run_name ON configs(run_name);
"""


@dataclass(frozen=True)
class Run:
    """A record as a tracker sees it."""

    record: Evidence
    name: str
    params: dict[str, Any]
    metrics: dict[str, float]
    tags: dict[str, str]


def run_of(record: Evidence, by: str) -> Run:
    """A record as a run; `by` says whose it is."""
    what = _key(record.claim.split("/", 1)[1])
    params: dict[str, Any] = {
        "claim": record.claim,
        "metric": record.metric,
        "unit": record.unit,
        "higher is better": record.higher_is_better,
        "form": record.form,
        "scale": record.scale,
        "seed": record.seed,
        "free": record.free_label,
        "exact": record.exact_label,
        "machine": str(record.machine.get("cpu", "unknown processor")),
        "fingerprint": record.fingerprint,
        **{f"point.{name}": value for name, value in record.point.items()},
    }
    tags = {
        "verdict": verdict_text(record).removesuffix(" *"),
        "reason": reason_text(record),
        "by": by,
        "status": record.status,
        "noisy": record.noise or str(record.noisy).lower(),
        "decides": str(record.decides).lower(),
        "record": record.id,
        "command": record.command,
        "version": record.assay_version,
        "commit": record.commit,
    }
    name = f"{what} {point_text(record.point)}"[:120] + f" {record.scale} {record.id[:8]}"
    metrics = {f"{what}/{name}": value for name, value in _unique(_figures(record)).items()}
    return Run(record, _plain(name), _unique(params), metrics, {f"assay.{key}": text for key, text in tags.items()})


def _figures(record: Evidence) -> dict[str, float]:
    found: dict[str, float | None] = {"paper": record.paper_value, "seconds": record.seconds}
    for name, estimate in (("measured", record.measured), *((f"ratio {arm}", r) for arm, r in record.ratios.items())):
        if isinstance(estimate, Estimate):
            found |= {name: estimate.median, f"{name} low": estimate.low, f"{name} high": estimate.high}
    found |= {"baseline": record.baseline, "free": record.free, "exact": record.exact}
    found |= {f"seconds {arm}": value for arm, value in record.seconds_of.items()}
    found |= {f"arm {arm}": value for arm, value in record.arms.items()}
    found |= {f"control {name}": value for name, value in record.controls.items()}
    if record.quality is not None:
        quality = record.quality
        found |= {"quality": quality.candidate, "quality low": quality.low, "quality high": quality.high}
        found |= {"quality baseline": quality.baseline}
        found |= {f"quality {name}": value for name, value in quality.controls.items()}
    return {name: value for name, value in found.items() if value is not None}


def _unique(values: Mapping[str, T]) -> dict[str, T]:
    """With names that every tracker and every file system takes, each different from the others whatever their case."""
    found: dict[str, T] = {}
    taken: set[str] = set()
    for name, value in values.items():
        key, count = _key(name), 1
        while key.casefold() in taken:
            count += 1
            key = f"{_key(name)[: LONGEST_NAME - 8]} {count}"
        taken.add(key.casefold())
        found[key] = value
    return found


def _key(name: str) -> str:
    """A name of letters, digits, "_", "-", "." and spaces, that is no path.

    >>> _key("../../etc/passwd"), _key("a  b*c"), _key("")
    ('__.._etc_passwd', 'a  b_c', '_')
    """
    key = re.sub(r"[^\w.\- ]", "_", name)[:LONGEST_NAME].strip()
    return re.sub(r"^\.+", "_", key) or "_"


def _plain(text: str) -> str:
    """One line of printable characters."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def check(target: Path) -> None:
    """Raise InputError unless `target` is free, or an earlier export in which nobody else has put anything."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise InputError(f"FILE must name a folder with --to, {target} is none")
    there = {path.name for path in target.iterdir()}
    if not there:
        return
    try:
        names = json.loads((target / SIGN).read_text(encoding="utf-8"))["names"]
        ours = {*BESIDE, *names, *(f"{name}{end}" for name in names for end in ("-wal", "-shm", "-journal"))}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{target} is there and is no earlier export: choose another folder, or remove it") from None
    if strange := sorted(there - ours):
        raise InputError(
            f"{target} holds what assay has not written ({strange[0]}): choose another folder, or move it away"
        )


def export(found: Reading, target: Path, to: str) -> None:
    """Write the records to the folder `target` for the tracker `to` (one of `WRITERS`), whole or not at all.

    Raises InputError for a folder that holds anything but an earlier export.
    """
    target = target.resolve()
    check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    runs = [run_of(record, "imported" if record.id in found.imported else "you") for record in found.records]
    with atomic_dir(target) as folder:
        names = WRITERS[to](runs, folder, target)
        (folder / SIGN).write_text(json.dumps({"to": to, "names": sorted(names)}) + "\n", encoding="utf-8")


def command(target: Path, to: str) -> str:
    """The command that shows an export."""
    place = shlex.quote(str(target.resolve()))
    if to == "trackio":
        return f"TRACKIO_DIR={place} trackio show"
    return f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {place}"


def _by_paper(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run.record.slug), []).append(run)
    return found


# MLflow: a folder an experiment, in it a folder a run, in it a file a parameter, a metric and a tag


def _mlflow(runs: list[Run], folder: Path, target: Path) -> set[str]:
    (folder / ".trash").mkdir()
    names = set()
    for slug, mine in _by_paper(runs).items():
        experiment = _number(slug)
        names.add(experiment)
        place = folder / experiment
        place.mkdir()
        times = [_milliseconds(run.record.created) for run in mine]
        facts: dict[str, Any] = {
            "artifact_location": (target / experiment).as_uri(), "creation_time": min(times), "experiment_id": experiment,
            "last_update_time": max(times), "lifecycle_stage": "active", "name": slug,
        }  # fmt: skip
        _write(place / "meta.yaml", _yaml(facts))
        for run in mine:
            _mlflow_run(run, experiment, place / run.record.id, target / experiment / run.record.id)
    return names


def _mlflow_run(run: Run, experiment: str, place: Path, target: Path) -> None:
    record = run.record
    end = _milliseconds(record.created)
    start = end - int(1000 * record.seconds) if 0 <= 1000 * record.seconds <= end else end
    state = FINISHED if record.status == "ok" else FAILED
    facts: dict[str, Any] = {
        "artifact_uri": (target / "artifacts").as_uri(), "deleted_time": None, "end_time": end, "entry_point_name": "",
        "experiment_id": experiment, "lifecycle_stage": "active", "run_id": record.id, "run_name": run.name, "run_uuid": record.id,
        "source_name": "", "source_type": 4, "source_version": "", "start_time": start, "status": state, "tags": [], "user_id": "",
    }  # fmt: skip
    tags = {
        **run.tags,
        "mlflow.runName": run.name,
        "mlflow.note.content": run.tags["assay.reason"],
        "mlflow.source.name": record.command,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": record.commit,
    }
    for part in ("metrics", "params", "tags", "artifacts"):
        (place / part).mkdir(parents=True)
    _write(place / "meta.yaml", _yaml(facts))
    for name in {name.split("/")[0] for name in run.metrics}:
        (place / "metrics" / name).mkdir()
    for name, value in run.metrics.items():
        _write(place / "metrics" / name, f"{end} {value!r} 0\n")
    for name, given in run.params.items():
        _write(place / "params" / name, _text(given))
    for name, text in tags.items():
        _write(place / "tags" / name, _text(text))
    _write(place / "artifacts" / "record.json", record.to_json() + "\n")


def _number(slug: str) -> str:
    """An experiment's id: a number, as MLflow's databases want it, and the same in every export."""
    return str(int(hashlib.sha256(slug.encode()).hexdigest()[:15], 16))


def _milliseconds(at: datetime) -> int:
    """Since 1970; trackers know no time before."""
    return max(0, int(at.timestamp() * 1000))


def _yaml(facts: Mapping[str, Any]) -> str:
    """JSON values are YAML, as long as their texts are printable."""
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in facts.items())


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))


# Trackio: a database a project


def _trackio(runs: list[Run], folder: Path, target: Path) -> set[str]:
    names = set()
    for slug, mine in _by_paper(runs).items():
        name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', slug)}.db"
        new = name not in names
        names.add(name)
        with contextlib.closing(sqlite3.connect(folder / name)) as connection, connection:
            if new:
                connection.executescript(TABLES)
            for run in mine:
                at = run.record.created.astimezone(UTC).isoformat()
                group = next(iter(run.metrics)).split("/")[0]
                config = {**run.params, **run.tags, "_Created": at, "_Group": group, "_Username": None}
                connection.execute(
                    "INSERT INTO metrics (timestamp, run_id, run_name, step, metrics) VALUES (?, ?, ?, 0, ?)",
                    (at, run.record.id, run.name, json.dumps(run.metrics)),
                )
                connection.execute(
                    "INSERT INTO configs (run_id, run_name, config, created_at) VALUES (?, ?, ?, ?)",
                    (run.record.id, run.name, json.dumps(config), at),
                )
    return names


WRITERS: dict[str, Callable[[list[Run], Path, Path], set[str]]] = {"mlflow": _mlflow, "trackio": _trackio}
