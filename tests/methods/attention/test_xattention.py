"""XAttention: what the paper's definitions say, and the official code's known mistakes not made."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model, token_ids

from assay.methods.attention import xattention as xa
from assay.methods.attention.xattention import (
    XAttentionConfig,
    block_scores,
    calibrate_thresholds,
    search_thresholds,
    select,
    tile_scores,
    transform,
    xattention,
    xattention_plan,
)
from assay.methods.core.attention.plan import AttentionPlan, execute, load_int8_kernel, load_kernel
from assay.methods.transform import Transform, TuneContext

BACKENDS = ["torch", pytest.param("kernel", marks=pytest.mark.skipif(not load_kernel(), reason="needs a compiler"))]


def qkv(batch=1, heads=4, groups=2, queries=128, keys=128, dim=16, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, count):
        return (torch.randn(batch, tokens, count, dim, generator=generator) * spread).transpose(1, 2)

    return make(queries, heads), make(keys, groups), make(keys, groups)


def exact_block_mass(q, k, block, causal=True):
    """Softmax attention in float64, summed over blocks; lengths are multiples of the block."""
    queries, keys = q.shape[2], k.shape[2]
    scores = (
        q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[3] ** -0.5
    )
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1), -math.inf)
    share = scores.softmax(-1)
    return share.view(*q.shape[:2], queries // block, block, keys // block, block).sum((3, 5))


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_tile_scores_are_antidiagonal_sums_of_qk(stride):
    q, k, _ = qkv(2, queries=32, keys=48)
    full = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    found = tile_scores(q, k, stride)
    for a in range(32 // stride):
        for b in range(48 // stride):
            tile = full[:, :, a * stride : (a + 1) * stride, b * stride : (b + 1) * stride]
            expected = tile.flip(-2).diagonal(dim1=-2, dim2=-1).sum(-1)
            torch.testing.assert_close(found[:, :, a, b], expected, atol=2e-4, rtol=1e-5)
    if stride == 1:
        torch.testing.assert_close(found, full)


def test_other_orders_are_the_ablations():
    q, k, _ = qkv(queries=16, keys=16)
    full = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    diagonal = full[:, :, 4:8, 8:12].diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(tile_scores(q, k, 4, order="slash")[:, :, 1, 2], diagonal, atol=1e-4, rtol=1e-5)
    random = tile_scores(q, k, 4, order="random")
    assert torch.equal(random, tile_scores(q, k, 4, order="random"))
    assert not torch.allclose(random, tile_scores(q, k, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_stride_one_gives_the_exact_masses(backend, causal):
    q, k, _ = qkv(2, queries=64, keys=96)
    found = block_scores(q, k, stride=1, block=32, causal=causal, backend=backend)
    torch.testing.assert_close(found.double(), exact_block_mass(q, k, 32, causal), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [4, 8])
def test_rows_sum_to_the_tiles_of_a_block(backend, causal, stride):
    q, k, _ = qkv(queries=96, keys=128)
    scores = block_scores(q, k, stride=stride, block=32, causal=causal, backend=backend)
    torch.testing.assert_close(scores.sum(-1), torch.full((1, 4, 3), 32.0 / stride))
    assert (scores >= 0).all()
    if causal:
        assert scores.triu(2).abs().max() == 0  # query block i lies at key block i + 1


def reference_scores(q, k, stride, block, causal, start=0):
    """Straight from the definition: absolute tiles, missing tokens zero, tiles without any token left out."""
    queries, keys = q.shape[2], k.shape[2]
    offset, tiles = keys - queries, -(-keys // block) * block // stride
    wide_q = torch.zeros(*q.shape[:2], tiles * stride, q.shape[3], dtype=torch.float64)
    wide_k = torch.zeros(*q.shape[:2], tiles * stride, q.shape[3], dtype=torch.float64)
    wide_q[:, :, offset:keys], wide_k[:, :, :keys] = q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    wide_q[:, :, :start], wide_k[:, :, :start] = 0, 0
    sums = tile_scores(wide_q, wide_k, stride) * q.shape[3] ** -0.5 / stride
    tile = torch.arange(tiles)
    real = (tile >= start // stride) & (tile * stride < keys)
    seen = real & ((tile <= tile[:, None]) | (not causal))
    there = real & (tile >= max(offset, start) // stride)
    out = sums.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~there[:, None], 0.0)
    per = block // stride
    blocks = out.view(*q.shape[:2], tiles // per, per, tiles // per, per).sum((3, 5))
    return blocks[:, :, offset // block :]


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 100),
    older=st.integers(0, 60),
    stride=st.sampled_from([1, 4, 8, 16]),
    block=st.sampled_from([16, 32]),
    causal=st.booleans(),
    padding=st.integers(0, 70),
    seed=st.integers(0, 100),
)
def test_scores_of_any_length_chunk_and_padding(queries, older, stride, block, causal, padding, seed):
    keys = queries + older
    q, k, _ = qkv(2, 4, 2, queries, keys, seed=seed, spread=1.0)
    starts = torch.tensor([0, min(padding, keys - 1)])
    for backend in ["torch", "kernel"] if load_kernel() else ["torch"]:
        found = block_scores(q, k, stride=stride, block=block, causal=causal, key_start=starts, backend=backend)
        for b, start in enumerate(starts.tolist()):
            expected = reference_scores(q[b : b + 1], k[b : b + 1], stride, block, causal, start)
            torch.testing.assert_close(found[b : b + 1].double(), expected, atol=2e-5, rtol=1e-4)


def test_small_chunks_score_as_one(monkeypatch):
    """Also where the prompt is an exact multiple of the chunk: the official code masks all earlier keys there."""
    q, k, _ = qkv(queries=128, keys=128)
    whole = block_scores(q, k, stride=4, block=16, backend="torch")
    monkeypatch.setattr(xa, "CHUNK", 4 * 4 * 32 * 2)  # two query blocks a chunk
    torch.testing.assert_close(block_scores(q, k, stride=4, block=16, backend="torch"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_batch_rows_are_independent(backend):
    q, k, _ = qkv(2, queries=80, keys=80)
    scores = block_scores(q, k, stride=4, block=16, backend=backend)
    wide_k = k.repeat_interleave(2, 1)
    torch.testing.assert_close(block_scores(q, wide_k, stride=4, block=16, backend=backend), scores)
    order = torch.tensor([2, 0, 3, 1])
    permuted = block_scores(q[:, order], wide_k[:, order], stride=4, block=16, backend=backend)
    torch.testing.assert_close(permuted, scores[:, order])
    assert torch.equal(select(permuted, tau=0.7), select(scores[:, order], tau=0.7))
    torch.testing.assert_close(block_scores(q[1:], k[1:], stride=4, block=16, backend=backend), scores[1:])
    assert torch.equal(select(scores, tau=0.7)[1:], select(scores[1:], tau=0.7))


def test_a_chunk_chooses_as_the_whole_prompt():
    q, k, v = qkv(queries=128, keys=128)
    whole = xattention_plan(q, k, tau=0.6, stride=4, block=16)
    for last in (16, 48):
        chunk = xattention_plan(q[:, :, -last:], k, tau=0.6, stride=4, block=16)
        assert torch.equal(chunk.mask, whole.mask[:, :, -chunk.query_blocks :])
    expected = execute(whole, q, k, v)[:, :, -48:]
    torch.testing.assert_close(xattention(q[:, :, -48:], k, v, tau=0.6, stride=4, block=16), expected)


def test_norm_and_scale_divide_the_sums():
    q, k, _ = qkv(queries=64, keys=64)
    plain = block_scores(q, k, stride=4, block=16, scale=0.1)
    torch.testing.assert_close(block_scores(q, k, stride=4, block=16, scale=0.2, norm=2.0), plain)


# ------------------------------------------------------------------------------------------------------------ selection


def random_scores(rows=6, columns=8, seed=0, causal=True):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, rows, columns, generator=generator) ** 4
    return scores.tril(columns - rows) if causal else scores


@settings(max_examples=60, deadline=None)
@given(
    tau=st.floats(0, 1),
    seed=st.integers(0, 10_000),
    older=st.integers(0, 5),
    rows=st.integers(1, 7),
    causal=st.booleans(),
)
def test_the_fewest_blocks_that_reach_tau(tau, seed, older, rows, causal):
    scores = random_scores(rows, rows + older, seed, causal)
    kept = select(scores, tau=tau, causal=causal)
    blocks = rows + older
    mass = (scores.double() * kept).sum(-1)
    total = scores.double().sum(-1)
    assert (mass >= tau * total - 1e-12).all()
    forced = torch.zeros(rows, blocks, dtype=torch.bool)
    if causal:
        assert not kept.triu(older + 1).any()
        forced[:, 0] = True
        forced[torch.arange(rows), torch.arange(rows) + older] = True
        assert kept[:, :, forced].all()
    if tau < 1:
        free = kept & ~forced
        weakest = scores.double().masked_fill(~free, math.inf).amin(-1)
        assert ((mass - weakest < tau * total + 1e-12) | ~free.any(-1)).all()
        # and no dropped block outweighs a free one that was kept
        dropped = scores.double().masked_fill(kept, -1).amax(-1)
        assert (dropped <= weakest).all()


def test_the_kept_set_grows_with_tau():
    scores = random_scores(7, 7)
    before = torch.zeros_like(scores, dtype=torch.bool)
    for tau in [0, 0.2, 0.5, 0.8, 0.9, 0.99, 1]:
        kept = select(scores, tau=tau)
        assert (kept | ~before).all()
        before = kept
    assert torch.equal(before, torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 3, 7, 7))


def test_density_lies_between_the_forced_blocks_and_all():
    q, k, _ = qkv(queries=160, keys=160)
    n = 10
    for tau in (0.0, 0.5, 0.9, 1.0):
        density = xattention_plan(q, k, tau=tau, stride=4, block=16).density()
        assert (2 * n - 1) / (n * (n + 1) / 2) <= density <= 1
        if tau in (0.0, 1.0):
            assert density == pytest.approx(1.0 if tau else (2 * n - 1) / (n * (n + 1) / 2))


def test_not_causal_forces_nothing_unless_asked():
    scores = torch.zeros(1, 1, 3, 4)
    scores[..., 2] = 1.0  # key block 2 holds everything
    assert torch.equal(select(scores, causal=False), scores > 0)
    sink = select(scores, causal=False, keep_sink=True)
    assert sink[..., 0].all()
    assert sink.sum() == 6
    recent = select(scores, causal=False, keep_recent=True)
    assert torch.equal(recent[0, 0].int(), torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).int())
    assert select(scores, causal=False, variant="as_released")[..., 0].all()


def test_one_tau_for_each_head():
    scores = random_scores(7, 7)
    taus = torch.tensor([0.1, 0.5, 0.95])
    together = select(scores, tau=taus)
    for h, tau in enumerate(taus.tolist()):
        assert torch.equal(together[:, h : h + 1], select(scores[:, h : h + 1], tau=tau))


def test_rows_without_mass_keep_only_the_forced_blocks():
    kept = select(torch.zeros(1, 1, 4, 4), tau=0.9)
    assert torch.equal(kept[0, 0].int(), torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]).int())


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(10, 10), (100, 100), (128, 128), (40, 100), (1, 70)])
def test_tau_one_is_dense_attention(causal, queries, keys):
    q, k, v = qkv(2, queries=queries, keys=keys)
    dense = execute(AttentionPlan(queries, keys, 16, causal), q, k, v, backend="reference")
    found = xattention(q, k, v, tau=1.0, stride=4, block=16, causal=causal)
    torch.testing.assert_close(found, dense, atol=3e-6, rtol=1e-5)


def test_attention_over_the_chosen_blocks_sees_no_future():
    """The diagonal tiles mix future pairs into the scores; the output must not know them."""
    q, k, v = qkv(queries=96, keys=96)
    plan = xattention_plan(q, k, tau=0.5, stride=8, block=16)
    out = execute(plan, q, k, v)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 41:], changed_v[:, :, 41:] = 9.0, 9.0
    torch.testing.assert_close(execute(plan, q, changed_k, changed_v)[:, :, :41], out[:, :, :41])


@pytest.mark.skipif(not load_int8_kernel(), reason="needs a C++ compiler")
def test_integer_scores_over_the_same_blocks():
    q, k, v = qkv(2, 9, 3, 192, 192, 64, spread=1.0)
    options = {"tau": 0.6, "stride": 4, "block": 16, "key_start": torch.tensor([0, 40])}
    plan = xattention_plan(q, k, **options, precision="bf16")
    assert plan.density() < 0.7
    assert torch.equal(xattention_plan(q, k, **options, precision="int8").mask, plan.mask)
    found = xattention(q, k, v, **options, precision="int8")
    expected = execute(plan, q.double(), k.double(), v.double(), backend="reference")
    off = (found - expected).norm() / expected.norm()
    assert 1e-4 < off < 2e-2


@pytest.mark.parametrize("distance", [100, 101])
def test_finds_a_slanted_band(distance):
    frequencies = torch.tensor([1 / 3, 1 / 7, 1 / 17, 1 / 41, 1 / 97])
    angles = torch.arange(256.0)[:, None] * frequencies
    k = 3 * torch.cat([angles.cos(), angles.sin()], -1)[None, None]
    angles = angles - distance * frequencies
    q = 3 * torch.cat([angles.cos(), angles.sin()], -1)[None, None]
    plan = xattention_plan(q, k, tau=0.9, stride=8, block=16, scale=1.0)
    assert plan.density() < 0.4
    assert plan.recall(q, k, scale=1.0).item() > 0.98
    assert all(plan.mask[0, 0, i, (16 * i + 8 - distance) // 16] for i in range(8, 16))


@pytest.mark.parametrize("position", [37, 90])
def test_finds_a_vertical_stripe(position):
    generator = torch.Generator().manual_seed(0)
    q, k = (0.3 * torch.randn(1, 1, 256, 16, generator=generator) for _ in range(2))
    q[..., 0], k[..., 0] = 6.0, 0.0
    k[:, :, position, 0] = 6.0
    plan = xattention_plan(q, k, tau=0.9, stride=8, block=16, scale=1.0)
    assert plan.density() < 0.65
    assert plan.recall(q, k, scale=1.0).item() > 0.99
    assert plan.mask[0, 0, position // 16 :, position // 16].all()


def test_even_strides_look_at_odd_distances_only():
    """What the antidiagonals of even tiles cannot see, so that nobody expects it of them."""
    keys = torch.eye(64)[None, None]
    for distance, found in ((20, 0.0), (21, 1.0)):
        assert tile_scores(torch.roll(keys, distance, 2), keys, 4).amax().item() == found


def test_padding_moves_the_sink_and_is_never_attended():
    q, k, v = qkv(2, queries=96, keys=96)
    starts = torch.tensor([0, 40])
    plan = xattention_plan(q, k, tau=0.3, stride=4, block=16, key_start=starts)
    assert plan.mask[0, :, :, 0].all()
    assert not plan.mask[1, :, :, :2].any()
    assert plan.mask[1, :, 2:, 2].all()
    out = execute(plan, q, k, v)
    assert out[1, :, :40].abs().max() == 0
    changed = k.clone()
    changed[1, :, :40] = 7.0
    again = xattention_plan(q, changed, tau=0.3, stride=4, block=16, key_start=starts)
    assert torch.equal(again.mask, plan.mask)
    torch.testing.assert_close(execute(again, q, changed, v), out)


def test_decoding_and_short_prompts_are_dense():
    q, k, _ = qkv(queries=1, keys=100)
    assert xattention_plan(q, k, block=16, stride=4).mask is None
    q, k, _ = qkv(queries=32, keys=32)
    assert xattention_plan(q, k, block=16, stride=4).mask is None


# ----------------------------------------------------------------------------------------------------------- thresholds


def test_calibration_is_the_released_procedure():
    q, k, _ = qkv(heads=3, groups=1, queries=128, keys=128, spread=1.2)
    found = calibrate_thresholds([(q, k)], stride=4, block=16, coverage=0.9)
    assert found.shape == (1, 3)
    true, guess = exact_block_mass(q, k, 16), block_scores(q, k, stride=4, block=16).double()
    for h in range(3):
        covered = 0.0
        for row in range(8):
            needed, mass = [], 0.0
            for block in true[0, h, row].argsort(descending=True).tolist():
                if mass >= 0.9 * true[0, h, row].sum():
                    break
                needed.append(block)
                mass += true[0, h, row, block].item()
            lowest = guess[0, h, row, needed].min()
            covered += guess[0, h, row][guess[0, h, row] >= lowest].sum().item()
        assert found[0, h].item() == pytest.approx(covered / guess[0, h].sum().item(), rel=1e-5)
    assert (calibrate_thresholds([(q, k)], stride=4, block=16, coverage=1.0) > 0.999).all()


def test_search_spends_the_budget_on_the_heads_that_need_it():
    q, k, _ = qkv(heads=4, groups=4, queries=160, keys=160, dim=16, spread=0.6)
    sharp = torch.cat([q[:, :2] * 8, q[:, 2:]], dim=1)  # two heads attend sharply, two evenly
    table = search_thresholds([(sharp, k)], density=0.5, stride=4, block=16, steps=8, factor=0.8)
    assert table.shape == (1, 4)
    chosen = select(block_scores(sharp, k, stride=4, block=16), tau=table[0])
    share = chosen.sum().item() / (4 * 55)
    assert share <= 0.5
    true = exact_block_mass(sharp, k, 16)
    kept = (chosen * true).sum().item()
    for level in torch.arange(0.05, 1.0, 0.01):  # no single tau within the budget keeps more
        same = select(block_scores(sharp, k, stride=4, block=16), tau=level.item())
        assert same.sum() > chosen.sum() or (same * true).sum().item() <= kept + 1e-6 or same.sum() > 0.5 * 4 * 55
    with pytest.raises(ValueError, match="density must be at least"):
        search_thresholds([(sharp, k)], density=0.05, stride=4, block=16)


# --------------------------------------------------------------------------------------------------------- transformers


CONTEXT = TuneContext("ttft", prompt_tokens=4096, new_tokens=8)


def applied(model, **config):
    return transform.apply(copy.deepcopy(model), {"block": 16, "stride": 4, "min_tokens": 0, **config}, CONTEXT)


def test_generate_with_all_blocks_equals_sdpa():
    model, ids = tiny_model(), token_ids()
    sparse = applied(model, tau=1.0)
    assert sparse.config._attn_implementation == "assay_xattention"
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(sparse.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_prefill_is_sparse_and_decoding_dense(monkeypatch):
    seen = []
    real = xa.xattention_plan
    monkeypatch.setattr(xa, "xattention_plan", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    ids = token_ids()
    sparse = applied(tiny_model(), tau=0.5)
    out = sparse.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 104)
    assert len(seen) == 2  # one plan a layer, none while decoding
    assert all(plan.density() < 0.9 for plan in seen)
    with torch.no_grad():
        logits = sparse(ids).logits
        assert not torch.allclose(logits, tiny_model()(ids).logits, atol=1e-3)


def test_dense_layers_short_prompts_and_a_table_of_taus():
    model, ids = tiny_model(), token_ids()
    with torch.no_grad():
        dense = model(ids).logits
        for exact in ({"dense_layers": [0, 1]}, {"min_tokens": 101}, {"tau": [1.0, 1.0]}, {"tau": [[1.0] * 4] * 2}):
            torch.testing.assert_close(applied(model, **{"tau": 0.2, **exact})(ids).logits, dense, atol=1e-4, rtol=1e-4)
        for lossy in ({"dense_layers": [0]}, {"tau": [1.0, 0.2]}, {"tau": [[1.0] * 4, [0.2] * 4]}):
            found = applied(model, **{"tau": 0.2, **lossy})(ids).logits
            assert not torch.allclose(found, dense, atol=1e-3)
            torch.testing.assert_close(found, applied(model, tau=0.2, dense_layers=[0])(ids).logits)


def test_left_padded_rows_equal_the_rows_alone():
    sparse = applied(tiny_model(), tau=1.0)
    long, short = token_ids(1, 90), token_ids(1, 37, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 53, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :53] = 0
    together = sparse.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 90:]
    assert torch.equal(together[:1], sparse.generate(long, max_new_tokens=8, do_sample=False)[:, 90:])
    assert torch.equal(together[1:], sparse.generate(short, max_new_tokens=8, do_sample=False)[:, 37:])


def test_a_padded_row_is_sparse_too_and_knows_nothing_of_its_padding():
    """Padding of whole blocks leaves the grid where it is: the row chooses as it does alone."""
    sparse = applied(tiny_model(), tau=0.5)
    long, short = token_ids(1, 96), token_ids(1, 64, seed=1)
    ids = torch.cat([long, torch.cat([torch.full((1, 32), 5), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :32] = 0
    with torch.no_grad():
        together = sparse(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(together[1:, 32:], sparse(short).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[:1], sparse(long).logits, atol=1e-4, rtol=1e-4)


def test_the_settings_are_saved_with_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    sparse, ids = applied(tiny_model(), tau=[[0.5] * 4, [0.3] * 4], dense_layers=[0]), token_ids()
    sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="assay_xattention")
    assert again.config.xattention == sparse.config.xattention
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, sparse(ids).logits)


def test_changed_settings_are_taken_up():
    model, ids = applied(tiny_model(), tau=1.0), token_ids()
    with torch.no_grad():
        before = model(ids).logits
        model.config.xattention = {**model.config.xattention, "tau": 0.1}
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)


def test_calibrated_thresholds_replay():
    model = tiny_model()
    context = TuneContext("ttft", 4096, 8, calibration=(token_ids(1, 40), token_ids(1, 120)))
    config = {"tau": "calibrated", "block": 16, "stride": 4, "min_tokens": 0}
    first = transform.apply(copy.deepcopy(model), config, context).config.xattention
    assert torch.tensor(first["tau"]).shape == (2, 4)
    assert transform.apply(copy.deepcopy(model), config, context).config.xattention == first
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="needs calibration texts"):
        transform.apply(copy.deepcopy(model), config, CONTEXT)


def test_the_transform_fits_long_prompts_of_transformers_models():
    model = tiny_model()
    assert isinstance(transform, Transform)
    fit = transform.applies_to(model, CONTEXT)
    assert fit.applies
    assert [effect.kind for effect in fit.effects] == ["attention"]
    assert 0 < fit.effects[0].macs < 1
    assert transform.applies_to(model, TuneContext("ttft", 32768, 8)).effects[0].bytes < fit.effects[0].bytes
    assert "nothing to skip" in transform.applies_to(model, TuneContext("ttft", 300, 8)).reason
    assert "transformers model" in transform.applies_to(torch.nn.Linear(2, 2), CONTEXT).reason
    for config in transform.configs(model, CONTEXT):
        assert transform.apply(copy.deepcopy(model), config, CONTEXT).config.xattention["tau"] == config["tau"]


def test_prompts_and_windows_of_1024_tokens_are_enough_and_shorter_ones_are_not():
    def fit(tokens, window=None):
        model = tiny_model("Mistral", sliding_window=window)
        return transform.applies_to(model, TuneContext("ttft", prompt_tokens=tokens, new_tokens=8))

    assert fit(1024).applies
    assert not fit(1023).applies
    assert "prompts of 1023 tokens leave nothing to skip (1024 needed)" in fit(1023).reason
    assert fit(4096, window=1024).applies
    assert not fit(4096, window=1023).applies
    assert "2 of 2 attention layers see 1023 tokens at most" in fit(4096, window=1023).reason


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.5}, "tau must be"),
        ({"stride": 12}, "stride must divide block"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"precision": "fp8"}, "precision must be one of 'input', 'bf16', 'int8'"),
        ({"variant": "new"}, "variant must be one of"),
        ({"window": 3}, "unknown configuration"),
        ({"tau": [0.9] * 3}, "for this model"),
        ({"tau": [[0.9] * 3] * 2}, "for this model"),
        ({"dense_layers": [2]}, "dense_layers must be from 0 to 1"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        transform.apply(tiny_model(), {"block": 16, "stride": 4, **change}, CONTEXT)


def test_bad_arguments():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="stride must divide block"):
        xattention(q, k, v, stride=7)
    with pytest.raises(ValueError, match="tau must be a finite number at least 0 and at most 1, got -0.1"):
        xattention(q, k, v, tau=-0.1, block=16, stride=4)
    with pytest.raises(ValueError, match="one for each of 4 heads"):
        xattention(q, k, v, tau=torch.ones(3), block=16, stride=4)
    with pytest.raises(ValueError, match="norm must be a finite number above 0"):
        block_scores(q, k, norm=0)
    with pytest.raises(ValueError, match="order must be one of"):
        block_scores(q, k, order="spiral")
    with pytest.raises(ValueError, match="only the antidiagonal order"):
        block_scores(q, k, order="slash", backend="kernel")
    with pytest.raises(ValueError, match="variant must be one of"):
        select(torch.ones(1, 1, 2, 2), variant="official")
    with pytest.raises(ValueError, match="scores must be"):
        select(torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match="coverage must be"):
        calibrate_thresholds([(q, k)], coverage=0)
    with pytest.raises(ValueError, match="at least one layer"):
        calibrate_thresholds([])
    with pytest.raises(ValueError, match="density must be"):
        search_thresholds([(q, k)], density=2)
    with pytest.raises(ValueError, match="one of"):
        XAttentionConfig(backend="fast")
    for tau in (float("nan"), "0.9", True, 2, None):
        for call in (lambda tau: xattention(q, k, v, tau=tau), lambda tau: select(torch.ones(1, 1, 2, 2), tau=tau)):
            with pytest.raises((TypeError, ValueError), match="tau must be"):
                call(tau)
        with pytest.raises((TypeError, ValueError), match="tau must be"):
            XAttentionConfig(tau=tau)
    for change in (
        {"stride": 8.0},
        {"block": True},
        {"keep_sink": 1},
        {"norm": float("nan")},
        {"window": 0},
        {"sinks": q},
    ):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(change))} must"):
            xattention(q, k, v, **change)
    with pytest.raises(TypeError, match="stripe"):
        xattention(q, k, v, stripe=8)


# ----------------------------------------------------------------------------------------------------------- real model


@pytest.mark.model
def test_two_layers_of_smollm2_keep_their_answers_where_everything_is_kept(smollm2_slice):
    from assay.workloads.text import long_prompt

    ids = long_prompt(smollm2_slice.tokenizer, 512)
    model = copy.deepcopy(smollm2_slice.model)
    with torch.no_grad():
        dense = model(ids).logits
        transform.apply(model, {"tau": 1.0, "block": 64}, CONTEXT)
        torch.testing.assert_close(model(ids).logits, dense, atol=2e-3, rtol=1e-3)
        transform.apply(model, {"tau": 0.5, "block": 64}, CONTEXT)
        assert (model(ids).logits - dense).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_on_real_text(smollm2):
    from assay.workloads.text import long_prompt

    ids = long_prompt(smollm2.tokenizer, 1024)
    model = copy.deepcopy(smollm2.model)
    with torch.no_grad():
        dense = model(ids, logits_to_keep=256).logits.float()
        transform.apply(model, {"tau": 1.0, "block": 64}, CONTEXT)
        torch.testing.assert_close(model(ids, logits_to_keep=256).logits.float(), dense, atol=2e-3, rtol=1e-3)
        transform.apply(model, {"tau": 0.9, "block": 64}, CONTEXT)
        sparse = model(ids, logits_to_keep=256).logits.float()
    loss = torch.nn.functional.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
    assert 1e-5 < loss.sum(-1).mean() < 0.1
    assert (sparse.argmax(-1) == dense.argmax(-1)).float().mean() > 0.85
