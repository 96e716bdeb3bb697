from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.properties.mixers import check_mixer

from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM, make_channel_mixer, make_mixer
from assay.methods.mixers.based import (
    SIZES,
    BaseConv,
    SlidingWindow,
    TaylorAttention,
    advance_state,
    based_config,
    based_layers,
    feature_size,
    features_of,
    kernel,
    quadratic,
    taylor_features,
)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TaylorAttention(36, heads=2, feature_dim=5),
        lambda: TaylorAttention(36, heads=9, feature_dim=4, feature="taylor_full"),
        lambda: TaylorAttention(36, heads=3, feature_dim=8, feature="elu"),
        lambda: SlidingWindow(36, heads=2, window=16),
        lambda: BaseConv(36),
    ],
    ids=["taylor", "taylor_full", "elu", "window", "baseconv"],
)
def test_is_a_mixer(make):
    check_mixer(make, longest=768)


def test_long_sequences_take_the_chunks_and_agree_with_all_pairs():
    mixer = TaylorAttention(16, heads=2, feature_dim=4, chunk=100).double()
    x = torch.randn(2, 700, 16, dtype=torch.float64)
    q, k, v = mixer._qkv(x)
    torch.testing.assert_close(mixer(x), mixer._out(quadratic(q, k, v)), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("merged", [True, False])
def test_features_give_the_taylor_polynomial(merged):
    q, k = 3 * torch.randn(50, 16, dtype=torch.float64), 3 * torch.randn(50, 16, dtype=torch.float64)
    s = (q * k).sum(-1) / 4
    found = (taylor_features(q, merged=merged) * taylor_features(k, merged=merged)).sum(-1)
    torch.testing.assert_close(found, 1 + s + s**2 / 2)
    assert taylor_features(q, merged=merged).shape[-1] == (153 if merged else 273)
    assert feature_size(16, "taylor" if merged else "taylor_full") == (153 if merged else 273)
    assert found.min() >= 0.5


def test_features_first_asked_for_in_inference_mode_serve_training():
    with torch.inference_mode():
        taylor_features(torch.randn(3, 7))
    x = torch.randn(3, 7, requires_grad=True)
    taylor_features(x).sum().backward()
    assert x.grad.isfinite().all()


def test_weights_are_positive_and_sum_to_one():
    q, k = 5 * torch.randn(1, 2, 60, 8, dtype=torch.float64), 5 * torch.randn(1, 2, 60, 8, dtype=torch.float64)
    weights = kernel(q, k).tril()
    assert (weights.sum(-1) >= (torch.arange(60) + 1) / 2).all()
    ones = torch.ones(1, 2, 60, 3, dtype=torch.float64)
    torch.testing.assert_close(quadratic(q, k, ones), ones)
    v = torch.randn(1, 2, 60, 3, dtype=torch.float64)
    torch.testing.assert_close(quadratic(q, k, v)[:, :, 0], v[:, :, 0])


def test_approaches_softmax_attention_with_the_cube_of_the_scores():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 8, dtype=torch.float64) for _ in range(3))
    errors = []
    for size in (0.4, 0.2, 0.1):
        scale = size**0.5
        exact = F.scaled_dot_product_attention(scale * q, scale * k, v, is_causal=True)
        errors.append(float((quadratic(scale * q, scale * k, v) - exact).abs().max()))
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert 6 < larger / smaller < 10, errors  # 2^3


def test_a_window_that_covers_everything_is_causal_attention():
    mixer = SlidingWindow(16, heads=2, window=200).double()
    x = torch.randn(1, 50, 16, dtype=torch.float64)
    q, k, v = mixer._qkv(x)
    whole = mixer._out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(mixer(x), whole)
    assert SlidingWindow(16, heads=2, window=64).reach == 32


def test_state_does_not_grow_and_follows_the_formula():
    mixer = TaylorAttention(64, heads=4, feature_dim=16)
    assert mixer.state_bytes(1) == mixer.state_bytes(100_000) == 4 * 153 * (16 + 1) * 4
    full = TaylorAttention(64, heads=4, feature_dim=16, feature="taylor_full")
    assert full.state_bytes(1) == 4 * 273 * (16 + 1) * 4
    assert sum(p.numel() for p in mixer.parameters()) == 2 * 64 * 64 + 2 * 64 * 64
    assert sum(p.numel() for p in BaseConv(64).parameters()) == 64 * 256 + 256 + 128 * 64 + 64 + 128 * 3


def test_sums_stay_in_float32_in_a_bfloat16_model():
    mixer = TaylorAttention(16, heads=2, feature_dim=4).bfloat16()
    state = mixer.init_state(1)
    y, state = mixer.advance(torch.randn(1, 9, 16).bfloat16(), state)
    assert state["s"].dtype == torch.float32
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["360m", "1.4b"])
def test_released_layouts(size):
    layers = based_layers(size)
    names = [name for name, _ in layers]
    assert len(names) == SIZES[size]["layers"]
    assert names.count("based") == names.count("based_window") == len(SIZES[size]["linear"])
    assert names[:4] == ["baseconv", "based", "based_window", "baseconv"]
    with pytest.raises(ValueError, match="360m"):
        based_layers("7b")


@pytest.mark.parametrize(("size", "width", "layers"), [("360m", 1024, 27), ("1.4b", 1792, 36)])
def test_the_configuration_is_the_released_one_field_by_field(size, width, layers):
    config = based_config(size)
    released = {
        "hidden_size": width,  # n_embd
        "num_hidden_layers": layers,
        "intermediate_size": 2 * width,  # n_inner
        "channel_mixer": ["swiglu", {}],
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "vocab_size": 50264,  # of 50257, padded to a multiple of 8
    }
    assert {name: getattr(config, name) for name in released} == released
    with torch.device("meta"):
        found = {name: make_mixer(name, width, layer=1, layers=layers, **options) for name, options in config.layers}
        glu = make_channel_mixer("swiglu", width, 2 * width)
    taylor, window, conv = (found[name] for name in ("based", "based_window", "baseconv"))
    assert (taylor.heads, taylor.feature_dim, taylor.feature) == (16, 16, "taylor")
    assert (window.heads, window.kv_heads, window.reach, window.rotary) == (
        16,
        16,
        128,
        True,
    )  # window_size 256, one-sided
    assert (conv.width, conv.in_proj.out_features, conv.out_proj.in_features) == (
        3,
        4 * width,
        2 * width,
    )  # expand_proj 4
    biased = {module: [n for n, _ in m.named_parameters() if n.endswith("bias")] for module, m in found.items()}
    assert biased == {
        "based": [],
        "based_window": [],
        "baseconv": ["in_proj.bias", "out_proj.bias"],
    }  # use_bias; no conv_bias
    assert not any(name.endswith("bias") for name, _ in glu.named_parameters())
    assert based_config(size, vocab_size=300).vocab_size == 300
    with pytest.raises(ValueError, match="360m"):
        based_config("7b")


@pytest.mark.parametrize("wrong", [torch.int64, torch.complex64])
def test_whole_and_complex_numbers_are_refused_and_never_cast(wrong):
    q = torch.ones(1, 2, 5, 4)
    s, z = torch.zeros(1, 2, 15, 4), torch.zeros(1, 2, 15)
    for call in (
        lambda: taylor_features(q.to(wrong)),
        lambda: features_of(q.to(wrong), "elu"),
        lambda: kernel(q.to(wrong), q),
        lambda: kernel(q, q.to(wrong)),
        lambda: quadratic(q, q, q.to(wrong)),
        lambda: advance_state(q.to(wrong), q, q, s, z),
        lambda: advance_state(q, q, q, s.to(wrong), z),
    ):
        with pytest.raises(TypeError, match="must hold floating-point numbers"):
            call()
    y, after, _ = advance_state(q[:, :, :0], q[:, :, :0], q[:, :, :0], s, z)
    assert y.shape == (1, 2, 0, 4)
    assert torch.equal(after, torch.zeros_like(after))
    assert quadratic(q[:0], q[:0], q[:0]).shape == (0, 2, 5, 4)
    with pytest.raises(TypeError, match="dtype of q"):
        kernel(q, q.double())
    with pytest.raises(ValueError, match="s must have shape"):
        advance_state(q, q, q, s[:, :, :-1], z)
    with pytest.raises(ValueError, match="feature must be one of"):
        features_of(q, "exp")


def test_generates_and_comes_back_from_disk(tmp_path):
    torch.manual_seed(0)
    layers = [["baseconv", {}], ["based", {"heads": 2, "feature_dim": 4}], ["based_window", {"heads": 2, "window": 8}]]
    model = MixerForCausalLM(MixerConfig(vocab_size=32, hidden_size=16, layers=layers)).eval()
    model.save_pretrained(tmp_path)
    again = MixerForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 32, (2, 20))
    out = again.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    for t in range(20, 28):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaylorAttention(16, heads=3), "heads"),
        (lambda: TaylorAttention(16, heads=2, feature="exp"), "feature"),
        (lambda: TaylorAttention(16, heads=2, feature_dim=0), "feature_dim"),
        (lambda: SlidingWindow(16, heads=2, window=1), "window"),
        (lambda: BaseConv(16, width=0), "width"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
