"""Pages of keys and values: what is written comes back, holders are counted, and nothing shared is written to."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.core.generation.paged import PAGE, OutOfPages, PagePool, Sequence, pages_for

SIZES = {"layers": 2, "kv_heads": 3, "head_size": 4}


def pool_of(pages, dtype=torch.float32):
    made = PagePool(**SIZES, pages=pages, dtype=dtype)
    made.keys.fill_(torch.nan)  # what nobody wrote is undefined
    made.values.fill_(torch.nan)
    return made


def states(tokens, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 4)


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 40), tokens=st.integers(0, 70), data=st.data())
def test_what_is_written_comes_back_and_nothing_else_changes(start, tokens, data):
    pool = pool_of(9)
    pages = pool.take(7)
    random.Random(start).shuffle(pages)
    before = states(7 * PAGE, seed=1)
    pool.write(pages, 0, *before)
    keys, values = states(tokens)
    pool.write(pages, start, keys, values)
    first = data.draw(st.integers(0, 7 * PAGE))
    last = data.draw(st.integers(first, 7 * PAGE))
    for found, old, new in zip(pool.read(pages, first, last), before, (keys, values), strict=True):
        expected = old.clone()
        expected[:, :, start : start + tokens] = new
        assert torch.equal(found, expected[:, :, first:last])


def test_the_layout_is_the_kernels():
    pool = pool_of(3)
    pages = pool.take(2)[::-1]
    keys, values = states(20)
    pool.write(pages, 0, keys, values)
    for position in (0, 15, 16, 19):
        page, place = pages[position // PAGE], position % PAGE
        assert torch.equal(pool.keys[:, page, :, :, place], keys[:, :, position])
        assert torch.equal(pool.values[:, page, :, place], values[:, :, position])


def test_another_dtype_is_cast():
    pool = pool_of(2, torch.bfloat16)
    pages = pool.take(2)
    keys, values = states(20)
    pool.write(pages, 0, keys, values)
    found = pool.read(pages, 0, 20)
    assert torch.equal(found[0], keys.bfloat16())
    assert torch.equal(found[1], values.bfloat16())
    assert pool.page_bytes == 2 * 2 * 3 * 4 * 16 * 2


def test_pages_are_counted():
    pool = pool_of(5)
    assert (pool.pages, pool.free) == (5, 5)
    first = pool.take(2)
    assert (first, pool.free) == ([0, 1], 3)
    pool.hold(first)
    assert [pool.holders(page) for page in range(3)] == [2, 2, 0]
    pool.release(first)
    assert pool.free == 3
    pool.release([0])
    assert pool.free == 4
    assert pool.holders(0) == 0
    second = pool.take(4)
    assert sorted(second) == [0, 2, 3, 4]
    assert pool.take(0) == []


def test_too_few_pages():
    pool = pool_of(3)
    pool.take(2)
    with pytest.raises(OutOfPages, match="count must be at most 1, the pages that are free, got 2"):
        pool.take(2)
    assert issubclass(OutOfPages, MemoryError)
    assert pool.free == 1
    pool.take(1)
    with pytest.raises(OutOfPages):
        pool.copy(0)


def test_a_copy_is_a_page_of_its_own():
    pool = pool_of(4)
    (page,) = pool.take(1)
    keys, values = states(16)
    pool.write([page], 0, keys, values)
    pool.hold([page])
    new = pool.copy(page)
    assert (pool.holders(page), pool.holders(new)) == (2, 1)
    pool.write([new], 3, *states(1, seed=5))
    assert torch.equal(pool.read([page], 0, 16)[0], keys)
    assert torch.equal(pool.read([new], 4, 16)[1], values[:, :, 4:])
    with pytest.raises(ValueError, match="page must be held by somebody, got 3, which is free"):
        pool.copy(3)


def test_what_is_shared_or_free_is_not_written_to():
    pool = pool_of(4)
    pages = pool.take(2)
    pool.hold(pages[1:])
    with pytest.raises(ValueError, match="got page 1, which is shared by 2 holders: copy it first"):
        pool.write(pages, 15, *states(3))
    with pytest.raises(ValueError, match="got page 2, which is free"):
        pool.write([0, 2], 0, *states(17))
    assert pool.keys.isnan().all()  # nothing was written
    pool.write(pages, 0, *states(16))  # the shared page is not touched


def test_holders_cannot_be_miscounted():
    pool = pool_of(3)
    pages = pool.take(2)
    for change, message in (
        (lambda: pool.release([2]), "got 2, which has 0 holders"),
        (lambda: pool.release([0, 0]), "got 0, which has 1 holders"),
        (lambda: pool.hold([1, 2]), "got 2, which is free"),
        (lambda: pool.release([0, 3]), r"pages must lie in 0\.\.2, got 3"),
        (lambda: pool.hold([-1]), r"pages must lie in 0\.\.2, got -1"),
        (lambda: pool.read([0, 7], 0, 20), r"pages must lie in 0\.\.2, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
        assert [pool.holders(page) for page in range(3)] == [1, 1, 0]
    pool.release(pages)
    assert pool.free == 3


def test_bad_sizes_and_places():
    with pytest.raises(ValueError, match="pages must be a whole number at least 1, got 0"):
        PagePool(**SIZES, pages=0, dtype=torch.float32)
    with pytest.raises(TypeError, match="layers"):
        PagePool(**{**SIZES, "layers": 2.0}, pages=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="dtype must be one of"):
        PagePool(**SIZES, pages=1, dtype=torch.float16)
    pool = pool_of(4)
    pages = pool.take(2)
    with pytest.raises(ValueError, match="pages must reach to position 33, got 2 pages, which reach to 32"):
        pool.write(pages, 0, *states(33))
    with pytest.raises(ValueError, match="keys must have shape"):
        pool.write(pages, 0, torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="values must have shape"):
        pool.write(pages, 0, torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 6, 4))
    with pytest.raises(ValueError, match="stop must be a whole number at least 9, got 8"):
        pool.read(pages, 9, 8)
    with pytest.raises(ValueError, match="start must be a whole number at least 0"):
        pool.write(pages, -1, *states(2))
    with pytest.raises(ValueError, match="page must be a whole number at least 0 and at most 3, got 4"):
        pool.holders(4)


def test_sequences():
    assert [pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    one, other = Sequence(), Sequence()
    one.pages.append(3)
    assert (one.room, other.pages, one.length) == (16, [], 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release", "copy"]), st.integers(0, 5)), max_size=40))
def test_pages_are_neither_lost_nor_given_twice(steps):
    """Against a plain count of holders."""
    pool, held = pool_of(6), dict.fromkeys(range(6), 0)
    for action, number in steps:
        free = sum(not count for count in held.values())
        if action == "take":
            if number > free:
                with pytest.raises(OutOfPages):
                    pool.take(number)
            else:
                taken = pool.take(number)
                assert len(set(taken)) == number
                assert not any(held[page] for page in taken)
                held.update(dict.fromkeys(taken, 1))
        elif action == "copy":
            if held[number] and free:
                held[pool.copy(number)] += 1
            else:
                with pytest.raises((ValueError, OutOfPages)):
                    pool.copy(number)
        elif held[number]:
            getattr(pool, action)([number])
            held[number] += 1 if action == "hold" else -1
        else:
            with pytest.raises(ValueError, match="held"):
                getattr(pool, action)([number])
        assert [pool.holders(page) for page in range(6)] == list(held.values())
        assert pool.free == sum(not count for count in held.values())
