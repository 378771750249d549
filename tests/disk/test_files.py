from __future__ import annotations

import errno
import json
import os
import signal
import time
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


def test_what_comes_while_the_work_is_done_is_kept(tmp_path: Path) -> None:
    """A command looks at the place of its output before minutes of work, and the user writes a file there meanwhile."""
    path = tmp_path / "out.json"
    place = files.Output(path, "a selection", ("layers",), overwrite=False)
    place.check()
    path.write_text("mine")
    with pytest.raises(RunError, match="is not a selection"):
        place.write_json({"layers": [1]})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"out.json": "mine"}
    path.write_text('{"layers": []}')
    place.write_json({"layers": [2]})
    path.write_text("mine")
    files.Output(path, "a selection", ("layers",), overwrite=True).write_json({"layers": [3]})
    assert json.loads(path.read_text()) == {"layers": [3]}


def test_two_processes_that_write_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    """Files have no lock: whoever is last has written all of it, and nobody sees a part, or fails for the other's sake."""
    path, texts = tmp_path / "page.html", [files.PAGE + letter * 200_000 for letter in "ab"]
    children = []
    for text in texts:
        children.append(os.fork())
        if not children[-1]:
            try:
                for _ in range(30):
                    files.Output(path, "a page", (), overwrite=False).write(text)
            except BaseException:
                os._exit(1)
            os._exit(0)
    seen, left = set(), list(children)
    while left:
        if path.exists():
            seen.add(path.read_text())
        left = [child for child in left if os.waitpid(child, os.WNOHANG) == (0, 0)]
    assert {*seen, path.read_text()} <= set(texts)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_what_a_killed_writer_left_goes_with_the_next_one_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "out [1].json"
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with files.replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.write(told, b".")
            time.sleep(60)
    os.read(ready, 1)
    files.write_json(path, {"whole": 1})  # the other one is still at work
    assert len(list(tmp_path.iterdir())) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    new, other = (tmp_path / f".out [1].json.weft-{letter * 16}" for letter in "ab")
    new.touch()  # by somebody who is about to lock it
    other.touch()
    os.utime(other, (0, 0))
    (tmp_path / ".out [1].json.weft-mine").write_text("mine")
    files.write_json(path, {"whole": 2})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, new.name, ".out [1].json.weft-mine"}


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
