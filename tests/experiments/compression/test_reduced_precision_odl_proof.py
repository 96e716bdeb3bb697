"""The experiments of reduced_precision_odl notice a 16-bit training along wrong gradients, and a chip without SIMD."""

import copy

import pytest
import torch
from tests.properties.sabotage import record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments.compression import reduced_precision_odl as room
from assay.methods.compression.reduced_precision_odl import LayerShape, NumericsPolicy, cost, layers
from assay.methods.compression.reduced_precision_odl.optimiser import ReducedSGD

ACCURACY, STEP = "reduced_precision_odl/training-accuracy", "reduced_precision_odl/training-step"
POINT = {"task": "whole", "samples": 240, "passes": 1, "seeds": 3}


@pytest.fixture
def three_arms(monkeypatch):
    """The arms that the verdict needs, so that the test is short."""
    monkeypatch.setitem(room.ARMS_OF, "whole", (room.WHOLE, room.PAPER, room.RANDOM))


def test_weight_gradients_of_the_wrong_outputs_are_refuted(three_arms, monkeypatch):
    """The weight gradients of a convolution are given to its outputs in reverse: a fault that leaves sizes and types as they are."""
    honest = record_of(ACCURACY, POINT)
    assert judge(honest).verdict is not Verdict.REFUTED
    assert min(honest.controls["deleted"], honest.controls["random"]) > honest.measured.median
    real = layers.weight_gradient
    monkeypatch.setattr(layers, "weight_gradient", lambda given, columns, policy: real(given.flip(2), columns, policy))
    broken = record_of(ACCURACY, POINT)
    assert broken.measured.low > room.training_accuracy.experiment.tolerance > honest.measured.low
    assert judge(broken).verdict is Verdict.REFUTED


def test_the_paper_arm_is_sixteen_bits_throughout():
    policy = room.ARMS[room.PAPER].policy
    assert policy == NumericsPolicy("float16", accumulate="format", update="nearest", loss_scale=1.0)
    assert room.ARMS[room.LAST].policy == room.ARMS[room.RANDOM].policy == policy
    assert room.ARMS[room.WHOLE].policy is None


def test_networks_of_several_seeds_are_those_of_one():
    """Trained side by side in 16 bits, bit for bit as alone: no number of one network reaches another."""
    together = room.ds_cnn((3, 4))
    alone = [room.ds_cnn((seed,)) for seed in (3, 4)]
    policy = NumericsPolicy("bfloat16")
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = torch.tensor([7, 2])

    def trained(model, x, answers):
        layers.emulate(model, policy)
        optimiser = ReducedSGD(model.parameters(), lr=0.1, policy=policy)
        for _ in range(3):
            optimiser.zero_grad()
            logits = model(x).float().view(len(answers), room.CLASSES)
            torch.nn.functional.cross_entropy(logits, answers, reduction="sum").backward()
            optimiser.step()
        return [parameter.detach().unflatten(0, (len(answers), -1)) for parameter in model.parameters()]

    both = trained(together, x, answers)
    for i, model in enumerate(alone):
        own = trained(model, x[:, i : i + 1], answers[i : i + 1])
        for whole, part in zip(both, own, strict=True):
            assert torch.equal(whole[i], part[0])


def test_a_seed_makes_one_network_whatever_stands_beside_it():
    one, three = room.ds_cnn((5,)), room.ds_cnn((1, 5, 9))
    for single, several in zip(one.parameters(), three.parameters(), strict=True):
        assert torch.equal(several.detach().unflatten(0, (3, -1))[1], single.detach())


def test_the_networks_of_the_model_have_the_published_sizes():
    """12.5 and 2.66 million MACs forward, as the MLPerf Tiny suite has them."""
    macs = {name: sum(shape.macs for shape in cost.layer_shapes(*make())) for name, make in room.NETS.items()}
    assert 12.4e6 < macs["resnet8"] < 12.6e6
    assert 2.6e6 < macs["ds-cnn"] < 2.7e6


def test_a_chip_that_multiplies_one_number_at_a_time_gains_nothing(monkeypatch):
    point = {"net": "resnet8"}
    honest = record_of(STEP, point)
    assert judge(honest).verdict is Verdict.COMPUTED
    assert honest.measured.median > 1.3
    real = cost._tile

    def scalar(rows, columns, terms, sixteen, pairs):
        return real(rows, columns, terms, False, False)

    monkeypatch.setattr(cost, "_tile", scalar)
    assert record_of(STEP, point).measured.median == pytest.approx(1.0)


def test_the_gain_is_bounded_by_what_is_copied(monkeypatch):
    """Copies are as dear in 16 bits: without them the gain is larger, with twice as many smaller."""
    honest = record_of(STEP, {"net": "resnet8"}).measured.median
    copied = LayerShape.copied
    monkeypatch.setattr(LayerShape, "copied", lambda shape, step: 10 * copied(shape, step))
    assert record_of(STEP, {"net": "resnet8"}).measured.median < honest - 0.05
    monkeypatch.setattr(LayerShape, "copied", lambda shape, step: 0)
    assert record_of(STEP, {"net": "resnet8"}).measured.median > honest


def test_rates_are_chosen_on_digits_that_no_network_is_judged_on():
    learnt, _, questions, _ = room._split(True)
    whole, _, judged, _ = room._split(False)
    assert torch.equal(torch.cat([questions, learnt]), whole)
    known = {picture.numpy().tobytes() for picture in judged}
    both = sum(picture.numpy().tobytes() in known for picture in questions)
    assert both <= 0.01 * len(questions)  # no more than equal pictures of different people


@pytest.mark.model
def test_the_tail_of_a_language_model_computes_what_the_model_does(smollm2_slice):
    model = copy.deepcopy(smollm2_slice.model)
    text = torch.randint(100, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    tail = room.Tail(model)
    with torch.no_grad():
        wanted = model(text).logits[:, :-1]
        for (given, rest, ids), row, logits in zip(tail.captured(text), text, wanted, strict=True):
            assert torch.equal(ids, row)
            torch.testing.assert_close(tail.logits(tail.mlp, given, rest), logits, rtol=1e-4, atol=1e-3)


@pytest.mark.model
def test_real_weights_stall_in_bfloat16_under_adamw_and_move_with_stochastic_rounding(smollm2_slice):
    tail = room.Tail(copy.deepcopy(smollm2_slice.model))
    text = torch.randint(100, 1000, (1, 12), generator=torch.Generator().manual_seed(0))
    captured = tail.captured(text)
    before = copy.deepcopy(tail.mlp)
    lost = {
        name: room.spoken(tail, name, 1e-5, [captured], captured).stalled
        for name in ("float32, AdamW", "bfloat16, AdamW", "bfloat16, AdamW, stochastic")
    }
    assert lost["float32, AdamW"] < 0.05
    assert lost["bfloat16, AdamW"] > 0.5
    assert lost["float32, AdamW"] < lost["bfloat16, AdamW, stochastic"] < 1
    for now, then in zip(tail.mlp.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)  # the model itself is left as it was
