"""Models whose linear layers are packed, on disk: how they are written, and read without a dense weight ever being made.

    config.json, tokenizer ...   as transformers has them
    model.safetensors            where compressed-tensors can say all of it: transformers and vLLM load the folder without assay
    packed.safetensors           where it cannot; no other reader finds weights in the folder, so none computes something else with them
    packed.json                  what only assay needs: the steps of the recipe that the weights hold already, and how layers are joined

Both files hold the same tensors by layer: `weight` (int8) and `weight_scale` of W8A8, or `weight_packed` (32-bit words of codes),
`weight_scale`, `weight_shape` and perhaps `weight_zero_point` of groups. The second may also hold `input_multiplier` (smoothing),
`weight_minimum` (asymmetric groups whose minimum is no whole number of steps) and `weight_gain`. compressed-tensors checkpoints of
others are read too: format "int-quantized" (int8 weights by channel, inputs by token) and "pack-quantized" (4 or 8 bits).
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay import checks
from assay.errors import AssayError, InputError
from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.layers.linears import fused_experts, linears, open_, put, settle
from assay.methods.core.layers.stand_in import StandIn
from assay.methods.core.layers.surgery import bypassed, linear_kinds, refuse_saving, untie
from assay.methods.core.quantize.grouped_linear import GroupedLinear
from assay.methods.core.quantize.groups import GROUP
from assay.methods.core.quantize.int8_linear import Int8GatedMLP, Int8Linear, fusable_blocks, fuse_block, power_of_two
from assay.methods.core.quantize.stored import (
    Groups,
    group_panels,
    pack_words,
    read_panels,
    unpack_words,
    wide_panels,
    zero_points,
)
from assay.tuner.compressed_tensors import METHOD, Schemes, quantization_config, read_schemes

PACKED, PLAIN, OWN = "packed.json", "model.safetensors", "packed.safetensors"
FORMAT = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F32", "F16", "BF16")
PackedLayer = Int8Linear | WeightOnlyLinear | GroupedLinear
StandIn._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws no numbers for the weight of a packed layer


@dataclass(frozen=True)
class Contents:
    """What packed.json says: how many steps of the recipe the weights hold, why others cannot read them ("": they can), whether
    Conv1D and fused experts were opened, which blocks run fused, and the rotation of each layer's inputs."""

    steps: int = 0
    why: str = ""
    opened: bool = False
    fused: tuple[str, ...] = ()
    rotation: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """A packed layer of a model and the layers it holds: (name, first output, outputs) each, and the norm that is in it."""

    path: str
    layer: PackedLayer
    parts: tuple[tuple[str, int, int], ...]
    norm: str | None = None


def held(model: nn.Module) -> list[Held]:
    """The packed layers of a model, with the names that the layers they hold have in an ordinary model."""
    found: dict[str, Held] = {}
    for name, block in model.named_modules():
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        if not isinstance(mlp, Int8GatedMLP) or attention is None:
            continue
        joint: Any = attention.qkv_proj
        kv = int(attention.num_kv_heads * attention.head_dim)
        q, inner = joint.out_features - 2 * kv, mlp.down.in_features
        qkv = (
            (f"{name}.self_attn.q_proj", 0, q),
            (f"{name}.self_attn.k_proj", q, kv),
            (f"{name}.self_attn.v_proj", q + kv, kv),
        )
        second = mlp.gate_up.out_features // 2
        gate_up = ((f"{name}.mlp.gate_proj", 0, inner), (f"{name}.mlp.up_proj", second, inner))
        for path, layer, parts, norm in (
            (f"{name}.self_attn.qkv_proj", joint, qkv, f"{name}.input_layernorm"),
            (f"{name}.mlp.gate_up", mlp.gate_up, gate_up, f"{name}.post_attention_layernorm"),
            (f"{name}.mlp.down", mlp.down, ((f"{name}.mlp.down_proj", 0, mlp.down.out_features),), None),
        ):
            found[path] = Held(path, layer, parts, norm)
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer) and name not in found:
            found[name] = Held(name, module, ((name, 0, module.out_features),))
    return list(found.values())


def has_packed_layers(model: nn.Module) -> bool:
    """Whether a model holds layers that only a packed folder keeps as they are."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def digest(model: nn.Module) -> str:
    """A hash of every number in a model, by name: equal digests mean the same weights to the last bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(_tensors(model), key=lambda item: item[0]):
        values = tensor.detach().contiguous().cpu()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


# Writing ---------------------------------------------------------------------------------------------------------------------


def save(folder: Path, model: nn.Module, steps: int) -> Contents:
    """Write config.json, the weights and packed.json of a model with packed layers; `steps` of its recipe are in them.

    What is written is read again and compared with the model, tensor by tensor and bit by bit. Raises OSError when the disk is
    full, AssayError when what was read differs, which would be an error of ours.
    """
    from safetensors.torch import save_file

    tensors, contents, shell = stored(model, steps)
    settings = None if contents.why else quantization_config(tensors, shell)
    write_config(folder, model, settings)
    save_file(tensors, folder / (OWN if contents.why else PLAIN), metadata={"format": "pt"})
    written = {"format": FORMAT, **{name: getattr(contents, name) for name in Contents.__dataclass_fields__}}
    (folder / PACKED).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    del tensors
    _compare(folder, model)
    return contents


def stored(model: nn.Module, steps: int = 0) -> tuple[dict[str, Tensor], Contents, nn.Module]:
    """The tensors of a model with packed layers as they are written, what packed.json says of them, and the model without memory."""
    shell = _shell(copy.deepcopy(model.config))
    opened = _is_to_open(shell)
    known = linears(open_(shell) if opened else shell)
    tensors, rotation, reasons = _packed_tensors(model, known)
    if bypassed(shell):
        reasons["transformers draws new weights for this architecture while it loads packed ones (Mamba)"] = None
    if opened:
        reasons["it names the weights of Conv1D and of fused experts otherwise"] = None
    packed_layers = held(model)
    inside = {one.path for one in packed_layers}
    taken: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in inside and id(tensor) not in taken:
            taken.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    norms = [one.norm for one in packed_layers if one.norm is not None and one.norm.endswith(".input_layernorm")]
    fused = tuple(norm.removesuffix(".input_layernorm") for norm in norms)
    return tensors, Contents(steps, "; ".join(reasons), opened, fused, rotation), shell


def write_config(folder: Path, model: nn.Module, quantization: Mapping[str, Any] | None) -> None:
    """Write config.json of a model, with this `quantization_config`."""
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = getattr(model, "dtype", None), [type(model).__name__]
    config.save_pretrained(folder)
    if quantization is not None:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        document["quantization_config"] = dict(quantization)
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _packed_tensors(
    model: nn.Module, known: Mapping[str, nn.Linear]
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, None]]:
    """The tensors of the packed layers by name, the rotation of each that has one, and what compressed-tensors cannot say of them."""
    tensors: dict[str, Tensor] = {}
    rotation: dict[str, int] = {}
    reasons: dict[str, None] = {}
    for one in held(model):
        layer = one.layer
        if isinstance(layer, Int8Linear):
            plain = bool((layer.multiplier == 1).all())
            if one.norm is not None:
                tensors[f"{one.norm}.weight"] = _narrow(layer.multiplier, layer.dtype)
            codes = layer.codes()
            for name, first, rows in one.parts:
                tensors[f"{name}.weight"] = codes[first : first + rows].contiguous()
                tensors[f"{name}.weight_scale"] = layer.scale[first : first + rows, None].clone()
                if known[name].bias is not None:
                    assert layer.bias is not None
                    tensors[f"{name}.bias"] = _narrow(layer.bias[first : first + rows].clone(), layer.dtype)
                if layer.rotation > 1:
                    rotation[name] = layer.rotation
                    reasons[
                        "it knows no rotation of a layer's inputs as this recipe has it (rotation = 1 leaves it out)"
                    ] = None
                if one.norm is None and not plain:
                    tensors[f"{name}.input_multiplier"] = layer.multiplier
                    reasons["it knows no smoothing of a layer's inputs (without smooth there is none)"] = None
            continue
        ((name, _, rows),) = one.parts
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach()
        tensors[f"{name}.weight_shape"] = torch.tensor([rows, layer.in_features])
        if isinstance(layer, GroupedLinear):
            tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"] = layer.words, layer.scale
            if layer.zero is not None:
                tensors[f"{name}.weight_zero_point"] = _stored_zero(layer.zero, layer.bits)
            continue
        groups = read_panels(layer.packed, rows, layer.in_features, layer.bits)
        tensors[f"{name}.weight_packed"] = pack_words(groups.codes, layer.bits)
        tensors[f"{name}.weight_scale"] = groups.scale
        if groups.minimum is not None and not torch.equal(groups.minimum, -8 * groups.scale):
            zero = zero_points(groups.scale, groups.minimum)
            if zero is None:
                tensors[f"{name}.weight_minimum"] = groups.minimum
                reasons[
                    "it knows no minimum of a group that is not a whole number of its steps (symmetric = true has none)"
                ] = None
            else:
                tensors[f"{name}.weight_zero_point"] = _stored_zero(zero, layer.bits)
        if layer.gain is not None:
            tensors[f"{name}.weight_gain"] = layer.gain
            reasons["it knows no second scale of an output (some weights here are beyond float16)"] = None
    return tensors, rotation, reasons


def _stored_zero(zero: Tensor, bits: int) -> Tensor:
    """Zero points uint8 (out, groups) as the format has them: words of codes along the outputs."""
    return pack_words(zero.T.contiguous(), bits).T.contiguous()


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype` where that loses nothing, else as they are."""
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.to(values.dtype), values) else values


def _compare(folder: Path, model: nn.Module) -> None:
    """Raise AssayError unless the folder, read again, gives the model's own tensors."""
    again = read(folder, config_of(folder))
    wanted, found = dict(_tensors(model)), dict(_tensors(again))
    differ = [name for name in wanted if name not in found or not _same(wanted[name], found[name])]
    if differ or set(found) - set(wanted):
        first = (differ + sorted(set(found) - set(wanted)))[0]
        raise AssayError(
            f"the packed weights were not written: {first} reads otherwise than it was (this is a bug in assay)"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# Reading ---------------------------------------------------------------------------------------------------------------------


class Tensors:
    """The tensors of safetensors files, whose headers are checked before anything is read. Raises InputError for a damaged file."""

    def __init__(self, files: Sequence[Path]) -> None:
        from assay.workloads.files import safetensors_shapes

        self.places: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}  # file, type, shape, first byte
        self.unread: set[str] = set()
        self._open: dict[Path, Any] = {}
        for path in files:
            safetensors_shapes(path)
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin = 8 + length + entry["data_offsets"][0]
                    self.places[name] = path, entry["dtype"], tuple(entry["shape"]), begin
        self.unread = set(self.places)
        self.folder = files[0].parent

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def check(self, name: str, types: Sequence[str], shape: Sequence[int]) -> None:
        """Raise InputError unless there is such a tensor, of one of these types and of this shape."""
        wanted = f"{' or '.join(types)} of shape {tuple(shape)}"
        if name not in self.places:
            raise InputError(f"{self.folder}: lacks the tensor {name[:120]}, which must be {wanted}")
        _, kind, found, _ = self.places[name]
        if kind not in types or found != tuple(shape):
            raise InputError(f"{self.folder}: tensor {name[:120]} must be {wanted}, got {kind} of shape {found}")
        self.unread.discard(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some rows of a tensor, in memory of their own."""
        path, kind, shape, begin = self.places[name]
        dtype = DTYPES[kind]
        size = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        values = np.fromfile(path, np.uint8, (last - first) * size, offset=begin + first * size)
        return torch.from_numpy(values).view(dtype).view(last - first, *shape[1:])

    def whole(self, name: str) -> Tensor:
        """All of a tensor, as pages of the file."""
        from safetensors import safe_open

        path = self.places[name][0]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        values: Tensor = self._open[path].get_tensor(name)
        return values

    def finite(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Some rows of a tensor of scales. Raises InputError for NaN and infinity in them."""
        values = self.rows(name, first, self.places[name][2][0] if last is None else last)
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{self.folder}: tensor {name[:120]} must be finite, got NaN or infinity in it")
        return values


def is_packed(folder: Path) -> bool:
    """Whether a model folder holds packed weights that `load` reads: assay's own, or a compressed-tensors checkpoint."""
    if (folder / PACKED).is_file():
        return True
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return bool(settings["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def load_source(source: str | Path, *, allow_download: bool = False) -> Any:
    """`load_model` in the stored dtype, or `load` where the folder holds packed weights: what every command loads a model by."""
    from assay.methods.core.models.own import register_own
    from assay.workloads.models import find_model, load_model

    found = find_model(source, allow_download)
    register_own(found)
    if found.is_dir() and is_packed(found):
        return load(found, str(source))
    return load_model(source, dtype="auto", allow_download=allow_download)


def load(folder: Path, source: str) -> Any:
    """The model of a packed folder with its tokenizer, as a LoadedModel.

    The folder is untrusted. Raises InputError, naming the file or tensor and what was expected, for anything that does not fit.
    """
    from assay.workloads.models import LoadedModel, _library_errors, _quiet_transformers, _require_vocabulary

    with _library_errors(f"{folder}: cannot be loaded"), _quiet_transformers():
        from transformers import AutoTokenizer, GenerationConfig

        config = config_of(folder)
        model: Any = read(folder, config)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        if not any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        ):
            raise InputError(f"{folder}: no tokenizer; expected tokenizer.json or tokenizer.model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _require_vocabulary(model, tokenizer, folder)
    return LoadedModel(model, tokenizer, source, folder, model.dtype)


def config_of(folder: Path) -> Any:
    """The checked configuration of a packed folder, without what it says of quantisation."""
    from transformers import AutoConfig

    from assay.workloads.files import check_config
    from assay.workloads.models import require_causal

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so this is not a model folder")
    check_config(folder)
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    require_causal(config, str(folder))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None
    return config


def contents_of(folder: Path) -> Contents:
    """What packed.json says. Raises InputError for one that assay did not write."""
    from assay.workloads.files import read_json

    path = folder / PACKED
    document = read_json(path)
    if document.get("format") != FORMAT or set(document) != {"format", *Contents.__dataclass_fields__}:
        raise InputError(f"{path}: must have the format {FORMAT} of this assay; tune or export the model again")
    try:
        fused, rotation = document["fused"], document["rotation"]
        steps = checks.whole("steps", document["steps"], low=0, high=100)
        opened = checks.flag("opened", document["opened"])
        if not isinstance(document["why"], str) or not isinstance(rotation, dict) or not isinstance(fused, list):
            raise TypeError("why must be text, rotation a table and fused a list")
        if not all(isinstance(name, str) for name in fused):
            raise TypeError("fused must be a list of names")
        return Contents(steps, document["why"], opened, tuple(fused), {k: power_of_two(v) for k, v in rotation.items()})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def read(folder: Path, config: Any) -> nn.Module:
    """The model of a packed folder, whose config is `config`. No dense weight of a packed layer is made."""
    from assay.workloads.files import Stored, check_safetensors, read_json, weight_files
    from assay.workloads.models import _attention, _empty_model

    own = (folder / PACKED).is_file()
    contents = contents_of(folder) if own else Contents()
    if not contents.why:
        schemes = read_schemes(folder, read_json(folder / "config.json").get("quantization_config"))
        files = [folder / name for name in weight_files(folder)]
    elif (folder / OWN).is_file():
        schemes, files = None, [folder / OWN]
    else:
        raise InputError(f"{folder}: no weights; expected {OWN}")
    tensors = Tensors(files)
    counted = [check_safetensors(path) for path in files]
    stored = Stored(sum(one.tensors for one in counted), 8 * sum(one.elements for one in counted), 0)
    kind = type(_empty_model(config, stored, str(folder)))
    shell = _shell(config, attn_implementation=_attention(kind, None))
    known = linears(open_(shell) if contents.opened else shell)
    dtypes = {name: linear.weight.dtype for name, linear in known.items()}
    packed = {name: linear for name, linear in known.items() if f"{name}.weight_scale" in tensors}
    if not packed:
        raise InputError(f"{folder}: must hold packed linear layers (a weight_scale each); the model has none of them")
    for name in contents.rotation:
        if name not in packed:
            raise InputError(f"{folder / PACKED}: rotation names {name[:120]!r}, which is no packed layer")
    wide = {name: linear for name, linear in packed.items() if f"{name}.weight_packed" not in tensors}
    fusable = fusable_blocks(shell, wide)
    if missing := [name for name in contents.fused if name not in fusable]:
        raise InputError(f"{folder / PACKED}: fused names {missing[0][:120]!r}, which is no block of W8A8 layers")
    for name in contents.fused if own else fusable:
        fuse_block(fusable[name], {}, 1)
    joined = {part for one in held(shell) for part, _, _ in one.parts}
    for name, linear in packed.items():
        if name not in joined:
            put(shell, name, _empty_int8(linear) if name in wide else _groups(tensors, name, linear, schemes))
    if contents.opened:
        settle(shell)
    for one in held(shell):
        if isinstance(one.layer, Int8Linear):
            _fill_int8(tensors, one, known, contents.rotation)
        one.layer.dtype = dtypes[one.parts[0][0]]
    if schemes is not None:
        schemes.require(tensors.places, packed)
    _fill_rest(tensors, shell, cast=not own)
    untie(shell)
    refuse_saving(shell)
    return shell.eval()


def _shell(config: Any, **options: Any) -> Any:
    """The model of a configuration, without memory."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False, **options)


def _is_to_open(shell: nn.Module) -> bool:
    transposed = linear_kinds()[1]
    return bool(fused_experts(shell)) or any(type(module) is transposed for module in shell.modules())


def _empty_int8(linear: nn.Linear) -> Int8Linear:
    return Int8Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _fill_int8(tensors: Tensors, one: Held, known: Mapping[str, nn.Linear], rotation: Mapping[str, int]) -> None:
    layer: Any = one.layer
    rows, width = layer.out_features, layer.in_features
    scale, bias = torch.zeros(layer.scale.shape), None if layer.bias is None else torch.zeros(layer.scale.shape)
    turned = {rotation.get(name, 1) for name, _, _ in one.parts}
    if len(turned) > 1 or width % (turn := turned.pop()):
        raise InputError(
            f"{tensors.folder / PACKED}: the rotation of {one.path} must divide its {width} inputs, one for all it joins"
        )
    layer.rotation = turn
    for name, first, count in one.parts:
        tensors.check(f"{name}.weight", ["I8"], (count, width))
        tensors.check(f"{name}.weight_scale", FLOATS, (count, 1))
        scale[first : first + count] = tensors.finite(f"{name}.weight_scale").flatten().float()
        if known[name].bias is not None:
            tensors.check(f"{name}.bias", FLOATS, (count,))
            assert bias is not None
            bias[first : first + count] = tensors.finite(f"{name}.bias").float()

    def codes(first: int, last: int) -> Tensor:
        pieces, reached = [], first
        for name, start, count in one.parts:
            low, high = max(first, start), min(last, start + count)
            if low < high:
                pieces += [
                    torch.zeros(low - reached, width, dtype=torch.int8),
                    tensors.rows(f"{name}.weight", low - start, high - start),
                ]
                reached = high
        return torch.cat([*pieces, torch.zeros(last - reached, width, dtype=torch.int8)])

    layer.packed, layer.offset = wide_panels(codes, rows, width)
    layer.scale, layer.bias = scale, bias
    multiplier = f"{one.norm}.weight" if one.norm is not None else f"{one.parts[0][0]}.input_multiplier"
    if one.norm is not None or multiplier in tensors:
        tensors.check(multiplier, FLOATS, (width,))
        layer.multiplier = tensors.finite(multiplier).float()
    else:
        layer.multiplier = torch.ones(width)


def _groups(
    tensors: Tensors, name: str, linear: nn.Linear, schemes: Schemes | None
) -> WeightOnlyLinear | GroupedLinear:
    """The layer of weights in groups: panels of the kernels where these hold the numbers to the last bit, else a `GroupedLinear`."""
    rows, width = linear.out_features, linear.in_features
    packed, scale, minimum, zero, gain, shape = (
        f"{name}.weight_{part}" for part in ("packed", "scale", "minimum", "zero_point", "gain", "shape")
    )
    allowed = (4, 8) if schemes is None else sorted(schemes.bits)
    found = tensors.places[packed][2]
    bits = next((bits for bits in allowed if found == (rows, -(-width * bits // 32))), None)
    if bits is None:
        raise InputError(
            f"{tensors.folder}: tensor {packed[:120]} must hold {rows} x {width} codes of {' or '.join(map(str, allowed)) or 'no'} bits "
            f"in int32, got the shape {found}"
        )
    tensors.check(packed, ["I32"], found)
    tensors.check(shape, ["I64", "I32"], (2,))
    if tensors.rows(shape, 0, 2).tolist() != [rows, width]:
        raise InputError(f"{tensors.folder}: tensor {shape[:120]} must be {[rows, width]}")
    groups = (tensors.places[scale][2] or (0,))[-1]
    if not groups or width % groups:
        raise InputError(
            f"{tensors.folder}: tensor {scale[:120]} must hold groups that divide {width} inputs, got {tensors.places[scale][2]}"
        )
    tensors.check(scale, FLOATS, (rows, groups))
    scales = tensors.finite(scale)
    zeros: Tensor | None = None
    fits: Tensor | None
    lows: Tensor | None
    layer: WeightOnlyLinear | GroupedLinear
    if zero in tensors:
        tensors.check(zero, ["I32"], (-(-rows * bits // 32), groups))
        zeros = unpack_words(tensors.rows(zero, 0, -(-rows * bits // 32)).T, bits, rows).T.contiguous()
    if minimum in tensors:  # assay's own
        tensors.check(scale, ["F16"], (rows, width // GROUP))
        tensors.check(minimum, ["F16"], (rows, width // GROUP))
        fits, lows = scales, tensors.finite(minimum)
    else:
        fits, lows = _as_panels(scales, zeros, width, bits)
    if fits is None:
        layer = GroupedLinear(tensors.whole(packed), scales, zeros, width, bits)
    else:
        panels, low = fits, lows

        def read_rows(first: int, last: int) -> Groups:
            codes = unpack_words(tensors.rows(packed, first, last), bits, width)
            return Groups(codes, panels[first:last], None if low is None else low[first:last])

        layer = WeightOnlyLinear.from_packed(group_panels(read_rows, rows, width, bits), width, rows, bits)
        if gain in tensors:
            tensors.check(gain, ["F32"], (rows,))
            layer.gain = tensors.finite(gain)
    if linear.bias is not None:
        tensors.check(f"{name}.bias", FLOATS, (rows,))
        layer.bias = nn.Parameter(tensors.finite(f"{name}.bias").to(linear.bias.dtype))
    return layer


def _as_panels(scale: Tensor, zero: Tensor | None, width: int, bits: int) -> tuple[Tensor | None, Tensor | None]:
    """Float16 scale and minimum of each 32 inputs that stand for the same numbers to the last bit; (None, None) if there are none."""
    groups = scale.shape[1]
    if width // groups % GROUP or (zero is not None and bits == 8):
        return None, None
    half = scale.half()
    if not torch.equal(half.double(), scale.double()):
        return None, None
    half, again = half.repeat_interleave(width // groups // GROUP, 1), width // groups // GROUP
    if bits == 8:
        return half, None
    exact = (-8.0 if zero is None else -zero.double()) * scale.double()
    low = exact.half()
    return (half, low.repeat_interleave(again, 1)) if torch.equal(low.double(), exact) else (None, None)


def _fill_rest(tensors: Tensors, shell: Any, cast: bool) -> None:
    """The tensors that are as they would be in an ordinary model, and the buffers that a model computes for itself."""
    inside = {one.path for one in held(shell)}
    for name, empty in shell.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        if path in inside or name not in tensors:
            continue
        kinds = list(DTYPES) if not empty.dtype.is_floating_point else ["F64", *FLOATS]
        tensors.check(name, kinds, empty.shape)
        values = tensors.whole(name)
        values = values.to(empty.dtype) if cast else values
        module = shell.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(values, requires_grad=values.is_floating_point())
        else:
            module._buffers[leaf] = values
    for one in held(shell):
        one.layer._is_hf_initialized = True  # type: ignore[assignment]
    shell.tie_weights()
    for name, tensor in shell.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise InputError(f"{tensors.folder}: lacks the tensor {name}, which must be of shape {tuple(tensor.shape)}")
        tensor._is_hf_initialized = True
    for name, buffer in list(shell.named_buffers()):
        if buffer.is_meta:  # not stored: computed, as when transformers loads a model
            path, _, leaf = name.rpartition(".")
            shell.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    shell.initialize_weights()
    if lost := sorted(name for name in tensors.unread if not name.endswith("rotary_emb.inv_freq")):
        raise InputError(f"{tensors.folder}: tensor {lost[0][:120]} has no place in a {type(shell).__name__}")
