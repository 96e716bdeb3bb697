"""GeoJSEval in real Nodes: programs of each kind, isolation, errors, the page, and the published way of running."""

from types import SimpleNamespace

import pytest
from tests.methods.code.geojseval_here import EXAMPLES, Given, libraries

from assay.methods.code.geojseval import OUT_TYPES, OneProcess, Warm, judged
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.geospatial import tasks
from assay.workloads.programs.geospatial.libraries import module_of

SAME = "function f(x) { return x; }"
SHORT = Limits(wall_seconds=20, cpu_seconds=0.5, memory_mib=500)


@pytest.fixture(scope="module")
def folder():
    return libraries()


@pytest.fixture(scope="module")
def turf(folder):
    with Warm([module_of("turf")], folder) as found:
        yield found


@pytest.fixture(scope="module")
def plain(folder):
    """Nodes without a library."""
    with Warm() as found:
        yield found


def cases(*given, out_type="number", **more):
    return [Given({"x": x}, expected, out_type, **more) for x, expected in given]


def of(runner, program, *given, **more):
    return judged(runner, program, "f", ["x"], cases(*given, **more))


def test_a_reference_is_right_and_an_empty_function_never(turf):
    for name in ("turf/area-km2", "turf/distance-km"):
        task = tasks()[name]
        right = judged(turf, task.programs["reference"], task.entry_point, task.parameters, task.cases)
        assert right.status == "passed", right
        empty = judged(turf, f"{task.header} {{}}", task.entry_point, task.parameters, task.cases)
        assert not any(result.passed for result in empty.results)
        assert {result.error for result in empty.results if not result.edge} == {"output type"}


@pytest.mark.parametrize("out_type", [out_type for out_type in OUT_TYPES if out_type != "error_message"])
def test_values_of_each_type_come_through_and_are_judged(plain, out_type):
    right, other = EXAMPLES[out_type], EXAMPLES["string" if out_type != "string" else "number"]
    found = of(plain, SAME, (right, right), (other, right), out_type=out_type)
    assert [result.error for result in found.results] == ["", "output type"]
    assert found.status == "partial"


def test_functions_are_found_by_name_however_they_are_defined(plain):
    for program in (
        "const g = (x) => x * 2;\nconst f = async (x) => g(x);",
        "function helper() { return 1; }\nfunction f(x) { return x * 2; }",
        "module.exports = { f: (x) => x * 2 };",
        "exports.f = function (x) { return x * 2; };",
        "'use strict'; let f = function (x) { return x * 2; }; // the end",
        "console.error('a warning'); var f = (x) => { console.log(x); return x * 2; };",
    ):
        assert of(plain, program, (3, 6)).passed, program
    for program, error in (
        ("function g(x) { return x; }", "attribute or parameter"),
        ("function f(x) { return x", "syntax"),
        ("const f = 5;", "attribute or parameter"),
        ("/* open\nfunction f(x) { return x; }", "syntax"),
    ):
        assert [result.error for result in of(plain, program, (3, 6)).results] == [error]


def test_the_state_of_what_is_returned_is_asked_for_however_a_function_is_defined(plain):
    looks = Given(
        {"x": [3, 4]}, {"result.length": 2, "given[0][1]": 4}, "object", looks=("result.length", "given[0][1]")
    )
    for program in ("const f = (x) => x; // the end", "module.exports = { f: async (x) => x };"):
        assert judged(plain, program, "f", ["x"], [looks]).passed, program
    assert judged(plain, "const g = 1;", "f", ["x"], [looks]).results[0].error == "attribute or parameter"


def test_errors_ends_and_values_stay_apart(plain):
    found = judged(
        plain,
        "function f(x) { if (x === 'time') for (;;); if (x === 'net') return fetch('here'); if (x === 'told') return { error: 'no' };"
        " if (x === 'end') process.exit(0); throw new Error('no'); }",
        "f",
        ["x"],
        [
            *cases(("raise", "no"), ("told", "no"), out_type="error_message", edge=True),
            *cases(("told", {"error": "no"}), ("raise", {"error": "no"}), out_type="object"),
            *cases(("time", 1), ("net", 1), ("end", 1)),
        ],
        limits=SHORT,
    )
    kinds = ["", "wrong answer", "", "attribute or parameter", "timeout", "network", "other"]
    assert [result.error for result in found.results] == kinds


def test_cases_do_not_meet_whatever_their_order(turf):
    leaves = """
        let calls = 0;
        function f(x) {
          calls += 1;
          Array.prototype.sum = () => calls;
          const far = turf.length(turf.lineString([[0, 0], [0, x]]), { units: 'degrees' });
          turf.length = () => 100 + calls;
          globalThis.mine = (globalThis.mine ?? 0) + 1;
          return Math.round(far) + calls + mine - 2;
        }
    """
    meets = """
        const clean = () => typeof mine === 'undefined' && [].sum === undefined;
        const f = (x) => (clean() ? turf.length(turf.lineString([[0, 0], [0, x]]), { units: 'degrees' }) : -1);
    """
    first = cases((1, 1), (2, 2), (3, 3))
    assert judged(turf, leaves, "f", ["x"], first).passed
    assert judged(turf, meets, "f", ["x"], first[::-1]).passed
    assert judged(turf, leaves, "f", ["x"], first[::-1]).passed


def test_arguments_go_by_name_and_may_be_expressions(plain):
    program = "function f(a, b) { return a.get('x') - b; }"
    params = {"b": 2, "a": {"__js__": "new Map([['x', 5]])"}}
    assert judged(plain, program, "f", ["a", "b"], [Given(params, 3, "number")]).passed
    with pytest.raises(ValueError, match="parameters a, c, got b, a"):
        judged(plain, program, "f", ["a", "c"], [Given(params, 3, "number")])
    with pytest.raises(ValueError, match="cases must be one or more"):
        judged(plain, program, "f", ["a", "b"], [])


def test_stop_ends_at_the_first_case_that_fails(plain):
    found = judged(plain, SAME, "f", ["x"], cases((1, 1), (2, 1), (3, 3)), stop=True)
    assert [result.passed for result in found.results] == [True, False]


def test_one_process_a_case_finds_the_same(folder, turf):
    alone = OneProcess(modules=[module_of("turf")], node_modules=folder)
    task = tasks()["turf/distance-km"]
    every = [task.cases[0], task.cases[-1]]
    for runner in (alone, turf):
        found = judged(runner, task.programs["reference"], task.entry_point, task.parameters, every)
        assert [result.passed for result in found.results] == [True, True], found
    for program, error in (
        ("function f(x) { console.log('{}'); console.error('warning'); return undefined; }", "output type"),
        ("function f(x) { return x", "syntax"),
        ("const f = (x) => new Promise(() => {});", "other"),
    ):
        assert of(alone, program, (3, 6)).results[0].error == error


def test_an_answer_that_is_too_deep_to_read_ends_no_judging(folder, monkeypatch):
    deep = b'\n{"state": "returned", "value": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    alone = OneProcess()
    ran = SimpleNamespace(ended="exit", stdout=deep, stderr=b"")
    monkeypatch.setattr(alone, "_sandbox", SimpleNamespace(run=lambda *_, **__: ran))
    assert of(alone, SAME, (3, 3)).results[0].error == "other"


def test_the_state_of_a_map_is_asked_for(folder):
    task = tasks()["leaflet/marker"]
    with Warm([module_of("leaflet")], folder) as leaflet:
        right = judged(leaflet, task.programs["reference"], task.entry_point, task.parameters, task.cases[:1])
        assert right.passed, right
        swapped = task.programs["reference"].replace("[position[1], position[0]]", "position")
        wrong = judged(leaflet, swapped, task.entry_point, task.parameters, task.cases[:1])
        assert wrong.results[0].error == "wrong answer"


@pytest.mark.slow
def test_all_right_programs_of_the_bank_pass(folder):
    by_library = {}
    for task in tasks().values():
        by_library.setdefault(task.library, []).append(task)
    for library, its in by_library.items():
        with Warm([module_of(library)], folder) as warm:
            for task in its:
                for name, program in task.programs.items():
                    found = judged(warm, program, task.entry_point, task.parameters, task.cases)
                    assert found.passed, (task.id, name, found)
