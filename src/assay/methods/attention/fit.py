"""FIT: transformers with local attention inside groups of tokens and global attention over a few latents a group (arXiv 2305.12689).

Tokens (batch, t groups, n tokens, dim) have m << n latents a group. A layer string like "(2)4(2)4(2)" says how they alternate: local
layers (in parentheses) attend inside each group; the group's latents read its tokens; global layers attend over all latents; the
tokens of each group read back what its latents learnt ("write"). Groups know of each other through latents only. Attention looks
at L n pairs a local layer and (L m / n)^2 a global one: with n growing as the cube root of L, L^(4/3) both.

After the paper and the official code: pre-norm layers, epsilon 1e-6, MLP of ratio 4, cross-attention as wide as the narrower side
with a norm for either, positions shared by all groups, no write after the last stage (so "(2)4" never writes: its tokens stay
local). In the decoder tokens are causal inside a group, latents over groups, and a group reads the latents of the group before.
`our choice`: padding masks reach local layers, reads and global layers (groups of padding alone have no say); generation keeps
the current group's keys, and the latents' keys of earlier groups. Chunk-causal attention over the latents is a mask.

When NOT to use it: for sequences of up to about a thousand tokens, where full attention is as cheap; where single tokens far
apart must see each other exactly (everything between groups passes through m vectors); with m growing as n, which is quadratic again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Causal = Literal["none", "latents", "decoder"]
Positions = Literal["learned", "sincos"]
Stages = list[tuple[int, int]]
State = dict[str, Tensor]
EPS = 1e-6


# ------------------------------------------------------------------------------------------------------------- layer strings


def parse_layers(layers: str) -> Stages:
    """ "(2)4(2)" to [(2, 4), (2, 0)]: the local and global layers of each stage.

    Raises ValueError for anything else than such stages, a stage of no layers, or one without global layers before the last.
    """
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


# ------------------------------------------------------------------------------------------------------------------ grouping


def group_sequence(x: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(batch, L, dim) to groups (batch, t, size, dim), zeros behind the end, and where tokens are: (batch, t, size) bool, None: all.

    `mask` (batch, L) bool, False where x itself is padding.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    length, tail = x.shape[1], -x.shape[1] % size
    if mask is None and tail:
        mask = x.new_ones(len(x), length, dtype=torch.bool)
    there = None if mask is None else F.pad(mask, (0, tail)).unflatten(1, (-1, size))
    return F.pad(x, (0, 0, 0, tail)).unflatten(1, (-1, size)), there


def ungroup_sequence(x: Tensor, length: int) -> Tensor:
    """Groups (batch, t, n, dim) back to (batch, length, dim)."""
    return x.flatten(1, 2)[:, :length]


def group_image(images: Tensor, patch: int, tile: int) -> tuple[Tensor, Tensor | None]:
    """Images (batch, channels, height, width) to (batch, t, tile^2, channels patch^2), row-major tiles of row-major patches.

    Sides are padded with zeros to whole tiles; the mask (batch, t, tile^2), None where nothing was, is False on patches of padding.
    """
    if images.ndim != 4 or patch < 1 or tile < 1:
        raise ValueError(
            f"images must have 4 axes, patch and tile be at least 1, got {tuple(images.shape)}, {patch} and {tile}"
        )
    side, (height, width) = patch * tile, images.shape[2:]
    down, right = -height % side, -width % side
    x = F.pad(images, (0, right, 0, down))
    x = x.unflatten(3, (-1, tile, patch)).unflatten(2, (-1, tile, patch))  # b c (Y y p) (X x q)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(3, 4).flatten(1, 2)
    rows, columns = -(-height // patch), -(-width // patch)
    if (rows, columns) == ((height + down) // patch, (width + right) // patch):
        return x, None
    there = torch.zeros(len(images), 1, (height + down) // patch, (width + right) // patch, device=images.device)
    there[:, :, :rows, :columns] = 1
    return x, group_image(there, 1, tile)[0][..., 0].bool()


def ungroup_image(x: Tensor, height: int, width: int, patch: int, tile: int) -> Tensor:
    """Groups as of `group_image` back to images (batch, channels, height, width)."""
    across = -(-width // (patch * tile))
    x = x.unflatten(3, (-1, patch, patch)).unflatten(2, (tile, tile)).unflatten(1, (-1, across))  # b Y X y x c p q
    x = x.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5).flatten(2, 4)
    return x[:, :, :height, :width]


# -------------------------------------------------------------------------------------------------------------------- layers


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """SDPA of (batch, heads, tokens, dim); `mask` bool over keys, (batch, 1, 1 or queries, keys). A query without keys gets zeros."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    some = mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, mask | ~some) * some


class Attention(nn.Module):
    """Multi-head attention of x (batch, tokens, dim) over a context (batch, keys, context_dim), min(dim, context_dim) wide."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        inner = min(dim, context_dim)
        if heads < 1 or inner % heads:
            raise ValueError(f"heads must divide the attention's width ({inner}), got {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj, self.v_proj = nn.Linear(context_dim, inner), nn.Linear(context_dim, inner)
        self.o_proj = nn.Linear(inner, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, keys, dim) each."""
        return self._heads(self.k_proj(context)), self._heads(self.v_proj(context))

    def over(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention of x over keys and values."""
        y = attend(self._heads(self.q_proj(x)), k, v, mask, causal)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.over(x, *self.keys(context), mask, causal)


def mlp(dim: int, ratio: int) -> nn.Sequential:
    """Two linear layers with GELU between them, `ratio` * dim wide: (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class Block(nn.Module):
    """A pre-norm transformer layer on (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim, eps=EPS), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim, ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, mask, causal)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def behind(self, x: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x behind tokens whose keys and values are k and v: the outputs for x, and all keys and values."""
        y = self.norm(x)
        new_k, new_v = self.attention.keys(y)
        before, tokens = k.shape[2], x.shape[1]
        k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        mask = None
        if causal and tokens > 1:
            mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=x.device).tril(before)
        x = x + self.attention.over(y, k, v, mask)
        return x + self.mlp(self.mlp_norm(x)), k, v


class Cross(nn.Module):
    """x + attention of x over a context, a norm for each; `ratio` > 0 adds an MLP."""

    def __init__(self, dim: int, context_dim: int, heads: int, ratio: int = 0):
        super().__init__()
        self.norm, self.context_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(context_dim, eps=EPS)
        self.attention = Attention(dim, heads, context_dim)
        if ratio:
            self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim, ratio)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), self.context_norm(context), mask)
        return x + self.mlp(self.mlp_norm(x)) if hasattr(self, "mlp") else x


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
        if causal not in get_args(Causal):
            raise ValueError(f"causal must be one of {', '.join(get_args(Causal))}, got {causal!r}")
        self.layers, self.causal, self.dim, self.latent_dim = parse_layers(layers), causal, dim, latent_dim
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
        """Tokens and latents after all stages; `mask` (batch, t, n) and `context_mask` (batch, k) bool, False on padding."""
        groups, m = z.shape[1:3]
        keys = None if mask is None else mask.flatten(0, 1)[:, None, None]
        global_keys = None
        if mask is not None:  # groups of padding alone
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
    if dim % 2:
        raise ValueError(f"dim must be even for sincos positions, got {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class FIT(nn.Module):
    """The encoder: grouped inputs (batch, t, n, inputs) to tokens (batch, t, n, dim) and latents (batch, t, m, latent_dim), normed.

    At most `groups` groups and `group_size` tokens in each (see `group_image`, `group_sequence`), `latents` latents a group. Other
    options as `Interleaved` takes them. `positions` "sincos" has no parameters. Raises ValueError for larger inputs.
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
        if min(inputs, groups, group_size, latents) < 1:
            raise ValueError(
                "inputs, groups, group_size and latents must be at least 1, "
                f"got {inputs}, {groups}, {group_size} and {latents}"
            )
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
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
        if x.ndim != 4 or x.shape[1] > self.groups or x.shape[2] > self.group_size:
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


# ------------------------------------------------------------------------------------------------------------------ denoiser


@dataclass
class DenoiserOutput:
    """`sample`: what was predicted, shaped as the input. `latents` (batch, t, m, latent_dim): for self-conditioning."""

    sample: Tensor
    latents: Tensor


class FITDenoiser(nn.Module):
    """FIT for diffusion, called as diffusers calls its models: `model(sample, timestep, encoder_hidden_states).sample`.

    Images (batch, channels, up to height, up to width) in patches and tiles (`group_image`). The latents read the time and, with
    `condition_dim`, condition tokens before every global stage, and may start from those of the step before. Options as `FIT`.
    """

    def __init__(
        self,
        layers: str = "(2)4(2)",
        *,
        channels: int = 3,
        height: int,
        width: int,
        patch: int = 8,
        tile: int = 4,
        latent_dim: int = 256,
        condition_dim: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.patch, self.tile = patch, tile
        groups = math.ceil(height / (patch * tile)) * math.ceil(width / (patch * tile))
        options = {"cross_ratio": 4, **options, "context": True, "latent_dim": latent_dim}
        self.fit = FIT(layers, inputs=channels * patch**2, groups=groups, group_size=tile**2, **options)
        self.time = nn.Sequential(
            nn.Linear(latent_dim, 4 * latent_dim), nn.SiLU(), nn.Linear(4 * latent_dim, latent_dim)
        )
        self.condition = None if condition_dim is None else nn.Linear(condition_dim, latent_dim)
        self.previous, self.previous_norm = mlp(latent_dim, 4), nn.LayerNorm(latent_dim, eps=EPS)
        nn.init.zeros_(self.previous_norm.weight)  # at the start, no self-conditioning
        self.head = nn.Linear(self.fit.body.dim, channels * patch**2)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        previous_latents: Tensor | None = None,
    ) -> DenoiserOutput:
        """`timestep` one number or (batch,); condition tokens (batch, k, condition_dim), their mask (batch, k) bool.

        Raises ValueError for condition tokens a model without `condition_dim` cannot take.
        """
        if encoder_hidden_states is not None and self.condition is None:
            raise ValueError("encoder_hidden_states must be None: the model was made without condition_dim")
        x, mask = group_image(sample, self.patch, self.tile)
        tokens, z = self.fit.initial(x)
        if previous_latents is not None:
            z = z + self.previous_norm(self.previous(previous_latents))
        context = self._time(timestep, sample)
        context_mask = None
        if encoder_hidden_states is not None and self.condition is not None:
            context = torch.cat([context, self.condition(encoder_hidden_states)], 1)
            if encoder_attention_mask is not None:
                context_mask = F.pad(encoder_attention_mask.bool(), (1, 0), value=True)
        tokens, z = self.fit.body(tokens, z, mask, context, context_mask)
        height, width = sample.shape[2:]
        return DenoiserOutput(ungroup_image(self.head(tokens), height, width, self.patch, self.tile), z)

    def _time(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        t = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(len(sample))
        half = self.fit.body.latent_dim // 2
        angle = t[:, None] * 10000.0 ** (-torch.arange(half, device=t.device) / half)
        out: Tensor = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(sample.dtype))
        return out[:, None]


# ------------------------------------------------------------------------------------------------------------------- decoder


@dataclass
class DecoderOutput:
    """Logits (batch, tokens, vocabulary), and the mean loss (nats) where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


class FITDecoder(nn.Module):
    """FIT as a language model: groups of `group_size` tokens, at most `groups` of them; options as `FIT` takes them.

    Training computes all groups in parallel. Generation costs a token its local layers over the group so far and reads of m latents;
    the latents are computed once a group. Raises ValueError beyond groups * group_size tokens.
    """

    def __init__(
        self,
        layers: str = "(2)2(2)",
        *,
        vocab_size: int,
        groups: int,
        group_size: int,
        latents: int = 4,
        dim: int = 256,
        latent_dim: int = 256,
        heads: int = 4,
        latent_heads: int = 4,
        **options: Any,
    ):
        super().__init__()
        if min(vocab_size, groups, group_size, latents) < 1:
            raise ValueError(
                "vocab_size, groups, group_size and latents must be at least 1, "
                f"got {vocab_size}, {groups}, {group_size} and {latents}"
            )
        self.groups, self.group_size, self.latents = groups, group_size, latents
        self.embed, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(group_size, dim))
        self.table = nn.Parameter(0.02 * torch.randn(groups * latents, latent_dim))
        options = {**options, "causal": "decoder"}
        self.body = Interleaved(
            layers, dim=dim, latent_dim=latent_dim, heads=heads, latent_heads=latent_heads, **options
        )

    def _check(self, tokens: int) -> None:
        if tokens > self.groups * self.group_size:
            raise ValueError(f"tokens must be at most {self.groups * self.group_size}, got {tokens}")

    def _rows(self, first: int, groups: int) -> Tensor:
        rows = self.table[first * self.latents : (first + groups) * self.latents]
        return rows.unflatten(0, (-1, self.latents))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """`input_ids` (batch, tokens); logits at a token depend on it and those before it.

        Rows that end early may be padded on the right with anything. `labels` as `input_ids`, -100 where nothing is asked.
        """
        length = input_ids.shape[1]
        self._check(length)
        x, _ = group_sequence(self.embed(input_ids), self.group_size)
        z = self._rows(0, x.shape[1]).expand(len(x), -1, -1, -1)
        logits = self.head(ungroup_sequence(self.body(x + self.positions, z)[0], length))
        if labels is None:
            return DecoderOutput(logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return DecoderOutput(logits, loss)

    def init_state(self, batch: int) -> State:
        """Before the first token. Keys and values of the current group by local layer, of all latents by global layer; by stage the
        current group's tokens that the latents will read, and the latents that the current group reads."""
        state = {"seen": torch.zeros(batch, dtype=torch.int64, device=self.table.device)}

        def empty(*shape: int) -> Tensor:
            return self.table.new_zeros(batch, *shape)

        for i, stage in enumerate(self.body.stages):
            for kind, layers in (("local", stage.local_layers), ("global", stage.global_layers)):
                for j, block in enumerate(layers):  # type: ignore[arg-type]
                    heads, inner = block.attention.heads, block.attention.q_proj.out_features
                    for part in "kv":
                        state[f"{kind}.{i}.{j}.{part}"] = empty(heads, 0, inner // heads)
            if stage.global_layers:
                state[f"tokens.{i}"] = empty(0, self.body.dim)
                state[f"latents.{i}"] = empty(self.latents, self.body.latent_dim)
        return state

    def advance(self, input_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens (batch, tokens) behind `state`: their logits, and the state after them. `state` itself stays as it is."""
        seen = int(state["seen"][0])
        self._check(seen + input_ids.shape[1])
        state, logits = dict(state), []
        for part in input_ids.tensor_split(
            list(range(self.group_size - seen % self.group_size, input_ids.shape[1], self.group_size)), 1
        ):
            logits.append(self._in_group(part, seen % self.group_size, state))
            seen += part.shape[1]
            if seen % self.group_size == 0 and part.shape[1]:
                self._end_group(seen // self.group_size - 1, state)
        state["seen"] = state["seen"] + input_ids.shape[1]
        return torch.cat(logits, 1), state

    def _in_group(self, ids: Tensor, before: int, state: State) -> Tensor:
        """Tokens of one group, of which `before` have been; changes the dictionary `state`."""
        x = self.embed(ids) + self.positions[before : before + ids.shape[1]]
        for i, stage in enumerate(self.body.stages):
            for j, block in enumerate(stage.local_layers):  # type: ignore[arg-type]
                name = f"local.{i}.{j}"
                x, state[f"{name}.k"], state[f"{name}.v"] = block.behind(
                    x, state[f"{name}.k"], state[f"{name}.v"], True
                )
            if stage.global_layers:
                state[f"tokens.{i}"] = torch.cat([state[f"tokens.{i}"], x], 1)
                if hasattr(stage, "write"):
                    x = stage.write(x, state[f"latents.{i}"])  # type: ignore[operator]
        out: Tensor = self.head(self.body.norm(x))
        return out

    def _end_group(self, group: int, state: State) -> None:
        """The latents of a group that is complete, and an empty next group."""
        z = self._rows(group, 1).expand(len(state["seen"]), -1, -1, -1)[:, 0]
        for i, stage in enumerate(self.body.stages):
            for j in range(len(stage.local_layers)):  # type: ignore[arg-type]
                for part in "kv":
                    state[f"local.{i}.{j}.{part}"] = state[f"local.{i}.{j}.{part}"][:, :, :0]
            if not stage.global_layers:
                continue
            z = stage.read(z, state[f"tokens.{i}"])  # type: ignore[operator]
            for j, block in enumerate(stage.global_layers):  # type: ignore[arg-type]
                name = f"global.{i}.{j}"
                z, state[f"{name}.k"], state[f"{name}.v"] = block.behind(
                    z, state[f"{name}.k"], state[f"{name}.v"], False
                )
            state[f"tokens.{i}"], state[f"latents.{i}"] = state[f"tokens.{i}"][:, :0], z

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """`input_ids` (batch, tokens) and what follows: the likeliest tokens, or samples at a `temperature` above 0.

        All prompts have the same length. A row that met `eos_token_id` repeats it; generation stops when all have.
        """
        if max_new_tokens < 0 or temperature < 0 or input_ids.shape[1] < 1:
            raise ValueError(
                "max_new_tokens and temperature must not be negative and input_ids not empty, "
                f"got {max_new_tokens}, {temperature} and {tuple(input_ids.shape)}"
            )
        self._check(input_ids.shape[1] + max_new_tokens)
        state, ids, new = self.init_state(len(input_ids)), input_ids, input_ids
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits, state = self.advance(new, state)
            if temperature:
                chances = torch.softmax(logits[:, -1].float() / temperature, -1)
                new = torch.multinomial(chances, 1, generator=generator)
            else:
                new = logits[:, -1:].argmax(-1)
            if eos_token_id is not None:
                new = new.masked_fill(ended, eos_token_id)
                ended = ended | (new == eos_token_id)
            ids = torch.cat([ids, new], 1)
            if ended.all():
                break
        return ids


# -------------------------------------------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class FITSize:
    """The sizes of a `FIT` without context and cross MLPs, and what follows from them. All counts are of one sequence."""

    layers: str
    inputs: int
    groups: int
    group_size: int
    latents: int
    dim: int
    latent_dim: int
    ratio: int = 4

    def _counts(self) -> tuple[int, int, int, int]:
        """How many local layers, reads, global layers and writes there are."""
        stages = parse_layers(self.layers)
        return sum(a for a, _ in stages), sum(b > 0 for _, b in stages), sum(b for _, b in stages), len(stages) - 1

    def pairs(self) -> dict[str, int]:
        """Query-key pairs of all layers: local L n each, read and write L m, global (t m)^2."""
        local, reads, glob, writes = self._counts()
        t, n, m = self.groups, self.group_size, self.latents
        return {"local": local * t * n * n, "read": reads * t * m * n, "global": glob * (t * m) ** 2,
                "write": writes * t * n * m}  # fmt: skip

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates (1 MAC = 2 FLOPs) of linear layers and of attention, by part."""
        local, reads, glob, writes = self._counts()
        tokens, slots, inner = self.groups * self.group_size, self.groups * self.latents, min(self.dim, self.latent_dim)
        layer, pairs = 4 + 2 * self.ratio, self.pairs()
        crossing = (
            2 * inner * (tokens * self.dim + slots * self.latent_dim)
        )  # q and o on one side, k and v on the other
        return {
            "stem": tokens * self.inputs * self.dim,
            "local": local * tokens * layer * self.dim**2 + 2 * pairs["local"] * self.dim,
            "read": reads * crossing + 2 * pairs["read"] * inner,
            "global": glob * slots * layer * self.latent_dim**2 + 2 * pairs["global"] * self.latent_dim,
            "write": writes * crossing + 2 * pairs["write"] * inner,
        }

    def parameters(self, positions: Positions = "learned") -> int:
        """Follows from the widths but for the tables of positions (n rows) and latents (t m rows)."""
        local, reads, glob, writes = self._counts()
        x, z, r = self.dim, self.latent_dim, self.ratio
        inner = min(x, z)

        def layer(d: int) -> int:
            return 4 * d * (d + 1) + 2 * r * d * d + (r + 1) * d + 4 * d

        def cross(d: int, e: int) -> int:
            return (d + 1) * inner + 2 * (e + 1) * inner + (inner + 1) * d + 2 * d + 2 * e

        tables = self.groups * self.latents * z + (self.group_size * x if positions == "learned" else 0)
        body = local * layer(x) + glob * layer(z) + reads * cross(z, x) + writes * cross(x, z) + 2 * x + 2 * z
        return tables + body + (self.inputs + 1) * x + 2 * x
