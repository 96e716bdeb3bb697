"""Fixtures shared by all tests. Caches of the suite live where the user's do, so that the model is converted once."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def smollm2():
    """The bundled SmolLM2-135M in float32. Do not change it: take a `copy.deepcopy` of its model first."""
    from assay.workloads.models import load_model

    return load_model("smollm2-135m")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models run fastest on one thread, and two workers share two cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_data(tmp_path, monkeypatch):
    """No test writes into the user's evidence store."""
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "assay-data"))
    monkeypatch.delenv("ASSAY_DATABASE_URL", raising=False)
