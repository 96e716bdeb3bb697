"""Spending generations by difficulty: strategies and what they cost, the process verifier, the policy, the exchange of operations."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay.methods.core.reasoning import search
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, TransformersGenerator
from assay.methods.core.reasoning.logs import read_log
from assay.methods.core.reasoning.selectors import best_of_n, majority, weighted
from assay.methods.core.reasoning.trace import Trace
from assay.methods.reasoning.compute_optimal_ttc import (
    Attempts,
    ComputeOptimalPolicy,
    Lookahead,
    Outcome,
    PrefixKept,
    ProcessReward,
    Strategy,
    attempt,
    cross_validated,
    difficulty_bins,
    edit_distance,
    inference_multiplier,
    matched_size,
    mean_score,
    monte_carlo,
    of_logs,
    outcomes,
    pass_rate,
    revised,
    revision_rows,
)

LETTERS = "\n =abcdefg."
GREEDY = Sampling(temperature=0.0, max_new_tokens=5, stop=("\n",))


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [LETTERS.index(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(LETTERS[token] for token in tokens)


@pytest.fixture(scope="module")
def writer():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(LETTERS), **sizes, max_position_embeddings=96, eos_token_id=None)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return TransformersGenerator(made, Letters(), name="tiny")


class Scripted:
    """Writes the number of its sample, a digit a line, and ends behind three; what is read and written is a token a letter."""

    name = "scripted"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        self.calls.append((tuple(prompts), n, first, sampling))
        found = []
        for prompt in prompts:
            last = prompt.count("\n") >= 2
            found.append(
                [
                    Sample(
                        str(k % 10),
                        (k % 10, 0),
                        (-0.5, -0.1),
                        "stop",
                        Spent(len(prompt) if k == first else 0, 2, 0, 1),
                        "" if last else "\n",
                    )
                    for k in range(first, first + n)
                ]
            )
        return found  # fmt: skip


class Digits:
    """A verifier: the last digit of the text over ten."""

    def score(self, traces):
        return [[int(step.strip()) / 10 for step in trace.steps] for trace in traces], Spent(prompt=1, calls=1)


class Same:
    def score(self, traces):
        return [[0.5] * len(trace.steps) for trace in traces], Spent()


def find(prompt, text):
    return text.strip()


def again(prompt, attempts):
    return prompt + "".join(f"{text}." for text in attempts)


# ------------------------------------------------------------------------------------------------------------- strategies

WAYS = (
    Strategy(),
    Strategy("beam", width=1),
    Strategy("beam", width=1, lookahead=1),
    Strategy("revise", length=1),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_one_greedy_generation_is_the_plain_sample_whatever_the_strategy(way, writer):
    for prompt in ("ab=", "c d="):
        ((plain,),) = writer([prompt], GREEDY)
        n = way.lookahead + 1
        found = attempt(way, n, prompt, writer, Same(), GREEDY, find, again=again, delimiter=1)
        assert found.answers == (plain.text.strip(),)
        assert found.chains == (0,)


def test_steps_of_tokens_write_what_whole_samples_write(writer):
    for prompt, most in itertools.product(("ab=", "c d="), (1, 3, 7)):
        sampling = replace(GREEDY, max_new_tokens=most)
        ((plain,),) = writer([prompt], sampling)
        for tokens in (1, 2):
            (trace,) = search.beam_search(writer, Same(), prompt, sampling, n=1, width=1, delimiter=tokens)
            assert trace.finished
            assert trace.text == plain.text
            assert [t for s in trace.samples for t in s.tokens] == list(plain.tokens)
    with pytest.raises(ValueError, match="delimiter"):
        search.expand(writer, [Trace("a")], [1], GREEDY, delimiter=0)


def test_a_stop_text_that_two_steps_share_ends_the_trace():
    class Letter:
        """Writes "a.\n\nb", a letter a call, as a server does that sees no more than it is asked for."""

        def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
            text = "a.\n\nb"[len(prompts[0]) - 1]
            return [[Sample(text, (0,), (-0.1,), "length", Spent(1, 1, 0, 1))]]

    sampling = Sampling(0.0, max_new_tokens=5, stop=("\n\n",))
    (trace,) = search.beam_search(Letter(), Same(), "p", sampling, n=1, width=1, delimiter=1)
    assert trace.finished
    assert trace.text == "a."
    assert len(trace.steps) == len(trace.samples) == 4


def test_the_first_samples_of_all_strategies_are_the_same():
    """With one attempt a chain, and with a beam as wide as it is and one round, a strategy is best-of-N weighted."""
    parallel = attempt(Strategy(), 6, "p", Scripted(), Digits(), Sampling(), find)
    chains = attempt(Strategy("revise", length=1), 6, "p", Scripted(), Digits(), Sampling(), find)
    beams = attempt(Strategy("beam", width=6), 6, "p", Scripted(), Digits(), Sampling(), find, rounds=1)
    assert parallel == chains == beams
    assert parallel.choose() == weighted(parallel.answers, parallel.scores) == "5"


def test_what_is_spent_is_what_was_asked_for():
    for way, n in ((Strategy("beam", width=2), 8), (Strategy("beam", width=4), 8)):
        writer, budget = Scripted(), Budget()
        found = attempt(way, n, "p", writer, Digits(), Sampling(), find, budget=budget)
        assert len(found.answers) == n
        drawn = [sum(len(prompts) * many for prompts, many, *_ in [call]) for call in writer.calls]
        assert max(drawn) <= n
        assert budget.spent("solve").completion == 2 * sum(drawn)
        assert budget.spent("verify").calls == 3
    writer, budget = Scripted(), Budget()
    found = attempt(
        Strategy("revise", length=3), 6, "p", writer, Digits(), Sampling(), find, again=again, budget=budget
    )
    assert len(found.answers) == 6
    assert found.chains == (0, 0, 0, 1, 1, 1)
    assert budget.spent("solve").calls == 6


def test_lookahead_costs_its_rollouts():
    """Of 8 generations, 4 are beams where one step is looked ahead: each is charged again for what was rolled out."""
    assert [Strategy("beam", width=2, lookahead=k).chains(12) for k in (0, 1, 2)] == [12, 6, 4]
    writer, budget = Scripted(), Budget()
    found = attempt(Strategy("beam", width=2, lookahead=1), 8, "p", writer, Digits(), Sampling(), find, budget=budget)
    assert len(found.answers) == 4
    assert budget.spent("verify").completion > 0
    greedy = [call for call in writer.calls if call[3].temperature == 0]
    assert greedy
    assert budget.spent("verify").completion == 2 * sum(len(prompts) * n for prompts, n, *_ in greedy)
    assert budget.spent().calls > 4


def test_lookahead_scores_by_what_comes():
    class Future:
        """Continues "1" well and "2" badly."""

        name = "future"

        def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
            assert sampling.temperature == 0
            self.asked = list(prompts)
            return [
                [Sample("9" if p[-2] == "1" else "0", (1,), (-1.0,), "stop", Spent(3, 1, calls=1), "\n")]
                for p in prompts
            ]

    traces = [Trace("p", ("1\n",)), Trace("p", ("2\n",)), Trace("p", ("2\n",)), Trace("p", ("5",), finished=True)]
    inner = Digits()
    plain, _ = inner.score(traces)
    writer = Future()
    ahead, spent = Lookahead(writer, inner, Sampling(), steps=1).score(traces)
    assert plain == [[0.1], [0.2], [0.2], [0.5]]
    assert ahead == [[0.9], [0.0], [0.0], [0.5]]
    assert len(writer.asked) == 2, "equal traces are rolled out once"
    assert spent.completion == 2
    judging = Spent(prompt=1, calls=1)
    assert Lookahead(writer, inner, Sampling(), steps=0).score(traces) == (plain, judging), "judged once, charged once"
    assert Lookahead(writer, inner, Sampling(), steps=1).score(traces[-1:]) == ([[0.5]], judging)


def test_revisions_see_the_last_four_attempts_and_equal_prompts_get_different_samples():
    writer = Scripted()
    traces, chains = revised(writer, Digits(), "p", Sampling(), again, chains=2, length=7)
    assert chains == [0] * 7 + [1] * 7
    assert [prompts[0].count(".") for prompts, *_ in writer.calls if prompts[0] != "p"][-1] == 4
    assert writer.calls[0][:3] == (("p",), 2, 0)
    alike = Scripted()
    traces, _ = revised(alike, Same(), "p", Sampling(), lambda p, a: "same", chains=3, length=2)
    assert [trace.text for trace in traces] == ["0", "0", "1", "1", "2", "2"]
    assert {trace.prompt for trace in traces} == {"p"}
    same, _ = revised(Scripted(), Same(), "p", Sampling(), lambda p, a: "same", chains=2, length=3)
    assert [trace.text for trace in same] == ["0", "0", "2", "1", "1", "3"], "a prompt that comes again, a new sample"
    with pytest.raises(ValueError, match="again"):
        attempt(Strategy("revise", length=2), 2, "p", writer, Same(), Sampling(), find)


def test_a_number_of_generations_that_cannot_be_spent_is_refused():
    for way, n in (
        (Strategy("beam", width=4), 6),
        (Strategy("beam", width=2, lookahead=1), 2),
        (Strategy("revise", length=4), 6),
    ):
        assert not way.fits(n)
        with pytest.raises(ValueError, match="n must be"):
            attempt(way, n, "p", Scripted(), Same(), Sampling(), find, again=again)
    with pytest.raises(ValueError, match="method"):
        Strategy("serial")
    with pytest.raises(ValueError, match="width"):
        Strategy("beam", width=0)


def test_choosing_an_answer():
    rng = np.random.default_rng(0)
    for _ in range(50):
        said = tuple(str(k) for k in rng.integers(0, 3, 8))
        scores = tuple(rng.random(8).tolist())
        chains = tuple(sorted(rng.integers(0, 3, 8).tolist()))
        one = Attempts(said, scores, chains)
        assert Attempts(said, (0.3,) * 8, chains).choose("weighted") == majority(said) == one.choose("majority")
        sharp = tuple(float(i == best_of_n(scores)) for i in range(8))
        assert Attempts(said, sharp, chains).choose("weighted") == said[best_of_n(scores)] == one.choose("best")
        order = rng.permutation(8)
        turned = Attempts(tuple(said[i] for i in order), tuple(scores[i] for i in order), chains)
        assert turned.choose("weighted") == one.choose("weighted"), "scores that are no ties"
        apart = replace(one, chains=tuple(range(8)))
        assert apart.choose("chains") == apart.choose("last") == apart.choose("weighted")
    assert Attempts(("", "7"), (0.9, 0.1), (0, 1)).choose("best") == "7"
    by_chain = Attempts(("7", "8", "9", "9"), (0.6, 0.5, 0.3, 0.2), (0, 0, 1, 1))
    assert by_chain.choose("chains") == "7"
    assert by_chain.choose("last") == "8"
    with pytest.raises(ValueError, match="as many"):
        Attempts(("7",), (), (0,))


def test_a_kept_prefix_is_not_charged_again():
    writer = PrefixKept(Scripted())
    ((first,),) = writer(["abc"], Sampling())
    ((again_,),) = writer(["abc"], Sampling())
    ((longer,),) = writer(["abc0\nxy"], Sampling())
    ((other,),) = writer(["zbc"], Sampling())
    assert [s.spent.tokens for s in (first, again_, other)] == [5, 2, 5]
    assert longer.spent.cached == 4
    assert longer.spent.tokens == 2 + 3
    assert first.text == "0"


# ----------------------------------------------------------------------------------------------------- the process verifier


def test_labels_are_the_share_of_rollouts_that_end_right():
    writer, budget = Scripted(), Budget()
    open_, done = Trace("p", ("1\n", "2\n")), Trace("p", ("1\n", "3"), finished=True)
    labels = monte_carlo(
        writer, [open_, done], Sampling(), lambda p, text: int(text[-1]) < 3, rollouts=10, budget=budget
    )
    assert labels == [[0.3, 0.3], [0.3, 0.0]]
    assert budget.spent("verify").calls == 20, "the first step stands in both traces and is rolled out once"
    assert budget.spent("solve").calls == 0
    assert min(first for *_, first, _ in writer.calls) > 1000, "no sample that answers are made of"
    ends, goes_on = Trace("p", ("1",), finished=True), Trace("p", ("1", "0"), finished=True)
    labels = monte_carlo(writer, [ends, goes_on], Sampling(), lambda p, text: text == "1", rollouts=10)
    assert labels == [[1.0], [0.0, 0.0]], "what is finished is right or not, whoever goes on from its text"
    assert monte_carlo(writer, [replace(done, steps=("1",))], Sampling(), lambda p, t: True) == [[1.0]]


def test_soft_labels_are_learnt_as_probabilities():
    rng = np.random.default_rng(0)
    texts = [str(k) for k in rng.integers(0, 4, 400)]
    traces = [Trace("p", (text,), finished=True) for text in texts]
    reward = ProcessReward(lambda trace, i: np.eye(4)[int(trace.text)].tolist(), strength=1e4)
    reward.fit(traces, [[(int(text) + 1) / 5] for text in texts])
    (scores, spent) = reward.score([Trace("p", (str(k),)) for k in range(4)])
    assert [own[0] for own in scores] == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.01)
    assert spent == Spent()
    two = Trace("p", ("0", "1"))
    assert len(reward.score([Trace("p"), two])[0][1]) == 2
    hard = ProcessReward(lambda trace, i: [len(trace.text)]).fit(
        [Trace("p", ("a" * k,)) for k in range(1, 9)], [[float(k > 4)] for k in range(1, 9)]
    )
    assert hard.score([Trace("p", ("aaaaaaaa",))])[0][0][0] > 0.5
    with pytest.raises(ValueError, match="one kind"):
        ProcessReward(lambda trace, i: [1.0]).fit(traces, [[0.5]] * 400)
    with pytest.raises(ValueError, match="labels"):
        ProcessReward(lambda trace, i: [1.0]).fit(traces, [[0.5]])
    with pytest.raises(ValueError, match="labels"):  # as many in all, but not for each
        ProcessReward(lambda trace, i: [1.0]).fit([two, Trace("p", ("0",))], [[0.5], [0.5, 0.1]])
    growing = ProcessReward(lambda trace, i: [float(len(trace.prompt))] * len(trace.prompt))
    growing.fit([Trace("pp", ("0",)), Trace("pp", ("1",))], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="features"):
        growing.score([Trace("p", ("0",))])
    with pytest.raises(ValueError, match="finite"):
        ProcessReward(lambda trace, i: [math.nan]).fit(traces, [[0.5]] * 400)
    with pytest.raises(ValueError, match="fit must"):
        ProcessReward(lambda trace, i: [1.0]).score(traces)


# ------------------------------------------------------------------------------------------------------------- the policy


def noise(items=40, names=("a", "b", "c"), budgets=(1, 4), seed=0):
    rng = np.random.default_rng(seed)
    log = [Outcome(f"q{i}", s, n, float(rng.random()), float(n)) for i in range(items) for s in names for n in budgets]
    return log, {f"q{i}": float(rng.random()) for i in range(items)}


def mean_of(log, name, n, items=None):
    return np.mean([o.accuracy for o in log if o.strategy == name and o.n == n and (items is None or o.item in items)])


def test_the_policy_is_never_worse_than_a_fixed_strategy_where_it_was_chosen():
    log, hard = noise()
    policy = ComputeOptimalPolicy(bins=4).fit(log, hard)
    got = {(o.item, o.strategy, o.n): o.accuracy for o in log}
    for n in (1, 4):
        mine = np.mean([got[item, policy.predict(value, n), n] for item, value in hard.items()])
        assert all(mine >= mean_of(log, name, n) for name in "abc")
    one = ComputeOptimalPolicy(bins=1).fit(log, hard)
    assert {one.predict(value, 4) for value in hard.values()} == {max("abc", key=lambda s: mean_of(log, s, 4))}
    only = [o for o in log if o.strategy == "b"]
    alone = ComputeOptimalPolicy(bins=5).fit(only, hard)
    assert set(alone.table_.values()) == {"b"}
    assert sorted(alone.table_) == [(b, n) for b in range(5) for n in (1, 4)]


def test_questions_fall_into_the_bins_they_were_fitted_in():
    log, hard = noise(items=23)
    policy = ComputeOptimalPolicy(bins=5).fit(log, hard)
    assert {item: policy.bin_of(value) for item, value in hard.items()} == difficulty_bins(hard, 5)
    assert policy.bin_of(-1) == 0
    assert policy.bin_of(2) == 4


def test_questions_that_are_equally_hard_share_a_bin():
    """A new question has its value only: what is chosen for the value must be the best for all questions that have it."""
    log = [
        Outcome(f"q{i}", s, 4, float((s == "often") == (i < 8)), 1.0) for i in range(10) for s in ("often", "seldom")
    ]
    for values in ([0.5] * 10, [0.0] * 8 + [1.0] * 2, [0.0] * 9 + [1.0]):
        hard = {f"q{i}": value for i, value in enumerate(values)}
        policy = ComputeOptimalPolicy(bins=5).fit(log, hard)
        got = {(o.item, o.strategy): o.accuracy for o in log}
        mine = np.mean([got[item, policy.predict(value, 4)] for item, value in hard.items()])
        assert mine >= mean_of(log, "often", 4)
    renamed = {f"q{9 - i}": value for i, value in enumerate([0.0] * 9 + [1.0])}
    assert len(cross_validated(log, renamed, bins=5)) == 10


def test_bins_are_of_equal_size_and_follow_their_questions():
    rng = np.random.default_rng(0)
    for items, bins in ((23, 5), (10, 3), (7, 7)):
        hard = {f"q{i}": float(rng.integers(0, 4)) for i in range(items)}
        found = difficulty_bins(hard, bins)
        sizes = np.bincount(list(found.values()), minlength=bins)
        assert sizes.max() - sizes.min() <= 1
        names = list(hard)
        rng.shuffle(names)
        assert difficulty_bins({name: hard[name] for name in names}, bins) == found
        assert all(hard[a] <= hard[b] for a in hard for b in hard if found[a] < found[b])
    with pytest.raises(ValueError, match="bins"):
        difficulty_bins({"a": 1.0}, 2)


def test_chosen_and_judged_on_the_same_fold_noise_looks_like_a_gain():
    """The pitfall that cross-validation is there for."""
    gains, inside = [], []
    for seed in range(20):
        log, hard = noise(names="abcdefgh", budgets=(1,), seed=seed)
        best = np.mean([o.accuracy for o in log])
        gains.append(np.mean([o.accuracy for o in cross_validated(log, hard, seed=seed)]) - best)
        policy = ComputeOptimalPolicy().fit(log, hard)
        got = {(o.item, o.strategy): o.accuracy for o in log}
        inside.append(np.mean([got[item, policy.predict(value, 1)] for item, value in hard.items()]) - best)
    assert np.mean(inside) > 0.1
    assert abs(np.mean(gains)) < 0.02


def test_groups_stay_together_and_every_question_gets_one_outcome_a_budget():
    log, hard = noise()
    groups = {item: item[-1] for item in hard}
    found = cross_validated(log, hard, bins=2, groups=groups)
    assert sorted((o.item, o.n) for o in found) == sorted((item, n) for item in hard for n in (1, 4))
    # a strategy that only one group's questions know to be right is never chosen for that group
    marked = [
        Outcome(i, f"only {g}", 4, float(groups[i] == g), 1.0) for i in hard for g in sorted(set(groups.values()))
    ]
    assert all(o.accuracy == 0 for o in cross_validated(marked, hard, bins=2, groups=groups) if o.n == 4)


def test_a_real_difference_by_difficulty_is_found_on_other_questions():
    hard = {f"q{i:02}": i / 40 for i in range(40)}
    log = [
        Outcome(item, name, 4, float((value >= 0.5) == (name == "samples")), 1.0)
        for item, value in hard.items()
        for name in ("samples", "search")
    ]
    found = cross_validated(log, hard, bins=4)
    assert np.mean([o.accuracy for o in found]) == 1.0
    fixed = cross_validated(log, hard, bins=1)
    assert np.mean([o.accuracy for o in fixed]) < 0.6


def test_equal_strategies_the_cheaper_one():
    log = [Outcome("q", "dear", 4, 0.5, 9.0), Outcome("q", "cheap", 4, 0.5, 3.0)]
    assert ComputeOptimalPolicy(bins=1).fit(log, {"q": 0.0}).predict(0.0, 4) == "cheap"


def test_outcomes_of_fewer_are_means_over_all_sets():
    attempts = Attempts(tuple("7787"), (0.9, 0.1, 0.5, 0.2), (0, 1, 2, 3))
    found = outcomes("q", "s", attempts, "7", (1, 2, 4), tokens=[1, 2, 3, 4], prompt_tokens=10, draws=4000)
    pairs = list(itertools.combinations(range(4), 2))
    right = [sum(attempts.scores[i] for i in p if attempts.answers[i] == "7") > 0.5 * (2 in p) for p in pairs]
    assert found[0].accuracy == 0.75
    assert found[1].accuracy == pytest.approx(np.mean(right), abs=0.02)
    assert found[2].accuracy == 1.0
    assert [o.tokens for o in found] == pytest.approx([12.5, 15, 20], abs=0.1)
    chained = Attempts(tuple("7788"), (0.5,) * 4, (0, 0, 1, 1))
    assert [o.accuracy for o in outcomes("q", "s", chained, "8", (2,))] == [0.5]
    for budgets in ((3,), (6,)):
        with pytest.raises(ValueError, match="budgets"):
            outcomes("q", "s", chained, "8", budgets)


def test_a_policy_from_logs_of_the_evaluation_harness(tmp_path):
    """Two prompts, logged with four samples a question: one is good at short questions, one at long ones."""

    def logged(name, good):
        lines = []
        for i in range(12):
            question = "1 + 2 =" if i % 2 else "100 + 200 + 300 ="
            right = (len(question) > 8) == good
            said = ["3", "3", "3", "5"] if right else ["4", "4", "5", "3"]
            lines.append(
                {
                    "doc_id": i,
                    "doc": {},
                    "target": "3",
                    "arguments": [[question, {}]],
                    "resps": [said],
                    "filtered_resps": said[:1],
                }
            )
        path = tmp_path / f"samples_{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return read_log(path)

    logs = {"short": logged("short", good=False), "long": logged("long", good=True)}
    log = of_logs(logs, (1, 4), tokens=lambda text: len(text.split()))
    assert {o.n for o in log} == {1, 4}
    hard = {one.item: -float(len(one.prompt)) for one in logs["short"]}
    policy = ComputeOptimalPolicy(bins=2).fit(log, hard)
    assert (policy.predict(-7.0, 4), policy.predict(-17.0, 4)) == ("short", "long")
    assert np.mean([o.accuracy for o in cross_validated(log, hard, bins=2) if o.n == 4]) == 1.0
    assert next(o.tokens for o in log if o.item == "0" and o.n == 4 and o.strategy == "long") == 6 + 4
    with pytest.raises(ValueError, match="same questions"):
        of_logs({"short": logs["short"], "long": logs["long"][1:]}, (1,))
    other = [replace(one, target="4") for one in logs["long"]]
    with pytest.raises(ValueError, match="same questions"):  # numbered alike, and another task's
        of_logs({"short": logs["short"], "long": other}, (1,))
    with pytest.raises(ValueError, match="budgets"):
        of_logs(logs, (5,))
    judge = of_logs({"long": logs["long"]}, (4,), score=lambda prompt, text: float(text == "5"))
    assert {o.accuracy for o in judge} == {0.0}


def test_bad_input_is_named():
    log, hard = noise()
    policy = ComputeOptimalPolicy(bins=2)
    with pytest.raises(ValueError, match="fit must"):
        policy.predict(0.1, 1)
    with pytest.raises(ValueError, match="n must be one of"):
        policy.fit(log, hard).predict(0.1, 2)
    with pytest.raises(ValueError, match="difficulty must be given"):
        policy.fit(log, {"q0": 1.0})
    with pytest.raises(ValueError, match="once"):
        policy.fit(log + log[:1], hard)
    with pytest.raises(ValueError, match="difficulty"):
        policy.fit(log, {**hard, "q0": math.nan})
    with pytest.raises(ValueError, match="accuracy"):
        Outcome("q", "s", 1, 1.5, 0.0)
    with pytest.raises(ValueError, match="log"):
        policy.fit([], hard)
    for short in (log[1:], log[:-1]):  # a strategy that was not tried on one question is not compared on others
        with pytest.raises(ValueError, match="every question"):
            policy.fit(short, hard)
        with pytest.raises(ValueError, match="every question"):
            cross_validated(short, hard)
    with pytest.raises(ValueError, match="groups"):
        cross_validated(log, hard, groups={"q0": "a"})
    with pytest.raises(ValueError, match="folds must leave"):
        cross_validated([Outcome("q", "s", 1, 1.0, 1.0)], {"q": 0.5}, bins=1)
    with pytest.raises(ValueError, match="folds"):
        cross_validated(log, hard, folds=1)
    for empty in (pass_rate, mean_score):
        with pytest.raises(ValueError, match="at least one"):
            empty([])


# ------------------------------------------------------------------------------------------- operations, rows to train on


def test_the_exchange_of_operations():
    for size in (2, 14, 100):
        k = [inference_multiplier(size, ratio) for ratio in (0.01, 0.16, 1, 22, 1e9)]
        assert k == sorted(k, reverse=True)
        assert inference_multiplier(size, math.inf) == size
        for ratio in (0.16, 0.79, 22, math.inf):
            assert matched_size(inference_multiplier(size, ratio), ratio) == pytest.approx(size)
            # by hand: 6 P D to train, 2 P D to answer
            train, answer = 6.0, 2.0 * ratio
            if ratio < math.inf:
                k = inference_multiplier(size, ratio)
                assert train + k * answer == pytest.approx(size * (train + answer))
    assert {inference_multiplier(1, ratio) for ratio in (0.1, 5)} == {1.0}
    for wrong in ((0.5, 1), (2, 0), (2, math.nan), (2, -1)):
        with pytest.raises(ValueError, match=r"size|ratio"):
            inference_multiplier(*wrong)
    with pytest.raises(ValueError, match="n must"):
        matched_size(0, 1)


def test_rows_to_train_a_reviser_on():
    texts = ["x = 12", "x = 13", "nothing", "x = 99", "x = 12 "]
    rows = [row for seed in range(30) for row in revision_rows(texts, [True, False, False, False, True], seed=seed)]
    assert {row.right for row in rows} == {"x = 12", "x = 12 "}
    assert {len(row.attempts) for row in rows} == {0, 1, 2, 3}
    assert all(row.attempts[-1] == "x = 13" for row in rows if row.attempts)
    assert all(len(set(row.attempts)) == len(row.attempts) for row in rows)
    assert revision_rows(["a"], [False]) == []
    assert [row.attempts for row in revision_rows(["a"], [True])] == [()]
    assert edit_distance("abc", "abc") == 0
    assert edit_distance("ab", "ba") == 2
    with pytest.raises(ValueError, match="right"):
        revision_rows(["a"], [])
