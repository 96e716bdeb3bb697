"""T2T-ViT: what tokens made step by step gain over a ViT's hard patches, what they cost, and what linear attention saves in making them.

ImageNet comes with no package: accuracies are those of small networks on crops of twelve photographs. Parameters, multiply-adds and times
are those of the published networks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.training import Judged, difference, error_for_choice, guarded, judged
from assay.measure.cost import count_cost
from assay.methods.vision.t2t_vit import CONFIGS, RandomFeatureAttention, SoftSplit, T2TViT, TokensToToken

RATES = "t2t_vit/accuracy"
SIDE, STEPS = 32, 120  # pixels of a crop, steps: our choice, what two cores train in minutes
MARGIN = 3.0  # points of accuracy
VIT_S: dict[str, Any] = {
    "embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0, "tokens_type": "patches", "input_size": 224,
}  # fmt: skip
"""The ViT-S/16 that the paper compares with: wide and shallow, on hard patches."""
DEIT_S: dict[str, Any] = {
    "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0, "tokens_type": "patches", "input_size": 224,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "token_dim": 16, "splits": ((3, 2, 1),) * 3,
    "input_size": SIDE, "in_chans": 1, "num_classes": 12,
}  # fmt: skip
WIDE = {**SMALL, "embed_dim": 160, "depth": 2, "tokens_type": "patches"}
"""As ViT-S is to T2T-ViT-14: at least twice the parameters and multiply-adds, in half the layers."""
ARMS = ("t2t", "softmax", "values only", "patches", "convolution", "scattered", "vit")

TOKENS = Operator(
    "the tokens of a vision transformer", free="a stem of three strided convolutions before the same layers"
)
MODULE = Operator("attention of a token block", free="softmax by torch's fused attention")
DEPARTURES = {
    "data": "crops of 32 pixels of twelve photographs: ImageNet comes with no package",
    "net": "a width of 64 and 4 layers after three splits of 3 x 3 at stride 2: 16 tokens, which train in seconds",
    "training": f"{STEPS} steps of 48 crops, AdamW, with the rate of each arm searched; weights drawn for the width of their layer",
}
PAPER: dict[str, Any] = {
    "data": "ImageNet-1K",
    "net": "T2T-ViT-14 at 224 pixels",
    "training": "310 epochs of 512 images",
}


class Scattered(SoftSplit):
    """A soft split of the same shape and cost whose windows hold pixels from anywhere, always the same ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(scattered(x))

    def fused(self, x: Tensor, linear: nn.Linear) -> Tensor:
        return super().fused(scattered(x), linear)


def scattered(x: Tensor) -> Tensor:
    """The pixels of a map (B, C, H, W) in a random order, one for each size."""
    height, width = x.shape[2:]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    return x.flatten(2)[..., order].unflatten(2, (height, width))


class ValuesOnly(nn.Module):
    """In the place of a token block's attention: every token sees itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v


def make(arm: str) -> nn.Module:
    """A small untrained network for grey crops: one of `ARMS`. "values only" leaves out the attention in the token blocks.

    In all of them weights, those of hard patches too, are drawn with a deviation of (inputs)^-1/2: with the published 0.02 a picture would
    reach layers as narrow as these 50 times smaller than the positions that are added.
    """
    kinds = {"softmax": "transformer", "patches": "patches", "convolution": "convolution"}
    model = T2TViT(**(WIDE if arm == "vit" else {**SMALL, "tokens_type": kinds.get(arm, "performer")}))
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    tokens = model.tokens_to_token
    if arm == "scattered":
        tokens.splits = nn.ModuleList(Scattered(*split) for split in SMALL["splits"])
    if arm == "values only":
        for module in [
            block for block in tokens.modules() if isinstance(getattr(block, "features", None), RandomFeatureAttention)
        ]:
            module.features = ValuesOnly()
    return model


@searched(RATES, arms=ARMS, grid=(1e-3, 3e-3, 1e-2))
def rate_score(arm: str, rate: float) -> float:
    """The share of wrong crops of the part for choices."""
    return error_for_choice(partial(make, arm), rate, STEPS, size=SIDE)


def shown(arms: tuple[str, ...], steps: int) -> dict[str, Judged]:
    """Every arm trained with three seeds."""
    return {arm: judged(partial(make, arm), chosen(RATES, arm), steps, size=SIDE) for arm in arms}


def trained(found: dict[str, Judged]) -> dict[str, Trained]:
    """For the record; pixels from anywhere need not teach anything, and are held to no floor."""
    return {arm: each.trained for arm, each in found.items() if arm != "scattered"}


# --------------------------------------------------------------------------------------------------------- accuracy from scratch


@experiment(
    "t2t_vit/scratch-gain",
    points={"smoke": [{"steps": 4}], "small": [{"steps": STEPS}], "full": [{"steps": 10 * STEPS}]},
    operator=TOKENS,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of its accuracy over the wide, shallow ViT's lies below 0 points",
    measured_here="points of accuracy on held-out crops of twelve photographs, small networks trained from scratch",
    minutes=30,
)
def scratch_gain(steps: int) -> Figure:
    """Points over a ViT on hard patches with at least twice the parameters and multiply-adds, all trained for as many steps.

    Controls, as points over that ViT too: hard patches before the same deep, narrow layers (the method deleted), soft splits of pixels
    from anywhere (random), a stem of convolutions (the cheapest rival, and the free baseline). Photographs and seeds are resampled.
    """
    found = shown(("t2t", "vit", "patches", "scattered", "convolution"), steps)
    gain, low, high = difference(found["t2t"], found["vit"])
    over = {arm: difference(found[arm], found["vit"])[0] for arm in ("patches", "scattered", "convolution")}
    costs = {arm: _cost(make(arm)) for arm in found}
    return Figure(
        gain,
        "points",
        low,
        high,
        baseline=0.0,
        free=over["convolution"],
        controls={"deleted": over["patches"], "random": over["scattered"], "rival": over["convolution"]},
        trained=trained(found),
        details={
            "accuracy": {arm: each.accuracy for arm, each in found.items()},
            "over hard patches": difference(found["t2t"], found["patches"]),
            "over convolutions": difference(found["t2t"], found["convolution"]),
            "costs": costs,
        },
    )


def _cost(model: nn.Module) -> dict[str, int]:
    cost = count_cost(model.eval(), torch.zeros(1, 1, SIDE, SIDE))
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": int(cost.macs)}


# --------------------------------------------------------------------------------------------------------- the cost of a ViT


@experiment(
    "t2t_vit/half-the-cost",
    points={
        "smoke": [{"model": "t2t_vit_14"}],
        "small": [{"model": "t2t_vit_14"}, {"model": "t2t_vit_t_14"}],
        "full": [{"model": "t2t_vit_14"}, {"model": "t2t_vit_t_14"}],
    },
    decides={"small": {"model": "t2t_vit_14"}, "full": {"model": "t2t_vit_14"}},
    operator=Operator("a vision transformer", free="a ViT as deep and narrow on hard patches (DeiT-S)"),
    paper={"model": "t2t_vit_14"},
    refuted_if="T2T-ViT-14 has more than half the parameters or multiply-adds of ViT-S/16",
    computed="parameters and multiply-adds follow from the published sizes",
)
def half_the_cost(model: str) -> Figure:
    """The smaller of two ratios: parameters and multiply-adds (1 MAC = 2 operations) of ViT-S/16 over those of the model, at 224 pixels.

    The free baseline is the same ratio for DeiT-S, hard patches before narrow layers: the saving comes from the shape of the layers.
    """
    counts = {
        name: _published(settings)
        for name, settings in {model: CONFIGS[model], "vit_s": VIT_S, "deit_s": DEIT_S}.items()
    }

    def ratio(name: str) -> float:
        return min(counts["vit_s"][what] / counts[name][what] for what in ("parameters", "macs"))

    return Figure(ratio(model), "x", baseline=1.0, free=ratio("deit_s"), details=counts)


def _published(settings: dict[str, Any]) -> dict[str, int]:
    """Counted on the meta device; the tables without gradient are left out."""
    with torch.device("meta"):
        model, images = T2TViT(**settings).eval(), torch.zeros(1, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": parameters, "macs": int(count_cost(model, images).macs)}


# --------------------------------------------------------------------------------------------------------- linear attention


@experiment(
    "t2t_vit/token-module-speedup",
    points={
        "smoke": [{"size": 64, "batch": 1, "steps": 4}],
        "small": [{"size": 224, "batch": 4, "steps": STEPS}],
        "full": [{"size": size, "batch": 16, "steps": STEPS} for size in (224, 384)],
    },
    decides={"full": {"size": 224, "batch": 16, "steps": STEPS}},
    operator=MODULE,
    guard=Guard(
        "accuracy on held-out crops, per cent",
        MARGIN,
        higher_is_better=True,
        relative=False,
        without={"random": "random features are the method: another draw is the method again"},
    ),
    paper={"size": 224, "data": "ImageNet-1K", "net": "T2T-ViT-14", "training": "310 epochs of 512 images"},
    departures={name: DEPARTURES[name] for name in ("data", "net", "training")},
    refuted_if="the whole interval of softmax's time over that of random features lies below 1",
    measured_here="time of the whole module at the published size, and accuracy of small networks trained with each attention",
    minutes=20,
)
def token_module_speedup(size: int, batch: int, steps: int) -> Trial:
    """The module that makes the tokens (two token blocks, 3136 and 784 tokens at 224 pixels) with softmax and with random features.

    The paper's baseline makes the matrix of all pairs, the free one is torch's fused attention. Arms: three convolutions in the place of
    the module. Quality is the accuracy of small networks; with the method deleted, every token of a token block sees itself only; the
    rival is the stem of convolutions.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    kinds = {"performer": "performer", "softmax": "transformer", "convolution": "convolution"}
    modules = {name: TokensToToken(3, 384, kind).eval() for name, kind in kinds.items()}  # type: ignore[arg-type]
    images = torch.randn(batch, 3, size, size)
    found: dict[str, Judged] = {}

    def run(name: str) -> Tensor:
        with torch.inference_mode():
            *_, last = modules[name].maps(images)
        return last

    def explicit() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run("softmax")

    def quality() -> Quality:
        found.update(shown(("t2t", "softmax", "values only", "convolution"), steps))
        controls = {"deleted": found["values only"], "rival": found["convolution"]}
        return guarded(found["t2t"], found["softmax"], controls, "three strided convolutions")

    def details() -> dict[str, Any]:
        from assay.measure.memory import peak_memory

        memory = {name: peak_memory(partial(run, name)) for name in modules}
        memory["softmax, all pairs"] = peak_memory(explicit)
        return {
            "macs": {name: int(count_cost(partial(run, name)).macs) // batch for name in modules},
            "extra_bytes": {name: seen.extra_bytes if seen else None for name, seen in memory.items()},
            "accuracy by seed": {arm: np.round(100 * each.right.mean(1), 2).tolist() for arm, each in found.items()},
        }

    return Trial(
        baseline=explicit,
        candidate=lambda: run("performer"),
        free=lambda: run("softmax"),
        arms={"three strided convolutions": lambda: run("convolution")},
        quality=quality,
        trained=lambda: trained(found),
        details=details,
    )
