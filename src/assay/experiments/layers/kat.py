"""KAT: what group-rational activations cost in training time, and what they gain in accuracy, on real handwritten digits."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Quality, Trial, experiment
from assay.methods.layers.kat import VisionTransformer, convert
from assay.workloads.images import digits_split

Mlp = Literal["kat", "gelu"]


def model_of(mlp: Mlp, width: int, depth: int, seed: int, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "num_heads": 4}
    return VisionTransformer(mlp=mlp, embed_dim=width, depth=depth, **sizes, **options)


class Training:
    """One model, its optimizer, and epochs over the digits in an order that the seed repeats."""

    def __init__(self, model: VisionTransformer, split: tuple[Tensor, ...], seed: int, batch: int = 64):
        self.model, self.split, self.batch = model, split, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
        self.generator = torch.Generator().manual_seed(seed)

    def epoch(self) -> None:
        images, labels = self.split[:2]
        for chosen in torch.randperm(len(images), generator=self.generator).split(self.batch):
            loss = F.cross_entropy(self.model(images[chosen]), labels[chosen], label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        images, labels = self.split[2:]
        return float((self.model(images).argmax(-1) == labels).double().mean())


@experiment(
    "kat/mnist-time",
    points={
        "smoke": [{"width": 32, "depth": 1, "epochs": 2, "seeds": 1}],
        "small": [{"width": 96, "depth": 4, "epochs": 25, "seeds": 3}],
        "full": [
            {"width": 96, "depth": 4, "epochs": 40, "seeds": 5},
            {"width": 384, "depth": 6, "epochs": 40, "seeds": 5},
        ],
    },
    minutes=30,
)
def training_time(width: int, depth: int, epochs: int, seeds: int) -> Trial:
    """An epoch of a small ViT with GELU MLPs against one with group-rational layers; accuracy on held-out digits beside it.

    The details hold the same without the variance-preserving weights, and a GELU network converted after training, before and
    after three epochs more.
    """
    split = digits_split(seed=0)
    timed = {mlp: Training(model_of(mlp, width, depth, 0), split, 0) for mlp in ("gelu", "kat")}
    details: dict[str, Any] = {
        "parameters": {mlp: sum(p.numel() for p in run.model.parameters()) for mlp, run in timed.items()}
    }

    def quality() -> Quality:
        found: dict[str, list[float]] = {
            "gelu": [],
            "kat": [],
            "kat, default init": [],
            "converted": [],
            "converted, tuned": [],
        }
        for seed in range(seeds):
            for arm in ("gelu", "kat", "kat, default init"):
                model = model_of("gelu" if arm == "gelu" else "kat", width, depth, seed)
                if arm == "kat, default init":
                    for block in model.blocks:
                        block.mlp.fc1.reset_parameters()  # type: ignore[union-attr,operator]
                        block.mlp.fc2.reset_parameters()  # type: ignore[union-attr,operator]
                run = Training(model, split, seed)
                for _ in range(epochs):
                    run.epoch()
                found[arm].append(run.accuracy())
                if arm == "gelu":
                    convert(model)
                    run = Training(model, split, seed)
                    found["converted"].append(run.accuracy())
                    for _ in range(3):
                        run.epoch()
                    found["converted, tuned"].append(run.accuracy())
        details["accuracy"] = found
        mean = {arm: sum(values) / len(values) for arm, values in found.items()}
        return Quality(
            "accuracy on held-out digits",
            mean["kat"],
            mean["gelu"],
            min(found["kat"]),
            max(found["kat"]),
            higher_is_better=True,
        )

    return Trial(timed["gelu"].epoch, timed["kat"].epoch, quality=quality, details=lambda: details, pairs=25)
