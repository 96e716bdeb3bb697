"""Ways of spending compute: what each answers, what each is charged, and how they meet."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay.methods.core.reasoning import selectors
from assay.methods.core.reasoning.answers import extract
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.estimates import coverage
from assay.methods.core.reasoning.generator import Sample, Sampling, TransformersGenerator, seed_of
from assay.methods.core.reasoning.samples import Cached, SampleCache
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Chance, Checker, texts_of
from assay.methods.reasoning import bag_of_tricks_ttc as bag
from assay.methods.reasoning.bag_of_tricks_ttc import trees
from assay.methods.reasoning.bag_of_tricks_ttc.asking import Asking

WARM = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=8)
COLD = replace(WARM, temperature=0.0)
STEPS = 3


class Writer:
    """Writes what `says(chance, prompt)` says, and keeps a ledger of its own; at temperature 0 the same every time."""

    name = "writer"

    def __init__(self, says):
        self.says, self.charged, self.calls, self.asked = says, 0, 0, []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        found = []
        for prompt in prompts:
            self.asked.append(prompt)
            own = []
            for number in range(first, first + n):
                key = (seed, prompt, number) if sampling.temperature else (prompt,)
                text = self.says(np.random.default_rng(seed_of(*key)), prompt)
                length = len(text) + 1
                goes_on = "\n" in sampling.stop and "answer" not in text
                spent = Spent(len(prompt) if number == first else 0, length, calls=1)
                own.append(Sample(text, (1,) * length, (-0.5,) * length, "stop", spent, "\n" if goes_on else ""))
                self.charged += spent.tokens
                self.calls += 1
            found.append(own)
        return found


def guess(share=0.4):
    """Whole answers: 7 is right, with some words that differ."""

    def says(chance, prompt):
        if "error" in prompt:
            return "no error"
        number = 7 if chance.random() < share else chance.integers(10, 16)
        return f"{chance.integers(1000)} so the answer is {number}"

    return says


def digit(chance, prompt):
    """Steps of one digit each, then the answer that they make."""
    if "error" in prompt:
        return "no error"
    said = prompt.split(":")[1].split("\n")[:-1]
    return str(chance.integers(4)) if len(said) < STEPS else f"the answer is {int(''.join(said))}"


class Path:
    """Knows the right digits: 1 as long as all of them are right. Or scores digits by themselves (`weights`)."""

    def __init__(self, digits="213", weights=None):
        self.digits, self.weights, self.seen = digits, weights, []

    def score(self, traces):
        self.seen += [(trace.prompt, trace.text) for trace in traces]
        return [[self._of(text) for text in texts_of(trace)] for trace in traces], Spent(prompt=len(traces), calls=1)

    def _of(self, text):
        steps = [step for step in text.split("\n") if step.isdigit()]
        if self.weights:
            return sum(self.weights[int(step)] for step in steps) / 10
        return float(all(a == b for a, b in zip(steps, self.digits, strict=False)))


def asking(says=None, verifier=None, **rest):
    writer = Writer(says or guess())
    given = {"sampling": WARM, "prompt": "Q:"} | rest
    return Asking(generator=writer, verifier=verifier or Chance(), **given)


def stepwise(verifier=None, **rest):
    return asking(digit, verifier or Path(), finished=lambda text: "answer" in text, **rest)


STEPWISE = ("step-level best of n", "beam", "mcts", "depth first")


def tried(way, n=3, **rest):
    """A way's outcome and its asking, stepwise or not as it needs."""
    made = stepwise(**rest) if way in STEPWISE else asking(**rest)
    return bag.WAYS[way](made, 1 if way == "one" else n), made


# ------------------------------------------------------------------------------------------------------------ whole answers


def test_of_one_sample_all_ways_choose_that():
    for seed in range(10):
        single = bag.one(asking(seed=seed))
        for way in (bag.best_of_n, bag.majority, bag.weighted_majority):
            assert way(asking(seed=seed), 1) == single
        assert bag.self_refine(asking(seed=seed), 0) == single


def test_a_verifier_that_knows_nothing_picks_the_average_sample():
    right = [bag.best_of_n(asking(guess(0.3), Chance(), seed=seed), 4).answer == "7" for seed in range(400)]
    assert np.mean(right) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 400))


def test_an_oracle_reaches_coverage_and_nobody_passes_it():
    n, many = 4, 24
    oracle = Checker({"Q:": "7"})
    scores = {"best of n": [], "majority": [], "weighted majority": [], "any": []}
    for seed in range(8):
        made = asking(guess(0.2), oracle, seed=seed)
        right = [made.answer_of(sample.text) == "7" for sample in made.samples(many)]
        for repeat in range(many // n):
            part = replace(made, repeat=repeat)
            found = any(right[repeat * n : (repeat + 1) * n])
            scores["any"].append(found)
            for way in ("best of n", "majority", "weighted majority"):
                hit = bag.WAYS[way](part, n).answer == "7"
                assert hit <= found
                scores[way].append(hit)
            assert bag.best_of_n(part, n).answer == "7" or not found
        assert bag.best_of_n(made, many).answer == "7" or coverage(sum(right), many, many) == 0
    assert np.mean(scores["best of n"]) == np.mean(scores["any"]) > np.mean(scores["majority"]) > 0


class Fixed:
    """Scores by the text's place in a list."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, traces):
        return [[self.scores[i]] for i, _ in enumerate(traces)], Spent()


def test_weighted_majority_is_majority_of_equal_scores_and_blind_to_their_scale():
    chance = np.random.default_rng(0)
    differs = 0
    for seed in range(40):
        equal = bag.weighted_majority(asking(verifier=Fixed([0.4] * 8), seed=seed), 8)
        most = bag.majority(asking(seed=seed), 8)
        assert equal == most
        scores = chance.random(8)
        one = bag.weighted_majority(asking(verifier=Fixed(scores.tolist()), seed=seed), 8)
        assert one == bag.weighted_majority(asking(verifier=Fixed((3 * scores - 7).tolist()), seed=seed), 8)
        differs += one.answer != most.answer
    assert differs > 3


def test_of_two_samples_the_worse_has_no_say_and_of_the_winners_the_best_speaks():
    said = iter(["answer is 1", "answer is 2"] * 2 + ["answer is 1", "answer is 2", "1 is the answer is 1"])
    made = asking(lambda chance, prompt: next(said))
    assert bag.weighted_majority(replace(made, verifier=Fixed([0.5, 0.51])), 2).answer == "2"
    assert bag.weighted_majority(replace(made, verifier=Fixed([0.51, 0.5])), 2).answer == "1"
    found = bag.weighted_majority(replace(made, verifier=Fixed([0.4, 0.45, 0.9])), 3)
    assert (found.text, found.answer) == ("1 is the answer is 1", "1")


def test_where_no_sample_answers_they_are_drawn_again_and_paid():
    """Only with another seed: the same samples would be empty again."""

    def says(chance, prompt):
        return "hm" if writer.calls < 6 else "the answer is 3"

    writer = Writer(says)
    made = Asking("Q:", writer, WARM)
    assert bag.majority(made, 3).answer == "3"
    assert writer.calls == 9
    assert made.budget.spent().tokens == writer.charged
    never = asking(lambda chance, prompt: "hm")
    assert bag.majority(never, 3) == bag.Outcome("hm", "")
    assert never.generator.calls == 15
    once = asking(lambda chance, prompt: "hm")
    bag.majority(once, 3, tries=1)
    assert once.generator.calls == 3


def test_what_is_drawn_again_is_no_other_seeds():
    makes = [asking(lambda chance, prompt: f"hm {'abcdefgh'[int(chance.integers(8))]}", seed=seed) for seed in range(6)]
    again = [bag.majority(made, 3, tries=2).text for made in makes]
    assert again[:-1] != [bag.majority(made, 3, tries=1).text for made in makes[1:]]


def test_the_majority_speaks_in_the_words_of_its_first_sample():
    made = asking()
    answers = [extract(sample.text) for sample in made.samples(9)]
    most = selectors.majority(answers)
    first = made.samples(9)[answers.index(most)]
    assert bag.majority(made, 9) == bag.Outcome(first.text, most)


def test_refinement_goes_on_until_nothing_is_found_wrong():
    said = iter(["the answer is 5", "the sum is off", "the answer is 6", "No error.", "never"])
    made = asking(lambda chance, prompt: next(said))
    assert bag.self_refine(made, 3).answer == "6"
    assert next(said) == "never"
    prompts = made.generator.asked
    assert "the answer is 5" in prompts[1]
    assert "the sum is off" in prompts[2]
    assert "the answer is 6" in prompts[3]
    feedback = made.budget.spent("verify")
    assert feedback.calls == 2
    assert feedback.prompt == len(prompts[1]) + len(prompts[3])
    assert made.budget.spent("solve").calls == 2
    stubborn = asking(lambda chance, prompt: "wrong, the answer is 1")
    bag.self_refine(stubborn, 3)
    assert stubborn.generator.calls == 7


# ------------------------------------------------------------------------------------------------------------- step by step


def best_steps(made, n):
    """Step-level best of N, written down another way."""
    text, count = "", 0
    while "answer" not in text and count < 20:
        ((*drawn,),) = made.generator([made.prompt + text], replace(made.sampling, stop=("\n",)), n=n, seed=made.seed)
        options = [text + sample.text + sample.matched for sample in drawn]
        scores = [made.verifier.score([Trace(made.prompt, (option,), finished=True)])[0][0][0] for option in options]
        text, count = options[scores.index(max(scores))], count + 1
    return text


def test_a_beam_of_one_is_the_best_step_each_time():
    for seed in range(8):
        made = stepwise(Path(weights=[3, 9, 1, 4]), seed=seed)
        found = bag.step_greedy(made, 3)
        assert found.text == best_steps(stepwise(Path(weights=[3, 9, 1, 4]), seed=seed), 3)
        assert bag.beam(stepwise(Path(weights=[3, 9, 1, 4]), seed=seed), 3, width=1) == found
    assert len(bag.step_greedy(stepwise(seed=1), 3, rounds=2).text) == 4


def test_wider_beams_find_no_less_than_narrow_ones_and_sometimes_more():
    better = 0
    for seed in range(30):
        narrow, wide = (
            Path(weights=[0, 1, 2, 3])._of(
                bag.beam(stepwise(Path(weights=[0, 1, 2, 3]), seed=seed), 2, width=width).text
            )
            for width in (1, 6)
        )
        assert wide >= narrow
        better += wide > narrow
    assert better > 3


def test_a_beam_looks_once_at_what_says_the_same():
    verifier = Path(weights=[1, 1, 1, 1])
    made = stepwise(verifier)
    bag.beam(made, 12, width=3)
    assert max(Counter(verifier.seen).values()) == 1
    assert made.generator.calls > len(verifier.seen)


def test_a_finished_beam_is_set_aside_and_the_best_of_them_answers():
    """One path ends at once with a fair score; a longer one ends better."""

    def says(chance, prompt):
        said = prompt.split(":")[1]
        if not said:
            return ["the answer is 1", "go on"][int(chance.integers(2))]
        return "the answer is 2"

    class Second:
        def score(self, traces):
            return [[{"go": 0.4}.get(s[:2], 0.9 if "2" in s else 0.5) for s in t.steps] for t in traces], Spent()

    made = asking(says, Second(), finished=lambda text: "answer" in text)
    assert bag.beam(made, 8, width=2).answer == "2"
    assert bag.beam(made, 8, width=1).answer == "1"  # the finished one leaves no room


def test_a_path_counts_by_its_last_step_or_by_its_best():
    trace = Trace("Q:", ("a", "b"), (), (0.9, 0.2))
    assert [trees._worth(trace, path) for path in ("last", "max")] == [0.2, 0.9]


def test_depth_first_visits_the_best_child_first_and_keeps_no_more_than_it_says():
    class Letters(Path):
        def score(self, traces):
            self.seen.append([trace.steps[-1] for trace in traces])
            return [[int(step[0]) / 10 for step in trace.steps] for trace in traces], Spent()

    said = itertools.cycle("01234")
    verifier = Letters()
    made = asking(lambda chance, prompt: next(said), verifier)
    found = bag.depth_first(made, 5, depth=2, pruned=0.4)
    assert made.generator.asked == [
        "Q:",
        "Q:4\n",
        "Q:3\n",
        "Q:2\n",
    ]  # 3 of 5, the best first; depth 2 is never reached below
    assert found.text == "4\n4\n"
    bag.depth_first(made, 5, depth=1, pruned=0.99)
    assert made.generator.asked[4:] == ["Q:"]


def test_depth_first_stops_with_enough_paths():
    for paths in (1, 3):
        verifier = Path(weights=[1, 2, 3, 4])
        made = stepwise(verifier)
        bag.depth_first(made, 4, pruned=0.0, paths=paths)
        ends = {text for _, text in verifier.seen if "answer" in text}
        assert len(ends) == paths  # each end has one spelling, so its siblings are one


def nodes(root):
    yield root
    for child in root.children:
        yield from nodes(child)


def test_visits_are_handed_up_once():
    made = stepwise(Path(weights=[1, 5, 2, 3]))
    root = trees.Node(Trace("Q:"))
    trees.visit([root])
    for count in range(1, 30):
        path = trees.simulate(made, root, 3, 8, 1.25, 19652.0)
        assert path[0] is root
        assert root.visits == count + 1
    inner = [node for node in nodes(root) if node.children]
    assert len(inner) > 4
    for node in inner:
        assert sum(child.visits for child in node.children) == node.visits - 1
        below = sum(child.total for child in node.children)
        assert node.total == pytest.approx(below + node.trace.score)


def test_without_exploration_a_perfect_verifier_is_followed():
    left = explored = 0
    for seed in range(5):
        for c_init in (0.0, 4.0):
            made = stepwise(Path(), seed=seed)
            root = trees.Node(Trace("Q:"))
            trees.visit([root])
            for _ in range(25):
                path = trees.simulate(made, root, 6, 8, c_init, 19652.0)
                for parent, node in itertools.pairwise(path):
                    could = any(child.trace.score == 1 for child in parent.children)
                    wrong = could and node.trace.score == 0
                    left += wrong and not c_init
                    explored += wrong and bool(c_init)
        if bag.beam(stepwise(Path(), seed=seed), 6, width=1).answer == "213":
            assert bag.mcts(stepwise(Path(), seed=seed), 6, c_init=0.0).answer == "213"
    assert left == 0
    assert explored > 0


def test_the_bonus_is_that_of_the_formula():
    parent, child = trees.Node(Trace("Q:"), visits=9), trees.Node(Trace("Q:"), visits=2)
    wanted = (1.25 + math.log((9 + 19652 + 1) / 19652)) * 3 / 3
    assert trees.bonus(parent, child, 1.25, 19652) == pytest.approx(wanted)


def test_mcts_ends_at_its_depth():
    found = bag.mcts(stepwise(), 3, depth=2)
    assert len(found.text.split("\n")) == 3
    assert bag.mcts(stepwise(), 3).answer


# -------------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("way", bag.WAYS)
def test_at_temperature_0_every_way_gives_the_one_answer_there_is(way):
    single = bag.one(stepwise(sampling=COLD)) if way in STEPWISE else bag.one(asking(sampling=COLD))
    found, made = tried(way, sampling=COLD)
    if way in STEPWISE:
        text = best_steps(stepwise(sampling=COLD), 1)
        assert found.text == text
    else:
        assert found == single


@pytest.mark.parametrize("way", bag.WAYS)
def test_every_call_is_booked_judging_included(way):
    verifier = Path(weights=[1, 2, 3, 4])
    found, made = tried(way, verifier=verifier, seed=3)
    judging = made.budget.spent("verify").tokens if way != "self-refine" else 0
    assert judging == len(verifier.seen)
    assert (judging > 0) == (way not in bag.UNJUDGED)
    assert made.budget.spent().tokens == made.generator.charged + judging
    assert made.budget.spent().calls == made.generator.calls + sum(
        entry.spent.calls for entry in made.budget.entries if entry.purpose == "verify" and way != "self-refine"
    )


@pytest.mark.parametrize("way", bag.WAYS)
def test_a_seed_fixes_the_answer_and_a_repeat_is_another(way):
    texts = [tried(way, seed=seed)[0].text for seed in range(6)]
    assert texts == [tried(way, seed=seed)[0].text for seed in range(6)]
    assert texts != [tried(way, seed=seed, repeat=1)[0].text for seed in range(6)]
    assert len(set(texts)) > 1 or way in STEPWISE
    if way in STEPWISE:  # the repeat of a seed is not another seed either
        assert texts[1:] != [tried(way, seed=seed, repeat=1)[0].text for seed in range(5)]


@pytest.mark.parametrize("way", bag.WAYS)
def test_with_a_limit_a_way_stops_within_one_call_of_it(way):
    """Stepwise ways draw several samples a call (two beams of four here), and all of them are paid."""
    _, free = tried(way, n=4)
    for limit in (1, free.budget.spent().tokens // 3):
        found, made = tried(way, n=4, budget=Budget(limit))
        assert found.text
        entries = made.budget.entries
        before = [sum(entry.spent.tokens for entry in entries[:i]) for i in range(len(entries))]
        begun = [total for total, entry in zip(before, entries, strict=True) if entry.purpose == "solve"]
        assert sum(total >= limit for total in begun) <= (7 if way in STEPWISE else 0)
        if limit == 1:
            assert made.generator.calls <= (4 if way in STEPWISE else 1)


def test_a_prompt_is_charged_once_whether_samples_come_at_once_or_one_by_one():
    _, at_once = tried("majority", n=5)
    _, one_by_one = tried("majority", n=5, budget=Budget(10_000))
    assert at_once.budget.spent() == replace(one_by_one.budget.spent())
    assert tried("majority", n=5)[0] == tried("majority", n=5, budget=Budget(10_000))[0]


def test_remembering_changes_the_cost_and_not_the_answer():
    costs = []
    for wrap in (lambda verifier: verifier, bag.Remembered):
        made = stepwise(wrap(Path(weights=[1, 2, 3, 4])))
        found = [bag.mcts(made, 4), bag.beam(made, 4), bag.mcts(made, 4)]
        costs.append((made.budget.spent("verify").tokens, found))
    assert costs[0][1] == costs[1][1]
    assert costs[1][0] < costs[0][0]


def test_a_step_that_was_judged_before_is_not_asked_about_again():
    """However the texts are cut into steps, and whatever stands behind them now."""
    asked = []

    class Asked:
        def score(self, traces):
            asked.extend(text for trace in traces for text in texts_of(trace))
            return [[float(len(text)) for text in texts_of(trace)] for trace in traces], Spent(len(traces), calls=1)

    judge = bag.Remembered(Asked())
    first, longer, otherwise = (Trace("Q:", steps) for steps in (("a", "b"), ("a", "b", "c"), ("ab", "c")))
    assert judge.score([first])[0] == [[1, 2]]
    assert judge.score([longer, otherwise, first]) == ([[1, 2, 3], [2, 3], [1, 2]], Spent(1, calls=1))
    assert asked == ["a", "ab", "abc"]
    assert judge.score([otherwise])[1] == judge.score([])[1] == Spent()


def test_self_evaluation_is_the_share_of_votes_and_is_charged():
    votes = {"7": ["yes", "yes", "no"], "8": ["no", "no", "no"]}

    class Judge:
        name = "judge"

        def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
            return [
                [
                    Sample(text, (1,), (), "stop", Spent(0 if i else 10, 1, calls=1))
                    for i, text in enumerate(votes[prompt[-1]][:n])
                ]
                for prompt in prompts
            ]

    judge = bag.SelfEvaluation(Judge(), lambda prompt, text: f"{prompt} {text}", WARM)
    traces = [Trace("Q:", ("7",)), Trace("Q:", ("8",)), Trace("Q:", ("7",))]
    scores, spent = judge.score(traces)
    assert scores == [[2 / 3], [0.0], [2 / 3]]
    assert spent == Spent(20, 6, calls=6)
    assert judge.score([])[0] == []
    made = asking(lambda chance, prompt: "78"[int(chance.integers(2))], judge)
    assert bag.best_of_n(made, 8).answer == "7"
    assert made.budget.spent("verify").tokens > 0


# --------------------------------------------------------------------------------------------------------------------- grid


QUESTIONS = [bag.Question({"plain": f"Q{i}:", "task": f"T{i}:"}, "7") for i in range(12)]


def test_a_grid_lists_every_combination_once():
    found = bag.grid(way=["one", "majority", "best of n"], n=[2, 4], temperature=[0.6, 0.8], verifier=["chance", "x"])
    assert len(found) == len(set(found)) == 2 + 4 + 8
    assert {setting.sampling.top_p for setting in found} == {0.9}
    assert all(not setting.verifier for setting in found if setting.way != "best of n")
    (beams,) = bag.grid(bag.Setting("beam", 4, WARM, "chance"), width=[3])
    assert beams.said()["width"] == 3
    assert bag.grid() == [bag.Setting()]


def test_a_row_tells_accuracy_and_every_token():
    writer = Writer(guess())
    settings = bag.grid(bag.Setting(sampling=WARM), way=["one", "majority", "best of n"], n=[5], verifier=["path"])
    rows = bag.run(QUESTIONS, writer, settings, {"path": Path()}, repeats=2)
    assert sum(row.cost for row in rows) * 12 * 2 == pytest.approx(writer.charged + 12 * 2 * 5)
    for row in rows:
        assert row.cost == pytest.approx(sum(row.by_purpose.values()))
        assert set(row.by_purpose) == ({"solve", "verify"} if row.setting.verifier else {"solve"})
        mean, low, high = row.accuracy
        assert low <= mean <= high
        assert 0 < row.completion < row.cost
    assert rows[0].right != rows[1].right
    again = bag.run(QUESTIONS, Writer(guess()), settings, {"path": Path()}, repeats=2)
    assert again == rows
    other = bag.run(QUESTIONS, Writer(guess()), [replace(one, wording="task") for one in settings], {"path": Path()})
    assert other[0].right != rows[0].right


def test_tokens_without_an_answer_are_told():
    writer = Writer(lambda chance, prompt: "hm" if chance.random() < 0.5 else "the answer is 7")
    (row,) = bag.run(QUESTIONS, writer, [bag.Setting()])
    assert 0 < row.failed < row.cost
    assert sum(row.right) < 12


def test_a_limit_holds_for_every_way_alike():
    settings = bag.grid(way=["majority", "best of n"], n=[64], verifier=["chance"])
    rows = bag.run(QUESTIONS, Writer(guess()), settings, {"chance": Chance()}, tokens=200)
    assert all(200 <= row.cost < 200 + 40 for row in rows)


def test_the_best_setting_is_the_first_of_equals():
    def row(n, right, cost):
        return bag.Row(bag.Setting("majority", n), right, cost, {}, 0.0, 1.0)

    rows = [row(1, (0.0, 1.0), (1.0, 1.0)), row(2, (1.0, 0.5), (2.0, 2.0)), row(3, (0.5, 1.0), (3.0, 5.0))]
    assert bag.chosen(rows).n == 2
    assert bag.at_tokens(rows, 3.0) == pytest.approx((0.75, 0.75))
    assert bag.at_tokens(rows, 1.0) == (0.0, 1.0)
    assert bag.at_tokens(rows, 4.0) == (0.5, 1.0)
    for wrong in (0.5, 4.5):
        with pytest.raises(ValueError, match="tokens must be"):
            bag.at_tokens(rows, wrong)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: bag.Setting("reward"), "way must be"),
        (lambda: bag.Setting("best of n", 2), "verifier must be named"),
        (lambda: bag.Setting("majority", 0), "n must be"),
        (lambda: bag.Setting("majority", 2, options=(("width", 2),)), "options of"),
        (lambda: bag.grid(n=[]), "n must be a list"),
        (lambda: bag.grid(way="majority"), "way must be a list"),
        (lambda: bag.run([], None, []), "questions must hold"),
        (lambda: bag.run(QUESTIONS, None, [bag.Setting(wording="loud")]), "wording must be"),
        (lambda: bag.run(QUESTIONS, None, [bag.Setting("best of n", 2, verifier="x")], {}), "verifiers must hold"),
        (lambda: bag.grid(loud=[1]), "axes must be"),
        (lambda: bag.chosen([]), "rows must hold"),
        (lambda: bag.at_tokens([], 1), "rows must hold"),
        (lambda: bag.best_of_n(replace(asking(), verifier=None), 2), "verifier must be given"),
        (lambda: bag.one(asking(), 2), "n must be"),
        (lambda: bag.beam(stepwise(), 2, width=0), "width must be"),
        (lambda: bag.beam(stepwise(), 2, path="min"), "path must be"),
        (lambda: bag.depth_first(stepwise(), 2, pruned=1.0), "pruned must be"),
        (lambda: bag.mcts(stepwise(), 2, c_init=-1.0), "c_init must be"),
        (lambda: bag.mcts(stepwise(), 2, simulations=0), "simulations must be"),
        (lambda: bag.SelfEvaluation(None, None, WARM, votes=0), "votes must be"),
    ],
)
def test_what_is_wrong_is_named(made, match):
    with pytest.raises(ValueError, match=match):
        made()


# ------------------------------------------------------------------------------------------------------------- a real model

WORDS = ["<end>", "\n", " ", "1", "2", "3", "7", "8", "=", "+"]


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [WORDS.index(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(WORDS[token] for token in tokens)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=48, eos_token_id=0, pad_token_id=None)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return TransformersGenerator(made, Letters(), name="tiny")


def same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.tokens == b.tokens
        assert (a.text, a.ended, a.matched) == (b.text, b.ended, b.matched)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert replace(a.spent, seconds=0.0) == replace(b.spent, seconds=0.0)


@pytest.mark.parametrize("prompts", [["12+3=", "12+77=", "12+3 ="], ["12=", "8 8", "3"], ["1"]])
def test_shared_prefixes_give_the_generators_own_samples_and_read_each_beginning_once(tiny, prompts):
    shared = bag.SharedPrefixes(tiny)
    met, tokens = set(), 0
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9), (0.2, 0.5), (0.0, 1.0)):
        sampling = Sampling(temperature, top_p, 5, ("\n",))
        drawn = shared(prompts, sampling, n=12, first=2, seed=4)
        for prompt, own, wanted in zip(prompts, drawn, tiny(prompts, sampling, n=12, first=2, seed=4), strict=True):
            same(own, wanted)
            met |= {(prompt, sample.tokens[:k]) for sample in own for k in range(1, len(sample.tokens))}
            tokens += sum(len(sample.tokens) for sample in own)
    assert shared.rows == len(met) < tokens / 2
    shared(prompts, Sampling(0.7, 0.9, 5, ("\n",)), n=12, first=2, seed=4)
    assert shared.rows == len(met)
    assert shared.name == "tiny"
    assert shared([], sampling) == []
    with pytest.raises(ValueError, match="48 tokens"):
        shared(["1" * 46], sampling)


def test_shared_prefixes_forget_what_was_said_by_other_weights(tiny):
    own = TransformersGenerator(copy.deepcopy(tiny.model), Letters(), name="own")
    shared, sampling = bag.SharedPrefixes(own), Sampling(1.0, 1.0, 5)
    before = shared(["12+3="], sampling, n=6)
    with torch.no_grad():
        own.model.model.embed_tokens.weight.mul_(-1)
    same(shared(["12+3="], sampling, n=6)[0], own(["12+3="], sampling, n=6)[0])
    assert shared(["12+3="], sampling, n=6)[0][0].tokens != before[0][0].tokens


def test_many_beginnings_are_asked_in_batches(tiny):
    sampling = Sampling(1.0, 1.0, 4)
    small = bag.SharedPrefixes(TransformersGenerator(tiny.model, Letters(), batch=3))
    for own, wanted in zip(small(["12=", "1"], sampling, n=12), tiny(["12=", "1"], sampling, n=12), strict=True):
        same(own, wanted)


def test_the_grid_runs_on_a_model_of_transformers_and_draws_each_sample_once(tiny, tmp_path):
    asked = [bag.Question({"plain": f"{a}+{b}="}, str(a + b)) for a, b in ((1, 2), (2, 1), (1, 1), (7, 1))]
    cache = SampleCache(tmp_path / "samples.jsonl")
    sampling = Sampling(0.9, 0.9, 4, ("\n",))
    settings = bag.grid(bag.Setting(sampling=sampling), way=["one", "majority"], n=[4, 8], tries=[1])
    settings += bag.grid(bag.Setting("beam", 3, sampling, "chance"), way=["beam", "mcts"])
    rows = bag.run(asked, Cached(tiny, cache), settings, {"chance": Chance()})
    assert all(row.cost > 0 for row in rows)
    again = bag.run(asked, Cached(None, cache, name="tiny"), settings, {"chance": Chance()})
    assert again == rows
