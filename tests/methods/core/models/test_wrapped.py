"""A model around a model: stored, loaded, tied, generated with; the base it wraps stays what it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.properties.architectures import build, inputs
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from assay.methods.core.models.own import register_own
from assay.methods.core.models.wrapped import WrappedConfig, WrappedForCausalLM


class ScaledConfig(WrappedConfig):
    model_type = "assay_test_scaled"

    def __init__(self, base=None, scale=1.0, **kwargs):
        self.scale = scale
        super().__init__(base, **kwargs)


class ScaledForCausalLM(WrappedForCausalLM):
    config_class = ScaledConfig

    def __init__(self, config, base=None):
        super().__init__(config, base)
        self.extra = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        self.refuse(kwargs)
        body = self.base.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
            use_cache=kwargs.get("use_cache"),
        )  # fmt: skip
        hidden = body.last_hidden_state + (self.config.scale - 1) * self.extra(body.last_hidden_state)
        items = kwargs.get("num_items_in_batch")
        return self.output(
            hidden, cache=body.cache, labels=labels, logits_to_keep=logits_to_keep, num_items_in_batch=items
        )


AutoConfig.register("assay_test_scaled", ScaledConfig, exist_ok=True)
AutoModelForCausalLM.register(ScaledConfig, ScaledForCausalLM, exist_ok=True)

NAMES = ("llama", "llama-tied", "qwen2", "gemma2", "gemma3", "mistral", "phi3")


@pytest.mark.parametrize("name", NAMES)
def test_stored_and_loaded(name, tmp_path):
    model = build(name)
    wrapped = ScaledForCausalLM.from_base(model, scale=1.5)
    ids = inputs(name)["input_ids"]
    with torch.no_grad():
        wanted = wrapped(ids).logits
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base"]["model_type"] == model.config.model_type
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is ScaledForCausalLM
    assert loaded.config.scale == 1.5
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0, atol=0)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_neither_copied_nor_changed(name):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(**inputs(name)).logits
    wrapped = ScaledForCausalLM.from_base(model, scale=1.0)
    assert wrapped.base is model
    assert not wrapped.training
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**inputs(name)).logits, wanted, rtol=0, atol=0)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_what_was_exchanged_in_the_base_is_not_drawn_anew():
    model = build("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 192, bias=False)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    ScaledForCausalLM.from_base(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


@torch.no_grad()
def test_a_module_exchanged_after_first_use_is_used():
    wrapped = ScaledForCausalLM.from_base(build("llama"), scale=1.0)
    ids = inputs("llama")["input_ids"]
    before = wrapped(ids).logits
    wrapped.base.lm_head = nn.Linear(128, 160, bias=False)
    wrapped.base.lm_head.weight.copy_(2 * build("llama").lm_head.weight)
    torch.testing.assert_close(wrapped(ids).logits, 2 * before)


def test_new_modules_have_the_bases_dtype():
    wrapped = ScaledForCausalLM.from_base(build("llama").bfloat16())
    assert wrapped.extra.weight.dtype == wrapped.dtype == torch.bfloat16


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generates_as_the_base(how):
    model = build("llama-tied")
    wrapped = ScaledForCausalLM.from_base(model, scale=1.0)
    ids = inputs("llama-tied")["input_ids"][:, :8]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    made = []
    for each in (model, wrapped):
        torch.manual_seed(0)
        made.append(each.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **how))
    assert torch.equal(*made)


def test_the_loss_is_transformers_own():
    model = build("llama")
    wrapped = ScaledForCausalLM.from_base(model, scale=1.0)
    ids = inputs("llama")["input_ids"]
    labels = ids.clone()
    labels[0, :5] = -100
    for items in (None, 30):
        more = {} if items is None else {"num_items_in_batch": items}
        with torch.no_grad():
            torch.testing.assert_close(wrapped(ids, labels=labels, **more).loss, model(ids, labels=labels, **more).loss)
    with pytest.raises(ValueError, match="logits_to_keep must be 0"):
        wrapped(ids, labels=labels, logits_to_keep=1)


def test_new_weights_are_drawn_when_there_is_no_base():
    torch.manual_seed(0)
    wrapped = ScaledForCausalLM(ScaledConfig(build("llama").config))
    assert 0.015 < float(wrapped.extra.weight.detach().std()) < 0.025
    assert float(wrapped.extra.bias.detach().abs().max()) == 0


def test_what_a_configuration_refuses():
    with pytest.raises(TypeError, match="base must be a model's configuration, got 3"):
        WrappedConfig(3)
    with pytest.raises(ValueError, match="transformers knows, got 'nothing'"):
        WrappedConfig({"model_type": "nothing"})
    with pytest.raises(ValueError, match="parts are understood"):
        ScaledForCausalLM.from_base(build("opt"))


def test_what_a_model_cannot_be_asked_for():
    wrapped, ids = ScaledForCausalLM.from_base(build("llama")), inputs("llama")["input_ids"]
    wanted = wrapped(ids).logits
    for error, words, given in (
        (TypeError, "past_key_values is called cache", {"past_key_values": 0}),
        (
            ValueError,
            "output_hidden_states must be left out: the model does not have it",
            {"output_hidden_states": True},
        ),
        (ValueError, "output_attentions must be left out", {"output_attentions": True}),
        (ValueError, "return_dict must be left out or True", {"return_dict": False}),
    ):
        with pytest.raises(error, match=words):
            wrapped(ids, **given)
    nothing = {"past_key_values": None, "output_attentions": False, "output_hidden_states": None, "return_dict": True}
    assert torch.equal(wrapped(ids, **nothing).logits, wanted)
    wrapped.config.return_dict = False
    for asked in ({}, {"return_dict": None}):
        with pytest.raises(ValueError, match="return_dict"):
            wrapped(ids, **asked)
    assert torch.equal(wrapped(ids, return_dict=True).logits, wanted)


def test_a_room_names_what_else_it_does_not_give(monkeypatch):
    wrapped, ids = ScaledForCausalLM.from_base(build("llama")), inputs("llama")["input_ids"]
    monkeypatch.setattr(ScaledForCausalLM, "not_given", {"inputs_embeds": "it reads ids"})
    with pytest.raises(ValueError, match="inputs_embeds must be left out: it reads ids"):
        wrapped(ids, inputs_embeds=torch.zeros(1, 2, 128))  # whose truth nobody can tell


def test_the_configuration_comes_back_from_its_dict():
    config = ScaledConfig(LlamaConfig(hidden_size=64, num_attention_heads=2), scale=2.0)
    again = ScaledConfig.from_dict(config.to_dict())
    assert again.base.to_dict() == config.base.to_dict()
    assert again.scale == 2.0
    assert (again.hidden_size, again.get_text_config().num_attention_heads) == (64, 2)


def test_rooms_are_found_by_what_a_folder_names(tmp_path):
    def stored(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return register_own(tmp_path)

    assert stored(model_type="assay_fit")
    assert stored(model_type="assay_mixer")
    assert not stored(model_type="llama")
    assert not stored(model_type="assay_os; rm")
    assert not stored(model_type=["assay_fit"])
    assert not stored()
    assert not register_own(tmp_path / "nowhere")
