"""Fails when a package is installed that must not be in the dependency tree; run by `make test`."""

from __future__ import annotations

import sys
from importlib import metadata

FORBIDDEN = ("torchvision", "torchaudio", "timm", "triton")
CUDA_PREFIXES = ("nvidia-", "cuda-", "cupy")


def offenders(names: list[str]) -> list[str]:
    """The installed distributions that may not be there, sorted."""
    low = {name.lower().replace("_", "-") for name in names}
    return sorted(n for n in low if n in FORBIDDEN or n.startswith(CUDA_PREFIXES))


if __name__ == "__main__":
    found = offenders([d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"]])
    build = metadata.version("torch")
    if found or "cu1" in build:
        sys.exit(f"these may not be in the environment: {', '.join(found) or 'torch ' + build}")
    print(f"environment: torch {build}, no CUDA packages, no torchvision/torchaudio/timm")
