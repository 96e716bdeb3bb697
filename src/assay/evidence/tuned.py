"""What a run of `assay tune` found, as the store keeps it: the recipe, its proof, and every recipe that was measured on the way.

It is made of the lines of an artefact's `evidence.jsonl` (`of_lines`), so that a run of an earlier version, or of somebody else's, is
read as one's own is. Like a record of evidence it is never changed once made, and nothing in it is judged: whether its code has
changed since is asked when it is read (`changes`). A run of an image classifier has `pictures` in place of lengths in tokens, and is of
format 2, which an earlier assay refuses by name.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import AwareDatetime, Field, JsonValue, ValidationError, model_validator

from assay.errors import InputError
from assay.evidence import hashes
from assay.evidence.types import Frozen, plain
from assay.measure.unpaired import unpaired_ratio

FORMAT = 2
MOST_ROWS = 1000  # measured recipes of a run
MOST_STEPS = 30  # of a recipe
MOST_ERROR = 500  # characters of what a failed recipe said
SUMMARY, IMAGES = "summary", "images"
FIRST = (
    SUMMARY,
    IMAGES,
)  # what the first line of an artefact's evidence is: of a language model, of an image classifier
DTYPE = "dtype"  # what all candidates build on: no partner of anything
SAME = 1e-6  # a cost that differs more from the median of its samples was corrected, and they are not comparable


class Span(Frozen):
    """A figure with its interval; `low` and `high` are None where there is none."""

    median: float
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high must both be given, or neither")
        if self.low is not None and self.high is not None and not self.low <= self.median <= self.high:
            raise ValueError(f"low <= median <= high must hold, got {self.low}, {self.median}, {self.high}")
        return self


class Level(Frozen):
    """What one of the three cost in the final run: the goal's figure in its unit."""

    label: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None


class StepRecord(Frozen):
    """One transform of a recipe with its configuration."""

    transform: str = Field(min_length=1, max_length=200)
    config: dict[str, JsonValue] = {}

    @property
    def key(self) -> str:
        """The same for the same step."""
        return json.dumps([self.transform, self.config], sort_keys=True)

    def label(self) -> str:
        """For people; long values are cut.

        >>> StepRecord(transform="xattention", config={"tau": 0.9, "block": 64}).label()
        'xattention(tau=0.9, block=64)'
        """
        settings = ", ".join(f"{name}={_short(value)}" for name, value in self.config.items())
        return f"{self.transform}({settings})" if settings else self.transform


class Tried(Frozen):
    """A recipe that was measured in the search: its cost (lower is better), and the loss of quality on the search's text or pictures.

    `ratio` is over the recipe it was built on, timed in turns with it: of image classifiers alone.
    """

    row: Literal["baseline", "free", "candidate"]
    steps: tuple[StepRecord, ...] = Field(max_length=MOST_STEPS)
    status: str
    cost: float | None = Field(default=None, gt=0)
    samples: tuple[float, ...] = ()
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    ratio: Span | None = None
    error: str = ""

    def label(self) -> str:
        return label(self.steps)


class CodeRecord(Frozen):
    """The code of a transform when the run was made: its module, and one hash over that and all it imports of assay's.

    Both are empty for what torch does alone: of that the packages decide.
    """

    module: str
    hash: str


class Pictures(Frozen):
    """What an image classifier was tuned on and judged by: how many pictures there were, and how many of them were the proof's.

    `baseline` and `candidate` are the shares of the proof's pictures that score, as loaded and as found; `same` the share of which both
    say the same. `unfit` has the options that do not fit the model, and why.
    """

    folder: str
    total: int = Field(ge=1)
    proof: int = Field(ge=1)
    baseline: float = Field(ge=0, le=1)
    candidate: float = Field(ge=0, le=1)
    same: float = Field(ge=0, le=1)
    unfit: dict[str, str] = {}


class TuneRun(Frozen):
    """One run. `over_free`, `over_baseline` and `over_exact` are the ratios of the proof (above 1 what was found is cheaper).

    `over_exact` is over the best of our own code that loses nothing: None where the recipe holds no paper's method, or the run had no
    time for it. `drop` is the relative increase of perplexity with the interval that decided, `verdict` what was decided ("holds",
    "lost", "undecided"; "" in runs made before there was a proof of quality). `code` is by transform; a run without it is stale.
    Of an image classifier (format 2), which has `pictures` and no tokens, `drop` is the share of the proof's pictures that is lost.
    """

    format: Literal[1, 2] = 1
    id: str = ""
    model: str
    goal: str
    architecture: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    pictures: Pictures | None = None
    max_drop: float
    steps: tuple[StepRecord, ...] = Field(max_length=MOST_STEPS)
    baseline: Level
    free: Level
    best: Level
    over_baseline: Span
    over_free: Span
    over_exact: Span | None = None
    metric: str
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    drop_level: float = 0.95
    verdict: str = ""
    helped: bool
    rows: tuple[Tried, ...] = Field(max_length=MOST_ROWS)
    code: dict[str, CodeRecord] = {}
    packages: dict[str, str] = {}
    noisy: bool = False
    seconds: float
    notes: tuple[str, ...] = ()
    command: str
    commit: str = ""
    created: AwareDatetime
    fingerprint: str
    machine: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _of_one_kind(self) -> TuneRun:
        tokens = (self.prompt_tokens, self.new_tokens)
        if self.format == 1 and (None in tokens or self.pictures is not None):
            raise ValueError("a run of a language model (format 1) has prompt_tokens and new_tokens, and no pictures")
        if self.format == 2 and (tokens != (None, None) or self.pictures is None):
            raise ValueError("a run of an image classifier (format 2) has pictures, and no prompt_tokens or new_tokens")
        return self

    @model_validator(mode="after")
    def _identified(self) -> TuneRun:
        content = self.model_dump(mode="json", exclude={"id", "machine"}, exclude_defaults=True)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        found = hashlib.sha256(text.encode()).hexdigest()[:32]
        if self.id and self.id != found:
            raise ValueError(f"the id {self.id} does not fit the content (its hash is {found})")
        object.__setattr__(self, "id", found)
        return self

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def kind(self) -> Literal["language", "images"]:
        """What kind of model it is of."""
        return "language" if self.pictures is None else "images"

    @property
    def proven(self) -> bool:
        """Whether what was found beat the free baseline for certain, and was shown to keep the quality on inputs of its own."""
        return self.helped and self.verdict == "holds" and self.over_free.low is not None and self.over_free.low > 1

    def to_json(self) -> str:
        """The run as one line of JSON; fields that hold their default are left out."""
        document = {"format": self.format} | self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(document, separators=(",", ":"), allow_nan=False)


def label(steps: Sequence[StepRecord]) -> str:
    """A recipe for people.

    >>> label([StepRecord(transform="dtype", config={"dtype": "bfloat16"}), StepRecord(transform="compile")]), label([])
    ('dtype(dtype=bfloat16) + compile', 'as loaded')
    """
    return " + ".join(step.label() for step in steps) or "as loaded"


def parse(text: str, where: str = "the run") -> TuneRun:
    """Read one run from its JSON. Raises InputError, one line that begins with `where`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a run") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    made = value.get("format")
    if type(made) is int and made > FORMAT:
        raise InputError(
            f"{where}: format {made} was written by a newer assay (this one reads {FORMAT}): upgrade assay"
        )
    return _checked(value, where)


def _checked(value: Mapping[str, Any], where: str) -> TuneRun:
    try:
        return TuneRun.model_validate_json(json.dumps(value))
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a run") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {f'{field}: ' if field else ''}{first['msg']}") from None


def read(path: Path) -> TuneRun:
    """The run of an artefact's `evidence.jsonl`. Raises InputError for a file that is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a run of `assay tune` ({error})") from None
    return of_lines(lines, str(path))


def of_lines(lines: Sequence[Mapping[str, Any]], where: str = "the run") -> TuneRun:
    """A run from the lines of its artefact's `evidence.jsonl`: the summary, and a line a measured recipe; of images all in one line.

    Raises InputError, one line that begins with `where`, for lines that are no run.
    """
    if not lines or not all(isinstance(line, Mapping) for line in lines) or lines[0].get("kind") not in FIRST:
        raise InputError(f"{where}: must begin with the summary of a run of `assay tune`")
    make = _of_images if lines[0]["kind"] == IMAGES else _of_text
    try:
        document = make(lines)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: is no run of `assay tune` ({type(error).__name__}: {error})") from None
    return _checked(plain(document), where)


def _of_text(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A language model's run as a document; what is missing in the lines raises KeyError and its like."""
    found = lines[0]
    quality, machine = found["quality"], found["machine"]
    exact = found.get("papers") or {}
    return {
        **{name: found[name] for name in (*_AS_THEY_ARE, "prompt_tokens", "new_tokens", "baseline", "best")},
        **{name: found[name] for name in (*_IF_THERE, "architecture") if name in found},
        "steps": found["recipe"],
        "free": found["free_baseline"],
        "over_baseline": _span(found["speedup"]),
        "over_free": _span(found["speedup_vs_free"]),
        "over_exact": _span(exact.get("speedup")) if exact.get("exact") else None,
        "metric": quality["metric"],
        "drop": quality["drop"],
        "drop_low": quality["low"],
        "drop_high": quality["high"],
        "drop_level": quality.get("level", 0.95),
        "verdict": quality.get("verdict", "") if quality.get("judged") else "",
        "rows": [_row(line) for line in lines[1:] if line.get("kind") == "trial"],
        "fingerprint": machine["fingerprint"],
        "machine": facts_of(machine),
    }


def _of_images(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of an image classifier's, whose options stand in the place of transforms."""
    found = lines[0]
    quality, machine = found["quality"], found["machine"]
    levels = {"baseline": "baseline", "free": "free_baseline", "best": "best"}
    return {
        "format": 2,
        **{name: found[name] for name in _AS_THEY_ARE},
        **{name: found[name] for name in _IF_THERE if name in found},
        **{name: {key: found[key_of][key] for key in Level.model_fields} for name, key_of in levels.items()},
        "architecture": found["recipe"]["architecture"],
        "steps": _options(found["recipe"]["steps"]),
        "over_baseline": _span(found["speedup"]),
        "over_free": _span(found["speedup_vs_free"]),
        "metric": quality["metric"],
        "drop": quality["lost"],
        "drop_low": quality["low"],
        "drop_high": quality["high"],
        "drop_level": quality["level"],
        "verdict": quality["verdict"],
        "rows": [
            {
                "row": row["kind"],
                "steps": _options(row["recipe"]),
                "status": row["status"],
                "cost": row["cost"],
                "samples": row.get("samples", []),
                "drop": row["lost"],
                "ratio": _span(row["ratio"]),
                "error": str(row["error"])[:MOST_ERROR],
            }
            for row in found["rows"]
        ],
        "pictures": {
            "folder": found["workload"],
            "total": found["pictures"],
            "proof": quality["pictures"],
            **{name: quality[name] for name in ("baseline", "candidate", "same")},
            "unfit": found["unfit"],
        },
        "fingerprint": machine["fingerprint"],
        "machine": {name: value for name, value in machine.items() if name != "load"},
    }


def _options(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"transform": step["option"], "config": step["config"]} for step in steps]


_AS_THEY_ARE = ("model", "goal", "max_drop", "helped", "seconds", "command", "created")
_IF_THERE = ("code", "packages", "noisy", "notes", "commit")


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    drop = line.get("drop") or {}
    return {
        "row": line.get("row", line.get("trial")),
        "steps": line["recipe"],
        "status": line["status"],
        "cost": line.get("cost"),
        "samples": line.get("samples", []),
        "drop": drop.get("median"),
        "drop_low": drop.get("low"),
        "drop_high": drop.get("high"),
        "error": str(line.get("error", ""))[:MOST_ERROR],
    }


def _span(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A ratio; an end that was infinite, and therefore not written, leaves none."""
    if found is None:
        return None
    ends = (found["low"], found["high"])
    return {"median": found["median"]} | ({} if None in ends else {"low": ends[0], "high": ends[1]})


def facts_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """A machine as records of evidence have it, from what a run says of it for people (`Machine.describe`).

    >>> found = facts_of({"processor": "A CPU, 2 logical cores (1 physical)", "SIMD": "avx2 fma", "memory": "4.0 GiB", "torch": "2.1"})
    >>> found["cpu"], found["cores"], found["flags"], found["versions"]
    ('A CPU', 2, ['avx2', 'fma'], {'torch': '2.1'})
    """
    said = re.fullmatch(r"(.*), (\d{1,6}) logical cores \(\d+ physical\)", str(described.get("processor", "")))
    memory = re.fullmatch(r"(\d{1,9}(?:\.\d)?) GiB", str(described.get("memory", "")))
    system = str(described.get("system", ""))
    gpu = str(described.get("GPU", "none"))
    return {
        "cpu": said[1] if said else str(described.get("processor", "unknown processor")),
        "cores": int(said[2]) if said else None,
        "threads": described.get("threads"),
        "flags": str(described.get("SIMD", "")).split(),
        "ram_bytes": round(float(memory[1]) * 2**30) if memory else None,
        "gpu": "" if gpu == "none" else gpu,
        "os": system.removesuffix(", virtual machine"),
        "virtual": system.endswith(", virtual machine"),
        "versions": {name: str(value) for name, value in described.items() if name not in _DESCRIBED},
    }


_DESCRIBED = ("processor", "threads", "SIMD", "memory", "GPU", "system", "governor", "load", "fingerprint")


def code_of(modules: Mapping[str, str]) -> dict[str, Any]:
    """What a run keeps of the code of its transforms (`modules`: the module of each), and of the packages that decide about figures.

    A transform whose module is "" is done by torch alone.
    """
    code = {
        name: {"module": module, "hash": (hashes.of_closure(module) or "") if module else ""}
        for name, module in modules.items()
    }
    return {"code": code, "packages": hashes.versions()}


def changes(run: TuneRun) -> frozenset[str]:
    """The transforms of the run whose code, or whose packages, are not what they were: what it says of them is stale.

    All of them, for a run made before runs held hashes.
    """
    names = {step.transform for row in run.rows for step in row.steps} | {step.transform for step in run.steps}
    if not run.packages or any(hashes.versions().get(name) != value for name, value in run.packages.items()):
        return frozenset(names)
    return frozenset(name for name in names if name not in run.code or not _is_current(run.code[name]))


def _is_current(code: CodeRecord) -> bool:
    return code.module == code.hash == "" or bool(code.hash) and hashes.of_closure(code.module) == code.hash


def word_of(run: TuneRun, changed: Iterable[str]) -> str:
    """What is said of the recipe that was found, of which `changed` (see `changes`) may be a part: "proven", "not proven" or "stale"."""
    if {step.transform for step in run.steps} & set(changed):
        return "stale"
    return "proven" if run.proven else "not proven"


# Words ---------------------------------------------------------------------------------------------------------------------


def ratio_text(found: Span | None) -> str:
    """A ratio with its interval.

    >>> ratio_text(Span(median=1.5, low=1.4, high=1.6)), ratio_text(None)
    ('1.5x [1.4, 1.6]', 'not measured')
    """
    if found is None:
        return "not measured"
    return f"{found.median:.3g}x" + ("" if found.low is None else f" [{found.low:.3g}, {found.high:.3g}]")


def level_text(level: Level) -> str:
    """A figure with its interval and its unit.

    >>> level_text(Level(label="x", value=12.5, unit="ms a picture", low=12.0, high=13.0))
    '12.5 ms a picture [12, 13]'
    """
    ends = "" if level.low is None or level.high is None else f" [{level.low:,.4g}, {level.high:,.4g}]"
    return f"{level.value:,.4g} {level.unit}{ends}"


def unit_of_loss(run: TuneRun) -> str:
    """What a hundredth of `drop` is: a per cent of perplexity, or a point of the share of pictures."""
    return "%" if run.kind == "language" else "points"


def allowed_text(run: TuneRun) -> str:
    """What may be lost, such as "1 % allowed" or "2 points allowed"."""
    most = f"{100 * run.max_drop:g}"
    return f"{most} {'point' if unit_of_loss(run) == 'points' and most == '1' else unit_of_loss(run)} allowed"


def lost_text(run: TuneRun) -> str:
    """What was found to be lost, with its interval."""
    unit = unit_of_loss(run)
    ends = (
        ""
        if run.drop_low is None or run.drop_high is None
        else f" [{100 * run.drop_low:.2f}, {100 * run.drop_high:.2f}]"
    )
    lost = "not measured" if run.drop is None else f"{100 * run.drop:+.2f} {unit}{ends}"
    if run.pictures is None:
        return f"{run.metric} {lost}"
    seen = run.pictures
    return f"{run.metric} {100 * seen.candidate:.1f} % of {seen.proof:,} pictures, {100 * seen.baseline:.1f} % as loaded, lost {lost}"


def documented(run: TuneRun) -> dict[str, Any]:
    """The run for `--json`: its fields, its kind, what is said of it now, and which of its steps have changed since."""
    changed = sorted(changes(run))
    return run.model_dump(mode="json") | {"kind": run.kind, "word": word_of(run, changed), "changed": changed}


# Pairs ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two steps in one measured recipe, beside each without the other.

    All ratios are over the cost of `rest`, the recipe without the two, measured in the same run: above 1 they gain. `joint` is None
    where `rest` was not measured, and of `alone` each where it was not. The figures are the search's: each recipe ran in a process
    of its own, with few samples, and an interval is given where there are enough of them. `drop` is the loss of the whole recipe.
    """

    steps: tuple[StepRecord, StepRecord]
    rest: tuple[StepRecord, ...]
    joint: Span | None
    alone: tuple[Span | None, Span | None]
    drop: float | None
    drop_low: float | None
    drop_high: float | None

    @property
    def expected(self) -> float | None:
        """The product of each alone: what two that have nothing to do with each other would gain."""
        first, second = self.alone
        return None if first is None or second is None else first.median * second.median


@functools.lru_cache(maxsize=4096)
def pairs(run: TuneRun) -> tuple[Pair, ...]:
    """Every pair of steps that a measured recipe of the run holds, the dtype that all build on apart."""
    measured: dict[tuple[str, ...], Tried] = {}
    for row in run.rows:
        if row.status == "ok" and row.cost is not None:
            measured.setdefault(_key(row.steps), row)
    found = []
    for row in measured.values():
        places = [place for place, step in enumerate(row.steps) if step.transform != DTYPE]
        for first, second in itertools.combinations(places, 2):
            rest = measured.get(_without(row.steps, first, second))
            alone = (measured.get(_without(row.steps, second)), measured.get(_without(row.steps, first)))
            found.append(
                Pair(
                    (row.steps[first], row.steps[second]),
                    tuple(step for place, step in enumerate(row.steps) if place not in (first, second)),
                    _ratio(rest, row),
                    (_ratio(rest, alone[0]), _ratio(rest, alone[1])),
                    row.drop,
                    row.drop_low,
                    row.drop_high,
                )
            )
    return tuple(found)


def _key(steps: Sequence[StepRecord]) -> tuple[str, ...]:
    return tuple(step.key for step in steps)


def _without(steps: Sequence[StepRecord], *places: int) -> tuple[str, ...]:
    return _key([step for place, step in enumerate(steps) if place not in places])


def _ratio(before: Tried | None, after: Tried | None) -> Span | None:
    """How many times cheaper `after` is than `before`; with an interval where both have samples enough."""
    if before is None or after is None or before.cost is None or after.cost is None:
        return None
    middle = before.cost / after.cost
    if not 0 < middle < float("inf"):
        return None
    if all(_sampled(row) for row in (before, after)):
        found = unpaired_ratio(before.samples, after.samples)
        if 0 < found.low <= middle <= found.high < float("inf"):
            return Span(median=middle, low=found.low, high=found.high)
    return Span(median=middle)


def _sampled(row: Tried) -> bool:
    """Whether the samples are those of its cost: on another machine of a cluster, the cost is corrected by a ratio."""
    if not row.samples or not all(value > 0 for value in row.samples) or row.cost is None:
        return False
    return abs(float(np.median(row.samples)) - row.cost) <= SAME * row.cost


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 24 else text[:21] + "..."
