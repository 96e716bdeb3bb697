"""The registry of number formats: what each holds, what it takes, and that the kernels use its numbers."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from assay.methods.core.quantize.formats import FORMATS, header
from assay.methods.core.quantize.groups import row_gain
from assay.methods.core.quantize.quantizers import make_quantizer

ERROR = {
    "fp32": 0,
    "bf16": 2**-8,
    "int8": 0.01,
    "int4": 0.12,
    "w8a8": 0.01,
    "E2": 0.02,
    "E3": 0.04,
    "E4": 0.07,
    "E5": 0.13,
}


def weights(name, n, k):
    torch.manual_seed(n + k)
    if name not in ERROR:
        levels = (-1, 1) if name == "binary" else (-1, 0, 1)
        codes = torch.tensor(levels)[torch.randint(len(levels), (n, k))].float()
        codes[:, 0] = 1  # a scale that shows
        return codes * torch.rand(n, 1)
    return torch.randn(n, k)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (50, 64), (96, 160)])
def test_packing_holds_the_weight_in_the_bytes_it_says(name, shape):
    form, weight = FORMATS[name], weights(name, *shape)
    parts = form.pack(weight)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == form.bytes(*shape)
    dense = form.unpack(parts, *shape)
    assert dense.dtype == torch.float32
    assert dense.shape == weight.shape
    error = float((dense - weight).norm() / weight.norm())
    assert error <= ERROR.get(name, 1e-6)
    again = form.pack(dense)
    assert torch.allclose(form.unpack(again, *shape), dense, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


@pytest.mark.parametrize("name", ["E2", "E3", "E4", "E5"])
def test_eight_bit_floats_are_those_of_the_quantisers(name):
    weight = weights(name, 20, 64)
    dense = FORMATS[name].unpack(FORMATS[name].pack(weight), 20, 64)
    simulated = make_quantizer(name, axis=0).calibrate(weight)(weight)
    assert ((dense - simulated).abs() <= 1e-6 * weight.abs().amax()).double().mean() > 0.99  # up to ties


def test_the_kernels_have_the_numbers_of_the_registry():
    file = resources.files("assay.methods.core.kernels") / "csrc" / "formats.h"
    assert file.read_text() == header()
    known = [form.id for form in FORMATS.values() if form.id is not None]
    assert len(set(known)) == len(known)


def test_rows_that_float16_scales_do_not_hold_are_refused_or_scaled():
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    assert row_gain(weight) is None
    weight[1] *= 1e-7
    weight[2] *= 1e6
    weight[3] = 0
    gain = row_gain(weight)
    assert gain is not None
    assert gain[0] == gain[3] == 1
    largest = (weight / gain[:, None]).abs().amax(1)
    assert ((largest[1:3] >= 0.5) & (largest[1:3] < 1)).all()
    for name in ("int8", "int4"):
        with pytest.raises(ValueError, match="rows that the float16 scales of"):
            FORMATS[name].pack(weight)
