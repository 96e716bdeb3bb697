"""Sparse VideoGen2: k-means, the critical map, the state between steps, and diffusers' own models and pipeline."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.video_models import MODELS, real_words
from torch import nn

from assay.methods.attention import svg2
from assay.methods.attention.svg2 import (
    ClusterState,
    SVG2Config,
    SVG2Sampling,
    _attend,
    attach,
    cluster_mass,
    cluster_sparse_attention,
    critical_clusters,
    dense_attention,
    install,
    kmeans,
    svg2_plan,
    update_clusters,
)
from assay.methods.core.attention.clusters import ClusterPlan, execute_clusters
from assay.methods.core.attention.diffusers_processor import self_attentions, use_plans

SMALL = {"query_clusters": 6, "key_clusters": 10, "iterations": 10}


def grouped(batch=2, heads=4, groups=2, tokens=160, dim=16, seed=0, kinds=8, spread=2.5, dtype=torch.float32):
    """Queries, keys and values of tokens of a few kinds, shuffled: what clustering is for."""
    generator = torch.Generator().manual_seed(seed)

    def make(count):
        middles = torch.randn(batch, count, kinds, dim, generator=generator) * spread
        kind = torch.randint(kinds, (batch, count, tokens), generator=generator)
        near = middles.gather(2, kind[..., None].expand(-1, -1, -1, dim))
        noise = torch.randn(batch, count, tokens, dim, generator=generator)
        return (near + 0.5 * noise).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)

    return make(heads), make(groups), make(groups)


def exact_share(q, k):
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    return (scores * q.shape[3] ** -0.5).softmax(-1)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# -------------------------------------------------------------------------------------------------------------- k-means


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 120),
    clusters=st.integers(1, 40),
    iterations=st.integers(1, 12),
    kinds=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_kmeans_invariants(tokens, clusters, iterations, kinds, seed):
    x = grouped(tokens=tokens, kinds=kinds, seed=seed)[0]
    clusters = min(clusters, tokens)
    found = kmeans(x, clusters, iterations=iterations, generator=torch.Generator().manual_seed(seed))
    fall = found.inertia.diff(dim=0)
    assert (fall <= 1e-4 * found.inertia[:-1] + 1e-2).all()  # never increases, up to rounding
    assert torch.equal(found.sizes.sum(-1), torch.full((2, 4), tokens))
    chosen = F.one_hot(found.labels, clusters).to(x.dtype)
    assert torch.equal(found.sizes, chosen.sum(2).long())
    means = chosen.transpose(2, 3) @ x / found.sizes.clamp(min=1)[..., None]
    full = found.sizes > 0
    torch.testing.assert_close(found.centroids[full], means[full], atol=1e-4, rtol=1e-4)


def test_labels_are_nearest_centroids():
    x = grouped()[0]
    centres = x[:, :, :12] + 0.1
    found = kmeans(x, 12, centres=centres, iterations=1)
    assert torch.equal(found.labels, torch.cdist(x.double(), centres.double()).argmin(-1))
    expected = torch.cdist(x.double(), centres.double()).amin(-1).square().sum(-1)
    torch.testing.assert_close(found.inertia[0].double(), expected, atol=1e-2, rtol=1e-4)
    settled = kmeans(x, 12, iterations=200, tolerance=0.0)
    torch.testing.assert_close(settled.inertia[-1], settled.inertia[-2], atol=1e-2, rtol=1e-5)
    long = kmeans(x, 12, centres=settled.centroids, iterations=1)  # converged: nearest to the final centroids
    assert torch.equal(long.labels, settled.labels)


def test_each_iteration_is_a_step_of_lloyd():
    x = grouped()[0]
    many = kmeans(x, 9, iterations=4, generator=torch.Generator().manual_seed(3))
    step = kmeans(x, 9, iterations=1, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        step = kmeans(x, 9, centres=step.centroids, iterations=1)
    assert torch.equal(many.labels, step.labels)
    torch.testing.assert_close(many.centroids, step.centroids)


def test_empty_clusters_keep_their_centres():
    x = grouped()[0]
    centres = x[:, :, :5].clone()
    centres[:, :, 3] = 1e3
    found = kmeans(x, 5, centres=centres, iterations=7)
    assert (found.sizes[:, :, 3] == 0).all()
    assert (found.centroids[:, :, 3] == 1e3).all()
    twins = kmeans(x, 2, centres=x[:, :, :1].expand(-1, -1, 2, -1), iterations=1)  # equal centres: the first takes all
    assert torch.equal(twins.sizes[:, :, 0], torch.full((2, 4), 160))


def test_kmeans_stops_head_by_head():
    x = grouped(kinds=4)[0]
    x[0, 0] = 1.0  # all tokens alike: nothing moves
    found = kmeans(x, 4, iterations=50)
    assert len(found.inertia) < 50  # all have stopped
    same = kmeans(x, 4, centres=found.centroids, iterations=50)
    assert len(same.inertia) == 1
    loose = kmeans(x, 4, iterations=50, tolerance=1e6)
    assert len(loose.inertia) == 1


def test_kmeans_of_bfloat16_accumulates_in_float32():
    x = grouped(dtype=torch.bfloat16)[0] + 30  # far from the origin: x^2 - 2xc + c^2 cancels
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    half, wide = (kmeans(each, 8, generator=g) for each, g in zip((x, x.float()), generators, strict=True))
    assert half.centroids.dtype == torch.float32
    assert torch.equal(half.labels, wide.labels)
    exact = kmeans(x.double(), 8, generator=torch.Generator().manual_seed(1))
    assert (exact.labels == half.labels).float().mean() > 0.99


def test_every_token_its_own_cluster():
    x = grouped(tokens=33)[0]
    found = kmeans(x, 33)
    assert (found.sizes == 1).all()
    torch.testing.assert_close(found.centroids.gather(2, found.labels[..., None].expand_as(x)), x)
    assert found.inertia[-1].abs().max() < 1e-2


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 150),
    clusters=st.integers(1, 40),
    dim=st.integers(1, 40),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_kernel_does_an_iteration_as_torch_does(rows, tokens, clusters, dim, threads, seed):
    """On whole numbers, where nothing rounds: ties too (many: there are few values), and any cut into threads' parts."""
    if not svg2._load():
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, tokens, dim), generator=generator).float()
    old = torch.randint(-2, 3, (rows, clusters, dim), generator=generator).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        labels, distance, means, counts = svg2._lloyd(x, old)
    finally:
        torch.set_num_threads(before)
    squares = (x[:, :, None] - old[:, None]).square().sum(-1)
    least = squares.amin(-1, keepdim=True)
    assert torch.equal(labels, (squares == least).int().argmax(-1))  # the first of equals
    assert torch.equal(distance + x.square().sum((1, 2)), least.sum((1, 2)))
    reference = svg2._means(x, labels, old)
    assert torch.equal(means, reference[0])
    assert torch.equal(counts, reference[1])
    assert torch.equal(svg2._nearest(x, old)[0], labels)


def test_without_the_kernel_nothing_changes(monkeypatch):
    x = grouped()[0]
    by_kernel = kmeans(x, 9, iterations=6, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(svg2, "_load", lambda: False)
    by_torch = kmeans(x, 9, iterations=6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(by_kernel.labels, by_torch.labels)
    torch.testing.assert_close(by_kernel.centroids, by_torch.centroids, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_kernel.inertia, by_torch.inertia, atol=1e-2, rtol=1e-4)


def test_chunks_do_not_matter(monkeypatch):
    monkeypatch.setattr(svg2, "_load", lambda: False)  # the torch path goes in chunks
    x = grouped()[0]
    whole = kmeans(x, 10, generator=torch.Generator().manual_seed(0))
    for size in (7, 64, 160 * 10, 3 * 160 * 10):  # tokens at a time, then heads at a time
        monkeypatch.setattr(svg2, "DISTANCES", size)
        part = kmeans(x, 10, generator=torch.Generator().manual_seed(0))
        assert torch.equal(part.labels, whole.labels)
        torch.testing.assert_close(part.inertia, whole.inertia, atol=0.05, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ selection


def test_mass_is_the_size_weighted_softmax():
    q, k, _ = grouped()
    sizes = torch.randint(0, 9, (2, 2, 7))
    mass = cluster_mass(q[:, :, :5], k[:, :, :7], sizes)
    assert mass.shape == (2, 4, 5, 7)
    scores = q[:, :, :5] @ k[:, :, :7].repeat_interleave(2, 1).transpose(-1, -2) / 4
    weighted = sizes.repeat_interleave(2, 1)[:, :, None] * scores.exp()
    torch.testing.assert_close(mass, weighted / weighted.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert not mass.transpose(2, 3)[sizes.repeat_interleave(2, 1) == 0].any()


def test_splitting_a_cluster_leaves_the_masses_alone():
    q, k, _ = grouped()
    sizes = torch.tensor([8, 4, 6, 10]).expand(2, 2, 4)
    whole = cluster_mass(q[:, :, :5], k[:, :, :4], sizes)
    halves = torch.cat([sizes[..., :3], torch.full((2, 2, 2), 5)], -1)
    split = cluster_mass(q[:, :, :5], torch.cat([k[:, :, :4], k[:, :, 3:4]], 2), halves)
    torch.testing.assert_close(split[..., :3], whole[..., :3])
    torch.testing.assert_close(split[..., 3:].sum(-1), whole[..., 3])
    torch.testing.assert_close(split[..., 3], split[..., 4])


def test_the_crossing_cluster_is_kept():
    mass = torch.tensor([0.1, 0.4, 0.3, 0.2])
    expected = {0.0: [1], 0.39: [1], 0.41: [1, 2], 0.69: [1, 2], 0.71: [1, 2, 3], 0.91: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}
    for top_p, kept in expected.items():
        assert critical_clusters(mass, top_p=top_p, min_ratio=0.0).nonzero()[:, 0].tolist() == kept
    assert critical_clusters(mass, top_p=0.0, min_ratio=0.74).sum() == 2  # floor(0.74 * 4)
    assert critical_clusters(mass, top_p=0.0, min_ratio=0.75).nonzero()[:, 0].tolist() == [1, 2, 3]
    assert critical_clusters(torch.tensor([1.0, 0.0, 0.0]), top_p=1.0, min_ratio=0.0).all()


def test_kept_clusters_grow_with_top_p_and_min_ratio():
    mass = (torch.randn(2, 4, 9, 30, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)
    levels = (0.0, 0.3, 0.6, 0.9, 0.99, 1.0)
    for name in ("top_p", "min_ratio"):
        other = {"min_ratio": 0.0} if name == "top_p" else {"top_p": 0.2}
        masks = [critical_clusters(mass, **{name: level}, **other) for level in levels]
        for small, large in zip(masks[:-1], masks[1:], strict=True):
            assert (large | ~small).all()
        assert masks[-1].all()
        assert (masks[0].sum(-1) >= 1).all()


def test_the_numbering_of_clusters_does_not_matter():
    q, k, _ = grouped()
    sizes = torch.randint(1, 9, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    mask = critical_clusters(cluster_mass(q[:, :, :5], k[:, :, :12], sizes), top_p=0.8)
    order = torch.randperm(12)
    renamed = critical_clusters(cluster_mass(q[:, :, :5], k[:, :, :12][:, :, order], sizes[..., order]), top_p=0.8)
    assert torch.equal(renamed, mask[..., order])


def test_one_token_clusters_keep_at_least_top_p():
    q, k, _ = grouped(tokens=48)
    options = {"query_clusters": 48, "key_clusters": 48, "min_ratio": 0.0}
    for top_p in (0.5, 0.9):
        plan = svg2_plan(q, k, ClusterState(), top_p=top_p, **options)
        kept = (exact_share(q, k) * plan.visible(0, 48)).sum(-1)
        assert kept.min() >= top_p - 1e-5
        fewer = (exact_share(q, k).sort(-1, descending=True).values.cumsum(-1) < top_p - 1e-5).sum(-1) + 1
        assert (plan.visible(0, 48).sum(-1) <= fewer + 1).all()  # and no more than needed, up to ties
        assert plan.recall(q, k).min() >= top_p - 1e-5


# ------------------------------------------------------------------------------------------------------------- operator


@pytest.mark.parametrize("settings_", [{"top_p": 1.0}, {"min_ratio": 1.0, "top_p": 0.1}])
@pytest.mark.parametrize("backend", ["auto", "gather", "reference"])
def test_degenerate_settings_are_dense_attention(backend, settings_):
    q, k, v = grouped(heads=9, groups=3)
    found = cluster_sparse_attention(q, k, v, ClusterState(), backend=backend, **settings_, **SMALL)
    torch.testing.assert_close(found, sdpa(q, k, v), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attends_exactly_over_what_it_keeps(dtype):
    q, k, v = grouped(dtype=dtype)
    plan = svg2_plan(q, k, ClusterState(), top_p=0.6, min_ratio=0.0, **SMALL)
    assert 0 < plan.density() < 1
    assert torch.equal(plan.query_sizes.sum(-1), torch.full((2, 4), 160))
    assert torch.equal(plan.key_sizes.sum(-1), torch.full((2, 2), 160))
    found = cluster_sparse_attention(q, k, v, ClusterState(), top_p=0.6, min_ratio=0.0, **SMALL)
    share = exact_share(q, k) * plan.visible(0, 160)
    expected = share / share.sum(-1, keepdim=True) @ v.double().repeat_interleave(2, 1)
    close = 2e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)


def test_the_error_is_bounded_by_the_dropped_mass():
    q, k, v = (x.double() for x in grouped(spread=1.0))
    for top_p in (0.3, 0.6, 0.9):
        plan = svg2_plan(q, k, ClusterState(), top_p=top_p, min_ratio=0.0, **SMALL)
        dropped = 1 - (exact_share(q, k) * plan.visible(0, 160)).sum(-1)
        off = (execute_clusters(plan, q, k, v) - sdpa(q, k, v)).abs().amax(-1)
        assert (off <= 2 * dropped * v.abs().max() + 1e-9).all()
        assert off.max() > 1e-4
        torch.testing.assert_close(plan.recall(q, k).double(), 1 - dropped.mean(-1), atol=1e-5, rtol=1e-5)


def test_density_grows_with_top_p():
    q, k, _ = grouped()
    found = [svg2_plan(q, k, ClusterState(), top_p=p, min_ratio=0.0, **SMALL).density() for p in (0.2, 0.6, 0.9, 1.0)]
    assert sorted(found) == found
    assert found[0] > 0
    assert found[-1] == 1.0


def test_duplicate_tokens_and_empty_clusters_do_no_harm():
    q, k, v = grouped(kinds=2)
    q, k = q.round(), k.round() * 0 + k[:, :, :1].round()  # all keys of a head alike: most key clusters stay empty
    plan = svg2_plan(q, k, ClusterState(), top_p=0.5, min_ratio=0.5, **SMALL)
    assert (plan.key_sizes == 0).any()
    found = execute_clusters(plan, q, k, v)
    assert found.isfinite().all()
    torch.testing.assert_close(found, sdpa(q, k, v), atol=2e-5, rtol=2e-5)  # the one full cluster is kept


def test_the_state_warms_the_next_step():
    q, k, v = grouped()
    state = ClusterState(seed=4)
    cluster_sparse_attention(q, k, v, state, **SMALL)
    first = state.query_centroids.clone()
    assert first.shape == (2, 4, 6, 16)
    assert state.key_centroids.shape == (2, 2, 10, 16)
    assert 1 < len(state.query_inertia) <= 10
    before = state.query_inertia[-1]
    cluster_sparse_attention(q + 0.01, k, v, state, **SMALL)
    assert len(state.query_inertia) <= 2
    assert (state.query_inertia[0] < 1.1 * before + 1).all()  # warm: starts where the last one ended
    state.reset()
    assert state.query_centroids is None
    assert state.key_inertia is None
    cluster_sparse_attention(q, k, v, state, **SMALL)
    assert torch.equal(state.query_centroids, first)  # the same seed draws the same tokens
    with pytest.raises(ValueError, match=r"reset\(\) it before another prompt or resolution"):
        svg2_plan(q[:1], k[:1], state, **SMALL)
    with pytest.raises(ValueError, match="reset"):
        svg2_plan(q, k, state, query_clusters=7, key_clusters=10)


def test_rows_of_a_batch_are_separate():
    """Classifier-free guidance as a batch of two gives what two calls give."""
    q, k, v = grouped()
    both, alone = ClusterState(), [ClusterState(), ClusterState()]
    for shift in (0.0, 0.1):  # a cold and a warm step
        found = cluster_sparse_attention(q + shift, k, v, both, top_p=0.7, **SMALL)
        for row, state in enumerate(alone):
            one = [x[row : row + 1] for x in (q + shift, k, v)]
            single = cluster_sparse_attention(*one, state, top_p=0.7, **SMALL)
            torch.testing.assert_close(found[row : row + 1], single, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(both.key_centroids[row], state.key_centroids[0], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- text


def text_mask():
    return torch.tensor([[True] * 9 + [False] * 3, [True] * 2 + [False] * 10])  # other lengths in other rows


def masked_dense(q, k, v, text):
    """Everybody sees all but padding, padding sees only itself; in float64."""
    padding = F.pad(~text, (q.shape[2] - text.shape[1], 0))
    seen = (padding[:, None, :, None] == padding[:, None, None, :]).expand(-1, q.shape[1], -1, -1)
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, seen)


def test_text_is_seen_by_all_and_padding_only_by_itself():
    q, k, v = grouped()
    text = text_mask()
    plan = svg2_plan(q, k, ClusterState(), top_p=0.5, min_ratio=0.0, text=text, **SMALL)
    seen = plan.visible(0, 160)
    padding = F.pad(~text, (148, 0))
    for b in range(2):
        words = F.pad(text[b], (148, 0))
        assert seen[b][:, words][:, :, ~padding[b]].all()  # a word sees everything that is no padding
        assert seen[b][:, ~padding[b]][:, :, words].all()  # and is seen by it
        assert seen[b][:, padding[b]][:, :, padding[b]].all()
        assert not seen[b][:, padding[b]][:, :, ~padding[b]].any()
        assert not seen[b][:, ~padding[b]][:, :, padding[b]].any()
    assert not seen[:, :, :148, :148].all()  # video stays sparse
    allowed = torch.ones_like(plan.mask)
    allowed[..., -1, :-1] = allowed[..., :-1, -1] = False
    assert 0 < plan.density(allowed) < 1
    assert (plan.recall(q, k, allowed=allowed) <= 1 + 1e-6).all()
    full = cluster_sparse_attention(q, k, v, ClusterState(), top_p=1.0, text=text, **SMALL)
    assert full.isfinite().all()


def test_dense_text_attention_and_the_degenerate_setting():
    q, k, v = grouped()
    text = text_mask()
    expected = masked_dense(q, k, v, text)
    torch.testing.assert_close(dense_attention(q, k, v, text=text).double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(dense_attention(q, k, v), sdpa(q, k, v), atol=2e-5, rtol=2e-5)
    found = cluster_sparse_attention(q, k, v, ClusterState(), min_ratio=1.0, text=text, **SMALL)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_padding_has_no_influence():
    q, k, v = grouped()
    text = text_mask()
    padding = F.pad(~text, (148, 0))[:, None].expand(-1, 2, -1)
    found = cluster_sparse_attention(q, k, v, ClusterState(), top_p=0.5, text=text, **SMALL)
    k[padding], v[padding] = 50.0, -1e6
    again = cluster_sparse_attention(q, k, v, ClusterState(), top_p=0.5, text=text, **SMALL)
    real = ~padding[:, :1].expand(-1, 4, -1)
    assert torch.equal(again[real], found[real])


# ------------------------------------------------------------------------------------------------------ whole generation


def test_the_schedule():
    config = SVG2Config(6, 10, top_p=0.5, min_ratio=0.0, dense_steps=0.2, dense_layers=0.03, iterations=5)
    sampling = SVG2Sampling(config, layers=40, steps=10)
    q, k, v = grouped()
    for step in range(10):
        assert sampling.step == step
        dense = [layer for layer in range(40) if sampling.is_dense(layer)]
        assert dense == (list(range(40)) if step < 2 else [0, 1])  # 20 % of the steps, ceil(3 % of 40) layers
        out = sampling.attention(7, q, k, v)
        assert torch.allclose(out, sdpa(q, k, v), atol=1e-5) == (step < 2)
        torch.testing.assert_close(sampling.attention(0, q, k, v), sdpa(q, k, v), atol=1e-5, rtol=1e-5)
        if step == 5:
            assert len(sampling._states[7, 0].query_inertia) <= 2  # warm by now
        sampling.end_step()
    assert sampling.step == 0
    assert not sampling._states  # reset after the last step


def test_kmeans_may_run_in_dense_steps():
    config = SVG2Config(6, 10, dense_steps=0.5, dense_layers=0.0, iterations=9, cluster_in_dense_steps=True)
    sampling = SVG2Sampling(config, layers=1, steps=2)
    q, k, v = grouped()
    torch.testing.assert_close(sampling.attention(0, q, k, v), sdpa(q, k, v), atol=1e-5, rtol=1e-5)
    assert len(sampling._states[0, 0].query_inertia) > 2
    sampling.end_step()
    sampling.attention(0, q, k, v)
    assert len(sampling._states[0, 0].query_inertia) <= 2


def test_branches_of_guidance_have_their_own_state():
    config = SVG2Config(6, 10, top_p=0.6, dense_steps=0.0, dense_layers=0.0, iterations=5)
    sampling = SVG2Sampling(config, layers=2, steps=3, branches=2)
    first, second = grouped(seed=1), grouped(seed=2)
    alone = [SVG2Sampling(config, layers=2, steps=3) for _ in range(2)]
    for _ in range(2):
        for tensors, single in zip((first, second), alone, strict=True):
            for layer in (0, 1):
                assert torch.equal(sampling.attention(layer, *tensors), single.attention(layer, *tensors))
        with pytest.raises(ValueError, match="more than 2 times in step"):
            sampling.attention(0, *first)
        for each in (sampling, *alone):
            each.end_step()


# ------------------------------------------------------------------------------------------------------------ diffusers

FEW = {"min_ratio": 0.0, "dense_steps": 0.0, "dense_layers": 0.0, "iterations": 10}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config",
    [SVG2Config(5, 9, dense_steps=1.0), SVG2Config(5, 9, 1.0, **FEW), SVG2Config(5, 9, **FEW | {"min_ratio": 1.0})],
)
def test_diffusers_models_that_keep_everything_are_unchanged(name, config):
    """Wan, HunyuanVideo (text after the video, padding of other lengths in other rows) and CogVideoX (text before it)."""
    model, given = MODELS[name]()
    expected = model(**given).sample
    sampling = install(model, config, steps=2, text_first=name == "cogvideox")
    assert sampling.layers == (3 if name == "hunyuan" else 2)
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_models_come_closer_with_top_p(name):
    model, given = MODELS[name]()
    expected = model(**given).sample
    off = []
    for top_p in (0.2, 0.9, 0.99):
        install(model, SVG2Config(8, 12, top_p, **FEW), steps=1, text_first=name == "cogvideox")
        off.append(float((model(**given).sample - expected).norm() / expected.norm()))
    assert off[0] > off[1] > off[2] > 0
    assert off[2] < 0.05


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
def test_text_of_diffusers_models_stays_out_of_the_clusters(name):
    """The plans of every layer see text as `svg2_plan` says, in the order of the video and then the text."""
    model, given = MODELS[name]()
    plans = []

    class Noted(SVG2Sampling):
        def plan(self, layer, q, k, *, text=None, scale=None):
            plan = super().plan(layer, q, k, text=text, scale=scale)
            plans.append((plan, text))
            return plan

    first = name == "cogvideox"
    config = SVG2Config(5, 9, 0.3, **FEW)
    sampling = Noted(config, len(self_attentions(model)), 1)
    attach(model, sampling, text_first=first)
    model(**given)
    assert len(plans) == sampling.layers
    words = real_words().bool() if name == "hunyuan" else torch.ones(2, 7, dtype=torch.bool)
    for plan, text in plans:
        assert torch.equal(text, words)
        assert plan.mask.shape[2:] == (7, 11)  # two clusters more, for text and its padding
        assert torch.equal(
            plan.key_sizes[:, :, -2:], torch.stack([words.sum(1), (~words).sum(1)], 1)[:, None].expand(-1, 2, -1)
        )
        seen = plan.visible(0, 48)
        assert seen[..., 48:].any(2).float().sum() == 2 * words.sum()  # in both heads; all of it, and no padding
        assert not seen[..., :48].all()


def test_padding_of_prompts_has_no_influence_on_the_video():
    model, given = MODELS["hunyuan"]()
    sampling = install(model, SVG2Config(5, 9, 0.5, **FEW), steps=1)
    found = model(**given).sample
    sampling.end_step()
    padding = real_words() == 0
    given["encoder_hidden_states"] = given["encoder_hidden_states"].masked_fill(padding[..., None], 30.0)
    torch.testing.assert_close(model(**given).sample, found, atol=1e-5, rtol=1e-5)


def test_masks_over_the_video_and_causal_attention_are_refused():
    model, given = MODELS["cogvideox"]()
    sampling = install(model, SVG2Config(5, 9), steps=1)
    q = torch.randn(2, 2, 20, 16)
    options = {"mask": None, "causal": False, "scale": None, "text": 4}
    hidden = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    hidden[1, ..., 0] = False
    for bad, message in (
        ({"mask": hidden}, r"leave out text tokens only, not video tokens \(see text_first\)"),
        (
            {"mask": hidden.float()},
            r"bool \(batch, 1, 1, tokens\), not causal; got a mask torch.float32 \(2, 1, 1, 20\)",
        ),
        ({"mask": hidden.expand(2, 1, 20, 20)}, r"got a mask torch.bool \(2, 1, 20, 20\)"),
        ({"causal": True}, "got causal attention"),
    ):
        with pytest.raises(ValueError, match=message):
            _attend(sampling, 0, False, None, q, q, q, **options | bad)
    with pytest.raises(ValueError, match="model must have attn_processors like"):
        install(nn.Linear(2, 2), SVG2Config(), steps=4)


def test_a_pipeline_of_diffusers_generates():
    """WanPipeline with classifier-free guidance, which calls the model twice a step, and the step callback."""
    model, _ = MODELS["wan"]()
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = WanPipeline(transformer=model, **parts)
    pipeline.set_progress_bar_config(disable=True)
    words = torch.randn(2, 1, 7, 8, generator=torch.Generator().manual_seed(1))

    def generate(sampling=None, steps=4):
        latents = pipeline(
            prompt_embeds=words[0],
            negative_prompt_embeds=words[1],
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=4.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=None if sampling is None else sampling.on_step_end,
        ).frames
        assert sampling is None or sampling.step == 0
        return latents

    dense = generate()
    everything = install(model, SVG2Config(5, 9, 1.0, **FEW), steps=4, branches=2)
    torch.testing.assert_close(generate(everything), dense, atol=1e-4, rtol=1e-4)
    sparse = install(model, SVG2Config(5, 9, 0.3, **FEW | {"dense_steps": 0.25}), steps=4, branches=2)
    first, second = generate(sparse), generate(sparse)
    assert torch.equal(first, second)  # nothing is left of the first generation
    assert not torch.allclose(first, dense, atol=1e-3)
    assert not sparse._states
    with pytest.raises(ValueError, match=r"expected was 0 of 4: give steps|more than 2 times"):
        generate(sparse, steps=6)
    sparse.reset()
    assert torch.equal(generate(sparse), first)
    one = install(model, SVG2Config(5, 9, **FEW), steps=4)
    with pytest.raises(ValueError, match="layer 0 was called more than 1 times in step 0: call end_step"):
        generate(one)


# ----------------------------------------------------------------------------------------------------- the experiment


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_small_denoiser_samples_the_same_where_everything_is_kept(kind):
    """The whole sampling loop of the experiment, with an untrained model: dense and degenerate sampling agree."""
    from assay.experiments.attention.svg2 import LAYERS, Denoiser, dense_plan, sample
    from assay.experiments.attention.video import psnr

    torch.manual_seed(0)
    model = Denoiser(kind).eval().requires_grad_(False)
    noise = torch.randn(2, 3, 3, 16, 16)
    reference = sample(model, noise, 6)
    everything = SVG2Config(6, 10, top_p=1.0, dense_steps=0.2, dense_layers=0.0)
    few = SVG2Config(6, 10, top_p=0.1, min_ratio=0.0, dense_steps=0.2, dense_layers=0.0)

    def sparse(config):
        sampling = SVG2Sampling(config, LAYERS, 6)
        attach(model.model, sampling)
        return sample(model, noise, 6, sampling=sampling)

    assert psnr(sparse(everything), reference) > 80
    lossy = [sparse(few) for _ in range(2)]
    assert torch.equal(*lossy)
    assert psnr(lossy[0], reference) < 80
    use_plans(model.model, dense_plan)
    assert psnr(sample(model, noise, 6), reference) > 80


# ----------------------------------------------------------------------------------------------------------- real tensors


@pytest.mark.model
def test_clusters_recall_more_than_positions_on_real_tensors(smollm2):
    from assay.experiments.attention.svg2 import recall_curves
    from assay.workloads.attention import captured_qkv
    from assay.workloads.text import long_prompt

    ids = long_prompt(smollm2.tokenizer, 512)
    curves = [
        recall_curves(q, k, (16, 32), (0.1, 0.3)) for q, k, _ in captured_qkv(smollm2.model, ids, layers=(3, 12, 25))
    ]
    for i in range(2):
        mean = {name: sum(curve[name][i] for curve in curves) / len(curves) for name in curves[0]}
        assert mean["clusters"] >= mean["positions"]
        assert mean["best pairs"] >= mean["clusters, best blocks"] >= mean["clusters"] - 0.02


def test_recall_curves_agree_with_the_plan():
    from assay.experiments.attention.svg2 import recall_curves

    q, k, _ = (x[:1] for x in grouped())
    generator = torch.Generator().manual_seed(0)
    wide = k.repeat_interleave(2, 1)
    queries, keys = kmeans(q, 6, generator=generator), kmeans(wide, 10, generator=generator)
    mask = critical_clusters(cluster_mass(queries.centroids, keys.centroids, keys.sizes), top_p=0.7, min_ratio=0.0)
    plan = ClusterPlan.from_labels(queries.labels, keys.labels, mask)
    curve = recall_curves(q, k, (6, 10), (plan.density(),))
    assert curve["clusters"][0] == pytest.approx(plan.recall(q, wide).mean().item(), abs=0.02)
    assert curve["clusters"][0] <= curve["clusters, best blocks"][0] + 0.05
    assert curve["best pairs"][0] <= 1 + 1e-5


# --------------------------------------------------------------------------------------------------------------- errors


def test_bad_input_is_refused():
    q, k, v = grouped()
    state = ClusterState()
    bad = [
        (lambda: kmeans(q[0], 3), "x must have shape"),
        (lambda: kmeans(q, 0), "clusters must be a whole number at least 1"),
        (lambda: kmeans(q, 161), "at most 160, got 161"),
        (lambda: kmeans(q, 3, iterations=0), "iterations must be a whole number at least 1"),
        (lambda: kmeans(q, 3, tolerance=-1.0), "tolerance must be a finite number at least 0"),
        (lambda: kmeans(q, 3, centres=q[:, :, :4]), r"centres must have shape \(2, 4, 3, 16\)"),
        (
            lambda: cluster_sparse_attention(q, k, v, state, top_p=1.1, **SMALL),
            "top_p must be a finite number at least 0 and at most 1, got 1.1",
        ),
        (lambda: cluster_sparse_attention(q, k, v, state, min_ratio=-0.1, **SMALL), "min_ratio must be"),
        (lambda: cluster_sparse_attention(q, k[:, :, 1:], v, state, **SMALL), "k must have shape"),
        (lambda: cluster_sparse_attention(q, k, v, state), "clusters must be a whole number"),
        (lambda: svg2_plan(q, k, state, text=torch.ones(2, 160, dtype=torch.bool), **SMALL), "text must be bool"),
        (lambda: svg2_plan(q, k, state, text=torch.ones(1, 9, dtype=torch.bool), **SMALL), "text must be bool"),
        (lambda: svg2_plan(q, k, state, text=torch.ones(2, 9), **SMALL), "text must hold bools"),
        (lambda: SVG2Config(top_p=float("nan")), "top_p must be"),
        (lambda: SVG2Config(top_p="0.9"), "top_p must be"),
        (lambda: SVG2Config(query_clusters=3.7), "query_clusters must be"),
        (lambda: SVG2Config(tolerance=float("nan")), "tolerance must be"),
        (lambda: SVG2Config(top_p=2.0), "top_p must be"),
        (lambda: SVG2Config(dense_steps=-0.1), "dense_steps must be"),
        (lambda: SVG2Config(key_clusters=0), "key_clusters must be a whole number at least 1"),
        (lambda: SVG2Sampling(SVG2Config(), 0, 5), "layers must be a whole number at least 1"),
        (
            lambda: SVG2Sampling(SVG2Config(), 2, 5).attention(2, q, k, v),
            "layer must be a whole number at least 0 and at most 1, got 2",
        ),
    ]
    for call, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    with pytest.raises(TypeError, match="clusters_of_queries"):
        svg2_plan(q, k, state, clusters_of_queries=3)
    assert state.query_centroids is None


def test_update_clusters_remembers():
    q, k, _ = grouped()
    state = ClusterState()
    queries, keys = update_clusters(q, k, state, **SMALL)
    assert state.query_centroids is queries.centroids
    assert state.key_inertia is keys.inertia


@pytest.mark.parametrize("kernel", [True, False])
def test_an_offset_of_all_tokens_changes_no_cluster(kernel, monkeypatch):
    """A thousand times as far away as the tokens are from each other."""
    if not kernel:
        monkeypatch.setattr(svg2, "_load", lambda: False)
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 2, 300, 8, generator=random) * 64).round() / 64  # numbers that stay the same far away
    start = {"centres": x[:, :, :10], "iterations": 5}
    plain = svg2.kmeans(x, 10, **start)
    moved = svg2.kmeans(x + 1024, 10, **(start | {"centres": x[:, :, :10] + 1024}))
    assert (moved.labels == plain.labels).float().mean() > 0.995
    torch.testing.assert_close(moved.centroids - 1024, plain.centroids, atol=2e-2, rtol=0.0)
    torch.testing.assert_close(moved.inertia, plain.inertia, atol=0.0, rtol=1e-2)
    with pytest.raises(ValueError, match="x must be finite"):
        svg2.kmeans(x.index_fill(2, torch.tensor([3]), torch.nan), 10)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [2.0**100, 2.0**64, 2.0**-64, 2.0**-100])
def test_kmeans_does_not_mind_how_large_numbers_are(size, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(svg2, "_load", lambda: False)
    x = torch.randn(2, 2, 60, 5, generator=torch.Generator().manual_seed(0))

    def found(x, centres=None):
        return kmeans(x, 4, centres=centres, tolerance=0.0, generator=torch.Generator().manual_seed(1))

    plain = found(x)
    other = found(x * size)
    assert torch.equal(other.labels, plain.labels)
    torch.testing.assert_close(other.centroids / size, plain.centroids)
    assert not other.inertia.isnan().any()
    warm = found(x * size, plain.centroids * size)
    assert torch.equal(warm.labels, found(x, plain.centroids).labels)
    mixed = torch.cat([x[:1], x[1:] * size])  # heads of very different sizes
    assert torch.equal(found(mixed).labels, plain.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_of_no_rows_is_empty(dtype):
    for shape in ((0, 2, 9, 3), (2, 0, 9, 3)):
        found = kmeans(torch.zeros(shape, dtype=dtype), 4)
        assert found.labels.shape == shape[:3]
        assert found.centroids.shape == (*shape[:2], 4, 3)


def test_shares_of_steps_and_layers_are_not_rounded_up():
    """0.07 * 100 is 7.000000000000001."""
    sampling = SVG2Sampling(SVG2Config(dense_steps=0.07, dense_layers=0.07), 100, 100)
    sampling.step = 7
    assert [sampling.is_dense(layer) for layer in (6, 7)] == [True, False]
    sampling.step = 6
    assert sampling.is_dense(99)


def test_plans_refuse_what_does_not_fit():
    x, sizes = torch.randn(1, 2, 12, 4), torch.ones(1, 2, 12, dtype=torch.int64)
    for q, k in ((x, x[..., :3]), (x, x[:, :0]), (torch.randn(1, 3, 12, 4), x), (torch.randn(2, 2, 12, 4), x)):
        with pytest.raises(ValueError, match="must"):
            svg2_plan(q, k, ClusterState(), query_clusters=3, key_clusters=3)
    with pytest.raises(TypeError, match="q must be a tensor"):
        svg2_plan(None, x, ClusterState())
    with pytest.raises(TypeError, match="generator must be"):
        kmeans(x, 2, generator=3)
    for wrong in (0 * sizes, -sizes):
        with pytest.raises(ValueError, match="key_sizes"):
            cluster_mass(x, x, wrong)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        cluster_mass(x, x, sizes, scale=float("nan"))
    with pytest.raises(ValueError, match="mass must be numbers"):
        critical_clusters(torch.full((2, 3), torch.nan))
