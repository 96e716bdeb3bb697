"""What runs in the child process of a trial. Each function takes and returns JSON, see `assay.measure.isolate`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assay.methods.transform import Effect
from assay.tuner.artefact import write
from assay.tuner.recipe import Recipe, Step, StepError, apply_recipe
from assay.tuner.transforms import transforms
from assay.tuner.work import Settings, Work, build_work, decode_nll, load_for, quality, run_once

PROBE = 1024  # tokens of the text a function is hashed on: enough for sparse attention to leave something out


def survey(settings: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Where the time goes, and which transforms fit, for the model in `dtype` (None: as loaded).

    Returns seconds, MACs and bytes per kind of work, the options (step, slot, exact, effects) and the reasons of those
    that do not fit.
    """
    from assay.measure.profile import profile_model

    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    model = loaded.model if dtype is None else loaded.model.to(getattr(torch, dtype))
    new = 1 if own.goal == "ttft" else min(own.new_tokens, 8)
    measured = profile_model(model, work.prompt if own.goal != "decode" else work.prompt[:, -1:], new_tokens=new)
    options, unfit = [], {}
    context = work.context()
    for name, transform in transforms().items():
        if own.goal not in transform.goals:
            unfit[name] = f"does not serve the goal {own.goal}"
            continue
        fit = transform.applies_to(model, context)
        if not fit.applies:
            unfit[name] = fit.reason
            continue
        for config in transform.configs(model, context):
            option = {"transform": name, "config": config, "slot": transform.slot, "exact": transform.exact}
            options.append(option | {"effects": [dataclasses.asdict(effect) for effect in fit.effects]})
    return {
        "kinds": measured.kinds(),
        "waterline": measured.waterline(),
        "options": options,
        "unfit": unfit,
        "architecture": loaded.model.config.model_type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure(
    settings: dict[str, Any], recipe: dict[str, Any], known: dict[str, Any], seconds: float, repeats: int = 5
) -> dict[str, Any]:
    """Apply a recipe, measure the goal and judge the quality, unless something equivalent was already measured.

    `known` maps function hashes to {"quality": ..., "structures": [...]}. Costs are sampled until `repeats`, or as often as `seconds` hold.
    A step that does not fit is an answer too: {"misfit": its transform, "error": why}.
    """
    own = Settings(**settings)
    start = time.perf_counter()
    loaded = load_for(own)
    work = build_work(loaded, own)
    try:
        model = apply_recipe(loaded.model, Recipe.model_validate(recipe), work.context())
    except StepError as error:
        return {"misfit": error.transform, "error": str(error)}
    applied = time.perf_counter() - start
    function, structure = function_hash(model, work), structure_hash(model)
    before = known.get(function)
    if before is not None and structure in before["structures"]:
        return {"equivalent": True, "function": function, "structure": structure}
    samples: list[float] = []
    repeats = 0 if own.goal == "memory" else repeats  # its peak is read from processes that do nothing else: `once`
    if repeats:
        run_once(model, work)  # warm-up: compilation, packing, allocator
    start = time.perf_counter()
    while len(samples) < repeats:
        samples.append(run_once(model, work))
        if (time.perf_counter() - start) * (1 + 1 / len(samples)) > seconds:  # one more would end too late
            break
    run_seconds = (time.perf_counter() - start) / max(len(samples), 1)
    found = before["quality"] if before is not None else quality(model, work)
    return {
        "equivalent": False,
        "function": function,
        "structure": structure,
        "samples": samples,
        "run_seconds": run_seconds,
        "quality": found,
        "apply_seconds": applied,
    }


def once(settings: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Load, apply, run once: the parent reads the peak memory of this process."""
    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    loaded.model = apply_recipe(loaded.model, Recipe.model_validate(recipe), work.context())
    run_once(loaded.model, work)
    return {}


def cast(settings: dict[str, Any], dtype: str, folder: str) -> dict[str, Any]:
    """Write the model in `dtype` to `folder`, as the artefact of a recipe that begins with that cast stores it."""
    loaded = load_for(Settings(**settings))
    step = Step(transform="dtype", config={"dtype": dtype})
    write(Path(folder), loaded.model, loaded.tokenizer, Recipe(steps=(step,)), [], {})
    return {}


def final(
    settings: dict[str, Any],
    recipes: dict[str, dict[str, Any]],
    judge: list[str],
    pairs: int,
    seconds: float,
    untimed: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The paired run that counts: every recipe in one process, interleaved in balanced order.

    Returns the samples of each label, round by round, and the quality of the labels in `judge` and of the recipes in `untimed`,
    which are judged and not timed. At least six rounds, which an exact interval needs; then until `pairs` or `seconds`.
    """
    own = Settings(**settings)

    def build(recipe: dict[str, Any]) -> tuple[nn.Module, Work]:
        loaded = load_for(own)
        work = build_work(loaded, own)
        return apply_recipe(loaded.model, Recipe.model_validate(recipe), work.context()), work

    judged = {label: quality(*build(recipe)) for label, recipe in (untimed or {}).items()}
    models: dict[str, nn.Module] = {}
    for label, recipe in recipes.items():
        models[label], work = build(recipe)
    for model in models.values():
        run_once(model, work)
    samples: dict[str, list[float]] = {label: [] for label in models}
    order = list(models)
    before = os.getloadavg()[0]
    start = time.perf_counter()
    for round_number in range(pairs):
        for label in order if round_number % 2 == 0 else reversed(order):
            samples[label].append(run_once(models[label], work))
        if round_number >= 5 and time.perf_counter() - start > seconds:
            break
    return {
        "samples": samples,
        "quality": judged | {label: quality(models[label], work) for label in judge},
        "load_before": before,
        "load_after": os.getloadavg()[0],
    }


def waterline(settings: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The profile of a finished recipe, for the report."""
    from assay.measure.profile import profile_model

    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    model = apply_recipe(loaded.model, Recipe.model_validate(recipe), work.context())
    measured = profile_model(model, work.prompt, new_tokens=1)
    return {"kinds": measured.kinds(), "waterline": measured.waterline()}


@torch.inference_mode()
def function_hash(model: nn.Module, work: Any) -> str:
    """What the model computes, on fixed text: see `assay.methods.compression.functional_hashing`."""
    from assay.methods.compression.functional_hashing import functional_hash

    probe = work.windows[:1, : min(work.windows.shape[1], PROBE, max(64, work.settings.prompt_tokens))]

    def outputs() -> list[torch.Tensor]:
        found = [model(input_ids=probe, use_cache=False, logits_to_keep=8).logits.float()]
        if work.settings.goal != "ttft":
            found.append(decode_nll(model, work.forced[:2, :24], 8))
        return found

    return functional_hash(outputs, [()], digits=4)


def structure_hash(model: nn.Module) -> str:
    """What the model is made of: modules, tensors, attention and settings. Equal function and structure: the same candidate."""
    parts = []
    for name, module in model.named_modules():
        replaced = sorted({"forward", "generate"} & set(vars(module)))
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        parts.append(f"{name}:{type(module).__qualname__}:{replaced}:{compiled}")
    parts += [f"{name}:{tensor.dtype}:{tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    parts.append(str(getattr(model.config, "_attn_implementation", "")))
    config: Any = model.config
    parts.append(json.dumps(config.to_dict(), sort_keys=True, default=str))  # attention's settings live there
    parts.append(repr(sorted(getattr(model, "assay_settings", {}).items())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def effects_of(option: dict[str, Any]) -> list[Effect]:
    """The effects of an option of `survey`, back as dataclasses."""
    return [Effect(**effect) for effect in option["effects"]]
