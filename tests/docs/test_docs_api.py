"""The reference has every public name with a docstring that is true of its signature, and every command's help."""

from __future__ import annotations

import re
from collections.abc import Iterator

import check_docs
import docs_api
import docs_tables
import griffe
import pytest
import typer.main
import typer.rich_utils

import weftlora
from weftlora.cli.commands import app

ENTRY = re.compile(r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?", re.MULTILINE)
ARGUMENTS = re.compile(r"^(?:[A-Za-z_]\w*)(?:, [A-Za-z_]\w*)*$")


def page(name: str) -> str:
    return (check_docs.ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")


def entries(text: str) -> list[tuple[str, str]]:
    """(name shown, where the source has it)."""
    return [(heading or place, place) for place, heading in ENTRY.findall(text)]


SHOWN = entries(page("weftlora.md")) + entries(page("packages.md"))


@pytest.fixture(scope="module")
def source() -> griffe.Module:
    """The package as mkdocstrings reads it: from its files, nothing imported."""
    loader = griffe.GriffeLoader(search_paths=[check_docs.ROOT / "src"], docstring_parser="google")
    loader.load("weftlora")
    loader.resolve_aliases()
    return loader.modules_collection["weftlora"]


def found(source: griffe.Module, place: str) -> griffe.Object:
    thing = source[place.removeprefix("weftlora.")]
    return thing.final_target if thing.is_alias else thing


def test_every_public_name_is_shown_once():
    names = [name for name, _ in SHOWN]
    assert len(names) == len(set(names))
    assert {f"weftlora.{name}" for name in weftlora.__all__} <= set(names)
    for package, own in docs_api.packages().items():
        assert {f"{package}.{name}" for name in own} <= set(names)


def test_a_new_public_name_makes_the_page_untrue(monkeypatch):
    monkeypatch.setattr(weftlora, "__all__", [name for name in weftlora.__all__ if name != "attach"])
    assert check_docs.with_tables(page("weftlora.md"), "weftlora.md") != page("weftlora.md")


def test_a_public_name_that_no_section_takes_is_an_error(monkeypatch):
    monkeypatch.setattr(docs_api, "SECTIONS", {"Recipes": ("weftlora.recipes",)})
    with pytest.raises(SystemExit, match=r"weftlora\.\w+ is defined in weftlora\."):
        docs_api.of_weft()


def test_every_name_has_a_docstring_and_so_do_its_methods(source):
    bare = []
    for name, place in SHOWN:
        thing = found(source, place)
        bare += [name] if not thing.has_docstring else []
        for member in thing.members.values() if thing.is_class else ():
            callable_ = member.is_function or "property" in member.labels
            if callable_ and not member.name.startswith("_") and not member.has_docstring:
                bare.append(f"{name}.{member.name}")
    assert bare == []


def test_arguments_that_are_described_exist(source):
    wrong = []
    for name, place in SHOWN:
        thing = found(source, place)
        inside = thing.members.values() if thing.is_class else ()
        for owner in (thing, *(member for member in inside if member.is_function)):
            takes = {p.name.lstrip("*") for p in parameters(owner)}
            wrong += [f"{name}: {argument}" for argument in described(owner) if argument not in takes]
    assert wrong == []


def parameters(thing: griffe.Object) -> list[griffe.Parameter]:
    if thing.is_class:
        made = thing.all_members.get("__init__")
        return list(made.parameters) if made is not None else []
    return list(thing.parameters) if thing.is_function else []


def described(thing: griffe.Object) -> Iterator[str]:
    for section in thing.docstring.parse("google", warnings=False) if thing.docstring else ():
        if section.kind is griffe.DocstringSectionKind.parameters:
            for item in section.value:
                assert ARGUMENTS.match(item.name), item.name
                yield from item.name.split(", ")


def test_help_is_the_same_in_any_terminal(monkeypatch):
    text = docs_tables.command_help()
    for name, value in {"COLUMNS": "40", "TERMINAL_WIDTH": "50", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 50)
    monkeypatch.setattr(typer.rich_utils, "FORCE_TERMINAL", True)
    assert docs_tables.command_help() == text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= docs_tables.HELP_WIDTH


def test_help_has_every_command_and_group_of_the_app():
    text = docs_tables.command_help()
    assert {"weftlora", "weftlora train", "weftlora bench", "weftlora bench step"} <= set(
        re.findall(r"^## (.+)$", text, re.MULTILINE)
    )

    def walk(command, name: str) -> None:
        shown = text.split(f"## {name}\n", 1)[1].split("\n## ", 1)[0]
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert option in shown, (name, option)
        for below, inner in getattr(command, "commands", {}).items():
            assert below in shown
            walk(inner, f"{name} {below}")

    walk(typer.main.get_command(app), "weftlora")
    assert text in (check_docs.ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
