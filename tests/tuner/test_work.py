"""What is measured stays inside the model's context and vocabulary, and is what was asked for and nothing else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig, OPTConfig

from assay.errors import InputError
from assay.methods.core.generation.loop import generate_batch, plain_generation
from assay.methods.transform import GOALS
from assay.tuner.work import (
    LEAST_CONTEXT,
    Settings,
    build_work,
    calibration_for,
    decode_nll,
    generate,
    load_for,
    quality,
    run_once,
    settings_for,
)
from assay.workloads import text
from properties.architectures import build
from tiny import tiny_tokenizer

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2}


def config(kind, context):
    if kind == "gpt2":
        return GPT2Config(
            n_embd=16, n_layer=1, n_head=2, n_positions=context, vocab_size=512, bos_token_id=1, eos_token_id=2
        )
    if kind == "opt":
        return OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=context, vocab_size=512)
    return LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=context, vocab_size=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tiny_tokenizer()

    def write(kind, context, **generation):
        path = tmp_path_factory.mktemp("model") / kind
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(kind, context)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        if generation:
            known = {"bos_token_id": 1, "eos_token_id": 2, **generation}
            (path / "generation_config.json").write_text(json.dumps(known))
        return str(path)

    return write


def watch(model):
    """The largest position any forward pass of `model` would use, kept in what is returned."""
    seen = SimpleNamespace(longest=0)

    def look(module, arguments, options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        cache = next((options[name] for name in ("cache", "past_key_values") if options.get(name) is not None), None)
        seen.longest = max(seen.longest, ids.shape[1] + (cache.get_seq_length() if cache is not None else 0))

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("goal", [goal for goal in GOALS if goal != "energy"])
@pytest.mark.parametrize(("kind", "context"), [("gpt2", 96), ("opt", 300), ("llama", 96), ("llama", LEAST_CONTEXT)])
def test_every_goal_stays_inside_the_context(folder, kind, context, goal):
    settings = Settings(folder(kind, context), goal, context - 8, 8, prompts=8)
    loaded = load_for(settings)
    work = build_work(loaded, settings)
    seen = watch(loaded.model)
    run_once(loaded.model, work)
    found = quality(loaded.model, work)
    decode_nll(loaded.model, work.forced[:2], work.prefix)
    for ids in work.calibration:
        assert ids.shape[1] <= context
    assert seen.longest <= context
    assert max(map(len, work.prompts), default=0) + 8 <= context
    assert all(values for values in found.values())
    if goal == "throughput":
        assert len(work.prompts) == 8


def test_a_long_context_is_judged_at_the_lengths_that_were_meant(folder):
    settings = Settings(folder("llama", 2048), "throughput", 64, 4)
    work = build_work(load_for(settings), settings)
    assert work.windows.shape == (16, 256)  # as many as there are documents
    assert work.forced.shape == (16, 256)
    proof = build_work(load_for(settings), settings, "proof")
    assert proof.windows.shape[1] == 256
    assert 2 * 8 <= len(proof.windows) <= 32
    assert 2 * 8 <= len(proof.forced) <= 32
    assert torch.equal(proof.prompt, work.prompt)
    assert proof.prompts == work.prompts
    assert work.prefix == 64
    assert max(map(len, work.prompts)) > 400


def test_lengths_left_to_us_shrink_and_lengths_asked_for_are_refused(folder):
    model = folder("gpt2", 128)
    chosen = settings_for(model, "ttft")
    assert chosen.prompt_tokens + chosen.new_tokens == 128
    assert chosen.prompt_tokens > 64
    assert settings_for(model, "ttft", 120) == Settings(model, "ttft", 120, 8)
    assert settings_for(model, "ttft", None, 100) == Settings(model, "ttft", 28, 100)
    assert build_work(load_for(chosen), chosen).prompt.shape == (1, chosen.prompt_tokens)
    roomy = folder("llama", 2048)
    assert settings_for(roomy, "decode") == Settings(roomy, "decode", 512, 32)
    with pytest.raises(InputError, match="need 129 positions, the model has 128: --prompt-tokens 28 would fit"):
        load_for(settings_for(model, "ttft", 29, 100))
    with pytest.raises(InputError, match="--new-tokens must be below 128"):
        load_for(settings_for(model, "ttft", None, 200))
    with pytest.raises(InputError, match="16 positions; 32 are needed"):
        load_for(settings_for(folder("llama", 16), "ttft", 2, 2))


@pytest.mark.parametrize("value", [float("nan"), 3.0, "8", True, None])
@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "prompts"])
def test_settings_take_whole_numbers_only(name, value):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must be a whole number, got"):
        Settings("m", "ttft", **{name: value})


def test_more_text_than_there_is_is_the_users_error(folder, monkeypatch):
    original = text._joined
    monkeypatch.setattr(text, "_joined", lambda kind, part: original(kind, part)[: 400 if part == "prompts" else None])
    settings = Settings(folder("llama", 10**9), "ttft", 1000, 4)
    with pytest.raises(InputError, match="tokens must be at most"):
        build_work(load_for(settings), settings)


def test_a_vocabulary_too_small_for_the_tokenizer_is_named_before_anything_runs(folder):
    settings = Settings(folder("llama", 512), "throughput", 32, 4)
    loaded = load_for(settings)
    loaded.model.resize_token_embeddings(300)
    loaded.model.forward = None  # anything that runs it fails
    for make in (lambda: build_work(loaded, settings), lambda: calibration_for(loaded)):
        with pytest.raises(
            InputError, match="the tokenizer has 512 tokens and the model a vocabulary of 300: real text needs"
        ):
            make()


def test_tokens_without_a_row_that_no_text_needs_are_no_hindrance(folder):
    settings = Settings(folder("llama", 512), "ttft", 32, 4)
    loaded = load_for(settings)
    loaded.tokenizer.add_tokens(["<|never|>"])
    assert len(loaded.tokenizer) == 513
    assert build_work(loaded, settings).windows.max() < 512


# What generation_config asks for ---------------------------------------------------------------------------------------

WISHES = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": list(range(3, 60))},
    {"begin_suppress_tokens": list(range(3, 60))},
    {"forced_bos_token_id": 7},
    {"forced_eos_token_id": 9},
    {"bad_words_ids": [[i] for i in range(3, 60)]},
    {"sequence_bias": [[[17], 40.0]]},
    {"exponential_decay_length_penalty": [1, 5.0]},
    {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.4},
    {"num_beams": 3},
    {"min_length": 4},
    {"max_length": 3},
    {"max_time": 1e-9},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: next(iter(wish)))
def test_measuring_does_what_was_asked_for_and_nothing_else(llama, wish):
    windows = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(1))
    ids, prompts = windows[:1, :12], [[5, 6, 7, 5, 6, 7], [9, 8]]

    def results():
        return (
            generate(llama, ids, 6).tolist(),
            generate_batch(llama, prompts, new_tokens=6),
            generate_batch(llama, prompts, new_tokens=6, ignore_eos=False),
            decode_nll(llama, windows, 8),
        )

    plain = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    own = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **wish)
    before = own.to_dict()
    llama.generation_config = plain
    expected = results()
    llama.generation_config = own
    found = results()
    assert llama.generation_config is own
    assert own.to_dict() == before
    assert found[:3] == expected[:3]
    torch.testing.assert_close(found[3], expected[3], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits = llama(windows).logits[:, 7:-1]
    forced = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 8:], reduction="none")
    torch.testing.assert_close(found[3], forced, atol=1e-4, rtol=1e-4)


def test_the_models_own_wishes_come_back_after_an_error(llama):
    own = llama.generation_config = GenerationConfig(repetition_penalty=1.3)
    with pytest.raises(RuntimeError, match="on the way"), plain_generation(llama):
        assert llama.generation_config.repetition_penalty is None
        raise RuntimeError("on the way")
    assert llama.generation_config is own
    with plain_generation(torch.nn.Linear(2, 2)):
        pass  # nothing to keep


def test_a_decoding_loop_that_loses_nothing_is_judged_so(folder):
    """The forward pass knows no penalty; decoding token by token is compared with it, so it must not know one either."""
    settings = Settings(folder("llama", 256, repetition_penalty=1.3), "decode", 32, 4)
    loaded = load_for(settings)
    work = build_work(loaded, settings)
    work.windows, work.forced = work.windows[:1], work.forced[:2, :96]
    fast = quality(loaded.model, work)["decode"]
    original = loaded.model.generate
    loaded.model.generate = lambda *arguments, **options: original(*arguments, **options)
    assert quality(loaded.model, work)["decode"] == pytest.approx(fast, abs=1e-4)
    assert loaded.model.generation_config.repetition_penalty == 1.3
