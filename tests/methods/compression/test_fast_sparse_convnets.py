"""The sparse product: equal to the dense one for any number of pixels, the lists it walks, what it stores and what it counts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from assay.measure.cost import count_cost
from assay.methods.compression import fast_sparse_convnets as room
from assay.methods.compression.fast_sparse_convnets import product
from assay.methods.compression.fast_sparse_convnets.product import (
    SparseMatrix,
    fastest,
    pack,
    reference,
    sparse_product,
)
from assay.methods.core import kernels

needs_compiler = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler on this machine")


def matrix(outputs=24, inputs=40, density=0.2, *, block=1, seed=0):
    """A pruned matrix, the zeros anywhere (or in blocks), with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    kept = torch.rand(outputs // block, inputs, generator=generator) < density
    kept[len(kept) // 2] = False
    return weight * kept.repeat_interleave(block, 0)


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- equal to the dense product --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("pixels", [1, 7, 16, 17, 33, 49, 63, 64, 65, 130, 196])
def test_the_kernel_is_the_dense_product_for_any_number_of_pixels(pixels, block, lanes):
    weight, bias, x = matrix(block=block), inputs(24, seed=2), inputs(2, 40, pixels)
    expected = (weight.double() @ x.double() + bias.double()[:, None]).clamp(-0.5, 1.5)
    widths = [0, *(lanes * wide for wide in (1, 2, 3, 4))]
    for strip in widths:
        found = sparse_product(
            x, pack(weight, block), bias, low=-0.5, high=1.5, backend="strips", strip=strip, lanes=lanes
        )
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("block", [1, 4])
def test_many_channels_make_narrower_strips_and_the_same_product(block):
    weight, x = matrix(24, 600, block=block), inputs(2, 600, 77)
    found = sparse_product(x, pack(weight, block), backend="strips")
    torch.testing.assert_close(found.double(), weight.double() @ x.double(), atol=1e-4, rtol=1e-4)
    for lanes, strip in ((8, 32), (16, 64)):
        widest = sparse_product(x, pack(weight, block), backend="strips", lanes=lanes, strip=strip)
        torch.testing.assert_close(widest, found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["strips", "csr", "dense"])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_every_way_is_the_walk_through_the_lists(block, density, backend):
    if backend == "strips" and kernels.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    weight = matrix(density=density, block=block)
    if density == 1:
        weight = inputs(24, 40)  # nothing is pruned, not even one row
    for shape in ((3, 40, 5, 7), (3, 40, 2, 2), (1, 40, 6), (4, 40)):
        x = inputs(*shape)
        columns = x.double().flatten(2) if x.ndim > 2 else x.double()[:, :, None]
        expected = (weight.double() @ columns).reshape(len(x), 24, *shape[2:])
        walked = reference(x, pack(weight, block), high=1.0)
        torch.testing.assert_close(walked.double(), expected.clamp(max=1.0), atol=1e-6, rtol=1e-6)
        found = sparse_product(x, pack(weight, block), high=1.0, backend=backend)
        torch.testing.assert_close(found, walked, atol=2e-5, rtol=1e-5)
        assert found.is_contiguous()


@pytest.mark.parametrize("backend", [None, "csr", "dense"])
def test_an_output_without_weights_is_its_clamped_bias(backend):
    weight, bias = matrix(), torch.full((24,), -3.0)
    bias[12] = 7.0
    assert not weight[12].any()
    y = sparse_product(inputs(2, 40, 50), pack(weight), bias, low=0.0, high=6.0, backend=backend)
    assert (y[:, 12] == 6).all()
    nothing = sparse_product(inputs(2, 40, 50), pack(weight * 0), bias, low=0.0, high=6.0, backend=backend)
    assert (nothing == bias.clamp(0, 6)[:, None]).all()


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    weight, before = matrix(32, 48), torch.get_num_threads()
    try:
        for pixels in (49, 196, 500):
            x, found = inputs(1, 48, pixels), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(sparse_product(x, pack(weight), backend="strips"))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_nan_passes_the_clamp_and_infinity_reaches_only_outputs_that_have_a_weight_for_it():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[[math.nan, 1.0], [math.inf, 2.0]]])
    y = sparse_product(x, pack(weight), low=0.0, high=6.0, backend="strips")
    assert bool(y[0, 0, 0].isnan())
    assert y[0, 1].tolist() == [6.0, 2.0]
    dense = sparse_product(x, pack(weight), low=0.0, high=6.0, backend="dense")
    assert bool(dense[0, 1, 0].isnan()), "0 times NaN"


@needs_compiler
def test_inputs_may_lie_in_memory_as_they_like():
    weight = matrix()
    x = inputs(2, 40, 6, 10)
    expected = sparse_product(x, pack(weight))
    assert torch.equal(sparse_product(x.contiguous(memory_format=torch.channels_last), pack(weight)), expected)
    wide = inputs(2, 40, 6, 20)
    assert torch.equal(
        sparse_product(wide[..., ::2], pack(weight)), sparse_product(wide[..., ::2].clone(), pack(weight))
    )


def test_no_pictures_and_no_pixels_give_none():
    for shape in ((0, 40, 5, 5), (2, 40, 0, 5)):
        assert sparse_product(torch.zeros(shape), pack(matrix())).shape == (shape[0], 24, *shape[2:])


def test_without_the_kernel_the_product_is_dense(monkeypatch):
    monkeypatch.setattr(product, "_ready", False)
    x, before = inputs(2, 40, 9), kernels.paths().get("sparse product: torch dense", 0)
    torch.testing.assert_close(sparse_product(x, pack(matrix())), matrix() @ x, atol=1e-5, rtol=1e-5)
    assert kernels.paths()["sparse product: torch dense"] == before + 1
    with pytest.raises(ValueError, match="backend 'strips' needs"):
        sparse_product(x, pack(matrix()), backend="strips")


@needs_compiler
def test_records_can_tell_that_the_kernel_ran():
    before = kernels.paths().get("sparse product: kernel", 0)
    sparse_product(inputs(2, 40, 9), pack(matrix()))
    assert kernels.paths()["sparse product: kernel"] == before + 1


def test_where_gradients_are_wanted_the_product_is_dense():
    x = inputs(2, 40, 9).requires_grad_()
    sparse_product(x, pack(matrix())).sum().backward()
    torch.testing.assert_close(x.grad, matrix().sum(0)[None, :, None].expand(2, -1, 9), atol=1e-5, rtol=1e-5)


# ---- the lists, the bytes, the operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4])
def test_one_pass_over_the_steps_ends_where_it_began(block):
    weight = matrix(block=block)
    packed = pack(weight, block)
    assert int(packed.steps.sum()) == 0
    groups = (weight != 0).view(24 // block, block, 40).any(1)
    assert packed.channels().tolist() == groups.nonzero()[:, 1].tolist()
    assert packed.counts.tolist() == groups.sum(1).tolist()
    assert torch.equal(packed.dense(), weight)


def test_blocks_take_any_matrix_and_keep_the_zeros_of_a_place_that_another_output_needs():
    weight = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    packed = pack(weight, 2)
    assert packed.values.tolist() == [[0.0, 2.0], [1.0, 0.0]]
    assert (packed.stored, pack(weight).stored) == (4, 2)
    assert torch.equal(packed.dense(), weight)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_stored_are_values_one_step_a_place_and_one_count_a_block(block):
    weight = matrix(block=block)
    kept = int((weight != 0).sum())
    packed = pack(weight, block)
    assert packed.bytes == 4 * kept + 4 * kept // block + 4 * 24 // block
    assert packed.bytes < 4 * weight.numel()


@needs_compiler
@pytest.mark.parametrize("block", [1, 4])
def test_multiply_accumulates_are_weights_times_pixels(block):
    weight = matrix(block=block)
    kept = int((weight != 0).sum())
    packed = pack(weight, block)
    assert packed.macs(77) == kept * 77
    x = inputs(3, 40, 50)
    assert count_cost(lambda: sparse_product(x, packed, backend="strips")).macs == kept * 3 * 50
    assert count_cost(lambda: sparse_product(x, packed, backend="dense")).macs == 24 * 40 * 3 * 50


@needs_compiler
def test_the_compiler_of_graphs_knows_the_shape():
    packed = pack(matrix(block=2), 2)
    sparse_product(inputs(1, 40, 9), packed)  # loads the kernel
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = (packed.values, packed.steps, packed.counts, None, packed.first)
        found = torch.ops.assay.sparse_dense(torch.empty(3, 40, 9), *parts, 0.0, 1.0, 0, 0)
    assert found.shape == (3, 24, 9)


@needs_compiler
def test_the_fastest_way_is_the_one_with_the_fewest_seconds():
    way, seconds = fastest(inputs(1, 40, 64), pack(matrix()), repeats=2)
    assert set(seconds) == {"dense", "csr", "strips"}
    assert way == min(seconds, key=lambda name: seconds[name])


def test_mobilenet_v1_has_the_operations_that_are_known_of_it():
    """568.7 M, of which the pointwise convolutions are 539.5 M: at 90 % of zeros 6.84 times fewer remain, never 10."""
    assert room.mobilenet_macs(224) == 568_740_352
    pointwise = 539_492_352
    for density in (0.1, 0.2, 1.0):
        expected = 568_740_352 - (1 - density) * pointwise
        assert room.mobilenet_macs(224, density=density) == pytest.approx(expected)
    small = {"blocks": ((32, 1), (64, 2)), "stem": (16, 2), "width": 0.5, "classes": 7}
    model = room.MobileNet(**small).eval()
    assert count_cost(model, torch.zeros(1, 3, 30, 30)).macs == room.mobilenet_macs(30, **small)


# ---- bad input -------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="weight must be finite"):
        pack(torch.tensor([[math.nan]]))
    with pytest.raises(TypeError, match="weight must hold torch.float32"):
        pack(torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 x 1 convolution"):
        pack(torch.zeros(4, 4, 3, 3))
    with pytest.raises(ValueError, match="block must divide the 3 outputs, got 2"):
        pack(torch.zeros(3, 4), 2)
    with pytest.raises(ValueError, match="block must be one of 1, 2, 4, got 3"):
        pack(torch.zeros(3, 4), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": torch.tensor([5, -5], dtype=torch.int32)}, "steps must lead through the 3 channels"),
        ({"steps": torch.tensor([1, 0], dtype=torch.int32)}, "steps must lead through the 3 channels"),
        ({"counts": torch.tensor([1], dtype=torch.int32)}, "counts must be of the 2 places"),
        ({"counts": torch.tensor([3, -1], dtype=torch.int32)}, "counts must be of the 2 places"),
        ({"first": 3}, "first must be a whole number at least 0 and at most 2"),
        ({"values": torch.zeros(2, 3)}, "block"),
        ({"steps": torch.tensor([1, -1])}, "steps must hold torch.int32"),
    ],
)
def test_lists_that_would_lead_out_of_the_matrix_are_refused(change, message):
    packed = pack(torch.tensor([[1.0, 2.0, 0.0]]))
    with pytest.raises((TypeError, ValueError), match=message):
        dataclasses.replace(packed, **change)
    assert isinstance(dataclasses.replace(packed, first=0), SparseMatrix)


def test_products_that_do_not_fit_are_refused():
    packed, x = pack(matrix()), inputs(2, 40, 9)
    with pytest.raises(TypeError, match="x must hold torch.float32"):
        sparse_product(x.double(), packed)
    with pytest.raises(ValueError, match=r"x must be \(batch, 40, ...\)"):
        sparse_product(inputs(2, 41, 9), packed)
    with pytest.raises(ValueError, match="bias must have shape"):
        sparse_product(x, packed, torch.zeros(23))
    with pytest.raises(ValueError, match="low must be at most high"):
        sparse_product(x, packed, low=math.nan)
    with pytest.raises(ValueError, match="backend must be one of"):
        sparse_product(x, packed, backend="mkl")
    with pytest.raises(ValueError, match="strip must be 1 to 4 times lanes"):
        sparse_product(x, packed, strip=24, lanes=16)
    with pytest.raises(ValueError, match="strip must be 1 to 4 times lanes"):
        sparse_product(x, packed, strip=16)
