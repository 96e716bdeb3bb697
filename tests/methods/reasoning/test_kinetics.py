"""Kinetics: the operator against a masked reference, and inside models that it was not written with."""

import copy

import pytest
import torch
from tests.properties.architectures import ARCHITECTURES, build
from tests.tiny import tiny_model, token_ids
from transformers import DynamicCache, StaticCache

from assay.measure.cost import count_cost
from assay.methods.core import kernels
from assay.methods.core.attention.integration import set_attention
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.methods.reasoning import kinetics
from assay.methods.reasoning.kinetics import (
    BlockCache,
    BlockTopK,
    block_scores,
    block_sums,
    choose,
    sparse_attention,
    use_block_topk,
)

EVERYTHING = BlockTopK(budget=1 << 20)
REFUSED = {
    "gemma2": "soft-capped",
    "mamba": "no attention",
    "mistral": "windows",
    **dict.fromkeys(("t5", "m2m100", "whisper"), "encoder-decoder"),
    **dict.fromkeys(("bert", "vit", "clip-vision"), "token by token"),
}
QUICK = ("llama", "gpt2", "gpt_oss", "mistral", "bert")


def qkv(batch=2, heads=6, key_heads=2, keys=200, dim=16, value_dim=16, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, 1, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def reference(q, k, v, settings, starts=None):
    """Token by token in float64: each key head's mean scores decide, and all other keys are masked."""
    batch, heads, _, dim = q.shape
    keys, per = k.shape[2], heads // k.shape[1]
    out = torch.empty(batch, heads, 1, v.shape[3], dtype=torch.float64)
    kept = torch.zeros(batch, k.shape[1], keys, dtype=torch.bool)
    for b in range(batch):
        start = 0 if starts is None else int(starts[b])
        for g in range(k.shape[1]):
            scores = (q[b, g * per : (g + 1) * per, 0].double() @ k[b, g].double().T) * dim**-0.5
            blocks = range(start // settings.block, -(-keys // settings.block))
            own = {n: range(n * settings.block, min((n + 1) * settings.block, keys)) for n in blocks}
            always = [
                n
                for n in blocks
                if any(start <= t < start + settings.sinks or t >= keys - max(settings.local, 1) for t in own[n])
            ]
            rest = sorted((n for n in blocks if n not in always), key=lambda n: -float(scores[:, list(own[n])].mean()))
            for n in (always + rest)[: settings.blocks]:
                kept[b, g, [t for t in own[n] if t >= start]] = True
            shares = scores.masked_fill(~kept[b, g], -torch.inf).softmax(-1)
            out[b, g * per : (g + 1) * per, 0] = shares @ v[b, g].double()
    return out, kept


@pytest.mark.parametrize(("block", "budget", "local"), [(1, 24, 0), (1, 30, 9), (16, 64, 0), (16, 96, 20), (8, 64, 3)])
@pytest.mark.parametrize("keys", [130, 144, 200])
def test_equals_attention_with_all_other_keys_masked(block, budget, local, keys):
    q, k, v = qkv(keys=keys, value_dim=32)
    settings = BlockTopK(budget=budget, block=block, local=local)
    starts = torch.tensor([0, 37])
    for padding in (None, starts):
        expected, _ = reference(q, k, v, settings, padding)
        found = sparse_attention(q, k, v, settings, starts=padding)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_a_row_with_less_than_the_budget_gets_all_it_has():
    q, k, v = qkv(keys=150)
    starts = torch.tensor([121, 3])
    found = sparse_attention(q, k, v, BlockTopK(budget=64), starts=starts)
    dense = execute(AttentionPlan(1, 150, key_start=starts), q, k, v)
    torch.testing.assert_close(found[0], dense[0], atol=2e-6, rtol=2e-5)
    assert (found[1] - dense[1]).abs().max() > 1e-3


def test_chosen_by_brute_force_and_shared_by_the_group():
    q, k, v = qkv()
    settings = BlockTopK(budget=80)
    chosen = choose(block_scores(q, block_sums(k, 16)), settings, 200)
    _, kept = reference(q, k, v, settings)
    found = torch.zeros(2, 2, 13, dtype=torch.bool).scatter(2, chosen, True)
    assert (found == torch.stack([kept[..., 16 * n : 16 * n + 16].any(-1) for n in range(13)], -1)).all()
    assert (chosen.diff(dim=-1) > 0).all()
    changed = torch.cat([q[:, :1] * 0, q[:, 1:2] + q[:, :1], q[:, 2:]], 1)  # the mean of the group is the same
    assert (choose(block_scores(changed, block_sums(k, 16)), settings, 200) == chosen).all()


def test_sets_are_nested_in_the_budget_and_the_best_beat_the_newest():
    q, k, v = qkv(keys=400, seed=3)
    scores = block_scores(q, block_sums(k, 16))
    before = None
    for budget in (48, 96, 192, 384):
        kept = torch.zeros(2, 2, 25, dtype=torch.bool).scatter(2, choose(scores, BlockTopK(budget=budget), 400), True)
        assert kept.sum(-1).eq(budget // 16).all()
        if before is not None:
            assert (kept & before).eq(before).all()
        before = kept
    dense = execute(AttentionPlan(1, 400), 4 * q, k, v)
    found = {
        select: sparse_attention(4 * q, k, v, BlockTopK(budget=128, block=1, select=select))
        for select in ("top", "recent", "random")
    }
    error = {select: float((one - dense).norm()) for select, one in found.items()}
    assert error["top"] < 0.8 * min(error["recent"], error["random"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_budget_of_everything_is_dense_attention_bit_for_bit(dtype):
    q, k, v = qkv(keys=170, dtype=dtype)
    starts = torch.tensor([5, 0])
    for settings in (BlockTopK(budget=176), BlockTopK(budget=170, block=1), EVERYTHING):
        found = sparse_attention(q, k, v, settings, starts=starts)
        assert torch.equal(found, execute(AttentionPlan(1, 170, key_start=starts), q, k, v))


def test_unselected_keys_are_not_read_and_learnt_sinks_take_part():
    q, k, v = qkv(batch=1, keys=320)
    settings, sinks = BlockTopK(budget=64), torch.linspace(-1, 2, 6)
    sums = block_sums(k, 16)
    chosen = choose(block_scores(q, sums), settings, 320)
    kept = torch.zeros(1, 2, 20, dtype=torch.bool).scatter(2, chosen, True).repeat_interleave(16, 2)
    poisoned = [x.clone().masked_fill(~kept[..., None], torch.nan) for x in (k, v)]
    found = sparse_attention(q, *poisoned, settings, sums=sums, sinks=sinks)
    blocks = kept[:, :, ::16].repeat_interleave(3, 1)[:, :, None]
    plan = AttentionPlan(1, 320, block=16, mask=blocks)
    expected = execute(plan, q, k, v, backend="reference", sinks=sinks)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    counted = {
        name: count_cost(lambda s=s: sparse_attention(q, k, v, s, sums=sums, room=(k, v)))
        for name, s in (("dense", EVERYTHING), ("sparse", settings))
    }
    pairs = 6 * (16 + 16)
    assert counted["dense"].macs == pairs * 320
    assert counted["sparse"].macs == pairs * 64 + 2 * 20 * 16  # one key a block is scored
    dense_bytes = counted["dense"].total().bytes_read
    assert dense_bytes > 2 * 2 * 320 * 16 * 4
    assert counted["sparse"].total().bytes_read < 0.6 * dense_bytes


# ------------------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def test_a_cache_in_place_holds_what_a_growing_one_holds():
    model, ids = tiny_model(), token_ids(3, 90)
    ours, theirs = BlockCache(model.config), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        for part in (ids[:, :50], *ids[:, 50:].split(1, 1)):
            model(part, cache=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.crop(-7)
        model(ids[:, :1], cache=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 5]))
        model(ids[:2, :20], cache=cache)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        torch.testing.assert_close(one.sums, block_sums(other.keys, 16))
    assert ours.get_seq_length() == 104
    ours.reset()
    assert ours.get_seq_length() == 0
    with pytest.raises(ValueError, match="tokens_to_remove must be at most 0"):
        ours.layers[0].crop(3)


# ------------------------------------------------------------------------------------------------- inside of models


def padded(batch, tokens):
    ids = token_ids(batch, tokens, vocab=97)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 11 * row % (tokens - 4)] = 0
    return ids * mask, mask


def generated(model, ids, mask, cache, **options):
    return model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=8, do_sample=False, output_logits=True,
                          return_dict_in_generate=True, eos_token_id=None, pad_token_id=0, **options)  # fmt: skip


def close(found, expected):
    found, expected = torch.stack(found.logits), torch.stack(expected.logits)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


def applied(name, settings, **changes):
    """The model with the method, or None where it refuses, in words and without a trace."""
    model = build(name, **changes)
    before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    if name not in REFUSED:
        return use_block_topk(model, settings)
    with pytest.raises(ValueError, match=REFUSED[name]):
        use_block_topk(model, settings)
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    return None


def check_architecture(name, dtype=torch.float32, batch=8):
    model = applied(name, EVERYTHING)
    if model is None:
        return
    ids, mask = padded(batch, 60)
    stock = build(name).to(dtype)
    model.to(dtype)
    expected = generated(stock, ids, mask, DynamicCache(config=stock.config))
    found = generated(model, ids, mask, BlockCache(model.config))
    if dtype == torch.float32:
        close(found, expected)
    sparse = BlockTopK(budget=48, dense_layers=())
    use_block_topk(model, sparse)
    kept = generated(model, ids, mask, BlockCache(model.config))
    other = generated(model, ids, mask, DynamicCache(config=model.config))
    if dtype == torch.float32:
        close(other, kept)  # whatever the cache
        assert (torch.stack(kept.logits)[1:] - torch.stack(found.logits)[1:]).abs().max() > 1e-3
    alone = generated(model, ids[:1], mask[:1], BlockCache(model.config))
    if dtype == torch.float32 and name not in ("mixtral", "gpt_oss"):
        for a, b in zip(alone.logits, kept.logits, strict=True):
            assert (a[0] - b[0]).abs().max() < 1e-4 * b.abs().max()
    before = torch.stack(kept.logits).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    again = torch.stack(generated(model, ids, mask, BlockCache(model.config)).logits).float()
    assert torch.isfinite(again).all()
    assert not torch.equal(again, before)


@pytest.mark.parametrize("name", QUICK)
def test_models_decode_as_they_did_or_refuse_untouched(name):
    check_architecture(name)


def test_bfloat16():
    check_architecture("gemma3", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, dtype):
    check_architecture(name, dtype)


@torch.no_grad()
def test_decoding_equals_a_mask_over_full_attention_layer_by_layer():
    """Through `generate`, with grouped heads and left padding: each layer's output is that of the reference on its own
    inputs."""
    model = use_block_topk(tiny_model(), BlockTopK(budget=48, dense_layers=(0,)))
    seen = []
    attend = kinetics.attention.attend

    def spy(module, q, k, v, **options):
        found = attend(module, q, k, v, **options)
        if q.shape[2] == 1:
            seen.append((module.layer_idx, q, k.clone(), v.clone(), options["limits"].start, found))
        return found

    from assay.methods.core.attention.integration import register_function

    register_function(kinetics.NAME, spy)
    try:
        ids, mask = padded(4, 75)
        before = kernels.paths().get("block top-k: one key read a block", 0)
        generated(model, ids, mask, BlockCache(model.config))
        assert kernels.paths()["block top-k: one key read a block"] == before + 7
    finally:
        kinetics.attention.register()
    assert {layer for layer, *_ in seen} == {0, 1}
    for layer, q, k, v, starts, found in seen:
        settings = EVERYTHING if layer == 0 else BlockTopK(budget=48)
        expected, _ = reference(q, k, v, settings, starts)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_beams_assistance_and_static_caches():
    model, ids = use_block_topk(tiny_model(), BlockTopK(budget=48, dense_layers=())), token_ids(1, 80)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(ids, cache=BlockCache(model.config), **beams),
        model.generate(ids, cache=DynamicCache(config=model.config), **beams),
    )
    exact, stock = use_block_topk(tiny_model(), EVERYTHING), tiny_model()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        exact.generate(ids, cache=BlockCache(exact.config), prompt_lookup_num_tokens=3, **greedy),
        stock.generate(ids, prompt_lookup_num_tokens=3, **greedy),
    )
    static = StaticCache(config=stock.config, max_cache_len=100)  # its masks are applied by dense attention
    assert torch.equal(model.generate(ids, cache=static, **greedy), stock.generate(ids, **greedy))


def test_settings_are_saved_with_the_model_and_may_be_replaced(tmp_path):
    from transformers import LlamaForCausalLM

    model, ids = use_block_topk(tiny_model(), BlockTopK(budget=48, dense_layers=())), token_ids(2, 80)
    model.save_pretrained(tmp_path)
    again = set_attention(LlamaForCausalLM.from_pretrained(tmp_path), kinetics.NAME)
    mask = torch.ones_like(ids)
    close(generated(again, ids, mask, BlockCache(again.config)), generated(model, ids, mask, BlockCache(model.config)))
    use_block_topk(again, EVERYTHING)
    close(
        generated(again, ids, mask, BlockCache(again.config)),
        generated(tiny_model(), ids, mask, DynamicCache(config=again.config)),
    )


def test_bad_input_is_named():
    for settings, said in (
        ({"budget": 100}, "budget must be whole blocks of 16 tokens, got 100"),
        ({"budget": 32}, "budget must be at least 48 tokens"),
        ({"block": 0}, "block must be"),
        ({"sinks": 0}, "sinks must be"),
        ({"select": "best"}, "select must be one of 'top', 'recent', 'random'"),
        ({"dense_layers": (-1,)}, "dense_layers must be"),
    ):
        with pytest.raises(ValueError, match=said):
            BlockTopK(**settings)
    with pytest.raises(TypeError, match="dense_layers must be a tuple"):
        BlockTopK(dense_layers="0")
    with pytest.raises(TypeError, match="budget must be"):
        BlockTopK(budget=64.0)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="one token a row, got 2"):
        sparse_attention(q.expand(-1, -1, 2, -1), k, v, BlockTopK(budget=64))
    with pytest.raises(ValueError, match="do not fit together"):
        sparse_attention(q[:, :5], k, v, BlockTopK(budget=64))
    with pytest.raises(ValueError, match="scores must be of the 13 blocks of 200 keys, 4 or more, got 12"):
        choose(torch.zeros(1, 1, 12), BlockTopK(budget=64), 200)
    with pytest.raises(TypeError, match="settings must be BlockTopK"):
        use_block_topk(tiny_model(), {"budget": 64})
    with pytest.raises(ValueError, match="dense_layers must be from 0 to 1, got \\[7\\]"):
        use_block_topk(tiny_model(), BlockTopK(dense_layers=(7,)))
    with pytest.raises(TypeError, match="config must be a transformers config"):
        BlockCache({})
    with pytest.raises(ValueError, match="block must be"):
        BlockCache(tiny_model().config, block=0)
    with pytest.raises(ValueError, match="layer of full attention"):
        BlockCache(build("mistral").config)
