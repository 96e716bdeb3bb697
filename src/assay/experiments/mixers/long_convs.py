"""Long convolutions: how much time the fused transform saves on FFT convolutions, what squashing gains in accuracy, and Path256.

The convolutions are those of the paper's layers (two kernels per channel, over the whole sequence). FlashButterfly is a design for
matrix units and their fast memory. On a processor, the same idea (no trip to slow memory between the steps) means blocks of
channels in the cache. The accuracies are those of small classifiers trained here on handwritten digits, read pixel by pixel as 64
tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Quality, Trial, experiment
from assay.experiments.mixers.long_convs_path import LESSONS, accuracies, block_of, network, pictures, step_of
from assay.experiments.mixers.training import train
from assay.measure.stats import bootstrap
from assay.methods.mixers.long_convs import Form, LongConv, LongConvClassifier, conv_cost, fft_conv
from assay.workloads.images import digits_split

LENGTH = 64  # tokens of a digit
COUNTED: tuple[Form, ...] = ("direct", "rfft", "unfused", "fused", "three_pass")


class DiagonalKernel(nn.Module):
    """The kernel of a diagonal state space (S4D-Lin, `states` complex states per input), in place of `LongKernel`."""

    def __init__(self, channels: int, dim: int, length: int, *, skips: int, states: int = 32):
        super().__init__()
        self.length = length
        self.log_step = nn.Parameter(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((dim, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).float().repeat(dim, 1))
        self.c = nn.Parameter(torch.randn(channels, dim, states, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(skips, dim))

    def forward(self, taps: int | None = None) -> Tensor:
        taps = self.length if taps is None else taps
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        da = a * self.log_step.exp()[:, None]
        powers = torch.exp(da[..., None] * torch.arange(taps, device=da.device))
        weight = torch.view_as_complex(self.c) * (da.exp() - 1) / a
        return 2 * torch.einsum("chn,hnt->cht", weight, powers).real

    def optimizer_options(self) -> dict[str, dict[str, float]]:
        return {name: {"lr": 1e-3, "weight_decay": 0.0} for name in ("log_step", "log_decay", "frequency")}


class PlacedAttention(nn.Module):
    """Two-way softmax attention with learned positions."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.place = nn.Parameter(0.1 * torch.randn(length, dim))
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        placed = x + self.place[: x.shape[1]]
        out: Tensor = self.attention(placed, placed, placed, need_weights=False)[0]
        return out


def _diagonal(dim: int) -> LongConv:
    layer = LongConv(dim, LENGTH, bidirectional=True)
    layer.kernel = DiagonalKernel(4, dim, LENGTH, skips=2)  # type: ignore[assignment]
    return layer


def classifiers(dim: int, depth: int) -> dict[str, tuple[Callable[[], LongConvClassifier], float]]:
    """Each arm's model and learning rate. Kernels learn at 1e-2, ten times the paper's rate: there are a few hundred steps."""

    def model(**options: Any) -> Callable[[], LongConvClassifier]:
        return lambda: LongConvClassifier(1, 10, LENGTH, dim=dim, depth=depth, dropout=0.1, **options)

    long: dict[str, Any] = {"bidirectional": True, "init": "double_exponential", "lr": 1e-2, "kernel_dropout": 0.0}
    return {
        "squash": (model(**long, lam=0.003), 5e-3),
        "no squash": (model(**long, lam=0.0), 5e-3),
        "squash and smooth": (model(**long, lam=0.003, smooth_width=3), 5e-3),
        "diagonal state space": (model(layer=lambda: _diagonal(dim)), 5e-3),
        "attention": (model(layer=lambda: PlacedAttention(dim, LENGTH)), 3e-3),
    }


def trained(arm: str, dim: int, depth: int, epochs: int) -> tuple[LongConvClassifier, dict[str, Any]]:
    """A classifier of digits, and its accuracy on held-out ones, seconds of training, and what its kernels look like."""
    images, labels, test_images, test_labels = digits_split(seed=0)
    make, lr = classifiers(dim, depth)[arm]
    torch.manual_seed(0)
    network = make()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for chosen in torch.randperm(len(images), generator=generator).split(64):
                yield images[chosen].flatten(1)[..., None], labels[chosen]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    begin = time.perf_counter()
    train(network, batches(), steps=epochs * -(-len(images) // 64), lr=lr, weight_decay=0.05, loss=loss)
    seconds = time.perf_counter() - begin
    network.eval()
    with torch.no_grad():
        right = network(test_images.flatten(1)[..., None]).argmax(-1) == test_labels
        found: dict[str, Any] = {
            "accuracy": float(right.double().mean()),
            "training_seconds": seconds,
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        kernels = [layer.kernel() for layer in network.layers if isinstance(layer, LongConv)]
        if kernels:
            k = torch.stack(kernels)
            found["zero_taps"] = float((k == 0).double().mean())
            found["total_variation"] = float(k.diff().abs().mean() / k.abs().mean())
    return network, found


@experiment(
    "long_convs/convolution-speedup",
    points={
        "smoke": [{"length": 1024, "batch": 2, "dim": 32, "epochs": 1, "arms": ["squash", "no squash"]}],
        "small": [
            {"length": 1024, "batch": 16, "dim": 256, "epochs": 0, "arms": []},
            {"length": 4096, "batch": 8, "dim": 128, "epochs": 0, "arms": []},
            {"length": 16384, "batch": 4, "dim": 64, "epochs": 0, "arms": []},
            {
                "length": 65536,
                "batch": 4,
                "dim": 16,
                "epochs": 12,
                "arms": ["squash", "no squash", "squash and smooth", "diagonal state space", "attention"],
            },
        ],
        "full": [
            {"length": n, "batch": 16, "dim": 256, "epochs": 60 if n == 65536 else 0, "arms": arms}
            for n in (1024, 4096, 16384, 65536)
            for arms in (["squash", "no squash", "squash and smooth", "diagonal state space", "attention"],)
        ],
    },
    minutes=20,
    memory_gib=24,
)
def convolution_speedup(length: int, batch: int, dim: int, epochs: int, arms: list[str]) -> Trial:
    """torch's real FFT over everything at once, as the released layer runs it, against blocks of channels that stay in the cache.

    Complex FFTs, which earlier layers used, are in the details. With `epochs` classifiers are trained, `arms` of `classifiers`;
    the quality is the first one's accuracy computed along either path.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, dim, length, generator=generator)
    k = 0.02 * torch.randn(2, dim, length, generator=generator)
    d = torch.randn(2, dim, generator=generator)
    width, depth = (64, 3) if len(arms) > 2 else (16, 1)
    found: dict[str, dict[str, Any]] = {}

    def run(**options: Any) -> Callable[[], Tensor]:
        def convolution() -> Tensor:
            with torch.inference_mode():
                return fft_conv(u, k, d, **options)

        return convolution

    def unfused() -> Tensor:
        with torch.inference_mode():
            spectrum = torch.fft.rfft(u, 2 * length)[:, None] * torch.fft.rfft(k, 2 * length)
            return torch.fft.irfft(spectrum, 2 * length)[..., :length] + u[:, None] * d[..., None]

    def quality() -> Quality:
        network, found[arms[0]] = trained(arms[0], width, depth, epochs)
        _, _, images, labels = digits_split(seed=0)
        ways = []
        for options in ({"backend": "rfft", "fuse": False}, {"backend": "rfft", "fuse": True}):
            with torch.no_grad():
                right = _logits(network, images.flatten(1)[..., None], **options).argmax(-1) == labels
            ways.append(float(right.double().mean()))
        return Quality("accuracy on held-out digits by either transform", candidate=ways[1], baseline=ways[0])

    def details() -> dict[str, Any]:
        for arm in arms[1:] if epochs else []:
            found[arm] = trained(arm, width, depth, epochs)[1]
        paths: dict[str, Callable[[], Tensor]] = {
            f"{backend}{', fused' if fuse else ''}": run(backend=backend, fuse=fuse)
            for backend in ("rfft", "complex", "butterfly", "three_pass")
            for fuse in (False, True)
        }
        if length <= 1024:
            paths["direct"] = run(backend="direct")
        exact = fft_conv(u[:1, :4].double(), k[:, :4].double(), d[:, :4].double())
        error = {}
        for name, path in (("baseline", unfused), *paths.items()):
            error[name] = float((path()[:1, :, :4] - exact).norm() / exact.norm())
        costs = {form: conv_cost(length, form=form, sequences=batch * dim * 2) for form in COUNTED}
        return {
            "classifiers": found,
            "seconds_of_one_run": {name: _seconds(path) for name, path in paths.items()},
            "relative_error": error,
            "modelled": {form: {"flops": cost.flops, "bytes": cost.bytes} for form, cost in costs.items()},
        }

    return Trial(
        baseline=unfused,
        candidate=run(backend="rfft", fuse=True),
        quality=quality if epochs else None,
        details=details,
        pairs=8,
    )


@experiment(
    "long_convs/path256-training",
    points={
        "smoke": [{"side": 32, "batch": 1, "dim": 16, "depth": 1, "lesson": "tiny"}],
        "small": [
            {"side": 32, "batch": 4, "dim": 64, "depth": 2},
            {"side": 64, "batch": 1, "dim": 64, "depth": 2},
            {"side": 128, "batch": 1, "dim": 64, "depth": 2, "lesson": "short"},
        ],
        "full": [
            {"side": 64, "batch": 1, "dim": 128, "depth": 6},
            {"side": 128, "batch": 1, "dim": 128, "depth": 6},
            {"side": 256, "batch": 1, "dim": 64, "depth": 2, "lesson": "long"},
        ],
    },
    minutes=240,
    memory_gib=20,
)
def path256_training(side: int, batch: int, dim: int, depth: int, lesson: str | None = None) -> Trial:
    """A step of training on pictures of side * side tokens: the transformer with block-sparse attention against long convolutions.

    Free is the same transformer with dense attention by torch's kernel, in float32 or bfloat16, whichever is faster here. The
    quality is the accuracy on held-out pictures after equally many steps on smaller ones, which is what can be learned in the
    time (`LESSONS`); its interval is over pictures, not over seeds. The details say of every arm whether it learned more than
    chance. The optimizer's step counts: kernels as long as the sequence are most of the long convolutions' parameters.
    """
    images, labels = pictures(batch, side, seed=2)
    dense = {
        name: step_of("dense", images, labels, dim, depth, bf16)
        for name, bf16 in (("float32", False), ("bfloat16", True))
    }
    seconds = {name: _seconds(step) for name, step in dense.items()}
    faster = min(seconds, key=lambda name: seconds[name])
    found: dict[str, dict[str, Any]] = {}

    def quality() -> Quality:
        assert lesson is not None
        found.update(accuracies(("long convolution", "block-sparse", "dense"), **LESSONS[lesson]))
        ours, theirs = (found[arm]["right"].mean(0) for arm in ("long convolution", "block-sparse"))
        gain = bootstrap((ours - theirs).numpy(), np.mean)
        base = float(theirs.mean())
        task = LESSONS[lesson]
        metric = f"accuracy on held-out pictures of side {task['side']} after {task['steps']} steps"
        return Quality(metric, float(ours.mean()), base, base + gain.low, base + gain.high)

    def details() -> dict[str, Any]:
        tokens = side * side
        block = block_of(tokens)
        return {
            "tokens": tokens,
            "block": block,
            "density_of_blocks": (tokens // block).bit_length() * block / tokens,
            "parameters": {
                arm: sum(p.numel() for p in network(arm, side, dim, depth).parameters())
                for arm in ("long convolution", "block-sparse")
            },
            "dense_step_seconds": seconds,
            "lesson": LESSONS[lesson] if lesson else None,
            "learned": {arm: {k: v for k, v in run.items() if k != "right"} for arm, run in found.items()},
        }

    return Trial(
        baseline=step_of("block-sparse", images, labels, dim, depth),
        candidate=step_of("long convolution", images, labels, dim, depth),
        free=dense[faster],
        free_label=f"dense attention by torch, {faster}",
        quality=quality if lesson else None,
        details=details,
        pairs=8 if side < 256 else 3,
    )


def _seconds(path: Callable[[], Any]) -> float:
    """Seconds of the shortest of three runs."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        path()
        times.append(time.perf_counter() - begin)
    return min(times)


def _logits(network: LongConvClassifier, x: Tensor, **options: Any) -> Tensor:
    """The classifier with every convolution computed as `options` of `fft_conv` say."""
    x = network.encoder(x)
    for layer, norm in zip(network.layers, network.norms, strict=True):
        assert isinstance(layer, LongConv)
        front, back = layer.kernel().split(layer.channels)
        y = layer.mixed(fft_conv(x.transpose(1, 2), front, layer.kernel.D, k_back=back, **options))
        x = norm((x + y).transpose(1, 2)).transpose(1, 2)
    out: Tensor = network.head(x.mean(1))
    return out
