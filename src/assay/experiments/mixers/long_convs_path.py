"""Long convolutions on Path256: do they train faster than a transformer on pictures read pixel by pixel?

The paper's prior art is the transformer of FlashAttention (arXiv 2205.14135) with block-sparse attention, the first above chance on
Path-256 (63.1 %); long convolutions reach 92.2 %, hence the claimed 29.1 points. `workloads.sequences.pathfinder` makes the
pictures that are timed, and the block pattern is the butterfly that FlashAttention names. What is learned here are handwritten digits
of 8 x 8 pixels: transformers stay at chance on Path-like pictures of 16 x 16 pixels for as long as an experiment may take. The
convolutions are torch's FFTs, with gradients: the fused form in `methods.mixers.long_convs` is for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.mixers.pixels import Pointwise, learned
from assay.experiments.mixers.training import parameter_groups
from assay.methods.mixers.long_convs import LongConvClassifier, LongKernel
from assay.workloads.sequences import pathfinder

HEADS = 4
JOINED = 2  # classes of the pathfinder's pictures: joined or not
KERNEL_RATE = 1e-2  # of the kernels, ten times the paper's: there are a few hundred steps
ARMS = ("long convolution", "block-sparse", "no squash", "short convolution", "no convolution")  # that are trained
SHORT = 4  # taps of the short convolution


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
    """Pixels (batch, tokens, 1) to logits: learned positions, `depth` pre-norm blocks of attention and GELU MLP, mean, Linear."""

    def __init__(self, tokens: int, classes: int, dim: int, depth: int, block: int | None = None):
        super().__init__()
        self.encoder, self.head = nn.Linear(1, dim), nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))
        self.place = nn.Parameter(0.7 * torch.randn(tokens, dim))
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


def network(arm: str, tokens: int, classes: int, dim: int, depth: int) -> nn.Module:
    """A fresh model of one arm (`ARMS`, "dense") for pictures of so many pixels, of equal width and depth."""
    if arm in ("block-sparse", "dense"):
        return Transformer(tokens, classes, dim, depth, block_of(tokens) if arm == "block-sparse" else None)
    if arm == "no convolution":
        return LongConvClassifier(1, classes, tokens, dim=dim, depth=depth, layer=lambda: Pointwise(dim))
    model = LongConvClassifier(
        1,
        classes,
        tokens,
        dim=dim,
        depth=depth,
        bidirectional=True,
        init="double_exponential",
        lr=KERNEL_RATE,
        kernel_dropout=0.0,
        lam=0.0 if arm == "no squash" else 0.003,
    )
    if arm == "short convolution":
        for layer in model.layers:
            kernel: Any = layer.kernel
            kernel.register_forward_hook(
                lambda _module, _inputs, taps: F.pad(taps[..., :SHORT], (0, taps.shape[-1] - SHORT))
            )
    return model


def step_of(arm: str, images: Tensor, labels: Tensor, dim: int, depth: int, bf16: bool = False) -> Callable[[], float]:
    """One step of training of a fresh model on one batch: forward, backward, AdamW. Returns the loss. No rate changes the time."""
    torch.manual_seed(0)
    model = network(arm, images.shape[1] ** 2, JOINED, dim, depth).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.05), fused=True)
    pixels = images.flatten(1)[..., None]

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@cache
def pictures(n: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """`pathfinder`, generated once, so that every arm is timed on the same pictures."""
    return pathfinder(n, side, seed=seed)


def shuffle_taps(model: nn.Module) -> None:
    """Put the taps of every long kernel into a random order."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LongKernel):
            with torch.no_grad():
                layer.kernel.copy_(layer.kernel[..., torch.randperm(layer.kernel.shape[-1], generator=generator)])


def lesson_at(arm: str, rate: float, seed: int, lesson: str) -> dict[str, Any]:
    """What an arm learns of handwritten digits (`pixels.learned`), and what is left with its taps in a random order."""
    return learned(lambda *sizes: network(arm, *sizes), rate, seed, lesson, shuffle_taps)
