"""Which blocks do the same, though their weights differ: compared by the next-token distributions that come of them.

    found = scores(zoo, ids)                                  # of layers at the same depth, over a probe text
    chains = substituted(zoo, found, threshold=0.98)          # one block for each class
    SharedModel(zoo, chains)

Hidden states are no measure: a few huge dimensions make everything look alike. Sharing an equivalent block changes the answers; how much is
to be measured at the threshold chosen. Keys and values are of the chain as it runs: a row's cache is read by the blocks that made it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay import checks
from assay.methods.core.models.decoder import parts_of
from assay.methods.serving.blockllm.zoo import Chain, Zoo, layer

THRESHOLD = 0.98  # our choice
Scores = Mapping[tuple[str, str], float]


@torch.no_grad()
def scores(zoo: Zoo, ids: Tensor, *, reach: int = 0) -> dict[tuple[str, str], float]:
    """How alike layers are, both ways round: the mean over the tokens of the cosine of the two distributions over the vocabulary that the
    first model's last norm and head make of what each layer makes of the same hidden states, those of the first model at that depth.

    `ids` (rows, tokens) are the probe. Layers at most `reach` apart in depth are compared, at the hidden states of the lesser depth; what
    adapters change is not looked at. Raises ValueError for a zoo without models or with adapters only, and for models that are not
    built as Llama's are.
    """
    checks.tensor("ids", ids, ndim=2, dtype="integer")
    reach = checks.whole("reach", reach, low=0)
    names = list(zoo.chains)
    if not names:
        raise ValueError("zoo must have at least one model, got none")
    models: dict[str, Any] = {name: parts_of(zoo.monolith(name)) for name in names if not zoo.chains[name].adapters}
    if not models:
        raise ValueError("zoo must have a model without an adapter")
    first = next(iter(models.values()))
    states, run = [], first.begin(ids)
    x = run.hidden
    for index in range(len(first.layers)):
        states.append(x)
        x = first.layer(index, x, run)
    owner: dict[str, tuple[str, int]] = {}  # of a digest: a model that has it, and where
    for name in models:
        for index in range(len(states)):
            owner.setdefault(zoo.chains[name].blocks[layer(index)], (name, index))
    said: dict[tuple[str, int], Tensor] = {}

    def distribution(digest: str, at: int) -> Tensor:
        if (digest, at) not in said:
            name, index = owner[digest]
            begun = models[name].begin(inputs_embeds=states[at])
            out = models[name].layer(index, states[at], begun)
            said[digest, at] = F.normalize(first.logits(first.norm(out)).float().softmax(-1), dim=-1)
        return said[digest, at]

    found: dict[tuple[str, str], float] = {}
    listed = sorted(owner, key=lambda digest: owner[digest][1])
    for i, a in enumerate(listed):
        found[a, a] = 1.0
        for key in [key for key in said if key[1] < owner[a][1] - reach]:
            del said[key]
        for b in listed[i + 1 :]:
            if owner[b][1] - owner[a][1] > reach:
                break
            at = owner[a][1]
            alike = (distribution(a, at) * distribution(b, at)).sum(-1).mean()
            found[a, b] = found[b, a] = min(float(alike), 1.0)
    return found


def classes(digests: list[str], found: Scores, threshold: float) -> list[list[str]]:
    """Blocks in classes in which every two have at least `threshold`: complete linkage, the best pair of classes joined first.

    Lower thresholds join classes further and never part them; above 1 every block stands alone. Pairs without a score, or whose score
    is NaN, are not alike.
    """
    limit = checks.number("threshold", threshold)
    number = {digest: i for i, digest in enumerate(digests)}
    near: dict[int, dict[int, float]] = {
        i: {} for i in number.values()
    }  # classes that may be joined, by their first blocks
    if limit <= 1:
        for (a, b), value in found.items():
            i, j = number.get(a, -1), number.get(b, -1)
            if i >= 0 and j >= 0 and i != j and value >= limit:
                near[i][j] = near[j][i] = value
    groups = {i: [digest] for digest, i in number.items()}
    best = [(-value, i, j) for i, others in near.items() for j, value in others.items() if j < i]
    heapq.heapify(best)
    while best:
        value, i, j = heapq.heappop(best)
        if near.get(i, {}).get(j) != -value:
            continue  # one of them was joined meanwhile
        first, then = near.pop(j), near.pop(i)
        groups[j] += groups.pop(i)
        for k in {*first, *then} - {i, j}:
            near[k].pop(i, None)
            near[k].pop(j, None)
        near[j] = {k: min(alike, then[k]) for k, alike in first.items() if k in then}
        for k, alike in near[j].items():
            near[k][j] = alike
            heapq.heappush(best, (-alike, max(j, k), min(j, k)))
    return [groups[i] for i in sorted(groups)]


def substituted(zoo: Zoo, found: Scores, threshold: float = THRESHOLD) -> dict[str, Chain]:
    """The zoo's chains with one block of each class of layers in place of all of it: the one that most models have, the first of several.

    Embeddings, heads and adapters stay. Above 1 the chains are the zoo's own.
    """
    used: dict[str, int] = {}
    for one in zoo.chains.values():
        for place, digest in one.blocks.items():
            if place.startswith("layer "):
                used[digest] = used.get(digest, 0) + 1
    instead: dict[str, str] = {}
    for group in classes(list(used), found, threshold):
        best = max(group, key=lambda digest: used[digest])
        instead |= dict.fromkeys(group, best)
    return {
        name: Chain({place: instead.get(digest, digest) for place, digest in one.blocks.items()}, dict(one.adapters))
        for name, one in zoo.chains.items()
    }


def distinct_bytes(zoo: Zoo, chains: Mapping[str, Chain]) -> int:
    """Bytes of the distinct blocks of these chains."""
    digests = set().union(*(one.digests() for one in chains.values())) if chains else set()
    return sum(zoo.blocks[digest].bytes for digest in digests)
