"""Packed low-bit weights: ternary at 2 bits (4 per byte) or in base 3 (5 per byte, 1.6 bits), binary at 1 bit, with float scales.

Shared by the rooms that train such weights (`mixers.matmul_free`, `layers.binary_ternary_nlg`): their integer codes go in, and
`PackedLinear` computes with 8-bit activations directly on the packed bytes. A weight of -1, 0 or 1 needs no multiplication. The
compiled kernel adds with the processor's byte dot product, which multiplies by 0, 1 and 2, because processors offer no other.

    y[t, n] = step[t] * scale[n] * sum_k codes_x[t, k] * codes_w[n, k] + bias[n]

The sums are integers and exact, so they equal those of a layer computed on the fake-quantised floats, on any machine.
The layout is `our choice`: digit j of byte b of a row belongs to input j * bytes + b (see csrc/lowbit.cpp).

When NOT to use it: for weights that were not trained for it. Rounding a trained model's weights to three values breaks it.

    >>> layer = PackedLinear.from_codes(torch.tensor([[1, -1, 0, 1], [0, 1, 1, 0]]), torch.tensor(0.5), kind="ternary")
    >>> layer(torch.tensor([[127.0, 0.0, 0.0, 127.0]]))
    tensor([[127.,   0.]])
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.measure.cost import register_macs
from assay.methods.core import kernels
from assay.methods.core.layers.stand_in import Casting, stand_in
from assay.methods.core.quantize.formats import DIGIT_FORMATS, FORMATS, find, pack_digits, unpack_digits

Kind = Literal["ternary", "base3", "binary"]
KINDS = DIGIT_FORMATS
SMALLEST = 1e-5  # of what a scale is found from


def packed_bytes(kind: Kind, out_features: int, in_features: int, scales: int = 1) -> int:
    """Bytes of a packed matrix with `scales` float32 scales: out * ceil(in / weights a byte) + 4 * scales."""
    return find(kind, KINDS).bytes(out_features, in_features) + 4 * (scales - out_features)


def pack(codes: Tensor, kind: Kind) -> Tensor:
    """Codes (out, in), -1, 0, 1 (ternary, base3) or -1, 1 (binary), as uint8 (out, ceil(in / weights a byte)).

    Raises ValueError for another shape or other values, TypeError for bools and complex numbers.

    >>> pack(torch.tensor([[1, -1, 0, 1]]), "ternary")  # digits 2, 0, 1, 2, the first the lowest
    tensor([[146]], dtype=torch.uint8)
    """
    kind_of: checks.Kind = "floating" if isinstance(codes, Tensor) and codes.is_floating_point() else "integer"
    checks.tensor("codes", codes, dtype=kind_of, empty=True)
    return pack_digits(codes, find(kind, KINDS).name)


def unpack(packed: Tensor, kind: Kind, in_features: int) -> Tensor:
    """The codes, int8 (out, in), of what `pack` gave. Also for stacks of rows (..., bytes)."""
    return unpack_digits(packed, find(kind, KINDS).name, in_features)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits per token: float (..., k) to codes int8 (..., k) and steps (..., 1), x ~ codes * step, step = max|x| / 127.

    Rounds half to even; max|x| counts as at least 1e-5. Steps are float32 (float64 for float64 input). NaN and infinity make their
    token's step such, and so its products. Raises TypeError for whole or complex numbers.
    """
    checks.tensor("x", x, shape=("...", "values"), empty=True)
    x = x if x.dtype == torch.float64 else x.float()
    peak = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * (127.0 / peak)).round().clamp(-128, 127).to(torch.int8), peak / 127.0


def product(codes: Tensor, packed: Tensor, kind: Kind) -> Tensor:
    """The integer product: activations int8 (m, in) with packed weights (out, bytes), int32 (m, out), exact.

    Raises ValueError for other shapes, and for activations of another dtype.
    """
    find(kind, KINDS)
    checks.tensor("codes", codes, dtype="any", empty=True)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 (m, in), got {codes.dtype} {tuple(codes.shape)}")
    if compiled(codes):
        kernels.ran("low-bit product", "kernel")
        found: Tensor = torch.ops.assay.lowbit_product(codes.contiguous(), packed, FORMATS[kind].id)
        return found
    kernels.ran("low-bit product", "torch")
    return product_reference(codes, packed, kind)


def product_reference(codes: Tensor, packed: Tensor, kind: Kind) -> Tensor:
    """The same on unpacked codes: the oracle of the tests, and what runs without a compiler."""
    weight = unpack(packed, kind, codes.shape[1])
    if codes.device.type == "cpu" and codes.numel():
        return torch._int_mm(codes.contiguous(), weight.T)
    return (codes.double() @ weight.double().T).int()


def compiled(x: Tensor) -> bool:
    """Whether the compiled operators serve for this tensor."""
    return x.device.type == "cpu" and kernels.load("lowbit")


class PackedLinear(Casting, nn.Module):
    """A linear layer on packed weights, for inference: (..., in) to (..., out) in the dtype of its input.

    Inputs are quantised to 8 bits per token on the fly; with `norm_eps` an RMSNorm with a learnt weight comes first, in the same
    pass. `scales` says whether the weights have one scale in all ("tensor") or one a row ("row"). Scales, norm and bias stay in
    float32 whatever the model is cast to. There is no gradient.

    Raises ValueError for an unknown kind or inputs of another width, TypeError for inputs of whole or complex numbers.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: Kind = "ternary",
        *,
        scales: Literal["tensor", "row"] = "row",
        bias: bool = False,
        norm_eps: float | None = None,
    ):
        super().__init__()
        find(kind, KINDS)
        self.in_features = checks.whole("in_features", in_features, low=1)
        self.out_features = checks.whole("out_features", out_features, low=1)
        checks.choice("scales", scales, ("tensor", "row"))
        self.norm_eps = None if norm_eps is None else checks.number("norm_eps", norm_eps, low=0)
        self.dtype = torch.get_default_dtype()
        self.kind: Kind = kind
        width = packed_bytes(kind, 1, in_features, 0)
        self.register_buffer("packed", torch.zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features if scales == "row" else 1))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("norm_weight", None if norm_eps is None else torch.ones(in_features))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        kind: Kind = "ternary",
        *,
        bias: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> PackedLinear:
        """The layer of integer codes (out, in) and their scales (one, or one a row).

        Raises ValueError for other codes or sizes, for numbers that are not finite, and for a norm weight without `norm_eps`.
        """
        packed, (n, k) = pack(codes, kind), codes.shape
        checks.tensor("scale", scale, finite=True)
        if bias is not None:
            checks.tensor("bias", bias, shape=(n,), finite=True)
        if norm_weight is not None:
            if norm_eps is None:
                raise ValueError("norm_weight must be left out where norm_eps is None: there is no norm then")
            checks.tensor("norm_weight", norm_weight, shape=(k,), finite=True)
        if scale.numel() not in (1, n):
            raise ValueError(f"scale must have 1 or {n} values, got {scale.numel()}")
        with torch.device("meta"):
            layer = cls(
                k,
                n,
                kind,
                scales="tensor" if scale.numel() == 1 else "row",
                bias=bias is not None,
                norm_eps=norm_eps,
            )
        layer.packed, layer.scale = packed, scale.detach().flatten().float().clone()
        layer.bias = None if bias is None else bias.detach().float().clone()
        if norm_eps is not None:
            layer.norm_weight = (
                torch.ones(k, device=codes.device) if norm_weight is None else norm_weight.detach().float().clone()
            )
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Moves between devices like any module, but `model.to(bfloat16)` leaves the scales in float32."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if not buffer.is_meta:
                self._buffers[name] = buffer.to(self.packed.device)
        self.follow(fn)
        return self

    def codes(self) -> Tensor:
        """The integer weight, int8 (out, in)."""
        return unpack(self.packed, self.kind, self.in_features)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in) this layer stands for."""
        return self.codes().float() * self.scale[:, None]

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), made when its numbers are wanted; nothing learns by changing it."""
        return stand_in((self.out_features, self.in_features), self.dtype, self.packed.device, self.dequantize)

    def row_sums(self) -> Tensor:
        """The sum of each row's codes, int32 (out,): one product with ones, found anew as the codes may have been exchanged."""
        ones = torch.ones(1, self.in_features, dtype=torch.int8, device=self.packed.device)
        return product(ones, self.packed, self.kind)[0]

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("...", "values"), empty=True)
        self._check(x.shape[-1])
        if not compiled(x) or x.numel() == 0:
            return self.reference(x)
        kernels.ran("low-bit linear", "kernel")
        rows = x.detach().reshape(-1, self.in_features).float().contiguous()
        eps = 0.0 if self.norm_eps is None else self.norm_eps
        y: Tensor = torch.ops.assay.lowbit_linear(
            rows, self.packed, FORMATS[self.kind].id, self.scale, self.bias, self.norm_weight, eps
        )
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The same in torch, step by step."""
        kernels.ran("low-bit linear", "torch")
        rows = x.detach().float()
        if self.norm_eps is not None:
            rows = F.rms_norm(rows, (self.in_features,), self.norm_weight, self.norm_eps)
        return self.on_codes(*quantize_tokens(rows)).to(x.dtype)

    def on_codes(self, codes: Tensor, step: Tensor, shift: Tensor | None = None) -> Tensor:
        """For inputs quantised elsewhere, x = codes * step + shift: int8 (..., in), steps and shifts broadcasting to (..., 1).

        float32 (..., out). The shift adds a term of rank one: shift times the sum of each row's weights.
        """
        self._check(codes.shape[-1])
        sums = product(codes.reshape(-1, self.in_features), self.packed, self.kind)
        y = sums.view(*codes.shape[:-1], self.out_features).float() * (step.float() * self.scale)
        if shift is not None:
            y = y + shift.float() * (self.row_sums().float() * self.scale)
        return y if self.bias is None else y + self.bias

    def _check(self, width: int) -> None:
        if width != self.in_features:
            raise ValueError(f"x must have {self.in_features} values in its last dimension, got {width}")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, shared ones once."""
    held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def _macs(x: Tensor, *rest: Any, out: Tensor) -> int:
    return x.numel() * out.shape[-1]


register_macs("assay::lowbit_product", _macs, "linear", "int8")
register_macs("assay::lowbit_linear", _macs, "linear", "int8")
