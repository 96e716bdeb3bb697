"""Attention in pieces, against attention over everything at once in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from assay.methods.core.attention.plan import AttentionPlan
from assay.methods.core.generation import merging
from assay.methods.core.generation.merging import Partial, Piece, cascade_attention, merged, partial_attention


def inputs(rows=2, heads=6, kv_heads=2, queries=5, keys=11, dim=8, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    sizes = [(heads, queries), (kv_heads, keys), (kv_heads, keys)]
    return [torch.randn(rows, h, n, dim, generator=random, dtype=torch.float64).to(dtype) for h, n in sizes]


def oracle(q, k, v, visible=None, scale=None):
    """(output, lse) by the definition, with every head's keys written out."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.expand(len(q), -1, -1, -1).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand_as(scores)
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0).nan_to_num(0.0)
    return weights @ v, scores.logsumexp(-1)


def in_pieces(q, k, v, cuts, visible=None, scale=None):
    edges = [0, *cuts, k.shape[2]]
    for start, stop in zip(edges, edges[1:], strict=False):
        part = None if visible is None else visible[..., start:stop] if visible.shape[-1] > 1 else visible
        yield partial_attention(q, k[:, :, start:stop], v[:, :, start:stop], visible=part, scale=scale)


def close(found, wanted, tolerance=1e-12):
    output, lse = wanted
    assert found.output.shape == output.shape
    assert found.lse.shape == lse.shape
    assert torch.equal(found.lse == -math.inf, lse == -math.inf)
    torch.testing.assert_close(found.output.double(), output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.lse.double(), lse, atol=tolerance, rtol=tolerance)
    return True


MASKS = {
    "none": lambda random: None,
    "each": lambda random: (
        (torch.rand(2, 6, 5, 11, generator=random) < 0.4) & (torch.arange(5) != 2)[:, None]
    ),  # one sees nothing
    "rows": lambda random: torch.rand(2, 1, 1, 11, generator=random) < 0.4,
    "queries": lambda random: torch.rand(1, 1, 5, 11, generator=random) < 0.3,
    "heads": lambda random: torch.rand(1, 6, 1, 11, generator=random) < 0.5,
    "nothing": lambda random: torch.zeros(1, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("cuts", [(), (4,), (0, 3, 3, 10, 11), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
def test_any_pieces_merge_to_the_whole_in_any_order(kind, cuts):
    q, k, v = inputs()
    visible = MASKS[kind](torch.Generator().manual_seed(3))
    wanted = oracle(q, k, v, visible)
    parts = list(in_pieces(q, k, v, cuts, visible))
    assert len(parts) == len(cuts) + 1
    assert close(merged(parts), wanted)
    assert close(merged(parts[::-1]), wanted)
    assert close(merged([merged(parts[:2]), *(merged([part]) for part in parts[2:])]), wanted)
    assert bool((wanted[1] == -math.inf).any()) == (kind in ("each", "nothing"))


def test_a_query_that_sees_nothing_gets_zero_and_is_lost_in_a_merge():
    q, k, v = inputs(rows=1, heads=1, kv_heads=1, queries=2, keys=3)
    visible = torch.tensor([[[[False] * 3, [True] * 3]]])
    part = partial_attention(q, k, v, visible=visible)
    assert part.lse[0, 0, 0] == -math.inf
    assert not part.output[0, 0, 0].any()
    empty = partial_attention(q, k[:, :, :0], v[:, :, :0])
    assert (empty.lse == -math.inf).all()
    assert not empty.output.any()
    assert torch.equal(merged([empty, part]).output, part.output)
    assert torch.equal(merged([empty, empty]).lse, empty.lse)
    assert not merged([empty, empty]).output.any()


@pytest.mark.parametrize("size", [1e-8, 1e3, 1e6])
def test_large_and_small_scores(size):
    q, k, v = inputs()
    wanted = oracle(q * size, k, v)
    found = merged(list(in_pieces(q * size, k, v, (4, 5))))
    assert found.output.isfinite().all()
    torch.testing.assert_close(found.output, wanted[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.lse, wanted[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_low_precision_is_computed_in_float32(dtype, tolerance):
    q, k, v = inputs(dtype=dtype)
    found = merged(list(in_pieces(q, k, v, (3, 7), scale=0.3)))
    assert found.output.dtype == found.lse.dtype == torch.float32
    assert close(found, oracle(q, k, v, scale=0.3), tolerance)  # of the rounded inputs


def test_causal_and_left_padded_masks_in_columns():
    starts, queries, keys = torch.tensor([0, 3, 10, 7, 0, 1, 5, 11]), 6, 12
    q, k, v = inputs(rows=8, queries=queries, keys=keys)
    visible = AttentionPlan(queries, keys, key_start=starts).visible(0, queries)
    found = merged(list(in_pieces(q, k, v, (2, 9), visible)))
    assert close(found, oracle(q, k, v, visible))
    some = visible.any(-1)[..., None]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some, enable_gqa=True)
    torch.testing.assert_close(found.output, wanted * some)
    assert (~some).any()


@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_queries_in_chunks_are_the_same(chunk, monkeypatch):
    q, k, v = inputs(queries=9)
    some = torch.rand(2, 6, 9, 11) < 0.5
    for visible in (some, some[:, :, :1], None):
        wanted = oracle(q, k, v, visible)
        monkeypatch.setattr(merging, "CHUNK", chunk)
        assert close(partial_attention(q, k, v, visible=visible), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 4])
def test_a_shared_prefix_is_attended_to_as_if_every_row_had_its_own(dtype, queries):
    q, k, v = inputs(rows=8, queries=queries, keys=7, dtype=dtype)
    _, shared_k, shared_v = inputs(rows=1, keys=13, dtype=dtype, seed=1)
    own = AttentionPlan(queries, 7).visible(0, queries)
    some = (
        torch.rand(8, 6, queries, 13, generator=torch.Generator().manual_seed(2)) < 0.7
    )  # what each row may see of the prefix
    for seen in (None, some, some[:, :1], some[:1], some[:, :, :1]):
        found = cascade_attention(q, [Piece(shared_k, shared_v, seen), Piece(k, v, own)])
        whole = torch.ones_like(some) if seen is None else seen.expand_as(some)
        keys, values = (torch.cat([a.expand(8, -1, -1, -1), b], 2) for a, b in ((shared_k, k), (shared_v, v)))
        wanted, _ = oracle(q, keys, values, torch.cat([whole, own.expand(8, 6, -1, -1)], -1))
        assert found.dtype == dtype
        near = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(found.double(), wanted, atol=near, rtol=near)


def test_the_keys_of_a_shared_prefix_are_read_once():
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.bmm.default:
                read.append(args[1].shape[0])
            return function(*args, **(kwargs or {}))

    read: list[int] = []
    q, k, v = inputs(rows=8)
    with Products():
        partial_attention(q, k[:1], v[:1])
        assert read == [2, 2]  # scores and output, each over the two key heads of one row
        read.clear()
        partial_attention(q, k, v)
        assert read == [16, 16]


def test_a_learnt_sink_is_a_piece():
    q, k, v = inputs(heads=2)
    sink = torch.tensor([0.7, -0.2], dtype=torch.float64)[None, :, None].expand(2, 2, 5)
    found = merged([partial_attention(q, k, v), Partial(torch.zeros_like(q), sink)]).output
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    wanted = torch.cat([scores, sink[..., None]], -1).softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(found, wanted)


def test_arguments_are_checked():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="keys must have 2 rows, as q, or one, got 3"):
        partial_attention(q, *inputs(rows=3)[1:])
    with pytest.raises(ValueError, match="number of heads that divides the 6 of q, got 4"):
        partial_attention(q, *inputs(kv_heads=4)[1:])
    with pytest.raises(ValueError, match="keys must have shape"):
        partial_attention(q[..., :4], k, v)
    with pytest.raises(ValueError, match="values must have shape"):
        partial_attention(q, k, v[:, :, :3])
    with pytest.raises(TypeError, match="values must have the dtype"):
        partial_attention(q, k, v.float())
    with pytest.raises(TypeError, match="q must hold floating"):
        partial_attention(q.long(), k, v)
    with pytest.raises(TypeError, match="visible must hold bools"):
        partial_attention(q, k, v, visible=torch.ones(2, 1, 1, 11))
    with pytest.raises(ValueError, match="visible must be broadcastable"):
        partial_attention(q, k, v, visible=torch.ones(2, 1, 1, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="scale must be a finite number"):
        partial_attention(q, k, v, scale=math.nan)
    with pytest.raises(ValueError, match="parts must hold at least one"):
        merged([])
    with pytest.raises(ValueError, match="pieces must hold at least one"):
        cascade_attention(q, [])
    part = partial_attention(q, k, v)
    with pytest.raises(ValueError, match="output must have shape"):
        merged([part, Partial(part.output[:1], part.lse[:1])])
    with pytest.raises(TypeError, match="dtype"):
        merged([part, Partial(part.output.float(), part.lse.float())])
