"""PEM: whether one pixel a head serves a mask query as well as attention to all, and what the layer and the network cost.

Quality is that of small networks which find digits on photographs of textures (`scenes`): panoptic quality of digits and texture, and
mean IoU beside it. A backbone with a pixel decoder, the trunk, is trained once and then fixed, so that its maps are computed once; on
them every arm trains queries of its own, of which the cross-attention differs. Times and counts are those of the published sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
    train,
)
from assay.experiments.vision.training import CHOICE_SEED
from assay.measure.cost import count_cost
from assay.measure.detection import confusion, mean_iou, panoptic_quality
from assay.measure.detection import panoptic as panoptic_table
from assay.methods.core.vision.blocks import ConvNormAct
from assay.methods.vision.pem import (
    Decoder,
    LossSettings,
    MaskedCrossAttention,
    PixelDecoder,
    Predictions,
    PrototypeCrossAttention,
    build_pem,
    panoptic,
    semantic,
    set_loss,
)
from assay.methods.vision.pem.backbones import Pyramid
from assay.methods.vision.pem.network import Cross
from assay.workloads.digit_scenes import Scene

QUALITY = "pem/quality"
SIDE, BATCH = 64, 8
STEPS, LITTLE = 2000, 200
"""Steps of an arm at `full`, and at `small` and where its rate is chosen. The trunk has half as many again."""
TRUNK_RATE = 3e-3
CELLS = 24  # of each map and scene, that a trunk learns from in a step
CHANNELS, WIDTH, QUERIES, POINTS = (16, 24, 32, 48), 32, 12, 256
TEXTURE, DIGIT = 0, 1
THRESHOLD = 0.5  # of a query's class: transformers' own; the published 0.8 is of networks that trained for days
MARGIN = 3.0  # points of panoptic quality

# -------------------------------------------------------------------------------------------------------------------- the trunk


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


class Trunk(nn.Module):
    """A backbone and a pixel decoder: images to mask features of stride 2, and maps of strides 16, 8 and 4.

    `kernels` are there for its own training alone: what a cell of a map says of all pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SmallBackbone()
        self.pixel_decoder = PixelDecoder(CHANNELS, width=WIDTH, mask_dim=WIDTH)
        self.kernels = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        found: tuple[Tensor, list[Tensor]] = self.pixel_decoder(self.backbone(images))
        return found


def trunk_loss(model: nn.Module, some: Sequence[Scene]) -> Tensor:
    """Of random cells of each map, more of digits than there are by chance: which pixels are of the same segment?

    Binary cross-entropy and dice, as of the masks of queries. No query takes part: the trunk favours no kind of cross-attention.
    """
    assert isinstance(model, Trunk)
    features, maps = model(pixels(some))
    segments = torch.stack([scene.panoptic[..., 1] for scene in some])  # 0 the texture
    there = F.one_hot(segments).permute(0, 3, 1, 2).float()
    there = F.interpolate(there, features.shape[2:], mode="area").flatten(2)
    total = features.new_zeros(())
    for x, kernel in zip(maps, model.kernels, strict=True):
        stride = SIDE // x.shape[2]
        own = segments[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)
        cells = (torch.rand(own.shape) + 0.5 * (own > 0)).topk(min(CELLS, own.shape[1]), 1).indices
        kernels = kernel(x.flatten(2).transpose(1, 2).gather(1, cells[..., None].expand(-1, -1, WIDTH)))
        logits = kernels @ features.flatten(2)
        truth = there.gather(1, own.gather(1, cells)[..., None].expand(-1, -1, there.shape[2]))
        share = logits.sigmoid()
        dice = 1 - (2 * (share * truth).sum(-1) + 1) / (share.sum(-1) + truth.sum(-1) + 1)
        total = total + F.binary_cross_entropy_with_logits(logits, truth) + dice.mean()
    return total


@cache
def trunk(steps: int) -> nn.Module:
    """The one trunk for arms of so many steps, trained by a seed that no arm has. Its rate is our choice, for all arms alike."""
    return train(Trunk, trunk_loss, TRUNK_RATE, steps * 3 // 2, CHOICE_SEED, size=SIDE, batch=BATCH)


_MAPS: dict[tuple[int, Scene], tuple[Tensor, ...]] = {}


def maps_of(some: Sequence[Scene], steps: int) -> tuple[Tensor, list[Tensor]]:
    """Mask features and maps of scenes by the trunk for arms of so many steps, computed once a scene."""
    if new := [scene for scene in some if (steps, scene) not in _MAPS]:
        with torch.no_grad():
            features, maps = trunk(steps)(pixels(new))
        for scene, *found in zip(new, features, *maps, strict=True):
            _MAPS[steps, scene] = tuple(found)
    first, *rest = (torch.stack(each) for each in zip(*(_MAPS[steps, scene] for scene in some), strict=True))
    return first, rest


# ------------------------------------------------------------------------------------------------------------- the arms compared


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


CROSS: dict[str, Cross] = {
    "prototypes": PrototypeCrossAttention,
    "masked": MaskedCrossAttention,
    "random": RandomPixels,
    "pooled": PooledPixels,
    "none": lambda width, heads: NoPixels(),
}
ARMS = tuple(CROSS)


class Queries(Decoder):
    """An arm: untrained queries for texture and digits, on the maps of the trunk for so many steps."""

    def __init__(self, arm: str, steps: int) -> None:
        super().__init__(
            2, WIDTH, width=WIDTH, mask_dim=WIDTH, queries=QUERIES, heads=4, hidden=4 * WIDTH, layers=3, cross=CROSS[arm]
        )  # fmt: skip
        self.steps = steps

    def on(self, some: Sequence[Scene]) -> Predictions:
        found: Predictions = self(*maps_of(some, self.steps))
        return found


def loss(model: nn.Module, some: Sequence[Scene]) -> Tensor:
    """The set loss: of the texture, a segment of its own, and of every digit that is seen."""
    assert isinstance(model, Queries)
    labels, masks = [], []
    for scene in some:
        there = scene.masks.flatten(1).any(1)
        labels.append(torch.tensor([TEXTURE] + [DIGIT] * int(there.sum())))
        masks.append(torch.cat([(scene.semantic == 0)[None], scene.masks[there]]))
    return set_loss(model.on(some), labels, masks, settings=LossSettings(points=POINTS))


def truth_of(scene: Scene) -> np.ndarray:
    """Class and instance of each pixel, (height, width, 2): the texture, or a digit, whichever it is."""
    classes, instances = scene.panoptic.unbind(-1)
    found: np.ndarray = torch.stack([classes.clamp(max=DIGIT), instances], -1).numpy()
    return found


def table_of(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return panoptic_table(found, truth, things=[DIGIT], stuff=[TEXTURE])


def outcome(model: nn.Module, some: Sequence[Scene]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each scene a panoptic table and a confusion table."""
    assert isinstance(model, Queries)
    found, size = model.on(some), (SIDE, SIDE)
    segments = panoptic(found, [DIGIT], size, threshold=THRESHOLD).numpy()
    classes = semantic(found, size).argmax(1).numpy()
    truths = [truth_of(scene) for scene in some]
    return [(table_of(segments[i], truth), confusion(classes[i], truth[..., 0], 2)) for i, truth in enumerate(truths)]


def pq(outcomes: Sequence[Any]) -> float:
    return panoptic_quality([table for table, _ in outcomes])


def miou(outcomes: Sequence[Any]) -> float:
    return mean_iou([table for _, table in outcomes])


@cache
def floor() -> float:
    """Panoptic quality on the held-out scenes where all is called texture."""
    truths = [truth_of(scene) for scene in scenes("heldout", SIDE)]
    return panoptic_quality([table_of(np.zeros_like(truth), truth) for truth in truths])


@searched(QUALITY, arms=ARMS, grid=(6e-4, 2e-3, 6e-3, 2e-2, 6e-2))
def score(arm: str, rate: float) -> float:
    trunk(LITTLE)  # before the arm sets its seed
    return error_for_choice(lambda: Queries(arm, LITTLE), loss, outcome, pq, rate, LITTLE, size=SIDE, batch=BATCH)


class Learned(NamedTuple):
    """An arm that was trained, by panoptic quality and by mean IoU."""

    pq: Scored
    miou: Scored


@cache
def learned(arm: str, steps: int, seeds: int) -> Learned:
    """An arm trained at its rate under each seed."""
    trunk(steps)  # before an arm sets its seed
    by_pq = scored(
        lambda: Queries(arm, steps), loss, outcome, pq, chosen(QUALITY, arm), steps, size=SIDE, batch=BATCH,
        seeds=tuple(range(1, seeds + 1)),
    )  # fmt: skip
    return Learned(by_pq, Scored(by_pq.found, miou, by_pq.rate))


def trained(arms: Sequence[str], steps: int, seeds: int) -> dict[str, Trained]:
    return {arm: learned(arm, steps, seeds).pq.trained(floor(), "all texture") for arm in arms}


TASK_HERE = {
    "data": f"digits, one class, on photographs of textures, {SIDE} pixels a side: Cityscapes and ADE20K come with no package",
    "net": f"four maps of {CHANNELS} channels at strides 2 to 16, width {WIDTH}, {QUERIES} queries, three layers: trained in minutes",
    "trunk": "backbone and pixel decoder are trained once, for all arms and seeds, to tell which pixels are of one segment, "
    "and then fixed: so arms train in seconds",
    "seeds": "3, of the queries and their layers; scenes and seeds are resampled for the interval",
}
SCALES: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"steps": 4, "seeds": 3}],
    "small": [{"steps": LITTLE, "seeds": 3}],
    "full": [{"steps": STEPS, "seeds": 3}],
}
"""Small is enough to beat the floor by far, and too little to tell: on the scenes for choices a random pixel of the mask does as well."""
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
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=num_labels)
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
        "trunk": TASK_HERE["trunk"],
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
        "height": "512, at small 256: a processor takes half a minute for a whole image",
        "width": "1024, at small 512, as above",
        "device": "this machine's processor, float32",
        "quality": "of small networks on scenes of digits: no Cityscapes here; of the cross-attention alone, both on PEM's pixel decoder: "
        "whether that one costs quality is not measured",
        "trunk": TASK_HERE["trunk"],
    },
    refuted_if="the whole interval of the speed-up over Mask2Former lies below 1",
    minutes=240,
)
def speedup(height: int, width: int, steps: int, seeds: int) -> Trial:
    """PEM against Mask2Former, both with ResNet-50 and 19 classes, on one image; weights are random.

    The arms say what the gain comes from: PEM's pixel decoder with masked attention, Mask2Former with prototypes, and PEM as released,
    with all its masks at full size.
    """
    from assay.methods.vision.pem import apply_pem

    torch.manual_seed(0)
    images = torch.randn(1, 3, height, width)
    theirs, ours = mask2former(), build_pem("pem_resnet50", num_classes=19).eval()
    light = build_pem("pem_resnet50", num_classes=19, cross=MaskedCrossAttention).eval()
    heavy = apply_pem(mask2former())

    def run(model: nn.Module, **settings: Any) -> Callable[[], Any]:
        @torch.inference_mode()
        def call() -> Any:
            return model(images, **settings)

        return call

    return Trial(
        run(theirs),
        run(ours),
        arms={
            "PEM's pixel decoder, masked attention": run(light),
            "Mask2Former with prototypes": run(heavy),
            "all masks at full size": run(ours, auxiliary=True),
        },
        quality=lambda: quality(steps, seeds),
        trained=lambda: trained(("prototypes", "masked", "pooled"), steps, seeds),
        pairs=6,
    )
