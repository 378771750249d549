"""Which branches an input takes, at a cost that a fuzzer can pay: modules are rewritten as they are imported.

Every way that control can go (a function's entry, either side of an `if`, `and`, `or` or conditional expression, a loop's body and
its end, an `except`, a `case`, an element of a comprehension) is an *arm*, and the rewritten source marks it in one bytearray. That is
some 30 ns an arm, where tracing costs a microsecond a line. The rewritten code computes what the source does: a mark is a statement of its own, or
`(mark or value)` with a mark that gives None.

    watch("weftlora", "yaml")     before the first import of these packages
    arms.hits                     1 for every arm that was reached since `forget()`
    arms.reached()                how many; whether it grew says that an input did something new
"""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any

ROOM = 1 << 16
"""Most arms there can be."""


@dataclass
class Arms:
    """All arms of the modules that were imported since `watch`."""

    hits: bytearray = field(default_factory=lambda: bytearray(ROOM))
    names: list[str] = field(default_factory=list)
    """package/module.py:line:column:what, which a change elsewhere in the file moves."""
    function: list[int] = field(default_factory=list)
    """The arm of the entry of the function that an arm is in."""

    def new(self, name: str, function: int | None) -> int:
        """A number for an arm; `function` is None for an entry."""
        number = len(self.names)
        self.names.append(name)
        self.function.append(number if function is None else function)
        return number

    def reached(self) -> int:
        return self.hits.count(1, 0, len(self.names))

    def forget(self) -> None:
        self.hits[:] = bytes(ROOM)

    def of_entered(self, package: str) -> tuple[list[str], int]:
        """The arms of a package that were reached, and how many there are in the functions that were entered."""
        here = [n for n, name in enumerate(self.names) if name.startswith(package)]
        return [self.names[n] for n in here if self.hits[n]], sum(self.hits[self.function[n]] for n in here)


arms = Arms()


def _mark(number: int) -> None:
    arms.hits[number] = 1


class _Rewrite(ast.NodeTransformer):
    def __init__(self, module: str) -> None:
        self.module = module
        self.inside: list[int] = []

    def number(self, node: Any, what: str) -> int:
        return arms.new(
            f"{self.module}:{node.lineno}:{node.col_offset}:{what}", self.inside[-1] if self.inside else None
        )

    def statement(self, node: Any, what: str) -> ast.stmt:
        slot = ast.Subscript(ast.Name("__arms__", ast.Load()), ast.Constant(self.number(node, what)), ast.Store())
        return ast.fix_missing_locations(ast.copy_location(ast.Assign([slot], ast.Constant(1)), node))

    def expression(self, node: ast.expr, what: str) -> ast.expr:
        mark = ast.Call(ast.Name("__arm__", ast.Load()), [ast.Constant(self.number(node, what))], [])
        return ast.fix_missing_locations(ast.copy_location(ast.BoolOp(ast.Or(), [mark, node]), node))

    def visit_FunctionDef(self, node: Any) -> Any:
        entry = arms.new(f"{self.module}:{node.lineno}:{node.col_offset}:{node.name}", None)
        self.inside.append(entry)
        self.generic_visit(node)
        self.inside.pop()
        slot = ast.Subscript(ast.Name("__arms__", ast.Load()), ast.Constant(entry), ast.Store())
        first = ast.fix_missing_locations(ast.copy_location(ast.Assign([slot], ast.Constant(1)), node.body[0]))
        node.body.insert(1 if ast.get_docstring(node, clean=False) is not None else 0, first)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        return self.generic_visit(node) if not self.inside else self._lambda(node)

    def _lambda(self, node: ast.Lambda) -> ast.Lambda:
        self.generic_visit(node)
        node.body = self.expression(node.body, "lambda")
        return node

    def _blocks(self, node: Any, *names: str) -> Any:
        self.generic_visit(node)
        if self.inside:
            for name in names:
                getattr(node, name).insert(0, self.statement(node, name))
        return node

    def visit_If(self, node: ast.If) -> Any:
        return self._blocks(node, "body", "orelse")

    def visit_For(self, node: ast.For) -> Any:
        return self._blocks(node, "body", "orelse")

    visit_While = visit_For

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        return self._blocks(node, "body")

    def visit_match_case(self, node: ast.match_case) -> Any:
        self.generic_visit(node)
        if self.inside:
            node.body.insert(0, self.statement(node.body[0], "case"))
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        if self.inside:
            node.body, node.orelse = self.expression(node.body, "then"), self.expression(node.orelse, "else")
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        self.generic_visit(node)
        if self.inside:
            node.values[1:] = [self.expression(value, "further") for value in node.values[1:]]
        return node

    def _comprehension(self, node: Any) -> Any:
        self.generic_visit(node)
        if self.inside and any(part.ifs for part in node.generators):
            name = "value" if isinstance(node, ast.DictComp) else "elt"
            setattr(node, name, self.expression(getattr(node, name), "element"))
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def rewritten(source: str | bytes, module: str, path: str) -> CodeType:
    """The code of a module, with its arms marked."""
    tree = _Rewrite(module).visit(ast.parse(source, path))
    return compile(tree, path, "exec", dont_inherit=True)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        name = "/".join(fullname.split("."))
        return rewritten(self.get_data(path), f"{name}.py", path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def watch(*packages: str) -> None:
    """Rewrite the modules of these packages from now on."""
    builtins.__arms__ = arms.hits  # type: ignore[attr-defined]
    builtins.__arm__ = _mark  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder(packages))
