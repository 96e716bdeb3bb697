"""The encoder-decoder's experiments notice when the decoder reads nothing of the prompt, or another one; their tasks are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from tests.properties.sabotage import PAYS, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.inference import encdec_gemma as room
from assay.experiments.inference import language
from assay.methods.inference.encdec_gemma.model import CrossSublayer, EncDecForSeq2SeqLM
from assay.workloads.sequences import byte_windows, text_bytes

TINY = {"width": 48, "layers": 1, "large_width": 48, "large_layers": 2, "pretrain": 300, "adapt": 60, "tune": 240}
TIMED = {"prompt": 16, "answer": 2, **room.TIMED_SMOKE, "setting": TINY}
OTHERS = {"decoder-only": 0.08, "more pretraining": 0.081, "causal encoder": 0.08, "from scratch": 0.06}


def scored(folder):
    """Adapted and really trained, in a folder of its own: what is kept elsewhere was trained with another method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "cache_dir", lambda: folder)
        patch.setattr(room, "HELD_OUT", 512)
        return [room.score("adapted", seed, TINY) for seed in room.SEEDS]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return scored(tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Cross-attention of the same shape and cost reads another prompt, in training too."""
    read = CrossSublayer.forward

    def elsewhere(self, x, states, mask, cache=None):
        return read(self, x, states.roll(1, 0), mask, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossSublayer, "forward", elsewhere)
        return scored(tmp_path_factory.mktemp("broken"))


def given(scores, adapted=None):
    """Scores in which the encoder-decoder was really trained, and the others' are given; that all were trained enough is granted."""
    arms = {arm: [{"likelihood": x, "deleted": x, "random": x}] * len(room.SEEDS) for arm, x in OTHERS.items()}
    arms |= {"adapted": adapted or scores, "large encoder": scores}
    return lambda names, setting: {name: [{**score, "nll": 1.5} for score in arms[name]] for name in names}


def test_experiments_load():
    assert {e.claim for e in experiments_of("encdec_gemma")} == {
        "encdec_gemma/instruction-tuned-gain",
        "encdec_gemma/9b-2b-gain",
        "encdec_gemma/9b-2b-latency",
    }


@pytest.mark.slow
def test_a_decoder_that_reads_another_prompt_is_noticed(monkeypatch, honest, broken):
    monkeypatch.setattr(room, "scores_of", given(honest))
    assert verdict_of("encdec_gemma/instruction-tuned-gain", TINY) in PAYS
    monkeypatch.setattr(room, "scores_of", given(broken))
    assert verdict_of("encdec_gemma/instruction-tuned-gain", TINY) not in PAYS


@pytest.mark.slow
def test_a_large_encoder_that_is_not_read_is_noticed(monkeypatch, honest, broken):
    """The small encoder's scores are given; those of the large one are of an encoder that was really read, or was not."""
    small = [{**score, "likelihood": 0.9 * score["likelihood"]} for score in honest]
    monkeypatch.setattr(room, "scores_of", given(honest, small))
    assert verdict_of("encdec_gemma/9b-2b-gain", TINY) in PAYS
    monkeypatch.setattr(room, "scores_of", given(broken, small))
    assert verdict_of("encdec_gemma/9b-2b-gain", TINY) not in PAYS


@pytest.mark.slow
def test_a_fast_answer_that_ignores_its_prompt_is_noticed(monkeypatch, honest, broken):
    """Times are granted: a thousand times slower is the baseline."""
    monkeypatch.setattr(room, "scores_of", given(honest))
    assert verdict_of("encdec_gemma/9b-2b-latency", TIMED) in PAYS
    monkeypatch.setattr(room, "scores_of", given(broken))
    assert verdict_of("encdec_gemma/9b-2b-latency", TIMED) not in PAYS


def test_an_arm_at_its_floor_voids_the_comparison(monkeypatch):
    score = {"likelihood": 0.4, "nll": 1.5, "deleted": 0.2, "random": 0.2}
    arms = {arm: [{**score, "likelihood": 0.4 if arm == "adapted" else 0.3}] * 3 for arm in room.ARMS}
    monkeypatch.setattr(room, "scores_of", lambda names, setting: {name: arms[name] for name in names})
    assert verdict_of("encdec_gemma/instruction-tuned-gain", room.SMOKE) in PAYS
    monkeypatch.setitem(arms, "more pretraining", [{**score, "nll": 2.6}] * 3)
    assert verdict_of("encdec_gemma/instruction-tuned-gain", room.SMOKE) is Verdict.UNDECIDED


def test_the_large_encoder_is_first_read_by_new_cross_attention_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    seen = []
    train = language.training.train

    def watched(model, *args, **how):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        losses = train(model, *args, **how)
        seen.append({name for name, value in model.named_parameters() if not torch.equal(value, before[name])})
        return losses

    monkeypatch.setattr(language.training, "train", watched)
    model = room.trained_arm("large encoder", 1e-3, 0, room.SMOKE)
    small, large, warm, prefixes, task = seen
    assert warm == set(room.cross_parameters(model))
    assert prefixes == task == {name for name, _ in model.named_parameters()}


# ---- what the task is


def test_an_answer_is_what_stood_in_the_hole():
    windows = byte_windows(room.LENGTH, 5)[0]
    prompts, answers = room.holes(windows, torch.Generator().manual_seed(0))
    assert prompts.shape == (5, room.PROMPT)
    for window, prompt, answer in zip(*(x.tolist() for x in (windows, prompts, answers)), strict=True):
        start = prompt.index(room.HOLE)
        assert prompt[:start] + answer + prompt[start + 1 :] == window
        assert room.ANSWER <= start < room.LENGTH - 2 * room.ANSWER
    assert not {room.HOLE, room.START} & set(windows.flatten().tolist())


def test_the_floor_is_a_table_of_what_an_answer_shows():
    answers = torch.tensor([[101, 116], [32, 32]])
    data = text_bytes("code", "prompts")
    shares = [(float((data == byte).sum()) + 1) / (len(data) + 256) for byte in (101, 32)]
    pairs = language.bigram_floor(answers[:, :-1], answers[:, 1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "ANSWER", 2)
        found = room.answer_floor(answers)
    assert abs(found - (pairs - sum(map(math.log, shares)) / 2) / 2) < 1e-9


def test_both_kinds_of_models_are_asked_the_same():
    """Each byte of the answer, behind the start and those before it: in one sequence with the prompt, or by the decoder."""
    model = language.small_llama(width=32, layers=2, heads=2).eval()
    prompts, answers = room.holes(byte_windows(room.LENGTH, 3)[0], torch.Generator().manual_seed(0))
    shown = torch.cat([torch.full((3, 1), room.START), answers[:, :-1]], 1)
    expected = model(torch.cat([prompts, shown], 1)).logits[:, room.PROMPT :]
    assert torch.equal(room.answer_logits(model, prompts, answers), expected)
    made = room.decoder_to_encdec(model, decoder_start_token_id=room.START)
    assert isinstance(made, EncDecForSeq2SeqLM)
    assert torch.equal(room.answer_logits(made, prompts, answers), made(input_ids=prompts, labels=answers).logits)
    assert torch.isclose(room.answer_loss(made, prompts, answers), made(input_ids=prompts, labels=answers).loss)


def test_equal_steps_are_equal_flops():
    steps = room.equal_steps(room.SMALL)
    small = language.small_llama(width=64, layers=2, heads=4)
    adapted = room.decoder_to_encdec(small, decoder_start_token_id=room.START)
    ours = room.SMALL["tune"] * room.flops(adapted, room.PROMPT, room.ANSWER, cached=False).total
    theirs = steps["tune"] * room.flops(small, room.PROMPT, room.ANSWER, cached=False).total
    assert abs(ours / theirs - 1) < 0.01
    assert 0.5 * room.SMALL["adapt"] < steps["adapt"] < 1.5 * room.SMALL["adapt"]


def test_decoding_behind_a_read_prompt_can_be_repeated():
    model = language.small_llama(width=32, layers=2, heads=2).eval()
    for found in (model, room.decoder_to_encdec(model, decoder_start_token_id=room.START).eval()):
        run, seen = room.decoding(found, torch.randint(2, 256, (1, 9)), 3), []
        found.register_forward_hook(lambda _module, _inputs, out, seen=seen: seen.append(out.logits))
        run()
        run()
        assert len(seen) == 6
        torch.testing.assert_close(seen[3:], seen[:3])  # the same steps behind the same prompt
        assert not torch.allclose(seen[0], seen[2])  # and each behind one token more
