"""Packed low-bit weights: ternary at 2 bits (4 a byte) or in base 3 (5 a byte, 1.6 bits), binary at 1 bit, with float scales.

The core of the rooms that train such weights (`mixers.matmul_free`, `layers.binary_ternary_nlg`): their integer codes go in, and
`PackedLinear` computes with 8-bit activations straight from the packed bytes. A weight of -1, 0 or 1 needs no multiplication; the
compiled kernel adds with the processor's byte dot product, which multiplies by 0, 1 and 2 because that is what there is.

    y[t, n] = step[t] * scale[n] * sum_k codes_x[t, k] * codes_w[n, k] + bias[n]

The sums are integers and exact, so that they are those of a layer computed on the fake-quantised floats, whatever the machine.
The layout is `our choice`: digit j of byte b of a row belongs to input j * bytes + b (see csrc/lowbit.cpp).

When NOT to use it: for weights that were not trained for it. Rounding a trained model's weights to three values breaks it.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.measure.cost import register_macs
from assay.methods.core import kernels

Kind = Literal["ternary", "base3", "binary"]
KINDS: dict[str, int] = {"ternary": 0, "base3": 1, "binary": 2}
PER_BYTE: dict[str, int] = {"ternary": 4, "base3": 5, "binary": 8}
SMALLEST = 1e-5  # of what a scale is found from


def packed_bytes(kind: Kind, out_features: int, in_features: int, scales: int = 1) -> int:
    """Bytes of a packed matrix with `scales` float32 scales: out * ceil(in / weights a byte) + 4 * scales."""
    _check_kind(kind)
    return out_features * -(-in_features // PER_BYTE[kind]) + 4 * scales


def pack(codes: Tensor, kind: Kind) -> Tensor:
    """Codes (out, in), -1, 0, 1 (ternary, base3) or -1, 1 (binary), as uint8 (out, ceil(in / weights a byte)).

    Raises ValueError for another shape or other values.
    """
    _check_kind(kind)
    if codes.dim() != 2:
        raise ValueError(f"codes must be a matrix (out, in), got {tuple(codes.shape)}")
    allowed = (codes.abs() == 1) if kind == "binary" else (codes.abs() <= 1) & (codes == codes.round())
    if not bool(allowed.all()):
        raise ValueError(f"codes must be {'-1 or 1' if kind == 'binary' else '-1, 0 or 1'} for kind {kind!r}")
    per = PER_BYTE[kind]
    digits = (codes > 0).to(torch.int16) if kind == "binary" else codes.to(torch.int16) + 1
    n, k = digits.shape
    width = -(-k // per)
    planes = F.pad(digits, (0, per * width - k)).view(n, per, width)
    if kind == "base3":
        number = sum(planes[:, j] * 3 ** (per - 1 - j) for j in range(per))
        packed = (cast(Tensor, number).int() * 256 + 242) // 243
    else:
        shift = 8 // per
        packed = cast(Tensor, sum(planes[:, j] << (shift * j) for j in range(per)))
    return packed.to(torch.uint8).contiguous()


def unpack(packed: Tensor, kind: Kind, in_features: int) -> Tensor:
    """The codes, int8 (out, in), of what `pack` gave. Also for stacks of rows (..., bytes)."""
    _check_kind(kind)
    per = PER_BYTE[kind]
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-in_features // per):
        raise ValueError(
            f"packed must be uint8 (..., {-(-in_features // per)}), got {packed.dtype} {tuple(packed.shape)}"
        )
    planes = []
    rest = packed.to(torch.int16)
    for j in range(per):
        if kind == "base3":
            planes.append((3 * rest >> 8) - 1)
            rest = 3 * rest & 255
        elif kind == "ternary":
            planes.append((rest >> 2 * j & 3) - 1)
        else:
            planes.append(2 * (rest >> j & 1) - 1)
    return torch.cat(planes, -1)[..., :in_features].to(torch.int8)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits per token: float (..., k) to codes int8 (..., k) and steps (..., 1), x ~ codes * step, step = max|x| / 127.

    Rounds half to even; max|x| counts as at least 1e-5. Steps are float32 (float64 for float64 input).
    """
    x = x if x.dtype == torch.float64 else x.float()
    peak = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * (127.0 / peak)).round().clamp(-128, 127).to(torch.int8), peak / 127.0


def product(codes: Tensor, packed: Tensor, kind: Kind) -> Tensor:
    """The integer product: activations int8 (m, in) with packed weights (out, bytes), int32 (m, out), exact."""
    _check_kind(kind)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 (m, in), got {codes.dtype} {tuple(codes.shape)}")
    if compiled(codes):
        found: Tensor = torch.ops.assay.lowbit_product(codes.contiguous(), packed, KINDS[kind])
        return found
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


class PackedLinear(nn.Module):
    """A linear layer on packed weights, for inference: (..., in) to (..., out) in the dtype of its input.

    Inputs are quantised to 8 bits per token on the fly; with `norm_eps` an RMSNorm with a learnt weight comes first, in the same
    pass. `scales` says whether the weights have one scale in all ("tensor") or one a row ("row"). Scales, norm and bias stay in
    float32 whatever the model is cast to. There is no gradient.

    Raises ValueError for an unknown kind or inputs of another width.
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
        _check_kind(kind)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        self.in_features, self.out_features, self.norm_eps = in_features, out_features, norm_eps
        self.kind: Kind = kind
        width = -(-in_features // PER_BYTE[kind])
        self.register_buffer("packed", torch.zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features if scales == "row" else 1))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("norm_weight", None if norm_eps is None else torch.ones(in_features))
        self._row_sums: Tensor | None = None

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
        """The layer of integer codes (out, in) and their scales (one, or one a row). Raises ValueError for other codes or sizes."""
        packed, (n, k) = pack(codes, kind), codes.shape
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
            layer.norm_weight = torch.ones(k) if norm_weight is None else norm_weight.detach().float().clone()
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Moves between devices like any module, but `model.to(bfloat16)` leaves the scales in float32."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if not buffer.is_meta:
                self._buffers[name] = buffer.to(self.packed.device)
        self._row_sums = None
        return self

    def codes(self) -> Tensor:
        """The integer weight, int8 (out, in)."""
        return unpack(self.packed, self.kind, self.in_features)

    def dequantize(self) -> Tensor:
        """The float32 weight (out, in) this layer stands for."""
        return self.codes().float() * self.scale[:, None]

    def row_sums(self) -> Tensor:
        """The sum of each row's codes, int32 (out,); found once."""
        if self._row_sums is None:
            ones = torch.ones(1, self.in_features, dtype=torch.int8, device=self.packed.device)
            self._row_sums = product(ones, self.packed, self.kind)[0]
        return self._row_sums

    def forward(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1])
        if not compiled(x) or x.numel() == 0:
            return self.reference(x)
        rows = x.detach().reshape(-1, self.in_features).float().contiguous()
        eps = 0.0 if self.norm_eps is None else self.norm_eps
        y: Tensor = torch.ops.assay.lowbit_linear(
            rows, self.packed, KINDS[self.kind], self.scale, self.bias, self.norm_weight, eps
        )
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The same in torch, step by step."""
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


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _macs(x: Tensor, *rest: Any, out: Tensor) -> int:
    return x.numel() * out.shape[-1]


register_macs("assay::lowbit_product", _macs, "linear", "int8")
register_macs("assay::lowbit_linear", _macs, "linear", "int8")
