"""The C++ operators themselves: strides, precisions, online softmax at its limits, bad input, other processors."""

from __future__ import annotations

import math

import pytest
import torch
from tests.properties.apart import built_with, without_kernels

from assay.methods.core import kernels
from assay.methods.core.attention.plan import AttentionPlan, execute, load_kernel

pytestmark = pytest.mark.skipif(not load_kernel(), reason="needs a C++ compiler")
ops = torch.ops.assay
HALF = load_kernel() and ops.attention_has_bf16()
half_only = pytest.mark.skipif(not HALF, reason="this processor has no bfloat16 dot product")


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(q, k, v, causal=True, scale=None):
    """Float64 attention of grouped heads, queries at the end of the keys."""
    q, k, v = q.double(), k.double(), v.double()
    per = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(per, 1).transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1) @ v.repeat_interleave(per, 1)


def attend(q, k, v, mask=None, start=None, block=64, causal=True, scale=None, half=False):
    return ops.block_attention(
        q, k, v, mask, start, block, causal, q.shape[3] ** -0.5 if scale is None else scale, half
    )


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 63, 64, 65, 130])
def test_dimensions_and_lengths(dim, tokens):
    q, k, v = rand(1, 3, tokens, dim), rand(1, 1, tokens, dim, seed=1), rand(1, 1, tokens, 2 * dim, seed=2)
    torch.testing.assert_close(attend(q, k, v).double(), dense(q, k, v), atol=3e-6, rtol=1e-5)
    if HALF:
        half = [x.bfloat16() for x in (q, k, v)]
        torch.testing.assert_close(attend(*half, half=True).double(), dense(*half), atol=3e-2, rtol=2e-2)
        torch.testing.assert_close(attend(q, k, v, half=True).double(), dense(q, k, v), atol=6e-2, rtol=2e-2)


@pytest.mark.parametrize("block", [16, 48, 128, 1024])
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=half_only)])
def test_any_block_size_is_the_same_dense_attention(block, half):
    q, k, v = rand(2, 4, 200, 64), rand(2, 2, 300, 64, seed=1), rand(2, 2, 300, 64, seed=2)
    for causal in (True, False):
        found = attend(q, k, v, block=block, causal=causal, half=half).double()
        tolerance = 3e-2 if half else 3e-6
        torch.testing.assert_close(found, dense(q, k, v, causal), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_where_they_lie(dtype):
    projected = rand(2, 50, 8 * 32, dtype=dtype).view(2, 50, 8, 32)  # as one projection makes q, k and v
    q, k, v = (projected[:, :, a:b].transpose(1, 2) for a, b in ((0, 4), (4, 6), (6, 8)))
    assert not q.is_contiguous()
    half = HALF and dtype == torch.bfloat16
    copies = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(attend(q, k, v, half=half), attend(*copies, half=half))
    assert torch.equal(attend(q[:, :, 1:], k, v, half=half), attend(copies[0][:, :, 1:], k, v, half=half))
    one = q[:, :, -1:]
    assert torch.equal(
        ops.decode_attention(one, k, v, None, 0.2), ops.decode_attention(one.clone(), *copies[1:], None, 0.2)
    )
    scores = [ops.antidiagonal_scores(a, b, None, 4, 16, True, 0.1, half) for a, b in ((q, k), copies[:2])]
    assert torch.equal(*scores)
    odd = torch.zeros(1, 1, 20, 33, dtype=dtype)[..., :32]  # rows of odd length in bfloat16
    odd.copy_(rand(1, 1, 20, 32))
    torch.testing.assert_close(
        attend(odd, odd, odd, half=half), attend(odd.clone(), odd.clone(), odd.clone(), half=half)
    )


def test_the_output_lies_as_the_next_projection_reads_it():
    q, k, v = rand(2, 4, 9, 16), rand(2, 2, 9, 16), rand(2, 2, 9, 16)
    assert attend(q, k, v).transpose(1, 2).is_contiguous()
    assert ops.decode_attention(q[:, :, :1], k, v, None, 0.25).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=half_only)])
def test_scores_that_grow_along_the_keys(half):
    """Every block raises the maximum by more than it may lag behind; and the other way round, everything underflows."""
    q = torch.ones(1, 1, 200, 16)
    v = rand(1, 1, 200, 16, seed=2)
    for steps in (
        torch.arange(200.0),
        -torch.arange(200.0),
        (torch.arange(200.0) % 7) * 30,
        5000 - torch.arange(200.0) * 64,
    ):
        k = (steps[:, None] / 16).expand(200, 16)[None, None].bfloat16().float()
        found = attend(q, k, v, scale=1.0, half=half, block=16)
        tolerance = 1e-2 if half else 2e-5
        torch.testing.assert_close(found.double(), dense(q, k, v, scale=1.0), atol=tolerance, rtol=tolerance)


def test_negative_and_zero_scale():
    q, k, v = rand(1, 2, 70, 32), rand(1, 2, 70, 32, seed=1), rand(1, 2, 70, 32, seed=2)
    for scale in (-0.5, 0.0, 3.0):
        torch.testing.assert_close(
            attend(q, k, v, scale=scale).double(), dense(q, k, v, scale=scale), atol=5e-6, rtol=1e-5
        )


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=half_only)])
def test_what_is_not_a_number_stays_visible(half):
    q, k, v = rand(1, 1, 80, 16), rand(1, 1, 80, 16, seed=1), rand(1, 1, 80, 16, seed=2)
    k[0, 0, 40, 3] = math.nan
    out = attend(q, k, v, half=half, block=16)
    assert not out[:, :, :40].isnan().any()
    assert out[:, :, 40:].isnan().all()
    assert ops.decode_attention(q[:, :, -1:], k, v, None, 1.0).isnan().all()


@half_only
@pytest.mark.parametrize("dim", [32, 64, 96, 160])
@pytest.mark.parametrize("queries", [15, 16, 17, 32, 47, 48, 49, 64, 79])
@pytest.mark.parametrize("block", [16, 48, 128])
def test_tiles_of_rows_and_keys_end_anywhere(queries, block, dim):
    keys = queries + 37
    q, k, v = rand(2, 2, queries, dim), rand(2, 1, keys, dim, seed=1), rand(2, 1, keys, 48, seed=2)
    start = torch.tensor([0, 21])
    plan = AttentionPlan(queries, keys, block, key_start=start)
    shape = (2, 2, plan.query_blocks, plan.key_blocks)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    plan = AttentionPlan(queries, keys, block, mask=kept, key_start=start)
    wide = [x.bfloat16().double() for x in (q, k, v)]
    expected = execute(plan, *wide, backend="reference")
    half = [x.bfloat16() for x in (q, k, v)]
    found = attend(*half, kept, start, block, half=True)
    torch.testing.assert_close(found.double(), expected, atol=3e-2, rtol=2e-2)
    assert torch.equal(found == 0, expected.bfloat16() == 0)  # rows that see nothing, and no others


@half_only
def test_nothing_comes_from_other_heads_or_from_padding():
    q, k, v = (rand(2, 2, 49, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    clean = attend(q, k, v, start=torch.tensor([0, 17]), half=True)
    for x in (k, v):
        x[0, 1] = math.nan
        x[1, :, :17] = math.inf
    found = attend(q, k, v, start=torch.tensor([0, 17]), half=True)
    assert torch.equal(found[0, 0], clean[0, 0])
    assert torch.equal(found[1], clean[1])
    assert found[0, 1].isnan().all()


@half_only
def test_torch_keeps_its_own_tiles():
    """Matrix products and attention of torch in bfloat16 use the same tile registers in the same threads."""
    q, k, v = (rand(1, 2, 200, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    a, b = rand(100, 96, seed=3, dtype=torch.bfloat16), rand(96, 130, seed=4, dtype=torch.bfloat16)
    calls = [
        lambda: a @ b,
        lambda: attend(q, k, v, half=True),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: ops.antidiagonal_scores(q, k, None, 8, 64, True, 0.1, True),
    ]
    first = [call() for call in calls]
    torch.testing.assert_close(first[1], first[2], atol=3e-2, rtol=2e-2)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 0, 2, 1]):
        for i in order:
            assert torch.equal(calls[i](), first[i]), i


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=half_only)])
def test_masks_differ_by_row_and_head(half):
    q, k, v = rand(2, 4, 100, 32), rand(2, 2, 100, 32, seed=1), rand(2, 2, 100, 32, seed=2)
    mask = torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    plan = AttentionPlan(100, 100, 16, mask=mask)
    expected = execute(plan, q.double(), k.double(), v.double(), backend="reference")
    tolerance = 3e-2 if half else 3e-6
    torch.testing.assert_close(
        attend(q, k, v, mask, block=16, half=half).double(), expected, atol=tolerance, rtol=tolerance
    )


def test_threads_do_not_change_the_result():
    q, k, v = rand(1, 6, 300, 64), rand(1, 2, 300, 64, seed=1), rand(1, 2, 300, 64, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores = ops.antidiagonal_scores(q, k, None, 8, 64, True, 0.1, False)
            results.append((attend(q, k, v), ops.decode_attention(q[:, :, :1], k, v, None, 0.125), scores))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 2), (12, 2), (5, 1), (16, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding(heads, dtype):
    for keys in (1, 15, 16, 17, 255, 256, 257, 700):
        q = rand(2, heads[0], 1, 64, dtype=dtype)
        k, v = rand(2, heads[1], keys, 64, seed=1, dtype=dtype), rand(2, heads[1], keys, 32, seed=2, dtype=dtype)
        found = ops.decode_attention(q, k, v, None, 0.3).double()
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found, dense(q, k, v, scale=0.3), atol=tolerance, rtol=tolerance)
        start = torch.tensor([keys // 2, keys])
        padded = ops.decode_attention(q, k, v, start, 0.3).double()
        part = dense(q[:1], k[:1, :, keys // 2 :], v[:1, :, keys // 2 :], scale=0.3)
        torch.testing.assert_close(padded[:1], part, atol=tolerance, rtol=tolerance)
        assert padded[1].abs().max() == 0


@half_only
def test_scores_in_bfloat16_are_near():
    q, k = rand(1, 4, 256, 64), rand(1, 2, 256, 64, seed=1)
    exact = ops.antidiagonal_scores(q, k, None, 8, 64, True, 0.1, False)
    torch.testing.assert_close(ops.antidiagonal_scores(q, k, None, 8, 64, True, 0.1, True), exact, atol=5e-2, rtol=2e-2)


def test_bad_input():
    q, k, v = rand(1, 4, 32, 16), rand(1, 2, 32, 16), rand(1, 2, 32, 16)
    bad = [
        (lambda: attend(q.double(), k.double(), v.double()), "float32 or bfloat16"),
        (lambda: attend(q, k.bfloat16(), v), "must have the dtype of q"),
        (lambda: attend(q, k, v.bfloat16()), "v must be"),
        (lambda: attend(q[:, :3], k, v), "do not fit together"),
        (lambda: attend(q, k[:, :, :9], v[:, :, :9]), "q must have at most as many tokens as k"),
        (lambda: attend(q, k, v[:, :, :9]), "v must be"),
        (lambda: attend(rand(1, 4, 8, 24), rand(1, 2, 8, 24), rand(1, 2, 8, 24)), "multiple of 16"),
        (lambda: attend(q.transpose(2, 3), k, v), "dim last in memory"),
        (lambda: attend(q, k, v, block=24), "block must be a positive multiple of 16"),
        (lambda: attend(q, k, v, torch.ones(1, 4, 1, 2, dtype=torch.bool)), "mask must be"),
        (lambda: attend(q, k, v, torch.ones(1, 4, 1, 1)), "mask must be"),
        (lambda: attend(q, k, v, start=torch.tensor([33])), r"key_start must lie in \[0, 32\], got 33"),
        (lambda: attend(q, k, v, start=torch.tensor([0.0])), "key_start must be"),
        (lambda: ops.decode_attention(q, k, v, None, 1.0), "q must hold one token"),
        (lambda: ops.antidiagonal_scores(q, k, None, 5, 16, True, 1.0, False), "stride must divide block"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_empty_batches():
    q, k, v = rand(0, 4, 32, 16), rand(0, 2, 32, 16), rand(0, 2, 32, 16)
    assert attend(q, k, v).shape == (0, 4, 32, 16)
    assert ops.antidiagonal_scores(q, k, None, 4, 16, True, 1.0, False).shape == (0, 4, 2, 2)


CHECK = """
import torch
from assay.methods.core.attention.plan import AttentionPlan, execute, load_kernel
from assay.methods.attention.xattention import block_scores, xattention_plan
assert load_kernel() == KERNELS
if any("-march" in flag for flag in ADDED):
    assert not torch.ops.assay.attention_has_bf16()
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(2, h, n, 32, generator=g).to(dtype) for h, n in ((6, 90), (2, 130), (2, 130)))
    start = torch.tensor([0, 50])
    plan = xattention_plan(q, k, tau=0.7, stride=4, block=16, key_start=start)
    wide = [x.double() for x in (q, k, v)]
    close = 2e-2 if dtype == torch.bfloat16 else 5e-6
    torch.testing.assert_close(execute(plan, q, k, v).double(), execute(plan, *wide, backend="reference"), atol=close, rtol=close)
    one = AttentionPlan(1, 130, key_start=start)
    last = [wide[0][:, :, -1:], *wide[1:]]
    torch.testing.assert_close(execute(one, q[:, :, -1:], k, v).double(), execute(one, *last, backend="reference"), atol=close, rtol=close)
    scores = [block_scores(q, k, stride=4, block=16, key_start=start, backend=b) for b in ("auto", "torch")]
    torch.testing.assert_close(*scores, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=close)
"""


def test_without_a_compiler():
    without_kernels(CHECK)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["-mno-amx-tile", "-march=x86-64-v3", "-march=x86-64"])
def test_other_processors(march, tmp_path):
    assert "-march=native" in kernels.FLAGS
    built_with(CHECK, march, cache=tmp_path)
