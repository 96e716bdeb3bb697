"""Profiles: every moment and every MAC in its place, and drawings of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from tests import tiny
from torch import nn

from assay.measure import plots
from assay.measure import profile as module
from assay.measure.cost import count_cost
from assay.measure.machine import Calibration
from assay.measure.profile import Profile, Row, profile_model
from assay.measure.roofline import gap_point

CALIBRATION = tiny.calibration()


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_model(hidden_size=32, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def profile(llama) -> Profile:
    return profile_model(llama, torch.arange(20)[None], new_tokens=4, repeats=2, calibration=CALIBRATION)


def rows(profile, phase):
    return {row.name: row for row in profile.rows if row.phase == phase}


def test_prefill_is_one_forward_with_the_last_logits_only(profile):
    found = rows(profile, "prefill")
    assert found["model.layers.2.mlp.up_proj"].macs == 20 * 32 * 48
    assert found["lm_head"].macs == 32 * 97
    assert found["lm_head"].calls == 1
    assert (
        sum(row.params for row in found.values()) == 97 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 64) + 32
    )


def test_decode_is_a_step_for_every_token_after_the_first(profile):
    found = rows(profile, "decode")
    assert found["model.layers.0.mlp.up_proj"].calls == 3
    assert found["model.layers.0.mlp.up_proj"].macs == 3 * 32 * 48
    # the cache grows: 21, 22 and 23 keys
    assert found["model.layers.0.self_attn"].macs == (21 + 22 + 23) * 4 * 16
    assert profile.new_tokens == 4
    assert profile.prompt_tokens == 20


def test_one_new_token_has_no_decode_phase(llama):
    found = profile_model(llama, torch.arange(5)[None], new_tokens=1, repeats=1, calibration=CALIBRATION)
    assert list(found.seconds) == ["prefill"]
    assert {row.phase for row in found.rows} == {"prefill"}


def test_kinds(profile):
    for phase in ("prefill", "decode", None):
        kinds = profile.kinds(phase)
        assert set(kinds) == {"linear", "attention", "other"}
        assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
        assert all(kind["seconds"] > 0 for kind in kinds.values())
    both = profile.kinds()["linear"]
    apart = [profile.kinds(phase)["linear"] for phase in ("prefill", "decode")]
    assert both["macs"] == apart[0]["macs"] + apart[1]["macs"]
    assert profile.kinds("prefill")["attention"]["macs"] == 3 * 4 * 20 * 20 * 16 // 2


def test_times_of_modules_add_up(profile):
    for phase, seconds in profile.hooked_seconds.items():
        assert sum(row.seconds for row in profile.rows if row.phase == phase) == pytest.approx(seconds)


class Worker(nn.Module):
    """Takes so many nanoseconds of a clock that only moves when work is done."""

    clock = 0

    def __init__(self, nanoseconds, inner=None):
        super().__init__()
        self.nanoseconds, self.inner = nanoseconds, inner

    def forward(self, x):
        Worker.clock += self.nanoseconds
        return x + 1 if self.inner is None else self.inner(self.inner(x))


def test_a_modules_time_is_its_own(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: Worker.clock)
    model = Worker(30_000, Worker(10_000))
    found = rows(profile_model(model, torch.zeros(3), repeats=3, calibration=CALIBRATION), "prefill")
    assert found[""].seconds == pytest.approx(30e-6)
    assert found["inner"].seconds == found["inner"].fastest == pytest.approx(20e-6)
    assert found["inner"].calls == 2


def test_layers_are_grouped(profile):
    grouped = {row.name: row for row in profile.grouped("prefill")}
    each = [rows(profile, "prefill")[f"model.layers.{i}.mlp.up_proj"] for i in range(3)]
    together = grouped["model.layers.*.mlp.up_proj"]
    assert together.modules == 3
    assert together.macs == sum(row.macs for row in each)
    assert together.seconds == pytest.approx(sum(row.seconds for row in each))
    assert "model.layers.1.mlp.up_proj" not in grouped
    assert sum(r.seconds for r in profile.grouped()) == pytest.approx(sum(r.seconds for r in profile.rows))


def test_efficiency_gap_and_share():
    row = Row("m", "prefill", "linear", "float32", 1, 0, 10**9, 10**6, 0.1, 0.02, 1e11)
    assert row.efficiency == pytest.approx(0.2)
    assert row.gap == pytest.approx(5)
    assert row.roofline_share == pytest.approx(0.2)
    assert row.intensity == pytest.approx(2000)
    assert Row("m", "prefill", "other", "float32", 1, 0, 0, 10, 0.1, 0.02, 1e11).gap is None


def test_bound_takes_weights_from_memory_when_the_model_exceeds_the_cache():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False))
    x = torch.zeros(1, 1024)
    weights = 4 << 20
    small = Calibration(**{**CALIBRATION.as_dict(), "cache_bandwidth": {1 << 20: 2e11, 4 << 20: 1.5e11}})
    for calibration, bandwidth in ((CALIBRATION, 2e11), (small, 4e10)):
        row = rows(profile_model(model, x, repeats=1, calibration=calibration), "prefill")["0"]
        moved = weights if calibration is small else weights + 8 * 1024
        assert row.attainable_seconds == pytest.approx(moved / bandwidth)


def test_tied_weights_come_from_memory_at_each_user(llama):
    small = Calibration(**{**CALIBRATION.as_dict(), "cache_bandwidth": {1: 1e15}})
    found = rows(profile_model(llama, torch.arange(5)[None], repeats=1, calibration=small), "prefill")
    assert found["lm_head"].params == 0  # counted at the embedding
    assert found["lm_head"].attainable_seconds == pytest.approx(97 * 32 * 4 / 4e10)


def test_waterline_bars_share_the_time(profile):
    bars = profile.waterline("decode")
    assert 0.5 < sum(bar["share"] for bar in bars) <= 1 + 1e-9
    up = next(bar for bar in bars if bar["name"] == "model.layers.*.mlp.up_proj")
    row = next(row for row in profile.grouped("decode") if row.name == up["name"])
    assert up["intensity"] == pytest.approx(2 * row.macs / row.bytes)
    assert up["dtype"] == "float32"
    json.dumps(profile.waterline(), allow_nan=False)


def test_document_is_json(profile):
    document = json.loads(json.dumps(profile.as_dict(), allow_nan=False))
    assert {"machine", "calibration", "modules", "kinds", "phases"} <= set(document)
    assert document["modules"][0].keys() >= {
        "name",
        "seconds",
        "attainable_seconds",
        "efficiency",
        "gap",
        "macs",
        "bytes",
    }


def test_any_module_can_be_profiled_and_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5))
    model.train()
    found = profile_model(model, torch.randn(1, 3, 8, 8), repeats=1, calibration=CALIBRATION)
    assert model.training
    assert rows(found, "prefill")["0"].macs == count_cost(model.eval(), torch.randn(1, 3, 8, 8)).macs
    assert found.prompt_tokens == 0


def test_compiled_model_shows_its_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.compile(backend="eager")
    found = rows(profile_model(model, torch.randn(2, 4), repeats=1, calibration=CALIBRATION), "prefill")
    assert found["0"].macs == 32
    assert found["0"].seconds > 0


def test_drawings(profile, tmp_path):
    for phase in ("prefill", "decode"):
        for figure in (plots.waterline_figure(profile, phase), plots.gap_figure(profile, phase)):
            root = ET.fromstring(plots.svg(figure))
            assert root.tag.endswith("svg")
    figures = [plots.waterline_figure(profile, "prefill"), plots.gap_figure(profile, "decode", most=3)]
    plots.save_png(figures, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".png")] == ["p.png"]


def test_gap_figure_shows_attainable_inside_measured(profile):
    axes = plots.gap_figure(profile, "prefill", most=5).axes[0]
    measured, attainable = axes.containers[0], axes.containers[1]
    assert len(measured) == 5
    assert all(a.get_width() <= m.get_width() for a, m in zip(attainable, measured, strict=True))


def test_gap_plot_of_models():
    figure = plots.gap_points_figure([gap_point("a", 0.7, 1e9, 0.1, 1e11), gap_point("b", 0.8, 2e9, 0.1, 1e11)])
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in lines] == [[0.01, 0.1], [0.02, 0.1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: profile_model(m, torch.zeros(1, 0, dtype=torch.long)), "inputs"),
        (lambda m, p: profile_model(m, torch.zeros(1, 1, dtype=torch.long), new_tokens=0), "new_tokens"),
        (lambda m, p: profile_model(m, torch.zeros(1, 1, dtype=torch.long), repeats=0), "repeats"),
        (lambda m, p: profile_model(nn.ReLU(), torch.zeros(2), 3, calibration=CALIBRATION), "new_tokens must be 1"),
        (lambda m, p: plots.waterline_figure(p, "training"), "phase"),
        (lambda m, p: plots.gap_figure(p, "prefill", most=0), "most"),
        (lambda m, p: plots.gap_points_figure([]), "points"),
        (lambda m, p: plots.save_png([], "x.png"), "figures"),
    ],
)
def test_bad_arguments_are_named(llama, profile, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama, profile)
