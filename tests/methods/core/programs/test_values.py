import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.methods.core.programs.values import DEEPEST, decode, encode

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
HASHED = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES | st.sets(HASHED) | st.frozensets(HASHED),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(HASHED, inner),
    max_leaves=10,
)


@given(VALUES)
def test_every_plain_value_comes_back_as_itself(value):
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))


def test_what_json_cannot_say():
    assert math.isnan(decode(encode(float("nan"))))
    assert decode(encode([float("inf"), -0.0])) == [float("inf"), 0.0]
    assert math.copysign(1, decode(encode(-0.0))) == -1
    assert decode(encode(7**9000)) == 7**9000  # more digits than int() reads in decimal
    assert decode(encode({(1, 2): {3}})) == {(1, 2): {3}}
    assert decode(encode(True)) is True


def test_a_subclass_becomes_what_it_derives_from_and_runs_nothing():
    class Loud(list):
        def __iter__(self):
            raise AssertionError("a program's own code ran")

    class Text(str):
        __slots__ = ()

        def __str__(self):
            return "other"

    assert decode(encode(Loud([1]))) == [1]
    assert decode(encode(Text("a"))) == "a"

    class Lies:
        @property
        def __class__(self):
            raise AssertionError("a program's own code ran")

    with pytest.raises(TypeError, match="a Lies is not a plain value"):
        encode(Lies())

    class Number(complex):
        real = property(lambda self: 7.0)

    assert decode(encode(Number(1, 2))) == 1 + 2j


def test_what_is_no_plain_value_is_refused():
    deep = []
    for _ in range(DEEPEST + 5):
        deep = [deep]
    for value in (object(), print, deep, bytearray(b"x")):
        with pytest.raises(TypeError, match="plain|deeper"):
            encode(value)
    for data in (
        b"",
        b"{",
        b'{"q": 1}',
        b'{"t": 1}',
        b'{"b": "?"}',
        b'{"i": "x"}',
        b'{"d": [1]}',
        b'{"f": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        json.dumps({"a": 1, "b": 2}).encode(),
    ):
        with pytest.raises(ValueError, match="plain"):
            decode(data)
