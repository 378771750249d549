"""Two machines, as two network namespaces with a cable between them: torchrun's rendezvous, FSDP2, and the adapter of one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_accelerate import FSDP2, HERE

import weftlora
from weftlora.data.demo import demo_model_path

pytestmark = pytest.mark.sharded
PATIENCE = 400
"""Seconds that both nodes have in all."""
NODES = {f"weft-{os.getpid()}-{number}": f"10.177.0.{number + 1}" for number in range(2)}
CABLE = f"weft{os.getpid()}"[-15:]
"""The name of either end of the cable, in its own namespace."""
RECIPE = """
model: demo
data: demo
adapter: {recipe: lora_dash, r: 4, directions: 4, after: 2}
train: {steps: 4, batch_size: 2, lr: 1e-2, max_grad_norm: 0}
"""


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """The names of the namespaces and their addresses; gone again afterwards, with the cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2's `ip`")
    one, other = NODES
    commands = [
        ["netns", "add", one],
        ["netns", "add", other],
        ["link", "add", CABLE, "netns", one, "type", "veth", "peer", "name", CABLE, "netns", other],
    ]
    for node, address in NODES.items():
        commands += [["-n", node, "addr", "add", f"{address}/30", "dev", CABLE]]
        commands += [["-n", node, "link", "set", each, "up"] for each in ("lo", CABLE)]
    try:
        for words in commands:
            if (done := ip(*words)).returncode:
                pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")
        yield NODES
    finally:
        for node in NODES:
            ip("netns", "del", node)


def received(node: str) -> int:
    """Bytes that have come to a node over the cable."""
    words = ("netns", "exec", node, "cat", f"/sys/class/net/{CABLE}/statistics/rx_bytes")
    return int(ip(*words).stdout)


def node_of(node: str, address: str, meet: str, log: Path, *given: str) -> subprocess.Popen[bytes]:
    """`weftlora` on a node, as torchrun is called there; the first node is where they meet."""
    env = {**os.environ, **FSDP2, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    env["PYTHONPATH"] = str(Path(weftlora.__file__).parents[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meet}:29477", "--local-addr", address]
    torchrun += ["--rdzv-conf", f"is_host={int(address == meet)}"]  # a name that stands for this address is nowhere
    command = ["ip", "netns", "exec", node, *torchrun, str(HERE / "on_cpu.py"), *given]
    with log.open("wb") as said:
        return subprocess.Popen(command, env=env, stdout=said, stderr=said, start_new_session=True)


def test_two_nodes_meet_and_end_in_the_adapter_of_one_process(nodes: dict[str, str], tmp_path: Path) -> None:
    recipe, both = tmp_path / "r.yaml", tmp_path / "both"
    recipe.write_text(RECIPE)
    meet = next(iter(nodes.values()))
    started = {
        node: node_of(node, address, meet, tmp_path / node, "train", str(recipe), f"out={both}")
        for node, address in nodes.items()
    }
    try:
        weftlora.train(recipe, "train.accumulation=2", f"out={tmp_path / 'one'}")  # meanwhile
        codes = [each.wait(PATIENCE) for each in started.values()]
    finally:
        for each in started.values():
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()
    assert codes == [0, 0], "".join((tmp_path / node).read_text()[-2000:] for node in nodes)
    base = (Path(demo_model_path()) / "model.safetensors").stat().st_size
    assert all(received(node) > base for node in nodes), "each had half of the base from the other, twice a step"
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "one", both))
    assert one.keys() == two.keys()
    for name, value in one.items():
        pair = value.double(), two[name].double()
        if ".boost." in name:  # directions come in pairs, of which both may have the other sign
            pair = pair[0].abs(), pair[1].abs()
        assert float((pair[0] - pair[1]).abs().max()) <= 1e-5, name
