from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tests.properties.mixers import check_mixer
from torch import nn

from assay.methods.core import kernels
from assay.methods.core.mixers.model import MixerForCausalLM
from assay.methods.layers.memoryformer import (
    SIZES,
    MemoryAttention,
    MemoryBlock,
    MemoryLinear,
    bucket_codes,
    bucket_entropy,
    bucket_weights,
    distil_,
    look_up_together,
    memoryformer_config,
)

WEIGHTS = ("softmax", "cosine", "magnitude")


def signs(bits):
    """All sign vectors, in the order of their codes."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)), dtype=torch.float64)


def test_the_weight_is_the_softmax_over_all_sign_vectors():
    torch.manual_seed(0)
    z = torch.randn(40, 6, dtype=torch.float64)
    shares = (z @ signs(6).T).softmax(-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(40, dtype=torch.float64))
    codes = bucket_codes(z)
    assert torch.equal(shares.argmax(-1), codes)
    torch.testing.assert_close(bucket_weights(z), shares.gather(1, codes[:, None])[:, 0])


def test_the_weight_lies_between_a_uniform_guess_and_one():
    z = torch.randn(200, 8, dtype=torch.float64) * 10 ** torch.linspace(-3, 2, 200)[:, None]
    p = bucket_weights(z)
    assert (p >= 2**-8).all()
    assert (p <= 1).all()
    assert bucket_weights(torch.zeros(8, dtype=torch.float64)).item() == pytest.approx(2**-8, rel=1e-12)
    assert bucket_weights(torch.full((8,), 50.0, dtype=torch.float64)) == pytest.approx(1.0)


def test_the_other_forms_follow_their_formulas():
    z = torch.randn(8, dtype=torch.float64)
    expected = math.prod(1 / (1 + math.exp(-2 * abs(x))) for x in z.tolist())
    assert bucket_weights(z, "magnitude") == pytest.approx(expected * z.abs().sum().item())
    tempered = math.prod(1 / (1 + math.exp(-2 * abs(x) / (0.3 * z.norm().item() * 8**0.5))) for x in z.tolist())
    assert bucket_weights(z, "cosine", 0.3) == pytest.approx(tempered)
    assert bucket_weights(7 * z, "cosine") == pytest.approx(bucket_weights(z, "cosine").item())
    assert bucket_weights(torch.zeros(8), "cosine").item() == pytest.approx(2**-8)
    assert bucket_weights(100 * z, "magnitude") > 10


def test_codes_put_the_first_sign_highest_and_count_zero_as_set():
    assert bucket_codes(torch.tensor([1.0, -1, -1, -1])) == 8
    assert bucket_codes(torch.tensor([0.0, -0.0, -1, -1])) == 12
    z = torch.randn(30, 8)
    codes = bucket_codes(z)
    for i in range(8):
        flipped = z.clone()
        flipped[:, i] *= -1
        assert ((bucket_codes(flipped) ^ codes) == 2 ** (7 - i)).all()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_look_up_equals_a_dense_one_hot_product_with_all_gradients(weight):
    torch.manual_seed(0)
    layer = MemoryLinear(16, 5, bits=4, weight=weight).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.reference(x))
    grad = torch.randn(3, 7, 5, dtype=torch.float64)
    one = torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
    two = torch.autograd.grad(layer.reference(x), (x, *layer.parameters()), grad)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    strided = x.transpose(0, 1)
    torch.testing.assert_close(layer(strided), layer.reference(strided))
    assert torch.autograd.gradcheck(layer, (x[:, :2].detach().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_kernel_equals_torch(weight, bias, dtype):
    assert kernels.load("memory")
    torch.manual_seed(0)
    options = {"bits": 4, "weight": weight, "bias": bias, "temperature": 0.7 if weight == "cosine" else 1.0}
    layers = [MemoryLinear(24, width, **options).to(dtype) for width in (5, 48)]
    x = torch.randn(3, 7, 24, dtype=dtype).transpose(0, 1)  # not contiguous
    x[0, 0] = 0.0
    x[1, 0] = -0.0
    with torch.no_grad():
        for layer, y in zip(layers, look_up_together(layers, x), strict=True):
            assert y.dtype == dtype
            wanted = layer.float().reference(x.float())
            torch.testing.assert_close(y.float(), wanted, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 5e-3)
            assert layer(x[:0].float()).shape == (0, 3, layer.out_features)
    bad = layers[0](torch.full((1, 24), torch.nan))
    assert bad.isnan().all()


def test_kernel_serves_without_gradients_and_in_generation(monkeypatch):
    torch.manual_seed(0)
    calls = []
    original = torch.ops.assay.memory_look_up
    monkeypatch.setattr(torch.ops.assay, "memory_look_up", lambda *a: calls.append(1) or original(*a))
    model = MixerForCausalLM(memoryformer_config(vocab_size=32, hidden_size=32, layers=2, heads=2)).eval()
    ids = torch.randint(1, 32, (3, 9))
    trained = model(ids).logits
    assert not calls, "with gradients torch computes"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained, atol=1e-5, rtol=1e-4)
    assert len(calls) == 2 * 3, "one for Q, K and V, one for each layer of the block"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(2, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(model.blocks[0].mlp.first(x).sum(), x)
    assert grad.abs().max() > 0, "the input alone may need a gradient"


def test_same_signs_read_the_same_rows_and_the_output_is_linear_in_the_tables():
    layer = MemoryLinear(16, 5, bits=8)
    x = torch.randn(10, 16)
    rows, weights = layer.hash(x)
    more_rows, more_weights = layer.hash(3 * x)
    assert torch.equal(rows, more_rows)
    assert (more_weights > weights).all()
    y = layer(x) - layer.bias
    with torch.no_grad():
        layer.tables *= 2.5
    torch.testing.assert_close(layer(x) - layer.bias, 2.5 * y)


def test_a_sub_vector_reaches_the_output_through_its_own_table_only():
    layer = MemoryLinear(24, 5, bits=8)
    x = torch.randn(1, 24)
    before = layer(x)
    with torch.no_grad():
        layer.tables[256:512] += 1.0  # table 1
    moved = layer(x) - before
    torch.testing.assert_close(moved, layer.hash(x)[1][:, 1:2].expand(-1, 5))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    # differences between rows do not reach x: with the rows that are read set equal, the gradient is the weights' alone
    rows, _ = layer.hash(x)
    with torch.no_grad():
        layer.tables[[i for i in range(len(layer.tables)) if i not in rows[0].tolist()]] = 1e3
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], grad)


def test_only_rows_that_were_read_get_gradients():
    layer = MemoryLinear(16, 5, bits=4)
    x = torch.randn(6, 16)
    layer(x).sum().backward()
    touched = (layer.tables.grad != 0).any(-1).nonzero().flatten().tolist()
    assert touched == sorted(set(layer.hash(x)[0].flatten().tolist()))


def test_costs_and_parameters():
    layer = MemoryLinear(512, 256, bits=8)
    cost = layer.cost()
    assert cost.params == 64 * 256 * 256 + 256
    assert cost.macs == 64 * 256 == 512 * 256 // 8
    assert cost.bytes_read == 64 * 256 * 4
    assert (cost.params - 256) / (512 * 256) == 32


@pytest.mark.parametrize("weight", WEIGHTS)
def test_attention_is_a_mixer(weight):
    check_mixer(lambda: MemoryAttention(48, heads=3, bits=8, weight=weight))


def test_attention_hashes_once_for_three_layers(monkeypatch):
    calls = []
    original = MemoryLinear.hash
    monkeypatch.setattr(MemoryLinear, "hash", lambda self, x: calls.append(1) or original(self, x))
    mixer = MemoryAttention(32, heads=2)
    mixer(torch.randn(1, 4, 32))
    assert len(calls) == 1
    assert not any(isinstance(m, nn.Linear) for m in mixer.modules())
    assert mixer.rotary_dim == 4


def test_block_has_wider_tables_second_and_no_linear_layer():
    block = MemoryBlock(64, bits=8, extra=2)
    assert block.first.out_features == 8 * 10
    assert block.second.bits == 10
    assert block.second.count == 8
    assert block(torch.randn(2, 3, 64)).shape == (2, 3, 64)
    assert not any(isinstance(m, nn.Linear) for m in block.modules())


def test_model_trains_generates_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = MixerForCausalLM(memoryformer_config(vocab_size=32, hidden_size=32, layers=2, heads=2)).eval()
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1, "only the head multiplies by a matrix"
    assert model.blocks[0].mlp.first.tables.std().item() == pytest.approx(0.02, rel=0.1)
    ids = torch.randint(1, 32, (4, 16))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.save_pretrained(tmp_path)
    again = MixerForCausalLM.from_pretrained(tmp_path).eval()
    out = again.generate(ids[:, :8], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    for t in range(8, 13):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])
    assert {"tiny", "small"} == set(SIZES)


def test_the_papers_weight_and_temperature_reach_every_layer():
    config = memoryformer_config(
        vocab_size=32, hidden_size=32, layers=2, heads=2, bits=4, extra=1, weight="cosine", temperature=0.3
    )
    layers = [m for m in MixerForCausalLM(config).modules() if isinstance(m, MemoryLinear)]
    assert len(layers) == 2 * 5
    assert {(layer.weight, layer.temperature) for layer in layers} == {("cosine", 0.3)}
    assert sorted({layer.bits for layer in layers}) == [4, 5]


def test_distilling_never_gets_worse_and_finds_what_it_can_represent():
    torch.manual_seed(0)
    truth = MemoryLinear(24, 6, bits=4, bias=False)
    with torch.no_grad():
        truth.tables.normal_()
    x = torch.randn(3000, 24)
    layer = MemoryLinear(24, 6, bits=4, bias=False)
    errors = distil_(layer, x, truth(x).detach(), sweeps=30, ridge=1e-6)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.02
    linear = nn.Linear(24, 6)
    student = MemoryLinear(24, 6, bits=4)
    errors = distil_(student, x, linear(x).detach())
    assert 0.05 < errors[-1] < 0.9, "a linear layer is more than its signs"
    off = (student(x) - linear(x)).detach().norm() / linear(x).detach().norm()
    assert off.item() == pytest.approx(errors[-1], rel=1e-3)


def test_the_ridge_goes_with_the_weights():
    """Weights near 2^-8 have squares near 1e-5: a ridge in absolute numbers would leave nothing of the rows."""
    torch.manual_seed(0)
    truth = MemoryLinear(16, 4, bits=8, bias=False)
    with torch.no_grad():
        truth.tables.normal_()
    x = 0.01 * torch.randn(8000, 16)
    layer = MemoryLinear(16, 4, bits=8, bias=False)
    errors = distil_(layer, x, truth(x).detach(), sweeps=15, ridge=1e-3)
    assert errors[-1] < 0.05


def test_the_ridge_serves_inputs_that_were_not_fitted():
    torch.manual_seed(0)
    linear = nn.Linear(24, 6)
    x, other = torch.randn(2, 400, 24).unbind()
    off = {}
    for ridge in (0.0, 10.0):
        layer = MemoryLinear(24, 6, bits=8)
        fitted = distil_(layer, x, linear(x).detach(), ridge=ridge)[-1]
        off[ridge] = ((layer(other) - linear(other)).norm() / linear(other).norm()).item()
        assert fitted < 0.9 * off[ridge], "the error on the inputs fitted to says little"
    assert off[10.0] < 0.95 * off[0.0]


def test_layer_norm_spreads_the_buckets():
    torch.manual_seed(0)
    layer = MemoryLinear(64, 4, bits=8)
    shifted = torch.randn(4000, 64) + 2.0
    entropy, peak = bucket_entropy(layer, shifted)
    centred_entropy, centred_peak = bucket_entropy(layer, F.layer_norm(shifted, (64,)))
    assert centred_entropy > 0.95 > entropy
    assert centred_peak < peak


@pytest.mark.slow
@pytest.mark.model
def test_real_activations_use_most_rows_after_layer_norm(smollm2):
    from assay.workloads.text import calibration_windows

    ids = calibration_windows(smollm2.tokenizer, window=256, n=4)
    with torch.no_grad():
        hidden = smollm2.model.model(ids, output_hidden_states=True).hidden_states[10]
    entropy, _ = bucket_entropy(MemoryLinear(576, 4, bits=8), F.layer_norm(hidden, (576,)))
    assert entropy > 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryLinear(10, 4, bits=8), "bits"),
        (lambda: MemoryLinear(17 * 2, 4, bits=17), "bits"),
        (lambda: MemoryLinear(16, 4, weight="l2"), "weight"),
        (lambda: MemoryLinear(16, 4, temperature=0), "temperature"),
        (lambda: MemoryLinear(16, 4)(torch.randn(3, 8)), "x must have 16"),
        (lambda: MemoryLinear(16, 4).requires_grad_(False)(torch.randn(3, 8)), "x must have 16"),
        (lambda: look_up_together([], torch.randn(3, 16)), "layers must be"),
        (
            lambda: look_up_together([MemoryLinear(16, 4), MemoryLinear(16, 4, bits=4)], torch.randn(3, 16)),
            "layers must",
        ),
        (lambda: MemoryBlock(16, extra=-1), "extra"),
        (lambda: distil_(MemoryLinear(16, 4), torch.randn(3, 16), torch.randn(3, 5)), "x and y"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_empty_inputs_and_rows_of_their_own(weight):
    layer = MemoryLinear(24, 5, bits=4, weight=weight)
    x = torch.randn(4, 3, 24)
    for shape in ((0, 24), (0, 3, 24), (3, 0, 24)):
        assert layer(torch.empty(shape)).shape == (*shape[:-1], 5)
        with torch.no_grad():
            assert layer(torch.empty(shape)).shape == (*shape[:-1], 5)
    torch.testing.assert_close(layer(x)[2], layer(x[2]))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: MemoryLinear(24, 5, bits=4, temperature=0.5), ValueError),  # it would be ignored
        (lambda: MemoryLinear(24, 5, bits=4, weight="magnitude", temperature=2), ValueError),
        (lambda: MemoryLinear(24, 5, bits=4.0), TypeError),
        (lambda: MemoryLinear(24, 5, bits=True), TypeError),
        (lambda: MemoryLinear(24, 5, bits=4, weight="cosine", temperature=float("nan")), ValueError),
        (lambda: MemoryLinear(24, 5, bits=4)(torch.arange(24)), TypeError),
    ],
)
def test_what_would_be_ignored_or_cast_is_refused(call, kind):
    with pytest.raises(kind):
        call()


@pytest.mark.parametrize("temperature", [1e-30, 0.1, 1.0, 1e30])
@torch.no_grad()
def test_the_cosine_weight_takes_numbers_of_any_size(temperature):
    """Against the formula in float64, by the kernel and by torch; what lies in the middle has every bucket's equal share."""
    torch.manual_seed(0)
    layer = MemoryLinear(12, 5, bits=3, weight="cosine", temperature=temperature)
    x = torch.randn(4, 12)
    x[1, :3] = 0.0
    z = x.double().unflatten(-1, (4, 3))
    norm = z.norm(dim=-1, keepdim=True)
    exponent = torch.where(norm > 0, -2 * z.abs() / (temperature * norm * 3**0.5), 0.0)
    wanted = (1 / (1 + exponent.exp())).prod(-1)
    for size in (1.0, 2.0**100, 2.0**-100):
        weights = bucket_weights((x * size).unflatten(-1, (4, 3)), "cosine", temperature)
        torch.testing.assert_close(weights.double(), wanted, atol=1e-6, rtol=1e-5)
        rows, _ = layer.hash(x)
        torch.testing.assert_close(layer(x * size), layer.look_up(rows, wanted.float()), atol=1e-7, rtol=1e-5)
    assert bucket_weights(torch.full((2, 3), torch.nan), "cosine").isnan().all()


def test_the_cosine_weight_of_large_and_small_numbers_has_the_right_gradient():
    torch.manual_seed(0)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: bucket_weights(z, "cosine", 0.7), z)
    large = (z.detach() * 2.0**100).float().requires_grad_()
    (found,) = torch.autograd.grad(bucket_weights(large, "cosine", 0.7).sum(), large)
    (wanted,) = torch.autograd.grad(bucket_weights(z, "cosine", 0.7).sum(), z)
    torch.testing.assert_close(found.double() * 2.0**100, wanted, atol=1e-5, rtol=1e-4)


def test_temperatures_that_cannot_be_divided_by_are_refused():
    for wrong in (0.0, 1e-46, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be"):
            MemoryLinear(8, 4, bits=4, weight="cosine", temperature=wrong)


def test_small_heads_turn_too():
    """A quarter of a head of 4 numbers is no pair: positions would be left out without a word."""
    assert [MemoryAttention(2 * d, heads=2, bits=1).rotary_dim for d in (2, 3, 4, 8, 16, 24)] == [2, 2, 2, 2, 4, 6]
    assert MemoryAttention(8, heads=2, bits=1, rotary_share=0.0).rotary_dim == 0
    with pytest.raises(ValueError, match="rotary_share must be 0"):
        MemoryAttention(2, heads=2, bits=1)
