"""Frame by frame equals the clip, whatever the network and however the stream is cut; and a step does a step's work."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.compression.continual_inference import (
    EMPTY,
    Branches,
    Conv,
    Parallel,
    PerFrame,
    Stream,
    StreamState,
    Tokens,
    join,
    register,
    to_continual,
)

T = 17
CUTS = ([1] * T, [2, 5, 1, 4, 3, 2], [T])
PLAIN, VIDEO, JOINTS = (2, 3, T), (2, 3, T, 6, 5), (2, 3, T, 4)


def gated():
    pool = nn.AdaptiveAvgPool3d((None, 1, 1))
    return Branches(nn.Identity(), nn.Sequential(pool, nn.Conv3d(3, 3, 1), nn.Sigmoid()), reduce="mul")


def normed():
    net = nn.Sequential(nn.Conv3d(3, 4, 3, padding=(0, 1, 1)), nn.BatchNorm3d(4), nn.SiLU(), nn.Dropout(0.5))
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net


NETS = {
    "convolution": (lambda: nn.Conv1d(3, 4, 3), PLAIN),
    "dilated": (lambda: nn.Conv1d(3, 4, 3, dilation=3), PLAIN),
    "even kernel": (lambda: nn.Conv1d(3, 4, 4, bias=False), PLAIN),
    "grouped": (lambda: nn.Conv1d(3, 6, 3, groups=3), PLAIN),
    "over joints": (lambda: nn.Conv2d(3, 4, (5, 1)), JOINTS),
    "depthwise": (lambda: nn.Conv3d(3, 6, 3, padding=(0, 1, 1), groups=3), VIDEO),
    "strided in space": (lambda: nn.Conv3d(3, 4, 3, stride=(1, 2, 2), padding=(0, 1, 1), dilation=(2, 1, 1)), VIDEO),
    "strided in time": (lambda: nn.Conv1d(3, 4, 3, stride=2), PLAIN),
    "long strides": (lambda: nn.Conv1d(3, 4, 2, stride=4), PLAIN),
    "strided twice": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv1d(4, 4, 2, stride=3, dilation=2)),
        PLAIN,
    ),
    "one tap, strided": (lambda: nn.Conv1d(3, 4, 1, stride=3), PLAIN),
    "one tap": (lambda: nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), VIDEO),
    "mean pool": (lambda: nn.AvgPool1d(4, stride=1), PLAIN),
    "mean pool over space too": (lambda: nn.AvgPool3d((2, 3, 2), padding=(0, 1, 1)), VIDEO),
    "largest, dilated": (lambda: nn.MaxPool1d(3, stride=2, dilation=2), PLAIN),
    "largest over space too": (lambda: nn.MaxPool3d((2, 2, 2), stride=(1, 2, 2)), VIDEO),
    "norm": (normed, VIDEO),
    "gate": (gated, VIDEO),
    "skip, oldest": (lambda: Branches(nn.Identity(), nn.Conv1d(3, 3, 5)), PLAIN),
    "skip, centre": (lambda: Branches(nn.Identity(), nn.Conv1d(3, 3, 5), align="centre"), PLAIN),
    "skip, newest": (lambda: Branches(nn.Identity(), nn.Conv1d(3, 3, 5), align="newest"), PLAIN),
    "skip, strided": (lambda: Branches(nn.Conv1d(3, 4, 1, stride=2), nn.Conv1d(3, 4, 5, stride=2)), PLAIN),
    "skip in a skip": (
        lambda: Branches(
            nn.Conv1d(3, 2, 3),
            nn.Sequential(Branches(nn.Identity(), nn.Conv1d(3, 3, 3), align="newest"), nn.Conv1d(3, 4, 5)),
            reduce="cat",
            align="centre",
        ),
        PLAIN,
    ),
    "all together": (
        lambda: nn.Sequential(
            nn.Conv3d(3, 4, (3, 3, 3), padding=(0, 1, 1)),
            nn.ReLU(),
            Branches(nn.Identity(), nn.Sequential(nn.Conv3d(4, 4, (3, 1, 1)), nn.GELU())),
            nn.MaxPool3d((2, 2, 2), stride=(2, 2, 2)),
            nn.Conv3d(4, 2, (2, 1, 1)),
        ),
        VIDEO,
    ),
}


def source_and_clip(name):
    make, shape = NETS[name]
    return make().double().eval(), torch.randn(shape, dtype=torch.float64)


def streamed(net, clip, cut, state=EMPTY):
    outs = []
    for piece in clip.split(cut, 2):
        out, state = net.advance(piece, state)
        if out is not None:
            outs.append(out)
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("name", NETS)
def test_any_cut_of_the_stream_gives_what_the_clip_gives(name):
    source, clip = source_and_clip(name)
    expected = source(clip)
    for keep in ("sums", "inputs"):
        net = to_continual(source, keep=keep)
        torch.testing.assert_close(net(clip), expected)
        for cut in CUTS:
            torch.testing.assert_close(streamed(net, clip, cut)[0], expected)


@pytest.mark.parametrize("name", NETS)
def test_a_step_has_the_output_of_its_own_frame_and_none_before_and_between(name):
    source, clip = source_and_clip(name)
    expected = source(clip)
    for keep in ("sums", "inputs"):
        net, state = to_continual(source, keep=keep), EMPTY
        for t, frame in enumerate(clip.split(1, 2)):
            out, state = net.advance(frame, state)
            place, between = divmod(t - net.delay, net.stride)
            if t < net.delay or between:
                assert out is None
            else:
                torch.testing.assert_close(out, expected[:, :, place : place + 1])


def test_the_receptive_field_is_what_torch_says():
    for name in NETS:
        source, _ = source_and_clip(name)
        net, shape = to_continual(source), NETS[name][1]
        for frames, outputs in ((net.receptive_field, 1), (net.receptive_field + net.stride, 2)):
            assert source(torch.randn(*shape[:2], frames, *shape[3:], dtype=torch.float64)).shape[2] == outputs


def test_a_residual_joins_an_output_with_the_frame_its_window_begins_with():
    f = nn.Conv1d(3, 3, 3).eval()
    net, clip = to_continual(Branches(nn.Identity(), f).eval()), torch.randn(1, 3, 6)
    out, state = None, EMPTY
    for t in range(6):
        out, state = net.advance(clip[:, :, t : t + 1], state)
        if t >= 2:
            torch.testing.assert_close(out, f(clip[:, :, t - 2 : t + 1]) + clip[:, :, t - 2 : t - 1])


def test_a_padded_network_agrees_with_its_stream_away_from_the_ends():
    block = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 3, 3, padding="same"))
    source, clip = Branches(nn.Identity(), block, align="centre").eval(), torch.randn(1, 3, 12)
    with pytest.raises(ValueError, match="padding='remove'"):
        to_continual(source)
    net = to_continual(source, padding="remove")
    torch.testing.assert_close(streamed(net, clip, 1)[0], source(clip)[:, :, 2:-2])


def test_branches_over_padding_that_is_removed_must_be_aligned_at_the_centre():
    """With the padding the outputs are as long as the input and any alignment is the centre's; without it only the centre's is."""
    clip = torch.randn(1, 3, 12)
    for padded in (nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding="same"), nn.MaxPool1d(3, 1, padding=1)):
        for align in ("oldest", "newest"):
            with pytest.raises(ValueError, match="align='centre' where padding is removed"):
                to_continual(Branches(nn.Identity(), padded, align=align).eval(), padding="remove")
        source = Branches(nn.Identity(), padded, align="centre").eval()
        net = to_continual(source, padding="remove")
        torch.testing.assert_close(streamed(net, clip, 1)[0], source(clip)[:, :, 1:-1])
    to_continual(Branches(nn.Identity(), nn.Conv1d(3, 3, 3)).eval(), padding="remove")


def test_a_strided_network_without_its_padding_begins_at_the_first_frame():
    source, clip = nn.Conv1d(3, 4, 3, stride=2, padding=1).eval(), torch.randn(1, 3, 13)
    found, _ = streamed(to_continual(source, padding="remove"), clip[:, :, 1:], 1)
    torch.testing.assert_close(found, source(clip)[:, :, 1 : 1 + found.shape[2]])


def test_a_pool_of_the_whole_clip_becomes_one_of_a_window():
    source = nn.Sequential(nn.Conv3d(2, 3, 3), nn.AdaptiveAvgPool3d((1, 1, 1)), nn.Conv3d(3, 2, 1)).eval()
    with pytest.raises(ValueError, match="window must say"):
        to_continual(source)
    net, clip = to_continual(source, window=4), torch.randn(2, 2, 9, 5, 5)
    assert net.receptive_field == 6
    found, _ = streamed(net, clip, 1)
    for t in range(4):
        torch.testing.assert_close(found[:, :, t : t + 1], source(clip[:, :, t : t + 6]))


def test_bytes_of_text():
    source = nn.Sequential(Tokens(256, 5), nn.Conv1d(5, 4, 3)).eval()
    ids = torch.tensor([list(b"def advance")])
    stream = Stream(to_continual(source))
    steps = [stream.forward_step(ids[:, t]) for t in range(ids.shape[1])]
    assert steps[0] is None
    assert steps[1] is None
    torch.testing.assert_close(torch.stack(steps[2:], 2), source(ids))


# What a step costs


@pytest.mark.parametrize("keep", ["sums", "inputs"])
@pytest.mark.parametrize("name", ["convolution", "dilated", "grouped", "over joints", "depthwise", "strided in space"])
def test_a_step_does_one_part_of_the_clips_multiplications(name, keep):
    source, clip = source_and_clip(name)
    net = to_continual(source, keep=keep)
    out, state = net.advance(clip)
    step = count_cost(lambda: net.advance(clip[:, :, :1], state)).macs
    assert step * out.shape[2] == count_cost(source, clip).macs


def test_a_strided_step_leaves_out_the_taps_that_lead_nowhere():
    conv = nn.Conv1d(3, 4, 4, stride=2).eval()
    net, frame = to_continual(conv), torch.randn(1, 3, 1)
    _, state = net.advance(torch.randn(1, 3, 8))
    for _ in range(4):  # every frame reaches two outputs, by every second tap
        assert count_cost(lambda: net.advance(frame, state)).macs == 3 * 4 * 2  # noqa: B023
        _, state = net.advance(frame, state)


def test_the_state_holds_the_frames_between_and_no_more():
    net = to_continual(nn.Conv3d(3, 8, 3).eval())
    _, state = net.advance(torch.randn(2, 3, 9, 4, 4))
    assert state.nbytes == 2 * 8 * 2 * 2 * 2 * 4


# The state


def test_clean_state_begins_anew_and_looking_ahead_changes_nothing():
    net, clip = to_continual(nn.Conv1d(3, 4, 3).eval()), torch.randn(2, 3, 5)
    stream = Stream(net)
    first = stream.forward_steps(clip)
    again = stream.forward_steps(clip)
    assert again.shape[2] == 5
    stream.clean_state()
    torch.testing.assert_close(stream.forward_steps(clip), first)
    before = stream.state
    ahead = stream.forward_step(clip[:, :, 0], update_state=False)
    assert stream.state is before
    torch.testing.assert_close(stream.forward_step(clip[:, :, 0]), ahead)


@pytest.mark.parametrize("keep", ["sums", "inputs"])
@pytest.mark.parametrize("make", [lambda: nn.Conv1d(3, 3, 3), lambda: Branches(nn.Identity(), nn.Conv1d(3, 3, 3))])
def test_a_long_clip_leaves_no_more_memory_behind_than_its_state_says(make, keep):
    def held(state):
        storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in state.buffers}
        return sum(storages.values()) + sum(map(held, state.parts))

    net = to_continual(make().eval(), keep=keep)
    _, state = net.advance(torch.randn(1, 3, 50))
    for frames in (50, 1, 1):
        _, state = net.advance(torch.randn(1, 3, frames), state)
        assert held(state) <= 2 * state.nbytes


def test_a_state_of_other_streams_is_refused_and_not_repeated():
    for make in (
        lambda: nn.Conv1d(3, 4, 3),
        lambda: nn.AvgPool1d(3, 1),
        lambda: nn.Sequential(nn.ReLU(), nn.Conv1d(3, 4, 3)),
    ):
        net = to_continual(make().eval())
        _, state = net.advance(torch.randn(1, 3, 2))
        for frames in (1, 4):
            with pytest.raises(ValueError, match="state must be that of 5 streams, got one of 1"):
                net.advance(torch.randn(5, 3, frames), state)


def test_a_state_is_put_back_with_more_streams_and_with_fewer():
    net, clip = to_continual(nn.Conv1d(3, 4, 3).eval()), torch.randn(2, 3, 6)
    expected, stream = net(clip), Stream(net)
    for t in range(3):
        stream.forward_step(clip[:1, :, t])
    one = stream.state
    stream.state = join([one, net.advance(clip[1:, :, :3])[1]])
    torch.testing.assert_close(stream.forward_step(clip[:, :, 3]), expected[:, :, 1])
    stream.state = stream.state.select([1])
    torch.testing.assert_close(stream.forward_step(clip[1:, :, 4]), expected[1:, :, 2])
    with pytest.raises(TypeError, match="state must be a StreamState"):
        stream.state = None


def test_a_call_that_fails_leaves_the_stream_as_it_was():
    net, clip = (
        to_continual(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 2)).eval()),
        torch.randn(1, 3, 6),
    )
    stream = Stream(net)
    stream.forward_steps(clip[:, :, :4])

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = net.parts[1].module.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.forward_steps(clip[:, :, 4:])
    handle.remove()
    torch.testing.assert_close(stream.forward_steps(clip[:, :, 4:]), net(clip)[:, :, 1:])


def test_a_stream_does_not_keep_the_history_of_its_frames():
    source, clip = source_and_clip("skip in a skip")
    stream = Stream(to_continual(source))
    out = stream.forward_steps(clip.requires_grad_())
    assert out.requires_grad
    assert not any(value.requires_grad for value in leaves(stream.state))
    ahead = stream.forward_steps(clip, update_state=False)
    torch.autograd.grad(ahead.sum(), clip)


def leaves(state):
    return [*state.buffers, *(value for part in state.parts for value in leaves(part))]


def test_streams_of_one_network_run_in_threads():
    source, clip = source_and_clip("all together")
    net, clips = to_continual(source), [clip + i for i in range(4)]

    def run(clip):
        stream = Stream(net)
        found = [stream.forward_step(frame.squeeze(2)) for frame in clip.split(1, 2)]
        return torch.stack([out for out in found if out is not None], 2)

    with ThreadPoolExecutor(4) as pool:
        for clip, found in zip(clips, pool.map(run, clips), strict=True):
            torch.testing.assert_close(found, source(clip))


@pytest.mark.parametrize("keep", ["sums", "inputs"])
def test_activations_in_place_spoil_no_state(keep):
    source, clip = (
        nn.Sequential(
            nn.Conv1d(3, 3, 3, bias=False),
            nn.ReLU(inplace=True),
            Branches(
                nn.Identity(), nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(3, 3, 3), nn.Hardswish(inplace=True))
            ),
            nn.AvgPool1d(2, 1),
            nn.ReLU(inplace=True),
        ).eval(),
        torch.randn(2, 3, 12),
    )
    with torch.no_grad():
        found, _ = streamed(to_continual(source, keep=keep), clip.clone(), 1)
        torch.testing.assert_close(found, source(clip))


@pytest.mark.parametrize("keep", ["sums", "inputs"])
def test_an_older_state_stays_good(keep):
    source, clip = source_and_clip("all together")
    net = to_continual(source, keep=keep)
    _, state = net.advance(clip)
    kept = copy.deepcopy(state.tensors())
    once, _ = net.advance(clip[:, :, :3], state)
    for frame in clip.split(1, 2):
        net.advance(frame, state)
    assert all(torch.equal(value, kept[name]) for name, value in state.tensors().items())
    torch.testing.assert_close(net.advance(clip[:, :, :3], state)[0], once)


@pytest.mark.parametrize("keep", ["sums", "inputs"])
@pytest.mark.parametrize("name", ["convolution", "mean pool", "largest over space too", "skip, oldest", "all together"])
def test_the_memory_of_a_frame_may_be_used_again(name, keep):
    source, clip = source_and_clip(name)
    net, camera, outs, state = to_continual(source, keep=keep), clip[:, :, :1].clone(), [], EMPTY
    for frame in clip.split(1, 2):
        camera.copy_(frame)
        out, state = net.advance(camera, state)
        outs += [] if out is None else [out.clone()]
    torch.testing.assert_close(torch.cat(outs, 2), source(clip))


@pytest.mark.parametrize("name", ["all together", "skip in a skip", "strided twice"])
def test_streams_of_a_batch_are_independent_and_may_be_parted_and_joined(name):
    source, clip = source_and_clip(name)
    net = to_continual(source)
    whole, _ = streamed(net, clip, 1)
    other = clip.clone()
    other[1] += 5
    torch.testing.assert_close(streamed(net, other, 1)[0][0], whole[0])
    _, state = streamed(net, clip[:, :, :11], 1)
    rows = [state.select([1]), state.select([0])]
    turned, _ = streamed(net, clip[:, :, 11:].flip(0), 1, join(rows))
    expected, _ = streamed(net, clip[:, :, 11:], 1, state)
    torch.testing.assert_close(turned, expected.flip(0))


def test_streams_that_are_not_equally_far_cannot_be_joined():
    net = to_continual(nn.Conv1d(3, 4, 3).eval())
    one, two = net.advance(torch.randn(1, 3, 1))[1], net.advance(torch.randn(1, 3, 2))[1]
    with pytest.raises(ValueError, match="equally far"):
        join([one, two])
    with pytest.raises(ValueError, match="at least one"):
        join([])
    with pytest.raises(ValueError, match="got an empty one and one after 1 frames"):
        join([EMPTY, one])
    with pytest.raises(ValueError, match=r"of one network, got buffers \[\(1, 4, 2\)\] and \[\(1, 3, 2\)\]"):
        join([one, to_continual(nn.Conv1d(3, 3, 3).eval()).advance(torch.randn(1, 3, 1))[1]])
    with pytest.raises(ValueError, match="rows must be"):
        one.select([-1])
    with pytest.raises(IndexError):
        one.select([1])


def test_a_state_is_saved_and_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    source, clip = source_and_clip("all together")
    net = to_continual(source)
    _, state = streamed(net, clip[:, :, :13], 1)
    save_file(state.tensors(), tmp_path / "stream.safetensors")
    loaded = StreamState.of_tensors(load_file(tmp_path / "stream.safetensors"))
    torch.testing.assert_close(
        streamed(net, clip[:, :, 13:], 1, loaded)[0], streamed(net, clip[:, :, 13:], 1, state)[0]
    )
    with pytest.raises(ValueError, match="of one state"):
        StreamState.of_tensors({"seen": torch.tensor(1), "else": torch.zeros(1)})
    with pytest.raises(ValueError, match="entry 'seen'"):
        StreamState.of_tensors({})
    with pytest.raises(TypeError, match="tensors must be a dictionary"):
        StreamState.of_tensors([torch.tensor(1)])
    with pytest.raises(TypeError, match="seen must be a tensor"):
        StreamState.of_tensors({"seen": 1})
    with pytest.raises(TypeError, match=r"part.0.seen must be a whole number"):
        StreamState.of_tensors({"seen": torch.tensor(1), "part.0.seen": torch.tensor(1.5)})
    with pytest.raises(ValueError, match="seen must be a whole number at least 0"):
        StreamState.of_tensors({"seen": torch.tensor(-1)})


# Weights, dtypes, gradients


def test_weights_are_copies_and_changed_ones_take_effect():
    source, clip = source_and_clip("convolution")
    net, before = to_continual(source), source(clip)
    with torch.no_grad():
        source.weight.zero_()
    torch.testing.assert_close(net(clip), before)
    net.weight.data.mul_(2)
    torch.testing.assert_close(streamed(net, clip, 1)[0], net(clip))
    other = copy.deepcopy(net).float()
    assert other.weight.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(other(clip.float()), net(clip).float())


def test_bfloat16_differs_by_rounding_only():
    source, clip = source_and_clip("all together")
    exact = source(clip)
    net, half = to_continual(source).bfloat16(), clip.bfloat16()
    torch.testing.assert_close(streamed(net, half, 1)[0].double(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("keep", ["sums", "inputs"])
@pytest.mark.parametrize("name", ["dilated", "strided in time", "skip in a skip"])
def test_gradients_flow_through_a_stream(name, keep):
    source, clip = source_and_clip(name)
    net, clip = to_continual(source, keep=keep), clip.requires_grad_()
    for cut in CUTS:
        (found,) = torch.autograd.grad(streamed(net, clip, cut)[0].square().sum(), clip)
        (expected,) = torch.autograd.grad(source(clip).square().sum(), clip)
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_step_compiles_whole():
    source, clip = source_and_clip("all together")
    net = to_continual(source)
    _, state = net.advance(clip)
    compiled, outs = torch.compile(net.advance, backend="eager", fullgraph=True), []
    for frame in clip[:, :, :2].split(1, 2):  # of the two only one has an output
        expected, after = net.advance(frame, state)
        found, state = compiled(frame, state)
        torch.testing.assert_close(found, expected)
        assert state.tensors().keys() == after.tensors().keys()
        for name, value in after.tensors().items():
            torch.testing.assert_close(state.tensors()[name], value)
        outs.append(found is None)
    assert sorted(outs) == [False, True]


# What is refused


class Odd(nn.Module):
    def forward(self, x):
        return x


def hooked():
    conv = nn.Conv1d(3, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Odd, "known modules, got Odd"),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(1, 4)), "known modules, got GroupNorm"),
        (hooked, "forward hooks"),
        (lambda: nn.Conv1d(3, 4, 3, padding=1), "must not pad time"),
        (lambda: nn.Conv2d(3, 4, 3, padding=(0, 1), padding_mode="circular"), "pad with zeros"),
        (lambda: nn.Conv1d(3, 4, 4, padding="same"), "same on both sides"),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), "running statistics"),
        (lambda: nn.MaxPool1d(2, ceil_mode=True), "ceil_mode"),
        (lambda: nn.AdaptiveAvgPool1d(3), "one step in time or all"),
        (lambda: Branches(nn.Identity(), nn.Conv1d(3, 3, 2), align="centre"), "whole number of two strides"),
        (lambda: Branches(nn.Identity(), nn.Conv1d(3, 3, 3, stride=2)), "one stride"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        to_continual(make().eval())


def test_training_mode_is_refused():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="evaluation mode"):
        to_continual(net)
    streaming = to_continual(net.eval()).train()
    with pytest.raises(RuntimeError, match="BatchNorm1d is in training mode"):
        streaming.advance(torch.randn(2, 3, 4))
    net[1].train()  # a part alone: its clip would be normed with the batch's statistics
    with pytest.raises(ValueError, match="got BatchNorm1d at 1 in training mode"):
        to_continual(net)


def test_a_convolution_on_its_own_is_checked():
    with pytest.raises(TypeError, match="conv must be"):
        Conv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="conv must pad with zeros"):
        Conv(nn.Conv2d(3, 4, 3, padding=(0, 1), padding_mode="circular"))


def test_a_registered_module_is_streamed():
    class Mine(Odd):
        pass

    @register(Mine)
    def mine(module, settings):
        return PerFrame(copy.deepcopy(module))

    assert to_continual(nn.Sequential(Mine(), nn.Conv1d(3, 4, 2)).eval()).delay == 1


def test_bad_settings_and_frames_are_named():
    conv = nn.Conv1d(3, 4, 3).eval()
    with pytest.raises(ValueError, match="keep must be"):
        to_continual(conv, keep="outputs")
    with pytest.raises(ValueError, match="padding must be"):
        to_continual(conv, padding="add")
    with pytest.raises(ValueError, match="window must be"):
        to_continual(conv, window=0)
    with pytest.raises(TypeError, match="model must be"):
        to_continual("model")
    with pytest.raises(TypeError, match="net must be"):
        Stream(conv)
    with pytest.raises(ValueError, match="at least two"):
        Branches(nn.Identity())
    with pytest.raises(ValueError, match="reduce must be"):
        Branches(nn.Identity(), nn.Identity(), reduce="mean")
    stream = Stream(to_continual(conv))
    stream.forward_step(torch.randn(2, 3))
    with pytest.raises(ValueError, match="shape of the stream's others"):
        stream.forward_step(torch.randn(1, 3))
    with pytest.raises(ValueError, match="dtype of the stream's others, torch.float32, got torch.float64"):
        stream.forward_step(torch.randn(2, 3).double())
    for bad in (torch.full((2, 3), float("nan")), torch.full((2, 3), complex(0, float("inf")))):
        with pytest.raises(ValueError, match="frames must be finite"):
            stream.forward_step(bad)
    for call, bad in ((stream.forward_step, torch.randn(3)), (stream.forward_steps, torch.randn(3, 4))):
        with pytest.raises(ValueError, match=r"or ids \(batch, time\), got torch.float32"):
            call(bad)
    for bad in (torch.randn(2, 5), torch.randn(2, 3, 4)):
        with pytest.raises(ValueError, match="frames must have 3 dimensions and 3 channels"):
            Stream(stream.net).forward_step(bad)
    with pytest.raises(TypeError, match="frame must be a tensor"):
        stream.forward_step([1.0, 2.0])
    with pytest.raises(ValueError, match="must not be empty"):
        stream.forward_steps(torch.zeros(2, 3, 0))
    with pytest.raises(ValueError, match="pad_end must be False"):
        stream.forward_steps(torch.zeros(2, 3, 1), pad_end=True)
    with pytest.raises(ValueError, match="at least 3 frames"):
        stream(torch.randn(2, 3, 2))
    assert isinstance(stream.net, Conv)
    assert (stream.delay, stream.stride, stream.receptive_field) == (2, 1, 3)
    assert isinstance(to_continual(Branches(nn.Identity(), nn.Identity()).eval()), Parallel)
