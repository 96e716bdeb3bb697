"""Functions of JavaScript programs in warm Nodes: values, ends, isolation, and costs."""

import math
import shutil
import statistics

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.tools import needs

from assay.methods.core.programs import node as room
from assay.methods.core.programs.node import NodeWorkers, functions_of
from assay.methods.core.programs.node_values import (
    SAFE,
    UNDEFINED,
    BigInt,
    Date,
    Map,
    Set,
    TypedArray,
    decode,
    encode,
)
from assay.methods.core.sandbox import Limits, Sandbox, SandboxMissing

LIMITS = Limits(wall_seconds=20, cpu_seconds=5, memory_mib=200)
SAME = "const f = (x) => x;"
BUSY = "let t = 0; for (let i = 0; i < n; i++) t = (t * 31 + i) % 1000003;"


@pytest.fixture(scope="module")
def workers():
    needs("node")
    with NodeWorkers(limits=LIMITS) as found:
        yield found


def one(workers, program, *args, entry="f", limits=None):
    [[outcome]] = workers.run(program, entry, [args], limits=limits)
    return outcome


def value(workers, program, *args, entry="f"):
    outcome = one(workers, program, *args, entry=entry)
    assert outcome.state == "returned", outcome
    return outcome.value


def alike(one, other):
    """Equal in kind and value, for NaN, -0, True and BigInt too; 5 and 5.0 are one number."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (Map, Set)):
        return type(one) is type(other) and alike(one.items, other.items)
    if isinstance(one, (bool, BigInt)) or not isinstance(one, (int, float)):
        return type(one) is type(other) and one == other
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return False
    return (math.isnan(one) and math.isnan(other)) or (
        one == other and math.copysign(1, one) == math.copysign(1, other)
    )


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.just(UNDEFINED)
    | st.integers(-SAFE, SAFE)
    | st.floats()
    | st.text(max_size=5)
    | st.integers().map(BigInt)
    | st.integers(-(10**12), 10**12).map(Date)
    | st.binary(max_size=3).map(lambda data: TypedArray("Uint8Array", data))
    | st.lists(st.floats(), max_size=3).map(lambda items: TypedArray.of("Float64Array", items)),
    lambda inner: (
        st.lists(inner, max_size=3)
        # keys that are numbers come first in an object: another order than was given
        | st.dictionaries(st.sampled_from(["a", "", "__proto__", "constructor", "o", "ü", "\ud800"]), inner, max_size=3)
        | st.lists(inner, max_size=2).map(lambda items: Set(tuple({repr(item): item for item in items}.values())))
        | inner.map(lambda item: Map((("key", item),)))
    ),
    max_leaves=8,
)


@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(plain, min_size=30, max_size=40))
def test_values_are_the_same_both_ways(workers, values):
    assert alike(decode(encode(values)), values)
    assert alike(value(workers, SAME, values), values)


def test_special_values_are_what_they_are_there(workers):
    program = """
    const f = (x, kind) => kind === "undefined" ? x === undefined : kind === "-0" ? Object.is(x, -0)
      : kind === "class" ? x.constructor.name : kind === "proto" ? Object.getPrototypeOf(x) === Object.prototype : typeof x;
    """
    cases = [
        (UNDEFINED, "undefined"), (-0.0, "-0"), (BigInt(2**70), ""), (Date(5), "class"), (Map(((1, 2), (True, 3))), "class"),
        (TypedArray.of("Float32Array", [1]), "class"), ({"__proto__": 1}, "proto"), ([], "class"), (math.nan, ""),
    ]  # fmt: skip
    found = [outcome.value for [outcome] in workers.run(program, "f", cases)]
    assert found == [True, True, "bigint", "Date", "Map", "Float32Array", True, "Array", "number"]
    made = value(
        workers, "function f() { return [2 ** 53, 5.0, -0, 5n, new Date(NaN), [, 1], new (class A { b = 1 })()] }"
    )
    assert alike(made, [2.0**53, 5, -0.0, BigInt(5), Date(None), [UNDEFINED, 1], {"b": 1}])
    assert (type(made[0]), type(made[1])) == (float, int)
    assert value(workers, "const f = () => {}") is UNDEFINED
    assert value(workers, "const f = () => new Float64Array([1.5, NaN])").values[0] == 1.5


@pytest.mark.parametrize(
    "made",
    [
        "Symbol()",
        "() => 1",
        "/a/",
        "new WeakMap()",
        "new Error('e')",
        "[Promise.resolve()]",
        "new Number(5)",
        "new ArrayBuffer(1)",
    ],
)
def test_what_is_no_plain_value_is_refused(workers, made):
    found = one(workers, f"const f = () => [{made}];")
    assert found.state == "raised", found
    assert found.error.startswith("TypeError")
    assert "plain" in found.error


def test_cycles_and_depth_are_refused(workers):
    assert "cycle" in one(workers, "const f = () => { const a = {}; a.b = [a]; return a }").error
    assert (
        "deeper"
        in one(workers, "const f = () => { let a = []; for (let i = 0; i < 300; i++) a = [a]; return a }").error
    )
    twice = "const f = () => { const a = [1]; return [a, a] }"
    assert value(workers, twice) == [[1], [1]]


def test_the_entry_point_is_found_by_its_name(workers):
    helper = "function helper() { return 'helper' }\n"
    for program in (
        "function f() { return 1 }",
        "const f = () => 1",
        "let f = async function () { return 1 }",
        "var f; f = () => 1",
        "module.exports = { f: () => 1 }",
        "exports.f = () => 1",
        "module.exports = function f() { return 1 }",
        "'use strict'; const { performance } = require('perf_hooks'); const process = 1; function f() { return 1 }",
    ):
        assert value(workers, helper + program) == 1
    assert value(workers, helper + "class A { static n = 2; static f(x) { return x * this.n } }", 4, entry="A.f") == 8
    for program in ("const g = () => 1", "const f = 1", "module.exports = () => 1", "class A { f() {} }"):
        assert one(workers, helper + program).error == "ReferenceError: the program defines no function 'f'"
    assert one(workers, helper, entry="parseInt").state == "raised"
    assert functions_of(helper + "const f = async (a) => a\nexport function g() {}\nconst n = 1") == [
        "helper",
        "f",
        "g",
    ]


def test_an_exception_is_no_value(workers):
    for program, error in (
        ("throw new RangeError('no')", "RangeError: no"),
        ("class Mine extends Error {}; throw new Mine('own')", "Mine: own"),
        ("throw { error: 1 }", "thrown object: [object Object]"),
        ("throw null", "thrown object: null"),
        ("throw { toString() { throw 1 } }", "Error: "),
        ("return Promise.reject(new TypeError('later'))", "TypeError: later"),
        ("return new Promise(() => {})", "Error: the promise never settles"),
        ("return (function deep() { deep() })()", "RangeError: Maximum call stack size exceeded"),
        ("Promise.reject(new Error('unheard')); return 1", "Error: unheard"),
        ("return new Promise(() => setTimeout(() => { throw new Error('timer') }))", "Error: timer"),
    ):
        outcome = one(workers, f"function f() {{ {program} }}")
        assert (outcome.state, outcome.value, outcome.error, outcome.cost) == ("raised", None, error, None), program
    assert one(workers, "function f( {").error.startswith("SyntaxError")
    assert one(workers, "export function f() {}").error.startswith("SyntaxError")
    [bad, good] = workers.run("const f = (n) => { if (n) return n; throw 1 }", "f", [(0,), (1,)], repeats=3)
    assert [len(bad), len(good)] == [1, 3]


def test_promises_are_awaited(workers):
    program = "async function f(n) { await new Promise((done) => setTimeout(done, n)); return [n] }"
    assert value(workers, program, 3) == [3]


def test_limits_end_a_run_and_the_next_one_is_well(workers):
    for program, limits, state in (
        ("while (true) { try { while (true) {} } catch {} }", Limits(cpu_seconds=0.2), "time"),
        ("return new Promise((done) => setTimeout(done, 60000))", Limits(wall_seconds=0.3), "time"),
        ("const all = []; while (true) all.push(new Array(1000).fill(all.length))", LIMITS, "memory"),
        ("const all = []; while (true) all.push(Buffer.alloc(1 << 20, 1))", LIMITS, "memory"),
        ("process.exit(0)", LIMITS, "crashed"),
        ("process.kill(process.pid, 'SIGKILL')", LIMITS, "crashed"),
        ("process.abort()", LIMITS, "crashed"),
        ("return 'x'.repeat(2 ** 21)", LIMITS, "crashed"),
        ("const a = new Array(50).fill('ü'.repeat(50000)); return a", LIMITS, "crashed"),
    ):
        program = f"function f(bad) {{ if (!bad) return 'well'; {program} }}"
        found = one(workers, program, True, limits=limits)
        assert (found.state, found.cost) == (state, None), (program, found)
        assert value(workers, program, False) == "well"
    loads = one(workers, "while (true) {}\nfunction f() {}", limits=Limits(cpu_seconds=0.2))
    assert loads.state == "time"
    argument = one(workers, SAME, {"__js__": "(() => { while (true) {} })()"}, limits=Limits(cpu_seconds=0.2))
    assert argument.state == "time"


def test_noise_does_no_harm(workers):
    program = """
    console.log("a".repeat(100000)); console.error("b");
    function f() { process.stdout.write("c\\n"); require("fs").writeSync(1, "d"); return require("fs").readFileSync(0, "utf8") }
    """
    assert value(workers, program) == ""


REMEMBERS = {
    "its own globals": "globalThis.n = (globalThis.n ?? 0) + 1; return n",
    "its prototypes": "Object.prototype.n = (Object.prototype.n ?? 0) + 1; return {}.n",
    "its own top level": "return ++count",
    "Node's globals": "console.n = (console.n ?? 0) + 1; return console.n",
    "the environment": "process.env.N = Number(process.env.N ?? 0) + 1; return Number(process.env.N)",
    "an escape": "const g = setTimeout.constructor('return globalThis')(); g.n = (g.n ?? 0) + 1; return g.n",
    "their prototypes": "const a = setTimeout.constructor('return Array')().prototype; a.n = (a.n ?? 0) + 1; return a.n",
    "another's function": "const o = setTimeout.constructor('return Object')(); const n = o.keys.n; o.keys = () => []; o.keys.n = 1; "
    "return (n ?? 0) + 1",
    "a built-in module": "const fs = require('fs'); fs.n = (fs.n ?? 0) + 1; return fs.n",
    "a library's": "const l = require('lib'); l.n = (l.n ?? 0) + 1; return l.n",
    "inside of a library": "return require('lib').next()",
    "listeners": "process.on('SIGUSR2', () => {}); return process.listenerCount('SIGUSR2')",
    "timers": "const left = process.getActiveResourcesInfo().length; setInterval(() => {}, 1e6); return left + 1",
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A library that others need, one with a broken file, one with `exports`."""
    needs("node")
    folder = tmp_path_factory.mktemp("libraries") / "node_modules"
    for name, files in {
        "lib": {"index.js": "const two = require('@of/two'); let n = 0; exports.next = () => ++n; exports.two = two.value; "
                "exports.plain = (x) => x instanceof Array && x instanceof Object;"},
        "@of/two": {"package.json": '{"exports": {"require": "./lib/main.js"}}', "lib/main.js":
                    "#!/usr/bin/env node\nexports.value = require('./data.json').value", "lib/data.json": '{"value": 2}'},
        "heavy": {"index.js": "let t = 0; for (let i = 0; i < 1e7; i++) t += i % 7; exports.t = t"},
        "broken": {"index.js": "throw new RangeError('broken')"},
    }.items():  # fmt: skip
        for file, text in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text)
    return folder


@pytest.fixture(scope="module")
def equipped(libraries):
    with NodeWorkers(modules=("lib", "@of/two"), node_modules=libraries, limits=LIMITS) as found:
        yield found


@pytest.mark.parametrize("where", list(REMEMBERS))
def test_a_case_leaves_nothing_to_the_next(equipped, where):
    program = f"let count = 0; function f() {{ {REMEMBERS[where]} }}"
    assert [outcome.value for [outcome] in equipped.run(program, "f", [(), ()])] == [1, 1]


def test_the_order_of_cases_does_not_matter(workers):
    program = "const memo = {}; function f(n) { memo[n] = 1; return Object.keys(memo).length }"
    cases = [(n,) for n in range(4)]
    forth = [outcome.value for [outcome] in workers.run(program, "f", cases)]
    back = [outcome.value for [outcome] in workers.run(program, "f", cases[::-1])]
    assert forth == back == [1] * 4


def test_programs_never_share_a_process():
    needs("node")
    told = "function f() { return [process.pid, process.hrtime()[0] < 0, process.n ?? 0] }"
    hostile = "const p = process; p.n = 5; JSON.stringify = () => '[1]'; Object.freeze = null; function f() { p.n = 6; return 1 }"
    with NodeWorkers(limits=LIMITS, keep=1) as few:
        value(few, hostile)
        assert value(few, told)[2] == 0
        assert list(few._processes) == [told]
        first = few._processes[told]
        assert value(few, told)
        assert few._processes[told] is first
    assert not first.alive
    with pytest.raises(ValueError, match="closed"):
        one(few, told)


def test_a_program_starts_no_process_and_writes_and_reaches_nothing(workers):
    program = """
    async function f() {
      const tried = [];
      for (const attempt of [
        () => { const r = require("child_process").spawnSync("/bin/true"); if (r.error) throw r.error },
        () => new Promise((done, no) => new (require("worker_threads").Worker)("1", { eval: true }).on("error", no).on("exit", done)),
        () => require("fs").writeFileSync("/tmp/a", "a"),
        () => require("fs").writeFileSync("a", "a"),
        () => require("fs").readdirSync("/root"),
        () => new Promise((done, no) => require("net").connect(53, "1.1.1.1").on("error", no).on("connect", done)),
      ]) {
        try { await attempt(); tried.push("done") } catch (error) { tried.push("no") }
      }
      return tried;
    }
    """
    assert value(workers, program) == ["no"] * 6


def test_arguments_may_be_expressions(workers):
    program = "class Point { constructor(x) { this.x = x } get double() { return 2 * this.x } }\nconst f = (p, m) => [p.double, m.get('a')]"
    assert value(workers, program, {"__js__": "new Point(4)"}, {"__js__": "new Map([['a', 1]]) // a comment"}) == [8, 1]
    assert value(workers, "const f = (o) => o.list.map((g) => g(1))", {"list": [{"__js__": "(x) => x + 1"}]}) == [2]
    nested = {"a": [{"__js__": "1n"}], "__proto__": {"__js__": "-0"}, "m": Map(((1, [{"__js__": "[2]"}]),))}
    assert alike(value(workers, SAME, nested), {"a": [BigInt(1)], "__proto__": -0.0, "m": Map(((1, [[2]]),))})
    assert one(workers, SAME, {"__js__": "nothing.there"}).error == "ReferenceError: nothing is not defined"
    assert one(workers, SAME, {"__js__": "1)"}).error.startswith("SyntaxError")


def test_libraries_come_from_the_named_folder(equipped, libraries):
    program = "const { two, plain, next } = require('lib'); const f = (x) => [two, plain(x), plain([]), next(), require('@of/two').value]"
    found = equipped.run(program, "f", [([],)], repeats=2)[0]
    assert [outcome.value for outcome in found] == [[2, True, True, 1, 2]] * 2
    assert one(equipped, "const f = () => require('nothing')").error.startswith("Error: Cannot find module 'nothing'")
    with (
        NodeWorkers(modules=("broken",), node_modules=libraries) as broken,
        pytest.raises(ValueError, match="RangeError: broken"),
    ):
        one(broken, SAME, 1)
    with NodeWorkers(modules=("heavy",), node_modules=libraries) as heavy:
        assert not one(heavy, "const { t } = require('heavy'); const f = () => t").charged
        assert one(equipped, "const { t } = require('heavy'); const f = () => t").charged


def test_cost_grows_with_work_and_is_not_what_the_program_says(workers):
    work = f"function f(n) {{ {BUSY} return t }}"
    small, large = ([o.cost for o in many] for many in workers.run(work, "f", [(10**4,), (10**7,)], repeats=3))
    assert 0 < min(small) < 0.01 < min(large)
    assert statistics.median(large) > 5 * statistics.median(small)
    clocks = "Date.now = () => 0; performance.now = () => 0; process.cpuUsage = () => ({ user: 0, system: 0 });"
    least = 0.5 * min(large)
    assert one(workers, clocks + work, 10**7).cost > least
    tricks = {
        "while loading": f"const made = ((n) => {{ {BUSY} return t }})(1e7); function f() {{ return made }}",
        "while answering": f"function f(n) {{ return {{ get t() {{ {BUSY} return t }} }} }}",
        "afterwards": f"function f(n) {{ const o = {{}}; Promise.resolve().then(() => {{ {BUSY} o.t = t }}); return o }}",
        "after a while": f"async function f(n) {{ await null; {BUSY} return t }}",
    }
    for where, program in tricks.items():
        outcome = one(workers, program, 10**7)
        assert outcome.cost > least, where
        assert outcome.charged == (where != "after a while"), where


@pytest.mark.slow  # times of milliseconds: on a quiet machine
def test_reading_long_arguments_and_writing_long_answers_is_free(workers):
    long = list(range(100_000))
    assert not one(workers, SAME, long).charged
    assert not one(
        workers, "const f = (x) => x.length", {"__js__": "Array.from({ length: 3e5 }, (_, n) => [n])"}
    ).charged


def test_memory_by_its_peak(libraries):
    with NodeWorkers("peak_bytes", limits=LIMITS) as workers:
        program = "function f(n) { return Buffer.alloc(n, 1).length }"
        small, large = ([o.cost for o in many] for many in workers.run(program, "f", [(10,), (50 * 2**20,)], repeats=2))
        assert max(small) < 5e6
        assert all(4.5e7 < cost < 7e7 for cost in large)


def test_each_run_has_a_process_of_its_own_where_that_is_asked_for():
    needs("node")
    with NodeWorkers(limits=LIMITS, fresh=True) as workers:
        found = workers.run("Object.keys(process); function f() { return 1 }", "f", [()], repeats=2)[0]
        assert [outcome.value for outcome in found] == [1, 1]
        assert not workers._processes


def test_wrong_arguments_are_named(tmp_path, libraries):
    for message, kind, call in (
        ("meter must be one of 'cpu_seconds', 'peak_bytes'", ValueError, lambda: NodeWorkers("operations")),
        ("fresh must be True or False", TypeError, lambda: NodeWorkers(fresh=1)),
        ("keep must be", ValueError, lambda: NodeWorkers(keep=0)),
        ("modules must be names", TypeError, lambda: NodeWorkers(modules="lib", node_modules=libraries)),
        ("modules need node_modules", ValueError, lambda: NodeWorkers(modules=("lib",))),
        ("node_modules must be a folder of that name", ValueError, lambda: NodeWorkers(node_modules=tmp_path)),
        ("sandbox must have", ValueError, lambda: NodeWorkers(node_modules=libraries, sandbox=Sandbox(readable=[]))),
        ("kind must be one of", ValueError, lambda: TypedArray("Int7Array", b"")),
        ("data must be a whole number of items", ValueError, lambda: TypedArray("Int16Array", b"1")),
        ("values must fit", ValueError, lambda: TypedArray.of("Int8Array", [300])),
        ("no safe integer", ValueError, lambda: encode(2**53)),
        ("plain values", ValueError, lambda: encode({1: 2})),
        ("plain values", ValueError, lambda: encode({3})),
        ("__js__ must be an expression", ValueError, lambda: encode({"__js__": 1})),
        ("must not stand in a Map", ValueError, lambda: encode(Set(({"__js__": "1"},)))),
        ("not a plain value", ValueError, lambda: decode('{"q": 1}')),
        ("not a plain value", ValueError, lambda: decode("NaN")),
    ):
        with pytest.raises(kind, match=message):
            call()
    cycle = []
    cycle.append(cycle)
    with NodeWorkers() as workers:
        for message, kind, arguments in (
            ("program must be text", TypeError, (b"", "f", [])),
            ("entry_point must be", ValueError, (SAME, "f()", [])),
            ("entry_point must be", ValueError, (SAME, "", [])),
            ("entry_point must be", TypeError, (SAME, None, [])),
            ("cases must be sequences", TypeError, (SAME, "f", ["ab"])),
            ("not cycles", ValueError, (SAME, "f", [(cycle,)])),
            ("plain values", ValueError, (SAME, "f", [(object(),)])),
        ):
            with pytest.raises(kind, match=message):
                workers.run(*arguments)
        with pytest.raises(ValueError, match="repeats must be"):
            workers.run(SAME, "f", [], repeats=0)


def test_what_is_missing_is_named(monkeypatch):
    def missing(*_, **__):
        raise SandboxMissing("programs cannot be run safely here")

    with monkeypatch.context() as patch:
        patch.setattr(room, "Sandbox", missing)
        patch.setattr(shutil, "which", lambda _: "/usr/bin/node")
        with pytest.raises(SandboxMissing):
            NodeWorkers()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="node is not installed"):
        NodeWorkers()
