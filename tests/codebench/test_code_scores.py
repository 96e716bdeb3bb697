"""Figures of one run of samples, held against sums done by hand."""

import gzip
import json

import pytest
from tests.tools import needs_sandbox

from assay.cli.main import main
from assay.codebench.scores import document, dps_of, eff_scores, problem_of, score
from assay.methods.core.programs.runs import Costs, Run, Settings

SETTINGS = Settings("operations", cases=1)


def costs(*levels):
    return Costs([[[level]] if not isinstance(level, str) else [level] for level in levels])


EXPERT, SLOW = costs(1e4, 2e4, 4e4), costs(2e4, 4e4, 16e4)
RUN = Run(
    "T/1",
    ["", "", "bad", ""],
    {"expert": EXPERT, "slow": SLOW},
    [EXPERT, costs(15e3, 3e4, 6e4), None, costs(1e4, 2e4, "time")],
)


def test_scores_of_a_task_by_hand():
    time_out = 2 * 4e4
    middle = (
        3 * (time_out - 15e3) / (time_out - 1e4)
        + 3 * (time_out - 3e4) / (time_out - 2e4)
        + 4 * (time_out - 6e4) / (time_out - 4e4)
    ) / 10
    assert eff_scores(RUN, SETTINGS) == pytest.approx([1.0, middle, 0.0, 0.6])
    found = dps_of(RUN, SETTINGS)
    assert [place.dps for place in found.places] == [100.0, 50.0, 0.0]
    problem = problem_of(RUN)
    assert (list(problem.best), problem.samples[2]) == ([4e4], None)


def test_figures_name_their_denominators():
    plain = Run("T/2", ["", "bad", "bad", "bad"])
    found = score([RUN, plain], SETTINGS, [1, 4, 5])
    by_name = {figure.name: figure for figure in found.figures}
    assert by_name["pass@1"].value == pytest.approx((0.75 + 0.25) / 2)
    assert (by_name["pass@1"].tasks, by_name["eff@1"].tasks) == (2, 1)
    assert by_name["pass@1 of these"].value == pytest.approx(0.75)
    assert by_name["eff@4"].value == pytest.approx(1.0)
    assert by_name["efficient@1"].value == 0.0  # nobody is strictly cheaper than the best
    assert by_name["efficient@1 within 1 %"].value == pytest.approx(0.25)
    assert by_name["eff@1"].low is None
    assert any("k = 5" in why for why in found.left_out)
    assert any("1 tasks have no references" in why for why in found.left_out)
    told = json.dumps(document([RUN, plain], found, SETTINGS), allow_nan=False)
    assert json.loads(told)["tasks"][1] == {
        "task": "T/2",
        "right": [True, False, False, False],
        "why": ["", "bad", "bad", "bad"],
    }
    with pytest.raises(ValueError, match="one or more"):
        score([], SETTINGS)


def test_a_task_that_does_not_answer_is_told_and_in_no_figure():
    broken = Run("T/2", [], unjudged="T/2: the right program must pass its own test")
    found = score([broken, RUN], SETTINGS, [1])
    assert found.figures == score([RUN], SETTINGS, [1]).figures
    assert "T/2 in all figures: the right program must pass its own test" in found.left_out
    assert document([broken, RUN], found, SETTINGS)["tasks"][0]["unjudged"].startswith("T/2")
    with pytest.raises(ValueError, match="must pass its own test"):
        score([broken], SETTINGS)


def test_only_wrong_samples_are_no_reason_to_fail():
    wrong = Run("T/3", ["bad"], {"expert": EXPERT, "slow": SLOW}, [None])
    by_name = {figure.name: figure.value for figure in score([wrong], SETTINGS).figures}
    assert by_name == {"pass@1": 0.0, "eff@1": 0.0, "efficient@1": 0.0, "efficient@1 within 1 %": 0.0}


def test_costs_of_efficient_at_k_are_means_without_the_extremes():
    repeats = [[[[10.0, 11.0, 12.0, 13.0, 20.0, 900.0]]] * 3, [[[10.0, 10.0, 15.0, 15.0, 15.0, 900.0]]] * 3]
    run = Run("T/4", [""], {"expert": Costs(repeats[0])}, [Costs(repeats[1])])
    problem = problem_of(run)
    assert (problem.best, problem.samples) == ([14.0], [[13.75]])  # the medians are the other way round
    assert {f.name: f.value for f in score([run], Settings("cpu_seconds", cases=1)).figures}["efficient@1"] == 1.0
    assert problem_of(Run("T/5", [""], {"expert": costs(1.0, 2.0, 3.0)}, [EXPERT])).best == [3.0]
    two = Costs([[[2.0, 4.0]]] * 3)
    assert problem_of(Run("T/6", [""], {"expert": two}, [two])).best == [3.0]


@pytest.mark.parametrize("sample", [costs(0.0, 0.0, 0.0), costs(1e5, 1e5, 9e5)])
def test_costs_that_the_meter_does_not_see_are_left_out_and_told(sample):
    """Programs that hold little more memory than the interpreter has anyway."""
    free = Run("T/7", [""], {"expert": costs(0.0, 0.0, 0.0), "slow": costs(0.0, 1e6, 9e6)}, [sample])
    found = score([free], Settings("peak_bytes", cases=1))
    by_name = {figure.name: figure.value for figure in found.figures}
    assert by_name == {"pass@1": 1.0, "DPS": 100.0 if not sample.levels[-1][0][0] else 50.0, "DPS_norm": by_name["DPS"]}
    assert len([why for why in found.left_out if "too little to be seen" in why]) == 2
    assert document([free], found, Settings("peak_bytes", cases=1))["tasks"][0]["score"] is None
    both = score([free, RUN], Settings("peak_bytes", cases=1))
    assert {figure.name: figure.tasks for figure in both.figures}["eff@1"] == 1


def test_the_command_line_scores_a_file_of_samples(tmp_path, capsys):
    from assay.workloads.programs.task import bank

    task = bank()["HumanEval/139"]  # factorials of factorials: of all, it counts the fewest operations
    samples = tmp_path / "samples.jsonl"
    lines = [
        {"task_id": task.id, "solution": task.programs["expert"]},
        {"task_id": task.id, "solution": "def f(): pass"},
    ]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = [
        "code",
        "score",
        str(samples),
        "--tasks",
        "humaneval",
        "--meter",
        "operations",
        "--journal",
        str(tmp_path / "j.jsonl"),
    ]
    assert main([*run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert figures["pass@1"] == 0.5
    assert 0.45 <= figures["eff@1"] <= 0.55
    assert main([*run, "--k", "1,3"]) == 0
    out = capsys.readouterr().out
    assert "over 1 tasks" in out
    assert "left out: k = 3" in out
    for arguments, says in [
        ((str(samples), "--tasks", "humaneval", "--meter", "x"), "--meter must be one of"),
        ((str(samples), "--tasks", "humaneval", "--k", "a"), "--k must be whole numbers"),
        ((str(tmp_path / "none"), "--tasks", "humaneval"), "cannot be read"),
        ((str(samples), "--tasks", str(tmp_path / "none")), "cannot be read"),
    ]:
        assert main(["code", "score", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_files_that_are_broken_within_take_one_line(tmp_path, capsys):
    deep, packed = tmp_path / "deep.jsonl", tmp_path / "broken.jsonl.gz"
    deep.write_text("[" * 100_000)
    whole = bytearray(gzip.compress(b'{"task_id": "HumanEval/0", "completion": ""}\n' * 500))
    whole[15] ^= 255
    whole[20] ^= 255
    packed.write_bytes(whole)
    for path in (deep, packed):
        for arguments in ((str(path), "--tasks", "humaneval"), (str(deep), "--tasks", str(path))):
            assert main(["code", "score", *arguments]) == 2
            assert f"{path} cannot be read" in capsys.readouterr().err


def test_samples_that_are_only_judged_are_held_against_no_reference(tmp_path, capsys):
    needs_sandbox()
    tasks, samples = tmp_path / "tasks.jsonl", tmp_path / "samples.jsonl"
    tasks.write_text(
        json.dumps({"task_id": 1, "text": "", "code": "def f(n):\n    return n\n", "test_list": ["assert f(3) == 3"]})
    )
    texts = ["def f(n): return n", "def f(n): exit(0)", "def f(n): import os; os._exit(0)"]
    samples.write_text("".join(json.dumps({"task_id": 1, "solution": text}) + "\n" for text in texts))
    assert (
        main(["code", "score", str(samples), "--tasks", str(tasks), "--journal", str(tmp_path / "j"), "--k", "1,2"])
        == 0
    )
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [["pass@1", "0.333"], ["pass@2", "0.667"]]
    assert "references and inputs" not in out
