"""KAT: what group-rational activations cost in training time, and what they gain in accuracy, on real handwritten digits."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.experiments.core import Quality, Trial, experiment
from assay.methods.layers.kat import VisionTransformer, convert
from assay.methods.layers.surgery import cost
from assay.workloads.images import digits_split

Mlp = Literal["kat", "gelu"]
RATIONAL_OPERATIONS = 20  # of one number, forward: two Horner schemes, an absolute value, a sum and a division


def model_of(mlp: Mlp, width: int, depth: int, seed: int, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "num_heads": 4}
    return VisionTransformer(mlp=mlp, embed_dim=width, depth=depth, **sizes, **options)


class Training:
    """One model, its optimizer, and `epochs` over the digits in an order that the seed repeats.

    The paper's rates: a warm-up (a tenth of the steps), then a cosine down to 0. At a constant rate the accuracy of both networks
    still jumps by several points from one epoch to the next, and what is compared is where it stood last. AdamW is the fused one,
    or else what the coefficients' many small tensors cost in Python counts as the method's time.
    """

    def __init__(self, model: VisionTransformer, split: tuple[Tensor, ...], seed: int, epochs: int, batch: int = 64):
        self.model, self.split, self.batch = model, split, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
        self.steps = epochs * math.ceil(len(split[0]) / batch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.generator = torch.Generator().manual_seed(seed)

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step; past the last one it stays at 0."""
        return min(1.0, 10 * (step + 1) / self.steps) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2

    def epoch(self) -> None:
        images, labels = self.split[:2]
        for chosen in torch.randperm(len(images), generator=self.generator).split(self.batch):
            loss = F.cross_entropy(self.model(images[chosen]), labels[chosen], label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        images, labels = self.split[2:]
        return float((self.model(images).argmax(-1) == labels).double().mean())


@experiment(
    "kat/mnist-time",
    points={
        "smoke": [{"width": 32, "depth": 1, "epochs": 2, "seeds": 1}],
        "small": [{"width": 96, "depth": 4, "epochs": 40, "seeds": 5}],
        "full": [
            {"width": 96, "depth": 4, "epochs": 100, "seeds": 5},
            {"width": 384, "depth": 6, "epochs": 40, "seeds": 5},
        ],
    },
    minutes=30,
)
def training_time(width: int, depth: int, epochs: int, seeds: int) -> Trial:
    """An epoch of a small ViT with GELU MLPs against one with group-rational layers; accuracy on held-out digits beside it.

    The details hold the same with the released code's weights in place of the variance-preserving ones, and a GELU network
    converted after training, before and after three epochs more.
    """
    split = digits_split(seed=0)
    timed = {mlp: Training(model_of(mlp, width, depth, 0), split, 0, epochs) for mlp in ("gelu", "kat")}
    costs = {mlp: cost(run.model.blocks[0].mlp) for mlp, run in timed.items()}  # type: ignore[arg-type]
    details: dict[str, Any] = {
        "parameters": {mlp: sum(p.numel() for p in run.model.parameters()) for mlp, run in timed.items()},
        "mlp_parameters": {mlp: found.params for mlp, found in costs.items()},
        "mlp_weight_bytes": {mlp: 4 * found.params for mlp, found in costs.items()},
        "mlp_macs_per_token": {mlp: found.macs for mlp, found in costs.items()},
        "activation_operations_per_token": RATIONAL_OPERATIONS
        * 5
        * width,  # on width and 4 width numbers; of GELU not counted
    }

    def quality() -> Quality:
        found: dict[str, list[float]] = {
            "gelu": [],
            "kat": [],
            "kat, as released": [],
            "converted": [],
            "converted, tuned": [],
        }
        for seed in range(seeds):
            for arm in ("gelu", "kat", "kat, as released"):
                options = {"variant": "as_released"} if arm == "kat, as released" else {}
                model = model_of("gelu" if arm == "gelu" else "kat", width, depth, seed, **options)
                run = Training(model, split, seed, epochs)
                for _ in range(epochs):
                    run.epoch()
                found[arm].append(run.accuracy())
                if arm == "gelu":
                    convert(model)
                    run = Training(model, split, seed, 3)
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
