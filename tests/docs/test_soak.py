"""The committed count of `make soak`, how a kill's place is read from what it left behind, and that a soak finds what is wrong."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soak
import soak_engines
import stages
import torch

from weftlora.disk.files import write_text
from weftlora.train import checkpoint

ROOT = Path(__file__).parents[2]
SUMS = ("tries", "identical", "lives", "kills", "fresh_lives", "fresh_kills", "moved", "refused")


def test_the_committed_soak_had_no_failure_and_its_parts_add_up(tmp_path: Path) -> None:
    found = json.loads((ROOT / "evidence" / "soak.json").read_text())
    counted: dict[str, Counter[str]] = {}
    for part in found["parts"].values():
        for name, tally in part["commands"].items():
            assert tally["failures"] == []
            assert tally["identical"] == tally["tries"]
            assert sum(tally["phases"].values()) == tally["kills"] <= tally["troubles"].get("killed", 0)
            counted.setdefault(name, Counter()).update({key: tally[key] for key in SUMS})
    assert set(counted) == set(soak.commands(tmp_path))
    assert found["failures"] == 0
    assert {key: found[key] for key in SUMS} == dict(sum(counted.values(), Counter()))
    assert set(found["troubles"]) == set(soak.TROUBLES)
    assert min(tally["kills"] for tally in counted.values()) > 0


def test_a_process_of_every_engine_was_killed_ten_times_and_the_runs_ended_as_undisturbed() -> None:
    found = json.loads((ROOT / "evidence" / "soak.json").read_text())["engines"]
    engines = {name: each for name, each in found.items() if name not in ("command", "versions")}
    assert engines.keys() >= {"ddp", "fsdp2", "fsdp1", "tp"}, "ZeRO where DeepSpeed is installed"
    for name, each in engines.items():
        assert each["failures"] == [], name
        assert each["kills"] >= 10, name
        assert each["identical"] == each["tries"] == sum(each["methods"].values())
        assert sum(each["stages"].values()) == sum(each["ranks"].values()) == each["kills"]
        assert each["lives"] >= each["kills"] + each["tries"]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, ""),
        ({"events": [{"event": "dash_launch", "step": 4}]}, "decided otherwise"),
        ({"tensors": {"A": torch.ones(2), "mask": torch.ones(1)}}, "other tensors"),
        ({"tensors": {"A": torch.ones(2) + 1e-6}}, "other weights"),
    ],
)
def test_a_run_that_ends_otherwise_than_the_undisturbed_one_is_a_failure(change: dict[str, Any], wrong: str) -> None:
    whole = {"events": [{"event": "dash_launch", "step": 3}], "tensors": {"A": torch.ones(2)}}
    said = soak_engines.wrong_with(whole, [whole, {**whole, **change}], exact=True)
    assert (wrong in said and "process 1" in said) if wrong else not said


def test_what_the_engines_came_to_stays_where_commands_are_counted(tmp_path: Path) -> None:
    (tmp_path / "soak.json").write_text(json.dumps({"parts": {}, "engines": {"ddp": {"kills": 3}}}))
    assert soak.of_engines(tmp_path / "soak.json") == {"engines": {"ddp": {"kills": 3}}}
    assert soak.of_engines(tmp_path / "none.json") == {}


def run_folder(out: Path, status: str = "running") -> Path:
    (out / "checkpoints").mkdir(parents=True)
    words = dict.fromkeys(("base_dir", "task", "device"), "")
    numbers = dict.fromkeys(("seed", "steps", "threads"), 1)
    sections = {name: {} for name in ("versions", "base", "adapter", "parameters", "recipe", "data")}
    record = {**words, **numbers, **sections, "status": status}
    (out / "run.json").write_text(json.dumps(record))
    return out


def test_the_place_of_a_kill(tmp_path: Path) -> None:
    assert soak.phase_of_run(tmp_path) == "before run.json"
    out = run_folder(tmp_path / "run")
    assert soak.phase_of_run(out) == "before the first step"
    last = out / "checkpoints" / "checkpoint-4"
    last.mkdir()
    assert soak.phase_of_run(out) == "writing a checkpoint"
    checkpoint.mark(last, 4)
    assert soak.phase_of_run(out) == "training"
    (out / "events.jsonl").write_text('{"event": "dash_launch"}\n')
    assert soak.phase_of_run(out) == "training, after a launch"
    (out / ".adapter.weft-0123456789abcdef").mkdir()
    assert soak.phase_of_run(out) == "writing the adapter or run.json"
    assert soak.phase_of_run(run_folder(tmp_path / "done", "complete")) == "after the end"


def test_a_process_tells_which_part_of_its_work_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left behind a kill, the byte in the file is that of the moment."""
    (tmp_path / "at_work.py").write_text(
        "class Search:\n    def step(self, look): return look()\n\ndef load(look): return [look(), Search().step(look), look()]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(stages, "_told", [])
    stages.watch({"at_work:load": "reading rows", "at_work:Search.step": "a step of the search"})
    work = importlib.import_module("at_work")
    file = tmp_path / "stage"
    file.write_bytes(b"\0")
    assert work.load(lambda: 1) == [1, 1, 1], "nothing is told yet"
    stages.tell(file)
    assert stages.read(file) == "starting"
    assert work.load(lambda: stages.read(file)) == ["reading rows", "a step of the search", "reading rows"]
    assert stages.read(file) == "after reading rows"
    with pytest.raises(ZeroDivisionError):
        work.Search().step(lambda: 1 / 0)
    assert stages.read(file) == "after a step of the search"


@pytest.mark.parametrize("where", stages.MARKED)
def test_what_is_marked_is_there(where: str) -> None:
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)


def well(place: Path) -> None:
    time.sleep(0.02)
    write_text(place / "out.txt", "whole")


def slowly(place: Path) -> None:
    time.sleep(0.1)  # as long as a try expects, so that moments drawn from that are moments of a life
    well(place)


def in_place(place: Path) -> None:
    (place / "out.txt").write_text("wh")
    time.sleep(0.1)
    (place / "out.txt").write_text("whole")


def with_a_child(place: Path) -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    well(place)


def taking_notes_away(place: Path) -> None:
    (place / soak.NOTES).write_text("")
    well(place)


def otherwise(place: Path) -> None:
    write_text(place / "out.txt", str(os.getpid()))


def without_a_sentence(place: Path) -> None:
    time.sleep(0.1)
    raise ValueError("a traceback")


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (slowly, ""),
        (in_place, "looks finished"),
        (with_a_child, "outlive it"),
        (taking_notes_away, "the user's file"),
        (otherwise, "another result"),
        (without_a_sentence, "a traceback"),
    ],
)
def test_a_soak_finds_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[Path], None], wanted: str
) -> None:
    monkeypatch.setattr(soak, "cli", lambda arguments: command(Path(arguments[0])))
    monkeypatch.setattr(soak, "SURVIVAL", 0.5)
    made = soak.Command(
        "a command",
        lambda place, moved: [str(place)],
        lambda place: soak.of_file(place / "out.txt"),
        lambda place: "somewhere",
        lambda place: (place.mkdir(exist_ok=True), (place / soak.NOTES).write_text("mine"))[0],
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    write_text(whole / "out.txt", "whole")
    tally = soak.Tally()
    for number in range(6):
        one = soak.Try(made, tmp_path / str(number), made.pieces(whole), 0.1, tally, random.Random(number), False)
        monkeypatch.setattr(one, "trouble", lambda *but: "killed")
        one.run()
    if wanted:
        assert any(wanted in failure for failure in tally.failures)
    else:
        assert tally.failures == []
        assert tally.identical == tally.tries == 6
        assert tally.troubles["killed"] >= tally.kills == sum(tally.phases.values()) > 0


def test_parts_add_up_and_go_on(tmp_path: Path) -> None:
    one = soak.Tally(tries=1, identical=1, lives=4, kills=3, troubles=Counter(killed=3), phases=Counter(training=3))
    parts = {seed: {"commands": {"search": one.plain()}, "seconds": 5} for seed in ("0", "1")}
    found = soak.record(parts)
    assert (found["kills"], found["tries"], found["seconds"], found["troubles"]) == (6, 2, 10, {"killed": 6})
    (tmp_path / "soak.json").write_text(json.dumps(found))
    assert soak.tallies_of(soak.read_parts(tmp_path / "soak.json")["1"])["search"] == one
