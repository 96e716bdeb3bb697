"""PEM: whether one pixel a head serves a mask query as well as attention to all, and what the layer and the network cost.

Quality is that of small networks which segment digits on photographs of textures (`scenes`): panoptic quality, and mean IoU beside it.
All of them are one network, of which the cross-attention differs. Times and counts are those of the published sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.scenes import (
    Scored,
    error_for_choice,
    gap,
    guarded,
    level,
    pixels,
    scenes,
    scored,
)
from assay.measure.cost import count_cost
from assay.measure.detection import confusion, mean_iou, panoptic_quality
from assay.measure.detection import panoptic as panoptic_table
from assay.methods.core.vision.blocks import ConvNormAct
from assay.methods.vision.pem import (
    LossSettings,
    MaskedCrossAttention,
    Pem,
    PrototypeCrossAttention,
    build_pem,
    panoptic,
    semantic,
    set_loss,
)
from assay.methods.vision.pem.backbones import Pyramid
from assay.workloads.digit_scenes import CLASSES, Scene

QUALITY = "pem/quality"
SIDE, BATCH = 64, 8
STEPS, SEARCHED, LITTLE = 2000, 500, 100
"""Steps of a network that is judged, of one that a rate is chosen by, and of one for which there are only minutes."""
CHANNELS, WIDTH, QUERIES, POINTS = (16, 24, 32, 48), 32, 16, 256
TEXTURE, THINGS = 0, tuple(range(1, CLASSES + 1))
THRESHOLD = 0.5  # of a query's class: transformers' own; the published 0.8 is of networks that trained for days
MARGIN = 3.0  # points of panoptic quality

# ------------------------------------------------------------------------------------------------------- the networks compared


class SmallBackbone(Pyramid):
    """Two 3 x 3 convolutions at each of the strides 2, 4, 8 and 16."""

    strides = (2, 4, 8, 16)
    channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        before = (3, *CHANNELS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(ConvNormAct(a, b, 3, stride=2), ConvNormAct(b, b, 3))
            for a, b in zip(before, CHANNELS, strict=True)
        )

    def stem(self, x: Tensor) -> Tensor:
        return x


class RandomPixels(PrototypeCrossAttention):
    """The same layer, which takes for each query and head any pixel of its mask."""

    def prototypes(self, queries: Tensor, pixels: Tensor, seen: Tensor | None) -> Tensor:
        scores = torch.rand(len(queries), self.heads, queries.shape[1], pixels.shape[1], device=pixels.device)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -1.0)
        sliced = pixels.unflatten(2, (self.heads, -1)).transpose(1, 2)
        found = sliced.gather(2, scores.argmax(-1)[..., None].expand(-1, -1, -1, sliced.shape[-1]))
        return found.transpose(1, 2).flatten(2)


class PooledPixels(PrototypeCrossAttention):
    """The same layer with the mean of the pixels of a query's mask: no similarity, and one product as large."""

    def prototypes(self, queries: Tensor, pixels: Tensor, seen: Tensor | None) -> Tensor:
        if seen is None:
            return pixels.mean(1, keepdim=True).expand_as(queries)
        return (seen / seen.sum(-1, keepdim=True)).to(pixels.dtype) @ pixels


class NoPixels(nn.Module):
    """Queries that see no pixel: the cross-attention is left out."""

    def forward(self, queries: Tensor, x: Tensor, **rest: Any) -> Tensor:
        return queries


CROSS: dict[str, Callable[[int, int], nn.Module]] = {
    "prototypes": PrototypeCrossAttention,
    "masked": MaskedCrossAttention,
    "random": RandomPixels,
    "pooled": PooledPixels,
    "none": lambda width, heads: NoPixels(),
}
ARMS = tuple(CROSS)


def network(arm: str) -> Pem:
    """An untrained network of an arm for the texture and ten digits."""
    return Pem(
        SmallBackbone(), num_classes=CLASSES + 1, conv_dim=WIDTH, mask_dim=WIDTH, width=WIDTH, heads=4, hidden=4 * WIDTH,
        queries=QUERIES, layers=3, cross=CROSS[arm],
    )  # fmt: skip


def loss(model: nn.Module, some: Sequence[Scene]) -> Tensor:
    """The set loss: of the texture, a segment of its own, and of every digit that is seen."""
    labels, masks = [], []
    for scene in some:
        there = scene.masks.flatten(1).any(1)
        labels.append(torch.cat([torch.tensor([TEXTURE]), scene.labels[there] + 1]))
        masks.append(torch.cat([(scene.semantic == TEXTURE)[None], scene.masks[there]]))
    return set_loss(model(pixels(some)), labels, masks, settings=LossSettings(points=POINTS))


def outcome(model: nn.Module, some: Sequence[Scene]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each scene a panoptic table and a confusion table."""
    found, size = model(pixels(some)), (some[0].image.shape[1], some[0].image.shape[2])
    segments = panoptic(found, THINGS, size, threshold=THRESHOLD).numpy()
    classes = semantic(found, size).argmax(1).numpy()
    return [
        (
            panoptic_table(segments[i], scene.panoptic.numpy(), things=THINGS, stuff=[TEXTURE]),
            confusion(classes[i], scene.semantic.numpy(), CLASSES + 1),
        )
        for i, scene in enumerate(some)
    ]


def pq(outcomes: Sequence[Any]) -> float:
    return panoptic_quality([table for table, _ in outcomes])


def miou(outcomes: Sequence[Any]) -> float:
    return mean_iou([table for _, table in outcomes])


@cache
def floor() -> float:
    """Panoptic quality on the held-out scenes where all is called texture."""
    tables = []
    for scene in scenes("heldout", SIDE):
        truth = scene.panoptic.numpy()
        tables.append(panoptic_table(np.zeros_like(truth), truth, things=THINGS, stuff=[TEXTURE]))
    return panoptic_quality(tables)


@searched(QUALITY, arms=ARMS, grid=(1e-3, 3e-3, 1e-2))
def score(arm: str, rate: float) -> float:
    return error_for_choice(lambda: network(arm), loss, outcome, pq, rate, SEARCHED, size=SIDE, batch=BATCH)


class Learned(NamedTuple):
    """An arm that was trained, by panoptic quality and by mean IoU."""

    pq: Scored
    miou: Scored


@cache
def learned(arm: str, steps: int, seeds: int) -> Learned:
    """An arm trained at its rate under each seed."""
    by_pq = scored(
        lambda: network(arm), loss, outcome, pq, chosen(QUALITY, arm), steps, size=SIDE, batch=BATCH,
        seeds=tuple(range(1, seeds + 1)),
    )  # fmt: skip
    return Learned(by_pq, Scored(by_pq.found, miou, by_pq.rate))


def trained(arms: Sequence[str], steps: int, seeds: int) -> dict[str, Trained]:
    return {arm: learned(arm, steps, seeds).pq.trained(floor(), "all texture") for arm in arms}


TASK_HERE = {
    "data": f"digits on photographs of textures, {SIDE} pixels a side: Cityscapes and ADE20K come with no package",
    "net": f"four maps of {CHANNELS} channels at strides 2 to 16, width {WIDTH}, {QUERIES} queries, three layers: trained in minutes",
    "seeds": "3, and scenes and seeds are resampled for the interval",
}
SCALES: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"steps": 4, "seeds": 3}],
    "small": [{"steps": LITTLE, "seeds": 3}],
    "full": [{"steps": STEPS, "seeds": 3}],
}
"""Small decides nothing about quality: after a hundred steps such a network still calls nearly everything texture."""
CROSS_ATTENTION = Operator(
    "cross-attention of mask queries to pixels", free="masked attention by torch's fused attention"
)
NETWORK = Operator("segmentation by mask queries", free="Mask2Former as transformers has it")


GUARD = Guard("panoptic quality on held-out scenes of digits, in points", MARGIN, higher_is_better=True, relative=False)


def quality(steps: int, seeds: int) -> Quality:
    """Panoptic quality of prototypes beside masked attention's, with the controls."""
    found = {arm: learned(arm, steps, seeds).pq for arm in ARMS}
    controls = {"deleted": found["none"], "random": found["random"], "rival": found["pooled"]}
    return guarded(found["prototypes"], found["masked"], controls, "the mean of the mask's pixels")


# ---------------------------------------------------------------------------------------------------------------- the quality


@experiment(
    "pem/real-time-quality",
    points=SCALES,
    operator=CROSS_ATTENTION,
    paper={"data": "Cityscapes, ADE20K", "net": "ResNet-50", "seeds": 1},
    departures=TASK_HERE | {"steps": "as many as such networks learn from in minutes"},
    refuted_if=f"the whole interval of the difference from masked attention lies more than {MARGIN:g} points below 0",
    tolerance=MARGIN,
    measured_here="panoptic quality of small networks on scenes of digits, against masked attention in the same network",
    minutes=240,
)
def real_time_quality(steps: int, seeds: int) -> Figure:
    """Points of panoptic quality that prototypes gain or lose over masked attention in the same network.

    A stand-in for Cityscapes, where PEM has 61.1 and Mask2Former 62.1 (79.9 and 79.4 % mean IoU). All arms see the same scenes in the
    same order. Controls, as differences from masked attention too: no cross-attention; any pixel of the query's mask; and as the rival
    the mean of the pixels of the mask. Mean IoU and the differences of all arms are in the details.
    """
    found = {arm: learned(arm, steps, seeds) for arm in ARMS}
    gaps = {arm: gap(each.pq, found["masked"].pq) for arm, each in found.items()}
    value, low, high = gaps["prototypes"]
    return Figure(
        value,
        "points",
        low,
        high,
        controls={"deleted": gaps["none"][0], "random": gaps["random"][0], "rival": gaps["pooled"][0]},
        trained=trained(("prototypes", "masked", "pooled"), steps, seeds),
        details={
            "panoptic quality": {arm: level(each.pq) for arm, each in found.items()},
            "mean IoU": {arm: level(each.miou) for arm, each in found.items()},
            "gaps": gaps,
            "gaps of mean IoU": {arm: gap(each.miou, found["masked"].miou) for arm, each in found.items()},
            "all texture": 100 * floor(),
        },
    )


# ------------------------------------------------------------------------------------------------------------------ the counts


def mask2former(num_labels: int = 19) -> nn.Module:
    """Mask2Former with ResNet-50 as transformers has it, in the published sizes, random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    stages: Any = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = ResNetConfig(**stages)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=num_labels)  # type: ignore[call-arg]
    model: nn.Module = Mask2FormerForUniversalSegmentation(config).eval()
    return model


@experiment(
    "pem/computation",
    points={
        "smoke": [{"height": 256, "width": 512}],
        "small": [{"height": 1024, "width": 2048}],
        "full": [{"height": 1024, "width": 2048}],
    },
    operator=NETWORK,
    paper={"height": 1024, "width": 2048},
    refuted_if="PEM takes as many multiply-accumulates as Mask2Former, or more",
    computed="multiply-accumulates follow from the published sizes",
    minutes=20,
)
def computation(height: int, width: int) -> Figure:
    """Multiply-accumulates of Mask2Former over PEM's, both with ResNet-50 and 19 classes, of one image (1 MAC = 2 operations).

    PEM is counted as released, with all its masks at full size; in use ours makes the earlier ones small (in the details). `arms`: each of
    the two parts alone.
    """
    images = torch.empty(1, 3, height, width, device="meta")
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            "Mask2Former": mask2former().to("meta"),  # one of its tensors is made on the processor
            "PEM": build_pem("pem_resnet50", num_classes=19).eval(),
            "PEM's pixel decoder, masked attention": build_pem(
                "pem_resnet50", num_classes=19, cross=MaskedCrossAttention
            ).eval(),
        }
    counts = {
        name: count_cost(model, images, **({} if name == "Mask2Former" else {"auxiliary": True})).macs
        for name, model in models.items()
    }
    in_use = count_cost(models["PEM"], images).macs
    return Figure(
        counts["Mask2Former"] / counts["PEM"],
        "x",
        baseline=1.0,
        arms={
            "masked attention on PEM's pixel decoder": counts["Mask2Former"]
            / counts["PEM's pixel decoder, masked attention"],
            "earlier masks made small": counts["Mask2Former"] / in_use,
        },
        details={
            "G multiply-accumulates": {name: value / 1e9 for name, value in counts.items()}
            | {"PEM in use": in_use / 1e9},
            "M parameters": {
                name: sum(value.numel() for value in model.parameters()) / 1e6 for name, model in models.items()
            },
        },
    )


# ------------------------------------------------------------------------------------------------------------------- the times


@experiment(
    "pem/cross-attention-speedup",
    points={
        "smoke": [{"height": 8, "width": 16, "queries": 20, "steps": 4, "seeds": 3}],
        "small": [{"height": 64, "width": 128, "queries": 100, "steps": LITTLE, "seeds": 3}],
        "full": [
            {"height": side, "width": 2 * side, "queries": 100, "steps": STEPS, "seeds": 3} for side in (32, 64, 128)
        ],
    },
    decides={"full": {"height": 64, "width": 128, "queries": 100, "steps": STEPS, "seeds": 3}},
    operator=CROSS_ATTENTION,
    guard=GUARD,
    paper={"height": 64, "width": 128, "queries": 100, "batch": 1, "device": "a GPU"},
    departures={
        "device": "this machine's processor, float32",
        "quality": "of small networks on scenes of digits: no Cityscapes here",
    },
    refuted_if="the whole interval of the speed-up over masked attention lies below 1",
    measured_here="one layer of 256 channels and 8 heads on a map of stride 16 of a Cityscapes image",
    minutes=240,
)
def cross_attention_speedup(height: int, width: int, queries: int, steps: int, seeds: int) -> Trial:
    """A layer of prototypes against Mask2Former's masked cross-attention, as Mask2Former runs it: torch's module, with its weights.

    Free is the same attention by torch's fused kernel. All three get the same queries, map and masks, and add their positions. Neither
    the values nor the masks change what is computed. The arm compares all pixels at once in place of by chunks.
    """
    torch.manual_seed(0)
    x, asked = torch.randn(1, 256, height, width), torch.randn(1, queries, 256)
    position, query_position = torch.randn(1, 256, height, width), torch.randn(1, queries, 256)
    seen = torch.nn.functional.interpolate(torch.randn(1, queries, 4, 8), (height, width), mode="bilinear") > 0
    prototypes = PrototypeCrossAttention().eval()
    at_once = PrototypeCrossAttention(chunk=height * width).eval()
    at_once.load_state_dict(prototypes.state_dict())
    fused, theirs = MaskedCrossAttention().eval(), nn.MultiheadAttention(256, 8).eval()

    def run(layer: nn.Module) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def call() -> Tensor:
            out: Tensor = layer(asked, x, seen=seen, position=position, query_position=query_position)
            return out

        return call

    @torch.inference_mode()
    def masked() -> Tensor:
        flat, placed = x.flatten(2).permute(2, 0, 1), position.flatten(2).permute(2, 0, 1)
        hidden = ~seen.flatten(2).repeat_interleave(8, 0)
        hidden = hidden & (hidden.sum(-1, keepdim=True) != hidden.shape[-1])
        first = asked.transpose(0, 1)
        out = theirs(first + query_position.transpose(0, 1), flat + placed, flat, attn_mask=hidden)[0]
        return (first + out).transpose(0, 1)

    return Trial(
        masked,
        run(prototypes),
        free=run(fused),
        arms={"all similarities at once": run(at_once)},
        quality=lambda: quality(steps, seeds),
        trained=lambda: trained(("prototypes", "masked", "pooled"), steps, seeds),
        details={
            "M multiply-accumulates": {
                "prototypes": PrototypeCrossAttention.macs(height * width, queries, 256) / 1e6,
                "masked attention": MaskedCrossAttention.macs(height * width, queries, 256) / 1e6,
            }
        },
    )


@experiment(
    "pem/speedup",
    points={
        "smoke": [{"height": 64, "width": 128, "steps": 4, "seeds": 3}],
        "small": [{"height": 256, "width": 512, "steps": LITTLE, "seeds": 3}],
        "full": [{"height": 512, "width": 1024, "steps": STEPS, "seeds": 3}],
    },
    operator=NETWORK,
    guard=GUARD,
    paper={"height": 1024, "width": 2048, "backbone": "ResNet-50", "device": "a GPU"},
    departures={
        "height": "512: a processor takes half a minute for a whole image",
        "width": "1024, as above",
        "device": "this machine's processor, float32",
        "quality": "of small networks on scenes of digits: no Cityscapes here",
    },
    refuted_if="the whole interval of the speed-up over Mask2Former lies below 1",
    minutes=240,
)
def speedup(height: int, width: int, steps: int, seeds: int) -> Trial:
    """PEM against Mask2Former, both with ResNet-50 and 19 classes, on one image; weights are random.

    The arms have one of the two parts each: PEM's pixel decoder with masked attention, and Mask2Former with prototypes, which says what
    the gain comes from.
    """
    from assay.methods.vision.pem import apply_pem

    torch.manual_seed(0)
    images = torch.randn(1, 3, height, width)
    theirs, ours = mask2former(), build_pem("pem_resnet50", num_classes=19).eval()
    light = build_pem("pem_resnet50", num_classes=19, cross=MaskedCrossAttention).eval()
    heavy = apply_pem(mask2former())

    def run(model: nn.Module) -> Callable[[], Any]:
        @torch.inference_mode()
        def call() -> Any:
            return model(images)

        return call

    return Trial(
        run(theirs),
        run(ours),
        arms={"PEM's pixel decoder, masked attention": run(light), "Mask2Former with prototypes": run(heavy)},
        quality=lambda: quality(steps, seeds),
        trained=lambda: trained(("prototypes", "masked", "pooled"), steps, seeds),
        pairs=6,
    )
