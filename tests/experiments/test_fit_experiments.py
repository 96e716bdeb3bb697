"""How many tokens of an image fit into memory: that the number is what ran, and what becomes of runs that pass a limit."""

from __future__ import annotations

import pytest
import torch

from assay.errors import AssayError
from assay.experiments.attention import fit
from assay.measure.isolate import ChildResult
from assay.workloads.images import photograph

SIZES = {"patch": 4, "dim": 16, "tile": 4, "latents": 2, "dtype": "float32", "steps": 2}
SIDES = [64, 384]


@pytest.fixture(scope="module")
def roomy():
    """A small and a larger image, each in a process of its own, far below the limit."""
    return fit.upwards("fit", SIDES, gigabytes=8, seconds=240, **SIZES)


def test_a_mosaic_is_made_of_the_photographs_pixels():
    image = fit.mosaic(130, cell=50)
    assert image.shape == (1, 3, 130, 130)
    for number, (top, left) in enumerate([(0, 0), (0, 50), (0, 100), (50, 0)]):
        piece = image[0, :, top : top + 8, left : left + 8]
        windows = photograph(fit.TRAINING[number]).unfold(1, 8, 1).unfold(2, 8, 1)
        match = (windows[0] == piece[0]).all(-1).all(-1)
        assert any(torch.equal(windows[:, y, x], piece) for y, x in match.nonzero().tolist())
    assert torch.equal(fit.mosaic(130, cell=50), image)


@pytest.mark.parametrize("arm", fit.ARMS)
def test_the_tokens_are_those_the_model_was_given(arm):
    found = fit.steps_on_an_image(arm, 32, **SIZES)
    assert found["tokens"] == 64
    assert found["losses"][1] < found["losses"][0]  # a whole step was taken
    low = fit.steps_on_an_image(arm, 32, **{**SIZES, "dtype": "bfloat16"})
    assert low["losses"] != found["losses"]
    assert low["losses"] == pytest.approx(found["losses"], rel=0.05)


def test_arms_have_about_the_same_parameters():
    with torch.device("meta"):  # counted, not made
        models = [
            fit.FillIn(fit.DEEPER[arm], 320, 16, whole=arm == "plain transformer", dim=256, tile=10, latents=8)
            for arm in fit.ARMS
        ]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(sizes) < 1.1 * min(sizes)


def test_a_lower_limit_gives_fewer_tokens(roomy):
    assert [(row["status"], row["tokens"]) for row in roomy] == [("ok", 256), ("ok", 9216)]
    small, large = (row["peak_bytes"] for row in roomy)
    assert large > small + 20e6
    limit = (small + large) / 2e9
    rows = fit.upwards("fit", [SIDES[1]], gigabytes=limit, seconds=240, **SIZES)
    assert [row["status"] for row in rows] == ["out of memory"]
    assert "tokens" not in rows[0]
    assert "memory limit" in rows[0]["why"]


def test_a_run_out_of_time_is_reported():
    figure = fit.tokens_in_memory(sides={"fit": SIDES}, gigabytes=8, seconds=0.2, **SIZES)
    assert figure.value == 0
    (row,) = figure.details["runs"]["fit"]
    assert row["status"] == "timeout"
    assert "time limit" in row["why"]


def children(monkeypatch, room, status="out of memory"):
    """Processes in which images of up to `room` pixels a side run; which were started."""
    started = []

    def run_isolated(target, sizes, **limits):
        started.append(sizes["side"])
        value = {"tokens": sizes["side"] ** 2 // 16, "losses": [1.0, 0.5], "seconds_a_step": 0.1, "parameters": 1}
        if sizes["side"] <= room:
            return ChildResult("ok", value, "", 1.0, 5 * 10**8, 1.0)
        return ChildResult(status, None, "killed", 1.0, 10**9, 1.0)

    monkeypatch.setattr(fit, "run_isolated", run_isolated)
    return started


def test_memory_is_searched_between_what_ran_and_what_did_not(monkeypatch):
    started = children(monkeypatch, room=730)
    sizes = {**SIZES, "gigabytes": 1.0, "seconds": 10}
    figure = fit.tokens_in_memory(sides={"fit": [160, 320, 640, 960, 1920]}, **sizes)
    assert started == [160, 320, 640, 960, 800, 720]  # 800 is at most 1.25 times 720, in patches
    assert (figure.value, figure.unit) == (720**2 // 16, "tokens")
    assert figure.details["most_tokens"] == {"fit": figure.value}
    started.clear()
    assert fit.tokens_in_memory(sides={"fit": [160, 320]}, **sizes).value == 320**2 // 16
    assert started == [160, 320]  # nothing failed
    started.clear()
    assert fit.tokens_in_memory(sides={"fit": [960]}, **sizes).value == 0
    assert started == [960]


def test_time_is_not_searched(monkeypatch):
    started = children(monkeypatch, room=330, status="timeout")
    rows = fit.upwards("fit", [320, 640, 1280], gigabytes=1.0, seconds=10, **SIZES)
    assert started == [320, 640]
    assert [row["status"] for row in rows] == ["ok", "timeout"]


def test_a_peak_that_nobody_saw_in_time_does_not_count(monkeypatch):
    value = {"tokens": 64, "losses": [1.0, 0.5], "seconds_a_step": 0.1, "parameters": 1}
    monkeypatch.setattr(fit, "run_isolated", lambda *_, **__: ChildResult("ok", value, "", 1.0, 2 * 10**9, 1.0))
    (row,) = fit.upwards("fit", [32, 64], gigabytes=1.0, seconds=10, **SIZES)
    assert row["status"] == "out of memory"
    assert "tokens" not in row


def test_a_fault_is_not_taken_for_a_limit():
    with pytest.raises(AssayError, match="size must be a multiple of 16, got 40"):
        fit.upwards("fit", [40], gigabytes=8, seconds=240, **SIZES)
