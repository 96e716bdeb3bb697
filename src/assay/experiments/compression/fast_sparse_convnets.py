"""Fast Sparse ConvNets: from which sparsity on the sparse product is the faster one, how near it comes to the ideal, and whether a
pruned wide network is faster than a dense narrow one that is as accurate.

A layer is timed at the sizes of MobileNetV1, one picture, all threads, against the fastest of torch's ways to compute it densely in
float32. Beside it: what torch gives for free with the pruned weights (CSR) or with fewer bits (bfloat16), and our INT8 layer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.compression.fast_sparse_convnets_training import (
    ARMS,
    RATES,
    RIVAL,
    Trainer,
    csr_network,
    floor,
    folded,
    our_depthwise,
    sparse_network,
    split,
    torchs_depthwise,
)
from assay.experiments.core import Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.rates import chosen
from assay.experiments.seeds import paired
from assay.methods.compression.fast_sparse_convnets import mobilenet_macs, pack, sparse_product
from assay.methods.compression.fast_sparse_convnets.product import Block
from assay.methods.core.quantize.int8_linear import Int8Linear
from assay.methods.core.sparsity.projections import blocks, per_layer
from assay.workloads.images import photograph

OPERATOR = Operator(
    "pointwise convolutions of pruned weights",
    free="torch's fastest: the pruned weights as a CSR matrix in float32, or dense ones in bfloat16",
)
CSR, BF16, INT8 = "torch's CSR, float32", "dense, bfloat16", "dense, our INT8 layer"
LAYERS = (
    *((32, 64, 112), (64, 128, 56), (128, 128, 56), (128, 256, 28), (256, 256, 28), (256, 512, 14)),
    *((512, 512, 14), (512, 1024, 7), (1024, 1024, 7)),
)
"""Inputs, outputs and pixels a side of MobileNetV1's pointwise convolutions at 224 pixels."""
IN_BLOCKS: tuple[Block, ...] = (2, 4)
COMPILED = "dense, compiled"
RUN_MACS = 5e8  # of the dense product in one timed run, so that it is long enough to time
ERROR = Guard("largest error against float64, as a share of the largest output", 1e-4, relative=False)


def features(channels: int, side: int) -> Tensor:
    """A layer's input: a photograph through a random convolution and ReLU6, (1, channels, side, side)."""
    torch.manual_seed(0)
    picture = F.interpolate(photograph("china")[None], (side, side), mode="bilinear", antialias=True)
    return F.conv2d(picture, torch.randn(channels, 3, 3, 3), padding=1).clamp(0, 6)


def pruned(outputs: int, inputs: int, sparsity: float, block: int = 1) -> Tensor:
    """Random weights of which the largest are left, single ones or blocks of as many outputs."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) / inputs**0.5
    density = round(1 - sparsity, 12)
    if block > 1:
        return weight * blocks(weight.abs(), (block, 1), density)
    return weight * per_layer({"w": weight.abs()}, density)["w"]


def dense_ways(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Any]]:
    """torch's ways to compute a dense pointwise convolution, in the dtype of x; layouts and packed weights are made beforehand."""
    kernel = weight[:, :, None, None].contiguous()
    last = torch.channels_last
    x_last, kernel_last = x.contiguous(memory_format=last), kernel.contiguous(memory_format=last)
    columns, conv = x[0].flatten(1), nn.Conv2d(weight.shape[1], weight.shape[0], 1).to(x.dtype).eval()
    with torch.no_grad():
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)  # type: ignore[union-attr]
    ways: dict[str, Callable[[], Any]] = {
        "convolution": lambda: F.conv2d(x, kernel, bias),
        "convolution, channels last": lambda: F.conv2d(x_last, kernel_last, bias),
        "matrix product": lambda: torch.addmm(bias[:, None], weight, columns),
    }
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        from torch.utils.mkldnn import to_mkldnn

        with torch.no_grad():
            packed, x_packed = to_mkldnn(nn.Sequential(conv)), x.to_mkldnn()
        ways["oneDNN, its own layout"] = lambda: packed(x_packed)
    return ways


def quickest(ways: Mapping[str, Callable[[], Any]]) -> str:
    """The way with the fewest seconds: the least of seven runs after two."""
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for name, run in ways.items():
            taken = []
            for _ in range(9):
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
            seconds[name] = min(taken[2:])
    return min(seconds, key=lambda name: seconds[name])


def layer_trial(inputs: int, outputs: int, side: int, sparsity: float) -> Trial:
    """One pointwise convolution with bias, dense in float32 against our kernel on the same pruned weights.

    Weights are random: the time goes with how many are left, hardly with which. A timed run is several calls in a row on one
    input, so that caches are warm, for every arm alike. Beside the rivals stand blocks of 2 and 4 outputs at the same sparsity, pruned as
    such, and vectors of 8 lanes, as AVX2 has them.
    """
    x, weight = features(inputs, side), pruned(outputs, inputs, sparsity)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2))
    matrix, columns = pack(weight), x[0].flatten(1)
    in_blocks = {size: pack(pruned(outputs, inputs, sparsity, size), size) for size in IN_BLOCKS}
    csr, rows = matrix.csr(), columns.T.contiguous()
    int8 = Int8Linear(weight, bias, rotation=1)
    dense = dense_ways(x, weight, bias)
    half = dense_ways(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    baseline, bf16 = quickest(dense), quickest(half)
    calls = max(1, int(RUN_MACS / (inputs * outputs * side * side)))
    arms: dict[str, Callable[[], Any]] = {
        CSR: lambda: (csr @ columns).add_(bias[:, None]),
        BF16: half[bf16],
        INT8: lambda: int8(rows),
        "blocks of 2": lambda: sparse_product(x, in_blocks[2], bias),
        "blocks of 4": lambda: sparse_product(x, in_blocks[4], bias),
        "vectors of 8": lambda: sparse_product(x, matrix, bias, lanes=8),
    }
    free = quickest({name: arms[name] for name in (CSR, BF16)})

    def candidate() -> Tensor:
        return sparse_product(x, matrix, bias)

    def repeated(run: Callable[[], Any]) -> Callable[[], None]:
        @torch.no_grad()
        def several() -> None:
            for _ in range(calls):
                run()

        return several

    def quality() -> Quality:
        exact = weight.double() @ columns.double() + bias.double()[:, None]

        def error(y: Tensor) -> float:
            return float((y.double().reshape_as(exact) - exact).abs().max() / exact.abs().max())

        order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3))
        elsewhere = pack(weight.flatten()[order].view_as(weight))
        with torch.no_grad():
            return Quality(
                error(candidate()),
                error(dense["convolution"]()),
                controls={
                    "deleted": error(bias[:, None].expand_as(exact)),
                    "random": error(sparse_product(x, elsewhere, bias)),
                    "rival": error(half["convolution"]()),
                },
                rival="a dense product in bfloat16",
            )

    def details() -> dict[str, Any]:
        return {
            "macs": {"dense": inputs * outputs * side * side, "sparse": matrix.macs(side * side)},
            "ideal speed-up": weight.numel() / max(1, matrix.stored),
            "bytes": {
                "dense": 4 * weight.numel(),
                "sparse": matrix.bytes,
                **{f"blocks of {size}": packed.bytes for size, packed in in_blocks.items()},
            },
            "the fastest dense way": {"float32": baseline, "bfloat16": bf16},
            "free": free,
            "calls a run": calls,
        }

    return Trial(
        baseline=repeated(dense[baseline]),
        candidate=repeated(candidate),
        free=repeated(arms[free]),
        arms={name: repeated(run) for name, run in arms.items()},
        quality=quality,
        details=details,
    )


def at(layer: tuple[int, int, int], sparsity: float) -> dict[str, Any]:
    """A point."""
    return {"inputs": layer[0], "outputs": layer[1], "side": layer[2], "sparsity": sparsity}


MOST_COMMON = (512, 512, 14)  # of MobileNetV1: five of its thirteen blocks
DEPARTURES = {"threads": "all threads of this machine, for every arm alike", "device": "this machine's processor"}
SETTING = {"inputs": 512, "outputs": 512, "side": 14, "threads": 1, "device": "Snapdragon 835"}


@experiment(
    "fast_sparse_convnets/break-even",
    points={
        "smoke": [at((128, 128, 14), 0.7)],
        "small": [at(MOST_COMMON, 0.6), at(MOST_COMMON, 0.7)],
        "full": [at(layer, sparsity) for layer in LAYERS for sparsity in (0.5, 0.6, 0.7, 0.8)],
    },
    decides={"small": at(MOST_COMMON, 0.7), "full": at(MOST_COMMON, 0.7)},
    operator=OPERATOR,
    paper=SETTING | {"sparsity": 0.7},
    departures=DEPARTURES,
    guard=ERROR,
    tolerance=0.0,
    refuted_if="at 70 % zeros the kernel is slower than the fastest dense product in float32, or than torch's own product of a CSR matrix",
    refutes=lambda record: min(record["ratios"][arm]["high"] for arm in ("baseline", CSR)) < 1,
    minutes=5,
)
def break_even(inputs: int, outputs: int, side: int, sparsity: float) -> Trial:
    """Whether the break-even lies at or below 70 % zeros: the speed-up there is at least 1, without any tolerance.

    float32 against float32. bfloat16 and INT8 stand beside it and may well be faster at this sparsity: they round, and need no pruning.
    """
    return layer_trial(inputs, outputs, side, sparsity)


@experiment(
    "fast_sparse_convnets/ideal-share",
    points={
        "smoke": [at((128, 128, 14), 0.9)],
        "small": [at(MOST_COMMON, 0.9), at((128, 128, 56), 0.9), at((1024, 1024, 7), 0.9)],
        "full": [at(layer, sparsity) for layer in LAYERS for sparsity in (0.8, 0.9, 0.95)],
    },
    decides={"small": at(MOST_COMMON, 0.9), "full": at(MOST_COMMON, 0.9)},
    operator=OPERATOR,
    paper=SETTING | {"sparsity": 0.9},
    departures=DEPARTURES,
    guard=ERROR,
    tolerance=0.0,
    refuted_if="at 90 % zeros the kernel's speed-up over the fastest dense product in float32 is certainly below 5, half of the ideal, "
    "or what torch gives for free is faster than the kernel",
    refutes=lambda record: record["ratios"]["free"]["high"] < 1,
    minutes=5,
)
def ideal_share(inputs: int, outputs: int, side: int, sparsity: float) -> Trial:
    """Whether at 90 % zeros the speed-up reaches half of the ideal, which is one over the share of weights left: 5 of 10."""
    return layer_trial(inputs, outputs, side, sparsity)


AT_90: dict[str, Any] = {
    "sparsity": 0.9,
    "width": 1.0,
    "narrow": 0.5,
    "train": 2048,
    "epochs": 5,
    "seeds": 3,
    "batch": 32,
    "compiled": True,
}
LONGER = {"train": 16384, "epochs": 30, "seeds": 5}


def rival_wins(record: Mapping[str, Any]) -> bool:
    """Whether the dense network of as many multiply-adds is certainly faster than the pruned one and as accurate."""
    quality = record["quality"]
    return bool(record["ratios"][RIVAL]["high"] < 1 and quality["controls"]["rival"] >= quality["candidate"])


@experiment(
    "fast_sparse_convnets/speedup",
    points={
        "smoke": [AT_90 | {"train": 256, "epochs": 4, "batch": 8, "compiled": False}],
        "small": [AT_90],
        "full": [AT_90 | LONGER | {"sparsity": sparsity} for sparsity in (0.8, 0.9, 0.95)],
    },
    decides={"full": AT_90 | LONGER},
    operator=OPERATOR,
    paper={
        "sparsity": 0.9,
        "width": 1.0,
        "network": "MobileNetV1",
        "data": "ImageNet, 224 pixels",
        "batch": 1,
        "device": "Snapdragon 835, one core",
    },
    departures={
        "network": "the same blocks, five of thirteen and up to 256 channels, so that six arms of several seeds train in minutes",
        "data": "grey tiles of 32 pixels of 14 photographs, told apart by the picture they come from: ImageNet comes with no package",
        "batch": "32 tiles, since one is less than a hundredth of the work of a picture of 224 pixels",
        "device": "this machine's processor, all threads",
    },
    guard=Guard("accuracy on held-out tiles", 0.02, higher_is_better=True, relative=False),
    measured_here="a small MobileNet on tiles of photographs against one of half its width",
    refuted_if="the pruned network is slower than the dense one of half its width, or a dense network of as many multiply-adds as the "
    "pruned one is as accurate and faster",
    refutes=rival_wins,
    minutes=240,
)
def network_speedup(
    sparsity: float, width: float, narrow: float, train: int, epochs: int, seeds: int, batch: int, compiled: bool
) -> Trial:
    """A forward pass of the pruned wide network against one of the dense narrow network, whose accuracy it must keep.

    Both have their norms folded; the dense one runs in the faster of torch's two layouts or, where that is faster still and
    `compiled` allows it, as Inductor's frozen graph. Every arm trains on the same tiles for as many steps, at the rate searched for
    it. All but the two dense arms keep the same share of their pointwise weights: pruned gradually by magnitude (the paper's), at
    once half-way, at random places from the first step on, or in groups of channels that never mix, also from the first step on
    (the method deleted: no weight is chosen). "As many multiply-adds" is a dense network of still fewer channels, the rival; it runs as
    the narrow one does, or in a layout that is faster for it. The
    accuracy of the pruned network is that of the sparse layers that are timed. Timed beside them: the rival, the wide network dense,
    and, to say what part of a gain is theirs, the narrow one with our depthwise convolutions and the pruned one with torch's.
    """
    data = split(train, "heldout")
    trainer = Trainer(width, narrow, sparsity, epochs, data)
    rates = {arm: chosen(RATES, arm) for arm in ARMS}
    wide = trainer.run("pruned", rates["pruned"].rate, 0)
    narrow_one = trainer.model("dense", 0)  # as it was drawn: its time does not go with its weights
    half = folded(narrow_one)
    sparse, shares = sparse_network(wide)
    x = data[2][:batch].contiguous()
    ways = _dense_forwards(half, x, compiled)
    frees = {
        "pruned, CSR": _forward(csr_network(wide), x, "channels first"),
        "dense, bfloat16": _forward(copy.deepcopy(half).bfloat16(), x.bfloat16(), "channels last"),
    }
    baseline, free = quickest(ways), quickest(frees)
    rivals = _dense_forwards(folded(trainer.model(RIVAL, 0)), x, baseline == COMPILED)
    rival = quickest(rivals)
    found: dict[str, list[float]] = {}

    def scores() -> dict[str, list[float]]:
        if not found:
            for arm in ARMS:
                found[arm] = []
                for seed in range(seeds):
                    model = wide if (arm, seed) == ("pruned", 0) else trainer.run(arm, rates[arm].rate, seed)
                    judged = sparse_network(model)[0] if arm == "pruned" else model  # what is timed
                    found[arm].append(trainer.accuracy(judged))
        return found

    def quality() -> Quality:
        mean = {arm: sum(values) / len(values) for arm, values in scores().items()}
        gain = paired(found["pruned"], found["dense"])
        return Quality(
            mean["pruned"],
            mean["dense"],
            mean["dense"] + gain.low,
            mean["dense"] + gain.high,
            controls={
                "deleted": mean["groups"],
                "random": mean["random places"],
                "rival": mean[RIVAL],
                "pruned at once": mean["pruned at once"],
            },
            rival="a dense network of as many multiply-adds",
        )

    def trained() -> dict[str, Trained]:
        least = floor(data)
        return {
            arm: Trained(scores()[arm], least, "the nearest class mean", rate.rate, rate.rates, higher_is_better=True)
            for arm, rate in rates.items()
        }

    def details() -> dict[str, Any]:
        shape = trainer.shape
        return {
            "accuracy": scores(),
            "zeros": shares,
            "macs a tile": {
                "dense": mobilenet_macs(32, width=narrow, **shape),
                "pruned": mobilenet_macs(32, width=width, density=trainer.density, **shape),
                RIVAL: mobilenet_macs(32, width=trainer.equal, **shape),
            },
            "the fastest dense way": {"half the width": baseline, RIVAL: rival},
            "free": free,
        }

    return Trial(
        baseline=ways[baseline],
        candidate=_forward(sparse, x, "channels first"),
        free=frees[free],
        arms={
            RIVAL: rivals[rival],
            "the wide network, dense": _forward(folded(wide), x, "channels last"),
            "dense, our depthwise": _forward(our_depthwise(narrow_one), x, "channels first"),
            "pruned, torch's depthwise": _forward(torchs_depthwise(wide), x, "channels first"),
            **frees,
        },
        quality=quality,
        trained=trained,
        details=details,
    )


def _dense_forwards(model: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Forward passes in torch's two layouts and, if `compiled`, as Inductor's frozen graph."""
    layouts = ("channels first", "channels last")
    ways = {f"dense, {layout}": _forward(copy.deepcopy(model), x, layout) for layout in layouts}
    if compiled:
        last: Any = copy.deepcopy(model)
        frozen: Any = torch.compile(last.to(memory_format=torch.channels_last), options={"freezing": True})
        ways[COMPILED] = _forward(frozen, x, "channels last")
    return ways


def _forward(model: Any, x: Tensor, layout: str) -> Callable[[], Tensor]:
    """A forward pass; the model is moved to that layout, in place."""
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    placed, given = model.to(memory_format=form), x.contiguous(memory_format=form)

    @torch.no_grad()
    def run() -> Tensor:
        y: Tensor = placed(given)
        return y

    return run
