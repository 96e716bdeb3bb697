"""Sequences for small models trained here: bytes of real text, and the synthetic tasks that tell mixers apart.

Inputs and targets are int64 (n, length); targets stand at the position that has to predict them, -100 where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from assay.workloads.text import Kind, Part, _joined

ASKED_NOTHING = -100


@cache
def text_bytes(kind: Kind, part: Part) -> Tensor:
    """The UTF-8 bytes of one part of the bundled text, int64."""
    return torch.frombuffer(bytearray(_joined(kind, part).encode()), dtype=torch.uint8).long()


def byte_batches(
    length: int, batch: int, *, kind: Kind = "code", part: Part = "prompts", seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets) of random windows of `length` bytes; the targets are the next bytes. Vocabulary 256."""
    data = text_bytes(kind, part)
    generator = torch.Generator().manual_seed(seed)
    _check(length=length, batch=batch)
    while True:
        starts = torch.randint(len(data) - length, (batch,), generator=generator)
        windows = torch.stack([data[s : s + length + 1] for s in starts.tolist()])
        yield windows[:, :-1], windows[:, 1:]


def byte_windows(length: int, n: int, *, kind: Kind = "code", part: Part = "heldout") -> tuple[Tensor, Tensor]:
    """`n` windows (inputs, targets) of `length` bytes, evenly spread over one part of the text."""
    _check(length=length, n=n)
    data = text_bytes(kind, part)
    starts = torch.linspace(0, len(data) - length - 1, n).long()
    windows = torch.stack([data[s : s + length + 1] for s in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


def repeated_ngrams(inputs: Tensor, targets: Tensor, n: int = 8) -> Tensor:
    """(n, length) bool: positions whose target ends an n-gram that stood in the window before: there recall can help."""
    whole = torch.cat([inputs, targets[:, -1:]], 1).tolist()
    found = torch.zeros_like(targets, dtype=torch.bool)
    for row, values in enumerate(whole):
        seen: set[tuple[int, ...]] = set()
        for end in range(n, len(values) + 1):
            gram = tuple(values[end - n : end])
            if gram in seen and end >= 2:
                found[row, end - 2] = True
            seen.add(gram)
    return found


def associative_recall(
    n: int, *, length: int = 128, pairs: int = 8, vocab: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: key-value pairs first, then each key again at a random place, asking for its value.

    Token 0 fills the rest; keys come from the lower half of the vocabulary, values from the upper, none twice in a sequence. The
    answers stand in the targets alone: an answer among the inputs would tell later questions which values are used up, and training
    stalls on guessing among the others (1/2 right with 4 pairs, 1/3 with 8). A model whose state cannot hold `pairs` pairs must fail,
    and one that knows only which values stood there is right 1 / `pairs` of the time. After "Zoology" (arXiv 2312.04927), whose
    questions come at distances of a power law; here they come uniformly, and the filler says nothing (`our choice`).
    Raises ValueError when the pairs do not fit the length or the vocabulary.
    """
    _check(n=n, length=length, pairs=pairs)
    half = vocab // 2
    most = min(length // 3, half - 1)
    if pairs > most:
        raise ValueError(f"pairs must be at most {most} at length {length} and vocab {vocab}, got {pairs}")
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.zeros(n, length, dtype=torch.int64)
    targets = torch.full((n, length), ASKED_NOTHING)
    for row in range(n):
        keys = torch.randperm(half - 1, generator=generator)[:pairs] + 1
        values = torch.randperm(vocab - half, generator=generator)[:pairs] + half
        inputs[row, 0 : 2 * pairs : 2], inputs[row, 1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + torch.randperm(length - 2 * pairs, generator=generator)[:pairs]
        inputs[row, places], targets[row, places] = keys, values
    return inputs, targets


def selective_copying(
    n: int, *, length: int = 128, tokens: int = 8, vocab: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Copy the `tokens` data tokens, scattered over noise (token 0), in their order, at the marks (token 1) at the end.

    The task of the Mamba paper (arXiv 2312.00752). Raises ValueError when the tokens do not fit.
    """
    _check(n=n, length=length, tokens=tokens)
    if 2 * tokens > length or vocab < 4:
        raise ValueError(
            f"tokens must be at most {length // 2} at length {length}, and vocab at least 4, got {tokens}, {vocab}"
        )
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.zeros(n, length, dtype=torch.int64)
    targets = torch.full((n, length), ASKED_NOTHING)
    for row in range(n):
        data = torch.randint(2, vocab, (tokens,), generator=generator)
        places = torch.randperm(length - tokens, generator=generator)[:tokens].sort().values
        inputs[row, places] = data
        inputs[row, -tokens:] = 1
        targets[row, -tokens:] = data
    return inputs, targets


def batches_of(
    task: Callable[..., tuple[Tensor, Tensor]], batch: int, *, seed: int = 1, **options: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless fresh batches of a task; seeds count up from `seed`, so that an evaluation set with seed 0 stays unseen."""
    while True:
        yield task(batch, seed=seed, **options)
        seed += 1


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
