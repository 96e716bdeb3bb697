"""MatMul-free language models: the bytes of a packed model compared with the same model in bf16, and what training must keep in memory.

Models are trained here on bytes of real Python sources: a ternary one, the same model with float weights, and a transformer of the
same width, for the same steps and tokens. The packed model is written to disk, read back, judged and used for generation.
"""

from __future__ import annotations

import copy
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Figure, Quality, experiment
from assay.experiments.mixers.training import evaluate, train
from assay.measure.clock import compare_many
from assay.measure.machine import calibrate
from assay.measure.memory import peak_memory_of_child
from assay.measure.stats import bootstrap
from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.layers.packed import Kind, PackedLinear, resident_bytes
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM
from assay.methods.mixers.matmul_free import (
    MatmulFreeConfig,
    MatmulFreeForCausalLM,
    load_packed,
    operations,
    pack_,
    save_packed,
)
from assay.workloads.sequences import byte_batches, byte_windows

LOG_2 = 0.6931471805599453
RATES = {"ternary": 4e-3, "float": 2e-3, "transformer": 2e-3}  # ternary weights want the larger one


def language_model(arm: str, width: int, layers: int, vocab: int = 256) -> MixerForCausalLM:
    torch.manual_seed(0)
    if arm == "transformer":
        mixers: list[Any] = [["attention", {"heads": width // 64}]] * layers
        plain = MixerConfig(vocab_size=vocab, hidden_size=width, layers=mixers, tie_word_embeddings=False)
        return MixerForCausalLM(plain).eval()
    config = MatmulFreeConfig(vocab_size=vocab, hidden_size=width, num_layers=layers, quantized=arm == "ternary")
    return MatmulFreeForCausalLM(config).eval()


def generate_from_disk(path: str, packed: bool, tokens: int) -> None:
    """Load a model and generate from it: run in a process of its own to see its peak memory."""
    model: Any = (
        load_packed(path) if packed else MatmulFreeForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    )
    model.generate(torch.zeros(1, 8, dtype=torch.int64), max_new_tokens=tokens, do_sample=False)


def peak_of_generation(path: Path, *, packed: bool) -> int:
    """Bytes of memory a fresh process takes for loading the model and generating, beyond its imports."""
    found = peak_memory_of_child(
        "assay.experiments.mixers.matmul_free:generate_from_disk",
        {"path": str(path), "packed": packed, "tokens": 8},
        timeout_s=600,
    )
    return found.peak_bytes - found.start_bytes


def matvec(size: int, copies: int) -> dict[str, dict[str, float]]:
    """One input vector through `copies` matrices of size x size: seconds, bytes of weights, share of the memory bandwidth."""
    torch.manual_seed(0)
    x = torch.randn(1, size)
    codes = torch.randint(-1, 2, (size, size), dtype=torch.int8)
    weight = codes.float() * 0.02
    kinds: tuple[Kind, ...] = ("ternary", "base3")
    packed = {
        kind: [copy.deepcopy(PackedLinear.from_codes(codes, torch.tensor(0.02), kind)) for _ in range(copies)]
        for kind in kinds
    }
    linear = torch.nn.Linear(size, size, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    int4 = WeightOnlyLinear.from_linear(linear, 4)
    fours = [copy.deepcopy(int4) for _ in range(copies)]
    floats = {dtype: [weight.to(dtype, copy=True) for _ in range(copies)] for dtype in (torch.float32, torch.bfloat16)}

    def dense(dtype: torch.dtype) -> None:
        vector = x.to(dtype)
        for matrix in floats[dtype]:
            F.linear(vector, matrix)

    def through(layers: list[Any]) -> None:
        for layer in layers:
            layer(x)

    with torch.no_grad():
        found = compare_many(
            {
                "fp32": lambda: dense(torch.float32),
                "bf16": lambda: dense(torch.bfloat16),
                "int4": lambda: through(fours),
                "ternary": lambda: through(packed["ternary"]),
                "base3": lambda: through(packed["base3"]),
            },
            rounds=10,
        ).seconds
    held: dict[str, int] = {
        "fp32": 4 * size * size,
        "bf16": 2 * size * size,
        "int4": resident_bytes(int4),
        "ternary": resident_bytes(packed["ternary"][0]),
        "base3": resident_bytes(packed["base3"][0]),
    }
    bandwidth = calibrate(quick=True).read_bandwidth
    rows = {}
    for name, seconds in found.items():
        median = float(torch.tensor(seconds, dtype=torch.float64).median())
        moved = copies * held[name]
        rows[name] = {"seconds": median, "bytes": moved, "bandwidth_share": moved / median / bandwidth}
    return rows


@experiment(
    "matmul_free/inference-memory",
    points={
        "smoke": [
            {"width": 64, "layers": 2, "vocab": 256, "steps": 5, "arms": ["float"], "kind": "ternary", "peak": False}
        ],
        "small": [
            # the width and depth of the paper's smallest model; bytes do not depend on training
            {"width": 1024, "layers": 24, "vocab": 32000, "steps": 0, "arms": [], "kind": "ternary"},
            {
                "width": 256,
                "layers": 6,
                "vocab": 256,
                "steps": 150,
                "arms": ["float", "transformer"],
                "kind": "ternary",
            },
            {"width": 256, "layers": 6, "vocab": 256, "steps": 150, "arms": ["float"], "kind": "base3"},
        ],
        "full": [
            {"width": 2048, "layers": 24, "vocab": 32000, "steps": 0, "arms": [], "kind": "base3"},
            {
                "width": 512,
                "layers": 8,
                "vocab": 256,
                "steps": 20000,
                "arms": ["float", "transformer"],
                "kind": "base3",
            },
        ],
    },
    minutes=30,
)
def inference_memory(
    width: int, layers: int, vocab: int, steps: int, arms: list[str], kind: Kind, peak: bool = True
) -> Figure:
    """Resident bytes of the model in bf16 over those of the packed one (its embedding in bf16 too), states included."""
    model: Any = language_model("ternary", width, layers, vocab)
    details: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    quality = None
    if steps:
        train(model, byte_batches(256, 8), steps=steps, lr=RATES["ternary"])
        details["share_of_zeros"] = float(
            torch.tensor([m.share_of_zeros() for m in model.modules() if hasattr(m, "share_of_zeros")]).mean()
        )
    in_fp32 = resident_bytes(model) + model.state_bytes(1)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        plain, packed_file = Path(folder) / "plain", Path(folder) / "packed.safetensors"
        prompt = byte_windows(64, 1)[0] if vocab == 256 else torch.arange(64)[None]
        answer = model.generate(prompt, max_new_tokens=32, do_sample=False)[0, 64:] if steps else None
        trained = copy.deepcopy(model)
        model.to(torch.bfloat16).save_pretrained(plain)
        in_bf16 = resident_bytes(model) + model.state_bytes(1)
        model = pack_(trained, kind).to(torch.bfloat16)
        save_packed(model, packed_file)
        packed: Any = load_packed(packed_file)
        in_packed = resident_bytes(packed) + packed.state_bytes(1)
        details |= {
            "resident_bytes": {"fp32": in_fp32, "bf16": in_bf16, kind: in_packed},
            "file_bytes": packed_file.stat().st_size,
            "times_smaller_than_fp32": in_fp32 / in_packed,
        }
        if peak:
            details["peak_bytes_generating"] = {
                "bf16": peak_of_generation(plain, packed=False),
                kind: peak_of_generation(packed_file, packed=True),
            }
        if steps:
            quality = judged(packed, arms, width, layers, steps, details)
            details["generated"] = text(packed.generate(prompt, max_new_tokens=32, do_sample=False)[0, 64:])
            details["generated_before_packing"] = text(answer)
    details["matvec"] = matvec(4096, 6) if steps > 50 or not steps else matvec(256, 2)
    energy = operations(packed)
    details["modelled_linear_energy_pj_per_token"] = {"ternary": energy.energy_pj, "fp16": energy.float_energy_pj}
    value = in_bf16 / in_packed
    return Figure(value, "x", low=value, high=value, baseline=1.0, quality=quality, details=details)


def judged(packed: Any, arms: list[str], width: int, layers: int, steps: int, details: dict[str, Any]) -> Quality:
    """Bits per byte of the packed model on held-out sources, compared with float models trained for as long."""
    inputs, targets = byte_windows(256, 64)
    bits = {"packed": evaluate(packed, inputs, targets)["nll"] / LOG_2}
    for arm in arms:
        rival = language_model(arm, width, layers)
        train(rival, byte_batches(256, 8), steps=steps, lr=RATES[arm])
        bits[arm] = evaluate(rival, inputs, targets)["nll"] / LOG_2
    details["bits_per_byte"] = {name: float(found.mean()) for name, found in bits.items()}
    found = bootstrap(bits["packed"].numpy(), lambda x, axis: x.mean(axis=axis))
    base = details["bits_per_byte"]["float"]
    return Quality("bits per byte", found.median, base, found.low, found.high, higher_is_better=False)


def text(ids: Tensor | None) -> str:
    return "" if ids is None else bytes(ids.tolist()).decode(errors="replace")


class _Kept:
    """A tensor the backward pass will need; alive as long as the graph holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def remembered_bytes(model: MixerForCausalLM, ids: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Bytes the graph holds after one forward pass, parameters apart, and the gradients of all parameters."""
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = model(ids, labels=ids).loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    held = sum(size for pointer, size in storages.items() if pointer not in own)
    loss.backward()
    return held, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@experiment(
    "matmul_free/training-memory",
    points={
        "smoke": [{"width": 64, "layers": 2, "batch": 2, "length": 64}],
        "small": [{"width": 256, "layers": 6, "batch": batch, "length": 256} for batch in (1, 8)],
        "full": [{"width": 1024, "layers": 24, "batch": 8, "length": 1024}],
    },
)
def training_memory(width: int, layers: int, batch: int, length: int) -> Figure:
    """Per cent of a training step's memory (weights, gradients, Adam's moments, what the graph holds) that the fused layer saves."""
    ids = byte_windows(length, batch)[0]
    held, gradients = {}, {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = MatmulFreeForCausalLM(MatmulFreeConfig(hidden_size=width, num_layers=layers, fused=fused)).train()
        held[fused], gradients[fused] = remembered_bytes(model, ids)
    fixed = 4 * resident_bytes(model)
    value = 100 * (1 - (fixed + held[True]) / (fixed + held[False]))
    worst = max(
        float((gradients[True][name] - plain).norm() / plain.norm().clamp_min(1e-12))
        for name, plain in gradients[False].items()
    )
    return Figure(
        value,
        "%",
        low=value,
        high=value,
        baseline=0.0,
        details={
            "weights_gradients_moments_bytes": fixed,
            "graph_bytes": {"chain": held[False], "fused": held[True]},
            "graph_saved_percent": 100 * (1 - held[True] / held[False]),
            "largest_relative_difference_of_a_gradient": worst,
        },
    )
