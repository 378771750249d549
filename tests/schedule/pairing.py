"""Two processes over gloo for a test: a script calls `run_pair(worker)`, a test reads what both found with `both_of`.

`worker(rank)` gives what process `rank` found, as torch.save takes it. Processes are forked after the script's imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import weftlora

HERE = Path(__file__).parent


def both_of(script: str, folder: Path) -> list[dict[Any, Any]]:
    """What the two processes of a script beside this file found."""
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(HERE), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def run_pair(worker: Callable[[int], dict[Any, Any]]) -> None:
    """Be both processes of `SCRIPT FOLDER`; exits with 1 if one of them fails."""
    folder, children = sys.argv[1], []
    for rank in (0, 1):
        if child := os.fork():
            children.append(child)
            continue
        try:
            _be(rank, folder, worker)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    for child in children:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(1)


def _be(rank: int, folder: str, worker: Callable[[int], dict[Any, Any]]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(worker(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
