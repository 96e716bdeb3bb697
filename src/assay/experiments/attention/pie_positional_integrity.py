"""PIE: how much time repairing a cache after an edit saves, and how the repair affects the next tokens.

Contexts are real sources of the standard library. The text before the edit lacks a run of tokens (insertion), has an extra one
(deletion), or has a different one in its place (edit); the text after it is the real one. At arbitrary places the edit hardly
matters: a cache that ignores it predicts what follows just as well, so only the conflict encoding can be told apart there. Two more
kinds of scene are chosen so that the edit does matter: it brings in a definition (define) or renames it (rename), and the name is
used right after the cursor and appears nowhere else.

In those scenes the new tokens hold the name in fresh keys, from which PIE, unlike a stale cache, can copy it. PIE still falls
short of full recomputation, most where a definition was inserted. A rename moves the suffix little, so the conflict encoding does
better there than elsewhere. Not covered: edits whose meaning reaches the cursor only through the suffix.
"""

from __future__ import annotations

import difflib
import random
import re
from functools import cache
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
AHEAD = 64  # tokens after the cursor that the repaired cache is judged on
TEXT = 400_000  # tokens of the sources that are searched for sites
DEFINITION = re.compile(r"^ *(?:(?:def|class) +(?=\w+\(|\w+:)|(?:self\.)?(?=\w+ *=(?!=)))(\w{4,})", re.MULTILINE)
Kind = Literal["insert", "delete", "edit", "define", "rename"]


def scene(tokenizer: Any, tokens: int, size: int, behind: int, kind: Kind, seed: int = 0) -> dict[str, Any]:
    """A context of `tokens` real tokens, and what it was before an edit of `size` tokens that ends `behind` tokens before its end.

    "insert", "delete" and "edit" take the place that comes. "define" is an insertion and "rename" an edit where it matters: they
    bring in a name that appears nowhere else in the context and is used right after the cursor.
    """
    if kind in ("define", "rename"):
        return _named_scene(tokenizer, tokens, size, behind, kind, seed)
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


@cache
def _named_sites(tokenizer: Any, tokens: int, size: int, behind: int) -> tuple[Tensor, list[tuple[int, int, str]]]:
    """The text and, in a random order, (cursor, number of tokens behind it that spell the name, name) of every site in it.

    There a name is defined within the `size` tokens that end `behind` tokens before the cursor, is used again at the cursor, and
    stands nowhere else in the context.
    """
    text = long_prompt(tokenizer, TEXT)[0]
    pieces = tokenizer.batch_decode(text[:, None])
    source, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])

    def token_at(character: int) -> int:
        return int(np.searchsorted(ends, character, side="right"))

    sites: dict[int, tuple[int, int, str]] = {}
    for match in DEFINITION.finditer(source):
        name, end = match[1], match.end(1)
        use = source.find(name, end, end + 40 * (behind + size))
        cursor, stop = token_at(use), token_at(use + len(name) - 1) + 1
        start = cursor - behind - size
        if use < 0 or cursor < tokens or not stop <= cursor + AHEAD <= len(text):
            continue
        if not start <= token_at(match.start(1)) <= token_at(end - 1) < start + size:
            continue
        whole = re.fullmatch(rf"\W{name}\W", source[use - 1 : use + len(name) + 1])
        begin = ends[cursor - tokens] - len(pieces[cursor - tokens])
        if whole and name not in source[begin : match.start(1)]:
            sites[cursor] = (cursor, stop - cursor, name)
    found = list(sites.values())
    random.Random(0).shuffle(found)
    return text, found


def _named_scene(tokenizer: Any, tokens: int, size: int, behind: int, kind: Kind, seed: int) -> dict[str, Any]:
    text, sites = _named_sites(tokenizer, tokens, size, behind)
    if seed >= len(sites):
        raise ValueError(f"seed must be below {len(sites)}, the number of sites with a name, got {seed}")
    cursor, length, name = sites[seed]
    new, start = text[cursor - tokens : cursor], tokens - behind - size
    run = new[start : start + size]
    was = run[:0]
    if kind == "rename":
        other = next(other for *_, other in sites[seed:] + sites[:seed] if other != name)
        was = torch.tensor(tokenizer(tokenizer.decode(run).replace(name, other), add_special_tokens=False)["input_ids"])
    return {
        "old": torch.cat([new[:start], was, new[start + size :]]),
        "new": new,
        "at": (start, start + len(was), run),
        "ahead": text[cursor : cursor + AHEAD],
        "name": slice(length),
    }


@torch.no_grad()
def _ahead(context: EditableContext, ahead: Tensor) -> Tensor:
    """Log-probabilities (AHEAD, vocabulary) of the tokens after the cursor, with the real ones as input."""
    rest = torch.cat([context.ids[-1:], ahead])[None, :-1]
    logits: Tensor = context.model(input_ids=rest, cache=context.cache(), use_cache=True).logits[0]
    return logits.float().log_softmax(-1)


def _from_the_edit_on(stale: EditableContext, start: int, stop: int, run: Tensor) -> EditableContext:
    """The free exact alternative: keep everything before the edit and run everything after it again."""
    fresh = stale.fork()
    fresh.edit(start, stop, run, recompute=len(stale) - stop)
    return fresh


def _repaired(stale: EditableContext, at: tuple[int, int, Tensor], **options: Any) -> EditableContext:
    context = stale.fork()
    context.edit(*at, **options)
    return context


def _divergences(model: Any, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far each way of following the edit is from full recomputation; `_name`: on the tokens that spell the scene's name."""
    exact, stale = EditableContext(model, found["new"]), EditableContext(model, found["old"])
    ways = {
        "full recomputation": exact,
        "pie": _repaired(stale, found["at"]),
        "conflict": _repaired(stale, found["at"], rotate=False),
        "stale": stale,
        "recompute 32": _repaired(stale, found["at"], recompute=32),
    }
    truth = _ahead(exact, found["ahead"])
    result = {}
    for way, context in ways.items():
        guess = _ahead(context, found["ahead"])
        kl = (truth.exp() * (truth - guess)).sum(-1)
        nll = -guess.gather(1, found["ahead"][:, None])[:, 0]
        result[way] = {
            "kl": float(kl.mean()),
            "kl_first_token": float(kl[0]),
            "top1_agreement": float((truth.argmax(-1) == guess.argmax(-1)).double().mean()),
            "nll": float(nll.mean()),
        }
        if "name" in found:
            result[way] |= {"kl_name": float(kl[found["name"]].mean()), "nll_name": float(nll[found["name"]].mean())}
    return result


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
        ]
        + [{"tokens": 1024, "size": 60, "behind": 96, "kind": kind, "sites": 6} for kind in ("rename", "define")],
        "full": [
            {"tokens": n, "size": size, "behind": int(share * n), "kind": kind}
            for n in (1024, 4096, 8000)
            for size in (12, 60, 240)
            for share in (0.1, 0.5, 0.9)
            for kind in ("insert", "delete", "edit")
            if share * n + 2 * size < n
        ]
        + [
            {"tokens": n, "size": 60, "behind": 96, "kind": kind, "sites": 64}
            for n in (1024, 4096, 8000)
            for kind in ("rename", "define")
        ],
    },
    minutes=10,
)
def kv_update_overhead(tokens: int, size: int, behind: int, kind: Kind, sites: int = 1) -> Trial:
    """Repairing the cache against computing all of it, and against computing it from the edit on (free and exact).

    The times are those of the first site, the divergences means over all.
    """
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    found = scene(loaded.tokenizer, tokens, size, behind, kind)
    stale = EditableContext(loaded.model, found["old"])
    exact = EditableContext(loaded.model, found["new"])
    start, stop, run = found["at"]
    scenes = [found, *(scene(loaded.tokenizer, tokens, size, behind, kind, seed=seed) for seed in range(1, sites))]
    seen = [_divergences(loaded.model, each) for each in scenes]
    means = {
        way: {figure: float(np.mean([site[way][figure] for site in seen])) for figure in seen[0][way]}
        for way in seen[0]
    }
    kl = bootstrap([site["pie"]["kl"] for site in seen], np.mean) if sites > 1 else None
    return Trial(
        baseline=exact.refresh,
        candidate=lambda: _repaired(stale, found["at"]),
        free=lambda: _from_the_edit_on(stale, start, stop, run),
        free_label="computing the cache from the edit on",
        quality=lambda: Quality(
            "KL to full recomputation, nats a token",
            means["pie"]["kl"],
            0.0,
            low=None if kl is None else kl.low,
            high=None if kl is None else kl.high,
            higher_is_better=False,
        ),
        details={
            f"divergence over the next {AHEAD} tokens": means,
            "tokens": tokens,
            "new_tokens": len(run),
            "suffix": behind,
            "sites": sites,
        },
        pairs=6,
    )


@experiment(
    "pie_positional_integrity/exact-match-loss",
    points={
        "smoke": [{"tokens": 256, "size": 30, "behind": 64, "kind": "define", "sites": 2}],
        "small": [
            {"tokens": 768, "size": 60, "behind": 96, "kind": kind, "sites": sites}
            for kind, sites in (("insert", 16), ("define", 40))
        ],
        "full": [
            {"tokens": 4096, "size": 60, "behind": behind, "kind": kind, "sites": 100}
            for behind, kind in ((96, "insert"), (1024, "insert"), (96, "rename"), (96, "define"))
        ],
    },
    minutes=20,
)
def edit_similarity_loss(tokens: int, size: int, behind: int, kind: Kind, sites: int) -> Figure:
    """Points of edit similarity (to the real continuation, 24 greedy tokens) lost after an edit against full recomputation.

    The baseline is what the "conflict" encoding loses; what a cache loses that ignores the edit stands in the details.
    """
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    ways = ("full recomputation", "pie", "conflict", "stale")
    scores: dict[str, list[float]] = {way: [] for way in ways}
    same: dict[str, list[bool]] = {way: [] for way in ways}
    named: dict[str, list[bool]] = {way: [] for way in ways}
    for site in range(sites):
        found = scene(loaded.tokenizer, tokens, size, behind, kind, seed=site)
        truth = loaded.tokenizer.decode(found["ahead"][:24])
        stale = EditableContext(loaded.model, found["old"])
        pie, conflict = _repaired(stale, found["at"]), _repaired(stale, found["at"], rotate=False)
        exact = EditableContext(loaded.model, found["new"])
        texts = [loaded.tokenizer.decode(context.complete(24)) for context in (exact, pie, conflict, stale)]
        for way, text in zip(ways, texts, strict=True):
            matcher = difflib.SequenceMatcher(None, truth, text, autojunk=False)
            scores[way].append(100 * matcher.ratio())
            same[way].append(text == texts[0])
            if "name" in found:
                named[way].append(text.startswith(loaded.tokenizer.decode(found["ahead"][found["name"]])))
    lost = {way: np.subtract(scores["full recomputation"], scores[way]) for way in ways[1:]}
    loss = bootstrap(lost["pie"], np.mean)
    details = {
        "edit similarity": {way: float(np.mean(found)) for way, found in scores.items()},
        "same completion as full recomputation, %": {way: 100 * float(np.mean(found)) for way, found in same.items()},
        "lost against full recomputation": {way: float(found.mean()) for way, found in lost.items()},
        "sites": sites,
    }
    if all(named.values()):
        details["completions that begin with the name, %"] = {
            way: 100 * float(np.mean(found)) for way, found in named.items()
        }
    conflict_loss = float(lost["conflict"].mean())
    return Figure(loss.median, "points", low=loss.low, high=loss.high, baseline=conflict_loss, details=details)
