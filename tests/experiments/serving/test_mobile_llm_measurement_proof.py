"""The experiments of mobile_llm_measurement notice answers that are wrong, a task that tells nothing, and a formula that is.

Engines, boxes and cells are imitated: what they answer and measure is written here, all else is what really runs.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import calibration, write_tiny_llama

from assay import catalogue
from assay.evidence.record import changed
from assay.evidence.types import Estimate, Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import mobile_llm_measurement as room
from assay.methods.core.fleet.hardware import Link
from assay.methods.core.quantize.formats import FORMATS
from assay.methods.serving.mobile_llm_measurement import Figures, Row

CLAIMS = {found.claim.split("/")[1]: found for found in experiments_of("mobile_llm_measurement")}
LATENCY, LARGEST = "mobile_llm_measurement/phone-latency", "mobile_llm_measurement/largest-on-phone"
POINT = {"round_trip": 0.1, "megabits": 20.0, "new_tokens": 4, "questions": 48, "layers": 30}


def test_the_experiments_are_those_of_the_catalogue():
    claims = {claim.id.split("/")[1] for claim in catalogue.get("mobile_llm_measurement").claims}
    assert set(CLAIMS) == claims == {"phone-latency", "largest-on-phone"}
    assert CLAIMS["largest-on-phone"].computed
    assert not CLAIMS["phone-latency"].computed
    assert all(set(found.decides) == {"smoke", "small", "full"} for found in CLAIMS.values())


# --------------------------------------------------------------------------------------------------------------------- the answer


class Clever:
    """An engine that knows the answers to all but every `wrong`-th question that has a text."""

    def __init__(self, wrong=6, always=""):
        self.wrong, self.always, self.asked, self.threads = wrong, always, 0, []
        self.answers = {one.prompt: one.label for one in room.module_questions(POINT["questions"], seed=room.ASKED)}

    def ask(self, prompt, new_tokens):
        self.threads.append(room.torch.get_num_threads())
        known = self.answers.get(prompt)
        self.asked += known is not None
        text = "statistics" if known is None else known if self.asked % self.wrong else "I do not know"
        return SimpleNamespace(
            text=f" {self.always or text}", seconds=1.0, first=0.5, parts={"prefill": 0.5, "decode": 0.5}, unaccounted=0.0, sent=1,
            received=1, prompt_tokens=9, new_tokens=new_tokens,
        )  # fmt: skip

    def peak_bytes(self):
        return 1

    def close(self):
        self.closed = True


@pytest.fixture
def sides(monkeypatch):
    """Phone and cloud without models: `cloud` and `phone` may be replaced."""
    made = SimpleNamespace(cloud=Clever(), phone=Clever(), free="bfloat16")

    class Imitated(room.Sides):
        def __init__(self, round_trip, megabits, layers):
            self.cores, self.known, self.free_name = 2, {}, made.free
            self.link = Link(2.5e6, 0.05)
            self.cloud = self.box = made.cloud
            self.plain = self.ours = self.free = made.phone
            self.sessions, self.started = [made.cloud], {"load": 1.0}

    monkeypatch.setattr(room, "Sides", Imitated)
    monkeypatch.setattr(room, "count_children_as_ours", lambda: None)
    return made


def test_the_same_answers_from_afar_are_a_gain_where_they_come_sooner(sides):
    record = record_of(LATENCY, POINT)
    assert judge(record).verdict is Verdict.REPRODUCED
    controls = record.quality.controls
    margin = record.quality.margin
    assert controls["deleted"] < record.quality.baseline - margin
    assert controls["random"] == 0.25 < record.quality.baseline - margin
    assert set(controls) == {"deleted", "random", "rival"}
    assert record.details["scores"]["phone"]["parse_failures"] == pytest.approx(1 / 6)
    assert record.details["adds_up"]
    assert sides.cloud.closed


def test_worse_answers_from_afar_do_not_pay(sides):
    sides.cloud = Clever(always="turtle")  # a choice that does not look at the text
    assert verdict_of(LATENCY, POINT) is Verdict.DOES_NOT_PAY
    sides.cloud = Clever(always="Hmm")  # nothing that can be parsed
    assert verdict_of(LATENCY, POINT) not in PAYS


def test_a_model_that_guesses_shows_nothing(sides):
    sides.cloud = sides.phone = Clever(always="turtle")
    assert verdict_of(LATENCY, POINT) is Verdict.QUALITY_NOT_SHOWN


def test_a_task_that_can_be_done_without_its_text_shows_nothing(sides, monkeypatch):
    monkeypatch.setattr(room, "without_text", lambda question: question)
    assert verdict_of(LATENCY, POINT) is Verdict.QUALITY_NOT_SHOWN


def test_there_are_as_many_questions_as_each_scale_asks():
    for found in CLAIMS.values():
        for points in found.points.values():
            count = points[0]["questions"]
            assert len(room.module_questions(max(count, 4), seed=room.ASKED)) >= count


def test_the_phone_runs_on_one_thread(sides):
    trial = CLAIMS["phone-latency"].run(**POINT)
    for run in (trial.baseline, trial.free, trial.exact):
        sides.phone.threads.clear()
        run()
        assert sides.phone.threads == [1]
    assert {"the cloud's box without a link"} == set(trial.arms)


def test_our_own_loop_on_the_phone_can_refuse_the_cloud(sides):
    """What was measured decides: where the phone's loop is faster, the cloud does not pay."""
    record = record_of(LATENCY, POINT)
    faster = Estimate(median=0.8, low=0.7, high=0.9)
    found = judge(changed(record, ratios={**record.ratios, "exact": faster}))
    assert found.verdict is Verdict.DOES_NOT_PAY
    assert "compiled loop" in found.reason


def test_what_is_free_is_llama_cpp_where_it_is_installed(monkeypatch):
    opened = []
    monkeypatch.setattr(
        room,
        "hosted",
        lambda kind, **rest: opened.append((kind.name, rest["threads"])) or SimpleNamespace(session=Clever()),
    )
    monkeypatch.setattr(room, "open_transformers", lambda **rest: opened.append((rest["format"], rest["threads"])))
    bare = object.__new__(room.Sides)
    bare.sessions = []
    monkeypatch.setattr(room, "LLAMA_CPP", replace(room.LLAMA_CPP, needs=("json",)))
    assert "llama.cpp" in bare._free("folder", "x.gguf")[0]
    monkeypatch.setattr(room, "LLAMA_CPP", replace(room.LLAMA_CPP, needs=("no_such_package",)))
    assert "no_such_package is not installed" in bare._free("folder", "x.gguf")[0]
    assert opened == [("llama.cpp", 1), ("bf16", 1)]


# ---------------------------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def imitated(monkeypatch, tmp_path):
    """Cells that take three times their bounds and something fixed, on a machine of round numbers."""
    folder = write_tiny_llama(tmp_path / "m", hidden=64, layers=4, vocab=512)
    state = SimpleNamespace(factor=3.0, fixed=Figures(0.01, 1e-3, 5e7), bend=1.0)

    def matrix(plan, questions, **settings):
        return [imitated_row(cell) for cell in plan]

    def imitated_row(cell):
        status, reason = "ok", ""
        if why := cell.engine.missing(cell.model.gguf):
            return facts(cell, "missing", why)
        found = room.sizes_of(cell.model.folder, cell.format, gguf=cell.model.gguf)
        bounds = room.lower_bounds(found, room.this_machine(found, cell.site.threads), 20, room.TOKENS)
        bend = state.bend if cell.site.threads == 2 and cell.model.name == "whole" else 1.0
        seen = [
            bend * state.factor * getattr(bounds, name) + getattr(state.fixed, name)
            for name in ("prefill", "token", "memory")
        ]
        if cell.site.memory_bytes is not None and cell.site.memory_bytes < seen[2]:
            return facts(cell, "out of memory", "killed")
        answer = {
            "seconds": seen[0] + (room.TOKENS - 1) * seen[1], "first": seen[0], "new_tokens": room.TOKENS, "unaccounted": 0.0, "cached": 0,
            "parts": {"prefill": seen[0], "decode": (room.TOKENS - 1) * seen[1]}, "prompt_tokens": 20,
        }  # fmt: skip
        return facts(
            cell,
            status,
            reason,
            cold=dict(answer),
            warm=[answer],
            accuracy=0.5,
            parse_failures=0.0,
            same=True,
            peak_bytes=int(seen[2]),
        )

    def facts(cell, status, reason, **more):
        site = cell.site
        return Row(
            cell.name,
            cell.model.name,
            cell.format,
            cell.engine.name,
            site.name,
            site.kind,
            site.threads,
            1,
            status,
            reason,
            **more,
        )

    monkeypatch.setattr(room, "model_folder", lambda name: folder)
    monkeypatch.setattr(room, "deployment_matrix", matrix)
    monkeypatch.setattr(room, "calibrate", lambda **settings: calibration())
    monkeypatch.setattr(room, "gguf_file", lambda: None)
    return state


SMALL = dict(CLAIMS["largest-on-phone"].points["small"][0])


def test_the_largest_model_is_the_one_that_fills_the_phone_or_its_time(imitated):
    record = record_of(LARGEST, SMALL)
    assert judge(record).verdict is Verdict.COMPUTED
    value, arms = record.measured.median, record.arms
    assert value == pytest.approx(min(arms["by memory alone"], arms["by time alone"]), rel=0.01)
    assert (
        value
        < record.free
        == pytest.approx(min(arms["by memory alone, the bound"], arms["by time alone, the bound"]), rel=0.01)
    )
    # by hand: three times the bytes of the weights, and 50 MB
    share = room.SHARE * room.PHONE.memory
    assert arms["by memory alone, the bound"] / arms["by memory alone"] == pytest.approx(
        3 * share / (share - 5e7), rel=0.1
    )
    errors = record.details["errors_on_cells_not_fitted"]
    assert set(errors) == {"transformers bf16", "decode loop int4", "assay serve as stored"}
    assert all(len(one["cells"]) == 1 for one in errors.values())
    assert all(
        one[f"mean_{what}"] == pytest.approx(0, abs=1e-6)
        for one in errors.values()
        for what in ("prefill", "token", "memory")
    )
    assert record.details["bounds_beaten"] == {}
    assert any("llama.cpp" in name for name in record.details["gaps"])
    limits = record.details["memory_limits"]
    assert [limits[key]["ran"] for key in ("0.75 of it", "1.25 of it")] == [False, True]


def test_a_formula_that_forgets_the_scales_changes_the_largest_model(imitated, monkeypatch):
    honest = record_of(LARGEST, SMALL).measured.median
    real = FORMATS["int4"]
    monkeypatch.setitem(FORMATS, "int4", replace(real, bytes=lambda n, k: n * k // 2))
    broken = record_of(LARGEST, SMALL)

    assert broken.measured.median > 1.05 * honest


def test_an_engine_that_takes_more_holds_less(imitated):
    honest = record_of(LARGEST, SMALL)
    imitated.factor = 6.0
    heavier = record_of(LARGEST, SMALL)
    assert heavier.measured.median < 0.7 * honest.measured.median
    assert heavier.free == pytest.approx(honest.free)


def test_what_a_line_cannot_foretell_is_an_error_on_the_cells_held_out(imitated):
    imitated.bend, imitated.fixed = 1.5, Figures(1e-7, 1e-7, 1e3)
    record = record_of(LARGEST, SMALL)
    errors = record.details["errors_on_cells_not_fitted"]["decode loop int4"]
    assert errors["mean_prefill"] > 0.1
    assert errors["mean_memory"] > 0.05


def test_cells_faster_than_the_bound_are_said(imitated):
    imitated.factor, imitated.fixed = 0.5, Figures(0.0, 0.0, 0.0)
    record = record_of(LARGEST, SMALL)
    assert record.details["bounds_beaten"]


def test_a_cell_that_fails_is_no_figure(imitated, monkeypatch):
    real = room.deployment_matrix
    monkeypatch.setattr(
        room,
        "deployment_matrix",
        lambda *a, **k: [replace(row, status="failed", reason="why") for row in real(*a, **k)],
    )
    with pytest.raises(RuntimeError, match="failed: why"):
        CLAIMS["largest-on-phone"].run(**SMALL)


def test_the_lowest_layers_are_a_model(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_tiny_llama(tmp_path / "whole", layers=4)
    half = room.part_of(folder, tmp_path, 2)
    assert room.part_of(folder, tmp_path / "other", 4) == folder
    whole, found = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, half))
    assert len(found.model.layers) == 2
    ids = torch.arange(5)[None]
    with torch.no_grad():
        inner = whole.model(ids, output_hidden_states=True).hidden_states[2]
        assert torch.allclose(found.lm_head(found.model.norm(inner)), found(ids).logits, atol=1e-5)
