"""FIT as a denoiser of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.attention.fit.grouping import group_image, ungroup_image
from assay.methods.attention.fit.layers import EPS, mlp
from assay.methods.attention.fit.model import FIT


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
        if min(channels, height, width, patch, tile) < 1 or latent_dim % 2:
            raise ValueError(
                "channels, height, width, patch and tile must be at least 1 and latent_dim even, "
                f"got {channels}, {height}, {width}, {patch}, {tile} and {latent_dim}"
            )
        self.patch, self.tile = patch, tile
        groups = math.ceil(height / (patch * tile)) * math.ceil(width / (patch * tile))
        self.fit = FIT(
            layers,
            inputs=channels * patch**2,
            groups=groups,
            group_size=tile**2,
            latent_dim=latent_dim,
            context=True,
            **{"cross_ratio": 4, **options},
        )
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

        Raises ValueError for condition tokens a model without `condition_dim` cannot take, and for latents of another shape.
        """
        if encoder_hidden_states is not None and self.condition is None:
            raise ValueError("encoder_hidden_states must be None: the model was made without condition_dim")
        x, mask = group_image(sample, self.patch, self.tile)
        tokens, z = self.fit.initial(x)
        if previous_latents is not None:
            if previous_latents.shape != z.shape:
                raise ValueError(f"previous_latents must be {tuple(z.shape)}, got {tuple(previous_latents.shape)}")
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
