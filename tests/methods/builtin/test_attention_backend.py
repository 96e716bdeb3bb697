"""Dense attention through the kernel, in models: every mask transformers can ask for gives what SDPA gives."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import tiny_model, token_ids

from assay.methods.builtin import attention_backend
from assay.methods.builtin.attention_backend import transform
from assay.methods.core.attention.integration import causal_mask, register_attention
from assay.methods.core.attention.plan import load_kernel
from assay.methods.transform import Transform, TuneContext

CONTEXT = TuneContext("ttft", prompt_tokens=2048, new_tokens=8)
needs_kernel = pytest.mark.skipif(not load_kernel(), reason="needs a C++ compiler")


def changed(model, backend="kernel"):
    attention_backend.register()
    found = copy.deepcopy(model)
    if backend == "kernel" and not load_kernel():
        found.set_attn_implementation(attention_backend.NAME)
        return found
    return transform.apply(found, {"backend": backend}, CONTEXT)


def padded_batch():
    ids, mask = token_ids(3, 40), torch.ones(3, 40, dtype=torch.int64)
    for row, padding in ((1, 7), (2, 33)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_and_generation_equal_sdpa(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("assay.methods.core.attention.plan.load_kernel", lambda: False)
    model = tiny_model().to(dtype)
    other, ids = changed(model), token_ids(2, 50)
    with torch.no_grad():
        close = {torch.float32: 2e-4, torch.bfloat16: 0.5, torch.float64: 1e-9}[dtype]
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=close, rtol=1e-3)
    if dtype != torch.bfloat16:
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(other.generate(ids, max_new_tokens=10, do_sample=False), expected)


def test_no_mask_is_made_for_a_plain_prompt():
    size = {"batch_size": 2, "q_length": 8, "kv_length": 8}
    assert causal_mask(**size) is None
    assert causal_mask(**size, attention_mask=torch.ones(2, 8, dtype=torch.bool)) is None
    assert causal_mask(2, 1, 9, 8) is None
    assert causal_mask(2, 4, 12, 8) is None
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]).bool()
    starts = causal_mask(**size, attention_mask=padding)
    assert starts.dtype == torch.int64
    assert starts.flatten().tolist() == [2, 0]
    assert causal_mask(**size, attention_mask=padding[1:].flip(-1)) is None
    right = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    assert causal_mask(1, 8, 8, attention_mask=right) is None  # no token sees what follows it
    full = causal_mask(1, 1, 8, 7, attention_mask=right)  # a later query would
    assert full.flatten().tolist() == right.flatten().tolist()
    holes = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]]).bool()
    assert causal_mask(1, 8, 8, attention_mask=holes).shape == (1, 1, 8, 8)
    assert causal_mask(1, 8, 16).shape == (1, 1, 8, 16)  # a static cache, mostly empty


def test_left_padding():
    model, (ids, mask) = tiny_model(), padded_batch()
    other = changed(model)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(other.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False), expected)
    with torch.no_grad():
        found = other(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, model(ids, attention_mask=mask).logits[mask.bool()], atol=2e-4, rtol=1e-3)


def test_right_padding_and_holes():
    model, ids = tiny_model(), token_ids(2, 50)
    other = changed(model)
    right, holes = torch.ones(2, 2, 50, dtype=torch.int64)
    right[1, 30:] = 0
    holes[0, 10:14] = 0
    with torch.no_grad():
        for mask in (right, holes):
            real = mask.bool()
            found, expected = (m(ids, attention_mask=mask).logits[real] for m in (other, model))
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_packed_sequences_and_masks_of_the_caller():
    model, ids = tiny_model(), token_ids(1, 50)
    other = changed(model)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    mask = torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = mask | torch.eye(50, dtype=torch.bool)
    with torch.no_grad():
        for given in ({"position_ids": positions, "use_cache": False}, {"attention_mask": mask}):
            torch.testing.assert_close(other(ids, **given).logits, model(ids, **given).logits, atol=2e-4, rtol=1e-3)


def test_chunks_and_caches():
    model, ids = tiny_model(), token_ids(1, 60)
    other = changed(model)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for part in ids.split([23, 1, 16, 20], dim=1):
            out = other(part, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-3)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    for options in ({"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 17}):
        assert torch.equal(other.generate(ids, max_new_tokens=8, do_sample=False, **options), expected)


def test_sliding_windows():
    model = tiny_model("Mistral", sliding_window=16)
    other = changed(model)
    for ids in (token_ids(1, 12), token_ids(1, 50)):
        with torch.no_grad():
            torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-3)
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(other.generate(ids, max_new_tokens=10, do_sample=False), expected)


def test_bidirectional_attention():
    model, (ids, mask) = tiny_model(), padded_batch()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    other = changed(model)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-3)
        found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (other, model))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_head_dimensions_the_kernel_does_not_take():
    model, ids = tiny_model(hidden_size=48, num_attention_heads=4), token_ids(1, 50)  # dimension 12
    attention_backend.register()
    other = copy.deepcopy(model)
    other.set_attn_implementation("assay_dense")
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-3)
    assert all(config["backend"] != "kernel" for config in transform.configs(model, CONTEXT))


def test_training_still_has_gradients():
    model = tiny_model(attention_dropout=0.0).train()
    other, ids = changed(model).train(), token_ids(1, 50)
    for m in (model, other):
        m(ids, labels=ids).loss.backward()
    for (name, expected), found in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-3, msg=name)


@needs_kernel
def test_compiled_model():
    model, ids = changed(tiny_model()), token_ids(1, 50)
    step = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(step(ids, use_cache=False).logits, model(ids).logits, atol=1e-4, rtol=1e-3)


def test_the_transform():
    assert isinstance(transform, Transform)
    assert transform.exact
    model = tiny_model()
    fit = transform.applies_to(model, CONTEXT)
    if load_kernel():
        assert fit.applies
        assert transform.configs(model, CONTEXT) == [{"backend": "kernel"}]
        assert fit.effects[0].bytes == 0.5  # two key heads for four query heads
        model = transform.apply(model, {}, CONTEXT)
        assert model.config._attn_implementation == "assay_dense"
    assert transform.apply(model, {"backend": "eager"}, CONTEXT).config._attn_implementation == "eager"
    assert transform.configs(model, CONTEXT)[-1] == {"backend": "sdpa"}
    assert "transformers model" in transform.applies_to(torch.nn.Linear(2, 2), CONTEXT).reason


def test_errors():
    model = tiny_model()
    with pytest.raises(ValueError, match="backend must be one of 'kernel', 'sdpa', 'eager'"):
        transform.apply(model, {"backend": "flash"}, CONTEXT)
    with pytest.raises(ValueError, match="unknown configuration"):
        transform.apply(model, {"speed": 2}, CONTEXT)
    with pytest.raises(ValueError, match="does not fit this model"):
        transform.apply(torch.nn.Linear(2, 2), {}, CONTEXT)
    for name in ("sdpa", "assay_a/b", "mine"):
        with pytest.raises(ValueError, match="name must begin with 'assay_'"):
            register_attention(name, lambda *a, **k: None)


@pytest.mark.model
def test_smollm2(smollm2):
    from assay.workloads.text import long_prompt

    ids = long_prompt(smollm2.tokenizer, 200)
    other = changed(smollm2.model)
    with torch.no_grad():
        expected = smollm2.model(ids, logits_to_keep=50).logits
        torch.testing.assert_close(other(ids, logits_to_keep=50).logits, expected, atol=2e-3, rtol=1e-3)
    expected = smollm2.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), expected)
