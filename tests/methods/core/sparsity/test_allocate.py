"""The allocation against trying everything, and what a choice costs against building it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.core.quantize.groups import dequantize_groups, quantize_groups
from assay.methods.core.sparsity.allocate import Choice, allocate, options
from assay.methods.core.sparsity.formats import pack_bitmask


def brute(layers, budget):
    """The least loss of all combinations."""
    sums = (
        (sum(c.cost for c in combination), math.fsum(c.loss for c in combination))
        for combination in itertools.product(*layers.values())
    )
    return min(loss for cost, loss in sums if cost <= budget)


cases = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(cases, st.integers(0, 60), st.sampled_from([1, 3]))
@settings(max_examples=150, deadline=None)
def test_the_table_is_exact_and_the_hull_within_its_bound(case, budget, unit):
    layers = {str(i): [Choice(unit * cost, float(loss)) for cost, loss in choices] for i, choices in enumerate(case)}
    least = sum(min(c.cost for c in choices) for choices in layers.values())
    budget = max(budget, least)
    best = brute(layers, budget)
    for solver in ("exact", "hull", "auto"):
        found = allocate(layers, budget, solver=solver)
        assert found.cost == sum(c.cost for c in found.chosen.values()) <= budget
        assert found.loss == pytest.approx(sum(c.loss for c in found.chosen.values()))
        assert list(found.chosen) == list(layers)
        assert all(found.chosen[name] in choices for name, choices in layers.items())
        assert found.bound <= best + 1e-9
        assert best <= found.loss + 1e-9
        if solver != "hull":
            assert found.loss == pytest.approx(best)
            assert found.gap == 0
    assert found.gap >= 0


def test_the_hull_spends_on_what_saves_most_and_its_gap_is_small_for_many_layers():
    random = torch.Generator().manual_seed(0)
    layers = {
        str(i): [Choice(1000 * k, float(torch.rand((), generator=random)) * 2.0 ** (8 - k), k) for k in range(9)]
        for i in range(200)
    }
    exact = allocate(layers, 700_000, solver="exact")
    greedy = allocate(layers, 700_000, solver="hull")
    assert greedy.bound <= exact.loss <= greedy.loss
    assert greedy.gap <= 0.01 * exact.loss
    assert allocate(layers, 10**9).loss == sum(min(c.loss for c in choices) for choices in layers.values())


def test_no_budget_is_exceeded_and_bad_input_is_named():
    one = {"a": [Choice(4, 1.0)], "b": [Choice(3, 1.0), Choice(9, 0.0)]}
    with pytest.raises(ValueError, match="budget must be at least 7, the sum of the cheapest choices, got 6"):
        allocate(one, 6)
    assert allocate(one, 7).cost == 7
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        allocate({}, 5)
    with pytest.raises(ValueError, match=r"layers\['a'\] must have at least one choice"):
        allocate({"a": []}, 5)
    with pytest.raises(ValueError, match=r"layers\['a'\]\[0\].loss must be a finite number, got nan"):
        allocate({"a": [Choice(1, math.nan)]}, 5)
    with pytest.raises(TypeError, match=r"layers\['a'\]\[0\].cost must be a whole number"):
        allocate({"a": [Choice(1.5, 0.0)]}, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver must be one of"):
        allocate(one, 7, solver="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver must be 'hull' for a table of"):
        allocate({"a": [Choice(0, 1.0), Choice(2**40 + 1, 0.5), Choice(2**41, 0.0)]}, 2**41, solver="exact")


@pytest.mark.parametrize("data", [False, True])
def test_what_a_layer_may_become_costs_and_loses_what_building_it_does(data):
    weight = torch.randn(48, 64)
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    moment = (x.T @ x / len(x)).double() if data else None
    found = {c.label: c for c in options(weight, moment=moment, densities=[0.5], ranks=[8], bits=[4, 8])}
    assert found["dense", None] == Choice(48 * 64 * 4, 0.0, ("dense", None))

    def loss(other):
        error = (other.double() - weight.double()) @ (x.double().T if data else torch.eye(64).double())
        return float(error.square().sum()) / (len(x) if data else 1)

    importance = weight.abs() * (moment.diagonal().sqrt() if data else 1)
    kept = importance >= importance.kthvalue(33, dim=1, keepdim=True).values
    assert int(kept.sum()) == 48 * 32
    sparse = found["density", 0.5]
    assert sparse.loss == pytest.approx(loss(weight * kept), rel=1e-6)
    assert sparse.cost == 48 * 64 // 8 + 48 * 32 * 4
    assert sparse.cost == pack_bitmask(weight * kept).bytes - 48 * 8  # which also says where rows begin

    low = found["rank", 8]
    assert low.cost == 8 * (48 + 64) * 4
    root = torch.linalg.cholesky(moment) if data else torch.eye(64).double()
    u, s, v = torch.linalg.svd(weight.double() @ root)
    best = (u[:, :8] * s[:8]) @ v[:8] @ torch.linalg.inv(root)
    assert low.loss == pytest.approx(loss(best), rel=1e-6)

    four = found["bits", 4]
    assert four.loss == pytest.approx(loss(dequantize_groups(*quantize_groups(weight, 4))), rel=1e-6)
    assert four.cost == 48 * 64 // 2 + 48 * 2 * 4
    assert found["bits", 8].cost == 48 * 64 + 48 * 2 * 2
    assert found["bits", 8].loss < four.loss

    macs = {c.label: c.cost for c in options(weight, cost="macs", densities=[0.5], ranks=[8], bits=[4])}
    assert macs == {("dense", None): 3072, ("density", 0.5): 1536, ("rank", 8): 896, ("bits", 4): 3072}


def test_layers_that_cannot_be_grouped_get_no_bits_and_bad_options_are_named():
    weight = torch.randn(8, 40)
    assert [c.label for c in options(weight, bits=[4])] == [("dense", None)]
    with pytest.raises(ValueError, match=r"moment must have shape \(40, 40\)"):
        options(weight, moment=torch.eye(8))
    with pytest.raises(ValueError, match="ranks must be a whole number at least 1 and at most 8, got 9"):
        options(weight, ranks=[9])
    with pytest.raises(ValueError, match="cost must be one of"):
        options(weight, cost="watts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits must be a whole number at least 2"):
        options(torch.randn(8, 32), bits=[1])
