"""The encoder-decoder as a causal language model: for `generate`, for stored folders, and in the server's torch backend."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from assay.methods.core.models.own import register_own
from assay.methods.inference.encdec_gemma import (
    EncDecForCausalLM,
    EncDecForSeq2SeqLM,
    decoder_to_encdec,
    from_t5gemma,
)
from assay.server.backends import backend_for


def encdec(kind: str = "Llama", **changes):
    model = decoder_to_encdec(tiny_model(kind, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture
def model():
    return encdec("Mistral", sliding_window=4)


@pytest.fixture
def causal(model):
    return EncDecForCausalLM.of(model)


def answers(model, ids, tokens, mask=None, **how):
    """Greedy answers of the encoder-decoder itself, without the start token."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **how)
    return out[:, 1:]


def test_it_continues_a_prompt_with_the_encoder_decoders_answer(model, causal):
    ids = token_ids(batch=2, length=11)
    out = causal.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(out[:, :11], ids)
    assert torch.equal(out[:, 11:], answers(model, ids, 8))
    assert model.config.is_encoder_decoder
    assert not causal.config.is_encoder_decoder
    assert causal.lm_head is model.lm_head


def test_prompts_of_different_lengths_are_padded_on_the_left(model, causal):
    long, short = token_ids(length=11), token_ids(length=6, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    out = causal.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(out[0, 11:], answers(model, long, 8)[0])
    assert torch.equal(out[1, 11:], answers(model, short, 8)[0])


def test_beams(model, causal):
    ids = token_ids(batch=2, length=11)
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    found = causal.generate(ids, **how)[:, 11:]
    assert torch.equal(found, answers(model, ids, 6, num_beams=3))


def test_its_cache_is_cut_reordered_and_repeated(causal):
    """Held against caches that were built anew for the rows as they then are, one of which is padded."""
    ids, answer = token_ids(batch=2, length=11), token_ids(batch=2, length=2, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def begun(rows):
        cache = causal(ids[rows], attention_mask=mask[rows]).cache
        causal(answer[rows, :1], cache=cache)
        return cache

    def next_is_that_of(cache, rows):
        found, wanted = (causal(answer[rows, 1:], cache=c).logits for c in (cache, begun(rows)))
        assert torch.allclose(found, wanted, atol=1e-5)
        return found

    cache = begun([0, 1])
    assert (cache.get_seq_length(), cache.answered) == (12, 1)
    first = next_is_that_of(cache, [0, 1])
    assert not torch.allclose(first, first.flip(0), atol=1e-2)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    next_is_that_of(cache, [1, 0])
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    next_is_that_of(cache, [1, 1, 0, 0])
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    next_is_that_of(cache, [0, 1, 0])
    assert cache.mask.tolist() == mask[[0, 1, 0]].tolist()
    with pytest.raises(ValueError, match="tokens_to_remove must be"):
        cache.crop(-9)
    with pytest.raises(ValueError, match="cannot be emptied"):
        cache.reset()


def test_an_answer_longer_than_a_window_is_not_cut_in_some_layers():
    kinds = ["full_attention", "sliding_attention"]
    causal = EncDecForCausalLM.of(from_t5gemma(encdec("Gemma2", sliding_window=4, layer_types=kinds)))
    cache = causal(token_ids(length=11)).cache
    for token in token_ids(length=6, seed=1).split(1, 1):
        causal(token, cache=cache)
    with pytest.raises(ValueError, match="a window of 4 has left tokens behind"):
        cache.crop(-1)
    own = cache.inner.self_attention_cache
    assert [layer.get_seq_length() for layer in own.layers] == [7, 7]


def test_what_a_causal_model_could_and_this_one_cannot(causal):
    ids = token_ids(length=11)
    cache = causal(ids).cache
    with pytest.raises(ValueError, match=r"one token for each of 1 rows.*the encoder has read the prompt"):
        causal(ids, cache=cache)
    with pytest.raises(ValueError, match="logits_to_keep must be 1, got 0: the tokens of a prompt"):
        causal(ids, logits_to_keep=0)
    with pytest.raises(ValueError, match="use_cache must not be False"):
        causal(ids, use_cache=False)
    with pytest.raises(ValueError, match="labels must be left out"):
        causal(ids, labels=ids)
    with pytest.raises(TypeError, match="cache must be an AnswerCache"):
        causal(ids, cache=cache.inner)
    with pytest.raises(TypeError, match="model must be an EncDecForSeq2SeqLM, got Llama"):
        EncDecForCausalLM.of(tiny_model())


# ---- the server


def served(backend, ids, tokens, chosen=None):
    """Prefill and one step at a time, as the scheduler does it."""
    sequence = backend.begin(backend.pool.take(1))
    logits = backend.prefill(sequence, ids, "last")
    assert logits.shape[0] == 1
    made = [int(logits[-1].argmax())]
    while len(made) < tokens:
        answer, _ = backend.run([sequence], [made[-1]], 1, sampling=None, uniforms=None, want_logits=False)
        made += answer[0].tolist()
    return made, sequence


def test_the_server_runs_its_rows_one_at_a_time(model, causal):
    backend = backend_for(causal)
    assert backend.rows == 1
    assert not backend.pieces
    assert "AnswerCache" in backend.reason
    for seed in (0, 1):
        ids = token_ids(length=11 - seed, seed=seed)
        made, sequence = served(backend, ids[0].tolist(), 6)
        assert made == answers(model, ids, 6)[0].tolist()
        assert sequence.length == ids.shape[1] + 5
        backend.end(sequence)


def test_a_preempted_answer_is_taken_up_again(model, causal):
    backend = backend_for(causal)
    ids = token_ids(length=11)
    expected = answers(model, ids, 6)[0].tolist()
    sequence = backend.begin(backend.pool.take(1))
    backend.prefill(sequence, ids[0].tolist(), "last")
    backend.extend(sequence, expected[:3])
    answer, _ = backend.run([sequence], [expected[3]], 2, sampling=None, uniforms=None, want_logits=False)
    assert answer[0].tolist() == expected[4:]


def test_the_server_asks_for_logits_of_the_prompt_in_vain(causal):
    backend = backend_for(causal)
    with pytest.raises(ValueError, match="have no logits"):
        backend.prefill(backend.begin(backend.pool.take(1)), [5, 6, 7], "all")


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_stored_folder_is_served_and_trained_on(tmp_path, kind):
    made = encdec(kind, tie_word_embeddings=True)
    model = from_t5gemma(made) if kind == "Gemma2" else made
    EncDecForCausalLM.of(model).save_pretrained(tmp_path)
    assert register_own(tmp_path)
    assert not AutoConfig.from_pretrained(tmp_path).is_encoder_decoder
    ids = token_ids(length=11)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(causal, EncDecForCausalLM)
    assert not causal.config.is_encoder_decoder
    made_tokens, _ = served(backend_for(causal), ids[0].tolist(), 6)
    assert made_tokens == answers(model, ids, 6)[0].tolist()
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(again, EncDecForSeq2SeqLM)
    assert again.config.is_encoder_decoder
    again.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").is_encoder_decoder
    assert torch.equal(answers(again, ids, 6), answers(model, ids, 6))
