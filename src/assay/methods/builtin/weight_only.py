"""Weight-only quantisation: linear layers whose weights are kept as 4- or 8-bit codes with a scale per 32 inputs.

Decoding one token reads every weight once and does next to nothing with it, so its time is the bytes of the weights: int4 with a
scale and a minimum per 32 weights takes 5 bits a weight, int8 8.5, bfloat16 16. The products run on the codes themselves: inputs
are quantised on the fly to int8 with one scale per 32 values, so that the processor's byte dot product serves.

When NOT to use it: where the processor lacks a byte dot product (VNNI) prompts get slower, not faster; and 4 bits cost quality on
most models. The bundled SmolLM2 is an exception worth knowing: its file stores 4-bit codes with a scale and a minimum per 32
inputs, the very grid used here, so its weights come through int4 unchanged and only the rounding of the inputs is lost. Its good
figures at 4 bits say nothing about a model whose weights were never on such a grid: measure that one. The projection onto the
vocabulary is best kept at 8 bits; at 4 it costs this model several per cent of perplexity.

The format, the search and the kernels are our choice; the grid is the one of llama.cpp's Q4_1 and Q8_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.measure.cost import register_macs
from assay.methods.core import kernels
from assay.methods.core.layers.surgery import page_out
from assay.methods.transform import Effect, Fit, TuneContext

GROUP = 32
PANEL = 32
ROUNDED, EXACT = (
    1e-5,
    1e-12,
)  # relative squared error below which no better grid is looked for, for bfloat16 values and others
KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}


def quantize_groups(
    weight: Tensor, bits: int, group: int = GROUP, *, asymmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and minimum of each group of `group` consecutive inputs: weight ~ code * scale + minimum.

    `weight` is (out, in), finite, `in` a multiple of `group`; `bits` 2 to 8. Returns codes uint8 (out, in) in 0..2^bits - 1, and
    scale and minimum float16 (out, in / group). With `asymmetric=False` the minimum is -2^(bits-1) * scale, so that a code stands
    for (code - 2^(bits-1)) * scale.

    Our choice of search: the range of the group cut into 2^bits - 1 steps, and (below 8 bits) ranges narrowed by up to a quarter,
    each refitted by least squares to the codes it gives; the one with the smallest squared error wins. Weights that lie on such a
    grid already (float16 scale and minimum) come back exactly, also when a group does not use all codes; after rounding to
    bfloat16 they come back to within that rounding.

    Raises ValueError for a shape or bit width that does not fit, for weights that are not finite or beyond float16.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix (out, in), got {tuple(weight.shape)} {weight.dtype}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group < 1 or weight.shape[1] % group:
        raise ValueError(f"group must divide the {weight.shape[1]} inputs of the weight, got {group}")
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, got inf or NaN")
    if weight.numel() and float(weight.abs().max()) > 60000:
        raise ValueError(f"weight must fit float16 scales (at most 60000), got {float(weight.abs().max()):g}")
    rows, width = weight.shape
    if weight.device.type == "cpu" and group % 16 == 0 and kernels.load("llama_decode"):
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.assay.quantize_groups(
            weight.float().contiguous(), bits, group, asymmetric
        )
        return found
    values = weight.float().reshape(-1, group)
    parts = [_quantize(chunk, bits, asymmetric) for chunk in torch.split(values, max(1, 2**21 // group))]
    codes, scale, minimum = (torch.cat(column) for column in zip(*parts, strict=True))
    return codes.view(rows, width), scale.view(rows, -1), minimum.view(rows, -1)


def _quantize(w: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if asymmetric:
        first = [((high - low) / levels, low)]
        narrow = [((high - low) * f / levels, low + (high - low) * (1 - f) / 2) for f in (0.95, 0.9, 0.85, 0.8, 0.75)]
    else:
        extreme = torch.where(high > -low, high, low)
        scales = [extreme.abs() / (half - 1), -extreme / half]
        first = [(s, -half * s) for s in scales]
        narrow = [
            (extreme.abs() * f / (half - 1), -half * extreme.abs() * f / (half - 1)) for f in (0.95, 0.9, 0.85, 0.8)
        ]
    best = _fit(w, first, levels, half, asymmetric)
    if bits < 8:
        enough = torch.where((w.bfloat16().float() == w).all(1), ROUNDED, EXACT)
        lossy = (best[3] > enough * w.square().sum(1)).nonzero().squeeze(1)
        if len(lossy):
            rest = w[lossy]
            found = _fit(rest, [(s[lossy], m[lossy]) for s, m in first + narrow], levels, half, asymmetric)
            _take(best, lossy, found)
            # few distinct values: perhaps a grid of which not all codes are used
            few = lossy[(rest.sort(1).values.diff(dim=1) != 0).sum(1) < levels]
            if asymmetric and len(few):
                span, least = high[few] - low[few], low[few]
                grids = [
                    (span / n, least - span / n * first) for n in range(1, levels) for first in range(levels - n + 1)
                ]
                _take(best, few, _fit(w[few], grids, levels, half, asymmetric))
    return best[0], best[1], best[2]


def _take(best: list[Tensor], rows: Tensor, found: list[Tensor]) -> None:
    """Put `found` in the places `rows` of `best` where its error is smaller."""
    better = found[3] < best[3][rows]
    for whole, part in zip(best, found, strict=True):
        whole[rows[better]] = part[better]


def _fit(w: Tensor, candidates: list[tuple[Tensor, Tensor]], levels: int, half: int, asymmetric: bool) -> list[Tensor]:
    """[codes, scale, minimum, squared error] of the best candidate per row, each also tried after a least-squares refit."""
    best: list[Tensor] = []

    def consider(scale: Tensor, minimum: Tensor) -> Tensor:
        nonlocal best
        scale = scale.half().float()
        minimum = minimum.half().float() if asymmetric else -half * scale
        steps = torch.where(scale == 0, torch.zeros_like(w), (w - minimum) / torch.where(scale == 0, 1.0, scale))
        codes = steps.round_().clamp_(0, levels)
        error = (codes * scale + minimum - w).square().sum(1)
        new = [codes.to(torch.uint8), scale.squeeze(1).half(), minimum.squeeze(1).half(), error]
        if not best:
            best = new
        else:
            _take(best, torch.arange(len(w)), new)
        return codes

    for scale, minimum in candidates:
        codes = consider(scale, minimum)
        if asymmetric:
            mean_code, mean = codes.mean(1, keepdim=True), w.mean(1, keepdim=True)
            spread = (codes - mean_code).square().sum(1, keepdim=True)
            slope = ((codes - mean_code) * (w - mean)).sum(1, keepdim=True) / spread.clamp_min(1e-30)
            consider(torch.where(spread > 0, slope, 0.0), torch.where(spread > 0, mean - slope * mean_code, mean))
        else:
            signed = codes - half
            power = signed.square().sum(1, keepdim=True)
            consider(torch.where(power > 0, (signed * w).sum(1, keepdim=True) / power.clamp_min(1e-30), 0.0), minimum)
    return best


def dequantize_groups(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The float32 weights (out, in) that codes (out, in), scale and minimum (out, in / group) stand for."""
    rows, width = codes.shape
    grouped = codes.view(rows, scale.shape[1], -1).float()
    return (grouped * scale.float()[..., None] + minimum.float()[..., None]).view(rows, width)


def quantize_inputs(x: Tensor) -> Tensor:
    """What the integer kernels make of their inputs (..., in): int8 with one scale per 32 values, given back as float32."""
    grouped = x.float().reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    largest = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / torch.where(largest > 0, largest, 1.0), 0.0)
    return ((grouped * inverse).round() * (largest / 127.0)).reshape(x.shape)


# ---- packing: the order in which the kernels read weights; described in csrc/llama_decode.cpp ---------------------------------


def pack(weight: Tensor, kind: str) -> Tensor:
    """`weight` (out, in) as the kernels read it: uint8 (panels of 32 outputs, bytes). `kind` is fp32, bf16, int8 or int4.

    Raises ValueError for an unknown kind, or when `in` is no multiple of 32 (int8, int4) or 2 (bf16).
    """
    _check_kind(kind, weight.shape[1])
    if kind in ("int8", "int4"):
        return pack_codes(*quantize_groups(weight, int(kind[3:]), GROUP, asymmetric=kind == "int4"), kind)
    weight = _padded(weight.detach())
    panels = weight.shape[0] // PANEL
    if kind == "fp32":
        return weight.float().view(panels, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint8).view(panels, -1)
    pairs = weight.to(torch.bfloat16).view(panels, PANEL, -1, 2).transpose(1, 2)
    return pairs.contiguous().view(torch.uint8).view(panels, -1)


def pack_codes(codes: Tensor, scale: Tensor, minimum: Tensor, kind: str) -> Tensor:
    """The packed form of what `quantize_groups` gave with group 32: asymmetric 4 bits (int4), symmetric 8 bits (int8)."""
    codes, scale, minimum = _padded(codes), _padded(scale), _padded(minimum)
    panels, groups = codes.shape[0] // PANEL, scale.shape[1]
    # (panel, half, output, group, quad, 4) -> (panel, group, quad, half, output, 4)
    quads = codes.view(panels, 2, 16, groups, 8, 4).permute(0, 3, 4, 1, 2, 5)
    if kind == "int4":
        body = quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)
        tails = [scale, minimum]
    else:
        body = quads
        tails = [scale]
    columns = [body.reshape(panels, groups, -1)]
    for tail in tails:
        columns.append(tail.view(panels, PANEL, groups).transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat(columns, 2).view(panels, -1).contiguous()


def unpack(packed: Tensor, kind: str, out_features: int, in_features: int) -> Tensor:
    """The float32 weights (out, in) of a packed matrix."""
    panels = packed.shape[0]
    if kind == "fp32":
        dense = packed.view(torch.float32).view(panels, in_features, PANEL).transpose(1, 2)
        return dense.reshape(-1, in_features)[:out_features].contiguous()
    if kind == "bf16":
        pairs = packed.view(torch.bfloat16).view(panels, in_features // 2, PANEL, 2).transpose(1, 2)
        return pairs.reshape(-1, in_features)[:out_features].float()
    groups = in_features // GROUP
    size = 512 if kind == "int4" else 1024
    blocks = packed.view(panels, groups, -1)
    body = blocks[:, :, :size]
    if kind == "int4":
        body = body.view(panels, groups, 8, 1, 16, 4)
        quads = torch.cat([body & 15, body >> 4], 3)
    else:
        quads = body.view(panels, groups, 8, 2, 16, 4)
    codes = quads.permute(0, 3, 4, 1, 2, 5).reshape(panels * PANEL, in_features)
    tails = blocks[:, :, size:].contiguous().view(torch.float16).view(panels, groups, -1, PANEL)
    scale, *rest = (tail.transpose(1, 2).reshape(-1, groups) for tail in tails.unbind(2))
    minimum = rest[0] if rest else -128 * scale.float()
    return dequantize_groups(codes, scale, minimum)[:out_features].contiguous()


def packed_bytes(kind: str, out_features: int, in_features: int) -> int:
    """Bytes of a packed matrix, the padding to whole panels included."""
    row = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 2 / GROUP, "int4": 0.5 + 4 / GROUP}[kind] * in_features
    return round(-(-out_features // PANEL) * PANEL * row)


def _padded(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL)).contiguous()


def _check_kind(kind: str, width: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    step = {"fp32": 1, "bf16": 2, "int8": GROUP, "int4": GROUP}[kind]
    if width % step:
        raise ValueError(f"{kind} weights need a multiple of {step} inputs, got {width}")


# ---- the layer -------------------------------------------------------------------------------------------------------------------


class WeightOnlyLinear(nn.Module):
    """A linear layer (in -> out) on packed codes: y = quantised(x) @ dequantised(W)^T + bias, in the dtype of x.

    `bits` is 4 (asymmetric) or 8 (symmetric), both with groups of 32 inputs. Takes any leading shape. Where x needs a gradient
    the inputs are not rounded and the weights are expanded, so that gradients reach x (never the weights). Without the compiled
    kernel the same arithmetic runs in torch on expanded weights: right, but slower than an ordinary layer.
    """

    packed: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool = False) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        self.kind = f"int{bits}"
        _check_kind(self.kind, in_features)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        panels = -(-out_features // PANEL)
        size = packed_bytes(self.kind, out_features, in_features)
        self.register_buffer("packed", torch.zeros(panels, size // panels, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> WeightOnlyLinear:
        """The quantised form of an `nn.Linear`; its bias is shared, its weight is not kept."""
        layer = cls.from_packed(pack(linear.weight, f"int{bits}"), linear.in_features, linear.out_features, bits)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_packed(cls, packed: Tensor, in_features: int, out_features: int, bits: int) -> WeightOnlyLinear:
        """A layer on codes that are packed already (`pack`); the storage is shared. It has no bias."""
        with torch.device("meta"):
            layer = cls(in_features, out_features, bits)
        if packed.dtype != torch.uint8 or packed.shape != layer.packed.shape:
            raise ValueError(
                f"packed must be uint8 {tuple(layer.packed.shape)}, got {packed.dtype} {tuple(packed.shape)}"
            )
        layer.packed = packed
        return layer

    def dequantize(self) -> Tensor:
        """The float32 weights (out, in) this layer stands for."""
        return unpack(self.packed, self.kind, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} values in its last dimension, got {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        if x.device.type == "cpu" and kernels.load("llama_decode"):
            rows = x.reshape(-1, self.in_features)
            if rows.dtype not in (torch.float32, torch.bfloat16):
                rows = rows.float()
            y: Tensor = torch.ops.assay.weight_only_linear(rows, self.packed, KINDS[self.kind], self.out_features)
            y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        else:
            y = F.linear(quantize_inputs(x), self.dequantize()).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={GROUP}"


# ---- the transform ---------------------------------------------------------------------------------------------------------------


class WeightOnly:
    """Replaces every `nn.Linear` with a multiple of 32 inputs by a `WeightOnlyLinear`.

    Configuration: `bits` 4 or 8; `head_bits` 4, 8 or None for the output projection onto the vocabulary. Where that one shares
    its weights with the input embedding the embedding stays as it is, so quantising the head reads fewer bytes per token but adds
    to the memory: None suits the goal `memory`.
    """

    name = "weight_only"
    slot = "linear"
    goals = frozenset({"decode", "memory"})
    exact = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if not _eligible(model):
            return Fit(False, "no nn.Linear with a multiple of 32 inputs")
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return Fit(False, "the packed kernels run on the CPU only")
        if not kernels.load("llama_decode"):
            return Fit(False, "the packed kernels need a C++ compiler (g++) on x86-64")
        size = next(model.parameters()).element_size()
        return Fit(True, effects=(Effect("linear", bytes=0.625 / size, dtype="int8"),))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        head = None if context.goal == "memory" and _tied(model) else 8
        return [{"bits": 4, "head_bits": head}, {"bits": 8, "head_bits": head}]

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        bits, head_bits = config.get("bits", 4), config.get("head_bits", 8)
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits!r}")
        if head_bits not in (4, 8, None):
            raise ValueError(f"head_bits must be 4, 8 or None, got {head_bits!r}")
        if unknown := set(config) - {"bits", "head_bits"}:
            raise ValueError(f"unknown configuration {sorted(unknown)}; allowed: bits, head_bits")
        found = _eligible(model)
        if not found:
            raise ValueError("model has no nn.Linear with a multiple of 32 inputs")
        head = _head(model)
        made: dict[int, WeightOnlyLinear] = {}
        for parent, name, linear in found:
            width = head_bits if linear is head else bits
            if width is not None:
                layer = made.get(id(linear)) or WeightOnlyLinear.from_linear(linear, width)
                made[id(linear)] = layer
                setattr(parent, name, layer)
                page_out(linear.weight)
        return model


def _eligible(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.in_features % GROUP == 0
    ]


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _tied(model: nn.Module) -> bool:
    head, getter = _head(model), getattr(model, "get_input_embeddings", None)
    return head is not None and getter is not None and getattr(head, "weight", None) is getter().weight


def _macs(x: Tensor, *_: Any, out: Tensor) -> int:
    return x.numel() * out.shape[-1]


register_macs("assay::weight_only_linear", _macs, "linear")
transform = WeightOnly()
