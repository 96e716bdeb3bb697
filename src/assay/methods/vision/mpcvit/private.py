"""A whole MPCViT on shares: nobody sees the image, the weights, or what lies between; only the logits are opened."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.vision.mpcvit.attention import EPS, KINDS, Kind
from assay.methods.vision.mpcvit.mlp import FusedMlp, TokenMlp
from assay.methods.vision.mpcvit.model import Attention, Block, MPCViT
from assay.methods.vision.mpcvit.mpc import Shared, TwoParties


def private_attention(parties: TwoParties, kind: Kind, q: Shared, k: Shared, v: Shared) -> Shared:
    """Attention of one kind on shares: (..., queries, dim), (..., keys, dim) and (..., keys, value dim) to (..., queries, value dim).

    Weights are divided by their sum after they have met the values, which is the same and takes n d products, not n^2. "scaling" is
    Q (K^T V): two matrix products, and nothing for the weights themselves. Sums of weights have to lie in (0.01, 500).
    """
    scale = q.shape[-1] ** -0.5
    if kind == "scaling":
        mixed = parties.matmul(k.map(lambda t: t.mT), v)
        return parties.matmul(q, parties.scale(mixed, scale / k.shape[-2]))
    scores = parties.matmul(parties.scale(q, scale), k.map(lambda t: t.mT))
    if kind == "softmax":
        raw = parties.exp(scores - parties.maximum(scores))
        total = raw.map(lambda t: t.sum(-1, keepdim=True))
    else:
        raw = parties.relu(scores) if kind == "relu_softmax" else parties.square(scores)
        total = parties.add(raw.map(lambda t: t.sum(-1, keepdim=True)), EPS)
    return parties.multiply(parties.matmul(raw, v), parties.reciprocal(total))


@torch.no_grad()
def private_forward(model: MPCViT, images: Tensor, parties: TwoParties) -> Tensor:
    """The logits (batch, classes) of images, computed on shares of them and of all weights.

    `parties.transcript.during` has what was sent under "linear", "norm", "gelu" (the MLPs' non-linear parts) and "attention". Raises
    ValueError for a model whose heads are searched still: what is evaluated has to be fixed.

    When not to use it: for anything secret (both parties are simulated here), or for networks that are not tiny: it is slow.
    """
    model.check_images(images)
    patch = model.patch_size
    if any(size % patch for size in images.shape[2:]) or images.shape[2] // patch != model.grid:
        raise ValueError(f"x must be {model.input_size} pixels a side, got {tuple(images.shape[2:])}")
    patches = F.unfold(images, patch, stride=patch).mT  # (batch, patches, pixels): nothing but places
    embed = nn.Linear(patches.shape[-1], model.num_features)
    embed.weight.copy_(model.patch_embed.weight.flatten(1))
    assert model.patch_embed.bias is not None
    embed.bias.copy_(model.patch_embed.bias)
    x = linear(parties, parties.share(patches), embed)
    first = parties.share(model.class_emb.expand(len(images), -1, -1))
    x = Shared(torch.cat([first.parts, x.parts], 2)) + parties.share(model.positional_emb)
    for block in model.blocks:
        assert isinstance(block, Block)
        x = x + _attention(parties, norm(parties, x, block.pre_norm), block.self_attn)
        x = norm(parties, x, block.norm1)
        x = x + _mlp(parties, x, block.mlp)
    x = norm(parties, x.map(lambda t: t[:, 0]), model.norm)
    if isinstance(model.fc, nn.Linear):
        x = linear(parties, x, model.fc)
    return parties.reveal(x)


def linear(parties: TwoParties, x: Shared, layer: nn.Linear) -> Shared:
    """A linear layer whose weights are shared too, so that it is a product of two secrets."""
    with parties.during("linear"):
        y = parties.matmul(x.map(lambda t: t.flatten(0, -2)), parties.share(layer.weight.T))
    y = y.map(lambda t: t.unflatten(0, x.shape[:-1]))
    return y if layer.bias is None else y + parties.share(layer.bias)


def norm(parties: TwoParties, x: Shared, layer: nn.LayerNorm) -> Shared:
    """A layer norm with shared weights."""
    with parties.during("norm"):
        return parties.layer_norm(x, parties.share(layer.weight), parties.share(layer.bias), layer.eps)


def _attention(parties: TwoParties, x: Shared, layer: Attention) -> Shared:
    kinds = layer.mix.kinds
    if kinds is None:
        raise ValueError("model must have heads of fixed kinds, but its heads are searched: harden it first")
    qkv = linear(parties, x, layer.qkv).map(lambda t: t.unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4))
    q, k, v = (qkv.map(lambda t, i=i: t[i]) for i in range(3))  # type: ignore[misc]
    parts, order = [], []
    for kind in KINDS:
        heads = [head for head, its in enumerate(kinds) if its == kind]
        if heads:
            order += heads
            some = [each.map(lambda t: t[:, heads]) for each in (q, k, v)]  # noqa: B023
            with parties.during("attention"):
                parts.append(private_attention(parties, kind, *some).parts)
    places = sorted(range(layer.heads), key=order.__getitem__)
    mixed = Shared(torch.cat(parts, 2)).map(lambda t: t[:, places].transpose(1, 2).flatten(2))
    return linear(parties, mixed, layer.proj)


def _mlp(parties: TwoParties, x: Shared, layer: TokenMlp | FusedMlp) -> Shared:
    gelu = layer.gelu_tokens
    if gelu is None and layer.tokens is not None:
        raise ValueError("model must have tokens of fixed kinds, but its betas are searched: harden them first")
    tokens = x.shape[1]
    gelu = list(range(tokens)) if gelu is None else gelu
    rest = [place for place in range(tokens) if place not in set(gelu)]
    parts = []
    if gelu:
        assert layer.fc1 is not None
        assert layer.fc2 is not None
        hidden = linear(parties, x.map(lambda t: t[:, gelu]), layer.fc1)
        with parties.during("gelu"):
            hidden = parties.gelu(hidden)
        parts.append(linear(parties, hidden, layer.fc2).parts)
    if rest:
        y = x.map(lambda t: t[:, rest])
        for each in [layer.fused] if isinstance(layer, FusedMlp) else [layer.fc1, layer.fc2]:
            y = linear(parties, y, each)
        if layer.relu_after:
            with parties.during("gelu"):
                y = parties.relu(y)
        parts.append(y.parts)
    order = [*gelu, *rest]
    places = sorted(range(tokens), key=order.__getitem__)
    return Shared(torch.cat(parts, 2)).map(lambda t: t[:, places])
