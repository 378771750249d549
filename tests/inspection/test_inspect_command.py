"""`weftlora inspect` and `weftlora heads` from the shell's side."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import weftlora
from weftlora.cli import inspect, main
from weftlora.cli.output import Screen
from weftlora.inspection.record import Inspection


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_json_is_the_record_of_the_python_call(hydra_run: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "inspect", hydra_run, "--rows", 2, "--spectra", 1, "--json")
    assert code == 0
    own = weftlora.inspect(weftlora.Run.load(hydra_run), rows=2, spectra=1)
    assert json.loads(out) == json.loads(json.dumps(own.record()))


@pytest.mark.parametrize("name", ["hydra_run", "alora_run", "flexora_run"])
def test_everything_fits_into_80_columns(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "inspect", request.getfixturevalue(name), "--rows", 2, "-q")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "trainable parameters" in out
    section = {"hydra_run": "routers and heads", "alora_run": "ranks over time", "flexora_run": "over threshold"}[name]
    assert section in out


def test_dash_directions_and_tied_groups_are_shown(
    saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "inspect", saved("lora_tsd"), "--no-base")
    assert "largest gain" in out
    assert "more modules in --json and --html" in out
    _, out, _ = run(capsys, "inspect", saved("tied_lora"), "--no-base")
    assert "tied groups" in out
    assert "left out" in out


def test_many_kinds_of_modules_fit_too(inspections: dict[str, Inspection]):
    shown = io.StringIO()
    Screen(file=shown, width=80).print(inspect.shown(inspections["t5"]))
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert any(line.split() == ["block", *(f"SelfAttention.{part}" for part in "qkvo")] for line in lines)
    assert sum(line.startswith("decoder 1 ") for line in lines) > 2


def test_the_page_is_written_and_named(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = run(capsys, "inspect", saved("lora"), "--no-base", "--html", tmp_path / "page.html")
    assert code == 0
    assert "written" in out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "nowhere"], "there is no folder 'nowhere'"),
        (["inspect", ".", "--html", "no/such/folder/page.html"], "choose another file"),
        (["inspect", ".", "--base", "x", "--no-base"], "give one of the two"),
        (["heads", "gone.jsonl"], "gone.jsonl does not exist"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")  # what is asked for is looked at before what is there
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert sentence in " ".join(err.split())
    assert len(err.splitlines()) == 1


def test_heads_shows_the_curve_and_the_elbow(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        {"text": f"{topic}a{i % 7} {topic}b{i % 5} {topic}c"} for topic in ("warp", "weft", "loom") for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(capsys, "heads", tmp_path / "rows.jsonl", "--largest", 6)
    assert code == 0
    assert out.startswith("3 heads, by the elbow over 90 texts.")
    assert "← elbow" in out
    _, out, _ = run(capsys, "heads", tmp_path / "rows.jsonl", "--largest", 6, "--json")
    assert json.loads(out)["heads"] == 3


def test_heads_reads_the_data_section_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"one{i % 3},two{i % 2}\n" for i in range(20)))
    recipe = "data: {train: rows.csv, fields: {prompt: q, completion: a}}\nadapter: hydralora\nout: runs/x\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, out, _ = run(capsys, "heads", tmp_path / "recipe.yaml", "--json")
    assert code == 0
    assert json.loads(out)["of"] == 20
