"""BDWP and SAT: training with N:M sparse weights in the forward and in the backward pass (arXiv 2309.13015).

- `training`: two masks of one dense weight, layers that compute with them (`sparse_training`, `settle`), and how far their input
  gradients lie from the dense ones (`gradient_cosines`).
- `accelerator`: multiply-accumulates by stage, and a model of the accelerator SAT in cycles.

A layer has three products a step: the output y = x W^T, the gradient of the input gx = gy W, the gradient of the weight gW = gy^T x. An
N:M mask saves work only along the dimension a product sums over: the inputs for y, the outputs for gx. BDWP therefore prunes the same
dense weight twice, along the inputs for y and along the outputs for gx; gW stays dense and goes to the dense weight. At 2:8 a step has
(1/4 + 1/4 + 1) / 3 = 1/2 of the dense multiplications.

When not to use it: processors have no N:M products, so that training is slower there than dense (`backend="csr"` really leaves the
work out, and shows it). NVIDIA's GPUs have them for 2:4 alone, which saves a third at most and pays for large layers only, since both
masks are made anew in every step.
"""

from assay.methods.compression.nm_sparse_bdwp.accelerator import (
    SAT,
    Product,
    Step,
    cost_ratio,
    products_of,
    stage_macs,
    train_step,
)
from assay.methods.compression.nm_sparse_bdwp.training import (
    GradientCosine,
    NMConv2d,
    NMLinear,
    Pattern,
    gradient_cosines,
    largest,
    masks_of,
    nm_layers,
    remake,
    settle,
    sparse_training,
    why_not,
)

__all__ = [
    "SAT",
    "GradientCosine",
    "NMConv2d",
    "NMLinear",
    "Pattern",
    "Product",
    "Step",
    "cost_ratio",
    "gradient_cosines",
    "largest",
    "masks_of",
    "nm_layers",
    "products_of",
    "remake",
    "settle",
    "sparse_training",
    "stage_macs",
    "train_step",
    "why_not",
]
