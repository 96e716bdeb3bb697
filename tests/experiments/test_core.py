"""What an experiment must declare, and what is refused."""

import json

import pytest

from assay.experiments import Experiment, Figure, Guard, Operator, Trial, experiment, experiments_of, rates
from assay.experiments.core import _REGISTRY
from assay.experiments.rates import Rate, chosen, searched

ATTENTION = Operator("attention", free="SDPA", exact="our dense kernel")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr("assay.experiments.core._REGISTRY", {})
    return


def declare(claim="toy/speed", **changes):
    fields = {
        "points": {"small": [{"tau": 0.9, "n": 1}, {"tau": 0.98, "n": 1}], "smoke": [{"tau": 0.5, "n": 1}]},
        "operator": ATTENTION,
        "paper": {"tau": 0.9, "n": 256},
        "departures": {"n": "the model's context ends at 1"},
        "decides": {"small": {"tau": 0.9, "n": 1}},
        "refuted_if": "it is slower",
    } | changes
    return experiment(claim, **{key: value for key, value in fields.items() if value is not None})(lambda **point: None)


def test_a_whole_declaration():
    found = declare().experiment
    assert isinstance(found, Experiment)
    assert found.slug == "toy"
    assert found.decides == {"small": {"tau": 0.9, "n": 1}, "smoke": {"tau": 0.5, "n": 1}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"claim": "toy"}, "must look like 'slug/what'"),
        ({"points": {"tiny": [{}]}}, r"unknown scale \['tiny'\]"),
        ({"points": {}}, "at least one point"),
        ({"points": {"small": []}}, "at least one point"),
        ({"refuted_if": " "}, "refuted_if .* must say which outcome"),
        ({"decides": None}, "has 2 points at scale small: decides must name the one that counts"),
        ({"decides": {"small": {"tau": 0.7, "n": 1}}}, "must be one of its points"),
        ({"decides": {"small": {"tau": 0.98, "n": 1}}}, "has tau=0.98, the paper 0.9: departures must say why"),
        ({"departures": None}, "has n=1, the paper 256: departures must say why"),
        ({"departures": {"n": " "}}, "must be a sentence"),
        ({"guard": Guard("perplexity", 0.0)}, "margin .* must be above 0, got 0.0"),
        ({"guard": Guard("perplexity", 0.1, without={"rnadom": "no"})}, "may name deleted, random, rival"),
    ],
)
def test_what_is_missing_or_contradicts_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        declare(**changes)


def test_operator_and_paper_are_no_options():
    with pytest.raises(TypeError, match="operator"):
        experiment("toy/x", points={"small": [{}]}, paper={}, refuted_if="x")


def test_a_claim_has_one_experiment():
    declare()
    function = declare  # of another module than the first
    function.__module__, before = "elsewhere", function.__module__
    try:
        with pytest.raises(ValueError, match="already has an experiment"):
            experiment("toy/speed", points={"smoke": [{}]}, operator=ATTENTION, paper={}, refuted_if="it is slower")(
                function
            )
    finally:
        function.__module__ = before


def test_a_paper_without_experiments():
    assert experiments_of("no_such_paper") == []
    assert _REGISTRY is not None
    assert Trial(int, int).free is None
    assert Figure(1.0, "x").low is None


@pytest.fixture
def rates_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "FILE", tmp_path / "rates.json")
    monkeypatch.setattr(rates, "_SEARCHES", {})
    return tmp_path / "rates.json"


def test_rates_are_searched_once_and_read_from_the_file(rates_file, capsys):
    losses = {("a", 1e-3): 2.0, ("a", 3e-3): 1.0, ("a", 1e-2): float("nan"), ("b", 1e-3): 1.0, ("b", 3e-3): 2.0}

    def score(arm, rate):
        if (arm, rate) not in losses:
            raise ValueError("the loss is inf at step 3")
        return losses[arm, rate]

    searched("toy/task", arms=["a", "b"], grid=[1e-2, 1e-3, 3e-3])(score)
    with pytest.raises(KeyError, match="make rates SLUG=toy"):
        chosen("toy/task", "a")
    rates.main(["toy"])
    assert chosen("toy/task", "a") == Rate(3e-3, (1e-3, 3e-3, 1e-2))
    assert chosen("toy/task", "b").rate == 1e-3
    assert "toy/task b: the best rate, 0.001, is at the edge of the grid" in capsys.readouterr().out
    kept = json.loads(rates_file.read_text())["toy/task"]
    assert kept["command"] == "make rates SLUG=toy"
    assert kept["arms"]["b"]["losses"]["0.01"] is None
    rates.main(["other"])
    assert json.loads(rates_file.read_text())["toy/task"] == kept


def test_two_rates_are_no_search():
    with pytest.raises(ValueError, match="at least three rates, got"):
        searched("toy/task", arms=["a"], grid=[1e-3, 1e-3, 1e-2])
