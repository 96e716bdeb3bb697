from __future__ import annotations

import math

import pytest
import torch
from tests.properties.apart import built_with
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from assay.methods.core import kernels
from assay.methods.core.mixers import scan as scans
from assay.methods.core.mixers.protocol import left_conv
from assay.methods.core.mixers.scan import (
    associative_scan,
    discretise,
    lti_advance,
    lti_convolution,
    lti_kernel,
    lti_recurrence,
    powers,
    segment_sums,
    selective_scan,
    ssd,
    ssd_reference,
)

BACKENDS = ("chunked", "associative", "kernel")
needs_kernel = pytest.mark.skipif(not kernels.load("scan"), reason="no compiler")


def scan_inputs(batch=2, tokens=70, channels=20, states=5, dtype=torch.float64, step=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {
        "u": normal(batch, tokens, channels),
        "dt": step * normal(batch, tokens, channels).exp(),
        "A": -normal(channels, states).exp(),
        "B": normal(batch, tokens, states),
        "C": normal(batch, tokens, states),
        "D": normal(channels),
        "h0": normal(batch, channels, states),
    }
    return {name: x.to(dtype) for name, x in found.items()}


def lti_system(channels=6, states=4, complex_=False, method="zoh"):
    generator = torch.Generator().manual_seed(1)
    A = -torch.rand(channels, states, generator=generator, dtype=torch.float64) - 0.1
    B, C = (torch.randn(channels, states, generator=generator, dtype=torch.float64) for _ in range(2))
    if complex_:
        A = torch.complex(A, 3 * torch.randn(channels, states, generator=generator, dtype=torch.float64))
        B, C = B + 0j, torch.complex(C, C.flip(0))
    dt = torch.rand(channels, 1, generator=generator, dtype=torch.float64) * 0.5 + 0.01
    D = torch.randn(channels, generator=generator, dtype=torch.float64)
    return A, B, C, D, dt, discretise(A, B, dt, method)


# ----------------------------------------------------------------------------------------------------------- discretisation


@pytest.mark.parametrize("complex_", [False, True])
def test_zero_order_hold_is_the_exponential_of_the_augmented_matrix(complex_):
    A, B, *_, dt, (decay, gain) = lti_system(complex_=complex_)
    for c in range(2):
        for n in range(2):
            augmented = torch.tensor([[A[c, n], B[c, n]], [0, 0]]) * dt[c, 0]
            exact = torch.linalg.matrix_exp(augmented)
            torch.testing.assert_close(decay[c, n], exact[0, 0])
            torch.testing.assert_close(gain[c, n], exact[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_zero_order_hold_keeps_its_digits_near_zero_and_far_away(dtype):
    z = torch.tensor([0.0, -1e-30, -1e-8, -1e-4, -0.01, -0.4999, -0.5001, -3.0, -200.0, -1e30], dtype=torch.float64)
    exact = torch.where(z == 0, torch.ones_like(z), torch.expm1(z) / torch.where(z == 0, 1, z))
    decay, gain = discretise(z.to(dtype), torch.ones((), dtype=dtype), torch.ones((), dtype=dtype))
    found = gain.real if dtype.is_complex else gain
    torch.testing.assert_close(found.double(), exact, rtol=3e-7 if dtype != torch.float64 else 1e-14, atol=0)
    assert decay.isfinite().all()


def test_steps_of_zero_change_nothing_and_long_steps_forget():
    A, B = -torch.rand(8, dtype=torch.float64) - 0.1, torch.randn(8, dtype=torch.float64)
    for method in ("zoh", "euler"):
        decay, gain = discretise(A, B, torch.zeros(8, dtype=torch.float64), method)
        assert (decay == 1).all()
        assert (gain == 0).all()
        decay, _ = discretise(A, B, torch.full((8,), 1e4, dtype=torch.float64), method)
        assert (decay == 0).all()
    small = torch.full((8,), 1e-9, dtype=torch.float64)
    torch.testing.assert_close(discretise(A, B, small, "zoh")[1], discretise(A, B, small, "euler")[1])
    torch.testing.assert_close(discretise(0 * A, B, 1 + small, "zoh")[1], (1 + small) * B)  # A = 0: dt B


def test_constant_input_converges_to_the_dc_gain_under_zero_order_hold_only():
    A, B, C, D, dt, (decay, gain) = lti_system()
    x = torch.ones(1, 4000, 6, dtype=torch.float64)
    wanted = (-C * B / A).sum(-1) + D
    y, _ = lti_recurrence(x, decay, gain, C, D)
    torch.testing.assert_close(y[0, -1], wanted)
    y, _ = lti_recurrence(x, *discretise(A, B, dt, "euler"), C, D)
    assert ((y[0, -1] - wanted).abs() > 1e-3 * wanted.abs()).all()


def test_discretisation_has_gradients():
    A = torch.tensor([-1e-3, -0.3, -2.0], dtype=torch.float64, requires_grad=True)
    dt = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    B = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: discretise(*x, "zoh"), (A, B, dt))


# ----------------------------------------------------------------------------------------------------------- time-invariant


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("tokens", [1, 100, 300, 600])
def test_recurrence_is_convolution_for_time_invariant_systems(complex_, tokens):
    _, _, C, D, _, (decay, gain) = lti_system(complex_=complex_)
    x = torch.randn(2, tokens, 6, dtype=torch.float64)
    y, h = lti_recurrence(x, decay, gain, C, D)
    kernel = lti_kernel(decay, gain, C, tokens, chunk=64)
    assert kernel.shape == (6, tokens)
    torch.testing.assert_close(lti_convolution(x, kernel, D), y)
    start = torch.randn(2, 6, 4, dtype=torch.float64).to(decay.dtype)
    y, h = lti_recurrence(x, decay, gain, C, D, start)
    chunked, last = lti_advance(x, decay, gain, C, D, start, chunk=70)
    torch.testing.assert_close(chunked, y)
    torch.testing.assert_close(last, h)


def test_all_forms_agree_in_float32_within_1e_5():
    A, B, C, D, dt, (decay, gain) = (
        [x.float() for x in y] if isinstance(y, tuple) else y.float() for y in lti_system()
    )
    x = torch.randn(2, 200, 6)
    y, _ = lti_recurrence(x, decay, gain, C, D)
    scale = float(y.abs().max())
    assert (lti_convolution(x, lti_kernel(decay, gain, C, 200), D) - y).abs().max() <= 1e-5 * scale
    assert (lti_advance(x, decay, gain, C, D, torch.zeros(2, 6, 4))[0] - y).abs().max() <= 1e-5 * scale
    # the same system as a selective scan whose tokens do not choose; B and C are shared by the channels there
    steps = dt[:, 0].expand(2, 200, 6)
    shared = [row[:1].expand(200, -1).expand(2, -1, -1) for row in (B, C)]
    fixed = discretise(A, B[:1], dt, "zoh")
    y, h = lti_recurrence(x, *fixed, C[:1], D)
    for backend in ("sequential", "chunked", "associative"):
        found, last = selective_scan(x, steps, A, *shared, D, backend=backend, discretisation="zoh")
        assert (found - y).abs().max() <= 1e-5 * float(y.abs().max()), backend
        torch.testing.assert_close(last, h, atol=1e-5, rtol=1e-4)


def test_powers():
    decay = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    for count in (1, 2, 3, 7, 8):
        torch.testing.assert_close(powers(decay, count), decay[:, None] ** torch.arange(count))


# ----------------------------------------------------------------------------------------------------------- selective scan


@pytest.mark.parametrize("discretisation", ["euler", "zoh"])
@pytest.mark.parametrize("step", [1e-6, 0.3, 1e4], ids=["tiny", "usual", "huge"])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64, 70, 97])
def test_back_ends_agree_with_the_definition(tokens, step, discretisation):
    x = scan_inputs(tokens=tokens, step=step)
    y, h = selective_scan(**x, backend="sequential", discretisation=discretisation)
    for backend in ("chunked", "associative"):
        for segment in (16, 256):
            found, last = selective_scan(**x, backend=backend, discretisation=discretisation, segment=segment)
            torch.testing.assert_close(found, y, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(last, h, atol=1e-9, rtol=1e-9)


@needs_kernel
@pytest.mark.parametrize("step", [1e-6, 0.3, 1e4], ids=["tiny", "usual", "huge"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 64, 16, 16), (3, 129, 20, 5), (1, 200, 33, 17), (2, 63, 64, 40)])
def test_kernel_agrees_with_the_definition(shape, step):
    x = scan_inputs(*shape, step=step)
    y, h = selective_scan(**x, backend="sequential")
    low = {name: value.float() for name, value in x.items()}
    found, last = selective_scan(**low, backend="kernel")
    torch.testing.assert_close(found.double(), y, atol=1e-5 * float(y.abs().max()), rtol=1e-4)
    torch.testing.assert_close(last.double(), h, atol=1e-5 * float(h.abs().max()), rtol=1e-4)
    bare = {name: value for name, value in low.items() if name not in ("D", "h0")}
    alone, wanted = (selective_scan(**bare, backend=backend)[0] for backend in ("kernel", "sequential"))
    torch.testing.assert_close(alone, wanted, atol=2e-5 * float(y.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("discretisation", ["euler", "zoh"])
@pytest.mark.parametrize("backend", ["sequential", "chunked", "associative"])
def test_gradients_against_finite_differences(backend, discretisation):
    x = scan_inputs(1, 7, 3, 2)
    names, values = list(x), [value.requires_grad_() for value in x.values()]

    def run(*values):
        return selective_scan(
            **dict(zip(names, values, strict=True)), backend=backend, discretisation=discretisation, segment=4
        )

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 64, 16, 16), (3, 129, 20, 5), (1, 200, 50, 17)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_the_kernel(shape, threads):
    x = scan_inputs(*shape, step=0.1)
    batch, tokens, channels, states = shape
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((batch, tokens, channels), (batch, channels, states))
    ]

    def gradients(backend, dtype):
        values = {name: value.detach().to(dtype).requires_grad_() for name, value in x.items()}
        y, h = selective_scan(**values, backend=backend)
        ((y * weights[0].to(dtype)).sum() + (h * weights[1].to(dtype)).sum()).backward()
        return {name: value.grad.double() for name, value in values.items()}

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gradients("kernel", torch.float32)
    finally:
        torch.set_num_threads(before)
    for name, wanted in gradients("sequential", torch.float64).items():
        error = (found[name] - wanted).abs().max()
        assert error <= 2e-5 * max(1.0, float(wanted.abs().max())), (name, float(error))


@needs_kernel
def test_kernel_gives_gradients_only_where_asked_and_for_one_output_alone():
    x = scan_inputs(dtype=torch.float32)
    x["B"].requires_grad_()
    for which in (0, 1):
        out = selective_scan(**x, backend="kernel")[which]
        (grad,) = torch.autograd.grad(out.sum(), x["B"])
        wanted = torch.autograd.grad(selective_scan(**x, backend="chunked")[which].sum(), x["B"])[0]
        torch.testing.assert_close(grad, wanted, atol=1e-3, rtol=1e-3)
    assert all(value.grad is None for value in x.values())


@pytest.mark.parametrize("backend", ["chunked", "associative", pytest.param("kernel", marks=needs_kernel)])
def test_extreme_decays_stay_finite_in_float32(backend):
    x = scan_inputs(tokens=300, dtype=torch.float32)
    x["dt"] = torch.cat([torch.full((2, 100, 20), 1e-12), torch.full((2, 100, 20), 1e6), x["dt"][:, 200:]], 1)
    values = {name: value.requires_grad_() for name, value in x.items()}
    y, h = selective_scan(**values, backend=backend)
    wanted, _ = selective_scan(**{n: v.detach().double() for n, v in x.items()}, backend="sequential")
    assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    (y.sum() + h.sum()).backward()
    assert all(value.grad.isfinite().all() for value in values.values())


@pytest.mark.parametrize("backend", ["sequential", *BACKENDS])
def test_a_scan_goes_on_where_another_stopped(backend):
    if backend == "kernel" and not kernels.load("scan"):
        backend = "auto"
    x = scan_inputs(tokens=90, dtype=torch.float32)
    y, h = selective_scan(**x, backend=backend)
    at = {name: value[:, :37] if name in ("u", "dt", "B", "C") else value for name, value in x.items()}
    first, middle = selective_scan(**at, backend=backend)
    rest = {name: value[:, 37:] if name in ("u", "dt", "B", "C") else value for name, value in x.items()}
    second, last = selective_scan(**{**rest, "h0": middle}, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), y, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(last, h, atol=2e-4, rtol=1e-4)
    nothing = {name: value[:, :0] if name in ("u", "dt", "B", "C") else value for name, value in x.items()}
    y, h = selective_scan(**nothing, backend=backend)
    assert y.shape == (2, 0, 20)
    assert torch.equal(h, x["h0"])


@pytest.mark.parametrize("backend", ["sequential", *BACKENDS])
def test_non_contiguous_inputs_and_bfloat16(backend):
    if backend == "kernel" and not kernels.load("scan"):
        backend = "auto"
    x = scan_inputs(tokens=60, dtype=torch.float32)
    strided = {
        **x,
        "u": x["u"].mT.contiguous().mT,
        "B": torch.cat([x["B"], x["B"]], -1)[..., :5],
        "A": x["A"].T.contiguous().T,
    }
    for a, b in zip(selective_scan(**strided, backend=backend), selective_scan(**x, backend=backend), strict=True):
        torch.testing.assert_close(a, b)
    low = {**x, "u": x["u"].bfloat16(), "B": x["B"].bfloat16(), "C": x["C"].bfloat16()}
    y, h = selective_scan(**low, backend=backend)
    assert y.dtype == torch.bfloat16
    assert h.dtype == torch.float32
    wide, _ = selective_scan(**{n: v.float() for n, v in low.items()}, backend="sequential")
    assert (y.float() - wide).norm() <= 0.01 * wide.norm()


def test_without_a_compiler_the_chunks_serve(monkeypatch):
    x = scan_inputs(dtype=torch.float32)
    wanted = selective_scan(**x, backend="chunked")[0]
    monkeypatch.setattr(kernels, "load", lambda name: False)
    assert torch.equal(selective_scan(**x)[0], wanted)
    with pytest.raises(ValueError, match="not compiled"):
        selective_scan(**x, backend="kernel")


class _Largest(TorchDispatchMode):
    """The most elements any tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.numel() for x in tree_iter(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("backend", ["chunked", "associative", pytest.param("kernel", marks=needs_kernel)])
def test_never_holds_all_states(backend):
    x = scan_inputs(1, 2048, 32, 16, dtype=torch.float32)
    x["u"].requires_grad_()
    with _Largest() as seen:
        selective_scan(**x, backend=backend)[0].sum().backward()
    everything = 2048 * 32 * 16
    assert seen.most <= everything // 8, seen.most


def test_associative_scan_of_odd_and_even_lengths():
    for tokens in (1, 2, 3, 5, 8, 13):
        a, x = torch.rand(2, tokens, 3, dtype=torch.float64), torch.randn(2, tokens, 3, dtype=torch.float64)
        h, wanted = torch.zeros(2, 3, dtype=torch.float64), []
        for t in range(tokens):
            h = a[:, t] * h + x[:, t]
            wanted.append(h)
        torch.testing.assert_close(associative_scan(a, x), torch.stack(wanted, 1))


@pytest.mark.parametrize("backend", ["sequential", *BACKENDS])
def test_causal_and_masked_steps_leave_the_state(backend):
    if backend == "kernel" and not kernels.load("scan"):
        backend = "auto"
    x = scan_inputs(tokens=40, dtype=torch.float32)
    y, _ = selective_scan(**x, backend=backend)
    later = {**x, "u": x["u"].clone(), "dt": x["dt"].clone()}
    later["u"][:, 20:] += 1
    later["dt"][:, 20:] += 1
    assert torch.equal(selective_scan(**later, backend=backend)[0][:, :20], y[:, :20])
    still = {**x, "dt": torch.zeros_like(x["dt"])}
    assert torch.equal(selective_scan(**still, backend=backend)[1], x["h0"])
    gone = {**x, "dt": torch.full_like(x["dt"], 1e9)}
    other = {**gone, "h0": -3 * gone["h0"]}
    assert torch.equal(selective_scan(**gone, backend=backend)[0], selective_scan(**other, backend=backend)[0])


@needs_kernel
def test_counted_cost_doubles_with_the_tokens():
    from assay.measure.cost import count_cost

    costs = []
    for tokens in (64, 128):
        x = scan_inputs(2, tokens, 16, 8, dtype=torch.float32)
        cost = count_cost(lambda x=x: selective_scan(**x, backend="kernel"))
        assert cost.uncounted == {}
        costs.append(cost.flops)
    assert costs == [9 * 2 * 64 * 16 * 8, 9 * 2 * 128 * 16 * 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.ones(2, 70, 3)}, "dt must have shape"),
        ({"A": -torch.ones(3, 5)}, "A must have shape"),
        ({"B": torch.ones(2, 70, 4)}, "B must have shape"),
        ({"C": torch.ones(1, 70, 5)}, "C must have shape"),
        ({"D": torch.ones(3)}, "D must have shape"),
        ({"h0": torch.ones(2, 20, 4)}, "h0 must have shape"),
        ({"backend": "parallel"}, "backend must be one of"),
        ({"discretisation": "tustin"}, "discretisation must be one of"),
        ({"segment": 0}, "segment must be a whole number at least 1"),
        ({"backend": "kernel", "discretisation": "zoh"}, "Euler"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**scan_inputs(dtype=torch.float32), **change})


def test_kernel_refuses_float64():
    with pytest.raises(ValueError, match="float32"):
        selective_scan(**scan_inputs(), backend="kernel")
    with pytest.raises(ValueError, match="zoh"):
        discretise(-torch.ones(1), torch.ones(1), torch.ones(1), "tustin")


# --------------------------------------------------------------------------------------------------- one decay a head (SSD)


def ssd_inputs(batch=2, tokens=70, heads=6, values=4, groups=2, states=3, step=0.3):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, tokens, heads, values),
        "dt": step * normal(batch, tokens, heads).exp(),
        "A": -normal(heads).exp(),
        "B": normal(batch, tokens, groups, states),
        "C": normal(batch, tokens, groups, states),
        "D": normal(heads),
    }


@pytest.mark.parametrize("step", [1e-6, 0.3, 1e4])
@pytest.mark.parametrize("chunk", [1, 7, 16, 35, 70, 100])
def test_ssd_is_masked_attention(chunk, step):
    x = ssd_inputs(step=step)
    y, _ = ssd(**x, chunk=chunk)
    torch.testing.assert_close(y, ssd_reference(**x), atol=1e-9, rtol=1e-9)


def test_ssd_is_a_selective_scan_whose_channels_share_a_decay():
    x = ssd_inputs(groups=1)
    h0 = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    y, h = ssd(**x, h0=h0, chunk=16)
    wide = {"dt": x["dt"].repeat_interleave(4, -1), "A": x["A"].repeat_interleave(4)[:, None].expand(24, 3)}
    flat, last = selective_scan(
        x["x"].flatten(2), **wide, B=x["B"][:, :, 0], C=x["C"][:, :, 0], D=x["D"].repeat_interleave(4), h0=h0.flatten(1, 2),
        backend="sequential",
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(2), flat)
    torch.testing.assert_close(h.flatten(1, 2), last)


def test_ssd_without_decay_is_linear_attention_without_a_normaliser():
    x = ssd_inputs(groups=6)
    x["A"], x["D"] = torch.zeros(6, dtype=torch.float64), None
    weights = torch.einsum("bihn,bjhn->bhij", x["C"], x["B"]).tril()
    wanted = torch.einsum("bhij,bjhp->bihp", weights, x["dt"][..., None] * x["x"])
    torch.testing.assert_close(ssd(**x, chunk=16)[0], wanted)


def test_mask_of_ssd_is_the_product_of_the_decays_between():
    z = -torch.rand(9, dtype=torch.float64) * 100
    mask = segment_sums(z).exp()
    for i in range(9):
        for j in range(9):
            wanted = math.exp(float(z[j + 1 : i + 1].sum())) if j <= i else 0.0
            assert float(mask[i, j]) == pytest.approx(wanted, rel=1e-9, abs=0)


def test_gradients_of_ssd():
    x = ssd_inputs(1, 7, 2, 2, 1, 2)
    names, values = list(x), [value.requires_grad_() for value in x.values()]
    h0 = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    run = lambda h0, *v: ssd(**dict(zip(names, v, strict=True)), h0=h0, chunk=3)  # noqa: E731
    assert torch.autograd.gradcheck(run, (h0, *values), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk"),
        ({"dt": torch.ones(2, 70, 5)}, "dt must have shape"),
        ({"B": torch.ones(2, 70, 4, 3)}, "groups"),
    ],
)
def test_bad_arguments_of_ssd_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**{**ssd_inputs(), **change})


def test_a_scan_keeps_one_state_in_64_tokens_for_its_gradients():
    if not kernels.load("scan"):
        assert scans.SEGMENT == 256
        return
    x = scan_inputs(1, 640, 16, 4, dtype=torch.float32)
    kept = torch.ops.assay.selective_scan(*x.values(), True)[2]
    assert kept.numel() == 640 // 64 * 16 * 4
    assert torch.ops.assay.selective_scan(*x.values(), False)[2].numel() == 0
    x["u"].requires_grad_()
    with _Largest() as seen, torch.no_grad():
        selective_scan(**x, backend="kernel")
    assert seen.most == 640 * 16


@needs_kernel
def test_long_memories_do_not_drift():
    """Decays so near 1 that a biased exponential would show after thousands of tokens. All that adds up is positive, so that the
    error relative to it is that of the exponential, not of a sum that crosses zero."""
    tokens = 4096
    x = scan_inputs(1, tokens, 16, 2)
    x["dt"] = torch.full_like(x["dt"], 1e-3)
    x["A"] = -torch.linspace(1e-4, 0.05, 32, dtype=torch.float64).view(16, 2)
    x["u"], x["B"], x["C"], x["D"], x["h0"] = (torch.ones_like(x[name]) for name in ("u", "B", "C", "D", "h0"))
    low = {name: value.float() for name, value in x.items()}
    exact = selective_scan(**{name: value.double() for name, value in low.items()}, backend="sequential")[0]
    found = {backend: selective_scan(**low, backend=backend)[0] for backend in ("kernel", "sequential")}
    errors = {backend: float(((y - exact) / exact).abs().max()) for backend, y in found.items()}
    assert errors["kernel"] <= max(1e-5, 2 * errors["sequential"]), errors


CHECK = """
import torch
from assay.methods.core.mixers.scan import selective_scan
assert kernels.load("scan") == KERNELS
g = torch.Generator().manual_seed(0)
u, dt = (torch.randn(2, 130, 21, generator=g) for _ in range(2))
values = [u, torch.nn.functional.softplus(dt), -torch.rand(21, 5, generator=g) * 200, torch.randn(2, 130, 5, generator=g)]
values += [torch.randn(2, 130, 5, generator=g), torch.randn(21, generator=g), torch.randn(2, 21, 5, generator=g)]
found = []
for dtype, backend in ((torch.float32, "auto"), (torch.float64, "sequential")):
    x = [v.to(dtype).requires_grad_() for v in values]
    y, h = selective_scan(*x, backend=backend)
    found.append([y, h, *torch.autograd.grad(y.sum() + h.sum(), x)])
for a, b in zip(*found):
    assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp_min(1), (a - b).abs().max()
"""


def test_with_kernels_switched_off_the_chunks_serve_and_say_so(monkeypatch):
    monkeypatch.setenv("ASSAY_KERNELS", "0")
    kernels.load.cache_clear()
    try:
        x = scan_inputs(dtype=torch.float32)
        before = kernels.paths().get("selective scan: chunked", 0)
        found = selective_scan(**x)[0]
        assert kernels.paths()["selective scan: chunked"] == before + 1
    finally:
        kernels.load.cache_clear()
    torch.testing.assert_close(found, selective_scan(**x, backend="sequential")[0], atol=1e-5, rtol=1e-4)


@needs_kernel
def test_a_scan_says_that_the_kernel_ran():
    before = kernels.paths().get("selective scan: kernel", 0)
    selective_scan(**scan_inputs(dtype=torch.float32))
    assert kernels.paths()["selective scan: kernel"] == before + 1


REAL = [torch.ones(1, 4, 2), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)]


@pytest.mark.parametrize("wrong", [torch.int64, torch.bool, torch.complex64])
def test_whole_and_complex_signals_are_refused_and_never_cast(wrong):
    x = scan_inputs(dtype=torch.float32)
    for name in x:
        with pytest.raises(TypeError, match=f"{name} must hold floating-point numbers"):
            selective_scan(**{**x, name: x[name].to(wrong)})
    y = ssd_inputs()
    for name in y:
        with pytest.raises(TypeError, match=f"{name} must hold floating-point numbers"):
            ssd(**{**y, name: y[name].to(wrong)})
    signal = REAL[0].to(wrong)
    for call in (
        lambda: lti_recurrence(signal, *REAL[1:]),
        lambda: lti_advance(signal, *REAL[1:], None, torch.zeros(1, 2, 3)),
        lambda: lti_convolution(signal, torch.ones(2, 4)),
        lambda: left_conv(signal, torch.ones(2, 3)),
    ):
        with pytest.raises(TypeError, match="x must hold floating-point numbers"):
            call()
    with pytest.raises(TypeError, match="kernel must hold floating-point numbers"):
        lti_convolution(REAL[0], torch.ones(2, 4).to(wrong))
    if not wrong.is_complex:
        with pytest.raises(TypeError, match="A must hold"):
            discretise(torch.ones(2).to(wrong), torch.ones(2), torch.ones(2))


def test_empty_signals_are_their_own_results():
    x = scan_inputs(dtype=torch.float32)
    for batch, tokens in ((2, 0), (0, 7), (0, 0)):
        per_token = {name: x[name][:batch, :tokens] for name in ("u", "dt", "B", "C")}
        y, h = selective_scan(**{**x, **per_token, "h0": x["h0"][:batch]})
        assert y.shape == (batch, tokens, 20)
        assert torch.equal(h, x["h0"][:batch])
        signal = torch.zeros(batch, tokens, 2)
        assert lti_convolution(signal, torch.ones(2, 8), torch.ones(2)).shape == signal.shape
        assert lti_recurrence(signal, *REAL[1:])[0].shape == signal.shape
        assert lti_advance(signal, *REAL[1:], None, torch.zeros(batch, 2, 3))[0].shape == signal.shape
        assert left_conv(signal, torch.ones(2, 3)).shape == signal.shape
        z = {name: value[:batch, :tokens] if value.ndim > 1 else value for name, value in ssd_inputs().items()}
        assert ssd(**z)[0].shape == (batch, tokens, 6, 4)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["-march=x86-64-v4", "-march=x86-64-v3", "-march=x86-64"])
def test_other_processors(march, tmp_path):
    assert "-march=native" in kernels.FLAGS
    built_with(CHECK, march, cache=tmp_path)


def test_gradients_of_gradients_are_refused_not_wrong_in_the_kernel():
    u = torch.randn(1, 5, 2, requires_grad=True)
    B, C = torch.randn(2, 1, 5, 3)
    y, _ = selective_scan(u, torch.rand(1, 5, 2), -torch.rand(2, 3), B, C, backend="kernel")
    (slope,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        slope.sum().backward()


def test_shapes_devices_and_sizes_are_checked_everywhere():
    u, dt, A, B = torch.randn(1, 7, 3), torch.rand(1, 7, 3), -torch.rand(3, 4), torch.randn(1, 7, 4)
    assert associative_scan(u[:, :0], u[:, :0]).shape == (1, 0, 3)
    for call, name in (
        (lambda: lti_recurrence(u, A.exp(), A, A, None, torch.zeros(2, 3, 4)), "h must be"),
        (lambda: lti_advance(u, A.exp(), A, A, None, torch.zeros(2, 3, 4)), "h must be"),
        (lambda: lti_advance(u, A.exp(), A, A, None, torch.zeros(1, 3, 4), chunk=0), "chunk"),
        (lambda: selective_scan(u, dt.to("meta"), A, B, B), "dt must lie on cpu"),
        (
            lambda: ssd_reference(u[..., None], dt, A[:, 0], B[:, :, None].expand(-1, -1, 2, -1), B[:, :, None]),
            "B and C",
        ),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    for call, name in (
        (lambda: powers(A, 2.5), "count"),
        (lambda: lti_kernel(A.long(), A, A, 3), "decay"),
    ):
        with pytest.raises(TypeError, match=name):
            call()
