"""What LeYOLO learns by: the assignment against loops in double precision, the losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from assay.methods.core.vision.boxes import complete_iou
from assay.methods.vision.leyolo import assign, distribution_loss, leyolo, losses

NC = 4


def scene(seed: int, images: int = 2, cells: int = 60, most: int = 5):
    """Guesses near the objects, so that many cells fight for some."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    points = rand(cells, 2) * 64
    corner = rand(images, most, 2) * 30
    truths = torch.cat([corner, corner + 12 + rand(images, most, 2) * 20], -1)
    near = truths[:, torch.arange(cells) % most] + 6 * (rand(images, cells, 4) - 0.5)
    labels = torch.randint(NC, (images, most), generator=g)
    real = torch.ones(images, most, dtype=torch.bool)
    real[-1, most - 2 :] = False
    return rand(images, cells, NC), near, points, truths, labels, real


def by_loops(scores, boxes, points, truths, labels, real, top=10, alpha=0.5, beta=6.0):
    images, cells = scores.shape[:2]
    to = torch.full((images, cells), -1)
    target = torch.zeros(images, cells, dtype=torch.float64)
    for image in range(images):
        overlap, worth, takers = {}, {}, {cell: [] for cell in range(cells)}
        for thing in range(truths.shape[1]):
            if not real[image, thing]:
                continue
            left, upper, right, lower = truths[image, thing].tolist()
            inside = [c for c in range(cells) if left < points[c, 0] < right and upper < points[c, 1] < lower]
            for cell in inside:
                value = max(float(complete_iou(boxes[image, cell], truths[image, thing])), 0.0)
                overlap[cell, thing] = value
                worth[cell, thing] = float(scores[image, cell, labels[image, thing]]) ** alpha * value**beta
            for cell in sorted(inside, key=lambda c: -worth[c, thing])[:top]:
                if worth[cell, thing] > 0:
                    takers[cell].append(thing)
        for cell, things in takers.items():
            if len(things) > 1:
                every = [thing for thing in range(truths.shape[1]) if (cell, thing) in overlap]
                things = [max(every, key=lambda thing: overlap[cell, thing])]
            if things:
                to[image, cell] = things[0]
        for thing in range(truths.shape[1]):
            mine = [cell for cell in range(cells) if to[image, cell] == thing]
            for cell in mine:
                best = max(worth[c, thing] for c in mine)
                largest = max(overlap[c, thing] for c in mine)
                target[image, cell] = worth[cell, thing] * largest / (best + 1e-9)
    return to, target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top", [3, 10])
def test_cells_are_assigned_as_loops_would(seed, top):
    given = scene(seed)
    found, (to, target) = assign(*given, top=top), by_loops(*given, top=top)
    assert torch.equal(found.to, to)
    assert torch.allclose(found.target, target, rtol=1e-9)
    assert (to >= 0).any()
    assert (to == -1).any()
    assert not torch.isin(found.to[-1], torch.tensor([3, 4])).any()  # those that are not real


def test_more_cells_than_there_are_and_no_object():
    given = scene(1, cells=6)
    assert torch.equal(assign(*given).to, by_loops(*given)[0])
    scores, boxes, points, truths, labels, real = given
    none = assign(scores, boxes, points, truths[:, :0], labels[:, :0], real[:, :0])
    assert (none.to == -1).all()
    assert (none.target == 0).all()


def test_the_best_cell_of_an_object_is_to_say_how_well_it_overlaps():
    scores, boxes, points, truths, labels, real = scene(2)
    found = assign(scores, boxes, points, truths, labels, real)
    for thing in range(5):
        mine = found.to[0] == thing
        if mine.any():
            overlaps = complete_iou(boxes[0, mine], truths[0, thing])
            assert found.target[0, mine].max() == pytest.approx(float(overlaps.max()), rel=1e-3)
    assert ((found.target >= 0) & (found.target <= 1)).all()


def test_the_loss_over_bins_is_two_cross_entropies():
    logits, wanted = torch.randn(5, 4, 16, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64) * 14.9
    left = wanted.floor().long()
    expected = F.cross_entropy(logits.flatten(0, 1), left.flatten(), reduction="none") * (left + 1 - wanted).flatten()
    expected += (
        F.cross_entropy(logits.flatten(0, 1), (left + 1).flatten(), reduction="none") * (wanted - left).flatten()
    )
    assert torch.allclose(distribution_loss(logits, wanted).flatten(), expected)
    sure = torch.full((16,), -1e3)
    sure[6] = 0
    assert float(distribution_loss(sure, torch.tensor(6.0))) == pytest.approx(0, abs=1e-6)
    between = torch.full((16,), -1e3)
    between[6] = between[7] = 0
    assert float(distribution_loss(between, torch.tensor(6.5))) == pytest.approx(math.log(2))
    assert torch.autograd.gradcheck(lambda x: distribution_loss(x, wanted[0]), logits[0].requires_grad_())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return leyolo("nano", width=0.15, num_classes=NC).train()


def maps_of(images: int = 2, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 64 + NC, side, side, generator=g) for side in (8, 4, 2)]


BOXES = [torch.tensor([[8.0, 8, 30, 36], [20, 16, 60, 62]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([1, 3]), torch.zeros(0, dtype=torch.long)]


def test_the_losses_are_their_formulas(model):
    maps = maps_of()
    found = losses(model, maps, BOXES, LABELS)
    flat = torch.cat([each.flatten(2) for each in maps], 2).transpose(1, 2).double()
    bins, logits = flat[..., :64].view(2, -1, 4, 16), flat[..., 64:]
    points, strides = (each.double() for each in model.cells(maps))
    reach = (bins.softmax(3) * torch.arange(16)).sum(3)
    guesses = torch.cat([points - reach[..., :2] * strides, points + reach[..., 2:] * strides], -1)
    truths = torch.stack([BOXES[0], torch.zeros(2, 4)]).double()
    names, real = torch.stack([LABELS[0], torch.zeros(2, dtype=torch.long)]), torch.tensor([[True] * 2, [False] * 2])
    to, target = by_loops(logits.sigmoid(), guesses, points, truths, names, real)
    wanted, box, dfl = torch.zeros_like(logits), 0.0, 0.0
    for image, cell in (to >= 0).nonzero().tolist():
        thing, weight = int(to[image, cell]), float(target[image, cell])
        wanted[image, cell, names[image, thing]] = weight
        truth = truths[image, thing]
        box += weight * float(1 - complete_iou(guesses[image, cell], truth))
        away = torch.cat([points[cell] - truth[:2], truth[2:] - points[cell]]) / strides[cell]
        dfl += weight * float(distribution_loss(bins[image, cell], away.clamp(0, 14.99)).mean())
    whole = max(float(wanted.sum()), 1.0)
    bce = -(wanted * F.logsigmoid(logits) + (1 - wanted) * F.logsigmoid(-logits)).sum()
    assert (to >= 0).sum() > 10
    assert float(found.label) == pytest.approx(0.5 * float(bce) / whole, rel=1e-4)
    assert float(found.box) == pytest.approx(7.5 * box / whole, rel=1e-3)
    assert float(found.distribution) == pytest.approx(1.5 * dfl / whole, rel=1e-3)
    assert float(found.total) == pytest.approx(float(found.label + found.box + found.distribution))


def test_images_without_objects_teach_what_is_nothing(model):
    maps = [each.requires_grad_() for each in maps_of()]
    found = losses(model, maps, [BOXES[1]] * 2, [LABELS[1]] * 2)
    assert found.box == found.distribution == 0
    found.total.backward()
    assert all((each.grad[:, 64:] > 0).all() for each in maps)
    assert all((each.grad[:, :64] == 0).all() for each in maps)


def test_a_perfect_guess_costs_nearly_nothing(model):
    """Of one object, that one cell finds: all bins and the class are certain."""
    maps = [torch.zeros(1, 64 + NC, side, side) for side in (8, 4, 2)]
    for each in maps:
        each[:, 64:] = -30
        each[:, :64].unflatten(1, (4, 16))[:, :, 15] = 100  # others guess boxes that overlap nothing well
    maps[1][0, :64, 1, 1] = 0
    maps[1][0, :64, 1, 1].view(4, 16)[:, 1] = 100
    maps[1][0, 64 + 2, 1, 1] = 30
    found = losses(model, maps, [torch.tensor([[8.0, 8, 40, 40]])], [torch.tensor([2])])
    assert float(found.total) < 0.05
    far = losses(model, maps, [torch.tensor([[8.0, 8, 40, 40]])], [torch.tensor([1])])
    assert float(far.total) > 3


def test_the_losses_are_float32_of_half_precision_maps(model):
    low = [each.bfloat16() for each in maps_of()]
    found = losses(model, low, BOXES, LABELS)
    assert found.total.dtype == torch.float32
    assert torch.equal(found.total, losses(model, [each.float() for each in low], BOXES, LABELS).total)


@pytest.mark.parametrize(
    ("boxes", "labels", "error", "message"),
    [
        (BOXES[:1], LABELS, ValueError, "one entry for each of 2 images, got 1, 2"),
        ([BOXES[0][:, :3], BOXES[1]], LABELS, ValueError, "boxes must have shape"),
        ([BOXES[0].flip(1), BOXES[1]], LABELS, ValueError, "with an area"),
        ([BOXES[0] * math.nan, BOXES[1]], LABELS, ValueError, "boxes must be finite"),
        (BOXES, [LABELS[0] + 1, LABELS[1]], ValueError, "labels must be 0 to 3, got 2 to 4"),
        (BOXES, [LABELS[0].float(), LABELS[1]], TypeError, "labels must hold whole numbers"),
        (BOXES, [LABELS[0][:1], LABELS[1]], ValueError, "labels must have shape"),
    ],
)
def test_bad_objects_are_named(model, boxes, labels, error, message):
    with pytest.raises(error, match=message):
        losses(model, maps_of(), boxes, labels)
