"""XAttention: how much faster is prefill attention on real queries and keys, and what does the model lose?

Queries, keys and values are those of layers of SmolLM2-135M on real text (random ones have no structure to find). Scoring and
selecting blocks count in the candidate's time. SmolLM2 was trained on 8192 tokens; the paper's 256k are out of its reach.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.stats import Interval, bootstrap
from assay.methods.attention.xattention import block_scores, select, transform, xattention, xattention_plan
from assay.methods.builtin import attention_backend
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.methods.transform import TuneContext
from assay.workloads.attention import QKV, captured_qkv
from assay.workloads.models import load_model
from assay.workloads.text import long_prompt

MODEL = "smollm2-135m"
LAYERS = (2, 9, 16, 23)  # of 30; our choice
Kind = Literal["code", "english"]


@functools.cache
def model_and_prompt(tokens: int, kind: Kind) -> tuple[Any, Tensor]:
    """SmolLM2-135M in bfloat16 and `tokens` token ids of real text; loaded once, then kept: copy the model to change it."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    return loaded.model, long_prompt(loaded.tokenizer, tokens, kind=kind)


@functools.cache
def captured_layers(tokens: int, kind: Kind) -> list[QKV]:
    """(q, k, v) of `LAYERS` on `tokens` tokens of real text, bfloat16, after rotary embedding; read once, then kept."""
    model, ids = model_and_prompt(tokens, kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [(q.to(device), k.to(device), v.to(device)) for q, k, v in captured_qkv(model, ids, layers=LAYERS)]


def over_layers(layers: list[QKV], attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """The outputs of `attention(q, k, v)` for each layer."""
    return [attention(q, k, v) for q, k, v in layers]


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt by torch's SDPA, grouped heads allowed: (batch, heads, tokens, dim)."""
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out


def causal_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by assay's own exact kernel."""
    return execute(AttentionPlan(q.shape[2], k.shape[2]), q, k, v)


def _relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    off = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return float((off / sum(b.double().square().sum() for b in expected)) ** 0.5)


def pooled_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Block scores of the simplest kind: softmax over the products of mean queries and mean keys, causal."""
    blocks = -(-q.shape[2] // block)
    padded = (F.pad(x.float(), (0, 0, 0, blocks * block - x.shape[2])) for x in (q, k))
    query, key = (x.view(*x.shape[:2], blocks, block, -1).mean(3) for x in padded)
    scores = query @ key.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[3] ** -0.5
    above = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(above, -torch.inf), -1)


def best_of_each_row(scores: Tensor, like: Tensor) -> Tensor:
    """As many blocks in each row as `like` keeps: first the sink and the diagonal, then those that score highest."""
    blocks = scores.shape[-1]
    forced = torch.eye(blocks, dtype=torch.bool, device=scores.device)
    forced[:, 0] = True
    above = torch.ones_like(forced).triu(1)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(above, -torch.inf).argsort(-1, descending=True)
    wanted = torch.arange(blocks, device=scores.device) < like.sum(-1, keepdim=True)
    return torch.zeros_like(like).scatter(-1, ranked, wanted)


def recalls(q: Tensor, k: Tensor, *, tau: float, stride: int, block: int) -> dict[str, float]:
    """Share of the exact softmax mass in the blocks XAttention keeps, and in as many blocks of each row chosen otherwise."""
    mass = block_scores(q, k, stride=1, block=block)
    kept = select(block_scores(q, k, stride=stride, block=block), tau=tau)
    distance = -torch.arange(kept.shape[-1], device=q.device)[:, None] + torch.arange(kept.shape[-1], device=q.device)
    chosen = {
        "xattention": kept,
        "best possible": best_of_each_row(mass, kept),
        "sliding window and sink": best_of_each_row(distance.float().expand(kept.shape), kept),
        "mean-pooled scores": best_of_each_row(pooled_scores(q, k, block), kept),
        "diagonals": best_of_each_row(block_scores(q, k, stride=stride, block=block, order="slash"), kept),
        "random pairs": best_of_each_row(block_scores(q, k, stride=stride, block=block, order="random"), kept),
    }
    return {name: float((mass * mask).sum() / mass.sum()) for name, mask in chosen.items()}


@experiment(
    "xattention/attention-speedup",
    points={
        "smoke": [{"tokens": 1024, "tau": 0.9, "stride": 8, "block": 64}],
        "small": [
            *({"tokens": n, "tau": 0.9, "stride": 8, "block": 128} for n in (2048, 4096, 8000)),
            *({"tokens": n, "tau": 0.95, "stride": 8, "block": 64} for n in (2048, 8000)),
        ],
        "full": [
            {"tokens": 8192, "tau": tau, "stride": stride, "block": block, "kind": kind}
            for kind in ("code", "english")
            for tau in (0.8, 0.9, 0.95)
            for stride in (4, 8, 16)
            for block in (64, 128)
        ],
    },
    minutes=15,
)
def attention_speedup(tokens: int, tau: float, stride: int, block: int, kind: Kind = "code") -> Trial:
    """Attention of four layers in bfloat16: SDPA, the exact kernel (free), and XAttention with its scores and selection.

    The quality is the model's: perplexity of the text's last quarter with XAttention in all layers, against exact attention.
    """
    layers = captured_layers(tokens, kind)
    settings: dict[str, Any] = {"tau": tau, "stride": stride, "block": block}

    def quality() -> Quality:
        dense, rise = sparse_perplexity(tokens, kind, settings)
        low, median, high = (dense * (1 + x / 100) for x in (rise.low, rise.median, rise.high))
        return Quality("perplexity", median, dense, low, high, higher_is_better=False)

    def details() -> dict[str, Any]:
        expected = over_layers(layers, causal_dense)
        error = _relative_error(over_layers(layers, functools.partial(xattention, **settings)), expected)
        rounding = _relative_error(over_layers(layers, causal_sdpa), expected)
        begin = time.perf_counter()
        plans = [xattention_plan(q, k, **settings) for q, k, _ in layers]
        planning = time.perf_counter() - begin
        density = sum(plan.density() for plan in plans) / len(plans)
        found = [recalls(q, k, **settings) for q, k, _ in layers]
        return {
            "density": density,
            "bound": 1 / density,  # of the speed-up over the exact kernel, were scores and selection free
            "planning_seconds": planning,
            "layers": list(LAYERS),
            "relative_error_of_the_output": {"xattention": error, "bfloat16 rounding": rounding},
            "recall": {name: sum(each[name] for each in found) / len(found) for name in found[0]},
        }

    return Trial(
        baseline=lambda: over_layers(layers, causal_sdpa),
        candidate=lambda: over_layers(layers, functools.partial(xattention, **settings)),
        free=lambda: over_layers(layers, causal_dense),
        free_label="exact attention by assay's own kernel",
        quality=quality,
        details=details,
        pairs=6,
    )


def _losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token of the last quarter, nats."""
    start = 3 * ids.shape[1] // 4
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state[0, start - 1 : -1]
        return F.cross_entropy(model.lm_head(hidden).float(), ids[0, start:], reduction="none")


@functools.cache
def _exact_losses(tokens: int, kind: Kind) -> Tensor:
    model, ids = model_and_prompt(tokens, kind)
    model = copy.deepcopy(model)
    attention_backend.register()
    model.set_attn_implementation(attention_backend.NAME)
    return _losses(model, ids)


def perplexity_rise(tokens: int, kind: Kind, replace: Callable[[Any], Any]) -> tuple[float, Interval]:
    """Perplexity of the last quarter of the text with exact attention, and its rise in per cent in the model `replace` makes.

    `replace` gets a copy of the model. The interval resamples runs of 25 tokens, which are alike.
    """
    model, ids = model_and_prompt(tokens, kind)
    dense = _exact_losses(tokens, kind)
    difference = _losses(replace(copy.deepcopy(model)), ids) - dense
    runs = difference[: len(difference) // 25 * 25].view(-1, 25).mean(1).double()
    rise = bootstrap(runs.numpy(), lambda x, axis: 100 * (torch.from_numpy(x.mean(axis=axis)).exp() - 1).numpy())
    return float(dense.double().mean().exp()), rise


def sparse_perplexity(tokens: int, kind: Kind, config: dict[str, Any]) -> tuple[float, Interval]:
    """`perplexity_rise` with XAttention in all layers."""
    return perplexity_rise(tokens, kind, lambda model: transform.apply(model, config, TuneContext("ttft", tokens, 1)))


@experiment(
    "xattention/perplexity",
    points={
        "smoke": [{"tokens": 1024, "tau": 0.9, "stride": 8, "block": 64}],
        "small": [{"tokens": 8000, "tau": tau, "stride": 8, "block": 64} for tau in (0.8, 0.9, 0.95, 0.98)],
        "full": [
            {"tokens": 8000, "tau": tau, "stride": stride, "block": block, "kind": kind}
            for kind in ("code", "english")
            for tau in (0.8, 0.9, 0.95, 0.98)
            for stride in (4, 8, 16)
            for block in (64, 128)
        ],
    },
)
def perplexity(tokens: int, tau: float, stride: int, block: int, kind: Kind = "code") -> Figure:
    """How much the perplexity of the last quarter of a long text rises when all layers attend sparsely, in bfloat16.

    The interval resamples runs of 25 tokens, which are alike.
    """
    config = {"tau": tau, "stride": stride, "block": block}
    dense, rise = sparse_perplexity(tokens, kind, config)
    details = {"dense_perplexity": dense, "tokens_judged": tokens // 4, **config}
    return Figure(rise.median, "%", low=rise.low, high=rise.high, details=details)
