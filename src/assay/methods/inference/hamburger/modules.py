"""The two buns: what merges a group of token embeddings into one, and the small decoder that emits the tokens of a group."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class CompositionalEmbedder(nn.Module):
    """One embedding of a group of up to `max_steps` token embeddings of width `width`.

    A group of one is its embedding, unchanged. Else mean(e) + W_o attention(q = W_q mean(e), k = W_k [e_i ; p_i], v = W_v [e_i ; p_i])
    with learned places p_i of half the width, biases throughout, and scores over the square root of the head size.
    """

    def __init__(self, width: int, heads: int, max_steps: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width + width // 2, width)
        self.v_proj = nn.Linear(width + width // 2, width)
        self.out_proj = nn.Linear(width, width)
        self.places = nn.Parameter(torch.empty(max_steps, width // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The places; the linear layers have their own."""
        nn.init.xavier_normal_(self.places)

    def forward(self, embeds: Tensor, sizes: Tensor) -> Tensor:
        """(groups, most, width) embeddings, of which the first `sizes` (groups,) of each row count: (groups, width)."""
        if embeds.shape[1] == 1:
            return embeds[:, 0]
        alone = sizes == 1
        if not bool(alone.any()):
            return self.merge(embeds, sizes)
        merged = embeds[:, 0].clone()
        several = ~alone
        if bool(several.any()):
            merged[several] = self.merge(embeds[several], sizes[several])
        return merged

    def merge(self, embeds: Tensor, sizes: Tensor) -> Tensor:
        """The same of groups that all have several members."""
        groups, most, width = embeds.shape
        there = torch.arange(most, device=embeds.device) < sizes[:, None]
        mean = (embeds * there[..., None]).sum(1) / sizes[:, None].to(embeds.dtype)
        placed = torch.cat([embeds, self.places[:most].expand(groups, -1, -1)], -1)
        q, k, v = (
            x.view(groups, -1, self.heads, width // self.heads).transpose(1, 2)
            for x in (self.q_proj(mean), self.k_proj(placed), self.v_proj(placed))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        added: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(groups, width))
        return mean + added


# fields that say what a Llama's layer computes
LLAMAS = ("attention_bias", "attention_dropout", "mlp_bias", "hidden_act")


def micro_config(base: Any, layers: int) -> LlamaConfig:
    """Llama layers of the base's sizes; for a Llama, of its own configuration but for its rotary scaling, which means nothing at 0 to 7."""
    heads = base.num_attention_heads
    rope = getattr(base, "rope_parameters", None) or {}
    own = {name: getattr(base, name) for name in LLAMAS} if base.model_type == LlamaConfig.model_type else {}
    make: Any = LlamaConfig  # whose signature does not name all that it takes
    found: LlamaConfig = make(
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(base, "num_key_value_heads", None) or heads,
        head_dim=getattr(base, "head_dim", None) or base.hidden_size // heads,
        rms_norm_eps=getattr(base, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)},
        attn_implementation="sdpa",
        **own,
    )
    return found


class MicroStepDecoder(nn.Module):
    """Llama decoder layers over [features of the last macro step ; embeddings of the group's tokens so far], at positions from 0 on.

    What comes out behind a token's embedding goes through the language model's head as it is, without a norm, and gives the next
    token. `stop_head`, a perceptron D -> D -> D -> 1 with SiLU, reads the vector that the head reads: the logit that the token it gives
    is the last of its group.
    """

    def __init__(self, base: Any, layers: int) -> None:
        super().__init__()
        config: Any = micro_config(base, layers)
        self.theta, self.head_dim = float(config.rope_parameters["rope_theta"]), int(config.head_dim)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
        width = config.hidden_size
        self.stop_head = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, places: Tensor | None = None, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        """(groups, tokens, width) at `places` (groups, tokens), by default from 0 on: the same shape.

        Causal by itself without a `mask` (groups, 1, tokens, keys), True where attention may look. Keys and values go through `cache`.
        """
        cos, sin = rotary_table(self.theta, self.head_dim, x.device, x.dtype)
        if places is None:
            angles = cos[None, : x.shape[1]], sin[None, : x.shape[1]]
        else:
            angles = cos[places], sin[places]
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_embeddings=angles, cache=cache)
        return x

    def sequence(self, features: Tensor, embeds: Tensor) -> Tensor:
        """All tokens of a group at once: features (groups, F, width), embeddings (groups, n, width) of its first n tokens; what comes
        out behind each of them, (groups, n, width)."""
        return self(torch.cat([features, embeds], 1))[:, features.shape[1] :]


MOST_PLACES = 512


@functools.lru_cache(maxsize=64)
def rotary_table(theta: float, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to 511: (512, head dim) each."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(MOST_PLACES, dtype=torch.float32)[:, None] * frequencies
        both = torch.cat([angles, angles], -1)
        return both.cos().to(device, dtype), both.sin().to(device, dtype)
