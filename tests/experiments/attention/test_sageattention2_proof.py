"""SageAttention2's experiments notice when the method is broken, and the paper's own settings decide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.attention import sageattention2 as room
from assay.experiments.attention.xattention import attention_speedup

POINT = {"tokens": 256, "documents": 3}
CLIPS = {"frames": 4, "side": 8, "width": 64, "steps": 3, "updates": 5, "clips": 3}


def unrestored(q, k, v, *, is_causal=False, scale=None, mask=None, variant=None, **_):
    """Smoothing that is never undone: the mean query of a block is taken away, and its logits are not added back."""
    blocks = [part - part.mean(2, keepdim=True) for part in q.split(128, dim=2)]
    return F.scaled_dot_product_attention(
        torch.cat(blocks, 2), k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """What a test trains is not kept for the user's measurements."""
    monkeypatch.setattr("assay.experiments.attention.video.cache_dir", lambda: tmp_path)


def test_the_papers_own_settings_decide():
    found = experiments_of("sageattention2")
    assert {each.claim.split("/")[1] for each in found} == {"kernel-speedup", "xformers-speedup", "cogvideo-time"}
    for each in found:
        assert {"qk", "pv"} <= set(each.departures)
        assert each.paper["granularity"] == "per_thread"
        assert each.paper["smooth_q"]
        for scale in ("small", "full"):
            point = each.decides[scale]
            assert point.get("granularity", "per_thread") == "per_thread"
            assert point.get("smooth_q", True)
    assert (room.OWN.qk, room.OWN.granularity, room.OWN.smooth_k, room.OWN.smooth_q) == (
        "int8",
        "per_thread",
        True,
        True,
    )
    operators = {each.operator for each in found} | {attention_speedup.experiment.operator}
    assert len(operators) == 1  # one pair of baselines for all claims about attention


def test_integers_by_layer():
    """Layers that calibration leaves exact are exact, the others quantised."""
    q, k, v = (torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    attend = room.by_table(["exact", "int8", "int4"])
    dense = room.causal_dense(q, k, v)
    errors = [float((attend(layer, q, k, v) - dense).norm() / dense.norm()) for layer in range(3)]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("claim", ["kernel-speedup", "xformers-speedup"])
def test_smoothing_that_is_not_undone_changes_the_verdict(monkeypatch, claim):
    """Three short documents cannot show a loss within 1 %, but they show that a broken method loses more."""
    honest = record_of(f"sageattention2/{claim}", POINT)
    assert honest.quality.low < honest.quality.baseline < honest.quality.high
    assert honest.quality.controls["deleted"] > 2 * honest.quality.baseline
    assert judge(honest).verdict in (Verdict.UNDECIDED, *PAYS)
    monkeypatch.setattr(room, "sage_attention", unrestored)
    assert verdict_of(f"sageattention2/{claim}", POINT) is Verdict.DOES_NOT_PAY


def test_smoothing_that_is_not_undone_changes_the_verdict_on_cogvideo(monkeypatch):
    honest = verdict_of("sageattention2/cogvideo-time", CLIPS)
    assert honest in PAYS
    monkeypatch.setattr(room, "sage_attention", unrestored)
    assert verdict_of("sageattention2/cogvideo-time", CLIPS) not in PAYS
