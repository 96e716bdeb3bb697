"""Policy gradients on whole programs: PPO over tokens with a critic, GRPO without one, and the rival that only imitates what was best.

All parts are plain functions of tensors (n, T), T tokens that were predicted, `mask` True where a token was written. They work in any
floating dtype. Sampling is with a temperature, and so are all log-probabilities here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.code.acecode.policy import Rollouts, token_logprobs, write

Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[float]]
"""Rewards of completions (token ids without the end token) behind prompts."""


ROUNDING = 1e-6
"""Scores and advantages that differ by no more than this are the same: an optimizer would make steps of any difference."""


@dataclass(frozen=True)
class PPO:
    """Settings. Those of the algorithm are what is usual (Schulman et al. 2017); the paper's own are not public, so all are our choice.

    A round writes `samples` completions of every prompt and climbs `epochs` times over them in `parts` parts. `kl` is the price of a
    nat away from the policy that it began with; `value` and `entropy` weigh the critic's loss and the entropy. `lr` is for all weights
    of a model; 1e-4 is usual for adapters.
    """

    rounds: int = 100
    samples: int = 4
    lr: float = 1e-5
    epochs: int = 4
    parts: int = 1
    clip: float = 0.2
    kl: float = 0.03
    value: float = 0.1
    entropy: float = 0.001
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 0.8
    longest: int = 512
    most_gradient: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rounds", "samples", "epochs", "parts", "longest"):
            checks.whole(name, getattr(self, name), low=1)
        for name in ("lr", "temperature", "most_gradient"):
            checks.number(name, getattr(self, name), above=0)
        for name in ("kl", "value", "entropy"):
            checks.number(name, getattr(self, name), low=0)
        for name in ("gamma", "lam"):
            checks.number(name, getattr(self, name), low=0, high=1)
        checks.number("clip", self.clip, above=0, below=1)


@dataclass(frozen=True)
class Climbed:
    """The trained policy, and of each round: mean reward, KL from the first policy (k3, nats a token), entropy, tokens a completion."""

    policy: nn.Module
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def kl(self) -> float:
        """The KL of the last round's samples, before its update."""
        return self.rounds[-1]["kl"]


class Critic(nn.Module):
    """A value for every position (n, length) for ids (n, length): a copy of a model of transformers below a new head that says 0.

    Any module that gives such values will do in its place.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.base_model)
        weight = next(policy.parameters())
        self.head = nn.Linear(policy.config.hidden_size, 1, dtype=weight.dtype, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(ids).last_hidden_state)[..., 0]
        return found


# ------------------------------------------------------------------------------------------------------------------ the parts


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from a token of the policy: exp(d) - 1 - d, d = log reference - log policy.

    Never negative, and unbiased over tokens of the policy.

    >>> float(k3(torch.tensor(-1.0), torch.tensor(-1.0)))
    0.0
    """
    d = reference - logp
    return d.exp() - 1 - d


def token_rewards(scores: Tensor, mask: Tensor, logp: Tensor, reference: Tensor, kl: float) -> Tensor:
    """Rewards (n, T): the score (n,) at the last token that was written, less `kl` * (log policy - log reference) at each."""
    found = torch.where(mask, -kl * (logp - reference), torch.zeros_like(logp))
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    found[torch.arange(len(found), device=mask.device), last] += scores.to(found.dtype)
    return found


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (n, T), 0 outside the mask; the value after the last token is 0.

    `values` are those of the states before each token. With gamma = lam = 1 the advantage is the sum of all rewards to come less the
    value. Schulman et al. 2016 (arXiv 1506.02438), equation 16.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]), lam=1.0)[0].tolist()
    [[0.5, 0.5]]
    """
    advantage = torch.zeros_like(values[:, 0])
    later = torch.zeros_like(advantage)
    found = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask[:, t]
        advantage = torch.where(here, rewards[:, t] + gamma * later - values[:, t] + gamma * lam * advantage, 0.0)
        later = torch.where(here, values[:, t], 0.0)
        found[:, t] = advantage
    return found, torch.where(mask, found + values, 0.0)


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over the mask, 0 outside; all 0 where they are all the same."""
    seen = advantages[mask]
    spread = seen.std(correction=0)
    return torch.where(mask & (spread > ROUNDING), (advantages - seen.mean()) / spread.clamp(min=ROUNDING), 0.0)


def group_normalised(scores: Tensor, samples: int) -> Tensor:
    """GRPO's advantages (n,): scores less their group's mean over its standard deviation. Rows are prompt by prompt, `samples` of each.

    A group of equal scores has no advantages. Shao et al. 2024 (arXiv 2402.03300).

    >>> group_normalised(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2).round(decimals=3).tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    groups = checks.tensor("scores", scores, ndim=1).unflatten(0, (-1, checks.whole("samples", samples, low=1)))
    centred = groups - groups.mean(1, keepdim=True)
    spread = centred.std(1, correction=0, keepdim=True)
    return torch.where(spread > ROUNDING, centred / spread.clamp(min=ROUNDING), 0.0).flatten()


def policy_loss(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, to be made smaller: -mean of min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A) over the mask.

    All but `clip` are (n, T); a scalar comes back. Schulman et al. 2017 (arXiv 1707.06347), equation 7.

    >>> same = torch.zeros(1, 2)
    >>> float(policy_loss(same, same, torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]), 0.2))
    -2.0
    """
    ratio = (logp - old).exp()
    found = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -_mean(found, mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum()


# --------------------------------------------------------------------------------------------------------------------- training


def climb(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    score: Score,
    *,
    end: int,
    critic: nn.Module | None = None,
    settings: PPO | None = None,
    seed: int = 0,
) -> Climbed:
    """A copy of `policy` that climbs the score; the policy given stays as it is, and is the reference that KL is measured from.

    With a critic (trained in place) it is PPO: GAE, whitened, and the KL taken from the reward of each token by its plain estimate. Without
    one it is GRPO: advantages within the samples of a prompt, and the KL in the loss as `k3`; every token weighs the same in both, our
    choice. `score(prompts, completions)` is called once a round with all of them. The copy comes back in eval mode, and is trained in it.
    Raises ValueError for a score or a loss that is not finite.
    """
    s = settings or PPO()
    found, rows = copy.deepcopy(policy).eval(), _repeated(prompts, s.samples)  # no dropout: it would be in the ratios
    first = copy.deepcopy(policy).eval() if policy.training else policy
    weights = [*found.parameters(), *(critic.parameters() if critic is not None else ())]
    optimizer = torch.optim.AdamW(weights, lr=s.lr, weight_decay=0.0)
    chance, told = torch.Generator().manual_seed(checks.whole("seed", seed, low=0)), []
    for number in range(s.rounds):
        drawn = _draw(found, rows, end, s, seed, number)
        scores = _scored(score, rows, drawn, end)
        with torch.no_grad():
            old, reference, figures = _told(found, first, drawn, scores, s)
            told.append(figures)
            if critic is None:
                each = group_normalised(scores, s.samples).to(old)
                advantages, returns = torch.where(drawn.mask, each[:, None], 0.0), None
            else:
                rewards = token_rewards(scores.to(old), drawn.mask, old, reference, s.kl)
                values = critic(drawn.ids[:, :-1])
                advantages, returns = gae(rewards, values, drawn.mask, gamma=s.gamma, lam=s.lam)
                advantages = whitened(advantages, drawn.mask)
        for _ in range(s.epochs):
            for part in torch.randperm(len(rows), generator=chance).chunk(s.parts):
                ids, mask = drawn.ids[part], drawn.mask[part]
                logp, entropy = token_logprobs(found, ids, s.temperature)
                loss = policy_loss(logp, old[part], advantages[part], mask, s.clip) - s.entropy * _mean(entropy, mask)
                if critic is None or returns is None:
                    loss = loss + s.kl * _mean(k3(logp, reference[part]), mask)
                else:
                    loss = loss + s.value * _mean((critic(ids[:, :-1]) - returns[part]) ** 2, mask)
                _step(optimizer, weights, loss, s, number)
    return Climbed(found, told)


def rejection(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    score: Score,
    *,
    end: int,
    settings: PPO | None = None,
    least: float = 0.0,
    seed: int = 0,
) -> Climbed:
    """The cheap rival: fine-tuning on the best completions seen so far, with as many executions and steps as `climb` of these settings.

    Each round writes `samples` of every prompt; of each prompt the distinct completions with the largest score are kept, where that is
    above `least` (right programs are above 0). Then the policy learns to write those kept, as many rows a step as were written.
    """
    s = settings or PPO()
    found, rows = copy.deepcopy(policy).eval(), _repeated(prompts, s.samples)
    first = copy.deepcopy(policy).eval() if policy.training else policy
    weights = list(found.parameters())
    optimizer = torch.optim.AdamW(weights, lr=s.lr, weight_decay=0.0)
    chance, told = torch.Generator().manual_seed(checks.whole("seed", seed, low=0)), []
    best: dict[tuple[int, ...], tuple[float, list[list[int]]]] = {}
    for number in range(s.rounds):
        drawn = _draw(found, rows, end, s, seed, number)
        scores = _scored(score, rows, drawn, end)
        with torch.no_grad():
            told.append(_told(found, first, drawn, scores, s)[-1])
        for prompt, text, value in zip(rows, drawn.completions(end), scores.tolist(), strict=True):
            most, kept = best.get(tuple(prompt), (least, []))
            if value > most:
                best[tuple(prompt)] = value, [text]
            elif value == most and kept and text not in kept:
                kept.append(text)
        if not best:
            continue
        names = sorted(best)
        for _ in range(s.epochs * s.parts):
            size = -(-len(rows) // s.parts)
            picked = [names[i] for i in torch.randint(len(names), (size,), generator=chance).tolist()]
            texts = [best[name][1] for name in picked]
            chosen = [kept[int(torch.randint(len(kept), (1,), generator=chance))] for kept in texts]
            batch = _pairs(picked, chosen, end, drawn.ids.device)
            logp, _ = token_logprobs(found, batch.ids)
            _step(optimizer, weights, -_mean(logp, batch.mask), s, number)
    return Climbed(found, told)


def _repeated(prompts: Sequence[Sequence[int]], samples: int) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompts must be one or more, got none")
    return [list(prompt) for prompt in prompts for _ in range(samples)]


def _draw(policy: nn.Module, rows: list[list[int]], end: int, s: PPO, seed: int, number: int) -> Rollouts:
    at = (seed * 100_003 + number) % 2**31
    return write(policy, rows, end=end, longest=s.longest, temperature=s.temperature, seed=at)


def _scored(score: Score, rows: list[list[int]], drawn: Rollouts, end: int) -> Tensor:
    scores = torch.tensor([float(value) for value in score(rows, drawn.completions(end))], dtype=torch.float64)
    if scores.shape != (len(rows),) or not bool(scores.isfinite().all()):
        raise ValueError(f"score must give {len(rows)} finite numbers, got {checks.shown(scores.tolist())}")
    return scores.to(drawn.ids.device)


def _told(
    policy: nn.Module, first: nn.Module, drawn: Rollouts, scores: Tensor, s: PPO
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """What both policies say of the tokens drawn, and what is told of the round."""
    logp, entropy = token_logprobs(policy, drawn.ids, s.temperature)
    reference, _ = token_logprobs(first, drawn.ids, s.temperature)
    figures = {
        "reward": float(scores.mean()),
        "kl": float(_mean(k3(logp, reference), drawn.mask)),
        "entropy": float(_mean(entropy, drawn.mask)),
        "tokens": float(drawn.mask.sum(1).double().mean()),
    }
    return logp, reference, figures


def _pairs(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], end: int, device: torch.device
) -> Rollouts:
    """Given completions behind prompts, in the form of `write`."""
    whole = [[*prompt, *text, end] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in whole], device=device)
    places = torch.arange(1, longest, device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    ends = torch.tensor([len(row) for row in whole], device=device)[:, None]
    return Rollouts(ids, (places >= starts) & (places < ends))


def _step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], loss: Tensor, s: PPO, number: int) -> None:
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()} in round {number}: the learning rate ({s.lr}) may be too high")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(weights, s.most_gradient)
    optimizer.step()
