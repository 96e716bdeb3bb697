"""Prepacking: is a packed prefill faster and smaller than a padded one, and than one sorted by length?

The prompts are docstrings of the standard library, from 6 tokens on, in arrival order, in batches. Every arm produces what
generation needs: a left-padded cache and the logits of each prompt's last token. None computes logits elsewhere. The strongest
free alternative is the simplest: a separate forward pass for each prompt, which has no padding either. The paper's form decides, rows of
packed prompts under a mask; one flat row without a mask ("varlen"), our faster form, stands beside it as an arm.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.memory import peak_memory_of_child
from assay.measure.stats import student_interval
from assay.methods.core.generation.cache import Prefilled, left_pad
from assay.methods.core.generation.loop import padded_prefill, padding_token
from assay.methods.inference.prepacking import PrepackedPrefill, pack_prompts
from assay.workloads.models import load_model
from assay.workloads.text import LONGEST_PROMPT, mixed_prompts

MODEL = "smollm2-135m"
PREFILL = Operator("prefill of prompts of mixed length", free="each prompt by itself")
LOGITS = Guard(
    "largest difference of last-token logits, relative",
    1e-3,
    relative=False,
    without={"rival": "padding, sorting and single prompts all compute the same logits: their difference is rounding"},
)
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

Prompts = list[list[int]]


def batches(prompts: Prompts, batch: int, *, by_length: bool = False) -> list[Prompts]:
    """Batches of `batch` prompts in arrival order, or longest first."""
    ordered = sorted(prompts, key=len, reverse=True) if by_length else prompts
    return [ordered[i : i + batch] for i in range(0, len(ordered), batch)]


def run_padded(model: Any, prompts: Prompts, batch: int, by_length: bool = False) -> None:
    """Prefill of all prompts, each batch padded to its longest."""
    for group in batches(prompts, batch, by_length=by_length):
        padded_prefill(model, *left_pad(group, padding_token(model)))


def run_alone(model: Any, prompts: Prompts, batch: int) -> None:
    """Prefill of all prompts one by one, their caches stacked a batch."""
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
    """Prefill of all prompts, each batch packed."""
    for group in batches(prompts, batch):
        prefill(group)


def exactness(model: Any, prefill: PrepackedPrefill, prompts: Prompts) -> Quality:
    """The largest difference of a last-token logit between the packed and the padded prefill of some prompts, relative.

    The method deleted: the same row without the mask and with positions that run on, so that prompts see those before them. Random: the
    same tokens cut into prompts at random places.
    """
    padded = padded_prefill(model, *left_pad(prompts, padding_token(model))).logits
    assert padded is not None

    def difference(logits: Tensor | None) -> float:
        assert logits is not None
        return float((logits - padded).abs().max() / padded.abs().max())

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    row = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)
    with torch.no_grad():
        unmasked = model(row, use_cache=False).logits[0, lengths.cumsum(0).to(row.device) - 1]
    cuts = (
        torch.randperm(row.shape[1] - 1, generator=torch.Generator().manual_seed(0))[: len(prompts) - 1].sort().values
        + 1
    )
    elsewhere = [part.tolist() for part in row[0].cpu().tensor_split(cuts)]
    return Quality(
        difference(prefill(prompts).logits),
        0.0,
        controls={"deleted": difference(unmasked), "random": difference(prefill(elsewhere).logits)},
    )


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


POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"prompts": 6, "batch": 3, "longest": 128}],
    "small": [{"prompts": 8, "batch": 8, "longest": 96}],
    "full": [{"prompts": 512, "batch": 64, "longest": LONGEST_PROMPT}],
}
PAPER = {
    "packing": "best fit, decreasing",
    "backend": "mask",
    "batch": 64,
    "model": "1.3B in 4 bits",
    "prompts": "MMLU",
}
DECLARED: dict[str, Any] = {
    "operator": PREFILL,
    "paper": PAPER,
    "departures": {
        "batch": "8 at small scale: a padded batch of 64 takes minutes on two cores",
        "prompts": "docstrings of the standard library, from 6 tokens to 96 at small scale (192 for memory): no MMLU offline",
        "model": "SmolLM2-135M in float32",
    },
    "guard": LOGITS,
    "minutes": 20,
}


def _trial(prompts: int, batch: int, longest: int, *, by_length: bool) -> Trial:
    """Packed in arrival order, against padded batches in arrival order or sorted; flat rows and the other padding beside them."""
    loaded = load_model(MODEL)
    model, chosen = loaded.model, mixed_prompts(loaded.tokenizer, prompts, longest=longest)
    masked, flat = (PrepackedPrefill(model, backend=backend) for backend in ("mask", "varlen"))
    other = "padded, in arrival order" if by_length else "padded, sorted by length"
    return Trial(
        baseline=partial(run_padded, model, chosen, batch, by_length),
        candidate=partial(run_packed, masked, chosen, batch),
        free=partial(run_alone, model, chosen, batch),
        arms={
            "one flat row without a mask": partial(run_packed, flat, chosen, batch),
            other: partial(run_padded, model, chosen, batch, not by_length),
        },
        quality=lambda: exactness(model, masked, chosen[:batch]),
        details={"token_slots": token_slots(chosen, batch)},
    )


@experiment(
    "prepacking/prefill-speedup-padded",
    points=POINTS,
    refuted_if="packed batches take longer than the same batches padded to their longest prompt",
    **DECLARED,
)
def prefill_speedup_padded(prompts: int, batch: int, longest: int) -> Trial:
    """Packed batches against the same batches padded to their longest prompt."""
    return _trial(prompts, batch, longest, by_length=False)


@experiment(
    "prepacking/prefill-speedup-sorted",
    points={**POINTS, "small": [{"prompts": 8, "batch": 4, "longest": 96}]},
    refuted_if="packed batches take longer than padded batches of the prompts sorted by length",
    **DECLARED,
)
def prefill_speedup_sorted(prompts: int, batch: int, longest: int) -> Trial:
    """Packed batches in arrival order against padded batches of all prompts sorted by length."""
    return _trial(prompts, batch, longest, by_length=True)


def prefill_once(prompts: int, batch: int, longest: int, arm: str) -> None:
    """What a child process runs so that its peak memory can be read: load the model and prefill every batch in one arm."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        # Freed tensors go back at once. Else the peak depends on holes in the heap: the padded arm took 1.2 or 1.6 GB.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    loaded = load_model(MODEL)
    chosen = mixed_prompts(loaded.tokenizer, prompts, longest=longest)
    if arm in ("padded", "sorted"):
        run_padded(loaded.model, chosen, batch, by_length=arm == "sorted")
    elif arm == "alone":
        run_alone(loaded.model, chosen, batch)
    else:
        run_packed(PrepackedPrefill(loaded.model, backend=arm), chosen, batch)  # type: ignore[arg-type]


def in_every_arm(prompts: int, batch: int, longest: int) -> dict[str, int]:
    """Bytes no arm can do without: the weights, and the left-padded cache of the largest batch."""
    loaded = load_model(MODEL)
    config: Any = loaded.model.config
    groups = batches(mixed_prompts(loaded.tokenizer, prompts, longest=longest), batch)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * loaded.model.dtype.itemsize
    return {
        "weights": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "cache": token * max(len(group) * max(map(len, group)) for group in groups),
    }


@experiment(
    "prepacking/prefill-peak-memory",
    points={
        "smoke": [{"prompts": 4, "batch": 4, "longest": 128, "repeats": 2}],
        "small": [{"prompts": 8, "batch": 8, "longest": 192, "repeats": 3}],
        "full": [{"prompts": 256, "batch": 64, "longest": LONGEST_PROMPT, "repeats": 3}],
    },
    refuted_if="packed prefill peaks higher than padded prefill",
    **DECLARED,
)
def prefill_peak_memory(prompts: int, batch: int, longest: int, repeats: int) -> Figure:
    """Peak memory of padded over packed prefill, weights included as in the paper, each arm in a process of its own.

    Packing saves activations. The weights and the left-padded cache are in every arm, and here they are most of it, so that the
    ratio stays far below the paper's, whose weights have 4 bits. The interval is Student's over repeats.
    """

    def peak(arm: str) -> int:
        call = {"prompts": prompts, "batch": batch, "longest": longest, "arm": arm}
        return peak_memory_of_child(f"{__name__}:prefill_once", call).extra_bytes

    seen = [{arm: peak(arm) for arm in ("padded", "mask")} for _ in range(repeats)]
    once = {arm: peak(arm) for arm in ("sorted", "alone", "varlen")}
    padded = sum(one["padded"] for one in seen) / repeats
    ratio = student_interval([one["padded"] / one["mask"] for one in seen])
    loaded = load_model(MODEL)
    chosen = mixed_prompts(loaded.tokenizer, prompts, longest=longest)
    return Figure(
        ratio.median,
        "x",
        low=ratio.low,
        high=ratio.high,
        free=padded / once["alone"],
        arms={
            "one flat row without a mask": padded / once["varlen"],
            "padded, sorted by length": padded / once["sorted"],
        },
        quality=exactness(loaded.model, PrepackedPrefill(loaded.model, backend="mask"), chosen[:batch]),
        details={"peak_bytes": [*seen, once], "in_every_arm_bytes": in_every_arm(prompts, batch, longest)},
    )
