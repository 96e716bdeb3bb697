"""The artefact: a folder transformers can read as it is, with the recipe that makes its model cheaper.

    model.safetensors, config.json, tokenizer ...   the weights the recipe starts from
    recipe.toml                                      what was done, replayable
    calibration.safetensors                          the token ids the recipe's transforms calibrate on
    report.html, evidence.jsonl                      the proof

`load` replays the recipe, which is deterministic, so the folder needs no format of its own for packed weights.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from assay.errors import InputError
from assay.methods.transform import TuneContext
from assay.paths import atomic_dir
from assay.tuner.outcome import Outcome
from assay.tuner.recipe import Recipe, apply_recipe

if TYPE_CHECKING:
    from assay.workloads.models import LoadedModel

RECIPE, CALIBRATION, REPORT, EVIDENCE = "recipe.toml", "calibration.safetensors", "report.html", "evidence.jsonl"


def load(folder: Path | str) -> nn.Module:
    """The tuned model of an artefact: a transformers model that generates. A plain model folder loads as it is.

    Raises InputError when the folder holds no readable model or its recipe does not fit.
    """
    return load_tuned(folder).model


def load_tuned(source: Path | str, *, allow_download: bool = False) -> LoadedModel:
    """`load` with the tokenizer beside the model; `source` may be any model, as `load_model` takes it."""
    from assay.workloads.models import load_model

    loaded = load_model(source, dtype="auto", allow_download=allow_download)
    if (loaded.folder / RECIPE).is_file():
        recipe = Recipe.read(loaded.folder / RECIPE)
        loaded.model = apply_recipe(loaded.model, recipe, read_context(loaded.folder, recipe))
    return loaded


def read_context(folder: Path, recipe: Recipe) -> TuneContext:
    """The context a recipe was made in, with its calibration tokens if they lie beside it."""
    goal: Any = recipe.goal or "ttft"
    return TuneContext(goal, recipe.prompt_tokens, recipe.new_tokens, calibration=_calibration(folder / CALIBRATION))


def _calibration(path: Path) -> list[torch.Tensor]:
    if not path.is_file():
        return []
    from safetensors.torch import load_file

    from assay.workloads.files import check_safetensors

    check_safetensors(path)
    return list(load_file(path)["input_ids"].long().split(1))


def write(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    calibration: list[torch.Tensor],
    extra: dict[str, str],
) -> None:
    """Write an artefact, whole or not at all. `model` is the one the recipe starts from; `extra` maps file names to text."""
    from safetensors.torch import save_file

    if recipe.steps and recipe.steps[0].transform == "dtype":
        model = model.to(getattr(torch, recipe.steps[0].config["dtype"]))  # the same numbers in half the space
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
        recipe.save(temporary / RECIPE)
        if calibration:
            save_file({"input_ids": torch.cat([ids.int() for ids in calibration])}, temporary / CALIBRATION)
        for name, text in extra.items():
            (temporary / name).write_text(text, encoding="utf-8")


def save(outcome: Outcome, after: dict[str, Any], limits: Any) -> None:
    """Write what `tune` found, with its report and evidence."""
    from assay.evidence.place import here
    from assay.tuner.report import render
    from assay.tuner.work import build_work, load_for

    loaded = load_for(outcome.settings)
    work = build_work(loaded, outcome.settings)
    document = outcome.document()
    origin = {
        "command": " ".join(["assay", *sys.argv[1:]]),
        "commit": here().commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines = [{"kind": "summary", **document, **origin}, {"kind": "final", **outcome.final}]
    lines += [{"kind": "trial", **row_document(row)} for row in outcome.rows]
    extra = {
        REPORT: render(outcome, document, after, limits),
        EVIDENCE: "".join(json.dumps(line, default=str) + "\n" for line in lines),
    }
    write(outcome.artefact, loaded.model, loaded.tokenizer, outcome.best.recipe, work.calibration, extra)


def apply_to(source: str, recipe_path: Path, folder: Path, *, allow_download: bool = False) -> Recipe:
    """Replay a recipe on another model and save the result as an artefact; the model is applied once, as the check.

    Raises InputError when the recipe does not fit the model, or the folder holds something else.
    """
    from assay.tuner.work import Settings, build_work, load_for

    check_output(folder)
    recipe = Recipe.read(recipe_path)
    goal: Any = recipe.goal or "ttft"
    settings = Settings(source, goal, recipe.prompt_tokens, recipe.new_tokens, allow_download=allow_download)
    loaded = load_for(settings)
    calibration = _calibration(recipe_path.parent / CALIBRATION) or build_work(loaded, settings).calibration
    context = TuneContext(goal, recipe.prompt_tokens, recipe.new_tokens, calibration=calibration)
    with torch.no_grad():
        apply_recipe(load_for(settings).model, recipe, context)
    write(folder, loaded.model, loaded.tokenizer, recipe, calibration, {})
    return recipe


def check_output(folder: Path) -> None:
    """Raises InputError unless `folder` is free to be written: absent, empty, or an artefact to be replaced."""
    if folder.is_file():
        raise InputError(f"-o {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECIPE).is_file():
        raise InputError(f"-o {folder} holds something that is not an artefact of assay; name another folder")


def row_document(row: Any) -> dict[str, Any]:
    """One trial as JSON, without the per-block likelihoods."""
    return {
        "trial": row.kind,
        "label": row.label(),
        "recipe": [step.model_dump() for step in row.recipe.steps],
        "status": row.status,
        "cost": row.cost,
        "samples": row.samples,
        "drop": {"median": row.drop, "low": row.drop_low, "high": row.drop_high},
        "predicted": row.predicted,
        "seconds": row.seconds,
        "error": row.error,
        "function": row.function,
        "structure": row.structure,
    }
