"""What an N:M training step costs: multiply-accumulates by stage, and cycles on a model of the accelerator SAT.

    products = products_of(model, images)                  the products of one pass, layer by layer
    train_step(products, 2, 8).cycles                      by stage: forward, backward, weight, update

A model, not a measurement, and of our reading: the paper's accelerator was an FPGA. It knows products with weights, the bytes they
move and the optimiser's traffic; norms, activations and pooling it does not know. 1 MAC = 2 operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.compression.nm_sparse_bdwp.training import BACKWARD_SPARSE, nm_layers
from assay.methods.core.sparsity.projections import check_n_m

Stage = Literal["forward", "backward", "weight", "update"]
STAGES: tuple[Stage, ...] = get_args(Stage)
PRODUCTS: tuple[Stage, ...] = ("forward", "backward", "weight")
PRUNED: tuple[Stage, ...] = ("forward", "backward")
Training = Literal["dense", "bdwp", "transposable", "sr_ste", "forward"]
TRAININGS: tuple[Training, ...] = get_args(Training)


@dataclass(frozen=True)
class Product:
    """A layer's product in one forward pass: `rows` vectors of `inputs` numbers, `outputs` results each.

    A convolution has a row for each output position, and its `inputs` are channels times the places of the kernel; `read` is how many
    numbers its input has in memory, fewer than rows x inputs. `sparse` says that its weights may be pruned, `first` that nobody
    asks for the gradient of its input, `weights` is False for a product of two activations, as attention has.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    read: int
    sparse: bool = True
    first: bool = False
    weights: bool = True

    def __post_init__(self) -> None:
        for field in ("rows", "inputs", "outputs", "read"):
            checks.whole(field, getattr(self, field), low=1)
        for field in ("sparse", "first", "weights"):
            checks.flag(field, getattr(self, field))
        if self.sparse and not self.weights:
            raise ValueError(f"sparse must be False for a product without weights, got True for {self.name}")

    @property
    def macs(self) -> int:
        """Of each of the three stages, dense."""
        return self.rows * self.inputs * self.outputs

    @property
    def size(self) -> int:
        """Weights; of a product of two activations, numbers of the second one."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class SAT:
    """The accelerator: `pes` processing elements of `lanes` multipliers each, in front of one memory.

    Fed with a group of M inputs, an element picks the operands of its `lanes` values by their places, so that an N:M product takes
    N / M of the cycles; in dense mode it takes `lanes` neighbours. 16-bit operands, a master weight of 32 bits with `moments` more
    numbers of 32 bits for the optimiser. The gradient of a weight goes to the optimiser without passing through memory.

    - `interleaved`: independent outputs take turns in an element, so that the adder's latency is hidden; without, an element waits
      `adder_latency` cycles after every addition.
    - `pregenerated`: the optimiser writes both sparse weights, values and places, once a step; without, the stages read the dense
      weight and sort its groups first, `sorters` groups a cycle.
    - `scheduled`: every layer and stage runs in the mode that takes fewer cycles; without, sparse wherever the layer is sparse.

    The defaults (1,024 multipliers at 200 MHz, the card's four memories) are our choice, not the paper's table.
    """

    pes: int = 512
    lanes: int = 2
    hertz: float = 200e6
    bandwidth: float = 77e9  # bytes a second: four DDR4 channels
    moments: int = 1
    adder_latency: int = 8
    sorters: int = 32
    interleaved: bool = True
    pregenerated: bool = True
    scheduled: bool = True

    def __post_init__(self) -> None:
        for field in ("pes", "lanes", "adder_latency", "sorters"):
            checks.whole(field, getattr(self, field), low=1)
        checks.whole("moments", self.moments, low=0)
        for field in ("hertz", "bandwidth"):
            checks.number(field, getattr(self, field), above=0)
        for field in ("interleaved", "pregenerated", "scheduled"):
            checks.flag(field, getattr(self, field))


@dataclass(frozen=True)
class Step:
    """A training step on the accelerator: cycles, MACs and bytes by stage, and the mode of each layer's products."""

    cycles: dict[Stage, int]
    macs: dict[Stage, int]
    bytes: dict[Stage, int]
    modes: dict[str, dict[Stage, Literal["dense", "sparse"]]]
    hertz: float

    @property
    def total(self) -> int:
        """Cycles of the step."""
        return sum(self.cycles.values())

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.total / self.hertz


def cost_ratio(n: int, m: int) -> float:
    """The MACs of a BDWP step over those of a dense one where every layer is pruned: (n/m + n/m + 1) / 3.

    Its reciprocal bounds the speed-up: a measured one above it is a fault of the measurement.

    >>> cost_ratio(2, 4) * 3, cost_ratio(2, 8), round(12 * cost_ratio(1, 8), 9)
    (2.0, 0.5, 5.0)
    """
    n, m = check_n_m(n, m)
    return (2 * n / m + 1) / 3


def stage_macs(products: Sequence[Product], n: int, m: int, training: Training = "bdwp") -> dict[Stage, int]:
    """MACs of one step by stage: of a sparse product n / m in the forward pass, and in the backward pass where the scheme is N:M there.

    "update" has none. Raises ValueError for a sparse product whose inputs or outputs are no multiple of m.

    >>> layer = Product("layer", rows=10, inputs=16, outputs=8, read=160)
    >>> stage_macs([layer], 2, 8)
    {'forward': 320, 'backward': 320, 'weight': 1280, 'update': 0}
    """
    found: dict[Stage, int] = dict.fromkeys(STAGES, 0)
    for product in products:
        for stage in PRODUCTS:
            found[stage] += _macs(product, stage, n, m, _is_sparse(product, stage, n, m, training))
    return found


def train_step(
    products: Sequence[Product], n: int, m: int, sat: SAT | None = None, training: Training = "bdwp"
) -> Step:
    """One step, layer by layer: of each stage the larger of its cycles of arithmetic and of memory, and no overlap between stages.

    Cycles of arithmetic are ceil(MACs / (pes x lanes)). Memory: a stage reads and writes its activations at 16 bits and reads its
    weight, dense at 16 bits or sparse at n / m (16 + ceil(log2 m)) bits a dense weight. The update reads and writes master and moments, and
    writes the 16-bit weights that the next step reads: both sparse copies, or the dense one. Products of one name are those of one
    layer that runs several times: it is updated once, and `modes` has the last. `training="dense"` is dense training on the same
    accelerator.
    """
    sat = SAT() if sat is None else sat
    n, m = check_n_m(n, m)
    cycles: dict[Stage, int] = dict.fromkeys(STAGES, 0)
    macs: dict[Stage, int] = dict.fromkeys(STAGES, 0)
    moved: dict[Stage, int] = dict.fromkeys(STAGES, 0)
    modes: dict[str, dict[Stage, Literal["dense", "sparse"]]] = {}
    for product in products:
        mode: dict[Stage, Literal["dense", "sparse"]] = {}
        for stage in PRODUCTS:
            sparse = _is_sparse(product, stage, n, m, training)
            ways = [sparse] if not sparse or not sat.scheduled else [True, False]
            took = {way: _cycles(product, stage, n, m, way, sat) for way in ways}
            best = min(took, key=took.__getitem__)  # the sparse mode where both take as long
            cycles[stage] += took[best]
            macs[stage] += _macs(product, stage, n, m, best)
            moved[stage] += _bytes(product, stage, n, m, best, sat)
            mode[stage] = "sparse" if best else "dense"
        again = product.name in modes
        modes[product.name] = mode
        if product.weights and not again:
            update = _update_bytes(product, n, m, mode, sat)
            moved["update"] += update
            cycles["update"] += max(_memory(update, sat), -(-product.size // sat.pes))
    return Step(cycles, macs, moved, modes, sat.hertz)


def products_of(model: nn.Module, *inputs: Any) -> list[Product]:
    """The products of one forward pass of `model(*inputs)` in evaluation mode, in the order they run.

    Products of linear layers and 2-D convolutions. Those that train N:M (`sparse_training`) are marked sparse; before that, none is. The
    first one that runs needs no gradient of its input where that is an input of the model. A layer that runs several times is listed as
    often. What multiplies without being such a layer (attention's own products, fused experts) is not. Raises ValueError for a
    model in which none runs.

    >>> products_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(5, 4))[0]
    Product(name='0', rows=5, inputs=4, outputs=8, read=20, sparse=False, first=True, weights=True)
    """
    pruned = nm_layers(model)
    found: list[Product] = []

    def watch(name: str) -> Any:
        def look(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, outputs, groups = args[0], layer.weight.shape[0], getattr(layer, "groups", 1)
            width = layer.weight[0].numel()  # of one output: a grouped convolution reads its own group only
            rows = output.numel() // outputs
            first = any(x is given for given in inputs)
            found.append(Product(name, rows, width, outputs, x.numel(), name in pruned and groups == 1, first))

        return look

    kinds = (nn.Linear, nn.Conv2d)
    handles = [
        layer.register_forward_hook(watch(name)) for name, layer in model.named_modules() if isinstance(layer, kinds)
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not found:
        raise ValueError(f"model must run a linear layer or a 2-D convolution, got none in {type(model).__name__}")
    return found


def _is_sparse(product: Product, stage: Stage, n: int, m: int, training: Training) -> bool:
    """Whether the weight of this stage is N:M along what the stage sums over."""
    checks.choice("training", training, TRAININGS)
    n, m = check_n_m(n, m)
    if not product.sparse or training == "dense" or stage == "weight":
        return False
    if product.inputs % m or product.outputs % m:
        raise ValueError(
            f"a sparse product must have multiples of {m}, got {product.inputs} inputs and {product.outputs} outputs in {product.name}"
        )
    return stage == "forward" or training in BACKWARD_SPARSE


def _macs(product: Product, stage: Stage, n: int, m: int, sparse: bool) -> int:
    if stage == "backward" and product.first:
        return 0
    return product.macs * n // m if sparse else product.macs


def _bytes(product: Product, stage: Stage, n: int, m: int, sparse: bool, sat: SAT) -> int:
    """Bytes that a stage moves."""
    written = product.rows * product.outputs
    if stage == "backward" and product.first:
        return 0
    if stage == "weight":  # a product of two activations writes the gradient of the second one
        return 2 * (product.read + written + (0 if product.weights else product.size))
    packed = sparse and sat.pregenerated
    return 2 * (product.read + written) + (_packed_bytes(product.size, n, m) if packed else 2 * product.size)


def _packed_bytes(size: int, n: int, m: int) -> int:
    """N:M weights, values of 16 bits and places."""
    return math.ceil(size * n * (16 + (m - 1).bit_length()) / (8 * m))


def _update_bytes(product: Product, n: int, m: int, mode: Mapping[Stage, str], sat: SAT) -> int:
    """Master and moments read and written, and the copies that the next step reads."""
    sparse = [stage for stage in PRUNED if mode[stage] == "sparse"]
    packed = len(sparse) * _packed_bytes(product.size, n, m) if sat.pregenerated else 0
    dense = 2 * product.size if len(sparse) < 2 or not sat.pregenerated else 0
    return 2 * 4 * (1 + sat.moments) * product.size + packed + dense


def _memory(moved: int, sat: SAT) -> int:
    return math.ceil(moved * sat.hertz / sat.bandwidth)


def _cycles(product: Product, stage: Stage, n: int, m: int, sparse: bool, sat: SAT) -> int:
    macs = _macs(product, stage, n, m, sparse)
    work = -(-macs // (sat.pes * sat.lanes)) * (1 if sat.interleaved else sat.adder_latency)
    sorting = -(-product.size // (m * sat.sorters)) if sparse and macs and not sat.pregenerated else 0
    return max(work, _memory(_bytes(product, stage, n, m, sparse, sat), sat)) + sorting
