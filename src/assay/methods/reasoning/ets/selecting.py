"""Which leaves of a tree of steps go on, and how often: by reward (REBASE), and by an integer programme that counts shared ancestors (ETS).

`Rebase`, `Ets` and `Beam` are selectors: called with the unfinished traces and a width, they give how many steps to draw behind each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay import checks
from assay.methods.core.reasoning.trace import Trace

Select = Callable[[Sequence[Trace], int], list[int]]
"""How many next steps each trace gets, `width` together. Traces are judged already: their `score` is that of the last step."""
Embed = Callable[[Sequence[str]], np.ndarray]
"""A vector for each text, (texts, dimensions), none of them zero; what lies in one direction means the same."""

CUT = 0.05
"""The cosine distance up to which steps count as one, by the released code; it belongs to the embedding and is to be set anew with it."""
HAIR = 1e-9
"""What a share may lie above a whole number by rounding: three of three equal scores are to get one step each, not two and one and none."""


def rebase_counts(scores: Sequence[float], width: int, *, temperature: float = 0.2) -> list[int]:
    """How REBASE shares out `width` next steps: to the best first, each gets its softmax share of what is left, rounded up.

    `scores` lie in [0, 1] for the paper's temperature. The sum is `width`; where there are more scores than steps the worst get none. Of
    equal scores the first comes first. Raises ValueError without a score, for one that is not finite, and for width < 1.

    >>> rebase_counts([0.9, 0.5, 0.5, 0.1], 8)
    [7, 1, 0, 0]
    """
    known = [checks.number("scores", score) for score in scores]
    if not known:
        raise ValueError("scores must hold at least one, got none")
    left = checks.whole("width", width, low=1)
    temperature = checks.number("temperature", temperature, above=0)
    order = sorted(range(len(known)), key=lambda i: -known[i])
    weights = [math.exp((known[i] - known[order[0]]) / temperature) for i in order]
    counts = [0] * len(known)
    for place, i in enumerate(order):
        rest = sum(weights[place:])  # summed anew: what is left after subtractions is not exact
        counts[i] = min(left, math.ceil(left * weights[place] / rest - HAIR)) if rest else 0
        left -= counts[i]
    return counts


def choose(
    shares: Sequence[float],
    ancestors: Sequence[Sequence[Hashable]],
    *,
    lambda_c: float = 1.0,
    lambda_s: float = 0.0,
    clusters: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    ancestor_costs: Mapping[Any, float] | None = None,
) -> list[bool]:
    """Which leaves ETS keeps: those that maximise reward, less the nodes they hold in the cache, plus the clusters they cover.

    The sum of `shares` over kept leaves - lambda_c * (cost of kept leaves and of their distinct ancestors) / (cost of all of them)
    + lambda_s * (clusters with a kept leaf) / (clusters), with at least one leaf kept; solved exactly by scipy's `milp`.
    `ancestors[i]` are the nodes above leaf i, however they are called. A node costs 1 as in the released code, or what `costs` and
    `ancestor_costs` say (tokens). `clusters` are numbers, one a leaf; None leaves the term out. Without a cost (lambda_c = 0) all
    leaves are kept.

    Raises ValueError for other numbers of entries, shares or lambdas below 0 and costs not above 0.

    >>> choose([0.4, 0.3, 0.3], ["a", "a", "b"], lambda_c=1.0)
    [True, True, False]
    """
    shares = [checks.number("shares", share, low=0) for share in shares]
    lambda_c, lambda_s = checks.number("lambda_c", lambda_c, low=0), checks.number("lambda_s", lambda_s, low=0)
    if not shares:
        raise ValueError("shares must hold at least one leaf, got none")
    for name, listed in (("ancestors", ancestors), ("clusters", clusters), ("costs", costs)):
        if listed is not None and len(listed) != len(shares):
            raise ValueError(f"{name} must be as many as shares, {len(shares)}, got {len(listed)}")
    nodes = {node: place for place, node in enumerate(dict.fromkeys(node for path in ancestors for node in path))}
    if missing := [node for node in nodes if ancestor_costs is not None and node not in ancestor_costs]:
        raise ValueError(f"ancestor_costs must have every ancestor, got none for {checks.shown(missing[0])}")
    of_leaves = [checks.number("costs", cost, above=0) for cost in costs] if costs is not None else [1.0] * len(shares)
    of_nodes = [
        1.0 if ancestor_costs is None else checks.number("ancestor_costs", ancestor_costs[node], above=0)
        for node in nodes
    ]
    if not lambda_c:
        return [True] * len(shares)

    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    kinds = sorted(set(clusters)) if clusters is not None and lambda_s else []
    leaves, inner, total = len(shares), len(nodes), sum(of_leaves) + sum(of_nodes)
    gain = np.array(shares) - lambda_c * np.array(of_leaves) / total
    value = np.concatenate(
        [gain, -lambda_c * np.array(of_nodes) / total, np.full(len(kinds), lambda_s / max(len(kinds), 1))]
    )
    entries: list[tuple[int, int, float]] = []  # rows that must be at least their bound
    bounds: list[float] = []
    for i, path in enumerate(
        ancestors
    ):  # an ancestor is held if a leaf below it is kept; it costs, so that it is not held otherwise
        for node in dict.fromkeys(path):
            entries += [(len(bounds), leaves + nodes[node], 1.0), (len(bounds), i, -1.0)]
            bounds.append(0.0)
    for place, kind in enumerate(kinds):
        assert clusters is not None
        entries += [(len(bounds), i, 1.0) for i, own in enumerate(clusters) if own == kind]
        entries.append((len(bounds), leaves + inner + place, -1.0))
        bounds.append(0.0)
    entries += [(len(bounds), i, 1.0) for i in range(leaves)]
    bounds.append(1.0)
    rows, columns, numbers = zip(*entries, strict=True)
    matrix = coo_array((numbers, (rows, columns)), shape=(len(bounds), len(value))).tocsr()
    whole = np.r_[np.ones(leaves), np.zeros(inner + len(kinds))]  # the others follow from the leaves
    found = milp(
        -value,
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, bounds, np.inf),
        options={"mip_rel_gap": 0.0},  # by default it stops 0.01 % below the best
    )
    if found.x is None:
        raise RuntimeError(f"the integer programme was not solved: {found.message}")
    return [bool(x > 0.5) for x in found.x[:leaves]]


def clusters_of(vectors: np.ndarray, *, cut: float = CUT) -> list[int]:
    """A cluster's number for each vector: average linkage by cosine distance, joined up to `cut`.

    Raises ValueError for vectors that are not finite, or zero, which has no direction.

    >>> clusters_of(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.01]]))
    [0, 1, 0]
    """
    vectors = np.asarray(vectors, dtype=float)
    cut = checks.number("cut", cut, above=0)
    if vectors.ndim != 2 or not np.isfinite(vectors).all() or not np.linalg.norm(vectors, axis=-1).all():
        raise ValueError(f"vectors must be rows of finite numbers, none of them zero, got shape {vectors.shape}")
    if len(vectors) == 1:
        return [0]

    from scipy.cluster.hierarchy import fcluster, linkage

    joined = linkage(vectors, method="average", metric="cosine")
    numbers = fcluster(np.maximum(joined, 0), cut, criterion="distance")  # rounding gives distances below 0
    first = {number: place for place, number in enumerate(dict.fromkeys(numbers.tolist()))}
    return [first[number] for number in numbers.tolist()]


@dataclass(frozen=True)
class Rebase:
    """Reward-proportional allocation: `rebase_counts` of the last steps' scores (arXiv 2408.00724), the baseline."""

    temperature: float = 0.2

    def __call__(self, traces: Sequence[Trace], width: int) -> list[int]:
        """As `Select` has it."""
        return rebase_counts([trace.score for trace in traces], width, temperature=self.temperature)


@dataclass(frozen=True)
class Beam:
    """Beam search: the best go on, ceil(sqrt(width)) of them, equally often; what does not divide goes to the best."""

    def __call__(self, traces: Sequence[Trace], width: int) -> list[int]:
        """As `Select` has it."""
        kept = min(math.isqrt(checks.whole("width", width, low=1) - 1) + 1, len(traces))
        order = sorted(range(len(traces)), key=lambda i: -traces[i].score)
        counts = [0] * len(traces)
        for place, i in enumerate(order[:kept]):
            counts[i] = width // kept + (place < width % kept)
        return counts


@dataclass(frozen=True)
class Ets:
    """ETS: leaves are pruned by `choose`, then REBASE shares the width out among those that are kept (arXiv 2502.13575).

    The reward of a leaf is its share of REBASE's counts. Its ancestors are the texts before it. Equal texts are one node, leaves too, since
    the cache holds them once: equal leaves have one price and their rewards together, and stay or go together (our choice; the released
    code counts every sample). `embed` gives the last steps' vectors, clustered by `clusters_of`, each text once;
    None, lambda_s = 0 (ETS-KV), or texts that are all equal leave the diversity term out. `unit` is what a node costs: 1 ("nodes", as
    released), or its tokens, which the trace's samples must know. lambda_s is the paper's for a width of 16; it takes 1.4 for 64.

    lambda_c = 0 keeps every leaf, so that the result is REBASE's.

    When NOT to use it: where keys and values are not what limits the batch, and where REBASE with fewer trajectories is as accurate.

    >>> short, long = Trace("p", ("a\\n", "b\\n"), scores=(0.5, 0.6)), Trace("p", ("c\\n", "d\\n"), scores=(0.5, 0.3))
    >>> Ets(lambda_c=2.0)([short, long], 4), Rebase()([short, long], 4)
    ([4, 0], [4, 0])
    """

    lambda_c: float = 1.0
    lambda_s: float = 1.5
    embed: Embed | None = None
    temperature: float = 0.2
    cut: float = CUT
    unit: str = "nodes"

    def __post_init__(self) -> None:
        checks.number("lambda_c", self.lambda_c, low=0)
        checks.number("lambda_s", self.lambda_s, low=0)
        checks.choice("unit", self.unit, ("nodes", "tokens"))

    def __call__(self, traces: Sequence[Trace], width: int) -> list[int]:
        """As `Select` has it."""
        kept = self.kept(traces, width)
        counts = iter(
            rebase_counts(
                [trace.score for trace, stays in zip(traces, kept, strict=True) if stays],
                width,
                temperature=self.temperature,
            )
        )
        return [next(counts) if stays else 0 for stays in kept]

    def kept(self, traces: Sequence[Trace], width: int) -> list[bool]:
        """Which traces are kept."""
        counts = rebase_counts([trace.score for trace in traces], width, temperature=self.temperature)
        leaves = {trace.text: trace for trace in traces}
        shares = dict.fromkeys(leaves, 0.0)
        for trace, count in zip(traces, counts, strict=True):
            shares[trace.text] += count / width
        costs = ancestor_costs = None
        if self.unit == "tokens":
            sizes = [[len(sample.tokens) for sample in trace.samples] for trace in leaves.values()]
            costs = [float(own[-1]) for own in sizes]
            ancestor_costs = {
                "".join(trace.steps[:k]): float(own[k - 1])
                for trace, own in zip(leaves.values(), sizes, strict=True) for k in range(1, len(own))
            }  # fmt: skip
        stays = choose(
            list(shares.values()),
            [
                ["".join(leaf.steps[:k]) for k in range(self.unit == "tokens", len(leaf.steps))]
                for leaf in leaves.values()
            ],
            lambda_c=self.lambda_c,
            lambda_s=self.lambda_s,
            clusters=self._clusters([leaf.steps[-1] for leaf in leaves.values()]),
            costs=costs,
            ancestor_costs=ancestor_costs,
        )
        kept = dict(zip(leaves, stays, strict=True))
        return [kept[trace.text] for trace in traces]

    def _clusters(self, texts: Sequence[str]) -> list[int] | None:
        distinct = list(dict.fromkeys(texts))
        if self.embed is None or not self.lambda_s or len(distinct) == 1:
            return None
        vectors = np.asarray(self.embed(distinct))
        if len(vectors) != len(distinct):
            raise ValueError(f"embed must give a vector for each of {len(distinct)} texts, got {len(vectors)}")
        numbers = dict(zip(distinct, clusters_of(vectors, cut=self.cut), strict=True))
        return [numbers[text] for text in texts]
