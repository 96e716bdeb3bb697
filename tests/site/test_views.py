"""What the pages say, before they are drawn."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from tests.evidence.evidence_maker import estimate, make
from tests.site.conftest import CLAIM

from assay import catalogue
from assay.errors import InputError
from assay.site import views
from assay.site.charts import Point, bar, front, gains, pareto, roofline
from assay.site.views import MINE, Filter, paper_rows


def slugs(rows):
    return [row["slug"] for row in rows]


def test_every_paper_is_listed_once_the_measured_ones_first(shelf):
    rows = paper_rows(shelf.library(), Filter())
    assert sorted(slugs(rows)) == sorted(p.slug for p in catalogue.papers())
    status = [row["status"] for row in rows]
    assert status == sorted(status, key=["measured", "code", "planned"].index)
    assert rows[0]["slug"] == "xattention"


@pytest.mark.parametrize("family", ["attention", "vision"])
@pytest.mark.parametrize("saves", ["memory", "money"])
@pytest.mark.parametrize("model", ["vision", "graph"])
def test_filters_narrow_by_what_the_catalogue_says(shelf, family, saves, model):
    rows = paper_rows(shelf.library(), Filter(family=family, saves=saves, model=model))
    wanted = [
        p.slug
        for p in catalogue.papers()
        if p.family == family and saves in p.saves and {model, "any network"} & set(p.models)
    ]
    assert sorted(slugs(rows)) == sorted(wanted)


def test_a_verdict_keeps_the_claims_that_have_it(shelf):
    rows = paper_rows(shelf.library(), Filter(verdict="reproduced"))
    assert [[claim["id"] for claim in row["claims"]] for row in rows] == [[CLAIM]]
    planned = paper_rows(shelf.library(), Filter(verdict="planned"))
    assert {row["status"] for row in planned} == {"planned"}


def test_a_machine_keeps_what_was_measured_on_it(shelf):
    library = shelf.library()
    [row] = paper_rows(library, Filter(machine="other"))
    assert [c["word"] for c in row["claims"] if c["id"] == CLAIM] == ["refuted here"]
    [row] = paper_rows(library, Filter(machine="better"))
    assert [c["word"] for c in row["claims"] if c["id"] == CLAIM] == ["reproduced"]
    mine = paper_rows(library, Filter(machine=MINE, family="attention"))
    [claim] = [c for row in mine for c in row["claims"] if c["id"] == CLAIM]
    assert (claim["machines"], claim["disagree"]) == (2, False)
    [claim] = [c for row in paper_rows(library, Filter()) for c in row["claims"] if c["id"] == CLAIM]
    assert (claim["machines"], claim["disagree"]) == (3, True)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"family": "x"}, "family must be one of"),
        ({"machine": "nobody"}, "machine must be one of"),
        ({"model": "human"}, "model must be one of"),
        ({"colour": "red"}, "no parameter 'colour'"),
        ({"q": "x" * 501}, "at most 500"),
    ],
)
def test_bad_filters(shelf, query, says):
    with pytest.raises(InputError, match=says):
        Filter.of(query, shelf.library())


def test_against_what_is_free_the_bar_is_another(shelf):
    library = shelf.library()
    record = library.of(CLAIM, "mine")[0].record
    assert (gains(record).low, gains(record).high) == (1.9, 2.1)
    assert (gains(record, "free").median, gains(record, "free").paper) == (1.6, None)
    assert gains(record, "exact") is None
    assert bar(record, "exact") == ""
    assert bar(record) != bar(record, "free") != ""


@pytest.mark.parametrize(
    ("changes", "low", "median", "high", "none"),
    [
        ({"form": "saved", "unit": "%", "measured": estimate(20, 50, 60), "free": 20.0}, 1.0, 1.6, 2.0, 1.0),
        (
            {"form": "ratio", "higher_is_better": False, "measured": estimate(0.25, 0.5, 1.0), "free": 0.5},
            0.5,
            1.0,
            2.0,
            1.0,
        ),
        ({"form": "points", "unit": "points", "measured": estimate(1, 2, 3), "free": 1.5}, -0.5, 0.5, 1.5, 0.0),
    ],
)
def test_gains_of_figures_over_a_free_figure(changes, low, median, high, none):
    found = gains(make(claim=CLAIM, kind="figure", **changes), "free")
    assert (found.low, found.median, found.high, found.none) == pytest.approx((low, median, high, none))


def test_the_bar_lies_where_its_figures_say():
    record = make(claim=CLAIM, measured=estimate(1, 2, 4), paper_value=16.0)
    drawn = bar(record)
    x = {value: 6 + math.log(value) / math.log(16) * 156 for value in (1, 2, 4, 16)}
    assert f'cx="{x[2]:.1f}"' in drawn
    assert f'x1="{x[1]:.1f}" x2="{x[4]:.1f}"' in drawn
    assert f"M{x[16]:.1f} " in drawn


def test_a_gain_without_end_is_not_drawn():
    assert bar(make(claim=CLAIM, kind="figure", form="saved", unit="%", measured=estimate(50, 99, 100))) == ""


def test_texts_in_pictures_are_escaped():
    drawn = pareto([Point("<script>", 2.0, 1.0, '"><x>', 'javascript:"x"')], "a < b")
    assert "<script>" not in drawn
    assert "<x>" not in drawn
    assert "&lt;script&gt;" in drawn
    assert 'href="javascript:&quot;x&quot;"' in drawn
    assert "<float32" not in roofline({"<float32>": 1e12, "int8": 3e12}, 2e10)


def test_the_plot_tells_recipes_from_claims_and_shows_intervals():
    claim = Point("a/b", 2.0, 1.0, "reproduced", gains=(1.5, 3.0), losses=(0.5, 1.5))
    recipe = Point("dtype + xattention", 4.0, 2.0, "proven", recipe=True)
    drawn = pareto([claim, recipe], "title")
    assert drawn.count("<circle") == drawn.count("<rect") == 1
    [whisker] = re.findall(r'<path class="whisker" d="([^"]*)"', drawn)
    assert whisker.count("M") == 2
    assert "whisker" not in pareto([recipe], "title")
    ElementTree.fromstring(drawn)


@pytest.mark.parametrize("ends", [(0.0, math.inf), (1e-300, 1e300), (math.nan, 2.0), (3.0, 1.0), (-math.inf, math.inf)])
def test_an_interval_without_end_leaves_room_for_the_points(ends):
    points = [Point("a", 2.0, 1.0, "", gains=ends, losses=ends), Point("b", 1.5, 0.5, "")]
    drawn = pareto(points, "title")
    places = [float(x) for x in re.findall(r'<circle class="dot" cx="([\d.]+)"', drawn)]
    assert len(places) == 2
    assert abs(places[0] - places[1]) > 20
    assert not re.search(r"nan|inf", drawn)
    ElementTree.fromstring(drawn)


def test_names_in_the_plot_do_not_lie_on_each_other():
    points = [Point(f"a claim of a long name, number {i}", 2.0 + i / 100, 1.0 + i / 100, "") for i in range(12)]
    drawn = pareto(points, "title")
    shown = re.findall(r'x="([\d.]+)" y="([\d.]+)" text-anchor="(?:end|start)">a claim', drawn)
    assert 1 <= len(shown) < 12
    heights = sorted(float(y) for _, y in shown)
    assert all(b - a >= 12 for a, b in zip(heights, heights[1:], strict=False))
    assert drawn.count("<title>a claim of a long name") == 12


def test_the_front_against_every_pair():
    points = [Point(str(i), 1 + (i * 37 % 11) / 3, (i * 53 % 13) - 4, "") for i in range(24)]
    best = front(points)
    for point in points:
        beaten = any(
            (o.gain >= point.gain and o.loss <= point.loss and (o.gain, o.loss) != (point.gain, point.loss))
            for o in points
        )
        assert (not beaten) == any((b.gain, b.loss) == (point.gain, point.loss) for b in best)


def test_bibtex_is_made_of_what_is_certain():
    text = views.bibtex(catalogue.get("xattention"))
    assert text.startswith("@misc{xattention,\n")
    assert "eprint = {2503.16428}" in text
    assert text.count("{") == text.count("}")
    without = next(p for p in catalogue.papers() if p.arxiv is None)
    assert "eprint" not in views.bibtex(without)


def test_when_not_to_use_it_comes_from_the_docstring():
    assert "decoding" in views.when_not(catalogue.get("xattention"))
    assert views.when_not(catalogue.get("flightllm")) == ""


def test_lineage_goes_both_ways():
    [edge] = views.lineage("frontier_training")
    [back] = [e for e in views.lineage("zero") if e["slug"] == "frontier_training"]
    assert (edge["relation"], back["relation"]) == ("builds on", "is built on by")
    assert edge["source"] == back["source"]


def test_a_machine_that_says_nonsense_is_shown_all_the_same():
    facts = views.machine_facts(
        {"cpu": 7, "cores": "many", "ram_bytes": float("nan"), "flags": "avx", "versions": [1]}, "f"
    )
    assert facts == {
        "fingerprint": "f", "cpu": "7", "cores": None, "ram_gib": None, "flags": [], "gpu": "", "os": "", "virtual": False, "versions": {},
    }  # fmt: skip
