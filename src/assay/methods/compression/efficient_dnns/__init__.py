"""Efficient Deep Neural Networks (B. Wu's thesis, 2019): its papers as separate features, with one cost model.

    tables        a table of what each candidate operator costs at each layer, measured here or counted; a network costs their sum
    search        DNAS: a super-net whose choice of operators is trained together with its weights, against such a table
    fbnet         the blocks among which it chooses
    shift         `Shift2d`, which moves channels instead of convolving them, and residual networks made with it
    squeezenext   the SqueezeNext networks
    codesign      networks of 1x1 convolutions, shifts, pooling and concatenation (Synetgy), few-bit weights and activations
    squeezeseg    segmentation of LiDAR scans on their spherical image, with a recurrent CRF
    lidar         annotation by one click and a track (LATTE), and a model's move to other sensors (SqueezeSegV2)

No weights come with the package. Networks have the argument names of timm (`num_classes`, `in_chans`), `forward_features` and
`forward_head`.

    >>> from assay.methods.compression.efficient_dnns import Shift2d
    >>> import torch
    >>> Shift2d(9)(torch.eye(3).expand(1, 9, 3, 3))[0, 0]  # the first of nine groups moves up and to the left
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 0.]])
"""

from assay.methods.compression.efficient_dnns.codesign import (
    DiracUnit,
    FewBits,
    RoundedReLU,
    bits_table,
    dirac_net,
    with_bits,
)
from assay.methods.compression.efficient_dnns.fbnet import FBNetBlock, fbnet_space
from assay.methods.compression.efficient_dnns.lidar import (
    Box,
    Track,
    box_around,
    geodesic_distance,
    ground,
    intensity_loss,
    one_click,
    recalibrate,
)
from assay.methods.compression.efficient_dnns.nets import Net
from assay.methods.compression.efficient_dnns.search import (
    Found,
    SuperNet,
    anneal,
    fbnet_loss,
    gumbel_weights,
    search,
)
from assay.methods.compression.efficient_dnns.shift import (
    CSC,
    Shift2d,
    deal,
    resnet,
    resnet20,
    shift,
    shift_reference,
    shiftresnet,
    shiftresnet20,
)
from assay.methods.compression.efficient_dnns.squeezenext import SqueezeNextBlock, squeezenext, squeezenext_23
from assay.methods.compression.efficient_dnns.squeezeseg import (
    Fire,
    FireDeconv,
    RecurrentCRF,
    SqueezeSeg,
    segmentation_loss,
    spherical_image,
)
from assay.methods.compression.efficient_dnns.tables import CostTable, Space, counted_table, measured_table

__all__ = [
    "Box",
    "CSC",
    "CostTable",
    "DiracUnit",
    "FBNetBlock",
    "FewBits",
    "Fire",
    "FireDeconv",
    "Found",
    "Net",
    "RecurrentCRF",
    "RoundedReLU",
    "Shift2d",
    "Space",
    "SqueezeNextBlock",
    "SqueezeSeg",
    "SuperNet",
    "Track",
    "anneal",
    "bits_table",
    "box_around",
    "counted_table",
    "deal",
    "dirac_net",
    "fbnet_space",
    "fbnet_loss",
    "geodesic_distance",
    "ground",
    "gumbel_weights",
    "intensity_loss",
    "measured_table",
    "one_click",
    "recalibrate",
    "resnet",
    "resnet20",
    "search",
    "segmentation_loss",
    "shift",
    "shift_reference",
    "shiftresnet",
    "shiftresnet20",
    "spherical_image",
    "squeezenext",
    "squeezenext_23",
    "with_bits",
]
