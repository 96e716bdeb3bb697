"""FIT as an image denoiser: a diffusers model that diffusers' pipelines call, save and load."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn

from assay import checks
from assay.methods.attention.fit.grouping import group_image, ungroup_image
from assay.methods.attention.fit.layers import EPS, mlp
from assay.methods.attention.fit.model import FIT, Positions


@dataclass
class DenoiserOutput(BaseOutput):
    """`sample`: what was predicted, shaped as the input. `latents` (batch, t, m, latent_dim): for self-conditioning."""

    sample: Tensor
    latents: Tensor


class FITDenoiser(ModelMixin, ConfigMixin):
    """FIT for diffusion, in place of a `UNet2DModel`: `DDPMPipeline(unet=FITDenoiser(...), scheduler=...)`.

    Images (batch, in_channels, up to height, up to width) in patches and tiles (`group_image`); `sample_size` is (height, width), or
    one number for both. The latents read the time and, with `condition_dim`, condition tokens before every global stage, and may
    start from those of the step before. Other options as `FIT`. Needs diffusers. Raises TypeError and ValueError for sizes that
    are none.
    """

    @register_to_config
    def __init__(
        self,
        layers: str = "(2)4(2)",
        *,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 64,
        patch: int = 8,
        tile: int = 4,
        latents: int = 4,
        dim: int = 256,
        latent_dim: int = 256,
        heads: int = 4,
        latent_heads: int = 4,
        ratio: int = 4,
        cross_ratio: int = 4,
        positions: Positions = "learned",
        condition_dim: int | None = None,
    ):
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        for name, size in (("in_channels", in_channels), ("sample_size", height), ("sample_size", width)):
            checks.whole(name, size, low=1)
        checks.whole("patch", patch, low=1)
        checks.whole("tile", tile, low=1)
        if checks.whole("latent_dim", latent_dim, low=2) % 2:
            raise ValueError(f"latent_dim must be even, got {latent_dim}")
        self.patch, self.tile = patch, tile
        groups = math.ceil(height / (patch * tile)) * math.ceil(width / (patch * tile))
        self.fit = FIT(
            layers,
            inputs=in_channels * patch**2,
            groups=groups,
            group_size=tile**2,
            latents=latents,
            dim=dim,
            latent_dim=latent_dim,
            heads=heads,
            latent_heads=latent_heads,
            positions=positions,
            ratio=ratio,
            cross_ratio=cross_ratio,
            context=True,
        )
        self.time = nn.Sequential(
            nn.Linear(latent_dim, 4 * latent_dim), nn.SiLU(), nn.Linear(4 * latent_dim, latent_dim)
        )
        self.condition = None if condition_dim is None else nn.Linear(condition_dim, latent_dim)
        self.previous, self.previous_norm = mlp(latent_dim, 4), nn.LayerNorm(latent_dim, eps=EPS)
        nn.init.zeros_(self.previous_norm.weight)  # at the start, no self-conditioning
        self.head = nn.Linear(self.fit.body.dim, in_channels * patch**2)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        previous_latents: Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[Tensor, ...]:
        """`sample` (batch, in_channels, height, width), `timestep` one number or (batch,); condition tokens
        (batch, k, condition_dim), their mask (batch, k) bool.

        Raises ValueError for condition tokens a model without `condition_dim` cannot take, a mask of none, and for latents of another
        shape.
        """
        checks.tensor("sample", sample, ndim=4)
        if encoder_attention_mask is not None and encoder_hidden_states is None:
            raise ValueError(
                "encoder_attention_mask must be None where there are no encoder_hidden_states to leave out"
            )
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
        out = ungroup_image(self.head(tokens), height, width, self.patch, self.tile)
        return DenoiserOutput(sample=out, latents=z) if return_dict else (out, z)

    def _time(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        t = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(len(sample))
        half = self.fit.body.latent_dim // 2
        angle = t[:, None] * 10000.0 ** (-torch.arange(half, device=t.device) / half)
        out: Tensor = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(sample.dtype))
        return out[:, None]
