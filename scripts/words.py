"""`make lint`: the words that readers meet are those of the field. One vocabulary for the documents and for what the package says.

    python scripts/words.py                 README, docs and every sentence in the package
    python scripts/words.py docs/index.md   some files

Of a page the prose is read, not code. Of a Python file those texts are read that can reach a user: messages, help, labels; comments
and docstrings are for those who read the source. The help of an option begins with a verb. A decision and the lab log keep the words
of their day. Exits 1 if a word is found.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLD = ("docs/lab-log.md", "docs/decisions/", "CHANGELOG.md")
OF_AUTHORS = (
    "docs/architecture.md",
    "docs/extending.md",
    "docs/reference/",
    "src/weftlora/testing.py",
    "src/weftlora/terms/",
    "src/weftlora/kernel/",
)
"""What is read by those who write terms: they know what a site is."""

VOCABULARY: dict[str, str] = {
    r"trained numbers?": "trainable parameters",
    r"numbers? (?:that )?(?:is|are) trained": "trainable parameters",
    r"embedded (?:demo )?model": "bundled model",
    r"anew": "again, from scratch",
    r"so many (?!that)": "as many as, the same number",
    r"(?:it|they|that|which|files?|folders?|weights|adapter|run|run\.json) (?:lies?|lay)": "is saved in, is in",
    r"(?<!documentation )(?<!on the )sites?": "adapted module, layer",
    r"weight-space form": "a single ΔW (cannot be merged, because ...)",
    r"(?<!model )cards?": "page",
    r"learnt": "learned",
    r"no means over": "compute no mean over",
    r"who (?:adds|looks|wants|trains|uses|needs)": "if you ...",
    r"lies on a terminal": "on a terminal",
    r"Not run here": "an HTML comment: <!-- not run: ... -->",
    r"hold(?:s|ing)? \w+ (?:and \w+ )?beside": "compare ... with",
    r"has? 0 in it": "contains 0",
    r"(?<![tT]here )(?:is|was) no (?!longer|more|better|less|worse|bound|limit|ground|proof|sign)": "is not a ...",
    r"(?<![tT]here )(?:are|were) no (?!longer|more|better|less|worse)": "are not ...",
    r"go(?:es)? on (?:from|with|where)": "continues from",
    r"for ever": "(leave it out)",
    r"say data\.": "set ...",
    r"held against": "compared with",
    r"for want of": "because there is no ...",
    r"stands? there": "is there, is given",
    r"as (?:it|they) (?:is|are|was|were) wont": "usually",
    r"yonder|thereof|therein|whither|hither|nought|aught|henceforth": "(a plain word)",
}
"""What is not written → what is, as a pattern of whole words."""

VERBS = frozenset(
    {
        "Also", "Approximate", "Be", "Bring", "Choose", "Compare", "Connect", "Continue", "Decompose", "Delete", "Do",
        "Draw", "Generate", "Give", "Import", "Judge", "Keep", "Launch", "Make", "Measure", "Merge", "Name", "Predict",
        "Print", "Put", "Read", "Replace", "Run", "Sample", "Score", "Search", "Set", "Share", "Show", "Skip", "Store",
        "Take", "Train", "Try", "Use", "Write",
    }
)  # fmt: skip
"""What the help of an option begins with: it says what you have the command do. A new verb is added here."""

_WORDS = [(re.compile(rf"\b(?:{pattern})\b" if pattern[-1] != " " else rf"\b{pattern}", re.IGNORECASE), instead)
          for pattern, instead in VOCABULARY.items()]  # fmt: skip


class Hit(NamedTuple):
    """A word that is not one of ours, where it is."""

    path: Path
    line: int
    found: str
    instead: str


def of_page(text: str) -> Iterator[tuple[int, str]]:
    """The lines of prose of a Markdown page, numbered from 1: without fenced blocks, inline code, comments and addresses."""
    fenced = False
    text = re.sub(r"<!--.*?-->", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "`x`", line))


def of_source(text: str) -> Iterator[tuple[int, str]]:
    """The texts of a Python file that are no docstrings, with the line where each begins; an f-string's parts together."""
    tree = ast.parse(text)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # a docstring, of a module, a class, a function or an attribute
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values),
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def of_options(text: str) -> Iterator[tuple[int, str]]:
    """The help of every option of a Python file that does not begin with a verb, or is not there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
            said = next((ast.unparse(each.value).strip("f'\"") for each in node.keywords if each.arg == "help"), "")
            if said.partition(" ")[0] not in VERBS:
                yield node.lineno, said or "an option without help"


def hits(path: Path) -> list[Hit]:
    """What of `path` is not said in our words."""
    text, place = path.read_text(encoding="utf-8"), path.resolve().relative_to(ROOT).as_posix()
    lines = of_page(text) if path.suffix == ".md" else of_source(text)
    verbless = of_options(text) if path.suffix == ".py" else ()
    return [Hit(path, number, said, "a help text that begins with a verb (VERBS)") for number, said in verbless] + [
        Hit(path, number, found[0], instead)
        for number, line in lines
        if " " in line
        for pattern, instead in _WORDS
        if not (place.startswith(OF_AUTHORS) and instead in ("adapted module, layer", "page"))
        for found in pattern.finditer(line)
    ]


def pages() -> list[Path]:
    """Everything that users read."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [path for path in found if not str(path.relative_to(ROOT)).startswith(OLD)]
    return [*found, *sorted((ROOT / "src").rglob("*.py"))]


def main() -> int:
    found = [hit for path in ([Path(name) for name in sys.argv[1:]] or pages()) for hit in hits(path)]
    for hit in found:
        print(f"{hit.path}:{hit.line}: {hit.found!r}: write {hit.instead}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
