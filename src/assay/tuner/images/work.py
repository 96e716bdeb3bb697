"""One run of an image model's work, from the bytes of a file to a class, and what a model says of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.tuner.images.models import ImageModel, load_image_model, logits
from assay.tuner.images.recipe import GOALS, ImageGoal
from assay.workloads.picture_folder import Part, PictureFolder, class_numbers, decoded, picture_folder

BATCH = 16
ONE_BY_ONE, TOGETHER, AT_PEAK = 4, 2 * BATCH, 8  # pictures of a run: for latency, throughput, memory; our choice
CALIBRATED = 32  # pictures that ranges are taken from


@dataclass(frozen=True)
class Unit:
    """How a goal's cost (less is better) is shown."""

    name: str
    higher_is_better: bool
    show: Callable[[float], float]


UNITS: dict[str, Unit] = {
    "latency": Unit("ms a picture", False, lambda seconds: 1e3 * seconds),
    "throughput": Unit("pictures/s", True, lambda seconds: 1 / seconds),
    "memory": Unit("MiB at peak", False, lambda size: size / 2**20),
}


@dataclass(frozen=True)
class Settings:
    """What defines a run apart from its recipe; JSON-able, so that children rebuild the same work. `workload` is a folder of pictures."""

    model: str
    goal: ImageGoal
    workload: str

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise InputError(f"--goal must be one of {', '.join(GOALS)} for an image model; got {self.goal!r}")

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Work:
    """A model and the pictures it is tuned for. `wanted` are the numbers of their classes, None where they are not the model's."""

    settings: Settings
    loaded: ImageModel
    pictures: PictureFolder
    wanted: dict[str, int] | None

    def calibration(self) -> list[Tensor]:
        """Batches of inputs to take ranges from, of pictures that nothing is judged on."""
        data = self.pictures.part("calibrate").spread(CALIBRATED).read()
        return [self.pixels(data[start : start + BATCH]) for start in range(0, len(data), BATCH)]

    def pixels(self, data: Sequence[bytes]) -> Tensor:
        """Inputs (B, C, H, W) of the files' bytes."""
        return self.loaded.inputs([decoded(one) for one in data])

    def runner(self, model: nn.Module) -> tuple[Callable[[], Any], int]:
        """One run of the goal's work, and how many pictures it takes. Reading the files is not part of it, decoding them is."""
        goal = self.settings.goal
        count = {"latency": ONE_BY_ONE, "throughput": TOGETHER, "memory": AT_PEAK}[goal]
        data = self.pictures.part("search").spread(count).read()
        size = 1 if goal == "latency" else min(BATCH, len(data))

        def run() -> list[int]:
            return [
                guess
                for start in range(0, len(data), size)
                for guess in self.guesses(model, data[start : start + size])
            ]

        return run, len(data)

    @torch.inference_mode()
    def guesses(self, model: nn.Module, data: Sequence[bytes]) -> list[int]:
        """The class the model gives each picture."""
        found: list[int] = logits(model, self.pixels(data)).argmax(-1).tolist()
        return found

    def told(self, model: nn.Module, part: Part, most: int | None = None) -> list[int]:
        """The classes of a part's pictures, `most` of them at even distances. -1 stands for logits that are not finite."""
        pictures = self.pictures.part(part)
        data = (pictures if most is None else pictures.spread(most)).read()
        found: list[int] = []
        for start in range(0, len(data), BATCH):
            with torch.inference_mode():
                out = logits(model, self.pixels(data[start : start + BATCH]))
            finite = torch.isfinite(out).all(-1)
            found += torch.where(finite, out.argmax(-1), -1).tolist()
        return found

    def right(self, part: Part, most: int | None = None) -> list[int] | None:
        """The numbers of the pictures' classes, as `told` orders them; None where they are not known."""
        if self.wanted is None:
            return None
        pictures = self.pictures.part(part)
        return [self.wanted[name] for name in (pictures if most is None else pictures.spread(most)).classes]


def build(settings: Settings) -> Work:
    """The same work in every process. Raises InputError for a model or pictures that cannot be read."""
    loaded = load_image_model(settings.model)
    pictures = picture_folder(settings.workload)
    numbers = class_numbers(pictures.classes, loaded.labels) if pictures.labelled else None
    wanted = None if numbers is None else dict(zip(pictures.classes, numbers, strict=True))
    return Work(settings, loaded, pictures, wanted)


def scores(before: Sequence[int], after: Sequence[int], right: Sequence[int] | None) -> tuple[list[float], list[float]]:
    """What each picture scores, as loaded and by a candidate: 1 for the right class, or, where none is known, for the same class.

    >>> scores([1, 2, 3], [1, 0, 3], None), scores([1, 2, 3], [1, 0, 3], [1, 0, 0])
    (([1.0, 1.0, 1.0], [1.0, 0.0, 1.0]), ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]))
    """
    known = before if right is None else right

    def score(told: Sequence[int]) -> list[float]:
        return [float(guess == want and guess >= 0) for guess, want in zip(told, known, strict=True)]

    return ([1.0] * len(before) if right is None else score(before)), score(after)
