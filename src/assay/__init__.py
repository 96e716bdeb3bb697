"""assay: published computation-efficiency methods as working code, judged by measurement on your own machine."""

# Nothing is imported here, not even from the standard library: `python -m assay` runs this file while the current folder is
# still first on the search path, and a typing.py lying there would be executed.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "__version__"]


def __getattr__(name: str) -> "Any":
    # `import assay` stays light: torch is imported only when a model is loaded.
    if name == "load":
        from assay.tuner.artefact import load

        return load
    raise AttributeError(f"module 'assay' has no attribute {name!r}")
