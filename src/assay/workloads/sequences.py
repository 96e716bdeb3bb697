"""Sequences for small models trained here: bytes of real text, and the synthetic tasks that tell mixers apart.

Inputs and targets are int64 (n, length); targets stand at the position that has to predict them, -100 where nothing is asked.
`pathfinder` alone is about pictures, whose pixels are read as a sequence: float32 images and one label each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from assay import checks
from assay.workloads.text import KINDS, PARTS, Kind, Part, _joined

ASKED_NOTHING = -100


@cache
def text_bytes(kind: Kind, part: Part) -> Tensor:
    """The UTF-8 bytes of one part of the bundled text, int64. Raises ValueError for another kind or part."""
    checks.choice("kind", kind, KINDS)
    checks.choice("part", part, PARTS)
    return torch.frombuffer(bytearray(_joined(kind, part).encode()), dtype=torch.uint8).long()


def byte_batches(
    length: int, batch: int, *, kind: Kind = "code", part: Part = "prompts", seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets) of random windows of `length` bytes; the targets are the next bytes. Vocabulary 256.

    Raises ValueError for counts below 1 and more bytes than the text has, TypeError for anything but a whole number; both when it is
    called, not at the first batch.
    """
    data = text_bytes(kind, part)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    length = checks.whole("length", length, low=1, high=len(data) - 1)
    (batch,) = _counts(batch=batch)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            starts = torch.randint(len(data) - length, (batch,), generator=generator)
            windows = torch.stack([data[s : s + length + 1] for s in starts.tolist()])
            yield windows[:, :-1], windows[:, 1:]

    return batches()


def byte_windows(length: int, n: int, *, kind: Kind = "code", part: Part = "heldout") -> tuple[Tensor, Tensor]:
    """`n` windows (inputs, targets) of `length` bytes, evenly spread over one part of the text. Raises as `byte_batches`.

    >>> inputs, targets = byte_windows(16, 3)
    >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
    (torch.Size([3, 16]), True)
    """
    data = text_bytes(kind, part)
    (n,) = _counts(n=n)
    length = checks.whole("length", length, low=1, high=len(data) - 1)
    starts = torch.linspace(0, len(data) - length - 1, n).long()
    windows = torch.stack([data[s : s + length + 1] for s in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


def repeated_ngrams(inputs: Tensor, targets: Tensor, n: int = 8) -> Tensor:
    """(n, length) bool: positions whose target ends an n-gram that stood in the window before: there recall can help.

    `inputs` and `targets` are whole numbers (n, length), as `byte_windows` gives them. Raises ValueError and TypeError for others.

    >>> row = torch.tensor([[1, 2, 3, 1, 2]])
    >>> repeated_ngrams(row[:, :-1], row[:, 1:], n=2)
    tensor([[False, False, False,  True]])
    """
    checks.tensor("inputs", inputs, ndim=2, dtype="integer")
    checks.tensor("targets", targets, shape=tuple(inputs.shape), dtype="integer")
    (n,) = _counts(n=n)
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
    Raises ValueError when the pairs do not fit the length or the vocabulary, TypeError for anything but a whole number.

    >>> inputs, targets = associative_recall(2, length=32, pairs=4)
    >>> int((targets != ASKED_NOTHING).sum())
    8
    """
    n, length, pairs, vocab = _counts(n=n, length=length, pairs=pairs, vocab=vocab)
    seed = checks.whole("seed", seed)
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

    The task of the Mamba paper (arXiv 2312.00752). Raises ValueError when the tokens do not fit, TypeError for anything but
    a whole number.

    >>> inputs, targets = selective_copying(2, length=32, tokens=4)
    >>> bool((inputs[0][inputs[0] > 1] == targets[0, -4:]).all())
    True
    """
    n, length, tokens, vocab = _counts(n=n, length=length, tokens=tokens, vocab=vocab)
    seed = checks.whole("seed", seed)
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


# --------------------------------------------------------------------------------------------------------------- pathfinder

TRIES = 100  # of a path's place, and of a scene


def pathfinder(
    n: int, side: int, *, seed: int = 0, distractors: int | None = None, dashes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Are the two dots joined by a dashed path? Images float32 (n, side, side) in [0, 1], labels int64 (n,): 1 for yes.

    A scene has two dashed, winding paths of `dashes` dashes and `distractors` shorter ones (a third of that), none touching
    another; the dots are the two ends of one long path, or one end of each. The task is that of Linsley et al. (2018,
    arXiv 1805.08315), which Path-X (side 128) and Path256 are sides of. The code is our own, and what is not in that description is
    `our choice`: how lengths and counts go with the side (`pathfinder_sizes`), how sharply a path turns, antialiasing, and that
    both choices of dots of a scene have nearly the same distance, so that how far the dots are apart tells nothing.
    Raises ValueError for a side below 16, fewer than 2 dashes, or paths that find no place; TypeError for anything but a whole number.
    """
    (n,) = _counts(n=n)
    side = checks.whole("side", side, low=16)
    sizes = pathfinder_sizes(side)
    dashes = int(sizes["dashes"]) if dashes is None else checks.whole("dashes", dashes, low=2)
    distractors = int(sizes["distractors"]) if distractors is None else checks.whole("distractors", distractors, low=0)
    generator = np.random.default_rng(checks.whole("seed", seed, low=0))
    images, labels = np.empty((n, side, side), np.float32), generator.integers(0, 2, n)
    for i in range(n):
        paths, dots = _scene(side, dashes, distractors, bool(labels[i]), generator)
        images[i] = _drawn(side, paths, dots)
    return torch.from_numpy(images), torch.from_numpy(labels)


def pathfinder_sizes(side: int) -> dict[str, float]:
    """Pixels and counts for one side: a dash, the gap after it, half a line's width, a dot's radius, space between paths.

    At 256 a dash of 8, gaps of 4, lines of 2 and dots of 4 pixels, and a path of 16 dashes, three quarters of the side, among 16
    distractors; smaller sides have the same in proportion until a dash has two pixels, then fewer dashes.
    """
    dash = max(2.0, side / 32)
    return {
        "dash": dash,
        "gap": dash / 2,
        "half_width": max(0.5, side / 256),
        "dot": max(1.25, side / 64),
        "space": 1.25 * dash,
        "dashes": round(0.75 * side / (1.5 * dash)),
        "distractors": min(16, side // 8),
    }


def _scene(
    side: int, dashes: int, distractors: int, joined: bool, generator: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Paths, each (dashes, 2 ends, 2) in pixels, the two long ones first, and the two dots (2, 2)."""
    for _ in range(TRIES):
        long = _placed(side, [dashes] * 2, [], generator)
        if long is None:
            continue
        ends = [(path[0, 0], path[-1, 1]) for path in long]
        together = np.linalg.norm(ends[0][0] - ends[0][1])
        pairs = [(a, b) for a in ends[0] for b in ends[1]]
        apart = np.array([np.linalg.norm(a - b) for a, b in pairs])
        nearest = int(np.abs(apart - together).argmin())
        if abs(apart[nearest] - together) > 0.1 * together:
            continue
        paths = _placed(side, [max(1, dashes // 3)] * distractors, long, generator)
        if paths is not None:
            return paths, np.array(ends[0] if joined else pairs[nearest])
    raise ValueError(
        f"dashes ({dashes}) and distractors ({distractors}) find no place on {side} x {side} pixels: take fewer"
    )


def _placed(
    side: int, lengths: list[int], others: list[np.ndarray], generator: np.random.Generator
) -> list[np.ndarray] | None:
    """`others` and a path of each length, all with `space` between them, or None when one found no place."""
    sizes = pathfinder_sizes(side)
    step, margin, space = sizes["dash"] + sizes["gap"], sizes["dot"] + 0.5, sizes["space"]
    paths = list(others)
    for dashes in lengths:
        turns = generator.normal(0, 0.35, (TRIES, dashes))  # radians a dash: winding, without sharp corners
        angles = generator.uniform(0, 2 * np.pi, (TRIES, 1)) + turns.cumsum(1)
        directions = np.stack([np.cos(angles), np.sin(angles)], -1)
        starts = step * (directions.cumsum(1) - directions)
        tried = np.stack([starts, starts + sizes["dash"] * directions], 2)  # (tries, dashes, 2 ends, 2)
        low, high = tried.min((1, 2)), tried.max((1, 2))
        room = side - 2 * margin - (high - low)
        tried = tried + (margin - low + generator.uniform(0, 1, room.shape) * room)[:, None, None]
        taken = np.concatenate([_points(path) for path in paths]) if paths else np.empty((0, 2))
        for path in tried[(room >= 0).all(1)]:
            points = _points(path)
            if len(taken) and (_distances(points, taken) < space).any():
                continue
            own = _distances(points, points).reshape(dashes, 3, dashes, 3).min((1, 3))
            if not (own[np.triu_indices(dashes, 2)] < space).any():  # beyond the next dash
                paths.append(path)
                break
        else:
            return None
    return paths


def _points(path: np.ndarray) -> np.ndarray:
    """Start, middle and end of each dash: (3 * dashes, 2)."""
    return np.stack([path[:, 0], path.mean(1), path[:, 1]], 1).reshape(-1, 2)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


def _drawn(side: int, paths: list[np.ndarray], dots: np.ndarray) -> np.ndarray:
    """White dashes and dots on black, edges one pixel soft: (side, side) float32."""
    sizes = pathfinder_sizes(side)
    image = np.zeros((side, side), np.float32)
    segments = [(a, b, sizes["half_width"]) for a, b in np.concatenate(paths)] + [(d, d, sizes["dot"]) for d in dots]
    for a, b, radius in segments:
        first = np.maximum(np.floor(np.minimum(a, b) - radius - 1).astype(int), 0)
        last = np.minimum(np.ceil(np.maximum(a, b) + radius + 1).astype(int), side)
        down = np.arange(first[0], last[0])[:, None] + 0.5 - a[0]
        right = np.arange(first[1], last[1]) + 0.5 - a[1]
        along = b - a
        share = np.clip((down * along[0] + right * along[1]) / max(float(along @ along), 1e-12), 0, 1)
        away = np.hypot(down - share * along[0], right - share * along[1])
        patch = image[first[0] : last[0], first[1] : last[1]]
        np.maximum(patch, np.clip(radius + 0.5 - away, 0, 1), out=patch, casting="unsafe")
    return image


def batches_of(
    task: Callable[..., tuple[Tensor, Tensor]], batch: int, *, seed: int = 1, **options: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless fresh batches of a task; seeds count up from `seed`, so that an evaluation set with seed 0 stays unseen."""
    while True:
        yield task(batch, seed=seed, **options)
        seed += 1


def _counts(**counts: int) -> tuple[int, ...]:
    return tuple(checks.whole(name, value, low=1) for name, value in counts.items())
