"""LoRA adapters: as PEFT saves them in a folder, and beside a linear layer.

A folder has `adapter_config.json` and `adapter_model.safetensors`; both are read as untrusted files, without PEFT. What changes the
function and is not understood is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.errors import InputError
from assay.paths import atomic_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_CONFIG = 1 << 20  # bytes
MOST_RANK = 4096
_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight$")
# settings that say how an adapter was trained or where it came from, or that the file's own tensors tell
_TOLD_ELSEWHERE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_UNDERSTOOD = {"alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "use_rslora"}
_PLAIN_BEGINNINGS = ("gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights`, beside true and false, that leave the base model's weights as they were."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What an adapter adds to a linear layer: `scale` * `up` @ `down` @ x, with `down` (rank, in) and `up` (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float

    def __post_init__(self) -> None:
        checks.tensor("down", self.down, ndim=2, dtype="floating")
        checks.tensor("up", self.up, shape=("out", self.down.shape[0]), dtype="floating")
        checks.number("scale", self.scale)

    def delta(self) -> Tensor:
        """The matrix (out, in) they stand for, float32."""
        return self.up.float() @ self.down.float() * self.scale


Adapter = Mapping[str, Factors]
"""Factors by the name of the linear layer that they change."""


def read_adapter(folder: Path | str) -> dict[str, Factors]:
    """The adapter in a folder, as PEFT saves LoRA: scale alpha / r, or alpha / sqrt(r) with `use_rslora`.

    Factors are the way round of `nn.Linear`, also those of a layer that stores its weight the other way round (GPT-2's Conv1D, which
    `fan_in_fan_out` is about). Raises InputError, naming the file, for what is not there, damaged or pickled, for NaN and infinity, for
    a layer whose factors are there twice, and for every setting that changes the function and is not one of `r`, `lora_alpha`,
    `rank_pattern`, `alpha_pattern` (of plain names) and `use_rslora`.
    """
    from safetensors import SafetensorError, safe_open

    where = Path(folder).expanduser()
    config = _config(where)
    path = where / WEIGHTS
    if not path.is_file():
        pickled = (where / "adapter_model.bin").exists()
        why = "its weights are pickled, which can run code when read; save it with safetensors"
        raise InputError(f"{where}: {why if pickled else f'no {WEIGHTS}'}")
    try:
        with safe_open(path, framework="pt") as file:
            pairs = _pairs(path, list(file.keys()))
            made = {}
            for layer, pair in pairs.items():
                factors = {letter: file.get_tensor(name) for letter, name in pair.items()}
                made[layer] = _factors(path, config, layer, factors)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read, truncated or damaged ({error})") from None
    return made


def _pairs(path: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The names of both factors by the layer they change."""
    pairs: dict[str, dict[str, str]] = {}
    for name in names:
        found = _FACTOR.match(name)
        if found is None:
            raise InputError(f"{path}: tensor {name[:120]!r} is no factor of a linear layer (lora_A, lora_B)")
        pair = pairs.setdefault(found["layer"].removeprefix(PREFIX), {})
        if pair.setdefault(found["factor"], name) != name:
            raise InputError(f"{path}: {name[:120]!r} is there twice, with {PREFIX!r} and without")
    if not pairs:
        raise InputError(f"{path}: holds no factors")
    for layer, pair in pairs.items():
        if len(pair) < 2:
            raise InputError(f"{path}: of {layer[:120]!r} only lora_{next(iter(pair))} is there")
    return pairs


def _factors(path: Path, config: Mapping[str, Any], layer: str, pair: Mapping[str, Tensor]) -> Factors:
    for letter, tensor in pair.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: lora_{letter} of {layer[:120]!r} holds NaN or infinity")
    rank = pair["A"].shape[0] if pair["A"].ndim else 0
    if not 1 <= rank <= MOST_RANK:
        raise InputError(f"{path}: {layer[:120]!r} has rank {rank}; allowed is 1 to {MOST_RANK}")
    try:
        return Factors(pair["A"], pair["B"], _scale(config, layer, rank))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {layer[:120]!r}: {error}") from None


def write_adapter(folder: Path | str, adapter: Adapter, *, base: str = "") -> None:
    """Save an adapter as PEFT does, so that PEFT and `assay serve --adapter` read it. Its layers have one rank and one scale.

    Raises ValueError where they have not, and for an adapter without layers.
    """
    from safetensors.torch import save_file

    where = Path(folder)
    kinds = {(factors.down.shape[0], factors.scale) for factors in adapter.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"adapter must have one rank and one scale in all its layers, got {len(kinds)} kinds of layers"
        )
    ((rank, scale),) = kinds
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": scale * rank,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "inference_mode": True, "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": sorted({name.rpartition(".")[2] for name in adapter}),
    }  # fmt: skip
    tensors = {}
    for name, factors in adapter.items():
        for letter, tensor in (("A", factors.down), ("B", factors.up)):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = tensor.detach().contiguous()
    where.mkdir(parents=True, exist_ok=True)
    with atomic_file(where / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    with atomic_file(where / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1))


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's settings. Raises InputError unless all that change the function are understood."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: no {CONFIG}, so this is no adapter")
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise InputError(f"{path} is larger than {LARGEST_CONFIG} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({str(error)[:200]})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: must be an object with peft_type 'LORA', got {checks.shown(config)}")
    beginning = config.get("init_lora_weights")
    if not (beginning is None or isinstance(beginning, bool) or str(beginning).lower() in _PLAIN_BEGINNINGS):
        raise InputError(
            f"{path}: init_lora_weights {checks.shown(beginning)} may have changed the base model too; convert it to plain LoRA"
        )
    for name, value in config.items():
        if name not in _TOLD_ELSEWHERE | _UNDERSTOOD and value not in (None, False, [], {}, "none"):
            raise InputError(f"{path}: {checks.shown(name)} is not supported here, got {checks.shown(value)}")
    try:
        checks.choice("bias", config.get("bias", "none"), ("none",))
        checks.flag("use_rslora", config.get("use_rslora") or False)
        checks.number("lora_alpha", config.get("lora_alpha"), low=-1e6, high=1e6)
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
            raise ValueError(f"alpha_pattern must be an object of plain names of layers, got {checks.shown(patterns)}")
        for name, alpha in patterns.items():
            checks.number(f"alpha_pattern[{name[:80]!r}]", alpha, low=-1e6, high=1e6)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith(
            "." + pattern
        ):  # PEFT takes regular expressions; plain names mean the same in both
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, in PEFT's order: layer(x) + up(down(x)) * scale. The factors can be trained."""

    def __init__(self, layer: nn.Linear, factors: Factors) -> None:
        super().__init__()
        self.layer, self.scale = layer, factors.scale
        self.down, self.up = nn.Parameter(factors.down), nn.Parameter(factors.up)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + F.linear(F.linear(x, self.down), self.up) * self.scale

    @property
    def weight(self) -> Tensor:
        """The layer's own, without the adapter."""
        return self.layer.weight


def attach(model: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, seed: int = 0) -> dict[str, LowRank]:
    """Put a new adapter beside every `nn.Linear` of the model whose last name is in `targets`, for training; the layers by name.

    All else is frozen. `down` is drawn as PEFT's is (uniform, Kaiming's bound with a = sqrt(5)), `up` is zero, so that nothing changes at
    first. Raises ValueError where no layer has such a name.
    """
    rank = checks.whole("rank", rank, low=1, high=MOST_RANK)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, low=0))
    model.requires_grad_(False)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    if not found:
        raise ValueError(f"targets must name linear layers of the model, got {list(targets)}")
    made = {}
    for name, layer in found.items():
        bound = layer.in_features**-0.5
        down = (2 * torch.rand(rank, layer.in_features, generator=generator) - 1) * bound
        factors = Factors(down.to(layer.weight.dtype), layer.weight.new_zeros(layer.out_features, rank), alpha / rank)
        made[name] = LowRank(layer, factors)
        put(model, name, made[name])
    return made


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
