from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from weftlora.disk import files
from weftlora.errors import RunError


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", sync)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file_and_no_half(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"old": 1}')
    with pytest.raises(RunError, match="no space left on device"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_folder_and_no_half(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").write_text("1")
    with pytest.raises(RunError, match="no space left"):
        files.write_folder(tmp_path / "adapter", lambda folder: (folder / "new").write_text("2") and None, ours)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "old"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        files.write_folder(
            tmp_path / "adapter", lambda folder, name=name: (folder / name).write_text("x") and None, ours
        )
    assert os.listdir(tmp_path / "adapter") == ["new"]
    assert os.listdir(tmp_path) == ["adapter"]


def ours(name: Path) -> bool:
    return True


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    files.append_json(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert files.read_lines(path) == [{"step": 1}]
    assert files.read_lines(tmp_path / "none.jsonl") == []


def test_what_comes_after_a_line_cut_short_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    files.append_json(path, {"event": "start"})
    with path.open("a") as file:
        file.write('{"event": "reallo')
    files.append_json(path, {"event": "resume"})
    files.append_json(path, {"event": "end"})
    with path.open("ab") as damaged:
        damaged.write(b"\xff\xfe\n3\n")
    assert [row["event"] for row in files.read_lines(path)] == ["start", "resume", "end"]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": ', "[" * 5000])
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        files.read_json(path)


def test_something_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    value: dict[str, Any] = {}
    with pytest.raises(RunError, match="cannot write"):
        files.write_json(tmp_path / "file" / "run.json", value)


def test_a_record_that_is_a_link_out_of_its_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "run" / "own.json").write_text('{"a": 1}')
    for name, leads_to in (("out.json", "../mine.json"), ("folder.json", ".."), ("in.json", "own.json")):
        (tmp_path / "run" / name).symlink_to(leads_to)
    for read in (files.read_json, files.read_lines):
        for name in ("out.json", "folder.json"):
            with pytest.raises(RunError, match="through a link"):
                read(tmp_path / "run" / name)
        assert read(tmp_path / "run" / "in.json")
    (tmp_path / "run" / "a_folder").mkdir()
    with pytest.raises(RunError, match="cannot be read"):
        files.read_lines(tmp_path / "run" / "a_folder")
