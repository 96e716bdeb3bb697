"""The experiments of convfirst notice a fused block that computes something else, and a bound that is no bound."""

import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tiny import calibration

import assay.methods.vision.convfirst as method
from assay.evidence.types import Verdict

POINT = {"channels": 16, "size": 32, "batch": 2}


def test_tiles_that_lose_their_halo_are_noticed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    claim = "convfirst/block-fusion-speedup"
    assert verdict_of(claim, POINT) in PAYS
    real = method.fuse_blocks

    def broken(block):
        fused = real(block)

        class Shifted(torch.nn.Module):
            tile = fused.tile

            def forward(self, x):
                out = fused(x)
                return torch.cat(
                    [out[..., 8:, :], out[..., :8, :]], -2
                )  # the tiles of one row in the place of another's

        return Shifted()

    monkeypatch.setattr(method, "fuse_blocks", broken)
    assert verdict_of(claim, POINT) is Verdict.DOES_NOT_PAY


def test_a_bound_of_a_slower_machine_is_refuted(monkeypatch):
    claim, point = "convfirst/roofline-lower-bound", {"net": "convfirst", "size": 32}

    def install(rate):
        rates = {
            "peak_flops": {"float32": rate}, "read_bandwidth": rate, "copy_bandwidth": rate, "cache_bandwidth": {1: rate},
        }  # fmt: skip
        limits = calibration(**rates, threads=1)
        monkeypatch.setattr("assay.measure.profile.calibrate", lambda **_: limits)

    install(1e30)
    assert verdict_of(claim, point) is Verdict.REPRODUCED
    install(1.0)
    assert verdict_of(claim, point) is Verdict.REFUTED
    assert record_of(claim, point).measured.median == 1.0
