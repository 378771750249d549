"""Claims by leases: one worker a job, takeover of what is lost, and nobody at work on what is not his any more."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from weftlora.compare.leases import FENCE, Claims, Files, check_none, name_of
from weftlora.errors import RunError

TTL = 10.0
JOBS = ["a", "b"]


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A local folder, and an object store in memory, both through fsspec."""
    return str(tmp_path / "leases") if request.param == "folder" else f"memory://{tmp_path.name}"


def worker(place: str, name: str, clock: Clock | None = None) -> Claims:
    return Claims(Files(place), name, TTL, clock or Clock())


def test_a_job_is_claimed_once_and_one_that_has_ended_never_again(place: str):
    one, other = worker(place, "one"), worker(place, "other")
    first, second = one.claim(JOBS), other.claim(JOBS)
    assert first is not None
    assert second is not None
    assert (first.job, second.job) == ("a", "b")
    assert one.claim(JOBS) is None
    assert one.unended(JOBS) == ["a", "b"]
    one.end(first)
    assert one.unended(JOBS) == ["b"]
    for _ in range(3):
        other.now.time += TTL  # type: ignore[attr-defined]
        assert other.claim(["a"]) is None


def test_of_many_who_try_at_once_one_gets_the_job(tmp_path: Path):
    place, start = str(tmp_path), threading.Barrier(16)
    got: list[str] = []

    def attempt(name: str) -> None:
        claims = worker(place, name)
        start.wait()
        if claims.claim(["a"]) is not None:
            got.append(name)

    threads = [threading.Thread(target=attempt, args=(f"w{n}",)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_taken_over(place: str):
    mine, theirs = Clock(), Clock()
    theirs.time = 10**6  # clocks of two machines are never compared
    one, other = worker(place, "one", mine), worker(place, "other", theirs)
    lease = one.claim(["a"])
    assert lease is not None
    for _ in range(20):
        mine.time += TTL / 4
        theirs.time += TTL / 4
        assert one.renew(lease)
        assert other.claim(["a"]) is None
    theirs.time += TTL - 0.1
    assert other.claim(["a"]) is None
    theirs.time += 0.2
    taken = other.claim(["a"])
    assert taken is not None
    assert (taken.job, taken.n) == ("a", 1)
    mine.time += TTL / 4
    assert not one.renew(lease)  # it comes back, and finds the later claim
    theirs.time += TTL / 4
    assert other.renew(taken)


def test_a_worker_that_is_cut_off_stops_before_anybody_else_can_begin(place: str, monkeypatch: pytest.MonkeyPatch):
    clock, theirs = Clock(), Clock()
    one, other = worker(place, "one", clock), worker(place, "other", theirs)
    lease = one.claim(["a"])
    assert lease is not None
    assert other.claim(["a"]) is None  # the earliest that it can have seen this lease

    def away(*_: object) -> None:
        raise OSError("no route to storage")

    monkeypatch.setattr(one.storage, "read", away)
    monkeypatch.setattr(one.storage, "write", away)
    while one.renew(lease):
        clock.time += 0.1
        theirs.time += 0.1
    assert clock.time == pytest.approx(FENCE * TTL, abs=0.11)
    assert other.claim(["a"]) is None
    theirs.time = TTL + 0.1
    assert other.claim(["a"]) is not None


def test_storage_that_is_away_for_a_moment_costs_nothing(place: str, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    one = worker(place, "one", clock)
    lease = one.claim(["a"])
    assert lease is not None
    with monkeypatch.context() as patched:
        patched.setattr(one.storage, "write", lambda *_: (_ for _ in ()).throw(OSError("slow")))
        clock.time += TTL / 4
        assert one.renew(lease)
    clock.time += TTL / 4
    assert one.renew(lease)
    assert lease.renewed == clock.time


def test_a_half_written_lease_is_somebodys_until_it_has_not_changed(place: str):
    clock = Clock()
    other = worker(place, "other", clock)
    other.storage.write("a.0.lease", '{"owner": ')
    assert other.claim(["a"]) is None
    clock.time += TTL + 0.1
    assert other.claim(["a"]) is not None


def test_who_is_in_charge_is_told_of_workers_that_were_heard_of(tmp_path: Path):
    claims = worker(str(tmp_path / "leases"), "node7-123")
    lease = claims.claim(["a"])
    assert lease is not None
    with pytest.raises(RunError, match="has workers, such as node7-123"):
        check_none(tmp_path / "leases", TTL)
    os.utime(tmp_path / "leases" / lease.name, (0, time.time() - TTL - 1))
    check_none(tmp_path / "leases", TTL)
    claims.end(lease)
    check_none(tmp_path / "leases", TTL)


def test_storage_that_is_not_there_is_one_sentence():
    with pytest.raises(RunError, match="nosuch://bucket cannot be reached"):
        Files("nosuch://bucket")
    assert name_of("tuning/lora/lr0.01-s1000") == "tuning+lora+lr0.01-s1000"
