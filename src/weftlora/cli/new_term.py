"""`weftlora new-term`: the files of a term of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weftlora.cli import output
from weftlora.cli.options import Json

if TYPE_CHECKING:
    from weftlora.terms.scaffold import Scaffold


def new_term(
    name: Annotated[str, typer.Argument(help="What configs will call it: small letters, digits and _.")],
    axis: Annotated[str, typer.Option(help="Choose the axis: structure, start, boost, ranks or layers.")],
    out: Annotated[Path | None, typer.Option(help="Write to this folder; by default one called NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Write a term of your own to fill in: its file, its claims test, its page."""
    from weftlora.terms.scaffold import new_term as call

    written = call(name, axis, out)
    output.show(written.record(), as_json, lambda: _told(written))


def _told(written: Scaffold) -> str:
    lines = [f"{written.folder}:", *(f"  {file}" for file in written.files)]
    return "\n".join(
        [
            *lines,
            f"Install it with: pip install -e {written.folder}",
            f"Then write {written.axis}: {written.name} in a recipe. pytest {written.folder} says what is left to fill in.",
        ]
    )
