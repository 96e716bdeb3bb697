"""The loop of research: what is turned away, what is run, what is repaired, and what the journal remembers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.core.sandbox import Limits, Sandbox, protections
from assay.methods.reasoning.dolphin import (
    Attempt,
    Bank,
    Baseline,
    Document,
    Failure,
    Frame,
    Idea,
    ModelProposer,
    ModelRepair,
    Outcome,
    Request,
    RuleRepair,
    Study,
    classify,
    confirmed,
    in_sandbox,
    is_library,
    known_from,
    local_structure,
    measured_baseline,
    own_frames,
    parse,
    practise,
    ranked,
    research,
    similarity_scorer,
)
from assay.methods.reasoning.dolphin.repair import candidates
from assay.methods.reasoning.dolphin.tracebacks import told

WORDS = ("wide", "deep", "dropout", "noise", "adam", "cosine", "shift", "pca", "smooth", "prune")


def embed(texts):
    """Counts of a few words, and a trace of all letters: equal for equal texts only."""
    rows = []
    for text in texts:
        letters = [1e-3 * (1 + text.lower().count(c)) for c in "abcdefghijklmnopqrstuvwxyz"]
        rows.append([float(text.lower().count(word)) for word in WORDS] + letters)
    return np.array(rows)


# ------------------------------------------------------------------------------------------------------------------- the bank


def test_no_two_entries_are_more_similar_than_the_threshold():
    rng = np.random.default_rng(0)
    bank = Bank(embed, threshold=0.8)
    for _ in range(200):
        words = rng.choice(WORDS, size=rng.integers(1, 4), replace=False)
        idea = Idea(" ".join(words), summary=" ".join(rng.choice(WORDS, size=2)))
        before = len(bank)
        assert bank.add(idea).new == (len(bank) == before + 1)
        again = bank.add(idea)  # taken up or turned away: it is never taken up a second time
        assert not again.new
    vectors = embed([one.text for one in bank.ideas])
    near = (vectors @ vectors.T) / np.outer(*2 * [np.linalg.norm(vectors, axis=1)])
    np.fill_diagonal(near, -1)
    assert near.max() <= 0.8 + 1e-12
    assert 5 < len(bank) < 100


def test_a_copy_is_found_at_any_threshold_and_titles_alone_do_not_decide():
    bank = Bank(embed, threshold=1.0)
    assert bank.add(Idea("wide")).new
    seen = bank.look(Idea("wide"))
    assert (seen.new, seen.nearest, seen.similarity) == (False, 0, 1.0)
    assert bank.look(Idea("wide", summary="dropout noise adam")).new  # the same title, another idea


@pytest.mark.parametrize(
    ("vectors", "message"), [([[np.nan, 1.0]], "finite"), ([[0.0, 0.0]], "length"), ([1.0, 2.0], "row")]
)
def test_vectors_that_are_none_are_named(vectors, message):
    with pytest.raises(ValueError, match=message):
        Bank(lambda texts: np.array(vectors)).look(Idea("x"))
    with pytest.raises(ValueError, match="title"):
        Idea("  ")
    with pytest.raises(TypeError, match="plan"):
        Idea("x", plan=3)
    with pytest.raises(ValueError, match="threshold"):
        Bank(embed, threshold=1.5)


# -------------------------------------------------------------------------------------------------------------- the literature


def test_documents_are_kept_by_both_scores():
    documents = [Document(str(i)) for i in range(4)]
    kept = ranked(documents, lambda d: [8.0, 10.0, 7.9, 9.0], lambda d: [8.0, 9.0, 10.0, 10.0])
    assert [one.title for one in kept] == ["1", "3", "0"]  # equal sums in the order given; 7.9 is dropped
    assert [one.title for one in ranked(documents, lambda d: [10] * 4, lambda d: [10] * 4, most=2)] == ["0", "1"]
    assert ranked([], lambda d: [], lambda d: []) == []
    with pytest.raises(ValueError, match="relevance must be"):
        ranked(documents, lambda d: [0.0] * 4, lambda d: [10.0] * 4)
    with pytest.raises(ValueError, match="as many scores"):
        ranked(documents, lambda d: [10.0], lambda d: [10.0] * 4)


def test_scores_by_similarity_run_from_one_to_ten_and_known_ideas_are_found():
    documents = [Document("wide wide"), Document("wide deep"), Document("pca")]
    scores = similarity_scorer(embed, "wide")(documents)
    assert scores[0] == 10
    assert scores[2] == 1
    assert 1 < scores[1] < 10
    assert similarity_scorer(embed, "wide")([Document("pca")] * 2) == [10, 10]
    chance = np.random.default_rng(0)
    for _ in range(200):  # rounding leads to no score above ten
        found = similarity_scorer(lambda texts: chance.normal(size=(len(texts), 8)), "x")([Document("y")] * 20)
        assert (min(found), max(found)) == (1, 10)
    found = known_from(Idea("wide"), documents, embed, threshold=0.9)
    assert found == documents[0]
    assert known_from(Idea("prune"), documents, embed, threshold=0.9) is None
    assert known_from(Idea("wide"), [], embed, threshold=0.9) is None


# -------------------------------------------------------------------------------------------------------------- tracebacks

CHAINED = """
import json
def read(text):
    try:
        return json.loads(text)
    except ValueError:
        raise KeyError("no text")
def whole(texts):
    return [read(t) for t in texts]
def main():
    try:
        whole(["{"])
    except KeyError:
        1 / 0
main()
"""


def run_here(source):
    return subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, text=True, check=False).stderr


def test_a_real_traceback_with_causes_is_read_in_order(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(CHAINED)
    text = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=False).stderr
    failures = parse(text)
    assert [one.kind for one in failures] == ["json.decoder.JSONDecodeError", "KeyError", "ZeroDivisionError"]
    assert [frame.function for frame in failures[1].frames] == ["main", "whole", "<listcomp>", "read"]
    assert failures[2].frames[-1].line == 14
    assert failures[2].frames[-1].code == "1 / 0"


def test_library_frames_never_reach_the_structure_and_own_ones_keep_their_order(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("import json\ndef f(t):\n    return json.loads(t)\ndef g():\n    return f('{')\ng()\n")
    text = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=False).stderr
    failures = parse(text)
    assert any(is_library(frame.file) for one in failures for frame in one.frames)
    own = own_frames(failures)
    assert [(f.line, f.function) for one in own for f in one.frames] == [(6, "<module>"), (5, "g"), (3, "f")]
    assert own[-1].kind == "json.decoder.JSONDecodeError"
    parts = local_structure(script.read_text(), own)
    assert [part.name for part in parts] == ["f", "g", "<module>"]
    assert parts[0].called_at == (("g", 5),)
    for file in ("/x/site-packages/torch/nn.py", "<frozen runpy>", json.__file__):
        assert is_library(file)
    assert not is_library("/scratch/run.py")


def test_methods_constructors_and_signatures_stand_in_the_structure():
    source = (
        "class Net:\n    def __init__(self, width):\n        self.width = width\n    def run(self, x, *, scale=2):\n"
        "        return scale * x + self.width\ndef main():\n    return Net(3).run('a')\nmain()\n"
    )
    failure = Failure("TypeError", "", (Frame("s", 8, "<module>"), Frame("s", 7, "main"), Frame("s", 5, "run")))
    parts = {part.name: part for part in local_structure(source, [failure])}
    assert parts["Net.run"].signature == "run(self, x, *, scale=2)"
    assert parts["Net.run"].called_at == (("main", 7),)
    assert parts["Net.__init__"].called_at == (("main", 7),)  # around, for main calls it
    assert local_structure("def broken(:\n", [failure]) == []


GROUP = """
def f():
    raise ValueError("two\\n  lines")
def main():
    found = []
    try:
        f()
    except ValueError as error:
        found.append(error)
    raise ExceptionGroup("many", [*found, ExceptionGroup("in", found)])
main()
"""


def test_exception_groups_and_messages_of_several_lines_are_read(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(GROUP)
    text = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=False).stderr
    failures = own_frames(parse(text), GROUP)
    assert [one.kind for one in failures] == ["ExceptionGroup", "ValueError", "ValueError"]
    assert [[f.line for f in one.frames] for one in failures] == [[11, 10], [7, 3], [7, 3]]
    assert failures[0].message == "many (2 sub-exceptions)"
    assert failures[1].message == "two\n  lines"


def test_recursion_local_classes_and_other_lines_are_read():
    (failure,) = parse(run_here("def f():\n    f()\nf()\n"))
    assert failure.kind == "RecursionError"
    assert len(told([failure], []).splitlines()) < 5
    many = Failure("RecursionError", "", 500 * (Frame("a", 1, "f"), Frame("a", 2, "g")))
    assert len(told([many], []).splitlines()) == 3
    (failure,) = parse(run_here("def f():\n    class Own(Exception): pass\n    raise Own('é')\nf()\n"))
    assert (failure.kind, failure.message) == ("f.<locals>.Own", "é")
    assert parse(TRACE.replace("\n", "\r\n")) == parse(TRACE)
    assert parse(TRACE + "\nended by its limit") == parse(TRACE)


def test_frames_of_other_files_are_left_out():
    source = "import helper\nhelper.run()\n"
    frames = (
        Frame("/scratch/run.py", 2, "<module>", "helper.run()"), Frame("/scratch/helper.py", 1, "run", "x = 1 / 0"),
        Frame("/scratch/helper.py", 90, "deep"), Frame("<string>", 1, "<module>"),
    )  # fmt: skip
    failure = Failure("ZeroDivisionError", "", frames)
    (own,) = own_frames([failure], source)
    assert own.frames == frames[:1]
    assert [part.name for part in local_structure(source, [failure])] == ["<module>"]  # line 90 is nowhere
    assert not is_library("/home/u/my-site-packages-tools/run.py")


def test_functions_of_one_name_stand_side_by_side():
    source = (
        "class A:\n    @property\n    def x(self):\n        return g()\n    @x.setter\n    def x(self, v):\n"
        "        pass\nasync def g():\n    class B:\n        def h(self):\n            return 1\n    return B().h()\n"
    )
    failure = Failure("E", "", (Frame("s", 4, "x"), Frame("s", 7, "x"), Frame("s", 11, "h")))
    names = [part.name for part in local_structure(source, [failure])]
    assert names == ["g.B.h", "A.x, line 6", "A.x", "g"]


def test_text_that_is_no_traceback_and_syntax_errors():
    assert parse("") == []
    assert parse("KeyError: not behind a traceback\nwarning: x") == []
    (failure,) = parse(run_here("x = (\n"))
    assert (failure.kind, failure.frames[0].line) == ("SyntaxError", 1)


# ---------------------------------------------------------------------------------------------------------------- practice


def scripted(table):
    """A runner that looks sources up: a metric, or a message to fail with. It counts what is run."""
    ran = []

    def run(source, seed):
        ran.append(source)
        found = table[source]
        return Outcome(found) if not isinstance(found, str) else Outcome(None, found)

    return run, ran


TRACE = "Traceback (most recent call last):\n  File \"run.py\", line 1, in <module>\n    x\nNameError: name 'x' is not defined"


def test_a_script_that_succeeds_asks_for_no_repair():
    run, ran = scripted({"good": 0.5})
    practice = practise("good", run, lambda request: pytest.fail("asked"))
    assert practice.last.ok
    assert practice.repairs == 0
    assert ran == ["good"]


def test_a_script_that_raises_is_retried_five_times_at_most():
    table = {f"bad{n}": TRACE for n in range(9)}
    run, ran = scripted(table)
    practice = practise("bad0", run, lambda request: f"bad{len(request.attempts)}")
    assert len(ran) == 6
    assert practice.repairs == 5
    assert not practice.last.ok
    run, ran = scripted({"bad0": TRACE, "bad1": TRACE, "good": 0.7})
    practice = practise("bad0", run, lambda request: ["bad1", "good"][len(request.attempts) - 1])
    assert (practice.last.metric, practice.repairs) == (0.7, 2)


def test_a_repair_that_changes_nothing_is_a_round_lost_and_costs_no_run():
    run, ran = scripted({"bad": TRACE})
    asked = []
    practise("bad", run, lambda request: asked.append(request) or "bad")
    assert (len(asked), len(ran)) == (5, 1)
    practise("bad", run, lambda request: None)
    assert len(ran) == 2
    with pytest.raises(ValueError, match="rounds"):
        practise("bad", run, rounds=-1)


def test_a_metric_that_is_no_number_is_named_and_each_round_has_its_number():
    for metric in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="metric"):
            Outcome(metric)
    assert type(Outcome(np.float32(0.5)).metric) is float
    run, _ = scripted({"bad": TRACE})
    asked = []
    practise("bad", run, lambda request: asked.append(request.round) or "bad")
    assert asked == [1, 2, 3, 4, 5]


def test_without_the_structure_the_repairer_sees_the_frames_alone():
    source = "def f():\n    return x\nf()\n"
    trace = run_here(source).replace('"<string>"', '"run.py"')
    run, _ = scripted({source: trace})
    seen = []
    for structure in (True, False):
        practise(source, run, lambda request: seen.append(request), structure=structure)
    assert [part.name for part in seen[0].parts] == ["f", "<module>"]
    assert "called by <module>, line 3" in seen[0].text
    assert seen[1].parts == []
    assert "called by" not in seen[1].text
    assert seen[0].last.failures == seen[1].last.failures


@pytest.mark.skipif(not protections().full, reason="bubblewrap is not installed")
def test_scripts_run_in_the_sandbox_and_print_their_metric_last():
    run = in_sandbox(Sandbox(Limits(wall_seconds=60, cpu_seconds=30)), files={"data.txt": "41"})
    good = "import json, sys\nprint('hello')\nprint(json.dumps({'metric': int(open('data.txt').read()) + int(sys.argv[2])}))\n"
    assert run(good, 3).metric == 44
    failed = run("import json\njson.loads('{')\n", 0)
    assert not failed.ok
    assert parse(failed.error)[-1].frames[0].line == 2
    for text in ("print('no json')", "print('{\"other\": 1}')", "print('{\"metric\": NaN}')", "", "print('[1]')"):
        outcome = run(text, 0)
        assert not outcome.ok, text
        assert "last line of stdout" in outcome.error
    assert "SyntaxError" in run("x = '\ud800'\n", 0).error
    network = "import socket\nsocket.create_connection(('10.0.0.1', 80), timeout=2)\n"
    assert "OSError" in run(network, 0).error or "Network" in run(network, 0).error


@pytest.mark.skipif(not protections().full, reason="bubblewrap is not installed")
def test_a_limit_that_ends_a_script_stands_in_its_error():
    run = in_sandbox(Sandbox(Limits(wall_seconds=60, cpu_seconds=0.3)))
    assert "limit of cpu time" in run("while True: pass\n", 0).error


# ------------------------------------------------------------------------------------------------------------------ repair

FAULTS = {
    "an import": ("print(math.pi)\n", "import math\nprint(math.pi)\n"),
    "an alias": ("x = np.zeros(3)\n", "import numpy as np\nx = np.zeros(3)\n"),
    "a name": ("def f(width):\n    return widht + 1\nf(1)\n", "def f(width):\n    return width + 1\nf(1)\n"),
    "an attribute": ("import numpy as np\nnp.zeroes(3)\n", "import numpy as np\nnp.zeros(3)\n"),
    "a key": ("d = {'rate': 1}\nd['rat']\n", "d = {'rate': 1}\nd['rate']\n"),
    "too many": ("def f(a):\n    return a\nf(1, 2)\n", "def f(a):\n    return a\nf(1)\n"),
    "a missing one": ("def f(a, rate):\n    return a\nrate = 2\nf(1)\n", "def f(a, rate):\n    return a\nrate = 2\nf(1, rate)\n"),
    "a keyword": ("def f(rate=1):\n    return rate\nf(rats=2)\n", "def f(rate=1):\n    return rate\nf(rate=2)\n"),
    "a text": ("n = 3 + '4'\n", "n = 3 + 4\n"),
    "a matrix": (
        "import numpy as np\na = np.zeros((2, 3))\nb = a @ a\n",
        "import numpy as np\na = np.zeros((2, 3))\nb = a @ a.T\n",
    ),
}  # fmt: skip


def repaired(source, structure=True, rounds=5):
    """By the rules, run in plain subprocesses."""

    def run(text, seed):
        error = run_here(text).replace('"<string>"', '"run.py"')
        return Outcome(None, error) if error else Outcome(1.0)

    return practise(source, run, RuleRepair(), rounds=rounds, structure=structure)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rules_mend_what_they_know(fault):
    broken, mended = FAULTS[fault]
    practice = repaired(broken)
    assert practice.last.ok
    assert practice.source == mended


def test_the_code_around_a_failure_mends_what_its_line_cannot():
    """The fault lies where the value was made, two lines above the one that raises; the call that led there is in the
    traceback already."""
    made = "def f():\n    n = '4'\n    m = 3\n    return m + n\nf()\n"
    assert repaired(made).source == made.replace("'4'", "4")
    assert not repaired(made, structure=False).last.ok
    called = "import numpy as np\ndef f(a, b):\n    return a @ b\nf(np.zeros((3, 4)), np.zeros(2 * [2])) if 0 else f(np.zeros(3), 2)\n"
    assert not repaired(called, rounds=1).last.ok
    swapped = "def f(n, text):\n    return text[n]\nf('abc', 1)\n"
    assert repaired(swapped).source == swapped.replace("'abc', 1", "1, 'abc'")
    assert repaired(swapped, structure=False).source == swapped.replace("'abc', 1", "1, 'abc'")


def test_lines_are_counted_as_python_counts_them_and_parentheses_are_kept():
    for end in ("\n", "\r\n"):
        broken = f"a = 'x\x0cy\u2028z'  # é{end}def f(width):{end}    return widht + 1{end}f(1){end}"
        frames = (Frame("run.py", 4, "<module>"), Frame("run.py", 3, "f"))
        (first, *_) = candidates(Attempt(broken, (Failure("NameError", "name 'widht'", frames),)), ())
        assert first == broken.replace("widht", "width")
    matrix = "import numpy as np\na = np.zeros((2, 3))\nb = (a + a) @ a\n"
    assert repaired(matrix).source == matrix.replace("@ a\n", "@ a.T\n")
    wrong = "import numpy as np\nz = np.zeros(3)\nz.sum()\ny = (z + z).summ()\n"
    assert repaired(wrong).source == wrong.replace("summ", "sum")


def test_an_import_is_put_above_decorators():
    broken = "@staticmethod\ndef f():\n    return math.pi\nf()\n"
    assert repaired(broken).source == "import math\n" + broken


def test_a_repair_that_ends_without_a_traceback_is_not_built_on():
    broken = "n = '3'\nm = '4'\nk = n - m\n"
    failure = Failure("TypeError", "unsupported", (Frame("run.py", 3, "<module>"),))
    first = RuleRepair()(Request((Attempt(broken, (failure,)),)))
    second = RuleRepair()(Request((Attempt(broken, (failure,)), Attempt(first, ()))))
    assert first != second
    assert None not in (first, second)


def test_sources_that_cannot_be_parsed_are_not_looked_into():
    failure = Failure("ValueError", "", (Frame("run.py", 1, "<module>"),))
    for source in ("x\0", "x = '\ud800'", "-" * 200_000 + "1", "x = ("):
        assert local_structure(source, [failure]) == []
        assert RuleRepair()(Request((Attempt(source, (failure,)),))) is None
    chain = "x = " + "+".join(["1"] * 900) + "\n"
    assert [part.name for part in local_structure(chain, [failure])] == ["<module>"]


def test_a_repair_builds_on_what_went_further_and_forgets_what_did_not():
    both = "def f(width):\n    return widht * math.pi\nf(1)\n"
    practice = repaired(both)
    assert practice.last.ok
    assert practice.source == "import math\ndef f(width):\n    return width * math.pi\nf(1)\n"


def test_the_rules_know_when_they_know_nothing():
    nothing = RuleRepair()
    assert nothing(Request((Attempt("x = 1\n", ()),))) is None
    assert (
        nothing(Request((Attempt("x = (\n", (Failure("SyntaxError", "", (Frame("run.py", 1, "<module>"),)),)),)))
        is None
    )
    assert (
        nothing(Request((Attempt("assert 0\n", (Failure("AssertionError", "", (Frame("run.py", 1, "<module>"),)),)),)))
        is None
    )


# ------------------------------------------------------------------------------------------------------------------ the loop


def test_classes_mirror_around_the_baseline_and_know_the_direction():
    base = Baseline(0.5, 0.02)
    mirror = {"improved": "declined", "declined": "improved", "maintained": "maintained"}
    for gain in (0.0, 0.01, 0.02, 0.021, 0.3):
        up, down = classify(0.5 + gain, base), classify(0.5 - gain, base)
        assert mirror[up] == down
        assert classify(0.5 + gain, base, higher_is_better=False) == down
    assert classify(0.53, base) == "improved"
    assert classify(0.519, base) == "maintained"
    with pytest.raises(ValueError, match="score"):
        classify(float("nan"), base)


def ideas_of(count):
    return [Idea(f"{word} {n}", summary=word) for n, word in enumerate(WORDS[:count])]


def fixed(wins, count, loop):
    return ideas_of(count)


def write(idea, wins):
    return idea.title


SCORES = {idea.title: 0.5 + 0.1 * (n % 3 - 1) for n, idea in enumerate(ideas_of(10))}


def look_up(source, seed):
    return Outcome(SCORES[source] + 0.001 * (seed > 50))


def test_everything_off_is_plain_generate_and_run():
    study = Study(embed, baseline=Baseline(0.5, 0.01), feedback=False, bank=False)
    research(study, fixed, write, look_up, loops=1, ideas=6)
    assert [one.idea for one in study.entries] == ideas_of(6)
    assert [one.score for one in study.entries] == [look_up(idea.title, 0).metric for idea in ideas_of(6)]
    assert study.wins == []
    assert study.runs == 6


def test_what_was_tried_costs_no_second_run_and_wins_reach_the_next_round():
    seen = []

    def propose(wins, count, loop):
        seen.append([one.idea.title for one in wins])
        return ideas_of(count)

    study = Study(embed, baseline=Baseline(0.5, 0.01))
    research(study, propose, write, look_up, loops=3, ideas=6)
    assert seen[0] == []
    assert seen[1] == seen[2] == ["dropout 2", "cosine 5"]
    assert study.runs == 6  # declined, maintained and improved ones are all turned away in rounds two and three
    assert [one.outcome for one in study.entries[6:]] == ["known"] * 12
    again = Study(embed, baseline=Baseline(0.5, 0.01), bank=False)
    assert research(again, fixed, write, look_up, loops=3, ideas=6).runs == 18


def test_failed_ideas_stay_in_the_bank_and_runs_are_limited():
    study = Study(embed, baseline=Baseline(0.5, 0.01))
    research(study, fixed, lambda idea, wins: None, look_up, loops=2, ideas=3)
    assert [one.outcome for one in study.entries] == ["failed"] * 3 + ["known"] * 3
    assert study.runs == 0
    assert study.best is None
    limited = Study(embed, baseline=Baseline(0.5, 0.01))
    assert research(limited, fixed, write, look_up, loops=1, ideas=6, most_runs=4).runs == 4
    with pytest.raises(ValueError, match="must hold an idea that ran"):
        confirmed(study, look_up, seeds=[1, 2])


def test_the_journal_replays_to_the_same_study_and_goes_on_where_it_was_broken_off(tmp_path):
    path = tmp_path / "sub" / "study.jsonl"
    base = Baseline(0.5, 0.01)
    whole = research(Study(embed, baseline=base), fixed, write, look_up, loops=2, ideas=5)
    half = Study(embed, baseline=base, journal=path)
    research(half, fixed, write, look_up, loops=1, ideas=5)
    torn = path.read_bytes()
    path.write_bytes(
        torn[: torn.rindex(b'{"entry"')] + b'{"entry": {"loop": 1, "ide'
    )  # killed while it wrote the fifth
    back = Study(embed, baseline=base, journal=path)
    assert back.entries == half.entries[:4]
    research(back, fixed, write, look_up, loops=2, ideas=5)
    assert back.entries == whole.entries
    replayed = Study(embed, baseline=base, journal=path)
    assert (replayed.entries, replayed.bank.ideas, replayed.wins) == (whole.entries, whole.bank.ideas, whole.wins)
    with pytest.raises(ValueError, match="is a journal of"):
        Study(embed, baseline=Baseline(0.4, 0.01), journal=path)
    path.write_bytes(b"nothing\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1"):
        Study(embed, baseline=base, journal=path)


def test_a_journal_knows_its_settings_its_embedding_and_its_writer(tmp_path):
    path, base = tmp_path / "study.jsonl", Baseline(0.5, 0.01)
    study = research(Study(embed, baseline=base, journal=path), fixed, write, look_up, loops=1, ideas=5)
    for other in ({"threshold": 0.9}, {"feedback": False}, {"bank": False}, {"higher_is_better": False}):
        with pytest.raises(ValueError, match="is a journal of"):
            Study(embed, baseline=base, journal=path, **other)
    with pytest.raises(ValueError, match="embed must give what it gave"):
        Study(lambda texts: 1 + embed(texts), baseline=base, journal=path)
    second = Study(embed, baseline=base, journal=path)
    second.tell(2, Idea("pca"), None)
    with pytest.raises(RuntimeError, match="somebody else"):
        study.tell(2, Idea("prune"), None)
    assert len(study.entries) == 5  # what the journal does not hold the study does not hold
    assert len(Study(embed, baseline=base, journal=path).entries) == 6


def test_a_round_with_fewer_ideas_is_whole_and_one_broken_off_keeps_other_ideas():
    asked = []

    def few(wins, count, loop):
        asked.append(loop)
        return [Idea(f"{WORDS[loop]} {n}", summary=WORDS[loop + 3 * n]) for n in range(2)]

    study = Study(embed, baseline=Baseline(0.5, 0.01))
    for loops in (2, 3):
        research(study, few, write, lambda source, seed: Outcome(0.4), loops=loops, ideas=5)
    assert asked == [1, 2, 3]
    broken = Study(embed, baseline=Baseline(0.5, 0.01))
    research(broken, fixed, write, look_up, loops=1, ideas=4, most_runs=2)
    research(broken, lambda wins, count, loop: ideas_of(6)[::-1], write, look_up, loops=1, ideas=4)
    assert [one.idea for one in broken.entries] == [*ideas_of(2), *ideas_of(6)[:3:-1]]


def test_repairs_count_as_runs_and_what_is_known_costs_none():
    study = Study(embed, baseline=Baseline(0.5, 0.01))
    fails = lambda source, seed: Outcome(None, TRACE)  # noqa: E731
    research(study, fixed, write, fails, lambda request: request.last.source + "#", loops=1, ideas=6, most_runs=8)
    assert study.runs == 8
    novel = Study(embed, baseline=Baseline(0.5, 0.01))
    shelf = [Document("wide"), Document("adam")]
    found = lambda idea: known_from(idea, shelf, embed, threshold=0.8)  # noqa: E731
    research(novel, fixed, write, look_up, loops=1, ideas=6, known=found)
    assert [one.outcome == "known" for one in novel.entries] == [True, False, False, False, True, False]
    with pytest.raises(TypeError, match="idea must be"):
        research(novel, lambda wins, count, loop: ["wide"], write, look_up, loops=2)


def test_embedders_that_are_none_are_named():
    widths = iter([2, 3])
    bank = Bank(lambda texts: np.ones((1, next(widths))))
    bank.add(Idea("a"))
    with pytest.raises(ValueError, match="width 2"):
        bank.look(Idea("b"))
    with pytest.raises(ValueError, match="row a text"):
        known_from(Idea("a"), [Document("b")], lambda texts: np.ones((3, 2)), threshold=0.5)
    assert similarity_scorer(embed, "wide")([]) == []
    asked = []
    counted = Study(lambda texts: asked.append(texts) or embed(texts), baseline=Baseline(0.5, 0.01))
    research(counted, fixed, write, look_up, loops=1, ideas=3)
    assert len(asked) == 3


def test_the_best_is_measured_anew_on_fresh_seeds():
    rng = np.random.default_rng(0)
    noise = {(idea.title, seed): rng.normal(0, 0.05) for idea in ideas_of(10) for seed in (0, *range(100, 150))}

    def noisy(source, seed):
        return Outcome(0.5 + noise[source, seed])

    study = Study(embed, baseline=Baseline(0.5, 0.01))
    research(study, fixed, write, noisy, loops=1, ideas=10)
    found = confirmed(study, noisy, seeds=range(100, 150))
    assert study.best.score - found.score > 0.03  # the best of ten that are worth the same
    assert abs(found.score - 0.5) < 3 * found.delta
    with pytest.raises(ValueError, match="fresh"):
        confirmed(study, noisy, seeds=[100, 0])
    with pytest.raises(ValueError, match="different"):
        confirmed(study, noisy, seeds=[100, 100])


def test_less_may_be_better():
    study = Study(embed, baseline=Baseline(0.5, 0.01), higher_is_better=False)
    research(study, fixed, write, look_up, loops=1, ideas=6)
    assert study.best.score == min(SCORES[idea.title] for idea in ideas_of(6))
    assert [one.idea.title for one in study.wins] == ["wide 0", "noise 3"]


def test_the_baseline_is_measured_with_its_error():
    found = measured_baseline(lambda source, seed: Outcome([0.4, 0.5, 0.6][seed]), "x")
    assert found.score == pytest.approx(0.5)
    assert found.delta == pytest.approx(0.1 / 3**0.5)
    with pytest.raises(ValueError, match="reference script must run"):
        measured_baseline(lambda source, seed: Outcome(None, "broken"), "x")
    with pytest.raises(ValueError, match="seeds"):
        measured_baseline(lambda source, seed: Outcome(0.1), "x", seeds=[1])


# ----------------------------------------------------------------------------------------------------------------- by a model


class Says:
    """A generator that gives one text, and keeps what it was asked."""

    name = "says"

    def __init__(self, text):
        self.text, self.asked = text, []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        self.asked += prompts
        return [[Sample(self.text, (1, 2), (), "stop", Spent(prompt=10, completion=2, calls=1))] for _ in prompts]


def test_a_model_proposes_from_documents_and_wins_and_its_tokens_are_booked():
    text = '{"title": "wide", "plan": "p", "summary": "s"}\nnot json\n{"title": ""}\n[1]\n{"title": "deep"}\n{"title": "pca"}\n'
    model, budget = Says(text), Budget()
    propose = ModelProposer(model, "digits", [Document("prune", "removes weights")], budget=budget)
    study = Study(embed, baseline=Baseline(0.5, 0.01))
    won = study.tell(1, Idea("noise", summary="adds noise"), practise("x", lambda source, seed: Outcome(0.9)))
    assert [one.title for one in propose([won], 2, 2)] == ["wide", "deep"]
    assert "prune. removes weights" in model.asked[0]
    assert "noise. adds noise (score 0.9)" in model.asked[0]
    assert budget.spent("plan").tokens == 12


def test_a_model_repairs_with_what_it_is_shown():
    model, budget = Says("first\n```python\nx = 2\n```\nthen\n```\nx = 3\n```"), Budget()
    trace = TRACE.replace("line 1", "line 2").replace("<module>", "f")
    run, _ = scripted({"def f():\n    x\nf()\n": trace, "x = 3\n": 0.8})
    practice = practise("def f():\n    x\nf()\n", run, ModelRepair(model, budget=budget))
    assert (practice.source, practice.last.metric) == ("x = 3\n", 0.8)
    assert "called by <module>, line 3" in model.asked[0]
    assert budget.spent("solve").completion == 2
    prose = Says("```py\nx = 3\n```\nThat is it.\n```text\n...")
    assert ModelRepair(prose)(Request((Attempt("x", ()),))) == "x = 3\n"
    assert "```python\nx\n```" in prose.asked[0]
    seeds = []
    again = lambda prompts, sampling, *, n=1, first=0, seed=0: seeds.append(seed) or model(prompts, sampling)  # noqa: E731
    practise("x = 3\n", lambda source, seed: Outcome(None, TRACE), ModelRepair(again), rounds=3)
    assert seeds == [1, 2, 3]
    assert ModelRepair(Says("no block"))(Request((Attempt("x\n", ()),))) is None
