"""What the experiment on verifiers and imitation says where the verifier is useless, left out, or gains as much
without its cause.

Most tests script how often each arm is right at each budget, so that nothing is trained; a slow one trains with a
broken verifier.
"""

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments.rates import Rate
from assay.experiments.reasoning import verifier_based_ttc as room
from assay.experiments.reasoning import verifier_based_ttc_models as models
from assay.experiments.reasoning.samples import Drawn
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.reasoning.compute_optimal_ttc import Attempts
from assay.methods.reasoning.verifier_based_ttc import returns
from assay.workloads.reasoning import items

CLAIM = "verifier_based_ttc/verifier-beats-imitation"
RECIPE = {**models.RECIPE, "judged": 200}
POINT = {"recipe": RECIPE}
GROWING = {
    models.BASE: (0.1, 0.2, 0.4),
    models.IMITATION: (0.3, 0.5, 0.6),
    models.VERIFIER: (0.35, 0.7, 0.9),
    models.QUICKEST: (0.35, 0.55, 0.65),
    models.USELESS: (0.1, 0.2, 0.4),
    models.BEST: (0.2, 0.5, 0.7),
    models.TRUE: (0.5, 0.8, 0.95),
}
"""How often each arm is right at budgets of 6, 12 and 24 steps."""


def steps(share, H, n=200):
    """Traces of which that share is right at the last moment."""
    return [H if i < round(share * n) else H + 1 for i in range(n)]


@pytest.fixture
def scripted(monkeypatch):
    """Sets what the arms reach, {arm: shares}; seeds differ by a few traces."""
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(room, "searched_rate", lambda arm: Rate(1e-3, (3e-4, 1e-3, 3e-3)))
    monkeypatch.setattr(models, "chosen", lambda *_: Rate(3e-3, (1e-3, 3e-3, 1e-2)))
    monkeypatch.setattr(room, "language_model", lambda questions: {})

    def script(unequal, alike=None):
        def outcomes(recipe, seed, name):
            same = dict.fromkeys((models.BASE, models.IMITATION, models.VERIFIER), (0.99, 0.99, 0.99))
            shares = unequal if name == "unequal" else alike or same
            return {
                name: {
                    str(H): {arm: steps(each[i] - 0.005 * (seed * (i + 1) % 3), H) for arm, each in shares.items()}
                    for i, H in enumerate(recipe["budgets"])
                },
                f"{name}, base policy": {"heterogeneity": 1.0, "anti-concentration": 0.1, "H": 24},
            }

        monkeypatch.setattr(room, "outcomes", outcomes)

    return script


def verdict():
    return judge(record_of(CLAIM, POINT)).verdict


def test_a_gap_that_grows_holds(scripted):
    scripted(GROWING)
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict is Verdict.DIRECTION_HOLDS
    assert record.measured.median == pytest.approx(25, abs=1.5)
    assert record.arms["gap at a budget of 24"] == pytest.approx(30, abs=1.5)
    assert record.free == pytest.approx(0, abs=1.5)
    assert record.arms["traces all alike"] == pytest.approx(0, abs=1)


@pytest.mark.parametrize("instead", [models.BASE, models.USELESS, models.IMITATION])
def test_without_the_verifier_nothing_holds(scripted, instead):
    scripted({**GROWING, models.VERIFIER: GROWING[instead]})
    assert verdict() not in PAYS


def test_a_gap_that_only_stays_does_not_hold(scripted):
    scripted({**GROWING, models.VERIFIER: (0.5, 0.7, 0.8)})
    assert verdict() not in PAYS


def test_a_gap_that_shrinks_refutes(scripted):
    scripted({**GROWING, models.VERIFIER: (0.6, 0.65, 0.65)})
    assert verdict() is Verdict.REFUTED


def test_losing_less_is_no_gain(scripted):
    scripted({**GROWING, models.VERIFIER: (0.1, 0.4, 0.6)})
    assert verdict() not in PAYS


def test_a_gap_that_grows_as_much_where_traces_are_alike_refutes_the_cause(scripted):
    scripted(GROWING, alike={**GROWING, models.VERIFIER: (0.35, 0.7, 0.99)})
    assert verdict() is Verdict.REFUTED


def test_a_rival_without_a_verifier_may_gain_as_much(scripted):
    scripted({**GROWING, models.QUICKEST: (0.3, 0.6, 0.9)})
    assert verdict() is Verdict.DOES_NOT_PAY


def test_an_arm_that_learnt_nothing_decides_nothing(scripted):
    scripted({**GROWING, models.VERIFIER: (0.02, 0.04, 0.06), models.IMITATION: (0.01, 0.01, 0.02)})
    assert verdict() is Verdict.UNDECIDED
    scripted({**GROWING, models.IMITATION: (0.1, 0.2, 0.41)})  # no more than the base policy that it starts from
    assert verdict() is Verdict.UNDECIDED


def test_no_context_is_judged_that_was_trained_on():
    recipe = {**models.SMOKE, "contexts": 64, "traces": 1, "judged": 300, "budgets": [4]}
    problem = models.problem_of(models.UNEQUAL, 0)
    torch.manual_seed(0)
    base = models.Decoder(problem.V + 1, problem.k + 5, recipe, problem.V + 1).eval()
    data, drawn = models.Data(base, problem, recipe, 4, 0), []
    real = data.sample
    data.sample = lambda policy, prompts, seed: drawn.append(prompts) or real(policy, prompts, seed)
    assert len(data.judged(base)) == 300
    data.judged(base, 8000)
    data.best_of(data.verifier(1e-3), N=2)
    learnt = {tuple(row) for row in problem.prompts(data.contexts).tolist()}
    assert len(learnt) > 50
    assert [len(prompts) for prompts in drawn] == [300] * 4
    assert not any(tuple(row) in learnt for prompts in drawn for row in prompts.tolist())
    assert len({tuple(row) for row in drawn[0].tolist()}) > 150
    with pytest.raises(ValueError, match="contexts"):
        models.Data(base, models.Planted(V=2, k=1), {**recipe, "judged": 5}, 4, 0).held_out()


def test_a_real_models_samples_are_told_by_wording(monkeypatch):
    """A sum that is right in one of three samples, and a verifier that knows which."""

    def drawn(text, tokens):
        return Sample(text, tuple(range(tokens)), (-0.1,) * tokens, "stop", Spent(0, tokens, 0, 1))

    item = items("sum", level=1, n=1)[0]
    one = Drawn(item, "", [drawn(" 99", 2), drawn(f" {item.answer}", 3), drawn(" 99", 2)] * 8)
    attempts = Attempts(tuple(one.answers), tuple(map(float, one.right)), tuple(range(24)))
    monkeypatch.setattr(room.sums, "learn_sets", lambda n: [])
    monkeypatch.setattr(room.sums, "fitted", lambda found, ledger: None)
    monkeypatch.setattr(room.sums, "judged_sets", lambda n, samples: [(w, one) for w in room.WORDINGS])
    monkeypatch.setattr(room.sums, "samples_run", lambda *_: attempts)
    found = room.language_model(1)
    assert set(found) == set(room.WORDINGS)
    told = found["task"]
    assert told["anti-concentration"] == pytest.approx(1 / 3)
    assert told["heterogeneity"]["mean"] == pytest.approx(np.std([0, 6, 0] * 8, ddof=1))
    assert told["right"]["by the verifier"]["16"] == 1
    assert told["right"]["by count"]["16"] < 0.1
    assert told["right"]["by count"]["1"] == pytest.approx(1 / 3, abs=0.01)


def test_both_ways_are_charged_the_same_words():
    """A word of training counts three times, one that is read once: counted over the calls, not taken from the
    recipe."""
    recipe = {**models.SMOKE, "gradient_steps": 6, "budgets": [6]}
    problem = models.problem_of(models.UNEQUAL, 0)
    torch.manual_seed(0)
    words = problem.V + 1
    base = models.Decoder(words, problem.k + 1 + 6, recipe, words)
    trained, read, kept_ids, real = [], [], [], models.Decoder.forward

    def counted(self, ids, kept=None):
        if kept is not None:
            kept_ids.append(ids.numel())
        else:
            (trained if torch.is_grad_enabled() else read).append(ids.shape[0])
        return real(self, ids, kept)

    models.Decoder.forward = counted
    try:
        data = models.Data(base, problem, recipe, 6, 0)
        judge_ = data.verifier(1e-3)
        kept_ids.clear()  # what both ways learn from is drawn once
        data.climbed(lambda p, t: models.verified(judge_, p, t), 1e-3)
        written = recipe["gradient_steps"] * recipe["batch"]
        verifier = 3 * sum(trained) + sum(read) + written
        trained.clear()
        data.first[:] = 1  # all right, so that imitation has something to learn from
        data.imitated(1e-3)
        imitation = 3 * sum(trained)
    finally:
        models.Decoder.forward = real
    assert imitation == pytest.approx(verifier, rel=0.05)
    assert sum(kept_ids) == written * (6 - 1 + problem.k + 1)


def test_sampling_with_kept_keys_is_sampling_without():
    recipe = {**models.SMOKE, "budgets": [5]}
    problem = models.problem_of(models.UNEQUAL, 0)
    torch.manual_seed(0)
    policy = models.Decoder(problem.V + 1, problem.k + 6, recipe, problem.V + 1).eval()
    prompts = problem.prompts(problem.contexts(20, 1))
    kept = [[] for _ in policy.blocks]
    ids, whole = prompts, policy(torch.cat([prompts, prompts[:, :2]], 1))
    first = policy(ids, kept)
    rest = torch.cat([policy(prompts[:, i : i + 1], kept) for i in range(2)], 1)
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)
    traces = models.sampled(5)(policy, prompts, 3)
    assert traces.shape == (20, 5)
    assert torch.equal(traces, models.sampled(5)(policy, prompts, 3))
    assert not torch.equal(traces, models.sampled(5)(policy, prompts, 4))


def test_returns_of_scripted_traces_are_those_of_the_method():
    assert returns(steps(0.5, 4, 4), 4).tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.slow
def test_a_verifier_fitted_to_noise_is_no_better_than_none(monkeypatch):
    """One seed at the largest budget: the honest verifier's way gains much, that of a verifier of shuffled rewards
    does not."""
    recipe = {**models.RECIPE, "budgets": [12], "judged": 500}
    monkeypatch.setattr(
        models, "chosen", lambda name, arm: Rate(1e-2 if arm in (models.BASE, models.VERIFIER) else 3e-3, (1, 2, 3))
    )
    base = models.base_policy(recipe, models.UNEQUAL, 0)
    data = models.Data(base, models.problem_of(models.UNEQUAL, 0), recipe, 12, 0)

    def reached():
        judge_ = data.verifier(1e-2)
        policy = data.climbed(lambda p, t: models.verified(judge_, p, t), 3e-3)
        return models.success(data.judged(policy), 12)

    before, honest = models.success(data.judged(base), 12), reached()
    real = models.fit_verifier
    monkeypatch.setattr(
        models, "fit_verifier",
        lambda v, p, t, rewards, **more: real(v, p, t, rewards[torch.randperm(len(rewards))], **more),
    )  # fmt: skip
    assert honest > before + 0.2
    assert reached() < honest - 0.15
