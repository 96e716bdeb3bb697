from __future__ import annotations

import json
import re

import gguf_cases
import numpy as np
import pytest
import torch
from gguf_cases import CASES, KEPT, Kind

from assay.errors import InputError
from assay.workloads.files import check_gguf
from assay.workloads.gguf_architectures import ARCHITECTURES
from assay.workloads.gguf_models import convertible_types, read_plan, read_tokenizer
from assay.workloads.models import load_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def stored():
    with np.load(gguf_cases.STORED) as file:
        return dict(file)


@torch.no_grad()
def logits(model) -> np.ndarray:
    return model(torch.tensor([gguf_cases.prompt()])).logits[0].numpy()


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# llama.cpp's logits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_converted_model_computes_what_llama_cpp_and_the_original_do(name, stored, tmp_path):
    case = CASES[name]
    digest = gguf_cases.write(case, tmp_path / "tiny.gguf")
    assert digest == str(stored[f"{name}/digest"]), "not the file llama.cpp was given; make the logits anew"
    ours = logits(load_model(tmp_path / "tiny.gguf").model)
    # llama.cpp rounds the inputs of rounded matrices as well, and looks GELU up in half precision
    exact = 5e-3 if case.architecture in ("gemma", "gemma2", "gemma3", "gpt2", "starcoder2") else 5e-5
    allowed = {"F32": exact, "F16": 5e-3, "BF16": 2e-2}.get(case.kind.name, 5e-2)
    assert off(ours[list(KEPT)], stored[name]) < allowed
    if case.kind == Kind.F32 and name != "llama-own-frequencies":  # no configuration was the origin of that one
        assert off(ours, logits(gguf_cases.model(case))) < 1e-6


def test_every_architecture_and_every_readable_type_has_a_case():
    assert {case.architecture for case in CASES.values()} == set(ARCHITECTURES)
    assert {case.kind.name for case in CASES.values()} >= set(convertible_types().values()) - {"IQ1_M", "NVFP4", "Q1_0"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_still_gives_the_stored_logits(name, stored, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs `pip install llama-cpp-python`, which builds llama.cpp")
    gguf_cases.write(CASES[name], tmp_path / "tiny.gguf")
    now = gguf_cases.llama_cpp_logits(tmp_path / "tiny.gguf")
    assert off(now[list(KEPT)], stored[name]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", gguf_cases.TOKENIZERS)
def test_llama_cpp_still_gives_the_stored_ids(name, stored, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs `pip install llama-cpp-python`, which builds llama.cpp")
    gguf_cases.write_tokenizer(tmp_path / "tiny.gguf", *gguf_cases.TOKENIZERS[name])
    assert gguf_cases.llama_cpp_ids(tmp_path / "tiny.gguf").tolist() == stored[f"ids/{name}"].tolist()


# tokenizers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gguf_cases.TOKENIZERS)
def test_text_gets_the_ids_that_llama_cpp_gives_it(name, stored, tmp_path):
    gguf_cases.write_tokenizer(tmp_path / "tiny.gguf", *gguf_cases.TOKENIZERS[name])
    tokenizer = read_tokenizer(tmp_path / "tiny.gguf", check_gguf(tmp_path / "tiny.gguf"))
    ours = [number for text in gguf_cases.TEXTS for number in [*tokenizer(text)["input_ids"], -1]]
    assert ours == stored[f"ids/{name}"].tolist()
    for text in gguf_cases.TEXTS:
        if "<" not in text:  # special tokens are left out
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["llama-bpe", "smollm", "spm"])
def test_the_converted_tokenizer_is_the_one_read(name, tmp_path):
    gguf_cases.write_tokenizer(tmp_path / "tiny.gguf", *gguf_cases.TOKENIZERS[name])
    read = read_tokenizer(tmp_path / "tiny.gguf", check_gguf(tmp_path / "tiny.gguf"))
    loaded = load_model(tmp_path / "tiny.gguf").tokenizer
    for text in gguf_cases.TEXTS:
        assert loaded(text)["input_ids"] == read(text)["input_ids"]


@pytest.mark.parametrize(
    ("pre", "wrong"),
    [(None, "pre is absent"), ("default", "'default'"), ("no-such-rule", "'no-such-rule'.*understood: .*llama-bpe")],
)
def test_a_way_of_cutting_text_that_would_be_guessed_is_refused(pre, wrong, tmp_path):
    gguf_cases.write_tokenizer(tmp_path / "tiny.gguf", pre)
    with pytest.raises(InputError, match=wrong):
        load_model(tmp_path / "tiny.gguf")


# fields ----------------------------------------------------------------------------------------------------------------


def converted_config(path) -> dict:
    return json.loads((load_model(path).folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "attention.clamp_kqv", 8.0),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.max_alibi_bias", 8.0),
        ("llama", "attention.value_length", 32),
        ("llama", "attention.causal", False),
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "logit_scale", 0.5),
        ("llama", "residual_scale", 0.5),
        ("llama", "embedding_scale", 12.0),
        ("llama", "use_parallel_residual", True),
        ("llama", "rope.dimension_count", 8),
        ("llama", "rope.dimension_sections", [4, 4, 0, 0]),
        ("llama", "rope.scaling.type", "dynamic"),
        ("llama", "rope.scaling.attn_factor", 1.5),
        ("llama", "rope.scaling.alpha", 1000.0),
        ("llama", "rope.scaling.yarn_log_multiplier", 0.1),
        ("llama-yarn", "rope.scaling.yarn_ext_factor", 0.5),
        ("llama-yarn", "rope.scaling.yarn_attn_factor", 2.0),
        ("llama-longrope", "rope.scaling.factor", 4.0),
        ("llama-own-frequencies", "rope.scaling.factor", 4.0),
        ("llama", "some.thing.new", 1),
        ("llama", "feed_forward_length", [96, 64]),
        ("llama", "attention.head_count", [4, 2]),
        ("llama", "pooling_type", 3),
        ("llama", "expert_used_count", 2),
        ("llama", "nextn_predict_layers", 1),
        ("mixtral", "expert_gating_func", 2),
        ("mixtral", "expert_weights_scale", 2.5),
        ("mixtral", "expert_weights_norm", False),
        ("mixtral", "expert_shared_count", 1),
        ("mixtral", "expert_group_count", 4),
        ("qwen2moe", "expert_weights_norm", True),
        ("qwen2", "attention.key_length", 32),
        ("qwen2", "attention.sliding_window", 8),
        ("gemma2", "rope.freq_base_swa", 500.0),
        ("gemma3", "attn_logit_softcapping", 30.0),
        ("gpt2", "attention.head_count_kv", 2),
        ("gpt2", "rope.freq_base", 10000.0),
        ("olmo2", "attention.sliding_window", 8),
        ("stablelm", "use_parallel_residual", True),
        ("mamba", "ssm.dt_b_c_rms", True),
        ("mamba", "ssm.group_count", 2),
        ("nemotron", "rope.dimension_count", 64),
        ("gpt-oss", "expert_gating_func", 2),
    ],
)
def test_a_field_that_changes_the_function_and_is_not_converted_is_named(name, key, value, tmp_path):
    case = CASES[name]
    gguf_cases.write(case, tmp_path / "tiny.gguf", extra={key: value})
    with pytest.raises(InputError, match=re.escape(f"{case.architecture}.{key}")) as caught:
        load_model(tmp_path / "tiny.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope.scaling.finetuned", True),
        ("llama", "rope.scaling.type", "none"),
        ("llama", "attention.causal", True),
        ("llama", "tensor_data_layout", "Meta AI original pth"),
        ("llama", "expert_count", 0),
        ("mixtral", "expert_weights_norm", True),
        ("mixtral", "expert_gating_func", 1),
        ("llama-yarn", "rope.scaling.yarn_ext_factor", 1.0),
        ("llama-yarn", "rope.scaling.yarn_attn_factor", 1.138629436),
        ("llama", "general.author", "somebody"),
        ("llama", "somebody.quantized_by", "somebody"),
        ("llama", "nextn_predict_layers", 0),
        ("mixtral", "expert_shared_count", 0),
    ],
)
def test_a_field_that_changes_nothing_is_no_hindrance(name, key, value, tmp_path):
    gguf_cases.write(CASES[name], tmp_path / "tiny.gguf", extra={key: value})
    assert off(logits(load_model(tmp_path / "tiny.gguf").model), logits(gguf_cases.model(CASES[name]))) < 1e-6


@pytest.mark.parametrize("name", ["llama", "phi3", "starcoder2"])
def test_a_window_is_converted(name, tmp_path):
    gguf_cases.write(CASES[name], tmp_path / "tiny.gguf", extra={"attention.sliding_window": 8})
    model = load_model(tmp_path / "tiny.gguf").model
    whole = logits(gguf_cases.model(CASES[name]))
    windowed = logits(model)
    assert model.config.sliding_window == 8
    assert off(windowed[:8], whole[:8]) < 1e-5
    assert off(windowed[20:], whole[20:]) > 1e-2


def test_the_other_yarn_settings_are_converted(tmp_path):
    given = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}
    gguf_cases.write(CASES["llama-yarn"], tmp_path / "tiny.gguf", extra=given)
    rope = converted_config(tmp_path / "tiny.gguf")["rope_parameters"]
    assert (rope["beta_fast"], rope["beta_slow"]) == (16.0, 2.0)


def test_llama_3s_frequencies_are_known_for_what_they_are(tmp_path):
    gguf_cases.write(CASES["llama-llama3"], tmp_path / "tiny.gguf")
    rope = converted_config(tmp_path / "tiny.gguf")["rope_parameters"]
    assert rope == {**gguf_cases.LLAMA3}


@pytest.mark.parametrize("layers", [2, 46])
def test_the_largest_gemma_scales_its_queries_otherwise(layers, tmp_path):
    """No field says it, llama.cpp goes by the number of layers."""
    gguf_cases.write(CASES["gemma2"], tmp_path / "tiny.gguf", extra={"block_count": layers})
    _, plan = read_plan(tmp_path / "tiny.gguf", check_gguf(tmp_path / "tiny.gguf"))
    assert plan.config["query_pre_attn_scalar"] == (16 if layers == 46 else 32)


# tensors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "blk.0.attn_sinks.weight"),
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.0.attn_q.scale"),
        ("llama", "blk.0.ffn_gate.3.weight"),
        ("llama", "blk.7.attn_norm.weight"),
        ("llama", "rope_factors_long.weight"),
        ("llama", "output.bias"),
        ("llama", "something"),
        ("qwen2", "rope_freqs.weight"),
        ("qwen2", "blk.0.attn_output.bias"),
        ("qwen3", "cls.output.weight"),
        ("mixtral", "blk.0.exp_probs_b.bias"),
        ("mixtral", "blk.0.ffn_gate_shexp.weight"),
        ("mixtral", "blk.0.ffn_gate_exps.bias"),
    ],
)
def test_a_tensor_without_a_place_in_the_model_is_named(name, tensor, tmp_path, monkeypatch):
    write = gguf_cases._renamed

    def with_one_more(case, key, array, config):
        more = [(tensor, np.ones(64, np.float32))] if key.endswith("embed_tokens.weight") else []
        return write(case, key, array, config) + more

    monkeypatch.setattr(gguf_cases, "_renamed", with_one_more)
    gguf_cases.write(CASES[name], tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match=f"tensor {re.escape(tensor)}"):
        load_model(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "blk.1.ffn_up.weight"),
        ("llama", "token_embd.weight"),
        ("qwen2", "blk.0.attn_q.bias"),
        ("mixtral", "blk.0.ffn_up_exps.weight"),
        ("gpt2", "blk.0.attn_qkv.bias"),
    ],
)
def test_a_tensor_that_is_absent_is_named(name, tensor, tmp_path):
    gguf_cases.write(CASES[name], tmp_path / "tiny.gguf", drop=tensor)
    with pytest.raises(InputError, match="lacks"):
        load_model(tmp_path / "tiny.gguf")


def test_a_bias_that_only_some_have_is_zero_elsewhere(tmp_path):
    case = CASES["llama-biases"]
    gguf_cases.write(case, tmp_path / "tiny.gguf", drop="blk.1.attn_output.bias")
    wanted = gguf_cases.model(case)
    wanted.model.layers[1].self_attn.o_proj.bias.data.zero_()
    assert off(logits(load_model(tmp_path / "tiny.gguf").model), logits(wanted)) < 1e-6


def test_a_tensor_of_another_shape_is_named(tmp_path):
    gguf_cases.write(CASES["llama"], tmp_path / "tiny.gguf", extra={"feed_forward_length": 128})
    with pytest.raises(InputError, match=r"ffn_\w+.weight has the shape"):
        load_model(tmp_path / "tiny.gguf")


# files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "wrong"),
    [
        ({"general.type": "adapter"}, "'adapter', not a model"),
        ({"split.count": 3}, "one of 3 parts.*--merge"),
        ({"block_count": 0}, "block_count"),
        ({"context_length": 0}, "context_length"),
        ({"rope.freq_base": float("nan")}, "rope.freq_base"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "epsilon"),
    ],
)
def test_what_is_no_whole_model_is_refused(extra, wrong, tmp_path):
    gguf_cases.write(CASES["llama"], tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(InputError, match=wrong):
        load_model(tmp_path / "tiny.gguf")


def test_another_architecture_is_refused_with_those_there_are(tiny, tmp_path):
    from tiny import write_gguf

    write_gguf(tiny, tmp_path / "tiny.gguf", architecture="rwkv7")
    with pytest.raises(InputError, match="'rwkv7' is not among those that assay converts: gemma, .*starcoder2"):
        load_model(tmp_path / "tiny.gguf")


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    gguf_cases.write(CASES["llama"], tmp_path / "tiny.gguf")
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    at = raw.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight") + 4 + 8
    assert raw[at : at + 4] == b"\0\0\0\0"
    raw[at : at + 4] = int(Kind.I32).to_bytes(4, "little")
    (tmp_path / "tiny.gguf").write_bytes(raw)
    with pytest.raises(InputError, match=r"'blk.0.attn_norm.weight' is stored as I32.*readable: F32, F16"):
        load_model(tmp_path / "tiny.gguf")
