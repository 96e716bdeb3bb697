"""How the tuner applies a method to a model.

A transform is any object with the attributes of `Transform`. It lives in its method's module under the name `transform`, so
that the tuner finds it by convention and imports it only when it tunes. A recipe holds at most one step per slot, applied in
the order of `SLOTS`; that order is what makes combinations well defined.

A transform may have two more methods:

- `check(config)` raises TypeError or ValueError for a configuration that no model could take. Recipes call it for every step
  before the first one changes the model.
- `describe(config)` returns the step in words for reports ("INT8 linear layers with rotation"). Without it, reports show the
  transform's name and its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

Goal = Literal["ttft", "decode", "throughput", "memory", "energy"]
GOALS: tuple[Goal, ...] = ("ttft", "decode", "throughput", "memory", "energy")

Slot = Literal["structure", "dtype", "linear", "attention", "decode", "batching", "compile", "settings"]
SLOTS: tuple[Slot, ...] = ("structure", "dtype", "linear", "attention", "decode", "batching", "compile", "settings")

LEAST_SHARE = 0.5  # a transform that reaches less of its targets does not apply

OpKind = Literal["linear", "attention", "other"]


@dataclass(frozen=True)
class Effect:
    """What a transform does to one kind of work, as factors; the roofline prediction starts from these.

    `macs` and `bytes` multiply the operations and the bytes moved. `dtype` names the arithmetic the work then runs in
    ("float32" | "bfloat16" | "int8", a key of the machine's calibration), or is None if that does not change.
    """

    kind: OpKind
    macs: float = 1.0
    bytes: float = 1.0
    dtype: str | None = None


@dataclass(frozen=True)
class Fit:
    """Whether a transform can be applied to this model; if not, why; if so, what it is expected to change.

    `share` is how much of its targets the method reaches in this model: a share of the weights for methods on linear layers, of
    the attention calls for methods on attention. A transform that reaches less than `LEAST_SHARE` does not apply, and says why;
    one that reaches less than everything says in `reached` what it leaves alone ("the experts of 24 layers stay as they are").
    """

    applies: bool
    reason: str = ""
    effects: tuple[Effect, ...] = ()
    share: float = 1.0
    reached: str = ""


@dataclass(frozen=True)
class TuneContext:
    """What a transform may look at: the goal, the shape of the work, and real token ids to calibrate on."""

    goal: Goal
    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1
    calibration: Sequence[torch.Tensor] = field(default_factory=tuple)  # each (1, n) int64, never the held-out text


def only(config: Mapping[str, Any], allowed: Sequence[str]) -> Mapping[str, Any]:
    """`config` itself if it is a mapping of names among `allowed`; raises TypeError or ValueError listing them."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping of {', '.join(allowed)}, got {config!r}")
    if unknown := {key for key in config if key not in allowed}:
        raise ValueError(f"unknown configuration {sorted(map(str, unknown))}; allowed: {', '.join(allowed)}")
    return config


@runtime_checkable
class Transform(Protocol):
    """Protocol; see the module docstring.

    `exact` says that the transform is not suspected of costing quality: the search expects no loss from it, blames a recipe's
    loss on the other steps, and does not assess it alone. The quality of every recipe is measured all the same. `exact` says
    nothing about the free baseline; the tuner has a separate list for that.
    """

    name: str
    slot: Slot
    goals: frozenset[str]
    exact: bool

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        """Whether it fits. Cheap: inspects the model, changes nothing, runs no forward pass."""
        ...

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        """The configurations worth trying, JSON-able, most promising first (one to about five).

        Their values also say what kind each setting has: a recipe that gives a setting a value of another kind than all values
        offered under its name (text for a number, say) is refused before anything changes.
        """
        ...

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Change `model` in place where possible and return it. Deterministic: a recipe replays to the same model.

        Raises ValueError naming the argument when the configuration does not fit the model.
        """
        ...
