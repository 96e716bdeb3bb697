"""Vim: how much faster and leaner than DeiT at 1248 pixels, with and without stored scores, and what the second direction is worth.

The paper's baseline stores the scores of attention, as was usual when it was written. What a user has today does not: torch's fused kernel
is the free baseline of time and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from assay.experiments.core import Figure, Guard, Operator, Quality, Trial, experiment
from assay.experiments.rates import chosen, searched
from assay.experiments.vision.training import SIZE, Judged, difference, error_for_choice, judged
from assay.measure.memory import peak_memory_of_child
from assay.measure.stats import student_interval
from assay.methods.core.vision.backbone import classifier
from assay.methods.vision.vim import Vim
from assay.workloads.images import photograph

MIXING = Operator("mixing the patches of an image", free="DeiT with torch's fused attention, which stores no scores")
DIRECTIONS = Operator(
    "scanning an image so that each patch sees all others", free="one direction that turns from block to block"
)
WIDTH, HEADS, PATCH = 192, 3, 16  # of Vim-Ti and of DeiT-Ti
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "patch_size": 8, "img_size": SIZE}  # what is trained: 36 patches
CLASSES = 12
STEPS = 100
ARMS = ("both ways", "one way", "turning", "twice ahead", "random second", "no scan", "random order", "attention")
M_MMAP_THRESHOLD = -3
PAPER: dict[str, Any] = {"size": 1248, "depth": 24, "net": "Ti", "batch": "not said", "device": "a GPU, half precision"}
DEPARTURES = {
    "device": "this machine's processor, float32: the scan is a compiled kernel, attention is torch's",
    "batch": "one image, whose scores fill a gigabyte already; memory at full: four",
    "depth": "at small a quarter of both networks' blocks, which are all alike: 6 of Vim's 24, 3 of DeiT's 12",
    "accuracy": "of small networks of equal depth and about equal parameters on crops of twelve photographs, all read by the mean over "
    "their patches, attention's weights drawn for its width: no ImageNet here",
}
GUARD = Guard(
    "accuracy on crops of the held-out parts of twelve photographs", 0.05, higher_is_better=True, relative=False
)


# ---- what is timed ----------------------------------------------------------------------------------------------------------------


def vit(attention: str, **sizes: Any) -> Any:
    """The configuration of a vision transformer of transformers, which DeiT is, with one of its implementations of attention."""
    make: Any = ViTConfig  # its base class takes further settings
    return make(intermediate_size=4 * sizes["hidden_size"], attn_implementation=attention, **sizes)


def extractor(arm: str, size: int, depth: int) -> Callable[[Tensor], Tensor]:
    """Images to the features of all patches, without gradients: Vim-Ti ("vim"), or DeiT-Ti ("eager" stores scores, "sdpa" does not)."""
    torch.manual_seed(0)
    if arm == "vim":
        model = Vim(embed_dim=WIDTH, depth=depth, patch_size=PATCH, img_size=size, num_classes=0).eval()
        run = model.forward_features
    else:
        config = vit(
            arm,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_hidden_layers=depth // 2,
            image_size=size,
            patch_size=PATCH,
        )
        deit: Any = ViTModel(config, add_pooling_layer=False).eval()

        def run(x: Tensor) -> Tensor:
            features: Tensor = deit(x).last_hidden_state
            return features

    return torch.inference_mode()(run)


def picture(size: int, batch: int) -> Tensor:
    """A photograph at the size asked for, as networks want it."""
    pixels = F.interpolate(photograph("china")[None], size=(size, size), mode="bilinear", antialias=True)
    return ((pixels - pixels.mean()) / pixels.std()).expand(batch, -1, -1, -1).contiguous()


def extract_once(arm: str, size: int, batch: int, depth: int) -> None:
    """What a child process runs so that its peak memory can be read."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # freed tensors go back at once
    extractor(arm, size, depth)(picture(size, batch))


def slopes(values: dict[int, float]) -> dict[str, float]:
    """The exponents of a figure in the number of patches, from each size of image to the next."""
    sizes = sorted(values)
    return {
        f"{a} to {b} pixels": math.log(values[b] / values[a]) / (2 * math.log(b / a))
        for a, b in zip(sizes, sizes[1:], strict=False)
    }


def fastest(run: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# ---- what is trained --------------------------------------------------------------------------------------------------------------


class NoScan(nn.Module):
    """In the place of a selective scan: each token as it is."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class Reordered(nn.Module):
    """A mixer, or one direction of it, that sees the tokens in another order."""

    order: Tensor
    back: Tensor

    def __init__(self, mixer: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.mixer = mixer
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x[:, self.order])
        return y[:, self.back]


class Averaged(nn.Module):
    """A Vim read by the mean over its patches: images to logits. A class token in the middle would show one direction half an image."""

    def __init__(self, model: Vim) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        (patches,) = self.model.feature_maps(x).values()
        logits: Tensor = self.model.head(patches.mean((2, 3)))
        return logits


class Attentive(nn.Module):
    """A small DeiT with torch's fused attention, read by the mean over its patches too: images to logits.

    Its weights begin as torch's layers do: the published deviation of 0.02 is for wide layers, and lets narrow ones learn late.
    """

    def __init__(self) -> None:
        super().__init__()
        config = vit(
            "sdpa", hidden_size=SMALL["embed_dim"], num_attention_heads=2, num_hidden_layers=SMALL["depth"], image_size=SIZE,
            patch_size=SMALL["patch_size"], num_channels=1,
        )  # fmt: skip
        self.model: Any = ViTModel(config, add_pooling_layer=False)
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()
        self.head = classifier(SMALL["embed_dim"], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.model(x).last_hidden_state[:, 1:].mean(1))
        return logits


def network(arm: str) -> nn.Module:
    """An untrained network of an arm for grey crops. All orders are drawn from the seed that stands when it is made."""
    if arm == "attention":
        return Attentive()
    model = Vim(**SMALL, num_classes=CLASSES, in_chans=1, bidirectional=arm not in ("one way", "turning"))
    tokens = model.pos_embed.shape[1]
    turned = torch.arange(tokens).flip(0)
    for place, layer in enumerate(model.layers):
        mixer: Any = layer.mixer
        if arm == "no scan":
            mixer.ahead.ssm = mixer.back.ssm = NoScan()
        elif arm == "twice ahead":  # turned twice: the second scan runs forwards too
            mixer.back = Reordered(mixer.back, turned)
        elif arm == "random second":
            mixer.back = Reordered(mixer.back, torch.randperm(tokens))
        elif arm == "random order":
            layer.mixer = Reordered(mixer, torch.randperm(tokens))
        elif arm == "turning" and place % 2:
            layer.mixer = Reordered(mixer, turned)
    return Averaged(model)


@searched("vim/crops", arms=ARMS, grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def crops_error(arm: str, rate: float) -> float:
    """The share of wrong crops of the parts for choices."""
    return error_for_choice(functools.partial(network, arm), rate, STEPS)


def shown(arm: str, steps: int) -> Judged:
    """An arm trained at its rate under each seed."""
    return judged(functools.partial(network, arm), chosen("vim/crops", arm), steps)


def accuracy(steps: int) -> tuple[Quality, dict[str, Any]]:
    """Vim's accuracy beside DeiT's, with the scan left out and along a random order of the patches; and what was trained."""
    found = {arm: shown(arm, steps) for arm in ("both ways", "attention", "no scan", "random order", "one way")}
    gain, low, high = (points / 100 for points in difference(found["both ways"], found["attention"]))
    base = found["attention"].accuracy / 100
    controls = {"deleted": "no scan", "random": "random order", "rival": "one way"}
    quality = Quality(
        base + gain, base, base + low, base + high,
        controls={name: found[arm].accuracy / 100 for name, arm in controls.items()},
        rival="one direction, half of the scans",
    )  # fmt: skip
    return quality, {arm: found[arm].trained for arm in ("both ways", "attention", "one way")}


# ---- the claims -------------------------------------------------------------------------------------------------------------------


@experiment(
    "vim/speedup-1248",
    points={
        "smoke": [{"size": 224, "batch": 1, "depth": 2, "beside": [112], "steps": 2}],
        "small": [{"size": 1248, "batch": 1, "depth": 6, "beside": [312, 624], "steps": STEPS}],
        "full": [{"size": 1248, "batch": 1, "depth": 24, "beside": [224, 448, 640, 896], "steps": 10 * STEPS}],
    },
    operator=MIXING,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="Vim-Ti extracts the features of an image of 1248 x 1248 pixels certainly slower than DeiT-Ti that stores its scores",
    minutes=30,
)
def speedup_1248(size: int, batch: int, depth: int, beside: Sequence[int], steps: int) -> Trial:
    """One forward pass of each network over a photograph. The details have the exponents of time in the number of patches, and where
    Vim becomes faster than each DeiT, from the fastest of three runs at the sizes `beside` and at this one."""
    runs = {
        arm: functools.partial(extractor(arm, size, depth), picture(size, batch)) for arm in ("eager", "vim", "sdpa")
    }
    trained: dict[str, Any] = {}

    def quality() -> Quality:
        found, arms = accuracy(steps)
        trained.update(arms)
        return found

    def details() -> dict[str, Any]:
        sizes = [*sorted(beside), size]
        seconds = {
            arm: {n: fastest(functools.partial(extractor(arm, n, depth), picture(n, batch))) for n in sizes}
            for arm in runs
        }
        return {
            "seconds": {arm: {str(n): value for n, value in found.items()} for arm, found in seconds.items()},
            "exponents": {arm: slopes(found) for arm, found in seconds.items()},
            "faster from pixels": {
                arm: next((n for n in sizes if seconds["vim"][n] < seconds[arm][n]), None) for arm in ("eager", "sdpa")
            },
            "patches": {str(n): (n // PATCH) ** 2 for n in sizes},
        }

    return Trial(
        runs["eager"], runs["vim"], free=runs["sdpa"], quality=quality, trained=lambda: trained, details=details
    )


@experiment(
    "vim/memory-1248",
    points={
        "smoke": [{"size": 448, "batch": 1, "depth": 2, "beside": [], "repeats": 2, "steps": 2}],
        "small": [{"size": 1248, "batch": 1, "depth": 6, "beside": [624], "repeats": 3, "steps": STEPS}],
        "full": [{"size": 1248, "batch": 4, "depth": 24, "beside": [640, 896], "repeats": 3, "steps": 10 * STEPS}],
    },
    operator=MIXING,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES
    | {
        "memory": "the highest resident memory of a process of its own beyond its imports (of all arms' libraries), weights included"
    },
    refuted_if="Vim-Ti takes more memory at 1248 x 1248 pixels than DeiT-Ti that stores its scores",
    minutes=30,
)
def memory_1248(size: int, batch: int, depth: int, beside: Sequence[int], repeats: int, steps: int) -> Figure:
    """Per cent of DeiT's memory that Vim does without; free: the same of DeiT with fused attention.

    The interval is Student's over `repeats`. The details have the bytes, and their exponents in the number of patches.
    """

    def peak(arm: str, size: int) -> int:
        call = {"arm": arm, "size": size, "batch": batch, "depth": depth}
        return peak_memory_of_child(f"{__name__}:extract_once", call, timeout_s=600).extra_bytes

    arms = ("eager", "vim", "sdpa")
    seen = {arm: [peak(arm, size) for _ in range(repeats)] for arm in arms}
    mean = {arm: sum(found) / repeats for arm, found in seen.items()}
    saved = student_interval(
        [100 * (1 - ours / theirs) for ours, theirs in zip(seen["vim"], seen["eager"], strict=True)]
    )
    by_size = {arm: {n: float(peak(arm, n)) for n in beside} | {size: mean[arm]} for arm in arms}
    quality, trained = accuracy(steps)
    return Figure(
        saved.median,
        "%",
        saved.low,
        saved.high,
        baseline=0.0,
        free=100 * (1 - mean["sdpa"] / mean["eager"]),
        quality=quality,
        trained=trained,
        details={
            "bytes": seen,
            "bytes by pixels a side": {
                arm: {str(n): value for n, value in found.items()} for arm, found in by_size.items()
            },
            "exponents": {arm: slopes(found) for arm, found in by_size.items()},
        },
    )


@experiment(
    "vim/bidirectional-accuracy",
    points={
        "smoke": [{"steps": 2}],
        "small": [{"steps": STEPS}],
        "full": [{"steps": 10 * STEPS}],
    },
    operator=DIRECTIONS,
    paper={
        "data": "ImageNet-1K",
        "net": "Ti, without a class token, read by the mean over the patches",
        "size": 224,
        "steps": "300 passes over the data",
    },
    departures={
        "data": "crops of 48 pixels of twelve photographs, judged on parts that no crop for training reaches into: no ImageNet here",
        "net": "three blocks of 32 channels over 36 patches; the class token stays in the middle of the sequence and is not read",
        "steps": "100 batches of 48 crops, the rates searched at the same budget; ten times as many at full",
        "training": "crops mirrored at random, all weights decay: none of DeiT's other augmentations",
    },
    measured_here="points of accuracy on crops of twelve photographs",
    refuted_if="the whole interval of the gain over one direction lies below 0 points",
    minutes=30,
)
def bidirectional_accuracy(steps: int) -> Figure:
    """Points of accuracy of scans in both directions over a forward one alone (Mamba's block), all else equal.

    Free: one direction that turns from block to block, half of the scans. Controls, of as many scans and parameters: the second scan runs
    forwards too (the backward direction deleted), or along a random order, another in each block. Arm: attention. Photographs and seeds are
    resampled.
    """
    arms = ("both ways", "one way", "turning", "twice ahead", "random second", "attention")
    found = {arm: shown(arm, steps) for arm in arms}
    gain = {arm: difference(each, found["one way"]) for arm, each in found.items()}
    points, low, high = gain["both ways"]
    return Figure(
        points,
        "points",
        low,
        high,
        baseline=0.0,
        free=gain["turning"][0],
        controls={"deleted": gain["twice ahead"][0], "random": gain["random second"][0], "rival": gain["turning"][0]},
        arms={"attention, at equal depth": gain["attention"][0]},
        trained={arm: each.trained for arm, each in found.items()},
        details={
            "accuracy": {arm: each.accuracy for arm, each in found.items()},
            "gain over one way": {arm: list(each) for arm, each in gain.items()},
        },
    )
