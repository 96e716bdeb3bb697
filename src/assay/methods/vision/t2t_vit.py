"""T2T-ViT: image tokens made step by step from overlapping neighbourhoods, then a deep, narrow transformer.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (ICCV 2021). Three soft splits (7 x 7 at
stride 4, then 3 x 3 at stride 2 twice) with a token block after the first two; the last one is projected to the width of the backbone.

    model = build("t2t_vit_14", num_classes=10)          # after `from assay.methods.vision import build`
    tokens = SoftSplit(7, 4, 2)(images)                   # overlapping tokens, and `fused` with the linear layer after it
    attention = RandomFeatureAttention(64, 32)            # linear in the number of tokens

At 224 x 224 the first token block sees 3136 tokens, which is why its attention is linear: random features in the place of softmax
("performer"); the `_t_` models have softmax there ("transformer"). "convolution" and "patches" are what the paper compares with:
three plain convolutions, and the hard patches of a ViT.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier, map_to_tokens, resized_positions, tokens_to_map
from assay.methods.core.vision.blocks import DropPath, Mlp, drop_path_rates, init_transformer
from assay.methods.core.vision.registry import backbones

Kind = Literal["performer", "transformer", "convolution", "patches"]
Split = tuple[int, int, int]  # kernel, stride, padding
KINDS = ("performer", "transformer", "convolution", "patches")
EPSILON = 1e-8  # of the denominator in released token blocks
SPLITS: tuple[Split, Split, Split] = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
LITE: dict[str, Any] = {"embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": {**LITE, "depth": 7},
    "t2t_vit_10": {**LITE, "depth": 10},
    "t2t_vit_12": {**LITE, "depth": 12},
    "t2t_vit_14": {"embed_dim": 384, "depth": 14, "num_heads": 6},
    "t2t_vit_14_384": {"embed_dim": 384, "depth": 14, "num_heads": 6, "input_size": 384},
    "t2t_vit_19": {"embed_dim": 448, "depth": 19, "num_heads": 7},
    "t2t_vit_24": {"embed_dim": 512, "depth": 24, "num_heads": 8},
    "t2t_vit_t_14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "tokens_type": "transformer"},
    "t2t_vit_t_19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "tokens_type": "transformer"},
    "t2t_vit_t_24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "tokens_type": "transformer"},
    "t2t_vit_14_resnext": {"embed_dim": 384, "depth": 14, "num_heads": 32},
    "t2t_vit_14_wide": {"embed_dim": 768, "depth": 4, "num_heads": 12},
}


class SoftSplit(nn.Module):
    """Overlapping neighbourhoods of a map as tokens: (B, C, H, W) to (B, h * w, C * kernel^2), row by row, zeros outside. Section 3.1.

    A token's numbers are ordered by channel, row, column, as in a convolution's weight. The tokens take kernel^2 / stride^2 times the
    memory of the map (3.1 times for 7 at stride 4): where a linear layer follows at once, `fused` gives the same without them.

    >>> SoftSplit(3, 2, 1)(torch.zeros(1, 8, 14, 14)).shape
    torch.Size([1, 49, 72])
    """

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel = checks.whole("kernel", kernel, low=1)
        self.stride = checks.whole("stride", stride, low=1)
        self.padding = checks.whole("padding", padding, low=0)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that a map of this size gives. Raises ValueError for a map that no kernel fits into."""
        rows, columns = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (height, width))
        if min(rows, columns) < 1:
            least = self.kernel - 2 * self.padding
            raise ValueError(
                f"x must be at least {least} x {least} for a soft split of {self.kernel}, got {height} x {width}"
            )
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, ndim=4, empty=True)
        self.grid(*x.shape[2:])
        x = F.pad(x, (self.padding,) * 4)
        cells = x.unfold(2, self.kernel, self.stride).unfold(
            3, self.kernel, self.stride
        )  # (B, C, h, w, kernel, kernel), a view
        return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def fused(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """The map (B, out, h, w) of `linear(self(x))`: a convolution with the weight reshaped; the tokens are never made."""
        checks.tensor("x", x, ndim=4, empty=True)
        self.grid(*x.shape[2:])
        if linear.in_features != x.shape[1] * self.kernel**2:
            raise ValueError(
                f"linear must take {x.shape[1]} x {self.kernel} x {self.kernel} numbers a token, got {linear.in_features}"
            )
        weight = linear.weight.unflatten(1, (x.shape[1], self.kernel, self.kernel))
        return F.conv2d(x, weight, linear.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"


def orthogonal_rows(count: int, dim: int, norm: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Random directions, float32 (count, dim) on the CPU, each of length `norm`, orthogonal to each other in blocks of `dim` rows."""
    checks.whole("count", count, low=1)
    checks.whole("dim", dim, low=1)
    checks.number("norm", norm, above=0)
    blocks = []
    for start in range(0, count, dim):
        square = torch.randn(dim, dim, generator=generator, dtype=torch.float32, device="cpu")
        q, r = torch.linalg.qr(square)
        blocks.append((q * r.diagonal().sign()).T[: count - start])  # the signs make the distribution uniform
    return norm * torch.cat(blocks)


def random_feature_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Attention with weights phi(q) . phi(k), phi(z) = exp(rows z - |z|^2 / 2), normalised over the keys, in time linear in them.

    q (..., N, d), k (..., M, d), v (..., M, e), rows (m, d); returns (..., N, e) in the dtype of v. Positive features: every output lies
    within the values of its sequence. M m (d + e) + N m (d + e + 1) MACs.

    The exponents, features and sums are float32 at least, under autocast too. The largest exponent of each feature over the keys goes
    over to the queries, and the largest of each query is taken away: both cancel in the ratio, so that nothing overflows and the
    denominator is never below 1. No `epsilon` is needed; 1e-8, added to the denominator that is not shifted, is the released code's,
    which fades to 0 where that is smaller.

    >>> q, k, v = torch.randn(3, 2, 100, 8)
    >>> random_feature_attention(q, k, v, orthogonal_rows(16, 8, 8**0.5)).shape
    torch.Size([2, 100, 8])
    """
    checks.tensor("rows", rows, shape=("features", "d"))
    checks.tensor("q", q, shape=("...", "queries", rows.shape[1]), empty=True)
    checks.tensor("k", k, shape=("...", "keys", rows.shape[1]), empty=True)
    checks.tensor("v", v, shape=("...", "keys", "e"), empty=True)
    checks.together(q=q, k=k, v=v)
    if not k.shape[-2]:
        raise ValueError(f"k must not be empty, got shape {tuple(k.shape)}")
    if k.shape[:-2] != q.shape[:-2]:
        raise ValueError(f"k must have the leading dimensions of q, {tuple(q.shape[:-2])}, got {tuple(k.shape[:-2])}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v must have as many rows as k, {tuple(k.shape[:-1])}, got {tuple(v.shape[:-1])}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with _without_autocast(q.device.type):
        of_keys, of_queries = (
            z @ rows.to(dtype).T - z.square().sum(-1, keepdim=True) / 2 for z in (k.to(dtype), q.to(dtype))
        )
        top = of_keys.detach().amax(-2, keepdim=True)
        phi_k = (of_keys - top).exp()
        of_queries = of_queries + top
        largest = of_queries.detach().amax(-1, keepdim=True)
        phi_q = (of_queries - largest).exp()
        summed = phi_k.mT @ v.to(dtype)
        total = phi_q @ phi_k.sum(-2)[..., None]
        if epsilon:
            total = total + epsilon * len(rows) * (-largest).exp()
        return (phi_q @ summed / total).to(v.dtype)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


class RandomFeatureAttention(nn.Module):
    """`random_feature_attention` with fixed random directions `w`, (features, dim): no gradient, in the state dict, never drawn again.

    `row_norm` is the length of the rows. The default, sqrt(features), is what the released weights were trained with; at half as many
    features as dimensions the weights then are those of a Gaussian kernel near exp(-|q - k|^2 / 4). With sqrt(dim) they estimate
    softmax's exp(q . k), too low where |q + k| is large, with a spread that grows as exp(|q + k|^2): scale q and k down, and take more
    features than dimensions.
    `w` stays float32 in `model.half()` and `model.bfloat16()`. Not for causal attention, and not for few tokens: it takes fewer
    operations than softmax attention only where there are more than twice as many tokens as features.
    """

    w: nn.Parameter

    def __init__(self, dim: int, features: int, *, row_norm: float | None = None, epsilon: float = 0.0) -> None:
        super().__init__()
        checks.whole("dim", dim, low=1)
        checks.whole("features", features, low=1)
        self.epsilon = checks.number("epsilon", epsilon, low=0)
        norm = math.sqrt(features) if row_norm is None else checks.number("row_norm", row_norm, above=0)
        rows = orthogonal_rows(features, dim, norm).to(torch.get_default_device())
        self.w = nn.Parameter(rows, requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return random_feature_attention(q, k, v, self.w, epsilon=self.epsilon)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(x: Tensor) -> Tensor:
            found = fn(x)
            return x.to(found.device) if found.dtype in (torch.float16, torch.bfloat16) else found

        return super()._apply(keep, recurse)


class TokenBlock(nn.Module):
    """A transformer layer that changes the width: y = v + proj(attention(q, k, v)), then y + mlp(norm y); v stands for the skip path.

    tokens (B, N, width_in) to (B, N, width), one head. `kind` "performer": random features, as many as half the width, with the released
    epsilon, biases, and dropout on both branches while training; "transformer": softmax, scaled by width_in^-1/2 (as released: the
    width before the layer), without biases and dropout.
    """

    def __init__(self, width_in: int, width: int, kind: Kind = "performer", *, drop: float = 0.0) -> None:
        super().__init__()
        linear = checks.choice("kind", kind, ("performer", "transformer")) == "performer"
        self.norm1, self.norm2 = nn.LayerNorm(width_in), nn.LayerNorm(width)
        self.qkv = nn.Linear(width_in, 3 * width, bias=linear)
        self.features = RandomFeatureAttention(width, max(1, width // 2), epsilon=EPSILON) if linear else None
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, width)
        self.drop = nn.Dropout(drop if linear else 0.0)
        self.scale = width_in**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        if self.features is not None:
            mixed = self.features(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=self.scale)[:, 0]
        x = v + self.drop(self.proj(mixed))
        return x + self.drop(self.mlp(self.norm2(x)))


class TokensToToken(nn.Module):
    """Images (B, in_chans, H, W) to the map that the backbone's tokens come from, (B, embed_dim, H/16, W/16) with the paper's splits.

    `kind` as in the module docstring; "patches" is one convolution without overlap at the same stride. The last split and its
    projection run as one convolution: nothing stands between them.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, kind: Kind, *, token_dim: int = 64,
        splits: tuple[Split, Split, Split] = SPLITS, drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind = checks.choice("tokens_type", kind, KINDS)
        if len(splits) != 3:
            raise ValueError(f"splits must be three of (kernel, stride, padding), got {splits}")
        checks.number("token_drop_rate", drop, low=0, below=1)
        self.splits = nn.ModuleList(SoftSplit(*split) for split in splits)
        first, second, third = (kernel**2 for kernel, _, _ in splits)
        strides = [stride for _, stride, _ in splits]
        self.strides: tuple[int, ...] = (strides[0], strides[0] * strides[1], math.prod(strides))
        if kind == "patches":
            self.strides = self.strides[-1:]
            self.project: nn.Module = nn.Conv2d(in_chans, embed_dim, self.strides[0], self.strides[0])
            return
        self.project = nn.Linear(third * token_dim, embed_dim)
        if kind == "convolution":
            self.soft_split0 = nn.Linear(first * in_chans, token_dim)
            self.soft_split1 = nn.Linear(second * token_dim, token_dim)
        else:
            self.attention1 = TokenBlock(first * in_chans, token_dim, kind, drop=drop)
            self.attention2 = TokenBlock(second * token_dim, token_dim, kind, drop=drop)

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """The map after each split, fine to coarse; only the last for patches."""
        own: Any = self
        if self.kind == "patches":
            yield own.project(x)
            return
        plain = self.kind == "convolution"
        steps = (own.soft_split0, own.soft_split1) if plain else (own.attention1, own.attention2)
        for split, step in zip(own.splits, steps, strict=False):
            x = split.fused(x, step) if plain else tokens_to_map(step(split(x)), *split.grid(*x.shape[2:]))
            yield x
        yield own.splits[2].fused(x, own.project)


class Attention(nn.Module):
    """Multi-head softmax attention, scaled by (width of a head)^-1/2, without biases on q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm transformer layer of the backbone."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp, self.drop_path = Attention(width, heads), Mlp(width, hidden), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@lru_cache(16)
def sinusoids(count: int, width: int) -> Tensor:
    """Fixed positions, float32 (1, count, width): sines at even, cosines at odd places. Shared: do not write to it."""
    with torch.device("cpu"):
        place = torch.arange(width)
        angle = torch.arange(count)[:, None] / 10000.0 ** (2 * (place // 2).double() / width)
        return torch.where(place % 2 == 0, angle.sin(), angle.cos()).float()[None]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the released checkpoints (their "state_dict_ema") under our names; their token blocks have k before q."""
    found = {}
    for key, tensor in state.items():
        key = key.removeprefix("module.")
        where, block, name = key.partition(".attention1." if ".attention1." in key else ".attention2.")
        if block:
            name = name.removeprefix("attn.").replace("mlp.0.", "mlp.fc1.").replace("mlp.2.", "mlp.fc2.")
            if name.startswith("kqv."):
                k, q, v = tensor.chunk(3)
                name, tensor = name.replace("kqv", "qkv"), torch.cat([q, k, v])
            key = where + block + ("features.w" if name == "w" else name)
        found[key] = tensor
    return found


@backbones(CONFIGS, layouts={"official": from_official})
class T2TViT(Backbone):
    """The whole model: tokens to token, a class token, fixed sinusoids, `depth` layers, a norm, a linear layer on the class token.

    Maps come out at strides 4, 8 (of `token_dim` channels) and 16. Images of other sizes and shapes are taken: positions are
    interpolated, all but that of the class token; the cost grows with the square of the pixels in the backbone, linearly in a
    performer's token blocks. Random features and positions have no gradient and are in the state dict. Released weights are used with
    a scale of (width of a head)^-1/2, as here; the flag `pretrained` of the released builders sets another one.
    """

    def __init__(
        self, *, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 3.0, tokens_type: Kind = "performer",
        token_dim: int = 64, splits: tuple[Split, Split, Split] = SPLITS, token_drop_rate: float = 0.1,
        drop_path_rate: float = 0.0, num_classes: int = 1000, in_chans: int = 3, input_size: int = 224,
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        checks.whole("depth", depth, low=1)
        checks.whole("num_heads", num_heads, low=1)
        checks.number("drop_path_rate", drop_path_rate, low=0, below=1)
        if checks.whole("embed_dim", embed_dim, low=1) % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads={num_heads}, got {embed_dim}")
        self.tokens_to_token = TokensToToken(
            in_chans, embed_dim, tokens_type, token_dim=token_dim, splits=splits, drop=token_drop_rate
        )
        self.strides = self.tokens_to_token.strides
        self.channels = (token_dim,) * (len(self.strides) - 1) + (embed_dim,)
        self.num_features = embed_dim
        self.side = checks.whole("input_size", input_size, low=self.strides[-1]) // self.strides[-1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        table = sinusoids(self.side**2 + 1, embed_dim).to(self.cls_token, copy=True)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        hidden = int(embed_dim * checks.number("mlp_ratio", mlp_ratio, above=0))
        rates = drop_path_rates(drop_path_rate, (depth,))[0]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = classifier(embed_dim, num_classes)
        self.apply(init_transformer)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        for stride, found in zip(self.strides, self.tokens_to_token.maps(x), strict=True):
            if stride != self.strides[-1]:
                yield stride, found
            else:
                yield stride, tokens_to_map(self._encode(found)[:, 1:], *found.shape[2:])

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 1 + tokens, embed_dim) after the last norm, the class token first."""
        *_, last = self.tokens_to_token.maps(x)
        return self._encode(last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out: Tensor = x[:, 0] if pre_logits else self.head(x[:, 0])
        return out

    def _encode(self, found: Tensor) -> Tensor:
        side = (self.side, self.side)
        grid = resized_positions(self.pos_embed[:, 1:], (found.shape[2], found.shape[3]), side)
        tokens = map_to_tokens(found) + grid
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([first, tokens], 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


# --------------------------------------------------------------------------------------------- in models of transformers


def register_random_features(name: str = "assay_random_features", *, features: int = 256, seed: int = 0) -> str:
    """Make `attn_implementation=name` of transformers' encoders: softmax attention estimated by `features` random features a head.

    The directions are those of `seed`, orthogonal, of length sqrt(head width); all heads and layers share them. An estimate: good where
    scores are small, with errors that grow as their exponential; fine-tune with it, or try it first. Padded batches are attended
    to densely by torch's SDPA. Returns the name. Raises ValueError when a causal model uses it, or one with sinks.
    """
    from assay.methods.core.attention.integration import Limits, register_function

    checks.whole("features", features, low=1)

    @lru_cache(16)
    def rows(dim: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # they are kept, and may be trained with later
            generator = torch.Generator().manual_seed(seed)
            return orthogonal_rows(features, dim, math.sqrt(dim), generator=generator).to(device)

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *,
        causal: bool, scale: float | None, limits: Limits, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if causal or sinks is not None or limits.start is not None or limits.window is not None:
            raise ValueError(f"{name} must be used in encoders: every query sees every key, without sinks or windows")
        root = math.sqrt(q.shape[-1] ** -0.5 if scale is None else scale)
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        return random_feature_attention(q * root, k * root, v, rows(q.shape[-1], q.device))

    register_function(name, attend)
    return name
