"""`assay code` through its command line: what users see, for right, slow, wrong and broken programs."""

import json

import pytest
from tests.tools import needs

from assay.cli.main import main
from assay.codebench import compare, measure, read_cases
from assay.codebench.costs import Comparison, _ratio
from assay.errors import InputError

SLOW = "def total(n):\n    t = 0\n    for i in range(n):\n        t += i\n    return t\n"
QUICK = "def total(n):\n    return n * (n - 1) // 2\n"
WRONG = "def total(n):\n    return n * n // 2\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "quick.py").write_text(QUICK)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "cases.jsonl").write_text(
        '{"args": [1000], "expected": 499500}\n{"python": "(10**5,)"}\n\n{"args": [], "kwargs": {"n": 3}, "expected": 3}\n'
    )
    return tmp_path


def said(capsys, *arguments, code=0):
    assert main(list(map(str, arguments))) == code
    return capsys.readouterr()


def test_a_program_is_measured_by_every_meter(folder, capsys):
    out = said(
        capsys, "code", "measure", folder / "slow.py", "--cases", folder / "cases.jsonl", "--repeats", 3, "--json"
    ).out
    found = json.loads(out)
    assert (found["cases"], found["checked"], found["right"]) == (3, 2, True)
    assert {cost["meter"] for cost in found["costs"]} == {"cpu_seconds", "operations", "peak_bytes"}
    operations = [cost for cost in found["costs"] if cost["meter"] == "operations"]
    assert [cost["variation"] for cost in operations] == [0, 0, 0]
    assert operations[1]["median"] > 50 * operations[0]["median"]
    assert all(len(cost["repeats"]) == 3 for cost in found["costs"])
    text = said(
        capsys, "code", "measure", folder / "slow.py", "--cases", folder / "cases.jsonl", "--meter", "operations"
    ).out
    assert "right on 2 of 3 cases" in text
    assert "the same at every run" in text
    assert "Not seen: everything inside of built-in functions" in text


def test_a_meter_that_is_named_twice_counts_once(folder, capsys):
    run = ("code", "measure", folder / "slow.py", "--cases", folder / "cases.jsonl", "--repeats", 1, "--json")
    once = json.loads(said(capsys, *run, "--meter", "operations").out)
    assert json.loads(said(capsys, *run, *["--meter", "operations"] * 2).out) == once


def test_a_wrong_program_has_no_cost(folder, capsys):
    text = said(capsys, "code", "measure", folder / "wrong.py", "--cases", folder / "cases.jsonl", code=1).out
    assert "case 1 gave 500000, not 499500: a program that is wrong has no cost" in text
    found = json.loads(
        said(capsys, "code", "measure", folder / "wrong.py", "--cases", folder / "cases.jsonl", "--json", code=1).out
    )
    assert (found["right"], found["costs"]) == (False, [])


def test_two_programs_are_compared(folder, capsys):
    run = ("code", "compare", folder / "slow.py", folder / "quick.py", "--cases", folder / "cases.jsonl", "--check")
    text = said(capsys, *run, "--meter", "operations", "--pairs", 2).out
    assert "verdict    cheaper" in text
    back = (
        "code",
        "compare",
        folder / "quick.py",
        folder / "slow.py",
        "--cases",
        folder / "cases.jsonl",
        "--meter",
        "operations",
        "--pairs",
        2,
    )
    assert json.loads(said(capsys, *back, "--json").out)["verdict"] == "dearer"
    said(capsys, *back, "--check", code=1)
    found = json.loads(said(capsys, *run, "--pairs", 8, "--json").out)
    assert found["verdict"] == "cheaper"
    assert found["ratio"]["low"] > 2
    same = json.loads(
        said(
            capsys,
            "code",
            "compare",
            folder / "slow.py",
            folder / "slow.py",
            "--cases",
            folder / "cases.jsonl",
            "--pairs",
            8,
            "--json",
        ).out
    )
    assert same["verdict"] == "no difference seen" or 0.9 < same["ratio"]["median"] < 1.1


def test_the_new_one_must_give_the_old_ones_answers(folder, capsys):
    (folder / "unknown.jsonl").write_text('{"args": [10]}\n')
    text = said(
        capsys,
        "code",
        "compare",
        folder / "slow.py",
        folder / "wrong.py",
        "--cases",
        folder / "unknown.jsonl",
        "--check",
        code=1,
    ).out
    assert "wrong.py: case 1 gave 50, not 45" in text
    (folder / "error.py").write_text("def total(n): return 1 // 0")
    text = said(
        capsys, "code", "compare", folder / "error.py", folder / "slow.py", "--cases", folder / "unknown.jsonl"
    ).out
    assert "error.py: case 1 raised: ZeroDivisionError" in text


def test_whole_programs_are_measured(folder, capsys):
    (folder / "whole.py").write_text("print(sum(range(int(input()))))")
    (folder / "stdin.jsonl").write_text('{"stdin": "3000000\\n", "expected": "4499998500000"}\n')
    found = json.loads(
        said(
            capsys, "code", "measure", folder / "whole.py", "--cases", folder / "stdin.jsonl", "--repeats", 2, "--json"
        ).out
    )
    assert found["right"]
    assert {cost["meter"] for cost in found["costs"]} == {"cpu_seconds", "peak_bytes"}


SUITE = "from slow import total\ndef test_total():\n    for _ in range(20): assert total(10**5) == 4999950000\n"


def test_a_version_whose_tests_fail_is_wrong(folder, capsys):
    (folder / "test_total.py").write_text(SUITE)
    run = ("code", "compare", folder / "wrong.py", folder / "slow.py", "--pytest", "--tests", folder / "test_total.py")
    found = json.loads(said(capsys, *run, "--check", "--json", code=1).out)
    assert "wrong.py: its tests do not pass" in found["wrong"]


def test_a_version_that_ends_the_tests_with_0_is_wrong(folder, capsys):
    (folder / "test_total.py").write_text(SUITE)
    (folder / "ends.py").write_text("import os\ndef total(n):\n    os._exit(0)\n")
    run = ("code", "compare", folder / "slow.py", folder / "ends.py", "--pytest", "--tests", folder / "test_total.py")
    found = json.loads(said(capsys, *run, "--check", "--json", code=1).out)
    assert found["wrong"] == "ends.py: its tests do not pass: the program ended the process in the middle of them"


def test_the_first_wrong_case_is_the_last_that_is_run(folder, capsys):
    (folder / "raises.py").write_text("def total(n):\n    raise ValueError\n")
    said_ = said(capsys, "code", "measure", folder / "raises.py", "--cases", folder / "cases.jsonl", code=1)
    assert "wrong      case 1 raised: ValueError: a program that is wrong has no cost" in said_.out
    assert [line for line in said_.err.splitlines() if "case" in line] == ["assay: raises.py: cpu_seconds, case 1 of 3"]


def test_of_a_traceback_the_last_line_is_told(folder, capsys):
    (folder / "fails.py").write_text("def f():\n    raise KeyError('x')\nf()\n")
    (folder / "stdin.jsonl").write_text('{"stdin": ""}')
    out = said(capsys, "code", "measure", folder / "fails.py", "--cases", folder / "stdin.jsonl", code=1).out
    assert "case 1 raised: ended by exit with 1: KeyError: 'x': a program" in out


@pytest.mark.slow
def test_two_versions_are_compared_by_their_tests(folder, capsys):
    (folder / "test_total.py").write_text(SUITE)
    run = ("code", "compare", folder / "slow.py", folder / "quick.py", "--pytest", "--tests", folder / "test_total.py")
    found = json.loads(said(capsys, *run, "--pairs", 6, "--json").out)
    assert found["verdict"] == "cheaper", found


def test_a_javascript_function_is_called(folder, capsys):
    needs("node")
    loop = "let t = 0;\n  for (let i = 0; i < n; i++) t += i;\n  return t;"
    (folder / "slow.js").write_text(f"function total(n) {{\n  {loop}\n}}\n")
    (folder / "quick.js").write_text("const total = (n) => (n * (n - 1)) / 2;\n")
    (folder / "two.js").write_text("function helper() {}\nfunction total(n) { return helper() }\n")
    (folder / "calls.jsonl").write_text(
        '{"args": [20000000], "expected": 199999990000000}\n{"args": [{"__js__": "1 + 1"}]}\n'
    )
    run = ("--cases", folder / "calls.jsonl", "--json")
    found = json.loads(said(capsys, "code", "measure", folder / "slow.js", *run, "--repeats", 2).out)
    assert (found["checked"], found["right"]) == (1, True)
    assert [cost["meter"] for cost in found["costs"]] == ["cpu_seconds", "cpu_seconds", "peak_bytes", "peak_bytes"]
    found = json.loads(said(capsys, "code", "compare", folder / "slow.js", folder / "quick.js", *run, "--pairs", 6).out)
    assert found["verdict"] == "cheaper"
    assert "two.js to call: helper, total" in said(capsys, "code", "measure", folder / "two.js", *run, code=2).err
    assert not json.loads(said(capsys, "code", "measure", folder / "two.js", *run, "--entry", "total", code=1).out)[
        "right"
    ]
    for wrong in (["--meter", "operations"], ["--entry", "a b"]):
        assert (
            wrong[0][2:].replace("entry", "entry_point")
            in said(capsys, "code", "measure", folder / "slow.js", *run, *wrong, code=2).err
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("measure", "slow.py", "--cases", "nothing.jsonl"), "nothing.jsonl cannot be read"),
        (("measure", "notes.txt", "--cases", "cases.jsonl"), "FILE must be a program"),
        (("measure", "two.py", "--cases", "cases.jsonl"), "--entry must name the function of"),
        (("measure", "slow.py", "--cases", "cases.jsonl", "--meter", "joules"), "--meter must be one of cpu_seconds"),
        (("measure", "slow.py", "--cases", "cases.jsonl", "--repeats", "0"), "--repeats must be"),
        (("measure", "slow.py", "--cases", "cases.jsonl", "--seconds", "0"), "--seconds must be"),
        (
            ("measure", "slow.py", "--cases", "cases.jsonl", "--entry", "g"),
            "--entry must name a function of slow.py, got",
        ),
        (
            ("compare", "slow.py", "two.py", "--cases", "cases.jsonl"),
            "function of two.py, got 'total'; it defines a, b",
        ),
        (("measure", "slow.c", "--cases", "cases.jsonl"), "cases with args call a Python or JavaScript function"),
        (("measure", "broken.c", "--cases", "stdin.jsonl"), "does not compile"),
        (
            ("measure", "slow.py", "--cases", "stdin.jsonl", "--meter", "operations"),
            "whole programs have no such count",
        ),
        (("measure", "broken.py", "--cases", "cases.jsonl"), "is not Python"),
        (("compare", "slow.py", "quick.py"), "give either --cases FILE or --pytest"),
        (("compare", "slow.py", "quick.py", "--pytest"), "two folders with tests"),
        (("compare", "slow.py", "quick.py", "--cases", "cases.jsonl", "--tests", "x.py"), "--tests goes with --pytest"),
        (("compare", "slow.py", "quick.py", "--pytest", "--entry", "total"), "--entry goes with --cases"),
        (
            ("compare", "slow.py", "quick.py", "--cases", "cases.jsonl", "--check", "--pairs", "5"),
            "at least 6 with --check",
        ),
        (("compare", "hollow", "hollow", "--pytest"), "hollow cannot be used: folder must hold files"),
        (("measure", "hollow", "--cases", "stdin.jsonl"), "folder with a __main__.py, got hollow"),
        (
            ("measure", "slow.py", "--cases", "stdin.jsonl", "--meter", "hardware_instructions"),
            "hardware_instructions counts calls of Python functions",
        ),
        (("compare", "slow.py", "quick.py", "--cases", "bad.jsonl"), "bad.jsonl, line 1: the expression NameError"),
    ],
)
def test_bad_input_takes_one_line(folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    (folder / "notes.txt").write_text("")
    (folder / "hollow").mkdir()
    (folder / "two.py").write_text("def a(): pass\ndef b(): pass")
    (folder / "slow.c").write_text("int main(void) { return 0; }")
    (folder / "broken.c").write_text("int main(void) { return x; }")
    (folder / "broken.py").write_text("def (")
    (folder / "stdin.jsonl").write_text('{"stdin": ""}')
    (folder / "bad.jsonl").write_text('{"python": "(x,)"}')
    if "broken.c" in arguments:
        needs("gcc")
    error = said(capsys, "code", *arguments, code=2).err
    assert says in error, error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one case"),
        ("{", "line 1: not JSON"),
        ("[]", "must be an object"),
        ('{"args": [1], "x": 2}', "must be an object with args"),
        ('{"args": [1], "stdin": ""}', "one of args, python and stdin"),
        ('{"args": 1}', "args must be a list"),
        ('{"stdin": 1}', "must be texts"),
        ('{"args": [1], "kwargs": []}', "kwargs must be an object"),
        ('{"args": [1], "compare": "equal"}', "compare must be one of"),
        ('{"args": [1]}\n{"stdin": ""}', "not both"),
        ('{"python": "(1"}', "must be an expression"),
        ('{"python": "3"}', "must give a tuple"),
    ],
)
def test_bad_cases_are_named(tmp_path, text, says):
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_cases(path)


def test_an_expression_is_evaluated_in_the_sandbox(tmp_path):
    path = tmp_path / "cases.jsonl"
    mark = tmp_path / "mark"
    path.write_text(json.dumps({"python": f"(__import__('os').path.exists({str(tmp_path)!r}),)"}))
    assert read_cases(path)[0].args == (False,)
    path.write_text('{"python": "(list(range(3 * 10**5)),)"}')  # more than 1 MiB of answer
    assert len(read_cases(path)[0].args[0]) == 3 * 10**5
    path.write_text(json.dumps({"python": f"(open({str(mark)!r}, 'w'),)"}))
    with pytest.raises(InputError, match="the expression"):
        read_cases(path)
    assert not mark.exists()


def test_equal_pairs_have_an_exact_ratio():
    assert _ratio([(6.0, 3.0)] * 2, exact=True).low == 2.0
    assert _ratio([(6.0, 3.0)], exact=True).low < 2.0
    assert Comparison("a", "b", "operations", "", _ratio([(3.0, 6.0)] * 3, exact=True)).verdict == "dearer"
    assert Comparison("a", "b", "operations", "", _ratio([(3.0, 3.0)] * 3, exact=True)).verdict == "no difference seen"


def test_equal_pairs_of_a_meter_that_varies_are_chance():
    """Memory comes in pages: two runs of one program may well differ alike in two pairs."""
    for pairs in (2, 3, 5):
        assert _ratio([(4096.0 * 30, 4096.0 * 29)] * pairs).low <= 1, pairs
    assert _ratio([(4096.0 * 30, 4096.0 * 29)] * 6).low > 1


def test_the_library_says_the_same(folder):
    cases = read_cases(folder / "cases.jsonl")
    assert measure(folder / "quick.py", cases, meters=["operations"], repeats=1).total("operations") > 0
    assert compare(folder / "slow.py", folder / "quick.py", cases, meter="operations", pairs=2).verdict == "cheaper"
    with pytest.raises(InputError, match="got none"):
        measure(folder / "quick.py", [])
