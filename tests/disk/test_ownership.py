"""What is the user's stays, whatever is replaced: in a run folder, beside an export, under a page's name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weftlora
from weftlora.disk import files, ownership
from weftlora.errors import RunError, WeftError
from weftlora.runs.run import Made, Run, is_run, settle

Make = Callable[..., dict[str, Any]]


def users(folder: Path) -> dict[Path, str]:
    """Things of a user's in every place of a run folder, some under names that are nearly ours."""
    names = ["rows.jsonl", "adapter/notes.md", "checkpoints/checkpoint-keep-1/model.bin", "checkpoints/notes.md"]
    names += ["run.json.part", ".hidden", "search/state.pt.bak", "eval-mine.json", "sub/deep/thesis.tex"]
    names += ["checkpoints/checkpoint-²/x", ".run.weft-short/x", "lora.part/x"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return {folder / name: f"mine: {name}" for name in names}


def check(mine: dict[Path, str]) -> None:
    for path, text in mine.items():
        assert path.read_text() == text, path


def test_overwrite_takes_the_run_and_nothing_of_the_users(recipe: Make) -> None:
    first = weftlora.train(recipe(train={"save_every": 1}))
    weftlora.evaluate(first, answers=False)
    mine = users(first.folder)
    second = weftlora.train(recipe(train={"steps": 2}), overwrite=True)
    check(mine)
    assert Run.load(second.folder).steps == 2
    assert not (second.folder / "eval-test.json").exists(), "a number of the earlier run beside this one"
    assert sorted(path.name for path in second.checkpoints.iterdir() if path.name[11:].isdecimal()) == []
    assert [path.name for path in second.folder.glob(".*.weft-????????????????")] == []


def test_a_start_that_fails_puts_the_earlier_run_back(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftlora.train import loop

    first = weftlora.train(recipe(train={"save_every": 1}))
    mine = users(first.folder)

    def all_files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file() and path.name[0] != "."}

    before = all_files()

    def fails(*given: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(loop, "make_trainer", fails)
    with pytest.raises(RuntimeError, match="no"):
        weftlora.train(recipe(train={"steps": 2}), overwrite=True)
    check(mine)
    assert all_files() == before


@pytest.mark.parametrize("keeps", [0, 1, 2, 3, 99])
def test_a_run_whose_replacement_was_killed_comes_back_whole(recipe: Make, keeps: int) -> None:
    """Killed while the earlier run was moved aside, after some of its files."""
    first = weftlora.train(recipe(train={"save_every": 1}))
    folder = first.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    aside = ownership.temporary(folder / ownership.REPLACED)
    ownership.move(ownership.of_run(folder)[:keeps], folder, aside)
    assert is_run(folder)
    with pytest.raises(RunError, match="not empty"):
        weftlora.train(recipe())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_replacement_that_had_begun_stays(recipe: Make) -> None:
    first = weftlora.train(recipe())
    made = Made(first.folder)
    assert not first.adapter_folder.exists()
    first.save()
    settle(first.folder)  # killed here, found by the next one
    assert not made.aside.exists()
    assert (first.folder / "run.json").is_file()
    assert not first.adapter_folder.exists()


def test_resume_deletes_no_folder_that_is_named_like_a_checkpoint(recipe: Make) -> None:
    from interrupting import Interrupt

    given = recipe(train={"save_every": 2, "steps": 6})
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    mine = users(Path(given["out"]))
    assert weftlora.train(given, resume=True).status == "complete"
    check(mine)


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "metrics.jsonl", "search", "checkpoints/checkpoint-2"])
@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_a_link_in_a_run_folder_is_not_followed_out_of_it(
    recipe: Make, tmp_path: Path, name: str, how: dict[str, bool]
) -> None:
    from interrupting import Interrupt

    given = recipe(train={"save_every": 2, "steps": 6})
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(5)])
    inside, outside = Path(given["out"]) / name, tmp_path / "outside"
    if inside.exists():
        inside.rename(outside)
    else:
        outside.mkdir()
    if outside.is_dir():
        (outside / "checkpoint-1").mkdir()
        (outside / "checkpoint-1" / "mine").write_text("mine")
    inside.symlink_to(outside)
    before = {path: path.is_file() and path.read_bytes() for path in [outside, *outside.rglob("*")]}
    with pytest.raises(RunError, match="is a link"):
        weftlora.train(given, **how)
    assert {path: path.is_file() and path.read_bytes() for path in [outside, *outside.rglob("*")]} == before


def test_a_file_is_replaced_and_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    for name in ("run.json", "events.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "thesis")
    files.write_json(tmp_path / "run.json", {"a": 1})
    with pytest.raises(RunError, match="cannot write"):
        files.append_json(tmp_path / "events.jsonl", {"a": 1})
    assert (tmp_path / "thesis").read_text() == "mine"


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    names = {ownership.temporary(tmp_path / "run.json").name for _ in range(100)}
    assert len(names) == 100
    assert all(ownership.is_temporary(tmp_path / name) for name in names)
    assert len(ownership.temporary(tmp_path / ("é" * 120)).name.encode()) <= 255


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc", "", ".", "a\0b", "link/x"])
def test_a_name_that_leads_out_of_its_folder_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match=r"is not in it|leads out of"):
        ownership.inside(tmp_path / "top", name)
    assert ownership.inside(tmp_path / "top", "runs/lora/s0") == tmp_path / "top" / "runs" / "lora" / "s0"


def test_an_export_keeps_what_is_the_users(recipe: Make, tmp_path: Path) -> None:
    run = weftlora.train(recipe(adapter="lora"))
    out = tmp_path / "exp"
    for name in ("exp.part", "exp.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    weftlora.export_lora(run.folder, out, verify=False)
    (out / "notes").mkdir()
    (out / "notes" / "a.md").write_text("mine")
    (out / "here").symlink_to(tmp_path / "exp.part")
    weftlora.merge(run.folder, out, verify=False, overwrite=True)
    assert not (out / "adapter_config.json").exists()
    assert (out / "config.json").is_file()
    assert (out / "notes" / "a.md").read_text() == "mine"
    assert (out / "here").is_symlink()
    assert {(tmp_path / name / "thesis.tex").read_text() for name in ("exp.part", "exp.replaced")} == {"mine"}
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_overwrite_of_a_run_takes_its_exports_but_not_what_lies_in_them(recipe: Make) -> None:
    run = weftlora.train(recipe(adapter="lora"))
    weftlora.export_lora(run.folder, run.folder / "lora", verify=False)
    (run.folder / "lora" / "mine.txt").write_text("mine")
    weftlora.train(recipe(adapter="lora", train={"steps": 2}), overwrite=True)
    assert os.listdir(run.folder / "lora") == ["mine.txt"]


@pytest.mark.parametrize("text", ["<html>mine</html>", "", "\udcff"])
def test_an_output_file_that_is_not_ours_is_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeftError, match=r"already exists and is not a page.*--overwrite"):
        files.Output(path, "a page of weftlora", (), False).check()
    files.Output(path, "a page of weftlora", (), True).check()
    path.write_text(f"<head>{files.PAGE}</head>")
    files.Output(path, "a page of weftlora", (), False).check()
    path.write_text('{"layers": [], "candidates": []}')
    files.Output(path, "a selection", ("layers", "candidates"), False).check()
    link = tmp_path / "link.html"
    link.symlink_to(path)
    with pytest.raises(WeftError, match="is a link"):
        files.Output(link, "a page of weftlora", (), True).check()
