"""How many runs at once on this machine, where that is left to us (`jobs="auto"`).

    by cores     cores that this process may use / threads of a run
    by memory    KEPT · memory that is free / the most memory of a run, as runs of the folder took it, or as `expected` says
    by work      runs that are left

The lowest, at least 1. Runs do not look at one another, so that their scores are the same whatever comes out. On a GPU memory is
that of the GPU. Of a container's limits those of its control group count (version 2).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weftlora.errors import ConfigError, RunError
from weftlora.runs.run import Run
from weftlora.settings import is_whole

Jobs = int | Literal["auto"]
KEPT = 0.8
"""Of the memory that is free, what runs may take together: the rest is for what starts meanwhile."""
LIBRARIES = 700 << 20
"""Bytes of a process that has everything imported, or of a GPU's context; runs of the bundled model take 500 to 540 MiB in all."""
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Decision:
    """How many at once, and why, in a line."""

    jobs: int
    said: str


@dataclass(frozen=True)
class Machine:
    """What runs share."""

    cores: int
    free_bytes: int
    of_what: str = "memory"
    """What has so many bytes free."""


def check(jobs: object, least: int = 0) -> None:
    """Refuse what is no number of runs at once. Raises ConfigError."""
    if jobs != "auto" and not is_whole(jobs, least):
        raise ConfigError(
            f"jobs={jobs!r} is not a number of runs: use a whole number from 1 up, auto for what this machine has room for, or 0 for "
            "none but this process."
        )


def decide(machine: Machine, threads: int, peak_bytes: int, is_measured: bool, runs: int | None) -> Decision:
    """How many of `runs` (None: of as many as there may be) of so many threads and bytes at once."""
    by_cores = machine.cores // max(threads, 1)
    by_memory = int(KEPT * machine.free_bytes / max(peak_bytes, 1))
    jobs = max(1, min(by_cores, by_memory, by_cores if runs is None else runs))
    how = "as measured" if is_measured else "as estimated"
    said = (
        f"{jobs} run{'s' * (jobs > 1)} at once: {machine.cores} core{'s' * (machine.cores > 1)} at {threads} a run, and "
        f"{_gib(machine.free_bytes)} of {machine.of_what} free at {_gib(peak_bytes)} a run, {how}"
    )
    if runs is not None and runs < min(by_cores, by_memory):
        said += f"; {runs} left to run"
    return Decision(jobs, said)


def decided(jobs: Jobs, plan: Any, runs: Iterable[Path], left: int | None) -> Decision:
    """`jobs` as it was given, or what a plan's runs have room for here.

    Args:
        jobs: what was asked for; 0 is one run, in this process.
        plan: a `weftlora.compare.plan.Plan`.
        runs: folders of runs of it, of which those that are complete say what memory they took.
        left: how many are to be carried out; None where that is not known.
    """
    if jobs != "auto":
        return Decision(max(jobs, 1), "")
    measured = peak(runs)
    return decide(
        machine(plan.device),
        plan.recipe["train"]["num_threads"],
        measured or plan.peak_bytes,
        measured is not None,
        left,
    )


def peak(runs: Iterable[Path]) -> int | None:
    """The most bytes that a complete run took; None where none is complete, or has said it."""
    found = []
    for folder in runs:
        with suppress(RunError):
            found.append(Run.load(folder).figures.get("peak_bytes", math.nan))
    known = [bytes_ for bytes_ in found if math.isfinite(bytes_)]
    return int(max(known)) if known else None


def expected(weights: int, trainable: int, settings: Any, dtype_bytes: int, rows: int, longest: int) -> int:
    """Bytes that a run will take at most, by what is known before its first step.

    The base, an adapter with its gradient and two moments, what a forward keeps for the backward of `rows` rows of `longest` tokens
    (10 vectors of the hidden width and 4 of the MLP's a block and token, and the attention's weights), and the logits three times.

    Args:
        weights: numbers in the base.
        trainable: numbers that are trained.
        settings: the base's config.
        dtype_bytes: bytes of a number in it.
        rows: in a micro-batch.
        longest: tokens of the longest row.
    """

    def size(*names: str, otherwise: int) -> int:
        return next((int(value) for name in names if is_whole(value := getattr(settings, name, None), 1)), otherwise)

    hidden = size("hidden_size", "d_model", "n_embd", otherwise=0)
    blocks = size("num_hidden_layers", "num_layers", "n_layer", otherwise=0)
    mlp = size("intermediate_size", "d_ff", "n_inner", otherwise=4 * hidden)
    heads = size("num_attention_heads", "num_heads", "n_head", otherwise=1)
    a_token = blocks * (10 * hidden + 4 * mlp + 2 * heads * longest) * dtype_bytes
    logits = 3 * 4 * size("vocab_size", otherwise=0)
    return LIBRARIES + weights * dtype_bytes + 16 * trainable + rows * longest * (a_token + logits)


def machine(device: str) -> Machine:
    """What is here for runs on `device`."""
    cores = _cores()
    if device == "cpu":
        return Machine(cores, _free())
    import torch

    return Machine(cores, int(torch.cuda.mem_get_info()[0]), "GPU memory")


def _cores() -> int:
    """Those that this process may use, by its affinity and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _free() -> int:
    """Bytes that this machine, and this process's control group, have left."""
    import psutil  # peft and accelerate need it

    free = int(psutil.virtual_memory().available)
    most, now = _read("memory.max").strip(), _read("memory.current").strip()
    if most.isdecimal() and now.isdecimal():
        cache = next((line.split()[1] for line in _read("memory.stat").splitlines() if "inactive_file" in line), "0")
        free = min(free, max(0, int(most) - int(now) + int(cache)))
    return free


def _read(name: str) -> str:
    with suppress(OSError):
        return (CONTROL_GROUP / name).read_text(encoding="utf-8")
    return ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
