"""Runs of `assay tune` on the pages: what they found, how it is replayed, and what methods gained beside each other."""

from __future__ import annotations

import tomllib

import pytest
from tests.evidence.tuned_maker import TRIED, lines, row, run
from tests.site.conftest import HERE

from assay import catalogue
from assay.errors import InputError
from assay.evidence.tuned import of_lines
from assay.site import recipes
from assay.site.library import Shelf
from assay.tuner import combining
from assay.tuner.recipe import Recipe
from assay.tuner.transforms import is_paper, transforms


@pytest.fixture
def opened(store):
    """The library of some runs."""
    shelves = []

    def made(*runs):
        store.add_runs(runs)
        shelves.append(Shelf(str(store._url), here="mine", machine=HERE))
        return shelves[-1].library()

    yield made
    for shelf in shelves:
        shelf.close()


def test_every_run_is_a_line_the_newest_first(shelf):
    first, second = recipes.recipe_rows(shelf.library())
    assert (first["name"], first["goal"], first["by"]) == (
        "dtype + fp8_vs_int8 + attention_backend",
        "decode",
        "others",
    )
    assert (second["word"], second["machine_name"], second["papers"]) == (
        "proven",
        HERE["cpu"],
        ["fp8_vs_int8", "xattention"],
    )


def test_a_run_as_a_page(shelf):
    id = list(shelf.library().tuned)[1]
    found = recipes.recipe_page(shelf.library(), id)
    assert [line["gain"] for line in found["rows"]] == pytest.approx([1.0, 2.0, 4.0, 3.2, 8.0])
    assert [line["found"] for line in found["rows"]] == [False] * 4 + [True]
    assert found["drawing"].count("<rect") == 5
    assert [(pair["first"], pair["second"], pair["joint"]["median"]) for pair in found["pairs"]] == [
        ("fp8_vs_int8", "xattention", pytest.approx(4.0))
    ]
    with pytest.raises(InputError, match="no run of"):
        recipes.recipe_page(shelf.library(), "nothing")


def test_the_file_replays_the_recipe(shelf, tmp_path):
    one = list(shelf.library().tuned.values())[1].run
    file = tmp_path / "recipe.toml"
    file.write_text(recipes.toml(one), encoding="utf-8")
    replayed = Recipe.read(file)
    assert [(step.transform, step.config) for step in replayed.steps] == [(s.transform, s.config) for s in one.steps]
    assert (replayed.architecture, replayed.goal, replayed.prompt_tokens) == ("llama", "ttft", 4096)


def test_a_setting_that_is_none_is_said_to_be_so_in_the_file(opened):
    given = lines()
    given[0]["recipe"][1]["config"] = {"smooth": None, "skip": ["a", "b"], "rotation": 16}
    document = tomllib.loads(recipes.toml(of_lines(given)))
    assert document["steps"][1]["config"] == {"smooth": {"none": True}, "skip": ["a", "b"], "rotation": 16}


def test_a_run_whose_recipes_failed_has_a_page(opened):
    tried = [row(("dtype",), None, status="failed", error="x" * 9000) for _ in range(3)]
    for line in tried:
        line["drop"] = None
    one = run({}, rows=tried)
    found = recipes.recipe_page(opened(one), one.id)
    assert [line["gain"] for line in found["rows"]] == [None] * 3
    assert found["pairs"] == []
    assert len(found["rows"][0]["error"]) == 500


# What combines with what --------------------------------------------------------------------------------------------------


def test_by_rule_one_step_a_slot_and_goals_in_common():
    own = combining.parts()["xattention"]
    assert (own.slot, own.goals, own.paper) == ("attention", ("ttft",), True)
    assert {part.name for part in combining.instead_of("xattention")} == {"sageattention2", "attention_backend"}
    found = {part.name: goals for part, goals in combining.beside("xattention")}
    assert found["fp8_vs_int8"] == ("ttft",)
    assert "weight_only" not in found  # it serves other goals
    assert "sageattention2" not in found
    assert not combining.parts()["compile"].paper


def test_what_is_read_from_the_sources_is_what_the_transforms_say():
    own = {name: one for name, one in transforms().items() if type(one).__module__.startswith("assay.")}
    assert list(combining.parts()) == list(own)
    for name, part in combining.parts().items():
        said = (own[name].slot, set(own[name].goals), own[name].exact, is_paper(name))
        assert (part.slot, set(part.goals), part.exact, part.paper) == said, name


def test_the_rules_said_are_those_of_recipes():
    """Of any two transforms, those said to be possible beside each other make a recipe, and the others do not."""
    for name in combining.parts():
        for part in combining.instead_of(name):
            with pytest.raises(InputError, match="one step per slot"):
                Recipe.model_validate({"steps": [{"transform": name}, {"transform": part.name}]}).transforms()
        for part, goals in combining.beside(name):
            pair = sorted([name, part.name], key=list(combining.parts()).index)
            assert Recipe.model_validate({"steps": [{"transform": one} for one in pair]}).transforms()
            assert goals


def test_a_paper_says_what_it_combines_with_and_what_was_measured(shelf):
    found = recipes.combines(shelf.library(), catalogue.get("fp8_vs_int8"))
    assert found["slot"] == "linear"
    assert {"name": "xattention", "paper": True, "slot": "attention", "goals": ["ttft"]} in found["beside"]
    assert {"name": "weight_only", "paper": False} in found["instead"]
    first, second = found["pairs"]
    assert (first["second"], first["second_paper"], first["on_top_of"]) == (
        "attention_backend",
        False,
        "dtype(dtype=bfloat16)",
    )
    assert first["joint"]["median"] == pytest.approx(4.0 / 1.5)
    assert first["first_alone"] is None
    assert first["second_alone"]["median"] == pytest.approx(4.0 / 3.0)
    assert first["product"] is None
    assert (second["second"], second["product"]) == ("xattention", pytest.approx(3.2))
    assert second["joint"]["low"] < 4.0 < second["joint"]["high"]


def test_the_paper_itself_stands_first(shelf):
    [line] = recipes.combines(shelf.library(), catalogue.get("xattention"))["pairs"]
    assert (line["first"], line["second"]) == ("xattention", "fp8_vs_int8")
    assert line["first_alone"]["median"] == pytest.approx(1.6)
    assert line["second_alone"]["median"] == pytest.approx(2.0)


def test_no_run_tried_a_pair(opened):
    library = opened(run({("dtype",): 4.0, ("dtype", "xattention"): 2.5}, best=("dtype", "xattention")))
    found = recipes.combines(library, catalogue.get("xattention"))
    assert (found["pairs"], found["tried"]) == ([], 0)
    planned = recipes.combines(library, catalogue.get("swin"))
    assert (planned["slot"], planned["beside"], planned["pairs"]) == ("", [], [])


def test_of_many_settings_the_one_that_gained_most(opened):
    slower, faster = row(("dtype", "fp8_vs_int8", "xattention"), 1.5), row(("dtype", "fp8_vs_int8", "xattention"), 0.8)
    slower["recipe"][2], faster["recipe"][2] = (
        {"transform": "xattention", "config": {"tau": tau}} for tau in (0.99, 0.5)
    )
    library = opened(run(TRIED, rows=[slower, faster]))
    [line] = recipes.combines(library, catalogue.get("xattention"))["pairs"]
    assert line["joint"]["median"] == pytest.approx(5.0)
    assert line["first_label"] == "xattention(tau=0.5)"
    assert line["first_alone"] is None  # not at that setting


def test_settings_that_lose_too_much_come_after_those_that_do_not(opened):
    faster = row(("dtype", "fp8_vs_int8", "xattention"), 0.2, drop=0.3)
    faster["recipe"][2] = {"transform": "xattention", "config": {"tau": 0.1}}
    found = recipes.combines(opened(run(TRIED, rows=[faster])), catalogue.get("xattention"))
    assert found["pairs"][0]["joint"]["median"] == pytest.approx(4.0)


def test_fresh_pairs_stand_before_those_of_older_code(opened):
    found = recipes.combines(opened(run(fresh=False, minutes=9), run()), catalogue.get("xattention"))
    assert [line["stale"] for line in found["pairs"]] == [False, True]


def test_pairs_of_older_code_say_so(opened):
    [line] = recipes.combines(opened(run(fresh=False)), catalogue.get("xattention"))["pairs"]
    assert line["stale"]


def test_a_transform_that_cannot_be_read_is_said(opened, monkeypatch):
    def broken():
        raise ValueError("malformed node")

    monkeypatch.setattr(combining, "parts", broken)
    found = recipes.combines(opened(run()), catalogue.get("xattention"))
    assert (found["trouble"], found["slot"]) == ("malformed node", "")
    assert len(found["pairs"]) == 1
