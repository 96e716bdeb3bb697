"""The experiments of configurable_bricks notice when masking, scoring, silencing or routing is broken.

They run on a model in which it is known what every neuron does: of each MLP's 96 neurons five fire for the tokens of each function, the
last fifteen, and they alone make those tokens likely.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.compression import configurable_bricks as room

NAMES = ["python", "english", "arithmetic"]
KINDS, OWN, NEURONS = 10, 5, 96  # tokens and neurons of a function; neurons of an MLP
MASKED = {"windows": 6, "window": 20, "weights": "as released"}
FUNCTIONS = {"functions": NAMES, "passages": 8, "length": 24}
SILENCED = FUNCTIONS | {"judged": 4}
ROUTED = {"groups": 16, "active": 8, "tokens": 2, "calibration": 6, "windows": 6, "window": 20}


class Mlp(nn.Module):
    """Neurons of function f pass on the input's place f."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(3, NEURONS, bias=False)
        self.up_proj = nn.Linear(3, NEURONS, bias=False)
        self.down_proj = nn.Linear(NEURONS, 3, bias=False)
        self.act_fn = nn.SiLU()
        with torch.no_grad():
            for layer in (self.gate_proj, self.up_proj, self.down_proj):
                layer.weight.zero_()
            for place in range(3 * OWN):
                neuron, function = NEURONS - 1 - place, place // OWN
                self.gate_proj.weight[neuron, function] = 10.0
                self.up_proj.weight[neuron, function] = 0.1
                self.down_proj.weight[function, neuron] = 0.2

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Planted(nn.Module):
    """Tokens 10 f .. 10 f + 9 belong to function f, and are predicted after each other by what the MLPs say."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=3 * KINDS)
        self.embed = nn.Embedding.from_pretrained(torch.eye(3).repeat_interleave(KINDS, 0))
        self.layers = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, input_ids, logits_to_keep=0, use_cache=True):
        x = self.embed(input_ids)
        said = sum(mlp(x) for mlp in self.layers)
        return SimpleNamespace(logits=1.5 * said.repeat_interleave(KINDS, -1))


def tokens(function, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return KINDS * function + torch.randint(KINDS, (1, length), generator=generator)


def windows(_, *args, window, n):
    return torch.cat([tokens(i % 3, window, i + 100 * len(args)) for i in range(n)])


def planted_passages(_, function, n, length, half):
    start = 1000 * (half == "fit")
    return [room.Passage(function, start + i, tokens(NAMES.index(function), length, start + i)) for i in range(n)]


@pytest.fixture(autouse=True)
def _planted(monkeypatch):
    def load(name, dtype=torch.float32):
        return SimpleNamespace(model=room.in_dtype(Planted().eval(), dtype), tokenizer=None)

    monkeypatch.setattr(room, "load_model", load)
    monkeypatch.setattr(room, "passages", planted_passages)
    monkeypatch.setattr(room, "document_windows", windows)
    monkeypatch.setattr(room, "calibration_windows", windows)
    monkeypatch.setattr(room, "long_prompt", lambda _, length: tokens(0, length, 0))


def test_every_experiment_declares_what_decides():
    found = {each.claim.split("/")[1]: each for each in experiments_of("configurable_bricks")}
    assert set(found) == {
        "maskable-neurons", "maskable-by-output", "specialised-neurons", "pruning-hits-its-function", "brick-decode-speed"
    }  # fmt: skip
    for name in ("maskable-neurons", "maskable-by-output"):
        assert found[name].decides["small"]["weights"] == "as released"
    assert [len(found[name].points["small"]) for name in ("maskable-neurons", "maskable-by-output")] == [2, 1]
    assert found["brick-decode-speed"].guard.margin == 0.05
    assert found["specialised-neurons"].tolerance == 0


@pytest.mark.parametrize("claim", ["configurable_bricks/maskable-neurons", "configurable_bricks/maskable-by-output"])
def test_masking_the_strongest_neurons_is_noticed(monkeypatch, claim):
    honest = record_of(claim, MASKED)
    assert honest.measured.low == 90
    assert max(honest.controls[name] for name in ("deleted", "random")) < 50
    assert 80 < honest.controls["rival"] < 90  # the 81 neurons that no function has
    assert verdict_of(claim, MASKED) is Verdict.REPRODUCED
    real = room.masking

    def broken(model, share, indicator):
        return real(model, share, (lambda _, h: -h.abs()) if isinstance(indicator, str) else indicator)

    monkeypatch.setattr(room, "masking", broken)
    assert verdict_of(claim, MASKED) is Verdict.REFUTED


def test_a_choice_for_all_tokens_that_does_as_well_refutes():
    refutes = room._choice_in_vain(52.5)
    record = {"measured": {"high": 65.0}, "controls": {"rival": 40.0}}
    assert not refutes(record)
    assert refutes(record | {"controls": {"rival": 66.0}})
    assert refutes(record | {"measured": {"high": 50.0}})


def test_scores_that_know_nothing_are_noticed(monkeypatch):
    claim = "configurable_bricks/specialised-neurons"
    honest = record_of(claim, FUNCTIONS)
    assert honest.measured.low == 100
    assert (
        max(honest.controls["random"], honest.controls["deleted"]) < 60
    )  # of the 96 neurons ten are right by themselves
    assert verdict_of(claim, FUNCTIONS) is Verdict.REPRODUCED

    class Guessing(room.FunctionalityScorer):
        def fit(self, activations, labels):
            super().fit(activations, labels)
            generator = torch.Generator().manual_seed(0)
            self.scores_ = {mlp: torch.rand(x.shape, generator=generator) for mlp, x in self.scores_.items()}
            return self

    monkeypatch.setattr(room, "FunctionalityScorer", Guessing)
    assert verdict_of(claim, FUNCTIONS) is Verdict.REFUTED


def test_a_model_that_needs_no_training_shows_nothing(monkeypatch):
    monkeypatch.setattr(room, "untrained", lambda model: model)
    assert verdict_of("configurable_bricks/specialised-neurons", FUNCTIONS) is Verdict.QUALITY_NOT_SHOWN


def test_an_untrained_model_has_the_same_numbers_in_another_order():
    model = Planted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    room.untrained(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.flatten().sort().values, before[name].flatten().sort().values)
        assert not torch.equal(p, before[name])


def test_silencing_other_neurons_is_noticed(monkeypatch):
    claim = "configurable_bricks/pruning-hits-its-function"

    def guessed(known, labels, **_):
        return room.by_chance(known, labels, torch.Generator().manual_seed(3))

    monkeypatch.setattr(room, "by_means", guessed)  # which finds what was planted just as well: the rival is taken away
    honest = record_of(claim, SILENCED)
    assert honest.measured.low > 0.5
    rows = honest.details["increase in nats, by function silenced and function read"]["scores"]
    for name in NAMES:
        assert rows[name][name] == max(rows[name].values())
        assert all(rows[name][other] == pytest.approx(0, abs=1e-5) for other in NAMES if other != name)
    assert verdict_of(claim, SILENCED) is Verdict.DIRECTION_HOLDS
    monkeypatch.setattr(room, "specialists", guessed)
    assert verdict_of(claim, SILENCED) not in PAYS


def test_a_rival_that_finds_the_neurons_as_well_is_measured():
    honest = record_of("configurable_bricks/pruning-hits-its-function", SILENCED)
    assert honest.free == pytest.approx(honest.measured.median, rel=1e-4)


def test_a_router_that_guesses_is_noticed(monkeypatch):
    claim = "configurable_bricks/brick-decode-speed"
    honest = record_of(claim, ROUTED)
    assert honest.quality.candidate == pytest.approx(honest.quality.baseline, rel=0.01)
    assert honest.quality.controls["random"] > 1.05 * honest.quality.baseline
    assert verdict_of(claim, ROUTED) in PAYS
    real = room.to_bricks

    def broken(model, batches, **sizes):
        changed = real(model, batches, **sizes)
        for layer in room.routed_layers(changed):
            layer.chooser = room.chance_groups(torch.Generator().manual_seed(1))
        return changed

    monkeypatch.setattr(room, "to_bricks", broken)
    assert verdict_of(claim, ROUTED) not in PAYS


def test_the_arms_of_routing_run_and_leave_no_choice_behind():
    trial = room.brick_decode_speed(**ROUTED)
    for arm in (trial.baseline, trial.candidate, *trial.arms.values()):
        arm()
    assert set(trial.arms) == {room.STATIC, room.FLOAT32, room.ROUTED32}
    quality = trial.quality()
    assert trial.quality().candidate == quality.candidate
    assert {"oracle", "task", "ranked"} <= set(trial.details()["perplexity"])
    assert trial.details()["perplexity"]["ranked"] == pytest.approx(
        quality.baseline, rel=0.01
    )  # the fifteen that fire are in 3 groups


def test_neurons_removed_for_good_and_another_type_can_refute_routing():
    slow, fast = {"high": 2.0, "median": 1.5}, {"high": 0.9, "median": 0.8}
    ratios = {room.STATIC: fast, room.FLOAT32: slow, room.ROUTED32: slow}
    quality = {"candidate": 20.0, "controls": {"rival": 21.0}}

    def refuted(rival=21.0, **arms):
        own = ratios | {getattr(room, name): ratio for name, ratio in arms.items()}
        return room._not_worth_routing({"ratios": own, "quality": quality | {"controls": {"rival": rival}}})

    assert not refuted()
    assert refuted(rival=19.0)
    assert not refuted(rival=19.0, STATIC=slow)
    assert refuted(FLOAT32=fast)
    assert not refuted(
        FLOAT32=fast, ROUTED32={"high": 0.7, "median": 0.6}
    )  # routing is allowed the faster type as well


# ---- the parts of the measurement ------------------------------------------------------------------------------------------------


def test_the_reach_of_a_curve():
    levels = len(room.LEVELS)
    rising = np.linspace(0.01, 0.09, levels)[None, None]  # 0.05 at the fifth level
    assert room.reach(rising)[0] == pytest.approx(50)
    assert room.reach(np.zeros((1, 3, levels)))[0] == 90
    assert room.reach(np.full((1, 3, levels), 1.0))[0] == pytest.approx(0.5)
    twice = np.concatenate([np.zeros((1, 1, levels)), 2 * rising], 1)  # of two documents, the mean is what counts
    assert room.reach(twice)[0] == pytest.approx(50)
    dip = rising.copy()
    dip[..., -1] = 0.0  # the first crossing counts
    assert room.reach(dip)[0] == pytest.approx(50)


def test_documents_are_resampled_within_their_function():
    rows = [room.Passage(name, i // 2, torch.zeros(1, 8)) for name in NAMES for i in range(6)]
    for drawn in list(room.resampled(rows))[:20]:
        assert len(drawn) == 18
        functions = [rows[i].function for i in drawn.tolist()]
        assert all(functions.count(name) == 6 for name in NAMES)
        pairs = drawn.view(-1, 2)
        assert torch.equal(pairs[:, 0] + 1, pairs[:, 1])  # the passages of a document stay together


def test_dominance_is_the_diagonal_less_the_rest():
    rows = [room.Passage(name, i, torch.zeros(1, 8)) for i, name in enumerate(["a", "b", "b"])]
    increases = torch.tensor([[3.0, 1.0, 2.0], [0.5, 4.0, 4.0]])
    assert room.dominance(increases, ["a", "b"], rows).tolist() == [2.5, 3.0, 2.0]
    assert room.matrix(increases, ["a", "b"], rows)["a"] == {"a": 3.0, "b": 1.5}
