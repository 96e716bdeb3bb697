"""How a row's next token is chosen from logits, and what is told of it.

Penalties are OpenAI's: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the answer's own tokens. Log-probabilities are
those of the model's own logits, whatever was added to them for the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from assay import checks
from assay.methods.builtin.decode_loop import Sampling, draw_in_torch
from assay.server.rows import Row, TokenInfo


def not_finite() -> FloatingPointError:
    """What a row ends with whose logits are NaN or infinity."""
    return FloatingPointError("the model's logits are not finite")


def chosen(logits: Tensor, sampling: Sequence[Sampling | None] | None, uniforms: Tensor | None) -> Tensor:
    """A token (rows,) int64 for each row of logits (rows, vocab): the best, or drawn by the row's number in `uniforms` (rows,)."""
    tokens = logits.argmax(1)
    groups: dict[Sampling, list[int]] = {}
    for row, how in enumerate(sampling or ()):
        if how is not None:
            groups.setdefault(how, []).append(row)
    for how, rows in groups.items():
        assert uniforms is not None
        tokens[rows] = draw_in_torch(logits[rows], how, uniforms[rows])
    return tokens


def uniforms_of(rows: Sequence[Row], steps: int) -> Tensor:
    """(rows, steps) float64: the numbers that decide each row's next tokens, zero where nothing is drawn."""
    table = np.zeros((len(rows), steps))
    for line, row in zip(table, rows, strict=True):
        if row.uniforms is not None:
            line[:] = row.uniforms[len(row.made) : len(row.made) + steps]
    return torch.from_numpy(table)


def choose(rows: Sequence[Row], logits: Tensor) -> list[tuple[int, list[TokenInfo]] | Exception]:
    """Each row's next token and what is told of it, or why it has none; `logits` (rows, vocab) are left as they are."""
    adjusted = logits
    if any(row.held_back() or row.settings.adjusts or row.settings.choose is not None for row in rows):
        adjusted = logits.clone()
        for row, scores in zip(rows, adjusted, strict=True):
            _adjust(row, scores)
    finite = torch.isfinite(adjusted.amax(1)).tolist()
    sampling = [None if row.settings.choose is not None else row.sampling for row in rows]
    drawn = any(how is not None for how in sampling)
    tokens = chosen(adjusted, sampling, uniforms_of(rows, 1)[:, 0] if drawn else None).tolist()
    failed: dict[int, Exception] = {}
    for i, row in enumerate(rows):
        try:
            if not finite[i]:
                raise not_finite()
            if row.settings.choose is not None:
                token = row.settings.choose(adjusted[i], list(row.made))
                tokens[i] = checks.whole("choose", token, low=0, high=logits.shape[1] - 1)
        except Exception as error:
            failed[i] = error
    telling = [i for i, row in enumerate(rows) if row.settings.logprobs is not None and i not in failed]
    told: dict[int, TokenInfo] = {}
    if telling:
        most = max(rows[i].settings.logprobs or 0 for i in telling)
        told = dict(zip(telling, infos_of(logits[telling], [tokens[i] for i in telling], most), strict=True))
    found: list[tuple[int, list[TokenInfo]] | Exception] = []
    for i, row in enumerate(rows):
        if i in failed:
            found.append(failed[i])
            continue
        _count(row, tokens[i])
        info = told.get(i)
        own = [] if info is None else [TokenInfo(info.token, info.logprob, info.top[: row.settings.logprobs])]
        found.append((tokens[i], own))
    return found


def infos_of(logits: Tensor, tokens: list[int], most: int) -> list[TokenInfo]:
    """What the model's logits (rows, vocab) say of one token a row, and of the `most` best beside it."""
    if not tokens:
        return []
    known = torch.tensor(tokens)
    total = logits.logsumexp(1, keepdim=True)
    found = (logits.gather(1, known[:, None]) - total)[:, 0].tolist()
    best = logits.topk(most)
    values, indices = (best.values - total).tolist(), best.indices.tolist()
    rows = zip(tokens, found, indices, values, strict=True)
    return [TokenInfo(token, logprob, tuple(zip(top, at, strict=True))) for token, logprob, top, at in rows]


def _adjust(row: Row, scores: Tensor) -> None:
    """Add bias and penalties to a row's logits (vocab,), and take its end tokens out while it may not end."""
    settings = row.settings
    if settings.adjusts:
        if row.adjust is None:
            row.adjust = torch.zeros(len(scores))
            for token, bias in settings.logit_bias.items():
                row.adjust[token] = bias
        scores += row.adjust
    if row.held_back():
        scores[list(settings.ends)] = -torch.inf


def _count(row: Row, token: int) -> None:
    """The penalties of one more token."""
    settings = row.settings
    if row.adjust is not None and (settings.presence_penalty or settings.frequency_penalty):
        row.adjust[token] -= settings.frequency_penalty + (0.0 if token in row.seen else settings.presence_penalty)
        row.seen.add(token)
