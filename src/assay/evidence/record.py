"""Evidence: what one trial showed, with everything needed to judge it again and to repeat it."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError, model_validator

from assay.errors import InputError
from assay.evidence.verdict import Verdict

SCHEMA = 1
Scale = Literal["smoke", "small", "full"]
Status = Literal["ok", "failed", "timeout", "out of memory"]


def plain(value: Any) -> Any:
    """`value` as strict JSON: tuples become lists, arrays and tensors nested lists, keys text.

    A NaN or an infinity, which JSON cannot hold, becomes the text "NaN", "Infinity" or "-Infinity". Raises TypeError for
    anything that has no such form.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else json.dumps(float(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON: {value!r:.80}")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Frozen):
    """A figure with its 95 % interval; all three are equal when the figure is exact."""

    median: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Estimate:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"low <= median <= high must hold, got {self.low}, {self.median}, {self.high}")
        return self


class QualityRecord(_Frozen):
    """The candidate's quality beside its speed. `low`/`high` bound `candidate` (95 %), None where nothing was sampled."""

    metric: str
    baseline: float | None
    candidate: float
    low: float | None
    high: float | None
    higher_is_better: bool


class Evidence(_Frozen):
    """One measured point of one claim. Never changed once made: a new measurement is a new record.

    `kind` "trial": `measured` is the speed-up, median time of the paper's baseline over the candidate's (unit "x"), `vs_free` the
    speed-up over the strongest free baseline, and `baseline`, `candidate`, `free` are median seconds. `kind` "figure": `measured`
    is the figure itself in `unit`, `baseline` and `free` are in that unit too and `vs_free` is None. The claim's own facts
    (`metric`, `paper_value`, `paper_unit`, `higher_is_better`) are kept as they stood when it was judged.

    `index` is the point's place in its grid: the last is the nearest to the paper's conditions. `id` is a hash of the content,
    so that a record imported twice is kept once; a record whose id does not fit its content is refused.
    """

    schema_version: Literal[1] = 1
    id: str = ""
    claim: str
    slug: str
    point: dict[str, JsonValue]
    index: int = 0
    scale: Scale
    status: Status
    error: str = ""
    kind: Literal["trial", "figure"] = "trial"

    metric: str = ""
    paper_value: float | None = None
    paper_unit: str = ""
    higher_is_better: bool = True

    unit: str = ""
    measured: Estimate | None = None
    vs_free: Estimate | None = None
    free_label: str = ""
    baseline: float | None = None
    candidate: float | None = None
    free: float | None = None
    quality: QualityRecord | None = None
    details: Annotated[dict[str, JsonValue], BeforeValidator(plain)] = {}

    needs: tuple[str, ...] = ()  # what the experiment needs and this machine lacks
    verdict: Verdict | None = None  # None when the point failed
    reason: str = ""

    fingerprint: str
    machine: Annotated[dict[str, JsonValue], BeforeValidator(plain)]
    assay_version: str
    commit: str = (
        ""  # of assay's own checkout, "" for an installed package; "-dirty-<hash>" when its sources were changed
    )
    seed: int
    command: str
    load_before: float | None = None
    load_after: float | None = None
    noisy: bool = False
    seconds: float
    created: AwareDatetime

    @model_validator(mode="after")
    def _consistent(self) -> Evidence:
        if self.claim.split("/", 1)[0] != self.slug or "/" not in self.claim:
            raise ValueError(f"claim must look like 'slug/what' with the slug {self.slug!r}, got {self.claim!r}")
        if self.status == "ok" and self.measured is None and not self.needs:
            raise ValueError("a record with status ok must hold what was measured")
        if self.status != "ok" and self.verdict is not None:
            raise ValueError(f"a record with status {self.status!r} has no verdict, got {self.verdict.value!r}")
        content = _content_hash(self)
        if self.id and self.id != content:
            raise ValueError(f"the id {self.id} does not fit the content (its hash is {content})")
        object.__setattr__(self, "id", content)
        return self

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"), allow_nan=False)


def _content_hash(record: Evidence) -> str:
    content = record.model_dump(mode="json", exclude={"id"})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def parse(text: str, where: str = "the record") -> Evidence:
    """Read one record from its JSON. Raises InputError, one line that begins with `where`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    version = value.get("schema_version", SCHEMA)
    if isinstance(version, int) and version > SCHEMA:
        raise InputError(
            f"{where}: record schema {version} was written by a newer assay (this one reads {SCHEMA}): upgrade assay"
        )
    try:
        return Evidence.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {f'{field}: ' if field else ''}{first['msg']}") from None


def changed(record: Evidence, **changes: Any) -> Evidence:
    """A new record with some fields changed, checked again and with its own id."""
    return Evidence.model_validate(record.model_dump() | {"id": ""} | changes)


def point_key(point: dict[str, Any]) -> str:
    """A point as canonical JSON, to compare points by."""
    return json.dumps(plain(point), sort_keys=True, separators=(",", ":"))
