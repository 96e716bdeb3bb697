"""What runs when something runs: whether a value stays the same while a loop runs, whether a function does nothing but return.

Operators of the program's own classes are taken to change nothing; so is what the standard library's pure functions are given.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from assay.methods.core.programs.rewriting.inference import Kinds
from assay.methods.core.programs.rewriting.kinds import NUMBERS, SIZED
from assay.methods.core.programs.rewriting.source import COMPREHENSIONS, Scope, Source

PURE = frozenset(
    ("len", "sorted", "min", "max", "sum", "abs", "any", "all", "range", "enumerate", "zip", "reversed", "list", "tuple", "set",
     "frozenset", "dict", "str", "int", "float", "bool", "ord", "chr", "divmod", "pow", "round", "repr", "isinstance", "hash", "bin",
     "hex", "oct", "type", "map", "filter", "iter", "complex", "bytes", "format", "issubclass", "callable", "slice", "ascii",
     "collections.Counter", "collections.deque", "collections.defaultdict", "collections.OrderedDict", "functools.reduce",
     "copy.copy", "copy.deepcopy")
)  # fmt: skip
"""Functions that change nothing; those that take a function are as pure as that is."""
TAKERS = frozenset(("map", "filter", "sorted", "min", "max", "functools.reduce", "collections.defaultdict", "iter"))
PURE_MODULES = frozenset(
    ("math", "cmath", "itertools", "string", "operator", "re", "fractions", "decimal", "statistics")
)
PURE_METHODS = frozenset(
    ("lower", "upper", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "isalpha", "isdigit", "isupper", "islower",
     "isspace", "isalnum", "startswith", "endswith", "title", "capitalize", "swapcase", "casefold", "zfill", "join", "find", "rfind",
     "count", "index", "rindex", "replace", "get", "keys", "values", "items", "copy", "union", "intersection", "difference",
     "symmetric_difference", "issubset", "issuperset", "isdisjoint", "most_common", "elements", "bit_length", "ljust", "rjust", "center",
     "translate", "partition", "rpartition", "encode", "decode", "isdecimal", "isnumeric", "format", "removeprefix", "removesuffix")
)  # fmt: skip
MUTATORS = frozenset(
    ("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "add", "discard", "update", "setdefault", "popitem",
     "appendleft", "popleft", "extendleft", "rotate", "subtract", "move_to_end", "difference_update", "intersection_update")
)  # fmt: skip
FIRST_CHANGES = frozenset(
    ("heapq.heappush", "heapq.heappop", "heapq.heapify", "bisect.insort", "heapq.heapreplace", "heapq.heappushpop")
)
FRESH_CALLS = frozenset(
    (
        "list",
        "set",
        "dict",
        "sorted",
        "collections.deque",
        "collections.Counter",
        "collections.defaultdict",
        "collections.OrderedDict",
    )
)
READERS = PURE - {
    "iter",
    "map",
    "filter",
    "zip",
    "enumerate",
    "reversed",
    "type",
    "collections.defaultdict",
    "copy.copy",
}
"""Functions that keep nothing of the containers they are given (their elements, perhaps)."""


class Effects:
    """What the parts of a program do."""

    def __init__(self, source: Source, kinds: Kinds) -> None:
        self.source, self.kinds = source, kinds
        self._pure: dict[ast.AST, bool] = {}
        self._open: list[ast.AST] = []
        self._rows: dict[tuple[ast.AST, str], bool] = {}

    # ------------------------------------------------------------------------------------------------------------ containers

    def fresh_value(self, node: ast.expr | None) -> bool:
        """Whether an expression makes a new container that nobody else has."""
        if isinstance(node, (ast.List, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp)):
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            return self.kinds.of(node).name == "list"
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            return self.kinds.of(node.value).name == "list"
        if isinstance(node, ast.Call) and self.source.called(node) in (".copy", ".split", ".splitlines"):
            return self.kinds.of(node).name in ("list", "set", "dict")
        return self.source.called(node) in FRESH_CALLS

    def own(self, scope: Scope, name: str) -> bool:
        """Whether all that a name of a function ever holds are containers made there."""
        bindings = self.source.bindings(scope).get(name, [])
        return bool(bindings) and all(
            (one.how == "value" and not one.path and self.fresh_value(one.value) and _alone(one.node))
            or (
                one.how == "augmented"
                and self.kinds.of(one.value).name in ("list", "tuple", "set", "range", "str", "letter")
            )
            for one in bindings
        )

    def kept_in(self, scope: Scope, name: str) -> bool:
        """Whether a container of a scope has no other name while the scope runs: nobody else can change it, or see that it changes."""
        return not self.source.captured(scope, name) and all(self.reads(use) for use in self.source.uses(scope, name))

    def private(self, scope: Scope, name: str) -> bool:
        """Whether a name's container is made in the scope and has no other name there."""
        return self.own(scope, name) and self.kept_in(scope, name)

    def reads(self, use: ast.Name) -> bool:
        """Whether a mention of a container gives it no other name: what is done with it ends with the expression."""
        if not isinstance(use.ctx, ast.Load):
            return isinstance(use.ctx, ast.Store)
        parent = self.source.parent[use]
        if isinstance(parent, (ast.Return, ast.Expr, ast.FormattedValue, ast.Compare, ast.Assert, ast.UnaryOp)):
            return True
        if isinstance(parent, (ast.If, ast.While, ast.IfExp)):
            return parent.test is use
        if isinstance(parent, ast.For):
            return parent.iter is use
        if isinstance(parent, ast.comprehension):
            return (
                parent.iter is use
                and not isinstance(self.source.parent[parent], ast.GeneratorExp)
                or self._consumed(parent)
            )
        if isinstance(parent, ast.Subscript):
            return parent.value is use
        if isinstance(parent, ast.Starred):
            return True
        if isinstance(parent, ast.BinOp):
            return self.kinds.of(use).name in ("list", "set", "tuple", "str", "dict", "frozenset")
        if isinstance(parent, ast.AugAssign):
            return parent.value is use
        if isinstance(parent, ast.Attribute):
            call = self.source.parent[parent]
            known = parent.attr in PURE_METHODS | MUTATORS and parent.attr not in self.source.methods
            lasting = parent.attr in ("keys", "values", "items") and not self.passing(call)
            return known and isinstance(call, ast.Call) and call.func is parent and not lasting
        if isinstance(parent, ast.Call) and use in parent.args:
            called = self.source.called(parent)
            if (
                called in (".join", ".extend", ".update", ".union", "heapq.heappop", "heapq.heapify")
                or called in READERS
            ):
                if called in ("min", "max"):  # what they are asked to choose from
                    return len(parent.args) == 1
                return parent.args.index(use) < {"sum": 1, "functools.reduce": 2}.get(called, 9)  # what they begin with
            if called in (
                "heapq.heappush",
                "bisect.bisect",
                "bisect.bisect_left",
                "bisect.bisect_right",
                "bisect.insort",
            ):
                return parent.args[0] is use
            return called in ("enumerate", "zip", "reversed", "map", "filter", "print") and (
                called == "print" or self.passing(parent)
            )
        if isinstance(parent, ast.BoolOp):
            return self._tested(parent)
        return False

    def _tested(self, node: ast.AST) -> bool:
        parent = self.source.parent[node]
        if isinstance(parent, ast.BoolOp):
            return self._tested(parent)
        return isinstance(parent, ast.UnaryOp) or (
            isinstance(parent, (ast.If, ast.While, ast.IfExp)) and parent.test is node
        )

    def passing(self, node: ast.AST) -> bool:
        """Whether an iterator is used up where it is made."""
        parent = self.source.parent[node]
        if isinstance(parent, ast.For):
            return parent.iter is node
        if isinstance(parent, ast.Compare):
            return True
        if isinstance(parent, ast.comprehension):
            return parent.iter is node and (
                not isinstance(self.source.parent[parent], ast.GeneratorExp) or self._consumed(parent)
            )
        if isinstance(parent, ast.Call):
            called = self.source.called(parent)
            if called in ("enumerate", "zip", "reversed", "map", "filter"):
                return self.passing(parent)
            return called in READERS or called in (".join", ".extend", ".update", "next")
        return False

    def _consumed(self, part: ast.comprehension) -> bool:
        return self.passing(self.source.parent[part])

    # ----------------------------------------------------------------------------------------------------------------- loops

    def unchanged(self, name: str, loop: ast.AST, scope: Scope) -> bool:
        """Whether a name, and what it holds, stay the same while a loop (or any node) runs.

        A container that others may know (a parameter, say) could be changed by whatever the loop calls, so that it may call pure
        functions only, and change containers only that the scope made itself.
        """
        if isinstance(scope, ast.ClassDef) or name in self.source.shared:
            return False
        for node in self.source.walk(loop):
            if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
                return False
            if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name == name:
                return False
        if any(root == name for root in self.changed(loop)):
            return False
        home_kind = self.kinds.named(scope, name) if name in self.source.bindings(scope) else None
        if home_kind is not None and home_kind.immutable:
            return True
        if not self.kept_in(scope, name):
            return False
        if self.own(scope, name):
            return True
        return all(root is not None and self.own(scope, root) for root in self.changed(loop))

    def changed(self, node: ast.AST) -> Iterator[str | None]:
        """The names whose containers a node may change, None for whatever else it may."""
        for one in self.source.walk(node):
            if isinstance(
                one,
                (ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith, ast.With, ast.ClassDef, ast.Import),
            ):
                yield None
            elif isinstance(one, (ast.Subscript, ast.Attribute)) and not isinstance(one.ctx, ast.Load):
                yield from self._owners(one)
            elif isinstance(one, ast.AugAssign):  # of a container it changes in place
                if self.kinds.of(one.value).name not in NUMBERS and not self.kinds.of(one.target).immutable:
                    yield from self._owners(one.target, 1)
            elif isinstance(one, ast.Call):
                yield from self._changed_by(one)

    def _owners(self, node: ast.expr, depth: int = 0) -> Iterator[str | None]:
        """The name of the container in which a place is changed, and None where that is deeper than what is certainly its own."""
        while isinstance(node, (ast.Subscript, ast.Attribute)):
            node, depth = node.value, depth + 1
        if not isinstance(node, ast.Name):
            yield None
            return
        yield node.id
        if depth > 1:
            home = self.source.home(node)
            if home is None or depth > 2 or not self._own_rows(home, node.id):
                yield None

    def _own_rows(self, scope: Scope, name: str) -> bool:
        """Whether all containers that a container of the scope holds are made for it: `[[0] * n for _ in range(n)]`."""
        key = (scope, name)
        if key not in self._rows:
            bindings = self.source.bindings(scope)[name]
            made = all(one.how == "value" and not one.path and self._rowed(one.value) for one in bindings)
            put = made and all(map(self._row_put, self.source.uses(scope, name)))
            self._rows[key] = put and self.kept_in(scope, name)
        return self._rows[key]

    def _rowed(self, node: ast.expr | None) -> bool:
        if isinstance(node, (ast.List, ast.Dict)):
            return all(map(self._row, node.elts if isinstance(node, ast.List) else node.values))
        if isinstance(node, (ast.ListComp, ast.DictComp)):
            return self._row(node.elt if isinstance(node, ast.ListComp) else node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self._rowed(node.left)
        if isinstance(node, ast.Call) and self.source.called(node) == "collections.defaultdict":
            return bool(node.args) and self.source.builtin(node.args[0]) in ("list", "set", "dict", "int")
        return isinstance(node, ast.Call) and not node.args and self.source.called(node) in FRESH_CALLS

    def _row(self, node: ast.expr) -> bool:
        return self.fresh_value(node) or self.kinds.of(node).immutable

    def _row_put(self, use: ast.Name) -> bool:
        """Whether a mention puts nothing into a container but rows of its own."""
        parent = self.source.parent[use]
        above = self.source.parent.get(parent)
        if isinstance(parent, ast.Subscript) and parent.value is use and not isinstance(parent.ctx, ast.Load):
            plain = isinstance(above, ast.Assign) and not isinstance(parent.slice, ast.Slice)
            return isinstance(parent.ctx, ast.Del) or (plain and self._row(above.value))  # type: ignore[union-attr]
        if isinstance(parent, ast.Attribute) and isinstance(above, ast.Call) and above.func is parent:
            puts = parent.attr in ("append", "appendleft", "insert", "setdefault")
            return all(map(self._row, above.args)) if puts else parent.attr not in ("extend", "update", "extendleft")
        return not isinstance(parent, ast.AugAssign)

    def _changed_by(self, call: ast.Call) -> Iterator[str | None]:
        called = self.source.called(call)
        if called in FIRST_CHANGES:
            yield from self._owners(call.args[0], 1) if call.args else (None,)
        elif called.startswith("."):
            name = called[1:]
            if name in self.source.methods or name not in PURE_METHODS | MUTATORS:
                yield None
            elif name in MUTATORS:
                yield from self._owners(call.func)
                if name == "sort" and any(
                    not self._pure_function(one.value) for one in call.keywords if one.arg == "key"
                ):
                    yield None
        elif not self._pure_call(call, called):
            yield None

    def _pure_call(self, call: ast.Call, called: str) -> bool:
        if called in TAKERS:
            functions = [one.value for one in call.keywords if one.arg == "key"]
            if called in ("map", "filter", "functools.reduce", "collections.defaultdict"):
                functions += call.args[:1]
            return called != "iter" and all(map(self._pure_function, functions))
        if called in ("print", "next") or called in PURE:
            return True
        if called.split(".")[0] in PURE_MODULES and "." in called:
            return True  # functions that it is given are looked at where they are written
        return isinstance(call.func, ast.Name) and self._pure_function(call.func)

    def _pure_function(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Lambda):
            return None not in self.changed(node.body)
        if isinstance(node, ast.Constant):
            return True
        if self.source.builtin(node):
            return self.source.builtin(node) in PURE - TAKERS
        if isinstance(node, ast.Attribute):
            known = node.attr in PURE_METHODS and node.attr not in self.source.methods
            root = isinstance(node.value, ast.Name) and self.source.imports.get(node.value.id, ("", "x"))
            return known or (bool(root) and root[1] == "" and root[0] in PURE_MODULES)  # type: ignore[index]
        if isinstance(node, ast.Name):
            if node.id in self.source.imports:
                return self.source.imports[node.id][0] in PURE_MODULES
            definition = self.source.definition(node)
            return definition is not None and self.changes_nothing(definition)
        return False

    def changes_nothing(self, function: ast.FunctionDef) -> bool:
        """Whether a function changes nothing that was there before its call; what it prints counts as nothing."""
        if function in self._pure:
            return self._pure[function]
        if (
            function in self._open
        ):  # one that calls itself is as pure as the rest of it; of others in a circle nothing is known
            return function is self._open[-1]
        self._open.append(function)
        found = not function.decorator_list or all(_caches(self.source, one) for one in function.decorator_list)
        for node in self.source.inside(function):
            if isinstance(node, (ast.Global, ast.Nonlocal, ast.AsyncFunctionDef, ast.FunctionDef, ast.ClassDef)):
                found = False
        if found:
            body = ast.Module(body=function.body, type_ignores=[])
            found = all(root is not None and self.own(function, root) for root in self.changed(body))
        self._open.pop()
        self._pure[function] = found
        return found

    # ------------------------------------------------------------------------------------------------------------ expressions

    def total(self, node: ast.AST) -> bool:
        """Whether an expression certainly raises nothing and changes nothing, once its names have values."""
        kind = self.kinds.of
        if isinstance(node, (ast.Name, ast.Constant)):
            return True
        if isinstance(node, (ast.Tuple, ast.List)):
            return all(not isinstance(one, ast.Starred) and self.total(one) for one in node.elts)
        if isinstance(node, ast.BoolOp):
            return all(map(self.total, node.values))
        if isinstance(node, ast.IfExp):
            return all(map(self.total, (node.test, node.body, node.orelse)))
        if isinstance(node, ast.UnaryOp):
            return self.total(node.operand) and (
                isinstance(node.op, ast.Not) or kind(node.operand).name in ("int", "number", "float")
            )
        if isinstance(node, ast.Compare):
            return self._compares(node)
        if isinstance(node, ast.BinOp):
            if not (self.total(node.left) and self.total(node.right)):
                return False
            left, right = kind(node.left), kind(node.right)
            numbers = left.name in NUMBERS and right.name in NUMBERS
            if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
                whole = left.name == right.name == "int"  # a float and an int too large for one overflow
                return whole or (
                    numbers and "int" not in (left.name, right.name) and "number" not in (left.name, right.name)
                )
            if isinstance(node.op, (ast.Mod, ast.FloorDiv)):
                divisor = node.right.value if isinstance(node.right, ast.Constant) else 0
                return left.name in ("int", "bool") and type(divisor) is int and divisor != 0
            return False
        if isinstance(node, ast.Call):
            called = self.source.called(node)
            if node.keywords or any(isinstance(one, ast.Starred) or not self.total(one) for one in node.args):
                return False
            kinds = [kind(one) for one in node.args]
            if called == "len" and len(kinds) == 1:
                return kinds[0].name in SIZED or kinds[0].text
            if called == "abs" and len(kinds) == 1:
                return kinds[0].name in NUMBERS
            return False
        return False

    def _compares(self, node: ast.Compare) -> bool:
        nodes = [node.left, *node.comparators]
        if not all(map(self.total, nodes)):
            return False
        kinds = [self.kinds.of(one) for one in nodes]
        for op, left, right in zip(node.ops, kinds, kinds[1:], strict=False):
            if isinstance(op, (ast.Is, ast.IsNot)):
                continue
            if isinstance(op, (ast.In, ast.NotIn)):
                held = right.name in ("list", "tuple", "range") or (
                    right.name in ("set", "dict", "frozenset") and left.hashable
                )
                if not (left.hashable and (held or (right.text and left.text))):
                    return False
            elif isinstance(op, (ast.Eq, ast.NotEq)):
                if not (left.hashable or right.hashable):
                    return False
            elif not ((left.text and right.text) or (left.name in NUMBERS and right.name in NUMBERS)):
                return False
        return True

    def names(self, node: ast.AST) -> set[str]:
        """The names that an expression reads, but for those that it binds itself."""
        own = {
            name.id
            for one in self.source.walk(node)
            if isinstance(one, COMPREHENSIONS)
            for part in one.generators
            for name in self.source.walk(part.target)
            if isinstance(name, ast.Name)
        }
        own |= {one.arg for one in self.source.walk(node) if isinstance(one, ast.arg)}
        return {one.id for one in self.source.walk(node) if isinstance(one, ast.Name)} - own

    def quiet(self, node: ast.AST) -> bool:
        """Whether running a node changes nothing and prints nothing (it may raise)."""
        for one in self.source.walk(node):
            if isinstance(one, ast.Call) and self.source.called(one) in ("print", "next", "input"):
                return False
            if isinstance(one, ast.NamedExpr):
                return False
        return next(iter(self.changed(node)), "") == ""


def _alone(statement: ast.AST) -> bool:
    """Whether an assignment has one target: `a = b = []` makes one list with two names."""
    return not isinstance(statement, ast.Assign) or len(statement.targets) == 1


def _caches(source: Source, node: ast.expr) -> bool:
    function = node.func if isinstance(node, ast.Call) else node
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("cache", "lru_cache")
