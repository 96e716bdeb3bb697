"""The compiled decode loop: against its torch oracle, and against transformers' own generate."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.apart import built_with
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
)

from assay.methods.builtin import decode_loop as dl
from assay.methods.builtin import weight_only
from assay.methods.builtin.decode_loop import Decoder, Sampling, transform
from assay.methods.core import kernels
from assay.methods.core.generation.paged import Sequence, pages_for
from assay.methods.transform import Transform, TuneContext

CONTEXT = TuneContext(goal="decode", prompt_tokens=16, new_tokens=16)
EXACT = {"weights": "fp32", "cache": "float32"}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 700,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}

compiled = pytest.mark.skipif(not kernels.load("decode"), reason="no compiler")


def tiny(model_class=LlamaForCausalLM, config_class=LlamaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **changes})).eval()
    for name, parameter in model.named_parameters():  # biases and gains that matter
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def looped(model, **config):
    return transform.apply(copy.deepcopy(model), {**EXACT, **config}, CONTEXT)


def ragged(lengths=(30, 3, 17, 1, 16), seed=1):
    torch.manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, 101, (len(lengths), width))
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids * mask, mask


def greedy(model, ids, mask=None, **more):
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 20, "do_sample": False, **more})


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def fast(model):
    return looped(model)


# ---- the kernel against the oracle


def filled(decoder, lengths, seed=0, room=40):
    """A pool and sequences of these lengths, their pages in no order, with room for some tokens more."""
    needed = [pages_for(n + room) for n in lengths]
    pool = decoder.new_pool(sum(needed))
    pages, sequences = pool.take(sum(needed)), []
    random.Random(seed).shuffle(pages)
    torch.manual_seed(seed)
    for n, count in zip(lengths, needed, strict=True):
        sequence = Sequence([pages.pop() for _ in range(count)], n)
        shape = (decoder.layers, decoder.kv_heads, n, decoder.head_size)
        pool.write(sequence.pages, 0, torch.randn(shape), torch.randn(shape))
        sequences.append(sequence)
    return pool, sequences


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_kernel_agrees_with_the_oracle(model, weights, cache, threads):
    decoder = Decoder(model, weights=weights, cache=cache)
    lengths, tokens = (15, 16, 17, 300, 1, 513), [7, 8, 9, 10, 11, 12]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in ([3], [0, 1, 2], list(range(6))):
            (pool, ours), (other, theirs) = filled(decoder, lengths), filled(decoder, lengths)
            fed = [tokens[row] for row in rows]
            chosen, logits = decoder.run(pool, [ours[row] for row in rows], fed, 1, want_logits=True)
            expected = torch.stack([decoder.step_in_torch(other, theirs[r], t) for r, t in zip(rows, fed, strict=True)])
            # a bfloat16 cache may round a key or value the other way, an int8 input flip by one
            tolerance = 1e-4 if cache == "float32" and weights in ("fp32", "bf16") else 0.05
            scale = float(expected.abs().max())
            torch.testing.assert_close(logits, expected, atol=tolerance * scale, rtol=0)
            assert torch.equal(chosen[:, 0], logits.argmax(1))
            assert [s.length for s in ours] == [s.length for s in theirs]
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 2), (3, 1), (5, 1), (6, 1), (7, 1), (4, 1), (6, 2), (8, 1), (9, 1), (16, 2)]
)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 128, 256])
def test_head_layouts(heads, head_dim):
    layout = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 16 * heads[0]}
    made = tiny(**layout, head_dim=head_dim, num_hidden_layers=1)
    decoder = Decoder(made, **EXACT)
    (pool, ours), (other, theirs) = filled(decoder, (40, 5)), filled(decoder, (40, 5))
    _, logits = decoder.run(pool, ours, [3, 4], 1, want_logits=True)
    expected = torch.stack([decoder.step_in_torch(other, theirs[0], 3), decoder.step_in_torch(other, theirs[1], 4)])
    torch.testing.assert_close(logits, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


@compiled
def test_many_steps_in_one_call_are_single_steps(model):
    decoder = Decoder(model, weights="int4")
    (pool, one), (other, many) = filled(decoder, (20, 7)), filled(decoder, (20, 7))
    together, _ = decoder.run(other, many, [5, 6], 12)
    tokens, steps = [5, 6], []
    for _ in range(12):
        made, _ = decoder.run(pool, one, tokens, 1)
        tokens = made[:, 0].tolist()
        steps.append(made)
    assert torch.equal(together, torch.cat(steps, 1))
    assert [s.length for s in one] == [s.length for s in many] == [32, 19]


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
def test_run_says_what_is_wrong(model, load, monkeypatch):
    decoder = Decoder(model, **EXACT)
    monkeypatch.setattr(kernels, "load", load)
    pool, (first, second) = filled(decoder, (10, 31), room=1)
    for sequences, tokens, steps, message in (
        ([first, second], [5, 5], 2, "the pages of a sequence hold 32 positions, not 33"),
        ([first, first], [5, 5], 1, "sequences must not write to the same pages"),
        ([first], [101], 1, r"tokens must lie in 0\.\.100, got 101"),
        ([first], [5, 5], 1, "tokens must be one per sequence, got 2 for 1"),
        ([first], [5], 0, "steps must be a whole number at least 1, got 0"),
        ([], [], 1, "at least one sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.run(pool, sequences, tokens, steps)
    with pytest.raises(ValueError, match="tokens must lie in 0"):
        decoder.extend(pool, [(first, [5, -1])], logits="last")
    with pytest.raises(ValueError, match="feeds must hold at least one token each"):
        decoder.extend(pool, [(first, [])], logits="last")
    with pytest.raises(ValueError, match="logits must be one of 'last', 'all', 'none', got 'first'"):
        decoder.extend(pool, [(first, [5])], logits="first")
    with pytest.raises(ValueError, match="hold 16 positions, not 17"):
        decoder.extend(pool, [(first, [5] * 7)], logits="last")
    pool.hold(first.pages)
    with pytest.raises(ValueError, match="shared by 2 holders: copy it first"):
        decoder.run(pool, [first], [5], 1)
    pool.release(first.pages + first.pages)
    with pytest.raises(ValueError, match="which is free"):
        decoder.run(pool, [first], [5], 1)
    with pytest.raises(ValueError, match="pool must be of 3 layers with 2 heads of 16, got 2 with 2 of 16"):
        decoder.run(Decoder(tiny(num_hidden_layers=2), **EXACT).new_pool(1), [second], [5], 1)
    assert (first.length, second.length) == (10, 31)


def test_no_more_positions_than_the_model_has(model):
    decoder = Decoder(model, **EXACT)
    pool, (sequence,) = filled(decoder, (699,))
    decoder.run(pool, [sequence], [5], 1)
    with pytest.raises(ValueError, match="the model has 700 positions"):
        decoder.run(pool, [sequence], [5], 1)


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_not_a_number_is_reported(model, load, weights, part, monkeypatch):
    decoder = Decoder(model, weights=weights)
    monkeypatch.setattr(kernels, "load", load)
    pool, (sequence,) = filled(decoder, (10,))
    getattr(pool, part)[0, sequence.pages[0], 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        decoder.run(pool, [sequence], [5], 1)
    with pytest.raises(ValueError, match="not finite"):
        decoder.extend(pool, [(sequence, [5, 6])], logits="last")
    assert sequence.length == 10


def test_what_was_never_written_is_not_read(model):
    """Positions after a sequence's end, in the last page too, may hold anything."""
    decoder = Decoder(model, **EXACT)
    (clean, ours), (soiled, theirs) = filled(decoder, (20,)), filled(decoder, (20,))
    for tensor, index in ((soiled.keys, (..., slice(4, 16))), (soiled.values, (..., slice(4, 16), slice(None)))):
        tensor[:, theirs[0].pages[1]][index] = torch.nan
    for page in theirs[0].pages[2:]:
        soiled.keys[:, page], soiled.values[:, page] = torch.nan, torch.nan
    found, expected = decoder.run(soiled, theirs, [5], 6)[0], decoder.run(clean, ours, [5], 6)[0]
    assert torch.equal(found, expected)


def test_decoder_says_what_is_wrong(model):
    with pytest.raises(ValueError, match="weights must be one of .fp32., .bf16., .int8., .int4., got .int2."):
        Decoder(model, weights="int2")
    with pytest.raises(ValueError, match="cache must be one of .bfloat16., .float32., got .int8."):
        Decoder(model, cache="int8")
    decoder = Decoder(model)
    with pytest.raises(ValueError, match="pages must be a whole number at least 1, got 0"):
        decoder.new_pool(0)
    assert decoder.page_bytes == decoder.new_pool(2).page_bytes == 3 * 2 * 16 * 16 * 2 * 2
    assert (decoder.vocab, decoder.max_positions) == (101, 700)


@pytest.mark.slow
@compiled
def test_portable_loops_without_avx512(tmp_path):
    """The same file, compiled without AVX-512, agrees with the torch oracle (in a process of its own: same operators)."""
    check = """
import torch
assert kernels.load("decode") and kernels.load("weight_only")
from assay.methods.core.quantize.formats import FORMATS, PANEL_FORMATS
from assay.methods.core.quantize.groups import quantize_inputs
torch.manual_seed(0)
weight, x = torch.randn(70, 64), torch.randn(9, 64)
for kind in PANEL_FORMATS:
    packed = FORMATS[kind].pack(weight)["packed"]
    y = torch.ops.assay.weight_only_linear(x, packed, FORMATS[kind].id, 70)
    inputs = quantize_inputs(x) if kind.startswith("int") else x
    expected = inputs @ FORMATS[kind].unpack({"packed": packed}, 70, 64).T
    assert float((y - expected).abs().max()) < 1e-3, kind
from tests.methods.builtin import test_decode_loop as t
model = t.tiny()
for weights in PANEL_FORMATS:
    decoder = t.Decoder(model, weights=weights, cache="float32")
    (pool, ours), (other, theirs) = t.filled(decoder, (15, 300)), t.filled(decoder, (15, 300))
    _, logits = decoder.run(pool, ours, [7, 8], 1, want_logits=True)
    expected = torch.stack([decoder.step_in_torch(other, theirs[0], 7), decoder.step_in_torch(other, theirs[1], 8)])
    assert float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max()), weights
    for row, (length, token) in enumerate(((15, 7), (300, 8))):
        pool, alone = t.filled(decoder, (15, 300))
        assert torch.equal(decoder.run(pool, [alone[row]], [token], 1, want_logits=True)[1][0], logits[row]), weights
"""
    built_with(check, "-mno-avx512f", cache=tmp_path)


# ---- choosing tokens


@compiled
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 3000),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
)
def test_compiled_draw_is_the_draw_in_torch(seed, n, temperature, top_k, top_p):
    torch.manual_seed(seed)
    logits, uniforms = torch.randn(4, n) * 3, torch.rand(4, dtype=torch.float64)
    sampling = Sampling(temperature, top_k, top_p)
    drawn = dl.draw(logits, sampling, uniforms)
    expected = dl.draw_in_torch(logits, sampling, uniforms)
    for row in (drawn != expected).nonzero().flatten().tolist():
        # only a random number that falls on an edge (to float32) may tell them apart: then its neighbour draws the same
        close = [dl.draw_in_torch(logits, sampling, uniforms + step)[row] for step in (-1e-5, 1e-5)]
        assert drawn[row] in close


def test_draw_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -torch.inf]]).repeat(20000, 1)
    for sampling in (Sampling(), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.0, top_p=0.8)):
        scores = logits[:1] / sampling.temperature
        if sampling.top_k:
            scores[0, 2] = -torch.inf
        expected = scores.softmax(1)[0]
        if sampling.top_p < 1:  # 0.64 + 0.24 passes 0.8
            expected = torch.tensor([expected[0], 0, 0, expected[3], 0]) / (expected[0] + expected[3])
        drawn = dl.draw(logits, sampling)
        frequency = torch.bincount(drawn, minlength=5) / len(drawn)
        assert float((frequency - expected).abs().max()) < 0.015


# ---- generate: the same tokens as transformers


def test_greedy_batch_of_ragged_prompts(model, fast):
    ids, mask = ragged()
    expected = greedy(model, ids, mask, max_new_tokens=40)
    assert torch.equal(greedy(fast, ids, mask, max_new_tokens=40), expected)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = greedy(fast, ids[row : row + 1, -length:], max_new_tokens=40)
        assert torch.equal(alone[0, length:], expected[row, 30:])


def test_rounded_weights_are_those_of_a_rounded_model(model):
    ids, mask = ragged((9, 4))
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for linear in (m for m in rounded.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.copy_(linear.weight.bfloat16())
    expected = greedy(rounded, ids, mask)
    assert torch.equal(greedy(looped(rounded, weights="bf16"), ids, mask), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_weights_are_those_of_the_quantised_model(model, bits):
    """The loop on int4 (int8) weights is the transformers loop over WeightOnlyLinear layers with an int8 head."""
    ids, mask = ragged((9, 4))
    quantised = weight_only.transform.apply(copy.deepcopy(model), {"bits": bits, "head_bits": 8}, CONTEXT)
    fast = looped(quantised, weights=f"int{bits}")
    decoder = fast.decode_loop
    pool, prompt = decoder.new_pool(2), ids[:1]
    sequence = Sequence(pool.take(2), prompt.shape[1] - 1)
    past = DynamicCache()
    with torch.no_grad():
        quantised(prompt[:, :-1], cache=past)
        expected = quantised(prompt[:, -1:], cache=past).logits[0, -1]
    keys = torch.stack([layer.keys[0, :, :-1] for layer in past.layers])
    pool.write(sequence.pages, 0, keys, torch.stack([layer.values[0, :, :-1] for layer in past.layers]))
    _, logits = decoder.run(pool, [sequence], prompt[0, -1:].tolist(), 1, want_logits=True)
    torch.testing.assert_close(logits[0], expected, atol=0.03 * float(expected.abs().max()), rtol=0)


FAMILIES = {
    "untied, wide groups": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "llama3 rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "odd vocabulary, wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 32, "vocab_size": 131}),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(family):
    model_class, config_class, changes = FAMILIES[family]
    made = tiny(model_class, config_class, **changes)
    ids, mask = ragged((24, 5))
    assert torch.equal(greedy(looped(made), ids, mask), greedy(made, ids, mask))


def test_a_bfloat16_model(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    fast = transform.apply(half, {"weights": "bf16"}, CONTEXT)
    out = greedy(fast, ragged((9,))[0])
    assert out.shape == (1, 29)


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
@pytest.mark.parametrize("pick", [3, (4, 9)])
def test_end_tokens(model, load, pick, monkeypatch):
    monkeypatch.setattr(kernels, "load", load)
    ids, mask = ragged((6, 3, 5))
    free = greedy(model, ids, mask)[:, 6:]
    ends = [int(free[0, pick])] if isinstance(pick, int) else [int(free[i, j]) for i, j in enumerate(pick)]
    expected = greedy(model, ids, mask, eos_token_id=ends, pad_token_id=0)
    fast = looped(model)
    assert torch.equal(greedy(fast, ids, mask, eos_token_id=ends, pad_token_id=0), expected)
    first = greedy(model, ids[:1], mask[:1], eos_token_id=ends, pad_token_id=0)
    assert first.shape[1] < 26
    assert torch.equal(greedy(fast, ids[:1], mask[:1], eos_token_id=ends, pad_token_id=0), first)


def test_end_at_the_first_token(model, fast):
    ids, mask = ragged((6, 3))
    end = int(greedy(model, ids, mask)[0, 6])
    expected = greedy(model, ids, mask, eos_token_id=end, pad_token_id=0)
    assert torch.equal(greedy(fast, ids, mask, eos_token_id=end, pad_token_id=0), expected)


def test_no_end_before_min_new_tokens(model, fast):
    ids, mask = ragged((6, 3))
    ends = greedy(model, ids, mask)[0, 6:10].unique().tolist()
    for least in (1, 7, 20):
        more = {"eos_token_id": ends, "pad_token_id": 0, "min_new_tokens": least}
        assert torch.equal(greedy(fast, ids, mask, **more), greedy(model, ids, mask, **more))


class Listener:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3}])
def test_streamer(model, fast, more):
    ids, _ = ragged((6,))
    ours, theirs = Listener(), Listener()
    expected = greedy(model, ids, streamer=theirs, **more)
    assert torch.equal(greedy(fast, ids, streamer=ours, **more), expected)
    assert ours.ended
    assert [p.tolist() for p in ours.pieces] == [p.tolist() for p in theirs.pieces]


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "eos_token_id": [5, 6, 7, 8], "pad_token_id": 0},
        {"stopping_criteria": [StopAt(12)]},
        {"min_length": 15, "suppress_tokens": [1, 2, 3]},
    ],
)
def test_processors_and_criteria_of_transformers(model, fast, more):
    ids, mask = ragged((6, 3))
    assert torch.equal(greedy(fast, ids, mask, **more), greedy(model, ids, mask, **more))


@pytest.mark.parametrize("load", [kernels.load, lambda name: False])
def test_sampling_repeats_with_the_seed(fast, load, monkeypatch):
    monkeypatch.setattr(kernels, "load", load)
    ids, mask = ragged((6, 3))

    def sample(seed, **more):
        torch.manual_seed(seed)
        return fast.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=True, **more)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, temperature=0.7, top_k=5, top_p=0.9), sample(1, temperature=0.7, top_k=5, top_p=0.9))
    assert torch.equal(sample(1, top_k=1), greedy(fast, ids, mask))
    assert torch.equal(sample(3, typical_p=0.9), sample(3, typical_p=0.9))


def test_sampling_takes_the_compiled_draw(fast, monkeypatch):
    """Temperature, top-k and top-p never come back to Python; another warper does."""
    calls = []
    monkeypatch.setattr(dl.generate, "_stepwise_loop", lambda *args: calls.append(1) or args[3])
    ids, _ = ragged((6,))
    fast.generate(
        ids, max_new_tokens=3, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_new_tokens=2, eos_token_id=3
    )
    assert not calls
    fast.generate(ids, max_new_tokens=3, do_sample=True, min_p=0.1)
    assert calls


def test_a_cache_that_was_passed_in(model, fast):
    """A conversation: the cache goes in, comes back longer, and goes on."""
    ids, mask = ragged((8, 5))
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for turn in range(3):
        a = greedy(fast, ids, mask, cache=ours, max_new_tokens=7)
        b = greedy(model, ids, mask, cache=theirs, max_new_tokens=7)
        assert torch.equal(a, b), turn
        assert ours.get_seq_length() == theirs.get_seq_length() == a.shape[1] - 1
        for mine, his in zip(ours.layers, theirs.layers, strict=True):
            valid = torch.cat([mask, mask.new_ones(2, mine.keys.shape[2] - mask.shape[1])], 1)[:, None, :, None]
            torch.testing.assert_close(mine.keys * valid, his.keys * valid, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values * valid, his.values * valid, atol=1e-4, rtol=1e-4)
        more = torch.randint(1, 101, (2, 4), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([b, more], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)


def test_num_return_sequences_and_chunked_prefill(model, fast):
    ids, mask = ragged((20, 7))
    torch.manual_seed(0)
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 25)
    more = {"prefill_chunk_size": 8}
    assert torch.equal(greedy(fast, ids, mask, **more), greedy(model, ids, mask, **more))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "cache is"),
        ({"cache_implementation": "static"}, "cache is"),
        ({"num_beams": 2}, None),
    ],
)
def test_what_is_left_to_transformers(model, fast, more, reason, caplog):
    ids, mask = ragged((6, 3))
    with caplog.at_level(logging.INFO, logger=dl.__name__):
        ours, theirs = greedy(fast, ids, mask, **more), greedy(model, ids, mask, **more)
    if more.get("return_dict_in_generate"):
        ours, theirs = ours.sequences, theirs.sequences
    assert torch.equal(ours, theirs)
    assert (reason or "") in caplog.text


def test_masks_that_are_no_left_padding(model, fast, caplog):
    ids, mask = ragged((6, 6))
    mask[0, 2] = 0
    with caplog.at_level(logging.INFO, logger=dl.__name__):
        assert torch.equal(greedy(fast, ids, mask), greedy(model, ids, mask))
    assert "not left padding" in caplog.text


def test_more_than_the_model_has_positions_for(fast):
    ids, _ = ragged((690,))
    assert greedy(fast, ids, max_new_tokens=10).shape == (1, 700)
    with pytest.raises(
        ValueError, match="max_new_tokens 11 after a prompt of 690 tokens passes the model's 700 positions"
    ):
        greedy(fast, ids, max_new_tokens=11)


def test_without_a_compiler(model, fast, monkeypatch):
    ids, mask = ragged((6, 3))
    expected = greedy(model, ids, mask)
    monkeypatch.setattr(kernels, "load", lambda name: False)
    assert torch.equal(greedy(looped(model), ids, mask), expected)
    assert torch.equal(greedy(copy.deepcopy(fast), ids, mask), expected)
    assert "C++ compiler" in transform.applies_to(model, CONTEXT).reason


# ---- prefill


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=20), overhead=st.integers(0, 200))
def test_length_groups(lengths, overhead):
    groups = dl.length_groups(lengths, overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))

    def cost(parts):
        return sum(overhead + len(part) * max(lengths[row] for row in part) for part in parts)

    everybody, nobody = [list(range(len(lengths)))], [[row] for row in range(len(lengths))]
    assert cost(groups) <= min(cost(everybody), cost(nobody))


def test_prompts_of_different_lengths_are_not_all_padded(model):
    fast = looped(model)
    sizes = []
    fast.model.register_forward_pre_hook(lambda m, a, k: sizes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    ids, mask = ragged((400, 3, 10, 390))
    expected = greedy(model, ids, mask)
    assert torch.equal(greedy(fast, ids, mask), expected)
    assert sizes == [(2, 10), (2, 400)]


def test_the_packed_prefill_of_the_settings_is_used(model, monkeypatch):
    from assay.methods.core.generation import loop
    from assay.methods.inference.prepacking import PrepackedPrefill

    fast = looped(model)
    loop.set_settings(fast, prefill=PrepackedPrefill)
    calls, original = [], PrepackedPrefill.__call__
    monkeypatch.setattr(PrepackedPrefill, "__call__", lambda self, p: calls.append(len(p)) or original(self, p))
    ids, mask = ragged((40, 3, 20))
    assert torch.equal(greedy(fast, ids, mask), greedy(model, ids, mask))
    assert calls == [3]
    prompts = [[1, 2, 3], list(range(1, 30))]
    assert loop.generate_batch(fast, prompts, new_tokens=5) == loop.generate_batch(model, prompts, new_tokens=5)
    assert calls == [3, 2]


# ---- the transform


def test_transform_protocol(model):
    assert isinstance(transform, Transform)
    assert transform.slot == "decode"
    if kernels.load("decode"):
        assert transform.applies_to(model, CONTEXT).applies
    assert [c["weights"] for c in transform.configs(model, CONTEXT)] == ["int4", "int8", "bf16"]
    for config in transform.configs(model, CONTEXT):
        made = transform.apply(copy.deepcopy(model), config, CONTEXT)
        assert made.decode_loop.kind == config["weights"]
        assert greedy(made, ragged((6,))[0]).shape == (1, 26)


def test_transform_says_what_is_wrong(model):
    with pytest.raises(ValueError, match=r"unknown configuration \['bits'\]"):
        transform.apply(copy.deepcopy(model), {"bits": 4}, CONTEXT)
    with pytest.raises(ValueError, match="keep_prefill_weights=False needs weights int8 or int4, got 'bf16'"):
        transform.apply(copy.deepcopy(model), {"weights": "bf16", "keep_prefill_weights": False}, CONTEXT)
    with pytest.raises(ValueError, match="model does not fit the decode loop"):
        transform.apply(torch.nn.Linear(3, 3), {}, CONTEXT)


def test_applies_to_says_why_not():
    def reason(model):
        fit = transform.applies_to(model, CONTEXT)
        assert not fit.applies
        return fit.reason

    assert "families" in reason(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)))
    assert "activation must be silu or gelu_pytorch_tanh, not gelu" in reason(tiny(hidden_act="gelu"))
    assert "multiple of 16" in reason(tiny(head_dim=24))
    assert "up to 256" in reason(tiny(head_dim=272))
    assert "biases of q, k and v only" in reason(tiny(mlp_bias=True))
    assert "multiples of 32" in reason(tiny(intermediate_size=80))
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    assert "changes with the length" in reason(tiny(**dynamic))
    assert "must be float32 or bfloat16" in reason(tiny().half())
    changed = tiny()
    changed.model.layers[1].mlp.up_proj = torch.nn.Sequential(changed.model.layers[1].mlp.up_proj)
    assert "layers.1" in reason(changed)


def test_copies_and_pickles(model, fast, tmp_path):
    ids, mask = ragged((6, 3))
    expected = greedy(fast, ids, mask)
    copied = copy.deepcopy(fast)
    assert copied.decode_loop.weights[0].data_ptr() != fast.decode_loop.weights[0].data_ptr()
    assert copied.decode_loop.embedding is copied.model.embed_tokens.weight
    assert torch.equal(greedy(copied, ids, mask), expected)
    assert torch.equal(greedy(pickle.loads(pickle.dumps(fast)), ids, mask), expected)
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    assert torch.equal(greedy(torch.load(stream, weights_only=False), ids, mask), expected)
    fast.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(greedy(transform.apply(loaded, EXACT, CONTEXT), ids, mask), expected)
    assert type(fast).__name__ == "LlamaForCausalLM"
    assert set(fast.state_dict()) == set(model.state_dict())


def test_applying_twice_takes_the_last(model):
    made = looped(looped(model), weights="int8")
    assert made.decode_loop.kind == "int8"
    assert type(made).__mro__.count(dl.DecodeLoopMixin) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_sharing_the_weights_with_the_prefill(model, bits):
    made = looped(model, weights=f"int{bits}", keep_prefill_weights=False)
    linear = made.model.layers[1].mlp.up_proj
    assert isinstance(linear, weight_only.WeightOnlyLinear)
    assert linear.packed.data_ptr() == made.decode_loop.weights[7 + 5].data_ptr()
    assert made.lm_head.packed.data_ptr() == made.decode_loop.weights[-1].data_ptr()
    ids, mask = ragged((6, 3))
    quantised = weight_only.transform.apply(copy.deepcopy(model), {"bits": bits, "head_bits": 8}, CONTEXT)
    ours, theirs = made(ids, attention_mask=mask).logits, quantised(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs)
    assert greedy(made, ids, mask).shape == (2, 26)


def test_layers_that_are_packed_already_are_shared(model, tmp_path):
    made = weight_only.transform.apply(copy.deepcopy(model), {"bits": 4, "head_bits": 8}, CONTEXT)
    before = made(torch.arange(1, 9)[None]).logits
    made = transform.apply(made, {"weights": "int4"}, CONTEXT)
    for number, layer in enumerate(made.model.layers):
        assert layer.self_attn.q_proj.packed.data_ptr() == made.decode_loop.weights[7 * number].data_ptr()
    assert torch.equal(made(torch.arange(1, 9)[None]).logits, before)
    copied = copy.deepcopy(made)
    assert copied.lm_head.packed.data_ptr() == copied.decode_loop.weights[-1].data_ptr()
    with pytest.raises(ValueError, match="must not be saved with packed layers"):
        made.save_pretrained(tmp_path)


@pytest.mark.parametrize("smooth", [None, 0.5])
@pytest.mark.parametrize("fuse", [True, False])
def test_on_top_of_an_int8_prefill(model, smooth, fuse):
    """The loop takes its weights from W8A8 layers too, fused or not, smoothed or not."""
    from assay.methods.core.quantize.int8_linear import quantize_linears

    calibration = [ragged((20,))[0]]
    made = quantize_linears(copy.deepcopy(model), smooth=smooth, calibration=calibration, fuse=fuse)
    made = transform.apply(made, EXACT, CONTEXT)
    original = Decoder(model, **EXACT)
    (pool, ours), (other, theirs) = filled(original, (20,)), filled(original, (20,))
    _, logits = made.decode_loop.run(pool, ours, [5], 1, want_logits=True)
    _, expected = original.run(other, theirs, [5], 1, want_logits=True)
    assert float((logits - expected).square().mean() / expected.square().mean()) < 2e-3
    assert greedy(made, *ragged((6, 3))).shape == (2, 26)
    with pytest.raises(ValueError, match="needs ordinary linear layers"):
        transform.apply(made, {"weights": "int4", "keep_prefill_weights": False}, CONTEXT)


@pytest.mark.slow
@pytest.mark.model
def test_bundled_model_speaks(smollm2):
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    expected = smollm2.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    for weights in ("fp32", "int4"):
        fast = transform.apply(copy.deepcopy(smollm2.model), {"weights": weights}, CONTEXT)
        assert torch.equal(fast.generate(**prompt, max_new_tokens=4, do_sample=False), expected)


# ---- what it must not serve, and weights that move


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5), "scales by head_dim"),
        (lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 1e-3), "epsilon"),
        (lambda model: setattr(model.model.norm, "variance_epsilon", 1e-3), "epsilon"),
        (lambda model: setattr(model.model.layers[0].mlp, "forward", lambda x: x), "forward pass was replaced"),
        (lambda model: setattr(model.model.layers[0].self_attn, "sliding_window", 4), "sliding-window"),
        (lambda model: setattr(model, "lm_head", torch.nn.Linear(64, 90, bias=False)), "rows of the configuration"),
        (lambda model: setattr(model.model.layers[0], "self_attn", torch.nn.Identity()), "plain llama layer"),
    ],
)
def test_another_function_is_refused_before_anything_is_changed(change, reason):
    model = tiny()
    change(model)
    kind = type(model)
    with pytest.raises(ValueError, match=reason):
        transform.apply(model, {"weights": "fp32"}, CONTEXT)
    assert type(model) is kind
    assert not transform.applies_to(model, CONTEXT).applies


def test_a_subclass_with_its_own_forward_is_refused():
    class Own(LlamaForCausalLM):
        pass

    assert "transformers' own LlamaForCausalLM" in transform.applies_to(tiny(Own), CONTEXT).reason


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[0].mlp.up_proj.weight.data.mul_(1.01),
        lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(model.model.norm.weight * 2)),
        lambda model: model.to(torch.bfloat16),
    ],
)
def test_other_weights_than_those_packed_are_refused(change):
    model = transform.apply(tiny(), {"weights": "int4"}, CONTEXT)
    ids = ragged((6,))[0]
    again = greedy(copy.deepcopy(model), ids)  # a copy has the same weights
    assert torch.equal(greedy(model, ids), again)
    with torch.no_grad():
        change(model)
    with pytest.raises(ValueError, match="apply the transform again"):
        greedy(model, ids)
    model = transform.apply(model, {"weights": "int4"}, CONTEXT)
    assert greedy(model, ids).shape[0] == 1
