"""Real samples that the experiments on test-time compute share: drawn once, evaluated at every N.

`python -m assay.experiments.reasoning.samples` draws the sets in `SETS` that are not there yet, in a journal that goes on where it was
stopped, and writes them beside this file, where experiments read them without a model. Other sets are drawn when they are asked for,
and kept in the cache folder.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling, TransformersGenerator, as_record
from assay.methods.core.reasoning.samples import Cached, SampleCache, key_of
from assay.paths import atomic_file, cache_dir
from assay.workloads.models import load_model
from assay.workloads.reasoning import Item, Kind, Part, Wording, answer_of, items, prompt, right, stop

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
    n_items: int = 60
    n: int = 32
    temperature: float = 0.8
    worked: bool = False
    model: str = "smollm2-135m"


SETS: tuple[Set, ...] = ()
"""The sets that are checked in, settled on the pilot part."""


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


class _Both:
    """A generator behind two caches: what is checked in, and what this machine drew."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._own = Cached(_Model(name), _kept(cache_dir() / "samples" / f"{name}.jsonl"))
        self._shipped = _kept(FOLDER / f"{name}.jsonl.gz")

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, first: int = 0, seed: int = 0
    ) -> list[list[Sample]]:
        shipped = Cached(None, self._shipped, name=self.name)
        found: dict[int, list[Sample]] = {}
        for i, text in enumerate(prompts):
            if all(self._shipped.get(key_of(self.name, text, sampling, seed, k)) for k in range(first, first + n)):
                found[i] = shipped([text], sampling, n=n, first=first, seed=seed)[0]
        rest = [i for i in range(len(prompts)) if i not in found]
        drawn = self._own([prompts[i] for i in rest], sampling, n=n, first=first, seed=seed) if rest else []
        found.update(zip(rest, drawn, strict=True))
        return [found[i] for i in range(len(prompts))]


def generator(model: str = "smollm2-135m") -> _Both:
    """Samples of a bundled model: those checked in, those kept by this machine, and new ones, which are kept."""
    return _Both(model)


def shared(
    kind: Kind,
    level: int,
    wording: Wording = "plain",
    part: Part = "judged",
    n_items: int = 60,
    n: int = 32,
    temperature: float = 0.8,
    worked: bool = False,
    model: str = "smollm2-135m",
) -> list[Drawn]:
    """`n` samples of each of `n_items` items, of one seed: asking for fewer gives the first of the same."""
    asked = items(kind, level=level, n=n_items, part=part)
    prompts = [prompt(item, wording, worked=worked) for item in asked]
    found = generator(model)(prompts, sampling_of(kind, worked, temperature), n=n)
    return [Drawn(item, text, samples) for item, text, samples in zip(asked, prompts, found, strict=True)]


def main() -> None:
    """Draw what is missing of `SETS`, and write it beside this file."""
    lines: dict[str, dict[str, str]] = {}
    for number, wanted in enumerate(SETS, 1):
        drawn = shared(**asdict(wanted))
        sampling = sampling_of(wanted.kind, wanted.worked, wanted.temperature)
        for one in drawn:
            for k, sample in enumerate(one.samples):
                key = key_of(wanted.model, one.prompt, sampling, 0, k)
                kept = as_record(sample)
                kept["spent"]["prompt"] = one.samples[0].spent.prompt
                lines.setdefault(wanted.model, {})[key] = json.dumps({"key": key, "sample": kept})
        share = sum(sum(one.right) for one in drawn) / sum(len(one.right) for one in drawn)
        print(f"{number} of {len(SETS)}: {wanted}: {share:.1%} right", file=sys.stderr, flush=True)
    FOLDER.mkdir(exist_ok=True)
    for model, found in lines.items():
        with atomic_file(FOLDER / f"{model}.jsonl.gz") as path:
            path.write_bytes(gzip.compress("\n".join(found[key] for key in sorted(found)).encode() + b"\n", mtime=0))


if __name__ == "__main__":
    main()
