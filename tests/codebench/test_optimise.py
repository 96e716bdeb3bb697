"""`assay code optimise`: what it hands over does the same and is cheaper; what is wrong, or no cheaper, is never handed over."""

import json
import math
from pathlib import Path

import pytest
from tests.tools import needs_sandbox

from assay.cli.main import main
from assay.codebench import optimise as module
from assay.codebench import retrieval
from assay.codebench.behaviour import Call, Observer, Suite, alike, hottest, record
from assay.codebench.optimise import optimise
from assay.codebench.optimised import Optimised
from assay.codebench.variations import grown, size, varied
from assay.errors import InputError
from assay.methods.core.sandbox import Limits, Sandbox

SLOW = '''"""Words."""


def match(a: list[int], b):
    # all that are equal
    out = []
    for x in a:
        for y in b:
            if x == y:
                out.append(x * y)
    return out
'''
TESTS = (
    "from words import match\n\n\ndef test_match():\n    assert match([1, 2, 1], [1, 3]) == [1, 1]\n    assert match([2, 5], []) == []\n"
    "    assert match([3], [3, 4]) == [9]\n"
)
LIMITS = Limits(cpu_seconds=10, wall_seconds=60, memory_mib=1024, output_bytes=2**26)


@pytest.fixture(autouse=True)
def namespaces():
    needs_sandbox()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A slow program with its tests; fewer inputs than users get."""
    monkeypatch.setattr(module, "VARIED", 12)
    monkeypatch.setattr(module, "DOUBLINGS", (6,))
    (tmp_path / "words.py").write_text(SLOW)
    (tmp_path / "test_words.py").write_text(TESTS)
    return tmp_path


def said(capsys, *arguments, code=0):
    assert main(["code", "optimise", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_the_command_prints_a_diff_and_writes_only_where_it_is_told(folder, capsys):
    run = (folder / "words.py", "--tests", folder / "test_words.py", "--meter", "operations")
    found = json.loads(said(capsys, *run, "--json", "-o", folder / "new.py").out)
    assert found["found"] is True
    assert found["steps"][0]["rule"] == "nested-join"
    assert found["ratio"]["low"] > 1
    assert found["diff"].startswith("--- a/words.py\n+++ b/words.py\n@@")
    assert "+    b_by_key = {}\n" in found["diff"]
    assert found["tested"]["kept back"] > 0
    assert (folder / "new.py").read_text() == found["program"] != SLOW
    assert (folder / "words.py").read_text() == SLOW
    scope = {}
    exec(found["program"], scope)
    assert scope["match"]([3, 1, 3], [3, 2]) == [9, 9]
    assert "# all that are equal" in found["program"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("none.py", "--tests", "test_words.py"), "FILE must be a Python file"),
        (("words.py", "--tests", "none.py"), "--tests must be a file of tests"),
        (("broken.py", "--tests", "test_words.py"), "is not Python"),
        (("words.py", "--tests", "words.py"), "must have another name than FILE"),
        (("marked.py", "--tests", "test_words.py"), "must be UTF-8 without a byte order mark"),
        (("latin.py", "--tests", "test_words.py"), "it is iso-8859-1: save it as that first"),
        (("words.py", "--tests", "test_words.py", "-o", "."), "cannot be written"),
        (("words.py", "--tests", "test_words.py", "-o", "test_words.py/new.py"), "cannot be written"),
        (("words.py", "--tests", "test_words.py", "--minutes", "0"), "--minutes must be"),
        (("words.py", "--tests", "test_words.py", "--meter", "joules"), "--meter must be one of"),
        (("words.py", "--tests", "test_words.py", "-o", "words.py"), "say --write"),
    ],
)
def test_bad_input_takes_one_line(folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text("def (")
    (folder / "marked.py").write_bytes(b"\xef\xbb\xbfdef f(): pass\n")
    (folder / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode())
    error = said(capsys, *arguments, code=2).err
    assert says in error
    assert "Traceback" not in error


def test_a_file_that_changed_meanwhile_is_left_and_its_mode_is_kept(folder, capsys, monkeypatch):
    file = folder / "words.py"
    file.chmod(0o750)
    found = Optimised("words.py", "operations", SLOW, "x = 1\n", ratio=module.Interval(2, 2, 2, 2))
    monkeypatch.setattr(module, "optimise", lambda *_, **__: found)
    run = (file, "--tests", folder / "test_words.py", "--write")
    said(capsys, *run)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("x = 1\n", 0o750)
    assert "was changed during the search" in said(capsys, *run, code=2).err
    assert file.read_text() == "x = 1\n"


def test_a_diff_has_the_lines_that_patch_has():
    old = "a = 1\n\x0c\ndef f():\n    return '\u2028'\n"
    assert Optimised("f.py", "operations", old, old.replace("1", "2")).diff == (
        "--- a/f.py\n+++ b/f.py\n@@ -1,4 +1,4 @@\n-a = 1\n+a = 2\n \x0c\n def f():\n     return '\u2028'\n"
    )


def test_no_input_that_the_search_used_is_kept_back(monkeypatch):
    """Of whole numbers few other ones are grown: the same ones for both."""
    calls = [Call("f", (number,)) for number in range(5)]
    monkeypatch.setattr(module, "grown", lambda own, doublings, count, seed: {"f": calls[seed : seed + 3]})
    search = module._Search.__new__(module._Search)
    monkeypatch.setattr(search, "_seconds", lambda call: 1.0, raising=False)
    monkeypatch.setattr(
        search, "_known", lambda name, calls: [module._Batch(name, tuple(calls), None)] if calls else []
    )
    used, kept = search._dear(calls[:1], calls[:1], ["f"], math.inf, print)
    assert [[call.args[0] for batch in part for call in batch.calls] for part in (used, kept)] == [[1, 2], [3]]


def test_files_beside_the_program_are_said_to_be_missing(folder, monkeypatch):
    said = "E   ModuleNotFoundError: No module named 'helper'\n=== short test summary info ===\nERROR test_words.py\n"
    monkeypatch.setattr(module, "fails", lambda *_: said)
    with pytest.raises(InputError, match=r"No module named 'helper' .*there are words.py and test_words.py alone"):
        optimise(folder / "words.py", folder / "test_words.py")


def test_tests_that_fail_on_the_program_as_it_is_are_refused(folder):
    (folder / "test_words.py").write_text(TESTS.replace("== [9]", "== [8]"))
    with pytest.raises(InputError, match="must pass on .*words.py as it is: .*test_match"):
        optimise(folder / "words.py", folder / "test_words.py")


def test_what_does_something_else_only_on_what_was_kept_back_is_not_handed_over(folder, monkeypatch):
    """The proof that the kept back inputs decide: an edit that is wrong, which the search is made blind to."""
    bad = SLOW.replace("    return out\n", "    return out[:1]\n")

    class Edit:
        rule, line, end_line, program, why = "bad", 11, 11, bad, "it is shorter"

    monkeypatch.setattr(module, "edits", lambda program, observed=None: [Edit] if program == SLOW else [])
    monkeypatch.setattr(module.retrieval, "candidates", lambda *_: [])
    (folder / "test_words.py").write_text(
        "from words import match\ndef test_one():\n    assert match([4], [4]) == [16]\n"
    )
    judged = module._Search._wrong
    seen = []

    def blind(self, program, batches):
        seen.append(len(batches))
        return "" if len(seen) == 1 else judged(self, program, batches)

    monkeypatch.setattr(module._Search, "_wrong", blind)
    monkeypatch.setattr(module._Search, "_ratio", lambda *_: module.Interval(2.0, 1.5, 3.0, 6))
    found = optimise(folder / "words.py", folder / "test_words.py", meter="operations")
    assert not found.found
    assert found.diff == ""
    assert "kept back" in found.why


def test_calls_and_lines_of_tests_are_recorded(folder):
    sandbox = Sandbox(LIMITS)
    found = record(sandbox, Suite(folder / "test_words.py", "words.py"), SLOW, LIMITS)
    assert [(call.function, call.args) for call in found.calls] == [
        ("match", ([1, 2, 1], [1, 3])),
        ("match", ([2, 5], [])),
        ("match", ([3], [3, 4])),
    ]
    lines = hottest(SLOW, {int(line): spent for line, spent in found.seconds.items()})
    assert lines["for x in a:"] > 0
    assert not lines["# all that are equal"]


WAYS = {  # of the same function, each of which a caller could tell from the first
    "def f(xs): return sorted(xs)": "def f(xs): return tuple(sorted(xs))",
    "def f(xs): return list(xs)": "def f(xs): return xs",
    "def f(xs): return [x for x in xs]": "def f(xs): return (x for x in xs)",
    "def f(xs): xs.append(1)": "def f(xs): pass",
    "def f(xs): print(xs)": "def f(xs): print(list(xs), end='')",
    "def f(xs): return xs[9]": "def f(xs): raise ValueError",
    "n = 0\ndef f(xs):\n    global n\n    n += len(xs)": "n = 0\ndef f(xs):\n    pass",
    "def f(xs): return sum(xs) + 0.0": "def f(xs): return sum(xs)",
    "def f(xs): return {1: 2, 3: 4}": "def f(xs): return {3: 4, 1: 2}",
    "def f(xs): return {1: 2}.keys()": "def f(xs): return [1]",
    "class S(str): pass\ndef f(xs): return S('a')": "class S(str): pass\ndef f(xs): return S('b')",
}


def test_whatever_a_caller_could_tell_is_told():
    observer = Observer(Sandbox(LIMITS), LIMITS)
    try:
        for one, other in WAYS.items():
            calls = [Call("f", ([2, 3],)), Call("f", ([True],))]
            wanted = observer.does(one, calls)
            assert alike(wanted, observer.does(one, calls)) is None, one
            assert alike(wanted, observer.does(other, calls)) is not None, other
        assert (
            alike(observer.does("def f(xs): return {2, 1}", calls), observer.does("def f(xs): return {1, 2}", calls))
            is None
        )
        assert observer.does("def f(xs): return lambda: 1", calls)[0][0][0] == "unknown"
    finally:
        observer.close()


def test_made_inputs_have_the_types_of_those_that_were_seen():
    seen = [Call("f", ([1.5, 2.5], "ab", (1, 2))), Call("f", ([3.5], "c", (4, 5)))]
    made = varied(seen, 60)
    assert len(made) == 60
    assert all(type(call.args[0]) is list and all(type(one) is float for one in call.args[0]) for call in made)
    assert all(type(call.args[1]) is str and len(call.args[2]) == 2 for call in made)
    assert any(math.isnan(one) for call in made for one in call.args[0])
    assert varied(seen, 60) != varied(seen, 60, seed=1)
    assert [repr(one) for one in varied(seen, 20)] == [repr(one) for one in varied(seen, 20)]
    assert not {repr(call.args) for call in made} & {repr(call.args) for call in seen}
    large = grown([Call("g", ([1, 2, 3],))], 8, 2)["g"]
    assert all(size(call.args[0]) > 200 for call in large)
    assert varied([Call("h", ())], 5) == []


def test_a_function_that_resembles_a_known_task_is_offered_its_experts_program():
    source = (
        "import math\n\n\ndef rolling(values):\n    '''Largest so far.'''\n"
        "    return [max(values[: k + 1]) for k in range(len(values))]\n\n\nx = 1\n"
    )
    programs = retrieval.candidates(source, "rolling")
    assert "HumanEval/9" in programs[0][1]
    scope = {}
    exec(programs[0][0], scope)
    assert scope["rolling"]([1, 3, 2]) == [1, 3, 3]
    assert (scope["rolling"].__doc__, scope["x"]) == ("Largest so far.", 1)
    assert retrieval.candidates(source.replace("x = 1", "_rolling_rolling_max = 1"), "rolling") == []
    assert retrieval.candidates("def f(a, b, c):\n    return a\n", "f") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program", "tests"),
    [
        ("nothing", "def f(xs):\n    return sum(xs)\n", "f([1, 2]) == 3"),
        (
            "prints",
            "def f(xs):\n    found = False\n    for x in xs:\n        print(x)\n        if x == 2:\n"
            "            found = True\n    return found\n",
            "f([1, 2])",
        ),
        (
            "aliases",
            "def f(n):\n    a = []\n    kept = []\n    for i in range(n):\n        kept.append(a)\n        a = a + [i]\n    return kept\n",
            "f(2) == [[], [0]]",
        ),
    ],
)
def test_nothing_is_handed_over_where_nothing_is_to_be_found(tmp_path, capsys, name, program, tests):
    (tmp_path / "mine.py").write_text(program)
    (tmp_path / "test_mine.py").write_text(f"from mine import f\ndef test_it():\n    assert {tests}\n")
    out = said(capsys, tmp_path / "mine.py", "--tests", tmp_path / "test_mine.py", "--write")
    assert out.out == ""
    assert "nothing" in out.err
    assert Path(tmp_path / "mine.py").read_text() == program
