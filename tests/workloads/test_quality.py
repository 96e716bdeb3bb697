from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from assay.workloads.quality import agreement, perplexity_increase, relative_increase, window_nll
from assay.workloads.text import heldout_windows


@pytest.fixture(scope="module")
def windows(tokenizer):
    return heldout_windows(tokenizer, window=300, n=3)


@pytest.fixture(scope="module")
def changed(tiny):
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


class Table(nn.Module):
    """Logits by position, the same for every input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, ids):
        return self.logits[None, : ids.shape[1]]


def test_nll_is_the_models_own_loss(tiny, windows):
    with torch.no_grad():
        expected = [float(tiny.model(row[None], labels=row[None]).loss) for row in windows]
    nll = window_nll(tiny.model, windows)
    assert nll.dtype == torch.float64
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_nll_of_a_uniform_model_is_the_log_of_the_vocabulary():
    nll = window_nll(Table(torch.zeros(400, 50)), torch.randint(50, (2, 400)))
    np.testing.assert_allclose(nll, math.log(50), rtol=1e-6)


def test_agreement_with_itself_is_perfect(tiny, windows):
    same = agreement(tiny.model, tiny.model, windows)
    assert torch.equal(same.top1, torch.ones(3, dtype=torch.float64))
    assert float(same.kl.max()) < 1e-9


def test_agreement_is_kl_and_top1_by_the_definition(tiny, changed, windows):
    result = agreement(tiny.model, changed, windows)
    for i, row in enumerate(windows):
        with torch.no_grad():
            p = tiny.model(row[None]).logits[0].double().log_softmax(-1)
            q = changed(row[None]).logits[0].double().log_softmax(-1)
        assert float(result.kl[i]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        assert float(result.top1[i]) == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (result.kl > 0).all()
    assert (result.top1 < 1).all()


def test_agreement_also_says_how_likely_each_model_finds_the_text(tiny, changed, windows):
    result = agreement(tiny.model, changed, windows)
    torch.testing.assert_close(result.reference, window_nll(tiny.model, windows), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.candidate, window_nll(changed, windows), rtol=1e-6, atol=1e-6)
    assert (result.reference != result.candidate).all()


def test_kl_is_from_the_reference_to_the_candidate():
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    windows = torch.zeros(1, 4, dtype=torch.int64)
    forth = agreement(Table(p.log().expand(4, 2)), Table(q.log().expand(4, 2)), windows)
    back = agreement(Table(q.log().expand(4, 2)), Table(p.log().expand(4, 2)), windows)
    assert float(forth.kl) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert float(back.kl) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-5)


def test_a_token_the_reference_rules_out_adds_nothing_and_one_the_candidate_rules_out_is_infinite():
    ruled_out = torch.tensor([0.0, 0.0, -math.inf]).expand(4, 3)
    even = torch.zeros(4, 3)
    windows = torch.zeros(1, 4, dtype=torch.int64)
    assert float(agreement(Table(ruled_out), Table(even), windows).kl) == pytest.approx(math.log(1.5), rel=1e-5)
    assert float(agreement(Table(even), Table(ruled_out), windows).kl) == math.inf


def test_a_broken_candidate_shows_as_nan(tiny, windows):
    broken = Table(torch.full((300, tiny.model.config.vocab_size), math.nan))
    assert torch.isnan(agreement(tiny.model, broken, windows).kl).all()
    assert torch.isnan(window_nll(broken, windows)).all()


def test_bfloat16_models_are_judged_in_float32(tiny, windows):
    rounded = copy.deepcopy(tiny.model).bfloat16()
    assert float(agreement(tiny.model, rounded, windows).kl.max()) < 1e-3
    np.testing.assert_allclose(window_nll(rounded, windows), window_nll(tiny.model, windows), atol=0.01)


def test_modes_and_gradients_are_left_as_they_were(tiny, windows):
    model = copy.deepcopy(tiny.model).train()
    model.model.layers[0].eval()
    window_nll(model, windows[:1])
    agreement(model, tiny.model, windows[:1])
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert torch.is_grad_enabled()


def test_no_chunk_is_larger_than_it_should_be(monkeypatch):
    seen = []
    original = torch.Tensor.log_softmax

    def watch(self, *args, **kwargs):
        seen.append(self.shape[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", watch)
    model = Table(torch.randn(1000, 30))
    agreement(model, model, torch.zeros(1, 1000, dtype=torch.int64))
    assert max(seen) <= 128
    assert sum(seen) == 2000


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 8),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.tensor([[5, -100]]),
        torch.zeros(2, 8, dtype=torch.int32),
        [[1, 2]],
    ],
)
def test_windows_of_a_wrong_shape(tiny, bad):
    wrong = TypeError if not isinstance(bad, torch.Tensor) or bad.dtype != torch.int64 else ValueError
    with pytest.raises(wrong, match="windows must"):
        window_nll(tiny.model, bad)
    with pytest.raises(wrong, match="windows must"):
        agreement(tiny.model, tiny.model, bad)


def test_models_of_different_vocabularies(windows):
    with pytest.raises(ValueError, match=r"one shape, got \(300, 5\) and \(300, 6\)"):
        agreement(Table(torch.zeros(300, 5)), Table(torch.zeros(300, 6)), windows)


def test_relative_increase_is_the_perplexity_ratio_minus_one():
    base, candidate = torch.tensor([2.0, 3.0]), torch.tensor([2.02, 3.04])
    increase = relative_increase(base, candidate)
    assert increase.relative == pytest.approx(math.exp(2.53) / math.exp(2.5) - 1, rel=1e-5)
    np.testing.assert_allclose(increase.differences, [0.02, 0.04], rtol=1e-4)
    assert relative_increase(base, base).relative == 0


def test_the_statistic_fits_the_bootstrap():
    from assay.measure.stats import bootstrap

    increase = relative_increase(torch.zeros(20), torch.linspace(0, 0.02, 20))
    interval = bootstrap(increase.differences.numpy(), perplexity_increase)
    assert interval.median == pytest.approx(increase.relative)
    assert 0 < interval.low < increase.relative < interval.high < 0.03


@pytest.mark.parametrize(("base", "candidate"), [(torch.zeros(2), torch.zeros(3)), (torch.zeros(0), torch.zeros(0))])
def test_relative_increase_of_what_does_not_pair_up(base, candidate):
    with pytest.raises(ValueError, match="alike"):
        relative_increase(base, candidate)


@pytest.mark.parametrize("bad", [[1.0], torch.zeros(2, dtype=torch.int64), None])
def test_relative_increase_of_no_likelihoods(bad):
    with pytest.raises(TypeError, match="nll_candidate must"):
        relative_increase(torch.zeros(2), bad)
    assert math.isnan(relative_increase(torch.zeros(2), torch.tensor([1.0, math.nan])).relative)


@pytest.mark.model
def test_smollm2_understands_the_heldout_text(smollm2):
    nll = window_nll(smollm2.model, heldout_windows(smollm2.tokenizer, window=256, n=2))
    assert (nll < 4).all()  # an untrained model has log(49152) = 10.8
