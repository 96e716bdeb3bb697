"""Where a text is cut into groups: by the base model's own uncertainty about each token, in nats.

Tokens that are nearly certain join the group before them, uncertain ones begin a new one. The strategies are those of the released
code; "decreasing_v2" is the one its models were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from assay import checks
from assay.methods.core.generation.cache import position_ids

MAX_STEPS = 4
RELEASED_VOCABULARY = 128256  # Llama 3's, by which the released thresholds were computed
PADDING = -1  # the group of a token that is none


def entropy_of_confidence(confidence: float, vocabulary: int = RELEASED_VOCABULARY) -> float:
    """The entropy (nats) of a prediction that gives `confidence` to one token and the rest evenly to all others.

    H(c) = -[c ln c + (1 - c) ln((1 - c) / (V - 1))]. Raises ValueError for a confidence outside (0, 1] and fewer than two tokens.

    >>> round(entropy_of_confidence(0.95), 4), entropy_of_confidence(1.0), round(entropy_of_confidence(0.5, 2), 4)
    (0.7866, 0.0, 0.6931)
    """
    c = checks.number("confidence", confidence, above=0, high=1)
    others = checks.whole("vocabulary", vocabulary, low=2) - 1
    if c == 1:
        return 0.0
    return -(c * math.log(c) + (1 - c) * math.log((1 - c) / others))


def _decreasing_v2(values: Sequence[float], most: int, threshold: float, ratio: float) -> list[int]:
    sizes, size, largest = [], 0, -1.0
    for value in values:
        if size < most and (value < threshold or value < ratio * largest):
            size, largest = size + 1, max(largest, value)
            continue
        if size:
            sizes.append(size)
        size, largest = 1, value
    return [*sizes, size] if size else sizes


def _decreasing(values: Sequence[float], most: int, threshold: float, ratio: float) -> list[int]:
    sizes: list[int] = []
    first = 0.0
    for value in values:
        if sizes and sizes[-1] < most and value <= ratio * first:
            sizes[-1] += 1
        else:
            sizes.append(1)
            first = value
    return sizes


def _sliding(values: Sequence[float], most: int, threshold: float, ratio: float) -> list[int]:
    sizes: list[int] = []
    for value in values:
        if sizes and sizes[-1] < most and value < threshold:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


def _small_group(values: Sequence[float], most: int, threshold: float, ratio: float) -> list[int]:
    sizes: list[int] = []
    sure = False  # whether the last group is one of certain tokens
    for value in values:
        if not value <= threshold:
            sizes.append(1)
            sure = False
        elif sure and sizes[-1] < most:
            sizes[-1] += 1
        else:
            sizes.append(1)
            sure = True
    return sizes


Strategy = Callable[[Sequence[float], int, float, float], list[int]]
# strategy: how it cuts, and the confidence that its threshold stands for (None: a number of its own)
STRATEGIES: dict[str, tuple[Strategy, float | None]] = {
    "decreasing_v2": (_decreasing_v2, None),
    "decreasing": (_decreasing, None),
    "sliding": (_sliding, 0.7),
    "small_group": (_small_group, 0.95),
}
THRESHOLD, RATIO = 0.05, 0.3  # of "decreasing_v2"


def segment(
    entropies: Sequence[float] | Tensor,
    *,
    strategy: str = "decreasing_v2",
    max_steps: int = MAX_STEPS,
    threshold: float | None = None,
    ratio: float = RATIO,
    vocabulary: int = RELEASED_VOCABULARY,
) -> list[int]:
    """The sizes of the groups, in order, of tokens whose predictions had `entropies` (nats); 1 to `max_steps` each, and all tokens in all.

    - "decreasing_v2": a token joins the group if its entropy is below `threshold` (0.05) or below `ratio` (0.3) of the largest in it.
    - "decreasing": if it is at most `ratio` of the group's first.
    - "sliding": if it is below `threshold` (that of a confidence of 0.7).
    - "small_group": only tokens at most `threshold` (that of a confidence of 0.95) form groups; every other stands alone.

    `threshold` None is the strategy's own; for the last two it depends on the size of the `vocabulary`. Raises ValueError for an unknown
    strategy, a NaN among the entropies, a negative threshold or ratio, and `max_steps` below 1.

    >>> segment([2.0, 0.1, 0.01, 1.5, 1.4, 0.3])
    [3, 1, 2]
    >>> segment([2.0, 0.1, 0.01], threshold=0.0, ratio=0.0), segment([2.0] * 6, threshold=float("inf"))
    ([1, 1, 1], [4, 2])
    """
    cut, confidence = STRATEGIES[checks.choice("strategy", strategy, STRATEGIES)]
    most = checks.whole("max_steps", max_steps, low=1)
    ratio = checks.number("ratio", ratio, low=0)
    if threshold is None:
        threshold = THRESHOLD if confidence is None else entropy_of_confidence(confidence, vocabulary)
    elif threshold != math.inf:
        threshold = checks.number("threshold", threshold, low=0)
    values = [float(value) for value in (entropies.tolist() if isinstance(entropies, Tensor) else entropies)]
    if any(math.isnan(value) for value in values):
        raise ValueError("entropies must be numbers, got NaN among them")
    return cut(values, most, threshold, ratio)


@torch.no_grad()
def token_entropies(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """How uncertain `model`, a causal language model, was of each token before it saw it: (batch, tokens) float32, nats.

    The first token of a row, which nothing predicts, has infinity, and so has padding on its left. A model that says NaN is uncertain by
    NaN, which `segment` refuses. Raises what `model` raises.
    """
    more = {}
    if attention_mask is not None:
        more = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    logits = model(input_ids=input_ids, use_cache=False, **more).logits[:, :-1].float()
    found = torch.full(input_ids.shape, math.inf, device=logits.device)
    found[:, 1:] = torch.special.entr(logits.softmax(-1)).sum(-1)
    if attention_mask is not None:
        found.masked_fill_((attention_mask.long().cumsum(-1) <= 1).to(found.device), math.inf)
    return found


def group_ids(sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The number of the group that each token belongs to: (tokens,) int64, counted from 0.

    >>> group_ids([1, 3, 2]).tolist()
    [0, 1, 1, 1, 2, 2]
    """
    counts = torch.tensor(list(sizes), dtype=torch.int64, device=device)
    return torch.arange(len(counts), device=device).repeat_interleave(counts)


def grouped(
    entropies: Tensor, prompt_tokens: int | Sequence[int] = 1, attention_mask: Tensor | None = None, **how: Any
) -> Tensor:
    """The groups of whole rows: (batch, tokens) int64 group numbers, -1 on padding.

    The first `prompt_tokens` tokens of a row (one number, or one a row) are groups of their own, as the mechanism reads prompts; the
    rest is cut by `segment(..., **how)`. `entropies` (batch, tokens) are in nats, `attention_mask` is 0 on padding.
    Raises ValueError for fewer than one prompt token and what `segment` raises.

    >>> grouped(torch.tensor([[9.0, 2.0, 0.1, 0.1, 2.0]])).tolist()
    [[0, 1, 1, 1, 2]]
    """
    checks.tensor("entropies", entropies, shape=("batch", "tokens"))
    rows, width = entropies.shape
    heads = [prompt_tokens] * rows if isinstance(prompt_tokens, int) else list(prompt_tokens)
    if len(heads) != rows:
        raise ValueError(f"prompt_tokens must be one number or one for each of {rows} rows, got {len(heads)}")
    made = torch.full((rows, width), PADDING)
    there = torch.ones(rows, width, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
    for row, (values, head) in enumerate(zip(entropies.cpu(), heads, strict=True)):
        own = values[there[row]].tolist()
        head = min(checks.whole("prompt_tokens", head, low=1), len(own))
        made[row, there[row]] = group_ids([1] * head + segment(own[head:], **how))
    return made.to(entropies.device)
