"""What every engine does with jobs: begins each once, at most so many at a time, tells of each end, and stops what is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comparing import recipe

from weftlora.compare.engine import BEGUN, Engine, Resources
from weftlora.compare.leases import Claims, Files
from weftlora.compare.plan import make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.workers import InThisProcess, Pool, status
from weftlora.compare.working import Leased
from weftlora.progress import Tick

pytestmark = pytest.mark.kills

JOBS = 3


@dataclass
class Case:
    """An engine inside its `with`, what it is given, and how many of its jobs have come to an end that counts."""

    engine: Engine[Any]
    following: Callable[[], Any]
    ended: Callable[[], int]


@pytest.fixture(params=["in this process", "processes", "leases", "ray"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[bool], Case]]:
    """How to have one, of jobs that take long or do not."""
    held = ExitStack()

    def local(is_long: bool) -> Case:
        steps = 20_000 if is_long else 1
        plan = make(
            CompareRecipe.read(
                recipe(tmp_path, methods=["lora"], seeds=JOBS, train={"steps": steps, "save_every": 10**6})
            )
        )
        folder = Path(plan.recipe["out"])
        folder.mkdir()
        jobs = plan.reported(plan.methods[0], 1e-2)
        left = iter(jobs)

        def ended() -> int:
            return sum(status(folder / job.folder, False) == "complete" for job in jobs)

        if request.param == "leases":
            plan.save(folder)
            leased = Leased(folder, Claims(Files(str(folder / "leases")), "me"), lambda standing: None, None)
            held.enter_context(leased.ready())
            return Case(leased, lambda: leased.claimed(plan), ended)
        engine = InThisProcess(folder) if request.param == "in this process" else Pool(2, folder, 0)
        return Case(held.enter_context(engine), lambda: next(left, None), ended)

    def on_a_cluster(is_long: bool) -> Case:
        ray = pytest.importorskip("ray", reason="the extra ray is not installed")
        from weftlora.compare.on_ray import Cluster

        def task(folder: str, seconds: float) -> None:
            time.sleep(seconds)
            Path(folder, f"{time.time_ns()}.done").write_text("", encoding="utf-8")

        held.callback(ray.shutdown)
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20)
        given = (task, str(tmp_path), 600.0 if is_long else 0.1)
        left = iter(range(JOBS))
        cluster = Cluster(ray, Resources(), 2, given, 0.2)
        return Case(cluster, lambda: next(left, None), lambda: len([*tmp_path.glob("*.done")]))

    with held:
        yield on_a_cluster if request.param == "ray" else local


def test_each_job_begins_once_and_ends_once_and_never_are_there_more_than_so_many(made: Callable[[bool], Case]):
    case = made(False)
    told: list[tuple[Any, Tick | None]] = []
    most = 0

    def tell(job: Any, tick: Tick | None) -> None:
        nonlocal most
        told.append((job, tick))
        most = max(most, len(case.engine.at_work))

    case.engine.run(case.following, tell)
    begun = [job for job, tick in told if tick == BEGUN]
    ended = [job for job, tick in told if tick is None]
    assert sorted({str(job) for job in begun}) == sorted(str(job) for job in ended)
    assert len(ended) == JOBS
    assert most == case.engine.count
    assert not case.engine.at_work
    assert case.ended() == JOBS


def test_what_is_cancelled_ends_where_it_is_and_nothing_more_begins(made: Callable[[bool], Case]):
    case = made(True)
    if isinstance(case.engine, InThisProcess):
        pytest.skip("a run in this process ends by itself")
    asked: list[Any] = []
    ended: list[Any] = []

    def following() -> Any:
        asked.append(case.following())
        return asked[-1]

    began = time.monotonic()
    case.engine.run(
        following, lambda job, tick: ended.append(job) if tick is None else None, lambda: time.monotonic() > began + 3
    )
    assert len(asked) == case.engine.count
    assert not case.engine.at_work
    assert (ended, case.ended()) == ([], 0)
