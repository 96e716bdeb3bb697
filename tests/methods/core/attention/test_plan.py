"""AttentionPlan and its executors, against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.core.attention.plan import AttentionPlan, block_mask, execute, kernel_refuses, load_kernel

kernel = pytest.mark.skipif(not load_kernel(), reason="needs a C++ compiler")
BACKENDS = ["reference", "gather", pytest.param("kernel", marks=kernel)]
EVERY = [*BACKENDS, "sdpa", "flex", pytest.param("int8", marks=kernel)]  # Triton's are in test_triton_attention.py


def qkv(batch=1, heads=4, groups=2, queries=64, keys=64, dim=32, value_dim=None, dtype=torch.float32, seed=0):
    """Random tensors as transformers hands them over: transposed views of (batch, tokens, heads, dim)."""
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, count, size):
        return (
            torch.randn(batch, tokens, count, size, generator=generator, dtype=torch.float32).to(dtype).transpose(1, 2)
        )

    value_dim = dim if value_dim is None else value_dim
    return make(queries, heads, dim), make(keys, groups, dim), make(keys, groups, value_dim)


def oracle(plan, q, k, v, scale=None):
    """Softmax over the keys that each query of each head sees, one by one as the plan's docstring says it, in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per = q.shape[1] // k.shape[1]
    position, column = torch.arange(plan.keys - plan.queries, plan.keys)[:, None], torch.arange(plan.keys)
    seen = column <= position if plan.causal else torch.ones(plan.queries, plan.keys, dtype=torch.bool)
    if plan.key_start is not None:  # padding is not seen and sees nothing
        start = plan.key_start[:, None, None, None]
        seen = seen & (column >= start) & (position >= start)
    if plan.mask is not None:
        seen = seen & plan.mask[:, :, position // plan.block - plan.first_block, column // plan.block]
    k, v = (x.double().repeat_interleave(per, 1) for x in (k, v))
    scores = (q.double() @ k.mT * scale).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def random_mask(plan, batch, heads, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, plan.query_blocks, plan.key_blocks, generator=generator) < share


def masked(plan, mask):
    return AttentionPlan(plan.queries, plan.keys, plan.block, plan.causal, mask, plan.key_start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "block"),
    [(5, 5, 16), (16, 16, 16), (64, 64, 16), (75, 75, 32), (1, 40, 16), (20, 70, 16), (32, 96, 32), (50, 90, 48)],
)
def test_equals_attention_written_out(backend, causal, queries, keys, block):
    q, k, v = qkv(batch=2, queries=queries, keys=keys, dim=16, value_dim=32)
    plan = AttentionPlan(queries, keys, block, causal)
    for mask in (None, random_mask(plan, 2, 4)):
        expected = oracle(masked(plan, mask), q, k, v)
        torch.testing.assert_close(
            execute(masked(plan, mask), q, k, v, backend=backend).double(), expected, atol=2e-6, rtol=1e-5
        )


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    per=st.integers(1, 3),
    queries=st.integers(1, 70),
    older=st.integers(0, 50),
    block=st.sampled_from([16, 32, 48]),
    dim=st.sampled_from([16, 48, 64]),
    causal=st.booleans(),
    share=st.floats(0, 1),
    padding=st.integers(0, 90),
    seed=st.integers(0, 1000),
)
def test_any_shape_mask_and_padding(batch, groups, per, queries, older, block, dim, causal, share, padding, seed):
    keys = queries + older
    q, k, v = qkv(batch, groups * per, groups, queries, keys, dim, seed=seed)
    starts = torch.tensor([min(padding, keys), 0][:batch])
    plan = AttentionPlan(queries, keys, block, causal, key_start=starts)
    plan = masked(plan, random_mask(plan, batch, groups * per, share, seed))
    expected = execute(plan, q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(expected, oracle(plan, q, k, v))
    for backend in ["gather", "kernel"] if load_kernel() else ["gather"]:
        found = execute(plan, q, k, v, backend=backend)
        torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=1e-5)


def strided(x, kind):
    """The same numbers lying otherwise in memory."""
    if kind == "contiguous":
        return x.contiguous()
    if kind == "dim not last":
        return x.mT.contiguous().mT
    return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]  # every second number


def listed_flex(q, k, v, *, block_mask, scale, enable_gqa):
    """flex_attention written out: whole blocks as listed, part blocks where `mask_mod` says, nothing of what is not listed.

    Torch's own, when not compiled, ignores the lists.
    """

    def grid(counts, lists):
        listed = torch.arange(lists.shape[-1]) < counts[..., None]
        blocks = torch.zeros_like(listed).scatter(-1, lists.long(), listed)
        size = block_mask.BLOCK_SIZE
        return blocks.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)

    whole = grid(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    places = [torch.arange(size).view(-1, *[1] * (3 - i)) for i, size in enumerate(whole.shape)]
    seen = whole | (grid(block_mask.kv_num_blocks, block_mask.kv_indices) & block_mask.mask_mod(*places))
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q.float() @ k.float().mT * scale).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v.float()).to(q.dtype)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "lies"),
    [
        (7, 7, "contiguous"),  # less than a block
        (32, 32, "dim not last"),  # whole blocks
        (45, 45, "every second"),
        (16, 48, "contiguous"),  # a chunk of a longer prompt that begins with a block
        (21, 50, "dim not last"),  # and one that begins inside a block
        (1, 40, "every second"),
    ],
)
def test_hard_cases_of_every_backend(backend, causal, dtype, queries, keys, lies, monkeypatch):
    """9 query heads over 3 key heads; a mask of its own for each row, one without padding, one padded, one padding throughout."""
    if backend == "flex":  # compiling the real one takes a minute: test_flex_backend_equals_the_reference
        monkeypatch.setattr("assay.methods.core.attention.plan._compiled_flex", lambda: listed_flex)
    q, k, v = (strided(x, lies) for x in qkv(3, 9, 3, queries, keys, 32, value_dim=48, dtype=dtype))
    plan = AttentionPlan(queries, keys, 16, causal, key_start=torch.tensor([0, keys // 3, keys]))
    options = {"backend": "kernel", "precision": "int8"} if backend == "int8" else {"backend": backend}
    close = 5e-2 if backend == "int8" else 2e-2 if dtype == torch.bfloat16 else 3e-6
    mask = random_mask(plan, 3, 9)
    mask[0, 4] = False  # a head that sees nothing
    for case in (plan, masked(plan, mask)):
        if backend == "sdpa" and case.mask is not None:
            continue
        found, expected = execute(case, q, k, v, **options), oracle(case, q, k, v)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)
        assert found[2].abs().max() == 0
        if case.mask is not None:
            assert found[0, 4].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero(backend):
    q, k, v = qkv(queries=48, keys=48)
    plan = AttentionPlan(48, 48, 16)
    mask = torch.ones(1, 4, 3, 3, dtype=torch.bool)
    mask[0, 1, 2] = False
    out = execute(masked(plan, mask), q, k, v, backend=backend)
    assert out[0, 1, 32:].abs().max() == 0
    assert out[0, 1, :32].abs().min() > 0


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    q, k, v = qkv(queries=40, keys=40, dtype=dtype)
    plan = AttentionPlan(40, 40, 16)
    plan = masked(plan, random_mask(plan, 1, 4))
    if backend == "kernel" and dtype != torch.bfloat16:
        with pytest.raises(ValueError, match="takes float32 or bfloat16"):
            execute(plan, q, k, v, backend=backend)
        return
    out = execute(plan, q, k, v, backend=backend)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.double(), oracle(plan, q, k, v), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "gather"])
def test_dense_plan_without_the_kernel(backend, monkeypatch):
    monkeypatch.setattr("assay.methods.core.attention.plan.load_kernel", lambda: False)
    for queries, keys, starts in [(40, 40, None), (17, 40, None), (40, 40, [3, 25]), (1, 40, None), (1, 40, [0, 9])]:
        q, k, v = qkv(2, queries=queries, keys=keys)
        plan = AttentionPlan(queries, keys, 16, key_start=None if starts is None else torch.tensor(starts))
        found = execute(plan, q, k, v, backend=backend).double()
        torch.testing.assert_close(found, oracle(plan, q, k, v), atol=2e-6, rtol=1e-5)


def test_auto_takes_the_sparse_path_without_the_kernel(monkeypatch):
    monkeypatch.setattr("assay.methods.core.attention.plan.load_kernel", lambda: False)
    q, k, v = qkv(queries=64, keys=64)
    plan = AttentionPlan(64, 64, 16)
    plan = masked(plan, random_mask(plan, 1, 4))
    torch.testing.assert_close(execute(plan, q, k, v).double(), oracle(plan, q, k, v), atol=2e-6, rtol=1e-5)


def test_batch_rows_and_heads_are_independent():
    q, k, v = qkv(3, queries=50, keys=50)
    plan = AttentionPlan(50, 50, 16)
    mask = random_mask(plan, 3, 4)
    whole = execute(masked(plan, mask), q, k, v)
    for b in range(3):
        for h in range(4):
            alone = masked(plan, mask[b : b + 1, h : h + 1])
            group = slice(h // 2, h // 2 + 1)
            part = execute(alone, q[b : b + 1, h : h + 1], k[b : b + 1, group], v[b : b + 1, group])
            torch.testing.assert_close(whole[b : b + 1, h : h + 1], part)


def test_grouped_heads_equal_repeated_keys():
    q, k, v = qkv(heads=6, groups=2, queries=50, keys=50)
    plan = AttentionPlan(50, 50, 16)
    plan = masked(plan, random_mask(plan, 1, 6))
    repeated = execute(plan, q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(execute(plan, q, k, v), repeated)


def test_a_chunk_is_the_end_of_the_whole_prompt():
    q, k, v = qkv(queries=100, keys=100)
    plan = AttentionPlan(100, 100, 16)
    mask = random_mask(plan, 1, 4)
    whole = execute(masked(plan, mask), q, k, v)
    for last in (1, 16, 20, 37):
        chunk = AttentionPlan(last, 100, 16)
        chunk = masked(chunk, mask[:, :, -chunk.query_blocks :])
        torch.testing.assert_close(execute(chunk, q[:, :, -last:], k, v), whole[:, :, -last:])


def test_gradients_go_through_gather():
    plan = AttentionPlan(20, 20, 16)
    mask = torch.tensor([[[[True, False], [False, True]], [[True, False], [False, False]]]])
    narrow = [x.double().requires_grad_() for x in qkv(heads=2, groups=1, queries=20, keys=20, dim=3)]
    assert torch.autograd.gradcheck(lambda *x: execute(masked(plan, mask), *x), narrow)
    q, k, v = (x.double().requires_grad_() for x in qkv(heads=2, groups=1, queries=20, keys=20, dim=16))
    with pytest.raises(ValueError, match=r"float32|gradient"):
        execute(plan, q, k, v, backend="kernel")
    q32 = q.detach().float().requires_grad_()
    assert "gradient" in kernel_refuses(q32, k.detach().float(), v.detach().float()) or not load_kernel()
    execute(plan, q32, k.detach().float(), v.detach().float()).sum().backward()  # auto falls back
    assert q32.grad is not None


def test_counts_are_those_of_the_visible_pairs():
    for queries, keys, block, causal, starts in [
        (50, 50, 16, True, None),
        (23, 50, 16, True, None),
        (50, 50, 16, False, None),
        (23, 50, 16, True, [7, 40]),
        (50, 50, 16, False, [50, 0]),
        (64, 64, 16, True, [16, 33]),
    ]:
        plan = AttentionPlan(queries, keys, block, causal, key_start=None if starts is None else torch.tensor(starts))
        for mask in (None, random_mask(plan, 2, 3)):
            case = masked(plan, mask)
            pairs = case.visible(0, queries).expand(2, 3, -1, -1).sum().item()
            assert case.pairs(2, 3) == pairs
            assert case.macs(head_dim=8, value_dim=4, batch=2, heads=3) == pairs * 12
        blocks = torch.zeros(2, plan.query_blocks, plan.key_blocks, dtype=torch.bool)
        for row, column in plan.visible(0, queries).expand(2, 1, -1, -1).any(0)[0].nonzero().tolist():
            rows = (row + keys - queries) // block - plan.first_block
            blocks[:, rows, column // block] |= plan.visible(row, row + 1)[:, 0, 0, column]
        assert torch.equal(plan.allowed().expand(2, 1, -1, -1)[:, 0], blocks)


def test_density_and_bytes():
    plan = AttentionPlan(64, 64, 16)
    mask = torch.eye(4, dtype=torch.bool).expand(1, 1, 4, 4)
    assert plan.density() == 1
    assert masked(plan, mask).density() == pytest.approx(4 / 10)
    assert masked(plan, torch.ones(1, 1, 4, 4, dtype=torch.bool)).density() == 1
    # queries and outputs 2 x 64 rows, keys and values of 4 blocks
    assert masked(plan, mask).bytes_moved(head_dim=8, itemsize=2) == (2 * 64 + 2 * 4 * 16) * 8 * 2
    assert plan.bytes_moved(head_dim=8, itemsize=2, heads=3) == 3 * (2 * 64 + 2 * 10 * 16) * 8 * 2
    short = AttentionPlan(60, 60, 16)  # the last key block has 12 keys
    assert short.bytes_moved(head_dim=8, itemsize=2) == (2 * 60 + 2 * (4 * 16 + 3 * 16 + 2 * 16 + 12)) * 8 * 2


def test_recall_is_the_exact_mass_of_the_kept_blocks():
    q, k, _ = qkv(2, queries=40, keys=56)
    plan = AttentionPlan(40, 56, 16, key_start=torch.tensor([0, 20]))
    assert torch.allclose(plan.recall(q, k), torch.ones(2, 4))
    sparse = masked(plan, random_mask(plan, 2, 4))
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)) * 32**-0.5
    seen = plan.visible(0, 40)
    mass = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0).masked_fill(~sparse.visible(0, 40), 0).sum(-1)
    expected = mass.sum(-1) / seen.any(-1).sum(-1)
    torch.testing.assert_close(sparse.recall(q, k).double(), expected, atol=1e-6, rtol=1e-5)


def test_dropped_mass_bounds_the_error():
    q, k, v = qkv(queries=96, keys=96, dim=16, dtype=torch.float64)
    plan = AttentionPlan(96, 96, 16)
    mask = random_mask(plan, 1, 4) | torch.eye(6, dtype=torch.bool)
    sparse = masked(plan, mask)
    error = (execute(sparse, q, k, v) - execute(plan, q, k, v)).abs().amax(-1)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.25
    share = scores.masked_fill(~plan.visible(0, 96), -math.inf).softmax(-1)
    dropped = share.masked_fill(sparse.visible(0, 96), 0).sum(-1)
    spread = (v.amax(2) - v.amin(2)).amax(-1).repeat_interleave(2, 1)[:, :, None]
    assert (error <= dropped * spread + 1e-12).all()


def test_block_mask_of_flex_attention_is_the_plan():
    plan = AttentionPlan(37, 70, 16, key_start=torch.tensor([0, 20]))
    plan = masked(plan, random_mask(plan, 2, 3))
    made = block_mask(plan, 2, 3)
    kept = plan.mask & plan.allowed()
    assert torch.equal(made.to_dense().bool(), kept)
    assert made.full_kv_num_blocks.sum() > 0
    for b in range(2):
        row, column = torch.meshgrid(torch.arange(64), torch.arange(80), indexing="ij")
        dense = AttentionPlan(37, 70, 16, key_start=plan.key_start[b : b + 1]).visible(0, 37)[0, 0]
        found = made.mask_mod(torch.tensor(b), torch.tensor(0), row, column)
        lead = 33 - 32
        assert torch.equal(found[lead : lead + 37, :70] & dense.any(-1, keepdim=True), dense)


@pytest.mark.slow
def test_flex_backend_equals_the_reference():
    q, k, v = qkv(2, queries=80, keys=112)
    plan = AttentionPlan(80, 112, 32, key_start=torch.tensor([0, 40]))
    plan = masked(plan, random_mask(plan, 2, 4))
    torch.testing.assert_close(
        execute(plan, q, k, v, backend="flex").double(), oracle(plan, q, k, v), atol=1e-5, rtol=1e-4
    )


@kernel
def test_kernel_under_torch_compile():
    q, k, v = qkv(queries=64, keys=64)
    plan = AttentionPlan(64, 64, 16)
    step = torch.compile(
        lambda a, b, c: execute(plan, a * 2, b, c, backend="kernel") + 1, backend="eager", fullgraph=False
    )
    torch.testing.assert_close(step(q, k, v), execute(plan, q * 2, k, v) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries must be a whole number at least 1 and at most 64"),
        ({"queries": 65}, "queries must be a whole number at least 1 and at most 64"),
        ({"block": 0}, "block must be a whole number at least 1"),
        ({"mask": torch.ones(1, 4, 4, 3, dtype=torch.bool)}, "mask must have shape"),
        ({"mask": torch.ones(1, 4, 4, 4)}, "mask must hold bools"),
        ({"key_start": torch.tensor([1.0])}, "key_start must hold torch.int64"),
        ({"key_start": torch.tensor([65])}, "key_start must lie in"),
        ({"queries": 3.7}, "queries must be a whole number"),
        ({"window": 0}, "window must be a whole number at least 1"),
        ({"window": 8, "causal": False}, "window must be None unless causal"),
        ({"causal": 1}, "causal must be True or False"),
    ],
)
def test_bad_plans(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AttentionPlan(**{"queries": 64, "keys": 64, "block": 16, **change})


def test_bad_tensors():
    q, k, v = qkv()
    plan = AttentionPlan(64, 64, 16)
    bad = [
        ((q[:, :, :3], k, v), "the plan is for 64 queries"),
        ((q[0], k, v), "q must have shape"),
        ((q, k, v[:, :1]), "do not fit together"),
        ((q[:, :3], k, v), "must be a multiple"),
        ((q, k, v.double()), "v must have the dtype of q"),
    ]
    for tensors, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            execute(plan, *tensors)
    with pytest.raises(ValueError, match="backend must be one of"):
        execute(plan, q, k, v, backend="cuda")
    with pytest.raises(ValueError, match="precision must be one of 'input', 'bf16', 'int8', got 'fp8'"):
        execute(plan, q, k, v, precision="fp8")
    with pytest.raises(ValueError, match="mask is for"):
        execute(masked(plan, torch.ones(1, 2, 4, 4, dtype=torch.bool)), q, k, v)
    with pytest.raises(ValueError, match="dense plans only"):
        execute(masked(plan, torch.ones(1, 4, 4, 4, dtype=torch.bool)), q, k, v, backend="sdpa")
    with pytest.raises(ValueError, match="key_start is for a batch"):
        execute(AttentionPlan(64, 64, key_start=torch.tensor([0, 0])), q, k, v)


@pytest.mark.parametrize("backend", ["kernel", "gather", "sdpa"])
@pytest.mark.parametrize(
    ("queries", "keys", "block", "window"), [(90, 90, 16, 37), (41, 90, 32, 33), (1, 90, 16, 20), (70, 70, 64, 1)]
)
def test_windows_and_sinks_equal_the_reference(queries, keys, block, window, backend):
    """With and without padding and sinks, in blocks and dense; the pairs that are counted are those that are seen."""
    if backend == "kernel" and not load_kernel():
        pytest.skip("no compiler")
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 32, generator=random)
    k, v = torch.randn(2, 2, 2, keys, 32, generator=random).unbind()
    for start in (None, torch.tensor([0, 29])):
        dense = AttentionPlan(queries, keys, block, key_start=start, window=window)
        assert dense.pairs(2) == int(dense.visible(0, queries).expand(2, 1, -1, -1).sum())
        kept = torch.rand(2, 4, dense.query_blocks, dense.key_blocks, generator=random) < 0.7
        for plan in (dense, AttentionPlan(queries, keys, block, mask=kept, key_start=start, window=window)):
            if backend == "sdpa" and plan.mask is not None:
                continue
            for sinks in (None, torch.randn(4, generator=random)):
                expected = execute(plan, q, k, v, backend="reference", sinks=sinks)
                found = execute(plan, q, k, v, backend=backend, sinks=sinks)
                torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_sink_is_a_key_that_has_no_value():
    q, k, v = qkv()
    sink = torch.tensor([0.5, -2.0, 3.0, 60.0])
    found = execute(AttentionPlan(64, 64, 16), q, k, v, sinks=sink)
    weights = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5).masked_fill(
        torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf
    )
    weights = torch.cat([weights, sink.view(1, 4, 1, 1).expand(len(q), -1, 64, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(found, weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), atol=2e-6, rtol=1e-5)
    assert found[:, 3].abs().max() < 1e-20  # nearly all of the last head's weight is the sink's


def test_what_ran_is_noted():
    from assay.methods.core import kernels

    q, k, v = qkv()
    plan = AttentionPlan(64, 64, 16)
    for backend in ("gather", "reference", "sdpa", "auto"):
        before = kernels.paths()
        execute(plan, q, k, v, backend=backend)
        after = kernels.paths()
        (new,) = [path for path in after if after[path] != before.get(path, 0)]
        assert new == (
            f"attention: {backend}" if backend != "auto" else f"attention: {'kernel' if load_kernel() else 'sdpa'}"
        )
