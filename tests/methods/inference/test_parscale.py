"""ParScale: the streams against the formula, one stream against the base, and the model as transformers uses it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from assay.errors import InputError
from assay.methods.core import kernels
from assay.methods.core.models.own import register_own
from assay.methods.inference.parscale import (
    ParScaleConfig,
    ParScaleForCausalLM,
    StreamCache,
    fold_prefixes,
    load_adapter,
    load_released,
    prepare_training,
    save_adapter,
    save_released,
)
from assay.methods.inference.parscale import model as room
from assay.methods.inference.parscale.released import from_released, released_name

P, N = 3, 5  # streams and prefix tokens of most tests
WORKING = ("llama", "llama-tied", "qwen2", "phi3", "mistral", "gemma3", "gemma2", "mixtral")


def streams(base=None, *, seed: int = 0, wide: bool = True, **settings):
    """Streams around a tiny model, with prefixes and an aggregator wide enough to matter."""
    base = tiny_model() if base is None else base
    torch.manual_seed(seed)
    settings = {"parscale_n": P, "parscale_n_tokens": N, **settings}
    model = ParScaleForCausalLM.from_base(base, **settings)
    if wide:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("base."):
                    parameter.normal_(std=0.3 if name.startswith("aggregator") else 1.0)
    return model.eval()


@torch.no_grad()
def logits_of(model, ids, **given):
    return model(input_ids=ids, use_cache=False, **given).logits


# ---------------------------------------------------------------------------------------------------------------- the formula


def by_formula(model, ids):
    """Logits of one row of ids by the paper's formula, stream by stream and query by query, for a Llama in float64."""
    base, config = model.base, model.base.config
    dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    turns = 1.0 / (10000.0 ** (torch.arange(0, dim, 2) / dim))

    def rotated(x):  # (tokens, heads, dim); transformers makes its tables in float32
        angles = torch.arange(len(x))[:, None] * turns
        cos, sin = angles.cos()[:, None].double(), angles.sin()[:, None].double()
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    last = []
    for stream in range(model.config.parscale_n):
        x = base.model.embed_tokens(ids)
        for layer, prefix in zip(base.model.layers, model.prefixes.layers, strict=True):
            y, attention = layer.input_layernorm(x), layer.self_attn
            q = rotated(attention.q_proj(y).view(len(y), -1, dim))
            k = rotated(attention.k_proj(y).view(len(y), -1, dim))
            v = attention.v_proj(y).view(len(y), -1, dim)
            mixed = torch.zeros_like(q)
            for t in range(len(y)):
                for head in range(q.shape[1]):
                    keys = torch.cat([prefix.keys[stream, head // group], k[: t + 1, head // group]])
                    vals = torch.cat([prefix.values[stream, head // group], v[: t + 1, head // group]])
                    mixed[t, head] = (keys @ q[t, head] / dim**0.5).softmax(0) @ vals
            x = x + attention.o_proj(mixed.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last.append(base.model.norm(x))
    out = []
    first, second, eps = model.aggregator.first, model.aggregator.second, model.config.parscale_attn_smooth
    for t in range(len(ids)):
        joined = torch.stack([h[t][f] for f in range(config.hidden_size) for h in last])
        hidden = first.weight @ joined + first.bias
        scores = second.weight @ (hidden / (1 + torch.exp(-hidden))) + second.bias
        weights = scores.exp() / scores.exp().sum() * (1 - eps) + eps / len(last)
        out.append(base.lm_head(sum(w * h[t] for w, h in zip(weights, last, strict=True))))
    return torch.stack(out)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_streams_are_what_the_formula_says(kv_heads):
    model = streams(tiny_model(num_key_value_heads=kv_heads)).double()
    ids = token_ids(2, 7)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        for row in range(2):
            torch.testing.assert_close(found[row], by_formula(model, ids[row]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [9, 40])  # 40: beyond the windows of 16
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_the_fused_path_equals_an_explicit_mask(name, tokens):
    model, ids = streams(build(name)), inputs(name, 2, tokens)["input_ids"]
    path = "attention behind prefixes: causal kernel"
    before = kernels.paths().get(path, 0)
    fused = logits_of(model, ids)
    only_windows = name == "mistral" and tokens == 40
    assert kernels.paths().get(path, 0) == before + (not only_windows)
    if name == "llama":
        torch.testing.assert_close(logits_of(model, ids, attention_mask=causal(tokens, 2)), fused, rtol=1e-4, atol=1e-4)
        before = kernels.paths()[path]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, ids), fused, rtol=1e-4, atol=1e-4)
    assert kernels.paths().get(path, 0) == before + (not only_windows and name != "llama")


def causal(tokens: int, rows: int):
    return torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_mask_serves_all_rows(implementation):
    model, ids = streams(), token_ids(3, 7)
    model.set_attn_implementation(implementation)
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~causal(7, 1), -torch.inf)
    mask[..., 6, 2:4] = -torch.inf
    found = logits_of(model, ids, attention_mask=mask)
    torch.testing.assert_close(
        found, logits_of(model, ids, attention_mask=mask.repeat(3, 1, 1, 1)), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(found[:, 6], logits_of(model, ids)[:, 6], atol=1e-3)


def test_a_sliding_window_does_not_leave_the_prefix_behind():
    model = streams(build("mistral"))
    ids = inputs("mistral", 1, 40)["input_ids"]
    long = logits_of(model, ids)[:, -1]
    with torch.no_grad():
        for layer in model.prefixes.layers:
            layer.values.add_(1.0)
    assert (logits_of(model, ids)[:, -1] - long).abs().max() > 1e-2


def test_the_base_keeps_its_attention():
    base = tiny_model()
    model, ids = streams(base), token_ids(1, 6)
    before = logits_of(base, ids)
    logits_of(model, ids)
    assert base.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(base, ids), before)
    broken = copy.deepcopy(model)
    broken.base.model.layers[1].forward = None
    with pytest.raises(TypeError):
        broken(input_ids=ids)
    assert broken.base.config._attn_implementation == "sdpa"


def test_equal_streams_are_one_stream_for_any_weights():
    model = streams().double()
    with torch.no_grad():
        for layer in model.prefixes.layers:
            layer.keys.copy_(layer.keys[:1].expand_as(layer.keys))
            layer.values.copy_(layer.values[:1].expand_as(layer.values))
        found = model.stream_states(token_ids(2, 6), use_cache=False).states
        torch.testing.assert_close(model.aggregator(found), found[0])
        torch.testing.assert_close(found[1], found[0])


def test_weights_are_shares_and_never_too_small():
    torch.manual_seed(0)
    for smoothing in (0.0, 0.1, 1.0):
        aggregator = room.Aggregator(4, 8, smoothing)
        with torch.no_grad():
            aggregator.second.weight.normal_(std=50)  # it starts at zero, where all weights are equal
            weights = aggregator.weights(torch.randn(4, 2, 3, 8))
        assert weights.shape == (2, 3, 4)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
        assert float(weights.min()) == pytest.approx(smoothing / 4, abs=1e-3)  # reached, and not passed
    assert (weights == 0.25).all()  # smoothing 1: a plain mean


def test_streams_change_places_with_their_columns():
    model = streams().double()
    moved, order = copy.deepcopy(model), torch.tensor([2, 0, 1])
    with torch.no_grad():
        for layer in moved.prefixes.layers:
            layer.keys.copy_(layer.keys[order])
            layer.values.copy_(layer.values[order])
        width = model.config.hidden_size
        first = moved.aggregator.first.weight.view(width, width, P)  # (out, feature, stream)
        moved.aggregator.first.weight.copy_(first[..., order].reshape(width, -1))
        moved.aggregator.second.weight.copy_(moved.aggregator.second.weight[order])
        moved.aggregator.second.bias.copy_(moved.aggregator.second.bias[order])
    ids = token_ids(2, 6)
    torch.testing.assert_close(logits_of(moved, ids), logits_of(model, ids))


def test_extra_parameters():
    base = tiny_model()
    model = streams(base)
    config = base.config
    heads, dim, width = config.num_key_value_heads, config.head_dim, config.hidden_size
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("base."))
    assert own == 2 * 2 * P * heads * N * dim + (P * width * width + width) + (width * P + P)
    assert not [name for name, _ in streams(parscale_n=1).named_parameters() if not name.startswith("base.")]


# ------------------------------------------------------------------------------------------------- one stream is the base model


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_stream_is_smollm2(smollm2_slice, dtype):
    base = copy.deepcopy(smollm2_slice.model).to(dtype)
    one_stream_is(base)


@pytest.mark.slow
@pytest.mark.model
def test_one_stream_is_the_whole_smollm2(smollm2):
    one_stream_is(smollm2.model)


@torch.no_grad()
def one_stream_is(base):
    model = ParScaleForCausalLM.from_base(base, parscale_n=1)
    ids = token_ids(3, 12, vocab=40_000)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :1] = 0
    for given in ({}, {"attention_mask": mask}, {"labels": ids}):
        ours, theirs = model(input_ids=ids, **given), base(input_ids=ids, **given)
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.loss is None or torch.equal(ours.loss, theirs.loss)
    caches = [model(input_ids=ids, attention_mask=mask).cache, base(input_ids=ids, attention_mask=mask).cache]
    assert type(caches[0]) is type(caches[1]) is DynamicCache
    mask = torch.cat([mask, mask[:, -1:]], 1)
    for _ in range(2):
        steps = [
            m(input_ids=ids[:, :1], attention_mask=mask, cache=c).logits
            for m, c in zip((model, base), caches, strict=True)
        ]
        mask = torch.cat([mask, mask[:, -1:]], 1)
        assert torch.equal(*steps)
    options = {"attention_mask": mask[:, :12], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))


# ------------------------------------------------------------------------------------------------------------ caches and rows


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_works_or_is_refused_by_name(name):
    base = build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    kind = getattr(base.config, "_attn_implementation", None)
    if name not in WORKING:
        with pytest.raises(ValueError, match=type(base).__name__):
            streams(base)
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
        return
    model = streams(base)
    ids = inputs(name, 2, 30)["input_ids"]
    whole = logits_of(model, ids)
    cache = None
    for part in (ids[:, :11], ids[:, 11:14], *ids[:, 14:].split(1, 1)):  # windows of 16 are left behind
        with torch.no_grad():
            out = model(input_ids=part, cache=cache, use_cache=True)
        cache = out.cache
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(out.logits[:, -1], whole[:, -1], rtol=1e-3, atol=1e-3)
    assert base.config._attn_implementation == kind


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_a_padded_row_is_the_row_alone(name):
    model = streams(build(name))
    ids = inputs(name, 2, 24)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
        alone = model(input_ids=ids[:1, 7:], use_cache=True)
        torch.testing.assert_close(out.logits[:1, 7:], alone.logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(out.logits[1:], logits_of(model, ids[1:]), rtol=1e-3, atol=1e-3)
        more = torch.cat([mask, mask[:, -1:]], 1)
        step = model(input_ids=ids[:, :1], attention_mask=more, position_ids=places[:, -1:] + 1, cache=out.cache)
        single = model(input_ids=ids[:1, :1], cache=alone.cache)
    torch.testing.assert_close(step.logits[:1], single.logits, rtol=1e-3, atol=1e-3)


def test_generation():
    model = streams()
    ids = token_ids(8, 6)
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0
    ids = ids * mask
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **options)
    assert torch.equal(greedy, model.generate(ids, do_sample=False, use_cache=False, **options))
    for row in range(2):
        alone = model.generate(ids[row : row + 1, 2 - 2 * row :], do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert torch.equal(alone[0, -6:], greedy[row, -6:])
    beams = model.generate(ids, do_sample=False, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, do_sample=False, num_beams=3, use_cache=False, **options))
    assert not torch.equal(beams, greedy)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, num_return_sequences=2, **options)
    assert sampled.shape == (16, 12)


def test_reordering_moves_all_streams_of_a_sequence():
    model, ids = streams(), token_ids(3, 6)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        found = model(input_ids=ids[:, :1], cache=cache).logits
        other = model(input_ids=ids[order], use_cache=True).cache
        wanted = model(input_ids=ids[:, :1], cache=other).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_a_cache_is_asked_for():
    model, ids = streams(), token_ids(2, 6)
    config = model.base.config
    with torch.no_grad():
        cache = model.new_cache()
        assert (cache.get_seq_length(), cache.batch_size, cache.bytes()) == (0, -1, 0)
        model(input_ids=ids, cache=cache)
        assert (cache.get_seq_length(), cache.batch_size) == (6, 2)
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert cache.bytes() == P * 2 * (6 + N) * token  # streams x sequences x (tokens + prefix)

        def next_of(made, rows):
            return model(input_ids=rows[:, -1:], cache=made).logits

        def fresh(rows):
            return model(input_ids=rows, use_cache=True).cache

        for kept in (torch.tensor([1]), torch.tensor([False, True])):
            some = copy.deepcopy(cache)
            some.batch_select_indices(kept)
            torch.testing.assert_close(next_of(some, ids[1:]), next_of(fresh(ids[1:]), ids[1:]), rtol=1e-5, atol=1e-5)
        more = copy.deepcopy(cache)
        more.batch_repeat_interleave(2)
        twice = ids.repeat_interleave(2, 0)
        torch.testing.assert_close(next_of(more, twice), next_of(fresh(twice), twice), rtol=1e-5, atol=1e-5)
        cut = copy.deepcopy(cache)
        cut.crop(-2)
        assert cut.get_seq_length() == 4
        torch.testing.assert_close(
            next_of(cut, ids[:, :5]), next_of(fresh(ids[:, :4]), ids[:, :5]), rtol=1e-5, atol=1e-5
        )
        with pytest.raises(ValueError, match="-5"):
            cut.crop(-6)
        cut.crop(-5)
        torch.testing.assert_close(next_of(cut, ids[:, :1]), logits_of(model, ids[:, :1]), rtol=1e-5, atol=1e-5)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(
            model(input_ids=ids, cache=cache).logits, logits_of(model, ids), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_a_cache_keeps_the_prefixes_it_was_made_with(name):
    model, ids = streams(build(name)), inputs(name, 2, 20)["input_ids"]
    other = copy.deepcopy(model)
    ours, theirs = ([made.new_cache(), made(input_ids=ids, use_cache=True).cache] for made in (model, other))
    for layer in model.prefixes.layers:
        layer.keys.add_(1.0)
        layer.values.add_(1.0)
    for found, wanted in zip(ours, theirs, strict=True):  # one that is empty, one that holds a prompt
        torch.testing.assert_close(
            model(input_ids=ids[:, :1], cache=found).logits, other(input_ids=ids[:, :1], cache=wanted).logits
        )
    assert not torch.allclose(logits_of(model, ids), logits_of(other, ids), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "changes"), [("mistral", {}), ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]})]
)
@torch.no_grad()
def test_a_window_is_cut_as_far_as_it_remembers(name, changes):
    model, ids = streams(build(name, **changes)), inputs(name, 2, 30)["input_ids"]  # windows of 16

    def next_is_that_of(cache, tokens):
        fresh = model(input_ids=ids[:, :tokens], use_cache=True).cache
        found, wanted = (model(input_ids=ids[:, tokens : tokens + 1], cache=c).logits for c in (cache, fresh))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    short, long, recorded = model.new_cache(), model.new_cache(), model.new_cache()
    model(input_ids=ids[:, :9], cache=short)
    with pytest.raises(ValueError, match="tokens_to_remove must be a whole number at least -9"):
        short.crop(-10)
    assert short.get_seq_length() == 9
    short.crop(-4)
    next_is_that_of(short, 5)

    model(input_ids=ids[:, :29], cache=long)
    with pytest.raises(ValueError, match="a window of 16 has left tokens behind"):
        long.crop(-1)
    assert long.get_seq_length() == 29
    next_is_that_of(long, 29)  # no layer was cut

    recorded.activate_past_recording()
    model(input_ids=ids[:, :29], cache=recorded)
    recorded.crop(-3)
    next_is_that_of(recorded, 26)


def test_what_is_shared_is_computed_once():
    """Embedding and head see each token once, the body once a stream, and a prompt's aggregator its last token alone."""
    model, ids, seen = streams(), token_ids(2, 6), {}
    parts = {
        "embedding": model.base.model.embed_tokens,
        "head": model.base.lm_head,
        "body": model.base.model.layers[0].mlp,
        "aggregator": model.aggregator.first,
    }
    for name, module in parts.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.shape[:-1].numel()))
    logits_of(model, ids)
    assert seen == {"embedding": 12, "head": 12, "body": 12 * P, "aggregator": 12}
    logits_of(model, ids, logits_to_keep=1)
    assert seen == {"embedding": 12, "head": 2, "body": 12 * P, "aggregator": 2}
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache
        model(input_ids=ids[:, :1], cache=cache)
    assert seen == {"embedding": 2, "head": 2, "body": 2 * P, "aggregator": 2}


# -------------------------------------------------------------------------------------------------------------------- training


def test_new_prefixes_are_numbers():
    for hidden in (0, 64):
        model = streams(wide=False, parscale_prefix_hidden=hidden)
        width = 0.3 * 64**0.5  # of the keys of an untrained layer
        for keys, values in model.prefixes():
            for made in (keys.detach(), values.detach()):
                assert made.isfinite().all()
                assert 0.3 * width < float(made.std()) < 1.2 * width
                assert not torch.equal(made[0], made[1])
        weights = model.aggregator.weights(torch.randn(P, 2, 3, 64))
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / P))


def test_loss_and_gradients_by_recipe():
    model, ids = streams(), token_ids(2, 8)
    out = model(input_ids=ids, labels=ids)
    wanted = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    for recipe in ("scratch", "two_stage", "frozen"):
        model.zero_grad()
        prepare_training(model, recipe)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            trains = recipe != "frozen" or not name.startswith("base.")
            assert (parameter.grad is not None) == trains, name
            assert not trains or parameter.grad.isfinite().all()
            assert not trains or name.startswith("base.") or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, frozen):
    model = streams(build(name))
    prepare_training(model, "frozen" if frozen else "scratch")
    ids = inputs(name, 2, 20)["input_ids"]
    grads, runs = [], []
    model.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(len(grads)))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert runs == [0, 1, 1]  # the second time a layer ran again
    assert len(grads[0]) == len(grads[1]) > 3
    for plain, replayed in zip(*grads, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


def test_a_cache_is_refused_where_layers_run_twice():
    model, ids = streams().train(), token_ids(2, 6)
    model.gradient_checkpointing_enable()
    cache = model.new_cache()
    with pytest.raises(ValueError, match="cache must be left out under gradient checkpointing"):
        model(input_ids=ids, labels=ids, cache=cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(input_ids=ids, cache=cache)  # nothing runs twice
    assert cache.get_seq_length() == 6


def test_trainer_takes_a_step(tmp_path):
    model = prepare_training(streams(), "frozen")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4, 8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("base."), name


def test_projected_prefixes_fold():
    model = streams(parscale_prefix_hidden=8)
    ids = token_ids(2, 6)
    before = logits_of(model, ids)
    folded = fold_prefixes(model)
    assert folded is model
    assert model.config.parscale_prefix_hidden == 0
    assert torch.equal(logits_of(model, ids), before)
    with pytest.raises(ValueError, match="parscale_prefix_hidden"):
        fold_prefixes(model)


def test_half_precision():
    model, ids = streams().to(torch.bfloat16), token_ids(2, 9)
    exact = logits_of(streams(), ids)
    found = logits_of(model, ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.no_grad():
        out = model(input_ids=ids[:, :5], use_cache=True)
        assert {layer.keys.dtype for layer in out.cache.layers} == {torch.bfloat16}
        for token in ids[:, 5:].split(1, 1):
            out = model(input_ids=token, cache=out.cache)
    assert (out.logits[:, -1] - found[:, -1]).abs().max() < 0.1 * exact.abs().max()


# --------------------------------------------------------------------------------------------------------------- stored, served


@pytest.mark.parametrize("settings", [{}, {"parscale_prefix_hidden": 8}, {"parscale_n": 1}])
@pytest.mark.parametrize("tied", [False, True])
def test_stored_and_loaded(tmp_path, tied, settings):
    model, ids = streams(tiny_model(tie_word_embeddings=tied), **settings), token_ids(2, 6)
    model.save_pretrained(tmp_path)
    assert register_own(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is ParScaleForCausalLM
    assert loaded.config.parscale_n == settings.get("parscale_n", P)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    torch.testing.assert_close(logits_of(loaded.eval(), ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)
    assert (loaded.base.lm_head.weight is loaded.base.model.embed_tokens.weight) == tied


def test_adapters_switch_the_number_of_streams(tmp_path):
    base, ids = tiny_model(), token_ids(2, 6)
    two, four = streams(base, parscale_n=2), streams(base, parscale_n=4, parscale_prefix_hidden=8)
    wanted = [logits_of(two, ids), logits_of(four, ids)]
    assert not torch.equal(*wanted)
    save_adapter(two, tmp_path / "two")
    save_adapter(four, tmp_path / "four")
    small = sum(file.stat().st_size for file in (tmp_path / "two").iterdir())
    assert small < 4 * sum(p.numel() for n, p in two.named_parameters() if not n.startswith("base.")) + 4096
    for name, logits in zip(("two", "four"), wanted, strict=True):
        loaded = load_adapter(base, tmp_path / name)
        assert loaded.base is base
        assert torch.equal(logits_of(loaded, ids), logits)
    with pytest.raises(InputError, match="kv_heads"):
        load_adapter(tiny_model(num_key_value_heads=4), tmp_path / "two")
    with pytest.raises(InputError, match="adapter"):
        load_adapter(base, tmp_path)
    settings = json.loads((tmp_path / "two" / room.SETTINGS).read_text())
    (tmp_path / "two" / room.SETTINGS).write_text(json.dumps({**settings, "parscale_n": 3}))
    with pytest.raises(InputError, match="tensors"):
        load_adapter(base, tmp_path / "two")
    (tmp_path / "two" / room.SETTINGS).write_text(json.dumps({**settings, "parscale_n": -3}))
    with pytest.raises(InputError, match="parscale_n"):
        load_adapter(base, tmp_path / "two")
    with pytest.raises(ValueError, match="parscale_n"):
        save_adapter(streams(parscale_n=1), tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("SmolLM3", {"no_rope_layers": [1, 0]}),
    ],
)
def test_an_adapter_knows_what_no_weight_tells(tmp_path, name, changes):
    """Bases with the same weights that compute something else."""

    def made(**changes):
        return build(name, **changes) if name in CAUSAL else tiny_model(name, **{"no_rope_layers": [1, 1], **changes})

    save_adapter(streams(made()), tmp_path)
    with pytest.raises(InputError, match=f"base must have {next(iter(changes))}"):
        load_adapter(made(**changes), tmp_path)
    assert load_adapter(made(), tmp_path).config.parscale_n == P


def test_a_refused_adapter_leaves_its_base_alone(tmp_path):
    base = tiny_model()
    base.lm_head = nn.Linear(64, 97, bias=False)  # exchanged: transformers has not marked it as initialised
    twin = copy.deepcopy(base)
    save_adapter(streams(base), tmp_path)
    settings = json.loads((tmp_path / room.SETTINGS).read_text())
    (tmp_path / room.SETTINGS).write_text(json.dumps({**settings, "parscale_n": P + 1}))
    before = [set(vars(module)) for module in twin.modules()]
    with pytest.raises(InputError, match="tensors"):
        load_adapter(twin, tmp_path)
    assert [set(vars(module)) for module in twin.modules()] == before
    with pytest.raises(TypeError, match="base must be a model of transformers, got Linear"):
        load_adapter(nn.Linear(2, 2), tmp_path)
    with pytest.raises(InputError, match="base must have model_type llama, as the adapter's, got mamba"):
        load_adapter(build("mamba"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_knows_its_base_in_another_dtype(tmp_path, dtype):
    base, ids = tiny_model(), token_ids(2, 6)
    save_adapter(streams(base), tmp_path)
    halved = copy.deepcopy(base).to(dtype)
    loaded = load_adapter(halved, tmp_path)
    assert loaded.base is halved
    assert torch.equal(logits_of(loaded, ids), logits_of(streams(base).to(dtype), ids))


def test_an_adapter_refuses_another_base(tmp_path):
    base = tiny_model()
    save_adapter(streams(base), tmp_path / "made")
    twin = tiny_model(seed=1)  # the same sizes, other weights
    before = set(vars(twin))
    with pytest.raises(InputError, match="llama model that the adapter"):
        load_adapter(twin, tmp_path / "made")
    assert set(vars(twin)) == before
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.model.layers[1].mlp.down_proj.parameters():
            weight.mul_(1.02)
    with pytest.raises(InputError, match="weights differ"):
        load_adapter(tuned, tmp_path / "made")
    for name, changed in (
        ("rope_parameters", {"rope_theta": 5e5}),
        ("rms_norm_eps", {"rms_norm_eps": 1e-3}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("num_hidden_layers", {"num_hidden_layers": 1}),
        ("model_type", {"kind": "Qwen2"}),
    ):
        with pytest.raises(InputError, match=name):
            load_adapter(tiny_model(**changed), tmp_path / "made")
    file = tmp_path / "made" / room.WEIGHTS
    save_file({name: value for name, value in load_file(file).items() if name != room.SAMPLE}, file)
    with pytest.raises(InputError, match="weights differ"):
        load_adapter(base, tmp_path / "made")
    settings = json.loads((tmp_path / "made" / room.SETTINGS).read_text())
    (tmp_path / "made" / room.SETTINGS).write_text(json.dumps({**settings, "base": None}))
    with pytest.raises(InputError, match="describe"):
        load_adapter(base, tmp_path / "made")


def test_an_adapter_refuses_the_base_as_it_was_before_it_trained(tmp_path):
    before = tiny_model()
    model = prepare_training(streams(copy.deepcopy(before)), "two_stage")
    ids = token_ids(2, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path)
    with pytest.raises(InputError, match="weights differ"):
        load_adapter(before, tmp_path)
    torch.testing.assert_close(logits_of(load_adapter(model.base, tmp_path), ids), logits_of(model, ids))


@pytest.mark.parametrize("tied", [False, True])
def test_released_layout(tmp_path, tied):
    model, ids = streams(tiny_model("Qwen2", tie_word_embeddings=tied, rope_theta=1e6)), token_ids(2, 6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(std=0.3)
    save_released(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["model_type"], fields["parscale_n"], fields["parscale_n_tokens"]) == ("qwen2_parscale", P, N)
    loaded = load_released(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    tensors = {released_name(name): value for name, value in model.state_dict().items()}
    assert tensors["model.layers.1.self_attn.prefix_k"].shape == (P, 2, N, 16)
    assert tensors["model.aggregate_layer.0.weight"].shape == (64, P * 64)
    with pytest.raises(InputError, match="prefix_k"):
        from_released(fields, {k: v for k, v in tensors.items() if "prefix_k" not in k})
    with pytest.raises(InputError, match="must hold tensors, got none"):
        from_released(fields, {})
    with pytest.raises(InputError, match="strange"):
        from_released(fields, {**tensors, "strange": torch.zeros(1)})
    with pytest.raises(InputError, match="shape"):
        from_released(fields, {**tensors, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(InputError, match="model_type"):
        from_released({**fields, "model_type": "qwen2"}, tensors)
    with pytest.raises(InputError, match="checkpoint"):
        load_released(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Qwen2"):
        save_released(streams(), tmp_path / "llama")
    with pytest.raises(ValueError, match="parscale_prefix_hidden"):
        save_released(streams(tiny_model("Qwen2"), parscale_prefix_hidden=8), tmp_path / "mlp")


def test_a_released_configuration_as_it_stands():
    """The fields of ParScale-Qwen-3B-P2-Python's config.json."""
    fields = {
        "architectures": ["Qwen2ParScaleForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "auto_map": {"AutoConfig": "configuration_qwen2_parscale.Qwen2ParScaleConfig"}, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048, "max_window_layers": 36,
        "model_type": "qwen2_parscale", "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
        "parscale_attn_smooth": 0.1, "parscale_n": 2, "parscale_n_tokens": 48, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    from assay.methods.inference.parscale.released import released_config

    config = released_config(fields)
    assert (config.parscale_n, config.parscale_n_tokens, config.parscale_attn_smooth) == (2, 48, 0.1)
    assert config.base.rope_parameters["rope_theta"] == 1e6
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(config.base, name) == fields[name]
    with torch.device("meta"):
        model = ParScaleForCausalLM(config)
    body = sum(p.numel() for p in model.parameters()) - 151936 * 2048
    assert body == 2784937986


def test_served_one_row_at_a_time(tmp_path):
    from assay.server.backends import TorchBackend, backend_for

    streams().save_pretrained(tmp_path)
    register_own(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    backend = backend_for(model)
    assert isinstance(backend, TorchBackend)
    assert backend.rows == 1
    assert "StreamCache" in backend.reason
    ids = token_ids(1, 7)
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 7:].tolist()
    row = backend.begin(backend.pool.take(1))
    first = int(backend.prefill(row, ids[0].tolist(), "last").argmax())
    rest, _ = backend.run([row], [first], 4, sampling=None, uniforms=None, want_logits=False)
    assert [first, *rest[0].tolist()] == wanted
    one = backend_for(ParScaleForCausalLM.from_base(tiny_model(), parscale_n=1))
    assert one.rows is None


# ------------------------------------------------------------------------------------------------------------------- bad input


def test_bad_settings():
    for name, bad in (
        ("parscale_n", 0), ("parscale_n_tokens", 0), ("parscale_attn_smooth", 1.5), ("parscale_attn_smooth", math.nan),
        ("parscale_prefix_hidden", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            ParScaleConfig(**{name: bad})
    for name, bad in (("parscale_n", 2.0), ("parscale_attn_smooth", "0.1"), ("parscale_n_tokens", True)):
        with pytest.raises(TypeError, match=name):
            ParScaleConfig(**{name: bad})
    with pytest.raises(ValueError, match="recipe"):
        prepare_training(streams(), "all")
    with pytest.raises(ValueError, match="parscale_n"):
        prepare_training(streams(parscale_n=1), "frozen")
    with pytest.raises(ValueError, match="parscale_n"):
        streams(parscale_n=1).new_cache()


def test_bad_arguments():
    model, ids = streams(), token_ids(2, 4)
    other = streams(parscale_n=2)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache
        foreign = other(input_ids=ids, use_cache=True).cache
    assert isinstance(cache, StreamCache)
    for error, match, given in (
        (ValueError, "not both", {}),
        (ValueError, "not both", {"input_ids": ids, "inputs_embeds": torch.zeros(2, 4, 64)}),
        (TypeError, "input_ids", {"input_ids": ids.float()}),
        (TypeError, "StreamCache", {"input_ids": ids, "cache": DynamicCache()}),
        (ValueError, "3 streams", {"input_ids": ids, "cache": foreign}),
        (ValueError, "1 sequences", {"input_ids": ids[:1], "cache": cache}),
        (TypeError, "past_key_values", {"input_ids": ids, "past_key_values": cache}),
        (ValueError, "output_hidden_states", {"input_ids": ids, "output_hidden_states": True}),
        (ValueError, "output_router_logits", {"input_ids": ids, "output_router_logits": True}),
        (ValueError, "attention_mask", {"input_ids": ids, "attention_mask": {"full_attention": None}}),
        (ValueError, "logits_to_keep", {"input_ids": ids, "labels": ids, "logits_to_keep": 1}),
        (ValueError, "return_dict", {"input_ids": ids, "return_dict": False}),
    ):
        with pytest.raises(error, match=match):
            model(**given)
    model.base.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        model(input_ids=ids)


def test_the_loss_that_balances_experts_is_refused_by_name():
    asking = build("mixtral", output_router_logits=True)
    before = [set(vars(module)) for module in asking.modules()]
    with pytest.raises(ValueError, match="output_router_logits"):
        ParScaleForCausalLM.from_base(asking, parscale_n=2)
    assert [set(vars(module)) for module in asking.modules()] == before
    ids = inputs("mixtral", 2, 8)["input_ids"]
    one = ParScaleForCausalLM.from_base(asking, parscale_n=1)
    assert torch.equal(one(input_ids=ids).aux_loss, asking(input_ids=ids).aux_loss)

    model = streams(build("mixtral"))
    with pytest.raises(ValueError, match="output_router_logits"):
        model(input_ids=ids, output_router_logits=True)
    assert model(input_ids=ids, output_router_logits=False).logits.isfinite().all()
    for name in ("output_router_logits", "output_hidden_states"):  # switched on later
        setattr(model.base.config, name, True)
        with pytest.raises(ValueError, match=name):
            model(input_ids=ids)
        setattr(model.base.config, name, False)
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(input_ids=ids)


def test_embeddings_in_the_place_of_ids():
    model, ids = streams(), token_ids(2, 6)
    embedded = model.get_input_embeddings()(ids).detach()
    assert torch.equal(logits_of(model, None, inputs_embeds=embedded), logits_of(model, ids))


def test_known_to_transformers():
    assert AutoConfig.for_model("assay_parscale").parscale_n == 1
    sizes = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 97,
    }  # fmt: skip
    config = AutoConfig.for_model("assay_parscale", base={"model_type": "qwen2", **sizes}, parscale_n=2)
    assert isinstance(config.base, Qwen2Config)
    assert config.hidden_size == config.get_text_config().hidden_size == 48
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model) is ParScaleForCausalLM
    assert type(model.base) is Qwen2ForCausalLM
    assert model.aggregator.first.weight.shape == (48, 96)
