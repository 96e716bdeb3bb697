"""XAttention's experiments notice when the method is broken, and their parts compute what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.properties.sabotage import record_of, verdict_of

import assay.methods.attention.xattention as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.attention import prefill
from assay.experiments.attention import xattention as room
from assay.experiments.attention.prefill import against, causal_dense, losses, mean_of_values, rise
from assay.methods.attention.xattention import xattention_plan

POINT = {"tokens": 256, "documents": 3, "tau": 0.95, "stride": 4, "block": 16}


def random_selection(scores, **options):
    """As many blocks of each row as the method selects, anywhere below the diagonal."""
    kept = SELECT(scores, **options)
    blocks = scores.shape[-1]
    above = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)[-scores.shape[2] :]
    rank = torch.rand(scores.shape).masked_fill(above, 2.0).argsort(-1).argsort(-1)
    return (rank < kept.sum(-1, keepdim=True)) & ~above


SELECT = method.select


def qkv(heads=4, key_heads=2, tokens=96, dim=16):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, n, tokens, dim, generator=generator) * 2 for n in (heads, key_heads, key_heads))


# ---------------------------------------------------------------------------------------------------------- declarations


def test_the_papers_own_settings_decide():
    found = experiments_of("xattention")
    assert {each.claim for each in found} == {"xattention/attention-speedup", "xattention/perplexity"}
    for each in found:
        for scale in ("small", "full"):
            assert (each.decides[scale]["tau"], each.decides[scale]["block"]) == (0.9, 128)
        assert set(each.departures) == {"tokens"}
    assert len({each.operator for each in found}) == 1


def test_both_baselines_are_run(monkeypatch):
    monkeypatch.setattr(room, "captured_layers", lambda *_: [tuple(x.bfloat16() for x in qkv())])
    trial = room.attention_speedup(96, 2, 0.9, 4, 16)
    dense = trial.exact()[0].float()
    torch.testing.assert_close(trial.baseline()[0].float(), dense, atol=0.03, rtol=0.03)
    assert trial.free is None  # the paper's baseline, torch's SDPA, is the free one
    assert not torch.equal(trial.candidate()[0].float(), dense)
    assert set(trial.arms) == {room.RIVAL}
    assert trial.arms[room.RIVAL]()[0].shape == dense.shape


# -------------------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("other", [room.random_blocks, room.nearest_blocks])
def test_controls_have_the_methods_budget(other):
    q, k, _ = qkv()
    plan = xattention_plan(q, k, tau=0.6, stride=4, block=16)
    found = other(plan)
    assert torch.equal(found.mask.sum(-1), plan.mask.sum(-1))
    assert found.density() == plan.density()
    assert not torch.equal(found.mask, plan.mask)
    assert found.mask[..., 0].all()
    assert found.mask.diagonal(dim1=-2, dim2=-1).all()
    assert not (found.mask & torch.ones(6, 6, dtype=torch.bool).triu(1)).any()


def test_the_nearest_blocks_are_the_nearest():
    q, k, _ = qkv()
    mask = room.nearest_blocks(xattention_plan(q, k, tau=0.6, stride=4, block=16)).mask
    for row in mask[0].flatten(0, 1):
        recent = row[1:].nonzero().flatten() + 1
        assert (recent.diff() == 1).all()


def test_attention_deleted_is_the_mean_of_what_was_seen():
    q, k, v = qkv()
    found = mean_of_values(q, k, v)
    assert found.shape == q.shape
    torch.testing.assert_close(found[0, 3, 40], v[0, 1, :41].mean(0))


# ------------------------------------------------------------------------------------------------------------ perplexity


def test_losses_are_those_of_the_last_quarter(smollm2_slice):
    model = copy.deepcopy(smollm2_slice.model)
    ids = torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    found = losses(model, ids, lambda layer, q, k, v: causal_dense(q, k, v))
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    for row, loss in enumerate(found):
        expected = -logits[row, 29:39].gather(1, ids[row, 30:, None]).mean()
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_interval_is_over_documents():
    """Student's t over the differences of the documents."""
    exact = [2.0, 3.0, 2.5]
    found = rise([2.01, 3.03, 2.52], exact)
    assert found.low < found.value < found.high
    # mean 0.02, standard deviation 0.01, t = 4.303 for two degrees of freedom
    half = 4.303 * 0.01 / 3**0.5
    assert found.high == pytest.approx(100 * (2.718281828 ** (0.02 + half) - 1), rel=1e-3)
    assert found.each == pytest.approx((1.005, 3.045, 2.02), rel=1e-3)
    with pytest.raises(ValueError, match="two documents or more"):
        rise([2.0], [2.0])


def test_an_arm_of_fewer_documents_is_compared_on_those():
    """The first two documents are easy: a rival that is worse on both must not look better than the method on all four."""
    found = against({"method": [1.1, 1.1, 1.4, 1.4], "rival": [1.2, 1.2]}, [1.0] * 4)
    assert found["rival"].value > found["method"].value > rise([1.2, 1.2], [1.0, 1.0]).value
    assert found["rival"].each == pytest.approx((22.14, 22.14))
    assert against({"method": [1.1, 1.4]}, [1.0, 1.0])["method"] == rise([1.1, 1.4], [1.0, 1.0])


def test_the_second_model_is_off_the_grid(monkeypatch, smollm2_slice):
    monkeypatch.setattr(prefill, "model_and_documents", lambda *_: (smollm2_slice.model, None))
    prefill.off_the_grid.cache_clear()
    own = dict(smollm2_slice.model.named_parameters())
    for name, parameter in prefill.off_the_grid(1, 2).named_parameters():
        if parameter.ndim == 2:
            share = (parameter - own[name]).std() / own[name].std()
            assert 0.8 * prefill.NOISE < share < 1.2 * prefill.NOISE
        else:
            assert torch.equal(parameter, own[name])
    prefill.off_the_grid.cache_clear()


# -------------------------------------------------------------------------------------------------------------- sabotage


@pytest.mark.model
@pytest.mark.slow
def test_random_blocks_change_the_verdict_on_the_speed(monkeypatch):
    """Three short documents cannot show a loss within 1 %, but they show that random blocks lose more."""
    honest = record_of("xattention/attention-speedup", POINT)
    assert judge(honest).verdict is Verdict.UNDECIDED
    assert honest.quality.low < honest.quality.baseline < honest.quality.high
    monkeypatch.setattr(method, "select", random_selection)
    assert verdict_of("xattention/attention-speedup", POINT) in (Verdict.DOES_NOT_PAY, Verdict.QUALITY_NOT_SHOWN)


@pytest.mark.model
@pytest.mark.slow
def test_random_blocks_change_the_verdict_on_perplexity(monkeypatch):
    assert verdict_of("xattention/perplexity", POINT) is Verdict.UNDECIDED
    monkeypatch.setattr(method, "select", random_selection)
    assert verdict_of("xattention/perplexity", POINT) is Verdict.REFUTED
