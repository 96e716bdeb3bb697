"""Where memories are kept: by context, model and prompts, for a time, in this process or in a folder."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from assay import checks
from assay.paths import atomic_file

WEEK = 7 * 24 * 3600.0
MOST_BYTES = 10_000_000  # of a kept file


@dataclass(frozen=True)
class Memory:
    """What sleeping made of a context: one block of text for each sleep, when, and the tokens generated for it."""

    blocks: tuple[str, ...]
    made: float  # seconds since 1970
    sleep_tokens: int


def memory_key(context: str, model: str, prompts: str) -> str:
    """The name of a memory: a digest of the context, the model's name and the version of the prompts, each as it is.

    >>> memory_key("a", "m", "1") == memory_key("a", "m", "1"), memory_key("a", "m", "1") == memory_key("a ", "m", "1")
    (True, False)
    """
    for name, value in (("context", context), ("model", model), ("prompts", prompts)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be text, got {checks.shown(value)}")
    return hashlib.sha256(json.dumps([context, model, prompts]).encode()).hexdigest()


class Store:
    """Memories by their names, forgotten `seconds` after they were made (None: never). Several threads may use one.

    With a `folder` they are JSON files there, written whole or not at all, which other processes find; without one they live as long
    as the store. A memory holds what the context said: use an expiry, and `forget` what somebody asks you to. `clock` gives the time.
    Raises ValueError for seconds that are not above 0.

    A file that is damaged, too large or of another form counts as not there. An expired memory is deleted when it is asked for, or by
    `purge`.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        seconds: float | None = WEEK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.seconds = None if seconds is None else checks.number("seconds", seconds, above=0)
        self.folder = None if folder is None else Path(folder)
        self._clock = clock
        self._known: dict[str, Memory] = {}
        self._lock = threading.Lock()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def now(self) -> float:
        """The time by this store's clock."""
        return self._clock()

    def get(self, key: str) -> Memory | None:
        """The memory of that name; None if there is none, or none any more."""
        memory = self._read(key)
        if memory is not None and self._expired(memory):
            self.forget(key)
            return None
        return memory

    def put(self, key: str, memory: Memory) -> None:
        """Keep a memory under a name, in the place of what was there."""
        if self.folder is None:
            with self._lock:
                self._known[key] = memory
            return
        with atomic_file(self._file(key)) as temporary:
            temporary.write_text(json.dumps(asdict(memory)), encoding="utf-8")

    def forget(self, key: str) -> None:
        """Delete a memory, if it is there."""
        if self.folder is None:
            with self._lock:
                self._known.pop(key, None)
        else:
            self._file(key).unlink(missing_ok=True)

    def purge(self) -> int:
        """Delete all memories that have expired, and say how many."""
        if self.folder is None:
            with self._lock:
                keys = list(self._known)
        else:
            keys = [file.stem for file in self.folder.glob("*.json") if _named(file.stem)]  # and nobody else's files
        gone = 0
        for key in keys:
            memory = self._read(key)
            if memory is not None and self._expired(memory):
                self.forget(key)
                gone += 1
        return gone

    def _expired(self, memory: Memory) -> bool:
        return self.seconds is not None and not self._clock() - memory.made < self.seconds

    def _read(self, key: str) -> Memory | None:
        if self.folder is None:
            with self._lock:
                return self._known.get(key)
        file = self._file(key)
        try:
            if not file.is_file() or file.stat().st_size > MOST_BYTES:
                return None
            found = json.loads(file.read_text(encoding="utf-8"))
            blocks = found["blocks"]
            if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
                return None
            made = checks.number("made", found["made"])
            return Memory(tuple(blocks), made, checks.whole("sleep_tokens", found["sleep_tokens"], low=0))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        if not _named(key):  # it becomes the name of a file
            raise ValueError(f"key must be one of memory_key's, got {checks.shown(key)}")
        return self.folder / f"{key}.json"


def _named(key: str) -> bool:
    """Whether it is a name as `memory_key` makes them."""
    return len(key) == 64 and set(key) <= set("0123456789abcdef")
