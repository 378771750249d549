"""Run every code block of README and docs, and compare the generated tables with the code they come from.

    python scripts/check_docs.py                    all pages, several at a time
    python scripts/check_docs.py docs/index.md      some pages
    python scripts/check_docs.py --write            write the generated tables again

A notebook (.ipynb) is a page whose cells are Python blocks: the value of a cell's last line is shown as a notebook shows it. A cell
tagged `not-run` is left out. A page is read top to bottom in an empty folder, with one Python namespace:

    ```python                  run; an exception fails the page
    ```bash                    run with bash -euo pipefail
    ```yaml title="my.yaml"    (any language) written to that file first
    ```yaml                    parsed; a mapping with `adapter` and `data` must be a valid recipe
    ```json                    parsed
    ```text                    shown only: output, equations

Other languages and unlabelled blocks are errors. A block that cannot run here carries, in the text right above it, the
comment `<!-- not run: REASON. -->`, which readers do not see. Between `<!-- generated: NAME -->` and `<!-- end -->` stands what
`docs_tables.py` makes from the code.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import preloaded

ROOT = Path(__file__).resolve().parent.parent
PAGE_SECONDS = 600
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
TITLE = re.compile(r'title="([^"]+)"')
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>.+) -->$")
GENERATED = re.compile(
    r"(?P<open><!-- generated: (?P<name>[\w-]+) -->\n)(?:(?!<!-- generated).)*?(?P<close><!-- end -->)", re.DOTALL
)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
SHOWN = {"text"}
CHECKED = {"python", "bash", "yaml", "json", "jsonl"}


class PageError(Exception):
    """A page that says something untrue; the message starts with file and line."""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line of code, counted from 1."""

    language: str
    code: str
    line: int
    title: str | None = None
    not_run: str | None = None


def blocks(text: str, name: str = "page") -> Iterator[Block]:
    """The fenced blocks of a page in order. Raises PageError on one without end, or of a language we do not check."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if opening is None:
            at += 1
            continue
        start, indent = at + 1, opening["indent"]
        end = next((i for i in range(start, len(lines)) if lines[i].strip() == "```"), None)
        if end is None:
            raise PageError(f"{name}:{start}: this block has no end")
        language = opening["info"].split(" ")[0]
        if language not in SHOWN | CHECKED:
            raise PageError(
                f"{name}:{start}: {language or 'no language'}: write one of {', '.join(sorted(SHOWN | CHECKED))}"
            )
        above = next((line.strip() for line in reversed(lines[:at]) if line.strip()), "")
        reason = NOT_RUN.match(above)
        title = TITLE.search(opening["info"])
        code = "\n".join(line.removeprefix(indent) for line in lines[start:end]) + "\n"
        yield Block(language, code, start + 1, title and title[1], reason and reason["reason"])
        at = end + 1


def cells(text: str, name: str = "notebook") -> Iterator[Block]:
    """The code cells of a notebook in order; `line` is the number of the cell. Raises PageError on one with saved output."""
    for number, cell in enumerate(json.loads(text)["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        if cell["outputs"] or cell["execution_count"] is not None:
            raise PageError(f"{name}: cell {number} has output: clear it before you commit")
        reason = "tagged" if "not-run" in cell["metadata"].get("tags", []) else None
        yield Block("python", "".join(cell["source"]) + "\n", number, None, reason)


def _run_cell(code: str, where: str, namespace: dict[str, object]) -> None:
    """Run a cell, and show the value of its last line. Raises whatever it raises."""
    tree = ast.parse(code, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), where, "eval"), namespace)
        shown = getattr(value, "_repr_html_", None)
        print(shown() if callable(shown) else repr(value))


def run_page(page: Path) -> None:
    """Run the blocks of a page in the working folder. Raises PageError, or whatever a Python block raises."""
    name = _name(page)
    namespace: dict[str, object] = {"__name__": "__main__"}
    if page.suffix == ".ipynb":
        for cell in cells(page.read_text(encoding="utf-8"), name):
            if cell.not_run is None:
                _run_cell(cell.code, f"{page}, cell {cell.line}", namespace)
        return
    for block in blocks(page.read_text(encoding="utf-8"), name):
        where = f"{name}:{block.line}"
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.code, encoding="utf-8")
        if block.not_run is not None:
            continue
        try:
            match block.language:
                case "python":
                    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
                case "bash":
                    _bash(block.code, where)
                case "yaml":
                    _yaml(block.code)
                case "json":
                    json.loads(block.code)
                case "jsonl":
                    [json.loads(line) for line in block.code.splitlines()]
        except PageError:
            raise
        except Exception as error:
            if block.language == "python":
                raise
            raise PageError(f"{where}: {error}") from error


def _bash(code: str, where: str) -> None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PageError(f"{where}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _yaml(code: str) -> None:
    from weftlora.runs.recipe import Recipe, read_yaml

    content = read_yaml(code, "the block")
    if isinstance(content, dict) and {"adapter", "data"} <= content.keys():
        Recipe.read({"out": "runs/example", **content})


def with_tables(text: str, name: str) -> str:
    """The page with its generated parts as the code has them now."""
    if not GENERATED.search(text):
        return text
    from docs_tables import TABLES

    def make(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise PageError(f"{name}: there is no generated table {match['name']!r}: {', '.join(TABLES)}")
        return f"{match['open']}\n{TABLES[match['name']]().strip(chr(10))}\n\n{match['close']}"

    return GENERATED.sub(make, text)


def dead_links(text: str, page: Path) -> list[str]:
    """Relative links of a page that lead to no file. Code is not searched."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return [link for link in LINK.findall(prose) if "://" not in link and not (page.parent / link).exists()]


def check_page(page: Path) -> str | None:
    """None if the page is true, else what is wrong with it. Its blocks run in the working folder.

    Raises whatever a Python block raises.
    """
    text = page.read_text(encoding="utf-8")
    if dead := dead_links(text, page):
        return f"{_name(page)}: links to files that are not there: {', '.join(dead)}"
    try:
        if with_tables(text, _name(page)) != text:
            return f"{_name(page)}: a generated table is not what the code says: run make docs-write"
        run_page(page)
    except PageError as error:
        return str(error)
    return None


def check_only_page() -> None:
    """`check_page` as a program: the page is the argument, what is wrong with it goes to stderr."""
    sys.exit(check_page(Path(sys.argv[1])))


def check_apart(page: Path, address: str) -> str | None:
    """`check_page` in a process and a folder of its own, where `weftlora` starts as fast; the server is at `address`."""
    with tempfile.TemporaryDirectory(prefix="weft-docs-") as folder, tempfile.TemporaryFile("w+") as shown:
        environment = {
            **os.environ,
            "PIP_DRY_RUN": "1",
        }  # a page may say how to install what the tests are to run without
        environment["PATH"] = os.pathsep.join(
            [str(_command(Path(folder), address)), str(Path(sys.executable).parent), environment.get("PATH", "")]
        )
        work = Path(folder, "page")
        work.mkdir()
        try:
            code = preloaded.ask(
                address,
                "check_docs:check_only_page",
                [str(page)],
                files=(0, shown.fileno(), shown.fileno()),
                folder=work,
                environment=environment,
                seconds=PAGE_SECONDS,
            )
        except TimeoutError:
            return f"{_name(page)}: not done after {PAGE_SECONDS} s"
        shown.seek(0)
        return f"{_name(page)} fails\n{shown.read()[-7000:]}" if code else None


def _command(folder: Path, address: str) -> Path:
    """A folder with a `weftlora` that runs what the installed `weftlora` runs, in a process forked from the server."""
    (installed,) = entry_points(group="console_scripts", name="weftlora")
    ask = [sys.executable, "-S", "-E", preloaded.__file__, "ask", address, installed.value]
    script = folder / "bin" / "weftlora"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.join(ask)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script.parent


def work(page: Path) -> int:
    """How long a page will take, roughly: its lines of code, and thirty for each `weftlora`."""
    code = "".join(re.findall(r"^```(?:python|bash)$(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.M))
    return code.count("\n") + 30 * code.count("\nweft ")


def pages() -> list[Path]:
    """README, CONTRIBUTING, all of docs, and the notebooks."""
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), *notebooks]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="write the generated tables again")
    parser.add_argument("--jobs", type=int, default=2, help="pages at a time")
    given = parser.parse_args()
    chosen = [page.resolve() for page in given.pages] or pages()
    if given.write:
        for page in chosen:
            text = page.read_text(encoding="utf-8")
            if (new := with_tables(text, _name(page))) != text:
                page.write_text(new, encoding="utf-8")
                print(f"wrote {_name(page)}")
        return 0

    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = 0
    with preloaded.server() as address, ThreadPoolExecutor(given.jobs) as pool:

        def timed(page: Path) -> tuple[Path, str | None, float]:
            began = time.monotonic()
            return page, check_apart(page, address), time.monotonic() - began

        for done in as_completed([pool.submit(timed, page) for page in sorted(chosen, key=work, reverse=True)]):
            page, wrong, seconds = done.result()
            print(f"{'FAILED' if wrong else 'ok':6} {seconds:5.1f} s  {_name(page)}", flush=True)
            if wrong:
                failed += 1
                print(wrong, flush=True)
    print(f"documents: {len(chosen) - failed} of {len(chosen)} pages are true")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
