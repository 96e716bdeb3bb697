"""The experiments of KV Prediction: what is judged, that rivals cost no more, and that a broken predictor is noticed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge, remarks
from assay.experiments import experiments_of, rates
from assay.experiments.inference import kv_prediction as room
from assay.experiments.inference.kv_prediction import arms, far
from assay.experiments.rates import Rate
from assay.methods.inference.kv_prediction import prompt_cost

CLAIMS = {"lp": "kv_prediction/ttft-lp050", "c": "kv_prediction/ttft-c270"}
MARGINS = {found.claim: found.guard.margin for found in experiments_of("kv_prediction")}


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """Three seeds in this process, rates as if searched, weights kept nowhere else."""
    monkeypatch.setattr(arms, "chosen", lambda name, arm: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    monkeypatch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(arms, "SEEDS", (0, 1, 2))
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))


def point(task):
    return {"model": room.WORDS, "batch": 2, "tokens": 16, "task": task}


def test_experiments_load():
    assert set(MARGINS) == set(CLAIMS.values())


# ----------------------------------------------------------------------------------------------------------- what is judged


def test_the_beginning_comes_again_and_then_the_code_goes_on():
    task = {**room.TASK, "apart": 6, "again": 4, "cue": 1, "fresh": 3}
    found, ids = far.windows("heldout", task, 3), far.ids_of("heldout")
    assert (found.prompts.shape, found.texts.shape, found.copied) == ((3, 7), (3, 6), 3)
    for row, text in zip(found.prompts, found.texts, strict=True):
        whole = torch.cat([row, text])
        assert whole[6:10].tolist() == whole[:4].tolist()
        code = torch.cat([whole[:6], whole[10:]])
        assert (ids.unfold(0, 9, 1) == code).all(1).any()
    inputs, targets = next(far.batches(task, 0))
    assert inputs.shape == (task["batch"], 12)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[:, 6:10], inputs[:, :4])
    with pytest.raises(ValueError, match="n must be at most"):
        far.windows("heldout", task, 10**6)


def test_text_that_is_judged_was_not_trained_on():
    parts = [{tuple(row) for row in far.ids_of(part).unfold(0, 40, 40).tolist()} for part in ("prompts", "heldout")]
    assert len(parts[0] & parts[1]) < 0.01 * len(parts[1])


def test_each_seed_is_judged_by_windows_of_its_own():
    rows = [arms.judged_by(seed, room.TASK) for seed in arms.SEEDS]
    assert {len(found) for found in rows} == {room.TASK["windows"]}
    seen = torch.cat([torch.cat([found.prompts, found.texts], 1) for found in rows])
    assert len(seen.unique(dim=0)) == len(seen)


@torch.no_grad()
def test_judged_words_cost_what_the_model_itself_says():
    base, judged = arms.large(room.SMOKE, 0).eval(), far.windows("heldout", room.SMOKE, 5)
    ids, tokens = torch.cat([judged.prompts, judged.texts], 1), judged.prompts.shape[1]
    kept = [2, 5, 7, tokens - 1]
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for shown, hidden in (
        (None, []),
        (torch.tensor([kept]).expand(5, -1), [p for p in range(tokens) if p not in kept]),
    ):
        mask = seen.clone()
        mask[:, hidden] = False
        mask |= torch.eye(len(mask), dtype=torch.bool)
        logits = base(input_ids=ids, attention_mask=mask.expand(5, 1, -1, -1), use_cache=False).logits
        expected = F.cross_entropy(logits[:, tokens - 1 : -1].transpose(1, 2), judged.texts, reduction="none").mean(0)
        torch.testing.assert_close(arms.after(base, judged, shown, batch=2).float(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_attended_to_least_are_hidden_from_later_layers(monkeypatch):
    base, judged = arms.large(room.SMOKE, 0).eval(), far.windows("heldout", room.SMOKE, 5)
    tokens, whole = judged.prompts.shape[1], arms.after(base, judged)
    torch.testing.assert_close(arms.lazily(base, judged, tokens, 1, batch=2), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(arms.lazily(base, judged, 3, 4, batch=2), whole, rtol=1e-4, atol=1e-4)
    seen = arms._attended(base, judged.prompts, 0)
    torch.testing.assert_close(seen.sum(1), torch.ones(5), rtol=1e-4, atol=1e-4)
    assert base.config._attn_implementation == "sdpa"
    top = torch.cat([seen[:, :-1].topk(4).indices.sort().values, torch.full((5, 1), tokens - 1)], 1)
    monkeypatch.setattr(arms, "_attended", lambda base, prompts, layer: seen.clone())
    expected = arms.after(base, judged, top)
    torch.testing.assert_close(arms.lazily(base, judged, 5, 0), expected, rtol=1e-4, atol=1e-4)
    assert (expected - whole).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("kind", arms.KINDS)
def test_pruned_prompts_cost_no_more_than_a_prediction(kind):
    predictor, _ = room.timed(kind, room.WORDS)
    whole = prompt_cost(predictor, 64)
    n = arms.affordable(predictor, 64)
    budget = whole.auxiliary + whole.predictor + whole.step
    assert prompt_cost(predictor, n).base <= budget < prompt_cost(predictor, n + 1).base
    few, head = arms.lazily_affordable(predictor, 64, 1), far.VOCABULARY * predictor.config.hidden_size

    def cost(m):
        return (whole.base - head) / 4 + (prompt_cost(predictor, m).base - head) * 3 / 4 + head

    assert budget < cost(few + 1)
    assert few == 1 or cost(few) <= budget  # 1: the first layer's reading alone costs about as much


def test_the_auxiliaries_of_both_kinds_are_what_the_paper_makes_of_the_base():
    def body(model):
        return sum(p.numel() for p in model.model.layers.parameters())

    assert body(arms.large(room.TASK, 0)) / body(arms.small(room.TASK, 0)) == pytest.approx(4.4, abs=0.1)
    assert body(arms.large(room.LARGE, 0)) / body(arms.small(room.LARGE, 0)) == pytest.approx(4.4, abs=0.1)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    with torch.device("meta"):
        smollm2 = body(LlamaForCausalLM(shape))
    sibling = body(room.small_llama(**room.SIBLING))
    assert smollm2 / sibling == pytest.approx(4.4, abs=0.15)
    lp, _ = room.timed("lp", room.WORDS)
    assert body(lp.base) == 2 * body(lp.auxiliary)


# --------------------------------------------------------------------------------------------------- what would refute


def quality(**changed):
    controls = {
        "deleted": 6.0,
        "random": 7.0,
        "rival": 4.2,
        "last tokens": 5.0,
        "random tokens": 5.0,
        "attended tokens": 5.0,
    }
    found = {"candidate": 4.1, "baseline": 4.0, "low": 4.05, "high": 4.15, "margin": 0.05}
    own = {name: changed.pop(name) for name in list(changed) if name in found}
    return {"quality": found | own | {"controls": controls | changed}}


def test_a_rival_that_does_as_well_refutes_unless_quality_is_lost_anyway():
    assert not arms.refutes(quality())
    for name in arms.RIVALS:
        assert arms.refutes(quality(**{name: 4.1}))
        assert arms.refutes(quality(**{name: 3.9}, high=4.5))
        assert not arms.refutes(quality(**{name: 3.9}, low=4.3, candidate=4.4, high=4.5))


def test_knowing_nothing_of_the_prompt_refutes():
    assert arms.refutes(quality(low=6.0, candidate=6.1, high=6.2))
    assert not arms.refutes(quality(low=5.7, candidate=5.8, high=5.9))


def test_the_search_shows_that_what_is_judged_depends_on_the_prompt():
    """The losses of the search, where nothing was resampled: keys and values learnt without the prompt lose more than may be lost, and so
    does the loss of the caches left out."""
    known = json.loads(rates.FILE.read_text(encoding="utf-8"))
    best = {}
    for name in (arms.BASES, arms.LP, arms.C, arms.CONSTANT):
        grid = known[name]["grid"]
        for arm, found in known[name]["arms"].items():
            assert grid[0] < found["rate"] < grid[-1], f"the best rate of {arm} is at the edge"
            best[arm] = found["losses"][f"{found['rate']:g}"]
    for margin in MARGINS.values():
        assert best["constant"] - best["base on"] > margin * best["base on"]
    for kind in arms.KINDS:
        assert best["constant"] - best[f"predicted {kind}"] > MARGINS[CLAIMS[kind]] * best["base on"]
    assert best["no consistency lp"] > best["predicted lp"]


# ------------------------------------------------------------------------------------------------------------- sabotage


def test_every_arm_is_judged_and_the_rivals_are_named(at_once):
    """All arms, trained for a moment: the record has each, and nothing pays that was hardly trained."""
    record = record_of(CLAIMS["lp"], point({**room.SMOKE, "base_steps": 3, "steps": 2, "windows": 6}))
    assert set(record.quality.controls) == {
        "deleted", "random", *arms.RIVALS, "no prompt", "no consistency", "shuffled layers",
    }  # fmt: skip
    assert set(record.trained) == {"base", "base on", "predicted", "alone"}
    assert record.details["reduction"]["macs"] > 1
    assert set(record.details["nats fewer than what costs no more"]) == {"alone", *arms.RIVALS[1:]}
    assert judge(record).verdict not in PAYS
    assert isinstance(remarks(record), list)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", arms.KINDS)
def test_a_predictor_that_predicts_nothing_or_for_other_layers_is_noticed(monkeypatch, kind):
    """All arms as at `small`, trained or found on disk; then the learnt mean, or what is for other layers, stands for the prediction."""
    monkeypatch.setattr(arms, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    own = arms.predictor_of
    honest = verdict_of(CLAIMS[kind], point(room.TASK))
    assert honest in (*PAYS, Verdict.DOES_NOT_PAY)

    def constant(kind, task, seed, rate=None, *, consistency=1.0):
        return arms.constant_of(task, seed)

    def shuffled(*args, **settings):
        return arms.shuffled(own(*args, **settings))

    for broken in (constant, shuffled):
        monkeypatch.setattr(arms, "predictor_of", broken)
        assert verdict_of(CLAIMS[kind], point(room.TASK)) not in (*PAYS, honest), broken.__name__
