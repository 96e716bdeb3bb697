"""Fast Sparse ConvNets: pruned pointwise convolutions that really are faster than dense ones (arXiv 1911.09723).

In MobileNet-like networks nearly all multiplications are 1 x 1 convolutions, products of a matrix of weights with the pixels of a picture.
With activations kept channel by channel, each weight that is not 0 multiplies a whole vector of pixels: weights may be zero anywhere,
and every load is still contiguous. From some sparsity on (below 70 % is the aim here) that beats the dense product.

    pruner = GradualPruner(model, model.pointwise(), Gradual(final=0.9, ...)); pruner.attach(optimizer)   # while training
    sparsify_(model.eval()); channels_first_(model)                                                      # for inference

product.py     the matrix as the kernel reads it (`pack`), the product (`sparse_product`), and which way is the fastest here
layers.py      `SparseConv1x1` and `SparseLinear`, and `sparsify_`, which puts them in the place of pruned layers
depthwise.py   `DepthwiseConv3x3`, channels first too, and `channels_first_`, which puts it in the place of torch's
folding.py     norms and clamps behind a convolution, taken into it
pruning.py     gradual magnitude pruning as a hook on the optimiser, single weights or blocks of 2 and 4 outputs
mobilenet.py   MobileNetV1, whose blocks `sparsify_` folds into one layer each, and its operations in closed form

Ours in the kernel (`our choice`): it is written for AVX-512 and AVX2; strips are copied side by side before they are used, since rows of a
picture a power of two apart fall on one another in the cache; threads share out the strips. The later variant with 8-bit weights, XNNPACK
through ExecuTorch, MobileNetV2 and EfficientNet are not here.

When NOT to use it: on a GPU, where unstructured zeros do not pay below some 95 % and 2:4 patterns do (`core.sparsity.formats`); for layers
with few zeros; where bfloat16 or INT8 dense products are fast and their rounding is welcome: they may be faster still, measure them.
"""

from assay.methods.compression.fast_sparse_convnets.depthwise import DepthwiseConv3x3, channels_first_
from assay.methods.compression.fast_sparse_convnets.layers import SparseConv1x1, SparseLinear, sparsify_, zeros
from assay.methods.compression.fast_sparse_convnets.mobilenet import V1, MobileNet, mobilenet_macs
from assay.methods.compression.fast_sparse_convnets.product import (
    SparseMatrix,
    fastest,
    pack,
    reference,
    sparse_product,
)
from assay.methods.compression.fast_sparse_convnets.pruning import GradualPruner

__all__ = [
    "V1",
    "DepthwiseConv3x3",
    "GradualPruner",
    "MobileNet",
    "SparseConv1x1",
    "SparseLinear",
    "SparseMatrix",
    "channels_first_",
    "fastest",
    "mobilenet_macs",
    "pack",
    "reference",
    "sparse_product",
    "sparsify_",
    "zeros",
]
