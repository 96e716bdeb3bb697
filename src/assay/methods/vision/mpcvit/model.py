"""The two vision transformers of MPCViT, with heads of any kind.

Blocks as in the compact transformers that the release builds on: x = x + attention(pre_norm(x)); x = norm1(x); x = x + mlp(x). The second
norm thus stands in the residual stream. Queries, keys and values have no bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier, resized_positions, tokens_to_map
from assay.methods.core.vision.blocks import DropPath, drop_path_rates, init_transformer
from assay.methods.core.vision.registry import backbones
from assay.methods.vision.mpcvit.attention import KINDS, Kind
from assay.methods.vision.mpcvit.mlp import FusedMlp, TokenMlp
from assay.methods.vision.mpcvit.search import HeadMixture

CONFIGS: dict[str, dict[str, Any]] = {
    "mpcvit_7_4_32": {"input_size": 32, "depth": 7, "num_heads": 4, "embed_dim": 256},  # CIFAR
    "mpcvit_9_12_64": {"input_size": 64, "depth": 9, "num_heads": 12, "embed_dim": 192},  # Tiny-ImageNet
}


class Attention(nn.Module):
    """Multi-head attention around a `HeadMixture`: (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int, *, kinds: Sequence[Kind] | None, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mix = HeadMixture(heads, kinds=kinds, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """One layer, see the module."""

    mlp: TokenMlp | FusedMlp

    def __init__(self, width: int, heads: int, hidden: int, *, kinds: Sequence[Kind] | None, dropout: float, drop_path: float,
                 gelu_of: int | None, relu_after: bool) -> None:  # fmt: skip
        super().__init__()
        self.pre_norm, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, kinds=kinds, dropout=dropout)
        self.mlp = TokenMlp(width, hidden, tokens=gelu_of, relu_after=relu_after)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop_path(self.self_attn(self.pre_norm(x))))
        return x + self.drop_path(self.mlp(x))


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code: names without its two wrappers, alpha (1, heads, 1, 1) and beta (1, tokens, 1) flat."""
    found = {}
    for name, tensor in state.items():
        name = name.replace("tokenizer.conv_layers.0.0.", "patch_embed.").removeprefix("classifier.")
        if name.startswith("blocks."):
            for theirs, ours in ((".linear1.", ".mlp.fc1."), (".linear2.", ".mlp.fc2.")):
                name = name.replace(theirs, ours)
            if name.endswith((".self_attn.alpha", ".beta")):
                name = name.replace(".self_attn.alpha", ".self_attn.mix.alpha").replace(".beta", ".mlp.beta")
                tensor = tensor.flatten()
        found[name] = tensor
    return found


@backbones(CONFIGS, layouts={"official": from_official})
class MPCViT(Backbone):
    """A vision transformer with a class token, patches of 4, and heads that are searched or of given kinds.

    `attention`: "search" (a mixture in every head, see `search`), a kind for all heads, or one kind a head for every layer. `linear_gelu`
    adds a beta a token to every MLP (MPCViT+), which ties the model to its `input_size`; without it other sizes work, positions being
    interpolated, and pixels beyond the last whole patch are left out. Tokens are (batch, 1 + patches, embed_dim), the class token first.
    Published with `attn_drop_rate` and `drop_path_rate` 0.1, 300 epochs of search, 600 after it. Raises ValueError for sizes that clash.

    When not to use it: where nothing is encrypted. Softmax costs little in the clear, and it is as accurate or more.

    >>> model = MPCViT(num_classes=10, input_size=16, depth=2, num_heads=2, embed_dim=32).eval()
    >>> model(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 10])
    """

    classifier_name: ClassVar[str] = "fc"

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        input_size: int = 32,
        patch_size: int = 4,
        depth: int,
        num_heads: int,
        embed_dim: int,
        mlp_ratio: float = 2.0,
        attention: Literal["search"] | Kind | Sequence[Sequence[Kind]] = "search",
        linear_gelu: bool = False,
        relu_after: bool = False,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        depth, heads = checks.whole("depth", depth, low=1), checks.whole("num_heads", num_heads, low=1)
        width = checks.whole("embed_dim", embed_dim, low=1)
        patch = checks.whole("patch_size", patch_size, low=1)
        hidden = int(width * checks.number("mlp_ratio", mlp_ratio, above=0))
        if width % heads:
            raise ValueError(f"embed_dim must be divisible by num_heads={heads}, got {width}")
        if input_size % patch:
            raise ValueError(f"input_size must be divisible by patch_size={patch}, got {input_size}")
        kinds = kinds_of(attention, depth, heads)
        self.num_features, self.patch_size = width, patch
        self.strides, self.channels = (patch,), (width,)
        self.grid = input_size // patch
        tokens = 1 + self.grid**2
        self.patch_embed = nn.Conv2d(in_chans, width, patch, patch)
        self.class_emb = nn.Parameter(torch.zeros(1, 1, width))
        self.positional_emb = nn.Parameter(torch.empty(1, tokens, width))
        rates = drop_path_rates(checks.number("drop_path_rate", drop_path_rate, low=0, below=1), (depth,))[0]
        gelu_of = tokens if checks.flag("linear_gelu", linear_gelu) else None
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, kinds=kind, dropout=attn_drop_rate, drop_path=rate, gelu_of=gelu_of,
                  relu_after=relu_after)
            for kind, rate in zip(kinds, rates, strict=True)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.fc = classifier(width, num_classes)
        self.apply(init_transformer)
        nn.init.kaiming_normal_(self.patch_embed.weight)
        nn.init.trunc_normal_(self.positional_emb, std=0.2)

    def check_images(self, x: Any) -> None:
        super().check_images(x)
        height, width = x.shape[2:]
        if min(height, width) < self.patch_size:
            raise ValueError(f"x must have at least {self.patch_size} pixels a side, got {height} x {width}")

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last norm: (batch, 1 + patches, embed_dim). Distillation compares these."""
        patches = self.patch_embed(x)
        size = (patches.shape[2], patches.shape[3])
        x = torch.cat([self.class_emb.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        places = resized_positions(self.positional_emb[:, 1:], size, (self.grid, self.grid))
        x = x + torch.cat([self.positional_emb[:, :1], places], 1)
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = self.norm(x)
        return tokens

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """One map, the patches' tokens after the last norm."""
        yield (
            self.patch_size,
            tokens_to_map(
                self.forward_features(x)[:, 1:], x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
            ),
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token, and the classifier on it."""
        y: Tensor = x[:, 0] if pre_logits else self.fc(x[:, 0])
        return y


def kinds_of(
    attention: Literal["search"] | Kind | Sequence[Sequence[Kind]], depth: int, heads: int
) -> list[Sequence[Kind] | None]:
    """The heads' kinds, layer by layer; None for layers that are searched."""
    if attention == "search":
        return [None] * depth
    if isinstance(attention, str):
        checks.choice("attention", attention, ("search", *KINDS))
        return [[cast(Kind, attention)] * heads] * depth
    if len(attention) != depth:
        raise ValueError(f"attention must name kinds for {depth} layers, got {len(attention)}")
    return list(attention)
