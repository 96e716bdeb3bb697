"""Tiny models and what goes with them: a random Llama, token ids, a folder with a working tokenizer, a GGUF file, a calibration."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # logits far enough apart that rounding does not change which is largest
    "tie_word_embeddings": False,
}


def tiny_model(kind: str = "Llama", *, seed: int = 0, **changes: Any):
    """A random decoder of transformers ("Llama", "Mistral", "Qwen2", ...) of `LLAMA`'s shape, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**LLAMA, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def token_ids(batch: int = 1, length: int = 100, *, seed: int = 0, vocab: int = LLAMA["vocab_size"]):
    """Random token ids (batch, length), none of them padding or the first token."""
    import torch

    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibration(**changes: Any):
    """What a processor is said to do in a second, in round numbers, instead of measuring this one."""
    from assay.measure.machine import Calibration

    known: dict[str, Any] = {
        "peak_flops": {"float32": 1e11, "bfloat16": 4e11},
        "read_bandwidth": 4e10,
        "copy_bandwidth": 3e10,
        "cache_bandwidth": {1 << 20: 2e11, 1 << 28: 4e10},
        "device": "cpu",
        "threads": 2,
        "fingerprint": "f",
        "torch": "2",
        "noisy": False,
    }
    return Calibration(**{**known, **changes})


def write_tiny_llama(
    folder: Path | str,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    context: int = 2048,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Write config, random float32 weights and a byte-level BPE tokenizer of `vocab` tokens; return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer(vocab, context)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(vocab: int = 512, context: int = 2048):
    """A byte-level BPE tokenizer trained on the Python documentation, with SmolLM2's special tokens (257 + at least 2)."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab)),
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
    )


@functools.cache
def _trained(vocab: int) -> str:
    """The tokenizer as text: many tests want one, and training takes longer than reading."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([topics["compound"], topics["debugger"]], trainer)
    return backend.to_str()


def write_gguf(loaded, path: Path, *, architecture: str = "llama") -> Path:
    """Write a loaded tiny Llama as a GGUF file of float32 tensors, as llama.cpp's converter would."""
    import json

    import gguf
    import numpy as np

    config, tokenizer = loaded.model.config, loaded.tokenizer
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in loaded.model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        array = tensor.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers rotates halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
