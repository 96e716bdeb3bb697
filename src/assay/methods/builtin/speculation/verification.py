"""What a model says of a draft: how much of it stands, and the token that comes after that.

Logits of a draft of n tokens are n + 1 rows: row i is what the model says after the first i tokens of the draft. Greedy decoding
keeps the tokens that are the model's own choice. Sampling keeps a token x with probability min(1, p(x) / q(x)), where q is what it
was drawn from, and in place of the first that falls draws from max(p - q, 0), normalised; so every token is distributed as p
(Leviathan, Kalman and Matias 2023, algorithm 1 and appendix A.1; Chen et al. 2023, algorithm 2).

A draft that was not drawn (`q` is None: a look-up, a greedy guess) is a point mass, for which the rule reads: keep x with probability
p(x), else draw from p without x. Drawing a token from p and keeping x if it is the one does just that. It has another merit: the
token drawn is the one that decoding without a draft would have drawn with the same random number. One random number a token is
enough in both cases: what is left of it after a rejection is again uniform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from assay import checks
from assay.methods.builtin.decode_loop import Sampling


def verify(
    logits: Tensor, draft: Sequence[int], q: Tensor | None, sampling: Sampling | None, uniforms: Tensor | None
) -> list[int]:
    """The tokens that the model makes of a draft: those it keeps, then one of its own; 1 to len(draft) + 1 of them.

    `logits` (len(draft) + 1, vocabulary); `q` (len(draft), vocabulary) holds the probabilities that each token of the draft was drawn
    from, or is None for a draft that was not drawn. `sampling` None is greedy, and needs neither `q` nor `uniforms`. `uniforms`
    (len(draft) + 1,) float64 in [0, 1) is one random number for each token that may be made, independent of those that made the
    draft; a caller that keeps what was not used for the next tokens gets, for drafts without `q`, the tokens of decoding without
    drafts. Whatever else bends the distribution (penalties, a bias, forbidden tokens) must be in the logits already, in each row
    as if the draft before it stood.
    Raises TypeError or ValueError for tensors of another shape or kind, tokens outside the vocabulary, numbers outside [0, 1), a token
    with q = 0, and logits that are NaN or leave no token.

    >>> logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> verify(logits, [1, 0], None, None, None), verify(logits, [1, 1], None, None, None), verify(logits, [0, 0], None, None, None)
    ([1, 0, 1], [1, 0], [1])
    """
    count = len(draft)
    checks.tensor("logits", logits, shape=(count + 1, "vocabulary"))
    vocabulary = logits.shape[1]
    draft = [checks.whole("draft", token, low=0, high=vocabulary - 1) for token in draft]
    if sampling is None:
        return _greedy(logits, draft)
    checks.tensor("uniforms", uniforms, shape=(count + 1,))
    assert uniforms is not None
    if q is not None:
        checks.tensor("q", q, shape=(count, vocabulary), empty=True)
    made: list[int] = []
    for place, uniform in enumerate(uniforms.tolist()):
        if not 0 <= uniform < 1:
            raise ValueError(f"uniforms must lie in [0, 1), got {uniform}")
        p = probabilities(logits[place], sampling)
        if place == count:
            made.append(pick(p, uniform))
        elif q is None:
            made.append(pick(p, uniform))
            if made[-1] != draft[place]:
                break
        else:
            keep = acceptance(p, q[place], draft[place])
            if not uniform < keep:
                made.append(pick(residual(p, q[place]), (uniform - keep) / (1 - keep)))
                break
            made.append(draft[place])
    return made


def _greedy(logits: Tensor, draft: list[int]) -> list[int]:
    best, chosen = logits.max(1)
    if bool(best.isnan().any()):
        raise ValueError("logits must be numbers, got NaN among them")
    own = chosen.tolist()
    kept = next((place for place, token in enumerate(draft) if token != own[place]), len(draft))
    return own[: kept + 1]


def acceptance(p: Tensor, q: Tensor, token: int) -> float:
    """The probability with which a token drawn from `q` is kept. Raises ValueError if it cannot have been drawn from it."""
    drawn = float(q[token])
    if not drawn > 0:
        raise ValueError(f"q must be what the draft was drawn from, but token {token} has {drawn} in it")
    return min(1.0, float(p[token]) / drawn)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What the token in place of a rejected one is drawn from, not normalised: p where it is above q, less q."""
    rest = (p - q.to(p)).clamp_min(0)
    return rest if bool(rest.sum() > 0) else p  # p equals q to the last digit, and nothing is rejected but by rounding


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from: (vocabulary,) float64, temperature first, then top-k (0: off), then top-p (1: off).

    Tokens that tie with the last one kept are kept too, and the most probable one whatever top-p is. Raises ValueError for a
    temperature that is not above 0, a top-p outside 0..1, a negative top-k, and logits that are NaN or leave no token.

    >>> probabilities(torch.tensor([0.0, 0.0, -50.0]), Sampling(top_k=2)).tolist()
    [0.5, 0.5, 0.0]
    """
    temperature = checks.number("temperature", sampling.temperature, above=0)
    top_p = checks.number("top_p", sampling.top_p, low=0, high=1)
    top_k = checks.whole("top_k", sampling.top_k, low=0)
    scores = logits.double() / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    found = scores.softmax(0)
    if not bool(found.sum() > 0):  # NaN too
        raise ValueError("logits must be numbers of which at least one is above -inf, got none such or NaN")
    if top_p < 1:
        ordered = found.sort(descending=True).values
        kept = int(((ordered.cumsum(0) - ordered) < top_p).sum())
        found = found.masked_fill(found < ordered[max(kept, 1) - 1], 0)
        found = found / found.sum()
    return found


def pick(weights: Tensor, uniform: float) -> int:
    """The place where the running sum of `weights` (n,), which need not add up to 1, passes `uniform` of the whole.

    >>> [pick(torch.tensor([1.0, 0.0, 3.0]), u) for u in (0.0, 0.2, 0.25, 0.999)]
    [0, 0, 2, 2]
    """
    running = weights.cumsum(0)
    place = int(torch.searchsorted(running, uniform * running[-1], right=True))
    return place if place < len(weights) else int(weights.nonzero()[-1])
