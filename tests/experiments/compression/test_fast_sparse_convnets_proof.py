"""The experiments of fast_sparse_convnets notice a kernel that computes something else, and a choice of weights that is none."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.record import changed
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.compression import fast_sparse_convnets as room
from assay.experiments.compression import fast_sparse_convnets_training as training
from assay.experiments.rates import Rate
from assay.methods.core.sparsity.projections import per_layer

LAYER = {"inputs": 32, "outputs": 24, "side": 6}
NETWORK = {
    "sparsity": 0.9,
    "width": 0.5,
    "narrow": 0.25,
    "train": 128,
    "epochs": 8,
    "seeds": 3,
    "batch": 4,
    "compiled": False,
}


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    monkeypatch.setattr(room, "RUN_MACS", 1.0)


def test_the_settings_that_decide_are_those_declared():
    found = {each.claim.split("/")[1]: each for each in experiments_of("fast_sparse_convnets")}
    assert set(found) == {"break-even", "ideal-share", "speedup"}
    for name, sparsity in (("break-even", 0.7), ("ideal-share", 0.9)):
        assert found[name].decides["small"] == {"inputs": 512, "outputs": 512, "side": 14, "sparsity": sparsity}
        assert found[name].decides["full"] == found[name].decides["small"]
    assert found["speedup"].decides["small"]["sparsity"] == found["speedup"].paper["sparsity"] == 0.9
    assert len({id(each.operator) for each in found.values()}) == 1


@pytest.mark.parametrize(("claim", "sparsity"), [("break-even", 0.7), ("ideal-share", 0.9)])
def test_a_product_with_the_neighbours_channels_is_noticed(monkeypatch, claim, sparsity):
    claim, point = f"fast_sparse_convnets/{claim}", LAYER | {"sparsity": sparsity}
    honest = record_of(claim, point)
    assert judge(honest).verdict is Verdict.REPRODUCED
    assert honest.quality.candidate < 1e-5 < min(honest.quality.controls[name] for name in ("deleted", "random"))
    real = room.sparse_product
    monkeypatch.setattr(room, "sparse_product", lambda x, *rest, **named: real(x.roll(1, 1), *rest, **named))
    assert verdict_of(claim, point) is Verdict.DOES_NOT_PAY


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        ("break-even", 1.01, 1.2, Verdict.REPRODUCED),
        ("break-even", 0.9, 1.1, Verdict.UNDECIDED),
        ("break-even", 0.8, 0.99, Verdict.REFUTED),
        ("ideal-share", 5.1, 6.0, Verdict.REPRODUCED),
        ("ideal-share", 4.5, 5.5, Verdict.UNDECIDED),
        ("ideal-share", 3.0, 4.9, Verdict.REFUTED),
    ],
)
def test_nothing_is_added_to_what_was_promised(claim, low, high, verdict):
    record = record_of(f"fast_sparse_convnets/{claim}", LAYER | {"sparsity": 0.9})
    seen = {"median": (low + high) / 2, "low": low, "high": high}
    assert judge(changed(record, measured=seen)).verdict is verdict


def test_a_rival_that_is_certainly_faster_refutes():
    ratios = {arm: {"high": 2.0} for arm in ("baseline", "free", room.CSR, room.BF16, room.INT8)}
    found = {each.claim.split("/")[1]: each.refutes for each in experiments_of("fast_sparse_convnets")}
    for claim, rivals in (("break-even", (room.CSR, "baseline")), ("ideal-share", ("free",))):
        assert not found[claim]({"ratios": ratios})
        for rival in rivals:
            assert found[claim]({"ratios": ratios | {rival: {"high": 0.99}}})


def test_a_dense_network_that_is_faster_and_as_accurate_refutes():
    def record(high, rival):
        return {"ratios": {room.RIVAL: {"high": high}}, "quality": {"candidate": 0.8, "controls": {"rival": rival}}}

    assert room.rival_wins(record(0.99, 0.8))
    assert not room.rival_wins(record(1.01, 0.9))
    assert not room.rival_wins(record(0.5, 0.79))
    found = {each.claim: each.refutes for each in experiments_of("fast_sparse_convnets")}
    assert found["fast_sparse_convnets/speedup"] is room.rival_wins


def test_torchs_ways_compute_the_layer():
    """A baseline or a rival that computed something else would be none; and blocks are pruned as much as single weights."""
    weight, x = room.pruned(24, 32, 0.7), room.features(32, 6)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(2))
    expected = (weight @ x[0].flatten(1) + bias[:, None]).view(1, 24, 6, 6)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        for name, way in room.dense_ways(x.to(dtype), weight.to(dtype), bias.to(dtype)).items():
            with torch.no_grad():
                y = way()
            y = (y.to_dense() if y.is_mkldnn else y).float().reshape(expected.shape)
            assert float((y - expected).abs().max() / expected.abs().max()) < tolerance, name
    found = room.pack(weight).csr() @ x[0].flatten(1) + bias[:, None]
    torch.testing.assert_close(found.view_as(expected), expected, atol=1e-4, rtol=1e-4)
    for size in (1, 2, 4):
        share = (room.pruned(24, 32, 0.7, size) == 0).float().mean()
        assert share == pytest.approx(0.7, abs=0.02)


def test_the_networks_that_are_timed_compute_what_the_trained_one_does():
    torch.manual_seed(0)
    trainer = training.Trainer(0.5, 0.25, 0.9, 1, training.split(64, "heldout"))
    model = trainer.run("random places", 1e-2, 0)
    x = training.split(64, "heldout")[2][:5]
    sparse, shares = training.sparse_network(model)
    assert list(shares) == model.pointwise()
    assert all(share == pytest.approx(0.9, abs=0.02) for share in shares.values())
    with torch.no_grad():
        others = (training.torchs_depthwise(model), training.our_depthwise(model), training.csr_network(model))
        for other in (training.folded(model), sparse, *others):
            torch.testing.assert_close(other(x), model(x), atol=1e-3, rtol=1e-3)


def test_tiles_of_two_parts_share_no_cell():
    for part in training.PARTS:
        for other in set(training.PARTS) - {part}:
            assert not set(training.PARTS[part]) & set(training.PARTS[other])
    x, labels = training.tiles(40, "train", 0)
    assert x.shape == (40, 1, 32, 32)
    assert float(x.mean((2, 3)).abs().max()) < 1e-4
    assert int(labels.max()) < len(training.pictures())
    assert not torch.equal(training.tiles(40, "heldout", 0)[0], x)


def test_the_rival_has_at_least_as_many_multiply_adds():
    trainer = training.Trainer(1.0, 0.5, 0.9, 1, training.split(64, "heldout"))
    macs = {
        width: training.mobilenet_macs(32, width=width, **trainer.shape)
        for width in (trainer.equal, trainer.equal - 0.01)
    }
    wanted = training.mobilenet_macs(32, width=1.0, density=0.1, **trainer.shape)
    assert macs[trainer.equal - 0.01] < wanted <= macs[trainer.equal]


# ---- the choice of weights -------------------------------------------------------------------------------------------------------


class Random(training.GradualPruner):
    """As many weights at the same steps, in random places."""

    def _renew(self):
        generator = torch.Generator().manual_seed(self.step)
        density = round(1 - self.schedule.sparsity(self.step), 12)
        for name, mask in self.masks.items():
            scores = torch.rand(mask.shape, generator=generator) + mask  # what is gone stays gone
            self.masks[name] = per_layer({name: scores}, density)[name]


def imitated(self, arm, rate, seed):
    """A training that moves nothing, but prunes for real, and is worth what of the magnitudes it leaves."""
    model = self.model(arm, seed)
    weights = [model.get_submodule(name).weight for name in model.pointwise()]
    before = sum(float(weight.detach().abs().sum()) for weight in weights)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    self.prune(arm, model, optimizer, seed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(self.steps):
        optimizer.step()
    left = sum(float(weight.detach().abs().sum()) for weight in weights) / before
    model.worth = {"dense": 0.57, "as many multiply-adds": 0.55}.get(arm, 0.5 + 0.4 * left) + 0.001 * seed
    return model.eval()


def test_weights_left_at_random_are_noticed(monkeypatch):
    """A tenth of evenly spread weights holds 19 % of the magnitude when it is the largest, 10 % when it is any."""
    monkeypatch.setattr(training.Trainer, "run", imitated)
    monkeypatch.setattr(training.Trainer, "accuracy", lambda self, model: model.worth)
    monkeypatch.setattr(room, "chosen", lambda name, arm: Rate(0.01, (0.003, 0.01)))
    honest = record_of("fast_sparse_convnets/speedup", NETWORK)
    assert judge(honest).verdict in PAYS
    assert honest.quality.candidate == pytest.approx(0.577, abs=0.005)
    assert honest.quality.controls["random"] == pytest.approx(0.541, abs=0.005)
    assert honest.quality.controls["deleted"] == pytest.approx(0.541, abs=0.005)
    monkeypatch.setattr(training, "GradualPruner", Random)
    assert verdict_of("fast_sparse_convnets/speedup", NETWORK) is Verdict.DOES_NOT_PAY


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["pruned", training.RIVAL])
def test_training_beats_the_floor(arm):
    """By more than the tenth of the way to perfection below which a comparison is void."""
    trainer = training.Trainer(1.0, 0.5, 0.9, 3, training.split(1024, "heldout"))
    least = training.floor(trainer.data)
    assert trainer.accuracy(trainer.run(arm, 3e-2, 0)) > least + 0.1 * (1 - least)
