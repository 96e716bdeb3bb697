"""Real samples that the experiments on test-time compute share: drawn once, evaluated at every N.

`python -m assay.experiments.reasoning.samples` draws the sets in `SETS` that are not there yet, in a journal that goes on where it was
stopped, and writes them into `sets/`, where experiments read them without a model. What one room draws besides (plans, revisions, steps of
a search) is written by `python -m assay.experiments.reasoning.samples ROOM`, which calls the `draw` of that room's module and keeps
every sample that it asked for. Samples that lie in no file are drawn when they are asked for, and kept in the cache folder.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling, TransformersGenerator, as_record
from assay.methods.core.reasoning.samples import Cached, SampleCache, key_of, with_prompt
from assay.paths import atomic_file, cache_dir
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Item, Kind, Part, Wording, answer_of, items, prompt, right, stop

FOLDER = Path(__file__).with_name("sets")
DIRECT, WORKED = 8, 96  # new tokens at most: of an answer at once, and of one worked out in steps


@dataclass(frozen=True)
class Drawn:
    """An item, the prompt it was asked with, and the samples of a model."""

    item: Item
    prompt: str
    samples: list[Sample]

    @property
    def answers(self) -> list[str]:
        """The answer that each sample gives, canonical; "" for none."""
        return [answer_of(self.item, sample.text) for sample in self.samples]

    @property
    def right(self) -> list[bool]:
        """Whether each sample is right."""
        return [right(self.item, sample.text) for sample in self.samples]

    def charge(self, budget: Budget, numbers: Sequence[int]) -> None:
        """Book these samples as solved for: the prompt once, then what each generated."""
        read = self.samples[0].spent.prompt
        for n, number in enumerate(numbers):
            spent = self.samples[number].spent
            budget.book("solve", Spent(0 if n else read, spent.completion, 0, 1, spent.seconds))


@dataclass(frozen=True)
class Set:
    """What a set of samples is of."""

    kind: Kind
    level: int
    wording: Wording = "plain"
    part: Part = "judged"
    n_items: int = 48
    n: int = 24
    temperature: float = 0.8
    worked: bool = False
    model: str = "smollm2-135m"


_ASKED: tuple[tuple[Kind, int], ...] = (("sum", 1), ("steps", 1), ("sum", 2))
_DRAWN: tuple[tuple[Part, int, int], ...] = (("judged", 48, 24), ("learn", 40, 16))
SETS = tuple(
    Set(kind, level, wording, part, min(n_items, 24) if (kind, level, part) == ("sum", 1, "learn") else n_items, n)
    for part, n_items, n in _DRAWN
    for kind, level in _ASKED
    for wording in WORDINGS
)
"""The sets that are checked in: what a model of this size is sometimes right about, settled on the pilot part. The learn part has 26
sums of one digit."""


def sampling_of(kind: Kind, worked: bool, temperature: float) -> Sampling:
    """How samples of a kind are drawn."""
    shown = items(kind, level=1, n=1, part="shown")[0]
    steps = worked and kind != "sum"
    return Sampling(temperature, 1.0, WORKED if steps else DIRECT, stop(shown, worked=steps))


class _Model:
    """A bundled model, loaded when the first sample is drawn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: TransformersGenerator | None = None

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        if self._loaded is None:
            loaded = load_model(self.name)
            self._loaded = TransformersGenerator(loaded.model, loaded.tokenizer, name=self.name)
        return self._loaded(prompts, sampling, n=n, first=first, seed=seed)


@cache
def _kept(path: Path) -> SampleCache:
    return SampleCache(path)


class Kept:
    """A generator behind what is checked in (that of all rooms, and of one), what this machine drew, and the model itself.

    It remembers in `asked` the keys of all samples that it gave. `own` is what this machine drew, with `writer` (by default the bundled
    model) behind it.
    """

    def __init__(self, name: str, room: str = "", writer: Generator | None = None) -> None:
        self.name = name
        self.asked: dict[str, Sample] = {}
        self.own = Cached(writer or _Model(name), _kept(cache_dir() / "samples" / f"{name}.jsonl"), name=name)
        self._files = [_file(name, each) for each in dict.fromkeys(("", room))]

    def _place(self, keys: Sequence[str]) -> SampleCache | None:
        """The file that is checked in and holds all of these samples, if there is one."""
        return next((kept for path in self._files if (kept := _kept(path)).holds(keys)), None)

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of these samples are there already, in one file."""
        return self._place(keys) is not None or self.own.cache.holds(keys)

    def add(self, found: Sequence[tuple[str, Sample]]) -> None:
        """Keep samples under their keys that were drawn by other means: by a loop that reads no prompt twice, say."""
        self.own.cache.add(found)

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        """As `Generator` has it."""
        keys = [[key_of(self.name, text, sampling, seed, k) for k in range(first, first + n)] for text in prompts]
        found: dict[int, list[Sample]] = {}
        for i, own in enumerate(keys):
            if (kept := self._place(own)) is not None:
                here = Cached(None, kept, name=self.name)
                found[i] = here([prompts[i]], sampling, n=n, first=first, seed=seed)[0]
        rest = [i for i in range(len(prompts)) if i not in found]
        drawn = self.own([prompts[i] for i in rest], sampling, n=n, first=first, seed=seed) if rest else []
        found.update(zip(rest, drawn, strict=True))
        for i, own in enumerate(keys):
            read = found[i][0].spent.prompt
            self.asked.update((key, with_prompt(sample, read)) for key, sample in zip(own, found[i], strict=True))
        return [found[i] for i in range(len(prompts))]


def _file(model: str, room: str) -> Path:
    return FOLDER / (f"{room}-{model}.jsonl.gz" if room else f"{model}.jsonl.gz")


@cache
def generator(model: str = "smollm2-135m", room: str = "") -> Kept:
    """Samples of a bundled model: those checked in (a room's own too), those kept by this machine, and new ones, which are kept."""
    return Kept(model, room)


def shared(
    kind: Kind,
    level: int,
    wording: Wording = "plain",
    part: Part = "judged",
    n_items: int = 48,
    n: int = 24,
    temperature: float = 0.8,
    worked: bool = False,
    model: str = "smollm2-135m",
) -> list[Drawn]:
    """`n` samples of each of `n_items` items, of one seed: asking for fewer gives the first of the same."""
    asked = items(kind, level=level, n=n_items, part=part)
    prompts = [prompt(item, wording, worked=worked) for item in asked]
    found = generator(model)(prompts, sampling_of(kind, worked, temperature), n=n)
    return [Drawn(item, text, samples) for item, text, samples in zip(asked, prompts, found, strict=True)]


def write(path: Path, samples: Mapping[str, Sample]) -> None:
    """Samples by key as a file that is read without a model: the same bytes for the same samples."""
    lines = [json.dumps({"key": key, "sample": as_record(samples[key])}) for key in sorted(samples)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))
    _kept.cache_clear()  # whoever read it before knows less than it holds now


def main(rooms: Sequence[str]) -> None:
    """Draw what is missing of `SETS`, or of what the named rooms draw, and write it into `sets/`."""
    if not rooms:
        for number, wanted in enumerate(SETS, 1):
            drawn = shared(**asdict(wanted))
            share = sum(sum(one.right) for one in drawn) / sum(len(one.right) for one in drawn)
            print(f"{number} of {len(SETS)}: {wanted}: {share:.1%} right", file=sys.stderr, flush=True)
        for model in dict.fromkeys(wanted.model for wanted in SETS):
            write(_file(model, ""), generator(model).asked)
    for room in rooms:
        for model, kept in importlib.import_module(f"assay.experiments.reasoning.{room}").draw().items():
            common = _kept(_file(model, ""))
            write(_file(model, room), {key: sample for key, sample in kept.asked.items() if common.get(key) is None})


if __name__ == "__main__":
    main(sys.argv[1:])
