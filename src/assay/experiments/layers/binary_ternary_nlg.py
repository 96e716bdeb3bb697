"""Binary and ternary sequence-to-sequence models: bytes of the packed student, and what it lost against its fp32 teacher.

Small BARTs work byte by byte. For the sizes, the task is to write numbers out in words ("342007" to "three hundred forty-two
thousand seven"). For ROUGE, it is to restore real English whose vowels were removed, because summarising news is out of reach for
models trained for minutes. A teacher is trained in fp32. Students start as copies of the teacher and train at low bits, with and
without distillation. They are compared with TWN and BWN, and with plain rounding without any training.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from assay.experiments.core import Figure, Quality, experiment
from assay.experiments.mixers.training import train
from assay.measure.stats import bootstrap
from assay.methods.core.layers.packed import resident_bytes
from assay.methods.layers.binary_ternary_nlg import (
    DistillationLoss,
    calibrate_,
    freeze_,
    load_packed,
    pack_,
    packed_size,
    quantize_,
    relative_operations,
    save_packed,
)
from assay.workloads.sequences import text_bytes

PAD, END, FIRST = 1, 2, 3  # bytes are numbered from FIRST on
LARGEST = 10**6
LOG_2 = 0.6931471805599453
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
RATES = {
    (2, 8): 1e-3,
    (2, 2): 2e-3,
    (1, 8): 1e-3,
    (1, 1): 2e-3,
}  # of (weights, activations); a small model tolerates more


Task = Callable[[int, int, bool], tuple[Tensor, Tensor]]
"""(how many, seed, held out or to train on) to (sources, labels)."""


def in_words(n: int) -> str:
    """A number below a million in English."""
    if n >= 1000:
        rest = n % 1000
        return f"{in_words(n // 1000)} thousand" + (f" {in_words(rest)}" if rest else "")
    if n >= 100:
        rest = n % 100
        return f"{SMALL.split()[n // 100]} hundred" + (f" {in_words(rest)}" if rest else "")
    if n >= 20:
        return TENS.split()[n // 10 - 2] + (f"-{SMALL.split()[n % 10]}" if n % 10 else "")
    return SMALL.split()[n]


def padded(texts: list[str], filler: int) -> Tensor:
    rows = [[b + FIRST for b in text.encode()] + [END] for text in texts]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def numbers(n: int, seed: int, heldout: bool) -> tuple[Tensor, Tensor]:
    """Sources (digits) and labels (words) of n numbers; every seventh number is held out."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(LARGEST // 7, (n,), generator=generator)
    places = torch.full((n,), 6) if heldout else torch.randint(6, (n,), generator=generator)
    found = (7 * blocks + places).tolist()
    return padded([str(x) for x in found], PAD), padded([in_words(x) for x in found], -100)


@cache
def phrases(heldout: bool) -> list[str]:
    """Distinct pairs of neighbouring words of the language reference, lower case; those held out are of documents of their own,
    and none is among those to train on."""
    text = bytes(text_bytes("english", "heldout" if heldout else "prompts").tolist()).decode().lower()
    words = re.findall("[a-z]+", text)
    found = dict.fromkeys(f"{a} {b}" for a, b in zip(words[::2], words[1::2], strict=False))
    known = set(phrases(False)) if heldout else set()
    return [phrase for phrase in found if phrase not in known]


def without_vowels(text: str) -> str:
    """Every word keeps its first letter and loses its other vowels."""
    return re.sub("(?<=[a-z])[aeiou]", "", text)


def restoring(n: int, seed: int, heldout: bool) -> tuple[Tensor, Tensor]:
    """Sources (words without their vowels) and labels (the words) of n phrases."""
    held = phrases(heldout)
    picks = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    return padded([without_vowels(held[i]) for i in picks], PAD), padded([held[i] for i in picks], -100)


def batches(task: Task = numbers, rows: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    seed = 1
    while True:
        yield task(rows, seed, False)
        seed += 1


def as_inputs(source: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": source, "attention_mask": (source != PAD).long(), "labels": labels}


def teacher_model(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    make: Any = BartConfig
    config = make(
        vocab_size=256 + FIRST + 1,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 32,
        decoder_attention_heads=width // 32,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=96,
        init_std=0.08,  # at the usual 0.02 so narrow a model spends its first hundreds of steps learning nothing
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        attn_implementation="eager",
    )
    return BartForConditionalGeneration(config)


def task_loss(model: nn.Module, source: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(**as_inputs(source, labels)).loss
    return loss


def trained_teacher(width: int, layers: int, steps: int, task: Task = numbers) -> Any:
    teacher = teacher_model(width, layers)
    train(teacher, batches(task), steps=steps, lr=1e-3, weight_decay=0.0, loss=task_loss)
    return teacher.eval()


def student_model(
    teacher: Any, bits: tuple[int, int], steps: int, *, distil: bool, baseline: bool = False, task: Task = numbers
) -> Any:
    """A student of the teacher with (weights and embeddings, activations) bits, trained for `steps` steps."""
    weights, activations = bits
    student: Any = quantize_(
        copy.deepcopy(teacher),
        weights=weights,
        embeddings=weights,
        activations=activations,
        method="baseline" if baseline else "tbt",
    )
    calibrate_(student, as_inputs(*task(64, 1, False)))
    compare = DistillationLoss()

    def distillation(model: nn.Module, source: Tensor, labels: Tensor) -> Tensor:
        inputs = as_inputs(source, labels) | {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            wanted = teacher(**inputs)
        loss: Tensor = compare(model(**inputs), wanted, labels, inputs["attention_mask"])
        return loss

    if steps:
        loss = distillation if distil else task_loss
        train(student, batches(task), steps=steps, lr=RATES[bits], weight_decay=0.0, loss=loss)
    return student.eval()


def deployed(student: Any, task: Task = numbers) -> tuple[Any, int]:
    """The student frozen, packed, written to disk and read back, and the bytes of the file."""
    freeze_(student, [as_inputs(*task(64, seed, False)) for seed in (1, 2, 3)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        save_packed(pack_(student), file)
        return load_packed(file), file.stat().st_size


@torch.no_grad()
def bits_per_byte(model: Any, source: Tensor, labels: Tensor) -> Tensor:
    """Of each held-out number's words, (n,) float64."""
    logits = model(**as_inputs(source, labels)).logits.double()
    asked = labels != -100
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll.sum(1) / asked.sum(1) / LOG_2


def text(ids: list[int]) -> str:
    """The bytes up to the end."""
    kept = ids[: ids.index(END)] if END in ids else ids
    return bytes(i - FIRST for i in kept if FIRST <= i < 256 + FIRST).decode(errors="replace")


@torch.no_grad()
def written(model: Any, source: Tensor, longest: int) -> list[str]:
    """What greedy generation writes for each source."""
    mask = (source != PAD).long()
    out = model.generate(source, attention_mask=mask, max_new_tokens=longest, do_sample=False, num_beams=1)
    return [text(row) for row in out[:, 1:].tolist()]


def exact_matches(model: Any, source: Tensor, labels: Tensor) -> float:
    """The share of numbers that are written out without a mistake."""
    wanted = [text(row) for row in labels.tolist()]
    found = written(model, source, labels.shape[1])
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def rouge_1(found: str, wanted: str) -> float:
    """Per cent: the harmonic mean of precision and recall over single words, each counted as often as it stands in both."""
    a, b = Counter(found.split()), Counter(wanted.split())
    return 200 * (a & b).total() / max(1, a.total() + b.total())


def bart_base_bytes(weights: int) -> dict[str, float]:
    """Bytes of a model of BART-base's shape in fp32 and packed, by formula."""
    with torch.device("meta"):
        sizes: dict[str, Any] = {
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
        }
        model = BartForConditionalGeneration(BartConfig(vocab_size=50265, d_model=768, **sizes))
    plain = resident_bytes(model)
    packed = packed_size(model, weights=weights, embeddings=weights)
    return {"fp32": plain, "packed": packed, "times_smaller": plain / packed}


def size_figure(bits: tuple[int, int], width: int, layers: int, teacher_steps: int, steps: int, others: bool) -> Figure:
    """Bytes of the fp32 teacher over those of the packed student, written to disk and read back; also its bits per byte."""
    teacher = trained_teacher(width, layers, teacher_steps)
    source, labels = numbers(128, 0, True)
    weights, activations = bits
    name = f"{weights}-{weights}-{activations}"
    arms: dict[str, Any] = {"teacher, fp32": teacher}
    lead = student_model(teacher, bits, steps, distil=True)
    if others:
        lowest = 2 if weights == 2 else 1
        arms |= {
            f"{name} without distillation": student_model(teacher, bits, steps, distil=False),
            f"{'TWN' if weights == 2 else 'BWN'} {name}": student_model(
                teacher, bits, steps, distil=False, baseline=True
            ),
            f"{name} rounded, not trained": student_model(teacher, bits, 0, distil=False),
            f"{weights}-{weights}-{lowest} distilled": student_model(teacher, (weights, lowest), steps, distil=True),
        }
    found = {arm: bits_per_byte(model, source, labels) for arm, model in arms.items()}
    found[f"{name} distilled"] = bits_per_byte(lead, source, labels)
    packed, on_disk = deployed(lead)
    judged = bits_per_byte(packed, source, labels)
    value = resident_bytes(teacher) / resident_bytes(packed)
    interval = bootstrap(judged.numpy(), lambda x, axis: x.mean(axis=axis))
    base = float(found["teacher, fp32"].mean())
    return Figure(
        value,
        "x",
        low=value,
        high=value,
        baseline=1.0,
        quality=Quality("bits per byte", interval.median, base, interval.low, interval.high, higher_is_better=False),
        details={
            "resident_bytes": {"fp32": resident_bytes(teacher), "packed": resident_bytes(packed)},
            "file_bytes": on_disk,
            "bits_per_byte": {arm: float(values.mean()) for arm, values in found.items()}
            | {f"{name} distilled, frozen and packed": float(judged.mean())},
            "exact_matches": {
                "teacher, fp32": exact_matches(teacher, source[:64], labels[:64]),
                "packed": exact_matches(packed, source[:64], labels[:64]),
            },
            "bart_base_bytes_by_formula": bart_base_bytes(weights),
            "operations_in_bits_against_fp32_as_counted": relative_operations(weights, activations),
        },
    )


POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"width": 32, "layers": 1, "teacher_steps": 10, "steps": 3, "others": False}],
    "small": [{"width": 128, "layers": 2, "teacher_steps": 600, "steps": 200, "others": True}],
    "full": [{"width": 256, "layers": 3, "teacher_steps": 10000, "steps": 10000, "others": True}],
}


@experiment("binary_ternary_nlg/size-ternary", points=POINTS, minutes=30)
def size_ternary(width: int, layers: int, teacher_steps: int, steps: int, others: bool) -> Figure:
    """2-2-8: ternary weights and embeddings, activations of 8 bits."""
    return size_figure((2, 8), width, layers, teacher_steps, steps, others)


@experiment("binary_ternary_nlg/size-binary", points=POINTS, minutes=30)
def size_binary(width: int, layers: int, teacher_steps: int, steps: int, others: bool) -> Figure:
    """1-1-8: binary weights and embeddings, activations of 8 bits."""
    return size_figure((1, 8), width, layers, teacher_steps, steps, others)


@experiment(
    "binary_ternary_nlg/rouge-ternary",
    points={
        "smoke": [{"width": 32, "layers": 1, "teacher_steps": 10, "steps": 3, "judged": 8}],
        "small": [{"width": 128, "layers": 2, "teacher_steps": 1200, "steps": 250, "judged": 256}],
        "full": [{"width": 256, "layers": 3, "teacher_steps": 20000, "steps": 20000, "judged": 512}],
    },
    minutes=30,
)
def rouge_ternary(width: int, layers: int, teacher_steps: int, steps: int, judged: int) -> Figure:
    """ROUGE-1 of the packed 2-2-8 student over that of its fp32 teacher, on held-out phrases whose vowels are to be restored.

    Its quality guard is what doing nothing scores: a student below it has learnt nothing, whatever the ratio says.
    """
    teacher = trained_teacher(width, layers, teacher_steps, restoring)
    source, labels = restoring(judged, 0, True)
    wanted = [text(row) for row in labels.tolist()]
    answers = {
        "vowels not restored": [text(row) for row in source.tolist()],
        "teacher, fp32": written(teacher, source, labels.shape[1]),
    }
    for name, bits, distil in (("2-2-8", (2, 8), True), ("TWN 2-2-8", (2, 8), False), ("1-1-8", (1, 8), True)):
        student = student_model(teacher, bits, steps, distil=distil, baseline=not distil, task=restoring)
        answers[name] = written(deployed(student, restoring)[0], source, labels.shape[1])
    scores = {
        arm: np.array([rouge_1(a, b) for a, b in zip(found, wanted, strict=True)]) for arm, found in answers.items()
    }
    means = {arm: bootstrap(found, np.mean) for arm, found in scores.items()}

    def kept(pairs: np.ndarray, axis: int) -> np.ndarray:
        mean = pairs.mean(axis=axis)
        found: np.ndarray = mean[..., 0] / np.maximum(mean[..., 1], 1e-9)  # a teacher that writes no word right: 0 kept
        return found

    share = bootstrap(np.stack([scores["2-2-8"], scores["teacher, fp32"]], 1), kept)
    lead = means["2-2-8"]
    return Figure(
        share.median,
        "x",
        low=share.low,
        high=share.high,
        quality=Quality("R1", lead.median, means["vowels not restored"].median, lead.low, lead.high),
        details={
            "rouge_1": {arm: [found.median, found.low, found.high] for arm, found in means.items()},
            "examples": [
                {"wanted": wanted[i], **{arm: found[i] for arm, found in answers.items()}}
                for i in range(min(3, judged))
            ],
        },
    )
