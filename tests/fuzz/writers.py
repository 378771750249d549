"""Every writer of text of others: to the terminal, into errors and logs, onto pages, into model cards and into records.

A case is a few texts. They stand where names stand: of methods, domains, columns, folders, models, modules. What is written must hold
what docs/security.md promises of it; where it does not, the call raises AssertionError.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import random
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import mutations as m
from mutations import Case
from readers import Target, check_message, folders, on_screen, unseen, without_libraries

MARK = "weftfuzz"
"""A word that is in nothing of ours: a tag or attribute of this name came from a text."""
EVIL = [
    *(
        f"<{MARK}>",
        f"</p><{MARK} x=1>",
        f'"><{MARK} onload=x>',
        f"' {MARK}=1 '",
        f"</script><{MARK}>",
        f"<!--{MARK}-->",
        f"</style><{MARK}>",
    ),
    *(
        f"&lt;{MARK}&gt;",
        f"{{{{ '<{MARK}>' }}}}",
        f"<img src=x onerror={MARK}>",
        f"[{MARK}](javascript:1)",
        f"![{MARK}](x)",
        f"# {MARK}",
    ),
    *(
        f"`{MARK}`",
        f"| {MARK} |",
        f"\\[{MARK}]",
        f"[/{MARK}]",
        f"[bold]{MARK}[/bold]",
        f"[link=x]{MARK}",
        f"]]>{MARK}",
        "<!--",
        "-->",
        "\\",
        "`",
        "|",
    ),
    *(
        "\x1b[2J",
        "\x1b]52;c;eA==\x07",
        "\x9b31m",
        "\x07",
        "\r",
        "\x08",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\U000e0041",
        "\u2028",
        "\ue000",
    ),
]


def _texts(case: Case) -> list[str]:
    return [str(text) for text in json.loads(case["texts"])]


def _seeds() -> list[Case]:
    return [
        {"texts": json.dumps(texts).encode()}
        for texts in (["lora", "hydralora", "test", "runs/a"], ["日本語", "naïve", "Ω", "x_y"])
    ]


def _change_texts(rng: random.Random, case: Case) -> Case:
    texts = _texts(case)
    for _ in range(rng.choice((1, 1, 2, 4))):
        number = rng.randrange(len(texts))
        text, kind = texts[number], rng.randrange(6)
        at = rng.randrange(len(text) + 1)
        if kind == 0:
            text = rng.choice(m.TEXTS)
        elif kind == 1:
            text = text[:at] + rng.choice(EVIL) + text[at:]
        elif kind == 2:
            text = text[:at] + rng.choice(EVIL) * rng.choice((2, 3, 40)) + text[at:]
        elif kind == 3:
            text = (
                text[:at]
                + chr(rng.choice((rng.randrange(0x300), rng.randrange(0x2000, 0x2100), rng.randrange(0x110000))))
                + text[at:]
            )
        elif kind == 4:
            text = text[:at] + text[rng.randrange(len(text) + 1) :]
        else:
            text += rng.choice(texts)
        texts[number] = text[:10_000]
    return {"texts": json.dumps(texts).encode()}


def _is_shown(text: str, where: str) -> None:
    assert not (hidden := unseen(text, "\n")), f"{where} shows {hidden[:3]!r}"


# ---------------------------------------------------------------------- records with the texts in them


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Dataclasses, mappings and lists with these texts in place of those, wherever they stand."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _renamed(getattr(value, f.name), names) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {_renamed(key, names): _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(inner, names) for inner in value)
    return names.get(value, value) if isinstance(value, str) else value


def _as_four(texts: list[str]) -> list[str]:
    """Four different texts: names are keys."""
    return [text + " " * n if text in texts[:n] else text for n, text in enumerate((texts * 4)[:4])]


@functools.cache
def _run() -> Any:
    from weftlora.runs.run import Run

    content = json.loads(folders()["alora/run.json"])
    return Run(
        **{**{f.name: content[f.name] for f in dataclasses.fields(Run) if f.name in content}, "folder": Path("runs/a")}
    )


def _run_of(texts: list[str]) -> Any:
    """The run with texts for its recipe's name, data file, base, metric and folder."""
    a, b, c, d = texts
    run = _run()
    recipe = {**run.recipe, "adapter": {"recipe": a}, "model": {**run.recipe["model"], "path": b}}
    base = {**run.base, "source": b, "kind": c}
    data = {**run.data, "hashes": {d: "0" * 64}}
    folder = Path("runs") / (a.replace("/", "-").replace("\0", "") or "x")[:200]
    return dataclasses.replace(
        run,
        recipe=recipe,
        base=base,
        data=data,
        folder=folder,
        metrics={a: 1.0, "loss": 0.5},
        versions={**run.versions, "torch": d},
    )


@functools.cache
def _comparison() -> Any:
    """What the folder of the comparison says, read once."""
    import tempfile

    from readers import below

    from weftlora.compare import load

    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
        for name, text in below("comparison").items():
            path = Path(top) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        found = load([top])
    failed = dataclasses.replace(
        found.outcomes[0], status="failed", scores={}, domains={}, curve=[], problem="it failed"
    )
    return dataclasses.replace(
        found, folder="top", outcomes=[failed, *found.outcomes[1:]], budget="equal steps", machine="cpu"
    )


def _comparison_of(texts: list[str]) -> Any:
    a, b, c, d = texts
    first = next(iter(next(o for o in _comparison().outcomes if o.domains).domains))
    return _renamed(_comparison(), {"hydralora": a, "demo": b, first: c, "it failed": d, "equal steps": d, "cpu": c})


@functools.cache
def _inspection() -> Any:
    """What is inside a small adapter, looked at once."""
    import tempfile

    from readers import adapters

    from weftlora.inspection.inspecting import inspect

    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
        for name, content in adapters()["hydra"].items():
            (Path(top) / name).write_bytes(content)  # type: ignore[arg-type]
        found = inspect(top, base=False, spectra=0)
    return dataclasses.replace(found, source="source", left_out=["left out"])


def _inspection_of(texts: list[str]) -> Any:
    a, b, c, d = texts
    sites = [site.site for site in _inspection().sites]
    found = _renamed(_inspection(), {"source": a, "left out": b, sites[0]: c})
    return dataclasses.replace(found, trained_by=d, base=b, method=f"{found.method} {d}")


# ---------------------------------------------------------------------- the terminal


def _terminal(folder: Path, case: Case) -> None:
    """What commands show: texts, tables, summaries, and the lines on stderr while they work."""
    from weftlora.cli import compare, inspect, output, recipes

    texts = _as_four(_texts(case))
    a, b, c, d = texts
    table = output.table(a, b, title=c, caption=d)
    table.add_row(c, d)
    _is_shown(on_screen(table), "a table")
    shown = io.StringIO()
    with redirect_stdout(shown):
        output.show({a: [b, {c: d}]}, False, lambda: f"{a}\n{b}")
        output.show({a: b}, True, lambda: "")
        output.show({a: b}, False, lambda: output.run_summary(_run_of(texts)))
    _is_shown(shown.getvalue().replace("\t", " "), "stdout")
    kind = len(a) % 3
    if kind == 0:
        _is_shown(on_screen(compare.result(_comparison_of(texts))), "the result of a comparison")
    elif kind == 1:
        _is_shown(on_screen(inspect.shown(_inspection_of(texts))), "an inspection")
    else:
        from weftlora.train.evaluation import Evaluation, Scores

        scores = Scores(**{f.name: 1 for f in dataclasses.fields(Scores)})
        fields = {f.name: a for f in dataclasses.fields(Evaluation)} | {
            "scores": scores,
            "domains": {b: scores, c: scores},
        }
        _is_shown(on_screen(output.evaluation_table(Evaluation(**fields))), "an evaluation")
    _is_shown(on_screen(recipes.recipe_text("lora", {"demo": {a: b}, "own": {c: d}})), "a recipe")


def _logs(folder: Path, case: Case) -> None:
    """Warnings, log lines and progress on stderr, one line each."""
    from weftlora.cli import commands, output
    from weftlora.progress import Tick

    a, b, c, _ = _as_four(_texts(case))
    said = io.StringIO()
    with redirect_stderr(said):
        with output.calling(False, False):
            logging.getLogger("weftlora").warning("%s: %s", a, b)
            warnings.showwarning(UserWarning(c), UserWarning, "x", 1)
        lines = output._Lines(iter([0.0, 0.0, 100.0, 100.0, 200.0]).__next__)
        lines(Tick(a, 1, 2))
        lines(Tick(a, 2, 2))
        commands._say(f"{a}: {b}")
    _is_shown(said.getvalue().replace("\t", " "), "stderr")
    assert said.getvalue().endswith("\n")


def _errors(folder: Path, case: Case) -> None:
    """Every class of the tree, with the texts in its message, and the sentences that errors are made of."""
    from weftlora import errors
    from weftlora.cli import commands
    from weftlora.redaction import redacted

    texts = _texts(case)
    a, b, c, d = _as_four(texts)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WeftError)]
    made = [kind(f"{a}: {b!r} is no {c}: use {d}.") for kind in kinds]
    made += [errors.unknown_key(a, [b, c], d), errors.ConfigError(errors.suggest(a, [b, c, d])), errors.WeftError(a, b)]
    for error in made:
        for part in error.args:
            check_message(type(error)(part or "."))
    said = io.StringIO()
    with redirect_stderr(said):
        for error in made:
            commands._say(str(error))
    _is_shown(said.getvalue(), "an error on stderr")
    assert said.getvalue().count("\n") == len(made)
    assert max(map(len, said.getvalue().splitlines())) < 2100
    assert redacted(redacted(a)) == redacted(a), "what is redacted changes when it is redacted again"


# ---------------------------------------------------------------------- pages


def _tags(page: str) -> set[str]:
    return set(re.findall(r"<(/?[A-Za-z!][^\s>/]*)", page))


@functools.cache
def _plain(which: str) -> tuple[set[str], int, set[str]]:
    """Of a page of harmless names: its tags, how many scripts, and the attributes that its tags have."""
    pages = [
        _page_of(which, names)
        for names in (["lora", "b", "c", "d"], ["a" * 300, "b" * 300, "c d", "日本"], ["1", "2", "3", "4"])
    ]
    return set().union(*map(_tags, pages)), pages[0].count("<script"), set().union(*map(_attributes, pages))


def _attributes(page: str) -> set[str]:
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    found = (re.sub(r"\"[^\"]*\"|'[^']*'", "", tag) for tag in re.findall(r"<[A-Za-z][^<>]*>", body))
    return {name for tag in found for name in re.findall(r"[\s\"']([A-Za-z@:][\w:.-]*)", tag)}


def _page_of(which: str, texts: list[str]) -> str:
    without_libraries()
    if which == "inspection":
        from weftlora.report.inspection.page import page

        return page(_inspection_of(texts))
    from weftlora.report.comparison.page import Evidence
    from weftlora.report.comparison.page import page as of_comparison

    found = _comparison_of(texts)
    runs = {outcome.folder: _run_of(texts) for outcome in found.outcomes[:2]}
    return of_comparison(Evidence(found, runs=runs, left_out=[texts[0]]), title=texts[1])


def _page(folder: Path, case: Case) -> None:
    """Both pages: no tag, attribute or script but those that harmless names give, nothing hidden, one policy."""
    texts = _as_four(_texts(case))
    which = ("inspection", "comparison")[len(texts[0]) % 2]
    page, (tags, scripts, attributes) = _page_of(which, texts), _plain(which)
    assert not (new := _tags(page) - tags), f"a name made the tags {sorted(new)[:3]}"
    assert page.count("<script") == scripts, "a name made a script"
    assert not (new := _attributes(page) - attributes), f"a name made the attributes {sorted(new)[:3]}"
    assert page.count("Content-Security-Policy") == 1, "a page needs one policy"
    _is_shown(page.replace("\ufeff", "").replace("\t", " "), "a page")
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        json.loads(data)


# ---------------------------------------------------------------------- cards and records


@functools.cache
def _model() -> Any:
    import families

    return families.FAMILIES["llama"].build()


def _card(folder: Path, case: Case) -> None:
    """Cards of a run's adapter and of exports: words are words, the head is YAML, tables keep their columns."""
    import yaml
    from peft import LoraConfig

    from weftlora.adapter import spec
    from weftlora.export import record
    from weftlora.export.source import Source
    from weftlora.runs.adapter import _readme

    texts = _as_four(_texts(case))
    a, b, c, d = texts
    run = _run_of(texts)
    source = Source(_model(), (), b.replace("\0", "") or None, run, Path("runs/a/adapter"))
    proof = record.Proof(c, 0.0, 0.1, 1e-5)
    export = record.LoraExport(Path("x"), (a,), "pattern", "float32", {c: 2}, [], 3, [d], proof)
    merge = record.Merge(Path("x"), (a,), "float32", c, [], 0.0, 0.0, proof=proof)
    cards = [
        record.lora(export, source, LoraConfig(base_model_name_or_path=b)),
        record.merged(merge, source),
        _readme(run),
    ]
    for card in cards:
        _is_shown(card, "a card")
        _check_markdown(card)
    head = cards[0].split("---\n")[1]
    assert set(yaml.safe_load(head)) == {"base_model", "library_name", "tags"} or not b, "a name changed a card's head"
    (folder / "README.md").write_text(cards[2], encoding="utf-8")
    spec.write_loading_note(folder, [a, b])
    _is_shown((folder / "README.md").read_text(encoding="utf-8"), "a card with its note")


def _check_markdown(card: str) -> None:
    body = re.sub(r"^---\n.*?\n---\n", "", card, flags=re.DOTALL)
    body = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    body = re.sub(r"(?<!\\)(?P<ticks>`+)[^`\n]*(?P=ticks)", "", body)  # code, which no escaped backtick begins
    assert f"<{MARK}" not in body, "HTML in a card"
    assert not re.search(r"(?<!\\)(?:\\\\)*!?\[[^\]\n]*(?<!\\)(?:\\\\)*\]\(", body), "a link in a card"
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3, (
                f"a card's table has a row of other columns: {line[:80]}"
            )
        assert not re.match(rf"#+ {MARK}", line), "a heading in a card"


def _records(folder: Path, case: Case) -> None:
    """JSON files and lines: what is written can be read again and says the same; a page's and a card's names are left whole."""
    from weftlora.disk.files import append_json, read_json, read_lines, write_json
    from weftlora.redaction import redacted

    a, b, c, d = _as_four(_texts(case))
    value = {"a" + a: [b, {"c" + c: d}], "n": 1.5}
    write_json(folder / "x.json", value)
    assert read_json(folder / "x.json") == redacted(value), "a record says something else when it is read again"
    (folder / "x.jsonl").unlink(missing_ok=True)
    for row in ({"a": a}, {"b": b}):
        append_json(folder / "x.jsonl", row)
    assert read_lines(folder / "x.jsonl") == [redacted({"a": a}), redacted({"b": b})], (
        "a line says something else when it is read again"
    )


def writers() -> list[Target]:
    """Every writer."""
    calls: dict[str, Callable[[Path, Case], None]] = {
        "terminal": _terminal,
        "logs and warnings": _logs,
        "error messages": _errors,
        "pages": _page,
        "model cards": _card,
        "records": _records,
    }
    return [Target(name, _seeds, _change_texts, call, writer=True) for name, call in calls.items()]


sys.setrecursionlimit(1000)
