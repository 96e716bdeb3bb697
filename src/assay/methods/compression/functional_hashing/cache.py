"""The cache under functional keys: results kept in memory or in an SQLite file, and what it saved."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import filelock
import numpy as np

from assay import checks

T = TypeVar("T")


@dataclass(frozen=True)
class CacheReport:
    """What a cache did so far. Seconds are wall time spent in this process in computing keys and in evaluating."""

    hits: int
    misses: int
    hash_seconds: float
    evaluation_seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of lookups answered from the store; with the miss rate it makes one. 0 before the first lookup."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    @property
    def hash_to_evaluation(self) -> float:
        """h/E: mean cost of a key over mean cost of an evaluation; NaN when nothing was evaluated."""
        if not self.misses or not self.evaluation_seconds:
            return float("nan")
        return (self.hash_seconds / (self.hits + self.misses)) / (self.evaluation_seconds / self.misses)

    @property
    def speedup(self) -> float:
        """What the cache gained against evaluating every candidate, by the formula of `speedup`; NaN when nothing was evaluated."""
        ratio = self.hash_to_evaluation
        return ratio if math.isnan(ratio) else speedup(self.hit_rate, ratio)


def speedup(hit_rate: float, hash_to_evaluation: float) -> float:
    """1 / (h/E + 1 - p): evaluation time without the cache over time with it. Raises ValueError outside 0 <= p <= 1, h/E >= 0.

    >>> speedup(0.75, 0.25)
    2.0
    """
    cost = checks.number("hash_to_evaluation", hash_to_evaluation, low=0) + 1
    cost -= checks.number("hit_rate", hit_rate, low=0, high=1)
    return float("inf") if cost == 0 else 1 / cost


def collision_bound(functions: int, *, bits: int = 128) -> float:
    """Upper bound on the probability that any two of `functions` different behaviours share a key: n^2 / 2^(bits + 1), at most 1.

    >>> collision_bound(10**9) < 1e-20
    True
    """
    functions, bits = checks.whole("functions", functions, low=0), checks.whole("bits", bits, low=1)
    return 1.0 if functions**2 >= 2 ** (bits + 1) else functions**2 / 2 ** (bits + 1)


def deduplicate(candidates: Iterable[T], key: Callable[[T], Hashable]) -> list[T]:
    """The first candidate of each key, in order; its length over the number of candidates is a measure of diversity."""
    first: dict[Hashable, T] = {}
    for candidate in candidates:
        first.setdefault(key(candidate), candidate)
    return list(first.values())


class FunctionalCache:
    """Functional equivalence cache: key -> result, least recently used out first.

    `store` is "memory" (any result, itself and not a copy, in this process) or the path of an SQLite file
    (shared by processes, survives a crash), which takes None, bools, numbers, text, and lists, tuples and dicts of these, and gives
    them back as they were (NumPy's numbers as
    Python's). `forget_every=k` drops an entry once it was used k times, its evaluation counting as the first use, so that a lucky
    noisy score cannot live for ever; 0 never forgets, 1 would store nothing and is refused. `reevaluate=eps` evaluates a
    stored candidate again with that probability and keeps the mean; results must then be numbers, or flat lists or mappings of
    numbers. Safe to share between threads; two threads that miss the same key at once both evaluate it.

    Store a measured time in the result only if one machine measures all candidates: equal functions differ in speed.
    Keys are text; methods raise TypeError for others. Raises ValueError for a bad size, `forget_every`, probability, or a file that
    is not a database of this cache, TypeError for what is of another kind.
    """

    def __init__(
        self,
        maxsize: int = 100_000,
        *,
        forget_every: int = 0,
        reevaluate: float = 0.0,
        store: str | os.PathLike[str] = "memory",
        seed: int = 0,
    ):
        self.maxsize = checks.whole("maxsize", maxsize, low=1)
        self.forget_every = checks.whole("forget_every", forget_every, low=0)
        if self.forget_every == 1:
            raise ValueError(f"forget_every must be 0 (never) or at least 2, got {forget_every}")
        self.reevaluate = checks.number("reevaluate", reevaluate, low=0, high=1)
        if not isinstance(store, str | os.PathLike):
            raise TypeError(f"store must be 'memory' or the path of a file, got {checks.shown(store)}")
        self._random = random.Random(checks.whole("seed", seed))
        self._store: _Store = _MemoryStore() if store == "memory" else _SqliteStore(Path(store))
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        self._hash_seconds = self._evaluation_seconds = 0.0

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, key: str) -> bool:
        return self._store.peek(_text(key)) is not None

    def keys(self) -> list[str]:
        """The stored keys, least recently used first."""
        return self._store.keys()

    def peek(self, key: str, default: Any = None) -> Any:
        """The stored result, without counting a use or refreshing it."""
        found = self._store.peek(_text(key))
        return default if found is None else found.result

    def lookup(self, key: str, default: Any = None) -> Any:
        """The stored result, counted as a hit and a use and moved to the end of the queue; else `default`, counted as a miss."""
        found = self._store.use(_text(key), self.forget_every)
        with self._lock:
            self._hits += found is not None
            self._misses += found is None
        return default if found is None else found.result

    def insert(self, key: str, result: Any, *, evaluations: int = 1) -> Any:
        """Store `result`, which counts as a use; for a key that is there already, the mean over all evaluations. Returns what is stored.

        A key whose result is not made of numbers keeps the newest. Raises TypeError for what the SQLite store cannot keep,
        ValueError for fewer than one evaluation.
        """
        evaluations = checks.whole("evaluations", evaluations, low=1)
        return self._store.record(_text(key), result, evaluations, self.forget_every, self.maxsize)

    def evaluate(self, key: str, function: Callable[[], Any]) -> Any:
        """The result of `key`: stored, or from `function()`, which is then stored. An exception is passed on, nothing is stored."""
        _text(key)  # before an evaluation is paid for
        with self._lock:
            again = self.reevaluate > 0 and self._random.random() < self.reevaluate
        if not again:
            missing = object()
            found = self.lookup(key, missing)
            if found is not missing:
                return found
        else:
            with self._lock:
                self._misses += 1
        start = time.perf_counter()
        try:
            result = function()
        finally:
            with self._lock:
                self._evaluation_seconds += time.perf_counter() - start
        if self.reevaluate and not _is_numeric(result):
            raise TypeError(f"reevaluate needs results made of numbers, to average them; got {type(result).__name__}")
        return self.insert(key, result)

    def memoise(self, key: Callable[..., str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: the function's result is kept under `key(*arguments)`, for instance an Optuna objective.

        >>> cache = FunctionalCache()
        >>> @cache.memoise(lambda candidate: functional_hash(candidate, probes))
        ... def fitness(candidate): ...
        """

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def cached(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                name = key(*args, **kwargs)
                with self._lock:
                    self._hash_seconds += time.perf_counter() - start
                return self.evaluate(name, lambda: function(*args, **kwargs))

            return cached

        return decorate

    def report(self) -> CacheReport:
        """Hits, misses and time of this process."""
        with self._lock:
            return CacheReport(self._hits, self._misses, self._hash_seconds, self._evaluation_seconds)

    def close(self) -> None:
        """Close the SQLite file; the memory store has nothing to close."""
        self._store.close()


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key must be text, as functional_hash gives, got {checks.shown(key)}")
    return key


@dataclass
class _Entry:
    result: Any
    evaluations: int = 0
    uses: int = 0


class _Store(Protocol):
    """Both stores do each of these in one indivisible step."""

    def __len__(self) -> int: ...
    def keys(self) -> list[str]: ...
    def peek(self, key: str) -> _Entry | None: ...
    def use(self, key: str, forget_every: int) -> _Entry | None: ...
    def record(self, key: str, result: Any, evaluations: int, forget_every: int, maxsize: int) -> Any: ...
    def close(self) -> None: ...


class _MemoryStore:
    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def peek(self, key: str) -> _Entry | None:
        return self._entries.get(key)

    def use(self, key: str, forget_every: int) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.uses += 1
                self._entries.move_to_end(key)
                if forget_every and entry.uses >= forget_every:
                    del self._entries[key]
            return entry

    def record(self, key: str, result: Any, evaluations: int, forget_every: int, maxsize: int) -> Any:
        with self._lock:
            entry = self._entries.pop(key, None)
            merged = _merged(entry, result, evaluations)
            if not (forget_every and merged.uses >= forget_every):
                self._entries[key] = merged
            while len(self._entries) > maxsize:
                self._entries.popitem(last=False)
            return merged.result

    def close(self) -> None:
        pass


class _SqliteStore:
    """One file, one table; every step is one transaction, which a crash undoes and other processes wait for."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._inherited: list[sqlite3.Connection] = []
        try:
            with self._transaction() as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, result TEXT NOT NULL,"
                    " evaluations INTEGER NOT NULL, uses INTEGER NOT NULL, used INTEGER NOT NULL)"
                )
                database.execute("CREATE INDEX IF NOT EXISTS by_use ON entries (used)")
                database.execute("SELECT key, result, evaluations, uses, used FROM entries LIMIT 1")
        except sqlite3.OperationalError as error:
            self.close()
            raise ValueError(f"store {str(path)!r} holds something else than this cache: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._owner != os.getpid() and self._connection is not None:
                self._inherited.append(self._connection)  # a forked child must neither use nor close its parent's
                self._connection = None
            if self._connection is None:
                self._connection, self._owner = self._open(), os.getpid()
            database = self._connection
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        if not self._path.parent.is_dir():
            raise ValueError(f"store {str(self._path)!r} cannot be used as an SQLite file: its folder does not exist")
        try:
            with filelock.FileLock(f"{self._path}.lock"):  # two processes must not both make the file
                database = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=False)
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"store {str(self._path)!r} cannot be used as an SQLite file: {error}") from error
        return database

    def __len__(self) -> int:
        with self._transaction() as database:
            return int(database.execute("SELECT count(*) FROM entries").fetchone()[0])

    def keys(self) -> list[str]:
        with self._transaction() as database:
            return [row[0] for row in database.execute("SELECT key FROM entries ORDER BY used")]

    def peek(self, key: str) -> _Entry | None:
        with self._transaction() as database:
            return self._get(database, key)

    def use(self, key: str, forget_every: int) -> _Entry | None:
        with self._transaction() as database:
            entry = self._get(database, key)
            if entry is not None:
                entry.uses += 1
                self._put(database, key, entry, forget_every)
            return entry

    def record(self, key: str, result: Any, evaluations: int, forget_every: int, maxsize: int) -> Any:
        with self._transaction() as database:
            merged = _merged(self._get(database, key), result, evaluations)
            self._put(database, key, merged, forget_every)
            surplus = database.execute("SELECT count(*) FROM entries").fetchone()[0] - maxsize
            if surplus > 0:
                database.execute(
                    "DELETE FROM entries WHERE key IN (SELECT key FROM entries ORDER BY used LIMIT ?)", (surplus,)
                )
            return merged.result

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
                self._connection = None

    @staticmethod
    def _get(database: sqlite3.Connection, key: str) -> _Entry | None:
        row = database.execute("SELECT result, evaluations, uses FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else _Entry(_from_json(json.loads(row[0])), row[1], row[2])

    @staticmethod
    def _put(database: sqlite3.Connection, key: str, entry: _Entry, forget_every: int) -> None:
        if forget_every and entry.uses >= forget_every:
            database.execute("DELETE FROM entries WHERE key = ?", (key,))
            return
        text = json.dumps(_to_json(entry.result))
        database.execute(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM entries))",
            (key, text, entry.evaluations, entry.uses),
        )


_TUPLE, _ITEMS = "tuple", "items"  # JSON has neither: each becomes a dict of that one key


def _to_json(value: Any) -> Any:
    """`value` in JSON's words, so that `_from_json` gives back an equal value of the same types. Raises TypeError where there are none."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.number | np.bool_) and not isinstance(value, np.complexfloating):
        return value.item()
    if type(value) is list:
        return [_to_json(item) for item in value]
    if type(value) is tuple:
        return {_TUPLE: [_to_json(item) for item in value]}
    if type(value) is dict:
        if all(type(key) is str for key in value) and len(value) != 1:
            return {key: _to_json(item) for key, item in value.items()}
        return {_ITEMS: [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    raise TypeError(f"the SQLite store cannot keep a {type(value).__name__}: {checks.shown(value)}")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_TUPLE}:
            return tuple(_from_json(item) for item in value[_TUPLE])
        if value.keys() == {_ITEMS}:
            return {_from_json(key): _from_json(item) for key, item in value[_ITEMS]}
        return {key: _from_json(item) for key, item in value.items()}
    return value


def _merged(old: _Entry | None, result: Any, evaluations: int) -> _Entry:
    """The entry after one more result; results of numbers are averaged over their evaluations."""
    if old is None:
        return _Entry(result, evaluations, 1)
    total = old.evaluations + evaluations
    return _Entry(_mean(old.result, old.evaluations, result, evaluations), total, old.uses + 1)


def _mean(old: Any, old_weight: int, new: Any, new_weight: int) -> Any:
    if _is_number(old) and _is_number(new):
        if old == new:
            return new  # exactly
        total = old_weight + new_weight
        return old * (old_weight / total) + new * (new_weight / total)  # a difference of the two could overflow
    if _is_numeric(old) and _is_numeric(new):
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
            return {name: _mean(old[name], old_weight, new[name], new_weight) for name in new}
        if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
            means = [_mean(a, old_weight, b, new_weight) for a, b in zip(old, new, strict=True)]
            return getattr(type(new), "_make", type(new))(means)  # named tuples have a maker of their own
    return new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return all(map(_is_number, value)) if isinstance(value, list | tuple) else _is_number(value)
