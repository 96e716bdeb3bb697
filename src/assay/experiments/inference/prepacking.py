"""Prepacking: is a packed prefill faster and smaller than a padded one, and than one sorted by length?

The prompts are docstrings of the standard library, 6 to about 470 tokens, in arrival order, in batches. Every arm produces what
generation needs: a left-padded cache and the logits of each prompt's last token. None computes logits elsewhere. The strongest
free alternative is the simplest: a separate forward pass for each prompt, which has no padding either.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.memory import peak_memory_of_child
from assay.methods.core.generation.cache import Prefilled, left_pad
from assay.methods.core.generation.loop import padded_prefill, padding_token
from assay.methods.inference.prepacking import PrepackedPrefill, pack_prompts
from assay.workloads.models import load_model
from assay.workloads.text import mixed_prompts

MODEL = "smollm2-135m"
SORTED, ALONE = "batches sorted by length", "each prompt by itself"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

Prompts = list[list[int]]


def batches(prompts: Prompts, batch: int, *, by_length: bool = False) -> list[Prompts]:
    """Batches of `batch` prompts in arrival order, or longest first."""
    ordered = sorted(prompts, key=len, reverse=True) if by_length else prompts
    return [ordered[i : i + batch] for i in range(0, len(ordered), batch)]


def run_padded(model: Any, prompts: Prompts, batch: int, by_length: bool = False) -> None:
    for group in batches(prompts, batch, by_length=by_length):
        padded_prefill(model, *left_pad(group, padding_token(model)))


def run_alone(model: Any, prompts: Prompts, batch: int) -> None:
    for group in batches(prompts, batch):
        alone_prefill(model, group)


def alone_prefill(model: Any, group: Prompts) -> Prefilled:
    """A forward pass for each prompt of a batch, and their caches stacked into the left-padded one that `generate` wants."""
    done = [padded_prefill(model, torch.tensor([prompt], device=model.device)) for prompt in group]
    ids, mask = left_pad(group, padding_token(model), model.device)
    layers: list[Any] = [one.cache.layers for one in done]
    stacked = DynamicCache(config=model.config)
    for index in range(len(layers[0])):
        pieces = [(own[index].keys[0], own[index].values[0]) for own in layers]
        for own in layers:
            own[index].reset()  # so that a layer's pieces go once they are stacked
        keys, values = map(_left_stacked, zip(*pieces, strict=True))
        stacked.update(keys, values, index)
    logits = torch.cat([one.logits for one in done if one.logits is not None])
    return Prefilled(stacked, ids, mask, [len(prompt) for prompt in group], logits)


def _left_stacked(pieces: Sequence[Tensor]) -> Tensor:
    """(heads, tokens, d) each -> (len(pieces), heads, most tokens, d), zeros in front."""
    width = max(piece.shape[1] for piece in pieces)
    return torch.stack([F.pad(piece, (0, 0, width - piece.shape[1], 0)) for piece in pieces])


def run_packed(prefill: PrepackedPrefill, prompts: Prompts, batch: int) -> None:
    for group in batches(prompts, batch):
        prefill(group)


def exactness(model: Any, prefill: PrepackedPrefill, prompts: Prompts) -> Quality:
    """The largest difference of a last-token logit between the packed and the padded prefill of some prompts, relative."""
    packed = prefill(prompts)
    padded = padded_prefill(model, *left_pad(prompts, padding_token(model)))
    assert packed.logits is not None
    assert padded.logits is not None
    worst = float((packed.logits - padded.logits).abs().max() / padded.logits.abs().max())
    return Quality("largest difference of last-token logits, relative", worst, 0.0, higher_is_better=False)


def token_slots(prompts: Prompts, batch: int) -> dict[str, int]:
    """Tokens that linear layers compute in each arm; `packed` is the paper's rows, `flat` one row without padding."""
    arrival, by_length = batches(prompts, batch), batches(prompts, batch, by_length=True)
    packings = [pack_prompts([len(prompt) for prompt in group]) for group in arrival]
    return {
        "padded": sum(packing.padded_area for packing in packings),
        "sorted": sum(len(group) * max(map(len, group)) for group in by_length),
        "packed": sum(packing.area for packing in packings),
        "flat": sum(map(len, prompts)),
        "rows": sum(len(packing.bins) for packing in packings),
    }


def _arms(prompts: int, batch: int, backend: Any) -> tuple[Any, Prompts, PrepackedPrefill, Callable[[], None]]:
    loaded = load_model(MODEL)
    chosen = mixed_prompts(loaded.tokenizer, prompts)
    prefill = PrepackedPrefill(loaded.model, backend=backend)
    return loaded.model, chosen, prefill, partial(run_packed, prefill, chosen, batch)


def _pairs(prompts: int) -> int:
    return 3 if prompts < 16 else 5


POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"prompts": 6, "batch": 3, "backend": "varlen"}],
    "small": [
        {"prompts": 32, "batch": 8, "backend": "mask"},
        {"prompts": 32, "batch": 16, "backend": "varlen"},
    ],
    "full": [
        {"prompts": 512, "batch": batch, "backend": backend} for batch in (16, 64) for backend in ("mask", "varlen")
    ],
}


@experiment("prepacking/prefill-speedup-padded", points=POINTS, minutes=20)
def prefill_speedup_padded(prompts: int, batch: int, backend: str) -> Trial:
    """Packed batches against the same batches padded to their longest prompt."""
    model, chosen, prefill, packed = _arms(prompts, batch, backend)
    return Trial(
        baseline=partial(run_padded, model, chosen, batch),
        candidate=packed,
        free=partial(run_alone, model, chosen, batch),
        free_label=ALONE,
        quality=lambda: exactness(model, prefill, chosen[:batch]),
        details={"token_slots": token_slots(chosen, batch)},
        pairs=_pairs(prompts),
    )


@experiment("prepacking/prefill-speedup-sorted", points=POINTS, minutes=20)
def prefill_speedup_sorted(prompts: int, batch: int, backend: str) -> Trial:
    """Packed batches in arrival order against padded batches of all prompts sorted by length."""
    model, chosen, prefill, packed = _arms(prompts, batch, backend)
    return Trial(
        baseline=partial(run_padded, model, chosen, batch, by_length=True),
        candidate=packed,
        free=partial(run_alone, model, chosen, batch),
        free_label=ALONE,
        quality=lambda: exactness(model, prefill, chosen[:batch]),
        details={"token_slots": token_slots(chosen, batch)},
        pairs=_pairs(prompts),
    )


def prefill_once(prompts: int, batch: int, arm: str) -> None:
    """What a child process runs so that its peak memory can be read: load the model and prefill every batch in one arm."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        # Freed tensors go back at once. Else the peak depends on holes in the heap: the padded arm took 1.2 or 1.6 GB.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    loaded = load_model(MODEL)
    chosen = mixed_prompts(loaded.tokenizer, prompts)
    if arm in ("padded", "sorted"):
        run_padded(loaded.model, chosen, batch, by_length=arm == "sorted")
    elif arm == "alone":
        run_alone(loaded.model, chosen, batch)
    else:
        run_packed(PrepackedPrefill(loaded.model, backend=arm), chosen, batch)  # type: ignore[arg-type]


def in_every_arm(prompts: int, batch: int) -> dict[str, int]:
    """Bytes no arm can do without: the weights, and the left-padded cache of the largest batch."""
    loaded = load_model(MODEL)
    config: Any = loaded.model.config
    groups = batches(mixed_prompts(loaded.tokenizer, prompts), batch)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * loaded.model.dtype.itemsize
    return {
        "weights": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "cache": token * max(len(group) * max(map(len, group)) for group in groups),
    }


@experiment(
    "prepacking/prefill-peak-memory",
    points={
        "smoke": [{"prompts": 4, "batch": 4, "backend": "varlen"}],
        "small": [{"prompts": 32, "batch": 16, "backend": backend} for backend in ("mask", "varlen")],
        "full": [{"prompts": 256, "batch": 64, "backend": backend} for backend in ("mask", "varlen")],
    },
    minutes=20,
)
def prefill_peak_memory(prompts: int, batch: int, backend: str) -> Figure:
    """Peak memory of padded over packed prefill, weights included as in the paper, each arm in a process of its own.

    Packing saves activations. The weights and the left-padded cache are in every arm, and here they are most of it, so that the
    ratio stays far below the paper's, whose weights have 4 bits.
    """
    peaks = {
        arm: peak_memory_of_child(
            f"{__name__}:prefill_once", {"prompts": prompts, "batch": batch, "arm": arm}
        ).extra_bytes
        for arm in ("padded", "sorted", "alone", backend)
    }
    free, label = min((peaks["sorted"], SORTED), (peaks["alone"], ALONE))
    return Figure(
        peaks["padded"] / peaks[backend],
        "x",
        free=peaks["padded"] / free,
        free_label=label,
        details={"peak_bytes": peaks, "in_every_arm_bytes": in_every_arm(prompts, batch)},
    )
