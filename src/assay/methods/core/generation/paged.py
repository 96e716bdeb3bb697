"""Keys and values of many sequences in pages of 16 positions: one pool of memory, handed out page by page.

A `Sequence` is a list of page numbers and a length in tokens; its position p lies in page `pages[p // 16]`. Pages count their
holders. Sequences with a common beginning hold its full pages together; a page that is held more than once must be copied
(`PagePool.copy`) before anything is written to it. Whoever writes a prefilled prompt writes keys after the rotary embedding.

The layout is the compiled decoder's (`builtin.decode_loop`): for each layer, page and head the keys lie turned, 16 positions side by
side, and the values position after position.

    >>> import torch
    >>> pool = PagePool(layers=2, kv_heads=1, head_size=8, pages=4, dtype=torch.float32)
    >>> sequence = Sequence(pool.take(pages_for(20)))
    >>> pool.write(sequence.pages, 0, torch.ones(2, 1, 20, 8), torch.zeros(2, 1, 20, 8))
    >>> sequence.length = 20
    >>> pool.read(sequence.pages, 5, 20)[0].shape, pool.free
    (torch.Size([2, 1, 15, 8]), 2)
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

import torch
from torch import Tensor

from assay import checks

PAGE = 16  # positions to a page
DTYPES = (torch.bfloat16, torch.float32)


class OutOfPages(MemoryError):
    """More pages were asked for than are free."""


@dataclass
class Sequence:
    """The pages of a sequence in order, and how many tokens it has."""

    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def room(self) -> int:
        """Positions that its pages have."""
        return len(self.pages) * PAGE


def pages_for(tokens: int) -> int:
    """How many pages so many tokens take.

    >>> pages_for(16), pages_for(17)
    (1, 2)
    """
    return -(-tokens // PAGE)


class PagePool:
    """Reference-counted pages of keys and values.

    `keys` (layers, pages, kv_heads, head_size, 16) and `values` (layers, pages, kv_heads, 16, head_size), bfloat16 or float32; what
    a page holds before something is written to it is undefined. Not safe for several threads at once.
    Raises TypeError or ValueError for sizes that are no whole numbers of at least 1 and for another dtype.
    """

    def __init__(self, *, layers: int, kv_heads: int, head_size: int, pages: int, dtype: torch.dtype) -> None:
        layers = checks.whole("layers", layers, low=1)
        kv_heads = checks.whole("kv_heads", kv_heads, low=1)
        head_size = checks.whole("head_size", head_size, low=1)
        pages = checks.whole("pages", pages, low=1)
        checks.choice("dtype", dtype, DTYPES)
        self.keys = torch.empty(layers, pages, kv_heads, head_size, PAGE, dtype=dtype)
        self.values = torch.empty(layers, pages, kv_heads, PAGE, head_size, dtype=dtype)
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # the last one is taken first

    @property
    def pages(self) -> int:
        """Pages in all."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values of one page."""
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one holder now. Raises OutOfPages, and takes none, when there are fewer."""
        count = checks.whole("count", count, low=0)
        if count > len(self._free):
            raise OutOfPages(f"count must be at most {len(self._free)}, the pages that are free, got {count}")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder of each page. Raises ValueError, and changes nothing, for a page that nobody holds."""
        pages = self._known(pages)
        if unheld := [page for page in pages if not self._holders[page]]:
            raise ValueError(f"pages must be held by somebody, got {unheld[0]}, which is free")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer of each page; one without holders is free. Raises ValueError, and changes nothing, for too many releases."""
        pages = self._known(pages)
        for page, times in collections.Counter(pages).items():
            if times > self._holders[page]:
                raise ValueError(
                    f"pages must be held to be released, got {page}, which has {self._holders[page]} holders"
                )
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[checks.whole("page", page, low=0, high=self.pages - 1)]

    def copy(self, page: int) -> int:
        """A new page with the contents of this one. Raises OutOfPages when none is free, ValueError for a page that nobody holds."""
        if not self.holders(page):
            raise ValueError(f"page must be held by somebody, got {page}, which is free")
        (new,) = self.take(1)
        self.keys[:, new] = self.keys[:, page]
        self.values[:, new] = self.values[:, page]
        return new

    def write(self, pages: Listed[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys (after RoPE) and values, both (layers, kv_heads, tokens, head_size), at the positions from `start` on.

        They are cast to the pool's dtype. Raises ValueError, and writes nothing, when the pages do not reach that far, when one of
        those that would change is shared or free, and for other shapes.
        """
        layers, _, kv_heads, head_size, _ = self.keys.shape
        checks.tensor("keys", keys, shape=(layers, kv_heads, "tokens", head_size), empty=True)
        checks.tensor("values", values, shape=tuple(keys.shape), empty=True)
        start, stop = self._range(pages, start, checks.whole("start", start, low=0) + keys.shape[2])
        self.check_writable(pages[start // PAGE : pages_for(stop)])
        keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        at = start
        while at < stop:
            first, done = at % PAGE, at - start
            whole = (stop - at) // PAGE
            if first == 0 and whole:
                index = torch.tensor(pages[at // PAGE : at // PAGE + whole])
                part = slice(done, done + whole * PAGE)
                self.keys[:, index] = keys[:, :, part].unflatten(2, (whole, PAGE)).permute(0, 2, 1, 4, 3)
                self.values[:, index] = values[:, :, part].unflatten(2, (whole, PAGE)).permute(0, 2, 1, 3, 4)
                at += whole * PAGE
            else:
                page, count = pages[at // PAGE], min(PAGE - first, stop - at)
                part = slice(done, done + count)
                self.keys[:, page, :, :, first : first + count] = keys[:, :, part].transpose(-1, -2)
                self.values[:, page, :, first : first + count] = values[:, :, part]
                at += count

    def read(self, pages: Listed[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, kv_heads, stop - start, head_size) of the positions start..stop, as copies.

        Raises ValueError when the pages do not reach that far.
        """
        start, stop = self._range(pages, start, stop)
        index = torch.tensor(pages[start // PAGE : pages_for(stop)], dtype=torch.int64)
        offset = start // PAGE * PAGE
        keys = self.keys[:, index].permute(0, 2, 1, 4, 3).flatten(2, 3)
        values = self.values[:, index].transpose(1, 2).flatten(2, 3)
        part = slice(start - offset, stop - offset)
        return keys[:, :, part], values[:, :, part]

    def check_writable(self, pages: Iterable[int]) -> None:
        """Raises ValueError unless each of these pages has exactly one holder."""
        for page in self._known(pages):
            if self._holders[page] != 1:
                state = "free" if not self._holders[page] else f"shared by {self._holders[page]} holders: copy it first"
                raise ValueError(f"pages that are written to must have one holder, got page {page}, which is {state}")

    def _known(self, pages: Iterable[int]) -> list[int]:
        listed = list(pages)
        for page in listed:
            if not 0 <= page < len(self._holders):
                raise ValueError(f"pages must lie in 0..{len(self._holders) - 1}, got {page}")
        return listed

    def _range(self, pages: Listed[int], start: int, stop: int) -> tuple[int, int]:
        room = len(pages) * PAGE
        start = checks.whole("start", start, low=0)
        stop = checks.whole("stop", stop, low=start)
        if stop > room:
            raise ValueError(f"pages must reach to position {stop}, got {len(pages)} pages, which reach to {room}")
        self._known(pages)
        return start, stop
