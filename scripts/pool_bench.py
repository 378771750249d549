"""What the processes of a comparison cost and survive, ours against kept libraries, into bench/pool.json.

    pip install --target FOLDER loky pebble
    PYTHONPATH=FOLDER python scripts/pool_bench.py --out bench/pool.json

For each pool: CPU seconds of a run's process until it can begin with everything imported; the most memory that a small run finds used
after large ones in the same pool; and what becomes of the other run when one is killed, and of the next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from weftlora.compare.workers import IMPORTED

RUNS = 3


def life(kind: str) -> dict[str, float]:
    """A run: imports what runs need, and says what that cost this process and how much memory it is in."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    if kind == "large":
        held = bytearray(os.urandom(1) * (200 << 20))
        held[-1] = 1
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":
        time.sleep(3)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    return {"cpu": usage.ru_utime + usage.ru_stime, "peak_mib": peak, "pid": os.getpid()}


def context() -> Any:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(IMPORTED))
    return made


def pools() -> dict[str, tuple[Callable[[], Any], Callable[[Any, str], Any]]]:
    """Name → how to make it with two workers, and how to ask it for a run (a future)."""
    import loky
    import pebble

    return {
        "pebble, a process a run, forked from a server, as ours": (
            lambda: pebble.ProcessPool(2, max_tasks=1, context=context()),
            lambda pool, kind: pool.schedule(life, args=[kind]),
        ),
        "concurrent.futures, a process a run, forked from a server": (
            lambda: ProcessPoolExecutor(2, mp_context=context(), max_tasks_per_child=1),
            lambda pool, kind: pool.submit(life, kind),
        ),
        "concurrent.futures, processes kept": (
            lambda: ProcessPoolExecutor(2, mp_context=context()),
            lambda pool, kind: pool.submit(life, kind),
        ),
        "loky (joblib's), processes kept": (
            lambda: loky.ProcessPoolExecutor(2),
            lambda pool, kind: pool.submit(life, kind),
        ),
    }


def outcome(future: Any) -> Any:
    try:
        return future.result(timeout=300)
    except BaseException as error:
        return type(error).__name__


def measured(make: Callable[[], Any], ask: Callable[[Any, str], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with make() as pool:
        found["cpu_seconds_to_begin"] = round(
            statistics.median(outcome(ask(pool, "small"))["cpu"] for _ in range(RUNS)), 2
        )
        outcome(ask(pool, "large")), outcome(ask(pool, "large"))
        found["peak_mib_after_a_large_run"] = round(max(outcome(ask(pool, "small"))["peak_mib"] for _ in range(2)))
    with make() as pool:
        slow, killed = ask(pool, "slow"), ask(pool, "killed")
        said, rest = outcome(killed), outcome(slow)
        found["killed_run"] = said
        found["the_other_run"] = "went on" if isinstance(rest, dict) else rest
        next_one = outcome(_asked(ask, pool))
        found["the_next_run"] = "began" if isinstance(next_one, dict) else next_one
    return found


def _asked(ask: Callable[[Any, str], Any], pool: Any) -> Any:
    class Refused:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def result(self, timeout: float) -> Any:
            raise self.error

    try:
        return ask(pool, "small")
    except BaseException as error:
        return Refused(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    record = {"command": "PYTHONPATH=FOLDER python scripts/pool_bench.py --out bench/pool.json", "pools": {}}
    for name, (make, ask) in pools().items():
        record["pools"][name] = measured(make, ask)  # type: ignore[index]
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
