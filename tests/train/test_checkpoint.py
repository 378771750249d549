from __future__ import annotations

import json
from pathlib import Path

import pytest

import weftlora
from weftlora.errors import RunError
from weftlora.train import checkpoint


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
    assert weftlora.train.newest_checkpoint(tmp_path) == ten
    assert checkpoint.newest(tmp_path / "none") is None


def test_rotation_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    half = make(tmp_path, 4, complete=False)
    checkpoint.rotate(tmp_path, keep=4)
    assert len(checkpoint.folders(tmp_path)) == 4
    checkpoint.rotate(tmp_path, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.marked(tmp_path)] == [2, 3]
    assert not half.exists(), "what a kill left half-written goes first"


def test_rotation_keeps_the_best_one_too(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    checkpoint.rotate(tmp_path, keep=2, best=tmp_path / "checkpoint-2")
    assert [checkpoint.step_of(path) for path in checkpoint.marked(tmp_path)] == [2, 4]
    checkpoint.rotate(tmp_path, keep=1, best=tmp_path / "checkpoint-2")
    assert [checkpoint.step_of(path) for path in checkpoint.marked(tmp_path)] == [2, 4]
    checkpoint.rotate(tmp_path, keep=1, best=tmp_path / "checkpoint-4")
    assert [checkpoint.step_of(path) for path in checkpoint.marked(tmp_path)] == [4]


def by_trainer(top: Path, step: int, **signed: object) -> Path:
    """As a Trainer leaves it that marks nothing."""
    folder = make(top, step, complete=False)
    (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"TrainerControl": {}, **signed}}))
    return folder


def test_a_checkpoint_of_a_trainer_that_marks_none_is_an_error_not_none(tmp_path: Path) -> None:
    whole = by_trainer(tmp_path, 5)
    with pytest.raises(RunError, match=r"checkpoint-5 was written without weftlora\.Callback"):
        weftlora.train.newest_checkpoint(tmp_path)
    eight = make(tmp_path, 8)
    assert weftlora.train.newest_checkpoint(tmp_path) == eight, "an older one does not matter"
    whole.rename(tmp_path / "checkpoint-9")
    with pytest.raises(RunError, match="checkpoint-9"):
        weftlora.train.newest_checkpoint(tmp_path)


def test_half_written_ones_are_no_error_whoever_wrote_them(tmp_path: Path) -> None:
    make(tmp_path, 1, complete=False)
    by_trainer(tmp_path, 2, **{checkpoint.SIGNATURE: {}})
    cut = by_trainer(tmp_path, 3) / "trainer_state.json"
    cut.write_text(cut.read_text()[:-4])
    assert weftlora.train.newest_checkpoint(tmp_path) is None


def test_half_written_ones_are_dropped(tmp_path: Path) -> None:
    whole = make(tmp_path, 1)
    make(tmp_path, 2, complete=False)
    checkpoint.drop_incomplete(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]
