"""Speculative decoding: exact by enumeration and by count, the same tokens as transformers' own loops, over a cache and over pages."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import sys
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests.properties import paged_stand_in_spec as stand_in
from tests.properties.architectures import CAUSAL, build
from tests.tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, StaticCache, StoppingCriteria

from assay.methods.builtin import decode_loop
from assay.methods.builtin import speculation as sp
from assay.methods.builtin.decode_loop import Sampling, draw_in_torch
from assay.methods.builtin.decode_loop.generate import with_loop
from assay.methods.builtin.speculation import loop
from assay.methods.builtin.speculation.verification import acceptance, pick, probabilities, residual
from assay.methods.core import kernels
from assay.methods.core.generation.loop import generate_batch
from assay.methods.transform import Transform, TuneContext

CONTEXT = TuneContext(goal="decode", prompt_tokens=16, new_tokens=16)
PAGED = "assay.methods.core.generation.paged"


def repeating(length=24, vocab=97, seed=0):
    """A prompt that ends as it began, so that there is something to look up: (1, length), longer than the windows of 16."""
    random = torch.Generator().manual_seed(seed)
    phrase = torch.randint(3, vocab, (8,), generator=random).tolist()
    other = torch.randint(3, vocab, (length,), generator=random).tolist()
    return torch.tensor([other[: length - 21] + phrase + other[-5:] + phrase])


def greedy(model, ids, **more):
    return model.generate(ids, **{"max_new_tokens": 32, "do_sample": False, **more})


def with_speculation(model, **config):
    return sp.transform.apply(copy.deepcopy(model), config, CONTEXT)


@pytest.fixture(scope="module")
def model():
    """It repeats itself, but not all the time: some drafts are right and some are not."""
    return tiny_model(initializer_range=0.1)


@pytest.fixture(scope="module")
def fast(model):
    return with_speculation(model)


@pytest.fixture
def paged(model, monkeypatch):
    """The model with a compiled loop, as far as speculation sees it: a decoder over pages, in plain torch."""
    monkeypatch.setitem(sys.modules, PAGED, stand_in)
    made = copy.deepcopy(model)
    decoder = stand_in.Decoder(copy.deepcopy(model))
    made.__class__ = with_loop(type(made))
    made.decode_loop = decoder
    return sp.attach(made)


# ---- look-up


def looked_up(tokens, count, ngram):
    """The same by searching the whole text."""
    for length in range(min(ngram, len(tokens)), min(2, ngram) - 1, -1):
        places = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if places:
            whole = list(tokens)
            for place in range(places[-1], places[-1] + count):
                whole.append(whole[place])
            return whole[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    cut=st.integers(0, 40),
    count=st.integers(0, 9),
    ngram=st.integers(1, 5),
)
def test_the_index_finds_what_a_search_finds(tokens, cut, count, ngram):
    index = sp.Lookup(tokens[:cut], ngram=ngram)
    index.propose(count)  # looking changes nothing
    index.add(tokens[cut:])
    assert index.propose(count) == looked_up(tokens, count, ngram) == sp.propose(tokens, count, ngram=ngram)


def test_the_index_grows_by_at_most_a_run_of_each_length_a_token():
    index = sp.Lookup(range(1000), ngram=4)
    before = len(index._follows)
    index.add([7])
    assert len(index._follows) <= before + 3


def test_lookup_says_what_is_wrong():
    with pytest.raises(ValueError, match="ngram must be a whole number at least 1 and at most 16, got 0"):
        sp.Lookup([], ngram=0)
    with pytest.raises(TypeError, match="tokens must be whole numbers, got 1.5"):
        sp.Lookup([1.5])
    with pytest.raises(ValueError, match="count must be a whole number at least 0"):
        sp.propose([1, 2], -1)


# ---- verifying: by exact enumeration on a vocabulary of three tokens, drafts of two

SAMPLINGS = [Sampling(), Sampling(0.6), Sampling(1.3, top_k=2), Sampling(1.0, top_p=0.75)]
TOKENS = range(3)


def tree(seed):
    """Logits after every beginning of up to two tokens."""
    random = torch.Generator().manual_seed(seed)
    beginnings = [(), *itertools.product(TOKENS), *itertools.product(TOKENS, repeat=2)]
    return {begin: 1.5 * torch.randn(3, generator=random) for begin in beginnings}


TARGET, SOURCE = tree(1), tree(2)


def chance(logits, tokens, sampling, begin=()):
    """The probability of some tokens after a beginning."""
    found = 1.0
    for token in tokens:
        found *= float(probabilities(logits[begin], sampling)[token])
        begin = (*begin, token)
    return found


def shares(weights):
    return (weights.cumsum(0) / weights.sum().clamp_min(1e-300)).tolist()


def cells(p, q, token):
    """(middle, width) of the pieces of [0, 1) on which a decision with one random number can be constant."""
    keep = 1.0 if float(q[token]) == 0 else min(1.0, float(p[token] / q[token]))
    edges = [0.0, keep, 1.0, float(p[token])]
    for weights in (p, (p - q).clamp_min(0), p - p * torch.eye(3)[token]):
        for begin in (0.0, keep, float(p[token])):
            edges += [begin + (1 - begin) * share for share in shares(weights)]
    edges = sorted(edge for edge in edges if 0 <= edge <= 1)
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(edges) if b - a > 1e-12]


def distribution(check, sampling, drafts):
    """What three tokens are drawn from when `check` decides about drafts, which come with their probabilities and what they were
    drawn from; where it makes fewer than three, the model itself goes on."""
    found = defaultdict(float)
    for draft, weight, q in drafts:
        logits = torch.stack([TARGET[draft[:place]] for place in TOKENS])
        uniforms = []
        for place in TOKENS:
            p = probabilities(logits[place], sampling)
            last = place == 2
            q_here = torch.eye(3)[0] if last else (torch.eye(3)[draft[place]] if q is None else q[place])
            kept, middle = 0.0, None
            for uniform, width in cells(p, q_here.double(), 0 if last else draft[place]):
                numbers = torch.tensor([*uniforms, uniform, *[0.5] * (2 - place)], dtype=torch.float64)
                made = tuple(check(logits, list(draft), q, sampling, numbers))
                if len(made) > place + 1:
                    kept, middle = kept + width, uniform
                    continue
                assert len(made) == place + 1
                for rest in itertools.product(TOKENS, repeat=2 - place):
                    found[made + rest] += weight * width * chance(TARGET, rest, sampling, made)
            if middle is None:
                break
            weight *= kept
            uniforms.append(middle)
    return found


def drawn(sampling):
    """Every draft that the source may draw, with its probability and the distributions it was drawn from."""
    for draft in itertools.product(TOKENS, repeat=2):
        if weight := chance(SOURCE, draft, sampling):
            yield draft, weight, torch.stack([probabilities(SOURCE[draft[:place]], sampling) for place in (0, 1)])


def off(found, sampling):
    """How far a distribution over three tokens is from the model's own."""
    return max(abs(found[tokens] - chance(TARGET, tokens, sampling)) for tokens in itertools.product(TOKENS, repeat=3))


def always(logits, draft, q, sampling, uniforms):
    """Wrong: every draft stands."""
    return [*draft, pick(probabilities(logits[-1], sampling), float(uniforms[-1]))]


def resampling(logits, draft, q, sampling, uniforms):
    """Wrong: a rejected token is drawn again from p, not from what is left of it."""
    made = []
    for place, uniform in enumerate(uniforms.tolist()):
        p = probabilities(logits[place], sampling)
        if place == len(draft):
            return [*made, pick(p, uniform)]
        given = torch.eye(len(p), dtype=torch.float64)[draft[place]] if q is None else q[place]
        keep = acceptance(p, given, draft[place])
        if uniform >= keep:
            return [*made, pick(p, (uniform - keep) / (1 - keep))]
        made.append(draft[place])
    return made


def thresholding(logits, draft, q, sampling, uniforms):
    """Wrong: what is likely enough stands."""
    made = []
    for place, uniform in enumerate(uniforms.tolist()):
        p = probabilities(logits[place], sampling)
        if place == len(draft) or p[draft[place]] < 0.3:
            return [*made, pick(p, uniform)]
        made.append(draft[place])
    return made


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_drawn_draft_leaves_the_distribution_as_it_is(sampling):
    assert off(distribution(sp.verify, sampling, drawn(sampling)), sampling) < 1e-9


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft", list(itertools.product(TOKENS, repeat=2)))
def test_a_draft_looked_up_leaves_the_distribution_as_it_is(draft, sampling):
    assert off(distribution(sp.verify, sampling, [(draft, 1.0, None)]), sampling) < 1e-9


@pytest.mark.parametrize("wrong", [always, resampling, thresholding])
def test_the_enumeration_tells_a_wrong_rule(wrong):
    assert off(distribution(wrong, Sampling(), drawn(Sampling())), Sampling()) > 0.01
    assert off(distribution(wrong, Sampling(), [((0, 1), 1.0, None)]), Sampling()) > 0.01


def test_what_is_left_of_p():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.4, 0.0, 0.0]))
    assert acceptance(p, q, 0) == 1
    assert acceptance(p, q, 1) == pytest.approx(0.5)
    assert torch.equal(residual(p, p), p)  # never needed but for rounding: any token will do


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), sampling=st.sampled_from([*SAMPLINGS, Sampling(0.8, 3, 0.9)]))
def test_a_token_is_the_one_drawn_without_a_draft(seed, sampling):
    """Whatever was looked up: the random number of a place decides about its token."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, 6, generator=random)
    uniforms = torch.rand(4, dtype=torch.float64, generator=random)
    draft = torch.randint(6, (3,), generator=random).tolist()
    plain = draw_in_torch(logits, sampling, uniforms).tolist()
    kept = next((place for place in range(3) if draft[place] != plain[place]), 3)
    assert sp.verify(logits, draft, None, sampling, uniforms) == plain[: kept + 1]
    assert sp.verify(logits, plain[:3], None, sampling, uniforms) == plain


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 5), known=st.integers(0, 5))
def test_greedy_keeps_what_is_largest(seed, count, known):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(count + 1, 4, generator=random)
    best = logits.argmax(1).tolist()
    draft = best[:known][:count] + torch.randint(4, (max(count - known, 0),), generator=random).tolist()
    kept = next((place for place in range(count) if draft[place] != best[place]), count)
    assert sp.verify(logits, draft, None, None, None) == best[: kept + 1]


def test_what_has_no_weight_is_never_picked():
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert pick(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), uniform) in (1, 3)


def test_probabilities_of_a_sampling():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    torch.testing.assert_close(probabilities(logits, Sampling(0.5)), (2 * logits.double()).softmax(0))
    kept = torch.tensor([1.0, -torch.inf, -torch.inf, 2.0, -torch.inf]).double().softmax(0)
    torch.testing.assert_close(probabilities(logits, Sampling(top_k=2)), kept)
    torch.testing.assert_close(probabilities(logits, Sampling(top_p=0.8)), kept)  # 0.64 + 0.24 passes 0.8
    assert probabilities(logits, Sampling(top_p=0.0)).tolist() == [0, 0, 0, 1, 0]  # as transformers' own warper has it


def test_verify_says_what_is_wrong():
    logits, numbers = torch.zeros(2, 5), torch.full((2,), 0.5, dtype=torch.float64)
    even = torch.full((1, 5), 0.2)
    with pytest.raises(ValueError, match=r"logits must have shape \(3, vocabulary\), got \(2, 5\)"):
        sp.verify(logits, [1, 2], None, None, None)
    with pytest.raises(ValueError, match="draft must be a whole number at least 0 and at most 4, got 5"):
        sp.verify(logits, [5], None, None, None)
    with pytest.raises(TypeError, match="uniforms must be a tensor"):
        sp.verify(logits, [1], None, Sampling(), None)
    with pytest.raises(ValueError, match=r"uniforms must have shape \(2\)"):
        sp.verify(logits, [1], None, Sampling(), numbers[:1])
    for wrong in (1.0, -0.1, torch.nan):
        with pytest.raises(ValueError, match=r"uniforms must lie in \[0, 1\)"):
            sp.verify(logits, [1], None, Sampling(), torch.full((2,), wrong))
    with pytest.raises(ValueError, match=r"q must have shape \(1, 5\)"):
        sp.verify(logits, [1], torch.ones(1, 4), Sampling(), numbers)
    with pytest.raises(ValueError, match="q must be what the draft was drawn from, but token 1 has 0.0"):
        sp.verify(logits, [1], even * torch.tensor([1, 0, 1, 1, 1]), Sampling(), numbers)
    for value in (torch.nan, -torch.inf):
        with pytest.raises(ValueError, match="logits must be numbers"):
            sp.verify(torch.full((2, 5), value), [1], even, Sampling(), numbers)
    with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
        sp.verify(torch.full((2, 5), torch.nan), [1], None, None, None)


# ---- the loop: by count, on a chain of three tokens


class Chain:
    """An engine whose logits depend on the last token alone."""

    more = 0.1

    def __init__(self, table, tokens=(0,)):
        self.table, self.tokens = table, list(tokens)

    @property
    def length(self):
        return len(self.tokens)

    def extend(self, tokens):
        self.tokens += tokens
        return self.table[tokens].clone()

    def crop(self, length):
        assert length <= self.length
        del self.tokens[length:]


class ChainDrafter:
    """Draws drafts from another chain."""

    cost = 0.0

    def __init__(self, table):
        self.table, self.last = table, 0

    def add(self, tokens):
        self.last = list(tokens)[-1]

    def draft(self, count, sampling):
        draft, q = [], []
        for token in range(count):
            token = draft[-1] if draft else self.last
            q.append(probabilities(self.table[token], sampling))
            draft.append(pick(q[-1], float(torch.rand((), dtype=torch.float64))))
        return draft, torch.stack(q)


def chi_square(runs, seed, sampling):
    """The p-value of `runs` answers of three tokens, against the probabilities of all 27."""
    torch.manual_seed(seed)
    target, source = 1.2 * torch.randn(2, 3, 3)
    seen = defaultdict(int)
    for _ in range(runs):
        answer = sp.speculate(Chain(target), target[0], ChainDrafter(source), 3, sampling=sampling)
        seen[tuple(answer)] += 1
    expected = {}
    for tokens in itertools.product(TOKENS, repeat=3):
        rows = [probabilities(target[before], sampling) for before in (0, *tokens[:2])]
        expected[tokens] = runs * float(rows[0][tokens[0]] * rows[1][tokens[1]] * rows[2][tokens[2]])
    assert set(seen) <= {tokens for tokens, count in expected.items() if count}
    expected = {tokens: count for tokens, count in expected.items() if count}
    return chisquare([seen[tokens] for tokens in expected], list(expected.values())).pvalue


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=2)])
def test_answers_follow_the_distribution(sampling):
    assert chi_square(1500, 0, sampling) > 0.001


@pytest.mark.parametrize("wrong", [always, resampling])
def test_the_count_tells_a_wrong_rule(wrong, monkeypatch):
    monkeypatch.setattr(loop, "verify", wrong)
    assert chi_square(1500, 0, Sampling()) < 1e-6


class Fixed:
    """Drafts that are always the same token."""

    cost = 0.0

    def __init__(self, token):
        self.token, self.asked = token, []

    def add(self, tokens):
        pass

    def draft(self, count, sampling):
        self.asked.append(count)
        return [self.token] * count, None


def cycle(size=5):
    """A chain in which each token is followed by the next."""
    return torch.eye(size).roll(1, 1) * 9


def test_the_engine_holds_all_but_the_last_token():
    table = cycle()
    for new in range(1, 12):
        for drafter in (Fixed(1), sp.Lookup([0, 1, 2, 3, 4, 0])):
            engine = Chain(table, [0])
            made = sp.speculate(engine, table[0], drafter, new)
            assert made == [(1 + place) % 5 for place in range(new)]
            assert engine.tokens == [0, *made][:-1]


@pytest.mark.parametrize("ends", [(2,), (4, 3)])
def test_nothing_follows_an_end(ends):
    table, told = cycle(), []
    engine, counts = Chain(table, [0]), sp.Counts()
    lookup = sp.Lookup([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0])
    made = sp.speculate(engine, table[0], lookup, 50, ends=ends, put=told.append, counts=counts)
    assert made == told == list(range(1, min(ends) + 1))
    assert engine.tokens == [0, *made][:-1]
    assert counts.tokens == len(made)


def test_no_end_at_first():
    table = cycle()
    table[:, 3] += 5  # second best, where it is not best
    made = sp.speculate(Chain(table), table[0], sp.Lookup([0]), 50, ends=[1, 2, 4], no_end=4)
    assert len(made) == 5
    assert set(made[:4]) <= {0, 3}
    assert made[4] in (1, 2, 4)


def test_no_end_within_a_draft_either():
    table = cycle()
    table[1, 3] = 5  # after 1 comes 2, which ends the answer, else 3
    drafts, counts = sp.Lookup([0, 1, 3, 4] * 5 + [0]), sp.Counts()
    made = sp.speculate(Chain(table), table[0], drafts, 50, ends=[2], no_end=10, counts=counts)
    assert made == [1, 3, 4, 0] * 3 + [1, 2]
    assert counts.accepted > 5


def test_nothing_is_drafted_beyond_an_end():
    table, counts = cycle(), sp.Counts()
    made = sp.speculate(Chain(table), table[0], sp.Lookup([0, 1, 2, 3, 4] * 3 + [0]), 50, ends=[2], counts=counts)
    assert made == [1, 2]
    assert (counts.drafted, counts.accepted) == (1, 1)


def test_a_stop_is_asked_for_every_token_and_drops_the_rest():
    table, asked, told = cycle(), [], []
    engine = Chain(table)

    def stop(made):
        asked.append(list(made))
        return len(made) == 7

    lookup = sp.Lookup([0, 1, 2, 3, 4] * 3 + [0])
    made = sp.speculate(engine, table[0], lookup, 50, put=told.append, stop=stop)
    assert made == told == [1, 2, 3, 4, 0, 1, 2]
    assert asked == [made[:n] for n in range(1, 8)]
    assert engine.tokens == [0, *made][:-1]


def test_whoever_gets_a_token_may_raise():
    table = cycle()
    engine = Chain(table)

    def put(token):
        if token == 3:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        sp.speculate(engine, table[0], sp.Lookup([0, 1, 2, 3, 4] * 3 + [0]), 50, put=put)
    assert all(after == (before + 1) % 5 for before, after in itertools.pairwise(engine.tokens))  # nothing rejected


def test_drafts_never_reach_beyond_the_answer():
    table = cycle()
    drafter = Fixed(2)
    sp.speculate(Chain(table), table[0], drafter, 4)
    assert max(drafter.asked) <= 2


# ---- how long drafts are


def test_drafts_grow_where_they_are_right_and_end_where_they_are_not():
    length = sp.DraftLength(8, more=0.1)
    assert 1 <= length.next() < 8
    for _ in range(20):
        length.seen(4, 4)
    assert length.next() == 8
    for _ in range(20):
        length.seen(4, 0)
    assert length.next() == 0
    assert sp.DraftLength(8, more=2.0).next() == 0  # a pass over two costs as much as three passes
    assert sp.DraftLength(0, more=0.0).next() == 0


def test_a_pause_grows_until_a_draft_is_right_again():
    length = sp.DraftLength(8, more=0.3)
    for _ in range(40):
        length.seen(1, 0)

    def pause():
        for waited in itertools.count():
            if length.next():
                return waited
        return None

    pauses = []
    for _ in range(6):
        pauses.append(pause())
        length.seen(1, 0)
    assert pauses == [8, 16, 32, 64, 128, 128]
    pause()
    length.seen(1, 1)
    assert pause() <= 8


def test_a_draft_that_was_not_found_is_no_trial():
    length = sp.DraftLength(8, more=0.3)
    for _ in range(40):
        length.seen(1, 0)
    for _ in range(8):
        assert not length.next()
    for _ in range(3):
        assert length.next() == 1
        length.seen(0, 0)


def test_what_never_comes_true_is_hardly_drafted():
    table, counts = cycle(), sp.Counts()
    wrong = Fixed(4)
    wrong.draft = lambda count, sampling: ([], None) if not count else ([0] * count, None)
    table[:, 0] -= 20
    sp.speculate(Chain(table), table[0], wrong, 400, counts=counts)
    assert counts.passes == 399
    assert counts.accepted == 0
    assert counts.drafted < 40


# ---- generate: the same tokens as transformers


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_gives_the_same_tokens_or_says_why_not(name):
    plain = build(name)
    fit = sp.transform.applies_to(plain, CONTEXT)
    if not fit.applies:
        assert name == "mamba"
        assert "cannot be taken back" in fit.reason
        with pytest.raises(ValueError, match="speculation does not fit this model"):
            sp.attach(plain)
        return
    tuned = with_speculation(plain, ngram=1)  # what follows a single token is often wrong
    for seed in (0, 1):
        ids = repeating(vocab=160, seed=seed)
        more = {"pad_token_id": 0, "min_new_tokens": 32}
        assert torch.equal(greedy(tuned, ids, **more), greedy(plain, ids, **more))
        assert tuned.speculation.counts.tokens == 32
        assert tuned.speculation.counts.drafted


def test_drafts_are_accepted_and_save_passes(model, fast):
    passes = []
    handle = fast.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    made = greedy(fast, repeating(), max_new_tokens=120)
    handle.remove()
    counts = fast.speculation.counts
    assert torch.equal(made, greedy(model, repeating(), max_new_tokens=120))
    assert 0 < counts.accepted <= counts.drafted
    assert counts.passes == len(passes) - 1 == 119 - counts.accepted  # the first pass is the prompt's
    assert sum(passes[1:]) == counts.passes + counts.drafted
    assert counts.accept_rate == counts.accepted / counts.drafted


def test_as_many_passes_as_transformers_own_lookup_takes_or_fewer(model, fast):
    passes = defaultdict(int)

    def count(key):
        return lambda module, args: passes.update({key: passes[key] + 1})

    for seed in range(4):
        ids = repeating(seed=seed)
        handles = [each.model.register_forward_pre_hook(count(key)) for key, each in (("own", fast), ("theirs", model))]
        own = greedy(fast, ids, max_new_tokens=100)
        theirs = greedy(model, ids, max_new_tokens=100, prompt_lookup_num_tokens=8, max_matching_ngram_size=3)
        for handle in handles:
            handle.remove()
        assert torch.equal(own, theirs)
    assert passes["own"] <= 1.1 * passes["theirs"]


@pytest.mark.parametrize("most", [1, 3, 8])
def test_sampled_tokens_are_those_of_plain_decoding(model, most):
    """With the same random numbers, one a token, whatever is drafted."""
    tuned, sampling, accepted = with_speculation(model, draft=most), Sampling(0.4, 5, 0.9), 0
    ids = repeating()
    for seed in range(4):
        torch.manual_seed(seed)
        made = tuned.generate(ids, do_sample=True, temperature=0.4, top_k=5, top_p=0.9, max_new_tokens=30)
        accepted += tuned.speculation.counts.accepted
        torch.manual_seed(seed)
        plain, cache = ids, DynamicCache(config=model.config)
        for _ in range(30):
            with torch.no_grad():
                logits = model(plain[:, cache.get_seq_length() :], cache=cache).logits[:, -1]
            token = draw_in_torch(logits, sampling, torch.rand(1, dtype=torch.float64))
            plain = torch.cat([plain, token[:, None]], 1)
        assert torch.equal(made, plain), seed
    assert accepted


def test_sampling_repeats_with_the_seed(fast):
    def sample(seed, **more):
        torch.manual_seed(seed)
        return fast.generate(repeating(), max_new_tokens=20, do_sample=True, **more)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, top_k=1), greedy(fast, repeating(), max_new_tokens=20))


def test_end_tokens(model, fast):
    ids = repeating()
    free = greedy(model, ids)[0, ids.shape[1] :].tolist()
    for ends in ([free[0]], [free[9]], [free[20], free[15]]):
        more = {"eos_token_id": ends, "pad_token_id": 0}
        assert torch.equal(greedy(fast, ids, **more), greedy(model, ids, **more))
        for least in (3, 17, 40):
            longer = {**more, "min_new_tokens": least, "max_new_tokens": 40}
            assert torch.equal(greedy(fast, ids, **longer), greedy(model, ids, **longer))
            assert fast.speculation.counts.tokens
    more |= {"min_length": ids.shape[1] + 12}
    assert torch.equal(greedy(fast, ids, **more), greedy(model, ids, **more))
    assert fast.speculation.counts.tokens


@pytest.mark.parametrize("new", [1, 2, 3, 50])
def test_as_many_tokens_as_asked_for(model, fast, new):
    ids = repeating()
    assert torch.equal(greedy(fast, ids, max_new_tokens=new), greedy(model, ids, max_new_tokens=new))


class Listener:
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.clone())

    def end(self):
        self.ended += 1


def test_streamer_gets_the_tokens_one_by_one(model, fast):
    ids = repeating()
    ours, theirs = Listener(), Listener()
    assert torch.equal(greedy(fast, ids, streamer=ours), greedy(model, ids, streamer=theirs))
    assert ours.ended == 1
    assert fast.speculation.counts.accepted
    assert [piece.tolist() for piece in ours.pieces] == [piece.tolist() for piece in theirs.pieces]


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids[0].tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("length", [25, 37, 48])
def test_a_criterion_is_asked_for_every_token(model, fast, length):
    """In this order, so that one that counts, or looks at the end of the text, stops where it would without drafts."""
    ours, theirs = StopAt(length), StopAt(length)
    made = greedy(fast, repeating(), stopping_criteria=[ours])
    assert fast.speculation.counts.tokens
    assert torch.equal(made, greedy(model, repeating(), stopping_criteria=[theirs]))
    assert made.shape[1] == length
    assert ours.asked == theirs.asked


def test_stop_strings(model, fast):
    tokenizer = tiny_tokenizer(300)
    big = tiny_model(vocab_size=len(tokenizer))
    tuned, ids = with_speculation(big), repeating(vocab=250)
    text = tokenizer.decode(greedy(big, ids, max_new_tokens=12)[0, -2:])
    more = {"stop_strings": [text], "tokenizer": tokenizer}
    assert torch.equal(greedy(tuned, ids, **more), greedy(big, ids, **more))
    assert tuned.speculation.counts.tokens


def test_a_cache_that_was_passed_in():
    """A conversation: the cache goes in, comes back longer, and goes on; windows included."""
    for name in ("llama", "mistral"):
        plain = build(name)
        tuned, ids = with_speculation(plain), repeating(vocab=160)
        ours, theirs = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
        for turn in range(3):
            more = {"max_new_tokens": 9, "pad_token_id": 0}
            a, b = greedy(tuned, ids, cache=ours, **more), greedy(plain, ids, cache=theirs, **more)
            assert tuned.speculation.counts.tokens
            assert torch.equal(a, b), turn
            assert ours.get_seq_length() == theirs.get_seq_length() == a.shape[1] - 1
            for mine, his in zip(ours.layers, theirs.layers, strict=True):
                assert not getattr(mine, "record_past", False)
                assert mine.keys.shape == his.keys.shape
                torch.testing.assert_close(mine.keys, his.keys, atol=1e-4, rtol=1e-4)
            new = torch.randint(3, 160, (1, 4), generator=torch.Generator().manual_seed(turn))
            ids = torch.cat([b, new], 1)


def test_only_the_new_tokens_of_a_conversation(model, fast):
    ids = repeating()
    whole = []
    for each in (fast, model):
        cache = DynamicCache(config=model.config)
        first = greedy(each, ids, cache=cache, max_new_tokens=6)
        new = torch.tensor([[5, 6, 7]])
        columns = cache.get_seq_length() + 3
        mask = torch.ones(1, columns, dtype=torch.int64)
        whole.append((first, greedy(each, new, attention_mask=mask, cache=cache, max_new_tokens=6)))
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))


def test_a_prompt_in_chunks(model, fast):
    more = {"prefill_chunk_size": 7}
    assert torch.equal(greedy(fast, repeating(), **more), greedy(model, repeating(), **more))
    assert fast.speculation.counts.tokens


def test_a_bfloat16_model(model):
    half = with_speculation(copy.deepcopy(model).to(torch.bfloat16))
    assert greedy(half, repeating()).shape == (1, 56)
    assert half.speculation.counts.tokens == 32


def paused(ids):
    mask = torch.ones_like(ids)
    mask[0, 2] = 0
    return mask


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "no cache"),
        ({"cache_implementation": "static"}, "it is a StaticCache"),
        ({"repetition_penalty": 1.3}, "chosen by a RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "chosen by a NoRepeatNGramLogitsProcessor"),
        ({"attention_mask": paused(repeating())}, "attention_mask leaves tokens out"),
        ({"position_ids": 3 + torch.arange(24)[None]}, "position_ids do not count up"),
        ({"num_beams": 2}, None),
    ],
)
def test_what_is_left_to_transformers(model, fast, more, reason, caplog):
    ids = repeating()
    with caplog.at_level(logging.INFO, logger=sp.generate.__name__):
        found = [greedy(each, ids, **{**more, "max_new_tokens": 8}) for each in (fast, model)]
    found = [each if isinstance(each, torch.Tensor) else each.sequences for each in found]
    assert torch.equal(*found)
    told = " ".join(record.getMessage() for record in caplog.records if record.name == sp.generate.__name__)
    assert (reason or "") in told
    assert bool(told) == bool(reason)


def test_other_warpers_are_left_to_transformers(fast, model, caplog):
    with caplog.at_level(logging.INFO, logger=sp.generate.__name__):
        made = []
        for each in (fast, model):
            torch.manual_seed(0)
            made.append(each.generate(repeating(), do_sample=True, min_p=0.1, max_new_tokens=8))
    assert torch.equal(*made)
    assert "chosen by a MinPLogitsWarper" in caplog.text


def test_several_rows_are_decoded_plainly_and_it_is_said(model, fast, caplog):
    ids = torch.cat([repeating(seed=seed) for seed in range(3)])
    with caplog.at_level(logging.INFO, logger=sp.generate.__name__):
        assert torch.equal(greedy(fast, ids), greedy(model, ids))
    assert "a batch of 3 rows" in caplog.text
    assert fast.speculation.counts == sp.Counts()
    prompts = [[5, 6, 7], list(range(3, 30))]
    assert generate_batch(fast, prompts, new_tokens=5) == generate_batch(model, prompts, new_tokens=5)


def test_records_say_which_path_ran(fast):
    def ran(path):
        return kernels.paths().get(f"speculation: {path}", 0)

    before = ran("cache"), ran("original loop")
    greedy(fast, repeating(), max_new_tokens=4)
    assert (ran("cache"), ran("original loop")) == (before[0] + 1, before[1])
    greedy(fast, repeating().repeat(2, 1), max_new_tokens=4)
    assert (ran("cache"), ran("original loop")) == (before[0] + 1, before[1] + 1)


# ---- caches from which nothing can be taken back


def test_an_engine_over_a_cache(model):
    engine = sp.ModelEngine(model)
    ids = repeating()
    with torch.no_grad():
        expected = model(ids).logits[0]
    first = engine.extend(ids[0, :10].tolist())
    torch.testing.assert_close(first, expected[:10], atol=1e-4, rtol=1e-4)
    engine.extend([1, 2, 3, 4])
    engine.crop(10)
    assert engine.length == 10
    last = engine.extend(ids[0, 10:].tolist(), last=True)
    torch.testing.assert_close(last, expected[-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_gets_back_what_left_it(name):
    plain = build(name)
    engine = sp.ModelEngine(plain)
    ids = repeating(length=40, vocab=160)[0].tolist()
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits[0]
    engine.extend(ids[:20])
    engine.crop(20)
    engine.extend([9] * 12)
    engine.crop(20)
    torch.testing.assert_close(engine.extend(ids[20:]), expected[20:], atol=1e-4, rtol=1e-4)
    assert engine.limit == 256


def test_caches_that_cannot_be_cropped_are_refused(model):
    with pytest.raises(ValueError, match="tokens can be taken back: it is a StaticCache"):
        sp.ModelEngine(model, StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ValueError, match="it is offloaded"):
        offloaded = DynamicCache(config=model.config)
        offloaded.offloading = True
        sp.ModelEngine(model, offloaded)
    with pytest.raises(ValueError, match="a layer of it is a LinearAttentionLayer"):
        sp.ModelEngine(build("mamba"))
    assert "keeps a state" in sp.why_not(build("mamba"))
    assert "does not generate" in sp.why_not(build("bert"))
    assert "does not continue prompts" in sp.why_not(build("t5"))


def test_attention_that_differs_for_several_tokens_is_refused(model):
    """A sparse prefill attends to one token exactly: what verifies drafts with it would verify something else."""
    from assay.methods.attention.xattention import transform as sparse
    from assay.methods.builtin.attention_backend import transform as backend

    context = TuneContext("ttft", 4096, 8, calibration=(repeating(),))
    changed = sparse.apply(copy.deepcopy(model), {"tau": 0.9, "min_tokens": 0}, context)
    assert "attends to several tokens otherwise than to one" in sp.transform.applies_to(changed, CONTEXT).reason
    with pytest.raises(ValueError, match="attends to several tokens"):
        sp.attach(changed)
    exact = backend.apply(copy.deepcopy(model), {"backend": "kernel"}, context)
    assert not sp.why_not(exact)
    later = sparse.apply(with_speculation(model), {"tau": 0.9, "min_tokens": 0}, context)
    greedy(later, repeating())
    assert later.speculation.counts == sp.Counts()


# ---- in the pages of the compiled decoder


def test_in_pages_the_same_tokens(model, paged):
    decoder = paged.decode_loop
    for seed in range(3):
        decoder.fed.clear()
        ids = repeating(seed=seed)
        assert torch.equal(greedy(paged, ids, max_new_tokens=60), greedy(model, ids, max_new_tokens=60))
        counts = paged.speculation.counts
        assert counts.drafted > counts.accepted > 0  # some were put back
        assert counts.passes == len(decoder.fed) == 59 - counts.accepted
        assert sum(decoder.fed) == counts.passes + counts.drafted


def test_in_pages_the_same_draws(model, paged, fast):
    made = []
    for each in (paged, fast):
        torch.manual_seed(3)
        made.append(each.generate(repeating(), do_sample=True, temperature=0.5, top_k=0, max_new_tokens=30))
    assert torch.equal(*made)


def test_in_pages_ends_streams_and_criteria(model, paged):
    ids = repeating()
    free = greedy(model, ids)[0, ids.shape[1] :].tolist()
    more = {"eos_token_id": [free[13]], "pad_token_id": 0, "min_new_tokens": 5}
    ours, theirs = Listener(), Listener()
    assert torch.equal(greedy(paged, ids, streamer=ours, **more), greedy(model, ids, streamer=theirs, **more))
    assert [piece.tolist() for piece in ours.pieces] == [piece.tolist() for piece in theirs.pieces]
    first, second = StopAt(41), StopAt(41)
    made = greedy(paged, ids, stopping_criteria=[first])
    assert torch.equal(made, greedy(model, ids, stopping_criteria=[second]))
    assert first.asked == second.asked


def test_in_pages_a_cache_that_was_passed_in(model, paged):
    ids = repeating()
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for turn in range(3):
        a = greedy(paged, ids, cache=ours, max_new_tokens=9)
        b = greedy(model, ids, cache=theirs, max_new_tokens=9)
        assert paged.speculation.counts.tokens == 9
        assert torch.equal(a, b), turn
        assert ours.get_seq_length() == theirs.get_seq_length() == a.shape[1] - 1
        for mine, his in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, his.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values, his.values, atol=1e-4, rtol=1e-4)
        ids = torch.cat([b, torch.tensor([[5, 6, 7, 8]])], 1)


def test_in_pages_a_row_of_a_server(model):
    """As a scheduler does it: its own pool, a prompt whose pages are held elsewhere too, a draft, and the length put back."""
    decoder, ids = stand_in.Decoder(model), repeating()[0].tolist()
    expected = greedy(model, torch.tensor([ids]), max_new_tokens=40)[0, len(ids) :].tolist()
    pool = decoder.new_pool(6)
    sequence = stand_in.Sequence(pool.take(5), 0)
    past = DynamicCache()
    with torch.no_grad():
        logits = model(torch.tensor([ids]), cache=past).logits[0, -1:]
    pool.write(sequence.pages, 0, *(torch.stack([getattr(c, n)[0] for c in past.layers]) for n in ("keys", "values")))
    sequence.length = len(ids)
    lookup, made = sp.Lookup(ids), sp.verify(logits, [], None, None, None)
    lookup.add(made)
    while len(made) < 40:
        draft, before = lookup.propose(3), sequence.length
        scores = decoder.extend(pool, [(sequence, [made[-1], *draft])], logits="all")
        new = sp.verify(scores, draft, None, None, None)
        sequence.length = before + len(new)
        lookup.add(new)
        made += new
    assert made[:40] == expected
    assert sequence.length == len(ids) + len(made) - 1


def test_in_pages_what_is_left_to_the_loop_beneath(model, paged, caplog):
    with caplog.at_level(logging.INFO, logger=sp.generate.__name__), pytest.raises(ValueError, match="positions"):
        greedy(paged, repeating(), max_new_tokens=600)
    assert "624 positions, more than the model has" in caplog.text
    with torch.no_grad():
        paged.model.norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="other weights than when the decode loop packed them"):
        greedy(paged, repeating())


def test_in_pages_a_cache_that_has_dropped_keys_is_left_to_the_loop_beneath(model, caplog):
    paged = with_speculation(decode_loop.transform.apply(copy.deepcopy(model), {"weights": "fp32"}, CONTEXT))
    windows = MistralConfig(num_hidden_layers=2, sliding_window=16)
    for held, reason in ((20, "dropped what left its window"), (0, "")):
        cache, ids = DynamicCache(config=windows), repeating()
        if held:
            with torch.no_grad():
                paged(ids[:, :held], cache=cache)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=sp.generate.__name__):
            greedy(paged, ids, cache=cache, max_new_tokens=4)
        assert reason in caplog.text
        assert paged.speculation.counts.tokens == (0 if held else 4)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_over_the_compiled_decoder_the_same_bits(model, weights):
    plain = decode_loop.transform.apply(copy.deepcopy(model), {"weights": weights}, CONTEXT)
    tuned = with_speculation(plain)
    for seed in range(3):
        ids = repeating(seed=seed)
        assert torch.equal(greedy(tuned, ids, max_new_tokens=80), greedy(plain, ids, max_new_tokens=80))
        assert tuned.speculation.counts.accepted


# ---- a small model that drafts


def test_a_model_that_drafts_for_itself_is_always_right(model):
    tuned = sp.attach(copy.deepcopy(model), draft_model=model, draft=4)
    ids = repeating()
    assert torch.equal(greedy(tuned, ids, max_new_tokens=40), greedy(model, ids, max_new_tokens=40))
    counts = tuned.speculation.counts
    assert counts.accepted == counts.drafted > 0


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 10}])
def test_any_model_with_the_vocabulary_may_draft(model, sampling):
    other = tiny_model(seed=5, num_hidden_layers=1)
    tuned = sp.attach(copy.deepcopy(model), draft_model=other)
    torch.manual_seed(0)
    made = greedy(tuned, repeating(), **sampling)
    assert made.shape == (1, 56)
    assert tuned.speculation.counts.drafted
    if not sampling:
        assert torch.equal(made, greedy(model, repeating()))


@pytest.mark.parametrize("most", [1, 5])
def test_the_loop_with_a_draft_model(model, most):
    prompt, other = repeating()[0].tolist(), tiny_model(seed=5, num_hidden_layers=1)
    expected = greedy(model, repeating(), max_new_tokens=40)[0, 24:].tolist()
    for small in (other, model):
        engine, counts = sp.ModelEngine(model), sp.Counts()
        logits = engine.extend(prompt, last=True)[0]
        made = sp.speculate(engine, logits, sp.DraftModel(small, prompt), 40, most=most, counts=counts)
        assert made == expected
        assert counts.drafted
    assert counts.accepted == counts.drafted  # drafting for itself, it is always right
    assert counts.passes < 40


def test_the_draft_model_keeps_what_came_true(model):
    """Its drafts do not depend on what it drafted before: as a new one, told the whole text at once."""
    random = torch.Generator().manual_seed(0)
    tokens = repeating()[0].tolist()
    drafter = sp.DraftModel(model, tokens)
    for turn in range(8):
        draft, q = drafter.draft(4, None)
        assert q is None
        assert draft == sp.DraftModel(model, tokens).draft(4, None)[0], turn
        true = int(torch.randint(5, (), generator=random))
        new = (
            draft[:true] + torch.randint(3, 97, (turn % 4,), generator=random).tolist()
        )  # several passes without a draft
        drafter.add(new)
        tokens += new


def test_a_drawn_draft_comes_with_what_it_was_drawn_from(model):
    tokens, sampling = repeating()[0].tolist(), Sampling(0.8, top_k=4)
    torch.manual_seed(0)
    draft, q = sp.DraftModel(model, tokens).draft(3, sampling)
    with torch.no_grad():
        logits = model(torch.tensor([tokens + draft])).logits[0, len(tokens) - 1 : -1]
    expected = torch.stack([probabilities(row, sampling) for row in logits])
    torch.testing.assert_close(q, expected, atol=1e-5, rtol=1e-4)
    assert all(q[place, token] > 0 for place, token in enumerate(draft))


def test_a_draft_model_with_fewer_positions_falls_silent(model):
    torch.manual_seed(1)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=30, n_embd=32, n_layer=1, n_head=2)).eval()
    tuned = sp.attach(copy.deepcopy(model), draft_model=short)
    assert torch.equal(greedy(tuned, repeating()), greedy(model, repeating()))
    assert sp.DraftModel(short, range(3, 33)).draft(4, None)[0]
    assert sp.DraftModel(short, range(3, 34)).draft(4, None) == ([], None)


def test_vocabularies_must_be_the_same(model):
    with pytest.raises(ValueError, match="the model's vocabulary of 97 tokens, got one of 98"):
        sp.attach(copy.deepcopy(model), draft_model=tiny_model(vocab_size=98))
    one, other = tiny_tokenizer(300), tiny_tokenizer(300)
    sp.same_vocabulary(model, model, one, one)
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"they differ in '<new>' \(\d+\)"):
        sp.same_vocabulary(model, model, one, other)
    with pytest.raises(ValueError, match="draft_model must be one from which tokens can be taken back: Mamba"):
        sp.attach(copy.deepcopy(model), draft_model=build("mamba"))


# ---- the transform


def test_transform_protocol(model):
    assert isinstance(sp.transform, Transform)
    assert (sp.transform.slot, sp.transform.exact, sp.transform.goals) == ("batching", True, {"decode"})
    fit = sp.transform.applies_to(model, CONTEXT)
    assert fit.applies
    assert fit.effects
    offered = sp.transform.configs(model, CONTEXT)
    assert {(c["ngram"], c["draft"]) for c in offered} == {(2, 4), (2, 8), (3, 4), (3, 8)}
    for config in offered:
        made = with_speculation(model, **config)
        assert (made.speculation.ngram, made.speculation.draft) == (config["ngram"], config["draft"])
    assert sp.transform.describe({"draft": 4}) == "speculative decoding, up to 4 tokens looked up by the last 3"


def test_the_tuner_finds_it_and_tells_its_settings_apart(model):
    from assay.tuner.child import structure_hash
    from assay.tuner.recipe import Recipe, Step, apply_recipe

    made = [model, *(with_speculation(model, **config) for config in sp.transform.configs(model, CONTEXT))]
    assert len({structure_hash(each) for each in made}) == 5
    assert structure_hash(with_speculation(model)) == structure_hash(with_speculation(model))
    recipe = Recipe(steps=(Step(transform="speculation", config={"ngram": 2, "draft": 4}),))
    tuned = apply_recipe(copy.deepcopy(model), recipe, CONTEXT)
    greedy(tuned, repeating())
    assert tuned.speculation.counts.tokens


def test_applying_twice_takes_the_last(model):
    made = sp.transform.apply(with_speculation(model), {"ngram": 2}, CONTEXT)
    assert made.speculation.ngram == 2
    assert type(made).__mro__.count(sp.SpeculationMixin) == 1


def test_a_refusal_changes_nothing(model):
    made = copy.deepcopy(model)
    for config in ({"ngram": 0}, {"draft": 65}, {"tokens": 3}):
        with pytest.raises(ValueError, match=next(iter(config))):
            sp.transform.apply(made, config, CONTEXT)
    assert type(made) is type(model)
    assert not hasattr(made, "speculation")


def test_copies_and_pickles(model, fast, tmp_path):
    expected = greedy(model, repeating())
    for made in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(greedy(made, repeating()), expected)
        assert made.speculation.counts.tokens
    fast.save_pretrained(tmp_path)
    assert torch.equal(greedy(type(model).from_pretrained(tmp_path), repeating()), expected)
    assert type(fast).__name__ == "LlamaForCausalLM"
    assert set(fast.state_dict()) == set(model.state_dict())


def test_copies_and_pickles_over_a_compiled_loop(model, paged):
    expected = greedy(model, repeating())
    for made in (copy.deepcopy(paged), pickle.loads(pickle.dumps(paged))):
        assert torch.equal(greedy(made, repeating()), expected)
        assert made.speculation.counts.tokens
