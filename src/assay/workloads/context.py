"""How many tokens a model has room for.

Learned positions raise an IndexError after the last one; rotary and sinusoidal ones silently continue, at positions the model
was never trained on. Both are limits.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from assay.workloads.models import find_model

# in this order: first transformers' own name, then older names and names of single families
_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "context_length",
    "seq_length",
)
_TABLE = re.compile(r"(^|[._])(wpe|pos|position|positions)($|[._])")
_OF_PICTURES_AND_SOUND = re.compile(r"vision|visual|image|audio|speech|relative")
_LARGEST_CONFIG = 1 << 24  # bytes


def context_length(model: Any) -> int | None:
    """The most tokens, prompt and new ones together, that a model has positions for; None if there is no bound.

    `model` is a transformers model or its configuration. The configuration states the limit under one of several names, in its part for
    text if it has parts; a model's own table of positions, minus the rows it keeps free (OPT's offset, RoBERTa's padding),
    is a limit too. State-space models have none.

    >>> from transformers import GPT2Config, MambaConfig
    >>> context_length(GPT2Config(n_positions=256)), context_length(MambaConfig())
    (256, None)
    """
    config = getattr(model, "config", model)
    found = [_of_config(config)]
    if isinstance(model, nn.Module):
        found += [_rows(table) for name, table in model.named_modules() if _is_table(name, table)]
    return min((length for length in found if length is not None), default=None)


def stored_context(source: str | Path, *, allow_download: bool = False) -> int | None:
    """`context_length` of a model that is not loaded yet, from its config.json alone.

    None also if there is no such file (GGUF) or it cannot be read: loading will then say what is wrong. Raises
    InputError and MissingError as `find_model` does.
    """
    file = find_model(source, allow_download) / "config.json"
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            return None
        return _of_config(
            json.loads(file.read_text(encoding="utf-8"), object_hook=lambda found: SimpleNamespace(**found))
        )
    except (OSError, ValueError, RecursionError):
        return None


def _of_config(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else getattr(config, "text_config", config)
    lengths = (getattr(text, name, None) for name in _NAMES)
    return next((length for length in lengths if type(length) is int and length > 0), None)


def _is_table(name: str, module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Embedding)
        and bool(_TABLE.search(name))
        and not _OF_PICTURES_AND_SOUND.search(name.lower())
    )


def _rows(table: Any) -> int:
    """The rows of a table of positions that text can use."""
    free = table.padding_idx + 1 if table.padding_idx is not None else 0
    return int(table.num_embeddings - getattr(table, "offset", free))
