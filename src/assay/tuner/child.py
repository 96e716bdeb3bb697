"""What runs in the child processes of a tuning run. Each function takes and returns JSON, see `assay.measure.isolate`.

`survey` looks at the model, `screen` times candidates on few layers, `assess` measures one candidate's cost and quality, `judge`
(in `assay.tuner.judging`) decides about a chosen one on text of the proof, `prove` runs the finalists interleaved, `once` is a
process whose peak memory is read, and `waterline` profiles the result.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import faulthandler
import hashlib
import importlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from assay.measure.child import is_memory_error, one_line
from assay.methods.builtin.dtype import cast as cast_model
from assay.methods.core import kernels
from assay.methods.transform import Fit, Transform
from assay.tuner.artefact import write
from assay.tuner.budget import LEAST_PAIRS, rows_of
from assay.tuner.evaluation import questions_of
from assay.tuner.journal import append
from assay.tuner.judging import computable
from assay.tuner.judging import judge as judge
from assay.tuner.outcome import drop_of
from assay.tuner.packed import digest, has_packed_layers
from assay.tuner.recipe import Recipe, StepError, apply_recipe
from assay.tuner.shallow import Shallow, shallow
from assay.tuner.transforms import transforms
from assay.tuner.work import Settings, Work, build_work, load_for, quality, run_once
from assay.tuner.work import decode_nll as decode_nll  # the forced decoding a function is hashed by

PROBE = 1024  # tokens of the text a function is hashed on: enough for sparse attention to leave something out
FIRST = 0.25  # share of the text a candidate is judged on first: one that is hopeless there is not judged on the rest
LEAST_PROFILED = 64  # tokens of the prompt that a profile is cut down to at most


def calibration(settings: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What this machine can do, and which machine it is."""
    from assay.measure.machine import calibrate, machine

    return {"limits": calibrate(quick=quick).as_dict(), "machine": machine().describe()}


def survey(settings: dict[str, Any], dtype: str | None, seconds: float) -> dict[str, Any]:
    """Where the time goes, what things cost, and which transforms fit.

    `kinds` and `waterline` describe the model as it is stored; `base` holds the same in `dtype`, which candidates build on
    (None: as stored). Both are profiled on few layers, extrapolated to all of them, on a prompt shortened so that the profiles
    take about `seconds`. `costs` are estimates for planning (`assay.tuner.budget.Costs`), as is `proof_share`. `options` lists each
    option's step, slot, exactness, effects and the share it reaches; `unfit` gives the reason for each transform that does not fit.
    """

    own, known = Settings(**settings), transforms()
    importlib.import_module("transformers.models.auto.modeling_auto")  # as loading does: part of any process's start
    start = time.time() - psutil.Process().create_time()
    begin = time.perf_counter()
    loaded = load_for(own)
    work = build_work(loaded, own)
    load = time.perf_counter() - begin
    questions_of(loaded, own)  # bad lines are told now and not at the end
    few = _few(loaded.model, work)
    stored = _dtype_of(loaded.model)
    if dtype is None and stored == "float16" and work.prompt.device.type == "cpu":
        dtype = "float32"  # CPUs have no arithmetic of their own for float16
    run = run_once_shallow(few.model if dtype is None else _cast_copy(few.model, dtype), work, few)
    prompt, repeats = _affordable(few, work, seconds)
    before, before_seconds = _profile(few, prompt, own, repeats)
    base, base_seconds = before, before_seconds
    if dtype is not None and dtype != stored:
        cast_model(few.model, getattr(torch, dtype))
        cast_model(loaded.model, getattr(torch, dtype))
        base, base_seconds = _profile(few, prompt, own, repeats)
    options, unfit = _options(loaded.model, work, known)
    costs = {
        "start": start,
        "load": load,
        "run": run,
        "loaded_run": run * (before_seconds / base_seconds if base_seconds > 0 else 1.0),
        "quality": _quality_seconds(few, work),
    }
    return {
        **before,
        "base": base,
        "costs": costs,
        "profiled_tokens": prompt.shape[1],
        "proof_share": work.proof_share(),
        "options": options,
        "unfit": unfit,
        "architecture": loaded.model.config.model_type,
        "stored": stored,
        "dtype": _dtype_of(loaded.model),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
    }


def _options(model: nn.Module, work: Work, known: dict[str, Transform]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The configurations worth trying of every transform that fits, and the reasons why the others do not."""
    options, unfit = [], {}
    goal, context = work.settings.goal, work.context()
    for name, transform in known.items():
        if goal not in transform.goals:
            unfit[name] = f"does not serve the goal {goal}"
            continue
        fit: Fit = transform.applies_to(model, context)
        if not fit.applies:
            unfit[name] = fit.reason
            continue
        for config in transform.configs(model, context):
            option = {"transform": name, "config": config, "slot": transform.slot, "exact": transform.exact}
            option |= {"share": fit.share, "reached": fit.reached}
            options.append(option | {"effects": [dataclasses.asdict(effect) for effect in fit.effects]})
    return options, unfit


def _few(model: nn.Module, work: Work) -> Shallow:
    """The model with few layers, or the whole model if it cannot be cut or does not run when cut."""
    few = shallow(model)
    with contextlib.suppress(Exception), torch.inference_mode():
        few.model(input_ids=work.prompt[:, :8], use_cache=True)
        return few
    return Shallow(model, "", 1, 1)


def run_once_shallow(model: nn.Module, work: Work, few: Shallow) -> float:
    """Wall seconds of one run of the goal's work, measured on few layers and extrapolated to all."""
    begin = time.perf_counter()
    run_once(model, work)
    return (time.perf_counter() - begin) * few.factor


def _cast_copy(model: nn.Module, dtype: str) -> nn.Module:
    return cast_model(copy.deepcopy(model), getattr(torch, dtype))


@torch.inference_mode()
def _seconds_a_token(few: Shallow, ids: torch.Tensor) -> float:
    """Seconds per token of a forward pass over a short text, on few layers."""
    few.model(input_ids=ids[:, :8])
    begin = time.perf_counter()
    few.model(input_ids=ids)
    return (time.perf_counter() - begin) / ids.numel()


def _quality_seconds(few: Shallow, work: Work) -> float:
    """Expected seconds to measure the whole model's quality on all of the held-out text."""
    tokens = work.windows.numel() + (work.forced.numel() if work.settings.goal != "ttft" else 0)
    return _seconds_a_token(few, work.windows[:1, :512]) * tokens * few.factor


def _affordable(few: Shallow, work: Work, seconds: float) -> tuple[torch.Tensor, int]:
    """A prompt and a number of repeats for which two profiles take about `seconds`; the prompt is halved until they do."""
    prompt = work.prompt if work.settings.goal != "decode" else work.prompt[:, -1:]
    if prompt.shape[1] <= LEAST_PROFILED:
        return prompt, 3
    token = _seconds_a_token(few, prompt[:, : min(prompt.shape[1], 256)])
    for repeats in (3, 2, 1):
        if 2 * (2 + 2 * repeats) * token * prompt.shape[1] <= seconds:
            return prompt, repeats
    length = prompt.shape[1]
    while length > LEAST_PROFILED and 8 * token * length > seconds:
        length //= 2
    return prompt[:, : max(length, LEAST_PROFILED)], 1


def _profile(few: Shallow, prompt: torch.Tensor, own: Settings, repeats: int) -> tuple[dict[str, Any], float]:
    """Kinds of work and waterline of the whole model, extrapolated from few layers, and its seconds."""
    from assay.measure.profile import profile_model

    new = 1 if own.goal == "ttft" else min(own.new_tokens, 8)
    measured = profile_model(few.model, prompt, new_tokens=new, repeats=repeats)
    for row in measured.rows:
        if few.stack and row.name.startswith(f"{few.stack}."):
            for name in ("seconds", "fastest", "attainable_seconds", "macs", "bytes"):
                setattr(row, name, getattr(row, name) * few.factor)
    kinds = measured.kinds()
    return {"kinds": kinds, "waterline": measured.waterline()}, sum(kind["seconds"] for kind in kinds.values())


def _dtype_of(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def screen(
    settings: dict[str, Any],
    base: dict[str, Any],
    recipes: list[dict[str, Any]],
    seconds: float,
    each: float,
    least: int = 1,
    journal: str | None = None,
) -> dict[str, Any]:
    """Time candidates against the base, one after the other, on few layers. The times rank candidates; they are not reported.

    Returns {"status", "ratio": its time over the base's} (or "error", "misfit") by recipe key, for at least `least` recipes and as
    many more as can be started within `seconds`. A candidate that takes longer than `each` seconds ends the process. Each result is
    appended to the file `journal` as soon as it is known (None: no file), after a line that says what is being tried, so that a
    crash loses nothing else.
    """
    begin = time.perf_counter()
    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    few = _few(loaded.model, work)
    layers = {"layers": few.kept, "of": few.layers}
    plain = copy.deepcopy(few.model) if few.kept < few.layers else few.model
    reference = _applied(copy.deepcopy(plain), base, work)
    run_once(reference, work)  # warm-up
    found: dict[str, Any] = {}
    model = plain
    for document in recipes:
        if len(found) >= least and time.perf_counter() - begin > seconds:
            break
        key = Recipe.model_validate(document).key()
        if journal:
            append(journal, f"screening:{key}", {"status": "begun"})
        start = time.perf_counter()
        faulthandler.dump_traceback_later(each, exit=True)
        try:
            model = _applied(copy.deepcopy(plain), document, work)
            run_once(model, work)
            result: dict[str, Any] = {"status": "ok", "ratio": _ratio(reference, model, work, each / 8)}
        except StepError as error:
            result = {"status": "failed", "misfit": error.transform, "error": str(error)}
        except Exception as error:
            result = {"status": "out of memory" if is_memory_error(error) else "failed", "error": one_line(error)}
        finally:
            faulthandler.cancel_dump_traceback_later()
        model = plain  # the candidate is freed before the next one is made
        found[key] = result | layers | {"seconds": time.perf_counter() - start}
        if journal:
            append(journal, f"screen:{key}", found[key])
        torch._dynamo.reset()
    return found


def _applied(model: nn.Module, document: dict[str, Any], work: Work) -> nn.Module:
    return apply_recipe(model, Recipe.model_validate(document), work.context())


def _ratio(base: nn.Module, model: nn.Module, work: Work, long: float) -> float:
    """The candidate's cost over the base's: candidate, base, base, candidate; a single pair if a run takes `long` seconds."""
    start = time.perf_counter()
    mine, theirs = [run_once(model, work)], [run_once(base, work)]
    if time.perf_counter() - start < long:
        theirs.append(run_once(base, work))
        mine.append(run_once(model, work))
    return sum(mine) / max(sum(theirs), 1e-9)


def assess(
    settings: dict[str, Any],
    recipe: dict[str, Any],
    known: dict[str, Any],
    seconds: float,
    text: float,
    *,
    reference: dict[str, list[float]] | None = None,
    max_drop: float = float("inf"),
    base: dict[str, Any] | None = None,
    least: int = 2,
    repeats: int = 5,
) -> dict[str, Any]:
    """Apply a recipe and measure its cost for the goal and its quality, unless something equivalent was already measured.

    `known` maps function hashes to {"quality": ..., "structures": [...]}. Costs are sampled until there are `repeats` or `seconds`
    have passed, but at least `least` times.
    The quality is measured on the share `text` of the held-out text. It is measured on a first part of it, and if the recipe is
    already certain to lose more than `max_drop` there, against `reference` (the quality of the model as loaded), it stops at that
    part: "hopeless_at". If `base`, a recipe, is given, "paired" holds the costs of the base, sampled alternately with the candidate's.
    A step that does not fit is a result too: {"misfit": its transform, "error": why}.
    """
    own = Settings(**settings)
    begin = time.perf_counter()
    loaded = load_for(own)
    work = build_work(loaded, own)
    try:
        model = _applied(loaded.model, recipe, work)
    except StepError as error:
        return {"misfit": error.transform, "error": str(error)}
    applied = time.perf_counter() - begin
    function, structure = function_hash(model, work), structure_hash(model)
    same = {"function": function, "structure": structure}
    before = known.get(function)
    if before is not None and structure in before["structures"]:
        return {"equivalent": True, **same}
    # for memory the peak is read from processes that do nothing else: `once`
    samples: list[float] = []
    paired: list[float] = []
    run_seconds = 0.0
    if own.goal != "memory":
        samples, paired, run_seconds = _sampled(model, work, base, seconds, least, repeats)
    paths = kernels.paths()
    begin = time.perf_counter()
    if before is not None:
        found = {name: before[name] for name in ("quality", "hopeless_at") if name in before}
    else:
        # float16 is a matter of speed: its numbers mean the same in float32, and are judged in no time
        found = _assessed(computable(model), work, text, reference, max_drop)
    return {
        "equivalent": False,
        **same,
        "samples": samples,
        "paired": paired,
        "run_seconds": run_seconds,
        **found,
        "apply_seconds": applied,
        "text": text,
        "quality_seconds": time.perf_counter() - begin,
        "paths": paths,
    }


def _sampled(
    model: nn.Module, work: Work, base: dict[str, Any] | None, seconds: float, least: int, repeats: int
) -> tuple[list[float], list[float], float]:
    """Costs of the model, of the base next to it if there is one, and the wall seconds of one run of the model."""
    other = None
    if base is not None:
        other = _applied(load_for(work.settings).model, base, work)
        run_once(other, work)
    run_once(model, work)  # warm-up: compilation, packing, allocator
    samples: list[float] = []
    paired: list[float] = []
    spent = 0.0
    start = time.perf_counter()
    while len(samples) < repeats:
        for turn in (model, other) if len(samples) % 2 == 0 else (other, model):
            if turn is model:
                begin = time.perf_counter()
                samples.append(run_once(model, work))
                spent += time.perf_counter() - begin
            elif other is not None:
                paired.append(run_once(other, work))
        if len(samples) >= least and (time.perf_counter() - start) * (1 + 1 / len(samples)) > seconds:
            break  # one more would end too late
    return samples, paired, spent / len(samples)


def _assessed(
    model: nn.Module, work: Work, text: float, reference: dict[str, list[float]] | None, max_drop: float
) -> dict[str, Any]:
    """The quality on the share `text` of the held-out text; stops after a first part if that is already hopeless."""
    width, forced = work.windows.shape[1], work.forced.shape[1]
    whole = (rows_of(text, len(work.windows), width), rows_of(text, len(work.forced), forced))
    first = (rows_of(FIRST * text, whole[0], width), min(rows_of(FIRST * text, whole[1], forced), whole[1] - 1))
    if reference is None or first[0] == whole[0] or first[1] == 0:  # nothing to break off
        return {"quality": quality(model, _part(work, (0, 0), whole))}
    found = quality(model, _part(work, (0, 0), first))
    if drop_of(reference, found).low > max_drop:
        return {"quality": found, "hopeless_at": max_drop}
    rest = quality(model, _part(work, first, whole))
    return {"quality": {path: [*values, *rest[path]] for path, values in found.items()}}


def _part(work: Work, begin: tuple[int, int], end: tuple[int, int]) -> Work:
    """The same work with only part of its held-out text."""
    return dataclasses.replace(work, windows=work.windows[begin[0] : end[0]], forced=work.forced[begin[1] : end[1]])


def once(settings: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Load, apply, run once; the parent reads this process's peak memory."""
    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    loaded.model = apply_recipe(loaded.model, Recipe.model_validate(recipe), work.context())
    run_once(loaded.model, work)
    return {}


def store(settings: dict[str, Any], recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """Write to `folder` what the artefact of a recipe stores: the weights with the steps that they hold (`held_steps`)."""
    own = Settings(**settings)
    loaded = load_for(own)
    calibration = build_work(loaded, own).calibration
    write(Path(folder), loaded.model, loaded.tokenizer, Recipe.model_validate(recipe), calibration, {})
    return {}


def prove(
    settings: dict[str, Any],
    recipes: dict[str, dict[str, Any]],
    pairs: int,
    seconds: float,
    *,
    assess: Sequence[str] = (),
    untimed: dict[str, dict[str, Any]] | None = None,
    text: float = 1.0,
    end: float | None = None,
) -> dict[str, Any]:
    """The paired run that counts: every recipe in one process, interleaved in balanced order.

    Returns the samples of each label, round by round, and the quality of the labels in `assess` and of the recipes in `untimed`
    (whose quality is measured but not their time) on the share `text` of the held-out text. It runs at least six rounds, which an
    exact interval needs, and then continues until `pairs` rounds or `seconds`. No third round starts later than `end` seconds after
    the beginning; "complete" says whether there were six. "paths" says by label which path each operator took, "weights" holds the
    digest of each model with packed weights, with which those that are saved are compared.
    """
    begin = time.perf_counter()
    own = Settings(**settings)

    def build(recipe: dict[str, Any]) -> tuple[nn.Module, Work]:
        loaded = load_for(own)
        work = build_work(loaded, own)
        return apply_recipe(loaded.model, Recipe.model_validate(recipe), work.context()), work

    judged = {label: _assessed(*build(recipe), text, None, 0.0)["quality"] for label, recipe in (untimed or {}).items()}
    models: dict[str, nn.Module] = {}
    weights: dict[str, str] = {}
    for label, recipe in recipes.items():
        models[label], work = build(recipe)
        if has_packed_layers(models[label]):
            weights[label] = digest(models[label])
    for model in models.values():
        run_once(model, work)
    samples: dict[str, list[float]] = {label: [] for label in models}
    paths: dict[str, dict[str, int]] = {label: {} for label in models}
    order = list(models)
    load = os.getloadavg()[0]
    start = time.perf_counter()
    for done in range(pairs):
        for label in order if done % 2 == 0 else reversed(order):
            before = kernels.paths()
            samples[label].append(run_once(models[label], work))
            for name, count in kernels.paths().items():
                if count > before.get(name, 0):
                    paths[label][name] = paths[label].get(name, 0) + count - before.get(name, 0)
        spent = time.perf_counter() - start
        if done + 1 >= LEAST_PAIRS and spent > seconds:
            break
        if (
            done and end is not None and time.perf_counter() - begin + spent / (done + 1) > end
        ):  # one more would end too late
            break
    rounds = len(samples[order[0]])
    return {
        "samples": samples,
        "complete": rounds >= min(LEAST_PAIRS, pairs),
        "quality": judged | {label: _assessed(models[label], work, text, None, 0.0)["quality"] for label in assess},
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "paths": paths,
        "weights": weights,
    }


def waterline(settings: dict[str, Any], recipe: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The profile of a finished recipe, for the report, on few layers and with the survey's prompt length."""
    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    few = _few(loaded.model, work)
    few = dataclasses.replace(few, model=_applied(few.model, recipe, work))
    prompt = work.prompt if own.goal != "decode" else work.prompt[:, -1:]
    return _profile(few, prompt[:, :tokens], own, 1)[0]


@torch.inference_mode()
def function_hash(model: nn.Module, work: Any) -> str:
    """A hash of what the model computes on fixed text: see `assay.methods.compression.functional_hashing`."""
    from assay.methods.compression.functional_hashing import functional_hash

    probe = work.windows[:1, : min(work.windows.shape[1], PROBE, max(64, work.settings.prompt_tokens))]

    def outputs() -> list[torch.Tensor]:
        found = [model(input_ids=probe, use_cache=False, logits_to_keep=8).logits.float()]
        if work.settings.goal != "ttft":
            found.append(decode_nll(model, work.forced[:2, :24], 8))
        return found

    return functional_hash(outputs, [()], digits=4)


def structure_hash(model: nn.Module) -> str:
    """A hash of what the model is made of: modules, tensors, attention and settings. Equal function and structure mean equal candidates."""
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
    parts.append(repr(getattr(model, "speculation", None)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
