"""Evidence: what one point of an experiment showed, with everything needed to judge it again and to repeat it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, JsonValue, ValidationError, model_validator

from assay.errors import InputError
from assay.evidence.types import Estimate, Frozen, Scale, Status, plain

SCHEMA = 2
Form = Literal["ratio", "saved", "added", "points", "level", "bound", "about"]


class QualityRecord(Frozen):
    """The candidate's quality, apart from its speed: the guard as it was declared, and the controls that were measured beside it.

    `low`/`high` bound `candidate` (95 %), None if nothing was sampled. `margin` is None in records of schema 1, which had none.
    """

    metric: str
    baseline: float | None
    candidate: float
    low: float | None
    high: float | None
    higher_is_better: bool
    margin: float | None = None
    relative: bool = True
    controls: dict[str, float] = {}
    without: dict[str, str] = {}
    rival: str = ""


class TrainedRecord(Frozen):
    """A trained arm: its score under each seed, the floor it has to beat, and the learning rates searched."""

    scores: tuple[float, ...]
    floor: float
    floor_name: str
    rate: float
    rates: tuple[float, ...]
    higher_is_better: bool
    best: float


class Evidence(Frozen):
    """One measured point of one claim. Never changed once made: a new measurement is a new record. Its verdict is not stored.

    `measured` is in the claim's own unit and direction, of a trial too: "60 % less time" is measured as per cent of time saved.
    A trial's `ratios` are the time of each other arm over the candidate's (above 1, the candidate is faster): "baseline" is the
    paper's, "free" and "exact" the operator's, "candidate again" the candidate against itself; `seconds_of` has each arm's median.
    A figure's `baseline`, `free`, `exact` and `arms` are in `unit`. The claim's own facts (`metric`, `paper_value`, `form` ...) are
    kept as they stood when it was measured, and so is what the experiment declared (`refuted_if`, `departures` ...).

    `decides` marks the point that stands for the paper's settings. `hashes` are those of the code that ran, by module
    (`assay.evidence.hashes`): a record without them is stale. `machine` is not part of the content that `id` is a hash of: files keep
    it once for all records, by `fingerprint`.
    """

    schema_version: Literal[2] = 2
    id: str = ""
    claim: str
    slug: str
    point: dict[str, JsonValue]
    index: int = 0
    decides: bool = False
    scale: Scale
    status: Status
    error: str = ""
    kind: Literal["trial", "figure"] = "trial"

    metric: str = ""
    paper_value: float | None = None
    paper_unit: str = ""
    higher_is_better: bool = True
    form: Form = "ratio"
    quantity: str = ""
    paper_baseline: float | None = None
    tolerance: float | None = None

    operator: str = ""
    free_label: str = ""
    exact_label: str = ""
    measured_here: str = ""
    computed: str = ""
    departures: dict[str, str] = {}
    refuted_if: str = ""
    refuted: bool | None = None

    unit: str = ""
    measured: Estimate | None = None
    ratios: dict[str, Estimate] = {}
    seconds_of: dict[str, float] = {}
    baseline: float | None = None
    free: float | None = None
    exact: float | None = None
    arms: dict[str, float] = {}
    controls: dict[str, float] = {}
    quality: QualityRecord | None = None
    trained: dict[str, TrainedRecord] = {}
    details: Annotated[dict[str, JsonValue], BeforeValidator(plain)] = {}

    needs: tuple[str, ...] = ()  # what the experiment needs and this machine lacks

    fingerprint: str
    machine: Annotated[dict[str, JsonValue], BeforeValidator(plain)] = {}
    assay_version: str
    commit: str = (
        ""  # of assay's own checkout, "" for an installed package; "-dirty-<hash>" when its sources were changed
    )
    hashes: dict[str, str] = {}
    seed: int
    command: str
    processes: int = 1
    load_before: float | None = None
    load_after: float | None = None
    noisy: bool = False
    noise: str = ""  # why it is noisy
    seconds: float
    created: AwareDatetime

    @property
    def spoilt(self) -> bool:
        """Whether it tells times that a busy machine spoilt: they decide nothing, and are taken again."""
        return self.noisy and (self.kind == "trial" or self.quantity == "time")

    @model_validator(mode="after")
    def _consistent(self) -> Evidence:
        if self.claim.split("/", 1)[0] != self.slug or "/" not in self.claim:
            raise ValueError(f"claim must look like 'slug/what' with the slug {self.slug!r}, got {self.claim!r}")
        if self.status == "ok" and self.measured is None and not self.needs:
            raise ValueError("a record with status ok must hold what was measured")
        content = _content_hash(self)
        if self.id and self.id != content:
            raise ValueError(f"the id {self.id} does not fit the content (its hash is {content})")
        object.__setattr__(self, "id", content)
        return self

    def __hash__(self) -> int:
        return hash(self.id)

    def to_json(self, *, machine: bool = True) -> str:
        """The record as one line of JSON; fields that hold their default are left out, without `machine` that one too."""
        exclude = set() if machine else {"machine"}
        document = {"schema_version": SCHEMA} | self.model_dump(mode="json", exclude_defaults=True, exclude=exclude)
        return json.dumps(document, separators=(",", ":"), allow_nan=False)


def _content_hash(record: Evidence) -> str:
    content = record.model_dump(mode="json", exclude={"id", "machine"}, exclude_defaults=True)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def parse(text: str, where: str = "the record") -> Evidence:
    """Read one record from its JSON, of this schema or an older one. Raises InputError, one line that begins with `where`."""
    try:
        value = json.loads(text)
    except ValueError as error:  # also a number of more digits than Python reads
        raise InputError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a record") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    version = value.get("schema_version", SCHEMA)
    if isinstance(version, int) and version > SCHEMA:
        raise InputError(
            f"{where}: record schema {version} was written by a newer assay (this one reads {SCHEMA}): upgrade assay"
        )
    try:
        if version == 1:
            text = json.dumps(upgraded(value))
        return Evidence.model_validate_json(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a record") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {f'{field}: ' if field else ''}{first['msg']}") from None


_OF_SCHEMA_1 = {
    "schema_version", "id", "claim", "slug", "point", "index", "scale", "status", "error", "kind", "metric", "paper_value",
    "paper_unit", "higher_is_better", "unit", "measured", "vs_free", "free_label", "baseline", "candidate", "free", "quality",
    "details", "needs", "verdict", "reason", "fingerprint", "machine", "assay_version", "commit", "seed", "command", "load_before",
    "load_after", "noisy", "seconds", "created",
}  # fmt: skip


def upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """A record of schema 1 as one of this schema: without hashes, so it is stale, and without the verdict it was given then.

    Fields that schema 1 did not have are kept, so that they are refused by name.
    """
    dropped = {"id", "schema_version", "verdict", "reason", "vs_free", "candidate"}
    new = {key: value for key, value in old.items() if key not in dropped} | {"schema_version": SCHEMA}
    if old.get("kind", "trial") == "trial" and set(old) <= _OF_SCHEMA_1:
        arms = {arm: old.get(arm) for arm in ("baseline", "candidate", "free")}
        new["seconds_of"] = {arm: seconds for arm, seconds in arms.items() if seconds is not None}
        ratios = {"baseline": old.get("measured"), "free": old.get("vs_free")}
        new["ratios"] = {arm: ratio for arm, ratio in ratios.items() if ratio is not None}
        new["baseline"] = new["free"] = None
    return new


def changed(record: Evidence, **changes: Any) -> Evidence:
    """A new record with some fields changed, checked again and with its own id."""
    return Evidence.model_validate(record.model_dump() | {"id": ""} | changes)
