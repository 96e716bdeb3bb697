"""What must hold for every sequence mixer. `check_mixer(make)` runs all of it; `make()` builds the mixer (float32, small)."""

from __future__ import annotations

import copy

import pytest
import torch

from assay.methods.core.mixers.model import StateCache
from assay.methods.core.mixers.protocol import clone_state

LENGTHS = (1, 2, 15, 16, 17, 97)


LONG = (768, 700)  # a multiple of every chunk, segment and block there is, and a multiple of none


def check_mixer(make, *, tolerance=2e-5, gradcheck=True, gradient_tokens=5, leak=0.0, longest=97):
    """Parallel = chunked = recurrent, causality, independence of the batch, left padding, float64 gradients, state bytes, empty
    inputs, a cache that begins again, weights that change after use, half precision, and what is refused.

    `leak` is how much rounding may look like a gradient from the future (1e-15 for mixers that pass through an FFT).
    `longest` is how many tokens the mixer takes; where it is 768 or more, sequences of several chunks are tried too.
    """
    torch.manual_seed(0)
    mixer = make().double().eval()
    check_forms_agree(mixer)
    if longest >= max(LONG):
        check_long(mixer)
    check_causal(mixer, leak)
    check_batch_independent(mixer)
    check_padding(mixer)
    check_state(mixer)
    check_empty(mixer)
    check_reset(mixer)
    check_refusals(mixer)
    check_follows_weights(mixer, make().double().eval())
    check_float32(make().float().eval(), tolerance)
    check_half(make().eval(), torch.bfloat16)
    check_half(make().eval(), torch.float16)
    if gradcheck:
        check_gradients(make().double(), gradient_tokens)
        check_gradients_of_chunks(make().double())


def _input(mixer, batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(mixer.parameters()).dtype
    return torch.randn(batch, tokens, mixer.dim, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def check_forms_agree(mixer, tolerance=1e-9):
    for tokens in LENGTHS:
        x = _input(mixer, 2, tokens)
        whole = mixer(x)
        assert whole.shape == x.shape
        for chunk in (1, 7, 16, tokens, tokens + 3):
            y, state = mixer.chunked(x, chunk=chunk)
            torch.testing.assert_close(
                y, whole, atol=tolerance, rtol=tolerance, msg=lambda m, c=chunk: f"chunk {c}: {m}"
            )
        state = mixer.init_state(2, dtype=x.dtype)
        steps = []
        for t in range(tokens):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps, 1), whole, atol=tolerance, rtol=tolerance)
        # a chunk first, steps after it: what generation does
        cut = tokens // 2
        _, state = mixer.chunked(x[:, :cut], chunk=8) if cut else (None, mixer.init_state(2, dtype=x.dtype))
        kept = clone_state(state)
        y, _ = mixer.advance(x[:, cut:], state)
        torch.testing.assert_close(y, whole[:, cut:], atol=tolerance, rtol=tolerance)
        again, _ = mixer.advance(x[:, cut:], kept)
        torch.testing.assert_close(again, y, atol=0, rtol=0)
    strided = _input(mixer, 2, 66)[:, ::2]
    torch.testing.assert_close(mixer(strided), mixer(strided.contiguous()), atol=tolerance, rtol=tolerance)


@torch.no_grad()
def check_long(mixer, tolerance=1e-9):
    """Lengths at which mixers go through chunks, segments or an FFT: one path against another, and causality."""
    for tokens in LONG:
        x = _input(mixer, 1, tokens)
        whole = mixer(x)
        for chunk in (50, 128):
            y, _ = mixer.chunked(x, chunk=chunk)
            torch.testing.assert_close(y, whole, atol=tolerance, rtol=tolerance)
        changed = x.clone()
        changed[:, 600:] += 1
        torch.testing.assert_close(mixer(changed)[:, :600], whole[:, :600], atol=tolerance, rtol=tolerance)


def check_causal(mixer, leak=0.0):
    x = _input(mixer, 1, 33).requires_grad_()
    y = mixer(x)
    for t in (0, 7, 16, 31):
        (grad,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        assert grad[:, t + 1 :].abs().max() <= leak
        assert grad[:, t].abs().max() > 0
    changed = x.detach().clone()
    changed[:, 20:] += 1
    with torch.no_grad():
        torch.testing.assert_close(mixer(changed)[:, :20], y.detach()[:, :20], atol=1e-9, rtol=1e-9)
        assert not torch.allclose(mixer(changed)[:, 20:], y.detach()[:, 20:])


@torch.no_grad()
def check_batch_independent(mixer):
    x = _input(mixer, 3, 40)
    whole = mixer(x)
    for row in range(3):
        torch.testing.assert_close(mixer(x[row : row + 1])[0], whole[row], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def check_padding(mixer):
    """Ragged rows, padded on the left with anything, give what each row gives alone, in every form."""
    lengths, tokens = (37, 20, 1), 37
    rows = [_input(mixer, 1, n, seed=n) for n in lengths]
    padded = 5 * _input(mixer, len(lengths), tokens, seed=7)
    mask = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        padded[i, tokens - n :], mask[i, tokens - n :] = row[0], True
    whole = mixer(padded, mask)
    parts, _ = mixer.chunked(padded, chunk=10, mask=mask)
    after = _input(mixer, len(lengths), 3, seed=99)
    _, state = mixer.advance(padded, mixer.init_state(len(lengths), dtype=padded.dtype), mask)
    following, _ = mixer.advance(after, state)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        alone = mixer(row)[0]
        torch.testing.assert_close(whole[i, tokens - n :], alone, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(parts[i, tokens - n :], alone, atol=1e-9, rtol=1e-9)
        longer = mixer(torch.cat([row, after[i : i + 1]], 1))[0, n:]
        torch.testing.assert_close(following[i], longer, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def check_state(mixer):
    """`state_bytes` says what the state holds, bookkeeping of up to 16 bytes a row and token apart (a row, if it does not grow)."""
    dtype = next(mixer.parameters()).dtype
    fixed = mixer.state_bytes(1, 2) == mixer.state_bytes(50, 2)
    assert mixer.state_bytes(50, 6) == 3 * mixer.state_bytes(50, 2)
    for tokens in (1, 50):
        _, state = mixer.advance(_input(mixer, 2, tokens), mixer.init_state(2))
        held = sum(x.numel() * x.element_size() for x in state.values())
        said = mixer.state_bytes(tokens, 2)
        assert said == mixer.state_bytes(tokens, 2, dtype)
        assert said <= held <= said + 2 * 16 * (1 if fixed else tokens + 1), (held, said)
        assert all(len(x) == 2 for x in state.values())


@torch.no_grad()
def check_float32(mixer, tolerance):
    x = _input(mixer, 2, 97)
    whole = mixer(x)
    y, _ = mixer.chunked(x, chunk=16)
    assert (y - whole).abs().max() <= tolerance * max(1.0, float(whole.abs().max()))


@torch.no_grad()
def check_empty(mixer):
    """No tokens or no sequences: empty outputs of the right shape, and a state that goes on as if nothing had happened."""
    dtype = next(mixer.parameters()).dtype
    for batch, tokens in ((2, 0), (0, 5), (0, 0)):
        x, mask = torch.zeros(batch, tokens, mixer.dim, dtype=dtype), torch.ones(batch, tokens, dtype=torch.bool)
        for given in (None, mask):
            y, state = mixer.chunked(x, mask=given)
            assert mixer(x, given).shape == y.shape == x.shape
            assert all(len(value) == batch for value in state.values())
    x = _input(mixer, 2, 9)
    _, state = mixer.advance(x[:, :6], mixer.init_state(2))
    y, after = mixer.advance(x[:, :0], clone_state(state))
    assert y.shape == (2, 0, mixer.dim)
    _same_state(after, state)
    assert torch.equal(mixer.advance(x[:, 6:], after)[0], mixer.advance(x[:, 6:], state)[0])


def _same_state(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@torch.no_grad()
def check_reset(mixer):
    """`StateCache.reset` gives exactly a fresh cache, for as many sequences as there are by then."""
    x = _input(mixer, 2, 12)
    cache = StateCache([mixer.init_state(2)])
    for t in range(4):
        _, cache.states[0] = mixer.step(x[:, t], cache.states[0])
    cache.batch_repeat_interleave(2)
    cache.seen = 4
    cache.reset()
    fresh = mixer.init_state(4)
    assert cache.get_seq_length() == 0
    _same_state(cache.states[0], fresh)
    again = x.repeat_interleave(2, 0)
    assert torch.equal(mixer.advance(again, cache.states[0])[0], mixer.advance(again, fresh)[0])


@torch.no_grad()
def check_refusals(mixer):
    """Whole and complex numbers are refused and never cast; so are other shapes and masks that are not bool."""
    x, state = _input(mixer, 2, 5), mixer.init_state(2)
    calls = {"forward": mixer, "advance": lambda x, mask=None: mixer.advance(x, state, mask), "chunked": mixer.chunked}
    for name, call in calls.items():
        for wrong in (x.long(), x.to(torch.complex128), x > 0):
            with pytest.raises(TypeError, match="x must hold floating-point numbers"):
                call(wrong)
        for wrong in (x[0], x[..., :-1]):
            with pytest.raises(ValueError, match="x must have shape"):
                call(wrong)
        if name != "chunked":
            with pytest.raises(TypeError, match="mask must hold bools"):
                call(x, torch.ones(2, 5))
            with pytest.raises(ValueError, match="mask must have shape"):
                call(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="chunk"):
        mixer.chunked(x, chunk=0)


@torch.no_grad()
def check_follows_weights(mixer, other):
    """After use, weights set through `.data`, `load_state_dict` or a change of dtype are those that count from then on."""
    x = _input(mixer, 2, 9)
    mixer = copy.deepcopy(mixer)

    def outputs(mixer, x):
        state, found = mixer.init_state(len(x)), [mixer(x)]
        for t in range(x.shape[1]):
            y, state = mixer.step(x[:, t], state)
            found.append(y)
        return found

    def same():
        dtype = next(mixer.parameters()).dtype
        fresh = copy.deepcopy(other).to(dtype)
        for a, b in zip(outputs(mixer, x.to(dtype)), outputs(fresh, x.to(dtype)), strict=True):
            assert torch.equal(a, b)

    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    outputs(mixer, x)
    for own, wanted in zip(mixer.state_dict().values(), other.state_dict().values(), strict=True):
        own.copy_(wanted)
    same()
    mixer.load_state_dict(before)
    outputs(mixer, x)
    mixer.load_state_dict(other.state_dict())
    same()
    mixer.to(torch.float32)
    same()


@torch.no_grad()
def check_half(mixer, dtype):
    """In a half-precision model: all at once, in chunks and step by step near the float32 result; the state holds what it says."""
    exact = mixer(_input(mixer, 2, 40))
    low = mixer.to(dtype)
    x = _input(low, 2, 40)
    state, steps = low.init_state(2), []
    for t in range(40):
        y, state = low.step(x[:, t], state)
        steps.append(y)
    for found in (low(x), low.chunked(x, chunk=16)[0], torch.stack(steps, 1)):
        assert found.dtype == dtype
        assert (found.float() - exact).norm() <= 0.1 * exact.norm()
    check_state(low)


def check_gradients(mixer, tokens):
    """float64 gradients of inputs and every parameter, against finite differences."""
    mixer = mixer.eval()
    x = _input(mixer, 1, tokens).requires_grad_()
    names = [name for name, p in mixer.named_parameters() if p.requires_grad]
    parameters = [p.detach().clone().requires_grad_() for _, p in mixer.named_parameters() if p.requires_grad]

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-6)


def check_gradients_of_chunks(mixer):
    """A state can be learned through: chunks and steps have the gradients of the whole."""
    mixer = mixer.eval()
    x = _input(mixer, 2, 9)
    weights = [p for p in mixer.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(mixer(x).square().sum(), weights)
    for chunk in (1, 4):
        found = torch.autograd.grad(mixer.chunked(x, chunk=chunk)[0].square().sum(), weights)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
