"""What was done to an image model: the names of options with their settings, in order, as a TOML file that can be replayed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from assay.errors import InputError
from assay.paths import atomic_file
from assay.tuner.images.options import OPTIONS, Option
from assay.tuner.recipe import LARGEST, as_toml

ImageGoal = Literal["latency", "throughput", "memory"]
GOALS: tuple[ImageGoal, ...] = ("latency", "throughput", "memory")


class ImageStep(BaseModel):
    """One option with its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    option: str
    config: dict[str, int | float | str | bool] = Field(default_factory=dict)

    @property
    def of(self) -> Option:
        """The option itself. Raises InputError that lists all of them for an unknown name."""
        if self.option not in OPTIONS:
            raise InputError(f"no option is called {self.option!r}; there are: {', '.join(OPTIONS)}")
        return OPTIONS[self.option]

    def label(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.option}({settings})" if settings else self.option

    def words(self) -> str:
        return self.of.words.format(**{**self.of.defaults, **self.config})


class ImageRecipe(BaseModel):
    """The steps in the order in which they are applied.

    >>> ImageRecipe(goal="latency", steps=(ImageStep(option="fold_batch_norm"), ImageStep(option="channels_last"))).label()
    'fold_batch_norm + channels_last'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["images"] = "images"
    format: Literal[1] = 1
    goal: ImageGoal = "latency"
    architecture: str = ""
    steps: tuple[ImageStep, ...] = Field(default=(), max_length=len(OPTIONS))

    def label(self) -> str:
        return " + ".join(step.label() for step in self.steps) or "as loaded"

    def words(self) -> str:
        return ", ".join(step.words() for step in self.steps) or "as loaded"

    def key(self) -> str:
        """The same for the same steps."""
        return json.dumps([step.model_dump() for step in self.steps], sort_keys=True)

    def with_step(self, step: ImageStep) -> ImageRecipe:
        """The recipe with one more step, at its place in the order of `OPTIONS`."""
        order = list(OPTIONS)
        steps = sorted([*self.steps, step], key=lambda one: order.index(one.option))
        return self.model_copy(update={"steps": tuple(steps)})

    def free(self) -> ImageRecipe:
        """The same without what is not free."""
        return self.model_copy(update={"steps": tuple(step for step in self.steps if step.of.free)})

    def save(self, path: Path) -> None:
        """Write as TOML, completely or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(as_toml(self.model_dump(mode="json")), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ImageRecipe:
        """Read and check a recipe. Raises InputError naming the file and what is wrong with it."""
        try:
            if path.stat().st_size > LARGEST:
                raise InputError(f"{path} is not a recipe: it has more than {LARGEST >> 20} MiB")
            recipe = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
            for step in recipe.steps:
                step.of.check(step.config)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise InputError(
                f"{path} is not a recipe for images: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not a recipe for images: {error}") from None
        names = [step.option for step in recipe.steps]
        if len(set(names)) < len(names) or names != [name for name in OPTIONS if name in names]:
            raise InputError(
                f"{path}: a recipe takes each option once, in the order {', '.join(OPTIONS)}; got {', '.join(names)}"
            )
        return recipe


def is_image_recipe(path: Path) -> bool:
    """Whether a recipe file says that it is one for images."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("kind") == "images"
    except (OSError, ValueError, RecursionError):
        return False


def apply(model: nn.Module, recipe: ImageRecipe, calibration: list[Tensor]) -> nn.Module:
    """The model with all steps applied, in eval mode. Raises InputError for a step that does not fit it, before it changes anything."""
    model = model.eval()
    for step in recipe.steps:
        reason = step.of.why_not(model)
        if reason:
            raise InputError(f"{step.option} cannot be applied to this model: {reason}")
        with torch.no_grad():
            model = step.of.apply(model, calibration, **{**step.of.defaults, **step.config})
    return model


def settings_of(document: dict[str, Any], goal: ImageGoal, architecture: str) -> ImageRecipe:
    """A recipe from JSON, as children are given one."""
    return ImageRecipe(
        goal=goal, architecture=architecture, steps=tuple(ImageStep(**step) for step in document["steps"])
    )
