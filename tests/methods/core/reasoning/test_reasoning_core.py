"""Samples, budgets, selectors, estimates and step-wise search."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay.methods.core.reasoning import answers, estimates, search, selectors, verifier
from assay.methods.core.reasoning.budget import Budget, OutOfBudget, Spent
from assay.methods.core.reasoning.generator import (
    Sample,
    Sampling,
    TransformersGenerator,
    as_record,
    from_record,
    seed_of,
)
from assay.methods.core.reasoning.samples import Cached, SampleCache, key_of
from assay.methods.core.reasoning.trace import Trace, of_sample

WORDS = ["<end>", "\n", " ", "a", "b", "c", "d", "1", "2", "3", ".", "="]


class Letters:
    """A tokenizer of single characters: enough for a tiny model."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [WORDS.index(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(WORDS[token] for token in tokens)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=64, eos_token_id=0, pad_token_id=None)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # so that probabilities differ
    return made


@pytest.fixture
def generator(model):
    return TransformersGenerator(model, Letters(), batch=7, name="tiny")


SAMPLING = Sampling(temperature=0.9, max_new_tokens=6, stop=("\n",))


def drawn_one_by_one(model, prompt, sampling, seed, number):
    """A reference: no cache, no batch, the whole text read for every token."""
    ids = Letters()(prompt)["input_ids"]
    stream = torch.Generator().manual_seed(seed_of(seed, prompt, number))
    tokens, logprobs = [], []
    while len(tokens) < sampling.max_new_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, -1].double()
        if sampling.temperature:
            shares = (logits / sampling.temperature).softmax(-1)
            order = shares.argsort(descending=True)
            kept, mass = [], 0.0
            for token in order.tolist():
                if mass >= sampling.top_p:
                    break
                kept.append(token)
                mass += float(shares[token])
            u = float(torch.rand(1, generator=stream, dtype=torch.float64)) * sum(float(shares[t]) for t in kept)
            for token in sorted(kept):
                u -= float(shares[token])
                if u < 0:
                    break
        else:
            token = int(logits.argmax())
        tokens.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        text = Letters().decode(tokens)
        if token == 0 or any(stop in text for stop in sampling.stop):
            break
    return tokens, logprobs


@pytest.mark.parametrize("sampling", [SAMPLING, replace(SAMPLING, top_p=0.6), replace(SAMPLING, temperature=0.0)])
def test_samples_are_those_of_a_loop_without_a_cache(model, generator, sampling):
    prompts = ["ab=", "c", "a b c d 1 2"]
    found = generator(prompts, sampling, n=5, seed=3)
    for prompt, samples in zip(prompts, found, strict=True):
        for number, sample in enumerate(samples):
            tokens, logprobs = drawn_one_by_one(model, prompt, sampling, 3, number)
            assert list(sample.tokens) == tokens
            assert sample.logprobs == pytest.approx(logprobs, abs=1e-4)
            text = Letters().decode([t for t in tokens if t])
            assert sample.text == text.split("\n")[0]
            ended = tokens[-1] == 0 or "\n" in text
            assert sample.ended == ("stop" if ended else "length")
            assert sample.matched == ("\n" if "\n" in text else "")
            assert sample.spent.completion == len(tokens)
        assert [sample.spent.prompt for sample in samples] == [len(prompt), 0, 0, 0, 0]
    if not sampling.temperature:
        assert all(len({sample.text for sample in samples}) == 1 for samples in found)


def test_a_sample_is_the_same_whatever_is_drawn_beside_it(generator):
    all_of_them = generator(["ab=", "c"], SAMPLING, n=9, seed=1)
    later = generator(["c"], SAMPLING, n=4, first=5, seed=1)
    assert [s.tokens for s in later[0]] == [s.tokens for s in all_of_them[1][5:]]
    other = generator(["c"], SAMPLING, n=9, seed=2)
    assert [s.tokens for s in other[0]] != [s.tokens for s in all_of_them[1]]


def test_samples_have_the_models_frequencies(model, generator):
    """The first token of many samples, against the softmax: chi-square at the 0.1 % level."""
    n = 600
    found = Counter(sample.tokens[0] for sample in generator(["ab"], replace(SAMPLING, max_new_tokens=1), n=n)[0])
    with torch.no_grad():
        shares = (model(torch.tensor([[3, 4]])).logits[0, -1] / 0.9).softmax(-1).tolist()
    cells = [(found[token], n * share) for token, share in enumerate(shares) if n * share >= 5]
    assert len(cells) > 2
    from scipy.stats import chi2

    assert sum((seen - want) ** 2 / want for seen, want in cells) < chi2.ppf(0.999, len(cells) - 1)


def test_a_prompt_that_does_not_fit_is_refused(generator):
    with pytest.raises(ValueError, match="64 tokens with 6 new ones"):
        generator(["a" * 60], SAMPLING)
    with pytest.raises(ValueError, match="at least one token"):
        generator([""], SAMPLING)
    assert generator([], SAMPLING) == []
    for wrong in (
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": float("nan")},
        {"max_new_tokens": 0},
        {"stop": "a"},
        {"stop": ("",)},
    ):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            Sampling(**wrong)


def test_a_name_changes_with_the_weights(model):
    one = TransformersGenerator(model, Letters()).name
    assert one == TransformersGenerator(model, Letters()).name
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
        other = TransformersGenerator(model, Letters()).name
        model.lm_head.weight[0, 0] -= 1
    assert one != other


# ------------------------------------------------------------------------------------------------------------- the cache


class Counting:
    """A generator that says what it was asked for."""

    def __init__(self, name="counting"):
        self.name, self.asked = name, []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        self.asked.append((tuple(prompts), n, first))
        return [
            [
                Sample(
                    f"{prompt}{seed}{k}", (1,), (-0.5,), "stop", Spent(len(prompt) if k == first else 0, 1, 0, 1, 0.25)
                )
                for k in range(first, first + n)
            ]
            for prompt in prompts
        ]


def test_what_is_kept_is_not_drawn_again(tmp_path):
    inner = Counting()
    kept = Cached(inner, SampleCache(tmp_path / "deep" / "samples.jsonl"))
    four = kept(["abc", "d"], SAMPLING, n=4)
    eight = kept(["abc"], SAMPLING, n=8)
    assert eight[0][:4] == four[0]
    assert inner.asked == [(("abc", "d"), 4, 0), (("abc",), 4, 4)]
    assert [sample.spent.prompt for sample in eight[0]] == [3] + [0] * 7
    assert [sample.spent.prompt for sample in kept(["abc"], SAMPLING, n=2, first=5)[0]] == [3, 0]
    fresh = Cached(None, SampleCache(tmp_path / "deep" / "samples.jsonl"), name="counting")
    assert fresh(["abc", "d"], SAMPLING, n=4) == four
    with pytest.raises(LookupError, match="1 of 2 prompts"):
        fresh(["abc", "d"], SAMPLING, n=8)
    kept(["abc"], replace(SAMPLING, temperature=0.1), n=1)
    kept(["abc"], SAMPLING, n=1, seed=1)
    assert len(inner.asked) == 4
    with pytest.raises(ValueError, match="name"):
        Cached(None, kept.cache)


def test_a_torn_line_loses_itself_only(tmp_path):
    path = tmp_path / "samples.jsonl"
    cache = SampleCache(path)
    Cached(Counting(), cache)(["ab"], SAMPLING, n=3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + b"\n[1]\n" + json.dumps({"key": "k", "sample": {"text": 1}}).encode() + b"\n{")
    again = SampleCache(path)
    assert (len(again), again.damaged) == (2, 4)
    Cached(Counting(), again)(["ab"], SAMPLING, n=3)
    assert len(SampleCache(path)) == 3


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "samples.jsonl"
    one, two = SampleCache(path), SampleCache(path)
    for cache, name in ((one, "x"), (two, "y")):
        Cached(Counting(name), cache)(["ab"], SAMPLING, n=3)
    Cached(Counting("x"), two)(["ab"], SAMPLING, n=3)
    assert len(SampleCache(path)) == 6


def test_a_sample_read_back_is_equal_and_another_is_refused():
    sample = Sample("é\n", (5, 0), (-0.1, -2.5), "length", Spent(3, 2, 1, 1, 0.5), "")
    assert from_record(json.loads(json.dumps(as_record(sample)))) == sample
    for change in (
        {"tokens": [1.5, 0]},
        {"logprobs": [float("nan"), 0]},
        {"ended": "never"},
        {"text": 3},
        {"spent": {"prompt": -1}},
    ):
        with pytest.raises((ValueError, TypeError)):
            from_record({**as_record(sample), **change})


def test_keys_differ_with_all_that_makes_a_sample():
    base = ("name", "prompt", SAMPLING, 0, 0)
    others = [
        ("other", *base[1:]),
        ("name", "p", *base[2:]),
        (*base[:2], replace(SAMPLING, top_p=0.5), 0, 0),
        (*base[:3], 1, 0),
        (*base[:4], 1),
    ]
    assert len({key_of(*each) for each in [base, *others]}) == 6


# ------------------------------------------------------------------------------------------------------------- the budget


def test_everything_is_charged_and_the_limit_is_for_all_of_it():
    budget = Budget(tokens=50, seconds=2)
    budget.book("plan", Spent(10, 5, 4, 1, 0.5))
    budget.book("solve", Spent(0, 20, calls=1, seconds=1.0), failed=True)
    assert budget.spent() == Spent(10, 25, 4, 2, 1.5)
    assert budget.spent().tokens == 31
    assert budget.left == 19
    assert not budget.over
    budget.require(19)
    with pytest.raises(OutOfBudget, match="20 tokens are needed and 19 of 50"):
        budget.require(20)
    budget.book("verify", Spent(seconds=0.6))
    assert budget.over
    with pytest.raises(OutOfBudget, match="seconds"):
        budget.require(0)
    assert budget.spent(failed=False).completion == 5
    assert Budget().left is None
    with pytest.raises(ValueError, match="purpose"):
        budget.book("fun", Spent())
    with pytest.raises(ValueError, match="cached"):
        Spent(prompt=1, cached=2)
    with pytest.raises(ValueError, match="tokens"):
        Budget(tokens=-1)


# ------------------------------------------------------------------------------------------------------------- answers, selectors


def test_answers_that_are_equal_have_one_spelling():
    for same in (
        ["0.5", "1/2", "2/4", ".50", r"\frac12".replace("12", "{1}{2}"), "50e-2"],
        ["1,200", "1200.0", "$1200."],
        ["-0", "0"],
    ):
        assert len({answers.canonical(one) for one in same}) == 1, same
    assert answers.canonical("1/0") == "1/0"
    assert answers.number("9" * 1000) is None
    assert answers.canonical("(1, 2)") != answers.canonical("(2, 1)")
    assert answers.extract("The answer is 12, not 13. The answer is 3/4") == "3/4"
    assert answers.extract("first 5 then 7.") == "7"
    assert answers.boxed(r"\boxed{1} and \boxed{2") is None
    assert answers.number("3/8") == Fraction(3, 8)
    with pytest.raises(TypeError, match="answer"):
        answers.canonical(3)


def test_votes():
    assert selectors.weighted(["a", "b", "b"], [1, 0.5, 0.5]) == "a"  # a tie: the first
    assert selectors.majority(["", "", "x"]) == "x"
    assert selectors.weighted(["x", "y"], [0, 0]) == "x"
    rng = np.random.default_rng(0)
    for _ in range(50):
        said = [str(k) for k in rng.integers(0, 3, 6)]
        scores = rng.random(6)
        assert selectors.majority(said) == Counter(said).most_common(1)[0][0]
        assert selectors.weighted(said, [0.3] * 6) == selectors.majority(said)
        one_hot = [0.0] * 6
        one_hot[int(scores.argmax())] = 1.0
        assert selectors.weighted(said, one_hot) == said[selectors.best_of_n(list(scores))]
        assert selectors.min_max(list(3 * scores + 2)) == pytest.approx(selectors.min_max(list(scores)))
    for wrong in (
        lambda: selectors.majority([]),
        lambda: selectors.weighted(["a"], [-1]),
        lambda: selectors.best_of_n([math.nan]),
    ):
        with pytest.raises(ValueError, match=r"answers|weights|scores"):
            wrong()


# ------------------------------------------------------------------------------------------------------------- estimates


def test_coverage_is_the_share_of_all_sets():
    for n in range(1, 7):
        for correct in range(n + 1):
            right = [i < correct for i in range(n)]
            for N in range(1, n + 1):
                sets = list(itertools.combinations(right, N))
                assert estimates.coverage(correct, n, N) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)
    assert estimates.coverage(1, 10_000, 5_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="N must be"):
        estimates.coverage(1, 4, 5)


def test_accuracy_of_a_selector_lies_between_chance_and_coverage():
    rng = np.random.default_rng(1)
    right = list(rng.random(20) < 0.3)
    scores = rng.random(20)
    best = estimates.accuracy_at(right, 8, lambda members: max(members, key=lambda i: right[i]), draws=400)
    assert best == pytest.approx(estimates.coverage(sum(right), 20, 8), abs=0.06)
    blind = estimates.accuracy_at(right, 8, lambda members: members[0], draws=400)
    assert blind == pytest.approx(np.mean(right), abs=0.1)
    chosen = estimates.accuracy_at(right, 8, lambda members: max(members, key=lambda i: scores[i]), draws=400)
    assert chosen <= best
    with pytest.raises(ValueError, match="select must choose"):
        estimates.accuracy_at(right, 2, lambda members: 99)
    mean, low, high = estimates.over_items([0.0] * 50 + [1.0] * 50)
    assert low < mean == 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


# ------------------------------------------------------------------------------------------------------------- verifiers, search


class Scripted:
    """Writes "x", "y", ... by number, ends behind three steps; what was read is the prefix."""

    name = "scripted"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        self.calls.append((tuple(prompts), n, first))
        found = []
        for prompt in prompts:
            last = prompt.count("\n") >= 2
            found.append(
                [
                    Sample(
                        "xyzuvwrst"[k % 9],
                        (1, 2),
                        (-0.5, -0.5),
                        "stop",
                        Spent(len(prompt), 2, 0, 1),
                        "" if last else "\n",
                    )
                    for k in range(first, first + n)
                ]
            )
        return found


class Prefers:
    """Worth more the earlier in the alphabet the last letter comes."""

    def score(self, traces):
        return [[(123 - ord(step[0])) / 26 for step in trace.steps] for trace in traces], Spent(prompt=1, calls=1)


def test_beam_search_keeps_the_best_and_never_draws_more_than_n():
    writer, budget = Scripted(), Budget()
    beams = search.beam_search(writer, Prefers(), "p", Sampling(max_new_tokens=8), n=4, width=2, budget=budget)
    assert len(beams) == 4
    assert all(beam.finished and len(beam.steps) == 3 for beam in beams)
    assert {beam.steps[0] for beam in beams} == {"u\n", "x\n"}
    assert [sum(len(p) * n for p, n, _ in [call]) for call in writer.calls] == [4, 4, 4]
    assert budget.spent("verify").calls == 3
    assert budget.spent("solve").completion == 2 * 12
    for beam in beams:
        assert beam.score == beam.scores[-1]
        assert beam.completion == 6
    one = search.beam_search(Scripted(), Prefers(), "p", Sampling(max_new_tokens=8), n=1, width=1)
    assert one[0].text == "x\nx\nx"
    flat = search.beam_search(Scripted(), Prefers(), "p", Sampling(max_new_tokens=8), n=3, width=3, rounds=1)
    assert [beam.text for beam in flat] == ["x\n", "y\n", "z\n"]
    with pytest.raises(ValueError, match="width must divide"):
        search.beam_search(Scripted(), Prefers(), "p", Sampling(), n=4, width=3)


def test_equal_traces_get_different_steps_and_finished_ones_none():
    same = [Trace("p"), Trace("p")]
    grown = search.expand(Scripted(), same, [2, 1], Sampling())
    assert [[trace.text for trace in own] for own in grown] == [["x\n", "y\n"], ["z\n"]]
    done = replace(same[0], finished=True)
    with pytest.raises(ValueError, match="finished"):
        search.expand(Scripted(), [done], [1], Sampling())
    assert search.expand(Scripted(), [done], [0], Sampling()) == [[]]
    found = search.expand(Scripted(), [Trace("p")], [1], Sampling(), finished=lambda text: "x" in text)
    assert found[0][0].finished


def test_verifiers():
    sample = Sample(" 5\n", (1, 2), (-1.0, -3.0), "stop", Spent(3, 2, calls=1), "\n")
    trace = Trace("2+3=", (" 4\n", " 5\n"), (replace(sample, text=" 4\n"), sample))
    check = verifier.Checker({"2+3=": "5"})
    assert check.score([trace]) == ([[0.0, 1.0]], Spent())
    with pytest.raises(KeyError):
        check.score([Trace("other", ("1",))])
    assert verifier.LogProbability().score([trace])[0] == [[math.exp(-2)] * 2]
    with pytest.raises(ValueError, match="log-probabilities"):
        verifier.LogProbability().score([Trace("p", ("x",))])
    chance = verifier.Chance(1).score([trace, trace])[0]
    assert chance[0] == chance[1] != verifier.Chance(2).score([trace])[0][0]
    assert all(0 <= value < 1 for value in chance[0])
    many = verifier.Chance().score([of_sample(str(k), sample) for k in range(400)])[0]
    assert np.mean(many) == pytest.approx(0.5, abs=0.05)


def test_a_learned_verifier_finds_what_tells_right_from_wrong():
    def features(prompt, text):
        return [len(text), text.count("1")]

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("12 "), rng.integers(1, 9))) for _ in range(200)]
    right = [text.count("1") >= 2 for text in texts]
    learned = verifier.Learned(features).fit(["p"] * 200, texts, right)
    scores = np.array([own[0] for own in learned.score([Trace("p", (text,)) for text in texts])[0]])
    assert scores[np.array(right)].min() > scores[~np.array(right)].max() - 0.05
    with pytest.raises(ValueError, match="one kind"):
        verifier.Learned(features).fit(["p"], ["1"], [True])
    with pytest.raises(ValueError, match="fit"):
        verifier.Learned(features).score([Trace("p", ("1",))])
    with pytest.raises(ValueError, match="finite"):
        verifier.Learned(lambda p, t: [math.nan]).fit(["p"] * 2, ["1", "2"], [True, False])


def test_a_comma_belongs_to_a_number_only_between_thousands():
    """ "1,2" is no twelve: whoever answers with two numbers has not given that one."""
    from assay.methods.core.reasoning.answers import canonical, extract, number

    assert [canonical(text) for text in ("1,2", "1,200", "12,345,678", "1,2000")] == [
        "1,2",
        "1200",
        "12345678",
        "1,2000",
    ]
    assert (number("3,4"), extract("it is 1,2"), extract("answer: 1,200 apples")) == (None, "2", "1200")
