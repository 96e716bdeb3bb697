"""How well each neuron tells one function from the others: FuncScore, the specialists of a function, and what two functions share.

FuncScore(i, f) is the average precision of ranking passages by the mean activation of neuron i, where those that need function f are
right (section on functional localisation of arXiv 2409.02877). A neuron that knows nothing reaches the share of right passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay import checks
from assay.methods.compression.configurable_bricks.neurons import part
from assay.methods.core.sparsity.projections import top

BEST_SHARE = 0.005  # of a layer's neurons, whose mean the paper reports


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of ranking by `scores` (n, ...), from the largest down, for bool `labels` (n,): float64, (...).

    The sum over thresholds of precision times the gain in recall, equal scores sharing a threshold, as in scikit-learn's
    `average_precision_score`; all columns at once. Only the order counts: any growing function of the scores gives the same.

    Raises ValueError without a right label, and for scores that are not finite.

    >>> average_precision(torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.1, 0.2]]), torch.tensor([True, False, False]))
    tensor([1.0000, 0.3333], dtype=torch.float64)
    """
    checks.tensor("scores", scores, finite=True)
    if scores.dim() == 0:
        raise ValueError("scores must have one row a passage, got a single number")
    n = len(scores)
    right = checks.tensor("labels", labels, dtype="bool", shape=(n,)).to(scores.device)
    if not bool(right.any()):
        raise ValueError("labels must hold at least one that is True, got none")
    ranked, order = scores.detach().reshape(n, -1).sort(dim=0, descending=True)
    hits = right[order].double()
    place = torch.arange(n, device=scores.device)[:, None]
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[:-1] != ranked[1:]  # of those with equal scores
    ends = torch.where(last, place, n - 1).flip(0).cummin(0).values.flip(0)
    precision = (hits.cumsum(0) / (place + 1)).gather(0, ends)
    return ((hits * precision).sum(0) / right.sum()).view(scores.shape[1:])


@dataclass(frozen=True)
class LayerScores:
    """What the paper reports of one function in one MLP: the best score, the mean of the best 0.5 %, of all, and that of chance."""

    best: float
    best_share: float
    mean: float
    chance: float


class FunctionalityScorer:
    """Which neurons do what, from the mean activations of passages with one function each; in scikit-learn's manner.

    `share` of each MLP's neurons count as a function's specialists (the paper: 5 %; of each layer is our choice). `residents` is the
    share of each MLP's neurons, those with the largest mean over all functions, that are never specialists: some neurons fire for
    everything, and a model without them fails everywhere. 0, the paper's form, leaves none out.

    After `fit`: `functions_` (sorted names), `prevalence_` (share of passages of each), `scores_` by MLP (functions, neurons),
    and `specialists_` by function and MLP, bool (neurons,), `part(share, neurons)` of each and at least one.

    >>> h = {"mlp": torch.tensor([[2.0, 0.1, 1.0], [3.0, 0.2, 1.0], [0.5, 0.9, 1.0], [0.1, 0.8, 1.0]])}
    >>> scorer = FunctionalityScorer(share=0.4).fit(h, ["code", "code", "prose", "prose"])
    >>> scorer.scores_["mlp"][0], scorer.specialists_["prose"]["mlp"]
    (tensor([1.0000, 0.4167, 0.5000], dtype=torch.float64), tensor([False,  True, False]))
    """

    functions_: list[str]
    prevalence_: dict[str, float]
    scores_: dict[str, Tensor]
    specialists_: dict[str, dict[str, Tensor]]

    def __init__(self, share: float = 0.05, residents: float = 0.0) -> None:
        self.share = checks.number("share", share, above=0, high=1)
        self.residents = checks.number("residents", residents, low=0, below=1)

    def fit(self, activations: Mapping[str, Tensor], labels: Sequence[str]) -> FunctionalityScorer:
        """Score every neuron for every function: `activations` by MLP, (passages, neurons); `labels`, one function a passage.

        Raises ValueError for no MLPs, numbers that are not finite, lengths that differ, fewer than two functions, and where
        residents leave fewer neurons than specialists are asked for.
        """
        if not isinstance(activations, Mapping) or not activations:
            raise ValueError("activations must hold the neurons of at least one MLP, got none")
        names = [str(label) for label in labels]
        functions = sorted(set(names))
        if len(functions) < 2:
            raise ValueError(f"labels must name at least two functions, got {functions}")
        scores: dict[str, Tensor] = {}
        chosen: dict[str, dict[str, Tensor]] = {function: {} for function in functions}
        for mlp, found in activations.items():
            checks.tensor(f"activations[{mlp!r}]", found, shape=(len(names), "neurons"), finite=True)
            neurons = found.shape[1]
            count, away = max(1, part(self.share, neurons)), part(self.residents, neurons)
            if count > neurons - away:
                raise ValueError(
                    f"residents must leave {count} of {neurons} neurons of {mlp!r}, got {self.residents:g}"
                )
            wanted = [torch.tensor([name == function for name in names]) for function in functions]
            scores[mlp] = torch.stack([average_precision(found, right) for right in wanted])
            means = torch.stack([found[right.to(found.device)].mean(0) for right in wanted]).mean(0)
            eligible = scores[mlp].masked_fill(top(means, away), -1.0)
            for function, row in zip(functions, eligible, strict=True):
                chosen[function][mlp] = top(row, count)
        self.functions_, self.scores_, self.specialists_ = functions, scores, chosen
        self.prevalence_ = {function: names.count(function) / len(names) for function in functions}
        return self

    def summary(self) -> dict[str, dict[str, LayerScores]]:
        """By function and MLP, what the paper reports of the scores. Raises ValueError before `fit`."""
        if not hasattr(self, "scores_"):
            raise ValueError("the scorer must be fitted before its summary is asked for")
        found: dict[str, dict[str, LayerScores]] = {}
        for place, function in enumerate(self.functions_):
            found[function] = {}
            for mlp, scores in self.scores_.items():
                row = scores[place]
                best = row.topk(max(1, part(BEST_SHARE, len(row)))).values
                found[function][mlp] = LayerScores(
                    float(row.max()), float(best.mean()), float(row.mean()), self.prevalence_[function]
                )
        return found


def overlap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The share of the neurons in `one` that are in `other` too: bool masks by MLP, of the same MLPs.

    1 for a set and itself; two independent sets of a share s of the neurons have about s in common.
    Raises ValueError for other MLPs or lengths, and for an empty `one`.

    >>> overlap({"mlp": torch.tensor([True, True, False])}, {"mlp": torch.tensor([False, True, True])})
    0.5
    """
    if set(one) != set(other):
        raise ValueError(f"other must have the MLPs of one, got them apart by {sorted(set(one) ^ set(other))[0]!r}")
    common = total = 0
    for name, mask in one.items():
        checks.tensor(f"one[{name!r}]", mask, ndim=1, dtype="bool")
        checks.tensor(f"other[{name!r}]", other[name], dtype="bool", shape=tuple(mask.shape))
        common += int((mask & other[name]).sum())
        total += int(mask.sum())
    if total == 0:
        raise ValueError("one must hold at least one neuron, got none")
    return common / total
