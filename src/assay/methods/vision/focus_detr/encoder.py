"""The sparse encoder: how many tokens each layer updates, attention among the most object-like, and the encoder itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.tokens import best_tokens, gather_tokens, kept_of, scatter_tokens
from assay.methods.vision.focus_detr.foreground import VARIANTS, ForegroundScorer, Shapes, Variant

BETAS = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
"""The share of the kept tokens that each of six layers updates."""
BORDER = 0.01  # of the picture: tokens this close to its edge, or closer, are scored as if they were padding


def token_budgets(
    valid: Sequence[int], rho: float, betas: Sequence[float], *, variant: Variant = "paper"
) -> list[list[int]]:
    """How many tokens of each image each layer updates, (layers, images). `valid`: tokens of each image that are no padding.

    An image of n tokens keeps k = int(rho n) + 1, n at most; a layer the best int(beta k) of them, one at least. "as_released" takes k
    from the image with most tokens of the batch, so that what the others keep depends on what stands beside them: min(int(beta k_max), k).
    Products are taken in float32 as in the released code. Raises ValueError for rho or a beta outside (0, 1].

    >>> token_budgets([100], 0.5, BETAS)
    [[51], [40], [30], [30], [20], [10]]
    """
    rho = checks.number("rho", rho, above=0, high=1)
    shares = torch.tensor(
        [checks.number("betas", beta, above=0, high=1) for beta in betas], dtype=torch.float32, device="cpu"
    )
    tokens = torch.tensor([checks.whole("valid", count, low=1) for count in valid], device="cpu")
    checks.choice("variant", variant, VARIANTS)
    first = torch.minimum((tokens * rho).int() + 1, tokens)
    counts = (shares[:, None] * (first if variant == "paper" else first.max())).int().clamp(min=1)
    return torch.minimum(counts, first).tolist()


class ObjectAttention(nn.Module):
    """Self-attention among a few of a layer's tokens (B, k, width), their positions in queries and keys; residual, then a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, positions: Tensor, rank: Tensor, topk: int, kept: Tensor | None = None) -> Tensor:
        """The tokens, of which the `topk` with the highest `rank` (B, k) have attended to each other; all where there are fewer.

        Tokens that are not `kept` (bool (B, k)) neither see nor are seen, and stay as they are.
        """
        picked = best_tokens(rank, min(topk, tokens.shape[1]), valid=kept)
        some = gather_tokens(tokens, picked)
        places = some + gather_tokens(positions, picked)
        real = None if kept is None else kept.gather(1, picked)
        hidden = None if real is None else ~real
        mixed = self.attn(places, places, some, key_padding_mask=hidden, need_weights=False)[0]
        return scatter_tokens(tokens, picked, self.norm(some + mixed), kept=real)


@dataclass(frozen=True)
class Focused:
    """What the encoder chose in its last run: `scores` (B, S), the logits of the foreground; `order` (B, k), the tokens that any layer
    updates, best first (None: all of them, as they stand); `kept` (layers, images), how many of them; `valid` bool (B, S), or None."""

    scores: Tensor
    order: Tensor | None
    kept: list[list[int]]
    shapes: Shapes
    valid: Tensor | None


class FocusEncoder(nn.Module):
    """Takes the place of transformers' DeformableDetrEncoder, whose layers it keeps; arguments and result are the same.

    `rho`, `betas`: see `token_budgets`; `topk`: how many tokens of a layer attend to each other, 0 for none. With rho and all betas 1
    and topk 0 it is the dense encoder with values that are not refreshed, except that padding leaves as it came. `embed`: the layers from
    the map to what is scored (of a two-stage model its own), `class_head`: from a token to class logits; both belong to the model and are
    not registered here. Without `embed` it has its own, without `class_head` tokens are ranked by the foreground score alone (our choice).

    A token's rank is its highest class probability times its foreground probability (our choice); "as_released" multiplies the logits, so
    that two very negative ones rank high. Padding is kept out of the level's mean and of the attention among objects, and counts are
    each image's own; "as_released" does none of that. Nothing is dropped out of the encoder's input or in the new attention (the released
    models train without dropout).

    When not to use it: with `torch.export`: which tokens there are depends on their scores. Attention weights are not returned, and
    gradients are not checkpointed.

    Raises ValueError for an encoder without such layers, for more or fewer betas than layers, and for shares outside (0, 1].
    """

    focused: Focused | None = None

    def __init__(
        self,
        encoder: Any,
        rho: float = 0.5,
        betas: Sequence[float] = BETAS,
        topk: int = 300,
        *,
        variant: Variant = "paper",
        embed: nn.Module | None = None,
        class_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_encoder(encoder)
        if len(betas) != len(encoder.layers):
            raise ValueError(f"betas must have one entry a layer ({len(encoder.layers)}), got {tuple(betas)}")
        token_budgets([1], rho, betas, variant=variant)
        self.rho, self.betas, self.variant = rho, tuple(betas), variant
        self.topk = checks.whole("topk", topk, low=0)
        self.layers: Any = encoder.layers
        first = self.layers[0].self_attn
        like = first.output_proj.weight
        self.embed = (
            nn.Sequential(nn.Linear(first.d_model, first.d_model), nn.LayerNorm(first.d_model))
            if embed is None
            else None
        )
        self.scorer = ForegroundScorer(first.d_model, first.n_levels)
        attentions = (ObjectAttention(first.d_model, first.n_heads) for _ in self.layers if topk)
        self.objects = nn.ModuleList(attentions)
        self.to(like)
        self._model_owns = (encoder, embed, class_head)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"focused": None}  # scores with a gradient cannot be copied

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Shapes | None = None,
        level_start_index: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        if output_attentions:
            raise ValueError("output_attentions must be False: each layer has other tokens")
        if output_hidden_states is None:  # the model's configuration says it, as in the dense encoder
            output_hidden_states = getattr(getattr(self._model_owns[0], "config", None), "output_hidden_states", False)
        assert spatial_shapes_list is not None
        assert valid_ratios is not None
        values, positions, shapes = inputs_embeds, spatial_position_embeddings, [(h, w) for h, w in spatial_shapes_list]
        if positions is None:
            positions = torch.zeros_like(values)
        total = values.shape[1]
        valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        tokens_of = [total] * len(values) if valid is None else valid.sum(1).tolist()
        budgets = token_budgets(tokens_of, self.rho, self.betas, variant=self.variant)
        scores = self.scores(values, positions, shapes, valid)
        references = self._model_owns[0].get_reference_points(tuple(shapes), valid_ratios, device=values.device)

        rank = scores.detach().float()
        if valid is not None and self.variant == "as_released":
            rank = rank.masked_fill(~valid, rank.min())
        order = None
        if min(map(min, budgets)) < total:
            order = best_tokens(rank, max(map(max, budgets)), valid=valid)
        self.focused = Focused(scores, order, budgets, shapes, valid)
        place = {
            "attention_mask": attention_mask,
            "encoder_hidden_states": values,
            "encoder_attention_mask": attention_mask,
            "spatial_shapes": spatial_shapes,
            "spatial_shapes_list": shapes,
            "level_start_index": level_start_index,
        }
        some, given = values, [positions, references, rank]
        if order is not None:
            some, *given = (gather_tokens(each, order) for each in (values, *given))
        states = [values]
        for index, counts in enumerate(budgets):
            k = max(counts)
            kept = None if min(counts) == k else kept_of(torch.tensor(counts, device=values.device), k)
            head = self._layer(index, some[:, :k], [each[:, :k] for each in given], kept, place)
            some = head if k == some.shape[1] else torch.cat([head, some[:, k:]], 1)
            if output_hidden_states:
                states.append(some if order is None else scatter_tokens(values, order, some))
        out = some if order is None else scatter_tokens(values, order, some)
        return BaseModelOutput(last_hidden_state=out, hidden_states=tuple(states) if output_hidden_states else None)

    def scores(self, values: Tensor, positions: Tensor, shapes: Shapes, valid: Tensor | None) -> Tensor:
        """The logits (B, S) that tokens are chosen by."""
        given = values + positions
        given = given.masked_fill(~_inside(shapes, valid, values)[..., None], 0)
        embed = self.embed or self._model_owns[1]
        assert embed is not None
        scores: Tensor = self.scorer(embed(given), shapes, valid if self.variant == "paper" else None)
        return scores

    def _layer(
        self, index: int, tokens: Tensor, given: Sequence[Tensor], kept: Tensor | None, place: Mapping[str, Any]
    ) -> Tensor:
        """A layer on its tokens (B, k, width); those that are not kept come back as they are."""
        layer, (positions, references, foreground), before = self.layers[index], given, tokens
        if self.topk:
            rank = self._object_rank(tokens, foreground)
            tokens = self.objects[index](tokens, positions, rank, self.topk, kept if self.variant == "paper" else None)
        found, _ = layer.self_attn(
            hidden_states=tokens, position_embeddings=positions, reference_points=references, **place
        )
        tokens = layer.self_attn_layer_norm(tokens + F.dropout(found, layer.dropout, self.training))
        tokens = layer.final_layer_norm(tokens + layer.mlp(tokens))
        return tokens if kept is None else torch.where(kept[..., None], tokens, before)

    @torch.no_grad()
    def _object_rank(self, tokens: Tensor, foreground: Tensor) -> Tensor:
        class_head = self._model_owns[2]
        if class_head is None:
            return foreground
        best = class_head(tokens).float().amax(-1)
        return best * foreground if self.variant == "as_released" else best.sigmoid() * foreground.sigmoid()

    def extra_repr(self) -> str:
        return f"rho={self.rho}, betas={self.betas}, topk={self.topk}, variant={self.variant!r}"


def _inside(shapes: Shapes, valid: Tensor | None, like: Tensor) -> Tensor:
    """Which tokens are real and not at the very edge, bool (B, S): their centre lies within 0.01 to 0.99 of the picture's sides."""
    found = []
    masks: Sequence[Tensor | None] = (
        [None] * len(shapes) if valid is None else valid.split([height * width for height, width in shapes], 1)
    )
    for (height, width), mask in zip(shapes, masks, strict=True):
        real = (
            like.new_ones(len(like), height, width, dtype=torch.bool)
            if mask is None
            else mask.unflatten(1, (height, width))
        )
        sides = []
        for side, count in ((height, real[:, :, 0].sum(1)), (width, real[:, 0].sum(1))):
            centre = (torch.arange(side, device=like.device) + 0.5) / count[:, None]
            sides.append((centre > BORDER) & (centre < 1 - BORDER))
        found.append((sides[0][:, :, None] & sides[1][:, None] & real).flatten(1))
    return torch.cat(found, 1)


def _check_encoder(encoder: Any) -> None:
    parts = ("self_attn", "self_attn_layer_norm", "mlp", "final_layer_norm")
    layers = getattr(encoder, "layers", None)
    if not layers or not hasattr(encoder, "get_reference_points"):
        raise ValueError(f"encoder must be one of Deformable DETR, got {type(encoder).__name__}")
    for layer in layers:
        if not all(hasattr(layer, part) for part in parts) or not hasattr(layer.self_attn, "sampling_offsets"):
            raise ValueError(f"encoder must have layers of deformable attention, got {type(layer).__name__}")
