"""Every attention of ours on models it was not written with: the stock model's output at the exact setting, or a refusal that
changes nothing. The whole of it runs in `make sweep`, a small part every time."""

import copy

import pytest
import torch
from tests.properties.architectures import ARCHITECTURES, CAUSAL, TOKENS, build, inputs, output

from assay.methods.attention import sageattention2, sinklora, xattention
from assay.methods.builtin import attention_backend
from assay.methods.core import kernels
from assay.methods.core.attention.integration import can_register, share_reached, windows
from assay.methods.transform import TuneContext

CONTEXT = TuneContext("ttft", 4096, 16)
EXACT = {"min_tokens": 0}


def grouped(model):
    return sinklora.use_sf_attention(model).eval()


APPLY = {
    "attention_backend": lambda model: attention_backend.transform.apply(model, {}, CONTEXT),
    "xattention": lambda model: xattention.transform.apply(
        model, {"tau": 1.0, "stride": 4, "block": 16, **EXACT}, CONTEXT
    ),
    "xattention by flex": lambda model: xattention.transform.apply(
        model, {"tau": 1.0, "stride": 4, "block": 16, "backend": "flex", **EXACT}, CONTEXT
    ),
    "sageattention2": lambda model: sageattention2.transform.apply(model, {"qk": "exact", **EXACT}, CONTEXT),
    "eviction": sinklora.use_eviction,
    "sf_attention": grouped,
}
QUICK = ("llama", "gpt2", "mistral", "gemma3", "gemma2", "gpt_oss", "mamba", "bert", "t5", "vit")
REFUSED = {
    "gemma2": "soft-capped",
    "mamba": "has no attention",
    "t5": "encoder-decoder",
    "m2m100": "encoder-decoder",
    "whisper": "encoder-decoder",
}
ONLY_PLAIN = {"mistral", "gemma3", "gpt_oss", "bert", "vit", "clip-vision"}  # refused by the two of SinkLoRA


def state_of(model):
    configs = [
        m.config.to_dict() | {"_": m.config._attn_implementation} for m in model.modules() if hasattr(m, "config")
    ]
    return copy.deepcopy(configs), [type(m).__name__ for m in model.modules()], model.training


def applied(name, method, **changes):
    """The model with the method, or None where it refuses, as it should and without a trace."""
    model = build(name, **changes)
    before = state_of(model)
    refused = REFUSED.get(name) or (ONLY_PLAIN & {name} and method in ("eviction", "sf_attention"))
    if not refused:
        return APPLY[method](model)
    with pytest.raises(ValueError, match=refused if isinstance(refused, str) else "cannot be replaced") as error:
        APPLY[method](model)
    assert state_of(model) == before
    assert str(error.value)[0].islower()
    assert not str(error.value).endswith(": ")
    return None


def close(found, expected):
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("method", [name for name in APPLY if "flex" not in name])
@pytest.mark.parametrize("name", QUICK)
def test_equals_the_stock_model_or_refuses_untouched(name, method):
    if (model := applied(name, method)) is not None:
        close(output(model, name), output(build(name), name))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", APPLY)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, method, dtype):
    if (model := applied(name, method)) is not None:
        found, expected = output(model.to(dtype), name, batch=8), output(build(name), name, batch=8)
        if dtype == torch.float32:
            close(found, expected)
        else:  # no further from float32 than the stock model in bfloat16, which sends tokens to other experts as well
            stock = output(build(name).to(dtype), name, batch=8)
            assert (found - expected).norm() < 1.5 * (stock - expected).norm() + 1e-3 * expected.norm()


def left_padded(batch, tokens=TOKENS):
    ids = inputs("llama", batch, tokens)["input_ids"]
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 5 * row % (tokens - 4)] = 0
    return ids * mask, mask


@torch.no_grad()
def check_padded(name, method, batch):
    if (model := applied(name, method)) is None:
        return
    ids, mask = left_padded(batch)
    stock = build(name)
    found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (model, stock))
    close(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def check_generation(name, method, **options):
    """The same tokens with a cache and left padding, as scores (ties between tokens mean nothing)."""
    if (model := applied(name, method)) is None:
        return
    ids, mask = left_padded(3)
    same = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    found, expected = (
        m.generate(ids, attention_mask=mask, pad_token_id=0, **same, **options) for m in (model, build(name))
    )
    close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss"])
def test_left_padding_generation_and_chunks(name):
    for method in ("xattention", "sageattention2"):
        check_padded(name, method, 3)
        check_generation(name, method)
    check_generation(name, "attention_backend", prefill_chunk_size=20)


@pytest.mark.sweep
@pytest.mark.parametrize("method", APPLY)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mamba"])
def test_every_decoder_padded_and_generating(name, method):
    check_padded(name, method, 8)
    check_generation(name, method)
    check_generation(name, method, prefill_chunk_size=20)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_windows_and_sinks_run_by_the_plans(name):
    """The kernel takes them: no layer falls back to a dense mask."""
    before = kernels.paths()
    output(applied(name, "attention_backend"), name)
    ran = {path: count - before.get(path, 0) for path, count in kernels.paths().items() if count > before.get(path, 0)}
    assert list(ran) in (["attention: kernel"], ["attention: gather"]), ran


def test_xattention_leaves_blocks_of_a_window_out():
    """A plan inside the window, exact at its edge: what is left out is less mass than 1 - tau."""
    q, k, v = torch.randn(3, 1, 2, 256, 32, generator=torch.Generator().manual_seed(0)).unbind()
    k = k * 4
    plan = xattention.xattention_plan(q, k, tau=0.5, stride=1, block=16, window=100)
    assert 0 < plan.density() < 0.9
    assert not (plan.mask & ~plan.allowed()).any()
    assert (plan.recall(q, k) > 0.49).all()
    exact = xattention.xattention(q, k, v, tau=1.0, stride=4, block=16, window=100)
    seen = plan.dense().visible(0, 256)
    torch.testing.assert_close(
        exact, torch.nn.functional.scaled_dot_product_attention(q, k, v, seen), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("backend", ["kernel", "torch"])
def test_xattention_scores_of_a_window_are_its_exact_masses(backend):
    q, k = torch.randn(2, 2, 4, 83, 32, generator=torch.Generator().manual_seed(1)).unbind()
    for last in (83, 30):
        if backend == "kernel" and not kernels.load("block_attention"):
            continue
        part = q[:, :, -last:]
        found = xattention.block_scores(part, k, stride=1, block=16, window=37, backend=backend)
        plan = xattention.AttentionPlan(last, 83, 16, window=37)
        share = (part @ k.mT * 32**-0.5).masked_fill(~plan.visible(0, last), -torch.inf).softmax(-1)
        lead, tail = plan.offset - plan.first_block * 16, plan.key_blocks * 16 - 83
        share = torch.nn.functional.pad(share, (0, tail, lead, tail))
        expected = share.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).sum((3, 5))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        coarse = [
            xattention.block_scores(part, k, stride=4, block=16, window=37, backend=b) for b in (backend, "torch")
        ]
        torch.testing.assert_close(*coarse, atol=1e-5, rtol=1e-4)


def test_a_transform_that_reaches_too_few_layers_says_so():
    short = build("gemma3", layer_types=["sliding_attention", "sliding_attention"], sliding_window=512)
    fit = xattention.transform.applies_to(short, CONTEXT)
    assert not fit.applies
    assert fit.share == 0
    assert fit.reason == "2 of 2 attention layers see 512 tokens at most and stay dense (1024 needed)"
    half = xattention.transform.applies_to(build("gemma3", sliding_window=512), CONTEXT)
    assert half.applies
    assert half.share == 0.5
    assert half.reached == "1 of 2 attention layers see 512 tokens at most and stay dense"
    every = xattention.transform.applies_to(build("mistral", sliding_window=2048), CONTEXT)
    assert every.applies
    assert every.share == 1
    assert every.reached == ""
    assert share_reached(short, 4096, 512, "stay exact")[0] == 1
    assert windows(build("gpt_oss")) == [16, None]
    assert windows(build("qwen2")) == [None, None]
    assert attention_backend.transform.applies_to(build("mistral"), CONTEXT).share == 1


def test_soft_caps_are_an_error_in_our_words():
    """Also where somebody sets the name by hand: an error, not numbers without the cap."""
    attention_backend.register()
    model = build("gemma2")
    model.set_attn_implementation("assay_dense")
    with pytest.raises(ValueError, match="softcap must be None"):
        output(model, "gemma2")


def test_models_without_the_interface_or_with_biases_are_refused():
    import transformers

    small = {"n_embed": 32, "n_head": 2, "n_layer": 1, "hidden_size": 32, "vocab_size": 40}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**small))
    assert can_register(bloom) == "BloomForCausalLM does not use transformers' AttentionInterface"
    with pytest.raises(ValueError, match="AttentionInterface"):
        attention_backend.transform.apply(bloom, {}, CONTEXT)
    mpt = transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=40))
    assert "AttentionInterface" in can_register(mpt)
    assert can_register(torch.nn.Linear(2, 2)) == "needs a transformers model, got Linear"


def test_chunks_are_not_taken_for_windows():
    """Llama 4's chunked attention hands over a local size too; its mask is another."""
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    from assay.methods.core.attention.integration import causal_mask, limits_of

    size = {"batch_size": 2, "q_length": 24, "kv_length": 24, "local_size": 8}
    window = causal_mask(**size, mask_function=sliding_window_causal_mask_function(8))
    assert limits_of(window).window == 8
    assert not limits_of(window).start.any()
    chunks = causal_mask(**size, mask_function=chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)))
    assert chunks.dtype == torch.bool
    assert chunks.shape == (2, 1, 24, 24)
    assert limits_of(chunks) is None
    assert causal_mask(2, 1, 8, 7, local_size=8, mask_function=sliding_window_causal_mask_function(8)) is None
