"""How a command answers."""

from __future__ import annotations

import json
from typing import Any


def print_json(document: Any) -> None:
    """One JSON document on stdout, the answer of every command with `--json`."""
    print(json.dumps(document, indent=2, default=str, allow_nan=False))
