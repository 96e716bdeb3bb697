"""A recipe survives its file, replays in order, and refuses what it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model

from assay.errors import InputError
from assay.methods.transform import TuneContext
from assay.tuner.recipe import Recipe, Step, StepError, apply_recipe
from assay.tuner.transforms import get_transform, transforms

CONTEXT = TuneContext("ttft", 16, 4)


def tiny():
    return tiny_model(hidden_size=32, vocab_size=64, num_attention_heads=2, num_key_value_heads=1)


def test_a_file_says_all_that_a_recipe_does(tmp_path):
    step = Step(transform="dtype", config={"dtype": "bfloat16"})
    recipe = Recipe(architecture="llama", goal="ttft", prompt_tokens=7, new_tokens=3, steps=(step,))
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.read(tmp_path / "recipe.toml") == recipe
    table = [[0.9, 0.8], [0.5, 1.0]]
    nulls = Recipe(steps=(Step(transform="xattention", config={"tau": table, "dense_layers": [], "extra": None}),))
    nulls.save(tmp_path / "nulls.toml")
    assert Recipe.read(tmp_path / "nulls.toml").steps[0].config == {"tau": table, "dense_layers": [], "extra": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps = [", "not a recipe"),
        ("format = 99", "upgrade assay"),
        ("[[steps]]\ntransform = 'nothing'", "no transform is called 'nothing'"),
        ("[[steps]]\nconfig = {}", "steps.0.transform"),
        ("surprise = 1", "surprise"),
        ("\x00", "not a recipe"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "{a=" * 5000, "nested too deeply"),
        ("[steps." + "a." * 5000 + "a]", "not a recipe"),
        ("prompt_tokens = " + "9" * 6000, "a number in it is too long"),
        ("prompt_tokens = 99999999999999", "prompt_tokens"),
        ("prompt_tokens = 512.0", "prompt_tokens"),
        ("prompt_tokens = nan", "prompt_tokens"),
        ("prompt_tokens = true", "prompt_tokens"),
        ("prompt_tokens = '512'", "prompt_tokens"),
        ("new_tokens = 0", "new_tokens"),
        ("new_tokens = -1", "new_tokens"),
        ("format = 0", "format"),
        ("format = true", "format"),
        ("format = 'new'", "format"),
        ("goal = 'speed'", "goal: must be one of ttft, decode, .*, got 'speed'"),
        ("goal = 3", "goal"),
        ("architecture = []", "architecture"),
        ("steps = 3", "steps"),
        ("steps = [3]", "steps.0"),
        ("[steps]\ntransform = 'dtype'", "steps"),
        ("[[steps]]\ntransform = 3", "steps.0.transform"),
        ("[[steps]]\ntransform = 'dtype'\nconfig = 'bfloat16'", "steps.0.config"),
        ("[[steps]]\ntransform = 'dtype'\nsettings = {}", "steps.0.settings"),
        (
            "[[steps]]\ntransform = 'greenformers'\nconfig = {energy = nan}",
            "steps.0.config: energy must be finite, got nan",
        ),
        (
            "[[steps]]\ntransform = 'greenformers'\nconfig = {rank = 1" + "0" * 30 + "}",
            "rank must be a number of 64 bits",
        ),
        (
            "[[steps]]\ntransform = 'greenformers'\nconfig = {rank = 2026-01-01}",
            "rank must be a number, true or false, text",
        ),
        (
            "[[steps]]\ntransform = 'xattention'\nconfig = {tau = " + "[" * 20 + "]" * 20 + "}",
            "tau.* nested more than 8 deep",
        ),
        ("[[steps]]\ntransform = 'dtypes'", "no transform is called 'dtypes'; did you mean 'dtype'"),
        ("[[steps]]\ntransform = '" + "x" * 10_000 + "'", "no transform is called 'xxx"),
        (2 * "[[steps]]\ntransform = 'dtype'\n", r"steps 1 .dtype. and 2 .dtype. are both dtype"),
        (
            "[[steps]]\ntransform = 'compile'\n[[steps]]\ntransform = 'dtype'",
            "steps 1 .compile. and 2 .dtype. are compile and dtype",
        ),
        ("# " + "x" * (1 << 20), "more than 1 MiB"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, says):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        Recipe.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"steps = '\x80'"])
def test_bytes_that_are_no_text(tmp_path, raw):
    (tmp_path / "recipe.toml").write_bytes(raw)
    with pytest.raises(InputError, match="not a recipe"):
        Recipe.read(tmp_path / "recipe.toml")


@pytest.mark.parametrize("path", [".", "a" * 5000, "a\0b"])
def test_a_path_that_no_file_has(path):
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        Recipe.read(Path(path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=8,
        ).map(lambda value: tomli_w.dumps({"steps": [{"transform": "dtype", "config": {"dtype": value}}]}).encode()),
    )
)
def test_any_file_is_read_or_refused_and_what_is_read_is_applied_or_refused(tmp_path, raw):
    (tmp_path / "recipe.toml").write_bytes(raw)
    try:
        recipe = Recipe.read(tmp_path / "recipe.toml")
        apply_recipe(tiny(), recipe, CONTEXT)
    except InputError:
        return
    assert recipe.label()
    assert recipe.words()


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


@pytest.mark.parametrize(
    ("transform", "config", "says"),
    [
        ("dtype", {"dtype": "float3"}, "dtype must be one of 'bfloat16', 'float32', got 'float3'"),
        ("dtype", {"dtype": 16}, "dtype must be one of"),
        ("dtype", {"dtype": ["bfloat16"]}, "dtype must be one of"),
        ("dtype", {"dtyp": "bfloat16"}, "unknown configuration .'dtyp'.; allowed: dtype"),
        ("compile", {"mode": 3}, "mode must be one of"),
        ("compile", {"mode": ["default"]}, "mode must be one of"),
        ("compile", {"region": True}, "region must be one of"),
        ("compile", {"backend": "inductor"}, "unknown configuration"),
        ("sorted_batches", {"batch_size": 0}, "batch_size must be a whole number at least 1, got 0"),
        ("sorted_batches", {"batch_size": 8.0}, "batch_size must be a whole number at least 1, got 8.0"),
        ("sorted_batches", {"batch_size": True}, "batch_size must be a whole number at least 1, got True"),
        ("sorted_batches", {"batch_size": "8"}, "batch_size must be a whole number"),
        ("sorted_batches", {"threads": 2}, "unknown configuration .'threads'."),
        ("fp8_vs_int8", {"head": "no"}, "head must be True or False, got 'no'"),
        ("fp8_vs_int8", {"head": 1}, "head must be True or False, got 1"),
        ("xattention", {"block": 64.0}, "block must be a whole number at least 1, got 64.0"),
        ("xattention", {"tau": True}, "tau must be a finite number at least 0 and at most 1, got True"),
        ("greenformers", {"energy": True}, "energy must be a finite number above 0 and below 1, got True"),
        ("greenformers", {"budget": 2.0}, "budget must be a finite number above 0 and below 1"),
    ],
)
def test_a_bad_setting_is_named_before_anything_is_changed(transform, config, says):
    model, ids = tiny(), torch.arange(10)[None]
    before = model(ids).logits
    first = (
        (Step(transform="dtype", config={"dtype": "bfloat16"}),) if transform not in ("dtype", "greenformers") else ()
    )
    context = TuneContext("ttft", 2048, 4, 4, (torch.arange(12)[None],))
    with pytest.raises(StepError, match=says) as caught:
        apply_recipe(model, Recipe(steps=(*first, Step(transform=transform, config=config))), context)
    assert caught.value.transform == transform
    assert transform in str(caught.value)
    assert torch.equal(model(ids).logits, before)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("error", [ValueError, TypeError, OverflowError])
def test_what_a_transform_says_against_its_configuration_is_the_users_error(monkeypatch, error):
    class Wrong(type(get_transform("dtype"))):
        def check(self, config):
            pass

        def apply(self, model, config, context):
            raise error("dtype must be kind")

    monkeypatch.setattr("assay.tuner.recipe.get_transform", lambda name: Wrong())
    with pytest.raises(StepError, match=r"dtype.dtype=bfloat16. cannot be applied: dtype must be kind"):
        apply_recipe(tiny(), Recipe(steps=(Step(transform="dtype", config={"dtype": "bfloat16"}),)), CONTEXT)


def test_a_step_without_its_setting_takes_the_default():
    done = apply_recipe(tiny(), Recipe(steps=(Step(transform="dtype"),)), CONTEXT)
    assert {parameter.dtype for parameter in done.parameters()} == {torch.bfloat16}
    again = apply_recipe(done, Recipe(steps=(Step(transform="dtype"),)), CONTEXT)  # as an artefact is loaded
    assert again is done


def test_a_setting_that_is_none_is_none_again_when_the_file_is_read(tmp_path):
    """Left out, it would be the transform's default: 8 bits for an output layer that was to stay as it is."""
    recipe = Recipe(steps=(Step(transform="weight_only", config={"bits": 4, "head_bits": None}),))
    recipe.save(tmp_path / "recipe.toml")
    again = Recipe.read(tmp_path / "recipe.toml")
    assert again == recipe
    assert again.key() == recipe.key()


@pytest.mark.parametrize("value", [float("inf"), object(), 2**80, [[[[[[[[[1]]]]]]]]]])
def test_a_step_made_in_python_is_checked_too(value):
    with pytest.raises(ValueError, match="tau"):
        Step(transform="xattention", config={"tau": value})


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "as loaded"),
        ([("dtype", {})], "bfloat16"),
        ([("compile", {"mode": "default", "region": "blocks"})], "torch.compile"),
        ([("compile", {"region": "model"})], "torch.compile of the whole model"),
        ([("sorted_batches", {"batch_size": 16})], "sorted batches of 16"),
        (
            [
                ("dtype", {"dtype": "bfloat16"}),
                ("fp8_vs_int8", {"smooth": None, "rotation": 16, "skip": [], "head": False}),
                ("xattention", {"tau": 0.95, "stride": 8, "block": 64}),
            ],
            "bfloat16, INT8 linears with rotation, block-sparse attention at tau 0.95",
        ),
    ],
)
def test_a_recipe_in_words(steps, words):
    assert Recipe(steps=tuple(Step(transform=name, config=config) for name, config in steps)).words() == words


def test_every_transform_has_words_for_what_it_offers():
    context = TuneContext("throughput", 2048, 4, 16, (torch.arange(12)[None],))
    for transform in transforms().values():
        told = [
            Step(transform=transform.name, config=config).words()
            for config in [{}, *transform.configs(tiny(), context)]
        ]
        assert all(told), transform.name
        assert all("_" not in words for words in told), told


def test_a_transform_without_words_is_told_by_its_name_and_settings(monkeypatch):
    monkeypatch.setattr("assay.tuner.recipe.get_transform", lambda name: object())
    assert Step(transform="new_idea", config={"group_size": 4}).words() == "new idea with group size 4"
    assert Step(transform="new_idea").words() == "new idea"


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
