import math

import pytest

from assay.workloads.programs.compare import any_of, close, figure, named, same, sequence, unordered


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [
        (1, 1, True),
        (2, 2.0, True),
        (0.1 + 0.2, 0.3, True),
        (1.0, 1.001, False),
        (1, True, False),
        (True, 1, False),
        (None, None, True),
        (None, 0, False),
        ("a", "a", True),
        ("1", 1, False),
        ([1, [2.0]], [1, [2.0]], True),
        ([1], (1,), False),
        ([1, 2], [1], False),
        ({"a": 1.0}, {"a": 1.0 + 1e-13}, True),
        ({"a": 1}, {"b": 1}, False),
        ({1, 2}, {2, 1}, True),
        ({1}, {True}, False),
        (float("nan"), float("nan"), True),
        (float("inf"), float("inf"), True),
        (float("inf"), 1e308, False),
        (10**400, 10**400, True),
        (10**400, 1.0, False),
        (2**60 + 1, 2**60, False),
        (1 + 2j, 1 + 2j, True),
        (b"a", "a", False),
    ],
)
def test_same_is_equal_in_kind_and_value(expected, got, right):
    assert same(expected, got) is right


def test_a_tuple_is_a_list_only_where_asked():
    assert sequence([(1, 2)], ([1, 2],))
    assert not sequence([1], {1})
    assert not sequence([True], [1])


def test_close_takes_what_is_near():
    assert close(atol=0.1)([1.0, {"a": 2.0}], [1.05, {"a": 2.05}])
    assert not close(atol=0.1)(1.0, 1.2)
    assert close(rtol=0.01, atol=0)(1000.0, 1009.0)
    assert not close(rtol=0.01, atol=0)(0.0, 1e-9)
    assert close()(math.nan, math.nan)


def test_unordered_counts():
    assert unordered([1, 1, 2], [2, 1, 1])
    assert not unordered([1, 1, 2], [1, 2, 2])
    assert unordered([[1], [2]], [[2], [1]])
    assert not unordered([[1], [1]], [[2], [1]])
    assert not unordered([1], [True])
    assert not unordered([(1,)], [(True,)])
    assert not unordered([1], 1)


def test_figures_may_begin_anywhere():
    square = [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert figure()(square, square[2:] + square[:2])
    assert figure()(square, [*square, square[0]])  # closed by its first point once more
    assert figure()(square, square[::-1])
    assert not figure(turned=False)(square, square[::-1])
    assert not figure()(square, [(0, 0), (1, 1), (1, 0), (0, 1)])
    assert figure(atol=0.01)(square, [(0.005, 0), (1, 0), (1, 1), (0, 1)])
    for wrong in ([], [1, 2], "square", [(0, 0, 0)] * 4, [(True, 0)] * 4):
        assert not figure()(square, wrong)


def test_one_of_several_answers():
    assert any_of(same)([1, 2], 2)
    assert not any_of(same)([1, 2], 3)


def test_names():
    assert named("unordered") is unordered
    with pytest.raises(ValueError, match="compare must be one of same, close"):
        named("equal")
