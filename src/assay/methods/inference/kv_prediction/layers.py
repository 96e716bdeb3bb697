"""Which layer of the auxiliary serves which of the base (the paper's Tables 1 and 4), and the base without some of its layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import nn

from assay import checks
from assay.methods.core.models import decoder

PER_LAYER = ("layer_types", "no_rope_layers")  # fields of configurations with an entry a layer


def layer_map(base_layers: int, auxiliary_layers: int) -> list[int]:
    """The auxiliary layer that each base layer's cache is predicted from, in order: early ones serve one base layer more (Table 1, KVP-C).

    Raises ValueError for more auxiliary layers than base layers.

    >>> layer_map(7, 3)
    [0, 0, 0, 1, 1, 2, 2]
    """
    base_layers = checks.whole("base_layers", base_layers, low=1)
    auxiliary_layers = checks.whole("auxiliary_layers", auxiliary_layers, low=1, high=base_layers)
    each, more = divmod(base_layers, auxiliary_layers)
    return [layer for layer in range(auxiliary_layers) for _ in range(each + (layer < more))]


def kept_layers(layers: int, share: float) -> list[int]:
    """The layers that stay when a share of them, to a thousandth, is kept at regular intervals, the first always (Table 4, KVP-LP).

    >>> kept_layers(8, 0.75)
    [0, 1, 2, 4, 5, 6]
    """
    layers = checks.whole("layers", layers, low=1)
    step = Fraction(checks.number("share", share, above=0, high=1)).limit_denominator(1000)
    step = max(step, Fraction(1, 1000))  # the nearest to a smaller share is none at all
    return [layer for layer in range(layers) if math.ceil((layer + 1) * step) > math.ceil(layer * step)]


def pruned_map(kept: Sequence[int], layers: int) -> list[int]:
    """For each base layer, the place in `kept` of itself or else of the last kept layer before it (Table 1, KVP-LP).

    >>> pruned_map([0, 1, 2, 4, 5, 6], 8)
    [0, 1, 2, 2, 3, 4, 5, 5]
    """
    if not kept or kept[0] != 0 or sorted(set(kept)) != list(kept) or kept[-1] >= layers:
        raise ValueError(f"kept must be rising layers below {layers} that begin with 0, got {checks.shown(list(kept))}")
    return [sum(layer <= index for layer in kept) - 1 for index in range(layers)]


def pruned(model: nn.Module, share: float) -> Any:
    """A copy of a decoder-only model without some of its layers (`kept_layers`), to be trained.

    Its configuration makes the same model again. Raises ValueError for a model that `why_not` does not understand.
    """
    if why := decoder.why_not(model):
        raise ValueError(f"model must be a decoder whose parts are understood: {why}")
    source: Any = model
    layers = source.config.num_hidden_layers
    kept = kept_layers(layers, share)
    # layers that go need not be copied: a stand-in takes their place while the rest is
    gone = {id(layer): nn.Identity() for index, layer in enumerate(source.model.layers) if index not in kept}
    small = copy.deepcopy(source, dict(gone))
    small.model.layers = nn.ModuleList(small.model.layers[index] for index in kept)
    for place, layer in enumerate(small.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for name in PER_LAYER:
        if getattr(small.config, name, None):
            setattr(small.config, name, [getattr(small.config, name)[index] for index in kept])
    small.config.num_hidden_layers = len(kept)
    return small.requires_grad_(True)
