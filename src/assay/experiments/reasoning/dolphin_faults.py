"""Scripts with one planted fault each: slips of the kinds that people and models make, at random places, kept where
they really raise."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Sequence

from assay.methods.reasoning.dolphin.tracebacks import kept_lines

Planter = Callable[["Source", random.Random], str | None]


class Source:
    """A script, its tree, and the text of nodes that lie on one line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = kept_lines(text)
        self.tree = ast.parse(text)

    def nodes(self, kind: type[ast.expr]) -> list[ast.expr]:
        """The expressions of a kind on one line, in order."""
        found = [n for n in ast.walk(self.tree) if isinstance(n, kind) and n.lineno == n.end_lineno]
        return sorted(found, key=lambda n: (n.lineno, n.col_offset))

    def of(self, node: ast.expr) -> str:
        """The node as it is written."""
        return ast.get_source_segment(self.text, node) or ""

    def changed(self, node: ast.expr, text: str) -> str:
        """The script with another text in the node's place."""
        line = self.lines[node.lineno - 1].encode()
        new = (line[: node.col_offset] + text.encode() + line[node.end_col_offset :]).decode()
        return "".join([*self.lines[: node.lineno - 1], new, *self.lines[node.lineno :]])


def _slip(word: str, chance: random.Random) -> str:
    """Two neighbouring letters the other way round, or one left out."""
    at = chance.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :] if chance.random() < 0.5 else word[:at] + word[at + 1 :]


def _import(source: Source, chance: random.Random) -> str | None:
    found = [n for n in source.tree.body if isinstance(n, ast.Import)]
    gone = chance.choice(found).lineno
    return "".join(line for n, line in enumerate(source.lines, 1) if n != gone)


def _name(source: Source, chance: random.Random) -> str | None:
    uses = [
        n for n in source.nodes(ast.Name) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and len(n.id) > 3
    ]
    node = chance.choice(uses)
    assert isinstance(node, ast.Name)
    return source.changed(node, _slip(node.id, chance))


def _attribute(source: Source, chance: random.Random) -> str | None:
    node = chance.choice([n for n in source.nodes(ast.Attribute) if isinstance(n, ast.Attribute) and len(n.attr) > 2])
    assert isinstance(node, ast.Attribute)
    return source.changed(node, source.of(node).removesuffix(node.attr) + _slip(node.attr, chance))


def _key(source: Source, chance: random.Random) -> str | None:
    keys = [
        n.slice
        for n in source.nodes(ast.Subscript)
        if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant)
    ]
    texts = [n for n in keys if isinstance(n.value, str) and len(n.value) > 2]
    if not texts:
        return None
    node = chance.choice(texts)
    return source.changed(node, repr(_slip(str(node.value), chance)))


def _calls(source: Source, least: int) -> list[ast.Call]:
    own = {n.name for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return [
        n for n in source.nodes(ast.Call)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in own and len(n.args) >= least and
        not n.keywords
    ]  # fmt: skip


def _swapped(source: Source, chance: random.Random) -> str | None:
    found = _calls(source, 2)
    if not found:
        return None
    node = chance.choice(found)
    given = [source.of(one) for one in node.args]
    at = chance.randrange(len(given) - 1)
    given[at], given[at + 1] = given[at + 1], given[at]
    return source.changed(node, f"{source.of(node.func)}({', '.join(given)})")


def _left_out(source: Source, chance: random.Random) -> str | None:
    found = _calls(source, 2)
    if not found:
        return None
    node = chance.choice(found)
    given = [source.of(one) for one in node.args]
    del given[chance.randrange(len(given))]
    return source.changed(node, f"{source.of(node.func)}({', '.join(given)})")


def _turned(source: Source, chance: random.Random) -> str | None:
    products = [n for n in source.nodes(ast.BinOp) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult)]
    if not products:
        return None
    node = chance.choice(products)
    side = chance.choice([node.left, node.right])
    text = source.of(side)
    return source.changed(side, text.removesuffix(".T") if text.endswith(".T") else f"{text}.T")


def _number(source: Source, chance: random.Random) -> str | None:
    found = [n for n in source.nodes(ast.Constant) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]
    if not found:
        return None
    node = chance.choice(found)
    return source.changed(node, repr(source.of(node)))


PLANTERS: dict[str, Planter] = {
    "an import is missing": _import,
    "a name is misspelt": _name,
    "an attribute is misspelt": _attribute,
    "a key is misspelt": _key,
    "arguments are swapped": _swapped,
    "an argument is missing": _left_out,
    "a matrix lies the wrong way": _turned,
    "a number is a text": _number,
}


def faulty(scripts: Sequence[str], seed: int) -> Iterator[tuple[str, str]]:
    """(kind of fault, script) without end, kinds in turn, the script and the place at random; whether it raises is
    seen by running it.

    Each kind is one that a repairer by rules can know: what share is repaired follows from that, and only how ways of
    repairing differ is measured.
    """
    chance = random.Random(seed)
    while True:
        for kind, plant in PLANTERS.items():
            text = plant(Source(chance.choice(scripts)), chance)
            if text is None:
                continue
            try:
                ast.parse(text)
            except SyntaxError:
                continue
            yield kind, text
