"""The bank of data-science tasks: every solution passes, every wrong program fails, and the judge tells them apart by what counts."""

import copy
import json
import random

import numpy as np
import pytest

from assay.workloads.programs.datascience import KINDS, LEVELS, Task, harness, judging, load, similarity, tables

TASKS = load()
IDS = [task.id for task in TASKS]
LIGHT = [task for task in TASKS if not {"matplotlib", "scikit-learn"} & set(task.needs)]
"""What is tried in every run; to load scikit-learn and to draw takes longer than all else here."""
PARAMETERS = [
    pytest.param(
        task, id=task.id, marks=() if task in LIGHT or task.entry_point == "plot_ranking" else pytest.mark.slow
    )
    for task in TASKS
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")


def installed(task):
    for package in task.needs:
        pytest.importorskip({"scikit-learn": "sklearn"}.get(package, package))


def fault(task, program, *, seed=0):
    """What is wrong with one of our own programs, which may run in this process; a program that raises has a fault too."""
    for arguments in task.cases(seed):
        given = json.loads(json.dumps(arguments))
        try:
            got = harness.run(program, task.entry_point, given, task.kind)
        except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        if found := task.fault(arguments, json.loads(json.dumps(got))):
            return found
    return ""


def test_there_are_enough_of_every_kind_and_level():
    assert len(TASKS) > 60
    assert len(set(IDS)) == len(TASKS)
    for kind in KINDS:
        for level in LEVELS:
            assert len(load(kind=kind, level=level)) >= 7
    with pytest.raises(ValueError, match="kind"):
        load(kind="plots")
    with pytest.raises(ValueError, match="level"):
        load(level="harder")


@pytest.mark.parametrize("task", PARAMETERS)
def test_the_solution_passes_and_the_wrong_programs_fail(task):
    installed(task)
    assert fault(task, task.solution) == ""
    assert 1 <= len(task.wrong) <= 2
    for why, program in task.wrong.items():
        assert fault(task, program), f"passes: {why}"


@pytest.mark.parametrize("task", [one for one in PARAMETERS if one.values[0].kind != "visualization"])
def test_on_other_data_the_solution_passes_too(task):
    """What is expected comes by another way than the solution, so that both would have to be wrong alike."""
    installed(task)
    for seed in (1, 2):
        assert fault(task, task.solution, seed=seed) == ""


@pytest.mark.parametrize("bank", [LIGHT, pytest.param(TASKS, marks=pytest.mark.slow)], ids=["light", "all"])
def test_cases_are_plain_fixed_and_other_for_other_seeds(bank):
    for task in bank:
        if "scikit-learn" in task.needs:
            pytest.importorskip("sklearn")
        cases = task.cases()
        assert cases == json.loads(json.dumps(cases)) == task.cases()
        assert cases
        before = copy.deepcopy(cases)
        for arguments in cases:
            task.expected(arguments)
        assert cases == before, f"{task.id}: what is expected changes its arguments"
    assert sum(task.cases(0) != task.cases(1) for task in load(kind="algorithm")) >= 20


@pytest.mark.slow
def test_known_numbers():
    """Against what is printed in books about these data sets."""
    pytest.importorskip("sklearn")
    iris = next(task for task in TASKS if task.entry_point == "mean_petal_length")
    assert iris.expected(iris.cases()[0]) == pytest.approx({"setosa": 1.462, "versicolor": 4.26, "virginica": 5.552})
    wine = next(task for task in TASKS if task.entry_point == "first_component_share")
    assert wine.expected(wine.cases()[0]) == pytest.approx(0.3620, abs=1e-4)


def test_a_known_distance():
    edit = next(task for task in TASKS if task.entry_point == "edit_distance")
    assert edit.expected(["kitten", "sitting"]) == 3


@pytest.mark.parametrize("bank", [LIGHT, pytest.param(TASKS, marks=pytest.mark.slow)], ids=["light", "all"])
def test_an_empty_answer_passes_nowhere(bank):
    for task in bank:
        if "scikit-learn" in task.needs:
            pytest.importorskip("sklearn")
        cases = task.cases()
        for nothing in (None, [], {"__dict__": []}, 0, ""):
            assert any(task.fault(arguments, nothing) for arguments in cases), (task.id, nothing)
        if task.kind == "visualization":
            assert task.fault(cases[0], {"axes": [], "picture": []})


def test_prompts_are_headers_of_functions_and_give_no_solution_away():
    for task in TASKS:
        compile(f"{task.prompt}    pass\n", "prompt", "exec")
        assert task.prompt.startswith(f"def {task.entry_point}(")
        assert task.solution not in task.prompt
        assert "import" not in task.prompt


def test_needs_are_named():
    assert {need for task in TASKS for need in task.needs} == {"pandas", "scikit-learn", "matplotlib"}
    for task in TASKS:
        assert ("import pandas" in task.solution) <= ("pandas" in task.needs)
        assert ("import matplotlib" in task.solution) == ("matplotlib" in task.needs)


def test_installed_leaves_out_what_is_not_there(monkeypatch):
    from assay.workloads.programs import datascience

    datascience._installed.cache_clear()
    monkeypatch.setattr(datascience.importlib.util, "find_spec", lambda name: None if name == "pandas" else object())
    found = load(installed=True)
    datascience._installed.cache_clear()
    assert found == [task for task in TASKS if "pandas" not in task.needs]
    assert 0 < len(found) < len(TASKS)


# ---------------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        (1, 1.0, True),
        (1.0, 1.0 + 1e-8, True),
        (1.0, 1.001, False),
        (0.0, 1e-9, True),
        (1, True, False),
        (True, 1, False),
        (None, None, True),
        (None, 0, False),
        ("a", "a", True),
        ("1", 1, False),
        ([1, 2], (1, 2), True),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, [["a", 1]], False),
        ({"a": [None, 2.0]}, {"a": [None, 2]}, True),
        (1.0, float("nan"), False),
        (float("inf"), float("inf"), True),
    ],
)
def test_what_is_the_same(expected, got, same):
    assert judging.same(expected, got) is same


def test_plain_values_come_back():
    value = {"a": [1, 2.5, None, True], 3: {"b": "c"}}
    assert judging.decoded(json.loads(json.dumps(harness.plain(value)))) == value
    assert harness.plain(np.float64(0.5)) == 0.5
    assert type(harness.plain(np.int64(3))) is int
    assert harness.plain(np.arange(3)) == [0, 1, 2]
    assert harness.plain({1, 2}) == [1, 2]
    with pytest.raises(TypeError, match="no plain value"):
        harness.plain(object())


def figure_of(draw):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    fig, ax = plt.subplots()
    draw(ax)
    fig.canvas.draw()
    found = harness.artists(fig)
    plt.close(fig)
    return found


def test_figures_are_judged_by_data_labels_and_scales_not_by_looks():
    wanted = {"lines": [{"x": [1, 2, 3], "y": [4, 5, 6], "label": "a"}], "xlabel": "t", "legend": ["a"]}

    def right(ax, **looks):
        ax.plot([1, 2, 3], [4, 5, 6], label="a", **looks)
        ax.set_xlabel("t")
        ax.legend()

    assert judging.figure_fault(wanted, figure_of(right)) == ""
    assert judging.figure_fault(wanted, figure_of(lambda ax: right(ax, color="red", lw=3, marker="o"))) == ""
    broken = {
        "other data": lambda ax: (ax.plot([1, 2, 3], [4, 5, 7], label="a"), ax.set_xlabel("t"), ax.legend()),
        "an axis label missing": lambda ax: (ax.plot([1, 2, 3], [4, 5, 6], label="a"), ax.legend()),
        "no legend": lambda ax: (ax.plot([1, 2, 3], [4, 5, 6], label="a"), ax.set_xlabel("t")),
        "another scale": lambda ax: (right(ax), ax.set_yscale("log")),
        "one more line": lambda ax: (right(ax), ax.plot([1, 2], [1, 2])),
        "bars too": lambda ax: (right(ax), ax.bar([1], [1])),
        "points in place of a line": lambda ax: (
            ax.scatter([1, 2, 3], [4, 5, 6], label="a"),
            ax.set_xlabel("t"),
            ax.legend(),
        ),
    }
    for why, draw in broken.items():
        assert judging.figure_fault(wanted, figure_of(draw)), why
    assert "axes" in judging.figure_fault([wanted, wanted], figure_of(right))


def test_the_same_plot_by_other_calls():
    points = {"points": [{"x": [1, 2], "y": [3, 4]}]}
    assert judging.figure_fault(points, figure_of(lambda ax: ax.plot([2, 1], [4, 3], "o"))) == ""
    named = {"lines": [{"x": [0, 1], "y": [1, 2], "label": "b"}, {"x": [0, 1], "y": [0, 3], "label": "a"}]}
    drawn = figure_of(lambda ax: (ax.plot([0, 1], [0, 3]), ax.plot([0, 1], [1, 2]), ax.legend(["a", "b"])))
    assert judging.figure_fault(named, drawn) == ""
    swapped = figure_of(lambda ax: (ax.plot([0, 1], [0, 3]), ax.plot([0, 1], [1, 2]), ax.legend(["b", "a"])))
    assert judging.figure_fault(named, swapped)
    with_bar = figure_of(lambda ax: ax.figure.colorbar(ax.imshow([[0, 1], [1, 0]])))
    assert judging.figure_fault({"images": [[[0, 1], [1, 0]]]}, with_bar) == ""


def test_bars_and_their_ticks_are_read_as_a_reader_sees_them():
    wanted = {"bars": [{"length": [1, 2, 3]}], "xticks": ["a", "b", "c"]}
    right = {
        "by names": lambda ax: ax.bar(["a", "b", "c"], [1, 2, 3]),
        "from the right on": lambda ax: (ax.bar([2, 1, 0], [3, 2, 1]), ax.set_xticks([0, 1, 2], ["a", "b", "c"])),
        "turned round": lambda ax: (ax.bar(["c", "b", "a"], [3, 2, 1]), ax.invert_xaxis()),
        "from their edges": lambda ax: ax.bar(["a", "b", "c"], [1, 2, 3], align="edge"),
    }
    wrong = {
        "names exchanged": lambda ax: (ax.bar([0, 1, 2], [1, 2, 3]), ax.set_xticks([2, 1, 0], ["a", "b", "c"])),
        "ticks beside the bars": lambda ax: (
            ax.bar([0, 1, 2], [1, 2, 3]),
            ax.set_xticks([0.5, 1.5, 2.5], ["a", "b", "c"]),
        ),
        "the other way round": lambda ax: (ax.bar(["a", "b", "c"], [1, 2, 3]), ax.invert_xaxis()),
    }
    for why, draw in right.items():
        assert judging.figure_fault(wanted, figure_of(draw)) == "", why
    for why, draw in wrong.items():
        assert judging.figure_fault(wanted, figure_of(draw)), why


def test_lines_may_run_either_way_and_straight_ones_have_points_between():
    wanted = {"lines": [{"x": [0, 4], "y": [1, 9]}]}
    for x, y in (([4, 0], [9, 1]), ([0, 1, 4], [1, 3, 9]), ([1, 4, 0, 2], [3, 9, 1, 5])):
        assert judging.figure_fault(wanted, figure_of(lambda ax, x=x, y=y: ax.plot(x, y))) == ""
    for x, y in (([0, 1, 4], [1, 4, 9]), ([0, 3], [1, 7]), ([0, 1, 3], [1, 3, 7])):
        assert judging.figure_fault(wanted, figure_of(lambda ax, x=x, y=y: ax.plot(x, y)))
    assert judging.figure_fault(wanted, figure_of(lambda ax: ax.step([0, 4], [1, 9])))


def test_titles_legends_and_texts_count_wherever_they_stand():
    wanted = {
        "lines": [{"x": [0, 1], "y": [0, 1], "label": "a"}],
        "title": "t",
        "legend": {"a"},
        "texts": ["1", "2", "3"],
    }

    def drawn(title, legend, places):
        def draw(ax):
            ax.plot([0, 1], [0, 1], label="a")
            title(ax)
            legend(ax)
            for x, y, text in places:
                ax.text(x, y, text)

        return figure_of(draw)

    places = [(0.5, 0.2, "3"), (0.8, 0.9, "2"), (0.1, 0.9, "1")]
    for title in (lambda ax: ax.set_title("t", loc="left"), lambda ax: ax.figure.suptitle("t")):
        for legend in (lambda ax: ax.legend(), lambda ax: ax.figure.legend()):
            assert judging.figure_fault(wanted, drawn(title, legend, places)) == ""
    exchanged = [(0.5, 0.2, "1"), (0.8, 0.9, "2"), (0.1, 0.9, "3")]
    assert judging.figure_fault(wanted, drawn(title, legend, exchanged))
    assert judging.figure_fault(wanted, drawn(title, lambda ax: None, places))


def test_wedges_come_in_their_order():
    wanted = {"wedges": [{"share": 0.25, "label": "a"}, {"share": 0.75, "label": "b"}]}
    assert judging.figure_fault(wanted, figure_of(lambda ax: ax.pie([1, 3], labels=["a", "b"], startangle=90))) == ""
    assert judging.figure_fault(wanted, figure_of(lambda ax: ax.pie([3, 1], labels=["b", "a"])))


PLOT = "import matplotlib.pyplot as plt\nimport numpy as np\n\n\n"
OTHER = {
    "plot_ranking": """def plot_ranking(scores):
    names = sorted(scores, key=scores.get, reverse=True)
    fig, ax = plt.subplots()
    ax.barh(names, [scores[name] for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("Score")
    return fig
""",
    "plot_two_stations": """def plot_two_stations(days, east, west):
    fig, ax = plt.subplots()
    ax.plot(days, west, label="west")
    ax.plot(days, east, label="east")
    ax.set_xlabel("Day")
    fig.legend()
    return fig
""",
    "plot_side_by_side": """def plot_side_by_side(x, speed, height):
    fig = plt.figure()
    right = fig.add_subplot(122, title="Height")
    right.plot(x, height, ".")
    left = fig.add_subplot(121, title="Speed")
    left.plot(x, speed)
    return fig
""",
}
FALSE = {
    "plot_ranking": """def plot_ranking(scores):
    names, n = sorted(scores, key=scores.get), len(scores)
    fig, ax = plt.subplots()
    ax.barh(range(n)[::-1], [scores[name] for name in names])
    ax.set_yticks(range(n)[::-1], names)
    ax.set_xlabel("Score")
    return fig
""",
    "plot_shares": """def plot_shares(amounts):
    names = sorted(amounts, key=amounts.get)
    fig, ax = plt.subplots()
    ax.pie([amounts[name] for name in names], labels=names)
    ax.set_title("Shares")
    return fig
""",
    "plot_side_by_side": """def plot_side_by_side(x, speed, height):
    fig, (one, other) = plt.subplots(2, 1)
    one.plot(x, speed)
    one.set_title("Speed")
    other.scatter(x, height)
    other.set_title("Height")
    return fig
""",
    "plot_climate": """def plot_climate(months, rain, temperature):
    fig, (one, other) = plt.subplots(2, 1)
    one.bar(months, rain)
    one.set_ylabel("Rain (mm)")
    other.plot(months, temperature)
    other.set_ylabel("Temperature (C)")
    return fig
""",
    "nearest_neighbours": """def nearest_neighbours(X, y, queries, k):
    found = []
    for query in queries:
        order = np.argsort(abs(X - query).sum(axis=1), kind="stable")[:k]
        labels, counts = np.unique(np.array(y)[order], return_counts=True)
        found.append(int(labels[counts.argmax()]))
    return found
""",
    "viterbi": """def viterbi(start, move, emit, seen):
    move, emit = np.array(move), np.array(emit)
    ahead, back = [np.array(start) * emit[:, seen[0]]], [np.ones(len(start))]
    for symbol in seen[1:]:
        ahead.append(ahead[-1] @ move * emit[:, symbol])
    for symbol in seen[:0:-1]:
        back.insert(0, move @ (emit[:, symbol] * back[0]))
    return [int((a * b).argmax()) for a, b in zip(ahead, back)]
""",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_right_program_of_another_kind_passes(name):
    pytest.importorskip("matplotlib")
    task = next(task for task in TASKS if task.entry_point == name)
    assert fault(task, PLOT + OTHER[name]) == ""


@pytest.mark.parametrize("name", FALSE)
def test_a_program_that_is_wrong_in_one_thing_does_not_pass(name):
    pytest.importorskip("matplotlib")
    task = next(task for task in TASKS if task.entry_point == name)
    assert fault(task, PLOT + FALSE[name])


def test_a_text_column_keeps_its_none():
    """Newer versions of pandas make NaN of it, and a program that asks for None, as the task says, would be wrong."""
    pytest.importorskip("pandas")
    found = harness.prepared({"__frame__": {"manager": [None, "a"], "temp": [None, 1.5], "name": ["a", "b"]}})
    assert found["manager"][0] is None
    assert found["temp"].dtype == float


def test_similarity_is_structural_similarity():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (60, 80))
    b = np.clip(a + rng.integers(-40, 40, a.shape), 0, 255)
    ours = similarity(a.tolist(), b.tolist())
    theirs, whole = metrics.structural_similarity(a.astype(float), b.astype(float), data_range=255, full=True)
    assert ours == pytest.approx(float(whole[3:-3, 3:-3].mean()), abs=1e-9)
    assert ours == pytest.approx(float(theirs), abs=1e-9)
    assert similarity(a, a) == pytest.approx(1)
    assert similarity(a, b) == pytest.approx(similarity(b, a))
    with pytest.raises(ValueError, match="one size"):
        similarity(a, a[:, :40])
    with pytest.raises(ValueError, match="at least 7"):
        similarity(a[:5], a[:5])


def test_a_wrong_plot_may_look_much_like_the_right_one():
    """Why pictures do not decide: most of both is white."""
    pytest.importorskip("matplotlib")
    task = next(task for task in TASKS if task.entry_point == "plot_years")
    (arguments,) = task.cases()
    pictures = [
        harness.run(program, task.entry_point, arguments, task.kind)["picture"]
        for program in (task.solution, task.wrong["no labels"])
    ]
    assert similarity(*pictures) > 0.7
    assert similarity(pictures[0], pictures[0]) == pytest.approx(1)


def test_small_tables_hold_what_makes_tasks_hard():
    rng = random.Random(0)
    found = tables.weather(rng)
    assert None in found["temp"]
    assert 0.0 in found["rain"]
    assert found["day"] != sorted(found["day"])
    staff = tables.staff(rng)
    assert len(set(staff["salary"])) < len(staff["salary"])
    visits = tables.visits(rng)
    assert visits["minute"] != sorted(visits["minute"])


def test_a_broken_cell_is_refused():
    from assay.workloads.programs import datascience

    cells = [("task", 'SIGNATURE = "def f(x)"\nTEXT = "?"\n'), ("wrong: why", "def f(x): ...\n")]
    with pytest.raises(ValueError, match="cells of f"):
        datascience._task("algorithm", "easy", cells)
    assert isinstance(TASKS[0], Task)
