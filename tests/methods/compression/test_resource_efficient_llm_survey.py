"""The resource calculator against instantiated models, its identities, the reports, and the order of methods."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.tiny import LLAMA, tiny_model, token_ids
from torch import nn

from assay.methods.builtin import dtype, sorted_batches, weight_only
from assay.methods.compression import resource_efficient_llm_survey as room
from assay.methods.compression.resource_efficient_llm_survey import Decoder, ResourceReport
from assay.methods.core.fleet.hardware import Device
from assay.methods.transform import TuneContext

SMOLLM2 = Decoder(
    layers=30, width=576, heads=9, kv_heads=3, head_dim=64, feed_forward=1536, gated=True, vocabulary=49152, tied=True,
    block_rest=2 * 576, rest=576,
)  # fmt: skip
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3", "nemotron": "Nemotron", "starcoder2": "Starcoder2",
}  # fmt: skip


def config_of(kind, **changes):
    """A configuration of `LLAMA`'s shape, of a model type."""
    import transformers

    name = "Gemma3TextConfig" if kind == "gemma3_text" else f"{CLASSES[kind]}Config"
    sizes = {name: value for name, value in LLAMA.items() if name != "eos_token_id"} | {
        "eos_token_id": 2,
        "head_dim": 16,
    }
    return getattr(transformers, name)(**{**sizes, **changes})


def empty(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", room.KINDS)
def test_parameters_are_those_of_an_instantiated_model(kind, tied):
    config = config_of(kind, tie_word_embeddings=tied)
    assert room.decoder_of(config).parameters == numbers(empty(config))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_grouped_queries_and_wide_heads_are_counted(kv_heads, head_dim):
    config = config_of("llama", num_key_value_heads=kv_heads, head_dim=head_dim)
    assert room.decoder_of(config).parameters == numbers(empty(config))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("nemotron", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("starcoder2", {"use_bias": False}),
        ("gemma", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True}),
        ("mistral", {"attention_bias": True}),
    ],
)
def test_biases_are_counted(kind, changes):
    config = config_of(kind, **changes)
    assert room.decoder_of(config).parameters == numbers(empty(config))


def test_the_bundled_model_has_as_many_parameters_as_its_authors_say():
    assert SMOLLM2.parameters == 134_515_008
    assert SMOLLM2.parameters_without_tables == 134_515_008 - 49152 * 576
    assert SMOLLM2.matmul_parameters == SMOLLM2.parameters - 30 * 2 * 576 - 576


def test_other_models_are_refused_by_name():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="one of the model types llama, .* got 'gpt2'"):
        room.decoder_of(GPT2Config())
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        replace(SMOLLM2, kv_heads=2)
    with pytest.raises(ValueError, match="one entry for each of 30 layers, got 2"):
        replace(SMOLLM2, windows=(1, 2))
    with pytest.raises(TypeError, match="layers"):
        replace(SMOLLM2, layers=2.0)


def test_operations_of_linear_layers_and_scores_equal_those_that_hooks_count():
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = tiny_model(tie_word_embeddings=False, attn_implementation="eager"), 24
    decoder = room.decoder_of(model.config)
    linear = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, _, out: linear.append(2 * out.numel() * m.in_features))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(input_ids=token_ids(1, tokens), use_cache=True, logits_to_keep=1)
    scores = 4 * decoder.heads * decoder.head_dim * decoder.layers
    causal = scores * tokens * (tokens + 1) // 2
    assert sum(linear) == decoder.prefill_flops(tokens) - causal
    # eager attention computes the masked half too; the angles of rotary positions are one outer product
    assert counter.get_total_flops() - sum(linear) - scores * tokens**2 in (0, decoder.head_dim * tokens)

    linear.clear()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=token_ids(1, 1), cache=out.cache, use_cache=True)
    assert sum(linear) == 2 * decoder.matmul_parameters
    assert counter.get_total_flops() - decoder.step_flops(tokens + 1) in (0, decoder.head_dim)


@pytest.mark.parametrize("windows", [(), (0, 5), (3, 0), (1, 40)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 23])
def test_pairs_are_those_that_a_mask_lets_through(windows, tokens):
    decoder = Decoder(2, 64, 4, 2, 16, 96, True, 97, True, windows=windows)
    place = torch.arange(tokens)
    apart = place[:, None] - place
    seen = [(apart >= 0) & (apart < (window or tokens)) for window in windows or (0, 0)]
    assert decoder.pairs(tokens) == sum(int(mask.sum()) for mask in seen)
    assert decoder.seen(tokens) == sum(int(mask[-1].sum()) for mask in seen)


def test_windows_are_read_from_the_configuration():
    gemma = room.decoder_of(config_of("gemma3_text", num_hidden_layers=7, sliding_window=8))
    assert gemma.windows == (8, 8, 8, 8, 8, 0, 8)
    assert room.decoder_of(config_of("mistral", sliding_window=8)).windows == (8, 8)
    assert room.decoder_of(config_of("mistral", sliding_window=None)).windows == ()
    assert room.decoder_of(config_of("qwen2", sliding_window=8, use_sliding_window=False)).windows == ()


def held(model):
    """Bytes of a model's weights: its parameters once each, and packed codes."""
    packed = [buffer for name, buffer in model.named_buffers() if name.endswith("packed")]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *packed])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_bytes_are_those_of_the_tensors_that_an_engine_holds(format, tied):
    model = tiny_model(tie_word_embeddings=tied, intermediate_size=128)
    decoder = room.decoder_of(model.config)
    if format in ("int8", "int4"):
        context = TuneContext(goal="decode", prompt_tokens=8, new_tokens=2)
        bits = 8 if format == "int8" else 4
        model = weight_only.transform.apply(model, {"bits": bits, "head_bits": 8}, context)
    elif format != "fp32":
        model = model.to(torch.bfloat16 if format == "bf16" else torch.float16)
    assert decoder.weight_bytes(format) == held(model)
    table = decoder.head * (2 if format in ("bf16", "fp16") else 4)
    looked_up = table if not tied or format in ("int8", "int4") else 0
    assert decoder.step_weight_bytes(format) == held(model) - looked_up


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_cache_bytes_are_those_of_the_keys_and_values_of_a_real_cache(kind):
    from transformers import AutoModelForCausalLM

    config = config_of(kind, num_hidden_layers=6, sliding_window=8) if kind == "gemma3_text" else config_of(kind)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    decoder = room.decoder_of(config)
    with torch.inference_mode():
        out = model(input_ids=token_ids(3, 6), use_cache=True)
    found = sum(t.numel() * t.element_size() for layer in out.cache.layers for t in (layer.keys, layer.values))
    assert decoder.cache_bytes(6, batch=3, element_bytes=4) == found
    assert decoder.cache_bytes(20, element_bytes=4) == (
        2 * decoder.kv_heads * decoder.head_dim * 4 * (5 * 8 + 20 if kind == "gemma3_text" else 2 * 20)
    )


def storages(cache):
    """Bytes that the keys and values of a cache hold on to, of which they may be a part."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "llama"])
@pytest.mark.parametrize("tokens", [6, 8, 20])
def test_windows_let_go_of_a_prompt_with_the_next_token(kind, tokens):
    from transformers import AutoModelForCausalLM

    windows = {} if kind == "llama" else {"sliding_window": 8}
    config = config_of(kind, num_hidden_layers=6, **windows)
    model, decoder = AutoModelForCausalLM.from_config(config).eval(), room.decoder_of(config)
    with torch.inference_mode():
        out = model(input_ids=token_ids(2, tokens), use_cache=True)
        assert storages(out.cache) == decoder.prompt_cache_bytes(tokens, batch=2, element_bytes=4)
        for more in (1, 2):
            out = model(input_ids=token_ids(2, 1), cache=out.cache, use_cache=True)
            assert storages(out.cache) == decoder.cache_bytes(tokens + more, batch=2, element_bytes=4)


def fullest(run):
    """Bytes that torch has at most at once beyond those before, while `run` runs, and what that returns."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, found


WIDE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
}  # heads that are wider than the model, as Gemma 3 270M has


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "tokens", "changes"),
    [
        ("llama", 200, {"intermediate_size": 256}),
        ("qwen3", 200, WIDE),
        ("gemma3_text", 200, {**WIDE, "sliding_window": 512}),
        ("gemma3_text", 800, {**WIDE, "sliding_window": 64}),
        ("mistral", 800, {"sliding_window": 64}),
        ("gemma2", 300, {"sliding_window": 64}),
    ],
)
def test_a_prompt_takes_the_memory_that_is_foretold(kind, tokens, changes, dtype):
    from transformers import AutoModelForCausalLM

    config = config_of(kind, num_hidden_layers=3, max_position_embeddings=1024, **changes)
    model, decoder = AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), room.decoder_of(config)
    ids = token_ids(1, tokens)
    with torch.inference_mode():
        model(input_ids=ids[:, :8])
        seen, _ = fullest(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    expected = room.prompt_bytes(decoder, tokens, "fp32" if dtype == torch.float32 else "bf16")
    assert expected == pytest.approx(seen, rel=0.2), (expected, seen)


OTHERS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": 8,
    },
    "Olmo2": {},
}  # fmt: skip


def other_config(kind):
    import transformers

    sizes = {**LLAMA, "eos_token_id": 2, "head_dim": 16, **OTHERS[kind]}
    return getattr(transformers, f"{kind}Config")(**sizes)


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_known_is_counted_on_a_model_without_memory(kind, format):
    from transformers import AutoModelForCausalLM

    config = other_config(kind)
    with pytest.raises(ValueError, match="one of the model types"):
        room.decoder_of(config)
    found = room.other_forecast(config, format, 12, 3, 1e9)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if format == "fp32" else torch.bfloat16).eval()
    assert found.parameters == numbers(model)
    assert found.weight_bytes == sum(one.numel() * one.element_size() for one in model.parameters())
    assert found.parameters_without_tables == found.parameters - 2 * 97 * 64
    with torch.inference_mode():
        out = model(input_ids=token_ids(1, 12), use_cache=True)
        assert storages(out.cache) == found.prompt_cache_bytes
        for _ in range(2):
            out = model(input_ids=token_ids(1, 1), cache=out.cache, use_cache=True)
    assert storages(out.cache) == found.cache_bytes
    assert found.uncounted == f"activations and times of the model type {config.model_type!r}"
    assert found.prefill_seconds == 0
    with pytest.raises(ValueError, match="format"):
        room.other_forecast(config, "int4", 12, 3, 1e9)


def test_a_state_does_not_grow():
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    short, long = (room.other_forecast(config, "fp32", n, 2, 1e9) for n in (8, 800))
    assert 0 < short.cache_bytes == long.cache_bytes


def test_a_cache_that_cannot_be_counted_is_said_to_be_missing(monkeypatch):
    from transformers import MixtralForCausalLM

    def fails(self, **given):
        raise RuntimeError("needs numbers")

    monkeypatch.setattr(MixtralForCausalLM, "forward", fails)
    found = room.other_forecast(other_config("Mixtral"), "bf16", 12, 3, 1e9)
    assert found.cache_bytes == 0
    assert found.uncounted == "cache, activations and times of the model type 'mixtral'"


@pytest.mark.parametrize("kind", room.KINDS)
def test_both_ways_of_counting_agree(kind):
    config = config_of(kind)
    decoder = room.decoder_of(config)
    assert room.counted(config, torch.bfloat16) == (
        decoder.parameters, decoder.parameters_without_tables, decoder.weight_bytes("bf16"),
    )  # fmt: skip
    assert room.cache_growth(config, torch.float32) == (0, decoder.prompt_cache_bytes(1, element_bytes=4))


def test_a_decoder_that_sees_is_counted_with_its_eyes():
    from transformers import Gemma3Config

    text = {name: value for name, value in LLAMA.items() if name != "eos_token_id"} | {"head_dim": 16}
    eyes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    decoder = room.decoder_of(config)
    whole = numbers(empty(config))
    assert whole > decoder.parameters
    alone = room.memory_forecast(decoder, "bf16", 12, 3, 1e9)
    found = room.with_other_parts(alone, config)
    assert (found.parameters, found.weight_bytes) == (whole, 2 * whole)
    assert found.parameters - found.parameters_without_tables == decoder.head
    assert room.with_other_parts(alone, config.text_config) == alone


def test_bytes_of_the_cache_are_linear_in_all_that_makes_them():
    one = SMOLLM2.cache_bytes(100)
    assert SMOLLM2.cache_bytes(300) == 3 * one
    assert SMOLLM2.cache_bytes(100, batch=5) == 5 * one
    assert replace(SMOLLM2, layers=60).cache_bytes(100) == 2 * one
    assert replace(SMOLLM2, kv_heads=9).cache_bytes(100) == 3 * one
    assert SMOLLM2.cache_bytes(100, element_bytes=0.5) == one / 4
    assert SMOLLM2.cache_bytes(0) == 0


def test_twice_the_widths_are_four_times_the_matrices():
    twice = replace(SMOLLM2, width=1152, heads=18, kv_heads=6, feed_forward=3072)
    assert twice.block_matmul == 4 * SMOLLM2.block_matmul
    assert twice.head == 2 * SMOLLM2.head


def test_the_shorthand_of_six_is_near_where_prompts_are_short_beside_the_width():
    assert SMOLLM2.training_flops(128) == pytest.approx(SMOLLM2.shorthand_training_flops(128), rel=0.05)
    far = 4 * 12 * SMOLLM2.width
    assert SMOLLM2.training_flops(far) > 1.5 * SMOLLM2.shorthand_training_flops(far)
    assert SMOLLM2.training_flops(64, recomputed=True) == pytest.approx(4 / 3 * SMOLLM2.training_flops(64))


def test_bits_are_no_bytes():
    assert room.bits_to_bytes(4) == 0.5
    assert (
        room.matrix_bytes("int4")(32, 32) == 32 * 32 * room.bits_to_bytes(4) + 32 * 2 * 2
    )  # a scale and a minimum in float16
    with pytest.raises(ValueError, match="'fp32', 'bf16'"):
        room.element_bytes("q4")


# ---------------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("mixed", [True, False])
def test_adam_takes_sixteen_bytes_a_parameter(mixed):
    found = room.training_memory(SMOLLM2, 128, mixed=mixed)
    assert found.total - found.activations == 16 * SMOLLM2.parameters


def test_all_ranks_of_zero_3_together_hold_what_one_device_would():
    whole = room.training_memory(SMOLLM2, 128)
    for dp in (2, 8):
        part = room.training_memory(SMOLLM2, 128, dp=dp, zero=3)
        assert dp * (part.total - part.activations) == pytest.approx(whole.total - whole.activations)
        assert part.activations == whole.activations
    stages = [room.training_memory(SMOLLM2, 128, dp=4, zero=zero) for zero in range(4)]
    assert [one.optimiser * 4 == whole.optimiser for one in stages] == [False, True, True, True]
    assert [one.gradients * 4 == whole.gradients for one in stages] == [False, False, True, True]
    assert [one.weights * 4 == whole.weights for one in stages] == [False, False, False, True]


def test_activations_are_as_what_is_kept():
    kept = {name: room.training_memory(SMOLLM2, 256, batch=2, kept=name).activations for name in room.KEPT}
    tokens = 2 * 256 * SMOLLM2.width * SMOLLM2.layers
    assert kept["flash"] == 34 * tokens
    assert kept["inputs"] == 2 * tokens
    assert kept["all"] == pytest.approx((34 + 5 * 9 * 256 / 576) * tokens)
    split = room.training_memory(SMOLLM2, 256, batch=2, kept="flash", tp=3, pp=2)
    assert split.activations == pytest.approx(kept["flash"] / 6)
    with pytest.raises(ValueError, match="kept"):
        room.training_memory(SMOLLM2, 256, kept="some")
    with pytest.raises(ValueError, match="zero"):
        room.training_memory(SMOLLM2, 256, zero=4)


class GptBlock(nn.Module):
    """The block that the formula of activations is about: layer norms, heads, GELU on four widths, dropout in three places."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        def dropped(t):
            return torch.native_dropout(t, 0.1, True)[0]  # its mask takes a byte

        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        h = self.first(x)
        q, k, v = (split(layer(h)) for layer in (self.q, self.k, self.v))
        weights = dropped((q @ k.transpose(-1, -2) / 4).softmax(-1))
        x = x + dropped(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + dropped(self.down(nn.functional.gelu(self.up(self.second(x)))))


@pytest.mark.parametrize("tokens", [32, 256])
def test_activations_are_those_that_autograd_keeps_of_a_block(tokens):
    batch, width, heads = 2, 128, 4
    block = GptBlock(width, heads).to(torch.bfloat16)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(batch, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    found = sum(size for place, size in kept.items() if place not in own)
    assert out.requires_grad
    decoder = Decoder(1, width, heads, heads, width // heads, 4 * width, False, 100, True)
    assert found == pytest.approx(room.training_memory(decoder, tokens, batch=batch).activations, rel=0.03)


def test_network_bytes():
    assert room.network_bytes(SMOLLM2, 128) == {"data": 0, "tensor": 0, "pipeline": 0}
    found = room.network_bytes(SMOLLM2, 128, batch=3, dp=4)
    assert found["data"] == pytest.approx(2 * 3 / 4 * SMOLLM2.parameters * 2)
    activations = 3 * 128 * 576 * 2
    found = room.network_bytes(SMOLLM2, 128, batch=3, tp=2, pp=5)
    assert found["tensor"] == pytest.approx(4 * activations * 30 / 5)  # a ring of two sends each tensor once
    assert found["pipeline"] == 2 * activations


BOX = Device("box", flops=1e11, bandwidth=1e10, memory=8e9, peak_watts=100, price=3.6)


def test_an_estimate_is_the_roofline_over_its_utilisation():
    settings = {"format": "fp32", "prompt_tokens": 512, "new_tokens": 1}
    bound = room.estimate(SMOLLM2, BOX, **settings)
    assert bound.amounts["prefill_seconds"] == pytest.approx(SMOLLM2.prefill_flops(512) / 1e11)
    assert bound.amounts["token_seconds"] == pytest.approx(SMOLLM2.step_bytes(513, "fp32") / 1e10)
    half = room.estimate(SMOLLM2, BOX, utilisation={"prefill": 0.5, "token": 0.25}, **settings)
    assert half.amounts["prefill_seconds"] == pytest.approx(2 * bound.amounts["prefill_seconds"])
    assert half.amounts["token_seconds"] == pytest.approx(4 * bound.amounts["token_seconds"])
    assert half.amounts["seconds"] == half.amounts["prefill_seconds"]  # the prompt's last token gives the first new one
    with pytest.raises(ValueError, match="utilisation of prefill"):
        room.estimate(SMOLLM2, BOX, utilisation={"prefill": 1.5}, **settings)
    with pytest.raises(ValueError, match="a phase of utilisation"):
        room.estimate(SMOLLM2, BOX, utilisation={"decode": 0.5}, **settings)


def test_energy_carbon_and_money_follow_from_the_seconds_and_guesses_have_two_ends():
    found = room.estimate(SMOLLM2, BOX, format="bf16", prompt_tokens=64, new_tokens=16).amounts
    assert found["joules_low"] == pytest.approx(100 * found["seconds"] * room.PUE.low)
    assert found["joules_high"] == pytest.approx(100 * found["seconds"] * room.PUE.high)
    assert found["grams_co2_high"] == pytest.approx(found["joules_high"] / 3.6e6 * room.CARBON.high)
    assert found["grams_co2_low"] < found["grams_co2_high"]
    assert found["price"] == pytest.approx(found["seconds"] * 1e-3)
    assert found["peak_bytes"] > found["weight_bytes"] + found["cache_bytes"]


# -------------------------------------------------------------------------------------------------------------------- reports


def report(source="modelled", **changes):
    fields = {
        "amounts": {"seconds": 2.0, "peak_bytes": 1e9}, "batch": 1, "prompt_tokens": 8, "new_tokens": 4, "format": "fp32",
        "device": "box", "threads": 2, "version": "2",
    }  # fmt: skip
    return ResourceReport(source, **{**fields, **changes})


def test_a_report_says_where_its_figures_are_from():
    assert ResourceReport.from_json(report().to_json()) == report()
    assert json.loads(report("measured").to_json())["source"] == "measured"
    with pytest.raises(ValueError, match="threads"):
        report("measured", threads=0)
    with pytest.raises(ValueError, match="version"):
        report("measured", version="")
    with pytest.raises(ValueError, match="device must be said"):
        report(device="")
    with pytest.raises(ValueError, match="batch"):
        report(batch=0)
    with pytest.raises(ValueError, match="an amount's name"):
        report(amounts={"gigabytes": 1.0})
    with pytest.raises(ValueError, match="seconds"):
        report(amounts={"seconds": float("nan")})
    with pytest.raises(ValueError, match="source"):
        report("guessed")
    whole = json.loads(report().to_json())
    for wrong in (
        {"source": "modelled"},
        [],
        3,
        whole | {"amounts": None},
        whole | {"format": 5},
        whole | {"device": ["x"]},
    ):
        with pytest.raises(ValueError, match="must hold a report"):
            ResourceReport.from_json(json.dumps(wrong))


def test_modelled_and_measured_figures_stand_in_columns_of_their_own():
    text = room.markdown({"foretold": report(), "seen": report("measured", amounts={"seconds": 3.0})})
    head, _, *rows = text.splitlines()
    assert head == "| resource | foretold (modelled, fp32) | seen (measured, fp32) |"
    assert rows == ["| peak_bytes [B] | 1e+09 |  |", "| seconds [s] | 2 | 3 |"]
    with pytest.raises(ValueError, match="at least one"):
        room.markdown({})


def test_every_amount_has_one_unit_that_its_name_says():
    for name, unit in room.UNITS.items():
        if name.endswith("_bytes"):
            assert unit == "B"
        if name == "seconds" or name.endswith("_seconds"):
            assert unit == "s"
        if name.startswith("joules"):
            assert unit == "J"
        assert "gb" not in name
        assert "gib" not in name


def test_only_like_is_compared_with_like():
    faster = report(amounts={"seconds": 1.0, "peak_bytes": 2e9}, format="int4")
    assert room.compared(report(), faster) == {"seconds": 2.0, "peak_bytes": 0.5}
    more = room.compared(report(amounts={"tokens_per_second": 5.0}), report(amounts={"tokens_per_second": 10.0}))
    assert more == {"tokens_per_second": 2.0}
    with pytest.raises(ValueError, match="must be modelled as the reference is, got measured"):
        room.compared(report(), report("measured"))
    for changes in ({"batch": 2}, {"prompt_tokens": 9}, {"device": "other"}, {"threads": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} of other"):
            room.compared(report(), report(**changes))


def test_codecarbon_reads_our_units():
    found = report(amounts={"seconds": 2.0, "joules_high": 3.6e6, "grams_co2_high": 500.0}).codecarbon()
    assert found == {"duration": 2.0, "energy_consumed": 1.0, "emissions": 0.5}


def test_the_pareto_set_does_not_depend_on_the_order_and_has_the_best_of_each():
    chance = random.Random(0)
    names = ["seconds", "peak_bytes", "tokens_per_second"]
    rows = [{name: chance.randrange(1, 9) for name in names} for _ in range(40)]
    kept = room.pareto(rows, names)
    assert 0 < len(kept) < len(rows)
    turned = room.pareto(rows[::-1], names)
    assert sorted(len(rows) - 1 - number for number in turned) == kept

    def key(row):
        return [row["seconds"], row["peak_bytes"], -row["tokens_per_second"]]

    for place in range(3):
        best = min(key(row)[place] for row in rows)
        assert any(key(rows[number])[place] == best for number in kept)
    for number, row in enumerate(rows):
        beaten = any(
            all(a <= b for a, b in zip(key(other), key(row), strict=True)) and key(other) != key(row) for other in rows
        )
        assert beaten == (number not in kept)
    with pytest.raises(ValueError, match=r"rows\[1\] must have seconds"):
        room.pareto([{"seconds": 1}, {}], ["seconds"])


def test_a_block_is_measured_with_what_it_was_measured_on():
    with room.measure() as seen:
        sum(range(1000))
    assert seen.seconds > 0
    assert seen.peak_bytes > 1 << 20
    assert seen.threads == torch.get_num_threads()
    found = seen.report(batch=1, prompt_tokens=8, new_tokens=4, format="fp32", device="cpu", quality=0.5)
    assert found.source == "measured"
    assert found.version == torch.__version__.split("+")[0] or found.version == torch.__version__
    assert found.amounts["tokens_per_second"] == pytest.approx(4 / seen.seconds)
    assert found.amounts["quality"] == 0.5
    assert ("joules" in found.amounts) == (seen.joules is not None)


def test_fidelity_is_zero_for_the_same_and_notices_another_winner():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert room.fidelity(logits, logits) == {"kl": 0.0, "top1": 1.0}
    other = room.fidelity(logits, -logits)
    assert other["kl"] > 0.1
    assert other["top1"] == 0.0
    with pytest.raises(ValueError, match="logits"):
        room.fidelity(logits, logits[:4])


# -------------------------------------------------------------------------------------------------------------- order of methods


def test_transforms_say_themselves_where_they_stand():
    entries = [room.entry_of(module.transform) for module in (weight_only, dtype, sorted_batches)]
    packed, halved, sorted_ = entries
    assert packed.resources == {"memory", "computation"}
    assert not packed.exact
    assert packed.stage == "inference"
    assert sorted_.stage == "system"
    assert packed.composes_with(halved)
    assert not packed.composes_with(
        room.entry_of(SimpleNamespace(**{**vars_of(weight_only.transform), "name": "other"}))
    )
    without_training = room.query(entries, resource="memory", stage="inference", trains=False)
    assert packed in without_training
    assert sorted_ not in without_training


def test_every_transform_has_its_place_and_only_what_saves_memory_is_said_to():
    from assay.tuner.transforms import transforms

    entries = {name: room.entry_of(transform) for name, transform in transforms().items()}
    less_memory = {found.name for found in room.query(entries.values(), resource="memory")}
    assert less_memory == {name for name, transform in transforms().items() if "memory" in transform.goals}
    assert {"weight_only", "dtype"} <= less_memory
    assert not less_memory & {"speculation", "decode_loop", "compile"}


def vars_of(transform):
    return {name: getattr(transform, name) for name in ("name", "slot", "goals", "exact")}


def test_what_was_measured_comes_first():
    names = ["a", "b", "c"]
    entries = [room.Entry(name, frozenset({"memory"}), "inference", exact=name == "a") for name in names]
    assert [one.name for one in room.query(entries)] == names
    assert [one.name for one in room.query(entries, measured={"c"})] == ["c", "a", "b"]
    assert [one.name for one in room.query(entries, exact=True)] == ["a"]
    assert [one.name for one in room.query(entries, beside=entries[0])] == ["b", "c"]
    assert room.query(entries, resource="network") == []
    with pytest.raises(ValueError, match="resource"):
        room.query(entries, resource="speed")
    with pytest.raises(ValueError, match="at least one"):
        room.Entry("nothing", frozenset(), "inference", exact=True)
