"""A task that tells sequence mixers apart in seconds: handwritten digits of 8 x 8 pixels, read pixel by pixel.

A classifier that mixes nothing is right a quarter of the time, one that sees a few neighbours three quarters, one that sees all
nearly always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.mixers.training import train
from assay.workloads.images import digits_split

TOKENS, CLASSES = 64, 10
CHOICE_SEED = 100  # of the training by which a rate is chosen; it is judged on pictures that are not the test's
SEEDS = (0, 1, 2)
LESSONS: dict[str, dict[str, int]] = {  # what a network is taught: steps, and its own width and depth
    "tiny": {"steps": 4, "dim": 16, "depth": 1, "batch": 16},
    "digits": {"steps": 200, "dim": 32, "depth": 2, "batch": 32},
}


class Pointwise(nn.Module):
    """A layer that mixes nothing: GELU, Linear to 2 dim, GLU, each token by itself."""

    def __init__(self, dim: int):
        super().__init__()
        self.out_proj = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(x)), -1)


def learned(
    network: Callable[[int, int, int, int], nn.Module],
    rate: float,
    seed: int,
    lesson: str,
    disturbed: Callable[[nn.Module], None] | None = None,
) -> dict[str, Any]:
    """Train `network(tokens, classes, dim, depth)` on one thread: how many of the held-out digits does it name?

    The choice of a rate (`CHOICE_SEED`) is judged on a fifth of the training pictures, which it then does not train on. "disturbed" is
    the accuracy after `disturbed(model)` has put a random choice in the place of the model's.
    """
    torch.set_num_threads(1)
    task = LESSONS[lesson]
    images, labels, questions, answers = digits_split(seed=0)
    if seed == CHOICE_SEED:
        cut = len(images) // 5
        images, labels, questions, answers = images[cut:], labels[cut:], images[:cut], labels[:cut]
    pixels, asked = images.flatten(1)[..., None], questions.flatten(1)[..., None]
    torch.manual_seed(seed)
    model = network(TOKENS, CLASSES, task["dim"], task["depth"])
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for chosen in torch.randperm(len(pixels), generator=generator).split(task["batch"]):
                yield pixels[chosen], labels[chosen]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    losses = train(model, batches(), steps=task["steps"], lr=rate, weight_decay=0.05, loss=loss)
    model.eval()

    @torch.no_grad()
    def accuracy() -> float:
        return float((model(asked).argmax(-1) == answers).double().mean())

    with torch.no_grad():
        found = {
            "accuracy": accuracy(),
            "loss": float(loss(model, asked, answers)),
            "last_training_loss": sum(losses[-20:]) / len(losses[-20:]),
            "majority": float(answers.bincount().max() / len(answers)),
            "held_out": len(answers),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    if disturbed is not None:
        disturbed(model)
        found["disturbed"] = accuracy()
    return found
