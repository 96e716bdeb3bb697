"""KV Prediction as a transformers model: generation, padding, saving, training, and assay's server."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties.architectures import build, inputs
from tests.tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from assay.methods.core.generation.cache import left_pad
from assay.methods.core.models.own import register_own
from assay.methods.inference import prepacking
from assay.methods.inference.kv_prediction import KVPredictor
from assay.server.backends import TorchBackend, backend_for
from assay.server.scheduler import Scheduler, Settings

PROMPTS = [token_ids(length=length, seed=length)[0].tolist() for length in (37, 5, 1, 18)]


def predictor(base=None, **settings):
    base = tiny_model(num_hidden_layers=4) if base is None else base
    torch.manual_seed(3)
    return KVPredictor.from_base(base, auxiliary=0.5, **settings).eval()


@torch.no_grad()
def by_hand(model, prompt, new):
    """Greedy tokens of one prompt: the prediction, then the base alone."""
    out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    found = []
    while len(found) < new:
        found.append(int(out.logits[0, -1].argmax()))
        out = model.base(input_ids=torch.tensor([found[-1:]]), cache=out.cache, use_cache=True)
    return found


# ------------------------------------------------------------------------------------------------------------ generation


def test_a_padded_batch_generates_what_each_prompt_does_alone():
    model = predictor()
    prompts = PROMPTS * 2
    ids, mask = left_pad(prompts, 0)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    assert found.tolist() == [by_hand(model, prompt, 6) for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_logits_of_a_padded_row_are_those_of_the_row_alone(name, attention):
    model = predictor(build(name, attn_implementation=attention))
    ids, mask = left_pad(PROMPTS, 0)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for cached in (True, False):
        found = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=cached).logits[:, -1]
        assert found.isfinite().all()
        for row, prompt in enumerate(PROMPTS):
            alone = model(input_ids=torch.tensor([prompt]), use_cache=cached).logits[0, -1]
            torch.testing.assert_close(found[row], alone, rtol=1e-3, atol=1e-3)


def test_beams_and_samples():
    model = predictor()
    ids, mask = left_pad(PROMPTS, 0)
    more = {"attention_mask": mask, "max_new_tokens": 5}
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, **more)
    assert beams.shape == (8, ids.shape[1] + 5)
    alone = model.generate(ids[:1], num_beams=3, do_sample=False, attention_mask=mask[:1], max_new_tokens=5)
    assert beams[0].tolist() == alone[0].tolist()
    torch.manual_seed(0)
    first = model.generate(ids, do_sample=True, **more)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, do_sample=True, **more), first)


def test_a_conversation_goes_on_behind_its_cache():
    model = predictor()
    ids = torch.tensor([PROMPTS[0]])
    first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = copy.deepcopy(first.cache)
    turn = torch.cat([first.sequences, torch.tensor([PROMPTS[1]])], 1)
    found = model.generate(turn, cache=first.cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.base.generate(turn, cache=cache, max_new_tokens=4, do_sample=False))


def test_prompts_in_pieces_and_drafts_are_refused():
    model = predictor()
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=8)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, max_new_tokens=4, assistant_model=tiny_model(), do_sample=False)


def test_prompts_packed_into_a_row_are_refused():
    assert prepacking.why_not(tiny_model()) == ""
    with pytest.raises(ValueError, match="KVPredictor"):
        prepacking.PrepackedPrefill(predictor())


def test_half_precision():
    model = predictor().bfloat16()
    ids, mask = left_pad(PROMPTS, 0)
    out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.logits[:, -1].isfinite().all()
    assert out.cache.layers[0].keys.dtype == torch.bfloat16
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3).shape == (4, ids.shape[1] + 3)


# ---------------------------------------------------------------------------------------------------------------- saving


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3", "gemma3"])
def test_a_saved_model_comes_back(name, tmp_path):
    changes = {"num_hidden_layers": 4}
    if name == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = predictor(build(name, **changes), consistency=0.5, variant="as_released")
    model.save_pretrained(tmp_path)
    assert register_own(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, KVPredictor)
    assert (again.config.consistency, again.config.variant) == (0.5, "as_released")
    assert again.config.layer_map == model.config.layer_map == [0, 0, 1, 1]
    assert not any(parameter.requires_grad for parameter in again.base.parameters())
    tied = again.base.get_input_embeddings().weight is again.base.get_output_embeddings().weight
    assert tied == (name in ("llama-tied", "gemma3"))
    assert again.base.get_input_embeddings().weight is not again.auxiliary.get_input_embeddings().weight
    ids = inputs(name, tokens=24)["input_ids"]
    for cached in (True, False):
        assert torch.equal(again(input_ids=ids, use_cache=cached).logits, model(input_ids=ids, use_cache=cached).logits)


def test_weights_in_half_precision_come_back(tmp_path):
    model = predictor().bfloat16()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_the_maps_begin_as_torchs_linear_layers_do():
    """Not as narrow as the base's weights, which predicts next to nothing; drawn from the global generator."""
    first, again = predictor(), predictor()
    assert torch.equal(first.predictor.keys[0].weight, again.predictor.keys[0].weight)
    bound = first.predictor.keys[0].in_features ** -0.5
    assert 0.9 * bound < first.predictor.keys[0].weight.abs().max() <= bound
    assert first.predictor.keys[0].bias.abs().max() > 0


# -------------------------------------------------------------------------------------------------------------- training


def trained(model, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 12)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    return model


def test_trainer_trains_the_auxiliary_and_the_maps(tmp_path):
    model = predictor()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, tmp_path, gradient_accumulation_steps=2)
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"auxiliary", "predictor"}


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    ids = token_ids(2, 12)
    plain, saving = predictor(), predictor()
    saving.activation_checkpointing_enable({"use_reentrant": False})
    runs = {plain: [], saving: []}
    for model, seen in runs.items():
        for layer in model.auxiliary.model.layers:
            layer.mlp.register_forward_pre_hook(lambda module, *_, seen=seen: seen.append(module))
        model.train()(input_ids=ids, labels=ids).loss.backward()
    assert len(runs[saving]) == 2 * len(runs[plain]) == 4  # layers ran again for their gradients
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_checkpointing_that_would_lose_the_keys_is_refused():
    model = predictor().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    ids = token_ids(2, 12)
    with pytest.raises(ValueError, match="use_reentrant"):
        model(input_ids=ids, labels=ids)


def test_training_goes_on_from_a_saved_model(tmp_path):
    predictor().save_pretrained(tmp_path / "model")
    model = KVPredictor.from_pretrained(tmp_path / "model")
    before = model.predictor.keys[0].weight.clone()
    trained(model, tmp_path)
    assert not torch.equal(model.predictor.keys[0].weight, before)


def test_learning_brings_the_prediction_closer():
    model = predictor().train()
    ids = token_ids(4, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = model.losses(ids, ids)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    last = model.losses(ids, ids)
    assert all(last[name] < 0.9 * first[name] for name in ("base", "auxiliary", "consistency"))


# ------------------------------------------------------------------------------------------------------------ the server


def answers(backend, prompts, new):
    scheduler = Scheduler(backend, start=False, prefill_chunk=16)
    told = [[] for _ in prompts]
    for prompt, events in zip(prompts, told, strict=True):
        scheduler.submit(prompt, Settings(max_tokens=new, logprobs=2), events.append)
    while scheduler.turn():
        pass
    return [[token for event in events for token in event.tokens] for events in told]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_served_answers_are_those_of_generate(name, tmp_path):
    """Rows run as one batch, a prompt longer than a piece is predicted whole, also with windows."""
    model = predictor(build(name, initializer_range=0.3))
    model.save_pretrained(tmp_path)
    register_own(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    backend = backend_for(model)
    assert isinstance(backend, TorchBackend)
    assert backend.rows is None
    assert not backend.pieces
    assert model.whole_prompts in backend.reason
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)[
            0
        ]
        for prompt in PROMPTS
    ]
    wanted = [row[len(prompt) :].tolist() for row, prompt in zip(expected, PROMPTS, strict=True)]
    assert answers(backend, PROMPTS, 5) == wanted


def test_a_row_that_was_put_back_goes_on_as_before():
    """After a preemption the prompt is predicted again and its answer read by the base, as it was made."""
    model, backend = predictor(), TorchBackend(predictor())
    expected = by_hand(model, PROMPTS[0], 6)
    row = backend.begin(backend.pool.take(4))
    first = int(backend.prefill(row, PROMPTS[0], "last").argmax())
    backend.extend(row, [first, *expected[1:3]])
    found, _ = backend.run([row], [expected[3]], 2, sampling=None, uniforms=None, want_logits=False)
    assert [first, *expected[1:4], *found[0].tolist()] == expected


def test_logits_of_the_whole_prompt_leave_the_answer_as_it_is():
    backend = TorchBackend(predictor())
    last, whole = (
        backend.prefill(backend.begin(backend.pool.take(4)), PROMPTS[0], wanted) for wanted in ("last", "all")
    )
    assert whole.shape[0] == len(PROMPTS[0])
    assert torch.equal(whole[-1:], last)


def test_generation_without_a_cache_is_refused():
    """It would give other text: every pass would predict the keys of the answer too."""
    with pytest.raises(ValueError, match="use_cache must be True"):
        predictor().generate(token_ids(length=5), max_new_tokens=2, use_cache=False)


def test_a_batchs_share_of_the_loss_does_not_depend_on_what_is_not_asked():
    model, ids = predictor(), token_ids(2, 12)
    labels = ids.clone()
    labels[:, :9] = -100
    asked = int((labels[:, 1:] != -100).sum())
    whole, share = model(ids, labels=labels).loss, model(ids, labels=labels, num_items_in_batch=asked).loss
    torch.testing.assert_close(share, whole)


def test_the_trainer_counts_what_is_asked(tmp_path):
    model = predictor().train()
    data = [{"input_ids": row, "labels": row} for row in token_ids(4, 12)]
    wanted = float(model(token_ids(4, 12), labels=token_ids(4, 12)).loss)
    options = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to=[], learning_rate=0.0, use_cpu=True
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-3)
