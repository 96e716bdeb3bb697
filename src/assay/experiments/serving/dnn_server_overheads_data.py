"""JPEGs and small networks for the vision server: photographs in three sizes, scenes of handwritten digits, and what reads them.

The photographs are those of scikit-learn and scikit-image, cut at random places and encoded here. A scene is a darkened photograph with 0
to 8 handwritten digits on it, which are known, so that what a pipeline answers can be right or wrong.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.rates import chosen, searched
from assay.paths import atomic_file, cache_dir
from assay.workloads.images import PHOTOGRAPHS, digits_split, photograph

SIZES = {"small": (80, 60), "medium": (500, 375), "large": (3000, 2000)}
"""Width and height: a thumbnail, what photographs on the web have, what cameras make (enlarged here, since no photograph is so large)."""
QUALITY = 90  # of JPEGs
SERVED = 224  # pixels a side of the network's input
PATCH = 64
TRAINED_ON = 0.65  # of each photograph's width, from the left
SEEDS = (0, 1, 2)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEPS, BATCH = 60, 32
DIGIT_STEPS = 150
CROP = 32  # pixels a side of a digit as it is handed to the classifier
CHANCE = "the most frequent class"
CLASSES = len(PHOTOGRAPHS)


# --------------------------------------------------------------------------------------------------------------- photographs


def encoded(pixels: np.ndarray) -> bytes:
    """Pixels (height, width, 3) uint8 as a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


@functools.cache
def _pixels(name: str) -> np.ndarray:
    return (photograph(name).permute(1, 2, 0) * 255).round().byte().numpy()


def jpegs(size: str, count: int, *, seed: int = 0) -> list[bytes]:
    """Different cuts of photographs in turn, resized to a class of `SIZES` and encoded."""
    from PIL import Image

    width, height = SIZES[size]
    chance = np.random.default_rng([seed, *size.encode()])
    found = []
    for number in range(count):
        whole = _pixels(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])
        most = min(whole.shape[1] / width, whole.shape[0] / height)
        zoom = most * chance.uniform(0.85, 1.0)  # pixels of the photograph a pixel
        w, h = zoom * width, zoom * height
        left, top = chance.uniform(0, whole.shape[1] - w), chance.uniform(0, whole.shape[0] - h)
        cut = Image.fromarray(whole).resize(
            (width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)
        )
        found.append(encoded(np.asarray(cut)))
    return found


@functools.cache
def _scaled(name: str) -> Tensor:
    """A photograph as large as it is served: its shorter side `SERVED`, normalised."""
    whole = photograph(name)[None]
    factor = SERVED / min(whole.shape[-2:])
    size = [round(factor * side) for side in whole.shape[-2:]]
    found = nn.functional.interpolate(whole, size=size, mode="bilinear", antialias=True)[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (found - mean[:, None, None]) / std[:, None, None]


def patches(part: str, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` patches and which photograph each is of. "train" is the left of them, "choice" the upper right, "test" the lower right."""
    chance = np.random.default_rng([seed, *part.encode()])
    images, labels = [], []
    for number in range(count):
        label = number % len(PHOTOGRAPHS)
        whole = _scaled(PHOTOGRAPHS[label])
        height, width = whole.shape[-2:]
        border, middle = int(TRAINED_ON * width), height // 2
        left, right = (0, border) if part == "train" else (border, width)
        top, bottom = {"train": (0, height), "choice": (0, middle), "test": (middle, height)}[part]
        x, y = int(chance.integers(left, right - PATCH + 1)), int(chance.integers(top, bottom - PATCH + 1))
        images.append(whole[:, y : y + PATCH, x : x + PATCH])
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


# ------------------------------------------------------------------------------------------------------------------ networks


class Network(nn.Module):
    """Seven convolutions of 3 x 3, each with a norm, and the mean over all places: images of any size, not only those of training."""

    def __init__(self, width: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        sizes = [(channels, width, 2)]
        for factor in (2, 4, 8):
            sizes += [(factor // 2 * width, factor * width, 2), (factor * width, factor * width, 1)]
        self.parts = nn.ModuleList(_unit(a, b, 3, stride) for a, b, stride in sizes)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.relu(part(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


COMPACT = 24
"""Width of the compact network: 0.3 thousand million multiply-adds at 224 pixels, about what MobileNetV2 takes, as recalled."""


class Bottleneck(nn.Module):
    """A block of ResNet-50: 1 x 1, 3 x 3 and 1 x 1 convolutions, and a shortcut."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([_unit(given, width, 1), _unit(width, width, 3, stride), _unit(width, 4 * width, 1)])
        self.shortcut = nn.Identity() if given == 4 * width else _unit(given, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for part in self.parts[:-1]:
            found = torch.relu(part(found))
        return torch.relu(self.parts[-1](found) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 as it is served (the stride in the 3 x 3 convolutions): 4.1 thousand million multiply-adds at 224 pixels, new weights."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _unit(3, 64, 7, 2)
        blocks: list[nn.Module] = []
        given = 64
        for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for number in range(count):
                blocks.append(Bottleneck(given, width, 2 if number == 0 and width > 64 else 1))
                given = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(given, classes)

    def forward(self, x: Tensor) -> Tensor:
        found = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        answer: Tensor = self.head(self.blocks(found).mean((2, 3)))
        return answer


def _unit(given: int, made: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, made, side, stride, side // 2, bias=False), nn.BatchNorm2d(made))


def trained(
    network: Callable[[], nn.Module],
    batches: Callable[[np.random.Generator], tuple[Tensor, Tensor]],
    *,
    rate: float,
    steps: int,
    seed: int,
    name: str,
) -> nn.Module:
    """The network after `steps` of AdamW with a cosine rate, in evaluation mode; kept in the cache for the next time.

    What is kept is known by `name`, the settings, and this file's code. Raises ValueError where the loss is not finite.
    """
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    made = network()
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    described = json.dumps([name, rate, steps, seed, torch.__version__, source])
    file = cache_dir() / "trained" / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"
    if file.is_file():
        try:
            made.load_state_dict(load_file(file))
            return made.eval()
        except Exception:  # cut off: train it again
            torch.manual_seed(seed)
            made = network()
    chance = np.random.default_rng([seed, 7])
    optimiser = torch.optim.AdamW(made.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        images, labels = batches(chance)
        loss = nn.functional.cross_entropy(made(images), labels)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is not finite at rate {rate:g}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        save_file({key: value.contiguous() for key, value in made.state_dict().items()}, temporary)
    return made.eval()


def photographs_network(seed: int, rate: float | None = None) -> nn.Module:
    """The compact network, trained to tell from which photograph a patch is."""
    images, labels = patches("train", 1200)

    def batches(chance: np.random.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.from_numpy(chance.integers(0, len(images), BATCH))
        return images[picked], labels[picked]

    if rate is None:
        rate = chosen("dnn_server_overheads/photographs", "compact").rate
    return trained(
        lambda: Network(COMPACT, len(PHOTOGRAPHS)), batches, rate=rate, steps=STEPS, seed=seed, name="photographs"
    )


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose class is right."""
    with torch.inference_mode():
        return float((network(images).argmax(1) == labels).float().mean())


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy."""
    with torch.inference_mode():
        return float(nn.functional.cross_entropy(network(images), labels))


@searched("dnn_server_overheads/photographs", arms=["compact"], grid=GRID)
def photographs_search(arm: str, rate: float) -> float:
    """On the upper right of the photographs."""
    return loss_of(photographs_network(0, rate), *patches("choice", 240))


def folded(network: nn.Module) -> nn.Module:
    """A copy for inference: norms folded into the convolutions before them, channels last."""
    import copy

    from torch.nn.utils.fusion import fuse_conv_bn_eval

    made: Any = copy.deepcopy(network).eval()
    for parent in list(made.modules()):
        for name, part in list(parent.named_children()):
            if [type(one) for one in part.children()] == [nn.Conv2d, nn.BatchNorm2d]:
                setattr(parent, name, fuse_conv_bn_eval(*part.children()))
    found: nn.Module = made.requires_grad_(False).to(memory_format=torch.channels_last)
    return found


def engines(network: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The network as float32 and as bfloat16: (n, 3, side, side) float32 to logits."""
    plain, half = folded(network), folded(network).bfloat16()
    return {"float32": plain, "bfloat16": lambda x: half(x.bfloat16()).float()}


def fastest_engine(
    network: nn.Module, x: Tensor, *, compiled: bool
) -> tuple[str, Callable[[Tensor], Tensor], dict[str, float]]:
    """Name and function of what answers `x` in the least time, and the seconds of each: float32, bfloat16, and with `compiled` the better
    of the two compiled."""
    found = engines(network)
    name, seconds = fastest(found, x)
    if compiled:
        quick = torch.compile(found[name])
        found[f"{name}, compiled"] = quick
        name, seconds = fastest(found, x)
    return name, found[name], seconds


def fastest(found: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int = 9) -> tuple[str, dict[str, float]]:
    """Which engine answers in the least time, and the least seconds of each: other programs only add to them."""
    seconds = {}
    with torch.inference_mode():
        for name, engine in found.items():
            times = []
            for _ in range(repeats + 2):
                start = time.perf_counter()
                engine(x)
                times.append(time.perf_counter() - start)
            seconds[name] = min(times[2:])
    return min(seconds, key=lambda name: seconds[name]), seconds


# -------------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """A JPEG of medium size, and the digits on it: label, and the middle's x and y."""

    data: bytes
    digits: tuple[tuple[int, float, float], ...]


CELL, MOST_DIGITS, DARK = 75, 8, 0.45
APART = 5  # pixels between a digit and the border of its cell
REACH = 4  # pixels up to which parts belong together
INK = 130  # brightness above which there is a digit


def scenes(count: int, *, seed: int = 0) -> list[Scene]:
    """Scenes of digits that no classifier was trained on; one in nine has none."""
    _, _, images, labels = digits_split()
    chance = np.random.default_rng([seed, 11])
    width, height = SIZES["medium"]
    cells = [(x, y) for y in range(height // CELL) for x in range(width // CELL)]
    found = []
    for number in range(count):
        whole = _pixels(PHOTOGRAPHS[int(chance.integers(len(PHOTOGRAPHS)))])
        pixels = _resized(whole, width, height).astype(np.float32) * DARK
        told = []
        for cell in chance.permutation(len(cells))[: number % (MOST_DIGITS + 1)]:
            which, side = int(chance.integers(len(images))), int(chance.integers(44, 61))
            x, y = (CELL * at + int(chance.integers(APART, CELL - side - APART + 1)) for at in cells[cell])
            drawn = _drawn(images[which, 0], side)[..., None]
            pixels[y : y + side, x : x + side] = np.maximum(pixels[y : y + side, x : x + side], drawn)
            told.append((int(labels[which]), x + side / 2, y + side / 2))
        found.append(Scene(encoded(pixels.round().astype(np.uint8)), tuple(told)))
    return found


def _resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _drawn(image: Tensor, side: int) -> np.ndarray:
    """A digit, white on black, (side, side) float32 up to 255."""
    return _resized((image * 255).round().byte().numpy(), side, side).astype(np.float32)


@dataclass(frozen=True)
class Find:
    """A digit found: its middle in the whole image's pixels, and its crop, (CROP, CROP) uint8."""

    x: float
    y: float
    crop: np.ndarray


def finds(data: bytes, *, scale: int = 1, places: np.random.Generator | None = None) -> list[Find]:
    """The connected bright things of a scene, from left to right, in an image decoded whole or at a half to an eighth of its sides.

    `places` is a control: as many crops of the same sizes at random places.
    """
    from PIL import Image
    from scipy import ndimage

    picture = Image.open(io.BytesIO(data), formats=("JPEG",))
    if scale > 1:
        width, height = picture.size
        picture.draft("L", (width // scale, height // scale))
        grey = np.asarray(picture.convert("L"))
    else:
        grey = np.asarray(picture.convert("RGB").convert("L"))
    mask = ndimage.maximum_filter(grey > INK, size=max(3, 2 * (REACH // scale) + 1))
    numbered, _ = ndimage.label(mask)
    found = []
    for rows, columns in ndimage.find_objects(numbered):
        high, wide = rows.stop - rows.start, columns.stop - columns.start
        if max(high, wide) * scale < 20:
            continue
        y, x, side = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2, max(high, wide)
        if places is not None:
            y, x = places.uniform(0, grey.shape[0]), places.uniform(0, grey.shape[1])
        found.append(Find(x * scale, y * scale, cropped(grey, x, y, side)))
    return sorted(found, key=lambda one: one.x)


def cropped(grey: np.ndarray, x: float, y: float, side: float) -> np.ndarray:
    """A square around a place, resized to (CROP, CROP); it is moved inside the image where it would reach over its edge."""
    from PIL import Image

    half = min(side / 2, *(length / 2 for length in grey.shape))
    y = min(max(y, half), grey.shape[0] - half)
    x = min(max(x, half), grey.shape[1] - half)
    box = (x - half, y - half, x + half, y + half)
    return np.asarray(Image.fromarray(grey).resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))


def score(scene: Scene, found: Sequence[Find], labels: Sequence[int]) -> float:
    """The share of a scene's digits that were found and read right; what was found too much counts against it. 1 where there was nothing
    to find and nothing was found."""
    if not scene.digits and not found:
        return 1.0
    right, left = 0, list(scene.digits)
    for one, label in zip(found, labels, strict=True):
        near = [digit for digit in left if abs(digit[1] - one.x) < CELL / 3 and abs(digit[2] - one.y) < CELL / 3]
        if near:
            left.remove(near[0])
            right += near[0][0] == label
    return right / max(len(scene.digits), len(found))


def digit_crops(part: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits as the pipelines crop them, every other one from an image of half the sides, (n, 1, CROP, CROP) in [0, 1], and their labels.

    "train", "choice" (a fifth of what was kept for training) or "test" (those of the scenes).
    """
    images, labels, test_images, test_labels = digits_split()
    cut = len(images) * 4 // 5
    chosen_images, chosen_labels = {
        "train": (images[:cut], labels[:cut]),
        "choice": (images[cut:], labels[cut:]),
        "test": (test_images, test_labels),
    }[part]
    chance = np.random.default_rng([seed, *part.encode()])
    crops: list[np.ndarray] = []
    for image in chosen_images:
        side = int(chance.integers(44, 61))
        grey = np.full((CELL + 20, CELL + 20), chance.uniform(0, 255 * DARK), np.float32)
        grey[10 : 10 + side, 10 : 10 + side] = np.maximum(grey[10 : 10 + side, 10 : 10 + side], _drawn(image[0], side))
        scale = 1 + len(crops) % 2
        if scale == 2:
            grey = _resized(grey.round().astype(np.uint8), grey.shape[1] // 2, grey.shape[0] // 2).astype(np.float32)
        rows, columns = np.nonzero(grey > INK)
        reach = REACH // scale
        top, bottom, left, right = (
            rows.min() - reach,
            rows.max() + reach + 1,
            columns.min() - reach,
            columns.max() + reach + 1,
        )
        centre, size = ((left + right) / 2, (top + bottom) / 2), max(bottom - top, right - left)
        crops.append(cropped(grey.round().astype(np.uint8), *centre, size))
    return torch.from_numpy(np.stack(crops))[:, None].float() / 255, chosen_labels


def digits_network(seed: int, rate: float | None = None) -> nn.Module:
    """A small network that reads digits, trained on crops of those kept for training, moved about a little."""
    images, labels = digit_crops("train")

    def batches(chance: np.random.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.from_numpy(chance.integers(0, len(images), 64))
        x = images[picked] * float(chance.uniform(0.9, 1.1))
        down, right = (int(step) for step in chance.integers(-2, 3, 2))
        return torch.roll(x, (down, right), (2, 3)), labels[picked]

    if rate is None:
        rate = chosen("dnn_server_overheads/digits", "classifier").rate
    return trained(lambda: Network(8, 10, 1), batches, rate=rate, steps=DIGIT_STEPS, seed=seed, name="digits")


@searched("dnn_server_overheads/digits", arms=["classifier"], grid=GRID)
def digits_search(arm: str, rate: float) -> float:
    """On a fifth of the digits that are not tested on."""
    return loss_of(digits_network(0, rate), *digit_crops("choice"))
