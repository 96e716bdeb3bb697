"""DRAG and IterDRAG on stub readers, retrieval, and the allocation model: what must hold."""

import itertools

import numpy as np
import pytest

from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.reasoning.rag_inference_scaling import (
    Allocation,
    AllocationModel,
    Bm25,
    Example,
    Prompts,
    Reader,
    Vectors,
    drag,
    effective_length,
    feasible,
    informativeness,
    iter_drag,
    merged,
    optimum,
)
from assay.methods.reasoning.rag_inference_scaling.allocation import determination, rows_of

TEXTS = ["red fox runs", "blue whale swims far", "green frog jumps", "the fox eats the frog", "whale song"]
EXAMPLES = [
    Example("Who jumps?", "frog", (("What is green?", "frog"), ("Who eats?", "frog"))),
    Example("Who swims?", "whale"),
]


class Scripted:
    """Says what a function of the prompt says; a word is a token."""

    name = "scripted"

    def __init__(self, say):
        self.say, self.prompts, self.stops = say, [], []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        self.prompts += prompts
        self.stops.append(sampling.stop)
        said = [self.say(prompt) for prompt in prompts]
        return [
            [Sample(text, (0,) * len(text.split()), (), "stop", Spent(len(p.split()), len(text.split()), calls=1))]
            for p, text in zip(prompts, said, strict=True)
        ]


def reader(say=lambda prompt: " fox\n", **changes):
    settings = {"examples": EXAMPLES, "count": lambda text: len(text.split()), **changes}
    return Reader(TEXTS, Bm25(TEXTS), Scripted(say), **settings)


def prompt_of(allocation, question="Where is the fox?", **changes):
    made = reader(**changes)
    (found,) = drag(made, [question], allocation)
    return made.generator.prompts[-1], found


# -------------------------------------------------------------------------------------------------------------- prompts


def test_without_demonstrations_it_is_standard_rag_and_without_documents_many_shot():
    bare, found = prompt_of(Allocation(0))
    assert bare == "Question: Where is the fox?\nAnswer:"
    assert found.documents == ()
    rag, found = prompt_of(Allocation(2))
    assert rag == f"Document: {TEXTS[found.documents[1]]}\nDocument: {TEXTS[found.documents[0]]}\n{bare}"
    many, _ = prompt_of(Allocation(0, 2))
    assert many == f"Question: Who jumps?\nAnswer: frog\n\nQuestion: Who swims?\nAnswer: whale\n\n{bare}"
    both, _ = prompt_of(Allocation(2, 2))
    assert both.endswith(rag)
    assert both.count("Document: ") == 6


def test_documents_stand_in_reversed_order_and_the_best_is_next_to_the_question():
    for k in (1, 2, 4, 9):
        prompt, found = prompt_of(Allocation(k))
        lines = [line.removeprefix("Document: ") for line in prompt.split("\n") if line.startswith("Document: ")]
        assert [TEXTS.index(line) for line in lines] == list(reversed(found.documents))
        assert list(found.documents) == Bm25(TEXTS)(["Where is the fox?"], k)[0]
        assert len(found.documents) == min(k, len(TEXTS))


def test_demonstrations_retrieve_as_the_question_does_and_may_be_bare():
    prompt, _ = prompt_of(Allocation(1, 2))
    for example, block in zip(EXAMPLES, prompt.split("\n\n"), strict=False):
        (best,) = Bm25(TEXTS)([example.question], 1)[0]
        assert block.startswith(f"Document: {TEXTS[best]}\n")
    made = reader()
    drag(made, ["Where is the fox?"], Allocation(1, 2), bare=True)
    assert made.generator.prompts[-1].count("Document: ") == 1


def test_documents_are_cut_and_prompts_can_be_worded_otherwise():
    prompt, _ = prompt_of(Allocation(5), cut=2, prompts=Prompts("* ", "Q: ", "A:", "Answer.\n"))
    assert prompt.startswith("Answer.\n* ")
    assert "* blue whale\n" in prompt
    assert prompt.endswith("Q: Where is the fox?\nA:")


@pytest.mark.parametrize("bare", [False, True])
def test_the_limit_holds_and_documents_fall_whole_from_the_lowest_rank(bare):
    question = "Where is the fox?"
    most = drag(reader(), [question], Allocation(4, 2), bare=bare)[0]
    kept = []
    for limit in range(most.length, 16, -1):
        made = reader()
        (found,) = drag(made, [question], Allocation(4, 2), limit=limit, bare=bare)
        assert found.length == len(made.generator.prompts[-1].split()) <= limit
        assert found.documents == most.documents[: len(found.documents)]
        kept.append(len(found.documents))
    assert sorted(kept, reverse=True) == kept
    assert {0, 4} <= set(kept)
    with pytest.raises(ValueError, match="limit must be at least"):
        drag(reader(), [question], Allocation(4, 2), limit=5, bare=bare)


def test_length_is_what_all_calls_read():
    budget = Budget()
    found = drag(reader(), ["Who runs?", "Who swims far away?"], Allocation(1), budget=budget)
    assert effective_length(found) == budget.spent().prompt / 2
    assert sum(one.tokens for one in found) == budget.spent().tokens


# --------------------------------------------------------------------------------------------------------------- rounds


def chained(prompt):
    """Asks two follow-ups, then answers."""
    done = prompt.rsplit("\n\n", 1)[-1].count("Follow up:")
    return [
        " Follow up: Who is red?",
        " fox\nFollow up: What does the whale do?",
        " swims\nSo the final answer is: far",
    ][done]


def test_follow_ups_retrieve_and_append_until_the_final_answer():
    made = reader(chained)
    (found,) = iter_drag(made, ["Where is the fox?"], Allocation(1, 1, 5))
    assert found.text == "far"
    assert found.steps == (("Who is red?", "fox"), ("What does the whale do?", "swims"))
    assert len(found.samples) == 3
    assert found.length == sum(len(prompt.split()) for prompt in made.generator.prompts)
    first, second, third = made.generator.prompts
    assert second.startswith(f"{first} Follow up: Who is red?\n")
    assert third.startswith(f"{second} fox\nFollow up: What does the whale do?\nDocument: ")
    assert third.endswith("\nIntermediate answer:")
    assert set(found.documents) > set(Bm25(TEXTS)(["Where is the fox?"], 1)[0])
    own = third.rsplit("\n\n", 1)[-1]
    assert len(set(own.split("\n"))) == len(own.split("\n"))  # no document twice


def test_an_answer_at_once_is_drag_in_tokens_and_output():
    for text in (" fox", " So the final answer is: fox"):
        say = lambda prompt, text=text: text  # noqa: E731
        plain = Example("Who swims?", "whale")
        one, two = reader(say, examples=[plain]), reader(say, examples=[plain])
        single = drag(one, ["Who runs?"], Allocation(2, 1))
        rounds = iter_drag(two, ["Who runs?"], Allocation(2, 1, 5))
        assert one.generator.prompts == two.generator.prompts
        assert single == rounds
        assert iter_drag(two, ["Who runs?"], Allocation(2, 1, 1)) == single
        assert iter_drag(two, ["Who runs?"], Allocation(2, 1, 5), follow_up=lambda q, a: "") == single
        assert single[0].text == "fox"


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_it_is_forced_to_answer_at_the_limit(rounds):
    def endless(prompt):
        return " far" if prompt.endswith("So the final answer is:") else f" a\nFollow up: Who is it, {len(prompt)}?"

    made = reader(lambda prompt: endless(prompt).removeprefix(" a\n") if "Follow up" not in prompt else endless(prompt))
    (found,) = iter_drag(made, ["Who runs?"], Allocation(1, 0, rounds))
    assert len(found.samples) == rounds
    assert found.text == "far"
    assert len(found.steps) == rounds - 1
    assert made.generator.prompts[-1].endswith("\nSo the final answer is:")
    assert made.generator.stops[-1] == ("\n",)


def test_a_rule_may_ask_in_the_models_stead():
    def rule(question, answers):
        return "Who is red?" if not answers else f"Which frog eats the {answers[0]}?" if len(answers) == 1 else ""

    made = reader(lambda prompt: " frog\n" if "eats the fox?" in prompt else " fox\n")
    (found,) = iter_drag(made, ["Where is the fox?"], Allocation(1, 1, 5), follow_up=rule)
    assert found.steps == (("Who is red?", "fox"), ("Which frog eats the fox?", "frog"))
    assert found.text == "frog"
    assert len(found.samples) == 2
    assert 3 in found.documents
    assert made.generator.stops == [("\n",)] * 2
    (cut,) = iter_drag(made, ["Where is the fox?"], Allocation(1, 1, 1), follow_up=rule)
    assert len(cut.samples) == 1


def test_one_call_behind_examples_of_follow_ups_is_forced_to_answer():
    """They invite a follow-up, which nobody would answer."""
    made = reader(lambda prompt: " far" if prompt.endswith("So the final answer is:") else " Follow up: Who is red?")
    (once,) = iter_drag(made, ["Who runs?"], Allocation(1, 1, 1))
    (none,) = iter_drag(made, ["Who runs?"], Allocation(1, 1, 3), follow_up=lambda question, answers: "")
    assert (once.text, none.text) == ("far", "far")
    assert once.samples == none.samples
    assert made.generator.prompts[-1].endswith("Answer: So the final answer is:")
    iter_drag(made, ["Who runs?"], Allocation(1, 0, 1))
    assert made.generator.prompts[-1].endswith("Answer:")  # nothing was shown


def test_documents_without_a_mark_do_not_end_a_round_at_its_first_line():
    made = reader(chained, prompts=Prompts(document=""))
    (found,) = iter_drag(made, ["Where is the fox?"], Allocation(1, 1, 5))
    assert len(found.steps) == 2
    assert all("\n" not in stop for stop in made.generator.stops)
    marked = reader(chained)
    iter_drag(marked, ["Where is the fox?"], Allocation(1, 1, 5))
    assert "\nDocument:" in marked.generator.stops[0]


def test_demonstrations_of_rounds_show_follow_ups_with_documents_of_their_own():
    made = reader(lambda prompt: " fox")
    iter_drag(made, ["Who runs?"], Allocation(1, 2, 3))
    first, second, _ = made.generator.prompts[0].split("\n\n")
    assert first.count("Follow up:") == first.count("Intermediate answer: frog") == 2
    assert first.endswith("\nSo the final answer is: frog")
    assert first.count("Document: ") == len({line for line in first.split("\n") if line.startswith("Document: ")}) > 1
    assert second.endswith("\nAnswer: whale")
    single = reader(lambda prompt: " fox", examples=[Example("Who swims?", "whale", (("Who swims?", "whale"),))])
    iter_drag(single, ["Who runs?"], Allocation(1, 1, 3))
    assert "Follow up:" not in single.generator.prompts[0]  # of one step: it answers at once


# ------------------------------------------------------------------------------------------------------------ retrieval


def test_merged_keeps_the_best_rank_of_each():
    chance = np.random.default_rng(0)
    for _ in range(50):
        rankings = [chance.permutation(8)[: chance.integers(1, 8)].tolist() for _ in range(3)]
        found = merged(rankings)
        ranks = [min(ranking.index(each) for ranking in rankings if each in ranking) for each in found]
        assert ranks == sorted(ranks)
        assert sorted(found) == sorted(set(itertools.chain(*rankings)))


def test_bm25_finds_what_shares_rare_words():
    found = Bm25(TEXTS)(["blue whale", "the fox and the frog", "which of those?"], 2)
    assert found[0] == [1, 4]
    assert found[1][0] == 3
    assert found[2] == [0, 1]  # nothing in common: the first ones
    assert Bm25(TEXTS)(["fox"], 0) == [[]]
    assert len(Bm25(TEXTS)(["fox"], 99)[0]) == len(TEXTS)
    alike = [f"fox {'red' if i % 3 else 'blue'}" for i in range(60)]
    assert Bm25(alike)(["blue"], 60) == [
        [*range(0, 60, 3), *(i for i in range(60) if i % 3)]
    ]  # the first of equal ones


def test_vectors_are_those_nearest():
    chance = np.random.default_rng(0)
    known, asked = chance.standard_normal((30, 6)), chance.standard_normal((4, 6))
    found = Vectors(known, lambda texts: asked[: len(texts)])(["a", "b", "c", "d"], 5)
    assert found == np.argsort(-(asked @ known.T), 1)[:, :5].tolist()


# ----------------------------------------------------------------------------------------------------------- allocation

GRID = [Allocation(k, m, n) for k in (0, 1, 2, 5) for m in (0, 1, 4) for n in (1, 3)]


def curves(tasks, a=(0.4, 0.2, 0.5), b=(0.8, -0.3, 0.0), c=-1.0, small=1e-3):
    """Noiseless accuracies of the model's own form."""
    rows = [row for i in tasks for row in rows_of(GRID, i)]
    x = np.array(rows)
    logits = np.log(x[:, :3] + small) @ np.array(a) + (np.log(x[:, :2] + small) * x[:, 3:]) @ np.array(b[:2]) + c
    return rows, 1 / (1 + np.exp(-logits))


def test_two_tasks_give_the_parameters_back_exactly():
    rows, accuracy = curves([(0.3, 0.1), (0.1, 0.4), (0.5, 0.2)])
    model = AllocationModel(floor=1e-9).fit(rows, accuracy)
    assert model.identified_
    assert model.a_ == pytest.approx([0.4, 0.2, 0.5])
    assert model.b_ == pytest.approx([0.8, -0.3, 0.0])
    assert model.c_ == pytest.approx(-1.0)
    assert model.score(rows, accuracy) == pytest.approx(1)
    assert AllocationModel(floor=1e-9, informed=False).fit(rows, accuracy).score(rows, accuracy) < 0.999


def test_accuracies_are_held_within_the_floor_before_the_logit():
    rows, _ = curves([(0.3, 0.1), (0.1, 0.4)])
    for worst, held in ((0.0, 0.005), (1.0, 0.995)):
        assert AllocationModel().fit(rows, np.full(len(rows), worst)).predict(rows) == pytest.approx(held)
    assert AllocationModel(floor=0.1).fit(rows, np.zeros(len(rows))).predict(rows) == pytest.approx(0.1)


def test_of_one_task_only_the_sum_is_known_and_it_says_so():
    rows, accuracy = curves([(0.3, 0.1)])
    model = AllocationModel(floor=1e-9).fit(rows, accuracy)
    assert not model.identified_
    assert model.a_[:2] + model.b_[:2] * [0.3, 0.1] == pytest.approx([0.4 + 0.24, 0.2 - 0.03])
    assert model.predict(rows) == pytest.approx(accuracy)
    assert AllocationModel(informed=False).fit(rows, accuracy).identified_


def test_iterations_have_no_informativeness_and_one_iteration_throughout_says_nothing():
    rows, accuracy = curves([(0.3, 0.1), (0.1, 0.4)])
    one = [row[2] == 1 for row in rows]
    model = AllocationModel(floor=1e-9).fit(np.array(rows)[one], accuracy[one])
    assert model.b_[2] == model.a_[2] == 0
    assert model.identified_


def test_the_choice_does_not_change_with_a_monotone_transform_of_the_score():
    lengths = {each: 10.0 + each.documents * 20 * (each.shots + 1) * each.iterations for each in GRID}
    scores = {each: float(np.sin(i) / 3 + 0.5) for i, each in enumerate(GRID)}
    for limit in (10, 60, 200, 5000):
        chosen = optimum(scores, lengths, limit)
        for transform in (np.log, lambda p: np.log(p / (1 - p)), lambda p: 3 * p - 1):
            assert optimum({each: float(transform(p)) for each, p in scores.items()}, lengths, limit) == chosen


def test_the_optimum_never_falls_with_the_limit_and_is_above_every_fixed_one():
    chance = np.random.default_rng(1)
    lengths = {each: float(chance.integers(10, 500)) for each in GRID}
    scores = {each: float(chance.random()) for each in GRID}
    limits = range(int(min(lengths.values())), 520, 10)
    best = [scores[optimum(scores, lengths, limit)] for limit in limits]
    assert best == sorted(best)
    for each in GRID:
        assert all(scores[each] <= p for limit, p in zip(limits, best, strict=True) if lengths[each] <= limit)
        assert lengths[optimum(scores, lengths, 300)] <= 300
    assert len(feasible(lengths, 500)) == len(GRID)
    same = dict.fromkeys(GRID, 0.5)
    assert lengths[optimum(same, lengths, 500)] == min(lengths.values())  # of equal ones the shortest


def test_the_model_chooses_what_is_best_under_it():
    rows, accuracy = curves([(0.3, 0.1), (0.1, 0.4)])
    model = AllocationModel().fit(rows, accuracy)
    lengths = {each: 10.0 + each.documents * 20 * (each.shots + 1) * each.iterations for each in GRID}
    for i, offset in (((0.3, 0.1), 0), ((0.1, 0.4), len(GRID))):
        scores = dict(zip(GRID, accuracy[offset : offset + len(GRID)].tolist(), strict=True))
        for limit in (10, 80, 300, 5000):
            assert scores[model.best(lengths, limit, i)] == pytest.approx(scores[optimum(scores, lengths, limit)])


def test_weak_readers_may_be_given_few_documents():
    rows = rows_of(GRID, (0.2, 0.1))
    worse = [0.6 - 0.1 * row[0] for row in rows]
    model = AllocationModel(shift="log1p").fit(rows, worse)
    assert model.best({each: 1.0 + each.documents for each in GRID}, 100, (0.2, 0.1)).documents == 0


def test_it_is_a_regressor_of_scikit_learn():
    from sklearn.base import clone, is_regressor
    from sklearn.model_selection import GridSearchCV, cross_val_predict

    rows, accuracy = curves([(0.3, 0.1), (0.1, 0.4)])
    model = AllocationModel(floor=1e-9)
    assert is_regressor(model)
    assert clone(model).get_params() == model.get_params()
    assert cross_val_predict(model, np.array(rows), accuracy, cv=4) == pytest.approx(accuracy, abs=1e-6)
    search = GridSearchCV(model, {"shift": ["log1p", "add"]}, cv=3).fit(np.array(rows), accuracy)
    assert search.best_params_ == {"shift": "add"}


def test_informativeness_is_what_one_adds():
    scores = {Allocation(0): 0.25, Allocation(1): 0.5, Allocation(0, 1): 0.125, Allocation(9): 1.0}
    assert informativeness(scores) == (0.25, -0.125)
    assert determination(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == -3


# ------------------------------------------------------------------------------------------------------------ bad input

NAN = [[1, 0, 1, float("nan"), 0.0]]
GOOD = [[1, 0, 1, 0.1, 0.0], [2, 0, 1, 0.1, 0.0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Allocation(-1), "documents"),
        (lambda: Allocation(1, 0, 0), "iterations"),
        (lambda: Allocation(1.5), "documents"),
        (lambda: drag(reader(), ["a?"], Allocation(1, 3)), "shots"),
        (lambda: drag(reader(), ["a?"], Allocation(1, 0, 2)), "iteration"),
        (lambda: iter_drag(reader(), ["a?"], Allocation(1, 0, 6)), "iterations"),
        (lambda: drag(reader(count=None), ["a?"], Allocation(1), limit=50), "count"),
        (lambda: effective_length([]), "answered"),
        (lambda: Bm25([]), "texts"),
        (lambda: Vectors(np.zeros(3), len), "vectors"),
        (lambda: Vectors(np.full((2, 2), np.nan), len), "vectors"),
        (lambda: Vectors(np.eye(2), lambda texts: np.ones((len(texts), 3)))(["a"], 1), "embed"),
        (lambda: Vectors(np.eye(2), lambda texts: np.ones(2))(["a"], 1), "embed"),
        (lambda: Vectors(np.eye(2), lambda texts: np.full((1, 2), np.nan))(["a"], 1), "embed"),
        (lambda: feasible({Allocation(1): 50.0}, 10), "limit"),
        (lambda: informativeness({Allocation(0): 0.1}), "scores"),
        (lambda: AllocationModel().predict(GOOD), "fit"),
        (lambda: AllocationModel().fit(NAN, [0.5]), "X"),
        (lambda: AllocationModel().fit(GOOD, [0.5, 1.5]), "y"),
        (lambda: AllocationModel().fit(GOOD, [0.5]), "y"),
        (lambda: AllocationModel().fit(GOOD, [0.5, float("nan")]), "y"),
        (lambda: AllocationModel(shift="none").fit(GOOD, [0.5, 0.6]), "shift"),
        (lambda: AllocationModel(floor=0.7).fit(GOOD, [0.5, 0.6]), "floor"),
        (lambda: AllocationModel().set_params(depth=3), "setting"),
        (lambda: determination(np.ones(3), np.ones(3)), "observed"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()
