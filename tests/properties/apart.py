"""The same check in a process of its own: without the compiled kernels, or with kernels built for another processor.

A check is Python code that raises where it finds a difference. It may ask `KERNELS`, whether there are any, and `ADDED`, the
compiler's options beside the usual ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

START = """
from assay.methods.core import kernels
ADDED, KERNELS = {flags!r}, {compiled!r}
kernels.FLAGS = (*kernels.FLAGS, *ADDED)
"""


ROOT = Path(__file__).parents[2]


def python(code: str, *words: str, **environment: str) -> str:
    """What the code prints, run in the repository's folder; an AssertionError with the end of its complaint where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def without_kernels(check: str) -> None:
    """Run the check as on a machine without a compiler."""
    python(START.format(flags=(), compiled=False) + check, ASSAY_KERNELS="0")


def built_with(check: str, *flags: str, cache: Path) -> None:
    """Run the check with kernels compiled with these flags too, of which the last `-march` counts; they are built into `cache`."""
    python(START.format(flags=flags, compiled=True) + check, ASSAY_CACHE_DIR=str(cache))
