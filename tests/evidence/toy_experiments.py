"""Experiments whose outcome is known, for the tests of the runner; imported by the child processes too."""

import os
import time
from dataclasses import dataclass

import assay.catalogue
from assay.errors import InputError
from assay.experiments import Figure, Guard, Operator, Quality, Trial, experiment


@dataclass(frozen=True)
class Claim:
    id: str
    metric: str = "speed-up"
    value: float | None = 5.0
    unit: str = "x"
    baseline: str = "the slow way"
    conditions: str = ""
    higher_is_better: bool = True
    form: str = "ratio"
    quantity: str = "time"
    baseline_value: float | None = None


@dataclass(frozen=True)
class Paper:
    slug: str
    claims: tuple[Claim, ...]
    family: str = "toys"


LOSS = Claim("toy/loss", "NLL", 2.0, "nats", higher_is_better=False, form="bound", quantity="quality")
PAPERS = {
    paper.slug: paper
    for paper in (
        Paper("toy", (Claim("toy/speedup"), LOSS)),
        Paper("toybroken", tuple(Claim(f"toybroken/{what}", quantity="count") for what in ("raises", "crash", "hang", "memory", "unit"))),
        Paper("toyneeds", (Claim("toyneeds/gpu", quantity="count"),)),
        Paper("toyslow", (Claim("toyslow/points", quantity="memory"),)),
        Paper("toyplanned", (Claim("toyplanned/nothing"),)),
        Paper("toyrefuted", (Claim("toyrefuted/speedup"),)),
    )
}  # fmt: skip


def get(slug):
    if slug not in PAPERS:
        raise InputError(f"no paper is called {slug!r}")
    return PAPERS[slug]


def install(monkeypatch=None):
    """Put the toy papers in the catalogue's place, and a commit that nobody's editing changes."""
    import assay.evidence.place as place

    replacements = {
        (assay.catalogue, "get"): get,
        (assay.catalogue, "papers"): lambda: tuple(PAPERS.values()),
        (assay.catalogue, "FAMILIES"): ("toys", "empty"),
        (place, "commit"): lambda package: "toycommit",
    }
    for (module, name), value in replacements.items():
        monkeypatch.setattr(module, name, value) if monkeypatch else setattr(module, name, value)
    place.here.cache_clear()


def note(text):
    """Every run leaves a line, so that the tests can count them."""
    if os.environ.get("TOY_LOG"):
        with open(os.environ["TOY_LOG"], "a") as file:
            file.write(text + "\n")


SLEEP = Operator("sleeping", free="a shorter sleep")
DECLARED = {"operator": SLEEP, "paper": {}, "refuted_if": "it takes longer than the baseline"}
ACCURACY = Guard("accuracy", 0.05, higher_is_better=True, relative=False)


@experiment(
    "toy/speedup",
    points={"smoke": [{"n": 1}, {"n": 2}], "small": [{"n": 3}]},
    decides={"smoke": {"n": 2}},
    guard=ACCURACY,
    minutes=1,
    **DECLARED | {"paper": {"n": 5}},
    departures={"n": "five would take too long"},
)
def speedup(n):
    note(f"speedup {n}")
    return Trial(
        baseline=lambda: time.sleep(0.03),
        candidate=lambda: time.sleep(0.003),
        free=lambda: time.sleep(0.015),
        quality=lambda: Quality(0.9, 0.9, 0.88, 0.92, controls={"deleted": 0.1, "random": 0.5, "rival": 0.7}),
        details=lambda: {"n": n, "shape": (n, n), "bad": float("nan")},
        pairs=6,
    )


@experiment("toy/loss", points={"smoke": [{}]}, minutes=1, **DECLARED)
def loss():
    controls = {"deleted": 3.0, "random": 2.9}
    return Figure(2.1, "nats", low=2.05, high=2.15, baseline=2.5, controls=controls, details={"seen": True})


@experiment("toyrefuted/speedup", points={"smoke": [{}]}, minutes=1, **DECLARED)
def slower():
    return Trial(baseline=lambda: time.sleep(0.003), candidate=lambda: time.sleep(0.03), pairs=6)


@experiment("toybroken/raises", points={"smoke": [{}]}, minutes=1, **DECLARED)
def raises():
    raise ValueError("the stars are wrong")


@experiment("toybroken/crash", points={"smoke": [{}]}, minutes=1, **DECLARED)
def crash():
    os.abort()


@experiment("toybroken/hang", points={"smoke": [{}]}, minutes=0.05, **DECLARED)
def hang():
    time.sleep(600)


@experiment("toybroken/memory", points={"smoke": [{}]}, minutes=1, memory_gib=1.0, **DECLARED)
def memory():
    hoard = [bytearray(b"x" * 2**26) for _ in range(40)]
    time.sleep(30)
    return Figure(len(hoard), "x")


@experiment("toybroken/unit", points={"smoke": [{}]}, minutes=1, **DECLARED)
def wrong_unit():
    return Figure(4.0, "bytes")


@experiment("toyneeds/gpu", points={"smoke": [{"n": 1}, {"n": 2}]}, needs=("no_such_flag",), minutes=1, **DECLARED)
def needs_what_is_not_there(n):
    note("needs")
    return Figure(4.0, "x")


@experiment("toyslow/points", points={"smoke": [{"n": n} for n in range(3)]}, guard=ACCURACY, minutes=1, **DECLARED)
def slow(n):
    note(f"slow {n}")
    time.sleep(0.5)
    quality = Quality(0.9, 0.9, controls={"deleted": 0.1, "random": 0.5, "rival": 0.7})
    return Figure(4.0 + n, "x", quality=quality)
