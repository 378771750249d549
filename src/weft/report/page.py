"""An inspection as one HTML file: charts that answer, tables beside them, and not one request to anywhere.

The libraries that draw (Vega, Vega-Lite, Vega-Embed) come out of the package vl-convert-python and are written into the file. A
content security policy names the two scripts by their hashes, so nothing else runs and nothing is fetched, whatever a name in an
adapter says.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from weft.errors import ConfigError, RunError
from weft.report.result import Inspection
from weft.report.sections import sections
from weft.report.views import settings_line

NEEDED = ("jinja2", "vl_convert")


def check_extra() -> None:
    """Raise ConfigError if the packages that a page needs are not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"a page needs {' and '.join(missing)}, which this environment lacks: pip install 'weft[html]', or leave --html out."
        )


def page(found: Inspection) -> str:
    """The page. Equal records give equal pages, byte for byte, with one version of the libraries.

    Raises:
        ConfigError: the extra `html` is not installed.
    """
    check_extra()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    parts = sections(found)
    specs = {
        f"{part.key}-{n}": {**spec, "description": alt} for part in parts for n, (alt, spec) in enumerate(part.charts)
    }
    drawing, own = _bundle(), _asset("page.js")
    return environment.from_string(_asset("page.html.jinja")).render(
        found=found,
        name=_name(found),
        settings=settings_line(found),
        tiles=tiles(found),
        sections=parts,
        style=_asset("page.css"),
        specs=_json(specs),
        drawing=drawing,
        script=own,
        hashes=[_hash(script) for script in (drawing, own)],
    )


def write_page(found: Inspection, path: str | Path) -> None:
    """Write the page to a file, whole or not at all.

    Raises:
        ConfigError: the extra `html` is not installed.
        RunError: the file cannot be written.
    """
    text, target = page(found), Path(path)
    partial = target.with_name(f"{target.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}; choose another file.") from None


def tiles(found: Inspection) -> list[tuple[str, str]]:
    """The figures at the top: (what, how much)."""
    p = found.parameters
    shown = [("trained numbers", f"{p.trained:,}")]
    shown += [("of the base", f"{p.trained / p.base:.2%}")] if p.base else []
    shown += [("stored numbers", f"{p.stored:,}"), ("adapted sites", f"{len(found.sites):,}")]
    shown += [("saved in full beside it", f"{p.saved_modules:,}")] if p.saved_modules else []
    ranks = sorted({site.rank for site in found.sites})
    shown += [("rank", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}")] if ranks else []
    shown += [("can be merged", f"{sum(s.mergeable for s in found.sites)} of {len(found.sites)}")]
    return shown


def _name(found: Inspection) -> str:
    return Path(found.source).name or found.source


def _asset(name: str) -> str:
    return (files("weft") / "assets" / "report" / name).read_text(encoding="utf-8")


@functools.cache
def _bundle() -> str:
    """The libraries as one script; the text that would end it early cannot stand in it."""
    import vl_convert

    return (
        str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
