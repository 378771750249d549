"""A comparison on a real Ray cluster of three nodes on one machine: a node that dies, a driver that dies, a worker that is cut off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from comparing import quality, recipe

from weftlora.compare import compare, fetch, on_ray
from weftlora.compare.engine import Resources
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.running import Standing
from weftlora.errors import ConfigError, RunError

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.kills

LEASE = 15.0


def written(top: Path, out: str) -> CompareRecipe:
    more = {"methods": ["lora", "none"], "train": {"lr": None}, "rates": {"values": [1e-3, 1e-2]}, "seeds": 3}
    return CompareRecipe.read(recipe(top, **more) | {"out": str(top / out)})


@pytest.fixture
def cluster() -> object:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    yield made
    ray.shutdown()
    made.shutdown()


def wait_for(sign: Callable[[], Any], seconds: float = 1000) -> None:
    end = time.monotonic() + seconds
    while not sign():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_node_that_dies_in_a_run_changes_nothing(cluster: object, tmp_path: Path):
    whole = compare(written(tmp_path, "alone"), jobs=0)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]  # type: ignore[attr-defined]
    shared = tmp_path / "shared"

    def kill_one() -> None:
        wait_for(lambda: [*shared.glob("tuning/*/*/run.json")])
        cluster.remove_node(nodes[0], allow_graceful=False)  # type: ignore[attr-defined]

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    told: list[Standing] = []
    found = on_ray.compare(written(tmp_path, "shared"), cluster.address, None, None, told.append, LEASE)  # type: ignore[attr-defined]
    killer.join()
    lines = [standing.said for standing in told if standing.said]
    assert any(line.endswith("runs/lora/s0: complete") for line in lines)  # what a worker on some node has said
    assert any(line.endswith(": taken over") for line in lines)
    assert sum(node["Alive"] for node in ray.nodes()) == 2 if ray.is_initialized() else True
    assert quality(found.record()) == quality(whole.record())


def test_a_driver_that_is_killed_is_started_again_and_goes_on(cluster: object, tmp_path: Path):
    whole = compare(written(tmp_path, "alone"), jobs=0)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]  # type: ignore[attr-defined]
    assert len(nodes) == 2
    shared, file = tmp_path / "shared", tmp_path / "shared.yaml"
    more = written(tmp_path, "shared").model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(more), encoding="utf-8")
    command = [sys.executable, "-m", "weftlora", "compare", str(file), "--engine", "ray", "--json"]
    command += ["--address", cluster.address]  # type: ignore[attr-defined]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start()
    wait_for(lambda: [*shared.glob("tuning/*/*/run.json")] or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    out, wrong = start().communicate(timeout=900)
    assert quality(json.loads(out)) == quality(whole.record()), wrong


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a node without the disk needs a mount namespace"
)
def test_a_worker_that_is_cut_off_from_the_disk_stops_and_the_others_take_over(cluster: object, tmp_path: Path):
    longer = {"methods": ["lora", "none"], "train": {"steps": 300, "save_every": 50}, "seeds": 3}
    made = recipe(tmp_path, **longer)
    whole = compare(made | {"out": str(tmp_path / "alone")}, jobs=0)
    shared, logs = tmp_path / "shared", tmp_path / "logs"
    started = ["ray", "start", "--block", "--num-cpus=1", "--object-store-memory=80000000"]
    started = [str(Path(ray.__file__).parents[1] / "bin" / "ray"), *started[1:]]
    with logs.open("w") as said:
        node = subprocess.Popen(
            ["unshare", "-m", sys.executable, *started, f"--address={cluster.address}"],  # type: ignore[attr-defined]
            stdout=said,
            stderr=said,
        )
    try:
        wait_for(lambda: sum(each["Alive"] for each in _nodes(cluster)) == 2 or node.poll() is not None)

        def cut() -> None:
            wait_for(lambda: len([*shared.glob("runs/lora/*/run.json")]) == 2)  # each of the two has begun one
            command = ["nsenter", "-t", str(node.pid), "-m", "mount", "-t", "tmpfs", "none", str(shared)]
            subprocess.run(command, check=True)

        cutter = threading.Thread(target=cut, daemon=True)
        cutter.start()
        told: list[Standing] = []
        asked = CompareRecipe.read(made | {"out": str(shared)})
        found = on_ray.compare(asked, cluster.address, 2, None, told.append, LEASE)  # type: ignore[attr-defined]
        cutter.join()
    finally:
        node.terminate()
        node.wait()
    lines = [standing.said for standing in told if standing.said]
    assert any("the leases of" in line and "cannot be reached" in line for line in lines), lines
    assert any(line.endswith(": taken over") for line in lines), lines
    assert quality(found.record()) == quality(whole.record())


def _nodes(cluster: Any) -> list[dict[str, Any]]:
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False)
    return list(ray.nodes())


def test_nodes_that_share_only_a_store_end_as_one_comparison(server: str, cluster: object, tmp_path: Path):
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)  # type: ignore[attr-defined]
    made = recipe(tmp_path, methods=["lora", "none"], seeds=2)
    whole = compare(made | {"out": str(tmp_path / "alone")}, jobs=0)
    place, told = f"{server}/{tmp_path.name}", list[Standing]()
    asked = CompareRecipe.read(made | {"out": str(tmp_path / "driver")})
    found = on_ray.compare(asked, cluster.address, None, None, told.append, LEASE, place)  # type: ignore[attr-defined]
    assert quality(found.record()) == quality(whole.record())
    assert any(each.said.endswith("runs/lora/s1: complete") for each in told)  # out of the store too
    assert not [*(tmp_path / "driver").rglob("adapter*"), *(tmp_path / "driver").glob("leases")]
    brought = fetch(place, tmp_path / "brought")
    assert quality(brought.record()) == quality(whole.record())
    assert (tmp_path / "brought" / "runs" / "lora" / "s1" / "adapter" / "adapter_model.safetensors").is_file()


def test_shares_of_gpus_are_assigned_as_asked(cluster: object, tmp_path: Path):
    def task(folder: str) -> None:
        began = time.time()
        time.sleep(2)
        said = {"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "began": began, "ended": time.time()}
        Path(folder, f"{time.time_ns()}-{os.getpid()}.json").write_text(json.dumps(said), encoding="utf-8")

    cluster.add_node(num_cpus=8, num_gpus=2, object_store_memory=80 << 20)  # type: ignore[attr-defined]
    ray.init(address=cluster.address, log_to_driver=False)  # type: ignore[attr-defined]
    rooms = {(1.0, 0.5): 4, (1.0, 0.25): 8, (3.0, 0.25): 2, (1.0, 2.0): 1, (1.0, 0.0): 9}
    assert {each: on_ray._room(ray, Resources(*each)) for each in rooms} == rooms

    def carried_out(gpus: float, count: int) -> list[dict[str, Any]]:
        folder = tmp_path / f"{gpus}"
        folder.mkdir()
        left = iter(range(count))
        engine = on_ray.Cluster(ray, Resources(1.0, gpus), count, (task, str(folder)), 0.2)
        engine.run(lambda: next(left, None), lambda worker, tick: None)
        assert not engine.failed
        return [json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()]

    found = carried_out(0.5, 6)
    assert {each["gpus"] for each in found} == {"0", "1"}  # each sees the one that it has half of
    for one in found:
        beside = [
            each for each in found if each["gpus"] == one["gpus"] and each["began"] <= one["began"] < each["ended"]
        ]
        assert len(beside) <= 2
    assert [sorted(each["gpus"].split(",")) for each in carried_out(2.0, 1)] == [["0", "1"]]
    assert on_ray._gpus(SimpleNamespace(device="cuda"), None) == 1.0  # type: ignore[arg-type]
    assert on_ray._gpus(SimpleNamespace(device="cuda"), 0.25) == 0.25  # type: ignore[arg-type]


def test_a_cluster_that_is_not_there_or_has_no_room_is_one_sentence(cluster: object, tmp_path: Path):
    with pytest.raises(RunError, match="no node of the cluster has 1 CPUs and 4 GPUs for a run"):
        on_ray.compare(written(tmp_path, "room"), cluster.address, None, 4, lambda standing: None, LEASE)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="no Ray cluster answers at nowhere:1"):
        on_ray.compare(written(tmp_path, "room"), "nowhere:1", None, None, lambda standing: None, LEASE)
    with pytest.raises(ConfigError, match="gpus=-1 is not a share of a GPU"):
        on_ray.compare(written(tmp_path, "room"), None, None, -1, lambda standing: None, LEASE)
