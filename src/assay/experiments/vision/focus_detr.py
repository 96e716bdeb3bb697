"""Focus-DETR: precision at the cost of Sparse DETR's encoder, and the time of the encoder against the dense one.

Precision is that of small detectors of digits on textures (`scenes`): a few convolutions, maps of two resolutions, an encoder of
transformers with three layers, and one head for every token. A decoder is left out: matching one query to one digit takes thousands of
steps to learn. Which digit it is does not matter, for telling them apart does so too.

Backbone and head are trained once without an encoder, as published detectors begin with a backbone that was trained for something else;
every arm begins with their weights and trains all of its own. A token of the backbone sees 15 or 31 pixels, so that boxes of digits of
up to 48 need the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig, ResNetConfig
from transformers.loss.loss_for_object_detection import sigmoid_focal_loss
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrEncoder,
    DeformableDetrSinePositionEmbedding,
)

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.scenes import Scored, error_for_choice, gap, guarded, pixels, scenes, scored, train
from assay.measure.detection import Match, Objects, average_precision, match
from assay.methods.core.vision.boxes import generalized_iou, nms
from assay.methods.core.vision.tokens import best_tokens, gather_tokens, scatter_tokens
from assay.methods.vision.focus_detr import (
    BETAS,
    WEIGHT,
    FocusEncoder,
    encoder_macs,
    foreground_loss,
    foreground_targets,
    token_budgets,
)
from assay.workloads.digit_scenes import Scene
from assay.workloads.pictures import picture

BEGUN, RATES = "focus_detr/backbone", "focus_detr/ap"
SIDE = 96  # pixels of a scene
STRIDES, SHAPES = (8, 16), ((12, 12), (6, 6))
TOKENS = sum(height * width for height, width in SHAPES)
WIDTH, HEADS, POINTS, FFN = 32, 4, 4, 256
RHO, LAYERS, TOPK = 0.5, (1.0, 0.6, 0.2), 20
CLASSES = 1  # a digit
STEPS, FIRST = 150, 3  # of an arm; the backbone before it takes three times as many, once for all
BACKBONE_SEED = 100  # none of those of the arms
PRIOR = 2.2  # of a class's logit: one token in ten
NMS, MOST = 0.6, 50
Maps = Sequence[Tensor]


# ------------------------------------------------------------------------------------------------------------ the encoders compared


class Unscored(FocusEncoder):
    """The sparse encoder with tokens chosen without a score: at random, or those of the largest norm."""

    random = False

    def scores(self, values: Tensor, positions: Tensor, shapes: Any, valid: Tensor | None) -> Tensor:
        if not self.random:
            return values.norm(dim=2)
        generator = None if self.training else torch.Generator(values.device).manual_seed(0)
        return torch.randn(values.shape[:2], generator=generator, device=values.device)


class Unencoded(nn.Module):
    """The method deleted: no token is updated."""

    def forward(self, inputs_embeds: Tensor, **place: Any) -> Any:
        return _Output(inputs_embeds)


class Objectness(nn.Module):
    """Sparse DETR's encoder: every layer updates the same tokens and reads all of them as they are by then. They are chosen by a class
    head on the backbone's map, the choice that its paper makes without a decoder."""

    def __init__(self, dense: DeformableDetrEncoder, k: int) -> None:
        super().__init__()
        self.dense, self.k = dense, k
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))
        nn.init.constant_(self.head[2].bias, -PRIOR)  # type: ignore[arg-type]
        self.logits: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"logits": None}

    def forward(self, inputs_embeds: Tensor, spatial_position_embeddings: Tensor, **place: Any) -> Any:
        tokens, ratios = inputs_embeds, place.pop("valid_ratios")
        self.logits = self.head(tokens)
        picked = best_tokens(self.logits.detach().amax(2), self.k)
        points = self.dense.get_reference_points(tuple(place["spatial_shapes_list"]), ratios, device=tokens.device)
        positions, points = gather_tokens(spatial_position_embeddings, picked), gather_tokens(points, picked)
        layers: Any = self.dense.layers
        for layer in layers:
            some = gather_tokens(tokens, picked)
            found, _ = layer.self_attn(
                some, encoder_hidden_states=tokens, position_embeddings=positions, reference_points=points, **place
            )
            some = layer.self_attn_layer_norm(some + found)
            tokens = scatter_tokens(tokens, picked, layer.final_layer_norm(some + layer.mlp(some)))
        return _Output(tokens)


@dataclass
class _Output:
    last_hidden_state: Tensor


def dense_encoder(width: int, layers: int, *, heads: int, ffn: int, levels: int) -> DeformableDetrEncoder:
    """transformers' own, which updates all tokens."""
    shape: dict[str, Any] = {"encoder_attention_heads": heads, "encoder_ffn_dim": ffn, "encoder_n_points": POINTS}
    make: Any = DeformableDetrConfig  # its base class takes further settings
    return DeformableDetrEncoder(
        make(use_timm_backbone=False, backbone_config=ResNetConfig(), d_model=width, encoder_layers=layers,
             num_feature_levels=levels, dropout=0.0, **shape)
    )  # fmt: skip


def focus_macs() -> int:
    """Multiply-accumulates of the sparse encoder of the detectors here, with its score, on one scene."""
    kept = [count for (count,) in token_budgets([TOKENS], RHO, LAYERS)]
    return sum(encoder_macs(TOKENS, kept, objects=TOPK, classes=CLASSES, scored=True, **SHAPE).values())


SHAPE: dict[str, Any] = {"width": WIDTH, "ffn": FFN, "heads": HEADS, "levels": len(SHAPES), "points": POINTS}


def equal_tokens() -> int:
    """How many tokens Sparse DETR's encoder updates in each layer for as many multiply-accumulates."""
    spent = encoder_macs(TOKENS, [0] * len(LAYERS), **SHAPE)["values"] + TOKENS * (WIDTH**2 + WIDTH * CLASSES)
    each = encoder_macs(TOKENS, [1] * len(LAYERS), **SHAPE)["queries"]
    return (focus_macs() - spent) // each


ARMS = ("focus", "sparse", "dense", "shallow", "random", "norm", "none")


def encoder_of(arm: str, classify: nn.Module) -> nn.Module:
    """The encoder of an arm; those with tokens to rank share the detector's class head."""
    if arm == "none":
        return Unencoded()
    layers = 1 if arm == "shallow" else len(LAYERS)  # a third of the work, as little as that of few tokens
    dense = dense_encoder(WIDTH, layers, heads=HEADS, ffn=FFN, levels=len(SHAPES))
    if arm in ("dense", "shallow"):
        return dense
    if arm == "sparse":
        return Objectness(dense, equal_tokens())
    kind = FocusEncoder if arm == "focus" else Unscored
    encoder = kind(dense, RHO, LAYERS, TOPK, class_head=classify)
    if isinstance(encoder, Unscored):
        encoder.random = arm == "random"
    return encoder


# ---------------------------------------------------------------------------------------------------------------------- the detectors


def placed(maps: Maps, levels: Tensor) -> dict[str, Any]:
    """What an encoder is called with, from maps (B, width, h, w) and a vector (levels, width) for each."""
    shapes = [(each.shape[2], each.shape[3]) for each in maps]
    sizes = torch.tensor(shapes)
    width = maps[0].shape[1]
    positions = torch.cat([sine(*shape, width) + level for shape, level in zip(shapes, levels, strict=True)])
    return {
        "inputs_embeds": torch.cat([each.flatten(2).mT for each in maps], 1),
        "spatial_position_embeddings": positions.expand(len(maps[0]), -1, -1),
        "spatial_shapes": sizes,
        "spatial_shapes_list": shapes,
        "level_start_index": torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]]),
        "valid_ratios": maps[0].new_ones(len(maps[0]), len(maps), 2),
    }


@cache
def sine(height: int, width: int, channels: int) -> Tensor:
    """Positions of a map, (height * width, channels)."""
    embed = DeformableDetrSinePositionEmbedding(channels // 2, normalize=True)
    found: Tensor = embed(torch.Size([1, channels, height, width]), torch.device("cpu"), torch.float32)
    return found[0].flatten(1).T.contiguous()


def halved(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution to half the resolution."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.ReLU())


class SceneDetector(nn.Module):
    """Images (B, 3, 96, 96) to logits of a digit (B, S, 1) and boxes (B, S, 4) of every token, in pixels."""

    strides: Tensor
    centres: Tensor

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(halved(3, 16), halved(16, WIDTH), halved(WIDTH, WIDTH))
        self.coarser = nn.ModuleList(halved(WIDTH, WIDTH) for _ in SHAPES[1:])
        self.levels = nn.Parameter(torch.randn(len(SHAPES), WIDTH))
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.classify = nn.Linear(WIDTH, CLASSES)
        self.locate = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        nn.init.constant_(self.classify.bias, -PRIOR)
        self.encoder = encoder_of(arm, self.classify)
        rows = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in SHAPES]
        strides = torch.tensor(STRIDES).repeat_interleave(torch.tensor([len(each) for each in rows]))[:, None]
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("centres", torch.cat(rows).flip(1) * strides + strides // 2, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.stem(images)]
        for coarser in self.coarser:
            maps.append(coarser(maps[-1]))
        tokens = self.embed(self.encoder(**placed(maps, self.levels)).last_hidden_state)
        reach = F.softplus(self.locate(tokens)) * self.strides
        boxes = torch.cat([self.centres - reach[..., :2], self.centres + reach[..., 2:]], 2)
        return self.classify(tokens), boxes

    @property
    def chosen_by(self) -> Tensor | None:
        """The scores (B, S) that tokens were chosen by in the last run."""
        if isinstance(self.encoder, FocusEncoder) and self.encoder.focused is not None:
            return self.encoder.focused.scores
        return (
            None
            if not isinstance(self.encoder, Objectness) or self.encoder.logits is None
            else self.encoder.logits.amax(2)
        )


@lru_cache(maxsize=1000)
def target(scene: Scene) -> tuple[Tensor, Tensor]:
    """Which tokens are foreground (S,), and the box that each is of (S, 4): of others any."""
    at = foreground_targets(scene.boxes, SHAPES, STRIDES)
    return at >= 0, scene.boxes[at.clamp(min=0)]


def targets(some: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Those of some scenes, (B, S) and (B, S, 4)."""
    positive, boxes = zip(*map(target, some), strict=True)
    return torch.stack(positive), torch.stack(boxes)


def loss(model: nn.Module, some: Sequence[Scene]) -> Tensor:
    """transformers' focal loss of the digit, distance and GIoU of the boxes of foreground tokens, by DETR's weights; and the score's."""
    assert isinstance(model, SceneDetector)
    logits, boxes = model(pixels(some))
    positive, true = targets(some)
    count = max(int(positive.sum()), 1)
    digit = positive[..., None].float()
    found, true = boxes[positive], true[positive]
    apart = (found - true).abs().sum() / SIDE
    total = TOKENS * sigmoid_focal_loss(logits, digit, count)
    total = total + (5 * apart + 2 * (1 - generalized_iou(found, true)).sum()) / count
    encoder = model.encoder
    if type(encoder) is FocusEncoder:
        assert encoder.focused is not None
        total = total + WEIGHT * foreground_loss(encoder.focused.scores, positive)
    elif isinstance(encoder, Objectness):
        assert encoder.logits is not None
        total = total + TOKENS * sigmoid_focal_loss(encoder.logits, digit, count)
    return total


@dataclass(frozen=True)
class Seen:
    """What came of a scene: which boxes were right, and how well the choice of tokens told foreground from texture (None: no choice)."""

    matches: dict[int, Match]
    auc: float | None


def truth(scene: Scene) -> Objects:
    return Objects(scene.boxes.numpy(), np.zeros(len(scene.labels), int))


def outcome(model: nn.Module, some: Sequence[Scene]) -> list[Seen]:
    assert isinstance(model, SceneDetector)
    logits, boxes = model(pixels(some))
    chosen_by, positive, seen = model.chosen_by, targets(some)[0], []
    for at, scene in enumerate(some):
        scores, tokens = logits[at, :, 0].sigmoid().topk(2 * MOST)
        kept = nms(boxes[at, tokens], scores, NMS)[:MOST]
        found = Objects(boxes[at, tokens[kept]].numpy(), np.zeros(len(kept), int), scores[kept].numpy())
        auc = None if chosen_by is None else area_under_curve(chosen_by[at], positive[at])
        seen.append(Seen(match(found, truth(scene)), auc))
    return seen


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive has the higher score than a negative, ties as they fall; NaN without one of both."""
    ranks = scores.argsort().argsort().double()[positive]
    count, rest = len(ranks), len(scores) - len(ranks)
    return float((ranks.mean() - (count - 1) / 2) / rest) if count and rest else float("nan")


def precision(seen: Sequence[Seen]) -> float:
    """AP over IoUs 0.5 to 0.95, from 0 to 1."""
    return average_precision([each.matches for each in seen])


@cache
def floor() -> float:
    """AP of the mean digit's box at every position of a grid."""
    train = scenes("train", SIDE)
    sides = torch.cat([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in train]).mean(0)
    centres = torch.cartesian_prod(torch.arange(8, SIDE, 16), torch.arange(8, SIDE, 16)).float()
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], 1).numpy()
    found = Objects(boxes, np.zeros(len(boxes), int), np.ones(len(boxes)))
    return average_precision([match(found, truth(scene)) for scene in scenes("heldout", SIDE)])


Weights = dict[str, Tensor]


def begun(arm: str, weights: Weights) -> SceneDetector:
    """A detector whose backbone and head have these weights, its encoder untrained."""
    model = SceneDetector(arm)
    model.load_state_dict({**model.state_dict(), **weights})
    return model


@cache
def backbone(steps: int) -> Weights:
    """What all arms begin with: a detector without an encoder, trained once."""
    rate = chosen(BEGUN, "backbone").rate
    model = train(lambda: SceneDetector("none"), loss, rate, steps, BACKBONE_SEED, size=SIDE)
    return {name: value for name, value in model.state_dict().items() if name != "levels"}


@searched(BEGUN, arms=("backbone",), grid=(1e-3, 3e-3, 1e-2, 3e-2))
def backbone_score(arm: str, rate: float) -> float:
    steps = FIRST * STEPS
    return error_for_choice(lambda: SceneDetector("none"), loss, outcome, precision, rate, steps, size=SIDE)


@searched(RATES, arms=ARMS, grid=(1e-3, 3e-3, 1e-2, 3e-2))
def score(arm: str, rate: float) -> float:
    weights = backbone(FIRST * STEPS)  # before the seed is set
    return error_for_choice(lambda: begun(arm, weights), loss, outcome, precision, rate, STEPS, size=SIDE)


@cache
def learned(arm: str, steps: int, seeds: int) -> Scored:
    """An arm trained at its rate under each seed."""
    rate, weights = chosen(RATES, arm), backbone(FIRST * steps)
    every = range(1, seeds + 1)
    return scored(lambda: begun(arm, weights), loss, outcome, precision, rate, steps, size=SIDE, seeds=every)


def trained(found: dict[str, Scored]) -> dict[str, Trained]:
    """For the record, of all arms but two controls, whose boxes come from tokens that nothing or chance updated: held to no floor."""
    return {
        arm: each.trained(floor(), "the mean box everywhere")
        for arm, each in found.items()
        if arm not in ("none", "random")
    }


def choices(found: dict[str, Scored]) -> dict[str, float]:
    """The mean AUC of what tokens were chosen by, over scenes and seeds, of the arms that choose."""
    by_arm = {
        arm: [each.auc for seed in shown.found for each in seed if each.auc is not None] for arm, shown in found.items()
    }
    return {arm: float(np.nanmean(values)) for arm, values in by_arm.items() if values}


PAPER: dict[str, Any] = {"rho": RHO, "betas": list(BETAS), "topk": 300, "data": "COCO", "net": "DINO with ResNet-50"}
HERE = {
    "data": "scenes of digits on textures, 400 to train on and 60 to judge on, one class for all digits: COCO comes with no package",
    "net": "four convolutions, two levels of 32 channels, an encoder of three layers and a head on its tokens, without a decoder; backbone "
    "and head are trained once without an encoder, for three times as many steps as an arm, and are what all arms begin with",
    "betas": "every other of the paper's six, for three layers: as many tokens on average",
    "topk": "20 of 180 tokens: 300 would be all of them",
}
WHAT_IS_TRAINED = {
    "smoke": {"steps": 2, "seeds": 1},
    "small": {"steps": STEPS, "seeds": 3},
    "full": {"steps": 8 * STEPS, "seeds": 5},
}


# ---------------------------------------------------------------------------------------------------------------------- precision


@experiment(
    "focus_detr/coco-ap",
    points={scale: [point] for scale, point in WHAT_IS_TRAINED.items()},
    operator=Operator(
        "an encoder that updates some of a detector's tokens", free="Sparse DETR's encoder at equal cost"
    ),
    paper=PAPER,
    departures=HERE,
    refuted_if="the whole interval of the gain in AP over Sparse DETR's choice at equal cost lies below 0",
    measured_here="AP of small detectors without a decoder, on scenes of digits",
    minutes=120,
)
def coco_ap(steps: int, seeds: int) -> Figure:
    """AP of the sparse encoder, beside Sparse DETR's for as many multiply-accumulates, each with its own choice of tokens.

    Sparse DETR's tokens are chosen by objectness, for its other score wants a decoder's attention. Deleted: no token is updated.
    Random and rival: the same encoder with random tokens, and with those of the largest norm. `dense` updates all of them, `shallow` too,
    in one layer of the three.
    """
    found = {arm: learned(arm, steps, seeds) for arm in ARMS}
    gain, low, high = gap(found["focus"], found["sparse"])
    base = found["sparse"].value
    kept = [count for (count,) in token_budgets([TOKENS], RHO, LAYERS)]
    return Figure(
        base + gain,
        "AP",
        base + low,
        base + high,
        baseline=base,
        controls={
            name: found[arm].value for name, arm in (("deleted", "none"), ("random", "random"), ("rival", "norm"))
        },
        arms={arm: found[arm].value for arm in ("dense", "shallow")},
        trained=trained(found),
        details={
            "AUC of the choice": choices(found),
            "AP at IoU 0.5": {arm: ap50(each) for arm, each in found.items()},
            "gain": [gain, low, high],
            "steps": {"of each arm": steps, "of the backbone before, once": FIRST * steps},
            "tokens of each layer": {"focus": kept, "sparse": [equal_tokens()] * len(LAYERS), "all": TOKENS},
            "MACs of the encoder": {
                "focus": focus_macs(),
                "dense": sum(encoder_macs(TOKENS, [TOKENS] * len(LAYERS), **SHAPE).values()),
                "shallow": sum(encoder_macs(TOKENS, [TOKENS], **SHAPE).values()),
            },
        },
    )


def ap50(arm: Scored) -> float:
    """In per cent, over all seeds."""
    return 100 * float(np.mean([average_precision([each.matches for each in seed], iou=0.5) for seed in arm.found]))


# --------------------------------------------------------------------------------------------------------------------------- time


SIZES = [{"height": 96, "width": 128}, {"height": 320, "width": 512}, {"height": 800, "width": 1333}]


@experiment(
    "focus_detr/encoder-speedup",
    points={
        scale: [{**size, "batch": 1, **task}]
        for size, (scale, task) in zip(SIZES, WHAT_IS_TRAINED.items(), strict=True)
    },
    operator=Operator("the encoder of a detector with deformable attention", free="transformers' dense encoder"),
    guard=Guard("AP on scenes of digits", 5.0, higher_is_better=True, relative=False),
    paper={**PAPER, "height": 800, "width": 1333, "batch": 1, "device": "a GPU"},
    departures={
        "device": "this machine's processor, float32, transformers' deformable attention in plain torch",
        "net": "the encoder alone, 6 layers of 256 channels, on four levels of random projections of a photograph; precision is that of "
        "small detectors",
        "data": HERE["data"],
        "height": "320 pixels at small, a fifth of the tokens, so that pairs take seconds",
        "width": "512 pixels at small",
    },
    refuted_if="the whole interval of the encoder's speed-up over the dense encoder lies below 1",
    measured_here="the encoder alone on a processor",
    minutes=120,
)
def encoder_speedup(height: int, width: int, batch: int, steps: int, seeds: int) -> Trial:
    """The sparse encoder, score and choice included, against transformers' dense one with the same layers.

    Guard: small detectors with the sparse encoder may lose 5 points of AP to those with the dense one. Deleted: no token is updated;
    random: random tokens. Rival: a third of the dense layers, which is timed too.
    """
    torch.manual_seed(0)
    dense = dense_encoder(256, len(BETAS), heads=8, ffn=2048, levels=4).eval()
    head = nn.Linear(256, 80)
    focus = FocusEncoder(dense, class_head=head).eval()
    plain = FocusEncoder(dense, topk=0, class_head=head).eval()
    frozen = FocusEncoder(dense, 1.0, (1.0,) * len(BETAS), 0).eval()
    shallow = dense_encoder(256, len(BETAS) // 3, heads=8, ffn=2048, levels=4).eval()
    inputs = placed(first_maps(batch, height, width, 256), torch.randn(4, 256))
    tokens = inputs["inputs_embeds"].shape[1]
    kept = [count for (count,) in token_budgets([tokens], RHO, BETAS)]

    def run(encoder: nn.Module) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def call() -> Tensor:
            out: Tensor = encoder(**inputs).last_hidden_state
            return out

        return call

    def found() -> dict[str, Scored]:
        return {arm: learned(arm, steps, seeds) for arm in ("focus", "dense", "shallow", "random", "none")}

    def quality() -> Quality:
        shown = found()
        controls = {"deleted": shown["none"], "random": shown["random"], "rival": shown["shallow"]}
        return guarded(shown["focus"], shown["dense"], controls, "a third of the dense layers")

    return Trial(
        run(dense),
        run(focus),
        arms={
            "without attention among objects": run(plain),
            "all tokens, values not refreshed": run(frozen),
            "a third of the dense layers": run(shallow),
        },
        quality=quality,
        trained=lambda: trained(found()),
        details={
            "tokens": {"all": tokens, "of each layer": kept},
            "MACs": {
                "dense": batch * sum(encoder_macs(tokens, [tokens] * len(BETAS)).values()),
                "focus": batch * sum(encoder_macs(tokens, kept, objects=300, classes=80, scored=True).values()),
            },
        },
    )


def first_maps(batch: int, height: int, width: int, channels: int) -> list[Tensor]:
    """Four levels of random projections of photographs' patches, of 8 to 64 pixels a side, normed: (batch, channels, h, w)."""
    image = F.interpolate(picture("astronaut")[None], (height, width), mode="bilinear", antialias=True)
    image = ((image - image.mean()) / image.std()).expand(batch, -1, -1, -1)
    maps = []
    for stride in (8, 16, 32, 64):
        filled = F.pad(image, (0, -width % stride, 0, -height % stride))
        projected = F.conv2d(filled, torch.randn(channels, 3, stride, stride) / stride, stride=stride)
        maps.append(F.group_norm(projected, 32))
    return maps
