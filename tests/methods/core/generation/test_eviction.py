"""Smaller caches, against whole ones whose evicted entries a mask hides."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties.architectures import VOCABULARY, build
from transformers.cache_utils import DynamicCache

from assay.methods.core.generation.cache import keys_and_values, left_pad, left_padded_mask, position_ids
from assay.methods.core.generation.eviction import (
    attention_mass,
    evicted,
    kept,
    key_norms,
    random_scores,
    recency,
)
from assay.methods.core.generation.rotary import repositioned
from assay.methods.core.generation.slices import cache_of, held_bytes

UNWINDOWED = ("llama", "llama-tied", "qwen2", "phi3", "gpt2", "mixtral", "opt", "biogpt")
LENGTHS = (20, 7, 13, 1, 18, 20, 3, 16)


def batch(name, dtype=torch.float32):
    """Eight left-padded prompts, their cache, and the next token of each."""
    model = build(name).to(dtype)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in LENGTHS]
    ids, mask = left_pad(prompts, 0)
    return (
        model,
        run(model, ids, mask, position_ids(mask))[1],
        mask,
        torch.randint(3, VOCABULARY, (8, 1), generator=random),
    )


@torch.no_grad()
def run(model, ids, mask, places, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    out = model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True)
    return out.logits[:, -1], cache


def hidden(keep, mask):
    """A 4-d mask that shows the next token what is kept of the text, and itself."""
    seen = torch.zeros_like(mask).scatter(1, keep[:, 0], 1) * mask
    seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)[:, None, None]
    return (1.0 - seen.float()) * torch.finfo(torch.float32).min


# -------------------------------------------------------------------------------------------------------------- policies


def by_hand(scores, budget, sinks, recent, start):
    """Row by row in plain Python: text first, then the protected, then the best, then the earlier."""
    tokens = len(scores)

    def rank(i):
        text, sure = i >= start, i < start + sinks or i >= tokens - recent
        return not text, not sure if text else 0, 0 if sure or not text else -scores[i], i

    return sorted(sorted(range(tokens), key=rank)[:budget])


@pytest.mark.parametrize(
    ("budget", "sinks", "recent"), [(1, 0, 0), (4, 0, 0), (4, 4, 0), (5, 1, 3), (6, 2, 1), (40, 3, 3)]
)
def test_the_best_stay_with_sinks_and_recent_ones_and_padding_goes_first(budget, sinks, recent):
    random = torch.Generator().manual_seed(budget)
    scores = torch.randint(0, 5, (4, 3, 12), generator=random).float()  # many are equal
    starts = torch.tensor([0, 5, 9, 12])
    found = kept(scores, budget, sinks=sinks, recent=recent, starts=starts)
    assert found.dtype == torch.int64
    assert found.shape == (4, 3, min(budget, 12))
    for row in range(4):
        for head in range(3):
            wanted = by_hand(scores[row, head].tolist(), budget, sinks, recent, int(starts[row]))
            assert found[row, head].tolist() == wanted
    plain = kept(scores, budget, sinks=sinks, recent=recent)
    assert torch.equal(plain[0], found[0])
    assert torch.equal(
        plain, kept(scores, budget, sinks=sinks, recent=recent, starts=torch.zeros(4, dtype=torch.int64))
    )


def test_among_many_equals_the_earlier_stay():
    scores = torch.randint(0, 3, (1, 1, 400), generator=torch.Generator().manual_seed(0)).float()
    found = kept(scores, 200, sinks=2, recent=5)[0, 0].tolist()
    assert found == by_hand(scores[0, 0].tolist(), 200, 2, 5, 0)


def test_larger_budgets_keep_what_smaller_ones_do():
    scores = random_scores((2, 3, 30), seed=0)
    for budget in range(4, 30):
        small, large = (kept(scores, size, sinks=2, recent=2) for size in (budget, budget + 1))
        assert all(
            set(a.tolist()) < set(b.tolist()) for a, b in zip(small.flatten(0, 1), large.flatten(0, 1), strict=True)
        )


def test_scores_are_what_they_say():
    weights = torch.randn(2, 6, 5, 9, dtype=torch.float64).softmax(-1)
    wanted = torch.zeros(2, 3, 9, dtype=torch.float64)
    for head in range(6):
        wanted[:, head // 2] += weights[:, head].sum(1)
    torch.testing.assert_close(attention_mass(weights, 3), wanted)
    assert attention_mass(weights.bfloat16(), 3).dtype == torch.float32
    keys = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(key_norms(keys), -(keys**2).sum(-1).sqrt())
    assert recency((2, 3, 9))[1, 2].tolist() == list(range(9))
    assert torch.equal(random_scores((2, 3, 9), 4), random_scores((2, 3, 9), 4))
    assert not torch.equal(random_scores((2, 3, 9), 4), random_scores((2, 3, 9), 5))


def test_heavy_hitters_of_a_model_hold_more_attention_than_others():
    model = build("llama", attn_implementation="eager", initializer_range=0.3)
    ids = torch.randint(3, VOCABULARY, (8, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    mass = attention_mass(out.attentions[0], 2)
    torch.testing.assert_close(mass.sum(-1), torch.full((8, 2), 2.0 * 30))
    best, any_ones = (mass.gather(2, kept(scores, 8)).sum() for scores in (mass, random_scores(mass.shape, 0)))
    assert best > 1.2 * any_ones


# ----------------------------------------------------------------------------------------------------------- application


@pytest.mark.parametrize("name", UNWINDOWED)
def test_what_is_left_goes_on_as_the_whole_does_with_the_rest_hidden(name):
    model, cache, mask, token = batch(name)
    lengths, budget = mask.sum(-1), 9
    keep = kept(recency((8, keys_and_values(cache)[0][0].shape[1], 20)), budget, sinks=3, starts=20 - lengths)
    small = evicted(cache, keep)
    assert small.cache.get_seq_length() == budget
    assert torch.equal(small.positions[1], keep)
    left = torch.cat([left_padded_mask([min(int(n), budget) for n in lengths]), mask.new_ones(8, 1)], 1)
    untouched = copy.deepcopy(cache)
    found, _ = run(model, token, left, lengths[:, None], small.cache)
    wanted, _ = run(model, token, hidden(keep, mask), lengths[:, None], cache)
    whole, _ = run(model, token, torch.cat([mask, mask.new_ones(8, 1)], 1), lengths[:, None], untouched)
    limit = 1e-5 * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < limit
    gone = lengths > budget
    assert float((found - whole)[gone].abs().amax(-1).min()) > limit  # it matters
    assert float((found - whole)[~gone].abs().max()) < limit  # and only there


def test_each_layer_and_head_keeps_its_own_and_twice_evicted_positions_add_up():
    random = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randn(2, h, n, d, generator=random) for _ in range(2)) for h, n, d in ((3, 12, 8), (1, 7, 6))]
    cache = cache_of(pairs)
    keeps = [kept(random_scores((2, 3, 12), 1), 6), kept(random_scores((2, 1, 7), 2), 5)]
    once = evicted(cache, keeps)
    every_second = [torch.tensor([0, 2, 4]).expand(2, heads, -1) for heads in (3, 1)]
    again = evicted(once.cache, every_second, once.positions)
    for index, (k, v) in enumerate(pairs):
        for row in range(2):
            for head in range(k.shape[1]):
                places = again.positions[index][row, head]
                assert places.tolist() == keeps[index][row, head, [0, 2, 4]].tolist()
                assert torch.equal(again.cache.layers[index].keys[row, head], k[row, head, places])
                assert torch.equal(again.cache.layers[index].values[row, head], v[row, head, places])
        assert torch.equal(cache.layers[index].keys, k)
    assert held_bytes(once.cache) == 4 * 2 * 2 * (3 * 6 * 8 + 5 * 6)
    rows = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 1, 2, 3, 4, 5]])
    small = evicted(cache_of(pairs[1:]), torch.tensor([[[0, 6]], [[2, 3]]]), rows)
    assert small.positions[0].tolist() == [[[5, 11]], [[1, 2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_for_everything_changes_nothing(dtype):
    model, cache, _, _ = batch("llama", dtype)
    same = evicted(cache, kept(random_scores((8, 2, 20), 0), 20))
    for (k, v), (own_k, own_v) in zip(*map(keys_and_values, (same.cache, cache)), strict=True):
        assert torch.equal(k, own_k)
        assert torch.equal(v, own_v)


def test_generate_goes_on_at_its_own_positions_or_with_the_gaps_closed():
    model = build("llama", initializer_range=0.3)
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))
    places = torch.arange(24)[None]
    _, cache = run(model, ids[:, :-1], None, places[:, :-1])
    small = evicted(cache, kept(recency((1, 2, 23)), 11, sinks=3))
    closed = repositioned(small.cache, model, small.positions, torch.arange(11))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    filler = torch.cat([ids[:, :11], ids[:, -1:]], 1)  # what stands for cached tokens is not looked at
    found = model.generate(
        filler,
        attention_mask=torch.ones_like(filler),
        position_ids=torch.cat([small.positions[0][:, 0], places[:, -1:]], 1),
        cache=evicted(small.cache, torch.arange(11).expand(1, 2, -1)).cache,
        **settings,
    )
    assert found[0, 12:].tolist() == greedy(model, small.cache, ids[:, -1:], 23, 6)
    found = model.generate(filler, attention_mask=torch.ones_like(filler), cache=closed, **settings)
    again = repositioned(
        evicted(cache, kept(recency((1, 2, 23)), 11, sinks=3)).cache, model, small.positions, torch.arange(11)
    )
    assert found[0, 12:].tolist() == greedy(model, again, ids[:, -1:], 11, 6)
    assert torch.allclose(again.layers[0].keys[:, :, :3], cache.layers[0].keys[:, :, :3], atol=1e-6)  # sinks stay put


def greedy(model, cache, token, place, count):
    made = []
    for step in range(count):
        logits, cache = run(model, token, None, torch.tensor([[place + step]]), cache)
        logits[:, 2] = -torch.inf  # the end
        token = logits.argmax(-1, keepdim=True)
        made.append(int(token))
    return made


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2", "gpt_oss"])
def test_layers_with_windows_are_refused(name):
    model = build(name)
    _, cache = run(model, torch.full((1, 5), 7), None, torch.arange(5)[None])
    with pytest.raises(TypeError, match=r"layer \d has a window of 16"):
        evicted(cache, kept(recency((1, 2, 5)), 3))


def test_arguments_are_checked():
    scores = random_scores((2, 3, 9), 0)
    for budget, options in ((0, {}), (3, {"sinks": 2, "recent": 2}), (-1, {})):
        with pytest.raises(ValueError, match="budget must be"):
            kept(scores, budget, **options)
    with pytest.raises(TypeError, match="budget"):
        kept(scores, 0.5)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="scores must be finite"):
            kept(scores.index_fill(2, torch.tensor([4]), wrong), 3)
    with pytest.raises(ValueError, match=r"starts must lie in \[0, 9\]"):
        kept(scores, 3, starts=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="starts must have shape"):
        kept(scores, 3, starts=torch.tensor([0]))
    with pytest.raises(ValueError, match="scores must have 3"):
        kept(scores[0], 3)
    with pytest.raises(ValueError, match="heads must divide"):
        attention_mass(torch.ones(1, 6, 2, 2), 4)
    with pytest.raises(TypeError, match="seed"):
        random_scores((1, 2), 0.5)
    cache = cache_of([(torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 9, 8))])
    keep = kept(scores, 4)
    with pytest.raises(ValueError, match="keep must lie within the 9 tokens of layer 0, got 0 to 9"):
        evicted(cache, torch.tensor([0, 9]).expand(2, 3, -1))
    with pytest.raises(ValueError, match="keep must have shape"):
        evicted(cache, keep[:1])
    with pytest.raises(TypeError, match="keep must hold"):
        evicted(cache, keep.float())
    with pytest.raises(ValueError, match="keep must be one tensor or one for each of 1 layers, got 2"):
        evicted(cache, [keep, keep])
    with pytest.raises(ValueError, match="positions must be one tensor or one for each"):
        evicted(cache, keep, [torch.arange(9)] * 2)
    with pytest.raises(ValueError, match="positions must have shape"):
        evicted(cache, keep, torch.arange(8))
