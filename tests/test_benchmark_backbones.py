"""benchmarks/backbones.py: what stands in its rows and table, and that no paper's backbone is missing."""

import json
import sys

import numpy as np
import pytest
import torch
from benchmarks import backbones
from scipy.stats import spearmanr

from assay.experiments.vision.training import SIZE
from assay.methods.core.vision.registry import registered
from assay.methods.vision import list_models


def test_every_paper_with_a_registered_backbone_stands_in_both_panels():
    papers = {registered(name).make.__module__.split(".")[3] for name in list_models()}
    assert papers == set(backbones.NAMES)
    assert papers <= set(backbones.small())
    for paper, names in backbones.NAMES.items():
        assert {registered(name).make.__module__.split(".")[3] for name in names} == {paper}


def test_small_networks_take_grey_crops_and_tell_twelve_classes():
    for name, make in backbones.small().items():
        with torch.device("meta"):
            assert make().eval()(torch.zeros(2, 1, SIZE, SIZE)).shape == (2, 12), name


def test_the_rank_correlation_is_spearmans_also_with_ties():
    generator = np.random.default_rng(0)
    tables = generator.integers(0, 6, (5, 9, 2)).astype(float)
    found = backbones.rank_correlation(tables)
    assert found == pytest.approx([spearmanr(*table.T).statistic for table in tables])
    assert backbones.rank_correlation(np.ones((1, 4, 2))) == [0.0]


def test_a_crossing_is_where_the_other_becomes_faster_for_good():
    tokens = [100, 400, 1600]
    assert backbones.crossing(tokens, [1, 4, 64], [2, 4.0001, 8]) == pytest.approx(400, rel=1e-3)
    assert backbones.crossing(tokens, [1, 4, 16], [2, 2, 8]) == pytest.approx(200)  # halfway, on logarithms
    assert backbones.crossing(tokens, [4, 4, 4], [2, 8, 2]) == pytest.approx(800)  # not the first time
    assert backbones.crossing(tokens, [1, 4, 16], [2, 8, 32]) is None
    assert backbones.crossing(tokens, [4, 8, 32], [2, 4, 8]) is None  # faster from the start


def test_bad_options(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["backbones.py", "--chart", "picture.html"])
    with pytest.raises(SystemExit):
        backbones.main()
    assert "--chart must end in .png, got picture.html" in capsys.readouterr().err


def test_scaling_rows_table_and_chart(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", ["backbones.py", "--quick", "--panel", "scaling", "--out", str(out), "--chart", str(picture)]
    )
    backbones.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    times = [row for row in rows if "milliseconds" in row]
    assert {(row["model"], row["tokens"]) for row in times} == {
        (name, n) for name in backbones.MIXERS for n in (49, 196)
    }
    for name in backbones.MIXERS:  # the exponent of a round is that of the two times, so its median lies between theirs
        (slope,) = (row["exponent"] for row in rows if row["model"] == name and "exponent" in row)
        assert slope["low"] <= slope["median"] <= slope["high"]
    assert all({"machine", "commit", "command", "created"} <= set(row) for row in rows)
    assert picture.stat().st_size > 1000
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["backbones.py", "--table", "--out", str(out)])
    backbones.main()
    printed = capsys.readouterr().out
    assert printed.count("| whole map |") == printed.count("| scan |") == 2
    assert "become faster than the whole map" in printed


def test_a_network_that_was_trained_is_not_trained_again(monkeypatch):
    monkeypatch.setattr(backbones, "ProcessPoolExecutor", None)
    monkeypatch.setattr(backbones, "small", lambda: {"resnet": lambda: torch.nn.Identity()})
    known = {"resnet": {"panel": "trained", "model": "resnet", "accuracy": {"mean": 50.0}}}
    (row,) = backbones.trained_rows(backbones.QUICK, known)
    assert row["accuracy"] == {"mean": 50.0}
    assert row["milliseconds_1"]["n"] >= 2


@pytest.mark.slow
def test_published_and_trained_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    for panel in ("published", "trained"):
        monkeypatch.setattr(sys, "argv", ["backbones.py", "--quick", "--panel", panel, "--out", str(out)])
        backbones.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model"] for row in rows if row["panel"] == "trained"} == set(backbones.small())
    counted = {row["count"]: row["rank_correlation"] for row in rows if "count" in row}
    assert set(counted) == set(backbones.COUNTS)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["backbones.py", "--table", "--out", str(out)])
    backbones.main()
    assert "| mobilenet_v2 | - | 3.5 M | 0.30 G |" in capsys.readouterr().out
