from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.properties.architectures import build
from tests.tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from assay.measure.cost import count_cost
from assay.methods.attention.sinklora import (
    EvictionCache,
    EvictionLayer,
    allowed_pairs,
    group_of,
    interpolate_positions,
    lora_config,
    s2_attention,
    scored_attention,
    scores_computed,
    sf_attention,
    shifted_heads,
    use_eviction,
    use_sf_attention,
)

RATIOS = (0.0, 0.5, 1.0)


def qkv(length, *, heads=4, shared=4, batch=2, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda h: torch.randn(batch, h, length, dim, generator=generator, dtype=dtype)  # noqa: E731
    return make(heads), make(shared), make(shared)


def dense(q, k, v, mask):
    """Attention under a mask in original positions; rows that see nothing give zeros."""
    some = mask.any(-1, keepdim=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask | ~some).masked_fill(~some, 0.0)


def same(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("sinks", [0, 1, 3, 4, 7, 24])
def test_the_fast_form_is_the_masked_one(ratio, sinks):
    for length, group in [(24, 6), (24, 24), (24, 3), (24, 1), (35, 7), (35, 5), (27, 9), (64, 16)]:
        q, k, v = qkv(length, seed=group)
        mask = allowed_pairs(length, 4, group=group, shift_fraction=ratio, sinks=sinks)
        found = sf_attention(q, k, v, group=group, shift_fraction=ratio, sinks=sinks)
        same(found, dense(q, k, v, mask))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("sinks", [0, 2, 5, 30])
def test_rows_with_padding_of_their_own(ratio, sinks):
    length, group = 30, 6
    q, k, v = qkv(length, batch=5)
    tokens = torch.ones(5, length, dtype=torch.bool)
    tokens[0, :4] = False  # left, within a group
    tokens[1, :13] = False  # left, over groups
    tokens[2, 20:] = False  # right
    tokens[3] = False  # nothing
    mask = allowed_pairs(length, 4, group=group, shift_fraction=ratio, sinks=sinks, tokens=tokens)
    found = sf_attention(q, k, v, group=group, shift_fraction=ratio, sinks=sinks, tokens=tokens)
    same(found, dense(q, k, v, mask))
    assert (found[3] == 0).all()
    assert (found[1, :, :13] == 0).all()
    alone = sf_attention(*(x[4:] for x in (q, k, v)), group=group, shift_fraction=ratio, sinks=sinks)
    same(found[4:], alone)
    # every token of a padded row sees the row's own sinks
    assert mask[1, :, 13:, 13 : 13 + sinks].tril().equal(torch.ones(4, 17, min(sinks, 17), dtype=torch.bool).tril())


def test_no_query_ever_sees_what_comes_later():
    for ratio, sinks, (length, group) in itertools.product(RATIOS, (0, 4, 20), ((20, 5), (24, 8), (21, 7))):
        mask = allowed_pairs(length, 6, group=group, shift_fraction=ratio, sinks=sinks)
        assert not mask.triu(1).any()
        assert mask.diagonal(dim1=-2, dim2=-1).all()
    q, k, v = qkv(24)
    before = sf_attention(q, k, v, group=8)
    k[:, :, 12:], v[:, :, 12:] = 9.0, 9.0
    assert torch.equal(sf_attention(q, k, v, group=8)[:, :, :12], before[:, :, :12])


def test_the_released_attention_leaks_the_future_and_is_otherwise_the_rolled_one():
    length, group = 24, 8
    q, k, v = qkv(length)
    found = s2_attention(q, k, v, group=group, variant="as_released")
    shifted = [x[:, 2:].roll(-4, 2).unflatten(2, (3, 8)) for x in (q, k, v)]
    rolled = F.scaled_dot_product_attention(*shifted, is_causal=True).flatten(2, 3).roll(4, 2)
    same(found[:, 2:], rolled)
    same(found[:, :2], s2_attention(q, k, v, group=group)[:, :2])
    mask = allowed_pairs(length, 4, group=group, variant="as_released")
    same(found, dense(q, k, v, mask))
    leak = mask.triu(1)
    assert not leak[:, :2].any()
    assert leak[0, 2].nonzero().tolist() == [
        [i, j] for i in range(4) for j in range(20, 24)
    ]  # first half sees last half
    tokens = torch.ones(2, length, dtype=torch.bool)
    tokens[1, 17:] = False
    mask = allowed_pairs(length, 4, group=group, variant="as_released", tokens=tokens)
    same(s2_attention(q, k, v, group=group, variant="as_released", tokens=tokens), dense(q, k, v, mask))
    with pytest.raises(ValueError, match="group must be even"):
        s2_attention(*qkv(15), group=5, variant="as_released")


def test_degenerate_settings():
    q, k, v = qkv(24)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for ratio in RATIOS:
        same(sf_attention(q, k, v, group=24, shift_fraction=ratio, sinks=0), full)
        same(sf_attention(q, k, v, group=24, shift_fraction=ratio, sinks=4), full)
        same(sf_attention(q, k, v, group=6, shift_fraction=ratio, sinks=24), full)  # all tokens are sinks
    blocks = [x.unflatten(2, (4, 6)) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*blocks, is_causal=True).flatten(2, 3)
    same(sf_attention(q, k, v, group=6, shift_fraction=0.0, sinks=0), wanted)
    same(s2_attention(q, k, v, group=6), sf_attention(q, k, v, group=6, shift_fraction=1.0, sinks=0))


def test_which_heads_are_shifted():
    assert [shifted_heads(8, ratio) for ratio in (0, 0.5, 1)] == [0, 2, 4]
    assert [shifted_heads(9, ratio) for ratio in (0, 0.5, 1)] == [0, 3, 5]
    mask = allowed_pairs(16, 8, group=4, sinks=0)[0]
    assert all(mask[h].equal(mask[0]) for h in range(6))
    assert mask[6].equal(mask[7])
    assert not mask[6].equal(mask[0])
    assert mask[6, 5, 3]  # across the border of a group
    assert not mask[0, 5, 3]


@pytest.mark.parametrize("group", [4, 5, 7, 1])
def test_rolls_undo_each_other_for_odd_groups_too(group):
    length = 3 * group
    groups = group_of(length, group, shifted=True)
    assert torch.bincount(groups).tolist() == [group] * 3
    x = torch.arange(length)
    assert x.roll(-(group // 2)).roll(group // 2).equal(x)
    assert groups.equal(group_of(length, group, shifted=False).roll(group // 2))
    # attention of a token to itself alone gives back the values in their places
    q = torch.zeros(1, 2, length, 4)
    k, v = torch.zeros(1, 2, length, 4), torch.randn(1, 2, length, 4)
    found = sf_attention(q, k, v, group=group, shift_fraction=1.0, sinks=0)
    assert torch.equal(found[:, :, 0], v[:, :, 0])
    if group == 1:
        assert torch.equal(found, v)


def test_grouped_query_heads_and_odd_inputs():
    q, k, v = qkv(32, heads=9, shared=3)
    wide = [x.repeat_interleave(3, 1) for x in (k, v)]
    same(sf_attention(q, k, v, group=8), sf_attention(q, *wide, group=8))
    same(sf_attention(q, k, v, group=8), dense(q, k, v, allowed_pairs(32, 9, group=8)))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    same(sf_attention(*strided, group=8), sf_attention(q, k, v, group=8))
    small = [x.bfloat16() for x in (q, k, v)]
    out = sf_attention(*small, group=8)
    assert out.dtype == torch.bfloat16
    same(out.float(), sf_attention(q, k, v, group=8), 3e-2)
    one = sf_attention(*(x[:, :, :1] for x in (q, k, v)), group=1, sinks=1)
    same(one, v[:, :, :1].repeat_interleave(3, 1))
    scaled = sf_attention(q, k, v, group=8, scale=0.1)
    same(scaled, sf_attention(q * 0.1 * 8**0.5, k, v, group=8))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_gradients(padded, variant):
    inputs = [x.requires_grad_() for x in qkv(12, heads=4, shared=2, batch=1, dim=3, dtype=torch.float64)]
    tokens = torch.ones(1, 12, dtype=torch.bool)
    tokens[0, :3] = False
    options = {"group": 4, "sinks": 2, "tokens": tokens if padded else None, "variant": variant}
    assert torch.autograd.gradcheck(lambda *x: sf_attention(*x, **options), inputs)


def test_scores_are_computed_for_groups_only():
    assert scores_computed(8192, 2048, 4) == 8192 * 2052
    assert scores_computed(64, 64, 4) == 64 * 64
    length, group, heads, dim = 512, 128, 4, 8
    q, k, v = qkv(length, heads=heads, shared=heads, batch=1, dim=dim)
    counted = count_cost(lambda: sf_attention(q, k, v, group=group, sinks=4)).macs
    whole = count_cost(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)).macs
    expected = heads * scores_computed(length, group, 4) * 2 * dim / 2  # QK^T and PV, half of them masked
    assert counted == pytest.approx(expected, rel=0.05)
    assert counted < 0.3 * whole
    tokens = torch.ones(1, length, dtype=torch.bool)
    masked = count_cost(lambda: sf_attention(q, k, v, group=group, sinks=4, tokens=tokens)).macs
    assert masked == pytest.approx(2 * expected, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------- tuning


def tiny_llama(layers=2, **changes):
    odd = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 64}
    return tiny_model(num_hidden_layers=layers, **{**odd, **changes})


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def test_training_attends_in_groups_and_inference_in_full():
    model, ids = tiny_llama(), token_ids(2, 40)
    full = logits(model, ids)
    grouped = use_sf_attention(copy.deepcopy(model))
    assert grouped.config._attn_implementation == "assay_sf_attn"
    assert torch.equal(logits(grouped, ids), full)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(grouped.generate(ids, max_new_tokens=6, do_sample=False), expected)
    grouped.train()
    assert not torch.allclose(logits(grouped, ids), full, atol=1e-3)
    same(logits(grouped, ids)[:, :5], full[:, :5], 1e-4)  # the first half of a group sees all there is
    whole = use_sf_attention(copy.deepcopy(model), group_ratio=1.0).train()
    same(logits(whole, ids), full, 1e-4)
    grouped.set_attn_implementation("sdpa")
    assert torch.equal(logits(grouped.eval(), ids), full)


def test_one_layer_of_training_is_the_masked_attention():
    model, ids = tiny_llama(1), token_ids(1, 40)
    grouped = use_sf_attention(copy.deepcopy(model), sinks=3).train()
    mask = allowed_pairs(40, 9, group=10, sinks=3)
    same(logits(grouped, ids), logits(model, ids, attention_mask=mask), 1e-4)


@pytest.mark.parametrize("variant", ["paper", "as_released"])
@pytest.mark.parametrize("length", [37, 1, 3, 41])
def test_lengths_that_groups_do_not_divide(length, variant):
    model = use_sf_attention(tiny_llama(), variant=variant).train()
    ids = token_ids(length=length)
    loss = model(ids, labels=ids if length > 1 else None).logits.sum()
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    if variant == "paper":
        changed = ids.clone()
        changed[0, -1] = 3
        assert torch.equal(logits(model, changed)[:, :-1], logits(model, ids)[:, :-1])


def test_padded_batches_in_training():
    model = use_sf_attention(tiny_llama(1)).train()
    long, short = token_ids(1, 40), token_ids(1, 20, seed=1)
    padding = torch.zeros(1, 20, dtype=torch.int64)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 20:] = 0  # right padding changes nothing but the size of the groups
    right = logits(model, torch.cat([long, torch.cat([short, padding], 1)]), attention_mask=mask)
    same(right[0], logits(model, long)[0], 1e-4)
    assert torch.isfinite(right).all()
    mask = mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = torch.cat([long, torch.cat([padding, short], 1)])
    found = logits(model, left, attention_mask=mask, position_ids=positions)
    other = torch.cat([long, torch.cat([padding + 5, short], 1)])
    again = logits(model, other, attention_mask=mask, position_ids=positions)
    same(found[1, 20:], again[1, 20:], 1e-4)
    same(found[0], logits(model, long)[0], 1e-4)
    tokens = mask.bool()
    rule = allowed_pairs(40, 9, group=10, sinks=4, tokens=tokens)
    plain = tiny_llama(1)
    rule = rule | ~rule.any(-1, keepdim=True)
    wanted = logits(plain, left, attention_mask=rule, position_ids=positions)
    same(found[1, 20:], wanted[1, 20:], 1e-4)


def test_what_training_refuses():
    ids = token_ids(2, 40)
    model = use_sf_attention(tiny_llama()).train()
    with pytest.raises(ValueError, match="plain or left- or right-padded"):
        model(ids, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="dropout must be 0"):
        use_sf_attention(tiny_llama(attention_dropout=0.1)).train()(ids)
    with pytest.raises(ValueError, match="settings must be among"):
        use_sf_attention(model, window=3)
    with pytest.raises(ValueError, match="group_ratio must be a finite number above 0"):
        use_sf_attention(model, group_ratio=0)
    with pytest.raises(ValueError, match="sinks must be a whole number at least 0"):
        use_sf_attention(model, sinks=-1)
    with pytest.raises(ValueError, match="variant must be one of"):
        use_sf_attention(model, variant="new")
    with pytest.raises(ValueError, match="cannot be replaced"):
        use_sf_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_and_the_file_format_stays(tied, tmp_path):
    from peft import PeftModel, get_peft_model

    base = tiny_llama(tie_word_embeddings=tied)
    model = get_peft_model(use_sf_attention(copy.deepcopy(base)), lora_config(base))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in name for name in trained)
    assert sum("norm" in name for name in trained) == 5  # two a layer, and the last
    assert {name.split(".")[-4] for name in trained if "lora" in name} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("mlp" in name for name in trained)
    config = lora_config(base)
    assert (config.r, config.lora_alpha) == (8, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = token_ids(2, 40)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in trained)
    model.eval()
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()  # ordinary attention
    assert plain.base_model.model.config._attn_implementation == "sdpa"
    same(logits(plain, ids), wanted)
    if tied:
        saved = model.base_model.model
        assert saved.get_input_embeddings().weight.data_ptr() == saved.get_output_embeddings().weight.data_ptr()
    merged = plain.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), ids), wanted, 1e-4)
    assert set(merged.state_dict()) == set(base.state_dict())


def test_lora_needs_the_projections():
    with pytest.raises(ValueError, match="q_proj"):
        lora_config(torch.nn.Linear(2, 2))


def test_interpolated_positions(tmp_path):
    model, ids = tiny_llama(), token_ids(length=100)
    squeezed = copy.deepcopy(model)
    assert interpolate_positions(squeezed, 64) == 1
    assert interpolate_positions(squeezed, 200) == 4  # ceil(200 / 64)
    same(squeezed.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq / 4)
    assert squeezed.config.max_position_embeddings == 200
    one = torch.ones_like(ids)  # positions with gaps and no mask would pass for packed texts
    spread = logits(squeezed, ids, position_ids=4 * torch.arange(100)[None], attention_mask=one)
    same(spread, logits(model, ids), 1e-4)
    assert not torch.allclose(logits(squeezed, ids), logits(model, ids), atol=1e-2)
    squeezed.save_pretrained(tmp_path)
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(squeezed, ids))
    with pytest.raises(ValueError, match="unscaled"):
        interpolate_positions(squeezed, 1000)
    with pytest.raises(ValueError, match="length must be"):
        interpolate_positions(model, 0)


# -------------------------------------------------------------------------------------------------------------- eviction


def evicting(layers=2):
    return use_eviction(tiny_llama(layers))


def generated(model, ids, cache, new=20, **options):
    return model.generate(ids, cache=cache, max_new_tokens=new, do_sample=False, **options)


def weights_by_hand(q, k, scale):
    """Softmax weights of causal attention, (batch, heads, new, n)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    above = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return (q @ k.transpose(-1, -2) * scale).masked_fill(above, -torch.inf).softmax(-1)


@pytest.mark.parametrize("new", [12, 5, 1])
def test_scored_attention(new, monkeypatch):
    q, k, v = qkv(12, heads=9, shared=3)
    q = q[:, :, -new:]
    weights = weights_by_hand(q, k, 0.3)
    for chunk in (1 << 24, 300):
        monkeypatch.setattr("assay.methods.attention.sinklora.eviction.CHUNK", chunk)
        out, got = scored_attention(q, k, v, 0.3)
        same(out, weights @ v.repeat_interleave(3, 1))
        same(got, weights.unflatten(1, (3, 3)).sum((2, 3)))
        positions = torch.arange(12).expand(2, 3, -1).clone()
        positions[1, :, :4] = -1
        out, got = scored_attention(q, k, v, 0.3, positions)
        assert (got[1, :, :4] == 0).all()
        short = scored_attention(q[1:, :, -min(new, 8) :], k[1:, :, 4:], v[1:, :, 4:], 0.3)
        same(out[1:, :, -min(new, 8) :], short[0])
        same(got[1:, :, 4:], short[1])


@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
def test_a_budget_for_everything_is_exact(policy):
    model, ids = evicting(), token_ids(2, 40)
    wanted = generated(tiny_llama(), ids, DynamicCache())
    for budget in (60, 1000):
        cache = EvictionCache(budget, policy=policy)
        assert torch.equal(generated(model, ids, cache), wanted)
        assert cache.get_seq_length() == 59
        assert cache.entries == [59, 59]
    assert torch.equal(generated(model, ids, DynamicCache()), wanted)  # any other cache is served too
    assert torch.equal(generated(model, ids, None), wanted)


@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
@pytest.mark.parametrize("budget", [2, 7, 16, 0.5])
def test_the_budget_is_never_passed_and_the_window_is_always_there(policy, budget, monkeypatch):
    if policy == "sinks" and budget == 2:
        with pytest.raises(ValueError, match="budget must exceed the 4 sinks"):
            generated(evicting(), token_ids(2, 40), EvictionCache(2, policy="sinks"))
        return
    sizes, real = [], EvictionLayer.observe

    def observe(self, weights):
        real(self, weights)
        sizes.append(self.keys.shape[2])
        recent = range(self.seen - self.recent, self.seen)
        for kept in self.positions.flatten(0, 1).tolist():
            assert set(recent) <= set(kept)
            assert len(set(kept)) == len(kept)
            assert max(kept) < self.seen
            if policy == "sinks":
                assert {0, 1, 2, 3} <= set(kept)

    monkeypatch.setattr(EvictionLayer, "observe", observe)
    cache = EvictionCache(budget, policy=policy)
    out = generated(evicting(), token_ids(2, 40), cache)
    limit = 20 if budget == 0.5 else budget
    assert out.shape == (2, 60)
    assert set(sizes) == {limit}
    assert cache.entries == [limit, limit]
    assert cache.nbytes == 2 * 2 * 2 * 3 * limit * 8 * 4
    if policy == "local":
        assert sorted(cache.layers[0].positions[0, 0].tolist()) == list(range(59 - limit, 59))


def test_scores_are_the_accumulated_attention_and_only_grow(monkeypatch):
    history, real = [], EvictionLayer.observe

    def observe(self, weights):
        assert (weights >= 0).all()
        real(self, weights)
        history.append(
            {(h, int(self.positions[0, h, n])): float(self.scores[0, h, n]) for h in range(3) for n in range(self.used)}
        )

    monkeypatch.setattr(EvictionLayer, "observe", observe)
    generated(evicting(1), token_ids(1, 40), EvictionCache(12))
    assert len(history) == 20
    for before, after in itertools.pairwise(history):
        assert all(score >= 0 for score in after.values())
        assert all(after[key] >= before[key] for key in after.keys() & before.keys())
        assert len(before.keys() - after.keys()) == 3  # one goes in each head


def test_h2o_follows_its_definition():
    """One layer, step by step, against lists."""
    q, k, v = qkv(30, heads=4, shared=2, batch=1)
    layer, prompt, limit = EvictionLayer(8), 15, 8
    model_scores = torch.zeros(2, 30)
    kept = [list(range(prompt)) for _ in range(2)]
    for stop in [prompt, *range(prompt + 1, 31)]:
        start = 0 if stop == prompt else stop - 1
        for h in range(2):
            if stop > prompt:
                old = [p for p in kept[h] if p < stop - 4]
                if len(kept[h]) == limit:
                    kept[h].remove(min(old, key=lambda p: model_scores[h, p].item()))
                kept[h].append(start)
        keys, values = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        out, weights = scored_attention(q[:, :, start:stop], keys, values, 0.5)
        layer.observe(weights)
        for h in range(2):
            by_hand = weights_by_hand(q[:, 2 * h : 2 * h + 2, start:stop], k[:, h : h + 1, sorted(kept[h])], 0.5)
            model_scores[h, sorted(kept[h])] += by_hand.sum((0, 1, 2))
            if stop > prompt:
                same(out[:, 2 * h : 2 * h + 2], by_hand @ v[:, h : h + 1, sorted(kept[h])])
            if len(kept[h]) > limit:
                old = sorted(kept[h][:-4], key=lambda p: model_scores[h, p].item())
                kept[h] = sorted(old[-4:] + kept[h][-4:])
            assert sorted(layer.positions[0, h].tolist()) == sorted(kept[h])
            order = layer.positions[0, h].argsort()
            same(layer.scores[0, h][order], model_scores[h, sorted(kept[h])])
            same(layer.keys[0, h][order], k[0, h, sorted(kept[h])])


@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
@pytest.mark.parametrize("budget", [9, 100])
def test_left_padded_rows_are_the_rows_alone(policy, budget):
    model = evicting()
    long, short = token_ids(1, 40), token_ids(1, 14, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 26, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :26] = 0
    together = generated(model, ids, EvictionCache(budget, policy=policy), attention_mask=mask)[:, 40:]
    assert torch.equal(together[:1], generated(model, long, EvictionCache(budget, policy=policy))[:, 40:])
    assert torch.equal(together[1:], generated(model, short, EvictionCache(budget, policy=policy))[:, 14:])


def test_a_prompt_in_pieces_and_beams():
    model, ids = evicting(), token_ids(1, 40)
    with torch.no_grad():
        cache, whole = EvictionCache(100), EvictionCache(100)
        first = model(ids[:, :25], cache=cache).logits
        rest = model(ids[:, 25:], cache=cache).logits
        same(torch.cat([first, rest], 1), model(ids, cache=whole).logits, 1e-4)
        same(cache.layers[1].scores, whole.layers[1].scores, 1e-4)
        small = EvictionCache(10)
        for part in ids.split(7, 1):
            model(part, cache=small)
            assert max(small.entries) <= 10
        assert small.get_seq_length() == 40
    wanted = generated(tiny_llama(), ids, None, num_beams=3)
    assert torch.equal(generated(model, ids, EvictionCache(200), num_beams=3), wanted)
    assert generated(model, ids, EvictionCache(12), num_beams=3).shape == (1, 60)


@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
def test_a_smaller_copy_is_the_cache_of_that_budget(policy):
    model, ids = evicting(), token_ids(2, 40)
    with torch.no_grad():
        big, direct = EvictionCache(1.0), EvictionCache(0.3, policy=policy)
        model(ids, cache=big)
        model(ids, cache=direct)
        copied = big.smaller(0.3, policy=policy)
        for one, other in zip(copied.layers, direct.layers, strict=True):
            assert torch.equal(one.positions, other.positions)
            same(one.keys, other.keys)
        assert big.entries == [40, 40]
        token = ids[:, :1]
        same(model(token, cache=copied).logits, model(token, cache=direct).logits)
    with pytest.raises(ValueError, match="evicted entries already"):
        copied.smaller(0.1, policy="local")
    with pytest.raises(ValueError, match="needs the scores"):
        EvictionCache(1.0, policy="local").smaller(0.5)


def test_half_precision_keeps_scores_in_float32():
    model, ids = evicting().bfloat16(), token_ids(2, 40)
    cache = EvictionCache(12)
    assert generated(model, ids, cache).shape == (2, 60)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.layers[0].scores.dtype == torch.float32
    assert torch.equal(
        generated(model, ids, EvictionCache(64)), generated(model, ids, EvictionCache(99, policy="local"))
    )


def test_caches_select_repeat_and_start_anew():
    model, ids = evicting(), token_ids(3, 40)
    cache = EvictionCache(10)
    with torch.no_grad():
        model(ids, cache=cache)
        before = cache.layers[0].positions.clone()
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert torch.equal(cache.layers[0].positions, before[[2, 0]])
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[0].positions, before[[2, 2, 0, 0]])
        assert cache.layers[0].keys.shape[0] == 4
        cache.reset()
        assert cache.get_seq_length() == 0
        model(ids, cache=cache)
        assert torch.equal(cache.layers[0].positions, before)
    assert not cache.is_croppable


# what is held after a prompt, however it came


@torch.no_grad()
def held_after(cache, ids, mask=None, chunk=None):
    """The model's cache after a prompt in chunks."""
    model = use_eviction(tiny_llama())
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        stop = min(start + (chunk or ids.shape[1]), ids.shape[1])
        seen = None if mask is None else mask[:, :stop]
        logits = model(ids[:, start:stop], attention_mask=seen, cache=cache).logits
    return model, logits


@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
def test_a_share_is_one_of_the_whole_prompt_however_it_comes(policy):
    ids = torch.randint(3, 60, (2, 40))
    for chunk in (10, 13, None):
        cache = EvictionCache(0.5, policy=policy)
        held_after(cache, ids, chunk=chunk)
        assert set(cache.entries) == {20}
    cache = EvictionCache(24, policy=policy)
    held_after(cache, ids, chunk=10)
    assert set(cache.entries) == {24}


def test_a_share_that_sinks_would_fill_is_refused_when_the_prompt_is_over():
    """Not before: a first chunk may be short."""
    ids, cache = torch.randint(3, 60, (1, 40)), EvictionCache(0.3, policy="sinks")
    held_after(cache, ids, chunk=10)
    assert set(cache.entries) == {12}
    cache = EvictionCache(0.1, policy="sinks")
    model, _ = held_after(cache, ids, chunk=20)
    with pytest.raises(ValueError, match="budget must exceed the 4 sinks, got 4 entries"):
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("chunk", [None, 10])
@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
def test_left_padding_takes_no_room_of_the_budget(policy, chunk):
    """A row that begins in a later chunk too: only tokens are held, and those of a row are the ones it holds when it is alone."""
    ids, mask = torch.randint(3, 60, (3, 40)), torch.ones(3, 40, dtype=torch.int64)
    mask[1, :14] = 0
    mask[2, :31] = 0
    cache = EvictionCache(20, policy=policy)
    held_after(cache, ids * mask, mask, chunk)
    assert set(cache.entries) == {20}
    for layer in cache.layers:
        assert (layer.positions[2] >= 31).sum(-1).tolist() == [9] * layer.positions.shape[1]
        assert (layer.positions[:2] >= torch.tensor([0, 14])[:, None, None]).all()
    alone = EvictionCache(20, policy=policy)
    held_after(alone, ids[1:2, 14:], chunk=chunk if chunk is None else 26)
    if chunk is None:
        for found, own in zip(cache.layers, alone.layers, strict=True):
            assert torch.equal(found.positions[1].sort(-1).values, own.positions[0].sort(-1).values + 14)
    share = EvictionCache(0.5, policy=policy)
    held_after(share, ids[1:] * mask[1:], mask[1:], chunk)
    assert set(share.entries) == {13}  # of 26: the 14 that are padding in both rows are not counted


@torch.no_grad()
def test_a_budget_larger_than_the_prompt_is_exact_in_chunks_and_padded():
    ids, mask = torch.randint(3, 60, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :15] = 0
    stock = tiny_llama()
    expected = stock(ids * mask, attention_mask=mask).logits
    for policy in ("h2o", "sinks", "local"):
        cache = EvictionCache(64, policy=policy)
        _, logits = held_after(cache, ids * mask, mask, 8)
        torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        for more in ({}, {"num_beams": 3}, {"prefill_chunk_size": 8}):
            found = use_eviction(tiny_llama()).generate(
                ids * mask, attention_mask=mask, cache=EvictionCache(64, policy=policy), **options, **more
            )
            assert found.tolist() == stock.generate(ids * mask, attention_mask=mask, **options, **more).tolist()


@torch.no_grad()
def test_rows_are_moved_and_the_cache_is_used_again():
    ids, mask = torch.randint(3, 60, (3, 20)), torch.ones(3, 20, dtype=torch.int64)
    mask[1, :12] = 0
    cache = EvictionCache(8)
    model, _ = held_after(cache, ids * mask, mask)
    next_ids, order = torch.randint(3, 60, (3, 1)), torch.tensor([1, 1, 0])
    longer = torch.cat([mask, mask[:, :1] | 1], 1)
    expected = model(next_ids, attention_mask=longer, cache=copy.deepcopy(cache)).logits
    moved = copy.deepcopy(cache)
    moved.reorder_cache(order)
    found = model(next_ids[order], attention_mask=longer[order], cache=moved).logits
    torch.testing.assert_close(found, expected[order])
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(3)
    cache.reset()
    _, again = held_after(cache, ids)
    torch.testing.assert_close(again, held_after(EvictionCache(8), ids)[1])


@pytest.mark.parametrize(
    ("name", "why"), [("bert", "not causal"), ("mistral", "16 tokens at most"), ("gpt_oss", "sinks of its own")]
)
def test_models_it_would_be_wrong_for_are_refused(name, why):
    for use in (use_eviction, use_sf_attention):
        with pytest.raises(ValueError, match=why):
            use(build(name))


def test_what_eviction_refuses():
    ids = token_ids(1, 40)
    with pytest.raises(RuntimeError, match="use_eviction"):
        generated(tiny_llama(), ids, EvictionCache(10))
    for budget in (1, 0, 0.0, 1.5, -3, True, "half"):
        with pytest.raises((TypeError, ValueError), match="budget must be"):
            EvictionCache(budget)
    with pytest.raises(ValueError, match="policy must be one of"):
        EvictionCache(10, policy="random")
    with pytest.raises(ValueError, match="sinks must be"):
        EvictionCache(10, sinks=-1)
    with pytest.raises(ValueError, match="cannot be replaced"):
        use_eviction(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not other masks"):
        evicting()(ids, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(), cache=EvictionCache(9))


# ---------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments():
    q, k, v = qkv(12)
    with pytest.raises(ValueError, match="group must divide"):
        sf_attention(q, k, v, group=5)
    with pytest.raises(ValueError, match="sinks must be a whole number at least 0 and at most 12"):
        sf_attention(q, k, v, group=4, sinks=13)
    with pytest.raises(ValueError, match="shift_fraction must be a finite number at least 0"):
        sf_attention(q, k, v, group=4, shift_fraction=2)
    with pytest.raises(ValueError, match="variant must be one of"):
        sf_attention(q, k, v, group=4, variant="fast")
    with pytest.raises(ValueError, match="of one length"):
        sf_attention(q[:, :, :5], k, v, group=4)
    with pytest.raises(ValueError, match="multiple of the heads"):
        sf_attention(q[:, :3], k, v, group=4)
    with pytest.raises((TypeError, ValueError), match="tokens must"):
        sf_attention(q, k, v, group=4, tokens=torch.ones(2, 12))
    with pytest.raises(ValueError, match="heads must be a whole number at least 1"):
        shifted_heads(0)


# ------------------------------------------------------------------------------------------------------------ real model


@pytest.mark.model
@pytest.mark.parametrize("layers", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_smollm2_with_a_budget(layers, request):
    from assay.workloads.text import long_prompt

    loaded = request.getfixturevalue("smollm2" if layers == 30 else "smollm2_slice")
    ids = long_prompt(loaded.tokenizer, 200)
    model = use_eviction(copy.deepcopy(loaded.model))
    wanted = generated(loaded.model, ids, None, new=8)
    assert torch.equal(generated(model, ids, EvictionCache(1000), new=8), wanted)
    cache = EvictionCache(0.5)
    assert generated(model, ids, cache, new=8).shape == (1, 208)
    assert cache.entries == [100] * layers


@pytest.mark.parametrize("policy", ["h2o", "sinks", "local"])
@torch.no_grad()
def test_padding_is_known_however_the_prompt_comes(policy):
    """One token at a time, rows still in their padding when the first ones come: what the whole prompt at once gives."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = use_eviction(LlamaForCausalLM(config).eval())
    ids = torch.randint(1, 40, (8, 11))
    mask = (torch.arange(11) >= torch.tensor([0, 1, 2, 4, 7, 9, 10, 0])[:, None]).long()
    place = (mask.cumsum(1) - 1).clamp(min=0)
    whole = None
    for chunk in (11, 4, 3, 2, 1):
        cache, logits = EvictionCache(100, policy=policy), []
        for t in range(0, 11, chunk):
            here = slice(t, t + chunk)
            options = {"attention_mask": mask[:, : t + chunk], "position_ids": place[:, here], "cache": cache}
            logits.append(model(ids[:, here], use_cache=True, **options).logits)
        found = torch.cat(logits, 1)[mask.bool()]
        whole = found if whole is None else whole
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
        assert all(((layer.positions < 0).sum(-1) == (mask == 0).sum(1)[:, None]).all() for layer in cache.layers)


def test_sinks_that_fill_the_budget_are_refused_at_once():
    with pytest.raises(ValueError, match="budget must exceed the 4 sinks, got 4 entries"):
        EvictionCache(4, policy="sinks")
    assert EvictionCache(4, policy="h2o").budget == 4
