"""`make fuzz`: bad files through every reader, names of strangers through every writer, and nothing may happen that is not promised.

    python scripts/fuzz.py [--minutes 25] [--out evidence/fuzz.json]     one part; its counts are added to those of the parts before
    python scripts/fuzz.py --slice 50                                     seconds over all targets, seeds first; nothing is counted
    python scripts/fuzz.py --only run.json --minutes 1                    one target
    python scripts/fuzz.py --faults                                       every fault that was fixed, put back, is found again: by
                                                                          the slice, or by the test that holds it (half an hour)

What is tried, and what must hold, is in tests/fuzz. What an earlier part learned of a target is in out/fuzz, which is no part of the
project: without it a part begins with the seeds. Exits 1 if anything was found.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests")]
os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
)

import arms

if __name__ == "__main__":
    arms.watch("weftlora", "yaml")  # before anything imports them

import engine
from faults import FAULTS, HELD_BY_TESTS, check, patched, put_back
from matrix import source_digest
from mutations import Case
from readers import Target, readers
from writers import writers

from weftlora.foreign_text import visible

FOUND = ROOT / "tests" / "fuzz" / "seeds" / "found.json"
LEARNT = ROOT / "out" / "fuzz"
LEAST, WHOLE = 20_000, 1_000_000
"""Inputs of each target, and of all together, that the campaign is to reach."""
TURN = 25.0
"""Seconds of a target at a time, at the least."""


def targets() -> list[Target]:
    return [*readers(), *writers()]


# ---------------------------------------------------------------------- inputs that once were faults


def unpacked(entry: dict[str, Any], seeds: list[Case]) -> Case:
    """A case as it is committed: what differs from a seed. Texts, or base64 of what is no text, of a large file of what is between
    its head and its tail, which are the seed's; a link is {"link": where it leads}."""
    case = dict(seeds[entry["seed"]])
    for name, content in entry["case"].items():
        if content is None:
            del case[name]
        elif isinstance(content, str):
            case[name] = content.encode()
        elif "link" in content:
            case[name] = content["link"]
        else:
            was, middle = seeds[entry["seed"]].get(name, b""), base64.b64decode(content["base64"])
            head, tail = content.get("head", 0), content.get("tail", 0)
            assert isinstance(was, bytes)
            case[name] = was[:head] + middle + was[len(was) - tail :]
    return case


def packed(target: Target, was: str, case: Case) -> dict[str, Any]:
    """The other way round."""
    seeds = target.seeds()
    number = min(
        range(len(seeds)), key=lambda n: sum(seeds[n].get(name) != case.get(name) for name in {*seeds[n], *case})
    )
    made: dict[str, Any] = dict.fromkeys(seeds[number].keys() - case.keys())
    for name, content in case.items():
        if seeds[number].get(name) == content:
            continue
        if isinstance(content, str):
            made[name] = {"link": content}
            continue
        try:
            made[name] = content.decode("utf-8")
        except UnicodeDecodeError:
            made[name] = _between(seeds[number].get(name, b""), content)
    return {"target": target.name, "was": was, "seed": number, "case": made}


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _between(was: Any, content: bytes) -> dict[str, Any]:
    """What of a file is not a seed's head or tail."""
    head = _common(was, content) if isinstance(was, bytes) else 0
    tail = _common(was[head:][::-1], content[head:][::-1]) if head else 0
    between = base64.b64encode(content[head : len(content) - tail]).decode()
    return (
        {"head": head, "tail": tail, "base64": between}
        if head + tail > 2000
        else {"base64": base64.b64encode(content).decode()}
    )


def found(target: Target) -> list[Case]:
    """The committed inputs that once were faults of a target."""
    entries = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.is_file() else []
    return [unpacked(entry, target.seeds()) for entry in entries if entry["target"] == target.name]


# ---------------------------------------------------------------------- carrying out


def prepared(chosen: list[Target]) -> None:
    """Everything imported and made once, before processes are forked: each target reads its own seeds."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-", dir=memory()) as top, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = Path.cwd()
        for number, target in enumerate(chosen):
            sandbox = engine.Sandbox(Path(top) / str(number), target)
            for case in target.seeds():
                kind, detail = engine.tried(target, sandbox, case, must_work=True, seconds=0)  # much is imported first
                if kind:
                    print(f"{target.name}: a seed is a fault: {kind} {detail}", flush=True)
        os.chdir(here)


def memory() -> str | None:
    """A folder in memory, where the machine has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def learned(target: str) -> Path:
    return LEARNT / f"{hashlib.sha256(target.encode()).hexdigest()[:12]}.pickle"


def corpus_of(target: str) -> list[Case]:
    try:
        kept: list[Case] = pickle.loads(learned(target).read_bytes())
        return kept
    except (OSError, ValueError, pickle.UnpicklingError, EOFError):
        return []


def keep_corpus(target: str, corpus: list[Case]) -> None:
    LEARNT.mkdir(parents=True, exist_ok=True)
    partial = learned(target).with_suffix(".tmp")
    partial.write_bytes(pickle.dumps(corpus[: engine.MOST]))
    partial.replace(learned(target))


def campaign(
    chosen: list[Target],
    counts: dict[str, int],
    seconds: float,
    seed: str,
    jobs: int,
    turn: float,
    once: bool = False,
) -> list[engine.Outcome]:
    """Slices of targets until the time is over, those first that have not had enough inputs yet; or one slice of each.

    Args:
        counts: inputs that each target has had before.
        turn: seconds of a slice.
        once: one slice of each target, whatever the time; nothing is learned from earlier parts, or kept for later ones.
    """
    end, done = time.monotonic() + seconds, list[engine.Outcome]()
    had = {target.name: counts.get(target.name, 0) for target in chosen}
    turns = dict.fromkeys(had, 0)
    running: dict[str, engine.Running] = {}
    top = Path(tempfile.mkdtemp(prefix="weft-fuzz-", dir=memory()))

    def waiting() -> list[Target]:
        if once:
            return [target for target in chosen if not turns[target.name]]
        return [target for target in chosen if target.name not in running] if time.monotonic() < end else []

    while (free := waiting()) or running:
        if len(running) < jobs and free:
            target = min(free, key=lambda each: (had[each.name] >= LEAST, turns[each.name]))
            turns[target.name] += 1
            work = engine.Slice(
                target, seed, had[target.name], turn if once else min(turn, end - time.monotonic()), 10**9,
                found(target) if turns[target.name] == 1 else [], [] if once else corpus_of(target.name),
            )  # fmt: skip
            running[target.name] = engine.start(work, top / str(len(done) * 100 + len(running)))
        for name, each in [*running.items()]:
            if (out := engine.look(each)) is not None:
                del running[name]
                had[name] += out.inputs
                for kind in next(target for target in chosen if target.name == name).not_promised:
                    if out.faults.pop(kind, None):
                        out.apart += out.times.pop(kind)
                if not once:
                    keep_corpus(name, out.corpus)
                done.append(out)
                print(f"{name}: {had[name]:,} inputs, {out.reached}/{out.of} arms, {out.inputs / max(out.seconds, 0.01):.0f} a second"
                      + "".join(f"\n    FAULT {kind} ({out.times[kind]} times)" for kind in out.faults), flush=True)  # fmt: skip
        time.sleep(0.05)
    return done


# ---------------------------------------------------------------------- what is kept


def found_again(chosen: list[Target], seconds: float) -> list[dict[str, Any]]:
    """Every fault put back: whether the slice finds it, and after how many inputs mutations of good inputs alone do."""
    by_name = {target.name: target for target in chosen}
    top = Path(tempfile.mkdtemp(prefix="weft-fuzz-", dir=memory()))
    rows = []
    for fault in [fault for fault in FAULTS if fault.target in by_name]:
        target, row = by_name[fault.target], {"fault": fault.name, "target": fault.target}
        check(fault)
        for how, known in (("slice", found(target)), ("without", []))[: 2 if seconds else 1]:
            most = len(target.seeds()) + len(known) if how == "slice" else 20_000
            work = engine.Slice(
                target, "faults", 0, seconds, most, known, [], functools.partial(put_back, fault), until_fault=True
            )
            running = engine.start(work, top)
            while (out := engine.look(running)) is None:
                time.sleep(0.02)
            met = next(iter(out.faults.values()), None)
            if how == "slice":
                row |= {"again": met is not None, "as": met.kind if met else ""}
            else:
                row |= {"inputs_without": met.number + 1 if met else None}
        rows.append(row)
        print(f"{'found' if row['again'] else 'NOT FOUND'}: {row}", flush=True)
    return rows


def failed_again(held: list[Any], out: Path) -> list[dict[str, Any]]:
    """Every fault that a test holds, put back in a copy of the source: whether its test, which passes without, fails.

    The record is written after each, so that what is stopped is not lost.
    """
    rows: dict[str, dict[str, Any]] = {row["fault"]: row for row in kept(out).get("put_back_for_tests", [])}
    tests = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fuzz" / "held.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    passes: dict[str, str] = {}

    def failure(test: str, source: Path) -> str:
        """What a test says where it fails with this source; empty where it passes."""
        assert tests.stdin
        assert tests.stdout
        tests.stdin.write(json.dumps({"test": test, "source": str(source)}) + "\n")
        tests.stdin.flush()
        done = json.loads(tests.stdout.readline())
        said = [line for line in done["said"].splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done["code"] not in (0, 1) or (done["code"] and not said):
            raise SystemExit(f"{test}: pytest ended with {done['code']}: {done['said'][-1500:]}")
        return visible(said[0].partition(" - ")[2])[:160] or "it fails" if done["code"] else ""

    for fault in held:
        check(fault)
        if fault.target not in passes:
            passes[fault.target] = failure(fault.target, ROOT / "src")
        with tempfile.TemporaryDirectory(prefix="weft-put-back-") as top:
            found = failure(fault.target, patched(fault, Path(top)))
        rows[fault.name] = {
            "fault": fault.name, "test": fault.target, "source": source_digest("src/weftlora"),
            "again": bool(found) and not passes[fault.target],
            "as": found,
        }  # fmt: skip
        record = kept(out)
        record["put_back_for_tests"] = [rows[each.name] for each in HELD_BY_TESTS if each.name in rows]
        write(out, record)
        said = "found" if rows[fault.name]["again"] else f"NOT FOUND (without it: {passes[fault.target]})"
        print(f"{said}: {rows[fault.name]}", flush=True)
    assert tests.stdin
    tests.stdin.close()
    tests.wait()
    return [rows[fault.name] for fault in held]


def added(
    record: dict[str, Any], done: list[engine.Outcome], seed: str, seconds: float, source: str = ""
) -> dict[str, Any]:
    """The record with a part more in it; `source` is the digest of what was tried."""
    every = record.setdefault("targets", {})
    writes = {target.name for target in writers()}
    for out in done:
        entry = every.setdefault(out.target, {
            "is": "writer" if out.target in writes else "reader", "inputs": 0, "faults": 0, "arms": 0, "of": 0, "grew": 0,
            "slowest": 0.0, "peak_mib": 0,
        })  # fmt: skip
        entry["inputs"] += out.inputs
        entry["faults"] += sum(out.times.values())
        if out.apart:  # what docs/security.md says may happen
            entry["not_promised"] = entry.get("not_promised", 0) + out.apart
        if out.reached > entry["arms"]:
            entry["arms"], entry["of"] = out.reached, out.of
            entry["grew"] = out.grew or entry["grew"]
        entry["slowest"] = round(max(entry["slowest"], out.slowest), 2)
        entry["peak_mib"] = max(entry["peak_mib"], out.peak >> 20)
    record.setdefault("parts", []).append({
        "seed": seed, "source": source, "seconds": round(seconds), "inputs": sum(out.inputs for out in done),
        "faults": sum(sum(out.times.values()) for out in done),
    })  # fmt: skip
    record["inputs"] = sum(entry["inputs"] for entry in every.values())
    record["faults"] = sum(entry["faults"] for entry in every.values())
    record["bounds"] = {"cpu_seconds": engine.CPU, "memory_mib": engine.MEMORY >> 20, "message_characters": 2000}
    return record


def kept(path: Path) -> dict[str, Any]:
    """The record so far."""
    found_so_far: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found_so_far


def write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def shown(faults: list[engine.Fault]) -> str:
    return "\n".join(
        f"{each.target}: {each.kind} (input {each.number}, by {each.by})\n    {each.detail[:300]}" for each in faults
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--slice", type=float, help="seconds over all targets; nothing is counted")
    parser.add_argument("--only", action="append", help="this target; may be given several times")
    parser.add_argument("--seed", help="of the inputs; by default the number of the part")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "fuzz.json")
    parser.add_argument("--new", type=Path, help="write what was found to this file, as seeds/found.json has it")
    parser.add_argument("--faults", action="store_true", help="put every fault back that was fixed, and find it again")
    parser.add_argument(
        "--held", action="append", help="with --faults: of those that tests hold this one, or all; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="with --faults: only whether the slice finds them")
    given = parser.parse_args()
    chosen = [target for target in targets() if not (given.only or given.held) or target.name in (given.only or ())]
    if not chosen and not given.held:
        sys.exit(f"there is no target {given.only}: use {', '.join(target.name for target in targets())}")
    began, source = time.monotonic(), source_digest("src/weftlora")
    prepared(chosen)
    print(f"ready in {time.monotonic() - began:.1f} s", flush=True)
    by_name = {target.name: target for target in chosen}
    record = kept(given.out)
    if given.faults:
        rows = found_again(chosen, 0 if given.quick else 20) if chosen else []
        record = kept(given.out)  # as it is by now: a part may have ended meanwhile
        others = [row for row in record.get("put_back", []) if row["target"] not in by_name]
        record["put_back"] = [*others, *rows]
        write(given.out, record)
        if not given.only or given.held:
            rows += failed_again(
                [fault for fault in HELD_BY_TESTS if not given.held or {"all", fault.name} & {*given.held}], given.out
            )
        missed = [row["fault"] for row in rows if not row["again"]]
        print(f"{len(rows)} faults put back, {len(missed)} not found again: {', '.join(missed)}")
        return 1 if missed else 0
    if given.slice is not None:
        done = campaign(
            chosen,
            {},
            given.slice,
            given.seed or "slice",
            given.jobs,
            given.slice * given.jobs / len(chosen),
            once=True,
        )
    else:
        counts = {name: entry["inputs"] for name, entry in record.get("targets", {}).items()}
        seed = given.seed or f"part {len(record.get('parts', [])) + 1}"
        turn = max(
            TURN, 15 * given.minutes / len(chosen)
        )  # a target alone need not try what it has learned again and again
        done = campaign(chosen, counts, 60 * given.minutes, seed, given.jobs, turn)
        write(given.out, added(kept(given.out), done, seed, time.monotonic() - began, source))
    faults = list({(out.target, kind): fault for out in done for kind, fault in out.faults.items()}.values())
    print(f"{sum(out.inputs for out in done):,} inputs, {len(faults)} kinds of fault")
    if faults:
        print(shown(faults))
    if given.new and faults:
        given.new.write_text(
            json.dumps([packed(by_name[f.target], f.kind, f.case) for f in faults], indent=1) + "\n",
            encoding="utf-8",
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
