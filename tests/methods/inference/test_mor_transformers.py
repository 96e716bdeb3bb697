"""Mixture-of-Recursions where transformers, Trainer and the server use it: caches, padding, beams, files, unrelated architectures."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from tests.methods.inference.mor_models import KINDS, padded, tiny_mor
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids, write_tiny_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from assay.methods.inference.mor import MoRCache, MoRForCausalLM
from assay.server.backends import backend_for


@pytest.mark.parametrize("settings", KINDS)
@torch.no_grad()
def test_a_cache_changes_nothing(settings):
    """A prompt, a few tokens at once, single tokens: the logits and depths of the whole, for rows of different depth."""
    model = tiny_mor(**settings)
    ids = token_ids(4, 14)
    whole = model(ids)
    cache, found, depths = None, [], []
    for piece in ids.split([6, 1, 3, 1, 1, 2], 1):
        out = model(piece, cache=cache, use_cache=True)
        cache = out.cache
        found.append(out.logits)
        depths.append(out.depths)
    assert cache.get_seq_length() == 14
    assert torch.equal(torch.cat(depths, 1), whole.depths)
    torch.testing.assert_close(torch.cat(found, 1), whole.logits, rtol=1e-3, atol=1e-3)
    if settings.get("router") != "none":
        assert whole.depths.unique().numel() > 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", KINDS)
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(settings, attention):
    model = tiny_mor(**settings)
    model.base.set_attn_implementation(attention)
    lengths = [3, 9, 6]
    ids, mask, positions = padded(lengths)
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    more = torch.cat([mask, mask[:, -1:]], 1)
    step = model(token, attention_mask=more, position_ids=positions[:, -1:] + 1, cache=out.cache, use_cache=True)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, -length:], use_cache=True)
        assert torch.equal(alone.depths[0], out.depths[row, -length:])
        assert not out.depths[row, :-length].any()
        torch.testing.assert_close(out.logits[row, -length:], alone.logits[0], rtol=1e-3, atol=1e-3)
        after = model(token[row : row + 1], cache=alone.cache, use_cache=True)
        torch.testing.assert_close(step.logits[row], after.logits[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_top_k_takes_its_share_of_each_row_without_the_padding():
    model = tiny_mor(recursions=3, inference="top_k")
    ids, mask, positions = padded([4, 12, 7])
    out = model(ids, attention_mask=mask, position_ids=positions)
    for row, length in enumerate([4, 12, 7]):
        alone = model(ids[row : row + 1, -length:])
        assert torch.equal(alone.depths[0], out.depths[row, -length:])
        torch.testing.assert_close(out.logits[row, -length:], alone.logits[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_released_top_k_takes_every_new_token_through_all_recursions():
    model = tiny_mor(recursions=3, inference="top_k")
    out = model(token_ids(2, 9), use_cache=True)
    assert out.depths.unique().tolist() == [1, 2, 3]
    assert (model(token_ids(2, 1), cache=out.cache, use_cache=True).depths == 3).all()


@pytest.mark.parametrize("settings", [{}, {"router": "token", "recursions": 3}, {"kv": "share"}, {"kv": "update"}])
@torch.no_grad()
def test_generate(settings):
    """Greedy, with beams, sampled, left-padded, of eight rows, with drafts: each row as alone."""
    model = tiny_mor(**settings)
    ids, mask, _ = padded([3, 9, 6, 5, 8, 4, 7, 2])
    for how in ({}, {"num_beams": 3}):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **how)
        for row in (0, 1, 7) if not how else (2,):
            alone = model.generate(ids[row : row + 1][:, mask[row].bool()], max_new_tokens=6, do_sample=False, **how)
            assert together[row, -6:].tolist() == alone[0, -6:].tolist()
    without = model.generate(ids[1:2], max_new_tokens=6, do_sample=False, use_cache=False)
    assert without[0, -6:].tolist() == model.generate(ids[1:2], max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    drafted = model.generate(ids[1:2], max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)
    assert drafted.tolist() == without.tolist()
    torch.manual_seed(0)
    sampled = model.generate(ids[1:2], max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (2, 15)


@torch.no_grad()
def test_beams_follow_their_own_entries():
    """What a beam search over a cache finds is what one that computes everything anew finds."""
    model = tiny_mor(recursions=3)
    ids = token_ids(2, 5)
    how = {"max_new_tokens": 7, "num_beams": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


@torch.no_grad()
def test_a_cache_that_nobody_placed_goes_where_the_tokens_are():
    model, ids = tiny_mor(recursions=3), token_ids(2, 6)
    cache = MoRCache()
    found = model(ids, cache=cache, use_cache=True)
    assert (cache.rows, cache.device) == (2, ids.device)
    assert torch.equal(found.logits, model(ids).logits)
    placed = MoRCache(2, "cpu")
    model(ids, cache=placed, use_cache=True)
    assert placed.device == "cpu"
    assert all(stage.lengths.device == ids.device for stage in cache.stages.values())


@pytest.mark.gpu
@torch.no_grad()
def test_a_cache_that_nobody_placed_on_an_accelerator():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, ids = tiny_mor(recursions=3).cuda(), token_ids(2, 6).cuda()
    cache = MoRCache()
    found = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([4, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_cache_operations():
    model = tiny_mor(recursions=3)
    ids = token_ids(3, 8)
    nexts = token_ids(3, 1, seed=5)

    def begun():
        return model(ids, use_cache=True).cache

    def step(cache, rows):
        return model(nexts[rows], cache=cache, use_cache=True).logits

    plain = step(begun(), [0, 1, 2])
    cache = begun()
    cache.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(step(cache, [2, 0]), plain[[2, 0]], rtol=1e-4, atol=1e-4)
    cache = begun()
    cache.batch_select_indices(torch.tensor([True, False, True]))
    torch.testing.assert_close(step(cache, [0, 2]), plain[[0, 2]], rtol=1e-4, atol=1e-4)
    cache = begun()
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(step(cache, [1, 1, 0]), plain[[1, 1, 0]], rtol=1e-4, atol=1e-4)
    cache = begun()
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step(cache, [0, 0, 1, 1, 2, 2]), plain[[0, 0, 1, 1, 2, 2]], rtol=1e-4, atol=1e-4)
    cache = begun()
    model(token_ids(3, 4, seed=9), cache=cache, use_cache=True)
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    assert cache.entries() == begun().entries()
    torch.testing.assert_close(step(cache, [0, 1, 2]), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.bytes() == 0
    with pytest.raises(TypeError, match="forward pass"):
        cache.update(None, None, 0)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saved_and_loaded(tmp_path, tied):
    base = tiny_model(num_hidden_layers=4, tie_word_embeddings=tied)
    model = MoRForCausalLM.from_base(base, recursions=3, causality="aux_router", alpha=0.2, capacities=[1.0, 0.5, 0.25])
    model.routers.balance += 3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is MoRForCausalLM
    for field in ("recursions", "causality", "alpha", "capacities", "aux_weight", "z_weight", "kv", "sharing"):
        assert getattr(again.config, field) == getattr(model.config, field)
    assert again.routers.balance.tolist() == [3, 3, 3]
    ids = token_ids(2, 9)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(again.base.model.layers) == 4
    assert (again.base.lm_head.weight is again.base.model.embed_tokens.weight) == tied


@pytest.mark.slow  # a fresh interpreter imports torch and transformers
@torch.no_grad()
def test_a_stored_model_is_found_by_a_process_that_never_heard_of_it(tmp_path):
    model = tiny_mor(recursions=3)
    model.save_pretrained(tmp_path)
    ids = token_ids(1, 9)
    code = f"""
import torch
from assay.methods.core.models.own import register_own
from transformers import AutoModelForCausalLM
assert register_own({str(tmp_path)!r})
print(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()(torch.tensor({ids.tolist()})).logits[0, -1].argmax().item())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == int(model(ids).logits[0, -1].argmax())


@torch.no_grad()
def test_loaded_in_half_precision(tmp_path):
    model = tiny_mor()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = token_ids(2, 9)
    assert half(ids).logits.dtype == torch.bfloat16
    assert half.routers.scores(half.base.model.embed_tokens(ids)).dtype == torch.float32
    torch.testing.assert_close(half(ids).logits[:, 0].float(), model(ids).logits[:, 0], rtol=0.2, atol=1.0)
    out = half.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 13)


def test_the_loss_has_both_parts():
    model = tiny_mor(training=True, aux_weight=0.5)
    ids = token_ids(2, 9)
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected + out.aux_loss)
    assert out.aux_loss.item() > 0
    out.loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers.main)
    assert model.eval()(ids, labels=ids).aux_loss is None


def test_parts_of_a_batch_have_their_shares_of_the_auxiliary_loss():
    """Shares of what is predicted, as the Trainer counts it, which is without the first tokens: together they are one."""
    model = tiny_mor(training=True, aux_weight=0.5)
    ids = token_ids(2, 9)
    labels = ids.clone()
    labels[0, 5:] = -100
    asked = [int(row[1:].ne(-100).sum()) for row in labels]
    assert asked == [4, 8]
    parts = [
        model(row, labels=label, num_items_in_batch=torch.tensor(12))
        for row, label in zip(ids.split(1), labels.split(1), strict=True)
    ]
    out = model(ids, labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    aux = sum(part.aux_loss * count / 12 for part, count in zip(parts, asked, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), plain + aux)


def test_trainer_takes_a_step(tmp_path):
    model = tiny_mor(training=True)
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4, 9)]
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
    }
    how = TrainingArguments(tmp_path, report_to=[], use_cpu=True, save_strategy="no", **settings)
    trainer = Trainer(model, how, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "routers.main.1.weight" in changed
    assert "base.model.layers.1.mlp.up_proj.weight" in changed
    assert trainer.evaluate()["eval_loss"] > 0


def test_gradient_checkpointing_computes_the_same():
    grads = []
    for checkpointing in (False, True):
        model = tiny_mor(recursions=3, training=True)
        if checkpointing:
            model.activation_checkpointing_enable()
        calls = []
        model.base.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ids = token_ids(2, 9)
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert len(calls) == (6 if checkpointing else 3)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
    model = tiny_mor(kv="share", training=True)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids)


@pytest.mark.parametrize("kv", ["share", "update"])
def test_gradients_reach_the_shared_keys(kv):
    """By finite differences, in float64: what a later recursion attends to is differentiated like the rest."""
    torch.manual_seed(1)
    base = tiny_model(num_hidden_layers=3).double()
    model = MoRForCausalLM.from_base(base, kv=kv, router="none")
    weight = model.base.model.layers[1].self_attn.v_proj.weight
    ids = token_ids(1, 5)

    def loss():
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])

    loss().backward()
    with torch.no_grad():
        found, step = weight.grad[3, 5].item(), 1e-3
        losses = []
        for sign in (1, -2):
            weight[3, 5] += sign * step
            losses.append(loss().item())
    assert found == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_other_architectures_work_or_are_refused_by_name(name):
    """A refusal comes before anything is changed; what works does so with a cache, windows and caps included."""
    base = build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    ids = inputs(name, batch=2, tokens=40)["input_ids"]
    reference = base(ids).logits
    worked, refusals = set(), []
    for settings in (
        {"router": "none", "recursions": 1},
        {"recursions": 3},
        {"recursions": 2, "kv": "share"},
        {"recursions": 2, "kv": "update"},
    ):
        torch.manual_seed(2)
        try:
            model = MoRForCausalLM.from_base(base, sharing="cycle", **settings)
        except ValueError as error:
            refusals.append(str(error))
            continue
        worked.add(settings.get("kv", "recursion"))
        if settings["recursions"] > 1:
            for router in model.routers.main:
                router.weight.normal_()
        whole = model(ids)
        assert whole.logits.isfinite().all()
        if settings["recursions"] == 1:
            torch.testing.assert_close(whole.logits, reference, rtol=1e-4, atol=1e-4)
        begun = model(ids[:, :30], use_cache=True)
        rest = [model(piece, cache=begun.cache, use_cache=True).logits for piece in ids[:, 30:].split([1, 8, 1], 1)]
        torch.testing.assert_close(torch.cat([begun.logits, *rest], 1), whole.logits, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert torch.equal(base(ids).logits, reference)
    assert all(type(base).__name__ in refusal for refusal in refusals)
    if name in ("llama", "llama-tied", "qwen2", "mistral", "gemma2", "gemma3"):
        assert worked == {"recursion", "share", "update"}
    if name in ("gpt2", "opt", "mamba"):
        assert not worked


@torch.no_grad()
def test_it_is_served(tmp_path):
    """A stored model behind the server's torch backend answers what `generate` answers."""
    folder = write_tiny_llama(tmp_path / "base", layers=4)
    base = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
    MoRForCausalLM.from_base(base, recursions=3).save_pretrained(tmp_path / "mor")
    assert json.loads((tmp_path / "mor" / "config.json").read_text())["model_type"] == "assay_mor"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mor").eval()
    backend = backend_for(model)
    assert backend.name == "torch"
    prompt = token_ids(1, 12, vocab=200)[0].tolist()
    sequence = backend.begin(backend.pool.take(2))
    logits = backend.prefill(sequence, prompt, "last")
    first = int(logits[-1].argmax())
    answers, _ = backend.run([sequence], [first], 5, sampling=None, uniforms=None, want_logits=False)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [first, *answers[0].tolist()] == expected[0, len(prompt) :].tolist()


@torch.no_grad()
def test_bad_calls_say_what_is_wrong():
    model, ids = tiny_mor(), token_ids(2, 5)
    with pytest.raises(TypeError, match="MoRCache"):
        model(ids, cache=DynamicCache())
    with pytest.raises(TypeError, match="past_key_values"):
        model(ids, past_key_values=MoRCache(2))
    with pytest.raises(ValueError, match="2 rows"):
        model(ids, cache=MoRCache(3))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="0 and 1"):
        model(ids, attention_mask=torch.full((2, 5), 2))
    with pytest.raises(ValueError, match="must be given"):
        model()
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(TypeError, match="input_ids"):
        model(ids.float())
    model.base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa or eager"):
        model(ids)
