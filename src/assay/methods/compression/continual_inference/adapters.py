"""Structured pruning adapters: one big frozen network, and for each task a pruned copy of which only a small difference is stored.

After arXiv 2211.10155. A task keeps some channels; what it learns is a term of low rank on the channels that stay, so that the
stored difference shrinks with the pruning: rank * (inputs kept + outputs kept) numbers and the bias.

    adapted = adapt(model, rank=8)                   every linear layer and convolution; the model's own weights are frozen
    adapted[0].prune(outputs=mask)                   which channels this task keeps
    small = pruned(adapted)                          plain layers of the kept channels, for inference
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EACH = (  # what acts on every number by itself and learns nothing
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POOLS = (  # what acts on every channel of a convolution by itself
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


class SPLoRA(nn.Module):
    """A frozen linear layer or convolution plus `up @ down` of low rank, on the channels that stay (channel-based adapter).

    The weight is W + up @ down; of a convolution the term stands at the centre tap. `output_mask` and `input_mask` (bool, True stays)
    zero the rows and columns of pruned channels, and pruned outputs are zero. The bias, a copy, is trained too. In training the term
    runs as two thin products, in evaluation the merged weight runs. `down` begins as Kaiming's uniform, `up` within 1e-4.

    Not for grouped convolutions and even kernels. Raises TypeError for other layers, ValueError for those, a rank below 1, hooks (they
    would not run; masks of `torch.nn.utils.prune` are hooks too) and padding other than zeros.

    >>> layer = SPLoRA(nn.Linear(6, 4), rank=2)
    >>> layer.prune(outputs=torch.tensor([True, True, False, False]))
    >>> layer.learned, bool((layer.eval()(torch.ones(1, 6))[0, 2:] == 0).all())
    (18, True)
    """

    output_mask: Tensor
    input_mask: Tensor

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        if type(layer) not in KINDS:
            raise TypeError(f"layer must be a linear layer or a convolution, got {type(layer).__name__}")
        _hookless(layer)
        rank = checks.whole("rank", rank, low=1)
        given: Any = layer
        if not isinstance(layer, nn.Linear):
            if given.groups != 1:
                raise ValueError(f"layer must not be grouped, got {given.groups} groups")
            if any(size % 2 == 0 for size in given.kernel_size):
                raise ValueError(f"layer's kernel must have a centre tap, got {tuple(given.kernel_size)}")
            if given.padding_mode != "zeros" or isinstance(given.padding, str):
                raise ValueError("layer must pad with zeros, by numbers")
        self.layer: Any = copy.deepcopy(layer).requires_grad_(False)
        if self.layer.bias is not None:
            self.layer.bias.requires_grad_(True)
        weight: Tensor = given.weight
        outputs, inputs = weight.shape[:2]
        new: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.down = nn.Parameter(torch.empty(rank, inputs, **new))
        self.up = nn.Parameter(torch.empty(outputs, rank, **new))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        nn.init.uniform_(self.up, -1e-4, 1e-4)
        self.register_buffer("output_mask", torch.ones(outputs, dtype=torch.bool, device=new["device"]))
        self.register_buffer("input_mask", torch.ones(inputs, dtype=torch.bool, device=new["device"]))

    def prune(self, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Say which channels stay: bool masks, True stays; what is not given stays as it was.

        Raises TypeError for other than bool masks, ValueError for another length and for masks that leave nothing.
        """
        for name, mask, known in (("outputs", outputs, self.output_mask), ("inputs", inputs, self.input_mask)):
            if mask is None:
                continue
            checks.tensor(name, mask, shape=tuple(known.shape), dtype="bool")
            if not bool(mask.any()):
                raise ValueError(f"{name} must leave a channel, got a mask of False only")
        for mask, known in ((outputs, self.output_mask), (inputs, self.input_mask)):
            if mask is not None:
                known.copy_(mask)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._run(x, self.merged_weight(), self._bias())
        down, up = self.lora()
        out = self._run(x, self._masked(self.layer.weight), self._bias())
        if isinstance(self.layer, nn.Linear):
            return out + F.linear(F.linear(x, down), up)
        rank = len(self.layer.kernel_size)
        # the centre tap of output 0 lies at dilation * (kernel - 1) / 2 - padding: cut, or pad, the input by that
        shift = [
            padding - dilation * (size // 2)
            for size, padding, dilation in zip(
                self.layer.kernel_size, self.layer.padding, self.layer.dilation, strict=True
            )
        ]
        moved = F.pad(x, [s for amount in reversed(shift) for s in (amount, amount)])
        thin = _CONVOLVE[rank](moved, down.view(*down.shape, *[1] * rank), stride=self.layer.stride)
        return out + _CONVOLVE[rank](thin, up.view(*up.shape, *[1] * rank))

    def lora(self) -> tuple[Tensor, Tensor]:
        """(down, up) with the pruned columns and rows zero: what LoRA calls A (rank, in) and B (out, rank), for a scale of 1."""
        return self.down * self.input_mask, self.up * self.output_mask[:, None]

    def merged_weight(self) -> Tensor:
        """The weight of this task, zero where a channel is pruned."""
        down, up = self.lora()
        weight, term = self._masked(self.layer.weight), up @ down
        if isinstance(self.layer, nn.Linear):
            return weight + term
        centre = [(size // 2, size - 1 - size // 2) for size in self.layer.kernel_size]
        term = term.view(*term.shape, *[1] * len(centre))
        return weight + F.pad(term, [s for pair in reversed(centre) for s in pair])

    @property
    def learned(self) -> int:
        """How many numbers a task stores: rank * (inputs kept + outputs kept), and the bias of the outputs kept."""
        kept = int(self.output_mask.sum())
        biases = kept if self.layer.bias is not None else 0
        return len(self.down) * (int(self.input_mask.sum()) + kept) + biases

    def task_state(self) -> dict[str, Tensor]:
        """What a task stores: the two factors on the kept channels, the bias, and the masks."""
        found = {
            "down": self.down.detach()[:, self.input_mask].clone(),
            "up": self.up.detach()[self.output_mask].clone(),
            "output_mask": self.output_mask.clone(),
            "input_mask": self.input_mask.clone(),
        }
        if self.layer.bias is not None:
            found["bias"] = self.layer.bias.detach()[self.output_mask].clone()
        return found

    def load_task(self, task: Mapping[str, Tensor]) -> None:
        """Take up a task that `task_state` gave.

        Raises ValueError, before anything changes, where it does not fit this layer, TypeError for other dtypes.
        """
        if not isinstance(task, Mapping):
            raise TypeError(f"task must be a dictionary of tensors, got {type(task).__name__}")
        names = {"down", "up", "output_mask", "input_mask"} | ({"bias"} if self.layer.bias is not None else set())
        if set(task) != names:
            raise ValueError(f"task must hold {', '.join(sorted(names))}, got {', '.join(sorted(task))}")
        outputs = checks.tensor("output_mask", task["output_mask"], shape=tuple(self.output_mask.shape), dtype="bool")
        inputs = checks.tensor("input_mask", task["input_mask"], shape=tuple(self.input_mask.shape), dtype="bool")
        kept, dtype = int(outputs.sum()), self.down.dtype
        checks.tensor("down", task["down"], shape=(len(self.down), int(inputs.sum())), dtype=dtype, finite=True)
        checks.tensor("up", task["up"], shape=(kept, len(self.down)), dtype=dtype, finite=True)
        if "bias" in names:
            checks.tensor("bias", task["bias"], shape=(kept,), dtype=dtype, finite=True)
        self.prune(outputs=outputs, inputs=inputs)
        with torch.no_grad():
            self.down.zero_()[:, inputs] = task["down"]
            self.up.zero_()[outputs] = task["up"]
            if "bias" in names:
                self.layer.bias.zero_()[outputs] = task["bias"]

    def pruned_layer(self) -> nn.Module:
        """A plain layer of the kept channels alone, weights merged: what runs at inference."""
        weight = self.merged_weight().detach()[self.output_mask][:, self.input_mask]
        small: Any = copy.deepcopy(self.layer)
        small.weight = nn.Parameter(weight)
        if small.bias is not None:
            small.bias = nn.Parameter(self.layer.bias.detach()[self.output_mask].clone())
        outputs, inputs = weight.shape[:2]
        if isinstance(small, nn.Linear):
            small.out_features, small.in_features = outputs, inputs
        else:
            small.out_channels, small.in_channels = outputs, inputs
        return small

    def _masked(self, weight: Tensor) -> Tensor:
        shape = [1] * (weight.dim() - 2)
        return weight * self.output_mask.view(-1, 1, *shape) * self.input_mask.view(1, -1, *shape)

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        return None if bias is None else bias * self.output_mask

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        layer = self.layer
        return _CONVOLVE[weight.dim() - 2](x, weight, bias, layer.stride, layer.padding, layer.dilation)

    def extra_repr(self) -> str:
        kept = int(self.output_mask.sum()), int(self.input_mask.sum())
        return f"rank={len(self.down)}, keeps {kept[0]} of {len(self.up)} outputs and {kept[1]} of {self.down.shape[1]} inputs"


class Prototypes(nn.Module):
    """Blocks of rank one that all layers of a network share: `count` pairs of vectors of `block` numbers."""

    def __init__(self, count: int = 64, block: int = 32) -> None:
        super().__init__()
        count, block = checks.whole("count", count, low=1), checks.whole("block", block, low=1)
        self.rows = nn.Parameter(torch.randn(count, block) * block**-0.5)
        self.columns = nn.Parameter(torch.randn(count, block) * block**-0.5)


class SPLoPA(nn.Module):
    """A frozen linear layer plus a sum of prototypes, each placed on the grid of blocks with weights of its own (block-based adapter).

    The weight is W + sum over p of kron(places_p, rows_p columns_p^T), zero in the blocks that `block_mask` (bool, True stays)
    leaves out. The bias, a copy, is trained too. A task stores `count` numbers a kept block and the bias; the prototypes are shared.
    `places` begins at zero, so the layer begins as it was. Raises TypeError for other layers, other prototypes and those of another
    dtype, ValueError for hooks, and where blocks do not tile the weight.
    """

    block_mask: Tensor

    def __init__(self, layer: nn.Linear, prototypes: Prototypes) -> None:
        super().__init__()
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer must be a linear layer, got {type(layer).__name__}")
        if not isinstance(prototypes, Prototypes):
            raise TypeError(f"prototypes must be Prototypes, got {type(prototypes).__name__}")
        _hookless(layer)
        checks.together(layer=layer.weight, prototypes=prototypes.rows)
        block = prototypes.rows.shape[1]
        outputs, inputs = layer.weight.shape
        if outputs % block or inputs % block:
            raise ValueError(f"blocks of {block} must tile the weight, got ({outputs}, {inputs})")
        self.layer = copy.deepcopy(layer)
        self.layer.weight.requires_grad_(False)
        self.prototypes = prototypes
        grid = (outputs // block, inputs // block)
        self.places = nn.Parameter(layer.weight.new_zeros(len(prototypes.rows), *grid))
        self.register_buffer("block_mask", torch.ones(grid, dtype=torch.bool, device=layer.weight.device))

    def prune(self, blocks: Tensor) -> None:
        """Say which blocks of the grid stay: a bool mask, True stays. Raises TypeError and ValueError for another mask."""
        self.block_mask.copy_(checks.tensor("blocks", blocks, shape=tuple(self.block_mask.shape), dtype="bool"))

    def merged_weight(self) -> Tensor:
        """The weight of this task, zero in the blocks that are pruned."""
        term = torch.einsum("poi,pa,pb->oaib", self.places, self.prototypes.rows, self.prototypes.columns)
        block = term.shape[1]
        mask = self.block_mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        return (self.layer.weight + term.reshape(self.layer.weight.shape)) * mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight(), self.layer.bias)

    @property
    def learned(self) -> int:
        """How many numbers a task stores in this layer."""
        bias: Tensor | None = self.layer.bias
        return len(self.places) * int(self.block_mask.sum()) + (0 if bias is None else bias.numel())


def adapt(model: nn.Sequential, rank: int) -> nn.Sequential:
    """A copy of a plain chain of layers with SPLoRA on every linear layer and convolution; what else has parameters is frozen.

    Raises TypeError for other than a chain, ValueError for layers within its parts, which would be missed.
    """
    if type(model) is not nn.Sequential:
        raise TypeError(f"model must be an nn.Sequential, got {type(model).__name__}: put SPLoRA on its layers by hand")
    parts: list[nn.Module] = []
    for name, part in model.named_children():
        if type(part) in KINDS:
            parts.append(SPLoRA(part, rank))
            continue
        if missed := [inner for inner, module in part.named_modules(prefix=name) if isinstance(module, KINDS)]:
            raise ValueError(
                f"model must be a chain of layers, got one within a part: {missed[0]}; put SPLoRA on it by hand"
            )
        parts.append(copy.deepcopy(part).requires_grad_(False))
    return nn.Sequential(*parts)


def prune_chain(model: nn.Sequential, masks: Sequence[Tensor]) -> None:
    """Prune the outputs of every adapter of a chain but the last, and the inputs of the one behind it: one bool mask each.

    Between two adapters may stand activations and dropouts, and pools behind convolutions: what acts on each channel by itself and
    learns nothing. Raises ValueError, before anything is pruned, for a chain without adapters, another number of masks, and other
    modules between.
    """
    places = [i for i, part in enumerate(model) if isinstance(part, SPLoRA)]
    adapters = [part for part in model if isinstance(part, SPLoRA)]
    if not adapters:
        raise ValueError("model must have adapters (`adapt`), got none")
    if len(masks) != len(adapters) - 1:
        raise ValueError(f"masks must be one for every adapter but the last, {len(adapters) - 1}, got {len(masks)}")
    convolved = False
    for part in list(model)[places[0] : places[-1]]:
        if isinstance(part, SPLoRA):
            convolved = not isinstance(part.layer, nn.Linear)
        elif type(part) not in EACH and not (convolved and type(part) in POOLS):
            raise ValueError(f"model must have activations only between adapters, got {type(part).__name__}")
    for i, mask in enumerate(masks):
        checks.tensor(f"masks[{i}]", mask, shape=tuple(adapters[i].output_mask.shape), dtype="bool")
        if not bool(mask.any()):
            raise ValueError(f"masks[{i}] must leave a channel, got a mask of False only")
    for i, mask in enumerate(masks):
        adapters[i].prune(outputs=mask)
        adapters[i + 1].prune(inputs=mask)


def pruned(model: nn.Sequential) -> nn.Sequential:
    """The chain with plain layers of the kept channels in the place of its adapters, in evaluation mode."""
    return nn.Sequential(*(p.pruned_layer() if isinstance(p, SPLoRA) else copy.deepcopy(p) for p in model)).eval()


def _hookless(layer: nn.Module) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError(f"layer must have no forward hooks, got some on {type(layer).__name__}")
