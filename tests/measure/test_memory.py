"""Peak memory of a child and of a function in this process."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from assay.errors import AssayError
from assay.measure.memory import PeakMemory, peak_memory, peak_memory_of_child

MIB = 2**20
sys.path.insert(0, str(Path(__file__).parent))


def test_child_peak_is_what_it_allocated():
    found = peak_memory_of_child("child_targets:eats", {"mebibytes": 200})
    assert 195 * MIB < found.extra_bytes < 230 * MIB
    assert found.peak_bytes > found.start_bytes > MIB


def test_child_that_fails_is_an_error():
    with pytest.raises(AssayError, match="KeyError"):
        peak_memory_of_child("child_targets:fails")
    with pytest.raises(AssayError, match="timeout"):
        peak_memory_of_child("child_targets:sleeps", timeout_s=0.5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark can be reset on Linux only")
def test_peak_in_this_process_is_of_the_function_alone():
    def touch(mebibytes: int) -> None:  # pages of its own: malloc may hand out a freed block that is still resident
        with mmap.mmap(-1, mebibytes * MIB) as pages:
            for at in range(0, len(pages), mmap.PAGESIZE):
                pages[at] = 1

    touch(150)  # an earlier, higher peak
    found = peak_memory(lambda: touch(100))
    assert 95 * MIB < found.extra_bytes < 115 * MIB
    assert peak_memory(lambda: None).extra_bytes < 5 * MIB
    assert found.cuda_bytes is None or found.cuda_bytes >= 0


def test_none_where_the_mark_cannot_be_reset(monkeypatch):
    monkeypatch.setattr("assay.measure.memory._reset_peak", lambda: False)
    assert peak_memory(lambda: pytest.fail("not measured, not run")) is None


def test_extra_is_never_negative():
    assert PeakMemory(10, 7).extra_bytes == 0
