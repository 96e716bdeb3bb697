"""Writes a model with packed weights as a GGUF file, as llama.cpp's converter would, with the codes and scales it has.

8-bit groups become Q8_0, symmetric 4-bit groups Q4_0, those with a minimum Q4_1: the same numbers in the same groups of 32. Other
tensors keep their type, vectors become float32. Before the file takes its place it is read again by assay's own reader, and every
number, the configuration and the ids of a text must come back as they were.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.errors import InputError
from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.quantize.groups import GROUP
from assay.methods.core.quantize.int8_linear import Int8Linear
from assay.methods.core.quantize.stored import Groups, read_panels
from assay.paths import atomic_file
from assay.tuner.packed import held

# transformers' model_type: llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
# how text is cut before it is tokenised, by llama.cpp's names; the first that gives the tokenizer's own ids is written
CUTS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "gpt-4o", "tekken")
TELLING = (
    "The quick brown fox, 12345 + 67.\n\n  def f(x):\n\t return x['a'] ** 2  # it's  \u00e9t\u00e9 \u4f60\u597d\n",
    "   1 22 333 4444!!?\r\n  don't DON'T we'LL\n\n\n end ",
)


def write(path: Path, loaded: Any) -> None:
    """Write the file, completely or not at all. Raises InputError for a model that GGUF, or this writer, cannot hold as it is."""
    model, tokenizer = loaded.model, loaded.tokenizer
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{loaded.source}: {kind!r} models are not written as GGUF here; those written: {', '.join(ARCHITECTURES)}"
        )
    for one in held(model):
        name = one.parts[0][0]
        if isinstance(one.layer, Int8Linear):
            raise InputError(
                f"{loaded.source}: {name} is W8A8 with a float32 scale for each output; GGUF's Q8_0 has float16 scales of groups of "
                f"{GROUP}: export the model it was made from with --weights w8a16"
            )
        if not isinstance(one.layer, WeightOnlyLinear):
            raise InputError(f"{loaded.source}: {name} has groups or scales that GGUF does not know")
        if one.layer.gain is not None:
            raise InputError(f"{loaded.source}: {name} has weights beyond GGUF's float16 scales")
    cut = _cut(loaded)
    with atomic_file(path) as temporary:
        with _writer(temporary, ARCHITECTURES[kind]) as writer:
            _describe(writer, model.config, loaded.source)
            _add_tokenizer(writer, tokenizer, cut, model.config)
            for name, values in _tensors(model):
                _add(writer, model.config, name, values)
        _compare(temporary, path, loaded)


@contextlib.contextmanager
def _writer(path: Path, architecture: str) -> Iterator[Any]:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(model: Any) -> Iterator[tuple[str, Tensor | Groups]]:
    """Every tensor by transformers' name: packed ones as groups."""
    inside = {one.path: one for one in held(model)}
    for one in inside.values():
        layer = one.layer
        assert isinstance(layer, WeightOnlyLinear)
        yield f"{one.path}.weight", read_panels(layer.packed, layer.out_features, layer.in_features, layer.bits)
        if layer.bias is not None:
            yield f"{one.path}.bias", layer.bias.detach()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in inside and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def _describe(writer: Any, config: Any, source: str) -> None:
    """The metadata of the architecture. Raises InputError for a setting that would be lost."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_vocab_size(config.vocab_size)
    gemma = config.model_type == "gemma3_text"
    ropes = config.rope_parameters
    whole = ropes["full_attention"] if gemma else ropes
    if whole.get("rope_type", "default") not in ("default", "linear") or (
        gemma and ropes["sliding_attention"].get("rope_type") != "default"
    ):
        raise InputError(
            f"{source}: rotary positions of type {whole.get('rope_type')!r} are not written as GGUF here; default and linear are"
        )
    writer.add_rope_freq_base(whole["rope_theta"])
    if whole.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(whole["factor"])
    if gemma:
        writer.add_float32("gemma3.rope.freq_base_swa", ropes["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_array(
            "gemma3.attention.sliding_window_pattern", [kind == "sliding_attention" for kind in config.layer_types]
        )
        if config.final_logit_softcapping is not None:
            writer.add_float32("gemma3.final_logit_softcapping", config.final_logit_softcapping)
    elif config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)


def _add(writer: Any, config: Any, name: str, values: Tensor | Groups) -> None:
    import gguf

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].upper()], config.num_hidden_layers
    )
    base, _, leaf = name.rpartition(".")
    target = names.get_name(base)
    if target is None or leaf not in ("weight", "bias"):
        raise InputError(f"the tensor {name} has no name in GGUF for this architecture")
    target = f"{target}.{leaf}"
    order = _order(config, name)
    if isinstance(values, Groups):
        rows = [part if part is None or order is None else part[order] for part in values]
        block, kind = _blocks(Groups(*rows))  # type: ignore[arg-type]
        writer.add_tensor(target, block.numpy(), raw_dtype=kind)
        return
    values = values if order is None else values[order]
    if values.dim() == 1 or values.dtype == torch.float32:
        values = values.float()
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            values = values + 1  # the file holds what is multiplied by
        writer.add_tensor(target, values.contiguous().numpy())
    elif values.dtype == torch.bfloat16:
        raw = values.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif values.dtype == torch.float16:
        writer.add_tensor(target, values.contiguous().numpy())
    else:
        raise InputError(f"the tensor {name} is {values.dtype}, which is not written as GGUF here")


def _order(config: Any, name: str) -> Tensor | None:
    """The order of the rows of queries and keys: llama.cpp rotates neighbours, transformers rotates halves."""
    if ARCHITECTURES[config.model_type] != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return None
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.arange(heads * dim).view(heads, 2, dim // 2).transpose(1, 2).reshape(-1)


def _blocks(groups: Groups) -> tuple[Tensor, Any]:
    """The rows as GGUF's blocks of 32, uint8 (rows, bytes), and their type."""
    from gguf import GGMLQuantizationType as Kind

    codes, scale, minimum = groups
    rows, count = scale.shape
    blocks = codes.view(rows, count, GROUP)
    head = scale.contiguous().view(torch.uint8).view(rows, count, 2)
    if minimum is None:
        body = (blocks.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
        return torch.cat([head, body], -1).view(rows, -1), Kind.Q8_0
    body = blocks[..., :16] | blocks[..., 16:] << 4
    if torch.equal(minimum, -8 * scale):
        return torch.cat([head, body], -1).view(rows, -1), Kind.Q4_0
    low = minimum.contiguous().view(torch.uint8).view(rows, count, 2)
    return torch.cat([head, low, body], -1).view(rows, -1), Kind.Q4_1


# The tokenizer ---------------------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, tokenizer: Any, cut: str, config: Any) -> None:
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(config.vocab_size):
        entry = added.get(number)
        if entry is not None:
            tokens.append(entry["content"])
            types.append(gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(known.get(number, f"<unused{number}>"))
            types.append(gguf.TokenType.NORMAL if number in known else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = state["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for role in ("bos", "eos", "unk", "pad"):
        its = getattr(tokenizer, f"{role}_token_id", None)
        if its is not None and its < config.vocab_size:
            getattr(writer, f"add_{role}_token_id")(its)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _cut(loaded: Any) -> str:
    """llama.cpp's name for how this tokenizer cuts text. Raises InputError for one that none of the names stands for."""
    import tempfile

    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    if state.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(state.get("pre_tokenizer")):
        raise InputError(f"{loaded.source}: its tokenizer is no byte-level BPE, which is what is written as GGUF here")
    wanted = [loaded.tokenizer(text).input_ids for text in TELLING]
    with tempfile.TemporaryDirectory() as folder:
        for cut in CUTS:
            file = Path(folder) / f"{cut}.gguf"
            with _writer(file, "llama") as writer:
                _add_tokenizer(writer, loaded.tokenizer, cut, loaded.model.config)
                writer.add_tensor("none", np.zeros(1, np.float32))
            with contextlib.suppress(InputError):
                if [_read_tokenizer(file)(text).input_ids for text in TELLING] == wanted:
                    return cut
    raise InputError(f"{loaded.source}: none of GGUF's ways to cut text ({', '.join(CUTS)}) gives this tokenizer's ids")


def _read_tokenizer(file: Path) -> Any:
    from assay.workloads.files import check_gguf
    from assay.workloads.gguf_models import read_tokenizer
    from assay.workloads.models import _library_errors

    with _library_errors(f"{file}: cannot be read"):
        return read_tokenizer(file, check_gguf(file))


# Reading it again ------------------------------------------------------------------------------------------------------------


def _compare(file: Path, target: Path, loaded: Any) -> None:
    """Raise InputError unless assay's own reader finds in the file what the model holds."""
    from transformers import AutoConfig

    from assay.workloads.files import check_gguf
    from assay.workloads.gguf_models import read_plan, read_weights

    model = loaded.model
    found, plan = read_plan(file, check_gguf(file))
    config: Any = AutoConfig.for_model(**plan.config)
    _compare_settings(config, model.config, target)
    wanted: Mapping[str, Tensor] = dict(_dense(model))
    again = read_weights(found, plan, {name: tensor.to("meta") for name, tensor in wanted.items()})
    for name, tensor in wanted.items():
        if name not in again or not torch.equal(again[name], tensor):
            raise InputError(f"{target}: {name} would read otherwise from a GGUF file than it is; nothing was written")


def _dense(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, values in _tensors(model):
        if isinstance(values, Groups):
            codes, scale, minimum = values
            low = -128 * scale.float() if minimum is None else minimum.float()
            dense = codes.view(*scale.shape, GROUP).float() * scale.float()[..., None] + low[..., None]
            yield name, dense.view(codes.shape)
        else:
            yield name, values.float()


def _compare_settings(found: Any, wanted: Any, target: Path) -> None:
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types",
        "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_act", "hidden_activation",
    ):  # fmt: skip
        mine, theirs = getattr(wanted, name, None), getattr(found, name, None)
        if name == "rms_norm_eps":
            mine, theirs = np.float32(mine), np.float32(theirs)
        if mine != theirs:
            raise InputError(
                f"{target}: GGUF does not hold {name} = {str(mine)[:80]} of this model (it would read {str(theirs)[:80]})"
            )
