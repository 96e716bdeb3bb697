"""Evidence: what one point of an experiment showed, with everything needed to judge it again and to repeat it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, JsonValue, ValidationError, model_validator

from assay.errors import InputError
from assay.evidence.types import Estimate, Frozen, Scale, Status, Verdict, plain

SCHEMA = 1


class QualityRecord(Frozen):
    """The candidate's quality, apart from its speed. `low`/`high` bound `candidate` (95 %), None if nothing was sampled."""

    metric: str
    baseline: float | None
    candidate: float
    low: float | None
    high: float | None
    higher_is_better: bool


class Evidence(Frozen):
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
        return Evidence.model_validate_json(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a record") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {f'{field}: ' if field else ''}{first['msg']}") from None


def changed(record: Evidence, **changes: Any) -> Evidence:
    """A new record with some fields changed, checked again and with its own id."""
    return Evidence.model_validate(record.model_dump() | {"id": ""} | changes)
