"""The tenants of BlockLLM's experiments: variants of one model, fine-tuned on modules of the standard library, once, and kept on disk.

Each is shown to be what it is called: its loss on the part of its text that it was not trained on is certainly below its base's, or the
experiment fails (but for smoke's byte model). What it does to the other tenants' texts stands beside. Learning rates are not searched: no
figure compares trained models, all arms serve the same ones.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.experiments.inference import language
from assay.experiments.mixers import training
from assay.measure.stats import student_interval
from assay.methods.serving import blockllm as room
from assay.methods.serving.blockllm import Factors, LowRank, Zoo, attach, digest_of, read_adapter, write_adapter
from assay.paths import atomic_file, cache_dir
from assay.workloads.models import load_model
from assay.workloads.sequences import byte_batches
from assay.workloads.text import encode

ADAPTER, TOP, WHOLE = "adapter", "top layers", "whole model"
BYTES = "bytes"
TENSORS, TOLD = "tensors.safetensors", "told.json"
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
WINDOWS, WINDOW = (
    16,
    64,
)  # windows of its own kept text by which a tenant is judged, beside one of each other's; their tokens


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
    batch: int  # windows of a step of fine-tuning
    digest: str  # of its weights


def base_model(name: str) -> Base:
    """SmolLM2-135M in float32, or "bytes": a small byte model trained for a moment."""
    if name != BYTES:
        loaded = load_model(name)

        def read(text: str) -> list[int]:
            return encode(loaded.tokenizer, text)

        return Base(name, loaded.model, read, 1.0, 2, digest_of(loaded.model.state_dict()))
    shape, batches = {"width": 64, "layers": 4}, (64, 8)
    model = language.trained(
        {"room": "blockllm", "shape": shape, "batches": batches},
        lambda: language.small_llama(**shape),
        lambda: byte_batches(*batches),
        steps=60,
        rate=3e-3,
        sources=[],
    )
    return Base(name, model, lambda text: list(text.encode()), 10.0, 16, digest_of(model.state_dict()))


def ids_of(base: Base, tenant: str) -> tuple[Tensor, Tensor]:
    """A tenant's tokens: those to train on, and those kept."""
    ids = torch.tensor(base.read(text_of(tenant)))
    cut = int(TRAINED_SHARE * len(ids))
    return ids[:cut], ids[cut:]


def tuned(base: Base, tenant: str, steps: int) -> Path:
    """The folder of what fine-tuning changed: an adapter as PEFT saves it, or `tensors.safetensors`; and `told.json`, what that did.

    Made once, and found again by a hash of the base's weights, the texts, the settings, the versions, this file, the trainer and the
    room's `adapters.py`.
    """
    _, kind = TENANTS[tenant]
    described = {
        "base": base.digest, "texts": [text_of(one) for one in TENANTS], "tenant": tenant, "kind": kind, "steps": steps,
        "batch": base.batch, "rate": RATES[kind] * base.rates, "rank": RANK, "alpha": ALPHA, "targets": TARGETS, "top": TOP_LAYERS,
        "versions": [importlib.metadata.version(one) for one in ("torch", "transformers")],
        "sources": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (__file__, room.adapters.__file__, training.__file__)],
    }  # fmt: skip
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "trained" / f"blockllm-{found}"
    if (folder / TOLD).is_file():
        return folder
    model = copy.deepcopy(base.model)
    layers: dict[str, LowRank] = {}
    if kind == ADAPTER:
        layers = attach(model, TARGETS, rank=RANK, alpha=ALPHA)
    else:
        model.requires_grad_(kind == WHOLE)
        for one in model.model.layers[-TOP_LAYERS:]:
            one.requires_grad_(True)
    ids, _ = ids_of(base, tenant)
    training.train(model, _windows(ids, base.batch), steps=steps, lr=RATES[kind] * base.rates, weight_decay=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == ADAPTER:
        write_adapter(folder, {name: Factors(one.down.data, one.up.data, one.scale) for name, one in layers.items()})
    else:
        before, changed = base.model.state_dict(), {}
        for name, tensor in model.state_dict().items():
            tied = name == "lm_head.weight" and base.model.config.tie_word_embeddings
            if not tied and not torch.equal(tensor, before[name]):
                changed[name] = tensor.contiguous()
        with atomic_file(folder / TENSORS) as temporary:
            save_file(changed, temporary)
    others = [one for one in TENANTS if one != tenant]
    before, after = (
        nats(base, one, [tenant], WINDOWS) + nats(base, one, others, 1) for one in (base.model, model.eval())
    )
    with atomic_file(folder / TOLD) as temporary:
        temporary.write_text(json.dumps({"before": before, "after": after}))
    return folder


def nats(base: Base, model: Any, tenants: Sequence[str], windows: int) -> list[float]:
    """Nats a token of windows spread over what was kept of tenants' texts."""
    rows = []
    for tenant in tenants:
        _, kept = ids_of(base, tenant)
        starts = [(2 * i + 1) * (len(kept) - WINDOW - 1) // (2 * windows) for i in range(windows)]
        rows += [kept[start : start + WINDOW + 1] for start in starts]
    ids = torch.stack(rows)
    found: list[float] = training.evaluate(model, ids[:, :-1], ids[:, 1:], batch=8)["nll"].tolist()
    return found


def fine_tuned(base: Base, steps: int) -> dict[str, Any]:
    """By tenant, the nats a token that fine-tuning took off its own kept text, with their interval over windows, and off the others'.

    Raises ValueError for a tenant whose own are not certainly fewer: what is then served is its base. The byte model of smoke, which
    decides nothing, is let off: it is fine-tuned for a moment only.
    """
    found: dict[str, Any] = {}
    for tenant in TENANTS:
        told = json.loads((tuned(base, tenant, steps) / TOLD).read_text())
        off = [a - b for a, b in zip(told["before"], told["after"], strict=True)]
        own, others = student_interval(off[:WINDOWS]), off[WINDOWS:]
        if not own.low > 0 and base.name != BYTES:
            raise ValueError(
                f"{tenant} must be fine-tuned: {own.median:.3g} [{own.low:.3g}, {own.high:.3g}] nats a token fewer than its base"
            )
        found[tenant] = {
            "before": sum(told["before"][:WINDOWS]) / WINDOWS,
            "own": [own.low, own.median, own.high],
            "others": sum(others) / len(others),
        }
    return found


def _windows(ids: Tensor, batch: int, length: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    length = min(length, len(ids) - 1)
    while True:
        starts = torch.randint(len(ids) - length, (batch,), generator=chance)
        rows = torch.stack([ids[s : s + length + 1] for s in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


def own_model(base: Base, tenant: str, steps: int) -> Any:
    """A tenant's model on tensors of its own, made from the files without the room's code: an adapter is added to the weights."""
    folder, model = tuned(base, tenant, steps), copy.deepcopy(base.model)
    if TENANTS[tenant][1] != ADAPTER:
        missing = model.load_state_dict(load_file(folder / TENSORS), strict=False)
        assert not missing.unexpected_keys
        return model
    factors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in factors if name.endswith(".lora_A.weight")]:
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        delta = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double() * (ALPHA / RANK)
        layer.weight.data = (layer.weight.data.double() + delta).to(layer.weight.dtype)
    return model


def filled_zoo(base: Base, steps: int) -> Zoo:
    """The base, which nobody asks, and all tenants."""
    zoo = Zoo()
    zoo.add("base", base.model)
    for tenant, (_, kind) in TENANTS.items():
        if kind == ADAPTER:
            zoo.add_adapter(tenant, "base", read_adapter(tuned(base, tenant, steps)))
        else:
            zoo.add(tenant, own_model(base, tenant, steps))
    return zoo
