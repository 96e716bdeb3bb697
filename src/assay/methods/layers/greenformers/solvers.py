"""From a weight to its two thin factors: truncated SVD, plain or by the layer's inputs, and non-negative factorisations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Solver = Literal["svd", "data_svd", "random", "nmf", "snmf"]
SOLVERS: tuple[Solver, ...] = ("svd", "data_svd", "random", "nmf", "snmf")


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

    Up to 1024 on one thread: more threads gain little there, and are a hundred times slower when something else runs on the machine.
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

    >>> weight = torch.randn(16, 2) @ torch.randn(2, 8)  # of rank 2
    >>> d, e = factor(weight, rank=2)
    >>> bool((d @ e - weight).abs().max() < 1e-4)
    True
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
