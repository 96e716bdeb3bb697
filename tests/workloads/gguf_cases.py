"""Tiny GGUF files of every architecture assay converts, and llama.cpp's logits on them.

Each file is made from a random transformers model (weights from a seed) as llama.cpp's own converter would make it, written here
independently of the reading code. `python tests/workloads/gguf_cases.py` asks llama.cpp (`pip install llama-cpp-python`) for the
logits and writes `llama_cpp_logits.npz` beside this file.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

STORED = Path(__file__).with_name("llama_cpp_logits.npz")
TOKENS, KEPT = 40, (4, 21, 39)  # tokens a prompt, positions whose logits are stored
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
# Pairs that show where text is cut before it is tokenised: across each of them a rule may cut or not.
TELLING = [
    *(a + " " + b for a in "aA1!'ĠĊé" for b in "aA1!'ĠĊ"),
    "11 1", "ĠĠ Ġ", "ĊĊ Ċ", "' s", "' S", "a s",
]  # fmt: skip
TEXTS = (
    "aa11 1a!a 'a's A's'S AaaA aAA1 1111111 111!!", "a\n\na\n  a   1\n\n\n   ", "\n a  !\n\n!!\n1", "   a", "a ", "1 1a1!", "",
    "AabbA AabbA",
    "<|im_start|>a\n<|im_end|> a", "aa</s>a<s> a é",
)  # fmt: skip
PRE = (
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "smollm", "starcoder", "refact", "command-r", "codeshell",
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "dbrx", "smaug-bpe",
    "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "qwen35", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2",
)  # fmt: skip
# Pieces of a SentencePiece vocabulary, the likeliest first.
PIECES = ("▁a", "aa", "▁1", "▁▁", "▁", "a", "A", "1", "!", "'", "s", "b", "▁aa", "11", "Aa", "!!", "\n")
TOKENIZERS: dict[str, tuple[str | None, bool | None]] = {
    **{pre: (pre, None) for pre in PRE},
    "spm": ("spm", None),
    "spm-prefix": ("spm", True),
    "spm-no-prefix": ("spm", False),
}
Kind = gguf.GGMLQuantizationType


def vocabulary() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), *("".join(merge) for merge in MERGES), "<unused0>", "<unused1>"]


VOCAB = 264


@dataclass(frozen=True)
class Case:
    """One file: GGUF architecture, transformers class, its settings, the metadata beside the usual, the tensors' type."""

    architecture: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] = ()  # rope_freqs.weight
    kind: Kind = Kind.F32


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # rows of whole K-quant blocks
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OWN = tuple(1.0 + 0.5 * i for i in range(8))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **values}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "long_factor": list(OWN), "short_factor": [1.0 + 0.1 * i for i in range(8)], "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
}  # fmt: skip
LONG_METADATA = {"rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 16}

CASES: dict[str, Case] = {
    "llama": Case("llama", "Llama", SMALL),
    "llama-tied": Case("llama", "Llama", {**SMALL, "tie_word_embeddings": True}),
    "llama-linear": Case(
        "llama", "Llama", {**SMALL, **rope("linear", factor=4.0)},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama-linear-old-name": Case("llama", "Llama", {**SMALL, **rope("linear", factor=2.0)}, {"rope.scale_linear": 2.0}),
    "llama-yarn": Case(
        "llama", "Llama", {**SMALL, **rope("yarn", **YARN)},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
    ),
    "llama-llama3": Case("llama", "Llama", {**SMALL, "rope_parameters": LLAMA3}, factors=(0.0,)),
    "llama-own-frequencies": Case("llama", "Llama", SMALL, factors=OWN),
    "llama-longrope": Case(
        "llama", "Llama", {**SMALL, **rope("longrope", **LONG)}, {"rope.scaling.type": "longrope", **LONG_METADATA}
    ),
    "llama-theta-eps": Case("llama", "Llama", {**SMALL, "rms_norm_eps": 0.03, **rope("default", rope_theta=500.0)}),
    "llama-wide-heads": Case("llama", "Llama", {**SMALL, "head_dim": 32}),
    "llama-biases": Case("llama", "Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "mixtral": Case("llama", "Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": Case(
        "granite", "Granite",
        {**SMALL, "logits_scaling": 3.0, "residual_multiplier": 0.4, "embedding_multiplier": 5.0, "attention_multiplier": 0.1},
    ),
    "qwen2": Case("qwen2", "Qwen2", SMALL),
    "qwen2-yarn": Case(
        "qwen2", "Qwen2", {**SMALL, **rope("yarn", **YARN)},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
    ),
    "qwen2moe": Case("qwen2moe", "Qwen2Moe", {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3": Case("qwen3", "Qwen3", {**SMALL, "head_dim": 32}),
    "qwen3moe": Case("qwen3moe", "Qwen3Moe", {**SMALL, **EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "phi3": Case("phi3", "Phi3", SMALL),
    "phi3-longrope": Case("phi3", "Phi3", {**SMALL, "original_max_position_embeddings": 16, **rope("longrope", **LONG)}, LONG_METADATA),
    "phi3-longrope-short": Case(
        "phi3", "Phi3",
        {
            **SMALL, "max_position_embeddings": 1024, "original_max_position_embeddings": 512,
            **rope("longrope", **{**LONG, "original_max_position_embeddings": 512}),
        },
        {**LONG_METADATA, "rope.scaling.original_context_length": 512},
    ),
    "phi3-partial": Case("phi3", "Phi3", {**SMALL, **rope("default", partial_rotary_factor=0.5)}),
    "gemma": Case("gemma", "Gemma", {**SMALL, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Case(
        "gemma2", "Gemma2",
        {
            **SMALL, "head_dim": 32, "tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "gemma3", "Gemma3",
        {
            **SMALL, "num_hidden_layers": 3, "head_dim": 32, "tie_word_embeddings": True, "sliding_window": 8,
            "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"attention.sliding_window_pattern": 2, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gpt2": Case(
        "gpt2", "GPT2",
        {
            "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "gpt-oss": Case(
        "gpt-oss", "GptOss",
        {
            **SMALL, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {"expert_feed_forward_length": 96},
    ),
    "olmo2": Case("olmo2", "Olmo2", SMALL),
    "stablelm": Case(
        "stablelm", "StableLm", {**SMALL, "use_qkv_bias": True, **rope("default", partial_rotary_factor=0.5)},
        {"use_parallel_residual": False},
    ),
    "stablelm-parallel": Case(
        "stablelm", "StableLm", {**SMALL, "use_parallel_residual": True, **rope("default", partial_rotary_factor=0.25)},
        {"use_parallel_residual": True},
    ),
    "nemotron": Case(
        "nemotron", "Nemotron", {**SMALL, **rope("default", partial_rotary_factor=0.5)}, {"rope.scaling.type": "none"}
    ),
    "mamba": Case(
        "mamba", "Mamba",
        {
            "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    ),
    "starcoder2": Case("starcoder2", "Starcoder2", {**SMALL, "use_bias": True}),
    **{f"llama-{kind.name}": Case("llama", "Llama", WIDE, kind=kind) for kind in Kind if kind.name in (
        "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
        "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "TQ1_0", "TQ2_0", "MXFP4",
    )},
}  # fmt: skip


PLUS_ONE = ("Gemma", "Gemma2", "Gemma3", "Nemotron")  # norms scale by 1 + weight


def prompt() -> list[int]:
    return np.random.RandomState(7).randint(3, VOCAB, TOKENS).tolist()


def model(case: Case) -> torch.nn.Module:
    """The transformers model of a case, its weights drawn name by name, float32."""
    import transformers

    kind = {"GPT2": "GPT2LMHeadModel"}.get(case.model, f"{case.model}ForCausalLM")
    config = {"Gemma3": "Gemma3TextConfig"}.get(case.model, f"{case.model}Config")
    built = getattr(transformers, kind)(getattr(transformers, config)(**case.config))
    random = np.random.RandomState(1)
    for name, tensor in sorted(built.state_dict().items()):
        if name == "lm_head.weight" and built.config.tie_word_embeddings:
            continue
        drawn = random.standard_normal(tensor.shape).astype(np.float32)
        if tensor.ndim > 1:
            fan_in = tensor.shape[-2] if "c_" in name and case.model == "GPT2" else tensor.shape[-1]
            drawn *= np.float32(1.0 if "embed" in name or "wte" in name else 2.0 / fan_in**0.5)
        else:
            drawn = drawn * np.float32(0.3) + np.float32("norm" in name and case.model not in PLUS_ONE)
        tensor.copy_(torch.from_numpy(drawn))
    return built.eval()


def _renamed(case: Case, name: str, array: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """The tensors a weight of transformers becomes in the file."""
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[case.architecture.upper().replace("-", "_")], config.num_hidden_layers
    )
    suffix = name.rsplit(".", 1)[-1]
    base = name.removesuffix("." + suffix) if suffix in ("weight", "bias") else name
    layer = next(iter(re.findall(r"\.(\d+)\.", name)), "")
    if case.model == "GptOss" and "mlp.experts." in name:
        if name.endswith("proj") and array.ndim == 3:
            array = array.swapaxes(1, 2)
        kind = "bias" if name.endswith("_bias") else "weight"
        if "down_proj" in name:
            return [(f"blk.{layer}.ffn_down_exps.{kind}", array)]
        return [
            (f"blk.{layer}.ffn_gate_exps.{kind}", array[:, ::2]),
            (f"blk.{layer}.ffn_up_exps.{kind}", array[:, 1::2]),
        ]
    if name.endswith("self_attn.sinks"):
        return [(f"blk.{layer}.attn_sinks.weight", array)]
    if ".mlp.router." in name:
        return [(f"blk.{layer}.ffn_gate_inp.{suffix}", array)]
    if name.endswith("mixer.A_log"):
        return [(f"blk.{layer}.ssm_a", -np.exp(array))]
    if name.endswith("mixer.D"):
        return [(f"blk.{layer}.ssm_d", array)]
    if name.endswith("mixer.conv1d.weight"):
        array = array[:, 0]
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        return [(f"blk.{layer}.ffn_gate_exps.weight", gate), (f"blk.{layer}.ffn_up_exps.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{layer}.ffn_down_exps.weight", array)]
    if case.model == "Mixtral" and name.endswith("mlp.gate.weight"):
        return [(f"blk.{layer}.ffn_gate_inp.weight", array)]
    if case.architecture in ("llama", "granite") and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if case.model in PLUS_ONE and name.endswith("norm.weight"):
        array = array + np.float32(1)
    if case.model == "GPT2" and ".c_" in name and array.ndim == 2:
        array = array.T
    if name.endswith("shared_expert_gate.weight"):
        array = array[0]
    return [(f"{names.get_name(base)}.{suffix}", array)]


def quantized(kind: Kind, array: np.ndarray, seed: int) -> np.ndarray:
    """`array` in blocks of `kind`; where there is no quantiser, random blocks of about the same size of numbers."""
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = (
        np.random.RandomState(seed)
        .randint(0, 256, (*array.shape[:-1], array.shape[-1] // block, size))
        .astype(np.uint8)
    )
    # bytes of the half-precision scales, and how much larger the second is (it is subtracted: the numbers' mean is to be 0)
    first, second, ratio = {
        "Q2_K": (80, 82, 1.5), "Q3_K": (108, None, 0), "Q4_K": (0, 2, 7.5), "Q5_K": (0, 2, 15.5), "Q6_K": (208, None, 0),
    }.get(kind.name, (0, None, 0))  # fmt: skip
    scale = 1.0
    for _ in range(2):  # once to see how large the numbers are, once to make them as large as the array's
        raw[..., first : first + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        if second is not None:
            raw[..., second : second + 2] = np.frombuffer(np.float16(scale * ratio).tobytes(), np.uint8)
        scale *= float(array.std()) / float(gguf.dequantize(raw.reshape(*array.shape[:-1], -1), kind).std())
    return raw.reshape(*array.shape[:-1], -1)


def write(case: Case, path: Path, *, extra: dict[str, Any] | None = None, drop: str = "", pre: str = "gpt-2") -> str:
    """Write the file of a case; returns a digest of its tensors. `extra` metadata beside it, without the tensor `drop`."""
    built = model(case)
    config = built.config
    writer = gguf.GGUFWriter(path, case.architecture)
    prefix = case.architecture
    for key, value in {**_metadata(case, config), **case.metadata, **(extra or {})}.items():
        full = key if key.startswith(("tokenizer.", "general.", "split.", "somebody.")) else f"{prefix}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        else:
            writer.add_float32(full, value)
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 5 if "unused" in token else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    digest = hashlib.sha256()
    written: list[tuple[str, np.ndarray]] = []
    for name, tensor in sorted(built.state_dict().items()):
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            written += _renamed(case, name, tensor.numpy(), config)
    if case.factors:
        written.append(("rope_freqs.weight", _factors(case)))
    if case.config.get("rope_parameters", {}).get("rope_type") == "longrope":
        parameters = case.config["rope_parameters"]
        written += [
            (f"rope_factors_{which}.weight", np.array(parameters[f"{which}_factor"], np.float32))
            for which in ("long", "short")
        ]
    for number, (name, values) in enumerate(written):
        array = np.ascontiguousarray(values, np.float32)
        digest.update(name.encode() + array.tobytes())
        if name == drop:
            continue
        if case.kind == Kind.F32 or array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            blocks = quantized(case.kind, array, number)
            digest.update(blocks.tobytes())
            writer.add_tensor(name, blocks, raw_dtype=case.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return digest.hexdigest()


def _factors(case: Case) -> np.ndarray:
    """What the rotary frequencies are divided by: as listed, or by Llama 3's rule."""
    if case.factors != (0.0,):
        return np.array(case.factors, np.float32)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**case.config), "cpu")
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    return (plain / scaled).numpy()


def _metadata(case: Case, config: Any) -> dict[str, Any]:
    """What llama.cpp's converter states of every model, and of some."""
    if case.model == "Mamba":
        return {
            "block_count": config.num_hidden_layers, "context_length": 1 << 20, "embedding_length": config.hidden_size,
            "feed_forward_length": 0, "attention.head_count": 0, "ssm.conv_kernel": config.conv_kernel,
            "ssm.inner_size": config.intermediate_size, "ssm.state_size": config.state_size,
            "ssm.time_step_rank": config.time_step_rank, "ssm.dt_b_c_rms": False,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    stated: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.n_inner,
        "attention.head_count": heads,
    }
    if case.model == "GPT2":
        return {**stated, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    parameters = config.rope_parameters
    stated |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": parameters.get("full_attention", parameters)["rope_theta"],
    }
    if case.model == "Starcoder2":
        return {**stated, "attention.layer_norm_epsilon": config.norm_epsilon}
    norm = {"StableLm": ("layer_norm_epsilon", "layer_norm_eps"), "Nemotron": ("layer_norm_epsilon", "norm_eps")}
    theirs, ours = norm.get(case.model, ("layer_norm_rms_epsilon", "rms_norm_eps"))
    stated |= {
        f"attention.{theirs}": getattr(config, ours),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": VOCAB,
        "rope.dimension_count": int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
    }
    for theirs, ours in (
        ("expert_count", "num_local_experts"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ("logit_scale", "logits_scaling"),
        ("residual_scale", "residual_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("attention.scale", "attention_multiplier"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("attention.sliding_window", "sliding_window"),
    ):
        if ours in case.config:
            stated[theirs] = getattr(config, ours)
    return stated


def llama_cpp_logits(path: Path) -> np.ndarray:
    """llama.cpp's logits on the prompt, (tokens, vocabulary), its cache in float32."""
    import llama_cpp

    loaded = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
        flash_attn=False,
    )
    loaded.eval(prompt())
    return np.array(loaded.scores[:TOKENS], np.float32)


def write_tokenizer(path: Path, pre: str | None, prefix: bool | None = None) -> None:
    """A file whose vocabulary has the telling merges, text cut by the rule `pre`; for "spm" scored pieces instead.

    `prefix` says whether scored pieces begin with a space that the text does not have; None does not say.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if pre == "spm":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
        kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    else:
        tokens = [*SPECIAL, *bytes_to_unicode().values()]
        tokens += [merge.replace(" ", "") for merge in TELLING if merge.replace(" ", "") not in tokens]
        tokens.append("AabbA")  # no merges lead there: some take the word as it stands
        kinds = [3 if token in SPECIAL else 1 for token in tokens]
    small = {"vocab_size": len(tokens), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    case = Case("llama", "Llama", {**SMALL, **small})
    built = model(case)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in _metadata(case, built.config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    writer.add_tokenizer_model("llama" if pre == "spm" else "gpt2")
    if pre is not None:
        writer.add_tokenizer_pre("default" if pre == "spm" else pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pre == "spm":
        writer.add_token_scores([0.0] * 259 + [-1.0 - i for i in range(len(PIECES))])
        writer.add_unk_token_id(0)
    else:
        writer.add_token_merges(TELLING)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in sorted(built.state_dict().items()):
        for renamed, array in _renamed(case, name, tensor.numpy(), built.config):
            writer.add_tensor(renamed, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_ids(path: Path) -> np.ndarray:
    """llama.cpp's token ids of the texts, one after the other, each ended by -1."""
    import llama_cpp

    loaded = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return np.array(
        [number for text in TEXTS for number in [*loaded.tokenize(text.encode(), True, True), -1]], np.int16
    )


def main() -> None:
    import tempfile

    stored: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            path = Path(folder, "tiny.gguf")
            digest = write(case, path)
            logits = llama_cpp_logits(path)
            stored[name] = logits[list(KEPT)]
            stored[f"{name}/digest"] = np.array(digest)
            with torch.no_grad():
                ours = model(case)(torch.tensor([prompt()])).logits[0].numpy()
            off = np.linalg.norm(ours - logits) / np.linalg.norm(logits)
            print(f"{name:24} transformers' logits are off by {off:.1e} (not of quantised files)", flush=True)
        for name, settings in TOKENIZERS.items():
            path = Path(folder, "tokenizer.gguf")
            write_tokenizer(path, *settings)
            stored[f"ids/{name}"] = llama_cpp_ids(path)
    np.savez_compressed(STORED, **stored)


if __name__ == "__main__":
    main()
