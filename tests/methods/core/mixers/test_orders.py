from __future__ import annotations

import math

import pytest
import torch

from assay.methods.core.mixers.orders import ORDERS, both_ways, inverse, scan, scan_order, unscan


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 4), (5, 7), (8, 16), (2, 3, 4)])
@pytest.mark.parametrize("name", list(ORDERS))
def test_every_order_is_a_bijection_with_an_inverse(name, size):
    if (len(size) == 3) != (name == "volume") and name not in ("raster", "bidirectional"):
        with pytest.raises(ValueError, match="size"):
            scan_order(name, *size)
        return
    order, cells = scan_order(name, *size), math.prod(size)
    assert torch.equal(order.sort(1).values, torch.arange(cells).expand_as(order))
    assert torch.equal(order.gather(1, inverse(order)), torch.arange(cells).expand_as(order))
    x = torch.randn(2, cells, 3)
    assert torch.equal(unscan(scan(x, order), order), x[:, None].expand(-1, len(order), -1, -1))


def test_what_the_orders_visit():
    assert scan_order("raster", 2, 3).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert scan_order("bidirectional", 2, 2).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert scan_order("cross", 2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 3, 1, 4, 2, 5],
        [5, 2, 4, 1, 3, 0],
    ]
    assert scan_order("serpentine", 3, 2).tolist() == [[0, 1, 3, 2, 4, 5]]
    assert scan_order("window", 2, 4, window=2).tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]
    assert scan_order("atrous", 2, 4).tolist() == [[0, 2, 1, 3, 4, 6, 5, 7]]
    assert scan_order("volume", 2, 2, 2).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 2, 4, 6, 1, 3, 5, 7],
        [0, 4, 1, 5, 2, 6, 3, 7],
    ]
    assert torch.equal(both_ways(scan_order("raster", 2, 2)), scan_order("bidirectional", 2, 2))


def jumps(order, width):
    row, column = order // width, order % width
    return (row.diff(dim=1).abs() + column.diff(dim=1).abs()).amax(1)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (8, 8), (1, 9)])
def test_serpentines_only_step_to_neighbours(height, width):
    assert (jumps(scan_order("serpentine", height, width), width) == 1).all()
    assert (jumps(scan_order("serpentine4", height, width), width) == 1).all()
    if height > 1:
        row, column = (f(scan_order("raster", height, width)[0]) for f in (lambda i: i // width, lambda i: i % width))
        assert int(column.diff().abs().max()) == width - 1
        assert int(row.diff().max()) == 1


def test_orders_first_asked_for_in_inference_mode_serve_training():
    with torch.inference_mode():
        order = scan_order("window", 6, 6, window=5)
    x = torch.randn(1, 36, 2, requires_grad=True)
    unscan(scan(x, order), order).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan_order("hilbert", 4, 4), "order must be one of"),
        (lambda: scan_order("cross", 4), "size"),
        (lambda: scan_order("raster", 0, 4), "size"),
        (lambda: scan_order("window", 4, 4, window=0), "window of order"),
        (lambda: scan_order("cross", 4, 4, window=2), "options of order 'cross' must be none"),
        (lambda: scan_order("window", 4, 4, step=2), "options of order"),
    ],
)
def test_bad_orders_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_order_is_refused():
    x = torch.randn(1, 4, 2)
    for call in (lambda o: scan(x, o), lambda o: unscan(x[:, None], o), inverse):
        for wrong, error in (("cross", TypeError), (torch.rand(1, 4), TypeError), (torch.arange(4), ValueError)):
            with pytest.raises(error, match="order must"):
                call(wrong)
