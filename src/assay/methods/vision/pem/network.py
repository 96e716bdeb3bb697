"""The whole network: a backbone, the pixel decoder, and mask queries that are refined on its maps in turn, coarse to fine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.blocks import Mlp
from assay.methods.vision.pem.attention import PrototypeCrossAttention
from assay.methods.vision.pem.backbones import ResNet, Stdc
from assay.methods.vision.pem.pixel_decoder import PixelDecoder

Cross = Callable[[int, int], nn.Module]
"""Makes a layer's cross-attention from width and heads: `PrototypeCrossAttention`, `MaskedCrossAttention`, or one's own."""
LEVELS = 3
CONFIGS: dict[str, Callable[[], Any]] = {
    "pem_resnet50": lambda: ResNet((3, 4, 6, 3)),
    "pem_stdc1": lambda: Stdc((2, 2, 2)),
    "pem_stdc2": lambda: Stdc((4, 5, 3)),
}
"""The published models, by what makes their backbone; the rest is the same in all of them."""


@dataclass(frozen=True)
class Predictions:
    """Of each query: class_logits (B, Q, classes + 1), the last one no object, and mask_logits (B, Q, H / 4, W / 4).

    `auxiliary`: what was predicted before each layer, first to last, where it was asked for.
    """

    class_logits: Tensor
    mask_logits: Tensor
    auxiliary: list[Predictions] = field(default_factory=list)


class DecoderLayer(nn.Module):
    """Cross-attention to a map, self-attention among the queries and an MLP, the latter two after a norm."""

    def __init__(self, width: int, heads: int, hidden: int, cross: Cross) -> None:
        super().__init__()
        self.cross = cross(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, act=nn.ReLU)
        for module in (self.self_attn, self.mlp):
            for value in module.parameters():
                if value.ndim > 1:
                    nn.init.xavier_uniform_(value)

    def forward(self, queries: Tensor, x: Tensor, *, seen: Tensor, position: Tensor, query_position: Tensor) -> Tensor:
        queries = self.cross(queries, x, seen=seen, position=position, query_position=query_position)
        normed = self.self_norm(queries)
        placed = normed + query_position
        queries = queries + self.self_attn(placed, placed, normed, need_weights=False)[0]
        out: Tensor = queries + self.mlp(self.mlp_norm(queries))
        return out


class Decoder(nn.Module):
    """Learned queries, refined by `layers` layers on three maps in turn, coarse to fine.

    From the queries, before the first layer and after each, `norm`, a linear layer and an MLP of three predict classes and masks; the
    masks, resized to the next map, say where each query may look. In use only the last masks are made at full size: the earlier
    ones come from mask features that are resized first, which gives the same up to rounding, for resizing is linear. In training,
    and where `auxiliary` asks for it, all are made, as in the published code.

    `cross` makes the cross-attention of a layer: prototypes, unless said otherwise.
    """

    def __init__(
        self, num_classes: int, channels: int, *, width: int = 256, mask_dim: int = 256, queries: int = 100,
        heads: int = 8, hidden: int = 2048, layers: int = 6, cross: Cross = PrototypeCrossAttention,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.whole("num_classes", num_classes, low=1)
        checks.whole("layers", layers, low=1)
        checks.whole("queries", queries, low=1)
        if width % 4:
            raise ValueError(f"width must be divisible by 4, for positions of sines, got {width}")
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden, cross) for _ in range(layers))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.query_position = nn.Parameter(torch.randn(queries, width))
        self.level = nn.Parameter(torch.randn(LEVELS, width))
        inputs = [nn.Conv2d(channels, width, 1) for _ in range(LEVELS)]
        self.inputs = nn.ModuleList(inputs)
        for layer in inputs:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, mask_dim)
        )

    def forward(self, features: Tensor, maps: list[Tensor], *, auxiliary: bool | None = None) -> Predictions:
        """features (B, mask_dim, H, W), three maps (B, channels, ., .), coarse to fine; `auxiliary` None: in training."""
        every = self.training if auxiliary is None else auxiliary
        batch, width = len(features), self.queries.shape[1]
        sizes = [(found.shape[2], found.shape[3]) for found in maps]
        memories = [layer(x) + own[:, None, None] for layer, x, own in zip(self.inputs, maps, self.level, strict=True)]
        positions = [sine_positions(*size, width, like=features) for size in sizes]
        small = [] if every else [resized(features, size) for size in sizes]
        queries, placed = (each.expand(batch, -1, -1) for each in (self.queries, self.query_position))
        before: list[Predictions] = []
        for place, layer in enumerate(self.layers):
            level = place % LEVELS
            if every:
                before.append(self.predicted(queries, features))
                masks = resized(before[-1].mask_logits.detach(), sizes[level])
            else:
                masks = self.masks(self.norm(queries), small[level])
            queries = layer(
                queries,
                memories[level],
                seen=masks >= 0,
                position=positions[level],
                query_position=placed,
            )
        last = self.predicted(queries, features)
        return Predictions(last.class_logits, last.mask_logits, before)

    def predicted(self, queries: Tensor, features: Tensor) -> Predictions:
        normed = self.norm(queries)
        return Predictions(self.class_head(normed), self.masks(normed, features))

    def masks(self, normed: Tensor, features: Tensor) -> Tensor:
        """Mask logits (B, Q, H, W) of normed queries on mask features."""
        return (self.mask_head(normed) @ features.flatten(2)).unflatten(2, features.shape[2:])


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, H, W) in another size, bilinear: (B, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def sine_positions(height: int, width: int, channels: int, *, like: Tensor) -> Tensor:
    """Sines and cosines of row and column, (1, channels, height, width), as DETR has them: from just above 0 to 2 pi along each side.

    Half of the channels for the row, half for the column, each sine and cosine in turn, at 10000^(2i / (channels / 2)).
    """
    slow = 10000 ** (torch.arange(0, channels // 2, 2, device=like.device, dtype=torch.float32) / (channels // 2))

    def along(side: int) -> Tensor:
        turns = 2 * math.pi * torch.arange(1, side + 1, device=like.device, dtype=torch.float32) / (side + 1e-6)
        angles = turns[:, None] / slow
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).T  # (channels / 2, side)

    rows = along(height)[:, :, None].expand(-1, -1, width)
    columns = along(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None].to(like.dtype)


class Pem(nn.Module):
    """PEM: images (B, 3, H, W) to `Predictions`, which `segments.semantic` and `segments.panoptic` turn into maps.

    `backbone` has `channels`, `strides` (four, each twice the one before) and `feature_maps(images)`, by stride: one of
    `pem.backbones`, or any image model of this library that has such maps (`Swin(num_classes=0)`). Settings not named here are the
    decoder's (`Decoder`). Any size of image works that leaves the coarsest map a pixel.

    Raises ValueError for a backbone of other strides, and what its parts raise.

    >>> tiny = Pem(ResNet((1, 1, 1, 1), width=8), num_classes=5, width=32, conv_dim=16, mask_dim=32, queries=7, layers=3).eval()
    >>> found = tiny(torch.zeros(1, 3, 64, 96))
    >>> found.class_logits.shape, found.mask_logits.shape
    (torch.Size([1, 7, 6]), torch.Size([1, 7, 16, 24]))
    """

    def __init__(
        self, backbone: Any, *, num_classes: int, conv_dim: int = 128, mask_dim: int = 256, **settings: Any
    ) -> None:
        super().__init__()
        strides = tuple(backbone.strides)
        if len(strides) != 4 or any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
            raise ValueError(f"backbone must have maps of four strides, each twice the one before, got {strides}")
        self.num_classes = num_classes
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(backbone.channels, width=conv_dim, mask_dim=mask_dim)
        self.decoder = Decoder(num_classes, conv_dim, mask_dim=mask_dim, **settings)

    def forward(self, images: Tensor, *, auxiliary: bool | None = None) -> Predictions:
        checks.tensor("images", images, shape=("batch", 3, "height", "width"), dtype=self.decoder.queries.dtype)
        maps = list(self.backbone.feature_maps(images).values())
        features, coarse = self.pixel_decoder(maps)
        found: Predictions = self.decoder(features, coarse, auxiliary=auxiliary)
        return found


def build_pem(name: str, *, num_classes: int, **settings: Any) -> Pem:
    """A published model with random weights: pem_resnet50, pem_stdc1, pem_stdc2. `settings` replace those of `Pem`.

    Raises ValueError for another name.
    """
    return Pem(CONFIGS[checks.choice("name", name, list(CONFIGS))](), num_classes=num_classes, **settings)


_HEAD = (
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^sem_seg_head\.predictor\.", "decoder."),
    (r"^pixel_decoder\.in_projections\.", "pixel_decoder.projections."),
    (r"^pixel_decoder\.csm\.(\d)\.", lambda m: f"pixel_decoder.modulations.{3 - int(m[1])}."),  # theirs: coarse to fine
    (r"^pixel_decoder\.dcn\.", "pixel_decoder.steps."),
    (r"^(pixel_decoder\.(?:projections\.\d|conv_avg|out))\.bn\.", r"\1.norm."),
    (r"^pixel_decoder\.conv_avg\.", "pixel_decoder.context."),
    (r"\.mlp\.0\.mlp\.0\.", ".reduce.conv."),
    (r"\.mlp\.0\.mlp\.1\.", ".reduce.norm."),
    (r"\.mlp\.0\.mlp\.3\.", ".expand."),
    (r"\.dcn_offset\.", ".conv.offset."),
    (r"^(pixel_decoder\.steps\.\d)\.dcn\.", r"\1.conv."),
    (r"\.dcn_bn\.", ".norm."),
    (r"\.up_sample\.", ".up."),
    (r"\.up_bn\.", ".up_norm."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.", r".layers.\1.cross."),
    (r"\.transformer_self_attention_layers\.(\d+)\.norm\.", r".layers.\1.self_norm."),
    (r"\.transformer_self_attention_layers\.", ".layers."),
    (r"\.transformer_ffn_layers\.(\d+)\.norm\.", r".layers.\1.mlp_norm."),
    (r"\.transformer_ffn_layers\.(\d+)\.linear", r".layers.\1.mlp.fc"),
    (r"\.cross\.feature_proj\.to_query_3x3\.", ".cross.local."),
    (r"\.cross\.feature_proj\.bn\.", ".cross.norm."),
    (r"\.cross\.feature_proj\.out\.", ".cross.memory_proj."),
    (r"\.cross\.query_proj\.0\.", ".cross.query_norm."),
    (r"\.cross\.query_proj\.1\.", ".cross.query_proj."),
    (r"\.cross\.proj\.", ".cross.mix."),
    (r"\.cross\.final\.", ".cross.out."),
    (r"^decoder\.decoder_norm\.", "decoder.norm."),
    (r"^decoder\.query_feat\.weight$", "decoder.queries"),
    (r"^decoder\.query_embed\.weight$", "decoder.query_position"),
    (r"^decoder\.level_embed\.weight$", "decoder.level"),
    (r"^decoder\.input_proj\.", "decoder.inputs."),
    (r"^decoder\.class_embed\.", "decoder.class_head."),
    (r"^decoder\.mask_embed\.layers\.(\d)\.", lambda m: f"decoder.mask_head.{2 * int(m[1])}."),
)  # fmt: skip
_RESNET = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.first.norm."),
    (r"^backbone\.stem\.conv1\.", "backbone.first.conv."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 2}."),
    (r"^(backbone\.stages\.\d\.\d+\.(?:conv\d|shortcut))\.weight$", r"\1.conv.weight"),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released code's layout (detectron2's), for any of the published models. The loss's weights are left out.

    Raises ValueError for keys of a backbone that is neither a ResNet of detectron2 nor STDC.
    """
    found: dict[str, Tensor] = {}
    stdc = stdc_places(state)
    for key, value in state.items():
        if key.startswith("criterion.") or re.match(r"^backbone\.x\d+\.", key):
            continue  # STDC's stages are there twice
        if key.startswith("backbone.features."):
            key = stdc[key]
        elif key.startswith("backbone."):
            if not re.match(r"^backbone\.(stem|res\d)\.", key):
                raise ValueError(f"backbone must be a ResNet of detectron2 or STDC, got {key!r}")
            key = renamed(key, _RESNET)
        key = renamed(key, _HEAD)
        found[key] = value.flatten() if key.endswith(".cross.alpha") else value
    return found


def renamed(key: str, rules: Any) -> str:
    """A key after all rules (pattern, replacement), in their order."""
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def stdc_places(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our keys by the released STDC's, a flat list of two convolutions and all blocks; those with `avd_layer` begin a stage."""
    pattern = re.compile(r"^backbone\.features\.(\d+)\.(.+)$")
    matches = {key: place for key in state if (place := pattern.match(key))}
    starts = sorted({int(m[1]) for m in matches.values() if m[2].startswith("avd_layer.")})
    found: dict[str, str] = {}
    for key, match in matches.items():
        at, rest = int(match[1]), match[2]
        if at < 2:
            where = ("backbone.first", "backbone.stages.0")[at]
        else:
            stage = sum(start <= at for start in starts)
            where = f"backbone.stages.{stage}.{at - starts[stage - 1]}"
            rest = (
                rest.replace("conv_list.", "convs.")
                .replace("avd_layer.0.", "down.conv.")
                .replace("avd_layer.1.", "down.norm.")
            )
        found[key] = f"{where}.{rest.replace('.bn.', '.norm.') if at > 1 else rest.replace('bn.', 'norm.')}"
    return found
