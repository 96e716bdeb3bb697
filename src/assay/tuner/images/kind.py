"""Is a folder an image classifier? Told by its configuration alone, so that a command can answer before torch is loaded."""

from __future__ import annotations

import json
from pathlib import Path

BACKBONE = "assay_backbone.json"
SUFFIX = "ForImageClassification"


def is_image_model(source: str | Path) -> bool:
    """Whether a source is a folder with an image classifier; nothing but its configuration is read."""
    folder = Path(source)
    if (folder / BACKBONE).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    return isinstance(names, list) and any(isinstance(name, str) and name.endswith(SUFFIX) for name in names)
