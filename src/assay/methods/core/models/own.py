"""Models of assay's own kinds, stored: their classes are known to transformers only after the room was imported, which this does.

register_own("my-ladder-model")                 # reads config.json; nothing is imported from the folder
model = AutoModelForCausalLM.from_pretrained("my-ladder-model")
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

PREFIX = "assay_"
CORE = {"assay_mixer": "assay.methods.core.mixers.model"}


def register_own(folder: str | Path) -> bool:
    """Import the room of a stored model whose `model_type` is one of assay's; True if it was one.

    Nothing happens for other models, for a folder without a readable `config.json`, and for a name that no room here has: loading says
    what is wrong with it.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not isinstance(kind, str) or not kind.startswith(PREFIX):
        return False
    found = CORE.get(kind) or _room(kind.removeprefix(PREFIX))
    if found is None:
        return False
    importlib.import_module(found)
    _name_causal_models()
    return True


def _name_causal_models() -> None:
    """Enter assay's causal models in transformers' table of names, which `AutoModelForCausalLM.register` leaves out."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for config, model in AutoModelForCausalLM._model_mapping._extra_content.items():
        if config.model_type.startswith(PREFIX):
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__


def _room(slug: str) -> str | None:
    """The module of a room, by its slug."""
    methods = importlib.import_module("assay.methods")
    for family in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        if family.ispkg and not family.name.endswith((".core", ".builtin")):
            package = importlib.import_module(family.name)
            if slug in {module.name for module in pkgutil.iter_modules(package.__path__)}:
                return f"{family.name}.{slug}"
    return None
