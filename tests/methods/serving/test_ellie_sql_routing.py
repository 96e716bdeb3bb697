"""Routers: what must hold of any, those of the paper, thresholds by cost, and the one behind `model="auto"`."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from assay.errors import InputError
from assay.methods.serving.ellie_sql import (
    ConstantRouter,
    CountRouter,
    DPORouter,
    ModelRouter,
    PairwiseClassifier,
    PreferenceClassifier,
    TierRouter,
    by_chance,
    cascade_by_failure,
    dpo_loss,
    hashed_words,
    labels,
    nearest_neighbours,
    oracle,
    preferences,
    request_features,
    request_text,
    routed,
    tep,
    tuned_threshold,
)
from tiny import write_tiny_llama

CHANCE = np.random.default_rng(0)
X = CHANCE.normal(size=(60, 3))
HARD = X[:, 0] + 0.3 * CHANCE.normal(size=60)
RESULTS = np.stack([HARD < -0.3, HARD < 0.6, HARD < 1.8], axis=1).astype(float)
COSTS = np.stack([CHANCE.uniform(10, 20, 60), CHANCE.uniform(30, 50, 60), CHANCE.uniform(90, 120, 60)], axis=1)
some_results = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=6)


# ---- labels, the oracle, constants


@given(some_results)
def test_labels_are_the_first_tier_that_solves(rows):
    for row, label, first in zip(rows, labels(rows), labels(rows, hopeless="first"), strict=True):
        if any(row):
            assert label == first == row.index(1)
        else:
            assert (label, first) == (2, 0)


@given(some_results, st.lists(st.tuples(*[st.floats(0.5, 9)] * 3), min_size=6, max_size=6))
@settings(deadline=None, max_examples=40)
def test_the_oracle_is_as_accurate_as_can_be_at_the_least_cost(rows, prices):
    rows = rows[:5]
    costs = np.cumsum(prices[: len(rows)], axis=1)
    best = routed(oracle(rows), rows, costs)
    for tier in range(3):
        assert best.accuracy >= np.mean([row[tier] for row in rows])
    for choice in itertools.product(range(3), repeat=len(rows)):
        other = routed(np.array(choice), rows, costs)
        assert other.accuracy < best.accuracy + 1e-12
        assert other.accuracy < best.accuracy - 1e-12 or other.cost >= best.cost - 1e-9
    assert routed(oracle(rows, hopeless="last"), rows, costs).accuracy == best.accuracy


def test_a_constant_router_is_its_tier():
    for tier in range(3):
        sent = ConstantRouter(tier).fit(X).predict(X)
        found = routed(sent, RESULTS, COSTS)
        assert found.accuracy == RESULTS[:, tier].mean()
        assert found.cost == COSTS[:, tier].mean()
        assert found.shares == tuple(float(t == tier) for t in range(3))
        assert by_chance(found.shares, RESULTS, COSTS) == found


def test_the_router_is_paid_for():
    sent = oracle(RESULTS)
    free, paid = routed(sent, RESULTS, COSTS), routed(sent, RESULTS, COSTS, router_costs=7.0)
    assert paid.cost == pytest.approx(free.cost + 7)
    each = np.arange(60.0)
    assert routed(sent, RESULTS, COSTS, router_costs=each).cost == pytest.approx(free.cost + each.mean())
    assert paid.accuracy == free.accuracy
    for bad in (-1.0, math.nan, [1.0, 2.0], math.inf):
        with pytest.raises(ValueError, match="router_costs"):
            routed(sent, RESULTS, COSTS, router_costs=bad)


def test_of_nested_tiers_the_oracle_saves_what_the_labels_say():
    nested = np.maximum.accumulate(RESULTS, axis=1)
    wanted = labels(nested)
    saved = COSTS[:, -1].sum() - 60 * routed(oracle(nested, hopeless="last"), nested, COSTS).cost
    assert saved == pytest.approx(sum(COSTS[i, -1] - COSTS[i, wanted[i]] for i in range(60)))


def test_what_is_no_routing_is_refused():
    for tiers in (np.zeros(59, int), np.full(60, 3), np.full(60, -1), np.zeros(60), np.zeros((60, 1), int)):
        with pytest.raises(ValueError, match="tiers"):
            routed(tiers, RESULTS, COSTS)
    for costs in (COSTS[:, :2], -COSTS, np.full((60, 3), np.nan), np.ones(2)):
        with pytest.raises(ValueError, match="costs"):
            routed(oracle(RESULTS), RESULTS, costs)
    for shares in ([0.5, 0.5], [0.5, 0.2, 0.2], [1.5, -0.5, 0], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="shares"):
            by_chance(shares, RESULTS, COSTS)
    with pytest.raises(ValueError, match="hopeless"):
        labels(RESULTS, hopeless="none")
    assert routed(np.zeros(60, int), RESULTS, [1.0, 2.0, 3.0]).cost == 1.0


def test_chance_is_the_mean_of_many_draws():
    shares = (0.5, 0.2, 0.3)
    chance = np.random.default_rng(1)
    drawn = [routed(chance.choice(3, 60, p=shares), RESULTS, COSTS) for _ in range(2000)]
    expected = by_chance(shares, RESULTS, COSTS)
    assert expected.accuracy == pytest.approx(np.mean([one.accuracy for one in drawn]), abs=0.01)
    assert expected.cost == pytest.approx(np.mean([one.cost for one in drawn]), rel=0.01)


# ---- elasticity


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(1, 1e4), st.floats(1, 1e4))
def test_elasticity(accuracy, base, cost, base_cost):
    found = tep(accuracy, cost, base, base_cost)
    if cost == base_cost:
        assert math.isnan(found)
    else:
        gained = (accuracy - base) * (1 if cost > base_cost else -1)
        assert found == 0 if gained == 0 else not found * gained < 0
        assert tep(accuracy * 128, cost * 1024, base * 128, base_cost * 1024) == found  # powers of two round nothing


def test_elasticity_where_there_is_none():
    assert math.isnan(tep(0.5, 10, 0.5, 10))
    assert math.isnan(tep(0.5, 10, 0.0, 5))
    assert math.isnan(tep(0.5, 10, 0.5, 0))
    assert tep(0.4, 20, 0.5, 10) < 0 < tep(0.6, 20, 0.5, 10)
    with pytest.raises(ValueError, match="accuracy"):
        tep(math.nan, 1, 1, 1)


# ---- trained routers


@pytest.mark.parametrize("how", ["label", "cascade", "cost"])
def test_it_learns_and_sends_every_task_to_one_tier(how):
    router = TierRouter(LogisticRegression(), how=how, costs=[1, 3, 8], threshold=0.5 if how != "cost" else 0.2).fit(
        X, RESULTS
    )
    sent = router.predict(X)
    assert sent.shape == (60,)
    assert set(sent) <= {0, 1, 2}
    found = routed(sent, RESULTS, COSTS)
    assert found.accuracy > by_chance(found.shares, RESULTS, COSTS).accuracy + 0.1
    assert router.predict_proba(X).shape == (60, 3)


def test_a_cascade_by_its_threshold():
    router = TierRouter(LogisticRegression(), how="cascade").fit(X, RESULTS)
    probabilities = router.predict_proba(X)
    before = None
    for threshold in np.linspace(0, 1.01, 40):
        sent = router.decide(probabilities, float(threshold))
        assert (clone(router).set_params(threshold=float(threshold)).fit(X, RESULTS).predict(X) == sent).all()
        if before is not None:
            assert ((sent == 0) <= (before == 0)).all()  # nothing new goes to basic
            assert (sent >= before).all()
        before = sent
    assert (router.decide(probabilities, 0.0) == 0).all()
    assert (router.decide(probabilities, 1.01) == 2).all()


def test_ties_go_to_the_cheaper_tier():
    router = TierRouter(how="label").fit(X, RESULTS)
    assert router.decide(np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [1 / 3, 1 / 3, 1 / 3]])).tolist() == [0, 1, 0]
    by_cost = TierRouter(how="cost", costs=[1, 1, 1], threshold=0.3).fit(X, RESULTS)
    assert by_cost.decide(np.array([[0.5, 0.5, 0.5]])).tolist() == [0]
    third = TierRouter(how="cascade", threshold=0.5).fit(X, RESULTS)
    assert third.decide(np.array([[0.5, 0.9, 1.0], [0.4, 0.5, 1.0], [0.4, 0.4, 1.0]])).tolist() == [0, 1, 2]


def test_deciding_by_cost_sends_the_hopeless_to_a_cheap_tier():
    hopeless = RESULTS.copy()
    hopeless[X[:, 0] > 0.5] = 0
    sent = TierRouter(LogisticRegression(C=100), how="cost", costs=[1, 3, 8], threshold=0.3).fit(X, hopeless).predict(X)
    label = TierRouter(LogisticRegression(C=100)).fit(X, hopeless).predict(X)
    far = X[:, 0] > 1
    assert (sent[far] == 0).all()
    assert (label[far] == 2).all()


def test_a_tier_that_solves_all_or_nothing():
    for results in (np.ones((60, 3)), np.zeros((60, 3))):
        for how in ("label", "cascade", "cost"):
            sent = TierRouter(how=how, costs=[1, 2, 3]).fit(X, results).predict(X)
            wanted = 0 if results.all() or how == "cost" else 2
            assert (sent == wanted).all(), how


def test_qualities_count_from_a_level_on():
    graded = 0.3 + 0.4 * RESULTS
    assert (labels(graded) == labels(RESULTS)).all()
    assert (labels(graded, solved=0.2) == 0).all()
    a, b = (TierRouter(LogisticRegression()).fit(X, results).predict(X) for results in (graded, RESULTS))
    assert (a == b).all()


def test_bad_routers_are_refused():
    for settings_, message in (
        ({"how": "best"}, "how"),
        ({"how": "cost"}, "costs"),
        ({"how": "cost", "costs": [1, 2]}, "costs"),
        ({"how": "cost", "costs": [0, 0, 0]}, "costs"),
        ({"how": "cost", "costs": [1, 2, math.nan]}, "costs"),
        ({"threshold": math.nan}, "threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            TierRouter(**settings_).fit(X, RESULTS)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        TierRouter().fit(X, RESULTS[:10])


@pytest.mark.parametrize(
    "estimator",
    [
        TierRouter(),
        TierRouter(how="cascade"),
        PairwiseClassifier(),
        PreferenceClassifier(),
        ConstantRouter(),
        CountRouter(),
    ],
    ids=lambda one: f"{type(one).__name__} {getattr(one, 'how', '')}",
)
def test_scikit_learn_takes_it_for_its_own(estimator):
    check_estimator(estimator)


def test_it_stands_in_a_pipeline_and_a_search():
    pipeline = make_pipeline(StandardScaler(), TierRouter(LogisticRegression(), how="cascade"))
    sent = cross_val_predict(pipeline, X, RESULTS, cv=5)
    assert sent.shape == (60,)
    search = GridSearchCV(
        TierRouter(LogisticRegression(), how="cascade"),
        {"estimator__C": [0.1, 10.0], "threshold": [0.3, 0.7]},
        scoring=lambda router, x, y: routed(router.predict(x), y, COSTS[0]).accuracy,
        cv=3,
    ).fit(X, RESULTS)
    assert search.best_params_["threshold"] == 0.7  # the surer, the more accurate


def test_the_paper_s_rule_by_tables():
    counts = np.array([[1.0], [2.0], [3.0], [4.0], [7.0]])
    assert CountRouter().fit(counts).predict(counts).tolist() == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="bounds"):
        CountRouter(bounds=(3, 2)).fit(counts)


def test_nearest_neighbours_by_counts():
    counts = np.repeat([[1.0, 2.0], [2.0, 5.0], [4.0, 9.0]], 6, axis=0)
    results = np.repeat([[1, 1, 1], [0, 1, 1], [0, 0, 1]], 6, axis=0)
    assert (nearest_neighbours().fit(counts, results).predict(counts) == labels(results)).all()


# ---- pairs


def test_the_pairwise_loss_parts_the_classes():
    y = labels(RESULTS)
    found = PairwiseClassifier(alpha=1e-3).fit(X, y)
    assert (found.predict(X) == y).mean() > 0.7
    rows = found.predict_proba(X)
    assert rows.sum(1) == pytest.approx(1)
    assert (rows.argmax(1) == [list(found.classes_).index(one) for one in found.predict(X)]).all()
    routed_by = TierRouter(PairwiseClassifier(alpha=1e-3)).fit(X, RESULTS)
    assert (routed_by.predict(X) == found.predict(X)).all()


def test_the_pairwise_loss_is_the_hinge_s():
    """At the minimum no small step is better, in the loss written out by hand."""
    y = labels(RESULTS)
    model = PairwiseClassifier(alpha=0.05, smooth=1e-3, max_iter=2000).fit(X, y)

    def loss(weights):
        scores = X @ weights[:-1] + weights[-1]
        total = 0.0
        for row, label in zip(scores, y, strict=True):
            total += sum(max(0.0, 1 - row[label] + row[k]) for k in range(3) if k != label)
        return total / len(y) + 0.05 * (weights[:-1] ** 2).sum()

    best = loss(model.coef_)
    chance = np.random.default_rng(0)
    for _ in range(50):
        assert loss(model.coef_ + 0.05 * chance.normal(size=model.coef_.shape)) > best - 1e-3


# ---- thresholds and trying in turn


def test_the_threshold_is_the_cheapest_within_what_may_be_lost():
    router = TierRouter(LogisticRegression(), how="cascade")
    for lost in (0.0, 0.1, 1.0):
        threshold, curve = tuned_threshold(router, X, RESULTS, COSTS, most_lost=lost)
        chosen = next(one for one in curve if one[0] == threshold)
        fine = [one for one in curve if one[1] >= RESULTS[:, -1].mean() - lost - 1e-9]
        assert fine
        assert chosen[2] == min(one[2] for one in fine)
        assert chosen in fine
    assert tuned_threshold(router, X, RESULTS, COSTS, most_lost=1.0)[0] == 0.0
    assert [one[2] for one in curve] == sorted(one[2] for one in curve)
    with pytest.raises(ValueError, match="threshold"):
        tuned_threshold(TierRouter(), X, RESULTS, COSTS)


def test_a_threshold_is_tuned_on_groups_that_were_not_learnt_from():
    seen = []

    class Noting(LogisticRegression):
        def fit(self, inputs, wanted):
            seen.append({float(one) for one in inputs[:, -1]})
            return super().fit(inputs, wanted)

        def predict_proba(self, inputs):
            assert not seen[-1] & {float(one) for one in inputs[:, -1]}
            return super().predict_proba(inputs)

    groups = np.repeat(np.arange(20), 3)
    tuned_threshold(TierRouter(Noting(), how="cascade"), np.hstack([X, groups[:, None]]), RESULTS, COSTS, groups=groups)
    assert len(seen) == 10


def test_trying_in_turn_pays_for_every_try():
    failed = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    results = np.array([[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    right, cost = cascade_by_failure(failed, results, [1.0, 10.0, 100.0])
    assert right.tolist() == [0, 1, 1, 0]  # what is wrong and found something stays wrong
    assert cost.tolist() == [1, 11, 111, 111]
    with pytest.raises(ValueError, match="failed"):
        cascade_by_failure(failed[:2], results, [1.0, 10.0, 100.0])


# ---- preferences of a small model


def test_preferences_put_correctness_first_and_cost_second():
    assert preferences(0) == [(0, 1), (0, 2), (1, 2)]
    assert preferences(1) == [(1, 2), (1, 0), (2, 0)]
    assert preferences(2) == [(2, 0), (2, 1)]
    assert preferences(1, 2) == [(1, 0)]
    for bad in ((3, 3), (-1, 3), (0, 1)):
        with pytest.raises(ValueError):
            preferences(*bad)


def test_the_loss_of_a_pair():
    logits, reference = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.0]])
    wanted = -math.log(1 / (1 + math.exp(-0.1 * ((2 - 1) - (0 - 0.5)))))
    assert float(dpo_loss(logits, reference, [(0, 1)], 0.1)) == pytest.approx(wanted)
    assert float(dpo_loss(reference, reference, [(0, 1)], 0.1)) == pytest.approx(math.log(2))


def test_linear_preferences_minimise_the_loss_of_dpo():
    """The same loss, written out by torch pair by pair, against a reference that prefers nothing."""
    y = labels(RESULTS)
    model = PreferenceClassifier(alpha=1e-3, beta=0.7, tiers=3, max_iter=2000).fit(X, y)
    pairs = [(row, pair) for row, label in enumerate(y) for pair in preferences(int(label))]
    inputs = np.hstack([X, np.ones((60, 1))])

    def loss(weights):
        logits = torch.tensor(inputs @ weights)[[row for row, _ in pairs]]
        found = dpo_loss(logits, torch.zeros_like(logits), [pair for _, pair in pairs], 0.7)
        return float(found) + 1e-3 * (weights[:-1] ** 2).sum()

    best = loss(model.coef_)
    assert best < loss(np.zeros((4, 3))) - 0.05
    chance = np.random.default_rng(0)
    for size in (1e-3, 0.1):
        for _ in range(20):
            assert loss(model.coef_ + size * chance.normal(size=(4, 3))) > best - 1e-7
    assert (model.predict(X) == y).mean() > 0.6
    assert (
        TierRouter(PreferenceClassifier(alpha=1e-3, beta=0.7, tiers=3, max_iter=2000)).fit(X, RESULTS).predict(X)
        == model.predict(X)
    ).all()


def test_linear_preferences_lean_to_the_dear_side_where_in_doubt():
    """Correctness first: of tasks that look alike, half of them for basic and half for intermediate, the mean preference decides."""
    same, y = np.zeros((40, 1)), np.array([0, 1] * 20)
    scores = PreferenceClassifier(tiers=3).fit(same, y).predict_proba(same)[0]
    assert scores[1] > scores[0]  # (0, 1) and (1, 0) cancel; 1 is better than 2 in both, 0 in one only
    assert scores[1] > scores[2]
    with pytest.raises(ValueError, match=r"0\.\.1"):
        PreferenceClassifier(tiers=2).fit(same, np.array([0, 2] * 20))
    with pytest.raises(ValueError, match="2 classes"):
        PreferenceClassifier(tiers=3).fit(same, np.zeros(40, int))
    with pytest.raises(ValueError, match="beta"):
        PreferenceClassifier(beta=0).fit(same, y)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny_llama(tmp_path_factory.mktemp("dpo") / "tiny", layers=1)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_small_model_learns_to_route(tiny):
    model, tokenizer = tiny
    before = copy.deepcopy(model.state_dict())
    texts = ["count them", "count all of these and then some more", "join join join"] * 2
    results = [[1, 1, 1], [0, 1, 1], [0, 0, 1]] * 2
    router = DPORouter(model, tokenizer, rate=3e-3, epochs=30, beta=1.0).fit(texts, results)
    assert router.predict(texts).tolist() == labels(results).tolist()
    assert router.losses_[0] == pytest.approx(math.log(2), abs=0.2)
    assert router.losses_[-1] < 0.3
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    # a text is read alike alone and beside longer ones: its own last token, not the padding's
    alone = torch.cat([router._logits(router.model_, [text]) for text in texts])
    assert torch.allclose(router._logits(router.model_, texts), alone, atol=1e-4)
    counted = router.tokens(texts)
    assert counted[1] > counted[0] > 1


def test_a_model_whose_steps_would_be_rounded_away_is_refused(tiny):
    """In bfloat16 a step of 1e-6 changes no weight: training would seem to work and teach nothing."""
    model, tokenizer = tiny
    half = copy.deepcopy(model).to(torch.bfloat16)
    router = DPORouter(half, tokenizer)
    with pytest.raises(ValueError, match="float32"):
        router.fit(["a", "b"], [[1, 1, 1], [0, 0, 1]])
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        DPORouter(frozen, tokenizer).fit(["a", "b"], [[1, 1, 1], [0, 0, 1]])


def test_a_router_whose_training_failed_is_not_fitted(tiny, monkeypatch):
    from assay.methods.serving.ellie_sql import dpo

    router = DPORouter(*tiny, epochs=1)
    monkeypatch.setattr(dpo, "dpo_loss", lambda logits, *rest: logits.sum() * math.nan)
    with pytest.raises(ValueError, match="not finite"):
        router.fit(["a", "b"], [[1, 1, 1], [0, 0, 1]])
    assert not hasattr(router, "model_")


def test_what_a_small_model_cannot_answer_with(tiny):
    with pytest.raises(ValueError, match="single tokens"):
        DPORouter(*tiny, answers=("0", "0"))
    with pytest.raises(ValueError, match="single tokens"):
        DPORouter(*tiny, answers=("zero and more", "1"))
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        DPORouter(*tiny).predict(["x"])
    with pytest.raises(ValueError, match="results"):
        DPORouter(*tiny).fit(["x"], [[1, 0]])


# ---- the server's router

ASKED = [f"what is {n} plus {n}?" for n in range(20)] + [
    f"prove that the sum of {n} cubes is a square" for n in range(20)
]
BOTH = np.array([[1.0, 1.0]] * 20 + [[0.0, 1.0]] * 20)
PRICES = [1.0, 10.0]


def test_requests_of_all_endpoints_are_read():
    for document, text in (
        ({"prompt": "a"}, "a"),
        ({"prompt": ["a", "b"]}, "a b"),
        ({"prompt": [1, 2]}, ""),
        ({"input": "a"}, "a"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, "a"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "a"),
        ({"messages": []}, ""),
        ({"messages": "x"}, ""),
        ({"messages": [5, None]}, ""),
        ({}, ""),
    ):
        assert request_text(document) == text
    assert request_features([]).shape == (0, 257)


def test_requests_in_any_script_are_told_apart():
    found = request_features(["почему небо синее?", "напиши стихи", "空はなぜ青い", "Größe", "größe"])
    assert len({row.tobytes() for row in found}) == 4
    assert (found[3] == found[4]).all()
    assert (found[:, -1] > 0).all()
    assert np.linalg.norm(found[:, :-1], axis=1) == pytest.approx(1)


def test_hashed_words_are_the_same_everywhere():
    found = hashed_words([["how", "many"], []], width=8)
    assert found.shape == (2, 8)
    assert np.linalg.norm(found[0]) == pytest.approx(1)
    assert (found[1] == 0).all()
    assert (hashed_words([["how", "many"]], width=8)[0] == found[0]).all()
    assert not (hashed_words([["many", "how"]], width=64) == hashed_words([["how", "many"]], width=64)).all()


@pytest.fixture(scope="module")
def trained():
    return ModelRouter.trained(["small", "large"], ASKED, BOTH, PRICES, most_lost=0.0, strength=100.0)


def test_a_router_of_models_is_kept_in_a_file(trained, tmp_path):
    file = tmp_path / "router.json"
    trained.save(file)
    again = ModelRouter.load(file)
    for text, name in (("what is 7 plus 9?", "small"), ("prove that the sum of 99 cubes is a square", "large")):
        assert trained({"prompt": text}) == again({"prompt": text}) == (name, 0)
    features = request_features(ASKED)
    assert again.router.predict_proba(features) == pytest.approx(trained.router.predict_proba(features))
    for how in ("label", "cost"):
        router = TierRouter(LogisticRegression(), how=how, costs=[1, 10], threshold=0.1).fit(features, BOTH)
        ModelRouter(["a", "b"], router).save(file)
        assert (ModelRouter.load(file).router.predict(features) == router.predict(features)).all()
    from sklearn.neighbors import KNeighborsClassifier

    with pytest.raises(ValueError, match="not linear"):
        ModelRouter(["a", "b"], TierRouter(KNeighborsClassifier()).fit(features, BOTH)).save(file)
    with pytest.raises(ValueError, match="names"):
        ModelRouter(["a", "a"], router)


def test_files_that_hold_no_router_are_refused(trained, tmp_path):
    file = tmp_path / "router.json"
    trained.save(file)
    good = json.loads(file.read_text())

    def is_refused(text):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="router.json"):
            ModelRouter.load(file)

    for text in ("", "{}", "[]", "null", "nonsense", "[" * 9999):
        is_refused(text)
    linear = good["classifiers"][0]
    for change in (
        {"format": 2},
        {"models": ["a"]},
        {"models": ["a", "a"]},
        {"models": [1, 2]},
        {"width": 3},
        {"width": -1},
        {"how": "x"},
        {"threshold": "x"},
        {"classifiers": []},
        {"classifiers": [7]},
        {"classifiers": [{**linear, "classes": [0, 0]}]},
        {"classifiers": [{**linear, "classes": [0, 5]}]},
        {"classifiers": [{**linear, "weights": [[0.0]]}]},
        {"classifiers": [{**linear, "bias": [1.0, 2.0]}]},
        {"classifiers": [{**linear, "bias": ["x"]}]},
        {"how": "cost", "classifiers": [0, 1], "prices": [1.0]},
    ):
        is_refused(json.dumps({**good, **change}))
    is_refused(json.dumps(good).replace(str(linear["bias"][0]), "NaN"))
    with pytest.raises(InputError, match="nothing.json"):
        ModelRouter.load(tmp_path / "nothing.json")
