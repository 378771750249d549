"""Imports point one way, read from the source: no module sees one that stands above it."""

import ast
from pathlib import Path

import pytest

import weftlora

SOURCE = Path(weftlora.__file__).parent
LEVELS = (
    {"errors", "strict", "numbers", "times", "linalg", "kernel", "known", "redaction", "foreign"},
    {"terms"},
    {"site", "spec", "compat"},
    {"schedule", "recipes"},
    {"glue"},
    {"data", "export", "search", "train"},
    {"bench", "compare"},
    {"report", "cli"},
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
        else:  # a public name of weftlora itself: its version, or all of it for those above
            assert module == "weftlora.__version__" or own >= LEVEL["data"], f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if part_of(name_of(p)) == "terms"], ids=name_of)
def test_terms_never_import_each_other(path: Path):
    assert not [m for m in imports(path) if part_of(m) == "terms" and m != name_of(path)]


def test_the_site_is_the_only_file_that_puts_terms_together():
    """The spec and the recipes name their choices; glue asks a term what it is. Only the site sees all of them as modules."""
    for path in FILES:
        modules = {m for m in imports(path) if m.startswith("weftlora.terms.")}
        if len({part for m in modules for part in [m.split(".")[2]]}) > 1:
            assert name_of(path) in {"weftlora.site", "weftlora.spec"} or part_of(name_of(path)) == "recipes"


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
