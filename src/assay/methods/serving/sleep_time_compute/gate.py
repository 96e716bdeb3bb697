"""When sleeping is worth it: how predictable questions are from their context, and what that has saved so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from assay import checks
from assay.methods.serving.sleep_time_compute.ledger import PAPER_T


def log_probability(model: Any, context_ids: Sequence[int], question_ids: Sequence[int]) -> float:
    """log p(question | context) in nats under a causal language model of transformers: how predictable a question is.

    The sum over the question's tokens, each behind all that stands before it; one forward pass. Raises ValueError for an empty context
    (the first token of a question needs one before it) or question.
    """
    import torch

    context = [checks.whole("context_ids", token, low=0) for token in context_ids]
    question = [checks.whole("question_ids", token, low=0) for token in question_ids]
    for name, ids in (("context_ids", context), ("question_ids", question)):
        if not ids:
            raise ValueError(f"{name} must hold at least one token, got none")
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(torch.tensor([context + question], device=device)).logits[0, len(context) - 1 : -1]
    chosen = logits.float().log_softmax(-1)[torch.arange(len(question)), torch.tensor(question, device=device)]
    return float(chosen.double().sum())


def predictability(model: Any, tokenizer: Any, context: str, question: str) -> float:
    """`log_probability` of texts. The question is tokenised by itself, behind a space. Raises ValueError for one that is empty."""
    if not question.strip():
        raise ValueError(f"question must not be empty, got {checks.shown(question)}")
    context_ids = tokenizer(context)["input_ids"]
    return log_probability(model, context_ids, tokenizer(" " + question.strip(), add_special_tokens=False)["input_ids"])


def worth_sleeping(sleep_tokens: float, saved: float, uses: float, *, t: float = PAPER_T) -> bool:
    """Whether `uses` questions, each of which saves `saved` tokens, save more than sleeping takes, at t times the price.

    >>> worth_sleeping(60, 12, 1), worth_sleeping(60, 12, 0.4)
    (True, False)
    """
    sleep_tokens, uses = checks.number("sleep_tokens", sleep_tokens, low=0), checks.number("uses", uses, low=0)
    return checks.number("t", t, low=0) * uses * checks.number("saved", saved) > sleep_tokens


@dataclass(frozen=True)
class Gate:
    """What a question has saved by how predictable it was, and from that whether to sleep over a context. Our addition to the paper.

    `levels` are log-probabilities of questions in rising order, `saved` the tokens that a question as predictable as that, or more, but
    less than the next, saves on average: it never falls. Made by `Gate.fitted`.

    >>> gate = Gate.fitted([-9.0, -7.0, -3.0, -2.0], [-1.0, 1.0, 10.0, 14.0])
    >>> gate.expects(-8.0), gate.expects(-2.5), gate.sleeps(-8.0, uses=9, sleep_tokens=60), gate.sleeps(-2.5, uses=9, sleep_tokens=60)
    (-1.0, 10.0, False, True)
    """

    levels: tuple[float, ...]
    saved: tuple[float, ...]

    @classmethod
    def fitted(cls, log_probabilities: Sequence[float], saved: Sequence[float]) -> Gate:
        """The non-decreasing steps that are nearest to what was seen, by least squares (neighbours that fall are pooled).

        Raises ValueError for nothing seen, for lists of different lengths and for what is not finite.
        """
        if len(log_probabilities) != len(saved) or not len(saved):
            raise ValueError(
                f"log_probabilities and saved must be as many, and one at least, got {len(log_probabilities)} and {len(saved)}"
            )
        seen = sorted(
            (checks.number("log_probabilities", p), checks.number("saved", s))
            for p, s in zip(log_probabilities, saved, strict=True)
        )
        pools: list[tuple[float, float, int]] = []  # level, mean, how many
        for level, group in groupby(seen, key=lambda pair: pair[0]):
            values = [s for _, s in group]
            pools.append((level, sum(values) / len(values), len(values)))
            while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
                (first, a, n), (_, b, m) = pools[-2:]
                pools[-2:] = [(first, (n * a + m * b) / (n + m), n + m)]
        return cls(tuple(level for level, _, _ in pools), tuple(mean for _, mean, _ in pools))

    def expects(self, log_probability: float) -> float:
        """Tokens that a question so predictable saves; below all levels, what the least predictable saved."""
        at = int(np.searchsorted(self.levels, checks.number("log_probability", log_probability), side="right")) - 1
        return self.saved[max(at, 0)]

    def sleeps(self, log_probability: float, *, uses: float, sleep_tokens: float, t: float = PAPER_T) -> bool:
        """Whether a context whose questions are so predictable, and of which `uses` are expected, is worth `sleep_tokens`."""
        return worth_sleeping(sleep_tokens, self.expects(log_probability), uses, t=t)
