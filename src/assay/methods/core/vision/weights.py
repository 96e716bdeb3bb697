"""Weights that somebody has already: state dicts in others' layouts, taken whole or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from assay.methods.core.vision.backbone import Backbone

NAMED = 5  # keys that a message names


def load_weights(model: Backbone, state: Mapping[str, Tensor] | str | Path, *, layout: str = "auto") -> str:
    """Load a state dict, or a `.safetensors` file, into `model`; returns the layout it was in.

    `layout` is "assay" (our own keys), one of `model.layouts`, or "auto": the first under which every key and every shape is ours.
    A classifier for another number of classes is a difference like any other: `build(..., num_classes=...)` first, then
    `reset_classifier`. Nothing is loaded unless everything fits. Raises ValueError with the first keys and shapes that do not.
    """
    if isinstance(state, str | Path):
        if Path(state).suffix != ".safetensors":
            raise ValueError(f"weights must be a .safetensors file (pickled ones can run code), got {str(state)!r}")
        from safetensors.torch import load_file

        state = load_file(state)
    layouts = {"assay": dict, **model.layouts}
    if layout != "auto" and layout not in layouts:
        raise ValueError(f"layout must be auto, {', '.join(layouts)}, got {layout!r}")
    faults = {}
    for name in [layout] if layout != "auto" else layouts:
        try:
            converted = layouts[name](state)
        except (KeyError, ValueError) as error:
            faults[name] = f"{type(error).__name__}: {error}"
            continue
        faults[name] = misfit(model, converted)
        if not faults[name]:
            model.load_state_dict(converted)
            return name
    raise ValueError(
        "these are no weights of this model: " + "; ".join(f"as {name}, {why}" for name, why in faults.items())
    )


def misfit(model: Backbone, state: Mapping[str, Tensor]) -> str:
    """What of `state` does not fit the model's own state dict: keys and shapes; "" where everything does."""
    own = model.state_dict()
    missing, strange = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys are missing ({', '.join(missing[:NAMED])})")
    if strange:
        parts.append(f"{len(strange)} keys are not ours ({', '.join(strange[:NAMED])})")
    if shaped:
        told = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in sorted(shaped)[:NAMED]]
        parts.append(f"{len(shaped)} shapes differ ({', '.join(told)})")
    return ", ".join(parts)
