"""What the names of a program mean: which scope they belong to, how they get their values, what is built in and what is imported."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from assay.methods.core.programs.rewriting.text import Text

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Module)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOOPS = (ast.For, ast.While)
DYNAMIC = frozenset(("exec", "eval", "globals", "locals", "vars", "__import__", "__builtins__", "breakpoint"))
"""Programs that use these may look at names or change them behind the syntax: nothing is edited there."""
BUILTINS = frozenset(dir(builtins))
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef | ast.Module
Loop = ast.For | ast.While


@dataclass(frozen=True)
class Binding:
    """How a name gets a value: "value" of an expression, an "item" of an iterable, "parameter", "import", "augmented", or "other".

    `path` leads to the part of the value that the name gets, where it is unpacked.
    """

    how: str
    node: ast.AST
    value: ast.expr | None = None
    path: tuple[int, ...] = ()


class Source(Text):
    """A parsed program and its names. Raises ValueError for a text that is no Python."""

    def __init__(self, program: str) -> None:
        super().__init__(program)
        self._inside: dict[ast.AST, list[ast.AST]] = {}
        self._uses: dict[tuple[ast.AST, str], list[ast.Name]] = {}
        self._bindings: dict[ast.AST, dict[str, list[Binding]]] = {}

    def inside(self, scope: ast.AST) -> list[ast.AST]:
        """The nodes that are evaluated in a scope; of functions and classes within it only what is around them."""
        if scope not in self._inside:
            self._inside[scope] = list(_inside(scope))
        return self._inside[scope]

    def can_import(self, module: str, name: str) -> str | None:
        """The line that makes `name` of `module` known, "" where it is already; None where the name means something else.

        None too where the head of the program is not made of lines with one statement each.
        """
        known = self.imports.get(name)
        if known == (module, name) and any(
            isinstance(node, ast.ImportFrom)
            and any(alias.name == name and alias.asname is None for alias in node.names)
            for node in self.tree.body
        ):
            return ""
        if known is not None or name in self.identifiers:
            return None
        for node in self.tree.body:
            if self.indent(node) != "":
                return None
            if not isinstance(node, ast.Expr) and not (
                isinstance(node, ast.ImportFrom) and node.module == "__future__"
            ):
                break
        return f"from {module} import {name}"

    # ----------------------------------------------------------------------------------------------------------------- names

    @cached_property
    def identifiers(self) -> frozenset[str]:
        """Every word that the program uses as a name of anything."""
        found: set[str] = set()
        for node in self.walk(self.tree):
            for field in ("id", "arg", "name", "attr", "asname", "rest", "module"):
                if isinstance(word := getattr(node, field, None), str):
                    found |= set(word.split("."))
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                found |= set(node.names)
        return frozenset(found)

    @cached_property
    def strings(self) -> list[ast.AST]:
        """Every f-string."""
        return [node for node in self.walk(self.tree) if isinstance(node, ast.JoinedStr)]

    @cached_property
    def bound(self) -> frozenset[str]:
        """Every name that is given a value anywhere, however."""
        found: set[str] = set()
        for node in self.walk(self.tree):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                found.add(node.id)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
                found.add(node.name)
            elif isinstance(node, ast.MatchMapping) and node.rest:
                found.add(node.rest)
            elif isinstance(node, (ast.Global, ast.Nonlocal)):
                found |= set(node.names)
        return frozenset(found)

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names that a `global` or `nonlocal` lets somebody else change."""
        return frozenset(
            name for node in self.walk(self.tree) if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names
        )

    @cached_property
    def methods(self) -> frozenset[str]:
        """Names of what the program's own classes hold."""
        return frozenset(
            node.name
            for one in self.walk(self.tree)
            if isinstance(one, ast.ClassDef)
            for node in one.body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        )

    @cached_property
    def dynamic(self) -> bool:
        """Whether names may mean other things than the syntax says."""
        if DYNAMIC & self.identifiers or "builtins" in self.identifiers:
            return True
        return any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in self.walk(self.tree))

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """What imported names are, where they are nothing else: (module, "") or (module, name)."""
        found: dict[str, tuple[str, str]] = {}
        others: set[str] = set()
        for node in self.walk(self.tree):
            if isinstance(node, ast.Import):
                new = {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                new = {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
            else:
                continue
            for name, what in new.items():
                if found.setdefault(name, what) != what:
                    others.add(name)
        for node in self.walk(self.tree):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                others.add(node.id)
            elif isinstance(node, ast.arg):
                others.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                others.add(node.name)
        return {name: what for name, what in found.items() if name not in others}

    def builtin(self, node: ast.AST | None) -> str:
        """The built-in function that a name means, "" for anything else."""
        if isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in self.bound:
            return node.id
        return ""

    def called(self, node: ast.AST | None) -> str:
        """What a call calls: "len" for a built-in function, "math.gcd" for what was imported, ".append" for a method, "" otherwise."""
        if not isinstance(node, ast.Call):
            return ""
        function = node.func
        if isinstance(function, ast.Name):
            if function.id in self.imports:
                return ".".join(self.imports[function.id])
            return self.builtin(function)
        if isinstance(function, ast.Attribute):
            if isinstance(function.value, ast.Name) and self.imports.get(function.value.id, ("", "x"))[1] == "":
                return f"{self.imports[function.value.id][0]}.{function.attr}"
            return f".{function.attr}"
        return ""

    def fresh(self, base: str) -> str:
        """A name that the program does not use."""
        name, number = base, 2
        while name in self.identifiers or name in BUILTINS:
            name, number = f"{base}_{number}", number + 1
        return name

    # ---------------------------------------------------------------------------------------------------------------- scopes

    def scope(self, node: ast.AST) -> Scope:
        """The function, class or module in which a node is evaluated; comprehensions count as part of what is around them."""
        while node in self.parent:
            child, node = node, self.parent[node]
            if isinstance(node, SCOPES) and not self._around(node, child):
                return node
        assert isinstance(node, ast.Module)
        return node

    def _around(self, scope: Scope, child: ast.AST) -> bool:
        """Whether a child of a scope's node is evaluated around it."""
        if isinstance(scope, ast.Module):
            return False
        if isinstance(scope, ast.Lambda):
            return child is not scope.body
        return child not in scope.body

    def statement(self, node: ast.AST) -> ast.stmt:
        """The statement that a node belongs to."""
        while not isinstance(node, ast.stmt):
            node = self.parent[node]
        return node

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        """What is around a node, from the inside."""
        while node in self.parent:
            node = self.parent[node]
            yield node

    def loops(self, node: ast.AST, scope: ast.AST) -> list[Loop]:
        """The loops of a scope that run a node again and again, from the inside. A loop's iterable is evaluated once."""
        found: list[Loop] = []
        child = node
        for one in self.ancestors(node):
            if one is scope:
                break
            if isinstance(one, FUNCTIONS):
                return []
            if isinstance(one, LOOPS) and child not in one.orelse and child is not getattr(one, "iter", None):
                found.append(one)
            child = one
        return found

    def comprehension_names(self, node: ast.AST) -> set[str]:
        """The names that comprehensions (and lambdas) around a node bind."""
        found: set[str] = set()
        for one in self.ancestors(node):
            if isinstance(one, ast.stmt):
                break
            if isinstance(one, COMPREHENSIONS):
                found |= {
                    name.id for part in one.generators for name in self.walk(part.target) if isinstance(name, ast.Name)
                }
            elif isinstance(one, ast.Lambda):
                found |= {name.arg for name in self.walk(one.args) if isinstance(name, ast.arg)}
        return found

    def bindings(self, scope: Scope) -> dict[str, list[Binding]]:
        """How the names of a scope get their values; those of comprehensions are their own."""
        if scope not in self._bindings:
            self._bindings[scope] = dict(_bindings(self, scope))
        return self._bindings[scope]

    def home(self, name: ast.Name) -> Scope | None:
        """The scope that a name's value comes from; None where nothing in the program binds it."""
        scope = self.scope(name)
        inner = True
        while True:
            if (inner or not isinstance(scope, ast.ClassDef)) and name.id in self.bindings(scope):
                return scope
            if isinstance(scope, ast.Module):
                return None
            scope, inner = self.scope(scope), False

    def definition(self, name: ast.Name) -> ast.FunctionDef | None:
        """The function of the program that a name always means."""
        home = self.home(name)
        if home is None or name.id in self.shared or name.id in self.comprehension_names(name):
            return None
        bindings = self.bindings(home)[name.id]
        if len(bindings) == 1 and isinstance(bindings[0].node, ast.FunctionDef) and bindings[0].node.name == name.id:
            return bindings[0].node
        return None

    def uses(self, scope: Scope, name: str) -> list[ast.Name]:
        """Every mention of a name in a scope, also where nested functions mention it."""
        if (scope, name) not in self._uses:
            self._uses[scope, name] = [
                node for node in self.walk(scope) if isinstance(node, ast.Name) and node.id == name
            ]
        return self._uses[scope, name]

    def captured(self, scope: Scope, name: str) -> bool:
        """Whether functions or classes inside of a scope mention a name, or anybody may change it as a global one."""
        if name in self.shared:
            return True
        return any(self.scope(use) is not scope for use in self.uses(scope, name))

    def bound_before(self, name: str, statement: ast.stmt, scope: Scope) -> bool:
        """Whether a name certainly has a value when a statement of its scope begins."""
        bindings = self.bindings(scope).get(name, [])
        if any(one.how == "parameter" for one in bindings):
            return True
        nodes = {one.node for one in bindings if one.how in ("value", "import")}
        child: ast.AST = statement
        for around in (*self.ancestors(statement),):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(around, field, None)
                if isinstance(block, list) and child in block and nodes & set(block[: block.index(child)]):
                    return True
            if around is scope:
                return False
            child = around
        return False


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are evaluated in a scope; of functions and classes within it only what is around them."""
    body = scope.body if isinstance(scope, SCOPES) else [scope]
    waiting: list[ast.AST] = list(body) if isinstance(body, list) else [body]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [*node.decorator_list, *node.args.defaults, *(one for one in node.args.kw_defaults if one)]
        elif isinstance(node, ast.Lambda):
            waiting += [*node.args.defaults, *(one for one in node.args.kw_defaults if one)]
        elif isinstance(node, ast.ClassDef):
            waiting += [*node.decorator_list, *node.bases, *(one.value for one in node.keywords)]
        else:
            waiting += ast.iter_child_nodes(node)


def targets(target: ast.AST, path: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names that a target binds, each with its place in what is unpacked; -1 stands for some place."""
    if isinstance(target, ast.Name):
        yield target.id, path
    elif isinstance(target, ast.Starred):
        for name, _ in targets(target.value):
            yield name, (*path[:-1], -2)
    elif isinstance(target, (ast.Tuple, ast.List)):
        starred = any(isinstance(one, ast.Starred) for one in target.elts)
        for n, one in enumerate(target.elts):
            yield from targets(one, (*path, -1 if starred else n))


def _bindings(source: Source, scope: Scope) -> Iterator[tuple[str, list[Binding]]]:
    found: dict[str, list[Binding]] = {}

    def add(name: str, *binding: object) -> None:
        found.setdefault(name, []).append(Binding(*binding))  # type: ignore[arg-type]

    if isinstance(scope, FUNCTIONS):
        for one in source.walk(scope.args):
            if isinstance(one, ast.arg):
                star = one in (scope.args.vararg, scope.args.kwarg)
                add(one.arg, "other" if star else "parameter", one)
    own = {
        name for node in source.inside(scope) if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names
    }  # belong elsewhere
    comprehended = set()
    for node in source.inside(scope):
        if isinstance(node, ast.comprehension):
            comprehended |= {one for one in source.walk(node.target) if isinstance(one, ast.Name)}
    known = set()
    for node in source.inside(scope):
        parts: list[tuple[ast.AST, str, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            parts = [(one, "value", node.value) for one in node.targets]
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            parts = [(node.target, "value", node.value)]
        elif isinstance(node, ast.AugAssign):
            parts = [(node.target, "augmented", node.value)]
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            parts = [(node.target, "item" if isinstance(node, ast.For) else "other", node.iter)]
        for target, how, value in parts:
            known |= {one for one in source.walk(target) if isinstance(one, ast.Name)}
            for name, path in targets(target):
                add(name, how, node, value, path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            add(node.name, "other", node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                add((alias.asname or alias.name).split(".")[0], "import", node)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            add(node.name, "other", node)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            add(node.rest, "other", node)
    for node in source.inside(scope):  # with, del, and whatever else there is
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and node not in known | comprehended:
            add(node.id, "other", node)
    return ((name, ways) for name, ways in found.items() if name not in own)
