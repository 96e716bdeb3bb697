from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.properties import mixers as kit
from torch import nn

from assay.experiments.mixers.training import parameter_groups, train
from assay.methods.core.mixers.model import MixerConfig, MixerForCausalLM
from assay.methods.core.mixers.protocol import clone_state, fast_length
from assay.methods.mixers.long_convs import (
    ButterflyDFT,
    CausalLongConv,
    H3LongConv,
    LongConv,
    LongConvClassifier,
    LongKernel,
    around,
    butterfly,
    butterfly_dft,
    butterfly_idft,
    conv_cost,
    convolution,
    dft_flops,
    factors_of,
    fft_conv,
    frequency_window,
    smooth,
    split_around,
    squash,
    three_pass_conv,
)

BACKENDS = ("rfft", "complex", "butterfly", "three_pass")


def data(batch=2, dim=3, length=50, channels=2, dtype=torch.float64, taps=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, dim, length, generator=generator, dtype=torch.float64).to(dtype)
    k, k_back = torch.randn(2, channels, dim, taps or length, generator=generator, dtype=torch.float64).to(dtype)
    D = torch.randn(channels, dim, generator=generator, dtype=torch.float64).to(dtype)
    return u, k, k_back, D


def by_definition(u, k, k_back, D):
    """y_t = D u_t + sum_{s <= t} k_{t-s} u_s + sum_{s > t} k_back_{s-t-1} u_s, one pair at a time."""
    length = u.shape[-1]
    y = u[:, None] * D[..., None]
    for t in range(length):
        for s in range(length):
            if 0 <= t - s < k.shape[-1]:
                y[..., t] += k[..., t - s] * u[:, None, :, s]
            elif k_back is not None and 0 <= s - t - 1 < k_back.shape[-1]:
                y[..., t] += k_back[..., s - t - 1] * u[:, None, :, s]
    return y


# -------------------------------------------------------------------------------------------------------------- convolution


@pytest.mark.parametrize("length", [1, 2, 7, 16, 50])
@pytest.mark.parametrize("both_ways", [False, True])
def test_every_backend_is_the_definition(length, both_ways):
    u, k, k_back, D = data(length=length)
    k_back = k_back if both_ways else None
    expected = by_definition(u, k, k_back, D)
    for backend in (*BACKENDS, "direct"):
        found = fft_conv(u, k, D, k_back=k_back, backend=backend)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10, msg=lambda m, b=backend: f"{b}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [512, 1000])
def test_float32_is_close_to_direct(backend, length):
    u, k, k_back, D = data(length=length, dtype=torch.float32)
    expected = fft_conv(u.double(), k.double(), D.double(), k_back=k_back.double(), backend="direct")
    found = fft_conv(u, k, D, k_back=k_back, backend=backend)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal(backend):
    u, k, _, D = data(length=33)
    u.requires_grad_()
    y = fft_conv(u, k, D, backend=backend)
    for t in (0, 15, 31):
        (grad,) = torch.autograd.grad(y[..., t].sum(), u, retain_graph=True)
        assert grad[..., t + 1 :].abs().max() < 1e-12
        assert grad[..., : t + 1].abs().amin() > 0


@pytest.mark.parametrize("backend", [*BACKENDS, "direct"])
def test_the_way_back_with_no_taps_is_causal(backend):
    u, k, k_back, D = data(length=40)
    torch.testing.assert_close(
        fft_conv(u, k, D, k_back=torch.zeros_like(k_back), backend=backend), fft_conv(u, k, D, backend=backend)
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "direct"])
def test_an_impulse_returns_the_kernel(backend):
    _, k, k_back, D = data(length=20)
    impulse = torch.zeros(1, 3, 20, dtype=torch.float64)
    impulse[..., 0] = 1
    expected = k.clone()
    expected[..., 0] += D
    torch.testing.assert_close(fft_conv(impulse, k, D, backend=backend)[0], expected)
    torch.testing.assert_close(
        fft_conv(impulse.flip(-1), k, None, k_back=k_back, backend=backend)[0, ..., :-1].flip(-1), k_back[..., :-1]
    )


def test_short_kernels_long_kernels_and_one_channel():
    u, k, _, D = data(length=30, taps=9)
    expected = by_definition(u, k, None, D)
    for backend in (*BACKENDS, "direct"):
        torch.testing.assert_close(fft_conv(u, k, D, backend=backend), expected)
    u, k, _, D = data(length=30, taps=64)  # only the prefix is used
    torch.testing.assert_close(fft_conv(u, k, D), fft_conv(u, k[..., :30], D))
    one = fft_conv(u, k[0], D[0], k_back=k[1])
    assert one.shape == u.shape
    torch.testing.assert_close(one, fft_conv(u, k[:1], D[:1], k_back=k[1:])[:, 0])
    strided = u[:, :, ::2]
    torch.testing.assert_close(fft_conv(strided, k), fft_conv(strided.contiguous(), k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_channels_change_nothing(backend, monkeypatch):
    u, k, k_back, D = data(batch=3, dim=7, length=64)
    whole = fft_conv(u, k, D, k_back=k_back, backend=backend, fuse=False)
    for size in (1, 3 * 64 * 1000):
        monkeypatch.setattr(convolution, "FUSED_BYTES", size)
        torch.testing.assert_close(fft_conv(u, k, D, k_back=k_back, backend=backend), whole)


@pytest.mark.parametrize("backend", [*BACKENDS, "direct"])
def test_gradients(backend):
    u, k, k_back, D = (x.requires_grad_() for x in data(batch=1, dim=2, length=6))
    assert torch.autograd.gradcheck(
        lambda u, k, b, D: fft_conv(u, k, D, k_back=b, backend=backend), (u, k, k_back, D), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    u, k, _, _ = data(length=4096, channels=1, dtype=torch.float32)
    u = 30 * u + 50  # the zeroth frequency, about 200000, is beyond float16
    found = fft_conv(u.to(dtype), (0.01 * k).to(dtype))
    expected = fft_conv(u.to(dtype).double(), (0.01 * k).to(dtype).double())
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < 0.01 * expected.norm()


def test_the_standalone_kernel_of_twice_the_length_looks_ahead():
    u, _, _, _ = data(length=24)
    k = torch.randn(2, 3, 48, dtype=torch.float64)
    circular = torch.fft.irfft(torch.fft.rfft(u, 48)[:, None] * torch.fft.rfft(k, 48), 48)[..., :24]
    front, back = split_around(k)
    torch.testing.assert_close(fft_conv(u, front, k_back=back), circular)
    torch.testing.assert_close(around(front, back, 48), k)
    assert not torch.allclose(circular, fft_conv(u, front))


# ----------------------------------------------------------------------------------------------------------------------- DFT


@pytest.mark.parametrize("power", range(17))
def test_butterfly_is_the_dft_and_its_inverse_comes_back(power):
    n = 2**power
    x = torch.randn(2, n, dtype=torch.complex128)
    scale = n**0.5
    found = butterfly_dft(x)
    torch.testing.assert_close(found / scale, torch.fft.fft(x) / scale, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(butterfly_idft(found), x, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        butterfly_idft(butterfly_dft(x, natural=False), natural=False), x, atol=1e-10, rtol=1e-10
    )
    torch.testing.assert_close(butterfly_idft(x), torch.fft.ifft(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("max_factor", [2, 4, 8, 32])
def test_other_factors(max_factor):
    x = torch.randn(3, 2, 64, dtype=torch.complex128)
    torch.testing.assert_close(butterfly_dft(x, max_factor=max_factor), torch.fft.fft(x))
    torch.testing.assert_close(butterfly_idft(x, max_factor=max_factor), torch.fft.ifft(x))


def test_factors():
    assert factors_of(1) == []
    assert factors_of(8) == [8]
    assert factors_of(2048) == [16, 16, 8]
    assert fast_length(1) == 2
    assert fast_length(128) == 128
    assert fast_length(2 * 97) == 200


def test_digit_reversed_order_is_as_documented():
    x = torch.randn(128, dtype=torch.complex128)
    k1, k2 = torch.meshgrid(torch.arange(16), torch.arange(8), indexing="ij")
    torch.testing.assert_close(butterfly_dft(x, natural=False).view(16, 8), torch.fft.fft(x)[k1 + 16 * k2])


@pytest.mark.parametrize("outer", [2, 4, 16, 32])
@pytest.mark.parametrize("length", [1, 5, 64, 100, 1000])
def test_three_passes_are_one(outer, length):
    u, k, k_back, _ = data(length=length)
    for back in (None, k_back):
        torch.testing.assert_close(
            three_pass_conv(u, k, back, outer=outer), fft_conv(u, k, k_back=back), atol=1e-10, rtol=1e-10
        )


def test_tables_made_in_inference_mode_serve_training():
    butterfly.phases.cache_clear()
    u, k, _, D = data(length=16)
    with torch.inference_mode():
        for backend in ("butterfly", "three_pass"):
            fft_conv(u, k, D, backend=backend)
    k = k.clone().requires_grad_()
    for backend in ("butterfly", "three_pass"):
        (grad,) = torch.autograd.grad(fft_conv(u, k, D, backend=backend).square().sum(), k)
        (expected,) = torch.autograd.grad(fft_conv(u, k, D, backend="direct").square().sum(), k)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("n", [2, 16, 64, 128])
def test_the_learned_dft_starts_as_the_dft(heads, n):
    u, _, _, _ = data(length=n // 2)
    dft = ButterflyDFT(heads=heads).double()
    exact = torch.fft.fft(u, n)
    largest = float(
        exact.abs().max()
    )  # a coefficient near zero is a difference of large ones; the angles are stored in float32
    torch.testing.assert_close(dft(u, n), exact, atol=1e-6 * largest, rtol=0)
    torch.testing.assert_close(dft.float()(u.float(), n), exact.to(torch.complex64), atol=2e-5 * largest, rtol=0)


def test_the_learned_dft_learns_and_its_additive_form_starts_near():
    torch.manual_seed(0)
    u, _, _, _ = data(length=32)
    dft = ButterflyDFT(additive=True, dropout=0.5).double()
    exact = torch.fft.fft(u, 64)
    near = dft.eval()(u, 64)
    assert 1e-3 < (near - exact).norm() / exact.norm() < 0.3
    assert not torch.equal(dft.train()(u, 64), near)  # dropout
    dft.eval()(u, 64).abs().sum().backward()
    assert all(
        p.grad.abs().max() > 0 for p, f in zip(dft.matrices, dft.sizes, strict=True) if f in (4, 16)
    )  # 64 = 16 * 4
    matrices = [p.detach().requires_grad_() for p in ButterflyDFT(max_factor=2, heads=3).double().parameters()]
    small = ButterflyDFT(max_factor=2, heads=3).double()
    assert torch.autograd.gradcheck(
        lambda x, m: torch.func.functional_call(small, {"matrices.0": m}, (x, 8)),
        (u[:1, :, :4].clone().requires_grad_(), *matrices),
    )


def test_layers_with_the_learned_dft_equal_plain_ones_at_the_start():
    torch.manual_seed(0)
    plain = LongConv(4, 24, bidirectional=True, lam=0.0).double()
    learned = LongConv(4, 24, bidirectional=True, lam=0.0, learned_dft={"heads": 4}).double()
    learned.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(learned.eval()(x), plain.eval()(x))


# -------------------------------------------------------------------------------------------------------------- regularisers


def test_squash():
    k = torch.tensor([-0.5, -0.2, -0.1, 0.0, 0.15, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    found = squash(k, 0.2)
    torch.testing.assert_close(found, torch.tensor([-0.3, 0, 0, 0, 0, 0, 0.8], dtype=torch.float64))
    assert (found[1:6] == 0).all()
    found.sum().backward()
    assert k.grad.tolist() == [1, 0, 0, 0, 0, 0, 1]
    assert squash(k, 0.0) is k
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    assert ((squash(a, 0.3) - squash(b, 0.3)).abs() <= (a - b).abs() + 1e-15).all()  # 1-Lipschitz
    with pytest.raises(ValueError, match="lam must be a finite number at least 0"):
        squash(a, -1.0)


def test_smoothing_in_time():
    k = torch.zeros(1, 1, 9, dtype=torch.float64)
    k[..., 4], k[..., 0] = 3.0, 6.0
    expected = torch.tensor([2.0, 2, 0, 1, 1, 1, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(smooth(k, 3)[0, 0], expected)
    assert smooth(k, 1) is k


@pytest.mark.parametrize("width", [3, 7])
def test_smoothing_in_frequency_filters_the_spectrum(width):
    k = torch.randn(2, 3, 16, dtype=torch.float64)
    weight = torch.exp(-0.5 * (torch.arange(width, dtype=torch.float64) - width // 2) ** 2)
    weight = weight / weight.sum()
    spectrum = torch.fft.fft(k, 32)
    filtered = sum(w * spectrum.roll(j - width // 2, -1) for j, w in enumerate(weight))
    torch.testing.assert_close(torch.fft.fft(smooth(k, width, "frequency"), 32), filtered)
    window = frequency_window(16, width)
    assert window[0] == pytest.approx(1)
    assert (window.diff() < 0).all()


def test_starts():
    torch.manual_seed(0)
    random = LongKernel(2, 64, 256, lam=0.003)
    assert random.kernel.std().item() == pytest.approx(0.002, rel=0.02)
    assert (random() == 0).float().mean().item() == pytest.approx(0.866, abs=0.01)  # P(|N| < 1.5)
    falling = LongKernel(2, 64, 256, init="double_exponential").kernel
    for h in (0, 63):
        rate = 32 ** (h / 64)
        expected = 0.02 * torch.exp(-torch.arange(256) / 256 * rate)
        normal = falling[:, h] / expected
        assert normal.std().item() == pytest.approx(1, rel=0.15)
    # taps of the dead zone get no gradient: the pattern of zeros is that of the start
    random().square().sum().backward()
    assert (random.kernel.grad[random() == 0] == 0).all()


def test_the_kernel_learns_at_its_own_rate_without_decay():
    model = LongConvClassifier(1, 10, 16, dim=8, depth=2, lr=5e-4, learned_dft={"lr": 2e-4})
    groups = parameter_groups(model, lr=0.01, weight_decay=0.05)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for layer in model.layers:
        assert found[id(layer.kernel.kernel)] == (5e-4, 0.0)
        assert found[id(layer.out_proj.weight)] == (0.01, 0.05)
        assert all(found[id(p)] == (2e-4, 0.0) for p in layer.dft_u.parameters())


# -------------------------------------------------------------------------------------------------------------------- counts


def test_flops():
    assert dft_flops(1024) == 5 * 1024 * 10
    assert dft_flops(65536, matrices=True) == 4 * 8 * 16 * 65536 + 3 * 6 * 65536
    for n in (4096, 65536):  # L log L
        assert dft_flops(n) / (n * n.bit_length()) == pytest.approx(5, rel=0.1)
    assert conv_cost(64, form="direct").flops == 2 * 64 * 65 // 2
    assert (
        conv_cost(65536, form="rfft").flops
        < conv_cost(65536, form="fused").flops
        < conv_cost(65536, form="direct").flops
    )


def test_the_matrix_form_does_the_macs_it_is_said_to():
    from assay.measure.cost import count_cost

    x = torch.randn(4, 256, dtype=torch.complex64)
    matrices = 4 * 8 * 256 * 32 * 4 // 8  # 16 complex MACs a point and level, of four real ones each
    assert count_cost(lambda: butterfly_dft(x)).macs == matrices


def test_traffic():
    costs = {form: conv_cost(4096, form=form) for form in ("fused", "three_pass", "unfused", "rfft")}
    assert {form: cost.passes for form, cost in costs.items()} == {"fused": 1, "three_pass": 3, "unfused": 9, "rfft": 3}
    assert costs["fused"].bytes == 2 * 4096 * 4  # u in, y out
    assert costs["fused"].bytes < costs["rfft"].bytes < costs["three_pass"].bytes < costs["unfused"].bytes
    assert costs["fused"].flops == costs["unfused"].flops == costs["three_pass"].flops
    assert conv_cost(4096, form="fused", sequences=6).bytes == 6 * costs["fused"].bytes


@pytest.mark.parametrize("bidirectional", [False, True])
def test_parameters(bidirectional):
    layer = LongConv(8, 32, channels=3, bidirectional=bidirectional)
    kernels = 3 * 8 * 32 * (2 if bidirectional else 1)
    assert sum(p.numel() for p in layer.parameters()) == kernels + 3 * 8 + (3 * 8 + 1) * 16


# -------------------------------------------------------------------------------------------------------------------- layers


def test_the_layer_by_hand():
    torch.manual_seed(0)
    layer = LongConv(3, 20, bidirectional=True, lam=0.001, smooth_width=3).double().eval()
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    k = squash(smooth(layer.kernel.kernel, 3), 0.001)[..., :12]
    y = by_definition(x.transpose(1, 2), k[:2], k[2:], layer.kernel.D)
    y = F.gelu(y.reshape(2, 6, 12).transpose(1, 2))
    torch.testing.assert_close(layer(x), F.glu(layer.out_proj(y), -1))


def test_padding_is_zeros():
    layer = LongConv(3, 20, bidirectional=True, init="double_exponential").eval()
    x, mask = torch.randn(2, 15, 3), torch.ones(2, 15, dtype=torch.bool)
    mask[1, 10:] = False
    changed = torch.where(mask[..., None], x, 9.0)
    torch.testing.assert_close(layer(changed, mask)[mask], layer(x, mask)[mask])
    torch.testing.assert_close(layer(x, mask)[1, :10], layer(x[1:, :10])[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_the_classifier_learns_to_tell_frequencies(norm, prenorm):
    torch.manual_seed(0)
    model = LongConvClassifier(
        1, 2, 32, dim=16, depth=2, norm=norm, prenorm=prenorm, dropout=0.1, bidirectional=True, lr=0.02
    )
    start = [layer.kernel.kernel.detach().clone() for layer in model.layers]

    def batches():
        while True:
            labels, phase = torch.randint(2, (32,)), 6.3 * torch.rand(32, 1)
            angle = (3 + 2 * labels[:, None]) * torch.arange(32) * (2 * torch.pi / 32) + phase
            yield (angle.sin() + 0.2 * torch.randn(32, 32))[..., None], labels

    losses = train(model, batches(), steps=60, lr=5e-3, loss=lambda m, x, y: F.cross_entropy(m(x), y))
    assert sum(losses[-5:]) / 5 < 0.35 < losses[0]
    for layer, before in zip(model.layers, start, strict=True):
        asleep = before.abs() < 0.003
        moved = layer.kernel.kernel.detach() != before
        assert moved[~asleep].all()
        assert not moved[asleep].any()


@pytest.mark.parametrize(
    "options",
    [
        {"length": 800},
        {"length": 100, "channels": 1, "lam": 0.0, "smooth_width": 3, "init": "double_exponential"},
        {"length": 128, "init": "double_exponential", "smooth_width": 5, "smooth_domain": "frequency"},
    ],
    ids=str,
)
def test_is_a_mixer(options):
    kit.check_mixer(lambda: CausalLongConv(6, **options), leak=1e-15, longest=options["length"])


def test_the_h3_block_is_a_mixer():
    kit.check_mixer(lambda: H3LongConv(6, length=800, lam=0.001, init="double_exponential"), leak=1e-15, longest=800)


@pytest.mark.parametrize("kind", [CausalLongConv, H3LongConv])
def test_steps_with_no_gradients_reuse_their_buffer(kind):
    torch.manual_seed(0)
    mixer = kind(4, length=100, init="double_exponential").eval()
    x = torch.randn(2, 100, 4)
    with torch.no_grad():
        whole = mixer(x)
        state, found, places = mixer.init_state(2), [], set()
        for t in range(100):
            y, state = mixer.step(x[:, t], state)
            found.append(y)
            places.add(next(iter(state.values())).data_ptr())
    torch.testing.assert_close(torch.stack(found, 1), whole, atol=1e-5, rtol=1e-4)
    assert len(places) <= 9  # room doubles
    assert next(iter(state.values())).shape[-1] == 100
    with pytest.raises(ValueError, match=r"at most the kernel's length \(100\), got 101"):
        mixer.step(x[:, 0], clone_state(state))
    with pytest.raises(ValueError, match="got 101"):
        mixer(torch.zeros(1, 101, 4))


@pytest.mark.parametrize("kind", [CausalLongConv, H3LongConv])
def test_steps_never_use_the_kernels_of_yesterday(kind):
    """Weights changed in the middle of a sequence, in every way there is, count from the next step on."""
    torch.manual_seed(0)
    mixer = kind(4, length=60, init="double_exponential").double().eval()
    other = kind(4, length=60, init="double_exponential").double().eval()
    x = torch.randn(2, 60, 4, dtype=torch.float64)

    def reassign():
        for module in mixer.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(1.1 * p))

    def learn():
        optimizer = torch.optim.SGD(mixer.parameters(), lr=0.1)
        with torch.enable_grad():
            mixer(x).square().sum().backward()
        optimizer.step()

    changes = [
        lambda: [p.data.mul_(2) for p in mixer.parameters()],
        lambda: [p.data.copy_(q) for p, q in zip(mixer.parameters(), other.parameters(), strict=True)],
        lambda: mixer.load_state_dict({name: 1.5 * value for name, value in mixer.state_dict().items()}),
        reassign,
        learn,
    ]
    with torch.no_grad():
        _, state = mixer.advance(x[:, :20], mixer.init_state(2))
        for at, change in enumerate(changes, 20):
            kept = clone_state(state)
            mixer.step(x[:, at], state)
            change()
            y, state = mixer.step(x[:, at], clone_state(kept))
            wanted = mixer.advance(x[:, at : at + 1], kept)[0][:, 0]
            assert torch.equal(y, wanted)
            if (
                kind is CausalLongConv
            ):  # its state holds inputs, so that new weights give what they always would have given
                torch.testing.assert_close(y, mixer(x[:, : at + 1])[:, -1])
        y, _ = mixer.float().step(
            x[:, 25].float(), {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
        )
    assert y.dtype == torch.float32


def test_a_step_multiplies_only_the_tokens_seen():
    from assay.measure.cost import count_cost

    mixer = CausalLongConv(8, length=1000, channels=2).eval()
    with torch.no_grad():
        _, state = mixer.advance(torch.randn(3, 40, 8), mixer.init_state(3))
        macs = count_cost(lambda: mixer.advance(torch.randn(3, 1, 8), state)).macs
    assert macs == 3 * (8 * 41 * 2 + 16 * 16)


@pytest.mark.parametrize("name", ["long_conv", "long_conv_h3"])
def test_generates_and_comes_back_from_disk(name, tmp_path):
    torch.manual_seed(0)
    layers = [[name, {"length": 64, "init": "double_exponential"}], ["attention", {"heads": 2}]]
    model = MixerForCausalLM(MixerConfig(vocab_size=32, hidden_size=16, layers=layers)).eval()
    model.save_pretrained(tmp_path)
    again = MixerForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 32, (2, 20))
    out = again.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    for t in range(20, 28):
        assert torch.equal(model(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])
    with pytest.raises(ValueError, match="at most the kernel's length"):
        again.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=-1)


# --------------------------------------------------------------------------------------------------------- released settings


def test_defaults_are_those_of_the_released_configurations():
    layer = LongConv(8, 16)
    kernel = layer.kernel
    released = {"channels": 2, "bidirectional": False, "lam": 0.003, "kernel_dropout": 0.2, "dropout": 0.0}
    found = (layer.channels, layer.bidirectional, kernel.lam, kernel.dropout.p, layer.dropout.p)
    assert dict(zip(released, found, strict=True)) == released
    assert (kernel.init, kernel.smooth_width, kernel.lr) == ("random", 1, 1e-3)
    assert layer.out_proj.bias is not None  # postact: a linear layer and GLU
    torch.manual_seed(0)
    assert LongKernel(2, 500, 8).D.std().item() == pytest.approx(1, rel=0.1)
    block = H3LongConv(8, length=16)
    for kernel in (block.shift, block.long):
        assert (kernel.lam, kernel.dropout.p, kernel.lr, kernel.D.shape) == (0.003, 0.2, 1e-3, (1, 8))  # head_dim 1
    biased = [name for name, _ in block.named_parameters() if name.endswith("bias")]
    assert biased == ["qkv_proj.bias", "out_proj.bias"]


def test_dropout_of_taps_is_for_training_only():
    torch.manual_seed(0)
    layer = LongConv(4, 12, kernel_dropout=0.5, init="double_exponential")
    x = torch.randn(1, 12, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---------------------------------------------------------------------------------------------------------------- odd inputs


@pytest.mark.parametrize("wrong", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_whole_and_complex_signals_are_refused_and_never_cast(wrong):
    u, k, k_back, D = data(dtype=torch.float32, length=8)
    for backend in (*BACKENDS, "direct"):
        for name, arguments in {
            "u": (u.to(wrong), k, D, k_back),
            "k": (u, k.to(wrong), D, k_back),
            "D": (u, k, D.to(wrong), k_back),
            "k_back": (u, k, D, k_back.to(wrong)),
        }.items():
            with pytest.raises(TypeError, match=f"{name} must hold floating-point numbers"):
                fft_conv(*arguments[:3], k_back=arguments[3], backend=backend)
    for call in (
        lambda: three_pass_conv(u.to(wrong), k),
        lambda: squash(k.to(wrong), 0.1),
        lambda: smooth(k.to(wrong), 3),
        lambda: LongConv(3, 8)(u.transpose(1, 2).to(wrong)),
        lambda: LongConvClassifier(3, 2, 8, dim=4, depth=1)(u.transpose(1, 2).to(wrong)),
    ):
        with pytest.raises(TypeError, match="must hold floating-point numbers"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"learned_dft": {}},
        {"learned_dft": {"additive": True, "heads": 4}},
        {"smooth_width": 3},
    ],
    ids=str,
)
def test_every_layer_in_half_precision(options, dtype):
    torch.manual_seed(0)
    layer = LongConv(4, 40, init="double_exponential", **options).eval()
    x = 30 * torch.randn(2, 33, 4)
    exact = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - exact).norm() <= 0.03 * exact.norm()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_empty_signals_give_empty_results():
    for shape in ((0, 3, 8), (2, 3, 0), (0, 3, 0)):
        u, (_, k, k_back, D) = torch.zeros(shape), data(dtype=torch.float32, length=8)
        for backend in (*BACKENDS, "direct"):
            assert fft_conv(u, k, D, k_back=k_back, backend=backend).shape == (shape[0], 2, *shape[1:])
            assert fft_conv(u, k[0], D[0], backend=backend).shape == shape
        for options in ({}, {"bidirectional": True}, {"learned_dft": {}}):
            assert LongConv(3, 8, **options)(u.transpose(1, 2)).shape == (shape[0], shape[2], 3)
    with pytest.raises(ValueError, match="u must be"):
        fft_conv(torch.zeros(1, 3, 4), torch.zeros(3, 0))
    model = LongConvClassifier(3, 2, 8, dim=4, depth=1).eval()
    assert model(torch.zeros(0, 8, 3)).shape == (0, 2)
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(2, 0, 3))


@pytest.mark.parametrize(
    "options", [{}, {"smooth_width": 3}, {"smooth_width": 5, "smooth_domain": "frequency"}], ids=str
)
def test_the_first_taps_are_the_first_of_all(options):
    kernel = LongKernel(2, 3, 16, init="double_exponential", **options).double()
    whole = kernel()
    assert whole.shape == (2, 3, 16)
    for taps in (0, 1, 2, 9, 15, 16):
        torch.testing.assert_close(kernel(taps), whole[..., :taps], atol=1e-15, rtol=1e-12)
    with pytest.raises(ValueError, match="taps"):
        kernel(17)


# -------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fft_conv(torch.zeros(2, 3, 4), torch.zeros(2, 5)), ValueError, "u must be"),
        (lambda: fft_conv(torch.zeros(3, 4), torch.zeros(3, 4)), ValueError, "u must be"),
        (lambda: fft_conv(torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.zeros(4)), ValueError, "D must be"),
        (
            lambda: fft_conv(torch.zeros(2, 3, 4), torch.zeros(3, 4), k_back=torch.zeros(2, 4)),
            ValueError,
            "k_back must be",
        ),
        (
            lambda: fft_conv(torch.zeros(2, 3, 4), torch.zeros(3, 4), backend="fft"),
            ValueError,
            "backend must be one of",
        ),
        (lambda: three_pass_conv(*data()[:2], outer=3), ValueError, "outer must be even"),
        (lambda: butterfly_dft(torch.zeros(8)), TypeError, "x must hold complex numbers"),
        (lambda: butterfly_dft(torch.zeros(12, dtype=torch.complex64)), ValueError, "n must be a power of two"),
        (lambda: factors_of(8, 3), ValueError, "max_factor must be a power of two"),
        (lambda: smooth(torch.zeros(1, 1, 8), 4), ValueError, "width must be odd"),
        (lambda: smooth(torch.zeros(1, 1, 8), 3, "space"), ValueError, "domain must be one of"),
        (lambda: split_around(torch.zeros(3)), ValueError, "even number of taps"),
        (lambda: LongKernel(1, 0, 4), ValueError, "dim"),
        (lambda: LongKernel(1, 4, 4, init="zeros"), ValueError, "init must be one of"),
        (lambda: LongKernel(1, 4, 4, lr=0), ValueError, "lr must be a finite number above 0"),
        (lambda: LongKernel(1, 4, 4, lam=-0.1), ValueError, "lam must be a finite number at least 0"),
        (lambda: LongKernel(1, 4, 4, smooth_width=2), ValueError, "width must be odd"),
        (lambda: ButterflyDFT(heads=0), ValueError, "heads must be a whole number at least 1"),
        (lambda: CausalLongConv(4, length=8, bidirectional=True), ValueError, "would look ahead"),
        (lambda: CausalLongConv(4, length=8, learned_dft={}), ValueError, "would look ahead"),
        (lambda: LongConvClassifier(1, 2, 8, norm="group"), ValueError, "norm must be"),
        (lambda: LongConvClassifier(1, 2, 8, layer=nn.Identity, lam=0.1), ValueError, "beside layer, got lam"),
        (lambda: LongConv(4, 8, kernel_dropout=1.0), ValueError, "dropout"),
        (lambda: LongConv(4, 8, bidirectional=1), TypeError, "bidirectional must be True or False"),
        (lambda: LongConv(4, 8.0), TypeError, "length"),
        (lambda: LongKernel(1, 4, 4, lam=float("nan")), ValueError, "lam"),
        (lambda: LongKernel(1, 4, 4, lr=float("nan")), ValueError, "lr"),
        (lambda: ButterflyDFT(heads=3)(torch.zeros(2, 4, 8), 8), ValueError, "3 inputs"),
        (lambda: ButterflyDFT()(torch.zeros(2, 4, 16), 8), ValueError, "at most 8 values"),
        (lambda: conv_cost(64, form="fused", sequences=0), ValueError, "sequences"),
        (lambda: conv_cost(64, form="fast"), ValueError, "form must be one of"),
        (lambda: conv_cost(48, form="fused"), ValueError, "power of two"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
