"""The experiments of nm_sparse_bdwp notice masks that choose nothing, saved work that is not saved, and wrong axes."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.compression import nm_sparse_bdwp as room
from assay.methods.compression.nm_sparse_bdwp import SAT, Pattern, accelerator, training

SPEED = "nm_sparse_bdwp/training-speedup"
LOSS = "nm_sparse_bdwp/accuracy-loss"
STEP = {"n": 2, "m": 8, "batch": 64, "tokens": 16, "width": 64}
DIGITS = {"task": "digits", "n": 2, "m": 8, "width": 32, "train": 4000, "steps": 250, "seeds": 3}


def untimed(monkeypatch):
    monkeypatch.setattr(room, "measured_step", lambda tokens, width: {})


def test_both_claims_are_tried_at_2_8_as_the_paper_does():
    found = {each.claim: each for each in experiments_of("nm_sparse_bdwp")}
    assert set(found) == {SPEED, LOSS}
    for each in found.values():
        for scale in ("small", "full"):
            assert (each.decides[scale]["n"], each.decides[scale]["m"]) == (each.paper["n"], each.paper["m"]) == (2, 8)


# ---- the speed-up ----------------------------------------------------------------------------------------------------------------


def test_a_model_that_saves_no_multiplications_changes_the_figure(monkeypatch):
    untimed(monkeypatch)
    honest = record_of(SPEED, STEP)
    assert judge(honest).verdict is Verdict.COMPUTED
    assert 1.4 < honest.measured.median <= 2.0
    assert honest.arms["SR-STE"] < 1.34 < honest.measured.median  # one of three products at a quarter: 4/3 at most
    real = accelerator._macs
    monkeypatch.setattr(accelerator, "_macs", lambda product, stage, n, m, sparse: real(product, stage, n, m, False))
    monkeypatch.setattr(room, "counted_macs", lambda n, m: {})
    assert record_of(SPEED, STEP).measured.median < 1.05


def test_work_that_a_mask_only_hides_is_no_figure(monkeypatch):
    untimed(monkeypatch)
    monkeypatch.setattr(training, "compress", lambda matrix, backend: matrix)
    monkeypatch.setattr(training, "multiply", lambda rows, matrix, backend: rows @ matrix.T)
    with pytest.raises(ValueError, match="the model of their cost says"):
        record_of(SPEED, STEP)


def test_a_backward_weight_that_is_not_pruned_is_no_figure(monkeypatch):
    untimed(monkeypatch)
    real = training.masks_of

    def keeping(weight, pattern):
        forward, backward = real(weight, pattern)
        return forward, torch.ones_like(backward)

    monkeypatch.setattr(room, "masks_of", keeping)
    with pytest.raises(ValueError, match="the model of their cost says"):
        record_of(SPEED, STEP)


def test_a_speed_up_above_the_bound_is_a_fault(monkeypatch):
    untimed(monkeypatch)
    real = accelerator._macs

    def free_gradients(product, stage, n, m, sparse):
        return 0 if stage == "weight" and n < m else real(product, stage, n, m, sparse)

    monkeypatch.setattr(room, "counted_macs", lambda n, m: {})
    monkeypatch.setattr(accelerator, "_macs", free_gradients)
    with pytest.raises(ValueError, match="must not exceed the bound of 2x"):
        record_of(SPEED, STEP)


def test_the_networks_have_the_macs_that_are_known_of_them():
    """Per picture, in the forward pass; published figures for ResNet-50 are 4.1e9 at 224 pixels, for VGG-19's convolutions 0.40e9 at 32."""
    macs = {name: sum(product.macs for product in products) for name, products in room.networks(1).items()}
    assert macs["ResNet-50"] == pytest.approx(4.09e9, rel=0.01)
    assert macs["VGG-19"] == pytest.approx(0.398e9, rel=0.01)
    assert macs["ResNet-18"] == pytest.approx(4 * 0.555e9, rel=0.01)  # 0.56e9 at 32 pixels
    weights = sum(p.size for p in room.networks(1)["ResNet-50"])
    assert weights == pytest.approx(25.5e6, rel=0.01)
    weights = sum(p.size for p in room.networks(1)["ViT-S"] if p.weights)
    assert weights == pytest.approx(12 * 12 * 384**2, rel=0.01)


def test_what_the_machine_itself_does_is_a_time_beside_the_model():
    found = room.measured_step(8, 64, seconds=1.0)
    assert set(found["speedup"]) == {"whole", "held masks", "zeros in place of what is pruned", "products"}
    assert all(low <= middle <= high for low, middle, high in found["speedup"].values())
    assert found["bound"] == pytest.approx(2 if found["backend"] == "csr" else 1.5)


def test_the_parts_of_the_accelerator_gain_what_the_arms_say():
    products = room.networks(4)["VGG-19"]  # few pixels and many weights
    best = room.train_step(products, 2, 8).total
    for broken in (SAT(pregenerated=False), SAT(pregenerated=False, scheduled=False)):
        assert room.train_step(products, 2, 8, broken).total > best


# ---- the accuracy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_masks_that_choose_by_chance_are_noticed(monkeypatch):
    """The point that decides, with three seeds: smaller networks in fewer steps lose more than a point, honestly."""
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    known = {}
    train = room.trained

    def once(arm, *settings):  # what the sabotage does not touch is trained once
        if arm in ("bdwp", "sr_ste"):
            return train(arm, *settings)
        if (arm, settings) not in known:
            known[arm, settings] = train(arm, *settings)
        return known[arm, settings]

    monkeypatch.setattr(room, "trained", once)
    monkeypatch.setattr(room, "floor", lambda task, train: (-0.2, "nothing"))  # a broken arm shall be judged, not void
    honest = record_of(LOSS, DIGITS)
    assert judge(honest).verdict in (*PAYS, Verdict.UNDECIDED)
    assert honest.measured.high < honest.controls["random"]
    assert honest.measured.median < honest.controls["deleted"]

    def by_chance(scores, n, m, axis):
        return room.largest(torch.rand(scores.shape), n, m, axis)

    monkeypatch.setattr(training, "largest", by_chance)
    assert verdict_of(LOSS, DIGITS) is Verdict.REFUTED


def test_an_arm_learns_by_magnitude_and_not_by_chance(monkeypatch):
    """The same in small, for one seed: what `slow` shows by its verdict."""
    arms = {arm: room.trained(arm, "digits", 2, 8, 16, 800, 80, 0.1, 0)[0] for arm in ("dense", "bdwp", "random")}
    assert arms["random"] < arms["bdwp"] - 0.05
    assert arms["dense"] > room.floor("digits", 800)[0]


@pytest.mark.parametrize("arm", room.ARMS)
def test_every_arm_trains_on_bytes_too(arm):
    accuracy, nats, model = room.trained(arm, "bytes", 2, 8, 32, 0, 2, 3e-3, 0, choosing=True)
    assert 0 <= accuracy < 1
    assert 0 < nats < 8
    assert not model.training


def test_the_narrow_network_spends_as_much_as_bdwp():
    for task, width in (("digits", 32), ("bytes", 64)):
        macs = {arm: sum(by_stage.values()) for arm, by_stage in room.step_macs(task, 2, 8, width).items()}
        assert macs["bdwp"] < 0.6 * macs["dense"]
        assert macs["narrow"] == pytest.approx(macs["bdwp"], rel=0.05)
        assert macs["bdwp"] == macs["transposable"] == macs["fixed"] == macs["random"] < macs["sr_ste"] < macs["dense"]


def test_drawn_masks_have_the_shape_and_cost_of_the_chosen_ones():
    choose = room.drawn_masks(torch.Generator().manual_seed(0))
    weight = torch.randn(16, 24, 3, 3)
    forward, backward = choose(weight, Pattern(2, 8))
    assert torch.equal(forward.reshape(16, 3, 8, 9).sum(2), torch.full((16, 3, 9), 2))
    assert torch.equal(backward.reshape(2, 8, -1).sum(1), torch.full((2, 24 * 9), 2))
    assert not torch.equal(choose(weight, Pattern(2, 8))[0], forward)


def test_a_rate_is_chosen_on_pictures_that_do_not_judge(monkeypatch):
    labels = torch.zeros(1347, dtype=torch.int64)
    images = torch.cat([torch.full((1000, 1, 8, 8), 1.0), torch.full((347, 1, 8, 8), 2.0)])
    monkeypatch.setattr(room, "digits_split", lambda seed: (images, labels, torch.full((450, 1, 8, 8), 3.0), labels))
    seen = {
        (choosing, heldout): set(room.drawn.__wrapped__(50, 0, choosing, heldout)[0].unique().tolist()) - {0.0}
        for choosing in (True, False)
        for heldout in (True, False)
    }
    assert seen == {(True, False): {1.0}, (True, True): {2.0}, (False, False): {1.0, 2.0}, (False, True): {3.0}}
    ours, theirs = room.questions("bytes", True), room.questions("bytes", False)
    assert len(ours[0][0]) == len(theirs[0][0]) == 128
    assert not set(map(tuple, ours[0][0].tolist())) & set(map(tuple, theirs[0][0].tolist()))


def test_cosines_are_recorded_for_every_pruned_layer():
    model = room.prepared("bdwp", "digits", 2, 8, 8, 0)
    found = room.cosines(model, "digits", 800)
    assert len(found) == 3
    for values in found.values():
        assert set(values) == {"dense", "exact", "chain"}
        assert all(0 < value < 1 for value in values.values())
    assert model.training
