"""The artefact: a folder that transformers can read as it is, with the recipe that makes its model cheaper.

    model.safetensors, config.json, tokenizer ...   the weights: packed where the recipe packs linear layers, else what it starts from
    packed.json, perhaps packed.safetensors          how packed weights are to be read (`assay.tuner.packed`)
    recipe.toml                                      what was done, replayable
    calibration.safetensors                          the token ids the recipe's transforms calibrate on
    report.html, evidence.jsonl                      the proof

`load` reads the weights and replays the steps of the recipe that they do not hold yet. Steps up to the one that packs linear layers
(slots "dtype" and "linear") are held by packed weights. A recipe that first changes the structure of the model is stored with the
weights it starts from, and replayed as a whole; a replay is deterministic.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from assay.errors import AssayError, InputError
from assay.methods.core.generation.loop import plain_generation
from assay.methods.transform import TuneContext
from assay.paths import atomic_dir
from assay.tuner import packed
from assay.tuner.names import CALIBRATION, EVIDENCE, RECIPE, REPORT
from assay.tuner.outcome import Outcome, finite
from assay.tuner.recipe import Recipe, apply_recipe
from assay.tuner.transforms import get_transform
from assay.tuner.work import calibration_for, check_vocabulary

if TYPE_CHECKING:
    from assay.workloads.models import LoadedModel

MOST_CALIBRATION = 1 << 24  # token ids read from an artefact; assay itself writes some thousands


def load(folder: Path | str) -> nn.Module:
    """The tuned model of an artefact: a transformers model that generates, or an image classifier. A plain model folder is loaded as it is.

    Raises InputError when the folder holds no readable model, when its recipe does not fit, or when what it calibrates on is damaged.
    """
    from assay.tuner.images import artefact as images

    if images.is_image_artefact(folder):
        return images.load(folder).model
    return load_tuned(folder).model


def load_tuned(
    source: Path | str,
    *,
    allow_download: bool = False,
    before_recipe: Callable[[nn.Module], Any] | None = None,
) -> LoadedModel:
    """`load`, with the tokenizer; `source` may be any model that `load_model` accepts, or a packed folder.

    `before_recipe` may change the loaded weights before a recipe is applied to them: an adapter is merged there. Packed weights
    take no such change, and InputError says so.
    """
    from assay.tuner.images.kind import is_image_model

    if is_image_model(source):
        raise InputError(
            f"{source}: an image classifier, which generates no text; `assay.load` and `assay tune`, `apply` and `profile` take it"
        )
    loaded: LoadedModel = packed.load_source(source, allow_download=allow_download)
    if before_recipe is not None:
        if packed.has_packed_layers(loaded.model):
            raise InputError(
                f"{source}: its weights are packed, and no adapter can be merged into them; merge it into the model first, and tune that"
            )
        before_recipe(loaded.model)
    if (loaded.folder / RECIPE).is_file():
        recipe = Recipe.read(loaded.folder / RECIPE)
        rest = recipe
        if (loaded.folder / packed.PACKED).is_file():
            steps = packed.contents_of(loaded.folder).steps
            if steps > len(recipe.steps):
                raise InputError(
                    f"{loaded.folder / packed.PACKED}: the weights hold {steps} steps of a recipe that has {len(recipe.steps)}"
                )
            rest = recipe.after(steps)
        calibration = read_calibration(loaded.folder / CALIBRATION)
        if calibration:
            check_vocabulary(loaded, calibration)
        loaded.model = apply_recipe(loaded.model, rest, context_of(recipe, calibration))
    return loaded


def held_steps(recipe: Recipe, model: nn.Module | None = None) -> int:
    """How many steps of a recipe the stored weights hold: a leading cast, or all up to the one that packs linear layers.

    In a model that comes with packed layers (`model`), whatever changes its dtype or linear layers is held too. None is held
    where a step changes the structure of the model first: such a recipe is replayed.
    """
    slots = [get_transform(step.transform).slot for step in recipe.steps]
    if "linear" in slots or (model is not None and packed.has_packed_layers(model)):
        return 0 if "structure" in slots else sum(slot in ("dtype", "linear") for slot in slots)
    return int(slots[:1] == ["dtype"])


def context_of(recipe: Recipe, calibration: list[torch.Tensor]) -> TuneContext:
    """The context a recipe was made in."""
    goal: Any = recipe.goal or "ttft"
    return TuneContext(goal, recipe.prompt_tokens, recipe.new_tokens, calibration=calibration)


def read_calibration(path: Path) -> list[torch.Tensor]:
    """The token ids an artefact's transforms calibrate on, (1, n) int64 each; an empty list if there is no such file.

    Raises InputError for a file that is damaged or holds anything but one table of token ids.
    """
    if not path.is_file():
        return []
    from safetensors import safe_open

    from assay.workloads.files import safetensors_shapes

    shapes = safetensors_shapes(path)
    if set(shapes) != {"input_ids"}:
        raise InputError(
            f"{path}: must hold the tensor 'input_ids' and no other, got {', '.join(sorted(shapes)[:5])}"[:500]
        )
    shape = shapes["input_ids"]
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: input_ids must have the shape (texts, tokens), neither 0, got {shape}")
    if shape[0] * shape[1] > MOST_CALIBRATION:
        raise InputError(
            f"{path}: {shape[0] * shape[1]:,} token ids are more than {MOST_CALIBRATION:,}, the most that is read"
        )
    with safe_open(path, framework="pt") as file:
        if (kind := file.get_slice("input_ids").get_dtype()) not in ("I32", "I64"):
            raise InputError(f"{path}: input_ids must be whole numbers of 32 or 64 bits (I32, I64), got {kind}")
        ids = file.get_tensor("input_ids").long()
    if int(ids.min()) < 0:
        raise InputError(f"{path}: input_ids must not be negative, got {int(ids.min())}")
    return list(ids.split(1))


def write(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    calibration: list[torch.Tensor],
    extra: dict[str, str] | Callable[[Path], dict[str, str]],
) -> None:
    """Write an artefact, completely or not at all. `model` is the one the recipe starts from, and is changed.

    `extra` maps file names to text, or is asked for it with the folder, once weights and recipe are in there. The weights are
    packed where a step of the recipe packs linear layers (`held_steps`), which is done here, or the model comes with packed ones.
    The model's `generation_config` is stored unchanged, even if transformers objects to something in it. Raises OSError when
    the disk is full or `folder` cannot be written.
    """
    from safetensors.torch import save_file

    steps = held_steps(recipe, model)
    if steps:
        model = apply_recipe(model, recipe.before(steps), context_of(recipe, calibration))
    wishes: Any = getattr(model, "generation_config", None)
    with _disk_errors(folder), atomic_dir(folder) as temporary:
        if packed.has_packed_layers(model):
            packed.save(temporary, model, steps)
        else:
            with plain_generation(model):
                model.save_pretrained(temporary, safe_serialization=True)  # type: ignore[operator]
        if wishes is not None:
            (temporary / "generation_config.json").write_text(wishes.to_json_string(), encoding="utf-8")
        tokenizer.save_pretrained(temporary)
        recipe.save(temporary / RECIPE)
        if calibration:
            save_file({"input_ids": torch.cat([ids.int() for ids in calibration])}, temporary / CALIBRATION)
        for name, text in (extra if isinstance(extra, dict) else extra(temporary)).items():
            (temporary / name).write_text(text, encoding="utf-8")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn disk errors, including safetensors' own kind, into an OSError that names `folder`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(folder)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


def save(outcome: Outcome, after: dict[str, Any], limits: Any) -> list[dict[str, Any]]:
    """Write what `tune` found, with its report and evidence; `after` and `limits` as `report.render` takes them.

    Returns the lines of the evidence, of which `assay.evidence.tuned.of_lines` makes the run that the store keeps.
    """
    from assay.evidence import tuned
    from assay.evidence.place import here
    from assay.tuner.report import render
    from assay.tuner.work import build_work, load_for

    loaded = load_for(outcome.settings)
    work = build_work(loaded, outcome.settings)
    origin = {
        "command": " ".join(["assay", *sys.argv[1:]]),
        "commit": here().commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "architecture": outcome.best.recipe.architecture,
        **tuned.code_of(_modules([outcome.best.recipe, *(row.recipe for row in outcome.rows)])),
    }
    lines: list[dict[str, Any]] = []

    def extra(folder: Path) -> dict[str, str]:
        proven = outcome.final.get("weights", {}).get("best")
        if proven is not None and proven != packed.digest(load_tuned(folder).model):
            outcome.notes.append(
                "the weights that were saved are not bit for bit those that were proven: applying the recipe does not repeat here"
            )
        document = outcome.document()
        lines[:] = [{"kind": "summary", **document, **origin}, {"kind": "final", **finite(outcome.final)}]
        lines.extend({"kind": "trial", **row.document()} for row in outcome.rows)
        return {
            REPORT: render(outcome, document, after, limits),
            EVIDENCE: "".join(json.dumps(line, default=str, allow_nan=False) + "\n" for line in lines),
        }

    write(outcome.artefact, loaded.model, loaded.tokenizer, outcome.best.recipe, work.calibration, extra)
    return lines


def remember(lines: list[dict[str, Any]], folder: Path, note: Callable[[str], None]) -> None:
    """Add a run to the evidence store: `lines` are those of its evidence, which the artefact in `folder` holds by now.

    Where the store takes nothing, `note` is told so, and the artefact stays.
    """
    from assay.evidence import tuned
    from assay.evidence.store import Store

    try:
        with Store() as store:
            store.add_runs([tuned.of_lines(lines)])
    except AssayError as error:
        note(f"the evidence store does not hold this run ({error}); assay evidence import {folder / EVIDENCE} adds it")


def _modules(recipes: Iterable[Recipe]) -> dict[str, str]:
    """The module of each transform in some recipes."""
    names = {step.transform for recipe in recipes for step in recipe.steps}
    return {name: type(get_transform(name)).__module__ for name in sorted(names)}


def apply_to(source: str, recipe_path: Path, folder: Path, *, allow_download: bool = False) -> Recipe:
    """Replay a recipe on another model and save the result as an artefact; the recipe is applied once as a check.

    Calibration text is tokenised again with this model's tokenizer: the ids stored with the recipe belong to another vocabulary.
    Raises InputError when the recipe does not fit the model or the folder holds something else; OSError as `write`.
    """
    check_output(folder)
    recipe = Recipe.read(recipe_path)
    loaded = packed.load_source(source, allow_download=allow_download)
    calibration = calibration_for(loaded)
    _check_runs(apply_recipe(loaded.model, recipe, context_of(recipe, calibration)), calibration[0][:, :16], recipe)
    del loaded.model  # it has been changed by every step, and the artefact stores what the first ones make of it
    fresh = packed.load_source(source, allow_download=allow_download)
    write(folder, fresh.model, fresh.tokenizer, recipe, calibration, {})
    return recipe


def _check_runs(model: nn.Module, ids: torch.Tensor, recipe: Recipe) -> None:
    """Raise InputError unless the model still accepts a few tokens after the recipe: a part it cannot use shows here."""
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(
            f"the recipe ({recipe.words()}) leaves a {type(model).__name__} that does not run: {' '.join(str(error).split())[:200]}"
        ) from error


def check_output(folder: Path) -> None:
    """Raise InputError unless `folder` may be written: absent, empty, or an artefact to replace."""
    if folder.is_file():
        raise InputError(f"-o {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECIPE).is_file():
        raise InputError(f"-o {folder} holds something that is not an artefact of assay; name another folder")
