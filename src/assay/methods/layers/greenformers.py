"""Greenformers: low-rank layers in place of dense ones, and what they save (arXiv 2108.10808; layers from ICASSP 2020).

A linear layer y = x W^T + b with W (o, i) becomes a linear encoder-decoder (LED), y = (x E^T) D^T + b with E (r, i), D (o, r):
r (i + o) parameters and MACs per token instead of i o, a gain below the break-even rank i o / (i + o). Convolutions become CED
units. `apply_low_rank` converts a trained model; a Low-Rank Transformer (LRT) is a transformer built from LED units
(`EncoderBlock(rank=...)`), trained from scratch. Linformer, the thesis' other route, shortens the attention's sequence instead.

When NOT to use it: a trained language model at half its parameters is destroyed without training afterwards (look at the
report's errors, and at the quality); close to the break-even rank two thin products run slower than one; layers that do little
work (small models at batch 1 on a GPU) cost their launches, not their MACs.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.methods.layers.surgery import CONVOLUTIONS, LayerCost, cost, find, linear_kinds, swap, tied_names, untie
from assay.methods.transform import Effect, Fit, TuneContext

Solver = Literal["svd", "data_svd", "random", "nmf", "snmf"]
SOLVERS: tuple[Solver, ...] = ("svd", "data_svd", "random", "nmf", "snmf")


# ----------------------------------------------------------------------------------------------------------------- units


class LED(nn.Module):
    """Linear encoder-decoder: `encoder` (i -> rank, no bias), then `decoder` (rank -> o, with the bias). (..., i) -> (..., o)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, **options: Any) -> None:
        super().__init__()
        _whole_rank(rank)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.encoder = nn.Linear(in_features, rank, bias=False, **options)
        self.decoder = nn.Linear(rank, out_features, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out

    def merged(self) -> nn.Linear:
        """The dense layer with the same action."""
        return _linear(_product(self.decoder.weight, self.encoder.weight), self.decoder.bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class CED(nn.Module):
    """Convolutional encoder-decoder: the convolution to `rank` channels, then one of size 1 to the outputs, with the bias.

    Stride, padding, dilation and groups are the first one's. The second is grouped as well (our choice): then a grouped
    convolution is factored exactly, group by group; `rank` is a multiple of the groups.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @classmethod
    def like(cls, conv: nn.Module, rank: int) -> CED:
        """A unit with fresh weights in the shape of `conv`. Raises ValueError when `rank` is no multiple of its groups."""
        c: Any = conv
        _whole_rank(rank)
        if rank % c.groups:
            raise ValueError(f"rank must be a multiple of the {c.groups} groups, got {rank}")
        options = {"device": c.weight.device, "dtype": c.weight.dtype}
        shape = {name: getattr(c, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        encoder = type(c)(c.in_channels, rank, c.kernel_size, groups=c.groups, bias=False, **shape, **options)
        decoder = type(c)(rank, c.out_channels, 1, groups=c.groups, bias=c.bias is not None, **options)
        return cls(encoder, decoder).train(c.training)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out

    def merged(self) -> nn.Module:
        """The one convolution with the same action."""
        first: Any = self.encoder
        second: Any = self.decoder
        dense: nn.Module = copy.deepcopy(first)
        dense.out_channels = second.out_channels
        pairs = zip(second.weight.chunk(first.groups), first.weight.chunk(first.groups), strict=True)
        weight = torch.cat([_product(d.flatten(1), e.flatten(1)) for d, e in pairs])
        dense.weight = nn.Parameter(weight.reshape(second.out_channels, *first.weight.shape[1:]))
        dense.bias = second.bias
        return dense


class LEDEmbedding(nn.Module):
    """A factored embedding: `codes` (V, rank), then `decoder` (rank -> d). (...) int64 -> (..., d)."""

    def __init__(self, codes: nn.Embedding, decoder: nn.Linear) -> None:
        super().__init__()
        self.codes, self.decoder = codes, decoder
        self.num_embeddings, self.embedding_dim = codes.num_embeddings, decoder.out_features
        self.padding_idx = codes.padding_idx

    @property
    def rank(self) -> int:
        """Width of `codes`."""
        return self.codes.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.codes(ids))
        return out

    def merged(self) -> nn.Embedding:
        """The table with the same action."""
        weight = _product(self.codes.weight, self.decoder.weight.T)
        return _embedding(weight, self.padding_idx)


UNITS: tuple[type[nn.Module], ...] = (LED, CED, LEDEmbedding)


def _linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer around a weight (o, i), without drawing a fresh one first. The bias stays the parameter it is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous())
    layer.bias = bias  # type: ignore[assignment]
    return layer


def _embedding(weight: Tensor, padding_idx: int | None) -> nn.Embedding:
    """A table around a weight (V, d), without drawing a fresh one first."""
    table = nn.Embedding(len(weight), weight.shape[1], padding_idx=padding_idx, device="meta")
    table.weight = nn.Parameter(weight.detach().contiguous())
    return table


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.detach().double() @ b.detach().double()).to(a.dtype)


def _whole_rank(rank: int) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")


def break_even_rank(module: nn.Module) -> float:
    """The rank at which the factored layer has as many parameters as the dense one; below it there is a gain.

    i o / (i + o) for a linear layer; for a convolution the kernel counts, c K o / (c K + o) a group (c, o: channels in and out
    of a group, K: kernel entries), times the groups.
    """
    rows, columns, groups = _shape(module)
    return groups * rows * columns / (rows + columns)


def _shape(module: Any) -> tuple[int, int, int]:
    """(outputs, inputs, groups) of the matrix, or of each group's matrix."""
    if type(module) in CONVOLUTIONS:
        return module.out_channels // module.groups, math.prod(module.weight.shape[1:]), module.groups
    rows, columns = _matrix(module).shape
    return rows, columns, 1


def _matrix(module: Any) -> Tensor:
    """The weight as (outputs, inputs): transposed for Conv1D; an embedding is read as the head it could be."""
    weight: Tensor = module.weight
    return weight.T if type(module) is linear_kinds()[1] else weight


# --------------------------------------------------------------------------------------------------------------- solvers


def output_basis(weight: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal output directions U (o, k), k = min(o, i), and the energy (k,) of each, falling, in float64.

    With C = `moment` (i, i), the second moment of the layer's inputs, energy is that of the outputs W x, and U_r U_r^T W is the
    rank-r matrix with the least output error |X (W - W_r)^T|_F; without it C = I, and energies are squared singular values:
    the plain truncated SVD. The decomposition is of a min(o, i) square matrix.
    """
    w = weight.detach().double()
    c = None if moment is None else moment.to(w)
    if w.shape[0] <= w.shape[1]:
        energy, directions = _eigh(w @ w.T if c is None else w @ c @ w.T)
        return directions, energy
    spread = w
    if c is not None:
        values, vectors = _eigh(c)
        spread = w @ (vectors * values.sqrt())
    energy, directions = _eigh(spread.T @ spread)
    return torch.linalg.qr(spread @ directions).Q, energy


def _eigh(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) of a positive semi-definite matrix, falling, none below 0, and their vectors (k, k).

    Up to 1024 on one thread: more gain little there, and lose a hundredfold when something else runs on the machine.
    """
    before = torch.get_num_threads()
    try:
        if len(square) <= 1024:
            torch.set_num_threads(1)
        values, vectors = torch.linalg.eigh(square)
    finally:
        torch.set_num_threads(before)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def truncate(weight: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """D (o, rank) and E (rank, i) with D E = U_r U_r^T W, the scale shared equally between them (our choice)."""
    d = basis[:, :rank]
    e = d.T @ weight.detach().double()
    scale = e.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return (d * scale).to(weight.dtype), (e / scale[:, None]).to(weight.dtype)


def factor(
    weight: Tensor,
    rank: int,
    solver: Solver = "svd",
    *,
    moment: Tensor | None = None,
    num_iter: int = 10,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """D (o, rank) and E (rank, i) with D E close to `weight` (o, i).

    "svd": exact truncated SVD. "data_svd": least output error for inputs of second moment `moment`. "nmf": both factors
    non-negative (hierarchical alternating least squares). "snmf": D non-negative, E free. The last two take `num_iter` rounds
    and start from `seed`. "random": fresh weights, to be trained.
    Raises ValueError for an unknown solver, a rank outside 1..min(o, i), or "data_svd" without `moment`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must lie in 1..{min(weight.shape)} for a {tuple(weight.shape)} weight, got {rank}")
    if solver == "data_svd" and moment is None:
        raise ValueError("moment must be given with solver 'data_svd'")
    if solver in ("svd", "data_svd"):
        basis, _ = output_basis(weight, moment if solver == "data_svd" else None)
        return truncate(weight, basis, rank)
    generator = torch.Generator().manual_seed(seed)
    if solver == "random":
        bounds = [1 / math.sqrt(rank), 1 / math.sqrt(weight.shape[1])]  # what a fresh nn.Linear has
        shapes = [(weight.shape[0], rank), (rank, weight.shape[1])]
        d, e = ((torch.rand(s, generator=generator) * 2 - 1) * b for s, b in zip(shapes, bounds, strict=True))
        return d.to(weight), e.to(weight)
    w = weight.detach().double().cpu()
    start = torch.rand(sum(w.shape), rank, generator=generator, dtype=w.dtype) * (w.abs().mean() / rank).sqrt() * 2
    d, e = (_nmf if solver == "nmf" else _semi_nmf)(w, start[: w.shape[0]], start[w.shape[0] :].T, num_iter)
    return d.to(weight), e.to(weight)


def _nmf(w: Tensor, d: Tensor, e: Tensor, num_iter: int) -> tuple[Tensor, Tensor]:
    """Column by column the non-negative least-squares optimum with the rest fixed: the error never rises."""
    d, e = d.clone(), e.clone()
    for _ in range(num_iter):
        for target, here, there in ((w, d, e), (w.T, e.T, d.T)):  # here and there are views: updated in place
            gram, against = there @ there.T, target @ there.T
            for k in range(here.shape[1]):
                step = (against[:, k] - here @ gram[:, k]) / gram[k, k].clamp(min=1e-12)
                here[:, k] = (here[:, k] + step).clamp(min=0)
    return d, e


def _semi_nmf(w: Tensor, d: Tensor, e: Tensor, num_iter: int) -> tuple[Tensor, Tensor]:
    """E by least squares, D by multiplicative steps that keep it non-negative (Ding, Li and Jordan 2010)."""
    for _ in range(num_iter):
        e = torch.linalg.lstsq(d, w, driver="gelsd").solution
        against, gram = w @ e.T, e @ e.T
        up = against.clamp(min=0) + d @ (-gram).clamp(min=0)
        down = (-against).clamp(min=0) + d @ gram.clamp(min=0)
        d = d * (up / down.clamp(min=1e-12)).sqrt()
    return d, torch.linalg.lstsq(d, w, driver="gelsd").solution


@torch.no_grad()
def input_moments(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable[Any]) -> dict[str, Tensor]:
    """Second moment x^T x (i, i), float64, summed over every token that reaches each linear layer.

    `calibration` holds model inputs: tensors, or dicts of keyword arguments, whose 2-D "attention_mask" keeps padding out.
    Layers that are given the same tensor (queries, keys and values) share one moment.
    Raises ValueError when it is empty or a layer never ran.
    """
    moments: dict[str, Tensor] = {}
    last: dict[str, Any] = {"input": None, "moment": None, "mask": None}

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if last["input"] is not x:
                mask = last["mask"]
                kept = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
                last["input"], last["moment"] = x, (kept.float().T @ kept.float()).double()
            moments[name] = moments[name] + last["moment"] if name in moments else last["moment"]

        return observe

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    training = model.training
    model.eval()
    try:
        for inputs in calibration:
            last["mask"] = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            last["input"] = None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in moments]:
        raise ValueError(
            f"calibration never reached layer {missing[0]!r}" if moments else "calibration must hold inputs, got none"
        )
    return moments


# ------------------------------------------------------------------------------------------------------------ conversion


@dataclass(frozen=True)
class LayerReport:
    """One layer: its rank (None where it stayed dense, with the reason), its relative error, its cost before and after.

    `error` is |W - D E| / |W| in the Frobenius norm, or of the outputs on the calibration inputs with "data_svd".
    """

    name: str
    rank: int | None
    break_even: float
    error: float
    before: LayerCost
    after: LayerCost
    reason: str = ""


@dataclass(frozen=True)
class LowRankReport:
    """What `apply_low_rank` did. `before` and `after` are the whole model's cost, tied tensors counted once."""

    layers: tuple[LayerReport, ...]
    before: LayerCost
    after: LayerCost

    def __str__(self) -> str:
        lines = [f"{'layer':50} {'rank':>5} {'limit':>6} {'error':>7} {'MACs/token':>22}"]
        for layer in self.layers:
            name, rank = layer.name[-50:], "dense" if layer.rank is None else str(layer.rank)
            macs = f"{layer.before.macs:,} -> {layer.after.macs:,}"
            lines.append(f"{name:50} {rank:>5} {layer.break_even:6.0f} {layer.error:7.4f} {macs:>22} {layer.reason}")
        lines.append(f"parameters {self.before.params:,} -> {self.after.params:,}")
        lines.append(
            f"MACs per token {self.before.macs:,} -> {self.after.macs:,} (1 MAC = 2 FLOPs; linear layers and convolutions)"
        )
        return "\n".join(lines)


def apply_low_rank(
    model: nn.Module,
    rank: float | None = None,
    *,
    energy: float | None = None,
    budget: float | None = None,
    solver: Solver = "svd",
    calibration: Iterable[Any] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    untie_head: bool = False,
    num_iter: int = 10,
    seed: int = 0,
) -> LowRankReport:
    """Factor the linear layers and convolutions of `model` in place, and report what that cost and saved.

    Ranks, exactly one of: `rank`, a whole number for all layers or a fraction in (0, 1) of each layer's break-even rank (the
    fraction is safer: one number fits no two shapes); `energy` in (0, 1), the fewest directions that keep this share of each
    layer's energy; `budget` in (0, 1), the share of the layers' parameters to keep, spent where it keeps the most energy
    (our choices). Layers at or above their break-even rank stay dense. `energy` and `budget` need "svd" or "data_svd".
    "data_svd" needs `calibration`, see `input_moments`; convolutions and embeddings take plain SVD then. Units from an earlier
    call are left alone, so that calling twice does nothing twice.

    A head whose weight is also the embedding is left dense unless told otherwise: `untie_head` factors the head alone (the
    embedding keeps the full table: more parameters, fewer MACs), `embeddings` factors embeddings as well, a tied pair together
    with the large factor shared.
    Raises ValueError for bad arguments, before anything is changed, naming them.
    """
    _check(rank, energy, budget, solver, calibration)
    kinds = (*linear_kinds(), *CONVOLUTIONS, *((nn.Embedding,) if embeddings else ()))
    layers = find(model, kinds, include=include, exclude=exclude, closed=UNITS)
    before = cost(model)
    heads, reasons = _ties(model, layers, untie_head)
    free = {name: layer for name, layer in layers.items() if name not in reasons and name not in heads}

    moments: dict[str, Tensor] = {}
    if solver == "data_svd":
        seen = {name: layers[name] for name in (*free, *heads) if type(layers[name]) in linear_kinds()}
        moments = input_moments(model, seen, calibration or ())
        moments |= {table: moments[head] for head, table in heads.items()}  # one matrix, judged by the head's outputs
    bases: dict[str, list[tuple[Tensor, Tensor]]] = {}
    if solver in ("svd", "data_svd"):
        bases = {name: [output_basis(m, moments.get(name)) for m in _matrices(layer)] for name, layer in free.items()}
    if budget is not None:
        ranks = _spend(budget, free, bases)
    else:
        ranks = {name: _rank_of(layer, rank, energy, bases.get(name)) for name, layer in free.items()}

    reports = []
    breaks_tie = False
    for name in sorted(layers, key=lambda name: name in heads):  # a factored embedding before the head that shares it
        layer, table = layers[name], heads.get(name)
        limit, own = break_even_rank(layer), cost(layer)
        chosen = ranks.get(table or name, 0)
        if chosen >= int(limit):
            reasons[name] = f"rank {chosen} is not below the limit {int(limit)}"
        if name in reasons or chosen == 0:
            reports.append(LayerReport(name, None, limit, 0.0, own, own, reasons.get(name, "rank 0")))
            continue
        matrices = _matrices(layer)
        if table is not None:
            embedding: Any = model.get_submodule(table)
            pairs = [(embedding.codes.weight, embedding.decoder.weight.T)]
        elif name in bases:
            pairs = [
                truncate(m, basis, chosen // len(matrices)) for m, (basis, _) in zip(matrices, bases[name], strict=True)
            ]
        else:
            pairs = [factor(m, chosen // len(matrices), solver, num_iter=num_iter, seed=seed) for m in matrices]
        unit: Any = _unit(layer, pairs)
        if table is not None:
            unit.decoder.weight = embedding.codes.weight
        breaks_tie = breaks_tie or (table is None and len(tied_names(model, _weight(layer))) > 1)
        error = _error(matrices, pairs, moments.get(table or name))
        swap(model, {name: unit})
        reports.append(LayerReport(name, chosen, limit, error, own, cost(unit)))
    if breaks_tie or heads:
        untie(model)
    return LowRankReport(tuple(reports), before, cost(model))


def _check(rank: float | None, energy: float | None, budget: float | None, solver: str, calibration: Any) -> None:
    if sum(given is not None for given in (rank, energy, budget)) != 1:
        raise ValueError(f"exactly one of rank, energy and budget must be given, got {rank}, {energy} and {budget}")
    for name, share in (("energy", energy), ("budget", budget)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {share}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if rank is not None:
        _checked_rank(rank)
    elif solver not in ("svd", "data_svd"):
        raise ValueError(f"energy and budget need solver 'svd' or 'data_svd', got {solver!r}")
    if solver == "data_svd" and calibration is None:
        raise ValueError("calibration must be given with solver 'data_svd'")


def _ties(model: nn.Module, layers: Mapping[str, nn.Module], untie_head: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Layers that share their weight: {head: the embedding it is factored together with}, {layer: why it stays dense}."""
    tables = {id(_weight(layer)): name for name, layer in layers.items() if type(layer) is nn.Embedding}
    heads: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        others = [other for other in tied_names(model, _weight(layer)) if other != f"{name}.weight"]
        if not others:
            continue
        if type(layer) is not nn.Embedding and id(_weight(layer)) in tables:
            heads[name] = tables[id(_weight(layer))]
        elif type(layer) is nn.Embedding or not untie_head:
            reasons[name] = f"tied to {others[0]}"
    for table in heads.values():
        reasons.pop(table, None)
    return heads, reasons


def _weight(layer: Any) -> nn.Parameter:
    weight: nn.Parameter = layer.weight
    return weight


def _checked_rank(rank: float) -> None:
    if isinstance(rank, bool) or not (0 < rank < 1 or (rank >= 1 and rank == int(rank))):
        raise ValueError(f"rank must be a whole number of at least 1 or a fraction in (0, 1), got {rank!r}")


def _matrices(layer: Any) -> list[Tensor]:
    """The (outputs, inputs) matrix of a layer, one a group."""
    if type(layer) in CONVOLUTIONS:
        return [chunk.flatten(1) for chunk in layer.weight.chunk(layer.groups)]
    return [_matrix(layer)]


def _rank_of(layer: nn.Module, rank: float | None, energy: float | None, bases: Any) -> int:
    rows, columns, groups = _shape(layer)
    if rank is not None:
        whole = int(rank) if rank >= 1 else int(rank * int(break_even_rank(layer)))
        return min(-(-whole // groups), min(rows, columns)) * groups  # rounded up to a multiple of the groups
    if energy is None:
        return 0
    kept = [int((values.cumsum(0) < energy * values.sum()).sum()) + 1 for _, values in bases]
    return min(max(kept), rows, columns) * groups


def _spend(budget: float, layers: Mapping[str, nn.Module], bases: Mapping[str, Any]) -> dict[str, int]:
    """Ranks under a global budget: directions bought by the share of their layer's energy they keep per parameter.

    Shares fall within a layer, so greedy is optimal up to the last direction. A layer bought up to its break-even rank is
    cheaper dense: it is taken out at its dense price and the rest is bought again.
    """
    sizes = {name: math.prod(_shape(layer)) for name, layer in layers.items()}
    total = budget * sum(sizes.values())
    dense: set[str] = set()
    while True:
        open_layers = [name for name in layers if name not in dense]
        left = total - sum(sizes[name] for name in dense)
        offers = []
        for name in open_layers:
            rows, columns, groups = _shape(layers[name])
            values = torch.stack([values for _, values in bases[name]]).sum(0)
            price = groups * (rows + columns)
            for place, share in enumerate((values / values.sum().clamp(min=1e-300)).tolist()):
                offers.append((place > 0, -share / price, name, price))  # one direction for everybody first
        ranks = dict.fromkeys(open_layers, 0)
        for _, _, name, price in sorted(offers):
            if price > left:
                break
            ranks[name] += _shape(layers[name])[2]
            left -= price
        full = {name for name, r in ranks.items() if r >= int(break_even_rank(layers[name]))}
        if not full:
            break
        dense |= full
    if empty := [name for name, r in ranks.items() if r == 0]:
        raise ValueError(f"budget must leave every layer at least rank 1, got {budget}, which leaves {empty[0]!r} none")
    return ranks | {name: int(break_even_rank(layers[name])) for name in dense}


def _unit(layer: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """The unit that takes `layer`'s place, with factors (D, E), one pair a group. The bias stays the same parameter."""
    d, e = torch.cat([d for d, _ in pairs]), torch.cat([e for _, e in pairs])
    if type(layer) in CONVOLUTIONS:
        ced: Any = CED.like(layer, len(e))
        ced.encoder.weight.data = e.reshape(ced.encoder.weight.shape).contiguous()
        ced.decoder.weight.data = d.reshape(ced.decoder.weight.shape).contiguous()
        ced.decoder.bias = layer.bias
        unit: nn.Module = ced
        return unit
    if type(layer) is nn.Embedding:
        return LEDEmbedding(_embedding(d, layer.padding_idx), _linear(e.T))
    led = LED(e.shape[1], len(d), len(e), bias=False, device="meta")
    led.encoder, led.decoder = _linear(e), _linear(d, layer.bias)
    return led


def _error(matrices: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], moment: Tensor | None) -> float:
    lost = whole = 0.0
    for matrix, (d, e) in zip(matrices, pairs, strict=True):
        w = matrix.detach().double()
        rest = w - d.detach().double() @ e.detach().double()
        for value, sign in ((rest, "lost"), (w, "whole")):
            square = float((value * value if moment is None else (value @ moment.to(value)) * value).sum())
            lost, whole = (lost + square, whole) if sign == "lost" else (lost, whole + square)
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0


def auto_fact(
    module: nn.Module,
    rank: float,
    solver: Literal["random", "svd", "nmf", "snmf"] = "random",
    num_iter: int = 10,
    submodules: Sequence[nn.Module] | None = None,
    deepcopy: bool = False,
    fact_led_unit: bool = False,
) -> nn.Module:
    """The conversion as the official package does it, argument for argument: the `as_released` variant of `apply_low_rank`.

    It differs from the paper's form here in three ways: SVD is randomised with `num_iter` power iterations and leaves all of
    the scale in the encoder; a convolution's limit ignores its kernel, c (o/g) / (c + o/g); a single layer may be given, and
    the factored one is returned. Two faults are not kept: grouped convolutions are factored group by group, and tied weights
    are skipped with a warning (the package breaks the tie without a word).
    Raises ValueError for a bad rank or an unknown solver.
    """
    _checked_rank(rank)
    if solver not in ("random", "svd", "nmf", "snmf"):
        raise ValueError(f"solver must be one of random, svd, nmf, snmf, got {solver!r}")
    root = nn.Sequential()
    root.add_module("module", module)
    kinds = (*linear_kinds(), *CONVOLUTIONS)
    layers = find(root, kinds, closed=() if fact_led_unit else UNITS)
    if submodules is not None:
        inside = {id(child) for module_ in submodules for child in module_.modules()}
        layers = {name: layer for name, layer in layers.items() if id(layer) in inside}
    if deepcopy:
        root = copy.deepcopy(root)
        layers = {name: root.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        unit = _released_unit(root, name, layer, rank, solver, num_iter)
        if unit is not None:
            swap(root, {name: unit})
    return root.get_submodule("module")


def _released_unit(root: nn.Module, name: str, layer: Any, rank: float, solver: str, num_iter: int) -> nn.Module | None:
    convolution = type(layer) in CONVOLUTIONS
    rows, columns, groups = _shape(layer)
    if convolution:
        columns = layer.in_channels
    limit = int(rows * columns / (rows + columns))
    whole = int(limit * rank) if rank < 1 else int(rank)
    if rank < 1 and whole == 0:
        return None
    whole = -(-whole // groups) * groups
    if whole >= limit:
        warnings.warn(f"skipping {name}: rank {whole} is not below its limit {limit}", stacklevel=3)
        return None
    if len(tied_names(root, _weight(layer))) > 1:
        warnings.warn(f"skipping {name}: its weight is tied to another layer's", stacklevel=3)
        return None
    if solver == "random":
        if convolution:
            return CED.like(layer, whole)
        options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return LED(columns, rows, whole, bias=layer.bias is not None, **options)
    pairs = []
    for matrix in _matrices(layer):
        share = min(whole // groups, *matrix.shape)
        if solver == "svd":
            u, s, v = torch.svd_lowrank(matrix.detach().T, q=share, niter=num_iter)
            pairs.append((v, (u * s).T))
        else:
            pairs.append(factor(matrix, share, solver, num_iter=num_iter))  # type: ignore[arg-type]
    return _unit(layer, pairs)


# -------------------------------------------------------------------------------------- Linformer and the LRT architecture


def linformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_k: Tensor,
    e_v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q (E_k^T k)^T / sqrt d) (E_v^T v): attention over k_len mixtures of the n tokens, O(n k_len) instead of O(n^2).

    q, k, v (B, heads, n, d); e_k, e_v (n_max, k_len) with n <= n_max, of which the first n rows are used. `key_mask` (B, n) bool
    is True on tokens: padding enters no mixture. Not causal, and made for lengths close to n_max. Linformer, as compared in
    the thesis. Raises ValueError for more tokens than n_max.
    """
    n = k.shape[-2]
    if n > len(e_k) or n > len(e_v):
        raise ValueError(f"k must have at most {len(e_k)} tokens, the rows of e_k and e_v, got {n}")
    if key_mask is not None:
        k, v = (t * key_mask[:, None, :, None].to(t.dtype) for t in (k, v))
    return F.scaled_dot_product_attention(q, e_k[:n].T.to(k) @ k, e_v[:n].T.to(v) @ v, scale=scale)


def linformer_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Linformer as an attention function of transformers' encoders; see `use_linformer`."""
    mask = None
    if attention_mask is not None:  # (B, 1, n, n), the same keys for every query of an encoder
        mask = attention_mask[:, 0, 0]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    e_k, e_v = module.linformer_e_k, module.linformer_e_v
    return linformer(query, key, value, e_k, e_v, key_mask=mask, scale=scaling).transpose(1, 2), None  # type: ignore[arg-type]


def use_linformer(model: nn.Module, *, tokens: int, length: int, seed: int = 0) -> int:
    """Give every self-attention of a transformers encoder Linformer projections (tokens, length), new parameters to be trained.

    Projections start as random with variance 1 / length (identity when length = tokens: nothing changes then). Returns how many
    attention modules were changed. Raises ValueError for length outside 1..tokens, a causal model, or a model without any.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if not 1 <= length <= tokens:
        raise ValueError(f"length must lie in 1..tokens ({tokens}), got {length}")
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    if not modules or any(m.is_causal for m in modules):
        raise ValueError("model must be a transformers encoder whose attention goes through the attention interface")
    AttentionInterface.register("assay_linformer", linformer_attention_forward)
    AttentionMaskInterface.register("assay_linformer", eager_mask)
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        like = next(module.parameters())
        for name in ("linformer_e_k", "linformer_e_v"):
            start = (
                torch.eye(tokens)
                if length == tokens
                else torch.randn(tokens, length, generator=generator) / math.sqrt(length)
            )
            module.register_parameter(name, nn.Parameter(start.to(like)))
        module.config._attn_implementation = "assay_linformer"
    return len(modules)


class EncoderBlock(nn.Module):
    """A transformer encoder layer (residual, then norm), dense, low-rank or with Linformer attention. (B, n, d) -> (B, n, d).

    `rank` makes every projection, of attention and feed-forward alike, an LED unit: the LRT block. `linformer_length` with
    `tokens` makes the attention Linformer's, for inputs of up to `tokens` tokens.
    Raises ValueError when d_model is no multiple of heads, or only one of the Linformer arguments is given.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        ffn: int,
        *,
        rank: int | None = None,
        linformer_length: int | None = None,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model must be a multiple of heads, got {d_model} and {heads}")
        if (linformer_length is None) != (tokens is None):
            raise ValueError(f"linformer_length and tokens go together, got {linformer_length} and {tokens}")
        self.heads = heads

        def linear(inputs: int, outputs: int) -> nn.Module:
            return nn.Linear(inputs, outputs) if rank is None else LED(inputs, outputs, rank)

        self.query, self.key, self.value = (linear(d_model, d_model) for _ in range(3))
        self.output = linear(d_model, d_model)
        self.up, self.down = linear(d_model, ffn), linear(ffn, d_model)
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.e_k: Tensor | None = None
        self.e_v: Tensor | None = None
        if tokens is not None and linformer_length is not None:
            self.e_k = nn.Parameter(torch.randn(tokens, linformer_length) / math.sqrt(linformer_length))
            self.e_v = nn.Parameter(torch.randn(tokens, linformer_length) / math.sqrt(linformer_length))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.e_k is None or self.e_v is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = linformer(q, k, v, self.e_k, self.e_v)
        x = self.norm_attention(x + self.output(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = self.norm_ffn(x + self.down(F.gelu(self.up(x))))
        return out


# ------------------------------------------------------------------------------------------------------------------ cost


def block_macs(
    tokens: int, d_model: int, ffn: int, *, rank: int | None = None, linformer_length: int | None = None
) -> int:
    """MACs (1 MAC = 2 FLOPs) of one encoder block for a sequence of `tokens`: projections, scores and mixing."""
    square, wide = (d_model**2, d_model * ffn) if rank is None else (2 * rank * d_model, rank * (d_model + ffn))
    attended = tokens if linformer_length is None else linformer_length
    projected = 0 if linformer_length is None else 2 * tokens * linformer_length * d_model
    return tokens * (4 * square + 2 * wide) + projected + 2 * tokens * attended * d_model


def crossover_tokens(d_model: int, ffn: int, *, rank: int, linformer_length: int) -> float:
    """The sequence length from which a Linformer block needs fewer MACs than an LRT block."""
    saved_by_rank = 4 * d_model**2 + 2 * d_model * ffn - rank * (8 * d_model + 2 * (d_model + ffn))
    return (saved_by_rank + 4 * linformer_length * d_model) / (2 * d_model)


@dataclass(frozen=True)
class TrainingCost:
    """What training costs: FLOPs, device-hours, money (in the unit of the price), energy in kWh, kg of CO2."""

    flops: float
    hours: float
    price: float
    energy_kwh: float
    co2_kg: float


def training_cost(
    macs_per_token: float,
    tokens: float,
    *,
    seconds_per_flop: float,
    price_per_hour: float,
    kilowatts: float,
    co2_kg_per_kwh: float,
) -> TrainingCost:
    """The thesis' estimate: training FLOPs x time a FLOP, then x price an hour, x power, x CO2 a kWh.

    Training takes 3 forward passes' worth (forward, and gradients of inputs and weights): 6 FLOPs per MAC.
    `seconds_per_flop` is that of one device as it really runs, not of its data sheet: low-rank layers reach less of the peak.
    Raises ValueError for a negative figure.
    """
    given = {"macs_per_token": macs_per_token, "tokens": tokens, "seconds_per_flop": seconds_per_flop}
    given |= {"price_per_hour": price_per_hour, "kilowatts": kilowatts, "co2_kg_per_kwh": co2_kg_per_kwh}
    if bad := [name for name, value in given.items() if value < 0]:
        raise ValueError(f"{bad[0]} must not be negative, got {given[bad[0]]}")
    flops = 6.0 * macs_per_token * tokens
    hours = flops * seconds_per_flop / 3600
    energy = hours * kilowatts
    return TrainingCost(flops, hours, hours * price_per_hour, energy, energy * co2_kg_per_kwh)


# ------------------------------------------------------------------------------------------------------------- transform


@dataclass(frozen=True)
class LowRank:
    """The tuner's handle: factor the linear layers with the data-aware solver, calibrated on the context's text."""

    name: str = "greenformers"
    slot: Literal["structure"] = "structure"
    goals: frozenset[str] = frozenset({"ttft", "decode", "memory", "throughput"})
    exact: bool = False

    def applies_to(self, model: nn.Module, context: TuneContext) -> Fit:
        if not find(model, linear_kinds(), closed=UNITS):
            return Fit(False, f"{type(model).__name__} has no dense linear layers")
        if not len(context.calibration):
            return Fit(False, "it needs calibration text")
        return Fit(True, effects=(Effect("linear", macs=0.9, bytes=0.9),))

    def configs(self, model: nn.Module, context: TuneContext) -> list[dict[str, Any]]:
        return [{"energy": 0.999}, {"energy": 0.99}, {"budget": 0.8}]

    def apply(self, model: nn.Module, config: Mapping[str, Any], context: TuneContext) -> nn.Module:
        apply_low_rank(model, solver="data_svd", calibration=context.calibration, **config)
        return model


transform = LowRank()
