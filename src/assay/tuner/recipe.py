"""Recipe: an ordered list of (transform, config), as a TOML file that travels with the model and can be replayed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from assay.checks import shown
from assay.errors import InputError
from assay.methods.builtin.dtype import dtype_of
from assay.methods.transform import GOALS, SLOTS, Transform, TuneContext
from assay.paths import atomic_file
from assay.tuner.transforms import get_transform

FORMAT = 1
LARGEST = 1 << 20  # bytes of a recipe file
DEEPEST = 8  # tables and lists within each other in a configuration
LONGEST = 10**9  # tokens


class Step(BaseModel):
    """One transform with its configuration: plain TOML values, without dates, NaN or infinity; whole numbers fit in 64 bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transform: str
    config: dict[str, Any] = Field(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _plain(cls, config: dict[str, Any]) -> dict[str, Any]:
        for name, value in config.items():
            _check_plain(name, value)
        return config

    def label(self) -> str:
        """`name(key=value, ...)`, for people; long values are cut."""
        settings = ", ".join(f"{k}={_short(v)}" for k, v in self.config.items())
        return f"{self.transform}({settings})" if settings else self.transform

    def words(self) -> str:
        """What the step does, in words: the transform's own (its `describe`), else its name and settings.

        >>> Step(transform="dtype", config={"dtype": "bfloat16"}).words()
        'bfloat16'
        """
        describe = getattr(get_transform(self.transform), "describe", None)
        if describe is not None:
            return str(describe(self.config))
        settings = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in self.config.items())
        name = self.transform.replace("_", " ")
        return f"{name} with {settings}" if settings else name


class Recipe(BaseModel):
    """What was done to a model, in order. `architecture` is what the recipe was made for (transformers' `model_type`).

    >>> Recipe(steps=(Step(transform="dtype", config={"dtype": "bfloat16"}), Step(transform="compile"))).label()
    'dtype(dtype=bfloat16) + compile'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(default=FORMAT, strict=True, ge=1, le=FORMAT)
    architecture: str = ""
    goal: str = ""
    prompt_tokens: int = Field(default=512, strict=True, ge=1, le=LONGEST)
    new_tokens: int = Field(default=32, strict=True, ge=1, le=LONGEST)
    steps: tuple[Step, ...] = ()

    @field_validator("goal")
    @classmethod
    def _known(cls, goal: str) -> str:
        if goal and goal not in GOALS:
            raise ValueError(f"must be one of {', '.join(GOALS)}, got {shown(goal)}")
        return goal

    def label(self) -> str:
        return " + ".join(step.label() for step in self.steps) or "as loaded"

    def words(self) -> str:
        """The steps in plain words; "as loaded" when there are none."""
        return ", ".join(step.words() for step in self.steps) or "as loaded"

    def transforms(self) -> list[Transform]:
        """The transform of each step.

        Raises InputError for an unknown transform, for two steps of one slot, and for steps out of order.
        """
        found = [get_transform(step.transform) for step in self.steps]
        order = f"a recipe takes one step per slot in the order {', '.join(SLOTS)}"
        for number, (before, after) in enumerate(zip(found, found[1:], strict=False), 1):
            where = f"steps {number} ({before.name}) and {number + 1} ({after.name})"
            if before.slot == after.slot:
                raise InputError(f"{order}; {where} are both {after.slot}")
            if SLOTS.index(before.slot) > SLOTS.index(after.slot):
                raise InputError(f"{order}; {where} are {before.slot} and {after.slot}")
        return found

    def before(self, steps: int) -> Recipe:
        """The same with its first steps alone."""
        return self.model_copy(update={"steps": self.steps[:steps]})

    def after(self, steps: int) -> Recipe:
        """The same without its first steps."""
        return self.model_copy(update={"steps": self.steps[steps:]})

    def key(self) -> str:
        """Stable identifier of the steps alone."""
        text = json.dumps([step.model_dump() for step in self.steps], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write as TOML, completely or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(as_toml(self.model_dump(mode="json")), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read and check a recipe file. Raises InputError naming the file and what is wrong with it."""
        try:
            with open(path, "rb") as file:
                raw = file.read(LARGEST + 1)
        except FileNotFoundError:
            raise InputError(f"there is no recipe {str(path)!r}") from None
        except (OSError, ValueError) as error:  # a folder, no permission, a name too long, a NUL in it
            raise InputError(f"{path} cannot be read as a recipe: {error}") from None
        if len(raw) > LARGEST:
            raise InputError(f"{path} is not a recipe: it has more than {LARGEST >> 20} MiB")
        try:
            document = _unmarked(tomllib.loads(raw.decode("utf-8")))
        except RecursionError:
            raise InputError(f"{path} is not a recipe: nested too deeply") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a recipe: {error}") from None
        except ValueError:
            raise InputError(f"{path} is not a recipe: a number in it is too long") from None
        if type(document.get("format")) is int and document["format"] > FORMAT:
            raise InputError(
                f"{path} has recipe format {document['format']}, this assay reads up to {FORMAT}: upgrade assay"
            )
        try:
            recipe = cls.model_validate(document)
            recipe.transforms()
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            text = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{path} is not a recipe: {'.'.join(map(str, first['loc']))}: {text}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return recipe


class StepError(InputError):
    """A step that cannot be applied to this model, or to what the steps before it made of it."""

    def __init__(self, message: str, transform: str) -> None:
        super().__init__(message)
        self.transform = transform


def apply_recipe(model: nn.Module, recipe: Recipe, context: TuneContext) -> nn.Module:
    """Apply the steps in order, in evaluation mode and without gradients; returns the model to use.

    Before anything is changed, configurations are checked as far as possible: by each transform's own `check(config)`, if it has
    one, and against the kinds of values that its `configs` offers.
    Raises InputError when the recipe is for another architecture, names an unknown transform, holds two steps of one slot or
    has steps out of order. Raises its subclass StepError, which names the step and what is wrong with it, when a transform does
    not fit this model or its configuration.
    """
    architecture = getattr(getattr(model, "config", None), "model_type", "")
    if recipe.architecture and architecture != recipe.architecture:
        raise InputError(
            f"the recipe is for {recipe.architecture!r} models, this one is {architecture!r}: tune it instead"
        )
    steps = list(zip(recipe.steps, recipe.transforms(), strict=True))
    for step, transform in steps:
        with _named(step, model):
            if (check := getattr(transform, "check", None)) is not None:
                check(step.config)
            if transform.applies_to(model, context).applies:  # an earlier step may still make it fit
                _check_kinds(step.config, transform.configs(model, context))
    model.eval()
    with torch.no_grad():
        for step, transform in steps:
            if step.transform == "dtype" and _is_in(model, dtype_of(step.config)):
                continue  # an artefact's weights are stored in the recipe's dtype already
            with _named(step, model):
                fit = transform.applies_to(model, context)
                if not fit.applies:
                    raise StepError(f"{step.transform} does not fit this model: {fit.reason}", step.transform)
                model = transform.apply(model, step.config, context)
    return model.eval()


@contextlib.contextmanager
def _named(step: Step, model: nn.Module) -> Iterator[None]:
    """Turn a transform's complaint about its configuration or the model into a user error that names the step."""
    try:
        yield
    except StepError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise StepError(f"{step.label()} cannot be applied: {error}", step.transform) from error
    except (AttributeError, NotImplementedError) as error:  # it looked for a part that this kind of model has not
        raise StepError(f"{step.transform} cannot serve a {type(model).__name__}: {error}", step.transform) from error


def _check_kinds(config: Mapping[str, Any], offered: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError where a value is of another kind than all values offered under its name.

    Only booleans and the two kinds of numbers are told apart: a setting may accept a number, a table or a word.
    """
    for name, value in config.items():
        kinds = {_kind(other[name]) for other in offered if other.get(name) is not None}
        if kinds == {"true or false"} and _kind(value) != "true or false":
            raise TypeError(f"{name} must be true or false, got {shown(value)}")
        if kinds and kinds <= {"a whole number", "a number"} and _kind(value) == "true or false":
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        if kinds == {"a whole number"} and _kind(value) == "a number":
            raise TypeError(f"{name} must be a whole number, got {shown(value)}")


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    return kinds.get(type(value), "something else")


def _check_plain(name: str, value: Any, depth: int = 1) -> None:
    """Raise ValueError for a value that no configuration can have."""
    if depth > DEEPEST:
        raise ValueError(f"{shown(name)} is nested more than {DEEPEST} deep")
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_plain(name, inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a number of 64 bits, got one of {value.bit_length()}")
    elif not isinstance(value, bool | int | float | str | None):
        raise ValueError(
            f"{name} must be a number, true or false, text, or a list or table of them, got {shown(value)}"
        )


def _is_in(model: nn.Module, dtype: str) -> bool:
    return all(str(p.dtype) == f"torch.{dtype}" for p in model.parameters() if p.is_floating_point())


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 24 else text[:21] + "..."


NONE = {"none": True}
"""How a setting that is None stands in a file: TOML has no null, and a setting that is missing means the transform's default."""


def as_toml(document: Mapping[str, Any]) -> str:
    """A recipe's document as TOML: a field of its own that is None is left out, a setting that is None is `{ none = true }`."""
    import tomli_w

    return tomli_w.dumps({key: _marked(value) for key, value in document.items() if value is not None})


def _marked(value: Any) -> Any:
    if value is None:
        return NONE
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    return [_marked(inner) for inner in value] if isinstance(value, list) else value


def _unmarked(value: Any) -> Any:
    if value == NONE:
        return None
    if isinstance(value, dict):
        return {key: _unmarked(inner) for key, inner in value.items()}
    return [_unmarked(inner) for inner in value] if isinstance(value, list) else value
