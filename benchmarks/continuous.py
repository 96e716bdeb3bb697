"""Continuous batching on this machine: transformers' own manager, the torch backend and the compiled backend, on the same prompts.

    python benchmarks/continuous.py [--prompts 16] [--tokens 64] [--rounds 5] [--out FILE]

All prompts are there at the start; each gets the same number of greedy tokens, ends ignored. SmolLM2-135M in bfloat16, SDPA attention,
prefixes not shared, the compiled loop with the model's own weights. The sides run interleaved in one process. One JSON line: tokens a
second of each side and the paired ratio to transformers', with machine, versions, commit and command. Two more sides tell what the
scheduler itself costs: the compiled backend with four steps a call, and a decode step of 16 rows that computes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from assay.evidence.place import here
from assay.measure.clock import compare_many
from assay.measure.stats import positive_median
from assay.server.backends import Backend, Budget, TorchBackend, backend_for
from assay.server.rows import Settings
from assay.server.scheduler import Scheduler
from assay.workloads.models import load_model
from assay.workloads.text import mixed_prompts

KV_GIB = 1.0


def by_transformers(model: Any, prompts: list[list[int]], tokens: int) -> Callable[[], Any]:
    """Its `generate_batch`, with a pool of the same size and without its warm-up of graphs."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    most = sum(map(len, prompts))
    pool = ContinuousBatchingConfig(
        num_blocks=2 * len(prompts) + most // 256,
        max_batch_tokens=most,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )

    def run() -> list[int]:
        with torch.inference_mode():
            made = model.generate_batch(
                prompts, generation_config=greedy, continuous_batching_config=pool, warmup=False
            )
        lengths = [len(output.generated_tokens) for output in made.values()]
        if lengths != [tokens] * len(prompts):
            raise RuntimeError(f"transformers made {lengths} tokens, {tokens} each were asked for")
        return lengths

    return run


def by_scheduler(backend: Any, prompts: list[list[int]], tokens: int, steps: int = 1) -> Callable[[], Any]:
    def run() -> None:
        scheduler = Scheduler(backend, steps=steps, start=False)
        made = [0]
        for prompt in prompts:
            scheduler.submit(
                prompt, Settings(max_tokens=tokens), lambda event: made.__setitem__(0, made[0] + len(event.tokens))
            )
        while scheduler.turn():
            pass
        scheduler.stop()
        if made[0] != tokens * len(prompts):
            raise RuntimeError(f"the scheduler made {made[0]} tokens, {tokens} each were asked for")

    return run


class Nothing:
    """A backend that computes nothing: what is left is the scheduler."""

    name = reason = "nothing"
    vocab, positions, rows, threads, close_choices = 1000, None, None, None, 0
    pieces, shares, speculation = True, False, None

    def __init__(self) -> None:
        self.pool = Budget(1 << 16)
        self.logits, self.answers = torch.zeros(1, self.vocab), {}  # type: ignore[var-annotated]

    def begin(self, pages: list[int], length: int = 0) -> Any:
        return SimpleNamespace(pages=pages, length=length)

    def end(self, sequence: Any) -> None:
        pass

    def prefill(self, sequence: Any, ids: list[int], wanted: str) -> torch.Tensor:
        sequence.length += len(ids)
        return self.logits

    def run(self, sequences: list[Any], tokens: list[int], steps: int, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        for sequence in sequences:
            sequence.length += steps
        key = (len(sequences), steps)
        if key not in self.answers:
            self.answers[key] = torch.ones(key, dtype=torch.int64)
        return self.answers[key], self.logits[:0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="append the line to this file too")
    options = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype=torch.bfloat16)
    prompts = mixed_prompts(loaded.tokenizer, options.prompts)
    backends: dict[str, Backend] = {"torch": TorchBackend(loaded.model, kv_gib=KV_GIB)}
    best = backend_for(
        loaded.model, loaded.tokenizer, kv_gib=KV_GIB
    )  # the compiled one where the machine has a compiler
    backends.setdefault(best.name, best)
    sides = {"transformers": by_transformers(loaded.model, prompts, options.tokens)}
    sides |= {name: by_scheduler(backend, prompts, options.tokens) for name, backend in backends.items()}
    if "compiled" in backends:
        sides["compiled, 4 steps"] = by_scheduler(backends["compiled"], prompts, options.tokens, steps=4)
    seen = compare_many(sides, rounds=options.rounds, warmup=1)
    total = options.tokens * len(prompts)
    figures = {}
    for name in sides:
        ratio = seen.speedup("transformers", name)
        figures[name] = {
            "tokens_per_second": total / positive_median(seen.seconds[name]).median,
            "over_transformers": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        }
    nothing = by_scheduler(Nothing(), [[1]] * 16, 1000)
    idle = compare_many({"nothing": nothing}, rounds=5, warmup=1)
    row = {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": options.tokens,
        "sides": figures,
        "scheduler_us_per_step_of_16": 1e6 * positive_median(idle.seconds["nothing"]).median / 1000,
        "reasons": {name: backend.reason for name, backend in backends.items()},
        "threads": torch.get_num_threads(),
        "noisy": seen.noisy,
    }
    place = here()
    row |= {"machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv])}
    line = json.dumps(row | {"created": datetime.now(UTC).isoformat(timespec="seconds")})
    print(line)
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
