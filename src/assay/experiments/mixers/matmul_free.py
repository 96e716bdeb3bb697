"""MatMul-free language models: the memory of processes that train them and that generate from them packed.

Memory is measured, not added up: the peak resident memory of fresh processes beyond their imports. Bytes that follow from sizes are
in the details. The weights are those a model starts with: bytes do not depend on training, and packing loses the same on any weights.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.experiments.core import Figure, Guard, Operator, Quality, experiment
from assay.experiments.mixers.training import over_seeds, parameter_groups
from assay.measure.clock import compare_many
from assay.measure.machine import calibrate
from assay.measure.memory import peak_memory_of_child
from assay.methods.builtin.weight_only import WeightOnlyLinear
from assay.methods.core.layers.packed import Kind, PackedLinear, resident_bytes
from assay.methods.core.layers.surgery import find, swap
from assay.methods.mixers.matmul_free import (
    NORM_EPS,
    BitLinear,
    MatmulFreeConfig,
    MatmulFreeForCausalLM,
    load_packed,
    operations,
    pack_,
    save_packed,
    ternary_codes,
    token_codes,
)
from assay.workloads.sequences import byte_windows

# ---- generating ------------------------------------------------------------------------------------------------------------------

GENERATING = Operator(
    "generation from a ternary model's file",
    free="the ternary codes as 8-bit integers, widened to floats one layer at a time (ten lines of torch)",
)
Stored = Literal["bf16", "int8", "ternary", "base3"]
STORED: tuple[Stored, ...] = ("bf16", "int8", "ternary", "base3")


class Widened(nn.Module):
    """What anybody would write: a ternary layer whose codes are 8-bit integers, which become floats when they are used."""

    codes: Tensor
    scale: Tensor
    norm: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("norm", torch.ones(in_features))

    @classmethod
    def of(cls, layer: BitLinear) -> Widened:
        made = cls(layer.in_features, layer.out_features)
        codes, made.scale = ternary_codes(layer.weight.detach())
        made.codes, made.norm = codes.to(torch.int8), layer.norm.weight.detach().float()
        return made

    def forward(self, x: Tensor) -> Tensor:
        codes, step = token_codes(F.rms_norm(x.float(), self.norm.shape, self.norm, NORM_EPS))
        return (F.linear(codes, self.codes.float()) * (step * self.scale)).to(x.dtype)


def save_widened(model: MatmulFreeForCausalLM, path: Path) -> None:
    """The model with its embedding in bfloat16 and its layers as `Widened`."""
    from safetensors.torch import save_file

    made = copy.deepcopy(model)
    swap(made, {name: Widened.of(layer) for name, layer in find(made, [BitLinear]).items()})  # type: ignore[arg-type]
    tensors = {
        n: t.to(torch.bfloat16) if n.startswith("embed_tokens") else t.contiguous()
        for n, t in made.state_dict().items()
    }
    save_file(tensors, path, metadata={"config": json.dumps(model.config.to_diff_dict())})


def load_widened(path: Path) -> MatmulFreeForCausalLM:
    """The model that `save_widened` stored."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        config = MatmulFreeConfig.from_dict(json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    with torch.device("meta"):
        model = MatmulFreeForCausalLM(config)
        layers: dict[str, Any] = dict(find(model, [BitLinear]))
        swap(model, {name: Widened(layer.in_features, layer.out_features) for name, layer in layers.items()})
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def store(model: MatmulFreeForCausalLM, kind: Stored, folder: Path) -> Path:
    """The model as `kind` in a file or folder of its own, the embedding in bfloat16."""
    path = folder / kind
    if kind == "bf16":
        copy.deepcopy(model).bfloat16().save_pretrained(path)
    elif kind == "int8":
        save_widened(model, path)
    else:
        save_packed(pack_(copy.deepcopy(model), kind).to(torch.bfloat16), path)  # type: ignore[arg-type]
    return path


def loaded(kind: Stored, path: Path) -> MatmulFreeForCausalLM:
    """The model that `store` stored."""
    if kind == "bf16":
        found: MatmulFreeForCausalLM = MatmulFreeForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        return found
    return load_widened(path) if kind == "int8" else load_packed(path)


def generate_from_disk(kind: Stored, path: str, tokens: int) -> None:
    """Load a model and generate from it: run in a process of its own to see its peak memory."""
    model: Any = loaded(kind, Path(path))
    model.generate(torch.zeros(1, 8, dtype=torch.int64), max_new_tokens=tokens, do_sample=False)


def peak_of_generation(kind: Stored, path: Path, tokens: int) -> int:
    """Bytes of memory that a fresh process takes for loading the model and generating, beyond its imports."""
    found = peak_memory_of_child(
        "assay.experiments.mixers.matmul_free:generate_from_disk",
        {"kind": kind, "path": str(path), "tokens": tokens},
        timeout_s=600,
    )
    return found.extra_bytes


def with_codes(packed: MatmulFreeForCausalLM, change: str) -> MatmulFreeForCausalLM:
    """A packed model whose codes are all 0 ("deleted"), in a random order ("random") or signs alone, one bit each ("binary")."""
    made = copy.deepcopy(packed)
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, layer in find(made, [PackedLinear]).items():
        assert isinstance(layer, PackedLinear)
        codes, kind = layer.codes(), layer.kind
        if change == "deleted":
            codes = torch.zeros_like(codes)
        elif change == "random":
            codes = codes.flatten()[torch.randperm(codes.numel(), generator=generator)].view_as(codes)
        else:
            codes, kind = torch.where(codes == 0, 1, codes), "binary"
        changed[name] = PackedLinear.from_codes(
            codes, layer.scale, kind, norm_weight=layer.norm_weight, norm_eps=layer.norm_eps
        )
    swap(made, changed)
    return made


@torch.no_grad()
def apart(model: MatmulFreeForCausalLM, ids: Tensor, exact: Tensor) -> list[float]:
    """The relative distance of the logits from `exact`, prompt by prompt."""
    logits = model(ids).logits.float()
    return [float((y - z).norm() / z.norm()) for y, z in zip(logits, exact, strict=True)]


@experiment(
    "matmul_free/inference-memory",
    points={
        "smoke": [{"width": 64, "layers": 2, "vocab": 256, "tokens": 2, "size": 256, "repeats": 2}],
        "small": [{"width": 1024, "layers": 24, "vocab": 32000, "tokens": 2, "size": 4096, "repeats": 3}],
        "full": [{"width": 2560, "layers": 32, "vocab": 32000, "tokens": 8, "size": 4096, "repeats": 3}],
    },
    operator=GENERATING,
    paper={"width": 2560, "layers": 32, "vocab": 32000, "batch": 1},
    departures={
        "width": "at scale small the paper's smallest model, 370M, which a minute can write and read",
        "layers": "at scale small those of the same model",
        "tokens": "two tokens behind a prompt of eight: the state does not grow",
    },
    guard=Guard("relative distance of the logits from the float32 model's", 0.05, relative=False),
    refuted_if="a process that generates from the packed model takes as much memory as one with the bfloat16 model, or more",
    minutes=30,
)  # fmt: skip
def inference_memory(width: int, layers: int, vocab: int, tokens: int, size: int, repeats: int) -> Figure:
    """Peak memory of a process that loads the model in bfloat16 and generates, over that of one with the model packed at 2 bits.

    `repeats` processes of either, with Student's t over their ratios. The free baseline stores the codes in a byte each; an arm packs
    them in base 3. The quality compares logits on texts with the same model in float32: the bfloat16 model is the baseline, and at most 5 %
    more may be lost (rounding a token's values to 8 bits turns small differences into steps). `size` is that of the matrices of the
    table of products in the details.
    """
    torch.manual_seed(0)
    model = MatmulFreeForCausalLM(MatmulFreeConfig(vocab_size=vocab, hidden_size=width, num_layers=layers)).eval()
    ids = byte_windows(16, 8)[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: store(model, kind, Path(folder)) for kind in STORED}
        often = {"bf16": repeats, "ternary": repeats}  # the others have no interval
        peaks = {
            kind: [peak_of_generation(kind, path, tokens) for _ in range(often.get(kind, 1))]
            for kind, path in paths.items()
        }
        with torch.no_grad():
            exact = model(ids).logits
        packed = load_packed(paths["ternary"])
        files = {kind: size_of(path) for kind, path in paths.items()}
        base = apart(loaded("bf16", paths["bf16"]), ids, exact)
    errors = over_seeds(apart(packed, ids, exact))
    controls = {name: mean(apart(with_codes(packed, name), ids, exact)) for name in ("deleted", "random")}
    controls["rival"] = mean(apart(with_codes(packed, "binary"), ids, exact))
    energy = operations(packed)
    times = {kind: mean(peaks["bf16"]) / mean(peaks[kind]) for kind in STORED}
    found = over_seeds([a / b for a, b in zip(peaks["bf16"], peaks["ternary"], strict=True)])
    return Figure(
        found.median,
        "x",
        low=found.low,
        high=found.high,
        baseline=1.0,
        free=times["int8"],
        arms={"packing in base 3": times["base3"]},
        quality=Quality(errors.median, mean(base), errors.low, errors.high, controls, "signs alone, one bit a weight"),
        details={
            "parameters": sum(p.numel() for p in model.parameters()),
            "peak_bytes": peaks,
            "file_bytes": files,
            "resident_bytes": {"bf16": resident_bytes(model) // 2, "ternary": resident_bytes(packed)},
            "state_bytes": packed.state_bytes(1),
            "products": matvec(size, 6 if size > 1024 else 2),
            "modelled_linear_energy_pj_per_token": {"ternary": energy.energy_pj, "fp16": energy.float_energy_pj},
        },
    )


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def matvec(size: int, copies: int) -> dict[str, Any]:
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
    linear = nn.Linear(size, size, bias=False)
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
        timings = compare_many(
            {
                "fp32": lambda: dense(torch.float32),
                "bf16": lambda: dense(torch.bfloat16),
                "int4": lambda: through(fours),
                "ternary": lambda: through(packed["ternary"]),
                "base3": lambda: through(packed["base3"]),
            },
            rounds=10,
        )
    held: dict[str, int] = {
        "fp32": 4 * size * size,
        "bf16": 2 * size * size,
        "int4": resident_bytes(int4),
        "ternary": resident_bytes(packed["ternary"][0]),
        "base3": resident_bytes(packed["base3"][0]),
    }
    seconds = {
        name: float(torch.tensor(found, dtype=torch.float64).median()) for name, found in timings.seconds.items()
    }
    moved = {name: copies * size for name, size in held.items()}
    shares = bandwidth_shares(seconds, moved, calibrate(quick=True).read_bandwidth)
    return {"seconds": seconds, "bytes": moved, "bandwidth_share": shares, "noisy": timings.noisy}


def bandwidth_shares(
    seconds: Mapping[str, float], moved: Mapping[str, int], bandwidth: float
) -> dict[str, float] | str:
    """Bytes over seconds as a share of the bandwidth; why there are none, where one of them exceeds it: it was measured too low.

    >>> bandwidth_shares({"a": 2.0}, {"a": 10}, 10.0)
    {'a': 0.5}
    >>> bandwidth_shares({"a": 2.0, "b": 0.5}, {"a": 10, "b": 10}, 10.0)
    'void: b moves 2 times the bandwidth that was measured'
    """
    shares = {name: moved[name] / taken / bandwidth for name, taken in seconds.items()}
    most = max(shares, key=lambda name: shares[name])
    if not shares[most] <= 1:
        return f"void: {most} moves {shares[most]:.3g} times the bandwidth that was measured"
    return shares


# ---- training --------------------------------------------------------------------------------------------------------------------

TRAINING = Operator(
    "a training step of ternary layers",
    free="the chain of operators with every block under torch.utils.checkpoint",
)
Way = Literal["chain", "fused", "blocks recomputed", "layers recomputed", "bfloat16"]
WAYS: tuple[Way, ...] = ("chain", "fused", "blocks recomputed", "layers recomputed", "bfloat16")


def ternary_model(way: Way, width: int, layers: int, seed: int = 0, *, quantized: bool = True) -> MatmulFreeForCausalLM:
    """The model whose ternary layers are the `fused` ones or chains of ordinary operators, recomputed in the backward pass or not."""
    torch.manual_seed(seed)
    config = MatmulFreeConfig(hidden_size=width, num_layers=layers, fused=way == "fused", quantized=quantized)
    model = MatmulFreeForCausalLM(config).train()
    if way == "layers recomputed":
        for layer in find(model, [BitLinear]).values():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    elif way == "blocks recomputed":
        for block in model.blocks:
            block.forward = functools.partial(recomputed, block, block.forward)
    return model


def recomputed(block: Any, forward: Any, x: Tensor, state: None, mask: Tensor | None) -> tuple[Tensor, None]:
    """A block under checkpoint. Its gates' lower bounds, which the model hands in, are kept for the second time."""

    def again(x: Tensor, room: Tensor) -> Tensor:
        block.mixer.given = room
        out: Tensor = forward(x, state, mask)[0]
        return out

    return checkpoint(again, x, block.mixer.given, use_reentrant=False), None


def loss_of(model: MatmulFreeForCausalLM, ids: Tensor, way: Way) -> Tensor:
    """The language-modelling loss, in bfloat16 where the way asks for it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
        loss: Tensor = model(ids, labels=ids).loss
    return loss


def train_one_step(way: Way, width: int, layers: int, batch: int, length: int) -> None:
    """Two steps of training with AdamW, the second with its moments: run in a process of its own to see its peak memory."""
    model = ternary_model(way, width, layers)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    ids = byte_windows(length, batch)[0]
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, ids, way).backward()
        optimizer.step()


def peak_of_training(way: Way, width: int, layers: int, batch: int, length: int) -> int:
    """Bytes of memory that a fresh process takes for two steps of training, beyond its imports."""
    found = peak_memory_of_child(
        "assay.experiments.mixers.matmul_free:train_one_step",
        {"way": way, "width": width, "layers": layers, "batch": batch, "length": length},
        timeout_s=600,
    )
    return found.extra_bytes


class _Kept:
    """A tensor the backward pass will need; alive as long as the graph holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def remembered_bytes(way: Way, width: int, layers: int, batch: int, length: int) -> int:
    """Bytes the graph holds after one forward pass, parameters apart."""
    model, ids = ternary_model(way, width, layers), byte_windows(length, batch)[0]
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = loss_of(model, ids, way)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    held = sum(size for pointer, size in storages.items() if pointer not in own)
    del loss
    return held


def gradient(way: Way, width: int, layers: int, seed: int, *, quantized: bool = True) -> Tensor:
    """All gradients of one batch, one after the other."""
    model = ternary_model(way, width, layers, seed, quantized=quantized)
    ids = byte_windows(64, 8)[0][seed : seed + 2]
    loss_of(model, ids, way).backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@experiment(
    "matmul_free/training-memory",
    points={
        "smoke": [{"width": 64, "layers": 2, "batch": 2, "length": 64, "repeats": 2}],
        "small": [{"width": 256, "layers": 6, "batch": 8, "length": 256, "repeats": 3}],
        "full": [{"width": 1024, "layers": 24, "batch": 8, "length": 1024, "repeats": 3}],
    },
    operator=TRAINING,
    paper={"width": 2048, "layers": 24, "batch": 8, "length": 2048},
    departures={
        "width": "narrower: the paper's largest saving is of a 1.3B model on an 80 GB GPU",
        "layers": "fewer at scale small, so that nine processes take a minute",
        "length": "as much as the chain fits beside other work",
    },
    guard=Guard(
        "relative difference of the gradient from the chain's", 0.05, relative=False,
        without={"random": "the fused layer makes no choice"},
    ),
    refuted_if="training with the fused layer takes as much memory as with the chain of operators, or more",
    minutes=30,
)  # fmt: skip
def training_memory(width: int, layers: int, batch: int, length: int, repeats: int) -> Figure:
    """Per cent of a training process's peak memory that the fused layer saves on the chain of ordinary operators.

    `repeats` processes of either, with Student's t over their savings. Free recomputes the chain block by block in the backward
    pass, as transformers do on request; arms recompute single layers, or run the chain in bfloat16. The quality is the gradient: the
    chain's own differs by nothing, and at most 5 % may be lost; deleted is a model without any rounding, the rival the chain in
    bfloat16, the usual way to halve what is remembered. Its interval is over seeds.
    """
    sizes = (width, layers, batch, length)
    often = {"chain": repeats, "fused": repeats}  # the others have no interval
    peaks = {way: [peak_of_training(way, *sizes) for _ in range(often.get(way, 1))] for way in WAYS}
    saved = {way: 100 * (1 - mean(peaks[way]) / mean(peaks["chain"])) for way in WAYS}
    found = over_seeds([100 * (1 - b / a) for a, b in zip(peaks["chain"], peaks["fused"], strict=True)])
    errors: dict[str, list[float]] = {"fused": [], "bfloat16": [], "deleted": []}
    for seed in range(3):
        chain = gradient("chain", width, layers, seed)
        others = {
            "fused": gradient("fused", width, layers, seed),
            "bfloat16": gradient("bfloat16", width, layers, seed),
            "deleted": gradient("chain", width, layers, seed, quantized=False),
        }
        for name, other in others.items():
            errors[name].append(float((other - chain).norm() / chain.norm()))
    error = over_seeds(errors["fused"])
    return Figure(
        found.median,
        "%",
        low=found.low,
        high=found.high,
        baseline=0.0,
        free=saved["blocks recomputed"],
        arms={"the chain in bfloat16": saved["bfloat16"], "layers recomputed": saved["layers recomputed"]},
        quality=Quality(
            error.median, 0.0, error.low, error.high,
            {"deleted": mean(errors["deleted"]), "rival": mean(errors["bfloat16"])}, "the chain in bfloat16",
        ),
        details={"peak_bytes": peaks, "graph_bytes": {way: remembered_bytes(way, *sizes) for way in WAYS}},
    )  # fmt: skip
