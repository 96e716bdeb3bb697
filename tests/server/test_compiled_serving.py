"""The scheduler on the real compiled loop: the families it runs, prompts in pieces, sampled and greedy rows, few pages."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from assay.methods.builtin import speculation
from assay.methods.builtin.decode_loop import transform
from assay.methods.core import kernels
from assay.methods.transform import TuneContext
from assay.server.backends import backend_for
from assay.server.rows import Settings
from assay.server.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not kernels.compiler(), reason="needs a C++ compiler")

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 256, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral, window": (MistralForCausalLM, MistralConfig, {"sliding_window": 40}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 32, "sliding_window": 40, "query_pre_attn_scalar": 32},
    ),
}
LENGTHS = (3, 30, 70, 130, 200, 33)


def make(family):
    kind, config, more = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**SIZES, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that answers differ from prompt to prompt
    model.generation_config.eos_token_id = None
    return model


def prompts_of():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 250, (n,), generator=generator).tolist() for n in LENGTHS]


def answers(scheduler, asked):
    made, ends = [], []
    for ids, settings in asked:
        tokens, end = [], threading.Event()

        def hear(event, tokens=tokens, end=end):
            tokens += event.tokens
            if event.error is not None:
                tokens.append(event.error)
            if event.error is not None or event.finish is not None:
                end.set()

        scheduler.submit(ids, settings, hear)
        made.append(tokens)
        ends.append(end)
    assert all(end.wait(60) for end in ends)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_rows_answers_as_generate_does(family):
    model = make(family)
    scheduler = Scheduler(backend_for(model), prefill_chunk=64)
    assert scheduler.backend.name == "compiled"
    found = answers(scheduler, [(ids, Settings(max_tokens=20)) for ids in prompts_of()])
    scheduler.stop(drain_s=1)
    for ids, tokens in zip(prompts_of(), found, strict=True):
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert tokens == wanted[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", [{}, {"temperature": 0.8, "seed": 5}, {"logprobs": 1}])
def test_a_row_whose_logits_are_not_finite_ends_alone(kind):
    model = make("llama")
    asked = [(ids, Settings(max_tokens=16, **kind)) for ids in prompts_of()]

    def said():
        scheduler = Scheduler(backend_for(model, kv_gib=0.1), prefill_chunk=64)
        found = answers(scheduler, asked)
        scheduler.stop(drain_s=1)
        assert scheduler.backend.pool.free == scheduler.backend.pool.pages
        return found

    expected = said()
    found = [set(ids + tokens) for (ids, _), tokens in zip(asked, expected, strict=True)]
    for bad, tokens in enumerate(expected):
        others = set().union(*(each for i, each in enumerate(found) if i != bad)) | set(asked[bad][0])
        at = next((at for at, token in enumerate(tokens[:-1]) if token not in others), None)
        if at is not None:
            break
    with torch.no_grad():
        model.get_input_embeddings().weight[expected[bad][at]] = torch.nan
    broken = said()
    assert isinstance(broken[bad][-1], FloatingPointError)
    assert broken[bad][:-1] == expected[bad][: at + 1]
    assert [tokens for i, tokens in enumerate(broken) if i != bad] == [
        tokens for i, tokens in enumerate(expected) if i != bad
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_drafts_change_no_token(family, weights):
    """A recipe with a speculation step: a greedy row alone is guessed for, and says what it says without."""
    plain = transform.apply(
        make(family), {"weights": weights}, TuneContext(goal="decode", prompt_tokens=8, new_tokens=8)
    )
    asked = [(ids[:20] * 3 + ids, Settings(max_tokens=60)) for ids in prompts_of()[:4]]
    asked.append((asked[0][0], Settings(max_tokens=30, temperature=1.0, seed=1)))

    def said(together=False):
        scheduler = Scheduler(backend_for(plain, kv_gib=0.1), prefill_chunk=64)
        found = answers(scheduler, asked) if together else [answers(scheduler, [one])[0] for one in asked]
        scheduler.stop(drain_s=1)
        assert scheduler.backend.pool.free == scheduler.backend.pool.pages
        return found, scheduler.stats()

    expected, stats = said()
    assert stats.drafted_tokens == 0
    speculation.attach(plain, draft=6)
    found, stats = said()
    assert found == expected
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert stats.steps == stats.generated_tokens - len(asked) - stats.accepted_tokens
    assert said(together=True)[0] == expected


@pytest.mark.parametrize("family", ["llama", "mistral, window"])
def test_a_row_is_the_same_alone_in_a_batch_and_taken_up_again(family):
    model = transform.apply(
        make(family), {"weights": "int4"}, TuneContext(goal="decode", prompt_tokens=8, new_tokens=8)
    )
    asked = [
        (ids, Settings(max_tokens=80, temperature=0.8 * (i % 2), top_p=0.9, seed=i))
        for i, ids in enumerate(prompts_of())
    ]
    roomy = Scheduler(backend_for(model), prefill_chunk=64)
    alone = [answers(roomy, [one])[0] for one in asked]
    together = answers(roomy, asked)
    roomy.stop(drain_s=1)
    backend = backend_for(model)
    held = backend.pool.take(backend.pool.free - 24)  # 24 pages are left: the longest answer takes 18
    cramped = Scheduler(backend, prefill_chunk=64)
    pressed = answers(cramped, asked)
    preemptions = cramped.stats().preemptions
    cramped.stop(drain_s=1)
    backend.pool.release(held)
    assert alone == together == pressed
    assert preemptions > 0
    assert backend.pool.free == backend.pool.pages
