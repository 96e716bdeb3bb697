from __future__ import annotations

import pytest
import torch

from assay.workloads.sequences import (
    associative_recall,
    batches_of,
    byte_batches,
    byte_windows,
    pathfinder,
    repeated_ngrams,
    selective_copying,
    text_bytes,
)


def test_byte_windows_are_real_text_and_targets_are_the_next_bytes():
    inputs, targets = byte_windows(200, 4)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = bytes(text_bytes("code", "heldout").tolist())
    assert bytes(inputs[2].tolist()) in text
    assert bytes(inputs[2].tolist()) not in bytes(text_bytes("code", "prompts").tolist())


def test_byte_batches_repeat_with_the_seed():
    first, second, other = (next(byte_batches(50, 3, seed=s))[0] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_every_question_can_be_answered_from_the_pairs():
    inputs, targets = associative_recall(20, length=64, pairs=8, vocab=64, seed=3)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        asked = [(row[t], wanted[t]) for t in range(64) if wanted[t] != -100]
        assert len(asked) == 8
        assert all(pairs[key] == value for key, value in asked)
        assert all(t >= 16 for t in range(64) if wanted[t] != -100)
        assert len(set(pairs.values())) == 8


def test_no_answer_stands_among_the_inputs_behind_the_pairs():
    inputs, targets = associative_recall(20, length=64, pairs=8, vocab=64, seed=3)
    assert (inputs[:, 16:] < 32).all()  # keys and filler; values are of the upper half
    assert (inputs[targets == -100][inputs[targets == -100] >= 32].numel()) == 20 * 8


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(24, 8, 18), (3, 1, 4)])
def test_the_largest_number_of_pairs_fits(length, pairs, vocab):
    inputs, targets = associative_recall(5, length=length, pairs=pairs, vocab=vocab)
    assert ((targets != -100).sum(1) == pairs).all()
    assert (inputs != 0).all()


def test_selective_copying_asks_for_the_data_in_order():
    inputs, targets = selective_copying(10, length=40, tokens=5, vocab=16)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [x for x in row if x > 1] == wanted[-5:]
        assert row[-5:] == [1] * 5
        assert all(x == -100 for x in wanted[:-5])


def test_batches_are_fresh():
    stream = batches_of(associative_recall, 2, length=16, pairs=2, vocab=16)
    assert not torch.equal(next(stream)[0], next(stream)[0])


def test_repeated_ngrams_marks_the_last_byte_of_a_repetition():
    row = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 4]])
    marked = repeated_ngrams(row[:, :-1], row[:, 1:], n=3)
    assert marked[0].nonzero().flatten().tolist() == [5]  # predicts the second 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: associative_recall(1, length=16, pairs=6),
        lambda: associative_recall(1, length=64, pairs=8, vocab=16),
        lambda: selective_copying(1, length=8, tokens=5),
        lambda: byte_windows(0, 1),
    ],
)
def test_what_does_not_fit_is_named(call):
    with pytest.raises(ValueError, match="must be a"):
        call()


@pytest.mark.parametrize("value", [3.7, float("nan"), True, "8", None])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda value: byte_windows(value, 1), "length"),
        (lambda value: byte_windows(8, value), "n"),
        (lambda value: byte_batches(value, 2), "length"),
        (lambda value: byte_batches(8, value), "batch"),
        (lambda value: byte_batches(8, 2, seed=value), "seed"),
        (lambda value: associative_recall(value), "n"),
        (lambda value: associative_recall(2, vocab=value), "vocab"),
        (lambda value: associative_recall(2, pairs=value), "pairs"),
        (lambda value: selective_copying(2, tokens=value), "tokens"),
        (lambda value: selective_copying(2, seed=value), "seed"),
        (lambda value: pathfinder(value, 16), "n"),
        (lambda value: pathfinder(1, value), "side"),
        (lambda value: pathfinder(1, 16, seed=value), "seed"),
        (lambda value: repeated_ngrams(torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), value), "n"),
    ],
)
def test_counts_are_whole_numbers(call, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a whole number"):
        call(value)


def test_batches_are_refused_when_they_are_asked_for_and_not_at_the_first():
    with pytest.raises(ValueError, match="length must be a whole number at least 1 and at most"):
        byte_batches(10**9, 2)
    with pytest.raises(ValueError, match="part must be one of 'heldout', 'calibration', 'prompts', got 'train'"):
        byte_batches(8, 2, part="train")
    with pytest.raises(ValueError, match="kind must be one of 'code', 'english', got 'poem'"):
        byte_windows(8, 2, kind="poem")
    with pytest.raises(ValueError, match="targets must have shape"):
        repeated_ngrams(torch.zeros(1, 4).long(), torch.zeros(1, 3).long())
