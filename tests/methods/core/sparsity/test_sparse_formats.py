"""What is unpacked is what was packed, bytes are as stated, and torch's own layout means the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from assay.methods.core.sparsity.formats import (
    pack_bitmask,
    pack_n_m,
    put_semi_structured,
    semi_structured_layout,
    why_not_semi_structured,
)
from assay.methods.core.sparsity.projections import n_m, transposable


@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8), (1, 4), (1, 16), (3, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_n_m_comes_back_exactly_at_its_size(n, m, dtype):
    weight = torch.randn(6, 80).to(dtype)
    sparse = weight * n_m(weight.abs(), n, m)
    sparse[0] = 0  # groups with fewer than n
    sparse[1, ::3] = 0
    packed = pack_n_m(sparse, n, m)
    assert torch.equal(packed.dense(), sparse)
    assert packed.values.shape == (6, 80 * n // m)
    index = (m - 1).bit_length()
    assert packed.bits == pytest.approx(n / m * (dtype.itemsize * 8 + index))
    assert packed.bytes == 6 * 80 * n // m * dtype.itemsize + -(-6 * 80 * n // m * index // 8)


def test_more_than_n_of_m_is_refused():
    weight = torch.ones(2, 8)
    for given in (weight, weight[:, :6]):
        with pytest.raises(ValueError, match="weight must be 2:4 along its inputs"):
            pack_n_m(given, 2, 4)
    with pytest.raises(ValueError, match="weight must be finite"):
        pack_n_m(weight * torch.nan, 2, 4)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_bitmasks_come_back_exactly(density):
    weight = torch.randn(5, 19) * (torch.rand(5, 19) < density)
    packed = pack_bitmask(weight)
    assert torch.equal(packed.dense(), weight)
    assert packed.bitmask.shape == (5, 3)
    assert packed.bytes == 4 * int((weight != 0).sum()) + 15 + 40
    assert packed.row_offsets.tolist() == [0, *(weight != 0).sum(1).cumsum(0).tolist()[:-1]]
    assert [bool(packed.bitmask[0, 0] >> i & 1) for i in range(8)] == (weight[0, :8] != 0).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_the_semi_structured_layout_means_the_same_numbers_to_torch(dtype):
    scores = torch.rand(64, 128)
    weight = (torch.randn(64, 128) * 20).to(dtype) * transposable(scores, 2, 4)
    values, meta = semi_structured_layout(weight)
    assert values.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight)
    other, _ = semi_structured_layout(weight.T.contiguous()) if dtype != torch.int8 else (None, None)
    assert other is None or other.shape == (128, 32)  # the transpose fits as well


def test_what_does_not_fit_the_layout_is_said():
    sparse = (torch.randn(64, 128) * n_m(torch.rand(64, 128), 2, 4)).half()
    assert why_not_semi_structured(sparse) == ""
    assert "not torch.float32" in why_not_semi_structured(sparse.float())
    assert "multiples of 32 and 64" in why_not_semi_structured(sparse[:, :96])
    assert "more than 2 of 4" in why_not_semi_structured(torch.ones(64, 128).half())
    with pytest.raises(ValueError, match="weight must fit the semi-structured layout"):
        semi_structured_layout(torch.ones(64, 128).half())


def test_a_processor_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU()).half()
    with torch.no_grad():
        model[0].weight *= n_m(torch.rand(64, 128), 2, 4)
    with pytest.raises(
        ValueError, match="must lie on a GPU with sparse tensor cores, got cpu; `semi_structured_layout`"
    ):
        put_semi_structured(model, ["0"])
    with pytest.raises(ValueError, match="names must be plain linear layers, got '1'"):
        put_semi_structured(model, ["1"])
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.gpu
def test_on_a_gpu_the_layer_computes_on_the_sparse_weight():
    model = nn.Sequential(nn.Linear(256, 128)).to("cuda", torch.bfloat16)
    with torch.no_grad():
        model[0].weight *= n_m(torch.rand(128, 256), 2, 4).to("cuda")
        x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
        expected = model(x)
        found = put_semi_structured(model, ["0"])(x)
    assert type(model[0].weight.data).__name__.startswith("SparseSemiStructured")
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2)
