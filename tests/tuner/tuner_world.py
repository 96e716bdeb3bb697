"""A world for the tuner's tests: child processes that only pretend, on a clock that goes by what they say they take."""

from __future__ import annotations

import json
import math

from assay.measure.isolate import ChildResult
from assay.tuner.journal import append
from assay.tuner.judging import differences
from assay.tuner.noninferiority import look, shares
from assay.tuner.recipe import Recipe

COST = {"dtype": 0.6, "compile": 0.9, "fp8_vs_int8": 0.6, "xattention": 0.8, "greenformers": 0.5}
LOSS = {"fp8_vs_int8": 0.002, "xattention": 0.004, "greenformers": 0.3}


class Children:
    """Stands for the child processes: a world whose costs and losses we know, and whose clock goes by what each step takes."""

    takes = {
        "survey": 10.0,
        "screen": 10.0,
        "assess": 20.0,
        "judge": 10.0,
        "prove": 30.0,
        "waterline": 5.0,
        "once": 5.0,
        "store": 5.0,
    }
    stored_dtype = "float32"
    configs: dict[str, list[dict]] = {}

    def __init__(self, cost=COST, loss=LOSS, die_after=None, costs=None, takes=None):
        self.cost, self.loss, self.die_after = cost, loss, die_after
        self.costs = {"start": 2.0, "load": 3.0, "run": 1.0, "loaded_run": 1.5, "quality": 5.0} | (costs or {})
        self.takes = self.takes | (takes or {})
        self.clock = 0.0
        self.calls: list[tuple[str, str]] = []
        self.limits: list[tuple[str, float]] = []

    def __call__(self, target, kwargs, *, timeout_s, memory_bytes):
        function = target.split(":")[1]
        if self.die_after is not None and len(self.calls) >= self.die_after:
            raise KeyboardInterrupt
        recipes = (
            kwargs.get("recipes", []) if function == "screen" else [kwargs["recipe"]] if "recipe" in kwargs else []
        )
        self.calls.append((function, ", ".join(Recipe.model_validate(recipe).label() for recipe in recipes)))
        self.limits.append((function, timeout_s))
        takes = self.takes[function]
        takes = takes(kwargs) if callable(takes) else takes
        self.clock += min(takes, timeout_s)
        if takes > timeout_s:
            return ChildResult(
                "timeout", None, f"killed after {timeout_s:.1f} s, its time limit", timeout_s, 2**30, 1.0
            )
        return ChildResult("ok", getattr(self, function)(**kwargs), "", takes, 2**30, 1.0)

    def labels(self, function):
        return [label for name, label in self.calls if name == function]

    def survey(self, settings, dtype, seconds):
        effect = {"kind": "linear", "macs": 0.5, "bytes": 0.5, "dtype": None}
        slots = {
            "greenformers": "structure",
            "dtype": "dtype",
            "fp8_vs_int8": "linear",
            "xattention": "attention",
            "attention_backend": "attention",
            "compile": "compile",
        }
        kind = {"seconds": 1.0, "macs": 1e9, "bytes": 1e6}
        options = [
            {
                "transform": name,
                "config": config,
                "slot": slot,
                "exact": name in ("dtype", "compile", "attention_backend"),
                "effects": [effect],
                "share": 0.75 if name == "xattention" else 1.0,
                "reached": "the windowed layers stay as they are" if name == "xattention" else "",
            }
            for name, slot in slots.items()
            if name in self.cost
            for config in self.configs.get(name, [{}])
        ]
        bars = [{"name": "q_proj", "share": 0.5, "intensity": 30.0, "dtype": "float32"}]
        kinds = {"kinds": {"linear": kind, "attention": kind, "other": kind}, "waterline": bars}
        return {
            **kinds,
            "base": kinds,
            "costs": self.costs,
            "profiled_tokens": 64,
            "proof_share": 0.5,
            "options": options,
            "unfit": {"prepacking": "no"},
            "architecture": "llama",
            "stored": self.stored_dtype,
            "dtype": "bfloat16",
            "parameters": 1000,
        }

    def waterline(self, settings, recipe, tokens):
        return self.survey(settings, None, 1.0)["base"]

    def outcome(self, recipe):
        names = [step["transform"] for step in recipe["steps"]]
        nll = 2.0 + math.log1p(sum(self.loss.get(name, 0.0) for name in names))
        return math.prod(self.cost[name] for name in names), [nll] * 40

    def screen(self, settings, base, recipes, seconds, each, least, journal):
        found = {}
        for recipe in recipes:
            key = Recipe.model_validate(recipe).key()
            ratio = self.outcome(recipe)[0] / self.outcome(base)[0]
            found[key] = {"status": "ok", "ratio": ratio, "layers": 4, "of": 30}
            if journal:
                append(journal, f"screen:{key}", found[key])
        return found

    def assess(self, settings, recipe, known, seconds, text, least, reference=None, max_drop=None, base=None):
        cost, nll = self.outcome(recipe)
        labels = json.dumps(recipe["steps"])
        found = {
            "equivalent": False,
            "function": labels,
            "structure": labels,
            "samples": [cost] * 5,
            "run_seconds": cost,
            "text": text,
            "paths": {"linear: kernel": 3},
        }
        return found | {"quality": {"prefill": nll}, "apply_seconds": 0.0}

    def judge(self, settings, recipe, attempt, max_drop, seconds):
        before, after = self.outcome({"steps": []})[1][:30], self.outcome(recipe)[1][:30]
        figures = {"prefill": {"baseline": before, "candidate": after, "kl": [0.01] * 30, "top1": [0.9] * 30}}
        found = look(differences(figures), shares(attempt, 2)[0], max_drop)
        middle = {"path": "prefill", "low": 0.0, "high": 1.0}
        return {
            "verdict": found.verdict,
            "reason": "",
            "complete": True,
            "looks": [found.document()],
            "planned": [30],
            "source": "30 windows of 256 tokens of bundled text (the proof's documents)",
            "figures": figures,
            "kl": {**middle, "mean": 0.01},
            "top1": {**middle, "mean": 0.9},
            "eval": None,
            "seconds": 1.0,
        }

    def prove(self, settings, recipes, pairs, seconds, end):
        noise = [1 + 0.002 * math.sin(i) for i in range(9)]
        samples = {name: [self.outcome(recipe)[0] * x for x in noise] for name, recipe in recipes.items()}
        paths = {name: {"linear: kernel": 9} for name in recipes}
        return {
            "samples": samples,
            "quality": {},
            "complete": True,
            "load_before": 0.0,
            "load_after": 0.0,
            "paths": paths,
        }
