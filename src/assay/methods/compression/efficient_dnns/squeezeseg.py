"""SqueezeSeg: a LiDAR scan as an image of 64 x 512 directions, a small network over it, and a recurrent CRF that sharpens borders.

Wu et al., arXiv 1710.07368, a chapter of the thesis. Only the width is pooled, since a scan has few rows. No LiDAR data come with this
package: shapes and invariants are tested, and what accuracy the network reaches is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import checks

ROWS, COLUMNS = 64, 512
UP, DOWN, SIDE = 2.0, -24.8, 45.0  # degrees: the rows' range of a 64-beam scanner, and half of the columns'


def spherical_image(
    points: Tensor,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
    up: float = UP,
    down: float = DOWN,
    side: float = SIDE,
) -> tuple[Tensor, Tensor]:
    """Points (n, 4) of x (ahead), y (left), z (up) and intensity as maps (5, rows, columns) of x, y, z, intensity, range, and a mask.

    A row is an elevation, from `up` to `down` degrees, a column an azimuth, from `side` degrees on the left to as many on the right.
    Of several points in one direction the nearest counts; points outside, or at the origin, are left out. The mask, bool (rows,
    columns), says where there is a point. Raises ValueError for another shape, unless up > down, and for numbers that are not finite.
    """
    checks.tensor("points", points, shape=("points", 4), finite=True, empty=True)
    rows, columns = checks.whole("rows", rows, low=1), checks.whole("columns", columns, low=1)
    down = checks.number("down", down, low=-90, high=90)
    up, side = checks.number("up", up, above=down, high=90), checks.number("side", side, above=0, high=180)
    distance = points[:, :3].norm(dim=1)
    elevation = torch.asin((points[:, 2] / distance).clamp(-1, 1)).rad2deg()  # NaN at the origin: within no range
    azimuth = torch.atan2(points[:, 1], points[:, 0]).rad2deg()
    row, column = (up - elevation) / (up - down) * rows, (side - azimuth) / (2 * side) * columns
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    values = torch.cat([points, distance[:, None]], 1)[inside]
    cells = row[inside].long() * columns + column[inside].long()
    order = values[:, 4].argsort(stable=True)
    order = order[cells[order].argsort(stable=True)]  # by cell, the nearest first
    first = torch.ones(len(order), dtype=torch.bool, device=points.device)
    first[1:] = cells[order][1:] != cells[order][:-1]
    nearest = order[first]
    image, mask = values.new_zeros(5, rows * columns), first.new_zeros(rows * columns)
    image[:, cells[nearest]] = values[nearest].T
    mask[cells[nearest]] = True
    return image.view(5, rows, columns), mask.view(rows, columns)


class Fire(nn.Module):
    """1x1 to `squeeze` channels, then 1x1 to `one` and 3x3 to `three` side by side, a ReLU after each.

    (B, inputs, H, W) to (B, one + three, H, W).
    """

    def __init__(self, inputs: int, squeeze: int, one: int, three: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, one, 1), nn.Conv2d(squeeze, three, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(F.relu(self.squeeze(x)))

    def expand(self, x: Tensor) -> Tensor:
        """The two convolutions on what was squeezed."""
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class FireDeconv(Fire):
    """A fire module that doubles the width between squeezing and expanding, by a transposed 1x4 convolution that starts bilinear."""

    def __init__(self, inputs: int, squeeze: int, one: int, three: int) -> None:
        super().__init__(inputs, squeeze, one, three)
        self.widen = nn.ConvTranspose2d(squeeze, squeeze, (1, 4), stride=(1, 2), padding=(0, 1))
        with torch.no_grad():
            self.widen.weight.zero_()
            self.widen.weight[torch.arange(squeeze), torch.arange(squeeze), 0] = torch.tensor([0.25, 0.75, 0.75, 0.25])
            assert self.widen.bias is not None
            self.widen.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(F.relu(self.widen(F.relu(self.squeeze(x)))))


class RecurrentCRF(nn.Module):
    """Three mean-field iterations in which neighbours that are near in angle, and in space, pull a pixel towards their classes.

    Each iteration sums the neighbours' probabilities in a window, by a Gaussian of their angle (in pixels) and by one of their angle and
    place, multiplies both sums by learnt matrices of compatibility, which start as `coefficients` between different classes and 0
    between equal ones, and takes that from the network's logits. A pixel without a measurement gives nothing.
    With coefficients of 0 the logits come back as they were. What `places` holds without a measurement is not read; 0 stands for it.

    `angular` and `spatial` are the widths of the Gaussians, one number a class. Where none are given, the first two classes have 0.9 and
    0.015, those of the background and of cars in the released configuration, the rest 0.6 and 0.01. Places are in the unit of the inputs.
    """

    def __init__(
        self,
        classes: int,
        *,
        iterations: int = 3,
        window: tuple[int, int] = (3, 5),
        angular: Sequence[float] | None = None,
        spatial: Sequence[float] | None = None,
        coefficients: tuple[float, float] = (0.02, 0.1),
    ) -> None:
        super().__init__()
        classes = checks.whole("classes", classes, low=2)
        self.iterations = checks.whole("iterations", iterations, low=0)
        if len(window) != 2 or any(checks.whole("window", size, low=1) % 2 == 0 for size in window):
            raise ValueError(f"window must be two odd numbers, got {window}")
        self.window = (window[0], window[1])
        widths = []
        for name, given, usual in (("angular", angular, (0.9, 0.6)), ("spatial", spatial, (0.015, 0.01))):
            values = [usual[i > 1] for i in range(classes)] if given is None else list(given)
            if len(values) != classes:
                raise ValueError(f"{name} must have {classes} numbers, one a class, got {values}")
            widths.append(torch.tensor([checks.number(name, value, above=0) for value in values]))
        rows, columns = (torch.arange(size) - size // 2 for size in self.window)
        squares = (rows[:, None] ** 2 + columns**2).flatten().float()
        kernel = torch.exp(-squares / (2 * widths[0][:, None] ** 2))
        kernel[:, len(squares) // 2] = 0  # a pixel is not its own neighbour
        self.kernel: Tensor
        self.spatial: Tensor
        self.register_buffer("kernel", kernel)  # (classes, window)
        self.register_buffer("spatial", widths[1])
        between = 1 - torch.eye(classes)
        self.by_angle = nn.Parameter(checks.number("coefficients", coefficients[0]) * between)
        self.by_place = nn.Parameter(checks.number("coefficients", coefficients[1]) * between)

    def forward(self, logits: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, classes, H, W), places (B, 3, H, W) and a bool mask (B, H, W) to logits."""
        weights = self.weights(places, mask)
        checks.tensor("logits", logits, shape=(len(places), len(self.kernel), *places.shape[2:]))
        given = mask[:, None].to(logits.dtype)
        found = logits
        for _ in range(self.iterations):
            near = self._neighbours(found.softmax(1) * given)  # (B, classes, window, H, W)
            by_angle = torch.einsum("bcnhw,cn->bchw", near, self.kernel.to(near.dtype))
            by_place = (near * weights).sum(2)
            pull = torch.einsum("dc,bchw->bdhw", self.by_angle, by_angle)
            found = logits - pull - torch.einsum("dc,bchw->bdhw", self.by_place, by_place)
        return found

    def weights(self, places: Tensor, mask: Tensor) -> Tensor:
        """The weights of the neighbours by angle and place, (B, classes, window, H, W); 0 for those without a measurement."""
        checks.tensor("places", places, shape=("batch", 3, "height", "width"))
        checks.tensor("mask", mask, shape=(places.shape[0], *places.shape[2:]), dtype="bool")
        places = places.masked_fill(~mask[:, None], 0)  # what stands there may be anything
        apart = (self._neighbours(places) - places[:, :, None]).square().sum(1)  # (B, window, H, W)
        near = torch.exp(-apart[:, None] / (2 * self.spatial[:, None, None, None] ** 2))
        there = self._neighbours(mask[:, None].to(places.dtype))
        return near * there * self.kernel[:, :, None, None].to(places.dtype)

    def _neighbours(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, window, H, W): each pixel's window, zeros outside."""
        padding = (self.window[0] // 2, self.window[1] // 2)
        return F.unfold(x, self.window, padding=padding).view(*x.shape[:2], -1, *x.shape[2:])


class SqueezeSeg(nn.Module):
    """(B, in_chans, H, W), places first, and a bool mask (B, H, W) to logits (B, num_classes, H, W); W a multiple of 16.

    Fire modules while the width is pooled by 16 in four steps, fire-deconvolutions back up with the maps of equal width added, a 3x3
    convolution, the CRF. Strided layers pad one pixel on both sides (our choice: TensorFlow pads on the right).
    """

    def __init__(self, num_classes: int = 4, in_chans: int = 5, *, crf: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        checks.whole("in_chans", in_chans, low=3)
        self.first = nn.Conv2d(in_chans, 64, 3, stride=(1, 2), padding=1)
        self.first_skip = nn.Conv2d(in_chans, 64, 1)
        self.pool = nn.MaxPool2d(3, stride=(1, 2), padding=1)
        self.fire3 = nn.Sequential(Fire(64, 16, 64, 64), Fire(128, 16, 64, 64))
        self.fire5 = nn.Sequential(Fire(128, 32, 128, 128), Fire(256, 32, 128, 128))
        self.fire9 = nn.Sequential(
            Fire(256, 48, 192, 192), Fire(384, 48, 192, 192), Fire(384, 64, 256, 256), Fire(512, 64, 256, 256)
        )
        self.up10, self.up11 = FireDeconv(512, 64, 128, 128), FireDeconv(256, 32, 64, 64)
        self.up12, self.up13 = FireDeconv(128, 16, 32, 32), FireDeconv(64, 16, 32, 32)
        self.dropout = nn.Dropout(checks.number("dropout", dropout, low=0, below=1))
        self.last = nn.Conv2d(64, checks.whole("num_classes", num_classes, low=2), 3, padding=1)
        self.crf = RecurrentCRF(num_classes) if checks.flag("crf", crf) else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        checks.tensor("x", x, shape=("batch", self.first.in_channels, "height", "width"))
        if x.shape[-1] % 16:
            raise ValueError(f"x must have a width that 16 divides, got {x.shape[-1]}")
        first = F.relu(self.first(x))
        fire3 = self.fire3(self.pool(first))
        fire5 = self.fire5(self.pool(fire3))
        out = self.up10(self.fire9(self.pool(fire5))) + fire5
        out = self.up12(self.up11(out) + fire3) + first
        out = self.up13(out) + F.relu(self.first_skip(x))
        logits: Tensor = self.last(self.dropout(out))
        return logits if self.crf is None else self.crf(logits, x[:, :3], mask)


def segmentation_loss(logits: Tensor, labels: Tensor, mask: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross entropy over measured pixels, each times the weight of its class, divided by the number of measured pixels.

    Logits (B, classes, H, W), labels int64 (B, H, W), mask bool (B, H, W), weights (classes,). 0 where nothing was measured.
    Labels of pixels without a measurement are not read.
    """
    measured = logits.permute(0, 2, 3, 1)[mask]
    return F.cross_entropy(measured, labels[mask], weight=class_weights, reduction="sum") / max(1, len(measured))
