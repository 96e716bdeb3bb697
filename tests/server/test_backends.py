"""The two backends: the same bits for the same prompt over paged memory, and any transformers model as a left-padded batch."""

from __future__ import annotations

import psutil
import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from assay.errors import InputError
from assay.methods.attention import xattention
from assay.methods.builtin import attention_backend
from assay.methods.builtin.decode_loop import Sampling, draw_in_torch
from assay.methods.core.attention.integration import set_attention
from assay.methods.core.generation.cache import Span
from assay.methods.core.generation.loop import padded_prefill, set_settings
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM
from assay.server import backends
from assay.server.backends import (
    GIB,
    Budget,
    CompiledBackend,
    TorchBackend,
    backend_for,
    kv_pages,
    stacked,
    why_whole,
)
from assay.server.choosing import chosen
from assay.server.rows import Settings
from assay.server.scheduler import Scheduler
from properties.architectures import CAUSAL, build
from properties.paged_stand_in import Decoder, Toy, paged
from tiny import tiny_model, token_ids

PAGE = paged.PAGE


def decoder_of(model, dtype=torch.bfloat16):
    config = model.config
    return Decoder(
        model,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        dtype=dtype,
    )


def compiled(model=None, pages: int = 32, dtype=torch.bfloat16) -> CompiledBackend:
    model = tiny_model() if model is None else model
    return CompiledBackend(model, decoder_of(model, dtype), pages=pages)


def answers(backend, prompts, new, **options):
    """What a scheduler makes of prompts that are submitted together, each with its number of new tokens: the events of each."""
    scheduler = Scheduler(backend, start=False, prefill_chunk=16, **options)
    told = [[] for _ in prompts]
    for prompt, most, events in zip(prompts, new, told, strict=True):
        scheduler.submit(prompt, Settings(max_tokens=most, logprobs=2), events.append)
    while scheduler.turn():
        pass
    return told


def tokens_of(events) -> list[int]:
    return [token for event in events for token in event.tokens]


@torch.no_grad()
def without_cache(model, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """The greedy answer by whole forward passes, and how far the best logit is from the second at each token."""
    ids, margins = list(prompt), []
    for _ in range(new):
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].float().topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], margins


# ---- compiled


def test_a_prompt_has_the_same_bits_alone_and_behind_a_prefix():
    backend, ids = compiled(), token_ids(length=70)[0].tolist()
    pieces = [(0, 32), (32, 64), (64, 70)]
    first = backend.begin(backend.pool.take(5))
    for start, stop in pieces:
        logits = backend.prefill(first, ids[start:stop], "last" if stop == 70 else "none")
    assert first.length == 70
    assert logits.shape == (1, 97)
    shared = first.pages[:2]
    backend.pool.hold(shared)
    second = backend.begin(shared + backend.pool.take(3), 32)
    backend.prefill(second, ids[32:64], "none")
    other = backend.begin(backend.pool.take(2))  # another prompt between two pieces
    backend.prefill(other, ids[5:25], "last")
    again = backend.prefill(second, ids[64:], "last")
    assert torch.equal(logits, again)
    for one, two in zip(*(backend.pool.read(row.pages, 0, 70) for row in (first, second)), strict=True):
        assert torch.equal(one, two)


def test_pieces_see_keys_and_values_as_the_pool_keeps_them():
    model, ids = tiny_model(), token_ids(length=40)[0].tolist()
    exact, cast = {}, {}
    for dtype, seen in ((torch.bfloat16, cast), (torch.float32, exact)):
        backend = compiled(model, dtype=dtype)
        row = backend.begin(backend.pool.take(3))
        backend.prefill(row, ids[:32], "none")
        seen["first"] = backend.pool.read(row.pages, 0, 32)
        seen["logits"] = backend.prefill(row, ids[32:], "last")
    assert not torch.equal(exact["logits"], cast["logits"])
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(*exact["first"], strict=True)):
        cache.update(keys[None].bfloat16().float(), values[None].bfloat16().float(), layer)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids[32:]]), cache=cache, use_cache=True, logits_to_keep=1)
    assert torch.equal(out.logits[0], cast["logits"])


def test_all_logits_of_a_prompt_where_they_are_wanted():
    backend, ids = compiled(dtype=torch.float32), token_ids(length=20)[0].tolist()
    row = backend.begin(backend.pool.take(2))
    logits = torch.cat([backend.prefill(row, ids[:16], "all"), backend.prefill(row, ids[16:], "all")])
    with torch.no_grad():
        expected = backend.model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.allclose(logits, expected, atol=1e-4)
    assert backend.prefill(backend.begin(backend.pool.take(1)), ids[:4], "none").shape == (0, 97)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_answers_are_those_of_the_model(kind):
    model = tiny_model(kind, **({"sliding_window": 16} if kind == "Mistral" else {}))
    backend = compiled(model, dtype=torch.float32)
    prompts = [token_ids(length=length, seed=length)[0].tolist() for length in (1, 16, 37, 50)]
    for prompt, events in zip(prompts, answers(backend, prompts, [6] * 4, max_running=3), strict=True):
        assert tokens_of(events) == without_cache(model, prompt, 6)[0]
    assert backend.pieces
    assert backend.shares
    assert "share their beginnings" in backend.reason


def test_an_attention_that_looks_at_the_whole_prompt_gets_it_whole():
    model, ids = tiny_model(), token_ids(length=40)[0].tolist()
    attention_backend.register()
    set_attention(model, attention_backend.NAME)  # dense: pieces will do
    assert why_whole(model) == ""
    xattention.register()
    set_attention(model, xattention.NAME)
    backend = compiled(model)
    assert not backend.pieces
    assert not backend.shares
    assert "prompts run whole" in backend.reason
    assert "assay_xattention" in backend.reason
    sizes, prefill = [], backend.prefill
    backend.prefill = lambda row, given, wanted: sizes.append(len(given)) or prefill(row, given, wanted)
    told = answers(backend, [ids, ids], [3, 3])
    assert sizes == [40, 40]
    assert tokens_of(told[0]) == tokens_of(told[1])


@pytest.mark.parametrize("kind", [CompiledBackend, TorchBackend])
def test_a_prefill_of_the_models_settings_is_called_with_whole_prompts(kind):
    model, asked = tiny_model(), []

    def factory(model, *, last_token=True, pad_token_id=None):
        return lambda prompts: asked.extend(prompts) or padded_prefill(model, torch.tensor(prompts))

    set_settings(model, prefill=factory, threads=1)
    backend = compiled(model, dtype=torch.float32) if kind is CompiledBackend else TorchBackend(model)
    assert not backend.pieces
    assert "prefill of their own" in backend.reason
    assert backend.threads == 1
    prompts = [token_ids(length=length)[0].tolist() for length in (40, 21)]
    told = answers(backend, prompts, [4, 4])
    assert asked == prompts
    assert [tokens_of(events) for events in told] == [without_cache(model, prompt, 4)[0] for prompt in prompts]


# ---- torch


@pytest.mark.parametrize("name", CAUSAL)
def test_any_causal_model_answers_in_a_batch_as_alone(name):
    """Where an answer differs, the two best logits were closer than the bound that the backend states, and it counted the case."""
    model = build(name)
    lengths, new = (5, 19, 33, 20), (7, 3, 5, 6)
    prompts = [
        torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths
    ]
    backend = TorchBackend(model)
    assert (backend.rows == 1) == (name == "mamba")
    told = answers(backend, prompts, new)
    differing = 0
    for prompt, most, events in zip(prompts, new, told, strict=True):
        expected, margins = without_cache(model, prompt, most)
        found = tokens_of(events)
        assert len(found) == most
        if found != expected:
            first = next(i for i in range(most) if found[i] != expected[i])
            assert margins[first] < backend.bound
            differing += 1
    assert differing <= backend.close_choices
    assert backend.pool.free == backend.pool.pages
    assert backend._batch is None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_half_precision_differs_only_where_it_is_close(name):
    model = build(name).bfloat16()
    prompts = [
        torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (9, 30)
    ]
    alone, together = TorchBackend(model), TorchBackend(model)
    assert together.bound == 2.0**-2
    told = answers(together, prompts, [8, 8])
    for prompt, events in zip(prompts, told, strict=True):
        (single,) = answers(alone, [prompt], [8])
        infos = [info for event in single for info in event.infos]
        differing = [i for i, token in enumerate(tokens_of(events)) if token != infos[i].token]
        if differing:
            best, second = infos[differing[0]].top
            assert best[1] - second[1] < together.bound


def test_a_choice_between_close_logits_is_counted():
    backend = TorchBackend(build("llama"))
    answers(backend, [[5, 6], [7, 8, 9]], [5, 4])
    assert backend.close_choices == 0
    backend.bound = 1e9
    answers(backend, [[5, 6], [7, 8, 9]], [5, 4])
    assert backend.close_choices == 4 + 3  # all but the first token of each, which is chosen from the prompt alone


def test_preempted_rows_of_a_torch_model_come_back_with_the_same_answer():
    model, backend = build("llama-tied"), TorchBackend(build("llama-tied"))
    backend.pool = Budget(8)
    prompts = [torch.randint(3, 160, (33,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2)]
    scheduler = Scheduler(backend, start=False, prefill_chunk=16)
    told = [[], []]
    for prompt, events in zip(prompts, told, strict=True):
        scheduler.submit(prompt, Settings(max_tokens=35), events.append)
        scheduler.turn()
    while scheduler.turn():
        pass
    assert scheduler.stats().preemptions == 1
    for prompt, events in zip(prompts, told, strict=True):
        assert tokens_of(events) == without_cache(model, prompt, 35)[0]
    assert backend.pool.free == 8


@pytest.mark.parametrize("kind", [{}, {"temperature": 0.7, "seed": 1}])
def test_a_row_of_a_torch_model_whose_logits_are_not_finite_ends_alone(kind):
    model = build("llama")
    prompts = [
        torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (5, 9, 12)
    ]

    def said():
        scheduler, told = Scheduler(TorchBackend(model), start=False, prefill_chunk=16), [[] for _ in prompts]
        for prompt, events in zip(prompts, told, strict=True):
            scheduler.submit(prompt, Settings(max_tokens=10, **kind), events.append)
        while scheduler.turn():
            pass
        return told

    expected = [tokens_of(events) for events in said()]
    known = {token for i in (0, 2) for token in prompts[i] + expected[i]} | set(prompts[1])
    at = next(at for at, token in enumerate(expected[1][:-1]) if token not in known)
    with torch.no_grad():
        model.get_input_embeddings().weight[expected[1][at]] = torch.nan
    told = said()
    assert [tokens_of(told[0]), tokens_of(told[2])] == [expected[0], expected[2]]
    assert tokens_of(told[1]) == expected[1][: at + 1]
    assert isinstance(told[1][-1].error, FloatingPointError)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [30.0] * 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_rotary_embedding_that_changes_with_the_length_is_no_business_of_other_rows(rope):
    """transformers turns all rows of a pass as the longest of them asks for."""
    model = tiny_model(max_position_embeddings=32 if rope["rope_type"] == "dynamic" else 128, rope_parameters=rope)
    prompts = [token_ids(length=length, seed=length)[0].tolist() for length in (60, 8)]
    told = answers(TorchBackend(model, positions=128), prompts, [8, 8])
    (alone,) = answers(TorchBackend(model, positions=128), prompts[1:], [8])
    assert tokens_of(told[1]) == tokens_of(alone) == without_cache(model, prompts[1], 8)[0]
    infos = [[info.logprob for event in events for info in event.infos] for events in (told[1], alone)]
    assert infos[0] == pytest.approx(infos[1], abs=1e-4)
    assert "changes with the length" in TorchBackend(model).reason


def test_recurrent_states_run_one_row_at_a_time():
    torch.manual_seed(0)
    mixer = MixerForCausalLM(MixerConfig(vocab_size=97, hidden_size=32, layers=[["attention", {"heads": 2}]])).eval()
    prompts = [token_ids(length=length)[0].tolist() for length in (5, 9)]
    backend = TorchBackend(mixer, positions=64)
    assert backend.rows == 1
    assert "one at a time" in backend.reason
    assert backend.pool.pages == 4
    told = answers(backend, prompts, [4, 4], max_running=8)
    assert [tokens_of(events) for events in told] == [without_cache(mixer, prompt, 4)[0] for prompt in prompts]


def test_caches_are_stacked_at_the_right_end():
    def cache(rows, tokens, start):
        made = DynamicCache()
        for layer in range(2):
            keys = torch.arange(rows * tokens * 2.0).reshape(rows, 1, tokens, 2) + start + 100 * layer
            made.update(keys, -keys, layer)
        return made

    batch, new = cache(2, 5, 1), cache(1, 3, 1000)
    joined = stacked([(batch, Span(1, 3, 5)), (new, Span(0, 0, 3))])
    assert all(type(layer) is DynamicLayer for layer in joined.layers)
    for layer in range(2):
        keys = joined.layers[layer].keys
        assert torch.equal(joined.layers[layer].values, -keys)
        assert keys.shape == (2, 1, 3, 2)
        assert torch.equal(keys[0, :, :1], torch.zeros(1, 1, 2))
        assert torch.equal(keys[0, :, 1:], batch.layers[layer].keys[1, :, 3:])
        assert torch.equal(keys[1], new.layers[layer].keys[0])
    assert joined.get_seq_length() == 3
    assert stacked([(new, Span(0, 0, 3))]) is new
    assert stacked([(new, Span(0, 1, 3))]).get_seq_length() == 2


# ---- choosing


def test_each_row_is_chosen_by_its_own_rule():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    warm, cut = Sampling(2.0), Sampling(1.0, 5, 0.9)
    uniforms = torch.tensor([0.3, 0.9, 0.5, 0.1], dtype=torch.float64)
    found = chosen(logits, [None, warm, cut, warm], uniforms).tolist()
    expected = [int(logits[0].argmax())]
    expected += [
        int(draw_in_torch(logits[i : i + 1], how, uniforms[i : i + 1])) for i, how in ((1, warm), (2, cut), (3, warm))
    ]
    assert found == expected
    assert chosen(logits, None, None).tolist() == logits.argmax(1).tolist()


def test_the_budget_is_what_was_given_or_a_share_of_what_is_free(monkeypatch):
    assert kv_pages(1 << 20, None, 1.0) == 1024
    assert kv_pages(1 << 20, 16, 1.0) == 64  # more than 64 whole sequences is of no use
    with pytest.raises(InputError, match="kv_gib must hold one page"):
        kv_pages(1 << 20, None, 1e-4)
    with pytest.raises(ValueError, match="kv_gib"):
        kv_pages(1 << 20, None, float("nan"))
    for free, expected in ((2 * GIB, GIB // 2), (100 * GIB, 4 * GIB)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("M", (), {"available": free}))
        assert kv_pages(1024, None, None) == expected // 1024
    budget = Budget(4)
    assert len(budget.take(3)) == 3
    with pytest.raises(paged.OutOfPages):
        budget.take(2)
    assert budget.free == 1
    budget.release([0, 0])
    assert budget.free == 3


def test_the_backend_is_chosen_and_says_why(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(backends.kernels, "load", lambda name: False)
    found = backend_for(model, kv_gib=0.1)
    assert isinstance(found, TorchBackend)
    assert "compiler" in found.reason
    assert found.positions == 512
    assert found.pool.pages == 64 * 32
    # 16 tokens of 2 layers, 2 heads, 16 wide, keys and values in float32: 8 KiB a page
    assert backend_for(model, kv_gib=0.01).pool.pages == int(0.01 * GIB) // 8192

    monkeypatch.setattr(backends.kernels, "load", lambda name: True)
    asked = []

    def fits(model, *, weights, cache):
        asked.append((weights, cache))
        return decoder_of(model)

    monkeypatch.setattr(backends, "Decoder", fits)
    found = backend_for(model, kv_gib=0.01)
    assert isinstance(found, CompiledBackend)
    assert "the model's own weights (fp32)" in found.reason
    backend_for(tiny_model().bfloat16(), kv_gib=0.01)
    assert asked == [("fp32", "float32"), ("bf16", "bfloat16")]

    model.decode_loop = decoder_of(model)
    found = backend_for(model, kv_gib=0.01)
    assert found.decoder is model.decode_loop
    assert "the recipe's own loop" in found.reason
    assert len(asked) == 2

    def refuses(model, *, weights, cache):
        raise ValueError("model does not fit the decode loop: sliding windows")

    monkeypatch.setattr(backends, "Decoder", refuses)
    found = backend_for(tiny_model())
    assert isinstance(found, TorchBackend)
    assert "sliding windows" in found.reason


def test_the_tokenizers_limit_counts_where_the_model_has_none(monkeypatch):
    monkeypatch.setattr(backends.kernels, "load", lambda name: False)
    tokenizer = type("T", (), {"model_max_length": 128})
    assert backend_for(build("mamba"), tokenizer).positions == 128
    assert backend_for(build("mamba")).positions is None
    assert backend_for(build("llama"), tokenizer).positions == 256


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_continue_nothing_are_refused(name):
    with pytest.raises(InputError, match="model cannot be served"):
        backend_for(build(name))
    with pytest.raises(ValueError, match="model must continue prompts"):
        TorchBackend(build(name))


def test_a_compiled_backend_needs_pages():
    with pytest.raises(ValueError, match="pages"):
        CompiledBackend(Toy(), Toy().decoder(), pages=0)
