"""A machine whose clock only moves when a program runs, and a backend on it: what programs cost stands in their text."""

from __future__ import annotations

import random
import re

from assay.methods.code.llm_library_optimization import Answer, BuildError, Candidate, Case, Input, Program


class Machine:
    """`drift` says how much slower it is at a time; `noise` is the spread of a run's logarithm."""

    def __init__(self, noise=0.0, drift=lambda now: 1.0, seed=0):
        self.now, self.noise, self.drift, self.rng = 0.0, noise, drift, random.Random(seed)

    def run(self, cost):
        def seconds(calls):
            took = calls * cost * self.drift(self.now) * self.rng.lognormvariate(0, self.noise)
            self.now += took
            return took

        return seconds


class Simulated:
    """Programs are Python with their cost in a comment, `# 0.5 ms`; they are built and called here, and timed by the machine."""

    protected = True
    sanitizers = ""

    def __init__(self, machine=None, facts=None):
        self.machine, self.more, self.timed = machine or Machine(), facts or {}, []

    def facts(self):
        return {"language": "simulated", **self.more}

    def build(self, candidate):
        space = {}
        try:
            exec(candidate.source, space)
        except SyntaxError as error:
            raise BuildError(str(error)) from None
        cost = float(re.search(r"# ([\d.]+) ms", candidate.source)[1]) / 1e3
        return _Simulated(self, candidate, space["f"], cost)


class _Simulated(Program):
    def __init__(self, backend, candidate, function, cost):
        self.backend, self.candidate, self.function, self.cost = backend, candidate, function, cost

    def answers(self, cases):
        found = []
        for args in cases:
            try:
                found.append(Answer(self.function(*args)))
            except Exception as error:
                found.append(Answer(error=f"{type(error).__name__}: {error}"))
        return found

    def seconds(self, args, calls):
        self.backend.timed.append(self.candidate.name)
        return self.backend.machine.run(self.cost)(calls)

    def faults(self, cases):
        return ""


def program(cost, body="sum(x)", name="", **more):
    """A candidate that costs so many milliseconds."""
    return Candidate(name or f"{cost} ms", f"def f(x):  # {cost} ms\n    return {body}\n", **more)


def sums(reference=None, **more):
    """A case: the sum of a list."""
    inputs = (
        Input("short", "short", ([1, 2],)),
        Input("long", "long", (list(range(50)),)),
        Input("none", "empty", ([],)),
    )
    return Case(
        "sums", "f(x) is the sum of a list of whole numbers.", reference or program(2.0), inputs, "long",
        **{"random": lambda rng: ([rng.randint(-9, 9) for _ in range(rng.randint(0, 5))],), "draws": 20, **more},
    )  # fmt: skip
