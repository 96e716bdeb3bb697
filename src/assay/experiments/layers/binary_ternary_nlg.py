"""Binary and ternary sequence-to-sequence models: bytes of a packed BART, and what students of its kind lose against their teachers.

The size is that of BART-base itself, packed and written to disk. The quality is that of small BARTs which work byte by byte and
write numbers out in words ("342" to "three hundred forty-two"), because summarising news is out of reach for models trained for
seconds. A teacher is trained in fp32; students start as copies of it and train at low bits, the paper's way (statistics-based
levels and distillation) and the rivals' (TWN and BWN, without distillation). They are packed before they are judged. Every arm has
the learning rate that a search over the same grid found for it.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, experiment
from assay.experiments.mixers.training import train
from assay.experiments.rates import Rate, chosen, searched
from assay.experiments.seeds import paired
from assay.methods.core.layers.packed import resident_bytes
from assay.methods.layers.binary_ternary_nlg import (
    DistillationLoss,
    LowBitEmbedding,
    LowBitLinear,
    calibrate_,
    freeze_,
    load_packed,
    pack_,
    quantize_,
    relative_operations,
    save_packed,
)

# ------------------------------------------------------------------------------------------------------- the task: number words

PAD, END, FIRST = 1, 2, 3  # bytes are numbered from FIRST on
LARGEST = 1000
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
PARTS = {"train": (0, 1, 2, 3, 4), "choose": (5,), "heldout": (6,)}  # numbers by their remainder of 7; our choice
LOG_2 = 0.6931471805599453


def in_words(n: int) -> str:
    """A number below a thousand in English."""
    if n >= 100:
        rest = n % 100
        return f"{SMALL.split()[n // 100]} hundred" + (f" {in_words(rest)}" if rest else "")
    if n >= 20:
        return TENS.split()[n // 10 - 2] + (f" {SMALL.split()[n % 10]}" if n % 10 else "")
    return SMALL.split()[n]


def padded(texts: list[str], filler: int) -> Tensor:
    """The texts as bytes and an end, (texts, longest), filled up with `filler` on the right."""
    rows = [[b + FIRST for b in text.encode()] + [END] for text in texts]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def numbers(part: str, n: int = LARGEST, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Sources (digits) and labels (words) of a part's first n numbers, or of n drawn by a seed."""
    known = [x for x in range(LARGEST) if x % 7 in PARTS[part]]
    found = known[:n]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        found = [known[i] for i in torch.randint(len(known), (n,), generator=generator).tolist()]
    return padded([str(x) for x in found], PAD), padded([in_words(x) for x in found], -100)


def batches(seed: int, rows: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of numbers to train on, other ones in every step and for every seed."""
    step = 0
    while True:
        yield numbers("train", rows, 10**6 * seed + step)
        step += 1


def as_inputs(source: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the model's forward takes: a filled-up place of the source is masked."""
    return {"input_ids": source, "attention_mask": (source != PAD).long(), "labels": labels}


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


def rouge_1(found: str, wanted: str) -> float:
    """Per cent: the harmonic mean of precision and recall over single words, each counted as often as it stands in both."""
    a, b = Counter(found.split()), Counter(wanted.split())
    return 200 * (a & b).total() / max(1, a.total() + b.total())


def mean_rouge(model: Any, part: str = "heldout") -> float:
    """R1, per cent, over all numbers of a part."""
    source, labels = numbers(part)
    found = written(model, source, labels.shape[1])
    return float(np.mean([rouge_1(a, text(row)) for a, row in zip(found, labels.tolist(), strict=True)]))


@cache
def constant_rouge() -> float:
    """The R1 of the best of all trivial answers: the commonest words of the numbers to train on, the same for every number."""
    wanted = [text(row) for row in numbers("heldout")[1].tolist()]
    words = Counter(word for row in numbers("train")[1].tolist() for word in text(row).split())
    common = [word for word, _ in words.most_common(6)]
    return max(
        float(np.mean([rouge_1(" ".join(common[:n]), each) for each in wanted])) for n in range(1, len(common) + 1)
    )


# ----------------------------------------------------------------------------------------------------- teachers and students

TEACHERS, STUDENTS = "binary_ternary_nlg/teachers", "binary_ternary_nlg/students"
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
SIZE = {"student_width": 64, "student_layers": 1, "teacher_steps": 400, "steps": 100, "seeds": 3}


def bart(width: int, layers: int, seed: int) -> Any:
    """A new BART over bytes."""
    torch.manual_seed(seed)
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
        max_position_embeddings=64,
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
    """Cross-entropy of the labels."""
    loss: Tensor = model(**as_inputs(source, labels)).loss
    return loss


def trained_teacher(width: int, layers: int, steps: int, seed: int, rate: float) -> Any:
    """A BART that has learnt to write numbers."""
    teacher = bart(width, layers, seed)
    train(teacher, batches(seed), steps=steps, lr=rate, weight_decay=0.0, loss=task_loss)
    return teacher.eval()


@cache
def teacher_of(width: int, layers: int, steps: int, seed: int) -> Any:
    """The teacher at its searched rate; made once."""
    return trained_teacher(width, layers, steps, seed, chosen(TEACHERS, "teacher").rate)


def arms_of(weights: int) -> dict[str, dict[str, Any]]:
    """The trained students with so many bits a weight: the paper's, the paper's without distillation, and TWN or BWN.

    BWN's levels are the paper's own: with one bit, the second arm is BWN.
    """
    name = f"{weights}-{weights}-8"
    own: dict[str, dict[str, Any]] = {name: {"distil": True}}
    if weights == 2:
        own[f"{name} without distillation"] = {"distil": False}
    rival = f"{'TWN' if weights == 2 else 'BWN'} {name}"
    return own | {rival: {"distil": False, "method": "baseline"}}


def weights_of(arm: str) -> int:
    """Bits a weight of an arm."""
    return 1 if "1-1-8" in arm else 2


def student_of(teacher: Any, weights: int, *, method: str = "tbt") -> Any:
    """A copy of the teacher with so many bits a weight and 8 an activation, not yet trained."""
    student: Any = quantize_(
        copy.deepcopy(teacher),
        weights=weights,
        embeddings=weights,
        activations=8,
        method=method,  # type: ignore[arg-type]
    )
    return calibrate_(student, as_inputs(*numbers("train", 64, 1)))


def trained_student(
    teacher: Any, weights: int, steps: int, seed: int, rate: float, *, distil: bool, method: str = "tbt"
) -> Any:
    """A quantised copy of the teacher, trained by distillation from it or on the task alone."""
    student = student_of(teacher, weights, method=method)
    compare = DistillationLoss()

    def distillation(model: nn.Module, source: Tensor, labels: Tensor) -> Tensor:
        inputs = as_inputs(source, labels) | {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            wanted = teacher(**inputs)
        loss: Tensor = compare(model(**inputs), wanted, labels, inputs["attention_mask"])
        return loss

    loss = distillation if distil else task_loss
    train(student, batches(100 + seed), steps=steps, lr=rate, weight_decay=0.0, loss=loss)
    return student.eval()


def deployed(student: Any) -> Any:
    """The student frozen, packed, written to disk and read back."""
    freeze_(student, [as_inputs(*numbers("train", 64, seed)) for seed in (1, 2, 3)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        save_packed(pack_(student), file)
        return load_packed(file)


def shuffled_(student: Any, seed: int) -> Any:
    """Each weight's place in its row exchanged at random: as many levels of each kind, the same scales and bytes, no choice."""
    generator = torch.Generator().manual_seed(seed)
    for module in student.modules():
        if isinstance(module, LowBitLinear | LowBitEmbedding):
            order = torch.randperm(module.weight.shape[1], generator=generator)
            module.weight = nn.Parameter(module.weight.detach()[:, order])
    return student


@torch.no_grad()
def bits_per_byte(model: Any, part: str) -> float:
    """Of the words of all numbers of a part."""
    source, labels = numbers(part)
    logits = model(**as_inputs(source, labels)).logits.double()
    return float(nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)) / LOG_2


@searched(TEACHERS, arms=("teacher",), grid=GRID)
def teacher_rate(arm: str, rate: float) -> float:
    """Bits per byte of a teacher on numbers kept for the choice."""
    teacher = trained_teacher(SIZE["student_width"], SIZE["student_layers"], SIZE["teacher_steps"], 50, rate)
    return bits_per_byte(teacher, "choose")


@searched(STUDENTS, arms=tuple(arms_of(2) | arms_of(1)), grid=GRID)
def student_rate(arm: str, rate: float) -> float:
    """Bits per byte of a student on numbers kept for the choice."""
    teacher = teacher_of(SIZE["student_width"], SIZE["student_layers"], SIZE["teacher_steps"], 50)
    weights = weights_of(arm)
    return bits_per_byte(trained_student(teacher, weights, SIZE["steps"], 50, rate, **arms_of(weights)[arm]), "choose")


@cache
def rouges(weights: int, width: int, layers: int, teacher_steps: int, steps: int, seeds: int) -> dict[str, list[float]]:
    """R1 on held-out numbers by arm, one a seed: the teacher, the packed students, and students that were never trained."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        teacher = teacher_of(width, layers, teacher_steps, seed)
        models = {"teacher": teacher}
        for arm, options in arms_of(weights).items():
            rate = chosen(STUDENTS, arm).rate
            models[arm] = deployed(trained_student(teacher, weights, steps, seed, rate, **options))
        models["rounded"] = deployed(student_of(teacher, weights))
        models["shuffled"] = deployed(shuffled_(student_of(teacher, weights), seed))
        for arm, model in models.items():
            found.setdefault(arm, []).append(mean_rouge(model))
    return found


def rate_of(arm: str) -> Rate:
    """The searched rate of an arm."""
    return chosen(TEACHERS, arm) if arm == "teacher" else chosen(STUDENTS, arm)


def arms_trained(found: dict[str, list[float]]) -> dict[str, Trained]:
    """The trained arms with their floor and their rates."""
    return {
        arm: Trained(
            scores,
            constant_rouge(),
            "the same words for every number",
            rate_of(arm).rate,
            rate_of(arm).rates,
            higher_is_better=True,
            best=100.0,
        )
        for arm, scores in found.items()
        if arm not in ("rounded", "shuffled")
    }


def controls_of(found: dict[str, list[float]], weights: int) -> dict[str, list[float]]:
    """The controls: training left out, each row's levels in a random order, TWN or BWN; and what the distillation is worth."""
    own, *_, rival = arms_of(weights)
    named = {"deleted": "rounded", "random": "shuffled", "rival": rival}
    if f"{own} without distillation" in found:
        named["without distillation"] = f"{own} without distillation"
    return {control: found[arm] for control, arm in named.items()}


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return float(np.mean(values))


# -------------------------------------------------------------------------------------------------------------------- sizes

MODEL = Operator("a BART's weights at rest", free="8 bits a weight with a scale a row, as quantize_dynamic stores them")
BART_BASE = {"vocabulary": 50265, "width": 768, "layers": 6}
TINY = {"student_width": 32, "student_layers": 1, "teacher_steps": 100, "steps": 40, "seeds": 3}
POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"vocabulary": 260, "width": 64, "layers": 1} | TINY],
    "small": [BART_BASE | SIZE],
    "full": [
        BART_BASE | {"student_width": 256, "student_layers": 3, "teacher_steps": 10000, "steps": 10000, "seeds": 3}
    ],
}
STAND_INS = {
    "weights": "random ones, of which no size depends",
    "task": "numbers written out in words by small BARTs: summarising news is out of reach for models trained for seconds",
}
JUDGED = "bytes of a packed BART-base; R1 of small students on number words"


def blank_bart(vocabulary: int, width: int, layers: int) -> Any:
    """A BART of some shape with fresh weights."""
    make: Any = BartConfig
    sizes = {
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
    }
    heads = {"encoder_attention_heads": max(1, width // 64), "decoder_attention_heads": max(1, width // 64)}
    return BartForConditionalGeneration(make(vocab_size=vocabulary, d_model=width, **sizes, **heads))


def size_figure(weights: int, vocabulary: int, width: int, layers: int, found: dict[str, list[float]]) -> Figure:
    """Bytes of the fp32 model over those of the packed one, written to disk and read back."""
    own = next(iter(arms_of(weights)))
    model = blank_bart(vocabulary, width, layers)
    plain = resident_bytes(model)
    student: Any = quantize_(model, weights=weights, embeddings=weights, activations=8)
    rows = {id(m.weight): m.weight.shape for m in student.modules() if isinstance(m, LowBitLinear | LowBitEmbedding)}
    int8 = plain - sum(3 * n * k - 4 * n for n, k in rows.values())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_packed(pack_(student), file)
        on_disk = file.stat().st_size
        packed = resident_bytes(load_packed(file))
    lost = paired(found[own], found["teacher"])
    base = mean(found["teacher"])
    return Figure(
        plain / packed,
        "x",
        baseline=1.0,
        free=plain / int8,
        arms={"bfloat16": 2.0},
        quality=Quality(
            mean(found[own]),
            base,
            base + lost.low,
            base + lost.high,
            controls={name: mean(values) for name, values in controls_of(found, weights).items()},
            rival=list(arms_of(weights))[-1],
        ),
        trained=arms_trained(found),
        details={
            "resident_bytes": {"fp32": plain, "8 bits": int8, "packed": packed},
            "file_bytes": on_disk,
            "rouge_1": found,
            "operations_in_bits_against_fp32_as_counted": relative_operations(weights, 8),
        },
    )


@experiment(
    "binary_ternary_nlg/size-ternary",
    points=POINTS,
    operator=MODEL,
    guard=Guard("R1 on held-out numbers", margin=0.04, higher_is_better=True),
    paper=BART_BASE,
    departures=STAND_INS,
    refuted_if="the packed model takes as many bytes as the fp32 one",
    measured_here=JUDGED,
    minutes=30,
)
def size_ternary(
    vocabulary: int,
    width: int,
    layers: int,
    student_width: int,
    student_layers: int,
    teacher_steps: int,
    steps: int,
    seeds: int,
) -> Figure:
    """2-2-8: ternary weights and embeddings, activations of 8 bits. The margin is the paper's own loss, 3.2 % of R1, and a quarter more."""
    found = rouges(2, student_width, student_layers, teacher_steps, steps, seeds)
    return size_figure(2, vocabulary, width, layers, found)


@experiment(
    "binary_ternary_nlg/size-binary",
    points=POINTS,
    operator=MODEL,
    guard=Guard("R1 on held-out numbers", margin=0.0625, higher_is_better=True),
    paper=BART_BASE,
    departures=STAND_INS,
    refuted_if="the packed model takes as many bytes as the fp32 one",
    measured_here=JUDGED,
    minutes=30,
)
def size_binary(
    vocabulary: int,
    width: int,
    layers: int,
    student_width: int,
    student_layers: int,
    teacher_steps: int,
    steps: int,
    seeds: int,
) -> Figure:
    """1-1-8: binary weights and embeddings, activations of 8 bits. The margin is the paper's own loss, 5.0 % of R1, and a quarter more."""
    found = rouges(1, student_width, student_layers, teacher_steps, steps, seeds)
    return size_figure(1, vocabulary, width, layers, found)


@experiment(
    "binary_ternary_nlg/rouge-ternary",
    points={
        "smoke": [TINY],
        "small": [SIZE],
        "full": [{"student_width": 256, "student_layers": 3, "teacher_steps": 10000, "steps": 10000, "seeds": 3}],
    },
    operator=Operator("a sequence-to-sequence model of 2 bits a weight", free="TWN, trained without distillation"),
    paper={
        "data": "CNN/DailyMail",
        "model": "BART-base",
        "weights": 2,
        "embeddings": 2,
        "activations": 8,
        "epochs": 20,
    },
    departures={
        "data": "numbers written out in words: summarising news is out of reach for models trained for seconds",
        "model": "a BART of width 64 with one layer in encoder and decoder, which learns the task in seconds",
        "epochs": "100 steps, some four times through the numbers, with a rate searched for so short a training",
    },
    refuted_if="the whole 95 % interval of the share of R1 that is kept lies below 0.968 to the power 1.25, 0.960",
    measured_here="share of R1 kept on held-out number words",
    minutes=30,
)
def rouge_ternary(student_width: int, student_layers: int, teacher_steps: int, steps: int, seeds: int) -> Figure:
    """ROUGE-1 of the packed 2-2-8 student over that of its fp32 teacher, on held-out numbers; the interval is over seeds.

    Controls, as shares kept too: the teacher rounded without any training, the levels of each row in a random order, and TWN.
    """
    found = rouges(2, student_width, student_layers, teacher_steps, steps, seeds)

    def kept(values: list[float]) -> list[float]:
        return [a / max(b, 1e-9) for a, b in zip(values, found["teacher"], strict=True)]

    share = paired(kept(found["2-2-8"]), [0.0] * seeds)
    controls = {name: mean(kept(values)) for name, values in controls_of(found, 2).items()}
    return Figure(
        share.median,
        "x",
        share.low,
        share.high,
        baseline=1.0,
        free=controls["rival"],
        controls={name: controls[name] for name in ("deleted", "random", "rival")},
        arms={"2-2-8 without distillation": controls["without distillation"]},
        trained=arms_trained(found),
        details={"rouge_1": found},
    )
