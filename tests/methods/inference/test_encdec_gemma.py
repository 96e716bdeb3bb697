"""The encoder-decoder against its formula, against the models it is made of, and as a model of transformers."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from tests.properties.architectures import CAUSAL, build
from tests.tiny import tiny_model, token_ids
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Gemma2Config,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from assay.methods.inference.encdec_gemma import (
    EncDecConfig,
    EncDecForSeq2SeqLM,
    cross_parameters,
    decoder_to_encdec,
    fewer_layers,
    from_t5gemma,
    t5gemma_config,
)
from assay.methods.inference.encdec_gemma.conversion import SHARED

GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}
OWN = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "Phi3", "Olmo2"]  # which become an EncDecForSeq2SeqLM


def source(kind: str = "Llama", **changes):
    settings = {
        "Mistral": {"sliding_window": 4},
        "Gemma3Text": GEMMA3,
        "Gemma2": GEMMA3,
        "Qwen3": {"head_dim": 16},
    }.get(kind, {})
    if kind == "Gemma3Text":
        import transformers
        from tests.tiny import LLAMA

        torch.manual_seed(changes.pop("seed", 0))
        config = transformers.Gemma3TextConfig(**{**LLAMA, **settings, **changes})
        return transformers.Gemma3ForCausalLM(config).eval()
    return tiny_model(kind, **{**settings, **changes})


def silent(model):
    """Cross-attention adds nothing: its output projections are zero, whatever norm follows."""
    for name, parameter in cross_parameters(model).items():
        if "o_proj" in name:
            parameter.data.zero_()
    return model


def stirred(model, seed=1):
    """Norms and cross-attention of their own, so that nothing is equal by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------------------- the formula


def by_formula(model, ids, answer):
    """Llama's and Mistral's layers in float64 from the weights alone: (answer, vocabulary) logits of one row."""
    weights, config = {name: x.double() for name, x in model.state_dict().items()}, model.config.decoder
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    window = config.sliding_window if config.model_type == "mistral" else None

    def norm(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[f"{name}.weight"]

    def turned(x):  # (tokens, heads, dim), each pair of halves by its position's angle
        angle = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(name, x, y, allowed, rotary):
        q = (x @ weights[f"{name}.q_proj.weight"].T).view(len(x), heads, dim)
        k = (y @ weights[f"{name}.k_proj.weight"].T).view(len(y), groups, dim)
        v = (y @ weights[f"{name}.v_proj.weight"].T).view(len(y), groups, dim)
        if rotary:
            q, k = turned(q), turned(k)
        out = torch.zeros(len(x), heads, dim, dtype=torch.float64)
        for head in range(heads):
            group = head * groups // heads
            for i in range(len(x)):
                places = [j for j in range(len(y)) if allowed(i, j)]
                scores = torch.stack([q[i, head] @ k[j, group] for j in places]) / math.sqrt(dim)
                out[i, head] = (scores.softmax(0)[:, None] * v[places, group]).sum(0)
        return out.flatten(1) @ weights[f"{name}.o_proj.weight"].T

    def mlp(name, x):
        gate = x @ weights[f"{name}.gate_proj.weight"].T
        return (gate * gate.sigmoid() * (x @ weights[f"{name}.up_proj.weight"].T)) @ weights[
            f"{name}.down_proj.weight"
        ].T

    def stack(name, tokens, allowed, states=None):
        x = weights[f"{name}.body.embed_tokens.weight"][tokens]
        for index in range(config.num_hidden_layers):
            layer = f"{name}.body.layers.{index}"
            y = norm(x, f"{layer}.input_layernorm")
            x = x + attend(f"{layer}.self_attn", y, y, allowed, rotary=True)
            if states is not None:
                cross = f"decoder.cross.{index}"
                y = norm(x, f"{cross}.pre_cross_attn_layernorm")
                x = x + attend(f"{cross}.cross_attn", y, states, lambda i, j: True, rotary=False)
            x = x + mlp(f"{layer}.mlp", norm(x, f"{layer}.post_attention_layernorm"))
        return norm(x, f"{name}.body.norm")

    def near(i, j):
        return window is None or abs(i - j) <= window

    def before(i, j):
        return j <= i and (window is None or i - j < window)

    states = stack("encoder", ids, near)
    return stack("decoder", answer, before, states) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_it_computes_the_formula(kind):
    model = stirred(decoder_to_encdec(source(kind, num_key_value_heads=2))).double()
    ids, answer = token_ids(length=11), token_ids(length=9, seed=1)
    found = model(input_ids=ids, decoder_input_ids=answer).logits[0]
    expected = by_formula(model, ids[0], answer[0])
    assert torch.allclose(found, expected, atol=1e-4)  # transformers makes rotary tables in float32


# --------------------------------------------------------------------------------------------------------------- T5Gemma


def test_the_configuration_is_the_released_ones_field_by_field():
    made, released = t5gemma_config(Gemma2Config(), Gemma2Config()), T5GemmaConfig()
    for part in ("encoder", "decoder"):
        assert getattr(made, part).to_dict() == getattr(released, part).to_dict()
    assert {k: v for k, v in made.to_dict().items() if k not in ("encoder", "decoder")} == {
        k: v for k, v in released.to_dict().items() if k not in ("encoder", "decoder")
    }


def test_no_field_of_the_configuration_is_forgotten():
    base = {field.name for field in dataclasses.fields(T5GemmaConfig.__mro__[1])}
    own = {field.name for field in dataclasses.fields(T5GemmaModuleConfig)} - base
    assert own - {"is_decoder"} == set(SHARED)


def test_gemma_2_becomes_transformers_own_class():
    model = source("Gemma2")
    made = decoder_to_encdec(model)
    assert isinstance(made, T5GemmaForConditionalGeneration)
    ids = token_ids(batch=2, length=11)
    mask = torch.ones_like(ids)
    embeds = model.model.embed_tokens(ids)
    arguments = {
        "config": model.config,
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "cache": None,
        "position_ids": None,
    }
    masks = {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }
    states = made.model.encoder(input_ids=ids, attention_mask=masks).last_hidden_state
    assert torch.equal(states, model.model(ids).last_hidden_state)  # the causal mask restored
    expected = model(ids).logits
    found = silent(made)(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_t5gemma_computes_what_our_model_computes():
    made = stirred(decoder_to_encdec(source("Gemma2")))
    ours = from_t5gemma(made)
    ids, answer = token_ids(batch=2, length=11), token_ids(batch=2, length=9, seed=1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answer}
    assert torch.allclose(ours(**arguments).logits, made(**arguments).logits, atol=1e-5)
    short = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(ours.generate(**short), made.generate(**short))


def test_gemma_2_with_a_causal_encoder_is_ours_since_t5gemma_has_none():
    made = decoder_to_encdec(source("Gemma2"), encoder_attention="causal")
    assert isinstance(made, EncDecForSeq2SeqLM)


def test_padding_is_what_the_mask_says_and_not_what_looks_like_it():
    """T5Gemma's encoder takes pad tokens for padding where it has no mask; its conversion reads them."""
    made = stirred(decoder_to_encdec(source("Gemma2")))
    ours = from_t5gemma(made)
    ids, answer = token_ids(batch=2, length=11), token_ids(batch=2, length=5, seed=1)
    ids[0, -3:] = made.config.encoder.pad_token_id
    mask = (ids != made.config.encoder.pad_token_id).long()
    theirs, found = made.model.encoder(ids).last_hidden_state, ours.encoder(ids, mask).last_hidden_state
    assert torch.allclose(found[mask.bool()], theirs[mask.bool()], atol=1e-5)
    read = ours.encoder(ids).last_hidden_state
    assert torch.allclose(read, made.model.encoder(ids, torch.ones_like(ids)).last_hidden_state, atol=1e-5)
    assert not torch.allclose(read[0, :-3], theirs[0, :-3], atol=1e-2)
    masked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answer}
    assert torch.allclose(ours(**masked).logits, made(**masked).logits, atol=1e-5)


def test_two_gemma_2_models_of_different_sizes():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    wide, narrow = source("Gemma2", hidden_size=96, num_hidden_layers=3, layer_types=kinds), source("Gemma2", seed=1)
    made = decoder_to_encdec(wide, narrow, cross_init="random")
    assert isinstance(made, T5GemmaForConditionalGeneration)
    assert [len(part.layers) for part in (made.model.encoder, made.model.decoder)] == [3, 2]
    assert made.model.decoder.layers[1].cross_attn.k_proj.weight.shape == (32, 96)
    for part, model in ((made.model.encoder, wide), (made.model.decoder, narrow)):
        assert torch.equal(part.embed_tokens.weight, model.model.embed_tokens.weight)
        for ours, theirs in zip(part.layers, model.model.layers, strict=True):
            assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
            assert torch.equal(ours.pre_self_attn_layernorm.weight, theirs.input_layernorm.weight)
    ids, answer = token_ids(batch=2, length=11), token_ids(batch=2, length=5, seed=1)
    found = silent(copy.deepcopy(made))(input_ids=ids, decoder_input_ids=answer).logits
    assert torch.allclose(found, narrow(answer).logits, atol=1e-5)
    arguments = {"input_ids": ids, "decoder_input_ids": answer}
    assert torch.allclose(from_t5gemma(stirred(made))(**arguments).logits, made(**arguments).logits, atol=1e-5)
    with pytest.raises(ValueError, match="cross_init must be 'random' where the encoder \(96\)"):
        decoder_to_encdec(wide, narrow)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_t5gemma_with_dropout_is_refused_with_its_rate(part):
    made = decoder_to_encdec(source("Gemma2"))
    getattr(made.config, part).dropout_rate = 0.25
    with pytest.raises(ValueError, match="dropout_rate of 0, got 0.25"):
        from_t5gemma(made)


def test_t5gemma_with_random_cross_attention():
    torch.manual_seed(3)
    model = source("Gemma2")
    made = decoder_to_encdec(model, cross_init="random")
    layer = made.model.decoder.layers[0]
    assert not torch.equal(layer.cross_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    assert torch.equal(layer.self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


# ------------------------------------------------------------------------------------------------------- where it degenerates


@pytest.mark.parametrize("kind", [*OWN, "Gemma2"])
def test_a_causal_encoder_has_the_hidden_states_of_the_model(kind):
    model = source(kind)
    made = decoder_to_encdec(model, encoder_attention="causal")
    ids = token_ids(batch=2, length=11)
    assert torch.equal(made.encoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("kind", OWN)
def test_without_cross_attention_it_is_the_model_on_the_suffix(kind):
    model = source(kind)
    made = silent(decoder_to_encdec(model))
    ids, answer = token_ids(batch=2, length=11), token_ids(batch=2, length=9, seed=1)
    assert torch.equal(made(input_ids=ids, decoder_input_ids=answer).logits, model(answer).logits)


def test_reading_both_ways_changes_every_state_but_not_the_weights():
    model = source()
    ids = token_ids(length=11)
    both = decoder_to_encdec(model).encoder(ids).last_hidden_state
    assert not torch.isclose(both, model.model(ids).last_hidden_state, atol=1e-3).all(-1)[0, :-1].any()
    later = ids.clone()
    later[0, -1] = 3
    assert not torch.allclose(both[:, 0], decoder_to_encdec(model).encoder(later).last_hidden_state[:, 0])


@pytest.mark.parametrize("kind", OWN)
def test_balanced_cross_attention_starts_as_a_copy(kind):
    model = source(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = decoder_to_encdec(model)
    own = model.model.layers[1].self_attn
    cross = made.decoder.cross[1].cross_attn
    if kind == "Phi3":
        q, k, v = own.qkv_proj.weight.split([64, 32, 32])
    else:
        q, k, v = (getattr(own, f"{name}_proj").weight for name in "qkv")
    for found, expected in ((cross.q_proj, q), (cross.k_proj, k), (cross.v_proj, v), (cross.o_proj, own.o_proj.weight)):
        assert torch.equal(found.weight, expected)
    places = [parameter.data_ptr() for parameter in made.parameters()]
    assert len(places) == len(set(places))  # nothing shares its memory
    assert not set(places) & {parameter.data_ptr() for parameter in model.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "norms"), [("Llama", 1), ("Gemma2", 2), ("Gemma3Text", 2)])
def test_parameters_are_two_stacks_and_cross_attention(kind, norms):
    model = source(kind)
    made = decoder_to_encdec(model)
    layers, attention = model.model.layers, model.model.layers[0].self_attn
    own = sum(p.numel() for p in layers.parameters()) + model.model.norm.weight.numel()
    one = sum(p.numel() for p in attention.parameters())
    embeddings = sum(p.numel() for name, p in made.named_parameters() if "embed" in name or "lm_head" in name)
    total = sum(p.numel() for p in made.parameters()) - embeddings
    assert total == 2 * own + len(layers) * (one + norms * model.config.hidden_size)


# --------------------------------------------------------------------------------------------------------------- generation


def greedy_by_hand(model, ids, mask, tokens, start):
    """Greedy answers by full forward passes: no cache."""
    answer = torch.full((len(ids), 1), start)
    for _ in range(tokens):
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer).logits[:, -1]
        answer = torch.cat([answer, logits.argmax(-1, keepdim=True)], 1)
    return answer


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3Text", "Qwen3"])
def test_generate_is_the_uncached_forward(kind):
    model = stirred(decoder_to_encdec(source(kind)))
    ids = token_ids(batch=2, length=11)  # longer than the window of 4
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, greedy_by_hand(model, ids, mask, 8, 1))
    uncached = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(found, uncached)
    static = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert torch.equal(found, static)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3Text"])
def test_cached_logits_are_the_full_ones(kind):
    model = stirred(decoder_to_encdec(source(kind))).double()
    ids, answer = token_ids(batch=2, length=11), token_ids(batch=2, length=9, seed=1)
    full = model(input_ids=ids, decoder_input_ids=answer).logits
    encoded, cache, steps = model.encoder(ids), model.new_cache(), []
    for part in (answer[:, :3], *answer[:, 3:].split(1, 1)):
        out = model(encoder_outputs=encoded, decoder_input_ids=part, cache=cache)
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-9)
    read = cache.cross_attention_cache
    assert all(layer.keys.shape[2] == 11 for layer in read.layers)  # windows or not: all of the input
    held = [layer.keys.shape[2] for layer in cache.self_attention_cache.layers]
    assert held == {"Llama": [9, 9], "Mistral": [3, 3], "Gemma3Text": [3, 9]}[kind]


def test_keys_and_values_of_the_input_are_computed_once_a_request():
    model = decoder_to_encdec(source())
    calls = {"encoder": 0, "k_proj": 0, "q_proj": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.encoder.register_forward_hook(count("encoder"))
    for sublayer in model.decoder.cross:
        sublayer.cross_attn.k_proj.register_forward_hook(count("k_proj"))
        sublayer.cross_attn.q_proj.register_forward_hook(count("q_proj"))
    model.generate(input_ids=token_ids(length=11), max_new_tokens=8, do_sample=False)
    assert calls == {"encoder": 1, "k_proj": 2, "q_proj": 16}


def test_beams_and_samples():
    model = stirred(decoder_to_encdec(source()))
    ids = token_ids(batch=2, length=11)
    beams = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
    }
    assert torch.equal(model.generate(**beams), model.generate(**beams, use_cache=False))
    torch.manual_seed(0)
    drawn = model.generate(input_ids=ids, max_new_tokens=6, do_sample=True, num_return_sequences=4)
    assert drawn.shape == (8, 7)
    assert len({tuple(row) for row in drawn.tolist()}) > 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3Text"])
def test_padding_of_the_input_changes_nothing(kind, side):
    model = stirred(decoder_to_encdec(source(kind))).double()
    alone, answer = token_ids(length=9), token_ids(length=5, seed=1)
    padding = torch.full((1, 6), 7)
    parts = [padding, alone] if side == "left" else [alone, padding]
    mask = torch.cat([torch.full_like(part, int(part is alone)) for part in parts], 1)
    other = token_ids(length=15, seed=2)
    ids = torch.cat([torch.cat(parts, 1), other])
    mask = torch.cat([mask, torch.ones_like(other)])
    found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer.repeat(2, 1)).logits[:1]
    assert torch.allclose(found, model(input_ids=alone, decoder_input_ids=answer).logits, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- unequal stacks


def test_a_decoder_of_every_second_layer():
    model = source(num_hidden_layers=4)
    half = fewer_layers(model)
    assert half.config.num_hidden_layers == 2
    for new, old in enumerate((0, 2)):
        for name, value in half.model.layers[new].state_dict().items():
            assert torch.equal(value, model.model.layers[old].state_dict()[name])
    made = decoder_to_encdec(model, half)
    assert len(made.decoder.cross) == 2
    assert torch.equal(made.decoder.cross[1].cross_attn.k_proj.weight, model.model.layers[2].self_attn.k_proj.weight)
    out = made.generate(input_ids=token_ids(length=11), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 5)


def test_fewer_layers_keeps_each_layers_kind():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = source("Gemma3Text", num_hidden_layers=4, layer_types=kinds)
    assert fewer_layers(model).config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(fewer_layers(model, 1)(token_ids()).logits, model(token_ids()).logits)


def test_a_wide_encoder_for_a_narrow_decoder():
    wide, narrow = source(hidden_size=96, num_hidden_layers=3), source(seed=1)
    made = decoder_to_encdec(wide, narrow, cross_init="random")
    assert made.decoder.cross[0].cross_attn.k_proj.weight.shape == (32, 96)
    ids, answer = token_ids(length=11), token_ids(length=5)
    assert torch.equal(silent(made)(input_ids=ids, decoder_input_ids=answer).logits, narrow(answer).logits)
    with pytest.raises(ValueError, match="cross_init must be 'random' where the encoder"):
        decoder_to_encdec(wide, narrow)


def test_random_cross_attention_is_drawn_as_its_class_draws_it():
    model = stirred(source("Gemma3Text"))
    made = decoder_to_encdec(model, cross_init="random")
    sublayer = made.decoder.cross[0]
    assert not sublayer.pre_cross_attn_layernorm.weight.any()  # Gemma's norms count from 1
    assert 0.2 < sublayer.cross_attn.q_proj.weight.std() < 0.4  # initializer_range 0.3
    assert torch.equal(made.decoder.body.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


# ------------------------------------------------------------------------------------------------------- as transformers' models


@pytest.mark.parametrize(("kind", "tied"), [("Llama", True), ("Llama", False), ("Gemma3Text", True), ("Phi3", False)])
def test_saved_and_loaded(tmp_path, kind, tied):
    model = stirred(decoder_to_encdec(source(kind, tie_word_embeddings=tied), encoder_attention="causal"))
    model.save_pretrained(tmp_path)
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(found, EncDecForSeq2SeqLM)
    assert found.config.encoder_attention == "causal"
    assert (found.lm_head.weight.data_ptr() == found.decoder.body.embed_tokens.weight.data_ptr()) == tied
    ids = token_ids(batch=2, length=11)
    arguments = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(found.generate(**arguments), model.generate(**arguments))
    assert torch.equal(found(input_ids=ids, labels=ids).logits, model(input_ids=ids, labels=ids).logits)


def test_a_converted_t5gemma_is_saved_and_loaded(tmp_path):
    model = from_t5gemma(stirred(decoder_to_encdec(source("Gemma2"))))
    model.save_pretrained(tmp_path)
    ids = token_ids(length=11)
    for asked in (None, "sdpa", "eager"):  # Gemma 2 has no SDPA: it takes what it has
        found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation=asked)
        assert torch.equal(found(input_ids=ids, labels=ids).logits, model(input_ids=ids, labels=ids).logits)


def test_half_precision():
    model = decoder_to_encdec(
        source().to(torch.bfloat16), fewer_layers(source()).to(torch.bfloat16), cross_init="random"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = token_ids(batch=2, length=11)
    full = model.float()(input_ids=ids, labels=ids)
    half = model.bfloat16()(input_ids=ids, labels=ids)
    assert half.logits.dtype == torch.bfloat16
    assert torch.isclose(half.loss, full.loss, rtol=0.05)
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 5)


def test_the_loss_is_that_of_the_labels_shifted_behind_the_start_token():
    model = decoder_to_encdec(source(), decoder_start_token_id=5)
    ids, labels = token_ids(batch=2, length=11), token_ids(batch=2, length=6, seed=1)
    labels[1, 4:] = -100
    out = model(input_ids=ids, labels=labels)
    given = torch.tensor([[5, *labels[0, :-1]], [5, *labels[1, :4], 0]])
    logits = model(input_ids=ids, decoder_input_ids=given).logits
    assert torch.equal(out.logits, logits)
    asked = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[asked], labels[asked])
    assert torch.isclose(out.loss, expected)
    assert torch.isclose(model(input_ids=ids, labels=labels, num_items_in_batch=20).loss, expected * 10 / 20)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = token_ids(batch=2, length=11)
    found, runs = [], []
    for checkpointed in (False, True):
        model = decoder_to_encdec(source()).train()
        for part in ("encoder", "decoder"):
            layer = getattr(model, part).body.layers[0].mlp
            layer.register_forward_pre_hook(lambda *_, part=part: runs.append((len(found), part)))
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(a is not None and torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    once = [(0, "encoder"), (0, "decoder")]
    assert runs == [*once, (1, "encoder"), (1, "decoder"), (1, "decoder"), (1, "encoder")]  # layers ran again


def test_a_cache_is_refused_where_layers_run_twice():
    model, ids = decoder_to_encdec(source()).train(), token_ids(batch=2, length=11)
    model.gradient_checkpointing_enable()
    cache = model.new_cache()
    with pytest.raises(ValueError, match="cache must be left out under gradient checkpointing"):
        model(input_ids=ids, labels=ids, cache=cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids, cache=cache)  # nothing runs twice
    assert cache.get_seq_length() == 11


def test_other_embeddings_are_those_that_are_read():
    model, ids = decoder_to_encdec(source()), token_ids(batch=2, length=11)
    before = model.encoder(ids).last_hidden_state
    other = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.roll(1, 0))
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    found = model.encoder(ids).last_hidden_state
    assert torch.equal(found, model.encoder(inputs_embeds=other(ids)).last_hidden_state)
    assert not torch.allclose(found, before, atol=1e-2)


# -------------------------------------------------------------------------------------------------------- other architectures


@pytest.mark.parametrize("name", CAUSAL)
def test_it_works_or_refuses_before_it_changes_anything(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [getattr(module, "is_causal", None) for module in model.modules()]
    ids = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    try:
        made = decoder_to_encdec(model)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
        assert made.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape[0] == 2
        assert made(input_ids=ids, labels=ids).loss.isfinite()
    assert bool(refused) == (name in ("gpt2", "gpt_oss", "opt", "biogpt", "mamba"))
    assert not refused or refused.startswith("model must be a decoder whose parts are understood: ")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert flags == [getattr(module, "is_causal", None) for module in model.modules()]


# ----------------------------------------------------------------------------------------------------------- SmolLM2's weights


def degenerate(model, layers, ids, answer):
    causal = decoder_to_encdec(model, encoder_attention="causal")
    assert len(causal.decoder.cross) == layers
    assert torch.equal(causal.encoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
    padded, mask = (
        torch.cat([ids[:, :1].repeat(1, 3), ids], 1),
        torch.ones(len(ids), ids.shape[1] + 3, dtype=torch.long),
    )
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = model.model(padded, attention_mask=mask, position_ids=positions).last_hidden_state
    assert torch.equal(causal.encoder(padded, mask).last_hidden_state[:, 3:], own[:, 3:])
    deaf = silent(decoder_to_encdec(model))
    assert torch.equal(deaf(input_ids=ids, decoder_input_ids=answer).logits, model(answer).logits)
    cache, other = deaf.new_cache(), DynamicCache(config=model.config)
    encoded = deaf.encoder(ids)
    for part in (answer[:, :-2], answer[:, -2:-1], answer[:, -1:]):
        found = deaf(encoder_outputs=encoded, decoder_input_ids=part, cache=cache).logits
        assert torch.equal(found, model(part, cache=other).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_degenerates_to_smollm2s_first_layers(smollm2_slice, dtype):
    model = copy.deepcopy(smollm2_slice.model).to(dtype)
    ids = smollm2_slice.tokenizer("def read(path):\n    return open(path).read()", return_tensors="pt").input_ids
    with torch.no_grad():
        degenerate(model, 2, ids, ids[:, :6])


@pytest.mark.slow
def test_it_degenerates_to_smollm2(smollm2):
    ids = smollm2.tokenizer("def read(path):\n    return open(path).read()", return_tensors="pt").input_ids
    with torch.no_grad():
        # a copy, whose weights lie in memory as those of the conversion do: products of one row depend on where they begin
        degenerate(copy.deepcopy(smollm2.model), 30, ids, ids[:, :6])


# ------------------------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_fit_is_refused_by_name():
    model = source()
    with pytest.raises(TypeError, match="model must be a model of transformers, got Linear"):
        decoder_to_encdec(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cross_init must be one of 'self', 'random'"):
        decoder_to_encdec(model, cross_init="copy")
    with pytest.raises(ValueError, match="encoder_attention must be one of"):
        decoder_to_encdec(model, encoder_attention="windowed")
    with pytest.raises(ValueError, match="decoder must have the vocabulary of model, 97 tokens, got 64"):
        decoder_to_encdec(model, source(vocab_size=64))
    with pytest.raises(ValueError, match="decoder_start_token_id must be"):
        decoder_to_encdec(model, decoder_start_token_id=97)
    for kind in ("Llama", "Gemma2"):
        for other, given in ((torch.bfloat16, "torch.bfloat16 on cpu"), ("meta", "torch.float32 on meta")):
            with pytest.raises(ValueError, match=f"dtype and the device of model, torch.float32 on cpu, got {given}"):
                decoder_to_encdec(source(kind), source(kind).to(other))
    with pytest.raises(ValueError, match="every must be"):
        fewer_layers(model, 0)
    with pytest.raises(TypeError, match="T5GemmaForConditionalGeneration, got Llama"):
        from_t5gemma(model)
    with pytest.raises(ValueError, match="encoder and decoder must have one vocabulary"):
        EncDecConfig({"model_type": "llama", "vocab_size": 5}, {"model_type": "llama", "vocab_size": 6})
    with pytest.raises(ValueError, match="model_type that transformers knows, got 'no-such'"):
        EncDecConfig({"model_type": "no-such"})
    with pytest.raises(TypeError, match="decoder must be a model's configuration, got 3"):
        EncDecConfig(decoder=3)


def test_what_a_pass_cannot_do_is_refused_by_name():
    model, ids = decoder_to_encdec(source(bos_token_id=None)), token_ids(length=5)
    with pytest.raises(ValueError, match="decoder_start_token_id must be set"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="decoder_input_ids, decoder_inputs_embeds or labels must be given"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        model(decoder_input_ids=ids)
    with pytest.raises(TypeError, match="cache must be an EncoderDecoderCache, got DynamicCache"):
        model(input_ids=ids, decoder_input_ids=ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="logits_to_keep must be 0"):
        model(input_ids=ids, decoder_input_ids=ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="output_hidden_states must be left out"):
        model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="attention_mask must hold 0 and 1"):
        model(input_ids=ids, attention_mask=2 * torch.ones_like(ids), decoder_input_ids=ids)
    with pytest.raises(NotImplementedError, match="before they are converted"):
        model.resize_token_embeddings(200)
    assert isinstance(model.new_cache(), EncoderDecoderCache)
