"""Prepacking: is a packed prefill faster and smaller than a padded one, and than one in order of length?

The prompts are docstrings of the standard library, 6 to about 470 tokens, in arrival order, in batches. Every arm leaves what
generation needs: a left-padded cache and the logits of each prompt's last token; none computes logits elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.memory import peak_memory_of_child
from assay.methods.inference.cache import left_pad
from assay.methods.inference.prepacking import PrepackedPrefill, pack_prompts, padded_prefill, padding_token
from assay.workloads.models import load_model
from assay.workloads.text import mixed_prompts

MODEL = "smollm2-135m"
SORTED = "batches sorted by length"

Prompts = list[list[int]]


def batches(prompts: Prompts, batch: int, *, by_length: bool = False) -> list[Prompts]:
    """Batches of `batch` prompts in arrival order, or longest first."""
    ordered = sorted(prompts, key=len, reverse=True) if by_length else prompts
    return [ordered[i : i + batch] for i in range(0, len(ordered), batch)]


def run_padded(model: Any, prompts: Prompts, batch: int, by_length: bool = False) -> None:
    for group in batches(prompts, batch, by_length=by_length):
        padded_prefill(model, *left_pad(group, padding_token(model)))


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
        free=partial(run_padded, model, chosen, batch, by_length=True),
        free_label=SORTED,
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
        quality=lambda: exactness(model, prefill, chosen[:batch]),
        details={"token_slots": token_slots(chosen, batch)},
        pairs=_pairs(prompts),
    )


def prefill_once(prompts: int, batch: int, arm: str) -> dict[str, int]:
    """What a child process runs so that its peak memory can be read: load the model and prefill every batch in one arm."""
    loaded = load_model(MODEL)
    chosen = mixed_prompts(loaded.tokenizer, prompts)
    if arm in ("padded", "sorted"):
        run_padded(loaded.model, chosen, batch, by_length=arm == "sorted")
    else:
        run_packed(PrepackedPrefill(loaded.model, backend=arm), chosen, batch)  # type: ignore[arg-type]
    return {"weights": sum(p.numel() * p.element_size() for p in loaded.model.parameters())}


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
    """Peak memory of padded over packed prefill, weights included as in the paper, each arm in a process of its own."""
    peaks = {
        arm: peak_memory_of_child(
            f"{__name__}:prefill_once", {"prompts": prompts, "batch": batch, "arm": arm}
        ).extra_bytes
        for arm in ("padded", "sorted", backend)
    }
    return Figure(
        peaks["padded"] / peaks[backend],
        "x",
        free=peaks["padded"] / peaks["sorted"],
        free_label=SORTED,
        details={"peak_bytes": peaks},
    )
