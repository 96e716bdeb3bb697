"""MS-MLP: is it as accurate as Swin at equal width and depth, does growing the mixing with the shift matter, and is it faster?

Accuracy is that of small networks which tell from a crop which of twelve photographs it is from (`training`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from assay.experiments.core import CONTROLS, Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.swin import photographs
from assay.experiments.vision.training import Judged, difference, error_for_choice, guarded, judged
from assay.measure.cost import count_cost
from assay.methods.core.vision.backbone import Backbone
from assay.methods.vision.ms_mlp import KERNELS, SHIFTS, MixShift, MsMlp, fuse_mixing
from assay.methods.vision.swin import Swin
from assay.workloads.pictures import PICTURES

ACCURACY = "ms_mlp/accuracy"
WIDTH, PATCH, STEPS = 32, 4, 100
DEPTHS, SWIN_DEPTHS = (3, 3), (2, 2)  # as MS-MLP-T's three blocks stand beside Swin-T's two: nearly equal work
MIXED = KERNELS[1:3]  # of the stages whose maps have 28 and 14 positions a side at 224 pixels: here 12 and 6
ZERO = (0,) * len(SHIFTS)

OPEN = "begins at 1, as if there were none, for a hundred steps do not open blocks that begin at 1e-6"
TRAINED = f"{STEPS} batches of 48 crops, the rates searched at the same budget; eight times as many at full, at the same rates"

BACKBONE = Operator(
    "an image backbone of given width and work", free="ConvNeXt: one depthwise 7 x 7 convolution in every block"
)


# ------------------------------------------------------------------------------------------------------- the networks compared


def mixing_of(arm: str, width: int, kernels: tuple[int, ...]) -> nn.Module:
    """What an arm has in the place of a block's shifting and mixing, maps (B, C, H, W) to the same shape."""
    ones = (1,) * len(kernels)
    if arm == "depthwise":
        return nn.Conv2d(width, width, 7, padding=3, groups=width)
    if arm == "random":
        picks = [torch.randperm(len(kernels)).tolist() for _ in range(2)]
        return MixShift(width, [kernels[pick] for pick in picks[0]], [SHIFTS[pick] for pick in picks[1]])
    arms = {"ms": (kernels, SHIFTS), "shift only": (ones, SHIFTS), "mix only": (kernels, ZERO)}
    return MixShift(width, *arms[arm])


ARMS = ("ms", "swin", "depthwise", "random", "shift only", "mix only")


def network(arm: str) -> Backbone:
    """An untrained network of an arm for grey crops and twelve classes; arms of one seed that mix alike begin alike.

    Layer scale begins at 1: blocks begin as open as Swin's. From the paper's 1e-6 they would stay all but shut for as few steps as these,
    so that no arm could differ from another by what it mixes.
    """
    shape: dict[str, Any] = {"num_classes": len(PICTURES), "in_chans": 1, "embed_dim": WIDTH, "patch_size": PATCH}
    if arm == "swin":
        return Swin(depths=SWIN_DEPTHS, num_heads=(2, 4), window_size=3, drop_path_rate=0.0, **shape)
    model = MsMlp(depths=DEPTHS, kernels=MIXED, drop_path_rate=0.0, layer_scale=1.0, **shape)
    for stage, width, kernels in zip(model.layers, model.channels, MIXED, strict=True):
        for block in stage.blocks:  # type: ignore[union-attr]
            block.mix = mixing_of(arm, width, kernels)
    return model


@cache
def work(arm: str) -> int:
    """Multiply-accumulates of a crop; those of "random" vary by less than two hundredths: the last group is smaller."""
    return count_cost(network(arm).eval(), torch.zeros(1, 1, 48, 48)).macs


@searched(ACCURACY, arms=ARMS, grid=(1e-3, 3e-3, 1e-2, 3e-2))
def score(arm: str, rate: float) -> float:
    return error_for_choice(lambda: network(arm), rate, STEPS)


@cache
def learned(arm: str, steps: int, seeds: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(lambda: network(arm), chosen(ACCURACY, arm), steps, seeds=tuple(range(1, seeds + 1)))


# ------------------------------------------------------------------------------------------------------------------- accuracy


@experiment(
    "ms_mlp/imagenet-accuracy-base",
    points={
        "smoke": [{"steps": 4, "seeds": 3}],
        "small": [{"steps": STEPS, "seeds": 3}],
        "full": [{"steps": 8 * STEPS, "seeds": 5}],
    },
    operator=BACKBONE,
    paper={"data": "ImageNet-1K", "net": "MS-MLP-B", "layer scale": 1e-6, "seeds": 1},
    departures={
        "data": "crops of 48 pixels of twelve photographs, told apart by the photograph they are from: ImageNet comes with no package",
        "net": f"two stages of three blocks, {WIDTH} and {2 * WIDTH} channels, kernels of the second and third stage; "
        "Swin with two blocks a stage and windows of 3: trained in seconds",
        "layer scale": OPEN,
        "seeds": "3 (5 at full), and photographs and seeds are resampled for the interval",
        "steps": TRAINED,
    },
    refuted_if="the whole interval of the accuracy lies below that of Swin with as much work",
    measured_here="accuracy on held-out crops of twelve photographs",
    minutes=60,
)
def accuracy(steps: int, seeds: int) -> Figure:
    """Accuracy in per cent, of small networks, beside Swin with two blocks for three (83.8 and 83.5 % on ImageNet at size B).

    All arms see the same crops in the same order; the interval is that of the difference from Swin. Controls: the shift left out, the
    same kernels and shifts dealt out to the groups at random, and as the rival shifts alone, as AS-MLP has them.
    """
    found = {arm: learned(arm, steps, seeds) for arm in ARMS}
    base = found["swin"].accuracy
    gap, low, high = difference(found["ms"], found["swin"])
    return Figure(
        base + gap,
        "%",
        base + low,
        base + high,
        baseline=base,
        free=found["depthwise"].accuracy,
        controls={
            "deleted": found["mix only"].accuracy,
            "random": found["random"].accuracy,
            "rival": found["shift only"].accuracy,
        },
        trained={arm: each.trained for arm, each in found.items()},
        details={
            "over": {arm: difference(found["ms"], found[arm]) for arm in ARMS if arm != "ms"},
            "by photograph": {
                arm: dict(zip(PICTURES, each.right.mean(0).tolist(), strict=True)) for arm, each in found.items()
            },
            "macs": {arm: work(arm) for arm in ARMS},
        },
    )


# ---------------------------------------------------------------------------------------------------------------------- speed


@experiment(
    "ms_mlp/faster-than-swin",
    points={
        "smoke": [{"embed_dim": 32, "size": 64, "batch": 1, "steps": 4, "seeds": 3}],
        "small": [{"embed_dim": 96, "size": 224, "batch": 4, "steps": STEPS, "seeds": 3}],
        "full": [{"embed_dim": 96, "size": 224, "batch": 64, "steps": 8 * STEPS, "seeds": 5}],
    },
    operator=BACKBONE,
    guard=Guard(
        "accuracy on held-out crops of twelve photographs",
        2.0,
        higher_is_better=True,
        relative=False,
    ),
    paper={"embed_dim": 96, "size": 224, "device": "a GPU that is not named", "mixing": "ten convolutions a block"},
    departures={
        "device": "this machine's processor, float32; batches of 4 photographs (64 at full)",
        "mixing": "the same sums in fewer and larger calls; ten convolutions a block, as released, are an arm",
        "quality": "of small networks on crops of twelve photographs: no ImageNet here",
        "layer scale": OPEN,
        "steps": TRAINED,
    },
    refuted_if="the whole interval of the speed-up over Swin lies below 1, or fused mixing does not compute what mixing as released does",
    refutes=lambda record: record["measured"]["high"] < 1 or record["details"]["fused apart"] > 1e-3,
    measured_here="images a second of size T on this machine's processor",
    minutes=60,
)
def faster_than_swin(embed_dim: int, size: int, batch: int, steps: int, seeds: int) -> Trial:
    """MS-MLP-T with fused mixing against Swin-T on photographs, random weights; 4.44 and 4.49 G multiply-accumulates an image.

    The guard: small networks of the kind may lose two points to small Swins of nearly equal work. Controls as in the claim on
    accuracy: mixing without shifts; kernels and shifts dealt out at random. The rival is ConvNeXt, and what is timed as free is
    transformers' ConvNeXt-T. Arm: mixing as released, ten convolutions a block.
    """
    from transformers import ConvNextConfig, ConvNextForImageClassification

    images = photographs(batch, size)
    torch.manual_seed(0)
    plain = MsMlp(embed_dim=embed_dim, layer_scale=1.0).eval()
    swin = Swin(embed_dim=embed_dim, num_heads=[embed_dim * 2**stage // 32 for stage in range(4)]).eval()
    widths = [embed_dim * 2**stage for stage in range(4)]
    config = ConvNextConfig(hidden_sizes=widths, num_labels=1000)
    convnext = ConvNextForImageClassification(config).eval()
    fused = fuse_mixing(plain)

    def run(model: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return model(images)

        return call

    arms = {"ms": "ms", "swin": "swin", "deleted": "mix only", "random": "random", "rival": "depthwise"}

    def quality() -> Quality:
        found = {name: learned(arm, steps, seeds) for name, arm in arms.items()}
        controls = {name: found[name] for name in CONTROLS}
        return guarded(found["ms"], found["swin"], controls, "ConvNeXt")

    def trained() -> dict[str, Trained]:
        return {arm: learned(arm, steps, seeds).trained for arm in arms.values()}

    @torch.inference_mode()
    def details() -> dict[str, Any]:
        one = images[:1]
        expected = plain(one)
        return {
            "macs": {
                name: count_cost(model, one).macs
                for name, model in (("ms", plain), ("fused", fused), ("swin", swin), ("convnext", convnext))
            },
            "fused apart": float((fused(one) - expected).abs().max() / expected.abs().max()),
        }

    return Trial(
        run(swin),
        run(fused),
        free=run(convnext),
        arms={"mixing as released": run(plain)},
        quality=quality,
        trained=trained,
        details=details,
        pairs=12,
    )
