"""Samples kept on disk by what they are of, so that many sizes of one experiment are evaluated from one set of them.

    cache = SampleCache("samples.jsonl")
    generator = Cached(TransformersGenerator(model, tokenizer), cache)
    generator(prompts, sampling, n=64)      # draws what is not there yet, and keeps it
    generator(prompts, sampling, n=8)       # the first eight of them, without the model

A sample found on disk costs what it cost when it was drawn: its tokens and seconds stand in it, and a budget charges them again.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from assay import checks
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling, as_record, from_record


def key_of(name: str, prompt: str, sampling: Sampling, seed: int, number: int) -> str:
    """What one sample is known by: a hash over who wrote it, the prompt, how it was drawn, the seed and its number."""
    what = json.dumps([name, prompt, asdict(sampling), seed, number], sort_keys=True)
    return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


class SampleCache:
    """Samples by their keys in one JSONL file, `{"key": ..., "sample": {...}}` a line; `.gz` is read, not written to.

    Lines are appended and synced as samples come, by one process at a time (the file is locked meanwhile), so that a crash loses at most
    what was not written; a line that is torn or no sample is left out and counted in `damaged`. Several threads may share it.

    >>> import tempfile
    >>> cache = SampleCache(tempfile.mkdtemp() + "/samples.jsonl")
    >>> len(cache), cache.get("0" * 32)
    (0, None)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._known: dict[str, Sample] = {}
        self._lock = threading.Lock()
        self._read_to = 0
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Sample | None:
        """The sample of a key, None where there is none."""
        return self._known.get(key)

    def holds(self, keys: Sequence[str]) -> bool:
        """Whether all of these samples are there."""
        return all(key in self._known for key in keys)

    def add(self, found: Sequence[tuple[str, Sample]]) -> None:
        """Keep samples under their keys; those that are there already stay as they are. Raises OSError when they cannot be written."""
        new = [(key, sample) for key, sample in found if key not in self._known]
        if not new:
            return
        if self.path.suffix == ".gz":
            raise ValueError(f"path must not end in .gz to be written to, got {self.path}")
        lines = "".join(json.dumps({"key": key, "sample": as_record(sample)}) + "\n" for key, sample in new)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                torn = file.tell() and not _ends_a_line(self.path)
                file.write(("\n" if torn else "").encode() + lines.encode())
                file.flush()
                os.fsync(file.fileno())
            self._known.update(new)

    def _read(self) -> None:
        with gzip.open(self.path, "rb") if self.path.suffix == ".gz" else self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    self._known.setdefault(str(record["key"]), from_record(record["sample"]))
                except (ValueError, TypeError, KeyError):
                    self.damaged += bool(line.strip())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class Cached:
    """A generator that draws only what its cache lacks. Where `generator` is None, only what is there can be had.

    Raises LookupError for a sample that is not there where there is no generator; `name` then says whose samples are meant.
    """

    def __init__(self, generator: Generator | None, cache: SampleCache, *, name: str = "") -> None:
        if generator is None and not name:
            raise ValueError("name must be given where there is no generator, got ''")
        self.generator, self.cache, self._name = generator, cache, name

    @property
    def name(self) -> str:
        """The generator's."""
        return self._name or (self.generator.name if self.generator is not None else "")

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it; the prompt is charged to the first sample of the call."""
        n, first = checks.whole("n", n, low=1), checks.whole("first", first, low=0)
        keys = [
            [key_of(self.name, prompt, sampling, seed, number) for number in range(first, first + n)]
            for prompt in prompts
        ]
        missing: dict[tuple[int, int], list[int]] = {}  # the numbers that are not there, by first and how many
        for i, own in enumerate(keys):
            absent = [k for k, key in enumerate(own) if self.cache.get(key) is None]
            if absent:
                missing.setdefault((absent[0], absent[-1] + 1), []).append(i)
        if missing and self.generator is None:
            raise LookupError(
                f"{sum(map(len, missing.values()))} of {len(prompts)} prompts have samples that are not in {self.cache.path}"
            )
        for (low, high), members in missing.items():
            assert self.generator is not None
            drawn = self.generator([prompts[i] for i in members], sampling, n=high - low, first=first + low, seed=seed)
            prompt_tokens = [samples[0].spent.prompt for samples in drawn]
            self.cache.add(
                [
                    (keys[i][low + k], with_prompt(sample, tokens))
                    for i, samples, tokens in zip(members, drawn, prompt_tokens, strict=True)
                    for k, sample in enumerate(samples)
                ]
            )
        found: list[list[Sample]] = []
        for own in keys:
            samples = [sample for key in own if (sample := self.cache.get(key)) is not None]
            found.append([sample if not k else with_prompt(sample, 0) for k, sample in enumerate(samples)])
        return found


def with_prompt(sample: Sample, tokens: int) -> Sample:
    """A sample that is charged for so many tokens of its prompt."""
    return replace(sample, spent=replace(sample.spent, prompt=tokens, cached=min(sample.spent.cached, tokens)))
