"""What training costs in computation, time, money and emissions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingCost:
    """What training costs: FLOPs, device-hours, money (in the unit of the price), energy in kWh, kg of CO2."""

    flops: float
    hours: float
    price: float
    energy_kwh: float
    co2_kg: float


def training_cost(
    macs_per_token: float,
    tokens: float,
    *,
    seconds_per_flop: float,
    price_per_hour: float,
    kilowatts: float,
    co2_kg_per_kwh: float,
) -> TrainingCost:
    """The thesis' estimate: training FLOPs x time a FLOP, then x price an hour, x power, x CO2 a kWh.

    Training takes 3 forward passes' worth (forward, and gradients of inputs and weights): 6 FLOPs per MAC.
    `seconds_per_flop` is that of one device as it really runs, not of its data sheet: low-rank layers reach less of the peak.
    Raises ValueError for a negative figure.

    >>> cost = training_cost(1e6, 1e6, seconds_per_flop=1e-12, price_per_hour=3.6, kilowatts=0.3, co2_kg_per_kwh=0.4)
    >>> cost.flops, round(cost.price, 6)
    (6000000000000.0, 0.006)
    """
    given = {"macs_per_token": macs_per_token, "tokens": tokens, "seconds_per_flop": seconds_per_flop}
    given |= {"price_per_hour": price_per_hour, "kilowatts": kilowatts, "co2_kg_per_kwh": co2_kg_per_kwh}
    if bad := [name for name, value in given.items() if value < 0]:
        raise ValueError(f"{bad[0]} must not be negative, got {given[bad[0]]}")
    flops = 6.0 * macs_per_token * tokens
    hours = flops * seconds_per_flop / 3600
    energy = hours * kilowatts
    return TrainingCost(flops, hours, hours * price_per_hour, energy, energy * co2_kg_per_kwh)
