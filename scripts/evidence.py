"""Rebuild committed results from what they were made of, and the pages that show them.

    python scripts/evidence.py --list                   what there is, and how each is made
    python scripts/evidence.py dash-runs --jobs 2       one of them: evidence/dash-runs.json, and the pages anew
    python scripts/evidence.py dash-runs -- seeds=2     what follows -- goes to the commands that make it
    python scripts/evidence.py --all --jobs 2           all that `make evidence` rebuilds (hours)
    python scripts/evidence.py --page                   only the pages, from evidence/: docs/evidence.md and docs/real-runs.md

Results of real models need WEFT_DATA (see README), the encoder also the extra `evidence`. Runs are kept in runs/; what lies there
is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import compared
import evidence_page
import real_runs
import real_tasks

from claims import ROOT, SOURCES

FOLDER = ROOT / "evidence"
PAGE = ROOT / "docs" / "evidence.md"


def build(name: str, jobs: int, more: list[str]) -> None:
    """Run the commands of a result in the project's folder; what `weftlora` prints as JSON becomes the result."""
    source = SOURCES[name]
    compared.check_needs([*source.recipes] or ["demo"])
    if any("mixture" in task for task in source.recipes):
        real_tasks.mixture()
    records = [run(name, command, jobs if source.takes_jobs else 0, more) for command in source.commands]
    if name == "alora-move":
        keep_moves(name, source.commands[0], records[0])
    elif source.recipes:
        keep_rows(name, dict(zip(source.recipes, records, strict=True)))
    elif records[0]:
        keep_record(name, records[0])


def run(name: str, command: str, jobs: int, more: list[str]) -> dict[str, Any]:
    """One command; the record that `weftlora` prints, and nothing of other programs."""
    program, *rest = shlex.split(command)
    arguments = [*rest, *(["--jobs", str(jobs)] if jobs else []), *more]
    start = {"weftlora": [sys.executable, "-m", "weftlora"], "python": [sys.executable]}.get(program, [program])
    record = subprocess.PIPE if program == "weftlora" else None
    done = subprocess.run([*start, *arguments], cwd=ROOT, env=environment(), stdout=record, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} was not made: {command} failed.")
    return json.loads(done.stdout) if record is not None else {}


def keep_rows(name: str, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Save what the comparisons of several tasks found, a row per run."""
    tasks = []
    for task, record in records.items():
        check_complete(name, record)
        base = {"base": compared.base_score(record)} if any(m["name"] == "none" for m in record["methods"]) else {}
        label = "method" if name == "real-runs" else "variant"
        counts = {m["name"]: m["parameters"] for m in record["methods"] if m["rank"] is not None}
        tasks.append({"task": task, **base, "adapter_parameters": counts, "runs": compared.rows(record, label)})
    compared.save(name, f"python scripts/evidence.py {name}", tasks)


def check_complete(name: str, record: Mapping[str, Any]) -> None:
    if not record["complete"]:
        sys.exit(f"the comparison {name} is not complete; give the same command again.")


def keep_record(name: str, record: dict[str, Any]) -> None:
    """Save what a comparison found, without the folders of this machine."""
    check_complete(name, record)
    folder = ROOT / str(record["folder"])
    record["folder"] = str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def keep_moves(name: str, command: str, record: dict[str, Any]) -> None:
    """Save the loss of every run, and of each of its rounds how many slots were to move, moved, and were lost, and why fewer."""
    check_complete(name, record)
    runs = []
    for done in sorted(record["outcomes"], key=lambda each: (each["method"], each["seed"])):
        lines = (ROOT / record["folder"] / done["folder"] / "events.jsonl").read_text(encoding="utf-8").splitlines()
        rounds = [event for event in map(json.loads, lines) if event["event"] == "reallocation"]
        runs.append(
            {
                "method": done["method"],
                "seed": done["seed"],
                "loss": done["scores"][record["metric"]],
                "asked": [event["asked"] for event in rounds],
                "moved": [len(event["pruned"]) for event in rounds],
                "lost": [event["lost"] for event in rounds],
                "clipped": [event.get("clipped", []) for event in rounds],
            }
        )
    result = {"command": command, "versions": record["versions"], "metric": record["metric"], "runs": runs}
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_pages() -> None:
    """docs/evidence.md and docs/real-runs.md, from evidence/."""
    PAGE.write_text(evidence_page.page(FOLDER), encoding="utf-8")
    real_runs.DOCUMENT.write_text(real_runs.report(), encoding="utf-8")


def listing() -> str:
    """A line per result."""
    lines = [f"{name:<16} {source.what}: {'; '.join(source.commands)}" for name, source in SOURCES.items()]
    left_out = [f"--all leaves out {name}: {source.alone}" for name, source in SOURCES.items() if source.alone]
    return "\n".join([*lines, *left_out])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", nargs="?", choices=SOURCES)
    options.add_argument("more", nargs="*", help="after --, for the command itself")
    options.add_argument("--all", action="store_true")
    options.add_argument("--page", action="store_true")
    options.add_argument("--list", action="store_true")
    options.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    args = options.parse_args()
    if args.list or not (args.name or args.all or args.page):
        print(listing())
        return
    names = [n for n, source in SOURCES.items() if not source.alone] if args.all else [args.name] if args.name else []
    for name in names:
        build(name, args.jobs, args.more)
    write_pages()


if __name__ == "__main__":
    main()
