"""Records in which something is not as it should be, for every test of what readers make of them."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import sqlalchemy as sa
from hypothesis import strategies as st
from tests.evidence.evidence_maker import estimate, make

from assay.evidence.store import table

ARM = {
    "scores": (0.9, 0.91, 0.92), "floor": 0.1, "floor_name": "chance", "rate": 0.1, "rates": (0.1, 0.2), "higher_is_better": True,
    "best": 1.0,
}  # fmt: skip
TRIAL = make(
    claim="xattention/attention-speedup",
    ratios={arm: estimate(1.9, 2.0, 2.1) for arm in ("baseline", "free", "exact", "a window", "candidate again")},
    seconds_of={"baseline": 2.0, "candidate": 1.0},
    trained={"one": ARM},
    refuted=False,
    tolerance=0.1,
)
FIGURE = make(
    claim="xattention/attention-speedup", kind="figure", baseline=1.0, free=1.1, exact=1.2, arms={"a window": 1.5},
    controls={"deleted": 1.0, "random": 1.1}, paper_baseline=1.0, tolerance=0.1,
)  # fmt: skip
MISSING = object()
NUMBERS = (-2.0, -0.0, 0.0, 5e-324, 1e-308, 0.5, 1.0, 100.0, 1e16, 1e308, -1e308, 1.7976931348623157e308)
ODD = (None, MISSING, math.nan, math.inf, True, "text", "\x00\u202e\x1b[2J", [], {}, 10**400, -1)


def document(record):
    """The record as JSON, every field of it, without its id, which would not fit any more."""
    return {key: value for key, value in record.model_dump(mode="json").items() if key != "id"}


def places(value, at=()):
    """Every place in a document, from the outside in."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


def put(value, place, new):
    """Put something into its place in a document, or take what is there away."""
    with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
        for key in place[:-1]:
            value = value[key]
        if new is MISSING:
            del value[place[-1]]
        else:
            value[place[-1]] = new


@st.composite
def mutated(draw):
    """The text of a record in which a few things are not as they should be."""
    found = copy.deepcopy(document(draw(st.sampled_from([TRIAL, FIGURE]))))
    found["form"] = draw(st.sampled_from(["ratio", "saved", "added", "points", "level", "bound", "about"]))
    found["higher_is_better"] = draw(st.booleans())
    for place in draw(
        st.lists(st.sampled_from(list(places(document(TRIAL))) + list(places(document(FIGURE)))), max_size=3)
    ):
        put(found, place, draw(st.sampled_from(NUMBERS + ODD)))
    if draw(st.booleans()):
        number = draw(st.sampled_from(NUMBERS))
        found["measured"] = {"median": number, "low": number, "high": number}
    return json.dumps(found)


def with_changes(record, **changes):
    return json.dumps(document(record) | changes)


NAMED = {
    "a negative factor": with_changes(TRIAL, paper_value=-2.0),
    "a bound of 1e308": with_changes(TRIAL, form="bound", paper_value=1e308, tolerance=None),
    "a ratio of nothing": with_changes(TRIAL, ratios={"x": {"median": 0.0, "low": 0.0, "high": 0.0}}),
    "NaN": with_changes(TRIAL, seconds=math.nan),
    "a moment before the calendar": with_changes(TRIAL, created="0001-01-01T00:00:00+14:00"),
    "no fingerprint": with_changes(TRIAL, fingerprint=""),
    "no measurement": with_changes(TRIAL, measured=None),
    "no JSON": "{",
    "nothing": "",
    "another object": "{}",
}


def insert(store, text, seq=0):
    """A row as nobody would write it through the store."""
    with store._begin(write=True) as connection:
        values = {
            "claim": "xattention/attention-speedup",
            "slug": "xattention",
            "scale": "small",
            "status": "ok",
            "fingerprint": "f",
        }
        connection.execute(sa.insert(table).values(id=f"bad{seq}", record=text, **values))
