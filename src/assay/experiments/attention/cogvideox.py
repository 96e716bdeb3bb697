"""A small CogVideoX in the form of version 1.5, built from diffusers' classes, trained here and sampled with diffusers' scheduler.

As in the original, prompt and video attend to each other in one sequence, the prompt first and its padding not masked; patches
span two frames; embeddings are rotary; heads have 64 channels; velocities are predicted, on a schedule that ends without any
signal. Unlike the original, it uses pixels instead of a VAE's latents, learned words instead of T5's, DDIM instead of the DPM
solver (so that equal noise gives equal samples), sharpened attention (`video.SHARPNESS`), and no classifier-free guidance, which would
double the batch of every arm.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay.errors import MissingError
from assay.experiments.attention.video import PATCH, Fit, Noised, kept, sharpen, train_on_clips
from assay.workloads.images import PHOTOGRAPHS

LAYERS, HEAD_DIM = 4, 64
FRAMES = 2  # of a patch
WORDS = 16  # tokens of a prompt, with padding


class CogVideoX(nn.Module):
    """Predicts the velocity of noised clips (batch, 3, frames, height, width) at times int64 (batch,), 0 to 999, and labels (batch,).

    `width` channels in heads of 64. A label is a prompt of 5 to 8 learned words. Raises ValueError for a width that is not a
    multiple of 64, MissingError without diffusers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < HEAD_DIM or width % HEAD_DIM:
            raise ValueError(f"width must be a positive multiple of {HEAD_DIM}, got {width}")
        try:
            from diffusers import CogVideoXTransformer3DModel
        except ImportError:
            raise MissingError("this model comes with diffusers: pip install 'assay[diffusion]'") from None
        self.model: Any = CogVideoXTransformer3DModel(
            num_attention_heads=width // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            in_channels=3,
            out_channels=3,
            time_embed_dim=width,
            text_embed_dim=width,
            num_layers=LAYERS,
            patch_size=PATCH,
            patch_size_t=FRAMES,
            max_text_seq_length=WORDS,
            use_rotary_positional_embeddings=True,
        )
        self.words = nn.Embedding(len(PHOTOGRAPHS), WORDS * width)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        words = self.words(labels).unflatten(1, (WORDS, -1))
        real = torch.arange(WORDS) < 5 + labels[:, None] % 4
        grid = (x.shape[3] // PATCH, x.shape[4] // PATCH)
        rotary = get_3d_rotary_pos_embed(
            HEAD_DIM, None, grid, x.shape[2] // FRAMES, grid_type="slice", max_size=grid, device=x.device
        )
        given = {"encoder_hidden_states": words * real[..., None], "timestep": times, "image_rotary_emb": rotary}
        out = self.model(x.transpose(1, 2).to(words.dtype), **given, return_dict=False)[0]
        return cast(Tensor, out.transpose(1, 2))


def make_scheduler() -> Any:
    """diffusers' own for CogVideoX, with the settings of version 1.5: steps from pure noise, velocities."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0
    )


def train(width: int, updates: int, *, batch: int = 2, seed: int = 0) -> tuple[CogVideoX, Fit]:
    """A model trained on `updates` batches of clips, noised as its scheduler does, and its loss; kept in assay's cache."""
    torch.manual_seed(seed)
    model, scheduler = CogVideoX(width), make_scheduler()
    sharpen(model)

    def noised(clips: Tensor) -> Noised:
        times = torch.randint(scheduler.config.num_train_timesteps, (len(clips),))
        noise = torch.randn_like(clips)
        return scheduler.add_noise(clips, noise, times), times, scheduler.get_velocity(clips, noise, times)

    def fit(fresh: nn.Module) -> Fit:
        return train_on_clips(fresh, noised, updates, batch=batch)

    return model, kept(model, fit, f"cogvideox-{width}-{updates}-{batch}-{seed}", sys.modules[__name__])


def sample(model: CogVideoX, noise: Tensor, steps: int, *, label: int = 0) -> Tensor:
    """Clips from noise (batch, 3, frames, height, width), float32, in `steps` steps of the scheduler: pixels in [-1, 1]."""
    labels, x, scheduler = torch.full((len(noise),), label), noise, make_scheduler()
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for time in scheduler.timesteps:
            velocity = model(x, time.expand(len(x)), labels).float()
            x = scheduler.step(velocity, int(time), x, return_dict=False)[0]
    return x.clamp(-1, 1)
