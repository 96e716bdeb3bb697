"""The maps from the auxiliary's keys and values to the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from assay.methods.inference.kv_prediction.sites import Pair


class Predictor(nn.Module):
    """For each base layer one linear map with bias from the raw keys of its auxiliary layer to its own, and one for values.

    `sources` and `targets` are the (keys, values) widths of the auxiliary's layers and the base's, which may differ from layer to layer.
    The maps begin as torch's linear layers do.
    """

    def __init__(
        self, layers: Sequence[int], sources: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        pairs = [(sources[layer], target) for layer, target in zip(self.layers, targets, strict=True)]
        self.keys = nn.ModuleList(nn.Linear(source[0], target[0]) for source, target in pairs)
        self.values = nn.ModuleList(nn.Linear(source[1], target[1]) for source, target in pairs)

    def reset_parameters(self) -> None:
        """Random maps, from torch's global generator."""
        for linear in (*self.keys, *self.values):
            linear.reset_parameters()

    @torch.no_grad()
    def identity_(self) -> Self:
        """Maps that change nothing: a start for an auxiliary that is the base without some layers (our choice; the paper starts at random).

        Raises ValueError for layers of other widths.
        """
        linears: list[Any] = [*self.keys, *self.values]
        if odd := next((linear for linear in linears if linear.in_features != linear.out_features), None):
            raise ValueError(
                f"identity_ needs layers of equal widths, got a map from {odd.in_features} to {odd.out_features}"
            )
        for linear in linears:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self

    def forward(self, raw: Sequence[Sequence[Tensor]]) -> list[Pair]:
        """Raw keys and values of the auxiliary's layers, each (batch, tokens, width), to those of the base's layers."""
        return [
            (keys(raw[layer][0]), values(raw[layer][1]))
            for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True)
        ]
