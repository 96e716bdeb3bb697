"""The encoder-decoder's experiments notice when the decoder reads another prompt, or nothing; their tasks and budgets are what they say."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tests.properties.sabotage import record_of
from torch.utils.flop_counter import FlopCounterMode

from assay.evidence.types import Verdict
from assay.evidence.verdict import allowed_loss, judge, remarks
from assay.experiments import experiments_of, rates
from assay.experiments.inference import encdec_gemma as room
from assay.experiments.inference import language
from assay.experiments.inference.encdec_gemma import arms
from assay.methods.inference.encdec_gemma import cross_parameters, decoder_to_encdec
from assay.methods.inference.encdec_gemma.model import CrossSublayer, EncDecForSeq2SeqLM
from assay.workloads.sequences import byte_batches, byte_windows, text_bytes

GAIN, LARGE, LATENCY = (f"encdec_gemma/{name}" for name in ("instruction-tuned-gain", "9b-2b-gain", "9b-2b-latency"))
TIMED = {"prompt": 16, "answer": 2, **room.TIMED_SMOKE, "setting": arms.SMALL}
ALONE = [name for name in arms.LATENCY_ARMS if not arms.ARMS[name].encoder]


def test_experiments_load():
    assert {e.claim for e in experiments_of("encdec_gemma")} == {GAIN, LARGE, LATENCY}


# ---- with the method broken: every arm is really trained, at the size and with the steps of `small`


def trained(folder, names, *, broken=""):
    """Scores of arms, trained in a folder of the test's own; those of broken ones are kept apart."""
    stage = arms.stage

    def marked(name, key, *rest):
        return stage(name, {**key, "broken": broken} if broken and "arm" in key else key, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "cache_dir", lambda: folder)
        patch.setattr(arms, "stage", marked)
        return arms.scores_of(names, arms.SMALL)


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch):
    monkeypatch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def honest(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
        return trained(folder, tuple(arms.ARMS))


def elsewhere(read):
    return lambda self, x, states, mask, cache=None: read(self, x, states.roll(1, 0), mask, cache)


def nowhere(read):
    return lambda self, x, states, mask, cache=None: 0 * read(self, x, states, mask, cache)


BROKEN = {"another prompt": elsewhere, "cross-attention zeroed": nowhere}


@pytest.fixture(scope="module", params=list(BROKEN))
def broken(request, folder):
    """The arms that are judged, with cross-attention that reads another prompt, or adds nothing; in training too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
        patch.setattr(CrossSublayer, "forward", BROKEN[request.param](CrossSublayer.forward))
        return trained(folder, ("adapted", "large encoder"), broken=request.param)


def given(patch, folder, scores):
    patch.setattr(language, "cache_dir", lambda: folder)
    patch.setattr(room, "scores_of", lambda names, setting: {name: scores[name] for name in names})


@pytest.mark.slow
def test_a_large_encoder_that_is_not_read_is_refuted(monkeypatch, folder, honest, broken):
    """All other arms, the one it is compared with among them, are whole."""
    given(monkeypatch, folder, honest)
    before = record_of(LARGE, arms.SMALL)
    given(monkeypatch, folder, {**honest, "large encoder": broken["large encoder"]})
    after = record_of(LARGE, arms.SMALL)
    assert judge(after).verdict is Verdict.REFUTED
    assert judge(before).verdict is not Verdict.REFUTED
    assert after.measured.high < before.measured.low


@pytest.mark.slow
def test_what_adapting_gains_is_not_reading_its_prompt(monkeypatch, folder, honest, broken):
    """At this size the claim cannot hold: adapting trains longer, and gains something even where the prompt is not read. The record says so
    (without adapting it does better, and so does the method deleted), and on every seed reading is worth something."""
    given(monkeypatch, folder, honest)
    before = record_of(GAIN, arms.SMALL)
    given(monkeypatch, folder, {**honest, "adapted": broken["adapted"]})
    after = record_of(GAIN, arms.SMALL)
    assert judge(before).verdict is Verdict.DOES_NOT_PAY
    assert judge(after).verdict in (Verdict.DOES_NOT_PAY, Verdict.REFUTED)
    assert "the method deleted does" in " ".join(remarks(before))
    assert all(
        ours > theirs for ours, theirs in zip(*(arms.of(found, "adapted") for found in (honest, broken)), strict=True)
    )


@pytest.mark.slow
def test_a_fast_answer_that_ignores_its_prompt_is_noticed(monkeypatch, folder, honest, broken):
    """Times are granted: a thousand times slower is the baseline. Even so a model without an encoder is better by more than the margin, and
    the record says of answers that ignore their prompts that they are as likely behind another."""
    given(monkeypatch, folder, honest)
    before = record_of(LATENCY, TIMED)
    given(monkeypatch, folder, {**honest, "large encoder": broken["large encoder"]})
    after = record_of(LATENCY, TIMED)
    assert before.quality.baseline == max(arms.mean(arms.of(honest, name)) for name in ALONE)
    assert judge(before).verdict is Verdict.DOES_NOT_PAY
    assert judge(after).verdict is Verdict.DOES_NOT_PAY
    assert all(
        ours > theirs
        for ours, theirs in zip(*(arms.of(found, "large encoder") for found in (honest, broken)), strict=True)
    )
    for record, read in ((before, True), (after, False)):
        quality, margin = record.quality, allowed_loss(record.quality)
        assert (quality.candidate - quality.controls["another prompt"] > margin) == read
        assert quality.baseline - quality.candidate > margin


def test_the_latencys_quality_is_over_the_best_model_without_an_encoder(monkeypatch):
    asked = []
    likelihoods = {name: 0.1 + 0.001 * place for place, name in enumerate(arms.LATENCY_ARMS)}

    def scores_of(names, setting):
        asked.append(names)
        return {
            name: [
                {
                    "likelihood": likelihoods[name] * (1 + 0.01 * seed),
                    "nll": -math.log(likelihoods[name]),
                    "another prompt": 0.06,
                    "nothing read": 0.05,
                }
                for seed in arms.SEEDS
            ]
            for name in names
        }

    monkeypatch.setattr(room, "scores_of", scores_of)
    monkeypatch.setattr(arms, "HELD_OUT", 64)
    trial = room.latency(**{**TIMED, "setting": arms.SMOKE})
    assert set(trial.trained()) == set(arms.LATENCY_ARMS) - set(arms.NEW)  # whether the quality was asked for or not
    quality = trial.quality()
    assert asked == [arms.LATENCY_ARMS]
    assert quality.baseline == pytest.approx(1.01 * max(likelihoods[name] for name in ALONE))
    for control, arm in (
        ("deleted", "large causal encoder"),
        ("random", "large encoder of new weights"),
        ("rival", "prefix LM, longer"),
        ("tuned longest", "tuned longest"),
    ):
        assert quality.controls[control] == pytest.approx(1.01 * likelihoods[arm])
    assert (quality.controls["another prompt"], quality.controls["nothing read"]) == pytest.approx((0.06, 0.05))


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize("other", [0.06, 0.2])
def test_only_its_time_refutes_a_latency(monkeypatch, spread, other):
    """Neither seeds that differ, nor a model that was trained so badly that it does not read, speak against the paper."""
    scores = {
        name: [
            {
                "likelihood": 0.11 + spread * (seed - 1),
                "nll": -math.log(0.11),
                "another prompt": other,
                "nothing read": other,
            }
            for seed in arms.SEEDS
        ]
        for name in arms.LATENCY_ARMS
    }
    monkeypatch.setattr(room, "scores_of", lambda names, setting: scores)
    monkeypatch.setattr(room, "tuned", lambda name, seed, setting: language.small_llama(width=32, layers=1).eval())
    monkeypatch.setattr(room, "speedup", lambda baseline, candidate: {})
    monkeypatch.setattr(arms, "HELD_OUT", 64)
    record = record_of(LATENCY, {**TIMED, "setting": arms.SMOKE})
    assert judge(record).verdict is not Verdict.REFUTED


@pytest.mark.slow
def test_arms_that_were_hardly_trained_void_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(arms, "HELD_OUT", 512)
    found = judge(record_of(GAIN, arms.SMOKE))
    assert found.verdict is Verdict.UNDECIDED
    assert "hardly beats a bigram table of answers" in found.reason


def test_a_score_tells_what_reading_is_worth(monkeypatch, tmp_path):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(arms, "HELD_OUT", 64)
    found = arms.score("adapted", 0, arms.SMOKE)
    assert len({found[name] for name in ("likelihood", "another prompt", "nothing read")}) == 3
    model = arms.tuned("adapted", 0, arms.SMOKE)
    prompts, answers = arms.holes(language.heldout(arms.LENGTH, 64)[0], torch.Generator().manual_seed(0))
    assert arms.answered("adapted", model, prompts, answers)["likelihood"] == found["likelihood"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossSublayer, "forward", nowhere(CrossSublayer.forward))
        for asked in (prompts, prompts.roll(1, 0)):
            assert math.isclose(
                arms.answered("adapted", model, asked, answers)["likelihood"], found["nothing read"], rel_tol=1e-6
            )


# ---- the arms and their budgets


@pytest.mark.parametrize(("name", "pretrained"), [("large encoder", 2), ("large encoder of new weights", 1)])
def test_the_large_encoder_is_first_read_by_new_cross_attention_alone(monkeypatch, tmp_path, name, pretrained):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    setting = {**arms.SMOKE, "adapt": 16}
    seen = []
    train = language.training.train

    def watched(model, *args, **how):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        losses = train(model, *args, **how)
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        seen.append((changed, len(losses)))
        return losses

    monkeypatch.setattr(language.training, "train", watched)
    model = arms.tuned(name, 0, setting)
    everything = {name for name, _ in model.named_parameters()}
    *sources, warm, prefixes, task = seen
    assert len(sources) == pretrained
    assert warm == (set(cross_parameters(model)), 2)
    assert prefixes == (everything, 14)  # the warm-up's steps are taken off
    assert task == (everything, setting["tune"])


def test_each_stage_of_each_seed_draws_its_windows_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    seen = []

    def watched(length, batch, *, seed):
        first = True
        for windows, targets in byte_batches(length, batch, seed=seed):
            if first:
                seen.append((seed, windows.clone()))
            first = False
            yield windows, targets

    monkeypatch.setattr(arms, "byte_batches", watched)
    for seed in (0, 1):
        arms.tuned("random cross-attention", seed, arms.SMOKE)  # all four stages
        arms.tuned("pretrained further", seed, arms.SMOKE)  # two, whose windows arms share
    assert [seed for seed, _ in seen] == [0, 1, 2, 3, 2, 3, 10, 11, 12, 13, 12, 13]
    for (one, windows), (other, more) in itertools.combinations(seen, 2):
        assert torch.equal(windows, more) == (one == other)
    assert len({arms.data_seed(stage, seed) for stage in arms.STAGES for seed in (*arms.SEEDS, arms.CHOICE_SEED)}) == 16


def test_each_seed_pretrains_a_model_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    first, second = (arms.begun(arms.ARMS["decoder-only"], seed, arms.SMOKE) for seed in (0, 1))
    assert all(
        not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True) if a.ndim > 1
    )


def test_arms_start_from_the_weights_they_are_said_to(monkeypatch, tmp_path):
    monkeypatch.setattr(language, "cache_dir", lambda: tmp_path)
    small = arms.source("small", 0, arms.SMOKE).state_dict()
    large = arms.source("large", 0, arms.SMOKE).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    inner = name.replace("model.", "body.")
    for arm, encoder, decoder in (
        ("adapted", small, small),
        ("causal encoder", small, small),
        ("random cross-attention", small, small),
        ("large encoder", large, small),
        ("from scratch", None, None),
        ("large encoder of new weights", None, small),
    ):
        made = arms.begun(arms.ARMS[arm], 0, arms.SMOKE)
        assert isinstance(made, EncDecForSeq2SeqLM)
        found = [made.encoder.state_dict()[inner], made.decoder.state_dict()[inner]]
        for weight, expected in zip(found, (encoder, decoder), strict=True):
            known = [s[name] for s in (small, large) if s[name].shape == weight.shape]
            assert torch.equal(weight, expected[name]) if expected else not any(torch.equal(weight, k) for k in known)
        cross = made.decoder.cross[0].cross_attn.q_proj.weight
        assert torch.equal(cross, found[1]) == (arms.ARMS[arm].cross == "self")
        assert made.config.encoder_attention == arms.ARMS[arm].reads


def test_equal_steps_are_equal_flops():
    setting = arms.SMALL

    def spent(name, stages=("adapt", "tune")):
        steps, flops = arms.steps_of(name, setting), arms.step_flops(name, setting)
        return sum(steps[stage] * flops[stage] for stage in stages)

    for name, arm in arms.ARMS.items():
        if arm.encoder and arm.trained_on == "prefixes":
            assert arms.steps_of(name, setting) == {stage: setting[stage] for stage in ("adapt", "tune")}
        elif arm.trained_on:
            assert abs(spent(name) / spent(arm.budget) - 1) < 0.01
        else:
            assert abs(spent(name) / spent("adapted", ("tune",)) - 1) < 0.01
    assert spent("prefix LM, longer") > 2 * spent("prefix LM")
    assert arms.steps_of("tuned longer", setting)["adapt"] == 0


def test_flops_of_a_step_are_those_counted(monkeypatch):
    make = language.small_llama
    monkeypatch.setattr(language, "small_llama", lambda **how: make(**how, attn_implementation="eager"))
    monkeypatch.setattr(arms, "_step_flops", arms._step_flops.__wrapped__)
    monkeypatch.setattr(arms, "CUTS", range(8, 12))
    window = byte_windows(arms.LENGTH, 1)[0]
    prompts, answers = arms.holes(window, torch.Generator().manual_seed(0))

    def counted(run):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    for name in ("pretrained further", "prefix LM", "adapted", "large encoder"):
        arm, found = arms.ARMS[name], arms.step_flops(name, arms.SMOKE)
        fresh = [arms.fresh(size, arms.SMOKE, 0) for size in ("small", "large")]
        model = arms.made(arm, *fresh)
        how = {"both_ways": name == "prefix LM"}
        assert found["tune"] == counted(lambda m=model, how=how: arms.answer_logits(m, prompts, answers, **how))
        if arm.trained_on == "text":
            assert found["adapt"] == counted(lambda m=model: m(window))
        else:
            each = [
                counted(lambda m=model, c=c, how=how: arms.answer_logits(m, window[:, :c], window[:, c:], **how))
                for c in arms.CUTS
            ]
            assert math.isclose(found["adapt"], sum(each) / len(each))


def test_one_text_is_cut_several_times():
    once, more = arms.prefixes(5), arms.prefixes(5, 4)
    texts = [[torch.cat(next(batches), 1) for _ in range(8)] for batches in (once, more)]
    assert len({tuple(text.flatten().tolist()) for text in texts[0]}) == 8
    assert [torch.equal(text, texts[0][index // 4]) for index, text in enumerate(texts[1])] == [True] * 8
    cuts = {next(more)[0].shape[1] for _ in range(200)}
    assert cuts == set(arms.CUTS)


# ---- what the searches found


def found_losses(search):
    found = json.loads(rates.FILE.read_text(encoding="utf-8"))[search]["arms"]
    return {arm: {float(rate): loss for rate, loss in one["losses"].items()} for arm, one in found.items()}


@pytest.mark.parametrize("search", [name for name in rates._SEARCHES if name.startswith("encdec_gemma/")])
def test_rates_were_searched_within_their_grids(search):
    for arm, losses in found_losses(search).items():
        rate = rates.chosen(search, arm).rate
        assert rate == min(losses, key=losses.get), arm
        assert min(losses) < rate < max(losses), arm


def test_the_searches_found_what_the_claims_say_of_them():
    best = {
        arm: min(losses.values())
        for search in {arms.search_of("answers", name) for name in arms.ARMS}
        for arm, losses in found_losses(search).items()
    }
    assert best["adapted"] < min(best["decoder-only"], best["from scratch"]) - 0.02  # the guard's margin
    for ahead in ("causal encoder", "tuned longer", "tuned without adapting"):
        assert best[ahead] < best["adapted"]
    assert best["large encoder"] < best["adapted"]
    for ahead in ("large causal encoder", "prefix LM, longer", "tuned longest"):
        assert best[ahead] < best["large encoder"]
    assert abs(best["large encoder of new weights"] - best["large encoder"]) < 0.005
    assert best["large encoder"] < best["decoder-only"] - 0.02
    assert 0.06 < best["large encoder"] - best["tuned longest"] < 0.08  # 7 % more likely


# ---- what the task is


def test_an_answer_is_what_stood_in_the_hole():
    windows = byte_windows(arms.LENGTH, 50)[0]
    prompts, answers = arms.holes(windows, torch.Generator().manual_seed(0))
    assert prompts.shape == (50, arms.PROMPT)
    starts = set()
    for window, prompt, answer in zip(*(x.tolist() for x in (windows, prompts, answers)), strict=True):
        start = prompt.index(arms.HOLE)
        assert prompt[:start] + answer + prompt[start + 1 :] == window
        starts.add(start)
    assert {min(starts), max(starts)} == {arms.ANSWER, arms.LENGTH - 2 * arms.ANSWER}
    assert not {arms.HOLE, arms.START} & set(windows.flatten().tolist())


def test_the_floor_is_a_table_of_what_an_answer_shows():
    answers = torch.tensor([[101, 116], [32, 32]])
    data = text_bytes("code", "prompts")
    shares = [(float((data == byte).sum()) + 1) / (len(data) + 256) for byte in (101, 32)]
    pairs = language.bigram_floor(answers[:, :-1], answers[:, 1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "ANSWER", 2)
        found = arms.answer_floor(answers)
    assert abs(found - (pairs - sum(map(math.log, shares)) / 2) / 2) < 1e-9


def test_both_kinds_of_models_are_asked_the_same():
    """Each byte of the answer, behind the start and those before it: in one sequence with the prompt, or by the decoder."""
    model = language.small_llama(width=32, layers=2, heads=2).eval()
    prompts, answers = arms.holes(byte_windows(arms.LENGTH, 3)[0], torch.Generator().manual_seed(0))
    shown = torch.cat([torch.full((3, 1), arms.START), answers[:, :-1]], 1)
    expected = model(torch.cat([prompts, shown], 1)).logits[:, arms.PROMPT :]
    assert torch.allclose(arms.answer_logits(model, prompts, answers), expected, atol=1e-5)
    made = decoder_to_encdec(model, decoder_start_token_id=arms.START)
    assert isinstance(made, EncDecForSeq2SeqLM)
    assert torch.equal(arms.answer_logits(made, prompts, answers), made(input_ids=prompts, labels=answers).logits)
    assert torch.isclose(arms.answer_loss(made, prompts, answers), made(input_ids=prompts, labels=answers).loss)


def test_a_prefix_lm_reads_prompts_both_ways_and_answers_from_left_to_right():
    model = language.small_llama(width=32, layers=1, heads=2).eval()
    prompts, answers = arms.holes(byte_windows(arms.LENGTH, 2)[0], torch.Generator().manual_seed(0))
    states = []
    model.model.layers[0].register_forward_hook(lambda _module, _inputs, out: states.append(out))

    def run(prompts, answers, both_ways):
        states.clear()
        arms.answer_logits(model, prompts, answers, both_ways=both_ways)
        return states[0]

    last, late = prompts.clone(), answers.clone()
    last[:, -1] += 1
    late[:, -2] += 1  # the last byte of an answer is not shown
    for both_ways in (False, True):
        before, moved = run(prompts, answers, both_ways), run(last, answers, both_ways)
        assert torch.allclose(before[:, 0], moved[:, 0]) != both_ways
        same = torch.isclose(before, run(prompts, late, both_ways)).all(-1)
        assert same[:, :-1].all()
        assert not same[:, -1].any()


# ---- what is timed


def test_a_request_is_what_generate_answers():
    model = language.small_llama(width=32, layers=2, heads=2).eval()
    ids = torch.randint(2, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, 9:]
    assert torch.equal(room.request(model, ids, 5)(), expected)
    made = decoder_to_encdec(model, decoder_start_token_id=arms.START)
    assert torch.equal(room.request(made, ids, 5)(), made.generate(input_ids=ids, **how)[:, 1:])
    assert torch.equal(room.compiled_request(model, ids, 5)(), expected)


def test_decoding_behind_a_read_prompt_can_be_repeated():
    model = language.small_llama(width=32, layers=2, heads=2).eval()
    for found in (model, decoder_to_encdec(model, decoder_start_token_id=arms.START).eval()):
        run, seen = room.decoding(found, torch.randint(2, 256, (1, 9)), 3), []
        found.register_forward_hook(lambda _module, _inputs, out, seen=seen: seen.append(out.logits))
        run()
        run()
        assert len(seen) == 6
        torch.testing.assert_close(seen[3:], seen[:3])  # the same steps behind the same prompt
        assert not torch.allclose(seen[0], seen[2])  # and each behind one token more
