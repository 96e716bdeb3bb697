"""Profiles: every moment and every MAC in its place, and drawings of them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from tests import tiny
from torch import nn

from assay.measure import plots
from assay.measure import profile as module
from assay.measure.cost import count_cost
from assay.measure.machine import Calibration, machine
from assay.measure.modules import watch_modules
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


def test_a_module_is_left_even_if_its_forward_raises_and_nobody_watches_afterwards():
    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    model, seen = nn.Sequential(nn.ReLU(), Fails()), []
    with (
        pytest.raises(ArithmeticError),
        watch_modules(lambda m: seen.append(f"+{type(m).__name__}"), lambda m: seen.append(f"-{type(m).__name__}")),
    ):
        model(torch.zeros(1))
    assert seen == ["+Sequential", "+ReLU", "-ReLU", "+Fails", "-Fails", "-Sequential"]
    model[0](torch.zeros(1))
    assert len(seen) == 6


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
    impossible = Row("m", "prefill", "linear", "float32", 1, 0, 10**9, 10**6, 0.01, 0.02, 1e11)
    assert (impossible.efficiency, impossible.gap, impossible.roofline_share) == (None, None, None)


def test_shares_of_limits_that_a_module_beat_are_void(llama):
    """A bandwidth above the calibrated one was seen: no share of the calibration means anything."""
    given = {"new_tokens": 1, "repeats": 1}
    good = profile_model(llama, torch.arange(20)[None], **given, calibration=CALIBRATION)
    assert good.void == ""
    assert 0 < good.roofline_share < 1
    assert good.as_dict()["void"] == ""
    slow = tiny.calibration(read_bandwidth=1e3, copy_bandwidth=1e3, cache_bandwidth={1: 1e3})
    found = profile_model(llama, torch.arange(20)[None], **given, calibration=slow)
    assert found.roofline_share is None
    assert re.fullmatch(
        r".+ took 0 % of the least time the calibrated limits allow\. They are too low, and shares of them are void; calibrate again on "
        r"a quiet machine \(assay doctor --calibrate\)\.",
        found.void,
    )
    assert "lm_head (prefill)" not in good.void
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert document["void"] == found.void
    for row in document["modules"] + document["groups"]:
        assert (row["efficiency"], row["gap"], row["roofline_share"]) == (None, None, None)
    texts = [text.get_text() for text in plots.gap_figure(found, "prefill").axes[0].texts]
    assert set(texts) == {" void"}


def test_the_module_that_beat_the_limits_most_is_named():
    def row(name: str, attainable: float) -> Row:
        return Row(name, "prefill", "linear", "float32", 1, 0, 10**6, 10**6, 0.1, attainable, 1e11)

    def profiled(*rows: Row) -> Profile:
        return Profile(list(rows), {"prefill": 0.1}, {}, 1, 1, None, CALIBRATION, {}, False)

    def void(*rows: Row) -> str:
        return profiled(*rows).void

    assert void(row("a", 0.1), row("b", 0.104)) == ""
    assert void(row("a", 0.11), row("b", 0.2), row("c", 0.01)).startswith("b (prefill) took 50 % of the least")
    assert void(row("", 0.2)).startswith("the model (prefill) took 50 %")
    fused = profiled(row("a", 0.1), row("b", 0.1))  # together faster than one after the other: that is no contradiction
    assert (fused.void, fused.roofline_share) == ("", pytest.approx(2))


def test_operators_that_cannot_be_counted_are_listed_for_all_phases():
    class Transform(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(torch.fft.rfft(x).real).real

    found = profile_model(Transform(), torch.zeros(64), repeats=1, calibration=CALIBRATION)
    assert found.uncounted == {"aten::_fft_r2c": 2}
    assert found.as_dict()["uncounted"] == found.uncounted


def made(*rows, seconds):
    """A profile of rows (name, kind, seconds, attainable seconds, macs, bytes), all of the prefill."""
    return Profile(
        rows=[
            Row(name, "prefill", kind, "float32", 1, 0, macs, moved, spent, least, 1e11)
            for name, kind, spent, least, macs, moved in rows
        ],
        seconds={"prefill": seconds},
        hooked_seconds={"prefill": sum(row[2] for row in rows)},
        prompt_tokens=8,
        new_tokens=1,
        machine=machine(),
        calibration=CALIBRATION,
        uncounted=[],
        noisy=False,
    )


def test_shares_of_a_profile_are_those_of_its_times():
    found = made(("a", "linear", 0.3, 0.1, 10**9, 10**6), ("b", "other", 0.1, 0.06, 0, 10**6), seconds=0.5)
    assert found.kinds()["linear"] == pytest.approx(
        {"seconds": 0.3, "attainable_seconds": 0.1, "macs": 1e9, "bytes": 1e6, "share": 0.75}
    )
    assert {kind: of["share"] for kind, of in found.kinds().items()} == pytest.approx(
        {"linear": 0.75, "attention": 0.0, "other": 0.25}
    )
    assert found.roofline_share == pytest.approx(0.16 / 0.5)
    assert [bar["share"] for bar in found.waterline()] == pytest.approx([0.75, 0.25])


def test_a_profile_without_time_has_no_shares():
    found = made(("a", "linear", 0.0, 0.1, 10**9, 10**6), seconds=0.0)
    assert [of["share"] for of in found.kinds().values()] == [0.0] * 3
    assert found.roofline_share == 0.0
    assert found.waterline() == []
    (row,) = found.rows
    assert (row.efficiency, row.gap, row.roofline_share) == (0.0, None, 0.0)


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


def test_waterline_bars_stand_side_by_side_and_their_numbers_above_their_middle():
    bars = [
        {"name": name, "share": share, "intensity": intensity, "dtype": "float32"}
        for name, share, intensity in [("a", 0.5, 20.0), ("b", 0.02, 3.0), ("c", 0.3, 1.0), ("d", 0.1, 0.0)]
    ]
    figure = plots.waterline_bars(bars, lambda dtype: 2.5, label="share", size=(6.0, 3.0))
    axes = figure.axes[0]
    places = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    expected = [(0.0, 0.5, 20.0), (0.5, 0.02, 3.0), (0.52, 0.3, 1.0), (0.82, 0.1, plots.LOWEST)]
    assert [value for place in places for value in place] == pytest.approx([v for place in expected for v in place])
    dry, wet = [bar.get_facecolor() for bar in axes.patches[1:3]]
    assert dry == axes.patches[0].get_facecolor() != wet  # at the water or above it: not waiting for memory
    numbers = [(text.get_text(), text.get_position()[0]) for text in axes.texts]
    assert [number for number, _ in numbers] == ["1", "2", "3"]  # not the narrow one
    assert [x for _, x in numbers] == pytest.approx([0.25, 0.67, 0.87])
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["1 a (50 %)", "2 c (30 %)", "3 d (10 %)"]


def test_pictures_of_different_widths_stand_below_one_another_on_white(tmp_path):
    from matplotlib.image import imread

    wide, narrow = plots.bare_axes(4.0, 1.0)[0], plots.bare_axes(2.0, 0.5)[0]
    narrow.set_facecolor("red")
    plots.save_png([wide, narrow], tmp_path / "two.png")
    picture = imread(tmp_path / "two.png")
    assert picture.shape[:2] == (130 + 65, 4 * 130)
    assert (picture[150, 5, :3] == [1, 0, 0]).all()
    assert (picture[130:, 2 * 130 :, :3] == 1).all()


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
