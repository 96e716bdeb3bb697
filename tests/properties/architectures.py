"""Small random models of unrelated architectures: what a transform may meet beside the three it was written with.

`build(name)` gives a model in eval mode (float32, the same weights each time), `inputs(name, batch)` the keyword arguments of its
forward pass, `output(model, name, batch)` what comes out. Every width is a multiple of 32, heads are 32 wide, windows are shorter
than the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS, VOCABULARY, WINDOW = 48, 160, 16
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
DECODER = {
    **WIDE,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "head_dim": 32}

# name: (configuration class, model class, settings)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),  # untied decoder
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),  # biases in q, k, v
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER),  # fused qkv and gate_up
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2},
    ),  # Conv1D, tied, learned positions
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GROUPED, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    ),  # soft caps: no SDPA
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),  # sinks, experts with biases
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 128, "ffn_dim": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
            "max_position_embeddings": 128, "word_embed_proj_dim": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),  # fmt: skip
    "biogpt": (
        "BioGptConfig",
        "BioGptForCausalLM",
        {**WIDE, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),  # output layer of another name
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8, "pad_token_id": 0},
    ),  # no attention
    "bert": ("BertConfig", "BertModel", {**WIDE, "max_position_embeddings": 128}),  # encoder
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
        },
    ),  # fmt: skip  # encoder-decoder
    "m2m100": (
        "M2M100Config",
        "M2M100ForConditionalGeneration",
        {
            "d_model": 128, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
            "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),  # fmt: skip  # buffers that are not stored
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "vocab_size": VOCABULARY, "num_mel_bins": 16, "max_source_positions": TOKENS,
            "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    ),  # fmt: skip
    "vit": (
        "ViTConfig",
        "ViTModel",
        {k: v for k, v in WIDE.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8},
    ),
    "clip-vision": (
        "CLIPVisionConfig",
        "CLIPVisionModel",
        {k: v for k, v in WIDE.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8},
    ),
}  # fmt: skip

CAUSAL = tuple(name for name, (_, kind, _) in ARCHITECTURES.items() if kind.endswith(("CausalLM", "LMHeadModel")))


def build(name: str, **changes: Any) -> nn.Module:
    """The model of that name, always with the same weights; `changes` go into its configuration."""
    import transformers

    configuration, kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, configuration)(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, kind)(config)
    return model.eval()


def inputs(name: str, batch: int = 2, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass of `batch` different sequences (or pictures, or sounds)."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=random)
    if name in ("vit", "clip-vision"):
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=random)}
    if name == "whisper":
        return {
            "input_features": torch.randn(batch, 16, 2 * TOKENS, generator=random),
            "decoder_input_ids": ids[:, : tokens // 2],
        }
    if name in ("t5", "m2m100"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, : tokens // 2]}
    return {"input_ids": ids}


@torch.no_grad()
def output(
    model: nn.Module, name: str, batch: int = 2, tokens: int = TOKENS, seed: int = 0, rows: slice = slice(None)
) -> Tensor:
    """What the model answers `inputs` (those `rows` of it alone), in float32: logits, or the last hidden state where it has none."""
    given = {key: value[rows] for key, value in inputs(name, batch, tokens, seed).items()}
    dtype = next(model.parameters()).dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    out = model(**given)
    return (out.logits if "logits" in out else out.last_hidden_state).float()
