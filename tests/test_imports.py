"""The house stands without a circle: no module imports itself in the end, imports inside functions included."""

from __future__ import annotations

import graphlib

import grimp
import pytest


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("assay", cache_dir=None)


def test_no_ring_of_imports_anywhere(graph):
    order = graphlib.TopologicalSorter(
        {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    )
    order.prepare()  # raises CycleError, which names the ring


def test_a_family_of_papers_holds_papers_only(graph):
    from assay import catalogue

    families = {paper.family for paper in catalogue.papers()}
    papers = {(paper.family, paper.slug) for paper in catalogue.papers()}
    for family in families & {name.rsplit(".", 1)[1] for name in graph.find_children("assay.methods")}:
        rooms = {name.rsplit(".", 1)[1] for name in graph.find_children(f"assay.methods.{family}")}
        assert {(family, room) for room in rooms} <= papers


def test_the_rules_of_the_linter_cover_every_family(graph):
    """A new family is added to `pyproject.toml`, or its papers might import each other unseen."""
    import tomllib
    from pathlib import Path

    rules = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    families = graph.find_children("assay.methods") - {
        "assay.methods.core",
        "assay.methods.builtin",
        "assay.methods.transform",
    }
    core = next(rule for rule in rules if rule["name"] == "the core imports no paper")
    papers = next(rule for rule in rules if rule["name"] == "papers do not import each other")
    assert families | {"assay.methods.builtin"} == set(core["forbidden_modules"])
    assert {f"{family}.*" for family in families} == set(papers["modules"])
