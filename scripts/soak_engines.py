"""Second part of `make soak`: a process of a distributed run killed at a random moment, engine by engine, over and over.

    python scripts/soak_engines.py [--kills 10] [--seed 0] [--only fsdp2 ...] [--out evidence/soak.json]

A run is a loop of one's own (tests/sharding/worlds.py) in two processes, with its method's event on the way and a checkpoint after
every step:

    ddp, fsdp1, fsdp2, tp    torch.distributed.checkpoint, each process its parts; and weftlora.state_dict
    zero2, zero3             DeepSpeed's own, where DeepSpeed is installed

A checkpoint counts once the main process has marked it, after all have written theirs. A try is a run started again and again, one
of its processes killed by SIGKILL each time at a moment drawn from the length of the undisturbed run, until it is left alone. Its last
life is sometimes one process (ddp, fsdp2). What must hold:

- whoever is left ends by itself, with an error, before any timeout; only where a process is killed before the group stands (under
  DeepSpeed: its groups) are the others ended, as torchrun does it
- the decisions are those of the undisturbed run, and so is every tensor of the adapter: bit for bit, or to 1e-9 (fp64) where another
  number of processes ended it

Counts go into the file, where they replace those of the same engine. Exits 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from soak import Counts
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from claims import ROOT

OUT = ROOT / "evidence" / "soak.json"
sys.path[:0] = [str(ROOT / "tests" / "sharding"), str(ROOT / "tests"), str(ROOT / "src")]

from worlds import DTYPES, END, ENGINES, Zero, decisions, forked, largest_difference, model_of, of, steps  # noqa: E402

import weftlora  # noqa: E402

WAITING = ("lora_tsd", "alora", "hydralora")
STEADY = ("hydralora", "tied_lora", "lora")
METHODS = {**dict.fromkeys(("ddp", "fsdp2", "fsdp1", "tp"), WAITING), "zero2": STEADY, "zero3": STEADY}
"""By engine, in turn: under ZeRO methods that wait for a step are refused."""
RESHARDED = ("ddp", "fsdp2")
"""Engines whose checkpoints any number of processes goes on from."""
STAGES = (
    "before the group stands",
    "building",
    "loading",
    "forward and backward",
    "optimiser and events",
    "saving",
    "ending",
)
PATIENCE = 200.0
"""Seconds that whoever is left may take to end; the group's own timeout is longer."""
TIMEOUT = timedelta(seconds=400)


class Kept:
    """Checkpoints of torch.distributed, without the base: what is marked is whole."""

    def __init__(self, folder: Path, run: nn.Module, model: nn.Module, tell: Any):
        self.folder, self.run, self.model, self.tell = folder, run, model, tell
        self.options = StateDictOptions(ignore_frozen_params=True, strict=False)

    def begin(self, optimizer: torch.optim.Optimizer) -> int:
        """See `worlds.Keeper`."""
        self.tell("loading")
        whole = [int(path.parent.name) for path in self.folder.glob("*/complete")]
        if whole:
            self.load(optimizer, self.folder / str(max(whole)))
        self.tell("forward and backward")
        return max(whole, default=0)

    def keep(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """See `worlds.Keeper`."""
        self.tell("saving")
        self.save(optimizer, self.folder / str(step))
        dist.barrier()
        if dist.get_rank() == 0:
            (self.folder / str(step) / "complete").touch()
        self.tell("forward and backward")

    def parts(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.run, options=self.options),
            "optimizer": get_optimizer_state_dict(self.run, optimizer, options=self.options),
        }

    def save(self, optimizer: torch.optim.Optimizer, to: Path) -> None:
        dcp.save(self.parts(optimizer), checkpoint_id=to)
        if dist.get_rank() == 0:
            (to / "schedule.json").write_text(json.dumps(weftlora.state_dict(self.model)), encoding="utf-8")

    def load(self, optimizer: torch.optim.Optimizer, path: Path) -> None:
        found = self.parts(optimizer)
        dcp.load(found, checkpoint_id=path)
        set_model_state_dict(self.run, found["model"], options=self.options)
        set_optimizer_state_dict(self.run, optimizer, found["optimizer"], options=self.options)
        weftlora.load_state_dict(self.model, json.loads((path / "schedule.json").read_text(encoding="utf-8")))


class KeptByDeepSpeed(Kept):
    """The same by DeepSpeed's engine."""

    def save(self, optimizer: torch.optim.Optimizer, to: Path) -> None:
        state = {"schedule": weftlora.state_dict(self.model)}
        engine: Any = self.run.engine
        engine.save_checkpoint(str(to), tag="all", client_state=state, exclude_frozen_parameters=True)

    def load(self, optimizer: torch.optim.Optimizer, path: Path) -> None:
        engine: Any = self.run.engine
        found, state = engine.load_checkpoint(str(path), tag="all", load_module_strict=False)
        assert found is not None, f"DeepSpeed loads nothing from {path}"
        weftlora.load_state_dict(self.model, state["schedule"])


def be(rank: int, world: int, engine: str, method: str, folder: Path, stage: mmap.mmap, life: int) -> None:
    """Be one of the processes of a life; at its end what it came to is in a file of its own."""

    def tell(name: str) -> None:
        stage[rank] = STAGES.index(name)

    @contextmanager
    def around() -> Iterator[None]:
        tell("optimiser and events")
        yield
        tell("forward and backward")

    tell(STAGES[0])
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store-{life}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    dist.barrier()
    if not engine.startswith("zero"):  # DeepSpeed makes more groups while it builds, and waits for each without an end
        tell("building")
    model = model_of(method, DTYPES["fp32" if engine.startswith("zero") else "fp64"][0])
    run = ENGINES[engine](model)
    kind = KeptByDeepSpeed if isinstance(run, Zero) else Kept
    keeper = kind(folder / "checkpoints", run, model, tell)
    steps(run, model, *((0, 1) if engine == "tp" else (rank, world)), around=around, keeper=keeper)
    tell("ending")
    unfinished = folder / f"{rank}.unfinished"
    torch.save(of(run, model), unfinished)
    dist.barrier()
    unfinished.replace(folder / f"{rank}.pt")


def begun(world: int, engine: str, method: str, folder: Path, stage: mmap.mmap, life: int) -> list[int]:
    def say(rank: int, error: BaseException) -> None:
        (folder / f"{life}.{rank}.said").write_text("".join(traceback.format_exception(error)), encoding="utf-8")

    return forked(world, lambda rank: be(rank, world, engine, method, folder, stage, life), say)


@dataclass
class Tally(Counts):
    """What the tries of one engine came to."""

    tries: int = 0
    identical: int = 0
    lives: int = 0
    kills: int = 0
    other_number: int = 0
    """Tries that another number of processes ended."""
    stages: Counter[str] = field(default_factory=Counter)
    ranks: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a process, or None if it has not ended within so many seconds."""
    last = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > last:
            return None
        time.sleep(0.01)


def life_of(
    world: int,
    engine: str,
    method: str,
    folder: Path,
    life: int,
    killed_at: float | None,
    tally: Tally,
    draw: random.Random,
) -> bool:
    """One life, killed after so many seconds or left alone; whether it came to its end."""
    stage = mmap.mmap(-1, world)
    victim = draw.randrange(world)
    children = begun(world, engine, method, folder, stage, life)
    tally.lives += 1
    codes: dict[int, int] = {}
    if killed_at is not None and (code := ended(children[victim], killed_at)) is not None:
        codes[victim] = code
    elif killed_at is not None:
        os.kill(children[victim], signal.SIGKILL)
        codes[victim] = os.waitstatus_to_exitcode(os.waitpid(children[victim], 0)[1])
        where = STAGES[stage[victim]]
        tally.kills += 1
        tally.stages[where] += 1
        tally.ranks[str(victim)] += 1
        if where == STAGES[0]:  # what torchrun does to the others at any moment
            for rank in set(range(world)) - {victim}:
                if ended(children[rank], 0) is None:
                    os.kill(children[rank], signal.SIGKILL)
                    os.waitpid(children[rank], 0)
            return False
    for rank, child in enumerate(children):
        if rank not in codes and (code := ended(child, PATIENCE)) is not None:
            codes[rank] = code
        elif rank not in codes:
            tally.failures.append(
                f"{folder.name}: process {rank} hangs where {victim} was killed in {STAGES[stage[victim]]}"
            )
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    left = {rank: code for rank, code in codes.items() if code != -signal.SIGKILL}
    if all(code == 0 for code in left.values()) and len(left) == world:
        return True
    if victim in left or killed_at is None:
        said = [path.read_text(encoding="utf-8")[-700:] for path in sorted(folder.glob(f"{life}.*.said"))]
        tally.failures.append(f"{folder.name}, life {life}: left alone, it ends with {codes}: {' | '.join(said)}")
    elif any(code == 0 for code in left.values()) and STAGES[stage[victim]] != "ending":
        tally.failures.append(
            f"{folder.name}, life {life}: a process ends well without the other, in {STAGES[stage[victim]]}"
        )
    return False


def came_to(folder: Path, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def wrong_with(whole: dict[str, Any], found: list[dict[str, Any]], exact: bool) -> str:
    """In which way what the processes of a try came to is not what the undisturbed run did; "" if in none."""
    for rank, each in enumerate(found):
        if decisions(each) != decisions(whole):
            return f"process {rank} has decided otherwise"
        if each["tensors"].keys() != whole["tensors"].keys():
            return f"process {rank} has other tensors"
        if exact and not all(torch.equal(value, each["tensors"][name]) for name, value in whole["tensors"].items()):
            return f"process {rank} has other weights, by {largest_difference(whole, each):.1e}"
        if (apart := largest_difference(whole, each)) > DTYPES["fp64"][1]:
            return f"process {rank} is off by {apart:.1e}"
    return ""


def soak(engine: str, wanted: int, seed: int, top: Path) -> dict[str, Any]:
    """Tries under one engine until there have been so many kills; what they came to."""
    began, tally, wholes = time.monotonic(), Tally(), dict[str, tuple[dict[str, Any], float]]()
    while tally.kills < wanted and not tally.failures:
        method, draw = (
            METHODS[engine][tally.tries % len(METHODS[engine])],
            random.Random(f"{seed} {engine} {tally.tries}"),
        )
        if method not in wholes:
            place, started, alone = top / f"{engine}-{method}", time.monotonic(), Tally()
            place.mkdir()
            if not life_of(2, engine, method, place, 0, None, alone, draw):
                return {**alone.plain(), "seconds": round(time.monotonic() - began)}
            wholes[method] = came_to(place, 2)[0], time.monotonic() - started
        (whole, seconds), place = wholes[method], top / f"{engine}-{method}-{tally.tries}"
        place.mkdir()
        tally.methods[method] += 1
        life, done, deaths = 0, False, draw.randint(3, 4)
        while not done and not tally.failures and life < 3 * deaths:
            at = draw.uniform(0.1, 0.9) * seconds if tally.kills < wanted and life < deaths else None
            world = draw.choice((1, 2)) if at is None and engine in RESHARDED else 2
            done = life_of(world, engine, method, place, life, at, tally, draw)
            life += 1
        tally.tries += 1
        if done and (wrong := wrong_with(whole, came_to(place, world), exact=world == 2)):
            tally.failures.append(f"{place.name}: {wrong}")
        tally.identical += done and not tally.failures
        tally.other_number += world == 1
        print(f"{place.name}: {tally.kills} kills, {tally.identical}/{tally.tries} identical", flush=True)
    return {**tally.plain(), "seconds": round(time.monotonic() - began)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failures = 0
    for method in dict.fromkeys((*WAITING, *STEADY)):
        model_of(method, torch.float32)  # what it imports is imported once, before the first fork
    for engine in given.only:
        if engine.startswith("zero"):
            if find_spec("deepspeed") is None:
                print(engine, "not run: DeepSpeed is not installed", flush=True)
                continue
            os.environ["DS_ACCELERATOR"] = "cpu"
            import_module("deepspeed")  # once, before the first fork
        with tempfile.TemporaryDirectory(prefix="weft-soak-") as top:
            found = soak(engine, given.kills, given.seed, Path(top))
        for failure in found["failures"]:
            print("FAILED", failure, file=sys.stderr, flush=True)
        failures += len(found["failures"])
        record = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
        engines = record.setdefault("engines", {"command": "python scripts/soak_engines.py", "versions": {}})
        engines["versions"]["torch"] = torch.__version__
        if engine.startswith("zero"):
            engines["versions"]["deepspeed"] = str(import_module("deepspeed").__version__)
        engines[engine] = {**found, "steps": END}
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
