"""SageAttention2: exact without quantisation, right in every rounding, the kernel like the emulation, and at home in transformers."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.apart import built_with, without_kernels
from tests.tiny import tiny_model, token_ids

from assay.measure.cost import count_cost
from assay.methods.attention import sageattention2 as sage
from assay.methods.attention.sageattention2 import (
    VARIANTS,
    SageAttentionConfig,
    SageSettings,
    accuracy,
    calibrate,
    calibrate_model,
    masked_mean,
    quantise,
    quantise_values,
    round_fp8,
    round_fp22,
    sage_attention,
    transform,
)
from assay.methods.core import kernels
from assay.methods.core.attention.integration import parse_settings
from assay.methods.core.attention.plan import INT8_GROUPS, AttentionPlan, execute, load_int8_kernel
from assay.methods.transform import Transform, TuneContext

needs_kernel = pytest.mark.skipif(not load_int8_kernel(), reason="needs a C++ compiler")
EXACT = SageSettings("exact", smooth_k=False, smooth_q=False, pv="exact")
GRANULARITIES = ["per_tensor", "per_block", "per_warp", "per_thread"]
SMOOTHINGS = [
    {"smooth_k": k, "smooth_q": q, "smooth_v": v} for k in (False, True) for q in (False, True) for v in (False, True)
]


def qkv(batch=1, heads=4, groups=2, queries=200, keys=200, dim=32, seed=0, bias=0.0, dtype=torch.float32):
    """Random queries, keys and values; `bias` gives some channels of queries and keys a large mean, as in real models."""
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, count):
        return torch.randn(batch, tokens, count, dim, generator=generator).transpose(1, 2)

    q, k, v = make(queries, heads), make(keys, groups), make(keys, groups)
    offset = torch.zeros(dim)
    offset[::5] = bias
    return [x.to(dtype) for x in (q + 0.5 * offset, k - offset, v)]


def dense(q, k, v, causal=False, scale=None, seen=None):
    """Attention and log-sum-exp in float64; rows that see nothing give zeros and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    per = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(per, 1), v.repeat_interleave(per, 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(later, -math.inf)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def error(found, expected):
    return accuracy(found, expected)["rmse"]


# ------------------------------------------------------------------------------------------- exact without quantisation


@pytest.mark.parametrize("smoothing", SMOOTHINGS, ids=lambda s: "".join(name[-1] for name in s if s[name]) or "none")
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        (1, 1, True),
        (7, 7, True),
        (128, 128, True),
        (256, 256, False),
        (65, 300, True),
        (130, 130, True),
        (150, 70, False),
    ],
)
def test_every_smoothing_is_exact_without_quantisation(smoothing, queries, keys, causal):
    q, k, v = qkv(2, 9, 3, queries, keys, bias=3.0)
    expected, expected_lse = dense(q, k, v, causal)
    out, lse = sage_attention(q, k, v, is_causal=causal, return_lse=True, variant=replace(EXACT, **smoothing))
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=1e-5)
    wide = [x.double() for x in (q, k, v)]
    out = sage_attention(*wide, is_causal=causal, variant=replace(EXACT, **smoothing))
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-12)
    if queries == keys or not causal:
        torch.testing.assert_close(
            out, F.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True), atol=1e-12, rtol=1e-12
        )


def test_a_scale_and_both_layouts():
    q, k, v = qkv(2, 6, 2, 70, 90)
    expected = sage_attention(q, k, v, is_causal=True, scale=0.3)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    found, lse = sage_attention(*swapped, layout="NHD", is_causal=True, scale=0.3, return_lse=True)
    assert found.shape == (2, 70, 6, 32)
    assert lse.shape == (2, 6, 70)
    assert torch.equal(found.transpose(1, 2), expected)
    exact = dense(q, k, v, True, 0.3)[0]
    assert error(sage_attention(q, k, v, is_causal=True, scale=0.3, variant=EXACT), exact) < 1e-6


@pytest.mark.parametrize("backend", ["torch", pytest.param("kernel", marks=needs_kernel)])
def test_a_constant_added_to_all_keys_changes_nothing(backend):
    """The mean of the shifted keys is the shifted mean; what is left is the rounding of the shifted keys to float."""
    q, k, v = qkv(1, 9, 3)
    shift = 8 * torch.randn(1, 3, 1, 32, generator=torch.Generator().manual_seed(3)).round()
    for settings_ in (SageSettings("int8", pv="exact"), SageSettings("int4", smooth_q=False, pv="exact")):
        run = functools.partial(sage_attention, is_causal=True, variant=settings_, backend=backend, return_lse=True)
        out, lse = run(q, k, v)
        moved, moved_lse = run(q, k + shift, v)
        differences = (moved - out).abs()
        assert differences.median() < 2e-6  # a code that lies at a half may round to the other side
        assert differences.mean() < 2e-4
        truth = dense(q, k + shift, v, True)[1]
        assert (moved_lse - truth).abs().mean() < 1.1 * (lse - dense(q, k, v, True)[1]).abs().mean() + 1e-4
    naive = SageSettings("int4", smooth_k=False, smooth_q=False, pv="exact")
    assert error(sage_attention(q, k + shift, v, is_causal=True, variant=naive), out) > 0.1


def test_a_constant_added_to_all_values_comes_out_added():
    q, k, v = qkv(1, 4, 2)
    constant = torch.tensor([64.0, -32.0]).repeat(16)
    smooth = SageSettings("int8", smooth_v=True)
    out, moved = (sage_attention(q, k, x, is_causal=True, variant=smooth) for x in (v, v + constant))
    assert (moved - constant - out).abs().mean() < 1e-3
    rough = replace(smooth, smooth_v=False)
    assert (sage_attention(q, k, v + constant, is_causal=True, variant=rough) - constant - out).abs().mean() > 0.05


# ------------------------------------------------------------------------------------------------------------- rounding


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 150),
    st.sampled_from([7, 127]),
    st.sampled_from([(128, 1), (64, 1), (32, 1), (32, 8), (16, 8), (64, 4)]),
    st.floats(1e-4, 1e4),
    st.integers(0, 1000),
)
def test_integers_scales_and_groups(rows, levels, group, spread, seed):
    x = torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(seed)) * spread
    x[0, rows // 2] = 0
    codes, scale = quantise(x, levels, *group)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert codes.abs().max() <= levels
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()
    assert (codes[0, rows // 2] == 0).all()
    size, classes = group
    for r in range(rows):
        same = [s for s in range(rows) if s // size == r // size and s % 8 * classes // 8 == r % 8 * classes // 8]
        expected = x[:, same].abs().amax((1, 2)) / levels + 1e-7
        torch.testing.assert_close(scale[:, r, 0], expected)


def test_numbers_of_groups_are_the_papers():
    x = torch.randn(1, 128, 64)
    for size, classes, count in ((32, 8, 4 * 8), (64, 4, 2 * 4), (128, 1, 1), (64, 1, 2), (32, 1, 4)):
        assert len(quantise(x, 127, size, classes)[1].unique()) == count
    pairs = quantise(x, 127, 64, 4)[1][0, :, 0]
    assert pairs[0] == pairs[1] == pairs[8] == pairs[57]
    assert pairs[0] != pairs[2]
    rows = quantise(x, 127, 32, 8)[1][0, :, 0]
    assert rows[3] == rows[11] == rows[27]
    assert rows[3] != rows[2]


def test_halves_round_away_from_zero():
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49, 0.0]])
    codes, scale = quantise(x * 1024, 127, 8)  # the 1e-7 is lost in the sum
    assert codes[0].tolist() == [127, 1, -1, 2, 3, -3, 0, 0]
    assert scale.item() == 1024


def test_zeros_give_zeros_and_no_nan():
    zeros = torch.zeros(1, 2, 100, 32)
    for settings_ in VARIANTS.values():
        out, lse = sage_attention(zeros, zeros, zeros, is_causal=True, return_lse=True, variant=settings_)
        assert (out == 0).all()
        torch.testing.assert_close(lse, torch.arange(1.0, 101.0).log().expand(1, 2, -1), atol=1e-4, rtol=1e-4)


def test_fp8_and_22_bit_numbers():
    x = torch.tensor([448.0, 1.0, 1.0625, 1.07, 0.0078125, 2.0**-10, 0.0])
    assert round_fp8(x).tolist() == [448.0, 1.0, 1.0, 1.125, 0.0078125, 0.0, 0.0]
    cut = round_fp22(torch.tensor([1 + 2.0**-13, 1 + 2.0**-14, -1 - 2.0**-14 - 2.0**-13, 3.0]))
    assert cut.tolist() == [1 + 2.0**-13, 1.0, -1 - 2.0**-13, 3.0]
    codes, scale = quantise_values(torch.randn(1, 2, 50, 16) * 30)
    assert codes.abs().amax(-2).eq(448).all()
    assert scale.shape == (1, 2, 1, 16)
    codes, scale = quantise_values(torch.cat([torch.zeros(1, 1, 9, 1), torch.ones(1, 1, 9, 1)], -1), 2.25)
    assert (codes * scale)[..., 0].eq(0).all()
    assert (codes * scale)[..., 1].eq(1).all()


def test_means_of_blocks_know_what_is_missing():
    x = torch.arange(10.0)[:, None].expand(10, 3)
    there = (torch.arange(10) >= 3)[:, None]
    assert masked_mean(x, there, 4)[:, 0].tolist() == [3.0, 5.5, 8.5]
    assert masked_mean(x, there).tolist() == [[6.0] * 3]
    assert masked_mean(x, ~there & False, 5).eq(0).all()


def test_two_level_sums_repair_the_lost_bits():
    """All weights equal over many keys: 22-bit sums stop to grow exactly, float32 sums of blocks do not."""
    q = torch.zeros(1, 1, 8, 32)
    k = torch.zeros(1, 1, 8192, 32)
    v = 1 + torch.rand(1, 1, 8192, 32, generator=torch.Generator().manual_seed(0))
    exact = dense(q, k, v)[0]
    one, two, plus = (
        error(sage_attention(q, k, v, variant=SageSettings(pv=pv)), exact) for pv in ("fp8_single", "fp8", "fp8++")
    )
    assert one > 20 * two
    assert two < 1e-3
    assert plus < 3e-3


def test_fp16_sums_do_not_overflow_where_2_25_promises_it():
    q, k = torch.zeros(1, 1, 64, 32), torch.zeros(1, 1, 64, 32)
    v = torch.full((1, 1, 64, 32), 1e4)
    out = sage_attention(q, k, v, variant=SageSettings(pv="fp8++"))
    torch.testing.assert_close(out, v, atol=0, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------- accuracy


def test_errors_are_ordered_on_biased_channels():
    q, k, v = qkv(1, 6, 2, 512, 512, 64, bias=6.0)
    q = q + torch.randn(1, 6, 1, 64, generator=torch.Generator().manual_seed(5)) * 2
    exact = dense(q, k, v, True)[0]

    def rmse(**changes):
        return error(sage_attention(q, k, v, is_causal=True, variant=SageSettings(**changes)), exact)

    none, only_k, both = rmse(smooth_k=False, smooth_q=False), rmse(smooth_q=False), rmse()
    assert none > 2 * only_k > 2 * both
    assert both > 2 * rmse(qk="int8")
    granularity = [rmse(granularity=name, pv="exact") for name in GRANULARITIES]
    assert granularity[0] > 1.02 * granularity[1] > granularity[3]
    assert granularity[1] > granularity[2] > granularity[3]
    assert rmse(qk="int8", pv="bf16") < rmse(qk="int8", pv="fp8") <= 1.1 * rmse(qk="int8", pv="fp8++")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_log_sum_exp_is_the_true_one(name):
    q, k, v = qkv(2, 9, 3, 150, 260, 64, bias=4.0)
    out, lse = sage_attention(q, k, v, is_causal=True, return_lse=True, variant=name)
    expected, expected_lse = dense(q, k, v, True)
    close = 0.5 if name == "paper" else 0.06
    assert (lse - expected_lse).abs().max() < close
    assert accuracy(out, expected)["cosine"] > (0.97 if name == "paper" else 0.9985)


def test_constant_values_come_out():
    q, k, _ = qkv(1, 4, 2)
    v = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1)).expand(1, 2, 200, 32)
    expected = v[:, :, :1].repeat_interleave(2, 1).expand(1, 4, 200, 32)
    for pv, close in (("fp8", 4e-2), ("fp8++", 4e-2), ("bf16", 6e-3)):
        rough = sage_attention(q, k, v, is_causal=True, variant=SageSettings(pv=pv))
        torch.testing.assert_close(rough, expected, atol=1e-6, rtol=close)
        smooth = sage_attention(q, k, v, is_causal=True, variant=SageSettings(pv=pv, smooth_v=True), backend="torch")
        torch.testing.assert_close(smooth, expected, atol=1e-5, rtol=1e-5)


def test_order_of_keys_matters_only_to_quantisation():
    q, k, v = qkv(1, 4, 2, bias=3.0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    for smoothing in SMOOTHINGS:
        run = functools.partial(sage_attention, q, variant=replace(EXACT, **smoothing))
        torch.testing.assert_close(run(k[:, :, order], v[:, :, order]), run(k, v), atol=2e-5, rtol=1e-4)
    for settings_ in (SageSettings("int8"), VARIANTS["cpu"]):
        out = sage_attention(q, k, v, variant=settings_)
        moved = sage_attention(q, k[:, :, order], v[:, :, order], variant=settings_)
        exact = dense(q, k, v)[0]
        assert 0 < error(moved, out) < 2.5 * error(out, exact)


def test_no_future_is_seen():
    q, k, v = qkv(1, 4, 2, 300, 300)
    seen_k, seen_v = k.clone(), v.clone()
    for settings_ in (SageSettings("exact", pv="exact"), SageSettings("int8", smooth_k=False, pv="bf16")):
        out = sage_attention(q, k, v, is_causal=True, variant=settings_)
        seen_k[:, :, 192:], seen_v[:, :, 192:] = 9.0, 0.1  # whole key blocks later: codes of the earlier ones stay
        changed = sage_attention(q, seen_k, seen_v, is_causal=True, variant=settings_)
        torch.testing.assert_close(changed[:, :, :192], out[:, :, :192], atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- padding, masks

BACKENDS = ["torch", pytest.param("kernel", marks=needs_kernel)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [300, 140])
def test_padding_is_never_looked_at(backend, queries):
    q, k, v = qkv(4, 9, 3, queries, 300, bias=3.0)
    starts = torch.tensor([0, 128, 37, 300])
    run = functools.partial(sage_attention, is_causal=True, key_start=starts, backend=backend, return_lse=True)
    settings_ = SageSettings("int8", pv="bf16")
    out, lse = run(q, k, v, variant=settings_)
    noise_q, noise_k, noise_v = q.clone(), k.clone(), v.clone()
    for row, start in enumerate(starts.tolist()):
        noise_k[row, :, :start], noise_v[row, :, :start] = 1e30, math.nan
        noise_q[row, :, : max(0, start - (300 - queries))] = math.nan
    again, again_lse = run(noise_q, noise_k, noise_v, variant=settings_)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)
    positions = torch.arange(300)
    seen = (positions >= starts[:, None])[:, None, None, :] & (positions[300 - queries :] >= starts[:, None])[
        :, None, :, None
    ]
    expected, expected_lse = dense(q, k, v, True, seen=seen)
    assert error(out, expected) < 6e-3
    assert (out[3] == 0).all()
    assert (lse[3] == -math.inf).all()
    assert ((lse == -math.inf) == (expected_lse == -math.inf)).all()
    alone = sage_attention(
        q[1:2, :, max(0, 128 - 300 + queries) :],
        k[1:2, :, 128:],
        v[1:2, :, 128:],
        is_causal=True,
        variant=settings_,
        backend=backend,
    )
    if queries == 300:  # padding of whole blocks leaves the grid where it is
        assert (out[1:2, :, 128:] - alone).abs().median() < 1e-6  # but for codes that lie at a half
        assert (out[1:2, :, 128:] - alone).abs().mean() < 1e-4
    assert error(out[1:2, :, -alone.shape[2] :], alone) < 6e-3


def test_masks():
    q, k, v = qkv(2, 6, 2, 90, 150)
    seen = torch.rand(2, 6, 90, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, :, 7] = False
    for causal in (False, True):
        expected, expected_lse = dense(q, k, v, causal, seen=seen)
        for smoothing in SMOOTHINGS:
            out, lse = sage_attention(
                q, k, v, is_causal=causal, mask=seen, return_lse=True, variant=replace(EXACT, **smoothing)
            )
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=1e-4)
        assert error(sage_attention(q, k, v, is_causal=causal, mask=seen, variant="paper_8bit"), expected) < 0.02
    broadcast = sage_attention(q, k, v, mask=seen[0, 0])
    assert torch.equal(broadcast, sage_attention(q, k, v, mask=seen[:1, :1].expand(2, 6, -1, -1)))


def test_a_mask_that_is_padding_is_key_start():
    q, k, v = qkv(2, 4, 2, 100, 130)
    starts = torch.tensor([0, 77])
    positions = torch.arange(130)
    seen = (positions >= starts[:, None])[:, None, None, :] & (positions[30:] >= starts[:, None])[:, None, :, None]
    for name in ("paper", "as_released"):
        masked = sage_attention(q, k, v, is_causal=True, mask=seen, variant=name)
        assert torch.equal(masked, sage_attention(q, k, v, is_causal=True, key_start=starts, variant=name))
        both = sage_attention(q, k, v, is_causal=True, mask=positions >= 0, key_start=starts, variant=name)
        assert torch.equal(both, masked)


def test_short_prompts_without_a_mask_and_other_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        q, k, v = qkv(1, 9, 3, 33, 33, 64, dtype=dtype)
        out, lse = sage_attention(q, k, v, is_causal=True, return_lse=True, variant="paper_8bit")
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert accuracy(out, dense(q, k, v, True)[0])["cosine"] > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_visible(backend):
    for bad in (math.nan, math.inf):
        q, k, v = qkv(1, 2, 1, 70, 70)
        q[0, 0, 50, 3] = bad
        out, lse = sage_attention(q, k, v, is_causal=True, return_lse=True, variant="cpu", backend=backend)
        assert out[0, 0, 50].isnan().any()
        assert lse[0, 0, 50].isnan()
        assert out[0, 1].isfinite().all()


# --------------------------------------------------------------------------------------------------------------- kernel


@needs_kernel
@pytest.mark.parametrize("qk", ["int8", "int4"])
@pytest.mark.parametrize("granularity", GRANULARITIES[1:])
@pytest.mark.parametrize("pv", ["bf16", "exact"])
def test_the_kernel_is_the_emulation(qk, granularity, pv):
    for smooth_q, smooth_k in ((False, True), (True, True), (True, False)):
        settings_ = SageSettings(qk, granularity, smooth_k, smooth_q, pv=pv)
        for queries, keys, causal in (
            (200, 333, True),
            (256, 256, True),
            (129, 129, False),
            (90, 17, False),
            (2, 64, True),
        ):
            q, k, v = qkv(2, 6, 2, queries, keys, 48, bias=2.0)
            out, lse = sage_attention(q, k, v, is_causal=causal, return_lse=True, variant=settings_, backend="kernel")
            expected, expected_lse = sage_attention(
                q, k, v, is_causal=causal, return_lse=True, variant=settings_, backend="torch"
            )
            differences = (out - expected).abs()
            close = 1e-3 if pv == "bf16" else 2e-6
            assert differences.median() < close  # a code that lies at a half may round to the other side
            assert differences.mean() < (2 if pv == "bf16" else 20) * close
            assert (lse - expected_lse).abs().median() < 2e-5


@needs_kernel
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 63, 64, 65, 130])
def test_dimensions_and_lengths_of_the_kernel(dim, tokens):
    q, k, _ = qkv(1, 3, 1, tokens, tokens, dim)
    v = torch.randn(1, 1, tokens, 2 * dim, generator=torch.Generator().manual_seed(1))
    expected = dense(q, k, v, True)[0]
    for dtype, close in ((torch.float32, 0.012), (torch.bfloat16, 0.015)):
        out = sage_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            is_causal=True,
            variant=SageSettings("int8", pv="bf16"),
            backend="kernel",
        )
        assert out.dtype == dtype
        assert error(out, expected) < close


@needs_kernel
def test_the_kernel_takes_any_strides():
    q, k, v = qkv(2, 6, 2, 100, 150, 64)
    expected = sage_attention(q, k, v, is_causal=True, variant="cpu", backend="kernel")
    packed = torch.cat([k, v], -1)
    strided = sage_attention(
        q.contiguous(), packed[..., :64], packed[..., 64:], is_causal=True, variant="cpu", backend="kernel"
    )
    assert torch.equal(strided, expected)
    wide = torch.stack([q, q], -1).flatten(-2)[..., ::2]
    assert torch.equal(sage_attention(wide, k, v, is_causal=True, variant="cpu", backend="kernel"), expected)


@needs_kernel
def test_threads_change_nothing():
    q, k, v = qkv(2, 6, 2, 300, 500, 64, bias=2.0)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outputs.append(sage_attention(q, k, v, is_causal=True, variant="cpu", return_lse=True, backend="kernel"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@needs_kernel
def test_online_softmax_of_the_kernel_at_its_limits():
    """Scores that rise and fall by thousands: the maximum is moved, nothing overflows."""
    q, k, v = qkv(1, 1, 1, 400, 400, 64)
    k = k * torch.linspace(1, 60, 400)[:, None]
    for keys, values in ((k, v), (k.flip(2), v.flip(2))):
        out, lse = sage_attention(
            8 * q, keys, values, is_causal=True, return_lse=True, variant=SageSettings("int8", pv="bf16")
        )
        same = sage_attention(
            8 * q, keys, values, is_causal=True, variant=SageSettings("int8", pv="bf16"), backend="torch"
        )
        assert out.isfinite().all()
        assert lse.isfinite().all()
        assert accuracy(out, same)["cosine"] > 0.995


@needs_kernel
def test_the_kernel_counts_its_macs_and_compiles():
    q, k, v = qkv(2, 6, 2, 64, 100, 32)
    cost = count_cost(lambda: sage_attention(q, k, v, is_causal=True, variant="cpu"))
    assert cost.total("attention").macs == AttentionPlan(64, 100).macs(head_dim=32, batch=2, heads=6)
    assert not cost.uncounted
    torch.library.opcheck(
        torch.ops.assay.int8_attention.default,
        (q, k, v, None, None, 128, True, 0.2, 127, [128, 1, 64, 1], True, True, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_kernel
def test_torch_compile_sees_one_graph():
    q, k, v = qkv(1, 4, 2, 64, 100, 32)
    run = functools.partial(sage_attention, is_causal=True, variant="cpu", return_lse=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(q, k, v), run(q, k, v), strict=True))


def quantised_by_blocks(plan, q, k, v, smooth_q):
    """The definition, query block by query block, on the codes of `quantise`: float64 attention and log-sum-exp."""
    scale, per = q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    seen = plan.visible(0, plan.queries).expand(*q.shape[:2], -1, -1)
    real = (torch.arange(plan.keys) >= plan.key_start[:, None])[:, None, :, None]
    key_mean = masked_mean(k, real)
    k = (k - key_mean).masked_fill(~real, 0)
    codes_k, scale_k = quantise(k, 127, *INT8_GROUPS[2:])
    k, codes_k, scale_k, key_mean, v = (
        x.double().repeat_interleave(per, 1) for x in (k, codes_k, scale_k, key_mean, v)
    )
    outs, sums = [], []
    position = torch.arange(plan.queries) + plan.offset
    for block in (position // plan.block).unique():
        rows = (position // plan.block == block).nonzero()[:, 0]
        there = (position[rows] >= plan.key_start[:, None])[:, None, :, None]
        part = q[:, :, rows].masked_fill(~there, 0)
        query_mean = masked_mean(part, there) if smooth_q else torch.zeros_like(part[:, :, :1])
        codes_q, scale_q = quantise((part - query_mean).masked_fill(~there, 0), 127, *INT8_GROUPS[:2])
        scores = codes_q.double() @ codes_k.mT * scale_q.double() * scale_k.mT + query_mean.double() @ k.mT
        scores = (scores * scale).masked_fill(~seen[:, :, rows], -math.inf)
        outs.append(scores.softmax(-1).nan_to_num(0.0) @ v)
        sums.append(scores.logsumexp(-1) + (scale * part.double() @ key_mean.mT)[..., 0])
    return torch.cat(outs, 2), torch.cat(sums, 2)


@needs_kernel
@pytest.mark.parametrize("smooth_q", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "block"), [(5, 5, 16), (128, 128, 64), (200, 333, 48), (150, 150, 128), (40, 300, 256)]
)
def test_integer_scores_over_kept_blocks_are_the_definition(queries, keys, block, causal, smooth_q):
    q, k, v = qkv(3, 9, 3, queries, keys, 48, bias=2.0)
    starts = torch.tensor([0, keys // 3, keys])  # the last row is padding throughout
    plan = AttentionPlan(queries, keys, block, causal, key_start=starts)
    mask = torch.rand(3, 9, plan.query_blocks, plan.key_blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 2, 0] = False  # rows that see nothing
    plan = replace(plan, mask=mask)
    options = (mask, starts, block, causal, 48**-0.5, 127, INT8_GROUPS, smooth_q, True, False)
    out, lse = torch.ops.assay.int8_attention(q, k, v, *options)
    expected, expected_lse = quantised_by_blocks(plan, q, k, v, smooth_q)
    assert out.isfinite().all()
    assert ((lse == -math.inf) == (expected_lse == -math.inf)).all()
    assert (out[lse == -math.inf] == 0).all()
    differences = (out - expected).abs()  # a code that lies at a half may round to the other side
    assert differences.median() < 2e-6
    assert differences.mean() < 4e-5
    assert (lse - expected_lse)[lse > -math.inf].abs().median() < 2e-5 if (lse > -math.inf).any() else True
    half = [x.bfloat16() for x in (q, k, v)]
    assert error(torch.ops.assay.int8_attention(*half, *options)[0], expected) < 2e-2


@needs_kernel
def test_all_blocks_kept_is_the_dense_integer_path_bit_for_bit():
    q, k, v = qkv(2, 9, 3, 300, 300, 64, bias=2.0)
    every = AttentionPlan(300, 300, 128, mask=torch.ones(2, 9, 3, 3, dtype=torch.bool))
    dense_path = sage_attention(q, k, v, is_causal=True, variant="cpu", backend="kernel")
    assert torch.equal(execute(every, q, k, v, precision="int8"), dense_path)
    assert torch.equal(execute(AttentionPlan(300, 300), q, k, v, precision="int8"), dense_path)
    assert not torch.equal(execute(every, q, k, v), dense_path)


@needs_kernel
def test_blocks_left_out_are_neither_multiplied_nor_counted():
    q, k, v = qkv(2, 6, 2, 100, 160, 32)
    plan = AttentionPlan(100, 160, 16, key_start=torch.tensor([0, 50]))
    mask = torch.rand(2, 6, plan.query_blocks, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[..., 4] = False
    plan = replace(plan, mask=mask)
    expected = execute(plan, q, k, v, precision="int8")
    v[:, :, 64:80] = math.nan
    assert torch.equal(execute(plan, q, k, v, precision="int8"), expected)
    cost = count_cost(lambda: execute(plan, q, k, v, precision="int8"))
    assert cost.total("attention").macs == plan.macs(head_dim=32)


@needs_kernel
def test_bad_calls_of_the_operator():
    q, k, v = qkv(1, 4, 2, 32, 40)
    good = [q, k, v, None, None, 16, True, 0.2, 127, [128, 1, 64, 1], False, True, False]
    for place, value, message in (
        (0, q.half(), "q must be float32 or bfloat16"),
        (1, k[:, :, :, :16], "do not fit together"),
        (2, v[:, :, :30], "v must be"),
        (3, torch.ones(1, 4, 3, 2, dtype=torch.bool), "mask must be"),
        (3, torch.ones(1, 4, 3, 3), "mask must be"),
        (4, torch.tensor([41]), "key_start must lie in"),
        (4, torch.tensor([0, 1]), "key_start must be"),
        (5, 24, "block must be"),
        (8, 128, "levels must be"),
        (9, [128, 1], "groups must be"),
        (9, [48, 1, 64, 1], "groups must be"),
        (9, [128, 3, 64, 1], "groups must be"),
    ):
        bad = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.assay.int8_attention(*bad)


CHECK = """
import torch
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.methods.attention.sageattention2 import SageSettings, sage_attention, accuracy
torch.manual_seed(0)
q, k, v = torch.randn(2, 6, 150, 64) + 1, torch.randn(2, 2, 220, 64) - 2, torch.randn(2, 2, 220, 32)
for pv in ("bf16", "exact"):
    for smooth_q in (False, True):
        kind = dict(is_causal=True, key_start=torch.tensor([0, 90]), variant=SageSettings("int8", smooth_q=smooth_q, pv=pv))
        found, expected = (sage_attention(q, k, v, backend=name, **kind) for name in ("auto", "torch"))
        assert accuracy(found, expected)["relative_l1"] < 5e-3
plan = AttentionPlan(150, 220, 16, mask=torch.rand(2, 6, 10, 14) < 0.5, key_start=torch.tensor([0, 90]))
found, expected = execute(plan, q, k, v, precision="int8"), execute(plan, q, k, v, backend="reference")
assert accuracy(found, expected)["relative_l1"] < 3e-2
"""


def test_without_a_compiler():
    without_kernels(CHECK)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["-mno-amx-tile", "-march=x86-64-v4", "-march=x86-64-v3", "-march=x86-64"])
def test_other_processors(march, tmp_path):
    assert "-march=native" in kernels.FLAGS
    built_with(CHECK, march, cache=tmp_path)


# ---------------------------------------------------------------------------------------------------------- calibration


def test_calibration_takes_the_cheapest_that_is_good_enough():
    smooth, biased = qkv(1, 4, 2, 256, 256, 64), qkv(1, 4, 2, 256, 256, 64, bias=8.0)
    biased[0] = biased[0] * 3
    measured = [
        {
            qk: accuracy(
                sage_attention(*layer, is_causal=True, variant=SageSettings(qk)),
                execute(AttentionPlan(256, 256), *layer),
            )
            for qk in ("int4", "int8")
        }
        for layer in (smooth, biased)
    ]
    assert measured[0]["int4"]["cosine"] > measured[1]["int4"]["cosine"]
    between = (measured[0]["int4"]["cosine"] + measured[1]["int4"]["cosine"]) / 2
    assert calibrate([smooth, biased], min_cosine=between, max_l1=1.0)[0] == "int4"
    assert calibrate([smooth, biased], min_cosine=between, max_l1=1.0)[1] != "int4"
    assert calibrate([smooth], min_cosine=-1.0, max_l1=measured[0]["int4"]["relative_l1"] * 0.99) == ["int8"]
    assert calibrate([smooth, biased], min_cosine=1.0, max_l1=0.0) == ["exact", "exact"]
    assert calibrate([smooth], candidates=["int8"], min_cosine=0.5, max_l1=1.0) == ["int8"]
    assert calibrate([smooth], scale=3.0, min_cosine=measured[0]["int4"]["cosine"] - 1e-6, max_l1=1.0) != ["int4"]
    with pytest.raises(ValueError, match="min_cosine must be"):
        calibrate([smooth], min_cosine=2)


def test_accuracy_measures():
    a, b = torch.tensor([1.0, 2.0, -2.0]), torch.tensor([1.0, 2.0, 2.0])
    found = accuracy(a, b)
    assert found["cosine"] == pytest.approx(1 / 9)
    assert found["relative_l1"] == pytest.approx(4 / 5)
    assert found["rmse"] == pytest.approx((16 / 3) ** 0.5)


# --------------------------------------------------------------------------------------------------------- transformers


CONTEXT = TuneContext("ttft", prompt_tokens=4096, new_tokens=8)


def applied(model, **config):
    return transform.apply(copy.deepcopy(model), {"min_tokens": 0, **config}, CONTEXT)


def test_prefill_is_quantised_and_decoding_exact(monkeypatch):
    calls = []
    real = sage.sage_attention
    monkeypatch.setattr(sage, "sage_attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    model, ids = tiny_model(), token_ids()
    quantised = applied(model)
    assert quantised.config._attn_implementation == "assay_sageattention2"
    out = quantised.generate(ids, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 106)
    assert len(calls) == 2  # one a layer, none while decoding
    assert all(call["is_causal"] and call["scale"] == 0.25 for call in calls)
    with torch.no_grad():
        dense_logits, logits = model(ids).logits, quantised(ids).logits
    assert 1e-5 < (logits - dense_logits).abs().mean() < 0.1 * dense_logits.abs().mean()


def test_exact_layers_short_prompts_and_exact_settings_equal_sdpa():
    model, ids = tiny_model(), token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        for exact in ({"qk": "exact"}, {"qk": ["exact", "exact"]}, {"min_tokens": 101}):
            torch.testing.assert_close(applied(model, **exact)(ids).logits, expected, atol=1e-4, rtol=1e-4)
        one = applied(model, qk=["exact", "int8"])(ids).logits
        assert not torch.allclose(one, expected, atol=1e-3)
        errors = [error(applied(model, qk=qk, smooth_q=True)(ids).logits, expected) for qk in ("int8", "int4")]
        assert 5 * errors[0] < errors[1]


def test_generation_in_chunks_with_a_cache():
    """The second chunk's queries are the last of the keys."""
    from transformers import DynamicCache

    quantised, ids = applied(tiny_model(), smooth_q=True), token_ids(1, 130)
    with torch.no_grad():
        whole = quantised(ids).logits
        cache = DynamicCache()
        quantised(ids[:, :70], cache=cache)
        rest = quantised(ids[:, 70:], cache=cache).logits
    exact = tiny_model()(ids).logits
    assert error(rest, whole[:, 70:]) < 3 * error(whole, exact)


def test_left_padded_rows_are_like_the_rows_alone():
    model = tiny_model()
    quantised = applied(model, smooth_q=True)
    long, short = token_ids(1, 200), token_ids(1, 72, seed=1)
    ids = torch.cat([long, torch.cat([torch.full((1, 128), 5), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :128] = 0
    with torch.no_grad():
        together = quantised(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        alone, exact = quantised(short).logits, model(short).logits
        assert error(together[1:, 128:], alone) < 0.3 * error(alone, exact) + 1e-5  # padding of whole blocks
        torch.testing.assert_close(together[:1], quantised(long).logits, atol=1e-3, rtol=1e-3)
    out = quantised.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 204)


def test_other_masks_are_attended_exactly():
    model, ids = tiny_model(), token_ids(1, 60)
    quantised = applied(model)
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[0, 20:30] = 0  # a hole
    with torch.no_grad():
        torch.testing.assert_close(
            quantised(ids, attention_mask=mask).logits[:, 30:],
            model(ids, attention_mask=mask).logits[:, 30:],
            atol=1e-4,
            rtol=1e-4,
        )


def test_training_is_exact():
    model, ids = tiny_model(), token_ids(1, 40)
    quantised = applied(model)
    for each in (model, quantised):
        each(ids, labels=ids).loss.backward()
    found, expected = (each.model.layers[0].self_attn.q_proj.weight.grad for each in (quantised, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_the_settings_are_saved_with_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    quantised, ids = applied(tiny_model(), qk=["int4", "int8"], smooth_q=True, granularity="per_block"), token_ids()
    quantised.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="assay_sageattention2")
    assert again.config.sageattention2 == quantised.config.sageattention2
    with torch.no_grad():
        expected = quantised(ids).logits
        torch.testing.assert_close(again(ids).logits, expected)
        again.config.sageattention2 = {**again.config.sageattention2, "qk": "exact"}
        assert not torch.allclose(again(ids).logits, expected, atol=1e-3)


def test_calibrated_tables_replay():
    model = tiny_model()
    context = TuneContext("ttft", 4096, 8, calibration=(token_ids(1, 40), token_ids(1, 120)))
    config = {"qk": "calibrated", "min_tokens": 0}
    first = transform.apply(copy.deepcopy(model), config, context).config.sageattention2
    assert len(first["qk"]) == 2
    assert set(first["qk"]) <= {"int8", "exact"}
    assert transform.apply(copy.deepcopy(model), config, context).config.sageattention2 == first
    assert calibrate_model(model, token_ids(), min_cosine=1.0, max_l1=0.0) == ["exact", "exact"]
    assert calibrate_model(model, token_ids(), min_cosine=-1.0, max_l1=10.0) == ["int4", "int4"]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="needs calibration texts"):
        transform.apply(copy.deepcopy(model), config, CONTEXT)


def test_the_transform_fits_long_prompts_on_cpus_with_vnni(monkeypatch):
    model = tiny_model()
    assert isinstance(transform, Transform)
    monkeypatch.setattr(sage, "has_vnni", lambda: True)
    monkeypatch.setattr(sage, "has_tiles", lambda: False)
    fit = transform.applies_to(model, CONTEXT)
    assert fit.applies
    assert [effect.kind for effect in fit.effects] == ["attention"]
    assert 0 < fit.effects[0].macs < 1
    assert "too short" in transform.applies_to(model, TuneContext("ttft", 300, 8)).reason
    assert "transformers model" in transform.applies_to(torch.nn.Linear(2, 2), CONTEXT).reason
    assert "multiples of 16" in transform.applies_to(tiny_model(head_dim=20), CONTEXT).reason
    assert "CPU" in transform.applies_to(tiny_model().to("meta"), CONTEXT).reason
    for config in transform.configs(model, CONTEXT):
        assert transform.apply(copy.deepcopy(model), config, CONTEXT).config.sageattention2["qk"] == config["qk"]
    context = TuneContext("ttft", 4096, 8, calibration=(token_ids(),))
    assert {"qk": "calibrated"} in transform.configs(model, context)
    monkeypatch.setattr(sage, "has_tiles", lambda: True)
    assert "AMX" in transform.applies_to(model, CONTEXT).reason
    monkeypatch.setattr(sage, "has_vnni", lambda: False)
    assert "VNNI" in transform.applies_to(model, CONTEXT).reason


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk": "int2"}, "qk must be one of"),
        ({"qk": ["int8", "int2"]}, "qk must be one of"),
        ({"qk": ["int8"]}, "one for each of 2 layers"),
        ({"granularity": "per_row"}, "granularity must be one of"),
        ({"pv": "fp4"}, "pv must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"window": 3}, "unknown configuration"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        transform.apply(tiny_model(), change, CONTEXT)


def test_bad_arguments():
    q, k, v = qkv()
    for change, message in (
        ({"layout": "HDN"}, "layout must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"variant": "new"}, "variant must be one of"),
        ({"mask": torch.zeros(200, 200)}, "mask must hold bools"),
        ({"mask": torch.ones(3, 1, 200, 200, dtype=torch.bool)}, "mask must broadcast to"),
        ({"key_start": torch.tensor([0, 1])}, "key_start must have shape"),
        ({"key_start": torch.tensor([-1])}, "key_start must lie in"),
        ({"backend": "kernel"}, "backend 'kernel'"),
        ({"backend": "kernel", "variant": SageSettings("int8", "per_tensor", pv="bf16")}, "no per_tensor scales"),
        ({"backend": "kernel", "variant": "cpu", "mask": torch.ones(200, 200, dtype=torch.bool)}, "not a mask"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            sage_attention(q, k, v, **change)
    for tensors, message in (
        ((q[0], k, v), "q must have 4 dimensions"),
        ((q, k.int(), v), "k must hold floating-point"),
        ((q, k, v[:, :, :0]), "must not be empty"),
        ((q, k, v[:, :, :30]), "do not fit together"),
        ((q[:, :3], k, v), "must be a multiple of the heads of k"),
        ((q.double(), k, v), "must have the dtype of q"),
        ((q.clone().requires_grad_(), k, v), "has no gradient"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            sage_attention(*tensors)
    with pytest.raises(ValueError, match="the last of the keys"):
        sage_attention(q, k[:, :, :100], v[:, :, :100], is_causal=True)
    with pytest.raises(ValueError, match="warp_rows must be one of"):
        SageSettings(warp_rows=8)
    with pytest.raises(ValueError, match="size must be a multiple of 8"):
        quantise(torch.zeros(4, 4), 7, 12)
    with pytest.raises(ValueError, match="unknown configuration"):
        parse_settings(SageAttentionConfig, {"tau": 1})


# ----------------------------------------------------------------------------------------------------------- real model


@pytest.mark.model
def test_errors_are_ordered_on_real_queries_and_keys(smollm2):
    from assay.workloads.attention import captured_qkv
    from assay.workloads.text import long_prompt

    layers = captured_qkv(smollm2.model, long_prompt(smollm2.tokenizer, 384), layers=[2, 6, 10])
    exact = [dense(*layer, True)[0] for layer in layers]

    def rmse(**changes):
        run = functools.partial(sage_attention, is_causal=True, variant=SageSettings(**{"pv": "exact", **changes}))
        return sum(error(run(*layer), expected) for layer, expected in zip(layers, exact, strict=True))

    none, only_k, both = rmse(smooth_k=False, smooth_q=False), rmse(smooth_q=False), rmse()
    assert none > only_k > both
    assert both > 4 * rmse(qk="int8")
    by_granularity = [rmse(granularity=name) for name in GRANULARITIES]
    assert by_granularity[0] >= by_granularity[1] >= by_granularity[3]
    assert rmse(qk="int8") < rmse(qk="int8", pv="fp8") < both


@pytest.mark.model
def test_smollm2_on_real_text(smollm2_slice):
    """Through two layers; int4 would cost two hundred times as much, and a scale that is two per cent off, ten times."""
    from assay.workloads.text import long_prompt

    ids = long_prompt(smollm2_slice.tokenizer, 640)
    model = copy.deepcopy(smollm2_slice.model)
    with torch.no_grad():
        expected = model(ids, logits_to_keep=256).logits
        transform.apply(model, {"qk": "int8", "smooth_q": True}, CONTEXT)
        found = model(ids, logits_to_keep=256).logits
    loss = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    assert 1e-8 < loss.sum(-1).mean() < 1e-4
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98


@pytest.mark.parametrize("variant", ["paper", "cpu"])
def test_windows_and_sinks(variant):
    """Both as a mask, and as an exact computation with the sink as one more logit, say; the kernel as the emulation."""
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 200, 32, generator=random).unbind()
    sinks, seen = torch.tensor([1.0, -1.0]), AttentionPlan(200, 200, window=70).visible(0, 200)
    start = torch.tensor([23])
    masked, lse = sage_attention(q, k, v, variant=variant, mask=seen, key_start=start, return_lse=True, backend="torch")
    found, found_lse = sage_attention(
        q, k, v, variant=variant, is_causal=True, window=70, key_start=start, return_lse=True
    )
    tolerance = {"atol": 2e-2, "rtol": 0.0}
    torch.testing.assert_close(found, masked, **tolerance)
    torch.testing.assert_close(found_lse, lse, **tolerance)
    with_sinks, all_lse = sage_attention(
        q, k, v, variant=variant, is_causal=True, window=70, key_start=start, sinks=sinks, return_lse=True
    )
    exact = execute(AttentionPlan(200, 200, key_start=start, window=70), q, k, v, sinks=sinks)
    assert accuracy(with_sinks, exact)["cosine"] > 0.98
    torch.testing.assert_close(all_lse[:, :, 30:], torch.logaddexp(found_lse, sinks.view(-1, 1))[:, :, 30:])
    with pytest.raises(ValueError, match="window must be None unless causal"):
        sage_attention(q, k, v, window=3)


def test_small_rows_of_half_precision_keep_their_digits():
    x = (torch.randn(32, 16) * 2e-5).half()
    codes, scale = quantise(x, 127, 32)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(codes * scale, x.float(), atol=float(scale.max()) / 2, rtol=0.0)
