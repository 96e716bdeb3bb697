"""How close block-sparse attention comes to the bound 1 / density, and what each selector of blocks costs.

    python benchmarks/attention.py [--tokens 8000] [--out FILE]

Queries, keys and values are those of four layers of SmolLM2-135M on real code, in bfloat16. For each density the blocks of highest
exact mass are kept, as many as the density allows; the executor is timed against torch's SDPA on the same tensors, interleaved.
One JSON line a density and one for the selectors, with machine, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.evidence.place import here
from assay.experiments.attention.xattention import (
    captured_layers,
    causal_dense,
    causal_sdpa,
    over_layers,
    pooled_scores,
)
from assay.measure.clock import compare
from assay.measure.stats import positive_median
from assay.methods.attention.xattention import block_scores, select, xattention_plan
from assay.methods.core.attention.plan import AttentionPlan, execute

BLOCK = 64
DENSITIES = (0.1, 0.2, 0.3, 0.5)


def best_blocks(q: Tensor, k: Tensor, density: float) -> AttentionPlan:
    """The plan of the blocks of highest exact mass in each row, a share `density` of the allowed ones, diagonal and sink first."""
    mass = block_scores(q, k, stride=1, block=BLOCK)
    plan = AttentionPlan(q.shape[2], k.shape[2], BLOCK)
    allowed = plan.allowed().expand(mass.shape)
    first = torch.zeros_like(allowed)
    first[..., 0] = True
    first |= torch.eye(mass.shape[-1], dtype=torch.bool)
    ranked = mass.masked_fill(first, torch.inf).masked_fill(~allowed, -torch.inf).argsort(-1, descending=True)
    wanted = (allowed.sum(-1, keepdim=True) * density).ceil()
    chosen = torch.arange(mass.shape[-1]) < wanted
    kept = torch.zeros_like(allowed).scatter(-1, ranked, chosen) & allowed
    return AttentionPlan(q.shape[2], k.shape[2], BLOCK, True, kept)


def seconds(work: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    found = positive_median(times)
    return {"median": found.median, "low": found.low, "high": found.high}


def rows(tokens: int) -> list[dict[str, Any]]:
    layers = captured_layers(tokens, "code")
    found = []
    for density in DENSITIES:
        plans = [best_blocks(q, k, density) for q, k, _ in layers]
        real = sum(plan.density() for plan in plans) / len(plans)

        def sparse(plans: list[AttentionPlan] = plans) -> list[Tensor]:
            return [execute(plan, *layer) for plan, layer in zip(plans, layers, strict=True)]

        for name, baseline in (("sdpa", causal_sdpa), ("exact kernel", causal_dense)):
            seen = compare(lambda baseline=baseline: over_layers(layers, baseline), sparse, pairs=7).speedup  # type: ignore[misc]
            row = {"over": name, "density": real, "bound": 1 / real, "tokens": tokens, "block": BLOCK}
            row["speedup"] = {"median": seen.median, "low": seen.low, "high": seen.high}
            found.append(row | {"share_of_bound": seen.median * real})
    selectors: dict[str, Callable[[], Any]] = {
        "xattention, stride 8": lambda: [xattention_plan(q, k, tau=0.95, block=BLOCK) for q, k, _ in layers],
        "xattention, stride 16": lambda: [
            xattention_plan(q, k, tau=0.95, block=BLOCK, stride=16) for q, k, _ in layers
        ],
        "mean-pooled": lambda: [select(pooled_scores(q, k, BLOCK), tau=0.95) for q, k, _ in layers],
        "exact masses": lambda: [select(block_scores(q, k, stride=1, block=BLOCK), tau=0.95) for q, k, _ in layers],
    }
    cost = {name: seconds(work) for name, work in selectors.items()}
    dense = {
        "sdpa": seconds(lambda: over_layers(layers, causal_sdpa)),
        "exact kernel": seconds(lambda: over_layers(layers, causal_dense)),
    }
    return [*found, {"selection_seconds": cost, "dense_seconds": dense, "tokens": tokens, "layers": len(layers)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=None, help="append the lines to this file too")
    options = parser.parse_args()
    place = here()
    origin = {"machine": place.machine, "commit": place.commit, "command": " ".join(["python", *sys.argv])}
    for row in rows(options.tokens):
        line = json.dumps(row | origin | {"created": datetime.now(UTC).isoformat(timespec="seconds")})
        print(line)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
