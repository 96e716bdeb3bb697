"""Positional attention: error on values beyond the training range, against the same network with content-based attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.experiments.core import Figure, Quality, experiment
from assay.methods.attention.positional_attention import AlgorithmicTransformer, Routing, task_data


def trained(routing: Routing, task: str, *, n: int, samples: int, epochs: int, seed: int) -> AlgorithmicTransformer:
    """Adam at 5e-4 on batches of 1000 with mean squared error, the rate lowered on plateaus, as the official code."""
    torch.manual_seed(seed)
    model = AlgorithmicTransformer(n, routing=routing)
    x, y = task_data(task, samples, n, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=50)
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(samples).split(1000):
            loss = (model(x[chosen]) - y[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        scheduler.step(total)
    return model.eval()


@torch.no_grad()
def errors(model: AlgorithmicTransformer, task: str, n: int, scale: float) -> Tensor:
    """Squared error of each of 1000 test samples at a scale."""
    x, y = task_data(task, 1000, n, scale=scale, seed=10_000)
    return (model(x) - y).square().mean(1).double()


@experiment(
    "positional_attention/cumsum-ood",
    points={
        "smoke": [{"task": "sum", "samples": 2000, "epochs": 10, "seeds": 1}],
        "small": [{"task": task, "samples": 10_000, "epochs": 150, "seeds": 3} for task in ("sort", "min", "sum")],
        "full": [
            {"task": task, "samples": 30_000, "epochs": 2000, "seeds": 10}
            for task in ("median", "maxsub", "sort", "min", "sum")
        ],
    },
    minutes=30,
)
def out_of_distribution(task: str, samples: int, epochs: int, seeds: int, n: int = 8) -> Figure:
    """Mean squared error of positional over content-based routing at ten times the training range: the median of the seeds' ratios.

    Its bounds are the smallest and the largest of the seeds. In-distribution error is the quality.
    """
    ratios, inside = [], {"position": [], "content": []}  # type: ignore[var-annotated]
    details: dict[str, Any] = {"mse": []}
    for seed in range(seeds):
        models: dict[Routing, AlgorithmicTransformer] = {
            "position": trained("position", task, n=n, samples=samples, epochs=epochs, seed=seed),
            "content": trained("content", task, n=n, samples=samples, epochs=epochs, seed=seed),
        }
        table = {
            routing: {str(c): float(errors(model, task, n, c).mean()) for c in (1, 2, 5, 10)}
            for routing, model in models.items()
        }
        details["mse"].append(table)
        details["parameters"] = {routing: sum(p.numel() for p in m.parameters()) for routing, m in models.items()}
        ratios.append(table["position"]["10"] / table["content"]["10"])
        for routing in models:
            inside[routing].append(table[routing]["1"])
    ordered = sorted(ratios)
    quality = Quality(
        "mean squared error within the training range",
        sorted(inside["position"])[seeds // 2],
        sorted(inside["content"])[seeds // 2],
        higher_is_better=False,
    )
    return Figure(ordered[seeds // 2], "x", low=ordered[0], high=ordered[-1], quality=quality, details=details)
