"""Predictors that know nothing of a program's meaning: what a model has to beat. They answer as a model does, with "Output:" before it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from assay.methods.code.surge.items import Item, continued
from assay.methods.code.surge.scores import score

Predictor = Callable[[Item], str]
_TOKENS = re.compile(r"[A-Za-z_]\w*|\d+|[^\w\s]")


def empty(item: Item) -> str:
    """Nothing at all."""
    return ""


def copied(item: Item) -> str:
    """The program's own input: its stdin, or the arguments that stand in it."""
    return continued(item.stdin or item.given)


def constant(learned: Sequence[Item]) -> Predictor:
    """The most frequent truth of the learned items of a component (the first of several); nothing for a component without any.

    >>> a = Item("a", "ML", "c", "a", "c", {"main.c": "x"}, "gcc main.c", "1")
    >>> constant([a])(a)
    'Output:\\n```\\n1\\n```\\n'
    """
    truths = _by_component(learned, lambda items: Counter(item.truth for item in items).most_common(1)[0][0])
    return lambda item: continued(truths.get(item.component, ""))


def nearest(learned: Sequence[Item]) -> Predictor:
    """The truth of the learned item of the component whose tokens are most like: code, command and input, each token as often as it stands.

    Likeness is the Jaccard index of the two multisets. The item's own group is never looked at.
    """
    known = [(item, _tokens(item)) for item in learned]

    def predict(item: Item) -> str:
        own = _tokens(item)
        best, answer = -1.0, ""
        for other, tokens in known:
            if other.component == item.component and other.group != item.group:
                alike = (own & tokens).total() / max((own | tokens).total(), 1)
                if alike > best:
                    best, answer = alike, other.truth
        return continued(answer)

    return predict


def template(learned: Sequence[Item], *, share: float = 0.5) -> Predictor:
    """The words that at least this share of the learned truths of a component and language have, in the order of the first that has most.

    It is the boilerplate of error texts: what the Jaccard of words gives away. Half is our choice.
    """
    held: dict[tuple[str, str], list[str]] = {}
    for item in learned:
        held.setdefault((item.component, item.language), []).append(item.truth)
    made = {}
    for key, truths in held.items():
        seen = Counter(word for truth in truths for word in set(truth.split()))
        often = {word for word, count in seen.items() if count >= share * len(truths)}
        fullest = max(truths, key=lambda truth: len(often & set(truth.split())))
        made[key] = " ".join(dict.fromkeys(word for word in fullest.split() if word in often))
    return lambda item: continued(made.get((item.component, item.language), ""))


BASELINES: Mapping[str, Callable[[Sequence[Item]], Predictor]] = {
    "empty": lambda learned: empty,
    "constant": constant,
    "nearest neighbour": nearest,
    "error template": template,
    "input copied": lambda learned: copied,
}
"""The trivial predictors by name, each made from the learned part."""


def strongest(learned: Sequence[Item]) -> dict[str, str]:
    """The name of the best baseline of each component, by its score on learned items that it did not see: one group left out at a time.

    Nothing is chosen on judged items. Raises ValueError for fewer than two groups.
    """
    groups = sorted({item.group for item in learned})
    if len(groups) < 2:
        raise ValueError(f"learned must hold two groups or more, got {groups}")
    totals = {item.component: dict.fromkeys(BASELINES, 0.0) for item in learned}
    for group in groups:
        rest = [item for item in learned if item.group != group]
        out = [item for item in learned if item.group == group]
        for name, make in BASELINES.items():
            predict = make(rest)
            for item in out:
                totals[item.component][name] += score(item, predict(item)).value
    return {component: max(seen, key=seen.__getitem__) for component, seen in totals.items()}


def _tokens(item: Item) -> Counter[str]:
    return Counter(_TOKENS.findall(f"{item.code}\n{item.command}\n{item.given}"))


def _by_component(learned: Sequence[Item], make: Callable[[list[Item]], str]) -> dict[str, str]:
    held: dict[str, list[Item]] = {}
    for item in learned:
        held.setdefault(item.component, []).append(item)
    return {component: make(items) for component, items in held.items()}
