"""The experiments of resource_efficient_llm_survey notice formulas that are broken, and a table that has one resource only.

Models are imitated: what they take is worked out here, from honest formulas, before anything is broken.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import calibration

from assay import catalogue
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.compression import resource_efficient_llm_survey as room
from assay.methods.compression.resource_efficient_llm_survey import Decoder, Probe, Timed, first_blocks

SLUG = "resource_efficient_llm_survey"
CLAIMS = {found.claim.split("/")[1]: found for found in experiments_of(SLUG)}
MEMORY, PREFILL, DECODE, ORDERS = (
    f"{SLUG}/{what}" for what in ("memory-error", "prefill-error", "decode-error", "classification")
)
POINTS = {f"{SLUG}/{what}": dict(found.points["small"][0]) for what, found in CLAIMS.items()}
REACHED = {"prefill": 0.6, "token": 0.8}
SPEED = {"fp32": 1.0, "bf16": 2.0, "int8": 0.7, "int4": 0.6}  # of a prompt, in the table of all resources
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_experiments_are_those_of_the_catalogue():
    claims = {claim.id.split("/")[1] for claim in catalogue.get(SLUG).claims}
    assert set(CLAIMS) == claims == {"classification", "memory-error", "prefill-error", "decode-error"}
    assert not any(found.computed for found in CLAIMS.values())
    assert all(set(found.decides) == {"smoke", "small", "full"} for found in CLAIMS.values())
    points = [point for found in CLAIMS.values() for scale in found.points.values() for point in scale]
    assert all(len(point["models"]) > 1 for point in points)  # each is foretold from the others
    times = [*CLAIMS["prefill-error"].points.values(), *CLAIMS["decode-error"].points.values()]
    assert all(len(point["formats"]) > 1 for (point,) in times)  # of which the interval is made


def config_of(name):
    """Of the bundled model without its files."""
    from transformers import LlamaConfig

    return LlamaConfig(**SMOLLM2) if name == room.BUNDLED else REAL_CONFIG(name)


REAL_CONFIG = room.config_of


LIMITS = calibration(cache_bandwidth={1 << 20: 4e10})  # no weights are faster in a cache


def bounds(decoder, format, tokens, new_tokens):
    device = room.device_for(LIMITS, decoder, format, 1e12)
    return {n: room.least_seconds(decoder, device, format, n, new_tokens) for n in tokens}


def taken(decoder, format, tokens, new_tokens, factor):
    """What an imitated model takes: each bound over a utilisation, `factor` times."""
    least = bounds(decoder, format, tokens, new_tokens)
    found = {
        phase: {n: factor * one[phase] / REACHED[phase] for n, one in least.items()} for phase in ("prefill", "token")
    }
    return Timed(found["prefill"], found["token"])


@pytest.fixture
def honest(monkeypatch):
    """Imitated models of a machine of round numbers; all they take is known before a test breaks a formula."""
    monkeypatch.setattr(room, "config_of", config_of)
    monkeypatch.setattr(room, "limits_of", lambda threads: LIMITS)
    monkeypatch.setattr(room, "OthersWatch", lambda: SimpleNamespace(stop=lambda: (0.0, False)))
    decoders = {name: room.decoder_of(config_of(name)) for name in room.MODELS}
    off = {room.BUNDLED: 1.002, room.GEMMA: 0.998, room.LLAMA: 1.001}
    seen, held = {}, {}
    for name, decoder in decoders.items():
        for format in room.FOUR:
            for tokens in (64, 128, 512, 1024):
                for new in (4, 8, 24):
                    parts = [taken(first_blocks(decoder, n), format, [tokens], new, off[name]) for n in (1, 5)]
                    whole = taken(decoder, format, [tokens], new, off[name])
                    seen[name, format, tokens, new] = whole, parts
                told = room.memory_forecast(decoder, format, tokens, 4, 0.0)
                held[name, format, tokens] = told.weight_bytes + told.cache_bytes, told.needed_bytes

    def joined(parts):
        prefill = {n: s for part in parts for n, s in part.prefill.items()}
        return Timed(prefill, {n: s for part in parts for n, s in part.token.items()})

    def seconds_of(name, format, tokens, new_tokens, repeats, *, with_probe=True):
        found = [seen[name, format, n, new_tokens] for n in tokens]
        whole = joined([one for one, _ in found])
        if with_probe:
            few, more = (joined([parts[place] for _, parts in found]) for place in (0, 1))
            return [whole], Probe(1, 5, few, more), {}
        turned = Timed(dict.fromkeys(tokens, 1.0 / SPEED[format]), whole.token)
        return [turned, turned], None, {n: int(held[name, format, n][0]) for n in tokens}

    def memory_of(name, format, tokens, new_tokens):
        return [
            {"before": 3e8, "after": 3e8 + 1.01 * counted + 2e6, "peak": 3e8 + needed, "tensors": counted}
            for counted, needed in (held[name, format, n] for n in tokens)
        ]

    monkeypatch.setattr(room, "seconds_of", seconds_of)
    monkeypatch.setattr(room, "memory_of", memory_of)


@pytest.mark.parametrize("claim", [MEMORY, PREFILL, DECODE, ORDERS])
def test_honest_formulas_pay(honest, claim):
    assert verdict_of(claim, POINTS[claim]) in PAYS


def test_errors_are_printed_cell_by_cell_with_modelled_and_measured_apart(honest):
    for claim in (MEMORY, PREFILL, DECODE):
        record = record_of(claim, POINTS[claim])
        assert record.details["columns"] == ["cell", "modelled", "measured", "error, %"]
        cells = len(POINTS[claim]["models"]) * len(POINTS[claim]["formats"]) * len(POINTS[claim]["tokens"])
        assert len(record.details["table"]) == cells
        for _, modelled, measured, error in record.details["table"]:
            assert error == pytest.approx(100 * abs(modelled / measured - 1))
        assert record.free == record.controls["rival"]
        assert record.details["largest_error"] >= record.measured.median


def test_a_few_blocks_foretell_an_imitated_machine(honest):
    for claim in (PREFILL, DECODE):
        record = record_of(claim, POINTS[claim])
        assert record.arms["a few blocks of the model itself, timed (assay profile)"] < 5
        assert record.arms["the roofline itself, a utilisation of 1"] > 15
        assert record.details["faster_than_the_roofline"] == []
        assert len(record.details["error_of_a_few_blocks"]) == len(record.details["table"])


def test_memory_that_forgets_what_a_packed_model_holds_besides_is_noticed(honest, monkeypatch):
    """resource_efficient_llm_survey/memory-error: the table in float32, the scales and the cache."""
    monkeypatch.setattr(Decoder, "weight_bytes", lambda self, format: self.parameters * room.NOMINAL[format] / 8)
    monkeypatch.setattr(Decoder, "cache_bytes", lambda self, tokens, **settings: 0.0)
    assert verdict_of(MEMORY, POINTS[MEMORY]) not in PAYS


def test_operations_of_all_parameters_are_no_count_of_a_prompt(honest, monkeypatch):
    """resource_efficient_llm_survey/prefill-error"""
    monkeypatch.setattr(Decoder, "prefill_flops", lambda self, tokens, logits=1: 2.0 * self.parameters * tokens)
    assert verdict_of(PREFILL, POINTS[PREFILL]) is Verdict.REFUTED


def test_operations_that_do_not_know_the_length_are_no_count_of_a_prompt(honest, monkeypatch):
    monkeypatch.setattr(Decoder, "prefill_flops", lambda self, tokens, logits=1: 2e11)
    assert verdict_of(PREFILL, POINTS[PREFILL]) not in PAYS


def test_bytes_by_the_name_of_a_format_are_no_count_of_a_token(honest, monkeypatch):
    """resource_efficient_llm_survey/decode-error"""
    monkeypatch.setattr(Decoder, "step_bytes", lambda self, context, format: self.parameters * room.NOMINAL[format] / 8)
    record = record_of(DECODE, POINTS[DECODE])
    assert judge(record).verdict not in PAYS
    assert record.measured.median == pytest.approx(record.controls["rival"], rel=0.05)


def test_one_resource_alone_orders_everything_alike(honest, monkeypatch):
    """resource_efficient_llm_survey/classification"""
    real = room.alike
    monkeypatch.setattr(room, "alike", lambda rows: real([row[:1] for row in rows]))
    record = record_of(ORDERS, POINTS[ORDERS])
    assert record.measured.median == 100
    assert judge(record).verdict is Verdict.REFUTED


def test_contradictions_that_noise_makes_by_itself_show_nothing(honest, monkeypatch):
    imitated = room.seconds_of

    def noisy(name, format, *given, **settings):
        (seen, again), blocks, sizes = imitated(name, format, *given, **settings)
        return [seen, Timed({n: 1 / s for n, s in again.prefill.items()}, again.token)], blocks, sizes

    monkeypatch.setattr(room, "seconds_of", noisy)
    record = record_of(ORDERS, POINTS[ORDERS])
    assert record.controls["deleted"] == 0
    assert judge(record).verdict is Verdict.QUALITY_NOT_SHOWN


def test_where_the_rule_of_thumb_is_better_the_claim_is_refuted(honest, monkeypatch):
    honest_record = record_of(PREFILL, POINTS[PREFILL])
    assert not honest_record.refuted
    real = Decoder.prefill_flops

    def more_for_one(self, tokens, logits=1):
        return real(self, tokens, logits) * (1.4 if self.vocabulary > 100_000 else 1.0)

    def rule(phase, decoder, device, format, tokens):
        return real(decoder, tokens) / device.flops

    monkeypatch.setattr(room, "rule_of_thumb", rule)
    monkeypatch.setattr(Decoder, "prefill_flops", more_for_one)
    assert judge(record_of(PREFILL, POINTS[PREFILL])).verdict is Verdict.REFUTED


# --------------------------------------------------------------------------------------------------------------------- its parts


def cell(model, measured, formula=1.0, format="fp32", tokens=8):
    return room.Cell(model, format, 0, tokens, formula, 1.0, measured)


def test_a_utilisation_comes_from_the_other_model_only():
    cells = [cell("a", 2.0), cell("b", 30.0, formula=10.0), cell("a", 8.0, formula=2.0)]
    cells += [cell("b", 7.0, format="int4"), cell("a", 5.0, format="int4")]
    told = room.transferred(cells, lambda one: one.formula)
    assert told == pytest.approx([3.0, 10 * (2.0 * 4.0) ** 0.5, 6.0, 5.0, 7.0])
    with pytest.raises(ValueError, match="no other model"):
        room.transferred([cell("a", 1.0)], lambda one: one.formula)
    cells = [cell("a", 2.0), cell("b", 3.0), cell("b", 9.0, tokens=16), cell("a", 4.0, tokens=16)]
    assert room.same_length(cells) == pytest.approx([3.0, 2.0, 4.0, 9.0])


def test_the_interval_is_over_what_has_one_utilisation_not_over_models_and_lengths():
    """Of two models, the one's utilisation is too high where the other's is too low: that is one error, not two."""
    few = [cell("a", 1.0), cell("a", 1.0, format="int4")]
    many = [cell(name, 1.0, format=f, tokens=n) for f in ("fp32", "int4") for name in "ab" for n in range(1, 5)]
    wide = room.by_group(many, [10.0] * 8 + [20.0] * 8, lambda one: one.kind)
    narrow = room.by_group(few, [10.0, 20.0], lambda one: one.kind)
    assert (wide.median, wide.low, wide.high, wide.n) == (narrow.median, narrow.low, narrow.high, 2)
    assert room.by_group(many, [10.0] * 16, lambda one: one.run).n == 4


def test_records_count_formats_and_models_as_often_as_they_are_independent(honest, monkeypatch):
    counted, real = [], room.student_interval
    monkeypatch.setattr(room, "student_interval", lambda values: counted.append(len(values)) or real(values))
    for claim in (MEMORY, PREFILL, DECODE, ORDERS):
        record_of(claim, POINTS[claim])
    assert counted == [9, 4, 4, 3]  # models and formats; formats; formats; models


def test_what_others_took_behind_as_long_a_prompt_is_a_control(honest, monkeypatch):
    """Models that are alike need no formula to tell of each other."""
    imitated = room.seconds_of

    def all_alike(name, *given, **settings):
        return imitated(room.BUNDLED, *given, **settings)

    monkeypatch.setattr(room, "seconds_of", all_alike)
    record = record_of(PREFILL, POINTS[PREFILL])
    assert record.controls["deleted"] == pytest.approx(0)
    assert judge(record).verdict not in PAYS


@pytest.mark.parametrize("claim", [PREFILL, DECODE, ORDERS])
@pytest.mark.parametrize("broken", [False, True])
def test_times_of_a_busy_machine_decide_nothing(honest, monkeypatch, claim, broken):
    monkeypatch.setattr(room, "OthersWatch", lambda: SimpleNamespace(stop=lambda: (0.5, True)))
    if broken:  # what would be refuted on a quiet one
        monkeypatch.setattr(Decoder, "prefill_flops", lambda self, tokens, logits=1: 2.0 * self.parameters * tokens)
        monkeypatch.setattr(Decoder, "step_bytes", lambda self, context, format: 1.0 * self.layers)
        real = room.alike
        monkeypatch.setattr(room, "alike", lambda rows: real([row[:1] for row in rows]))
    record = record_of(claim, POINTS[claim])
    assert judge(record).verdict is Verdict.UNDECIDED
    assert record.details["share_of_the_machine_that_others_took"] == 0.5


def test_an_arm_says_what_attention_adds(honest):
    for claim in (PREFILL, DECODE):
        record = record_of(claim, POINTS[claim])
        without = record.arms["the same without attention's operations or bytes"]
        assert record.measured.median < without < record.controls["deleted"]


def test_order_and_agreement():
    assert [room.order(1.0, 1.04), room.order(1.0, 1.2), room.order(1.2, 1.0)] == [0, -1, 1]
    assert room.alike([[1, 1], [2, 2]]) == 100
    assert room.alike([[1, 2], [2, 1]]) == 0
    assert room.alike([[1, 2], [2, 2.01]]) == 100
    assert room.alike([[1, 3], [2, 2], [3, 1]]) == 0
    assert room.alike([[1, 1], [2, 3], [3, 2]]) == pytest.approx(100 * 2 / 3)
    with pytest.raises(ValueError, match="at least two"):
        room.alike([[1, 2]])


def test_bytes_of_tensors_are_counted_once_and_are_what_the_formula_says():
    model = room.built("tiny-llama", "int4")
    decoder = room.decoder_of(room.config_of("tiny-llama"))
    out = room.answered(model, 32, 3)
    counted = decoder.weight_bytes("int4") + decoder.cache_bytes(34, element_bytes=4)
    assert room.tensor_bytes(model, out.cache) == pytest.approx(counted, rel=0.01)


def test_the_published_sizes_of_the_models_that_are_not_loaded():
    assert room.decoder_of(room.config_of(room.LLAMA)).parameters == 68_030_208
    decoder = room.decoder_of(room.config_of(room.GEMMA))
    assert decoder.parameters == 268_098_176
    assert decoder.windows.count(0) == 3
    assert decoder.windows.count(512) == 15


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux gives memory back")
def test_what_a_prompt_freed_is_given_back():
    """Many small blocks lie in the heap, which the allocator keeps."""
    room.give_back()
    before = room.resident()
    blocks = [torch.ones(8_000) for _ in range(1500)]  # 48 MB
    keep = torch.ones(8)  # noqa: F841  # above them, so that the heap cannot shrink by itself
    most = room.resident()
    del blocks
    room.give_back()
    assert most - before > 40e6
    assert room.resident() - before < 10e6


@pytest.mark.slow
def test_a_process_holds_what_is_counted():
    decoder = room.decoder_of(room.config_of("tiny-gemma"))
    for length, found in zip((24, 60), room.memory_of("tiny-gemma", "fp32", [60, 24], 2), strict=True):
        assert found["after"] > 0
        assert found["peak"] >= found["after"] - (1 << 20)
        counted = decoder.weight_bytes("fp32") + decoder.cache_bytes(length + 1, element_bytes=4)
        assert found["tensors"] == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("claim", [PREFILL, DECODE, ORDERS])
def test_tiny_models_are_really_run(claim, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(room, "calibrate", lambda **settings: calibration())
    try:
        record = record_of(claim, dict(CLAIMS[claim.split("/")[1]].points["smoke"][0]))
    finally:
        torch.set_num_threads(before)
    assert record.measured.median >= 0
