"""Imports point one way, read from the source: no module sees one that stands above it."""

import ast
from pathlib import Path

import pytest

import weftlora

SOURCE = Path(weftlora.__file__).parent
LEVELS = (
    {"errors", "strict", "numbers", "times", "linalg", "kernel", "known", "redaction", "foreign", "extras", "version"},
    {"terms"},
    {"site", "spec", "compat"},
    {"schedule", "recipes"},
    {"glue"},
    {"data", "export", "search", "train"},
    {"bench", "compare"},
    {"report", "cli", "testing"},
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


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


def test_every_part_has_a_level():
    parts = {part_of(name_of(path)) for path in FILES} - {"__main__"}
    assert parts <= set(LEVEL), f"say in LEVELS where these stand: {parts - set(LEVEL)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path):
    own = LEVEL.get(part_of(name_of(path)), len(LEVELS))
    for module in imports(path):
        if module == "weftlora":
            assert own >= LEVEL["data"], f"{name_of(path)} imports the whole of weftlora"
        elif part_of(module) in LEVEL:
            assert LEVEL[part_of(module)] <= own, f"{name_of(path)} imports {module}, which stands above it"
        else:  # a public name of weftlora itself: its version, what makes peft know it, or all of it for those above
            assert module in {"weftlora.__version__", "weftlora.register"} or own >= LEVEL["data"], (
                f"{name_of(path)} imports {module}"
            )


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
            assert name in {"weftlora.terms.axes", "weftlora.glue.official"} or part_of(name) == "recipes", name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_peft_internals_are_touched_in_glue_only(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("peft.") and name.count(".") >= 1 and name != "peft.utils":
                assert part_of(name_of(path)) == "glue", f"{name_of(path)} imports {name}"
