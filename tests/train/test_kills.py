"""SIGKILL at every boundary of every phase of every recipe: the next life ends with the uninterrupted run's bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import tiny_bases as tiny

import weftlora
from weftlora.recipes import RECIPES

pytestmark = pytest.mark.kills

HERE = Path(__file__).parent


@pytest.mark.parametrize("host", killing.HOSTS)
def test_killed_at_every_phase_boundary_and_at_random_steps(host: str, tmp_path: Path) -> None:
    """One test a host, because importing takes longer than ten lives."""
    tiny.llama(tmp_path / "base")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.answers(48))
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), host, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    left = json.loads((tmp_path / "lives.json").read_text())
    for name in killing.recipes(host):
        table = killing.kills(name, host)
        assert left[name] == {where: kill.newest() for where, kill in table.items()}
        files = {where: tmp_path / name / where / "adapter" / "adapter_model.safetensors" for where in table}
        whole = (tmp_path / name / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
        assert [where for where, file in files.items() if file.read_bytes() != whole] == [], name


def test_every_recipe_of_ours_has_a_row() -> None:
    assert set(killing.RECIPES) == {name for name in RECIPES if not name.startswith("peft:")}
