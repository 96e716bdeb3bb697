"""The experiments of KV Prediction notice a predictor that predicts nothing."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.verdict import judge, remarks
from assay.experiments import experiments_of
from assay.experiments.inference import kv_prediction as room
from assay.experiments.rates import Rate
from assay.methods.inference.kv_prediction import Predictor, prompt_cost

TINY = {**room.SMOKE, "width": 32, "layers": 2, "base_steps": 50, "steps": 20, "batch": 4, "windows": 32}
POINT = {"model": "bytes", "batch": 2, "tokens": 16, "task": TINY}
CLAIMS = {"lp": "kv_prediction/ttft-lp050", "c": "kv_prediction/ttft-c270"}


@pytest.fixture
def known(monkeypatch, tmp_path):
    """Rates as if searched, weights kept nowhere else, and a floor that so little training beats."""
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(1e-2, (3e-3, 1e-2, 3e-2)))
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(room, "floor_of", lambda task: (5.0, "given"))


def given(kind, task):
    """The base and the predictor really trained; what the others do, given."""
    prompts, texts = room.windows_of(task, "heldout")
    found = {"base": [], "predicted": []}
    for seed in room.SEEDS:
        found["base"].append(float(room.after(room.base_of(task, seed), prompts, texts).mean()))
        found["predicted"].append(float(room.after(room.predictor_of(kind, task, seed), prompts, texts).mean()))
    worse = {"deleted": 0.5, "random": 0.8, "alone": 0.4, "random tokens": 0.4, "last tokens": 0.2}
    return found | {arm: [nats + more for nats in found["base"]] for arm, more in worse.items()}


def noise(self, raw):
    """Keys and values of the right shapes that know nothing of the prompt."""
    found = []
    for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
        pair = []
        for linear, x in ((keys, raw[layer][0]), (values, raw[layer][1])):
            made = linear(x)
            pair.append(0 * made + 6 * torch.randn(made.shape, generator=torch.Generator().manual_seed(0)))
        found.append(tuple(pair))
    return found


def test_experiments_load():
    assert {found.claim for found in experiments_of("kv_prediction")} == set(CLAIMS.values())


@pytest.mark.parametrize("kind", ["lp", "c"])
def test_a_predictor_that_predicts_nothing_is_noticed(known, monkeypatch, kind):
    monkeypatch.setattr(room, "scores", given)
    assert verdict_of(CLAIMS[kind], POINT) in PAYS
    monkeypatch.setattr(Predictor, "forward", noise)
    again = {**TINY, "steps": TINY["steps"] - 1}  # the bases are found again, the predictors are trained anew
    assert verdict_of(CLAIMS[kind], {**POINT, "task": again}) not in PAYS


def test_every_arm_is_judged_and_the_rivals_are_named(known, monkeypatch):
    """All arms, trained for a moment: the record has each, and says where a rival is as good."""
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    point = {**POINT, "task": {**TINY, "base_steps": 4, "steps": 3, "windows": 8}}
    record = record_of(CLAIMS["lp"], point)
    assert set(record.quality.controls) == {
        "deleted", "random", "rival", "random tokens", "last tokens", "no consistency",
    }  # fmt: skip
    assert set(record.trained) == {"base", "predicted", "alone"}
    assert record.details["reduction"]["macs"] > 1
    assert judge(record).verdict not in PAYS
    assert isinstance(remarks(record), list)


def test_pruned_prompts_cost_no_more_than_a_prediction():
    predictor, _ = room.timed("lp", "bytes")
    whole = prompt_cost(predictor, 64)
    n = room.affordable(predictor, 64)
    budget = whole.auxiliary + whole.predictor + whole.step
    assert prompt_cost(predictor, n).base <= budget < prompt_cost(predictor, n + 1).base


@torch.no_grad()
def test_text_behind_a_prompt_is_judged_as_the_model_itself_would():
    base = room.language_model(32, 2, 0).eval()
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))
    found = room.after(base, ids[:, :8], ids[:, 8:])
    logits = base(input_ids=ids).logits[:, 7:-1].double()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 8:], reduction="none").mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    places = torch.tensor([[2, 5, 7]]).expand(3, -1)
    shown = room.after(base, ids[:, :8], ids[:, 8:], places)
    wanted = torch.cat([places, torch.arange(8, 12).expand(3, -1)], 1)
    logits = base(input_ids=ids.gather(1, wanted), position_ids=wanted).logits[:, 2:-1].double()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 8:], reduction="none").mean(1)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)


def test_the_auxiliaries_of_both_kinds_are_what_the_paper_makes_of_the_base():
    for kind, ratio in (("lp", 1.3), ("c", 2.5)):
        predictor, _ = room.timed(kind, "bytes")
        assert room.parameter_ratio(predictor) > ratio
        assert prompt_cost(predictor, 59).reduction > ratio
