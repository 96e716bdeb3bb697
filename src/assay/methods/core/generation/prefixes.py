"""Prompts that begin alike share the pages of what they have in common: a trie over blocks of token ids.

Each node stands for one full page of tokens behind all that precede it, and holds that page (`PagePool.hold`). Who finds a prefix
holds its pages too and reads them; nobody writes to a shared page. A page that only the trie holds can be given back, the least
recently used first. The idea is that of vLLM's prefix caching and SGLang's radix tree.

When NOT to use it: for pages whose keys and values depend on more than the token ids up to there (another adapter, an attention
that looks at the whole prompt); keep a trie for each model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from assay import checks
from assay.methods.core.generation.paged import PAGE, PagePool


@dataclass(eq=False)
class _Node:
    page: int
    block: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class Prefixes:
    """The pages of prefixes seen before, by their token ids. Not safe for several threads.

    Matching and inserting take time proportional to the prefix, evicting to the number of pages kept.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._root = _Node(-1, (), None)
        self._nodes: OrderedDict[int, _Node] = OrderedDict()  # the least recently used first, a node before its parent

    def __len__(self) -> int:
        """How many pages are kept."""
        return len(self._nodes)

    def match(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """The pages of the longest kept prefix of `ids`, in order, and the tokens they cover, a multiple of the page.

        The pages are not held for the caller: hold those you want (`pool.hold`) before anything is evicted.
        """
        path = self._path(ids)
        self._used(path)
        return [node.page for node in path], len(path) * PAGE

    def insert(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Keep the full pages of a sequence: `pages[i]` holds tokens i * PAGE to (i + 1) * PAGE of `ids`.

        Tokens and pages behind the last full block are left out. Where a block is kept already its page stays, and if that is another
        than the one given, nothing behind it is kept: who holds a page of the trie holds all before it, so that all that nobody
        uses can be evicted. Raises ValueError when there are fewer pages than full blocks, or a page stands for another prefix.
        """
        blocks = len(ids) // PAGE
        if len(pages) < blocks:
            raise ValueError(f"pages must cover the {blocks} full blocks of {len(ids)} tokens, got {len(pages)} pages")
        path = self._path(ids)
        if any(node.page != page for node, page in zip(path, pages, strict=False)):
            self._used(path)
            return
        new = list(pages[len(path) : blocks])
        if len(set(new)) < len(new) or any(page in self._nodes for page in new):
            raise ValueError(f"pages must each stand for one prefix, got {checks.shown(new)}")
        self.pool.hold(new)
        for page in new:
            start = len(path) * PAGE
            parent = path[-1] if path else self._root
            node = _Node(page, tuple(ids[start : start + PAGE]), parent)
            parent.children[node.block] = self._nodes[page] = node
            path.append(node)
        self._used(path)

    def evict(self, count: int) -> int:
        """Give back up to `count` pages that nobody else holds, the least recently used first; returns how many.

        A page stays while a longer prefix goes through it.
        """
        freed: list[int] = []
        for page, node in list(self._nodes.items()):
            if len(freed) >= count:
                break
            if not node.children and self.pool.holders(page) == 1:
                assert node.parent is not None
                del node.parent.children[node.block], self._nodes[page]
                freed.append(page)
        self.pool.release(freed)
        return len(freed)

    def clear(self) -> None:
        """Let go of every page."""
        self.pool.release(list(self._nodes))
        self._nodes.clear()
        self._root.children.clear()

    def _path(self, ids: Sequence[int]) -> list[_Node]:
        node, path = self._root, []
        for start in range(0, len(ids) - PAGE + 1, PAGE):
            child = node.children.get(tuple(ids[start : start + PAGE]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _used(self, path: list[_Node]) -> None:
        for node in reversed(path):  # parents last: they are the more recent, and what evicts meets children first
            self._nodes.move_to_end(node.page)
