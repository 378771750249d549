"""How many runs at once, where it is left to us: the scarcest of cores, memory and work, and a sentence that says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from weftlora.compare import at_once
from weftlora.compare.at_once import Machine, check, decide, decided, expected
from weftlora.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(
    ("cores", "threads", "free", "peak", "runs", "jobs"),
    [
        (8, 1, 64, 1, 100, 8),
        (8, 3, 64, 1, 100, 2),
        (8, 1, 10, 2, 100, 4),  # of 10 GiB, 8 are given away
        (8, 1, 64, 1, 3, 3),
        (8, 1, 64, 1, None, 8),
        (1, 4, 1, 64, 100, 1),  # there is always one
    ],
)
def test_the_scarcest_decides(cores: int, threads: int, free: int, peak: int, runs: int | None, jobs: int):
    found = decide(Machine(cores, free * GIB), threads, peak * GIB, True, runs)
    assert found.jobs == jobs
    assert found.said.startswith(f"{jobs} run{'s' * (jobs > 1)} at once: {cores} core")
    assert f"{free}.0 GiB of memory free at {peak}.0 GiB a run, as measured" in found.said
    assert ("3 left to run" in found.said) == (runs == 3)


def test_what_runs_took_counts_more_than_what_was_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(at_once, "machine", lambda device: Machine(16, 10 * GIB))
    plan = SimpleNamespace(device="cpu", recipe={"train": {"num_threads": 2}}, peak_bytes=GIB)
    assert decided("auto", plan, [tmp_path / "no-run"], 9).jobs == 8
    monkeypatch.setattr(at_once, "peak", lambda runs: 4 * GIB)
    assert decided("auto", plan, [], 9).jobs == 2
    assert decided(3, plan, [], 9) == at_once.Decision(3, "")
    assert decided(0, plan, [], 9).jobs == 1


def test_a_container_has_what_its_control_group_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(at_once, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(at_once.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    whole = at_once.machine("cpu")
    files = {"cpu.max": "250000 100000\n", "memory.max": f"{2**20}\n", "memory.current": f"{2**19}\n"}
    for name, text in files.items() | {("memory.stat", "anon 5\ninactive_file 1024\n")}:
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert (whole.cores, whole.free_bytes > 2**20) == (64, True)
    assert at_once.machine("cpu") == Machine(2, 2**19 + 1024)
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert at_once.machine("cpu").cores == 64


def test_what_is_expected_grows_with_all_that_takes_memory():
    settings = SimpleNamespace(
        hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, vocab_size=100
    )
    sizes = {"weights": 10**6, "trainable": 10**4, "settings": settings, "dtype_bytes": 4, "rows": 8, "longest": 32}
    least = expected(**sizes)
    assert least == at_once.LIBRARIES + 4 * 10**6 + 16 * 10**4 + 8 * 32 * (2 * (640 + 512 + 256) * 4 + 1200)
    for name in ("weights", "trainable", "dtype_bytes", "rows", "longest"):
        assert expected(**sizes | {name: 2 * sizes[name]}) > least


@pytest.mark.parametrize("jobs", [-1, 1.5, True, "many", None])
def test_what_is_no_number_of_runs_is_refused(jobs: object):
    with pytest.raises(ConfigError, match="is not a number of runs: use a whole number from 1 up, auto"):
        check(jobs)
