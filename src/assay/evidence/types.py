"""The few types that all parts of `evidence` exchange."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

PROCESSES = 3
"""Fresh processes that a trial is taken in: where memory lies, and what the allocator does, differs from one to the next."""
LEAST_ROUNDS = 4  # in each
AGAIN = "candidate again"  # the candidate against itself, which must show no difference

Scale = Literal["smoke", "small", "full"]
Status = Literal["ok", "failed", "timeout", "out of memory"]


class Verdict(StrEnum):
    """Evidence against a claim, by the rule in `verdict`. A point that failed has a status and no verdict; nor has a stale one."""

    REPRODUCED = "reproduced"
    DIRECTION_HOLDS = "direction holds"
    DOES_NOT_PAY = "does not pay here"
    REFUTED = "refuted here"
    UNDECIDED = "undecided"
    QUALITY_NOT_SHOWN = "quality not shown"
    CONTESTED = "contested"
    COMPUTED = "computed"
    NEEDS_HARDWARE = "needs other hardware"


class Frozen(BaseModel):
    """What records are made of: unchangeable, with no field that is not declared and no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(Frozen):
    """A figure with its 95 % interval; all three are equal when the figure is exact."""

    median: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Estimate:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"low <= median <= high must hold, got {self.low}, {self.median}, {self.high}")
        return self


def plain(value: Any) -> Any:
    """`value` as strict JSON: tuples become lists, arrays and tensors nested lists, keys text.

    A NaN or an infinity, which JSON cannot hold, becomes the text "NaN", "Infinity" or "-Infinity". Raises TypeError for
    anything that has no such form.

    >>> plain({"shape": (2, 3), 4: float("nan")})
    {'shape': [2, 3], '4': 'NaN'}
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


def point_key(point: dict[str, Any]) -> str:
    """A point as canonical JSON, to compare points by.

    >>> point_key({"tokens": 64, "tau": 0.9}) == point_key({"tau": 0.9, "tokens": 64})
    True
    """
    return json.dumps(plain(point), sort_keys=True, separators=(",", ":"))
