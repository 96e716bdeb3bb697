"""What the experiments about the attention of long prompts share: the model, its documents, exact attention, perplexity.

Queries, keys and values are those of layers of SmolLM2-135M on real text (random ones have no structure to find). The documents are
windows of held-out text that do not overlap, sources and English in turn; intervals resample them, never their tokens. A second
model is the same with seeded noise added to its weights, which otherwise lie on the grid of a 4-bit file.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Operator, Quality
from assay.measure.stats import student_t
from assay.methods.core.attention.plan import AttentionPlan, execute
from assay.workloads.attention import QKV, Attend, attended_by, captured_qkv
from assay.workloads.models import load_model
from assay.workloads.text import heldout_windows

MODEL = "smollm2-135m"
LAYERS = (2, 9, 16, 23)  # of 30, that are timed; our choice
NOISE = 0.02  # of the second model, as a share of the standard deviation of each weight matrix; our choice
ATTENTION = Operator("attention", free="torch's SDPA", exact="assay's exact dense kernel")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def device() -> str:
    """Where XAttention is measured; SageAttention2's kernel runs on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def model_and_documents(tokens: int, documents: int, where: str = "cpu") -> tuple[Any, Tensor]:
    """SmolLM2-135M in bfloat16, and int64 (documents, tokens) of held-out text; loaded once, then kept."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    return loaded.model.to(where), heldout_windows(loaded.tokenizer, window=tokens, n=documents).to(where)


@functools.cache
def off_the_grid(tokens: int, documents: int, where: str = "cpu") -> Any:
    """A copy of the model whose matrices have normal noise added, of `NOISE` times their standard deviation, seeded."""
    model = copy.deepcopy(model_and_documents(tokens, documents, where)[0])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data += (noise * parameter.std() * NOISE).to(parameter.dtype)
    return model


@functools.cache
def captured_layers(tokens: int, documents: int, where: str = "cpu") -> list[QKV]:
    """(q, k, v) of `LAYERS` on the first of the documents, bfloat16, after rotary embedding; read once, then kept."""
    model, ids = model_and_documents(tokens, documents, where)
    return captured_qkv(model, ids[:1], layers=LAYERS)


def over_layers(layers: Sequence[QKV], attention: Attention) -> list[Tensor]:
    """The outputs of `attention(q, k, v)` for each layer."""
    return [attention(q, k, v) for q, k, v in layers]


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt by torch's SDPA, grouped heads allowed: (batch, heads, tokens, dim)."""
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out


def causal_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by assay's own exact kernel."""
    return execute(AttentionPlan(q.shape[2], k.shape[2]), q, k, v)


def mean_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention deleted: each query gets the mean of the values up to its own."""
    seen = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    return (v.float().cumsum(2) / seen).to(v.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root of the squared error of all tensors, as a share of that of the expected ones."""
    off = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return float((off / sum(b.double().square().sum() for b in expected)) ** 0.5)


# ----------------------------------------------------------------------------------------------------------- perplexity


def losses(model: Any, documents: Tensor, attend: Attend) -> list[float]:
    """Negative log-likelihood of the last quarter of each document, nats a token, with attention by `attend(layer, q, k, v)`."""
    found = []
    with attended_by(model, attend), torch.no_grad():
        for ids in documents:
            start = 3 * len(ids) // 4
            hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, start - 1 : -1]
            found.append(float(F.cross_entropy(model.lm_head(hidden).float(), ids[start:]).double()))
    return found


@dataclass(frozen=True)
class Rise:
    """Rise of perplexity over exact attention, in per cent, with a 95 % interval over documents; `exact` is the perplexity there."""

    value: float
    low: float
    high: float
    exact: float
    each: tuple[float, ...]  # of each document, per cent


def rise(found: Sequence[float], exact: Sequence[float], *, shift: float = 0.0) -> Rise:
    """The rise from `exact` to `found`, losses of the same documents, by Student's t over their differences, `shift` nats added.

    Raises ValueError for fewer than two documents: they have no spread.

    >>> rise([2.0, 2.1, 2.2], [1.99, 2.09, 2.19]).value  # a hundredth of a nat everywhere
    1.005
    """
    if len(found) != len(exact) or len(found) < 2:
        raise ValueError(
            f"found and exact must be losses of the same two documents or more, got {len(found)} and {len(exact)}"
        )
    differences = torch.tensor(found, dtype=torch.float64) - torch.tensor(exact, dtype=torch.float64)
    mean = float(differences.mean()) + shift
    half = student_t(0.95, len(found) - 1) * float(differences.std()) / len(found) ** 0.5
    value, low, high = (float(f"{100 * math.expm1(x):.5g}") for x in (mean, mean - half, mean + half))
    each = tuple(float(f"{100 * math.expm1(x):.4g}") for x in differences.tolist())
    return Rise(value, low, high, math.exp(sum(exact) / len(exact)), each)


def perplexity_rises(
    tokens: int, documents: int, arms: Mapping[str, tuple[Attend, int]], *, where: str = "cpu", perturbed: bool = False
) -> dict[str, Rise]:
    """`rise` of each arm, a function and the number of documents (the first ones) that it is judged on, in all layers.

    Perplexity is that of the last quarter of the documents; each arm is paired with exact attention. The first arm, the method, has the
    most documents; an arm that has fewer is shown at what it costs over the method on those. `perturbed` takes the second model.
    """
    model, ids = model_and_documents(tokens, documents, where)
    if perturbed:
        model = off_the_grid(tokens, documents, where)
    most = max(count for _, count in arms.values())
    exact = losses(model, ids[:most], lambda layer, q, k, v: causal_dense(q, k, v))
    found = {name: losses(model, ids[:count], arm) for name, (arm, count) in arms.items()}
    return against(found, exact)


def against(found: Mapping[str, Sequence[float]], exact: Sequence[float]) -> dict[str, Rise]:
    """`rise` of each arm's losses; those with fewer documents are moved by what the first arm differs between these and all.

    >>> moved = against({"method": [1.1, 1.1, 1.4, 1.4], "rival": [1.2, 1.2]}, [1.0, 1.0, 1.0, 1.0])
    >>> moved["method"].value, moved["rival"].value  # exp(0.25), and a tenth of a nat more
    (28.403, 41.907)
    """
    method = next(iter(found.values()))
    gaps = [a - b for a, b in zip(method, exact, strict=True)]
    rises = {}
    for name, each in found.items():
        few = len(each)
        shift = sum(gaps) / len(gaps) - sum(gaps[:few]) / few
        rises[name] = rise(each, exact[:few], shift=shift if few < len(gaps) else 0.0)
    return rises


def perplexity_quality(rises: Mapping[str, Rise], method: str, *, rival: str) -> Quality:
    """The quality of `method`, with the other arms as controls."""
    exact, found = rises[method].exact, rises[method]
    candidate, low, high = (exact * (1 + x / 100) for x in (found.value, found.low, found.high))
    controls = {name: exact * (1 + each.value / 100) for name, each in rises.items() if name != method}
    return Quality(candidate, exact, low, high, controls, rival)
