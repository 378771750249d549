"""The fuzzer finds what it is to find, the committed counts add up, and every fault that it puts back is still there to put back."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import arms
import engine
import faults
import pytest
import readers
from mutations import Case, change_tree, deep, join_safetensors, safetensors_tensors, split_safetensors

import fuzz
from weftlora.errors import ConfigError, WeftError

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""A module."""
from __future__ import annotations

def sign(x: int) -> str:
    """Of x."""
    if x > 0:
        return "+"
    for n in range(3):
        if n == 1 and x == 0:
            break
    else:
        return "-"
    try:
        return {"0": "0"}[str(x)] or "never"
    except KeyError:
        return "never"

even = lambda xs: [x for x in xs if x % 2 == 0]
'''


def test_rewritten_code_does_the_same_and_marks_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = arms.Arms()
    monkeypatch.setattr(arms, "arms", mine)
    plain: dict[str, Callable[..., object]] = {}
    made: dict[str, object] = {"__arms__": mine.hits, "__arm__": lambda n: mine.hits.__setitem__(n, 1)}
    exec(compile(ast.parse(SOURCE), "m.py", "exec"), plain)
    exec(arms.rewritten(SOURCE, "m.py", "m.py"), made)
    seen = [mine.reached()]
    for x in (1, 2, -1, 0):
        assert made["sign"](x) == plain["sign"](x)  # type: ignore[operator]
        seen.append(mine.reached())
    assert made["even"]([1, 2]) == [2]  # type: ignore[operator]
    assert seen[0] == 0
    assert seen[1] == seen[2] < seen[3] < seen[4]
    reached, of = mine.of_entered("m.py")
    assert {name.rpartition(":")[2] for name in reached} >= {"sign", "body", "orelse", "further"}
    assert len(reached) < of  # the except


def target(call: Callable[[Path, Case], None], writer: bool = False) -> readers.Target:
    return readers.Target("planted", lambda: [{"x": b"seed"}], lambda rng, case: {"x": b"other"}, call, writer=writer)


def raises(error: BaseException) -> Callable[[Path, Case], None]:
    def call(folder: Path, case: Case) -> None:
        raise error

    return call


@pytest.fixture
def tried(tmp_path: Path) -> Callable[..., str]:
    def run(call: Callable[[Path, Case], None], case: Case | None = None, must_work: bool = False) -> str:
        made = target(call)
        sandbox = engine.Sandbox(tmp_path, made)
        eyes = engine.watch()
        eyes.top, eyes.outside = os.path.realpath(tmp_path / "inside"), os.path.realpath(tmp_path / "outside")
        sandbox.folder.mkdir(exist_ok=True)
        return engine.tried(made, sandbox, case or {"x": b"1"}, must_work)[0]

    return run


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("x=1 is not a y: use z."), ""),
        (ValueError("x"), "ValueError at "),
        (RecursionError(), "RecursionError at "),
        (SystemExit(1), "SystemExit at "),
        (MemoryError(), "memory at "),
        (AssertionError("a name made the tags ['b']"), "a name made the tags"),
    ],
)
def test_only_errors_of_the_tree_are_no_faults(tried: Callable[..., str], error: BaseException, kind: str) -> None:
    assert kind in tried(raises(error))
    assert bool(tried(raises(error))) == bool(kind)


def test_a_good_input_that_is_refused_is_a_fault(tried: Callable[..., str]) -> None:
    assert tried(raises(ConfigError("no.")), must_work=True).startswith("a good input is refused")
    assert tried(lambda folder, case: None, must_work=True) == ""


@pytest.mark.parametrize(
    ("said", "kind"), [("x" * 3000, "has"), ("\x1b[31m", "holds"), ("\u202e", "holds"), ("", "says nothing")]
)
def test_a_message_is_short_and_shows_what_is_in_it(tried: Callable[..., str], said: str, kind: str) -> None:
    error = WeftError()
    error.args = (said,)
    assert kind in tried(raises(error))


def test_whoever_leaves_the_folder_is_seen(tried: Callable[..., str], tmp_path: Path) -> None:
    def write(folder: Path, case: Case) -> None:
        (tmp_path / "mine").write_text("x")

    def look(folder: Path, case: Case) -> None:
        (folder / "link").read_text()

    assert tried(write) == "open outside of the folder"
    assert tried(look, {"link": "../outside/victim/run.json"}) == "a file beside the folder was opened"
    assert tried(lambda folder, case: (tmp_path / "mine").unlink()) == "os.remove outside of the folder"
    assert tried(lambda folder, case: subprocess.run(["true"], check=False)) == "subprocess.Popen was called"
    assert tried(lambda folder, case: (folder / "y").write_text("x")) == ""


def outcome(call: Callable[[Path, Case], None], tmp_path: Path) -> engine.Outcome:
    running = engine.start(engine.Slice(target(call), "0", 0, 5, 4, [], []), tmp_path / "top")
    while (out := engine.look(running)) is None:
        time.sleep(0.01)
    return out


def test_a_hang_is_interrupted_and_a_process_that_dies_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CPU", 0.2)

    def hang(folder: Path, case: Case) -> None:
        while case["x"] == b"other":
            pass

    def hang_in_c(folder: Path, case: Case) -> None:
        if case["x"] == b"other":
            max(range(10**12))

    assert [kind.partition(" at ")[0] for kind in outcome(hang, tmp_path).faults] == ["a hang"]
    assert list(outcome(hang_in_c, tmp_path).faults) == ["a hang in C"]
    died = outcome(lambda folder, case: os._exit(3) if case["x"] == b"other" else None, tmp_path)
    assert list(died.faults) == ["the process ended with 3"]
    assert died.faults["the process ended with 3"].case == {"x": b"other"}


def test_memory_beyond_the_bound_is_a_fault(tmp_path: Path) -> None:
    found = outcome(lambda folder, case: bytearray(2 * engine.MEMORY) and None, tmp_path)  # type: ignore[func-returns-value]
    assert [kind.partition(" at ")[0] for kind in found.faults] == ["memory"]
    assert found.inputs == 4


def test_a_smaller_input_of_the_same_fault_is_found(tmp_path: Path) -> None:
    def call(folder: Path, case: Case) -> None:
        if b"bad" in (folder / "x").read_bytes():
            raise KeyError

    made = target(call)
    sandbox = engine.Sandbox(tmp_path, made)
    sandbox.folder.mkdir(exist_ok=True)
    case: Case = {"x": b"much before bad and much behind"}
    kind = engine.tried(made, sandbox, case)[0]
    assert engine.shrunk(made, sandbox, case, kind) == {"x": b"bad"}


def test_mutations_make_what_they_say() -> None:
    import random

    tree = {"a": [1, {"b": "c"}], "d": None}
    made = [change_tree(random.Random(n), tree) for n in range(200)]
    assert tree == {"a": [1, {"b": "c"}], "d": None}
    assert sum(each == tree for each in made) < 20
    with pytest.raises(RecursionError):
        json.loads(deep(100_000, 1))
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    file = join_safetensors(json.dumps(header).encode(), b"\0" * 4)
    for n in range(100):
        found = split_safetensors(safetensors_tensors(random.Random(n), file))
        assert found is not None
        assert all(
            about["data_offsets"][1] <= len(found[1]) for key, about in found[0].items() if key != "__metadata__"
        )


@pytest.mark.parametrize("fault", [*faults.FAULTS, *faults.HELD_BY_TESTS], ids=lambda fault: fault.name)
def test_what_would_put_a_fault_back_is_in_the_source(fault: faults.PutBack) -> None:
    file, _, test = fault.target.partition("::")
    if test:
        assert f"\ndef {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")
    else:
        assert fault.target in {each.name for each in fuzz.targets()}
    faults.check(fault)


def test_inputs_that_once_were_faults_can_be_read() -> None:
    by_name = {each.name: each for each in fuzz.targets()}
    for entry in json.loads(fuzz.FOUND.read_text(encoding="utf-8")):
        assert entry["was"]
        if entry["target"] not in ("events", "data: saved datasets"):  # whose seeds take long to make
            assert fuzz.unpacked(entry, by_name[entry["target"]].seeds())


def test_the_committed_counts_add_up() -> None:
    record = json.loads((ROOT / "evidence" / "fuzz.json").read_text(encoding="utf-8"))
    assert set(record["targets"]) == {each.name for each in fuzz.targets()}
    assert record["inputs"] == sum(each["inputs"] for each in record["targets"].values())
    assert record["inputs"] == sum(each["inputs"] for each in record["parts"])
    for each in record["targets"].values():
        assert each["inputs"] > 0
        assert 0 < each["arms"] <= each["of"]
        assert each["grew"] <= each["inputs"]
        if not each["faults"]:  # a fault that was counted may be one of time
            assert each["slowest"] <= record["bounds"]["cpu_seconds"] or each.get("not_promised")
        assert each["peak_mib"] <= record["bounds"]["memory_mib"]
    for rows, held in (("put_back", faults.FAULTS), ("put_back_for_tests", faults.HELD_BY_TESTS)):
        assert {row["fault"] for row in record[rows]} == {fault.name for fault in held}
        assert all(row["again"] for row in record[rows])


def test_a_part_is_added_to_those_before() -> None:
    record: dict[str, object] = {}
    for inputs, reached, grew in ((10, 3, 7), (20, 5, 25), (5, 4, 31)):
        out = engine.Outcome("recipes", inputs, 1.0, 0.5, 1 << 20, grew, reached, 9, times={"x": 1})
        record = fuzz.added(record, [out], "0", 1.0)
    kept = record["targets"]["recipes"]  # type: ignore[index]
    assert (record["inputs"], record["faults"], kept["inputs"], kept["arms"], kept["grew"]) == (35, 3, 35, 5, 25)
    assert len(record["parts"]) == 3  # type: ignore[arg-type]
