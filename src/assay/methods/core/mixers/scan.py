"""State space models as functions: discretisation, time-invariant recurrences and convolutions, selective scans.

    h' = A h + B x,  y = C h + D x         discretised with step dt:        h_t = Ab h_{t-1} + Bb x_t,  y_t = C h_t + D x_t

Ab = exp(dt A). Bb is A^-1 (exp(dt A) - 1) B under zero-order hold, exact for inputs that are constant within a step, or dt B, the
Euler form of Mamba. A is diagonal throughout. Three kinds of model: time-invariant (S4D), whose recurrence is a convolution;
selective (S6, Mamba), where dt, B and C come from the token; and selective with one decay a head (SSD, Mamba-2), which is a masked
product of matrices.

The selective scan has interchangeable back ends that agree: "sequential", the definition; "chunked", exact, one step for all chunks
of a segment at once; "associative", pairs of pairs, log depth; "kernel", compiled, float32. None divides by a cumulative decay,
and none but the first's gradients holds (batch, tokens, channels, states): segments are computed again in the backward pass.

`our choice`: segments of 256 tokens, chunks of the square root of that. 1 MAC = 2 FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels
from assay.methods.core.mixers.protocol import fast_length, left_conv, wide_dtype

Discretisation = Literal["zoh", "euler"]
Backend = Literal["auto", "kernel", "chunked", "associative", "sequential"]
SEGMENT = 256  # tokens whose (channels, states) may be held at once
DIRECT = 128  # tokens up to which a convolution is not worth an FFT
SCAN_FLOPS = 9  # for each token, channel and state: the count usual in the literature, an exponential counted as one


# ----------------------------------------------------------------------------------------------------------- discretisation


def discretise(A: Tensor, B: Tensor, dt: Tensor, method: Discretisation = "zoh") -> tuple[Tensor, Tensor]:
    """(Ab, Bb) of a diagonal system, elementwise over shapes that broadcast; A may be complex.

    "zoh": Bb = A^-1 (exp(dt A) - 1) B, dt B in the limit A -> 0. "euler": Bb = dt B. Raises ValueError for another method,
    TypeError for whole numbers.

    >>> decay, gain = discretise(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor(0.1))
    >>> round(float(decay), 4), round(float(gain), 4)
    (0.9048, 0.0952)
    """
    checks.choice("method", method, get_args(Discretisation))
    for name, value in (("A", A), ("B", B), ("dt", dt)):
        _continuous(name, value)
    z = dt * A
    return torch.exp(z), dt * (_held(z) * B if method == "zoh" else B)


def _continuous(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` is a tensor of real or complex floating-point numbers."""
    kind: checks.Kind = "complex" if isinstance(value, Tensor) and value.is_complex() else "floating"
    checks.tensor(name, value, dtype=kind, empty=True)


def _held(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z without cancellation, 1 at 0, for real and complex z."""
    small, zero = z.abs() < 0.5, z == 0
    half = torch.where(small & ~zero, z, 1.0) / 2
    near = torch.exp(half) * torch.sinh(half) / half
    far = torch.where(small, 1.0, z)
    return torch.where(small, torch.where(zero, 1 + z / 2, near), (torch.exp(far) - 1) / far)


# ----------------------------------------------------------------------------------------------------------- time-invariant


def lti_recurrence(
    x: Tensor, decay: Tensor, gain: Tensor, C: Tensor, D: Tensor | None = None, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = Ab h_{t-1} + Bb x_t, y_t = Re(C h_t) + D x_t, token by token: the reference.

    x (batch, tokens, channels); decay (Ab), gain (Bb) and C (channels, states), real or complex; D (channels,);
    h (batch, channels, states), zeros when None. Returns y like x and the last state. Raises TypeError for whole numbers.
    """
    _check_lti(x, decay, gain, C, D, h)
    if h is None:
        h = torch.zeros(len(x), *decay.shape, dtype=torch.promote_types(decay.dtype, x.dtype), device=x.device)
    outputs = []
    for t in range(x.shape[1]):
        h = decay * h + gain * x[:, t, :, None]
        outputs.append(_real((C * h).sum(-1)))
    y = torch.stack(outputs, 1) if outputs else torch.empty_like(x)
    return (y if D is None else y + D * x), h


def lti_kernel(decay: Tensor, gain: Tensor, C: Tensor, length: int, *, chunk: int = SEGMENT) -> Tensor:
    """The convolution kernel (Re C Bb, Re C Ab Bb, Re C Ab^2 Bb, ...), (channels, length); arguments as `lti_recurrence`."""
    length, chunk = checks.whole("length", length, low=0), checks.whole("chunk", chunk, low=1)
    for name, value in (("decay", decay), ("gain", gain), ("C", C)):
        _continuous(name, value)
    if not length:
        return _real(C[:, :0])
    base = powers(decay, min(chunk, length))
    onward, weight, parts = base[..., -1] * decay, C * gain, []
    for start in range(0, length, chunk):
        parts.append(_real(torch.einsum("dn,dnt->dt", weight, base[..., : length - start])))
        weight = weight * onward
    return torch.cat(parts, -1)


def lti_convolution(x: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    """Causal convolution of x (batch, tokens, channels) with kernel (channels, at least tokens), plus D x.

    By FFT; up to 128 tokens directly, which is causal to the last bit. Raises TypeError for whole or complex numbers, ValueError
    for shapes that do not fit.
    """
    checks.tensor("x", x, shape=("batch", "tokens", "channels"), empty=True)
    checks.tensor("kernel", kernel, shape=(x.shape[2], "taps"), empty=True)
    tokens = x.shape[1]
    if kernel.shape[1] < tokens:
        raise ValueError(f"kernel must have a tap for each of {tokens} tokens, got {kernel.shape[1]}")
    if D is not None:
        checks.tensor("D", D, shape=(x.shape[2],), empty=True)
    if not x.numel():
        return x
    if tokens <= DIRECT:
        y = left_conv(x, kernel[:, :tokens].flip(1))
    else:
        size = fast_length(2 * tokens)
        spectrum = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(kernel[:, :tokens], size, dim=1).T
        y = torch.fft.irfft(spectrum, size, dim=1)[:, :tokens]
    return y if D is None else y + D * x


def lti_advance(
    x: Tensor, decay: Tensor, gain: Tensor, C: Tensor, D: Tensor | None, h: Tensor, *, chunk: int = SEGMENT
) -> tuple[Tensor, Tensor]:
    """`lti_recurrence` from the state h, whole chunks at a time."""
    _check_lti(x, decay, gain, C, D, h)
    chunk = checks.whole("chunk", chunk, low=1)
    if not x.numel():
        return x, h
    outputs = []
    for part in x.split(chunk, 1):
        tokens = part.shape[1]
        power = powers(decay, tokens)
        y = lti_convolution(part, _real(torch.einsum("dn,dnt->dt", C * gain, power)), D)
        outputs.append(y + _real(torch.einsum("bdn,dnt->btd", C * decay * h, power)))
        entering = (gain[..., None] * power.flip(-1)).to(h.dtype)
        h = power[..., -1] * decay * h + torch.einsum("btd,dnt->bdn", part.to(h.dtype), entering)
    return torch.cat(outputs, 1), h


def _check_lti(x: Tensor, decay: Tensor, gain: Tensor, C: Tensor, D: Tensor | None, h: Tensor | None) -> None:
    checks.tensor("x", x, shape=("batch", "tokens", "channels"), empty=True)
    for name, value in (("decay", decay), ("gain", gain), ("C", C)):
        _continuous(name, value)
        if value.ndim != 2 or len(value) not in (1, x.shape[2]):  # one row may serve all channels
            raise ValueError(f"{name} must be (channels, states) with {x.shape[2]} channels, got {tuple(value.shape)}")
    if D is not None:
        checks.tensor("D", D, shape=(x.shape[2],), empty=True)
    if h is not None:
        _continuous("h", h)
        if tuple(h.shape) != (len(x), x.shape[2], decay.shape[1]):
            raise ValueError(f"h must be {(len(x), x.shape[2], decay.shape[1])}, got {tuple(h.shape)}")


def powers(decay: Tensor, count: int) -> Tensor:
    """(..., count): decay^0, decay^1, ... by doubling."""
    _continuous("decay", decay)
    count = checks.whole("count", count, low=0)
    found, onward = torch.ones_like(decay)[..., None], decay
    while found.shape[-1] < count:
        found = torch.cat([found, found * onward[..., None]], -1)
        onward = onward * onward
    return found[..., :count]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


# ----------------------------------------------------------------------------------------------------------- selective scan


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    backend: Backend = "auto",
    discretisation: Discretisation = "euler",
    segment: int = SEGMENT,
) -> tuple[Tensor, Tensor]:
    """S6: h_t = exp(dt_t A) h_{t-1} + Bb_t u_t, y_t = <h_t, C_t> + D u_t; y like u, and the last state.

    u and dt (positive; 0 leaves the state as it is) (batch, tokens, channels), A (channels, states), B and C (batch, tokens,
    states), D (channels,), h0 (batch, channels, states), zeros when None. `discretisation` of B: "euler", Bb = dt B (Mamba), or
    "zoh". Computed and the state returned in float32 (float64 for float64). All back ends have gradients; "auto" takes the
    compiled kernel where it serves (CPU, float32, Euler), else the chunks.

    No tokens give no outputs and the state as it was. Which back end served is noted (`kernels.paths`) as "selective scan".
    Raises ValueError for shapes and devices that do not fit, unknown options, or "kernel" where it cannot serve; TypeError for
    tensors of whole or complex numbers.

    >>> u, dt = torch.ones(1, 3, 1), torch.full((1, 3, 1), 0.5)
    >>> y, h = selective_scan(u, dt, A=torch.zeros(1, 1), B=torch.ones(1, 3, 1), C=torch.ones(1, 3, 1))
    >>> y[0, :, 0].tolist()  # nothing decays: a running sum of dt u
    [0.5, 1.0, 1.5]
    """
    _check_scan(u, dt, A, B, C, D, h0, backend, discretisation, segment)
    wide, given = wide_dtype(u.dtype), u.dtype
    (u, dt, A, B, C) = (x.to(wide) for x in (u, dt, A, B, C))
    D = None if D is None else D.to(wide)
    h = u.new_zeros(len(u), *A.shape) if h0 is None else h0.to(wide)
    if not u.numel():
        return u.to(given), h
    if backend in ("auto", "kernel"):
        if why := _no_kernel(u, discretisation):
            if backend == "kernel":
                raise ValueError(f"backend 'kernel' cannot serve here: {why}")
            backend = "sequential" if u.shape[1] == 1 else "chunked"
        else:
            kernels.ran("selective scan", "kernel")
            arguments = [None if x is None else x.contiguous() for x in (u, dt, A, B, C, D, h)]
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments):
                y, h = _Kernel.apply(*arguments)
            else:
                y, h, _ = torch.ops.assay.selective_scan(*arguments, False)
            return y.to(given), h
    kernels.ran("selective scan", backend)
    if backend == "sequential":
        y, h = _sequential(u, dt, A, B, C, h, discretisation)
    else:
        y, h = _in_segments(
            _chunked if backend == "chunked" else _associative, u, dt, A, B, C, h, discretisation, segment
        )
    return (y if D is None else y + D * u).to(given), h


def _check_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    backend: str,
    discretisation: str,
    segment: int,
) -> None:
    checks.tensor("u", u, shape=("batch", "tokens", "channels"), empty=True)
    checks.tensor("A", A, shape=(u.shape[2], "states"), device=u.device, empty=True)
    per_token = (*u.shape[:2], A.shape[1])
    checks.tensor("dt", dt, shape=tuple(u.shape), device=u.device, empty=True)
    checks.tensor("B", B, shape=per_token, device=u.device, empty=True)
    checks.tensor("C", C, shape=per_token, device=u.device, empty=True)
    if D is not None:
        checks.tensor("D", D, shape=(u.shape[2],), device=u.device, empty=True)
    if h0 is not None:
        checks.tensor("h0", h0, shape=(len(u), *A.shape), device=u.device, empty=True)
    checks.choice("backend", backend, get_args(Backend))
    checks.choice("discretisation", discretisation, get_args(Discretisation))
    checks.whole("segment", segment, low=1)


def _no_kernel(u: Tensor, discretisation: str) -> str:
    """Why the compiled kernel cannot serve; empty when it can."""
    if discretisation != "euler":
        return "it has the Euler form of B only"
    if u.device.type != "cpu" or u.dtype != torch.float32:
        return f"it is for float32 on the CPU, not {u.dtype} on {u.device.type}"
    return "" if kernels.load("scan") else "it is not compiled"


def _sequential(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, discretisation: Discretisation
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(u.shape[1]):
        decay, gain = discretise(A, B[:, t, None, :], dt[:, t, :, None], discretisation)
        h = decay * h + gain * u[:, t, :, None]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1), h


def _in_segments(
    run: Callable[..., tuple[Tensor, Tensor]],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    discretisation: Discretisation,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """One segment after the other; their inner values are recomputed for the gradients."""
    outputs = []
    for at in range(0, u.shape[1], segment):
        here = slice(at, at + segment)
        parts = (u[:, here], dt[:, here], A, B[:, here], C[:, here], h)
        if torch.is_grad_enabled() and any(x.requires_grad for x in parts):
            y, h = checkpoint(run, *parts, discretisation, use_reentrant=False)
        else:
            y, h = run(*parts, discretisation)
        outputs.append(y)
    return torch.cat(outputs, 1), h


def _chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, discretisation: Discretisation
) -> tuple[Tensor, Tensor]:
    """All chunks step together from empty states; then states travel from chunk to chunk; then each token gets its chunk's.

    exp(A (dt_1 + ... + dt_t)) is the part of the state before the chunk that is left after t tokens, so nothing is divided.
    """
    tokens = u.shape[1]
    size = max(1, round(tokens**0.5))
    count = -(-tokens // size)

    def cut(
        x: Tensor,
    ) -> Tensor:  # (batch, tokens, k) to (batch, chunks, size, k); dt = 0 after the end changes no state
        return F.pad(x, (0, 0, 0, count * size - tokens)).unflatten(1, (count, size))

    u, dt, B, C = cut(u), cut(dt), cut(B), cut(C)
    local, passed = u.new_zeros(*u.shape[:2], *A.shape), dt.cumsum(2)
    outputs = []
    for t in range(size):
        decay, gain = discretise(A, B[:, :, t, None, :], dt[:, :, t, :, None], discretisation)
        local = decay * local + gain * u[:, :, t, :, None]
        outputs.append((local * C[:, :, t, None, :]).sum(-1))
    through, before = torch.exp(passed[:, :, -1, :, None] * A), []
    for chunk in range(count):
        before.append(h)
        h = through[:, chunk] * h + local[:, chunk]
    start = torch.stack(before, 1)
    for t in range(size):
        left = torch.exp(passed[:, :, t, :, None] * A) * start
        outputs[t] = outputs[t] + (left * C[:, :, t, None, :]).sum(-1)
    return torch.stack(outputs, 2).flatten(1, 2)[:, :tokens], h


def _associative(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, discretisation: Discretisation
) -> tuple[Tensor, Tensor]:
    decay, gain = discretise(A, B[:, :, None, :], dt[..., None], discretisation)
    added = gain * u[..., None]
    added = torch.cat([added[:, :1] + decay[:, :1] * h[:, None], added[:, 1:]], 1)
    states = associative_scan(decay, added)
    return (states * C[:, :, None, :]).sum(-1), states[:, -1]


def associative_scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t along dimension 1, h_0 = x_0, in logarithmic depth: (a, x) pairs combine as (a' a, a' x + x').

    No tokens give none.
    """
    tokens = a.shape[1]
    if tokens <= 1:
        return x
    even, odd = slice(0, tokens // 2 * 2, 2), slice(1, None, 2)
    at_odd = associative_scan(a[:, odd] * a[:, even], a[:, odd] * x[:, even] + x[:, odd])
    behind = a[:, 2::2] * at_odd[:, : (tokens - 1) // 2] + x[:, 2::2]
    at_even = torch.cat([x[:, :1], behind], 1)
    paired = torch.stack([at_even[:, : tokens // 2], at_odd], 2).flatten(1, 2)
    return paired if tokens % 2 == 0 else torch.cat([paired, at_even[:, -1:]], 1)


class _Kernel(torch.autograd.Function):
    """The compiled scan; saves its inputs and one state in 64 tokens. Gradients of gradients are refused."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h, kept = torch.ops.assay.selective_scan(*arguments, True)
        ctx.save_for_backward(*arguments[:6], kept)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> Any:
        u, dt, A, B, C, D, kept = ctx.saved_tensors
        grad = torch.zeros_like(u) if grad is None else grad.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        found = torch.ops.assay.selective_scan_backward(grad, grad_last, u, dt, A, B, C, D, kept)
        return tuple(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=True))


def scan_flops(tokens: int, channels: int, states: int, batch: int = 1) -> int:
    """FLOPs of a selective scan: 9 for each token, channel and state, exponentials included."""
    return SCAN_FLOPS * batch * tokens * channels * states


def _scan_macs(u: Tensor, dt: Tensor, A: Tensor, *rest: Any, out: Any) -> int:
    return scan_flops(u.shape[1], u.shape[2], A.shape[1], u.shape[0]) // 2


def _scan_backward_macs(grad: Tensor, last: Any, u: Tensor, dt: Tensor, A: Tensor, *rest: Any, out: Any) -> int:
    return 2 * _scan_macs(u, dt, A, out=out)


register_macs("assay::selective_scan", _scan_macs, "other")
register_macs("assay::selective_scan_backward", _scan_backward_macs, "other")


# --------------------------------------------------------------------------------------------------- one decay a head (SSD)


def segment_sums(z: Tensor) -> Tensor:
    """(..., T) to (..., T, T): entry i, j is the sum of z_k over j < k <= i, -inf above the diagonal. Sums only, no differences."""
    size = z.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=z.device).tril(-1)
    sums = z[..., :, None].expand(*z.shape, size).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(below.T, -torch.inf)


def _check_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    checks.tensor("x", x, shape=("batch", "tokens", "heads", "values"), empty=True)
    checks.tensor("dt", dt, shape=tuple(x.shape[:3]), empty=True)
    checks.tensor("A", A, shape=(x.shape[2],), empty=True)
    for name, value in (("B", B), ("C", C)):
        checks.tensor(name, value, ndim=4, empty=True)
    if D is not None:
        checks.tensor("D", D, shape=(x.shape[2],), empty=True)
    if B.shape != C.shape or B.shape[:2] != x.shape[:2] or not B.shape[2] or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B and C must be (batch, tokens, groups, states), groups dividing {x.shape[2]} heads, "
            f"got {tuple(B.shape)} and {tuple(C.shape)}"
        )


def ssd_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """The masked-attention form, all pairs at once: y = (L o C B^T) (dt x) + D x, L_ij the product of decays between j and i.

    Arguments and errors as `ssd`.
    """
    _check_ssd(x, dt, A, B, C, D)
    heads = x.shape[2] // B.shape[2]
    mask = torch.exp(segment_sums((dt * A).transpose(1, 2)))
    scores = torch.einsum("bign,bjgn->bgij", C, B).repeat_interleave(heads, 1)
    y = torch.einsum("bhij,bjhp->bihp", mask * scores, dt[..., None] * x)
    return y if D is None else y + D[:, None] * x


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The scan with one decay exp(dt A) a head, in chunks: matrix products within a chunk, a state between them.

    x (batch, tokens, heads, values), dt (batch, tokens, heads), A and D (heads,), B and C (batch, tokens, groups, states), groups
    dividing the heads; h0 (batch, heads, values, states), zeros when None. Returns y like x and the last state, both in the
    dtype of x. O(tokens * chunk). No tokens give no outputs and the state as it was.
    Raises ValueError for shapes that do not fit, TypeError for tensors of whole or complex numbers.
    """
    chunk = checks.whole("chunk", chunk, low=1)
    _check_ssd(x, dt, A, B, C, D)
    groups = B.shape[2]
    heads = x.shape[2] // groups
    if h0 is not None:
        checks.tensor("h0", h0, shape=(len(x), x.shape[2], x.shape[3], B.shape[3]), empty=True)
    h = x.new_zeros(len(x), x.shape[2], x.shape[3], B.shape[3]) if h0 is None else h0
    if not x.numel():
        return x, h
    outputs = []
    for part, step, b, c in zip(
        x.split(chunk, 1), dt.split(chunk, 1), B.split(chunk, 1), C.split(chunk, 1), strict=True
    ):
        z = (step * A).transpose(1, 2)  # (batch, heads, tokens)
        mask = torch.exp(segment_sums(z))
        added = (step[..., None] * part).transpose(1, 2)  # (batch, heads, tokens, values)
        c, b = c.transpose(1, 2), b.transpose(1, 2)  # (batch, groups, tokens, states)
        scores = (c @ b.transpose(-1, -2))[:, :, None] * mask.unflatten(1, (groups, heads))
        y = scores.flatten(1, 2) @ added
        read = c[:, :, None] @ h.unflatten(1, (groups, heads)).transpose(-1, -2)
        y = y + read.flatten(1, 2) * torch.exp(z.cumsum(-1))[..., None]
        entering = (mask[:, :, -1, :, None] * added).transpose(-1, -2).unflatten(1, (groups, heads)) @ b[:, :, None]
        h = torch.exp(z.sum(-1))[..., None, None] * h + entering.flatten(1, 2)
        outputs.append(y.transpose(1, 2))
    y = torch.cat(outputs, 1)
    return (y if D is None else y + D[:, None] * x), h
