"""Workers that share a folder: killed and started again in the middle, they end as one comparison that ran alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparing import quality, recipe

from weftlora.compare import compare, work
from weftlora.disk.lock import holding
from weftlora.errors import ConfigError, RunError

pytestmark = pytest.mark.kills

LEASE = 10


def start(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "weftlora", "compare", str(file), "--worker", "--lease", str(LEASE), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def written(top: Path, out: str) -> tuple[dict[str, Any], Path]:
    more = {"methods": ["lora", "tied_lora", "none"], "train": {"lr": None}, "rates": {"values": [1e-3, 1e-2]}}
    made = recipe(top, **more) | {"out": str(top / out)}
    file = top / f"{out}.yaml"
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    return made, file


def wait_for(sign: Any, process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not sign():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_of_which_one_is_killed_in_a_run_end_as_one_comparison_that_ran_alone(tmp_path: Path):
    made, _ = written(tmp_path, "alone")
    whole = compare(made, jobs=0)
    _, file = written(tmp_path, "shared")
    first, second = start(file), start(file)
    shared = tmp_path / "shared"
    wait_for(lambda: [*shared.glob("tuning/*/*/run.json")], first)
    os.kill(first.pid, signal.SIGKILL)  # its run is taken over once nobody has heard of it
    third = start(file)
    for process in (second, third):
        _, wrong = process.communicate(timeout=600)
        assert process.returncode == 0, wrong
    first.communicate()
    found = json.loads((shared / "comparison.json").read_text(encoding="utf-8"))
    assert quality(found) == quality(whole.record()).replace(str(tmp_path / "alone"), str(shared))
    again = work(shared)  # nothing is left
    assert quality(again.record()) == quality(found)


def test_a_comparison_in_charge_and_workers_refuse_each_other_and_options_that_mean_nothing(tmp_path: Path):
    made, file = written(tmp_path, "both")
    (tmp_path / "both").mkdir()
    with (
        holding(tmp_path / "both", "weftlora compare"),
        pytest.raises(RunError, match=r"is in use by process .* which runs everything itself"),
    ):
        work(file)
    (tmp_path / "both" / "leases").mkdir()
    (tmp_path / "both" / "leases" / "a.0.lease").write_text('{"owner": "node3-1", "beat": 2}', encoding="utf-8")
    with pytest.raises(RunError, match="has workers, such as node3-1"):
        compare(made, jobs=0)
    with pytest.raises(ConfigError, match="a lease of 0 seconds cannot be held"):
        work(file, lease=0)
    (tmp_path / "plain").write_text("no folder", encoding="utf-8")
    with pytest.raises((ConfigError, RunError)):
        work(tmp_path / "plain")
