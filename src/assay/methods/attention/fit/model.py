"""Layer strings, the stages they stand for, and the encoder built from these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.attention.fit.layers import EPS, Block, Cross

Causal = Literal["none", "latents", "decoder"]
Positions = Literal["learned", "sincos"]
Stages = list[tuple[int, int]]


def parse_layers(layers: str) -> Stages:
    """ "(2)4(2)" to [(2, 4), (2, 0)]: the local and global layers of each stage.

    Raises ValueError for anything else than such stages, a stage of no layers, or one without global layers before the last.

    >>> parse_layers("(2)4(2)")
    [(2, 4), (2, 0)]
    """
    if not isinstance(layers, str):
        raise TypeError(f"layers must be text like '(2)4(2)4(2)', got {layers!r}")
    if not re.fullmatch(r"(\(\d+\)\d+)*\(\d+\)\d*", layers):
        raise ValueError(f"layers must look like '(2)4(2)4(2)', got {layers!r}")
    stages = [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", layers)]
    if any(b == 0 for _, b in stages[:-1]):
        raise ValueError(f"layers must have global layers in every stage but the last, got {layers!r}")
    if stages[-1] == (0, 0):
        raise ValueError(f"layers must not end in a stage of no layers, got {layers!r}")
    return stages


def format_layers(stages: Sequence[tuple[int, int]]) -> str:
    """The string that `parse_layers` makes into `stages`."""
    return "".join(f"({a}){b or ''}" for a, b in stages)


class Stage(nn.Module):
    """Local layers, then (with global ones) read, global layers and, unless it is the last, write."""

    def __init__(
        self, local: int, glob: int, dims: tuple[int, int], heads: tuple[int, int], ratio: int, cross: int, last: bool,
        context: bool,
    ):  # fmt: skip
        super().__init__()
        dim, latent_dim = dims
        self.local_layers = nn.ModuleList(Block(dim, heads[0], ratio) for _ in range(local))
        self.global_layers = nn.ModuleList(Block(latent_dim, heads[1], ratio) for _ in range(glob))
        if glob:
            self.read = Cross(latent_dim, dim, min(heads), cross)
            if context:
                self.read_context = Cross(latent_dim, latent_dim, heads[1])
            if not last:
                self.write = Cross(dim, latent_dim, min(heads), cross)


class Interleaved(nn.Module):
    """The stages on tokens x (batch, t, n, dim) and latents z (batch, t, m, latent_dim), norms at the end; widths stay.

    `causal` "latents": latents see their own and earlier groups. "decoder": also tokens inside a group are causal, and a group reads
    the latents of the group before it. `cross_ratio` > 0 gives reads and writes an MLP; `context` lets the latents
    read further tokens (batch, k, latent_dim) before every global stage. Raises ValueError for widths heads do not divide.
    """

    def __init__(
        self,
        layers: str,
        *,
        dim: int,
        latent_dim: int,
        heads: int,
        latent_heads: int,
        ratio: int = 4,
        cross_ratio: int = 0,
        causal: Causal = "none",
        context: bool = False,
    ):
        super().__init__()
        checks.choice("causal", causal, get_args(Causal))
        for name, size in (("dim", dim), ("latent_dim", latent_dim), ("ratio", ratio)):
            checks.whole(name, size, low=1)
        checks.whole("cross_ratio", cross_ratio, low=0)
        self.layers, self.causal, self.context = parse_layers(layers), causal, context
        self.dim, self.latent_dim = dim, latent_dim
        dims, both, last = (dim, latent_dim), (heads, latent_heads), len(self.layers) - 1
        self.stages = nn.ModuleList(
            Stage(a, b, dims, both, ratio, cross_ratio, i == last, context) for i, (a, b) in enumerate(self.layers)
        )
        self.norm, self.latent_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(latent_dim, eps=EPS)

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and latents after all stages; `mask` (batch, t, n) and `context_mask` (batch, k) bool, False on padding.

        Raises ValueError for tensors of other shapes, for a context where the model was made without, and for a mask of none;
        TypeError for other types.
        """
        checks.tensor("x", x, shape=("batch", "t", "n", self.dim), empty=True)
        checks.tensor("z", z, shape=(*x.shape[:2], "m", self.latent_dim), empty=True)
        if mask is not None:
            checks.tensor("mask", mask, shape=tuple(x.shape[:3]), dtype="bool", empty=True)
        if context is not None:
            checks.tensor("context", context, shape=(len(x), "k", self.latent_dim), empty=True)
        if context_mask is not None:
            if context is None:
                raise ValueError("context_mask must be None where there is no context")
            checks.tensor("context_mask", context_mask, shape=tuple(context.shape[:2]), dtype="bool", empty=True)
        if context is not None and not self.context:
            raise ValueError("context must be None: the model was made without context=True")
        groups, m = z.shape[1:3]
        keys = None if mask is None else mask.flatten(0, 1)[:, None, None]
        global_keys = None
        if mask is not None:  # groups that hold only padding
            global_keys = mask.any(2).repeat_interleave(m, 1)[:, None, None]
        if self.causal != "none":
            group = torch.arange(groups, device=z.device).repeat_interleave(m)
            earlier = group[None, None, :, None] >= group
            global_keys = earlier if global_keys is None else global_keys & earlier
        context_keys = None if context_mask is None else context_mask[:, None, None]
        for stage in self.stages:
            y = x.flatten(0, 1)
            for block in stage.local_layers:  # type: ignore[union-attr]
                y = block(y, keys, self.causal == "decoder")
            x = y.view_as(x)
            if not stage.global_layers:
                continue
            z = stage.read(z.flatten(0, 1), y, keys).view_as(z)  # type: ignore[operator]
            w = z.flatten(1, 2)
            if context is not None:
                w = stage.read_context(w, context, context_keys)  # type: ignore[operator]
            for block in stage.global_layers:  # type: ignore[union-attr]
                w = block(w, global_keys)
            z = w.view_as(z)
            if hasattr(stage, "write"):
                seen = z
                if self.causal == "decoder":
                    seen = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
                x = stage.write(y, seen.flatten(0, 1)).view_as(x)  # type: ignore[operator]
        return self.norm(x), self.latent_norm(z)


def sincos(positions: int, dim: int) -> Tensor:
    """Sines and cosines of positions, wavelengths from 2 pi to 10000 * 2 pi: (positions, dim), dim even."""
    positions = checks.whole("positions", positions, low=0)
    if checks.whole("dim", dim, low=2) % 2:
        raise ValueError(f"dim must be even for sincos positions, got {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class FIT(nn.Module):
    """The encoder: grouped inputs (batch, t, n, inputs) to tokens (batch, t, n, dim) and latents (batch, t, m, latent_dim), normed.

    At most `groups` groups and `group_size` tokens in each (see `group_image`, `group_sequence`), `latents` latents a group. Other
    options as `Interleaved` takes them. `positions` "sincos" has no parameters. Raises ValueError for larger inputs.

    >>> model = FIT("(1)1(1)", inputs=12, groups=4, group_size=9, dim=32, latent_dim=32, heads=2, latent_heads=2)
    >>> tokens, latents = model(torch.randn(2, 4, 9, 12))
    >>> tokens.shape
    torch.Size([2, 4, 9, 32])
    """

    def __init__(
        self,
        layers: str = "(2)4(2)",
        *,
        inputs: int,
        groups: int,
        group_size: int,
        latents: int = 4,
        dim: int = 256,
        latent_dim: int = 256,
        heads: int = 4,
        latent_heads: int = 4,
        positions: Positions = "learned",
        **options: Any,
    ):
        super().__init__()
        for name, size in (("inputs", inputs), ("groups", groups), ("group_size", group_size), ("latents", latents)):
            checks.whole(name, size, low=1)
        checks.choice("positions", positions, get_args(Positions))
        self.groups, self.group_size, self.latents = groups, group_size, latents
        self.stem, self.stem_norm = nn.Linear(inputs, dim), nn.LayerNorm(dim, eps=EPS)
        if positions == "learned":
            self.positions: Tensor = nn.Parameter(0.02 * torch.randn(group_size, dim))
        else:
            self.register_buffer("positions", sincos(group_size, dim), persistent=False)
        self.table = nn.Parameter(0.02 * torch.randn(groups * latents, latent_dim))
        self.body = Interleaved(
            layers, dim=dim, latent_dim=latent_dim, heads=heads, latent_heads=latent_heads, **options
        )

    def initial(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and latents before the first stage."""
        checks.tensor("x", x, shape=("batch", "t", "n", self.stem.in_features), empty=True)
        if x.shape[1] > self.groups or x.shape[2] > self.group_size:
            raise ValueError(
                f"x must be (batch, up to {self.groups} groups, up to {self.group_size} tokens, inputs), "
                f"got {tuple(x.shape)}"
            )
        tokens = self.stem_norm(self.stem(x)) + self.positions[: x.shape[2]].to(x.dtype)
        rows = self.table[: x.shape[1] * self.latents].unflatten(0, (-1, self.latents))
        return tokens, rows.expand(len(x), -1, -1, -1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`mask` (batch, t, n) bool, False on padding; context as in `Interleaved`."""
        tokens, z = self.initial(x)
        found: tuple[Tensor, Tensor] = self.body(tokens, z, mask, context, context_mask)
        return found
