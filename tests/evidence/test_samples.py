"""Samples from elsewhere: each format as its tool writes it, and nothing that is no time gets through."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.evidence.samples import MOST_BYTES, decoded, read, read_file

HYPERFINE = {
    "results": [
        {
            "command": "old", "mean": 2.0, "stddev": 0.1, "median": 2.0, "user": 1.0, "system": 0.1, "min": 1.9, "max": 2.1,
            "times": [1.9, 2.0, 2.1], "exit_codes": [0, 1, 0],
        },
        {
            "command": "new", "mean": 1.0, "stddev": 0.1, "median": 1.0, "user": 1.0, "system": 0.1, "min": 0.9, "max": 1.1,
            "times": [0.9, 1.0, 1.1, 1.0], "exit_codes": [0, 0, 0, 0],
        },
    ]
}  # fmt: skip
PYTEST = {
    "machine_info": {"cpu": {"count": 2}},
    "commit_info": {"id": "abc"},
    "benchmarks": [
        {"name": "test_old", "fullname": "tests/t.py::test_old", "stats": {"min": 1.9, "mean": 2.0, "data": [1.9, 2.1]}},
        {"name": "test_new", "fullname": "tests/t.py::test_new", "stats": {"min": 0.9, "mean": 1.0, "data": [0.9, 1.1]}},
    ],
    "version": "5.1.0",
}  # fmt: skip


def optimum(*parts, values=(1.0, 1.1)):
    latency = {"unit": "s", "values": list(values), "count": len(values), "mean": sum(values) / len(values), "p50": 1.0}
    once = {"memory": None, "latency": {**latency, "values": [9.0], "mean": 9.0}, "throughput": None}
    return {
        "load_model": once,
        "first_generate": once,
        **{
            part: {"memory": None, "latency": latency, "throughput": {"unit": "tokens/s", "value": 3.0}}
            for part in parts
        },
    }


def both(found):
    return found.before.name, found.before.values, found.after.name, found.after.values


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("before,after\n2,1\n3,1.5\n", "CSV, two columns", ("before", (2.0, 3.0), "after", (1.0, 1.5))),
        ("\ufeffx;y\r\n2;1\r\n3;\r\n", "CSV, two columns", ("x", (2.0, 3.0), "y", (1.0,))),
        ("after\tbefore\n1\t2\n", "CSV, two columns", ("before", (2.0,), "after", (1.0,))),
        ("label,value\nold,2\nnew,1\nold,3\n", "CSV, label and value", ("old", (2.0, 3.0), "new", (1.0,))),
        ('{"before": [2, 3], "after": [1e0]}', "JSON", ("before", (2.0, 3.0), "after", (1.0,))),
        ('{"note": "x", "new": [1], "old": [2]}', "JSON", ("old", (2.0,), "new", (1.0,))),
        ('[{"name": "p", "values": [2]}, {"label": "q", "times": [1]}]', "JSON", ("p", (2.0,), "q", (1.0,))),
        ('[{"values": [2]}, {"values": [1]}]', "JSON", ("series 1", (2.0,), "series 2", (1.0,))),
        (json.dumps(HYPERFINE), "hyperfine JSON", ("old", (1.9, 2.0, 2.1), "new", (0.9, 1.0, 1.1, 1.0))),
        (
            json.dumps(PYTEST),
            "pytest-benchmark JSON",
            ("tests/t.py::test_old", (1.9, 2.1), "tests/t.py::test_new", (0.9, 1.1)),
        ),
    ],
)
def test_each_format_is_found_out(text, kind, expected):
    found = read(text.removeprefix("\ufeff"))
    assert found.format == kind
    assert both(found) == expected
    assert both(read(decoded(text.encode(), "x"))) == expected


def test_two_runs_of_optimum_benchmark_one_after_the_other():
    old, new = optimum("forward", values=[2.0, 2.1]), {"config": {"name": "x"}, "report": optimum("forward")}
    for text in (json.dumps(old) + "\n" + json.dumps(new), json.dumps([old, new])):
        found = read(text)
        assert (found.format, found.order) == ("optimum-benchmark JSON", "blocks")
        assert both(found) == ("forward", (2.0, 2.1), "forward (2)", (1.0, 1.1))
        assert found.after.stated == {"mean": pytest.approx(1.05)}


def test_where_there_are_more_parts_one_is_chosen_by_name():
    text = json.dumps(optimum("prefill", "decode")) * 2
    with pytest.raises(InputError, match=r"choose with --before and --after from 'prefill', 'decode', 'prefill \(2\)'"):
        read(text)
    found = read(text, before="decode", after="decode (2)")
    assert (found.before.name, found.after.name) == ("decode", "decode (2)")
    with pytest.raises(InputError, match="there is no series 'encode'"):
        read(text, before="encode")
    with pytest.raises(InputError, match="must name two"):
        read(text, before="decode", after="decode")


def test_what_the_file_says_of_itself_is_kept():
    found = read(json.dumps(HYPERFINE))
    assert (found.before.stated, found.before.failed, found.after.failed, found.order) == (
        {"mean": 2.0},
        1,
        0,
        "blocks",
    )
    assert read(json.dumps(PYTEST)).before.stated == {"min": 1.9}


def test_names_turn_two_series_round():
    assert read("a,b\n2,1\n", before="b").before.name == "b"
    assert read("a,b\n2,1\n", after="a").before.name == "b"
    assert read("time,p,q\nx,2,1\ny,3,1\n", before="q", after="p").before.values == (1.0, 1.0)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ("abab", "A B A B"),
        ("abbaab", "A B B A"),
        ("aabb", "blocks"),
        ("aab", "blocks"),
        ("aabab", ""),
        ("abbbaa", ""),
        ("ab", "A B A B"),
    ],
)
def test_the_order_of_labels_tells_how_they_were_taken(labels, order):
    assert read("label,value\n" + "".join(f"{label},1\n" for label in labels)).order == order


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("before,after\n", "no samples"),
        ("1,2\n3,4\n", "must name its columns"),
        ("before\n1\n", "two columns"),
        ("before,after\n1,2,3\n", "line 2 has 3 cells"),
        ("before,after\n1,x\n", "line 2, 'after': 'x' is no number"),
        ("before,after\n1,\n1,2\n", "line 2: 'after' is empty here and goes on in line 3"),
        ("before,before\n1,2\n", "two columns are called"),
        ("before,after\n1,0\n", "'after', value 1 is 0: a zero"),
        ("before,after\n-1,1\n", "'before', value 1 is -1: times must be positive"),
        ("before,after\nnan,1\n", "'before', value 1 is nan"),
        ("before,after\ninf,1\n", "'before', value 1 is inf"),
        ("before,after\n1e999,1\n", "'before', value 1 is inf"),
        ("before,after\n1,1" + "0" * 5000 + "\n", "line 2, 'after': a number of 5001 digits"),
        ("label,value\nold,1\nold,2\n", "there is only 'old'"),
        ("label,value\nold,1\n,2\n", "line 3 must hold a label"),
        ('{"before": [1], "after": []}', "'after' has no samples"),
        ('{"before": [1], "after": [NaN]}', "'after', value 1 is nan"),
        ('{"before": [1], "after": [-Infinity]}', "'after', value 1 is -inf"),
        ('{"before": [1], "after": [true]}', "'after', value 1 is True: times must be numbers"),
        ('{"before": [1], "after": ["1"]}', "times must be numbers"),
        ('{"before": [1], "after": [[1]]}', "times must be numbers"),
        ('{"before": [1], "after": [null]}', "times must be numbers"),
        ('{"before": [1], "after": [1' + "0" * 5000 + "]}", "a number of 5001 digits"),
        ('{"before": [1], "after": [1' + "0" * 350 + "]}", "'after', value 1 is inf"),
        ('{"before": [1], "after"', "no JSON: line 1"),
        ('{"before": [1]} x', "no JSON: line 1"),
        ('{"before": [1]}{"after": [1]}', "must all be of one benchmark tool"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "holds no samples"),
        ("{}", "holds no samples"),
        ("[]", "holds no samples"),
        ('[{"name": "x"}]', "series 1 has no list"),
        ('{"before": [1], "after": [1], "more": [1]}', "more than two series"),
        ('{"results": [{"command": "x", "mean": 1}]}', "'x' has no times"),
        ('{"benchmarks": [{"name": "x", "stats": {"mean": 1.0}}]}', "'x' has no samples: run pytest with"),
        ('{"benchmarks": [{"name": "x", "stats": 3}]}', "'x' has no samples"),
    ],
)
def test_what_is_no_samples_is_refused_by_name(text, says):
    with pytest.raises(InputError) as error:
        read(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_files_too_large_not_there_and_no_text(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_file(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot read"):
        read_file(tmp_path)
    file = tmp_path / "big.csv"
    file.write_bytes(b"before,after\n" + b"1,2\n" * (MOST_BYTES // 4))
    with pytest.raises(InputError, match="larger than 10 MB"):
        read_file(file)
    file.write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(InputError, match="no text in UTF-8"):
        read_file(file)


KEYS = ("results", "benchmarks", "stats", "data", "command", "times", "latency", "values", "report", "name")
STRANGE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.one_of(STRANGE.map(json.dumps), st.text(max_size=60), st.text(alphabet='abc,;\t\n"1.-', max_size=40)))
def test_whatever_comes_is_read_or_refused(text):
    try:
        found = read(text)
    except InputError:
        return
    assert all(value > 0 for one in (found.before, found.after) for value in one.values)
