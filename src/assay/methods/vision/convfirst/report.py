"""Every layer of a network against a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.measure.cost import count_cost
from assay.measure.roofline import (
    Bar,
    DeviceSpec,
    Layer,
    attainable_network_efficiency,
    attainable_seconds,
    bound_share,
    ideal_seconds,
    waterline,
)


@dataclass(frozen=True)
class EfficiencyReport:
    """Every layer's operations, bytes and (if measured) seconds against a device."""

    layers: list[Layer]
    device: DeviceSpec

    @property
    def attainable(self) -> float:
        """Share of the peak the network can reach layer by layer."""
        return attainable_network_efficiency(
            [layer.operations for layer in self.layers], [layer.bytes_moved for layer in self.layers], self.device
        )

    @property
    def measured(self) -> float | None:
        """Share of the peak it reached; None if it was not measured, or void (`assay.measure.roofline.bound_share`)."""
        if any(layer.seconds is None for layer in self.layers):
            return None
        operations = sum(layer.operations for layer in self.layers)
        return bound_share(
            ideal_seconds(operations, self.device.peak), sum(layer.seconds or 0.0 for layer in self.layers)
        )

    def bars(self) -> list[Bar]:
        """The waterline."""
        return waterline(self.layers, self.device.ridge)

    def table(self) -> str:
        """One line a layer: operations, bytes, intensity, attainable and measured efficiency ("void" above the peak rate)."""
        lines = [f"{'layer':40} {'MOP':>10} {'MB':>9} {'op/byte':>9} {'attainable':>10} {'measured':>9}"]
        for layer in self.layers:
            ideal = layer.operations / self.device.peak
            bound = attainable_seconds(layer.operations, layer.bytes_moved, self.device)
            work = f"{layer.operations / 1e6:10.2f} {layer.bytes_moved / 1e6:9.3f} {layer.intensity:9.2f}"
            share = bound_share(ideal, layer.seconds) if layer.seconds else 0.0
            seen = "void" if share is None else f"{share:9.3f}" if layer.seconds else ""
            lines.append(f"{layer.name[-40:]:40} {work} {ideal / bound:10.3f} {seen:>9}")
        return "\n".join(lines)

    def svg(self) -> str:
        """The waterline as an <svg> element: width = share of operations, height = intensity on a log axis, line = ridge."""
        from matplotlib.figure import Figure

        from assay.measure.plots import DRY, WATER, WET, svg

        figure = Figure(figsize=(8, 3), layout="constrained")
        axes, left = figure.add_subplot(), 0.0
        for bar in self.bars():
            axes.bar(
                left,
                bar.height,
                bar.width,
                align="edge",
                color=WET if bar.depth > 0 else DRY,
                edgecolor="white",
                lw=0.3,
            )
            left += bar.width
        axes.axhline(self.device.ridge, color=WATER)
        axes.set(yscale="log", xlim=(0, 1), xlabel="share of operations", ylabel="operations per byte")
        axes.set_title(f"{self.device.name}: attainable {self.attainable:.2f} of peak", fontsize=9)
        return svg(figure)


def efficiency_report(
    model: nn.Module, inputs: Tensor, device: DeviceSpec, *, measure: bool = False
) -> EfficiencyReport:
    """Layers of `model(inputs)` with their modelled operations and bytes; `measure` adds seconds, measured on this machine.

    Layers that neither compute nor move anything are left out. Do not set `measure` with the specification of another device.
    """
    if measure:
        from assay.measure.profile import profile_model

        rows = profile_model(model, inputs).rows
        layers = [Layer(row.name or "(model)", 2 * row.macs, row.bytes, row.seconds) for row in rows if row.bytes]
    else:
        with torch.inference_mode():
            costs = count_cost(model, inputs).modules
        layers = [Layer(cost.name or "(model)", cost.flops, cost.bytes) for cost in costs if cost.bytes]
    return EfficiencyReport(layers, device)
