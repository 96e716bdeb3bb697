"""KAT: Kolmogorov-Arnold layers that scale, as group-rational activations in front of ordinary linear layers (arXiv 2409.10594).

A KAN has a learnable function on every edge. GR-KAN shares: the channels of x are divided into `num_groups` contiguous groups, all
channels of a group pass through one rational function phi(x) = P(x) / Q(x) of degrees 5 and 4, and a linear layer follows. In a
transformer the MLP becomes x -> phi_1 -> Linear(d, 4 d) -> phi_2 -> Linear(4 d, d). phi_1 starts as the identity and phi_2 as
GELU or Swish, so that a trained ViT can be converted and fine-tuned.

Two denominators without poles are in use, and coefficients fitted for one mean a different function under the other:
"sum_of_abs", Q = 1 + sum |b_i| |x|^i, is what the released kernels compute (default); "abs_of_sum", Q = 1 + |sum b_i x^i|, is
that of the paper's fits. Here, coefficients are fitted for the form they are used with. Numerators are shared by all groups and
denominators are per group, as in the released code; `shared="denominator"` is the paper's text. `our choice`: everything is
computed in float32 at least, by a compiled kernel that keeps only x for the backward pass. The variance-preserving weights of the
paper are used as written; the released code overwrites them (`KATMlp(variant="as_released")`).

When NOT to use it: for speed. An activation of 20 operations per number costs more than GELU and saves nothing; the claim is
accuracy at equal size. Outside [-3, 3] a fitted function diverges from its target.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.layers.surgery import find, linear_kinds

Denominator = Literal["sum_of_abs", "abs_of_sum"]
Shared = Literal["numerator", "denominator"]
Variant = Literal["paper", "as_released"]
INITS = ("identity", "gelu", "swish")
FIT_RANGE, FIT_POINTS = 3.0, 1000
FAR = 2.0**20  # beyond it powers may leave float32
FIT_TOLERANCE = {"identity": 0.0, "gelu": 0.02, "swish": 0.02}  # largest error on the range that a fit may have


# ------------------------------------------------------------------------------------------------------------ the function


def rational_reference(x: Tensor, a: Tensor, b: Tensor, denominator: Denominator = "sum_of_abs") -> Tensor:
    """P(x) / Q(x) by Horner's rule, as the kernel computes it; arguments as for `rational`, whose oracle it is.

    float32 does not hold the fifth power of some 10^7, sooner with large coefficients: with numbers beyond 10^6 among its own the
    work is done in float64, on the CPU; elsewhere, or compiled, the result is infinite or NaN there. So it is in float64 beyond
    10^60. The identity has no such limit.
    """
    if _is_far(x):
        return rational_reference(x.double(), a.double(), b.double(), denominator).to(x.dtype)
    groups = max(len(a), len(b))
    v = x.unflatten(-1, (groups, x.shape[-1] // groups))
    s = _denominator(v, b, denominator == "abs_of_sum")[0]
    return (_horner(v, a) / (1 + s.abs())).reshape(x.shape)


def _is_far(x: Tensor) -> bool:
    """Whether x is float32 and holds numbers whose powers are not."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and bool((x.abs() > FAR).any())


def _horner(v: Tensor, coefficients: Tensor) -> Tensor:
    """sum_i c_i v^i for v (..., groups, channels) and coefficients (groups or 1, degree + 1)."""
    *rest, total = (c[:, None] for c in coefficients.unbind(1))
    for c in reversed(rest):
        total = c + v * total
    return total


def _denominator(v: Tensor, b: Tensor, abs_of_sum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sum s of Q = 1 + |s|, the variable u it is a polynomial of, and ds/du."""
    u, weight = (v, b) if abs_of_sum else (v.abs(), b.abs())
    degrees = torch.arange(1, 5, device=b.device, dtype=b.dtype)
    return u * _horner(u, weight), u, _horner(u, weight * degrees)


class _Rational(torch.autograd.Function):
    """Saves x and the coefficients, nothing else. Gradients of gradients are refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, abs_of_sum: bool) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.abs_of_sum = abs_of_sum
        if _use_kernel(x):
            kernels.ran("rational", "kernel")
            return cast(Tensor, torch.ops.assay.rational(x, a, b, abs_of_sum))
        kernels.ran("rational", "torch")
        return rational_reference(x, a, b, "abs_of_sum" if abs_of_sum else "sum_of_abs")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        if _use_kernel(x):
            return (*torch.ops.assay.rational_backward(grad.contiguous(), x, a, b, ctx.abs_of_sum), None)
        return (*_gradients(grad, x, a, b, ctx.abs_of_sum), None)


def _use_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and kernels.load("rational")


def _gradients(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, abs_of_sum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's gradients in torch: x (rows, d)."""
    if _is_far(x):
        found = _gradients(grad.double(), x.double(), a.double(), b.double(), abs_of_sum)
        return found[0].to(x.dtype), found[1].to(a.dtype), found[2].to(b.dtype)
    groups = max(len(a), len(b))
    v = x.unflatten(-1, (groups, x.shape[-1] // groups))
    g = grad.view_as(v)
    s, u, slope = _denominator(v, b, abs_of_sum)
    turn = s.sign() if abs_of_sum else v.sign()
    over = 1 / (1 + s.abs())
    y = _horner(v, a) * over
    rise = _horner(v, a[:, 1:] * torch.arange(1, 6, device=a.device, dtype=a.dtype))
    dx = (g * over * (rise - y * turn * slope)).view_as(x)
    da, db = [], []
    w = g * over  # one more power in each step, so that no high power is ever computed by itself
    z = -w * y * (turn if abs_of_sum else 1.0)
    for _ in range(6):
        da.append(w.sum((0, 2)))
        w = w * v
    for _ in range(4):
        z = z * u
        db.append(z.sum((0, 2)))
    signs = 1.0 if abs_of_sum else b.sign()
    return dx, torch.stack(da, 1).sum_to_size(a.shape), torch.stack(db, 1).mul(signs).sum_to_size(b.shape)


def rational(x: Tensor, a: Tensor, b: Tensor, *, denominator: Denominator = "sum_of_abs") -> Tensor:
    """phi(x) for x (..., d), a (groups, 6) from the constant term up, b (groups, 4) from the linear term up; gradients for all.

    One of a and b may have a single row, which all groups share. Computed in float32 (float64 for float64, and for large numbers,
    see `rational_reference`), returned in the dtype of x. No channels give none. Raises ValueError for shapes that do not fit and
    devices that differ, TypeError when x does not hold floating-point numbers.
    """
    checks.choice("denominator", denominator, get_args(Denominator))
    checks.tensor("x", x, empty=True)
    for name, value, width in (("a", a, 6), ("b", b, 4)):
        checks.tensor(name, value, shape=("groups", width), device=x.device)
    if not (len(a) == len(b) or min(len(a), len(b)) == 1):
        raise ValueError(f"a and b must have as many rows, or one of them a single row, got {len(a)} and {len(b)}")
    groups = max(len(a), len(b))
    if not x.ndim or x.shape[-1] % groups:
        raise ValueError(f"num_groups ({groups}) must divide the channels of x, got {tuple(x.shape)}")
    if not x.numel():
        return x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide).reshape(-1, x.shape[-1]).contiguous()
    found = _Rational.apply(rows, a.to(wide).contiguous(), b.to(wide).contiguous(), denominator == "abs_of_sum")
    return cast(Tensor, found).view(x.shape).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------------- fits


@functools.cache
def fitted(name: str, denominator: Denominator = "sum_of_abs") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients (a, b) of a target function, least squares on [-3, 3] under the given denominator (Levenberg-Marquardt).

    "identity" is exact: a_1 = 1, the rest 0. Raises ValueError for another name, RuntimeError if a fit misses its tolerance.
    """
    checks.choice("init", name, INITS)
    checks.choice("denominator", denominator, get_args(Denominator))
    if name == "identity":
        return (0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0,) * 4
    x = torch.linspace(-FIT_RANGE, FIT_RANGE, FIT_POINTS, dtype=torch.float64)
    wanted = F.gelu(x) if name == "gelu" else F.silu(x)
    theta = torch.tensor([0.0, 0.5, 0.3, 0.1, 0.05, 0.01, 0.1, 0.1, 0.1, 0.02], dtype=torch.float64)

    def value(t: Tensor) -> Tensor:
        return rational_reference(x[:, None], t[None, :6], t[None, 6:], denominator)[:, 0]

    def jacobian(t: Tensor) -> Tensor:
        powers = torch.stack([x**i for i in range(6)], 1)
        p = powers @ t[:6]
        if denominator == "sum_of_abs":
            turned = powers[:, 1:5].abs() * t[6:].sign()
            q = 1 + powers[:, 1:5].abs() @ t[6:].abs()
        else:
            s = powers[:, 1:5] @ t[6:]
            q, turned = 1 + s.abs(), powers[:, 1:5] * s.sign()[:, None]
        return torch.cat([powers / q[:, None], -(p / q.square())[:, None] * turned], 1)

    damping, residual = 1e-2, value(theta) - wanted
    for _ in range(2000):
        slope = jacobian(theta)
        normal = slope.T @ slope
        step = torch.linalg.solve(normal + damping * torch.diag(normal.diagonal() + 1e-9), slope.T @ residual)
        trial = value(theta - step) - wanted
        if trial.square().sum() < residual.square().sum():
            theta, residual, damping = theta - step, trial, damping / 3
        else:
            damping *= 4
        if damping > 1e12:
            break
    if (worst := float(residual.abs().max())) > FIT_TOLERANCE[name]:
        raise RuntimeError(f"the fit of {name} under {denominator} is off by {worst:.3g}")
    return tuple(theta[:6].tolist()), tuple(theta[6:].tolist())


class GroupRational(nn.Module):
    """A learnable rational activation for each of `num_groups` contiguous groups of channels; any shape (..., d), same shape.

    `init` "identity" | "gelu" | "swish"; `denominator`, `shared` as in the module docstring. `noise` adds normal noise of that
    size to the denominators: under "sum_of_abs" a b of exactly zero gets no gradient and stays (`our choice`, off by default).
    6 + 4 g numbers, or 6 g + 4 with a shared denominator. Raises TypeError or ValueError for unknown options.

    >>> phi = GroupRational(num_groups=4, init="gelu")
    >>> x = torch.linspace(-3, 3, 8)
    >>> bool((phi(x) - F.gelu(x)).abs().max() < 0.02)
    True
    """

    def __init__(
        self,
        num_groups: int = 8,
        init: str = "swish",
        denominator: Denominator = "sum_of_abs",
        *,
        shared: Shared = "numerator",
        noise: float = 0.0,
    ):
        super().__init__()
        num_groups = checks.whole("num_groups", num_groups, low=1)
        checks.choice("shared", shared, get_args(Shared))
        noise = checks.number("noise", noise, low=0)
        a, b = fitted(init, denominator)
        self.num_groups, self.init = num_groups, init
        self.denominator: Denominator = denominator
        self.shared: Shared = shared
        self.numerator = nn.Parameter(torch.tensor(a).repeat(1 if shared == "numerator" else num_groups, 1))
        self.coefficients = nn.Parameter(torch.tensor(b).repeat(1 if shared == "denominator" else num_groups, 1))
        if noise:
            nn.init.normal_(self.coefficients, std=noise)

    def forward(self, x: Tensor) -> Tensor:
        return rational(x, self.numerator, self.coefficients, denominator=self.denominator)

    def gain(self) -> float:
        """1 / E[phi(x)^2] for x ~ N(0, 1), of the average group, by quadrature."""
        x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
        with torch.no_grad():
            y = self.double_copy().cpu()(x[:, None].expand(-1, self.num_groups))
        return 1 / float((density[:, None] * y.square()).sum(0).mean())

    def double_copy(self) -> GroupRational:
        """The same function in float64."""
        return copy.deepcopy(self).double()

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, init={self.init!r}, denominator={self.denominator!r}, shared={self.shared!r}"


def variance_preserving_(linear: nn.Linear, phi: GroupRational) -> None:
    """W ~ N(0, gain / d_in), bias 0: the layer after phi keeps unit variance when its input has it."""
    nn.init.normal_(linear.weight, std=(phi.gain() / linear.in_features) ** 0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class KATMlp(nn.Module):
    """phi_1 (identity) -> Linear(d, hidden) -> phi_2 -> Linear(hidden, d), the GR-KAN pair that replaces a transformer's MLP.

    `variant` "paper" starts the weights with the variance-preserving initialisation of the activation before each; "as_released"
    with what the released code leaves there, a normal distribution of deviation 0.02, cut at 2 (weights near 0: the residual
    stream carries the signal at first). `options` are those of `GroupRational`. Raises ValueError for an unknown variant and for
    widths that the groups do not divide, TypeError for sizes that are no whole numbers.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act_init: str = "swish",
        dropout: float = 0.0,
        variant: Variant = "paper",
        **options: Any,
    ):
        super().__init__()
        checks.choice("variant", variant, get_args(Variant))
        dropout = checks.number("dropout", dropout, low=0, high=1)
        dim, hidden = checks.whole("dim", dim, low=1), checks.whole("hidden", hidden, low=1)
        self.act1 = GroupRational(init="identity", **options)
        if dim % self.act1.num_groups or hidden % self.act1.num_groups:
            raise ValueError(f"num_groups ({self.act1.num_groups}) must divide dim and hidden, got {dim} and {hidden}")
        self.fc1 = nn.Linear(dim, hidden)
        self.act2 = GroupRational(init=act_init, **options)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = dropout
        self.variant: Variant = variant
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights for both layers, by `variant`; biases 0."""
        for linear, phi in ((self.fc1, self.act1), (self.fc2, self.act2)):
            variance_preserving_(linear, phi)
            if self.variant == "as_released":
                nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(F.dropout(self.act1(x), self.dropout, self.training))
        y: Tensor = self.fc2(F.dropout(self.act2(x), self.dropout, self.training))
        return y


class Mlp(nn.Module):
    """The plain MLP it is compared with: Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


# ------------------------------------------------------------------------------------------------------------------ models


def mimetic_init_(attention: Attention) -> None:
    """Attention weights whose products begin near those of trained models: Q K^T near 0.7 I, V times projection near -0.4 I."""
    dim, heads = attention.qkv.in_features, attention.heads
    size = dim // heads
    weights = torch.empty(3, dim, dim)
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        u, s, v = torch.linalg.svd(0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim))
        weights[0, rows], weights[1, rows] = (u[:, :size] * s[:size].sqrt()).T, s[:size, None].sqrt() * v[:size]
    u, s, v = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
    weights[2] = s[:, None].sqrt() * v
    with torch.no_grad():
        attention.qkv.weight.copy_(weights.flatten(0, 1))
        attention.proj.weight.copy_(u * s.sqrt())


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (batch, tokens, dim) to the same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, dim: int, heads: int, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A pre-norm ViT with a class token: images (batch, channels, size, size) to logits (batch, classes).

    `mlp` "kat" | "gelu"; `options` are those of `KATMlp`. `forward_features` gives the tokens (batch, 1 + patches, dim);
    `num_classes=0` leaves the head out.
    Raises ValueError for sizes that do not divide, images of another size, and `options` beside mlp "gelu", which has none;
    TypeError for sizes that are no whole numbers.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        mlp: Literal["kat", "gelu"] = "kat",
        **options: Any,
    ):
        super().__init__()
        sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim}
        for name, size in {**sizes, "num_heads": num_heads}.items():
            checks.whole(name, size, low=1)
        checks.whole("num_classes", num_classes, low=0)
        checks.whole("depth", depth, low=0)
        checks.number("mlp_ratio", mlp_ratio, low=1 / embed_dim)
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(
                f"patch_size must divide img_size and num_heads embed_dim, got {patch_size}, {img_size}, {num_heads}, {embed_dim}"
            )
        checks.choice("mlp", mlp, ("kat", "gelu"))
        if mlp == "gelu" and options:
            raise ValueError(f"options must be left out beside mlp 'gelu', which has none, got {sorted(options)}")
        self.in_chans, self.img_size = in_chans, img_size
        hidden = int(embed_dim * mlp_ratio)
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch_size) ** 2, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, KATMlp(embed_dim, hidden, **options) if mlp == "kat" else Mlp(embed_dim, hidden)
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for block in self.blocks:
            mimetic_init_(cast(Any, block).attn)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images as in `forward` to normed tokens (batch, 1 + patches, embed_dim), the class token first."""
        checks.tensor("x", x, shape=("batch", self.in_chans, self.img_size, self.img_size), empty=True)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.norm(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.forward_features(x)[:, 0])
        return y


def kat_tiny_patch16_224(**options: Any) -> VisionTransformer:
    """KAT-T: width 192, 3 heads, 12 blocks."""
    return VisionTransformer(**{"embed_dim": 192, "num_heads": 3, **options})


def kat_small_patch16_224(**options: Any) -> VisionTransformer:
    """KAT-S: width 384, 6 heads, 12 blocks."""
    return VisionTransformer(**{"embed_dim": 384, "num_heads": 6, **options})


def kat_base_patch16_224(**options: Any) -> VisionTransformer:
    """KAT-B: width 768, 12 heads, 12 blocks."""
    return VisionTransformer(**{"embed_dim": 768, "num_heads": 12, **options})


# -------------------------------------------------------------------------------------------------------------- conversion


GELUS = (
    "GELUActivation",
    "NewGELUActivation",
    "PytorchGELUTanh",
    "GELUTanh",
    "FastGELUActivation",
    "AccurateGELUActivation",
)
SWISHES = ("SiLUActivation", "SwishActivation")
BESIDE = (
    "fc1",
    "dense",
    "c_fc",
    "linear1",
    "fc_in",
    "lin1",
    "intermediate_dense",
)  # the layer in front of an activation


class Activated(nn.Module):
    """A linear layer after its own activation: linear(phi(x)). `weight`, `bias` and sizes are those of the layer."""

    def __init__(self, phi: GroupRational, linear: nn.Module):
        super().__init__()
        self.phi, self.linear = phi, linear

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "linear":
                raise
            return getattr(super().__getattr__("linear"), name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.phi(x))
        return y


def _activation(module: nn.Module) -> str | None:
    """Name of the function that a plain activation computes, if there is a fit for it."""
    name = type(module).__name__
    if isinstance(module, nn.SiLU) or name in SWISHES:
        return "swish"
    return "gelu" if isinstance(module, nn.GELU) or name in GELUS else None


def convert(model: nn.Module, *, include: Sequence[str] = ("*",), **options: Any) -> list[str]:
    """Turn the activations of a trained model's MLPs into group-rational ones, in place; returns the names of those replaced.

    Each GELU or Swish module becomes a `GroupRational` that starts as its fit. The linear layer in front of it gets an identity
    `GroupRational` before it, as `Activated`, if that layer can be found next to the activation (`BESIDE`). The function is the old
    one up to the error of the fit within [-3, 3]. Gated MLPs (SwiGLU) keep their structure. Coefficients take the device and dtype
    of the neighbouring weights. Activations that a model keeps as plain functions are not found.
    `options` are those of `GroupRational`. Raises TypeError or ValueError, before anything is changed, for unknown options, when
    nothing can be replaced, or when `num_groups` does not divide the inputs of such a layer or of what follows.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    >>> convert(model)
    ['1']
    """
    if "init" in options:
        raise ValueError(f"init must not be given, it follows from each activation, got {options['init']!r}")
    groups = GroupRational(**options).num_groups
    kinds = tuple({type(m) for m in model.modules() if _activation(m) is not None})
    chosen = {id(module) for module in find(model, kinds, include=include).values()} if kinds else set()
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no GELU or Swish module that `include` names")
    places = [
        (parent, key, child)
        for parent in model.modules()  # one activation object may serve many layers: every place gets a function of its own
        for key, child in parent._modules.items()
        if child is not None and id(child) in chosen
    ]
    layers = {
        id(p): [(name, p._modules[name]) for name in BESIDE if _dense(p._modules.get(name))] for p, _, _ in places
    }
    for parent, key, _ in places:
        for name, linear in layers[id(parent)]:
            for side, width in zip(("inputs", "outputs"), _sizes(linear), strict=True):
                if width % groups:
                    raise ValueError(f"num_groups ({groups}) must divide the {width} {side} of {name} beside {key}")
    for parent, key, child in places:
        near = next(iter(parent.parameters()), next(iter(model.parameters()), torch.empty(0)))
        like: dict[str, Any] = {"device": near.device, "dtype": near.dtype if near.is_floating_point() else None}
        parent._modules[key] = GroupRational(init=str(_activation(child)), **options).to(**like)
        for name, linear in layers[id(parent)]:
            phi = GroupRational(init="identity", **options).to(**like)
            parent._modules[name] = Activated(phi, cast(nn.Module, linear)).train(model.training)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # keeps torch off its fused path, which computes the old activation
    return sorted(name for name, module in model.named_modules() if isinstance(module, GroupRational))


def _dense(module: nn.Module | None) -> bool:
    return module is not None and type(module) in linear_kinds()


def _sizes(linear: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    rows, columns = linear.weight.shape
    return (rows, columns) if type(linear) is linear_kinds()[1] else (columns, rows)
