"""The two ways to learn from traces, in plain torch: imitation of the right ones, and rewards through a verifier.

A policy is a module that gives logits (batch, length, words) for ids (batch, length); a verifier one that gives a
score (batch, length) for each position. For a real model use a trainer made for it (supervised and GRPO trainers,
say): these loops are for small ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks


def _optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=checks.number("lr", lr, above=0), weight_decay=0.0, fused=True)


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor, at: int, lr: float, share: float) -> None:
    """One step at a rate that falls along a cosine."""
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()} at step {at}: the learning rate ({lr}) may be too high")
    for group in optimizer.param_groups:
        group["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * share))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _batches(n: int, steps: int, batch: int, seed: int) -> list[Tensor]:
    """Numbers of rows for each step: all of them once before any comes again."""
    chance = torch.Generator().manual_seed(checks.whole("seed", seed, low=0))
    rounds = -(-steps * batch // n)
    order = torch.cat([torch.randperm(n, generator=chance) for _ in range(rounds)])
    return list(order[: steps * batch].split(batch))


def _pairs(prompts: Tensor, traces: Tensor) -> tuple[Tensor, int]:
    checks.tensor("prompts", prompts, ndim=2, dtype="integer")
    checks.tensor("traces", traces, shape=(len(prompts), "H"), dtype="integer")
    return torch.cat([prompts, traces], 1), prompts.shape[1]


def imitate(
    policy: nn.Module, prompts: Tensor, traces: Tensor, *, steps: int, lr: float, batch: int = 64, seed: int = 0
) -> nn.Module:
    """A copy of `policy` trained to write `traces` behind `prompts` (supervised fine-tuning): verifier-free where only
    right ones are given.

    With all traces of the policy it learns what it does already; with right ones, the policy given success. Raises
    ValueError for a loss that is not finite.
    """
    ids, start = _pairs(prompts, traces)
    found: nn.Module = copy.deepcopy(policy).train()
    optimizer, steps = _optimizer(found, lr), checks.whole("steps", steps, low=1)
    for at, rows in enumerate(_batches(len(ids), steps, checks.whole("batch", batch, low=1), seed)):
        logits = found(ids[rows][:, :-1])[:, start - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[rows][:, start:].flatten())
        _step(optimizer, found, loss, at, lr, at / steps)
    return found.eval()


def fit_verifier(
    verifier: nn.Module,
    prompts: Tensor,
    traces: Tensor,
    rewards: Tensor,
    *,
    steps: int,
    lr: float,
    batch: int = 64,
    seed: int = 0,
) -> nn.Module:
    """A copy of `verifier` fitted by squared loss to the 0/1 `rewards` (batch, H) of every step; its score is squeezed
    into (0, 1)."""
    ids, start = _pairs(prompts, traces)
    checks.tensor("rewards", rewards, shape=tuple(traces.shape), dtype="floating", finite=True)
    found: nn.Module = copy.deepcopy(verifier).train()
    optimizer, steps = _optimizer(found, lr), checks.whole("steps", steps, low=1)
    for at, rows in enumerate(_batches(len(ids), steps, checks.whole("batch", batch, low=1), seed)):
        loss = ((torch.sigmoid(found(ids[rows])[:, start:]) - rewards[rows]) ** 2).mean()
        _step(optimizer, found, loss, at, lr, at / steps)
    return found.eval()


@torch.no_grad()
def verified(verifier: nn.Module, prompts: Tensor, traces: Tensor) -> Tensor:
    """The verifier's chance that each step has reached a right answer, (batch, H)."""
    ids, start = _pairs(prompts, traces)
    return torch.sigmoid(verifier(ids)[:, start:])


def policy_gradient(
    policy: nn.Module,
    prompts: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    sample: Callable[[nn.Module, Tensor, int], Tensor],
    *,
    steps: int,
    lr: float,
    kl: float,
    batch: int = 64,
    seed: int = 0,
    after: Callable[[int, dict[str, Any]], None] = lambda step, seen: None,
) -> nn.Module:
    """A copy of `policy` that raises the scores of its own traces and stays near what it was: REINFORCE with a KL
    penalty.

    `score(prompts, traces)` gives the reward of each step (batch, H), a verifier's for instance, and `sample(policy,
    prompts, seed)` traces of the policy. A word's advantage is the sum of rewards from its step on, less the mean over
    the batch at that step, in units of the batch's spread. `kl` weighs the divergence from the first policy, exact
    over words at the states that were reached; without it a learned score is exploited. `after` is told the mean
    return and divergence (nats a word) of each step.
    """
    found: nn.Module = copy.deepcopy(policy).train()
    base = copy.deepcopy(policy).eval()
    optimizer, steps = _optimizer(found, lr), checks.whole("steps", steps, low=1)
    kl = checks.number("kl", kl, low=0)
    for at, rows in enumerate(_batches(len(prompts), steps, checks.whole("batch", batch, low=1), seed)):
        asked = prompts[rows]
        traces = sample(found, asked, seed * 1_000_003 + at)
        ids, start = _pairs(asked, traces)
        with torch.no_grad():
            rewards = score(asked, traces)
            to_go = rewards.flip(1).cumsum(1).flip(1)
            better = to_go - to_go.mean(0, keepdim=True)
            advantage = better / (better.std() + 1e-6)
            before = torch.log_softmax(base(ids[:, :-1])[:, start - 1 :], -1)
        now = torch.log_softmax(found(ids[:, :-1])[:, start - 1 :], -1)
        said = now.gather(2, traces[..., None])[..., 0]
        divergence = (now.exp() * (now - before)).sum(-1).mean()
        loss = -(advantage * said).mean() + kl * divergence
        _step(optimizer, found, loss, at, lr, at / steps)
        after(at, {"return": float(to_go[:, 0].mean()), "kl": float(divergence.detach())})
    return found.eval()
