from __future__ import annotations

import pytest

from tiny import tiny_tokenizer, write_gguf, write_tiny_llama


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A tiny Llama as a transformers folder; do not write into it."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny(tiny_model_folder):
    """The tiny Llama, loaded; do not change it."""
    from assay.workloads.models import load_model

    return load_model(tiny_model_folder)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_gguf(tiny, tmp_path_factory):
    """The tiny Llama as a GGUF file; do not change it."""
    return write_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny llama.gguf")
