"""Where the time and the bytes of an image classifier go, module by module, as `assay profile` shows them."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.measure.cost import register_macs
from assay.measure.machine import calibrate
from assay.measure.profile import Profile, Row, profile_model
from assay.tuner.images.artefact import is_image_artefact, load
from assay.tuner.images.models import ImageModel, load_image_model
from assay.workloads.picture_folder import decoded, picture_folder
from assay.workloads.pictures import bundled_pictures

FORWARD = "forward"  # what the one phase of a classifier is called
CODES = "The weights of 8-bit layers are codes, which do not count as parameters; their bytes are counted."
PREPARED = 9  # pictures that decoding and preparing is timed on, one at a time; our choice


@dataclass(frozen=True)
class PictureProfile:
    """A classifier's profile over `pictures` at a time, from their pixel values to their logits.

    `prepare_seconds` is what decoding and preparing takes before that, for each picture: the median of a few, one at a time.
    """

    architecture: str
    pictures: int
    measured: Profile
    prepare_seconds: float
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = self.measured.as_dict()
        for name in ("prompt_tokens", "new_tokens", "groups"):
            del found[name]
        own = {name: getattr(self, name) for name in ("architecture", "pictures", "prepare_seconds", "notes")}
        return {"kind": "images", **own, **found}


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Rows in which equal modules of equal layers are added up, with "*" for the numbers in their names.

    Equal are those of one kind with as many parameters and MACs: what stands in a row of unlike layers keeps its own name.
    """
    groups: dict[tuple[str, str, int, int], Row] = {}
    for row in rows:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
        known = groups.setdefault((name, row.kind, row.params, row.macs), dataclasses.replace(row, modules=0))
        if known.modules:
            known.name = name
            for added in ("calls", "params", "macs", "bytes", "seconds", "fastest", "attainable_seconds"):
                setattr(known, added, getattr(known, added) + getattr(row, added))
        known.modules += row.modules
    return list(groups.values())


def profile_images(source: str, pictures: int, say: Callable[[str], None]) -> PictureProfile:
    """Load a classifier, an artefact with its recipe applied, and profile it on crops of bundled photographs, `pictures` at a time.

    Raises InputError for a folder that holds no readable classifier, MissingError without the package that has the photographs.
    """
    loaded = load(Path(source)) if is_image_artefact(source) else load_image_model(source)
    paths = picture_folder(bundled_pictures()).paths
    data = [path.read_bytes() for path in paths[: max(pictures, PREPARED)]]
    limits = calibrate(device="cpu", say=say)
    say("timing the modules")
    pixels = loaded.inputs([decoded(data[place % len(data)]) for place in range(pictures)])
    dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), pixels.dtype)
    measured = _named(profile_model(loaded.model, pixels.to(dtype), calibration=limits))
    notes = [CODES] if any(buffer.dtype in (torch.int8, torch.uint8) for buffer in loaded.model.buffers()) else []
    return PictureProfile(loaded.architecture, pictures, measured, _preparing(loaded, data[:PREPARED]), notes)


def _preparing(loaded: ImageModel, data: list[bytes]) -> float:
    """Seconds from the bytes of a file to its pixel values."""
    found = []
    for one in data:
        start = time.perf_counter()
        loaded.inputs([decoded(one)])
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _named(measured: Profile) -> Profile:
    """The same profile, its phase called what it is: a classifier has no prompt."""
    name: Any = FORWARD
    return dataclasses.replace(
        measured,
        rows=[dataclasses.replace(row, phase=name) for row in measured.rows],
        seconds={name: measured.seconds["prefill"]},
        hooked_seconds={name: measured.hooked_seconds["prefill"]},
    )


def _convolution_macs(x: Tensor, scale: Any, zero: Any, packed: Tensor, scales: Tensor, *rest: Any, out: Tensor) -> int:
    """Of oneDNN's 8-bit convolution: a packed filter's weights for every output. x (B, C, H, W) to out (B, N, H', W')."""
    return out.numel() * (packed.numel() // scales.numel())


register_macs("onednn::qconv_pointwise", _convolution_macs, "linear", "int8")
