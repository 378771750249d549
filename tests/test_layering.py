"""Imports point one way, read from the source: rooms stand on rooms below them, and no two files stand on each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import weftlora

SOURCE = Path(weftlora.__file__).parent
ROOMS = (
    {"version", "progress", "change_rates", "foreign_text", "redaction"},
    {"errors"},
    {"extras", "settings"},
    {"records", "disk", "kernel"},
    {"terms", "data"},
    {"adapter"},
    {"recipes", "schedule"},
    {"adapted"},
    {"scoring"},
    {"host"},
    {"search"},
    {"runs"},
    {"export"},
    {"train"},
    {"bench", "compare", "inspection", "integrations", "testing"},
    {"report"},
    {"auto"},
    {"cli"},
    {"__main__"},
)
"""From the bottom up: a room imports those of the lines above its own, and none beside it."""
LEVEL = {part: level for level, parts in enumerate(ROOMS) for part in parts}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
HOSTS = {"host", "adapted"}
"""The rooms that touch peft's internals: the tuner, and the layer that it puts into a model."""


def part_of(module: str) -> str:
    """The top-level part of `weftlora` that a dotted name inside it belongs to: weftlora.terms.structure.tied → terms."""
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Every module of weftlora that `path` imports, at any depth of the code (type-checking and late imports too)."""
    package = ["weftlora", *path.relative_to(SOURCE).parts[:-1]]
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "weftlora":
                found += [f"weftlora.{alias.name}" for alias in node.names]
            else:
                found.append(module)
    return [name for name in found if name == "weftlora" or name.startswith("weftlora.")]


def name_of(path: Path) -> str:
    return ".".join(["weftlora", *path.relative_to(SOURCE).with_suffix("").parts])


def module_of(path: Path) -> str:
    """What an import calls this file."""
    return name_of(path).removesuffix(".__init__")


MODULES = {module_of(path): path for path in [SOURCE / "__init__.py", *FILES]}


def files_of(path: Path) -> set[str]:
    """The files, by their modules, that `path` imports: of `from package import name` the file that `name` is, if it is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {inner if (inner := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
    return (found & MODULES.keys()) - {module_of(path)}


def circles(imported: dict[str, set[str]]) -> Iterator[list[str]]:
    """Ways from a file over its imports back to itself, one for each file that has any; the shortest."""
    for start in imported:
        ways, seen = [[start]], {start}
        while ways:
            way = ways.pop(0)
            if start in imported[way[-1]]:
                yield [*way, start]
                break
            new = sorted(imported[way[-1]] - seen)
            seen |= set(new)
            ways += [[*way, module] for module in new]


def test_no_file_stands_on_one_that_stands_on_it():
    """Late imports and those for type checking count: whoever reads one file of a circle has to read all of them.

    The public names of the package itself come from everywhere, so that whatever imports it closes a circle.
    """
    found = list(circles({name: files_of(path) for name, path in MODULES.items()}))
    assert not found, "\n".join(" → ".join(way) for way in found)


def test_no_script_stands_on_one_that_stands_on_it():
    scripts = {path.stem: path for path in (Path(__file__).parents[1] / "scripts").glob("*.py")}
    imported = {name: set[str]() for name in scripts}
    for name, path in scripts.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported[name] |= {alias.name for alias in node.names} & scripts.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in scripts:
                imported[name].add(node.module)
    assert any(imported.values())
    assert not list(circles(imported))


def test_a_circle_is_found():
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"], ["c", "b", "c"]]


def test_every_part_has_a_level():
    parts = {part_of(name_of(path)) for path in FILES}
    assert parts <= set(LEVEL), f"say in ROOMS where these stand: {parts - set(LEVEL)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path):
    part = part_of(name_of(path))
    for module in imports(path):
        if module != "weftlora" and part_of(module) in LEVEL:
            other = part_of(module)
            assert other == part or LEVEL[other] < LEVEL[part], (
                f"{name_of(path)} imports {module}, which is not below it"
            )
        else:  # the whole package, or a public name of it
            assert LEVEL[part] > LEVEL["train"], f"{name_of(path)} imports the whole of weftlora"


def choice_files(names: list[str]) -> list[str]:
    """Of these modules, the files of one choice: weftlora.terms.AXIS.CHOICE."""
    return [name for name in names if name.startswith("weftlora.terms.") and name.count(".") == 3]


TERMS = [
    p
    for p in FILES
    if part_of(name_of(p)) == "terms" and p.name not in ("axes.py", "registry.py", "scaffold.py", "trust.py")
]


@pytest.mark.parametrize("path", TERMS, ids=name_of)
def test_terms_never_import_each_other(path: Path):
    """A choice sees the protocol of its own axis and what all axes share; the protocols see no choice."""
    assert not choice_files(imports(path))
    shared = {"weftlora.terms.choice", "weftlora.terms.events", "weftlora.terms.extra"}
    axis = name_of(path).split(".")[2]
    assert {m for m in imports(path) if part_of(m) == "terms"} <= shared | {f"weftlora.terms.{axis}"}


def test_one_file_sees_the_choices_of_all_axes():
    """Recipes, and what reads files of released code, make the choices that they name; everything else asks a choice what it is."""
    for path in FILES:
        axes = {module.split(".")[2] for module in choice_files(imports(path))}
        if len(axes) > 1:
            name = name_of(path)
            assert name in {"weftlora.terms.axes", "weftlora.host.released_code"} or part_of(name) == "recipes", name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_peft_internals_are_touched_where_it_is_met_only(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("peft.") and name.count(".") >= 1 and name != "peft.utils":
                assert part_of(name_of(path)) in HOSTS, f"{name_of(path)} imports {name}"
