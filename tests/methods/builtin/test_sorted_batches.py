"""Sorted batches: same tokens, less padding."""

from __future__ import annotations

import random

import pytest
import torch
from tests.tiny import tiny_model

from assay.methods.builtin.sorted_batches import transform
from assay.methods.core.generation.loop import generate_batch
from assay.methods.transform import Transform, TuneContext

CONTEXT = TuneContext(goal="throughput", prompt_tokens=64, new_tokens=4, batch_size=4)


def tiny():
    return tiny_model(hidden_size=32, intermediate_size=48, num_hidden_layers=1, eos_token_id=2)


def test_same_tokens_less_padding():
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 97) for _ in range(rng.choice([2, 30]))] for _ in range(12)]
    model, slots = tiny(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    plain = generate_batch(model, prompts, new_tokens=1, batch_size=4)
    plain_slots = sum(slots)
    slots.clear()
    transform.apply(model, {"batch_size": 4}, CONTEXT)
    assert generate_batch(model, prompts, new_tokens=1) == plain
    assert sum(slots) < plain_slots


def test_transform():
    model = tiny()
    assert isinstance(transform, Transform)
    assert (transform.slot, transform.exact, transform.goals) == ("batching", True, {"throughput"})
    assert transform.applies_to(model, CONTEXT).applies
    assert not transform.applies_to(torch.nn.Linear(2, 2), CONTEXT).applies
    assert [config["batch_size"] for config in transform.configs(model, CONTEXT)] == [8, 16, 32, 4]
    transform.apply(model, {"batch_size": 16}, CONTEXT)
    assert model.assay_settings == {"sort_by_length": True, "prefill": None, "batch_size": 16}
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        transform.apply(model, {"batch_size": 0}, CONTEXT)
