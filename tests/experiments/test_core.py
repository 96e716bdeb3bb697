"""The experiment decorator, and what every experiment of the house must have."""

import json
import sys
import types

import pytest

from assay.catalogue import papers
from assay.experiments import Experiment, Figure, Quality, Trial, core, experiment, experiments_of


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(core, "_REGISTRY", dict(core._REGISTRY))


def test_registering():
    @experiment("thing/claim", points={"smoke": [{"n": 1}], "full": [{"n": 2}, {"n": 3}]}, needs=("cuda",), minutes=5)
    def run(n):
        return Figure(n, "x")

    (found,) = experiments_of("thing")
    assert found == Experiment("thing/claim", run, {"smoke": [{"n": 1}], "full": [{"n": 2}, {"n": 3}]}, ("cuda",), 5)
    assert found.slug == "thing"
    assert found.memory_gib == 16.0
    assert run(4).value == 4  # the function stays as it is
    assert experiments_of("another") == []


@pytest.mark.parametrize(
    ("claim", "points", "words"),
    [
        ("thing", {"smoke": [{}]}, "slug/what"),
        ("thing/claim", {"tiny": [{}]}, "unknown scale.*tiny"),
        ("thing/claim", {"smoke": []}, "at least one point"),
        ("thing/claim", {}, "at least one point"),
    ],
)
def test_what_cannot_be_registered(claim, points, words):
    with pytest.raises(ValueError, match=words):
        experiment(claim, points=points)


def test_a_claim_has_one_experiment():
    def run():
        return Figure(1.0, "x")

    experiment("thing/claim", points={"smoke": [{}]})(run)
    experiment("thing/claim", points={"smoke": [{}]})(run)  # the module may be imported again
    other = types.FunctionType(run.__code__, {"__name__": "elsewhere"})
    other.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="already has an experiment in"):
        experiment("thing/claim", points={"smoke": [{}]})(other)


def test_experiments_are_found_by_their_slug(tmp_path, monkeypatch):
    """experiments/<family>/<slug>.py is imported when the slug is asked for, and no other."""
    import assay.experiments

    family = tmp_path / "families" / "toyfamily"
    family.mkdir(parents=True)
    (family / "__init__.py").touch()
    (family / "found_by_slug.py").write_text(
        "from assay.experiments import Figure, experiment\n"
        "@experiment('found_by_slug/claim', points={'smoke': [{}]})\n"
        "def run():\n    return Figure(1.0, 'x')\n"
    )
    (family / "broken.py").write_text("raise RuntimeError('nobody asked for this one')\n")
    monkeypatch.setattr(assay.experiments, "__path__", [*assay.experiments.__path__, str(family.parent)])
    (found,) = experiments_of("found_by_slug")
    assert found.claim == "found_by_slug/claim"
    assert found.run.__module__ == "assay.experiments.toyfamily.found_by_slug"
    for name in [name for name in sys.modules if name.startswith("assay.experiments.toyfamily")]:
        del sys.modules[name]


def test_defaults():
    trial = Trial(baseline=int, candidate=int)
    assert (trial.free, trial.quality, trial.details, trial.pairs, trial.warmup) == (None, None, {}, 10, 1)
    assert Quality("accuracy", 0.5).higher_is_better
    assert Figure(1.0, "dB").low is None


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: paper.slug)
def test_every_experiment_fits_the_catalogue(paper):
    """Its claim is listed, it has something quick to run, and its points travel as JSON and fit its arguments."""
    import inspect

    claims = {claim.id for claim in paper.claims}
    for found in experiments_of(paper.slug):
        assert found.claim in claims
        assert found.run.__module__ == f"assay.experiments.{paper.family}.{paper.slug}"
        assert "smoke" in found.points or found.needs
        for points in found.points.values():
            for point in points:
                assert json.loads(json.dumps(point, allow_nan=False)) == point
                inspect.signature(found.run).bind(**point)
