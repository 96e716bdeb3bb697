"""Counted memories, and the tiled algorithms that run on them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from assay import checks
from assay.methods.attention.attention_io.counts import (
    Algorithm,
    Tile,
    Traffic,
    check_sizes,
    working_set,
)
from assay.methods.core.mixers.protocol import wide_dtype

Span = tuple[int, int]  # [start, stop)


class Scratchpad:
    """A fast memory of `capacity` words that the program manages: one tile a name, every word in and out counted.

    A tile is a copy, and slow memory changes only through `store`, as in a real program. Raises MemoryError when tiles would
    need more than the capacity.
    """

    def __init__(self, capacity: int):
        check_sizes(capacity=capacity)
        self.capacity, self.peak, self.reads, self.writes = capacity, 0, 0, 0
        self.slow: dict[str, Tensor] = {}
        self._held: dict[str, tuple[Tensor, Span, Span]] = {}

    def load(self, name: str, rows: Span, columns: Span | None = None) -> Tensor:
        """A tile of the slow array `name`; it replaces the one of that name."""
        columns = columns or (0, self.slow[name].shape[1])
        tile = self._hold(name, self.slow[name][slice(*rows), slice(*columns)].clone(), rows, columns)
        self._read(name, rows, columns)
        return tile

    def new(self, name: str, rows: Span, columns: Span, value: float = 0.0) -> Tensor:
        """A fresh tile, moved nowhere yet."""
        like = next(iter(self.slow.values()))
        tile = self._hold(name, like.new_full((rows[1] - rows[0], columns[1] - columns[0]), value), rows, columns)
        self._made(name, rows, columns)
        return tile

    def __getitem__(self, name: str) -> Tensor:
        """The tile held under a name."""
        return self._held[name][0]

    def use(self, *names: str, changed: Iterable[str] = ()) -> None:
        """Note which tiles a step of arithmetic reads, and which of them it changes."""
        for name in names:
            if name not in self._held:
                raise KeyError(f"{name!r} is not in the fast memory")

    def store(self, name: str) -> None:
        """Write the tile `name` to its place in slow memory; it stays."""
        tile, rows, columns = self._held[name]
        self.slow[name][slice(*rows), slice(*columns)] = tile
        self._write(tile.numel())

    def drop(self, *names: str) -> None:
        """Forget tiles."""
        for name in names:
            self._held.pop(name, None)

    def finish(self) -> None:
        """The end of the program."""
        self._held.clear()

    @property
    def traffic(self) -> Traffic:
        """What was read and written so far, and the most that was resident."""
        return Traffic(self.reads, self.writes, self.peak)

    def _hold(self, name: str, tile: Tensor, rows: Span, columns: Span) -> Tensor:
        self._held[name] = (tile, rows, columns)
        resident = sum(held.numel() for held, _, _ in self._held.values())
        if resident > self.capacity:
            sizes = ", ".join(f"{key} {held.numel()}" for key, (held, _, _) in self._held.items())
            raise MemoryError(f"the working set is {resident} words of {self.capacity}: {sizes}")
        self.peak = max(self.peak, resident)
        return tile

    def _read(self, name: str, rows: Span, columns: Span) -> None:
        self.reads += (rows[1] - rows[0]) * (columns[1] - columns[0])

    def _made(self, name: str, rows: Span, columns: Span) -> None:
        pass

    def _write(self, words: int) -> None:
        self.writes += words


class LRUCache(Scratchpad):
    """A fully associative write-back cache of `capacity` words in lines of `line` words, least recently used out first.

    The same programs run on it, but placement is automatic: an access that misses reads a line, and a changed line is written
    when it leaves. Temporaries have addresses too, and their lines are written like others. A tile is one access, in row order.
    """

    def __init__(self, capacity: int, line: int = 1):
        super().__init__(capacity)
        check_sizes(line=line)
        if line > capacity:
            raise ValueError(f"line must be at most the capacity ({capacity}), got {line}")
        self.line = line
        self._lines: OrderedDict[tuple[str, int], bool] = OrderedDict()  # (array, line) -> changed

    def use(self, *names: str, changed: Iterable[str] = ()) -> None:
        """Access tiles: missing lines are read, and the lines of `changed` are written when they are evicted."""
        super().use(*names)
        written = set(changed)
        for name in names:
            _, rows, columns = self._held[name]
            self._touch(name, rows, columns, change=name in written)

    def finish(self) -> None:
        """The end of the program: changed lines are written."""
        self.writes += self.line * sum(self._lines.values())
        self._lines.clear()
        super().finish()

    def _hold(self, name: str, tile: Tensor, rows: Span, columns: Span) -> Tensor:
        self._held[name] = (tile, rows, columns)  # no limit: what does not fit is evicted
        return tile

    def _read(self, name: str, rows: Span, columns: Span) -> None:
        self._touch(name, rows, columns)

    def _made(self, name: str, rows: Span, columns: Span) -> None:
        self._touch(name, rows, columns, change=True, fetch=False)

    def _write(self, words: int) -> None:
        pass  # written when the line leaves

    def _touch(self, name: str, rows: Span, columns: Span, change: bool = False, fetch: bool = True) -> None:
        if name in self.slow:
            width = self.slow[name].shape[1]
        else:  # a temporary is at the start of its own region
            rows, columns = (0, rows[1] - rows[0]), (0, columns[1] - columns[0])
            width = columns[1]
        for row in range(*rows):
            first = (row * width + columns[0]) // self.line
            last = (row * width + columns[1] - 1) // self.line
            for index in range(first, last + 1):
                self._access((name, index), change, fetch)

    def _access(self, key: tuple[str, int], change: bool, fetch: bool) -> None:
        if key in self._lines:
            self._lines[key] |= change
            self._lines.move_to_end(key)
            return
        if fetch:
            self.reads += self.line
        self._lines[key] = change
        if len(self._lines) > self.capacity // self.line:
            _, dirty = self._lines.popitem(last=False)
            self.writes += self.line * dirty
        self.peak = max(self.peak, len(self._lines) * self.line)


def simulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    algorithm: Algorithm,
    tile: Tile,
    *,
    capacity: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    cache: Literal["scratchpad", "lru"] = "scratchpad",
    line: int = 1,
) -> tuple[Tensor, Traffic]:
    """Run an algorithm on one head, q, k, v (N, d), through a counted memory: the output (N, d) and the words moved.

    `capacity` defaults to the working set. On a scratchpad the words are those of `count`, whatever the values. `cache="lru"` runs
    the same accesses on an `LRUCache` with lines of `line` words. Half precision is computed in float32.
    Raises ValueError for shapes, dtypes, devices or names that do not fit and a `line` for a scratchpad, TypeError for other types,
    MemoryError when the scratchpad is too small.
    """
    _check_alike(q, k, v, ("N", "d"))
    checks.choice("algorithm", algorithm, get_args(Algorithm))
    _check_tile(tile)
    checks.flag("causal", causal)
    checks.choice("cache", cache, ("scratchpad", "lru"))
    if checks.whole("line", line, low=1) != 1 and cache != "lru":
        raise ValueError(f"line must be left out for a scratchpad, which has none, got {line}")
    if scale is not None:
        scale = checks.number("scale", scale)
    n, d = q.shape
    least = working_set(algorithm, n, d, tile)
    size = least if capacity is None else capacity
    memory = LRUCache(size, line) if cache == "lru" else Scratchpad(size)
    wide = wide_dtype(q.dtype)
    scale = d**-0.5 if scale is None else scale
    memory.slow = {name: x.detach().to(wide) for name, x in (("Q", q * scale), ("K", k), ("V", v))}
    memory.slow["O"] = torch.zeros_like(memory.slow["V"])
    rows, columns = min(tile.rows, n), min(tile.columns, n)
    if algorithm == "flash_queries":
        _flash_queries(memory, n, d, rows, columns, causal)
    elif algorithm == "flash_keys":
        _flash_keys(memory, n, d, rows, columns, causal)
    else:
        memory.slow["S"] = memory.slow["Q"].new_zeros(n, n)
        _by_passes(memory, n, d, rows, tile.depth, causal, fused=algorithm == "small_cache")
    memory.finish()
    return memory.slow["O"].to(q.dtype), memory.traffic


def _check_alike(q: Tensor, k: Tensor, v: Tensor, shape: tuple[str, ...]) -> None:
    checks.tensor("q", q, shape=shape)
    for name, x in (("k", k), ("v", v)):
        checks.tensor(name, x, shape=tuple(q.shape))
    checks.together(q=q, k=k, v=v)


def _check_tile(tile: Tile) -> None:
    if not isinstance(tile, Tile):
        raise TypeError(f"tile must be a Tile, got {checks.shown(tile)}")
    check_sizes(rows=tile.rows, columns=tile.columns, depth=tile.depth)


def _spans(stop: int, size: int, start: int = 0) -> list[Span]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _mask(scores: Tensor, rows: Span, keys: Span, causal: bool) -> None:
    if causal:
        above = torch.arange(*keys) > torch.arange(*rows)[:, None]
        scores.masked_fill_(above, -math.inf)


def _online(memory: Scratchpad, q: Tensor, out: Tensor, stats: Tensor, rows: Span, keys: Span, causal: bool) -> None:
    """One tile of scores, exponentiated, into the running output, maximum and sum of its rows."""
    k, v = memory["K"], memory["V"]
    k, v = k[: keys[1] - keys[0]], v[: keys[1] - keys[0]]
    scores = memory.new("scores", rows, keys)
    torch.matmul(q, k.T, out=scores)
    memory.use("Q", "K", "scores", changed=("scores",))
    _mask(scores, rows, keys, causal)
    highest = torch.maximum(stats[:, 0], scores.amax(-1))
    shrink = (stats[:, 0] - highest).exp()
    scores.sub_(highest[:, None]).exp_()
    stats[:, 1] = stats[:, 1] * shrink + scores.sum(-1)
    stats[:, 0] = highest
    out.mul_(shrink[:, None]).addmm_(scores, v)
    memory.use("scores", "V", "O", "stats", changed=("scores", "O", "stats"))
    memory.drop("scores")


def _accumulators(memory: Scratchpad, rows: Span, d: int) -> tuple[Tensor, Tensor]:
    """Output, and (maximum, sum), of rows that have seen no key; the first key of all, which every row sees, ends the -inf."""
    out, stats = memory.new("O", rows, (0, d)), memory.new("stats", rows, (0, 2))
    stats[:, 0] = -math.inf
    return out, stats


def _flash_queries(memory: Scratchpad, n: int, d: int, size_r: int, size_c: int, causal: bool) -> None:
    stay = size_c >= n  # one tile of keys
    if stay:
        memory.load("K", (0, n)), memory.load("V", (0, n))
    for rows in _spans(n, size_r):
        q = memory.load("Q", rows)
        out, stats = _accumulators(memory, rows, d)
        end = rows[1] if causal else n
        for keys in _spans(end, size_c):
            if not stay:
                memory.load("K", keys), memory.load("V", keys)
            _online(memory, q, out, stats, rows, keys, causal)
        out.div_(stats[:, 1:])
        memory.store("O")


def _flash_keys(memory: Scratchpad, n: int, d: int, size_r: int, size_c: int, causal: bool) -> None:
    stay = size_r >= n  # one tile of queries, and its accumulators
    memory.slow["stats"] = memory.slow["O"].new_zeros(n, 2)
    last = _spans(n, size_c)[-1]
    for keys in _spans(n, size_c):
        memory.load("K", keys), memory.load("V", keys)
        for whole in _spans(n, size_r):
            if causal and whole[1] <= keys[0]:
                continue
            rows = (max(whole[0], keys[0]), whole[1]) if causal and not stay else whole
            first = keys[0] == 0
            if first or not stay:
                memory.load("Q", rows)
            if first:
                _accumulators(memory, rows, d)
            elif not stay:
                memory.load("O", rows), memory.load("stats", rows)
            q, out, stats = (memory[name] for name in ("Q", "O", "stats"))
            _online(memory, q, out, stats, rows, keys, causal)
            if stay and keys != last:
                continue
            seen = keys[1] if causal or keys == last else 0  # rows before it have met their last key
            done = min(max(seen - rows[0], 0), rows[1] - rows[0])
            out[:done] /= stats[:done, 1:]
            memory.store("O")
            _store_rest(memory, rows, done)


def _store_rest(memory: Scratchpad, rows: Span, done: int) -> None:
    """Write the statistics of the rows after the first `done`."""
    if rows[0] + done < rows[1]:
        memory._held["stats"] = (memory["stats"][done:], (rows[0] + done, rows[1]), (0, 2))
        memory.store("stats")


def _by_passes(memory: Scratchpad, n: int, d: int, size: int, depth: int, causal: bool, *, fused: bool) -> None:
    """Scores to slow memory, then the output from them; with the softmax as a pass of its own between them unless `fused`."""
    memory.slow["stats"] = memory.slow["O"].new_zeros(n, 2)
    for rows in _spans(n, size):
        if fused:
            stats = memory.new("stats", rows, (0, 2))
            stats[:, 0] = -math.inf
        if d <= depth:
            memory.load("Q", rows)
        for keys in _spans(rows[1] if causal else n, size):
            scores = memory.new("S", rows, keys)
            for part in _spans(d, depth):
                q = memory["Q"] if d <= depth else memory.load("Q", rows, part)
                scores.addmm_(q, memory.load("K", keys, part).T)
                memory.use("Q", "K", "S", changed=("S",))
            _mask(scores, rows, keys, causal)
            if fused:
                highest = torch.maximum(stats[:, 0], scores.amax(-1))
                stats[:, 1] = stats[:, 1] * (stats[:, 0] - highest).exp() + (scores - highest[:, None]).exp().sum(-1)
                stats[:, 0] = highest
                memory.use("S", "stats", changed=("stats",))
            memory.store("S")
        if fused:
            memory.store("stats")
    memory.drop("S", "Q", "K", "stats")
    if not fused:
        _softmax_rows(memory, n, size, causal)
    for rows in _spans(n, size):
        end = rows[1] if causal else n
        for part in _spans(d, min(size, d)):
            out = memory.new("O", rows, part)
            if fused:
                stats = memory.load("stats", rows)
            for keys in _spans(end, min(depth, n)):
                scores = memory.load("S", rows, keys)
                if fused:
                    scores.sub_(stats[:, :1]).exp_()
                out.addmm_(scores, memory.load("V", keys, part))
                memory.use("S", "V", "O", changed=("O",))
            if fused:
                out.div_(stats[:, 1:])
            memory.store("O")


def _softmax_rows(memory: Scratchpad, n: int, size: int, causal: bool) -> None:
    """Each row of S by itself, in pieces of size^2 words: read once where it is one piece, else twice."""
    chunk = size * size
    for rows in _spans(n, size):
        pieces = _spans(rows[1] if causal else n, chunk)
        for row in range(*rows):
            at = (row, row + 1)
            high, total = -math.inf, 0.0
            memory.new("row", (0, 1), (0, 2))
            for keys in pieces:
                piece = memory.load("S", at, keys)
                highest = max(high, float(piece.amax()))
                total = total * math.exp(high - highest) + float((piece - highest).exp().sum())
                high = highest
            for keys in pieces:
                if len(pieces) > 1:
                    piece = memory.load("S", at, keys)
                piece.sub_(high).exp_().div_(total)
                memory.use("S", "row", changed=("S",))
                memory.store("S")
    memory.drop("S", "row")


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, tile: Tile, *, causal: bool = False) -> Tensor:
    """The queries-outer algorithm in plain torch on (..., N, d), for timing tiles on a real machine; any leading dimensions.

    Half precision is computed in float32, as is the sum over many keys. Raises ValueError for shapes that differ and tiles below 1,
    TypeError for whole or complex numbers.

    >>> from assay.methods.attention.attention_io.counts import best_tile
    >>> q, k, v = torch.randn(3, 32, 8)
    >>> exact = torch.softmax(q @ k.T / 8**0.5, -1) @ v
    >>> tile = best_tile("flash_queries", 32, 8, 512)
    >>> bool((tiled_attention(q, k, v, tile) - exact).abs().max() < 1e-5)
    True
    """
    _check_alike(q, k, v, ("...", "N", "d"))
    _check_tile(tile)
    checks.flag("causal", causal)
    given, wide = q.dtype, wide_dtype(q.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    n, scale = q.shape[-2], q.shape[-1] ** -0.5
    outputs = []
    for rows in _spans(n, min(tile.rows, n)):
        query = q[..., slice(*rows), :] * scale
        out, high, total = (
            torch.zeros_like(query),
            query.new_full(query.shape[:-1], -math.inf),
            query.new_zeros(query.shape[:-1]),
        )
        for keys in _spans(rows[1] if causal else n, min(tile.columns, n)):
            scores = query @ k[..., slice(*keys), :].transpose(-1, -2)
            if keys[1] > rows[0] + 1:
                _mask(scores, rows, keys, causal)
            highest = torch.maximum(high, scores.amax(-1))
            shrink = (high - highest).exp()
            scores = scores.sub_(highest[..., None]).exp_()
            total, high = total * shrink + scores.sum(-1), highest
            out = out * shrink[..., None] + scores @ v[..., slice(*keys), :]
        outputs.append(out / total[..., None])
    return torch.cat(outputs, -2).to(given)
