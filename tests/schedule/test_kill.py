"""Processes of a bare loop that really die, by SIGKILL: what the next one makes of it is the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import weftlora

pytestmark = pytest.mark.sharded
HERE = Path(__file__).parent
LAUNCH, END = 5, 9
# before the launch; at its step, before and while it is saved; after it, twice in one run
KILLS = {
    "pre-launch": [["step", 3]],
    "at the launch": [["step", LAUNCH]],
    "inside the launch": [["inside", LAUNCH]],
    "writing the launch": [["half", LAUNCH]],
    "in the dash phase": [["half", 7]],
    "twice": [["step", LAUNCH], ["half", LAUNCH + 1]],
    **{f"random step {step}": [["step", step]] for step in random.Random("bare loop").sample(range(1, END + 1), 3)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, of one process forked for each: importing takes longer than they do."""
    folder = tmp_path_factory.mktemp("killed")
    jobs = [[str(folder / "whole"), "end", END]]
    for name, kills in KILLS.items():
        jobs += [[str(folder / name), *kill] for kill in [*kills, ["end", END]]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(HERE), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_loop.py"), str(folder / "jobs.json")],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_the_resumed_adapter_is_that_of_the_uninterrupted_run(name: str, runs: Path) -> None:
    whole, resumed = (runs / which / str(END) / "adapter_model.safetensors" for which in ("whole", name))
    assert whole.read_bytes() == resumed.read_bytes()
    file = load_file(resumed)
    assert file["base_model.model.first.weft_site.steps"].item() == END
    assert file["base_model.model.first.weft_site.boost.launched"].item()
    assert (file["base_model.model.first.weft_site.boost.gain"] != 0).all()


@pytest.mark.parametrize("name", KILLS)
def test_the_launch_is_told_once_and_after_its_step(name: str, runs: Path) -> None:
    state = json.loads((runs / name / str(END) / "schedule.json").read_text())["default"]
    assert [(e["event"], e["step"]) for e in state["events"]] == [("dash_launch", LAUNCH)]


def test_directions_are_never_chosen_again(runs: Path) -> None:
    """From the launch on, every checkpoint of every run holds the same directions."""
    kept = set()
    for name in ["whole", *KILLS]:
        for step in range(LAUNCH, END + 1):
            file = load_file(runs / name / str(step) / "adapter_model.safetensors")
            kept.add(
                tuple(t.numpy().tobytes() for n, t in sorted(file.items()) if n.endswith((".up", ".down", ".index")))
            )
    assert len(kept) == 1
