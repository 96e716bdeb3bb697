"""Peak memory: of a child process (the honest figure), or of a function in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import AssayError
from assay.measure.child import peak_resident, resident
from assay.measure.isolate import run_isolated


@dataclass(frozen=True)
class PeakMemory:
    """Resident bytes at the start and at the peak; `extra_bytes` is what the work added. `cuda_bytes` is None without CUDA."""

    start_bytes: int
    peak_bytes: int
    cuda_bytes: int | None = None

    @property
    def extra_bytes(self) -> int:
        """Peak minus start."""
        return max(self.peak_bytes - self.start_bytes, 0)


def peak_memory_of_child(
    target: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    memory_bytes: int | None = None,
) -> PeakMemory:
    """Peak resident memory of `target` ("module:function") in a fresh process; the start is taken after its module's imports.

    Memory that this process holds or has freed has no influence, so figures are comparable across methods. Limits as in
    `assay.measure.isolate.run_isolated`. Raises AssayError with the child's one-line error when it does not return.
    """
    found = run_isolated(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)
    if not found.ok:
        raise AssayError(f"{target} ended without a result ({found.status}): {found.error}")
    return PeakMemory(found.start_rss_bytes, found.peak_rss_bytes)


def peak_memory(function: Callable[[], Any]) -> PeakMemory | None:
    """Peak resident memory of this process while `function` runs, and of CUDA's allocator if it is in use.

    The kernel's high-water mark is reset first. Memory that the allocator already held and reused does not show, so differences
    of a few MiB mean nothing; use a child process for those. None if the mark cannot be reset (not Linux).
    """
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    if not _reset_peak():
        return None
    start = resident()
    function()
    cuda = cuda or _cuda()  # it may have come into use just now
    return PeakMemory(start, peak_resident(), None if cuda is None else cuda.max_memory_allocated())


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
