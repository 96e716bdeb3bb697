"""Image models by name, under timm's conventions: `build`, `list_models`, `register_in_timm`.

    from assay.methods.vision import build
    model = build("swin_tiny_patch4_window7_224", num_classes=10)
    maps = build("vovnet39a", features_only=True)(images)          # a list of maps, fine to coarse

The papers of this package are imported when the first model is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["build", "list_models", "register_in_timm"]


@cache
def _papers() -> None:
    """Import every paper here, so that its models are known."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def build(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> Any:
    """The image model `name` with random weights; see `core.vision.registry.build`. Raises ValueError for a name that is not known."""
    from assay.methods.core.vision import registry

    _papers()
    return registry.build(
        name,
        num_classes=num_classes,
        in_chans=in_chans,
        features_only=features_only,
        out_indices=out_indices,
        **overrides,
    )


def list_models(pattern: str = "*") -> list[str]:
    """The names that can be built and match the pattern ("swin*"), sorted."""
    from assay.methods.core.vision import registry

    _papers()
    return registry.list_models(pattern)


def register_in_timm() -> list[str]:
    """Make the models known to timm where it is installed; the names that were added (names that timm has stay timm's)."""
    from assay.methods.core.vision import registry

    _papers()
    return registry.register_in_timm()
