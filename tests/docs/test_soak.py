"""The committed count of `make soak`, and how a kill's place is read from what it left behind."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import soak

from weftlora.train import checkpoint

ROOT = Path(__file__).parents[2]


def test_the_committed_soak_had_no_failure() -> None:
    found = json.loads((ROOT / "evidence" / "soak.json").read_text())
    assert set(found["recipes"]) == set(soak.RECIPES)
    assert found["failures"] == 0
    assert found["identical"] == found["complete"] > 0
    for tally in found["recipes"].values():
        assert tally["failures"] == []
        assert tally["identical"] == tally["complete"] > 0
        assert sum(tally["phases"].values()) == tally["kills"] >= 5
    assert found["kills"] == sum(tally["kills"] for tally in found["recipes"].values())


def run_folder(out: Path, status: str = "running") -> Path:
    (out / "checkpoints").mkdir(parents=True)
    words = dict.fromkeys(("base_dir", "task", "device"), "")
    numbers = dict.fromkeys(("seed", "steps", "threads"), 1)
    sections = {name: {} for name in ("versions", "base", "adapter", "parameters", "recipe", "data")}
    record = {**words, **numbers, **sections, "status": status}
    (out / "run.json").write_text(json.dumps(record))
    return out


def test_the_place_of_a_kill(tmp_path: Path) -> None:
    assert soak.phase(tmp_path) == "before run.json"
    out = run_folder(tmp_path / "run")
    assert soak.phase(out) == "before the first step"
    last = out / "checkpoints" / "checkpoint-4"
    last.mkdir()
    assert (soak.phase(out), soak.newest(out)) == ("writing a checkpoint", 0)
    checkpoint.mark(last, 4)
    assert (soak.phase(out), soak.newest(out)) == ("training", 4)
    (out / "events.jsonl").write_text('{"event": "dash_launch"}\n')
    assert soak.phase(out) == "training, after a launch"
    (out / ".adapter.weft-0123456789abcdef").mkdir()
    assert soak.phase(out) == "writing the adapter or run.json"
    assert soak.phase(run_folder(tmp_path / "done", "complete")) == "after the end"


@pytest.mark.parametrize(
    ("code", "whole", "failure"), [(0, b"one", ""), (0, b"other", "another adapter"), (1, b"one", "weftlora: no")]
)
def test_a_run_that_fails_or_differs_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, whole: bytes, failure: str
) -> None:
    def life(recipe: str, out: Path, deadline: float | None) -> tuple[int, float]:
        out.with_suffix(".log").write_text("weftlora: no.")
        return code, 0.0

    monkeypatch.setattr(soak, "life", life)
    monkeypatch.setattr(soak, "weights", lambda out: b"one")
    tally = soak.Tally(seconds=1.0)
    soak.one_run("lora", tmp_path / "run", whole, tally, random.Random(0))
    assert tally.identical == (not failure)
    assert [failure in found for found in tally.failures] == [True] * bool(failure)
