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
