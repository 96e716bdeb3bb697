"""Trained models are kept under everything they depend on, and what is found again is what was trained."""

from __future__ import annotations

import torch

from assay.experiments import seeds
from assay.experiments.inference import language
from assay.workloads.sequences import byte_batches


def model():
    return language.small_llama(width=32, layers=2, heads=2, tie_word_embeddings=True)


def made(key, steps=3, sources=(language,)):
    return language.trained(
        key, model, lambda: byte_batches(16, 2), steps=steps, rate=1e-2, sources=sources, weight_decay=0.0
    )


def test_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    first = made({"a": 1})
    (file,) = (tmp_path / "trained").iterdir()
    calls = []
    monkeypatch.setattr(language.training, "train", lambda *given, **named: calls.append(given))
    again = made({"a": 1})
    assert not calls
    assert not again.training
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in first.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    start = model().state_dict()
    assert any(not torch.equal(x, start[name]) for name, x in first.state_dict().items())
    made({"a": 2}), made({"a": 1}, steps=4), made({"a": 1}, sources=(language, seeds))
    assert len(calls) == 3
    file.write_bytes(file.read_bytes()[:100])
    made({"a": 1})
    assert len(calls) == 4


def test_the_shared_core_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    seen, real = [], language._digest
    monkeypatch.setattr(language, "_digest", lambda module: seen.append(module.__name__) or real(module))
    made({"a": 1})
    assert "assay.methods.core.models" in seen


def test_the_floor_is_that_of_a_table_of_pairs():
    inputs, targets = language.heldout(64, 4)
    floor = language.bigram_floor(inputs, targets)
    assert 1.5 < floor < 3.5
    assert floor < language.bigram_floor(inputs, torch.randint(0, 256, targets.shape)) - 1


def test_a_table_of_pairs_by_hand():
    """Pairs 0-1 (twice), 1-0, 1-2; tokens behind another 0, 1, 1, 2: a pair counts, and a share of one pair more by its second token."""
    found = language.bigram_table(torch.tensor([0, 1, 0, 1, 2]), 3).exp()
    alone = torch.tensor([2, 3, 2]) / 7
    counts = torch.tensor([[0, 2, 0], [1, 0, 1], [0, 0, 0]])
    expected = (counts + alone) / torch.tensor([[3], [3], [1]])
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))


def test_parts_of_the_text_differ():
    assert not torch.equal(language.heldout(64, 4)[0], language.validation(64, 4)[0])
