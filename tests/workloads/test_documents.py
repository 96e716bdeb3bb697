"""Documents of the standard library and questions about them: checked against the classes themselves."""

import importlib
import random

import pytest

from assay.workloads.documents import (
    PARTS,
    SAME,
    TASKS,
    documents,
    exact,
    follow_up,
    looked_up,
    questions,
    right,
)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_what_the_classes_say(task):
    """Imported and asked for their bases, which the documents were not."""
    checked = 0
    for each in random.Random(0).sample(questions(task, n=20), 20):
        document = documents()[each.gold[0]]
        try:
            found = getattr(importlib.import_module(document.module), document.name)
        except (ImportError, AttributeError):  # of another system
            continue
        (base, *_) = found.__bases__
        wanted = {
            "base": base.__name__,
            "grand": base.__base__.__name__ if base.__base__ else "",
            "module": base.__module__,
        }
        assert each.answer == wanted[task], each
        checked += 1
    assert checked > 12


@pytest.mark.parametrize("task", TASKS)
def test_the_program_answers_from_its_documents_and_not_without_them(task):
    texts = [each.text for each in documents()]
    for each in questions(task, n=16):
        gold = [texts[i] for i in each.gold]
        assert looked_up(each.question, gold) == each.answer
        assert looked_up(each.question, gold[::-1]) == each.answer
        for i in range(len(gold)):
            assert looked_up(each.question, gold[:i] + gold[i + 1 :]) != each.answer
        for (question, answer), text in zip(each.steps, gold, strict=True):
            assert looked_up(question, [text]) == answer
        assert len(each.steps) == (1 if task == "base" else 2)


@pytest.mark.parametrize("task", TASKS)
def test_the_rule_asks_what_leads_to_the_answer(task):
    for each in questions(task, n=8):
        asked, answers = [], []
        while question := follow_up(each.question, answers):
            asked.append(question)
            answers.append(each.steps[len(answers)][1])
        assert asked == ([] if task == "base" else [question for question, _ in each.steps])


def test_a_follow_up_takes_the_name_of_a_sentence():
    asked = "Which class does the base class of Mozilla inherit from?"
    assert follow_up(asked, [" webbrowser.UnixBrowser.\n"]) == "Which class does UnixBrowser inherit from?"
    assert follow_up(asked, [""]) == "Which class does nothing inherit from?"


def test_parts_share_no_class_and_no_answer_is_a_good_guess():
    for task in TASKS:
        found = {part: questions(task, n=6, part=part) for part in PARTS}
        names = [each.steps[0][0] for part in PARTS for each in found[part]]
        assert len(set(names)) == len(names)
        for part, asked in found.items():
            assert {each.part for each in asked} == {part}
            answers = [each.answer for each in asked]
            assert max(answers.count(answer) for answer in answers) <= SAME
            assert "object" not in answers
            assert questions(task, n=6, part=part) == asked != questions(task, n=6, part=part, seed=1)
    of_parts = {
        task: {part: {q.steps[0][0] for q in questions(task, n=6, part=part)} for part in PARTS} for task in TASKS
    }
    assert not of_parts["base"]["shown"] & of_parts["grand"]["judged"]  # nor another task's


def test_an_answer_counts_as_a_whole_name_on_the_first_line():
    each = next(q for q in questions("base", n=20) if q.answer.isidentifier())
    for text in (f" {each.answer}\n", f" It inherits from some.{each.answer}.", f"\n{each.answer}"):
        assert right(each, text), text
    for text in ("", f" {each.answer}Too", f" My{each.answer}", f" nothing\n{each.answer}"):
        assert not right(each, text), text
    assert exact(each, f" {each.answer}.\n")
    assert not exact(each, f" It is {each.answer}")


def test_too_many_or_unknown_is_named():
    for call, words in (
        (lambda: questions("base", n=99999), "n must be at most"),
        (lambda: questions("all", n=1), "task"),
        (lambda: questions("base", n=1, part="test"), "part"),
        (lambda: questions("base", n=0), "n must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
