"""What runs in the child processes of tuning an image model. Each function takes and returns JSON (`assay.measure.isolate`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from assay.measure.clock import compare_many
from assay.tuner.images.options import OPTIONS
from assay.tuner.images.recipe import ImageRecipe, apply, settings_of
from assay.tuner.images.work import Settings, Work, build

SEARCHED = 400  # pictures of the search's part that a candidate is judged on at most; our choice


def survey(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the model is, what one run costs, which options fit, and what the model says of the search's pictures."""
    work = build(Settings(**settings))
    model = work.loaded.model
    run, pictures = work.runner(model)
    times = compare_many({"as loaded": run}, rounds=3, warmup=1, max_seconds=seconds).seconds["as loaded"]
    unfit = {name: reason for name, option in OPTIONS.items() if (reason := option.why_not(model))}
    return {
        "architecture": work.loaded.architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": len(work.loaded.labels),
        "seconds": sorted(times)[len(times) // 2] / pictures,
        "unfit": unfit,
        "labelled": work.wanted is not None,
        "pictures": len(work.pictures.paths),
        "proof": len(work.pictures.part("proof").paths),
        "told": work.told(model, "search", SEARCHED),
        "right": work.right("search", SEARCHED),
    }


def assess(settings: dict[str, Any], base: dict[str, Any], recipe: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A candidate beside what it builds on, timed in turns, and what it says of the search's pictures."""
    work, runs, models = _models(settings, {"base": base, "candidate": recipe})
    timings = compare_many(runs, rounds=10, max_seconds=seconds)
    ratio = timings.speedup("base", "candidate")
    pictures = work.runner(models["candidate"])[1]
    return {
        "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        "samples": [value / pictures for value in timings.seconds["candidate"]],
        "told": work.told(models["candidate"], "search", SEARCHED),
        "noisy": timings.noisy,
    }


def said(settings: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's model says of the search's pictures."""
    work, _, models = _models(settings, {"one": recipe})
    return {"told": work.told(models["one"], "search", SEARCHED)}


def once(settings: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own, whose peak memory the parent reads."""
    _, runs, _ = _models(settings, {"one": recipe})
    runs["one"]()
    return {}


def judge(settings: dict[str, Any], recipes: dict[str, Any]) -> dict[str, Any]:
    """What each recipe's model says of the proof's pictures, which no step of the search has seen."""
    work, _, models = _models(settings, recipes)
    return {"told": {name: work.told(model, "proof") for name, model in models.items()}, "right": work.right("proof")}


def prove(settings: dict[str, Any], recipes: dict[str, Any], pairs: int, seconds: float) -> dict[str, Any]:
    """Seconds a picture of each recipe, all in one process, in turns."""
    work, runs, models = _models(settings, recipes)
    timings = compare_many(runs, rounds=pairs, max_seconds=seconds)
    pictures = work.runner(next(iter(models.values())))[1]
    samples = {name: [value / pictures for value in values] for name, values in timings.seconds.items()}
    return {"samples": samples, "noisy": timings.noisy, "trend": timings.trend, "load_before": timings.load_before}


def _models(
    settings: dict[str, Any], recipes: dict[str, dict[str, Any]]
) -> tuple[Work, dict[str, Any], dict[str, nn.Module]]:
    """The work, and for each recipe its model and one run of the work with it."""
    work = build(Settings(**settings))
    calibration = work.calibration()
    models: dict[str, nn.Module] = {}
    for name, document in recipes.items():
        steps: ImageRecipe = settings_of(document, work.settings.goal, work.loaded.architecture)
        models[name] = apply(
            copy.deepcopy(work.loaded.model) if len(recipes) > 1 else work.loaded.model, steps, calibration
        )
    return work, {name: work.runner(model)[0] for name, model in models.items()}, models
