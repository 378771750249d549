"""A comparison that is killed where the dice fall, and the same left alone: `killed_comparison.py FOLDER KILLS`.

One process imports everything and forks a child for each life; all lives share one server of runs, which is what takes seconds to
start. FOLDER/whole is the comparison left alone, FOLDER/killed the other; FOLDER/deaths.json tells how many of its files there were
at each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from comparing import recipe

from weftlora.compare import compare, workers


def begin(made: dict[str, Any]) -> int:
    """A life: its process."""
    child = os.fork()
    if child:
        return child
    server: Any = forkserver
    server.ensure_running = server._forkserver.ensure_running = lambda: None  # it runs, and is no child of this process
    try:
        compare(made, jobs=2)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def end(process: int) -> None:
    """Wait for a life that must end well."""
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def files(folder: Path) -> int:
    """How many there are; folders may vanish meanwhile, which os.walk does not mind."""
    return sum(len(names) for _, _, names in os.walk(folder))


def main(top: Path, kills: int) -> None:
    torch.set_num_threads(1)
    rates = {"values": [1e-3, 1e-2]}
    made = recipe(top, train={"steps": 6, "save_every": 2, "lr": None}, rates=rates, seeds=2)
    with workers.Pool(2, top, 0):
        pass
    end(begin(made | {"out": str(top / "whole")}))
    dice, folder, deaths = random.Random(0), top / "killed", []
    for _ in range(kills):
        life, enough = begin(made | {"out": str(folder)}), files(folder) + dice.randrange(1, 40)
        while files(folder) < enough:
            time.sleep(0.002)
        os.kill(life, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]) == -signal.SIGKILL
        deaths.append(files(folder))
    end(begin(made | {"out": str(folder)}))
    (top / "deaths.json").write_text(json.dumps(deaths), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
