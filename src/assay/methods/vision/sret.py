"""SReT: each transformer block is used several times in depth, and its attention is sliced into groups to pay for that.

Shen, Liu and Xing, "Sliced Recursive Transformer" (ECCV 2022). A block F with its weights is followed by a small projection N of its own
for every use: x = N1(F(x)), x = N2(F(x)). In the first use attention stays inside of g1 contiguous groups of tokens, in later ones
inside of g2 groups of other neighbours.

    model = build("sret_t", num_classes=10)                          # after `from assay.methods.vision import build`
    out = sliced_attention(q, k, v, groups=8)                        # a fraction 1/8 of the work of full attention
    bert.encoder.layer = make_recursive(bert.encoder.layer, 2)       # any list of blocks, its weights shared by both uses

Names of models: T, LT, S of the paper, `_wo_slice` without slices, and the sizes they were fine-tuned at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core.vision.backbone import Backbone, classifier, map_to_tokens, tokens_to_map
from assay.methods.core.vision.blocks import DropPath, Mlp
from assay.methods.core.vision.registry import backbones

Order = Literal["contiguous", "strided"]
ORDERS = ("contiguous", "strided")
EPS = 1e-6  # of the layer norms
LOOPS = 2  # of all released models
SLICED: tuple[tuple[int, int], ...] = ((8, 2), (4, 1), (1, 1))
SLICED_16: tuple[tuple[int, int], ...] = ((16, 1), (14, 1), (1, 1))
WHOLE: tuple[tuple[int, int], ...] = ((1, 1), (1, 1), (1, 1))
T: dict[str, Any] = {"head_dim": 32, "heads": (2, 4, 8), "mlp_ratio": 3.6, "np_mlp_ratio": 1.0}
LT: dict[str, Any] = {**T, "mlp_ratio": 4.0}
S: dict[str, Any] = {"head_dim": 42, "heads": (3, 6, 12), "mlp_ratio": 3.0, "np_mlp_ratio": 2.0}
UNSLICED: dict[str, Any] = {"groups": WHOLE, "drop_path_rate": 0.0}  # the rate of the released builders without slices
CONFIGS: dict[str, dict[str, Any]] = {
    "sret_t": T,
    "sret_t_wo_slice": {**T, **UNSLICED},
    "sret_t_wo_slice_384": {**T, **UNSLICED, "input_size": 384},
    "sret_lt": LT,
    "sret_lt_16_14": {**LT, "groups": SLICED_16},
    "sret_lt_wo_slice": {**LT, **UNSLICED},
    "sret_s": S,
    "sret_s_wo_slice": {**S, **UNSLICED},
    "sret_s_wo_slice_384": {**S, **UNSLICED, "input_size": 384},
    "sret_s_wo_slice_512": {**S, **UNSLICED, "input_size": 512},
}


# ------------------------------------------------------------------------------------------------------- sliced attention


def slice_sizes(tokens: int, groups: int) -> list[tuple[int, int]]:
    """(groups, tokens in each) of `tokens` in `groups`: one entry where they divide, else the first groups have one token more.

    Raises ValueError for more groups than tokens.

    >>> slice_sizes(784, 8), slice_sizes(197, 4)
    ([(8, 98)], [(1, 50), (3, 49)])
    """
    checks.whole("groups", groups, low=1, high=tokens)
    few, more = divmod(tokens, groups)
    return [(count, size) for count, size in ((more, few + 1), (groups - more, few)) if count]


def strided_order(tokens: int, groups: int) -> Tensor:
    """Token i in group i mod groups: the permutation, int64 (tokens,), that lets groups which are contiguous afterwards be these."""
    return torch.cat([torch.arange(group, tokens, groups) for group in range(groups)])


def sliced_attention(
    q: Tensor, k: Tensor, v: Tensor, *, groups: int, order: Order | Tensor = "contiguous", scale: float | None = None
) -> Tensor:
    """Softmax attention inside of groups of tokens: (B, heads, N, d) to the same, in 2 N^2 d / groups MACs a head. Section 3.3.

    "contiguous" cuts the sequence into `groups` runs; "strided" puts token i into group i mod groups; a permutation int64 (N,) is
    applied first, and its inverse to the result. Where the groups do not divide N, the first ones have one token more (our choice; the
    paper has no such sizes). One group is full attention, N groups give v. Runs on torch's fused attention without a mask. Raises
    ValueError for more groups than tokens and for an order that is no permutation. Tokens of different groups see nothing of each
    other: a class token sees its own group only.

    >>> q, k, v = torch.randn(3, 1, 2, 12, 8)
    >>> torch.allclose(sliced_attention(q, k, v, groups=12), v)
    True
    """
    checks.tensor("q", q, ndim=4)
    checks.together(q=q, k=k, v=v)
    if k.shape != q.shape:
        raise ValueError(
            f"k must have the heads and tokens of q, and its width, {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have the heads and tokens of q, {tuple(q.shape[:3])}, got {tuple(v.shape[:3])}")
    if isinstance(order, Tensor):
        checks.tensor("order", order, shape=(q.shape[2],), dtype="integer")
        if not torch.equal(order.sort().values.long(), torch.arange(len(order), device=order.device)):
            raise ValueError(f"order must be a permutation of the tokens, got {checks.shown(order)}")
    # tokens before heads, as projections leave them: then groups are cut off without a copy
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    permutation = _permutation(order, q.shape[1], groups, q.device)
    if permutation is None:
        return _in_runs(q, k, v, groups, scale).transpose(1, 2)
    q, k, v = (x[:, permutation] for x in (q, k, v))
    return _in_runs(q, k, v, groups, scale)[:, permutation.argsort()].transpose(1, 2)


def _permutation(order: Order | Tensor, tokens: int, groups: int, device: torch.device) -> Tensor | None:
    """The permutation after which the groups are runs of tokens; None where nothing has to be moved."""
    if isinstance(order, Tensor):
        checks.tensor("order", order, shape=(tokens,), dtype="integer")
    else:
        checks.choice("order", order, ORDERS)
    if groups == 1:
        return None
    if isinstance(order, Tensor):
        return order.to(device)
    return strided_order(tokens, groups).to(device) if order == "strided" else None


def _in_runs(q: Tensor, k: Tensor, v: Tensor, groups: int, scale: float | None) -> Tensor:
    """Attention inside of runs of tokens, on (B, N, heads, d)."""
    parts, start = [], 0
    for count, size in slice_sizes(q.shape[1], groups):
        end = start + count * size
        qs, ks, vs = (x[:, start:end].reshape(-1, size, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(qs, ks, vs, scale=scale)
        parts.append(out.transpose(1, 2).reshape(len(q), count * size, *v.shape[2:]))
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class SlicedAttention(nn.Module):
    """Multi-head attention of tokens (B, N, width) inside of groups: `forward(x, groups, order)`, see `sliced_attention`.

    The weights, `qkv` and `proj`, are those of full attention: a model can be sliced after training, and by another number at each call.
    Whether a tensor given for `order` is a permutation is not checked here: that would wait for the GPU in every layer.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if checks.whole("width", width, low=1) % checks.whole("heads", heads, low=1):
            raise ValueError(f"width must be divisible by heads={heads}, got {width}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)

    def forward(self, x: Tensor, groups: int = 1, order: Order | Tensor = "contiguous") -> Tensor:
        permutation = _permutation(order, x.shape[1], groups, x.device)
        if permutation is not None:
            x = x[:, permutation]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out: Tensor = self.proj(_in_runs(q, k, v, groups, None).flatten(2))
        return out if permutation is None else out[:, permutation.argsort()]


# ------------------------------------------------------------------------------------------------------- recursion


class Block(nn.Module):
    """A transformer layer with four learned scalars, 1 at first: x = a1 x + a2 attn(norm x), then x = a3 x + a4 mlp(norm x)."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn, self.mlp, self.drop_path = SlicedAttention(width, heads), Mlp(width, hidden), DropPath(drop_path)
        self.coefficients = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, groups: int = 1, order: Order | Tensor = "contiguous") -> Tensor:
        a = self.coefficients
        x = a[0] * x + a[1] * self.drop_path(self.attn(self.norm1(x), groups, order))
        return a[2] * x + a[3] * self.drop_path(self.mlp(self.norm2(x)))


class Projection(nn.Module):
    """What stands after each use of a block, with weights of its own: x = b1 x + b2 mlp(norm x), two learned scalars, 1 at first.

    It keeps the passes from being the same function ("non-linear projection layer", section 3.2).
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(width, EPS), Mlp(width, hidden or width)
        self.coefficients = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficients[0] * x + self.coefficients[1] * self.mlp(self.norm1(x))


class Recursive(nn.Module):
    """A block of anybody's, used `loops` times: x = projection(block(x, ...)) each time. Made by `make_recursive`.

    Further arguments go to the block in every pass. A block that returns a tuple has its first entry replaced, the rest is the last pass's.
    """

    def __init__(self, block: nn.Module, projections: Sequence[nn.Module], gated: bool) -> None:
        super().__init__()
        self.block, self.projections = block, nn.ModuleList(projections)
        self.gates = None
        if gated:
            like = next(block.parameters())
            self.gates = nn.Parameter(torch.zeros(len(projections), dtype=like.dtype, device=like.device))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what models ask their blocks for, such as attention_type
            if name == "block":
                raise
            return getattr(self.block, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for name in ("cache", "past_key_values", "past_key_value", "layer_past"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None: the passes of a recursive block would share one layer's cache")
        for loop, projection in enumerate(self.projections):
            out = self.block(x, *args, **kwargs)
            y = out[0] if isinstance(out, tuple) else out
            if y.shape != x.shape:
                raise ValueError(f"block must give what it takes, {tuple(x.shape)}, got {tuple(y.shape)}")
            if self.gates is None:
                x = projection(y)
            else:
                before = y if loop == 0 else x
                x = before + self.gates[loop] * (projection(y) - before)
        return (x, *out[1:]) if isinstance(out, tuple) else x


def make_recursive(
    module_list: nn.ModuleList,
    loops: int = LOOPS,
    projection: Callable[[], nn.Module] | None = None,
    *,
    gated: bool = False,
) -> nn.ModuleList:
    """A list that uses every block of `module_list` `loops` times; the blocks are the same objects, their weights are shared.

    `projection` makes what follows each use, for example `lambda: Projection(384)`; without it the recursion is naive: block after
    block, no parameter more. `gated`: every projection and every pass but the first enters through a scalar that is 0 at first, so that a
    trained model gives what it gave before, and fine-tuning opens the gates (our choice; a model trained from scratch needs none).

    Blocks must be of one class with parameters of the same shapes, and give what they take: (..., width). Raises ValueError
    otherwise, for the latter when they run. Time grows `loops`-fold. Not for decoders that generate: passes cannot share a layer's
    cache, and are refused with one.

    >>> layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
    >>> twice = make_recursive(layers, 2, lambda: Projection(8))
    >>> len(twice), twice[0].block is layers[0]
    (3, True)
    """
    checks.whole("loops", loops, low=1)
    if not isinstance(module_list, nn.ModuleList) or not len(module_list):
        raise TypeError(f"module_list must be an nn.ModuleList with blocks in it, got {checks.shown(module_list)}")
    shapes = [(type(block), {name: p.shape for name, p in block.named_parameters()}) for block in module_list]
    if not shapes[0][1]:
        raise ValueError(f"module_list must hold blocks with parameters to share, got {type(module_list[0]).__name__}")
    if isinstance(projection, nn.Module):
        raise TypeError("projection must be a function that makes a module for each use, got a module")
    for place, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"module_list must hold blocks of one class and shape; number {place} differs from the first"
            )
    if isinstance(module_list[0], Recursive):
        raise ValueError("module_list is recursive already: give more loops to the blocks it was made of")

    def made(like: Tensor) -> nn.Module:
        module = nn.Identity() if projection is None else projection()
        return module.to(device=like.device, dtype=like.dtype)

    return nn.ModuleList(
        Recursive(block, [made(next(block.parameters())) for _ in range(loops)], gated) for block in module_list
    )


# ------------------------------------------------------------------------------------------------------- the models


class Stage(nn.Module):
    """Blocks of one width, each used `loops` times in a row; `groups` has the slices of each use. Tokens (B, N, width) to the same.

    The first use has contiguous slices. Later ones have other neighbours: a new random permutation at each call in training, as released;
    in evaluation token i is in group i mod g (our choice: the released code is random there too, so that its outputs are not
    reproducible).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, np_hidden: int, rates: Sequence[float], groups: Sequence[int]
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, rate) for rate in rates)
        self.projections = nn.ModuleList(
            Projection(width, np_hidden) if np_hidden else nn.Identity() for _ in range(len(rates) * len(self.groups))
        )

    def forward(self, x: Tensor) -> Tensor:
        place = 0
        for block in self.blocks:
            for loop, groups in enumerate(self.groups):
                order: Order | Tensor = "contiguous" if loop == 0 else "strided"
                if self.training and loop and groups > 1:
                    order = torch.randperm(x.shape[1], device=x.device)
                x = self.projections[place](block(x, groups, order))
                place += 1
        return x


class Stem(nn.Module):
    """Three 3 x 3 convolutions, each with BatchNorm and ReLU: (B, in_chans, H, W) to (B, width, H/8, W/8) with strides of 2."""

    def __init__(self, in_chans: int, width: int, strides: tuple[int, int, int]) -> None:
        super().__init__()
        widths = (in_chans, width // 2, width, width)
        for place, (before, after, stride) in enumerate(zip(widths, widths[1:], strides, strict=False), 1):
            self.add_module(f"conv{place}", nn.Conv2d(before, after, 3, stride, 1))
            self.add_module(f"bn{place}", nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        for place in ("1", "2", "3"):
            x = F.relu(self.get_submodule(f"bn{place}")(self.get_submodule(f"conv{place}")(x)))
        return x


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the released checkpoints under our names.

    Their list has every block as often as it is used: those tensors must be equal. Raises ValueError where they are not.
    """
    found: dict[str, Tensor] = {}
    scalars: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        name = re.sub(r"^pools\.(\d+)\.conv\.", r"pools.\1.", key)
        if inside := re.fullmatch(r"transformers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            stage, place, rest = int(inside[1]), int(inside[2]), inside[3]
            used, projected = divmod(place, 2)
            where = f"projections.{used}" if projected else f"blocks.{used // LOOPS}"
            name = f"transformers.{stage}.{where}.{rest}"
        if scalar := re.fullmatch(r"(.+\.)coefficient(\d)\.bias", name):
            known = scalars.setdefault(scalar[1] + "coefficients", {})
            same = known.setdefault(int(scalar[2]), tensor)
        else:
            same = found.setdefault(name, tensor)
        if same is not tensor and not torch.equal(same, tensor):
            raise ValueError(f"state must have one tensor for all uses of a block, got another for {key}")
    return found | {name: torch.cat([by[i] for i in sorted(by)]) for name, by in scalars.items()}


@backbones(CONFIGS, layouts={"official": from_official})
class SReT(Backbone):
    """A pyramid of three stages: convolutional stem, learned positions, recursive stages, grouped convolutions between them, mean, norm.

    `depths` counts the blocks of each stage, `groups` has for each stage the slices of every use: as many entries as uses (2). Widths are
    `heads` * `head_dim`; an `np_mlp_ratio` of 0 leaves the projections out. Maps come out at strides 8, 16 and 32 (`stem_strides` are
    those of the three convolutions). Positions are a map of the size that the stem gives at `input_size`, interpolated for images of
    another one. Distilled models have the same architecture (`distillation_loss`).

    Slicing pays where attention is much of the work: at 224 x 224 it is a third without slices, and the rest (projections, MLPs) stays.
    Head width 42 (S) suits no matrix unit: pad it where that matters.
    """

    def __init__(
        self, *, head_dim: int, heads: tuple[int, int, int], mlp_ratio: float, np_mlp_ratio: float,
        depths: tuple[int, int, int] = (2, 5, 3), groups: Sequence[Sequence[int]] = SLICED, drop_path_rate: float = 0.1,
        stem_strides: tuple[int, int, int] = (2, 2, 2),
        num_classes: int = 1000, in_chans: int = 3, input_size: int = 224,
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, in_chans=in_chans, input_size=input_size)
        if len(groups) != len(depths) or len(heads) != len(depths) or not all(groups):
            raise ValueError(
                f"groups must have an entry a stage and in it one a use, as depths and heads have, got {groups}, {depths}, {heads}"
            )
        widths = [checks.whole("head_dim", head_dim, low=1) * checks.whole("heads", count, low=1) for count in heads]
        checks.number("drop_path_rate", drop_path_rate, low=0, below=1)
        checks.number("mlp_ratio", mlp_ratio, above=0)
        checks.number("np_mlp_ratio", np_mlp_ratio, low=0)
        self.channels, self.num_features = tuple(widths), widths[-1]
        first = math.prod(checks.whole("stem_strides", stride, low=1) for stride in stem_strides)
        self.strides = tuple(first * 2**stage for stage in range(len(depths)))
        uses = [
            len(of_stage) * checks.whole("depths", depth, low=1) for depth, of_stage in zip(depths, groups, strict=True)
        ]
        side = -(-input_size // first)
        self.patch_embed = Stem(in_chans, widths[0], stem_strides)
        self.pos_embed = nn.Parameter(torch.empty(1, widths[0], side, side))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.transformers = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            # as released: blocks are counted within their stage, uses before it
            rates = [drop_path_rate * (sum(uses[:stage]) + place) / sum(uses) for place in range(depth)]
            hidden, np_hidden = int(width * mlp_ratio), int(width * np_mlp_ratio)
            self.transformers.append(Stage(width, heads[stage], hidden, np_hidden, rates, groups[stage]))
        self.pools = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2, 1, groups=before) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.norm = nn.LayerNorm(widths[-1], EPS)
        self.head = classifier(widths[-1], num_classes)

    def stages(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.patch_embed(x)
        positions: Tensor = self.pos_embed
        if x.shape[2:] != positions.shape[2:]:
            resized = F.interpolate(positions.float(), size=x.shape[2:], mode="bicubic", align_corners=False)
            positions = resized.to(positions.dtype)
        x = x + positions
        for stage, stride in enumerate(self.strides):
            if stage:
                x = self.pools[stage - 1](x)
            x = tokens_to_map(self.transformers[stage](map_to_tokens(x)), *x.shape[2:])
            yield stride, x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (B, num_features, H/32, W/32), before the norm."""
        *_, (_, last) = self.stages(x)
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.norm(x.mean((2, 3)))
        out: Tensor = pooled if pre_logits else self.head(pooled)
        return out


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's distribution under the teacher's soft labels, the mean over a batch of logits (B, classes).

    Both are softmax(logits / temperature). The labels of the data are not used, and there is no distillation token.
    """
    checks.tensor("student", student, ndim=2)
    checks.tensor("teacher", teacher, shape=tuple(student.shape))
    checks.number("temperature", temperature, above=0)
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(-1))


# ------------------------------------------------------------------------------------------------------- in models of transformers


def register_sliced_attention(name: str = "assay_sliced", *, groups: int = 8, order: Order = "contiguous") -> str:
    """Make `attn_implementation=name` of transformers' encoders: attention inside of `groups` groups of tokens, in every layer.

    For encoders whose tokens are pooled, or that have unsliced layers elsewhere: a class token sees only its own group. Padded batches are
    attended to densely, by torch's SDPA. Returns the name. Raises ValueError when a causal model uses it, for sinks, and for inputs of
    fewer tokens than groups.
    """
    from assay.methods.core.attention.integration import Limits, register_function

    checks.whole("groups", groups, low=1)
    checks.choice("order", order, ORDERS)

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *,
        causal: bool, scale: float | None, limits: Limits, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if causal or sinks is not None or limits.start is not None or limits.window is not None:
            raise ValueError(f"{name} must be used in encoders: slices have no causal form, sinks or windows")
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        return sliced_attention(q, k, v, groups=groups, order=order, scale=scale)

    register_function(name, attend)
    return name
