"""Somebody else's samples of a before and an after: the formats that benchmark tools write, read without trust.

`read` takes the text of a file and finds out what it is:

- CSV (commas, semicolons or tabs) with a column each, named in the first line; or in long form, a label and a value a line in the order
  they were taken;
- JSON: {"before": [...], "after": [...]} or two lists under any names; a list of two {"name": ..., "values": [...]};
- hyperfine's `--export-json` (seconds, `results[].times`);
- pytest-benchmark's `--benchmark-json` with `--benchmark-save-data` (seconds, `benchmarks[].stats.data`);
- optimum-benchmark's `benchmark_report.json` or `benchmark.json` (`latency.values` of each part), a file for each of the two.

Several JSON documents may follow each other, as `cat before.json after.json` makes them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError

MOST_BYTES = 10_000_000
MOST_DIGITS = 400  # of one number
MOST_COLUMNS = 200
BEFORE = ("before", "baseline", "base", "old", "reference", "control")
AFTER = ("after", "candidate", "new", "optimized", "optimised", "treatment")
LISTS = ("values", "times", "samples", "data")  # what a named series may call its list
ONCE = ("load", "first_")  # parts of an optimum-benchmark report that happen once a run


@dataclass(frozen=True)
class Series:
    """One arm: positive, finite values in the order they were taken. `stated` is what the file itself sums it up by (`mean`, `min`)."""

    name: str
    values: tuple[float, ...]
    stated: dict[str, float] = field(default_factory=dict)
    failed: int = 0  # runs that ended with an error, where the file says so


@dataclass(frozen=True)
class Samples:
    """Two arms. `order` is how they were taken, where the format or the file tells: one after the other ("blocks") or in turn.

    "A B A B" is in turn with the same arm always first, "A B B A" with changing places; "" is unknown.
    """

    format: str
    before: Series
    after: Series
    order: str = ""

    @property
    def alternating(self) -> bool:
        """Whether the two are known to be taken in turn, so that they pair up."""
        return self.order in ("A B A B", "A B B A")


def read_file(path: Path | str, *, before: str | None = None, after: str | None = None) -> Samples:
    """The samples in a file. Errors are those of `read`, and InputError for a file that cannot be read or is larger than 10 MB."""
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            return read(decoded(stream.read(MOST_BYTES + 1), str(path)), before=before, after=after)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def decoded(content: bytes, name: str) -> str:
    """Bytes as text. Raises InputError when there are more than 10 MB of them, or they are no text in UTF-8."""
    if len(content) > MOST_BYTES:
        raise InputError(f"{name} is larger than {MOST_BYTES // 1_000_000} MB: keep the samples of the two arms only")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} is no text in UTF-8") from None


def read(text: str, *, before: str | None = None, after: str | None = None) -> Samples:
    """The two series in a text of any of the formats above; `before` and `after` name them where there are more, or the other way round.

    Unless they are named, the first is the baseline, except where the names say which is which ("after, before"). Raises InputError
    for anything else, naming what is wrong: a time that is not positive and finite, a number of thousands of digits, a series that
    is not there.

    >>> found = read("before,after\\n2.0,1.0\\n2.1,1.1\\n")
    >>> found.format, found.before.values, found.after.name
    ('CSV, two columns', (2.0, 2.1), 'after')
    """
    if not text.strip():
        raise InputError("there are no samples: the input is empty")
    if text.lstrip()[0] in "[{":
        kind, found, order = _json(text)
    else:
        kind, found, order = _csv(text, (before, after))
    first, second = _chosen(found, before, after)
    for one in (first, second):
        if not one.values:
            raise InputError(f"{_shown(one.name)} has no samples")
    return Samples(kind, first, second, order)


def _chosen(found: list[Series], before: str | None, after: str | None) -> tuple[Series, Series]:
    """Which of the series is the baseline, and which the candidate."""
    names = [one.name for one in found]
    listed = ", ".join(_shown(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    for option, name in (("--before", before), ("--after", after)):
        if name is not None and name not in names:
            raise InputError(f"{option}: there is no series {_shown(name)}; there are {listed}")
    if before is not None and before == after:
        raise InputError(f"--before and --after must name two series, got {_shown(before)} twice")
    wanted = [one for one in found if one.name in (before, after)]
    rest = [one for one in found if one not in wanted]
    if len(found) < 2:
        raise InputError(f"two series are needed, a baseline and a candidate; there is only {listed or 'none'}")
    if before is not None and after is not None:
        return found[names.index(before)], found[names.index(after)]
    if len(found) > 2:
        raise InputError(f"there are more than two series; choose with --before and --after from {listed}")
    if before is not None:
        return wanted[0], rest[0]
    if after is not None:
        return rest[0], wanted[0]
    if found[0].name.strip().lower() in AFTER or found[1].name.strip().lower() in BEFORE:
        return found[1], found[0]
    return found[0], found[1]


def _series(name: str, values: list[Any], stated: Any = None, failed: int = 0) -> Series:
    """A series of what a file holds, each value looked at."""
    checked = tuple(_time(value, name, place) for place, value in enumerate(values, 1))
    sums = {}
    for key in ("mean", "min"):
        value = stated.get(key) if isinstance(stated, dict) else None
        if isinstance(value, float) and math.isfinite(value) and value > 0:
            sums[key] = value
    return Series(name, checked, sums, failed)


def _time(value: Any, name: str, place: int) -> float:
    if isinstance(value, float) and math.isfinite(value) and value > 0:
        return value
    if value == 0:
        why = "a zero: the timer is too coarse, or the run never happened"
    elif isinstance(value, float):
        why = "times must be positive and finite"
    else:
        why = "times must be numbers"
    raise InputError(f"{_shown(name)}, value {place} is {_shown(value)}: {why}")


def _shown(value: Any) -> str:
    """A name or a value for a message: short, and without what a terminal would obey."""
    return checks.shown(value) if not isinstance(value, float) else f"{value:g}"


def _number(text: str) -> float:
    if len(text) > MOST_DIGITS:
        raise InputError(f"a number of {len(text)} digits ({text[:20]}...) is no time")
    return float(text)


# JSON


def _json(text: str) -> tuple[str, list[Series], str]:
    documents = list(_documents(text))
    if len(documents) == 1 and _dicts(documents[0]) and all(map(_kind, documents[0])):
        documents = documents[0]
    kinds = [_kind(document) for document in documents]
    if documents and all(kinds) and len(set(kinds)) == 1:
        found: list[Series] = []
        for document in documents:
            found += _unique(READERS[kinds[0]](document), found)
        often = [one for one in found if not one.name.startswith(ONCE)]
        if kinds[0] == "optimum-benchmark" and len(often) >= 2:  # loading happens once: nobody's before and after
            found = often
        return f"{kinds[0]} JSON", found, "blocks"
    if len(documents) != 1:
        raise InputError(
            "several JSON documents must all be of one benchmark tool: hyperfine, pytest-benchmark or optimum-benchmark"
        )
    return "JSON", _unique(_plain(documents[0]), []), ""


def _documents(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(parse_int=_number, parse_float=_number)
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        try:
            document, place = decoder.raw_decode(text, place)
        except RecursionError:
            raise InputError("the JSON is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise InputError(f"this is no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
        yield document


def _kind(document: Any) -> str:
    """Which tool wrote a document; "" for none that is known."""
    if not isinstance(document, dict):
        return ""
    if _dicts(document.get("results")) and all("command" in one for one in document["results"]):
        return "hyperfine"
    if _dicts(document.get("benchmarks")) and all("stats" in one for one in document["benchmarks"]):
        return "pytest-benchmark"
    if _parts(document):
        return "optimum-benchmark"
    return ""


def _dicts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _parts(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of an optimum-benchmark report (prefill, decode, ...) that hold latencies."""
    report = document.get("report", document)
    found = {}
    for name, part in report.items() if isinstance(report, dict) else ():
        latency = part.get("latency") if isinstance(part, dict) else None
        if isinstance(latency, dict) and isinstance(latency.get("values"), list):
            found[str(name)] = latency
    return found


def _hyperfine(document: dict[str, Any]) -> Iterator[Series]:
    for one in document["results"]:
        name, times, codes = str(one["command"]), one.get("times"), one.get("exit_codes")
        if not isinstance(times, list):
            raise InputError(f"{_shown(name)} has no times: this hyperfine file holds summaries only")
        failed = sum(code != 0 for code in codes) if isinstance(codes, list) else 0
        yield _series(name, times, {"mean": one.get("mean")}, failed)


def _pytest_benchmark(document: dict[str, Any]) -> Iterator[Series]:
    for one in document["benchmarks"]:
        name, stats = str(one.get("fullname") or one.get("name")), one["stats"]
        data = stats.get("data") if isinstance(stats, dict) else None
        if not isinstance(data, list):
            raise InputError(
                f"{_shown(name)} has no samples: run pytest with --benchmark-save-data (or --benchmark-json)"
            )
        yield _series(name, data, {"min": stats.get("min")})


def _optimum(document: dict[str, Any]) -> Iterator[Series]:
    for name, latency in _parts(document).items():
        yield _series(name, latency["values"], {"mean": latency.get("mean")})


READERS = {"hyperfine": _hyperfine, "pytest-benchmark": _pytest_benchmark, "optimum-benchmark": _optimum}


def _plain(document: Any) -> Iterator[Series]:
    if isinstance(document, dict):
        named = [(name, value) for name, value in document.items() if isinstance(value, list)]
    elif _dicts(document):
        named = []
        for place, one in enumerate(document, 1):
            values = next((one[key] for key in LISTS if isinstance(one.get(key), list)), None)
            if values is None:
                raise InputError(f"series {place} has no list called {', '.join(LISTS[:-1])} or {LISTS[-1]}")
            named.append((next((str(one[key]) for key in ("name", "label") if key in one), f"series {place}"), values))
    else:
        named = []
    if not named:
        raise InputError(
            'this JSON holds no samples: write {"before": [...], "after": [...]}, a list of two {"name": ..., "values": [...]}, '
            "or take a file of hyperfine, pytest-benchmark or optimum-benchmark"
        )
    for name, values in named:
        yield _series(name, values)


def _unique(new: Iterator[Series], found: list[Series]) -> list[Series]:
    """Series with names of their own: the second of a name gets a number."""
    taken = {one.name for one in found}
    made = []
    for one in new:
        name, count = one.name, 1
        while name in taken:
            count += 1
            name = f"{one.name} ({count})"
        taken.add(name)
        made.append(Series(name, one.values, one.stated, one.failed))
    return made


# CSV


def _csv(text: str, wanted: tuple[str | None, str | None]) -> tuple[str, list[Series], str]:
    first = next(line for line in text.splitlines() if line.strip())
    separator = max(",;\t", key=first.count)
    try:
        rows = [
            (number, [cell.strip() for cell in row])
            for number, row in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=separator), 1)
            if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise InputError(f"this is no CSV: {error}") from None
    if not rows:
        raise InputError(f"there are no samples: the input holds {_shown(first)}")
    (_, header), body = rows[0], rows[1:]
    if len(header) < 2 or len(header) > MOST_COLUMNS:
        raise InputError(f"a CSV of samples has two columns, named in its first line; this one begins {_shown(first)}")
    if all(_is_number(cell) for cell in header):
        raise InputError(f"the first line of the CSV must name its columns, got {_shown(first)}")
    if not body:
        raise InputError("the CSV has a first line and no samples")
    for number, row in rows:
        if len(row) > len(header):
            raise InputError(f"line {number} has {len(row)} cells, the first line {len(header)}")
    if len(header) == 2 and not _is_number(body[0][1][0]) and body[0][1][0]:
        return _long(body)
    columns: dict[str, list[Any]] = {}
    for place, name in enumerate(header):
        if name in columns:
            raise InputError(f"two columns are called {_shown(name)}")
        columns[name] = []
        if None not in wanted and name not in wanted:
            continue  # what was not asked for may hold anything
        ended = 0
        for number, row in body:
            cell = row[place] if place < len(row) else ""
            if not cell:  # the shorter column ends; a hole in the middle would move its pairs
                ended = ended or number
                continue
            if ended:
                raise InputError(f"line {ended}: {_shown(name)} is empty here and goes on in line {number}")
            columns[name].append(_cell(cell, number, name))
    return "CSV, two columns", [_series(name, values) for name, values in columns.items()], ""


def _long(body: list[tuple[int, list[str]]]) -> tuple[str, list[Series], str]:
    columns: dict[str, list[Any]] = {}
    labels = []
    for number, row in body:
        label = row[0]
        if not label or len(row) < 2:
            raise InputError(f"line {number} must hold a label and a value")
        columns.setdefault(label, []).append(_cell(row[1], number, label))
        labels.append(label)
        if len(columns) > MOST_COLUMNS:
            raise InputError(f"there are more than {MOST_COLUMNS} labels; two are needed")
    return "CSV, label and value", [_series(name, values) for name, values in columns.items()], _order(labels)


def _order(labels: list[str]) -> str:
    """How labels follow each other: see `Samples`."""
    if len(set(labels)) != 2:
        return ""
    if sum(one != other for one, other in zip(labels, labels[1:], strict=False)) == 1:
        return "blocks" if len(labels) > 2 else "A B A B"
    rounds = [tuple(labels[i : i + 2]) for i in range(0, len(labels), 2)]
    if any(len(set(one)) != 2 for one in rounds):
        return ""
    return "A B A B" if len(set(rounds)) == 1 else "A B B A"


def _is_number(cell: str) -> bool:
    try:
        float(cell[:MOST_DIGITS])
    except ValueError:
        return False
    return True


def _cell(cell: str, number: int, name: str) -> float:
    try:
        return _number(cell)
    except InputError as error:
        raise InputError(f"line {number}, {_shown(name)}: {error}") from None
    except ValueError:
        raise InputError(f"line {number}, {_shown(name)}: {_shown(cell)} is no number") from None
