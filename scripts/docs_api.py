"""The API reference: which public names stand on which page. mkdocstrings fills in signatures and docstrings."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import weftlora

# Heading of the page of `weftlora`, and where the names below it are defined; the longest that fits decides. A name that fits
# nowhere is an error.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Recipes": ("weftlora.recipes",),
    "The general config and its axes": ("weftlora.adapter.spec", "weftlora.terms", "weftlora.settings"),
    "Train, evaluate, generate": ("weftlora.train", "weftlora.runs"),
    "In a loop of your own": ("weftlora.host.attach", "weftlora.host.optimizer", "weftlora.adapted.routing"),
    "Select blocks": ("weftlora.search",),
    "Compare, search and report": ("weftlora.compare", "weftlora.auto", "weftlora.report"),
    "Look inside": ("weftlora.data.suggest_heads", "weftlora.inspection.inspecting", "weftlora.inspection.directions"),
    "Serve": ("weftlora.host.hotswap", "weftlora.host.weighted"),
    "Export and import": ("weftlora.export", "weftlora.host.released_code"),
    "Errors": ("weftlora.errors",),
}

# Classes that public calls return and that no `__all__` names, in the section of those calls.
RETURNED: dict[str, tuple[str, ...]] = {
    "Train, evaluate, generate": (
        "weftlora.train.evaluation.Evaluation",
        "weftlora.train.evaluation.Scores",
        "weftlora.train.evaluation.Generation",
        "weftlora.train.evaluation.Conversation",
        "weftlora.train.previewing.Preview",
    ),
    "Compare, search and report": ("weftlora.report.comparison.page.Report",),
    "Look inside": (
        "weftlora.inspection.record.Inspection",
        "weftlora.data.suggest_heads.HeadSuggestion",
        "weftlora.inspection.core_directions.DirectionsReport",
    ),
}

# Packages whose public names are commands: the page of the command line shows those.
COMMANDS = ("weftlora.cli",)


def of_weft() -> str:
    """The names of `weftlora` by section."""
    parts = []
    for title, inside in sections().items():
        entries = [_entry(f"weftlora.{name}", _place(weftlora, name)) for name in inside]
        parts.append("\n".join([f"## {title}\n", *entries, *(_entry(p, p) for p in RETURNED.get(title, ()))]))
    return "\n".join(parts)


def of_packages() -> str:
    """The names of the public packages below `weftlora`."""
    parts = []
    for package, inside in packages().items():
        module = importlib.import_module(package)
        about = (inspect.getdoc(module) or "").splitlines()[0]
        entries = [_entry(f"{package}.{name}", _place(module, name)) for name in inside]
        parts.append("\n".join([f"## {package}\n", f"{about}\n", *entries]))
    return "\n".join(parts)


def sections() -> dict[str, list[str]]:
    """Section → public names of `weftlora`, each once, in the order of `__all__`."""
    found: dict[str, list[str]] = {title: [] for title in SECTIONS}
    for name in weftlora.__all__:
        value = getattr(weftlora, name)
        home = value.__name__ if inspect.ismodule(value) else value.__module__
        fits = [(len(at), title) for title, homes in SECTIONS.items() for at in homes if home.startswith(at)]
        if not fits:
            raise SystemExit(f"weftlora.{name} is defined in {home}, which no section of docs_api.SECTIONS takes")
        found[max(fits)[1]].append(name)
    return {title: inside for title, inside in found.items() if inside}


def packages() -> dict[str, list[str]]:
    """Public package below `weftlora` → the names of its `__all__` that `weftlora` itself does not have."""
    found = {}
    for module in pkgutil.iter_modules(weftlora.__path__, "weftlora."):
        if module.ispkg and module.name not in COMMANDS:
            public = getattr(importlib.import_module(module.name), "__all__", [])
            if own := [name for name in public if name not in weftlora.__all__]:
                found[module.name] = own
    return found


def _place(package: ModuleType, name: str) -> str:
    """Where the source has a public name: where it is defined if a module has the same name, as with `weftlora.train`."""
    place = f"{package.__name__}.{name}"
    if importlib.util.find_spec(place) is None:
        return place
    value: Any = getattr(package, name)
    return f"{value.__name__ if inspect.ismodule(value) else value.__module__}.{name}"


def _entry(name: str, place: str) -> str:
    heading = "" if name == place else f"    options:\n      heading: {name}\n      toc_label: {name.split('.')[-1]}\n"
    return f"::: {place}\n{heading}"
