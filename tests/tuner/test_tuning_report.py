"""The report says in words what was measured, adds up, and draws nothing that says nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from assay.measure.stats import positive_median
from assay.tuner import report
from assay.tuner.noninferiority import look
from assay.tuner.outcome import Outcome, Row
from assay.tuner.recipe import Recipe, Step
from assay.tuner.report import kinds, pareto_plot, predicted_plot, render, told, unfit, waterline_plot
from assay.tuner.words import quality_words
from assay.tuner.work import Settings

DTYPE = Step(transform="dtype", config={"dtype": "bfloat16"})
INT8 = Step(transform="fp8_vs_int8", config={"smooth": None, "rotation": 16, "skip": [], "head": False})
SPARSE = Step(transform="xattention", config={"tau": 0.95, "stride": 8, "block": 64})
COMPILE = Step(transform="compile", config={"mode": "default", "region": "blocks"})
LIMITS = SimpleNamespace(peak_flops={"float32": 2e11, "bfloat16": 8e11, "int8": 2e12}, read_bandwidth=2e10)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm", "act_fn")


def row(kind, steps, cost=None, drop=0.0, predicted=None, **rest):
    found = Row(
        kind, Recipe(architecture="llama", steps=tuple(steps)), rest.pop("status", "ok"), cost, seconds=12.3, **rest
    )
    if cost is not None:
        found.samples, found.predicted = [cost] * 5, predicted
        found.drop, found.drop_low, found.drop_high = drop, drop - 0.001, drop + 0.001
    return found


def profile(scale, linear=0.7):
    """Seconds by kind that do not add up to what was measured: profiling takes time of its own."""
    shares = {"linear": linear, "attention": 0.9 - linear, "other": 0.1}
    bars = [
        {
            "name": f"model.layers.*.mlp.{name}",
            "share": 0.9 / len(MODULES),
            "intensity": 3.0 + 40 * i,
            "dtype": "bfloat16",
        }
        for i, name in enumerate(MODULES)
    ]
    return {"kinds": {name: {"seconds": 1.4 * scale * share} for name, share in shares.items()}, "waterline": bars}


def judged(differences=(0.005, 0.007) * 15, attempt=0):
    """What judging the best on 30 documents found, of which the first look takes half."""
    found = look({"prefill": differences[:15]}, 0.01, 0.01)
    before, after = [2.0] * len(differences), [2.0 + lost for lost in differences]
    return {
        "verdict": found.verdict,
        "reason": "",
        "looks": [found.document()],
        "source": "30 windows of 2064 tokens of bundled text (the proof's documents)",
        "figures": {"prefill": {"baseline": before, "candidate": after, "kl": [0.01] * 30, "top1": [0.9] * 30}},
        "kl": {"path": "prefill", "mean": 0.01, "low": 0.009, "high": 0.011},
        "top1": {"path": "prefill", "mean": 0.9, "low": 0.89, "high": 0.91},
        "eval": None,
    }


def outcome(goal="ttft", rows=None, best=-1):
    rows = rows or [
        row("baseline", [], 0.4),
        row("free", [DTYPE], 0.21, 0.0004),
        row("free", [DTYPE, COMPILE], 0.2, 0.0004),
        row("candidate", [DTYPE, INT8], 0.12, 0.004, 0.5),
        row("candidate", [DTYPE, SPARSE], 0.18, 0.3, 0.7),
        row("candidate", [DTYPE, INT8, COMPILE], status="failed", error="out of memory"),
        row("candidate", [DTYPE, INT8, SPARSE], 0.1, 0.006, 0.4),
    ]
    chosen, free = rows[best], next((r for r in rows[::-1] if r.kind == "free"), rows[0])
    survey = profile(0.4) | {"unfit": {"dtype": "no float32 parameters", "prepacking": "does not serve the goal ttft"}}
    samples = {"baseline": rows[0].samples, "free": free.samples, "best": chosen.samples}
    final = {"samples": samples, "judged": judged(), "load_before": 0.0, "load_after": 0.0}
    return Outcome(
        Settings("some/model", goal, 2048, 16),
        0.01,
        rows,
        survey,
        chosen,
        free,
        rows[0],
        final,
        True,
        Path("out"),
        99.0,
        {"threads": 2},
        after=profile(0.1, 0.5),
    )


@pytest.fixture(autouse=True)
def plots(monkeypatch):
    """Plots are left empty, for they cost more than all else here; gives what really writes them."""
    write = report.svg
    monkeypatch.setattr(report, "svg", lambda figure: "<svg></svg>")
    return write


def page(found):
    return render(found, found.document(), found.after, LIMITS)


def text_of(html):
    """What a reader sees, without the plots."""
    html = re.sub(r"<(svg|style).*?</\1>", " ", html, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split()).replace("&#39;", "'")


def test_recipes_stand_in_words_before_they_stand_as_code():
    shown = text_of(page(outcome()))
    words = "bfloat16, INT8 linears with rotation, block-sparse attention at tau 0.95"
    assert f"Recipe: {words}" in shown
    code = "dtype(dtype=bfloat16) + fp8_vs_int8("
    assert shown.index(words) < shown.index(code)
    assert "candidate bfloat16, INT8 linears with rotation dtype(dtype=bfloat16) + fp8_vs_int8(" in shown
    assert "as loaded 400.0 400.0 to 400.0 as loaded free" in shown  # no code where the words say it all


def test_the_level_of_three_values_has_the_interval_of_three_values():
    """Not that of their bootstrap, which ends at the smallest and the largest and covers three times in four."""
    found = outcome("memory")
    found.final["samples"]["best"] = [100 * 2.0**20, 110 * 2.0**20, 104 * 2.0**20]
    shown, exact = found.level("best"), positive_median([100, 110, 104])
    assert (shown["value"], shown["low"], shown["high"]) == pytest.approx((104, exact.low, exact.high))
    assert shown["low"] < 100 < 110 < shown["high"]


@pytest.mark.parametrize("goal", ["ttft", "decode"])
def test_a_level_of_one_value_has_no_interval(goal):
    found = outcome(goal)
    found.final |= {"samples": found.final["samples"] | {"baseline": [0.5]}, "apart": ["baseline"]}
    shown = found.level("baseline")
    assert (shown["low"], shown["high"]) == (None, None)
    assert f"as loaded {shown['value']:.1f} one run" in text_of(page(found))


@pytest.mark.parametrize("goal", ["ttft", "decode", "throughput"])
def test_before_is_the_model_as_loaded_and_adds_up_to_it(goal):
    found = outcome(goal)
    table = kinds(found, found.after["kinds"])
    assert [line["name"] for line in table] == ["linear", "attention", "other", "total"]
    for column, cost in (("before", 0.4), ("after", 0.1)):
        assert table[-1][column] == pytest.approx(1e3 * cost)
        assert sum(line[column] for line in table[:-1]) == pytest.approx(table[-1][column])
    assert table[0]["before"] == pytest.approx(0.7 * 400)
    assert table[0]["after"] == pytest.approx(0.5 * 100)
    shown = text_of(page(found))
    assert "kind of work as loaded, ms best, ms linear 280 50 attention 80 40 other 40 10 total 400 100" in shown


def test_without_a_profile_of_the_best_its_column_is_empty():
    found = outcome()
    found.after = {"kinds": {}, "waterline": []}
    shown = text_of(page(found))
    assert "linear 280 attention 80 other 40 total 400 The totals" in shown


def test_what_could_not_be_run_in_turns_is_not_called_interleaved():
    found = outcome()
    assert "The three ran interleaved" in text_of(page(found))
    found.final["apart"] = ["baseline"]
    shown = text_of(page(found))
    assert "interleaved" not in shown
    assert "ratios of baseline are of medians" in shown


@pytest.mark.parametrize("goal", ["memory", "energy"])
def test_goals_that_are_no_times_are_divided_in_percent(goal):
    shown = text_of(page(outcome(goal)))
    assert "kind of work as loaded, % best, % linear 70 50 attention 20 40 other 10 10 total 100 100" in shown


def test_nothing_that_ran_stands_under_what_does_not_fit():
    found = outcome()
    assert unfit(found) == {"prepacking": "does not serve the goal ttft"}
    assert "no float32 parameters" not in text_of(page(found))
    found.rows = found.rows[:1]
    assert set(unfit(found)) == {"dtype", "prepacking"}


@pytest.mark.parametrize(
    ("drop", "low", "high", "verdict", "says"),
    [
        (0.004, 0.002, 0.006, "holds", "Perplexity rises by 0.40 %; over 15 documents, with 98 % certainty, by 0.20 % to 0.60 %"),
        (0.008, 0.002, 0.012, "undecided", "Quality undecided: perplexity rises by 0.80 %; .* to 1.20 %, so it may be more than the 1 %"),
        (0.012, 0.008, 0.016, "undecided", "Quality undecided: .* to 1.60 %, so it may be more than the 1 % allowed."),
        (0.03, 0.02, 0.04, "lost", "Quality lost: perplexity rises by 3.00 %; .* to 4.00 %, all of it more than the 1 % allowed."),
        (-0.004, -0.006, -0.002, "holds", "falls by 0.40 %; .* by 0.20 % to 0.60 %, all of it within the 1 % allowed."),
        (0.0, 0.0, 0.0, "holds", "the same on every document; 1 % more would be allowed."),
        (float("inf"), float("inf"), float("inf"), "lost", "Quality lost: the likelihoods are not finite"),
        (None, None, None, "lost", "Quality lost: the likelihoods are not finite"),
        (0.01, 0.009, 0.01, "holds", "all of it within the 1 % allowed."),
    ],
)  # fmt: skip
def test_the_loss_against_the_limit_in_words(drop, low, high, verdict, says):
    found = {"drop": drop, "low": low, "high": high, "verdict": verdict, "judged": True, "level": 0.98, "documents": 15}
    assert re.search(says, quality_words(found, 0.01))


def test_the_quality_of_the_page_is_in_words():
    shown = text_of(page(outcome()))
    assert re.search(
        r"Perplexity rises by 0.60 %; over 15 documents, with 98 % certainty, by 0\.\d+ % to 0\.\d+ %, all of it within the 1 %",
        shown,
    )
    assert "Perplexity (prefill): 7.389 before, 7.433 after." in shown
    assert (
        "KL from the model as loaded: 0.0100 nats a token (0.0090 to 0.0110); the most likely token is the same"
        in shown
    )
    assert "Quality is judged against the model as loaded on 30 windows of 2064 tokens of bundled text" in shown


def test_the_score_of_the_users_evaluation_stands_beside_it():
    found = outcome()
    scores = {"name": "mine.jsonl", "metric": "exact match of the first line", "prompts": 500, "reason": ""}
    scores |= {"baseline": 0.61, "candidate": 0.608, "lost": 0.002, "low": -0.004, "high": 0.008, "level": 0.96}
    found.final["judged"]["eval"] = scores | {"verdict": "holds"}
    says = (
        "mine.jsonl (exact match of the first line, 500 prompts): 0.610 as loaded, 0.608 tuned; 0.2 points lost, with 96 % "
        "certainty -0.4 to 0.8, where 1 are allowed: it holds."
    )
    assert says in text_of(page(found))
    assert found.document()["quality"]["eval"]["candidate"] == 0.608


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_what_is_not_finite_is_none_in_the_document(broken):
    found = outcome()
    found.rows[4].drop = broken
    found.final["judged"]["figures"]["prefill"]["candidate"][0] = broken
    document = found.document()
    json.dumps(document, allow_nan=False)
    json.dumps([row.document() for row in found.rows], allow_nan=False)
    assert document["quality"]["candidate"] is None
    page(found)


def test_a_single_point_is_not_drawn():
    found = outcome(rows=[row("baseline", [], 0.4), row("candidate", [INT8], status="failed", error="died")], best=0)
    found.final["judged"], found.rows[0].quality = None, {"prefill": [2.0] * 15}
    assert pareto_plot(found) == predicted_plot(found) == ""
    assert waterline_plot([], "best", LIMITS) == ""
    html = page(found)
    assert html.count("<svg") == 2  # the two waterlines
    assert "Only one recipe gave a figure" in html
    assert "Predicted against measured" not in html
    assert page(outcome()).count("<svg") == 4


def test_a_trial_of_infinite_loss_is_a_row_and_no_point():
    found = outcome()
    found.rows[4].drop = found.rows[4].drop_low = found.rows[4].drop_high = float("inf")
    assert "+inf" in text_of(page(found))
    assert pareto_plot(found).startswith("<svg")


def test_shares_reached_and_paths_run_are_shown_where_a_row_has_them():
    found = outcome()
    assert "reached:" not in text_of(page(found))
    found.rows[3].reached = {"fp8_vs_int8": {"share": 0.9, "reached": "the experts of 24 layers stay as they are"}}
    found.rows[3].paths = {"block attention: kernel": 30, "w8a8: torch": 2}
    shown = text_of(page(found))
    assert (
        "reached: fp8_vs_int8: the experts of 24 layers stay as they are ran: block attention: kernel (30); w8a8: torch (2)"
        in shown
    )
    assert told({"fp8_vs_int8": "17 % of the weights"}) == "fp8_vs_int8: 17 % of the weights"


def test_what_others_wrote_is_text_and_not_html(plots, monkeypatch):
    monkeypatch.setattr(report, "svg", plots)
    found = outcome()
    found.rows[5].error = "<script>alert(1)</script>"
    found.survey["unfit"]["<b>"] = "<i>"
    html = page(found)
    assert "<script" not in html
    assert "<b>:" not in html
    assert html.count("<path") > 20  # the plots are drawn


def boxes(figure):
    """Where the texts of a figure lie, in pixels: those that hold something and are drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    beyond = set()  # labels of ticks outside the range that is shown
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            slack = 1e-9 * (high - low)
            outside = [tick for tick in ticks if not low - slack <= tick.get_loc() <= high + slack]
            beyond |= {label for tick in outside for label in (tick.label1, tick.label2)}
    texts = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in beyond
    ]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]


@pytest.mark.parametrize(
    ("goal", "scale"),
    [
        ("ttft", 1.0),
        ("decode", 1e-4),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("ttft", 1e-4), ("ttft", 1e4), ("decode", 1.0), ("decode", 1e4))
        ],
    ],
)
def test_no_label_of_a_plot_covers_another_or_leaves_it(monkeypatch, goal, scale):
    figures = []
    monkeypatch.setattr(report, "svg", lambda figure: figures.append(figure) or "<svg></svg>")
    found = outcome(goal)
    for one in found.rows:
        one.cost = one.cost and one.cost * scale
        one.drop = one.drop and one.drop * 30
        one.drop_low = one.drop_low and one.drop_low * 30
        one.drop_high = one.drop_high and one.drop_high * 30
    found.final["samples"] = {
        name: [value * scale for value in values] for name, values in found.final["samples"].items()
    }
    page(found)
    assert len(figures) == 4
    for figure in figures:
        width, height = figure.get_size_inches() * figure.dpi
        drawn = boxes(figure)
        assert len(drawn) > 4
        for i, (text, box) in enumerate(drawn):
            assert box.x0 > -1, text
            assert box.x1 < width + 1, text
            assert box.y0 > -1, text
            assert box.y1 < height + 1, text
            for other, second in drawn[i + 1 :]:
                assert not box.overlaps(second), f"{text!r} covers {other!r}"
