"""Turns a GGUF file into a transformers model. Everything the file states goes into the model, or the file is refused.

The architectures (`assay.workloads.gguf_architectures`) are tested against the logits of llama.cpp. Weights are dequantised to
float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import InputError
from assay.workloads.files import GgufHeader
from assay.workloads.gguf_architectures import ARCHITECTURES, GgufFile, Plan

# Text is cut by these rules before it is tokenised; transformers knows `_SPLITS` and takes GPT-2's rule for any other name.
# llama.cpp's names for vocabularies whose merges were learned with every digit apart:
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
# Words that are in the vocabulary as they stand are taken whole, and text begins with BOS unless the file says otherwise:
_WHOLE_WORDS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}


# Reading a file --------------------------------------------------------------------------------------------------------


def read_plan(path: Path, header: GgufHeader) -> tuple[GgufFile, Plan]:
    """The model that a checked file holds, before its weights are read.

    Raises InputError for an architecture that is not in `ARCHITECTURES`, for one part of a split file, and naming the first
    field that is not understood.
    """
    metadata = header.metadata
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{path}: architecture {architecture[:40]!r} is not among those that assay converts: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("general.type", "model") != "model":
        raise InputError(f"{path}: holds a {str(metadata['general.type'])[:40]!r}, not a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{path}: is one of {metadata['split.count']} parts; join them with llama.cpp's gguf-split --merge"
        )
    _check_types(path, header)
    file = GgufFile(path, header)
    plan = ARCHITECTURES[architecture](file)
    file.finish()
    return file, plan


def convertible_types() -> dict[int, str]:
    """Number and name of the tensor types that can be dequantised."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    plain = {kinds.F32, kinds.F16}
    return {int(kind): kind.name for kind in kinds if kind in plain or kind in gguf.quants._type_traits}


def _check_types(path: Path, header: GgufHeader) -> None:
    import gguf

    known = convertible_types()
    for name, tensor in header.tensors.items():
        if tensor.kind not in known:
            raise InputError(
                f"{path}: tensor {name!r} is stored as {gguf.GGMLQuantizationType(tensor.kind).name}, which cannot be read here; "
                f"readable: {', '.join(known.values())}"
            )


def read_weights(file: GgufFile, plan: Plan, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the file under transformers' name, in float32; `wanted` are the model's own tensors, on any device.

    Raises InputError naming a tensor that has no place in the model, one that is absent, and one of another shape.
    """
    found: dict[str, Tensor] = {}
    halves: set[tuple[str, int]] = set()
    for name in file.tensors:
        if name in file.taken:  # it became a setting
            continue
        target, half = _target(name, plan)
        if target not in wanted:
            raise file.refuse(f"nothing here understands the tensor {name}")
        values, place = plan.change(name, file.values(name)), wanted[target]
        if plan.interleaved and "_exps." in name and values.ndim == 3:
            values = values.transpose(1, 2)
        if half is not None:
            found.setdefault(target, torch.empty(place.shape))
            halves.add((target, half))
            place = _half(found[target], half, plan.interleaved)
        if values.shape != place.shape:
            raise InputError(
                f"{file.path}: tensor {name} has the shape {tuple(values.shape)}, its metadata asks for {tuple(place.shape)}"
            )
        if half is None:
            found[target] = values.contiguous()
        else:
            place.copy_(values)
    absent = {name for name in wanted if name not in found}
    absent |= {name for name, half in halves if (name, 1 - half) not in halves}
    if plan.config["tie_word_embeddings"]:
        absent.discard("lm_head.weight")
    if plan.absent_biases:
        zeros = {name for name in absent if name.endswith(".bias")}
        found |= {name: torch.zeros(wanted[name].shape) for name in zeros}
        absent -= zeros
    if absent:
        raise InputError(f"{file.path}: lacks {len(absent)} tensors the model needs, e.g. {min(absent)}")
    return found


def _half(whole: Tensor, half: int, interleaved: bool) -> Tensor:
    """The part of the joint tensor that holds the gates (0) or ups (1) of all experts."""
    return whole[..., half::2] if interleaved else whole.chunk(2, dim=1)[half]


def _target(name: str, plan: Plan) -> tuple[str, int | None]:
    """Where a tensor goes: its name in the model, and which half of it (None: all)."""
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(\.weight|\.bias|)", name)
    if parts is None:
        return "", None
    layer, leaf, suffix = parts.groups()
    base = plan.shared.get(leaf, "") if layer is None else f"{plan.layers}.{layer}.{plan.layer.get(leaf, '')}"
    if leaf.endswith("_exps"):
        half = {"ffn_gate_exps": 0, "ffn_up_exps": 1}.get(leaf)
        return base + {".weight": "", ".bias": "_bias"}.get(suffix, "?"), half
    if leaf == "attn_sinks":
        suffix = ""
    return base + suffix, None


# The tokenizer ---------------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path, header: GgufHeader) -> Any:
    """The tokenizer a file describes. Raises InputError for a kind, or a way of splitting text, that would have to be guessed."""
    from tokenizers import decoders, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    metadata = header.metadata
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{path}: tokenizer.ggml.model is {str(kind)[:40]!r}; assay converts gpt2 and llama")
    understood: set[str | None] = {*GGUF_PRE_TOKENIZER_SPLITS, *_SINGLE_DIGITS, *_AS_GPT2}
    if metadata["general.architecture"] == "gpt2":
        understood |= {None, "default"}
    if kind == "gpt2" and cut not in understood:
        raise InputError(
            f"{path}: tokenizer.ggml.pre is {'absent' if cut is None else repr(str(cut)[:40])}, so text would be cut by a guess; "
            f"understood: {', '.join(sorted(name for name in understood if name))}"
        )
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
    )
    backend = tokenizer.backend_tokenizer
    if cut in _SINGLE_DIGITS:  # numbers are cut into digits before words are cut: `    1` keeps its indentation whole
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if kind == "gpt2" and cut in _WHOLE_WORDS:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in metadata and tokenizer.bos_token_id is not None:
            tokenizer.add_bos_token = True
    if kind == "llama" and not metadata["general.architecture"].startswith("gemma"):
        # a space precedes the text, whatever it starts with, unless the file says otherwise
        spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
        backend.normalizer = normalizers.Sequence([*[normalizers.Prepend("▁")] * spaced, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        last = [decoders.Strip(" ", 1, 0)] if spaced else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
    return tokenizer
