"""An inspection as one HTML file."""

from __future__ import annotations

from pathlib import Path

from weftlora.inspection.record import Inspection
from weftlora.report.inspection.elements import settings_line
from weftlora.report.inspection.sections import sections
from weftlora.report.web import check_extra, render, write

__all__ = ["check_extra", "page", "tiles", "write_page"]


def page(found: Inspection) -> str:
    """The page. Equal records give equal pages, byte for byte, with one version of the libraries.

    Raises:
        ConfigError: the extra `html` is not installed.
    """
    parts = sections(found)
    specs = {
        f"{part.key}-{n}": {**spec, "description": alt} for part in parts for n, (alt, spec) in enumerate(part.charts)
    }
    return render(
        "page.html.jinja",
        specs,
        found=found,
        name=_name(found),
        settings=settings_line(found),
        tiles=tiles(found),
        sections=parts,
    )


def write_page(found: Inspection, path: str | Path, overwrite: bool = False) -> None:
    """Write the page to a file, whole or not at all; an earlier page is replaced, anything else with `overwrite` only.

    Raises:
        ConfigError: the extra `html` is not installed.
        RunError: the file cannot be written, or is something else.
    """
    write(page(found), path, overwrite)


def tiles(found: Inspection) -> list[tuple[str, str]]:
    """The figures at the top: (what, how much)."""
    p = found.parameters
    shown = [("trainable parameters", f"{p.trained:,}")]
    shown += [("of the base", f"{p.trained / p.base:.2%}")] if p.base else []
    shown += [("stored numbers", f"{p.stored:,}"), ("adapted modules", f"{len(found.sites):,}")]
    shown += [("saved in full beside it", f"{p.saved_modules:,}")] if p.saved_modules else []
    ranks = sorted({site.rank for site in found.sites})
    shown += [("rank", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}")] if ranks else []
    shown += [("can be merged", f"{sum(s.mergeable for s in found.sites)} of {len(found.sites)}")]
    return shown


def _name(found: Inspection) -> str:
    return Path(found.source).name or found.source
