"""Evidence: what is kept, that it survives JSON whole, and that nothing wrong gets in."""

import json
import math

import numpy as np
import pytest
import torch
from evidence_maker import OLD, estimate, make
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from assay.errors import InputError
from assay.evidence import hashes
from assay.evidence.record import Evidence, changed, parse
from assay.evidence.types import plain, point_key

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    point=st.dictionaries(st.text(), json_values, max_size=3),
    details=st.dictionaries(st.text(), json_values, max_size=3),
    values=st.lists(finite, min_size=3, max_size=3).map(sorted),
    error=st.text(),
    seconds=finite,
)
@settings(max_examples=100, deadline=None)
def test_a_record_survives_json(point, details, values, error, seconds):
    record = make(
        point=plain(point),
        details=details,
        measured=estimate(*values),
        error=plain(error),
        seconds=seconds,
    )
    line = record.to_json()
    assert "\n" not in line
    assert parse(line) == record
    assert parse(line).id == record.id


def test_the_id_is_the_content():
    record = make()
    assert len(record.id) == 32
    assert make() == record
    assert make(seed=1).id != record.id
    assert make(minutes=1).id != record.id
    assert parse(json.dumps(json.loads(record.to_json()), indent=3)).id == record.id  # the spelling does not matter


def test_a_changed_line_is_refused():
    text = make().to_json().replace('"high":2.1', '"high":9.1')
    with pytest.raises(InputError, match="^line 7: the record.*does not fit|^line 7: .*does not fit the content"):
        parse(text, "line 7")


def test_records_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make().seed = 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "surprise"),
        ({"claim": "toy"}, "slug/what"),
        ({"claim": "other/speedup", "slug": "toy"}, "slug/what"),
        ({"status": "fine"}, "status"),
        ({"scale": "huge"}, "scale"),
        ({"measured": None}, "must hold what was measured"),
        ({"verdict": "reproduced"}, "verdict"),
        ({"seconds": math.nan}, "finite"),
        ({"created": "2026-01-02T03:04:05"}, "timezone"),
        ({"measured": {"median": 1, "low": 2, "high": 3}}, "low <= median <= high"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    fields = make().model_dump() | {"id": ""} | changes
    with pytest.raises(ValidationError, match=words):
        Evidence.model_validate(fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("{}", "claim: Field required"),
        ('{"schema_version": 3}', "newer assay.*upgrade"),
    ],
)
def test_what_is_no_record_is_named(text, words):
    with pytest.raises(InputError, match=f"^here: .*{words}") as caught:
        parse(text, "here")
    assert "\n" not in str(caught.value)


def test_plain_turns_what_experiments_report_into_json():
    given = {
        1: (1, 2),
        "array": np.array([[1.5, 2.0]]),
        "tensor": torch.tensor([1, 2]),
        "scalar": np.float32(0.5),
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "flag": True,
        "text": "a\ud800b",
    }
    expected = {
        "1": [1, 2],
        "array": [[1.5, 2.0]],
        "tensor": [1, 2],
        "scalar": 0.5,
        "nan": "NaN",
        "inf": ["Infinity", "-Infinity"],
        "flag": True,
        "text": "a?b",
    }
    assert plain(given) == expected
    json.dumps(plain(given), allow_nan=False)
    with pytest.raises(TypeError, match="object cannot be kept as JSON"):
        plain({"x": object()})


def test_point_key_ignores_order_and_tuples():
    assert point_key({"a": (1, 2), "b": 1}) == point_key({"b": 1, "a": [1, 2]})
    assert point_key({"a": 1}) != point_key({"a": 2})


def test_changed_checks_again_and_gets_its_own_id():
    record = make()
    other = changed(record, noisy=True)
    assert other.noisy
    assert other.id != record.id
    assert changed(other, noisy=False).id == record.id
    with pytest.raises(ValidationError):
        changed(record, scale="huge")


def test_a_record_of_schema_1_comes_in_as_stale():
    record = parse(json.dumps(OLD))
    assert record.schema_version == 2
    assert hashes.is_stale(record)
    assert record.ratios == {"baseline": estimate(1.9, 2.0, 2.1), "free": estimate(1.1, 1.2, 1.3)}
    assert record.seconds_of == {"baseline": 2.0, "candidate": 1.0, "free": 1.2}
    assert record.quality.margin is None
    assert parse(record.to_json()) == record
    with pytest.raises(InputError, match="surprise"):
        parse(json.dumps(OLD | {"surprise": 1}))


def test_the_machine_is_kept_apart_from_the_content():
    record = make()
    bare = parse(record.to_json(machine=False))
    assert bare.machine == {}
    assert bare.id == record.id
