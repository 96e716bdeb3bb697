"""W8A8 layers: the kernel against exact integers and the torch reference, and quantised models against the float ones."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.properties.apart import built_with, python
from torch import nn

from assay.methods.core import kernels
from assay.methods.core.quantize import int8_linear
from assay.methods.core.quantize.formats import pack_wide, unpack_wide
from assay.methods.core.quantize.int8_linear import (
    Int8GatedMLP,
    Int8Linear,
    fuse_block,
    input_rms,
    qkv_rope,
    quantize_linears,
    quantize_rows,
    rotate,
    select,
    smoothing,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 5, 8, 31, 33, 100, 193)
needs_kernel = pytest.mark.skipif(
    not kernels.load("w8a8"), reason="no C++ compiler here; the torch path is tested alone"
)


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both paths: compiled operators and plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(int8_linear, "_ready", False)
    elif not kernels.load("w8a8"):
        pytest.skip("no C++ compiler here")
    return request.param


def layer(n=70, k=52, *, seed=0, norm=False, bias=True, rotation=4) -> Int8Linear:
    torch.manual_seed(seed)
    weight = torch.randn(n, k)
    multiplier = 0.5 + torch.rand(k)
    return Int8Linear(
        weight,
        torch.randn(n) if bias else None,
        multiplier=multiplier,
        norm_eps=1e-5 if norm else None,
        rotation=rotation,
    )


def close(seen: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of the dtype, and up to single codes that fell on the other side of a tie."""
    error = (seen.float() - expected.float()).norm() / expected.float().norm()
    return seen.dtype == expected.dtype == dtype and float(error) < {torch.float32: 2e-4}.get(dtype, 3e-3)


# Pieces ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 4), (1, 1), (70, 53), (130, 256)])
def test_packing_loses_nothing(shape):
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    packed = pack_wide(codes)
    assert packed.shape == (-(-shape[0] // 64), -(-shape[1] // 4), 64, 4)
    whole = unpack_wide(packed)
    assert torch.equal(whole[: shape[0], : shape[1]], codes)
    assert int(whole.abs().sum(dtype=torch.int64)) == int(codes.abs().sum(dtype=torch.int64))  # the rest is zero


def test_rows_are_quantised_by_their_own_peak():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e4, 1.0, -1e4]])
    codes, scale = quantize_rows(x)
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0], [127, 0, -127]]
    assert torch.allclose(scale.flatten(), torch.tensor([2.0, 0.0, 1e4]) / 127)


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_rotation_is_a_hadamard_transform(size):
    x = torch.randn(3, 48)
    turned = rotate(x, size)
    assert torch.allclose(rotate(turned, size), size * x, atol=1e-4)
    assert torch.allclose(turned.norm(dim=-1), size**0.5 * x.norm(dim=-1), rtol=1e-5)
    spike = rotate(torch.eye(48)[5], size)
    assert torch.equal(spike.abs().sort().values, torch.cat([torch.zeros(48 - size), torch.ones(size)]))


# One layer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_integers_come_out_exactly(path, rows):
    """Rows and channels with a peak of 127 have scale 1: the product is one of integers, and float32 holds it exactly."""
    torch.manual_seed(rows)
    x = torch.randint(-127, 128, (rows, 100)).float()
    weight = torch.randint(-127, 128, (75, 100)).float()
    x[:, 3], weight[:, 7] = 127, -127
    assert torch.equal(Int8Linear(weight)(x), x @ weight.T)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("norm", [False, True])
def test_kernel_is_the_reference(rows, dtype, norm):
    linear = layer(norm=norm)
    x = torch.randn(rows, 52).to(dtype)
    assert close(linear(x), linear.reference(x), dtype)


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (64, 64), (65, 63), (200, 1), (1, 300), (128, 1536)])
def test_kernel_takes_any_size(shape):
    linear = layer(*shape, bias=False, rotation=1)
    for rows in (1, 40):
        x = torch.randn(rows, shape[1])
        assert close(linear(x), linear.reference(x), torch.float32)


def test_layer_approximates_the_float_layer(path):
    torch.manual_seed(0)
    exact = nn.Linear(256, 128)
    x = torch.randn(3, 7, 256)
    y = Int8Linear(exact.weight, exact.bias)(x)
    assert y.shape == (3, 7, 128)
    error = (y - exact(x)).norm() / exact(x).norm()
    assert 1e-4 < error.item() < 0.02
    transposed = x.transpose(0, 1)
    assert torch.equal(Int8Linear(exact.weight, exact.bias)(transposed), y.transpose(0, 1))


def test_rows_do_not_see_each_other(path):
    linear = layer()
    x = torch.randn(150, 52)
    together = linear(x)
    x[1:] = 1e3
    assert torch.allclose(linear(x)[0], together[0], rtol=1e-6)
    assert torch.allclose(linear(x[:1])[0], together[0], rtol=1e-6)


def test_zeros_nan_and_infinity(path):
    linear = layer(bias=False)
    x = torch.randn(4, 52)
    x[1], x[2, 5], x[3, 9] = 0, float("nan"), float("inf")
    y = linear(x)
    assert bool(y[0].isfinite().all())
    assert torch.equal(y[1], torch.zeros(70))
    assert not bool(y[2:].isfinite().any())


def test_no_rows(path):
    assert layer()(torch.empty(0, 52)).shape == (0, 70)
    assert layer()(torch.empty(2, 0, 52)).shape == (2, 0, 70)


def test_rotation_and_multiplier_change_nothing_but_the_rounding(path):
    torch.manual_seed(0)
    weight, x = torch.randn(64, 96), torch.randn(20, 96)
    x[:, 11] *= 60  # a channel of outliers
    exact = x @ weight.T

    def error(**options) -> float:
        return float((Int8Linear(**options)(x) - exact).norm() / exact.norm())

    plain = error(weight=weight)
    assert error(weight=weight, rotation=16) < 0.6 * plain
    factor = smoothing(x.square().mean(0).sqrt(), weight, 0.5)
    assert error(weight=weight * factor, multiplier=1 / factor) < 0.5 * plain


def test_layer_survives_copies_files_and_casts(path, tmp_path):
    linear = layer(norm=True)
    x = torch.randn(5, 52)
    y = linear(x)
    assert torch.equal(copy.deepcopy(linear)(x), y)
    save_file(linear.state_dict(), tmp_path / "layer.safetensors")
    other = layer(norm=True, seed=1)
    assert not torch.equal(other(x), y)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), y)
    assert {name: t.dtype for name, t in linear.bfloat16().state_dict().items()} == {
        "packed": torch.int8,
        "scale": torch.float32,
        "offset": torch.int32,
        "multiplier": torch.float32,
        "bias": torch.float32,
    }
    assert torch.equal(linear(x), y)


def test_codes_are_a_quarter_of_the_bytes():
    linear = layer(512, 512, bias=False)
    assert linear.codes().shape == (512, 512)
    size = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
    assert size < 1.03 * 512 * 512


def test_layer_names_bad_arguments(path):
    with pytest.raises(TypeError, match="float64"):
        layer()(torch.randn(2, 52, dtype=torch.float64))
    with pytest.raises(ValueError, match="52 features"):
        layer()(torch.randn(2, 53))
    with pytest.raises(ValueError, match="weight"):
        Int8Linear(torch.ones(4))
    with pytest.raises(TypeError, match="weight"):
        Int8Linear(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(TypeError, match="rotation"):
        Int8Linear(torch.ones(4, 4), rotation=2.0)
    for rotation in (0, 3, 16):
        with pytest.raises(ValueError, match="rotation"):
            Int8Linear(torch.ones(4, 24), rotation=rotation)


# Fused pieces ------------------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gated_mlp_is_its_parts(rows, dtype, monkeypatch):
    hidden = 100
    filled = torch.zeros(256, 48)
    torch.manual_seed(0)
    filled[:hidden], filled[128 : 128 + hidden] = torch.randn(hidden, 48), torch.randn(hidden, 48)
    gate_up = Int8Linear(filled, torch.randn(256), norm_eps=1e-6, rotation=16)
    mlp = Int8GatedMLP(gate_up, Int8Linear(torch.randn(48, hidden), rotation=4))
    x = torch.randn(1, rows, 48).to(dtype)
    fused = mlp(x)
    monkeypatch.setattr(int8_linear, "_ready", False)
    assert close(fused, mlp(x), dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("batch", [1, 3])
def test_qkv_rope_is_its_parts(d, dtype, batch, monkeypatch):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, kv_heads, tokens = 4, 2, 37
    linear = layer((heads + 2 * kv_heads) * d, 64, norm=True)
    x = torch.randn(batch, tokens, 64).to(dtype)
    angle = torch.rand(1 if batch == 1 else batch, tokens, d) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    fused = qkv_rope(linear, x, cos, sin, kv_heads)
    monkeypatch.setattr(int8_linear, "_ready", False)
    for seen, expected in zip(fused, qkv_rope(linear, x, cos, sin, kv_heads), strict=True):
        assert close(seen, expected, dtype)
    y = linear(x).view(batch, tokens, -1, d).transpose(1, 2).float()
    query, key, value = y.split([heads, kv_heads, kv_heads], 1)
    expected = *apply_rotary_pos_emb(query, key, cos.float(), sin.float()), value
    for seen, wanted in zip(fused, expected, strict=True):
        assert seen.shape == wanted.shape
        assert close(seen, wanted.to(dtype), dtype)


# Many rows take AMX where there is one, single rows never do: one by one they say what the bits must be.


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(seen: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


# two threads wait for each other actively, which is slow beside another test: two widths show them
@needs_kernel
@pytest.mark.parametrize(
    ("threads", "k"),
    [*((1, k) for k in (1, 4, 63, 64, 67, 68, 100, 128, 191, 576, 1536)), (2, 67), (2, 192)],
    indirect=["threads"],
)
def test_many_rows_have_the_bits_of_single_ones(k, threads):
    linear = layer(70, k, norm=k % 2 == 0, bias=k != 64, rotation=k & -k)
    x = torch.randn(200, k)
    x[1], x[2, 0], x[3, k // 2] = 0, float("nan"), float("inf")
    alone = torch.cat([linear(row) for row in x.split(1)])
    assert not bool(alone[2:4].isfinite().any())
    for rows in (*range(1, 71), 129, 200):
        same(linear(x[:rows]), alone[:rows])
    for dtype in DTYPES[1:]:
        y = x[:40].to(dtype)
        same(linear(y), torch.cat([linear(row) for row in y.split(1)]))


@needs_kernel
@pytest.mark.parametrize(("threads", "hidden"), [(1, 100), (1, 192), (2, 100)], indirect=["threads"])
def test_fused_pieces_have_the_bits_of_single_rows(hidden, threads):
    mlp = Int8GatedMLP(layer(2 * (hidden + -hidden % 64), 132, norm=True), layer(70, hidden))
    x = torch.randn(1, 193, 132).bfloat16()
    alone = torch.cat([mlp(row) for row in x.split(1, 1)], 1)
    for rows in (7, 16, 17, 31, 33, 64, 193):
        same(mlp(x[:, :rows]), alone[:, :rows])
    linear, cos, sin = layer(8 * 48, 132, norm=True), *torch.randn(2, 1, 193, 48).bfloat16()
    parts = [qkv_rope(linear, *(t[:, i : i + 1] for t in (x, cos, sin)), 2) for i in range(193)]
    for seen, pieces in zip(qkv_rope(linear, x, cos, sin, 2), zip(*parts, strict=True), strict=True):
        same(seen, torch.cat(pieces, 2))


@needs_kernel
def test_tile_registers_are_left_to_others(threads):
    """torch's bfloat16 products configure the same registers in the same threads."""
    linear, x = layer(130, 132), torch.randn(100, 132)
    a, q = torch.randn(200, 320).bfloat16(), torch.randn(1, 2, 150, 64).bfloat16()

    def others() -> tuple[torch.Tensor, torch.Tensor]:
        return a @ a.T, nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    before, alone = others(), torch.cat([linear(row) for row in x.split(1)])
    for _ in range(5):
        same(linear(x), alone)
        for seen, expected in zip(others(), before, strict=True):
            same(seen, expected)


@pytest.mark.slow
@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_refused_tile_registers_are_done_without(tmp_path):
    """Linux refuses them to a process whose signal stack could not hold them; the results are the same."""
    code = f"""
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
libc, memory = ctypes.CDLL(None), ctypes.create_string_buffer(8192)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
from safetensors.torch import load_file, save_file
from assay.methods.core.quantize.int8_linear import Int8Linear
inputs = load_file({str(tmp_path / "inputs")!r})
save_file(dict(y=Int8Linear(inputs["weight"], inputs["bias"])(inputs["x"])), {str(tmp_path / "outputs")!r})
print(libc.syscall(158, 0x1023, 18))
"""
    weight, bias, x = torch.randn(70, 132), torch.randn(70), torch.randn(50, 132)
    save_file({"weight": weight, "bias": bias, "x": x}, tmp_path / "inputs")
    assert python(code) == "-1"  # refused, or there are none
    same(load_file(tmp_path / "outputs")["y"], Int8Linear(weight, bias)(x))


@needs_kernel
def test_operators_know_their_shapes_without_running():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer()(torch.randn(1, 52))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(2, 9, 52))
        assert layer()(x).shape == (2, 9, 70)
        cos = mode.from_tensor(torch.randn(1, 9, 10))
        query, key, value = qkv_rope(layer(), x, cos, cos, 2)
        assert (query.shape, key.shape, value.shape) == ((2, 3, 9, 10), (2, 2, 9, 10), (2, 2, 9, 10))


# Models ------------------------------------------------------------------------------------------------------------------


def tiny(kind="llama", **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # large enough that attention and gates do something
        parameter.data = torch.randn_like(parameter) * (0.1 if parameter.dim() == 2 else 0.3) + (parameter.dim() == 1)
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


NEAR = 0.06  # relative error that int8 leaves in the logits of these random models; a wrong norm, angle or head gives above 0.3


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 40}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
    ],
)
def test_fused_blocks_compute_the_model(path, kind, options):
    model, ids = tiny(kind, **options), tokens(2, 40)
    quantised = quantize_linears(copy.deepcopy(model))
    assert isinstance(quantised.model.layers[0].mlp, Int8GatedMLP)
    assert isinstance(quantised.model.layers[1].self_attn.qkv_proj, Int8Linear)
    assert not select(quantised)
    exact = model(ids).logits
    assert 1e-4 < distance(quantised(ids).logits, exact) < NEAR
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[0, :13] = 0
    seen = quantised(ids, attention_mask=padding).logits
    assert distance(seen[padding.bool()], model(ids, attention_mask=padding).logits[padding.bool()]) < NEAR


@needs_kernel
def test_both_paths_and_plain_replacement_agree(monkeypatch):
    ids = tokens(1, 40)
    fused, plain = quantize_linears(tiny()), quantize_linears(tiny(), fuse=False)
    assert not any(isinstance(module, Int8GatedMLP) for module in plain.modules())
    exact = tiny()(ids).logits
    compiled = fused(ids).logits
    assert distance(plain(ids).logits, exact) < NEAR
    monkeypatch.setattr(int8_linear, "_ready", False)
    assert distance(fused(ids).logits, compiled) < 0.01


def test_generation_with_the_cache_is_the_model_without_it(path):
    model, ids = quantize_linears(tiny(), head=True), tokens(1, 21)
    whole = model(ids).logits
    first = model(ids[:, :16], use_cache=True)
    steps = [first.logits]
    cache = first.cache
    for i in range(16, 21):
        steps.append(model(ids[:, i : i + 1], cache=cache, use_cache=True).logits)
    assert distance(torch.cat(steps, 1), whole) < 0.01
    assert model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).shape == (1, 27)
    batch = model.generate(
        tokens(2, 8),
        attention_mask=torch.ones(2, 8, dtype=torch.long),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert batch.shape == (2, 12)


def test_attention_goes_through_the_interface():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def watched(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, query.shape, key.shape, "sliding_window" in kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("assay_test_watched", watched)
    for kind in ("llama", "mistral"):
        model = quantize_linears(tiny(kind))
        expected = model(tokens(1, 10)).logits
        model.config._attn_implementation = "assay_test_watched"
        assert torch.equal(model(tokens(1, 10)).logits, expected)
    assert seen[0] == (0, (1, 4, 10, 24), (1, 2, 10, 24), False)
    assert [(layer_idx, windowed) for layer_idx, _, _, windowed in seen] == [
        (0, False),
        (1, False),
        (0, True),
        (1, True),
    ]


def test_hidden_states_and_attentions_are_still_recorded():
    model = quantize_linears(tiny(attn_implementation="eager"))
    output = model(tokens(1, 10), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert [attention.shape for attention in output.attentions] == [(1, 4, 10, 10)] * 2


def test_models_copy_save_and_load(tmp_path):
    ids = tokens(1, 30)
    model = quantize_linears(tiny(), smooth=0.5, calibration=[tokens(1, 64, seed=1)], head=True)
    logits = model(ids).logits
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(ids).logits, logits)
    assert duplicate.model.layers[0].self_attn.forward.__self__ is duplicate.model.layers[0].self_attn
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    empty = quantize_linears(tiny(), head=True)  # neither smoothed nor calibrated
    assert not torch.equal(empty(ids).logits, logits)
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(empty(ids).logits, logits)
    assert distance(copy.deepcopy(model).bfloat16()(ids).logits, logits) < 0.05


def test_inclusion_and_exclusion():
    model = tiny()
    assert len(select(model)) == 14
    assert len(select(model, head=True)) == 15
    assert list(select(model, include=("model.layers.1.*",), exclude=("mlp",))) == [
        f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"
    ]
    partly = quantize_linears(tiny(), exclude=("down_proj",))
    assert type(partly.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(partly.model.layers[0].mlp.up_proj, Int8Linear)
    assert isinstance(partly.model.layers[0].self_attn.q_proj, Int8Linear)
    assert distance(partly(tokens(1, 30)).logits, tiny()(tokens(1, 30)).logits) < NEAR


def test_other_models_get_plain_layers():
    model = nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 6))
    x = torch.randn(9, 48)
    exact = model(x)
    quantize_linears(model, rotation=16)
    assert [type(module) for module in model] == [Int8Linear, nn.ReLU, Int8Linear]
    assert (model[0].rotation, model[2].rotation) == (16, 4)  # 20 features: the largest power of two that divides them
    assert distance(model(x), exact) < NEAR


def test_a_tied_head_is_freed():
    model = tiny(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.clone()
    exact = model(tokens(1, 20)).logits
    quantize_linears(model, head=True)
    assert isinstance(model.lm_head, Int8Linear)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert distance(model(tokens(1, 20)).logits, exact) < NEAR


def test_smoothing_and_rotation_tame_outlier_channels():
    ids, calibration = tokens(1, 60), [tokens(1, 60, seed=1)]

    def spiky():
        model = tiny()
        for block in model.model.layers:
            block.input_layernorm.weight.data[7] *= 40
            block.self_attn.v_proj.weight.data[:, 7] /= 40
            block.self_attn.q_proj.weight.data[:, 7] /= 40
            block.self_attn.k_proj.weight.data[:, 7] /= 40
        return model

    exact = spiky()(ids).logits
    plain = distance(quantize_linears(spiky(), rotation=1)(ids).logits, exact)
    rotated = distance(quantize_linears(spiky())(ids).logits, exact)
    smooth = distance(quantize_linears(spiky(), rotation=1, smooth=0.5, calibration=calibration)(ids).logits, exact)
    assert rotated < 0.8 * plain
    assert smooth < 0.8 * plain


def test_calibration_sees_every_input_once_and_leaves_no_hooks():
    model = tiny()
    linears = select(model)
    rms = input_rms(model, [tokens(1, 20), tokens(1, 30, seed=1)], linears)
    assert rms.keys() == linears.keys()
    assert torch.equal(rms["model.layers.0.self_attn.q_proj"], rms["model.layers.0.self_attn.v_proj"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    inputs = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    model(tokens(1, 20))
    model(tokens(1, 30, seed=1))
    handle.remove()
    expected = torch.cat(inputs).square().mean(0).sqrt()
    assert torch.allclose(rms["model.layers.0.mlp.down_proj"], expected, rtol=1e-4)


def test_a_single_block_can_be_fused():
    model, ids = tiny(), tokens(1, 20)
    exact = model(ids).logits
    fuse_block(model.model.layers[0])
    assert len(select(model)) == 7
    assert distance(model(ids).logits, exact) < NEAR


def test_models_name_bad_arguments():
    with pytest.raises(ValueError, match="select no linear layer"):
        quantize_linears(tiny(), include=("nothing",))
    with pytest.raises(ValueError, match="smooth"):
        quantize_linears(tiny(), smooth=-0.1, calibration=[tokens(1, 8)])
    with pytest.raises(ValueError, match="calibration"):
        quantize_linears(tiny(), smooth=0.5)
    with pytest.raises(ValueError, match="rotation"):
        quantize_linears(tiny(), rotation=3)


@pytest.mark.slow
@pytest.mark.model
def test_bundled_model_keeps_its_quality(smollm2):
    from assay.workloads.text import calibration_windows, heldout_windows

    windows = heldout_windows(smollm2.tokenizer, window=192, n=2)
    calibration = list(calibration_windows(smollm2.tokenizer, window=192, n=2).split(1))
    quantised = quantize_linears(copy.deepcopy(smollm2.model), smooth=0.5, calibration=calibration)
    with torch.no_grad():
        exact, seen = (torch.log_softmax(model(windows).logits, -1) for model in (smollm2.model, quantised))
    divergence = float((exact.exp() * (exact - seen)).sum(-1).mean())
    assert divergence < 0.005  # nats a token; 0.03 without smoothing and rotation


@pytest.mark.slow
@needs_kernel
def test_kernel_without_vector_instructions(tmp_path):
    """The portable half of the source, compiled for a processor without AVX-512, in a process of its own."""
    check = f"""
import torch
from assay.methods.core.quantize.int8_linear import Int8Linear
torch.manual_seed(0)
linear = Int8Linear(torch.randn(70, 52), torch.randn(70), norm_eps=1e-5, rotation=4)
for rows in {ROWS}:
    x = torch.randn(rows, 52)
    assert torch.allclose(linear(x), linear.reference(x), atol=1e-2), rows
assert kernels.load("w8a8")
"""
    built_with(check, "-march=x86-64-v3", cache=tmp_path)


@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_reach_what_comes_before(fuse, path):
    """Adapters and embeddings learn through rounded layers as through the float ones, as far as the weights are the same."""
    from tests.properties.architectures import build, inputs

    def gradient(model):
        model(**inputs("llama", 2, 12)).logits.square().mean().backward()
        return model.model.embed_tokens.weight.grad

    expected = gradient(build("llama"))
    found = gradient(quantize_linears(build("llama"), fuse=fuse))
    assert found is not None
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_gradients_are_those_of_the_dense_weight_and_change_no_output():
    own, x = layer(norm=True), torch.randn(3, 52, requires_grad=True)
    with torch.no_grad():
        expected = own(x)
        assert own(x).grad_fn is None
    assert torch.equal(own(x).detach(), expected)
    dense, bias = own.dequantize(), own.bias[: own.out_features]
    smooth = nn.functional.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), dense, bias)
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (own(x), smooth))
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert (own(x) - smooth).norm() < 0.03 * smooth.norm()
