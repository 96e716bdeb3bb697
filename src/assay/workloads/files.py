"""Checks model files from untrusted sources before any library reads them.

Safetensors and GGUF files hold data, not code, but a header may still lie: about its own length, about where tensors are, about
how many there are. The checks here read only headers, never allocate by a number found in a file, and raise `InputError`
naming the file and what is wrong with it. Pickled weights and configurations that ask for remote code are refused.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError

_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format itself
_MAX_JSON = 64 << 20  # bytes; config, index and tokenizer settings are far smaller
_MAX_DIMENSIONS = 16
MOST_LAYERS = 100_000  # libraries make lists of this length as soon as they read a configuration

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What the weights of a model file contain: how many tensors, numbers and bytes, and the numbers by safetensors type."""

    tensors: int
    elements: int
    bytes: int
    types: Mapping[str, int] = field(default_factory=dict)


def check_folder(folder: Path) -> Stored:
    """Check a model folder: config.json and *.safetensors that are whole, inside the folder, and ask for no code.

    Raises InputError naming the file and what is wrong.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so this is not a model folder")
    check_config(folder)
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: holds an adapter (adapter_config.json); merge it into its base model and save that instead"
        )
    return _add(check_safetensors(_inside(folder, name)) for name in weight_files(folder))


# Settings that libraries take as they come, and that end in a crash or in nonsense when they are wrong. Null is always allowed.
_SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_layers", "num_attention_heads", "num_heads",
    "attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_embd", "n_layer", "n_layers", "n_head",
    "n_heads", "n_inner", "n_positions", "n_ctx", "d_model", "d_ff", "dff", "ffn_dim", "moe_intermediate_size", "state_size",
    "conv_kernel", "word_embed_proj_dim", "rotary_dim", "window_size", "original_max_position_embeddings",
}  # fmt: skip
_POSITIVE = {
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rope_theta", "rotary_emb_base",
    "logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "temperature", "repetition_penalty",
}  # fmt: skip
_SHARES = {"partial_rotary_factor", "rotary_pct"}
_FLAGS = {
    "is_decoder", "is_encoder_decoder", "add_cross_attention", "use_sliding_window", "tie_word_embeddings", "use_cache",
    "attention_bias", "mlp_bias", "do_sample",
}  # fmt: skip
_TOKEN_IDS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
}  # -1 means none in old files


def _check_setting(key: str, value: Any) -> None:
    """Raise ValueError or TypeError for a value that `key` cannot have."""
    listed = isinstance(value, list) and key in _SIZES | _TOKEN_IDS  # one a layer, several ends
    for item in value if listed else [value]:
        if item is None:
            continue
        if key in _SIZES or key == "sliding_window":  # where 0 means none
            checks.whole(key, item, low=0 if listed or key == "sliding_window" else 1, high=(1 << 31) - 1)
        elif key in _TOKEN_IDS:
            checks.whole(key, item, low=-1, high=(1 << 31) - 1)
        elif key in _SHARES:
            checks.number(key, item, above=0, high=1)
        elif key in _POSITIVE:
            checks.number(key, item, low=0)
        elif key in _FLAGS:
            checks.flag(key, item)


def check_config(folder: Path) -> None:
    """Refuse settings of a model folder that would run code, read weights from elsewhere, overload a library, or have
    values no model can have.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors"):
            _inside(folder, path.name)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        if (folder / name).exists():
            path = _inside(folder, name)
            for key, value in _walk(read_json(path)):
                if name in ("config.json", "generation_config.json"):
                    try:
                        _check_setting(key, value)
                    except (TypeError, ValueError) as error:
                        raise InputError(f"{path}: {error}") from None
                counts = key == "num_labels" or ("layer" in key and not key.startswith("vocab_size"))
                if counts and type(value) is int and value > MOST_LAYERS:
                    raise InputError(f"{path}: {key} of {value} is absurd (limit {MOST_LAYERS})")
                if key in ("auto_map", "custom_generate", "trust_remote_code") and value:
                    raise InputError(f"{path}: {key!r} asks for code that comes with the model, which assay never runs")
                if key.removeprefix("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
                    raise InputError(f"{path}: {key!r} asks for a downloaded kernel ({value}), which assay never runs")
                if key == "transformers_weights":
                    raise InputError(
                        f"{path}: 'transformers_weights' is not supported; name the file model.safetensors"
                    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object. Raises InputError when it is not one."""
    if path.stat().st_size > _MAX_JSON:
        raise InputError(f"{path}: {path.stat().st_size} bytes are too many for a settings file (limit {_MAX_JSON})")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no setting")
    return math.inf if name == "Infinity" else -math.inf


def _walk(value: Any) -> Iterable[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def weight_files(folder: Path) -> list[str]:
    """The file names that hold the weights, as transformers would choose them."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        return _indexed_files(folder)
    safetensors = sorted(path.name for path in folder.glob("*.safetensors"))
    if safetensors:
        raise InputError(
            f"{folder}: has {', '.join(safetensors[:3])} but neither model.safetensors nor model.safetensors.index.json"
        )
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth", "pkl", "ckpt") for path in folder.glob(f"*.{suffix}"))
    if pickles:
        raise InputError(
            f"{folder}: only pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
            "convert them to safetensors (load where you trust them, then save_pretrained)"
        )
    raise InputError(f"{folder}: no weights; expected model.safetensors")


def _indexed_files(folder: Path) -> list[str]:
    index = _inside(folder, "model.safetensors.index.json")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{index}: 'weight_map' must be a non-empty object")
    for tensor, name in weights.items():
        if not isinstance(name, str):
            raise InputError(f"{index}: the file of {tensor[:80]!r} must be a string, got {type(name).__name__}")
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise InputError(
                f"{index}: {name[:80]!r} points outside the folder; file names without folders are allowed"
            )
        if not name.endswith(".safetensors"):
            raise InputError(f"{index}: {name[:80]!r} is not a .safetensors file")
    names = sorted(set(weights.values()))
    held = {name: safetensors_shapes(_inside(folder, name)).keys() for name in names}
    for tensor, name in weights.items():
        if tensor not in held[name]:
            raise InputError(f"{index}: tensor {tensor[:80]!r} is not in {name}")
    return names


def _inside(folder: Path, name: str) -> Path:
    """`folder / name` if it exists and really lies in the folder (for the hub's cache: in the same repository)."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path}: missing")
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the hub's cache links snapshots/<commit>/file to blobs/<hash>
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path}: a link that points outside the folder, to {path.resolve()}")
    return path


def _add(parts: Iterable[Stored]) -> Stored:
    listed = list(parts)
    types: Counter[str] = Counter()
    for part in listed:
        types.update(part.types)
    return Stored(
        sum(part.tensors for part in listed),
        sum(part.elements for part in listed),
        sum(part.bytes for part in listed),
        dict(types),
    )


def check_safetensors(path: Path) -> Stored:
    """Check the header of one safetensors file against the file's size; see `safetensors_shapes`."""
    shapes, types = _safetensors(path)
    return Stored(len(shapes), sum(types.values()), path.stat().st_size, types)


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name, once the header is checked: every tensor has a known type, its bytes match its shape, and
    the tensors follow each other without gap or overlap up to the file's end.

    Raises InputError naming the file and what is wrong.
    """
    return _safetensors(path)[0]


def _safetensors(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes by tensor name, and how many numbers of each type there are."""
    header, size = _safetensors_header(path)
    types: Counter[str] = Counter()
    spans: list[tuple[int, int, str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise InputError(f"{path}: __metadata__ must map strings to strings")
            continue
        shape, begin, end = _safetensors_entry(path, name, entry)
        if end > size:
            raise InputError(
                f"{path}: truncated or wrong: tensor {name[:80]!r} ends at byte {end}, but only {size} bytes of data follow"
            )
        spans.append((begin, end, name))
        shapes[name] = shape
        types[entry["dtype"]] += math.prod(shape)
    if not shapes:
        raise InputError(f"{path}: holds no tensors")
    reached = 0
    for begin, end, name in sorted(spans):
        if begin < reached:
            raise InputError(f"{path}: tensor {name[:80]!r} overlaps another (starts at {begin}, before {reached})")
        if begin > reached:
            raise InputError(f"{path}: {begin - reached} bytes before tensor {name[:80]!r} belong to no tensor")
        reached = end
    if reached != size:
        raise InputError(f"{path}: {size - reached} bytes after the last tensor belong to no tensor")
    return shapes, dict(types)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    total = path.stat().st_size
    if total < 8:
        raise InputError(f"{path}: {total} bytes are too few for a safetensors file")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER:
            raise InputError(
                f"{path}: header of {length} bytes is absurd (limit {_MAX_HEADER}); not a safetensors file?"
            )
        if length > total - 8:
            raise InputError(f"{path}: truncated or wrong: header of {length} bytes in a file of {total}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: header is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header must be a JSON object, got {type(header).__name__}")
    return header, total - 8 - length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice")
    return result


def _safetensors_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    what = f"{path}: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InputError(f"{what}: unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_count(side) for side in shape):
        raise InputError(f"{what}: shape must be at most {_MAX_DIMENSIONS} non-negative integers below 2**63")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise InputError(f"{what}: data_offsets must be two non-negative integers")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if end - begin != bits // 8 or bits % 8:
        raise InputError(
            f"{what}: shape {shape} of {dtype} needs {bits / 8:g} bytes, but data_offsets give {end - begin}"
        )
    return tuple(shape), begin, end


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


# GGUF ------------------------------------------------------------------------------------------------------------------

_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by GGUF value type
_VALUE_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10
_MOST_KEPT = 1024  # numbers of a metadata array that we keep: one a layer
_MAX_TEXT = 1 << 20  # bytes of one metadata string that we keep; token lists and templates are far smaller apiece


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is in its file: bytes `begin` to `end`, its shape in torch's order, and ggml's number of its type."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """The contents of a checked GGUF header: metadata (long arrays and lists of strings are None), tensors, what is stored."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    stored: Stored


def check_gguf(path: Path) -> GgufHeader:
    """Check a GGUF file: magic, version, counts, lengths, tensor types, and that every tensor lies in the file.

    Reads through a memory map and never allocates by a number found in the file. Raises InputError naming the file and
    what is wrong.
    """
    size = path.stat().st_size
    if size < 24:
        raise InputError(f"{path}: {size} bytes are too few for a GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _GgufReader(data).read()
        except _Bad as error:
            raise InputError(f"{path}: {error}") from None


class _Bad(Exception):
    pass


class _GgufReader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise _Bad(f"not a GGUF file: it starts with {self.data[:4]!r}")
        self.at = 4
        version = self.number(_U32)
        if version not in (2, 3):
            raise _Bad(f"GGUF version {version} is not supported; allowed: 2, 3 (little endian)")
        tensors, values = self.number(_U64), self.number(_U64)
        left = len(self.data) - self.at
        if tensors * 24 > left or values * 13 > left:
            raise _Bad(f"{tensors} tensors and {values} metadata entries do not fit into {len(self.data)} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self.name("metadata key")
            if key in metadata:
                raise _Bad(f"metadata key {key!r} is given twice")
            value = metadata[key] = self.value(self.number(_U32))
            if key.endswith("block_count") and (type(value) is not int or value > MOST_LAYERS):
                raise _Bad(f"{key} of {value} is absurd (limit {MOST_LAYERS})")
        if not isinstance(metadata.get("general.architecture"), str):
            raise _Bad("metadata lacks the string general.architecture")
        found = self.tensors(tensors, metadata.get("general.alignment", 32))
        elements = sum(math.prod(tensor.shape) for tensor in found.values())
        return GgufHeader(metadata, found, Stored(tensors, elements, len(self.data)))

    def tensors(self, count: int, alignment: Any) -> dict[str, GgufTensor]:
        import gguf

        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _Bad(f"general.alignment must be a power of two from 8 to {1 << 20}, got {alignment!r}")
        known = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
        found: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self.name("tensor name")
            if name in found:
                raise _Bad(f"tensor {name!r} is given twice")
            dimensions = self.number(_U32)
            if not 1 <= dimensions <= 4:
                raise _Bad(f"tensor {name!r} has {dimensions} dimensions; allowed: 1 to 4")
            shape = [self.number(_U64) for _ in range(dimensions)]
            kind, begin = self.number(_U32), self.number(_U64)
            if kind not in known:
                raise _Bad(f"tensor {name!r} has unknown type {kind}")
            block, block_bytes = known[kind]
            if shape[0] % block or not all(shape):
                raise _Bad(f"tensor {name!r}: shape {shape} does not divide into blocks of {block}")
            if begin % alignment:
                raise _Bad(f"tensor {name!r} starts at {begin}, which is not a multiple of {alignment}")
            end = begin + math.prod(shape) // block * block_bytes
            found[name] = GgufTensor(tuple(reversed(shape)), kind, begin, end)
        start = -(-self.at // alignment) * alignment
        room = len(self.data) - start
        reached = 0
        for begin, end, name in sorted((tensor.begin, tensor.end, name) for name, tensor in found.items()):
            if end > room:
                raise _Bad(
                    f"truncated or wrong: tensor {name!r} ends at byte {end}, but only {room} bytes of data follow"
                )
            if begin < reached:
                raise _Bad(f"tensor {name!r} overlaps another (starts at {begin}, before {reached})")
            reached = end
        if not found:
            raise _Bad("holds no tensors")
        return {
            name: replace(tensor, begin=start + tensor.begin, end=start + tensor.end) for name, tensor in found.items()
        }

    def number(self, kind: int) -> Any:
        size = _VALUE_SIZES[kind]
        if self.at + size > len(self.data):
            raise _Bad("truncated: the header ends in the middle")
        (value,) = struct.unpack_from("<" + _VALUE_FORMATS[kind], self.data, self.at)
        self.at += size
        return value

    def text(self) -> bytes:
        """The bytes of a string, at most `_MAX_TEXT` of them."""
        length = self.number(_U64)
        if length > len(self.data) - self.at:
            raise _Bad(f"a string of {length} bytes at byte {self.at} does not fit into the file")
        value = self.data[self.at : self.at + min(length, _MAX_TEXT)]
        self.at += length
        return value

    def name(self, what: str) -> str:
        raw = self.text()
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Bad(f"{what} {raw[:40]!r} is not UTF-8") from None
        if len(raw) > 65535 or not name:
            raise _Bad(f"{what} of {len(raw)} bytes; allowed: 1 to 65535")
        return name

    def value(self, kind: int, depth: int = 0) -> Any:
        """A scalar, a string, a short array of numbers as a tuple; other arrays are walked, checked and left out (None)."""
        if kind in _VALUE_SIZES:
            return self.number(kind)
        if kind == _STRING:
            return self.text().decode("utf-8", errors="replace")
        if kind != _ARRAY:
            raise _Bad(f"metadata value type {kind} at byte {self.at} is unknown")
        if depth == 4:
            raise _Bad("metadata arrays are nested too deeply")
        inner, count = self.number(_U32), self.number(_U64)
        smallest = _VALUE_SIZES.get(inner, 8)
        if count * smallest > len(self.data) - self.at:
            raise _Bad(f"an array of {count} values at byte {self.at} does not fit into the file")
        if inner in _VALUE_SIZES:
            if count <= _MOST_KEPT:
                return tuple(self.number(inner) for _ in range(count))
            self.at += count * smallest
        elif inner == _STRING:
            self.skip_strings(count)
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return None

    def skip_strings(self, count: int) -> None:
        data, at, size = self.data, self.at, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                raise _Bad("truncated: the header ends in a list of strings")
            at += 8 + length_at(data, at)[0]
        if at > size:
            raise _Bad("truncated: a list of strings does not fit into the file")
        self.at = at
