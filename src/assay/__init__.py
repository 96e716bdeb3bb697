"""assay: published computation-efficiency methods as working code, judged by measurement on your own machine."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "__version__"]


def __getattr__(name: str) -> Any:
    # `import assay` stays light: torch is imported only when a model is loaded.
    if name == "load":
        from assay.tuner.artefact import load

        return load
    raise AttributeError(f"module 'assay' has no attribute {name!r}")
