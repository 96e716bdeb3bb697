"""The long convolutions' experiments notice broken transforms and kernels that mix nothing, and credit FlashButterfly alone."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.experiments import experiments_of
from assay.experiments.mixers import long_convs as room
from assay.experiments.mixers import long_convs_path as path
from assay.methods.mixers.long_convs import butterfly, convolution

POINT = {"length": 1024, "batch": 1, "dim": 4}
TRAINING = {"side": 32, "batch": 1, "dim": 8, "depth": 1, "lesson": "tiny"}
GIVEN = {
    "long convolution": 0.96,
    "block-sparse": 0.94,
    "no squash": 0.95,
    "short convolution": 0.7,
    "no convolution": 0.25,
}


def test_experiments_load():
    assert {e.claim for e in experiments_of("long_convs")} == {
        "long_convs/convolution-speedup",
        "long_convs/path256-training",
    }


@pytest.mark.parametrize(("length", "backend"), [(1024, "butterfly"), (16384, "three_pass")])
def test_the_candidate_is_flash_butterfly_and_the_blocked_fft_the_exact_baseline(monkeypatch, length, backend):
    used = []
    monkeypatch.setattr(room, "fft_conv", lambda u, *args, backend, fuse=True: used.append((backend, fuse)))
    trial = room.convolution_speedup(length=length, batch=1, dim=2)
    trial.candidate()
    trial.exact()
    assert used == [(backend, True), ("rfft", True)]


@pytest.mark.parametrize("length", [1024, 16384])
def test_random_twiddles_are_noticed(monkeypatch, length):
    honest = verdict_of("long_convs/convolution-speedup", {**POINT, "length": length})
    exact = butterfly.phases

    def at_random(rows, columns, n, dtype, device):
        found = exact(rows, columns, n, dtype, device)
        if rows == columns == n:  # a DFT matrix
            return found
        generator = torch.Generator().manual_seed(rows)
        return torch.polar(torch.ones(found.shape), 6.28 * torch.rand(found.shape, generator=generator)).to(dtype)

    monkeypatch.setattr(butterfly, "phases", at_random)
    monkeypatch.setattr(convolution, "phases", at_random)
    assert honest in PAYS
    assert verdict_of("long_convs/convolution-speedup", {**POINT, "length": length}) is Verdict.DOES_NOT_PAY


def test_training_fast_without_learning_is_noticed(monkeypatch):
    """Both kinds' scores are given; the long convolution's is then really that of a network trained with its kernels at zero."""

    def given(**changes):
        values = {**GIVEN, **changes}
        monkeypatch.setattr(
            room,
            "in_parallel",
            lambda _function, runs: [
                {"accuracy": values[arm], "disturbed": 0.15, "majority": 0.11, "held_out": 450} for arm, *_ in runs
            ],
        )
        return verdict_of("long_convs/path256-training", TRAINING)

    assert given() in PAYS
    with monkeypatch.context() as patch:
        patch.setattr(path.LongKernel, "forward", lambda self, taps=None: 0 * self.kernel[..., :taps])
        alone = path.lesson_at("long convolution", 1e-2, 0, "digits")["accuracy"]
    assert alone < 0.5
    assert given(**{"long convolution": alone}) is Verdict.DOES_NOT_PAY
    assert given(**{"block-sparse": 0.12}) is Verdict.UNDECIDED  # a rival that was not trained


def test_shuffled_taps_are_the_same_taps():
    torch.manual_seed(0)
    model = path.network("long convolution", 16, 10, 8, 1)
    before = model.layers[0].kernel.kernel.detach().clone()
    path.shuffle_taps(model)
    after = model.layers[0].kernel.kernel
    assert torch.equal(before.sort(-1).values, after.sort(-1).values)
    assert not torch.equal(before, after)


def test_the_ablation_and_the_controls_differ_as_their_names_say():
    torch.manual_seed(0)
    taps = path.network("short convolution", 32, 10, 8, 1).layers[0].kernel()
    assert taps.shape[-1] == 32
    assert (taps[..., path.SHORT :] == 0).all()
    assert path.network("no squash", 32, 10, 8, 1).layers[0].kernel.lam == 0
    assert path.network("long convolution", 32, 10, 8, 1).layers[0].kernel.lam == 0.003


def test_every_trained_arm_and_control_is_in_the_record(monkeypatch):
    monkeypatch.setattr(
        room,
        "in_parallel",
        lambda _function, runs: [
            {"accuracy": GIVEN[arm], "disturbed": 0.15, "majority": 0.11, "held_out": 450} for arm, *_ in runs
        ],
    )
    record = record_of("long_convs/path256-training", TRAINING)
    assert set(record.trained) == {"long convolution", "block-sparse"}
    assert record.quality.controls == pytest.approx(
        {"deleted": 0.25, "random": 0.15, "rival": 0.7, "without squash": 0.95}
    )
