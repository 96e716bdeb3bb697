"""The Triton kernel, run by Triton's interpreter in a child process (it must be told before triton is imported), and compiled."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from assay.methods.core.attention.plan import AttentionPlan, _choose, execute

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


def attend_here(plan, q, k, v, gradient=False, **options):
    return execute(plan, q.requires_grad_(gradient), k, v, backend="triton", **options)


def lists_here(plan):
    from assay.methods.core.attention.triton_attention import kept_lists

    return kept_lists(plan, torch.device("cpu"))


def compiled(capability, plan, dtype, dim, value_dim):
    """Bytes of shared memory of a tile, and whether tensor cores are used."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from assay.methods.core.attention import triton_attention as module

    element = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    constants, options = module.constants(plan, dim, value_dim, 3, element)
    strides = ("i32", "i32", "i32", "constexpr")
    signature, fixed = {}, {}
    for i, name in enumerate(module._attend.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
        elif name.endswith("_strides"):
            signature[name] = strides[1:] if name.startswith("counts") else strides
            fixed[(i, len(signature[name]) - 1)] = 1
        else:
            types = {
                "counts_ptr": "*i32",
                "lists_ptr": "*i32",
                "starts_ptr": "*i64",
                "sinks_ptr": "*fp32",
                "scale": "fp32",
            }
            signature[name] = types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
    source = ASTSource(module._attend, signature, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made.metadata.shared, "mma.sync" in made.asm["ptx"] or "wgmma" in made.asm["ptx"]


@pytest.fixture(scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()  # it has started
    with pool:
        yield lambda function, *given, **options: pool.submit(function, *given, **options).result()


@pytest.fixture(scope="module")
def attend(interpreter):
    """`execute` with the Triton backend, in the child."""

    def run(plan, q, k, v, **options):
        return interpreter(attend_here, plan, q, k, v, **options)

    return run


def qkv(batch=1, heads=2, groups=1, queries=40, keys=40, dim=16, value_dim=None, dtype=torch.float32, seed=0):
    """Random tensors as transformers hands them over: transposed views of (batch, tokens, heads, dim)."""
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, count, size):
        return torch.randn(batch, tokens, count, size, generator=generator).to(dtype).transpose(1, 2)

    value_dim = dim if value_dim is None else value_dim
    return make(queries, heads, dim), make(keys, groups, dim), make(keys, groups, value_dim)


def some(plan, batch, heads, share=0.5, seed=0):
    """The plan with a random mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, plan.query_blocks, plan.key_blocks, generator=generator) < share
    return replace(plan, mask=mask)


def exact(plan, q, k, v, scale=None):
    return execute(plan, q.double(), k.double(), v.double(), backend="reference", scale=scale)


@needs_triton
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "block"),  # None: dense, where the plan's block means nothing
    [
        *[(5, 5, None), (64, 64, None), (43, 43, None), (1, 40, None), (20, 54, None)],
        *[(5, 5, 16), (16, 16, 16), (64, 64, 32), (43, 43, 32), (1, 40, 16), (20, 54, 16), (50, 90, 48), (40, 52, 20)],
    ],
)
def test_equals_the_reference(attend, causal, queries, keys, block):
    q, k, v = qkv(queries=queries, keys=keys, value_dim=24)
    plan = AttentionPlan(queries, keys, block or 16, causal)
    plan = plan if block is None else some(plan, 1, 2)
    torch.testing.assert_close(attend(plan, q, k, v).double(), exact(plan, q, k, v), atol=2e-6, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize(("queries", "keys"), [pytest.param(300, 300, marks=pytest.mark.slow), (130, 300)])
def test_blocks_larger_than_the_tiles(attend, queries, keys):
    q, k, v = qkv(1, 1, 1, queries, keys, dim=16)
    starts = torch.tensor([70])
    for causal in (True, False):
        plan = some(AttentionPlan(queries, keys, 144, causal, key_start=starts), 1, 1, share=0.6, seed=1)
        torch.testing.assert_close(attend(plan, q, k, v).double(), exact(plan, q, k, v), atol=2e-6, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_a_batch_have_their_own_masks_and_padding(attend, causal):
    q, k, v = qkv(3, queries=20, keys=50)
    starts = torch.tensor([0, 45, 50])  # the last row is padding throughout
    dense = AttentionPlan(20, 50, 16, causal, key_start=starts)
    for plan in (dense, some(dense, 3, 2)):
        found = attend(plan, q, k, v)
        torch.testing.assert_close(found.double(), exact(plan, q, k, v), atol=2e-6, rtol=1e-5)
        assert found[2].abs().max() == 0
        assert found[1, :, : 45 - 30].abs().max() == 0


@needs_triton
def test_padding_may_hold_anything(attend):
    q, k, v = qkv(2, queries=40, keys=40)
    plan = AttentionPlan(40, 40, 16, key_start=torch.tensor([0, 21]))
    clean = attend(plan, q, k, v)
    for x in (q, k, v):
        x[1, :, :21] = math.nan
    torch.testing.assert_close(attend(plan, q, k, v), clean)


@needs_triton
def test_grouped_heads_are_not_expanded(attend):
    q, k, v = qkv(1, 6, 2, 20, 20)
    plan = some(AttentionPlan(20, 20, 16), 1, 6)
    found = attend(plan, q, k, v)
    torch.testing.assert_close(found.double(), exact(plan, q, k, v), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found, attend(plan, q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))


@needs_triton
def test_rows_that_see_nothing_are_zero(attend):
    q, k, v = qkv(queries=48, keys=48)
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 1, 2] = False
    out = attend(AttentionPlan(48, 48, 16, mask=mask), q, k, v)
    assert out[0, 1, 32:].abs().max() == 0
    assert out[0, 1, :32].abs().min() > 0
    nothing = AttentionPlan(48, 48, 16, mask=torch.zeros_like(mask))
    assert attend(nothing, q, k, v).abs().max() == 0


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(3, 5), (24, 40), (64, 16), (80, 80)])
def test_types_and_head_dimensions(attend, dtype, dim, value_dim):
    q, k, v = qkv(queries=17, keys=24, dim=dim, value_dim=value_dim, dtype=dtype)
    plan = some(AttentionPlan(17, 24, 16), 1, 2, share=0.7)
    found = attend(plan, q, k, v)
    assert (found.dtype, found.shape) == (dtype, (1, 2, 17, value_dim))
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), exact(plan, q, k, v), atol=tolerance, rtol=tolerance)


@needs_triton
def test_any_strides(attend):
    q, k, v = qkv(2, 2, 2, 20, 20)
    plan = some(AttentionPlan(20, 20, 16), 2, 2)
    expected = attend(plan, q, k, v)
    apart = [torch.empty(2, 2, 16, 40)[..., ::2].transpose(2, 3).copy_(x) for x in (q, k, v)]
    assert apart[0].stride(-1) == 40
    assert torch.equal(attend(plan, *apart), expected)
    assert torch.equal(attend(plan, *(x.contiguous() for x in (q, k, v))), expected)
    turned = AttentionPlan(20, 20, 16, mask=plan.mask.mT.contiguous().mT)
    assert turned.mask.stride(-1) != 1
    assert torch.equal(attend(turned, q, k, v), expected)
    shared = k[:, :1].expand(2, 2, 20, 16)  # stride 0
    torch.testing.assert_close(attend(plan, q, shared, v).double(), exact(plan, q, shared, v), atol=2e-6, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 40.0])
def test_any_scale(attend, scale):
    q, k, v = qkv()
    plan = AttentionPlan(40, 40, 16)
    torch.testing.assert_close(
        attend(plan, q, k, v, scale=scale).double(), exact(plan, q, k, v, scale), atol=2e-5, rtol=1e-4
    )


@needs_triton
def test_a_chunk_is_the_end_of_the_whole_prompt(attend):
    q, k, v = qkv(queries=68, keys=68)
    whole = some(AttentionPlan(68, 68, 16), 1, 2)
    expected = attend(whole, q, k, v)
    for last in (1, 16, 37):
        chunk = AttentionPlan(last, 68, 16)
        chunk = AttentionPlan(last, 68, 16, mask=whole.mask[:, :, -chunk.query_blocks :])
        torch.testing.assert_close(attend(chunk, q[:, :, -last:], k, v), expected[:, :, -last:])


@needs_triton
def test_skipped_blocks_are_not_read(attend):
    q, k, v = qkv(queries=64, keys=64)
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    mask[..., 1] = False  # the second key block, by anyone
    plan = AttentionPlan(64, 64, 16, mask=mask)
    expected = exact(plan, q, k, v)
    k[:, :, 16:32] = v[:, :, 16:32] = math.nan
    torch.testing.assert_close(attend(plan, q, k, v).double(), expected, atol=2e-6, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize(("queries", "keys", "block", "window"), [(70, 70, 16, 37), (33, 70, 32, 20), (40, 40, 64, 1)])
def test_windows_and_sinks(attend, queries, keys, block, window):
    q, k, v = qkv(2, queries=queries, keys=keys)
    start, sinks = torch.tensor([0, 29]), torch.tensor([-2.0, 20.0])
    dense = AttentionPlan(queries, keys, block, window=window)
    sparse = some(AttentionPlan(queries, keys, block, key_start=start, window=window), 2, 2, 0.7)
    for plan, given in ((dense, {"sinks": sinks}), (sparse, {}), (sparse, {"sinks": sinks})):
        expected = execute(plan, q, k, v, backend="reference", **given)
        torch.testing.assert_close(attend(plan, q, k, v, **given), expected, atol=1e-5, rtol=1e-5)


def test_lists_are_the_mask_within_what_is_allowed(interpreter):
    for queries, keys, block, causal, starts in [
        (50, 50, 16, True, None),
        (23, 50, 16, True, [7, 40]),
        (23, 50, 16, False, [7, 49]),
        (50, 50, 16, False, [50, 0]),
        (64, 64, 16, True, [16, 33]),
        (1, 64, 32, True, [64, 63]),
    ]:
        plan = AttentionPlan(queries, keys, block, causal, key_start=None if starts is None else torch.tensor(starts))
        for case in (plan, some(plan, 2, 3)):
            counts, lists = interpreter(lists_here, case)
            kept = case.allowed() if case.mask is None else case.mask & case.allowed()
            assert torch.equal(counts.expand(kept.shape[:-1]).long(), kept.sum(-1))
            listed = lists.expand(kept.shape)
            for at in kept.sum(-1).nonzero().tolist():
                assert listed[*at, : counts.expand(kept.shape[:-1])[*at]].tolist() == kept[*at].nonzero()[:, 0].tolist()


@needs_triton
def test_empty_batch(attend):
    q, k, v = qkv(0)
    assert attend(AttentionPlan(40, 40, 16), q, k, v).shape == (0, 2, 40, 16)


@needs_triton
def test_what_it_refuses(attend, interpreter):
    q, k, v = qkv()
    plan = AttentionPlan(40, 40, 16)
    for case, tensors, message in [
        (plan, (q.double(), k.double(), v.double()), "float32, float16 or bfloat16, got torch.float64"),
        (some(AttentionPlan(40, 40, 8), 1, 2), (q, k, v), "blocks of at least 16, got 8"),
        (plan, qkv(dim=257), "head dimension up to 256, got 257"),
        (plan, qkv(value_dim=300), "value dimension up to 256, got 300"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(case, *tensors)
    with pytest.raises(ValueError, match="backend 'triton' has no gradient"):
        attend(plan, q, k, v, gradient=True)
    dense = AttentionPlan(40, 40, 8)  # whose block means nothing
    torch.testing.assert_close(attend(dense, q, k, v).double(), exact(dense, q, k, v), atol=2e-6, rtol=1e-5)


COMPILED = [
    ("bf16", 128, 128, 128, 4096, True, 90),
    ("fp32", 64, 64, 64, 40, True, 80),
    ("fp16", 80, 24, 48, 4096, False, 80),
    ("fp16", 256, 256, 1024, 4096, True, 86),
    ("bf16", 64, 64, 16, 1, True, 80),
]


@needs_triton
@pytest.mark.parametrize(
    "cases", [COMPILED[:2], pytest.param(COMPILED[2:], marks=pytest.mark.slow)], ids=["two", "others"]
)
def test_compiles_for_gpus(cases, tmp_path, monkeypatch):
    """To machine code, without a GPU; tensor cores multiply 16 bits, and a tile's shared memory fits the smallest GPU's."""
    from assay.methods.core.attention.triton_attention import triton_refuses

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "runs on one GPU" in triton_refuses(AttentionPlan(40, 40, 16), *qkv())  # this process has no interpreter
    for dtype, dim, value_dim, block, queries, causal, capability in cases:
        plan = AttentionPlan(queries, 4096, block, causal)
        shared, tensor_cores = compiled(capability, plan, dtype, dim, value_dim)
        assert shared <= 99 * 1024
        assert tensor_cores == (dtype != "fp32")
    assert len(list(tmp_path.iterdir())) >= len(cases)  # compiled now, not taken from the user's cache


def test_auto_on_a_gpu():
    with FakeTensorMode():  # tensors that have a device and no memory
        q, k, v = (torch.empty(1, 2, 40, 16, device="cuda") for _ in range(3))
        trained, double = torch.empty(1, 2, 40, 16, device="cuda", requires_grad=True), q.double()
    plan = some(AttentionPlan(40, 40, 16), 1, 2)
    assert _choose(plan, q, k, v) == "flex"
    assert _choose(plan, double, double, double) == "flex"
    assert _choose(plan, trained, k, v) == "gather"
    assert _choose(AttentionPlan(40, 40, 16), q, k, v) == "sdpa"


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="pip install triton"):
        execute(AttentionPlan(40, 40, 16), q, k, v, backend="triton")
    plan = some(AttentionPlan(40, 40, 16), 1, 2)
    torch.testing.assert_close(execute(plan, q, k, v).double(), exact(plan, q, k, v), atol=2e-6, rtol=1e-5)
