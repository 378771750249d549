"""HTML pages as one file: charts that answer, tables beside them, and not one request to anywhere.

The libraries that draw (Vega, Vega-Lite, Vega-Embed) come out of the package vl-convert-python and are written into the file. A
content security policy names the scripts by their hashes, so nothing else runs and nothing is fetched, whatever a name in an
adapter says.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from weftlora.disk.files import Output
from weftlora.extras import needs
from weftlora.foreign_text import visible
from weftlora.redaction import redacted

NEEDED = ("jinja2", "vl_convert")


def check_extra() -> None:
    """Raise MissingExtraError if the packages that a page needs are not installed."""
    with needs("report", "an HTML page"):
        for name in NEEDED:
            importlib.import_module(name)


def render(
    template: Any, specs: Mapping[str, Any], *, styles: Sequence[str] = (), scripts: Sequence[str] = (), **content: Any
) -> str:
    """A page from a template that extends `base.html.jinja`, with its charts by the id of their place.

    Args:
        template, styles, scripts: names of assets; styles and scripts follow those that every page has. A template may also be one
            that `environment` made.
        content: what the template shows; it is escaped unless the template says otherwise.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    check_extra()
    run = [_bundle(), *map(_asset, ("page.js", *scripts))]
    return (
        environment()
        .get_template(template)
        .render(
            **content,
            style="".join(map(_asset, ("page.css", *styles))),
            specs=_json(specs),
            scripts=run,
            hashes=[_hash(script) for script in run],
        )
    )


@functools.cache
def environment() -> Any:
    """jinja2's, with the assets as templates, each compiled once."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )


def check_place(path: str | Path, overwrite: bool) -> None:
    """Refuse a page's place before the work: what is there and is no page of weftlora is kept. Raises RunError."""
    _place(path, overwrite).check()


def write(text: str, path: str | Path, overwrite: bool = False) -> None:
    """Write a page to a file, whole or not at all. Raises RunError if the file cannot be written, or is no page."""
    place = _place(path, overwrite)
    place.check()
    place.write(text)


def _place(path: str | Path, overwrite: bool) -> Output:
    return Output(Path(path), "a page of weftlora", (), overwrite)


def _shown(value: Any) -> Any:
    """A value as a page shows it; autoescape comes after this. What is marked as safe is ours."""
    return visible(redacted(value), lines=True) if type(value) is str else value


def _all_shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_shown(key): _all_shown(inner) for key, inner in value.items()}
    return [_all_shown(inner) for inner in value] if isinstance(value, (list, tuple)) else _shown(value)


def _asset(name: str) -> str:
    return (files("weftlora") / "assets" / "report" / name).read_text(encoding="utf-8")


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
    text = json.dumps(_all_shown(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
