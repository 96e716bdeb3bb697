"""MemoryFormer: a small language model of look-ups against the same model of linear layers, in bits per byte, operations, bytes, time."""

from __future__ import annotations

from typing import Any

import torch

from assay.experiments.core import Quality, Trial, experiment
from assay.experiments.mixers.training import evaluate, train
from assay.measure.stats import bootstrap
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM
from assay.methods.layers.memoryformer import MemoryLinear, bucket_entropy, distil_, memoryformer_config
from assay.workloads.models import load_model
from assay.workloads.sequences import byte_batches, byte_windows
from assay.workloads.text import calibration_windows


def models(width: int, layers: int) -> dict[str, MixerForCausalLM]:
    """The look-up model and its baseline: the same attention, and Linear-GELU-sized SwiGLU, both of ordinary linear layers."""
    heads = width // 64
    torch.manual_seed(0)
    plain = MixerConfig(
        vocab_size=256, hidden_size=width, layers=[["attention", {"heads": heads}]] * layers, tie_word_embeddings=False
    )
    look_up = memoryformer_config(vocab_size=256, hidden_size=width, layers=layers, heads=heads)
    return {"linear": MixerForCausalLM(plain).eval(), "memory": MixerForCausalLM(look_up).eval()}


def block_macs(model: MixerForCausalLM) -> int:
    """MACs a token of everything in the blocks but the attention product (1 MAC = 2 FLOPs)."""
    total = 0
    for module in model.blocks.modules():
        if isinstance(module, MemoryLinear):
            total += module.cost().macs
        elif isinstance(module, torch.nn.Linear):
            total += module.weight.numel()
    return total


def bytes_read(model: MixerForCausalLM) -> int:
    """Bytes of weights that one token reads in the blocks: the rows it names, or every weight of a linear layer."""
    layers = list(model.blocks.modules())
    tables = sum(layer.cost().bytes_read for layer in layers if isinstance(layer, MemoryLinear))
    return tables + sum(4 * layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))


def distillation(bits: list[int]) -> dict[str, float]:
    """Relative error of one trained linear layer of SmolLM2-135M distilled into look-ups on its real inputs, by bits a code."""
    loaded = load_model("smollm2-135m")
    layer: Any = loaded.model.get_submodule("model.layers.10.mlp.gate_proj")
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        loaded.model(calibration_windows(loaded.tokenizer, window=512, n=8))
        handle.remove()
        x = torch.cat(kept)
        y = layer(x)[:, :64]  # the columns are independent
        return {str(n): distil_(MemoryLinear(576, 64, bits=n), x, y)[-1] for n in bits}


@experiment(
    "memoryformer/comparable-accuracy",
    points={
        "smoke": [{"width": 64, "layers": 2, "steps": 5, "batch": 1}],
        "small": [{"width": 256, "layers": 4, "steps": 400, "batch": batch} for batch in (32, 1)],
        "full": [{"width": 512, "layers": 6, "steps": 20000, "batch": batch} for batch in (1, 32)],
    },
    minutes=30,
)
def look_ups(width: int, layers: int, steps: int, batch: int) -> Trial:
    """One decoding step for `batch` sequences (batch 1 is the favourable case for look-ups); bits per byte after equal training."""
    pair = models(width, layers)
    ids = byte_windows(64, batch)[0]
    caches = {}
    with torch.no_grad():
        for name, model in pair.items():
            caches[name] = model(ids, use_cache=True).cache
            model(ids[:, :1], cache=caches[name])  # room for the steps to come
    states = {name: [dict(state) for state in cache.states] for name, cache in caches.items()}
    details: dict[str, Any] = {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in pair.items()},
        "block_macs_per_token": {name: block_macs(model) for name, model in pair.items()},
        "block_bytes_read_by_one_token": {name: bytes_read(model) for name, model in pair.items()},
        "resident_bytes": {
            name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in pair.items()
        },
    }

    @torch.no_grad()
    def run(name: str) -> None:
        for _ in range(10):
            caches[name].states = [dict(state) for state in states[name]]
            pair[name](ids[:, -1:], cache=caches[name])

    def quality() -> Quality:
        inputs, targets = byte_windows(256, 64)
        bits = {}
        for name, model in pair.items():
            train(model, byte_batches(256, 8), steps=steps, lr=3e-3 if name == "memory" else 2e-3)
            bits[name] = evaluate(model, inputs, targets)["nll"] / 0.6931471805599453
        seen: list[torch.Tensor] = []
        first: Any = pair["memory"].blocks[-1].mlp
        handle = first.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            pair["memory"](inputs[:8])
        handle.remove()
        details["bucket_entropy, largest_share"] = bucket_entropy(first.second, seen[0])
        details["distilled_linear_relative_error"] = distillation([4, 8, 12] if steps > 50 else [8])
        found = bootstrap(bits["memory"].numpy(), lambda x, axis: x.mean(axis=axis))
        base = float(bits["linear"].mean())
        return Quality("bits per byte", found.median, base, found.low, found.high, higher_is_better=False)

    return Trial(lambda: run("linear"), lambda: run("memory"), quality=quality, details=lambda: details, pairs=8)
