"""The trie of pages: what is found, what is held, what is given up first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.core.generation.prefixes import Prefixes
from properties.paged_stand_in import paged

PAGE = paged.PAGE


def pool_of(pages: int):
    return paged.PagePool(layers=1, kv_heads=1, head_size=16, pages=pages, dtype=torch.float32)


def tokens(*blocks: int, rest: int = 0) -> list[int]:
    """Full blocks named by numbers, and some tokens more."""
    return [block * 100 + place for block in blocks for place in range(PAGE)] + [9_999] * rest


def kept(prefixes: Prefixes, pool, *blocks: int) -> list[int]:
    """Insert a sequence as a row would: take pages (those found first are shared), insert, and leave."""
    found, covered = prefixes.match(tokens(*blocks))
    pool.hold(found)
    pages = found + pool.take(len(blocks) - covered // PAGE)
    prefixes.insert(tokens(*blocks), pages)
    pool.release(pages)
    return pages


def test_the_longest_prefix_of_whole_pages_is_found():
    pool = pool_of(8)
    prefixes = Prefixes(pool)
    assert prefixes.match(tokens(1, 2)) == ([], 0)
    pages = kept(prefixes, pool, 1, 2, 3)
    assert prefixes.match(tokens(1, 2, 3)) == (pages, 3 * PAGE)
    assert prefixes.match(tokens(1, 2, rest=5)) == (pages[:2], 2 * PAGE)
    assert prefixes.match(tokens(1, 2, 3, 4)) == (pages, 3 * PAGE)
    assert prefixes.match(tokens(1, 3)) == (pages[:1], PAGE)
    assert prefixes.match(tokens(2)) == prefixes.match([]) == ([], 0)
    assert len(prefixes) == 3


def test_the_trie_is_one_holder_of_its_pages_and_what_is_kept_already_stays():
    pool = pool_of(8)
    prefixes = Prefixes(pool)
    first, second = pool.take(3), pool.take(3)
    prefixes.insert(tokens(1, 2, rest=3), first)
    assert [pool.holders(page) for page in first] == [2, 2, 1]  # the half-full page is the row's own
    prefixes.insert(tokens(1, 2, 3), second)  # computed beside what was kept: it does not continue the pages that were
    assert [pool.holders(page) for page in second] == [1, 1, 1]
    assert prefixes.match(tokens(1, 2, 3)) == (first[:2], 2 * PAGE)
    pool.release(first)
    pool.release(second)
    assert pool.pages - pool.free == len(prefixes) == 2
    prefixes.clear()
    assert pool.free == pool.pages
    assert prefixes.match(tokens(1)) == ([], 0)


def test_the_least_recently_used_leaf_goes_first_and_no_page_in_use():
    pool = pool_of(8)
    prefixes = Prefixes(pool)
    old, new = kept(prefixes, pool, 1, 2), kept(prefixes, pool, 3, 4)
    prefixes.match(tokens(1, 2))  # now 3, 4 are the older ones
    assert prefixes.evict(1) == 1
    assert pool.holders(new[1]) == 0
    assert prefixes.match(tokens(3, 4)) == (new[:1], PAGE)
    pool.hold(old)  # a row reads 1, 2
    assert prefixes.evict(8) == 1
    assert prefixes.match(tokens(1, 2)) == (old, 2 * PAGE)
    pool.release(old)
    assert prefixes.evict(8) == 2
    assert pool.free == pool.pages
    assert prefixes.evict(1) == 0


def test_what_does_not_go_together_is_refused():
    pool = pool_of(4)
    prefixes = Prefixes(pool)
    pages = pool.take(2)
    with pytest.raises(ValueError, match="pages must cover the 2 full blocks"):
        prefixes.insert(tokens(1, 2), pages[:1])
    with pytest.raises(ValueError, match="one prefix"):
        prefixes.insert(tokens(1, 2), [pages[0], pages[0]])
    prefixes.insert(tokens(1), pages[:1])
    with pytest.raises(ValueError, match="one prefix"):
        prefixes.insert(tokens(2), pages[:1])
    assert [pool.holders(page) for page in pages] == [2, 1]
    assert len(prefixes) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["insert", "match", "evict"]), st.lists(st.integers(0, 2), max_size=4)), max_size=25
    )
)
def test_pages_are_found_under_the_tokens_they_were_kept_for(steps):
    pool = pool_of(12)
    prefixes = Prefixes(pool)
    known: dict[int, tuple[int, ...]] = {}  # what each page was first kept for
    for what, blocks in steps:
        if what == "evict":
            before = len(prefixes)
            freed = prefixes.evict(len(blocks))
            assert freed == min(len(blocks), before) == before - len(prefixes)  # nothing is in use here
        elif what == "match":
            found, covered = prefixes.match(tokens(*blocks))
            assert covered == len(found) * PAGE
            assert [known[page] for page in found] == [tuple(blocks[: i + 1]) for i in range(len(found))]
        elif len(blocks) <= pool.free:
            for i, page in enumerate(kept(prefixes, pool, *blocks)):
                known[page] = tuple(blocks[: i + 1])
            assert prefixes.match(tokens(*blocks))[1] == len(blocks) * PAGE
        assert pool.pages - pool.free == len(prefixes)
