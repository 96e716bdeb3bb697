"""Long convolutions: sequence-long kernels learned tap by tap, and the FlashButterfly way of running them (arXiv 2302.06646).

Every channel of a sequence is convolved with a kernel as long as the sequence, stored as plain weights. It learns because of a
regulariser on the kernel in every forward pass: `squash`, a soft threshold that sets small taps exactly to zero, after an optional
`smooth`. The convolution is a product of spectra. FlashButterfly computes those by 16-point DFT matrix products with twiddles
between them, fused in fast memory; long sequences take three passes over slow memory; the small matrices may be learned.

After the paper and the official code, whose fused kernels were announced but never released: the three-pass form is rebuilt from the
description. Channels, threshold, dropout of taps and biases are those of the released configurations, and so is the H3 block with long
convolutions in both of its places. `our choice`: spectra stay in digit-reversed order between transform and inverse, which saves the
transposes; the three-pass form exploits that the input is real and half zeros; on the CPU "fused" means one block of channels at a
time, small enough for the cache; half precision is computed in float32, since it would overflow; smoothing in frequency is done as
the equivalent window in time.

When NOT to use it: for token-by-token generation (the state is every input so far, and a step costs as much as attention's); for
lengths that are not known in advance (a kernel has a fixed number of taps); and the matrix form on processors without matrix
units, where it does several times the arithmetic of an FFT for nothing. With the "random" start most taps lie inside the dead zone
of `squash`, where they get no gradient and never leave: a `lam` far above the start's 0.002 kills the layer.
"""

from __future__ import annotations

from assay.methods.mixers.long_convs.butterfly import ButterflyDFT, butterfly_dft, butterfly_idft, factors_of
from assay.methods.mixers.long_convs.convolution import (
    Backend,
    ConvCost,
    Form,
    around,
    conv_cost,
    dft_flops,
    fft_conv,
    split_around,
    three_pass_conv,
)
from assay.methods.mixers.long_convs.kernel import LongKernel, frequency_window, smooth, squash
from assay.methods.mixers.long_convs.layers import CausalLongConv, H3LongConv, LongConv, LongConvClassifier

__all__ = [
    "Backend",
    "ButterflyDFT",
    "CausalLongConv",
    "ConvCost",
    "Form",
    "H3LongConv",
    "LongConv",
    "LongConvClassifier",
    "LongKernel",
    "around",
    "butterfly_dft",
    "butterfly_idft",
    "conv_cost",
    "dft_flops",
    "factors_of",
    "fft_conv",
    "frequency_window",
    "smooth",
    "split_around",
    "squash",
    "three_pass_conv",
]
