"""Machines that die and are cut off, simulated through the real claims: every run ends once, and never two workers on one."""

from __future__ import annotations

import pytest
from many_jobs import Simulation, World

from weftlora.compare import leases

BAD = World(jobs=40, nodes=8, mean=1800, dies=3600, cut_off=1800, away=900, ttl=120)


@pytest.mark.parametrize("seed", [0])
def test_every_run_ends_once_and_never_two_workers_are_on_one(seed: int):
    simulated = Simulation(World(**{**vars(BAD), "seed": seed}))
    found = simulated.run()
    assert not simulated.left
    assert found["takeovers"] > 3
    assert found["runs_that_a_fence_stopped"] > 3
    assert found["most_workers_on_one_job"] == 1
    assert found["runs_that_ended_twice"] == 0


def test_without_the_fence_two_workers_would_be_on_one_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "FENCE", 1e9)
    assert Simulation(BAD).run()["most_workers_on_one_job"] > 1


def test_without_failures_nothing_is_done_twice_and_nobody_waits_for_long():
    found = Simulation(World(jobs=60, nodes=6, dies=1e12, cut_off=1e12)).run()
    assert (found["takeovers"], found["work_done_twice"]) == (0, 0)
    assert found["hours"] < 1.2 * found["hours_without_failures"]
