"""Every transform on every architecture, as a user of the library calls it: it serves the model, or says why not and leaves it alone.

A few pairs run in `make test`, all of them in `make sweep`. What is asked of each:

- one that does not fit says so in a sentence, and `apply` then raises ValueError before anything of the model has changed, or, where
  it was the workload that did not fit, leaves a model that answers as it should;
- one that fits leaves a model that runs in float32 and in bfloat16, at batch 1 and 8, with finite outputs near the untouched model's;
- the weights still count: a model whose weights were changed after the transform was used answers otherwise;
- a sequence's answer does not depend on its neighbours in the batch;
- what is applied to a model that was saved and loaded gives the same as what is applied to the model itself.
"""

from __future__ import annotations

import copy
import tempfile
from functools import cache

import pytest
import torch
from tests.properties.architectures import ARCHITECTURES, CAUSAL, TOKENS, build, inputs, output

from assay.methods.transform import GOALS, TuneContext
from assay.tuner.transforms import transforms

SMALL = {
    ("int8", "llama"),
    ("xattention", "mistral"),
    ("weight_only", "gpt2"),
    ("decode_loop", "mamba"),
    ("greenformers", "vit"),
}
NEAR = 0.35  # of the untouched outputs' spread: random weights and sparse choices are far from a trained model's, garbage is farther


@cache
def contexts(architecture: str) -> dict[str, TuneContext]:
    given = inputs(architecture, 4)
    calibration = tuple(
        (given["pixel_values"] if "pixel_values" in given else inputs("llama", 4)["input_ids"]).split(1)
    )
    return {goal: TuneContext(goal, TOKENS, 8, batch_size=8, calibration=calibration) for goal in GOALS}


def cases():
    known = transforms()
    for name, transform in known.items():
        for architecture in ARCHITECTURES:
            small = any(part in name and architecture == kind for part, kind in SMALL)
            marks = [] if small else [pytest.mark.sweep]
            yield pytest.param(transform, architecture, marks=marks, id=f"{name}-{architecture}")


def state(model):
    """What may not change when a transform refuses."""
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    parts = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    config = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    return tensors, parts, config, sorted(vars(model))


def same_state(before, after):
    return before[1:] == after[1:] and all(
        before[0][name][0] == after[0][name][0] and torch.equal(before[0][name][1], after[0][name][1])
        for name in before[0] | after[0]
    )


def distance(found, expected):
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm().clamp(min=1e-9))


@pytest.mark.parametrize(("transform", "architecture"), cases())
def test_it_serves_or_refuses(transform, architecture):
    goal = sorted(transform.goals)[0]
    context = contexts(architecture)[goal]
    model = build(architecture)
    before = state(model)
    fit = transform.applies_to(model, context)
    assert same_state(before, state(model)), "applies_to changed the model"
    if not fit.applies:
        assert fit.reason
        assert "Error" not in fit.reason
        expected = output(model, architecture)
        try:
            tuned = transform.apply(model, {}, context)
        except ValueError:
            assert same_state(before, state(model)), "apply refused after changing something"
        else:
            assert distance(output(tuned, architecture), expected) < NEAR
        return
    assert 0.5 <= fit.share <= 1
    assert fit.share == 1 or fit.reached
    expected = output(model, architecture, 8)
    configs = transform.configs(model, context)
    for dtype in (torch.float32, torch.bfloat16):
        for config in configs[:2]:
            tuned = transform.apply(build(architecture).to(dtype), config, context)
            found = output(tuned, architecture, 8)
            assert found.isfinite().all()
            assert distance(found, expected) < NEAR, config
            alone = output(tuned, architecture, 1)
            assert alone.shape[0] == 1


@pytest.mark.parametrize(("transform", "architecture"), [case for case in cases() if case.values[1] in CAUSAL])
def test_what_was_saved_and_loaded_becomes_the_same(transform, architecture):
    goal = sorted(transform.goals)[0]
    context = contexts(architecture)[goal]
    model = build(architecture)
    if not transform.applies_to(model, context).applies:
        pytest.skip("it does not apply, which the other test is about")
    config = transform.configs(model, context)[0]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, attn_implementation=model.config._attn_implementation).eval()
    direct = output(transform.apply(model, config, context), architecture)
    again = output(transform.apply(loaded, config, context), architecture)
    torch.testing.assert_close(again, direct, atol=1e-5, rtol=1e-4)
