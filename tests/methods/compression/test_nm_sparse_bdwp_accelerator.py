"""What an N:M step costs: the ratio of MACs, counted where the products really run, and cycles on the accelerator's model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.compression.nm_sparse_bdwp import (
    SAT,
    NMConv2d,
    NMLinear,
    Pattern,
    Product,
    cost_ratio,
    masks_of,
    products_of,
    sparse_training,
    stage_macs,
    train_step,
)
from assay.methods.compression.nm_sparse_bdwp.training import forward_product, input_gradient, weight_gradient

WIDE = Product("wide", rows=4096, inputs=512, outputs=512, read=4096 * 512)


@pytest.mark.parametrize(("n", "m", "ratio"), [(2, 4, 2 / 3), (2, 8, 1 / 2), (1, 8, 5 / 12), (4, 4, 1)])
def test_the_ratio_of_costs_is_the_papers(n, m, ratio):
    assert cost_ratio(n, m) == pytest.approx(ratio)
    sparse, dense = stage_macs([WIDE], n, m), stage_macs([WIDE], n, m, "dense")
    assert sum(sparse.values()) / sum(dense.values()) == pytest.approx(ratio)
    speedup = train_step([WIDE], n, m, training="dense").total / train_step([WIDE], n, m).total
    assert speedup <= 1 / ratio + 1e-9
    assert speedup > 0.9 / ratio  # so wide a layer waits for arithmetic, not for memory


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8), (1, 8)])
def test_compressed_rows_do_as_many_macs_as_the_model_says(kind, n, m):
    """Each stage is run on real masked weights, and its multiplications are counted where they happen."""
    plain = nn.Linear(16, 24) if kind == "linear" else nn.Conv2d(16, 24, 3, padding=1)
    x = torch.randn(5, 16) if kind == "linear" else torch.randn(5, 16, 4, 4)
    layer = (NMLinear if kind == "linear" else NMConv2d)(plain, Pattern(n, m), "csr")
    weight, geometry = layer.weight.detach(), layer.geometry
    forward, backward = masks_of(weight, layer.pattern)
    gy = torch.randn(5, 24, *x.shape[2:])
    counted = {
        "forward": count_cost(lambda: forward_product(x, weight * forward, None, geometry)),
        "backward": count_cost(lambda: input_gradient(gy, weight * backward, x.shape, geometry)),
        "weight": count_cost(lambda: weight_gradient(gy, x, weight.shape, geometry)),
    }
    rows = 5 if kind == "linear" else 5 * 16
    product = Product("layer", rows, weight[0].numel(), 24, x.numel())
    expected = stage_macs([product], n, m)
    for stage, cost in counted.items():
        assert cost.macs == expected[stage], stage
        assert not cost.uncounted


def test_other_schemes_save_in_fewer_stages():
    dense = stage_macs([WIDE], 2, 8, "dense")
    for training in ("sr_ste", "forward"):  # their backward weight is not N:M along the outputs
        found = stage_macs([WIDE], 2, 8, training)
        assert found["forward"] == dense["forward"] // 4
        assert found["backward"] == dense["backward"]
        assert sum(found.values()) >= 3 / 4 * sum(dense.values())
    assert stage_macs([WIDE], 2, 8, "transposable") == stage_macs([WIDE], 2, 8)


def test_the_products_of_a_model_are_read_off_a_run():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, groups=2), nn.Flatten()),
        *(nn.Linear(16 * 4, 8), nn.Linear(8, 8), nn.Linear(8, 5)),
    )
    x = torch.randn(2, 3, 4, 4)
    sparse_training(model, Pattern(2, 8))
    found = products_of(model, x)
    assert found == [
        Product("0", 32, 27, 8, 96, sparse=False, first=True),
        Product("2", 8, 36, 16, 256, sparse=False),
        Product("4", 2, 64, 8, 128),
        Product("5", 2, 8, 8, 16),
        Product("6", 2, 8, 5, 16, sparse=False),
    ]
    assert sum(product.macs for product in found) == count_cost(model, x).macs
    assert stage_macs(found, 2, 8)["backward"] == 8 * 36 * 16 + (2 * 64 * 8 + 2 * 8 * 8) // 4 + 2 * 8 * 5
    with pytest.raises(ValueError, match="model must run a linear layer or a 2-D convolution, got none in ReLU"):
        products_of(nn.ReLU(), x)


def test_reading_a_models_products_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    products_of(model, torch.randn(1, 4))  # a batch of 1: norms in training mode would refuse it
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_runs_twice_is_updated_once():
    layer = Product("layer", rows=100, inputs=64, outputs=32, read=6400)
    once, twice = train_step([layer], 2, 8), train_step([layer, layer], 2, 8)
    assert twice.cycles["update"] == once.cycles["update"]
    assert twice.bytes["update"] == once.bytes["update"]
    assert all(twice.cycles[stage] == 2 * once.cycles[stage] for stage in ("forward", "backward", "weight"))


def test_cycles_are_those_written_down():
    layer = Product("layer", rows=100, inputs=64, outputs=32, read=6400)
    sat = SAT(pes=4, lanes=2, hertz=1e6, bandwidth=1e12)  # memory never waits
    dense, sparse = train_step([layer], 2, 8, sat, "dense"), train_step([layer], 2, 8, sat)
    assert dense.cycles == {"forward": 25600, "backward": 25600, "weight": 25600, "update": 512}
    assert sparse.cycles == {"forward": 6400, "backward": 6400, "weight": 25600, "update": 512}
    assert sparse.modes == {"layer": {"forward": "sparse", "backward": "sparse", "weight": "dense"}}
    assert sparse.macs == stage_macs([layer], 2, 8)
    assert sparse.seconds == pytest.approx(38912e-6)
    # 2048 weights: 512 values of 16 + 3 bits twice, master and one moment read and written
    assert sparse.bytes["update"] == 2048 * 16 + 2 * 512 * 19 // 8
    assert dense.bytes["update"] == 2048 * 16 + 2 * 2048
    assert sparse.bytes["forward"] == 2 * (6400 + 3200) + 512 * 19 // 8
    assert dense.bytes["forward"] == 2 * (6400 + 3200) + 2 * 2048


def test_memory_bounds_what_arithmetic_does_not():
    layer = Product("layer", rows=1, inputs=1024, outputs=1024, read=1024)
    slow = SAT(bandwidth=1e6)
    step = train_step([layer], 2, 8, slow)
    assert step.cycles["forward"] == step.bytes["forward"] * 200
    ratio = train_step([layer], 2, 8, slow, "dense").cycles["forward"] / step.cycles["forward"]
    assert ratio == pytest.approx(16 / (2 / 8 * 19), rel=0.01)  # bits, not multiplications


def test_what_each_part_of_the_accelerator_gains():
    narrow = Product("narrow", rows=4, inputs=256, outputs=256, read=1024)  # sorting takes longer than multiplying
    whole = train_step([narrow], 2, 8).total
    assert train_step([narrow], 2, 8, SAT(pregenerated=False)).total > whole
    sorted_each_time = train_step([narrow], 2, 8, SAT(pregenerated=False, scheduled=False))
    assert sorted_each_time.cycles["forward"] > train_step([narrow], 2, 8, SAT(pregenerated=False)).cycles["forward"]
    assert train_step([narrow], 2, 8, SAT(pregenerated=False)).modes["narrow"]["forward"] == "dense"
    slow = train_step([WIDE], 2, 8, SAT(interleaved=False))
    fast = train_step([WIDE], 2, 8)
    assert slow.cycles["weight"] == 8 * fast.cycles["weight"]


def test_layers_without_a_gradient_of_the_input_or_without_weights_cost_less():
    first = Product("stem", 64, 27, 8, 192, sparse=False, first=True)
    step = train_step([first], 2, 8)
    assert step.cycles["backward"] == step.macs["backward"] == step.bytes["backward"] == 0
    scores = Product("scores", 64, 16, 64, 1024, sparse=False, weights=False)
    step = train_step([scores], 2, 8)
    assert step.cycles["update"] == step.bytes["update"] == 0
    assert step.macs["weight"] == scores.macs


@pytest.mark.parametrize(
    ("made", "error", "says"),
    [
        (lambda: Product("a", 0, 8, 8, 1), ValueError, "rows must be a whole number at least 1"),
        (lambda: Product("a", 1, 8, 8, 1, sparse=1), TypeError, "sparse must be True or False"),
        (lambda: Product("a", 1, 8, 8, 1, weights=False), ValueError, "sparse must be False for a product without"),
        (lambda: SAT(pes=0), ValueError, "pes must be a whole number at least 1"),
        (lambda: SAT(hertz=float("nan")), ValueError, "hertz must be a finite number above 0"),
        (lambda: SAT(scheduled=1), TypeError, "scheduled must be True or False"),
        (lambda: cost_ratio(3, 2), ValueError, "n must be a whole number at least 1 and at most 2"),
        (lambda: stage_macs([WIDE], 2, 8, "sparse"), ValueError, "training must be one of 'dense', 'bdwp'"),
        (lambda: stage_macs([Product("a", 1, 8, 12, 8)], 2, 8), ValueError, "must have multiples of 8, got 8 inputs"),
        (lambda: train_step([WIDE], 0, 8), ValueError, "n must be a whole number at least 1"),
    ],
)
def test_bad_sizes_are_refused(made, error, says):
    with pytest.raises(error, match=says):
        made()
