"""SAM's prompt encoder and mask decoder for many prompts of one image, at half of the work and with equal masks.

transformers repeats the image's embedding for every prompt before its decoder starts, and then projects all of its positions ten times
for each. Two things are saved here; both are our addition (the paper shares the encoder's work only):

- All prompts see the same image until the first block has written to it: the products of the image alone are made once
  (`image_products`). At SAM's size that is 22 % of the multiply-accumulates of a prompt.
- A prompt has 7 tokens and the image 4096 positions, so projections of the image are brought over to the tokens: (W x) . q is
  x . (W^T q), and a weighted sum of W x is W times the weighted sum of x. With 8 heads of 7 tokens, 56 products of a position stand for
  128. Where that is no less (many tokens, few channels), or a projection is no plain linear layer (an adapter), the image is projected.

Only the masks that are wanted are made. Masks are equal to transformers' up to rounding.

    products = image_products(sam, embedding)                              # (1, 256, 64, 64)
    logits, iou = decode(sam, products, box_tokens(sam, boxes))            # (P, 1, 256, 256), (P, 1)
    logits, iou = decode(sam, products, point_tokens(sam, points), several=True)   # (P, 3, 256, 256), (P, 3)

Positions are encoded in float32 whatever the model's dtype: bfloat16 tells apart 256 of the 1024 pixels of a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks


@dataclass(frozen=True)
class ImageProducts:
    """What the decoder needs of an image, whatever the prompt, for N positions of `size` (rows, columns).

    `image` and `positions` are (1, N, C). `keys` and `values` (1, heads, N, d) are what the tokens of the first block look up,
    `queries` (1, heads, N, d) what the image asks the tokens there.
    """

    image: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor
    size: tuple[int, int]


def check_sam(sam: Any) -> None:
    """Raise TypeError unless `sam` is transformers' `SamModel`: SAM-HQ and SAM 2 have other decoders."""
    from transformers import SamModel

    if not isinstance(sam, SamModel):
        raise TypeError(f"sam must be a SamModel of transformers, got {type(sam).__name__}")


def image_products(sam: Any, embedding: Tensor) -> ImageProducts:
    """The products of one image's embedding (1, C, rows, columns), as `sam.get_image_embeddings` gives it.

    Raises TypeError for another model or dtype, ValueError for another shape. They are good for as long as the decoder's weights stay.
    """
    check_sam(sam)
    decoder = sam.mask_decoder
    kept = sam.prompt_encoder.no_mask_embed.weight
    checks.tensor(
        "embedding", embedding, shape=(1, decoder.hidden_size, "rows", "columns"), dtype=kept.dtype, device=kept.device
    )
    size = embedding.shape[2], embedding.shape[3]
    image = (embedding + kept[:, :, None, None]).flatten(2).transpose(1, 2)
    positions = _grid_positions(sam.shared_image_embedding, size).to(image.dtype)
    block = decoder.transformer.layers[0]
    to_image, to_tokens = block.cross_attn_token_to_image, block.cross_attn_image_to_token
    placed = image + positions
    return ImageProducts(
        image,
        positions,
        _heads(to_image, to_image.k_proj(placed)),
        _heads(to_image, to_image.v_proj(image)),
        _heads(to_tokens, to_tokens.q_proj(placed)),
        size,
    )


def box_tokens(sam: Any, boxes: Tensor) -> Tensor:
    """Two tokens for each box, (P, 2, C): its corners. `boxes` (P, 4): left, top, right, bottom in pixels of the model's input."""
    checks.tensor("boxes", boxes, shape=("boxes", 4), empty=True)
    marks = torch.cat([sam.prompt_encoder.point_embed[corner].weight for corner in (2, 3)])
    return (_prompt_positions(sam, boxes.unflatten(1, (2, 2))) + marks.float()).to(marks.dtype)


def point_tokens(sam: Any, points: Tensor) -> Tensor:
    """Two tokens for each point on an object, (P, 2, C): the point and "no further point". `points` (P, 2): x and y in input pixels."""
    checks.tensor("points", points, shape=("points", 2), empty=True)
    mark, none = sam.prompt_encoder.point_embed[1].weight, sam.prompt_encoder.not_a_point_embed.weight
    first = (_prompt_positions(sam, points[:, None]) + mark.float()).to(mark.dtype)
    return torch.cat([first, none.expand(len(points), 1, -1)], 1)


def decode(sam: Any, products: ImageProducts, prompts: Tensor, *, several: bool = False) -> tuple[Tensor, Tensor]:
    """Masks of P prompts of one image: logits (P, M, 4 rows, 4 columns) and predicted IoUs (P, M).

    `prompts` (P, K, C): `box_tokens` or `point_tokens`, at least one prompt. M is 1 (the mask of a prompt that is not ambiguous: a box),
    or with `several` 3 (whole, part, part of a part: a point). A prompt's masks do not depend on the others. Gradients pass.
    Raises ValueError for no prompts and other shapes.

    When not to use it: prompts with an earlier mask, which change the image before the first block.
    """
    decoder = sam.mask_decoder
    checks.tensor(
        "prompts", prompts, shape=("prompts", "tokens", decoder.hidden_size), dtype=decoder.iou_token.weight.dtype
    )
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts], 1)
    first, *rest = decoder.transformer.layers
    queries, image = _first_block(first, tokens, products)
    for block in rest:
        queries, image = _block(block, queries, image, tokens, products.positions)
    attention = decoder.transformer.final_attn_token_to_image
    seen = _look(attention, queries + tokens, image + products.positions, image)
    queries = decoder.transformer.layer_norm_final_attn(queries + seen)

    pixels = image.transpose(1, 2).unflatten(2, products.size)
    pixels = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(pixels)))
    pixels = decoder.activation(decoder.upscale_conv2(pixels))
    wanted = range(1, decoder.num_mask_tokens) if several else range(1)
    weights = torch.stack([decoder.output_hypernetworks_mlps[mask](queries[:, 1 + mask]) for mask in wanted], 1)
    logits = (weights @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
    return logits, decoder.iou_prediction_head(queries[:, 0])[:, wanted.start : wanted.stop]


def _first_block(block: Any, tokens: Tensor, products: ImageProducts) -> tuple[Tensor, Tensor]:
    """The first two-way block, whose prompts all look at one image: tokens (P, T, C), and an image for each prompt (P, N, C)."""
    attended, _ = block.self_attn(query=tokens[None], key=tokens[None], value=tokens[None])
    queries = block.layer_norm1(attended[0])  # the first block replaces its tokens, and adds no positions to them

    attention = block.cross_attn_token_to_image
    asked = _heads(attention, attention.q_proj(queries + tokens).flatten(0, 1)[None])  # (1, heads, P T, d)
    seen = F.scaled_dot_product_attention(asked, products.keys, products.values, scale=attention.scaling)
    seen = seen.transpose(1, 2).flatten(2).view(*tokens.shape[:2], -1)
    queries = _think(block, queries + attention.out_proj(seen))

    attention = block.cross_attn_image_to_token
    keys = _heads(attention, attention.k_proj(queries + tokens))
    prompts, heads, number, _ = keys.shape
    if _is_less(attention, number):
        scores = products.queries[0] @ keys.permute(1, 3, 0, 2).flatten(2)  # (heads, N, P T): the image is there once
        shares = (attention.scaling * scores).unflatten(2, (prompts, number)).softmax(-1)
        told = _tell(attention, shares.permute(2, 1, 0, 3).flatten(2), queries)
    else:
        values = _heads(attention, attention.v_proj(queries))
        asked = products.queries.expand(prompts, -1, -1, -1)
        told = F.scaled_dot_product_attention(asked, keys, values, scale=attention.scaling)
        told = attention.out_proj(told.transpose(1, 2).flatten(2))
    return queries, block.layer_norm4(products.image + told)


def _block(block: Any, queries: Tensor, image: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """A later two-way block, for tokens (P, T, C) and the image of each prompt (P, N, C)."""
    asked = queries + tokens
    attended, _ = block.self_attn(query=asked[None], key=asked[None], value=queries[None])
    queries = block.layer_norm1(queries + attended[0])
    placed = image + positions
    queries = _think(block, queries + _look(block.cross_attn_token_to_image, queries + tokens, placed, image))

    attention, keys = block.cross_attn_image_to_token, queries + tokens
    if _is_less(attention, tokens.shape[1]):
        projected = _heads(attention, attention.k_proj(keys))
        asked = torch.einsum("phtd,hdc->phtc", projected, _by_head(attention, attention.q_proj)).flatten(1, 2)
        shift = torch.einsum("phtd,hd->pht", projected, attention.q_proj.bias.unflatten(0, projected.shape[1:4:2]))
        scores = attention.scaling * (placed @ asked.transpose(1, 2) + shift.flatten(1)[:, None])  # (P, N, heads T)
        told = _tell(attention, scores.unflatten(2, projected.shape[1:3]).softmax(-1).flatten(2), queries)
    else:
        told = attention(query=placed[:, None], key=keys[None], value=queries[None])[0][:, 0]
    return queries, block.layer_norm4(image + told)


def _think(block: Any, queries: Tensor) -> Tensor:
    """What a block does to its tokens between its looks at the image."""
    queries = block.layer_norm2(queries)
    thought: Tensor = block.layer_norm3(queries + block.mlp(queries))
    return thought


def _look(attention: Any, tokens: Tensor, placed: Tensor, image: Tensor) -> Tensor:
    """Tokens (P, T, C) attend to an image (P, N, C) whose keys are `placed`: its positions added."""
    if not _is_less(attention, tokens.shape[1]):
        seen, _ = attention(query=tokens[None], key=placed[:, None], value=image[:, None])
        return seen[0]
    queries = _heads(attention, attention.q_proj(tokens))
    asked = torch.einsum("phtd,hdc->phtc", queries, _by_head(attention, attention.k_proj)).flatten(1, 2)
    # the keys' bias adds the same to all scores of a token, which softmax does not see
    seen = F.scaled_dot_product_attention(asked[:, None], placed[:, None], image[:, None], scale=attention.scaling)
    seen = seen[:, 0].unflatten(1, queries.shape[1:3])
    values = torch.einsum("phtc,hdc->phtd", seen, _by_head(attention, attention.v_proj)).transpose(1, 2).flatten(2)
    out: Tensor = attention.out_proj(values + attention.v_proj.bias)
    return out


def _tell(attention: Any, shares: Tensor, tokens: Tensor) -> Tensor:
    """What tokens (P, T, C) tell each position (P, N, C), which takes shares (P, N, heads T) of them."""
    values = _heads(attention, attention.v_proj(tokens))
    out = attention.out_proj.weight.unflatten(1, (values.shape[1], -1))
    told: Tensor = shares @ torch.einsum("phtd,chd->phtc", values, out).flatten(1, 2) + attention.out_proj.bias
    return told


def _is_less(attention: Any, tokens: int) -> bool:
    """Whether bringing the projections of the image over to so many tokens is less work, and may be done."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    plain = all(type(each) is nn.Linear and each.bias is not None for each in projections)
    return plain and attention.num_attention_heads * tokens < attention.internal_dim


def _by_head(attention: Any, projection: nn.Linear) -> Tensor:
    """The weights of a projection, (heads, d, C)."""
    return projection.weight.unflatten(0, (attention.num_attention_heads, -1))


def _heads(attention: nn.Module, x: Tensor) -> Tensor:
    """(B, L, heads d) to (B, heads, L, d)."""
    heads: Any = attention.num_attention_heads
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _encoded(embedding: nn.Module, places: Tensor) -> Tensor:
    """Random Fourier features of places (..., 2) from 0 to 1, x first: (..., C) float32."""
    directions: Any = embedding.positional_embedding
    turns = (2 * places.float() - 1) @ directions.float()
    return torch.cat([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], -1)


def _prompt_positions(sam: Any, places: Tensor) -> Tensor:
    """Of places (..., 2) in input pixels; a pixel's middle lies half a pixel further."""
    return _encoded(sam.prompt_encoder.shared_embedding, (places + 0.5) / sam.prompt_encoder.input_image_size)


def _grid_positions(embedding: nn.Module, size: tuple[int, int]) -> Tensor:
    """Of the middles of all positions of an embedding, row by row: (1, N, C)."""
    parameter: Any = embedding.positional_embedding
    rows, columns = ((torch.arange(side, device=parameter.device) + 0.5) / side for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return _encoded(embedding, torch.stack([x, y], -1).flatten(0, 1))[None]
