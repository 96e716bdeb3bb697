"""`assay tune --goal goodput`: what it hands to tuning and to serving, and what it says of both."""

from __future__ import annotations

import json
import types

import pytest

from assay.cli import tune as command
from assay.cli.main import main
from assay.loadtest.report import Slo
from assay.tuner import goodput
from assay.tuner.work import Settings


def shown(value, low, high):
    return {"value": value, "low": low, "high": high}


def found(helped=True, settings=None):
    settings = {"prefill_chunk": 512} if settings is None else settings
    rate, share = shown(2.0, 1.9, 2.1), shown(0.9, 0.8, 0.95)
    server = {"goodput_per_second": rate, "within_slo": share}
    return {
        "best": {"name": "tuned", "model": "/a b/out", "settings": settings, "options": ["--prefill-chunk", "512"]},
        "helped": helped,
        "ratio": shown(2.5, 2.2, None),
        "ratios": {"pairs": 6},
        "baseline": {"goodput_per_second": None, "within_slo": None},
        "proven": server,
        "clients": {"count": 4},
    }


@pytest.fixture
def world(monkeypatch):
    """Tuning and serving that note what they were asked."""
    asked = types.SimpleNamespace()

    def tuned(settings, output, **options):
        asked.settings, asked.output, asked.tuning = settings, output, options
        return types.SimpleNamespace(document=lambda: {"goal": settings.goal})

    def served(models, slo, clients, **options):
        asked.models, asked.slo, asked.clients, asked.serving = models, slo, clients, options
        return found()

    def identity(settings):
        return {
            "settings": {"goal": settings.goal},
            "model": "1",
            "workload": "",
            "eval": "",
            "machine": "",
            "assay": "",
        }

    monkeypatch.setattr("assay.tuner.goodput.identity", identity)
    monkeypatch.setattr("assay.tuner.tune.tune", tuned)
    monkeypatch.setattr("assay.tuner.goodput.best_served", served)
    monkeypatch.setattr("assay.tuner.work.settings_for", lambda model, goal, *_, **__: Settings(model, goal))
    return asked


def test_half_the_time_each_for_tuning_and_for_serving(world, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = [
        "tune",
        "model",
        "--goal",
        "goodput",
        "--slo",
        "ttft=500,itl=50",
        "--clients",
        "4",
        "--minutes",
        "9",
        "-o",
        "out",
    ]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["goodput"]["helped"] is True
    assert world.settings.goal == "throughput"  # the recipe is found, and proven, for throughput
    assert world.tuning["minutes"] == world.serving["minutes"] == 4.5
    assert world.slo == Slo(ttft=0.5, itl=0.05)
    assert (world.clients.count, world.clients.prompt_tokens, world.clients.new_tokens) == (4, 512, 32)
    assert world.models == {"as loaded": str(tmp_path / "model"), "tuned": str(tmp_path / "out")}


def test_an_interrupted_run_goes_on_with_what_was_tuned(world, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["tune", "m", "--goal", "goodput", "--slo", "ttft=500", "-o", "out", "--json"]
    served = goodput.best_served

    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(goodput, "best_served", interrupted)
    assert main(words) == 130
    assert "1 measurements are kept in .out.goodput.jsonl" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(goodput, "best_served", served)
    del world.settings
    assert main([*words, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["goal"] == "throughput"
    assert not hasattr(world, "settings")  # nothing was tuned again
    assert not (tmp_path / ".out.goodput.jsonl").exists()
    assert main(words) == 0
    assert world.settings.goal == "throughput"


def test_only_settings_that_serve_has_are_tried(world, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("assay.cli.serve.serve", lambda model, prefill_chunk=256: None)
    assert main(["tune", "m", "--goal", "goodput", "--slo", "ttft=1", "--json"]) == 0
    assert list(world.serving["settings"]) == ["prefill_chunk"]
    assert world.models["as loaded"] == "m"
    capsys.readouterr()


def test_other_goals_are_tuned_for_all_the_time(world, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "m", "--goal", "decode", "--minutes", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"goal": "decode"}
    assert world.tuning["minutes"] == 9
    assert not hasattr(world, "models")


def test_what_it_says(capsys):
    command.print_goodput(found(), "ttft=500")
    out = capsys.readouterr().out
    assert "2.00 requests/s (90 %) within ttft=500 for 4 clients; as loaded, with default settings, none" in out
    assert "2.50x (2.20 to ?), in 6 pairs of blocks" in out
    assert "serve    assay serve '/a b/out' --prefill-chunk 512" in out
    assert "not better for certain" not in out
    command.print_goodput(found(helped=False), "ttft=500")
    assert "not better for certain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--goal", "goodput"], "--goal goodput needs --slo"),
        (["--goal", "ttft", "--slo", "ttft=1"], "no other goal has one"),
        (["--goal", "goodput", "--slo", "ttft=x"], "--slo ttft must be"),
        (["--goal", "goodput", "--slo", "ttft=1", "--clients", "0"], "--clients must be a whole number at least 1"),
        (["--goal", "speed"], "--goal must be one of ttft, decode, throughput, memory, energy, goodput; got 'speed'"),
    ],
)
def test_wrong_options_are_one_line(capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "m", *words]) == 2
    err = capsys.readouterr().err
    assert says in err.strip().splitlines()[-1]
