"""The experiments of continual_inference notice a stream that forgets, a skip that does not wait, and adapters that learn nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from torch import nn

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.compression import continual_inference as room
from assay.experiments.compression import continual_inference_adapters as adapting
from assay.experiments.compression import continual_inference_nets as nets
from assay.experiments.rates import Rate, chosen
from assay.methods.compression.continual_inference import EMPTY, StreamState, adapters, modules
from assay.workloads.images import digits_split

PICTURE = ("continual_inference/picture-frame-time", {"window": 16, "size": 16, "blocks": 2, "width": 8, "run": 2})
BYTES = ("continual_inference/byte-time", {"window": 16, "width": 16, "run": 4})
ATTENTION = ("continual_inference/retroactive-attention-time", {"window": 16, "run": 4})


STAGES = nets.STAGES[:2]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Nothing is compiled, and the networks whose operations are counted have three blocks."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(room, "STAGES", STAGES)
    monkeypatch.setattr(nets, "GRAPH_LAYERS", ((64, 1), (128, 2), (256, 2)))


def forgetful(self, x, state, real=modules.Conv._step):
    return real(self, x, StreamState(state.seen, tuple(torch.zeros_like(b) for b in state.buffers)))


def late(self, x, state, real=modules.Conv._step):
    """What waits is taken up by the wrong output: turned around in time."""
    return real(self, x, StreamState(state.seen, tuple(b.flip(2) for b in state.buffers)))


@pytest.mark.parametrize("claim", [PICTURE, BYTES], ids=["picture", "bytes"])
@pytest.mark.parametrize("broken", [forgetful, late])
def test_a_stream_that_mixes_up_its_sums_is_noticed(claim, broken, monkeypatch):
    assert verdict_of(*claim) in PAYS
    monkeypatch.setattr(modules.Conv, "_step", broken)
    assert verdict_of(*claim) is Verdict.DOES_NOT_PAY


def test_a_skip_connection_that_does_not_wait_is_noticed(monkeypatch):
    real = room.to_continual

    def hasty(model, **settings):
        net = real(model, **settings)
        for part in net.modules():
            if isinstance(part, modules.Parallel):
                part.waits = [0] * len(part.waits)
        return net

    monkeypatch.setattr(room, "to_continual", hasty)
    assert verdict_of(*PICTURE) is Verdict.DOES_NOT_PAY


def test_the_exact_rival_and_the_free_one_really_run():
    trial = room.picture_frame_time(**PICTURE[1])
    expected = trial.baseline()
    for arm in (trial.candidate, trial.free, trial.exact):
        torch.testing.assert_close(arm(), expected, atol=1e-4, rtol=1e-3)


def test_the_picture_moves():
    clip = nets.moving_picture(16)
    assert clip.shape == (1, 3, 24, 16, 16)
    assert bool(torch.isfinite(clip).all())
    assert float((clip[:, :, 1:] - clip[:, :, :-1]).abs().mean()) > 0.01
    torch.testing.assert_close(nets.played(clip, 30)[:, :, 24:], clip[:, :, :6])


def tokens(count):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, count, 8, generator=generator) for _ in range(3))


def test_attention_that_does_not_look_at_its_keys_is_noticed(monkeypatch):
    monkeypatch.setattr(room, "captured_tokens", tokens)
    assert verdict_of(*ATTENTION) in PAYS
    real = room.retroactive_step

    def uniform(q, k, v, state=EMPTY, *, window):
        return real(q, torch.zeros_like(k), v, state, window=window)

    monkeypatch.setattr(room, "retroactive_step", uniform)
    assert verdict_of(*ATTENTION) is Verdict.DOES_NOT_PAY


def test_attention_that_takes_out_another_tokens_value_is_noticed(monkeypatch):
    monkeypatch.setattr(room, "captured_tokens", tokens)
    real = room.retroactive_step

    def mixed_up(q, k, v, state=EMPTY, *, window):
        out, state = real(q, k, v, state, window=window)
        values = state.buffers[2].roll(1, 2)
        return out, state._replace(buffers=(*state.buffers[:2], values, *state.buffers[3:]))

    monkeypatch.setattr(room, "retroactive_step", mixed_up)
    assert verdict_of(*ATTENTION) is Verdict.DOES_NOT_PAY


COUNTED = {
    "continual_inference/cox3d-flops": {"depth": 1, "frames": 16, "size": 312},
    "continual_inference/cost-gcn-flops": {"frames": 60, "joints": 5},
    "continual_inference/cotransformer-flops": {"window": 16, "dim": 64, "layers": 1},
}


@functools.cache
def counted_by(claim):
    return record_of(claim, COUNTED[claim])


@pytest.mark.parametrize(("claim", "least"), zip(COUNTED, (10.0, 15.0, 15.0), strict=True))
def test_counted_operations_follow_what_is_done(claim, least, monkeypatch):
    honest = counted_by(claim)
    assert least < honest.measured.median < 1.05 * honest.arms[next(iter(honest.arms))]
    assert judge(honest).verdict is Verdict.COMPUTED
    real_frame, real_conv, real_token = modules.PerFrame.advance, modules.Conv.advance, room.ContinualEncoder._token

    def frame_again(self, x, state=EMPTY):
        self.module(x)
        return real_frame(self, x, state)

    def conv_again(self, x, state=EMPTY):
        real_conv(self, x, state)
        return real_conv(self, x, state)

    def token_again(self, x, state):
        real_token(self, x, state)
        return real_token(self, x, state)

    monkeypatch.setattr(modules.PerFrame, "advance", frame_again)
    monkeypatch.setattr(modules.Conv, "advance", conv_again)
    monkeypatch.setattr(room.ContinualEncoder, "_token", token_again)
    assert record_of(claim, COUNTED[claim]).measured.median < 0.6 * honest.measured.median


def multiplications(net, clip):
    """Of a network's convolutions and graph products over a clip, layer by layer: a reference of its own."""
    found = []

    def count(layer, _, out):
        if isinstance(layer, nets.GraphConvolution):
            found.append(layer.adjacency.shape[0] * layer.adjacency.shape[2] * out.numel())
        else:
            found.append(layer.weight[0].numel() * out.numel())

    counted = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nets.GraphConvolution))]
    handles = [layer.register_forward_hook(count) for layer in counted]
    with torch.no_grad():
        net(clip)
    for handle in handles:
        handle.remove()
    return sum(found)


def test_the_counts_are_those_of_the_layers():
    video, joints, tokens = (counted_by(claim).details["macs"] for claim in COUNTED)
    with torch.device("meta"):
        net = nets.x3d(STAGES, pad_time=True)
        head = sum(
            layer.weight.numel() for layer in net[-3:] if isinstance(layer, nn.Conv3d)
        )  # behind the pool, once a clip
        assert video["clip"] == multiplications(net, torch.empty(1, 3, 16, 312, 312))
        assert 16 * (video["step"] - head) == video["clip"] - head
        clip, head = torch.empty(1, 3, 60, 5), 256 * 60
        assert joints["clip"] == multiplications(nets.st_gcn(5, strided=True), clip)
        assert 60 * (joints["step"] - head) == multiplications(nets.st_gcn(5, strided=False), clip) - head
    n, d = 16, 64
    assert tokens == {"window": 6 * n * d * d + 2 * n * n * d, "step": 6 * d * d + 2 * n * d}


def test_adapters_that_do_not_shrink_with_the_pruning_are_noticed(monkeypatch):
    claim, point = "continual_inference/splora-parameters", {"layers": 12, "pruned": 0.7, "rank": 16}
    honest = record_of(claim, point)
    assert judge(honest).verdict is Verdict.COMPUTED
    share, left, stored = 0.3**0.5, 0, 0
    shapes = nets.resnet50_layers(10)[:12]
    for i, (inputs, outputs, kernel) in enumerate(shapes):
        inputs = inputs if i == 0 else round(share * inputs)
        outputs = outputs if i == 11 else round(share * outputs)
        left += inputs * outputs * kernel**2
        stored += 16 * (inputs + outputs)
    bias = shapes[-1][1]
    assert honest.measured.median == pytest.approx((left + bias) / (stored + bias))
    weights = [inputs * outputs * kernel**2 for inputs, outputs, kernel in nets.resnet50_layers(1000)]
    assert (len(weights), sum(weights)) == (
        54,
        25_502_912,
    )  # ResNet-50's 25 557 032, less its norms and the classifier's biases
    monkeypatch.setattr(adapters.SPLoRA, "prune", lambda self, **masks: None)
    assert record_of(claim, point).measured.median > 1.2 * honest.measured.median  # nothing pruned: more weights left
    monkeypatch.undo()
    whole = property(lambda self: len(self.down) * (len(self.up) + self.down.shape[1]))
    monkeypatch.setattr(adapters.SPLoRA, "learned", whole)
    assert record_of(claim, point).measured.median < 0.7 * honest.measured.median


def test_the_pictures_that_choose_a_rate_are_used_for_nothing_else():
    chosen_on = {x.numpy().tobytes() for x in adapting.task(adapting.CHOICE_SEED)[2]}
    drawn = set()
    for seed in (*adapting.SEEDS, adapting.CHOICE_SEED):
        images, labels, questions, answers = adapting.task(seed)
        picked = adapting.few(labels, 10, seed)
        assert labels[picked].bincount().tolist() == [10] * 10
        assert not chosen_on & {x.numpy().tobytes() for x in images}
        drawn.add(tuple(picked.tolist()))
        if seed != adapting.CHOICE_SEED:
            assert torch.equal(answers, digits_split(seed=0)[3])
    assert len(drawn) == 4


def test_adapters_that_learn_nothing_are_noticed(monkeypatch):
    """Against fine-tuning of the last layer alone SPLoRA gains; without its term it is the biases alone, and gains nothing."""
    claim, point = "continual_inference/splora-accuracy", {"lesson": "tiny"}
    monkeypatch.setattr(adapting, "chosen", lambda name, arm: Rate(3e-2, (1e-2, 3e-2, 1e-1)))
    real_arm, real_learned, rivals = adapting.pruned_arm, adapting.learned, ("fine-tuning", "fewer channels")

    def weakened(model, arm, seed, lesson):
        made = real_arm(model, "fine-tuning" if arm in rivals else arm, seed, lesson)
        if arm in rivals:
            made[:-1].requires_grad_(False)
        return made

    once = functools.cache(real_learned)  # for the arms that are not broken below

    def learned(arm, *settings):
        arm = "fine-tuning" if arm in rivals else arm
        return (real_learned if arm == "SPLoRA" else once)(arm, *settings)

    monkeypatch.setattr(adapting, "pruned_arm", weakened)
    monkeypatch.setattr(adapting, "learned", learned)
    honest = record_of(claim, point)
    assert honest.measured.low > max(0.0, honest.controls["deleted"])
    assert judge(honest).verdict in (*PAYS, Verdict.QUALITY_NOT_SHOWN)  # random channels may do as well on digits
    monkeypatch.setattr(adapters.SPLoRA, "lora", lambda self: (0 * self.down, 0 * self.up))
    broken = record_of(claim, point)
    assert broken.measured.median == pytest.approx(broken.controls["deleted"])
    assert broken.measured.high < 0
    assert judge(broken).verdict in (Verdict.UNDECIDED, Verdict.DOES_NOT_PAY)


def test_the_arms_are_as_they_are_called():
    model = adapting.first_network(0, "tiny")
    sizes = adapting.LESSONS["tiny"]
    arms = {arm: adapting.pruned_arm(model, arm, 0, "tiny") for arm in adapting.ARMS}
    for arm in ("SPLoRA", "biases only"):
        assert int(arms[arm][0].output_mask.sum()) == sizes["keep"]
        assert torch.equal(arms[arm][0].output_mask, arms["SPLoRA"][0].output_mask)
    assert not torch.equal(arms["random channels"][0].output_mask, arms["SPLoRA"][0].output_mask)
    assert arms["fine-tuning"][2].weight.shape == (sizes["keep"], sizes["keep"])
    assert arms["fewer channels"][2].weight.shape == (sizes["fewer"], sizes["fewer"])
    assert [name for name, p in arms["biases only"].named_parameters() if p.requires_grad] == [
        "0.layer.bias", "2.layer.bias", "4.layer.bias",
    ]  # fmt: skip
    learned = sum(part.learned for part in arms["SPLoRA"] if isinstance(part, adapters.SPLoRA))
    fewer = sum(p.numel() for p in arms["fewer channels"].parameters())
    assert 0.9 < learned / fewer < 1.1
    x = torch.rand(5, 64)
    torch.testing.assert_close(arms["fine-tuning"](x), arms["biases only"].eval()(x))


def test_no_arm_would_have_liked_a_rate_beyond_the_grid():
    for arm in adapting.ARMS:
        found = chosen(adapting.SEARCH, arm)
        assert min(found.rates) < found.rate < max(found.rates)


def test_the_papers_settings_decide():
    found = {experiment.claim.split("/")[1]: experiment for experiment in experiments_of("continual_inference")}
    assert set(found) == {
        "cox3d-flops", "cost-gcn-flops", "cotransformer-flops", "picture-frame-time", "byte-time", "retroactive-attention-time",
        "splora-accuracy", "splora-parameters",
    }  # fmt: skip
    for name in ("picture-frame-time", "byte-time", "retroactive-attention-time", "cotransformer-flops"):
        assert all(found[name].decides[scale]["window"] == 64 for scale in ("small", "full"))
