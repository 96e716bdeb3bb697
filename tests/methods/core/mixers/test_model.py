"""The builder, through transformers' own API."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from assay.experiments.mixers.training import evaluate, parameter_groups, token_loss, train
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, make_mixer
from assay.workloads.sequences import associative_recall, batches_of

LAYERS = [["attention", {"heads": 2}], ["attention", {"heads": 2, "reach": 8}]]


def tiny(**options):
    torch.manual_seed(0)
    return MixerForCausalLM(MixerConfig(vocab_size=32, hidden_size=16, layers=LAYERS, **options)).eval()


def test_generate_equals_the_parallel_forward_token_by_token():
    model = tiny()
    ids = torch.randint(1, 32, (2, 13))
    out = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=-1)
    for t in range(13, 22):
        torch.testing.assert_close(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])


def test_generate_with_left_padding_equals_each_prompt_alone():
    model = tiny()
    prompts = [torch.randint(1, 32, (n,)) for n in (11, 4)]
    ids, mask = torch.zeros(2, 11, dtype=torch.int64), torch.zeros(2, 11, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, 11 - len(prompt) :], mask[i, 11 - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    both = model.generate(ids, attention_mask=mask, **options)[:, 11:]
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)[0, len(prompt) :]
        assert both[i].tolist() == alone.tolist()


def test_beam_search_reorders_the_states():
    model = tiny()
    ids = torch.randint(1, 32, (1, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "num_beams": 3}
    cached = model.generate(ids, **options)
    plain = model.generate(ids, use_cache=False, **options)
    assert cached.tolist() == plain.tolist()


def test_saves_and_loads_by_the_auto_class(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 32, (1, 20))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert isinstance(again, MixerForCausalLM)


def test_padding_on_the_right_is_refused():
    with pytest.raises(ValueError, match="left"):
        tiny()(torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 0, 0]]))


def test_an_unknown_mixer_is_named():
    with pytest.raises(ValueError, match="nonsense"):
        make_mixer("nonsense", 8)


@pytest.mark.slow
def test_the_trainer_teaches_recall():
    torch.manual_seed(0)
    config = MixerConfig(
        vocab_size=16, hidden_size=32, layers=[["baseconv", {}], ["attention", {"heads": 1}]], intermediate_size=64
    )
    model = MixerForCausalLM(config)
    task = {"length": 12, "pairs": 3, "vocab": 16}
    inputs, targets = associative_recall(64, seed=0, **task)
    before = evaluate(model, inputs, targets)
    losses = train(model, batches_of(associative_recall, 64, **task), steps=600, lr=1e-2)
    after = evaluate(model, inputs, targets)
    assert losses[-1] < losses[0]
    assert before["accuracy"].mean() < 0.2
    assert after["accuracy"].mean() > 0.9  # knowing which values stood there gives 1 / 3


def test_parameter_groups_keep_what_a_layer_asks_for_and_every_parameter_once():
    model = tiny()
    model.blocks[0].mixer.optimizer_options = lambda: {"q_proj.weight": {"lr": 1e-5, "weight_decay": 0.0}}
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.3)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    special = found[id(model.blocks[0].mixer.q_proj.weight)]
    assert (special["lr"], special["weight_decay"]) == (1e-5, 0.0)
    assert found[id(model.blocks[0].mixer.k_proj.weight)]["weight_decay"] == 0.3
    assert found[id(model.norm.weight)]["weight_decay"] == 0.0
    assert found[id(model.embed_tokens.weight)]["weight_decay"] == 0.0


def test_a_loss_that_is_not_finite_is_reported():
    model = tiny()
    inputs, targets = associative_recall(2, length=16, pairs=2, vocab=32)
    with pytest.raises(ValueError, match="step 0"):
        train(model, [(inputs, targets)], steps=1, loss=lambda *a: token_loss(*a) * float("nan"))
    for settings in (
        {"steps": 0},
        {"steps": 1, "lr": float("nan")},
        {"steps": 1, "clip": 0},
        {"steps": 1, "warmup": 1.5},
    ):
        with pytest.raises(ValueError, match=list(settings)[-1]):
            train(model, [(inputs, targets)], **settings)
    nothing = evaluate(model, inputs, torch.full_like(targets, -100))
    assert nothing["nll"].isnan().all()
    with pytest.raises(ValueError, match="2 steps"):
        train(model, [(inputs, targets)], steps=2)


def test_what_the_model_does_not_have_is_refused():
    model, ids = tiny(), torch.ones(2, 4, dtype=torch.int64)
    for name in ("output_hidden_states", "output_attentions", "inputs_embeds"):
        with pytest.raises(ValueError, match=name):
            model(ids, **{name: True})
        model(ids, **{name: None})
    with pytest.raises(ValueError, match="return_dict"):
        model(ids, return_dict=False)
    with pytest.raises(ValueError, match="does not support"):
        model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(TypeError, match="input_ids"):
        model(ids.float())
    with pytest.raises(ValueError, match="input_ids must have shape"):
        model(ids[0])
    with pytest.raises(ValueError, match="attention_mask must cover 4 tokens"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="cache must hold 2 sequences"):
        model(ids, cache=model.new_cache(3))


def test_the_loss_is_divided_by_the_items_the_trainer_counted():
    model = tiny()
    ids = torch.randint(1, 32, (2, 9))
    labels = ids.clone()
    labels[0, :5] = -100
    items = int((labels[:, 1:] != -100).sum())
    mean = model(ids, labels=labels).loss
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=items).loss, mean)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=4 * items).loss, mean / 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_hidden_layers": 3}, ValueError, "num_hidden_layers must be the number of layers, 2"),
        ({"intermediate_size": 0, "channel_mixer": ["bit_glu", {}]}, ValueError, "channel_mixer must be left out"),
        ({"intermediate_size": -1}, ValueError, "intermediate_size"),
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"hidden_size": 16.0}, TypeError, "hidden_size"),
        ({"hidden_size": True}, TypeError, "hidden_size"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps"),
        ({"initializer_range": -0.1}, ValueError, "initializer_range"),
        ({"tie_word_embeddings": "no"}, TypeError, "tie_word_embeddings"),
    ],
)
def test_a_bad_config_is_named(options, error, message):
    with pytest.raises(error, match=message):
        MixerConfig(**{"layers": LAYERS, **options})


def test_a_config_takes_numpys_numbers_and_comes_back_from_a_dictionary():
    config = MixerConfig(vocab_size=np.int64(32), hidden_size=np.int32(16), layers=LAYERS, norm_eps=np.float32(0.5))
    again = MixerConfig.from_dict(config.to_dict())
    assert (type(again.vocab_size), again.hidden_size, again.norm_eps, again.layers) == (int, 16, 0.5, config.layers)
    assert MixerForCausalLM(config)(torch.ones(1, 2, dtype=torch.int64)).logits.shape == (1, 2, 32)


def test_a_model_whose_layers_were_exchanged_is_not_stored_as_if_it_were_whole(tmp_path):
    from assay.methods.attention.positional_attention import fold
    from assay.methods.mixers.matmul_free import MatmulFreeConfig, MatmulFreeForCausalLM, pack_

    packed = pack_(MatmulFreeForCausalLM(MatmulFreeConfig(vocab_size=8, hidden_size=8, num_layers=1)))
    folded = MixerForCausalLM(MixerConfig(vocab_size=8, hidden_size=8, layers=[["positional", {"positions": 9}]]))
    for model in (packed, fold(folded, 9)):
        with pytest.raises(ValueError, match="store the model before its layers are exchanged"):
            model.save_pretrained(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_layers_are_pairs_of_a_name_and_options():
    for wrong in ("attention", 3, [["attention"]], ["attention"], [["attention", None]], [[3, {}]]):
        with pytest.raises(TypeError, match="layers must"):
            MixerConfig(layers=wrong)
    with pytest.raises(TypeError, match="channel_mixer must"):
        MixerConfig(channel_mixer="swiglu")


def test_masks_hold_0_and_1():
    model = MixerForCausalLM(MixerConfig(vocab_size=8, hidden_size=8, layers=LAYERS))
    for wrong in (float("nan"), -1e30, 2.0):  # the last but one: a mask that is added to scores
        with pytest.raises(ValueError, match="attention_mask must hold 0 and 1"):
            model(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[wrong, 1.0, 1.0]]))


@pytest.mark.parametrize("name", ["s4d", "positional", "attention"])
def test_a_state_of_other_sequences_is_refused(name):
    mixer = make_mixer(name, 8)
    for batch in (1, 3):  # one would be taken for all
        with pytest.raises(ValueError, match="state must be of 2 sequences"):
            mixer.advance(torch.randn(2, 4, 8), mixer.init_state(batch))
