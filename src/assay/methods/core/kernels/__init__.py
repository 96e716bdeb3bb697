"""Compiled CPU kernels: C++ built on first use and cached, each with a torch reference.

`load(name)` compiles `csrc/<name>.cpp` with the machine's own g++ for the machine's own instruction set and loads it, which
registers its operators under `torch.ops.assay`. It returns False if that is not possible (no compiler, `ASSAY_KERNELS=0`);
the caller then uses its torch path. The compiler is called directly instead of through `torch.utils.cpp_extension.load`, which
needs ninja and `torch/extension.h` (30 s instead of 5 s per file). Passing arguments as a list is safe for paths with spaces.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import filelock
import torch

from assay.paths import atomic_file, cache_dir

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno", "-Wall")


def compiler() -> str | None:
    """The C++ compiler that will be used (`$CXX`, else g++), or None."""
    return shutil.which(os.environ.get("CXX") or "g++")


@functools.cache
def load(name: str) -> bool:
    """Make the operators of `csrc/<name>.cpp` available; False if they are not, and the torch path must be used.

    Raises RuntimeError with the compiler's message when the source does not compile: that is a bug, not a condition.
    """
    if os.environ.get("ASSAY_KERNELS") == "0" or compiler() is None or platform.machine() not in ("x86_64", "AMD64"):
        return False
    operators: Any = torch.ops
    operators.load_library(str(build(name)))
    return True


def build(name: str) -> Path:
    """Compile `csrc/<name>.cpp` unless it is cached; returns the shared library. Safe with many processes at once."""
    folder = resources.files(__package__) / "csrc"
    source = Path(str(folder / f"{name}.cpp"))
    text = b"\0".join(file.read_bytes() for file in [source, *sorted(source.parent.glob("*.h"))])
    key = hashlib.sha256(b"\0".join([text, torch.__version__.encode(), " ".join(FLAGS).encode(), _cpu()])).hexdigest()
    library = cache_dir() / "kernels" / f"{name}-{key[:16]}.so"
    library.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{library}.lock"):
        if not library.exists():
            root = Path(torch.__file__).parent
            with atomic_file(library) as temporary:
                command = [compiler() or "g++", *FLAGS, str(source), "-o", str(temporary)]
                command += ["-isystem", str(root / "include"), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
                command += [f"-Wl,-rpath,{root / 'lib'}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"kernel {name!r} does not compile with {command[0]}:\n{done.stderr[-2000:]}")
    return library


@functools.cache
def _cpu() -> bytes:
    """What -march=native means on this machine: the flags of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith("flags")), platform.processor()).encode()


_ran: Counter[str] = Counter()


def ran(operator: str, path: str) -> None:
    """Record that `operator` ("block attention") took `path` ("kernel", "gather", ...). Does nothing while torch.compile traces."""
    if not torch.compiler.is_compiling():
        _ran[f"{operator}: {path}"] += 1


def paths() -> dict[str, int]:
    """Which path each operator took in this process, and how often; records keep it to show whether a kernel ran or fell back."""
    return dict(sorted(_ran.items()))


def names() -> list[str]:
    """The kernels that have sources."""
    return sorted(
        Path(str(entry)).stem
        for entry in (resources.files(__package__) / "csrc").iterdir()
        if entry.name.endswith(".cpp")
    )
