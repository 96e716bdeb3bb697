from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.properties.mixers import check_mixer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from assay.experiments.mixers.training import parameter_groups, train
from assay.methods.core import kernels
from assay.methods.core.layers.packed import (
    PackedLinear,
    packed_bytes,
    product,
    quantize_tokens,
    resident_bytes,
    unpack,
)
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM
from assay.methods.mixers.matmul_free import (
    MLGRU,
    BitGLU,
    BitLinear,
    MatmulFreeConfig,
    MatmulFreeForCausalLM,
    bit_linear_reference,
    gated_scan,
    load_packed,
    lower_bounds,
    operations,
    pack_,
    parallel_scan,
    quantize_,
    rooms,
    save_packed,
    ternary_codes,
    token_codes,
)


def small_model(**options):
    torch.manual_seed(0)
    return MatmulFreeForCausalLM(
        MatmulFreeConfig(vocab_size=50, hidden_size=40, num_layers=3, intermediate_size=72, **options)
    ).eval()


# ---- the mixer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "as_released"])
@pytest.mark.parametrize("place", [(0, 1), (2, 3)])
def test_of_floats_is_a_mixer_with_exact_gradients(variant, place):
    check_mixer(lambda: MLGRU(36, variant=variant, quantized=False, layer=place[0], layers=place[1]), longest=768)


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_quantised_is_a_mixer(variant):
    check_mixer(lambda: MLGRU(36, variant=variant, layer=1, layers=2), gradcheck=False, longest=768)


def test_without_the_compiler_it_computes_the_same(monkeypatch):
    mixer = MLGRU(36, layer=1, layers=2).eval()
    x = torch.randn(2, 33, 36)
    before = mixer(x)
    monkeypatch.setenv("ASSAY_KERNELS", "0")
    kernels.load.cache_clear()
    try:
        torch.testing.assert_close(mixer(x), before, atol=2e-4, rtol=1e-3)
        check_mixer(lambda: MLGRU(36, quantized=False, layer=1, layers=2))
    finally:
        kernels.load.cache_clear()


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_the_equations(variant):
    torch.manual_seed(0)
    mixer = MLGRU(24, variant=variant, layer=1, layers=4).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    beta = mixer.bound.sigmoid()
    torch.testing.assert_close(beta, torch.full_like(beta, 0.25))
    f = beta + (1 - beta) * torch.sigmoid(mixer.f_proj(x))
    c = F.silu(mixer.i_proj(x))
    h, states = torch.zeros(2, 24, dtype=torch.float64), []
    for t in range(9):
        h = f[:, t] * h + (1 - f[:, t]) * c[:, t]
        states.append(h)
    h, gate = torch.stack(states, 1), mixer.g_proj(x)
    if variant == "paper":
        o = gate.sigmoid() * h
    else:
        o = gate * (gate.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * F.silu(h)
    torch.testing.assert_close(mixer(x), mixer.o_proj(o))


# ---- BitLinear -----------------------------------------------------------------------------------------------------------


def test_weights_take_three_values_and_scaling_them_leaves_the_pattern():
    weight = torch.randn(31, 57)
    codes, scale = ternary_codes(weight)
    assert codes.unique().tolist() == [-1, 0, 1]
    assert scale == weight.abs().mean()
    assert (scale * codes).unique().numel() == 3
    for c in (0.25, 8.0, 1000.0):
        scaled, larger = ternary_codes(c * weight)
        assert torch.equal(scaled, codes)
        torch.testing.assert_close(larger, c * scale)
    half = torch.tensor([[1.0, 0.5, -0.5, 2.0]])  # g = 1: halves go to the even 0
    assert ternary_codes(half)[0].tolist() == [[1, 0, 0, 1]]
    assert ternary_codes(torch.zeros(2, 2))[1] == pytest.approx(1e-5)


def test_activations_have_at_most_256_levels_a_token():
    x = torch.randn(7, 5000)
    codes, step = token_codes(x)
    assert codes.abs().amax(-1).tolist() == [127] * 7
    assert torch.equal(codes, codes.round())
    for row in codes:
        assert len(row.unique()) <= 256
    torch.testing.assert_close(step[:, 0], x.abs().amax(-1) / 127)


def test_scaling_a_token_does_not_change_its_output():
    layer = BitLinear(48, 20)
    x = torch.randn(6, 48)
    for c in (0.5, 16.0, 1024.0):  # powers of two: the norm's factor scales exactly
        torch.testing.assert_close(layer(c * x), layer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ternary", "base3"])
def test_packed_integers_are_those_of_the_fake_quantised_layer(kind):
    torch.manual_seed(0)
    layer = BitLinear(130, 37)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
    x = torch.randn(3, 11, 130)
    codes, step = token_codes(layer.norm(x))
    ternary, scale = ternary_codes(layer.weight)
    packed = layer.packed(kind)
    integers = product(codes.flatten(0, 1).to(torch.int8), packed.packed, kind)
    floats = F.linear(codes, ternary.detach())
    assert torch.equal(integers.view(3, 11, 37).float(), floats)
    again, steps = quantize_tokens(layer.norm(x))
    assert torch.equal(again.float(), codes)
    torch.testing.assert_close(packed.on_codes(again, steps), floats * step * scale, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), floats * step * scale, rtol=1e-6, atol=1e-6)
    y = packed(x)
    assert ((y - layer(x)).abs() < 1e-5).double().mean() > 0.99  # but for codes that lie on a half


def test_straight_through_gradients():
    torch.manual_seed(0)
    x = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    layer = BitLinear(30, 12).double()
    dy = torch.randn(5, 12, dtype=torch.float64)
    layer(x).backward(dy)
    normed = layer.norm(x.detach())
    codes, step = token_codes(normed)
    torch.testing.assert_close(layer.weight.grad, dy.T @ (codes * step))
    ternary, scale = ternary_codes(layer.weight.detach())
    leaf = x.detach().requires_grad_()
    wanted = torch.autograd.grad(F.rms_norm(leaf, (30,), layer.norm.weight, 1e-8), leaf, dy @ (ternary * scale))
    torch.testing.assert_close(x.grad, wanted[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_equals_the_chain_with_all_gradients(dtype):
    torch.manual_seed(0)
    layer = BitLinear(33, 21).to(dtype)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
    x = torch.randn(4, 6, 33, dtype=dtype).transpose(0, 1).requires_grad_()
    inputs = (x, layer.norm.weight, layer.weight)
    dy = torch.randn(6, 4, 21, dtype=dtype)
    y, expected = layer(x), bit_linear_reference(*inputs)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


def saved_bytes(layer, x):
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    own = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters()]}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_fused_keeps_nothing_but_its_input():
    x = torch.randn(16, 64, requires_grad=True)
    assert saved_bytes(BitLinear(64, 64), x) == 0
    assert saved_bytes(BitLinear(64, 64, fused=False), x) >= 2 * 16 * 64 * 4


def test_without_rounding_it_is_norm_and_linear():
    layer = BitLinear(16, 8, bias=True, quantized=False)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), F.linear(F.rms_norm(x, (16,), eps=1e-8), layer.weight, layer.bias))


def test_bfloat16_stays_close():
    torch.manual_seed(0)
    layer = BitLinear(64, 32)
    x = torch.randn(10, 64)
    exact = layer(x)
    low = copy.deepcopy(layer).bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(low.packed().codes(), ternary_codes(low.weight)[0].to(torch.int8))
    low(x.bfloat16().requires_grad_()).sum().backward()
    assert low.weight.grad.isfinite().all()


def test_share_of_zeros():
    layer = BitLinear(100, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.full((75,), 0.01), torch.ones(25)])[None])
    assert layer.share_of_zeros() == 0.75


# ---- the recurrence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [gated_scan, parallel_scan])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 100])
def test_scan_is_the_step_loop(scan, tokens):
    torch.manual_seed(0)
    f, c = torch.rand(2, tokens, 70, dtype=torch.float64), torch.randn(2, tokens, 70, dtype=torch.float64)
    h0 = torch.randn(2, 70, dtype=torch.float64)
    h, found = h0, scan(f, c, h0)
    for t in range(tokens):
        h = f[:, t] * h + c[:, t]
        torch.testing.assert_close(found[:, t], h)


@pytest.mark.parametrize("scan", [gated_scan, parallel_scan])
def test_scan_gradients(scan):
    torch.manual_seed(0)
    f, c = (torch.rand(2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    h0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scan, (f, c, h0))


def test_the_ends_of_the_gate_and_the_bound_of_the_state():
    torch.manual_seed(0)
    c, h0 = torch.randn(1, 20, 8), torch.randn(1, 8)
    ones, zeros = torch.ones(1, 20, 8), torch.zeros(1, 20, 8)
    assert torch.equal(gated_scan(ones, zeros, h0), h0[:, None].expand(1, 20, 8))
    assert torch.equal(gated_scan(zeros, c, h0), c)
    f = torch.rand(3, 500, 8)
    values = F.silu(5 * torch.randn(3, 500, 8))
    h = gated_scan(f, (1 - f) * values, torch.zeros(3, 8))
    assert (h.abs().amax(1) <= values.abs().amax(1) + 1e-6).all()
    mixer = MLGRU(16, layer=1, layers=2)
    x = 30 * torch.randn(2, 50, 16)
    _, state = mixer.advance(x, mixer.init_state(2))
    assert (state["h"].abs() <= F.silu(mixer.i_proj(x)).abs().amax(1) + 1e-5).all()


def test_lower_bounds_start_at_0_rise_and_stay_below_1():
    torch.manual_seed(0)
    matrix = torch.randn(7, 30, dtype=torch.float64)
    beta = lower_bounds(matrix)
    assert beta[0].abs().max() == 0
    assert (beta.diff(dim=0) > 0).all()
    assert beta.max() < 1
    torch.testing.assert_close(beta[-1], 1 - matrix.softmax(0)[0])
    torch.testing.assert_close(
        lower_bounds(torch.zeros(4, 1, dtype=torch.float64))[:, 0],
        torch.tensor([0, 0.25, 0.5, 0.75], dtype=torch.float64),
    )


# ---- the model -------------------------------------------------------------------------------------------------------------


def count(vocab, d, layers, hidden, norms=0):
    bit_norms = layers * (4 * d + d + hidden) + d
    block_norms = layers * 2 * d + d + norms
    return 2 * vocab * d + layers * (4 * d * d + 3 * d * hidden) + bit_norms + block_norms + layers * d


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_parameters_by_formula(variant):
    model = small_model(variant=variant)
    norms = 3 * 40 if variant == "as_released" else 0
    assert sum(p.numel() for p in model.parameters()) == count(50, 40, 3, 72, norms)


@pytest.mark.parametrize(
    ("size", "hidden", "millions"), [("370m", 2816, 374), ("1.3b", 5632, 1365), ("2.7b", 6912, 2703)]
)
def test_the_papers_sizes(size, hidden, millions):
    config = MatmulFreeConfig.of_size(size)
    assert config.intermediate_size == hidden
    with torch.device("meta"):
        model = MatmulFreeForCausalLM(config)
    found = sum(p.numel() for p in model.parameters())
    assert found == count(32000, config.hidden_size, config.num_layers, hidden)
    assert found / 1e6 == pytest.approx(millions, rel=0.02)
    with pytest.raises(ValueError, match="370m"):
        MatmulFreeConfig.of_size("7b")


def test_initial_weights():
    torch.manual_seed(0)
    model = MatmulFreeForCausalLM(MatmulFreeConfig(hidden_size=128, num_layers=8))
    block = model.blocks[3]
    assert block.mixer.i_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (block.mixer.o_proj, block.mlp.down_proj):
        assert layer.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    wider = MatmulFreeForCausalLM(MatmulFreeConfig(hidden_size=128, num_layers=8, initializer_range=0.1))
    for layer, std in (
        (wider.lm_head, 0.1),
        (wider.blocks[3].mixer.i_proj, 0.1),
        (wider.blocks[3].mlp.down_proj, 0.1 / 4),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


def test_the_model_owns_the_lower_bounds_and_trains_them():
    model = small_model().train()
    with torch.no_grad():
        model.lower_bounds.normal_()
    seen = []
    for block in model.blocks:
        block.mixer.f_proj.register_forward_hook(lambda m, i, o, b=block: seen.append(b.mixer.beta()))
    ids = torch.randint(50, (2, 12))
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(torch.stack(seen), lower_bounds(model.lower_bounds))
    assert model.lower_bounds.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.parameters())
    copy.deepcopy(model)  # nothing of the pass is left behind
    plain = [p for group in parameter_groups(model, lr=1.0) if group["weight_decay"] == 0 for p in group["params"]]
    assert any(p is model.lower_bounds for p in plain)
    with pytest.raises(ValueError, match="MatmulFreeForCausalLM"):
        model.blocks[1].mixer(torch.randn(1, 3, 40))


def test_the_state_does_not_grow_with_the_context():
    model = small_model()
    assert model.state_bytes(1) == model.state_bytes(100_000) == 3 * 40 * 4
    cache = model(torch.randint(50, (1, 70)), use_cache=True).cache
    assert cache.bytes() == 3 * 40 * 4


def test_learns_and_a_mixer_of_its_own_fits_any_model():
    torch.manual_seed(0)
    pattern = torch.arange(200) % 7
    batch = pattern[:-1].view(1, -1), pattern[1:].view(1, -1)
    config = MixerConfig(vocab_size=8, hidden_size=32, layers=[["mlgru", {}]] * 2, channel_mixer=["bit_glu", {}])
    for model in (small_model(), MixerForCausalLM(config)):
        losses = train(model, [batch] * 30, steps=30, lr=1e-2)
        assert losses[-1] < 0.3 * losses[0]


def test_generates_with_padding_and_comes_back_from_disk(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.lower_bounds.normal_()
    model.save_pretrained(tmp_path)
    again = MatmulFreeForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 50, (2, 20))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    check_generation(again, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_in_every_dtype_with_beams_padding_and_a_cache_used_twice(dtype, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.lower_bounds.normal_(std=5)  # bounds so near 1 that half precision would round them to it
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    exact = model(ids).logits
    model.to(dtype).save_pretrained(tmp_path)
    low = MatmulFreeForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert low.dtype == dtype
    found = low(ids, use_cache=True)
    assert torch.equal(found.logits, model(ids, use_cache=True).logits)
    assert (found.logits.float() - exact).norm() < 0.15 * exact.norm()
    found.cache.reset()
    assert torch.equal(low(ids, cache=found.cache).logits, found.logits)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": -1}
    out = low.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(out[1, 4:], low.generate(ids[1:, 4:], **settings)[0])


def check_generation(model, ids):
    """Step by step equals the whole at once, and a padded row equals the row alone."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    out = model.generate(ids, **settings)
    for t in range(ids.shape[1], out.shape[1]):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])
    padded = torch.cat([ids[:1], F.pad(ids[1:, 9:], (9, 0))])
    mask = torch.ones_like(padded)
    mask[1, :9] = 0
    both = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(both[0], out[0])
    assert torch.equal(both[1, 9:], model.generate(ids[1:, 9:], **settings)[0])


@pytest.mark.parametrize("kind", ["ternary", "base3"])
def test_packed_agrees_generates_and_comes_back_from_disk(kind, tmp_path):
    model = small_model()
    train(model, [(torch.randint(1, 50, (4, 20)),) * 2] * 3, steps=3, lr=1e-2)
    ids = torch.randint(1, 50, (2, 20))
    packed = pack_(copy.deepcopy(model), kind)
    expected, found = model(ids).logits, packed(ids).logits
    # the integers are the same; a code that lies on a half may fall to the other side and move what follows a little
    assert (found - expected).norm() < 0.02 * expected.norm()
    check_generation(packed, ids)
    save_packed(packed, tmp_path / "model.safetensors")
    again = load_packed(tmp_path / "model.safetensors")
    assert torch.equal(again(ids).logits, found)
    check_generation(again, ids)
    linear = sum(packed_bytes(kind, m.out_features, m.in_features) for m in model.modules() if isinstance(m, BitLinear))
    floats = sum(p.numel() for n, p in model.named_parameters() if "proj.weight" not in n and n != "lm_head.weight")
    assert resident_bytes(again) == resident_bytes(packed) == linear + 4 * floats
    assert resident_bytes(packed) < (tmp_path / "model.safetensors").stat().st_size < resident_bytes(packed) + 20000
    with pytest.raises(ValueError, match="packed"):
        save_packed(model, tmp_path / "other.safetensors")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="save_packed"):
        load_packed(tmp_path / "plain" / "model.safetensors")
    codes = unpack(packed.lm_head.packed, kind, 40)
    assert torch.equal(codes, ternary_codes(model.lm_head.weight)[0].to(torch.int8))


def test_what_was_learnt_is_generated_from_the_packed_file(tmp_path):
    model = small_model()
    pattern = 1 + torch.arange(200) % 7
    train(model, [(pattern[None, :-1], pattern[None, 1:])] * 60, steps=60, lr=1e-2)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    models = [model.eval()]
    for kind in ("ternary", "base3"):
        save_packed(pack_(copy.deepcopy(model), kind), tmp_path / kind)
        models.append(load_packed(tmp_path / kind))
    for each in models:
        assert torch.equal(each.generate(pattern[None, :30], **settings)[0], pattern[:50])


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((str(function), [a.dtype for a in args if isinstance(a, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [True, False])
def test_packed_inference_multiplies_no_float_matrices(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setenv("ASSAY_KERNELS", "0")
    kernels.load.cache_clear()
    try:
        model = pack_(small_model())
        with torch.no_grad(), Operators() as trace:
            model(torch.randint(50, (2, 9)), use_cache=True)
    finally:
        kernels.load.cache_clear()
    products = [
        (name, dtypes)
        for name, dtypes in trace.seen
        if any(word in name for word in ("mm", "matmul", "linear", "dot", "conv", "einsum")) and "lowbit" not in name
    ]
    assert all(dtype == torch.int8 for _, dtypes in products for dtype in dtypes), products
    assert sum("lowbit_linear" in name or "_int_mm" in name for name, _ in trace.seen) == 3 * 6 + 1


def test_quantize_replaces_the_linear_layers_of_any_model(tmp_path):
    torch.manual_seed(0)
    config = MixerConfig(vocab_size=30, hidden_size=32, layers=[["attention", {"heads": 2}]] * 2)
    model = MixerForCausalLM(config)
    weight = model.blocks[0].mixer.q_proj.weight
    quantize_(model, exclude=("*.mlp.*",))
    assert type(model.blocks[0].mixer.q_proj) is BitLinear
    assert model.blocks[0].mixer.q_proj.weight is weight
    assert type(model.blocks[0].mlp.up_proj) is nn.Linear
    assert type(model.lm_head) is nn.Linear  # tied to the embedding
    ids = torch.randint(30, (2, 10))
    model(ids, labels=ids).loss.backward()
    assert weight.grad.abs().max() > 0
    model.eval()
    expected = model(ids).logits
    pack_(model)
    assert isinstance(model.blocks[0].mixer.q_proj, PackedLinear)
    assert (model(ids).logits - expected).norm() < 0.02 * expected.norm()
    biased = quantize_(nn.Sequential(nn.Linear(8, 4)))
    assert biased[0].bias is not None
    torch.testing.assert_close(pack_(copy.deepcopy(biased))(torch.ones(2, 8)), biased(torch.ones(2, 8)))


def test_operations_and_energy():
    model = nn.Sequential(BitLinear(64, 32))
    found = operations(model)
    nonzero = round((1 - model[0].share_of_zeros()) * 64 * 32)
    assert (found.int32_additions, found.float_macs) == (nonzero, 64 * 32)
    assert found.fp32_multiplications == 3 * 64 + 32
    assert found.float_energy_pj == pytest.approx(1.5 * 64 * 32)
    assert operations(pack_(copy.deepcopy(model))) == found
    assert found.energy_pj < found.float_energy_pj


def test_a_row_of_nothing_but_padding_does_no_harm():
    model = small_model()
    ids = torch.randint(1, 50, (2, 8))
    mask = torch.tensor([[1] * 8, [0] * 8])
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0])


def test_one_scale_for_the_fused_gate_and_up():
    glu = BitGLU(16, 24)
    with torch.no_grad():
        glu.gate_up_proj.weight[:24] *= 10
    _, scale = ternary_codes(glu.gate_up_proj.weight)
    assert scale == glu.gate_up_proj.weight.abs().mean()
    assert not math.isclose(scale.item(), ternary_codes(glu.gate_up_proj.weight[:24])[1].item())
    x = torch.randn(2, 16)
    gate, up = glu.gate_up_proj(x).chunk(2, -1)
    torch.testing.assert_close(glu(x), glu.down_proj(F.silu(gate) * up))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"quantized": False}], ids=str)
def test_half_precision_neither_overflows_nor_loses_the_codes(dtype, options):
    """Sums of 127 * 2048 codes are beyond float16 (65504), and so is 127 / 1e-5, the scale of a token of zeros."""
    torch.manual_seed(0)
    layer = BitLinear(2048, 3, bias=True, **options)
    with torch.no_grad():
        layer.weight.fill_(0.02)
    x = torch.cat([1000 * torch.rand(4, 2048) + 1, torch.zeros(1, 2048)]).to(dtype).requires_grad_()
    exact = layer(x.detach().float())
    y = copy.deepcopy(layer).to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    (grad,) = torch.autograd.grad(y[:4].sum(), x)
    assert grad.isfinite().all()
    glu = BitGLU(8, 16, **options)
    with torch.no_grad():
        glu.gate_up_proj.weight.fill_(400.0)  # gate and up are about 3,000, their product 9,000,000
    wanted = glu(torch.ones(2, 8))
    found = copy.deepcopy(glu).to(dtype)(torch.ones(2, 8, dtype=dtype))
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gate_that_is_nearly_shut_still_lets_something_in(dtype):
    """sigmoid(20) rounds to 1 in float32, a lower bound of 0.999 to 1 in bfloat16: the state must move all the same."""
    torch.manual_seed(0)
    mixer = MLGRU(16, layer=1, layers=2, quantized=False)
    with torch.no_grad():
        mixer.bound.fill_(20.0)
    mixer = mixer.to(dtype)
    _, closed = mixer.gates(torch.randn(1, 3, 16).to(dtype))
    assert (closed != 0).all()
    matrix = torch.zeros(24, 16, dtype=dtype)
    matrix[1] = 9
    left = rooms(matrix)
    assert left.dtype == lower_bounds(matrix).dtype == torch.float32
    assert (left > 0).all()
    assert (left.diff(dim=0) < 0).all()
    torch.testing.assert_close(left.double(), rooms(matrix.double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 - left, lower_bounds(matrix), atol=3e-6, rtol=0)  # sums of 24 float32 numbers


def test_the_recurrence_says_which_path_it_took_and_casts_nothing():
    f = torch.rand(2, 3, 4)
    before = sum(n for name, n in kernels.paths().items() if name.startswith("gated scan"))
    gated_scan(f, f, f[:, 0])
    assert sum(n for name, n in kernels.paths().items() if name.startswith("gated scan")) == before + 1
    assert gated_scan(f[:, :0], f[:, :0], f[:, 0]).shape == (2, 0, 4)
    assert gated_scan(f[:0], f[:0], f[:0, 0]).shape == (0, 3, 4)
    for wrong in (torch.int64, torch.complex64):
        for call in (
            lambda wrong=wrong: gated_scan(f.to(wrong), f, f[:, 0]),
            lambda wrong=wrong: gated_scan(f, f.to(wrong), f[:, 0]),
            lambda wrong=wrong: BitLinear(4, 2)(f.to(wrong)),
            lambda wrong=wrong: ternary_codes(f[0].to(wrong)),
        ):
            with pytest.raises(TypeError, match="must hold floating-point numbers"):
                call()
    assert BitLinear(4, 2)(torch.zeros(0, 4)).shape == (0, 2)


def test_defaults_are_those_of_the_released_configuration():
    config = MatmulFreeConfig.of_size("1.3b")
    released = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "intermediate_size": 5632,  # hidden_ratio 4
        "norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    assert {name: getattr(config, name) for name in released} == released
    mixer = MLGRU(8, variant="as_released", layer=1, layers=2)
    assert mixer.g_norm.eps == 1e-6
    assert mixer.bound_from == "own"  # use_lower_bound
    assert not any("conv" in name for name, _ in mixer.named_modules())  # use_short_conv is off
    assert not any(name.endswith("bias") for name, _ in mixer.named_parameters())
    assert not any(name.endswith("bias") for name, _ in BitGLU(8, 16).named_parameters())


def test_a_config_refuses_what_it_would_ignore():
    for name, value in (("layers", [["attention", {}]]), ("channel_mixer", ["swiglu", {}]), ("num_hidden_layers", 7)):
        with pytest.raises(ValueError, match=name):
            MatmulFreeConfig(**{name: value})
    config = MatmulFreeConfig(num_layers=2)
    assert MatmulFreeConfig.from_dict(config.to_dict()).layers == config.layers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLGRU(16, variant="theirs"), "variant"),
        (lambda: MLGRU(16, bound="ours"), "bound"),
        (lambda: BitLinear(4, 4)(torch.zeros(2, 5)), "x must have shape"),
        (lambda: BitLinear(4, 4).packed("binary"), "kind"),
        (lambda: BitLinear(4, 4, quantized=False).packed(), "quantized"),
        (lambda: pack_(nn.Sequential(nn.Linear(4, 4))), "BitLinear"),
        (lambda: quantize_(nn.Sequential(nn.ReLU())), "nn.Linear"),
        (lambda: gated_scan(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 4)), "c must have shape"),
        (lambda: MatmulFreeForCausalLM(MatmulFreeConfig(tie_word_embeddings=True)), "tie_word_embeddings"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
