"""Recipe: an ordered list of (transform, config), as a TOML file that travels with the model and can be replayed."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from assay.errors import InputError
from assay.methods.transform import SLOTS, TuneContext
from assay.paths import atomic_file
from assay.tuner.transforms import get_transform

FORMAT = 1


class Step(BaseModel):
    """One transform with its configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transform: str
    config: dict[str, Any] = Field(default_factory=dict)

    def label(self) -> str:
        """`name(key=value, ...)`, for people; long values are cut."""
        settings = ", ".join(f"{k}={_short(v)}" for k, v in self.config.items())
        return f"{self.transform}({settings})" if settings else self.transform


class Recipe(BaseModel):
    """What was done to a model, in order. `architecture` is what the recipe was made for (transformers' `model_type`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    architecture: str = ""
    goal: str = ""
    prompt_tokens: int = 512
    new_tokens: int = 32
    steps: tuple[Step, ...] = ()

    def label(self) -> str:
        return " + ".join(step.label() for step in self.steps) or "as loaded"

    def key(self) -> str:
        """Stable identifier of the steps alone."""
        text = json.dumps([step.model_dump() for step in self.steps], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write as TOML, whole or not at all."""
        import tomli_w

        with atomic_file(path) as temporary:
            temporary.write_text(tomli_w.dumps(_without_none(self.model_dump(mode="json"))), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read and check a recipe file. Raises InputError naming the file and what is wrong with it."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"there is no recipe {str(path)!r}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
            raise InputError(f"{path} is not a recipe: {error}") from None
        if isinstance(document.get("format"), int) and document["format"] > FORMAT:
            raise InputError(
                f"{path} has recipe format {document['format']}, this assay reads up to {FORMAT}: upgrade assay"
            )
        try:
            recipe = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path} is not a recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        for step in recipe.steps:
            get_transform(step.transform)
        return recipe


class StepError(InputError):
    """A step that cannot be applied to this model, or to what the steps before it made of it."""

    def __init__(self, message: str, transform: str) -> None:
        super().__init__(message)
        self.transform = transform


def apply_recipe(model: nn.Module, recipe: Recipe, context: TuneContext) -> nn.Module:
    """Apply the steps in order, in evaluation mode and without gradients; returns the model to use.

    Raises InputError when the recipe is for another architecture, holds two steps of one slot or steps out of order, and its
    subclass StepError when a transform does not fit this model.
    """
    architecture = getattr(getattr(model, "config", None), "model_type", "")
    if recipe.architecture and architecture != recipe.architecture:
        raise InputError(
            f"the recipe is for {recipe.architecture!r} models, this one is {architecture!r}: tune it instead"
        )
    slots = [get_transform(step.transform).slot for step in recipe.steps]
    if sorted(slots, key=SLOTS.index) != slots or len(set(slots)) != len(slots):
        raise InputError(f"a recipe takes one step per slot in the order {', '.join(SLOTS)}; got {', '.join(slots)}")
    model.eval()
    with torch.no_grad():
        for step in recipe.steps:
            transform = get_transform(step.transform)
            if step.transform == "dtype" and _is_in(model, step.config.get("dtype")):
                continue  # an artefact's weights are stored in the recipe's dtype already
            fit = transform.applies_to(model, context)
            if not fit.applies:
                raise StepError(f"{step.transform} does not fit this model: {fit.reason}", step.transform)
            try:
                model = transform.apply(model, step.config, context)
            except (ValueError, TypeError) as error:
                raise StepError(f"{step.label()} cannot be applied: {error}", step.transform) from error
    return model.eval()


def _is_in(model: nn.Module, dtype: Any) -> bool:
    return all(str(p.dtype) == f"torch.{dtype}" for p in model.parameters() if p.is_floating_point())


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 24 else text[:21] + "..."


def _without_none(value: Any) -> Any:
    """TOML has no null: a setting that is None is left out, which means the transform's default."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
