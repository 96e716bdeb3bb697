"""Lines of runs of `assay tune` for tests, as artefacts hold them, with everything filled in that does not matter."""

from datetime import UTC, datetime, timedelta

from assay.evidence import tuned

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

DTYPE = ("dtype", {"dtype": "bfloat16"})
INT8 = ("fp8_vs_int8", {"rotation": 16})
SPARSE = ("xattention", {"tau": 0.9})
KERNEL = ("attention_backend", {"backend": "kernel"})
MODULES = {
    "dtype": "assay.methods.builtin.dtype",
    "fp8_vs_int8": "assay.methods.compression.fp8_vs_int8",
    "xattention": "assay.methods.attention.xattention",
    "attention_backend": "assay.methods.builtin.attention_backend",
}
TRIED = {
    (): 8.0,
    ("dtype",): 4.0,
    ("dtype", "fp8_vs_int8"): 2.0,
    ("dtype", "xattention"): 2.5,
    ("dtype", "fp8_vs_int8", "xattention"): 1.0,
}
"""Recipes by their transforms, and what they cost: together the two gain 4, alone 2 and 1.6."""
CONFIGS = dict([DTYPE, INT8, SPARSE, KERNEL])


def steps(*names):
    return [{"transform": name, "config": CONFIGS.get(name, {})} for name in names]


def row(names, cost, *, kind=None, drop=0.004, **changes):
    """A line of a measured recipe, with five samples that lie close to its cost."""
    kind = kind or ("baseline" if not names else "free" if names == ("dtype",) else "candidate")
    found = {
        "kind": "trial",
        "row": kind,
        "recipe": steps(*names),
        "status": "ok",
        "cost": cost,
        "samples": [] if cost is None else [cost * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)],
        "drop": {"median": 0.0, "low": 0.0, "high": 0.0}
        if kind == "baseline"
        else {"median": drop, "low": drop - 0.001, "high": drop + 0.001},
        "error": "",
    }
    return found | changes


def lines(tried=None, *, best=("dtype", "fp8_vs_int8", "xattention"), minutes=0, quality=None, fresh=True, **changes):
    """The lines of a run that proved its best recipe, four times what is free; `tried` maps transforms to costs."""
    level = {"label": "x", "value": 10.0, "unit": "ms to the first token", "low": 9.0, "high": 11.0}
    summary = {
        "kind": "summary",
        "goal": "ttft",
        "model": "smollm2-135m",
        "architecture": "llama",
        "prompt_tokens": 4096,
        "new_tokens": 32,
        "max_drop": 0.01,
        "baseline": level | {"label": "as loaded"},
        "free_baseline": level,
        "best": level,
        "speedup_vs_free": {"median": 4.0, "low": 3.8, "high": 4.2},
        "speedup": {"median": 8.0, "low": 7.5, "high": 8.5},
        "papers": {"exact": True, "speedup": {"median": 3.0, "low": 2.9, "high": 3.1}},
        "quality": {
            "judged": True, "verdict": "holds", "metric": "perplexity (prefill)", "drop": 0.005, "low": 0.003, "high": 0.007, "level": 0.96,
        } | (quality or {}),
        "helped": True,
        "recipe": steps(*best),
        "notes": [],
        "noisy": False,
        "seconds": 600.0,
        "machine": {"processor": "Run CPU, 2 logical cores (2 physical)", "SIMD": "avx2 fma", "memory": "4.0 GiB", "GPU": "none",
                    "system": "Linux 6", "torch": "2.1", "load": 0.1, "threads": 2, "fingerprint": "mine"},
        "command": "assay tune smollm2-135m --goal ttft -o out",
        "commit": "c0ffee",
        "created": (START + timedelta(minutes=minutes)).isoformat(),
    }  # fmt: skip
    if fresh:
        summary |= tuned.code_of(MODULES)
    summary |= changes
    return [
        summary,
        {"kind": "final"},
        *(row(names, cost) for names, cost in (TRIED if tried is None else tried).items()),
    ]


def run(tried=None, *, rows=(), **changes):
    """The run itself; `rows` are further lines."""
    return tuned.of_lines([*lines(tried, **changes), *rows])


# Image classifiers ---------------------------------------------------------------------------------------------------------

FOLDED, LAST, ROUNDED = "fold_batch_norm", "channels_last", "int8_convolutions"
OPTION_MODULES = {
    FOLDED: "assay.methods.core.vision.folding",
    ROUNDED: "assay.methods.core.vision.int8_conv",
    LAST: "",  # torch's own
}
IMAGES_TRIED = {(): 0.008, (FOLDED,): 0.006, (FOLDED, LAST): 0.004, (FOLDED, ROUNDED, LAST): 0.002}


def options(*names):
    return [{"option": name, "config": {}} for name in names]


def image_line(*, minutes=0, fresh=True, quality=None, **changes):
    """The one line of a run of an image classifier that proved its best recipe, twice what is free; one option failed."""

    def level(value, *names):
        return {"label": " + ".join(names) or "as loaded", "words": "x", "unit": "ms a picture", "value": value,
                "low": 0.9 * value, "high": 1.1 * value}  # fmt: skip

    def tried(names, cost, **more):
        kind = "baseline" if not names else "candidate" if ROUNDED in names else "free"
        ratio = None if kind == "baseline" else {"median": 1.5, "low": 1.4, "high": 1.6}
        return {"kind": kind, "label": "x", "words": "x", "status": "ok", "cost": cost, "samples": [cost] * 5, "ratio": ratio,
                "lost": 0.0 if kind == "baseline" else 0.0025, "kept": True, "error": "", "recipe": options(*names)} | more  # fmt: skip

    best = (FOLDED, ROUNDED, LAST)
    failed = {"status": "failed", "samples": [], "ratio": None, "lost": None, "error": "x" * 900}
    line = {
        "kind": "images",
        "goal": "latency",
        "model": "my-classifier",
        "workload": "my-pictures",
        "max_drop": 0.01,
        "helped": True,
        "recipe": {"kind": "images", "format": 1, "goal": "latency", "architecture": "resnet", "steps": options(*best)},
        "baseline": level(8.0),
        "free_baseline": level(4.0, FOLDED, LAST),
        "best": level(2.0, *best),
        "speedup": {"median": 4.0, "low": 3.9, "high": 4.1},
        "speedup_vs_free": {"median": 2.0, "low": 1.9, "high": 2.1},
        "quality": {
            "metric": "accuracy", "pictures": 400, "baseline": 0.8, "candidate": 0.796, "lost": 0.004, "low": -0.002, "high": 0.008,
            "level": 0.95, "verdict": "holds", "same": 0.97,
        } | (quality or {}),
        "judged": {"label": "x", "verdict": "holds"},
        "pairs": 9,
        "noisy": False,
        "trend": False,
        "pictures": 670,
        "unfit": {"merge_tokens": "tokens can be merged in ViT <b>alone</b>"},
        "rows": [
            *(tried(names, cost) for names, cost in IMAGES_TRIED.items()),
            tried((FOLDED, ROUNDED), None, **failed),
        ],
        "notes": [],
        "seconds": 60.0,
        "minutes": 1.0,
        "machine": {"cpu": "Run CPU", "cores": 2, "threads": 2, "flags": ["avx2", "fma"], "ram_bytes": 2**32, "fingerprint": "mine"},
        "artefact": "out",
        "report": "out/report.html",
        "command": "assay tune my-classifier --goal latency -o out",
        "commit": "c0ffee",
        "created": (START + timedelta(minutes=minutes)).isoformat(),
        "load": 0.1,
    }  # fmt: skip
    if fresh:
        line |= tuned.code_of(OPTION_MODULES)
    return line | changes


def image_run(**changes):
    """The run itself."""
    return tuned.of_lines([image_line(**changes)])
