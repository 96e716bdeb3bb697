"""The ladder transformer on one device: the formula, the base where nothing is converted, and a transformers model in every respect."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.properties.architectures import CAUSAL, build, inputs
from tests.tiny import tiny_model, token_ids
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Trainer, TrainingArguments

from assay.methods.core.models.decoder import why_not
from assay.methods.core.models.own import register_own
from assay.methods.inference.ladder_residual import (
    Alone,
    LadderConfig,
    LadderForCausalLM,
    advance,
    to_ladder,
)
from assay.methods.inference.ladder_residual.pending import run as run_pending

LAYERS = 4
CHOICES = {"all": None, "upper": 2, "scattered": [1, 3], "lowest": [0]}


def tiny(**changes):
    return tiny_model(num_hidden_layers=LAYERS, **changes)


@pytest.fixture(scope="module")
def base():
    return tiny()


def double(**changes):
    return tiny(**changes).double()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


# ------------------------------------------------------------------------------------------------------------ the formula


def naive(model, ids, chosen, parallel=False):
    """The paper's recurrence, a Llama written out: x_{i+1} = x_i + h_{i+1}(x_{i-1}) in the chosen layers, h_{i+1}(x_i) in the others."""
    config, weights = model.config, model.state_dict()
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    batch, tokens = ids.shape

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def turned(x):
        half = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angle = torch.outer(torch.arange(tokens, dtype=torch.float64), config.rope_parameters["rope_theta"] ** -half)
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(layer, x):
        place = f"model.layers.{layer}"
        y = norm(x, f"{place}.input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{place}.self_attn.{n}_proj.weight"].T).view(batch, tokens, -1, dim).transpose(1, 2)
            for n in "qkv"
        )
        k, v = (z.repeat_interleave(heads // kv, 1) for z in (k, v))
        scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
        return y @ weights[f"{place}.self_attn.o_proj.weight"].T

    def mlp(layer, x):
        place = f"model.layers.{layer}"
        y = norm(x, f"{place}.post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{place}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return (F.silu(gate) * up) @ weights[f"{place}.mlp.down_proj.weight"].T

    streams = [weights["model.embed_tokens.weight"][ids]]
    for module in range(2 * config.num_hidden_layers):
        layer, h = module // 2, (attention, mlp)[module % 2]
        back = 1 if layer in chosen and (not parallel or module % 2) else 0
        read = streams[max(len(streams) - 1 - back, 0)]
        streams.append(streams[-1] + h(layer, read))
    return norm(streams[-1], "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("name", CHOICES)
def test_it_computes_the_formula(name):
    model, ids = double(), token_ids(2, 11)
    ladder = to_ladder(model, CHOICES[name])
    expected = naive(model, ids, ladder.config.ladder_layers)
    assert torch.allclose(logits(ladder, ids), expected, rtol=1e-4, atol=1e-4)  # norms and rotary tables are of float32
    assert not torch.allclose(logits(model, ids), expected, rtol=1e-2, atol=1e-2)


def test_the_naive_reference_is_the_model_where_nothing_is_converted():
    model, ids = double(), token_ids(2, 11)
    assert torch.allclose(logits(model, ids), naive(model, ids, []), rtol=1e-4, atol=1e-4)


def test_the_parallel_block_reads_one_stream():
    model, ids = double(), token_ids(2, 11)
    found = logits(to_ladder(model, [1, 2], block="parallel"), ids)
    assert torch.allclose(found, naive(model, ids, [1, 2], parallel=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["ladder", "parallel"])
@pytest.mark.parametrize("name", CHOICES)
def test_pending_outputs_and_two_streams_are_the_same(name, block):
    ladder, ids = to_ladder(double(), CHOICES[name], block=block), token_ids(3, 9)
    expected = logits(ladder, ids)
    ladder.link = Alone()
    found = logits(ladder, ids)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_one_ladder_layer_is_a_parallel_block():
    model, ids = tiny_model(num_hidden_layers=1), token_ids(2, 9)
    assert torch.equal(logits(to_ladder(model), ids), logits(to_ladder(model, block="parallel"), ids))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_a_module_misses_the_output_of_the_one_before_it_and_no_other():
    """By gradients: of each module's input with respect to each earlier module's output."""
    for layers in (None, [2, 3]):
        ladder = to_ladder(double(), layers)
        seen, made = [], []
        for layer in ladder.parts.layers:
            for norm, block in (
                (layer.input_layernorm, layer.self_attn),
                (layer.post_attention_layernorm, layer.mlp),
            ):
                norm.register_forward_pre_hook(lambda _m, given, seen=seen: seen.append(given[0]))
                block.register_forward_hook(lambda _m, _g, out, made=made: made.append(first(out)))
        ladder(token_ids(1, 5))
        for j, read in enumerate(seen):
            if j == 0:
                continue
            towards = torch.randn(read.shape, dtype=read.dtype, generator=torch.Generator().manual_seed(j))
            gradients = torch.autograd.grad((read * towards).sum(), made[:j], retain_graph=True, allow_unused=True)
            for i, gradient in enumerate(gradients):
                reaches = gradient is not None and bool((gradient != 0).any())
                missing = i == j - 1 and j // 2 in ladder.config.ladder_layers
                assert reaches != missing, (layers, i, j)


def test_no_output_is_lost_on_the_way_to_the_head():
    ladder = to_ladder(double())
    made = []
    for layer in ladder.parts.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(lambda _m, _g, out: made.append(first(out)))
    out = ladder(token_ids(1, 5)).logits
    gradients = torch.autograd.grad(out.pow(2).sum(), made)
    assert all(bool((gradient != 0).any()) for gradient in gradients)


# ------------------------------------------------------------------------------------------------------- nothing converted


def same_as(base, other, ids, *, exact=True):
    """Prompt, cached decoding and a left-padded batch of `other` are those of `base`."""
    check = torch.equal if exact else torch.allclose
    assert check(logits(base, ids), logits(other, ids))
    caches = [DynamicCache(config=base.config) for _ in range(2)]
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:7]):
        one, two = (
            logits(model, piece, cache=cache, use_cache=True)
            for model, cache in zip((base, other), caches, strict=True)
        )
        assert check(one, two)
    for one, two in zip(caches[0].layers, caches[1].layers, strict=True):
        assert check(one.keys, two.keys)
        assert check(one.values, two.values)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    assert check(logits(base, ids, **given), logits(other, ids, **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", ["ladder", "parallel"])
def test_without_ladder_layers_it_is_the_base(base, dtype, block):
    model = copy.deepcopy(base).to(dtype)
    same_as(model, to_ladder(model, [], block=block), token_ids(2, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_ladder_layers_it_is_the_real_model(smollm2_slice, dtype):
    model = copy.deepcopy(smollm2_slice.model).to(dtype)
    same_as(model, to_ladder(model, []), token_ids(2, 9, vocab=1000))


@pytest.mark.slow
@pytest.mark.model
def test_without_ladder_layers_it_is_the_whole_real_model(smollm2):
    same_as(smollm2.model, to_ladder(smollm2.model, []), token_ids(2, 24, vocab=1000))


@pytest.mark.slow
@pytest.mark.model
def test_converting_lower_layers_hurts_most_and_upper_layers_recover(smollm2):
    """The real model on real text: upper layers cost less than lower ones, and training the ladder layers on takes some of it back.

    Beside it, the model that was not converted gets the same training: what text of this kind teaches either is no recovery.
    """
    from assay.workloads.text import calibration_windows, heldout_windows

    ids = heldout_windows(smollm2.tokenizer, window=256, n=4)
    more = calibration_windows(smollm2.tokenizer, window=256, n=24)

    def loss(model):
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    def trained_on(layers):
        model = to_ladder(copy.deepcopy(smollm2.model), 8).train()
        model.train_only("ladder")  # the upper layers, whether they are ladder layers or not
        model = LadderForCausalLM.from_base(model.base, ladder_layers=layers).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for rows in more.split(2):
            optimizer.zero_grad()
            model(rows, labels=rows).loss.backward()
            optimizer.step()
        return loss(model.eval())

    model = copy.deepcopy(smollm2.model)
    plain, upper, lower = loss(model), loss(to_ladder(model, 8)), loss(to_ladder(model, range(8)))
    assert plain < upper < lower
    assert trained_on(8) - trained_on(0) < upper - plain


# ------------------------------------------------------------------------------------------------------- what does not change


def test_parameters_operations_and_keys_are_those_of_the_base(base):
    ids = token_ids(2, 9)
    counts, caches = [], []
    for model in (base, to_ladder(base)):
        with FlopCounterMode(display=False) as counter:
            out = model(ids, use_cache=True)
            model(ids[:, :1], cache=out.cache, use_cache=True)
        counts.append(counter.get_total_flops())
        caches.append(out.cache)
    assert counts[0] == counts[1] > 0
    assert sum(p.numel() for p in base.parameters()) == sum(p.numel() for p in to_ladder(base).parameters())
    assert [layer.keys.shape for layer in caches[0].layers] == [layer.keys.shape for layer in caches[1].layers]
    assert type(caches[1]) is DynamicCache


def test_wrapping_copies_and_changes_nothing(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ladder = to_ladder(base)
    assert ladder.base is base
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert {p.data_ptr() for p in ladder.parameters()} == {p.data_ptr() for p in base.parameters()}


@pytest.mark.parametrize("block", ["ladder", "parallel", "desync"])
def test_cached_decoding_is_the_whole_pass(block):
    ladder, ids = to_ladder(double(), block=block), token_ids(2, 10)
    whole, cache, parts = logits(ladder, ids), None, []
    for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:8], ids[:, 8:]):
        with torch.no_grad():
            out = ladder(piece, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_a_pipeline_hands_on_two_tensors(base):
    """Stages run at different places; what is handed over is the pair of streams."""
    ladder, ids = to_ladder(base, [1, 2]), token_ids(2, 7)
    parts = ladder.parts
    with torch.no_grad():
        over = parts.begin(ids)
        carry = (over.hidden, over.hidden)
        for stage in ([0, 1], [2, 3]):
            carry = tuple(stream.clone() for stream in carry)
            for index in stage:
                carry = advance(parts, over, carry, index, "ladder" if index in (1, 2) else "standard")
        found = parts.logits(parts.norm(carry[1]))
    assert torch.equal(found, logits(ladder, ids))


# ------------------------------------------------------------------------------------------------------------------- desync


def test_desync_with_nothing_left_out_is_the_standard_model():
    model, ids = double(), token_ids(2, 9)
    expected = logits(model, ids)
    for how in ({"ranks": 1}, {"ranks": 2, "reduce_every": 1}, {"ranks": 4, "reduce_every": 1}):
        found = logits(to_ladder(model, block="desync", **how), ids)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), how


def test_desync_by_its_definition():
    """Streams that differ by rank, each with its half of heads and units; what is summed adds a part of each stream."""
    model, ids = double(), token_ids(2, 9)
    found = logits(to_ladder(model, block="desync"), ids)
    parts = to_ladder(model, []).parts
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    units = model.config.intermediate_size

    def share(index, module, x, over, rank):
        """The module with all inputs of its last projection at 0 that are another rank's."""
        layer = parts.layers[index]
        last, width = (layer.self_attn.o_proj, heads * dim) if module == "attention" else (layer.mlp.down_proj, units)
        keep = torch.zeros(width, dtype=x.dtype)
        keep[rank * width // 2 : (rank + 1) * width // 2] = 1
        hook = last.register_forward_pre_hook(lambda _m, given: (given[0] * keep,))
        out = parts.attention(index, x, over) if module == "attention" else parts.feed_forward(index, x)
        hook.remove()
        return out

    with torch.no_grad():
        over = parts.begin(ids)
        streams = [over.hidden, over.hidden]
        for index in range(LAYERS):
            streams = [x + share(index, "attention", x, over, rank) for rank, x in enumerate(streams)]
            total = sum(x / 2 + share(index, "mlp", x, over, rank) for rank, x in enumerate(streams))
            streams = [total, total]
        expected = parts.logits(parts.norm(streams[0]))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, logits(model, ids), rtol=1e-2, atol=1e-2)


def test_training_desync_trains_the_base():
    model = tiny()
    ladder = to_ladder(model, block="desync").train()
    ids = token_ids(2, 9)
    ladder(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
    before = logits(ladder.eval(), ids)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    assert not torch.equal(before, logits(ladder, ids))


def test_desync_computes_with_the_modules_that_the_base_has_now():
    """Layers exchanged after the first pass: others of their kind are read, and an adapter in the place of one is refused by name."""
    model, ids = double(), token_ids(2, 9)
    ladder = to_ladder(model, block="desync")
    before, layer = logits(ladder, ids), model.model.layers[1]
    assert torch.equal(logits(ladder, ids), before)
    for module, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj"), (layer, "input_layernorm")):
        other = copy.deepcopy(getattr(module, name))
        other.weight.data.mul_(1.5)
        setattr(module, name, other)
        after = logits(ladder, ids)
        assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2), name
        assert torch.equal(after, logits(to_ladder(model, block="desync"), ids))
        before = after
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), model)
    with pytest.raises(ValueError, match=r"model must be made of plain linear projections, got .*v_proj"):
        logits(ladder, ids)


# ----------------------------------------------------------------------------------------------------- a transformers model


@pytest.mark.parametrize("block", ["ladder", "parallel", "desync"])
def test_it_generates(base, block):
    ladder, ids = to_ladder(base, block=block), token_ids(2, 6)
    greedy = ladder.generate(ids, max_new_tokens=6, do_sample=False)
    again = ladder.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(greedy, again)
    beams = ladder.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    uncached = ladder.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, uncached)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(ladder.generate(ids, max_new_tokens=6, do_sample=True))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("block", ["ladder", "desync"])
def test_a_padded_row_is_the_row_alone(base, block):
    ladder = to_ladder(base, block=block)
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 5, 9, 4, 8, 2, 7, 6)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made = ladder.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for row, found in zip(rows, made, strict=True):
        alone = ladder.generate(torch.tensor([row]), max_new_tokens=5, do_sample=False)
        assert found[-5:].tolist() == alone[0, -5:].tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", ["ladder", "desync"])
def test_it_is_stored_and_found_again(tmp_path, tied, block):
    ladder = to_ladder(tiny(tie_word_embeddings=tied), 2 if block == "ladder" else None, block=block)
    ladder.save_pretrained(tmp_path)
    ids = token_ids(2, 7)
    assert register_own(tmp_path)
    for kind in (LadderForCausalLM, AutoModelForCausalLM):
        found = kind.from_pretrained(tmp_path)
        assert type(found) is LadderForCausalLM
        assert found.config.ladder_layers == ladder.config.ladder_layers
        assert found.config.block == block
        assert torch.equal(logits(found, ids), logits(ladder, ids))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(half, ids).dtype == torch.bfloat16


def test_a_loss_is_the_usual_one(base):
    ids = token_ids(2, 9)
    labels = ids.clone()
    labels[0, :3] = -100
    out = base(ids, labels=labels)
    found = to_ladder(base, [])(ids, labels=labels)
    assert torch.allclose(out.loss, found.loss)
    other = to_ladder(base)(ids, labels=labels)
    expected = F.cross_entropy(other.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(other.loss, expected)


@pytest.mark.parametrize("block", ["ladder", "parallel", "desync"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(block, reentrant):
    ids, gradients = token_ids(2, 8), []
    for checkpointed in (False, True):
        ladder = to_ladder(double(), [1, 3] if block == "ladder" else None, block=block).train()
        if checkpointed:
            ladder.activation_checkpointing_enable({"use_reentrant": reentrant})
        ran = []
        ladder.parts.layers[1].input_layernorm.register_forward_pre_hook(lambda *_given, ran=ran: ran.append(1))
        ladder.eval()(ids)  # desync makes its shares when it first runs, which runs layers too
        ran.clear()
        ladder.train()(ids, labels=ids).loss.backward()
        assert len(ran) == (2 if checkpointed else 1) * (2 if block == "desync" else 1)
        gradients.append([p.grad for p in ladder.parameters()])
    assert all(torch.allclose(one, two, rtol=1e-9, atol=1e-12) for one, two in zip(*gradients, strict=True))


def test_no_cache_is_filled_twice():
    ladder = to_ladder(tiny()).train()
    ladder.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="cache must be left out under gradient checkpointing"):
        ladder(token_ids(1, 4), cache=DynamicCache())
    assert ladder(token_ids(1, 4), use_cache=True).cache is None


def test_the_trainer_trains_it(tmp_path):
    ladder = to_ladder(tiny(), 2).train()
    before = copy.deepcopy(ladder.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model=ladder, args=arguments, train_dataset=rows).train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in ladder.state_dict().items())


def test_what_trains_is_an_option(base):
    model = copy.deepcopy(base)
    ladder = to_ladder(model, 2).train()
    whole = sum(p.numel() for p in model.parameters())
    upper = sum(p.numel() for layer in model.model.layers[2:] for p in layer.parameters())
    assert ladder.train_only("ladder") == upper + model.model.norm.weight.numel()
    ids = token_ids(2, 8)
    ladder(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if name.startswith(("model.layers.2", "model.layers.3", "model.norm"))
    }  # fmt: skip
    assert ladder.train_only() == whole
    with pytest.raises(ValueError, match="which must be one of 'all', 'ladder', got 'upper'"):
        ladder.train_only("upper")


def test_training_on_recovers_what_conversion_cost():
    """A model that knows a text by heart, its upper half converted: the loss jumps, and training the ladder layers brings it back."""
    model, ids = tiny_model(num_hidden_layers=LAYERS, initializer_range=0.125).train(), token_ids(4, 24)

    def learn(model, steps):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    known = learn(model, 60)
    ladder = to_ladder(model, 2)
    with torch.no_grad():
        converted = float(ladder(ids, labels=ids).loss)
    ladder.train_only("ladder")
    assert known < 0.5 * converted
    recovered = learn(ladder, 20)
    assert recovered < 0.5 * converted
    new = to_ladder(tiny_model(num_hidden_layers=LAYERS, initializer_range=0.125).train(), 2)
    new.train_only("ladder")
    assert recovered < 0.5 * learn(new, 20)  # the text is not learned anew


# ------------------------------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("name", CAUSAL)
def test_it_works_or_refuses_before_anything_changes(name):
    model, given = build(name), inputs(name, 2, 24)  # beyond the windows of those that have some
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if why_not(model):
        with pytest.raises(ValueError, match="model must be a decoder whose parts are understood"):
            to_ladder(model)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        return
    assert torch.equal(logits(model, given["input_ids"]), logits(to_ladder(model, []), given["input_ids"]))
    for block in ("ladder", "parallel"):
        ladder = to_ladder(model, block=block)
        whole = logits(ladder, given["input_ids"])
        assert whole.isfinite().all()
        cache, parts = None, []
        for piece in given["input_ids"].tensor_split([20, 21], 1):
            with torch.no_grad():
                out = ladder(piece, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
        assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        ladder.link = Alone()
        assert torch.allclose(logits(ladder, given["input_ids"]), whole, rtol=1e-5, atol=1e-5)


def test_the_model_is_served(base, tmp_path):
    from assay.server.backends import backend_for

    to_ladder(base, 2).save_pretrained(tmp_path)
    register_own(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    backend = backend_for(model, kv_gib=0.01)
    assert backend.name == "torch"
    assert "left-padded batch" in backend.reason
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (5, 9, 3)]
    rows, first = [], []
    for prompt in prompts:
        row = backend.begin(backend.pool.take(1))
        first.append(int(backend.prefill(row, prompt, "last")[-1].argmax()))
        rows.append(row)
    answers, _ = backend.run(rows, first, 5, sampling=None, uniforms=None, want_logits=False)
    for prompt, one, others in zip(prompts, first, answers.tolist(), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert [one, *others] == expected.tolist()


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_the_layers_as_the_released_configuration_takes_them():
    """A number means so many of the last, a list those; left out, where the released code has no default, all of them."""
    shape = LlamaConfig(num_hidden_layers=32)
    assert LadderConfig(shape, ladder_layers=16).ladder_layers == list(range(16, 32))
    assert LadderConfig(shape, ladder_layers=[31, 0]).ladder_layers == [0, 31]
    assert LadderConfig(shape, ladder_layers=range(2)).ladder_layers == [0, 1]
    assert LadderConfig(shape).ladder_layers == list(range(32))
    assert LadderConfig(shape, ladder_layers=0).ladder_layers == []
    assert (LadderConfig(shape).block, LadderConfig(shape).ranks, LadderConfig(shape).reduce_every) == ("ladder", 2, 2)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layers": 5}, ValueError, "ladder_layers must be a whole number at least 0 and at most 4, got 5"),
        ({"layers": [4]}, ValueError, "ladder_layers must be a whole number at least 0 and at most 3, got 4"),
        ({"layers": [1, 1]}, ValueError, "ladder_layers must hold a layer once"),
        ({"layers": [1.0]}, TypeError, "ladder_layers must be a whole number"),
        ({"layers": "all"}, TypeError, "ladder_layers must be a whole number"),
        ({"layers": True}, TypeError, "ladder_layers must be a whole number"),
        ({"block": "serial"}, ValueError, "block must be one of 'ladder', 'parallel', 'desync', got 'serial'"),
        ({"block": "desync", "layers": 2}, ValueError, "ladder_layers must be left out for block 'desync'"),
        ({"block": "desync", "ranks": 3}, ValueError, "world must divide the 4 attention heads of the model, got 3"),
        ({"block": "desync", "ranks": 0}, ValueError, "ranks must be a whole number at least 1, got 0"),
        ({"reduce_every": 0}, ValueError, "reduce_every must be a whole number at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(base, settings, error, words):
    with pytest.raises(error, match=words):
        to_ladder(base, **settings)


def test_layers_are_called_layers(base):
    for given in ((2,), ()):
        with pytest.raises(TypeError, match=r"ladder_layers is called layers here, got \[0\]"):
            to_ladder(base, *given, ladder_layers=[0])


def test_desync_needs_the_whole_text_in_every_layer():
    with pytest.raises(
        ValueError, match="block 'desync' must have full attention in every layer, got sliding_attention"
    ):
        to_ladder(build("mistral"), block="desync")


def test_bad_calls_are_named(base):
    ladder, ids = to_ladder(base), token_ids(1, 4)
    with pytest.raises(TypeError, match="past_key_values is called cache"):
        ladder(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="output_hidden_states must be left out"):
        ladder(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="return_dict must be left out or True"):
        ladder(ids, return_dict=False)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given, and not both"):
        ladder()
    with pytest.raises(ValueError, match="cache must be a DynamicCache for block 'desync'"):
        from transformers import StaticCache

        to_ladder(base, block="desync")(ids, cache=StaticCache(config=base.config, max_cache_len=8))


def test_embeddings_may_be_given(base):
    ladder, ids = to_ladder(base), token_ids(2, 5)
    found = ladder(inputs_embeds=ladder.get_input_embeddings()(ids)).logits
    assert torch.equal(found, ladder(ids).logits)


def test_the_pending_form_by_itself(base):
    """`pending.run` needs no model class: parts, a pass, a schedule and a link."""
    ladder, ids = to_ladder(base), token_ids(2, 5)
    with torch.no_grad():
        stream = run_pending(ladder.parts, ladder.parts.begin(ids), ladder.steps, Alone())
        found = ladder.parts.logits(ladder.parts.norm(stream))
    assert torch.equal(found, logits(ladder, ids))


@torch.no_grad()
def test_desyncs_shares_follow_the_bases_attention_and_mode():
    model = tiny_model(num_hidden_layers=3, attention_dropout=0.5, attn_implementation="eager")
    ladder = to_ladder(model, block="desync")
    ids = token_ids(1, 9)
    wanted = ladder(ids).logits
    ladder.set_attn_implementation("sdpa")
    torch.testing.assert_close(ladder(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    ladder.train()
    ladder(ids)
    ladder.eval()
    torch.testing.assert_close(ladder(ids).logits, wanted, rtol=1e-4, atol=1e-4)
