"""XAttention: block-sparse prefill by antidiagonal scores (arXiv 2503.16428).

Which key blocks matter to a block of queries is estimated from 1/stride of QK^T. Attention is divided into stride x stride tiles, and
each tile is scored by the sum along its antidiagonal, which crosses every row and column once, and therefore every vertical or
slanted stripe. Softmax over those sums, added up over a block, is the block's score. The fewest blocks that hold a share `tau` of a
row's score are computed exactly, the others not at all. Decoding steps stay dense.

Scores and selection follow the paper and the official code by default. `our choice`, where those are silent: blocks lie on
absolute positions, so that the chunks of a chunked prefill choose as the whole prompt would; `tau = 1` keeps every block, even
one whose score rounds to nothing; batches, padding, any block size. `variant="as_released"` also keeps key block 0 in non-causal
selection, a side effect of the official indexing.

When NOT to use it: prompts of a few blocks (nothing to leave out), decoding, random data (no structure to find), retrieval tasks
that have not been checked at the chosen tau, models whose attention has soft caps or position biases, and layers whose sliding
window is only a few blocks long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks
from assay.methods.core import kernels
from assay.methods.core.attention.integration import (
    can_register,
    capture_qk,
    layer_of,
    parse_settings,
    register_attention,
    set_attention,
    settings_of,
    share_reached,
    store_settings,
)
from assay.methods.core.attention.plan import (
    CHUNK,
    AttentionPlan,
    Backend,
    PlanPrecision,
    execute,
    in_bf16,
    kernel_refuses,
    kernel_time,
    scale_of,
    unit_stride,
)
from assay.methods.core.layers.surgery import takes_token_ids
from assay.methods.transform import Effect, Fit, TuneContext

Order = Literal["antidiagonal", "slash", "random"]
Variant = Literal["paper", "as_released"]
ScoreBackend = Literal["auto", "kernel", "torch"]
NAME = "assay_xattention"  # as attn_implementation


# --------------------------------------------------------------------------------------------------------------- scores


def tile_scores(q: Tensor, k: Tensor, stride: int, *, order: Order = "antidiagonal") -> Tensor:
    """W: (batch, heads, queries / stride, keys / stride), one sum of QK^T (unscaled) for each stride x stride tile.

    W[a, b] = sum over i < stride of q[stride * a + stride - 1 - i] . k[stride * b + i], the antidiagonal of the tile; "slash"
    takes its diagonal, and "random" a fixed random pairing (ablations of the official code). q (batch, heads, queries, dim),
    k (batch, key heads, keys, dim), both lengths multiples of stride. queries * keys * dim / stride MACs (1 MAC = 2 FLOPs).
    With an even stride these are pairs at odd distances only: a slanted line one token wide at an even one is not seen.
    """
    checks.choice("order", order, get_args(Order))
    batch, heads, queries, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, stride, dim)
    if order == "antidiagonal":
        rows = rows.flip(3)
    elif order == "random":
        rows = rows[..., torch.randperm(stride, generator=torch.Generator().manual_seed(0)).to(q.device), :]
    columns = k.reshape(batch, k.shape[1], -1, stride * dim)
    return (rows.flatten(3) @ columns.transpose(-1, -2)).view(batch, heads, queries // stride, -1)


def _check_stride(stride: int, block: int) -> None:
    if checks.whole("block", block, low=1) % checks.whole("stride", stride, low=1):
        raise ValueError(f"stride must divide block ({block}), got {stride}")


def block_scores(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 8,
    block: int = 128,
    causal: bool = True,
    scale: float | None = None,
    norm: float = 1.0,
    order: Order = "antidiagonal",
    key_start: Tensor | None = None,
    window: int | None = None,
    precision: PlanPrecision = "input",
    backend: ScoreBackend = "auto",
) -> Tensor:
    """Estimated attention mass of each block: (batch, heads, query blocks, key blocks) float32, on the grid of `AttentionPlan`.

    Softmax of `tile_scores` * scale / (stride * norm), tiles at the edges of what is seen included whole, summed over the tiles of a
    block: rows sum to block / stride, or less where a query block is not full. With stride 1 they are the exact masses.
    q (batch, heads, queries, dim) and k (batch, key heads, keys, dim) after rotary embedding; queries are the last of the
    keys. `key_start` and `window` as in `AttentionPlan`. `precision="bf16"` (and "int8") multiplies in bfloat16.
    `backend="kernel"` is C++ on the CPU, "torch" works in chunks of queries of bounded memory; "auto" takes the kernel where it can.
    Raises TypeError for arguments of another kind, ValueError for a stride that does not divide the block, an unknown order or
    backend, or tensors that do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        checks.tensor(name, x, shape=("batch", "heads", "tokens", "dim"), empty=True)
    checks.together(q=q, k=k)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    grid = AttentionPlan(q.shape[2], k.shape[2], block, causal, None, key_start, window)
    _check_stride(stride, block)
    checks.choice("order", order, get_args(Order))
    checks.choice("backend", backend, get_args(ScoreBackend))
    checks.choice("precision", precision, get_args(PlanPrecision))
    factor = scale_of(scale, q) / (stride * checks.number("norm", norm, above=0))
    refused = kernel_refuses(q, k, k, block=block) if order == "antidiagonal" else "has only the antidiagonal order"
    if backend == "kernel" and refused:
        raise ValueError(f"backend 'kernel' {refused}")
    if backend != "torch" and not refused:
        start = None if key_start is None else key_start.cpu().contiguous()
        options = (start, stride, block, causal, factor, in_bf16(q.dtype, precision))
        reach = window if window is not None and grid.windowed else 0
        kernels.ran("xattention scores", "kernel")
        found = torch.ops.assay.antidiagonal_scores(unit_stride(q), unit_stride(k), *options, window=reach)
        return cast(Tensor, found)
    kernels.ran("xattention scores", "torch")
    if precision != "input":
        q, k = q.bfloat16(), k.bfloat16()
    return _block_scores(grid, q, k, stride, factor, order)


def _block_scores(grid: AttentionPlan, q: Tensor, k: Tensor, stride: int, factor: float, order: Order) -> Tensor:
    batch, heads, block, device = q.shape[0], q.shape[1], grid.block, q.device
    lead, tail = grid.offset - grid.first_block * block, grid.key_blocks * block - grid.keys
    first = torch.zeros(batch, dtype=torch.int64) if grid.key_start is None else grid.key_start
    first = first.to(device)[:, None]  # (batch, 1)
    positions = torch.arange(grid.keys, device=device)
    padding = (positions < first)[:, None, :, None]  # padding counts as zeros, like the tokens missing from a tile
    q = F.pad(q.masked_fill(padding[:, :, grid.offset :], 0), (0, 0, lead, tail))
    k = F.pad(k.masked_fill(padding, 0), (0, 0, 0, tail))
    per_block, tiles = block // stride, grid.key_blocks * block // stride
    tile = torch.arange(tiles, device=device)
    key_tile = (tile * stride < grid.keys) & ((tile + 1) * stride > first)  # (batch, tiles)
    query_tile = key_tile & ((tile + 1) * stride > grid.offset)
    scores = torch.zeros(batch, heads, grid.query_blocks, grid.key_blocks, device=device)
    step = max(1, CHUNK // (batch * heads * per_block * tiles))
    for i in range(0, grid.query_blocks, step):
        blocks = min(step, grid.query_blocks - i)
        columns = (grid.first_block + i + blocks) * per_block if grid.causal else tiles
        begin = 0  # tiles before it have left the window of every row here
        if grid.window is not None:
            begin = max(0, (grid.first_block + i) * block - grid.window + 1) // block * per_block
        rows = torch.arange(blocks * per_block, device=device) + (grid.first_block + i) * per_block
        part = tile_scores(
            q[:, :, i * block : (i + blocks) * block], k[:, :, begin * stride : columns * stride], stride, order=order
        )
        seen = key_tile[:, None, None, begin:columns]
        if grid.causal:
            seen = seen & (tile[begin:columns] <= rows[:, None])
        if grid.window is not None:
            seen = seen & ((tile[begin:columns] + 1) * stride > (rows * stride - grid.window + 1)[:, None])
        there = query_tile[:, None, rows, None]
        share = (part.float() * factor).masked_fill(~(seen | ~there), -torch.inf).softmax(-1)
        share = share.masked_fill(~there, 0.0)
        mass = share.view(batch, heads, blocks, per_block, -1, per_block).sum((3, 5))
        scores[:, :, i : i + blocks, begin // per_block : begin // per_block + mass.shape[-1]] = mass
    return scores


# ------------------------------------------------------------------------------------------------------------ selection


def select(
    scores: Tensor,
    *,
    tau: float | Tensor = 0.9,
    causal: bool = True,
    keep_sink: bool = False,
    keep_recent: bool = False,
    sink: Tensor | None = None,
    allowed: Tensor | None = None,
    variant: Variant = "paper",
) -> Tensor:
    """The fewest blocks of each row whose scores reach tau of the row's sum: bool, in the shape of `scores`.

    `scores` is (batch, heads, query blocks, key blocks) with the queries at the end of the keys. Causal: no block above the
    diagonal; the first block (`sink`, int64 (batch,), where padding moves it) and the diagonal one are always kept, and
    counted first. Not causal: `keep_sink` keeps block 0 of every row, `keep_recent` the diagonal. `tau` is in [0, 1], one
    number or one a head (heads,). `allowed`, bool that broadcasts to `scores`, is False where a window leaves a whole block out.
    Raises TypeError for arguments of another kind, ValueError for another shape, tau or variant.
    """
    checks.tensor("scores", scores, empty=True)
    if scores.ndim != 4 or scores.shape[2] > scores.shape[3]:
        raise ValueError(
            f"scores must be (batch, heads, query blocks, key blocks), at least as many keys, got {tuple(scores.shape)}"
        )
    checks.choice("variant", variant, get_args(Variant))
    level = _levels(tau, scores.shape[1]).to(scores.device).view(-1, 1, 1)
    blocks = scores.shape[3]
    column = torch.arange(blocks, device=scores.device)
    diagonal = column[blocks - scores.shape[2] :, None]
    first = torch.zeros(1, dtype=torch.int64) if sink is None else sink
    first = first.to(scores.device)[:, None, None, None]
    visible = (column >= first) & ((column <= diagonal) if causal else (column == column))
    allowed = visible if allowed is None else visible & allowed.to(scores.device)
    forced = torch.zeros_like(allowed)
    if causal or keep_sink or variant == "as_released":
        forced = forced | (column == first)
    if causal or keep_recent:
        forced = forced | (column == diagonal)
    forced = (forced & allowed).expand(scores.shape)
    allowed = allowed.expand(scores.shape)
    inside = scores.double().masked_fill(~allowed, 0.0)
    missing = level * inside.sum(-1, keepdim=True) - (inside * forced).sum(-1, keepdim=True)
    ranked, order = inside.masked_fill(forced, 0.0).sort(dim=-1, descending=True, stable=True)
    wanted = ranked.cumsum(-1) - ranked < missing
    kept = torch.zeros_like(forced).scatter(-1, order, wanted) | (level >= 1)
    return (kept & allowed) | forced


def _levels(tau: float | Tensor, heads: int) -> Tensor:
    if not isinstance(tau, Tensor):
        return torch.tensor(checks.number("tau", tau, low=0, high=1), dtype=torch.float64)
    level = checks.tensor("tau", tau).double()
    if level.ndim > 1 or (level.ndim == 1 and len(level) != heads):
        raise ValueError(f"tau must be one number or one for each of {heads} heads, got {tuple(level.shape)}")
    if not ((level >= 0) & (level <= 1)).all():
        raise ValueError(f"tau must lie in [0, 1], got {level.tolist()}")
    return level


# ------------------------------------------------------------------------------------------------------------- operator


@dataclass(frozen=True)
class XAttentionSettings:
    """How blocks are chosen and computed; the defaults are the paper's. Raises TypeError and ValueError for invalid values.

    `tau` is one number in [0, 1] or a tensor with one a head; `stride` (8 or 16) divides `block`. `norm`, `keep_sink`, `keep_recent`
    and `variant` as in `block_scores` and `select`; `backend` and `precision` as in `execute`.

    >>> XAttentionSettings(tau=0.95, stride=16).block
    128
    """

    tau: float | Tensor = 0.9
    stride: int = 8
    block: int = 128
    norm: float = 1.0
    keep_sink: bool = False
    keep_recent: bool = False
    backend: Backend = "auto"
    precision: PlanPrecision = "input"
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        _check_stride(self.stride, self.block)
        checks.number("norm", self.norm, above=0)
        if not isinstance(self.tau, Tensor):
            checks.number("tau", self.tau, low=0, high=1)
        for name in ("keep_sink", "keep_recent"):
            checks.flag(name, getattr(self, name))
        checks.choice("backend", self.backend, get_args(Backend))
        checks.choice("precision", self.precision, get_args(PlanPrecision))
        checks.choice("variant", self.variant, get_args(Variant))


PAPER = XAttentionSettings()


def xattention_plan(
    q: Tensor,
    k: Tensor,
    settings: XAttentionSettings = PAPER,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_start: Tensor | None = None,
    window: int | None = None,
    **changes: Any,
) -> AttentionPlan:
    """The blocks that XAttention computes, as a plan to `execute`; `changes` replace single settings (tau=0.95).

    q, k, `key_start` and `window` as in `block_scores`. A single query (decoding) and up to two key blocks (all of which would be
    kept) give the dense plan, unscored.
    """
    chosen = replace(settings, **changes)
    dense = AttentionPlan(q.shape[2], k.shape[2], chosen.block, causal, None, key_start, window)
    _levels(chosen.tau, q.shape[1])
    if dense.queries == 1 or (causal and dense.key_blocks <= 2):
        return dense
    where: dict[str, Any] = {"block": chosen.block, "causal": causal, "key_start": key_start, "window": window}
    how: dict[str, Any] = {"stride": chosen.stride, "norm": chosen.norm, "precision": chosen.precision}
    scores = block_scores(q, k, scale=scale, **where, **how)
    kept = select(
        scores,
        tau=chosen.tau,
        causal=causal,
        keep_sink=chosen.keep_sink,
        keep_recent=chosen.keep_recent,
        sink=None if key_start is None else key_start // chosen.block,
        allowed=dense.allowed() if dense.windowed else None,
        variant=chosen.variant,
    )
    return replace(dense, mask=kept)


def xattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: XAttentionSettings = PAPER,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_start: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    **changes: Any,
) -> Tensor:
    """XAttention of q (batch, heads, queries, dim) over k, v (batch, key heads, keys, dim): (batch, heads, queries, dim).

    Inputs are real queries and keys after rotary embedding. `changes` replace single settings; the other arguments as in
    `xattention_plan` and `execute`.

    >>> q, k, v = torch.randn(3, 1, 2, 256, 16).unbind()
    >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> bool(torch.allclose(xattention(q, k, v, tau=1.0, block=64), exact, atol=1e-5))
    True
    """
    chosen = replace(settings, **changes)
    plan = xattention_plan(q, k, chosen, causal=causal, scale=scale, key_start=key_start, window=window)
    return execute(plan, q, k, v, backend=chosen.backend, scale=scale, precision=chosen.precision, sinks=sinks)


# ----------------------------------------------------------------------------------------------------------- thresholds


def calibrate_thresholds(
    layers: Iterable[Sequence[Tensor]], *, stride: int = 8, block: int = 128, coverage: float = 0.9
) -> Tensor:
    """One tau for each layer and head: (layers, heads) float32, by the procedure of the released profiler.

    `layers` holds (q, k, ...) of each layer on one long text. For every row the smallest set of blocks that covers `coverage`
    of the true mass is taken; tau of the head is the estimated mass of all blocks that score at least as much as the lowest of
    such a set, pooled over rows. For several texts take the maximum over their tables, as released. Costs a dense QK^T.
    """
    checks.number("coverage", coverage, above=0, high=1)
    table = []
    for q, k, *_ in layers:
        true = block_scores(q, k, stride=1, block=block).double()
        guess = block_scores(q, k, stride=stride, block=block).double()
        ranked, order = true.sort(dim=-1, descending=True, stable=True)
        needed = ranked.cumsum(-1) - ranked < coverage * ranked.sum(-1, keepdim=True)
        lowest = guess.gather(-1, order).masked_fill(~needed, torch.inf).amin(-1, keepdim=True)
        covered = guess.masked_fill(guess < lowest, 0.0).sum((0, 2, 3))
        table.append((covered / guess.sum((0, 2, 3))).clamp(max=1.0).float())
    if not table:
        raise ValueError("layers must hold at least one layer")
    return torch.stack(table)


def search_thresholds(
    layers: Iterable[Sequence[Tensor]],
    *,
    density: float,
    stride: int = 8,
    block: int = 128,
    start: float = 0.95,
    factor: float = 0.9,
    steps: int = 16,
) -> Tensor:
    """One tau for each layer and head: (layers, heads) float32, that keeps most true mass within `density` of the blocks.

    The paper's search: each head's threshold may be lowered step by step (tau = start * factor ** m), and dynamic programming
    over the heads finds the best numbers of steps. `our choice`, where the paper leaves it open: performance is the exact mass
    kept, which adds up over heads; the budget is the share of computed blocks over all layers and heads.
    `layers` as in `calibrate_thresholds`. Raises ValueError when even the lowest thresholds compute more than `density`.
    """
    checks.number("density", density, above=0, high=1)
    checks.number("start", start, above=0, high=1)
    checks.number("factor", factor, above=0, below=1)
    checks.whole("steps", steps, low=1)
    levels = [start * factor**m for m in range(steps)]
    costs, gains, heads = [], [], 0
    for q, k, *_ in layers:
        true = block_scores(q, k, stride=1, block=block).double()
        guess = block_scores(q, k, stride=stride, block=block)
        kept = torch.stack([select(guess, tau=level) for level in levels])  # (steps, batch, heads, rows, columns)
        allowed = AttentionPlan(q.shape[2], k.shape[2], block).allowed().sum() * q.shape[0]
        costs.append(kept.sum((1, 3, 4)).double() / allowed)
        gains.append((kept * true).sum((1, 3, 4)) / true.sum((0, 2, 3)))
        heads = q.shape[1]
    if not costs:
        raise ValueError("layers must hold at least one layer")
    cost, gain = torch.cat(costs, dim=1).T, torch.cat(gains, dim=1).T  # (all heads, steps)
    units = 4 * len(cost) * steps  # resolution of the budget
    price = (cost * units / (density * len(cost))).ceil().long()
    if int(price.amin(1).sum()) > units:
        lowest = cost.amin(1).mean().item()
        raise ValueError(f"density must be at least {lowest:.3f} with these steps, got {density}")
    best = torch.zeros(units + 1, dtype=torch.float64)  # most mass for each spending, over the heads so far
    choices = []
    for prices, values in zip(price.tolist(), gain, strict=True):
        options = torch.full((steps, units + 1), -torch.inf, dtype=torch.float64)
        for m, paid in enumerate(prices):
            if paid <= units:
                options[m, paid:] = best[: units + 1 - paid] + values[m]
        best, choice = options.max(0)
        choices.append(choice)
    left, taus = units, []
    for prices, choice in zip(reversed(price.tolist()), reversed(choices), strict=True):
        m = int(choice[left])
        taus.append(levels[m])
        left -= prices[m]
    return torch.tensor(taus[::-1]).view(-1, heads)


# --------------------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class XAttentionConfig:
    """Settings of `attn_implementation="assay_xattention"`, kept in the model's config as `xattention`, a plain dictionary.

    `tau` is one number, one for each layer, or a (layers, heads) table. Layers in `dense_layers` stay dense, and so do prompts
    shorter than `min_tokens` and layers whose sliding window is. `precision` as in `execute`: "bf16" lets a float32 model multiply
    attention in bfloat16, as estimates always are, and "int8" multiplies the kept blocks' scores in integers. The tuner is not
    offered that: at the densities of real prompts it saves little of the time, since each block of queries is quantised for few
    keys.
    """

    tau: float | Sequence[float] | Sequence[Sequence[float]] = 0.9
    stride: int = 8
    block: int = 128
    dense_layers: Sequence[int] = ()
    min_tokens: int = 512
    backend: Backend = "auto"
    precision: PlanPrecision = "input"
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        checks.whole("min_tokens", self.min_tokens, low=0)
        checks.choice("precision", self.precision, get_args(PlanPrecision))
        if not isinstance(self.dense_layers, list | tuple):
            raise TypeError(f"dense_layers must be a list of layer numbers, got {self.dense_layers!r}")
        for layer in self.dense_layers:
            checks.whole("dense_layers", layer, low=0)
        single = self.tau
        if isinstance(single, Sequence) and not isinstance(single, str):
            try:
                tau = torch.tensor(single, dtype=torch.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"tau must be a number, one a layer, or (layers, heads), got {single!r}") from error
            if _holds_flag(single) or tau.ndim > 2 or not tau.numel() or not ((tau >= 0) & (tau <= 1)).all():
                raise ValueError(f"tau must be numbers in [0, 1], one, one a layer, or (layers, heads), got {single!r}")
            single = 0.9
        self._settings(single)  # which checks them

    def _settings(self, tau: float | Tensor) -> XAttentionSettings:
        return XAttentionSettings(
            tau, self.stride, self.block, backend=self.backend, precision="bf16", variant=self.variant
        )

    def of(self, module: nn.Module) -> XAttentionSettings | None:
        """The settings of one attention module; None where it stays dense."""
        if isinstance(self.tau, int | float) and not self.dense_layers:
            return self._settings(self.tau)
        layer = layer_of(module)
        if layer in self.dense_layers:
            return None
        if isinstance(self.tau, int | float):
            return self._settings(self.tau)
        row = self.tau[layer]
        return self._settings(row if isinstance(row, int | float) else torch.tensor(row))

    def check(self, layers: int, heads: int) -> None:
        """Raise ValueError where the settings do not fit a model of so many layers and query heads."""
        shape = tuple(torch.as_tensor(self.tau).shape)
        if shape not in ((), (layers,), (layers, heads)):
            raise ValueError(f"tau must be a number, ({layers},) or ({layers}, {heads}) for this model, got {shape}")
        if wrong := [layer for layer in self.dense_layers if not 0 <= layer < layers]:
            raise ValueError(f"dense_layers must be from 0 to {layers - 1}, got {wrong}")


def _plan_of_module(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    scale: float | None,
    key_start: Tensor | None,
    window: int | None,
) -> tuple[AttentionPlan, Mapping[str, Any]]:
    config = settings_of(module, "xattention", XAttentionConfig)
    options = {"backend": config.backend, "precision": config.precision}
    where: dict[str, Any] = {"causal": causal, "key_start": key_start, "window": window}
    settings = config.of(module)
    if settings is None or min(k.shape[2], window or k.shape[2]) < config.min_tokens:
        return AttentionPlan(q.shape[2], k.shape[2], config.block, **where), options
    return xattention_plan(q, k, settings, scale=scale, **where), options


def register() -> None:
    """Register `attn_implementation="assay_xattention"` with transformers (which this imports); may be called repeatedly.

    Then `AutoModelForCausalLM.from_pretrained(folder, attn_implementation="assay_xattention")` or
    `model.set_attn_implementation("assay_xattention")`, with settings in `model.config.xattention` if not the defaults.
    """
    register_attention(NAME, _plan_of_module)


# ------------------------------------------------------------------------------------------------------------ transform


class XAttention:
    """Block-sparse prefill for the tuner. Configuration: the settings of `XAttentionConfig`; `tau` may also be "calibrated",
    then `calibrate_thresholds` runs on the longest calibration text when the configuration is applied."""

    name = "xattention"
    slot = "attention"
    goals: frozenset[str] = frozenset({"ttft"})
    exact = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if reason := can_register(model):
            return Fit(False, reason)
        if context.prompt_tokens < 1024:
            return Fit(False, f"prompts of {context.prompt_tokens} tokens leave nothing to skip (1024 needed)")
        share, reached, reason = share_reached(model, context.prompt_tokens, 1024, "stay dense")
        if reason:
            return Fit(False, reason, share=share)
        density = _expected_density(context.prompt_tokens) * share + 1 - share
        gain = kernel_time() if _on_cpu(model) else 1.0  # see attention_backend
        return Fit(True, "", (Effect("attention", macs=gain * (density + 1 / 16), bytes=density),), share, reached)

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [
            {"tau": 0.95, "stride": 8, "block": 64},
            {"tau": 0.98, "stride": 8, "block": 64},
            {"tau": 0.9, "stride": 16, "block": 64},
            {"tau": 0.95, "stride": 16, "block": 128},
        ]

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError naming the setting that is wrong."""
        calibrated = isinstance(config, Mapping) and config.get("tau") == "calibrated"
        parse_settings(XAttentionConfig, {**config, "tau": 0.9} if calibrated else config)

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        """Raises TypeError or ValueError, before anything is changed, for a configuration or a model it does not fit."""
        self.check(config)
        if reason := can_register(model):
            raise ValueError(f"xattention does not fit this model: {reason}")
        text = cast(Any, model).config.get_text_config()
        values = dict(config)
        if values.get("tau") == "calibrated":
            if not context.calibration:
                raise ValueError("tau 'calibrated' needs calibration texts, got none")
            if not takes_token_ids(model):
                raise ValueError(f"tau 'calibrated' needs a model of texts, got {type(model).__name__}")
            parse_settings(XAttentionConfig, {**values, "tau": 0.9}).check(
                text.num_hidden_layers, text.num_attention_heads
            )
            longest = max(context.calibration, key=lambda ids: ids.shape[-1])
            shape = {name: values[name] for name in ("stride", "block") if name in values}
            values["tau"] = calibrate_thresholds(capture_qk(model, longest), **shape).tolist()
        settings = parse_settings(XAttentionConfig, values)
        settings.check(text.num_hidden_layers, text.num_attention_heads)
        store_settings(model, "xattention", settings)
        register()
        return set_attention(model, NAME)

    def describe(self, config: Mapping[str, Any]) -> str:
        tau = config.get("tau", XAttentionConfig.tau)
        return f"block-sparse attention at {'calibrated' if isinstance(tau, str) else 'tau'} {_told(tau)}"


def _holds_flag(values: Any) -> bool:
    """Whether True or False is among numbers, however deep."""
    return any(map(_holds_flag, values)) if isinstance(values, list | tuple) else isinstance(values, bool)


def _told(tau: Any) -> str:
    """A threshold in words."""
    return "thresholds" if isinstance(tau, str) else f"{tau:g}" if isinstance(tau, int | float) else "of each layer"


def _on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


def _expected_density(tokens: int) -> float:
    """Share of 64-token blocks kept at tau 0.95, measured on SmolLM2-135M and text: 0.43 at 2048 tokens, 0.24 at 8000."""
    return float(min(1.0, 0.43 * (2048 / tokens) ** 0.4))


transform = XAttention()
