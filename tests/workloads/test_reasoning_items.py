"""Questions from templates: checked by an independent reading of their text."""

import re

import pytest

from assay.workloads import reasoning
from assay.workloads.reasoning import KINDS, LEVELS, PARTS, WORDINGS, Item, answer_of, items, prompt, right, stop


def solved(item):
    """The answer from the question's text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", item.question)]
    if item.kind in ("sum", "steps"):
        return str(eval(re.sub(r"[^\d+-]", "", item.question)))  # noqa: S307
    if item.kind == "story":
        count, price, *rest = numbers
        return str(count * price + (rest[0] if rest else 0) - (rest[1] if rest[1:] else 0))
    *told, asked = item.question[:-1].split(". ")
    (start,) = [s for s in told if not s.startswith("Every")]
    being, trait = start.split()[-1], asked.split()[-1]
    rules = {s.split()[1]: s.split()[2:] for s in told if s.startswith("Every")}
    while True:
        rule = rules[being]
        if rule[1] == "a":
            being = rule[2]
        else:
            assert rule[-1] == trait
            return "no" if "not" in rule else "yes"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_steps_are_right(kind):
    for level in range(1, LEVELS[kind] + 1):
        for item in items(kind, level=level, n=12):
            assert item.answer == solved(item), item
            assert right(item, "\n".join(item.steps))
            assert right(item, " " + item.answer + "\n")
            for step in item.steps:
                if found := re.search(r"(\d+) ([-+*]) (\d+) = (\d+)", step):
                    assert eval("".join(found.groups()[:3])) == int(found[4])  # noqa: S307
            assert not right(item, "")
            assert not right(item, "The answer is 9999999." if kind != "chain" else "maybe")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_share_no_question_and_a_seed_fixes_them(kind):
    level = LEVELS[kind]
    found = {part: {item.question for item in items(kind, level=level, n=20, part=part)} for part in PARTS}
    assert len(set().union(*found.values())) == 80
    for part, questions in found.items():
        assert {item.question for item in items(kind, level=level, n=20, part=part)} == questions
        assert {item.question for item in items(kind, level=level, n=20, part=part, seed=1)} != questions


def test_yes_and_no_are_as_frequent():
    share = sum(item.answer == "yes" for item in items("chain", level=3, n=200)) / 200
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("worked", [False, True])
def test_a_prompt_shows_examples_and_ends_where_the_answer_begins(kind, wording, worked):
    item = items(kind, level=2, n=1)[0]
    text = prompt(item, wording, shots=3, worked=worked)
    shown = reasoning.examples(kind, 2, 3)
    assert all(each.part == "shown" for each in shown)
    alone = prompt(item, wording, shots=0, worked=worked)
    assert text.endswith(alone[len(reasoning._TASKS[kind]) if wording == "task" else 0 :])
    for each in shown:
        block = prompt(each, wording, shots=0, worked=worked)
        begins = block[len(reasoning._TASKS[kind]) if wording == "task" else 0 :]
        after = text.partition(begins)[2]
        (end,) = stop(each, worked=worked)
        assert right(each, after.partition(end)[0])
    assert not text.endswith(" ")


def test_what_is_said_is_read():
    item = Item("steps", 1, "What is 1 + 2?", "3", ("1 + 2 = 3", "The answer is 3."))
    assert answer_of(item, "1 + 2 = 3\nThe answer is 3.\n\nWhat is 5 + 5?") == "3"
    assert answer_of(item, "1 + 2 = 3") == "3"
    assert answer_of(item, "-4") == "-4"
    assert answer_of(item, "9" * 100_000) == "9" * 40
    chain = items("chain", n=1)[0]
    assert answer_of(chain, " No.") == "no"
    assert answer_of(chain, "I know nothing") == ""


def test_too_many_and_unknown_are_refused():
    with pytest.raises(ValueError, match="n must be at most"):
        items("sum", level=1, n=500)
    for wrong in ({"kind": "x"}, {"kind": "sum", "level": 4}, {"kind": "sum", "part": "all"}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            items(**wrong)
    with pytest.raises(ValueError, match="wording"):
        prompt(items("sum", n=1)[0], "loud")
