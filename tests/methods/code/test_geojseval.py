"""GeoJSEval without Node: comparators, figures, mutants, what is made of responses, and records."""

import copy
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.code.geojseval_here import EXAMPLES, SQUARE, Given

from assay.errors import InputError
from assay.methods.code import geojseval as room
from assay.methods.code.geojseval import (
    ERRORS,
    OUT_TYPES,
    Answer,
    Attempt,
    Judged,
    Result,
    cleaned,
    compared,
    completed,
    defines,
    error_of,
    error_shares,
    first_n,
    mutants,
    ranked,
    read,
    reported,
    result_of,
    same_geometry,
    stability_adjusted,
    unbiased,
    variation,
    write,
)  # fmt: skip
from assay.methods.code.geojseval.comparing import _paired
from assay.methods.core.programs.workers import Outcome

# ------------------------------------------------------------------------------------------------------------------ comparators


def changed(value, path=()):
    """The value with one thing in it changed: each number by a little, each text, bool and null, each item and key left out or added."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 0.01
        yield value - 0.01
    elif isinstance(value, str):
        if path[-1:] != ("type",):
            yield value + "x"
            yield value.upper()
    elif value is None:
        yield False
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from ([*value[:n], other, *value[n + 1 :]] for other in changed(item, (*path, n)))
        if path[:1] != ("coordinates",):
            yield value[:-1]
            yield [*value, 7]
            yield value[::-1]
    else:
        for key, item in value.items():
            yield from ({**value, key: other} for other in changed(item, (*path, key)))
        if "type" not in value:
            yield {**value, "more": 1}
            yield dict(list(value.items())[:-1])


@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_an_answer_with_one_thing_changed_is_wrong_both_ways(out_type):
    right = EXAMPLES[out_type]
    assert compared(out_type, right, copy.deepcopy(right)) == "right"
    others = list(changed(right))
    assert len(others) >= (1 if out_type == "boolean" else 2)
    for other in others:
        assert compared(out_type, right, other) != "right", other
        if compared(out_type, right, other) == "wrong":
            assert compared(out_type, other, right) != "right", other


@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_an_answer_of_another_type_is_told_as_such(out_type):
    same_kind = {"error_message": "string", "string": "error_message", "geojson": "object"}
    for other, value in EXAMPLES.items():
        if other == out_type or same_kind.get(out_type) == other or (out_type == "object" and other == "geojson"):
            continue
        assert compared(out_type, EXAMPLES[out_type], value) == "type", other
    for value in (None, ...):
        assert compared(out_type, EXAMPLES[out_type], value) == "type"
    with pytest.raises(ValueError, match="expected must be of the type"):
        compared(out_type, None, EXAMPLES[out_type])


def test_noise_below_the_tolerance_is_none_and_above_it_is():
    for close, far, out_type, made in [
        (9e-7, 1.1e-6, "number", lambda x: x),
        (4.9e-4, 5.1e-4, "array", lambda x: [x]),
        (9e-7, 1.1e-6, "object", lambda x: {"a": [x]}),
        (9e-7, 1.1e-6, "geojson", lambda x: {"type": "Point", "coordinates": [x, 1]}),
    ]:
        for sign in (1, -1):
            assert compared(out_type, made(3.0), made(3.0 + sign * close)) == "right"
            assert compared(out_type, made(3.0), made(3.0 + sign * far)) == "wrong"
    assert compared("number", math.nan, math.nan) == "right"
    assert compared("number", 1.0, math.nan) == compared("number", math.nan, 1.0) == "wrong"
    assert compared("number", math.inf, math.inf) == "right"
    assert compared("number", math.inf, -math.inf) == compared("number", 1e308, math.inf) == "wrong"
    assert compared("array", [True], [1]) == compared("array", [1], [True]) == "wrong"
    assert compared("object", {"a": 1, "b": 2}, {"b": 2, "a": 1}) == "right"


def ring(start, turned):
    points = SQUARE[:-1][start:] + SQUARE[:-1][:start]
    points = points[::-1] if turned else points
    return [*points, points[0]]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 3), st.booleans(), st.permutations(range(3)))
def test_only_the_geometry_counts_where_geometry_is_asked_for(start, turned, order):
    squares = [[[[x + 10 * n, y] for x, y in SQUARE]] for n in range(3)]
    other = [[[[x + 10 * n, y] for x, y in ring(start, turned)]] for n in order]
    one = {"type": "MultiPolygon", "coordinates": squares}
    features = [{"type": "Feature", "properties": {"a": 1}, "geometry": of("Polygon", part)} for part in other]
    for another in (
        {"type": "MultiPolygon", "coordinates": other},
        {"type": "FeatureCollection", "features": features},
    ):
        assert same_geometry(one, another)
        assert same_geometry(another, one)
    assert not same_geometry(one, {"type": "MultiPolygon", "coordinates": other[:2]})
    assert not same_geometry(one, {"type": "MultiPolygon", "coordinates": [*other[:2], other[0]]})


def of(kind, coordinates):
    return {"type": kind, "coordinates": coordinates}


def test_what_does_not_count_in_a_geometry_and_what_does():
    line = of("LineString", [[0, 0], [2, 0], [2, 3]])
    for same in (
        [[2, 3], [2, 0], [0, 0]],
        [[0, 0], [1, 0], [2, 0], [2, 0], [2, 3]],
        [[0, 0], [2, 0.0000001], [2, 3]],
    ):
        assert same_geometry(line, of("LineString", same))
        assert same_geometry(of("LineString", same), line)
    for other in (
        [[0, 0], [2, 0]],
        [[0, 0], [2, 3], [2, 0]],
        [[0, 0], [2, 0.001], [2, 3]],
        [[0, 0], [2, 0], [2, 3], [2, 0]],
    ):
        assert not same_geometry(line, of("LineString", other))
    square, hole = of("Polygon", [SQUARE]), of("Polygon", EXAMPLES["geojson"]["coordinates"])
    assert not same_geometry(square, hole)
    assert not same_geometry(square, of("LineString", SQUARE))
    assert not same_geometry(square, of("Polygon", [[[y + 1, x] for x, y in SQUARE]]))
    crossed = [SQUARE[0], SQUARE[2], SQUARE[1], SQUARE[3], SQUARE[0]]
    assert not same_geometry(square, of("Polygon", [crossed]))
    with_middle = [[0, 0], [1, 0], [2, 0], [2, 2], [0, 2], [0, 1], [0, 0]]
    assert same_geometry(square, of("Polygon", [with_middle[3:-1] + with_middle[:4]]))
    points = of("MultiPoint", [[0, 0], [1, 1]])
    assert same_geometry(
        points, {"type": "GeometryCollection", "geometries": [of("Point", [1, 1]), of("Point", [0, 0])]}
    )
    assert not same_geometry(points, of("MultiPoint", [[0, 0], [0, 0]]))
    assert not same_geometry(of("Point", [0, 0]), of("Point", [0, 0, 5]))
    assert same_geometry({"type": "Feature", "geometry": None}, {"type": "FeatureCollection", "features": []})


def test_a_tolerance_is_not_transitive_so_that_parts_are_paired_as_they_fit():
    # the second fits both, the first only one of them: whoever takes the first that fits would fail
    one = of("MultiPoint", [[0, 0], [8e-7, 0]])
    other = of("MultiPoint", [[4e-7, 0], [-5e-7, 0]])
    assert same_geometry(one, other)
    assert same_geometry(other, one)


def test_a_fine_curve_is_the_same_wherever_it_begins():
    # a circle of four metres: the bend at each of its points is less than what counts as straight
    circle = [[4e-5 * math.cos(math.pi * n / 64), 4e-5 * math.sin(math.pi * n / 64)] for n in range(128)]
    one = of("Polygon", [[*circle, circle[0]]])
    for start in (1, 7, 64):
        turned = circle[start:] + circle[:start]
        assert same_geometry(one, of("Polygon", [[*turned, turned[0]]]))
        assert same_geometry(of("Polygon", [[*turned, turned[0]][::-1]]), one)
    assert not same_geometry(one, of("Polygon", [[[2 * x, 2 * y] for x, y in [*circle, circle[0]]]]))


def test_many_small_steps_are_a_long_way():
    steps = of("LineString", [[n * 9e-7, 0] for n in range(50)])
    assert same_geometry(steps, of("LineString", [[0, 0], [49 * 9e-7, 0]]))
    assert not same_geometry(steps, of("LineString", [[0, 0], [9e-7, 0]]))
    there_and_back = [[n * 9e-7, 0] for n in (*range(50), *range(50, -1, -1))]
    assert not same_geometry(of("Polygon", [there_and_back]), of("Polygon", [[[0, 0], [0, 0], [0, 0], [0, 0]]]))


def test_many_equal_parts_are_paired_and_endless_ones_refused():
    assert _paired([0] * 1100, [0] * 1100, lambda one, other: True)
    deep = of("Point", [1, 1])
    for _ in range(5000):
        deep = {"type": "GeometryCollection", "geometries": [deep]}
    assert compared("geojson", of("Point", [1, 1]), deep) == "type"


@pytest.mark.parametrize(
    "value",
    [
        5, None, "POINT (1 1)", {}, {"type": "Point"}, of("Point", [1]), of("Point", ["1", 2]), of("Point", [1, math.nan]),
        of("Point", [True, 1]), of("LineString", [[0, 0]]), of("Polygon", []), of("Polygon", [SQUARE[:-1]]),
        of("Polygon", [[[0, 0], [1, 1], [0, 0]]]), of("Circle", [[0, 0]]), {"type": "FeatureCollection"},
    ],
)  # fmt: skip
def test_what_is_no_geojson_is_of_another_type(value):
    assert compared("geojson", EXAMPLES["geojson"], value) == "type"
    with pytest.raises(ValueError):
        same_geometry(value, value)


def test_bad_types_are_named():
    with pytest.raises(ValueError, match="out_type must be one of"):
        compared("date", 1, 1)
    with pytest.raises(TypeError, match="out_type"):
        compared(3, 1, 1)


# -------------------------------------------------------------------------------------------------------------------- results


def case(expected, out_type, **more):
    return Given({"x": 1}, expected, out_type, **more)


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Outcome("raised", error="SyntaxError: Unexpected token"), "syntax"),
        (Outcome("raised", error="TypeError: turf.foo is not a function"), "attribute or parameter"),
        (Outcome("raised", error="ReferenceError: the program defines no function 'f'"), "attribute or parameter"),
        (Outcome("raised", error="Error: coordinates must contain numbers"), "attribute or parameter"),
        (Outcome("raised", error="TypeError: a function is not a plain value"), "output type"),
        (Outcome("raised", error="ReferenceError: fetch is not defined"), "network"),
        (Outcome("raised", error="Error: getaddrinfo EAI_AGAIN somewhere"), "network"),
        (Outcome("raised", error="Error: Cannot find module 'proj4'"), "other"),
        (Outcome("raised", error="thrown string: no"), "other"),
        (Outcome("time", error="more than 5 s"), "timeout"),
        (Outcome("memory"), "other"),
        (Outcome("crashed"), "other"),
        (Outcome("returned", "2"), "output type"),
        (Outcome("returned", 3), "wrong answer"),
        (Outcome("returned", {"error": "failed"}), "output type"),
    ],
)
def test_every_failure_is_of_a_kind(outcome, kind):
    found = result_of(case(2, "number"), outcome)
    assert (found.passed, found.error) == (False, kind)
    assert kind in ERRORS
    assert found.why
    assert outcome.state == "returned" or error_of(outcome) == kind


def test_an_exception_is_no_answer_and_an_answer_no_exception():
    wanted = case("units is invalid", "error_message", edge=True)
    assert result_of(wanted, Outcome("raised", error="Error: units is invalid")).passed
    assert result_of(wanted, Outcome("raised", error="TypeError: units is invalid")).passed
    for other in (
        Outcome("raised", error="Error: units is invalid."),
        Outcome("raised", error="Error: "),
        Outcome("returned", "units is invalid"),
        Outcome("returned", {"error": "units is invalid"}),
    ):
        found = result_of(wanted, other)
        assert (found.passed, found.error, found.edge) == (False, "wrong answer", True)
    assert result_of(wanted, Outcome("time")).error == "timeout"
    looks_like_one = case({"error": "units is invalid"}, "object")
    assert result_of(looks_like_one, Outcome("returned", {"error": "units is invalid"})).passed
    assert not result_of(looks_like_one, Outcome("raised", error="Error: units is invalid")).passed


# -------------------------------------------------------------------------------------------------------------------- figures

rounds = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(rounds)
def test_pass_at_n_grows_with_n_and_stability_never_adds(solved):
    first = [first_n(solved, n) for n in (1, 3, 5)]
    assert first == sorted(first)
    fair = [unbiased(solved, n) for n in (1, 3, 5)]
    assert all(b - a > -1e-12 for a, b in zip(fair, fair[1:], strict=False))
    assert fair[-1] == pytest.approx(first[-1])  # of all rounds there is one choice only
    assert fair[0] == pytest.approx(sum(map(sum, solved)) / (5 * len(solved)))
    cv = variation(first)
    assert cv >= 0
    assert stability_adjusted(first[-1], cv) <= first[-1]
    if len(set(first)) == 1:
        assert cv == 0
        assert stability_adjusted(first[-1], cv) == first[-1]


@settings(max_examples=12, deadline=None)
@given(rounds, st.permutations(range(5)))
def test_the_unbiased_figure_does_not_depend_on_the_order_of_rounds(solved, order):
    other = [[of_task[n] for n in order] for of_task in solved]
    for n in (1, 3, 5):
        assert unbiased(other, n) == pytest.approx(unbiased(solved, n))


def test_the_first_n_do_depend_on_it_and_zeros_are_no_division():
    assert (first_n([[True, False]], 1), first_n([[False, True]], 1)) == (1.0, 0.0)
    assert variation([0.0, 0.0, 0.0]) == 0.0
    assert stability_adjusted(0.0, 0.0) == 0.0
    assert variation([0.2, 0.4, 0.6]) == pytest.approx(math.sqrt(0.08 / 3) / 0.4)  # of all, not of a sample
    for bad in (
        lambda: first_n([], 1),
        lambda: first_n([[True]], 2),
        lambda: unbiased([[True], [True, False]], 2),
        lambda: variation([]),
    ):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(ValueError, match="cv must be"):
        stability_adjusted(0.5, math.nan)
    with pytest.raises(ValueError, match="last must be"):
        stability_adjusted(1.5, 0.1)


def result(passed, error="", edge=False):
    return Result(passed, edge, error if not passed else "", "why")


def attempt(*results, tokens=10, seconds=1.0, code="a\n\nb\n"):
    return Attempt(Answer("raw", code, tokens, seconds), Judged(tuple(results)))


def test_errors_are_shares_of_failed_cases_that_are_no_edge_cases():
    found = error_shares(
        [
            Judged((result(True), result(False, "wrong answer"), result(False, "timeout", edge=True))),
            Judged((result(False, "syntax"), result(False, "wrong answer"), result(True, edge=True))),
        ]
    )
    assert math.fsum(found.values()) == pytest.approx(1)
    assert found["wrong answer"] == pytest.approx(2 / 3)
    assert found["timeout"] == 0
    assert set(found) == set(ERRORS)
    assert set(error_shares([Judged((result(True), result(False, "timeout", edge=True)))]).values()) == {0.0}


def test_a_program_that_passes_some_cases_has_failed():
    assert Judged((result(True), result(True))).status == "passed"
    assert Judged((result(True), result(False, "syntax"))).status == "partial"
    assert Judged((result(False, "syntax"),)).status == "failed"
    assert not Judged((result(True), result(False, "syntax"))).passed


def test_a_report_has_all_figures_of_the_rounds():
    good, bad = (
        attempt(result(True), result(True, edge=True)),
        attempt(result(False, "syntax"), result(True, edge=True), tokens=30),
    )
    found = reported({"a": [bad, good, bad, bad, bad], "b": [bad] * 5})
    assert found.first == {1: 0.0, 3: 0.5, 5: 0.5}
    assert found.unbiased == pytest.approx({1: 0.1, 3: 0.3, 5: 0.5})
    assert found.cases == {1: 0.0, 3: 0.5, 5: 0.5}
    assert found.edges == 1
    assert found.cv == pytest.approx(variation([0, 0.5, 0.5]))
    assert found.stable == pytest.approx(0.5 / (1 + found.cv))
    assert found.errors["syntax"] == 1
    assert (found.tokens, found.seconds, found.lines) == (28, 1, 2)
    assert found.per == {"tokens": 0, "seconds": 0, "lines": 0}
    unknown = reported({"a": [replace(good, answer=Answer("", "x"))]}, ns=[1])
    assert (unknown.tokens, unknown.seconds, unknown.per) == (None, None, {"lines": 1.0})
    for bad_input in ({}, {"a": [good], "b": [good, good]}, {"a": [good]}):
        with pytest.raises(ValueError):
            reported(bad_input)
    stopped = attempt(result(False, "syntax"))  # as with `stop`: at the first that failed
    with pytest.raises(ValueError, match=r"attempts at a must be judged on the same cases, got \[1, 2\]"):
        reported({"a": [good, stopped]}, ns=[1])


def test_ranks_share_places_and_leave_out_what_is_not_known():
    good, bad = attempt(result(True)), attempt(result(False, "syntax"), tokens=None)
    places = ranked({name: reported({"a": [one]}, ns=[1]) for name, one in (("x", good), ("y", good), ("z", bad))})
    assert [places[name]["pass"] for name in "xyz"] == [1.5, 1.5, 3]
    assert [places[name]["cv"] for name in "xyz"] == [2, 2, 2]
    assert "tokens" not in places["x"]
    assert places["x"]["sum"] < places["z"]["sum"]


# ---------------------------------------------------------------------------------------------------------- answers and records


def test_a_program_is_found_in_what_a_model_says():
    helper_first = (
        "Text\n```js\nfunction helper() {}\n```\nand\n```javascript\nconst helper = 1;\nconst area = (x) => x;\n```\n"
    )
    assert cleaned(helper_first, "area") == "const helper = 1;\nconst area = (x) => x;\n"
    assert cleaned("function area(x) { return x; }", "area") == "function area(x) { return x; }"
    assert cleaned("```\nfunction other() {}\n```", "area") == "function other() {}\n"
    assert cleaned("```js\nfunction area(x) {", "area") == "function area(x) {"  # cut off
    imported = "import * as turf from '@turf/turf';\nimport {\n  area as a,\n} from 'x';\n"
    imported += "export function area(x) { return x; }\nexport default area;\n"
    assert cleaned(imported, "area") == "function area(x) { return x; }\n\n"
    assert cleaned("return 1; }", "area", "function area(x) {") == "function area(x) {\nreturn 1; }"
    assert defines("exports.area = x => x", "area")
    assert defines("async function area(", "area")
    assert not defines("area(3)", "area")
    assert not defines("function areas(x) {}", "area")
    assert not defines("myarea = 1", "area")
    assert completed(" return `}`; // }\n}\nmore", "function f() {") == "function f() { return `}`; // }\n}\n"
    assert completed(" return 1;", "function f() {") == "function f() { return 1;\n"
    with pytest.raises(ValueError, match="opening brace"):
        completed("", "function f()")
    with pytest.raises(TypeError, match="response must be a text"):
        cleaned(None, "area")


class Toy:
    id, prompt, entry_point, programs = (
        "toy/one",
        "/** ü */\nfunction f(x) {",
        "f",
        {"reference": "function f(x) { return x; }"},
    )


def test_records_are_laid_out_as_lm_eval_logs_samples_and_come_back(tmp_path):
    tried = {
        "toy/one": [
            attempt(result(True), result(False, "timeout", edge=True)),
            attempt(result(False, "syntax"), result(True)),
        ]
    }
    write(tmp_path / "samples_geojseval_x.jsonl", {"toy/one": Toy()}, tried)
    (line,) = (tmp_path / "samples_geojseval_x.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert set(record) >= {
        "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash",
    }  # fmt: skip
    assert record["resps"] == [["raw", "raw"]]
    assert [record[name] for name in record["metrics"]] == [0.0]
    assert record["arguments"]["gen_args_0"]["arg_0"] == Toy.prompt
    assert read(tmp_path / "samples_geojseval_x.jsonl") == tried
    (tmp_path / "bad.jsonl").write_text(line + "\n" + line.replace('"syntax"', '"luck"') + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: not a record"):
        read(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


# -------------------------------------------------------------------------------------------------------------------- mutants

PROGRAM = """function f(points, unit) {
  const [lon, lat] = points[0];
  const far = turf.bearing(points[0], [lon + 1, lat], { units: 'kilometers', steps: 5 });
  points.push(far); // [a, b]
  if (!far && far < 3) return true;
  return [turf.area(lat), lon];
}
"""


def test_every_rule_makes_the_fault_that_it_is_named_for():
    by_rule = {}
    for mutant in mutants(PROGRAM):
        by_rule.setdefault(mutant.rule, []).append(mutant.why)
    assert set(by_rule) == set(room.RULES) - {"missing argument"}
    assert any("const [lat, lon] = points" in why for why in by_rule["swapped pair"])
    assert any("turf.bearing([lon + 1, lat], points[0]," in why for why in by_rule["swapped arguments"])
    assert any(why.endswith("const [lon, lat] = points[1];") for why in by_rule["wrong index"])
    assert any("steps: 6" in why for why in by_rule["off by one"])
    assert any("units: 'miles'" in why for why in by_rule["wrong unit"])
    assert len(by_rule["missing option"]) == 3
    assert any("far <= 3" in why for why in by_rule["other sign"])
    assert any("turf.length(" in why for why in by_rule["other function"])
    assert any("if (far &&" in why for why in by_rule["not negated"])
    assert any(why.endswith("return undefined;") for why in by_rule["nothing done"])
    assert "turf.min(a)" in mutants("x = turf.min(a, 5)", rules=["missing argument"])[0].program


def test_mutants_differ_from_the_program_and_each_other_by_one_place():
    made = mutants(PROGRAM)
    texts = [mutant.program for mutant in made]
    assert len(set(texts)) == len(texts)
    assert PROGRAM not in texts
    assert all(sum(a != b for a, b in zip(text.splitlines(), PROGRAM.splitlines(), strict=True)) <= 1 for text in texts)
    assert all(PROGRAM.splitlines()[mutant.line - 1] != mutant.program.splitlines()[mutant.line - 1] for mutant in made)
    assert 0.2 < sum(mutant.held_out for mutant in made) / len(made) < 0.8
    assert mutants("turf.distance(a, b)", rules=["swapped arguments"]) == []
    assert all("b, a" not in text for text in texts)  # comments are left alone
    with pytest.raises(ValueError, match="rules must be one of"):
        mutants(PROGRAM, rules=["luck"])
    with pytest.raises(ValueError, match="closing bracket"):
        mutants("f(a, [b")
