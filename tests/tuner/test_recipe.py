"""A recipe survives its file, replays in order, and refuses what it does not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay.errors import InputError
from assay.methods.transform import TuneContext
from assay.tuner.recipe import Recipe, Step, apply_recipe
from assay.tuner.transforms import get_transform, transforms

CONTEXT = TuneContext("ttft", 16, 4)


def tiny():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape)).eval()


def test_file_round_trip_drops_only_nulls(tmp_path):
    step = Step(transform="dtype", config={"dtype": "bfloat16"})
    recipe = Recipe(architecture="llama", goal="ttft", prompt_tokens=7, new_tokens=3, steps=(step,))
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.read(tmp_path / "recipe.toml") == recipe
    table = [[0.9, 0.8], [0.5, 1.0]]
    nulls = Recipe(steps=(Step(transform="xattention", config={"tau": table, "dense_layers": [], "extra": None}),))
    nulls.save(tmp_path / "nulls.toml")
    assert Recipe.read(tmp_path / "nulls.toml").steps[0].config == {"tau": table, "dense_layers": []}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps = [", "not a recipe"),
        ("format = 99", "upgrade assay"),
        ("[[steps]]\ntransform = 'nothing'", "no transform is called 'nothing'"),
        ("[[steps]]\nconfig = {}", "steps.0.transform"),
        ("surprise = 1", "surprise"),
        ("\x00", "not a recipe"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, says):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        Recipe.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no recipe"):
        Recipe.read(tmp_path / "none.toml")


def test_another_architecture_is_refused():
    with pytest.raises(InputError, match="is for 'gpt2' models, this one is 'llama'"):
        apply_recipe(tiny(), Recipe(architecture="gpt2"), CONTEXT)


def test_two_steps_of_one_slot_are_refused():
    step = Step(transform="dtype", config={"dtype": "bfloat16"})
    with pytest.raises(InputError, match="one step per slot"):
        apply_recipe(tiny(), Recipe(steps=(step, step)), CONTEXT)


def test_a_bad_setting_is_the_users_error():
    with pytest.raises(InputError, match="dtype"):
        apply_recipe(tiny(), Recipe(steps=(Step(transform="dtype", config={"dtype": "float3"}),)), CONTEXT)


def test_empty_recipe_changes_nothing():
    model, ids = tiny(), torch.arange(10)[None]
    before = model(ids).logits
    assert torch.equal(apply_recipe(model, Recipe(), CONTEXT)(ids).logits, before)


def test_every_transform_keeps_the_protocol():
    assert {"dtype", "xattention", "fp8_vs_int8", "greenformers", "prepacking"} <= set(transforms())
    model = tiny()
    for transform in transforms().values():
        fit = transform.applies_to(model, CONTEXT)
        assert fit.applies or fit.reason, f"{transform.name} gives no reason"
        if fit.applies:
            configs = transform.configs(model, CONTEXT)
            assert configs, f"{transform.name} has nothing to try"
            for config in configs:
                assert Step(transform=transform.name, config=config).label()


def test_unknown_transform_lists_the_known():
    with pytest.raises(InputError, match="dtype"):
        get_transform("quantum")
