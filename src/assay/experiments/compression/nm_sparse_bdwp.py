"""BDWP: what a training step costs on a model of its accelerator, and how much accuracy two masks of one weight lose.

The accuracy is that of small networks trained from scratch, all arms for as many steps: handwritten digits at random places of a
canvas, and bytes of real source code. Every arm has the learning rate that a search over the same grid found for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.mixers.training import in_parallel
from assay.experiments.rates import chosen, searched
from assay.experiments.seeds import paired
from assay.measure.clock import compare_many
from assay.measure.cost import count_cost
from assay.methods.compression.nm_sparse_bdwp import (
    SAT,
    NMLinear,
    Pattern,
    Product,
    accelerator,
    cost_ratio,
    gradient_cosines,
    largest,
    masks_of,
    products_of,
    remake,
    sparse_training,
    stage_macs,
    train_step,
    training,
)
from assay.workloads.images import digits_split
from assay.workloads.sequences import byte_batches, byte_windows, text_bytes

Task = Literal["digits", "bytes"]
Batch = tuple[Tensor, Tensor]
Choice = Callable[[Tensor, Pattern], training.Masks]

CANVAS, DIGIT = 12, 8  # pixels a side
BATCH = {"digits": 64, "bytes": 16}
LENGTH = 64  # bytes of a window
REFRESH = 20  # steps between two searches for transposable masks, one of which takes longer than a step; our choice
CHOICE_SEED = 100

NETWORK = Operator(
    "a training step of a network", free="dense training, compiled, in bfloat16 where the machine has it"
)


# ---------------------------------------------------------------------------------------------- time: networks on the accelerator


def conv(
    name: str, batch: int, size: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, first: bool = False
) -> Product:
    """A convolution on size x size pixels that keeps their number, divided by the stride; the first one stays dense."""
    out = size // stride
    read = batch * size * size * inputs
    return Product(name, batch * out * out, inputs * kernel**2, outputs, read, sparse=not first, first=first)


def linear(name: str, rows: int, inputs: int, outputs: int, sparse: bool = True, first: bool = False) -> Product:
    return Product(name, rows, inputs, outputs, rows * inputs, sparse=sparse, first=first)


def resnet(batch: int, size: int, depths: tuple[int, ...], classes: int, bottleneck: bool) -> list[Product]:
    """ResNet-18 (depths 2 2 2 2) and ResNet-50 (3 4 6 3, bottlenecks); below 100 pixels with a stem of 3 x 3 and no pooling."""
    small = size < 100
    found = [conv("stem", batch, size, 3, 64, 3 if small else 7, 1 if small else 2, first=True)]
    size, channels = size if small else size // 4, 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for block in range(depth):
            stride, name = 2 if stage and not block else 1, f"{stage}.{block}"
            wide = 4 * width if bottleneck else width
            if bottleneck:
                found.append(conv(f"{name}.reduce", batch, size, channels, width, 1))
                found.append(conv(f"{name}.conv", batch, size, width, width, 3, stride))
                found.append(conv(f"{name}.expand", batch, size // stride, width, wide, 1))
            else:
                found.append(conv(f"{name}.first", batch, size, channels, width, 3, stride))
                found.append(conv(f"{name}.second", batch, size // stride, width, width))
            if stride > 1 or channels != wide:
                found.append(conv(f"{name}.shortcut", batch, size, channels, wide, 1, stride))
            channels, size = wide, size // stride
    return [*found, linear("classifier", batch, channels, classes, sparse=False)]


def resnet9(batch: int) -> list[Product]:
    """ResNet-9 on 32 pixels: 64, 128 with a residual, 256, 512 with a residual, pooled in between."""
    sizes = [(32, 3, 64), (32, 64, 128), (16, 128, 128), (16, 128, 128), (16, 128, 256), (8, 256, 512), (4, 512, 512)]
    layers = [*sizes, (4, 512, 512)]
    found = [conv(f"{i}", batch, size, a, b, first=not i) for i, (size, a, b) in enumerate(layers)]
    return [*found, linear("classifier", batch, 512, 10, sparse=False)]


def vgg19(batch: int) -> list[Product]:
    """VGG-19's sixteen convolutions on 32 pixels, and one classifier."""
    found: list[Product] = []
    channels = 3
    for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]):
        for layer in range(depth):
            found.append(conv(f"{stage}.{layer}", batch, 32 >> stage, channels, width, first=not found))
            channels = width
    return [*found, linear("classifier", batch, 512, 100, sparse=False)]


def vit(batch: int, width: int = 384, depth: int = 12, heads: int = 6, tokens: int = 65) -> list[Product]:
    """ViT-S on 32 pixels in patches of 4: attention's own two products have no weights and stay dense."""
    rows, head = batch * tokens, width // heads
    found = [linear("patches", batch * (tokens - 1), 48, width, sparse=False, first=True)]
    for block in range(depth):
        found.append(linear(f"{block}.qkv", rows, width, 3 * width))
        for name, inputs, outputs in (("scores", head, tokens), ("mixed", tokens, head)):
            read = rows * heads * (inputs + head)  # both operands
            found.append(Product(f"{block}.{name}", rows * heads, inputs, outputs, read, sparse=False, weights=False))
        found.append(linear(f"{block}.out", rows, width, width))
        found.append(linear(f"{block}.up", rows, width, 4 * width))
        found.append(linear(f"{block}.down", rows, 4 * width, width))
    return [*found, linear("classifier", batch, width, 100, sparse=False)]


def networks(batch: int) -> dict[str, list[Product]]:
    """The five networks of the paper's average. Which sizes of images and which ViT it took for them is our choice."""
    return {
        "ResNet-9": resnet9(batch),
        "ViT-S": vit(batch),
        "VGG-19": vgg19(batch),
        "ResNet-18": resnet(batch, 64, (2, 2, 2, 2), 200, bottleneck=False),
        "ResNet-50": resnet(batch, 224, (3, 4, 6, 3), 1000, bottleneck=True),
    }


def modelled(n: int, m: int, batch: int, sat: SAT, scheme: accelerator.Training = "bdwp") -> dict[str, float]:
    """The speed-up over dense training on the same accelerator, by network."""
    return {
        name: train_step(products, n, m, sat, "dense").total / train_step(products, n, m, sat, scheme).total
        for name, products in networks(batch).items()
    }


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def counted(layer: Any, x: Tensor, gy: Tensor) -> dict[accelerator.Stage, int]:
    """MACs by stage of one layer, counted while its three products really run."""
    weight = layer.weight.detach()
    forward, backward = masks_of(weight, layer.pattern)
    stages = (
        count_cost(lambda: training.forward_product(x, weight * forward, None, layer.geometry)),
        count_cost(lambda: training.input_gradient(gy, weight * backward, x.shape, layer.geometry)),
        count_cost(lambda: training.weight_gradient(gy, x, weight.shape, layer.geometry)),
    )
    return dict(zip(accelerator.PRODUCTS, (cost.macs for cost in stages), strict=True))


def counted_macs(n: int, m: int) -> dict[accelerator.Stage, int]:
    """MACs by stage of the N:M layers of a digits network, multiplied on compressed rows.

    Raises ValueError where they are not as many as the model of their cost says: work that a mask only hides is work done.
    """
    images = drawn(4, 0, False)[0]
    model = network("digits", 16, 0)
    layers: dict[str, Any] = dict(sparse_training(model, Pattern(n, m), backend="csr"))
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[id(layer)] = args[0].detach(), output.detach()

    for layer in layers.values():
        layer.register_forward_hook(keep)
    with torch.no_grad():
        model(images)
    each = [counted(layer, *seen[id(layer)]) for layer in layers.values()]
    found = {stage: sum(macs[stage] for macs in each) for stage in accelerator.PRODUCTS}
    expected = stage_macs([product for product in products_of(model, images) if product.sparse], n, m)
    if any(found[stage] != expected[stage] for stage in found):
        raise ValueError(f"the products did {found} multiply-accumulates, the model of their cost says {expected}")
    return found


def measured_step(tokens: int, width: int, seconds: float = 8.0) -> dict[str, Any]:
    """How long a training step of one width x width layer takes on this machine, over dense: on a GPU by its 2:4 units in bfloat16,
    else by compressed rows at 2:8 in float32.

    "whole" makes both masks, compresses both weights and multiplies three times; "held masks" makes no masks; "products" has them
    compressed beforehand, as an optimiser that emits them would.
    """
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    n, m = (2, 4) if gpu else (2, 8)
    backend: training.Backend = "semi_structured" if gpu else "csr"
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    gy = torch.randn(tokens, width, device=device, dtype=dtype)
    layer = nn.Linear(width, width, bias=False, device=device)
    pattern = Pattern(n, m, decay=0.0)
    arms: dict[str, nn.Module] = {
        "dense": layer,
        "whole": NMLinear(layer, pattern, backend),
        "held masks": NMLinear(layer, Pattern(n, m, decay=0.0, held=True), backend),
        "zeros in place of what is pruned": NMLinear(layer, pattern),
    }

    def step(module: nn.Module) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            y = module(x)
        y.backward(gy)
        x.grad = layer.weight.grad = None

    weight = layer.weight.detach()
    forward, backward = masks_of(weight, pattern)
    first = training.compress((weight * forward).to(dtype), backend)
    second = training.compress((weight * backward).T.contiguous().to(dtype), backend)
    rows = x.detach()

    def products() -> tuple[Tensor, ...]:
        return training.multiply(rows, first, backend), training.multiply(gy, second, backend), gy.T @ rows

    def plain() -> tuple[Tensor, ...]:
        return F.linear(rows, weight.to(dtype)), gy @ weight.to(dtype), gy.T @ rows

    runs: dict[str, Callable[[], Any]] = {name: partial(step, module) for name, module in arms.items()}
    found = compare_many({**runs, "products": products, "dense products": plain}, rounds=8, max_seconds=seconds)
    ratios = {name: found.speedup("dense", name) for name in arms if name != "dense"}
    ratios["products"] = found.speedup("dense products", "products")
    return {
        "device": torch.cuda.get_device_name() if gpu else "processor",
        "backend": backend,
        "pattern": f"{n}:{m}",
        "speedup": {name: [ratio.low, ratio.median, ratio.high] for name, ratio in ratios.items()},
        "bound": 1 / cost_ratio(n, m),
        "above the bound": [name for name, ratio in ratios.items() if ratio.low > 1 / cost_ratio(n, m)],
        "noisy": found.noisy,
    }


@experiment(
    "nm_sparse_bdwp/training-speedup",
    points={
        "smoke": [{"n": 2, "m": 8, "batch": 64, "tokens": 64, "width": 256}],
        "small": [{"n": 2, "m": 8, "batch": 512, "tokens": 256, "width": 1024}],
        "full": [{"n": 2, "m": 8, "batch": 512, "tokens": 8192, "width": 4096}],
    },
    operator=NETWORK,
    paper={
        "n": 2,
        "m": 8,
        "networks": "ResNet-9, ViT, VGG-19, ResNet-18, ResNet-50",
        "device": "SAT on a Xilinx VCU1525",
    },
    departures={
        "device": "a model of the accelerator in cycles, with a size of its array that is our choice: no such card is here",
        "networks": "their layers' shapes, for image sizes and a ViT of our choice; norms and activations are left out",
    },
    refuted_if="the modelled step is not shorter than dense training on the same accelerator",
    measured_here="cycles of a training step on a model of the accelerator, the mean over five networks' layer shapes",
    computed="cycles follow from the layers' shapes and the accelerator's model; no accelerator with N:M products at 2:8 is here",
    minutes=20,
)
def training_speedup(n: int, m: int, batch: int, tokens: int, width: int) -> Figure:
    """Cycles of a dense training step over those of a BDWP step, by a model of SAT, the mean over the paper's five networks.

    The multiplications that the model leaves out are left out indeed: on compressed rows those of a small network are counted, stage by
    stage, and the experiment fails where they are not as many as the model says, or where its speed-up exceeds the bound 3 / (2 n/m + 1).
    Arms: SR-STE, whose backward product is dense, and the accelerator without what the optimiser emits beforehand. The details have
    other ratios, MACs by stage, and what this machine itself makes of one layer's step, which is a time and no model: on a GPU by its
    2:4 units, elsewhere by compressed rows.
    """
    ours = modelled(n, m, batch, SAT())
    value, bound = mean(ours), 1 / cost_ratio(n, m)
    if not max(ours.values()) <= bound + 1e-9:
        raise ValueError(f"the model must not exceed the bound of {bound:.4g}x, got {ours}")
    steps = {name: train_step(products, n, m) for name, products in networks(batch).items()}
    dense = {name: train_step(products, n, m, training="dense") for name, products in networks(batch).items()}
    return Figure(
        value,
        "x",
        baseline=1.0,
        arms={
            "SR-STE": mean(modelled(n, m, batch, SAT(), "sr_ste")),
            "BDWP, weights sorted when they are read": mean(modelled(n, m, batch, SAT(pregenerated=False))),
            "BDWP, sparse mode everywhere": mean(modelled(n, m, batch, SAT(scheduled=False))),
        },
        details={
            "bound": bound,
            "speedup": ours,
            "speedup at other ratios": {
                f"{a}:{b}": mean(modelled(a, b, batch, SAT())) for a, b in ((2, 4), (1, 4), (1, 8))
            },
            "macs by stage": {name: step.macs for name, step in steps.items()},
            "macs by stage, dense": {name: step.macs for name, step in dense.items()},
            "cycles by stage": {name: step.cycles for name, step in steps.items()},
            "cycles by stage, dense": {name: step.cycles for name, step in dense.items()},
            "bytes by stage": {name: step.bytes for name, step in steps.items()},
            "macs by stage, counted on a small network": counted_macs(n, m),
            "a step on this machine": measured_step(tokens, width),
        },
    )


# ----------------------------------------------------------------------------------------------------- accuracy: trained networks


@cache
def drawn(n: int, seed: int, choosing: bool, heldout: bool = False) -> Batch:
    """`n` digits (n, 1, 12, 12), each at a random place, and their labels. To choose a rate, both parts come from those for training."""
    images, labels, test_images, test_labels = digits_split(seed=0)
    if choosing:
        test_images, test_labels = images[1000:], labels[1000:]
        images, labels = images[:1000], labels[:1000]
    if heldout:
        images, labels = test_images, test_labels
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(images), (n,), generator=generator)
    places = torch.randint(CANVAS - DIGIT + 1, (n, 2), generator=generator).tolist()
    canvas = torch.zeros(n, 1, CANVAS, CANVAS)
    for image, digit, (top, left) in zip(canvas, images[picks], places, strict=True):
        image[:, top : top + DIGIT, left : left + DIGIT] = digit
    return canvas, labels[picks]


def network(task: Task, width: int, seed: int) -> nn.Module:
    """The dense network of a task; all arms of a seed begin with the same weights, the narrow one with those of its own width."""
    torch.manual_seed(seed)
    if task == "bytes":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *(*stage(1, width), nn.MaxPool2d(2), *stage(width, 2 * width), nn.MaxPool2d(2), *stage(2 * width, 2 * width)),
        *(nn.Flatten(), nn.Linear(9 * 2 * width, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def patterns(n: int, m: int) -> dict[str, Pattern | None]:
    """The arms. "fixed" and "random" are BDWP without its choice: N of every M drawn once for all, and drawn anew in every step."""
    return {
        "dense": None,
        "bdwp": Pattern(n, m),
        "sr_ste": Pattern(n, m, "sr_ste"),
        "transposable": Pattern(n, m, "transposable", held=True),
        "fixed": Pattern(n, m, held=True),
        "random": Pattern(n, m, held=True),
        "narrow": None,
    }


ARMS = tuple(patterns(2, 8))


def drawn_masks(generator: torch.Generator) -> Choice:
    """N of every M drawn by chance, for each product by itself: the shape and the cost of BDWP's masks."""

    def choose(weight: Tensor, pattern: Pattern) -> training.Masks:
        forward, backward = torch.rand(2, *weight.shape, generator=generator).unbind(0)
        return largest(forward, pattern.n, pattern.m, 1), largest(backward, pattern.n, pattern.m, 0)

    return choose


@cache
def narrow_width(task: Task, width: int, n: int, m: int) -> int:
    """The width at which a dense network's step has as many MACs as BDWP's, as nearly as widths allow: the cheapest other way."""
    x = one_question(task)
    pruned = network(task, width, 0)
    sparse_training(pruned, Pattern(n, m))
    budget = sum(stage_macs(products_of(pruned.eval(), x), n, m).values())

    def distance(narrow: int) -> int:
        return abs(sum(stage_macs(products_of(network(task, narrow, 0).eval(), x), n, m, "dense").values()) - budget)

    step = 1 if task == "digits" else 8  # four heads of an even width
    return min(range(step, width + 1, step), key=distance)


def one_question(task: Task) -> Tensor:
    """An empty picture, or an empty window."""
    return torch.zeros(1, 1, CANVAS, CANVAS) if task == "digits" else torch.zeros(1, LENGTH, dtype=torch.int64)


def batches(task: Task, train: int, seed: int, choosing: bool) -> Iterator[Batch]:
    """Endless batches: of `train` drawn digits in a random order, or of windows of source code."""
    if task == "bytes":
        yield from byte_batches(LENGTH, BATCH["bytes"], seed=seed)
    images, labels = drawn(train, seed, choosing)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for picks in torch.randperm(train, generator=generator).split(BATCH["digits"]):
            yield images[picks], labels[picks]


def questions(task: Task, choosing: bool) -> list[Batch]:
    """What a network is judged on: 2,000 drawings of digits it never saw, or windows of code it never saw."""
    if task == "digits":
        x, y = drawn(2000, 1_000_000, choosing, heldout=True)
    else:  # the first half of the held-out text to choose rates by, the second half to judge
        x, y = byte_windows(LENGTH, 256)
        x, y = (x[:128], y[:128]) if choosing else (x[128:], y[128:])
    return list(zip(x.split(250), y.split(250), strict=True))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """(answers, classes)."""
    out = model(x)
    found: Tensor = out.logits if hasattr(out, "logits") else out
    return found.flatten(0, -2)


def prepared(arm: str, task: Task, n: int, m: int, width: int, seed: int) -> nn.Module:
    """The network of an arm before its first step."""
    model = network(task, narrow_width(task, width, n, m) if arm == "narrow" else width, seed)
    pattern = patterns(n, m)[arm]
    if pattern is not None:
        sparse_training(model, pattern)
    return model


def trained(
    arm: str,
    task: Task,
    n: int,
    m: int,
    width: int,
    train: int,
    steps: int,
    rate: float,
    seed: int,
    choosing: bool = False,
) -> tuple[float, float, nn.Module]:
    """Train an arm, a warm-up of a tenth of the steps and a cosine down to 0: accuracy, loss in nats, and the network.

    Digits by SGD with momentum, bytes by AdamW.
    """
    model = prepared(arm, task, n, m, width, seed)
    optimizer: torch.optim.Optimizer
    if task == "digits":
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)

    def share(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    choose = drawn_masks(torch.Generator().manual_seed(seed + 1))
    if arm == "fixed":
        remake(model, choose)
    model.train()
    for step, (x, y) in zip(range(steps), batches(task, train, seed, choosing), strict=False):
        if arm == "random":
            remake(model, choose)
        if arm == "transposable" and step % REFRESH == 0:
            remake(model)
        loss = F.cross_entropy(logits(model, x), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return *judged(model.eval(), task, choosing), model


@torch.no_grad()
def judged(model: nn.Module, task: Task, choosing: bool) -> tuple[float, float]:
    """Accuracy (a share) and loss (nats) on what the network never saw."""
    right = nats = asked = 0.0
    for x, y in questions(task, choosing):
        found = logits(model, x)
        right += float((found.argmax(-1) == y.flatten()).sum())
        nats += float(F.cross_entropy(found, y.flatten(), reduction="sum"))
        asked += y.numel()
    return right / asked, nats / asked


def accuracy_of(
    arm: str, task: Task, n: int, m: int, width: int, train: int, steps: int, rate: float, seed: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """The accuracy of a trained arm, and the cosines of BDWP's network of the first seed."""
    accuracy, _, model = trained(arm, task, n, m, width, train, steps, rate, seed)
    return accuracy, cosines(model, task, train) if arm == "bdwp" and not seed else {}


def floor(task: Task, train: int) -> tuple[float, str]:
    """The accuracy of something trivial: the class whose mean picture is the nearest, or the byte that most often follows a byte."""
    asked = questions(task, False)
    x, y = torch.cat([x for x, _ in asked]), torch.cat([y for _, y in asked])
    if task == "digits":
        images, labels = drawn(train, 0, False)
        means = torch.stack([images[labels == label].flatten(1).mean(0) for label in range(10)])
        return float((torch.cdist(x.flatten(1), means).argmin(1) == y).double().mean()), "the nearest class mean"
    text = text_bytes("code", "prompts")
    counts = torch.bincount(256 * text[:-1] + text[1:], minlength=256 * 256).view(256, 256)
    return float((counts.argmax(1)[x] == y).double().mean()), "the most frequent next byte"


def cosines(model: nn.Module, task: Task, train: int) -> dict[str, dict[str, float]]:
    """How far BDWP's input gradients point the way the dense ones do, layer by layer, over one batch for training."""
    x, y = next(batches(task, train, 0, False))
    was = model.training
    found = gradient_cosines(model.eval(), lambda: F.cross_entropy(logits(model, x), y.flatten()))
    model.train(was)
    return {name: asdict(cosine) for name, cosine in found.items()}


@searched("nm_sparse_bdwp/digits", arms=ARMS, grid=(0.01, 0.03, 0.1, 0.3, 1.0))
def digits_rate(arm: str, rate: float) -> float:
    """The loss on digits kept for the choice."""
    return trained(arm, "digits", 2, 8, 32, 4000, 250, rate, CHOICE_SEED, choosing=True)[1]


@searched("nm_sparse_bdwp/bytes", arms=ARMS, grid=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
def bytes_rate(arm: str, rate: float) -> float:
    """The loss on code kept for the choice, of half the width of `full` and after 120 steps of its 3,000."""
    return trained(arm, "bytes", 2, 8, 64, 0, 120, rate, CHOICE_SEED, choosing=True)[1]


@experiment(
    "nm_sparse_bdwp/accuracy-loss",
    points={
        "smoke": [{"task": "digits", "n": 2, "m": 8, "width": 8, "train": 800, "steps": 40, "seeds": 3}],
        "small": [{"task": "digits", "n": 2, "m": 8, "width": 32, "train": 4000, "steps": 250, "seeds": 6}],
        "full": [
            *(
                {"task": "digits", "n": n, "m": m, "width": 64, "train": 16000, "steps": 2000, "seeds": 10}
                for n, m in ((2, 8), (2, 4), (1, 4))
            ),
            {"task": "bytes", "n": 2, "m": 8, "width": 128, "train": 0, "steps": 3000, "seeds": 3},
        ],
    },
    decides={
        "small": {"task": "digits", "n": 2, "m": 8, "width": 32, "train": 4000, "steps": 250, "seeds": 6},
        "full": {"task": "digits", "n": 2, "m": 8, "width": 64, "train": 16000, "steps": 2000, "seeds": 10},
    },
    operator=NETWORK,
    paper={
        "n": 2,
        "m": 8,
        "task": "CIFAR-10, CIFAR-100, Tiny ImageNet, ImageNet",
        "network": "the mean over ResNet-9, ViT, VGG-19, ResNet-18 and ResNet-50",
    },
    departures={
        "task": "handwritten digits at random places of a canvas: no such set of photographs comes with a package",
        "network": "three convolutions and two linear layers, which train in seconds",
    },
    tolerance=0.44,
    refuted_if="the whole 95 % interval over seeds of the accuracy that BDWP loses against dense training lies above 1 point",
    measured_here="points of accuracy on held-out handwritten digits, after equal steps",
    minutes=600,
)
def accuracy_loss(task: Task, n: int, m: int, width: int, train: int, steps: int, seeds: int) -> Figure:
    """Points of accuracy that BDWP loses against dense training after as many steps.

    "Within the paper's 0.56" reaches 1 point (our choice: the drawings show 450 different digits, and two of them are 0.44 points).
    All arms of a seed see the same pictures in the same order; the interval is Student's t over the seeds' paired differences, the
    held-out pictures staying the same. Controls, as losses too: N of every M drawn once for all (BDWP's choice deleted), drawn anew in
    every step (random), and a narrower dense network whose step has as many MACs (rival). The rival is shown and does not decide, for
    the claim is about dense training. Arms: SR-STE, which prunes the forward pass alone, and transposable masks, searched for every
    20 steps. Rates were searched for at 2:8 and the size of `small` (those of bytes: `bytes_rate`). The details have the cosines of
    BDWP's input gradients with the dense ones, before and after training, and the MACs of a step by stage.
    """
    rates = {arm: chosen(f"nm_sparse_bdwp/{task}", arm) for arm in ARMS}
    details: dict[str, Any] = {"cosines": {"start": cosines(prepared("bdwp", task, n, m, width, 0), task, train)}}
    runs = [(arm, task, n, m, width, train, steps, rates[arm].rate, seed) for arm in ARMS for seed in range(seeds)]
    seen = in_parallel(accuracy_of, runs)
    found = {
        arm: [100 * accuracy for run, (accuracy, _) in zip(runs, seen, strict=True) if run[0] == arm] for arm in ARMS
    }
    details["cosines"]["trained"] = seen[runs.index(("bdwp", task, n, m, width, train, steps, rates["bdwp"].rate, 0))][
        1
    ]
    lost = {arm: paired(found["dense"], found[arm]) for arm in ARMS if arm != "dense"}
    least, name = floor(task, max(train, 1))
    return Figure(
        lost["bdwp"].median,
        "%",
        lost["bdwp"].low,
        lost["bdwp"].high,
        baseline=0.0,
        controls={
            "deleted": lost["fixed"].median,
            "random": lost["random"].median,
            "rival": lost["narrow"].median,
        },
        arms={"SR-STE": lost["sr_ste"].median, "transposable masks": lost["transposable"].median},
        trained={
            arm: Trained(found[arm], 100 * least, name, rate.rate, rate.rates, higher_is_better=True, best=100.0)
            for arm, rate in rates.items()
            if arm not in ("fixed", "random")
        },
        details={
            **details,
            "accuracy": found,
            "rates": {arm: rate.rate for arm, rate in rates.items()},
            "lost": {arm: [each.low, each.median, each.high] for arm, each in lost.items()},
            "macs by stage": step_macs(task, n, m, width),
            "narrow width": narrow_width(task, width, n, m),
        },
    )


def step_macs(task: Task, n: int, m: int, width: int) -> dict[str, dict[accelerator.Stage, int]]:
    """MACs by stage of one training step of each arm, for one picture or window."""
    x = one_question(task)
    found: dict[str, dict[accelerator.Stage, int]] = {}
    for arm, pattern in patterns(n, m).items():
        scheme: accelerator.Training = "dense" if pattern is None else pattern.scheme
        products = products_of(prepared(arm, task, n, m, width, 0).eval(), x)
        found[arm] = stage_macs(products, n, m, scheme)
    return found
