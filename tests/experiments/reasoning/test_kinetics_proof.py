"""What the experiments of Kinetics say if choosing blocks is broken, keys cost nothing, or the law knows nothing of
them.

The decoder is a small random one with sharp attention, and the documents are its own: what it reads decides what it
says next. The real model is tried in a slow test.
"""

from __future__ import annotations

import random

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import calibration, tiny_model, token_ids

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import kinetics as room
from assay.methods.reasoning.kinetics import BlockCache, Cost, Shape, cost, selection, use_block_topk

SPARSE, CHOICE = "kinetics/sparse-cost", "kinetics/flops-only-cost"
POINT = {"tokens": 320, "batch": 2, "budget": 208, "block": 1, "new": 2, "documents": 8, "follows": 32}
SMOLLM2 = Shape(parameters=134.5e6, layers=30, heads=9, key_heads=3, head_dim=64)
SPEND = {"contexts": [32, 3072], "trials": [1, 2, 3, 4, 6, 8, 12, 16], "documents": 24, "rounds": 1, "grid": [[64, 1]]}


# ---------------------------------------------------------------------------------------------------- declarations


def test_what_is_declared():
    found = {each.claim: each for each in experiments_of("kinetics")}
    assert set(found) == {SPARSE, CHOICE}
    assert found[SPARSE].operator.exact
    for scale in ("small", "full"):
        point = found[SPARSE].decides[scale]
        assert point["tokens"] / point["budget"] == 16  # as the paper's benchmark
        assert point["block"] == 16
        assert set(found[CHOICE].departures) == {"models", "task"}


# ------------------------------------------------------------------------------------------------- sparse decoding


def sharp():
    """A tiny decoder whose attention looks at few keys."""
    model = tiny_model(initializer_range=0.15)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(3)
    return model


def own_documents(model, rows, tokens):
    torch.manual_seed(1)
    return model.generate(token_ids(rows, 2), max_new_tokens=tokens - 2, min_new_tokens=tokens - 2, do_sample=True,
                          temperature=1.0, top_k=0, pad_token_id=0)  # fmt: skip


@pytest.fixture(scope="module")
def documents():
    return own_documents(sharp(), POINT["documents"], POINT["tokens"])


@pytest.fixture
def decoder(monkeypatch, documents):
    stock, model = sharp(), use_block_topk(sharp(), room.DENSE)
    monkeypatch.setattr(room, "model_and_tokenizer", lambda: (model, None))
    monkeypatch.setattr(room, "stock_model", lambda: stock)
    monkeypatch.setattr(room, "text_cache", lambda tokens: room.prefilled(token_ids(1, tokens)))
    monkeypatch.setattr(room, "long_prompt", lambda tokenizer, tokens: token_ids(1, tokens))
    monkeypatch.setattr(room, "heldout_windows", lambda tokenizer, window, n: documents[:n, :window])
    return model


@pytest.fixture
def no_loop(monkeypatch):
    monkeypatch.setattr(room, "compiled", lambda *_: lambda: None)


def test_all_ways_decode_the_same_where_nothing_is_left_out(decoder):
    trial = room.sparse_cost(**{**POINT, "budget": 1280})
    expected = trial.baseline()
    for run in (trial.candidate, trial.free, trial.baseline, *trial.arms.values()):
        for _ in range(2):  # every run begins where the last one began
            assert torch.equal(run(), expected)
    loop = trial.exact()
    assert torch.equal(loop[:, -1:], expected)
    assert torch.equal(trial.exact(), loop)


def test_the_timed_caches_hold_the_text_over_and_over(decoder):
    source = room.text_cache(50)
    cache = room.filled(BlockCache(decoder.config, block=4), source, 3, 130)
    for layer, one in zip(cache.layers, source.layers, strict=True):
        assert layer.keys.shape == (3, 2, 130, 16)
        assert torch.equal(layer.keys[2, :, 100:], one.keys[0, :, :30])
        assert torch.equal(layer.values[1, :, 50:100], one.values[0])


def test_block_top_k_keeps_the_quality_and_its_controls_do_not(decoder, no_loop):
    record = record_of(SPARSE, POINT)
    assert judge(record).verdict in PAYS
    base, margin = record.quality.baseline, 0.03 * record.quality.baseline
    assert abs(record.quality.candidate - base) < margin < min(record.quality.controls.values()) - base
    assert record.details["same likeliest token"]["dense"] == 1.0


def test_what_is_read_is_counted(decoder, no_loop):
    details = room.sparse_cost(**{**POINT, "budget": 64, "block": 8, "documents": 2, "follows": 3}).details()
    read, law = details["bytes attention reads in a step"], details["bytes by the cost model"]
    # rows, keys and values, layers, heads, dim, tokens and the half of one that the integral has more, bytes
    assert law["dense"] == 2 * 2 * 2 * 2 * 16 * 320.5 * 4 < read["dense"]
    assert 0.6 < law["block top-k"] / law["dense"] < 0.65  # one of two layers stays dense
    assert read["block top-k"] < 0.75 * read["dense"]


def test_a_random_choice_changes_the_verdict(decoder, no_loop, monkeypatch):
    choose = selection.choose
    monkeypatch.setattr(selection, "choose", lambda scores, *rest: choose(torch.rand_like(scores), *rest))
    assert verdict_of(SPARSE, POINT) not in PAYS


def test_the_worst_choice_changes_the_verdict(decoder, no_loop, monkeypatch):
    monkeypatch.setattr(selection, "block_scores", lambda q, sums: -BLOCK_SCORES(q, sums))
    assert verdict_of(SPARSE, POINT) not in PAYS


BLOCK_SCORES = selection.block_scores


def test_a_metric_that_needs_no_far_key_shows_nothing(decoder, no_loop, monkeypatch):
    """Documents that repeat one token: sinks and the newest tokens say as much, and the record must not count."""
    monkeypatch.setattr(room, "heldout_windows", lambda tokenizer, window, n: torch.full((n, window), 7))
    assert verdict_of(SPARSE, POINT) not in PAYS


@pytest.mark.slow
@pytest.mark.usefixtures("no_loop")
def test_the_real_model_with_a_random_choice(monkeypatch):
    point = {**POINT, "tokens": 1024, "budget": 128, "block": 16, "documents": 3, "follows": 24}
    honest = record_of(SPARSE, point).quality
    choose = selection.choose
    monkeypatch.setattr(selection, "choose", lambda scores, *rest: choose(torch.rand_like(scores), *rest))
    broken = record_of(SPARSE, point).quality
    assert broken.baseline == pytest.approx(honest.baseline)
    assert honest.candidate < broken.candidate


# ------------------------------------------------------------------------------------------------- choosing by a law


def pretend(part, context, longest, documents):
    """In a long context trials are likelier to be right."""
    chance = random.Random(f"{part} {documents}")
    easy = [chance.uniform(0.02, 0.2) for _ in range(documents)]
    return room.Asked(context, tuple((min(1.0, one * (2.1 if context == longest else 1)),) for one in easy))


def by_both(tokens, trials, *, together, rounds):
    """Seconds of a machine on which a byte takes as long as 25 operations."""
    found = cost(SMOLLM2, room.Work(tokens, 1, trials), element_bytes=4, shared_prompt=together)
    return [found.eflops(25) * 1e-11] * rounds


def by_flops(tokens, trials, *, together, rounds):
    return [cost(SMOLLM2, room.Work(tokens, 1, trials)).flops * 1e-11] * rounds


@pytest.fixture
def choice(monkeypatch):
    monkeypatch.setattr(room, "asked", pretend)
    monkeypatch.setattr(room, "step_seconds", by_both)
    monkeypatch.setattr(room, "stock_model", lambda: None)
    monkeypatch.setattr(room, "shape_of", lambda model: SMOLLM2)
    monkeypatch.setattr(room, "calibrate", lambda **_: calibration(peak_flops={"float32": 1e12}))
    monkeypatch.setattr(room, "law_against_time", lambda grid, rounds: {})


@pytest.mark.usefixtures("choice")
def test_flops_alone_choose_what_is_dear_where_keys_are():
    record = record_of(CHOICE, SPEND)
    assert judge(record).verdict in PAYS
    assert 1.1 < record.measured.low < record.measured.high  # over documents: the times are steady
    seconds, extra = record.details["seconds, prompt read once"], record.details["extra cost by coverage"]
    chosen = record.details["chosen for each coverage"]
    for ratio, theirs, ours in zip(extra.values(), chosen["FLOPs"], chosen["equivalent FLOPs"], strict=True):
        assert ratio == pytest.approx(seconds[theirs] / seconds[ours])
        assert theirs == ours or (theirs.startswith("3072 tokens") and ours.startswith("32 tokens"))
    assert min(extra.values()) <= record.measured.median <= max(extra.values())


@pytest.mark.usefixtures("choice")
def test_where_only_operations_take_time_the_claim_is_refuted(monkeypatch):
    monkeypatch.setattr(room, "step_seconds", by_flops)
    record = record_of(CHOICE, SPEND)
    assert judge(record).verdict in (Verdict.REFUTED, Verdict.DOES_NOT_PAY)
    assert record.measured.low <= 1


def test_what_would_refute_the_choice_is_what_is_said():
    refutes = next(each for each in experiments_of("kinetics") if each.claim == CHOICE).refutes
    for high, beside, expected in ((1.2, 1.5, False), (0.9, 1.5, True), (1.2, 1.0, True)):
        assert refutes({"measured": {"high": high}, "arms": {room.ANY: beside}}) is expected


@pytest.mark.usefixtures("choice")
def test_a_law_without_keys_gains_nothing(monkeypatch):
    def without_keys(*args, **options):
        found = cost(*args, **options)
        return Cost(found.linear, found.attention)

    monkeypatch.setattr(room, "cost", without_keys)
    record = record_of(CHOICE, SPEND)
    assert record.measured.median == 1
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


@pytest.mark.usefixtures("choice")
def test_a_law_by_chance_does_not_do(monkeypatch):
    """Prices drawn at random, twelve times: at most few of them come near what the law gains."""
    learn = {context: pretend("learn", context, 3072, 24) for context in SPEND["contexts"]}
    laws = room.prices(learn, SPEND["trials"], 25)
    options, seconds = (
        room.options_of(learn, SPEND["trials"]),
        room.medians(room.paid(learn, SPEND["trials"], together=True, rounds=1)),
    )
    gained = room.typical(room.extra(options, laws, seconds))
    drawn = []
    for seed in range(12):
        chance = random.Random(seed)
        at_random = {**laws, "equivalent FLOPs": {name: chance.random() for name in laws["FLOPs"]}}
        drawn.append(room.typical(room.extra(options, at_random, seconds)))
    assert max(drawn) < gained
    monkeypatch.setattr(room, "prices", lambda *_: {**laws, "equivalent FLOPs": reversed_of(laws["FLOPs"])})
    assert verdict_of(CHOICE, SPEND) not in PAYS


def reversed_of(prices):
    return {name: 1 / price for name, price in prices.items()}


@pytest.mark.usefixtures("choice")
def test_a_law_whose_choice_covers_less_of_unseen_documents_does_not_pay(monkeypatch):
    """The equivalent FLOPs choose short contexts, which do half as well on other documents: cheaper, but not for the same."""

    def half_as_well(part, context, longest, documents):
        found = pretend(part, context, longest, documents)
        if part == "learn" or context == longest:
            return found
        return room.Asked(found.prompt, tuple((0.35 * own[0],) for own in found.chances))

    honest = record_of(CHOICE, SPEND)
    monkeypatch.setattr(room, "asked", half_as_well)
    record = record_of(CHOICE, SPEND)
    assert record.measured == honest.measured
    assert honest.quality.candidate > 0.75 * honest.quality.baseline
    assert record.quality.high < 0.75 * record.quality.baseline
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


@pytest.mark.usefixtures("choice")
def test_times_that_waver_widen_the_interval(monkeypatch):
    """Documents that are all alike leave the times alone to be uncertain."""
    monkeypatch.setattr(room, "asked", alike)
    point = SPEND | {"rounds": 5, "documents": 2}
    steady = record_of(CHOICE, point).measured
    chance = random.Random(0)
    monkeypatch.setattr(room, "step_seconds", lambda *a, **k: [s * chance.uniform(0.8, 1.2) for s in by_both(*a, **k)])
    found = record_of(CHOICE, point).measured
    assert steady.low == steady.high
    assert found.low < found.median < found.high


def alike(part, context, longest, documents):
    return room.Asked(context, ((0.2 if context == longest else 0.1,),) * documents)


@pytest.mark.usefixtures("decoder")
def test_both_laws_are_held_against_measured_times():
    found = room.law_against_time([(32, 1), (32, 4), (200, 1), (200, 4)], 1)
    assert len(found["seconds"]) == 4
    for law in ("FLOPs", "equivalent FLOPs"):
        assert found[law]["median error when left out"] >= 0
    assert found["equivalent FLOPs"]["intensity that the times show"] > 0


def test_the_chance_of_a_continuation_is_that_of_its_tokens(decoder, documents, monkeypatch):
    monkeypatch.setattr(room, "calibration_windows", lambda tokenizer, window, n: documents[-n:, :window])
    for part, used in (("learn", documents[-2:]), ("judged", documents[:2])):
        short, long = (room.asked(part, context, 100, 2) for context in (20, 100))
        for found, context in ((short, 20), (long, 100)):
            for own, document in zip(found.chances, used, strict=True):
                for item in range(8):
                    stop = 100 + 4 * item
                    ids = document[100 - context : stop + 4]
                    with torch.no_grad():
                        shares = (room.stock_model()(ids[None]).logits[0, -5:-1].double() / 0.8).softmax(-1)
                    expected = float(shares.gather(1, ids[-4:, None]).prod())
                    assert own[item] == pytest.approx(expected, rel=1e-3)
        assert (short.prompt, long.prompt) == (34, 114)
    options = room.options_of({100: long}, [3])
    assert options[0].name == "100 tokens, 3 trials"
    expected = sum(1 - (1 - chance) ** 3 for chance in long.chances[0]) / 8
    assert options[0].coverage[0] == pytest.approx(expected)
