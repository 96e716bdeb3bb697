"""Res-VMamba: what skip paths around the stages are worth, learned or random, and how its time compares with a vision transformer's."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.training import SIZE, Judged, difference, error_for_choice, judged
from assay.methods.core.vision.backbone import classifier
from assay.methods.vision import build
from assay.methods.vision.res_vmamba import SS2D, ResVMamba
from assay.workloads.images import photograph

SKIPPING = Operator("a skip path around a stage", free="the pooled map with zeros for the new channels, no parameters")
MIXING = Operator("mixing the patches of an image", free="a vision transformer with torch's fused attention")
SMALL: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1), "patch_size": 6}  # what is trained: 64, 16 and 4 cells
STEPS = 60
VIT: Any = ViTConfig  # its base class takes further settings
WIDTHS = {"res_vmamba_tiny": 384, "res_vmamba_small": 576}
"""Of the vision transformers that have about as many parameters: 12 layers, heads of 64 channels, patches of 16 pixels."""
PATHS = ("learned", "none", "frozen_random", "redrawn", "zeros")
OTHERS = ("no scan", "random order", "attention")


class Zeros(nn.Module):
    """The free skip path: the pooled map, and zeros in the channels that the stage adds."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
        return F.pad(pooled, (0, x.shape[3]))


class NoScan(nn.Module):
    """In the place of a selective scan: each cell as it is."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class Shuffled(nn.Module):
    """A selective scan along a random order of the cells, the same in every run; maps of one size only."""

    def __init__(self, ssm: nn.Module) -> None:
        super().__init__()
        self.ssm = ssm
        self.seed = int(torch.randint(2**31, ()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(self.seed))
        y, h = self.ssm(x[:, order])
        return y[:, order.argsort()], h


class Attentive(nn.Module):
    """A small vision transformer with torch's fused attention, read by the mean over its cells as ours is: images to logits.

    Its weights begin as torch's layers do: the published deviation of 0.02 is for wide layers, and lets narrow ones learn late.
    """

    def __init__(self) -> None:
        super().__init__()
        config = VIT(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, image_size=SIZE, patch_size=6,
            num_channels=1, attn_implementation="sdpa",
        )  # fmt: skip
        self.model: Any = ViTModel(config, add_pooling_layer=False)
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()
        self.head = classifier(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.model(x).last_hidden_state[:, 1:].mean(1))
        return logits


def network(arm: str) -> nn.Module:
    """An untrained network of an arm for grey crops. All random choices come from the seed that stands when it is made."""
    if arm == "attention":
        return Attentive()
    residual: Any = arm if arm in ("none", "frozen_random", "redrawn") else "learned"
    model = ResVMamba(**SMALL, residual=residual, num_classes=12, in_chans=1)
    if arm == "zeros":
        model.shortcuts = nn.ModuleList(Zeros() for _ in model.shortcuts)
    for module in model.modules():
        if isinstance(module, SS2D):
            if arm == "no scan":
                module.directions = nn.ModuleList(NoScan() for _ in module.directions)
            elif arm == "random order":
                module.directions = nn.ModuleList(Shuffled(ssm) for ssm in module.directions)
    return model


@searched("res_vmamba/crops", arms=PATHS + OTHERS, grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def crops_error(arm: str, rate: float) -> float:
    """The share of wrong crops of the parts for choices."""
    return error_for_choice(functools.partial(network, arm), rate, STEPS)


def transformer(name: str, size: int, attention: str) -> nn.Module:
    """The vision transformer that `name` is timed against, with one of the implementations of attention in transformers."""
    width = WIDTHS[name]
    config = VIT(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=width // 64, intermediate_size=4 * width,
        image_size=size, num_labels=1000, attn_implementation=attention,
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(config).eval()
    return model


def shown(arm: str, steps: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(functools.partial(network, arm), chosen("res_vmamba/crops", arm), steps)


DATA = {
    "data": "crops of 48 pixels of twelve photographs, judged on parts that no crop for training reaches into: textures, as food is",
    "net": "three stages of one block each, 16 channels at first, cells of 6 x 6 pixels",
    "steps": "60 batches of 48 crops, the rates searched at the same budget; ten times as many at full",
    "training": "crops mirrored at random, all weights decay: no mixup, cutmix, smoothed labels or drop path; attention's weights are "
    "drawn for its width",
}


@experiment(
    "res_vmamba/cnfood-accuracy",
    points={"smoke": [{"steps": 2}], "small": [{"steps": STEPS}], "full": [{"steps": 10 * STEPS}]},
    operator=SKIPPING,
    paper={
        "data": "CNFOOD-241",
        "net": "VMamba-S",
        "size": 224,
        "steps": "300 passes over the data",
        "residual": "redrawn",
    },
    departures=DATA
    | {"residual": "learned, as the text has it; the released code draws the projections anew in every call: an arm"},
    measured_here="accuracy on crops of twelve photographs",
    refuted_if="the whole interval of the accuracy with learned skip paths lies below that of VMamba without them",
    minutes=30,
)
def cnfood_accuracy(steps: int) -> Figure:
    """Per cent of crops told right with learned skip paths; the paper's baseline is VMamba, which has none.

    Free and rival: skip paths without parameters. Controls: none (the method deleted) and projections drawn once and never trained.
    Arm: drawn anew in every call, in training and in use, as released; it decides nothing and is held to no floor. The interval is that of
    the paired gain over VMamba, photographs and seeds resampled.
    """
    found = {arm: shown(arm, steps) for arm in PATHS}
    base = found["none"].accuracy
    gain, low, high = difference(found["learned"], found["none"])
    return Figure(
        base + gain,
        "%",
        base + low,
        base + high,
        baseline=base,
        free=found["zeros"].accuracy,
        controls={"deleted": base, "random": found["frozen_random"].accuracy, "rival": found["zeros"].accuracy},
        arms={"projections drawn anew in every call, as released": found["redrawn"].accuracy},
        trained={arm: each.trained for arm, each in found.items() if arm != "redrawn"},
        details={
            "accuracy by seed": {arm: (100 * each.right.mean(1)).tolist() for arm, each in found.items()},
            "gain over none": {arm: list(difference(each, found["none"])) for arm, each in found.items()},
            "learned over as released": list(difference(found["learned"], found["redrawn"])),
        },
    )


@experiment(
    "res_vmamba/time-over-vit",
    points={
        "smoke": [{"name": "res_vmamba_tiny", "size": 64, "batch": 1, "steps": 2}],
        "small": [{"name": "res_vmamba_tiny", "size": 224, "batch": 1, "steps": STEPS}],
        "full": [{"name": "res_vmamba_small", "size": 224, "batch": 8, "steps": 10 * STEPS}],
    },
    operator=MIXING,
    guard=Guard(
        "accuracy on crops of the held-out parts of twelve photographs", 0.05, higher_is_better=True, relative=False
    ),
    paper={"name": "res_vmamba_small", "size": 224, "device": "a GPU"},
    departures=DATA
    | {
        "name": "Tiny at small, Small at full, next to a ViT/16 of 12 layers and about as many parameters (384 or 576 wide)",
        "device": "this machine's processor, float32: the scans are a compiled kernel, attention is torch's",
    },
    refuted_if="Res-VMamba is certainly slower than a vision transformer that stores its scores",
    minutes=30,
)
def time_over_vit(name: str, size: int, batch: int, steps: int) -> Trial:
    """One forward pass of each whole network over a photograph: Res-VMamba, and a ViT that stores its scores or does not.

    Quality: small networks of both kinds at equal steps. Deleted: cells are convolved and not scanned; random: scanned along random orders;
    rival: VMamba without the skip paths.
    """
    x = F.interpolate(photograph("china")[None], size=(size, size), mode="bilinear", antialias=True).expand(
        batch, -1, -1, -1
    )
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        "Res-VMamba": build(name).eval(),
        "vision transformer": transformer(name, size, "eager"),
        "fused": transformer(name, size, "sdpa"),
    }
    trained: dict[str, Any] = {}

    def quality() -> Quality:
        found = {arm: shown(arm, steps) for arm in ("learned", "none", *OTHERS)}
        gain, low, high = (points / 100 for points in difference(found["learned"], found["attention"]))
        base = found["attention"].accuracy / 100
        trained.update({arm: found[arm].trained for arm in ("learned", "none", "attention")})
        controls = {"deleted": "no scan", "random": "random order", "rival": "none"}
        return Quality(
            base + gain, base, base + low, base + high,
            controls={control: found[arm].accuracy / 100 for control, arm in controls.items()},
            rival="VMamba without skip paths",
        )  # fmt: skip

    def details() -> dict[str, Any]:
        counts = {arm: _cost(models[arm], x) for arm in ("Res-VMamba", "vision transformer")}
        return {"parameters and MACs": counts}

    return Trial(
        functools.partial(_run, models["vision transformer"], x),
        functools.partial(_run, models["Res-VMamba"], x),
        free=functools.partial(_run, models["fused"], x),
        quality=quality,
        trained=lambda: trained,
        details=details,
    )


@torch.inference_mode()
def _run(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def _cost(model: nn.Module, x: Tensor) -> dict[str, int]:
    from assay.measure.cost import count_cost

    found = count_cost(model, x)
    return {"parameters": found.params, "macs": found.macs}
