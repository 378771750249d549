"""A comparison on a real Ray cluster of three nodes on one machine: a node that dies, a cluster that is not there, too little room."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from comparing import quality, recipe

from weftlora.compare import compare, on_ray
from weftlora.compare.recipe import CompareRecipe
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


def test_a_node_that_dies_in_a_run_changes_nothing(cluster: object, tmp_path: Path):
    whole = compare(written(tmp_path, "alone"), jobs=0)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]  # type: ignore[attr-defined]
    shared = tmp_path / "shared"

    def kill_one() -> None:
        end = time.monotonic() + 400
        while time.monotonic() < end and not [*shared.glob("tuning/*/*/run.json")]:
            time.sleep(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)  # type: ignore[attr-defined]

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    found = on_ray.compare(written(tmp_path, "shared"), cluster.address, None, None, lambda standing: None, LEASE)  # type: ignore[attr-defined]
    killer.join()
    assert sum(node["Alive"] for node in ray.nodes()) == 2 if ray.is_initialized() else True
    assert quality(found.record()) == quality(whole.record())


def test_a_cluster_that_is_not_there_or_has_no_room_is_one_sentence(cluster: object, tmp_path: Path):
    with pytest.raises(RunError, match="no node of the cluster has 1 CPUs and 4 GPUs for a run"):
        on_ray.compare(written(tmp_path, "room"), cluster.address, None, 4, lambda standing: None, LEASE)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="no Ray cluster answers at nowhere:1"):
        on_ray.compare(written(tmp_path, "room"), "nowhere:1", None, None, lambda standing: None, LEASE)
    with pytest.raises(ConfigError, match="gpus=-1 is not a share of a GPU"):
        on_ray.compare(written(tmp_path, "room"), None, None, -1, lambda standing: None, LEASE)
