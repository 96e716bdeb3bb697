"""Attention over permuted blocks of any size: every backend against every score, masked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.apart import built_with, without_kernels

from assay.measure.cost import count_cost
from assay.methods.core import kernels
from assay.methods.core.attention.clusters import ClusterPlan, execute_clusters
from assay.methods.core.attention.plan import load_kernel

needs_kernel = pytest.mark.skipif(not load_kernel(), reason="needs a compiler")
BACKENDS = ["gather", pytest.param("kernel", marks=needs_kernel)]


def qkv(
    batch=2, heads=6, groups=2, queries=90, keys=130, dim=32, value_dim=None, seed=0, dtype=torch.float32, spread=1.5
):
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, count, width):  # (batch, tokens, heads, dim) in memory
        return (torch.randn(batch, tokens, count, width, generator=generator) * spread).to(dtype).transpose(1, 2)

    return make(queries, heads, dim), make(keys, groups, dim), make(keys, groups, value_dim or dim)


def random_plan(q, k, query_clusters=5, key_clusters=7, density=0.5, seed=0, empty=()):
    """Labels of random, uneven clusters; those in `empty` stay empty on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def labels(x, count):
        weights = torch.rand(count, generator=generator) ** 3 + 0.01
        for cluster in empty:
            weights[cluster] = 0
        drawn = torch.multinomial(weights, x.shape[0] * x.shape[1] * x.shape[2], replacement=True, generator=generator)
        return drawn.view(x.shape[:3])

    mask = torch.rand(*q.shape[:2], query_clusters, key_clusters, generator=generator) < density
    return ClusterPlan.from_labels(labels(q, query_clusters), labels(k, key_clusters), mask), mask


def masked_attention(plan, q, k, v):
    """Straight from the definition, in float64, by the labels of the tokens."""
    query_labels, key_labels = plan.labels()
    per = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = plan.mask[b, h][query_labels[b, h]][:, key_labels[b, h // per]]
            scores = q[b, h].double() @ k[b, h // per].double().T * q.shape[3] ** -0.5
            share = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
            out[b, h] = share @ v[b, h // per].double()
    return out


def same(found, expected, dtype=torch.float32):
    close = 2e-2 if dtype == torch.bfloat16 else 2e-5
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)


# ----------------------------------------------------------------------------------------------------------------- plan


def test_labels_and_orders_say_the_same():
    q, k, _ = qkv()
    plan, _ = random_plan(q, k, empty=(2,))
    query_labels, key_labels = plan.labels()
    for order, sizes, labels in (
        (plan.query_order, plan.query_sizes, query_labels),
        (plan.key_order, plan.key_sizes, key_labels),
    ):
        assert torch.equal(sizes.sum(-1), torch.full(sizes.shape[:2], labels.shape[2]))
        assert (sizes[..., 2] == 0).all()
        permuted = labels.gather(-1, order)
        assert (permuted.diff(dim=-1) >= 0).all()
        inverse = order.argsort(-1)
        assert torch.equal(permuted.gather(-1, inverse), labels)  # permutation and inverse are the identity
        moved = order.diff(dim=-1) > 0
        assert moved[permuted.diff(dim=-1) == 0].all()  # stable: tokens of a cluster keep their order
    again = ClusterPlan.from_labels(query_labels, key_labels, plan.mask)
    assert torch.equal(again.query_order, plan.query_order)
    assert torch.equal(again.key_sizes, plan.key_sizes)


def test_density_and_macs_count_the_pairs():
    q, k, _ = qkv()
    plan, _ = random_plan(q, k)
    counted = int(plan.visible(0, 90).sum())
    assert plan.pairs() == counted
    assert plan.density() == counted / (2 * 6 * 90 * 130)
    assert plan.macs(head_dim=32) == counted * 64
    assert plan.macs(head_dim=32, value_dim=16) == counted * 48
    everything = ClusterPlan.from_labels(*plan.labels(), torch.ones_like(plan.mask))
    assert everything.density() == 1.0
    assert plan.density(plan.mask) == 1.0
    allowed = plan.mask.clone()
    allowed[..., 0] = True
    inside = ClusterPlan.from_labels(*plan.labels(), allowed)
    assert plan.density(allowed) == plan.pairs() / inside.pairs()


def test_recall_is_the_exact_mass_that_is_kept():
    q, k, _ = qkv()
    plan, _ = random_plan(q, k)
    share = (q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2) * 32**-0.5).softmax(-1)
    expected = (share * plan.visible(0, 90)).sum(-1).mean(-1)
    torch.testing.assert_close(plan.recall(q, k).double(), expected, atol=1e-6, rtol=1e-5)
    assert plan.recall(q, k, allowed=plan.mask).max() <= 1 + 1e-6
    seen = plan.visible(0, 90).any(-1).double().mean(-1)  # rows that see nothing keep nothing
    torch.testing.assert_close(plan.recall(q, k, allowed=plan.mask).double(), seen, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_backends_match_the_definition(backend, dtype):
    q, k, v = qkv(value_dim=48, dtype=dtype)
    plan, _ = random_plan(q, k, empty=(0, 3))
    same(execute_clusters(plan, q, k, v, backend=backend), masked_attention(plan, q, k, v), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 300),
    more=st.integers(0, 300),
    clusters=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dim=st.sampled_from([16, 64]),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3)]),
    density=st.sampled_from([0.1, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(backend, queries, more, clusters, dim, heads, density, seed):
    q, k, v = qkv(2, *heads, queries, queries + more, dim, seed=seed)
    plan, _ = random_plan(q, k, *clusters, density=density, seed=seed)
    same(execute_clusters(plan, q, k, v, backend=backend), masked_attention(plan, q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_at_the_edges_of_chunks(backend):
    """Clusters of exactly a register of keys, a segment, and a thread's rows, and one more and one less."""
    sizes = [16, 15, 17, 128, 127, 129, 512, 513, 0, 1]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))].expand(1, 1, -1)
    q, k, v = qkv(1, 1, 1, labels.shape[2], labels.shape[2], 16)
    mask = torch.rand(1, 1, len(sizes), len(sizes), generator=torch.Generator().manual_seed(1)) < 0.6
    plan = ClusterPlan.from_labels(labels, labels, mask)
    assert plan.query_sizes.tolist() == [[sizes]]
    same(execute_clusters(plan, q, k, v, backend=backend), masked_attention(plan, q, k, v))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.2, 0.85])
def test_many_small_clusters(density, dtype):
    """Runs of kept neighbours, long and short, that begin and end anywhere in a register of keys."""
    q, k, v = qkv(1, 4, 2, 200, 700, 32, 48, dtype=dtype)
    plan, _ = random_plan(q, k, 3, 90, density)
    same(execute_clusters(plan, q, k, v, backend="kernel"), masked_attention(plan, q, k, v), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_kept_is_dense_attention(backend):
    q, k, v = qkv(heads=9, groups=3)
    plan, mask = random_plan(q, k)
    plan = ClusterPlan.from_labels(*plan.labels(), torch.ones_like(mask))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(execute_clusters(plan, q, k, v, backend=backend), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numbering_of_clusters_does_not_matter(backend):
    q, k, v = qkv()
    plan, mask = random_plan(q, k)
    query_labels, key_labels = plan.labels()
    rows, columns = torch.randperm(5), torch.randperm(7)
    renamed = ClusterPlan.from_labels(
        rows.argsort()[query_labels], columns.argsort()[key_labels], mask[:, :, rows][..., columns].contiguous()
    )
    assert torch.equal(renamed.visible(0, 90), plan.visible(0, 90))
    found = execute_clusters(renamed, q, k, v, backend=backend)
    torch.testing.assert_close(found, execute_clusters(plan, q, k, v, backend=backend), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_that_see_nothing_are_zeros(backend):
    q, k, v = qkv()
    plan, mask = random_plan(q, k)
    mask[1, :, 2] = False
    found = execute_clusters(plan, q, k, v, backend=backend)
    blind = (plan.labels()[0] == 2) & torch.tensor([False, True])[:, None, None]
    assert blind.any()
    assert not found[blind].any()
    assert found.isfinite().all()


@needs_kernel
def test_left_out_keys_are_not_read():
    """The kernel skips blocks instead of masking them: what is not a number there does no harm."""
    q, k, v = qkv()
    plan, mask = random_plan(q, k)
    mask[..., 4] = False
    expected = execute_clusters(plan, q, k, v, backend="kernel")
    hidden = plan.labels()[1] == 4
    k[hidden], v[hidden] = math.nan, math.inf
    assert torch.equal(execute_clusters(plan, q, k, v, backend="kernel"), expected)


@needs_kernel
def test_kernel_multiplies_float32_in_bfloat16_on_request():
    q, k, v = qkv()
    plan, _ = random_plan(q, k)
    found = execute_clusters(plan, q, k, v, backend="kernel", precision="bf16")
    expected = masked_attention(plan, q, k, v)
    torch.testing.assert_close(found.double(), expected, atol=5e-2, rtol=5e-2)
    assert (not torch.ops.assay.attention_has_bf16()) or not torch.equal(
        found, execute_clusters(plan, q, k, v, backend="kernel")
    )


def test_strides_and_scale():
    q, k, v = qkv()
    plan, _ = random_plan(q, k)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]  # dim not last in memory
    expected = masked_attention(plan, q * 2, k, v)
    for backend in ("auto", "gather", "reference"):
        same(execute_clusters(plan, *turned, backend=backend, scale=2 * 32**-0.5), expected)


def test_gradients_go_through_gather():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 2, 20, 24, 4, dtype=torch.float64))
    plan, _ = random_plan(q, k, empty=(1,))
    assert torch.autograd.gradcheck(lambda *qkv: execute_clusters(plan, *qkv), (q, k, v))
    wide = [x.detach().float().repeat(1, 1, 1, 4).requires_grad_() for x in (q, k, v)]
    assert execute_clusters(plan, *wide).requires_grad  # auto does not take the kernel
    with pytest.raises(ValueError, match="no gradient"):
        execute_clusters(plan, *wide, backend="kernel")


def test_more_queries_than_keys_and_empty_batches():
    q, k, v = qkv(queries=70, keys=30)
    plan, _ = random_plan(q, k)
    same(execute_clusters(plan, q, k, v), masked_attention(plan, q, k, v))
    if load_kernel():
        with pytest.raises(ValueError, match="no more queries than keys, got 70 and 30"):
            execute_clusters(plan, q, k, v, backend="kernel")
    nothing = ClusterPlan.from_labels(*(x[:0] for x in plan.labels()), plan.mask[:0])
    assert execute_clusters(nothing, q[:0], k[:0], v[:0]).shape == (0, 6, 70, 32)
    assert execute_clusters(nothing, q[:0], k[:0], v[:0], backend="gather").shape == (0, 6, 70, 32)


@needs_kernel
def test_the_cost_counter_knows_the_kernel():
    q, k, v = qkv(value_dim=16)
    plan, _ = random_plan(q, k)
    cost = count_cost(lambda: execute_clusters(plan, q, k, v, backend="kernel"))
    assert cost.total("attention").macs == plan.macs(head_dim=32, value_dim=16)
    assert not cost.uncounted


@needs_kernel
def test_meta_tensors_give_the_shape():
    q, k, v = (x.to("meta") for x in qkv(value_dim=16))
    sizes = [
        torch.empty(shape, dtype=torch.int64, device="meta")
        for shape in ((2, 6, 90), (2, 2, 130), (2, 6, 5), (2, 2, 7))
    ]
    mask = torch.empty(2, 6, 5, 7, dtype=torch.bool, device="meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, *sizes, mask)]
        assert torch.ops.assay.cluster_attention(*fakes, 1.0, False).shape == (2, 6, 90, 16)


# --------------------------------------------------------------------------------------------------------------- errors


def test_bad_plans_are_refused():
    order, sizes, mask = (
        torch.arange(4).view(1, 1, 4),
        torch.tensor([[[1, 3]]]),
        torch.ones(1, 1, 2, 2, dtype=torch.bool),
    )
    ClusterPlan(order, order, sizes, sizes, mask)
    bad = [
        ((order.float(), order, sizes, sizes, mask), "query_order must be int64"),
        ((order, order[0], sizes, sizes, mask), "key_order must be int64"),
        ((order, order, sizes[:, :, None], sizes, mask), "query_sizes must be int64"),
        ((order + 1, order, sizes, sizes, mask), "query_order must hold tokens from 0 to 3"),
        ((order, order // 2, sizes, sizes, mask), "key_order must be a permutation"),
        ((order, order, sizes + 1, sizes, mask), "query_sizes must not be negative and sum to the 4 tokens"),
        ((order, order, sizes, torch.tensor([[[-1, 5]]]), mask), "key_sizes must not be negative"),
        ((order, order, sizes, sizes, mask.int()), "mask must be bool"),
        ((order, order, sizes, sizes, mask[..., :1]), r"mask must be bool \(1, 1, 2, 2\)"),
        ((order, order.expand(1, 2, 4), sizes, sizes.expand(1, 2, 2), mask), "must be a multiple of the heads of keys"),
    ]
    for parts, message in bad:
        with pytest.raises(ValueError, match=message):
            ClusterPlan(*parts)
    labels = torch.tensor([[[0, 1, 2, 0]]])
    with pytest.raises(ValueError, match=r"key_labels must lie in \[0, 2\)"):
        ClusterPlan.from_labels(labels % 2, labels, mask)
    with pytest.raises(ValueError, match="query_labels must be int64"):
        ClusterPlan.from_labels(labels.float(), labels, mask)


def test_bad_calls_are_refused():
    q, k, v = qkv()
    plan, _ = random_plan(q, k)
    bad = [
        ((q[:, :, 1:], k, v, {}), r"the plan is for q of \(batch, heads, tokens\) \(2, 6, 90\), got \(2, 6, 89\)"),
        ((q, k[:, :1], v[:, :1], {}), "the plan is for k"),
        ((q, k, v[:, :, 1:], {}), "do not fit together"),
        ((q, k, v.double(), {}), "v must have the dtype of q"),
        ((q[0], k, v, {}), "q must have shape"),
        ((q, k, v, {"backend": "sdpa"}), "backend must be one of 'auto', 'kernel', 'gather', 'reference', got 'sdpa'"),
        ((q, k, v, {"precision": "int8"}), "precision must be one of"),
        ((*(x[..., :20] for x in (q, k, v)), {"backend": "kernel"}), "multiple of 16|compiler"),
    ]
    for (*tensors, options), message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            execute_clusters(plan, *tensors, **options)


@needs_kernel
def test_the_operator_checks_what_it_is_given():
    q, k, v = qkv(1, 1, 1, 4, 4, 16)
    order, sizes = torch.arange(4).view(1, 1, 4), torch.tensor([[[1, 3]]])
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    bad = [
        ((order + 1, order, sizes, sizes, mask), "query_order must hold tokens from 0 to 3"),
        ((order, order.int(), sizes, sizes, mask), "key_order must be a contiguous int64"),
        ((order, order, sizes + 1, sizes, mask), "query_sizes must sum to 4"),
        ((order, order, sizes, torch.tensor([[[-1, 5]]]), mask), r"key_sizes must lie in \[0, tokens\], got -1"),
        ((order, order, sizes, sizes[0], mask), "key_sizes must be a contiguous int64"),
        ((order, order, sizes, sizes, mask[..., :1]), "mask must be a contiguous bool"),
    ]
    for parts, message in bad:
        with pytest.raises(ValueError, match=message):
            torch.ops.assay.cluster_attention(q, k, v, *parts, 1.0, False)


CHECK = """
import torch
from assay.methods.core.attention.clusters import ClusterPlan, execute_clusters
from assay.methods.core.attention.plan import load_kernel
assert load_kernel() == KERNELS
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(2, h, n, 32, generator=g).to(dtype) for h, n in ((6, 90), (2, 130), (2, 130)))
    labels = (torch.randint(0, c, x.shape[:3], generator=g) for x, c in ((q, 3), (k, 9)))
    plan = ClusterPlan.from_labels(*labels, torch.rand(2, 6, 3, 9, generator=g) < 0.5)
    close = 2e-2 if dtype == torch.bfloat16 else 5e-6
    expected = execute_clusters(plan, *(x.double() for x in (q, k, v)), backend="reference")
    torch.testing.assert_close(execute_clusters(plan, q, k, v).double(), expected, atol=close, rtol=close)
"""


def test_without_a_compiler():
    without_kernels(CHECK)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["-mno-amx-tile", "-march=x86-64-v3", "-march=x86-64"])
def test_other_processors(march, tmp_path):
    assert "-march=native" in kernels.FLAGS
    built_with(CHECK, march, cache=tmp_path)
