"""Judging a chosen candidate against the model as loaded, on text that the search did not see; runs in a child process.

Both models are in one process and run over one document after the other. The rule is `assay.tuner.noninferiority`'s: how many
documents there are to be is settled after two of them, by the time they took and by nothing else.
"""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from assay.measure.stats import Interval
from assay.tuner.evaluation import evaluate
from assay.tuner.noninferiority import LEAST_DOCUMENTS, look, looks, mean_interval, shares
from assay.tuner.recipe import Recipe, apply_recipe
from assay.tuner.work import Settings, Work, build_work, decode_agreement, decodes_in_its_own_way, load_for
from assay.workloads.quality import agreement

FIGURES = (
    "baseline",
    "candidate",
    "kl",
    "top1",
)  # of every document: two likelihoods, and how the one follows the other


def judge(
    settings: dict[str, Any], recipe: dict[str, Any], attempt: int, max_drop: float, seconds: float
) -> dict[str, Any]:
    """Compare a recipe with the model as loaded on the proof's documents, and on the user's evaluation where there is one.

    `attempt` is how many candidates were judged before this one: they share the error that may be made. Returns the verdict with
    its looks, and each document's figures by path; "reason" says why there was no look. About `seconds` are used, but two
    documents at least.
    """
    begin = time.perf_counter()
    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own, "proof")
    untouched = computable(loaded.model)
    changed = computable(apply_recipe(load_for(own).model, Recipe.model_validate(recipe), work.context()))
    figures: dict[str, dict[str, list[float]]] = {}

    def go_on(done: int, count: int) -> None:
        for path, found in documents(untouched, changed, work, done, count).items():
            for name, values in found.items():
                figures.setdefault(path, {}).setdefault(name, []).extend(values)

    own_loop = own.goal != "ttft" and decodes_in_its_own_way(changed)
    there = min(len(work.windows), len(work.forced)) if own_loop else len(work.windows)
    go_on(0, 1)  # compiles, packs and warms up
    start = time.perf_counter()
    go_on(1, min(2, there))
    each = time.perf_counter() - start
    affordable = 2 + int(max(seconds - (time.perf_counter() - begin), 0.0) / max(each, 1e-9))
    plan = looks(min(there, affordable))
    taken = []
    for count, alpha in zip(plan, shares(attempt, len(plan)), strict=True):
        go_on(len(figures["prefill"]["kl"]), count)
        taken.append(look(differences(figures), alpha, max_drop))
        if taken[-1].verdict != "undecided":
            break
    reason = ""
    if not taken:
        short = "the text has only" if there < LEAST_DOCUMENTS else "there was time for only"
        reason = f"{short} {min(there, affordable)} documents, {LEAST_DOCUMENTS} are needed"
    verdict = taken[-1].verdict if taken else "undecided"
    scores = None
    if own.eval is not None and verdict == "holds":
        alpha = sum(shares(attempt, 1))
        left = seconds - (time.perf_counter() - begin)
        scores = evaluate(loaded, untouched, changed, own, alpha, max_drop, left)
        verdict = scores["verdict"]
    return {
        "verdict": verdict,
        "reason": reason,
        "complete": bool(taken) or there < LEAST_DOCUMENTS,  # else more time would allow a first look
        "looks": [one.document() for one in taken],
        "planned": plan,
        "source": work.source,
        "figures": figures,
        "kl": _worst(figures, "kl", max),
        "top1": _worst(figures, "top1", min),
        "eval": scores,
        "seconds": time.perf_counter() - begin,
    }


def computable(model: nn.Module) -> nn.Module:
    """The model itself, but in float32 where it is float16 on a CPU, which would compute the same for hours."""
    first = next(model.parameters())
    return model.float() if str(first.dtype) == "torch.float16" and first.device.type == "cpu" else model


def documents(
    untouched: nn.Module, changed: nn.Module, work: Work, begin: int, end: int
) -> dict[str, dict[str, list[float]]]:
    """The figures of documents `begin` to `end`, by path: the forward pass, and a decoding loop that is not transformers' own."""
    if begin >= end:
        return {}
    found = {"prefill": agreement(untouched, changed, work.windows[begin:end])}
    if work.settings.goal != "ttft" and decodes_in_its_own_way(changed):
        found["decode"] = decode_agreement(untouched, changed, work.forced[begin:end], work.prefix)
    fields = dict(zip(FIGURES, ("reference", "candidate", "kl", "top1"), strict=True))
    return {path: {name: getattr(one, field).tolist() for name, field in fields.items()} for path, one in found.items()}


def differences(figures: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """By path, each document's likelihood lost: nats per token, candidate minus untouched model."""
    return {
        path: [after - before for before, after in zip(found["baseline"], found["candidate"], strict=True)]
        for path, found in figures.items()
    }


def _worst(figures: dict[str, dict[str, list[float]]], name: str, choose: Any) -> dict[str, Any]:
    """Mean of a figure over the documents with its 95 % interval, of the path where it is worst."""
    found: dict[str, Interval] = {path: mean_interval(one[name], 0.025) for path, one in figures.items()}
    path = choose(found, key=lambda one: found[one].median)
    return {"path": path, "mean": found[path].median, "low": found[path].low, "high": found[path].high}
