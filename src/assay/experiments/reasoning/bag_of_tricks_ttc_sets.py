"""Samples of this room at every temperature of its grid, in a file that writes each different continuation of a prompt once.

Short answers repeat themselves: 32 samples at each of seven temperatures are some ten different texts a prompt. So a line holds a prompt's
different continuations, and for every sampling which of them its samples are. `Sets` gives them as a generator does, and has the
model draw what the file lacks.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from assay.experiments.reasoning.samples import FOLDER, generator, sampling_of
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling, TransformersGenerator
from assay.methods.core.reasoning.samples import Cached, SampleCache, with_prompt
from assay.methods.reasoning.bag_of_tricks_ttc import SharedPrefixes
from assay.paths import atomic_file, cache_dir
from assay.workloads.models import load_model
from assay.workloads.reasoning import Item, Kind, Part, Wording, items, prompt

ROOM, MODEL = "bag_of_tricks_ttc", "smollm2-135m"
Task = tuple[Kind, int, Wording]
TASKS: tuple[Task, ...] = (
    ("sum", 1, "plain"), ("sum", 1, "question"), ("sum", 1, "task"),
    ("sum", 2, "plain"),
    ("steps", 1, "plain"), ("steps", 1, "question"), ("steps", 1, "task"),
)  # fmt: skip
"""Two-digit sums in the other wordings are left out: there fewer than one answer in twenty is right at the default, on pilot and learning
questions."""
TOP_P, DEFAULT = 0.9, 0.7  # the released code's
PAPER_GRID = (0.6, 0.7, 0.8, 0.9, 1.0)
WIDE_GRID = (0.2, 0.4, *PAPER_GRID)
LEARN, JUDGED, N = 24, 36, 32  # items of each task, and samples of each prompt, that are checked in
PARTS: tuple[tuple[Part, int], ...] = (("learn", LEARN), ("judged", JUDGED))
TOGETHER = 9  # prompts that are drawn together
PATH = FOLDER / f"{ROOM}-{MODEL}.packed.jsonl.gz"


def sampling_at(kind: Kind, temperature: float) -> Sampling:
    """How answers are drawn here: as everywhere, but with the paper's top-p."""
    return replace(sampling_of(kind, False, temperature), top_p=TOP_P)


def packed(text: str, drawn: Mapping[Sampling, Sequence[Sample]]) -> str:
    """A prompt's samples under several samplings as one line; seconds are left out, and log-probabilities have four digits."""
    places: dict[tuple[Any, ...], int] = {}
    found = []
    for sampling, samples in drawn.items():
        numbers = [
            places.setdefault(
                (
                    sample.text, sample.tokens, tuple(round(value, 4) for value in sample.logprobs), sample.ended,
                    sample.matched,
                ),
                len(places),
            )
            for sample in samples
        ]  # fmt: skip
        found.append([asdict(sampling), numbers])
    read = next(iter(drawn.values()))[0].spent.prompt
    return json.dumps({"prompt": text, "read": read, "texts": list(places), "drawn": found})


def unpacked(line: str) -> tuple[str, dict[Sampling, list[Sample]]]:
    """The prompt of a line and its samples, of which the first of each sampling is charged for the prompt."""
    record = json.loads(line)
    texts = [
        Sample(text, tuple(tokens), tuple(logprobs), ended, Spent(0, len(tokens), calls=1), matched)
        for text, tokens, logprobs, ended, matched in record["texts"]
    ]
    found = {}
    for values, numbers in record["drawn"]:
        sampling = Sampling(**{**values, "stop": tuple(values["stop"])})
        found[sampling] = [texts[k] if i else with_prompt(texts[k], record["read"]) for i, k in enumerate(numbers)]
    return record["prompt"], found


class Sets:
    """A generator that gives the samples of a packed file (those of seed 0), and asks `other` for what is not in it."""

    def __init__(self, path: Path, other: Generator) -> None:
        self.other = other
        lines = gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []
        self._known = dict(unpacked(line) for line in lines)

    @property
    def name(self) -> str:
        """Of the model that wrote the samples."""
        return self.other.name

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it."""
        found = [self._own(text, sampling, n, first, seed) for text in prompts]
        rest = [i for i, own in enumerate(found) if own is None]
        drawn = self.other([prompts[i] for i in rest], sampling, n=n, first=first, seed=seed) if rest else []
        found_there = dict(zip(rest, drawn, strict=True))
        return [found_there[i] if own is None else own for i, own in enumerate(found)]

    def _own(self, text: str, sampling: Sampling, n: int, first: int, seed: int) -> list[Sample] | None:
        kept = self._known.get(text, {}).get(sampling, [])
        if seed or len(kept) < first + n:
            return None
        read = with_prompt(kept[first], kept[0].spent.prompt)  # no other is charged for the prompt
        return [read, *kept[first + 1 : first + n]]


@cache
def sets() -> Sets:
    """The samples of this room: those checked in, those kept by this machine, and new ones."""
    return Sets(PATH, generator(MODEL, ROOM))


def asked() -> list[tuple[Kind, Wording, list[Item]]]:
    """What is checked in: the items of each part and task."""
    return [
        (kind, wording, items(kind, level=level, n=many, part=part))
        for part, many in PARTS
        for kind, level, wording in TASKS
    ]


def draw() -> None:
    """Draw what is checked in, in a journal that goes on where it was stopped, and write the packed file."""
    loaded = load_model(MODEL)
    fast = SharedPrefixes(TransformersGenerator(loaded.model, loaded.tokenizer, batch=256, name=MODEL))
    kept = Cached(fast, SampleCache(cache_dir() / "samples" / f"{ROOM}-{MODEL}.jsonl"))
    lines = []
    for kind, wording, members in asked():
        for start in range(0, len(members), TOGETHER):
            prompts = [prompt(item, wording) for item in members[start : start + TOGETHER]]
            drawn: list[dict[Sampling, list[Sample]]] = [{} for _ in prompts]
            for temperature in (*reversed(WIDE_GRID), 0.0):  # the hottest first: it meets most beginnings
                sampling = sampling_at(kind, temperature)
                for own, samples in zip(drawn, kept(prompts, sampling, n=N if temperature else 1), strict=True):
                    own[sampling] = samples
            lines += [packed(text, own) for text, own in zip(prompts, drawn, strict=True)]
    with atomic_file(PATH) as temporary:
        temporary.write_bytes(gzip.compress("\n".join(sorted(lines)).encode() + b"\n", mtime=0))


if __name__ == "__main__":
    draw()
