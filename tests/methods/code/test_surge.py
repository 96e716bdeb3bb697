"""SURGE: extraction, scorers, items by real execution, trivial predictors, and what predicting costs against running."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tools import needs, needs_sandbox

from assay.methods.code import surge as room
from assay.methods.code.surge import Item, Score, extract, score
from assay.methods.core.sandbox import Sandbox
from assay.workloads.programs.surge import PARTS, sources
from assay.workloads.programs.surge.buggy import mutated

VARIANTS = ("paper", "as_released")
few = settings(max_examples=25, deadline=None)
TRUTHS = {
    ("ML", "python"): "[1, 2]",
    ("CL", "competition"): "3\n4\n\n5",
    ("RL", "python"): "total: 13",
    ("RL", "sudoku"): "1 2\n2 1",
    ("RL", "c++"): "9 2",
    ("SC", "numerical"): "3.5 -1.25",
    ("TC", "sorting"): "1 2 5 9",
    ("TC", "monte carlo"): "estimate of 3 runs: 3.14",
    ("TC", "counting"): "92",
    ("BG", "name"): "NameError: name 'x_' is not defined",
    ("DR", "char"): "-56",
    ("FL", "proof"): '{"pass": false, "errors": [{"line": 2, "message": "no q"}]}',
}


def item(component="ML", family="python", truth="4", *, name="a", group="", language="python", code="print(4)", **more):
    return Item(name, component, family, group or name, language, {"main": code}, "run main", truth, **more)


ITEMS = [item(*key, truth, name=f"{key}") for key, truth in TRUTHS.items()]
every_item = pytest.mark.parametrize("one", ITEMS, ids=lambda one: f"{one.component}-{one.family}")


# ------------------------------------------------------------------------------------------------------------------ the extractor


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Output: 7", "7"),
        ("It is 3.\n**Output:** **7**\n\nBecause 7.", "7"),
        ("Output:\n```python\n7\n 8\n```\nmore", "7\n 8"),
        ("Output:\n```\n7\n```", "7"),
        ("Output:\n```\n7", "7"),
        ("Output: it prints `7` twice", "7"),
        ("First\n```\nx = 1\n```\nOutput: 2\n\nend", "2"),
        ("Output: 1\nOutput: 2", "2"),
        ("```\nOutput: 5\n```", "Output: 5"),
        ("```text\n7\n```", "7"),
        ("", ""),
    ],
)
def test_answers_are_found(reply, answer):
    assert extract(reply) == answer


@few
@given(st.text(alphabet="ab*`: \n\t7{}", max_size=40).filter(lambda text: "```" not in text))
def test_a_bare_answer_comes_back_and_extracting_is_idempotent(text):
    found = extract(text)
    assert found == room.bare(text)
    assert extract(found) == found
    for language in ("", "text", "python"):
        assert extract(f"So.\nOutput:\n```{language}\n{found}\n```\n") == found


def test_the_released_steps_lose_stars_and_paragraphs():
    for bare, left in (("**a** b", "b"), ("a\n\nb", "a"), ("**", "")):
        assert extract(bare) == bare
        assert extract(bare, variant="as_released") == left
    for reply, answer in (
        ("x Output: **4**", ""),  # bold words go with their marks
        ("**Output:** 7", "7"),
        ("Output: 1\nOutput: 2", "1\nOutput: 2"),  # from the first
        ("Output: `7`\n```text\n8\n\n9\n```\n", "8\n\n9"),
        ("Output:\n```\n7", "```\n7"),  # not closed
        ("Output: `a\nb` c", "a\nb"),
    ):
        assert extract(reply, variant="as_released") == answer


@pytest.mark.parametrize("bad", [{"text": 3}, {"text": "a", "variant": "other"}])
def test_extract_names_what_is_wrong(bad):
    with pytest.raises((TypeError, ValueError), match=r"text must be|variant must be"):
        extract(**bad)


# ------------------------------------------------------------------------------------------------------------------- the scorers


@every_item
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_truth_scores_1_and_nothing_scores_0(one, variant):
    reply = one.truth if variant == "as_released" and one.component == "FL" else room.continued(one.truth)
    assert score(one, reply, variant=variant) == Score(1.0, "right")
    assert score(one, one.truth) == Score(1.0, "right")  # bare
    for nothing in ("", "Output:", "Output:\n```\n\n```"):
        assert score(one, nothing, variant=variant).value == 0


@every_item
@few
@given(reply=st.text(alphabet='0123456789.-e :ab\n{}[]"', max_size=30))
def test_scores_lie_between_0_and_1(one, reply):
    for variant in VARIANTS:
        assert 0 <= score(one, reply, variant=variant).value <= 1


def test_unparsable_is_told_from_wrong_but_not_as_released():
    one = item("SC", "numerical", "2.0")
    assert score(one, "Output: no idea") == Score(0.0, "unparsable")
    assert score(one, "Output: no idea", variant="as_released").state == "wrong"
    assert score(one, "Output: 400").state == "wrong"
    assert score(one, "Output: 1.9").state == "partly"


@few
@given(st.text(alphabet="abAB \n", max_size=12), st.text(alphabet="abAB \n", max_size=12))
def test_jaccard_is_symmetric(a, b):
    assert room.jaccard(a, b) == room.jaccard(b, a) == room.jaccard(a.upper(), b)


def test_jaccard_of_words():
    assert room.jaccard("A b c", "b C d") == 0.5
    assert room.jaccard("", "") == 1
    assert room.jaccard("", "a") == 0


LISTS = st.lists(st.floats(0.5, 50).map(lambda x: round(x, 3)), min_size=1, max_size=6)


def text(values):
    return " ".join(f"{value:.12g}" for value in values)


@few
@given(LISTS, LISTS, st.sampled_from([0.5, 3.0, 1000.0]))
def test_the_numerical_score_is_the_same_in_other_units(found, wanted, unit):
    for variant in VARIANTS:
        plain = room.numerical(text(found), text(wanted), variant=variant)
        scaled = room.numerical(text(np.array(found) * unit), text(np.array(wanted) * unit), variant=variant)
        assert scaled == pytest.approx(plain, abs=1e-7)


@few
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=7), st.data())
def test_the_sorting_score_is_the_same_after_a_rising_map(wanted, data):
    found = data.draw(st.lists(st.integers(-50, 50), min_size=len(wanted), max_size=len(wanted)))
    mapped = [x**3 + x for x in found]
    plain, after = (room.sorting(text(values), text(wanted)) for values in (found, mapped))
    if len(set(wanted)) > 1:
        assert after == pytest.approx(plain)


def test_the_sorting_score_is_spearmans():
    assert room.sorting("1 2 3 5 4", "1 2 3 4 5") == pytest.approx(0.9)  # 1 - 6 * 2 / (5 * 24)
    assert room.sorting("2 1 2", "1 2 3") == pytest.approx(0)
    assert room.sorting("1 2 2 4", "1 2 3 4") == pytest.approx(4.5 / np.sqrt(4.5 * 5))  # equal ones at their mean place
    assert room.sorting("3 3", "3 3") == 1
    assert room.sorting("4 4", "3 3") == 0


def test_lists_of_other_lengths():
    assert room.numerical("1 2 3 4 5 6", "1 2 3", variant="as_released") == 1  # cut off
    for found in ("1 2 3 4 5 6", "1 2", "none"):
        assert room.sorting(found, "1 2 3", variant="as_released") == 0  # ranks of other lengths
    assert room.sorting("3 2 1", "1 2 3", variant="as_released") == 0
    assert room.sorting("1 3 2", "1 2 3", variant="as_released") == 0.5
    for rule in (room.numerical, room.sorting):
        assert rule("1 2 3 4 5 6", "1 2 3") == 0.5
        assert rule("none", "1 2") is None
    assert room.numerical("1", "1 2") == 0.5
    assert room.numerical("1", "1 2", variant="as_released") == pytest.approx(0.5)
    assert room.numerical("0 5", "0 5") == 1
    assert room.numerical("0.001 5", "0 5") == 0  # a true 0 takes nothing beside it
    assert room.monte_carlo("of 9 runs: 3.0", "of 3 runs: 3.0") == 1


def test_the_ratio_has_the_truth_first():
    assert (room.ratio("tide", "diet"), room.ratio("diet", "tide")) == (0.5, 0.25)  # it is not symmetric
    many = "ab" * 150
    assert room.ratio(f"x{many}", many) > 0.99
    assert room.ratio(f"x{many}", many, variant="as_released") == 0  # what is frequent is junk there


def verdict(*errors, passed=False):
    return json.dumps({"pass": passed, "errors": [{"line": line, "message": said} for line, said in errors]})


def test_verdicts_on_proofs():
    good, bad = verdict(passed=True), verdict((2, "a b"), (5, "c"))
    assert room.formal(good, good) == 1
    assert room.formal(good, bad) == room.formal(bad, good) == 0
    assert room.formal(verdict((2, "a")), bad) == 0.25  # half of one message of two
    assert room.formal(verdict((3, "a b")), bad) == 0  # another line
    assert room.formal(verdict((2, "x"), (2, "a b"), (5, "c")), bad) == 1  # the best on the line
    assert room.formal(verdict((2, "x"), (2, "a b"), (5, "c")), bad, variant="as_released") == 0.5
    assert room.formal(verdict(), verdict()) == 1  # no true errors: none predicted
    assert room.formal(verdict((1, "a")), verdict()) == 0
    assert room.formal("pass", good) is None
    assert room.formal('{"pass": 1}', good) is None
    assert room.formal('{"pass": false, "errors": [{"line": true, "message": ""}]}', good) is None


def test_a_fence_around_a_verdict_is_taken_off_but_not_as_released():
    one = item("FL", "proof", verdict(passed=True))
    fenced = f"```json\n{one.truth}\n```"
    assert score(one, fenced).value == 1
    for other in (fenced, f"Output: {one.truth}"):
        assert score(one, other).value == 1
        assert score(one, other, variant="as_released").value == 0


def test_rules_follow_component_and_family():
    assert [room.rule_of(one.component, one.family) for one in ITEMS] == [
        "exact", "exact", "ratio", "ratio", "exact", "numerical", "sorting", "monte carlo", "exact", "jaccard",
        "jaccard", "formal",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="component must be one of"):
        room.rule_of("XX", "")
    for rule in (room.numerical, room.sorting):
        with pytest.raises(ValueError, match="truth must hold a number"):
            rule("1", "none")
    with pytest.raises(ValueError, match="truth must be a verdict"):
        room.formal("{}", "none")


# ------------------------------------------------------------------------------------------------------ prompts, parts and files


def test_the_papers_counts():
    assert list(room.COUNTS.values()) == [150, 150, 60, 150, 150, 150, 200, 150]
    assert sum(room.COUNTS.values()) == 1160
    assert set(PARTS) == set(room.COUNTS)


POOL = [
    item(component, "python", f"{component}{n}{k}", name=f"{component}/{n}/{k}", group=f"{component}/{n}",
         code=f"program {component} {n}", given=f"{k}")
    for component in ("ML", "BG") for n in range(8) for k in range(2)
]  # fmt: skip


def test_no_program_is_on_both_sides():
    learned, judged = room.split(POOL)
    assert not {one.group for one in learned} & {one.group for one in judged}
    assert len(learned) == len(judged) == 16
    shared = [*POOL, item("TC", "counting", "1", name="again", group=POOL[0].group)]
    learned, judged = room.split(shared)
    assert not {one.group for one in learned} & {one.group for one in judged}


def test_the_three_prompts():
    learned, judged = room.split(POOL)
    one = judged[0]
    shots = room.shots_for(one, learned)
    assert len({shot.group for shot in shots}) == 3
    assert {shot.component for shot in shots} == {one.component}
    texts = {form: room.prompt(one, form, shots if form == "3-shot" else ()) for form in room.FORMS}
    assert len(set(texts.values())) == 3
    assert all(one.code in asked and one.truth not in asked for asked in texts.values())
    assert all(shot.truth in texts["3-shot"] for shot in shots)
    assert "step by step" in texts["chain of thought"]
    with pytest.raises(ValueError, match="shots must be 3 items for 3-shot, got 0"):
        room.prompt(one, "3-shot")
    with pytest.raises(ValueError, match="shots must be of other programs"):
        room.prompt(one, "3-shot", [one, *shots[:2]])
    with pytest.raises(ValueError, match="learned must hold 3 groups"):
        room.shots_for(one, learned[:2])


def test_several_files_and_stdin_are_shown():
    one = Item("r", "RL", "python", "r", "python", {"main.py": "a", "b.py": "c"}, "python main.py", "4", stdin="7 8\n")
    asked = room.prompt(one)
    assert all(part in asked for part in ("[main.py]\na", "[b.py]\nc", "7 8", "python main.py"))


def test_items_in_a_file(tmp_path):
    path = tmp_path / "items.jsonl"
    room.write(path, ITEMS)
    assert room.read(path) == ITEMS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[0]]))
    with pytest.raises(ValueError, match="line 3: the id .* stands twice"):
        room.read(path)
    for broken in ("[]", "{", '{"id": "a"}', lines[0].replace('"python"', "3")):
        path.write_text(broken)
        with pytest.raises(ValueError, match="line 1: no item"):
            room.read(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"component": "XX"}, "component must be"),
        ({"truth": " "}, "truth of a must not be empty"),
        ({"files": {}}, "files of a"),
    ],
)
def test_a_bad_item_is_named(change, says):
    good = room.as_doc(item())
    with pytest.raises(ValueError, match=says):
        room.of_doc(good | change)


def test_a_task_as_lm_eval_calls_it():
    """`doc_to_text(doc)`, a continuation, `process_results(doc, [continuation])`: a dict of numbers by metric."""
    for one in ITEMS:
        doc = json.loads(json.dumps(room.as_doc(one)))
        asked = room.doc_to_text(doc)
        assert asked == room.prompt(one)
        whole = f"{asked}{one.truth}\n```\nInput:"
        said = whole[len(asked) :]
        for stop in room.STOP[:1]:
            said = said.split(stop)[0]
        assert room.process_results(doc, [said]) == {"score": 1.0, "unparsable": 0.0}
    assert room.process_results(room.as_doc(ITEMS[5]), ["?"]) == {"score": 0.0, "unparsable": 1.0}
    with pytest.raises(ValueError, match="results must hold one text, got 2"):
        room.process_results(room.as_doc(ITEMS[0]), ["a", "b"])


# --------------------------------------------------------------------------------------------------------------- by real execution


def made(language, text, **more):
    name = {"python": "main.py", "c": "main.c", "node": "main.js", "sql": "", "formal": "proof.txt"}[language]
    told = {"component": "ML", "family": language, "stdin": "", "given": "", "flags": (), "wants": "output"} | more
    files = {name: text} if isinstance(text, str) else text
    return SimpleNamespace(
        **{"id": text if isinstance(text, str) else "?", "group": "g", "language": language} | told, files=files
    )


class Said(Sandbox):
    """A sandbox whose programs print what a list says."""

    def __init__(self, *ends):
        self.ends = list(ends)

    def run(self, *_, **__):
        out, err = self.ends.pop(0)
        return SimpleNamespace(
            ok=not err, text=out, stderr=err.encode(), ended="exit", returncode=int(bool(err)), seconds=0.1
        )


@pytest.mark.parametrize(
    ("ends", "wants", "reason"),
    [
        ([("4\n", ""), ("5\n", "")], "output", "differs from run to run"),
        ([("", ""), ("", "")], "output", "prints nothing"),
        ([("", "bad"), ("", "bad")], "output", "it fails: bad"),
        ([("4", ""), ("4", "")], "error", "does not fail"),
        ([("4" * 3000, "")] * 2, "output", "3000 characters"),
        ([("a\n```\nb", "")] * 2, "output", "cannot be told from a reply"),
        ([("4", ""), ("", "bad")], "either", "differs from run to run"),
    ],
)
def test_what_is_no_item(ends, wants, reason):
    built = room.build([made("python", "x", wants=wants)], sandbox=Said(*ends))
    assert not built.items
    assert reason in built.refused["x"]


def test_items_by_real_execution():
    """Each language once, each truth from a run; run again, the same; and a program without the same output twice is left out."""
    needs_sandbox()
    for tool in ("gcc", "node"):
        needs(tool)
    c = '#include <stdio.h>\nint main(void) { int n; scanf("%d", &n); printf("%d\\n", n * N); return 0; }\n'
    sql = {
        "query.sql": "select a, null from t order by a;",
        "schema.sql": "create table t(a); insert into t values (2), (1);",
    }
    several = {"main.py": "from other import f\n\nprint(f())\n", "other.py": "def f():\n    return 'here'\n"}
    asked = [
        made("python", "print(2 + 2)"),
        made("python", "print(id(object()), __import__('time').time_ns())"),
        made("python", "x = y", wants="error", component="BG"),
        made("python", several, component="RL", id="several"),
        made("c", c, stdin="7\n", flags=("-DN=3", "-O0"), wants="either", component="DR"),
        made("c", "int main(void) { return x; }", wants="either", component="DR"),
        made("node", "console.log([10, 9].sort().join(' '))"),
        made("sql", sql, id="sql"),
        made("formal", "given p\nleft 1 q", component="FL"),
    ]
    built = room.build(asked)
    truths = {one.id: one.truth for one in built.items}
    assert list(built.refused) == [asked[1].id]
    assert truths["print(2 + 2)"] == "4"
    assert truths["x = y"].endswith("NameError: name 'y' is not defined")
    assert truths["several"] == "here"
    assert truths[c] == "21"
    assert "undeclared" in truths["int main(void) { return x; }"]
    assert truths[asked[6].id] == "10 9"
    assert truths["sql"] == "1|\n2|"
    assert json.loads(truths["given p\nleft 1 q"])["pass"] is False
    assert all(score(one, room.continued(one.truth)).value == 1 for one in built.items)
    assert all(one.seconds > 0 for one in built.items)


def test_a_missing_tool_is_told(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    built = room.build([made("node", "x")], sandbox=Said())
    assert "node is not installed" in built.refused["x"]


def test_commands_as_they_are_shown():
    assert room.command_of(made("c", "x", flags=("-std=c99",))) == "gcc -std=c99 main.c -o main && ./main"
    assert room.command_of(made("python", "x")) == "python main.py"


def test_the_checker():
    good = "given p\ngiven p > q\nmp 1 2 q\nand 1 3 p & q\nright 4 q\nor 5 r | q"
    assert json.loads(room.check(good)) == {"pass": True, "errors": []}
    bad = json.loads(room.check("given p\nmp 1 2 q\nmp 1 2 r\nleft 1 p\n\nor 1 q | r\nand 1 1 p"))
    assert [error["line"] for error in bad["errors"]] == [2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="proof must have a line"):
        room.check("\n")


# ----------------------------------------------------------------------------------------------------------- the programs themselves


def test_programs_have_ids_and_groups_of_their_own():
    found = sources()
    assert len({one.id for one in found}) == len(found) > 150
    assert {one.language for one in found} == {"python", "c", "cpp", "node", "sql", "formal"}
    for component in PARTS:
        groups = {one.group for one in found if one.component == component}
        assert len(groups) >= 6
    placed = {one.group: one.component for one in found}
    assert all(placed[one.group] == one.component for one in found)  # so that leaving out a component moves no other


@pytest.mark.parametrize("kind", ["name", "attribute", "kind", "zero", "index"])
def test_a_mutation_breaks_what_it_says(kind):
    program = "def f(a):\n    b = a[0] // 2 + a.count(1)\n    return b\n"
    held = {}
    exec(mutated(program, kind), held)
    errors = {
        "name": NameError, "attribute": AttributeError, "kind": TypeError, "zero": ZeroDivisionError, "index": IndexError,
    }  # fmt: skip
    with pytest.raises(errors[kind]):
        held["f"]([4, 1])
    assert mutated("x = 1\n", kind) is None


# --------------------------------------------------------------------------------------------------------- trivial predictors, reports


def test_trivial_predictors():
    learned = [
        item(truth="7", name="a", code="for i in range(3)", given="3"),
        item(truth="7", name="b", code="while x", given="4"),
        item(truth="9", name="c", code="sorted(values)", given="5"),
        item("BG", "name", "Error: name x", name="d"),
        item("BG", "name", "Error: name y", name="e"),
    ]
    asked = item(truth="8", name="z", code="sorted(numbers)", given="6")
    said = {name: extract(make(learned)(asked)) for name, make in room.BASELINES.items()}
    assert said == {
        "empty": "", "constant": "7", "nearest neighbour": "9", "error template": "7", "input copied": "6",
    }  # fmt: skip
    broken = item("BG", "name", "Error: name z", name="y")
    assert extract(room.template(learned)(broken)) in ("Error: name x", "Error: name y")
    assert extract(room.template(learned, share=0.6)(broken)) == "Error: name"
    assert extract(room.constant(learned)(item("DR", "x"))) == ""
    assert extract(room.nearest(learned)(item(truth="9", name="c", code="sorted(values)", given="5"))) == "7"


def test_the_strongest_is_chosen_without_the_group_it_is_scored_on():
    """Two items of one group share a truth: whoever saw the group would be right."""
    items = [item(truth=f"{n}", name=f"{n}/{k}", group=f"{n}", given="0") for n in range(4) for k in range(2)]
    assert room.strongest(items) == {"ML": "empty" if "0" not in {one.truth for one in items} else "input copied"}
    with pytest.raises(ValueError, match="learned must hold two groups"):
        room.strongest(items[:2])


def test_both_means_are_named_and_differ():
    items = [ITEMS[0], ITEMS[0], ITEMS[0], ITEMS[9]]
    found = room.report(items, room.scored(items, [items[0].truth, "", "x", items[3].truth]))
    assert found.by_component == {"ML": pytest.approx(1 / 3), "BG": 1.0}
    assert (found.macro, found.micro) == (pytest.approx(2 / 3), 0.5)
    assert (found.unparsable, found.right, found.items) == (0.25, 0.5, 4)
    assert found.as_dict()["by_language"] == {"python": 0.5}
    with pytest.raises(ValueError, match="replies must be one for each of 4 items, got 1"):
        room.scored(items, ["x"])
    with pytest.raises(ValueError, match="one or more and as many, got 0 and 0"):
        room.report([], [])


def test_break_even():
    assert room.break_even(0.5, 1.0) == 0.5  # always right: as long as the prediction itself
    assert room.break_even(0.5, 0.25) == 2.0
    assert room.break_even(0.5, 0) == math.inf
    t = room.break_even(0.3, 0.4)
    assert 0.3 + (1 - 0.4) * t == pytest.approx(t)
    items = [item(name=f"{n}", seconds=float(n)) for n in range(4)]
    scores = [Score(1.0, "right"), Score(0.5, "partly"), Score(0.0, "wrong"), Score(1.0, "right")]
    found = room.cost(items, scores, [1.0] * 4, [10, 20, 30, 40])
    assert (found.accuracy, found.break_even, found.longer, found.tokens) == (0.5, 2.0, 0.25, 25)
    never = room.cost(items, [Score(0.0, "wrong")] * 4, [1.0] * 4, [1] * 4)
    assert (never.as_dict()["break_even"], never.longer) == (None, 0)
    for bad in ((0, 0.5), (1, 1.5), (1, math.nan)):
        with pytest.raises(ValueError, match=r"seconds must be|accuracy must be"):
            room.break_even(*bad)
    with pytest.raises(ValueError, match="as many"):
        room.cost(items, scores, [1.0], [1])
