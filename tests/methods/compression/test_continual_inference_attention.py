"""Attention token by token equals attention over the window, for outputs that change with every token and for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.compression.continual_inference import (
    EMPTY,
    ContinualEncoder,
    RecycledPositions,
    Stream,
    StreamState,
    attention,
    attention_over,
    join,
    retroactive_step,
    single_output_step,
    to_continual,
)

WINDOW = 6


def tokens(count, *, dim=4, scale=1.0, batch=2, heads=3, dtype=torch.float64):
    """q, k, v (batch, heads, count, dim)."""
    q, k, v = (torch.randn(batch, heads, count, dim, dtype=torch.float64) for _ in range(3))
    return (scale * q).to(dtype), (scale * k).to(dtype), v.to(dtype)


def over_window(q, k, v, t, window=WINDOW):
    q, k, v = (x[:, :, t - window + 1 : t + 1].double() for x in (q, k, v))
    return attention_over(q, k, v)


def steps(step, q, k, v, window=WINDOW, **settings):
    outs, state = [], EMPTY
    for t in range(q.shape[2]):
        out, state = step(q[:, :, t], k[:, :, t], v[:, :, t], state, window=window, **settings)
        outs.append(out)
    return outs, state


@pytest.mark.parametrize("window", [1, 2, WINDOW])
def test_retroactive_attention_is_attention_over_the_window(window):
    q, k, v = tokens(20)
    outs, state = steps(retroactive_step, q, k, v, window)
    assert all(out is None for out in outs[: window - 1])
    for t in range(window - 1, 20):
        torch.testing.assert_close(outs[t], over_window(q, k, v, t, window))
    assert state.seen == window


@pytest.mark.parametrize("query", [-1, -3, -WINDOW])
def test_the_single_output_is_its_row_of_the_window(query):
    q, k, v = tokens(14)
    outs, _ = steps(single_output_step, q, k, v, query=query)
    assert all(out is None for out in outs[: WINDOW - 1])
    for t in range(WINDOW - 1, 14):
        torch.testing.assert_close(outs[t], over_window(q, k, v, t)[:, :, query])


def largest_error(q, k, v, window):
    outs, _ = steps(retroactive_step, q, k, v, window)
    found = [(outs[t].double() - over_window(q, k, v, t, window)).abs().max() for t in range(window - 1, q.shape[2])]
    return float(torch.stack(found).max())


@pytest.mark.parametrize(("scale", "error"), [(1.0, 3e-5), (4.0, 3e-3), (8.0, 1.5e-2)])  # scores of 256 round at 3e-5
def test_large_scores_do_not_cancel(scale, error):
    q, k, v = tokens(200, dim=16, scale=scale, batch=1, heads=2, dtype=torch.float32)
    assert largest_error(q, k, v, 16) < error


def test_without_rows_summed_up_anew_large_scores_are_lost(monkeypatch):
    monkeypatch.setattr(attention, "_anew", lambda which, rows, keys, values, *sums: sums)
    q, k, v = tokens(200, dim=16, scale=4.0, batch=1, heads=2, dtype=torch.float32)
    assert not largest_error(q, k, v, 16) < 0.1


def test_half_precision_is_kept_in_float32():
    q, k, v = tokens(40, dtype=torch.bfloat16)
    outs, state = steps(retroactive_step, q, k, v)
    assert outs[-1].dtype == torch.bfloat16
    assert {buffer.dtype for buffer in state.buffers} == {torch.float32}
    torch.testing.assert_close(outs[-1].double(), over_window(q, k, v, 39), atol=0.02, rtol=0.02)


def test_another_scale():
    q, k, v = tokens(WINDOW)
    expected = attention_over(q, k, v, scale=0.3)
    torch.testing.assert_close(steps(retroactive_step, q, k, v, scale=0.3)[0][-1], expected)
    torch.testing.assert_close(steps(single_output_step, q, k, v, scale=0.3)[0][-1], expected[:, :, -1])


def test_a_step_multiplies_in_proportion_to_the_window():
    def macs(window):
        q, k, v = tokens(window + 1, dim=16)
        _, state = steps(retroactive_step, q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], window)
        last = [x[:, :, -1] for x in (q, k, v)]
        full = count_cost(lambda: over_window(q, k, v, window, window)).macs
        return count_cost(lambda: retroactive_step(*last, state, window=window)).macs, full

    (small, small_full), (large, large_full) = macs(16), macs(32)
    assert 1.9 < large / small < 2.1
    assert large_full == 4 * small_full
    assert large < large_full / 8


def test_streams_of_a_batch_are_parted_saved_and_joined():
    q, k, v = tokens(20)
    _, state = steps(retroactive_step, q[:, :, :19], k[:, :, :19], v[:, :, :19])
    last = [x[:, :, 19] for x in (q, k, v)]
    expected, _ = retroactive_step(*last, state, window=WINDOW)
    parted = [StreamState.of_tensors(state.select([row]).tensors()) for row in (1, 0)]
    found, _ = retroactive_step(*(x.flip(0) for x in last), join(parted), window=WINDOW)
    torch.testing.assert_close(found.flip(0), expected)


@pytest.mark.parametrize("step", [retroactive_step, single_output_step])
def test_the_memory_of_a_token_may_be_used_again(step):
    given, state, expected = [torch.empty(2, 3, 4, dtype=torch.float64) for _ in range(3)], EMPTY, tokens(WINDOW)
    for t in range(WINDOW):
        for memory, x in zip(given, expected, strict=True):
            memory.copy_(x[:, :, t])
        out, state = step(*given, state, window=WINDOW)
    rows = attention_over(*expected)
    torch.testing.assert_close(out, rows if step is retroactive_step else rows[:, :, -1])


def test_bad_tokens_are_named():
    q = torch.randn(1, 2, 4)
    for step in (retroactive_step, single_output_step):
        with pytest.raises(ValueError, match="k must have shape"):
            step(q, q[..., :3], q, window=4)
        with pytest.raises(TypeError, match="v must have the dtype"):
            step(q, q, q.double(), window=4)
        with pytest.raises(ValueError, match="window must be"):
            step(q, q, q, window=0)
        with pytest.raises(ValueError, match="q must have shape"):
            step(q[0], q[0], q[0], window=4)
    with pytest.raises(ValueError, match="limit must be"):
        retroactive_step(q, q, q, window=4, limit=1.0)
    with pytest.raises(ValueError, match="query must be"):
        single_output_step(q, q, q, window=4, query=-5)


@pytest.mark.parametrize("step", [retroactive_step, single_output_step])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_token_that_is_not_finite_is_refused_and_the_stream_goes_on(step, place):
    """Taken in, a NaN among the values would stay in a row's sum after its token has left."""
    q, k, v = tokens(14)
    _, state = steps(step, q[:, :, :8], k[:, :, :8], v[:, :, :8])
    for bad in (float("nan"), float("inf")):
        token = [x[:, :, 8].clone() for x in (q, k, v)]
        token[place][0, 0, 0] = bad
        with pytest.raises(ValueError, match="must be finite"):
            step(*token, state, window=WINDOW)
    out, _ = step(*(x[:, :, 8] for x in (q, k, v)), state, window=WINDOW)
    expected = over_window(q, k, v, 8)
    torch.testing.assert_close(out, expected if step is retroactive_step else expected[:, :, -1])


@pytest.mark.parametrize("step", [retroactive_step, single_output_step])
def test_a_state_of_other_steps_is_refused(step):
    q, k, v = tokens(9)
    _, state = steps(step, q, k, v)
    last = [x[:, :, -1] for x in (q, k, v)]
    with pytest.raises(ValueError, match="over a window of 4, got buffers"):
        step(*last, state, window=4)
    with pytest.raises(ValueError, match="state must be that of 1 streams, got one of 2"):
        step(*(x[:1] for x in last), state, window=WINDOW)
    with pytest.raises(ValueError, match="state must be of 1 heads of 4"):
        step(*(x[:, :1] for x in last), state, window=WINDOW)
    other = single_output_step if step is retroactive_step else retroactive_step
    with pytest.raises(ValueError, match="got buffers"):
        other(*last, state, window=WINDOW)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        step(*last, state, window=WINDOW, scale=float("nan"))


def test_another_query_needs_another_state():
    q, k, v = tokens(9)
    _, state = steps(single_output_step, q, k, v)
    with pytest.raises(ValueError, match="steps with query=-3, got one that keeps 1 queries"):
        single_output_step(*(x[:, :, -1] for x in (q, k, v)), state, window=WINDOW, query=-3)


def test_a_token_that_comes_again_and_again():
    q, k, v = (x[:, :, :1].expand(-1, -1, 30, -1) for x in tokens(1, scale=4.0, dtype=torch.float32))
    outs, _ = steps(retroactive_step, q, k, v)
    torch.testing.assert_close(outs[-1], over_window(q, k, v, 29).float())


# Positions and encoders


def test_recycled_positions_come_again_and_differ_within_the_window():
    positions = RecycledPositions(window=3, dim=4).eval()
    clip = torch.randn(2, 4, 12)
    places = positions(torch.zeros(1, 4, 12))[0].T
    torch.testing.assert_close(places[5:10], places[:5])
    assert len({tuple(row) for row in places[:5].tolist()}) == 5
    found, state = positions.advance(clip[:, :, :7])
    rest, _ = positions.advance(clip[:, :, 7:], state)
    torch.testing.assert_close(torch.cat([found, rest], 2), positions(clip))
    with pytest.raises(ValueError, match="period must be"):
        RecycledPositions(window=3, dim=4, period=2)
    for other in (
        torch.randn(1, 1, 5),
        torch.randn(1, 2, 4, 4),
    ):  # they would be repeated over channels, or put on joints
        with pytest.raises(ValueError, match=r"x must have shape \(batch, 4, time\)"):
            positions(other)
        with pytest.raises(ValueError, match=r"x must have shape \(batch, 4, time\)"):
            positions.advance(other)


def encoder(layers, *, norm_first=False, batch_first=True, activation="relu"):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, norm_first=norm_first, batch_first=batch_first, dtype=torch.float64
    )
    norm = nn.LayerNorm(8, dtype=torch.float64) if norm_first else None
    made = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_encoder_streams(layers, norm_first):
    source = encoder(layers, norm_first=norm_first, batch_first=norm_first, activation="gelu" if norm_first else "relu")
    net, clip = ContinualEncoder(source, WINDOW), torch.randn(2, 8, 11, dtype=torch.float64)
    stream = Stream(net)
    assert stream.delay == WINDOW - 1
    found = [stream.forward_step(clip[:, :, t]) for t in range(11)]
    assert all(out is None for out in found[: WINDOW - 1])
    torch.testing.assert_close(torch.stack(found[WINDOW - 1 :], 2), net(clip))
    stream.clean_state()
    pieces = [stream.forward_steps(clip[:, :, :8]), stream.forward_steps(clip[:, :, 8:])]
    torch.testing.assert_close(torch.cat(pieces, 2), net(clip))
    window = clip[:, :, :WINDOW].transpose(1, 2)
    plain = source(window)[:, -1] if norm_first else source(window.transpose(0, 1))[-1]
    torch.testing.assert_close(net(clip)[:, :, 0], plain)


def test_convolutions_positions_and_an_encoder_are_one_stream():
    source = nn.Sequential(
        nn.Conv1d(3, 8, 2),
        RecycledPositions(WINDOW, 8),
        ContinualEncoder(encoder(2).float(), WINDOW),
        nn.Conv1d(8, 2, 3),
    ).eval()
    net, clip = to_continual(source), torch.randn(2, 3, 15)
    assert net.receptive_field == 2 + WINDOW - 1 + 2
    stream = Stream(net)
    pieces = [stream.forward_steps(piece) for piece in clip.split([4, 1, 6, 4], 2)]
    torch.testing.assert_close(torch.cat([p for p in pieces if p is not None], 2), source(clip), atol=1e-5, rtol=1e-4)
    turned = join([stream.state.select([1]), stream.state.select([0])])
    frame = torch.randn(2, 3, 1)
    expected, _ = net.advance(frame, stream.state)
    torch.testing.assert_close(net.advance(frame.flip(0), turned)[0].flip(0), expected)


def test_one_layer_projects_one_token_a_step():
    source, clip = encoder(1), torch.randn(1, 8, WINDOW + 1, dtype=torch.float64)
    net = ContinualEncoder(source, WINDOW)
    _, state = net.advance(clip[:, :, :WINDOW])
    step = count_cost(lambda: net.advance(clip[:, :, WINDOW:], state)).macs
    whole = count_cost(source, clip[:, :, :WINDOW].transpose(1, 2)).macs
    assert whole / step > WINDOW - 1  # the paper's one-block factor: nearly the window


def test_what_is_no_such_encoder_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        ContinualEncoder(encoder(1).train(), WINDOW)
    part = encoder(2)
    part.layers[1].dropout1.train()
    with pytest.raises(ValueError, match=r"got Dropout at layers.1.dropout1 in training mode"):
        ContinualEncoder(part, WINDOW)
    hooked = encoder(1)
    hooked.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no forward hooks, got some on MultiheadAttention"):
        ContinualEncoder(hooked, WINDOW)
    with pytest.raises(RuntimeError, match="the encoder is in training mode"):
        ContinualEncoder(encoder(1), WINDOW).train().advance(torch.randn(1, 8, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="encoder must be"):
        ContinualEncoder(nn.Linear(2, 2), WINDOW)
    with pytest.raises(ValueError, match="window must be"):
        ContinualEncoder(encoder(1), 0)
    odd = encoder(1)
    odd.layers[0] = nn.Identity()
    with pytest.raises(ValueError, match="got Identity"):
        ContinualEncoder(odd.eval(), WINDOW)
