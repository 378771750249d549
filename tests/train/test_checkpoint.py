from __future__ import annotations

from pathlib import Path

import weft
from weft.train import checkpoint


def make(top: Path, step: int, complete: bool = True) -> Path:
    folder = top / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"x")
    if complete:
        checkpoint.mark(folder, step)
    return folder


def test_the_newest_complete_one_counts_by_step_not_by_name(tmp_path: Path) -> None:
    make(tmp_path, 9)
    ten = make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.newest(tmp_path) == ten
    assert weft.train.newest_checkpoint(tmp_path) == ten
    assert checkpoint.newest(tmp_path / "none") is None


def test_rotation_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    half = make(tmp_path, 4, complete=False)
    checkpoint.rotate(tmp_path, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.marked(tmp_path)] == [2, 3]
    assert half.exists(), "one being written is not rotation's business"


def test_half_written_ones_are_dropped(tmp_path: Path) -> None:
    whole = make(tmp_path, 1)
    make(tmp_path, 2, complete=False)
    checkpoint.drop_incomplete(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]
