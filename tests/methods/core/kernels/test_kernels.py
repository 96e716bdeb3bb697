"""Building, caching and doing without; and the costs of the operators."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from assay.measure.cost import count_cost
from assay.methods.core import kernels

needs_compiler = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler on this machine")


def test_without_kernels_the_loader_says_no(monkeypatch):
    monkeypatch.setenv("ASSAY_KERNELS", "0")
    kernels.load.cache_clear()
    try:
        assert not any(kernels.load(name) for name in kernels.names())
    finally:
        kernels.load.cache_clear()


def test_no_compiler_is_a_condition_and_not_an_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.load.cache_clear()
    try:
        assert kernels.compiler() is None
        assert not kernels.load("w8a8")
    finally:
        kernels.load.cache_clear()


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_one_library_in_a_path_with_spaces(tmp_path):
    folder = tmp_path / "a cache with spaces"
    code = "from assay.methods.core import kernels; print(kernels.build('memory'))"
    environment = {"ASSAY_CACHE_DIR": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [(process.communicate(), process.returncode) for process in running]
    assert [code for _, code in results] == [0, 0], results
    assert results[0][0][0] == results[1][0][0]
    assert len(list((folder / "kernels").glob("*.so"))) == 1


@needs_compiler
def test_macs_of_the_operators_are_those_of_what_they_replace():
    from assay.methods.builtin.weight_only import WeightOnlyLinear
    from assay.methods.core.attention.plan import AttentionPlan, execute
    from assay.methods.core.quantize.int8_linear import quantize_linears

    linear = torch.nn.Linear(64, 96, bias=False)
    x = torch.randn(5, 64)
    assert count_cost(WeightOnlyLinear.from_linear(linear, 8), x).macs == 5 * 64 * 96
    quantised = quantize_linears(torch.nn.Sequential(linear), fuse=False)
    assert count_cost(quantised, x).macs == 5 * 64 * 96
    q = torch.randn(1, 2, 128, 64, dtype=torch.bfloat16)
    kept = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    kept[..., 0, 0] = kept[..., 1, 1] = True
    plan = AttentionPlan(128, 128, block=64, mask=kept, causal=True)
    assert count_cost(lambda: execute(plan, q, q, q, backend="kernel")).macs == 2 * 2 * (64 * 65 // 2) * (64 + 64)
