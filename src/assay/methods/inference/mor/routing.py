"""Who goes deeper: expert-choice (a recursion takes its best tokens) and token-choice (a token chooses its depth), and their losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast


class Routers(nn.Module):
    """The routers of a model, and what they remember of training. Scores are float32, whatever the model's dtype and autocast's.

    "expert": one linear layer D -> 1 a recursion, with `auxiliary` a second one each that predicts the choice. "token": one D -> N_r.
    No biases. `steps` counts forward passes in training, for the warm-up of capacities; `balance` are the steps by which loss-free
    balancing has moved each depth, whole numbers, so that no dtype rounds them.
    """

    steps: Tensor
    balance: Tensor

    def __init__(self, width: int, recursions: int, kind: str, *, auxiliary: bool = False) -> None:
        super().__init__()
        self.kind = kind
        shape = [(width, 1)] * recursions if kind == "expert" else [(width, recursions)]
        self.main = nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in shape)
        self.auxiliary = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(recursions if auxiliary else 0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("balance", torch.zeros(recursions, dtype=torch.int64))

    def scores(self, x: Tensor, recursion: int = 0) -> Tensor:
        """(..., D) -> (...) of the router of a recursion (from 0), or (..., N_r) of token-choice's only one."""
        found = scored(self.main[recursion], x)
        return found[..., 0] if self.kind == "expert" else found

    def predicted(self, x: Tensor, recursion: int) -> Tensor:
        """The auxiliary router's scores; no gradient reaches `x`."""
        return scored(self.auxiliary[recursion], x.detach())[..., 0]


def scored(router: nn.Module, x: Tensor) -> Tensor:
    """A router's logits in float32, under autocast too. A router that is no linear layer is called, as autocast has it."""
    if type(router) is nn.Linear:
        with maybe_autocast(x.device.type, enabled=False):
            return F.linear(x.float(), router.weight.float())
    found: Tensor = router(x)
    return found.float()


def best(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """(B, S) bool: in row b the `counts[b]` candidates of highest score, or all there are. Of equal scores the earlier token is taken.

    >>> best(torch.tensor([[1.0, 3.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]]), torch.tensor([1]))
    tensor([[False,  True, False, False]])
    """
    order = scores.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    return candidates & (rank < counts[:, None])


def membership_loss(scores: Tensor, chosen: Tensor, candidates: Tensor) -> Tensor:
    """Binary cross-entropy between scores (B, S) and membership in the choice, mean over the candidates: it moves what is chosen above a
    sigmoid of 1/2, so that a token alone can tell whether it would be."""
    return F.binary_cross_entropy_with_logits(scores[candidates], chosen[candidates].to(scores.dtype))


def first_best(scores: Tensor) -> Tensor:
    """(..., N) -> (...) the index of the largest, the first of equal ones."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    is_best = scores == scores.amax(-1, keepdim=True)
    return torch.where(is_best, places, scores.shape[-1]).amin(-1)


def loads(choices: Tensor, depths: int) -> Tensor:
    """The share of `choices` (n,) that fell on each of `depths` depths."""
    return torch.bincount(choices, minlength=depths).float() / max(len(choices), 1)


def balancing_loss(probabilities: Tensor, choices: Tensor) -> Tensor:
    """N_r sum_i P_i f_i: mean probability times share of the tokens, of `probabilities` (n, N_r) and `choices` (n,); 1 when even."""
    depths = probabilities.shape[-1]
    return depths * (probabilities.mean(0) * loads(choices, depths)).sum()


def z_loss(scores: Tensor) -> Tensor:
    """The mean square of the log-sum-exp of router scores (n, N_r), which keeps them small."""
    return scores.logsumexp(-1).square().mean()


def warmed(share: float, step: int, steps: int) -> float:
    """A capacity after `step` of `steps` steps of warm-up: from 1 down to `share` along a cosine; `share` itself without warm-up.

    >>> warmed(0.5, 0, 10), warmed(0.5, 5, 10), warmed(0.5, 10, 10), warmed(0.5, 3, 0)
    (1.0, 0.75, 0.5, 0.5)
    """
    if not steps:
        return share
    return share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
