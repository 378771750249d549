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

from weftlora.compare import compare, fetch, load, work
from weftlora.compare.storing import Store
from weftlora.disk.lock import holding
from weftlora.errors import ConfigError, RunError

pytestmark = pytest.mark.kills

LEASE = 10


def start(file: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "weftlora",
        "compare",
        str(file),
        "--worker",
        "--lease",
        str(LEASE),
        "--quiet",
        *more,
    ]
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


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_workers_that_share_only_a_store_take_over_from_its_checkpoints(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
):
    top = request.getfixturevalue("server") if where == "s3" else f"file://{tmp_path / 'store'}"
    place = f"{top}/{tmp_path.name}"
    more = {"methods": ["lora", "none"], "seeds": 1, "train": {"steps": 40, "save_every": 2}}
    made = recipe(tmp_path, **more)
    whole = compare(made | {"out": str(tmp_path / "alone")}, jobs=0)
    file = tmp_path / "shared.yaml"
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    store = Store(place)
    first = start(file, "--store", place, "--out", str(tmp_path / "first"))
    wait_for(lambda: any(take.state == "begun" for take in store.latest().values()), first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    left = {take.job: take for take in store.latest().values() if take.state == "begun"}
    second = start(file, "--store", place, "--out", str(tmp_path / "second"))
    _, wrong = second.communicate(timeout=600)
    assert second.returncode == 0, wrong
    assert left.keys() == {"runs+lora+s0"}
    assert {take.state for take in store.latest().values()} == {"ended"}
    events = (tmp_path / "second" / "runs" / "lora" / "s0" / "events.jsonl").read_text(encoding="utf-8")
    assert "resume" in events  # from the checkpoint of a machine that is gone
    assert quality(load(place).record()) == quality(whole.record())
    brought = fetch(place, tmp_path / "brought")
    assert quality(brought.record()) == quality(whole.record())
    adapters = [
        tmp_path / each / "runs" / "lora" / "s0" / "adapter" / "adapter_model.safetensors"
        for each in ("alone", "brought")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_workers_that_submitit_starts_end_as_one_comparison(tmp_path: Path):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    made = recipe(tmp_path, methods=["lora", "none"], seeds=1)
    whole = compare(made | {"out": str(tmp_path / "alone")}, jobs=0)
    file = tmp_path / "shared.yaml"
    file.write_text(yaml.safe_dump(made | {"out": str(tmp_path / "shared")}), encoding="utf-8")
    executor = submitit.AutoExecutor(folder=str(tmp_path / "logs"), cluster="local")  # as on Slurm, without one
    executor.update_parameters(timeout_min=10)
    command = [sys.executable, "-m", "weftlora", "compare", str(file), "--worker", "--lease", str(LEASE), "--quiet"]
    for job in [executor.submit(submitit.helpers.CommandFunction(command)) for _ in range(2)]:
        job.result()
    assert quality(load(tmp_path / "shared").record()) == quality(whole.record())


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
