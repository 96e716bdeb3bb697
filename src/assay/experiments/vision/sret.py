"""SReT: how much time slices of the attention save in a recursive network, and what using each block twice is worth.

ImageNet comes with no package: accuracies are those of small networks on crops of twelve photographs. Times and multiply-adds are those
of the published networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.training import Judged, difference, error_for_choice, guarded, judged
from assay.measure.cost import count_cost
from assay.methods.vision.sret import CONFIGS, SLICED, WHOLE, SReT

RATES = "sret/accuracy"
SIDE, STEPS = 32, 120  # pixels of a crop, steps: our choice, what two cores train in minutes
MARGIN = 2.0  # points of accuracy; the paper loses 0.1
DEPTHS = (1, 2, 1)
SMALL: dict[str, Any] = {
    "head_dim": 8, "heads": (2, 4, 8), "mlp_ratio": 2.0, "np_mlp_ratio": 1.0, "depths": DEPTHS, "stem_strides": (1, 2, 2),
    "drop_path_rate": 0.0, "input_size": SIDE, "in_chans": 1, "num_classes": 12,
}  # fmt: skip
TOKENS = tuple((SIDE // stride) ** 2 for stride in (4, 8, 16))
ONCE, NAIVE = ((1,), (1,), (1,)), {**SMALL, "np_mlp_ratio": 0.0}
FIRST_ONCE = ((1,), (1, 1), (1, 1))
RIVAL, LONGER = "unsliced, first stage once", "once, trained longer"
SETTINGS: dict[str, dict[str, Any]] = {
    "sliced": {**SMALL, "groups": SLICED},
    "whole": {**SMALL, "groups": WHOLE},
    "alone": {**SMALL, "groups": tuple((tokens, tokens) for tokens in TOKENS)},
    RIVAL: {**SMALL, "groups": FIRST_ONCE},
    "once": {**NAIVE, "groups": ONCE},
    "twice": {**NAIVE, "groups": WHOLE},
    "frozen": {**NAIVE, "groups": ONCE, "depths": tuple(2 * depth for depth in DEPTHS)},
    "unshared": {**NAIVE, "groups": ONCE, "depths": tuple(2 * depth for depth in DEPTHS)},
    LONGER: {**NAIVE, "groups": ONCE},
}
"""Arms: the first four have projections, as published; the others have none, so that recursion adds no parameter."""

SLICING = Operator("attention of a recursive transformer", free="the same network unsliced, by torch's fused attention")
RECURSION = Operator("depth of a transformer", free="the network without recursion, trained for as many operations")
DEPARTURES = {
    "data": "crops of 32 pixels of twelve photographs: ImageNet comes with no package",
    "net": "widths of 16, 32 and 64, blocks (1, 2, 1), 64 tokens in the first stage, no stochastic depth: it trains in seconds",
    "training": f"{STEPS} steps of 48 crops, AdamW, with the rate of each arm searched",
}
PAPER: dict[str, Any] = {"data": "ImageNet-1K", "net": "SReT-T at 224 pixels", "training": "300 epochs of 1024 images"}


def make(arm: str) -> nn.Module:
    """A small untrained network for grey crops: one of `SETTINGS`.

    "alone" lets every token see itself only, "frozen" has in the place of every second use a block that stays as it was drawn.
    """
    model = SReT(**SETTINGS[arm])
    if arm == "frozen":
        for stage in model.transformers:
            for block in list(stage.get_submodule("blocks").children())[1::2]:
                block.requires_grad_(False)
    return model


@cache
def _work_of_recursion() -> float:
    """Multiply-adds of a step with both uses of each block over those with one: the stem and the head are run once in both."""
    images = torch.zeros(1, 1, SIDE, SIDE)
    return _cost(make("twice"), images)["macs"] / _cost(make("once"), images)["macs"]


def steps_of(arm: str, steps: int) -> int:
    """How many steps an arm is trained for: the longer training costs what the recursion costs."""
    return round(steps * _work_of_recursion()) if arm == LONGER else steps


@searched(RATES, arms=tuple(SETTINGS), grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def rate_score(arm: str, rate: float) -> float:
    """The share of wrong crops of the part for choices."""
    return error_for_choice(partial(make, arm), rate, steps_of(arm, STEPS), size=SIDE)


def shown(arms: Sequence[str], steps: int) -> dict[str, Judged]:
    """Every arm trained with three seeds."""
    return {arm: judged(partial(make, arm), chosen(RATES, arm), steps_of(arm, steps), size=SIDE) for arm in arms}


def trained(found: dict[str, Judged]) -> dict[str, Trained]:
    """For the record."""
    return {arm: each.trained for arm, each in found.items()}


def _cost(model: nn.Module, images: Tensor) -> dict[str, int]:
    cost = count_cost(model.eval(), images)
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": int(cost.macs)}


# ---------------------------------------------------------------------------------------------------------------- slices


@experiment(
    "sret/slicing-saving",
    points={
        "smoke": [{"model": "sret_t", "size": 64, "batch": 1, "steps": 4}],
        "small": [{"model": "sret_t", "size": 224, "batch": 8, "steps": STEPS}],
        "full": [
            {"model": model, "size": size, "batch": 16, "steps": STEPS}
            for model in ("sret_t", "sret_s")
            for size in (224, 512)
        ],
    },
    decides={"full": {"model": "sret_t", "size": 224, "batch": 16, "steps": STEPS}},
    operator=SLICING,
    guard=Guard(
        "accuracy on held-out crops, per cent",
        MARGIN,
        higher_is_better=True,
        relative=False,
        without={"random": "which tokens share a slice is random by design in every use but the first"},
    ),
    paper={"model": "sret_t", "size": 224, "metric": "multiply-adds", **PAPER},
    departures={
        "metric": "time of a forward pass on this machine, with the multiply-adds in the details: operations saved are not time saved",
        **DEPARTURES,
    },
    refuted_if="the whole interval of the time saved lies below 0 per cent",
    measured_here="time of a forward pass at the published size, and accuracy of small networks trained with and without slices",
    minutes=20,
)
def slicing_saving(model: str, size: int, batch: int, steps: int) -> Trial:
    """A forward pass of the published network sliced and unsliced: same weights, both on torch's fused attention.

    Quality is the accuracy of small networks. With the method deleted every token attends to itself only; the rival, timed as an arm too,
    spends about as few multiply-adds without slices: the blocks of its first stage are used once.
    """
    torch.manual_seed(0)
    sliced = SReT(**CONFIGS[model]).eval()
    whole = SReT(**{**CONFIGS[model], "groups": WHOLE}).eval()
    whole.load_state_dict(sliced.state_dict())
    rival = SReT(**{**CONFIGS[model], "groups": FIRST_ONCE}).eval()
    images = torch.randn(batch, 3, size, size)
    found: dict[str, Judged] = {}

    def run(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            out: Tensor = network(images)
        return out

    def quality() -> Quality:
        found.update(shown(("sliced", "whole", "alone", RIVAL), steps))
        controls = {"deleted": found["alone"], "rival": found[RIVAL]}
        return guarded(found["sliced"], found["whole"], controls, RIVAL)

    def details() -> dict[str, Any]:
        macs = {
            name: int(count_cost(network, images).macs) // batch
            for name, network in (("sliced", sliced), ("whole", whole), (RIVAL, rival))
        }
        small = torch.zeros(1, 1, SIDE, SIDE)
        return {
            "macs": macs,
            "macs saved, %": 100 * (1 - macs["sliced"] / macs["whole"]),
            "small networks": {arm: _cost(make(arm), small) for arm in found},
            "accuracy": {arm: each.accuracy for arm, each in found.items()},
        }

    return Trial(
        baseline=lambda: run(whole),
        candidate=lambda: run(sliced),
        arms={RIVAL: lambda: run(rival)},
        quality=quality,
        trained=lambda: trained(found),
        details=details,
    )


# ---------------------------------------------------------------------------------------------------------------- recursion


@experiment(
    "sret/recursion-gain",
    points={"smoke": [{"steps": 4}], "small": [{"steps": STEPS}], "full": [{"steps": 10 * STEPS}]},
    operator=RECURSION,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of the accuracy over the network without recursion lies below 0 points",
    measured_here="points of accuracy on held-out crops of twelve photographs, small networks of the same parameters",
    minutes=30,
)
def recursion_gain(steps: int) -> Figure:
    """Points over the network that uses each block once: the naive recursion, two uses of each block, not a parameter more, no slices.

    Controls, as points over that network: the method deleted is that network itself (0); random, a second use with weights that stay as
    they were drawn; the rival, and free baseline, that network trained for more steps, as many multiply-adds as the recursion takes.
    Arms: the blocks of both uses unshared (twice the parameters), and the recursion with projections between, as published.
    Photographs and seeds are resampled.
    """
    found = shown(("once", "twice", "frozen", LONGER, "unshared", "whole"), steps)
    gain, low, high = difference(found["twice"], found["once"])
    over = {arm: difference(found[arm], found["once"])[0] for arm in ("frozen", LONGER, "unshared", "whole")}
    small = torch.zeros(1, 1, SIDE, SIDE)
    return Figure(
        gain,
        "points",
        low,
        high,
        baseline=0.0,
        free=over[LONGER],
        controls={"deleted": 0.0, "random": over["frozen"], "rival": over[LONGER]},
        arms={"both uses unshared": over["unshared"], "with projections, as published": over["whole"]},
        trained=trained(found),
        details={
            "accuracy": {arm: each.accuracy for arm, each in found.items()},
            "over the longer training": difference(found["twice"], found[LONGER]),
            "costs": {arm: {**_cost(make(arm), small), "steps": steps_of(arm, steps)} for arm in found},
        },
    )
