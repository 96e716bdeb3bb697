"""How good a language model is on real text, and how far a changed model strays from the one it was made from.

Everything is computed in float32 log-probabilities, a few positions at a time, so that a large vocabulary does not fill the
memory; means are taken in float64. Models are callables that map int64 (1, n) to an object with `.logits` (1, n, vocab), as
transformers' causal models do, or to such a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from assay import checks

_POSITIONS = 128  # positions whose log-probabilities are held at a time: 25 MB for 49,152 tokens


@dataclass(frozen=True)
class Agreement:
    """How a candidate follows its reference, one figure a window, each float64 (n,).

    `kl` is the mean KL(reference || candidate) in nats per position, `top1` the share of positions whose most likely token is the
    same; `reference` and `candidate` are their mean negative log-likelihoods in nats per token.
    """

    kl: torch.Tensor
    top1: torch.Tensor
    reference: torch.Tensor
    candidate: torch.Tensor


@dataclass(frozen=True)
class Increase:
    """What a candidate costs in perplexity: `differences` in nats per token, one a window, candidate minus baseline."""

    differences: torch.Tensor

    @property
    def relative(self) -> float:
        """Perplexity ratio minus 1: 0.01 means 1 % worse. Negative when the candidate is better."""
        return float(perplexity_increase(self.differences.numpy(), axis=0))


def token_nll(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token after the first of its window, in nats: float32, shape (n, length - 1).

    `windows` is int64 (n, length >= 2); the first token of a window is only context. Raises ValueError for other shapes and
    negative ids, TypeError for another dtype.

    >>> even = nn.Embedding.from_pretrained(torch.zeros(50, 4))  # a model that finds four tokens equally likely
    >>> token_nll(even, torch.tensor([[0, 1, 2]]))
    tensor([[1.3863, 1.3863]])
    """
    _check(windows)
    result = torch.empty(windows.shape[0], windows.shape[1] - 1)
    with _evaluating(model):
        for row, window in zip(result, windows, strict=True):
            logits = _logits(model, window)
            for begin in range(0, len(row), _POSITIONS):
                targets = window[begin + 1 : begin + 1 + _POSITIONS].to(logits.device)
                scores = logits[begin : begin + len(targets)].float()
                row[begin : begin + len(targets)] = nn.functional.cross_entropy(scores, targets, reduction="none")
    return result


def window_nll(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window, in nats per token: float64, shape (n,). See `token_nll`."""
    return token_nll(model, windows).double().mean(1)


def agreement(reference: nn.Module, candidate: nn.Module, windows: torch.Tensor) -> Agreement:
    """How closely `candidate` follows `reference` on each window, over all its positions, and how likely each finds the text.

    Both models run over one window after the other, so that the logits of one window each are all that is kept.
    Raises ValueError and TypeError for windows as `token_nll`, ValueError for models of different vocabularies.
    """
    _check(windows)
    found = []
    with _evaluating(reference), _evaluating(candidate):
        for window in windows:
            expected, given = _logits(reference, window), _logits(candidate, window)
            if expected.shape != given.shape:
                raise ValueError(
                    f"reference and candidate must give logits of one shape, got {tuple(expected.shape)} and {tuple(given.shape)}"
                )
            sums = torch.zeros(4, dtype=torch.float64)
            for begin in range(0, len(window), _POSITIONS):
                p = expected[begin : begin + _POSITIONS]
                targets = window[begin + 1 : begin + 1 + _POSITIONS]
                sums += torch.stack([part.sum().cpu() for part in compared(p, given[begin : begin + len(p)], targets)])
            found.append(sums / torch.tensor([len(window), len(window), len(window) - 1, len(window) - 1]))
    kl, top1, before, after = torch.stack(found).unbind(1)
    return Agreement(kl, top1, before, after)


def compared(
    expected: torch.Tensor, given: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits (n, vocab) that should be alike, by position: KL(expected || given) in nats, whether the most likely token is the
    same, and both negative log-likelihoods of `targets`, which may be fewer than n (the first ones); each float64."""
    p = expected.float()
    q = given.float().to(p.device)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    wanted = targets.to(p.device)[:, None]
    before, after = (-x[: len(targets)].gather(1, wanted)[:, 0].double() for x in (p, q))
    return _kl(p, q).double(), same, before, after


def relative_increase(nll_base: torch.Tensor, nll_candidate: torch.Tensor) -> Increase:
    """Pair the windows of two `window_nll` results.

    For an interval, bootstrap `differences` with `perplexity_increase` as the statistic. A NaN stays NaN, so a broken model shows.
    Raises ValueError when the two do not pair up, TypeError for anything but a floating-point tensor.

    >>> round(relative_increase(torch.tensor([2.0, 3.0]), torch.tensor([2.01, 3.01])).relative, 4)
    0.0101
    """
    for name, nll in (("nll_base", nll_base), ("nll_candidate", nll_candidate)):
        checks.tensor(name, nll, empty=True)
    if nll_base.ndim != 1 or nll_base.shape != nll_candidate.shape or not len(nll_base):
        raise ValueError(
            f"nll_base and nll_candidate must be (n,) alike, got {tuple(nll_base.shape)} and {tuple(nll_candidate.shape)}"
        )
    return Increase(nll_candidate.double() - nll_base.double())


def perplexity_increase(differences: np.ndarray, axis: int = 0) -> Any:
    """exp(mean of `differences` over `axis`) - 1: a statistic for the bootstrap."""
    return np.expm1(np.mean(differences, axis=axis))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of log-probabilities over the last dimension; a token that p rules out adds nothing."""
    mass = p.exp()
    return torch.where(mass > 0, mass * (p - q), 0.0).sum(-1).clamp_min(0)


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    device = next((parameter.device for parameter in model.parameters()), window.device)
    output: Any = model(window[None].to(device))
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits[0]


def _check(windows: torch.Tensor) -> None:
    checks.tensor("windows", windows, ndim=2, dtype=torch.int64)
    if windows.shape[1] < 2:
        raise ValueError(f"windows must have shape (n, length >= 2), got {tuple(windows.shape)}")
    if int(windows.min()) < 0:  # -100 would count as a token that costs nothing
        raise ValueError(f"windows must hold token ids of at least 0, got {int(windows.min())}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
