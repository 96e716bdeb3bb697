"""What an artefact takes: bytes on disk, seconds to load, memory until after the first token. Measured in a fresh process each.

The memory is the peak of resident memory over what the process had when everything it runs was imported, the tokenizer had been read
once, and no weight was read.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import time
from pathlib import Path
from typing import Any

import torch

from assay.errors import AssayError

PROMPT = (5, 17, 29, 41, 53, 67, 79, 97)  # token ids; what they mean does not matter


def measure(folder: str | Path) -> dict[str, Any]:
    """Bytes of the weights on disk, seconds to load, and `peak_bytes` until after the first token, of an artefact or a model folder.

    `logits` is a hash of the first token's logits: equal ones are equal to the last bit. Raises AssayError when the process failed.
    """
    from assay.measure.isolate import run_isolated

    result = run_isolated(f"{__name__}:first_token", {"folder": str(folder)})
    if result.status != "ok":
        raise AssayError(f"{folder}: the first token was not reached: {result.status}: {result.error}")
    weights = [file for file in Path(folder).iterdir() if file.suffix == ".safetensors" and file.stem != "calibration"]
    return {"weights_bytes": sum(file.stat().st_size for file in weights), **result.value}


def first_token(folder: str) -> dict[str, Any]:
    """In the child: import, then load and run, watching the memory."""
    from assay.methods.core import kernels
    from assay.tuner import artefact, packed

    for name in ("transformers.models.auto.modeling_auto", "transformers.generation", "assay.workloads.models"):
        importlib.import_module(name)
    packed._shell(packed.config_of(Path(folder)))  # imports what the architecture needs; takes no memory for weights
    for kernel in ("w8a8", "weight_only"):
        kernels.load(kernel)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, local_files_only=True)  # what it takes has nothing to do with the weights
    gc.collect()
    before = _resident()
    _forget_peak()
    start = time.perf_counter()
    model: Any = artefact.load_tuned(folder).model
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT]), use_cache=True, logits_to_keep=1).logits
    peak = _peak()
    found = hashlib.sha256(logits.float().contiguous().view(torch.uint8).numpy()).hexdigest()[:16]
    return {
        "load_seconds": seconds,
        "peak_bytes": peak - before,
        "imported_bytes": before,
        "logits": found,
        "paths": kernels.paths(),
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssayError(f"/proc/self/status does not say {name}")


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _forget_peak() -> None:
    """Let the kernel count the peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
