"""What must hold for every sequence mixer. `check_mixer(make)` runs all of it; `make()` builds the mixer (float32, small)."""

from __future__ import annotations

import torch

from assay.methods.mixers.protocol import clone_state

LENGTHS = (1, 2, 15, 16, 17, 64, 97)


def check_mixer(make, *, tolerance=2e-5, gradcheck=True, gradient_tokens=5, leak=0.0):
    """Parallel = chunked = recurrent, causality, independence of the batch, left padding, float64 gradients, state bytes.

    `leak` is how much rounding may look like a gradient from the future (1e-15 for mixers that pass through an FFT).
    """
    torch.manual_seed(0)
    mixer = make().double().eval()
    check_forms_agree(mixer)
    check_causal(mixer, leak)
    check_batch_independent(mixer)
    check_padding(mixer)
    check_state(mixer)
    check_float32(make().float().eval(), tolerance)
    check_bfloat16(make().eval())
    if gradcheck:
        check_gradients(make().double(), gradient_tokens)


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
    """Ragged rows, padded on the left, give what each row gives alone, in every form."""
    lengths, tokens = (37, 20, 1), 37
    rows = [_input(mixer, 1, n, seed=n) for n in lengths]
    padded = torch.zeros(len(lengths), tokens, mixer.dim, dtype=rows[0].dtype)
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
    """`state_bytes` says what the state holds, bookkeeping of up to 16 bytes a token and row and spare room apart."""
    for tokens in (1, 50):
        x = _input(mixer, 2, tokens)
        _, state = mixer.advance(x, mixer.init_state(2, dtype=x.dtype))
        held = sum(t.numel() * t.element_size() for t in state.values())
        said = mixer.state_bytes(tokens, 2, x.dtype)
        assert said <= held <= 2 * said + 2 * 16 * (tokens + 1), (held, said)


@torch.no_grad()
def check_float32(mixer, tolerance):
    x = _input(mixer, 2, 97)
    whole = mixer(x)
    y, _ = mixer.chunked(x, chunk=16)
    assert (y - whole).abs().max() <= tolerance * max(1.0, float(whole.abs().max())) * 10


@torch.no_grad()
def check_bfloat16(mixer):
    exact = mixer(_input(mixer, 2, 40))
    low = mixer.bfloat16()
    found = low(_input(low, 2, 40)).float()
    assert found.isfinite().all()
    assert (found - exact).norm() <= 0.1 * exact.norm()


def check_gradients(mixer, tokens):
    """float64 gradients of inputs and every parameter, against finite differences."""
    x = _input(mixer, 1, tokens).requires_grad_()
    names = [name for name, p in mixer.named_parameters() if p.requires_grad]
    parameters = [p.detach().clone().requires_grad_() for _, p in mixer.named_parameters() if p.requires_grad]

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-6)
