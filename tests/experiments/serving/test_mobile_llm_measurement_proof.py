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
POINT = {"round_trip": 0.1, "megabits": 20.0, "new_tokens": 4, "questions": 40, "layers": 30}


def test_the_experiments_are_those_of_the_catalogue():
    claims = {claim.id.split("/")[1] for claim in catalogue.get("mobile_llm_measurement").claims}
    assert set(CLAIMS) == claims == {"phone-latency", "largest-on-phone"}
    assert CLAIMS["largest-on-phone"].computed
    assert not CLAIMS["phone-latency"].computed
    assert all(set(found.decides) == {"smoke", "small", "full"} for found in CLAIMS.values())


# --------------------------------------------------------------------------------------------------------------------- the answer


class Clever:
    """An engine that knows the answers to all but every `wrong`-th question that has a text, and to the first `lucky` ones."""

    def __init__(self, wrong=6, always="", lucky=0):
        self.wrong, self.always, self.lucky, self.asked, self.threads = wrong, always, lucky, 0, []
        self.answers = {one.prompt: one.label for one in room.module_questions(POINT["questions"], seed=room.ASKED)}

    def ask(self, prompt, new_tokens):
        self.threads.append(room.torch.get_num_threads())
        known = self.answers.get(prompt)
        self.asked += known is not None
        knows = self.asked % self.wrong or self.asked <= self.lucky
        text = "statistics" if known is None else known if knows else "I do not know"
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
            self.phone = self.free = made.phone
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
    assert controls["random"] == 0.4 < record.quality.baseline - margin  # 16 of 40: one guesser in forty has more
    assert set(controls) == {"deleted", "random", "rival"}
    assert record.details["scores"]["phone"]["parse_failures"] == pytest.approx(6 / 40)
    assert record.details["adds_up"]
    assert record.details["network_seconds_at_which_the_phone_is_as_fast"] == 0.0
    assert sides.cloud.closed


def test_worse_answers_from_afar_do_not_pay(sides):
    sides.cloud = Clever(always="turtle")  # a choice that does not look at the text
    assert verdict_of(LATENCY, POINT) is Verdict.DOES_NOT_PAY
    sides.cloud = Clever(always="Hmm")  # nothing that can be parsed
    assert verdict_of(LATENCY, POINT) not in PAYS


def test_three_wrong_answers_of_forty_are_too_many(sides):
    """The same weights in the same engine: what the way spoils is a loss, and the margin is two."""
    sides.phone, sides.cloud = Clever(wrong=1000), Clever(wrong=1000)
    assert verdict_of(LATENCY, POINT) is Verdict.REPRODUCED
    sides.cloud = Clever(wrong=4)
    assert verdict_of(LATENCY, POINT) is Verdict.DOES_NOT_PAY
    sides.cloud = Clever(wrong=13)
    assert verdict_of(LATENCY, POINT) is Verdict.UNDECIDED


def test_a_model_that_guesses_shows_nothing(sides):
    sides.cloud = sides.phone = Clever(always="turtle")
    assert verdict_of(LATENCY, POINT) is Verdict.QUALITY_NOT_SHOWN


def test_a_lucky_guesser_shows_nothing_either(sides):
    """17 of 40 right are hardly more than a model that knows nothing has now and then."""
    sides.phone, sides.cloud = Clever(wrong=1, lucky=17), Clever(wrong=1, lucky=17)
    record = record_of(LATENCY, POINT)
    assert record.quality.baseline == 0.425
    assert judge(record).verdict is Verdict.QUALITY_NOT_SHOWN


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
    assert trial.exact is None
    for run in (trial.baseline, trial.free):
        sides.phone.threads.clear()
        run()
        assert sides.phone.threads == [1]
    assert not trial.arms


def test_where_the_phone_is_faster_the_cloud_is_refuted_or_does_not_pay(sides):
    """What was measured decides: against the same engine on the phone, and against what is free there."""
    record = record_of(LATENCY, POINT)
    faster = Estimate(median=0.8, low=0.7, high=0.9)
    assert judge(changed(record, measured=faster)).verdict is Verdict.REFUTED
    found = judge(changed(record, ratios={**record.ratios, "free": faster}))
    assert found.verdict is Verdict.DOES_NOT_PAY
    assert "llama.cpp" in found.reason


def test_both_sides_run_the_same_weights_in_the_same_engine(monkeypatch, tmp_path):
    """So that the place alone differs, and the cloud has all cores while the phone has one."""
    opened = {}

    def starting(kind, **rest):
        opened["cloud"] = {"loop": kind.options["loop"], **rest}
        session = SimpleNamespace(port=1, close=lambda: None)
        return SimpleNamespace(end=lambda: None, ready=lambda: SimpleNamespace(session=session, parts={}))

    monkeypatch.setattr(room, "starting", starting)
    monkeypatch.setattr(room, "open_transformers", lambda **rest: opened.setdefault("phone", rest))
    monkeypatch.setattr(room, "model_folder", lambda name: write_tiny_llama(tmp_path))
    monkeypatch.setattr(room, "cores_here", lambda: 2)
    monkeypatch.setattr(room.Sides, "_free", lambda self, *rest: ("nothing", None))
    found = room.Sides(0.1, 20.0, 30)
    found.close()
    same = ("loop", "format", "folder", "gguf")
    assert {name: opened["cloud"][name] for name in same} == {name: opened["phone"][name] for name in same}
    assert (opened["cloud"]["threads"], opened["phone"]["threads"]) == (2, 1)
    assert opened["cloud"]["link"] == Link(2.5e6, 0.05)


def test_one_core_is_no_phone_and_cloud(monkeypatch):
    monkeypatch.setattr(room, "machine", lambda: SimpleNamespace(cores=4, physical_cores=1))
    with pytest.raises(RuntimeError, match="needs two"):
        room.cores_here()
    monkeypatch.setattr(room, "machine", lambda: SimpleNamespace(cores=3, physical_cores=8))
    assert room.cores_here() == 3


def test_what_is_free_is_llama_cpp_where_it_is_installed_else_the_type_the_processor_has(monkeypatch):
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
    assert bare._free("folder", "x.gguf")[0] == "llama.cpp"
    monkeypatch.setattr(room, "LLAMA_CPP", replace(room.LLAMA_CPP, needs=("no_such_package",)))
    for flags, name in ((["avx2", "amx_bf16"], "bfloat16"), (["avx2", "avx512_vnni"], "float32")):
        monkeypatch.setattr(room, "machine", lambda flags=flags: SimpleNamespace(flags=flags))
        found = bare._free("folder", "x.gguf")[0]
        assert found == f"transformers, all in {name} (no_such_package is not installed)"
    assert opened == [("llama.cpp", 1), ("bf16", 1), ("fp32", 1)]


@pytest.mark.slow
def test_the_cloud_says_what_the_phone_does(monkeypatch, tmp_path):
    """Really run, on a tiny model."""
    monkeypatch.setattr(room, "model_folder", lambda name: write_tiny_llama(tmp_path))
    found = room.Sides(0.01, 100.0, 30)
    try:
        said = [ask("The debugger", 8).text for ask in (found.on_phone(found.phone), found.cloud.ask, found.box.ask)]
        assert len(set(said)) == 1
        assert "transformers, all in" in found.free_name or found.free_name == "llama.cpp"
        assert room.described(found, "The debugger", 8)["cloud_peak_bytes"] > 50 << 20
    finally:
        found.close()
    assert not found.sessions


# ---------------------------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def imitated(monkeypatch, tmp_path):
    """Cells that take three times their bounds and something fixed, on a machine of round numbers."""
    folder = write_tiny_llama(tmp_path / "m", hidden=64, layers=6, vocab=512)
    state = SimpleNamespace(factor=3.0, fixed=Figures(0.01, 1e-3, 5e7), bend=1.0, loading=1.5, asked=[])

    def matrix(plan, questions, **settings):
        state.asked += [(cell, len(questions)) for cell in plan]
        return [imitated_row(cell, len(questions)) for cell in plan]

    def imitated_row(cell, questions):
        status, reason = "ok", ""
        if why := cell.engine.missing(cell.model.gguf):
            return facts(cell, "missing", why)
        found = room.sizes_of(cell.model.folder, cell.format, gguf=cell.model.gguf)
        bounds = room.lower_bounds(found, room.this_machine(found, cell.site.threads), 20, room.TOKENS)
        bend = state.bend if cell.model.name == "whole" else 1.0
        seen = [
            bend * state.factor * getattr(bounds, name) + getattr(state.fixed, name)
            for name in ("prefill", "token", "memory")
        ]
        if cell.site.memory_bytes is not None and cell.site.memory_bytes < state.loading * seen[2]:
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
            right=[number % 2 == 0 for number in range(questions)],
            peak_bytes=int(state.loading * seen[2]),
            held_bytes=int(seen[2]),
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
    monkeypatch.setattr(room, "cores_here", lambda: 2)
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
    assert arms["by memory alone, loading in float32 counted"] < arms["by memory alone"]
    errors = record.details["errors_on_cells_not_fitted"]
    assert set(errors) == {"transformers bf16", "decode loop int4", "assay serve as stored"}
    assert all(len(cells) == 1 for cells in errors.values())
    means = record.details["mean_error_on_cells_not_fitted"]
    assert set(means) == {room.OURS, "the bound", "their mean", room.RATIO}
    assert all(means[room.OURS][what] == pytest.approx(0, abs=1e-6) for what in ("prefill", "token", "memory"))
    assert record.details["predictor_beats_all_trivial_ones"] == dict.fromkeys(("prefill", "token", "memory"), True)
    assert record.measured.low == pytest.approx(value, rel=1e-3)
    assert record.measured.high == pytest.approx(value, rel=1e-3)
    assert record.details["bounds_beaten"] == {}
    assert any("llama.cpp" in name for name in record.details["gaps"])
    limits = record.details["memory_limits"]
    assert [limits[key]["ran"] for key in ("0.75 of it", "1.25 of it")] == [False, True]


def test_no_cell_that_judges_is_like_one_that_was_fitted(imitated):
    """Nor is its model: memory does not depend on the threads, so that a model seen on others would be no test of it."""
    parts = [room.Model("1/3", "a"), room.Model("2/3", "b")]
    engines = {"decode loop": ["int4", "bf16"], "assay serve": ["as stored"]}
    for held_out in (1, 2):
        for cells in room.planned(engines, room.Model("whole", "c"), parts, 2, held_out).values():
            fitted, judging = cells[: room.FITTED], cells[room.FITTED :]
            assert len(judging) == held_out
            assert not {cell.model.name for cell in judging} & {cell.model.name for cell in fitted}
            assert len({cell.site.threads for cell in fitted}) == 2
    assert len(room.planned(engines, room.Model("whole", "c"), parts, 2, 3)["decode loop int4"]) == 5


def test_at_least_three_engines_run_and_say_their_precision_and_quality(imitated):
    record = record_of(LARGEST, SMALL)
    ran = {line.split(" | ")[2] for line in record.details["table"][2:] if "missing" not in line}
    assert ran == {"transformers", "decode loop", "assay serve"}
    quality, precision = record.details["quality"], record.details["precision"]
    assert {name.split(", ")[1] for name in quality} == ran
    assert all(name.startswith("whole") and one["questions"] == SMALL["questions"] for name, one in quality.items())
    assert all(one["low"] < one["accuracy"] == 0.5 < one["high"] for one in quality.values())
    assert set(quality) <= set(precision)
    assert all(precision.values())
    assert set(record.details["pareto"]) <= set(quality)  # parts of a model compete with nobody


def test_the_interval_is_how_far_predictions_were_off(imitated):
    imitated.fixed = Figures(1e-7, 1e-7, 1e3)
    imitated.bend = 1.3  # the larger model takes more than a line says
    record = record_of(LARGEST, SMALL)
    assert record.measured.low < 0.95 * record.measured.median
    assert record.measured.high == record.measured.median
    imitated.bend = 0.9
    record = record_of(LARGEST, SMALL)
    assert record.measured.low == record.measured.median < record.measured.high


def test_where_nothing_is_fixed_the_line_beats_nobody(imitated):
    imitated.fixed = Figures(0.0, 0.0, 0.0)
    record = record_of(LARGEST, SMALL)
    means = record.details["mean_error_on_cells_not_fitted"]
    assert means[room.RATIO]["memory"] == pytest.approx(means[room.OURS]["memory"], abs=1e-3)
    assert means["the bound"]["memory"] > 0.5


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
    (error,) = record.details["errors_on_cells_not_fitted"]["decode loop int4"].values()
    assert error["prefill"] < -0.1
    assert error["memory"] < -0.1


def test_cells_faster_than_the_bound_are_said(imitated):
    imitated.factor, imitated.fixed = 0.5, Figures(0.0, 0.0, 0.0)
    record = record_of(LARGEST, SMALL)
    assert record.details["bounds_beaten"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp32", "int4"])
def test_no_bound_lies_above_what_a_real_engine_takes(tmp_path, format):
    model = room.Model("tiny", str(write_tiny_llama(tmp_path, hidden=128, layers=4)))
    cell = room.Cell(model, format, room.LOOP, room.PHONE_SITE)
    (row,) = room.deployment_matrix([cell], room.module_questions(4), new_tokens=room.TOKENS, repeats=1)
    seen = room.seen_of(cell, row)
    assert not seen.beaten
    assert not room.held(seen, {cell.name: row}).beaten


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
