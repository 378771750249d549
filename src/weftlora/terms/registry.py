"""Which choices every axis has: those of weftlora, and those that other packages offer.

A package offers a term in its metadata, and nothing of it is imported before a config names the term:

    [project.entry-points."weftlora.terms"]
    top2 = "stranger.top2:Top2"

Who names it decides what happens. Your own config (a Python object, a recipe file, an override) imports it. A config that comes
from a folder could be anybody's: it names a foreign term by that entry-point name and nothing else, and its package is imported
only after you have said that you trust it: `weftlora.trust_terms("stranger")`, `--trust-terms stranger`, or WEFT_TRUST_TERMS.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from weftlora.errors import AdapterError, ConfigError, suggest, unknown_key
from weftlora.terms.axes import AXES
from weftlora.terms.choice import Choice
from weftlora.terms.trust import how_to_trust, is_of_folder, is_trusted, normal

GROUP = "weftlora.terms"
ABOUT = ("kind", "package", "version")
"""What a saved choice says beside its fields: its name, and which release of which package offered it."""


@dataclass(frozen=True)
class Offer:
    """A term that an installed package offers."""

    name: str
    package: str
    version: str
    entry: metadata.EntryPoint = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


_own: set[str] = set()  # foreign terms that a config of the user's own has named in this process
_local: dict[str, type[Choice]] = {}  # classes that no package offers and the user has handed over, by name
_loaded: dict[type, Offer] = {}


# ---------------------------------------------------------------------- finding a term


def offers() -> list[Offer]:
    """The terms of installed packages, from their metadata alone; a name of weftlora's own is never another package's."""
    found: dict[tuple[str, str], Offer] = {}
    for entry in metadata.entry_points(group=GROUP):
        if entry.dist is not None and not _axis_of_built_in(entry.name.lower()):
            package = entry.dist.metadata["Name"]
            key = (entry.name.lower(), normal(package))  # the first on the path is the one that an import takes
            found.setdefault(key, Offer(entry.name.lower(), package, entry.dist.version, entry))
    return sorted(found.values(), key=lambda offer: (offer.name, offer.package))


def find(axis: str, name: str, package: str | None = None, version: str | None = None) -> type[Choice]:
    """The class of the choice `name` on `axis`, imported if need be.

    Args:
        package, version: what a saved config says of where the term came from.

    Raises:
        ConfigError: no such choice, one of another axis, one that two packages offer, or one that cannot be imported.
        AdapterError: a config from a folder names a term whose package is not trusted, not installed, or another one.
    """
    if name in AXES[axis]:
        return AXES[axis][name]
    if other := _axis_of_built_in(name):
        raise ConfigError(f"{name!r} is a choice of the axis {other}, not of {axis}: write {other}: {name}.")
    if name in _local and not package:
        return _checked(_local[name], axis, name, "your code")
    there = offers()
    found = [offer for offer in there if offer.name == name]
    if is_of_folder():
        _check_trust(name, found, package, version)
    if not found:
        valid = [*AXES[axis], *(["none"] if axis == "boost" else []), *{offer.name for offer in there}]
        hint = suggest(name, valid).rstrip(".")
        if is_of_folder():
            hint += "; a class that no package offers is known once a config of yours has used it in this process"
        elif package:
            hint = f"{package} offers it and is not installed"
        raise ConfigError(f"{axis} has no choice {name!r}: {hint}{'' if hint.endswith('?') else '.'}")
    if len(found) > 1:
        raise ConfigError(
            f"{axis}={name!r}: {' and '.join(map(str, found))} both offer a term of this name: uninstall one of the two."
        )
    offer = found[0]
    return _load(offer, axis)


def _check_trust(name: str, found: list[Offer], package: str | None, version: str | None) -> None:
    """Raise AdapterError unless the one package that offers the term is the one that saved it, and is trusted."""
    saved_by = f"{package} {version}" if package and version else package
    if not found:
        if not saved_by:
            return  # a name of nothing, or a class of somebody's own code
        raise AdapterError(
            f"this config names the term {name!r} of {saved_by}, which is not installed: install {package}, then "
            f"{how_to_trust(str(package))}."
        )
    if len(found) > 1:
        return  # refused for what it is
    [offer] = found
    if package and normal(package) != normal(offer.package):
        raise AdapterError(
            f"this config names the term {name!r} of {saved_by}, and here {offer} offers one of that name: install {package}, and "
            f"uninstall {offer.package}."
        )
    if name not in _own and not is_trusted(offer.package):
        raise AdapterError(
            f"this config names the term {name!r} of {saved_by or offer}, and loading it runs that package's code: if you trust "
            f"it, {how_to_trust(offer.package)}."
        )
    if version and version != offer.version:
        warnings.warn(
            f"the term {name!r} was saved by {saved_by}, and {offer} is installed: results can differ where the package changed.",
            stacklevel=2,
        )


def _load(offer: Offer, axis: str) -> type[Choice]:
    try:
        loaded = offer.entry.load()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a stranger's module does at import
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise ConfigError(
            f"the term {offer.name!r} cannot be imported from {offer} ({said}): repair or update that package, or choose another "
            f"{axis}."
        ) from error
    term = _checked(loaded, axis, offer.name, str(offer))
    _loaded[term] = offer
    if not is_of_folder():
        _own.add(offer.name)
    return term


def _checked(term: Any, axis: str, name: str, whose: str) -> type[Choice]:
    """`term`, if it is the class of a choice on `axis`. Raises ConfigError."""
    if not isinstance(term, type) or (own := axis_of(term)) is None:
        raise ConfigError(
            f"the term {name!r} of {whose} is not a choice of any axis: it must be a class that inherits from one of "
            f"{', '.join(f'weftlora.terms.{axis}.{axis.capitalize()}' for axis in AXES)}."
        )
    if own != axis:
        raise ConfigError(f"{name!r} of {whose} is a choice of the axis {own}, not of {axis}: write {own}: {name}.")
    check_form(term, whose)
    return term


def check_form(term: type, whose: str = "your code") -> None:
    """Refuse a class that a config could not hold or a file could not keep. Raises ConfigError."""
    frozen = getattr(term, "__dataclass_params__", None)
    if "__dataclass_params__" not in vars(term) or frozen is None or not frozen.frozen:
        raise ConfigError(
            f"{term.__name__} of {whose} is not a frozen dataclass, so a config cannot hold it: write @dataclass(frozen=True)."
        )
    if missing := sorted(getattr(term, "__abstractmethods__", ())):
        raise ConfigError(f"{term.__name__} of {whose} is unfinished: it does not say {', '.join(missing)}.")
    for item in dataclasses.fields(term):
        if item.name in ABOUT:
            raise ConfigError(
                f"{term.__name__} of {whose} has a field {item.name!r}, which saved configs use themselves: rename it."
            )


def axis_of(term: type) -> str | None:
    """The axis that a class of choices serves, said by the class it inherits from; None for any other class."""
    own = term.axis if issubclass(term, Choice) and hasattr(term, "axis") else None
    return own if own in AXES else None


def _axis_of_built_in(name: str) -> str | None:
    return next((axis for axis, kinds in AXES.items() if name in kinds), None)


# ---------------------------------------------------------------------- choices as plain data


def adopt(choice: Choice) -> None:
    """Take note of a choice that the user's own code made, so that what is saved in this process loads in it.

    Raises:
        ConfigError: its class is no frozen dataclass, or has the name of a built-in term.
    """
    term = type(choice)
    if _is_built_in(term):
        return
    if (offer := _offer_of(term)) is not None:
        _own.add(offer.name)
        return
    check_form(term)
    name = term.kind
    if _axis_of_built_in(name):
        raise ConfigError(
            f"{term.__name__} of {term.__module__} has the name of a term of weftlora's: rename the class."
        )
    _local[name] = term


def encoded(choice: Choice) -> dict[str, Any]:
    """What a saved config says of a choice beside its fields: its name; for a foreign one, also which release of which package."""
    term = type(choice)
    if _is_built_in(term):
        return {"kind": choice.kind}
    if (offer := _offer_of(term)) is not None:
        return {"kind": offer.name, "package": offer.package, "version": offer.version}
    return {"kind": term.kind, "package": None}


def _is_built_in(term: type) -> bool:
    return any(term is own for kinds in AXES.values() for own in kinds.values())


def _offer_of(term: type) -> Offer | None:
    """The offer whose class this is; nothing is imported to find out."""
    if term not in _loaded:
        for offer in offers():
            module: Any = sys.modules.get(offer.entry.module)
            if module is not None and getattr(module, offer.entry.attr, None) is term:
                _loaded[term] = offer
    return _loaded.get(term)


def from_plain(term: type, axis: str, kind: str, fields: Mapping[str, Any]) -> Any:
    """A choice of the class `term` from plain data. Raises ConfigError naming a field that is unknown, missing or cannot be."""
    known = [item for item in dataclasses.fields(term) if item.init]
    valid = [item.name for item in known]
    for key in fields:
        if key not in valid:
            if not valid:
                raise ConfigError(f"{term.__name__} takes no fields, but {key!r} was given: leave it out.")
            raise unknown_key(str(key), valid, term.__name__)
    needed = [i.name for i in known if i.default is dataclasses.MISSING and i.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in fields]:
        raise ConfigError(f"{axis}={kind!r} needs {missing[0]}: write {{'{kind}': {{'{missing[0]}': ...}}}}.")
    return term(**fields)


def foreign_names(choices: Iterable[Any]) -> list[str]:
    """The names among plain choices (a name, {"kind": ...} or {name: fields}) that are not weftlora's own."""
    found = []
    for choice in choices:
        name = choice
        if isinstance(choice, Mapping) and choice:
            name = choice["kind"] if "kind" in choice else next(iter(choice)) if len(choice) == 1 else None
        if isinstance(name, str) and name.lower() != "none" and not _axis_of_built_in(name.lower()):
            found.append(name.lower())
    return found
