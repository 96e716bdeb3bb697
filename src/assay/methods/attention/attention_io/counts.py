"""Bounds, exact word counts, and the best tile and algorithm for a cache of M words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from assay import checks

Algorithm = Literal["flash_keys", "flash_queries", "small_cache", "materialised"]
Regime = Literal["large cache", "small cache"]
LEADING_CONSTANT = 4.0  # words / shape of both optimal algorithms here for N, M -> infinity, not causal


@dataclass(frozen=True)
class Bound:
    """The paper's bounds for (N, d, M), in words moved.

    `shape` is min(N^2 d^2 / M, N^2 d / sqrt(M)) without a constant: traffic is at least some constant times it. `inputs` is 4 N d,
    Q, K and V read once and O written once, exactly. `regime` is "large cache" where M >= d^2.
    """

    n: int
    d: int
    capacity: int
    regime: Regime
    shape: float
    inputs: int

    def words(self, constant: float) -> float:
        """The bound for a constant that the caller states: max(inputs, constant * shape).

        The paper's constants are asymptotic and not given. `LEADING_CONSTANT` is that of the algorithms here, an upper bound.
        """
        checks.number("constant", constant, above=0)
        return max(float(self.inputs), constant * self.shape)


def attention_io_bound(n: int, d: int, capacity: int, *, causal: bool = False) -> Bound:
    """The bounds for N = n tokens, head dim d and a cache of `capacity` words; causal attention has half the scores.

    Raises TypeError for sizes that are not whole numbers, ValueError for those below 1.

    >>> bound = attention_io_bound(4096, 64, 16384)
    >>> bound.regime, bound.words(1.0)
    ('large cache', 4194304.0)
    """
    check_sizes(n=n, d=d, capacity=capacity)
    scores = n * (n + 1) / 2 if causal else float(n * n)
    shape = min(scores * d * d / capacity, scores * d / math.sqrt(capacity))
    return Bound(n, d, capacity, "large cache" if capacity >= d * d else "small cache", shape, 4 * n * d)


def check_sizes(**sizes: int) -> None:
    """Raises TypeError for the first of the named sizes that is not a whole number, ValueError for one below 1."""
    for name, value in sizes.items():
        checks.whole(name, value, low=1)


@dataclass(frozen=True)
class Tile:
    """Rows of queries and of keys (columns) that are in the fast memory together.

    `depth` is for "small_cache" and "materialised" alone, whose products go `depth` terms at a time; their tiles are square.
    """

    rows: int
    columns: int
    depth: int = 1


@dataclass(frozen=True)
class Traffic:
    """Words read from and written to slow memory, and the most words resident at once."""

    reads: int
    writes: int
    peak: int

    @property
    def words(self) -> int:
        """Read and written together."""
        return self.reads + self.writes


def working_set(algorithm: Algorithm, n: int, d: int, tile: Tile) -> int:
    """Words that must fit into the fast memory at once.

    Flash: K and V (2 B_c d), Q, O, maximum and sum (B_r (2 d + 2)), scores (B_r B_c). The others: a tile of scores or outputs, two
    slices of their factors, and two statistics a row.
    """
    _check(algorithm, n, d, tile)
    rows, columns = min(tile.rows, n), min(tile.columns, n)
    if algorithm in ("flash_keys", "flash_queries"):
        return 2 * columns * d + rows * (2 * d + 2) + rows * columns
    depth, width, chunk = min(tile.depth, d), min(tile.columns, d), min(tile.depth, n)
    scores = rows * columns + (rows + columns) * depth
    outputs = rows * width + chunk * (rows + width)
    if algorithm == "small_cache":
        return 2 * rows + max(scores, outputs)
    return max(scores, outputs, min(rows * columns, n) + 2)


def count(algorithm: Algorithm, n: int, d: int, tile: Tile, *, causal: bool = False) -> Traffic:
    """The exact words that `simulate` moves, by formula, ragged tiles and causal order included; `peak` is `working_set`.

    With T_r = N / B_r query tiles and T_c = N / B_c key tiles, not causal, both above 1:
    "flash_queries" (outer loop on queries, FlashAttention-2) 2 N d (T_r + 1); "flash_keys" (outer loop on keys, FlashAttention)
    N d (T_c + 3) + 2 (T_c - 1) N (d + 2), as accumulators and statistics come and go. With one tile of either kind: 4 N d.
    "small_cache" with tiles s: 2 N^2 d / s for the scores, N^2 to write them, N^2 ceil(d / s) to read them, N^2 d / s for V, and
    lower terms. "materialised" runs its softmax as a pass of its own. Raises ValueError for impossible sizes.
    """
    peak = working_set(algorithm, n, d, tile)
    rows, columns = min(tile.rows, n), min(tile.columns, n)
    query_tiles, key_tiles = -(-n // rows), -(-n // columns)
    if algorithm in ("flash_keys", "flash_queries") and (query_tiles == 1 or key_tiles == 1):
        return Traffic(3 * n * d, n * d, peak)
    seen = _seen(n, rows, causal)  # keys loaded over all query tiles
    if algorithm == "flash_queries":
        return Traffic(n * d + 2 * seen * d, n * d, peak)
    if algorithm == "flash_keys":
        skipped = columns * key_tiles * (key_tiles - 1) // 2 if causal else 0
        below = n * key_tiles - skipped  # query rows loaded over all key tiles
        return Traffic(2 * n * d + below * d + (below - n) * (d + 2), (below - n) * (d + 2) + n * d, peak)
    scores = _scores_held(n, rows, causal)
    query_reads = n * d if d <= tile.depth else d * _key_tiles_over_rows(n, rows, columns, causal)
    passes = -(-d // min(columns, d))  # tiles of O in a row
    reads, writes = query_reads + seen * d, scores
    if algorithm == "small_cache":
        reads, writes = reads + 2 * n * passes, writes + 2 * n
    else:
        chunk = rows * columns
        reads += scores + _scores_held(n, rows, causal, longer_than=chunk)
        writes += scores
    return Traffic(reads + scores * passes + seen * d, writes + n * d, peak)


def _seen(n: int, rows: int, causal: bool) -> int:
    """Keys seen, summed over query tiles."""
    whole, rest = divmod(n, rows)
    if not causal:
        return n * (whole + bool(rest))
    return rows * whole * (whole + 1) // 2 + (n if rest else 0)


def _scores_held(n: int, rows: int, causal: bool, longer_than: int = 0) -> int:
    """Scores in slow memory: keys seen, summed over queries; of rows longer than `longer_than` only."""
    whole, rest = divmod(n, rows)
    if not causal:
        return n * n if n > longer_than else 0
    skipped = min(whole, longer_than // rows)
    total = rows * rows * (whole * (whole + 1) - skipped * (skipped + 1)) // 2
    return total + (rest * n if n > longer_than else 0)


def _key_tiles_over_rows(n: int, rows: int, columns: int, causal: bool) -> int:
    """Key tiles seen, summed over queries; tiles are square where it is causal."""
    whole, rest = divmod(n, rows)
    if not causal:
        return n * -(-n // columns)
    return rows * whole * (whole + 1) // 2 + rest * (whole + 1)


def _check(algorithm: Algorithm, n: int, d: int, tile: Tile) -> None:
    checks.choice("algorithm", algorithm, get_args(Algorithm))
    check_sizes(n=n, d=d, rows=tile.rows, columns=tile.columns, depth=tile.depth)
    if algorithm in ("small_cache", "materialised") and tile.rows != tile.columns:
        raise ValueError(f"tile of {algorithm!r} must be square, got {tile.rows} x {tile.columns}")


def best_tile(
    algorithm: Algorithm, n: int, d: int, capacity: int, *, causal: bool = False, divisors: bool = False
) -> Tile:
    """The tile that fits into `capacity` words and moves the fewest, by exhaustive search; among equals, the largest.

    `divisors` takes only sizes that divide n. Raises ValueError where nothing fits (saying what would).
    """
    check_sizes(n=n, d=d, capacity=capacity)
    checks.choice("algorithm", algorithm, get_args(Algorithm))
    square = algorithm in ("small_cache", "materialised")
    most = min(n, math.isqrt(capacity) if square else capacity // (2 * d + 2))
    sizes = [size for size in range(1, most + 1) if not divisors or n % size == 0]
    fitting = []
    for tile in _square_tiles(sizes, d) if square else _tiles(n, d, capacity, sizes, divisors):
        if working_set(algorithm, n, d, tile) <= capacity:
            fitting.append((count(algorithm, n, d, tile, causal=causal).words, -tile.rows * tile.columns, tile))
    if not fitting:
        least = working_set(algorithm, n, d, Tile(1, 1))
        raise ValueError(f"capacity must be at least {least} words for {algorithm!r} with d = {d}, got {capacity}")
    return min(fitting, key=lambda found: found[:2])[2]


def _square_tiles(sizes: list[int], d: int) -> Iterator[Tile]:
    for size in sizes:
        yield Tile(size, size, 1)
        yield Tile(size, size, d)


def _tiles(n: int, d: int, capacity: int, sizes: list[int], divisors: bool) -> Iterator[Tile]:
    """Each number of rows with the most columns that fit: more columns never move more words."""
    for rows in sizes:
        columns = min(n, (capacity - rows * (2 * d + 2)) // (2 * d + rows))
        while divisors and columns > 1 and n % columns:
            columns -= 1
        if columns >= 1:
            yield Tile(rows, columns)


@dataclass(frozen=True)
class Choice:
    """An algorithm with its best tile, the words it moves, and the bound."""

    algorithm: Algorithm
    tile: Tile
    traffic: Traffic
    bound: Bound

    @property
    def over_shape(self) -> float:
        """Words moved over max(inputs, shape): comparable along a sweep, no share of the optimum (the bound has no constant)."""
        return self.traffic.words / self.bound.words(1.0)


def choose(n: int, d: int, capacity: int, *, causal: bool = False, rule: Literal["d2", "exact"] = "d2") -> Choice:
    """The algorithm for a cache of `capacity` words, with its best tile.

    `rule="d2"`: flash attention (the better loop order) where capacity >= d^2, else the small-cache algorithm, as the paper's
    bounds say. `rule="exact"` compares exact counts; constants move the crossing to about 0.6 d^2. What does not fit is passed over;
    raises ValueError where nothing fits, or for another rule.
    """
    checks.choice("rule", rule, ("d2", "exact"))
    bound = attention_io_bound(n, d, capacity, causal=causal)
    flash: list[Algorithm] = ["flash_queries", "flash_keys"]
    groups: list[list[Algorithm]] = [[*flash, "small_cache"]]
    if rule == "d2":
        groups = [flash, ["small_cache"]] if bound.regime == "large cache" else [["small_cache"], flash]
    refused = ""
    for group in groups:
        found = []
        for algorithm in group:
            try:
                tile = best_tile(algorithm, n, d, capacity, causal=causal)
            except ValueError as error:
                refused = str(error)
                continue
            found.append(Choice(algorithm, tile, count(algorithm, n, d, tile, causal=causal), bound))
        if found:
            return min(found, key=lambda choice: choice.traffic.words)
    raise ValueError(refused)


def table(n: int, d: int, capacities: Iterable[int], *, causal: bool = False) -> str:
    """A line for each capacity: the bound's shape and the words of all algorithms with their best tiles ("-" where none fits)."""
    names = get_args(Algorithm)

    def words(algorithm: Algorithm, capacity: int) -> str:
        try:
            tile = best_tile(algorithm, n, d, capacity, causal=causal)
        except ValueError:
            return "-"
        return str(count(algorithm, n, d, tile, causal=causal).words)

    lines = [" ".join(f"{title:>14}" for title in ("M", "regime", "shape", *names))]
    for capacity in capacities:
        bound = attention_io_bound(n, d, capacity, causal=causal)
        row = (str(capacity), bound.regime, f"{bound.shape:.4g}", *(words(name, capacity) for name in names))
        lines.append(" ".join(f"{cell:>14}" for cell in row))
    return "\n".join(lines)
