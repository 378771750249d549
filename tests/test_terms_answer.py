"""Nobody outside `terms/` asks a choice which one it is: every way of asking is looked for in the source, and there are none.

A choice is asked for what it does (`weftlora.terms`), so a new one costs no edit elsewhere. What is looked for: isinstance, issubclass
and cast with a class of a choice, `type()` of one, its class in a `match`, its kind or class name compared with or looked up in a
table, hasattr or getattr of a field that its axis does not promise, such a field taken from an axis of a config or site or from a
search, a parameter or field that is annotated with a class of a choice, and a function of `terms/` that asks for whoever imports it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import weftlora
from weftlora import terms
from weftlora.terms.axes import AXES, PROTOCOLS
from weftlora.terms.choice import Choice
from weftlora.terms.extra import ExtraTerm
from weftlora.terms.structure import StructureTerm

SOURCE = Path(weftlora.__file__).parent
CHOICES = {cls.__name__: cls for kinds in AXES.values() for cls in kinds.values()}
KINDS = {cls.kind for cls in CHOICES.values()}


def classes_of_terms() -> dict[str, type]:
    """All classes that are defined in a file of one choice: choices, their modules, their events."""
    found: dict[str, type] = {}
    for info in pkgutil.walk_packages(terms.__path__, "weftlora.terms."):
        module = importlib.import_module(info.name)
        if info.name.count(".") == 3:
            found |= {n: c for n, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == info.name}
    return found


CLASSES = classes_of_terms()


def promised() -> set[str]:
    """Attributes that every choice of its axis has, and every module of one: what the protocols name."""
    protocols = [axis.protocol for axis in PROTOCOLS.values()] + [Choice, StructureTerm, ExtraTerm, nn.Module]
    for axis in PROTOCOLS:
        module = importlib.import_module(f"weftlora.terms.{axis}")
        protocols += [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    names = {name for cls in protocols for name in dir(cls)}
    return names | {name for cls in protocols for name in inspect.get_annotations(cls)}


def own_names() -> set[str]:
    """Fields, tensors and methods that some choice has and no protocol promises."""
    names: set[str] = set()
    for cls in CLASSES.values():
        if not issubclass(cls, (Choice, nn.Module)):
            continue
        names |= {name for name in vars(cls) if not name.startswith("_")}
        names |= set(inspect.get_annotations(cls))
        if dataclasses.is_dataclass(cls):
            names |= {field.name for field in dataclasses.fields(cls)}
        if issubclass(cls, Choice):
            names |= set(cls.saves) | set(cls.counts)
    return names - promised()


OWN = own_names()


def asked(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every place that asks which choice something is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _call(node)
        elif isinstance(node, ast.MatchClass) and _named(node.cls):
            yield node, "match on a class of a choice"
        elif isinstance(node, ast.Compare):
            yield from _compare(node)
        elif isinstance(node, ast.Dict):
            if len(_kinds(node.keys)) > 1:
                yield node, "a table by names of choices"
        elif isinstance(node, (ast.Set, ast.List, ast.Tuple)) and len(_kinds(node.elts)) > 1:
            yield node, "a list of names of choices"
        elif isinstance(node, ast.Attribute) and node.attr in OWN and (_is_axis(node.value) or _is_search(node.value)):
            yield node, f"a field that only some choices have: {node.attr}"
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and _annotates(node.annotation):
            yield node, "an annotation with a class of a choice"
        elif isinstance(node, ast.ImportFrom) and (helpers := _helpers_that_ask(node)):
            yield node, f"a function of terms/ that asks: {', '.join(helpers)}"


def _call(node: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in ("isinstance", "issubclass") and any(_named(n) for n in ast.walk(node.args[1])):
        yield node, f"{name} of a class of a choice"
    if name == "cast" and (any(_named(n) for n in ast.walk(node.args[0])) or _in_words(node.args[0])):
        yield node, "a cast to a class of a choice"
    if name == "type" and len(node.args) == 1 and (_is_axis(node.args[0]) or _says_choice(node.args[0])):
        yield node, "type() of a choice"
    if name in ("hasattr", "getattr") and isinstance(node.args[1], ast.Constant) and node.args[1].value in OWN:
        yield node, f"{name} of {node.args[1].value!r}, which only some choices have"


def _compare(node: ast.Compare) -> Iterator[tuple[ast.AST, str]]:
    sides = [node.left, *node.comparators]
    words = [n for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)]
    about = any(_says_kind(side) for side in sides)
    if {n.value for n in words} & set(CHOICES) or (about and {n.value for n in words} & KINDS):
        yield node, "a comparison with the name of a choice"
    if any(_named(side) for side in sides):
        yield node, "a comparison with a class of a choice"


def _named(node: ast.AST) -> bool:
    """Whether a node is the name of a class of a choice."""
    return (isinstance(node, ast.Name) and node.id in CLASSES) or (
        isinstance(node, ast.Attribute) and node.attr in CLASSES
    )


def _in_words(node: ast.AST) -> bool:
    """Whether a type that is written as a string names one."""
    return any(
        isinstance(n, ast.Constant) and set(re.findall(r"\w+", str(n.value))) & set(CLASSES) for n in ast.walk(node)
    )


def _is_axis(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in AXES


def _is_search(node: ast.AST) -> bool:
    """Whether it is what a choice of layers gives as its search: `search`, `config.layers.search`, `job.search`."""
    return (isinstance(node, ast.Attribute) and node.attr == "search") or (
        isinstance(node, ast.Name) and node.id == "search"
    )


TYPES = {name for name, cls in CLASSES.items() if issubclass(cls, (Choice, nn.Module))}


def _annotates(node: ast.AST | None) -> bool:
    """Whether an annotation names a choice, or the module of one; `change_rates.Directions` is another."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval")
    return node is not None and any(isinstance(n, ast.Name) and n.id in TYPES for n in ast.walk(node))


@functools.cache
def functions_of(module: str) -> dict[str, ast.AST]:
    """The functions at the top of a module of `terms/`."""
    path = SOURCE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _helpers_that_ask(node: ast.ImportFrom) -> list[str]:
    """What is imported from `terms/` and asks there in the importer's stead."""
    module = node.module or ""
    if not module.startswith("weftlora.terms."):
        return []
    functions = functions_of(module)
    return [a.name for a in node.names if a.name in functions and any(asked(functions[a.name]))]


def _says_choice(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in {*AXES, "choice", "term"}


def _says_kind(node: ast.AST) -> bool:
    """Whether a side of a comparison is what a choice is called: `kind`, `x.kind`, `x["kind"]`, `x.get("kind")`, an axis."""
    named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {"kind", "kinds"}
    said = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & {"kind", *AXES}
    field = any(isinstance(n, ast.Attribute) and n.attr in {"kind", "title", *AXES} for n in ast.walk(node))
    return bool(named or said or field)


def _kinds(nodes: list[ast.expr | None] | list[ast.expr]) -> set[str]:
    values = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return values & (KINDS | set(CHOICES))


def places(path: Path) -> dict[str, str]:
    """What asks in a file, by file, enclosing definition and line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside: dict[ast.AST, str] = {}
    for top in tree.body:
        name = getattr(top, "name", "")
        if isinstance(top, (ast.Assign, ast.AnnAssign)):
            target = top.targets[0] if isinstance(top, ast.Assign) else top.target
            name = target.id if isinstance(target, ast.Name) else ""
        inside |= dict.fromkeys(ast.walk(top), name)
    file = path.relative_to(SOURCE).as_posix()
    found = {}
    for node, way in asked(tree):
        if not _is_public_list(file, inside[node]):
            found[f"{file}:{inside[node]}:{node.lineno}"] = way  # type: ignore[attr-defined]
    return found


def _is_public_list(file: str, name: str) -> bool:
    return name in ("__all__", "_LAZY") and file.endswith("__init__.py")


FILES = sorted(p for p in SOURCE.rglob("*.py") if "terms" not in p.relative_to(SOURCE).parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_nobody_asks_which_choice_it_is(path: Path) -> None:
    assert places(path) == {}


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(site.structure, HydraTerm)",
        "isinstance(config.layers, (Only, weftlora.Search))",
        "issubclass(cls, Tied)",
        "type(config.structure).__name__ == 'x'",
        "type(choice) is Plain",
        "cast(HydraTerm, site.structure)",
        "cast('Search | None', config.layers.search)",
        "x = {'hydra': 1, 'tied': 2}[k]",
        "k in ('kaiming', 'uniform')",
        "config['structure']['kind'] == 'hydra'",
        "choice.title == 'Tied'",
        "getattr(site.start, 'switch', None)",
        "hasattr(choice, 'heads')",
        "config.boost.after",
        "site.structure.router",
        "config.layers.search.top_k",
        "search.preset",
        "def f(search: Search) -> None: ...",
        "def f(search: 'Search | None') -> None: ...",
        "rule: Reallocate = x",
        "match c:\n    case Dash():\n        pass",
    ],
)
def test_every_way_of_asking_is_seen(source: str) -> None:
    assert list(asked(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "config.layers.search is not None",
        "config.layers.search.steps",
        "def f(search: SearchedLayers) -> None: ...",
        "site.structure.factors(1.0)",
        "isinstance(x, WeftConfig)",
        "config.boost is None",
    ],
)
def test_asking_what_it_does_is_no_such_way(source: str) -> None:
    assert not list(asked(ast.parse(source)))


def test_a_function_that_asks_for_others_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    helper = ast.parse(
        "def search_of(layers):\n    return layers.search if isinstance(layers.search, Search) else None"
    ).body[0]
    monkeypatch.setitem(globals(), "functions_of", lambda module: {"search_of": helper})
    assert list(asked(ast.parse("from weftlora.terms.layers.search import search_of")))
    assert not list(asked(ast.parse("from weftlora.terms.layers.search import Search")))


def test_a_choice_overrides_nothing_that_its_protocol_has_settled() -> None:
    """Abstract or final: what a choice or its module defines anew is abstract above it."""
    for cls in CLASSES.values():
        if not issubclass(cls, (Choice, nn.Module)):
            continue
        for name, value in vars(cls).items():
            above = next((getattr(base, name) for base in cls.__mro__[1:] if name in vars(base)), None)
            if name.startswith("_") or above is None or not callable(getattr(value, "fget", value)):
                continue
            assert getattr(above, "__isabstractmethod__", False), f"{cls.__name__}.{name}"
