"""Places in libraries made faster: pillow's extrema of an 8-bit image on photographs, and four places more by the same protocol.

The conversation of an expert with ChatGPT-4 is not repeated: candidates are our own, written beforehand. So the record is about whether
such a place can be made faster by that much, and whether the protocol tells so, not about who finds it. The deciding candidate is named
in the code: two choices without a branch in the place of "if lower, else if higher", all else as it is, compiled for any processor of
its kind. It has to answer as the reference does on all recorded and random images, and to pass the address and undefined-behaviour
sanitizers, before it is timed against pillow's own function.

The other places are shown beside it, each with all that was tried at it: the same extrema with NumPy and in Python alone, and two in
Python's own library that assay spends time in. Where no candidate pays, that is what the details say.

What decides was changed once after a look: the candidate was to work on every row without a branch, until pillow was seen to stop at a row
once 0 and 255 are known. The reference got that exit then, and the candidate that differs from it by one change decides.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from assay import catalogue
from assay.errors import MissingError
from assay.experiments.core import Guard, Operator, Quality, Trial, experiment
from assay.methods.code import llm_library_optimization as room
from assay.methods.code.llm_library_optimization import Bench, Candidate, Case, PatchError, Rules
from assay.methods.code.llm_library_optimization.backends import Backend
from assay.methods.code.llm_library_optimization.loci import extrema, library
from assay.methods.code.llm_library_optimization.loci.extrema import Image

DECIDING = "early_exit"
"""The one change that keeps all else that the library's code does, its way of being done early too."""
PHOTOGRAPHS = (
    "sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg", "skimage/data/astronaut.png",
    "skimage/data/chelsea.png", "skimage/data/coffee.png", "skimage/data/rocket.jpg",
)  # fmt: skip
SOURCES = (
    "assay.checks",
    "assay.paths",
    "assay.measure.stats",
    "assay.measure.clock",
    "assay.catalogue",
    "assay.workloads.images",
)
"""Modules that are hashed as all sources of assay are; their texts are the recorded inputs of `ast.dump`."""
PLACES = ["extrema in C", "extrema with NumPy", "extrema in Python", "ast.dump", "json.dumps with an indent"]
CALLS = {"photographs": 5, "constant": 20, "random": 20, "16 megapixels": 1}
"""Calls on each image in one timed run."""


@cache
def grey_photographs() -> dict[str, Image]:
    """Six photographs at their own size, in grey as pillow makes them: 300 x 451 to 512 x 512.

    Their files are read without the packages that they come with, which take seconds to import. Raises MissingError without these.
    """
    from PIL import Image as Pillow

    found = {}
    for path in PHOTOGRAPHS:
        package, _, inside = path.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise MissingError(f"{path} comes with {package}: pip install 'assay[vision]'")
        with Pillow.open(Path(spec.submodule_search_locations[0]) / inside) as picture:
            found[Path(path).stem] = np.asarray(picture.convert("L"))
    return found


def images_of(kind: str) -> list[Image]:
    """The images of one point."""
    if kind == "photographs":
        return list(grey_photographs().values())
    if kind == "16 megapixels":  # beyond the caches: a photograph without black, in tiles
        one = next(image for image in grey_photographs().values() if image.min() > 0)
        return [np.tile(one, (-(-4096 // one.shape[0]), -(-4096 // one.shape[1])))[:4096, :4096].copy()]
    return [image for of, image in extrema.made_images().values() if of == kind]


def by_pillow(image: Image) -> Callable[[], tuple[int, int]]:
    """The library's own function on an image of its own."""
    from PIL import Image as Pillow

    return Pillow.fromarray(image).getextrema  # type: ignore[return-value]


def by_numpy(image: Image) -> Callable[[], tuple[int, int]]:
    return lambda: (int(image.min()), int(image.max()))


def by_c(
    candidate: Candidate, flags: tuple[str, ...] = extrema.FLAGS
) -> Callable[[Image], Callable[[], tuple[int, int]]]:
    """A C function called from Python, the table of rows made beforehand, as pillow's is."""
    loaded = ctypes.CDLL(str(room.shared_library(candidate.source, flags))).extrema
    loaded.restype = None

    def prepared(image: Image) -> Callable[[], tuple[int, int]]:
        rows, found = extrema.Rows(image), (ctypes.c_uint8 * 2)()
        second = ctypes.byref(found, 1)

        def call() -> tuple[int, int]:
            loaded(rows.address, rows.width, rows.height, found, second)
            return found[0], found[1]

        return call

    return prepared


def over(
    images: Sequence[Image], how: Callable[[Image], Callable[[], tuple[int, int]]], calls: int
) -> Callable[[], tuple[int, int]]:
    """One timed run: every image so many times. What the last call found is given back."""
    functions = [how(image) for image in images]

    def run() -> tuple[int, int]:
        found = (0, 0)
        for function in functions:
            for _ in range(calls):
                found = function()
        return found

    return run


def right(how: Callable[[Image], Callable[[], tuple[int, int]]], bench: Bench) -> float:
    """The share of the gate's images on which pillow's answer is given."""
    images = [bench.case.arguments(one)[0] for one in bench.inputs]
    return float(np.mean([how(image)() == by_pillow(np.ascontiguousarray(image))() for image in images]))


def quality(accepted: Callable[[Image], Callable[[], tuple[int, int]]], bench: Bench) -> Quality:
    """What was accepted, against the reference; without the gate the fastest is taken, which is wrong."""
    shares = [right(by_c(one), bench) for one in (*extrema.CANDIDATES.values(), extrema.SAMPLED)]
    return Quality(
        candidate=right(accepted, bench),
        baseline=right(by_c(bench.case.reference), bench),
        controls={
            "deleted": right(by_c(extrema.SAMPLED), bench),
            "random": float(np.mean(shares)),
            "rival": right(lambda image: by_numpy(image[::8, ::8]), bench),
        },
        rival="the extrema of every eighth pixel both ways",
    )


# ----------------------------------------------------------------------------------------------------------- all places


def trees() -> tuple[Case, Candidate]:
    return library.trees({name: room.source_of(name) for name in SOURCES})


def documents() -> tuple[Case, Candidate]:
    """What `assay papers --json` writes, by family."""
    papers = catalogue.papers()
    families = dict.fromkeys(paper.family for paper in papers)
    return library.documents(
        {family: [asdict(paper) for paper in papers if paper.family == family] for family in families}
    )


def places() -> dict[str, Callable[[], tuple[Case, Backend, Sequence[Candidate]]]]:
    """The attempts: each a place with what is tried there, in this order."""
    photographs = grey_photographs()
    return {
        "extrema in C": lambda: (
            extrema.in_c(photographs), extrema.backend(), [*extrema.CANDIDATES.values(), extrema.SAMPLED, extrema.BEYOND]
        ),
        "extrema with NumPy": lambda: (extrema.with_numpy(photographs), extrema.python_backend(), extrema.NUMPY_CANDIDATES),
        "extrema in Python": lambda: (extrema.in_python(photographs), extrema.python_backend(), extrema.PYTHON_CANDIDATES),
        "ast.dump": lambda: _with(trees(), library.trees_backend()),
        "json.dumps with an indent": lambda: _with(documents(), library.documents_backend()),
    }  # fmt: skip


def _with(found: tuple[Case, Candidate], backend: Backend) -> tuple[Case, Backend, Sequence[Candidate]]:
    case, candidate = found
    return case, backend, [candidate]


def tried(names: Sequence[str], rules: Rules) -> dict[str, Any]:
    """Every candidate of these places through the protocol, with the reference against itself beside them."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            case, backend, candidates = places()[name]()
        except PatchError as error:
            found[name] = {"not here": str(error)}
            continue
        bench = Bench(case, backend, rules)
        itself = bench.attempt(Candidate("the reference itself", case.reference.source, "tool"))
        attempts = [bench.attempt(candidate) for candidate in candidates]
        accepted = [one for one in attempts if one.accepted and one.compared is not None]
        best = max(accepted, key=lambda one: one.compared.speedup.low, default=None)  # type: ignore[union-attr]
        found[name] = {
            "case": case.digest,
            "decides": case.decides,
            "environment": bench.environment,
            "reference against itself": itself.state,
            "attempts": [_told(one) for one in attempts],
            "best": best.candidate.name if best is not None else "none was accepted",
            "speed-up of the best": best.compared.speedup.median
            if best is not None and best.compared is not None
            else 1.0,
        }
    return found


def _told(attempt: room.Attempt) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": attempt.candidate.name,
        "digest": attempt.candidate.digest,
        "origin": attempt.candidate.origin,
        "state": attempt.state,
    }
    if attempt.compared is None:
        return told | {"why": attempt.gate.why[:200]}
    by_kind = {kind: [seen.low, seen.median, seen.high] for kind, seen in attempt.compared.by_kind.items()}
    return told | {
        "by kind of input": by_kind,
        "slower on": list(attempt.compared.slower_on),
        "sign test": attempt.compared.sign_test,
        "checked on": attempt.gate.checked,
        "sanitizers": attempt.gate.sanitizers,
        "joules a call": {who: used.joules for who, used in attempt.energy.items()},
        "energy": next((used.how for used in attempt.energy.values()), ""),
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """In how many of the places an attempt was accepted: the claim's second half."""
    here = [one for one in found.values() if "not here" not in one]
    improved = [one for one in here if one["best"] != "none was accepted"]
    return {"places": len(here), "improved": len(improved), "an improvement in every place": len(improved) == len(here)}


# ------------------------------------------------------------------------------------------------------------- experiment


@experiment(
    "llm_library_optimization/speedup",
    points={
        "smoke": [{"images": "photographs", "pairs": 6, "places": ["extrema in C"]}],
        "small": [
            {"images": "photographs", "pairs": 30, "places": PLACES},
            *({"images": kind, "pairs": 30, "places": []} for kind in ("16 megapixels", "constant", "random")),
        ],
        "full": [
            {"images": "photographs", "pairs": 100, "places": PLACES},
            *({"images": kind, "pairs": 100, "places": []} for kind in ("16 megapixels", "constant", "random")),
        ],
    },
    operator=Operator(
        "the extrema of an 8-bit image in memory", free="NumPy's min and max of the same pixels, two calls"
    ),
    paper={"images": "photographs", "library": "pillow of 2023", "who": "ChatGPT-4 with an expert"},
    decides={
        scale: {"images": "photographs", "pairs": pairs, "places": PLACES}
        for scale, pairs in (("small", 30), ("full", 100))
    },
    departures={
        "library": "the pillow that is installed here",
        "who": "no expert with ChatGPT-4 is here: candidates are our own, written beforehand, and the deciding one is named in the code",
    },
    refuted_if="on photographs the candidate is slower than pillow's own code, or does not answer as it does and so is not accepted",
    refutes=lambda record: not record["details"]["accepted"] or record["measured"]["high"] < 1,
    guard=Guard("share of images answered as pillow does", margin=0.01, higher_is_better=True, relative=False),
    measured_here="speed-up over pillow's own getextrema on six grey photographs, by our own candidate in C, no expert with ChatGPT-4",
    minutes=15,
)  # fmt: skip
def speedup(images: str, pairs: int, places: Sequence[str]) -> Trial:
    """Pillow's getextrema against the candidate that passed the gate (the reference in its place if it did not), by images.

    The arms say what the flags do and what the change does: the reference's own loop with the same flags, the candidate as `-O2` and for
    this very processor, and the other candidates. Details: every attempt at every place.
    """
    case = extrema.in_c(grey_photographs())
    backend = extrema.backend()
    bench = Bench(case, backend, Rules(pairs=pairs, run_seconds=0.001))
    gate = bench.gate(extrema.CANDIDATES[DECIDING])
    chosen = by_c(extrema.CANDIDATES[DECIDING] if gate.passed else case.reference)
    pictures, calls = images_of(images), CALLS[images]
    arms = {
        f"the library's loop in C, {' '.join(extrema.FLAGS)}": by_c(case.reference),
        "the candidate, -O2": by_c(extrema.CANDIDATES[DECIDING], ("-O2",)),
        f"the candidate, {' '.join(extrema.NATIVE)}": by_c(extrema.CANDIDATES[DECIDING], extrema.NATIVE),
        **{f"candidate: {one.name}": by_c(one) for name, one in extrema.CANDIDATES.items() if name != DECIDING},
    }

    def details() -> dict[str, Any]:
        found = tried(places, bench.rules)
        return {
            "accepted": gate.passed,
            "why not": gate.why,
            "checked on": gate.checked,
            "sanitizers": gate.sanitizers,
            "candidate": extrema.CANDIDATES[DECIDING].digest,
            "reference": case.reference.digest,
            "inputs": case.digest,
            "environment": bench.environment,
            "pixels": [int(image.size) for image in pictures],
            "both 0 and 255 occur": sum(int(image.min() == 0 and image.max() == 255) for image in pictures),
            "attempts by place": found,
            "improvement in every place": summary(found),
        }

    return Trial(
        baseline=over(pictures, by_pillow, calls),
        candidate=over(pictures, chosen, calls),
        free=over(pictures, by_numpy, calls),
        arms={name: over(pictures, how, calls) for name, how in arms.items()},
        quality=lambda: quality(chosen, bench),
        details=details,
        pairs=30,
    )
