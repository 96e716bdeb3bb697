"""What a value can be, as far as the syntax shows: literals, built-in functions, annotations, and what is done with a name.

A kind that is not known is "?". Annotations are believed; so is use (`n - 1` is done with numbers, `text.upper()` with strings).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from assay.methods.core.programs.rewriting.kinds import (
    ANNOTATIONS,
    ATOM,
    BOOL,
    BYTES,
    CONTAINERS,
    FLOAT,
    INT,
    LETTER,
    LIST_METHODS,
    NONE,
    NUMBER,
    NUMBERS,
    OF_BUILTINS,
    OF_METHODS,
    SEQUENCES,
    STR,
    TEXT_METHODS,
    UNKNOWN,
    Kind,
    join,
)
from assay.methods.core.programs.rewriting.source import BUILTINS, COMPREHENSIONS, FUNCTIONS, Scope, Source, targets

PUTTING = (
    "heapq.heappush",
    "heapq.heappushpop",
    "heapq.heapreplace",
    "bisect.insort",
    "bisect.insort_left",
    "bisect.insort_right",
)
KNOWN = BUILTINS | {
    "heapq",
    "bisect",
    "random",
    "math",
    "itertools",
    "functools",
    "collections",
    "operator",
    "copy",
    "re",
    "json",
}
"""Built-in functions, and modules, that give what they are given no other name, and put in nothing else."""

ASKING = ("isinstance", "type", "hasattr", "callable", "getattr")


class Kinds:
    """The kinds of a program's expressions."""

    def __init__(self, source: Source, given: Mapping[str, Mapping[str, Kind]] | None = None) -> None:
        self.source = source
        self.given = given or {}
        """Of parameters of functions at the top level, by the names of both."""
        self._returns: dict[ast.FunctionDef, Kind | None] = {}
        self._names: dict[tuple[int, str], Kind | None] = {}
        self._open: set[tuple[int, str]] = set()
        self._calls: list[ast.FunctionDef] = []

    def of(self, node: ast.expr | None) -> Kind:
        """The kind of an expression."""
        if node is None:
            return NONE
        found = self._of(node)
        return found if found is not None else UNKNOWN

    def _of(self, node: ast.expr) -> Kind | None:
        """None where it hangs on itself, as a name that is bound to what it was before and more."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return LETTER if len(node.value) == 1 else STR
            return {bool: BOOL, int: INT, float: FLOAT, bytes: BYTES, complex: Kind("complex"), type(None): NONE}.get(
                type(node.value), ATOM
            )
        if isinstance(node, ast.JoinedStr):
            return STR
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, (ast.List, ast.Set)):
            return Kind("list" if isinstance(node, ast.List) else "set", self._joined(node.elts))
        if isinstance(node, ast.Tuple):
            if any(isinstance(one, ast.Starred) for one in node.elts):
                return Kind("tuple", self._joined(node.elts))
            parts = tuple(self.of(one) for one in node.elts)
            return Kind("tuple", join(*parts) if parts else None, None, parts)
        if isinstance(node, ast.Dict):
            if any(key is None for key in node.keys):
                return Kind("dict")
            return Kind("dict", self._joined([key for key in node.keys if key]), self._joined(node.values))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            name = {ast.ListComp: "list", ast.SetComp: "set", ast.GeneratorExp: "iterator"}[type(node)]
            return Kind(name, self.of(node.elt))
        if isinstance(node, ast.DictComp):
            return Kind("dict", self.of(node.key), self.of(node.value))
        if isinstance(node, ast.Compare):
            plain = all(isinstance(one, (ast.In, ast.NotIn, ast.Is, ast.IsNot)) for one in node.ops)
            return BOOL if plain or all(self.of(one).hashable for one in (node.left, *node.comparators)) else UNKNOWN
        if isinstance(node, ast.BoolOp):
            return self._either(node.values)
        if isinstance(node, ast.IfExp):
            return self._either([node.body, node.orelse])
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.Not):
                return BOOL
            kind = self.of(node.operand)
            return INT if kind.name in ("int", "bool") else kind if kind.name in NUMBERS else UNKNOWN
        if isinstance(node, ast.BinOp):
            return self._sum(node.op, self._of(node.left), self._of(node.right))
        if isinstance(node, ast.NamedExpr):
            return self._of(node.value)
        if isinstance(node, ast.Subscript):
            return self._part(self.of(node.value), node.slice)
        return self._call(node) if isinstance(node, ast.Call) else UNKNOWN

    def _either(self, nodes: list[ast.expr]) -> Kind | None:
        kinds = [kind for kind in map(self._of, nodes) if kind is not None]
        return join(*kinds) if kinds else None

    def _joined(self, nodes: list[ast.expr]) -> Kind | None:
        """What a display holds; None for an empty one, which what is added to it decides."""
        if not nodes:
            return None
        return join(*(self.of(one.value).held if isinstance(one, ast.Starred) else self.of(one) for one in nodes))

    def _sum(self, op: ast.operator, left: Kind | None, right: Kind | None) -> Kind | None:
        if left is None or right is None:
            known = left or right
            if known is None:
                return None
            if isinstance(op, ast.Add) and (known.text or known.name in ("list", "int", "float")):
                return STR if known.text else known
            return known if known.name in ("int", "float") and not isinstance(op, (ast.Div, ast.Pow)) else UNKNOWN
        names = {left.name, right.name}
        if names <= NUMBERS:
            if isinstance(op, ast.Div):
                return FLOAT
            if isinstance(op, ast.Pow):
                return NUMBER
            return INT if names <= {"int", "bool"} else FLOAT if "float" in names else NUMBER
        if isinstance(op, ast.Mod) and left.text:
            return STR
        if isinstance(op, ast.Add):
            if left.text and right.text:
                return STR
            if left.name == right.name and left.name in ("list", "tuple"):
                held = [one for one in (left.item, right.item) if one is not None]
                return Kind(left.name, join(*held) if held else None)
        if isinstance(op, ast.Mult):
            for one, other in ((left, right), (right, left)):
                if other.name in ("int", "bool") and (one.text or one.name in ("list", "tuple")):
                    return STR if one.text else Kind(one.name, one.item)
        if names == {"set"} and isinstance(op, (ast.BitAnd, ast.BitOr, ast.BitXor, ast.Sub)):
            return Kind("set", join(left.held, right.held))
        return UNKNOWN

    def _part(self, kind: Kind, at: ast.expr) -> Kind:
        if isinstance(at, ast.Slice):
            if kind.text:
                return STR
            return Kind(kind.name, kind.held) if kind.name in ("list", "tuple", "range") else UNKNOWN
        if kind.name == "dict":
            return kind.value or UNKNOWN
        if kind.parts and isinstance(at, ast.Constant) and type(at.value) is int and 0 <= at.value < len(kind.parts):
            return kind.parts[at.value]
        if kind.name in ("?", "sized") and self.of(at).name != "int":
            return UNKNOWN
        return kind.held if kind.name in (*SEQUENCES, "deque") else UNKNOWN

    def _call(self, node: ast.Call) -> Kind | None:
        called = self.source.called(node)
        given = node.args
        plain = not any(isinstance(one, ast.Starred) for one in given)
        if called in OF_BUILTINS:
            return OF_BUILTINS[called]
        first = self._of(given[0]) if given and plain else UNKNOWN
        if called in ("list", "tuple", "set", "frozenset", "sorted", "collections.deque"):
            if not given:
                return Kind(called.removeprefix("collections."))
            held = None if first is None else first.held if first.name != "dict" else first.item
            name = {"sorted": "list", "collections.deque": "deque"}.get(called, called)
            return Kind(name, held if held is None or held.name != "?" else UNKNOWN)
        if first is None:
            return None
        if called in ("reversed", "filter", "iter"):
            return Kind("iterator", (self.of(given[-1]) if given else UNKNOWN).held)
        if called == "enumerate" and given:
            return Kind("iterator", Kind("tuple", join(INT, first.held), None, (INT, first.held)))
        if called == "zip" and plain and given:
            parts = tuple(self.of(one).held for one in given)
            return Kind("iterator", Kind("tuple", join(*parts), None, parts))
        if called in ("max", "min") and given:
            return first.held if len(given) == 1 else join(*map(self.of, given))
        if called in ("sum", "abs", "round", "pow", "divmod"):
            kind = first.held if called == "sum" else first
            if called == "sum" and len(given) > 1:
                kind = join(kind, self.of(given[1]))
            known = kind.name in ("int", "bool") and called in ("sum", "abs")
            return INT if known else NUMBER if kind.name in NUMBERS and called != "divmod" else UNKNOWN
        if called == "map" and len(given) > 1 and self.source.builtin(given[0]) in OF_BUILTINS:
            return Kind("iterator", OF_BUILTINS[self.source.builtin(given[0])])
        if called == "collections.Counter":
            return Kind("dict", first.held if given else None, INT)
        if called == "collections.defaultdict":
            return Kind("dict", None, OF_BUILTINS.get(self.source.builtin(given[0]), UNKNOWN) if given else None)
        if called == "dict":
            return Kind("dict")
        if isinstance(node.func, ast.Attribute) and called.startswith("."):
            return self._method(node.func, given)
        definition = self.source.definition(node.func) if isinstance(node.func, ast.Name) else None
        return UNKNOWN if definition is None else self._returned(definition)

    def _returned(self, function: ast.FunctionDef) -> Kind | None:
        """What a function of the program returns."""
        inside = self.source.inside(function)
        if function.decorator_list or any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in inside):
            return UNKNOWN
        if (
            function in self._calls
        ):  # what one that calls itself returns, the rest of it says; in a wider circle nothing is known
            return None if function is self._calls[-1] else UNKNOWN
        if function not in self._returns:
            self._calls.append(function)
            values = [node.value for node in inside if isinstance(node, ast.Return)]
            kinds = [NONE if value is None else self._of(value) for value in values]
            known = [kind for kind in kinds if kind is not None]
            self._returns[function] = (
                join(*known, *([] if _always_returns(function.body) else [NONE])) if known else UNKNOWN
            )
            self._calls.pop()
        return self._returns[function]

    def _method(self, function: ast.Attribute, given: list[ast.expr]) -> Kind | None:
        owner = self.of(function.value)
        name = function.attr
        if owner.name == "dict":
            if name in ("keys", "values"):
                return Kind("sized", owner.item if name == "keys" else owner.value)
            if name == "items":
                parts = (owner.item or UNKNOWN, owner.value or UNKNOWN)
                return Kind("sized", Kind("tuple", join(*parts), None, parts))
            if name == "get" and owner.value:
                return join(owner.value, self.of(given[1]) if len(given) > 1 else NONE)
        if name in ("copy", "union", "intersection", "difference") and owner.name in (
            "set",
            "list",
            "dict",
            "frozenset",
        ):
            return (
                owner if name == "copy" else Kind(owner.name, join(owner.held, *(self.of(one).held for one in given)))
            )
        if name in ("pop", "popleft") and owner.name in ("list", "deque"):
            return owner.held
        if f".{name}" in OF_METHODS and name not in self.source.methods and (owner.text or f".{name}" == ".count"):
            return OF_METHODS[f".{name}"]
        return UNKNOWN

    # ----------------------------------------------------------------------------------------------------------------- names

    def _name(self, node: ast.Name) -> Kind | None:
        for around in self.source.ancestors(node):
            if isinstance(around, ast.Lambda) and any(
                one.arg == node.id for one in self.source.walk(around.args) if isinstance(one, ast.arg)
            ):
                return UNKNOWN
            if isinstance(around, COMPREHENSIONS):
                for n, part in enumerate(around.generators):
                    if node is not part.iter and any(
                        isinstance(one, ast.Name) and one.id == node.id for one in self.source.walk(part.target)
                    ):
                        if n == 0 and any(node is one for one in self.source.walk(part.iter)):
                            break
                        kind = self._bound_by(part.target, node.id, self.of(part.iter).held)
                        return kind if kind.name != "?" else self._by_use(around, node.id)
            if isinstance(around, ast.stmt):
                break
        home = self.source.home(node)
        if home is None or isinstance(home, ast.ClassDef) or node.id in self.source.shared:
            return UNKNOWN
        return self.named(home, node.id)

    def named(self, scope: Scope, name: str) -> Kind | None:
        """The kind of everything that a name of a scope holds; None while that is being found out."""
        key = (id(scope), name)
        if key in self._open:
            return None
        if key not in self._names:
            self._open.add(key)
            try:
                self._names[key] = self._found(scope, name)
            finally:
                self._open.discard(key)
            if self._open or self._calls:  # what is known by half is not kept
                return self._names.pop(key)
        return self._names[key]

    def _found(self, scope: Scope, name: str) -> Kind | None:
        kinds: list[Kind] = []
        once = sum(one.how != "augmented" for one in self.source.bindings(scope)[name]) == 1
        for binding in self.source.bindings(scope)[name]:
            kind: Kind | None
            if binding.how == "parameter":
                assert isinstance(binding.node, ast.arg)
                kind = self.annotated(binding.node.annotation)
                if isinstance(scope, ast.FunctionDef) and isinstance(self.source.scope(scope), ast.Module):
                    seen = self.given.get(scope.name, {}).get(name, UNKNOWN)
                    kind = seen if kind.name == "?" else kind if seen.name == "?" else join(kind, seen)
                default = self._default(scope, name)
                if default is not None and kind.name != "?":
                    kind = join(kind, self.of(default))
            elif binding.how in ("value", "item") and binding.value is not None:
                kind = self._of(binding.value)
                if kind is not None and binding.how == "item":
                    kind = kind.held
                if kind is not None:
                    kind = _at(kind, binding.path)
            elif binding.how == "augmented" and isinstance(binding.node, ast.AugAssign) and binding.value is not None:
                kind = self._sum(binding.node.op, None, self._of(binding.value))
            else:
                kind = UNKNOWN
            if kind is not None:
                used = kind.name == "?" and binding.how not in ("other", "import")
                region = scope if once else binding.node if binding.how == "item" else None  # where it is this one
                kinds.append(self._by_use(region, name) if used and region is not None else kind)
        if not kinds:
            return None
        kind = join(*kinds)
        if kind.name in ("list", "set", "deque", "dict") and not isinstance(scope, ast.Module):
            kind = self._filled(scope, name, kind)
        return kind

    def _default(self, scope: Scope, name: str) -> ast.expr | None:
        if isinstance(scope, (ast.ClassDef, ast.Module)):
            return None
        places = [*scope.args.posonlyargs, *scope.args.args]
        pairs = [*zip(reversed(places), reversed(scope.args.defaults), strict=False)]
        pairs += [
            (one, value) for one, value in zip(scope.args.kwonlyargs, scope.args.kw_defaults, strict=True) if value
        ]
        return next((value for one, value in pairs if one.arg == name), None)

    def _filled(self, scope: Scope, name: str, kind: Kind) -> Kind:
        """A container with what is put into it under this name; nothing is known where others may put something in."""
        held, value = kind.item, kind.value
        uses = self.source.uses(scope, name)
        given = any(one.how == "parameter" for one in self.source.bindings(scope)[name])
        if not given and any(self._lent(use, set()) for use in uses):
            return Kind(kind.name, UNKNOWN, UNKNOWN)
        for use in uses:
            parent = self.source.parent[use]
            call = self.source.parent.get(parent)
            new: list[Kind] = []
            if isinstance(parent, ast.Attribute) and isinstance(call, ast.Call) and call.func is parent:
                if parent.attr in ("append", "add", "appendleft") and len(call.args) == 1:
                    new = [self.of(call.args[0])]
                elif parent.attr == "insert" and len(call.args) == 2:
                    new = [self.of(call.args[1])]
                elif parent.attr in ("extend", "update", "extendleft"):
                    new = [self.of(one).held for one in call.args]
                    if kind.name == "dict":
                        new, value = [*new, UNKNOWN], UNKNOWN
                elif parent.attr == "setdefault":
                    new = [self.of(one) for one in call.args[:1]]
                    value = _and(value, self.of(call.args[1]) if len(call.args) > 1 else NONE)
            elif isinstance(parent, ast.Call) and self.source.called(parent) in PUTTING and parent.args[0] is use:
                new = [self.of(one) for one in parent.args[1:]]
            elif isinstance(parent, ast.Subscript) and parent.value is use and isinstance(parent.ctx, ast.Store):
                if kind.name == "dict":
                    held = _and(held, self.of(parent.slice))
                    value = _and(value, self._assigned(parent))
                else:
                    new = [self._assigned(parent)]
            elif isinstance(parent, ast.AugAssign) and parent.target is use:
                new = [self.of(parent.value).held]
                value = UNKNOWN if kind.name == "dict" else value
            for one in new:
                held = _and(held, one)
        return Kind(kind.name, held, value, kind.parts)

    def _lent(self, use: ast.Name, seen: set[ast.FunctionDef]) -> bool:
        """Whether something may be put into a container by a mention of it: it gets another name, or a function that puts in."""
        parent = self.source.parent[use]
        if isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            return parent.value is use
        if not isinstance(parent, ast.Call) or use not in parent.args:
            return isinstance(parent, ast.keyword) and not self.source.called(self.source.parent[parent])
        called = self.source.called(parent)
        if called:
            return called[1:] in self.source.methods or not (called[0] == "." or called.split(".")[0] in KNOWN)
        function = self.source.definition(parent.func) if isinstance(parent.func, ast.Name) else None
        if function is None:
            return True
        places, place = [*function.args.posonlyargs, *function.args.args], parent.args.index(use)
        if place >= len(places) or any(isinstance(one, ast.Starred) for one in parent.args):
            return True
        if function in seen:
            return False
        seen.add(function)
        return any(self._puts(one) or self._lent(one, seen) for one in self.source.uses(function, places[place].arg))

    def _puts(self, use: ast.Name) -> bool:
        parent = self.source.parent[use]
        if isinstance(parent, ast.Attribute):
            return parent.attr in (
                "append",
                "add",
                "appendleft",
                "insert",
                "extend",
                "extendleft",
                "update",
                "setdefault",
            )
        if isinstance(parent, ast.Call):
            return self.source.called(parent) in PUTTING
        return isinstance(parent, ast.AugAssign) or not isinstance(getattr(parent, "ctx", ast.Load()), ast.Load)

    def _assigned(self, target: ast.expr) -> Kind:
        statement = self.source.parent[target]
        sliced = isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Slice)
        if isinstance(statement, ast.Assign) and target in statement.targets and not sliced:
            return self.of(statement.value)
        if isinstance(statement, ast.AugAssign) and self.of(statement.value).name in NUMBERS:
            return self.of(statement.value)
        return UNKNOWN

    def _bound_by(self, target: ast.expr, name: str, kind: Kind) -> Kind:
        return next((_at(kind, path) for found, path in targets(target) if found == name), UNKNOWN)

    def annotated(self, node: ast.expr | None) -> Kind:
        """What an annotation says."""
        if isinstance(node, ast.Constant) and node.value is None:
            return NONE
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                return self.annotated(ast.parse(node.value, mode="eval").body)
            except (SyntaxError, ValueError):
                return UNKNOWN
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name:
            if name in ANNOTATIONS:
                return ANNOTATIONS[name]
            return Kind(
                {"tuple": "tuple", "Tuple": "tuple", "dict": "dict", "Dict": "dict"}.get(
                    name, CONTAINERS.get(name, "?")
                )
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return join(self.annotated(node.left), self.annotated(node.right))
        if not isinstance(node, ast.Subscript):
            return UNKNOWN
        outer = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer in CONTAINERS:
            return Kind(CONTAINERS[outer], self.annotated(inner[0]))
        if outer in ("tuple", "Tuple"):
            if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...:
                return Kind("tuple", self.annotated(inner[0]))
            parts = tuple(map(self.annotated, inner))
            return Kind("tuple", join(*parts), None, parts)
        if outer in ("dict", "Dict", "Mapping", "defaultdict") and len(inner) == 2:
            return Kind("dict", self.annotated(inner[0]), self.annotated(inner[1]))
        if outer == "Optional":
            return join(self.annotated(inner[0]), NONE)
        return join(*map(self.annotated, inner)) if outer == "Union" else UNKNOWN

    def _by_use(self, scope: ast.AST, name: str) -> Kind:
        """What a name must be for what is done with it."""
        nodes = (
            self.source.inside(scope)
            if isinstance(scope, (*FUNCTIONS, ast.Module, ast.ClassDef))
            else self.source.walk(scope)
        )
        uses = [
            node for node in nodes if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        ]
        if not isinstance(scope, COMPREHENSIONS):
            uses = [use for use in uses if name not in self.source.comprehension_names(use)]
        if any(self._asked(self.source.parent[use]) for use in uses):  # it may be one thing here and another there
            return UNKNOWN
        sized = False
        held: Kind | None = None
        for use in uses:
            parent = self.source.parent[use]
            if isinstance(parent, ast.BinOp):
                other = parent.right if parent.left is use else parent.left
                number = isinstance(other, ast.Constant) and type(other.value) in (int, float)
                left = isinstance(parent.op, (ast.Sub, ast.FloorDiv, ast.Mod, ast.Div, ast.Pow)) and parent.left is use
                if number and (left or isinstance(parent.op, (ast.Add, ast.Sub))):
                    return NUMBER
            elif isinstance(parent, ast.Attribute) and parent.value is use and parent.attr not in self.source.methods:
                if parent.attr in TEXT_METHODS:
                    return STR
                if parent.attr in LIST_METHODS:
                    return Kind("list")
            elif isinstance(parent, ast.Call) and use in parent.args:
                called = self.source.called(parent)
                if called in ("range", "chr"):
                    return INT
                if called == "ord":
                    return LETTER
                sized = sized or called == "len"
            elif isinstance(parent, ast.Subscript) and parent.value is use:
                sized = True
            elif isinstance(parent, ast.For) and parent.iter is use and isinstance(parent.target, ast.Name):
                kind = self._by_use(parent, parent.target.id)
                held = kind if kind.name != "?" else held
        if held is not None and held.name in NUMBERS and sized:
            return Kind("sized", held)
        return UNKNOWN

    def _asked(self, node: ast.AST) -> bool:
        """Whether something is asked what it is."""
        compared = isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        return compared or self.source.called(node) in ASKING


def _always_returns(body: list[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and _always_returns(last.body) and _always_returns(last.orelse)
    return isinstance(last, (ast.Return, ast.Raise))


def _and(one: Kind | None, other: Kind) -> Kind:
    return other if one is None else join(one, other)


def _at(kind: Kind, path: tuple[int, ...]) -> Kind:
    for place in path:
        if place == -2:
            return Kind("list", kind.held)
        kind = kind.parts[place] if kind.parts and 0 <= place < len(kind.parts) else kind.held
    return kind
