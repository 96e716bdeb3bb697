"""The experiment on programs: the report says what is in the outcomes, nothing depends on names, and misuse is seen."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from tests.tools import needs_sandbox

from assay.errors import InputError
from assay.methods.code import llm4ds as room
from assay.methods.code.llm4ds import Experiment, Outcome, Retrieval, Sandboxed, TableRules, Writer, read
from assay.methods.core.programs.hypotheses import binomial, friedman, holm, independence, mcnemar
from assay.workloads.programs.datascience import HARNESS, harness, load, similarity

KINDS, LEVELS = ("analytical", "algorithm", "visualization"), ("easy", "medium", "hard")


@pytest.fixture
def sandbox():
    needs_sandbox()


def tasks(n=90):
    return {f"t{i:03d}": {"kind": KINDS[i % 3], "level": LEVELS[i // 3 % 3]} for i in range(n)}


def simulated(rates, n=90, *, attempts=1, seed=0, tilt=0.0, versions=False, hardness=0.0):
    """Models with known success rates; `tilt` is lost from level to level, `hardness` the spread of tasks."""
    rng = random.Random(seed)
    of = tasks(n)
    models = dict.fromkeys(rates, "2026-01-01") if versions else list(rates)
    experiment = Experiment(of, models)
    shift = {task: rng.gauss(0, hardness) for task in of}
    for name, rate in rates.items():
        for task, own in of.items():
            for attempt in range(1, attempts + 1):
                chance = rate - tilt * (LEVELS.index(own["level"]) - 1) + shift[task]
                won = rng.random() < chance
                seconds = rng.lognormvariate(-3 + (name == "slow"), 0.5)
                alike = rng.random() if own["kind"] == "visualization" else None
                experiment.record([Outcome(task, name, won, attempt, seconds if won else None, alike)])
    return experiment


def renamed(experiment, models, of):
    """The same outcomes under other names of models and tasks."""
    found = Experiment(
        {of[task]: own for task, own in experiment.tasks.items()}, [models[name] for name in experiment.models]
    )
    found.record(
        Outcome(of[one.task], models[one.model], one.passed, one.attempt, one.seconds, one.similarity)
        for one in experiment.outcomes
    )
    return found


# ---------------------------------------------------------------------------------------------------------------- the report


def test_success_is_the_exact_test_with_holm_over_models():
    experiment = simulated({"a": 0.75, "b": 0.6, "c": 0.4})
    report = experiment.report(p0=[0.5, 0.6])
    for rate in (0.5, 0.6):
        answers = [answer for answer in report.asked("success") if answer.about.endswith(f" {rate:g}")]
        won = [sum(o.passed for o in experiment.outcomes if o.model == m) for m in "abc"]
        raw = [binomial(k, 90, rate).p for k in won]
        assert [answer.finding.p for answer in answers] == raw
        assert [answer.adjusted for answer in answers] == holm(raw)
        assert [answer.significant for answer in answers] == [p <= 0.05 for p in holm(raw)]
    assert report.rates["a"].low < report.rates["a"].median < report.rates["a"].high


def test_other_names_change_nothing():
    one = simulated({"a": 0.8, "b": 0.6, "c": 0.3}, tilt=0.1)
    models, of = {"a": "z", "b": "x", "c": "y"}, {task: f"q{999 - int(task[1:])}" for task in tasks()}
    p = [sorted((a.question, a.adjusted) for a in e.report(p0=[0.5]).answers) for e in (one, renamed(one, models, of))]
    assert [q for q, _ in p[0]] == [q for q, _ in p[1]]
    assert [x for _, x in p[0]] == pytest.approx([x for _, x in p[1]], rel=1e-9)
    shuffled = Experiment(one.tasks, list(one.models))
    shuffled.record(random.Random(1).sample(one.outcomes, len(one.outcomes)))
    assert shuffled.report(p0=[0.5]) == one.report(p0=[0.5])


def test_each_question_is_answered_by_its_test():
    experiment = simulated({"fast": 0.9, "slow": 0.9, "weak": 0.5}, tilt=0.15)
    report = experiment.report(p0=[0.5])
    by = {name: {o.task: o for o in experiment.outcomes if o.model == name} for name in experiment.models}
    passed = {name: [own[task].passed for task in experiment.tasks] for name, own in by.items()}
    pairs = {answer.about: answer for answer in report.asked("pairs")}
    assert pairs["fast, weak"].finding == mcnemar(passed["fast"], passed["weak"])
    assert pairs["fast, weak"].significant
    assert not pairs["fast, slow"].significant
    assert not next(a for a in report.asked("equivalence") if a.about == "fast, weak").significant
    counts = [
        [
            sum(
                p
                for p, task in zip(passed["weak"], experiment.tasks, strict=True)
                if experiment.tasks[task]["level"] == level
            )
        ]
        for level in LEVELS
    ]
    table = [[won, 30 - won] for (won,) in counts]
    weak = next(answer for answer in report.asked("factor") if answer.about == "weak by level")
    assert weak.finding == independence(table)
    shared = [task for task in experiment.tasks if all(by[name][task].passed for name in by)]
    seconds = {name: [own[task].seconds for task in shared] for name, own in by.items()}
    same = next(answer for answer in report.asked("seconds") if answer.about == "same tasks")
    assert same.finding == friedman(seconds).overall
    assert same.significant
    assert next(a for a in report.asked("seconds") if a.about == "fast, slow").significant
    assert report.asked("similarity")
    assert any("apart" in a.about and "Kruskal" in a.finding.method for a in report.asked("seconds"))


def test_difficulty_that_matters_is_found_and_kind_that_does_not_is_not():
    report = simulated({"a": 0.6, "b": 0.6}, 180, tilt=0.3, seed=3).report(p0=[0.5])
    found = {answer.about: answer.significant for answer in report.asked("factor")}
    assert found["a by level"]
    assert found["all by level"]
    assert not found["a by kind"]


def test_known_rates_are_found_as_often_as_the_power_says_and_by_chance_seldom():
    """200 experiments: a model at the threshold is called better at most about as often as 5 %, whatever else takes part."""
    wrong = powered = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        won = rng.binomial(100, [0.5, 0.5, 0.5, 0.72])
        p = holm([binomial(int(k), 100, 0.5).p for k in won])
        wrong += min(p[:3]) <= 0.05
        powered += p[3] <= 0.05
    assert wrong <= 20
    assert powered >= 190


def test_the_text_says_rates_tests_and_what_to_mind():
    text = simulated({"a": 0.75, "b": 0.5}).report(p0=[0.5]).text()
    for part in (
        "2 models on 90 tasks", "95 % interval", "significantly above 50 %", "adjusted", "Cramer's V", "Kendall's W",
        "are conventions", "no equality", "One attempt a task", "No version or date is recorded for a, b", "tasks tell",
    ):  # fmt: skip
        assert part in text
    dated = simulated({"a": 0.75, "b": 0.5}, versions=True).report(p0=[0.5])
    assert not any("No version" in guard for guard in dated.guards)
    json.dumps(dated.as_dict())


def test_power_is_said_for_these_tasks_and_for_a_difference():
    (line,) = simulated({"a": 0.75}, 100).report(p0=[0.6]).power
    assert "100 tasks tell 73 % from 60 %" in line or "100 tasks tell 72 % from 60 %" in line
    assert "70 % takes" in line


# -------------------------------------------------------------------------------------------------------------------- misuse


def test_several_attempts_are_not_so_many_tasks():
    experiment = simulated({"a": 0.6, "b": 0.5}, 30, attempts=10, hardness=0.4)
    report = experiment.report(p0=[0.5])
    assert report.rates["a"].n == 30
    assert {answer.finding.n for answer in report.asked("success")} == {30}
    (mixed,) = report.asked("attempts")
    assert "mixed" in mixed.finding.method
    assert mixed.finding.n == 30
    assert any("not independent" in guard for guard in report.guards)


def test_unequal_attempts_missing_tasks_and_tiny_cells_are_said():
    of = {**tasks(30), "rare1": {"kind": "rare", "level": "easy"}, "rare2": {"kind": "rare", "level": "hard"}}
    experiment = Experiment(of, ["a", "b"])
    for at, task in enumerate(of):
        experiment.record([Outcome(task, "a", at % 2 == 0)])
        if at > 2:
            experiment.record([Outcome(task, "b", at % 3 == 0), Outcome(task, "b", at % 2 == 0, 2)])
    report = experiment.report(p0=[0.5])
    said = "\n".join(report.guards)
    assert "3 of 32 tasks were not tried by every model" in said
    assert "1 to 2 attempts" in said
    assert "rare has fewer than 5 tasks" in said
    assert report.tasks == 29


def test_times_are_compared_on_what_all_solved_or_not_at_all():
    of = tasks(20)
    experiment = Experiment(of, ["a", "b", "c"])
    for at, task in enumerate(of):
        experiment.record(
            [
                Outcome(task, "a", at < 10, seconds=0.1 + at / 100),
                Outcome(task, "b", at >= 10, seconds=0.2 + at / 100),
                Outcome(task, "c", at < 2, seconds=0.3),
            ]
        )
    report = experiment.report(p0=[0.5])
    assert [answer.about for answer in report.asked("seconds")] == ["apart"]
    assert any("c left out" in guard for guard in report.guards)
    assert any("0 tasks that all have" in guard for guard in report.guards)


def test_one_model_is_compared_with_nobody():
    report = simulated({"a": 0.7}).report(p0=[0.5])
    assert {answer.question for answer in report.answers} == {"success", "factor"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Experiment({}, ["a"]), "tasks and models"),
        (lambda: Experiment(tasks(3), ["a", "a"]), "different names"),
        (lambda: Experiment(tasks(3), ["a"], factors=["size"]), "factor"),
        (lambda: Experiment(tasks(3), ["a"], metrics=["beauty"]), "metrics"),
        (lambda: Experiment(tasks(3), ["a"]).record([Outcome("t9", "a", True)]), "tasks and models"),
        (lambda: Experiment(tasks(3), ["a"]).record([Outcome("t000", "a", True)] * 2), "twice"),
        (lambda: Experiment(tasks(3), ["a"]).report(p0=[0.5]), "none of 'a'"),
        (lambda: simulated({"a": 0.5}).report(p0=[]), "p0"),
        (lambda: simulated({"a": 0.5}).report(p0=[1.0]), "p0"),
        (lambda: simulated({"a": 0.5}).report(p0=[0.5], margin=0), "margin"),
        (lambda: Outcome("t", "m", True, seconds=0.0), "seconds"),
        (lambda: Outcome("t", "m", True, seconds=float("nan")), "seconds"),
        (lambda: Outcome("t", "m", True, similarity=1.5), "similarity"),
        (lambda: Outcome("t", "m", True, attempt=0), "attempt"),
        (lambda: room.mixed_logistic({"a": {"t": (1, 2)}}), "at least 2 models"),
        (lambda: room.mixed_logistic({"a": {"t": (1, 2)}, "b": {"t": (2, 2)}}), "success and a failure"),
        (lambda: room.judge([], {"t": "x"}, lambda jobs: []), "programs"),
        (lambda: Retrieval(load()[:1]).nearest(load()[0]), "another task"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_outcomes_are_recorded_all_or_none():
    experiment = Experiment(tasks(3), ["a"])
    with pytest.raises(ValueError, match="tasks and models"):
        experiment.record([Outcome("t000", "a", True), Outcome("t9", "a", True)])
    assert experiment.outcomes == ()
    for wrong in ({"models": "a"}, {"models": ["a"], "factors": "level"}):
        with pytest.raises(TypeError, match="must be a list of names"):
            Experiment(tasks(3), **wrong)


def test_models_without_a_common_task_are_not_compared():
    experiment = Experiment(tasks(4), ["a", "b"])
    experiment.record([Outcome("t000", "a", True), Outcome("t001", "b", True)])
    with pytest.raises(ValueError, match="every model tried"):
        experiment.report(p0=[0.5])


# ------------------------------------------------------------------------------------------------------------ the mixed model


def test_the_mixed_model_finds_what_was_put_in():
    rng = np.random.default_rng(0)
    shifts = rng.normal(0, 1.5, 80)
    odds = {"a": 0.8, "b": 0.8, "c": -0.4}
    counts = {
        name: {f"t{i}": (int(rng.binomial(8, 1 / (1 + np.exp(-(own + shift))))), 8) for i, shift in enumerate(shifts)}
        for name, own in odds.items()
    }
    found = room.mixed_logistic(counts)
    assert found.finding.significant(0.001)
    assert found.spread == pytest.approx(1.5, abs=0.4)
    assert found.log_odds["a"] - found.log_odds["c"] == pytest.approx(1.2, abs=0.35)
    for name, own in counts.items():
        assert found.rates[name] == pytest.approx(sum(won for won, _ in own.values()) / 640, abs=0.06)


@pytest.mark.parametrize(("attempts", "spread"), [(1, 1.0), (40, 3.0), (400, 6.0)])
def test_the_likelihood_is_the_integral_over_difficulties(attempts, spread):
    """Against trapezoids a hundred times finer than the grid: with many attempts a task's difficulty is known closely."""
    from assay.methods.code.llm4ds import mixed

    rng = np.random.default_rng(attempts)
    odds, tries = np.array([0.6, -0.2]), np.full((6, 2), float(attempts))
    wins = rng.binomial(attempts, 1 / (1 + np.exp(-(odds + rng.normal(0, spread, (6, 1)))))).astype(float)
    ours = mixed._log_likelihood(odds, spread, wins, tries, *mixed._grid(2 * attempts))
    z = np.linspace(-9, 9, 60_001)
    at = odds[:, None] + spread * z
    each = wins @ -np.logaddexp(0, -at) + (tries - wins) @ -np.logaddexp(0, at) - z**2 / 2
    most = each.max(axis=1)
    whole = np.log(np.exp(each - most[:, None]).sum(axis=1) * (z[1] - z[0]) / np.sqrt(2 * np.pi)) + most
    assert ours == pytest.approx(whole.sum(), abs=1e-8)


def test_many_attempts_of_equal_models_do_not_differ():
    """They did where the integral was taken over too few difficulties."""
    rng = np.random.default_rng(7)
    chance = 1 / (1 + np.exp(-rng.normal(0, 4, 25)))
    counts = {m: {f"t{i}": (int(w), 300) for i, w in enumerate(rng.binomial(300, chance))} for m in "ab"}
    found = room.mixed_logistic(counts)
    assert found.spread == pytest.approx(4, abs=1.5)
    assert not found.finding.significant()
    assert abs(found.log_odds["a"] - found.log_odds["b"]) < 0.15


def test_attempts_counted_as_tasks_find_differences_that_are_none():
    """Two equal models whose attempts at a task come out alike: counted one by one they differ, tasks taken into account they do not."""
    rng = np.random.default_rng(4)
    naive = mixed = 0
    for _ in range(15):
        counts = {
            name: {
                f"t{i}": (int(rng.binomial(10, 1 / (1 + np.exp(-shift)))), 10)
                for i, shift in enumerate(rng.normal(0, 3, 25))
            }
            for name in "ab"
        }
        own = {f"{name}{task}": {name: of} for name, of_tasks in counts.items() for task, of in of_tasks.items()}
        by_model = {name: {key: of[name] for key, of in own.items() if name in of} for name in "ab"}  # other tasks each
        mixed += room.mixed_logistic(by_model).finding.significant()
        won = [sum(w for w, _ in counts[name].values()) for name in "ab"]
        naive += independence([[k, 250 - k] for k in won]).significant()
    assert naive >= 3
    assert mixed <= 2


# --------------------------------------------------------------------------------------------------------------- JSON lines


def test_outcomes_go_through_a_file(tmp_path):
    experiment = simulated({"a": 0.75, "b": 0.5}, 30, attempts=2)
    experiment.write(tmp_path / "outcomes.jsonl")
    again = read(tmp_path / "outcomes.jsonl")
    assert again.table() == experiment.table()
    assert again.report(p0=[0.5]) == experiment.report(p0=[0.5])
    assert set(again.table()[0]) == {"task", "model", "attempt", "kind", "level", "pass", "seconds", "similarity"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds none"),
        ('{"task": "t", "model": "m"}\n', "'pass' is missing"),
        ('{"task": "t", "model": "m", "pass": 1}\n', "passed must be True or False"),
        ("[]\n", "line 1"),
        ("not json\n", "line 1"),
        ('{"task": "t", "model": "m", "pass": true}\n{"task": "t", "model": "m", "pass": true}\n', "twice"),
        (
            '{"task": "t", "model": "m", "pass": true, "factors": {"level": "easy"}}\n'
            '{"task": "t", "model": "n", "pass": true, "factors": {"level": "hard"}}\n',
            "factors of task 't' differ",
        ),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "outcomes.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        read(tmp_path / "outcomes.jsonl")


# ---------------------------------------------------------------------------------------------------------------- contestants


def here(jobs):
    """Runs our own programs in this process."""
    found = []
    for task, program, cases in jobs:
        try:
            values = tuple(harness.run(program, task.entry_point, case, task.kind) for case in cases)
            found.append(room.Ran(json.loads(json.dumps(values)), "", 0.01))
        except (
            ArithmeticError,
            AttributeError,
            IndexError,
            KeyError,
            NameError,
            SyntaxError,
            TypeError,
            ValueError,
        ) as error:
            found.append(room.Ran(None, repr(error), 0.01))
    return found


EASY = [task for task in load() if not task.needs]


def test_retrieval_never_finds_the_task_itself():
    bank = load()
    contestant = Retrieval(bank)
    for task in bank[::7]:
        found = contestant.nearest(task)
        assert found.id != task.id
        program = contestant(task)
        assert found.solution in program
        assert program.endswith(f"{task.entry_point} = {found.entry_point}\n")
    twice = SimpleNamespace(
        **{name: getattr(bank[0], name) for name in ("prompt", "solution", "entry_point")}, id="copy"
    )
    assert Retrieval([*bank, twice]).nearest(bank[0]).id == "copy"


def test_rules_answer_questions_about_one_table_and_nothing_else():
    contestant = TableRules()
    programs = {task.id: contestant(task) for task in load()}
    assert not any(program for key, program in programs.items() if not key.startswith("analytical"))
    assert sum(map(bool, programs.values())) >= 5
    asked = SimpleNamespace(
        kind="analytical",
        entry_point="f",
        prompt='def f(rows):\n    """Cats: rows is a list of dicts with keys name, weight, age.\n    Return the mean weight of the '
        'cats whose age is above 3."""\n',
    )
    names = {}
    exec(contestant(asked), names)
    assert names["f"]([{"name": "a", "weight": 2.0, "age": 4}, {"name": "b", "weight": 9.0, "age": 3}]) == 2.0
    asked.prompt = asked.prompt.replace("mean weight", "number of lives")
    assert contestant(asked) == ""


def test_a_model_is_asked_with_the_template_of_the_kind():
    seen = []
    writer = Writer(lambda prompts: [seen.append(p) or "Here:\n```python\nx = 1\n```\nDone." for p in prompts], "m")
    found = writer.programs(load(level="easy"))
    assert len(found) == len(seen) == len(load(level="easy"))
    for task, asked in zip(load(level="easy"), seen, strict=True):
        assert task.prompt in asked
        assert ("matplotlib" in asked.replace(task.prompt, "")) == (task.kind == "visualization")
        assert found[task.id] == "x = 1\n"


def test_solutions_pass_wrong_programs_fail_and_nothing_is_nothing():
    right = room.judge(EASY, {task.id: task.solution for task in EASY}, here)
    assert all(verdict.passed for verdict in right.values())
    wrong = room.judge(EASY, {task.id: next(iter(task.wrong.values())) for task in EASY}, here)
    assert not any(verdict.passed for verdict in wrong.values())
    none = room.judge(EASY, {}, here)
    assert {verdict.fault for verdict in none.values()} == {"no program"}


def test_answers_that_are_no_plain_data_are_faults():
    for nonsense in ({"__dict__": [[[[]], 1]]}, {"a": 1}, {"__dict__": 3}, {"axes": [{}]}, {"axes": 4, "picture": 3}):
        for task in (EASY[0], load(kind="visualization")[0]):
            if task.kind == "visualization":
                pytest.importorskip("matplotlib")
            n = len(task.cases())
            found = room.judge([task], {task.id: "x"}, lambda jobs, n=n: [room.Ran((nonsense,) * n, "", 0.1)])  # noqa: B023
            assert not found[task.id].passed


def test_tried_gives_an_outcome_for_every_task_and_contestant():
    outcomes = room.tried(EASY, [Retrieval(EASY), Writer(lambda prompts: [""] * len(prompts), "silent")], here)
    assert len(outcomes) == 2 * len(EASY)
    assert not any(one.passed for one in outcomes if one.model == "silent")
    with pytest.raises(ValueError, match="different names"):
        room.tried(EASY, [TableRules(), TableRules()], here)


# ---------------------------------------------------------------------------------------------------------------- the sandbox


@pytest.mark.usefixtures("sandbox")
def test_in_the_sandbox_right_passes_and_trouble_is_told_apart():
    bare = HARNESS.read_text().replace('("numpy", "pandas", "matplotlib.pyplot")', "()")  # nothing here needs them
    assert "matplotlib.pyplot" not in bare
    runner = Sandboxed(bare, seconds=1.0)
    task = next(task for task in EASY if task.entry_point == "run_lengths")
    cases = task.cases()
    right = (json.dumps({"values": [task.expected(case) for case in cases], "seconds": 0.1}) + "\n").encode()
    programs = {
        "right": task.solution,
        "raises": "def run_lengths(values):\n    return 1 / 0\n",
        "no such name": "def other(values):\n    return []\n",
        "syntax": "def run_lengths(values:\n",
        "never ends": "def run_lengths(values):\n    while True:\n        pass\n",
        "ends it": "import os\ndef run_lengths(values):\n    os._exit(0)\n",
        "leaves": "raise SystemExit\n",
        "ends who serves it": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + task.solution,
        "answers for others": f"import os\nfor n in range(3, 40):\n    try:\n        os.write(n, {right!r})\n"
        "    except OSError:\n        pass\nos._exit(0)\n",
        "leaves one behind": "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n" + task.solution,
        "prints": "print('{}' * 99)\n" + task.solution,
        "right again": task.solution,
    }
    ran = dict(zip(programs, runner([(task, program, cases) for program in programs.values()]), strict=True))
    fine = {name for name, one in ran.items() if one.values is not None}
    assert fine == {"right", "prints", "leaves one behind", "right again"}
    assert "ZeroDivisionError" in ran["raises"].error
    assert "NameError" in ran["no such name"].error
    assert "SyntaxError" in ran["syntax"].error
    assert ran["right"].seconds < 0.5 <= ran["never ends"].seconds
    verdicts = room.judge([task], {task.id: programs["prints"]}, runner)
    assert verdicts[task.id].passed


@pytest.mark.usefixtures("sandbox")
@pytest.mark.slow
def test_in_the_sandbox_plots_are_read_and_compared():
    pytest.importorskip("matplotlib")
    plots = [task for task in load(kind="visualization", level="easy") if task.needs == ("matplotlib",)][:3]
    empty = "import matplotlib.pyplot as plt\n{} = lambda *_: plt.figure()\n"
    wrong = Writer(lambda prompts: [empty.format(task.entry_point) for task in plots], "empty figure")
    outcomes = room.tried(plots, [wrong], Sandboxed(HARNESS.read_text()), similarity=similarity)
    assert [one.passed for one in outcomes] == [False] * 3
    assert all(0 < one.similarity < 1 for one in outcomes)


@pytest.mark.usefixtures("sandbox")
@pytest.mark.slow
def test_in_the_sandbox_all_solutions_pass_and_all_wrong_programs_fail():
    bank = load(installed=True)
    runner = Sandboxed(HARNESS.read_text())
    assert all(v.passed for v in room.judge(bank, {task.id: task.solution for task in bank}, runner).values())
    for number in (0, 1):
        programs = {task.id: list(task.wrong.values())[number] for task in bank if len(task.wrong) > number}
        verdicts = room.judge(bank, programs, runner)
        assert not any(verdict.passed for verdict in verdicts.values())
