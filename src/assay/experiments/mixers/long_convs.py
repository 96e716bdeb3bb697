"""Long convolutions: how much time FlashButterfly's transforms save on FFT convolutions, and training on pictures read pixel by pixel.

The convolutions are those of the paper's layers (two kernels a channel, over the whole sequence). FlashButterfly is a design for
matrix units and their fast memory: 16-point DFT matrix products, fused where a sequence fits that memory, in three passes over slow
memory where it does not. On a processor, fused means blocks of channels in the cache. A library's FFT over such blocks is not the
paper's idea: it is the operator's exact baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.experiments.core import Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.mixers.long_convs_path import ARMS, JOINED, block_of, lesson_at, network, pictures, step_of
from assay.experiments.mixers.pixels import CHOICE_SEED, LESSONS, SEEDS
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen, searched
from assay.methods.mixers.long_convs import Backend, conv_cost, fft_conv

CONVOLUTION = Operator(
    "the layer's causal convolution",
    free="torch's real FFT over everything at once",
    exact="torch's real FFT over blocks of channels that stay in the cache",
)
FUSED_UP_TO = (
    8192  # tokens whose padded complex sequence (16 bytes a token) fits the fast memory of the paper's GPUs, 164 KiB
)
SHORT = 64  # taps of the rival kernel


@experiment(
    "long_convs/convolution-speedup",
    points={
        "smoke": [{"length": 1024, "batch": 1, "dim": 8}],
        "small": [{"length": 4096, "batch": 4, "dim": 64}, {"length": 16384, "batch": 4, "dim": 32}],
        "full": [{"length": n, "batch": 16, "dim": 256} for n in (1024, 4096, 16384, 65536)],
    },
    decides={
        "small": {"length": 4096, "batch": 4, "dim": 64},
        "full": {"length": 4096, "batch": 16, "dim": 256},
    },
    operator=CONVOLUTION,
    paper={"length": 4096, "batch": 16, "dim": 256, "channels": 2},
    departures={
        "batch": "a smaller batch at scale small, so that twelve rounds take seconds; more than the caches hold all the same",
        "dim": "fewer channels at scale small, for the same reason",
    },
    guard=Guard("relative error of the convolution", 1e-6, relative=False, without={"random": "a transform makes no choice"}),
    refuted_if="at 4,096 tokens FlashButterfly's fused form is slower than torch's FFT, the whole interval below 1x",
    memory_gib=24,
)  # fmt: skip
def convolution_speedup(length: int, batch: int, dim: int) -> Trial:
    """torch's real FFT over everything at once, as the released layer runs it, against FlashButterfly.

    The candidate has the form that the paper's rule gives its length: matrix products fused up to 8,192 tokens, three passes beyond.
    4,096 tokens decide (the texts of the Long Range Arena, on which the paper compares speed; the claim names no length). The other
    form and the complex FFT of earlier layers are arms. The quality is the error against float64; deleted is the output without any
    convolution, the rival the first 64 taps alone.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, dim, length, generator=generator)
    k = 0.02 * torch.randn(2, dim, length, generator=generator)
    d = torch.randn(2, dim, generator=generator)

    def run(backend: Backend, *, fuse: bool = True) -> Callable[[], Tensor]:
        def convolution() -> Tensor:
            with torch.inference_mode():
                return fft_conv(u, k, d, backend=backend, fuse=fuse)

        return convolution

    def at_once() -> Tensor:
        with torch.inference_mode():
            spectrum = torch.fft.rfft(u, 2 * length)[:, None] * torch.fft.rfft(k, 2 * length)
            return torch.fft.irfft(spectrum, 2 * length)[..., :length] + u[:, None] * d[..., None]

    forms: dict[str, Callable[[], Tensor]] = {
        "fused matrix products": run("butterfly"),
        "three passes": run("three_pass"),
    }
    form = "fused matrix products" if length <= FUSED_UP_TO else "three passes"
    candidate = forms.pop(form)

    def quality() -> Quality:
        exact = fft_conv(
            u[:1, :4].double(), k[:, :4].double(), d[:, :4].double(), backend="direct" if length <= 4096 else "rfft"
        )

        def error(y: Tensor) -> float:
            return float((y[:1, :, :4] - exact).norm() / exact.norm())

        with torch.inference_mode():
            controls = {
                "deleted": error(u[:, None] * d[..., None]),
                "rival": error(fft_conv(u, k[..., :SHORT].contiguous(), d)),
            }
        return Quality(error(candidate()), error(at_once()), controls=controls, rival=f"the first {SHORT} taps alone")

    def details() -> dict[str, Any]:
        costs = {
            name: conv_cost(length, form=name, sequences=batch * dim * 2)
            for name in ("direct", "rfft", "unfused", "fused", "three_pass")
        }
        return {
            "candidate": form,
            "modelled": {name: {"flops": cost.flops, "bytes": cost.bytes} for name, cost in costs.items()},
        }

    return Trial(
        baseline=at_once,
        candidate=candidate,
        exact=run("rfft"),
        arms={**forms, "complex FFT over blocks": run("complex"), "matrix products, not fused": run("butterfly", fuse=False)},
        quality=quality,
        details=details,
    )  # fmt: skip


# ---- training on pictures --------------------------------------------------------------------------------------------------------

TRAINING = Operator(
    "a training step of a classifier of pixels read one by one",
    free="a transformer with dense attention by torch's kernel, in float32 or bfloat16, whichever is faster here",
)


@searched("long_convs/pixels", arms=list(ARMS), grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def pixels_loss(arm: str, rate: float) -> float:
    """Nats a picture on pictures that nothing else uses."""
    return float(lesson_at(arm, rate, CHOICE_SEED, "digits")["loss"])


def lesson_of(arm: str, seed: int, lesson: str) -> dict[str, Any]:
    """`lesson_at` with the searched rate."""
    return lesson_at(arm, chosen("long_convs/pixels", arm).rate, seed, lesson)


@experiment(
    "long_convs/path256-training",
    points={
        "smoke": [{"side": 32, "batch": 1, "dim": 16, "depth": 1, "lesson": "tiny"}],
        "small": [{"side": 64, "batch": 1, "dim": 64, "depth": 2, "lesson": "digits"}],
        "full": [
            {"side": 128, "batch": 1, "dim": 64, "depth": 2, "lesson": "digits"},
            {"side": 256, "batch": 1, "dim": 64, "depth": 2, "lesson": "digits"},
        ],
    },
    decides={"full": {"side": 256, "batch": 1, "dim": 64, "depth": 2, "lesson": "digits"}},
    operator=TRAINING,
    paper={"side": 256, "batch": 16, "dim": 256, "depth": 4, "lesson": "path256"},
    departures={
        "side": "4,096 tokens at scale small instead of 65,536, where one step of the rivals takes minutes",
        "batch": "one picture a step, which makes the same work in less memory",
        "dim": "narrower, so that a round of steps takes seconds",
        "depth": "two layers, for the same reason",
        "lesson": "handwritten digits of 64 pixels: in the time allowed transformers learn no Path-like picture, however small",
    },
    guard=Guard("accuracy on held-out pictures read pixel by pixel", 0.03, higher_is_better=True, relative=False),
    refuted_if="a step of the long convolutions is slower than one of the block-sparse transformer, the whole interval below 1x",
    minutes=240,
    memory_gib=20,
)  # fmt: skip
def path256_training(side: int, batch: int, dim: int, depth: int, lesson: str) -> Trial:
    """A step of training on pictures of side * side tokens: the transformer with block-sparse attention against long convolutions.

    The optimizer's step counts: kernels as long as the sequence are most of the long convolutions' parameters. The quality is the
    accuracy of both kinds after equally many steps on small pictures (`LESSONS`): at most three points may be lost. Controls trained
    for as long: the convolutions deleted, and kernels of four taps (the rival); random are the trained kernels with their taps in a
    random order. An ablation leaves out `squash`, the paper's regulariser. The interval is Student's t over the seeds.
    """
    images, labels = pictures(batch, side, seed=2)
    dense = {
        name: step_of("dense", images, labels, dim, depth, bf16)
        for name, bf16 in (("float32", False), ("bfloat16", True))
    }
    seconds = {name: _seconds(step) for name, step in dense.items()}
    faster = min(seconds, key=lambda name: seconds[name])
    scores: dict[str, list[dict[str, Any]]] = {}

    def lessons() -> dict[str, list[dict[str, Any]]]:
        if not scores:
            runs = [(arm, seed, lesson) for arm in ARMS for seed in SEEDS]
            found = dict(zip([run[:2] for run in runs], in_parallel(lesson_of, runs), strict=True))
            scores.update({arm: [found[arm, seed] for seed in SEEDS] for arm in ARMS})
        return scores

    def mean(arm: str, name: str = "accuracy") -> float:
        return float(sum(score[name] for score in lessons()[arm])) / len(SEEDS)

    def quality() -> Quality:
        found = lessons()
        pairs = zip(found["long convolution"], found["block-sparse"], strict=True)
        gains = [ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs]
        gain = over_seeds(gains, resolution=1 / found["block-sparse"][0]["held_out"])
        base = mean("block-sparse")
        controls = {
            "deleted": mean("no convolution"),
            "random": mean("long convolution", "disturbed"),
            "rival": mean("short convolution"),
            "without squash": mean("no squash"),
        }
        return Quality(base + gain.median, base, base + gain.low, base + gain.high, controls, "kernels of four taps")

    def trained() -> dict[str, Trained]:
        return {
            arm: Trained(
                [score["accuracy"] for score in lessons()[arm]],
                max(score["majority"] for score in lessons()[arm]),
                "the most frequent class",
                chosen("long_convs/pixels", arm).rate,
                chosen("long_convs/pixels", arm).rates,
                higher_is_better=True,
            )
            for arm in ("long convolution", "block-sparse")
        }

    def details() -> dict[str, Any]:
        tokens = side * side
        block = block_of(tokens)
        return {
            "tokens": tokens,
            "block": block,
            "density_of_blocks": (tokens // block).bit_length() * block / tokens,
            "parameters": {
                arm: sum(p.numel() for p in network(arm, tokens, JOINED, dim, depth).parameters())
                for arm in ("long convolution", "block-sparse")
            },
            "dense_step_seconds": seconds,
            "lesson": LESSONS[lesson],
            "learned": lessons(),
        }

    return Trial(
        baseline=step_of("block-sparse", images, labels, dim, depth),
        candidate=step_of("long convolution", images, labels, dim, depth),
        free=dense[faster],
        quality=quality,
        trained=trained,
        details=details,
    )


def _seconds(path: Callable[[], Any]) -> float:
    """Seconds of the shorter of two runs."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        path()
        times.append(time.perf_counter() - begin)
    return min(times)
