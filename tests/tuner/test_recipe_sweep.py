"""Every transform over unrelated causal models, as `apply_recipe` meets them: it works, or refuses and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from assay.errors import InputError
from assay.methods.transform import TuneContext
from assay.tuner.artefact import apply_to
from assay.tuner.recipe import Recipe, Step, StepError, apply_recipe
from assay.tuner.transforms import transforms
from properties.architectures import CAUSAL, build
from tiny import tiny_tokenizer

CALIBRATION = tuple(torch.randint(3, 160, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(2))
SOME = ("gpt2", "opt", "mamba", "gpt_oss")  # Conv1D, learned positions, no attention, sinks and fused experts


def whole(model):
    """All that a refusal must leave alone."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, str(model), model.config.to_dict(), dict(getattr(model, "assay_settings", {})), type(model)


def sweep(name):
    for transform in transforms().values():
        goal = next(goal for goal in ("ttft", "decode", "throughput", "memory") if goal in transform.goals)
        context = TuneContext(goal, 2048, 8, 4, CALIBRATION)
        model = build(name)
        before = whole(model)
        config = transform.configs(model, context)[0] if transform.applies_to(model, context).applies else {}
        try:
            done = apply_recipe(model, Recipe(steps=(Step(transform=transform.name, config=config),)), context)
        except StepError as error:
            refusal = str(error)
        else:
            assert not done.training
            continue
        after = whole(model)
        assert after[1:] == before[1:], f"{transform.name} changed {name} and then refused"
        assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
        assert refusal.startswith(transform.name)
        assert "\n" not in refusal


@pytest.mark.parametrize("name", SOME)
def test_a_transform_works_or_refuses(name):
    sweep(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in SOME])
def test_a_transform_works_or_refuses_elsewhere(name):
    sweep(name)


def test_a_part_that_a_model_lacks_is_told_in_our_words(monkeypatch):
    class Attentive(type(transforms()["dtype"])):
        def applies_to(self, model, context):
            return model.config.num_attention_heads and super().applies_to(model, context)

    monkeypatch.setattr("assay.tuner.recipe.get_transform", lambda name: Attentive())
    with pytest.raises(StepError, match="dtype cannot serve a MambaForCausalLM: 'MambaConfig' object has no attribute"):
        apply_recipe(build("mamba"), Recipe(steps=(Step(transform="dtype"),)), TuneContext("ttft", 16, 4))


def test_apply_refuses_a_recipe_that_leaves_a_model_that_does_not_run(tmp_path, monkeypatch):
    class Breaking(type(transforms()["dtype"])):
        def apply(self, model, config, context):
            del model.model.layers[0].self_attn.q_proj.weight
            return model

    build("llama", vocab_size=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    Recipe(steps=(Step(transform="dtype"),)).save(tmp_path / "recipe.toml")
    monkeypatch.setattr("assay.tuner.recipe.get_transform", lambda name: Breaking())
    with pytest.raises(
        InputError, match=r"the recipe .bfloat16. leaves a LlamaForCausalLM that does not run: .* attribute 'weight'"
    ):
        apply_to(str(tmp_path / "model"), tmp_path / "recipe.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
