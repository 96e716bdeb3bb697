import gzip
import json

import pytest

from assay.errors import InputError
from assay.workloads.programs.task import bank, cells, humaneval, read_samples, read_tasks, write_samples

FILE = '''"""HumanEval/0 has_close_elements: is any pair nearer than a threshold?"""

# %% task
SIZES = (4, 8)
COMPARE = "same"
def generate(size, rng):
    return ([rng.random() for _ in range(size)], 0.0)
def contract(numbers, threshold):
    assert len(numbers) > 1

# %% expert: sorted
def has_close_elements(numbers, threshold):
    numbers = sorted(numbers)
    return any(b - a < threshold for a, b in zip(numbers, numbers[1:]))

# %% quadratic
def has_close_elements(numbers, threshold):
    return any(abs(a - b) < threshold for n, a in enumerate(numbers) for b in numbers[:n])

# %% wrong: always
def has_close_elements(numbers, threshold):
    return True
'''


def test_a_file_of_a_bank_is_cells(tmp_path):
    (tmp_path / "000.py").write_text(FILE)
    (tmp_path / "notes.py").write_text("x = 1")
    [task] = bank(tmp_path).values()
    assert (task.id, task.entry_point, task.sizes) == ("HumanEval/0", "has_close_elements", (4, 8))
    assert list(task.programs) == ["expert", "quadratic"]
    assert list(task.wrong) == ["always"]
    assert task.arguments(1, 3) == task.arguments(1, 3)
    assert task.arguments(1, 3) != task.arguments(1, 2) != task.arguments(1, 2, seed=1)
    assert len(task.arguments(1)[0]) == 8
    assert len(task.sized(100)[0]) == 100
    task.check([1, 2], 0.5)
    with pytest.raises(AssertionError):
        task.check([1], 0.5)
    with pytest.raises(InputError, match="levels 0 to 1, got 2"):
        task.arguments(2)


def test_cells_hold_whole_programs():
    held = cells(FILE)
    assert list(held) == ["task", "expert: sorted", "quadratic", "wrong: always"]
    for name, body in held.items():
        if name != "task":
            space = {}
            exec(body, space)
            assert callable(space["has_close_elements"])


def test_humaneval_is_there_with_all_its_tasks():
    tasks = humaneval()
    assert len(tasks) == 164
    assert tasks[0].id == "HumanEval/0"
    assert all(task.entry_point in task.programs["canonical"] and "def check(candidate)" in task.test for task in tasks)
    with pytest.raises(InputError, match="not in the bank"):
        tasks[0].sized(3)


def test_formats_of_others(tmp_path):
    mbpp = {
        "task_id": 2,
        "text": "Add one.",
        "code": "import math\ndef helper(x):\n    return x\ndef add(x):\n    return helper(x) + 1",
        "test_list": ["assert add(1) == 2", "assert set(add(2) for _ in [1]) == {3}"],
    }
    plus = {"task_id": "X/1", "prompt": "def g(x):\n", "entry_point": "g", "canonical_solution": "    return x\n"}
    path = tmp_path / "tasks.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(mbpp) + "\n\n" + json.dumps(plus) + "\n")
    first, second = read_tasks(path)
    assert (first.id, first.entry_point) == ("Mbpp/2", "add")
    space = {}
    exec(first.test, space)
    space["check"](lambda x: x + 1)
    with pytest.raises(AssertionError):
        space["check"](lambda x: x)
    assert (second.id, second.programs["canonical"]) == ("X/1", "def g(x):\n    return x\n")

    sanitized = mbpp | {"test_imports": ["import math"], "test_list": ["assert math.isclose(add(1), 2)"]}
    path.with_name("s.jsonl").write_text(json.dumps(sanitized))
    exec(read_tasks(path.with_name("s.jsonl"))[0].test, space)
    space["check"](lambda x: x + 1)

    samples = tmp_path / "samples.jsonl"
    known = {task.id: task for task in (first, second)}
    write_samples(samples, {"X/1": ["def g(x): return 1", "def g(x): return 2"]})
    with open(samples, "a") as file:
        file.write(json.dumps({"task_id": "X/1", "completion": "    return 3\n"}) + "\n")
    assert read_samples(samples, known) == {
        "X/1": ["def g(x): return 1", "def g(x): return 2", "def g(x):\n    return 3\n"]
    }


def test_tasks_with_lists_of_arguments(tmp_path):
    """As EvalPlus writes them: no test, but inputs on which answers are those of the canonical program."""
    line = {"task_id": "X/1", "prompt": "def g(x):\n", "entry_point": "g", "canonical_solution": "    return x\n"}
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        json.dumps(line | {"base_input": [[1], [2.5]], "plus_input": [[[3]]], "atol": 0.01, "contract": ""})
    )
    (task,) = read_tasks(path)
    assert (task.inputs, task.test) == (((1,), (2.5,), ([3],)), "")
    assert task.compare(1.0, 1.009)
    assert not task.compare(1.0, 1.1)
    path.write_text(json.dumps(line | {"test": "def check(candidate):\n    assert candidate(1) == 1\n"}))
    (task,) = read_tasks(path)
    assert (task.inputs, task.compare(1.0, 1.0 + 1e-7)) == ((), False)
    for wrong, says in (
        ({"base_input": [1]}, "base_input must be a list of lists"),
        ({"base_input": [[1]], "atol": "x"}, "atol must be a number"),
        ({"test": 3}, "test must be a text"),
    ):
        path.write_text(json.dumps(line | wrong))
        with pytest.raises(InputError, match=f"line 1: {says}"):
            read_tasks(path)
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    with pytest.raises(InputError, match="line 2: the task 'X/1' is there twice"):
        read_tasks(path)


@pytest.mark.parametrize(
    ("tests", "same", "other"),
    [
        (["assert f(1) == (4, 5)"], (4, 5), (5, 4)),
        (["assert set(f(1)) == set((4, 5))", "assert set(f(2)) == {4}"], (5, 4), (5, 5)),
        (["assert sorted(f(1)) == [4, 5]"], (5, 4), (4,)),
        (["assert math.isclose(f(1), 4.0, rel_tol=0.001)"], 4.001, 4.1),
        (["assert set(f(1)) == {4, 5}", "assert f(2) == (4, 5)"], (4, 5), (5, 4)),
    ],
)
def test_answers_are_compared_as_tests_of_mbpp_do(tmp_path, tests, same, other):
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        json.dumps({"task_id": 2, "code": "def f(n): ...", "test_list": tests, "test_imports": ["import math"]})
    )
    (task,) = read_tasks(path)
    expected = 4.0 if "isclose" in tests[0] else (4, 5)
    assert task.compare(expected, same)
    assert not task.compare(expected, other)
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"task_id": 2, "solution": "a"}\n{"task_id": "Mbpp/2", "solution": "b"}\n')
    assert read_samples(samples, {task.id: task}) == {"Mbpp/2": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: must be an object"),
        ('{"task_id": "Y/1", "solution": ""}', "the task 'Y/1' is not among the 0"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, says):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_samples(path, {})
    path.write_text('{"task_id": "X/1"}')
    with pytest.raises(InputError, match="line 1: prompt must be a text"):
        read_tasks(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_tasks(tmp_path / "nothing.jsonl")
    good = {"task_id": 1, "code": "def f(): pass", "test_list": ["f()"]}
    for change, what in (
        ({"test_list": "f()"}, "test_list must hold texts"),
        ({"test_list": ["f("]}, "is not Python"),
        ({"test_list": ["1"]}, "calls a function"),
        ({"code": None}, "code and test_setup_code must hold texts"),
        ({"task_id": None}, "task_id must be"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=what):
            read_tasks(path)
