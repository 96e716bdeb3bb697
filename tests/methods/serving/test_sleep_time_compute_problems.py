"""Sleep-time compute: problems made stateful, numbers graded, and the gate that says when sleeping is worth it."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model, token_ids

from assay.methods.serving.sleep_time_compute import (
    Gate,
    Problem,
    grade,
    log_probability,
    number_in,
    pass_at_k,
    predictability,
    split,
    worth_sleeping,
)

# ------------------------------------------------------------------------------------------------------ problems and grades

PROBLEMS = [
    ("A pear costs $1.50. Ann buys 4. How much does she pay?", "How much does she pay?"),
    ("Dr. Lee sees 3 patients at 5 p.m. each day. How many in a week?", "How many in a week?"),
    ("Bob has 2 cats. He says 'I want more!' How many has he?", "How many has he?"),
    ("If Ann has 3 pears and eats one, how many are left?", "how many are left?"),
    ("J. Smith has plan B. How many plans are there?", "How many plans are there?"),
    ("A rod is 3.5 ft. long and is cut in two. Calculate the length of a piece.", "Calculate the length of a piece."),
]


@pytest.mark.parametrize(("problem", "question"), PROBLEMS)
def test_the_question_is_the_last_sentence(problem, question):
    found = split(problem)
    assert found.question == question
    assert found.context
    assert " ".join(found).split() == problem.split()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Ann has $1.50.", "Mr. Poe is 3.", "He left!", "It costs 2,000.5 dollars.", "Is it? ", "Why so..."]
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([" ", "\n", "  "]),
)
def test_context_and_question_are_the_problem(sentences, space):
    problem = space.join([*sentences, "How many are 3.5 of them?"])
    found = split(problem)
    assert found.question == "How many are 3.5 of them?"
    assert f"{found.context} {found.question}".split() == problem.split()
    numbers = re.findall(r"\d+", problem)
    assert re.findall(r"\d+", " ".join(found)) == numbers  # the answer is the same: no number was touched


def test_the_released_splitter_cuts_numbers_and_leaves_no_context():
    assert split("It costs $1.50. How much are 2?", variant="as_released") == ("It costs $1. 50.", "How much are 2?")
    assert split("How much are 2 of 3?", variant="as_released").context == "."
    assert split("One. Two.", variant="as_released") == ("One.", "Two")
    with pytest.raises(ValueError, match="context before its question"):
        split("How much are 2 of 3?")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 7.", 7),
        ("$1,234.50", Fraction(2469, 2)),
        ("so -3", -3),
        ("5 - 3 = 2", 2),
        ("10-4", 4),
        ("a 3/4 share...", Fraction(3, 4)),
        ("50%", 50),
        ("1. 2. 3.", 3),
        ("6 (see A4)", 6),
        ("7 pears or 1/0", 7),
        ("−$2.5", Fraction(-5, 2)),
        ("work 12 #### 1,000", 1000),
        ("0.1 + 0.2 = 0.3", Fraction(3, 10)),
        ("12,34", 34),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert number_in(text) == number


@given(st.integers(-(10**6), 10**6), st.integers(0, 3))
def test_a_number_is_graded_however_it_is_written(value, zeros):
    decimals = f".{'0' * zeros}" if zeros else ""
    for text in (f"{value}", f"= {value:,}{decimals}.", f"The answer is {value}{decimals}"):
        assert grade(text, f"so it is #### {value}")
    assert not grade(f"{value + 1}", f"{value}")
    assert not grade(f"{value}.0000001", f"{value}")


def test_the_released_grader_compares_texts():
    assert grade("It is $1,200.", "#### 1200", variant="as_released")
    assert not grade("It is 3.0", "#### 3", variant="as_released")
    assert not grade("It is 3 ...", "#### 3", variant="as_released")  # the dots are its last number
    assert grade("It is 3 ...", "#### 3")
    with pytest.raises(ValueError, match="expected"):
        grade("3", "three")


def test_pass_at_k_is_the_chance_of_a_right_one():
    assert pass_at_k(10, 0, 5) == 0
    assert pass_at_k(10, 10, 1) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    draws = np.random.default_rng(0).permuted(np.tile([1] * 3 + [0] * 7, (20000, 1)), axis=1)[:, :4]
    assert pass_at_k(10, 3, 4) == pytest.approx(draws.any(1).mean(), abs=0.02)
    with pytest.raises(ValueError, match="k must"):
        pass_at_k(3, 1, 4)


def test_a_long_problem_is_split_too():
    """Sentences are looked at from the end on, each with what is near to it: no text takes longer than its length asks."""
    many = "Mr. Poe has $1.50. " * 20_000
    assert split(many + "How many are 3?") == (many.strip(), "How many are 3?")
    assert split("!?" * 50_000 + " Who?").question == "Who?"
    for text in ("." * 100_000, "Mr. " * 20_000 + "Poe"):
        with pytest.raises(ValueError, match="context before its question"):
            split(text)


def test_numbers_of_any_length_are_read():
    for digits in (1000, 10_000):  # Python's int reads 4,300 from a text
        assert number_in("1 or " + "9" * digits) == 10**digits - 1
        assert not grade("1 or " + "9" * digits, "1")
    assert number_in("٣") == 3  # a digit of another script
    assert number_in("4 or -$-5") == 4  # two signs are no number


def test_an_ordinary_problem_is_made_stateful():
    made = Problem.of("Ann has 3 pears. She buys 1.5 more. How many has she?", "#### 4.5")
    assert made == Problem("Ann has 3 pears. She buys 1.5 more.", "How many has she?", "#### 4.5")
    assert Problem.of("A 1.5. B?", "1", variant="as_released").context == "A 1. 5."


# ------------------------------------------------------------------------------------------------------------------- gate


def test_predictability_is_the_sum_of_the_questions_log_probabilities():
    model = tiny_model()
    ids = token_ids(1, 12)[0].tolist()
    context, question = ids[:7], ids[7:]
    by_hand = 0.0
    with torch.no_grad():
        for n, token in enumerate(question):
            by_hand += float(model(torch.tensor([context + question[:n]])).logits[0, -1].log_softmax(-1)[token])
    assert log_probability(model, context, question) == pytest.approx(by_hand, rel=1e-4)
    # what a model says itself is the most predictable
    told = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 7:].tolist()
    assert log_probability(model, context, told) > log_probability(model, context, [(t + 1) % 97 for t in told])

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [2 + ord(c) % 90 for c in text]}

    assert predictability(model, tokenizer, "abc", "why") == pytest.approx(
        log_probability(model, tokenizer("abc")["input_ids"], tokenizer(" why", False)["input_ids"])
    )


def test_the_gate_learns_that_predictable_questions_save_more():
    rng = np.random.default_rng(0)
    log_p = rng.uniform(-60, 0, 400)
    saved = np.where(log_p > -30, 12.0, 0.0) + rng.normal(0, 2, 400)
    gate = Gate.fitted(log_p.tolist(), saved.tolist())
    assert np.all(np.diff(gate.saved) >= 0)
    assert np.all(np.diff(gate.levels) > 0)
    assert gate.expects(-50) < 2
    assert gate.expects(-10) == pytest.approx(12, abs=1.5)
    assert gate.sleeps(-10, uses=10, sleep_tokens=100)
    assert not gate.sleeps(-50, uses=10, sleep_tokens=200)
    assert not gate.sleeps(-10, uses=0, sleep_tokens=1)
    assert gate.expects(-1000) == gate.saved[0]
    weighted = sum(gate.expects(p) for p in log_p) / 400
    assert weighted == pytest.approx(saved.mean(), abs=1e-6)  # pooling keeps the mean


def test_sleeping_is_worth_it_when_the_uses_outweigh_the_sleep():
    assert worth_sleeping(119, 12, 1)
    assert not worth_sleeping(120, 12, 1)
    assert not worth_sleeping(1, -5, 3)
    assert worth_sleeping(11, 12, 1, t=1)


def test_the_gate_is_isotonic_regression():
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(1)
    for many in (1, 2, 7, 50):
        log_p, saved = np.round(rng.uniform(-9, 0, many)), rng.normal(0, 3, many)
        gate = Gate.fitted(log_p.tolist(), saved.tolist())
        reference = IsotonicRegression().fit(log_p, saved)
        assert [gate.expects(p) for p in log_p] == pytest.approx(reference.predict(log_p).tolist())


def test_a_gate_of_many_questions_is_fitted_too():
    log_p = np.linspace(-50, 0, 30_000)
    gate = Gate.fitted(log_p.tolist(), (log_p + 60).tolist())
    assert len(gate.levels) == 30_000
    assert gate.expects(-25) == pytest.approx(35, abs=0.01)


def test_an_empty_question_is_not_predictable():
    with pytest.raises(ValueError, match="question"):
        predictability(tiny_model(), lambda text, **_: {"input_ids": [1, 2]}, "abc", " ")
