"""Small decoders on the didactic problem of `verifier_based_ttc`: a base policy, and what imitation and a verifier
make of it.

Every budget H has its own data and its own arms, all from one base policy, with the same traces of it, whose rewards
are known, behind the same contexts. Words are charged alike: in training three times, forwards and backwards, read or
written once. The verifier's way writes traces while it climbs, and the verifier and the base policy read them;
imitation has as many words in training instead. That wrong traces teach imitation nothing is its loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.rates import Rate, chosen, searched
from assay.methods.reasoning.verifier_based_ttc import (
    Planted,
    anti_concentration,
    fit_verifier,
    heterogeneity,
    imitate,
    policy_gradient,
)
from assay.methods.reasoning.verifier_based_ttc.diagnostics import budget_curve
from assay.methods.reasoning.verifier_based_ttc.training import verified

Recipe = Mapping[str, Any]
RECIPE: dict[str, Any] = {
    "width": 32, "layers": 2, "heads": 2, "base_steps": 500, "contexts": 64, "traces": 32, "verifier_steps": 100,
    "gradient_steps": 100, "batch": 64, "kl": 0.02, "judged": 1000, "budgets": [6, 12, 24], "seeds": 3, "sums": 24,
}  # fmt: skip
FULL: dict[str, Any] = {
    **RECIPE, "width": 64, "base_steps": 4000, "contexts": 256, "verifier_steps": 600, "gradient_steps": 600, "judged": 4000,
    "budgets": [6, 12, 24, 48], "seeds": 5, "sums": 48,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    **RECIPE, "base_steps": 20, "contexts": 16, "verifier_steps": 5, "gradient_steps": 5, "judged": 50, "budgets": [6, 12], "sums": 2,
}  # fmt: skip
UNEQUAL: dict[str, Any] = {}  # experts of three strengths, as `Planted` has them
ALIKE: dict[str, Any] = {"strengths": (0.97,), "weights": (1.0,)}
MIXTURES = {"unequal": UNEQUAL, "alike": ALIKE}
IMITATION, QUICKEST, VERIFIER, USELESS, BASE, BEST, TRUE = (
    "imitation", "imitation of the quickest", "verifier", "useless verifier", "base policy", "best of 4 by the verifier",
    "true rewards of the traces written meanwhile",
)  # fmt: skip
GRADIENT = "policy gradient"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEARCHES = {
    BASE: "verifier_based_ttc/base",
    **dict.fromkeys((IMITATION, QUICKEST, VERIFIER), "verifier_based_ttc/learners"),
    GRADIENT: "verifier_based_ttc/gradient",
}


class Decoder(nn.Module):
    """A decoder with learned positions; `out` words, or one score a position."""

    def __init__(self, words: int, length: int, recipe: Recipe, out: int) -> None:
        super().__init__()
        width = recipe["width"]
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, recipe["heads"]) for _ in range(recipe["layers"]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(self, ids: Tensor, kept: list[list[Tensor]] | None = None) -> Tensor:
        """Logits (batch, length, words), or scores (batch, length). `kept` holds keys and values from before, and
        takes the new ones."""
        start = kept[0][0].shape[2] if kept and kept[0] else 0
        x = self.words(ids) + self.places.weight[start : start + ids.shape[1]]
        for n, block in enumerate(self.blocks):
            x = block(x, None if kept is None else kept[n])
        found: Tensor = self.head(self.norm(x))
        return found[..., 0] if found.shape[-1] == 1 else found


class Block(nn.Module):
    """Attention and a feed-forward part, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, kept: list[Tensor] | None) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if kept is not None:
            if kept:
                k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
            kept[:] = [k, v]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.back(F.gelu(self.wide(self.second(x))))


@torch.no_grad()
def sampled(H: int) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """How traces of H words and fillers are drawn from a decoder."""

    def sample(policy: nn.Module, prompts: Tensor, seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            kept: list[list[Tensor]] = [[] for _ in policy.blocks]  # type: ignore[union-attr]
            new, said = prompts, []
            for _ in range(H):
                logits = policy(new, kept)[:, -1]
                noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=chance).clamp(1e-9, 1 - 1e-7)))
                new = (logits + noise).argmax(-1, keepdim=True)  # Gumbel's way to draw from a softmax
                said.append(new)
        return torch.cat(said, 1)

    return sample


# ------------------------------------------------------------------------------------------------------------------- arms


def searched_rate(arm: str) -> Rate:
    """The learning rate found for an arm, and the grid it comes from."""
    return chosen(SEARCHES[arm], arm)


def rate_of(arm: str) -> float:
    return searched_rate(arm).rate


def problem_of(mixture: Mapping[str, Any], seed: int) -> Planted:
    return Planted(**mixture, seed=seed)


def base_policy(recipe: Recipe, mixture: Mapping[str, Any], seed: int, rate: float | None = None) -> nn.Module:
    """A decoder trained on fresh traces of the mixture, of the largest budget's length."""
    problem, H = problem_of(mixture, seed), max(recipe["budgets"])
    torch.manual_seed(seed)
    policy = Decoder(problem.V + 1, problem.k + 1 + H, recipe, problem.V + 1)
    n = recipe["base_steps"] * recipe["batch"]
    contexts = problem.contexts(n, seed=1000 + seed)
    traces = problem.traces(contexts, H, seed=2000 + seed)
    return imitate(
        policy, problem.prompts(contexts), traces, steps=recipe["base_steps"], lr=rate or rate_of(BASE), batch=recipe["batch"],
        seed=seed,
    )  # fmt: skip


class Data:
    """Contexts, and traces of the base policy behind them with their steps of first success: what both ways learn from
    at a budget."""

    def __init__(self, base: nn.Module, problem: Planted, recipe: Recipe, H: int, seed: int) -> None:
        self.base, self.problem, self.recipe, self.H, self.seed = base, problem, recipe, H, seed
        self.sample = sampled(H)
        contexts = problem.contexts(recipe["contexts"], seed=3000 + seed)
        self.contexts = contexts.repeat(recipe["traces"], 1)
        self.traces = self.sample(base, problem.prompts(self.contexts), 4000 + seed)
        self.first = problem.first(self.contexts, self.traces)

    def imitated(self, rate: float, *, quickest: bool = False) -> nn.Module:
        """Imitation of all right traces, or of the quickest one of each context."""
        rows = (self.first <= self.H).nonzero()[:, 0]
        if quickest:
            names = self._names(self.contexts[rows])
            best: dict[int, int] = {}
            for name, row in zip(names.tolist(), rows.tolist(), strict=True):
                if name not in best or self.first[row] < self.first[best[name]]:
                    best[name] = row
            rows = torch.tensor(sorted(best.values()), dtype=torch.long)
        if not len(rows):  # nothing to imitate
            return self.base
        # policy gradients also write, and have the verifier and the base policy read: three words for each that is trained on
        steps = self.recipe["verifier_steps"] + 2 * self.recipe["gradient_steps"]
        return imitate(
            self.base, self.problem.prompts(self.contexts[rows]), self.traces[rows], steps=steps, lr=rate, batch=self.recipe["batch"],
            seed=self.seed,
        )  # fmt: skip

    def verifier(self, rate: float) -> nn.Module:
        """The base policy with a new head, fitted to the rewards of every step of the traces."""
        contexts, traces, r, problem = self.contexts, self.traces, self.recipe, self.problem
        start = copy.deepcopy(self.base)
        torch.manual_seed(self.seed)
        start.head = nn.Linear(r["width"], 1)
        return fit_verifier(
            start, problem.prompts(contexts), traces, problem.rewards(contexts, traces), steps=r["verifier_steps"], lr=rate,
            batch=r["batch"], seed=self.seed,
        )  # fmt: skip

    def climbed(self, score: Callable[[Tensor, Tensor], Tensor], rate: float) -> nn.Module:
        """Policy gradients from the base policy against a score."""
        r = self.recipe
        prompts = self.problem.prompts(self.contexts[: r["contexts"]])
        return policy_gradient(
            self.base,
            prompts,
            score,
            self.sample,
            steps=r["gradient_steps"],
            lr=rate,
            kl=r["kl"],
            batch=r["batch"],
            seed=self.seed,
        )

    def _names(self, contexts: Tensor) -> Tensor:
        """A number for each context."""
        return (contexts * torch.tensor([self.problem.V**i for i in range(self.problem.k)])).sum(1)

    def held_out(self, part: int = 5000) -> Tensor:
        """Contexts that neither way has learnt from, to be judged by."""
        n = self.recipe["judged"]
        drawn = self.problem.contexts(4 * n, seed=part + self.seed)
        fresh = drawn[~torch.isin(self._names(drawn), self._names(self.contexts))]
        if len(fresh) < n:
            raise ValueError(f"contexts must leave enough others to judge by, got {self.recipe['contexts']}")
        return fresh[:n]

    def judged(self, policy: nn.Module, part: int = 5000) -> list[int]:
        """Steps of first success of one trace for each held-out context."""
        contexts = self.held_out(part)
        traces = self.sample(policy, self.problem.prompts(contexts), 6000 + self.seed)
        return self.problem.first(contexts, traces).tolist()

    def best_of(self, verifier: nn.Module, N: int = 4) -> list[int]:
        """Of N traces of the base policy for each held-out context, that with the largest sum of the verifier's
        chances."""
        contexts = self.held_out()
        prompts = self.problem.prompts(contexts)
        drawn = [self.sample(self.base, prompts, 7000 + 31 * self.seed + i) for i in range(N)]
        scores = torch.stack([verified(verifier, prompts, traces).sum(1) for traces in drawn])
        first = torch.stack([self.problem.first(contexts, traces) for traces in drawn])
        return first.gather(0, scores.argmax(0, keepdim=True))[0].tolist()


def noise(prompts: Tensor, traces: Tensor) -> Tensor:
    """A useless verifier: a chance for each step that has nothing to do with it, the same for the same batch of traces."""
    seed = int((traces * torch.arange(1, traces.shape[1] + 1)).sum()) % 2**31
    return torch.rand(traces.shape, generator=torch.Generator().manual_seed(seed))


def outcomes(recipe: Recipe, seed: int, name: str) -> dict[str, Any]:
    """Everything of one seed and mixture: {mixture: {H: {arm: steps of first success on held-out contexts}}}, and what
    the base policy is like."""
    mixture = MIXTURES[name]
    problem, base = problem_of(mixture, seed), base_policy(recipe, mixture, seed)
    budgets = recipe["budgets"] if name == "unequal" else [recipe["budgets"][0], recipe["budgets"][-1]]
    seen: dict[str, Any] = {name: {}}
    for H in budgets:
        data = Data(base, problem, recipe, H, seed)
        verifier = data.verifier(rate_of(VERIFIER))

        def score(prompts: Tensor, traces: Tensor, judge: nn.Module = verifier) -> Tensor:
            return verified(judge, prompts, traces)

        def true(prompts: Tensor, traces: Tensor, problem: Planted = problem) -> Tensor:
            return problem.rewards(prompts[:, :-1], traces)

        arms = {
            BASE: data.judged(base),
            IMITATION: data.judged(data.imitated(rate_of(IMITATION))),
            VERIFIER: data.judged(data.climbed(score, rate_of(GRADIENT))),
        }
        if name == "unequal":
            arms |= {
                QUICKEST: data.judged(data.imitated(rate_of(QUICKEST), quickest=True)),
                USELESS: data.judged(data.climbed(noise, rate_of(GRADIENT))),
                BEST: data.best_of(verifier),
                TRUE: data.judged(data.climbed(true, rate_of(GRADIENT))),
            }
        seen[name][str(H)] = arms
    by_prompt = [
        [float(max(H - one + 1, 0)) for one in data.first[i :: recipe["contexts"]].tolist()]
        for i in range(recipe["contexts"])
    ]
    seen[f"{name}, base policy"] = {
        "heterogeneity": heterogeneity(by_prompt).mean, "anti-concentration": anti_concentration(by_prompt), "H": H,
    }  # fmt: skip
    return seen


def success(first: list[int], H: int) -> float:
    return budget_curve(first, [H])[0][1]


def mean_return(first: list[int], H: int) -> float:
    return budget_curve(first, [H])[0][2]


# ---------------------------------------------------------------------------------------------------------- learning rates

SEARCHED_AT = {**RECIPE, "judged": 2000}


@cache
def _for_search(H: int = 12, seed: int = 100) -> Data:
    return Data(base_policy(SEARCHED_AT, UNEQUAL, seed), problem_of(UNEQUAL, seed), SEARCHED_AT, H, seed)


def base_loss(arm: str, rate: float) -> float:
    """The base policy's cross entropy on traces of contexts kept for the choice."""
    policy = base_policy(SEARCHED_AT, UNEQUAL, 100, rate)
    problem = problem_of(UNEQUAL, 100)
    contexts = problem.contexts(2000, seed=8000)
    ids = torch.cat([problem.prompts(contexts), problem.traces(contexts, max(SEARCHED_AT["budgets"]), seed=8001)], 1)
    with torch.no_grad():
        logits = policy(ids[:, :-1])[:, problem.k :]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, problem.k + 1 :].flatten()).item()


def learner_loss(arm: str, rate: float) -> float:
    """The loss of an arm on contexts kept for the choice: wrong traces, and squared error of the verifier."""
    data = _for_search()
    if arm == VERIFIER:
        judge = data.verifier(rate)
        contexts = data.problem.contexts(2000, seed=8000)
        traces = data.sample(data.base, data.problem.prompts(contexts), 8001)
        wanted = data.problem.rewards(contexts, traces)
        return ((verified(judge, data.problem.prompts(contexts), traces) - wanted) ** 2).mean().item()
    return 1 - success(data.judged(data.imitated(rate, quickest=arm == QUICKEST), 8000), data.H)


def gradient_loss(arm: str, rate: float) -> float:
    """Wrong traces behind climbing what the verifier says."""
    data = _for_search()
    judge = data.verifier(rate_of(VERIFIER))
    policy = data.climbed(lambda prompts, traces: verified(judge, prompts, traces), rate)
    return 1 - success(data.judged(policy, 8000), data.H)


# one after the other: each needs the rates of those before
searched(SEARCHES[BASE], arms=(BASE,), grid=(1e-3, 3e-3, 1e-2, 3e-2))(base_loss)
searched(SEARCHES[IMITATION], arms=(IMITATION, QUICKEST, VERIFIER), grid=GRID)(learner_loss)
searched(SEARCHES[GRADIENT], arms=(GRADIENT,), grid=GRID)(gradient_loss)
