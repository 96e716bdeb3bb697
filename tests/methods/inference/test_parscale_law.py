"""The scaling law reproduces the paper's fits, keeps scikit-learn's rules, and the cost model counts what real modules hold."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, LeaveOneOut, cross_val_predict
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_non_negative
from tests.tiny import tiny_model, token_ids
from transformers import Qwen2Config

from assay.methods.inference import parscale
from assay.methods.inference.parscale import ParScaleConfig, ParScaleForCausalLM, published
from assay.methods.inference.parscale import law as law_module
from assay.methods.inference.parscale.cost import A100, Machine, Shape, added_parameters, cost, increases
from assay.methods.inference.parscale.law import ParallelScalingLaw, averaged_excess, huber_objective
from assay.methods.inference.parscale.published import (
    COMMON,
    LOSSES,
    PARAMETERS,
    PREFIX_TOKENS,
    REPORTED,
    STREAMS,
    WIDTHS,
    table,
)


@pytest.fixture(scope="module")
def fits():
    return {corpus: ParallelScalingLaw().fit(*table(corpus)) for corpus in LOSSES}


# ------------------------------------------------------------------------------------------------------------------ the fits


@pytest.mark.parametrize(("corpus", "equivalent"), [("stack", 1.82), ("pile", 1.70)])
def test_the_papers_fit_is_reproduced(fits, corpus, equivalent):
    law = fits[corpus]
    assert law.k_ == pytest.approx(REPORTED[corpus]["k"], abs=0.01)
    assert law.score(*table(corpus)) == pytest.approx(REPORTED[corpus]["r2"], abs=0.001)
    assert law.equivalent(8) == pytest.approx(equivalent, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["stack", "pile"])
def test_all_starts_find_nothing_better(fits, corpus):
    whole = ParallelScalingLaw(starts=None).fit(*table(corpus))
    assert fits[corpus].objective_ == pytest.approx(whole.objective_, rel=1e-6)
    assert fits[corpus].k_ == pytest.approx(whole.k_, abs=1e-3)


def test_the_law_predicts_models_it_has_not_seen(fits):
    inputs, losses = table("stack")
    held = cross_val_predict(ParallelScalingLaw(starts=2), inputs, losses, cv=LeaveOneOut())
    assert r2_score(losses, held) > 0.99


def test_a_known_law_is_found():
    sizes, streams = np.meshgrid([1e8, 3e8, 1e9, 3e9], [1, 2, 4, 8])
    X = np.stack([sizes.ravel(), streams.ravel()], 1)
    y = 0.7 + (0.05 / (X[:, 0] / 1e9 * (0.5 * np.log(X[:, 1]) + 1))) ** 0.25
    law = ParallelScalingLaw().fit(X, y)
    assert (law.E_, law.A_, law.alpha_, law.k_) == pytest.approx((0.7, 0.05, 0.25, 0.5), rel=1e-2)
    assert law.objective_ < 1e-12
    none = ParallelScalingLaw().fit(X, 0.7 + (0.05 / (X[:, 0] / 1e9)) ** 0.25)
    assert none.k_ < 1e-3


def test_one_stream_is_the_chinchilla_form(fits):
    law = fits["stack"]
    sizes = np.array([1e8, 1e9, 1e10])
    wanted = law.E_ + (law.A_ * 1e9 / sizes) ** law.alpha_
    np.testing.assert_allclose(law.predict(np.stack([sizes, np.ones(3)], 1)), wanted)
    assert law.equivalent(1) == 1


def test_more_parameters_and_more_streams_lower_the_loss(fits):
    law = fits["pile"]
    assert (np.diff(law.predict([[n * 1e9, 2] for n in (0.5, 1, 2, 4)])) < 0).all()
    assert (np.diff(law.predict([[1e9, p] for p in (1, 2, 4, 8, 16)])) < 0).all()
    same = law.predict([[1e9, 8], [1e9 * law.equivalent(8), 1]])
    assert same[0] == pytest.approx(same[1])


def test_gradients_are_exact():
    inputs, losses = map(np.asarray, table("stack"))
    given = (np.log(inputs[:, 0] / 1e9), np.log(inputs[:, 1]), np.log(losses))
    for point in ([-0.4, -6.0, 0.2, 0.4], [-1.0, 0.0, 0.5, 0.1]):
        for delta in (1e-3, 10.0):
            value, gradient = huber_objective(np.array(point), *given, delta)
            error = check_grad(
                lambda p, d=delta: huber_objective(p, *given, d)[0],
                lambda p, d=delta: huber_objective(p, *given, d)[1],
                point,
            )
            assert error < 1e-4 * np.abs(gradient).max()
            assert value > 0


def test_averaging_errors():
    generator = np.random.default_rng(0)
    for rho in (0.0, 0.3, 0.9):
        errors = generator.multivariate_normal(np.zeros(4), rho + (1 - rho) * np.eye(4), size=200_000)
        assert (errors.mean(1) ** 2).mean() == pytest.approx(averaged_excess(4, rho), rel=0.02)
    assert averaged_excess(8, 1) == 1
    assert averaged_excess(8, 0) == 1 / 8
    for bad in (
        {"streams": 0, "correlation": 0},
        {"streams": 4, "correlation": 1.1},
        {"streams": 4, "correlation": -0.5},
    ):
        with pytest.raises(ValueError):
            averaged_excess(**bad)


# -------------------------------------------------------------------------------------------------------------- scikit-learn


def test_it_is_an_estimator_of_scikit_learn():
    inputs, losses = table("stack")
    law = ParallelScalingLaw(starts=3)
    assert clone(law).get_params() == {"delta": 1e-3, "starts": 3}
    assert law.set_params(starts=2).starts == 2
    with pytest.raises(NotFittedError):
        law.predict(inputs)
    with pytest.raises(NotFittedError):
        law.equivalent(2)
    assert law.fit(inputs, losses) is law
    assert law.n_features_in_ == 2
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(law)).predict(inputs), law.predict(inputs))
    assert ParallelScalingLaw(starts=2).fit(np.asarray(inputs, dtype=np.float32), losses).k_ == pytest.approx(
        law.k_, rel=1e-2
    )
    found = GridSearchCV(ParallelScalingLaw(starts=2), {"delta": [1e-3, 1e-1]}, cv=3).fit(inputs, losses)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()  # a fit that fails scores NaN
    alone = ParallelScalingLaw(starts=2, **found.best_params_).fit(inputs, losses)
    assert found.best_estimator_.k_ == pytest.approx(alone.k_, rel=1e-6)
    assert parscale.ParallelScalingLaw is ParallelScalingLaw
    with pytest.raises(AttributeError, match="nothing"):
        _ = parscale.nothing


def test_check_estimator(monkeypatch):
    """All of scikit-learn's own checks, whose tables of any width are read as some model's sizes and streams."""

    def columns(X):
        if X.shape[1] < 2:
            raise ValueError("X must have 2 columns, got n_features=1")
        check_non_negative(X, "ParallelScalingLaw")
        return np.exp(20 + X[:, 0]), 1 + X[:, 1]

    monkeypatch.setattr(law_module, "_columns", columns)
    found = check_estimator(ParallelScalingLaw(starts=1), on_fail=None, on_skip=None)
    assert [check["check_name"] for check in found if check["status"] == "failed"] == []
    assert sum(check["status"] == "passed" for check in found) > 40


def test_bad_tables_are_refused():
    X, y = map(np.asarray, table("stack"))
    for match, inputs, losses in (
        ("2 columns", X[:, :1], y),
        ("2 columns", np.c_[X, X], y),
        ("Negative values", X * [-1, 1], y),
        ("parameters above 0", X * [0, 1], y),
        ("at least one stream", X * [1, 0], y),
        ("above 0", X, y - 1.05),
        ("more than one number of streams", X[:6], y[:6]),
        ("minimum of 4", X[4:7], y[4:7]),
        ("NaN", np.where(X == 1, np.nan, X), y),
        ("inconsistent", X, y[:-1]),
        ("infinity", X, np.where(y > 1.17, np.inf, y)),
    ):
        with pytest.raises(ValueError, match=match):
            ParallelScalingLaw(starts=1).fit(inputs, losses)
    for settings in ({"delta": 0.0}, {"delta": math.nan}, {"starts": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ParallelScalingLaw(**settings).fit(X, y)
    law = ParallelScalingLaw(starts=1).fit(X, y)
    with pytest.raises(ValueError, match="2 features"):
        law.predict(X[:, :1])
    with pytest.raises(ValueError, match="streams"):
        law.equivalent(0)
    with pytest.raises(ValueError, match="corpus"):
        table("other")


# ------------------------------------------------------------------------------------------------------------------ sizes, costs


def released_shape(column: int) -> dict:
    width, intermediate = WIDTHS[column]
    return {**COMMON, "hidden_size": width, "intermediate_size": intermediate}


@pytest.mark.parametrize("column", range(6))
def test_parameters_are_those_of_the_released_models(column):
    """Counted with real modules on "meta", for every size and number of streams."""
    fields = released_shape(column)
    embedding = fields["vocab_size"] * fields["hidden_size"]
    shape = Shape.of(Qwen2Config(**fields))
    for row, count in enumerate(STREAMS):
        with torch.device("meta"):
            config = ParScaleConfig(base=Qwen2Config(**fields), parscale_n=count, parscale_n_tokens=PREFIX_TOKENS)
            model = ParScaleForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) - embedding == PARAMETERS[row][column]
        assert shape.body + added_parameters(shape, count) == PARAMETERS[row][column]


def test_costs_are_those_of_real_tensors():
    base = tiny_model()
    model = ParScaleForCausalLM.from_base(base, parscale_n=3, parscale_n_tokens=5)
    shape, ids = Shape.of(base.config), token_ids(2, 6)
    found = cost(shape, streams=3, prefix=5, batch=2, prompt=6, new=4, bytes_each=4)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache
        for _ in range(3):  # the prompt gives the first token of four, and the last one is not read
            model(input_ids=ids[:, :1], cache=cache)
    own = [p for name, p in model.named_parameters() if not name.startswith("base.")]
    assert found.weights == sum(p.nbytes for p in base.parameters())
    assert found.added == sum(p.nbytes for p in own)
    assert found.cache == cache.bytes()
    assert cost(shape, streams=3, prefix=5, new=0).cache == cost(shape, streams=3, prefix=5, new=1).cache


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {}), ("Llama", {"attention_bias": True}), ("Llama", {"mlp_bias": True}), ("Qwen2", {}), ("Mistral", {})],
)
def test_a_shape_has_all_parameters(kind, changes):
    model = tiny_model(kind, **changes)
    shape = Shape.of(model.config)
    assert shape.body + shape.embedding == sum(p.numel() for p in model.parameters())


def test_seconds_by_the_roofline():
    shape = Shape(64, 128, 2, 4, 2, 100)
    slow, wide = Machine(1e6, 1e30), Machine(1e30, 1e6)
    one, many = (cost(shape, streams=p, prefix=0, prompt=1, new=0, machine=slow).prefill for p in (1, 4))
    head = 2 * 100 * 64 / 1e6
    mixing = 2 * (4 * 64 * 65 + 64) / 1e6
    assert many - mixing - head == pytest.approx(4 * (one - head))  # the head does its work once
    one, many = (cost(shape, streams=p, prefix=0, prompt=1, new=0, machine=wide).prefill for p in (1, 4))
    cached = 2 * 2 * 2 * 16 * 2 / 1e6
    assert many - one == pytest.approx(3 * cached + (4 * 64 * 65 + 64) * 2 / 1e6)  # weights are read once
    assert cost(shape, streams=4, prefix=7).cache - cost(shape, streams=4, prefix=0).cache == 4 * 7 * 2 * 2 * 2 * 16 * 2


def test_seconds_of_decoding_by_the_roofline():
    """Three steps after the prompt for an answer of four tokens, each behind one token more."""
    shape, mixing, head = Shape(64, 128, 2, 4, 2, 100), 3 * 64 * 65 + 64, 100 * 64
    sizes = {"streams": 3, "prefix": 7, "batch": 2, "prompt": 5}
    seen = [7 + 5 + step + 1 for step in range(3)]
    found = cost(shape, **sizes, new=4, machine=Machine(1e30, 1e6)).decoding
    token = 2 * 2 * 2 * 16 * 2  # bytes: keys and values, layers, heads of them, head dim
    assert found == pytest.approx(sum(2 * (shape.body + mixing + head) + 3 * 2 * keys * token for keys in seen) / 1e6)
    found = cost(shape, **sizes, new=4, machine=Machine(1e6, 1e30)).decoding
    pairs = 4 * 2 * 4 * 16  # operations of a query and a key in all layers and heads
    each = [2 * (3 * 2 * shape.body + 2 * mixing + 2 * head) + 3 * 2 * keys * pairs for keys in seen]
    assert found == pytest.approx(sum(each) / 1e6)
    assert cost(shape, **sizes, new=1).decoding == cost(shape, **sizes, new=0).decoding == 0


def test_a_larger_shape_has_the_parameters_asked_for():
    shape = Shape.of(Qwen2Config(**released_shape(3)))
    assert shape.body == PARAMETERS[0][3]
    for times in (0.5, 1.0, 1.82):
        assert shape.grown(times).body == pytest.approx(times * shape.body, rel=1e-9)
    assert shape.grown(1.0).width == pytest.approx(shape.width)
    for column in range(6):  # the paper's own sizes lie on nearly the same line
        other = Shape.of(Qwen2Config(**released_shape(column)))
        assert shape.grown(other.body / shape.body).width == pytest.approx(other.width, rel=0.02)


def test_the_papers_increases(fits):
    """22 times less memory and 6 times less latency: ours are of that size at the lengths the paper's script takes by itself."""
    shape = Shape.of(Qwen2Config(**released_shape(3)))
    found = increases(shape, fits["stack"].equivalent(8), streams=8)
    assert 15 < found["memory"] < 35
    assert 5 < found["latency"] < 15
    assert found["memory"] == pytest.approx(found["memory_parameters"] / found["memory_streams"])
    long = increases(shape, fits["stack"].equivalent(8), streams=8, prompt=8192)
    assert long["memory"] < 2  # keys and values grow with streams
    many = increases(shape, fits["stack"].equivalent(8), streams=8, batch=64)
    assert many["latency"] < 1  # and there is no idle arithmetic left
    assert A100.bandwidth == pytest.approx(1.8351e12)


def test_tables_that_docstrings_name_are_there():
    named = {
        name
        for file in Path(parscale.__file__).parent.glob("*.py")
        for name in re.findall(r"`published\.(\w+)`", file.read_text(encoding="utf-8"))
    }
    assert named >= {"WIDTHS", "COMMON", "PARAMETERS"}
    assert all(hasattr(published, name) for name in named)


def test_bad_sizes_are_refused():
    shape = Shape(64, 128, 2, 4, 2, 100)
    for call, match in (
        (lambda: cost(shape, streams=0), "streams"),
        (lambda: cost(shape, batch=0), "batch"),
        (lambda: cost(shape, prompt=0), "prompt"),
        (lambda: cost(shape, new=-1), "new"),
        (lambda: cost(shape, streams=2, prefix=-1), "prefix"),
        (lambda: shape.grown(math.nan), "times"),
        (lambda: added_parameters(shape, 0), "streams"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
