"""Long convolutions on Path256: do they train faster than a transformer on pictures read pixel by pixel?

The paper's prior art is the transformer of FlashAttention (arXiv 2205.14135) with block-sparse attention, the first above chance on
Path-256 (63.1 %); long convolutions reach 92.2 %, hence the claimed 29.1 points. `workloads.sequences.pathfinder` makes the
pictures, and the block pattern is the butterfly that FlashAttention names. The convolutions are torch's FFTs, with gradients: the
fused form in `methods.mixers.long_convs` is for inference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.mixers.training import parameter_groups, train
from assay.methods.mixers.long_convs import LongConvClassifier
from assay.workloads.sequences import pathfinder

HEADS = 4
RATES = {
    "long convolution": 5e-3,
    "block-sparse": 1e-3,
    "dense": 1e-3,
}  # of everything but kernels, which learn at 1e-2

_SHORT: dict[str, Any] = {"side": 16, "seeds": 1, "scenes": 2000, "held_out": 1000, "batch": 32}
LESSONS: dict[str, dict[str, Any]] = {  # what a network is taught: pictures, steps, and its own width and depth
    "tiny": {**_SHORT, "scenes": 32, "held_out": 100, "steps": 4, "dim": 16, "depth": 1},
    "short": {**_SHORT, "steps": 800, "dim": 32, "depth": 4},
    "long": {
        "side": 32,
        "seeds": 3,
        "scenes": 20_000,
        "held_out": 2000,
        "batch": 32,
        "steps": 10_000,
        "dim": 64,
        "depth": 6,
    },
}


def block_of(tokens: int) -> int:
    """Tokens a block: 128, and less where there would be fewer than 16 blocks."""
    return min(128, max(16, tokens // 16))


def partners(x: Tensor, block: int) -> Tensor:
    """What each block sees in a butterfly: itself and, for every l, the block whose number differs in bit l.

    x (batch, heads, tokens, dim) to (batch, heads, blocks, (1 + log2 blocks) * block, dim). The number of blocks must be a power of two.
    """
    blocks = x.unflatten(2, (-1, block))
    count = blocks.shape[2]
    if count & (count - 1):
        raise ValueError(f"tokens must make a power of two blocks of {block}, got {x.shape[2]} tokens")
    bits = [1 << level for level in range(count.bit_length() - 1)]
    flipped = [blocks.unflatten(2, (-1, 2, bit)).flip(3).flatten(2, 4) for bit in bits]
    return torch.cat([blocks, *flipped], 3)


class Attention(nn.Module):
    """Two-way softmax attention over all tokens, or (`block`) over the blocks that `partners` names; torch's kernel for either."""

    def __init__(self, dim: int, block: int | None = None):
        super().__init__()
        self.block = block
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.block is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            k, v = (partners(t, self.block).flatten(1, 2) for t in (k, v))
            rows = q.unflatten(2, (-1, self.block)).flatten(1, 2)
            y = F.scaled_dot_product_attention(rows, k, v).unflatten(1, (HEADS, -1)).flatten(2, 3)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Transformer(nn.Module):
    """Pixels (batch, tokens, 1) to two logits: learned positions, `depth` pre-norm blocks of attention and GELU MLP, mean, Linear."""

    def __init__(self, tokens: int, dim: int, depth: int, block: int | None = None):
        super().__init__()
        self.encoder, self.head = nn.Linear(1, dim), nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2))
        self.place = nn.Parameter(0.1 * torch.randn(tokens, dim))
        self.mixing = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), Attention(dim, block)) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x) + self.place
        for mixing, mlp in zip(self.mixing, self.mlps, strict=True):
            x = x + mixing(x)
            x = x + mlp(x)
        out: Tensor = self.head(x.mean(1))
        return out


def network(arm: str, side: int, dim: int, depth: int) -> nn.Module:
    """A fresh model of one arm ("long convolution", "block-sparse", "dense") for pictures of one side, of equal width and depth."""
    tokens = side * side
    if arm == "long convolution":
        return LongConvClassifier(
            1,
            2,
            tokens,
            dim=dim,
            depth=depth,
            bidirectional=True,
            init="double_exponential",
            lr=1e-2,
            kernel_dropout=0.0,
        )
    return Transformer(tokens, dim, depth, block_of(tokens) if arm == "block-sparse" else None)


def step_of(arm: str, images: Tensor, labels: Tensor, dim: int, depth: int, bf16: bool = False) -> Callable[[], float]:
    """One step of training of a fresh model on one batch: forward, backward, AdamW. Returns the loss."""
    torch.manual_seed(0)
    model = network(arm, images.shape[1], dim, depth).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=RATES[arm], weight_decay=0.05), fused=True)
    pixels = images.flatten(1)[..., None]

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def turned(images: Tensor, turn: int) -> Tensor:
    """One of the eight symmetries of the square (0 to 7), which leave the answer as it is."""
    images = images.rot90(turn % 4, (1, 2))
    return images.flip(2) if turn >= 4 else images


@cache
def pictures(n: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """`pathfinder`, generated once, so that every arm learns from the same pictures."""
    return pathfinder(n, side, seed=seed)


def learned(
    arm: str, side: int, *, scenes: int, held_out: int, steps: int, batch: int, dim: int, depth: int, seed: int
) -> dict[str, Any]:
    """Train a network on `scenes` pictures in their eight symmetries: is it right on each of `held_out` others, and how fast?"""
    images, labels = pictures(scenes, side, seed=1)
    questions, answers = pictures(held_out, side, seed=0)
    torch.manual_seed(seed)
    model = network(arm, side, dim, depth)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for chosen in torch.randperm(scenes, generator=generator).split(batch):
                turn = int(torch.randint(8, (1,), generator=generator))
                yield turned(images[chosen], turn).flatten(1)[..., None], labels[chosen]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    begin = time.perf_counter()
    losses = train(model, batches(), steps=steps, lr=RATES[arm], weight_decay=0.05, loss=loss)
    seconds = time.perf_counter() - begin
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(x.flatten(1)[..., None]).argmax(-1) for x in questions.split(100)]) == answers
    joined = float(answers.double().mean())
    return {
        "right": right.double(),
        "chance": max(joined, 1 - joined),  # by always giving the answer that is the more frequent here
        "seconds": seconds,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
    }


def accuracies(arms: tuple[str, ...], side: int, seeds: int, **options: Any) -> dict[str, dict[str, Any]]:
    """What each arm learned, seed by seed, and whether that is more than chance; "right" is (seeds, held-out pictures)."""
    found = {}
    for arm in arms:
        runs = [learned(arm, side, seed=seed, **options) for seed in range(seeds)]
        right = torch.stack([run["right"] for run in runs])
        error = 1.96 * float(right.mean(0).std()) / right.shape[1] ** 0.5
        found[arm] = {
            "right": right,
            "accuracy": [run["right"].mean().item() for run in runs],
            "chance": runs[0]["chance"],
            "more_than_chance": float(right.mean()) - error > runs[0]["chance"],
            "training_seconds": [run["seconds"] for run in runs],
            "last_loss": [run["last_loss"] for run in runs],
        }
    return found
