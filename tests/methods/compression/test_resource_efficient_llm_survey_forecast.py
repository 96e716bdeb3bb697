"""Times foretold from a few blocks: exact where a machine is what it is taken for, and honest where noise speaks."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.tiny import calibration, tiny_model

from assay.methods.compression import resource_efficient_llm_survey as room
from assay.methods.compression.resource_efficient_llm_survey import Probe, Timed
from assay.methods.compression.resource_efficient_llm_survey import forecast as module
from assay.methods.core.fleet.hardware import Device

CONFIG = {"num_hidden_layers": 7, "intermediate_size": 96}


def decoder():
    return room.decoder_of(tiny_model(**CONFIG).config)


def device(of):
    return Device("box", flops=1e10, bandwidth=1e9, memory=1e9)


def imitated(of, *, fixed=0.01, a_block=0.002, lengths=(16, 64), new_tokens=8):
    """A machine that takes each bound, something fixed, and something for each block."""
    besides = fixed + a_block * of.layers
    bounds = {n: room.least_seconds(of, device(of), "fp32", n, new_tokens) for n in lengths}
    return Timed(
        {n: one["prefill"] + besides for n, one in bounds.items()},
        {n: one["token"] + besides for n, one in bounds.items()},
    )


def test_what_blocks_take_besides_is_foretold_exactly():
    whole = decoder()
    few, more = (imitated(room.first_blocks(whole, n)) for n in (1, 5))
    found = room.foretold(whole, Probe(1, 5, few, more), device, "fp32")
    expected = imitated(whole)
    for phase in ("prefill", "token"):
        assert getattr(found, phase) == pytest.approx(getattr(expected, phase))


def test_windows_of_later_blocks_are_in_the_bound():
    """The blocks that are timed may see a window only, and later ones everything."""

    whole = replace(decoder(), windows=(4, 4, 4, 4, 4, 0, 0))
    few, more = (imitated(room.first_blocks(whole, n)) for n in (1, 5))
    found = room.foretold(whole, Probe(1, 5, few, more), device, "fp32")
    assert found.prefill == pytest.approx(imitated(whole).prefill)
    narrow = room.foretold(replace(whole, windows=(4,) * 7), Probe(1, 5, few, more), device, "fp32")
    assert found.prefill[64] > narrow.prefill[64]


def test_a_model_of_few_blocks_is_its_own_probe():
    whole = room.first_blocks(decoder(), 1)
    seen = imitated(whole)
    found = room.foretold(whole, Probe(1, 1, seen, seen), device, "fp32")
    assert found.prefill == pytest.approx(seen.prefill)
    assert found.token == pytest.approx(seen.token)


def test_where_more_blocks_take_less_noise_made_it_so():
    whole = decoder()
    few, more = imitated(room.first_blocks(whole, 1), fixed=0.5), imitated(room.first_blocks(whole, 5), fixed=0.01)
    found = room.foretold(whole, Probe(1, 5, few, more), device, "fp32")
    bound = room.least_seconds(whole, device(whole), "fp32", 16, 8)
    assert found.prefill[16] == pytest.approx(bound["prefill"] + 0.502)


def test_nothing_is_foretold_below_the_bound():
    whole = decoder()
    none = Timed({16: 1e-9}, {16: 1e-9})
    found = room.foretold(whole, Probe(1, 5, none, none), device, "fp32")
    bound = room.least_seconds(whole, device(whole), "fp32", 16, 8)
    assert found.prefill[16] == bound["prefill"]
    assert found.token[16] == bound["token"]


def test_the_probe_has_few_blocks_and_one_model_at_a_time():
    made, alive = [], []

    def make(layers):

        gc.collect()
        assert not [one for one in alive if one() is not None]
        made.append(layers)
        model = tiny_model(num_hidden_layers=layers)
        alive.append(weakref.ref(model))
        return model

    found = room.probe(make, 7, [8], new_tokens=2, repeats=1)
    assert made == [module.FEW, module.MORE] == [found.few, found.more]
    assert found.of_few.prefill[8] > 0
    assert found.of_few.token[8] > 0
    made.clear()
    assert room.probe(make, 1, [8], new_tokens=2, repeats=1).more == 1
    assert made == [1]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_some_blocks_of_a_configuration(kind):
    config = tiny_model(kind, num_hidden_layers=3).config
    part = room.some_blocks(config, 2, torch.bfloat16)
    assert config.num_hidden_layers == 3
    assert room.decoder_of(part.config) == room.first_blocks(room.decoder_of(config), 2)
    assert sum(p.numel() for p in part.parameters()) == room.decoder_of(part.config).parameters
    assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert not part.training


def test_gemma_2_has_no_fused_attention_and_is_foretold_all_the_same():
    config = tiny_model("Gemma2", num_hidden_layers=3).config
    whole = room.decoder_of(config)
    assert whole.unfused
    found = room.with_times(room.memory_forecast(whole, "fp32", 8, 3, 1e9), config, whole, calibration(), repeats=1)
    assert found.prefill_seconds > 0


def test_of_a_model_that_sees_the_decoder_alone_is_timed():
    from transformers import Gemma3Config

    text = {
        **tiny_model(num_hidden_layers=1).config.to_dict(),
        "num_hidden_layers": 6,
        "model_type": "gemma3_text",
        "layer_types": None,
    }
    eyes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    part = room.some_blocks(config, 2, torch.float32)
    assert sum(p.numel() for p in part.parameters()) == room.first_blocks(room.decoder_of(config), 2).parameters
    assert config.text_config.num_hidden_layers == 6


def test_weights_of_some_blocks_are_random_and_no_two_rows_are_alike():
    config = tiny_model(vocab_size=3000, tie_word_embeddings=True).config
    part = room.some_blocks(config, 1, torch.float32)
    table = part.get_input_embeddings().weight.detach()
    assert table.numel() > 2 * module.PATTERN
    assert part.get_output_embeddings().weight is part.get_input_embeddings().weight
    assert table.std() == pytest.approx(config.initializer_range, rel=0.05)
    assert table.unique(dim=0).shape[0] == 3000
    assert all(bool(parameter.isfinite().all()) for parameter in part.parameters())
    angles = tiny_model(vocab_size=3000).model.rotary_emb.inv_freq
    assert torch.equal(part.model.rotary_emb.inv_freq, angles)


def test_every_length_is_timed_and_its_steps_go_on_from_its_prompt():
    model = tiny_model()
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: seen.append(
            (given["input_ids"].shape[1], given["cache"].get_seq_length() if given.get("cache") is not None else 0)
        ),
        with_kwargs=True,
    )
    found = room.timed(model, [9, 5], new_tokens=3, repeats=2)
    hook.remove()
    assert seen == [(5, 0)] * 3 + [(1, 5), (1, 6), (1, 7)] + [(9, 0)] * 3 + [(1, 9), (1, 10), (1, 11)]
    assert list(found.prefill) == list(found.token) == [5, 9]
    for arguments, names in (
        (([],), "prompt_tokens"), (([0],), "prompt_tokens"), (([5], 1), "new_tokens"), (([5], 2, 0), "repeats"),
    ):  # fmt: skip
        settings = dict(zip(("new_tokens", "repeats"), arguments[1:], strict=False))
        with pytest.raises(ValueError, match=names):
            room.timed(model, arguments[0], **settings)


def test_limits_are_those_of_the_format_and_of_where_the_weights_lie():
    whole = decoder()
    found = room.device_for(calibration(), whole, "fp32", 5e9)
    assert (found.flops, found.memory) == (1e11, 5e9)
    assert "2 threads" in found.name
    assert room.device_for(calibration(), whole, "bf16", 5e9).flops == 4e11
    assert room.device_for(calibration(), whole, "int4", 5e9).flops == 4e11  # computed with in several types
    assert room.device_for(calibration(), whole, "fp16", 5e9).flops == 4e11  # not calibrated
    assert found.bandwidth == calibration().bandwidth(whole.step_weight_bytes("fp32"))

    huge = replace(whole, layers=20_000)
    assert room.device_for(calibration(), huge, "fp32", 5e9).bandwidth < found.bandwidth


def test_memory_is_counted_and_compared_with_what_is_there():
    whole = decoder()
    found = room.memory_forecast(whole, "fp32", 16, 4, 1e9)
    assert found.weight_bytes == 4 * whole.parameters
    assert found.cache_bytes == whole.cache_bytes(19, element_bytes=4)
    assert found.prompt_cache_bytes == whole.cache_bytes(16, element_bytes=4)
    assert found.needed_bytes == found.weight_bytes + found.prompt_cache_bytes + found.activation_bytes
    long = room.memory_forecast(whole, "fp32", 1, 4000, 1e9)  # an answer that holds more than its prompt
    assert long.needed_bytes == long.weight_bytes + long.cache_bytes
    narrow = room.memory_forecast(replace(whole, windows=(4,) * whole.layers), "fp32", 16, 4, 1e9)
    assert narrow.cache_bytes < narrow.prompt_cache_bytes == found.prompt_cache_bytes
    assert found.fits
    assert not room.memory_forecast(whole, "fp32", 16, 4, found.needed_bytes - 1).fits
    assert room.memory_forecast(whole, "fp32", 16, 4, found.needed_bytes).fits
    assert found.prefill_seconds == 0
    with pytest.raises(ValueError, match="available_bytes"):
        room.memory_forecast(whole, "fp32", 16, 4, float("nan"))


def test_a_forecast_with_times_runs_a_few_blocks(monkeypatch):
    model = tiny_model(**CONFIG)
    whole = room.decoder_of(model.config)
    asked = []

    def imitation(part, lengths, *, new_tokens, repeats):
        asked.append((part.config.num_hidden_layers, tuple(lengths), repeats))
        return imitated_on_calibration(room.decoder_of(part.config))

    def imitated_on_calibration(of):
        bound = room.least_seconds(of, room.device_for(calibration(), of, "fp32", 1e9), "fp32", 16, 4)
        return Timed({16: bound["prefill"] + 0.002 * of.layers}, {16: bound["token"] + 0.002 * of.layers})

    monkeypatch.setattr(module, "timed", imitation)
    monkeypatch.setattr(module, "OthersWatch", lambda: SimpleNamespace(stop=lambda: (0.4, True)))
    before = room.memory_forecast(whole, "fp32", 16, 4, 1e9)
    found = room.with_times(before, model.config, whole, calibration(), repeats=2)
    assert asked == [(1, (16,), 2), (5, (16,), 2)]
    assert found.weight_bytes == before.weight_bytes
    assert found.prefill_seconds == pytest.approx(found.least_prefill_seconds + 0.014)
    assert found.token_seconds == pytest.approx(found.least_token_seconds + 0.014)
    assert found.noisy
    assert not before.noisy
    packed = room.memory_forecast(whole, "int4", 16, 4, 1e9)
    with pytest.raises(ValueError, match="the forecast's format"):
        room.with_times(packed, model.config, whole, calibration())
