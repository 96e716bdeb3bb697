"""The tuning run: what it decides, what it survives, and the artefact it leaves. Children are simulated where only logic is asked."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tuner_world import Children

import assay
from assay.cli.tune import print_summary
from assay.errors import InputError, MissingError
from assay.evidence import tuned
from assay.evidence.store import Store
from assay.measure.isolate import ChildResult
from assay.tuner import child
from assay.tuner import tune as tuning
from assay.tuner.journal import append
from assay.tuner.outcome import drop_of
from assay.tuner.recipe import Recipe, Step, apply_recipe
from assay.tuner.tune import tune
from assay.tuner.work import Settings, build_work, decode_nll, decodes_in_its_own_way, load_for, quality
from tiny import write_tiny_llama

REMEMBER = tuning._remember  # before the world leaves it out


def test_finds_the_best_recipe_within_the_loss_and_leaves_a_whole_artefact(world, model, tmp_path):
    children = world(Children())
    said = []
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", max_drop=0.01, minutes=5, say=said.append)
    document = outcome.document()
    assert [step["transform"] for step in document["recipe"]] == ["dtype", "fp8_vs_int8", "xattention", "compile"]
    assert document["helped"]
    assert document["candidates"] > 0
    assert document["speedup"]["median"] == pytest.approx(1 / (0.6 * 0.6 * 0.8 * 0.9))
    assert document["speedup_vs_free"]["low"] > 1
    assert document["quality"]["drop"] == pytest.approx(0.006, abs=1e-6)
    keys = {
        "goal",
        "baseline",
        "free_baseline",
        "best",
        "speedup",
        "speedup_vs_free",
        "quality",
        "recipe",
        "artefact",
        "report",
        "machine",
    }
    assert keys <= set(document)
    for name in ("baseline", "free_baseline", "best"):
        assert {"label", "value", "unit", "low", "high"} <= set(document[name])
    assert document["free_baseline"]["label"] == "dtype(dtype=bfloat16) + compile"
    json.dumps(document, allow_nan=False)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "packed.safetensors",
        "packed.json",
        "config.json",
        "recipe.toml",
        "report.html",
        "evidence.jsonl",
        "calibration.safetensors",
    } <= files
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "journal and temporary files must be gone"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "src=" not in page
    assert 'href="http' not in page
    lines = [json.loads(line) for line in (tmp_path / "out" / "evidence.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "trial" for line in lines) == len(outcome.rows)
    assert {"command", "commit", "created", "machine"} <= set(lines[0])
    assert said[0]
    assert len(set(children.labels("assess"))) == len(children.labels("assess"))


def test_when_nothing_helps_the_free_baseline_is_saved_and_it_says_so(world, model, tmp_path):
    world(Children(cost={"dtype": 0.6, "compile": 0.9, "fp8_vs_int8": 1.2}, loss={}))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    document = outcome.document()
    assert not document["helped"]
    assert document["best"]["label"] == document["free_baseline"]["label"] == "dtype(dtype=bfloat16) + compile"
    assert document["speedup_vs_free"]["median"] == 1.0
    assert "free baseline was saved" in (tmp_path / "out" / "report.html").read_text()


class Judging(Children):
    """The proof's text says something else of some candidates than the search's: by number of steps, spread over its documents."""

    def __init__(self, lost, spread=0.0, **more):
        super().__init__(**more)
        self.lost, self.spread, self.attempts = lost, spread, []

    def judge(self, settings, recipe, attempt, max_drop, seconds):
        names = [step["transform"] for step in recipe["steps"]]
        self.attempts.append((attempt, names))
        lost = self.lost(names)
        known = self.outcome
        self.outcome = lambda recipe: (
            1.0,
            [2.0 + (lost + self.spread * (-1) ** i) * bool(recipe["steps"]) for i in range(40)],
        )
        try:
            return super().judge(settings, recipe, attempt, max_drop, seconds)
        finally:
            self.outcome = known


PAPERS = {"fp8_vs_int8", "xattention"}


def test_a_loss_that_only_shows_in_the_proof_is_not_accepted(world, model, tmp_path, capsys):
    world(Judging(lambda names: 1.0 if PAPERS & set(names) else 0.0))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    document = outcome.document()
    assert not document["helped"]
    assert document["best"]["label"] == document["free_baseline"]["label"]
    assert document["quality"]["verdict"] == "holds"  # of what is saved
    assert {one["verdict"] for one in document["tried"]} == {"lost"}
    page = (tmp_path / "out" / "report.html").read_text()
    print_summary(document, "out")
    for shown in (page, capsys.readouterr().out):
        assert "quality lost: perplexity rises by 171.83 %" in shown
        assert "quality undecided" not in shown
        assert "The free baseline was saved" in shown


def test_the_bad_end_of_the_interval_decides_and_not_the_median(world, model, tmp_path, capsys):
    world(Judging(lambda names: 0.008 if PAPERS & set(names) else 0.0, spread=0.01))
    document = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", max_drop=0.01, minutes=5).document()
    look = document["tried"][0]["looks"][-1]
    assert look["drop"] < 0.01 < look["high"]
    assert document["tried"][0]["verdict"] == "undecided"
    assert not document["helped"]
    print_summary(document, "out")
    shown = capsys.readouterr().out
    assert "quality undecided: perplexity rises by 0.80 %" in shown
    assert "so it may be more than the 1 % allowed" in shown
    assert "quality lost" not in shown


def test_where_the_best_candidate_does_not_hold_the_next_best_is_judged_with_its_own_share_of_the_error(
    world, model, tmp_path
):
    children = world(Judging(lambda names: 0.5 if set(names) >= PAPERS else 0.002 * bool(PAPERS & set(names))))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=20)
    document = outcome.document()
    assert [one["verdict"] for one in document["tried"]] == ["lost", "holds"]
    assert [attempt for attempt, _ in children.attempts] == [0, 1]
    assert document["helped"]
    assert document["best"]["label"] == document["tried"][1]["label"]
    assert document["quality"]["level"] == pytest.approx(1 - 2 * 0.0025)
    assert "Judged before it: " in (tmp_path / "out" / "report.html").read_text()


def test_no_more_candidates_are_judged_than_the_error_is_shared_among(world, model, tmp_path):
    children = world(Judging(lambda names: 0.5 * bool(PAPERS & set(names))))
    tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=60)
    assert len([names for _, names in children.attempts if PAPERS & set(names)]) == 2


def test_a_free_baseline_that_loses_too_much_itself_is_not_saved(world, model, tmp_path):
    world(Judging(lambda names: 0.5))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    document = outcome.document()
    assert not document["recipe"]
    assert document["quality"]["drop"] == 0.0
    assert document["speedup"]["median"] == 1.0
    assert any("loses more than is allowed itself" in note for note in document["notes"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The model as loaded was saved" in page
    assert "It is the model as loaded: nothing is lost." in page


def test_without_time_to_judge_the_figures_are_called_the_searchs(world, model, tmp_path, capsys):
    class Late(Children):
        def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
            if target.endswith(":judge"):
                return ChildResult("timeout", None, "killed after 9.0 s, its time limit", 9.0, 2**30, 1.0)
            return super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)

    world(Late())
    document = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5).document()
    assert not document["helped"]
    assert not document["measured_again"]["quality"]
    assert document["tried"][0]["verdict"] == document["quality"]["verdict"] == "undecided"
    print_summary(document, "out")
    shown = capsys.readouterr().out
    assert "it decides nothing: judging it ended with timeout: killed after 9.0 s" in shown
    assert "quality undecided, for judging it ended with timeout" in shown


def test_every_figure_of_the_winner_is_measured_after_it_was_chosen(world, model, tmp_path):
    """The search's own figures are told apart: its paths say 3, its samples are constant, its text is another."""
    world(Children())
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    document = outcome.document()
    assert document["measured_again"] == {"cost": True, "quality": True, "paths": True}
    assert document["paths"] == {"linear: kernel": 9}
    assert outcome.best.paths == {"linear: kernel": 3}
    assert len(set(outcome.final["samples"]["best"])) > 1
    assert document["quality"]["documents"] == 30
    assert document["quality"]["text"] == "30 windows of 256 tokens of bundled text (the proof's documents)"
    assert document["quality"]["kl"]["mean"] == 0.01
    assert document["quality"]["top1"]["mean"] == 0.9
    saved = [json.loads(line) for line in (tmp_path / "out" / "evidence.jsonl").read_text().splitlines()]
    assert saved[0]["quality"]["kl"]["mean"] == 0.01
    assert saved[1]["judged"]["figures"]["prefill"]["top1"] == [0.9] * 30
    page = (tmp_path / "out" / "report.html").read_text()
    assert "KL from the model as loaded: 0.0100 nats a token" in page
    assert "the same at 90.0 % of places" in page


def test_without_time_for_a_proof_the_report_says_that_nothing_was_measured_again(world, model, tmp_path, capsys):
    class Late(Children):
        def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
            if target.endswith(":prove"):
                return ChildResult("timeout", None, "killed", 9.0, 2**30, 1.0)
            return super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)

    world(Late())
    document = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5).document()
    assert not document["helped"]
    assert not document["measured_again"]["cost"]
    assert not document["measured_again"]["paths"]
    assert "there was no time to measure them again" in (tmp_path / "out" / "report.html").read_text()
    print_summary(document, "out")
    assert "there was no time to measure again" in capsys.readouterr().out


def test_the_headline_is_the_ratio_over_free_and_the_papers_part_stands_beside_it(world, model, tmp_path, capsys):
    world(Children(cost={"dtype": 0.6, "compile": 0.9, "fp8_vs_int8": 0.6, "xattention": 0.8}))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    document = outcome.document()
    print_summary(document, "out")
    shown = capsys.readouterr().out
    assert shown.index("x what is free") < shown.index("x as loaded (")
    assert document["papers"]["methods"] == ["fp8_vs_int8", "xattention"]
    assert document["papers"]["share"] == pytest.approx(1.0)
    assert "The papers' part is 2.08x" in shown
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The papers' part is 2.08x" in page.replace("&#39;", "'")


def test_what_is_assays_own_is_not_called_the_papers(world, model, tmp_path, capsys):
    slots = {"attention_backend": 0.5, "dtype": 0.6, "fp8_vs_int8": 0.6}
    world(Children(cost=slots, loss={"fp8_vs_int8": 0.002}))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=10)
    document = outcome.document()
    assert document["papers"]["own"] == ["attention_backend"]
    assert document["papers"]["methods"] == ["fp8_vs_int8"]
    assert document["papers"]["speedup"]["median"] == pytest.approx(1 / 0.6)
    assert document["papers"]["share"] == pytest.approx(math.log(1 / 0.6) / math.log(1 / 0.3))
    print_summary(document, "out")
    assert "the rest is assay's own attention_backend (exact)" in capsys.readouterr().out
    world(Children(cost={"attention_backend": 0.5, "dtype": 0.6}, loss={}))
    document = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=10).document()
    print_summary(document, "out")
    assert "No paper's method is in the recipe: beyond the free baseline it is assay's own attention_backend." in (
        capsys.readouterr().out
    )


def test_an_interrupted_run_goes_on_where_it_stopped(world, model, tmp_path):
    settings = Settings(str(model), "ttft", 64, 4)
    first = world(Children(die_after=5))
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path / "out", minutes=5)
    assert not (tmp_path / "out").exists()
    second = world(Children())
    tune(settings, tmp_path / "out", minutes=5, resume=True)
    assert not set(first.calls) & set(second.calls)
    with pytest.raises(KeyboardInterrupt):
        world(Children(die_after=3))
        tune(settings, tmp_path / "out", minutes=5)
    with pytest.raises(InputError, match="other settings"):
        tune(Settings(str(model), "ttft", 65, 4), tmp_path / "out", minutes=5, resume=True)


def test_a_full_disk_while_writing_the_artefact_loses_no_trial(world, model, tmp_path, monkeypatch):
    settings = Settings(str(model), "ttft", 64, 4)
    first = world(Children())
    with monkeypatch.context() as patch:

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space"):
            tune(settings, tmp_path / "out", minutes=5)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal.jsonl"]
    second = world(Children())
    tune(settings, tmp_path / "out", minutes=5, resume=True)
    assert first.calls
    assert not set(first.calls) & set(second.calls)
    assert (tmp_path / "out" / "packed.safetensors").exists()


def test_the_run_is_in_the_store_as_in_the_artefact(world, model, tmp_path, monkeypatch):
    world(Children())
    monkeypatch.setattr(tuning, "_remember", REMEMBER)
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", max_drop=0.01, minutes=5)
    with Store() as store:
        [run] = store.runs()
    assert run == tuned.read(tmp_path / "out" / "evidence.jsonl")
    assert tuned.label(run.steps) == outcome.best.label()
    assert run.proven
    assert run.architecture == "llama"
    assert [row.cost for row in run.rows] == [row.cost for row in outcome.rows]
    assert run.fingerprint == outcome.machine["fingerprint"]
    assert tuned.changes(run) == set()
    assert set(run.code) == {step.transform for row in run.rows for step in row.steps}
    joint = {tuple(step.transform for step in pair.steps): pair.joint for pair in tuned.pairs(run)}
    assert joint["fp8_vs_int8", "xattention"].median == pytest.approx(1 / (0.6 * 0.8))


def test_a_store_that_takes_nothing_loses_no_artefact(world, model, tmp_path, monkeypatch):
    world(Children())
    monkeypatch.setattr(tuning, "_remember", REMEMBER)
    monkeypatch.setenv("ASSAY_DATABASE_URL", f"sqlite:///{tmp_path / 'text.db'}")
    (tmp_path / "text.db").write_text("this is no database" * 100)
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", max_drop=0.01, minutes=5)
    [note] = [note for note in outcome.notes if "evidence store" in note]
    assert "assay evidence import" in note
    assert (tmp_path / "out" / "recipe.toml").is_file()
    assert any("evidence store" in note for note in outcome.document()["notes"])


def test_two_runs_do_not_write_the_same_artefact(world, model, tmp_path):
    wanted = Settings(str(model), "ttft", 64, 4)

    class Second(Children):
        def survey(self, settings, dtype, seconds):
            with pytest.raises(InputError, match="another run is writing"):
                tune(wanted, tmp_path / "out", minutes=5)
            return super().survey(settings, dtype, seconds)

    world(Second())
    assert tune(wanted, tmp_path / "out", minutes=5).helped


def test_memory_is_the_peak_of_what_the_artefact_would_load(world, model, tmp_path):
    class Remembering(Children):
        stored = {}  # folder -> the transforms that its weights hold
        loaded = []  # (transforms on disk, transforms applied then) of each process whose peak counts

        def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
            found = super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)
            if not target.endswith(":once"):
                return found
            names = [step["transform"] for step in kwargs["recipe"]["steps"]]
            on_disk = self.stored.get(kwargs["settings"]["model"], [])
            self.loaded.append((on_disk, names))
            peak = 2**30 * (0.7 if "dtype" in on_disk else 1.0) * (0.8 if "fp8_vs_int8" in on_disk else 1.0)
            return ChildResult("ok", found.value, "", 1.0, int(peak), 1.0)

        def store(self, settings, recipe, folder):
            assert settings["model"] == str(model)
            self.stored[folder] = [step["transform"] for step in recipe["steps"]]
            return {}

        def once(self, settings, recipe):
            return {}

        def assess(self, settings, recipe, known, seconds, text, **more):
            return super().assess(settings, recipe, known, seconds, text, **more) | {"samples": []}

    children = world(Remembering(cost={"dtype": 1.0, "fp8_vs_int8": 1.0}, loss={}))
    outcome = tune(Settings(str(model), "memory", 64, 4), tmp_path / "out", minutes=5)
    assert ["dtype", "fp8_vs_int8"] in [on_disk for on_disk, _ in children.loaded]
    assert not any({"dtype", "fp8_vs_int8"} & set(names) for _, names in children.loaded)
    assert [step.transform for step in outcome.best.recipe.steps] == ["dtype", "fp8_vs_int8"]
    assert outcome.helped
    document = outcome.document()
    assert document["free_baseline"]["value"] == pytest.approx(0.7 * 1024, rel=1e-3)
    assert document["best"]["value"] == pytest.approx(0.7 * 0.8 * 1024, rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # the copies are gone


def test_for_memory_what_leaves_fewest_bytes_is_tried_first():
    def option(name, slot, **effect):
        return {"transform": name, "config": {}, "slot": slot, "exact": False, "effects": [effect]}

    survey = {
        "dtype": "bfloat16",
        "parameters": 10**8,
        "base": {"kinds": {"linear": {"seconds": 1.0, "macs": 1e12, "bytes": 1e9}}},
        "options": [  # by time alone INT8 comes first, and the 4-bit weights change nothing
            option("fp8_vs_int8", "linear", kind="linear", bytes=0.5, dtype="int8"),
            option("weight_only", "linear", kind="linear", bytes=0.3, dtype=None),
            option("compile", "compile", kind="other", bytes=0.1),
        ],
    }
    limits = SimpleNamespace(matmul_flops={"bfloat16": 1e11, "int8": 4e11, "float32": 5e10}, read_bandwidth=2e10)
    search = tuning.make_search(survey, limits, 0.01, peak_bytes=8e8)
    first = search.next()
    assert [o.step.transform for o in first] == ["weight_only"]
    assert search.roofline(first) == pytest.approx((6e8 + 0.3 * 2e8) / 8e8)  # all but the weights stays
    by_time = tuning.make_search(survey, limits, 0.01)
    assert "fp8_vs_int8" in [o.step.transform for o in by_time.next()]


def test_a_failed_trial_is_a_row_and_not_the_end(world, model, tmp_path):
    class Crashing(Children):
        def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
            if any(step["transform"] == "xattention" for step in kwargs.get("recipe", {}).get("steps", [])):
                self.calls.append((target, "crash"))
                return ChildResult("out of memory", None, "used 9 GiB of 1 GiB", 1.0, 2**33, 1.0)
            return super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)

    world(Crashing())
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    assert outcome.document()["failed_rows"] >= 1
    assert "out of memory" in (tmp_path / "out" / "report.html").read_text()
    assert [step.transform for step in outcome.best.recipe.steps] == ["dtype", "fp8_vs_int8", "compile"]


def test_a_step_that_cannot_be_applied_is_a_failed_row_that_names_it(world, model, tmp_path):
    class Clashing(Children):
        def assess(self, settings, recipe, known, seconds, text, **more):
            names = [step["transform"] for step in recipe["steps"]]
            if {"xattention", "compile"} <= set(names):
                return {"misfit": "compile", "error": "compile does not fit this model: nothing left to compile"}
            return super().assess(settings, recipe, known, seconds, text, **more)

    world(Clashing())
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    failed = [row for row in outcome.rows if row.status == "failed"]
    assert {row.misfit for row in failed} == {"compile"}
    assert all("nothing left to compile" in row.error for row in failed)
    told = []
    search = SimpleNamespace(fail=lambda options, misfit: told.append(misfit))
    tuning.teach(search, failed[0], (), outcome.rows[1])
    assert told == ["compile"]


def test_a_trial_names_the_step_that_cannot_be_applied(model):
    recipe = Recipe(steps=(Step(transform="dtype", config={"dtype": "float3"}),)).model_dump(mode="json")
    found = child.assess(dataclasses.asdict(Settings(str(model), "ttft", 64, 4)), recipe, {}, 1.0, 1.0)
    assert found["misfit"] == "dtype"
    assert "float3" in found["error"]


def test_a_candidate_that_dies_while_its_memory_is_read_is_a_row_too(world, model, tmp_path):
    class Dying(Children):
        held = {}  # folder -> the transforms that its weights hold

        def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
            if target.endswith(":once") and "fp8_vs_int8" in self.held.get(kwargs["settings"]["model"], []):
                return ChildResult("out of memory", None, "used 9 GiB of 1 GiB", 1.0, 2**33, 1.0)
            return super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)

        def store(self, settings, recipe, folder):
            self.held[folder] = [step["transform"] for step in recipe["steps"]]
            return {}

        def once(self, settings, recipe):
            return {}

    world(Dying(cost={"dtype": 1.0, "fp8_vs_int8": 1.0}, loss={}))
    outcome = tune(Settings(str(model), "memory", 64, 4), tmp_path / "out", minutes=5)
    assert outcome.document()["failed_rows"] == 1
    assert "out of memory" in next(row.error for row in outcome.rows if row.status == "failed")
    assert not outcome.helped
    assert (tmp_path / "out" / "recipe.toml").is_file()


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"goal": "speed"}, {}, "--goal must be one of"),
        ({"prompt_tokens": 0}, {}, "--prompt-tokens must be at least 1"),
        ({}, {"max_drop": 1.0}, r"--max-drop must lie in \[0, 1\)"),
        ({}, {"max_drop": -0.1}, "--max-drop"),
        ({}, {"max_drop": float("nan")}, "--max-drop"),
        ({}, {"minutes": 0}, "--minutes must be positive"),
        ({}, {"minutes": float("nan")}, "--minutes must be positive"),
        ({}, {"minutes": float("inf")}, "--minutes must be positive and at most"),
        ({}, {"minutes": 1e9}, "--minutes must be positive and at most"),
        ({}, {"max_drop": float("inf")}, "--max-drop"),
        ({}, {"memory_gib": 0}, "--memory-gib must be a finite number above 0"),
        ({}, {"memory_gib": -4}, "--memory-gib must be a finite number above 0"),
        ({}, {"memory_gib": float("nan")}, "--memory-gib must be a finite number above 0"),
        ({}, {"memory_gib": float("inf")}, "--memory-gib must be a finite number above 0"),
        ({}, {"memory_gib": 1e300}, "--memory-gib must be a finite number above 0"),
        ({"prompt_tokens": 10**12}, {}, "--prompt-tokens must be a whole number"),
        ({"prompt_tokens": 2.5}, {}, "--prompt-tokens must be a whole number"),
        ({"new_tokens": float("nan")}, {}, "--new-tokens must be a whole number"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, options, says):
    with pytest.raises(InputError, match=says):
        tune(Settings(**{"model": "m", "goal": "ttft", **settings}), tmp_path / "out", **options)


def test_an_output_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an artefact"):
        tune(Settings("m", "ttft"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        tune(Settings("m", "ttft"), tmp_path / "file")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_too_long_a_prompt_names_the_numbers(model):
    limit = load_for(Settings(str(model), "ttft", 8, 1)).model.config.max_position_embeddings
    with pytest.raises(InputError, match=f"the model has {limit}"):
        load_for(Settings(str(model), "ttft", limit, 1))


def test_forced_decoding_sees_what_the_forward_pass_sees(model):
    settings = Settings(str(model), "decode", 64, 4)
    loaded = load_for(settings)
    work = build_work(loaded, settings)
    windows = work.forced[:3, :40]
    with torch.no_grad():
        logits = loaded.model(windows).logits[:, 15:-1].float()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 16:], reduction="none")
    torch.testing.assert_close(decode_nll(loaded.model, windows, 16), expected, atol=1e-4, rtol=1e-4)


def test_decoding_is_judged_through_a_generate_that_was_replaced_and_by_one_pass_otherwise(model, monkeypatch):
    settings = Settings(str(model), "decode", 64, 4)
    loaded = load_for(settings)
    work = build_work(loaded, settings)
    work.forced = work.forced[:2]
    assert not decodes_in_its_own_way(loaded.model)
    fast = quality(loaded.model, work)["decode"]
    calls = []
    original = loaded.model.generate

    def generate(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    loaded.model.generate = generate
    assert decodes_in_its_own_way(loaded.model)
    slow = quality(loaded.model, work)["decode"]
    assert calls
    assert len(fast) == len(slow) == 2
    assert fast == pytest.approx(slow, abs=1e-4)


def test_drop_is_the_paired_perplexity_ratio_of_the_worst_path():
    base = {"prefill": [1.0, 2.0, 3.0], "decode": [1.0, 2.0]}
    found = drop_of(base, {"prefill": [1.0, 2.0, 3.0], "decode": [1.1, 2.1]})
    assert found.median == pytest.approx(math.expm1(0.1))
    assert found.low == pytest.approx(found.high)
    assert drop_of(base, {"prefill": [1.0, 2.0, float("nan")]}).median == math.inf
    assert drop_of(base, {"prefill": [1.1]}).high == math.inf  # one window says nothing of its error


@pytest.mark.slow
def test_real_run_survives_kill_and_leaves_a_model_that_generates(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "assay",
        "tune",
        str(model),
        "--goal",
        "ttft",
        "--prompt-tokens",
        "256",
        "--new-tokens",
        "4",
    ]
    command += ["--minutes", "5", "--max-drop", "0.5", "-o", str(tmp_path / "out"), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".out.journal.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and (not journal.exists() or len(journal.read_text().splitlines()) < 4):
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = journal.read_text().splitlines()
    assert len(kept) >= 4
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["rows"] >= 3
    tuned = assay.load(tmp_path / "out")
    ids = torch.arange(20)[None]
    out = tuned.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, 25)


def test_settings_that_only_the_config_holds_make_another_candidate(model):
    from assay.tuner.child import structure_hash

    loaded = load_for(Settings(str(model), "ttft", 8, 1)).model
    before = structure_hash(loaded)
    assert structure_hash(loaded) == before
    loaded.config.xattention = {"tau": 0.9}
    assert structure_hash(loaded) != before


def test_energy_without_a_counter_fails_at_once(world, model, tmp_path, monkeypatch):
    children = world(Children())
    monkeypatch.setattr("assay.measure.energy.why_not", lambda: "no energy counter here")
    with pytest.raises(MissingError, match="no energy counter"):
        tune(Settings(str(model), "energy", 64, 4), tmp_path / "out")
    assert not children.calls


def test_rows_say_which_path_ran_and_what_was_reached(world, model, tmp_path):
    world(Children())
    said = []
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "out" / "evidence.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "trial" and "xattention" in line["label"]]
    assert rows
    for row in rows:
        assert row["paths"] == {"linear: kernel": 3}
        assert row["reached"]["xattention"] == {"share": 0.75, "reached": "the windowed layers stay as they are"}
    document = outcome.document()
    assert document["reached"]["xattention"]["share"] == 0.75
    line = next(line for line in said if "xattention:" in line and "x the base" in line)
    assert "ms to the first token" in line
    assert "perplexity +0." in line
    assert "xattention reaches 75 %" in line
    assert all(line.startswith("[") and " left] " in line for line in said[1:])  # how much time is left


def test_before_is_the_model_as_loaded_and_adds_up_to_its_figure(world, model, tmp_path, capsys):
    class Slower(Children):
        def survey(self, settings, dtype, seconds):
            found = super().survey(settings, dtype, seconds)
            kinds = {
                name: {**kind, "seconds": 7.0} for name, kind in found["kinds"].items()
            }  # as loaded, with all hooks
            return {**found, "kinds": kinds}

    world(Slower())
    document = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5).document()
    before = sum(kind["before"] for kind in document["kinds"].values())
    after = sum(kind["after"] for kind in document["kinds"].values())
    assert 1e3 * before == pytest.approx(document["baseline"]["value"])
    assert 1e3 * after == pytest.approx(document["best"]["value"])
    print_summary(document, "out")
    shown = capsys.readouterr().out
    assert f"as loaded {1e3 * before:,.1f} ms = " in shown
    assert f"{document['screened']} candidates screened, {document['judged']} judged, 1 proven" in shown


class Half(Children):
    stored_dtype = "float16"

    def survey(self, settings, dtype, seconds):
        return super().survey(settings, dtype, seconds) | {"dtype": "float32"}

    def outcome(self, recipe):
        cost, nll = super().outcome({"steps": [s for s in recipe["steps"] if s["transform"] != "dtype"]})
        cast = [step["config"]["dtype"] for step in recipe["steps"] if step["transform"] == "dtype"]
        return cost * {(): 90.0, ("float32",): 1.0, ("bfloat16",): 0.8}[tuple(cast)], nll


def test_a_float16_checkpoint_has_float32_and_bfloat16_as_free_baselines(world, model, tmp_path):
    world(Half(costs={"loaded_run": 90.0}))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=20)
    free = [row.label() for row in outcome.rows if row.kind == "free"]
    assert free[:2] == ["dtype(dtype=float32)", "dtype(dtype=bfloat16)"]
    assert outcome.free.recipe.steps[0].config == {"dtype": "bfloat16"}
    candidates = [row for row in outcome.rows if row.kind == "candidate"]
    assert candidates
    assert all(
        row.recipe.steps[[s.transform for s in row.recipe.steps].index("dtype")].config["dtype"] == "bfloat16"
        for row in candidates
    )
    assert tuning.dtypes({"stored": "bfloat16", "dtype": "bfloat16"}) == [()]


def test_a_candidate_in_which_screening_died_is_a_row_and_the_others_are_screened(world, model, tmp_path):
    class Dying(Children):
        def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
            found = super().__call__(target, kwargs, timeout_s=timeout_s, memory_bytes=memory_bytes)
            if self.died:
                self.died = False
                return ChildResult("failed", None, "crashed: SIGSEGV", 1.0, 2**30, 1.0)
            return found

        died = False

        def screen(self, settings, base, recipes, seconds, each, least, journal):
            bad = [i for i, r in enumerate(recipes) if any(s["transform"] == "xattention" for s in r["steps"])]
            if not bad:
                return super().screen(settings, base, recipes, seconds, each, least, journal)
            super().screen(settings, base, recipes[: bad[0]], seconds, each, least, journal)
            append(journal, f"screening:{Recipe.model_validate(recipes[bad[0]]).key()}", {"status": "begun"})
            self.died = True
            return {}

    children = world(Dying())
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=10)
    dead = [row for row in outcome.rows if row.status == "failed"]
    assert [row.recipe.steps[-1].transform for row in dead] == ["xattention"]
    assert dead[0].error == "crashed: SIGSEGV"
    assert dead[0].cost is None
    assert outcome.document()["screened"] >= 3
    assert not any("xattention" in label for label in children.labels("assess"))


def test_candidates_are_screened_on_few_layers_and_judged_whole(tmp_path):
    write_tiny_llama(tmp_path / "deep", layers=9)
    settings = dataclasses.asdict(Settings(str(tmp_path / "deep"), "ttft", 64, 4))
    base = Recipe().model_dump(mode="json")
    bad = Recipe(steps=(Step(transform="dtype", config={"dtype": "float3"}),)).model_dump(mode="json")
    good = Recipe(steps=(Step(transform="dtype", config={"dtype": "bfloat16"}),))
    recipes = [bad, good.model_dump(mode="json")]
    found = child.screen(settings, base, recipes, 60.0, 60.0, 2, str(tmp_path / "j"))
    assert [value["status"] for value in found.values()] == ["failed", "ok"]
    assert found[good.key()]["ratio"] > 0
    assert (found[good.key()]["layers"], found[good.key()]["of"]) == (4, 9)
    keys = [json.loads(line)["key"].split(":")[0] for line in (tmp_path / "j").read_text().splitlines()]
    assert keys == ["screening", "screen"] * 2
    survey = child.survey(settings, None, 5.0)
    assert {"start", "load", "run", "loaded_run", "quality"} == set(survey["costs"])
    assert all(value > 0 for value in survey["costs"].values())
    parts = [row["share"] for row in survey["waterline"]]
    assert sum(parts) <= 1 + 1e-6
    assert survey["kinds"] == survey["base"]["kinds"]
    assert survey["stored"] == survey["dtype"] == "float32"


def test_what_is_hopeless_on_the_first_part_of_the_text_is_not_judged_on_the_rest(model, monkeypatch):
    settings = dataclasses.asdict(Settings(str(model), "ttft", 256, 4))
    recipe = Recipe().model_dump(mode="json")
    whole = child.assess(settings, recipe, {}, 0.0, 1.0)["quality"]["prefill"]
    better = {"prefill": [value - 1.0 for value in whole]}
    found = child.assess(settings, recipe, {}, 0.0, 1.0, reference=better, max_drop=0.01)
    assert found["hopeless_at"] == 0.01
    assert 0 < len(found["quality"]["prefill"]) < len(whole)
    assert drop_of(better, found["quality"]).low > 0.01
    same = child.assess(settings, recipe, {}, 0.0, 1.0, reference={"prefill": whole}, max_drop=0.01)
    assert same["quality"]["prefill"] == pytest.approx(whole)
    assert "hopeless_at" not in same


def test_a_candidate_on_another_machine_is_measured_in_turns_with_the_base(model):
    settings = dataclasses.asdict(Settings(str(model), "ttft", 64, 4))
    recipe = Recipe().model_dump(mode="json")
    found = child.assess(settings, recipe, {}, 60.0, 0.0, base=recipe, repeats=3)
    assert len(found["samples"]) == len(found["paired"]) == 3


def test_a_float16_model_can_be_cast_to_what_cpus_compute_in(model):
    settings = Settings(str(model), "ttft", 64, 4)
    loaded = load_for(settings)
    context = build_work(loaded, settings).context()
    half = loaded.model.half()
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        recipe = Recipe(steps=(Step(transform="dtype", config={"dtype": name}),))
        assert apply_recipe(copy.deepcopy(half), recipe, context).dtype == dtype


@pytest.mark.parametrize("proven", ["the same", "another"])
def test_what_is_saved_is_compared_with_what_was_proven(world, model, tmp_path, monkeypatch, proven):
    """The proof's process tells a digest of the weights; the artefact that is written must have it, or the report says that it has not."""
    monkeypatch.setattr("assay.tuner.packed.digest", lambda found: "the same")

    class Telling(Children):
        def prove(self, **given):
            return super().prove(**given) | {"weights": {"best": proven, "baseline": "none"}}

    world(Telling(cost={"dtype": 0.6, "fp8_vs_int8": 0.6}))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5, max_drop=0.01)
    assert "fp8_vs_int8" in outcome.best.recipe.label()
    notes = [note for note in outcome.notes if "not bit for bit those that were proven" in note]
    assert len(notes) == (proven == "another")
    assert ("not bit for bit those that were proven" in (tmp_path / "out" / "report.html").read_text()) == bool(notes)


def test_a_baseline_that_is_saved_is_not_compared_with_the_candidate(world, model, tmp_path):
    class Telling(Children):
        def prove(self, **given):
            found = super().prove(**given)
            slow = {"best": [9.0] * len(found["samples"]["best"])}  # it was fast in the search alone
            return found | {"samples": found["samples"] | slow, "weights": {"best": "the candidate's"}}

    world(Telling(cost={"dtype": 0.6, "fp8_vs_int8": 0.6}, loss={}))
    outcome = tune(Settings(str(model), "ttft", 64, 4), tmp_path / "out", minutes=5)
    assert not outcome.helped
    assert not any("bit for bit" in note for note in outcome.notes)
    assert "best" not in outcome.final["weights"]
