"""The tenants of BlockLLM's experiments: variants of one model, fine-tuned on modules of the standard library, once, and kept on disk."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.experiments.inference import language
from assay.experiments.mixers import training
from assay.methods.serving import blockllm as room
from assay.methods.serving.blockllm import Factors, LowRank, Zoo, attach, read_adapter, write_adapter
from assay.paths import atomic_file, cache_dir
from assay.workloads.models import load_model
from assay.workloads.sequences import byte_batches
from assay.workloads.text import encode

ADAPTER, TOP, WHOLE = "adapter", "top layers", "whole model"
TENANTS = {
    "argparse": ("argparse", ADAPTER),
    "decimal": ("_pydecimal", TOP),
    "typing": ("typing", ADAPTER),
    "inspect": ("inspect", WHOLE),
    "turtle": ("turtle", ADAPTER),
    "tarfile": ("tarfile", TOP),
}
"""Each tenant's text is a module of the standard library; the first asks most. Three have adapters, two top layers of their own, and one
shares nothing."""
TOP_LAYERS = 4
RANK, ALPHA = 8, 16.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATES = {ADAPTER: 1e-3, TOP: 1e-4, WHOLE: 3e-5}
TRAINED_SHARE = 0.75  # of a text; what is behind it is for prompts and for quality


def text_of(tenant: str) -> str:
    spec = importlib.util.find_spec(TENANTS[tenant][0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Base:
    """The model that all tenants were made from, and how it reads a text."""

    name: str
    model: Any
    read: Callable[[str], list[int]]
    rates: float  # all learning rates times this


def base_model(name: str) -> Base:
    """SmolLM2-135M in float32, or "bytes": a small byte model trained for a moment."""
    if name != "bytes":
        loaded = load_model(name)
        return Base(name, loaded.model, lambda text: encode(loaded.tokenizer, text), 1.0)
    model = language.trained(
        {"room": "blockllm"},
        lambda: language.small_llama(width=64, layers=4),
        lambda: byte_batches(64, 8),
        steps=60,
        rate=3e-3,
        sources=[],
    )
    return Base(name, model, lambda text: list(text.encode()), 10.0)


def ids_of(base: Base, tenant: str) -> tuple[Tensor, Tensor]:
    """A tenant's tokens: those to train on, and those kept."""
    ids = torch.tensor(base.read(text_of(tenant)))
    cut = int(TRAINED_SHARE * len(ids))
    return ids[:cut], ids[cut:]


def tuned(base: Base, tenant: str, steps: int) -> Path:
    """The folder of what fine-tuning changed: an adapter as PEFT saves it, or `tensors.safetensors`.

    Made once, and found again by a hash of the text, the settings, the versions, this file, the trainer and the room's `adapters.py`.
    """
    _, kind = TENANTS[tenant]
    described = {
        "base": base.name, "text": text_of(tenant), "kind": kind, "steps": steps, "rate": RATES[kind] * base.rates, "rank": RANK,
        "alpha": ALPHA, "targets": TARGETS, "top": TOP_LAYERS,
        "versions": [importlib.metadata.version(one) for one in ("torch", "transformers")],
        "sources": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (__file__, room.adapters.__file__, training.__file__)],
    }  # fmt: skip
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "trained" / f"blockllm-{found}"
    done = folder / "done"
    if done.is_file():
        return folder
    model = copy.deepcopy(base.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers: dict[str, LowRank] = {}
    if kind == ADAPTER:
        layers = attach(model, TARGETS, rank=RANK, alpha=ALPHA)
    else:
        model.requires_grad_(kind == WHOLE)
        for one in model.model.layers[-TOP_LAYERS:]:
            one.requires_grad_(True)
    ids, _ = ids_of(base, tenant)
    training.train(model, _windows(ids), steps=steps, lr=RATES[kind] * base.rates, weight_decay=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == ADAPTER:
        write_adapter(folder, {name: Factors(one.down.data, one.up.data, one.scale) for name, one in layers.items()})
    else:
        changed = {}
        for name, tensor in model.state_dict().items():
            tied = name == "lm_head.weight" and base.model.config.tie_word_embeddings
            if not tied and not torch.equal(tensor, before[name]):
                changed[name] = tensor.contiguous()
        with atomic_file(folder / "tensors.safetensors") as temporary:
            save_file(changed, temporary)
    with atomic_file(done) as temporary:
        temporary.write_text("")
    return folder


def _windows(ids: Tensor, length: int = 64, batch: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    length = min(length, len(ids) - 1)
    while True:
        starts = torch.randint(len(ids) - length, (batch,), generator=chance)
        rows = torch.stack([ids[s : s + length + 1] for s in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


def filled_zoo(base: Base, steps: int) -> Zoo:
    """The base, which nobody asks, and all tenants."""
    zoo = Zoo()
    zoo.add("base", base.model)
    for tenant, (_, kind) in TENANTS.items():
        folder = tuned(base, tenant, steps)
        if kind == ADAPTER:
            zoo.add_adapter(tenant, "base", read_adapter(folder))
            continue
        model = copy.deepcopy(base.model)
        missing = model.load_state_dict(load_file(folder / "tensors.safetensors"), strict=False)
        assert not missing.unexpected_keys
        zoo.add(tenant, model)
    return zoo
