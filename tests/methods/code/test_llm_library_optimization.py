"""The protocol: equal things are called equal, drift fools nobody, the wrong are not timed, and what was tried can be tried again."""

import ast
import ctypes
import hashlib
import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from tests.methods.code.llm_library_optimization_here import Machine, Simulated, program, sums
from tests.tools import needs

from assay.measure.clock import binomial_bound
from assay.measure.stats import paired_ratio
from assay.methods.code import llm_library_optimization as room
from assay.methods.code.llm_library_optimization import (
    Bench,
    Candidate,
    Case,
    Compared,
    Endpoint,
    Hint,
    Input,
    Ledger,
    Measurement,
    PatchError,
    PythonHere,
    PythonSandboxed,
    Rules,
    Scripted,
    Tree,
    applied,
    converse,
    in_turns,
    judged,
    pyperf,
    read_script,
    reproduce,
    same,
    table,
)
from assay.methods.code.llm_library_optimization.loci import extrema, library

MODULE = room.source_of("tests.methods.code.llm_library_optimization_here")
FAST = Rules(pairs=6, run_seconds=1e-4)
RNG = np.random.default_rng(0)
PHOTOGRAPHS = {
    name: np.clip(RNG.normal(mean, 60, (41, 57)), 3, 252).astype(np.uint8) for name, mean in (("a", 90), ("b", 160))
}


# ------------------------------------------------------------------------------------------------------------------ timing


def test_a_program_against_itself_is_no_change_and_its_interval_holds_1():
    words, covered = [], 0
    for seed in range(200):
        machine = Machine(noise=0.15, seed=seed)
        _, a, b = in_turns(machine.run(1e-3), machine.run(1e-3))
        found = paired_ratio(a, b)
        words.append(judged(found))
        covered += found.contains(1.0)
    assert words.count("no change") >= 190
    assert 200 - covered <= binomial_bound(200, 0.05, 0.999)


def all_then_all(a, b, pairs=30):
    calls = 2
    return [a(calls) for _ in range(pairs)], [b(calls) for _ in range(pairs)]


@pytest.mark.parametrize("drift", [lambda now: 1 + 4 * now, lambda now: 1.0 if now < 0.07 else 1.4])
def test_a_machine_that_becomes_slower_fools_all_a_then_all_b_and_not_turns(drift):
    naive, ours = [], []
    for seed in range(20):
        machine = Machine(0.02, drift, seed)
        naive.append(judged(paired_ratio(*all_then_all(machine.run(1e-3), machine.run(1e-3)))))
        machine = Machine(0.02, drift, seed)
        ours.append(judged(paired_ratio(*in_turns(machine.run(1e-3), machine.run(1e-3))[1:])))
    assert naive.count("slower") >= 18
    assert ours == ["no change"] * 20


def test_a_real_gain_is_seen_through_drift_and_noise():
    machine = Machine(0.05, lambda now: 1 + 4 * now)
    found = paired_ratio(*in_turns(machine.run(1.3e-3), machine.run(1e-3))[1:])
    assert judged(found) == "faster"
    assert found.contains(1.3)


def test_ratios_compose():
    machine = Machine(0.03)

    def ratio(before, after):
        return paired_ratio(*in_turns(machine.run(before), machine.run(after))[1:])

    first, second, both = ratio(3e-3, 2e-3), ratio(2e-3, 1e-3), ratio(3e-3, 1e-3)
    assert first.low * second.low <= both.high
    assert both.low <= first.high * second.high
    assert both.median == pytest.approx(first.median * second.median, rel=0.05)


def test_exchanging_the_two_inverts_the_ratio_and_the_verdict():
    machine = Machine(0.1)
    _, a, b = in_turns(machine.run(2e-3), machine.run(1e-3))
    one = Compared((Measurement("x", "k", 1, tuple(a), tuple(b)),), "k")
    other = Compared((Measurement("x", "k", 1, tuple(b), tuple(a)),), "k")
    assert (one.found, other.found) == ("faster", "slower")
    assert one.speedup.low == pytest.approx(1 / other.speedup.high, rel=1e-12)
    assert one.speedup.median == pytest.approx(1 / other.speedup.median, rel=1e-12)
    assert one.sign_test == other.sign_test < 1e-6


def test_both_make_as_many_calls_whoever_comes_first():
    calls = {in_turns(Machine().run(a), Machine().run(b), Rules(pairs=6))[0] for a, b in ((1e-4, 3e-5), (3e-5, 1e-4))}
    assert calls == {20}


def test_pairs_go_a_b_b_a():
    order = []
    in_turns(lambda n: order.append("A") or 1.0, lambda n: order.append("B") or 1.0, Rules(pairs=6))
    assert "".join(order)[2:] == "ABBA" * 3


def test_names_change_no_verdict():
    found = {}
    for names in (("old", "new"), ("new", "old")):
        case = sums(program(2.0, name=names[0]))
        attempt = Bench(case, Simulated(Machine(0.05))).attempt(program(1.0, name=names[1]))
        found[names] = attempt.state, attempt.compared.by_kind, attempt.candidate.digest, attempt.case_digest
    assert len({repr(one) for one in found.values()}) == 1


def test_a_speedup_for_each_kind_and_the_named_kind_decides():
    """Twice as fast on long lists and half as fast on short ones: accepted, and who reads is told of the short ones."""
    fast, slow = (1.0,) * 10, (2.0,) * 10
    seen = (Measurement("a", "long", 1, slow, fast), Measurement("b", "short", 1, fast, slow))
    long, short = Compared(seen, "long"), Compared(seen, "short")
    assert (long.found, long.slower_on) == ("faster", ("short",))
    assert short.found == "slower"
    assert {kind: one.median for kind, one in long.by_kind.items()} == pytest.approx({"long": 2.0, "short": 0.5})


def test_a_gain_below_the_least_one_is_not_accepted():
    assert Bench(sums(program(1.04)), Simulated()).attempt(program(1.0)).state == "no change"
    assert Bench(sums(program(1.06)), Simulated()).attempt(program(1.0)).accepted


# -------------------------------------------------------------------------------------------------------------------- gate


def test_who_is_wrong_on_one_kind_is_never_timed():
    backend = Simulated()
    attempt = Bench(sums(), backend).attempt(program(0.001, "sum(x) if x else None", "quick"))
    assert attempt.state == "wrong"
    assert attempt.gate.kind == "empty"
    assert "none" in attempt.gate.why
    assert backend.timed == []
    assert attempt.compared is None


def test_who_is_right_on_what_was_recorded_only_fails_on_random_inputs():
    attempt = Bench(sums(), Simulated()).attempt(program(0.001, "sum(x) if not x or min(x) >= 0 else 0"))
    assert (attempt.state, attempt.gate.kind) == ("wrong", "drawn at random")
    recorded = Bench(sums(random=None), Simulated()).attempt(attempt.candidate)
    assert recorded.state == "faster"


def test_who_does_not_compile_is_an_attempt_too():
    bench = Bench(sums(), Simulated())
    assert bench.attempt(Candidate("broken", "def f(x: # 1 ms")).state == "does not build"
    assert len(bench.attempts) == 1


class Failing(Simulated):
    """Programs with "fails" in them go wrong under the sanitizers, or only once they are timed."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error = at, error

    def build(self, candidate):
        made = super().build(candidate)
        if "fails" in candidate.source:

            def fail(*_):
                raise self.error

            setattr(made, self.at, fail)
        return made


@pytest.mark.parametrize(
    ("at", "error", "state"),
    [
        ("seconds", room.RunError("it ended otherwise: time"), "wrong"),
        ("faults", room.BuildError("main is defined twice"), "does not build"),
    ],
)
def test_who_fails_behind_the_gate_is_an_attempt_too(at, error, state, tmp_path):
    candidate = program(1.0, "sum(x)  # fails")
    ledger = Ledger(tmp_path / "attempts.jsonl")
    bench = Bench(sums(), Failing(at, error))
    found = converse(bench, Scripted([f"```\n{candidate.source}```", answer(1.0)]), rounds=2, ledger=ledger)
    assert [one.state for one in found.attempts] == [state, "faster"]
    assert found.attempts[0].gate.why == str(error)
    assert found.attempts[0].compared is None
    assert ledger.attempts() == found.attempts == bench.attempts


def test_a_reference_that_fails_while_it_is_timed_is_no_candidates_fault():
    bench = Bench(sums(program(2.0, "sum(x)  # fails")), Failing("seconds", room.RunError("time")))
    with pytest.raises(ValueError, match="the reference of 'sums' cannot be timed: time"):
        bench.attempt(program(1.0))
    assert bench.attempts == []


def test_what_a_text_raises_while_it_is_loaded_is_told():
    for text, why in (
        ("def f(x: List[int]): return x", "NameError"),
        ("1 / 0", "ZeroDivisionError"),
        ("def g(x): return x", "f"),
        ("def f(: 1", "SyntaxError"),
    ):
        with pytest.raises(room.BuildError, match=why):
            PythonHere("f").build(Candidate("c", text))


def gate_of(reference, candidate, args, **more):
    case = Case("case", "", Candidate("r", reference), (Input("one", "k", args),), "k", **more)
    return Bench(case, PythonHere("f"), FAST).gate(Candidate("c", candidate))


def test_arguments_must_be_left_as_the_reference_leaves_them():
    copying, in_place = "def f(x): return sorted(x)", "def f(x):\n    x.sort()\n    return x[:]"
    assert "arguments" in gate_of(copying, in_place, ([2, 1],)).why
    assert gate_of(in_place, in_place.replace("x[:]", "list(x)"), ([2, 1],)).passed
    assert not gate_of(in_place, copying, ([2, 1],)).passed


def test_errors_must_be_the_references():
    reference = "def f(x):\n    if not x: raise ValueError('x must not be empty')\n    return x[0]"
    assert gate_of(reference, reference.replace("if not x", "if len(x) == 0"), ([],)).passed
    assert "IndexError" in gate_of(reference, "def f(x): return x[0]", ([],)).why
    assert not gate_of(reference, reference.replace("empty", "blank"), ([],)).passed


def test_floats_within_the_tolerance_or_bit_for_bit():
    one, other = "def f(x): return sum(x)", "import math\ndef f(x): return math.fsum(x)"
    assert not gate_of(one, other, ([0.1] * 10,)).passed
    assert gate_of(one, other, ([0.1] * 10,), tolerance=1e-12).passed


def test_an_answer_that_a_later_call_changes_is_wrong():
    case = Case("case", "", Candidate("r", "def f(n): return [n]"), (Input("a", "k", (1,)), Input("b", "k", (2,))), "k")
    shared = "kept = []\ndef f(n):\n    kept[:] = [n]\n    return kept"
    assert not Bench(case, PythonHere("f"), FAST).gate(Candidate("c", shared)).passed


def test_own_objects_are_called_here_as_they_are():
    """A user's objects, those that cannot be pickled too: an open file, a function."""
    case = Case(
        "case", "", Candidate("r", "def f(n, g): return g(n)"), (Input("a", "k", (3,)),), "k",
        prepare=lambda args: (*args, lambda n: n + len(FAST.__dict__)),
    )  # fmt: skip
    attempt = Bench(case, PythonHere("f"), FAST).attempt(Candidate("c", "def f(n, g):\n    return g(n)"))
    assert attempt.gate.passed
    assert attempt.compared.measurements[0].calls >= 1


@pytest.mark.parametrize(
    ("one", "other", "tolerance", "equal"),
    [
        (float("nan"), float("nan"), None, True),
        (1, 1.0, None, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None, False),
        ((1, 2), [1, 2], None, False),
        ([1.0, [2.0]], [1.0, [2.0 + 1e-12]], 1e-9, True),
        ([1.0], [1.1], 1e-9, False),
        (np.arange(3), np.arange(3), None, True),
        (np.arange(3), np.arange(3.0), None, False),
        (np.array([0.1 + 0.2, np.nan]), np.array([0.3, np.nan]), 1e-9, True),
        (np.array([0.1 + 0.2]), np.array([0.3]), None, False),
        (np.array([np.inf]), np.array([1.0]), 1e-9, False),
        (complex("nan"), complex("nan"), None, True),
        (0j, -0j, None, False),
        (1 + 1j, 1 + (1 + 1e-12) * 1j, 1e-9, True),
        (np.array(["".join(["a", "bc"])], dtype=object), np.array(["".join(["ab", "c"])], dtype=object), None, True),
        (np.array([1], dtype=object), np.array([True], dtype=object), None, False),
    ],
)
def test_same(one, other, tolerance, equal):
    assert same(one, other, tolerance) is equal


# ----------------------------------------------------------------------------------------------------------- what is kept


def test_a_stored_attempt_gives_its_verdict_again(tmp_path):
    ledger = Ledger(tmp_path / "attempts.jsonl")
    bench = Bench(sums(), Simulated(Machine(0.05)))
    for candidate in (
        program(1.0),
        program(4.0),
        program(2.0, "sum(list(x))"),
        program(0.1, "0"),
        Candidate("no", "("),
    ):
        ledger.add(bench.attempt(candidate))
    stored = Ledger(ledger.path).attempts()
    assert stored == bench.attempts
    assert [one.state for one in stored] == ["faster", "slower", "no change", "wrong", "does not build"]
    for one in stored:
        again = reproduce(one, Bench(sums(), Simulated(Machine(0.05, seed=7))))
        assert again.same
        assert again.moved == ()


def test_another_machine_another_reference_and_another_text_are_seen(tmp_path):
    attempt = Bench(sums(), Simulated()).attempt(program(1.0))
    moved = reproduce(attempt, Bench(sums(), Simulated(facts={"flags": "-O0"}))).moved
    assert moved == ("flags",)
    for case in (sums(program(2.0, "sum(x) + 0")), replace(sums(), inputs=sums().inputs[:2]), replace(sums(), draws=3)):
        with pytest.raises(ValueError, match="the case must be the one that was recorded"):
            reproduce(attempt, Bench(case, Simulated()))
    path = tmp_path / "attempts.jsonl"
    Ledger(path).add(attempt)
    path.write_text(path.read_text().replace("return sum(x)", "return sum( x)"))
    with pytest.raises(ValueError, match="its digest differs"):
        Ledger(path).attempts()
    path.write_text('{"case": 1}\n')
    with pytest.raises(ValueError, match="no attempt"):
        Ledger(path).attempts()


def test_a_figure_knows_what_it_was_taken_with():
    attempt = Bench(sums(), Simulated()).attempt(program(1.0))
    assert attempt.candidate.digest == room.case.digest(attempt.candidate.source)
    assert attempt.case_digest == sums().digest
    assert {"system", "processor", "language"} <= set(attempt.environment)
    assert attempt.changed.startswith("--- 2.0 ms\n+++ 1.0 ms\n")
    assert {used.how.split(":")[0] for used in attempt.energy.values()} <= {"proxy", "counters"}
    assert attempt.energy["reference"].joules == pytest.approx(2 * attempt.energy["candidate"].joules, rel=0.5)


def test_pyperf_and_the_table():
    bench = Bench(sums(), Simulated())
    bench.attempt(program(1.0, name="half"))
    bench.attempt(program(1.0, "1", name="one"))
    found = json.loads(json.dumps(pyperf(bench.attempts)))
    assert found["version"] == "1.0"
    assert len(found["benchmarks"]) == 6  # two programs on three inputs; the wrong one has no times
    values = {one["metadata"]["name"]: one["runs"][0]["values"] for one in found["benchmarks"]}
    assert values["sums: long: half"] == [1e-3] * 30
    assert table(bench.attempts).splitlines()[0].startswith("1. half: faster. long 2x [2, 2], ")
    assert "wrong" in table(bench.attempts).splitlines()[1]


def test_candidates_form_a_tree():
    root = Candidate("root", "a = 1")
    child = Candidate("child", "a = 2", parent=root.digest)
    leaf = Candidate("leaf", "a = 3", parent=child.digest, prompt="make it three")
    tree = Tree((root, child, leaf))
    assert [one.name for one in tree.line(leaf)] == ["root", "child", "leaf"]
    assert tree.children(root) == [child]
    with pytest.raises(ValueError, match="circle"):
        Tree((replace(root, parent=leaf.digest), child, leaf))
    with pytest.raises(ValueError, match="parent of 'child'"):
        Tree((child,))
    with pytest.raises(ValueError, match="parent must be the digest"):
        Bench(sums(), Simulated()).attempt(program(1.0, parent="0" * 16))


# ------------------------------------------------------------------------------------------------------------ conversation


def answer(cost, body="sum(x)"):
    return f"Here it is.\n```python\n{program(cost, body).source}```\nGood luck."


def test_a_conversation_is_kept_whole(tmp_path):
    script = tmp_path / "script.jsonl"
    rows = [
        {"answer": answer(1.0)}, {"decision": "hint", "says": "Think of short lists.", "reason": "it is a start"},
        {"answer": answer(0.1, "0")}, {"decision": "reject", "says": "It must be right.", "reason": "wrong"},
        {"answer": "I cannot."}, {"decision": "hint"},
        {"answer": answer(0.5, "sum(y for y in x)")}, {"decision": "accept", "reason": "four times"},
        {"answer": answer(0.2)},
    ]  # fmt: skip
    script.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, hints = read_script(script)
    ledger = Ledger(tmp_path / "attempts.jsonl")
    found = converse(Bench(sums(), Simulated()), model, rounds=9, hints=hints, ledger=ledger)
    assert [one.state for one in found.attempts] == ["faster", "wrong", "faster"]
    assert ledger.attempts() == found.attempts
    first, wrong, last = (one.candidate for one in found.attempts)
    assert (wrong.parent, last.parent) == (first.digest, first.digest)
    assert found.best.candidate == last
    asked = [one.content for one in found.messages if one.role == "user"]
    assert "Contract: f(x) is the sum" in asked[0]
    assert "1. round 1: faster. long 2x" in asked[1]
    assert "Think of short lists." in asked[1]
    assert asked[3].startswith("There was no block of code")
    assert last.prompt == asked[3]
    text = found.transcript()
    assert text.count("The expert's decision") == 4
    assert text.index("Think of short") < text.index("decision: reject. wrong") < text.index("decision: accept")


@pytest.mark.parametrize(
    ("said", "program"),
    [
        ("```python\na = 1\n```\nthen\n```\na = 2\n```", "a = 2\n"),
        ("Here:\r\n```python\r\na = 1\r\n```\r\n", "a = 1\r\n"),
        ('```python title="x.py"\na = 1\n```\nGood luck.\n', "a = 1\n"),
        ('```c\nchar *a = "```";\n```', 'char *a = "```";\n'),
        ("  ```\na = 1\n  ```", "a = 1\n"),
        ("I cannot.", ""),
        ("```python\na = 1", ""),
    ],
)
def test_the_program_of_an_answer_is_its_last_block(said, program):
    assert room.program_of(said) == program


def test_what_an_expert_says_is_kept_to_the_letter_and_a_key_is_not_shown():
    hints = [Hint("hint", "On.", "see f. *args is slow. *"), Hint("accept")]
    text = converse(Bench(sums(), Simulated()), Scripted([answer(1.0)] * 2), rounds=2, hints=hints).transcript()
    assert "*The expert's decision: hint. see f. *args is slow. **" in text
    assert "*The expert's decision: accept.*" in text
    assert "secret" not in repr(Endpoint("http://localhost/v1", "tiny", key="secret"))


def test_without_the_table_only_the_word_is_told():
    found = converse(
        Bench(sums(), Simulated()), Scripted([answer(1.0), ""]), rounds=2, hints=[Hint("hint", "On.")], feed_back=False
    )
    assert found.messages[2].content.startswith("It was faster.\n\nOn.")


def test_a_models_programs_run_in_the_sandbox_only():
    bench = Bench(sums(Candidate("r", "def f(x): return sum(x)")), PythonHere("f"), FAST)
    with pytest.raises(ValueError, match="sandbox"):
        converse(bench, Scripted([]))
    with pytest.raises(ValueError, match="sandbox"):
        bench.attempt(Candidate("c", "def f(x): return 1", origin="model"))


def test_an_endpoint_is_asked_as_openai_is():
    seen = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            good = len(seen) == 1
            said = {"choices": [{"message": {"role": "assistant", "content": answer(1.0)}}]} if good else {"no": 1}
            data = json.dumps(said).encode()
            self.send_response(500 if len(seen) == 3 else 200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        model = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "tiny", key="secret")
        found = converse(Bench(sums(), Simulated()), model, rounds=1)
        assert found.attempts[0].state == "faster"
        path, key, body = seen[0]
        assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "tiny")
        assert body["messages"] == [{"role": "user", "content": found.messages[0].content}]
        with pytest.raises(ValueError, match="without a message"):
            model([])
        with pytest.raises(OSError, match="answers 500"):
            model([])
    finally:
        server.shutdown()
        server.server_close()


def test_a_models_program_goes_through_the_sandbox():
    needs("bwrap")
    case = sums(Candidate("r", "def f(x):\n    return sum(sorted(x))"), random=None)
    reply = "```python\nimport os\ndef f(x):\n    return sum(x) if os.environ['HOME'] == '/scratch' else -1\n```"
    quits = "```python\ndef f(x):\n    raise SystemExit\n```"
    in_place = "```python\ndef f(x):\n    x.sort()\n    return sum(x)\n```"
    case = replace(case, inputs=(*case.inputs, Input("falling", "falling", ([2, 1],))))
    raises = "def f(x):\n    if x: return sum(x)\n    raise ValueError('none')"
    nothing = [Candidate("r", f"import os\ndef f(x):\n    {body}") for body in ("os._exit(0)", "return object()")]
    with PythonSandboxed("f") as backend:
        found = converse(Bench(case, backend, FAST), Scripted([reply, quits, in_place]), rounds=3)
        for one in nothing:  # nothing could be told from it
            with pytest.raises(ValueError, match="the reference of 'sums' must answer on short"):
                Bench(replace(case, reference=one), backend, FAST).attempt(one)
        errors = Bench(replace(case, reference=Candidate("r", raises)), backend, FAST)
        assert errors.gate(Candidate("c", raises + "  # too")).passed
        assert "ValueError: no, not ValueError: none" in errors.gate(Candidate("c", raises.replace("none", "no"))).why
    right, wrong, leaves = found.attempts
    assert right.gate.passed
    assert right.compared is not None
    assert wrong.state == "wrong"
    assert (leaves.state, leaves.gate.why) == (
        "wrong",
        "on falling: it leaves its arguments otherwise than the reference does",
    )


# ---------------------------------------------------------------------------------------------------------------- extrema


@pytest.fixture(scope="module")
def in_c():
    needs("gcc")
    return extrema.in_c(PHOTOGRAPHS, height=37, width=53, draws=60)


def bound(source):
    """A candidate's calls, without the sanitizers."""
    return extrema.backend().build(Candidate("c", source))


def test_every_candidate_in_c_is_equal_and_the_sampled_one_is_not(in_c):
    bench = Bench(in_c, extrema.backend())
    images = [in_c.arguments(one) for one in bench.inputs]
    truth = [(int(image.min()), int(image.max())) for (image,) in images]
    for candidate in (in_c.reference, *extrema.CANDIDATES.values(), extrema.BEYOND):
        assert [one.value for one in bound(candidate.source).answers(images)] == truth, candidate.name
    assert [one.value for one in bound(extrema.SAMPLED.source).answers(images)] != truth


def test_sanitizers_see_who_reads_beyond_a_row(in_c):
    needs("bwrap")
    bench = Bench(in_c, extrema.backend())
    assert bench.gate(extrema.CANDIDATES["branch_free"]).passed
    found = bench.gate(extrema.BEYOND)
    assert not found.passed
    assert "heap-buffer-overflow" in found.why


def test_every_call_that_is_timed_is_made(in_c):
    counting = extrema.REFERENCE.source.replace("#include <stdint.h>", "#include <stdint.h>\nlong made;", 1)
    counting = counting.replace("uint8_t smallest", "made++;\n    uint8_t smallest")
    path = room.shared_library(counting, ("-O3",))
    library_here = ctypes.CDLL(str(path))
    binding = extrema.bind(library_here)
    assert binding.repeat(in_c.arguments(in_c.inputs[0]), 50) > 0
    assert ctypes.c_long.in_dll(library_here, "made").value == 50


def test_what_is_no_c_or_defines_nothing_does_not_build():
    needs("gcc")
    with pytest.raises(room.BuildError, match="error"):
        bound("int extrema(")
    with pytest.raises(room.BuildError, match="extrema"):
        bound("int other;")


@pytest.mark.slow
def test_c_of_anybody_runs_in_the_sandbox(in_c):
    needs("bwrap")
    case = replace(in_c, inputs=in_c.inputs[:2], draws=5)
    bench = Bench(case, room.CSandboxed(extrema.INTERFACE), FAST)
    source = extrema.CANDIDATES["branch_free"].source
    attempt = bench.attempt(Candidate("a model's", source, "model"))
    assert attempt.gate.passed
    assert attempt.compared is not None
    assert bench.attempt(replace(extrema.SAMPLED, origin="model")).state == "wrong"


@pytest.mark.parametrize("of", ["with_numpy", "in_python"])
def test_every_candidate_in_python_is_equal(of):
    make = {
        "with_numpy": lambda: extrema.with_numpy(PHOTOGRAPHS, height=37, width=53, draws=60),
        "in_python": lambda: extrema.in_python(PHOTOGRAPHS, every=1, draws=60),
    }[of]
    bench = Bench(make(), extrema.python_backend(), FAST)
    for candidate in {"with_numpy": extrema.NUMPY_CANDIDATES, "in_python": extrema.PYTHON_CANDIDATES}[of]:
        assert bench.gate(candidate).passed, bench.gate(candidate).why


def test_the_texts_are_those_that_the_module_knows():
    """Records hold the hash of the module: with a text changed and the digest with it, they are stale."""
    folder = Path(room.loci.__file__).parent
    texts = sorted(file for file in folder.rglob("*") if file.suffix in (".c", ".diff"))
    found = hashlib.sha256(b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in texts)).hexdigest()
    assert found[:16] == room.loci.DIGEST


# ------------------------------------------------------------------------------------------------------ Python's library


def case_or_skip(make):
    if sys.version_info >= (3, 13):
        pytest.skip("the texts of 3.13 do something else: the gate would say so")
    try:
        return make()
    except PatchError as error:
        pytest.skip(f"another Python: {error}")


def test_the_changed_library_does_the_same_and_the_installed_one_is_untouched():
    before = ast.dump, Path(ast.__file__).read_bytes()
    case, candidate = case_or_skip(lambda: library.trees({"a module": MODULE}, draws=80))
    assert Bench(case, library.trees_backend(), FAST).gate(candidate).passed
    assert (ast.dump, Path(ast.__file__).read_bytes()) == before
    value = {"a": [1, 2.5, {"b": None}], "": []}
    case, candidate = case_or_skip(lambda: library.documents({"one": value}, draws=250))
    bench = Bench(case, library.documents_backend(), FAST)
    assert bench.gate(candidate).passed
    errors = {one.error.split(":")[0] for one in bench.wanted if one.error}
    assert {"TypeError", "ValueError"} <= errors


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("'[]'", "'[ ]'"),
        ("value is None and optional", "value is None"),
        ("'null'", "'Null'"),
        ("if sort_keys", "if 0"),
    ],
)
def test_a_slip_in_the_change_is_seen(before, after):
    trees = case_or_skip(lambda: library.trees({"a module": MODULE}, draws=0))
    documents = case_or_skip(lambda: library.documents({"one": {"a": None, "b": []}}, draws=200))
    seen = False
    for (case, candidate), backend in ((trees, library.trees_backend()), (documents, library.documents_backend())):
        slipped = _in_added(case.reference.source, candidate.source, before, after)
        if slipped != candidate.source:
            seen = True
            assert not Bench(case, backend, FAST).gate(Candidate("slip", slipped)).passed
    assert seen


def _in_added(old, new, before, after):
    """Replace in the lines that were added only."""
    kept = set(old.splitlines())
    return "\n".join(line if line in kept else line.replace(before, after) for line in new.splitlines()) + "\n"


def test_a_diff_fits_or_is_refused():
    text = "a\nb\nc\nb\n"
    assert applied(text, "--- x\n+++ x\n@@ -1,2 +1,3 @@\n a\n+new\n b\n") == "a\nnew\nb\nc\nb\n"
    assert applied("top\n" + text, "@@ -3,1 +3,1 @@\n-c\n+C\n") == "top\na\nb\nC\nb\n"
    for diff, why in (
        ("@@ -1,1 +1,1 @@\n-z\n+y\n", "nowhere"), ("@@ -9,1 +9,1 @@\n-b\n+y\n", "several"), ("@@ -1,0 +1,1 @@\n+y\n", "only adds"),
        ("nothing", "a hunk"), ("@@ -1,2 +1,2 @@\n a\n", "as many lines"), ("@@ -1,1 +1,1 @@\n*a\n", "begin with"),
    ):  # fmt: skip
        with pytest.raises(PatchError, match=why):
            applied(text, diff)
    with pytest.raises(PatchError, match="no text in Python"):
        room.source_of("sys")


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: Rules(pairs=5), ValueError, "pairs"),
        (lambda: Rules(least_gain=0.9), ValueError, "least_gain"),
        (lambda: Rules(run_seconds="1"), TypeError, "run_seconds"),
        (lambda: Candidate("x", " "), ValueError, "source"),
        (lambda: Candidate("x", "a", origin="cat"), ValueError, "origin"),
        (lambda: replace(sums(), inputs=()), ValueError, "inputs"),
        (lambda: replace(sums(), inputs=sums().inputs * 2), ValueError, "different names"),
        (lambda: replace(sums(), decides="tall"), ValueError, "decides"),
        (lambda: replace(sums(), tolerance=0.0), ValueError, "tolerance"),
        (lambda: room.digest_of({1, 2}), TypeError, "plain values"),
        (lambda: room.digest_of(np.array([{}], dtype=object)), TypeError, "plain values"),
        (lambda: Endpoint("localhost", "m"), ValueError, "url"),
        (lambda: Hint("maybe"), ValueError, "decision"),
        (lambda: converse(Bench(sums(), Simulated()), Scripted([]), rounds=0), ValueError, "rounds"),
    ],
)
def test_bad_input_is_named(make, error, why):
    with pytest.raises(error, match=why):
        make()
