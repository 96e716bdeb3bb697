"""Training on a microcontroller in 16-bit floats (arXiv 2305.19167): what its arithmetic does to learning, and what a step costs.

The paper writes every step of a layer (forward, weight gradient, input gradient) as a matrix product, and computes all of it in 16-bit
floats, two at a time: products, sums, activations, gradients, weights and their update, with no float32 copy of anything.

- `matmul`, `NumericsPolicy`: that arithmetic bit for bit, each operation rounded, in the order of the kernels; and what mends it (sums
  in float32, stochastic rounding, Kahan's sum, a float32 master copy, loss scaling).
- `emulate`, `ReducedSGD`, `ReducedAdamW`: any network of linear layers and convolutions trained under a policy by torch's autograd,
  and the share of weight updates that round to no change.
- `training_step`, `training_memory`: modelled cycles, energy and bytes of a step on a `Microcontroller`.

When not to use it: to save time on a processor or GPU. The emulation is many times slower than float32 and takes more memory; it tells
beforehand whether a network will learn on the device.

An update is lost where lr |g| is under half the distance of two weights, 2^-12 |w| to 2^-11 |w| for float16 and 2^-9 |w| to 2^-8 |w| for
bfloat16. Small rates stall; try `update="stochastic"` first: it needs no memory.

The softmax of the released code approximates exp in 16 bits; here a loss is taken of the logits in float32 and its gradient rounded (our
choice). The emulated kernels are those of the released code: two orders of summation; its unrolled variants sum in the same orders.

>>> import torch
>>> policy = NumericsPolicy("bfloat16", update="stochastic")
>>> net = emulate(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), policy)
>>> optimiser = ReducedSGD(net.parameters(), lr=0.01, policy=policy)
>>> loss = torch.nn.functional.cross_entropy(net(torch.ones(1, 4)).float(), torch.tensor([1]))
>>> loss.backward()
>>> optimiser.step()
>>> 0 <= optimiser.stalled_share <= 1
True
"""

from __future__ import annotations

from assay.methods.compression.reduced_precision_odl.cost import (
    LayerShape,
    Microcontroller,
    StepCost,
    StepMemory,
    fits,
    layer_shapes,
    product_cycles,
    training_macs,
    training_memory,
    training_step,
)
from assay.methods.compression.reduced_precision_odl.layers import ReducedConv2d, ReducedLinear, emulate, im2col
from assay.methods.compression.reduced_precision_odl.numerics import (
    NumericsPolicy,
    matmul,
    matmul_reference,
    round_nearest,
    round_number,
    round_stochastic,
)
from assay.methods.compression.reduced_precision_odl.optimiser import ReducedAdamW, ReducedSGD

__all__ = [
    "LayerShape",
    "Microcontroller",
    "NumericsPolicy",
    "ReducedAdamW",
    "ReducedConv2d",
    "ReducedLinear",
    "ReducedSGD",
    "StepCost",
    "StepMemory",
    "emulate",
    "fits",
    "im2col",
    "layer_shapes",
    "matmul",
    "matmul_reference",
    "product_cycles",
    "round_nearest",
    "round_number",
    "round_stochastic",
    "training_macs",
    "training_memory",
    "training_step",
]
