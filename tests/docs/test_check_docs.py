"""The runner of the documents' code finds what is untrue, and passes nothing over in silence."""

from __future__ import annotations

import json
from pathlib import Path

import check_docs
import docs_tables
import pytest


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```\n"


def test_blocks_share_a_namespace_and_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = fenced("python", "x = 1") + fenced('json title="made.json"', "[2]") + fenced("bash", "test -f made.json")
    check_docs.run_page(page(tmp_path, text + fenced("python", "assert x == 1\nopen('ran', 'w').close()")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("language", "code"),
    [("python", "assert False"), ("bash", "false\ntrue"), ("json", "{"), ("jsonl", "{}\nno"), ("yaml", "a: [")],
)
def test_untrue_code_fails(tmp_path, monkeypatch, language, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception):  # noqa: B017, PT011 - a block's own error, or PageError
        check_docs.run_page(page(tmp_path, fenced(language, code)))


def test_a_recipe_with_a_key_that_does_not_exist_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = fenced("yaml", "data: demo\nadapter: lora\ntrain: {step: 3}\nout: runs/x")
    with pytest.raises(check_docs.PageError, match="did you mean 'steps'"):
        check_docs.run_page(page(tmp_path, wrong))


def test_a_python_error_names_the_line_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = page(tmp_path, "# Title\n\n" + fenced("python", "x = 1\nraise KeyError(x)"))
    with pytest.raises(KeyError) as error:
        check_docs.run_page(made)
    assert error.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize("text", ["```\nplain\n```\n", "```ruby\nputs 1\n```\n", "```python\nx = 1\n"])
def test_blocks_that_would_escape_the_check_are_errors(text):
    with pytest.raises(check_docs.PageError):
        list(check_docs.blocks(text))


def test_leaving_a_block_out_takes_a_visible_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_docs.run_page(page(tmp_path, "<!-- not run: it needs a GPU. -->\n\n" + fenced("bash", "false")))
    with pytest.raises(check_docs.PageError):
        check_docs.run_page(page(tmp_path, "<!-- not run -->\n\n" + fenced("bash", "false")))


def test_a_page_with_an_old_table_or_a_dead_link_is_untrue(tmp_path):
    old = "<!-- generated: refused -->\n| pair | why |\n<!-- end -->\n"
    assert "make docs-write" in check_docs.check_page(page(tmp_path, old))
    new = check_docs.with_tables(old, "page")
    assert "tied modules share one A and B" in new
    assert check_docs.with_tables(new, "page") == new
    assert check_docs.check_page(page(tmp_path, new)) is None
    assert "gone.md" in check_docs.check_page(page(tmp_path, "[a](gone.md)"))


def test_two_tables_on_a_page_do_not_swallow_what_is_between(tmp_path):
    text = "<!-- generated: refused -->\n<!-- end -->\nBETWEEN\n<!-- generated: choices -->\n<!-- end -->\n"
    made = check_docs.with_tables(text, "page")
    assert "BETWEEN" in made
    assert "`Hydra(heads=3" in made
    assert "Tied + Reallocate" in made


def test_every_recipe_key_has_a_meaning():
    assert "`validation_fraction`" in docs_tables.recipe_keys()


def notebook(folder: Path, *cells: str, **first: object) -> Path:
    made = [
        {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": [cell]}
        for cell in cells
    ]
    made[0] |= first
    path = folder / "page.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["x"]}, *made]}), encoding="utf-8")
    return path


def test_cells_of_a_notebook_share_a_namespace_and_show_what_a_notebook_shows(tmp_path, capsys):
    shown = "class A:\n    def _repr_html_(self):\n        return '<b>'\nA()"
    check_docs.run_page(notebook(tmp_path, "raise KeyError", "x = 3", "x", shown, metadata={"tags": ["not-run"]}))
    assert capsys.readouterr().out == "3\n<b>\n"


def test_a_cell_that_fails_or_has_output_is_untrue(tmp_path):
    with pytest.raises(ZeroDivisionError):
        check_docs.run_page(notebook(tmp_path, "1 / 0"))
    with pytest.raises(check_docs.PageError, match="cell 2 has output"):
        check_docs.run_page(notebook(tmp_path, "1", execution_count=1))
