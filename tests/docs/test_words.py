"""The word list finds what it is for, and only where users read."""

from __future__ import annotations

from pathlib import Path

import pytest
import words


def hits(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    monkeypatch.setattr(words, "ROOT", path.parent)
    path.write_text(text, encoding="utf-8")
    return [(hit.line, hit.found) for hit in words.hits(path)]


def test_prose_is_read_and_code_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, aside = "```bash\nstart anew\n```", "<!-- start\nanew -->"
    page = f"The trained numbers.\n\n{code}\n\nSee `start anew` and [a page](it-lies.md).\n{aside}\nIt starts anew."
    assert hits(tmp_path / "page.md", page, monkeypatch) == [(1, "trained numbers"), (10, "anew")]


def test_of_a_source_file_only_what_users_see_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""Made anew."""\n\n# anew\nsites = {"site": 1}\nraise ValueError(f"{sites} sites are not adapted, start anew")\n'
    assert hits(tmp_path / "code.py", source, monkeypatch) == [(5, "anew"), (5, "sites")]


def test_the_help_of_an_option_begins_with_a_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'a = typer.Option(help="Print it.")\nb = typer.Option(help="Of it.")\nc = typer.Option("-q")\n'
    assert hits(tmp_path / "code.py", source, monkeypatch) == [(2, "Of it."), (3, "an option without help")]


def test_authors_of_terms_know_what_a_site_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(words, "ROOT", tmp_path)
    for name, found in (("extending.md", 0), ("serving.md", 1)):
        page = tmp_path / "docs" / name
        page.write_text("The update of a site.", encoding="utf-8")
        assert len(words.hits(page)) == found
