"""Tiny diffusers video transformers with random weights, and inputs for two videos of 3 frames of 4 x 4 patches (48 tokens)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

WORDS = 7
SIZES: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}


def real_words() -> Tensor:
    """int64 (2, WORDS): prompts of other lengths, 0 where they are padding."""
    return torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([300, 700]),
        "encoder_hidden_states": torch.randn(2, WORDS, 8, generator=generator),
    }


def wan(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """Self-attention of the video alone; text by cross-attention."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        **SIZES, patch_size=(1, 2, 2), text_dim=8, freq_dim=16, ffn_dim=32, num_layers=layers, rope_max_seq_len=32
    )
    return _ready(model), inputs()


def hunyuan() -> tuple[nn.Module, dict[str, Any]]:
    """Joint attention with text after the video, in one double block and two single ones, and a mask for padding."""
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        **SIZES,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    more = {
        "encoder_attention_mask": real_words(),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([1.0, 1.0]),
    }
    return _ready(model), inputs() | more


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    """Joint attention with text before the video; its processors call torch's attention themselves."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        **SIZES,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=WORDS,
        use_rotary_positional_embeddings=True,
    )
    given: dict[str, Any] = inputs()
    given["hidden_states"] = given["hidden_states"].transpose(1, 2)  # frames before channels
    given["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
    return _ready(model), given


def _ready(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".attn" in name and parameter.ndim == 2:
            parameter.data *= 4  # sharper attention: random weights would spread it over all tokens
    return model.eval().requires_grad_(False)


MODELS = {"wan": wan, "hunyuan": hunyuan, "cogvideox": cogvideox}
