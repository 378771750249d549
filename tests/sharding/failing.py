"""One of two processes fails, or is killed, at each phase of a sharded run: `failing.py FOLDER [PHASE ...]`, over gloo.

Writes, by phase and way, what the other one said, or "" if it ended without a word, and how long both took.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from worlds import ENGINES, forked, model_of, steps

from weftlora.adapted.layer import WeftLinear
from weftlora.schedule import rank_slots, reallocate
from weftlora.schedule.direction_ranking import Ranker
from weftlora.scoring.scorer import Ablation
from weftlora.train import sharded

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
PHASES: dict[str, tuple[str, Any, str]] = {
    "forward": ("lora", WeftLinear, "cast_input"),
    "sending W": ("lora_dash", WeftLinear, "base_matrix_on"),
    "ranking": ("lora_dash", Ranker, "_rank_one"),
    "scoring": ("alora", Ablation, "exact"),
    "deciding": ("alora", reallocate, "decide"),
    "moving": ("alora", rank_slots, "move"),
    "saving": ("lora", sharded, "whole_adapter"),
}
WAYS = ("raises", "killed")


def stopping(real: Callable[..., Any], way: str) -> Callable[..., Any]:
    """`real`, until it is called for the first time in process 1."""

    def stop(*given: Any, **more: Any) -> Any:
        if dist.get_rank() == 1:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no luck here")
        return real(*given, **more)

    return stop


def be(rank: int, phase: str, way: str) -> None:
    """Be one of the two: what it fails with goes into a file."""
    method, owner, name = PHASES[phase]
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, patience = FOLDER / f"{phase} {way}.store", datetime.timedelta(seconds=240)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    setattr(owner, name, stopping(getattr(owner, name), way))  # before a schedule takes hold of the layer's own methods
    model = model_of(method, torch.float32)
    run: nn.Module = ENGINES["fsdp2"](model)
    steps(run, model, rank, 2)
    sharded.save(model, FOLDER / f"{phase} {way}", rank == 0)


def pair(phase: str, way: str) -> dict[str, Any]:
    """Both processes, to their ends."""
    began = time.monotonic()
    children = forked(
        2,
        lambda rank: be(rank, phase, way),
        lambda rank, error: (FOLDER / f"{phase} {way}.{rank}").write_text(
            "".join(traceback.format_exception_only(error))
        ),
    )
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [FOLDER / f"{phase} {way}.{rank}" for rank in (0, 1)]
    texts = [path.read_text() if path.exists() else "" for path in said]
    return {"codes": codes, "said": texts, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {phase: {way: pair(phase, way) for way in WAYS} for phase in sys.argv[2:] or PHASES}
    (FOLDER / "found.json").write_text(json.dumps(found))
