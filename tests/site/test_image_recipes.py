"""Runs of image classifiers on the pages: with their own words, beside those of language models."""

from __future__ import annotations

import csv
import io
import json
import tomllib

import pytest
from tests.evidence.tuned_maker import image_run, run
from tests.site.conftest import HERE

from assay.site import comparison, recipes
from assay.site.comparison import Choice
from assay.site.export import export
from assay.site.library import Library, Shelf
from assay.tuner.images.recipe import ImageRecipe

NAME = "fold_batch_norm + int8_convolutions + channels_last"


@pytest.fixture
def both(store):
    """A shelf with a run of each kind, the image classifier's the newer one."""
    store.add_runs([run(), image_run(minutes=5)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    yield shelf
    shelf.close()


@pytest.fixture
def pages(both):
    from starlette.testclient import TestClient

    from assay.site.app import Searcher, create_app

    return TestClient(create_app(both, searcher=Searcher(start=False)), base_url="http://127.0.0.1")


def test_it_is_a_line_among_the_runs(both):
    first, second = recipes.recipe_rows(both.library())
    assert (first["name"], first["kind"], first["word"], first["unit"]) == (NAME, "images", "proven", "points")
    assert (first["prompt_tokens"], first["metric"], first["papers"]) == (None, "accuracy", [])
    assert (second["kind"], second["unit"], second["prompt_tokens"]) == ("language", "%", 4096)


def test_its_page_speaks_of_pictures(both, pages):
    id = next(iter(both.library().tuned))
    text = pages.get(f"/recipes/{id}").text
    for words in (
        "670 pictures of my-pictures, 400 of them for the proof",
        "79.6 % of 400 pictures, 80.0 % as loaded",
        "it says the same as the model as loaded of 97.0 %",
        "1 point allowed: holds",
        "2 ms a picture",
        "over what it was built on",
        "ViT &lt;b&gt;alone&lt;/b&gt;",
        "assay apply MODEL --recipe recipe.toml",
    ):
        assert words in text, words
    for words in ("perplexity", "prompts of", "generated", "exact code", "xxx" * 200):
        assert words not in text, words
    assert "perplexity" in pages.get(f"/recipes/{list(both.library().tuned)[1]}").text
    listed = pages.get("/recipes").text
    assert "accuracy" in listed
    assert "+0.40 points" in listed
    found = pages.get(f"/api/recipes/{id}").json()
    assert (found["kind"], found["pictures"]["proof"]) == ("images", 400)
    assert [row["built_on"] is None for row in found["rows"]] == [True, False, False, False, True]


def test_its_file_replays_the_recipe(both, pages, tmp_path):
    id = next(iter(both.library().tuned))
    file = tmp_path / "recipe.toml"
    file.write_bytes(pages.get(f"/recipes/{id}.toml").content)
    recipe = ImageRecipe.read(file)
    assert (recipe.label(), recipe.goal, recipe.architecture) == (NAME, "latency", "resnet")
    assert "prompt_tokens" not in tomllib.loads(file.read_text())


def test_it_stands_in_the_comparison_by_its_share_of_the_pictures(both, pages):
    library = both.library()
    rows = {row["name"]: row for row in comparison.compare(library, Choice())["rows"]}
    found = rows[NAME]
    assert (found["gain"], found["quality"], found["verdict"], found["goal"]) == (2.0, "accuracy", "proven", "latency")
    lost = [found[f"quality_lost_{name}"] for name in ("percent", "low", "high")]
    assert lost == pytest.approx([0.5, -0.25, 1.0])  # of the pictures that the model as loaded has: 80 % of them
    assert {row["name"] for row in comparison.compare(library, Choice("paper"))["rows"]} == set(rows)
    assert NAME not in {row["name"] for row in comparison.compare(library, Choice("exact"))["rows"]}
    assert NAME in [row["name"] for row in csv.DictReader(io.StringIO(pages.get("/compare.csv").text))]
    assert NAME in pages.get("/compare").text


@pytest.mark.parametrize(
    "quality",
    [
        {"verdict": "undecided"},
        {"baseline": 0.0},  # nothing to lose
        {"baseline": 1e-320},
        {"low": -1.7e308},
    ],
)
def test_what_has_no_place_in_the_comparison_has_a_page_and_breaks_nothing(store, quality):
    from starlette.testclient import TestClient

    from assay.site.app import Searcher, create_app

    store.add_runs([image_run(quality=quality)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    assert comparison.compare(shelf.library())["rows"] == []
    client = TestClient(create_app(shelf, searcher=Searcher(start=False)), base_url="http://127.0.0.1")
    id = next(iter(shelf.library().tuned))
    for path in ("/recipes", "/compare", "/api/compare", f"/recipes/{id}", f"/api/recipes/{id}"):
        assert client.get(path).status_code == 200, path
    shelf.close()


def test_both_kinds_are_exported(both, tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "papers", ())  # their pages take longer than all else
    export(both.library(), tmp_path / "site")
    image, language = both.library().tuned
    assert ImageRecipe.read(tmp_path / f"site/recipes/{image}.toml").label() == NAME
    assert "400 of them for the proof" in (tmp_path / f"site/recipes/{image}.html").read_text()
    kinds = [row["kind"] for row in json.loads((tmp_path / "site/api/recipes.json").read_text())]
    assert kinds == ["images", "language"]
    assert "prompts of 4,096 tokens" in (tmp_path / f"site/recipes/{language}.html").read_text()
