"""PIE: how much of the time of repairing a cache after an edit is saved, and what the next tokens notice of it.

Contexts are real sources of the standard library. The text before the edit lacks a run of tokens (insertion), has one more
(deletion), or another one in its place (edit); the text after it is the real one. The edit lies close before the cursor, where
it matters: far away, ignoring it altogether does as well.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from assay.experiments.core import Figure, Quality, Trial, experiment
from assay.measure.stats import bootstrap
from assay.methods.attention.pie_positional_integrity import EditableContext
from assay.workloads.models import load_model
from assay.workloads.text import long_prompt

MODEL = "smollm2-135m"
AHEAD = 64  # tokens behind the cursor that the repaired cache is judged on
Kind = Literal["insert", "delete", "edit"]


def scene(tokenizer: Any, tokens: int, size: int, behind: int, kind: Kind, seed: int = 0) -> dict[str, Any]:
    """A context of `tokens` real tokens, and what it was before an edit of `size` tokens that ends `behind` tokens before its end."""
    text = long_prompt(tokenizer, tokens + AHEAD, seed=seed)[0]
    other = long_prompt(tokenizer, size, seed=seed + 1000)[0]
    new, start = text[:tokens], tokens - behind - size
    run = new[start : start + size]
    if kind == "insert":
        return {
            "old": torch.cat([new[:start], new[start + size :]]),
            "new": new,
            "at": (start, start, run),
            "ahead": text[tokens:],
        }
    if kind == "edit":
        old = torch.cat([new[:start], other, new[start + size :]])
        return {"old": old, "new": new, "at": (start, start + size, run), "ahead": text[tokens:]}
    old = torch.cat([new[: start + size], other, new[start + size :]])
    return {"old": old, "new": new, "at": (start + size, start + 2 * size, run[:0]), "ahead": text[tokens:]}


@torch.no_grad()
def _ahead(context: EditableContext, ahead: Tensor) -> Tensor:
    """Log-probabilities (AHEAD, vocabulary) of the tokens behind the cursor, the real ones fed."""
    rest = torch.cat([context.ids[-1:], ahead])[None, :-1]
    logits: Tensor = context.model(input_ids=rest, cache=context.cache(), use_cache=True).logits[0]
    return logits.float().log_softmax(-1)


def _from_the_edit_on(stale: EditableContext, start: int, stop: int, run: Tensor) -> EditableContext:
    """The exact way that is free: keep what stands before the edit and run everything behind it again."""
    fresh = stale.fork()
    fresh.edit(start, stop, run, recompute=len(stale) - stop)
    return fresh


@experiment(
    "pie_positional_integrity/kv-update-overhead",
    points={
        "smoke": [{"tokens": 256, "size": 30, "behind": 64, "kind": "insert"}],
        "small": [
            {"tokens": n, "size": size, "behind": behind, "kind": kind}
            for n, size, behind, kind in (
                (1024, 60, 96, "delete"),
                (1024, 60, 96, "edit"),
                (1024, 60, 500, "insert"),
                (4096, 60, 2048, "insert"),
                (1024, 60, 96, "insert"),
            )
        ],
        "full": [
            {"tokens": n, "size": size, "behind": int(share * n), "kind": kind}
            for n in (1024, 4096, 8000)
            for size in (12, 60, 240)
            for share in (0.1, 0.5, 0.9)
            for kind in ("insert", "delete", "edit")
            if share * n + 2 * size < n
        ],
    },
    minutes=10,
)
def kv_update_overhead(tokens: int, size: int, behind: int, kind: Kind) -> Trial:
    """Repairing the cache against computing all of it, and against computing it from the edit on (free and exact)."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    found = scene(loaded.tokenizer, tokens, size, behind, kind)
    stale = EditableContext(loaded.model, found["old"])
    start, stop, run = found["at"]

    def repair(rotate: bool = True) -> EditableContext:
        context = stale.fork()
        context.edit(start, stop, run, rotate=rotate)
        return context

    exact = EditableContext(loaded.model, found["new"])

    def divergences() -> dict[str, dict[str, float]]:
        truth = _ahead(exact, found["ahead"])
        ways = {"pie": repair(), "conflict": repair(rotate=False), "stale": stale, "recompute 32": stale.fork()}
        ways["recompute 32"].edit(start, stop, run, recompute=32)
        result = {}
        for name, context in ways.items():
            guess = _ahead(context, found["ahead"])
            kl = (truth.exp() * (truth - guess)).sum(-1)
            same = (truth.argmax(-1) == guess.argmax(-1)).double().mean()
            result[name] = {"kl": float(kl.mean()), "kl_first_token": float(kl[0]), "top1_agreement": float(same)}
        return result

    seen = divergences()
    return Trial(
        baseline=exact.refresh,
        candidate=repair,
        free=lambda: _from_the_edit_on(stale, start, stop, run),
        free_label="computing the cache from the edit on",
        quality=lambda: Quality(
            "KL to full recomputation, nats a token", seen["pie"]["kl"], 0.0, higher_is_better=False
        ),
        details={
            "divergence over the next 64 tokens": seen,
            "tokens": tokens,
            "new_tokens": len(run),
            "suffix": behind,
        },
        pairs=6,
    )


@experiment(
    "pie_positional_integrity/exact-match-loss",
    points={
        "smoke": [{"tokens": 256, "size": 30, "behind": 64, "sites": 2}],
        "small": [{"tokens": 768, "size": 60, "behind": 96, "sites": 96}],
        "full": [{"tokens": 4096, "size": 60, "behind": behind, "sites": 100} for behind in (96, 1024)],
    },
    minutes=20,
)
def edit_similarity_loss(tokens: int, size: int, behind: int, sites: int) -> Figure:
    """Points of edit similarity (to the real continuation, 24 greedy tokens) lost after an insertion against full recomputation.

    The baseline is what the "conflict" encoding loses; what a cache loses that ignores the edit stands in the details.
    """
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    ways = ("full recomputation", "pie", "conflict", "stale")
    scores: dict[str, list[float]] = {way: [] for way in ways}
    same: dict[str, list[bool]] = {way: [] for way in ways}
    for site in range(sites):
        found = scene(loaded.tokenizer, tokens, size, behind, "insert", seed=site)
        truth = loaded.tokenizer.decode(found["ahead"][:24])
        stale = EditableContext(loaded.model, found["old"])
        pie, conflict = stale.fork(), stale.fork()
        pie.edit(*found["at"])
        conflict.edit(*found["at"], rotate=False)
        exact = EditableContext(loaded.model, found["new"])
        texts = [loaded.tokenizer.decode(context.complete(24)) for context in (exact, pie, conflict, stale)]
        for way, text in zip(ways, texts, strict=True):
            matcher = difflib.SequenceMatcher(None, truth, text, autojunk=False)
            scores[way].append(100 * matcher.ratio())
            same[way].append(text == texts[0])
    lost = {way: np.subtract(scores["full recomputation"], scores[way]) for way in ways[1:]}
    loss = bootstrap(lost["pie"], np.mean)
    details = {
        "edit similarity": {way: float(np.mean(found)) for way, found in scores.items()},
        "same completion as full recomputation, %": {way: 100 * float(np.mean(found)) for way, found in same.items()},
        "sites": sites,
    }
    conflict_loss = float(lost["conflict"].mean())
    return Figure(loss.median, "points", low=loss.low, high=loss.high, baseline=conflict_loss, details=details)
