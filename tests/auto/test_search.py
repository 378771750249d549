"""The searches over planted losses: what is asked, what goes on, and that it is the same again, whatever was stopped where."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weftlora.auto.plan import Size
from weftlora.auto.record import Tried
from weftlora.auto.search import Search, best, journal, ranking
from weftlora.compare.plan import Job

pytestmark = pytest.mark.sharded

METHODS = ["lora", "good", "bad", "broken"]
STEPS = 90


class Runs:
    """What `Search` needs of a comparison's plan."""

    def __init__(self) -> None:
        self.slugs = {name: name for name in METHODS}

    def of(self, name: str) -> Any:
        return SimpleNamespace(name=name)

    def trial(self, method: Any, seed: int, lr: float, steps: int, folder: str) -> Job:
        return Job(method.name, seed, lr, True, folder, {"train": {"steps": steps}}, "", "loss", False)


def planted(job: Job) -> float | None:
    """A bowl over log lr with its bottom at 0.01, less for longer runs; the method that is good is lower everywhere."""
    if job.method == "broken":
        return None
    offset = {"lora": 0.0, "good": -0.2, "bad": 0.5}[job.method]
    return 2.0 + offset + math.log10(job.lr / 0.01) ** 2 - job.recipe["train"]["steps"] / 1000


class Machine:
    """Carries out runs, remembering what it was asked for; dies once it has done `lives`."""

    def __init__(self, done: dict[str, float | None], lives: int = 10**6) -> None:
        self.done, self.lives, self.order = done, lives, list[str]()

    def __call__(self, jobs: list[Job]) -> dict[str, float | None]:
        for job in jobs:
            if job.folder not in self.done:
                if not self.lives:
                    raise KeyboardInterrupt
                self.lives -= 1
                self.order.append(job.folder)
                self.done[job.folder] = planted(job)
        return {job.folder: self.done[job.folder] for job in jobs}


def searched(folder: Path, machine: Machine) -> list[Tried]:
    plan: Any = SimpleNamespace(
        size=Size(6, 99, 3, 3, 5), steps=STEPS, lr=1e-3, starts=dict.fromkeys(METHODS, 1.0), methods=METHODS
    )
    with journal(folder) as storage:
        search = Search(plan, Runs(), machine, lambda _: "it broke.", storage)  # type: ignore[arg-type]
        tried = search.rates("lora")
        found = best(tried, STEPS)
        assert found is not None
        return [*tried, *search.methods(found.lr)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tried], Machine]:
    machine = Machine({})
    return searched(tmp_path_factory.mktemp("whole"), machine), machine


def test_the_rate_search_finds_the_bottom_of_the_bowl_from_a_tenth_of_it(whole: tuple[list[Tried], Machine]):
    tried, _ = whole
    rates = [each for each in tried if each.stage == "rates"]
    assert [each.lr for each in rates[:3]] == [1e-3, 2.5e-4, 4e-3]
    found = best(rates, STEPS)
    assert found is not None
    assert 5e-3 < found.lr < 2e-2


def test_halving_stops_what_is_worse_trains_what_is_better_to_the_end_and_goes_on_past_what_fails(
    whole: tuple[list[Tried], Machine],
):
    tried, machine = whole
    methods = [each for each in tried if each.stage == "methods"]
    assert len(methods) == 3 * len(METHODS)
    by_method = {name: [each for each in methods if each.method == name] for name in METHODS}
    assert by_method["lora"][0].state == "complete"  # the first always goes on
    assert {each.state for each in by_method["bad"]} == {"stopped"}
    assert {(each.state, each.problem) for each in by_method["broken"]} == {("failed", "it broke.")}
    assert "complete" in {each.state for each in by_method["good"]}
    full = [each for each in methods if str(STEPS) in each.losses]
    assert len(full) < len(methods) / 2
    assert not any("bad" in folder and f"n{STEPS}" in folder for folder in machine.order)
    assert [each.method for each in ranking(tried, STEPS)] == ["good", "lora", "bad"]


@pytest.mark.parametrize("kill", [2, 4, 13])
def test_a_search_that_was_stopped_anywhere_ends_as_the_one_that_was_not(
    whole: tuple[list[Tried], Machine], kill: int, tmp_path: Path
):
    done: dict[str, float | None] = {}
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, Machine(done, kill))
    assert len(done) == kill
    (tmp_path / "journal.log.lock").write_text("of a process that was killed", encoding="utf-8")
    machine = Machine(done)
    assert searched(tmp_path, machine) == whole[0]
    assert kill + len(machine.order) == len(whole[1].order)  # nothing is run twice


def test_runs_that_end_in_another_order_change_nothing(whole: tuple[list[Tried], Machine], tmp_path: Path):
    class Backwards(Machine):
        def __call__(self, jobs: list[Job]) -> dict[str, float | None]:
            return super().__call__(jobs[::-1])

    assert searched(tmp_path, Backwards({})) == whole[0]
