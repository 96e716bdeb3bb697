"""Around SqueezeSeg: annotation by one click and a track (LATTE), and what carries a model over to another sensor (SqueezeSegV2).

Wang et al., "LATTE" (arXiv 1904.09085), and Wu et al., "SqueezeSegV2" (arXiv 1809.08495), chapters of the thesis. That annotating gets
6.2 times faster was measured with people, which is why no experiment here says so. Points are (n, 3) or wider: x, y, z first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks


def ground(points: Tensor, *, tolerance: float = 0.2, rounds: int = 10) -> Tensor:
    """Which points lie within `tolerance` (metres) of the ground, a plane z = a x + b y + c: bool (n,).

    The plane is fitted by least squares to the lowest fifth of the points, then `rounds` times to the points near it (our choice).
    Raises ValueError for fewer than three points.
    """
    _points(points, least=3)
    tolerance = checks.number("tolerance", tolerance, above=0)
    places = points[:, :3].double()
    design = torch.cat([places[:, :2], torch.ones_like(places[:, :1])], 1)
    near = places[:, 2] <= places[:, 2].quantile(0.2)
    for _ in range(checks.whole("rounds", rounds, low=1)):
        plane = torch.linalg.lstsq(design[near], places[near, 2:]).solution
        found = (places[:, 2] - (design @ plane)[:, 0]).abs() <= tolerance
        if int(found.sum()) < 3:  # no plane is left: the last one stands
            break
        near = found
    return found


def one_click(points: Tensor, click: Tensor, *, radius: float = 0.5, least: int = 3, reach: float = 8.0) -> Tensor:
    """The object that was clicked on: all points that are connected to the nearest point by steps of `radius`, bool (n,).

    As DBSCAN grows one cluster: a point with fewer than `least` points within `radius`, itself included, belongs to the cluster and
    does not extend it. Points further than `reach` from the click take no part. `click` is (x, y) or (x, y, z); nearness to it, and
    the reach, are those of its coordinates. Take the ground away before. Where no point is within reach, none is taken.
    """
    _points(points)
    click = checks.tensor("click", click, ndim=1, finite=True)
    if len(click) not in (2, 3):
        raise ValueError(f"click must be (x, y) or (x, y, z), got {len(click)} numbers")
    radius, least = checks.number("radius", radius, above=0), checks.whole("least", least, low=1)
    away = (points[:, : len(click)] - click.to(points)).norm(dim=1)
    near = (away <= checks.number("reach", reach, above=0)).nonzero()[:, 0]
    taken = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    if not len(near):
        return taken
    places = points[near, :3]
    cluster = torch.zeros(len(near), dtype=torch.bool, device=points.device)
    frontier = away[near].argmin()[None]
    cluster[frontier] = True
    while len(frontier):
        close = torch.cdist(places[frontier], places, compute_mode="donot_use_mm_for_euclid_dist") <= radius
        core = close.sum(1) >= least
        found = close[core].any(0) & ~cluster
        cluster |= found
        frontier = found.nonzero()[:, 0]
    taken[near[cluster]] = True
    return taken


@dataclass(frozen=True)
class Box:
    """A rectangle seen from above: its centre, its length along `heading` (radians from x towards y), and its width across."""

    x: float
    y: float
    length: float
    width: float
    heading: float


def box_around(points: Tensor, *, steps: int = 90) -> Box:
    """The rectangle of least area, of `steps` headings between 0 and 90 degrees, that holds all points seen from above."""
    _points(points, least=1)
    flat = points[:, :2].double()
    angles = torch.arange(checks.whole("steps", steps, low=1), dtype=torch.float64) * (math.pi / 2 / steps)
    along = torch.stack([angles.cos(), angles.sin()], 1).to(flat.device)  # (steps, 2)
    across = torch.stack([-along[:, 1], along[:, 0]], 1)
    ends = [(flat @ axis.T).aminmax(dim=0) for axis in (along, across)]
    sizes = [end.max - end.min for end in ends]
    best = int((sizes[0] * sizes[1]).argmin())
    middles = [(end.max[best] + end.min[best]) / 2 for end in ends]
    centre = middles[0] * along[best] + middles[1] * across[best]
    heading, length, width = float(angles[best]), float(sizes[0][best]), float(sizes[1][best])
    if width > length:  # the longer side is the length
        heading, length, width = heading + math.pi / 2, width, length
    return Box(float(centre[0]), float(centre[1]), length, width, heading)


class Track:
    """Where an object will be in the next scan: a Kalman filter of its centre and velocity, which are taken to change little.

    `agility` is the spread of the velocity's change between scans, `error` that of a measured centre, in metres (a second).
    The annotator's box of the first scan starts it; each confirmed box of a later one corrects it.
    """

    def __init__(self, x: float, y: float, *, seconds: float = 0.1, agility: float = 1.0, error: float = 0.2) -> None:
        seconds = checks.number("seconds", seconds, above=0)
        self.state = torch.tensor([checks.number("x", x), checks.number("y", y), 0.0, 0.0], dtype=torch.float64)
        self.error = checks.number("error", error, above=0) ** 2 * torch.eye(2, dtype=torch.float64)
        self.spread = torch.diag(torch.tensor([1.0, 1.0, 100.0, 100.0], dtype=torch.float64)) * self.error[0, 0]
        self.move = torch.eye(4, dtype=torch.float64)
        self.move[0, 2] = self.move[1, 3] = seconds
        gain = torch.tensor([[seconds / 2, 0], [0, seconds / 2], [1, 0], [0, 1]], dtype=torch.float64)
        self.noise = checks.number("agility", agility, above=0) ** 2 * gain @ gain.T

    def predict(self) -> tuple[float, float]:
        """Go on to the next scan; the centre expected there."""
        self.state = self.move @ self.state
        self.spread = self.move @ self.spread @ self.move.T + self.noise
        return float(self.state[0]), float(self.state[1])

    def update(self, x: float, y: float) -> None:
        """The centre that was found in this scan."""
        seen = torch.tensor([checks.number("x", x), checks.number("y", y)], dtype=torch.float64)
        gain = self.spread[:, :2] @ torch.linalg.inv(self.spread[:2, :2] + self.error)
        self.state = self.state + gain @ (seen - self.state[:2])
        self.spread = self.spread - gain @ self.spread[:2]


# --------------------------------------------------------------------------------------------------------- to another sensor


def geodesic_distance(ours: Tensor, theirs: Tensor, *, floor: float = 1e-4) -> Tensor:
    """How far apart the covariances of two sets of features lie: |log A - log B|^2 / (4 d^2), Frobenius, with gradients.

    Features are (n, d) and (m, d), n and m at least 2; `floor` is added to the diagonals. Added to the loss it brings the outputs on
    synthetic and on real scans together (geodesic correlation alignment). Raises ValueError for other shapes.
    """
    checks.tensor("ours", ours, ndim=2)
    checks.tensor("theirs", theirs, shape=("rows", ours.shape[1]))
    checks.together(ours=ours, theirs=theirs)
    floor = checks.number("floor", floor, above=0)

    def log_covariance(features: Tensor) -> Tensor:
        if len(features) < 2:
            raise ValueError(f"ours and theirs must have two rows at least, got {len(features)}")
        eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        return cast(Tensor, _Log.apply(torch.cov(features.T).view_as(eye) + floor * eye, floor / 2))

    difference: Tensor = log_covariance(ours) - log_covariance(theirs)
    return difference.square().sum() / (4 * ours.shape[1] ** 2)


class _Log(torch.autograd.Function):
    """The logarithm of a symmetric matrix, its eigenvalues held at `floor` or above.

    The gradient has the divided differences of the logarithm in it, not those of the eigenvectors: it is finite for equal
    eigenvalues too, which fewer rows than features give.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, floor: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp(min=floor)
        ctx.save_for_backward(values, vectors)
        return (vectors * values.log()) @ vectors.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, vectors = ctx.saved_tensors
        total, apart = values[:, None] + values, values[:, None] - values
        share = apart / total
        near = 2 / total * torch.where(share == 0, 1.0, torch.atanh(share) / share)
        far = (values.log()[:, None] - values.log()) / apart
        divided = torch.where(share.abs() < 0.5, near, far)
        return vectors @ (divided * (vectors.T @ grad @ vectors)) @ vectors.T, None


def recalibrate(model: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any]) -> int:
    """Estimate the means and variances of the model's batch norms anew on data of another kind, one norm after another; their number.

    `run(batch)` passes a batch through the model. Progressive: a norm is measured after all before it, in the order in which they run,
    have been set, so that each sees what it will see (that is as many passes over the batches as there are norms). In place;
    weights stay, and so does whether the model trains. Raises ValueError where no norm runs, for no batches, and where a norm is given
    a single value a channel, which has no variance.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("batches must hold at least one batch, got none")
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    order: list[Any] = []
    seen: list[Tensor] = []
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        _watched(norms, lambda norm, _: order.append(norm), run, kept[:1])
        order = list(dict.fromkeys(order))
        if not order:
            raise ValueError("model must run a batch norm that keeps statistics, found none")
        for norm in order:
            seen.clear()
            _watched([norm], lambda _, x: seen.append(x.detach().transpose(0, 1).flatten(1)), run, kept)
            values = torch.cat(seen, 1).double()
            if values.shape[1] < 2:
                raise ValueError("batches must give every norm two values a channel at least, got one")
            norm.running_mean.copy_(values.mean(1))
            norm.running_var.copy_(values.var(1))
    finally:
        for module, was in training.items():
            module.training = was
    return len(order)


def _watched(
    norms: Iterable[nn.Module], note: Callable[[nn.Module, Tensor], None], run: Callable[[Any], Any], batches: list[Any]
) -> None:
    """Run the batches, telling `note` what each norm is given."""
    handles = [norm.register_forward_pre_hook(lambda module, given: note(module, given[0])) for norm in norms]
    try:
        with torch.no_grad():
            for batch in batches:
                run(batch)
    finally:
        for handle in handles:
            handle.remove()


def intensity_loss(logits: Tensor, offsets: Tensor, intensity: Tensor, mask: Tensor) -> Tensor:
    """The loss of a network that learns to render intensities from geometry: which bin, and how far from the bin's centre.

    `logits` and `offsets` are (B, bins, H, W) over equal bins of [0, 1]; `intensity` (B, H, W) in [0, 1], `mask` bool. Cross entropy of
    the bin plus the squared error of the true bin's offset, in bins, as a mean over measured pixels.
    """
    bins = logits.shape[1]
    place = intensity.clamp(0, 1) * bins
    true = place.long().clamp(max=bins - 1)
    off = offsets.gather(1, true[:, None])[:, 0] - (place - true - 0.5)
    losses = F.cross_entropy(logits, true, reduction="none") + off.square()
    return losses[mask].sum() / max(1, int(mask.sum()))


def _points(points: Tensor, *, least: int = 1) -> None:
    checks.tensor("points", points, ndim=2, finite=True)
    if points.shape[1] < 3 or len(points) < least:
        raise ValueError(f"points must be at least {least} x 3, got shape {tuple(points.shape)}")
