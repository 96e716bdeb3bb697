"""Claims and recipes side by side: what is among them, how it is narrowed, and the same as CSV."""

from __future__ import annotations

import csv
import io
import math

import pytest
from tests.evidence.evidence_maker import QUALITY, estimate, make
from tests.evidence.tuned_maker import run
from tests.site.conftest import CLAIM, HERE

from assay.errors import InputError
from assay.site import comparison
from assay.site.comparison import CHOSEN, Choice, compare, shown
from assay.site.library import Shelf

BOTH = "dtype + fp8_vs_int8 + xattention"
OTHER = "dtype + fp8_vs_int8 + attention_backend"


def compared(library, query="", **more):
    """The rows of an address's query, as (name, machine)."""
    pairs = [tuple(part.split("=")) for part in query.split("&") if part]
    seen = compare(library, Choice.of(pairs, library))
    return sorted((row["name"], row["machine"]) for row in seen["rows"])


def test_claims_and_recipes_have_their_gain_and_their_quality(shelf):
    seen = compare(shelf.library())
    assert {(row["kind"], row["machine"], row["gain"], row["dominated"]) for row in seen["rows"]} == {
        ("paper", "mine", 1.6, True),
        ("paper", "better", 3.6, False),
        ("paper", "other", 0.5, True),
        ("recipe", "mine", 4.0, False),
        ("recipe", "other", 4.0, False),
    }
    recipe = next(row for row in seen["rows"] if row["name"] == BOTH)
    assert (recipe["low"], recipe["high"], recipe["verdict"], recipe["family"]) == (
        3.8,
        4.2,
        "proven",
        "compression attention",
    )
    lost = [recipe[f"quality_lost_{name}"] for name in ("percent", "low", "high")]
    assert lost == pytest.approx([0.5, 0.3, 0.7])
    assert [row["gain"] for row in seen["rows"]] == sorted((row["gain"] for row in seen["rows"]), reverse=True)


def test_the_baseline_of_a_recipe_goes_with_that_of_the_claims(shelf):
    library = shelf.library()
    gains = {
        arm: {row["gain"] for row in compare(library, Choice(arm))["rows"] if row["kind"] == "recipe"}
        for arm in ("free", "paper", "exact")
    }
    assert gains == {"free": {4.0}, "paper": {8.0}, "exact": {3.0}}
    assert [row for row in compare(library, Choice("exact"))["rows"] if row["kind"] == "paper"] == []


def test_quality_lost_is_a_share_of_the_baselines(store):
    """Of a metric that is not between 0 and 1 too."""
    quality = {
        **QUALITY,
        "metric": "perplexity",
        "baseline": 10.0,
        "candidate": 11.0,
        "low": 10.5,
        "high": 12.0,
        "higher_is_better": False,
    }
    store.add(
        [
            make(
                claim=CLAIM,
                fingerprint=name,
                machine=HERE,
                vs_free=estimate(2.0),
                quality={**quality, "relative": relative},
            )
            for name, relative in (("a", True), ("b", False))
        ]
    )
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    for row in compare(shelf.library())["rows"]:
        lost = [row[f"quality_lost_{name}"] for name in ("percent", "low", "high")]
        assert lost == pytest.approx([10.0, 5.0, 20.0])
    shelf.close()


def test_what_is_chosen_together(shelf):
    library = shelf.library()
    mine, other = sorted(library.tuned, key=lambda id: library.tuned[id].run.fingerprint)
    everything = [(OTHER, "other"), (BOTH, "mine"), (CLAIM, "better"), (CLAIM, "mine"), (CLAIM, "other")]
    assert compared(library) == everything
    assert compared(library, "what=recipes") == everything[:2]
    assert compared(library, "what=papers") == everything[2:]
    assert compared(library, "machine=other") == [(OTHER, "other"), (CLAIM, "other")]
    assert compared(library, "machine=other&machine=mine&what=papers") == [(CLAIM, "mine"), (CLAIM, "other")]
    assert compared(library, "machine=like-mine&what=papers") == [(CLAIM, "better"), (CLAIM, "mine")]
    assert compared(library, "family=attention") == everything[1:]
    assert compared(library, "family=compression") == everything[:2]
    assert compared(library, "paper=xattention") == everything[2:]
    assert compared(library, f"recipe={other}") == [(OTHER, "other")]
    assert compared(library, f"recipe={mine}&paper=xattention&machine=mine") == [(BOTH, "mine"), (CLAIM, "mine")]
    assert compared(library, "paper=swin") == []


def test_the_choice_is_its_address(shelf):
    library = shelf.library()
    id = next(iter(library.tuned))
    wanted = Choice("paper", "recipes", "attention", ("xattention", "swin"), (id,), ("mine", "like-mine"), older=True)
    pairs = [
        (name, value)
        for name, values in wanted.query.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    assert Choice.of(pairs, library) == wanted
    assert Choice.of([], library).query == {}
    assert Choice.of([("family", ""), ("machine", ""), ("paper", "swin"), ("paper", "swin")], library) == Choice(
        paper=("swin",)
    )


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ([("against", "x")], "against must be"),
        ([("what", "both")], "what must be"),
        ([("family", "x")], "family must be"),
        ([("machine", "x")], "machine must be"),
        ([("paper", "x")], "paper must be"),
        ([("recipe", "x")], "recipe must be the id of a run"),
        ([("older", "yes")], "older must be"),
        ([("colour", "red")], "no parameter 'colour'"),
        ([("what", "papers"), ("what", "recipes")], "what may be given once"),
        ([("machine", str(n)) for n in range(CHOSEN + 1)], f"machine may be given {CHOSEN} times"),
    ],
)
def test_bad_choices(shelf, query, says):
    with pytest.raises(InputError, match=says):
        Choice.of(query, shelf.library())


def test_only_what_is_proven_is_compared(store):
    store.add_runs([run(helped=False), run(minutes=1, quality={"verdict": "undecided"}), run(minutes=2)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    seen = compare(shelf.library())
    assert [row["created"][:16] for row in seen["rows"]] == ["2026-01-02T03:06"]
    assert len(seen["choices"]["recipe"]) == 1
    shelf.close()


def test_what_older_code_measured_is_left_out_and_counted_and_can_be_let_in(store):
    store.add([make(claim=CLAIM, fingerprint="mine", machine=HERE, vs_free=estimate(2.0), hashes={})])
    store.add_runs([run(fresh=False)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    seen = compare(shelf.library())
    assert (seen["rows"], seen["stale"]) == ([], 2)
    seen = compare(shelf.library(), Choice(older=True))
    assert {(row["kind"], row["verdict"]) for row in seen["rows"]} == {("paper", "stale"), ("recipe", "stale")}
    assert seen["stale"] == 0
    shelf.close()


def test_a_page_shows_what_nothing_beats_and_the_largest_gains():
    rows = [{"name": str(n), "gain": float(n), "dominated": n > 2} for n in range(1000)]
    kept = shown(rows)
    assert len(kept) == comparison.SHOWN
    assert [row["name"] for row in kept[-3:]] == ["2", "1", "0"]
    assert kept[0]["gain"] == 999
    assert shown(rows[:5]) == rows[4::-1]


def test_csv_can_be_read_back_and_runs_no_formula(shelf):
    rows = compare(shelf.library())["rows"]
    rows[0]["quality"] = '=HYPERLINK("http://x")'
    back = list(csv.DictReader(io.StringIO(comparison.csv(rows))))
    assert [float(row["gain"]) for row in back] == [row["gain"] for row in rows]
    assert back[0]["quality"].startswith("'=")
    assert {row["kind"] for row in back} == {"paper", "recipe"}


def test_points_have_intervals_where_there_are_any(shelf):
    rows = {(row["name"], row["machine"]): row for row in compare(shelf.library())["rows"]}
    claim, recipe = (comparison.as_point(rows[name, "mine"], lambda path: f"/{path}") for name in (CLAIM, BOTH))
    assert (claim.gains, claim.link, claim.recipe) == ((1.5, 1.7), "/papers/xattention", False)
    assert claim.losses == pytest.approx((-0.111, 0.111), abs=1e-3)
    assert recipe.link == f"/recipes/{rows[BOTH, 'mine']['run']}"
    assert recipe.recipe
    row = rows[CLAIM, "mine"] | {"low": math.nan, "quality_lost_low": None}
    assert (comparison.as_point(row).gains, comparison.as_point(row).losses) == (None, None)
