"""Broken on purpose, the MatMul-free experiments must change their verdicts; and a bandwidth that is exceeded gives no shares."""

from __future__ import annotations

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.mixers import matmul_free as room
from assay.methods.core.layers.packed import PackedLinear
from assay.methods.mixers import matmul_free as method

GENERATING = {"width": 64, "layers": 1, "vocab": 256, "tokens": 1, "size": 64, "repeats": 2}
TRAINING = {"width": 64, "layers": 1, "batch": 2, "length": 64, "repeats": 2}


@pytest.fixture(autouse=True)
def _memory_without_processes(monkeypatch):
    """Bytes of files and of graphs in place of a child's peak: what is broken here are the layers, not the meter."""
    monkeypatch.setattr(room, "peak_of_generation", lambda kind, path, tokens: room.size_of(path))
    monkeypatch.setattr(room, "peak_of_training", room.remembered_bytes)


def test_experiments_load():
    assert {e.claim for e in experiments_of("matmul_free")} == {
        "matmul_free/training-memory",
        "matmul_free/inference-memory",
    }


def test_packed_weights_in_a_random_order_are_noticed(monkeypatch):
    honest = verdict_of("matmul_free/inference-memory", GENERATING)
    made = PackedLinear.from_codes.__func__

    def shuffled(cls, codes, *args, **kwargs):
        return made(cls, codes.flatten()[torch.randperm(codes.numel())].view_as(codes), *args, **kwargs)

    monkeypatch.setattr(PackedLinear, "from_codes", classmethod(shuffled))
    assert honest in PAYS
    assert verdict_of("matmul_free/inference-memory", GENERATING) is Verdict.DOES_NOT_PAY


def test_weights_that_are_not_packed_are_noticed(monkeypatch):
    """The mechanism deleted: the file that should be packed holds the model in bfloat16."""
    monkeypatch.setattr(
        room, "peak_of_generation", lambda kind, path, tokens: room.size_of(path.parent / "bf16") + (kind == "int8")
    )
    assert verdict_of("matmul_free/inference-memory", GENERATING) not in PAYS


def test_a_fused_layer_that_remembers_everything_is_noticed(monkeypatch):
    honest = record_of("matmul_free/training-memory", TRAINING)
    assert judge(honest).verdict is Verdict.DOES_NOT_PAY  # it saves, but no more than recomputing the chain
    assert honest.measured.low > 20
    monkeypatch.setattr(
        method._BitProduct, "apply", lambda x, norm, weight: method.bit_linear_reference(x, norm, weight)
    )
    broken = record_of("matmul_free/training-memory", TRAINING)
    assert broken.measured.high < 5


def test_a_wrong_gradient_is_noticed(monkeypatch):
    """Against a free baseline that saves nothing, so that only the gradient stands in the way."""
    monkeypatch.setattr(
        room,
        "peak_of_training",
        lambda way, *sizes: room.remembered_bytes("fused" if way == "fused" else "chain", *sizes),
    )
    honest = verdict_of("matmul_free/training-memory", TRAINING)
    backward = method._BitProduct.backward

    def wrong(ctx, *grads):
        dx, dnorm, dweight = backward(ctx, *grads)
        return dx, dnorm, dweight.flatten()[torch.randperm(dweight.numel())].view_as(dweight)

    monkeypatch.setattr(method._BitProduct, "backward", staticmethod(wrong))
    assert honest in PAYS
    assert verdict_of("matmul_free/training-memory", TRAINING) is Verdict.DOES_NOT_PAY


def test_an_exceeded_bandwidth_voids_all_shares():
    seconds, moved = {"fp32": 1.0, "ternary": 1.0}, {"fp32": 121, "ternary": 60}
    assert "fp32" in room.bandwidth_shares(seconds, moved, 100.0)
    assert room.bandwidth_shares(seconds, moved, 121.0) == {"fp32": 1.0, "ternary": 60 / 121}
    assert "void" in room.bandwidth_shares({"fp32": float("nan")}, {"fp32": 1}, 1.0)


def test_the_widened_model_is_the_model(tmp_path):
    torch.manual_seed(0)
    model = room.ternary_model("fused", 64, 1).eval()
    room.save_widened(model, tmp_path / "int8")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        exact, found = model(ids).logits, room.load_widened(tmp_path / "int8")(ids).logits.float()
    assert float((found - exact).norm() / exact.norm()) < 0.1  # its embedding is in bfloat16


@pytest.mark.parametrize("way", ["fused", "blocks recomputed", "layers recomputed"])
def test_every_way_of_saving_memory_has_the_chains_gradient(way):
    chain, found = room.gradient("chain", 32, 2, 0), room.gradient(way, 32, 2, 0)
    assert float((found - chain).norm() / chain.norm()) < (0.05 if way == "fused" else 1e-6)
    assert room.remembered_bytes(way, 32, 2, 2, 32) < 0.7 * room.remembered_bytes("chain", 32, 2, 2, 32)
