"""A tiny model, and child processes that only pretend."""

from __future__ import annotations

import pytest

from tiny import write_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_llama(folder)
    return folder


@pytest.fixture
def world(monkeypatch):
    """Installs pretended children; the run's clock is theirs. The report's plots are left empty and the store is not opened: they cost
    more than all else."""
    from assay.tuner import budget, nodes, report, tune

    monkeypatch.setattr(report, "svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr(tune, "_remember", lambda run, lines: None)

    def install(children):
        monkeypatch.setattr(nodes, "run_isolated", children)
        monkeypatch.setattr(budget, "now", lambda: children.clock)
        return children

    return install
