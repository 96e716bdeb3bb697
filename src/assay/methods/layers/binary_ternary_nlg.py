"""Sequence-to-sequence transformers with weights of one or two bits that still generate (TBT, arXiv 2306.01841).

Weights take levels found from statistics alone, with one scale per row: -a, 0, a with a = 4/3 mean|w|, or -a, a with a = mean|w|.
For weights uniform on an interval, each of the three levels then holds a third. Activations of one or two bits have a learnt scale
per tensor ("elastic"), with the gradient of learned step sizes; those of 8 bits follow the tensor's range, cut at 2.5. All products
of encoder and decoder are low-bit: the projections, the scores q k and the sums p v. Positions, norms, biases and softmax stay as
they are. The student starts as its finetuned teacher and learns from its logits, hidden states and attention maps. W-E-A counts
the bits of weights, embeddings and activations: 2-2-8, 1-1-1.

`quantize_` does this to BART-like models of transformers, `calibrate_` sets the elastic scales (the official code does so within
the first forward pass, which breaks loading), `freeze_` fixes what is otherwise taken from each batch, `pack_` converts to packed
weights. `our choice`: sign(0) is 1, since binary weights would otherwise have three levels; the input of the head has 8 bits; scaled
queries are quantised. Packed models compute projections with integers; the products within attention stay fake-quantised.

When NOT to use it: without training (rounding alone breaks a model), or for speed: operations counted in bits assume processors
that do not exist. Without `freeze_`, a token's result depends on what else is in its batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.layers.packed import Kind, PackedLinear, packed_bytes, unpack
from assay.methods.core.layers.surgery import output_layer, output_name, swap
from assay.paths import atomic_file

Method = Literal["tbt", "baseline"]
ATTENTION = "assay_low_bit"
SMALLEST = 1e-5
CLIP = 2.5
HEAD_BITS = 8
COMPUTED = "~"  # before the names of buffers that a state dict leaves out
KIND: dict[int, Kind] = {2: "ternary", 1: "binary"}


# ---- weights ---------------------------------------------------------------------------------------------------------------------


def weight_codes(weight: Tensor, bits: int, method: Method = "tbt") -> tuple[Tensor, Tensor]:
    """Codes (..., in) of -1, 0, 1 (2 bits) or -1, 1 (1 bit), and a scale a row (..., 1): weight ~ codes * scale.

    `method="baseline"` is TWN at 2 bits (0 below 0.7 mean|w|, scale the mean of the others) and BWN at 1 bit, which is the same
    as the paper's. Computed in float32 at least, whatever the weight: in float16, rows of weights under 6e-5 would come out as 0.
    Raises ValueError for other bits or methods and an empty weight, TypeError for whole or complex numbers.

    >>> codes, scale = weight_codes(torch.tensor([[0.9, -0.1, -1.1, 0.2]]), 2)
    >>> codes.tolist(), round(scale.item(), 3)
    ([[1.0, -0.0, -1.0, 0.0]], 0.767)
    """
    checks.choice("bits", bits, tuple(KIND))
    checks.choice("method", method, get_args(Method))
    checks.tensor("weight", weight)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    mean = weight.abs().mean(-1, keepdim=True)
    if bits == 1:
        return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype), mean
    if method == "tbt":
        scale = 4 / 3 * mean
        floor = torch.finfo(weight.dtype).tiny  # a row of zeros (padding) stays one
        return (weight / scale.clamp_min(floor)).clamp(-1, 1).round(), scale
    kept = weight.abs() > 0.7 * mean
    scale = (weight.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
    return weight.sign() * kept, scale


def low_bit(weight: Tensor, bits: int, method: Method = "tbt") -> Tensor:
    """The weight on its levels, row by row, with the straight-through gradient 1 everywhere. 32 bits leave it alone."""
    if bits == 32:
        return weight
    codes, scale = weight_codes(weight.detach(), bits, method)
    return (codes * scale).to(weight.dtype) + (weight - weight.detach())


# ---- activations -----------------------------------------------------------------------------------------------------------------


class _Elastic(torch.autograd.Function):
    """a * round(clip(x / a, low, high)), or a * sign(x), with the gradients of learned step sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, sign: bool) -> Tensor:
        a = scale.detach().to(x.dtype).clamp_min(SMALLEST)
        ctx.save_for_backward(x, scale)
        ctx.settings = low, high, sign
        return a * _levels(x / a, low, high, sign)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        low, high, sign = ctx.settings
        v = x / scale.to(x.dtype).clamp_min(SMALLEST)
        levels = _levels(v, low, high, sign)
        inside = (v >= low) & (v <= high)
        slope = levels if sign else torch.where(inside, levels - v, levels)
        g = 1 / math.sqrt(max(1, x.numel()) * high)
        return grad * inside, (g * (grad * slope).sum()).to(scale.dtype).view_as(scale), None, None, None


def _levels(v: Tensor, low: int, high: int, sign: bool) -> Tensor:
    if not sign:
        return v.clamp(low, high).round()
    return torch.where(v >= 0, 1.0, torch.where(v < 0, -1.0, v)).to(v.dtype)  # NaN stays


def _told(step: Tensor, x: Tensor) -> Tensor:
    """`step`, NaN for the tokens of x that hold NaN: integer codes cannot say it."""
    lost = x.isnan().any(-1, keepdim=True)
    return torch.where(lost, torch.nan, step) if bool(lost.any()) else step


class ActivationQuantizer(nn.Module):
    """Base class: what a quantiser takes from a tensor, fixed by `freeze_` or found anew in each. Range: (smallest, largest)."""

    range: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("range", torch.full((2,), torch.nan))
        self.observing = False

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of this tensor, or those fixed."""
        if self.observing:
            seen = torch.stack(list(x.detach().float().aminmax()))
            old = torch.where(self.range.isnan(), seen, self.range)
            self.range = torch.stack([torch.minimum(old[0], seen[0]), torch.maximum(old[1], seen[1])])
        elif not bool(self.range.isnan().any()):
            return self.range[0].to(x.dtype), self.range[1].to(x.dtype)
        low, high = x.detach().aminmax()
        return low, high

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes int8, step, shift): the quantised x is codes * step + shift (no shift: None). NaN makes its token's step NaN."""
        raise NotImplementedError


class ElasticQuantizer(ActivationQuantizer):
    """1 or 2 bits with a learnt scale; any shape. Signed: -1, 0, 1 or -1, 1 times the scale; else 0, 1, 2 (above the smallest
    value of the tensor) or 0, 1.

    The scale is learned with the gradient factor 1 / sqrt(numel * highest level). Raises ValueError before calibration.
    """

    calibrated: Tensor

    def __init__(self, bits: int, *, signed: bool = True):
        super().__init__()
        checks.choice("bits", bits, (1, 2))
        checks.flag("signed", signed)
        self.bits, self.signed = bits, signed
        self.low, self.high = (-1, 1) if signed else (0, bits)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calibrated", torch.tensor(False))
        self.calibrating = False

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """The first scale: 2 mean|x| / sqrt(Q), unsigned 4 mean|x| / sqrt(Q).

        Q is the highest level; for unsigned 2 bits the official code takes 3 here, though its levels end at 2: kept.
        Raises ValueError for NaN or infinity in x.
        """
        checks.tensor("x", x, finite=True)
        q = 3 if (self.bits, self.signed) == (2, False) else self.high
        self.scale.fill_((2 if self.signed else 4) * float(x.abs().float().mean()) / math.sqrt(q))
        self.scale.clamp_(min=SMALLEST)
        self.calibrated.fill_(True)

    def _shift(self, x: Tensor) -> Tensor | None:
        return self.bounds(x)[0] if not self.signed and self.bits == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.calibrate(x)
        if not bool(self.calibrated):
            raise ValueError("the scale of an ElasticQuantizer is not set: run calibrate_(model, inputs) first")
        wide = x if x.dtype == torch.float64 else x.float()
        shift = self._shift(wide)
        sign = self.signed and self.bits == 1
        moved = wide if shift is None else wide - shift
        y = cast(Tensor, _Elastic.apply(moved, self.scale, self.low, self.high, sign))
        return (y if shift is None else y + shift).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = x.detach().float()
        shift = self._shift(x)
        step = self.scale.detach().float().clamp_min(SMALLEST)
        moved = x if shift is None else x - shift
        levels = _levels(moved / step, self.low, self.high, self.signed and self.bits == 1)
        return levels.to(torch.int8), _told(step, x), shift

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class RangeQuantizer(ActivationQuantizer):
    """8 bits over the range of the tensor, which is first cut at -2.5 and 2.5 (`clip`; None: nowhere); no gradient beyond the cut.

    Signed: symmetric, step = max|x| / 127. Unsigned: from the smallest to the largest value in 255 steps.
    """

    def __init__(self, *, signed: bool = True, clip: float | None = CLIP):
        super().__init__()
        clip = None if clip is None else checks.number("clip", clip, above=0)
        self.signed, self.clip = signed, clip

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x within its range, the step, and the value of code 0."""
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        low, high = self.bounds(x)
        if self.signed:
            peak = torch.maximum(-low, high).clamp_min(SMALLEST)
            return x.clamp(-peak, peak), peak / 127, torch.zeros_like(peak)
        return x.clamp(low, high), (high - low).clamp_min(SMALLEST) / 255, low

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inside, step, zero = self._grid(wide)
        rounded = ((inside.detach() - zero) / step).round() * step + zero
        return (rounded + (inside - inside.detach())).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        inside, step, zero = self._grid(x.detach().float())
        codes, step = ((inside - zero) / step).round(), _told(step, inside)
        if self.signed:
            return codes.to(torch.int8), step, None
        return (codes - 128).to(torch.int8), step, zero + 128 * step

    def extra_repr(self) -> str:
        return f"signed={self.signed}, clip={self.clip}"


def make_quantizer(bits: int, *, signed: bool = True) -> nn.Module:
    """Elastic for 1 and 2 bits, by range for 8, none (`nn.Identity`) for 32. Raises ValueError for other bits."""
    checks.choice("bits", bits, (1, 2, 8, 32))
    if bits == 32:
        return nn.Identity()
    if bits == 8:
        return RangeQuantizer(signed=signed)
    return ElasticQuantizer(bits, signed=signed)


# ---- layers ----------------------------------------------------------------------------------------------------------------------


class LowBitLinear(nn.Linear):
    """A linear layer with low-bit weights and quantised inputs; trains the float weight behind them, shared with `linear`."""

    def __init__(self, linear: nn.Linear, bits: int, inputs: nn.Module, method: Method = "tbt"):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.inputs, self.method = bits, inputs, method

    def reset_parameters(self) -> None:
        """Nothing: the weights are the teacher's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), low_bit(self.weight, self.bits, self.method), self.bias)


class LowBitEmbedding(nn.Embedding):
    """An embedding whose rows are low-bit; only the rows asked for are rounded. `embed_scale` multiplies what is read."""

    def __init__(self, embedding: nn.Embedding, bits: int, method: Method = "tbt"):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight, self.bits, self.method = embedding.weight, bits, method
        self.embed_scale = float(getattr(embedding, "embed_scale", 1.0))

    def reset_parameters(self) -> None:
        """Nothing: the weights are the teacher's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Embedding's name)
        return low_bit(super().forward(input), self.bits, self.method) * self.embed_scale


class PackedLowBitLinear(nn.Module):
    """The layer for inference: integer codes of the inputs times packed weights. No gradient."""

    def __init__(self, inputs: ActivationQuantizer, linear: PackedLinear):
        super().__init__()
        self.inputs, self.linear = inputs, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear.on_codes(*self.inputs.codes(x)).to(x.dtype)


class PackedEmbedding(nn.Module):
    """Packed rows (n, bytes) with a scale each (n,); rows are unpacked as they are read."""

    packed: Tensor
    scale: Tensor

    def __init__(self, packed: Tensor, scale: Tensor, kind: Kind, dim: int, embed_scale: float = 1.0):
        super().__init__()
        self.kind: Kind = kind
        self.embedding_dim, self.embed_scale = dim, embed_scale
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        codes = unpack(self.packed[ids], self.kind, self.embedding_dim)
        return codes.to(self.scale.dtype) * self.scale[ids][..., None] * self.embed_scale


# ---- attention -------------------------------------------------------------------------------------------------------------------


def low_bit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention whose q (scaled), k, v and probabilities pass `module.low_bit`, in the signature transformers expects.

    The probabilities returned are those before quantisation: what distillation compares.
    """
    quantizers: Any = getattr(module, "low_bit", None) or nn.ModuleDict()
    rounded = {name: quantizers[name] if name in quantizers else nn.Identity() for name in ("q", "k", "v", "p")}
    query = rounded["q"](query * (query.shape[-1] ** -0.5 if scaling is None else scaling))
    scores = query @ rounded["k"](key).transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = scores.softmax(-1)
    dropped = F.dropout(rounded["p"](shares), dropout, module.training)
    return (dropped @ rounded["v"](value)).transpose(1, 2).contiguous(), shares


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, low_bit_attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)


# ---- whole models ----------------------------------------------------------------------------------------------------------------

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _targets(model: nn.Module) -> tuple[dict[str, bool], list[nn.Module], dict[str, nn.Embedding]]:
    """Names of the linear layers (True: signed input), the attention modules, and the names of the shared embedding."""
    linears: dict[str, bool] = {}
    attentions = []
    for name, module in model.named_modules():
        if all(type(getattr(module, p, None)) is nn.Linear for p in PROJECTIONS):
            attentions.append(module)
            linears |= {f"{name}.{p}": True for p in PROJECTIONS}
        if all(type(getattr(module, p, None)) is nn.Linear for p in ("fc1", "fc2")):
            linears |= {f"{name}.fc1": True, f"{name}.fc2": False}
    head = output_layer(model)
    embeddings: dict[str, nn.Embedding] = {}
    if isinstance(head, nn.Linear):
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Embedding) and module.weight is head.weight:
                embeddings[name] = module
    if not attentions or not embeddings or not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            "model must be like BartForConditionalGeneration (attention with q_proj, k_proj, v_proj and out_proj, "
            f"layers with fc1 and fc2, a head tied to the embedding), got {type(model).__name__}"
        )
    return linears, attentions, embeddings


def quantize_(
    model: nn.Module, *, weights: int = 2, embeddings: int = 2, activations: int = 8, method: Method = "tbt"
) -> nn.Module:
    """Make the student, in place, of a finetuned BART-like model: W-E-A bits `weights`, `embeddings`, `activations`.

    Bits of weights are 1, 2 or 32, of activations 1, 2, 8 or 32. `method="baseline"` takes the weights of TWN and BWN. Call
    `calibrate_` next where activations have 1 or 2 bits. Raises ValueError for other bits or a model of another make.
    """
    checks.choice("weights", weights, (1, 2, 32))
    checks.choice("embeddings", embeddings, (1, 2, 32))
    checks.choice("activations", activations, (1, 2, 8, 32))
    checks.choice("method", method, get_args(Method))
    linears, attentions, tables = _targets(model)
    found = dict(model.named_modules(remove_duplicate=False))
    made: dict[str, nn.Module] = {
        name: LowBitLinear(cast(nn.Linear, found[name]), weights, make_quantizer(activations, signed=signed), method)
        for name, signed in linears.items()
    }
    made |= {name: LowBitEmbedding(table, embeddings, method) for name, table in tables.items()}
    inputs = make_quantizer(32 if activations == 32 else HEAD_BITS)
    head = cast(str, output_name(model))
    made[head] = LowBitLinear(cast(nn.Linear, found[head]), embeddings, inputs, method)
    _register()
    root: Any = model
    root.set_attn_implementation(ATTENTION)  # first: raises ValueError for models whose attention cannot be exchanged
    swap(model, made)
    for attention in attentions:
        attention.low_bit = nn.ModuleDict({name: make_quantizer(activations, signed=name != "p") for name in "qkvp"})
    root.config.low_bit = [weights, embeddings, activations]
    return model


@torch.no_grad()
def calibrate_(model: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """Set the scales of all elastic quantisers on one batch, in the order they come: later ones see what earlier ones rounded.

    `inputs` are keyword arguments of the model (input ids, mask, labels). Training mode is left as it was.
    """
    found = [m for m in model.modules() if isinstance(m, ElasticQuantizer)]
    with _eval(model):
        try:
            for quantizer in found:
                quantizer.calibrating = True
            model(**inputs)
        finally:
            for quantizer in found:
                quantizer.calibrating = False
    return model


@torch.no_grad()
def freeze_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> nn.Module:
    """Fix the ranges and shifts that are otherwise taken from each batch, to those seen over `batches`: for deployment.

    Afterwards a row's result no longer depends on what else is in the batch. Raises ValueError without any batch.
    """
    found = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    count = 0
    with _eval(model):
        try:
            for quantizer in found:
                quantizer.range.fill_(torch.nan)
                quantizer.observing = True
            for count, batch in enumerate(batches, 1):  # noqa: B007
                model(**batch)
        finally:
            for quantizer in found:
                quantizer.observing = False
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    return model


class _eval:
    """Evaluation mode within a `with` block."""

    def __init__(self, model: nn.Module):
        self.model, self.was = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was)


def pack_(model: nn.Module) -> nn.Module:
    """Replace the layers of a quantised model by packed ones, in place, for inference. Head and embedding share their bytes.

    Raises ValueError for a model that is not quantised, or with 32 bits anywhere.
    """
    layers: list[tuple[str, nn.Module]] = list(model.named_modules(remove_duplicate=False))
    found = {name: m for name, m in layers if isinstance(m, LowBitLinear | LowBitEmbedding)}
    if not found:
        raise ValueError("model has no low-bit layer to pack: run quantize_ first")
    if any(m.bits == 32 or isinstance(getattr(m, "inputs", None), nn.Identity) for m in found.values()):
        raise ValueError("packing needs low-bit weights, embeddings and activations, got 32 bits")
    made: dict[str, nn.Module] = {}
    table: PackedEmbedding | None = None
    head = found[cast(str, output_name(model))]
    packed_head = _packed_linear(cast(LowBitLinear, head))
    for name, layer in found.items():
        if isinstance(layer, LowBitEmbedding):
            if table is None:
                shared = packed_head.linear
                table = PackedEmbedding(
                    shared.packed, shared.scale, shared.kind, layer.embedding_dim, layer.embed_scale
                )
            made[name] = table
        else:
            made[name] = packed_head if layer is head else _packed_linear(layer)
    swap(model, made)
    return model.eval()


def _packed_linear(layer: LowBitLinear) -> PackedLowBitLinear:
    kind = KIND[layer.bits]
    if layer.weight.is_meta:  # only the shape, to load into
        linear = PackedLinear(layer.in_features, layer.out_features, kind, bias=layer.bias is not None)
    else:
        codes, scale = weight_codes(layer.weight.detach().float(), layer.bits, layer.method)
        linear = PackedLinear.from_codes(codes, scale, kind, bias=layer.bias)
    return PackedLowBitLinear(cast(ActivationQuantizer, layer.inputs), linear)


def packed_size(model: nn.Module, *, weights: int, embeddings: int) -> int:
    """Bytes a BART-like model takes packed at 1 or 2 bits, row scales included, by formula from its shapes (meta tensors do).

    Rows take ceil(in * bits / 8) bytes and 4 for the scale; everything else stays in float32. The state of the activation
    quantisers (at most 13 bytes each) is left out.
    """
    for name, value in (("weights", weights), ("embeddings", embeddings)):
        checks.choice(name, value, tuple(KIND))
    linears, _, tables = _targets(model)
    table = next(iter(tables.values())).weight
    sizes = [(KIND[embeddings], table)]
    sizes += [(KIND[weights], cast(nn.Linear, model.get_submodule(name)).weight) for name in linears]
    total = sum(packed_bytes(kind, len(weight), weight.shape[1], len(weight)) for kind, weight in sizes)
    small = {id(weight) for _, weight in sizes}
    rest = {id(t): t.numel() for t in [*model.parameters(), *model.buffers()] if id(t) not in small}
    return total + 4 * sum(rest.values())


def relative_operations(weights: int, activations: int) -> float:
    """Operations in bits, relative to 8 x 8: how the paper counts FLOPs (2-2-8: 0.25). No current processor runs at this rate.

    Raises ValueError for bits below 1.
    """
    weights, activations = checks.whole("weights", weights, low=1), checks.whole("activations", activations, low=1)
    return weights * activations / 64


def save_packed(model: nn.Module, path: Path | str) -> None:
    """Write a packed model as one safetensors file, shared tensors once, its configuration in the header.

    Raises ValueError for one not packed.
    """
    from safetensors.torch import save_file

    root: Any = model
    if not isinstance(output_layer(model), PackedLowBitLinear):
        raise ValueError("model must be packed (pack_) before it is saved packed")
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    tensors = {}
    for name, tensor in {**model.state_dict(), **_computed(model)}.items():
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        kept = first.setdefault(place, name) if tensor.numel() > 2 else name
        if kept == name:
            tensors[name] = tensor.contiguous()
        else:
            aliases[name] = kept
    header = {
        "config": json.dumps(root.config.to_dict()),
        "aliases": json.dumps(aliases),
        "class": type(model).__name__,
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_packed(path: Path | str) -> Any:
    """The model that `save_packed` wrote, ready to generate; float weights are never made.

    Raises ValueError for another file, or one that lacks a tensor of the model.
    """
    import transformers
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if not {"config", "aliases", "class"} <= set(header):
            raise ValueError(f"path must be a file written by save_packed, got {path}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    tensors |= {name: tensors[kept] for name, kept in json.loads(header["aliases"]).items()}
    config = json.loads(header["config"])
    architecture: Any = getattr(transformers, header["class"], None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise ValueError(f"path holds a model of the unknown class {header['class']!r}")
    with torch.device("meta"):
        model: Any = architecture(cast(Any, architecture).config_class(**config))
        weights, embeddings, activations = config["low_bit"]
        pack_(quantize_(model, weights=weights, embeddings=embeddings, activations=activations))
    for name in [name for name in tensors if name.startswith(COMPUTED)]:
        path, _, leaf = name.removeprefix(COMPUTED).rpartition(".")
        setattr(model.get_submodule(path), leaf, tensors.pop(name))
    model.load_state_dict(tensors, assign=True)
    if lost := [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]:
        raise ValueError(f"path lacks the tensor {lost[0]!r} of a {header['class']}, got {path}")
    return model.eval()


def _computed(model: nn.Module) -> dict[str, Tensor]:
    """Buffers outside the state dict, such as tables of positions, which nothing fills in for a model built without memory."""
    return {
        f"{COMPUTED}{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if getattr(module, name) is not None
    }


# ---- distillation ----------------------------------------------------------------------------------------------------------------


class DistillationLoss(nn.Module):
    """The student's loss: from its outputs and the teacher's (transformers seq2seq models) to one number.

    Task loss (the student's own, from labels) + soft cross-entropy of the logits + mean squared errors of all hidden states and
    of all attention maps (encoder, decoder, cross), summed over the layers; the four weights are 1 in the paper. Positions
    without a label or under the encoder's mask do not count. `variant="as_released"` counts padding too, and adds the error of
    the encoder's last state sample by sample, as the official code does by looping over it.
    """

    def __init__(
        self,
        *,
        task: float = 1.0,
        logits: float = 1.0,
        hidden: float = 1.0,
        attention: float = 1.0,
        variant: Literal["paper", "as_released"] = "paper",
    ):
        super().__init__()
        checks.choice("variant", variant, ("paper", "as_released"))
        given = {"task": task, "logits": logits, "hidden": hidden, "attention": attention}
        self.weights = {name: checks.number(name, weight, low=0) for name, weight in given.items()}
        self.variant = variant

    def forward(
        self, student: Any, teacher: Any, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        parts = self.parts(student, teacher, labels, attention_mask)
        return cast(Tensor, sum(self.weights[name] * part for name, part in parts.items()))

    def parts(
        self, student: Any, teacher: Any, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms by name, unweighted; those of weight 0 are left out. Raises ValueError for outputs that lack what they need."""
        found: dict[str, Tensor] = {}
        plain = self.variant == "paper"
        target = labels != -100 if plain and labels is not None else None
        source = attention_mask.bool() if plain and attention_mask is not None else None
        if self.weights["task"]:
            found["task"] = _needed(student, "loss", "labels given to the student")
        if self.weights["logits"]:
            shares = teacher.logits.detach().softmax(-1)
            found["logits"] = _mean(-(shares * student.logits.log_softmax(-1)).sum(-1), target)
        if self.weights["hidden"]:
            total = [
                _mean((s - t.detach()).square().mean(-1), mask)
                for field, mask in (("encoder_hidden_states", source), ("decoder_hidden_states", target))
                for s, t in _pairs(student, teacher, field, "output_hidden_states=True")
            ]
            if not plain:
                last = student.encoder_last_hidden_state - teacher.encoder_last_hidden_state.detach()
                total.append(last.square().flatten(1).mean(1).sum())
            found["hidden"] = torch.stack(total).sum()
        if self.weights["attention"]:
            fields = (("encoder_attentions", source), ("decoder_attentions", target), ("cross_attentions", target))
            total = [
                _mean((s - t.detach()).square().mean((1, 3)), mask)
                for field, mask in fields
                for s, t in _pairs(student, teacher, field, "output_attentions=True")
            ]
            found["attention"] = torch.stack(total).sum()
        return found


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (batch, tokens), over the tokens that count."""
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp_min(1)


def _needed(outputs: Any, field: str, how: str) -> Any:
    found = getattr(outputs, field, None)
    if found is None or isinstance(found, tuple) and (not found or found[0] is None):
        raise ValueError(f"outputs have no {field}: they need {how}")
    return found


def _pairs(student: Any, teacher: Any, field: str, how: str) -> Iterator[tuple[Tensor, Tensor]]:
    mine, theirs = _needed(student, field, how), _needed(teacher, field, how)
    if len(mine) != len(theirs):
        raise ValueError(f"student and teacher must have as many {field}, got {len(mine)} and {len(theirs)}")
    return zip(mine, theirs, strict=True)
