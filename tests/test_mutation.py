"""The script that puts faults into the code: what it changes, what it leaves alone, and that it tells a good test from a poor one."""

from __future__ import annotations

import ast
import json
import random

import pytest
from tests import mutation
from tests.mutation import Mutant, draw, equivalents, faulty, files_of, mutants, of_files, run, suite_of

SMALL = '''
"""A module of 7 lines."""
from typing import TYPE_CHECKING, Literal, Protocol

LIMIT = 10
Kind = Literal[1, 2]

if TYPE_CHECKING:
    HIDDEN = 3


class Shape(Protocol):
    sides: int = 4


@decorated(5)
def clip(x: int, low=0, *, strict: bool = True) -> Literal[6]:
    """At least 7."""
    if x < low and not strict:
        raise ValueError(f"{x} is below {low - 8}")
    for found in [x, -x][:9]:
        if found in (x,):
            continue
        break
    total = 0.5 * max(x, low)
    total += sum(i for i in range(LIMIT) if strict)
    return total


if __name__ == "__main__":
    clip(11)
'''


def changes(source):
    return [(mutant.was, mutant.now) for mutant in mutants(source, "toy/small.py")]


def test_every_kind_of_fault_and_nothing_where_no_code_runs():
    assert changes(SMALL) == [
        ("LIMIT = 10", "LIMIT = 11"),
        ("LIMIT = 10", "LIMIT = 20"),
        ("x: int, low=0, *, strict: bool=True", "x: int, low=0, *, strict: bool=False"),
        ("x: int, low=0, *, strict: bool=True", "x: int, low=1, *, strict: bool=True"),
        ("x < low and (not strict)", "x < low or not strict"),
        ("x < low", "x <= low"),
        ("x < low", "x >= low"),
        ("not strict", "strict"),
        ("-x", "x"),
        (":9", ":"),
        (":9", ":10"),
        (":9", ":18"),
        ("found in (x,)", "found not in (x,)"),
        ("continue", "break"),
        ("break", "continue"),
        ("0.5 * max(x, low)", "0.5 / max(x, low)"),
        ("0.5 * max(x, low)", "1.5 * max(x, low)"),
        ("0.5 * max(x, low)", "1.0 * max(x, low)"),
        ("max(x, low)", "min(x, low)"),
        ("total += sum((i for i in range(LIMIT) if strict))", "total -= sum((i for i in range(LIMIT) if strict))"),
        ("for i in range(LIMIT) if strict", "for i in range(LIMIT) if not strict"),
        ("return total", "return"),
    ]


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("a == b", {"a != b"}),
        ("a <= b < c", {"a < b < c", "a > b < c", "a <= b <= c", "a <= b >= c"}),
        ("a is None", {"a is not None"}),
        ("a if b else c", {"a if not b else c"}),
        ("a // 1", {"a * 1", "a // 2", "a // 0"}),
        ("True", {"False"}),
        ("0", {"1"}),
        ("f'{a * b:.3f}'", {"f'{a / b:.3f}'"}),
        ("'text' + a", set()),
        ("zip(a, b, strict=True)", set()),
        ("all(a)", {"any(a)"}),
        ("a[b:]", {"a[:]"}),
    ],
)
def test_faults_of_one_expression(code, faults):
    source = f"x = {code}\n"
    assert {faulty(source, mutant).strip() for mutant in mutants(source, "toy/x.py")} == {f"x = {f}" for f in faults}


def test_every_mutant_is_other_code_than_all_others_and_has_a_name_of_its_own():
    files = ["tuner/search.py", "measure/stats.py"]
    for file in files:
        source = (mutation.ROOT / "src" / "assay" / file).read_text()
        found = mutants(source, file)
        assert len({mutant.name for mutant in found}) == len(found) > 100
        some = random.Random(0).sample(found, 40)
        dumps = {ast.dump(ast.parse(text)) for text in [source, *(faulty(source, mutant) for mutant in some)]}
        assert len(dumps) == 41
        lines = source.splitlines()
        assert all("#" not in mutant.was and lines[mutant.line - 1].strip() for mutant in some)


def test_changing_one_place_leaves_the_tree_as_it_was():
    tree = ast.parse(SMALL)
    for _, node, changed, parents in mutation._faults(tree):
        with mutation._replaced(node, changed, parents[node]):
            assert ast.dump(tree) != ast.dump(ast.parse(SMALL))
        assert ast.dump(tree) == ast.dump(ast.parse(SMALL))


def test_the_draw_is_fixed_by_seed_and_source_and_an_edit_moves_only_what_it_touches():
    found = mutants(SMALL, "toy/small.py")
    chosen = draw(found, 8, seed=1)
    assert len(chosen) == len({mutant.spot for mutant in chosen}) == 8
    assert draw(reversed(found), 8, seed=1) == chosen
    assert draw(found, 8, seed=2) != chosen
    edited = mutants("FIRST = None\n" + SMALL.replace("total = 0.5", "total = 0.25"), "toy/small.py")
    assert {m.name for m in chosen if "0.5" not in m.was} <= {m.name for m in draw(edited, 10, seed=1)}
    assert len(draw(found, 1000, seed=1)) == len({mutant.spot for mutant in found})


def test_the_likeliest_tests_come_first():
    own, *others = suite_of(mutation.ROOT, "tuner/search.py")
    assert own == "tests/tuner/test_search.py"
    assert "tests/tuner/test_journal.py" in others
    assert suite_of(mutation.ROOT, "measure/plots.py")[0] == "tests/measure/test_profiling.py"  # which names it
    outside = suite_of(mutation.ROOT, "methods/attention/xattention.py")
    assert outside[0] == "tests/methods/attention/test_xattention.py"
    assert all("xattention" in (mutation.ROOT / path).read_text() for path in outside)


def test_what_is_listed_as_equivalent_is_there_and_says_why():
    known = equivalents(mutation.ROOT / "tests" / "mutation_equivalents.toml")
    files = {name.split(" ", 1)[0] for name in known}
    assert sorted(set(known) - {mutant.name for mutant in of_files(mutation.ROOT, files)}) == []
    assert all(len(why.split()) > 3 for why in known.values())


def test_places_that_hold_nothing_are_refused(capsys):
    assert mutation.main(["--only", "tuner/no_such.py:3", "--list"]) == 2
    assert "there is no file src/assay/tuner/no_such.py" in capsys.readouterr().err
    assert mutation.main(["--only", "src/assay/tuner/search.py:1", "--list"]) == 2
    assert "nothing to change at src/assay/tuner/search.py:1" in capsys.readouterr().err


def test_a_draw_can_be_listed(capsys):
    assert mutation.main(["--list", "--count", "5", "--package", "tuner", "--skip", "tuner/search.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.split()[1].startswith("tuner/") and "tuner/search.py" not in line for line in lines)


TOY = """
def older(a: int, b: int) -> int:
    return a if a > b else b


def count(n: int) -> int:
    i = 0
    while i < n:
        i += 1
    return i


def spare(x: int) -> int:
    return x + 3
"""

TOY_TEST = """
from assay.measure.toy import count, older

def test_older():
    assert older(5, 2) == older(2, 5) == 5

def test_count():
    assert count(3) == 3
"""


@pytest.fixture
def toy(tmp_path):
    """A tree like ours with one small module, whose tests miss a function."""
    root = tmp_path / "toy"
    for path, text in {
        "src/assay/__init__.py": "",
        "src/assay/measure/__init__.py": "",
        "src/assay/measure/toy.py": TOY,
        "tests/measure/test_toy.py": TOY_TEST,
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow: x", "sweep: x", "gpu: x"]\n',
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def named(root, *pairs) -> list[Mutant]:
    found = {(mutant.was, mutant.now): mutant for mutant in of_files(root, files_of(root, ["measure"]))}
    return [found[pair] for pair in pairs]


def state(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_kills_and_survivors_are_told_apart_and_what_is_known_is_not_tried_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(mutation, "TEST_SECONDS", 3)
    chosen = named(
        toy,
        ("a > b", "a <= b"),
        ("a > b", "a >= b"),
        ("i += 1", "i -= 1"),
        ("return x + 3", "return"),
        ("x + 3", "x + 4"),
    )
    known = {chosen[1].name: "where both are equal, either is the larger"}
    before, journal, said = state(toy), tmp_path / "out" / "journal.jsonl", []
    results = run(toy, chosen[:4], known, journal, said.append)
    assert [result.status for result in results] == ["killed", "equivalent", "timeout", "survived"]
    assert results[0].by == "tests/measure/test_toy.py::test_older"
    assert results[1].by == known[chosen[1].name]
    assert results[2].by == "tests/measure/test_toy.py::test_count"
    assert state(toy) == before  # faults are in the copy only
    assert "4 mutants, 3 to try" in said
    found = mutation.report(results)
    assert found["counts"] == {"killed": 1, "timeout": 1, "survived": 1, "equivalent": 1}
    assert found["noticed"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(found)) == found
    text = mutation.table(results)
    assert "survived" in text.splitlines()[-3]  # last, above the counts
    assert "measure/toy.py:14  spare: return x + 3 -> return" in text

    with journal.open("a") as file:
        file.write('{"name": "a line cut sh')
    monkeypatch.setattr(mutation, "Copy", None)  # nothing is copied, let alone run
    assert run(toy, chosen[:4], known, journal, said.append) == results
    assert said[-1] == "4 mutants, 0 to try"
    (toy / "tests/measure/test_toy.py").write_text(TOY_TEST + "\n# other tests may notice more\n")
    with pytest.raises(TypeError):
        run(toy, chosen[:4], known, journal, said.append)
    assert said[-1] == "4 mutants, 3 to try"


def test_tests_that_fail_without_a_fault_say_nothing(toy, tmp_path):
    (toy / "tests/measure/test_toy.py").write_text("def test_no():\n    assert False\n")
    with pytest.raises(RuntimeError, match="the tests of measure fail without any fault"):
        run(toy, named(toy, ("a > b", "a <= b")), {}, tmp_path / "journal.jsonl", lambda text: None)


def test_a_module_is_as_it_was_after_its_fault_even_if_its_compiled_file_looks_fresh(toy, tmp_path):
    tree = mutation.Copy(toy, tmp_path)
    module = tree.root / "src/assay/measure/toy.py"
    (mutant,) = named(toy, ("a > b", "a >= b"))
    for text in (faulty(TOY, mutant), TOY):
        with tree.holding("measure/toy.py", text):
            assert module.read_text() == text
            compiled = module.parent / "__pycache__" / "toy.cpython-311.pyc"
            compiled.parent.mkdir(exist_ok=True)
            compiled.write_bytes(b"old")
        assert not compiled.exists()
        assert module.read_text() == TOY
